"""Arrays that are looked up by the distance of query and key, on a GPU.

A warpgroup reads rectangles of memory, and the entries of a tile of such an array lie along its diagonals. So the array is
written out once, each row shifted by one against the row above: ``skewed[r, y] = table[y - r]``, for as many rows as a
warpgroup has. Any tile is then some columns of it, and there are ``rows · (T + S)`` numbers, not T·S.

All tiles would add to the gradient of the table, in an order that changes from run to run. It comes from a pass of its own in
plain JAX, a block of queries at a time.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.gpu import tile
from pallas_kernels.tpu.problem import Layout, Problem


def placed(operands: tuple[Any, ...], layouts: tuple[Layout, ...], rows: int) -> tuple[Any, ...]:
    """Laid-out operands as the GPU kernels read them: by distance ``[1, N|1, rows, T + S]``, whose entry ``[r, y]`` belongs to
    query t and key s with ``y - r = T + s - t``; the others as they are."""
    return tuple(
        _skewed(x[:, 1], rows)[None] if layout.form == "distance" else x for x, layout in zip(operands, layouts, strict=True)
    )


def turned(x: Any) -> Any:
    """One of :func:`placed` for tiles whose rows are keys: its entry ``[r, y]`` belongs to ``y - r = S + t - s``."""
    table = _table(x)
    return _skewed(jnp.roll(table[:, ::-1], 1, axis=1), x.shape[2])[None]


def _table(x: Any) -> Any:
    """``[N|1, T + S]`` from what :func:`placed` made of it."""
    return x[0, :, 0]


def _skewed(table: Any, rows: int) -> Any:
    """``[N, rows, length]``; what lies left of the first entry is not meant."""
    heads, length = table.shape
    # Rows of one more than the length, cut into rows of the length: each begins one entry earlier than the row above.
    longer = jnp.pad(table, ((0, 0), (0, 1)))
    copies = jnp.broadcast_to(longer[:, None], (heads, rows, length + 1)).reshape(heads, -1)
    return copies[:, : rows * length].reshape(heads, rows, length)


def table_gradients(p: Problem, x: Any, d_out: Any, norm: Any, delta: Any, mine: list[int]) -> dict[int, Any]:
    """The gradients of the score's operands ``mine``, which are by distance, each ``[1, N|1, 1, T + S]`` in the order of
    :func:`placed`. x: `flash.Inputs`, with k and v ``[B, S, K, ·]``; norm, delta as for the kernels."""
    rows, columns = p.padded
    block = p.block_q
    batch, head, query, key = (x.call[n] for n in range(2, 6))

    def products(a: Any, b: Any) -> Any:
        a = a.reshape(*a.shape[:2], p.kv_heads, p.group, a.shape[3])
        return jnp.einsum("btkgh,bskh->bkgts", a, b, preferred_element_type=jnp.float32).reshape(
            p.batch, p.heads, block, columns
        )

    def strip(i: Any, totals: list[Any]) -> list[Any]:
        t0 = i * block

        def of(a: Any, axis: int) -> Any:
            return lax.dynamic_slice_in_dim(a, t0, block, axis)

        cells = (
            jnp.arange(p.batch).reshape(-1, 1, 1, 1) + batch,
            jnp.arange(p.heads).reshape(-1, 1, 1) + head,
            (t0 + jnp.arange(block))[:, None] + query,
            jnp.arange(columns) + key,
        )
        score, mask = (
            [_strip(p, a, layout, i) for a, layout in zip(operands, layouts, strict=True)]
            for operands, layouts in ((x.score, p.score_layouts), (x.mask, p.mask_layouts))
        )
        s = products(of(x.q, 1), x.k)
        _, pull = tile.weights_again(p, s, of(norm, 2)[..., None], cells, score, mask, key + p.keys)
        dw = products(of(d_out, 1), x.v)
        if p.keep is not None:
            dw = dw * p.keep(x.call[0], x.call[1], *cells)
        d_parts = pull(dw if p.phi is not None else dw - of(delta, 2)[..., None])[1]
        first = rows - t0 - block + 1
        new = []
        for total, n in zip(totals, mine, strict=True):
            d = _along_diagonals(d_parts[n])
            d = lax.dynamic_slice_in_dim(total, first, d.shape[2], 2) + d
            new.append(lax.dynamic_update_slice_in_dim(total, d, first, 2))
        return new

    start = [jnp.zeros((1, x.score[n].shape[1], rows + columns), jnp.float32) for n in mine]
    totals = lax.fori_loop(0, rows // block, strip, start)
    return {n: total[:, :, None] for n, total in zip(mine, totals, strict=True)}


def _strip(p: Problem, x: Any, layout: Layout, i: Any) -> Any:
    """A laid-out operand for a block of queries and all keys; of one by distance, an entry per cell."""
    block, (rows, columns) = p.block_q, p.padded
    if layout.form == "row":
        return lax.dynamic_slice_in_dim(x, i * block, block, 3).swapaxes(2, 3)
    if layout.form == "cell":
        x = lax.dynamic_slice_in_dim(x, i * block, block, 2)
        return x.astype(jnp.int32) if x.dtype == jnp.int8 else x
    if layout.form == "tile":
        x = x.reshape(*x.shape[:2], rows // block, columns // p.block_k)
        return jnp.repeat(lax.dynamic_slice_in_dim(x, i, 1, 2), p.block_k, axis=3)
    if layout.form == "distance":
        length = columns + block - 1
        window = lax.dynamic_slice_in_dim(_table(x), rows - (i + 1) * block + 1, length, 1)
        copies = jnp.broadcast_to(window[:, None], (len(window), block + 1, length)).reshape(len(window), -1)
        cells = copies[:, : block * (length + 1)].reshape(len(window), block, length + 1)  # the last query first
        return cells[None, :, ::-1, :columns]
    return x


def _along_diagonals(d: Any) -> Any:
    """Sums of ``[1, N, block, S]`` over cells of the same distance, ``[1, N, block + S - 1]``, first that of the last query and
    the first key."""
    lead, (block, columns) = d.shape[:2], d.shape[2:]
    longer = jnp.pad(d[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, block))).reshape(*lead, -1)
    return longer[..., : block * (columns + block - 1)].reshape(*lead, block, -1).sum(2)
