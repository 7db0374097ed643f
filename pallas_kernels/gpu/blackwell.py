"""Flash attention on Blackwell GPUs, forward: the masks, scores and lists of tiles of `flash`, with products by tcgen05.

A block owns a row of tiles: 128 queries per computing warpgroup, of which there are one or two. One more warpgroup brings in
keys and values and issues the products, whose results lie in tensor memory:

    S ← Q Kᵀ        then the computing warpgroup turns S into weights P, and shrinks O where its row maxima grew;
    O ← O + P V     with P in 16 bits where S was: when this is done, the next S may be written there.

While one computing warpgroup is about its weights, the other's products run. A warpgroup sees S in pieces, as few columns at a
time as leave its 168 registers enough room for any score: first for the row maxima, then for the weights. Registers are not
handed from warpgroup to warpgroup, because the compiler of JAX 0.12 ignores that.

Nothing of this has run on a GPU. Results are simulated, with JAX 0.12 also the asynchronous products and the order of reads and
writes in tensor memory; that the kernel compiles for sm_100a without spills is checked (`pallas_kernels.gpu.report`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu import tensor_memory, tile
from pallas_kernels.gpu.flash import Inputs
from pallas_kernels.gpu.launch import launch
from pallas_kernels.gpu.operands import Call, Parts
from pallas_kernels.gpu.ring import Ring
from pallas_kernels.gpu.tile import Running, across
from pallas_kernels.gpu.tiles import FULL, PARTIAL, Tiles
from pallas_kernels.gpu.warpgroup import TCGEN05, filled, laid, shared
from pallas_kernels.tpu.problem import HIDDEN, Problem

ROWS = TCGEN05.rows
#: Columns of S and O that a warpgroup looks at and writes back at once; and columns of S that it turns into weights at once,
#: fewer, since it keeps the weights of a tile: they are written where S was, after all of S has been read.
PIECE, NARROW = 32, 16


def forward(p: Problem, tiles: Tiles, x: Inputs, slots: int) -> tuple[Any, Any]:
    """``out [B, T, N, Hv]`` and ``lse [B, N, T]`` as `flash.forward` gives them."""
    computing = p.block_q // ROWS
    queries, width, value_width = x.q.shape[1], x.q.shape[-1], x.v.shape[-1]
    ordered = plgpu.Barrier(num_barriers=computing, orders_tensor_core=True)
    return launch(
        functools.partial(_kernel, p, tiles, computing),
        name="attnzoo_flash_forward",
        grid=(queries // p.block_q, p.batch, p.heads),
        grid_names=("row", "batch", "head"),
        warpgroups=computing + 1,
        inputs=[tiles.minor, tiles.begin, tiles.full, tiles.count, x.call, x.q, x.k, x.v, *x.score, *x.mask],
        out_type=[
            jax.ShapeDtypeStruct((*x.q.shape[:3], value_width), x.v.dtype),
            jax.ShapeDtypeStruct((p.batch, p.heads, queries), jnp.float32),
        ],
        scratch=[
            shared((computing, ROWS, width), x.q.dtype),
            shared((slots, p.block_k, width), x.k.dtype),
            shared((slots, p.block_k, value_width), x.v.dtype),
            *([] if width == value_width else [shared((computing, ROWS, value_width), x.v.dtype)]),
            plgpu.SMEM((computing, ROWS), jnp.float32),
            [tensor_memory.logits_or_weights(p.block_k, x.v.dtype)] * computing,
            [tensor_memory.sums(value_width)] * computing,
            plgpu.Barrier(num_barriers=computing),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
            ordered,
            ordered,
            ordered,
        ],
    )  # fmt: skip


def part(ref: Any, column: Any, columns: int) -> Any:
    """All rows of some columns."""
    return ref.at[:, pl.ds(column, columns)]


def _kernel(p: Problem, tiles: Tiles, computing: int, minor: Any, begin: Any, full: Any, count: Any, call: Any, q: Any, k: Any,
            v: Any, *refs: Any) -> None:  # fmt: skip
    cut, both = len(p.score_layouts), len(p.score_layouts) + len(p.mask_layouts)
    out, lse, *scratch = refs[both:]
    q_smem, k_smem, v_smem, *apart, lse_smem, pairs, sums, q_here, k_here, v_here, asked, given, added = scratch
    out_smem = apart[0] if apart else q_smem
    b, h, me = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
    row = tiles.rows - 1 - lax.axis_index("row")  # under a causal mask the last row is the longest: it begins first
    at = p.which_list(b, h) * tiles.rows + row
    first, length = begin[at], count[at]
    place = Call.of(call)
    keys, values = Ring(k, k_smem, k_here, None), Ring(v, v_smem, v_here, None)

    def of(w: int) -> tuple[Any, Any, Any]:
        """Of a computing warpgroup, in tensor memory: S ``[128, keys]``, P ``[128, keys]`` and O ``[128, Hv]``."""
        return *pairs[w], sums[w]

    def compute(w: int) -> None:
        t0 = row * p.block_q + w * ROWS
        mine = b, pl.ds(t0, ROWS), h
        score, mask = (
            Parts(p, arrays, layouts, b, h, t0, lay=TCGEN05)
            for arrays, layouts in ((refs[:cut], p.score_layouts), (refs[cut:both], p.mask_layouts))
        )
        score_fixed, mask_fixed = score.fixed(), mask.fixed()
        s_tmem, p_tmem, o_tmem = of(w)
        # Rows without tiles find their sums here, and no tile is a special one.
        tensor_memory.store(o_tmem, filled((ROWS, out.shape[-1]), 0.0, TCGEN05))
        tensor_memory.written()

        def absorb(masked: bool, n: Any, statistics: tuple[Any, Any]) -> tuple[Any, Any]:
            top, total = statistics
            s0 = minor[first + n] * p.block_k
            shape = ROWS, PIECE
            weights = []

            def cells(c: Any, columns: int) -> tuple[Any, Any, Any, Any]:
                return place.cells(b, h, t0, s0 + c, (ROWS, columns), lay=TCGEN05)

            def look(i: Any, largest: Any) -> Any:
                """Apply the score, the mask and a pointwise map to a piece of S."""
                c = i * PIECE
                s = tensor_memory.load(part(s_tmem, c, PIECE))
                if p.score is not None:
                    parts = score.whole(score_fixed, score.moving(s0 + c, PIECE), s0 + c, shape)
                    s = tile.scored(p, s, *cells(c, PIECE), parts)
                if masked:
                    parts = mask.whole(mask_fixed, mask.moving(s0 + c, PIECE), s0 + c, shape)
                    s = tile.hidden(p, s, *cells(c, PIECE), parts, place.end(p))
                s = s if p.phi is None else tile.pointwise(p, s)
                tensor_memory.loaded()
                if masked or p.score is not None or p.phi is not None:
                    tensor_memory.store(part(s_tmem, c, PIECE), s)
                return jnp.maximum(largest, s)

            def shrink_sums(factor: Any) -> None:
                @pl.loop(0, out.shape[-1] // PIECE)
                def _(i: Any) -> None:
                    acc = tensor_memory.load(part(o_tmem, i * PIECE, PIECE))
                    tensor_memory.loaded()
                    tensor_memory.store(part(o_tmem, i * PIECE, PIECE), acc * across(factor, shape))

            plgpu.barrier_wait(asked.at[w])
            # Loops, since the compiler would bring all pieces into registers before it looks at the first.
            largest = lax.fori_loop(0, p.block_k // PIECE, look, filled(shape, HIDDEN, TCGEN05))
            tensor_memory.written()
            if p.phi is None:
                before, top = top, jnp.maximum(top, largest.max(axis=1))
                shrink = tile.power(p, before - top)
                total = total * shrink
                shrink_sums(shrink)
            for c in range(0, p.block_k, NARROW):
                weight = tensor_memory.load(part(s_tmem, c, NARROW))
                tensor_memory.loaded()
                if p.phi is None:
                    weight = tile.power(p, weight - across(top, weight.shape))
                    total = total + weight.sum(axis=1)
                if p.keep is not None:
                    weight = weight * p.keep(*place.seed, *cells(c, NARROW))
                weights.append(weight.astype(v.dtype))
            for c, weight in zip(range(0, p.block_k, NARROW), weights, strict=True):
                tensor_memory.store(part(p_tmem, c, NARROW), weight)
            tensor_memory.written()
            plgpu.barrier_arrive(given.at[w])
            return top, total

        statistics = filled((ROWS,), HIDDEN, TCGEN05), filled((ROWS,), 0.0, TCGEN05)
        if FULL in tiles.kinds:
            statistics = lax.fori_loop(0, full[at], functools.partial(absorb, False), statistics)
        if PARTIAL in tiles.kinds:
            statistics = lax.fori_loop(full[at], length, functools.partial(absorb, True), statistics)
        plgpu.barrier_wait(asked.at[w])  # once more than there are tiles: all products are done
        for c in range(0, out.shape[-1], 64):
            result, norm = tile.finish(p, Running(tensor_memory.load(part(o_tmem, c, 64)), *statistics))
            out_smem[w, :, pl.ds(c, 64)] = result.astype(out.dtype)
        lse_smem[w] = laid(norm, TCGEN05.per_row)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[w], out.at[mine])
        plgpu.copy_smem_to_gmem(lse_smem.at[w], lse.at[b, h, pl.ds(t0, ROWS)])
        plgpu.wait_smem_to_gmem(0)

    # Code for each, since references into tensor memory cannot be picked at run time.
    for w in range(computing):
        pl.when(me == w)(functools.partial(compute, w))

    @pl.when(me == computing)
    def _feed() -> None:
        kv = lax.div(h, jnp.int32(p.group))

        def fetch(ring: Ring, n: Any) -> None:
            """Bring in tile n, if there is one, to a slot that is free."""

            @pl.when(n < length)
            def _() -> None:
                tokens = pl.ds(minor[first + n] * p.block_k, p.block_k)
                there = (b, kv, tokens) if p.keys_by_head else (b, tokens, kv)
                plgpu.copy_gmem_to_smem(ring.source.at[there], ring.slots.at[ring.at(n)], ring.here.at[ring.at(n)])

        def ask(w: int, n: Any) -> None:
            """Issue S of tile n, if there is one; in any case say when all products so far are done."""

            @pl.when(n < length)
            def _() -> None:
                if w == 0:
                    plgpu.barrier_wait(keys.here.at[keys.at(n)])
                tensor_memory.multiply(of(w)[0], q_smem.at[w], keys.slots.at[keys.at(n)], add=False, transposed=True)

            tensor_memory.signal(asked.at[w])

        for w in range(computing):
            mine = b, pl.ds(row * p.block_q + w * ROWS, ROWS), h
            plgpu.copy_gmem_to_smem(q.at[mine], q_smem.at[w], q_here.at[w])
        for n in range(keys.length):
            fetch(keys, n)
            fetch(values, n)
        for w in range(computing):
            plgpu.barrier_wait(q_here.at[w])
            ask(w, jnp.int32(0))

        @pl.loop(0, length)
        def _(n: Any) -> None:
            for w in range(computing):
                _, p_tmem, o_tmem = of(w)
                plgpu.barrier_wait(given.at[w])
                if w == 0:
                    plgpu.barrier_wait(values.here.at[values.at(n)])
                tensor_memory.multiply(o_tmem, p_tmem, values.slots.at[values.at(n)], add=True)
                tensor_memory.signal(added.at[w])
                if w == computing - 1:
                    fetch(keys, n + keys.length)
                # Products into other columns are not ordered among each other: P must have been read before S is written.
                plgpu.barrier_wait(added.at[w])
                ask(w, n + 1)
            fetch(values, n + values.length)
