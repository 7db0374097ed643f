"""Fourier Position Embedding (Hua et al., 2024, ICML 2025, arXiv 2412.17739): FoPE.

RoPE gives each pair of features one frequency w_i = theta^(-2i/H), i < H/2. What a layer sees is not that pure: linear maps
and activations before it mix frequencies, and frequencies that never finish a period within the training length N act as a
trained constant. FoPE makes both explicit, so that attention extends periodically beyond N. With the floor
w_floor = 2 pi / N and the kept frequencies W = {w_i >= w_floor}, M of them, component m of a head at position n is

    f_m(n) = e^{i w_m n} + Σ_{w in W} a_{m,w} e^{i w n}   if w_m is kept,  with small fixed random a;
    f_m(n) = 1                                             otherwise: no position at all.             (paper §4)

As in the released code, real and imaginary part have coefficients of their own, C_cos, C_sin [heads, M, M'] = E + noise
with E the identity, and act as a rotation would:

    cosF[n, h] = cos(n W) C_cos[h],   sinF[n, h] = sin(n W) C_sin[h]                               [M']
    q' = q · [cosF, cosF] + rotate_half(q) · [sinF, sinF],     rotate_half(x1, x2) = (-x2, x1);     the same for k

with cosF = 1, sinF = 0 at the components without position. The coefficients are drawn per layer and are not trained. Since f
is not of unit modulus, scores depend on both positions, and not only on their difference; nearly so for small gains.

Costs: as RoPE, and 2 T M M' multiply-adds per head for the tables. The cache is unchanged: it holds k'.

The formula is the paper's; initialisation, the context extension and two quirks of the code (`reference_quirks`) follow
TsinghuaC3I/Fourier-Position-Embedding.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.core.positions import RoPE, inverse_frequencies
from attnzoo.nn.linear import named
from attnzoo.paper import Paper


def floor_frequency(train_length: int, ratio: float = 1.0) -> float:
    """2 pi / N · ratio: slower frequencies do not finish a period within N tokens."""
    return 2 * math.pi / train_length * ratio


def _check_floor(train_length: int, floor_ratio: float) -> None:
    if floor_ratio < 0:
        raise ValueError(f"floor_ratio: must not be negative, got {floor_ratio}")
    if train_length < 1 or floor_frequency(train_length, floor_ratio) > 1:
        raise ValueError(
            f"train_length: the fastest frequency, 1, needs 2 pi · floor_ratio tokens for a period; in {train_length} with "
            f"floor_ratio={floor_ratio} none finishes one"
        )


@dataclasses.dataclass(frozen=True)
class ZeroedBelowFloor:
    """A scaling of `RoPE`: angles that do not finish a period within `train_length` stand still.

    Raises ValueError for a length in which none finishes one, and a negative `floor_ratio`.
    """

    train_length: int
    floor_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check_floor(self.train_length, self.floor_ratio)

    def frequencies(self, theta: float, width: int, pos: Array) -> tuple[np.ndarray, float]:
        w = inverse_frequencies(theta, width)
        return np.where(w >= floor_frequency(self.train_length, self.floor_ratio), w, 0.0), 1.0


def rope_zeroed(train_length: int, *, theta: float = 10000.0, floor_ratio: float = 1.0) -> RoPE:
    """FoPE without its series (C = I): RoPE whose under-trained frequencies are zeroed. Exactly relative.

    Raises ValueError for a length in which no frequency finishes a period.
    """
    return RoPE(theta=theta, scaling=ZeroedBelowFloor(train_length, floor_ratio))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoPEConfig:
    """FoPE before the heads are known: give it as `positions=` to a mixer, or to a model's configuration.

    train_length: N. It sets the floor once and for all; evaluation at other lengths does not change it.
    theta: base of the frequencies. floor_ratio: multiplies the floor.
    gain: of the random coefficients (the paper: 0.3 for 60M parameters, 0.4 for 180M, 0.6 for 1.2B).
    cap: at most so many components get a series; None for all that are kept (the paper's formula).
    per_head: a table for each (key) head; otherwise all share one. separate_basis: C_sin and C_cos differ.
    learnable: train the coefficients.
    reference_quirks: what the released code does: cap = H/4, which leaves some components with noise alone and pads
        others although their frequency is kept; and sinF = 1 at padded components, where q' is turned by 45 degrees and
        stretched by sqrt 2.

    Raises ValueError for a length in which no frequency finishes a period, and other sizes that are not positive.
    """

    train_length: int
    theta: float = 10000.0
    floor_ratio: float = 1.0
    gain: float = 0.3
    cap: int | None = None
    per_head: bool = True
    separate_basis: bool = True
    learnable: bool = False
    reference_quirks: bool = False

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"theta: must be above 1, got {self.theta}")
        if self.gain < 0:
            raise ValueError(f"gain: must not be negative, got {self.gain}")
        if self.cap is not None and (self.cap < 1 or self.reference_quirks):
            raise ValueError(f"cap: at least one component, and reference_quirks sets its own; got {self.cap}")
        _check_floor(self.train_length, self.floor_ratio)

    def kept(self, head_dim: int) -> Float[np.ndarray, "M"]:
        """W, the frequencies that finish a period within the training length, descending.

        Raises ValueError for an odd head_dim.
        """
        if head_dim % 2:
            raise ValueError(f"head_dim: features are turned in pairs, so it must be even, got {head_dim}")
        w = inverse_frequencies(self.theta, head_dim)
        return w[w >= floor_frequency(self.train_length, self.floor_ratio)]

    def outputs(self, head_dim: int) -> int:
        """M', the components that get a series. Raises ValueError where the released code gives it to none."""
        if self.reference_quirks and head_dim < 4:
            raise ValueError(f"head_dim: reference_quirks gives head_dim / 4 components a series: at least 4, got {head_dim}")
        cap = head_dim // 4 if self.reference_quirks else self.cap
        kept = len(self.kept(head_dim))
        return kept if cap is None else min(kept, cap)

    def build(self, num_heads: int, head_dim: int, *, rngs: nnx.Rngs) -> "FourierPositionEmbedding":
        """The positions of one layer, with coefficients of its own."""
        return FourierPositionEmbedding(self, num_heads, head_dim, rngs=rngs)


class FourierCoefficients(nnx.Variable):
    """Coefficients that are kept with the model and not trained."""


def _eye(kept: int, outputs: int) -> Float[np.ndarray, "M outputs"]:
    """E: component i starts from frequency number i·ceil(M / M')."""
    step = -(-kept // outputs)
    return (np.arange(kept)[:, None] == step * np.arange(outputs)).astype(np.float32)


def fope_tables(
    pos: Int[Array, "*B T"],
    frequencies: Float[np.ndarray, "M"],
    c_sin: Float[Array, "heads M outputs"],
    c_cos: Float[Array, "heads M outputs"],
    width: int,
    *,
    sin_pad: float = 0.0,
) -> tuple[Float[Array, "*B T heads width"], Float[Array, "*B T heads width"]]:
    """(sinF, cosF) in float32; components past those with a series get cosF = 1 and sinF = sin_pad.

    width: H/2, the pairs of a head.
    """
    angle = pos[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    missing = width - c_sin.shape[-1]

    def series(wave: Array, c: Array, fill: float) -> Array:
        mixed = jnp.einsum("...tm,hmj->...thj", wave, c.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
        return jnp.pad(mixed, [(0, 0)] * (mixed.ndim - 1) + [(0, missing)], constant_values=fill)

    return series(jnp.sin(angle), c_sin, sin_pad), series(jnp.cos(angle), c_cos, 1.0)


class FourierPositionEmbedding(nnx.Module):
    """FoPE of one layer: `rotate` as `RoPE` has it.

    num_heads: heads that have a table of their own, those of the keys; query heads of one group share it.
    head_dim: H.
    """

    num_axes = 1

    def __init__(self, config: FoPEConfig, num_heads: int, head_dim: int, *, rngs: nnx.Rngs):
        self.config, self.num_heads, self.head_dim = config, num_heads, head_dim
        kind: Any = nnx.Param if config.learnable else FourierCoefficients
        axes = named("kv_heads" if config.per_head else None, None, None)
        self.sin = kind(self._draw(rngs), **axes)
        self.cos = kind(self._draw(rngs), **axes) if config.separate_basis else self.sin

    def _draw(self, rngs: nnx.Rngs) -> Array:
        """E + N(0, std²) with Xavier's std as torch counts the fans of such an array."""
        kept, outputs = len(self.config.kept(self.head_dim)), self.config.outputs(self.head_dim)
        heads = self.num_heads if self.config.per_head else 1
        fans = kept * outputs + heads * outputs if self.config.per_head else kept + outputs
        std = self.config.gain * math.sqrt(2 / fans)
        return jnp.asarray(_eye(kept, outputs)) + std * jax.random.normal(rngs.params(), (heads, kept, outputs))

    def tables(self, pos: Int[Array, "*B T"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(sinF, cosF) [*B, T, heads, H/2] at any positions."""
        pad = 1.0 if self.config.reference_quirks else 0.0
        frequencies = self.config.kept(self.head_dim)
        return fope_tables(pos, frequencies, self.sin[...], self.cos[...], self.head_dim // 2, sin_pad=pad)

    def rotate(self, x: Float[Array, "*B T N H"], pos: Int[Array, "..."]) -> Float[Array, "*B T N H"]:
        """q' or k'. Raises ValueError for heads or positions that do not match."""
        pos = jnp.asarray(pos)
        if x.ndim < 3 or pos.shape not in ((x.shape[-3],), x.shape[:-2]):
            raise ValueError(f"pos: for x {x.shape} (*B, T, N, H) positions must be [T] or [*B, T], got {pos.shape}")
        if x.shape[-1] != self.head_dim or x.shape[-2] % self.num_heads:
            raise ValueError(
                f"x: these tables are for heads of width {self.head_dim}, a multiple of {self.num_heads} of them; got {x.shape}"
            )
        sin, cos = self.tables(pos)
        sin, cos = (jnp.repeat(table, x.shape[-2] // table.shape[-2], axis=-2) for table in (sin, cos))
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def fope_expand(
    positions: FourierPositionEmbedding, train_length: int, *, rngs: nnx.Rngs, random: bool = True
) -> FourierPositionEmbedding:
    """For continued training at another length: floor and M of that length, coefficients kept where there were any.

    random: new entries are drawn as at the start; otherwise they are 0. A shorter length cuts coefficients off.
    """
    made = FourierPositionEmbedding(
        dataclasses.replace(positions.config, train_length=train_length), positions.num_heads, positions.head_dim, rngs=rngs
    )
    for name in ("sin", "cos"):
        old, new = getattr(positions, name)[...], getattr(made, name)
        rows, columns = (min(a, b) for a, b in zip(old.shape[1:], new.shape[1:], strict=True))
        base = new[...] if random else jnp.zeros_like(new[...])
        new[...] = base.at[:, :rows, :columns].set(old[:, :rows, :columns])
    return made


@dataclasses.dataclass(frozen=True)
class FoPESpectrum:
    """What the components of a layer are made of.

    frequencies: W [M]. power: [heads, M, M'] mean of the squared coefficients of sine and cosine.
    own: [heads, M'] share of a component's power in the frequency it began from; 1 is RoPE.
    zeroed: pairs of features without position.
    """

    frequencies: Float[np.ndarray, "M"]
    power: Float[np.ndarray, "heads M outputs"]
    own: Float[np.ndarray, "heads outputs"]
    zeroed: int

    def plot(self, axes: Any, head: int = 0) -> None:
        """Amplitude of every frequency in every component of one head."""
        image = axes.imshow(np.sqrt(self.power[head]), cmap="Blues", aspect="auto")
        axes.set(xlabel="component m", ylabel="frequency, fast to slow", title=f"FoPE's series ({self.zeroed} pairs zeroed)")
        axes.figure.colorbar(image, ax=axes, label="amplitude")


def fope_spectrum(positions: FourierPositionEmbedding) -> FoPESpectrum:
    """The spectrum of every component of a layer."""
    power = np.asarray((positions.sin[...] ** 2 + positions.cos[...] ** 2) / 2)
    own = (power * _eye(*power.shape[1:])).sum(1) / power.sum(1)
    kept = positions.config.kept(positions.head_dim)
    return FoPESpectrum(kept, power, own, positions.head_dim // 2 - power.shape[2])


def _picture(axes: Any) -> None:
    fope_spectrum(FoPEConfig(train_length=512).build(8, 64, rngs=nnx.Rngs(0))).plot(axes)


PAPER = Paper(
    90,
    "fope",
    "Fourier Position Embedding: Enhancing Attention's Periodic Extension for Length Generalization",
    "positions",
    builds=(
        FoPEConfig,
        FourierPositionEmbedding,
        fope_tables,
        floor_frequency,
        fope_spectrum,
        rope_zeroed,
        fope_expand,
        "attnzoo.core.positions:PositionPlan",
    ),
    picture=_picture,
    costs={
        "cache numbers per token": "2 * K * H",
        "coefficients per layer (fixed)": "2 * K * M * M",
        "multiply-adds of the tables": "2 * T * K * M * M",
    },
    code="TsinghuaC3I/Fourier-Position-Embedding",
    notes=(
        "With grouped heads the tables belong to the key heads, so that a query and the keys it meets share theirs. Default "
        "is the paper's formula without cap; reference_quirks=True is the released code. At the size of the claim zeroing "
        "the slow frequencies alone does as well as the series."
    ),
)
