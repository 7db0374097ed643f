"""The chunked recurrence as TPU kernels, forward and backward, with its derivative.

Both walk the chunks in order (the backward one from the end) for a few heads at a time, whose states stay in fast memory.
The backward kernel has each chunk's incoming state, which the forward kernel wrote, and differentiates the chunk's algebra
where it runs. The heads of a step take turns, operation by operation: within a head each waits for the one before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.interpreters import partial_eval

from pallas_kernels import operations
from pallas_kernels.tpu.launch import launch
from pallas_kernels.tpu.scan.choice import heads_at_once
from pallas_kernels.tpu.scan.chunk import Form, Tokens, chunk
from pallas_kernels.tpu.scan.lockstep import in_lockstep


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(form: Form, x: Tokens, state: Any) -> tuple[Any, Any]:
    """``(out [R, T, V], state [R, V, K])`` of R heads, T whole chunks.

    x: ``q, k, a, b [R, T, K]``, ``v [R, T, V]``, ``w [R, T, K]`` or per head ``[R, T / chunk, 1, chunk]`` float32. The
    states, before and after, are float32.
    """
    return _forward(form, x, state, keep=False)[:2]


def _scan_forward(form: Form, x: Tokens, state: Any) -> Any:
    out, last, states = _forward(form, x, state, keep=True)
    return (out, last), (x, states)


def _scan_backward(form: Form, saved: Any, d: tuple[Any, Any]) -> tuple[Tokens, Any]:
    x, states = saved
    return _backward(form, x, states, d[0].astype(x.v.dtype), d[1])


scan.defvjp(_scan_forward, _scan_backward)


class _Blocks:
    """Sizes, and how arrays are cut; ``turned``: chunks come last to first."""

    def __init__(self, form: Form, x: Tokens, turned: bool):
        self.rows, length, self.width = x.v.shape
        self.depth = x.q.shape[-1]
        self.chunks = length // form.chunk
        self.form, self.turned = form, turned
        self.heads = heads_at_once(self.rows, self.depth * self.width * x.v.dtype.itemsize, form.erases)
        self.grid = (self.rows // self.heads, self.chunks)

    def _at(self, c: Any) -> Any:
        return self.chunks - 1 - c if self.turned else c

    def tokens(self, x: Any) -> pl.BlockSpec:
        if x.ndim == 4:
            return pl.BlockSpec((self.heads, 1, 1, self.form.chunk), lambda r, c: (r, self._at(c), 0, 0))
        return pl.BlockSpec((self.heads, self.form.chunk, x.shape[-1]), lambda r, c: (r, self._at(c), 0))

    def state(self) -> pl.BlockSpec:
        """Of a step's heads: the same block at every chunk, so it stays in fast memory."""
        return pl.BlockSpec((self.heads, self.width, self.depth), lambda r, c: (r, 0, 0))

    def states(self) -> pl.BlockSpec:
        return pl.BlockSpec((self.heads, 1, self.width, self.depth), lambda r, c: (r, self._at(c), 0, 0))


