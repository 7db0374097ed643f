"""A checked, normalised call of the attention operation: what every backend receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnzoo.core.cells import Bound, Geometry, concrete
from attnzoo.core.dropout import Dropout, dropout_seed
from attnzoo.core.masks import Array as ArrayMask
from attnzoo.core.masks import Function as FunctionMask
from attnzoo.core.masks import Mask
from attnzoo.core.quantized import Quantized
from attnzoo.core.scores import Bias, Score
from attnzoo.core.scores import Function as FunctionScore
from attnzoo.core.weights import Weights


@dataclasses.dataclass(frozen=True)
class Request:
    """``q [B, T, N, H]``, ``k [B, S, K, H]``, ``v [B, S, K, Hv]`` and everything that was asked of them."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    geometry: Geometry
    mask: Mask | None
    score: Score | None
    weights: Weights
    scale: float | Array
    dropout: Dropout | None
    block_sizes: tuple[int, int] | None
    return_lse: bool
    return_weights: bool
    pages: Int[Array, "B M"] | None = None
    """Where given, k and v are pools ``[P, page, K, ·]``, and S = M · page."""
    scales: tuple[Array | None, Array | None] = (None, None)
    """What 8-bit numbers in k and v are to be multiplied by, ``[B|1, S|1, K|1, ·|1]``."""

    @property
    def narrow(self) -> bool:
        """Whether k or v hold 8-bit numbers."""
        return self.scales != (None, None)

    def widened(self) -> Request:
        """The same call with keys and values in the type of the queries."""
        if not self.narrow:
            return self
        k, v = (
            x if scale is None else Quantized(x, scale).expand(self.q.dtype)
            for x, scale in zip((self.k, self.v), self.scales, strict=True)
        )
        return dataclasses.replace(self, k=k, v=v, scales=(None, None))

    def gathered(self) -> Request:
        """The same call with the pages of each batch row one after the other."""
        if self.pages is None:
            return self
        g, own = self.geometry, jnp.maximum(self.pages, 0)
        k, v = (x[own].reshape(g.batch, g.keys, *x.shape[2:]) for x in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, pages=None)

    @property
    def product_dtype(self) -> Any:
        return product_dtype(self.q.dtype)

    def bound_mask(self) -> Bound | None:
        return None if self.mask is None else self.mask.bind(self.geometry)

    def bound_score(self) -> Bound | None:
        """The caller's score, then what the weight map itself does to logits."""
        own = self.weights.score(self.geometry)
        score = own if self.score is None else self.score if own is None else self.score >> own
        return None if score is None else score.bind(self.geometry)


def product_dtype(dtype: Any) -> Any:
    """The type in which to multiply: the inputs' own, summed in float32, but float32 on CPUs, which have no fast
    low-precision matrix unit (and whose compiler refuses some such products)."""
    return jnp.float32 if jax.default_backend() == "cpu" else dtype


