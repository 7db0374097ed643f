"""Where a kernel runs: on a Hopper or Blackwell GPU, compiled for a named one, or simulated on any machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.target import Target

_TARGET = Target("gpu")


def simulation() -> contextlib.AbstractContextManager[None]:
    """Run kernels by JAX's GPU simulator on this machine: slow, and strict.

    Warpgroups, shared memory, bulk copies and barriers are simulated; matrix products are done by plain JAX instead of
    wgmma, and instead of tcgen05 where JAX does not simulate that. Memory that was never written reads as NaN, reads past the
    end raise, and so do races. What is simulated is the kernel for Hopper, inside ``compiling_for("blackwell")`` that for
    Blackwell.
    """
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator

    return _TARGET.simulation(simulator.get_races, simulator.reset_gpu_interpret_mode_state)


def compiling_for(generation: str) -> contextlib.AbstractContextManager[None]:
    """Trace for a GPU generation ("hopper", "blackwell") on a machine that has none, to be lowered for platform "cuda"."""
    return _TARGET.compiling_for(generation)


def simulated() -> bool:
    return _TARGET.simulated


def generation() -> str | None:
    """The GPU generation that kernels are traced for now; None where there is none that they run on."""
    if _TARGET.generation is not None:
        return _TARGET.generation
    if jax.default_backend() != "gpu":
        return None
    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    return {"9": "hopper", "10": "blackwell"}.get(major)


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    warpgroups: int,
    inputs: Sequence[Any],
    out_type: Sequence[Any],
    scratch: Sequence[Any],
) -> Any:
    """One kernel call with ``warpgroups`` warpgroups of 128 threads per block, numbered along the axis "warpgroup"."""
    interpret: Any = None
    if simulated():
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

        interpret = InterpretGPUParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    return plgpu.kernel(
        kernel,
        out_type=list(out_type),
        scratch_types=list(scratch),
        grid=grid,
        grid_names=grid_names,
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=interpret,
    )(*inputs)
