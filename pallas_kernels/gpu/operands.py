"""How the arrays of a score or mask reach a warpgroup's tiles: straight from global memory, as registers want them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gpu.tile import across, down
from pallas_kernels.gpu.warpgroup import PER_COLUMN, PER_ROW, ROWS, TILE, read
from pallas_kernels.tpu.problem import Layout


class Parts(NamedTuple):
    """Operands for one batch row, head and run of ROWS queries, which begins at ``start``.

    The keys' gradient kernel has keys along the rows of its tiles: with :func:`sideways` operands the same code serves it.
    """

    refs: tuple[Any, ...]
    layouts: tuple[Layout, ...]
    b: Any
    h: Any
    start: Any

    def _index(self, layout: Layout, *rest: Any) -> tuple[Any, ...]:
        return (self.b if layout.per_batch else 0, self.h if layout.per_head else 0, *rest)

    def fixed(self) -> list[Any]:
        """Those that all tiles of a row of tiles share: scalars and vectors along the rows; None for the others."""
        found: list[Any] = []
        for ref, layout in zip(self.refs, self.layouts, strict=True):
            if layout.form == "one":
                found.append(ref[self._index(layout, 0, 0)])
            elif layout.form == "row":
                found.append(read(ref, self._index(layout, 0, pl.ds(self.start, ROWS)), PER_ROW))
            else:
                found.append(None)
        return found

    def moving(self, at: Any, columns: int) -> list[Any]:
        """Vectors along the columns of a tile that begins at ``at``; None for the others."""
        return [
            read(ref, self._index(layout, 0, pl.ds(at, columns)), PER_COLUMN) if layout.form == "column" else None
            for ref, layout in zip(self.refs, self.layouts, strict=True)
        ]

    def whole(self, fixed: list[Any], moving: list[Any], at: Any, shape: tuple[int, int]) -> list[Any]:
        """All of them, as scalars or tiles; those with an entry per cell are read only here, to save registers."""
        found: list[Any] = []
        for ref, layout, f, m in zip(self.refs, self.layouts, fixed, moving, strict=True):
            if layout.form == "one":
                found.append(f)
            elif layout.form == "row":
                found.append(across(f, shape))
            elif layout.form == "column":
                found.append(down(m, shape))
            else:
                x = read(ref, self._index(layout, pl.ds(self.start, ROWS), pl.ds(at, shape[1])), TILE)
                found.append(x.astype(jnp.int32) if x.dtype == jnp.int8 else x)
        return found


def sideways(operands: tuple[Any, ...], layouts: tuple[Layout, ...]) -> tuple[tuple[Any, ...], tuple[Layout, ...]]:
    """Laid-out operands and their layouts for tiles that have keys along their rows."""
    swapped = {"row": "column", "column": "row"}
    turned = tuple(layout._replace(form=swapped.get(layout.form, layout.form)) for layout in layouts)
    return tuple(x.swapaxes(2, 3) if f.form == "cell" else x for x, f in zip(operands, layouts, strict=True)), turned
