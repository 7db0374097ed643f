"""Attention by tiles in plain JAX: memory O(T·block), tiles that the mask empties are never touched.

Each row of tiles runs two loops, over its full tiles (no mask arithmetic) and its partial ones, with an online softmax.
The backward pass walks the same tiles once, recomputing the weights from the log-sum-exp, and adds to dk and dv in place.
Keys and values are held with their width before their length for the products that read or write them that way, which is
how XLA's CPU matrix product is fastest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from attnzoo.core import sharding
from attnzoo.core.backends.part import Part, PartGradients, no_gradient
from attnzoo.core.backends.result import Result
from attnzoo.core.backends.tiles import RowLists, Walk, row_lists
from attnzoo.core.blocks import BlockMap, block_map
from attnzoo.core.cells import (
    Geometry,
    Operand,
    Tile,
    cells_of,
    cut,
    operand_window,
    pad_operand,
    spread,
    unpad_operand,
    visible_slots,
)
from attnzoo.core.dropout import Dropout, keep_scale
from attnzoo.core.request import Request
from attnzoo.core.weights import HIDDEN, Normalised, Pointwise

BLOCK = 512

#: Logits that a CPU's last cache holds: where a tile of all batch rows has more, each row has tiles of its own.
CACHED = 2**21


def refusal(r: Request, rectangle: tuple[int, int] | None = None) -> str | None:
    """Why this backend cannot run the request (None: it can), or a rectangle of so many queries and keys at a time."""
    if r.return_weights:
        return "it never holds the weights that return_weights asks for"
    if not isinstance(r.weights, Normalised | Pointwise):
        return f"{r.weights} needs whole rows of logits at once"
    if r.return_lse and not isinstance(r.weights, Normalised):
        return f"{r.weights} has no log-sum-exp to return"
    return None


def block_sizes(r: Request, queries: int, keys: int) -> tuple[int, int]:
    """Of the tiles in which a rectangle of the logits is computed."""
    block_q, block_k = r.block_sizes or (BLOCK, BLOCK)
    return min(block_q, queries), min(block_k, keys)


def map_of(r: Request) -> BlockMap:
    """The block map this backend walks."""
    return block_map(r.mask, r.geometry, *block_sizes(r, r.geometry.queries, r.geometry.keys))


def whole(r: Request, bm: BlockMap) -> Part:
    """The request as one part. Other parts of it have some of its queries, keys and operands.

    Keys are scaled, not queries: they are copied into another order in any case, and a copy of the queries is saved.
    """
    dtype = r.product_dtype
    k = (r.k.astype(jnp.float32) * r.scale).astype(dtype)
    return Part(r.q.astype(dtype), k, r.v.astype(dtype), r.geometry, r.bound_mask(), r.bound_score(), r.weights, r.dropout, bm)


def run(r: Request) -> Result:
    out, lse = attend_part(whole(r, map_of(r)))
    final: Array | None = None
    if not isinstance(r.weights, Pointwise):
        out, final = r.weights.finish(out, lse)
    return Result(jnp.moveaxis(out, 1, 2), final)


def attend_part(part: Part) -> tuple[Array, Array]:
    """``out [B, N, T, Hv]`` and ``lse [B, N, T]`` (zeros for pointwise maps), float32, without ``Weights.finish``."""
    problem, score_xs, rest = _problem(part)
    out, lse = _attend(problem, part.q, part.k, part.v, score_xs, rest)
    return jnp.moveaxis(out, 1, 2), lse


def part_gradients(part: Part, lse: Array, d_out: Array, delta: Array) -> PartGradients:
    """Of the part's arrays, where ``lse`` is of *all* keys of its queries, ``d_out`` the cotangent of their results, and
    ``delta = Σ d_out·out - d_lse``."""
    problem, padded, rest = _problem(part)
    arrays = part.q, part.k, part.v, padded, rest
    dq, dk, dv, d_padded, _ = _gradients(problem, arrays, lse, jnp.moveaxis(d_out, 2, 1), delta)
    operands = part.score.operands if part.score else ()
    d_score = [
        None if d.dtype == jax.dtypes.float0 else unpad_operand(op, d, *problem.walk.padding)
        for op, d in zip(operands, d_padded, strict=True)
    ]
    return PartGradients(dq, dk, dv, d_score)


def _problem(part: Part) -> tuple[Problem, list[Array], Rest]:
    bm, g, mask, score = part.block_map, part.geometry, part.mask, part.score
    sizes = dataclasses.replace(g, q_positions=None, kv_positions=None, origin=None)
    per_batch, per_head = bm.state.shape[0] > 1, bm.state.shape[1] > 1
    logits = g.batch * (1 if per_head else g.heads) * bm.block_q * bm.block_k
    walk = Walk(sizes, bm.block_q, bm.block_k, per_batch or (logits > CACHED and _row_after_row()), per_head)
    pad = functools.partial(pad_operand, rows=walk.padding[0], cols=walk.padding[1])
    score_ops = [pad(op) for op in score.operands] if score else []
    mask_ops = [pad(op) for op in mask.operands] if mask else []
    problem = Problem(
        walk,
        score.apply if score else None,
        tuple((op.kind, op.block) for op in score_ops),
        mask.apply if mask else None,
        tuple((op.kind, op.block) for op in mask_ops),
        part.weights if isinstance(part.weights, Pointwise) else None,
        None if part.dropout is None else part.dropout.rate,
    )
    seed = None if part.dropout is None else part.dropout.seed
    rest = Rest(row_lists(bm, walk), [op.x for op in mask_ops], g.q_positions, g.kv_positions, seed, g.origin)
    return problem, [op.x for op in score_ops], rest


def _row_after_row() -> bool:
    """Whether batch rows may go one after another: where no mesh divides them, and the device is no parallel one."""
    return jax.default_backend() == "cpu" and sharding.current_mesh() is None


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What is static about a request: sizes and functions, no arrays."""

    walk: Walk
    score: Callable[..., Array] | None
    score_kinds: tuple[Any, ...]
    mask: Callable[..., Array] | None
    mask_kinds: tuple[Any, ...]
    phi: Pointwise | None
    drop_rate: float | None

    def geometry(self, rest: Rest) -> Geometry:
        return dataclasses.replace(
            self.walk.g, q_positions=rest.q_positions, kv_positions=rest.kv_positions, origin=rest.origin
        )

    def parts(self, kinds: tuple[Any, ...], xs: list[Array], tile: Tile) -> list[Array]:
        keys = self.walk.blocks_k * self.walk.block_k
        return [cut(Operand(x, *kind), tile, keys) for x, kind in zip(xs, kinds, strict=True)]

    def scored(self, s: Array, cells: Any, tile: Tile, parts: list[Array]) -> Array:
        assert self.score is not None
        ops = (spread(Operand(x, *kind), x, tile) for x, kind in zip(parts, self.score_kinds, strict=True))
        return jnp.broadcast_to(self.score(s, cells, *ops), s.shape).astype(s.dtype)

    def visible(self, cells: Any, tile: Tile, rest: Rest) -> Array:
        """Cells of a partial tile that may be seen, ``[1|Bt, 1|Nt, block_q, block_k]``."""
        ok = jnp.asarray(True)
        if self.mask is not None:
            parts = self.parts(self.mask_kinds, rest.mask_xs, tile)
            ops = (spread(Operand(x, *kind), x, tile) for x, kind in zip(parts, self.mask_kinds, strict=True))
            ok = jnp.asarray(self.mask(cells, *ops), bool)
        if self.walk.padding[1]:
            ok = ok & (cells.s < self.walk.g.keys + (0 if rest.origin is None else rest.origin[3]))
        slots = visible_slots(self.geometry(rest), cells)
        return ok if slots is None else ok & slots


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lists", "mask_xs", "q_positions", "kv_positions", "seed", "origin"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Rest:
    """The arrays no gradient reaches."""

    lists: tuple[RowLists, RowLists]
    mask_xs: list[Array]
    q_positions: Any
    kv_positions: Any
    seed: Any
    origin: Any


