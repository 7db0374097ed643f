"""What the compiler makes of the GPU kernels, next to JAX's own `attention_mgpu`: registers, spills, shared memory, products.

    attnzoo bench gpu_kernels
    attnzoo bench gpu_kernels --target b200

Needs JAX's CUDA wheels (pip install "jax[cuda13]"; for b200 of JAX 0.12), not a GPU. Writes results/gpu_kernels_TARGET.json,
and the tables of all targets that have one into docs/guide/kernels.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._measure import RESULTS, arguments, environment, parsed, save

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "kernels.md"
_MARKS = "<!-- attnzoo bench gpu_kernels: begin -->\n", "<!-- attnzoo bench gpu_kernels: end -->\n"
WIDTHS = (64, 128)
_FIGURES = ("registers", "spill_stores", "spill_loads", "shared_memory", "wgmma", "tcgen05")


def peer(width: int, causal: bool) -> dict[str, dict[str, int]]:
    """Per kernel, the figures of JAX's attention for Hopper GPUs, float16: 2 sequences of 1024, 8 heads on 2. It has no causal
    derivative."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention_mgpu as theirs

    from pallas_kernels.gpu.report import report

    blocks = {} if causal else dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    tuning = theirs.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal, compute_wgs_bwd=1 if causal else 2, **blocks
    )
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, width), jnp.float16) for heads in (8, 2))

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(lambda *x: theirs.attention(*x, tuning), q, k, v)
        return pull(out)

    return report((lambda q, k, v: theirs.attention(q, k, v, tuning)) if causal else both, q, k, k)


def rows_of(target: str) -> list[dict[str, Any]]:
    from pallas_kernels.gpu.report import CASES, figures

    rows = []

    def add(library: str, case: str, width: int, found: dict[str, dict[str, int]]) -> None:
        for kernel, values in found.items():
            rows.append({"library": library, "case": case, "width": width, "kernel": kernel, **values})
            print(f"{target}  {library}, {case}, width {width}: {kernel}", flush=True)

    for width in WIDTHS:
        for case in CASES:
            add("attnzoo", case, width, figures(case, width, target=target))
        for case in ("plain", "causal") if target == "h100" else ():
            add("attention_mgpu", case, width, peer(width, case == "causal"))
    return rows


def table(document: dict[str, Any], target: str) -> str:
    """As Markdown."""
    lines = [
        f"Compiled for {target.upper()} by JAX {document['environment']['jax']}: registers per thread at the start of a "
        "kernel, spills and shared memory in bytes, and how many matrix products its code has.",
        "",
        "| kernel | case | width | registers | spills (stores, loads) | shared memory | `wgmma` | `tcgen05.mma` |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in sorted(document["rows"], key=lambda r: (r["width"], r["case"], r["library"])):
        name = r["kernel"] if r["library"] == "attnzoo" else f"attention_mgpu: {r['kernel']}"
        registers, stores, loads, memory, wgmma, tcgen05 = (r[what] for what in _FIGURES)
        lines.append(
            f"| {name} | {r['case']} | {r['width']} | {registers} | {stores}, {loads} | {memory} | {wgmma} | {tcgen05} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print and write; returns the exit code."""
    parser = arguments("gpu_kernels", __doc__)
    parser.add_argument("--target", default="h100", choices=("h100", "b200"), help="the GPU to compile for (default h100)")
    options: argparse.Namespace = parsed(parser, argv)
    before = environment()
    rows = rows_of(options.target)
    save(f"gpu_kernels_{options.target}", options, before, {"rows": rows})
    if options.out == RESULTS:
        paths = {target: RESULTS / f"gpu_kernels_{target}.json" for target in ("h100", "b200")}
        found = {target: json.loads(path.read_text()) for target, path in paths.items() if path.exists()}
        text = "\n".join(table(document, target) for target, document in found.items())
        start, rest = PAGE.read_text().split(_MARKS[0])
        PAGE.write_text(start + _MARKS[0] + text + _MARKS[1] + rest.split(_MARKS[1])[1])
        print(f"and the tables in {PAGE}")
    return 0
