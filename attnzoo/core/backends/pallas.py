"""Fused attention on TPUs and on Hopper and Blackwell GPUs by the kernels of `pallas_kernels`: any elementwise mask and score,
empty tiles never visited. What differs by platform is in `attnzoo.core.backends.fused`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from attnzoo.core.backends.fused import gpu, tpu
from attnzoo.core.backends.fused.problem import hide_padding, operands
from attnzoo.core.backends.packed import (
    packed_array,
    packed_bound,
    packed_geometry,
    packed_queries,
    packed_state,
    packs,
    unpacked,
)
from attnzoo.core.backends.part import Part, PartGradients
from attnzoo.core.backends.result import Result
from attnzoo.core.backends.split import joined, runs, split
from attnzoo.core.blocks import PARTIAL, BlockMap, block_map
from attnzoo.core.cells import Bound, Geometry, Operand
from attnzoo.core.dropout import Dropout
from attnzoo.core.hoist import NotElementwise, hoist, outside
from attnzoo.core.quantized import KeyScale, by_token
from attnzoo.core.request import Request
from attnzoo.core.sharding import Axes, context_division, division, operand_spec
from attnzoo.core.weights import Normalised, Pointwise, Thresholded


def refusal(r: Request, rectangle: tuple[int, int] | None = None) -> str | None:
    """Why this backend cannot run the request (None: it can), or a rectangle of so many queries and keys at a time."""
    r, kernels = _folded(r), _kernels()
    if kernels is None:
        return f"it needs a TPU or a Hopper or Blackwell GPU, and the default device is a {_device()}"
    if r.return_weights:
        return "it never holds the weights that return_weights asks for"
    if not isinstance(r.weights, Normalised | Pointwise):
        return f"{r.weights} needs whole rows of logits at once"
    if r.return_lse and not isinstance(r.weights, Normalised):
        return f"{r.weights} has no log-sum-exp to return"
    wide = [x for x, scale in zip((r.k, r.v), r.scales, strict=True) if scale is None]
    if r.q.dtype.name not in kernels.DTYPES or any(x.dtype != r.q.dtype for x in wide):
        takes = " or ".join(kernels.DTYPES)
        return f"it takes {takes}, the same for q, k and v, not {r.q.dtype}, {r.k.dtype} and {r.v.dtype}"
    if isinstance(r.weights, Pointwise) and (found := outside(r.weights.phi)) is not None:
        return f"{r.weights} uses {found!r}, which does not run inside a kernel"
    try:
        plan = _plan(r)
    except (ValueError, NotElementwise) as e:
        return str(e)
    return kernels.refusal(_outline(r, plan), r.geometry if plan.packed else None, rectangle)


def _outline(r: Request, plan: _Plan) -> Part:
    """The whole call, without the contents of its queries."""
    abstract: Any = jax.eval_shape(lambda q: packed_queries(q, r.geometry) if plan.packed else q, r.q)
    return _part(r, plan, _Arrays(abstract, r.k, r.v, (), (), plan.state), plan.mask, plan.score)


def taken_unasked() -> bool:
    """Whether "auto" takes this backend for what it can run."""
    kernels = _kernels()
    return kernels is None or kernels.taken_unasked()


def reads_pages(r: Request) -> bool:
    """Whether the kernels read the pages of this request where they lie."""
    if r.pages is None or (kernels := _kernels()) is None:
        return False
    return (
        r.k.shape[1] % 128 == 0
        and division(r.geometry) is None
        and context_division(r.geometry) is None
        and kernels.holds_pages(r.pages.size)
    )


def reads_narrow(r: Request) -> bool:
    """Whether the kernels read the 8-bit keys and values of this request."""
    if not r.narrow or isinstance(r.weights, Thresholded) or (kernels := _kernels()) is None:
        return False
    return kernels.READS_NARROW and division(r.geometry) is None and context_division(r.geometry) is None


def _folded(r: Request) -> Request:
    """The request with the scale of quantized keys in its queries (a number per feature) or its score (per token)."""
    scale = r.scales[0]
    if scale is None:
        return r
    if by_token(scale):
        return dataclasses.replace(r, score=KeyScale(scale) if r.score is None else KeyScale(scale) >> r.score)
    q = r.q.astype(jnp.float32) * jnp.repeat(scale, r.geometry.heads // scale.shape[2], axis=2)
    return dataclasses.replace(r, q=q.astype(r.q.dtype))


def _kernels() -> ModuleType | None:
    """Of the platform that is here, described or simulated."""
    return next((module for module in (tpu, gpu) if module.there()), None)


def _device() -> str:
    device = jax.devices()[0]
    return device.device_kind if device.platform == "gpu" else jax.default_backend()


class _Plan(NamedTuple):
    block_q: int
    block_k: int
    state: Any
    mask: Bound | None
    score: Bound | None
    packed: bool


def map_of(r: Request) -> BlockMap:
    """The block map this backend walks."""
    return block_map(r.mask, r.geometry, *block_sizes(r, r.geometry.queries, r.geometry.keys))


def block_sizes(r: Request, queries: int, keys: int) -> tuple[int, int]:
    """Of the tiles in which a rectangle of the logits is computed."""
    kernels = _kernels()
    assert kernels is not None
    block_q, block_k = kernels.block_sizes(r.block_sizes, queries, keys)
    if r.pages is not None:  # a tile lies within one page
        block_k = math.gcd(block_k, r.k.shape[1])
    for op in operands(r.bound_mask()):
        if op.block is not None:  # a tile lies within one block
            block_q, block_k = math.gcd(block_q, op.block[0]), math.gcd(block_k, op.block[1])
    if block_q % 128 or block_k % 128:
        raise NotElementwise(
            f"the mask {r.mask} has blocks that tiles of a multiple of 128 queries and keys do not fit; choose multiples of 128"
        )
    return block_q, block_k


def _plan(r: Request) -> _Plan:
    g, kernels = r.geometry, _kernels()
    assert kernels is not None
    block_q, block_k = block_sizes(r, g.queries, g.keys)
    state = hide_padding(block_map(r.mask, g, block_q, block_k).state, g.keys, block_k)
    packed = packs(g)
    state = packed_state(state, g) if packed else state
    # The mask itself is asked in partial tiles alone.
    asks = not isinstance(state, np.ndarray) or bool((state == PARTIAL).any())
    mask, score = (_mask(r) if asks else None), _score(r)
    if packed:
        mask = None if mask is None else packed_bound(mask, g)
        score = None if score is None else packed_bound(score, g, score=True)
        block_q = kernels.packed_rows(packed_geometry(g).queries)
    return _Plan(block_q, block_k, state, mask, score, packed)


def _mask(r: Request) -> Bound | None:
    if r.mask is None and r.geometry.kv_positions is None:
        return None
    return hoist(_with_slots(r.bound_mask(), r.geometry), r.geometry, f"mask {r.mask}")


def _score(r: Request) -> Bound | None:
    bound = r.bound_score()
    return None if bound is None else hoist(bound, r.geometry, "score", score=True)


def _with_slots(mask: Bound | None, g: Geometry) -> Bound:
    """The mask, and that a key slot holds a token where keys carry positions."""
    mask = mask or Bound((), lambda c: True)
    if g.kv_positions is None:
        return mask
    return mask._replace(apply=lambda c, *parts: jnp.asarray(mask.apply(c, *parts)) & (c.k >= 0))


def whole(r: Request, bm: BlockMap) -> Part:
    """The request as one part, its mask and score elementwise. Other parts have some of its queries, keys and operands."""
    score = _score(r)
    return Part(_scaled(r, score), r.k, r.v, r.geometry, _mask(r), score, r.weights, r.dropout, bm)


def _scaled(r: Request, score: Bound | None) -> Any:
    from pallas_kernels.tpu.problem import LOG2E

    base2 = score is None and isinstance(r.weights, Normalised)
    return (r.q.astype(jnp.float32) * r.scale * (LOG2E if base2 else 1.0)).astype(r.q.dtype)


class _Arrays(NamedTuple):
    """What a device needs of a call; ``state`` is None where it is the same for all and known. origin: batch row, head, query
    and key at which the device's part begins. value_scale ``[B, S, K]``: of 8-bit values, a number per token. numbers
    ``[B|1, N|1, T|1, 1]``: of weights whose thresholds are to be found."""

    q: Any
    k: Any
    v: Any
    mask: tuple[Any, ...]
    score: tuple[Any, ...]
    state: Any
    seed: Any = None
    origin: Any = None
    value_scale: Any = None
    numbers: tuple[Any, ...] = ()


def run(r: Request) -> Result:
    r = _folded(r)
    plan, scale = _plan(r), r.scales[1]
    each = scale if scale is not None and by_token(scale) else None
    arrays = _arrays(r, plan)._replace(value_scale=None if each is None else jnp.broadcast_to(each[..., 0], r.v.shape[:3]))
    out, lse = _everywhere(r, plan, arrays, _local)
    if plan.packed:
        out, lse = unpacked(out, r.geometry), unpacked(lse, r.geometry)
    final = None
    if isinstance(r.weights, Normalised):
        out, final = r.weights.finish(out, lse)
    out = jnp.moveaxis(out, 1, 2)
    if scale is not None and each is None:  # a number per feature
        out = out * jnp.repeat(scale, r.geometry.heads // scale.shape[2], axis=2)
    return Result(out, final)


def thresholds(r: Request, search: Any) -> tuple[Array, Array] | None:
    """Reference and threshold of every row of thresholded weights, ``[B, N, T, 1]``, by one pass over the keys.

    search: ``(f, low, high) -> u`` with f(u) = 1, for an f that grows. None where the kernels cannot: the logits of a row of
    tiles must find room on the chip. Has no derivative.
    """
    weights, kernels, g = r.weights, _kernels(), r.geometry
    assert isinstance(weights, Thresholded)
    if kernels is None or not kernels.HOLDS_ROWS:
        return None
    numbers = (*weights.bracket(0.0, g), *weights.numbers(g))
    if outside(lambda x, u, *more: weights.weight(x, *weights.row(u, *more)), len(numbers)) is not None:
        return None
    r = dataclasses.replace(r, dropout=None)
    held = _held(r, kernels)
    if held is None:
        return None
    plan, slots = held
    if plan.packed:
        numbers = tuple(packed_array(Operand(x, "aligned"), g) for x in numbers)

    def local(r: Request, plan: _Plan, x: _Arrays) -> tuple[Any, Any]:
        return kernels.thresholds(_here(r, plan, x), search, x.numbers, slots)

    found = _everywhere(r, plan, lax.stop_gradient(_arrays(r, plan)._replace(numbers=numbers)), local)
    top, u = (unpacked(x, g) for x in found) if plan.packed else found
    return top[..., None], u[..., None]


def _held(r: Request, kernels: ModuleType) -> tuple[_Plan, int] | None:
    """A plan whose rows of tiles find room on the chip, and how many tiles the longest has: with as many queries as can be.

    Tiles of fewer queries have more keys, so that lists of tiles, which are in scalar memory, are no longer for it.
    """
    block_q, block_k = block_sizes(r, r.geometry.queries, r.geometry.keys)
    while block_q % 128 == 0:
        plan = _plan(dataclasses.replace(r, block_sizes=(block_q, block_k)))
        known = isinstance(plan.state, np.ndarray)
        slots = max(1, int((plan.state > 0).sum(-1).max())) if known else plan.state.shape[-1]
        part, packed = _outline(r, plan), r.geometry if plan.packed else None
        if kernels.rows_fit(part, slots) and kernels.refusal(part, packed, None) is None:
            return plan, slots
        block_q, block_k = block_q // 2, block_k * 2
    return None


def _arrays(r: Request, plan: _Plan) -> _Arrays:
    same = isinstance(plan.state, np.ndarray) and plan.state.shape[:2] == (1, 1)
    q = _scaled(r, plan.score)
    return _Arrays(
        packed_queries(q, r.geometry) if plan.packed else q,
        r.k,
        r.v,
        tuple(jnp.asarray(op.x) for op in operands(plan.mask)),
        tuple(jnp.asarray(op.x) for op in operands(plan.score)),
        None if same else plan.state,
        None if r.dropout is None else r.dropout.seed,
        jnp.zeros(4, jnp.int32),
    )


Local = Callable[[Request, _Plan, _Arrays], tuple[Any, Any]]
"""What a device does with the rows and heads that are here: two results ``[B, N, T, ...]``."""


def _everywhere(r: Request, plan: _Plan, arrays: _Arrays, local: Local) -> tuple[Any, Any]:
    divided = division(r.geometry)
    return local(r, plan, arrays) if divided is None else _on_mesh(r, plan, arrays, local, *divided)


def _on_mesh(r: Request, plan: _Plan, arrays: _Arrays, local: Local, mesh: Any, axes: Axes) -> tuple[Any, Any]:
    """Each device computes its own batch rows and heads; nothing is communicated."""
    b, h = axes.batch or None, axes.heads or None

    def specs(bound: Bound | None) -> tuple[P, ...]:
        return tuple(operand_spec(op, axes) for op in operands(bound))

    state = None if arrays.state is None else jnp.asarray(arrays.state)
    tokens = P(b, None, h)  # quantized values do not come here
    where = None if state is None else operand_spec(Operand(state, "blocks"), axes)
    numbers = tuple(operand_spec(Operand(x, "aligned"), axes) for x in arrays.numbers)
    seed = None if arrays.seed is None else P()
    given = _Arrays(tokens, tokens, tokens, specs(plan.mask), specs(plan.score), where, seed, P(), None, numbers)

    def here(arrays: _Arrays) -> tuple[Any, Any]:
        rows, _, heads, _ = arrays.q.shape
        start = [lax.axis_index(names) * n if names else 0 for names, n in ((b, rows), (h, heads))]
        return local(r, plan, arrays._replace(origin=jnp.asarray([*start, 0, 0], jnp.int32)))

    divided = jax.shard_map(here, mesh=mesh, in_specs=(given,), out_specs=(P(b, h), P(b, h)), check_vma=False)
    return divided(arrays._replace(state=state))


def _here(r: Request, plan: _Plan, x: _Arrays) -> Part:
    """The part of the call whose arrays are here."""
    mask, score = (
        None if bound is None else bound._replace(
            operands=tuple(dataclasses.replace(op, x=here) for op, here in zip(bound.operands, xs, strict=True))
        )
        for bound, xs in ((plan.mask, x.mask), (plan.score, x.score))
    )  # fmt: skip
    return _part(r, plan, x, mask, score)


def _local(r: Request, plan: _Plan, x: _Arrays) -> tuple[Any, Any]:
    """``out [B, N, T, Hv]`` and ``lse [B, N, T]`` of the rows and heads that are here."""
    part, kernels = _here(r, plan, x), _kernels()
    assert kernels is not None
    if not plan.packed:
        return attend_part(part)
    g = part.geometry
    most = kernels.most_runs(g.batch * g.heads, g.keys) if part.dropout is None and part.pages is None else 1
    if (n := runs(g.keys, plan.block_k, most)) == 1:
        return attend_part(part, r.geometry)
    return joined(part, n, *attend_part(split(part, n)))


def _part(r: Request, plan: _Plan, x: _Arrays, mask: Bound | None, score: Bound | None) -> Part:
    here = Geometry(x.q.shape[0], x.q.shape[2], x.k.shape[2], x.q.shape[1], r.geometry.keys, origin=x.origin)
    bm = BlockMap(plan.state if x.state is None else x.state, here.queries, here.keys, plan.block_q, plan.block_k, "")
    dropout = None if r.dropout is None else Dropout(r.dropout.rate, r.dropout.seed if x.seed is None else x.seed)
    return Part(x.q, x.k, x.v, here, mask, score, r.weights, dropout, bm, r.pages, x.value_scale)


def attend_part(part: Part, packed: Geometry | None = None) -> tuple[Any, Any]:
    """``out [B, N, T, Hv]`` in the type of v and ``lse [B, N, T]``, without ``Weights.finish``. packed: the geometry of a
    call whose heads have become rows."""
    kernels = _kernels()
    assert kernels is not None
    return kernels.attend(part, packed)


def part_gradients(part: Part, lse: Any, d_out: Any, delta: Any) -> PartGradients:
    """Of the part's arrays, where ``lse`` is of *all* keys of its queries, ``d_out`` the cotangent of their results, and
    ``delta = Σ d_out·out - d_lse``."""
    kernels = _kernels()
    assert kernels is not None
    return kernels.gradients(part, lse, d_out, delta)
