"""Which tiles a kernel visits: for each row of tiles a list of columns in global memory, full tiles first.

The same code makes the lists before the program is traced (numpy states) or while it runs (JAX states).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SKIP, PARTIAL, FULL = 0, 1, 2


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["minor", "begin", "full", "count"], meta_fields=["rows", "kinds"]
)
@dataclasses.dataclass(frozen=True)
class Tiles:
    """Row r of list n means ``minor[begin[at] : begin[at] + count[at]]``, ``at = n * rows + r``; its first ``full[at]`` tiles
    are full ones, the others partial. All int32. kinds: the kinds of tiles that may occur."""

    minor: Any
    begin: Any
    full: Any
    count: Any
    rows: int
    kinds: frozenset[int]


def make_tiles(state: Any) -> Tiles:
    """The tiles of ``state [lists, rows, columns]`` (0 empty, 1 partial, 2 full).

    >>> tiles = make_tiles(np.array([[[1, 2, 0], [0, 0, 0], [1, 2, 2]]]))
    >>> [x.tolist() for x in (tiles.minor, tiles.begin, tiles.full, tiles.count)]
    [[1, 0, 1, 2, 0], [0, 2, 2], [1, 0, 2], [2, 0, 3]]
    """
    xp = np if isinstance(state, np.ndarray) else jnp
    lists, rows, columns = state.shape
    state = state.reshape(lists * rows, columns)
    full = (state == FULL).sum(-1).astype(np.int32)
    count = (state != SKIP).sum(-1).astype(np.int32)
    order = xp.argsort(FULL - state.astype(np.int32), axis=-1, stable=True).astype(np.int32)
    if xp is np:
        minor = order[np.arange(columns) < count[:, None]]
        begin = (np.cumsum(count) - count).astype(np.int32)
        kinds = frozenset(int(k) for k in np.unique(state))
        return Tiles(minor if minor.size else np.zeros(1, np.int32), begin, full, count, rows, kinds)
    begin = np.arange(lists * rows, dtype=np.int32) * columns
    return Tiles(order.ravel(), begin, full, count, rows, frozenset((SKIP, PARTIAL, FULL)))
