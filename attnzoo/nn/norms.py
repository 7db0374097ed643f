"""Normalisation over features, with logical axis names."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnzoo.errors import unknown
from attnzoo.nn.linear import named


def norm(
    kind: str,
    dim: int,
    *,
    epsilon: float = 1e-6,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.RMSNorm | nnx.LayerNorm:
    """[..., D] -> [..., D]. kind: "rms" (a gain), "plain_rms" (no parameters) or "layer" (gain and bias).

    Statistics are float32; the scale is replicated when the model is sharded.
    """
    options: dict[str, Any] = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    if kind == "rms":
        return nnx.RMSNorm(dim, scale_metadata=named(None), **options)
    if kind == "plain_rms":
        return nnx.RMSNorm(dim, use_scale=False, **options)
    if kind == "layer":
        return nnx.LayerNorm(dim, scale_metadata=named(None), bias_metadata=named(None), **options)
    raise unknown("norm", kind, ["rms", "plain_rms", "layer"])
