"""Ring attention (Liu et al., 2023, arXiv 2310.01889): keys and values travel, queries stay.

At each step a device attends with its own queries to the shard of keys and values that is visiting, by a backend that works
by tiles, and merges the result by the log-sum-exp; meanwhile the shard is already sent on. The backward pass walks the ring
once more, recomputing the weights from the final log-sum-exp; the gradients of a shard travel along with it and so
come home. Nothing but a device's own part, a visiting shard and the next one are ever held.

Masks and scores are bound once, for the whole call; every pair of chunks gets its part of their arrays and cells with the
coordinates of the whole call, so anything means what it means on one device, dropout included. A pair of chunks without a
visible tile costs no compute.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from attnzoo.core.backends.part import Part, no_gradient
from attnzoo.core.backends.result import Result
from attnzoo.core.blocks import EMPTY, FULL, BlockMap
from attnzoo.core.cells import Bound, Geometry, Operand
from attnzoo.core.context.layout import Ring, all_full, map_by_chunks, states_by_chunk
from attnzoo.core.context.transport import hop, into_slots, out_of_slots
from attnzoo.core.context.windows import Chunks, Window, cuttable, window_of
from attnzoo.core.dropout import Dropout
from attnzoo.core.merge import merge_lse
from attnzoo.core.request import Request
from attnzoo.core.sharding import Axes, operand_spec
from attnzoo.core.weights import Pointwise, Weights


class Arrays(NamedTuple):
    """What a device holds of a call besides q, k, v and the score's operands; no gradient reaches these."""

    mask: tuple[Any, ...]
    q_positions: Any
    kv_positions: Any
    states: Any
    seed: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """What is static about a divided call."""

    backend: ModuleType
    ring: Ring
    axes: Axes
    chunks: Chunks
    block: tuple[int, int]
    full: bool
    mask: Callable[..., Any] | None
    mask_windows: tuple[Window, ...]
    score: Callable[..., Any] | None
    score_windows: tuple[Window, ...]
    weights: Weights
    drop_rate: float | None

    @property
    def pointwise(self) -> bool:
        return isinstance(self.weights, Pointwise)

    def shift(self, tree: Any, by: int) -> Any:
        return hop(tree, self.axes.context, self.ring.layout.devices, by)


def run(r: Request, backend: ModuleType, mesh: Any, axes: Axes, ring: Ring) -> Result:
    """The request on a mesh that divides its batch rows, heads and tokens (where ``ring`` is of one device: not the tokens)."""
    g, layout = r.geometry, ring.layout
    chunks = Chunks(g.queries, g.keys, g.queries // layout.chunks, g.keys // layout.chunks)
    block = backend.block_sizes(r, chunks.rows, chunks.columns)
    bm = map_by_chunks(r.mask, g, layout.chunks, block)
    part = backend.whole(r, bm)
    mask, score = cuttable(part.mask, chunks), cuttable(part.score, chunks)
    walk = Walk(
        backend, ring, axes, chunks, block, all_full(bm),
        None if mask is None else mask.apply, tuple(map(window_of, _operands(mask))),
        None if score is None else score.apply, tuple(map(window_of, _operands(score))),
        r.weights, None if r.dropout is None else r.dropout.rate,
    )  # fmt: skip
    by_lead = functools.partial(_spec_by_lead, axes=axes)
    rest = Arrays(
        tuple(jnp.asarray(op.x) for op in _operands(mask)),
        None if g.q_positions is None else jnp.asarray(g.q_positions)[:, None],
        None if g.kv_positions is None else jnp.asarray(g.kv_positions),
        jnp.asarray(states_by_chunk(bm, layout.chunks, block)),
        None if r.dropout is None else r.dropout.seed,
    )
    mask_specs, score_specs = (tuple(operand_spec(op, axes) for op in _operands(bound)) for bound in (mask, score))
    q_spec, kv_spec, state_spec = (
        None if x is None else by_lead(x) for x in (rest.q_positions, rest.kv_positions, rest.states)
    )
    rest_specs = Arrays(mask_specs, q_spec, kv_spec, state_spec, None if rest.seed is None else P())
    score_xs = tuple(jnp.asarray(op.x) for op in _operands(score))
    b, h, t = axes.batch or None, axes.heads or None, axes.context or None
    tokens, rows = P(b, t, h), P(b, h, t)

    def local(q: Array, k: Array, v: Array, score_xs: tuple[Array, ...], rest: Arrays) -> tuple[Array, Array]:
        into = functools.partial(into_slots, layout=layout, names=axes.context)
        q, k, v = (into(x, axis=1) for x in (q, k, v))
        score_xs, mask = (
            tuple(into(x, axis=2) if w.by_row else x for x, w in zip(xs, windows, strict=True))
            for xs, windows in ((score_xs, walk.score_windows), (rest.mask, walk.mask_windows))
        )
        out, lse = _attend(walk, q, k, v, score_xs, rest._replace(mask=mask))
        back = functools.partial(out_of_slots, layout=layout, names=axes.context, axis=2)
        return back(out), back(lse)

    divided = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, score_specs, rest_specs),
        out_specs=(rows, rows),
        check_vma=False,
    )
    out, lse = divided(part.q, part.k, part.v, score_xs, rest)
    final = None
    if not walk.pointwise:
        out, final = r.weights.finish(out, lse)
    return Result(jnp.moveaxis(out, 1, 2), final)


