"""Attention over listed keys: blocks of queries name the positions of the keys that they see.

For sparsity finer than tiles: single key columns chosen per head and block of queries (stripes), or the entries that a
compressed cache kept per head. With a dense part over other keys it is combined by :mod:`attnzoo.core.merge`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.backends.fused import tpu
from attnzoo.core.backends.listed import LOG2E, attend
from attnzoo.core.cells import Geometry, concrete
from attnzoo.core.request import as_positions, check_shapes
from attnzoo.core.sharding import division
from attnzoo.errors import unknown


def gathered_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    positions: Int[Array, "*B P Tq M"],
    *,
    block_q: int | None = None,
    q_positions: Int[Array, "*B T"] | None = None,
    scale: float | Array | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Softmax attention in which query block i of head h sees the keys ``positions[..., h, i, :]`` and no others.

    Args:
        q, k, v: as in :func:`attnzoo.core.attention.attention`; N query heads are a multiple of the K key heads.
        positions: for each of P = N query heads, or of P = K key heads whose query heads share them, and for each of Tq blocks
            of queries, up to M places 0 to S - 1 along the keys, in any order; -1: none. A place that stands twice in a list
            counts twice, which is the caller's error.
        block_q: queries of a block; the last may be shorter. Default ``T / Tq``.
        q_positions: int32 ``[T]`` or ``[*B, T]``: a query sees of its list places up to its own position. None: all of it.
        scale: default ``H ** -0.5``.
        backend: "blockwise" (plain JAX: block after block, memory of one block's keys, ``B·P·M·(H + Hv)``), "pallas" (a TPU
            kernel that copies the listed rows on-chip from where they lie), or "auto": the kernel where it runs.
        return_lse: also return the log-sum-exp of each row.

    Returns:
        ``out [*B, T, N, Hv]`` in the type of ``v``, or ``(out, lse [*B, T, N] float32)``. A query that sees nothing gets
        zeros, an lse of -inf, and zero gradients.

    Raises:
        ValueError: shapes that do not fit, places beyond S in ``positions`` whose values are known (in others such places
            count as none), an unknown backend, or a named backend that cannot run this.
        TypeError: arguments of the wrong kind.

    Differentiable once, in reverse mode, in q, k, v and scale. The gradients of k and v are added up in plain JAX on both
    backends, block after block, with the memory above and one float32 copy of k and v.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    lead = check_shapes(q, k, v)
    batch = int(np.prod(lead))
    q, k, v = (x.reshape(batch, *x.shape[-3:]) for x in (q, k, v))
    lists, block = _lists(positions, block_q, lead, q, k)
    rows = as_positions("q_positions", q_positions, lead, (q.shape[1],))
    by_kernel = _takes_kernel(backend, q, k, v, lists.shape[3])
    scaled = (q.astype(jnp.float32) * ((q.shape[-1] ** -0.5 if scale is None else scale) * LOG2E)).astype(q.dtype)
    x = _Blocks.of(scaled, lists.shape[1], lists.shape[2], block)
    if rows is not None:
        rows = x.row_positions(jnp.broadcast_to(rows, (batch, q.shape[1])))
    arrays = (x.q, jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), lists, rows)
    out, lse = _on_mesh(by_kernel, arrays) if by_kernel else attend(False, *arrays)
    out, lse = (x.joined(a, q.shape[1]).reshape(*lead, *q.shape[1:3], *a.shape[4:]) for a in (out, lse))
    return (out, lse) if return_lse else out


def kept_positions(hit: Bool[Array, "*L S"], most: int) -> tuple[Int[Array, "*L most"], Bool[Array, "*L"]]:
    """The places where ``hit`` is True, in order, padded with -1; and whether a list had more than ``most`` of them.

    ``hit`` is typically ``[B, N, Tq, S]``. Of a list that overflows the first ``most`` places are kept.
    """
    order = jnp.cumsum(hit, axis=-1, dtype=jnp.int32)
    lead, s = hit.shape[:-1], hit.shape[-1]
    at = jnp.where(hit, order - 1, most).reshape(-1, s)
    empty = jnp.full((len(at), most), -1, jnp.int32)
    places = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), at.shape)
    found = empty.at[jnp.arange(len(at))[:, None], at].set(places, mode="drop")
    return found.reshape(*lead, most), order[..., -1] > most


def _lists(positions: Any, block_q: int | None, lead: tuple[int, ...], q: Array, k: Array) -> tuple[Array, int]:
    """``int32 [B, P, Tq, M]`` and the queries of a block."""
    known = concrete(positions)
    x = jnp.asarray(positions)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"positions has dtype {x.dtype}; places along the keys are integers")
    (batch, t, n, _), (s, heads) = q.shape, k.shape[1:3]
    if x.ndim != len(lead) + 3 or x.shape[:-3] != lead or x.shape[-3] not in (n, heads) or 0 in x.shape[-2:]:
        raise ValueError(
            f"positions has shape {x.shape}, but with q {(*lead, *q.shape[1:])} and k {(*lead, *k.shape[1:])} it needs "
            f"{(*lead, n, 'Tq', 'M')}" + (f" or {(*lead, heads, 'Tq', 'M')}" if heads != n else "")
        )
    blocks = x.shape[-2]
    if block_q is None and t % blocks:
        raise ValueError(f"positions has lists for {blocks} blocks, which do not divide the {t} queries; give block_q")
    block = t // blocks if block_q is None else block_q
    if block < 1 or -(-t // block) != blocks:
        raise ValueError(
            f"block_q={block_q}: {t} queries (q {(*lead, *q.shape[1:])}) make {-(-t // max(block, 1))} blocks, but positions "
            f"{x.shape} has lists for {blocks}"
        )
    if known is not None and (known >= s).any():
        raise ValueError(f"positions: k {(*lead, *k.shape[1:])} has the places 0 to {s - 1} (-1: none), got {known.max()}")
    x = x.reshape(batch, *x.shape[-3:])
    return jnp.where((x >= 0) & (x < s), x, -1).astype(jnp.int32), block


def _takes_kernel(backend: str, q: Array, k: Array, v: Array, listed: int) -> bool:
    if backend not in ("auto", "blockwise", "pallas"):
        raise unknown("backend", backend, ["auto", "blockwise", "pallas"])
    reason = _refusal(q, k, v, listed)
    if backend == "pallas" and reason is not None:
        raise ValueError(f"backend 'pallas' cannot run this: {reason}; 'blockwise' can")
    return backend != "blockwise" and reason is None


def _refusal(q: Array, k: Array, v: Array, listed: int) -> str | None:
    if not tpu.there():
        return f"it needs a TPU, and the default device is a {jax.default_backend()}"
    if q.dtype.name not in tpu.DTYPES or not q.dtype == k.dtype == v.dtype:
        takes = " or ".join(tpu.DTYPES)
        return f"it takes {takes}, the same for q, k and v, not {q.dtype}, {k.dtype} and {v.dtype}"
    from pallas_kernels.tpu.gather import MOST_LISTED

    if listed > MOST_LISTED:
        return f"lists of {listed} positions are more than the {MOST_LISTED} that scalar memory holds"
    return None


class _Blocks(NamedTuple):
    """Queries by lists ``[B, P, Tq, R, H]``: R = N / P · block of them share one, those of a head one after the other."""

    q: Array
    block: int

    @staticmethod
    def of(q: Array, lists: int, blocks: int, block: int) -> _Blocks:
        batch, t, n, h = q.shape
        q = jnp.pad(q, ((0, 0), (0, blocks * block - t), (0, 0), (0, 0)))
        q = q.reshape(batch, blocks, block, lists, n // lists, h).transpose(0, 3, 1, 4, 2, 5)
        return _Blocks(q.reshape(batch, lists, blocks, -1, h), block)

    def row_positions(self, x: Array) -> Array:
        """``[B, T]`` as ``[B, Tq, R]``."""
        _, _, blocks, rows, _ = self.q.shape
        x = jnp.pad(x, ((0, 0), (0, blocks * self.block - x.shape[1]))).reshape(-1, blocks, self.block)
        return jnp.tile(x, (1, 1, rows // self.block))

    def joined(self, x: Array, queries: int) -> Array:
        """``[B, P, Tq, R, ...]`` as ``[B, T, N, ...]``."""
        batch, lists, blocks, rows = x.shape[:4]
        x = x.reshape(batch, lists, blocks, rows // self.block, self.block, *x.shape[4:])
        x = jnp.moveaxis(x, (2, 4), (1, 2))
        return x.reshape(batch, blocks * self.block, -1, *x.shape[5:])[:, :queries]


def _on_mesh(by_kernel: bool, arrays: Any) -> tuple[Array, Array]:
    """Each device of a mesh computes its own batch rows and heads; nothing is communicated."""
    q, k, *_ = arrays
    batch, lists, blocks, rows, _ = q.shape
    divided = division(Geometry(batch, lists, k.shape[1], blocks * rows, k.shape[2]))
    run = functools.partial(attend, by_kernel)
    if divided is None:
        return run(*arrays)
    mesh, axes = divided
    b, own = P(axes.batch or None), P(axes.batch or None, axes.heads or None)
    given = (own, own, own, own, None if arrays[-1] is None else b)
    return jax.shard_map(run, mesh=mesh, in_specs=given, out_specs=(own, own), check_vma=False)(*arrays)
