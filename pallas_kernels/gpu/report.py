"""What the compiler makes of a GPU kernel, on a machine without a GPU: registers, spills, shared memory, wgmma or tcgen05.

    python -m pallas_kernels.gpu.report [plain|causal|segments|softcap|bias ...] [--width 128] [--target b200]

Needs JAX's CUDA wheels (``pip install "jax[cuda13]"``).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu import choice
from pallas_kernels.gpu.attend import forward
from pallas_kernels.gpu.backward import keys_gradient, queries_gradient
from pallas_kernels.gpu.flash import Inputs
from pallas_kernels.gpu.launch import compiling_for
from pallas_kernels.gpu.tiles import FULL, PARTIAL, SKIP, make_tiles
from pallas_kernels.gpu.warpgroup import lay_of
from pallas_kernels.tpu.problem import Layout, Problem

#: What XLA must know of a GPU to compile for it.
TARGETS = {
    "h100": """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } core_count: 132 fpus_per_core: 128
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_block_limit: 65536
  registers_per_core_limit: 65536 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 device_memory_size: 84942979072 memory_bandwidth: 3352320000000 clock_rate_ghz: 1.98
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
""",
    "b200": """
gpu_device_info {
  cuda_compute_capability { major: 10 feature_extension: ACCELERATED_FEATURES } core_count: 148 fpus_per_core: 128
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_block_limit: 65536
  registers_per_core_limit: 65536 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 132644864 device_memory_size: 191512969216 memory_bandwidth: 7672000000000 clock_rate_ghz: 1.965
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA B200"
""",
}

GENERATIONS = {"h100": "hopper", "b200": "blackwell"}


def parsed(ptx: str, ptxas: str, passes: str) -> dict[str, int]:
    """The figures of one kernel from what the compiler dumped: its PTX, ptxas' report, and the log of MLIR passes.

    registers are those per thread at the start; warpgroups may trade theirs later. Spills are in bytes.

    Raises ValueError if a figure is not found.
    """

    def number(what: str, pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise ValueError(f"the compiler's dump does not say the {what}")
        return int(found[1])

    return {
        "registers": number("registers", r"Used (\d+) registers", ptxas),
        "spill_stores": number("spill stores", r"(\d+) bytes spill stores", ptxas),
        "spill_loads": number("spill loads", r"(\d+) bytes spill loads", ptxas),
        "shared_memory": number("shared memory", r"dynamic_shared_memory_size %c(\d+)_i32", passes),
        "threads": number("threads", r"\.maxntid (\d+)", ptx),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "tcgen05": len(re.findall(r"tcgen05\.mma", ptx)),
    }


def report(function: Callable[..., Any], *inputs: Any, target: str = "h100") -> dict[str, dict[str, int]]:
    """Compile ``function`` of arrays like ``inputs`` for a named GPU; per kernel in it, the figures of :func:`parsed`.

    Raises RuntimeError if nothing was compiled: no kernel in it, or only such as this process has compiled before.
    """
    from jax.experimental import topologies

    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        topology = topologies.get_topology_desc(target, "cuda", target_config=TARGETS[target], topology="1x1x1")
        sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs)
        with compiling_for(GENERATIONS[target]):
            jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).compile()
        found = {}
        for file in sorted(Path(folder).glob("*.ptxas")):
            texts = (file.with_suffix(end).read_text() for end in (".ptx", ".ptxas", ".mlir-passes.log"))
            name = re.sub(r"_\d+$", "", file.stem)
            found[file.stem if name in found else name] = parsed(*texts)
    if not found:
        raise RuntimeError("nothing was compiled: the function has no kernel that this process has not compiled before")
    return found


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Compile for GPUs without one, with the CUDA wheels' assembler, and dump into ``folder``."""
    import nvidia

    programs = [str(p) for root in nvidia.__path__ for p in Path(root).glob("*/bin")]
    names = {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_DUMP_PTX": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_MLIR_PASSES": "1",
        "PATH": os.pathsep.join([*programs, os.environ.get("PATH", "")]),
    }
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def example(
    case: str, width: int = 128, block_k: int | None = None, length: int = 1024, generation: str = "hopper"
) -> tuple[Problem, Any, Inputs]:
    """A problem, its tiles and the shapes of its inputs, that use one feature of the kernels: 2 sequences, 8 heads on 2."""
    batch, heads, kv_heads = 2, 8, 2
    block_q, block_k = choice.block_queries(generation)[0], block_k or choice.blocks(width, width)[1]
    mask: Any = None if case == "plain" else lambda b, h, t, s, *parts: s <= t
    score: Any = None
    mask_layouts, score_layouts, masks, scores = [], [], [], []
    if case == "segments":
        mask = lambda b, h, t, s, mine, its: (s <= t) & (mine == its)  # noqa: E731
        mask_layouts = [Layout("row", True, False, True), Layout("column", True, False, True)]
        masks = [jax.ShapeDtypeStruct((batch, 1, 1, length), jnp.int32)] * 2
    elif case == "blocks":
        mask = lambda b, h, t, s, chosen: (s <= t) & (chosen != 0)  # noqa: E731
        mask_layouts = [Layout("tile", False, True, True)]
        masks = [jax.ShapeDtypeStruct((1, heads, (length // block_q) * (length // block_k), 1, 1), jnp.int32)]
    elif case == "softcap":
        score = lambda x, b, h, t, s: 20 * jnp.tanh(x / 20)  # noqa: E731
    elif case == "bias":
        score = lambda x, b, h, t, s, bias: x + bias  # noqa: E731
        score_layouts = [Layout("cell", False, True, False)]
        scores = [jax.ShapeDtypeStruct((1, heads, length, length), jnp.float32)]
    elif case == "distance":
        score = lambda x, b, h, t, s, table: x + table  # noqa: E731
        score_layouts = [Layout("distance", False, True, False)]
        scores = [jax.ShapeDtypeStruct((1, heads, lay_of(generation).rows, 2 * length), jnp.float32)]
    elif case not in CASES:
        raise ValueError(f"unknown case {case!r}; there are {', '.join(CASES)}")
    p = Problem(
        batch, heads, kv_heads, length, length, block_q, block_k, block_q // 2, block_k, mask, tuple(mask_layouts), score,
        tuple(score_layouts), None, None, False, False,
    )  # fmt: skip
    t, s = np.arange(length // block_q)[:, None] * block_q, np.arange(length // block_k) * block_k
    state = np.where(s > t + block_q - 1, SKIP, np.where(s + block_k - 1 <= t, FULL, PARTIAL))
    q, k = (jax.ShapeDtypeStruct((batch, length, n, width), jnp.bfloat16) for n in (heads, kv_heads))
    call = jax.ShapeDtypeStruct((6,), jnp.int32)
    return p, make_tiles(state[None] if mask else np.full_like(state, FULL)[None]), Inputs(q, k, k, (*scores,), (*masks,), call)


CASES = ("plain", "causal", "segments", "blocks", "softcap", "bias", "distance")


def figures(case: str, width: int = 128, block_k: int | None = None, target: str = "h100") -> dict[str, dict[str, int]]:
    """Of the kernels for one feature: the forward one, and where its blocks have a backward pass, the two of that."""
    generation = GENERATIONS[target]
    p, tiles, x = example(case, width, block_k, generation=generation)
    slots = choice.slots(width, width, p.block_k, p.block_q)
    found = report(lambda x: forward(p, tiles, x, slots), x, target=target)
    if generation == "hopper" and (slots := choice.backward_slots(width, width, p.block_k)):
        statistic = jax.ShapeDtypeStruct((p.batch, p.heads, p.queries), jnp.float32)
        for gradient in (queries_gradient, keys_gradient):
            # The lists of tiles of these examples serve both ways: only what a kernel contains is asked.
            call = functools.partial(lambda g, x, d_out, *statistics: g(p, tiles, x, d_out, *statistics, slots), gradient)
            found.update(report(call, x, x.q, statistic, statistic, target=target))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["causal"], help=", ".join(CASES))
    parser.add_argument("--width", type=int, default=128, help="head width")
    parser.add_argument("--block-keys", type=int, help="keys of a tile (default: what the kernel would choose)")
    parser.add_argument("--target", default="h100", choices=sorted(TARGETS))
    options = parser.parse_args()
    for case in options.cases:
        for kernel, found in figures(case, options.width, options.block_keys, options.target).items():
            print(json.dumps({"case": case, "kernel": kernel, **found}), flush=True)


if __name__ == "__main__":
    main()
