"""A rectangle of the logits as backends that work by tiles take it: a whole call, or a part of one that devices share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnzoo.core.blocks import BlockMap
from attnzoo.core.cells import Bound, Geometry
from attnzoo.core.dropout import Dropout
from attnzoo.core.weights import Weights


class Part(NamedTuple):
    """``q [B, T, N, H]``, ``k [B, S, K, H]`` (one of them scaled), ``v [B, S, K, Hv]``, their place in the call (``geometry``),
    and the mask and score with their operands cut to the part. ``block_map`` is of the part. Where ``pages [B, M]`` are given,
    k and v are pools ``[P, page, K, ·]``. k and v may hold 8-bit numbers (TPU kernels); ``value_scale`` then has a factor for
    each token of v, where there is one."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    geometry: Geometry
    mask: Bound | None
    score: Bound | None
    weights: Weights
    dropout: Dropout | None
    block_map: BlockMap
    pages: Int[Array, "B M"] | None = None
    value_scale: Float[Array, "B S K"] | None = None


class PartGradients(NamedTuple):
    """Of q, k, v and the operands of the score; None for those that are whole numbers."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K Hv"]
    score: list[Array | None]


def no_gradient(x: Any) -> Any:
    """The cotangent of an array that no gradient reaches."""
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(np.shape(x), jax.dtypes.float0)
