"""Scalar functions of a user, traced once, their captured arrays made explicit, evaluated on whole rectangles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import AbstractMesh

from attnzoo.core.cells import Operand


def bind_function(
    f: Callable[..., Any], scalars: Sequence[jax.ShapeDtypeStruct], what: str, dtype: Any
) -> tuple[tuple[Operand, ...], Callable[[Sequence[Any], Sequence[Any]], jax.Array]]:
    """``f`` of scalars as (captured arrays, ``apply(rectangles, captured)``).

    ``apply`` broadcasts the rectangles it is given and maps ``f`` over their cells; axes that the result does not depend on
    stay of size 1, so a mask that ignores batch and head is computed once for all of them.

    Raises TypeError when ``f`` cannot be traced, or does not return one scalar.
    """
    try:
        # The mesh of the moment would be written into every equation, and be wrong inside a shard_map.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            closed, out = jax.make_jaxpr(f, return_shape=True)(*scalars)
    except Exception as e:
        raise TypeError(f"the {what} could not be traced with scalar arguments: {type(e).__name__}: {e}") from e
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape != ():
        got = [tuple(x.shape) for x in leaves]
        raise TypeError(f"the {what} must return one scalar, got {len(leaves)} values of shapes {got}")
    used = _used_inputs(closed.jaxpr)
    operands = tuple(Operand(jnp.asarray(x), "whole") for x in closed.consts)
    jaxpr, count = closed.jaxpr, len(closed.consts)

    def apply(rectangles: Sequence[Any], captured: Sequence[Any]) -> jax.Array:
        def cell(*flat: Any) -> Any:
            return jaxpr_as_fun(ClosedJaxpr(jaxpr, list(flat[:count])))(*flat[count:])[0].astype(dtype)

        shape = np.broadcast_shapes(*(jnp.shape(x) for x, use in zip(rectangles, used, strict=True) if use))
        args = [jnp.broadcast_to(x, shape) if use else jnp.zeros((), s.dtype)
                for x, use, s in zip(rectangles, used, scalars, strict=True)]  # fmt: skip
        mapped: Callable[..., Any] = cell
        for _ in shape:
            mapped = jax.vmap(mapped, in_axes=(*(None,) * count, *(0 if use else None for use in used)))
        out = mapped(*captured, *args)
        return out.reshape((1,) * (4 - out.ndim) + out.shape)

    return operands, apply


def _used_inputs(jaxpr: Any) -> list[bool]:
    """Which inputs the outputs (and effects, such as a debug callback) depend on, by one walk backwards."""
    needed = {id(v) for v in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(id(v) in needed for v in eqn.outvars):
            needed.update(id(v) for v in eqn.invars)
    return [id(v) in needed for v in jaxpr.invars]
