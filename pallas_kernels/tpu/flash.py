"""Flash attention on TPU: any elementwise mask and score inside the kernel, tiles that the mask empties never visited.

The forward kernel has a step per tile, row by row of tiles. A step works through its tile in pieces, and starts a piece's
first product before it turns the piece before into weights, so that the matrix units do not wait for the exponentials.
Full tiles skip the mask. With ``G`` query heads per key head, keys and values are read, not copied, G times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.tpu import jobs
from pallas_kernels.tpu.jobs import Jobs
from pallas_kernels.tpu.launch import launch
from pallas_kernels.tpu.online import Online
from pallas_kernels.tpu.problem import (
    HIDDEN,
    HIDDEN_BELOW,
    Cut,
    Piece,
    Problem,
    branches,
    dot,
    operand_spec,
    pieces,
    read_operand,
    row_maps,
    visible,
    work_through,
)


class Inputs(NamedTuple):
    """Arrays of a call: ``q [B, N, T, H]`` scaled, ``k [B, K, S, H]``, ``v [B, K, S, Hv]``, padded to whole blocks; laid-out
    operands of the score and the mask; ``call int32 [6]``: two words of the dropout seed, and the batch row, head,
    query and key at which these arrays begin, for masks and scores that ask. With ``pages int32 [B · M]`` k and v are pools
    ``[P, K, page, ·]``. v is None where the keys are the values. k and v may be of 8 bits; ``value_scale [B, K, 1, S]`` then
    multiplies each row of v."""

    q: Any
    k: Any
    v: Any
    score: tuple[Any, ...]
    mask: tuple[Any, ...]
    call: Any
    pages: Any = None
    value_scale: Any = None


def row_place(p: Problem, capacity: int) -> Any:
    """Grid (b, h, step) -> batch row, head, query block, key block."""

    def place(b: Any, h: Any, step: Any, words: Any, count: Any, *_: Any) -> tuple[Any, Any, Any, Any]:
        word = current(p, capacity, b, h, step, words, count)[0]
        return b, h, jobs.major(word), jobs.minor(word)

    return place


def current(p: Problem, capacity: int, b: Any, h: Any, step: Any, words: Any, count: Any) -> tuple[Any, Any]:
    """The word of a step, and whether its list reaches that far; past the end the last word stays, and nothing moves."""
    which = p.which_list(b, h)
    length = count[which]
    return words[which * capacity + jnp.minimum(step, length - 1)], step < length


def specs(p: Problem, place: Any, x: Inputs) -> tuple[list[Any], list[Any]]:
    """Of q, k, v, and of the operands of score and mask."""

    query, _ = row_maps(place)

    def key(*a: Any) -> tuple[Any, ...]:
        b, h, _, j = place(*a)
        if p.page_blocks:
            b, j = p.page_of(a[-1], b, j)
        return b, lax.div(h, p.group), j, 0

    main = [pl.BlockSpec((1, 1, p.block_q, x.q.shape[-1]), query)]
    main += [pl.BlockSpec((1, 1, p.block_k, a.shape[-1]), key) for a in (x.k, x.v) if a is not None]
    return main, [operand_spec(p, layout, place) for layout in (*p.score_layouts, *p.mask_layouts)]


def cost(p: Problem, tiles: Jobs, products: int, once: Sequence[Any], again: Sequence[Any], block: int) -> pl.CostEstimate:
    """Of one kernel's call; lists that are made while it runs count as full.

    products: features that a cell's products sum over or make, in total. once: arrays that move once; again: those of which
    each step reads ``block`` rows.
    """
    steps = p.batch * p.heads * tiles.capacity
    cells = steps * p.block_q * p.block_k
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in once)
    moved += steps * block * sum(x.shape[-1] * x.dtype.itemsize for x in again)
    return pl.CostEstimate(flops=2 * cells * products, transcendentals=cells, bytes_accessed=moved)


def logits(p: Problem, s: Any, at: Piece, b: Any, h: Any, masked: bool, score_refs: Any, mask_refs: Any) -> Any:
    """Scored and masked; hidden cells are HIDDEN."""
    if p.score is not None:
        parts = [read_operand(p, ref, layout, at) for ref, layout in zip(score_refs, p.score_layouts, strict=True)]
        s = jnp.broadcast_to(p.score(s, b, h, *at.cells(), *parts), at.shape)
    return hide(p, s, at, b, h, mask_refs) if masked else s


def hide(p: Problem, s: Any, at: Piece, b: Any, h: Any, mask_refs: Any) -> Any:
    parts = [read_operand(p, ref, layout, at) for ref, layout in zip(mask_refs, p.mask_layouts, strict=True)]
    ok = visible(p, at, b, h, parts)
    return s if ok is None else jnp.where(ok, s, HIDDEN)


def widened(x: Any, dtype: Any) -> Any:
    """8-bit numbers in the type of the queries."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def pointwise(p: Problem, s: Any) -> Any:
    assert p.phi is not None
    seen = s > HIDDEN_BELOW
    return jnp.where(seen, p.phi(jnp.where(seen, s, 0.0)), 0.0)