def make_request(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Any,
    bias: Any,
    score: Any,
    weights: Weights,
    scale: Any,
    dropout_rate: float,
    dropout_rng: Any,
    q_positions: Any,
    kv_positions: Any,
    block_sizes: Any,
    return_lse: bool,
    return_weights: bool,
    pages: Any = None,
) -> tuple[Request, tuple[int, ...]]:
    """Check the arguments of ``attention``; returns the request and the leading batch dimensions it flattened."""
    one, scales = v is k, (_scale("k", k, pages), _scale("v", v, pages))
    k, v = (x.values if isinstance(x, Quantized) else x for x in (k, v))
    q, k = jnp.asarray(q), jnp.asarray(k)
    v = k if one else jnp.asarray(v)  # kernels read an array that is both once
    if pages is None:
        lead = check_shapes(q, k, v, scales)
        keys = k.shape[-3]
        batch = int(np.prod(lead))
        q, k = (x.reshape(batch, *x.shape[-3:]) for x in (q, k))
        v = k if one else v.reshape(batch, *v.shape[-3:])
    else:
        lead, pages = q.shape[:1], _as_pages(pages, q, k, v, kv_positions is not None)
        batch, keys = q.shape[0], pages.shape[1] * k.shape[1]
    g = Geometry(
        batch, q.shape[2], k.shape[2], q.shape[1], keys,
        as_positions("q_positions", q_positions, lead, (q.shape[1],)),
        as_positions("kv_positions", kv_positions, lead, (keys,), k.shape[2]),
    )  # fmt: skip
    the_score = _as_score(score, g, lead)
    if bias is not None:
        added = Bias(_broadcasting("bias", bias, lead, g))
        the_score = added if the_score is None else added >> the_score
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be a weight map of attnzoo.core.weights such as softmax, got {type(weights).__name__}")
    request = Request(
        q, k, v, g,
        mask=_as_mask(mask, g, lead),
        score=the_score,
        weights=weights,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        dropout=_as_dropout(dropout_rate, dropout_rng),
        block_sizes=_as_blocks(block_sizes),
        return_lse=return_lse,
        return_weights=return_weights,
        pages=pages,
        scales=scales,
    )  # fmt: skip
    return request, lead


def _scale(name: str, x: Any, pages: Any) -> Float[Array, "B|1 S|1 K|1 H|1"] | None:
    """Of quantized keys or values, None where they are plain arrays."""
    if not isinstance(x, Quantized):
        return None
    x.check(name)
    if pages is not None:
        raise ValueError(f"{name}: pools behind pages= cannot be Quantized; expand them first")
    scale = jnp.asarray(x.scale, jnp.float32)
    if any(n != 1 for n in scale.shape[:-3]):
        scale = jnp.broadcast_to(scale, (*x.shape[:-3], *scale.shape[-3:]))
    return scale.reshape(-1, *scale.shape[-3:])


def _as_pages(pages: Any, q: Array, k: Array, v: Array, placed: bool) -> Array:
    """placed: whether keys carry positions, which hide the slots of pages that a row has not."""
    pages = jnp.asarray(pages)
    if not jnp.issubdtype(pages.dtype, jnp.integer):
        raise TypeError(f"pages has dtype {pages.dtype}; a block table holds integers")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}, pages {pages.shape}"
    if not q.ndim == k.ndim == v.ndim == 4 or pages.ndim != 2 or pages.shape[0] != q.shape[0] or 0 in pages.shape:
        raise ValueError(
            f"pages: needs q [B, T, N, H], pools k [P, page, K, H] and v [P, page, K, Hv], and pages [B, M]; got {shapes}"
        )
    check_shapes(q[:1], k[:1], v[:1])
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"pages: the pools k and v must have as many pages as each other, got {shapes}")
    known = concrete(pages)
    if known is not None and not ((known >= -1) & (known < k.shape[0])).all():
        raise ValueError(f"pages: the pools have pages 0 to {k.shape[0] - 1} (-1: none), got {known.min()} to {known.max()}")
    if known is not None and (known < 0).any() and not placed:
        raise ValueError("pages: rows that lack pages (-1) need kv_positions, -1 at the slots of those, to hide them")
    return pages.astype(jnp.int32)


def check_shapes(q: Array, k: Array, v: Array, scales: tuple[Array | None, Array | None] = (None, None)) -> tuple[int, ...]:
    """The leading axes of queries, keys and values; raises what :func:`attention` does where these do not fit.

    scales: of k and v, where they hold 8-bit numbers.
    """
    for name, x, scale in (("q", q, None), ("k", k, scales[0]), ("v", v, scales[1])):
        if x.ndim < 3:
            raise ValueError(f"{name} has shape {x.shape}; attention takes [..., length, heads, width], at least 3 axes")
        if not jnp.issubdtype(x.dtype, jnp.floating) and scale is None:
            raise TypeError(f"{name} has dtype {x.dtype}; attention takes floating-point arrays")
        if x.shape[-3] == 0:
            raise ValueError(f"{name} has shape {x.shape}: its length is 0; give at least one token")
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim or not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(f"q, k and v must have the same leading (batch) axes, got {shapes}")
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise ValueError(f"k and v must agree in length and heads, got k {k.shape} and v {v.shape}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same width, got q {q.shape} and k {k.shape}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"the number of query heads must be a multiple of the number of key/value heads, got {q.shape[-2]} "
                         f"(q {q.shape}) and {k.shape[-2]} (k {k.shape})")  # fmt: skip
    return q.shape[:-3]


