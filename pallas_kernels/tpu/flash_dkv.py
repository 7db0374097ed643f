"""The gradients of flash attention in keys and values, and in operands of the score that lie along the keys.

Walks the tiles column by column, all query heads of a key head at each tile, with keys down and queries across: there the
statistics of the rows are single vectors along the lanes, and no product needs a transpose.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import jobs
from pallas_kernels.tpu.flash import Inputs, cost, specs
from pallas_kernels.tpu.jobs import FULL, PARTIAL, Jobs
from pallas_kernels.tpu.launch import launch
from pallas_kernels.tpu.problem import LANES, LOG2E, Piece, Problem, dot, pieces, row_maps, work_through
from pallas_kernels.tpu.recompute import weights_again


def keys_gradient(
    p: Problem, tiles: Jobs, kinds_of: Any, x: Inputs, d_out: Any, norm: Any, delta: Any
) -> tuple[Any, Any, dict[int, Any]]:
    """dk, dv, and the gradients of the score's column operands ``[B, N, 1, S]``."""
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

    mine = [n for n, (layout, d) in enumerate(zip(p.score_layouts, p.differentiable, strict=True))
            if d and layout.form == "column"]  # fmt: skip
    scalars = (tiles.words, tiles.count, x.call) + (() if kinds_of is None else (kinds_of,))
    outs = launch(
        functools.partial(_dkv_kernel, p, tiles, mine, which, kinds_of is not None),
        name="attnzoo_flash_dkv",
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
        out_specs=[main[1], main[2], *(pl.BlockSpec((1, p.group, 1, p.block_k), column) for _ in mine)],
        out_shape=[
            jax.ShapeDtypeStruct(x.k.shape, x.k.dtype),
            jax.ShapeDtypeStruct(x.v.shape, x.v.dtype),
            *(jax.ShapeDtypeStruct((p.batch, p.heads, 1, x.k.shape[2]), jnp.float32) for _ in mine),
        ],
        scratch=[
            pltpu.VMEM((p.block_k, x.k.shape[-1]), jnp.float32),
            pltpu.VMEM((p.block_k, x.v.shape[-1]), jnp.float32),
            *(pltpu.VMEM((p.group, p.block_k, LANES), jnp.float32) for _ in mine),
        ],
        parallel=2,
        cost=cost(p, tiles, 2 * (x.q.shape[-1] + x.v.shape[-1]), (x.k, x.k, x.v, x.v), (x.q, d_out), p.block_q),
    )
    return outs[0], outs[1], dict(zip(mine, outs[2:], strict=True))


def _dkv_kernel(p: Problem, tiles: Jobs, mine: list[int], which: Any, by_head: bool, words: Any, count: Any, call: Any,
                *refs: Any) -> None:  # fmt: skip
    kinds_of, refs = (refs[0], refs[1:]) if by_head else (None, refs)
    q, k, v, do, norm, delta, *refs = refs  # type: ignore[assignment]
    cut, both = len(p.score_layouts), len(p.score_layouts) + len(p.mask_layouts)
    score_refs, mask_refs = refs[:cut], refs[cut:both]
    dk, dv, *rest = refs[both:]
    grads, (dk_acc, dv_acc, *sums) = rest[: len(mine)], rest[len(mine) :]
    b, kh, step, g = (pl.program_id(n) for n in range(4))
    here = b + call[2], kh * p.group + g + call[3]
    length = count[which(b, kh)]
    at_word = which(b, kh) * tiles.capacity + jnp.minimum(step, length - 1)
    word, live = words[at_word], step < length
    kind_here = jobs.kind(word) if kinds_of is None else (kinds_of[at_word] >> (2 * g)) & 3

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
        dk_acc[columns] += dot(ds.astype(q.dtype), q[0, 0, rows], (1, 0))
        given = dict(zip([n for n, d in enumerate(p.differentiable) if d], d_parts, strict=True)) if d_parts else {}
        for n, ref in zip(mine, sums, strict=True):
            ref[g, columns] += given[n]

    def tile(masked: bool) -> None:
        work = pieces(p, jobs.minor(word), jobs.major(word), call, sideways=True)
        work_through(work, product, functools.partial(absorb, masked))

    for kind in tiles.kinds & {PARTIAL, FULL}:
        pl.when(live & (kind_here == kind))(functools.partial(tile, kind == PARTIAL))

    @pl.when(live & (jobs.last(word) == 1) & (g == p.group - 1))
    def _() -> None:
        dk[0, 0] = (dk_acc[...] / LOG2E if p.base2 else dk_acc[...]).astype(dk.dtype)
        dv[0, 0] = dv_acc[...].astype(dv.dtype)
        for ref, total in zip(grads, sums, strict=True):
            for member in range(p.group):
                ref[0, member] = total[member].T[:1]
