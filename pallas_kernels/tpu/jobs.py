"""Which tiles a kernel visits, as lists of packed words in scalar memory.

A word is one tile: what kind it is, whether it is the first or last of its row of tiles, and where it lies. Kinds are FULL,
PARTIAL, and STAIRS for a partial one in which nothing is visible on one side of its own diagonal; where it lies says on which.
Rows without tiles get one word of kind SKIP, so that every row of the result is written. The same code makes the lists before
the program is traced (numpy states) or while it runs (JAX states).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SKIP, PARTIAL, FULL, STAIRS = 0, 1, 2, 3
_FIRST, _LAST, _MINOR, _MAJOR = 2, 3, 4, 17
#: Blocks per axis that a word can count.
MOST_BLOCKS = 2 ** (_MAJOR - _MINOR)
#: Query heads of a key head whose kinds of tile fit beside each other in a word, 2 bits each.
MOST_MEMBERS = 16
#: Scalar memory that the lists of one kernel may take, in bytes: half of what a core has.
MOST_BYTES = 2**19


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words", "count", "steps"], meta_fields=["capacity", "kinds"])
@dataclasses.dataclass(frozen=True)
class Jobs:
    """``words`` int32 ``[lists * capacity]`` and how many of them each list means (``count`` int32 ``[lists]``).

    steps: the longest count: a Python int, or traced. kinds: the kinds of tiles that may occur.
    """

    words: Any
    count: Any
    steps: Any
    capacity: int
    kinds: frozenset[int]


def make_jobs(state: Any, kinds: frozenset[int] = frozenset((SKIP, PARTIAL, FULL))) -> Jobs:
    """The tiles of ``state [lists, major, minor]`` (kinds), row by row. kinds: that may occur, if states are not known."""
    xp = np if isinstance(state, np.ndarray) else jnp
    lists, major, minor = state.shape
    state = state.astype(np.int32)
    visited = state != SKIP
    column = np.arange(minor)
    meant = visited | (~visited.any(-1, keepdims=True) & (column == 0))
    seen = xp.cumsum(meant, axis=-1)
    first, last = meant & (seen == 1), meant & (seen == seen[..., -1:])
    word = (
        state
        | (first.astype(np.int32) << _FIRST)
        | (last.astype(np.int32) << _LAST)
        | (column << _MINOR)
        | (np.arange(major)[:, None] << _MAJOR)
    )
    meant, word = meant.reshape(lists, -1), word.reshape(lists, -1)
    count = meant.sum(-1).astype(np.int32)
    order = xp.argsort(~meant, axis=-1, stable=True)
    word = xp.take_along_axis(word, order, axis=-1).astype(np.int32)
    if xp is np:
        steps = int(count.max())
        kinds = frozenset(int(k) for k in np.unique(state))
        return Jobs(word[:, :steps].ravel(), count, steps, steps, kinds)
    return Jobs(word.ravel(), count, count.max(), major * minor, kinds)


def with_stairs(state: Any, near: int | None, far: int | None) -> Any:
    """States of square tiles ``[..., rows, columns]`` in which the partial ones on the diagonals ``column = row + near``
    (nothing is visible above their own) and ``column = row - far`` (nothing below) are stairs."""
    xp = np if isinstance(state, np.ndarray) else jnp
    rows, columns = state.shape[-2:]
    beyond = np.arange(columns) - np.arange(rows)[:, None]
    on = np.isin(beyond, [n for n in (near, None if far is None else -far) if n is not None])
    return xp.where(on & (state == PARTIAL), np.asarray(STAIRS, state.dtype), state)


def kind(word: Any) -> Any:
    return word & 3


def first(word: Any) -> Any:
    return (word >> _FIRST) & 1


def last(word: Any) -> Any:
    return (word >> _LAST) & 1


def minor(word: Any) -> Any:
    return (word >> _MINOR) & (MOST_BLOCKS - 1)


def major(word: Any) -> Any:
    return word >> _MAJOR