def _spec_by_lead(x: Array, axes: Axes) -> P:
    """Of an array ``[B|1, heads|1, ...]``, whole along everything else."""
    return operand_spec(Operand(x, "blocks"), axes)


def _operands(bound: Bound | None) -> tuple[Operand, ...]:
    return () if bound is None else bound.operands


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(w: Walk, q: Array, k: Array, v: Array, score_xs: Any, rest: Arrays) -> tuple[Array, Array]:
    """``out [slots, B, N, rows, Hv]`` and ``lse`` without Hv (float32) of q, k, v ``[slots, B, length, heads, width]``."""
    heads = jnp.moveaxis(q, 3, 2).shape[:4]
    start = jnp.zeros((*heads, v.shape[-1])), jnp.full(heads, 0.0 if w.pointwise else -jnp.inf)

    def visit(pair: _Pair, kv: Any, acc: Any) -> Any:
        def compute(out: Array, lse: Array) -> tuple[Array, Array]:
            more, its_lse = w.backend.attend_part(_part(w, pair, q, kv, score_xs, rest))
            more = more.astype(jnp.float32)
            return (out + more, lse) if w.pointwise else merge_lse(out, lse, more, its_lse)

        mine = jax.tree.map(lambda x: x[pair.row_slot], acc)
        new = _where_visible(w, pair, rest, compute, *mine)
        return jax.tree.map(lambda x, part: _with_slot(x, pair.row_slot, part), acc, new)

    return _walk_ring(w, visit, (k, v), start)


def _forward(w: Walk, q: Array, k: Array, v: Array, score_xs: Any, rest: Arrays) -> Any:
    out, lse = _attend(w, q, k, v, score_xs, rest)
    return (out, lse), (q, k, v, score_xs, rest, out, lse)


