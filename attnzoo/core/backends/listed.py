"""Attention over listed keys, by its kernel or in plain JAX, with its derivative."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from attnzoo.core.backends.part import no_gradient
from attnzoo.core.request import product_dtype

LOG2E = 1.4426950408889634


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(by_kernel: bool, q: Array, k: Array, v: Array, lists: Array, rows: Array | None) -> tuple[Array, Array]:
    """``out [B, P, Tq, R, Hv]`` and ``lse [B, P, Tq, R]``; q scaled by log2(e) too, k and v ``[B, K, S, ·]``."""
    if by_kernel:
        from pallas_kernels.tpu import gather

        return _in_parts(gather.forward, gather.Listed(q, k, v, lists, rows))

    def block(x: Any) -> tuple[Array, Array]:
        q, lists, rows = x
        keys, values = _taken(k, lists), _taken(v, lists)
        s = _logits(q, keys, lists, rows)
        top = s.max(-1, keepdims=True)
        top = jnp.where(jnp.isneginf(top), 0.0, top)
        weight = jnp.exp2(s - top)
        total = weight.sum(-1, keepdims=True)
        safe = jnp.where(total > 0, total, 1.0)
        out = _product("bprm,bpmh->bprh", (weight / safe).astype(values.dtype), values)
        lse = jnp.where(total > 0, top / LOG2E + jnp.log(safe), -jnp.inf)
        return out.astype(v.dtype), lse[..., 0]

    return jax.tree.map(_back, lax.map(block, _by_blocks(q, lists, rows)))


def _forward(by_kernel: bool, *arrays: Any) -> Any:
    out, lse = attend(by_kernel, *arrays)
    return (out, lse), (arrays, out, lse)


def _backward(by_kernel: bool, saved: Any, cotangents: tuple[Array, Array]) -> Any:
    (q, k, v, lists, rows), out, lse = saved
    d_out, d_lse = cotangents
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    norm = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)

    def block(sums: tuple[Array, Array], x: Any) -> Any:
        (q, lists, rows), (d_out, norm, delta) = x
        keys, values = _taken(k, lists), _taken(v, lists)
        weight = jnp.exp2(_logits(q, keys, lists, rows) - norm[..., None])
        d_out = d_out.astype(values.dtype)
        ds = weight * (_product("bprh,bpmh->bprm", d_out, values) - delta[..., None])
        ds, weight = ds.astype(keys.dtype), weight.astype(keys.dtype)
        dk = _product("bprm,bprh->bpmh", ds, q.astype(keys.dtype)) / LOG2E
        dv = _product("bprm,bprh->bpmh", weight, d_out)
        dq = None if by_kernel else (_product("bprm,bpmh->bprh", ds, keys) / LOG2E).astype(q.dtype)
        return (_added(sums[0], lists, dk), _added(sums[1], lists, dv)), dq

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = lax.scan(block, zeros, (_by_blocks(q, lists, rows), _by_blocks(d_out, norm, delta)))
    if by_kernel:
        from pallas_kernels.tpu import gather

        dq = _in_parts(gather.queries_gradient, gather.Listed(q, k, v, lists, rows), d_out, norm, delta)
    else:
        dq = _back(dq)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), no_gradient(lists), None if rows is None else no_gradient(rows)


attend.defvjp(_forward, _backward)


def _in_parts(run: Any, x: Any, *more: Array) -> Any:
    """A kernel's results; blocks of more queries than it holds are several that share a list."""
    from pallas_kernels.tpu.gather import most_rows

    batch, lists, blocks, queries, _ = x.q.shape
    parts = -(-queries // most_rows(x))
    if parts == 1:
        return run(x, *more)
    rows = -(-queries // parts)

    def cut(a: Array, axis: int = 3) -> Array:
        a = jnp.pad(a, [(0, parts * rows - queries if n == axis else 0) for n in range(a.ndim)])
        return a.reshape(*a.shape[: axis - 1], blocks * parts, rows, *a.shape[axis + 1 :])

    def joined(a: Array) -> Array:
        return a.reshape(batch, lists, blocks, parts * rows, *a.shape[4:])[:, :, :, :queries]

    same = x._replace(
        q=cut(x.q), positions=jnp.repeat(x.positions, parts, axis=2), rows=None if x.rows is None else cut(x.rows, 2)
    )
    return jax.tree.map(joined, run(same, *map(cut, more)))


def _by_blocks(*xs: Array | None) -> tuple[Array | None, ...]:
    """``[B, P, Tq, ...]`` (or the positions of rows, ``[B, Tq, R]``) with the blocks first."""
    return tuple(None if x is None else jnp.moveaxis(x, 1 if x.ndim == 3 else 2, 0) for x in xs)


def _back(x: Array) -> Array:
    return jnp.moveaxis(x, 0, 2)


def _at(x: Array, lists: Array) -> Any:
    """The listed rows of an array ``[B, K, S, ·]``, as an index ``[B, P, M]``."""
    batch, heads = np.ogrid[: lists.shape[0], : lists.shape[1]]
    return batch[..., None], heads[..., None] * x.shape[1] // lists.shape[1], lists


def _taken(x: Array, lists: Array) -> Array:
    """``[B, P, M, ·]``; zeros where a list names nothing."""
    rows = x.at[_at(x, jnp.maximum(lists, 0))].get(mode="promise_in_bounds")
    return jnp.where(lists[..., None] >= 0, rows, 0).astype(product_dtype(x.dtype))


def _added(x: Array, lists: Array, rows: Array) -> Array:
    """``x [B, K, S, ·]`` with ``rows [B, P, M, ·]`` added to the listed ones."""
    return x.at[_at(x, jnp.where(lists < 0, x.shape[2], lists))].add(rows, mode="drop")


def _product(axes: str, a: Array, b: Array) -> Array:
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(axes, a, b, precision=exact, preferred_element_type=jnp.float32)


def _logits(q: Array, keys: Array, lists: Array, rows: Array | None) -> Array:
    s = _product("bprh,bpmh->bprm", q.astype(keys.dtype), keys)
    seen = lists[:, :, None] >= 0
    if rows is not None:
        seen = seen & (lists[:, :, None] <= rows[:, None, :, None])
    return jnp.where(seen, s, -jnp.inf)
