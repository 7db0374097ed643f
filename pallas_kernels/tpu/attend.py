"""Flash attention with its derivative: the operation the library calls.

The forward kernel is in `flash`; the backward pass has one kernel for all of dq, dk and dv where dq finds room on the chip, and
else one for dq and one for dk and dv.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.tpu import jobs
from pallas_kernels.tpu.choice import stairs
from pallas_kernels.tpu.flash import Inputs, forward
from pallas_kernels.tpu.flash_dkv import keys_gradient
from pallas_kernels.tpu.flash_dq import queries_gradient
from pallas_kernels.tpu.jobs import PARTIAL, Jobs
from pallas_kernels.tpu.problem import (
    LOG2E,
    Problem,
    laid_out,
    taken_back,
)


class Lists(NamedTuple):
    """The tiles by rows, and by columns for all heads of a key head (``kinds_of`` packs each head's kind, 2 bits each)."""

    rows: Jobs
    columns: Jobs
    kinds_of: Any


def column_lists(p: Problem, state: Any) -> tuple[Jobs, Any]:
    """From ``state [B|1, N|1, rows, columns]``; kinds_of is None where all heads of a group have the same tiles."""
    xp = np if isinstance(state, np.ndarray) else jnp
    state = xp.swapaxes(state, 2, 3)
    batch, heads, major, minor = state.shape
    if heads == 1 or p.group == 1:
        return jobs.make_jobs(state.reshape(batch * heads, major, minor), p.kinds), None
    members = state.reshape(batch * p.kv_heads, p.group, major, minor).astype(np.int32)
    made = jobs.make_jobs(xp.where((members > 0).any(1), PARTIAL, 0))
    packed = (members << (2 * np.arange(p.group)[:, None, None])).sum(1).reshape(batch * p.kv_heads, -1)
    words = made.words.reshape(batch * p.kv_heads, -1)
    at = jobs.major(words) * minor + jobs.minor(words)
    kinds = p.kinds if xp is jnp else frozenset(int(k) for k in np.unique(members))
    kinds_of = xp.take_along_axis(packed, at, axis=1).astype(np.int32).ravel()
    return Jobs(made.words, made.count, made.steps, made.capacity, kinds), kinds_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(p: Problem, q: Any, k: Any, v: Any, score: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Any, Any]:
    """``out [B, N, T, Hv]``, ``lse [B, N, 1, T]`` of padded inputs (v None: the keys are the values); ``score`` operands as
    the caller holds them, rest = (lists, laid-out mask operands, call, value_scale).

    Raises ValueError where a derivative is asked for and k or v are of 8 bits.
    """
    lists, mask, call, value_scale = rest
    return forward(p, lists.rows, Inputs(q, k, v, _laid(p, score), mask, call, value_scale=value_scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_pages(p: Problem, q: Any, k: Any, v: Any, score: tuple[Any, ...], rest: Any, pages: Any) -> tuple[Any, Any]:
    """:func:`attend` where k and v are pools ``[P, K, page, ·]`` and ``pages int32 [B · M]`` names the pages of batch rows.

    Raises ValueError where a derivative is asked for.
    """
    lists, mask, call, _ = rest
    return forward(p, lists.rows, Inputs(q, k, v, _laid(p, score), mask, call, pages))


def _no_derivative(*_: Any) -> Any:
    raise ValueError(
        "pages: keys that are read through a block table have no derivative in the kernels; use backend='blockwise'"
    )


attend_pages.defvjp(_no_derivative, _no_derivative)


def _laid(p: Problem, score: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(laid_out(p, x, layout) for x, layout in zip(score, p.score_layouts, strict=True))


def _attend_forward(p: Problem, q: Any, k: Any, v: Any, score: tuple[Any, ...], rest: tuple[Any, ...]) -> Any:
    if any(x is not None and x.dtype != q.dtype for x in (k, v)):
        raise ValueError("quantized keys and values have no derivative in the kernels; use backend='blockwise'")
    out, lse = attend(p, q, k, v, score, rest)
    return (out, lse), (q, k, v, score, rest, out, lse)


def _attend_backward(p: Problem, saved: Any, cotangents: tuple[Any, Any]) -> Any:
    *arrays, out, lse = saved
    d_out, d_lse = cotangents
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)[:, :, None] - d_lse
    if not p.keys_are_values:
        return attend_gradients(p, tuple(arrays), lse, d_out, delta)
    q, k, _, *others = arrays
    dq, dk, dv, *rest = attend_gradients(dataclasses.replace(p, keys_are_values=False), (q, k, k, *others), lse, d_out, delta)
    return dq, dk + dv, None, *rest


def attend_gradients(p: Problem, arrays: Any, lse: Any, d_out: Any, delta: Any) -> Any:
    """Of the arguments ``(q, k, v, score, rest)`` of :func:`attend`, from the log-sum-exp of all keys of its queries, which may
    be more than these, and ``delta = Σ d_out·out - d_lse``."""
    q, k, v, score, rest = arrays
    if p.stair is not None:
        p = dataclasses.replace(p, stair=stairs()[1])
    lists, mask, call, _ = rest
    x = Inputs(q, k, v, _laid(p, score), mask, call)
    norm = jnp.where(jnp.isneginf(lse), jnp.inf, lse * (LOG2E if p.base2 else 1.0))
    d_out = d_out.astype(v.dtype)
    dq, dk, dv, gradients = keys_gradient(p, lists.columns, lists.kinds_of, x, d_out, norm, delta)
    if dq is None:
        dq, by_row = queries_gradient(p, lists.rows, x, d_out, norm, delta)
        gradients |= by_row
    d_score = tuple(
        taken_back(p, gradients[n], x, layout) if p.differentiable[n] else _no_gradient(x)
        for n, (x, layout) in enumerate(zip(score, p.score_layouts, strict=True))
    )
    return dq, dk, dv, d_score, jax.tree.map(_no_gradient, rest)


def _no_gradient(x: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


attend.defvjp(_attend_forward, _attend_backward)
