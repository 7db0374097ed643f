"""The fused kernels on the GPU or TPU that is here, against the vendor's and PyTorch's: masks, scores and a decoding step.

Part of ``attnzoo bench attention`` (suite ``accelerator``). Calls take turns in one process; each turn launches several
times and waits once, so that the host's overhead of a launch is not what is measured.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.core.attention import attention
from attnzoo.core.masks import Causal, Mask, Segments, SlidingWindow
from attnzoo.core.scores import ALiBi, Score, SoftCap
from benchmarks._measure import interleaved

#: Launches per turn.
LAUNCHES = 20


class Problem(NamedTuple):
    """One call. sizes: B T S N K H. cells: visible (query, key) pairs of one head and batch row. flex: PyTorch's
    ``(mask_mod, score_mod)`` that say the same; plain: whether the only mask is a causal one, or none."""

    name: str
    sizes: tuple[int, int, int, int, int, int]
    mask: Mask | None
    score: Score | None
    cells: int
    flex: Callable[[], tuple[Any, Any]]
    plain: bool = False


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def problems() -> list[Problem]:
    def triangle(t: int) -> int:
        return t * (t + 1) // 2

    def window(t: int, w: int) -> int:
        return triangle(w) + (t - w) * w

    cuts = [0, 700, 1500, 3600, 4096, 6000, 8192]
    ids = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))[None].astype(np.int32)
    slopes = np.asarray(ALiBi.for_heads(16).slopes)

    def documents() -> tuple[Any, Any]:
        import torch

        here = torch.tensor(ids[0], device="cuda")
        return lambda b, h, q, k: (q >= k) & (here[q] == here[k]), None

    def alibi() -> tuple[Any, Any]:
        import torch

        m = torch.tensor(slopes, device="cuda")
        return _causal, lambda s, b, h, q, k: s - m[h] * (q - k)

    def soft_cap() -> tuple[Any, Any]:
        import torch

        return _causal, lambda s, b, h, q, k: 30 * torch.tanh(s / 30)

    return [
        Problem("no mask", (4, 4096, 4096, 16, 16, 128), None, None, 4096**2, lambda: (None, None), True),
        Problem("causal", (4, 4096, 4096, 16, 16, 128), Causal(), None, triangle(4096), lambda: (_causal, None), True),
        Problem("causal, H=64", (4, 4096, 4096, 16, 16, 64), Causal(), None, triangle(4096), lambda: (_causal, None), True),
        Problem(
            "causal, 32 heads on 8", (2, 8192, 8192, 32, 8, 128), Causal(), None, triangle(8192), lambda: (_causal, None), True
        ),
        Problem(
            "window of 1024", (1, 16384, 16384, 16, 16, 128), Causal() & SlidingWindow(1024), None, window(16384, 1024),
            lambda: (lambda b, h, q, k: (q >= k) & (q - k < 1024), None),
        ),
        Problem(
            "documents", (2, 8192, 8192, 16, 16, 128), Causal() & Segments(np.repeat(ids, 2, 0)), None,
            int(sum(triangle(n) for n in np.diff(cuts))), documents,
        ),
        Problem("causal, ALiBi", (4, 4096, 4096, 16, 16, 128), Causal(), ALiBi(jnp.asarray(slopes)), triangle(4096), alibi),
        Problem("causal, soft cap", (4, 4096, 4096, 16, 16, 128), Causal(), SoftCap(30.0), triangle(4096), soft_cap),
    ]  # fmt: skip


class Calls(NamedTuple):
    """``LAUNCHES`` calls, forward, and forward with backward."""

    forward: Callable[[], Any]
    both: Callable[[], Any] | None


def _jax(f: Callable[..., Any], qkv: list[Any], backward: bool = True) -> Calls:
    def total(*qkv: Any) -> Any:
        return f(*qkv).astype(jnp.float32).sum()

    def launched(g: Callable[..., Any]) -> Callable[[], Any]:
        g = jax.jit(g)
        return lambda: jax.block_until_ready([g(*qkv) for _ in range(LAUNCHES)][-1])

    return Calls(launched(f), launched(jax.grad(total, (0, 1, 2))) if backward else None)


def _torch(f: Callable[..., Any], qkv: list[Any]) -> Calls:
    import torch

    def run(backward: bool) -> None:
        for _ in range(LAUNCHES):
            with torch.set_grad_enabled(backward):
                out = f(*qkv)
            if backward:
                torch.autograd.grad(out, qkv, torch.ones_like(out))
        torch.cuda.synchronize()

    return Calls(functools.partial(run, False), functools.partial(run, True))


def _gpu_peers(p: Problem, qkv: list[Any]) -> dict[str, Callable[[], Calls]]:
    """What else computes this problem, to be tried one by one."""
    t, heads, kv_heads, width = p.sizes[1], p.sizes[3], p.sizes[4], p.sizes[5]

    def cudnn() -> Calls:
        given: dict[str, Any] = {"is_causal": True} if p.mask is not None else {}
        if isinstance(p.mask, Mask) and not p.plain:
            given["local_window_size"] = (1023, 0)
        return _jax(lambda *x: jax.nn.dot_product_attention(*x, implementation="cudnn", **given), qkv)

    def mosaic() -> Calls:
        from jax.experimental.pallas.ops.gpu import attention_mgpu as theirs

        tuning = theirs.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=p.mask is not None)
        halves = [x.astype(jnp.float16) for x in qkv]
        return _jax(lambda *x: theirs.attention(*x, tuning), halves, backward=False)

    def tensors() -> list[Any]:
        import torch

        shapes = [(p.sizes[0], n, t, width) for n in (heads, kv_heads, kv_heads)]
        return [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]

    def sdpa() -> Calls:
        import torch.nn.functional as functional

        kind = {"is_causal": p.mask is not None, "enable_gqa": heads != kv_heads}
        return _torch(lambda *x: functional.scaled_dot_product_attention(*x, **kind), tensors())

    def flex() -> Calls:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask, score = p.flex()
        blocks = None if mask is None else create_block_mask(mask, None, None, t, t, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        gqa = heads != kv_heads
        return _torch(lambda *x: compiled(*x, score_mod=score, block_mask=blocks, enable_gqa=gqa), tensors())

    peers = {"torch flex_attention": flex}
    if p.plain:
        peers |= {"cuDNN (jax.nn)": cudnn, "torch sdpa": sdpa, "attention_mgpu, f16": mosaic}
    elif p.name.startswith("window"):
        peers |= {"cuDNN (jax.nn)": cudnn}
    return peers


def _tries(make: Callable[[], Calls]) -> Calls | str:
    """The calls, each run once; or why they cannot be had here."""
    try:
        calls = make()
        calls.forward()
        if calls.both is not None:
            calls.both()
    except Exception as e:  # a peer that is missing or fails is a row without numbers
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160]}" if str(e).strip() else type(e).__name__
    return calls


def accelerator(options: argparse.Namespace) -> dict[str, Any]:
    """Every problem by every implementation that is here: milliseconds of a launch, and TFLOP/s over visible cells.

    Raises ValueError where there is no accelerator.
    """
    platform = jax.default_backend()
    if platform == "cpu":
        raise ValueError("the suite 'accelerator' needs a GPU or a TPU, and the default device is a cpu")
    rows: dict[str, Any] = {}
    for p in problems():
        batch, t, s, heads, kv_heads, width = p.sizes
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = [(batch, t, heads, width), (batch, s, kv_heads, width), (batch, s, kv_heads, width)]
        qkv = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]

        def ours(p: Problem = p, qkv: list[Any] = qkv) -> Calls:
            return _jax(functools.partial(attention, mask=p.mask, score=p.score, backend="pallas"), qkv)

        makes = {"attnzoo": ours, **(_gpu_peers(p, qkv) if platform == "gpu" else {})}
        tried = {name: _tries(make) for name, make in makes.items()}
        able = {name: calls for name, calls in tried.items() if isinstance(calls, Calls)}
        flops = 4 * batch * heads * width * p.cells
        found: dict[str, Any] = {name: {"failed": why} for name, why in tried.items() if isinstance(why, str)}
        for what, share in (("forward", 1.0), ("forward+backward", 3.5)):
            pick = {name: calls.forward if what == "forward" else calls.both for name, calls in able.items()}
            for name, times in interleaved({n: f for n, f in pick.items() if f is not None}, options.repeat).items():
                each = {field: round(ms / LAUNCHES, 4) for field, ms in times.items()}
                tflops = round(share * flops / each["median_ms"] / 1e9, 1)
                found.setdefault(name, {})[what] = each | {"tflops": tflops}
        rows[p.name] = {"sizes": dict(zip(("B", "T", "S", "N", "K", "H"), p.sizes, strict=True)), "by": found}
        print(
            p.name, {n: {w: x["median_ms"] for w, x in r.items() if w != "failed"} or r for n, r in found.items()}, flush=True
        )
    return {"device": jax.devices()[0].device_kind, "sizes": {"launches": LAUNCHES}, "rows": rows}


def plot(result: dict[str, Any], path: Any) -> None:
    """TFLOP/s of every implementation, a group of bars per problem."""
    import matplotlib.pyplot as plt

    rows = result["rows"]
    names = sorted({n for row in rows.values() for n in row["by"]})
    fig, axes = plt.subplots(1, 2, figsize=(11, 0.62 * len(rows) + 1.4), layout="constrained", sharey=True)
    height = 0.8 / len(names)
    for ax, what in zip(axes, ("forward", "forward+backward"), strict=True):
        for i, name in enumerate(names):
            y = [row["by"].get(name, {}).get(what, {}).get("tflops", np.nan) for row in rows.values()]
            ax.barh(np.arange(len(rows)) + i * height, y, height, label=name)
        ax.set(title=what, xlabel="TFLOP/s over visible cells")
        ax.set_yticks(np.arange(len(rows)) + 0.4 - height / 2, list(rows))
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize=8)
    fig.suptitle(f"bfloat16 attention on {result['device']}", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)
