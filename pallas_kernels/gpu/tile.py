"""The arithmetic of a tile: plain functions of arrays that the kernels call inside, and that tests call outside.

Every array has as many axes as it is written with here; two-dimensional ones are ``[rows, columns]`` of the logits. Only
operations that a warpgroup can do on its registers are used: elementwise ones, sums and maxima along columns, and
broadcasts along columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal

from pallas_kernels.tpu.problem import HIDDEN, HIDDEN_BELOW, LOG2E, Problem


class Running(NamedTuple):
    """Of some rows, over the tiles so far: the sum of weighted values ``[rows, Hv]``, the largest logit and the sum of
    weights relative to it ``[rows]``, all float32."""

    acc: Any
    top: Any
    total: Any


def across(x: Any, shape: tuple[int, int]) -> Any:
    """``[rows]`` as ``[rows, columns]``."""
    return lax.broadcast_in_dim(x, shape, (0,))


def down(x: Any, shape: tuple[int, int]) -> Any:
    """``[columns]`` as ``[rows, columns]``."""
    return lax.broadcast_in_dim(x, shape, (1,))


def scored(p: Problem, s: Any, b: Any, h: Any, t: Any, k: Any, parts: list[Any]) -> Any:
    """Logits with the score applied; t and k are query and key numbers ``[rows, columns]``."""
    return s if p.score is None else jnp.broadcast_to(p.score(s, b, h, t, k, *parts), s.shape)


def hidden(p: Problem, s: Any, b: Any, h: Any, t: Any, k: Any, parts: list[Any], end: Any) -> Any:
    """Logits with HIDDEN at cells that may not be seen; end: the number of the first key that is padding."""
    ok = k < end if p.padded[1] != p.keys else None
    if p.mask is not None:
        seen = jnp.broadcast_to(p.mask(b, h, t, k, *parts), s.shape)
        ok = seen if ok is None else ok & seen
    return s if ok is None else jnp.where(ok, s, jnp.full_like(s, HIDDEN))


def power(p: Problem, x: Any) -> Any:
    """Of e, or of two where logits come scaled for that."""
    return (jnp.exp2 if p.base2 else jnp.exp)(x)


def weigh(p: Problem, s: Any, top: Any, total: Any) -> tuple[Any, Any, Any, Any]:
    """Weights of a tile, the factor ``[rows]`` that the sums so far shrink by, and the new top and total.

    A row that has seen nothing yet counts its hidden cells with weight 1: its first visible cell shrinks them to 0, and
    :func:`finish` drops them otherwise.
    """
    now = jnp.maximum(top, s.max(axis=1))
    shrink = power(p, top - now)
    weight = power(p, s - across(now, s.shape))
    return weight, shrink, now, total * shrink + weight.sum(axis=1)


def pointwise(p: Problem, s: Any) -> Any:
    """Weights of a tile under a map that looks at one logit at a time."""
    assert p.phi is not None
    return jnp.where(s > HIDDEN_BELOW, p.phi(s), jnp.zeros_like(s))


def finish(p: Problem, r: Running) -> tuple[Any, Any]:
    """The result ``[rows, Hv]`` and the log-sum-exp ``[rows]`` (natural; zeros for pointwise maps), float32. Rows that saw
    nothing: 0 and -inf."""
    if p.phi is not None:
        return r.acc, jnp.zeros_like(r.top)
    seen = r.top > HIDDEN_BELOW
    safe = jnp.where(seen, r.total, jnp.ones_like(r.total))
    scale = jnp.where(seen, 1.0 / safe, jnp.zeros_like(safe))
    log = (r.top * (1 / LOG2E) if p.base2 else r.top) + jnp.log(safe)
    return r.acc * across(scale, r.acc.shape), jnp.where(seen, log, jnp.full_like(log, -jnp.inf))


def weights_again(
    p: Problem, s: Any, norm: Any, cells: tuple[Any, Any, Any, Any], parts: list[Any], mask_parts: list[Any] | None, end: Any
) -> tuple[Any, Callable[[Any], tuple[Any, list[Any]]]]:
    """Weights from logits ``s`` and each cell's log-sum-exp (None: taken off already), and what turns gradients of
    weights into those of logits and parts.

    All values are tiles, whichever way they lie. parts: of the score; mask_parts: None where nothing is hidden. Returns
    (weight, pull) with ``pull(dw) -> (ds, [d part, or None if it has no gradient])``; for softmax dw comes less delta.
    """
    moves = p.differentiable
    back = None
    if p.score is not None:

        def scored_again(s: Any, moving: list[Any]) -> Any:
            given = iter(moving)
            return scored(p, s, *cells, [next(given) if m else x for x, m in zip(parts, moves, strict=True)])

        s, back = jax.vjp(scored_again, s, [x for x, m in zip(parts, moves, strict=True) if m])
    s = s if mask_parts is None else hidden(p, s, *cells, mask_parts, end)
    back_phi = None
    if p.phi is None:
        weight = power(p, s if norm is None else s - norm)
    else:
        phi = p.phi
        seen, zero = s > HIDDEN_BELOW, jnp.zeros_like(s)
        weight, back_phi = jax.vjp(lambda s: jnp.where(seen, phi(jnp.where(seen, s, zero)), zero), s)

    def pull(dw: Any) -> tuple[Any, list[Any]]:
        d = weight * dw if back_phi is None else _added(lambda dw: back_phi(dw)[0], dw)
        if back is None:
            return d, []
        ds, moving = _added(back, d)
        given = iter(moving)
        return ds, [next(given) if m else None for m in moves]

    return weight, pull


def _added(f: Callable[[Any], Any], x: Any) -> Any:
    """``f(x)``, with plain additions where derivatives add cotangents by a primitive of their own, which Mosaic GPU lacks."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(x)

    def run(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
        for eqn in jaxpr.eqns:
            given = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
            inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
            if inner is not None:
                outs = run(inner.jaxpr, inner.consts, given)
            elif eqn.primitive.name == "add_any":
                outs = [given[0] + given[1]]
            else:
                out = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
                outs = out if eqn.primitive.multiple_results else [out]
            values.update(zip(eqn.outvars, outs, strict=True))
        return [v.val if isinstance(v, Literal) else values[v] for v in jaxpr.outvars]

    return jax.tree.unflatten(jax.tree.structure(shape), run(closed.jaxpr, closed.consts, [x]))
