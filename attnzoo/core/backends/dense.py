"""The definition, computed as written: all T×S logits at once. Runs everything, differentiates to any order."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from attnzoo.core.backends.result import Result
from attnzoo.core.cells import Tile, all_cells, cut, spread
from attnzoo.core.dropout import keep_scale
from attnzoo.core.masks.base import visible
from attnzoo.core.request import Request
from attnzoo.core.weights import HIDDEN, Normalised, softmax_rows


def refusal(r: Request) -> str | None:
    """Why this backend cannot run the request (None: it can)."""
    if r.return_lse and not isinstance(r.weights, Normalised):
        return f"{r.weights} has no log-sum-exp to return"
    return None


def run(r: Request) -> Result:
    g = r.geometry
    cells, tile = all_cells(g), Tile((0, 0, 0, 0), (g.batch, g.heads, g.queries, g.keys))
    group = g.heads // g.kv_heads
    q, k, v = (x.astype(r.product_dtype) for x in (r.q, r.k, r.v))
    q = q.reshape(g.batch, g.queries, g.kv_heads, group, -1)
    s = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * r.scale
    s = s.reshape(g.batch, g.heads, g.queries, g.keys)
    if (score := r.bound_score()) is not None:
        s = jnp.broadcast_to(
            score.apply(s, cells, *(spread(op, cut(op, tile, r.geometry.keys), tile) for op in score.operands)), s.shape
        )
    ok = ~(s <= HIDDEN)  # a NaN stays visible
    if (mask := r.bound_mask()) is not None:
        ok = ok & visible(mask, g, cells, tile)
    elif g.kv_positions is not None:
        ok = ok & (cells.k >= 0)
    lse: Array | None = None
    if isinstance(r.weights, Normalised):
        w, lse = softmax_rows(s, ok)
        w, lse = r.weights.finish(w, lse)
    else:
        w = r.weights.rows(s, ok, g)
    dropped = w if r.dropout is None else w * keep_scale(r.dropout, cells)
    dropped = dropped.reshape(g.batch, g.kv_heads, group * g.queries, g.keys).astype(v.dtype)
    # A plain product of matrices, in this order: einsum swaps the two, and XLA's CPU compiler then transposes all of v.
    out = jnp.matmul(dropped, jnp.swapaxes(v, 1, 2), preferred_element_type=jnp.float32)
    return Result(jnp.swapaxes(out.reshape(g.batch, g.heads, g.queries, -1), 1, 2), lse, w)
