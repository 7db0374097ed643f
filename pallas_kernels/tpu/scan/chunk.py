"""The algebra of one chunk of the recurrence that all forms share.

Per head, with a state S [K, V], decays w in log space (one per head and token, or per key channel) and erasure optional:

    S_t = diag(e^{w_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          o_t = S_t^T q_t

    no a, b                        gated linear attention, Mamba-2's SSD
    a, and b = k                   the delta rule: a = -e^w κ, k = βκ; gated if w is not zero
    a, b                           RWKV-7 and other diagonal plus rank one transitions

Within a chunk every read sees the state before its own token: q reads with q̃ = e^w q, and what its own token writes is the
diagonal of a matrix. With D(j, i) = Σ_{j<m<i} w_m, the decay between a write at j and a read at i,

    A[i, j] = Σ_d r_i c_j e^{D(j, i)}   (j < i)          r of q̃ and a, c of k and b: four blocks of one matrix
    z = a-rows: the rank one reads, z = A_ab z + A_ak v + (a e^{D(-1, ·)}) S_0           a unit lower triangular solve
    o = A_q [v; z] + (q̃ e^{D(-1, ·)}) S_0
    S = e^{D(-1, C)} S_0 + Σ_j c_j e^{D(j, C)} [v; z]_j

All decays are sums over an interval, products of zeros and ones with w: never a quotient of exponentials, and no difference
of running sums either, so that a decay of 0 (a reset) forgets exactly. A decay per channel does not factor into a product
of matrices without overflow, except across a boundary between j and i. So A is put together by the highest bit in which i
and j differ: the cells of one bit share their boundaries, and both factors have exponents that are sums of w.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu.scan.products import differ_first_at, product, solve, sums


class Form(NamedTuple):
    """Static facts of a recurrence.

    chunk: tokens worked on at once, a power of two. decay: "none", one per "head" or per "channel". erases: whether there
    is an ``a``; own_write: whether the rank one term writes along a ``b`` of its own, not along ``k``. dtype: of products.
    """

    chunk: int
    decay: Literal["none", "head", "channel"]
    erases: bool
    own_write: bool
    dtype: Any

    @property
    def levels(self) -> int:
        return self.chunk.bit_length() - 1


class Tokens(NamedTuple):
    """What the tokens of one head bring: ``q, k, a, b [C, K]``, ``v [C, V]``, ``w [C, K]``, or ``[1, C]`` per head."""

    q: Any
    k: Any
    v: Any
    w: Any = None
    a: Any = None
    b: Any = None


class Decays(NamedTuple):
    """Exponents of a chunk: of each token's own decay, from its start, to its end, over all of it, and what is between."""

    own: Any
    before: Any
    after: Any
    whole: Any
    between: Any


def _numbers(form: Form, copies_down: int = 1, copies_across: int = 1) -> tuple[Any, Any]:
    """Token numbers down and across, each side repeated."""
    shape = (copies_down * form.chunk, copies_across * form.chunk)
    i, j = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return i & (form.chunk - 1), j & (form.chunk - 1)


def decays(form: Form, w: Any) -> Decays:
    """``between`` is ``D [C, C]`` for a decay per head; per channel, for each level the exponents that reach from a token
    to the boundary in the middle of its block, ``[C, K]``."""
    i, m = _numbers(form)
    if form.decay == "head":
        held = [jnp.where(m == i, w, 0.0), jnp.where(m < i, w, 0.0), jnp.where(m > i, w, 0.0)]
        own, before, after = (x.sum(1, keepdims=True) for x in held)
        between = sums((m < i).astype(jnp.float32), jnp.where(i > m, own, 0.0), form.dtype)
        return Decays(own, before, after, w.sum(1, keepdims=True), between)
    chosen = [m < i, m > i]
    for level in range(form.levels):
        upper, mine = (i >> level) & 1 == 1, i >> level == m >> level
        chosen.append(mine & ((upper & (m < i)) | (~upper & (m > i))))
    reach = sums(jnp.concatenate([x.astype(jnp.float32) for x in chosen]), w, form.dtype)
    before, after, *between = jnp.split(reach, len(chosen))
    return Decays(w, before, after, w.sum(0, keepdims=True), between)


def _reads_of_writes(form: Form, d: Decays | None, rows: Any, columns: Any) -> Any:
    """The matrix A of stacked ``rows`` and ``columns``."""
    copies = len(rows) // form.chunk, len(columns) // form.chunk
    i, j = _numbers(form, *copies)
    if form.decay == "channel":
        out = jnp.zeros(i.shape, jnp.float32)
        for level, exponent in enumerate(d.between):  # type: ignore[union-attr]
            e = jnp.exp(exponent)
            here = product(rows * _stacked(e, copies[0]), columns * _stacked(e, copies[1]), (1, 1), form.dtype)
            out = jnp.where(differ_first_at(level, i, j), here, out)
        return out
    out = product(rows, columns, (1, 1), form.dtype)
    if form.decay == "head":
        e = jnp.exp(d.between)  # type: ignore[union-attr]
        out = out * jnp.concatenate([_stacked(e, copies[0])] * copies[1], axis=1)
    return jnp.where(i > j, out, 0.0)


def _stacked(x: Any, copies: int) -> Any:
    return jnp.concatenate([x] * copies) if copies > 1 else x


def chunk(form: Form, state: Any, x: Tokens) -> tuple[Any, Any]:
    """``(out [C, V] float32, state)`` after a chunk; the state ``[V, K]`` float32 lies transposed, decays along its rows."""
    q, k, v = (u.astype(jnp.float32) for u in x[:3])
    d = None if form.decay == "none" else decays(form, x.w)
    own, before, after, whole = (1.0, 1.0, 1.0, 1.0) if d is None else (jnp.exp(u) for u in d[:4])
    rows, columns = q * own, k
    if form.erases:
        rows = jnp.concatenate([rows, x.a.astype(jnp.float32)])
        before = before if d is None else _stacked(before, 2)
    if form.own_write:
        columns = jnp.concatenate([k, x.b.astype(jnp.float32)])
        after = after if d is None else _stacked(after, 2)
    reads = _reads_of_writes(form, d, rows, columns)
    of_state = product(rows * before, state, (1, 1), form.dtype)
    i, j = _numbers(form)
    if not form.erases:
        written = v
    else:
        reads, erasing = jnp.split(reads, 2)
        of_state, erased = jnp.split(of_state, 2)
        if form.own_write:
            of_k, of_b = jnp.split(erasing, 2, axis=1)
            z = solve(of_b, erased + product(of_k, v, (1, 0), form.dtype), form.levels, form.dtype)
            written = jnp.concatenate([v, z])
        else:
            written = solve(erasing, erased + v, form.levels, form.dtype)
    mine = (q * k).sum(1, keepdims=True)
    if form.own_write:
        mine = jnp.where(j == i, mine, 0.0), jnp.where(j == i, (q * x.b.astype(jnp.float32)).sum(1, keepdims=True), 0.0)
        reads = reads + jnp.concatenate(mine, axis=1)
    else:
        reads = jnp.where(j == i, mine, reads)
    out = of_state + product(reads, written, (1, 0), form.dtype)
    return out, state * whole + product(written, columns * after, (0, 0), form.dtype)
