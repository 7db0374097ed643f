"""One token per row against a long cache: grouped attention, latent attention and factors.

examples:
  attnzoo bench decode
  attnzoo bench decode --lengths 4096 16384 --repeat 15

N, K and H are fixed, and the caches of the other two hold at most a quarter of what grouped attention's holds. A step is all
that a layer does for a token: its projections, the write into the cache (donated, so in place) and the attention over all
slots. Times are medians of cases that take turns; float32.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnzoo.core.cache import LayerCache, cache_bytes
from attnzoo.core.positions import RoPE
from attnzoo.nn.mixer import Mixer
from attnzoo.nn.mla import MultiHeadLatentAttention
from attnzoo.zoo.projections.tpa import TensorProductAttention
from attnzoo.zoo.projections.transformer import GroupedQueryAttention
from benchmarks._measure import arguments, environment, interleaved, parsed, save

SIZES = {"B": 2, "D": 1024, "N": 16, "K": 8, "H": 128, "r": 448, "P": 64, "R_q": 6, "R_k": 1, "R_v": 1}
RATIO = 4
"""How much smaller the caches of the other two must be, at least."""


def mixers() -> dict[str, Mixer]:
    """The three layers, of `SIZES`."""
    s = SIZES
    shared: dict[str, Any] = {"head_dim": s["H"], "causal": True, "positions": RoPE(), "rngs": nnx.Rngs(0)}
    return {
        "grouped attention": GroupedQueryAttention(s["D"], s["N"], num_kv_heads=s["K"], **shared),
        "latent, absorbed": MultiHeadLatentAttention(s["D"], s["N"], latent_dim=s["r"], rope_dim=s["P"], **shared),
        "factors": TensorProductAttention(
            s["D"], s["N"], rank_q=s["R_q"], rank_k=s["R_k"], rank_v=s["R_v"], **shared
        ),
    }  # fmt: skip


def filled(cache: LayerCache, tokens: int) -> LayerCache:
    """The cache as if it had seen that many tokens, with random payload."""
    leaves, tree = jax.tree.flatten(cache.payload)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    payload = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    number = jnp.broadcast_to(jnp.arange(cache.slots, dtype=jnp.int32), cache.pos.shape)
    return dataclasses.replace(
        cache,
        payload=jax.tree.unflatten(tree, payload),
        pos=jnp.where(number < tokens, number, -1),
        w=(number < tokens).astype(jnp.float32),
        seen=jnp.full_like(cache.seen, tokens),
    )


def stepper(mixer: Mixer, length: int, spare: int) -> tuple[Callable[[], Any], int]:
    """A call that decodes one more token over `length` slots, of which `spare` are free at first; bytes of the payload."""
    graphdef, state = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(1), (SIZES["B"], 1, SIZES["D"]))
    cache = filled(mixer.init_cache(SIZES["B"], length), length - spare)
    size = cache_bytes(cache)

    def one(state: Any, x: Any, cache: LayerCache) -> tuple[Any, LayerCache]:
        return nnx.merge(graphdef, state).step(x, cache)

    step = jax.jit(one, donate_argnums=2).lower(state, x, cache).compile()

    def call() -> None:
        nonlocal cache
        y, cache = step(state, x, cache)
        jax.block_until_ready(y)

    return call, size


def measure(lengths: list[int], repeat: int) -> dict[str, Any]:
    """Rows by length: milliseconds per token and MiB of cache of each, and how much faster than grouped attention."""
    numbers = {name: mixer.cache_numbers_per_token() for name, mixer in mixers().items()}
    grouped, *others = numbers
    ratios = {name: round(numbers[grouped] / numbers[name], 2) for name in others}
    if min(ratios.values()) < RATIO:
        raise ValueError(f"SIZES: caches must be {RATIO} times smaller than grouped attention's, got {ratios}")
    rows = {}
    for length in lengths:
        steps = {name: stepper(mixer, length, repeat + 1) for name, mixer in mixers().items()}
        times: dict[str, Any] = interleaved({name: call for name, (call, _) in steps.items()}, repeat)
        for name, (_, size) in steps.items():
            times[name]["cache_mib"] = round(size / 2**20, 1)
        faster = {name: round(times[grouped]["median_ms"] / times[name]["median_ms"], 2) for name in others}
        rows[str(length)] = {"per token": times, "faster_than_grouped": faster}
    return {"sizes": SIZES, "cache_numbers_per_token": numbers, "cache_ratio": ratios, "rows": rows}


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = result["rows"]
    lengths = [int(n) for n in rows]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    fields = {"median_ms": "milliseconds per token (median)", "cache_mib": "cache of a layer, MiB"}
    for ax, (field, label) in zip(axes, fields.items(), strict=True):
        for name, numbers in result["cache_numbers_per_token"].items():
            y = [row["per token"][name][field] for row in rows.values()]
            ax.loglog(lengths, y, "o-", base=2, label=f"{name} ({numbers:.0f} numbers per token)")
        ax.set(xlabel="slots in the cache", ylabel=label)
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    sizes = ", ".join(f"{k}={v}" for k, v in result["sizes"].items())
    fig.suptitle(f"decoding, {sizes}, {result['environment']['cores']} CPU cores", fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write JSON and plot; returns the exit code."""
    parser = arguments("decode", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536], help="slots (default 4k, 16k, 64k)")
    parser.add_argument("--repeat", type=int, default=15, help="turns of each case (default 15)")
    options = parsed(parser, argv)
    before = environment()
    result = measure(options.lengths, options.repeat)
    print(json.dumps(result, indent=1))
    save("decode", options, before, result, _plot)
    return 0
