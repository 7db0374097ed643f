"""Operations of a traced function, from its jaxpr: before any compiler, and for all devices together."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def flops(traced: Any) -> int:
    """Of matrix products, convolutions and kernels in a (closed) jaxpr; loops count as often as they run, of branches the
    dearest, and a while loop whose length only the run decides once. Arithmetic per element is not counted."""
    return _flops(traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced, 1)


def _flops(jaxpr: Jaxpr, parts: int) -> int:
    """parts: devices that each do what the jaxpr says."""
    total = 0
    eqn: Any  # shapes are not attributes of every abstract value
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        of, out = ([getattr(v.aval, "shape", ()) for v in side] for side in (eqn.invars, eqn.outvars))
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += parts * 2 * math.prod(out[0]) * math.prod(of[0][n] for n in contracted)
        elif name == "conv_general_dilated":
            features = of[1][params["dimension_numbers"].rhs_spec[0]]
            total += parts * 2 * math.prod(out[0]) * math.prod(of[1]) // features
        elif name == "pallas_call":
            cost = params["cost_estimate"]
            total += parts * (0 if cost is None else cost.flops)
        elif name == "cond":
            total += max(_flops(branch.jaxpr, parts) for branch in params["branches"])
        elif name == "shard_map":
            inner = params["jaxpr"]
            # Some results may be whole on every device: the one that is divided most tells.
            here = [getattr(v.aval, "shape", ()) for v in inner.outvars]
            divided = max(math.prod(whole) // max(math.prod(part), 1) for whole, part in zip(out, here, strict=True))
            total += _flops(inner, parts * divided)
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(_flops(inner, parts) for inner in _inner(params))
    return total


_SILENT = frozenset({
    "triangular_solve", "tridiagonal_solve", "tridiagonal", "cholesky", "cholesky_update", "lu", "qr", "geqrf", "ormqr",
    "householder_product", "eigh", "eig", "svd", "schur", "hessenberg", "fft", "ragged_dot_general", "ffi_call",
})  # fmt: skip
"""Primitives of more than arithmetic per element whose operations `flops` does not know."""


def uncounted(traced: Any) -> tuple[str, ...]:
    """What `flops` leaves out of a (closed) jaxpr, in words, each once: then its count is too low.

    Kernels that do not say what they cost, decompositions and the like, and products in a loop whose length only the run
    decides.
    """
    return tuple(dict.fromkeys(_uncounted(traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced)))


def _uncounted(jaxpr: Jaxpr) -> Iterator[str]:
    eqn: Any
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "pallas_call":
            if params["cost_estimate"] is None:
                yield f"the kernel {params['name'] or 'without a name'}"
            continue
        if name in _SILENT:
            yield name
        inner = _inner(params)
        if name == "while" and any(_flops(part, 1) for part in inner):
            yield "products in a loop whose length only the run decides"
        for part in inner:
            yield from _uncounted(part)


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    found = (x for value in params.values() for x in (value if isinstance(value, tuple | list) else (value,)))
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in found if isinstance(x, ClosedJaxpr | Jaxpr)]
