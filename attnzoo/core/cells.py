"""Coordinates: what a mask or a score sees when it is asked about a rectangle of the logits.

A request has a :class:`Geometry` (its sizes and token positions). Whoever computes logits does so in rectangles, whole or
tile by tile; each rectangle has :class:`Cells` that say which batch row, head, row, column and token positions it covers.
Arrays that a mask or a score carries are declared as :class:`Operand`, so that every backend can cut the part that belongs
to a rectangle (and add its gradient back) without looking inside the object that carries them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

Index = Any  # an int32 array, numpy or JAX

Known = jax.Array | np.ndarray
"""Arrays that are known before anything runs may stay numpy, and so do the block maps made of them."""


def concrete(x: Any) -> np.ndarray | None:
    """``x`` as a numpy array, or None while its value is only known inside a trace."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


class Cells(NamedTuple):
    """Coordinates of a rectangle of logits ``[B', N', T', S']``; every field broadcasts against it.

    ``b`` batch row ``[B', 1, 1, 1]``, ``h`` query head ``[1, N', 1, 1]``, ``t`` row and ``s`` column of this call
    (``[1, 1, T', 1]``, ``[1, 1, 1, S']``), ``q`` and ``k`` the token positions there (equal to ``t`` and ``s`` unless
    the caller gave positions; then ``[B'|1, 1, T', 1]`` and ``[B'|1, N'|1, 1, S']``).
    """

    b: Index
    h: Index
    t: Index
    s: Index
    q: Index
    k: Index


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes and positions of one request: ``q [B, T, N, H]`` against ``k [B, S, K, H]``.

    origin: where these rows lie in a larger call of which they are a part: its batch row, head, row and column at which they
        begin (int32 ``[4]``). Cells have the coordinates of the larger call; arrays and sizes are those of the part.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    q_positions: Int[Array, "B|1 T"] | None = None
    kv_positions: Int[Array, "B|1 K|1 S"] | None = None
    origin: Int[Array, " 4"] | None = None

    @property
    def plain(self) -> bool:
        """Whether positions are simply the row and column numbers."""
        return self.q_positions is None and self.kv_positions is None


Kind = Literal["aligned", "distance", "blocks", "whole"]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array carried by a mask or a score, and how it lies over the logits.

    ``aligned``: ``[B|1, N|1, T|1, S|1]``, cut like the logits.
    ``distance``: ``[N|1, T + S - 1]``, a value for every ``t - s``; entry 0 belongs to ``t - s = 1 - S``.
    ``blocks``: ``[B|1, N|1, ceil(T/bq), ceil(S/bk)]``, a value for every block of ``block = (bq, bk)`` cells.
    ``whole``: any shape, handed over uncut and indexed by coordinates.
    """

    x: Any
    kind: Kind = "whole"
    block: tuple[int, int] | None = None


class Bound(NamedTuple):
    """A mask or a score tied to a geometry: its arrays, and the function that applies them.

    Masks: ``apply(cells, *parts) -> bool`` broadcastable to the rectangle. Scores: ``apply(s, cells, *parts) -> s``.
    The function holds no arrays of its own; all of them are in ``operands`` (in the order of ``parts``).
    ahead, behind, of masks: row t sees no column beyond t + ahead, and none before t - behind; None where that is not known.
    They are of whole calls alone: a part that begins at another row or column is bound anew.
    """

    operands: tuple[Operand, ...]
    apply: Callable[..., Any]
    ahead: int | None = None
    behind: int | None = None


class Tile(NamedTuple):
    """Where a rectangle starts (may be traced) and how large it is (Python ints)."""

    start: tuple[Any, Any, Any, Any]
    size: tuple[int, int, int, int]


def cells_of(g: Geometry, tile: Tile) -> Cells:
    """Coordinates of one tile. Tiles may reach past the end of rows and columns; positions there are those of the last one."""
    (b0, h0, t0, s0), (nb, nh, nt, ns) = tile
    b = b0 + lax.broadcasted_iota(jnp.int32, (nb, 1, 1, 1), 0)
    h = h0 + lax.broadcasted_iota(jnp.int32, (1, nh, 1, 1), 1)
    t = t0 + lax.broadcasted_iota(jnp.int32, (1, 1, nt, 1), 2)
    s = s0 + lax.broadcasted_iota(jnp.int32, (1, 1, 1, ns), 3)
    q, k = jnp.minimum(t, g.queries - 1), jnp.minimum(s, g.keys - 1)
    if g.q_positions is not None:
        rows = b if g.q_positions.shape[0] > 1 else jnp.zeros_like(b)
        q = jnp.asarray(g.q_positions)[rows, q]
    if g.kv_positions is not None:
        rows = b if g.kv_positions.shape[0] > 1 else jnp.zeros_like(b)
        group = lax.div(h, jnp.int32(g.heads // g.kv_heads)) if g.kv_positions.shape[1] > 1 else jnp.zeros_like(h)
        k = jnp.asarray(g.kv_positions)[rows, group, k]
    if g.origin is not None:
        b, h, t, s = (x + g.origin[n] for n, x in enumerate((b, h, t, s)))
        q = q + g.origin[2] if g.q_positions is None else q
        k = k + g.origin[3] if g.kv_positions is None else k
    return Cells(b, h, t, s, q, k)


def all_cells(g: Geometry) -> Cells:
    """Coordinates of the whole ``[B, N, T, S]`` rectangle; positions as they are, without the look-ups that tiles need."""
    bare = dataclasses.replace(g, q_positions=None, kv_positions=None)
    cells = cells_of(bare, Tile((0, 0, 0, 0), (g.batch, g.heads, g.queries, g.keys)))
    q, k = cells.q, cells.k
    if g.q_positions is not None:
        q = jnp.asarray(g.q_positions)[:, None, :, None]
    if g.kv_positions is not None:
        k = jnp.asarray(g.kv_positions)
        k = (jnp.repeat(k, g.heads // g.kv_heads, axis=1) if k.shape[1] > 1 else k)[:, :, None, :]
    return cells._replace(q=q, k=k)


def pad_operand(op: Operand, rows: int, cols: int) -> Operand:
    """Extend an operand by ``rows`` and ``cols`` zeros, so that the last tiles can be cut from it."""
    if op.kind == "aligned":
        grow = [(0, 0), (0, 0), (0, rows if op.x.shape[2] > 1 else 0), (0, cols if op.x.shape[3] > 1 else 0)]
    elif op.kind == "distance":  # columns past S come before entry 0
        grow = [(0, 0), (cols, rows)]
    else:
        return op
    return op if not any(map(sum, grow)) else dataclasses.replace(op, x=jnp.pad(op.x, grow))


def unpad_operand(op: Operand, d: Array, rows: int, cols: int) -> Array:
    """The gradient of an operand from that of :func:`pad_operand`'s result."""
    if op.kind == "aligned":
        return d[:, :, : op.x.shape[2], : op.x.shape[3]]
    if op.kind == "distance":
        return d[:, cols : d.shape[1] - rows]
    return d


