"""How many bytes a compiled program moves between a device and its main memory: an estimate."""

from train.plan.accounting import KINDS
from train.plan.hlo import Computation, Instruction, Program, Run, Shape

_MOVES_NOTHING = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "async-start",
}  # fmt: skip
_READS_A_PART = {"dynamic-slice", "slice", "gather"}


def memory_traffic(program: Program) -> int:
    """Bytes per step: every instruction reads its operands and writes its result.

    A slice, or an update in place, touches only the slice, also inside a fusion. What lies in on-chip memory is free, and
    the padding of layouts is left out.
    """
    return sum(_traffic(program, run) * run.times for run in program.runs if not run.fused)


def _read(run: Run) -> int:
    return sum(_written(shapes) for shapes in run.computation.operands(run.instruction))


def _written(shapes: tuple[Shape, ...]) -> int:
    return sum(shape.bytes for shape in shapes if not shape.on_chip)


def _traffic(program: Program, run: Run) -> int:
    i = run.instruction
    if i.opcode in _MOVES_NOTHING or i.opcode.endswith("-done"):
        return 0
    written = _written(i.shapes)
    if i.opcode.endswith("-start"):  # its result lists its operands too
        return max(written, _read(run))
    if i.opcode in _READS_A_PART:
        return 2 * written
    if i.opcode == "dynamic-update-slice":
        return 2 * _written(run.computation.operands(i)[1])
    if i.opcode == "fusion":
        read = [_written(shapes) for shapes in run.computation.operands(i)]
        return _fusion(program, i, read)
    return _read(run) + written


def _fusion(program: Program, i: Instruction, read: list[int]) -> int:
    inner = program.computations[i.called("calls")[0]]
    total = sum(min(size, _parameter(program, inner, place)) for place, size in enumerate(read))
    written = _results(inner, i)
    for j in inner.instructions.values():
        if j.opcode == "dynamic-update-slice" and any(s.size == j.shapes[0].size and not s.on_chip for s in i.shapes):
            written -= j.shapes[0].bytes - inner.operands(j)[1][0].bytes
    return total + max(written, 0)


def _results(inner: Computation, i: Instruction) -> int:
    """Bytes that a fusion writes; what it only passes on is not written."""
    if _overlaps(inner.root):
        # The whole collective is counted where it starts: its operand and its result.
        return _written(inner.root.shapes[:2]) if "AsyncCollectiveStart" in inner.root.attributes else 0
    if inner.root.opcode != "tuple" or len(inner.root.operands) != len(i.shapes):
        return _written(i.shapes)
    made = (inner.instructions[name] for name in inner.root.operands)
    return sum(_written((s,)) for s, j in zip(i.shapes, made, strict=True) if j.opcode not in ("parameter", *KINDS))


def _parameter(program: Program, inner: Computation, place: int) -> int:
    """Bytes that a fusion reads of its operand at `place`."""
    users: dict[str, list[Instruction]] = {}
    for j in inner.instructions.values():
        for name in dict.fromkeys(j.operands):
            users.setdefault(name, []).append(j)
    found = [j for j in inner.instructions.values() if j.opcode == "parameter" and int(j.inside) == place]
    return sum(_part(program, inner, user, name) for j in found for user, name in _uses(j, users))


def _uses(j: Instruction, users: dict[str, list[Instruction]]) -> list[tuple[Instruction, str]]:
    """Who uses an array and by which name, seen through changes of its shape alone."""
    found = []
    for user in users.get(j.name, []):
        found += _uses(user, users) if user.opcode == "bitcast" else [(user, j.name)]
    return found


def _part(program: Program, inner: Computation, user: Instruction, name: str) -> int:
    """Bytes of the array `name` that a user reads; fusions may hold fusions."""
    if user.opcode == "fusion":
        nested = program.computations[user.called("calls")[0]]
        return sum(_parameter(program, nested, place) for place, given in enumerate(user.operands) if given == name)
    first = user.operands[0] == name
    if first and user.opcode in _READS_A_PART:
        return user.shapes[0].bytes
    if (first and user.opcode == "dynamic-update-slice") or user.opcode == "tuple" or _overlaps(user):
        return 0
    if user.opcode in KINDS and (_overlaps(inner.root) or inner.name.startswith("async_collective")):
        return 0
    return inner.instructions[name].shapes[0].bytes


def _overlaps(i: Instruction) -> bool:
    """Whether an instruction only starts or ends a collective that runs beside others."""
    return i.opcode == "custom-call" and "AsyncCollective" in i.attributes
