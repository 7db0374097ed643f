"""What a compiled program does per device and step: collectives and operations. Loops count as often as they run."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from train.plan.hlo import Instruction, Program, Run, Shape


@dataclass(frozen=True)
class Collectives:
    """All collectives of one kind over groups of one size.

    count: executions per step. bytes: what a device hands over or gets, the larger of the two. received: bytes that arrive
    at a device over its links, at least, by a ring through the group.
    """

    kind: str
    group: int
    count: int
    bytes: int
    received: int


KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


def collective_runs(program: Program) -> Iterator[tuple[str, Run]]:
    """(kind, run) of every collective, each once.

    A TPU program that overlaps one with arithmetic spreads it over several fusions: they name it by the same channel. An
    all-reduce of which each device keeps a part is a reduce-scatter.
    """
    seen: set[str] = set()
    for run in program.runs:
        kind = run.instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = re.search(r"channel_id=\d+", run.instruction.attributes)
        if run.fused and channel:
            if channel.group() in seen:
                continue
            seen.add(channel.group())
        yield ("reduce-scatter" if run.computation.name.startswith("all-reduce-scatter") else kind), run


def collectives(program: Program, devices: int) -> list[Collectives]:
    """By kind and size of group, most received bytes first. devices: of the program, all of them when it names no groups."""
    found: dict[tuple[str, int], list[int]] = {}
    for kind, run in collective_runs(program):
        n = _group(run.instruction, devices)
        held = sum(s.bytes for shapes in run.computation.operands(run.instruction) for s in shapes)
        moved, received = {
            "all-gather": (held * n, held * (n - 1)),
            "all-reduce": (held, 2 * held * (n - 1) // n),
            "collective-permute": (held, held),
            "collective-broadcast": (held, held),
        }.get(kind, (held, held * (n - 1) // n))
        total = found.setdefault((kind, n), [0, 0, 0])
        for place, value in enumerate((1, moved, received)):
            total[place] += value * run.times
    rows = [Collectives(kind, n, *totals) for (kind, n), totals in found.items()]
    return sorted(rows, key=lambda row: -row.received)


def _group(i: Instruction, devices: int) -> int:
    """Devices that a collective runs among; XLA writes its groups in three ways."""
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", i.attributes)
    if iota:
        return int(iota.group(2))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", i.attributes)
    if listed:
        return len(listed.group(1).split(","))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", i.attributes)
    if axes:
        sides = dict(re.findall(r"'([^']+)'=(\d+)", axes.group(1)))
        # A part of an axis stands there as 'axis':(before)size.
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", axes.group(2))
        return math.prod(int(part or sides[axis]) for axis, part in named)
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", i.attributes)
    if pairs:
        return _longest_cycle(pairs.group(1))
    if re.search(r"replica_groups=(?!\{\})", i.attributes):
        raise ValueError(f"the groups of a collective are written in an unknown way: {i.attributes[:200]}")
    return devices


def _longest_cycle(pairs: str) -> int:
    """How many devices a permutation passes data around between."""
    follows = {int(a): int(b) for a, b in re.findall(r"(\d+),(\d+)", pairs)}
    longest, left = 1, set(follows)
    while left:
        at = min(left - set(follows.values()), default=min(left))
        seen: set[int] = set()
        while at in left - seen:
            seen.add(at)
            at = follows[at]
        left -= seen
        longest = max(longest, len(seen | {at}))
    return longest


def flops(program: Program) -> int:
    """Of matrix products and convolutions, and of kernels by what they say of themselves; arithmetic per element is not
    counted."""
    return sum(_flops(run) * run.times for run in program.runs)


def _flops(run: Run) -> int:
    i = run.instruction
    if i.opcode == "dot":
        lhs = run.computation.operands(i)[0][0]
        contracted = [int(n) for n in re.findall(r"\d+", re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)[1])]  # type: ignore[index]
        return 2 * i.shapes[0].size * math.prod(lhs.dims[n] for n in contracted)
    if i.opcode == "convolution":
        return _convolution(i, *(shapes[0] for shapes in run.computation.operands(i)[:2]))
    if i.opcode == "custom-call" and (told := re.search(r'"cost_estimate":(\{[^}]*\})', i.attributes)):
        return int(json.loads(told.group(1)).get("flops", 0))
    return 0


def _convolution(i: Instruction, lhs: Shape, rhs: Shape) -> int:
    """2 x the multiplications whose input is there; on TPU every matrix product is a convolution, some of them padded."""
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes).groups()  # type: ignore[union-attr]
    out = i.shapes[0]

    def sides(name: str, default: int) -> list[int]:
        found = re.search(rf"\b{name}=([\dx\-]+)", _window(i))
        return [int(n) for n in found.group(1).split("x")] if found else [default] * len(spatial)

    spatial = sorted(label for label in left if label.isdigit())
    padding = re.search(r"\bpad=([\d_x\-]+)", _window(i))
    low = [int(pair.split("_")[0]) for pair in padding.group(1).split("x")] if padding else [0] * len(spatial)
    valid = 1
    steps, reach, holes = sides("stride", 1), sides("rhs_dilate", 1), sides("lhs_dilate", 1)
    for axis, label in enumerate(spatial):
        width = lhs.dims[left.index(label)]
        at = np.arange(out.dims[result.index(label)])[:, None] * steps[axis] - low[axis]
        at = at + np.arange(rhs.dims[right.index(label)]) * reach[axis]
        inside = (at >= 0) & (at <= (width - 1) * holes[axis]) & (at % holes[axis] == 0)
        valid *= int(inside.sum())
    batches = re.search(r"batch_group_count=(\d+)", i.attributes)
    rows = lhs.dims[left.index("b")] // (int(batches.group(1)) if batches else 1)
    return 2 * valid * rows * rhs.dims[right.index("i")] * out.dims[result.index("f")]


def _window(i: Instruction) -> str:
    found = re.search(r"window=\{([^}]*)\}", i.attributes)
    return found.group(1) if found else ""


def kernels(program: Program) -> Counter[str]:
    """Pallas kernels by name, and how often a step runs each."""
    found: Counter[str] = Counter()
    for run in program.runs:
        i = run.instruction
        if i.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes:
            found[re.sub(r"[.\d]+$", "", i.name)] += run.times
    return found
