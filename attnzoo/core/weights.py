"""Weight maps: how the logits of a row become weights.

A map says how it can be computed, and backends ask that, never its name:

- :class:`Normalised`: exponentials over their sum, possibly with more mass in the denominator. One online pass, since
  partial sums merge by their log-sum-exp.
- :class:`Pointwise`: a function of each logit alone. One pass, nothing to merge.
- :class:`Thresholded`: pointwise, once a threshold per row is known. Several passes, of the two kinds above.
- :class:`Mixture`: a sum of other maps, each with its coefficient; the operation runs each.
- anything else is :class:`Weights` with only ``rows``, which needs all logits of a row at once: dense only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnzoo.core.cells import Bound, Geometry, Operand, concrete
from attnzoo.core.masks.base import mask as pytree
from attnzoo.core.scores import Bias, Score

#: A logit at or below this counts as hidden: additive masks of -inf or of a dtype's minimum both are.
HIDDEN = -1e30


class Weights:
    """Base of weight maps. ``rows`` is the definition; subclasses below add faster ways to the same result.

    reads_logits: whether weights depend on more than which cells are visible. If not, queries and keys are multiplied only
        where a score may hide cells.
    """

    reads_logits: ClassVar[bool] = True

    def score(self, g: Geometry) -> Score | None:
        """What is done to each logit first, after the caller's own score; ``rows`` gets the result (None: nothing)."""
        return None

    def rows(self, s: Float[Array, "B N T S"], ok: Bool[Array, "B N T S"], g: Geometry) -> Float[Array, "B N T S"]:
        """Weights of whole rows; hidden cells (``ok`` False) get exactly 0, rows without visible cells are all 0."""
        raise NotImplementedError

    def finish(self, out: Array, lse: Array | None) -> tuple[Array, Array | None]:
        """Last word on ``out [B, N, T, Hv]`` and ``lse [B, N, T]``; counts once, after all keys were seen."""
        return out, lse


class Normalised(Weights):
    """``w = exp(s) / (Σ exp(s) + extra)``: what :meth:`finish` does to (out, lse) is all that subclasses change."""

    def rows(self, s: Array, ok: Array, g: Geometry) -> Array:
        w, lse = softmax_rows(s, ok)
        return self.finish(w, lse)[0]


@jax.custom_jvp
def softmax_rows(s: Array, ok: Array) -> tuple[Array, Array]:
    """Softmax over the last axis among the visible cells, and its log-sum-exp (-inf for rows that see nothing)."""
    s = jnp.where(ok, s, -jnp.inf)
    top = jnp.maximum(s.max(-1, keepdims=True), HIDDEN)
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    seen = total > 0
    safe = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    return p / safe, lse[..., 0]


@softmax_rows.defjvp
def _softmax_rows_jvp(primals: Any, tangents: Any) -> Any:
    """``dw = w (ds - Σ w ds)``, ``d lse = Σ w ds``: half the passes over the cells that a derivative of each step takes."""
    (s, ok), (ds, _) = primals, tangents
    w, lse = softmax_rows(s, ok)
    ds = jnp.where(ok, ds, 0)
    mean = (w * ds).sum(-1, keepdims=True)
    return (w, lse), (w * (ds - mean), mean[..., 0])


@pytree()
class Softmax(Normalised):
    """``w = exp(s) / Σ exp(s)`` over the visible keys."""

    def __repr__(self) -> str:
        return "softmax"


#: The default weight map.
softmax = Softmax()


@pytree(leaves=("logits",))
class SinkSoftmax(Normalised):
    """Softmax with an extra logit that takes weight and gives no value: ``w = exp(s) / (Σ exp(s) + exp(sink))``.

    logits: float ``[N]``, learnable, one per query head (gpt-oss, arXiv 2508.10925), or the number 0.0 (softmax-one).
    """

    logits: float | Float[Array, " N"] = 0.0

    def finish(self, out: Array, lse: Array | None) -> tuple[Array, Array | None]:
        assert lse is not None
        sink = jnp.asarray(self.logits, jnp.float32).reshape(1, -1, 1)
        return out * jax.nn.sigmoid(lse - sink)[..., None], jnp.logaddexp(lse, sink)

    def __repr__(self) -> str:
        return f"SinkSoftmax({self.logits if isinstance(self.logits, int | float) else 'per head'})"


class Pointwise(Weights):
    """``w = phi(s)`` for every visible cell by itself."""

    def phi(self, s: Array) -> Array:
        """The map; must be differentiable by JAX, finite where ``s`` is."""
        raise NotImplementedError

    def rows(self, s: Array, ok: Array, g: Geometry) -> Array:
        return jnp.where(ok, self.phi(jnp.where(ok, s, 0)), 0)


@pytree(leaves=("bias",))
class Sigmoid(Pointwise):
    """``w = sigmoid(s + bias)`` (Ramapuram et al., 2024, arXiv 2409.04431).

    bias: a float, an array ``[N]``, or None for the paper's ``-log S`` with S the number of keys of the call.
    """

    bias: float | Float[Array, " N"] | None = None

    def score(self, g: Geometry) -> Score:
        bias = -jnp.log(g.keys) if self.bias is None else jnp.asarray(self.bias, jnp.float32)
        return Bias(jnp.reshape(bias, (1, -1, 1, 1)))

    def phi(self, s: Array) -> Array:
        return jax.nn.sigmoid(s)

    def __repr__(self) -> str:
        return "sigmoid"


