"""Few queries against many keys, divided: runs of the keys as batch rows of their own, merged by their log-sum-exp.

A chip with many cores would leave most of them idle over the few rows and heads of a decoding step. Run i of batch row b is
batch row ``b · n + i``; its keys lie where they lay, so nothing is copied.
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
    """The part with ``n`` runs of its keys as batch rows. Its mask and score are of the form that kernels take (hoisted)."""
    g, bm = part.geometry, part.block_map
    length = g.keys // n

    def placed(bound: Bound | None, leading: int) -> Bound | None:
        if bound is None:
            return None

        def apply(*arguments: Any) -> Any:
            x, (b, h, t, s, *parts) = arguments[:leading], arguments[leading:]
            begin = lax.rem(b, jnp.int32(n)) * length
            return bound.apply(*x, lax.div(b, jnp.int32(n)), h, t, s + begin, *parts)

        return Bound(tuple(Operand(_by_run(op.x, g.batch, n), "aligned") for op in bound.operands), apply)

    origin = None if g.origin is None else jnp.asarray(g.origin) * jnp.asarray([n, 1, 1, 1], jnp.int32)
    geometry = dataclasses.replace(g, batch=g.batch * n, keys=length, origin=origin)
    xp = np if isinstance(bm.state, np.ndarray) else jnp
    state = xp.broadcast_to(bm.state, (g.batch, *bm.state.shape[1:]))
    state = xp.moveaxis(state.reshape(*state.shape[:3], n, -1), 3, 1).reshape(g.batch * n, *state.shape[1:3], -1)
    k, v, pages = part.k, part.v, part.pages
    if pages is None:
        k, v = (x.reshape(g.batch * n, length, *x.shape[2:]) for x in (k, v))
    else:
        pages = pages.reshape(g.batch * n, -1)
    return part._replace(
        q=jnp.repeat(part.q, n, axis=0),
        k=k,
        v=v,
        pages=pages,
        geometry=geometry,
        mask=placed(part.mask, 0),
        score=placed(part.score, 1),
        block_map=dataclasses.replace(bm, state=state, keys=length),
    )


def _by_run(x: Any, batch: int, n: int) -> Any:
    """``[B|1, N|1, T|1, S|1]`` as ``[B·n|1, N|1, T|1, S/n|1]``."""
    rows, heads, queries, keys = x.shape
    if keys == 1:
        return x if rows == 1 else jnp.repeat(x, n, axis=0)
    x = jnp.broadcast_to(x, (batch, heads, queries, keys)).reshape(batch, heads, queries, n, keys // n)
    return jnp.moveaxis(x, 3, 1).reshape(batch * n, heads, queries, keys // n)


def joined(part: Part, n: int, out: Any, lse: Any) -> tuple[Any, Any]:
    """The results ``[B·n, N, T, Hv]``, ``[B·n, N, T]`` of a split part as those of the part."""
    out, lse = (jnp.moveaxis(x.reshape(part.geometry.batch, n, *x.shape[1:]), 1, 0) for x in (out, lse))
    if isinstance(part.weights, Pointwise):
        return out.astype(jnp.float32).sum(0).astype(out.dtype), lse[0]
    return merge_all(out, lse)
