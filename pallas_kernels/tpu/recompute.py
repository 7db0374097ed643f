"""What both backward kernels do to a piece of a tile first: its weights again, and the way back through them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.flash import hide, pointwise
from pallas_kernels.tpu.problem import Piece, Problem, read_operand


def weights_again(p: Problem, s: Any, at: Piece, norm: Any, b: Any, h: Any, masked: bool, refs: Any) -> Any:
    """Weights of a piece, and what turns the gradient of weights into those of raw logits and score operands.

    ``refs`` = (score_refs, mask_refs). Returns (weight, pull) with ``pull(dw, delta) -> (ds, [d part])``.
    """
    score_refs, mask_refs = refs
    parts = [read_operand(p, ref, layout, at) for ref, layout in zip(score_refs, p.score_layouts, strict=True)]
    moving = [x for x, d in zip(parts, p.differentiable, strict=True) if d]
    back = None
    if p.score is not None:

        def scored(s: Any, moving: list[Any]) -> Any:
            given = iter(moving)
            chosen = [next(given) if d else x for x, d in zip(parts, p.differentiable, strict=True)]
            return jnp.broadcast_to(p.score(s, b, h, *at.cells(), *chosen), at.shape)  # type: ignore[misc]

        s, back = jax.vjp(scored, s, moving)
    s = hide(p, s, at, b, h, mask_refs) if masked else s
    back_phi = None
    if p.phi is None:
        weight = (jnp.exp2 if p.base2 else jnp.exp)(s - norm)
    else:
        weight, back_phi = jax.vjp(functools.partial(pointwise, p), s)

    def pull(dw: Any, delta: Any) -> tuple[Any, list[Any]]:
        d = weight * (dw - delta) if back_phi is None else back_phi(dw)[0]
        return (d, []) if back is None else back(d)

    return weight, pull
