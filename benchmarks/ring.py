"""Context parallelism by the numbers that need no accelerator: memory per device, and tiles per device.

examples:
  attnzoo bench ring
  attnzoo bench ring --tokens 32768 65536 --devices 8

Forward and backward of one attention layer are compiled for host devices (nothing is run) on one device and divided over the
tokens, by ring and by all-to-all; memory is the compiler's own account of one device: arguments, results and temporaries.
Tiles are counted from the mask's block map: per device, and one after the other, since at each step of a ring all devices
wait for the one with the most.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import arguments, environment, parsed, save

SIZES = {"B": 1, "N": 8, "K": 8, "H": 64}
BLOCK = 256
WINDOW = 4096


def masks() -> dict[str, Any]:
    """Whose tiles are counted."""
    from attnzoo.core.masks import Causal, Prefix, SlidingWindow

    return {
        "causal": Causal(),
        f"causal, window {WINDOW}": Causal() & SlidingWindow(WINDOW),
        f"window {WINDOW}": SlidingWindow(WINDOW),
        f"causal, prefix {WINDOW}": Causal() | Prefix(WINDOW),
    }


def memory(tokens: int, devices: int, exchange: str) -> dict[str, Any]:
    """Bytes per device of forward and backward under a causal mask, by kind, and how many collectives the program has."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from attnzoo.core.attention import attention
    from attnzoo.core.masks import Causal
    from attnzoo.core.sharding import attention_axes

    mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    where = NamedSharding(mesh, P(None, "context"))
    shapes = [
        jax.ShapeDtypeStruct((SIZES["B"], tokens, SIZES[heads], SIZES["H"]), jnp.float32, sharding=where) for heads in "NKK"
    ]

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = attention(q, k, v, mask=Causal(), backend="blockwise", block_sizes=(BLOCK, BLOCK))
        return (out**2).sum()

    with jax.set_mesh(mesh), attention_axes(context="context", exchange=exchange):  # type: ignore[arg-type]
        program = jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(where,) * 3).lower(*shapes).compile()
    m = program.memory_analysis()
    kinds = {
        "arguments": m.argument_size_in_bytes,
        "results": m.output_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
    }
    text = program.as_text()
    found = {
        kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in ("collective-permute", "all-to-all", "all-gather")
    }
    return {
        **{f"{kind}_mib": round(size / 2**20, 1) for kind, size in kinds.items()},
        "all_mib": round(sum(kinds.values()) / 2**20, 1),
        "collectives": {kind: count for kind, count in found.items() if count},
    }


def tiles(tokens: int, devices: int) -> Iterator[dict[str, Any]]:
    """Per mask, with tokens in natural order and zig-zag: tiles per device, one after the other, and shards each sees."""
    from attnzoo.core.cells import Geometry
    from attnzoo.core.context.layout import critical_path, plan_ring

    g = Geometry(1, 1, 1, tokens, tokens)
    for name, mask in masks().items():
        chosen = plan_ring(mask, g, devices, None, (BLOCK, BLOCK)).layout.zigzag
        for zigzag in (False, True):
            ring = plan_ring(mask, g, devices, zigzag, (BLOCK, BLOCK))
            assert ring.work is not None
            yield {
                "mask": name,
                "zigzag": zigzag,
                "chosen": chosen == zigzag,
                "per_device": ring.work.sum(0).tolist(),
                "one_after_the_other": critical_path(ring.work),
                "at_best": int(np.ceil(ring.work.sum() / devices)),
                "shards_seen": ring.arc.steps,
            }


def measure(lengths: list[int], devices: int) -> dict[str, Any]:
    """Memory by length and exchange, tiles of the shortest length."""
    memories = []
    for tokens in lengths:
        alone = memory(tokens, 1, "ring")
        memories.append({"tokens": tokens, "devices": 1, "exchange": None, **alone})
        for exchange in ("ring", "all_to_all"):
            found = memory(tokens, devices, exchange)
            part = round(found["all_mib"] / alone["all_mib"], 4)
            memories.append({"tokens": tokens, "devices": devices, "exchange": exchange, **found, "of_one_device": part})
            print(
                f"{tokens} tokens, {exchange} over {devices}: {found['all_mib']} MiB per device, {part} of one device",
                flush=True,
            )
    rows = list(tiles(lengths[0], devices))
    return {"sizes": {**SIZES, "block": BLOCK, "devices": devices}, "memory": memories, "tiles": rows}


def _plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    devices = result["sizes"]["devices"]
    for exchange, label in (
        (None, "one device"),
        ("ring", f"ring, {devices} devices"),
        ("all_to_all", f"all-to-all, {devices} devices"),
    ):
        rows = [row for row in result["memory"] if row["exchange"] == exchange]
        axes[0].loglog([r["tokens"] for r in rows], [r["all_mib"] for r in rows], "o-", base=2, label=label)
    axes[0].set(xlabel="tokens", ylabel="MiB per device", title="forward and backward, causal")
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].grid(alpha=0.3)
    causal = [row for row in result["tiles"] if row["mask"] == "causal"]
    for n, row in enumerate(causal):
        order = "zig-zag" if row["zigzag"] else "natural order"
        label = f"{order}: {row['one_after_the_other']} one after the other (at best {row['at_best']})"
        axes[1].bar(np.arange(devices) + 0.4 * n - 0.2, row["per_device"], 0.38, label=label)
    axes[1].set(xlabel="device", ylabel="tiles per head", title=f"causal, {result['memory'][0]['tokens']} tokens")
    axes[1].legend(frameon=False, fontsize=8, loc="upper left")
    fig.savefig(path, dpi=130)
    plt.close(fig)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, count, write JSON and plot; returns the exit code."""
    parser = arguments("ring", __doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536, 131072], help="default 32k, 64k, 128k")
    parser.add_argument("--devices", type=int, default=8, help="host devices (default 8)")
    options = parsed(parser, argv)
    wrong = [n for n in options.tokens if n % (2 * options.devices)]
    if wrong or options.devices < 2:
        parser.error(
            f"--tokens: {wrong or options.tokens} must be multiples of 2 × --devices {options.devices}, at least 2 of these"
        )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
    before = environment()
    result = measure(options.tokens, options.devices)
    for row in result["tiles"]:
        order = "zig-zag" if row["zigzag"] else "natural order"
        print(f"{row['mask']}, {order}: {row['per_device']}, {row['one_after_the_other']} one after the other")
    save("ring", options, before, result, _plot)
    return 0
