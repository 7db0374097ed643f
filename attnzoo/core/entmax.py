"""Entmax: maps from logits to probabilities that can be exactly zero.

    entmax_a(x) = argmax over p in the simplex of  p·x + H_a(p),    H_a(p) = Σ_j (p_j - p_j^a) / (a (a - 1))

with H_1 the Shannon entropy (Peters et al., 2019, arXiv 1905.05702, eq. 10). a = 1 is softmax, 1.5 entmax-1.5, 2
sparsemax (Martins and Astudillo, 2016, arXiv 1602.02068). The solution has one unknown per row, the threshold tau:

    p_j = [(a - 1) x_j - tau]_+^(1 / (a - 1)),    tau such that Σ_j p_j = 1

Here it is written with b = a - 1, d_j = x_j - max x <= 0, and u = log max_j p_j in place of tau = b max x - e^(b u):

    p_j = [e^(b u) + b d_j]_+^(1/b) = exp(u + log1p(t_j) / b),    t_j = b d_j e^(-b u)

which loses no digits as a -> 1, where it becomes softmax, so that no case needs to be told apart. Σ p grows with u, and u
lies between -log n and 0 for n visible entries: bisection finds it.

Derivatives are closed forms in p (Correia et al., 2019, arXiv 1909.00015, Proposition 1), not those of the iteration. They
are given as a JVP, so that both modes and higher orders work.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from attnzoo.core.cells import Geometry, concrete
from attnzoo.core.masks.base import mask as pytree
from attnzoo.core.weights import Thresholded

#: Beyond this, e^-(a-1) log p leaves float32's range; such entries carry no weight that could be told from zero.
_STEEP = 80.0
#: Nearer to softmax, the form of a pass loses its digits.
_NEAR = 1e-4
#: A weight that no sum to 1 survives.
_LARGE = 1e4


def entmax(
    x: Float[Array, "*B"],
    alpha: float | Float[Array, "*#B"] = 1.5,
    axis: int = -1,
    where: Bool[Array, "*#B"] | None = None,
) -> Float[Array, "*B"]:
    """alpha-entmax of x along an axis, by bisection; differentiable in x and in alpha.

    Args:
        x: logits. An entry of -inf takes no part, as in softmax.
        alpha: a positive number, or an array that broadcasts to x with size 1 along `axis` (one alpha per head, say).
            1 is softmax; above 1 there are exact zeros, more of them the larger it is; below 1 tails are heavier than
            softmax's.
        axis: what sums to 1.
        where: True for entries that take part; the others get exactly 0 and no gradient. A slice in which nothing takes
            part is all 0.

    Returns:
        Probabilities in the type of x, computed in float32 or wider.

    Raises:
        ValueError: an alpha that is not positive (where its value is known), or whose shape does not fit.
    """
    x = jnp.asarray(x)
    known = concrete(alpha)
    if known is not None and not (known > 0).all():
        raise ValueError(f"alpha: must be positive (1 is softmax, 2 sparsemax), got {alpha}")
    alpha = jnp.asarray(alpha)
    axis = range(x.ndim)[axis]
    fits = alpha.ndim <= x.ndim and all(
        n == 1 or (n == m and i != axis)
        for i, n, m in zip(range(x.ndim - alpha.ndim, x.ndim), alpha.shape, x.shape[x.ndim - alpha.ndim :], strict=True)
    )
    if not fits:
        raise ValueError(f"alpha: must broadcast to x {x.shape} with size 1 along axis {axis}, got {alpha.shape}")
    wide, ok = _prepare(x, where, axis)
    alpha = alpha.reshape((1,) * (x.ndim - alpha.ndim) + alpha.shape).astype(wide.dtype)
    p = _entmax(wide, jnp.moveaxis(alpha, axis, -1), ok)
    return jnp.moveaxis(p, -1, axis).astype(x.dtype)


def sparsemax(x: Float[Array, "*B"], axis: int = -1, where: Bool[Array, "*#B"] | None = None) -> Float[Array, "*B"]:
    """entmax with alpha = 2, exact by sorting: the Euclidean projection of x on the simplex. Arguments as in `entmax`."""
    wide, ok = _prepare(x, where, axis)
    return jnp.moveaxis(_sorted(wide, ok, 2.0), -1, axis).astype(jnp.asarray(x).dtype)


def entmax15(x: Float[Array, "*B"], axis: int = -1, where: Bool[Array, "*#B"] | None = None) -> Float[Array, "*B"]:
    """entmax with alpha = 1.5, exact by sorting. Arguments as in `entmax`."""
    wide, ok = _prepare(x, where, axis)
    return jnp.moveaxis(_sorted(wide, ok, 1.5), -1, axis).astype(jnp.asarray(x).dtype)


@pytree(leaves=("alpha",))
class Entmax(Thresholded):
    """alpha-entmax over the visible keys, a weight map of `attention`.

    "dense" holds whole rows (1.5 and 2 are then computed exactly by sorting). Backends that work by tiles find the threshold
    u of each row by passes over them.

    alpha: a positive number, or an array ``[N]``, one per query head, which may be learned. By tiles, an alpha within 1e-4
        of 1 counts as 1 + 1e-4, whose weights differ by less than 1e-4.
    """

    alpha: float | Float[Array, " N"] = 1.5

    def rows(self, s: Array, ok: Array, g: Geometry) -> Array:
        if isinstance(self.alpha, int | float) and self.alpha in (1.5, 2):
            exact = sparsemax if self.alpha == 2 else entmax15
            return exact(s, where=ok)
        return entmax(s, self._alphas(g)[0], where=ok)

    def _alphas(self, g: Geometry) -> Float[Array, "1 N|1 1 1"]:
        alpha = jnp.asarray(self.alpha)
        if alpha.shape not in ((), (1,), (g.heads,)):
            raise ValueError(f"Entmax: alpha must be a number or have one entry per head, ({g.heads},), got {alpha.shape}")
        return alpha.reshape(1, -1, 1, 1)

    def _b(self, g: Geometry) -> Float[Array, "1 N|1 1 1"]:
        b = self._alphas(g).astype(jnp.float32) - 1
        return b + jax.lax.stop_gradient(jnp.where(jnp.abs(b) < _NEAR, _NEAR - b, 0))

    @property
    def _power(self) -> int:
        """1/b where that is known to be 1 or 2, else 0: weights are then powers, which take no logarithm."""
        return {1.5: 2, 2: 1}.get(self.alpha, 0) if isinstance(self.alpha, int | float) else 0

    def numbers(self, g: Geometry) -> tuple[Float[Array, "1 N|1 1 1"], ...]:
        return () if self._power else (self._b(g),)

    def reference(self, top: Array, slack: float, g: Geometry) -> Array:
        # At least the maximum where b > 0, at most where b < 0: so e^(b u) + b d can have its value at the maximum.
        return top - jnp.where(self._b(g) > 0, 0, slack)

    def bracket(self, slack: float, g: Geometry) -> tuple[Array, Array]:
        b, most = self._b(g), jnp.log(jnp.float32(g.keys))
        # u lies in [-most, 0] for d counted from the maximum, which is up to `slack` away from the reference.
        size = jnp.abs(b)
        low = jnp.where(b > 0, -most, -jnp.log1p(jnp.expm1(size * most) + size * slack) / size)
        return low, jnp.where(b > 0, jnp.log1p(size * slack) / size, 0)

    def row(self, u: Array, *numbers: Array) -> tuple[Array, ...]:
        if self._power:
            return (jnp.exp(u / self._power),)
        (b,) = numbers
        return u, b * jnp.exp(-b * u), 1 / b

    def weight(self, x: Array, *row: Array) -> Array:
        if self._power:
            y = self._base(x, *row)
            return y if self._power == 1 else y * y
        return _exponential(0, x, *row)

    def steepness(self, x: Array, *row: Array) -> Array:  # p^(1-b) e^(b u)
        if self._power:
            y = self._base(x, *row)
            return row[0] * (jnp.where(y > 0, 1.0, 0.0) if self._power == 1 else y)
        return _exponential(1, x, *row)

    def _base(self, x: Array, at_top: Array) -> Array:
        """``[e^(b u) + b x]_+`` for b = 1 / power."""
        y = at_top + x / self._power
        return jnp.where(y > 0, y, 0.0)

    def __repr__(self) -> str:
        return f"entmax({self.alpha if isinstance(self.alpha, int | float) else 'alpha per head'})"


def _exponential(less: int, x: Array, u: Array, scale: Array, inverse: Array) -> Array:
    """``exp(u + (1/b - less) log1p(t))`` with ``t = b x e^(-b u)``; scale = b e^(-b u), inverse = 1/b."""
    t = scale * x
    on = t > -1
    p = jnp.exp(u + jnp.log1p(jnp.where(on, t, 0.0)) * (inverse - less))
    # Where b < 0 nothing is off in the solution; a trial that is must count as far too large.
    return jnp.where(on, p, jnp.where(inverse > 0, 0.0, _LARGE))


def _prepare(x: Any, where: Any, axis: int) -> tuple[Array, Array]:
    """x in float32 or wider and who takes part, both with `axis` last."""
    x = jnp.asarray(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    ok = ~jnp.isneginf(wide)
    if where is not None:
        ok = ok & where
    return jnp.moveaxis(wide, axis, -1), jnp.moveaxis(jnp.broadcast_to(ok, x.shape), axis, -1)


def _below_max(x: Array, ok: Array) -> Array:
    """x less its largest entry that takes part; 0 for those that do not."""
    top = jnp.where(ok, x, -jnp.inf).max(-1, keepdims=True)
    return jnp.where(ok, x - top, 0)


@jax.custom_jvp
@jax.jit  # called eagerly, the loop would be compiled anew every time
def _entmax(x: Float[Array, "*B S"], alpha: Float[Array, "*#B 1"], ok: Bool[Array, "*B S"]) -> Float[Array, "*B S"]:
    b, d = alpha - 1, _below_max(x, ok)

    def p_of(u: Array) -> Array:
        r = jnp.exp(-b * u)
        t = b * d * r
        # log1p(t) / b = d r · log1p(t) / t, and log1p(t) / t -> 1 - t/2.
        small = jnp.abs(t) < 1e-5
        inside = jnp.where(small | (t <= -1), 1.0, t)
        rate = jnp.where(small, 1 - t / 2, jnp.log1p(inside) / inside)
        return jnp.where(ok & (t > -1), jnp.exp(u + d * r * rate), 0)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        enough = p_of(middle).sum(-1, keepdims=True) >= 1
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    n = jnp.maximum(ok.sum(-1, keepdims=True), 1).astype(x.dtype)
    shape = jnp.broadcast_shapes(n.shape, alpha.shape)
    steps = math.ceil(-math.log2(jnp.finfo(x.dtype).eps)) + 5
    _, u = lax.fori_loop(0, steps, halve, (jnp.broadcast_to(-jnp.log(n), shape), jnp.zeros(shape, x.dtype)))
    p = p_of(u)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total == 0, 1, total)


@functools.partial(_entmax.defjvp, symbolic_zeros=True)
def _entmax_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, alpha, ok = primals
    dx, da, _ = tangents
    p = _entmax(x, alpha, ok)
    dp = jnp.zeros_like(p)
    if not isinstance(dx, SymbolicZero):
        dp = dp + jacobian_product(p, alpha, dx)
    if not isinstance(da, SymbolicZero):
        dp = dp + alpha_derivative(p, alpha) * da
    return p, dp


def jacobian_product(p: Float[Array, "*B S"], alpha: Any, dx: Float[Array, "*B S"]) -> Float[Array, "*B S"]:
    """J dx for p = entmax(x): J = diag(s) - s sᵀ / Σ s with s = p^(2 - alpha) on the support, else 0. J is symmetric."""
    on = p > 0
    s = jnp.where(on, jnp.exp((2 - alpha) * jnp.log(jnp.where(on, p, 1))), 0)
    total = s.sum(-1, keepdims=True)
    change = jnp.where(on, dx, 0)
    return s * (change - (s * change).sum(-1, keepdims=True) / jnp.where(total == 0, 1, total))


def alpha_derivative(p: Float[Array, "*B S"], alpha: Any) -> Float[Array, "*B S"]:
    """dp/dalpha for p = entmax(x); 0 off the support.

    The paper's form, with ptil = s / Σ s, h = p log p and Hs = Σ h (s as in `jacobian_product`),

        dp/dalpha = (p - ptil) / (alpha - 1)² - (h - ptil Hs) / (alpha - 1),

    loses all digits as alpha -> 1. With b = alpha - 1, l = log p and E2 = (e^(-b l) - 1 + b l) / b² it is

        dp/dalpha = p (M2 - E2 - b (l M2 - Hs E2)) / (1 - b Hs + b² M2),    M2 = Σ p E2,

    whose limit p/2 (Σ p log² p - log² p) needs no case of its own.
    """
    b, on = alpha - 1, p > 0
    l = jnp.where(on, jnp.log(jnp.where(on, p, 1)), 0)
    e2 = l**2 * _exp_remainder(jnp.minimum(-b * l, _STEEP))
    m2, hs = ((p * y).sum(-1, keepdims=True) for y in (e2, l))
    return p * (m2 - e2 - b * (l * m2 - hs * e2)) / (1 - b * hs + b**2 * m2)


def _exp_remainder(t: Array) -> Array:
    """(e^t - 1 - t) / t², by its series near 0."""
    near = jnp.abs(t) < 0.3
    series = jnp.zeros_like(t)
    for k in range(12, 1, -1):
        series = series * t + 1 / math.factorial(k)
    far = jnp.where(near, 1.0, t)
    return jnp.where(near, series, (jnp.exp(far) - 1 - far) / far**2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sorted(x: Float[Array, "*B S"], ok: Bool[Array, "*B S"], alpha: float) -> Float[Array, "*B S"]:
    """alpha 1.5 or 2, where the threshold follows from how many of the largest entries are in the support."""
    z = _below_max(x, ok) * (alpha - 1)
    # Entries that take no part sort last and can be in no support.
    top = jnp.sort(jnp.where(ok, z, -jnp.inf), axis=-1, descending=True)
    real = ~jnp.isneginf(top)
    top = jnp.where(real, top, 0)
    k = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    total = jnp.cumsum(top, -1)
    if alpha == 2:
        taus = (total - 1) / k
        size = (real & (taus < top)).sum(-1, keepdims=True)
    else:
        mean = total / k
        spread = k * (jnp.cumsum(top**2, -1) / k - mean**2)
        taus = mean - jnp.sqrt(jnp.maximum((1 - spread) / k, 0))
        size = (real & (taus <= top)).sum(-1, keepdims=True)
    tau = jnp.take_along_axis(taus, jnp.maximum(size - 1, 0), -1)
    p = jnp.maximum(z - tau, 0)
    return jnp.where(ok, p if alpha == 2 else p**2, 0)


@functools.partial(_sorted.defjvp, symbolic_zeros=True)
def _sorted_jvp(alpha: float, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    p = _sorted(*primals, alpha)
    return p, jacobian_product(p, alpha, tangents[0])
