"""Where a kernel runs: on a TPU, compiled for a named one, or simulated on any machine."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_SIMULATED: contextvars.ContextVar[bool] = contextvars.ContextVar("simulated", default=False)
_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def simulation() -> Iterator[None]:
    """Run kernels by JAX's TPU simulator on this machine: slow, and strict.

    Memory that was never written reads as NaN, reads past the end raise, and so do races between cores or transfers.
    What is traced inside is simulated, also when it is called later.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    token = _SIMULATED.set(True)
    try:
        yield
        races = simulator.races
        if races is not None and races.races_found:
            raise RuntimeError("the simulated kernel has a race between reading and writing the same memory")
    finally:
        _SIMULATED.reset(token)
        pltpu.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def compiling_for(generation: str) -> Iterator[None]:
    """Trace for a TPU generation such as "v5e" on a machine that has none, to be lowered for platform "tpu"."""
    token = _TARGET.set(generation)
    try:
        yield
    finally:
        _TARGET.reset(token)


def simulated() -> bool:
    return _SIMULATED.get()


def generation() -> str | None:
    """The TPU generation that kernels are traced for now; None where there is no TPU."""
    if _TARGET.get() is not None:
        return _TARGET.get()
    if jax.default_backend() != "tpu":
        return None
    kind = jax.devices()[0].device_kind.lower()
    names = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e", "7": "7x"}
    return next((name for part, name in names.items() if part in kind), kind)


def launch(
    kernel: Callable[..., None],
    *,
    name: str,
    scalars: Sequence[Any],
    grid: tuple[Any, ...],
    in_specs: Sequence[Any],
    inputs: Sequence[Any],
    out_specs: Sequence[Any],
    out_shape: Sequence[Any],
    scratch: Sequence[Any],
    parallel: int,
) -> Any:
    """One kernel call; ``scalars`` are in scalar memory before the first step, and the first ``parallel`` axes of the grid
    may be divided among cores."""
    interpret: Any = False
    semantics: Any = ("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
    if simulated():
        interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
        semantics = None
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            scratch_shapes=list(scratch),
        ),
        out_shape=list(out_shape),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret,
        name=name,
    )(*scalars, *inputs)
