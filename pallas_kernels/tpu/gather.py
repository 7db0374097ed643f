"""Attention over listed keys on TPU: each block of queries names the positions of the keys that it sees.

Keys and values stay in HBM, in the order in which they lie there. Their rows are copied one by one into on-chip memory, so
many at a time that they fill the matrix units, and while these work on one group of rows the copies of the next are under way.
A row is a copy of its own, and issuing it costs the core some cycles whatever it brings: the more queries share a list, the
better. In bfloat16 two rows lie in each other's words, and both come.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import jobs
from pallas_kernels.tpu.launch import launch, simulated
from pallas_kernels.tpu.online import Online
from pallas_kernels.tpu.problem import HIDDEN, LANES, LOG2E, dot, upright, wide, work_through

#: Keys that are in the matrix units at a time.
GROUP = 256
#: Positions of one list: two lists are in scalar memory at a time.
MOST_LISTED = jobs.MOST_BYTES // 8
#: Queries of a block whose rows take up to 256 bytes: what vector memory holds, twice, with their sums.
MOST_ROWS = 2048
#: Queries of the pieces in which a block is worked through.
_PIECE = 128


class Listed(NamedTuple):
    """Arrays of a call, in B batch rows, P lists side by side (a multiple of the K key heads) of Tq blocks of R queries.

    ``q [B, P, Tq, R, H]``, scaled by log2(e) too; ``k [B, K, S, H]``, ``v [B, K, S, Hv]``; ``positions int32 [B, P, Tq, M]``:
    the keys that a block sees, -1: none; ``rows int32 [B, Tq, R]`` or None: a query sees positions up to its own entry.
    """

    q: Any
    k: Any
    v: Any
    positions: Any
    rows: Any = None


def most_rows(x: Listed) -> int:
    """Queries of a block that fit into vector memory."""
    widest = max(-(-a.shape[-1] // LANES) * LANES * a.dtype.itemsize for a in (x.k, x.v))
    return MOST_ROWS * 256 // max(256, widest)


def forward(x: Listed) -> tuple[Any, Any]:
    """``out [B, P, Tq, R, Hv]`` in the type of v and ``lse [B, P, Tq, R]`` float32 (natural logarithm).

    Softmax in float32 over the listed keys; a position that stands twice counts twice. Rows that see nothing: 0 and -inf.
    Takes float32 or bfloat16, up to MOST_LISTED positions and :func:`most_rows` queries per block, positions within S. Widths
    that are no multiples of 128, and in bfloat16 an odd S, cost a padded copy of the array.
    """
    p, x, d = _Call.of(x), _padded(x), x.v.shape[-1]
    width = x.v.shape[-1]
    out, lse = launch(
        functools.partial(_forward_kernel, p),
        name="attnzoo_gather_forward",
        scalars=(),
        grid=p.grid,
        in_specs=[*p.list_specs, p.block(p.rows, x.q.shape[-1]), *p.row_specs, p.far, p.far],
        inputs=[*_lists(x), x.q, *_row_positions(x), _words(x.k), _words(x.v)],
        out_specs=[p.block(p.rows, width), p.block(1, p.rows)],
        out_shape=[
            jax.ShapeDtypeStruct((*x.q.shape[:-1], width), x.v.dtype),
            jax.ShapeDtypeStruct((*x.q.shape[:3], 1, p.rows), jnp.float32),
        ],
        scratch=[*p.buffers(x), *Online.scratch(p.rows, width)],
        parallel=3,
        cost=_cost(p, x, 1, 1),
        checked=False,  # of each row, at four times the cost of bringing it
    )
    return out[:, :, :, : p.queries, :d], lse[:, :, :, 0, : p.queries]


def queries_gradient(x: Listed, d_out: Any, norm: Any, delta: Any) -> Any:
    """dq ``[B, P, Tq, R, H]`` of :func:`forward`, from the cotangent ``d_out`` of out, the log-sum-exp ``norm [B, P, Tq, R]``
    of all keys of its queries in base 2 (+inf for rows that see nothing), and ``delta = Σ d_out·out - d_lse``."""
    p, x, d = _Call.of(x), _padded(x), x.q.shape[-1]
    d_out = _grown(d_out.astype(x.v.dtype), p.rows, x.v.shape[-1])
    grow = ((0, 0), (0, 0), (0, 0), (0, p.rows - p.queries))
    norm, delta = (jnp.pad(a, grow)[:, :, :, None] for a in (norm, delta))
    width = x.q.shape[-1]
    (dq,) = launch(
        functools.partial(_gradient_kernel, p),
        name="attnzoo_gather_dq",
        scalars=(),
        grid=p.grid,
        in_specs=[
            *p.list_specs, p.block(p.rows, width), *p.row_specs, p.far, p.far,
            p.block(p.rows, d_out.shape[-1]), p.block(1, p.rows), p.block(1, p.rows),
        ],
        inputs=[*_lists(x), x.q, *_row_positions(x), _words(x.k), _words(x.v), d_out, norm, delta],
        out_specs=[p.block(p.rows, width)],
        out_shape=[jax.ShapeDtypeStruct(x.q.shape, x.q.dtype)],
        scratch=[*p.buffers(x), *(pltpu.VMEM((p.rows, n), jnp.float32) for n in (LANES, LANES, width))],
        parallel=3,
        cost=_cost(p, x, 2, 1),
        checked=False,
    )  # fmt: skip
    return dq[:, :, :, : p.queries, :d]


@dataclasses.dataclass(frozen=True)
class _Call:
    """Static facts of a call. queries, rows: of a block, without and with padding; causal: whether rows have positions."""

    batch: int
    lists: int
    kv_heads: int
    blocks: int
    queries: int
    rows: int
    listed: int
    causal: bool
    dtype: Any

    @staticmethod
    def of(x: Listed) -> _Call:
        batch, lists, blocks, queries, _ = x.q.shape
        listed = max(1, -(-x.positions.shape[3] // GROUP)) * GROUP
        rows = -(-queries // 16) * 16
        return _Call(batch, lists, x.k.shape[1], blocks, queries, rows, listed, x.rows is not None, x.k.dtype)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.lists, self.blocks

    @property
    def pieces(self) -> list[Any]:
        return [pl.ds(r, min(_PIECE, self.rows - r)) for r in range(0, self.rows, _PIECE)]

    @property
    def rows_in_word(self) -> int:
        return 4 // self.dtype.itemsize

    @property
    def list_specs(self) -> list[pl.BlockSpec]:
        """Of :func:`_lists`, what is an address in scalar memory."""
        shapes = (1, pltpu.SMEM), (self.listed, pltpu.SMEM), (self.listed, pltpu.VMEM)
        return [self.block(1, n, memory) for n, memory in shapes]

    @property
    def row_specs(self) -> list[pl.BlockSpec]:
        return [pl.BlockSpec((1, 1, 1, self.rows), lambda b, h, i: (b, i, 0, 0))] if self.causal else []

    @property
    def far(self) -> pl.BlockSpec:
        return pl.BlockSpec(memory_space=pltpu.HBM)

    def block(self, rows: int, width: int, memory: Any = pltpu.VMEM) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, 1, rows, width), lambda b, h, i: (b, h, i, 0, 0), memory_space=memory)

    def buffers(self, x: Listed) -> list[Any]:
        """For two groups of keys and of values, and what tells that they are there."""
        word = jnp.float32 if self.rows_in_word == 1 else jnp.int32
        both = [pltpu.VMEM((2, GROUP, a.shape[-1]), word) for a in (x.k, x.v)]
        return [*both, pltpu.SemaphoreType.DMA((2, 2))]


def _grown(x: Any, rows: int, width: int) -> Any:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, width - x.shape[-1])])


def _padded(x: Listed) -> Listed:
    p = _Call.of(x)
    keys = -(-x.k.shape[2] // p.rows_in_word) * p.rows_in_word
    width, value_width = (-(-a.shape[-1] // LANES) * LANES for a in (x.k, x.v))
    grow = ((0, 0),) * 3 + ((0, p.listed - x.positions.shape[3]),)
    return Listed(
        _grown(x.q, p.rows, width),
        _grown(x.k, keys, width),
        _grown(x.v, keys, value_width),
        jnp.pad(x.positions, grow, constant_values=-1),
        None if x.rows is None else jnp.pad(x.rows, (*grow[:2], (0, p.rows - p.queries))),
    )


def _lists(x: Listed) -> list[Any]:
    """Up to where a list has positions, the words of their rows, and the positions."""
    last = jnp.where(x.positions >= 0, jnp.arange(1, x.positions.shape[3] + 1), 0).max(-1)
    words = jnp.maximum(x.positions, 0) // (4 // x.k.dtype.itemsize)
    return [last.astype(jnp.int32)[..., None, None], words[:, :, :, None], x.positions[:, :, :, None]]


def _row_positions(x: Listed) -> list[Any]:
    return [] if x.rows is None else [x.rows[:, :, None]]


def _words(x: Any) -> Any:
    """Rows as 32-bit words. The compiler's view of memory is changed inside the kernel; the simulator has none."""
    return jax.jit(lambda x: pltpu.bitcast(x, jnp.int32))(x) if simulated() and x.dtype.itemsize < 4 else x


