"""What the compiler makes of the GPU kernels: the reader of its dumps, and, where JAX's CUDA wheels are, the figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.gpu.choice import SHARED_BYTES
from pallas_kernels.gpu.report import CASES, example, parsed

ROOT = Path(__file__).resolve().parents[2]

PTX = """
.target sm_90a
.visible .entry attnzoo_flash_forward_mosaic_gpu_kernel(
.maxntid 384, 1, 1
\twgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
\twgmma.commit_group.sync.aligned;
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, p, 1, 1, 0, 0;
"""
PTXAS = """
ptxas info    : Compiling entry function 'attnzoo_flash_forward_mosaic_gpu_kernel' for 'sm_90a'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 1 bytes smem
"""
PASSES = "gpu.launch async [%0] blocks(%arg2) threads(%arg5) dynamic_shared_memory_size %c84056_i32 {"


def test_figures_are_read_from_dumps():
    assert parsed(PTX, PTXAS, PASSES) == {
        "registers": 168, "spill_stores": 4, "spill_loads": 12, "shared_memory": 84056, "threads": 384, "wgmma": 2,
        "tcgen05": 0,
    }  # fmt: skip


def test_a_figure_that_is_missing_is_named():
    with pytest.raises(ValueError, match="does not say the shared memory"):
        parsed(PTX, PTXAS, "")


def test_an_unknown_case_is_refused():
    with pytest.raises(ValueError, match="unknown case 'casual'; there are plain, causal"):
        example("casual")


def compiled(*options):
    """The figures of all cases, by the report's command."""
    pytest.importorskip("jax_cuda13_plugin")
    pytest.importorskip("nvidia")
    done = subprocess.run(
        [sys.executable, "-m", "pallas_kernels.gpu.report", *CASES, *options],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_the_kernels_compile_for_hopper(width):
    figures = compiled("--width", str(width))
    assert len(figures) == 3 * len(CASES)
    for f in figures:
        assert f["wgmma"] > 0, f
        # Sums of both dk and dv, 128 wide, leave no room for more than a causal mask between the products.
        crowded = width > 64 and f["kernel"] == "attnzoo_flash_dkv" and f["case"] not in ("plain", "causal")
        # Where an array by distance begins in memory is one number more than there are registers for.
        tight = width > 64 and f["kernel"] == "attnzoo_flash_forward" and f["case"] == "distance"
        assert f["spill_stores"] <= (64 if crowded else 4 if tight else 0), f


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_the_forward_kernel_compiles_for_blackwell(width):
    figures = compiled("--width", str(width), "--target", "b200")
    assert [f["kernel"] for f in figures] == ["attnzoo_flash_forward"] * len(CASES)
    for f in figures:
        # For each of two warpgroups S of the first tile, S of the next, and O, 16 terms of the sums at once.
        assert f["tcgen05"] == 2 * (2 * width // 16 + 128 // 16), f
        assert f["wgmma"] == 0, f
        assert f["spill_stores"] == 0, f
        assert f["shared_memory"] <= SHARED_BYTES + 3072, f
