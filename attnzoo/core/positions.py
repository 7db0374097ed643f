"""What is done to queries and keys by position: rotary embeddings, sinusoids, ALiBi's slopes.

Everything here is a pure function or a frozen dataclass without arrays, so it can be closed over, hashed
and compared; what needs arrays implements `Positions` or `PositionPlan` elsewhere. Angles are float32
whatever the dtype of what is rotated.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864); linear interpolation, Chen et al. 2023 (arXiv 2306.15595);
YaRN and NTK-aware scaling, Peng et al. 2023 (arXiv 2309.00071); sinusoids, Vaswani et al. 2017 §3.5;
ALiBi, Press et al. 2021 (arXiv 2108.12409).
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnzoo.core.cells import Known


def _static(cls: type) -> type:
    """Register a frozen dataclass as a pytree without leaves: all of it is structure."""
    fields = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    return jax.tree_util.register_dataclass(cls, data_fields=[], meta_fields=fields)


def inverse_frequencies(theta: float, width: int) -> np.ndarray:
    """theta^(-2i/width) for i < width/2, in float64."""
    return theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)


class Scaling(Protocol):
    """How a RoPE is stretched beyond the length it was trained on."""

    def frequencies(self, theta: float, width: int, pos: Array) -> tuple[Array | np.ndarray, float]:
        """Angles per position step [width/2] or [*pos.shape, width/2], and the factor on cos and sin."""
        ...


def _check_factor(factor: float) -> None:
    if factor < 1:
        raise ValueError(f"factor: positions are stretched by a factor of at least 1, got {factor}")


@_static
@dataclass(frozen=True)
class Linear:
    """Position interpolation: every angle divided by `factor` (≥ 1)."""

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, theta, width, pos):
        return inverse_frequencies(theta, width) / self.factor, 1.0


@_static
@dataclass(frozen=True)
class NTK:
    """NTK-aware scaling: theta becomes theta · factor^(w/(w-2)), w the rotated width.

    The fastest angle stays, the slowest is divided by `factor` (≥ 1).
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, theta, width, pos):
        return inverse_frequencies(theta * self.factor ** (width / (width - 2)), width), 1.0


@_static
@dataclass(frozen=True)
class DynamicNTK:
    """NTK-aware scaling whose factor grows with the length: factor · len/original_length - (factor - 1).

    len is the largest position of the row + 1; up to `original_length` nothing changes. Because the angles
    depend on the length, a key rotated when the sequence was shorter differs from one rotated later:
    cached decoding past `original_length` is not what a full forward pass gives (as in every
    implementation that caches rotated keys).
    """

    factor: float
    original_length: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)

    def frequencies(self, theta, width, pos):
        length = jnp.max(pos, axis=-1, keepdims=True)[..., None].astype(jnp.float32) + 1
        length = jnp.maximum(length, self.original_length)
        factor = self.factor * length / self.original_length - (self.factor - 1)
        # theta' = theta · factor^(w/(w-2)), so angle i is multiplied by factor^(-2i/(w-2)).
        exponent = np.arange(0, width, 2) / (width - 2)
        return jnp.float32(inverse_frequencies(theta, width)) * factor ** -jnp.float32(exponent), 1.0


