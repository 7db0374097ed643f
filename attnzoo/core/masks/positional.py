"""Masks that compare token positions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from attnzoo.core.cells import Bound, Geometry, Operand, concrete
from attnzoo.core.intervals import Intervals, span
from attnzoo.core.masks.base import Mask, mask

_FAR = 2**30


def row_positions(g: Geometry) -> Any:
    """Positions of the rows, ``[B|1, 1, T]``; numpy when known."""
    if g.q_positions is None:
        return np.arange(g.queries, dtype=np.int32)[None, None]
    known = concrete(g.q_positions)
    return (g.q_positions if known is None else known)[:, None, :]


def as_known(x: Any) -> Any:
    """numpy (or a Python int) when the value is known, else unchanged."""
    known = concrete(x)
    return x if known is None else known


def _leaf_operand(x: Any) -> tuple[tuple[Operand, ...], Any]:
    """A number: baked in when it is a Python int, else carried as an array ``[] or [B]``."""
    if isinstance(x, int):
        return (), x
    x = jnp.asarray(x)
    return (Operand(x.reshape(-1, 1, 1, 1), "aligned"),), None


@mask(leaves=("offset",))
class Causal(Mask):
    """A query at position q sees keys at positions ``k <= q + offset``.

    offset: tokens it may look ahead; an int, or an int32 array (traced values welcome). To line up the *ends* of T queries
    and S keys, give ``q_positions`` to the call, or ``offset = S - T``.
    """

    offset: int | Int[Array, ""] = 0

    def bind(self, g: Geometry) -> Bound:
        ops, fixed = _leaf_operand(self.offset)
        return Bound(ops, lambda c, *o: c.k <= c.q + (o[0] if o else fixed), fixed if g.plain else None)

    def intervals(self, g: Geometry) -> Intervals:
        return span(-_FAR, row_positions(g) + as_known(self.offset) + 1)

    def __repr__(self) -> str:
        return "Causal()" if isinstance(self.offset, int) and self.offset == 0 else f"Causal(offset={self.offset})"


@mask()
class SlidingWindow(Mask):
    """A query sees keys less than ``size`` positions away, on both sides: ``|q - k| < size``.

    With ``Causal() &`` these are the last ``size`` tokens, itself included (the window of Mistral and Longformer halves).
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"SlidingWindow: size must be at least 1 (the token itself), got {self.size}")

    def bind(self, g: Geometry) -> Bound:
        reach = self.size - 1 if g.plain else None
        return Bound((), lambda c: abs(c.q - c.k) < self.size, reach, reach)

    def intervals(self, g: Geometry) -> Intervals:
        q = row_positions(g)
        return span(q - self.size + 1, q + self.size)

    def __repr__(self) -> str:
        return f"SlidingWindow({self.size})"


@mask()
class Dilated(Mask):
    """A query sees every ``step``-th key, counted from itself: ``(q - k) mod step = 0``."""

    step: int

    def __post_init__(self) -> None:
        if self.step < 1:
            raise ValueError(f"Dilated: step must be at least 1, got {self.step}")

    @property
    def opaque(self) -> bool:
        return self.step > 1

    def bind(self, g: Geometry) -> Bound:
        return Bound((), lambda c: (c.q - c.k) % self.step == 0)

    def intervals(self, g: Geometry) -> Intervals | None:
        return span(-_FAR, _FAR) if self.step == 1 else None

    def __repr__(self) -> str:
        return f"Dilated({self.step})"


@mask(leaves=("length",))
class Prefix(Mask):
    """Every query sees the keys at positions ``k < length``.

    length: an int, or int32 ``[B]`` for a prefix per batch row. ``Causal() | Prefix(n)`` is the prefix language model.
    """

    length: int | Int[Array, " B"]

    def bind(self, g: Geometry) -> Bound:
        ops, fixed = _leaf_operand(self.length)
        return Bound(ops, lambda c, *o: (c.k < (o[0] if o else fixed)) & (c.q == c.q))

    def intervals(self, g: Geometry) -> Intervals:
        length = as_known(self.length)
        return span(-_FAR, length if isinstance(length, int) else length.reshape(-1, 1, 1))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.length if isinstance(self.length, int) else 'per row'})"


@mask(leaves=("length",))
class Sinks(Prefix):
    """The first ``length`` tokens stay visible to all: attention sinks, as in ``Causal() & SlidingWindow(w) | Sinks(4)``."""
