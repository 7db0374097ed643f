"""What the GPU kernels cannot take, said before anything is compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import choice
from pallas_kernels.gpu.launch import generation
from pallas_kernels.tpu.problem import Problem

#: Elementwise primitives that Mosaic GPU has no lowering for.
LACKING = frozenset({"ceil", "copy", "floor", "log1p", "pow"})


def refusal(p: Problem, q: Any, k: Any, v: Any, *, backward: bool = False) -> str | None:
    """Why the kernels cannot run padded ``q [B, T, N, H]``, ``k [B, S, K, H]``, ``v [B, S, K, Hv]`` (None: they can)."""
    width, value_width = q.shape[-1], v.shape[-1]
    if jnp.dtype(q.dtype) not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return f"it takes bfloat16 or float16, the same for q, k and v, not {q.dtype}, {k.dtype} and {v.dtype}"
    if width % 64 or value_width % 64:
        return f"its head widths are multiples of 64, not {width} and {value_width}; pad them with zeros"
    if p.block_q not in (takes := choice.block_queries(generation())) or p.block_k not in (64, 128):
        rows = " or ".join(map(str, takes))
        return f"its blocks are {rows} queries by 64 or 128 keys, not {p.block_q} by {p.block_k}"
    if (given := (q.shape[1], v.shape[2 if p.keys_by_head else 1])) != p.padded:
        return f"its inputs come padded to {p.padded} queries and keys, not {given}"
    if generation() == "blackwell" and (why := _on_blackwell(width, value_width, backward)) is not None:
        return why
    if not choice.slots(width, value_width, p.block_k, p.block_q):
        return f"heads {width} and {value_width} wide do not fit into shared memory with {p.block_k} keys at a time"
    if backward and not choice.backward_slots(width, value_width, p.block_k):
        return (
            f"its derivative takes heads up to 128 wide and blocks of 128 keys, not heads {width} and {value_width} wide and "
            f"blocks of {p.block_k}"
        )
    if any(layout.form == "tile" for layout in p.score_layouts):
        return "it takes no arrays with an entry per tile in a score; give a bias per query and key"
    if (found := next((name for name in _primitives(p, backward) if name in LACKING), None)) is not None:
        return f"{found!r} does not run inside a GPU kernel"
    return None


def _on_blackwell(width: int, value_width: int, backward: bool) -> str | None:
    if max(width, value_width) > 128:
        return f"on a Blackwell GPU it takes heads up to 128 wide, not {width} and {value_width}"
    if backward:
        return "on a Blackwell GPU it has no derivative; blockwise attention has one there, and these kernels on a Hopper GPU"
    return None


def _primitives(p: Problem, backward: bool) -> Iterator[str]:
    """The names of the primitives in the mask, the score, the weight map and dropout, and in derivatives."""
    cell, number = jax.ShapeDtypeStruct((64, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.int32)
    one = jax.ShapeDtypeStruct((), jnp.int32)
    cells = one, one, number, number

    def parts(layouts: Any) -> list[Any]:
        return [number if layout.boolean else cell for layout in layouts]

    traced = [
        (p.mask, (*cells, *parts(p.mask_layouts))),
        (p.score, (cell, *cells, *parts(p.score_layouts))),
        (p.phi, (cell,)),
        (p.keep, (one, one, *cells)),
    ]
    for function, inputs in traced:
        if function is not None:
            yield from _names(jax.make_jaxpr(function)(*inputs).jaxpr)
    for function, (x, *rest) in traced[1:3] if backward else []:
        if function is not None:
            moving = [n for n, part in enumerate(rest[4:]) if part is cell]
            yield from _names(jax.make_jaxpr(functools.partial(_pulled, function, moving))(x, *rest).jaxpr)


def _pulled(f: Any, moving: list[int], x: Any, *rest: Any) -> Any:
    """The gradients of ``f(x, b, h, t, s, *parts)`` in x and in the parts that move."""
    where, parts = rest[:4], list(rest[4:])

    def of(x: Any, moved: list[Any]) -> Any:
        given = list(parts)
        for n, part in zip(moving, moved, strict=True):
            given[n] = part
        return f(x, *where, *given)

    y, pull = jax.vjp(of, x, [parts[n] for n in moving])
    return pull(jnp.ones_like(y))


def _names(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        inner = [x for x in eqn.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
        if not inner:
            yield eqn.primitive.name
        for x in inner:
            yield from _names(getattr(x, "jaxpr", x))
