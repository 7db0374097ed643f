"""Gaussian Adaptive Attention is All You Need (Ioannides et al., 2024, arXiv 2401.11143).

Attention without queries or keys, over one axis of a tensor of any rank: every element is weighted by how likely it is under
a product of Gaussians, whose means are learned offsets from the sample's own mean along that axis. It re-scales features of
a frozen encoder before they are pooled.

Each of N heads takes one chunk u of the axis (n = length // N elements; the last head takes what is left too) and has
offsets delta [M] and scales c [M] for M Gaussians:

    mu  = mean(u),   var = Σ (u - mu)² / (n - 1) + eps         of this sample and chunk                (paper §3)
    y_k = (u - (mu + delta_k)) / sqrt(var)
    m   = Π_k exp(-y_k² / (2 c_k²)) / sqrt(2 pi c_k²)          a product, not a sum
    m   = m / Σ m                                              over the chunk
    out = u · m

A Gaussian block is L such layers, x <- layer(x) + x. The importance factor of a feature i is its mean weight a_i over
samples, IF_i = (a_i - min a) / (max a - min a).

The product underflows for many Gaussians, so log m is normalised by a softmax instead, in which constants cancel. With
z = (u - mu) / sqrt(var) and sigma = sqrt(var), what is left of it has two coefficients, whatever M is:

    log m = -A z² + 2 B z / sigma,     A = Σ_k 1 / (2 c_k²),   B = Σ_k delta_k / (2 c_k²)

since a product of Gaussians is a Gaussian. mode="reference" multiplies and divides as the authors' code does, with its
clamp at eps.

Costs: an exponent per element (M of them in the authors' form), 2 M parameters per head, nothing to cache.

The equations follow the authors' package `gaussian-adaptive-attention`; the importance factor follows the paper.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from attnzoo.errors import unknown
from attnzoo.nn.linear import linear, named
from attnzoo.paper import Paper

MODES = ("log", "reference")


def gaussian_weights(
    u: Float[Array, "..."],
    delta: Float[Array, " M"],
    c: Float[Array, " M"],
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
    exact_padding: bool = False,
    mode: str = "log",
    eps: float = 1e-8,
) -> Float[Array, "..."]:
    """The weights m of one head, in float32 or wider; they sum to 1 along `axis`.

    where: True at what is not padding; broadcasts to u. Padding enters mean and variance as zeros, counts in n, and has
        weights by its value, as in the authors' code. exact_padding: it takes no part instead and has weight 0.
    c: only its square counts; with mode="log", one below the float type's epsilon counts as that.

    Raises ValueError for fewer than two elements along the axis, which have no variance, for delta, c and where that do not
    fit, and an unknown mode; TypeError unless u is floating-point.
    """
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    n = _floating("u", u).shape[axis]
    if n < 2:
        raise ValueError(f"u: a variance needs at least 2 elements along axis {axis}, got shape {u.shape}")
    u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
    delta, c = (jnp.asarray(p, u.dtype) for p in (delta, c))
    if delta.ndim != 1 or delta.shape != c.shape:
        raise ValueError(f"delta and c: one of each for every Gaussian are needed, [M], got {delta.shape} and {c.shape}")
    real = None if where is None else _fitting(where, "u", u)
    if real is not None and exact_padding:
        count = real.sum(axis, keepdims=True)
        mu = jnp.where(real, u, 0).sum(axis, keepdims=True) / jnp.maximum(count, 1)
        var = jnp.where(real, (u - mu) ** 2, 0).sum(axis, keepdims=True) / jnp.maximum(count - 1, 1) + eps
    else:
        known = u if real is None else jnp.where(real, u, 0)
        mu, var = known.mean(axis, keepdims=True), known.var(axis, ddof=1, keepdims=True) + eps
    counted = real if exact_padding else None
    sigma = jnp.sqrt(var)
    if mode == "log":
        precision = 1 / (2 * jnp.maximum(c**2, jnp.finfo(u.dtype).eps ** 2))
        z = (u - mu) / sigma
        s = -precision.sum() * z**2 + 2 * (precision * delta).sum() * z / sigma
        # A chunk that is all padding has no weights, and softmax would make NaN of them.
        m = jax.nn.softmax(s, axis, where=counted)
        return m if counted is None else jnp.where(counted, m, 0)
    m = jnp.ones_like(u)
    for delta_k, c_k in zip(delta, c, strict=True):
        y = (u - (mu + delta_k)) / sigma
        m = m * jnp.exp(-(y**2) / (2 * c_k**2)) / jnp.sqrt(2 * jnp.pi * c_k**2)
    m = m if counted is None else jnp.where(counted, m, 0)
    return m / jnp.maximum(m.sum(axis, keepdims=True), eps)


class GaussianAdaptiveAttention(nnx.Module):
    """One head, over the whole of `axis`: x of rank 2 or more -> u · m of the same shape.

    num_gaussians: M. delta starts at 0, c at exp(N(0, 1)).
    axis: attended over. padding_value: elements equal to it are padding, unless the call says by `where` (bool, broadcasts to
        x, True at what is not) which are; None: there is none. Padding passes through unchanged.
    exact_padding, mode, eps: as in `gaussian_weights`.

    Raises ValueError for fewer than one Gaussian, an axis that x does not have, fewer than 2 elements along it, and a `where`
    that does not fit; TypeError unless x is floating-point.
    """

    heads: tuple[int, ...] = ()
    """The axes of delta and c before that of the Gaussians."""

    def __init__(
        self,
        num_gaussians: int = 5,
        *,
        axis: int = -1,
        padding_value: float | None = None,
        exact_padding: bool = False,
        mode: str = "log",
        eps: float = 1e-8,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_gaussians < 1:
            raise ValueError(f"num_gaussians: must be at least 1, got {num_gaussians}")
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        self.axis, self.padding_value = axis, padding_value
        self.exact_padding, self.mode, self.eps = exact_padding, mode, eps
        shape, names = (*self.heads, num_gaussians), named(*(None,) * (len(self.heads) + 1))
        self.delta = nnx.Param(jnp.zeros(shape, param_dtype), **names)
        self.c = nnx.Param(jnp.exp(jax.random.normal(rngs.params(), shape, param_dtype)), **names)

    def weights(self, x: Float[Array, "..."], where: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        """m, in float32 or wider and in the shape of x."""
        axis = _checked_axis(x, self.axis)
        return self._weights(x, _real(x, where, self.padding_value), self.delta[...], self.c[...], axis)

    def _weights(self, u: Array, real: Array | None, delta: Array, c: Array, axis: int) -> Array:
        options: dict[str, Any] = {"exact_padding": self.exact_padding, "mode": self.mode, "eps": self.eps}
        return gaussian_weights(u, delta, c, axis=axis, where=real, **options)

    def __call__(self, x: Float[Array, "..."], where: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        return _at_real(_real(x, where, self.padding_value), (x * self.weights(x, where)).astype(x.dtype), x)


class MultiHeadGaussianAdaptiveAttention(GaussianAdaptiveAttention):
    """N heads, each over a contiguous chunk of `axis`, the last one's with what is left over: x of rank 2 or more -> x's shape.

    num_heads: N; delta and c are [N, M]. num_gaussians: M of each head. options: as in `GaussianAdaptiveAttention`.
    There is no output projection; heads never mix.

    Raises ValueError where a chunk would have fewer than 2 elements.
    """

    def __init__(self, num_heads: int = 4, num_gaussians: int = 5, *, rngs: nnx.Rngs, **options: Any):
        if num_heads < 1:
            raise ValueError(f"num_heads: must be at least 1, got {num_heads}")
        self.heads = (num_heads,)
        super().__init__(num_gaussians, rngs=rngs, **options)

    def weights(self, x: Float[Array, "..."], where: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        """m of every head on its chunk; they sum to N along the axis."""
        axis, (count,) = _checked_axis(x, self.axis), self.heads
        length = x.shape[axis]
        size = length // count
        if size < 2:
            raise ValueError(
                f"x: {count} heads share the {length} elements of axis {self.axis} of {x.shape}, and each needs at "
                f"least 2; give at most {max(length // 2, 1)} heads, or an axis of {2 * count} or more elements"
            )
        given = x, _real(x, where, self.padding_value)
        even = count if length == count * size else count - 1  # heads of one size, done at once

        def chunks(a: Array) -> Array:
            a = jax.lax.slice_in_dim(a, 0, even * size, axis=axis)
            return a.reshape(*a.shape[:axis], even, size, *a.shape[axis + 1 :])

        delta, c = self.delta[...], self.c[...]
        one = functools.partial(self._weights, axis=axis)
        u, real = jax.tree.map(chunks, given)
        m = jax.vmap(one, (axis, axis, 0, 0), axis)(u, real, delta[:even], c[:even])
        m = m.reshape(*x.shape[:axis], even * size, *x.shape[axis + 1 :])
        if even == count:
            return m
        u, real = jax.tree.map(lambda a: jax.lax.slice_in_dim(a, even * size, length, axis=axis), given)
        return jnp.concatenate([m, one(u, real, delta[-1], c[-1])], axis)


class GaussianBlock(nnx.Module):
    """x <- layer(x) + x through L layers; the shape stays.

    num_layers: L. axes, num_heads, num_gaussians: one number for all layers, or one per layer.
    padding_value, options: as in `GaussianAdaptiveAttention`. What is padding in the input is padding in every layer, and
        comes out as it was.

    Raises ValueError for fewer than one layer, and sequences that have not one entry per layer.
    """

    def __init__(
        self,
        num_layers: int = 3,
        *,
        axes: int | Sequence[int] = -1,
        num_heads: int | Sequence[int] = 4,
        num_gaussians: int | Sequence[int] = 5,
        padding_value: float | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if num_layers < 1:
            raise ValueError(f"num_layers: must be at least 1, got {num_layers}")
        self.padding_value = padding_value
        given = {"axes": axes, "num_heads": num_heads, "num_gaussians": num_gaussians}
        each = {name: (value,) * num_layers if isinstance(value, int) else tuple(value) for name, value in given.items()}
        for name, entries in each.items():
            if len(entries) != num_layers:
                raise ValueError(f"{name}: one number, or one for each of the {num_layers} layers, got {given[name]}")
        self.layers = nnx.List(
            [
                MultiHeadGaussianAdaptiveAttention(
                    heads, gaussians, axis=axis, padding_value=padding_value, rngs=rngs, **options
                )
                for axis, heads, gaussians in zip(*each.values(), strict=True)
            ]
        )

    def _states(self, x: Array, real: Array | None) -> Iterator[Array]:
        """x, and what each layer made of it."""
        return itertools.accumulate(self.layers, lambda h, layer: _at_real(real, layer(h, real) + h, h), initial=x)

    def weights(self, x: Float[Array, "..."], where: Bool[Array, "..."] | None = None) -> list[Float[Array, "..."]]:
        """m of every layer, each on what the layers before made of x."""
        real = _real(x, where, self.padding_value)
        return [layer.weights(h, real) for layer, h in zip(self.layers, self._states(x, real), strict=False)]

    def __call__(self, x: Float[Array, "..."], where: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        *_, y = self._states(x, _real(x, where, self.padding_value))
        return y


def importance_factor(weights: Float[Array, "..."], axis: int = -1) -> Float[Array, " D"]:
    """How much weight each feature along `axis` gets, between 0 (least) and 1 (most); all 0 if all get the same.

    weights: of a trained layer over many samples; averaged over all axes but this one.

    Raises ValueError for an axis that they do not have.
    """
    if not -weights.ndim <= axis < weights.ndim:
        raise ValueError(f"axis: weights {weights.shape} have no axis {axis}")
    a = jnp.moveaxis(weights, axis, -1).reshape(-1, weights.shape[axis]).mean(0)
    spread = a.max() - a.min()
    return (a - a.min()) / jnp.where(spread > 0, spread, 1)


class GATPoolHead(nnx.Module):
    """Features of a frozen encoder, [B, ..., D] -> logits [B, num_classes] in float32.

    A Gaussian block, the mean over all axes but the first and the last (time, and the encoder's layers), a linear map.
    dim: D. options: as in `GaussianBlock`. The mean is that of what is not padding; of nothing it is 0.
    """

    def __init__(self, dim: int, num_classes: int, *, rngs: nnx.Rngs, **options: Any):
        self.block = GaussianBlock(rngs=rngs, **options)
        self.out = linear(dim, num_classes, ("embed", None), use_bias=True, rngs=rngs)

    def __call__(self, features: Float[Array, "B ... D"], where: Bool[Array, "..."] | None = None) -> Float[Array, "B classes"]:
        real = _real(features, where, self.block.padding_value)
        x, between = self.block(features, real), tuple(range(1, features.ndim - 1))
        if real is None:
            return self.out(x.mean(between)).astype(jnp.float32)
        total = jnp.where(real, x, 0).sum(between, dtype=jnp.promote_types(x.dtype, jnp.float32))
        return self.out((total / jnp.maximum(real.sum(between), 1)).astype(x.dtype)).astype(jnp.float32)


def _floating(name: str, x: Array) -> Array:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: a floating-point array is needed, got {x.dtype} {x.shape}; convert it first")
    return x


def _fitting(where: Array, name: str, x: Array) -> Bool[Array, "..."]:
    """`where` in the shape of x."""
    try:
        return jnp.broadcast_to(where, x.shape)
    except ValueError:
        raise ValueError(f"where: {jnp.shape(where)} does not broadcast to {name} {x.shape}") from None


def _real(x: Array, where: Array | None, padding_value: float | None) -> Bool[Array, "..."] | None:
    """True at what is not padding, in the shape of x; None if there is none."""
    if where is not None:
        return _fitting(where, "x", x)
    return None if padding_value is None else x != padding_value


def _at_real(real: Array | None, y: Array, padding: Array) -> Array:
    return y if real is None else jnp.where(real, y, padding)


def _checked_axis(x: Array, axis: int) -> int:
    """The axis counted from the front."""
    _floating("x", x)
    if x.ndim < 2 or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"x: needs at least 2 axes, and axis {axis} among them, got shape {x.shape}")
    return axis % x.ndim


def _picture(axes: Any) -> None:
    """The weight of an element by how far it is from the sample's mean."""
    u = np.linspace(-3, 3, 201, dtype=np.float32)
    u = u / u.std(ddof=1)
    for delta, c in (((0.0,), (1.0,)), ((0.0, 0.0), (1.0, 1.0)), ((0.0, 1.5), (1.0, 1.0)), ((1.5, 2.0), (2.0, 3.0))):
        m = gaussian_weights(jnp.asarray(u), jnp.asarray(delta), jnp.asarray(c))
        axes.plot(u, m, label=f"delta {delta}, c {c}")
    axes.set(xlabel="distance from the sample's mean (standard deviations)", ylabel="weight")
    axes.legend(fontsize=8)


PAPER = Paper(
    9,
    "gaam",
    "Gaussian Adaptive Attention is All You Need: Robust Contextual Representations Across Multiple Modalities",
    "normalizers",
    builds=(
        gaussian_weights,
        GaussianAdaptiveAttention,
        MultiHeadGaussianAdaptiveAttention,
        GaussianBlock,
        importance_factor,
        GATPoolHead,
    ),
    picture=_picture,
    costs={"parameters per layer": "2 * N * M", "exponents per layer": "B * T * D", "cache numbers per token": "0"},
    code="gioannides/Gaussian-Adaptive-Attention",
    parity=(
        "MultiHeadGaussianAdaptiveAttention of the package gaussian-adaptive-attention, outputs and gradients, to 1e-6 in "
        "float64 and 1e-5 in float32"
    ),
    notes=(
        "Weights are normalised in log space by default: the authors' product underflows for many or narrow Gaussians, and "
        "their clamp at 1e-8 then makes all weights nearly 0; mode='reference' keeps both. c starts log-normal; the "
        "published package draws it from N(0, 1), whose sign does not matter but whose small values make needles. Padding "
        "enters the statistics as zeros, as in their code; exact_padding=True leaves it out. Through a block padding stays "
        "what it was in the input, where theirs doubles it and takes it for data in the next layer. GATPoolHead stands for the "
        "paper's networks on WavLM, Llama 2 and BEiT features."
    ),
)
