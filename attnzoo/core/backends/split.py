"""Few queries against many keys, divided: runs of the keys as heads of their own, merged by their log-sum-exp.

A chip with many cores would leave most of them idle over the few rows and heads of a decoding step. Run i of key head kh
is head ``kh · n + i``; in the order of caches, ``[B, K, S, ·]``, its keys lie where they lay, and nothing is copied.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from attnzoo.core.backends.part import Part
from attnzoo.core.cells import Bound, Operand
from attnzoo.core.merge import merge_all
from attnzoo.core.weights import Pointwise


def runs(keys: int, block_k: int, most: int) -> int:
    """Into how many runs of whole blocks, all equally long, the keys divide: at most ``most``, and 1 where they do not.

    >>> runs(4096, 128, 10), runs(4096, 128, 0), runs(1000, 128, 10)
    (8, 1, 1)
    """
    blocks, rest = divmod(keys, block_k)
    return next((n for n in range(most, 1, -1) if rest == 0 and blocks % n == 0), 1)


def split(part: Part, n: int) -> Part:
    """The part with ``n`` runs of its keys as heads. Its mask and score are of the form that kernels take (hoisted), and it has
    as many heads as key heads."""
    g, bm = part.geometry, part.block_map
    length, heads = g.keys // n, g.heads * n

    def placed(bound: Bound | None, leading: int) -> Bound | None:
        if bound is None:
            return None

        def apply(*arguments: Any) -> Any:
            x, (b, h, t, s, *parts) = arguments[:leading], arguments[leading:]
            begin = lax.rem(h, jnp.int32(n)) * length
            return bound.apply(*x, b, lax.div(h, jnp.int32(n)), t, s + begin, *parts)

        return Bound(tuple(Operand(_by_run(op.x, g.heads, n), "aligned") for op in bound.operands), apply)

    def keys_by_run(x: Any) -> Any:
        by_head = jnp.swapaxes(x, 1, 2)
        return jnp.swapaxes(by_head.reshape(g.batch, heads, length, x.shape[3]), 1, 2)

    origin = None if g.origin is None else jnp.asarray(g.origin) * jnp.asarray([1, n, 1, 1], jnp.int32)
    xp = np if isinstance(bm.state, np.ndarray) else jnp
    state = xp.broadcast_to(bm.state, (bm.state.shape[0], g.heads, *bm.state.shape[2:]))
    state = xp.moveaxis(state.reshape(*state.shape[:3], n, -1), 3, 2).reshape(state.shape[0], heads, state.shape[2], -1)
    return part._replace(
        q=jnp.repeat(part.q, n, axis=2),
        k=keys_by_run(part.k),
        v=keys_by_run(part.v),
        geometry=dataclasses.replace(g, heads=heads, kv_heads=heads, keys=length, origin=origin),
        mask=placed(part.mask, 0),
        score=placed(part.score, 1),
        block_map=dataclasses.replace(bm, state=state, keys=length),
    )


def _by_run(x: Any, heads: int, n: int) -> Any:
    """``[B|1, N|1, T|1, S|1]`` as ``[B|1, N·n|1, T|1, S/n|1]``."""
    rows, own, queries, keys = x.shape
    if keys == 1:
        return x if own == 1 else jnp.repeat(x, n, axis=1)
    x = jnp.broadcast_to(x, (rows, heads, queries, keys)).reshape(rows, heads, queries, n, keys // n)
    return jnp.moveaxis(x, 3, 2).reshape(rows, heads * n, queries, keys // n)


def joined(part: Part, n: int, out: Any, lse: Any) -> tuple[Any, Any]:
    """The results ``[B, N·n, T, Hv]``, ``[B, N·n, T]`` of a split part as those of the part."""
    g = part.geometry
    out, lse = (jnp.moveaxis(x.reshape(g.batch, g.heads, n, *x.shape[2:]), 2, 0) for x in (out, lse))
    if isinstance(part.weights, Pointwise):
        return out.astype(jnp.float32).sum(0).astype(out.dtype), lse[0]
    return merge_all(out, lse)