def _backward(w: Walk, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    q, k, v, score_xs, rest, out, lse = saved
    d_out, d_lse = cotangents
    delta = (d_out * out).sum(-1) - d_lse  # here once, so that the results need not be held while the ring is walked
    moving = [jnp.issubdtype(x.dtype, jnp.floating) for x in score_xs]
    windows = [window for window, moves in zip(w.score_windows, moving, strict=True) if moves]

    def visit(pair: _Pair, kv: Any, acc: Any, travelling: Any) -> Any:
        def compute(dq: Array, dk: Array, dv: Array, dxs: list[Array]) -> Any:
            part = _part(w, pair, q, kv, score_xs, rest)
            d = w.backend.part_gradients(part, *(x[pair.row_slot] for x in (lse, d_out, delta)))
            parts = [x for x in d.score if x is not None]
            added = [
                window.add(x, dx, w.chunks, pair.row_slot, pair.row, pair.column)
                for window, x, dx in zip(windows, dxs, parts, strict=True)
            ]
            return dq + d.q, dk + d.k, dv + d.v, added

        dq, dxs = acc
        dk, dv = travelling
        one = dq[pair.row_slot], dk[pair.key_slot], dv[pair.key_slot], dxs
        dq_new, dk_new, dv_new, dxs = _where_visible(w, pair, rest, compute, *one)
        travelling = _with_slot(dk, pair.key_slot, dk_new), _with_slot(dv, pair.key_slot, dv_new)
        return (_with_slot(dq, pair.row_slot, dq_new), dxs), travelling

    start = jnp.zeros(q.shape), [jnp.zeros_like(x) for x, moves in zip(score_xs, moving, strict=True) if moves]
    (dq, dxs), (dk, dv) = _walk_ring(w, visit, (k, v), start, (jnp.zeros(k.shape), jnp.zeros(v.shape)))
    given = iter(dxs)
    d_score = tuple(next(given) if moves else no_gradient(x) for x, moves in zip(score_xs, moving, strict=True))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_score, jax.tree.map(no_gradient, rest)


_attend.defvjp(_forward, _backward)


def _with_slot(x: Array, slot: Any, part: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, part, slot, 0)


class _Pair(NamedTuple):
    """A chunk of queries and one of keys: their numbers, and the slots in which this device and the visiting shard hold
    them."""

    row: Any
    column: Any
    row_slot: Any
    key_slot: Any


def _walk_ring(w: Walk, visit: Callable[..., Any], kv: Any, acc: Any, travelling: Any = None) -> Any:
    """``acc`` after ``visit(pair, kv, acc)`` of every pair of chunks. With ``travelling``, arrays that accompany a shard, alike
    everywhere at first: ``(acc, travelling) = visit(pair, kv, acc, travelling)``, and they end where the shard is at home."""
    layout, arc = w.ring.layout, w.ring.arc
    names, slots = w.axes.context, layout.slots
    me = lax.axis_index(names) if names else 0

    def shard(step: Any, kv: Any, carry: Any) -> Any:
        owner = (me - arc.first - step) % layout.devices

        def pair(n: Any, carry: Any) -> Any:
            a, c = (n, n) if slots == 1 else (lax.div(n, slots), lax.rem(n, slots))
            return visit(_Pair(layout.chunk(me, a), layout.chunk(owner, c), a, c), kv, *carry)

        if slots == 1:
            return wrapped(pair(0, carry))
        return lax.fori_loop(0, slots * slots, lambda n, carry: wrapped(pair(n, carry)), carry)

    wrapped = (lambda x: (x,)) if travelling is None else tuple
    carry = (acc,) if travelling is None else (acc, travelling)

    def step(n: Any, state: Any) -> Any:
        kv, carry = state
        following = w.shift(kv, 1)  # on its way while this shard is worked on
        carry = shard(n, kv, carry)
        return following, (carry[0], *w.shift(carry[1:], 1))

    kv = w.shift(kv, arc.first)
    if arc.steps > 1:
        kv, carry = lax.fori_loop(0, arc.steps - 1, step, (kv, carry))
    carry = shard(arc.steps - 1, kv, carry)
    return carry[0] if travelling is None else (carry[0], w.shift(carry[1], 1 - arc.first - arc.steps))


def _states(w: Walk, pair: _Pair, rest: Arrays) -> Array:
    """Tiles ``[B|1, N|1, down, across]`` of a pair of chunks."""
    s = rest.states
    row = lax.dynamic_index_in_dim(s, pair.row, 2, keepdims=False)
    return lax.dynamic_index_in_dim(row, pair.column, 3, keepdims=False)


def _where_visible(w: Walk, pair: _Pair, rest: Arrays, compute: Callable[..., Any], *values: Any) -> Any:
    """``compute(*values)`` if the pair has a tile to compute, else ``values`` as they are."""
    if w.full:
        return compute(*values)
    return lax.cond((_states(w, pair, rest) != EMPTY).any(), compute, lambda *same: same, *values)


def _part(w: Walk, pair: _Pair, q: Array, kv: tuple[Array, Array], score_xs: Any, rest: Arrays) -> Part:
    """A pair of chunks as a backend takes it."""
    c = w.chunks
    q, k, v = q[pair.row_slot], kv[0][pair.key_slot], kv[1][pair.key_slot]
    b, h = (lax.axis_index(names) * n if names else 0 for names, n in ((w.axes.batch, len(q)), (w.axes.heads, q.shape[2])))
    origin = jnp.stack([jnp.asarray(x, jnp.int32) for x in (b, h, pair.row * c.rows, pair.column * c.columns)])
    q_positions, kv_positions = (
        None if x is None else lax.dynamic_slice_in_dim(x, at * n, n, axis=2)
        for x, at, n in ((rest.q_positions, pair.row, c.rows), (rest.kv_positions, pair.column, c.columns))
    )
    q_positions = None if q_positions is None else q_positions[:, 0]
    g = Geometry(len(q), q.shape[2], k.shape[2], c.rows, c.columns, q_positions, kv_positions, origin)

    def bound(apply: Any, windows: Any, xs: Any) -> Bound | None:
        if apply is None:
            return None
        cut = (window.cut(x, c, pair.row_slot, pair.row, pair.column) for window, x in zip(windows, xs, strict=True))
        return Bound(tuple(cut), apply)

    mask, score = bound(w.mask, w.mask_windows, rest.mask), bound(w.score, w.score_windows, score_xs)
    shape = (1, 1, -(-c.rows // w.block[0]), -(-c.columns // w.block[1]))
    state = np.full(shape, FULL, np.int8) if w.full else _states(w, pair, rest)
    dropout = None if w.drop_rate is None else Dropout(w.drop_rate, rest.seed)
    return Part(q, k, v, g, mask, score, w.weights, dropout, BlockMap(state, c.rows, c.columns, *w.block, ""))
