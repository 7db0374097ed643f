"""Flash attention on a GPU with its derivative: the operation the library calls."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu import blackwell, choice, flash
from pallas_kernels.gpu.backward import keys_gradient, queries_gradient
from pallas_kernels.gpu.distance import placed, table_gradients
from pallas_kernels.gpu.flash import Inputs
from pallas_kernels.gpu.launch import generation
from pallas_kernels.gpu.refusal import refusal
from pallas_kernels.gpu.tiles import Tiles
from pallas_kernels.gpu.warpgroup import lay_of
from pallas_kernels.tpu.problem import LOG2E, Problem, laid_out, taken_back


class Lists(NamedTuple):
    """The tiles by rows and by columns, each for one block of queries and of keys."""

    rows: Tiles
    columns: Tiles


def forward(p: Problem, tiles: Tiles, x: Inputs, slots: int) -> tuple[Any, Any]:
    """`flash.forward`, by the kernel for the GPU generation that is here or named."""
    kernel = blackwell.forward if generation() == "blackwell" else flash.forward
    return kernel(p, tiles, x, slots)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(p: Problem, q: Any, k: Any, v: Any, score: tuple[Any, ...], rest: tuple[Any, ...]) -> tuple[Any, Any]:
    """``out [B, T, N, Hv]``, ``lse [B, N, T]`` of inputs as `flash.Inputs` has them; ``score`` operands as the caller holds
    them, rest = (lists, laid-out mask operands, call).

    Raises ValueError, saying what would work, for what :func:`pallas_kernels.gpu.refusal.refusal` names.
    """
    _check(p, q, k, v, backward=False)
    slots = choice.slots(q.shape[-1], v.shape[-1], p.block_k, p.block_q)
    return forward(p, rest[0].rows, _inputs(p, q, k, v, score, rest), slots)


def _check(p: Problem, q: Any, k: Any, v: Any, backward: bool) -> None:
    if (why := refusal(p, q, k, v, backward=backward)) is not None:
        raise ValueError(f"flash attention on a GPU cannot run this: {why}")


def _inputs(p: Problem, q: Any, k: Any, v: Any, score: tuple[Any, ...], rest: tuple[Any, ...]) -> Inputs:
    """The kernels' inputs, from the arguments of :func:`attend`."""
    _, mask, call = rest
    laid = tuple(laid_out(p, x, layout) for x, layout in zip(score, p.score_layouts, strict=True))
    rows = lay_of(generation()).rows
    return Inputs(q, k, v, placed(laid, p.score_layouts, rows), placed(mask, p.mask_layouts, rows), call)


def _attend_forward(p: Problem, q: Any, k: Any, v: Any, score: tuple[Any, ...], rest: tuple[Any, ...]) -> Any:
    _check(p, q, k, v, backward=True)
    out, lse = attend(p, q, k, v, score, rest)
    return (out, lse), (q, k, v, score, rest, out, lse)


def _attend_backward(p: Problem, saved: Any, cotangents: tuple[Any, Any]) -> Any:
    *arrays, out, lse = saved
    d_out, d_lse = cotangents
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - d_lse
    return attend_gradients(p, tuple(arrays), lse, d_out, delta)


def attend_gradients(p: Problem, arrays: Any, lse: Any, d_out: Any, delta: Any) -> Any:
    """Of the arguments ``(q, k, v, score, rest)`` of :func:`attend`, from the log-sum-exp of all keys of its queries, which may
    be more than these, and ``delta = Σ d_out·out - d_lse``.

    Raises ValueError as :func:`attend` does.
    """
    q, k, v, score, rest = arrays
    _check(p, q, k, v, backward=True)
    if p.keys_by_head:
        by_token = dataclasses.replace(p, keys_by_head=False)
        turned = q, k.swapaxes(1, 2), v.swapaxes(1, 2), score, rest
        dq, dk, dv, *others = attend_gradients(by_token, turned, lse, d_out, delta)
        return dq, dk.swapaxes(1, 2), dv.swapaxes(1, 2), *others
    lists, x = rest[0], _inputs(p, q, k, v, score, rest)
    norm = jnp.where(jnp.isneginf(lse), jnp.inf, lse * (LOG2E if p.base2 else 1.0))
    d_out = d_out.astype(v.dtype)
    slots = choice.backward_slots(q.shape[-1], v.shape[-1], p.block_k)
    dq, by_row = queries_gradient(p, lists.rows, x, d_out, norm, delta, slots)
    dk, dv, by_column = keys_gradient(p, lists.columns, x, d_out, norm, delta, slots)
    tables = [n for n, layout in enumerate(p.score_layouts) if p.differentiable[n] and layout.form == "distance"]
    by_distance = table_gradients(p, x, d_out, norm, delta, tables) if tables else {}
    found = {**by_row, **by_column, **by_distance}
    d_score = tuple(
        _operand_gradient(p, lists.rows, found[n], x, layout) if p.differentiable[n] else _no_gradient(x)
        for n, (x, layout) in enumerate(zip(score, p.score_layouts, strict=True))
    )
    return dq, dk, dv, d_score, jax.tree.map(_no_gradient, rest)


def _operand_gradient(p: Problem, tiles: Tiles, d: Any, like: Any, layout: Any) -> Any:
    if layout.form == "cell":
        d = jnp.where(_visited(p, tiles), d, 0)
    if layout.form == "one":  # comes as sums along rows
        d = d.sum(-1, keepdims=True)
    return taken_back(p, d, like, layout)


def _visited(p: Problem, tiles: Tiles) -> Any:
    """Cells in tiles that were computed, ``[B|1, N|1, T, S]`` in whole blocks."""
    columns = p.padded[1] // p.block_k
    n = jnp.arange(columns)
    begin, count = jnp.asarray(tiles.begin)[:, None], jnp.asarray(tiles.count)[:, None]
    minor = jnp.asarray(tiles.minor)[jnp.minimum(begin + n, len(tiles.minor) - 1)]
    flags = ((minor[:, :, None] == n) & (n < count)[:, :, None]).any(1)
    flags = flags.reshape(p.batch if p.per_batch else 1, p.heads if p.per_head else 1, tiles.rows, columns)
    return jnp.repeat(jnp.repeat(flags, p.block_q, 2), p.block_k, 3)


def _no_gradient(x: Any) -> Any:
    if jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


attend.defvjp(_attend_forward, _attend_backward)
