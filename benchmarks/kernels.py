"""The final schedules of the TPU kernels, compiled here for named generations, next to JAX's own kernels.

    attnzoo bench kernels
    attnzoo bench kernels --generations v5e,v6e --block-q 512 --block-k 512

Needs the TPU compiler (pip install -e ".[tpu]"), not a TPU. Every kernel is compiled for one problem; reported are the
bundles (cycles) a tile takes between the first and the last use of the matrix units, how full these and the vector units
are meanwhile, the bundles that the matrix products alone would take, registers spilled, and on-chip memory. Of the
branches of a kernel of ours, for full tiles, for those that the mask cuts along their diagonal (from above, as causal masks
do, or from below, at the far edge of a window) and for others on its border, each is compiled by itself. A second table has
what other kernels of ours do in a step. Writes results/kernels.json and the tables in docs/guide/kernels.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import RESULTS, arguments, environment, parsed, save
from pallas_kernels import schedule

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "kernels.md"
_MARKS = "<!-- attnzoo bench kernels: begin -->\n", "<!-- attnzoo bench kernels: end -->\n"

TOKAMAX = "tokamax splash attention (mean)"
"""Where it is installed. A kernel has a branch for full tiles and one for others in one schedule: bundles and bound are their
mean. Its backward pass is one kernel, which brings its parts of dq to memory of T·S/block_k·H."""

Case = tuple[Callable[..., Any], list[Any]]


def problems(options: argparse.Namespace) -> dict[str, Callable[[], Case]]:
    """name -> () -> (function, arguments) to compile: bf16, one batch row, two heads."""
    import jax
    import jax.numpy as jnp

    from attnzoo.core.attention import attention
    from attnzoo.core.cells import Bound, Geometry
    from attnzoo.core.masks import Blocks, Causal, Mask

    class FarEdge(Mask):
        """What lies at most a tile behind: of a causal window of two tiles, the border that it does not share with `Causal`."""

        def bind(self, g: Geometry) -> Bound:
            return Bound((), lambda c: c.q - c.k <= square, behind=square)

    block_q, block_k, width, heads = options.block_q, options.block_k, options.width, 2
    tokens = 8 * max(block_q, block_k)

    def arrays(length: int, heads_first: bool = False) -> list[Any]:
        shape = (heads, length, width) if heads_first else (1, length, heads, width)
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 3

    def ours(mask: Any, length: int, backward: bool) -> Callable[[], Case]:
        def forward(q: Any, k: Any, v: Any) -> Any:
            return attention(q, k, v, mask=mask, backend="pallas", block_sizes=(block_q, block_k))

        def both(q: Any, k: Any, v: Any) -> Any:
            return jax.vjp(forward, q, k, v)[1](q)

        return lambda: (both if backward else forward, arrays(length))

    def splash(backward: bool) -> Case:
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((tokens, tokens))] * heads)
        sizes = splash_attention_kernel.BlockSizes(
            block_q=block_q, block_kv=block_k, block_kv_compute=block_k, block_q_dkv=block_q, block_kv_dkv=block_k,
            block_kv_dkv_compute=block_k, block_q_dq=block_q, block_kv_dq=block_k,
        )  # fmt: skip
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
        return (lambda q, k, v: jax.vjp(kernel, q, k, v)[1](q)) if backward else kernel, arrays(tokens, heads_first=True)

    def tokamax_splash() -> Case:
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        config = splash_attention_kernel.SplashConfig(
            block_q=block_q, block_kv=block_k, block_q_dkv=block_q, block_kv_dkv=block_k
        )
        mask = splash_attention_mask.CausalMask((tokens, tokens))
        kernel = splash_attention_kernel.make_splash_mha_single_device(mask, config=config)
        return lambda q, k, v: jax.vjp(kernel, q, k, v)[1](q), arrays(tokens, heads_first=True)

    def jax_flash() -> Case:
        from jax.experimental.pallas.ops.tpu import flash_attention

        sizes = flash_attention.BlockSizes(block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1)
        batched = [jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for x in arrays(tokens, heads_first=True)]
        return lambda q, k, v: flash_attention.flash_attention(q, k, v, causal=True, block_sizes=sizes), batched

    square = min(block_q, block_k)  # one tile, on the diagonal
    found: dict[str, Callable[[], Case]] = {
        "attnzoo, full tiles": ours(None, tokens, True),
        "attnzoo, full tiles, 64k tokens": ours(None, 2**16, True),  # too many for sums of dq on the chip
        "attnzoo, causal border": ours(Causal(), square, True),
        "attnzoo, far edge of a window": ours(
            FarEdge() & Blocks(np.asarray([[0, 0], [1, 0]], bool), square, square), 2 * square, True
        ),
        "attnzoo, other border": ours(Causal(1), square, True),  # not along the diagonal
        "splash attention": lambda: splash(True),
        "jax flash attention": jax_flash,
    }
    return found | ({TOKAMAX: tokamax_splash} if importlib.util.find_spec("tokamax") else {})


def others(options: argparse.Namespace) -> dict[str, tuple[str, Callable[[], Case]]]:
    """name -> what a step does, and as in :func:`problems`."""
    import jax
    import jax.numpy as jnp

    from attnzoo.core.attention import attention
    from attnzoo.core.gathered import gathered_attention
    from attnzoo.core.quantized import quantize
    from attnzoo.core.recurrence import linear_recurrence

    width, tokens, heads = options.width, 2048, 8

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def carried(decay: tuple[int, ...] | None, *erasing: str) -> Callable[[], Case]:
        token = array(1, tokens, heads, width)
        given = dict.fromkeys(("q", "k", "v", *erasing), token)
        if decay is not None:
            given["log_decay"] = array(1, tokens, heads, *decay, dtype=jnp.float32)

        def both(*arrays: Any) -> Any:
            out, pull = jax.vjp(lambda *x: linear_recurrence(**dict(zip(given, x, strict=True)), backend="tpu")[0], *arrays)
            return pull(out)

        return lambda: (both, list(given.values()))

    def listed() -> Case:
        def both(q: Any, k: Any, v: Any, places: Any) -> Any:
            out, pull = jax.vjp(lambda q: gathered_attention(q, k, v, places, backend="pallas"), q)
            return pull(out)

        return both, [*[array(1, 4096, 2, width)] * 3, array(1, 2, 2, 1024, dtype=jnp.int32)]

    def decoded() -> Case:
        cache = array(1, 4096, 1, width)
        return lambda q, k, v: attention(q, k, v, backend="pallas"), [array(1, 1, heads, width), cache, cache]

    def narrow(q: Any, k: Any, v: Any) -> Any:
        sizes = (options.block_q, options.block_k)
        return attention(q, quantize(k, per="feature"), quantize(v), backend="pallas", block_sizes=sizes)

    return {
        "decoding": (f"1 query of 8 heads x {options.block_k} keys", decoded),
        "keys and values in 8 bits": (
            f"{options.block_q} queries x {options.block_k} keys", lambda: (narrow, [array(1, 4096, 2, width)] * 3)
        ),
        "listed keys": ("2048 queries x 256 keys", listed),
        "recurrence, a decay per head": ("64 tokens of 8 heads", carried(())),
        "delta rule, a decay per head": ("64 tokens of 4 heads", carried((), "a")),
        "diagonal plus rank one": ("64 tokens of 4 heads", carried((width,), "a", "b")),
    }  # fmt: skip


def compile_one(generation: str, name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """In this process, which must not have used a TPU compiler before."""
    schedule.prepare(folder)
    f, arguments = (problems(options) | {other: case for other, (_, case) in others(options).items()})[name]()
    schedule.compiled(generation, f, arguments)
    found = [dataclasses.asdict(s) for s in schedule.read(folder)]
    if name == TOKAMAX:
        found = [kernel | {what: round(kernel[what] / 2) for what in ("hot", "bound")} for kernel in found]
    return found


def compile_apart(generation: str, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """In a process of its own: the compiler reads its flags once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.kernels", "--one", generation, name, folder]
        for option in ("block_q", "block_k", "width"):
            command += [f"--{option.replace('_', '-')}", str(getattr(options, option))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise RuntimeError(f"compiling {name!r} for {generation} failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


_ROLES = {
    "backward": "dq, dk, dv",
    "forward": "forward",
    "fwd": "forward",
    "flash_attention": "forward",
    "dkv": "dk, dv",
    "dq": "dq",
}


def role(kernel: str, problem: str = "") -> str:
    """Which of the three kernels of attention this is, by its name; tokamax's that are named for dk and dv make dq too."""
    found = next((role for part, role in _ROLES.items() if part in kernel), kernel)
    return "dq, dk, dv" if (problem, found) == (TOKAMAX, "dk, dv") else found


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """As Markdown, ordered so that like stands next to like."""
    lines = [
        f"Tiles of {options.block_q} queries × {options.block_k} keys, head width {options.width}, bfloat16. Bundles per tile: "
        "between the first and the last use of the matrix units; bound: what the matrix products alone would take.",
        "",
        "| TPU | kernel | pass | bundles per tile | bound | MXU | VALU | EUP | XLU | spills | VMEM, KiB |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = {"forward": 0, "dq": 1, "dk, dv": 2, "dq, dk, dv": 3}
    for r in sorted(rows, key=lambda r: (r["generation"], order.get(r["pass"], 4), r["problem"])):
        use = r["use"]
        lines.append(
            f"| {r['generation']} | {r['problem']} | {r['pass']} | {r['hot']} | {r['bound']} | {use['MXU']:.2f} | "
            f"{use['VALU']:.2f} | {use['EUP']:.2f} | {use['XLU']:.2f} | {r['spills']} | {r['vmem'] // 1024} |"
        )
    return "\n".join(lines) + "\n"


def table_of_others(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """As Markdown, the passes of a kernel next to each other."""
    lines = [
        f"Other kernels, head width {options.width}, bfloat16: bundles of one step of the grid, as above.",
        "",
        "| TPU | kernel | a step | pass | bundles | bound | MXU | VALU | EUP | XLU | spills | VMEM, KiB |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in sorted(rows, key=lambda r: (r["generation"], r["problem"], r["pass"] != "forward")):
        use = " | ".join(f"{r['use'][unit]:.2f}" for unit in ("MXU", "VALU", "EUP", "XLU"))
        lines.append(
            f"| {r['generation']} | {r['problem']} | {r['step']} | {r['pass']} | {r['hot']} | {r['bound']} | {use} | "
            f"{r['spills']} | {r['vmem'] // 1024} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print and write; returns the exit code."""
    parser = arguments("kernels", __doc__)
    parser.add_argument("--generations", default="v4,v5e,v5p,v6e,7x", help="comma-separated, of v4, v5e, v5p, v6e, 7x")
    parser.add_argument("--block-q", type=int, default=512, help="queries of a tile (default 512)")
    parser.add_argument("--block-k", type=int, default=512, help="keys of a tile (default 512)")
    parser.add_argument("--width", type=int, default=128, help="head width (default 128)")
    parser.add_argument("--one", nargs=3, metavar=("GENERATION", "PROBLEM", "FOLDER"), help=argparse.SUPPRESS)
    options = parsed(parser, argv)
    if options.one:
        generation, name, folder = options.one
        print(json.dumps(compile_one(generation, name, Path(folder), options)))
        return 0
    rows: list[dict[str, Any]] = []
    more: list[dict[str, Any]] = []
    generations = options.generations.split(",")
    try:
        for generation in generations:
            schedule.check(generation)
    except (ValueError, ImportError) as e:
        parser.error(str(e))
    before = environment()
    for generation in generations:
        for name in problems(options):
            for found in compile_apart(generation, name, options):
                rows.append({"generation": generation, "problem": name, "pass": role(found["kernel"], name), **found})
                print(f"{generation}  {name}  {rows[-1]['pass']}: {found['hot']} bundles", flush=True)
        for name, (step, _) in others(options).items():
            for found in compile_apart(generation, name, options):
                way = "backward" if "backward" in found["kernel"] else role(found["kernel"])
                way = "forward" if way == found["kernel"] else way  # recurrences are not named for it
                more.append({"generation": generation, "problem": name, "step": step, "pass": way, **found})
                print(f"{generation}  {name}  {way}: {found['hot']} bundles", flush=True)
    sizes = {"block_q": options.block_q, "block_k": options.block_k, "width": options.width, "dtype": "bfloat16"}
    text = table(rows, options) + "\n" + table_of_others(more, options)
    print(f"\n{text}")
    save("kernels", options, before, {"sizes": sizes, "rows": rows, "others": more})
    if options.out == RESULTS:
        start, rest = PAGE.read_text().split(_MARKS[0])
        PAGE.write_text(start + _MARKS[0] + text + _MARKS[1] + rest.split(_MARKS[1])[1])
        print(f"and the tables in {PAGE}")
    return 0


if __name__ == "__main__":  # as `compile_apart` calls it
    raise SystemExit(main())