def operand_window(op: Operand, tile: Tile, keys: int) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Start and size of the part of a (padded) operand that belongs to ``tile``; ``keys`` is S with its padding."""
    if op.kind == "aligned":
        whole = op.x.shape
        start = tuple(np.int32(0) if n == 1 else a for n, a in zip(whole, tile.start, strict=True))
        return start, tuple(1 if n == 1 else m for n, m in zip(whole, tile.size, strict=True))
    if op.kind == "distance":
        (_, h0, t0, s0), (_, nh, nt, ns) = tile
        one = op.x.shape[0] == 1
        return (np.int32(0) if one else h0, t0 - s0 + np.int32(keys - ns)), (1 if one else nh, nt + ns - 1)
    return (0,) * op.x.ndim, op.x.shape


def cut(op: Operand, tile: Tile, keys: int) -> Array:
    """The part of ``op`` that belongs to ``tile`` (for ``distance``: the window of distances, see :func:`spread`)."""
    if op.kind == "whole":
        return op.x
    if op.kind == "blocks":
        return _cut_blocks(op, tile)
    start, size = operand_window(op, tile, keys)
    return op.x if size == op.x.shape else lax.dynamic_slice(op.x, start, size)


def _cut_blocks(op: Operand, tile: Tile) -> Array:
    assert op.block is not None
    x = jnp.asarray(op.x)
    for axis in (0, 1):
        if x.shape[axis] > 1:
            x = lax.dynamic_slice_in_dim(x, tile.start[axis], tile.size[axis], axis)
    for axis, cells in zip((2, 3), op.block, strict=True):
        at = lax.div(tile.start[axis] + jnp.arange(tile.size[axis], dtype=jnp.int32), jnp.int32(cells))
        x = jnp.take(x, at, axis=axis, mode="clip")  # tiles may reach past the end
    return x


def spread(op: Operand, part: Array, tile: Tile) -> Array:
    """A cut part as the mask or score wants it: broadcastable to the tile, or the whole array.

    A window ``w`` of distances becomes ``out[i, j] = w[i - j + ns - 1]``. Read backwards and repeated with period L, row i
    of the result starts at ``nt - 1 + i (L - 1)``, so one reshape does it: no gather, and its transpose is no scatter.
    """
    if op.kind != "distance":
        return part
    nt, ns = tile.size[2:]
    heads, period = part.shape
    back = part[:, ::-1]
    if nt == 1:
        return back[None, :, None, :]
    long = jnp.broadcast_to(back[:, None], (heads, nt, period)).reshape(heads, nt * period)
    skewed = long[:, nt - 1 : nt - 1 + nt * (period - 1)].reshape(heads, nt, period - 1)
    return skewed[None, :, :, :ns]


def visible_slots(g: Geometry, c: Cells) -> Bool[Array, ...] | None:
    """Cells whose key slot holds a token; None when every slot does (no positions were given)."""
    return None if g.kv_positions is None else c.k >= 0
