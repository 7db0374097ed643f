"""The gradients of flash attention in keys and values, in operands of the score that lie along the keys, and in the queries.

Walks the tiles column by column, all query heads of a key head at each tile, with keys down and queries across: there the
statistics of the rows are single vectors along the lanes, and dk and dv need no transpose.

Where all dq of a key head's group fit on the chip they are summed there too, each in the order of the columns: five products
per tile, where a kernel of its own for dq would take three more than the four that are left. Else `flash_dq` makes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import jobs
from pallas_kernels.tpu.choice import ROWS_WITH_QUERIES, queries_bytes
from pallas_kernels.tpu.flash import Inputs, cost, specs
from pallas_kernels.tpu.jobs import Jobs
from pallas_kernels.tpu.launch import launch
from pallas_kernels.tpu.problem import LANES, LOG2E, Cut, Piece, Problem, branches, dot, pieces, row_maps, work_through
from pallas_kernels.tpu.recompute import weights_again


def makes_queries_gradient(p: Problem, x: Inputs) -> bool:
    """Whether :func:`keys_gradient` makes dq too: it needs no other gradient of a walk by rows, and finds room."""
    forms = {layout.form for layout, d in zip(p.score_layouts, p.differentiable, strict=True) if d}
    return forms <= {"column", "one"} and _bytes_of_queries(p, x) <= queries_bytes()


def _bytes_of_queries(p: Problem, x: Inputs) -> int:
    """On the chip: float32 sums, and twice the result, which is brought away while the next is made."""
    return p.group * x.q.shape[2] * -(-x.q.shape[3] // LANES) * LANES * (4 + 2 * x.q.dtype.itemsize)


def keys_gradient(
    p: Problem, tiles: Jobs, kinds_of: Any, x: Inputs, d_out: Any, norm: Any, delta: Any
) -> tuple[Any, Any, Any, dict[int, Any]]:
    """dq, dk, dv, and the gradients of the score's column operands ``[B, N, 1, S]`` and numbers ``[B, N, 1, 1]``; without dq
    (None) and numbers if not :func:`makes_queries_gradient`."""
    with_queries = makes_queries_gradient(p, x)
    if with_queries and p.block_q % ROWS_WITH_QUERIES == 0:
        p = dataclasses.replace(p, rows=ROWS_WITH_QUERIES)
    per_kv = p.per_head  # lists per key head

    def which(b: Any, kh: Any) -> Any:
        return (b * p.kv_heads if per_kv else b) * p.per_batch + kh * per_kv

    def word_of(b: Any, kh: Any, step: Any, words: Any, count: Any) -> Any:
        length = count[which(b, kh)]
        return words[which(b, kh) * tiles.capacity + jnp.minimum(step, length - 1)]

    def place(b: Any, kh: Any, step: Any, g: Any, words: Any, count: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
        word = word_of(b, kh, step, words, count)
        return b, kh * p.group + g, jobs.minor(word), jobs.major(word)

    main, operands = specs(p, place, x)

    query, statistic = row_maps(place)

    def column(b: Any, kh: Any, step: Any, g: Any, words: Any, count: Any, *_: Any) -> tuple[Any, ...]:
        return b, kh, 0, jobs.major(word_of(b, kh, step, words, count))

    def group_of_rows(b: Any, kh: Any, *_: Any) -> tuple[Any, ...]:
        return b, kh, 0, 0

    mine = [n for n, (layout, d) in enumerate(zip(p.score_layouts, p.differentiable, strict=True))
            if d and (with_queries or layout.form == "column")]  # fmt: skip
    forms = [p.score_layouts[n].form for n in mine]
    sizes = [(p.block_k, column, x.k.shape[2]) if form == "column" else (1, group_of_rows, 1) for form in forms]

    whole = [pl.BlockSpec((1, p.group, *x.q.shape[2:]), group_of_rows)] if with_queries else []
    scalars = (tiles.words, tiles.count, x.call) + (() if kinds_of is None else (kinds_of,))
    outs = launch(
        functools.partial(_dkv_kernel, p, tiles, mine, which, kinds_of is not None, with_queries),
        name="attnzoo_flash_backward" if with_queries else "attnzoo_flash_dkv",
        scalars=scalars,
        grid=(p.batch, p.kv_heads, tiles.steps, p.group),
        in_specs=[
            *main,
            pl.BlockSpec((1, 1, p.block_q, d_out.shape[-1]), query),
            pl.BlockSpec((1, 1, 1, p.block_q), statistic),
            pl.BlockSpec((1, 1, 1, p.block_q), statistic),
            *operands,
        ],
        inputs=[x.q, x.k, x.v, d_out, norm, delta, *x.score, *x.mask],
        out_specs=[*whole, main[1], main[2], *(pl.BlockSpec((1, p.group, 1, block), at) for block, at, _ in sizes)],
        out_shape=[
            *(jax.ShapeDtypeStruct(x.q.shape, x.q.dtype) for _ in whole),
            jax.ShapeDtypeStruct(x.k.shape, x.k.dtype),
            jax.ShapeDtypeStruct(x.v.shape, x.v.dtype),
            *(jax.ShapeDtypeStruct((p.batch, p.heads, 1, size), jnp.float32) for *_, size in sizes),
        ],
        scratch=[
            *(pltpu.VMEM((p.group, *x.q.shape[2:]), jnp.float32) for _ in whole),
            pltpu.VMEM((p.block_k, x.k.shape[-1]), jnp.float32),
            pltpu.VMEM((p.block_k, x.v.shape[-1]), jnp.float32),
            *(pltpu.VMEM((p.group, p.block_k, LANES), jnp.float32) for form in forms if form == "column"),
        ],
        parallel=2,
        cost=cost(
            p, tiles, (3 if with_queries else 2) * x.q.shape[-1] + 2 * x.v.shape[-1],
            (x.k, x.k, x.v, x.v, *(x.q for _ in whole)), (x.q, d_out), p.block_q,
        ),
        room=_bytes_of_queries(p, x) if with_queries else 0,
    )  # fmt: skip
    dq, (dk, dv, *rest) = (outs[0], outs[1:]) if with_queries else (None, outs)
    return dq, dk, dv, dict(zip(mine, rest, strict=True))


def _dkv_kernel(p: Problem, tiles: Jobs, mine: list[int], which: Any, by_head: bool, with_queries: bool, words: Any, count: Any,
                call: Any, *refs: Any) -> None:  # fmt: skip
    kinds_of, refs = (refs[0], refs[1:]) if by_head else (None, refs)
    q, k, v, do, norm, delta, *refs = refs  # type: ignore[assignment]
    cut, both = len(p.score_layouts), len(p.score_layouts) + len(p.mask_layouts)
    score_refs, mask_refs = refs[:cut], refs[cut:both]
    outs, scratch = refs[both : both + with_queries + 2 + len(mine)], refs[both + with_queries + 2 + len(mine) :]
    (dq, outs), (dq_acc, scratch) = (_first(with_queries, some) for some in (outs, scratch))
    (dk, dv, *grads), (dk_acc, dv_acc, *sums) = outs, scratch
    numbers = [(n, ref) for n, ref in zip(mine, grads, strict=True) if p.score_layouts[n].form == "one"]
    columns_of = [(n, ref) for n, ref in zip(mine, grads, strict=True) if p.score_layouts[n].form == "column"]
    b, kh, step, g = (pl.program_id(n) for n in range(4))
    here = b + call[2], kh * p.group + g + call[3]
    length = count[which(b, kh)]
    at_word = which(b, kh) * tiles.capacity + jnp.minimum(step, length - 1)
    word, live = words[at_word], step < length
    kind_here = jobs.kind(word) if kinds_of is None else (kinds_of[at_word] >> (2 * g)) & 3

    if with_queries:

        def clear(member: Any, rows: Any) -> None:
            dq_acc[member, rows] = jnp.zeros((p.block_q, dq_acc.shape[-1]), jnp.float32)

        @pl.when((step == 0) & (g == 0))
        def _() -> None:
            for _, ref in numbers:
                ref[...] = jnp.zeros_like(ref)

        _by_rows(p, (step == 0) & (g == 0), clear)

    @pl.when(live & (jobs.first(word) == 1) & (g == 0))
    def _() -> None:
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    def product(at: Piece) -> tuple[Any, Any]:
        rows, columns = pl.ds(at.row, at.rows), pl.ds(at.column, at.columns)
        return dot(k[0, 0, columns], q[0, 0, rows], (1, 1)), dot(v[0, 0, columns], do[0, 0, rows], (1, 1))

    def absorb(masked: bool, at: Piece, products: tuple[Any, Any]) -> None:
        s, dw = products
        rows, columns = pl.ds(at.row, at.rows), pl.ds(at.column, at.columns)
        weight, pull = weights_again(p, s, at, norm[0, 0, :, rows], *here, masked, (score_refs, mask_refs))
        if p.keep is not None:
            keep = p.keep(call[0], call[1], *here, *at.cells())
            dw, weight = dw * keep, weight * keep
        dv_acc[columns] += dot(weight.astype(do.dtype), do[0, 0, rows], (1, 0))
        ds, d_parts = pull(dw, delta[0, 0, :, rows])
        ds_here = ds.astype(q.dtype)
        dk_acc[columns] += dot(ds_here, q[0, 0, rows], (1, 0))
        if with_queries:
            dq_acc[g, pl.ds(pl.multiple_of(at.t0, at.rows), at.rows)] += dot(ds_here, k[0, 0, columns], (0, 0))
        given = dict(zip([n for n, d in enumerate(p.differentiable) if d], d_parts, strict=True)) if d_parts else {}
        for (n, _), ref in zip(columns_of, sums, strict=True):
            ref[g, columns] += given[n]
        for n, ref in numbers:
            ref[0, g] += given[n]

    i, j = jobs.minor(word), jobs.major(word)

    def tile(cut: Cut, masked: bool) -> None:
        work_through(pieces(p, i, j, call, True, cut), product, functools.partial(absorb, masked))

    for chosen, cells, masked in branches(p, tiles.kinds, kind_here, i, j):
        pl.when(live & chosen)(functools.partial(tile, cells, masked))

    @pl.when(live & (jobs.last(word) == 1) & (g == p.group - 1))
    def _() -> None:
        dk[0, 0] = (dk_acc[...] / LOG2E if p.base2 else dk_acc[...]).astype(dk.dtype)
        dv[0, 0] = dv_acc[...].astype(dv.dtype)
        for (_, ref), total in zip(columns_of, sums, strict=True):
            for member in range(p.group):
                ref[0, member] = total[member].T[:1]

    if with_queries:
        at_end = (step == pl.num_programs(2) - 1) & (g == p.group - 1)

        def bring(member: Any, rows: Any) -> None:
            total = dq_acc[member, rows]
            dq[0, member, rows] = (total / LOG2E if p.base2 else total).astype(dq.dtype)

        _by_rows(p, at_end, bring)


def _first(there: bool, refs: Any) -> tuple[Any, Any]:
    return (refs[0], refs[1:]) if there else (None, refs)


def _by_rows(p: Problem, where: Any, do: Callable[[Any, Any], None]) -> None:
    """``do(member, rows)`` for every query head of a group and every block of rows, one after another."""
    blocks = p.padded[0] // p.block_q

    @pl.when(where)
    def _() -> None:
        def one(n: Any, _: None) -> None:
            i = lax.rem(n, jnp.int32(blocks))
            do(lax.div(n, jnp.int32(blocks)), pl.ds(pl.multiple_of(i * p.block_q, p.block_q), p.block_q))

        lax.fori_loop(0, p.group * blocks, one, None)