def _zeros(shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)  # also where x64 is on


def _padded(x: Array, rows: int) -> Array:
    """``[B, T, N, H]`` with further tokens of zeros."""
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, 0))) if rows else x


def _by_blocks(x: Array, block: int, blocks: int) -> Array:
    """``[B, T, N, H] -> [B, N, blocks, block, H]``, padded with zeros."""
    b, t, n, h = x.shape
    x = _padded(x, blocks * block - t)
    return jnp.moveaxis(x.reshape(b, blocks, block, n, h), 3, 1)


def _loop(lists: RowLists, row: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Run ``body(j, carry)`` over the listed key blocks of a row; nothing is compiled for lists known to be empty."""
    if isinstance(lists.length, np.ndarray) and not lists.length.any():
        return carry
    cols, length = jnp.asarray(lists.cols), jnp.asarray(lists.length)
    return lax.fori_loop(0, length[row], lambda n, c: body(cols[row, n], c), carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(p: Problem, q: Array, k: Array, v: Array, score_xs: list[Array], rest: Rest) -> tuple[Array, Array]:
    """``out [B, T, N, Hv]`` and ``lse [B, N, T]`` (zeros for pointwise maps), float32. ``k`` comes scaled."""
    w = p.walk
    (bt, nt, block_q, block_k), kt = w.size, w.kv_heads
    qs = _padded(q, w.padding[0])
    ks = jnp.swapaxes(_by_blocks(k, block_k, w.blocks_k), -1, -2)
    vs = _by_blocks(v, block_k, w.blocks_k)
    g, width = p.geometry(rest), v.shape[-1]

    def row_of_tiles(out: Array, row: Array) -> tuple[Array, Array]:
        qi = w.of_queries(qs, row).reshape(bt, kt, -1, q.shape[-1])

        def step(masked: bool, j: Array, carry: Any) -> Any:
            top, total, acc = carry
            tile = w.tile(row, j)
            cells = cells_of(g, tile)
            s = _logits(p, qi, w.of_keys(ks, row, j))
            if p.score is not None:
                s = p.scored(s, cells, tile, p.parts(p.score_kinds, score_xs, tile))
            ok = p.visible(cells, tile, rest) if masked else None
            if p.phi is None:
                s = s if ok is None else jnp.where(ok, s, -jnp.inf)
                new = jnp.maximum(top, s.max(-1))
                weight, scale = jnp.exp(s - new[..., None]), jnp.exp(top - new)
                top, total = new, total * scale + weight.sum(-1)
                acc = acc * scale[..., None]
            else:
                weight = _pointwise(p.phi, s, ok)
            if p.drop_rate is not None:
                weight = weight * keep_scale(Dropout(p.drop_rate, rest.seed), cells)
            flat = weight.reshape(bt, kt, -1, block_k).astype(v.dtype)
            add = jnp.einsum("bkxs,bksv->bkxv", flat, w.of_keys(vs, row, j), preferred_element_type=jnp.float32)
            return top, total, acc + add.reshape(acc.shape)

        rows = (bt, nt, block_q)
        carry = (jnp.full(rows, HIDDEN, jnp.float32), _zeros(rows), _zeros((*rows, width)))
        for lists, masked in zip(rest.lists, (False, True), strict=True):
            carry = _loop(lists, row, functools.partial(step, masked), carry)
        top, total, acc = carry
        if p.phi is not None:
            return w.set_queries(out, row, acc), total
        safe = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(safe), jnp.where(jnp.isnan(total), jnp.nan, -jnp.inf))
        return w.set_queries(out, row, acc / jnp.where(jnp.isnan(total), total, safe)[..., None]), lse

    start = _zeros((*qs.shape[:3], width))
    out, lse = lax.scan(row_of_tiles, start, jnp.arange(np.prod(w.jobs), dtype=jnp.int32))
    return out[:, : q.shape[1]], w.gather_rows(lse)


def _logits(p: Problem, qi: Array, kj: Array) -> Array:
    s = jnp.einsum("bkxh,bkhs->bkxs", qi, kj, preferred_element_type=jnp.float32)
    return s.reshape(p.walk.size)


def _pointwise(phi: Pointwise | None, s: Array, ok: Array | None) -> Array:
    assert phi is not None
    ok = ~(s <= HIDDEN) if ok is None else ok & ~(s <= HIDDEN)
    return jnp.where(ok, phi.phi(jnp.where(ok, s, 0)), 0)


def _forward(p: Problem, q: Array, k: Array, v: Array, score_xs: list[Array], rest: Rest) -> Any:
    out, lse = _attend(p, q, k, v, score_xs, rest)
    return (out, lse), (q, k, v, score_xs, rest, out, lse)


def _backward(p: Problem, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    *arrays, out, lse = saved
    d_out, d_lse = _once_differentiable(cotangents)
    return _gradients(p, tuple(arrays), lse, d_out, jnp.swapaxes((d_out * out).sum(-1), 1, 2) - d_lse)


def _gradients(p: Problem, arrays: Any, lse: Array, d_out: Array, delta: Array) -> Any:
    """Of the arguments of ``_attend``; ``delta [B, N, T]``."""
    q, k, v, score_xs, rest = arrays
    w = p.walk
    (bt, nt, block_q, block_k), kt, g = w.size, w.kv_heads, p.geometry(rest)
    ks, vs = (_by_blocks(x, block_k, w.blocks_k) for x in (k, v))
    k_wide, v_wide = jnp.swapaxes(ks, -1, -2), jnp.swapaxes(vs, -1, -2)

    def rows_by_blocks(x: Array, fill: float = 0.0) -> Array:  # [B, N, T] -> [B, N, blocks, block]
        x = jnp.pad(x, ((0, 0), (0, 0), (0, w.padding[0])), constant_values=fill)
        return x.reshape(*x.shape[:2], w.blocks_q, block_q)

    # ds = weights · (dw - delta), with delta = Σ weights·dw - d_lse. Rows that saw nothing get weights 0.
    delta = rows_by_blocks(delta)
    norm = rows_by_blocks(jnp.where(jnp.isneginf(lse), jnp.inf, lse), fill=jnp.inf)
    qs, d_outs = (_padded(x.astype(v.dtype), w.padding[0]) for x in (q, d_out))
    differentiable = [jnp.issubdtype(x.dtype, jnp.floating) for x in score_xs]

    def row_of_tiles(carry: Any, row: Array) -> tuple[Any, None]:
        *carry, dq_all = carry
        qi = w.of_queries(qs, row).reshape(bt, kt, -1, q.shape[-1])
        d_oi = w.of_queries(d_outs, row).reshape(bt, kt, -1, v.shape[-1])
        norm_i, delta_i = w.of_rows(norm, row), w.of_rows(delta, row)

        def step(masked: bool, j: Array, carry: Any) -> Any:
            dk, dv, dxs, dq = carry
            tile = w.tile(row, j)
            cells = cells_of(g, tile)
            s = _logits(p, qi, w.of_keys(k_wide, row, j))
            if p.score is not None:
                parts = p.parts(p.score_kinds, score_xs, tile)
                moving = [x for x, d in zip(parts, differentiable, strict=True) if d]

                def scored(s: Array, moving: list[Array]) -> Array:
                    given = iter(moving)
                    all_parts = [next(given) if d else x for x, d in zip(parts, differentiable, strict=True)]
                    return p.scored(s, cells, tile, all_parts)

                s, pull = jax.vjp(scored, s, moving)
            ok = p.visible(cells, tile, rest) if masked else None
            dw = jnp.einsum("bkxv,bkvs->bkxs", d_oi, w.of_keys(v_wide, row, j), preferred_element_type=jnp.float32)
            dw = dw.reshape(s.shape)
            keep = None if p.drop_rate is None else keep_scale(Dropout(p.drop_rate, rest.seed), cells)
            dw = dw if keep is None else dw * keep
            if p.phi is None:
                weight = jnp.exp((s if ok is None else jnp.where(ok, s, -jnp.inf)) - norm_i[..., None])
                ds = weight * (dw - delta_i[..., None])
            else:
                weight, pull_phi = jax.vjp(lambda s: _pointwise(p.phi, s, ok), s)
                (ds,) = pull_phi(dw)
            weight = weight if keep is None else weight * keep
            flat = weight.reshape(bt, kt, -1, block_k).astype(v.dtype)
            dv_j = jnp.einsum("bkxs,bkxv->bkvs", flat, d_oi, preferred_element_type=jnp.float32)
            if p.score is not None:
                ds, d_moving = pull(ds)
                ds = ds if ok is None else jnp.where(ok, ds, 0)
                dxs = [
                    _add_part(p, kind, x, d, tile)
                    for kind, x, d in zip(_moving_kinds(p, differentiable), dxs, d_moving, strict=True)
                ]
            flat = ds.reshape(bt, kt, -1, block_k).astype(q.dtype)
            dk_j = jnp.einsum("bkxs,bkxh->bkhs", flat, qi, preferred_element_type=jnp.float32)
            dq = dq + jnp.einsum("bkxs,bksh->bkxh", flat, w.of_keys(ks, row, j), preferred_element_type=jnp.float32)
            return w.add_of_keys(dk, row, j, dk_j), w.add_of_keys(dv, row, j, dv_j), dxs, dq

        carry = (*carry, _zeros(qi.shape))
        for lists, masked in zip(rest.lists, (False, True), strict=True):
            carry = _loop(lists, row, functools.partial(step, masked), carry)
        *carry, dq = carry
        return (*carry, w.set_queries(dq_all, row, dq.reshape(bt, nt, block_q, q.shape[-1]))), None

    start = (
        _zeros(k_wide.shape),
        _zeros(v_wide.shape),
        [jnp.zeros(x.shape, x.dtype) for x, d in zip(score_xs, differentiable, strict=True) if d],
        _zeros(qs.shape),
    )
    (dk, dv, moved, dq), _ = lax.scan(row_of_tiles, start, jnp.arange(np.prod(w.jobs), dtype=jnp.int32))
    given = iter(moved)
    d_score = [next(given) if d else no_gradient(x) for x, d in zip(score_xs, differentiable, strict=True)]
    return dq[:, : q.shape[1]].astype(q.dtype), _tokens(dk, k), _tokens(dv, v), d_score, jax.tree.map(no_gradient, rest)


def _moving_kinds(p: Problem, differentiable: list[bool]) -> list[Any]:
    return [kind for kind, d in zip(p.score_kinds, differentiable, strict=True) if d]


def _add_part(p: Problem, kind: Any, x: Array, part: Array, tile: Tile) -> Array:
    """Add the gradient of a cut part where it was cut from."""
    start, size = operand_window(Operand(x, *kind), tile, p.walk.blocks_k * p.walk.block_k)
    if size == x.shape:
        return x + part
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, size) + part, start)


def _tokens(wide: Array, like: Array) -> Array:
    """``[B, K, blocks, H, block] -> [B, S, K, H]`` without the padding, in the type of ``like``."""
    b, k, blocks, h, block = wide.shape
    x = jnp.moveaxis(wide, (2, 4, 1), (1, 2, 3)).reshape(b, blocks * block, k, h)
    return x[:, : like.shape[1]].astype(like.dtype)


@jax.custom_jvp
def _once_differentiable(x: Any) -> Any:
    return x


@_once_differentiable.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "backend 'blockwise' has first derivatives in reverse mode only; for second derivatives give backend='dense'"
    )


_attend.defvjp(_forward, _backward)
