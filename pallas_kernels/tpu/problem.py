"""What a flash kernel is told: sizes, the functions that change its tiles, and how their arrays reach it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.jobs import FULL, PARTIAL, SKIP, STAIRS

LANES = 128
#: Stands for a hidden logit: finite, so that differences of two stay numbers.
HIDDEN = -0.7 * 3.4028235e38
#: Logits at or below this count as hidden, wherever they come from.
HIDDEN_BELOW = -1e30
LOG2E = 1.4426950408889634


class Layout(NamedTuple):
    """How one operand of a mask or score lies over the logits.

    form: "cell" (an entry per query and key), "row", "column", "one", "distance", or "tile" (an entry per tile). per_batch,
    per_head: whether batch rows and heads differ. boolean: whether its integers stand for bools.
    """

    form: str
    per_batch: bool
    per_head: bool
    boolean: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Static facts of one call. Lengths are real ones; arrays come padded to whole blocks.

    mask: ``(b, h, t, s, *parts) -> bool``; score: ``(x, b, h, t, s, *parts) -> x``; phi: a pointwise weight map, or None
    for softmax; keep: ``(seed0, seed1, b, h, t, s) -> factor``, dropout. All are elementwise on what broadcasts to a tile.
    rows, columns: a tile is worked through in pieces of this size.
    per_batch, per_head: whether the lists of tiles differ by batch row and head.
    stair: queries of a piece of a tile that the mask cuts along its diagonal, where there are such tiles. near, far: these are
        the partial ones of which column - row = near (nothing is visible above their diagonal) or row - column = far (below).
    page_blocks: 0, or k and v come as pools of pages, of so many blocks each, that batch rows name in order (TPU).
    keys_by_head: whether k and v come as ``[B, K, S, ·]``, the order of caches, and not as ``[B, S, K, ·]`` (GPU).
    keys_are_values: whether k is v too, as latents are, and is read once (TPU, forward).
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    block_q: int
    block_k: int
    rows: int
    columns: int
    mask: Callable[..., Any] | None
    mask_layouts: tuple[Layout, ...]
    score: Callable[..., Any] | None
    score_layouts: tuple[Layout, ...]
    phi: Callable[[Any], Any] | None
    keep: Callable[..., Any] | None
    per_batch: bool
    per_head: bool
    stair: int | None = None
    near: int | None = None
    far: int | None = None
    page_blocks: int = 0
    keys_by_head: bool = False
    keys_are_values: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def kinds(self) -> frozenset[int]:
        """Of tiles, that may occur."""
        return frozenset((SKIP, PARTIAL, FULL)) | (frozenset() if self.stair is None else {STAIRS})

    @property
    def padded(self) -> tuple[int, int]:
        """T and S in whole blocks."""
        return -(-self.queries // self.block_q) * self.block_q, -(-self.keys // self.block_k) * self.block_k

    @property
    def base2(self) -> bool:
        """Whether logits come scaled by log2(e), so that weights are powers of two: one multiplication less per cell."""
        return self.score is None and self.phi is None

    @property
    def differentiable(self) -> tuple[bool, ...]:
        return tuple(not layout.boolean for layout in self.score_layouts)

    def page_of(self, pages: Any, b: Any, j: Any) -> tuple[Any, Any]:
        """The page that holds key block j of a batch row, and which of its blocks that is."""
        columns = self.padded[1] // self.block_k // self.page_blocks
        size = jnp.int32(self.page_blocks)
        return pages[b * columns + lax.div(j, size)], lax.rem(j, size)

    def which_list(self, b: Any, h: Any) -> Any:
        """The list of tiles of a batch row and head."""
        return (b * self.heads if self.per_head else b) * self.per_batch + h * self.per_head


def layout_of(x: jax.ShapeDtypeStruct | jax.Array, distance: bool) -> Layout:
    """Of an operand ``[B|1, N|1, T|1, S|1]``, or ``[N|1, T + S - 1]`` if it is by distance."""
    boolean = not jnp.issubdtype(x.dtype, jnp.floating)
    if distance:
        return Layout("distance", False, x.shape[0] > 1, boolean)
    form = {(False, False): "one", (True, False): "row", (False, True): "column", (True, True): "cell"}[
        (x.shape[2] > 1, x.shape[3] > 1)
    ]
    return Layout(form, x.shape[0] > 1, x.shape[1] > 1, boolean)


def layout_by_tile(x: jax.ShapeDtypeStruct | jax.Array) -> Layout:
    """Of an operand ``[B|1, N|1, tiles down, tiles across]``."""
    return Layout("tile", x.shape[0] > 1, x.shape[1] > 1, not jnp.issubdtype(x.dtype, jnp.floating))


def laid_out(p: Problem, x: Any, layout: Layout) -> Any:
    """An operand as the kernels read it: padded, 32 bits wide (bools per cell: 8), long axes last."""
    rows, columns = p.padded
    if layout.boolean:
        x = x.astype(jnp.int8 if layout.form == "cell" and x.dtype == jnp.bool_ else jnp.int32)
    else:
        x = x.astype(jnp.float32)
    if layout.form == "tile":
        return x.reshape(*x.shape[:2], -1, 1, 1)
    if layout.form == "distance":
        # Entry 0 is t - s = 1 - S in the first copy; the second runs backwards.
        x = jnp.pad(x, ((0, 0), (columns - p.keys, rows - p.queries + 1)))
        return jnp.stack([x, x[:, ::-1]], axis=1)
    grow = [(0, 0), (0, 0), (0, rows - p.queries), (0, columns - p.keys)]
    x = jnp.pad(x, [g if n > 1 else (0, 0) for g, n in zip(grow, x.shape, strict=True)])
    return jnp.swapaxes(x, 2, 3) if layout.form == "row" else x


def taken_back(p: Problem, d: Any, like: Any, layout: Layout) -> Any:
    """A gradient ``[B, N, ...]`` per batch row and head, in the layout of ``laid_out``, as one of the operand ``like``."""
    if layout.form == "distance":
        rows, columns = p.padded
        d = d[:, :, 0, ::-1][:, :, columns - p.keys : d.shape[3] - (rows - p.queries) - 1].sum(0)
        return (d if layout.per_head else d.sum(0, keepdims=True)).astype(like.dtype)
    d = jnp.swapaxes(d, 2, 3) if layout.form == "row" else d
    d = d[:, :, : like.shape[2], : like.shape[3]]
    d = d if layout.per_batch else d.sum(0, keepdims=True)
    return (d if layout.per_head else d.sum(1, keepdims=True)).astype(like.dtype)


Place = Callable[..., tuple[Any, Any, Any, Any]]
"""(grid indices, scalar references) -> batch row, head, query block, key block."""


def row_maps(place: Place) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Where the rows of a tile's queries lie: in arrays ``[B, N, T, width]``, and in statistics ``[B, N, 1, T]``."""

    def query(*a: Any) -> tuple[Any, ...]:
        b, h, i, _ = place(*a)
        return b, h, i, 0

    def statistic(*a: Any) -> tuple[Any, ...]:
        b, h, i, _ = place(*a)
        return b, h, 0, i

    return query, statistic


