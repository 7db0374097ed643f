"""Reading a compiled program: XLA's text form as computations of instructions, and how often each of them runs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in ("s", "u", "f", "bf") for bits in (2, 4, 8, 16, 32, 64)
} | {"c64": 64, "c128": 128}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


class Shape(NamedTuple):
    """One array: its type, its sides, and its layout as the text has it."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def size(self) -> int:
        n = 1
        for side in self.dims:
            n *= side
        return n

    @property
    def bytes(self) -> int:
        """Without the padding of its layout."""
        # f8e4m3fn and its kin hold 8 bits.
        bits = _BITS.get(self.dtype) or (8 if self.dtype.startswith("f8") else 4 if self.dtype.startswith("f4") else 0)
        return -(-self.size * bits // 8)

    @property
    def on_chip(self) -> bool:
        """Whether it lies in another memory than the device's main one."""
        return re.search(r"S\([1-9]", self.layout) is not None


@dataclass(frozen=True)
class Instruction:
    """``name = shapes opcode(operands), attributes``; a tuple has several shapes. inside: the text between the brackets."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    attributes: str
    root: bool

    def called(self, attribute: str) -> list[str]:
        """The computations that an attribute names."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found.group(1)) if found else []


@dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def constants(self, instruction: Instruction) -> list[int]:
        """The whole numbers among its operands."""
        found = (self.instructions.get(name) for name in instruction.operands)
        return [int(i.inside) for i in found if i is not None and i.opcode == "constant" and i.inside.isdigit()]

    def operands(self, instruction: Instruction) -> list[tuple[Shape, ...]]:
        return [self.instructions[name].shapes for name in instruction.operands if name in self.instructions]


class Run(NamedTuple):
    """An instruction that the program executes ``times``. fused: inside another instruction, so that it moves no memory."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, of a tuple all of them."""
    return tuple(
        Shape(dtype, tuple(int(side.lstrip("<=")) for side in dims.split(",") if side), layout or "")
        for dtype, dims, layout in _ARRAY.findall(text)
    )


class Program:
    """A compiled module. loops_of_unknown_length: while loops whose body is counted once."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.loops_of_unknown_length = 0
        current = entry = None
        for line in text.splitlines():
            if line.startswith(("%", "ENTRY")) and line.rstrip().endswith("{"):
                name = line.removeprefix("ENTRY").strip().lstrip("%").split(" ", 1)[0].split("(", 1)[0]
                current = self.computations[name] = Computation(name)
                entry = current if line.startswith("ENTRY") else entry
            elif current is not None and " = " in line and (made := _instruction(line)) is not None:
                current.instructions[made.name] = made
        if entry is None:
            raise ValueError("the text has no ENTRY computation; is it a compiled module's?")
        self.entry = entry
        self.runs = tuple(self._runs(entry, 1, False))

    def _runs(self, computation: Computation, times: int, fused: bool) -> Iterator[Run]:
        for i in computation.instructions.values():
            yield Run(i, computation, times, fused)
            if i.opcode == "while":
                length = self.length(i)
                self.loops_of_unknown_length += length is None
                yield from self._into(i, "body", times * (1 if length is None else length), fused)
            elif i.opcode == "conditional":  # at most: every branch
                for attribute in ("branch_computations", "true_computation", "false_computation"):
                    yield from self._into(i, attribute, times, fused)
            elif i.opcode == "call":
                yield from self._into(i, "to_apply", times, fused)
            elif i.opcode in ("fusion", "async-start"):
                yield from self._into(i, "calls", times, fused or i.opcode == "fusion")

    def _into(self, i: Instruction, attribute: str, times: int, fused: bool) -> Iterator[Run]:
        for name in i.called(attribute):
            yield from self._runs(self.computations[name], times, fused)

    def length(self, loop: Instruction) -> int | None:
        """How often a while loop runs: as the compiler noted, or by the constant that its condition compares with."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted.group(1))
        condition = self.computations[loop.called("condition")[0]]
        root = condition.root
        bounds = condition.constants(root)
        if root.opcode != "compare" or "direction=LT" not in root.attributes or not bounds:
            return None
        compared = condition.instructions.get(root.operands[0])
        counter = None if compared is None else re.search(r"\bindex=(\d+)", compared.attributes)
        return -(-bounds[0] // (self._step(loop, int(counter.group(1))) if counter else 1))

    def _step(self, loop: Instruction, counter: int) -> int:
        """How far one turn of a loop moves the counter at that place of its state. A product of matrices that XLA overlaps with
        bringing parts of one of them around a ring of devices counts by twos."""
        body = self.computations[loop.called("body")[0]]
        after = body.instructions.get(body.root.operands[counter]) if body.root.opcode == "tuple" else None
        steps = body.constants(after) if after is not None and after.opcode == "add" else []
        return max([1, *steps])


def _instruction(line: str) -> Instruction | None:
    name, _, rest = line.strip().partition(" = ")
    root, name = name.startswith("ROOT "), name.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, rest[:start], shapes_of(kind), operands, inside, rest[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return start + match.start()
    return len(text)
