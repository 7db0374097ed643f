"""Sets of keys as a few half-open intervals per row: the exact, cell-free form of a mask.

A mask such as ``Causal() & SlidingWindow(w) | Prefix(p)`` lets every row see one or two runs of keys. Holding the runs
instead of the cells makes ``& | ~`` cheap (O(T·r) for r runs) and lets :mod:`attnzoo.core.blocks` count the visible cells
of every tile exactly without evaluating T×S of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

#: More runs than this per row and a mask is no longer worth holding as runs.
MAX_RUNS = 64
_FAR = 2**30


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Disjoint runs ``[lo, hi)`` per row; arrays ``[B|1, N|1, T|1, r]`` of numpy (known now) or JAX (known when run).

    exact: whether these are precisely the visible keys. If not they are a superset: what lies outside is certainly hidden.
    """

    lo: Any
    hi: Any
    exact: bool = True

    def __post_init__(self) -> None:
        nowhere = -_FAR - 1  # empty runs sort before all others, which begin at -_FAR or later
        lo = self._xp.maximum(self.lo, -_FAR)
        empty = self.hi <= lo
        object.__setattr__(self, "lo", self._xp.where(empty, nowhere, lo))
        object.__setattr__(self, "hi", self._xp.where(empty, nowhere, self.hi))

    @property
    def known(self) -> bool:
        """Whether the runs are concrete numbers (numpy), not traced values."""
        return isinstance(self.lo, np.ndarray) and isinstance(self.hi, np.ndarray)

    @property
    def _xp(self) -> Any:
        return np if self.known else jnp

    @property
    def runs(self) -> int:
        return self.lo.shape[-1]

    def intersect(self, other: Intervals) -> Intervals | None:
        """Keys in both; None when that takes too many runs."""
        if self.runs * other.runs > MAX_RUNS:
            return None
        xp = np if self.known and other.known else jnp
        lo = xp.maximum(self.lo[..., :, None], other.lo[..., None, :])
        hi = xp.minimum(self.hi[..., :, None], other.hi[..., None, :])
        flat = (*lo.shape[:-2], self.runs * other.runs)
        return Intervals(lo.reshape(flat), hi.reshape(flat), self.exact and other.exact)

    def union(self, other: Intervals) -> Intervals | None:
        """Keys in either; None when that takes too many runs."""
        if self.runs + other.runs > MAX_RUNS:
            return None
        xp = np if self.known and other.known else jnp
        rows = np.broadcast_shapes(self.lo.shape[:-1], other.lo.shape[:-1])

        def join(a: Any, b: Any) -> Any:
            return xp.concatenate([xp.broadcast_to(x, (*rows, x.shape[-1])) for x in (a, b)], axis=-1)

        lo, hi = _sorted(xp, join(self.lo, other.lo), join(self.hi, other.hi))
        # A run begins no earlier than everything before it ended, which keeps the runs disjoint.
        ends = np.maximum.accumulate(hi, axis=-1) if xp is np else jnp.maximum.accumulate(hi, axis=-1)
        lo = xp.concatenate([lo[..., :1], xp.maximum(lo[..., 1:], ends[..., :-1])], axis=-1)
        return Intervals(lo, hi, self.exact and other.exact)

    def complement(self) -> Intervals | None:
        """Keys in none of the runs; None for a superset, whose complement would hide visible keys."""
        if not self.exact or self.runs + 1 > MAX_RUNS:
            return None
        xp = self._xp
        lo, hi = _sorted(xp, self.lo, self.hi)
        end = xp.full((*lo.shape[:-1], 1), _FAR, lo.dtype)
        return Intervals(xp.concatenate([-end, hi], axis=-1), xp.concatenate([lo, end], axis=-1))


def _sorted(xp: Any, lo: Any, hi: Any) -> tuple[Any, Any]:
    if lo.shape[-1] == 2:  # the common case, and far quicker than a sort over a million rows
        swap = lo[..., :1] > lo[..., 1:]
        return xp.where(swap, lo[..., ::-1], lo), xp.where(swap, hi[..., ::-1], hi)
    order = xp.argsort(lo, axis=-1)
    return xp.take_along_axis(lo, order, axis=-1), xp.take_along_axis(hi, order, axis=-1)


def span(lo: Any, hi: Any, exact: bool = True) -> Intervals:
    """One run per row; ``lo`` and ``hi`` broadcast to ``[B|1, N|1, T|1]`` or are scalars."""
    xp = np if all(isinstance(x, np.ndarray | np.generic | int) for x in (lo, hi)) else jnp
    lo, hi = xp.broadcast_arrays(xp.asarray(lo, np.int32), xp.asarray(hi, np.int32))
    lo, hi = (x.reshape((1,) * (3 - x.ndim) + x.shape)[..., None] for x in (lo, hi))
    return Intervals(lo, hi, exact)
