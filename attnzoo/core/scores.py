"""Score modifiers: what is added to or done to a logit before the mask. They compose by ``>>``, left first.

>>> from attnzoo.core.scores import ALiBi, SoftCap
>>> ALiBi.for_heads(8) >> SoftCap(30.0)
ALiBi(8 heads) >> SoftCap(30.0)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnzoo.core.cells import Bound, Geometry, Operand
from attnzoo.core.masks.base import mask as pytree
from attnzoo.core.positions import alibi_slopes
from attnzoo.core.traced import bind_function


class Score:
    """What is done to a logit ``s`` (float32, already scaled) of batch row b, query head h, query q and key k.

    Scores are pytrees; gradients reach the arrays they carry on every backend. To write one, subclass, decorate with
    ``attnzoo.core.masks.mask`` and give ``bind``.
    """

    def bind(self, g: Geometry) -> Bound:
        """The function and the arrays it needs, for geometry ``g``."""
        raise NotImplementedError

    def __rshift__(self, other: Score) -> Score:
        return Then(self, other) if isinstance(other, Score) else NotImplemented


@pytree(leaves=("first", "second"))
class Then(Score):
    """``first``, then ``second``."""

    first: Score
    second: Score

    def bind(self, g: Geometry) -> Bound:
        a, b = self.first.bind(g), self.second.bind(g)
        cut = len(a.operands)
        return Bound((*a.operands, *b.operands), lambda s, c, *p: b.apply(a.apply(s, c, *p[:cut]), c, *p[cut:]))

    def __repr__(self) -> str:
        return f"{self.first} >> {self.second}"


@pytree(leaves=("bias",))
class Bias(Score):
    """``s + bias``, for an array that broadcasts to ``[B, N, T, S]``. A bias of -inf hides the cell."""

    bias: Float[Array, ...]

    def bind(self, g: Geometry) -> Bound:
        x = jnp.asarray(self.bias)
        want = (g.batch, g.heads, g.queries, g.keys)
        if x.ndim > 4 or any(n not in (1, m) for n, m in zip(x.shape[::-1], want[::-1], strict=False)):
            raise ValueError(f"bias has shape {x.shape}, which does not broadcast to [B, N, T, S] = {want}")
        return Bound((Operand(x.reshape((1,) * (4 - x.ndim) + x.shape), "aligned"),), lambda s, c, bias: s + bias)

    def __repr__(self) -> str:
        return f"Bias({'×'.join(map(str, jnp.shape(self.bias)))})"


@pytree(leaves=("slopes",))
class ALiBi(Score):
    """Attention with linear biases (Press et al., 2022, arXiv 2108.12409): ``s - slopes[h] · |q - k|``.

    slopes: float ``[N]``; :meth:`for_heads` gives the paper's geometric sequence.
    """

    slopes: Float[Array, " N"]

    @classmethod
    def for_heads(cls, num_heads: int) -> ALiBi:
        """The paper's slopes ``2^(-8 i / N)``, with its interpolation where N is no power of two."""
        return cls(alibi_slopes(num_heads))

    def bind(self, g: Geometry) -> Bound:
        slopes = _per_head("ALiBi: slopes", self.slopes, g)
        return Bound((slopes,), lambda s, c, m: s - m * abs(c.q - c.k).astype(s.dtype))

    def __repr__(self) -> str:
        return f"ALiBi({self.slopes.shape[0]} heads)"


@pytree(leaves=("table",))
class RelativeBias(Score):
    """T5's relative position bias (Raffel et al., 2020, arXiv 1910.10683): ``s + table[h, bucket(k - q)]``.

    table: float ``[N, buckets]``. Small distances have a bucket each, larger ones share buckets of exponentially growing
    width up to ``max_distance``, and all beyond share the last. bidirectional: whether half the buckets are for keys after
    the query (encoders); without it those keys all fall in bucket 0.
    """

    table: Float[Array, "N buckets"]
    max_distance: int = 128
    bidirectional: bool = True

    def bucket(self, distance: Array) -> Array:
        """Bucket of ``distance = k - q``."""
        count = self.table.shape[1]
        if self.bidirectional:
            count //= 2
            base = jnp.where(distance > 0, count, 0)
            distance = abs(distance)
        else:
            base, distance = jnp.zeros_like(distance), jnp.maximum(-distance, 0)
        exact = count // 2
        ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(self.max_distance / exact)
        large = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
        return base + jnp.where(distance < exact, distance, large)

    def bind(self, g: Geometry) -> Bound:
        if self.table.ndim != 2 or self.table.shape[0] != g.heads:
            raise ValueError(f"RelativeBias: table has shape {self.table.shape}, but the call has N={g.heads} query heads; "
                             f"give [{g.heads}, buckets]")  # fmt: skip
        if not g.plain:
            table = Operand(jnp.asarray(self.table), "whole")
            return Bound((table,), lambda s, c, t: s + t[c.h, self.bucket(c.k - c.q)])
        per_distance = self.table[:, self.bucket(jnp.arange(g.keys - 1, -g.queries, -1))]
        return Bound((Operand(per_distance, "distance"),), lambda s, c, bias: s + bias)

    def __repr__(self) -> str:
        return f"RelativeBias({'×'.join(map(str, self.table.shape))})"


@pytree()
class SoftCap(Score):
    """``cap · tanh(s / cap)`` (Gemma 2, arXiv 2408.00118): logits stay within ±cap."""

    cap: float

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"SoftCap: cap must be positive, got {self.cap}")

    def bind(self, g: Geometry) -> Bound:
        return Bound((), lambda s, c: self.cap * jnp.tanh(s / self.cap))

    def __repr__(self) -> str:
        return f"SoftCap({self.cap})"


@pytree(leaves=("temperature",))
class Temperature(Score):
    """``s / temperature``: a float, or an array ``[N]`` for one per query head."""

    temperature: float | Float[Array, " N"]

    def bind(self, g: Geometry) -> Bound:
        if isinstance(self.temperature, int | float):
            return Bound((), lambda s, c: s / self.temperature)
        return Bound((_per_head("Temperature: temperature", self.temperature, g),), lambda s, c, t: s / t)

    def __repr__(self) -> str:
        one = isinstance(self.temperature, int | float)
        return f"Temperature({self.temperature if one else 'per head'})"


@pytree()
class Function(Score):
    """``f(s, b, h, q, k) -> s`` on scalars: the logit, batch row, query head, query and key position.

    f may capture arrays, traced ones too; gradients reach them. Captured arrays are indexed by ``f`` itself, whole; one as
    large as the logits is better given as :class:`Bias`, whose tiles are cut and whose gradient is written in place.
    """

    f: Callable[[Any, Any, Any, Any, Any], Any]

    def bind(self, g: Geometry) -> Bound:
        scalars = (jax.ShapeDtypeStruct((), "float32"), *(jax.ShapeDtypeStruct((), "int32"),) * 4)
        operands, apply = bind_function(self.f, scalars, "score function", jnp.float32)
        return Bound(operands, lambda s, c, *parts: apply((s, c.b, c.h, c.q, c.k), parts))

    def __repr__(self) -> str:
        return f"Function({getattr(self.f, '__name__', type(self.f).__name__)})"


def _per_head(name: str, x: Any, g: Geometry) -> Operand:
    x = jnp.asarray(x)
    if x.shape not in ((g.heads,), (1,)):
        raise ValueError(f"{name} has shape {x.shape}, but the call has N={g.heads} query heads; give [{g.heads}]")
    return Operand(x.reshape(1, -1, 1, 1), "aligned")