@_static
@dataclass(frozen=True)
class Llama3:
    """Scaling by wavelength: long waves divided by `factor`, short ones kept, a linear blend between.

    A wave counts as short when it turns more than `high` times within `original_length` positions, as
    long when fewer than `low` times.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not self.low < self.high:
            raise ValueError(f"low, high: low must be below high, got {self.low} and {self.high}")

    def frequencies(self, theta, width, pos):
        inverse = inverse_frequencies(theta, width)
        turns = self.original_length * inverse / (2 * math.pi)
        keep = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return inverse * (keep + (1 - keep) / self.factor), 1.0


@_static
@dataclass(frozen=True)
class YaRN:
    """Scaling "by parts" with a temperature on the logits (Peng et al. 2023, §3.2 to §3.4).

    factor: new length / original length (≥ 1).
    original_length: the length the model was trained on.
    beta_fast, beta_slow: angles that turn more than beta_fast times within original_length are kept, fewer
        than beta_slow times are divided by `factor`; between them a ramp, linear in the angle's number.
    attention_factor: what cos and sin are multiplied by; None is 0.1·ln(factor) + 1.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not self.beta_slow < self.beta_fast:
            raise ValueError(f"beta_slow, beta_fast: beta_slow is not below beta_fast: {self.beta_slow}, {self.beta_fast}")

    def frequencies(self, theta, width, pos):
        def index(turns: float) -> float:
            """The number of the angle that turns `turns` times within the original length."""
            return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(index(self.beta_fast)), 0)
        high = min(math.ceil(index(self.beta_slow)), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
        inverse = inverse_frequencies(theta, width)
        attention_factor = self.attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(self.factor) + 1.0
        return inverse * (1 - ramp) + inverse / self.factor * ramp, attention_factor


@_static
@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding: pairs of features turned by an angle proportional to the position.

    theta: base of the angles, theta^(-2i/w) per position for pair i of w/2.
    fraction: share of the head width that is rotated (the first features); the rest passes unchanged.
    scaling: None, Linear, NTK, DynamicNTK, Llama3 or YaRN.
    interleaved: pairs are features (2i, 2i+1) as in the paper; by default (i, i + w/2) as in Llama.
    axes: 1 for sequences, 2 or 3 for grids (axial: the rotated width is split evenly between the axes); a
        tuple gives each axis' share of the rotated width in features.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling | None = None
    interleaved: bool = False
    axes: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"theta: must be above 1, got {self.theta}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction: must be in (0, 1], got {self.fraction}")
        if self.num_axes < 1:
            raise ValueError(f"axes: at least one axis is needed, got {self.axes}")

    @property
    def num_axes(self) -> int:
        return self.axes if isinstance(self.axes, int) else len(self.axes)

    def widths(self, head_dim: int) -> tuple[int, ...]:
        """Features rotated by each axis, for heads of width `head_dim`; all even.

        Raises ValueError when the rotated width does not split into pairs along every axis.
        """
        rotated = self.fraction * head_dim
        if rotated != int(rotated):
            raise ValueError(f"fraction: {self.fraction} of head_dim={head_dim} is {rotated} features, not a whole number")
        if isinstance(self.axes, int):
            if rotated % (2 * self.axes):
                raise ValueError(
                    f"head_dim: RoPE turns pairs along {self.axes} axes, so the rotated width must be a "
                    f"multiple of {2 * self.axes}; head_dim={head_dim} with fraction={self.fraction} "
                    f"rotates {int(rotated)} features"
                )
            widths = (int(rotated) // self.axes,) * self.axes
        else:
            widths = self.axes
            if sum(widths) != rotated or any(w % 2 for w in widths):
                raise ValueError(
                    f"axes: the shares {widths} must be even and sum to the rotated width {int(rotated)} "
                    f"(head_dim={head_dim}, fraction={self.fraction})"
                )
        if min(widths) < 4 and isinstance(self.scaling, NTK | DynamicNTK):
            raise ValueError(f"scaling: NTK needs at least 4 rotated features per axis, got {widths}")
        return widths

    def rotate(self, x: Float[Array, "*B T N H"], pos: Int[Array, "..."]) -> Float[Array, "*B T N H"]:
        """x with every head turned to its token's position; same dtype as x.

        pos: [T] or [*B, T]; with several axes [T, axes] or [*B, T, axes]. Need not be integers.
        Raises ValueError for widths that do not pair up and for positions that do not match x.
        """
        pos = jnp.asarray(pos)
        tokens = pos.shape if self.num_axes == 1 else pos.shape[:-1]
        if self.num_axes > 1 and (pos.ndim < 2 or pos.shape[-1] != self.num_axes):
            raise ValueError(f"pos: {self.num_axes} axes need positions [..., T, {self.num_axes}], got {pos.shape}")
        if x.ndim < 3 or tokens not in ((x.shape[-3],), x.shape[:-2]):
            raise ValueError(
                f"pos: for x {x.shape} (*B, T, N, H) positions must be [T] or [*B, T]"
                + (f" + [{self.num_axes}]" if self.num_axes > 1 else "")
                + f", got {pos.shape}"
            )
        parts, start = [], 0
        for axis, width in enumerate(self.widths(x.shape[-1])):
            along = pos if self.num_axes == 1 else pos[..., axis]
            parts.append(self._turn(x[..., start : start + width], along))
            start += width
        return jnp.concatenate([*parts, x[..., start:]], axis=-1) if start < x.shape[-1] or axis else parts[0]

    def _turn(self, x: Array, pos: Array) -> Array:
        width = x.shape[-1]
        factor = 1.0
        inverse: Array | np.ndarray = inverse_frequencies(self.theta, width)
        if self.scaling is not None:
            inverse, factor = self.scaling.frequencies(self.theta, width, pos)
        angle = pos[..., None].astype(jnp.float32) * jnp.asarray(inverse, jnp.float32)
        cos, sin = (f(angle)[..., None, :] * factor for f in (jnp.cos, jnp.sin))  # [..., T, 1, w/2]
        f32 = x.astype(jnp.float32)
        if self.interleaved:
            a, b = f32[..., 0::2], f32[..., 1::2]
            turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
        else:
            a, b = jnp.split(f32, 2, axis=-1)
            turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        return turned.astype(x.dtype)


class Positions(Protocol):
    """What a mixer does to its queries and keys; `RoPE` is one."""

    @property
    def num_axes(self) -> int:
        """1 for sequences; positions on a grid have a trailing axis of this size."""
        ...

    def rotate(self, x: Float[Array, "*B T N H"], pos: Int[Array, "..."]) -> Float[Array, "*B T N H"]:
        """x [*B, T, N, H] at positions pos [T] or [*B, T]; queries and keys may have different numbers of heads."""
        ...


class PositionPlan(Protocol):
    """Positions that hold arrays of every layer's own (tables per head, drawn or learned): built where heads are known."""

    def build(self, num_heads: int, head_dim: int, *, rngs: Any) -> Positions:
        """num_heads: of the keys; query heads of one group are treated alike. rngs: of the module that is being built."""
        ...


def positions_for(positions: Positions | PositionPlan | None, num_heads: int, head_dim: int, *, rngs: Any) -> Positions | None:
    """What a mixer with these (key) heads keeps of its argument `positions`: a plan is built, all else stays."""
    build = getattr(positions, "build", None)
    return positions if build is None else build(num_heads, head_dim, rngs=rngs)  # type: ignore[return-value]


def grid_positions(*sizes: int) -> Int[Array, "cells axes"]:
    """Coordinates of the cells of a grid in row-major order, int32 [prod(sizes), len(sizes)]."""
    axes = jnp.meshgrid(*(jnp.arange(size, dtype=jnp.int32) for size in sizes), indexing="ij")
    return jnp.stack([axis.reshape(-1) for axis in axes], axis=-1)


def sinusoidal_positions(
    positions: int | Int[Known, "*B T"], dim: int, *, interleave: bool = True, base: float = 10000.0
) -> Float[Array, "*B T D"]:
    """Vaswani et al. 2017, §3.5: sin(pos / base^(2i/D)) and its cosine, float32.

    positions: a length T (positions 0..T-1) or an array of positions.
    interleave: feature 2i is the sine and 2i+1 the cosine (the paper); False puts all sines first.
    Raises ValueError for an odd `dim`.
    """
    if dim % 2:
        raise ValueError(f"dim: sinusoids come in pairs, so dim must be even, got {dim}")
    pos = jnp.arange(positions) if isinstance(positions, int) else jnp.asarray(positions)
    angle = pos[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(base, dim), jnp.float32)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if interleave:
        return jnp.stack([sin, cos], axis=-1).reshape(*angle.shape[:-1], dim)
    return jnp.concatenate([sin, cos], axis=-1)


@functools.cache
def _alibi_slopes(num_heads: int) -> tuple[float, ...]:
    power = 1 << (num_heads.bit_length() - 1)  # the largest power of two that is at most num_heads
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    # Remaining heads take every other slope of the sequence twice as fine.
    finer = [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(0, 2 * (num_heads - power), 2)]
    return tuple(slopes + finer)


def alibi_slopes(num_heads: int) -> Float[Array, "N"]:
    """Slope per head, float32: 2^(-8/N), 2^(-16/N), ... for N a power of two.

    Other head counts take the slopes of the next lower power of two and fill up with every other slope of
    the next higher one (Press et al. 2021, appendix). Raises ValueError for num_heads < 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: must be at least 1, got {num_heads}")
    return jnp.asarray(_alibi_slopes(num_heads), jnp.float32)
