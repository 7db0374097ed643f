"""Where a kernel runs: on a Hopper GPU, compiled for a named one, or simulated on any machine."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_SIMULATED: contextvars.ContextVar[bool] = contextvars.ContextVar("simulated", default=False)
_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def simulation() -> Iterator[None]:
    """Run kernels by JAX's GPU simulator on this machine: slow, and strict.

    Warpgroups, shared memory, bulk copies and barriers are simulated; matrix products are done by plain JAX instead of
    wgmma. Memory that was never written reads as NaN, reads past the end raise, and so do races.
    """
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator

    token = _SIMULATED.set(True)
    try:
        yield
        races = simulator.get_races()
        if races is not None and races.races_found:
            raise RuntimeError("the simulated kernel has a race between reading and writing the same memory")
    finally:
        _SIMULATED.reset(token)
        simulator.reset_gpu_interpret_mode_state()


@contextlib.contextmanager
def compiling_for(generation: str) -> Iterator[None]:
    """Trace for a GPU generation ("hopper") on a machine that has none, to be lowered for platform "cuda"."""
    token = _TARGET.set(generation)
    try:
        yield
    finally:
        _TARGET.reset(token)


def simulated() -> bool:
    return _SIMULATED.get()


def generation() -> str | None:
    """The GPU generation that kernels are traced for now; None where there is none that they run on."""
    if _TARGET.get() is not None:
        return _TARGET.get()
    if jax.default_backend() != "gpu":
        return None
    return "hopper" if str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.") else None


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
