"""Attention backends against ``jax.nn`` and, where they are installed, PyTorch and tokamax.

    attnzoo bench attention                        # all suites, about ten minutes on two cores
    attnzoo bench attention --suite causal         # T=4096, float32 and bfloat16, forward and forward+backward
    attnzoo bench attention --suite window --repeat 9
    attnzoo bench attention --suite maps --out .   # block maps of a million tokens
    attnzoo bench attention --suite accelerator    # the fused kernels on a GPU or TPU; what "all" means there

Every suite writes ``attention_<suite>.json`` and a plot beside it. Cases take turns in one process and report medians;
``peak_mib`` is the growth of the process while one call runs, ``compiled_mib`` what XLA's plan of the program holds at once
(arguments, results and temporaries): the same on every run, so the exponent of memory is fitted to it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.core.attention import attention
from attnzoo.core.masks import Causal, Prefix, SlidingWindow
from benchmarks import _accelerator as accelerator
from benchmarks._measure import arguments, environment, interleaved, parsed, peak_mib, save

WHATS = ("forward", "forward+backward")


def _inputs(length: int, heads: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(1, length, heads, width)).astype(np.float32) for _ in range(3)]


Calls = tuple[Callable[[], Any], Callable[[], Any]]
"""Forward, and forward with backward."""


class _Compiled:
    """A compiled program with its arguments. compiled_mib: arguments, results and temporaries."""

    def __init__(self, f: Callable[..., Any], arguments: list[Any]):
        self.program, self.arguments = jax.jit(f).lower(*arguments).compile(), arguments
        held = self.program.memory_analysis()
        size = held.argument_size_in_bytes + held.output_size_in_bytes + held.temp_size_in_bytes
        self.compiled_mib = round(size / 2**20, 1)

    def __call__(self) -> Any:
        return jax.block_until_ready(self.program(*self.arguments))


def _jax_calls(f: Callable[..., Any], arrays: list[np.ndarray], dtype: Any) -> tuple[_Compiled, _Compiled]:
    qkv = [jnp.asarray(x, dtype) for x in arrays]
    return _Compiled(f, qkv), _Compiled(jax.grad(lambda q, k, v: f(q, k, v).astype(jnp.float32).sum(), (0, 1, 2)), qkv)


def _torch_calls(arrays: list[np.ndarray]) -> dict[str, Calls]:
    try:
        import torch
        import torch.nn.functional as functional
    except ImportError:
        return {}
    torch.set_num_threads(environment()["cores"])
    q, k, v = (torch.tensor(x).transpose(1, 2).contiguous().requires_grad_() for x in arrays)

    def calls(f: Callable[..., Any]) -> Calls:
        def forward() -> None:
            with torch.no_grad():
                f(q, k, v)

        def both() -> None:
            q.grad = k.grad = v.grad = None
            f(q, k, v).sum().backward()

        return forward, both

    return {"torch sdpa": calls(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True))}


def _flex_forward(arrays: list[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """PyTorch's flex_attention, compiled: on CPUs it has no backward pass, and needs a C++ compiler."""
    if shutil.which("g++") is None:
        return {}
    try:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return {}
    q, k, v = (torch.tensor(x).transpose(1, 2).contiguous() for x in arrays)
    length = q.shape[2]
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention)

    def forward() -> None:
        with torch.no_grad():
            compiled(q, k, v, block_mask=mask)

    return {"torch flex_attention": forward}


def _tokamax_calls(arrays: list[np.ndarray]) -> dict[str, Calls]:
    try:
        import tokamax
    except ImportError:
        return {}

    def f(q: Any, k: Any, v: Any) -> Any:
        return tokamax.dot_product_attention(q, k, v, is_causal=True, implementation="xla_chunked")

    return {"tokamax xla_chunked": _jax_calls(f, arrays, jnp.float32)}


