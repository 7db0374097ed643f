"""Random calls of attention over listed keys, with the cells that their lists mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """sizes: B T S N K H Hv; lists: heads with lists of their own, blocks of queries, positions of a list at most."""

    sizes: tuple[int, ...] = (2, 12, 20, 4, 2, 8, 6)
    lists: tuple[int, int, int] = (4, 3, 9)
    block_q: int | None = None
    causal: bool = False
    seed: int = 0

    def arrays(self) -> list[np.ndarray]:
        b, t, s, n, k, h, hv = self.sizes
        rng = np.random.default_rng(self.seed)
        return [rng.normal(size=x).astype(np.float32) for x in ((b, t, n, h), (b, s, k, h), (b, s, k, hv))]

    def positions(self) -> np.ndarray:
        """Distinct places in any order, up to ``most`` of them, gaps between; the first list is empty."""
        (b, _, s, *_), (heads, blocks, most) = self.sizes, self.lists
        rng = np.random.default_rng(self.seed + 1)
        found = np.full((b * heads * blocks, most), -1, np.int32)
        for n, row in enumerate(found):
            count = 0 if n == 0 else rng.integers(1, min(s, most) + 1)
            row[rng.permutation(most)[:count]] = rng.permutation(s)[:count]
        return found.reshape(b, heads, blocks, most)

    def q_positions(self) -> np.ndarray | None:
        return np.random.default_rng(self.seed + 2).integers(0, self.sizes[2], self.sizes[:2]) if self.causal else None

    def arguments(self) -> dict[str, Any]:
        return {"positions": self.positions(), "block_q": self.block_q, "q_positions": self.q_positions()}

    def cells(self) -> np.ndarray:
        """Who sees whom, ``[B, N, T, S]``."""
        (_, t, s, n, *_), (heads, blocks, _) = self.sizes, self.lists
        block = self.block_q or t // blocks
        listed = (self.positions()[..., None] == np.arange(s)).any(-2)
        ok = np.repeat(np.repeat(listed, n // heads, axis=1), block, axis=2)[:, :, :t]
        places = self.q_positions()
        return ok if places is None else ok & (np.arange(s) <= places[:, None, :, None])
