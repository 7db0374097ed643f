"""What a warpgroup does with its registers: products, loads, and the numbers of its cells, on the chip or simulated.

On the chip every two-dimensional value lies in registers as a product's result comes there (:class:`Lay`), and vectors along
its rows or columns as a sum over the other axis would. The simulator knows no layouts, and its wgmma is not used: there the
same functions are plain JAX.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu.launch import simulated


class Lay(NamedTuple):
    """How a warpgroup holds a tile: its rows, and the layouts of tiles and of vectors along their rows and columns."""

    rows: int
    tile: Any
    per_row: Any
    per_column: Any


#: What wgmma leaves in registers on Hopper, and what comes from the tensor memory of Blackwell.
WGMMA, TCGEN05 = (
    Lay(rows, layout, layout.reduce(1), layout.reduce(0))
    for rows, layout in ((64, plgpu.Layout.WGMMA), (128, plgpu.Layout.TCGEN05))
)
ROWS, TILE, PER_ROW, PER_COLUMN = WGMMA


def lay_of(generation: str | None) -> Lay:
    """How the kernels for a GPU generation hold tiles."""
    return TCGEN05 if generation == "blackwell" else WGMMA


_plgpu: Any = plgpu
"""What differs in type between versions of JAX."""
_LOAD = inspect.signature(plgpu.load)


def laid(x: Any, layout: Any) -> Any:
    return x if simulated() else plgpu.layout_cast(x, layout)


def filled(shape: tuple[int, ...], value: float, lay: Lay = WGMMA) -> Any:
    """A tile, or a vector along its rows."""
    return laid(jnp.full(shape, value, jnp.float32), lay.tile if len(shape) == 2 else lay.per_row)


def numbers(shape: tuple[int, int], axis: int, start: Any, lay: Lay = WGMMA) -> Any:
    """``start + index along the axis``, int32."""
    return laid(lax.broadcasted_iota(jnp.int32, shape, axis), lay.tile) + start


def read(ref: Any, index: tuple[Any, ...], layout: Any) -> Any:
    """A piece of shared or global memory."""
    if simulated():
        return ref[index]
    # Up to JAX 0.11 the index is an argument of its own.
    source = (ref, index) if "idx" in _LOAD.parameters else (ref.at[index],)
    return _plgpu.load(*source, layout=layout, optimized=False)


def shared(shape: tuple[int, ...], dtype: Any, width: int = 128) -> Any:
    """Shared memory for operands of products, swizzled over ``width`` bytes: all operands of a product the same, and its sums
    run over a multiple of that width."""
    transforms = (_plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize)), _plgpu.SwizzleTransform(width))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def product(a: Any, b: Any, issued: Callable[[], None] = lambda: None) -> Any:
    """``a [rows, n] · b [columns, n]ᵀ`` in float32; ``issued`` runs once the product is under way."""
    if simulated():
        issued()
        return plain_product(a[...], b[...].T)

    def start(acc: Any) -> Any:
        plgpu.wgmma(acc, a, plgpu.transpose_ref(b, (1, 0)))
        issued()
        return acc[...]

    return pl.run_scoped(start, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(acc: Any, a: Any, b: Any, transposed: bool = False) -> Any:
    """``acc + a · b``, or ``acc + a · bᵀ``, with ``a`` in registers or shared memory and ``b`` in shared memory."""
    if simulated():
        return acc + plain_product(a[...], b[...].T if transposed else b[...])

    def start(ref: Any) -> None:
        plgpu.wgmma(ref, a, plgpu.transpose_ref(b, (1, 0)) if transposed else b)

    return pl.run_state(start)(plgpu.ACC.init(acc))


def plain_product(a: Any, b: Any) -> Any:
    """``a · b`` in float32, for the simulator."""
    return jax.lax.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision=lax.Precision.HIGHEST)
