"""A call whose lists of tiles do not fit into scalar memory at once, cut into parts that are computed one after another.

Batch rows and key heads are cut first, where they have lists of their own, and the queries if one list alone is too long.
Every part has the coordinates of the whole call, so masks, scores and dropout mean in it what they mean there.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.core.backends.part import Part, PartGradients
from attnzoo.core.cells import Bound, Geometry, Operand

#: Each turn is compiled by itself.
MOST_TURNS = 32


class Turn(NamedTuple):
    """Batch rows, key heads and rows of tiles that are computed together."""

    batch: slice
    kv_heads: slice
    rows: slice


def turns(g: Geometry, states: tuple[int, int, int, int], tiles: np.ndarray | None, room: int) -> list[Turn] | None:
    """The fewest turns whose lists have no more than ``room`` words; None where a row of tiles alone has more.

    states: the shape ``[B|1, N|1, rows, columns]`` of the states of tiles. tiles: how many words each row of tiles takes,
    ``[B|1, N|1, rows]``, where states are known; else as many as there are columns.
    """
    batch, heads, rows, columns = states
    words = np.full((1, 1, rows), columns) if tiles is None else tiles
    longest = int(words.sum(-1).max())
    together, least = room // longest, g.heads // g.kv_heads if heads > 1 else 1
    if together >= heads:
        key_heads, batch_rows = g.kv_heads, together // heads if batch > 1 else g.batch
    else:
        key_heads, batch_rows = max(1, together // least) if heads > 1 else g.kv_heads, 1 if batch > 1 else g.batch
    cuts = [slice(0, rows)]
    if together < least:
        of_a_row = words.max((0, 1))
        if least * int(of_a_row.max()) > room:
            return None
        cuts = _runs(of_a_row, room // least)
    return [Turn(*x) for x in itertools.product(_steps(g.batch, batch_rows), _steps(g.kv_heads, key_heads), cuts)]


def _steps(n: int, size: int) -> list[slice]:
    return [slice(begin, min(begin + size, n)) for begin in range(0, n, max(1, size))]


def _runs(sizes: np.ndarray, most: int) -> list[slice]:
    """Runs of neighbours, each as long as its sizes sum to no more than ``most``."""
    borders, total = [0], 0
    for n, size in enumerate(sizes):
        if total + size > most:
            borders.append(n)
            total = 0
        total += int(size)
    return [slice(a, b) for a, b in itertools.pairwise([*borders, len(sizes)])]


def attend_in_turns(part: Part, order: list[Turn], attend: Callable[[Part], tuple[Any, Any]]) -> tuple[Any, Any]:
    """``attend(part)``, that is ``out [B, N, T, Hv]`` and ``lse [B, N, T]``, by a call for each turn."""
    if len(order) == 1:
        return attend(part)
    part = _widened(part, order)
    done = [attend(_cut(part, turn)) for turn in order]
    out, lse = (_joined(order, list(each)) for each in zip(*done, strict=True))
    return out, lse


def gradients_in_turns(
    part: Part, order: list[Turn], gradients: Callable[..., PartGradients], lse: Any, d_out: Any, delta: Any
) -> PartGradients:
    """``gradients(part, lse, d_out, delta)`` by a call for each turn."""
    if len(order) == 1:
        return gradients(part, lse, d_out, delta)
    part = _widened(part, order)
    operands = () if part.score is None else part.score.operands
    moving = [n for n, op in enumerate(operands) if jnp.issubdtype(op.x.dtype, jnp.floating)]

    def arrays(turn: Turn, q: Any, k: Any, v: Any, xs: list[Any]) -> Any:
        given = list(operands)
        for n, x in zip(moving, xs, strict=True):
            given[n] = dataclasses.replace(given[n], x=x)
        score = None if part.score is None else part.score._replace(operands=tuple(given))
        here = _cut(part._replace(q=q, k=k, v=v, score=score), turn)
        return here.q, here.k, here.v, [here.score.operands[n].x for n in moving] if here.score else []

    total: Any = None
    for turn in order:
        at = _cells(part, turn)
        d = gradients(_cut(part, turn), *(x[at] for x in (lse, d_out, delta)))
        # How the arrays were cut says where their gradients go.
        cut, pull = jax.vjp(functools.partial(arrays, turn), part.q, part.k, part.v, [operands[n].x for n in moving])
        found = d.q, d.k, d.v, [d.score[n] for n in moving]
        back = pull(jax.tree.map(lambda d, x: d.astype(x.dtype), found, cut))
        total = back if total is None else jax.tree.map(jnp.add, total, back)
    dq, dk, dv, by_operand = total
    placed = dict(zip(moving, by_operand, strict=True))
    return PartGradients(dq, dk, dv, [placed.get(n) for n in range(len(operands))])


def _widened(part: Part, order: list[Turn]) -> Part:
    """With keys and values that several turns share in float32, in which their gradients are then added up."""
    if all(turn.rows == order[0].rows for turn in order):
        return part
    k, v = (x if x.dtype.itemsize == 1 else x.astype(jnp.float32) for x in (part.k, part.v))  # 8 bits have no derivative
    return part._replace(k=k, v=k if part.v is part.k else v)


def _cells(part: Part, turn: Turn) -> tuple[slice, slice, slice]:
    """Batch rows, query heads and queries of a turn."""
    g, block = part.geometry, part.block_map.block_q
    group = g.heads // g.kv_heads
    return (
        turn.batch,
        slice(turn.kv_heads.start * group, turn.kv_heads.stop * group),
        slice(turn.rows.start * block, min(turn.rows.stop * block, g.queries)),
    )


def _cut(part: Part, turn: Turn) -> Part:
    """What a turn computes of a part whose mask and score are of the form that kernels take (hoisted)."""
    g, bm = part.geometry, part.block_map
    kh = turn.kv_heads
    b, h, t = _cells(part, turn)
    k, v = (x[:, :, kh] if part.pages is not None else x[b, :, kh] for x in (part.k, part.v))
    k, v = (x.astype(part.q.dtype) if x.dtype == jnp.float32 else x for x in (k, v))  # what `_widened` did
    begin = jnp.asarray([b.start, h.start, t.start, 0], jnp.int32)

    def bound(whole: Bound | None) -> Bound | None:
        if whole is None:
            return None
        operands = tuple(_cut_operand(op, b, h, t, g, bm.block_q) for op in whole.operands)
        ahead = None if whole.ahead is None else whole.ahead + t.start
        return Bound(operands, whole.apply, ahead, None if whole.behind is None else whole.behind - t.start)

    state = _lead(bm.state, b, h)[:, :, turn.rows]
    return part._replace(
        q=part.q[b, t, h],
        k=k,
        v=k if part.v is part.k else v,
        geometry=dataclasses.replace(
            g, batch=b.stop - b.start, heads=h.stop - h.start, kv_heads=kh.stop - kh.start, queries=t.stop - t.start,
            q_positions=None if g.q_positions is None else _lead(g.q_positions, b)[:, t],
            kv_positions=None if g.kv_positions is None else _lead(g.kv_positions, b, kh),
            origin=begin if g.origin is None else jnp.asarray(g.origin) + begin,
        ),
        mask=bound(part.mask),
        score=bound(part.score),
        block_map=dataclasses.replace(bm, state=state, queries=t.stop - t.start),
        pages=None if part.pages is None else part.pages[b],
        value_scale=None if part.value_scale is None else part.value_scale[b, :, kh],
    )  # fmt: skip


def _lead(x: Any, *slices: slice) -> Any:
    """The leading axes cut, but for those of length 1, which stand for all."""
    return x[tuple(s if n > 1 else slice(None) for s, n in zip(slices, x.shape, strict=False))]


def _cut_operand(op: Operand, b: slice, h: slice, t: slice, g: Geometry, block_q: int) -> Operand:
    x = op.x
    if op.kind == "distance":
        return dataclasses.replace(op, x=_lead(x, h)[:, t.start : t.stop + g.keys - 1])
    if op.kind == "blocks" and op.block is not None:  # of rows that turns need not cut between: one of each row of tiles
        firsts = np.arange(t.start, t.stop, block_q) // op.block[0]
        return dataclasses.replace(op, x=jnp.asarray(_lead(x, b, h))[:, :, firsts], block=(block_q, op.block[1]))
    return dataclasses.replace(op, x=_lead(x, b, h, t))


def _joined(order: list[Turn], done: list[Any]) -> Any:
    """The results ``[batch, heads, queries, ...]`` of all turns, in their order, as those of the part."""

    def together(order: list[Turn], done: list[Any], axis: int) -> Any:
        if axis == 3:
            return done[0]
        groups = [list(group) for _, group in itertools.groupby(range(len(order)), lambda n: order[n][axis].start)]
        parts = [together([order[n] for n in group], [done[n] for n in group], axis + 1) for group in groups]
        return jnp.concatenate(parts, axis=axis) if len(parts) > 1 else parts[0]

    return together(order, done, 0)
