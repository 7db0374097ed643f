"""One configuration compiled for one slice."""

import dataclasses
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr

from attnzoo.core.backends.choice import recorded_choices
from pallas_kernels import operations
from pallas_kernels.tpu.launch import compiling_for
from train.config import Config
from train.plan import accounting
from train.plan.accounting import Collectives
from train.plan.chips import GIB, Slice
from train.plan.hlo import Program
from train.plan.memory import Memory, State, memory_of, state_bytes
from train.plan.roofline import Roofline, roofline
from train.plan.tasks import Sizes, shapes_task
from train.plan.traffic import memory_traffic
from train.sharding import batch_sharding, check_batch, make_mesh, on_mesh
from train.trainer import Trainer


@dataclass(frozen=True)
class Flops:
    """Operations per step and device.

    model: three times the loss alone, divided by the devices: what has to be done. traced: what the step as written does,
    recomputation included, divided by the devices. compiled: what each device's program does; more than traced where
    devices repeat each other's work. told: the compiler's cost analysis, which counts a loop's body once and arithmetic
    per element too. The last two are None where there is no program.
    missing: what no count knows the operations of, in words; the first three are None then, not too low.
    """

    model: float | None
    traced: float | None
    compiled: float | None
    told: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """What the compiler made of a configuration.

    fits: whether it did. needed, usable: bytes of memory per device, as the compiler counts them.
    memory, collectives, traffic (bytes to and from memory), kernels and roofline are None or empty where it does not fit.
    attention: the backends that calls of attention took, each with its reason. seconds: of tracing and compiling.
    """

    config: Config
    parameters: int
    state: State
    fits: bool
    needed: int
    usable: int
    flops: Flops
    memory: Memory | None
    collectives: tuple[Collectives, ...]
    traffic: int | None
    kernels: dict[str, int]
    attention: tuple[str, ...]
    loops_of_unknown_length: int
    roofline: Roofline | None
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """A configuration before it is compiled."""

    config: Config
    trainer: Trainer
    batch: dict[str, jax.ShapeDtypeStruct]
    state: State


def prepare(config: Config, sizes: Sizes, pod: Slice) -> Prepared:
    """The trainer and the sizes of its state.

    Raises ValueError for a mesh, a batch or a model that does not fit together.
    """
    task = shapes_task(config, sizes)
    mesh = make_mesh(config.mesh, pod.devices)
    check_batch(config.batch, task.context, mesh, config.accumulate)
    trainer = Trainer(task, config, mesh)
    batch = task.batch()
    placed = {name: batch_sharding(name, task.sequence, mesh) for name in batch}
    return Prepared(config, trainer, batch, state_bytes(trainer, batch, trainer.shardings, placed))


def compile_step(prepared: Prepared, pod: Slice) -> Planned:
    """The real training step, through the compiler of the slice's platform."""
    began = time.monotonic()
    trainer, batch, devices = prepared.trainer, prepared.batch, len(pod.devices)
    with on_mesh(trainer.mesh, trainer.exchange), compiling_for(pod.chip.kernels), recorded_choices() as choices:
        traced = trainer.trace(batch)
        loss = loss_jaxpr(trainer, batch)
        lowered = traced.lower(lowering_platforms=("tpu",))
    attention = tuple(dict.fromkeys(_in_words(choice) for choice in choices))
    missing = operations.uncounted(traced.jaxpr)
    known = None if missing else (3 * operations.flops(loss) / devices, operations.flops(traced.jaxpr) / devices)
    model, as_traced = known or (None, None)
    flops = Flops(model, as_traced, None, None, missing)
    made: dict[str, Any] = {
        "config": prepared.config, "parameters": trainer.parameters, "state": prepared.state, "attention": attention,
    }  # fmt: skip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed, usable = out_of_memory(error)
        return Planned(
            **made, fits=False, needed=needed, usable=usable, flops=flops, memory=None, collectives=(), traffic=None,
            kernels={}, loops_of_unknown_length=0, roofline=None, seconds=time.monotonic() - began,
        )  # fmt: skip
    program = Program(compiled.as_text() or "")
    told = (compiled.cost_analysis() or {}).get("flops")
    flops = dataclasses.replace(flops, compiled=None if missing else accounting.flops(program), told=told)
    collectives = accounting.collectives(program, devices)
    traffic = memory_traffic(program)
    memory = memory_of(compiled, program, prepared.state)
    return Planned(
        **made,
        fits=True,
        needed=memory.total,
        usable=int(pod.per_device.usable),
        flops=flops,
        memory=memory,
        collectives=tuple(collectives),
        traffic=traffic,
        kernels=dict(accounting.kernels(program)),
        loops_of_unknown_length=program.loops_of_unknown_length,
        roofline=roofline(pod.per_device, flops.compiled, traffic, sum(c.received for c in collectives)),
        seconds=time.monotonic() - began,
    )


def loss_jaxpr(trainer: Trainer, batch: dict[str, jax.ShapeDtypeStruct]) -> ClosedJaxpr:
    """The loss alone, over the global batch."""

    def loss(params: nnx.State, rest: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        return trainer.task.loss(nnx.merge(trainer.graphdef, params, rest, copy=True), batch)

    with on_mesh(trainer.mesh, trainer.exchange):
        return jax.make_jaxpr(loss)(trainer.abstract.params, trainer.abstract.rest, batch)


def _in_words(choice: Any) -> str:
    above = [f"{name}: {why}" for name, why in choice.refused.items() if name != "cudnn"]
    return f"{choice.backend} ({choice.reason})" + "".join(f"; not {why}" for why in above)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


def out_of_memory(error: Exception) -> tuple[int, int]:
    """(needed, usable) bytes of a device's memory, from the compiler's refusal. Raises the error if it is another one."""
    # The second is said before there is a program; its temporaries are arguments and results too.
    size = r"([\d.]+)([KMGT]?)"
    forms = (rf"Used {size} of {size} hbm", rf"required for HLO temporaries \({size}\) exceeds available HBM \({size}\)")
    found = next(filter(None, (re.search(form, str(error)) for form in forms)), None)
    if found is None:
        raise error
    needed, a, usable, b = found.groups()
    return int(float(needed) * _UNITS[a]), int(float(usable) * _UNITS[b])
