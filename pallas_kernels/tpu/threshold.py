"""The threshold of each row of weights that add up to 1 only once it is known, on TPU, by one pass over the keys.

A block of queries walks the tiles of its list as in `flash`, but keeps their logits on the chip. At its last tile it has whole
rows, less what the mask empties, and tries one threshold after another on them; no trial multiplies queries and keys again.

Keys run down and queries across: what there is one of per row is a vector along the lanes, and sums over keys add up vector
registers, without a reduction along lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import jobs
from pallas_kernels.tpu.flash import Inputs, cost, current, logits, row_place, specs
from pallas_kernels.tpu.jobs import FULL, SKIP, Jobs
from pallas_kernels.tpu.launch import launch
from pallas_kernels.tpu.problem import (
    HIDDEN,
    HIDDEN_BELOW,
    LANES,
    Layout,
    Piece,
    Problem,
    dot,
    operand_spec,
    pieces,
    read_operand,
    row_maps,
    work_through,
)

#: Sublanes of a vector register: sums over keys stay this high until the end.
_HIGH = 8
#: Keys that a step of a trial takes, and how many of them at a time: with more, registers do not hold what is between.
_STEP, _PART = 128, 32


class Equation(NamedTuple):
    """What sums to 1. Functions of arrays that broadcast to ``[keys, queries]``, with no arrays of their own.

    row: ``(u, *numbers) -> row``, what the weights of a row are made of besides its logits, computed once per trial.
    weight: ``(x, *row) -> w`` of logits less the largest of their row; 0 of hidden ones. search: ``(f, low, high) -> u`` with
    f(u) = 1 between the two, for an f that grows. numbers, layouts: arrays ``[B|1, N|1, T|1, 1]`` laid out: the bounds low and
    high, then what ``row`` takes.
    """

    row: Callable[..., tuple[Any, ...]]
    weight: Callable[..., Any]
    search: Callable[..., Any]
    numbers: tuple[Any, ...]
    layouts: tuple[Layout, ...]


def bytes_of(slots: int, block_q: int, block_k: int) -> int:
    """On the chip, for the logits of so many tiles."""
    return slots * block_k * -(-block_q // LANES) * LANES * 4


def thresholds(p: Problem, tiles: Jobs, slots: int, x: Inputs, equation: Equation) -> tuple[Any, Any]:
    """The largest logit of each row and its threshold, float32 ``[B, N, 1, T]``, padded like the inputs; 0 and some number
    within the bounds for rows that see nothing. slots: tiles that a row of tiles has at most. x.v is not read."""
    place = row_place(p, tiles.capacity)
    main, operands = specs(p, place, x._replace(v=None))
    statistic = pl.BlockSpec((1, 1, 1, p.block_q), row_maps(place)[1])
    out = jax.ShapeDtypeStruct((p.batch, p.heads, 1, x.q.shape[2]), jnp.float32)
    return launch(
        functools.partial(_kernel, p, tiles, equation),
        name="attnzoo_thresholds",
        scalars=(tiles.words, tiles.count, x.call, *([x.pages] if p.page_blocks else [])),
        grid=(p.batch, p.heads, tiles.steps),
        in_specs=[*main, *operands, *(operand_spec(p, layout, place) for layout in equation.layouts)],
        inputs=[x.q, x.k, *x.score, *x.mask, *equation.numbers],
        out_specs=[statistic, statistic],
        out_shape=[out, out],
        scratch=[
            pltpu.VMEM((slots * p.block_k, p.block_q), jnp.float32),
            pltpu.VMEM((_HIGH, p.block_q), jnp.float32),
            pltpu.SMEM((1,), jnp.int32),
        ],
        parallel=2,
        cost=cost(p, tiles, x.q.shape[-1], (x.q, out, out), (x.k,), p.block_k),
        room=bytes_of(slots, p.block_q, p.block_k),
    )


def _kernel(p: Problem, tiles: Jobs, equation: Equation, words: Any, count: Any, call: Any, *refs: Any) -> None:
    q, k, *refs = refs[1:] if p.page_blocks else refs  # type: ignore[assignment]
    score_refs, refs = refs[: len(p.score_layouts)], refs[len(p.score_layouts) :]
    mask_refs, refs = refs[: len(p.mask_layouts)], refs[len(p.mask_layouts) :]
    *number_refs, reference, threshold, held, top, slot = refs
    b, h = pl.program_id(0), pl.program_id(1)
    word, live = current(p, tiles.capacity, b, h, pl.program_id(2), words, count)
    here = b + call[2], h + call[3]

    @pl.when(live & (jobs.first(word) == 1))
    def _() -> None:
        top[...] = jnp.full_like(top, HIDDEN)
        slot[0] = 0

    def product(at: Piece) -> Any:
        return dot(k[0, 0, pl.ds(at.column, at.columns)], q[0, 0, pl.ds(at.row, at.rows)], (1, 1))

    def keep(masked: bool, at: Piece, s: Any) -> None:
        s = logits(p, s, at, *here, masked, score_refs, mask_refs)
        if p.score is not None:
            s = jnp.maximum(s, HIDDEN)  # -inf is not to be calculated with
        rows = pl.ds(at.row, at.rows)
        top[:, rows] = jnp.maximum(top[:, rows], _by_registers(s).max(0))
        held[pl.ds(pl.multiple_of(slot[0] * p.block_k + at.column, LANES), at.columns), rows] = s

    def tile(kind: int) -> None:
        work = pieces(p, jobs.major(word), jobs.minor(word), call, sideways=True)
        work_through(work, product, functools.partial(keep, kind != FULL))
        slot[0] = slot[0] + 1

    for kind in tiles.kinds - {SKIP}:
        pl.when(live & (jobs.kind(word) == kind))(functools.partial(tile, kind))

    @pl.when(live & (jobs.last(word) == 1))
    def _() -> None:
        largest = top[...].max(0, keepdims=True)
        r = jnp.where(largest > HIDDEN_BELOW, largest, 0.0)
        steps = slot[0] * (p.block_k // _STEP)

        def some(n: Any) -> Any:
            return pl.ds(pl.multiple_of(n * _STEP, _STEP), _STEP)

        def level(n: Any, _: None) -> None:
            held[some(n)] = held[some(n)] - r

        lax.fori_loop(0, steps, level, None)
        all_rows = Piece(0, 0, p.block_q, p.block_k, 0, 0, True, (0, 0))
        low, high, *numbers = (
            read_operand(p, ref, layout, all_rows) for ref, layout in zip(number_refs, equation.layouts, strict=True)
        )

        def total(u: Any) -> Any:
            row = equation.row(u, *numbers)

            def add(n: Any, sums: Any) -> Any:
                for first in range(0, _STEP, _PART):
                    x = held[pl.ds(pl.multiple_of(n * _STEP + first, _PART), _PART)]
                    sums = sums + _by_registers(equation.weight(x, *row)).sum(0)
                return sums

            sums = lax.fori_loop(0, steps, add, jnp.zeros((_HIGH, p.block_q), jnp.float32))
            return jnp.where(largest > HIDDEN_BELOW, sums.sum(0, keepdims=True), 1.0)

        ends = (jnp.broadcast_to(x, (1, p.block_q)) for x in (low, high))
        reference[0, 0], threshold[0, 0] = r, equation.search(total, *ends)


def _by_registers(x: Any) -> Any:
    return x.reshape(-1, _HIGH, x.shape[1])
