"""Moving tokens between devices: into and out of zig-zag order, around the ring, and in exchange for heads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from attnzoo.core.context.layout import Layout

Names = tuple[str, ...]


def hop(tree: Any, names: Names, devices: int, by: int) -> Any:
    """Every device's arrays, ``by`` devices further along the ring."""
    by %= devices
    if by == 0:
        return tree
    moves = [(d, (d + by) % devices) for d in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, names, moves), tree)


def into_slots(x: Array, layout: Layout, names: Names, axis: int) -> Array:
    """A device's stretch of the sequence along ``axis`` -> its chunks ``[slots, ...]``.

    In natural order device d has halves 2d and 2d + 1. The first halves of all devices go to different devices, and so do
    the second ones, so two permutations move everything.
    """
    if not layout.zigzag:
        return x[None]
    halves = jnp.split(x, 2, axis=axis)
    first, second = (lax.ppermute(half, names, _moves(layout, n)) for n, half in enumerate(halves))
    even = lax.axis_index(names) % 2 == 0  # where chunk d came as a first half
    return jnp.stack([jnp.where(even, first, second), jnp.where(even, second, first)])


def out_of_slots(x: Array, layout: Layout, names: Names, axis: int) -> Array:
    """The way back: chunks ``[slots, ...]`` -> the device's stretch along ``axis`` (counted without the slots)."""
    if not layout.zigzag:
        return x[0]
    even = lax.axis_index(names) % 2 == 0
    halves = jnp.where(even, x[0], x[1]), jnp.where(even, x[1], x[0])
    back = [lax.ppermute(half, names, [(there, here) for here, there in _moves(layout, n)]) for n, half in enumerate(halves)]
    return jnp.concatenate(back, axis=axis)


def _moves(layout: Layout, half: int) -> list[tuple[int, int]]:
    """Where each device's first (0) or second (1) half goes."""
    n = layout.devices
    return [(d, c if (c := 2 * d + half) < n else 2 * n - 1 - c) for d in range(n)]


def to_heads(x: Array, names: Names) -> Array:
    """``[B, T/n, N, H]``, some tokens of all heads -> ``[B, T, N/n, H]``, some heads of all tokens."""
    return lax.all_to_all(x, names, split_axis=2, concat_axis=1, tiled=True)


def to_tokens(x: Array, names: Names) -> Array:
    """The way back from :func:`to_heads`."""
    return lax.all_to_all(x, names, split_axis=1, concat_axis=2, tiled=True)