def _broadcasting(name: str, x: Any, lead: tuple[int, ...], g: Geometry) -> Array:
    """An array that broadcasts to ``[*lead, N, T, S]`` as one that broadcasts to ``[B, N, T, S]``."""
    x = jnp.asarray(x)
    want = (*lead, g.heads, g.queries, g.keys)
    if x.ndim > len(want) or any(n not in (1, m) for n, m in zip(x.shape[::-1], want[::-1], strict=False)):
        raise ValueError(f"{name} has shape {x.shape}, which does not broadcast to [*batch, N, T, S] = {want}")
    x = x.reshape((1,) * (len(want) - x.ndim) + x.shape)
    if all(n == 1 for n in x.shape[:-3]):
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(g.batch, *x.shape[-3:])


def _as_mask(x: Any, g: Geometry, lead: tuple[int, ...]) -> Mask | None:
    if x is None or isinstance(x, Mask):
        return x
    if callable(x):
        return FunctionMask(x)
    x = jnp.asarray(x)
    if x.dtype != bool:
        raise TypeError(f"mask has dtype {x.dtype}; give a bool array (True: may be seen), a Mask, or a function of "
                        "(b, h, q, k). An array to be added to the logits goes to bias=")  # fmt: skip
    return ArrayMask(_broadcasting("mask", x, lead, g))


def _as_score(x: Any, g: Geometry, lead: tuple[int, ...]) -> Score | None:
    if x is None or isinstance(x, Score):
        return x
    if isinstance(x, Callable):  # type: ignore[arg-type]
        return FunctionScore(x)
    raise TypeError(f"score must be a Score or a function of (s, b, h, q, k), got {type(x).__name__}; an array to be added "
                    "to the logits goes to bias=")  # fmt: skip


def as_positions(name: str, x: Any, lead: tuple[int, ...], tail: tuple[int, ...], kv_heads: int | None = None) -> Any:
    """``[T]`` or ``[*batch, T]`` -> ``[B|1, T]``; for keys also ``[*batch, K, S]`` -> ``[B|1, K|1, S]``."""
    if x is None:
        return None
    known = isinstance(x, np.ndarray | list | tuple)
    x = np.asarray(x) if known else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {x.dtype}; positions are integers")
    x = x.astype(np.int32)
    shapes = [tail, (*lead, *tail)] + ([(*lead, kv_heads, *tail)] if kv_heads is not None else [])
    if x.shape not in shapes:
        raise ValueError(f"{name} has shape {x.shape}, but this call needs {' or '.join(map(str, dict.fromkeys(shapes)))}")
    per_head = kv_heads is not None and x.ndim == len(lead) + 2 and x.shape == shapes[-1]
    batch = -1 if x.ndim > 1 else 1
    if kv_heads is None:
        return x.reshape(batch, *tail)
    return x.reshape(batch, kv_heads if per_head else 1, *tail)


def _as_dropout(rate: float, rng: Any) -> Dropout | None:
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}")
    if rate == 0:
        return None
    if rng is None:
        raise ValueError(f"dropout_rate={rate} needs dropout_rng, a JAX random key")
    return Dropout(rate, dropout_seed(rng))


def _as_blocks(x: Any) -> tuple[int, int] | None:
    if x is None:
        return None
    if not (isinstance(x, tuple) and len(x) == 2 and all(isinstance(n, int) and n > 0 for n in x)):
        raise ValueError(f"block_sizes must be a pair of positive ints (queries, keys), got {x!r}")
    return x