def operand_spec(p: Problem, layout: Layout, place: Place) -> pl.BlockSpec:
    """The part of a laid-out operand that belongs to a tile."""

    def lead(at: tuple[Any, ...]) -> tuple[Any, Any]:
        return (at[0] if layout.per_batch else 0), (at[1] if layout.per_head else 0)

    if layout.form == "distance":
        rows, columns = p.padded
        return pl.BlockSpec((1, 2, rows + columns), lambda *a: (lead(place(*a))[1], 0, 0))
    if layout.form == "tile":

        def tile(*a: Any) -> tuple[Any, ...]:
            at = place(*a)
            return (*lead(at), at[2] * (p.padded[1] // p.block_k) + at[3], 0, 0)

        return pl.BlockSpec((1, 1, 1, 1, 1), tile)
    shape, index = {
        "cell": ((p.block_q, p.block_k), lambda at: (at[2], at[3])),
        "row": ((1, p.block_q), lambda at: (0, at[2])),
        "column": ((1, p.block_k), lambda at: (0, at[3])),
        "one": ((1, 1), lambda at: (0, 0)),
    }[layout.form]

    def index_map(*a: Any) -> tuple[Any, ...]:
        at = place(*a)
        return (*lead(at), *index(at))

    return pl.BlockSpec((1, 1, *shape), index_map)


class Piece(NamedTuple):
    """A piece of a tile: where it lies in its blocks and in the logits. sideways: keys run down, queries across.

    origin: query and key at which the kernel's arrays begin in the call that they are a part of.
    """

    row: int
    column: int
    rows: int
    columns: int
    t0: Any
    s0: Any
    sideways: bool
    origin: tuple[Any, Any]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.columns, self.rows) if self.sideways else (self.rows, self.columns)

    def cells(self) -> tuple[Any, Any]:
        """Query and key numbers in the whole call, one down and one across."""
        down, across = self.shape
        query_axis, key_axis = (1, 0) if self.sideways else (0, 1)
        one = {0: (down, 1), 1: (1, across)}
        t = self.t0 + self.origin[0] + lax.broadcasted_iota(jnp.int32, one[query_axis], query_axis)
        s = self.s0 + self.origin[1] + lax.broadcasted_iota(jnp.int32, one[key_axis], key_axis)
        return t, s


Cut = Literal["whole", "below", "above"]
"""Which cells of a tile are computed: all, or about those on and below its diagonal, or above."""


def branches(p: Problem, kinds: frozenset[int], kind: Any, i: Any, j: Any) -> Iterator[tuple[Any, Cut, bool]]:
    """What may be done to tile (i, j) of some kind: when, to which of its cells, and whether the mask is asked."""
    if FULL in kinds:
        yield kind == FULL, "whole", False
    if PARTIAL in kinds:
        yield kind == PARTIAL, "whole", True
    if STAIRS in kinds and p.near is not None:
        yield (kind == STAIRS) & (j - i == p.near), "below", True
    if STAIRS in kinds and p.far is not None:
        yield (kind == STAIRS) & (i - j == p.far), "above", True


def pieces(p: Problem, i: Any, j: Any, call: Any, sideways: bool, cut: Cut = "whole") -> list[Piece]:
    """The pieces of some cells of a tile, keys outermost: neighbours are of different rows, so that one's products overlap
    another's softmax. Cut along the diagonal, each row of pieces is one that ends or begins there."""
    if cut != "whole":
        assert p.stair is not None
        steps = range(0, p.block_q, p.stair)
        at = [(r, 0, p.stair, r + p.stair) if cut == "below" else (r, r, p.stair, p.block_k - r) for r in steps]
    else:
        at = [(r, c, p.rows, p.columns) for c in range(0, p.block_k, p.columns) for r in range(0, p.block_q, p.rows)]
    origin = call[4], call[5]
    return [Piece(r, c, rows, columns, i * p.block_q + r, j * p.block_k + c, sideways, origin) for r, c, rows, columns in at]


def work_through(work: list[Any], product: Callable[[Any], Any], absorb: Callable[[Any, Any], None]) -> None:
    """Absorb every piece's product, having issued the next piece's first."""
    here = product(work[0])
    for at, following in zip(work, [*work[1:], None], strict=True):
        ahead = None if following is None else product(following)
        absorb(at, here)
        here = ahead


def read_operand(p: Problem, ref: Any, layout: Layout, at: Piece) -> Any:
    """A piece of an operand that broadcasts against ``at.shape``; integers that stand for bools stay integers."""
    r, c = pl.ds(at.row, at.rows), pl.ds(at.column, at.columns)
    if layout.form == "one":
        return ref[0, 0]
    if layout.form == "tile":
        return ref[0, 0, 0]
    if layout.form == "row":
        x = ref[0, 0, :, r]
        return x if at.sideways else upright(x)
    if layout.form == "column":
        x = ref[0, 0, :, c]
        return upright(x) if at.sideways else x
    if layout.form == "cell":
        x = ref[0, 0, r, c]
        x = x.astype(jnp.int32) if x.dtype == jnp.int8 else x
        return x.T if at.sideways else x
    return _band(p, ref, at)


def upright(x: Any) -> Any:
    """``[1, n]`` as ``[n, 1]``."""
    return jnp.broadcast_to(x, (LANES, x.shape[1])).T[:, :1]


def _band(p: Problem, ref: Any, at: Piece) -> Any:
    """``out[t, s] = table[t - s]``: one window of the table, each row shifted by one against the row above.

    With w[y] the value at t - s = t0 - s0 + y - columns + 1, sideways out[c, r] = w[r - c + columns - 1]; upright, with the
    window of the table that runs backwards, out[r, c] = w'[c - r + rows].
    """
    length = at.rows + at.columns
    start = at.t0 - at.s0 + p.padded[1] - at.columns
    down, across = at.shape
    if at.sideways:
        copy, shift = 0, length - (at.columns - 1)
    else:
        copy, start, shift = 1, sum(p.padded) - start - length, length - at.rows
    window = ref[0, copy : copy + 1, pl.ds(pl.multiple_of(start, LANES), length)]
    return pltpu.roll(jnp.broadcast_to(window, (down, length)), shift, 1, stride=1, stride_axis=0)[:, :across]


def add_band(p: Problem, ref: Any, at: Piece, d: Any) -> None:
    """Add the sums of ``d [queries, keys]`` along its distances to a table that runs backwards; transpose of :func:`_band`."""
    length = at.rows + at.columns
    start = sum(p.padded) - (at.t0 - at.s0 + p.padded[1] - at.columns) - length
    # Row r goes to entry c - r + rows: with the rows turned around, each is shifted right by one more than the row above.
    turned = lax.dot_general(
        _reversal(at.rows), d, (((1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    longer = jnp.concatenate([turned, jnp.zeros((at.rows, length - at.columns), jnp.float32)], axis=1)
    sums = pltpu.roll(longer, 1, 1, stride=1, stride_axis=0).sum(0, keepdims=True)
    ref[0, 0, :, pl.ds(pl.multiple_of(start, LANES), length)] += sums


def _reversal(n: int) -> Any:
    rows, columns = (lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    return (rows + columns == n - 1).astype(jnp.float32)


def visible(p: Problem, at: Piece, b: Any, h: Any, parts: list[Any]) -> Any:
    """Cells of a piece that may be seen."""
    t, s = at.cells()
    ok = jnp.broadcast_to(s - at.origin[1] < p.keys, at.shape) if p.padded[1] != p.keys else None
    if p.mask is not None:
        seen = jnp.broadcast_to(p.mask(b, h, t, s, *parts), at.shape)
        ok = seen if ok is None else ok & seen
    return ok


def precision(dtype: Any) -> Any:
    """Of products: the type's own; float32 is not rounded on the way in."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
    """A product summed in float32 over axis ``contract[0]`` of a and ``contract[1]`` of b."""
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision(a.dtype), preferred_element_type=jnp.float32
    )


def wide(x: Any, width: int) -> Any:
    """``[n, 128]`` with equal entries along a row as ``[n, width]``."""
    copies = -(-width // LANES)
    x = jnp.tile(x, (1, copies)) if copies > 1 else x
    return x if x.shape[1] == width else x[:, :width]