def forward(p: Problem, tiles: Jobs, x: Inputs) -> tuple[Any, Any]:
    """``out [B, N, T, Hv]`` in the type of q and ``lse [B, N, 1, T]`` float32 (natural logarithm; zeros for pointwise maps),
    padded like the inputs. Rows that see nothing: 0 and -inf."""
    place = row_place(p, tiles.capacity)
    main, operands = specs(p, place, x)
    query, statistic = row_maps(place)
    read = [a for a in (x.k, x.v) if a is not None]
    width = read[-1].shape[-1]
    out = jax.ShapeDtypeStruct((*x.q.shape[:3], width), x.q.dtype)
    if x.value_scale is not None:
        read.append(x.value_scale)
        main.append(pl.BlockSpec((1, 1, 1, p.block_k), functools.partial(_along_keys, main[1].index_map)))
    return launch(
        functools.partial(_forward_kernel, p, tiles, x.value_scale is not None),
        name="attnzoo_flash_forward",
        scalars=(tiles.words, tiles.count, x.call, *([x.pages] if p.page_blocks else [])),
        grid=(p.batch, p.heads, tiles.steps),
        in_specs=[*main, *operands],
        inputs=[x.q, *read, *x.score, *x.mask],
        out_specs=[pl.BlockSpec((1, 1, p.block_q, width), query), pl.BlockSpec((1, 1, 1, p.block_q), statistic)],
        out_shape=[out, jax.ShapeDtypeStruct((p.batch, p.heads, 1, x.q.shape[2]), jnp.float32)],
        scratch=Online.scratch(p.block_q, width),
        parallel=2,
        cost=cost(p, tiles, x.q.shape[-1] + width, (x.q, out), read, p.block_k),
    )


def _along_keys(rows: Any, *a: Any) -> tuple[Any, ...]:
    b, kh, j, _ = rows(*a)
    return b, kh, 0, j


def _forward_kernel(p: Problem, tiles: Jobs, scaled: bool, words: Any, count: Any, call: Any, *refs: Any) -> None:
    q, k, *refs = refs[1:] if p.page_blocks else refs  # type: ignore[assignment]
    v, refs = (k, refs) if p.keys_are_values else (refs[0], refs[1:])
    value_scale, refs = (refs[0], refs[1:]) if scaled else (None, refs)
    dtype = q.dtype
    cut = len(p.score_layouts)
    score_refs, mask_refs = refs[:cut], refs[cut : cut + len(p.mask_layouts)]
    out, lse, *sums = refs[cut + len(p.mask_layouts) :]
    online = Online(*sums)
    b, h = pl.program_id(0), pl.program_id(1)
    word, live = current(p, tiles.capacity, b, h, pl.program_id(2), words, count)
    here = b + call[2], h + call[3]

    @pl.when(live & (jobs.first(word) == 1))
    def _() -> None:
        online.clear()

    def product(at: Piece) -> Any:
        return dot(q[0, 0, pl.ds(at.row, at.rows)], widened(k[0, 0, pl.ds(at.column, at.columns)], dtype), (1, 1))

    def absorb(masked: bool, at: Piece, s: Any) -> None:
        rows = pl.ds(at.row, at.rows)
        s = logits(p, s, at, *here, masked, score_refs, mask_refs)
        if p.phi is None:
            weight, shrink = online.weights(rows, s, p.base2)
        else:
            weight = pointwise(p, s)
        if p.keep is not None:
            weight = weight * p.keep(call[0], call[1], *here, *at.cells())
        if value_scale is not None:
            weight = weight * value_scale[0, 0, :, pl.ds(at.column, at.columns)]
        add = dot(weight.astype(dtype), widened(v[0, 0, pl.ds(at.column, at.columns)], dtype), (1, 0))
        if p.phi is None:
            online.add(rows, add, shrink)
        else:
            online.acc[rows] += add

    i, j = jobs.major(word), jobs.minor(word)

    def tile(cut: Cut, masked: bool) -> None:
        work_through(pieces(p, i, j, call, False, cut), product, functools.partial(absorb, masked))

    for chosen, cells, masked in branches(p, tiles.kinds, jobs.kind(word), i, j):
        pl.when(live & chosen)(functools.partial(tile, cells, masked))

    @pl.when(live & (jobs.last(word) == 1))
    def _() -> None:
        if p.phi is not None:
            out[0, 0] = online.acc[...].astype(out.dtype)
            lse[...] = jnp.zeros_like(lse)
            return
        found, lse[0, 0] = online.results(p.base2)
        out[0, 0] = found.astype(out.dtype)