def _products_alone(q: Any, k: Any, v: Any) -> Any:
    """The two products of every tile that a causal mask leaves, and nothing else: no program of JAX's products is faster."""
    q, k, v = (jnp.swapaxes(x[0], 0, 1) for x in (q, k, v))
    k, block = jnp.swapaxes(k, 1, 2), min(512, q.shape[1])

    def row(_: None, i: Any) -> tuple[None, Any]:
        q_i = jax.lax.dynamic_slice_in_dim(q, i * block, block, 1)

        def tile(j: Any, out: Any) -> Any:
            k_j, v_j = (jax.lax.dynamic_slice_in_dim(x, j * block, block, axis) for x, axis in ((k, 2), (v, 1)))
            return out + q_i @ k_j @ v_j

        return None, jax.lax.fori_loop(0, i + 1, tile, jnp.zeros_like(q_i))

    return jax.lax.scan(row, None, jnp.arange(q.shape[1] // block))[1]


def causal(options: argparse.Namespace) -> dict[str, Any]:
    """Causal attention, B=1: ours (blockwise; dense for scale) against the peers.

    The forward pass is also set beside its products alone: what a CPU's matrix unit and memory leave to gain.
    """
    arrays = _inputs(options.length, options.heads, options.width)

    def ours(backend: str) -> Callable[..., Any]:
        return lambda q, k, v: attention(q, k, v, mask=Causal(), backend=backend)

    calls = {
        "attnzoo blockwise": _jax_calls(ours("blockwise"), arrays, jnp.float32),
        "attnzoo blockwise bf16": _jax_calls(ours("blockwise"), arrays, jnp.bfloat16),
        "attnzoo dense": _jax_calls(ours("dense"), arrays, jnp.float32),
        "jax.nn": _jax_calls(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), arrays, jnp.float32),
        **_torch_calls(arrays),
        **_tokamax_calls(arrays),
    }
    qkv = [jnp.asarray(x) for x in arrays]
    forward_only = {"products alone": _Compiled(_products_alone, qkv), **_flex_forward(arrays)}
    rows: dict[str, dict[str, Any]] = {name: {} for name in (*calls, *forward_only)}
    for i, what in enumerate(WHATS):
        cases = {name: pair[i] for name, pair in calls.items()} | ({} if i else forward_only)
        for name, times in interleaved(cases, options.repeat).items():
            rows[name][what] = times | {"peak_mib": peak_mib(cases[name])}
    ratios = {}
    for what in WHATS:
        mine = rows["attnzoo blockwise"][what]["median_ms"]
        ratios[what] = {
            "faster_than_jax.nn": round(rows["jax.nn"][what]["median_ms"] / mine, 2),
            "bf16_over_f32": round(rows["attnzoo blockwise bf16"][what]["median_ms"] / mine, 2),
        }
        if "torch sdpa" in rows:
            ratios[what]["of_torch_sdpa"] = round(mine / rows["torch sdpa"][what]["median_ms"], 2)
    forward, products = ratios["forward"], rows["products alone"]["forward"]["median_ms"]
    forward["of_products_alone"] = round(rows["attnzoo blockwise"]["forward"]["median_ms"] / products, 2)
    forward["products_alone_faster_than_jax.nn"] = round(rows["jax.nn"]["forward"]["median_ms"] / products, 2)
    sizes = {"B": 1, "T": options.length, "N": options.heads, "H": options.width}
    return {"sizes": sizes, "rows": rows, "ratios": ratios}


def window(options: argparse.Namespace) -> dict[str, Any]:
    """Sliding window of 256: time and memory against length, and the cost of a visited tile against a dense one."""
    mask = Causal() & SlidingWindow(256)
    lengths = [2048, 4096, 8192, 16384]
    rows: dict[str, Any] = {}
    pairs = {}
    for n in lengths:
        arrays = _inputs(n, options.heads, options.width)
        pairs[n] = _jax_calls(lambda q, k, v: attention(q, k, v, mask=mask, backend="blockwise"), arrays, jnp.float32)
    times = [interleaved({str(n): pairs[n][i] for n in lengths}, options.repeat) for i in (0, 1)]
    for n in lengths:
        rows[str(n)] = {
            what: times[i][str(n)] | {"peak_mib": peak_mib(pairs[n][i]), "compiled_mib": pairs[n][i].compiled_mib}
            for i, what in enumerate(WHATS)
        }
    last = lengths[-1]
    arrays = _inputs(last, options.heads, options.width)
    dense = _jax_calls(lambda q, k, v: attention(q, k, v, backend="blockwise"), arrays, jnp.float32)
    share = mask.block_map(last).visited
    against = {}
    for i, what in enumerate(WHATS):
        both = interleaved({"window": pairs[last][i], "all tiles": dense[i]}, 3)
        ratio = both["window"]["median_ms"] / both["all tiles"]["median_ms"]
        against[what] = both | {"share_of_tiles": round(share, 5), "cost_per_tile_over_dense": round(ratio / share, 2)}

    def exponent(what: str, field: str) -> float:
        y = [rows[str(n)][what][field] for n in lengths]
        return round(float(np.polyfit(np.log(lengths), np.log(y), 1)[0]), 3)

    exponents = {what: {"time": exponent(what, "median_ms"), "memory": exponent(what, "compiled_mib")} for what in WHATS}
    sizes = {"B": 1, "N": options.heads, "H": options.width, "window": 256}
    return {"sizes": sizes, "rows": rows, "exponents": exponents, "against_all_tiles": against}


def maps(options: argparse.Namespace) -> dict[str, Any]:
    """Block maps of a million tokens in 512-blocks: seconds and the memory numpy took."""
    cases = {"Causal() & SlidingWindow(4096) | Prefix(512)": Causal() & SlidingWindow(4096) | Prefix(512), "Causal()": Causal()}
    rows = {}
    for name, mask in cases.items():
        seconds = []
        for _ in range(options.repeat):
            start = time.perf_counter()
            made = mask.block_map(2**20)
            seconds.append(time.perf_counter() - start)
        tracemalloc.start()
        mask.block_map(2**20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows[name] = {"median_s": round(float(np.median(seconds)), 3), "peak_mb": round(peak / 1e6, 1), "map": repr(made)}
    return {"sizes": {"T": 2**20, "block": 512}, "rows": rows}


SUITES = {"causal": causal, "window": window, "maps": maps, "accelerator": accelerator.accelerator}


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    suite = result["suite"]
    if suite == "accelerator":
        return accelerator.plot(result, path)
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    rows = result["rows"]
    memory = "compiled_mib" if suite == "window" else "peak_mib"
    for ax, field, label in zip(axes, ("median_ms", memory), ("milliseconds (median)", "peak memory, MiB"), strict=True):
        for i, what in enumerate(WHATS):
            y = [rows[name].get(what, {}).get(field, np.nan) for name in rows]
            if suite == "window":
                ax.loglog([int(n) for n in rows], y, "o-", base=2, label=what)
            else:
                ax.barh(np.arange(len(rows)) + 0.4 * i, y, 0.38, label=what)
        ax.set_xlabel("tokens" if suite == "window" else label)
        if suite == "window":
            ax.set_ylabel(label)
            ax.grid(alpha=0.3)
        else:
            ax.set_yticks(np.arange(len(rows)) + 0.2, list(rows) if ax is axes[0] else [])
            ax.invert_yaxis()
        ax.legend(frameon=False)
    sizes = ", ".join(f"{k}={v}" for k, v in result["sizes"].items())
    fig.suptitle(f"{suite} attention, {sizes}, {result['environment']['cores']} CPU cores", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen suites; returns the exit code."""
    parser = arguments("attention", __doc__)
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    parser.add_argument("--length", type=int, default=4096, help="tokens of the causal suite (default 4096)")
    parser.add_argument("--heads", type=int, default=8, help="heads (default 8)")
    parser.add_argument("--width", type=int, default=64, help="head width (default 64)")
    parser.add_argument("--repeat", type=int, default=7, help="turns of each case (default 7)")
    options = parsed(parser, argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU PyTorch needs memory too
    every = [name for name in SUITES if (name == "accelerator") == (jax.default_backend() != "cpu")]
    for suite in every if options.suite == "all" else [options.suite]:
        before = environment()
        result = {"suite": suite, **SUITES[suite](options)}
        print(json.dumps(result, indent=1))
        save(f"attention_{suite}", options, before, result, None if suite == "maps" else _plot)
    return 0
