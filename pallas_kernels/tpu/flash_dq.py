"""The gradient of flash attention in its queries, and in operands of the score that are not columns.

Walks the tiles row by row like the forward kernel, and recomputes the weights from the log-sum-exp.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import jobs
from pallas_kernels.tpu.flash import Inputs, cost, current, row_place, specs
from pallas_kernels.tpu.jobs import Jobs
from pallas_kernels.tpu.launch import launch
from pallas_kernels.tpu.problem import (
    LANES,
    LOG2E,
    Cut,
    Piece,
    Problem,
    add_band,
    branches,
    dot,
    operand_spec,
    pieces,
    row_maps,
    wide,
    work_through,
)
from pallas_kernels.tpu.recompute import weights_again


def queries_gradient(p: Problem, tiles: Jobs, x: Inputs, d_out: Any, norm: Any, delta: Any) -> tuple[Any, dict[int, Any]]:
    """dq, and the gradients of the score's operands that are not columns, each ``[B, N, ...]`` in its laid-out form."""
    place = row_place(p, tiles.capacity)
    main, operands = specs(p, place, x)

    query, statistic = row_maps(place)

    mine = [n for n, (layout, d) in enumerate(zip(p.score_layouts, p.differentiable, strict=True))
            if d and layout.form != "column"]  # fmt: skip
    each = [p.score_layouts[n]._replace(per_batch=True, per_head=True) for n in mine]
    shapes = [(p.batch, p.heads, *_own_shape(x.score[n].shape, layout.form)) for n, layout in zip(mine, each, strict=True)]
    outs = launch(
        functools.partial(_dq_kernel, p, tiles, mine),
        name="attnzoo_flash_dq",
        scalars=(tiles.words, tiles.count, x.call),
        grid=(p.batch, p.heads, tiles.steps),
        in_specs=[
            *main,
            pl.BlockSpec((1, 1, p.block_q, d_out.shape[-1]), query),
            pl.BlockSpec((1, 1, 1, p.block_q), statistic),
            pl.BlockSpec((1, 1, 1, p.block_q), statistic),
            *operands,
        ],
        inputs=[x.q, x.k, x.v, d_out, norm, delta, *x.score, *x.mask],
        out_specs=[main[0], *(_gradient_spec(p, layout, place, shape) for layout, shape in zip(each, shapes, strict=True))],
        out_shape=[
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        ],
        scratch=[
            pltpu.VMEM((p.block_q, x.q.shape[-1]), jnp.float32),
            pltpu.VMEM((p.block_q, LANES), jnp.float32),
            pltpu.VMEM((p.block_q, LANES), jnp.float32),
            *(pltpu.VMEM((p.block_q, LANES), jnp.float32) for layout in each if layout.form == "row"),
        ],
        parallel=2,
        cost=cost(p, tiles, 2 * x.q.shape[-1] + x.v.shape[-1], (x.q, x.q, d_out), (x.k, x.v), p.block_k),
    )
    gradients = dict(zip(mine, outs[1:], strict=True))
    for n, layout in zip(mine, each, strict=True):
        if layout.form == "cell":  # tiles that were not visited were not written
            gradients[n] = jnp.where(_visited(p, tiles), gradients[n], 0)
    return outs[0], gradients


def _visited(p: Problem, tiles: Jobs) -> Any:
    """Cells in tiles that were computed, ``[B|1, N|1, T, S]`` in whole blocks."""
    rows, columns = p.padded[0] // p.block_q, p.padded[1] // p.block_k
    words = jnp.asarray(tiles.words).reshape(-1, tiles.capacity)
    meant = (jnp.arange(tiles.capacity) < jnp.asarray(tiles.count)[:, None]) & (jobs.kind(words) != jobs.SKIP)
    at = jnp.where(meant, jobs.major(words) * columns + jobs.minor(words), rows * columns)
    flags = jnp.zeros((len(words), rows * columns + 1), bool).at[jnp.arange(len(words))[:, None], at].set(True)[:, :-1]
    lead = (p.batch if p.per_batch else 1, p.heads if p.per_head else 1)
    flags = flags.reshape(*lead, rows, columns)
    return jnp.repeat(jnp.repeat(flags, p.block_q, 2), p.block_k, 3)


