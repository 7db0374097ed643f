"""What a score or mask is given: the numbers of a tile's cells, and its arrays, straight from global memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.gpu.distance import turned
from pallas_kernels.gpu.tile import across, down
from pallas_kernels.gpu.warpgroup import WGMMA, Lay, numbers, read
from pallas_kernels.tpu.problem import Layout, Problem


class Call(NamedTuple):
    """The call that a kernel's arrays are a part of: its seed of dropout, and the batch row, head, query and key at which the
    arrays begin in it."""

    seed: tuple[Any, Any]
    batch: Any
    head: Any
    query: Any
    key: Any

    @staticmethod
    def of(ref: Any) -> Call:
        """From ``int32 [6]``."""
        return Call((ref[0], ref[1]), *(ref[n] for n in range(2, 6)))

    def cells(
        self, b: Any, h: Any, t0: Any, s0: Any, shape: tuple[int, int], down: int = 0, lay: Lay = WGMMA
    ) -> tuple[Any, Any, Any, Any]:
        """Batch row, head, and the tile's query and key numbers ``[rows, columns]`` in the call; down: the axis of queries."""
        queries, keys = numbers(shape, down, t0 + self.query, lay), numbers(shape, 1 - down, s0 + self.key, lay)
        return b + self.batch, h + self.head, queries, keys

    def end(self, p: Problem) -> Any:
        """The number of the first key that is padding."""
        return self.key + p.keys


class Parts(NamedTuple):
    """Operands for one batch row, head and run of ``lay.rows`` queries, which begins at ``start``.

    The keys' gradient kernel has keys along the rows of its tiles (``down`` = 1): with :func:`sideways` operands the same code
    serves it.
    """

    p: Problem
    refs: tuple[Any, ...]
    layouts: tuple[Layout, ...]
    b: Any
    h: Any
    start: Any
    down: int = 0
    lay: Lay = WGMMA

    def _index(self, layout: Layout, *rest: Any) -> tuple[Any, ...]:
        return (self.b if layout.per_batch else 0, self.h if layout.per_head else 0, *rest)

    def _tile(self, at: Any) -> Any:
        """The number of the tile that this run of rows and columns from ``at`` on belong to."""
        t, s = (at, self.start) if self.down else (self.start, at)
        across = self.p.padded[1] // self.p.block_k
        return lax.div(t, jnp.int32(self.p.block_q)) * across + lax.div(s, jnp.int32(self.p.block_k))

    def _cells(self, layout: Layout, at: Any, columns: int) -> tuple[Any, Any]:
        """Where the cells of a tile lie in an operand that has an entry for each, or one by distance."""
        if layout.form == "cell":
            return pl.ds(self.start, self.lay.rows), pl.ds(at, columns)
        return pl.ds(0, self.lay.rows), pl.ds(self.p.padded[self.down] + at - self.start, columns)

    def fixed(self) -> list[Any]:
        """Those that all tiles of a row of tiles share: scalars and vectors along the rows; None for the others."""
        found: list[Any] = []
        for ref, layout in zip(self.refs, self.layouts, strict=True):
            if layout.form == "one":
                found.append(ref[self._index(layout, 0, 0)])
            elif layout.form == "row":
                found.append(read(ref, self._index(layout, 0, pl.ds(self.start, self.lay.rows)), self.lay.per_row))
            else:
                found.append(None)
        return found

    def moving(self, at: Any, columns: int) -> list[Any]:
        """Vectors along the columns of a tile that begins at ``at``; None for the others."""
        return [
            read(ref, self._index(layout, 0, pl.ds(at, columns)), self.lay.per_column) if layout.form == "column" else None
            for ref, layout in zip(self.refs, self.layouts, strict=True)
        ]

    def whole(self, fixed: list[Any], moving: list[Any], at: Any, shape: tuple[int, int]) -> list[Any]:
        """All of them, as scalars or tiles; those with an entry per cell or distance are read only here, to save registers."""
        found: list[Any] = []
        for ref, layout, f, m in zip(self.refs, self.layouts, fixed, moving, strict=True):
            if layout.form == "one":
                found.append(f)
            elif layout.form == "row":
                found.append(across(f, shape))
            elif layout.form == "column":
                found.append(down(m, shape))
            elif layout.form == "tile":
                found.append(ref[self._index(layout, self._tile(at), 0, 0)])
            else:
                x = read(ref, self._index(layout, *self._cells(layout, at, shape[1])), self.lay.tile)
                found.append(x.astype(jnp.int32) if x.dtype == jnp.int8 else x)
        return found


def sideways(operands: tuple[Any, ...], layouts: tuple[Layout, ...]) -> tuple[tuple[Any, ...], tuple[Layout, ...]]:
    """Laid-out operands and their layouts for tiles that have keys along their rows."""
    swapped = {"row": "column", "column": "row"}
    found = []
    for x, layout in zip(operands, layouts, strict=True):
        found.append(x.swapaxes(2, 3) if layout.form == "cell" else turned(x) if layout.form == "distance" else x)
    return tuple(found), tuple(layout._replace(form=swapped.get(layout.form, layout.form)) for layout in layouts)
