"""Few queries for a kernel: the query heads of a key head become rows of one tile, so that each key is read once for all.

Row ``g · T + t`` of key head kh is query t of head ``kh · G + g``; what depended on head or query now depends on the row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from attnzoo.core.blocks import FULL, PARTIAL
from attnzoo.core.cells import Bound, Geometry, Operand, Tile, cut

#: Rows of a packed tile at most.
MOST_ROWS = 128


def packs(g: Geometry) -> bool:
    """Whether a call has few enough queries."""
    return g.queries < 16 and g.queries * (g.heads // g.kv_heads) <= MOST_ROWS


def packed_geometry(g: Geometry) -> Geometry:
    """The same call with a row for every query of every head of a group."""
    return dataclasses.replace(
        g, heads=g.kv_heads, queries=g.queries * (g.heads // g.kv_heads), q_positions=None, kv_positions=None
    )


def packed_bound(bound: Bound, g: Geometry, *, score: bool = False) -> Bound:
    """A hoisted mask or score (:func:`attnzoo.core.hoist.hoist`) of geometry ``g``, for rows."""
    group, length = g.heads // g.kv_heads, g.queries

    def apply(*arguments: Any) -> Any:
        x, (b, kh, row, s, *parts) = (arguments[:1], arguments[1:]) if score else ((), arguments)
        h = kh * group + lax.div(row, jnp.full_like(row, length))
        return bound.apply(*x, b, h, lax.rem(row, jnp.full_like(row, length)), s, *parts)

    return Bound(tuple(Operand(packed_array(op, g), "aligned") for op in bound.operands), apply)


def packed_array(op: Operand, g: Geometry) -> Any:
    """``[B|1, N|1, T|1, S|1]`` as ``[B|1, K|1, rows|1, S|1]``; other kinds have an entry per cell, there are few."""
    x = _by_cell(op, g)
    batch, heads, length, keys = x.shape
    if heads == length == 1:
        return x
    group = g.heads // g.kv_heads
    x = jnp.broadcast_to(x, (batch, heads, g.queries, keys))
    if heads == 1:
        return jnp.tile(x, (1, 1, group, 1))
    return x.reshape(batch, g.kv_heads, group * g.queries, keys)


def _by_cell(op: Operand, g: Geometry) -> Any:
    if op.kind == "distance":
        apart = np.arange(g.queries)[:, None] - np.arange(g.keys)[None, :] + g.keys - 1
        return jnp.asarray(op.x)[:, apart][None]
    if op.kind == "blocks":
        return cut(op, Tile((0, 0, 0, 0), (op.x.shape[0], op.x.shape[1], g.queries, g.keys)), g.keys)
    return jnp.asarray(op.x)


def packed_state(state: Any, g: Geometry) -> Any:
    """Tile states ``[B|1, N|1, 1, nk]`` of heads as those of key heads: full where full for all."""
    if state.shape[1] == 1:
        return state
    xp = np if isinstance(state, np.ndarray) else jnp
    members = state.reshape(state.shape[0], g.kv_heads, -1, *state.shape[2:])
    full, some = (members == FULL).all(2), (members > 0).any(2)
    return xp.where(full, FULL, xp.where(some, PARTIAL, 0)).astype(np.int8)


def packed_queries(q: Any, g: Geometry) -> Any:
    """``[B, T, N, H] -> [B, rows, K, H]``; sizes of the batch and the heads are those of ``q``."""
    batch, length, heads, width = q.shape
    group = g.heads // g.kv_heads
    q = q.reshape(batch, length, heads // group, group, width)
    return jnp.moveaxis(q, 3, 1).reshape(batch, group * length, heads // group, width)


def unpacked(x: Any, g: Geometry) -> Any:
    """``[B, K, rows, ...] -> [B, N, T, ...]``."""
    batch, kv_heads, rows = x.shape[:3]
    return x.reshape(batch, kv_heads * (rows // g.queries), g.queries, *x.shape[3:])
