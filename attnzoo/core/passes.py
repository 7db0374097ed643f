"""Weight maps with a threshold per row, where rows are not held: the threshold is found by passes over the tiles.

Each pass is a call of attention with a pointwise map, so it skips empty tiles, fuses, and goes around a ring as any does. The
sum of a row's weights grows with the threshold u, and its logarithm is close to linear in u: few passes find where it is 0.
A backend whose kernel can hold the logits of some rows on the chip searches there, and one pass in all finds u.

The derivative is that of the equation f(u) = 1, not of the search: with f the sum of the weights, which depends on x too,

    du/dx = -f_x / f_u.

f_x and f_u are two more passes, which run only where a derivative is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from attnzoo.core.backends.part import no_gradient
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
Thresholds = Callable[..., tuple[Array, Array] | None]


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


def run(r: Request, attend: Attend, thresholds: Thresholds | None = None) -> Result:
    """Attention with the thresholded weights of ``r`` by several calls of ``attend``, whose weights are not.

    thresholds: what a backend has to find ``r, u [B, N, T, 1]`` with, given the request and how to search; it returns None
        where it cannot.
    """
    weights = r.weights
    assert isinstance(weights, Thresholded)
    ones = dataclasses.replace(r, v=jnp.ones_like(r.v), dropout=None, return_lse=False)

    def total(pointwise: Pointwise) -> Float[Array, "B N T 1"]:
        return jnp.swapaxes(attend(dataclasses.replace(ones, weights=pointwise)).out[..., :1], 1, 2).astype(jnp.float32)

    found = None if thresholds is None else thresholds(r, search)
    reference, u = lax.stop_gradient(_by_passes(r, ones, attend, total) if found is None else found)
    u = _implicit(lambda u: total(weights.at(reference, u)), lambda u: total(weights.slope(reference, u)), u)
    return attend(dataclasses.replace(r, weights=weights.at(reference, u)))


def _by_passes(r: Request, ones: Request, attend: Attend, total: Callable[[Pointwise], Array]) -> tuple[Array, Array]:
    """Reference and threshold of every row; ones: the same call with values of 1."""
    weights = r.weights
    assert isinstance(weights, Thresholded)
    # The log-sum-exp of logits that are stretched is close to their maximum.
    stretched = _Stretch() if r.score is None else r.score >> _Stretch()
    lse = attend(dataclasses.replace(ones, score=stretched, weights=softmax, return_lse=True)).lse
    assert lse is not None
    lse, slack = lax.stop_gradient(lse)[..., None], math.log(r.geometry.keys) / STRETCH
    seen = ~jnp.isneginf(lse)
    reference = jnp.where(seen, weights.reference(lse / STRETCH, slack, r.geometry), 0)
    low, high = (lax.stop_gradient(jnp.broadcast_to(x, lse.shape)) for x in weights.bracket(slack, r.geometry))
    near = max(TOLERANCE, float(jnp.finfo(r.v.dtype).eps))  # sums come in the type of v
    return reference, search(lambda u: jnp.where(seen, total(weights.at(reference, u)), 1), low, high, near)


def _implicit(
    f: Callable[[Array], Array], slope: Callable[[Array], Array], u: Float[Array, "B N T 1"]
) -> Float[Array, "B N T 1"]:
    """u, where f(u) = 1, with the derivative of that equation in whatever f captures; slope: the derivative of f by u.

    Neither runs before a cotangent comes; until then they are traced only, to know what they capture.
    """
    (f_of, captured), (slope_of, others) = _opened(f, u), _opened(slope, u)

    @jax.custom_vjp
    def root(u: Array, captured: list[Any], others: list[Any]) -> Array:
        return u

    def forward(*given: Any) -> tuple[Array, Any]:
        return given[0], given

    def backward(given: Any, d: Array) -> Any:
        u, captured, others = given
        steep = slope_of(u, others)  # 0 in rows that see nothing
        (d_captured,) = jax.vjp(lambda xs: f_of(u, xs), captured)[1](-d / jnp.where(steep > 0, steep, 1))
        return jnp.zeros_like(u), d_captured, [no_gradient(x) for x in others]

    root.defvjp(forward, backward)
    return root(u, captured, others)


def _opened(f: Callable[[Array], Array], u: Array) -> tuple[Callable[[Array, list[Any]], Array], list[Any]]:
    """``f`` as a function of u and of what it captures, and what that is."""
    closed = jax.make_jaxpr(f)(u)
    return lambda u, captured: jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, captured))(u)[0], list(closed.consts)


def search(f: Callable[[Array], Array], low: Array, high: Array, near: float = TOLERANCE) -> Array:
    """u in [low, high] with f(u) = 1 to within ``near``, for an f that grows; every entry by itself. Has no derivative.

    Regula falsi in log f, Anderson and Bjorck's (1973): where the same end moves twice, the other's value is scaled down, so
    that both ends close in. Runs inside a kernel too, whose loops carry no bools.
    """

    def step(state: Any) -> Any:
        count, u, low, high, at_low, at_high, before, _ = state
        y = jnp.clip(jnp.log(lax.stop_gradient(f(u))), -_FAR, _FAR)
        up = y < 0  # the low end moves
        old, kept = jnp.where(up, at_low, at_high), jnp.where(up, at_high, at_low)
        shrink = 1 - y / jnp.where(old == 0, 1, old)
        again = jnp.where(up, before, -before) < 0  # the same end as before
        kept = jnp.where(again, kept * jnp.where(shrink > 0, shrink, 0.5), kept)
        low, high = jnp.where(up, u, low), jnp.where(up, high, u)
        at_low, at_high = jnp.where(up, y, kept), jnp.where(up, kept, y)
        tried = (at_low > -jnp.inf) & (at_high < jnp.inf)
        line = (low * at_high - high * at_low) / jnp.where(tried, at_high - at_low, 1)
        # The slope is near 1, from `high` a step by it most often crosses; else the other end is tried.
        first = jnp.where(count == 0, jnp.clip(u - y, low, high), jnp.where(up, high, low))
        following = jnp.where(tried, line, first)
        inside = ~tried | (following > low) & (following < high)
        following = jnp.where(inside, following, (low + high) / 2)
        off = jnp.where(y == y, jnp.abs(y), 0.0)  # what is no number ends the search
        better = jnp.where(tried, line, u)  # than u, and no more is asked
        return count + 1, jnp.where(off > near, following, better), low, high, at_low, at_high, y, off.max()

    unknown = jnp.full_like(low, jnp.inf)
    start = (0, high, low, high, -unknown, unknown, jnp.zeros_like(low), jnp.inf)
    return lax.while_loop(lambda s: (s[0] < PASSES) & (s[-1] > near), step, start)[1]
