"""Dropout on attention weights as a function of (seed, batch row, head, row, column): the same on every backend.

Whether a cell is dropped is a hash of its coordinates, so tiles can be computed in any order, or again in the backward
pass, without storing a mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnzoo.core.cells import Cells


class Dropout(NamedTuple):
    """``rate`` in [0, 1) and the two words of the key (uint32 ``[2]``)."""

    rate: float
    seed: Array


def dropout_seed(key: Any) -> Array:
    """Two words of a JAX key, typed or raw."""
    data = jax.random.key_data(key) if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return jnp.ravel(data).astype(jnp.uint32)[-2:]


def keep_scale(dropout: Dropout, c: Cells) -> Float[Array, "B N T S"]:
    """What to multiply the weights by: 0 for dropped cells, ``1 / (1 - rate)`` for the others."""
    word = dropout.seed[0]
    for x in (c.b, c.h, c.t, c.s):
        word = _mix(word ^ (_mix(x.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)) + dropout.seed[1]))
    threshold = jnp.uint32(min(round(dropout.rate * 2**32), 2**32 - 1))
    return jnp.where(word >= threshold, jnp.float32(1 / (1 - dropout.rate)), jnp.float32(0))


def _mix(x: Array) -> Array:
    """A bijection of uint32 whose output bits each depend on all input bits (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
