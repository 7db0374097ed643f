"""Neighborhood attention by tiles that are boxes of the grid, not runs of the flattened tokens.

In row-major order a tile is a piece of a line where lines are long, and its windows touch a tile or more of each line around.
Ordered by boxes, neighbours lie in one tile, and the keys of its windows are the few boxes around it: on a 512 × 512 grid a
window of 13 × 13 visits a third of the tiles (Hassani et al., 2024, arXiv 2403.04690, §3). Tokens that a dilation keeps apart
never see each other and become batch rows of their own, of which no tile is wasted.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnzoo.core.attention import attention
from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Bound, Geometry, Operand
from attnzoo.core.masks.base import Mask, mask
from attnzoo.core.masks.grid import Neighborhood, window_along

#: Tokens of a box where none is asked for: what the kernels take, and small enough for windows of a few tokens.
BOX = 256


def neighborhood_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K Hv"],
    window: Neighborhood,
    *,
    box: tuple[int, ...] | None = None,
    **options: Any,
) -> Any:
    """``attention(q, k, v, mask=window)``, by boxes of the grid.

    Args:
        q, k, v: tokens of a grid, flattened row-major.
        window: who sees whom.
        box: the tile, a size per axis; by default the one of :data:`BOX` tokens that leaves the fewest tiles to visit. The
            kernels want a multiple of 128 tokens.
        options: scale, weights, backend, return_lse, dropout_rate and dropout_rng of :func:`attnzoo.core.attention.attention`.

    Returns:
        What :func:`attnzoo.core.attention.attention` does, tokens row-major again.

    Raises:
        ValueError: tokens that are no such grid, or a box with another number of axes or without tokens.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[1] != math.prod(window.shape):
            raise ValueError(f"{name} must be [B, T, heads, width] with the T = {math.prod(window.shape)} tokens of the grid "
                             f"{window.shape}, got {x.shape}")  # fmt: skip
    known = {"scale", "weights", "backend", "return_lse", "dropout_rate", "dropout_rng"}
    for name in options.keys() - known:
        raise ValueError(f"{name}: tiles that are boxes cannot have it; give {', '.join(sorted(known))}, or call "
                         "attention with mask=window")  # fmt: skip
    box = best_box(window) if box is None else tuple(box)
    if len(box) != len(window.shape) or min(box) < 1:
        raise ValueError(f"box: needs a positive size for each of the {len(window.shape)} axes of {window.shape}, got {box}")
    order = Order(window.shape, window.dilation, box)
    size = math.prod(box)
    returned = attention(*(order.into(x) for x in (q, k, v)), mask=Boxes(window, box), block_sizes=(size, size), **options)
    if isinstance(returned, tuple):
        return tuple(map(order.back, returned))
    return order.back(returned)


