"""A part of a call as the kernels of every platform are told of it."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from attnzoo.core.backends.packed import packed_bound
from attnzoo.core.backends.part import Part
from attnzoo.core.blocks import FULL, PARTIAL
from attnzoo.core.cells import Bound, Cells, Geometry, Operand
from attnzoo.core.dropout import Dropout, keep_scale
from attnzoo.core.weights import Pointwise


def operands(bound: Bound | None) -> tuple[Operand, ...]:
    return () if bound is None else bound.operands


def hide_padding(state: Any, keys: int, block_k: int) -> Any:
    """Tile states in which a last, short block of keys is no full one."""
    if keys % block_k == 0:
        return state
    xp = np if isinstance(state, np.ndarray) else jnp
    last = np.arange(state.shape[3]) == state.shape[3] - 1
    return xp.where(last & (state == FULL), PARTIAL, state)


def problem_of(part: Part, packed: Geometry | None, rows: int, columns: int) -> tuple[Any, Any]:
    """The kernels' problem and the states of its tiles. packed: the geometry of a call whose heads have become rows; rows,
    columns: of the pieces that a tile is worked through in."""
    from pallas_kernels.tpu.problem import Problem

    g, bm, mask, score = part.geometry, part.block_map, part.mask, part.score
    state = hide_padding(bm.state, g.keys, bm.block_k)
    problem = Problem(
        g.batch, g.heads, g.kv_heads, g.queries, g.keys, bm.block_q, bm.block_k, rows, columns,
        None if mask is None else mask.apply,
        tuple(map(_layout, operands(mask))),
        None if score is None else score.apply,
        tuple(map(_layout, operands(score))),
        part.weights.phi if isinstance(part.weights, Pointwise) else None,
        None if part.dropout is None else functools.partial(_keep, part.dropout.rate, packed),
        per_batch=state.shape[0] > 1,
        per_head=state.shape[1] > 1,
        page_blocks=0 if part.pages is None else part.k.shape[1] // bm.block_k,
    )  # fmt: skip
    return problem, state


def mask_operands(part: Part, problem: Any) -> tuple[Any, ...]:
    """The mask's arrays, laid out."""
    from pallas_kernels.tpu.problem import laid_out

    by_tile = (_by_tiles(op, problem) for op in operands(part.mask))
    return tuple(laid_out(problem, a, layout) for a, layout in zip(by_tile, problem.mask_layouts, strict=True))


def call_of(part: Part) -> Any:
    """``int32 [6]``: the seed of dropout, and the batch row, head, query and key at which the part begins."""
    seed = jnp.zeros(2, jnp.uint32) if part.dropout is None else part.dropout.seed
    return jnp.concatenate([lax.bitcast_convert_type(seed, jnp.int32), jnp.asarray(part.geometry.origin)])


def pages_of(part: Part) -> Any:
    """``int32 [B · M]``, or None: the pages of all batch rows; slots of a page that a row has not are hidden by the mask."""
    return None if part.pages is None else jnp.maximum(part.pages, 0).ravel()


def _layout(op: Operand) -> Any:
    from pallas_kernels.tpu.problem import layout_by_tile, layout_of

    return layout_by_tile(op.x) if op.kind == "blocks" else layout_of(op.x, op.kind == "distance")


def _by_tiles(op: Operand, p: Any) -> Any:
    """An operand as the kernels take it: one given by blocks has an entry per tile."""
    if op.block is None:
        return op.x
    x = op.x
    for axis, length, block, tile in zip((2, 3), p.padded, op.block, (p.block_q, p.block_k), strict=True):
        x = jnp.take(x, np.arange(length // tile) * tile // block, axis=axis, mode="clip")
    return x


def _keep(rate: float, packed: Geometry | None, seed0: Any, seed1: Any, b: Any, h: Any, t: Any, s: Any) -> Any:
    seed: Any = (seed0.astype(jnp.uint32), seed1.astype(jnp.uint32))

    def factor(b: Any, h: Any, t: Any, s: Any) -> Any:
        return keep_scale(Dropout(rate, seed), Cells(b, h, t, s, t, s))

    return factor(b, h, t, s) if packed is None else packed_bound(Bound((), factor), packed).apply(b, h, t, s)
