"""The mask whose rows each see a prefix of the keys."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from attnzoo.core.cells import Bound, Geometry, Operand
from attnzoo.core.intervals import Intervals, span
from attnzoo.core.masks.base import Mask, mask
from attnzoo.core.masks.positional import as_known


@mask(leaves=("ends",))
class PrefixEnd(Mask):
    """Row t sees the keys at positions ``k < ends[t]``.

    ends: int ``[T]`` or ``[B, T]``, aligned with the rows of the call. ``t + 1`` is causal, ``max(n, t + 1)`` the prefix
    language model, ``S`` everything; ends that stay put over a stretch of rows make it see all of itself. Block maps are
    exact, with one run of keys per row.
    """

    ends: Int[jax.Array | np.ndarray, "*B T"]

    def _ends(self, g: Geometry) -> Any:
        ends = as_known(self.ends)
        if ends.ndim not in (1, 2) or ends.shape[-1] != g.queries or (ends.ndim == 2 and len(ends) not in (1, g.batch)):
            raise ValueError(f"PrefixEnd: ends has shape {ends.shape}, but this call needs [T] = ({g.queries},) or "
                             f"[B, T] = ({g.batch}, {g.queries})")  # fmt: skip
        return ends.reshape(-1, 1, g.queries)

    def bind(self, g: Geometry) -> Bound:
        return Bound((Operand(self._ends(g)[..., None], "aligned"),), lambda c, end: c.k < end)

    def intervals(self, g: Geometry) -> Intervals:
        return span(0, self._ends(g))

    def __repr__(self) -> str:
        return "PrefixEnd(...)"