class Order(NamedTuple):
    """Tokens of a grid by groups that a dilation keeps apart, and within a group by boxes."""

    shape: tuple[int, ...]
    dilation: tuple[int, ...]
    box: tuple[int, ...]

    @property
    def boxes(self) -> tuple[int, ...]:
        """Boxes along each axis of a group."""
        return tuple(-(-x // (d * b)) for x, d, b in zip(self.shape, self.dilation, self.box, strict=True))

    def into(self, x: Float[Array, "B T *rest"]) -> Float[Array, "B*groups boxes*box *rest"]:
        """Tokens in this order; what boxes have beyond the grid is 0."""
        n, rest = len(self.shape), x.shape[2:]
        whole = self._whole()
        x = x.reshape(x.shape[0], *self.shape, *rest)
        x = jnp.pad(x, [(0, 0), *((0, w - s) for w, s in zip(whole, self.shape, strict=True)), *((0, 0) for _ in rest)])
        x = x.reshape(x.shape[0], *itertools.chain(*zip(self.boxes, self.box, self.dilation, strict=True)), *rest)
        axes = [1 + 3 * a + part for part in (2, 0, 1) for a in range(n)]
        x = x.transpose(0, *axes, *range(1 + 3 * n, x.ndim))
        return x.reshape(x.shape[0] * math.prod(self.dilation), -1, *rest)

    def back(self, x: Float[Array, "B*groups boxes*box *rest"]) -> Float[Array, "B T *rest"]:
        """The inverse of :meth:`into`."""
        n, rest = len(self.shape), x.shape[2:]
        x = x.reshape(-1, *self.dilation, *self.boxes, *self.box, *rest)
        axes = [1 + part * n + a for a in range(n) for part in (1, 2, 0)]
        x = x.transpose(0, *axes, *range(1 + 3 * n, x.ndim))
        x = x.reshape(x.shape[0], *self._whole(), *rest)[:, *(slice(s) for s in self.shape)]
        return x.reshape(x.shape[0], -1, *rest)

    def _whole(self) -> tuple[int, ...]:
        return tuple(m * b * d for m, b, d in zip(self.boxes, self.box, self.dilation, strict=True))

    def coordinates(self) -> list[np.ndarray]:
        """Per axis, where the tokens of a group lie in it, in order."""
        grid = np.indices((*self.boxes, *self.box))
        n = len(self.shape)
        return [(grid[a] * self.box[a] + grid[n + a]).ravel() for a in range(n)]

    def groups(self) -> list[tuple[int, ...]]:
        """Offsets of the groups, in the order in which they become batch rows."""
        return list(itertools.product(*map(range, self.dilation)))


@mask()
class Boxes(Mask):
    """A :class:`~attnzoo.core.masks.Neighborhood` of tokens in the order of :class:`Order`; what is beyond it is unseen."""

    window: Neighborhood
    box: tuple[int, ...]

    @property
    def order(self) -> Order:
        return Order(self.window.shape, self.window.dilation, self.box)

    def _axes(self, axis: int, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """First visible place and one past the last for tokens at these places of an axis, for each offset of a dilation."""
        w = self.window
        x, k, d, causal = w.shape[axis], w.window[axis], w.dilation[axis], w.causal[axis]
        for offset in range(d):
            real = (x - offset + d - 1) // d
            yield window_along(np, real, k, causal, np.minimum(places, real - 1))

    def bind(self, g: Geometry) -> Bound:
        order = self.order
        rows: list[Any] = []
        for axis, places in enumerate(order.coordinates()):
            by_offset = list(self._axes(axis, places))
            for end in (0, 1):
                values = np.stack([by_offset[group[axis]][end] for group in order.groups()])
                alike = (values == values[:1]).all()
                values = values[:1] if alike else np.tile(values, (g.batch // len(values), 1))
                rows.append(Operand(values.astype(np.int32)[:, None, :, None], "aligned"))
        columns = [Operand(places.astype(np.int32)[None, None, None], "aligned") for places in order.coordinates()]

        def apply(c: Any, *parts: Any) -> Any:
            seen: Any = True
            for axis in range(len(order.shape)):
                start, end, key = parts[2 * axis], parts[2 * axis + 1], parts[2 * len(order.shape) + axis]
                seen = seen & (key >= start) & (key < end)
            return seen

        return Bound((*rows, *columns), apply)

    def exact_states(self, g: Geometry, block_q: int, block_k: int) -> np.ndarray | None:
        """Axes are independent: a tile is empty if it is on any axis, full if it is on all."""
        if block_q != math.prod(self.box) or block_k != block_q:
            return None
        by_axis = [self.axis_states(axis) for axis in range(len(self.box))]
        groups = self.order.groups()
        if all((s == s[:1]).all() for s in by_axis):
            groups = groups[:1]
        states = np.stack([functools.reduce(_outer, (by_axis[a][o] for a, o in enumerate(group))) for group in groups])
        if len(groups) > 1:
            states = np.tile(states, (g.batch // len(groups), 1, 1))
        return states[:, None].astype(np.int8)

    def axis_states(self, axis: int) -> np.ndarray:
        """``[offsets, boxes, boxes]`` along one axis, where only what lies in the grid counts as a query."""
        n, size = self.order.boxes[axis], self.box[axis]
        edge = np.arange(n) * size
        states = []
        for offset, (start, end) in enumerate(self._axes(axis, np.arange(n * size))):
            real = (self.window.shape[axis] - offset + self.window.dilation[axis] - 1) // self.window.dilation[axis]
            first, last = edge, np.minimum(edge + size, real) - 1  # starts and ends never fall
            last = np.maximum(last, first)
            lo, hi = edge, edge + size
            full = (lo >= start[last][:, None]) & (hi <= end[first][:, None])
            empty = (hi <= start[first][:, None]) | (lo >= end[last][:, None]) | (edge >= real)[:, None]
            states.append(np.where(empty, EMPTY, np.where(full, FULL, PARTIAL)))
        return np.stack(states)

    def __repr__(self) -> str:
        return f"{self.window} in boxes of {'×'.join(map(str, self.box))}"


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """States ``[m, m]`` and ``[n, n]`` of two axes as those ``[mn, mn]`` of both."""
    m = len(a) * len(b)
    return np.minimum(a[:, None, :, None], b[None, :, None, :]).reshape(m, m)


def best_box(window: Neighborhood, tokens: int = BOX) -> tuple[int, ...]:
    """The box of so many tokens, a power of two, of which a window visits the fewest; of equals, the most even."""
    n, powers = len(window.shape), tokens.bit_length() - 1
    every = (p for p in itertools.product(range(powers + 1), repeat=n) if sum(p) == powers)

    def visited(box: tuple[int, ...]) -> tuple[int, int]:
        boxes = Boxes(window, box)
        return math.prod(int((boxes.axis_states(a) != EMPTY).sum()) for a in range(n)), max(box)

    return min((tuple(2**e for e in p) for p in every), key=visited)
