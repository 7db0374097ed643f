"""What fills a device's memory during a training step."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

import jax

from train.plan.hlo import Computation, Instruction, Program
from train.trainer import Trainer


@dataclass(frozen=True)
class State:
    """Bytes per device of what a step is given, from shapes and shardings; without the padding of layouts."""

    parameters: int
    optimizer: int
    other: int
    """Random streams, statistics, the moving average of parameters, the step's number."""
    batch: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class Memory:
    """Bytes per device, by kind; they sum to `total`, what the program needs while it runs.

    The first three are from shardings. gradients: one number per parameter, all there at once because clipping needs
    their norm. activations: what the loops over layers keep for the backward pass, read off the compiled program; 0
    where layers are not scanned (they count as workspace). workspace: further temporaries. other: random streams, the
    batch, results that take no argument's place, padding, the program.
    arguments, outputs, aliased, temporaries: the compiler's own account, of temporaries at the peak.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    workspace: int
    other: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int

    KINDS = ("parameters", "optimizer", "gradients", "activations", "workspace", "other")

    @property
    def total(self) -> int:
        return sum(getattr(self, kind) for kind in self.KINDS)


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a device's part of a tree of arrays."""
    parts = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, tree, shardings)
    return sum(jax.tree.leaves(parts))


def state_bytes(trainer: Trainer, batch: dict[str, jax.ShapeDtypeStruct], shardings: Any, placed: dict[str, Any]) -> State:
    """Of the training state under `shardings` and a batch under `placed`."""
    abstract = trainer.abstract
    return State(
        parameters=shard_bytes(abstract.params, shardings.params),
        optimizer=shard_bytes(abstract.opt_state, shardings.opt_state),
        other=shard_bytes((abstract.rest, abstract.step, abstract.ema), (shardings.rest, shardings.step, shardings.ema)),
        batch=sum(shard_bytes(x, placed[name]) for name, x in batch.items()),
    )


def memory_of(compiled: jax.stages.Compiled, program: Program, state: State) -> Memory:
    """The compiler's account of a program, divided by kind."""
    told: Any = compiled.memory_analysis()
    given, out, same, temporary = (
        int(getattr(told, f"{name}_size_in_bytes")) for name in ("argument", "output", "alias", "temp")
    )
    # Temporaries of separate stretches of a program are listed one beside the other, though they never meet. The peak is of
    # all that is there at once; 0 where the compiler does not say.
    if peak := int(getattr(told, "peak_memory_in_bytes", 0)):
        temporary = min(temporary, max(peak - given - out + same, 0))
    gradients = min(state.parameters, temporary)
    activations = min(kept_by_loops(program), temporary - gradients)
    code = int(told.generated_code_size_in_bytes)
    return Memory(
        parameters=state.parameters,
        optimizer=state.optimizer,
        gradients=gradients,
        activations=activations,
        workspace=temporary - gradients - activations,
        other=given - state.parameters - state.optimizer + out - same + code,
        arguments=given,
        outputs=out,
        aliased=same,
        temporaries=temporary,
    )


def kept_by_loops(program: Program) -> int:
    """Bytes that forward loops write one entry per turn, which the backward pass reads."""
    loops = {run.instruction.name: run.instruction for run in program.runs if run.instruction.opcode == "while"}
    return sum(_stacked(program, loop) for loop in loops.values() if "transpose(" not in loop.attributes)


def _stacked(program: Program, loop: Instruction) -> int:
    length = program.length(loop)
    body = program.computations[loop.called("body")[0]]
    if length is None or len(body.root.operands) != len(loop.shapes):
        return 0
    return sum(
        shape.bytes
        for n, (shape, name) in enumerate(zip(loop.shapes, body.root.operands, strict=True))
        if shape.dims[:1] == (length,) and not shape.on_chip and not _passed_on(body, name, n)
    )


def _passed_on(body: Computation, name: str, place: int) -> bool:
    """Whether the loop's state at `place` leaves a turn as it came."""
    i = body.instructions[name]
    return i.opcode == "get-tuple-element" and re.search(rf"\bindex={place}\b", i.attributes) is not None