def _cost(p: _Call, x: Listed, of_keys: int, of_values: int) -> pl.CostEstimate:
    """Lists count as full. of_keys, of_values: products that sum over or make features of keys and of values."""
    width, value_width = x.k.shape[-1], x.v.shape[-1]
    lists = math.prod(p.grid)
    cells = lists * p.listed * p.rows
    moved = lists * (p.listed * 4 * (width + value_width) + p.rows * p.dtype.itemsize * (width + value_width))
    flops = 2 * cells * (of_keys * width + of_values * value_width)
    return pl.CostEstimate(flops=flops, transcendentals=cells, bytes_accessed=moved)


class _Stream(NamedTuple):
    """Rows of one array on their way in: words in HBM, two buffers, and what tells that a buffer is filled."""

    source: Any
    buffer: Any
    filled: Any

    def start(self, word: Any, slot: Any, row: Any) -> None:
        """Bring one row of words."""
        there, here = self.source.at[pl.ds(word, 1)], self.buffer.at[slot, pl.ds(row, 1)]
        pltpu.make_async_copy(there, here, self.filled.at[slot]).start()

    def arrived(self, slot: Any, named: Any, dtype: Any) -> Any:
        """Wait for a group and unpack it: row i is that of position ``named[i]``, or zero where that is -1."""
        whole = self.buffer.at[slot]
        pltpu.make_async_copy(whole, whole, self.filled.at[slot]).wait()  # counts bytes, of all its rows' copies
        x = self.buffer[slot]
        if dtype.itemsize < 4:
            half = jnp.where((named & 1) == 1, x & -65536, x << 16)
            x = lax.bitcast_convert_type(half, jnp.float32)
        return jnp.where(named >= 0, x, 0.0).astype(dtype)


