"""Where a kernel runs: on a TPU, compiled for a named one, or simulated on any machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.target import Target

_TARGET = Target("tpu")

#: Bytes on the chip that a kernel gets from the compiler, at least, if it does not ask.
_USUAL_ROOM = 16 * 2**20


def simulation() -> contextlib.AbstractContextManager[None]:
    """Run kernels by JAX's TPU simulator on this machine: slow, and strict.

    Memory that was never written reads as NaN, reads past the end raise, and so do races between cores or transfers.
    What is traced inside is simulated, also when it is called later.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    return _TARGET.simulation(lambda: simulator.races, pltpu.reset_tpu_interpret_mode_state)


def compiling_for(generation: str) -> contextlib.AbstractContextManager[None]:
    """Trace for a TPU generation such as "v5e" on a machine that has none, to be lowered for platform "tpu"."""
    return _TARGET.compiling_for(generation)


def simulated() -> bool:
    return _TARGET.simulated


def generation() -> str | None:
    """The TPU generation that kernels are traced for now; None where there is no TPU."""
    if _TARGET.generation is not None:
        return _TARGET.generation
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
    cost: pl.CostEstimate | None = None,
    checked: bool = True,
    room: int = 0,
) -> Any:
    """One kernel call; ``scalars`` are in scalar memory before the first step, and the first ``parallel`` axes of the grid
    may be divided among cores. cost: what the compiler is told of the whole call, which it cannot look into. checked: whether
    the device checks the bounds of each copy too, not only the simulator. room: bytes on the chip beyond what kernels get."""
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
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            disable_bounds_checks=not checked,
            vmem_limit_bytes=_USUAL_ROOM + room if room else None,
        ),
        interpret=interpret,
        cost_estimate=cost,
        name=name,
    )(*scalars, *inputs)
