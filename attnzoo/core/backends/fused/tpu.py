"""The kernels of `pallas_kernels.tpu` for the backend "pallas"."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.core.backends.fused.problem import call_of, mask_operands, operands, pages_of, problem_of
from attnzoo.core.backends.part import Part, PartGradients
from attnzoo.core.backends.turns import MOST_TURNS, Turn, attend_in_turns, gradients_in_turns, turns
from attnzoo.core.cells import Geometry
from attnzoo.core.weights import Thresholded

Search = Callable[[Callable[[Any], Any], Any, Any], Any]
"""``(f, low, high) -> u`` with f(u) = 1, for an f that grows."""

DTYPES = ("float32", "bfloat16")
READS_NARROW = True
HOLDS_ROWS = True


def there() -> bool:
    """Whether there is a TPU, described or simulated ones included; these take a module that is slow to import."""
    if jax.default_backend() == "tpu":
        return True
    launch = sys.modules.get("pallas_kernels.tpu.launch")
    return launch is not None and (launch.generation() is not None or launch.simulated())


def taken_unasked() -> bool:
    return True


def block_sizes(wanted: tuple[int, int] | None, queries: int, keys: int) -> tuple[int, int]:
    """Raises ValueError for tiles that are no multiples of 128."""
    from pallas_kernels.tpu.choice import blocks

    if wanted is not None and any(n % 128 for n in wanted):
        raise ValueError(f"its block_sizes are multiples of 128, not {wanted}")
    block_q, block_k = wanted or blocks()[:2]
    return min(block_q, -(-queries // 128) * 128), min(block_k, -(-keys // 128) * 128)


def packed_rows(rows: int) -> int:
    return -(-rows // 16) * 16


def most_runs(rows_and_heads: int, keys: int) -> int:
    return 1  # one core reads the cache as fast as the memory gives it


def holds_pages(entries: int) -> bool:
    from pallas_kernels.tpu.jobs import MOST_BYTES

    return 4 * entries <= MOST_BYTES // 2  # lists of tiles take scalar memory too


def refusal(part: Part, packed: Geometry | None, rectangle: tuple[int, int] | None) -> str | None:
    from pallas_kernels.tpu import jobs, launch

    by_distance = any(op.kind == "distance" for bound in (part.mask, part.score) for op in operands(bound))
    if by_distance and launch.generation() == "v4":
        return "TPU v4 cannot shift rows against each other, which arrays looked up by distance need"
    bm, g = part.block_map, part.geometry
    batch, heads, rows, columns = bm.state.shape
    if rectangle is not None:
        rows, columns = -(-rectangle[0] // bm.block_q), -(-rectangle[1] // bm.block_k)
    group = g.heads // g.kv_heads
    if heads > 1 and group > jobs.MOST_MEMBERS:
        return (
            f"heads that see different tiles may share a key head {jobs.MOST_MEMBERS} at a time, not {group}; repeat k and "
            "v, or let all heads see the same tiles"
        )
    if max(rows, columns) > jobs.MOST_BLOCKS:
        return (
            f"{rows}×{columns} blocks are more than the {jobs.MOST_BLOCKS} per axis that it can count; use larger block_sizes"
        )
    order = _order(part, (batch, heads, rows, columns), rectangle is None)
    if order is None or len(order) > MOST_TURNS:
        return (
            f"its lists of tiles would take more than {MOST_TURNS} times the {jobs.MOST_BYTES // 1024} KiB of scalar memory "
            "that there are for them; use larger block_sizes, or a mask that batch rows and heads share"
        )
    return None


def _order(part: Part, states: tuple[int, int, int, int], whole: bool = True) -> list[Turn] | None:
    """In which turns a part, or as many of its tiles as ``states`` says, has lists that fit into scalar memory."""
    from pallas_kernels.tpu.jobs import MOST_BYTES

    tiles, state = None, part.block_map.state
    if whole and isinstance(state, np.ndarray):
        tiles = np.maximum(1, (state > 0).sum(-1))
    return turns(part.geometry, states, tiles, MOST_BYTES // 4)


def attend(part: Part, packed: Geometry | None) -> tuple[Any, Any]:
    return attend_in_turns(part, _known_order(part), functools.partial(_attend, packed))


def _known_order(part: Part) -> list[Turn]:
    order = _order(part, part.block_map.state.shape)
    assert order is not None  # else refused
    return order


def _attend(packed: Geometry | None, part: Part) -> tuple[Any, Any]:
    from pallas_kernels.tpu import attend

    problem, arrays = _problem(part, packed)
    out, lse = attend.attend(problem, *arrays) if part.pages is None else attend.attend_pages(problem, *arrays, pages_of(part))
    return out[:, :, : problem.queries], lse[:, :, 0, : problem.queries]


def gradients(part: Part, lse: Any, d_out: Any, delta: Any) -> PartGradients:
    return gradients_in_turns(part, _known_order(part), _gradients, lse, d_out, delta)


def _gradients(part: Part, lse: Any, d_out: Any, delta: Any) -> PartGradients:
    from pallas_kernels.tpu.attend import attend_gradients

    problem, arrays = _problem(part, None)
    rows = problem.padded[0] - problem.queries

    def padded(x: Any, fill: float = 0.0) -> Any:
        return jnp.pad(x, [(0, 0), (0, 0), (0, rows)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)

    norm, delta = padded(lse, -jnp.inf)[:, :, None], padded(delta)[:, :, None]
    dq, dk, dv, d_score, _ = attend_gradients(problem, arrays, norm, padded(d_out), delta)  # a ring's k and v are two
    dq, dk, dv = (jnp.moveaxis(d[:, :, : x.shape[1]], 1, 2) for d, x in ((dq, part.q), (dk, part.k), (dv, part.v)))
    return PartGradients(dq, dk, dv, [None if d.dtype == jax.dtypes.float0 else d for d in d_score])


def rows_fit(part: Part, slots: int) -> bool:
    """Whether the logits of a block of queries and so many tiles of keys find room on the chip, and all lists at once."""
    from pallas_kernels.tpu.choice import held_bytes
    from pallas_kernels.tpu.threshold import bytes_of

    bm = part.block_map
    order = _order(part, bm.state.shape)
    return bytes_of(slots, bm.block_q, bm.block_k) <= held_bytes() and order is not None and len(order) == 1


def thresholds(part: Part, search: Search, numbers: Sequence[Any], slots: int) -> tuple[Any, Any]:
    """Reference and threshold ``[B, N, T]`` of the rows of a part with thresholded weights. numbers: the bounds of the search,
    then what the weights depend on, ``[B|1, N|1, T|1, 1]``; slots: tiles that a row of tiles has at most."""
    from pallas_kernels.tpu import threshold
    from pallas_kernels.tpu.flash import Inputs
    from pallas_kernels.tpu.jobs import make_jobs
    from pallas_kernels.tpu.problem import laid_out, layout_of

    assert isinstance(part.weights, Thresholded)
    problem, state = _sized(part, None)
    layouts = tuple(layout_of(x, False) for x in numbers)
    equation = threshold.Equation(
        part.weights.row, part.weights.weight, search,
        tuple(laid_out(problem, x, layout) for x, layout in zip(numbers, layouts, strict=True)), layouts,
    )  # fmt: skip
    score = (laid_out(problem, op.x, layout) for op, layout in zip(operands(part.score), problem.score_layouts, strict=True))
    q, k = _queries_and_keys(part, problem)
    inputs = Inputs(q, k, None, tuple(score), mask_operands(part, problem), call_of(part), pages_of(part))
    lists = make_jobs(state.reshape(-1, *state.shape[2:]), problem.kinds)
    found = threshold.thresholds(problem, lists, slots, inputs, equation)
    return tuple(x[:, :, 0, : problem.queries] for x in found)  # type: ignore[return-value]


def _sized(part: Part, packed: Geometry | None) -> tuple[Any, Any]:
    """The kernels' problem in the pieces that this generation takes, and the states of its tiles."""
    from pallas_kernels.tpu.choice import blocks

    rows, columns = blocks()[2:]
    bm = part.block_map
    return problem_of(part, packed, _divisor(bm.block_q, rows), _divisor(bm.block_k, columns))


