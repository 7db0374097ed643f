"""Operations of a traced function, from its jaxpr: before any compiler, and for all devices together."""

import math
from typing import Any

import jax
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from train.sharding import on_mesh
from train.trainer import Trainer


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
            divided = math.prod(out[0]) // math.prod(inner.outvars[0].aval.shape)
            total += _flops(inner, parts * divided)
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(_flops(inner, parts) for inner in _inner(params))
    return total


def _inner(params: dict[str, Any]) -> list[Jaxpr]:
    found = (x for value in params.values() for x in (value if isinstance(value, tuple | list) else (value,)))
    return [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in found if isinstance(x, ClosedJaxpr | Jaxpr)]


def forward_flops(trainer: Trainer, batch: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Of the loss alone, over the global batch."""

    def loss(params: nnx.State, rest: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        return trainer.task.loss(nnx.merge(trainer.graphdef, params, rest, copy=True), batch)

    with on_mesh(trainer.mesh, trainer.exchange):
        return flops(jax.make_jaxpr(loss)(trainer.abstract.params, trainer.abstract.rest, batch))