class _Lists(NamedTuple):
    count: Any
    words: Any
    positions: Any


def _streams(p: _Call, k: Any, v: Any, k_buffer: Any, v_buffer: Any, filled: Any) -> tuple[_Stream, _Stream]:
    b, head = pl.program_id(0), lax.div(pl.program_id(1), p.lists // p.kv_heads)

    def source(ref: Any) -> Any:
        ref = ref if ref.dtype.itemsize == 4 else ref.bitcast(jnp.int32)
        return ref.at[b, head]

    return _Stream(source(k), k_buffer, filled.at[0]), _Stream(source(v), v_buffer, filled.at[1])


def _visit(p: _Call, lists: _Lists, rows: Any, streams: tuple[_Stream, _Stream], absorb: Any) -> None:
    """Call ``absorb(keys, values, hide, bring)`` for every group of the block's keys.

    For every piece of the block's queries it calls ``hide(piece, s)``, which hides logits, and ``bring(piece)``, which starts
    a share of the next group's copies: the scalar unit does so while the others work on the piece.
    """
    groups = lax.div(lists.count[0, 0, 0, 0, 0] + (GROUP - 1), GROUP)
    share = -(-GROUP // len(p.pieces))

    def start(group: Any, first: int, last: int, unroll: Any) -> None:
        slot = lax.rem(group, 2)

        def row(n: Any, _: None) -> None:
            word = lists.words[0, 0, 0, 0, group * GROUP + n]
            for stream in streams:
                stream.start(word, slot, n)

        lax.fori_loop(first, last, row, None, unroll=unroll)

    def visit(group: Any, ahead: bool) -> None:
        across = lists.positions[0, 0, 0, :, pl.ds(pl.multiple_of(group * GROUP, GROUP), GROUP)]
        named = upright(across)
        keys, values = (stream.arrived(lax.rem(group, 2), named, p.dtype) for stream in streams)

        def hide(piece: Any, s: Any) -> Any:
            ok = across >= 0
            if rows is not None:
                ok = ok & (across <= upright(rows[0, 0])[piece.start : piece.start + piece.size])
            return jnp.where(ok, s, HIDDEN)

        def bring(piece: Any) -> None:
            first = piece.start // _PIECE * share
            if ahead and first < GROUP:
                start(group + 1, first, min(first + share, GROUP), not simulated())

        absorb(keys, values, hide, bring)

    @pl.when(groups > 0)
    def _() -> None:
        start(0, 0, GROUP, 8)
        lax.fori_loop(0, groups - 1, lambda group, _: visit(group, True), None)
        visit(groups - 1, False)


def _forward_kernel(p: _Call, count: Any, words: Any, positions: Any, q: Any, *refs: Any) -> None:
    rows, refs = (refs[0], refs[1:]) if p.causal else (None, refs)
    k, v, out, lse, k_buffer, v_buffer, filled, *sums = refs
    online = Online(*sums)
    online.clear()

    def absorb(keys: Any, values: Any, hide: Any, bring: Any) -> None:
        def product(piece: Any) -> Any:
            return dot(q[0, 0, 0, piece], keys, (1, 1))

        def weigh(piece: Any, s: Any) -> None:
            bring(piece)
            weight, shrink = online.weights(piece, hide(piece, s), True)
            online.add(piece, dot(weight.astype(p.dtype), values, (1, 0)), shrink)

        work_through(p.pieces, product, weigh)

    _visit(p, _Lists(count, words, positions), rows, _streams(p, k, v, k_buffer, v_buffer, filled), absorb)
    found, lse[0, 0, 0] = online.results(True)
    out[0, 0, 0] = found.astype(out.dtype)


def _gradient_kernel(p: _Call, count: Any, words: Any, positions: Any, q: Any, *refs: Any) -> None:
    rows, refs = (refs[0], refs[1:]) if p.causal else (None, refs)
    k, v, d_out, norm, delta, dq, k_buffer, v_buffer, filled, norms, deltas, acc = refs
    norms[...] = jnp.broadcast_to(norm[0, 0, 0], (LANES, p.rows)).T
    deltas[...] = jnp.broadcast_to(delta[0, 0, 0], (LANES, p.rows)).T
    acc[...] = jnp.zeros_like(acc)

    def absorb(keys: Any, values: Any, hide: Any, bring: Any) -> None:
        def products(piece: Any) -> tuple[Any, Any]:
            return dot(q[0, 0, 0, piece], keys, (1, 1)), dot(d_out[0, 0, 0, piece], values, (1, 1))

        def collect(piece: Any, both: tuple[Any, Any]) -> None:
            bring(piece)
            s, dw = both
            weight = jnp.exp2(hide(piece, s) - wide(norms[piece], GROUP))
            ds = weight * (dw - wide(deltas[piece], GROUP))
            acc[piece] += dot(ds.astype(p.dtype), keys, (1, 0))

        work_through(p.pieces, products, collect)

    _visit(p, _Lists(count, words, positions), rows, _streams(p, k, v, k_buffer, v_buffer, filled), absorb)
    dq[0, 0, 0] = (acc[...] / LOG2E).astype(dq.dtype)