@pytree()
class Elementwise(Pointwise):
    """``w = f(s)`` for a function of your own, such as ``jax.nn.relu`` or ``lambda s: jax.nn.relu(s) ** 2 / 64``.

    f maps a float32 array to one of the same shape and must capture no traced arrays (give those as scores).
    """

    f: Callable[[Array], Array]

    def phi(self, s: Array) -> Array:
        return self.f(s)

    def __repr__(self) -> str:
        return f"Elementwise({getattr(self.f, '__name__', type(self.f).__name__)})"


@pytree()
class _Level(Score):
    """Every visible logit becomes 0."""

    def bind(self, g: Geometry) -> Bound:
        return Bound((), lambda s, c: jnp.where(s > HIDDEN, 0.0, s))


@pytree()
class Uniform(Normalised):
    """The same weight for every visible key, whatever the logits."""

    reads_logits = False

    def score(self, g: Geometry) -> Score:
        return _Level()

    def __repr__(self) -> str:
        return "uniform"


class Thresholded(Weights):
    """``w = weight(s - r, u)``, with one threshold u per row at which the weights of the row sum to 1; they grow with u.

    The reference r is near the largest logit of its row, so that u and the weights stay in range. Backends that do not hold
    rows find u by passes over them (:mod:`attnzoo.core.passes`), or in one pass by a kernel that keeps some rows' logits on
    the chip. That kernel runs ``row`` and ``weight``: elementwise functions of what broadcasts, with no arrays of their own.
    """

    def numbers(self, g: Geometry) -> tuple[Float[Array, "1 N|1 1 1"], ...]:
        """What the map depends on besides, float32; gradients reach these."""
        return ()

    def reference(self, top: Float[Array, "B N T 1"], slack: float, g: Geometry) -> Float[Array, "B N T 1"]:
        """r, from a number that is the largest logit of a row, or more by at most ``slack``; without slack, that number."""
        raise NotImplementedError

    def bracket(self, slack: float, g: Geometry) -> tuple[Array, Array]:
        """Numbers between which u lies, whatever the logits; ``[1, N|1, 1, 1]``."""
        raise NotImplementedError

    def row(self, u: Float[Array, "*B"], *numbers: Array) -> tuple[Float[Array, "*#B"], ...]:
        """What the weights of a row are made of besides its logits, so that it is computed once per row."""
        return (u, *numbers)

    def weight(self, x: Float[Array, "*B"], *row: Float[Array, "*#B"]) -> Float[Array, "*B"]:
        """Weights of ``x = s - r``, in rows of which :meth:`row` says the rest; 0 where x is below -1e30 (hidden cells)."""
        raise NotImplementedError

    def steepness(self, x: Float[Array, "*B"], *row: Float[Array, "*#B"]) -> Float[Array, "*B"]:
        """The derivative of :meth:`weight` by u."""
        raise NotImplementedError

    def at(self, r: Float[Array, "B|1 N|1 T|1 1"], u: Float[Array, "B|1 N|1 T|1 1"]) -> Pointwise:
        """The weights for these."""
        return _AtThreshold(self, r, u)

    def slope(self, r: Float[Array, "B N T 1"], u: Float[Array, "B N T 1"]) -> Pointwise:
        """The derivative of the weights by u."""
        return _AtThreshold(self, r, u, slope=True)


@pytree(leaves=("of", "r", "u"))
class _AtThreshold(Pointwise):
    """Thresholded weights where reference and threshold of every row are known; slope: their derivative by u instead."""

    of: Thresholded
    r: Float[Array, "B|1 N|1 T|1 1"]
    u: Float[Array, "B|1 N|1 T|1 1"]
    slope: bool = False

    def score(self, g: Geometry) -> Score:
        f = self.of.steepness if self.slope else self.of.weight
        return _OfRows(f, (self.r, *self.of.row(self.u, *self.of.numbers(g))))

    def phi(self, s: Array) -> Array:
        return s

    def __repr__(self) -> str:
        return repr(self.of)


@pytree(leaves=("arrays",))
class _OfRows(Score):
    """``f(s - r, *row)`` with ``arrays = (r, *row)``, ``[B|1, N|1, T|1, 1]`` each; hidden logits stay as they are."""

    f: Callable[..., Array]
    arrays: tuple[Array, ...]

    def bind(self, g: Geometry) -> Bound:
        def apply(s: Array, c: Any, r: Array, *row: Array) -> Array:
            return jnp.where(s > HIDDEN, self.f(s - r, *row), s)

        return Bound(tuple(Operand(x, "aligned") for x in self.arrays), apply)


class Mixture(Weights):
    """A sum of maps, each times a coefficient (a number, or ``[N]``)."""

    def parts(self) -> tuple[tuple[Any, Weights], ...]:
        """The coefficients and the maps."""
        raise NotImplementedError


def check_gamma(gamma: Any) -> None:
    """Raises ValueError unless a share ``gamma`` is a number or one per head, ``[N]``, and, where known, in [0, 1]."""
    known = concrete(gamma)
    if jnp.ndim(gamma) > 1 or (known is not None and not ((known >= 0) & (known <= 1)).all()):
        raise ValueError(f"gamma: must be in [0, 1], a number or one per head [N], got {gamma}")


@pytree(leaves=("gamma",))
class Relaxed(Mixture):
    """Relaxed attention (Lohrenz et al., 2022, arXiv 2209.09735): ``(1 - gamma) softmax(s) + gamma / (visible keys)``.

    Raises ValueError, when it is used, for a gamma outside [0, 1] or of another shape than ``[]`` or ``[N]``.
    """

    gamma: float | Float[Array, " N"] = 0.1

    def parts(self) -> tuple[tuple[Any, Weights], ...]:
        check_gamma(self.gamma)
        return (1 - self.gamma, softmax), (self.gamma, Uniform())

    def __repr__(self) -> str:
        return "relaxed softmax"
