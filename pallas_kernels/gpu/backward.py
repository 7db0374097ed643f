"""The gradients of flash attention on Hopper GPUs: one kernel walks rows of tiles for dq, one walks columns for dk and dv.

Both recompute weights from the log-sum-exp, in pieces of 64 or 32 columns, for whose products there are registers. Blocks are
as in `flash`: two warpgroups compute, 64 rows of the tile each, and one fetches. In the kernel for dk and dv a tile has keys
along its rows and queries along its columns, and all query heads of a key head add to the same sums.

Simulated, compiled and run like the forward kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tile
from pallas_kernels.gpu.flash import COMPUTING, REGISTERS, Inputs
from pallas_kernels.gpu.launch import launch
from pallas_kernels.gpu.operands import Call, Parts, sideways
from pallas_kernels.gpu.ring import Ring, barriers, drain, fetch
from pallas_kernels.gpu.tile import across, down
from pallas_kernels.gpu.tiles import FULL, PARTIAL, Tiles
from pallas_kernels.gpu.warpgroup import (
    PER_COLUMN,
    PER_ROW,
    ROWS,
    TILE,
    add_product,
    filled,
    laid,
    product,
    read,
    shared,
)
from pallas_kernels.tpu.problem import LOG2E, Layout, Problem


def piece_of(x: Inputs, plain: bool) -> int:
    """Columns of a tile that are worked on at once: as many as leave room in the registers for the sums.

    plain: whether little happens between the products.
    """
    return 64 if plain or max(x.q.shape[-1], x.v.shape[-1]) <= 64 else 32


def queries_gradient(
    p: Problem, tiles: Tiles, x: Inputs, d_out: Any, norm: Any, delta: Any, slots: int
) -> tuple[Any, dict[int, Any]]:
    """dq, and the gradients of the score's operands that are neither columns nor by distance, each ``[B, N, ...]`` as laid out;
    those of cells are written in visited tiles only. norm, delta: float32 ``[B, N, T]``; norm is +inf in rows that saw
    nothing."""
    queries = x.q.shape[1]
    piece = piece_of(x, plain=p.score is None)
    swizzle = 2 * piece
    mine = [n for n, f in enumerate(p.score_layouts) if p.differentiable[n] and f.form not in ("column", "distance")]
    shapes = [(1, queries) if p.score_layouts[n].form != "cell" else x.score[n].shape[2:] for n in mine]
    outs = launch(
        functools.partial(_dq_kernel, p, tiles, mine, piece),
        name="attnzoo_flash_dq",
        grid=(queries // p.block_q, p.batch, p.heads),
        grid_names=("row", "batch", "head"),
        warpgroups=COMPUTING + 1,
        inputs=[
            tiles.minor,
            tiles.begin,
            tiles.full,
            tiles.count,
            x.call,
            x.q,
            x.k,
            x.v,
            d_out,
            norm,
            delta,
            *x.score,
            *x.mask,
        ],
        out_type=[
            jax.ShapeDtypeStruct(x.q.shape, x.q.dtype),
            *(jax.ShapeDtypeStruct((p.batch, p.heads, *shape), jnp.float32) for shape in shapes),
        ],
        scratch=_buffers(x, slots, p.block_k, swizzle),
    )
    return outs[0], dict(zip(mine, outs[1:], strict=True))


def _dq_kernel(p: Problem, tiles: Tiles, mine: list[int], piece: int, minor: Any, begin: Any, full: Any, count: Any, call: Any,
               q: Any, k: Any, v: Any, do: Any, norm: Any, delta: Any, *refs: Any) -> None:  # fmt: skip
    cut, both = len(p.score_layouts), len(p.score_layouts) + len(p.mask_layouts)
    dq, *rest = refs[both:]
    grads, scratch = rest[: len(mine)], rest[len(mine) :]
    q_smem, do_smem, k_smem, v_smem, q_here, do_here, k_here, k_free, v_here, v_free = scratch
    b, h, me = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
    row = tiles.rows - 1 - lax.axis_index("row")
    at = p.which_list(b, h) * tiles.rows + row
    first, length = begin[at], count[at]
    place = Call.of(call)
    rings = [Ring(k, k_smem, k_here, k_free), Ring(v, v_smem, v_here, v_free)]
    summed = [n for n in mine if p.score_layouts[n].form != "cell"]

    @pl.when(me < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        t0 = row * p.block_q + me * ROWS
        here = b, pl.ds(t0, ROWS), h
        plgpu.copy_gmem_to_smem(q.at[here], q_smem.at[me], q_here.at[me])
        plgpu.copy_gmem_to_smem(do.at[here], do_smem.at[me], do_here.at[me])
        score, mask = Parts(p, refs[:cut], p.score_layouts, b, h, t0), Parts(p, refs[cut:both], p.mask_layouts, b, h, t0)
        score_fixed, mask_fixed = score.fixed(), mask.fixed()
        norms, deltas = (read(ref, (b, h, pl.ds(t0, ROWS)), PER_ROW) for ref in (norm, delta))
        plgpu.barrier_wait(q_here.at[me])
        plgpu.barrier_wait(do_here.at[me])
        shape = ROWS, piece

        def absorb(masked: bool, n: Any, carry: Any) -> Any:
            acc, sums = carry
            slot = rings[0].at(n)
            plgpu.barrier_wait(k_here.at[slot])
            plgpu.barrier_wait(v_here.at[slot])
            for c in range(0, p.block_k, piece):
                s0 = minor[first + n] * p.block_k + c
                cells = place.cells(b, h, t0, s0, shape)
                parts = score.whole(score_fixed, score.moving(s0, piece), s0, shape)
                mask_parts = mask.whole(mask_fixed, mask.moving(s0, piece), s0, shape) if masked else None
                keys = k_smem.at[slot, pl.ds(c, piece)]
                s, left = _logits(p, q_smem.at[me], keys, across(norms, shape))
                _, pull = tile.weights_again(p, s, left, cells, _tiles(parts, p, shape), mask_parts, place.end(p))
                keep = None if p.keep is None else p.keep(*place.seed, *cells)
                values = v_smem.at[slot, pl.ds(c, piece)]
                ds, d_parts = pull(_weight_gradient(p, do_smem.at[me], values, across(deltas, shape), keep))
                acc = add_product(acc, ds.astype(k.dtype), keys)
                sums = [total + laid(d_parts[n], TILE).sum(axis=1) for total, n in zip(sums, summed, strict=True)]
                for n_grad, ref in zip(mine, grads, strict=True):
                    if n_grad not in summed:
                        ref[b, h, pl.ds(t0, ROWS), pl.ds(s0, piece)] = laid(d_parts[n_grad], TILE)
            plgpu.barrier_arrive(k_free.at[slot])
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, sums

        carry = filled((ROWS, q.shape[-1]), 0.0), [filled((ROWS,), 0.0) for _ in summed]
        if FULL in tiles.kinds:
            carry = lax.fori_loop(0, full[at], functools.partial(absorb, False), carry)
        if PARTIAL in tiles.kinds:
            carry = lax.fori_loop(full[at], length, functools.partial(absorb, True), carry)
        acc, sums = carry
        q_smem[me] = (acc * (1 / LOG2E) if p.base2 else acc).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[me], dq.at[here])
        for total, n in zip(sums, summed, strict=True):
            grads[mine.index(n)][b, h, 0, pl.ds(t0, ROWS)] = total
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == COMPUTING)
    def _fetch() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")
        kv = lax.div(h, jnp.int32(p.group))
        fetch(rings, 0, length, lambda n: (b, pl.ds(minor[first + n] * p.block_k, p.block_k), kv))
        drain(rings, length)


def _buffers(x: Inputs, slots: int, block: int, swizzle: int) -> list[Any]:
    """Of either kernel: the two tiles that a warpgroup keeps (q and do, or k and v), rings of the other two in tiles of `block`
    rows, and their barriers. All have one dtype."""
    width, value_width = x.q.shape[-1], x.v.shape[-1]
    return [
        shared((COMPUTING, ROWS, width), x.q.dtype, swizzle),
        shared((COMPUTING, ROWS, value_width), x.v.dtype, swizzle),
        shared((slots, block, width), x.k.dtype, swizzle),
        shared((slots, block, value_width), x.v.dtype, swizzle),
        plgpu.Barrier(num_barriers=COMPUTING),
        plgpu.Barrier(num_barriers=COMPUTING),
        *barriers(slots, COMPUTING),
        *barriers(slots, COMPUTING),
    ]


def keys_gradient(
    p: Problem, tiles: Tiles, x: Inputs, d_out: Any, norm: Any, delta: Any, slots: int
) -> tuple[Any, Any, dict[int, Any]]:
    """dk, dv, and the gradients of the score's column operands ``[B, N, 1, S]``. tiles: lists by columns of tiles."""
    keys = x.k.shape[1]
    piece = piece_of(x, plain=p.score is None and p.mask is None)
    swizzle = 2 * piece
    mine = [n for n, f in enumerate(p.score_layouts) if p.differentiable[n] and f.form == "column"]
    score, score_layouts = sideways(x.score, p.score_layouts)
    mask, mask_layouts = sideways(x.mask, p.mask_layouts)
    outs = launch(
        functools.partial(_dkv_kernel, p, tiles, mine, piece, score_layouts, mask_layouts),
        name="attnzoo_flash_dkv",
        grid=(keys // p.block_k, p.batch, p.kv_heads),
        grid_names=("column", "batch", "head"),
        warpgroups=COMPUTING + 1,
        inputs=[tiles.minor, tiles.begin, tiles.full, tiles.count, x.call, x.q, x.k, x.v, d_out, norm, delta, *score, *mask],
        out_type=[
            jax.ShapeDtypeStruct(x.k.shape, x.k.dtype),
            jax.ShapeDtypeStruct(x.v.shape, x.v.dtype),
            *(jax.ShapeDtypeStruct((p.batch, p.heads, 1, keys), jnp.float32) for _ in mine),
        ],
        scratch=_buffers(x, slots, p.block_q, swizzle),
    )
    return outs[0], outs[1], dict(zip(mine, outs[2:], strict=True))


def _dkv_kernel(p: Problem, tiles: Tiles, mine: list[int], piece: int, score_layouts: tuple[Layout, ...],
                mask_layouts: tuple[Layout, ...], minor: Any, begin: Any, full: Any, count: Any, call: Any, q: Any, k: Any,
                v: Any, do: Any, norm: Any, delta: Any, *refs: Any) -> None:  # fmt: skip
    cut, both = len(score_layouts), len(score_layouts) + len(mask_layouts)
    dk, dv, *rest = refs[both:]
    grads, scratch = rest[: len(mine)], rest[len(mine) :]
    k_smem, v_smem, q_smem, do_smem, k_here, v_here, q_here, q_free, do_here, do_free = scratch
    b, kv, me = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
    place = Call.of(call)
    column = lax.axis_index("column")  # under a causal mask the first column is the longest
    rings = [Ring(q, q_smem, q_here, q_free), Ring(do, do_smem, do_here, do_free)]

    def of_head(g: Any) -> tuple[Any, Any]:
        h = kv * p.group + g
        return h, p.which_list(b, h) * tiles.rows + column

    @pl.when(me < COMPUTING)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        s0 = column * p.block_k + me * ROWS
        here = b, pl.ds(s0, ROWS), kv
        plgpu.copy_gmem_to_smem(k.at[here], k_smem.at[me], k_here.at[me])
        plgpu.copy_gmem_to_smem(v.at[here], v_smem.at[me], v_here.at[me])
        plgpu.barrier_wait(k_here.at[me])
        plgpu.barrier_wait(v_here.at[me])
        shape = ROWS, piece

        def head(g: Any, carry: Any) -> Any:
            h, at = of_head(g)
            begun, d_k, d_v = carry
            score = Parts(p, refs[:cut], score_layouts, b, h, s0, down=1)
            mask = Parts(p, refs[cut:both], mask_layouts, b, h, s0, down=1)
            score_fixed, mask_fixed = score.fixed(), mask.fixed()

            def absorb_piece(masked: bool, slot: Any, n: Any, c: Any, carry: Any) -> Any:
                d_k, d_v, sums = carry
                t0 = minor[begin[at] + n] * p.block_q + c * piece
                cells = place.cells(b, h, t0, s0, shape, down=1)
                parts = score.whole(score_fixed, score.moving(t0, piece), t0, shape)
                mask_parts = mask.whole(mask_fixed, mask.moving(t0, piece), t0, shape) if masked else None
                queries, d_out = (ring.slots.at[slot, pl.ds(c * piece, piece)] for ring in rings)
                s, norms = _logits(p, k_smem.at[me], queries, down(read(norm, (b, h, pl.ds(t0, piece)), PER_COLUMN), shape))
                weight, pull = tile.weights_again(p, s, norms, cells, _tiles(parts, p, shape), mask_parts, place.end(p))
                deltas = down(read(delta, (b, h, pl.ds(t0, piece)), PER_COLUMN), shape)
                keep = None if p.keep is None else p.keep(*place.seed, *cells)
                ds, d_parts = pull(_weight_gradient(p, v_smem.at[me], d_out, deltas, keep))
                weight = (weight if keep is None else weight * keep).astype(do.dtype)
                sums = [total + laid(d_parts[m], TILE).sum(axis=1) for total, m in zip(sums, mine, strict=True)]
                # Both narrow before the sums take part: otherwise the wide ones stay in registers beside them.
                weight, ds = lax.optimization_barrier((weight, ds.astype(q.dtype)))
                d_v = add_product(d_v, weight, d_out)
                d_k = add_product(d_k, ds, queries)
                return d_k, d_v, sums

            def absorb(masked: bool, n: Any, carry: Any) -> Any:
                slot = rings[0].at(begun + n)
                plgpu.barrier_wait(q_here.at[slot])
                plgpu.barrier_wait(do_here.at[slot])
                # A loop, not unrolled: two pieces at once would not fit into the registers.
                carry = lax.fori_loop(0, p.block_q // piece, functools.partial(absorb_piece, masked, slot, n), carry)
                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.barrier_arrive(do_free.at[slot])
                return carry

            inner = d_k, d_v, [filled((ROWS,), 0.0) for _ in mine]
            if FULL in tiles.kinds:
                inner = lax.fori_loop(0, full[at], functools.partial(absorb, False), inner)
            if PARTIAL in tiles.kinds:
                inner = lax.fori_loop(full[at], count[at], functools.partial(absorb, True), inner)
            d_k, d_v, sums = inner
            for total, ref in zip(sums, grads, strict=True):
                ref[b, h, 0, pl.ds(s0, ROWS)] = total
            return begun + count[at], d_k, d_v

        start = jnp.int32(0), filled((ROWS, k.shape[-1]), 0.0), filled((ROWS, v.shape[-1]), 0.0)
        _, d_k, d_v = lax.fori_loop(0, p.group, head, start)
        k_smem[me] = (d_k * (1 / LOG2E) if p.base2 else d_k).astype(dk.dtype)
        v_smem[me] = d_v.astype(dv.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_smem.at[me], dk.at[here])
        plgpu.copy_smem_to_gmem(v_smem.at[me], dv.at[here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(me == COMPUTING)
    def _fetch() -> None:
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def head(g: Any, begun: Any) -> Any:
            h, at = of_head(g)
            return fetch(rings, begun, count[at], lambda n: (b, pl.ds(minor[begin[at] + n] * p.block_q, p.block_q), h))

        drain(rings, lax.fori_loop(0, p.group, head, jnp.int32(0)))


def _logits(p: Problem, a: Any, b: Any, norm: Any) -> tuple[Any, Any]:
    """``a · bᵀ`` and what is still to be taken off it; where nothing comes between, the product itself begins at -norm."""
    return (add_product(-norm, a, b, transposed=True), None) if p.base2 else (product(a, b), norm)


def _weight_gradient(p: Problem, a: Any, b: Any, delta: Any, keep: Any) -> Any:
    """``a · bᵀ``, the gradient of a tile's weights, less delta unless weights are pointwise."""
    if p.phi is not None:
        return product(a, b) if keep is None else product(a, b) * keep
    if keep is not None:
        return product(a, b) * keep - delta
    return add_product(-delta, a, b, transposed=True)


def _tiles(parts: list[Any], p: Problem, shape: tuple[int, int]) -> list[Any]:
    """Operands of a score, with differentiable scalars as tiles: gradients of tiles are tiles."""
    return [
        laid(jnp.broadcast_to(x, shape), TILE) if layout.form == "one" and moves else x
        for x, layout, moves in zip(parts, p.score_layouts, p.differentiable, strict=True)
    ]
