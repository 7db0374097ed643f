"""Weight maps with a threshold per row, where rows are not held: the threshold is found by passes over the tiles.

Each pass is a call of attention with a pointwise map, so it skips empty tiles, fuses, and goes around a ring as any does. The
sum of a row's weights grows with the threshold u, and its logarithm is close to linear in u: few passes find where it is 0.

The derivative is that of the equation, not of the search: with f the sum of the weights,

    u' = u - (f(u) - 1) / f_u,    u and f_u held fixed,

has the value of u and the derivative -f_x / f_u in everything else that f depends on, which is the implicit one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from attnzoo.core.backends.result import Result
from attnzoo.core.cells import Bound, Geometry
from attnzoo.core.masks.base import mask as pytree
from attnzoo.core.request import Request
from attnzoo.core.scores import Score
from attnzoo.core.weights import Pointwise, Thresholded, softmax

#: Passes of a search at most; it ends when every row's weights sum to 1 to within TOLERANCE, or as near as the type tells.
PASSES = 32
TOLERANCE = 2e-6
#: Beyond this, the logarithm of a sum says no more than that the trial was far off.
_FAR = 8.0

#: The maximum of n logits is found to within log(n) over this.
STRETCH = 1024.0

Attend = Callable[[Request], Result]


@pytree()
class _Stretch(Score):
    def bind(self, g: Geometry) -> Bound:
        return Bound((), lambda s, c: s * STRETCH)


def last_pass(r: Request) -> Request:
    """The request with a pointwise map in place of a thresholded one: what a backend must be able to run."""
    if not isinstance(r.weights, Thresholded):
        return r
    some = jnp.zeros((1, 1, r.geometry.queries, 1), jnp.float32)
    return dataclasses.replace(r, weights=r.weights.at(some, some))


def run(r: Request, attend: Attend) -> Result:
    """Attention with the thresholded weights of ``r`` by several calls of ``attend``, whose weights are not."""
    weights = r.weights
    assert isinstance(weights, Thresholded)
    ones = dataclasses.replace(r, v=jnp.ones_like(r.v), dropout=None, return_lse=False)

    def total(pointwise: Pointwise) -> Float[Array, "B N T 1"]:
        return jnp.swapaxes(attend(dataclasses.replace(ones, weights=pointwise)).out[..., :1], 1, 2).astype(jnp.float32)

    # The log-sum-exp of logits that are stretched is close to their maximum.
    stretched = _Stretch() if r.score is None else r.score >> _Stretch()
    lse = attend(dataclasses.replace(ones, score=stretched, weights=softmax, return_lse=True)).lse
    assert lse is not None
    lse, slack = lax.stop_gradient(lse)[..., None], math.log(r.geometry.keys) / STRETCH
    seen = ~jnp.isneginf(lse)
    reference = jnp.where(seen, weights.reference(lse / STRETCH, slack, r.geometry), 0)
    low, high = (jnp.broadcast_to(x, lse.shape) for x in weights.bracket(slack, r.geometry))
    near = max(TOLERANCE, float(jnp.finfo(r.v.dtype).eps))  # sums come in the type of v
    low, high = lax.stop_gradient(low), lax.stop_gradient(high)
    u = search(lambda u: jnp.where(seen, total(weights.at(reference, u)), 1), low, high, near)
    excess = total(weights.at(reference, u)) - 1
    slope = lax.stop_gradient(total(weights.slope(reference, u)))
    u = u - jnp.where(seen, excess / jnp.where(slope > 0, slope, 1), 0)
    return attend(dataclasses.replace(r, weights=weights.at(reference, u)))


def search(f: Callable[[Array], Array], low: Array, high: Array, near: float = TOLERANCE) -> Array:
    """u in [low, high] with f(u) = 1 to within ``near``, for an f that grows; every entry by itself. Has no derivative.

    Regula falsi in log f, Anderson and Bjorck's (1973): where the same end moves twice, the other's value is scaled down, so
    that both ends close in.
    """

    def step(state: Any) -> Any:
        count, u, low, high, at_low, at_high, last, _ = state
        y = jnp.clip(jnp.log(lax.stop_gradient(f(u))), -_FAR, _FAR)
        up = y < 0  # the low end moves
        old, kept = jnp.where(up, at_low, at_high), jnp.where(up, at_high, at_low)
        shrink = 1 - y / jnp.where(old == 0, 1, old)
        kept = jnp.where(up == last, kept * jnp.where(shrink > 0, shrink, 0.5), kept)
        low, high = jnp.where(up, u, low), jnp.where(up, high, u)
        at_low, at_high = jnp.where(up, y, kept), jnp.where(up, kept, y)
        tried = jnp.isfinite(at_low) & jnp.isfinite(at_high)
        line = (low * at_high - high * at_low) / jnp.where(tried, at_high - at_low, 1)
        # The slope is near 1, from `high` a step by it most often crosses; else the other end is tried.
        first = jnp.where(count == 0, jnp.clip(u - y, low, high), jnp.where(up, high, low))
        following = jnp.where(tried, line, first)
        inside = ~tried | (following > low) & (following < high)
        following = jnp.where(inside, following, (low + high) / 2)
        off = jnp.nan_to_num(jnp.abs(y))
        return count + 1, jnp.where(off > near, following, u), low, high, at_low, at_high, up, off.max()

    unknown = jnp.full(low.shape, jnp.inf)
    ends = (low, high, -unknown, unknown, jnp.zeros(low.shape, bool))
    start = (0, high, *ends, jnp.inf)
    return lax.while_loop(lambda s: (s[0] < PASSES) & (s[-1] > near), step, start)[1]
