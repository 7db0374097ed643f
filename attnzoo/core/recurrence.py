"""Linear recurrences over tokens with a matrix as state: gated linear attention, delta rules, diagonal plus rank one.

Per head, with a state ``S [K, V]`` in float32,

    S_t = diag(e^{w_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T          o_t = S_t^T q_t

:func:`linear_recurrence` is this form; :func:`gated_linear_attention` (Mamba-2's SSD, GLA) and :func:`gated_delta_rule`
(DeltaNet, Gated DeltaNet) are named cases. RWKV-7 is a = -κ̂, b = κ̂ ⊙ a. All work in chunks: matrix products within a chunk
and a state from chunk to chunk, so time and memory are linear in T, backward too. :func:`recurrence_step` is one token.

On TPU a fused kernel runs (`pallas_kernels.tpu.scan`), elsewhere the same chunk algebra by XLA. On a mesh the kernel runs on
each device's batch rows and heads, as :func:`attnzoo.core.sharding.attention_axes` divides them, and on all of their tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from attnzoo.core.cells import Geometry
from attnzoo.core.sharding import division
from attnzoo.errors import unknown
from pallas_kernels.tpu.scan.choice import CHUNK
from pallas_kernels.tpu.scan.chunk import Form, Tokens, chunk

#: Log decays below this are taken for it: e to this is 0, and sums of it stay numbers, which those of -inf do not.
FORGOTTEN = -1e4


def linear_recurrence(
    q: Float[Array, "*B T N K"],
    k: Float[Array, "*B T N K"],
    v: Float[Array, "*B T N V"],
    log_decay: Float[Array, "*B T N"] | Float[Array, "*B T N K"] | None = None,
    *,
    a: Float[Array, "*B T N K"] | None = None,
    b: Float[Array, "*B T N K"] | None = None,
    state: Float[Array, "*B N K V"] | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B N K V"]]:
    """``S_t = diag(e^w) S_{t-1} + b (a^T S_{t-1}) + k v^T``, ``o_t = S_t^T q_t``. No scale is applied.

    Args:
        q, k, v: reads, writes and what is written; any number of leading batch axes.
        log_decay: w, at most 0: per head, or per key channel (-inf: forget all). None: nothing is forgotten.
        a: what the rank one term reads, of the state before the token. None: no such term.
        b: where the rank one term writes; None: along ``k``, which costs less.
        state: the state before the first token; None: zeros.
        chunk_size: tokens worked on at once, a power of two; default 64. "tpu" takes 16 to 128.
        backend: "auto"; "tpu", the kernel; or "xla".

    Returns:
        ``out [*B, T, N, V]`` in the type of ``v``, and the state after the last token, float32.

    Raises:
        ValueError: shapes that do not fit, a chunk size or a backend that cannot run this, a mesh without a rule of what its
            axes divide (for the kernel).

    Decays and states are float32; products take the type of ``q`` and sum in float32; the triangular solve is rounded to
    that type only once its inverse is there. Differentiable once, in reverse, in all arrays.
    """
    lead = q.shape[:-3]
    _check(q, k, v, log_decay, a, b, state)
    batch = math.prod(lead)
    q, k, v = (jnp.reshape(x, (batch, *x.shape[-3:])) for x in (q, k, v))
    a, b = (None if x is None else jnp.reshape(x, (batch, *x.shape[-3:])) for x in (a, b))
    _, length, heads, depth = q.shape
    width = v.shape[-1]
    if state is None:
        state = jnp.zeros((batch, heads, depth, width), jnp.float32)
    state = state.astype(jnp.float32).reshape(batch, heads, depth, width)
    chunk_size = CHUNK if chunk_size is None else chunk_size
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two, such as {CHUNK}, not {chunk_size}")
    fused = _fused(backend, chunk_size, q, k, v, a, b)
    form = Form(
        chunk=chunk_size,
        decay="none" if log_decay is None else "channel" if log_decay.ndim == len(lead) + 3 else "head",
        erases=a is not None,
        own_write=b is not None,
        dtype=q.dtype if fused or jax.default_backend() != "cpu" else jnp.dtype(jnp.float32),
    )
    if log_decay is not None:
        log_decay = jnp.reshape(log_decay, (batch, *log_decay.shape[len(lead) :]))
        log_decay = jnp.maximum(log_decay.astype(jnp.float32), FORGOTTEN)
    x = Tokens(q, k, v, log_decay, a, b)
    out, state = _on_mesh(form, x, state) if fused else _by_heads(_plain, form, x, state)
    return out.reshape(*lead, length, heads, width), state.reshape(*lead, heads, depth, width)


def gated_linear_attention(q: Array, k: Array, v: Array, log_decay: Array | None = None, **options: Any) -> tuple[Array, Array]:
    """``S_t = diag(e^w) S_{t-1} + k v^T``: Mamba-2's SSD with a decay per head (``v`` times its step size), GLA with one per
    channel, linear attention with none (Yang et al., 2023, arXiv 2312.06635; Dao and Gu, 2024, arXiv 2405.21060).

    options: ``state``, ``chunk_size``, ``backend``, as for :func:`linear_recurrence`, whose shapes these are.
    """
    return linear_recurrence(q, k, v, log_decay, **options)


def gated_delta_rule(
    q: Array, k: Array, v: Array, beta: Float[Array, "*B T N"], log_decay: Array | None = None, **options: Any
) -> tuple[Array, Array]:
    """``S_t = (I - β k k^T) diag(e^w) S_{t-1} + β k v^T``: what k held fades from the decayed state as v is written.

    The delta rule without decay (Yang et al., 2024, arXiv 2406.06484), Gated DeltaNet with one per head (arXiv 2412.06464),
    Kimi delta attention with one per channel. Keys should have length 1.

    options: ``state``, ``chunk_size``, ``backend``, as for :func:`linear_recurrence`, whose shapes these are.
    """
    if beta.shape != k.shape[:-1]:
        raise ValueError(f"beta {beta.shape} must have the shape of k without its last axis, {k.shape[:-1]}")
    written = (k * beta[..., None]).astype(k.dtype)
    erased = -k
    if log_decay is not None:
        w = log_decay if log_decay.ndim == k.ndim else log_decay[..., None]
        erased = (erased * jnp.exp(w.astype(jnp.float32))).astype(k.dtype)
    return linear_recurrence(q, written, v, log_decay, a=erased, **options)


def recurrence_step(
    state: Float[Array, "*B N K V"],
    q: Float[Array, "*B N K"],
    k: Float[Array, "*B N K"],
    v: Float[Array, "*B N V"],
    log_decay: Float[Array, "*B N"] | Float[Array, "*B N K"] | None = None,
    *,
    a: Float[Array, "*B N K"] | None = None,
    b: Float[Array, "*B N K"] | None = None,
) -> tuple[Float[Array, "*B N V"], Float[Array, "*B N K V"]]:
    """One token of :func:`linear_recurrence`: ``(out, state)``. The state keeps its type, the output that of ``v``."""
    q, k, values = (x.astype(state.dtype) for x in (q, k, v))
    new = state
    if log_decay is not None:
        w = log_decay if log_decay.ndim == k.ndim else log_decay[..., None]
        new = new * jnp.exp(w.astype(state.dtype))[..., None]
    new = new + k[..., None] * values[..., None, :]
    if a is not None:
        read = jnp.einsum("...k,...kv->...v", a.astype(state.dtype), state, precision="highest")
        new = new + (k if b is None else b.astype(state.dtype))[..., None] * read[..., None, :]
    return jnp.einsum("...k,...kv->...v", q, new, precision="highest").astype(v.dtype), new


def _check(q: Any, k: Any, v: Any, log_decay: Any, a: Any, b: Any, state: Any) -> None:
    if q.ndim < 3 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be [*B, T, N, K], the same, and [*B, T, N, V]")
    if log_decay is not None and log_decay.shape not in (q.shape, q.shape[:-1]):
        raise ValueError(f"log_decay {log_decay.shape} must be per head, {q.shape[:-1]}, or per channel, {q.shape}")
    for name, x in (("a", a), ("b", b)):
        if x is not None and x.shape != q.shape:
            raise ValueError(f"{name} {x.shape} must have the shape of q, {q.shape}")
    if b is not None and a is None:
        raise ValueError("b says where the rank one term writes; give a, what it reads, too")
    wanted = (*q.shape[:-3], q.shape[-2], q.shape[-1], v.shape[-1])
    if state is not None and state.shape != wanted:
        raise ValueError(f"state {state.shape} must be [*B, N, K, V] = {wanted}")


def _fused(backend: str, chunk_size: int, *arrays: Any) -> bool:
    """Whether the kernel runs this; raises for a named backend that cannot."""
    if backend not in ("auto", "tpu", "xla"):
        raise unknown("backend", backend, ["auto", "tpu", "xla"])
    if backend == "xla":
        return False
    reason = _refusal(chunk_size, *arrays)
    if reason is not None and backend == "tpu":
        raise ValueError(f"backend 'tpu' cannot run this: {reason}; 'xla' can")
    return reason is None


def _refusal(chunk_size: int, *arrays: Any) -> str | None:
    from pallas_kernels.tpu import launch

    if launch.generation() is None and not launch.simulated():
        return f"it needs a TPU, and the default device is a {jax.default_backend()}"
    if not 16 <= chunk_size <= 128:
        return f"it takes a chunk_size from 16 to 128, not {chunk_size}"
    types = {x.dtype for x in arrays if x is not None}
    if len(types) > 1 or not types <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        found = ", ".join(sorted(str(t) for t in types))
        return f"it takes float32 or bfloat16, the same for q, k, v, a and b, not {found}"
    if arrays[0].shape[1] == 0:
        return "there is no token"
    return None


def _on_mesh(form: Form, x: Tokens, state: Any) -> tuple[Any, Any]:
    """By the kernel: each device of a mesh computes its own batch rows and heads; nothing is communicated."""
    run = functools.partial(_by_heads, _kernel, form)
    batch, length, heads, _ = x.q.shape
    divided = division(Geometry(batch, heads, heads, length, length), otherwise="xla")
    if divided is None:
        return run(x, state)
    mesh, axes = divided
    b, h = axes.batch or None, axes.heads or None
    tokens, states = P(b, None, h), P(b, h)
    given = jax.tree.map(lambda _: tokens, x)
    return jax.shard_map(run, mesh=mesh, in_specs=(given, states), out_specs=(tokens, states), check_vma=False)(x, state)


def _by_heads(run: Callable[..., Any], form: Form, x: Tokens, state: Any) -> tuple[Any, Any]:
    """``run`` of tokens ``[B, T, N, ...]`` and states ``[B, N, K, V]``, which it takes as rows of a head's chunks and
    transposed; ``out [B, T, N, V]`` and states as they came."""
    batch, length, heads, width = x.v.shape
    rows = Tokens(*(None if u is None else _rows(form, u) for u in x))
    out, last = run(form, rows, state.reshape(batch * heads, *state.shape[2:]).swapaxes(1, 2))
    out = jnp.moveaxis(out[:, :length].reshape(batch, heads, length, width), 1, 2)
    return out.astype(x.v.dtype), last.swapaxes(1, 2).reshape(state.shape)


def _rows(form: Form, x: Any) -> Any:
    """``[B, T, N, ...] -> [B N, T', ...]``, padded with zeros, which neither write, read nor forget, to whole chunks."""
    x = jnp.moveaxis(x, 2, 1)
    x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % form.chunk)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], x.shape[1] // form.chunk, 1, form.chunk) if x.ndim == 2 else x


def _kernel(form: Form, x: Tokens, state: Any) -> tuple[Any, Any]:
    from pallas_kernels.tpu.scan.kernel import scan

    return scan(form, x, state)


def _plain(form: Form, x: Tokens, state: Any) -> tuple[Any, Any]:
    """What the kernel computes, by XLA: all heads at once, chunk after chunk, each recomputed on the way back."""

    rows, length, width = x.v.shape

    def by_chunks(u: Any) -> Any:
        return jnp.moveaxis(u.reshape(rows, length // form.chunk, 1 if u.ndim == 4 else form.chunk, u.shape[-1]), 1, 0)

    @jax.checkpoint
    def step(state: Any, here: Tokens) -> tuple[Any, Any]:
        out, state = jax.vmap(functools.partial(chunk, form))(state, here)
        return state, out.astype(x.v.dtype)

    state, out = lax.scan(step, state, jax.tree.map(by_chunks, x))
    return jnp.moveaxis(out, 0, 1).reshape(rows, length, width), state