def _own_shape(shape: tuple[int, ...], form: str) -> tuple[int, int]:
    """Of a gradient per batch row and head: a table by distance needs one of its two copies."""
    return (1 if form == "distance" else shape[-2], shape[-1])


def _gradient_spec(p: Problem, layout: Any, place: Any, shape: tuple[int, ...]) -> pl.BlockSpec:
    if layout.form in ("distance", "one"):  # one block per batch row and head, all along

        def whole(*a: Any) -> tuple[Any, ...]:
            b, h, *_ = place(*a)
            return b, h, 0, 0

        return pl.BlockSpec((1, 1, *shape[2:]), whole)
    return operand_spec(p, layout, place)


def _dq_kernel(
    p: Problem, tiles: Jobs, mine: list[int], words: Any, count: Any, call: Any, q: Any, k: Any, v: Any, do: Any, norm: Any,
    delta: Any, *refs: Any,
) -> None:  # fmt: skip
    cut, both = len(p.score_layouts), len(p.score_layouts) + len(p.mask_layouts)
    score_refs, mask_refs = refs[:cut], refs[cut:both]
    dq, *rest = refs[both:]
    grads, (acc, norms, deltas, *row_sums) = rest[: len(mine)], rest[len(mine) :]
    forms = [p.score_layouts[n].form for n in mine]
    sums = iter(row_sums)
    sum_of = [next(sums) if form == "row" else None for form in forms]
    b, h, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    word, live = current(p, tiles.capacity, b, h, step, words, count)
    here = b + call[2], h + call[3]

    @pl.when(step == 0)
    def _() -> None:
        for ref, form in zip(grads, forms, strict=True):
            if form in ("distance", "one"):
                ref[...] = jnp.zeros_like(ref)

    @pl.when(live & (jobs.first(word) == 1))
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        norms[...] = jnp.broadcast_to(norm[0, 0], (LANES, p.block_q)).T
        deltas[...] = jnp.broadcast_to(delta[0, 0], (LANES, p.block_q)).T
        for ref in row_sums:
            ref[...] = jnp.zeros_like(ref)

    def product(at: Piece) -> tuple[Any, Any]:
        rows, columns = pl.ds(at.row, at.rows), pl.ds(at.column, at.columns)
        return dot(q[0, 0, rows], k[0, 0, columns], (1, 1)), dot(do[0, 0, rows], v[0, 0, columns], (1, 1))

    def absorb(masked: bool, at: Piece, products: tuple[Any, Any]) -> None:
        s, dw = products
        rows, columns = pl.ds(at.row, at.rows), pl.ds(at.column, at.columns)
        _, pull = weights_again(p, s, at, wide(norms[rows], at.columns), *here, masked, (score_refs, mask_refs))
        if p.keep is not None:
            dw = dw * p.keep(call[0], call[1], *here, *at.cells())
        ds, d_parts = pull(dw, wide(deltas[rows], at.columns))
        acc[rows] += dot(ds.astype(k.dtype), k[0, 0, columns], (1, 0))
        given = dict(zip([n for n, d in enumerate(p.differentiable) if d], d_parts, strict=True)) if d_parts else {}
        for n, ref, form, row_sum in zip(mine, grads, forms, sum_of, strict=True):
            if form == "one":
                ref[0, 0] += given[n]
            elif form == "row":
                assert row_sum is not None
                row_sum[rows] += given[n]
            elif form == "cell":
                ref[0, 0, rows, columns] = given[n]
            else:
                add_band(p, ref, at, given[n])

    i, j = jobs.major(word), jobs.minor(word)

    def tile(cut: Cut, masked: bool) -> None:
        work_through(pieces(p, i, j, call, False, cut), product, functools.partial(absorb, masked))

    for chosen, cells, masked in branches(p, tiles.kinds, jobs.kind(word), i, j):
        pl.when(live & chosen)(functools.partial(tile, cells, masked))

    @pl.when(live & (jobs.last(word) == 1))
    def _() -> None:
        dq[0, 0] = (acc[...] / LOG2E if p.base2 else acc[...]).astype(dq.dtype)
        for ref, row_sum in zip(grads, sum_of, strict=True):
            if row_sum is not None:
                ref[0, 0] = row_sum[...].T[:1]
