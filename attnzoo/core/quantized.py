"""Keys and values in 8 bits: what a cache holds may be read at half the bytes of bfloat16."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from attnzoo.core.cells import Bound, Geometry, Operand
from attnzoo.core.masks.base import mask as pytree
from attnzoo.core.scores import Score

NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")


@pytree(leaves=("values", "scale"))
class Quantized:
    """``values · scale``, where :func:`attnzoo.core.attention.attention` takes keys or values.

    values: int8 or 8-bit floats, ``[*B, S, K, H]``. scale: float, broadcasts to them with one number per token (width 1) or per
        feature (length 1).
    """

    values: Num[Array, "*B S K H"]
    scale: Float[Array, "*#B #S #K #H"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def expand(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*B S K H"]:
        """What it stands for."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)

    def check(self, name: str) -> None:
        """Raises TypeError for values that are no 8-bit numbers, ValueError for a scale of another shape."""
        if jnp.dtype(self.values.dtype).name not in NARROW:
            raise TypeError(f"{name}: Quantized holds {' or '.join(NARROW)}, got {self.values.dtype}")
        values, scale = self.values.shape, jnp.shape(self.scale)
        fits = len(scale) == len(values) >= 3 and all(n in (1, m) for n, m in zip(scale, values, strict=True))
        if not fits or (scale[-3] > 1 and scale[-1] > 1):
            raise ValueError(
                f"{name}: the scale of Quantized has one number per token [..., S, K, 1] or per feature [..., 1, K, H] of its "
                f"values {values}, got {scale}"
            )


def quantize(
    x: Float[Array, "*B S K H"], dtype: DTypeLike = jnp.int8, *, per: Literal["token", "feature"] = "token"
) -> Quantized:
    """x in 8 bits, rounded to the nearest, with the scale that brings its largest entry to the end of the range.

    per: "token" has a scale for each token and head, so tokens can be appended one by one; "feature" one for each feature of a
        head, which suits keys, whose features differ in size (Liu et al., 2024, arXiv 2402.02750).

    Raises ValueError for another ``dtype`` or ``per``.
    """
    name = jnp.dtype(dtype).name
    if name not in NARROW or per not in ("token", "feature"):
        raise ValueError(f"quantize: dtype is one of {', '.join(NARROW)} and per 'token' or 'feature', got {name} and {per!r}")
    most = 127.0 if name == "int8" else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    top = jnp.abs(x).max(-1 if per == "token" else -3, keepdims=True)
    scale = jnp.where(top > 0, top, 1) / most
    scaled = x / scale
    return Quantized((jnp.round(scaled) if name == "int8" else jnp.clip(scaled, -most, most)).astype(dtype), scale)


@pytree(leaves=("scale",))
class KeyScale(Score):
    """``s · scale`` of the key: what quantized keys leave to do to their logits. scale ``[B|1, S, K, 1]``."""

    scale: Float[Array, "#B S K 1"]

    def bind(self, g: Geometry) -> Bound:
        by_head = jnp.repeat(jnp.moveaxis(self.scale, 1, 3)[:, :, 0], g.heads // self.scale.shape[2], axis=1)
        return Bound((Operand(by_head[:, :, None], "aligned"),), lambda s, c, scale: s * scale)


def by_token(scale: Any) -> bool:
    """Whether a scale differs between tokens."""
    return scale.shape[1] > 1
