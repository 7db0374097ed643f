"""Operands of masks and scores, cut to a pair of chunks and, for gradients, added to again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from attnzoo.core.cells import Bound, Kind, Operand


class Chunks(NamedTuple):
    """Queries and keys of the whole call and of a chunk."""

    queries: int
    keys: int
    rows: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Window:
    """How one operand is held by a device and cut: what of an :class:`Operand` is not the array.

    by_row: it differs by query, and a device holds those of its own rows, ``[slots, B|1, N|1, rows, S|1]``. All others are
    held whole along queries and keys.
    """

    kind: Kind
    block: tuple[int, int] | None
    by_row: bool

    def place(self, x: Array, c: Chunks, slot: Any, i: Any, j: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """Start and size, in the array as it is held, of what belongs to row chunk ``i`` (in ``slot``) and key chunk ``j``."""
        if self.kind == "whole":
            return (0,) * x.ndim, x.shape
        if self.kind == "distance":
            return (0, i * c.rows - j * c.columns + c.keys - c.columns), (x.shape[0], c.rows + c.columns - 1)
        if self.kind == "blocks":
            assert self.block is not None
            down, across = c.rows // self.block[0], c.columns // self.block[1]
            return (0, 0, i * down, j * across), (*x.shape[:2], down, across)
        one = x.shape[-1] == 1
        start, size = (0 if one else j * c.columns), (1 if one else c.columns)
        if self.by_row:
            return (slot, 0, 0, 0, start), (1, *x.shape[1:4], size)
        return (0, 0, 0, start), (*x.shape[:3], size)

    def cut(self, x: Array, c: Chunks, slot: Any, i: Any, j: Any) -> Operand:
        start, size = self.place(x, c, slot, i, j)
        part = x if size == x.shape else lax.dynamic_slice(x, start, size)
        return Operand(part[0] if self.by_row else part, self.kind, self.block)

    def add(self, x: Array, d: Array, c: Chunks, slot: Any, i: Any, j: Any) -> Array:
        """``x`` with the gradient of a cut part added where it was cut."""
        start, size = self.place(x, c, slot, i, j)
        d = d[None] if self.by_row else d
        if size == x.shape:
            return x + d
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, start, size) + d, start)


def window_of(op: Operand) -> Window:
    return Window(op.kind, op.block, op.kind == "aligned" and op.x.shape[2] > 1)


def cuttable(bound: Bound | None, c: Chunks) -> Bound | None:
    """With operands that borders of chunks do not cut: blocks made smaller where chunks are no multiple of them."""
    if bound is None:
        return None
    return bound._replace(operands=tuple(_smaller_blocks(op, c) if op.kind == "blocks" else op for op in bound.operands))


def _smaller_blocks(op: Operand, c: Chunks) -> Operand:
    assert op.block is not None
    x, block = jnp.asarray(op.x), []
    for axis, old, chunk, length in zip((2, 3), op.block, (c.rows, c.columns), (c.queries, c.keys), strict=True):
        new = math.gcd(old, chunk)
        block.append(new)
        x = x if new == old else jnp.take(x, np.arange(length // new) * new // old, axis=axis)
    return Operand(x, "blocks", (block[0], block[1]))
