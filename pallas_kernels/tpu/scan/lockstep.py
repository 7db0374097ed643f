"""The same work on several things, an operation of each in turn.

The compiler keeps close to the order in which operations are written. Where each waits for the one before, as within a chunk,
a unit stands idle most of the time; between operations of other heads it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

#: Primitives that stand for a program of their own, and the parameter that holds it.
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


def in_lockstep(work: Callable[..., Any], given: Sequence[tuple[Any, ...]]) -> list[Any]:
    """``[work(*x) for x in given]``, where all ``x`` have the same structure, shapes and types. Has no derivative rules of
    ``work``'s own: it is for inside a kernel."""
    traced, made = jax.make_jaxpr(work, return_shape=True)(*given[0])
    # A derivative traces products that nothing needs.
    jaxpr, needed = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    inputs = [[x for x, keep in zip(jax.tree.leaves(each), needed, strict=True) if keep] for each in given]
    tree = jax.tree.structure(made)
    return [jax.tree.unflatten(tree, outs) for outs in _run(jaxpr, traced.consts, inputs)]


def _run(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Sequence[Any]]) -> list[list[Any]]:
    known = [dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *each], strict=True)) for each in inputs]

    def read(values: dict[Any, Any], v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else values[v]

    for eqn in jaxpr.eqns:
        arguments = [[read(values, v) for v in eqn.invars] for values in known]
        if (inner := eqn.params.get(_CALLS.get(eqn.primitive.name, ""))) is not None:
            results = _run(inner.jaxpr, inner.consts, arguments)
        else:
            found = [eqn.primitive.bind(*each, **eqn.params) for each in arguments]
            results = found if eqn.primitive.multiple_results else [[x] for x in found]
        for values, result in zip(known, results, strict=True):
            values.update(zip(eqn.outvars, result, strict=True))
    return [[read(values, v) for v in jaxpr.outvars] for values in known]
