"""How many bytes a compiled program moves between a device and its main memory: an estimate."""

from train.plan.hlo import Computation, Instruction, Program, Run

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


def _traffic(program: Program, run: Run) -> int:
    i = run.instruction
    if i.opcode in _MOVES_NOTHING or i.opcode.endswith("-done"):
        return 0
    read = [sum(s.bytes for s in shapes if not s.on_chip) for shapes in run.computation.operands(i)]
    written = sum(s.bytes for s in i.shapes if not s.on_chip)
    if i.opcode.endswith("-start"):  # its result lists its operands too
        return max(written, sum(read))
    if i.opcode in _READS_A_PART:
        return 2 * written
    if i.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if i.opcode == "fusion":
        return _fusion(program.computations[i.called("calls")[0]], i, read, written)
    return sum(read) + written


def _fusion(inner: Computation, i: Instruction, read: list[int], written: int) -> int:
    users: dict[str, list[Instruction]] = {}
    for j in inner.instructions.values():
        for name in j.operands:
            users.setdefault(name, []).append(j)
    total = 0
    for j in inner.instructions.values():
        if j.opcode == "parameter" and int(j.inside) < len(read):
            total += min(read[int(j.inside)], sum(_part(inner, user, name) for user, name in _uses(j, users)))
    for j in inner.instructions.values():
        if j.opcode == "dynamic-update-slice" and any(s.size == j.shapes[0].size and not s.on_chip for s in i.shapes):
            written -= j.shapes[0].bytes - inner.operands(j)[1][0].bytes
    return total + max(written, 0)


def _uses(j: Instruction, users: dict[str, list[Instruction]]) -> list[tuple[Instruction, str]]:
    """Who uses an array and by which name, seen through changes of its shape alone."""
    found = []
    for user in users.get(j.name, []):
        found += _uses(user, users) if user.opcode == "bitcast" else [(user, j.name)]
    return found


def _part(inner: Computation, user: Instruction, name: str) -> int:
    """Bytes of the array `name` that a user reads."""
    first = user.operands[0] == name
    if first and user.opcode in _READS_A_PART:
        return user.shapes[0].bytes
    if first and user.opcode == "dynamic-update-slice":
        return 0
    return inner.instructions[name].shapes[0].bytes
