"""The paged layout: rows of different lengths draw pages from one pool through a block table, all inside jit
(vLLM; Kwon et al., 2023, arXiv 2309.06180, §4).

A `PagedCache` is used exactly as a `LayerCache`: `next_positions`, `append`, `cached_attention`. A row's pages are read in
order, so slot and position agree and the result equals that of the dense layout: in place by the TPU kernels, where pages
have a multiple of 128 slots, elsewhere gathered.
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from attnzoo.core.cache.layer import EMPTY, LayerCache, init_cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedCache:
    """B rows that share P pages of `page` slots each; a row may own at most M pages.

    Attributes:
        payload: pytree of (P, K, page, ...) leaves.
        table: the block table: page number of each row's m-th page, -1 where it has none.
        free: a stack of the free pages' numbers; its first `num_free` entries count.
        num_free: pages left in the pool.
        seen: tokens each row has been given, which is also the position of the next one.
        overflow: set, inside jit, once a row lost a token: the pool was empty, or the row's table full.
    """

    payload: PyTree[Array]
    table: Int[Array, "B M"]
    free: Int[Array, "P"]
    num_free: Int[Array, ""]
    seen: Int[Array, "B"]
    overflow: Bool[Array, "B"]

    @property
    def page(self) -> int:
        """Slots per page."""
        return jax.tree.leaves(self.payload)[0].shape[2]

    @property
    def used(self) -> Int[Array, "B K"]:
        """Slots that hold something."""
        return self.view().used

    def room(self) -> str:
        """How much fits, in words for error messages."""
        rows, pages = self.table.shape[1], self.free.shape[0]
        return f"{rows} pages of {self.page} slots per row, {pages} pages in all"

    def next_positions(self, length: int) -> Int[Array, "B T"]:
        """Positions of the next `length` tokens of each row: call it before `append`."""
        return self.seen[:, None] + jnp.arange(length, dtype=jnp.int32)

    @property
    def positions(self) -> Int[Array, "B S"]:
        """Token positions of the M · page slots of each row, `EMPTY` where there is nothing."""
        pos = jnp.arange(self.table.shape[1] * self.page, dtype=jnp.int32)
        held = (pos < self.seen[:, None]) & jnp.repeat(self.table != EMPTY, self.page, axis=1)
        return jnp.where(held, pos, EMPTY)

    def view(self) -> LayerCache:
        """A dense cache of M · page slots, gathered through the block table."""
        batch, columns = self.table.shape
        slots = columns * self.page

        def gather(pages):
            own = pages[jnp.maximum(self.table, 0)]  # [B, M, K, page, ...]
            return jnp.moveaxis(own, 1, 2).reshape(batch, pages.shape[1], slots, *pages.shape[3:])

        payload = jax.tree.map(gather, self.payload)
        heads = jax.tree.leaves(payload)[0].shape[1]
        pos = jnp.broadcast_to(self.positions[:, None], (batch, heads, slots))
        return LayerCache(
            payload=payload,
            pos=pos,
            w=(pos != EMPTY).astype(jnp.float32),
            score=jnp.zeros(pos.shape, jnp.float32),
            budget=jnp.full((batch, heads), slots, jnp.int32),
            seen=self.seen,
            overflow=self.overflow,
        )

    def extend(self, new: PyTree[Float[Array, "B K T ..."]], lengths: Int[Array, "B"]) -> Self:
        """Writes the first `lengths` of T heads-major tokens; use `append`, which also checks shapes."""
        cache = self._allocate(self.seen + lengths)
        length = jax.tree.leaves(new)[0].shape[2]
        pos = self.next_positions(length)
        valid = jnp.arange(length) < lengths[:, None]
        column = pos // self.page
        number = jnp.take_along_axis(cache.table, jnp.minimum(column, self.table.shape[1] - 1), axis=1)
        fits = (column < self.table.shape[1]) & (number != EMPTY)
        number = jnp.where(valid & fits, number, self.free.shape[0])  # out of range: not written
        heads = jax.tree.leaves(new)[0].shape[1]

        def put(pages, value):
            where = (number[:, None], jnp.arange(heads)[:, None], (pos % self.page)[:, None])
            return pages.at[where].set(value.astype(pages.dtype), mode="drop")

        return dataclasses.replace(
            cache,
            payload=jax.tree.map(put, cache.payload, new),
            seen=self.seen + lengths,
            overflow=self.overflow | jnp.any(valid & ~fits, axis=1),
        )

    def release(self, rows: Bool[Array, "B"]) -> Self:
        """Gives the pages of the marked rows back to the pool and empties the rows, for the next request."""
        returned = ((self.table != EMPTY) & rows[:, None]).ravel()
        place = jnp.where(returned, self.num_free + jnp.cumsum(returned) - 1, self.free.shape[0])
        return dataclasses.replace(
            self,
            table=jnp.where(rows[:, None], EMPTY, self.table),
            free=self.free.at[place].set(self.table.ravel(), mode="drop"),
            num_free=self.num_free + jnp.sum(returned, dtype=jnp.int32),
            seen=jnp.where(rows, 0, self.seen),
            overflow=self.overflow & ~rows,
        )

    def _allocate(self, total: Int[Array, "B"]) -> Self:
        """Gives every row the pages for `total` tokens, row by row, as far as the pool reaches."""
        columns = self.table.shape[1]
        owned = jnp.sum(self.table != EMPTY, axis=1)
        needed = jnp.clip(-(-total // self.page), owned, columns)
        column = jnp.arange(columns)
        wanted = (column >= owned[:, None]) & (column < needed[:, None])
        rank = (jnp.cumsum(wanted.ravel()) - 1).reshape(wanted.shape)
        granted = wanted & (rank < self.num_free)
        number = self.free[jnp.maximum(self.num_free - 1 - rank, 0)]  # from the top of the stack
        return dataclasses.replace(
            self,
            table=jnp.where(granted, number, self.table),
            num_free=self.num_free - jnp.sum(granted, dtype=jnp.int32),
        )


def init_paged_cache(
    batch: int,
    length: int,
    spec: PyTree,
    *,
    page: int = 16,
    pages: int | None = None,
    dtype: DTypeLike = jnp.float32,
) -> PagedCache:
    """An empty paged cache.

    Args:
        batch: B.
        length: the most tokens one row may hold; rounded up to whole pages.
        spec, dtype: as in `init_cache`.
        page: slots per page.
        pages: pages in the pool; default enough for every row at full length, fewer when rows differ in
            length.

    Raises:
        ValueError: sizes that are not positive, or what `init_cache` refuses.
    """
    if page < 1 or length < 1 or (pages is not None and pages < 1):
        raise ValueError(f"init_paged_cache: length, page and pages must be >= 1, got {length}, {page}, {pages}")
    columns = -(-length // page)
    pages = batch * columns if pages is None else pages
    pool = init_cache(pages, page, spec, dtype=dtype)  # a page is a short row
    return PagedCache(
        payload=pool.payload,
        table=jnp.full((batch, columns), EMPTY, jnp.int32),
        free=jnp.asarray(np.arange(pages - 1, -1, -1), jnp.int32),
        num_free=jnp.asarray(pages, jnp.int32),
        seen=jnp.zeros(batch, jnp.int32),
        overflow=jnp.zeros(batch, bool),
    )