def _queries_and_keys(part: Part, problem: Any) -> tuple[Any, Any]:
    """``[B, N, T, H]`` and ``[B, K, S, H]``, padded to whole blocks; pages are whole ones."""
    rows, columns = problem.padded
    return _by_heads(part.q, rows), _by_heads(part.k, columns if part.pages is None else part.k.shape[1])


def _problem(part: Part, packed: Geometry | None) -> tuple[Any, tuple[Any, ...]]:
    """The kernels' problem, and ``(q, k, v, score operands, the rest)`` as they take them."""
    from pallas_kernels.tpu.attend import Lists, column_lists
    from pallas_kernels.tpu.choice import stairs
    from pallas_kernels.tpu.jobs import make_jobs, with_stairs

    bm = part.block_map
    problem, state = _sized(part, packed)
    problem = dataclasses.replace(problem, keys_are_values=part.v is part.k)
    reach = (None, None) if part.mask is None else (part.mask.ahead, part.mask.behind)
    if any(n is not None for n in reach) and _cuts_along_diagonals(problem, stairs()):
        # A row does not see farther than it says if it says more: the next border of tiles.
        near, far = (None if n is None else -(-n // bm.block_q) for n in reach)
        if near is not None and near + (far or 0) == 0:
            far = None  # tiles that are cut from both sides
        problem = dataclasses.replace(problem, stair=stairs()[0], near=near, far=far)
        state = with_stairs(state, near, far)
    by_column, kinds_of = column_lists(problem, state)
    lists = Lists(make_jobs(state.reshape(-1, *state.shape[2:]), problem.kinds), by_column, kinds_of)
    q, k = _queries_and_keys(part, problem)
    keys = k.shape[2]
    v = None if problem.keys_are_values else _by_heads(part.v, keys)
    value_scale = None
    if part.value_scale is not None:
        value_scale = jnp.pad(jnp.moveaxis(part.value_scale, 1, 2), ((0, 0), (0, 0), (0, keys - part.k.shape[1])))[:, :, None]
    rest = (lists, mask_operands(part, problem), call_of(part), value_scale)
    return problem, (q, k, v, tuple(op.x for op in operands(part.score)), rest)


def _cuts_along_diagonals(p: Any, stairs: tuple[int, int]) -> bool:
    """Whether tiles can be cut along their diagonals into pieces that pay, and cells on the far side are not asked for: the
    gradient of a score's operand by cell is written by whole tiles."""
    if p.block_q != p.block_k or p.block_q % max(stairs) or p.block_q == min(stairs):
        return False
    return not any(d and layout.form == "cell" for layout, d in zip(p.score_layouts, p.differentiable, strict=True))


def _divisor(block: int, piece: int) -> int:
    return block if block <= piece else piece if block % piece == 0 else 128


def _by_heads(x: Any, length: int) -> Any:
    """``[B, T, N, H] -> [B, N, length, H]``, padded with zeros."""
    x = jnp.moveaxis(x, 2, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
