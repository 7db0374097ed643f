"""Flash attention on Hopper GPUs: any elementwise mask and score inside the kernel, tiles that the mask empties never visited.

A block of two warpgroups that compute and one that fetches owns a row of tiles: 64 queries per computing warpgroup. Its
tiles come through a ring of shared memory by bulk copies, full tiles first, which skip the mask. While one computing
warpgroup turns logits into weights, the other has the tensor cores: a barrier makes them take turns. With ``G`` query
heads per key head, keys and values are read, not copied, G times.

Checked without a GPU: results, races and reads of unwritten memory by simulation, with products by plain JAX in the place
of wgmma; that the kernel compiles for Hopper without spilling registers (`pallas_kernels.gpu.report`). On an H200 it takes 1.0
to 1.2 times what cuDNN takes (docs/guide/kernels.md).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tile
from pallas_kernels.gpu.launch import launch
from pallas_kernels.gpu.operands import Call, Parts
from pallas_kernels.gpu.ring import Ring, barriers, drain, fetch
from pallas_kernels.gpu.tile import Running, across
from pallas_kernels.gpu.tiles import FULL, PARTIAL, Tiles
from pallas_kernels.gpu.warpgroup import PER_ROW, ROWS, add_product, filled, laid, product, shared
from pallas_kernels.tpu.problem import HIDDEN, Problem

#: Warpgroups that compute; one more fetches.
COMPUTING = 2
#: Registers per thread of those that compute and of the one that fetches; together what a multiprocessor has.
REGISTERS = (240, 24)


class Inputs(NamedTuple):
    """Arrays of a call: ``q [B, T, N, H]`` scaled, ``k [B, S, K, H]``, ``v [B, S, K, Hv]`` (or, where the problem says so,
    ``[B, K, S, ·]``), padded to whole blocks and widths;
    laid-out operands of the score and the mask; ``call int32 [6]``: the seed of dropout, and the batch row, head, query and key
    at which these arrays begin in the call that they are a part of."""

    q: Any
    k: Any
    v: Any
    score: tuple[Any, ...]
    mask: tuple[Any, ...]
    call: Any


def forward(p: Problem, tiles: Tiles, x: Inputs, slots: int) -> tuple[Any, Any]:
    """``out [B, T, N, Hv]`` in the type of v and ``lse [B, N, T]`` float32 (natural logarithm; zeros for pointwise maps),
    padded like the inputs. Rows that see nothing: 0 and -inf. slots: tiles of keys and values in shared memory at once."""
    queries, width, value_width = x.q.shape[1], x.q.shape[-1], x.v.shape[-1]
    return launch(
        functools.partial(_kernel, p, tiles),
        name="attnzoo_flash_forward",
        grid=(queries // p.block_q, p.batch, p.heads),
        grid_names=("row", "batch", "head"),
        warpgroups=COMPUTING + 1,
        inputs=[tiles.minor, tiles.begin, tiles.full, tiles.count, x.call, x.q, x.k, x.v, *x.score, *x.mask],
        out_type=[
            jax.ShapeDtypeStruct((*x.q.shape[:3], value_width), x.v.dtype),
            jax.ShapeDtypeStruct((p.batch, p.heads, queries), jnp.float32),
        ],
        scratch=[
            shared((COMPUTING, ROWS, width), x.q.dtype),
            shared((slots, p.block_k, width), x.k.dtype),
            shared((slots, p.block_k, value_width), x.v.dtype),
            *([] if width == value_width else [shared((COMPUTING, ROWS, value_width), x.v.dtype)]),
            plgpu.SMEM((COMPUTING, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=COMPUTING),
            *barriers(slots, COMPUTING),
            *barriers(slots, COMPUTING),
            plgpu.Barrier(num_arrivals=COMPUTING),
        ],
    )  # fmt: skip


def _kernel(p: Problem, tiles: Tiles, minor: Any, begin: Any, full: Any, count: Any, call: Any, q: Any, k: Any, v: Any,
            *refs: Any) -> None:  # fmt: skip
    cut, both = len(p.score_layouts), len(p.score_layouts) + len(p.mask_layouts)
    out, lse, *scratch = refs[both:]
    q_smem, k_smem, v_smem, *apart, lse_smem, q_here, k_here, k_free, v_here, v_free, turn = scratch
    out_smem = apart[0] if apart else q_smem
    b, h, me = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
    row = tiles.rows - 1 - lax.axis_index("row")  # under a causal mask the last row is the longest: it begins first
    at = p.which_list(b, h) * tiles.rows + row
    first, length = begin[at], count[at]
    place = Call.of(call)
    rings = [Ring(k, k_smem, k_here, k_free), Ring(v, v_smem, v_here, v_free)]

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(me < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        t0 = row * p.block_q + me * ROWS
        mine = b, pl.ds(t0, ROWS), h
        plgpu.copy_gmem_to_smem(q.at[mine], q_smem.at[me], q_here.at[me])
        score, mask = Parts(p, refs[:cut], p.score_layouts, b, h, t0), Parts(p, refs[cut:both], p.mask_layouts, b, h, t0)
        score_fixed, mask_fixed = score.fixed(), mask.fixed()
        plgpu.barrier_wait(q_here.at[me])
        pl.when(me == 1)(take_turns)

        def absorb(masked: bool, n: Any, r: Running) -> Running:
            slot, shape = rings[0].at(n), (ROWS, p.block_k)
            s0 = minor[first + n] * p.block_k
            score_moving = score.moving(s0, p.block_k)
            mask_moving = mask.moving(s0, p.block_k) if masked else []
            plgpu.barrier_wait(k_here.at[slot])
            s = product(q_smem.at[me], k_smem.at[slot], take_turns)
            plgpu.barrier_arrive(k_free.at[slot])
            cells = place.cells(b, h, t0, s0, shape)
            if p.score is not None:
                s = tile.scored(p, s, *cells, score.whole(score_fixed, score_moving, s0, shape))
            if masked:
                s = tile.hidden(p, s, *cells, mask.whole(mask_fixed, mask_moving, s0, shape), place.end(p))
            acc, top, total = r
            if p.phi is None:
                weight, shrink, top, total = tile.weigh(p, s, top, total)
                acc = acc * across(shrink, acc.shape)
            else:
                weight = tile.pointwise(p, s)
            if p.keep is not None:
                weight = weight * p.keep(*place.seed, *cells)
            weight = weight.astype(v.dtype)
            # Without this, work on the weights may move past the other warpgroup's turn.
            acc, top, total, weight = lax.optimization_barrier((acc, top, total, weight))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)
            acc = add_product(acc, weight, v_smem.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return Running(acc, top, total)

        r = Running(filled((ROWS, out.shape[-1]), 0.0), filled((ROWS,), HIDDEN), filled((ROWS,), 0.0))
        if FULL in tiles.kinds:
            r = lax.fori_loop(0, full[at], functools.partial(absorb, False), r)
        if PARTIAL in tiles.kinds:
            r = lax.fori_loop(full[at], length, functools.partial(absorb, True), r)
        pl.when(me == 0)(take_turns)
        result, norm = tile.finish(p, r)
        out_smem[me] = result.astype(out.dtype)
        lse_smem[me] = laid(norm, PER_ROW)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[me], out.at[mine])
        plgpu.copy_smem_to_gmem(lse_smem.at[me], lse.at[b, h, pl.ds(t0, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == COMPUTING)
    def _fetch() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        kv = lax.div(h, jnp.int32(p.group))

        def there(n: Any) -> tuple[Any, Any, Any]:
            keys = pl.ds(minor[first + n] * p.block_k, p.block_k)
            return (b, kv, keys) if p.keys_by_head else (b, keys, kv)

        fetch(rings, 0, length, there)
        drain(rings, length)