def _cost(p: _Blocks, x: Tokens, work: Callable[..., Any], moved: Sequence[Any], *rest: Any) -> pl.CostEstimate:
    """Of one kernel's call. work: of one head's chunk, called with its state, tokens and `rest`; moved: each array once."""

    def of_a_chunk(u: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((u.shape[-2] if u.ndim == 4 else p.form.chunk, u.shape[-1]), u.dtype)

    state = jax.ShapeDtypeStruct((p.width, p.depth), jnp.float32)
    traced = jax.make_jaxpr(work)(state, jax.tree.map(of_a_chunk, x), *rest).jaxpr
    # A derivative traces products that nothing needs, and no compiler keeps them.
    jaxpr, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    eqns: Any = jaxpr.eqns  # shapes are not attributes of every abstract value
    exponentials = sum(math.prod(e.outvars[0].aval.shape) for e in eqns if e.primitive.name == "exp")
    times = p.rows * p.chunks
    return pl.CostEstimate(
        flops=times * operations.flops(jaxpr),
        transcendentals=times * exponentials,
        bytes_accessed=sum(math.prod(u.shape) * u.dtype.itemsize for u in moved),
    )


def _given(x: Tokens) -> tuple[list[str], list[Any]]:
    """The fields that are there, by name."""
    names = [name for name, value in x._asdict().items() if value is not None]
    return names, [getattr(x, name) for name in names]


def _tokens_of(form: Form, names: list[str], refs: Any, head: int) -> Tokens:
    """One head's chunk."""
    return Tokens(**{
        name: ref[head, 0] if name == "w" and form.decay == "head" else ref[head] for name, ref in zip(names, refs, strict=True)
    })  # fmt: skip


def _forward(form: Form, x: Tokens, state: Any, keep: bool) -> Any:
    p = _Blocks(form, x, turned=False)
    names, arrays = _given(x)
    kept = [jax.ShapeDtypeStruct((p.rows, p.chunks, p.width, p.depth), jnp.float32)] if keep else []
    made = [jax.ShapeDtypeStruct(x.v.shape, x.v.dtype), jax.ShapeDtypeStruct(state.shape, jnp.float32), *kept]
    return launch(
        functools.partial(_forward_kernel, form, names),
        name="attnzoo_scan",
        scalars=(),
        grid=p.grid,
        in_specs=[*(p.tokens(u) for u in arrays), p.state()],
        inputs=[*arrays, state],
        out_specs=[p.tokens(x.v), p.state(), *(p.states() for _ in kept)],
        out_shape=made,
        scratch=[],
        parallel=1,
        cost=_cost(p, x, functools.partial(chunk, form), [*arrays, state, *made]),
    )


def _forward_kernel(form: Form, names: list[str], *refs: Any) -> None:
    tokens, (start, out, state, *states) = refs[: len(names)], refs[len(names) :]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        state[...] = start[...]

    heads = range(out.shape[0])
    for ref in states:
        for head in heads:
            ref[head, 0] = state[head]
    given = [(state[head], _tokens_of(form, names, tokens, head)) for head in heads]
    for head, (o, last) in zip(heads, in_lockstep(functools.partial(chunk, form), given), strict=True):
        out[head], state[head] = o.astype(out.dtype), last


def _backward(form: Form, x: Tokens, states: Any, d_out: Any, d_last: Any) -> tuple[Tokens, Any]:
    p = _Blocks(form, x, turned=True)
    names, arrays = _given(x)
    made = [*(jax.ShapeDtypeStruct(u.shape, u.dtype) for u in arrays), jax.ShapeDtypeStruct(d_last.shape, jnp.float32)]
    d_here = tuple(jax.ShapeDtypeStruct(side, jnp.float32) for side in ((form.chunk, p.width), (p.width, p.depth)))
    *grads, d_state = launch(
        functools.partial(_backward_kernel, form, names),
        name="attnzoo_scan_backward",
        scalars=(),
        grid=p.grid,
        in_specs=[*(p.tokens(u) for u in arrays), p.states(), p.tokens(d_out), p.state()],
        inputs=[*arrays, states, d_out, d_last],
        out_specs=[*(p.tokens(u) for u in arrays), p.state()],
        out_shape=made,
        scratch=[],
        parallel=1,
        cost=_cost(p, x, functools.partial(_pull, form), [*arrays, states, d_out, d_last, *made], d_here),
    )
    return Tokens(**dict(zip(names, grads, strict=True))), d_state


def _backward_kernel(form: Form, names: list[str], *refs: Any) -> None:
    count = len(names)
    tokens, (states, d_out, d_last), grads, d_state = refs[:count], refs[count : count + 3], refs[count + 3 : -1], refs[-1]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        d_state[...] = d_last[...]

    heads = range(d_out.shape[0])
    given = [
        (states[head, 0], _tokens_of(form, names, tokens, head), (d_out[head].astype(jnp.float32), d_state[head]))
        for head in heads
    ]
    for head, (before, d) in zip(heads, in_lockstep(functools.partial(_pull, form), given), strict=True):
        d_state[head] = before
        for name, ref in zip(names, grads, strict=True):
            here = ref.at[head, 0] if name == "w" and form.decay == "head" else ref.at[head]
            here[...] = getattr(d, name).astype(ref.dtype)


def _pull(form: Form, state: Any, x: Tokens, d: tuple[Any, Any]) -> tuple[Any, Tokens]:
    """The gradients of a chunk's state and tokens from those of what it makes."""
    return jax.vjp(functools.partial(chunk, form), state, x)[1](d)
