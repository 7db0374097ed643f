"""Neighborhood masks: tokens on a 1-, 2- or 3-D grid see a box of nearest tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnzoo.core.cells import Bound, Geometry
from attnzoo.core.intervals import MAX_RUNS, Intervals, span
from attnzoo.core.masks.base import Mask, mask


def window_along(xp: Any, length: Any, window: int, causal: bool, place: Any) -> tuple[Any, Any]:
    """The first place that a token at ``place`` of so many along a line sees, and one past the last."""
    if causal:
        return xp.maximum(place - window + 1, 0), place + 1
    start = xp.clip(place - window // 2, 0, length - window)
    return start, start + window


@mask()
class Neighborhood(Mask):
    """Neighborhood attention (Hassani et al., 2023, arXiv 2204.07143; 2024, arXiv 2403.04690).

    Tokens are a grid, flattened row-major (last axis fastest). Along each axis a token at coordinate i sees the ``window``
    coordinates nearest to it that are congruent to i modulo ``dilation``; at the borders the box slides inward, so every
    token keeps exactly ``prod(window)`` keys. On a causal axis it sees the last ``window`` coordinates up to its own
    instead, fewer at the border.

    shape: grid sizes, 1 to 3 of them, their product being T = S. window, dilation, causal: one value, or one per axis.
    Raises ValueError where ``window × dilation`` exceeds an axis.
    """

    shape: tuple[int, ...]
    window: Any
    dilation: Any = 1
    causal: Any = False

    def __post_init__(self) -> None:
        n = len(self.shape)
        if not 1 <= n <= 3:
            raise ValueError(f"Neighborhood: shape must have 1 to 3 axes, got {self.shape}")
        for name in ("window", "dilation", "causal"):
            given = getattr(self, name)
            per_axis = tuple(given) if isinstance(given, Sequence) else (given,) * n
            if len(per_axis) != n:
                raise ValueError(f"Neighborhood: {name} has {len(per_axis)} values for {n} axes {self.shape}")
            object.__setattr__(self, name, per_axis)
        for x, k, d in zip(self.shape, self.window, self.dilation, strict=True):
            if k < 1 or d < 1 or k * d > x:
                raise ValueError(f"Neighborhood: window {k} × dilation {d} does not fit an axis of length {x}; "
                                 "window × dilation may be at most the axis")  # fmt: skip

    def _check(self, g: Geometry) -> None:
        tokens = math.prod(self.shape)
        if (g.queries, g.keys) != (tokens, tokens):
            raise ValueError(f"Neighborhood: grid {self.shape} has {tokens} tokens, but the call has T={g.queries}, S={g.keys}")

    def _axes(self, xp: Any, index: Any) -> list[tuple[Any, Any, Any, int]]:
        """Per axis, for tokens ``index``: (first visible place, one past the last, offset, step).

        A place p of the dilation group with this offset is the coordinate ``p·step + offset``.
        """
        out: list[tuple[Any, Any, Any, int]] = []
        for x, k, d, causal in reversed(list(zip(self.shape, self.window, self.dilation, self.causal, strict=True))):
            i, index = index % x, index // x
            place, offset = i // d, i % d
            start, end = window_along(xp, (x - offset + d - 1) // d, k, causal, place)
            out.append((start, end, offset, d))
        return out[::-1]

    def bind(self, g: Geometry) -> Bound:
        self._check(g)

        def apply(c: Any) -> Any:
            ok, key = True, c.s
            for x, (start, end, offset, d) in reversed(list(zip(self.shape, self._axes(jnp, c.t), strict=True))):
                j, key = key % x, key // x
                ok = ok & (j % d == offset) & (j // d >= start) & (j // d < end)
            return ok

        return Bound((), apply)

    def intervals(self, g: Geometry) -> Intervals | None:
        """A run per visible line of the box; where those are too many, one run that spans them."""
        self._check(g)
        if g.kv_positions is not None:
            return None
        axes = self._axes(np, np.arange(g.queries))
        start, end, offset, d = axes[-1]
        strides = [math.prod(self.shape[a + 1 :]) for a in range(len(self.shape))]
        lines = [range(k) for k in self.window[:-1]]
        if d == 1:
            ends = [(start, end)]
        else:  # keys are apart: a run each
            ends = [(p * d + offset, np.where(p < end, p * d + offset + 1, 0)) for p in
                    (start + u for u in range(self.window[-1]))]  # fmt: skip
        runs = []
        for steps in itertools.product(*lines):
            base, real = np.zeros(g.queries, np.int64), np.ones(g.queries, bool)
            for u, (lo, hi, off, step), stride in zip(steps, axes[:-1], strides[:-1], strict=True):
                base, real = base + ((lo + u) * step + off) * stride, real & (lo + u < hi)
            runs += [(base + a, np.where(real, base + b, 0)) for a, b in ends]
        lo, hi = (np.stack(x, axis=-1).astype(np.int32)[None, None] for x in zip(*runs, strict=True))
        if len(runs) > MAX_RUNS:
            hull = np.where(hi > lo, lo, 2**30).min(-1), np.where(hi > lo, hi, 0).max(-1)
            return span(*hull, exact=False)
        return Intervals(lo, hi)

    def __repr__(self) -> str:
        extra = "" if set(self.dilation) == {1} else f", dilation={self.dilation}"
        extra += f", causal={self.causal}" if any(self.causal) else ""
        return f"Neighborhood({self.shape}, {self.window}{extra})"
