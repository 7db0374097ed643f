"""Matrix products, a triangular solve and rows cut apart, with derivatives that a kernel can run.

JAX's own rules multiply a float32 cotangent with a bfloat16 operand, and differentiate through every step of an inverse.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def dot(a: Any, b: Any, over: tuple[int, int]) -> Any:
    """A product summed in float32 over axis ``over[0]`` of a and ``over[1]`` of b; float32 is not rounded on the way in."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(a: Any, b: Any, over: tuple[int, int], dtype: Any) -> Any:
    """:func:`dot` of float32 matrices rounded to ``dtype``, and so are those of its derivative."""
    return dot(a.astype(dtype), b.astype(dtype), over)


def _product_forward(a: Any, b: Any, over: tuple[int, int], dtype: Any) -> Any:
    a, b = a.astype(dtype), b.astype(dtype)
    return dot(a, b, over), (a, b)


def _product_backward(over: tuple[int, int], dtype: Any, saved: Any, d: Any) -> Any:
    a, b = saved
    d = d.astype(dtype)
    da = dot(d, b, (1, 1 - over[1])) if over[0] else dot(b, d, (1 - over[1], 1))
    db = dot(d, a, (0, 1 - over[0])) if over[1] else dot(a, d, (1 - over[0], 0))
    return da, db


product.defvjp(_product_forward, _product_backward)


def _leading(x: Any) -> Any:
    """The leading 8 bits of float32 numbers: bfloat16 holds them, and the rest is exact."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16)), jnp.float32)


def _chosen_sums(chosen: Any, x: Any, axis: int, dtype: Any) -> Any:
    if dtype == jnp.float32:
        return dot(chosen, x, (axis, 0))
    high = _leading(x)
    middle = _leading(x - high)
    parts = [part.astype(dtype) for part in (high, middle, x - high - middle)]
    return sum(dot(chosen.astype(dtype), part, (axis, 0)) for part in parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def sums(chosen: Any, x: Any, dtype: Any) -> Any:
    """``chosen x`` for a float32 ``chosen`` of zeros and ones and a float32 ``x``, to float32.

    With a ``dtype`` of bfloat16, three products of that type do it, half of what a float32 product takes.
    """
    return _chosen_sums(chosen, x, 1, dtype)


def _sums_forward(chosen: Any, x: Any, dtype: Any) -> Any:
    return _chosen_sums(chosen, x, 1, dtype), chosen


def _sums_backward(dtype: Any, chosen: Any, d: Any) -> Any:
    return jnp.zeros_like(chosen), _chosen_sums(chosen, d, 0, dtype)


sums.defvjp(_sums_forward, _sums_backward)


def _fine_dot(a: Any, b: Any, dtype: Any) -> Any:
    """``a b`` to float32, or for bfloat16 to 14 bits, 6 more than the result will be rounded to."""
    if dtype == jnp.float32:
        return dot(a, b, (1, 0))
    (a0, a1), (b0, b1) = (((high := _leading(x)).astype(dtype), (x - high).astype(dtype)) for x in (a, b))
    return dot(a0, b0, (1, 0)) + (dot(a0, b1, (1, 0)) + dot(a1, b0, (1, 0)))


def differ_first_at(level: int, rows: Any, columns: Any) -> Any:
    """Cells whose row is in the upper half, and column in the lower half, of the same ``2 << level`` aligned numbers."""
    return ((rows ^ columns) >> level == 1) & (rows > columns)


def inverse(a: Any, levels: int, dtype: Any) -> Any:
    """``(I - a)^-1`` of a strictly lower triangular ``a [C, C]``, ``C = 2 ** levels``, by blocks of doubling size.

    The inverse of a block is [[T1, 0], [T2 A21 T1, T2]]; all blocks of a size are done in one product.
    """
    rows, columns = (lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in (0, 1))
    t = jnp.where(rows == columns, 1.0, 0.0)
    for level in range(levels):
        a21 = jnp.where(differ_first_at(level, rows, columns), a, 0.0)
        t = t + (a21 if level == 0 else _fine_dot(t, _fine_dot(a21, t, dtype), dtype))
    return t


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def solve(a: Any, b: Any, levels: int, dtype: Any) -> Any:
    """``z = a z + b`` for strictly lower triangular ``a [C, C]``; the inverse is rounded to ``dtype`` when it is there."""
    return dot(inverse(a, levels, dtype).astype(dtype), b.astype(dtype), (1, 0))


def _solve_forward(a: Any, b: Any, levels: int, dtype: Any) -> Any:
    t = inverse(a, levels, dtype).astype(dtype)
    z = dot(t, b.astype(dtype), (1, 0))
    return z, (t, z.astype(dtype))


def _solve_backward(levels: int, dtype: Any, saved: Any, d: Any) -> Any:
    t, z = saved
    db = dot(t, d.astype(dtype), (0, 0))
    return dot(db.astype(dtype), z, (1, 1)), db


solve.defvjp(_solve_forward, _solve_backward)
