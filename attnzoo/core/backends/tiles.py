"""How blockwise attention walks the tiles: which rows of tiles there are, and which tiles each row visits."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from attnzoo.core.blocks import EMPTY, FULL, PARTIAL, BlockMap
from attnzoo.core.cells import Geometry, Tile


class RowLists(NamedTuple):
    """For each row of tiles, the key blocks to visit: ``cols [R, c]``, of which the first ``length [R]`` are meant."""

    cols: Int[Array, "R c"]
    length: Int[Array, " R"]


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """The rows of tiles. Batch rows and heads go through together, or each has rows of its own: where the block map tells
    them apart, or the backend asks for it. A tile covers ``size = (Bt, Nt, block_q, block_k)``, Nt heads over Kt key heads.
    """

    g: Geometry
    block_q: int
    block_k: int
    per_batch: bool
    per_head: bool

    @property
    def blocks_q(self) -> int:
        return -(-self.g.queries // self.block_q)

    @property
    def blocks_k(self) -> int:
        return -(-self.g.keys // self.block_k)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of the tiles that lie past the end."""
        return self.blocks_q * self.block_q - self.g.queries, self.blocks_k * self.block_k - self.g.keys

    @property
    def jobs(self) -> tuple[int, int, int]:
        """Rows of tiles along batch, heads and queries."""
        return self.g.batch if self.per_batch else 1, self.g.heads if self.per_head else 1, self.blocks_q

    @property
    def size(self) -> tuple[int, int, int, int]:
        return (
            1 if self.per_batch else self.g.batch,
            1 if self.per_head else self.g.heads,
            self.block_q,
            self.block_k,
        )

    @property
    def kv_heads(self) -> int:
        """Key heads of a tile."""
        return 1 if self.per_head else self.g.kv_heads

    def place(self, row: Array) -> tuple[Any, Any, Array]:
        """Batch row, head and query block at which a row of tiles starts."""
        _, heads, blocks = self.jobs
        i, rest = lax.rem(row, np.int32(blocks)), lax.div(row, np.int32(blocks))
        b = lax.div(rest, np.int32(heads)) if self.per_batch else np.int32(0)
        h = lax.rem(rest, np.int32(heads)) if self.per_head else np.int32(0)
        return b, h, i

    def tile(self, row: Array, j: Array) -> Tile:
        b, h, i = self.place(row)
        return Tile((b, h, i * self.block_q, j * self.block_k), self.size)

    def of_rows(self, x: Array, row: Array) -> Array:
        """The part of ``x [B, N, blocks_q, ...]`` that belongs to a row of tiles: ``[Bt, Nt, ...]``."""
        b, h, i = self.place(row)
        return _pick(x, (b, h, i), self.size[:2])

    def of_queries(self, x: Array, row: Array) -> Array:
        """The part of padded tokens ``x [B, T, N, H]`` that belongs to a row of tiles: ``[Bt, Nt, block_q, H]``.

        Turned here and not beforehand: queries are read once, and a copy of all of them costs more than a tile's.
        """
        bt, nt, block_q, _ = self.size
        part = lax.dynamic_slice(x, self._query_start(row), (bt, block_q, nt, x.shape[-1]))
        return jnp.swapaxes(part, 1, 2)

    def set_queries(self, x: Array, row: Array, part: Array) -> Array:
        """``x`` with ``part [Bt, Nt, block_q, H]`` where :meth:`of_queries` reads."""
        return lax.dynamic_update_slice(x, jnp.swapaxes(part, 1, 2), self._query_start(row))

    def _query_start(self, row: Array) -> tuple[Any, Any, Any, Any]:
        b, h, i = self.place(row)
        return b, i * np.int32(self.block_q), h, np.int32(0)

    def of_keys(self, x: Array, row: Array, j: Array) -> Array:
        """The part of ``x [B, K, blocks_k, ...]`` that belongs to key block j of a row: ``[Bt, Kt, ...]``."""
        return _pick(x, self._key_start(row, j), (self.size[0], self.kv_heads))

    def add_of_keys(self, x: Array, row: Array, j: Array, part: Array) -> Array:
        """``x`` with ``part`` added where :meth:`of_keys` reads."""
        start = (*self._key_start(row, j), *(np.int32(0),) * (x.ndim - 3))
        old = self.of_keys(x, row, j)
        return lax.dynamic_update_slice(x, (old + part)[:, :, None], start)

    def _key_start(self, row: Array, j: Array) -> tuple[Any, Any, Array]:
        b, h, _ = self.place(row)
        return b, lax.div(h, np.int32(self.g.heads // self.g.kv_heads)) if self.per_head else np.int32(0), j

    def gather_rows(self, x: Array) -> Array:
        """Stacked results ``[R, Bt, Nt, block_q]`` of all rows as ``[B, N, T]``."""
        jb, jh, blocks = self.jobs
        x = x.reshape(jb, jh, blocks, *x.shape[1:])
        x = jnp.moveaxis(x, (0, 3, 1, 4, 2), (0, 1, 2, 3, 4))
        return x.reshape(self.g.batch, self.g.heads, blocks * self.block_q)[:, :, : self.g.queries]


def _pick(x: Array, start: tuple[Any, Any, Any], size: tuple[int, int]) -> Array:
    zeros = (np.int32(0),) * (x.ndim - 3)
    return lax.dynamic_slice(x, (*start, *zeros), (*size, 1, *x.shape[3:]))[:, :, 0]


def row_lists(bm: BlockMap, walk: Walk) -> tuple[RowLists, RowLists]:
    """The full and the partial tiles of every row. A last, short key block counts as partial: its padding must be hidden."""
    xp = np if bm.known else jnp
    state = xp.broadcast_to(bm.state, (*walk.jobs[:2], *bm.state.shape[2:])).reshape(-1, walk.blocks_k)
    if walk.padding[1]:
        last = np.arange(walk.blocks_k) == walk.blocks_k - 1
        state = xp.where(last & (state == FULL), PARTIAL, state)
    return _lists(xp, state == FULL), _lists(xp, (state != FULL) & (state != EMPTY))


def _lists(xp: Any, chosen: Any) -> RowLists:
    count = chosen.sum(-1).astype(np.int32)
    cols = xp.argsort(~chosen, axis=-1, stable=True).astype(np.int32)
    if xp is np:
        cols = cols[:, : max(1, int(count.max()))]
    return RowLists(cols, count)
