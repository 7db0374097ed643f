"""Fused attention on TPU by the kernels of `pallas_kernels`: any elementwise mask and score, empty tiles never visited."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from attnzoo.core.backends.packed import (
    packed_bound,
    packed_geometry,
    packed_queries,
    packed_state,
    packs,
    unpacked,
)
from attnzoo.core.backends.result import Result
from attnzoo.core.blocks import FULL, PARTIAL, BlockMap, block_map
from attnzoo.core.cells import Bound, Cells, Geometry, Operand
from attnzoo.core.dropout import Dropout, keep_scale
from attnzoo.core.hoist import NotElementwise, hoist, outside
from attnzoo.core.request import Request
from attnzoo.core.sharding import Axes, division
from attnzoo.core.weights import Normalised, Pointwise


def refusal(r: Request) -> str | None:
    """Why this backend cannot run the request (None: it can)."""
    if not _there():
        return f"it needs a TPU, and the default device is a {jax.default_backend()}"
    if r.return_weights:
        return "it never holds the weights that return_weights asks for"
    if not isinstance(r.weights, Normalised | Pointwise):
        return f"{r.weights} needs whole rows of logits at once"
    if r.return_lse and not isinstance(r.weights, Normalised):
        return f"{r.weights} has no log-sum-exp to return"
    if r.q.dtype not in (jnp.float32, jnp.bfloat16) or not r.q.dtype == r.k.dtype == r.v.dtype:
        return f"it takes float32 or bfloat16, the same for q, k and v, not {r.q.dtype}, {r.k.dtype} and {r.v.dtype}"
    if r.block_sizes is not None and any(n % 128 for n in r.block_sizes):
        return f"its block_sizes are multiples of 128, not {r.block_sizes}"
    if isinstance(r.weights, Pointwise) and (found := outside(r.weights.phi)) is not None:
        return f"{r.weights} uses {found!r}, which does not run inside a kernel"
    return _try_plan(r)


def _there() -> bool:
    """Whether there is a TPU, described or simulated ones included; these take a module that is slow to import."""
    if jax.default_backend() == "tpu":
        return True
    launch = sys.modules.get("pallas_kernels.tpu.launch")
    return launch is not None and (launch.generation() is not None or launch.simulated())


def _try_plan(r: Request) -> str | None:
    from pallas_kernels.tpu import jobs, launch

    try:
        plan = _plan(r)
    except NotElementwise as e:
        return str(e)
    by_distance = any(op.kind == "distance" for bound in (plan.mask, plan.score) for op in _operands(bound))
    if by_distance and launch.generation() == "v4":
        return "TPU v4 cannot shift rows against each other, which arrays looked up by distance need"
    batch, heads, rows, columns = plan.state.shape
    group = 1 if plan.packed else r.geometry.heads // r.geometry.kv_heads
    if heads > 1 and group > jobs.MOST_MEMBERS:
        return (
            f"heads that see different tiles may share a key head {jobs.MOST_MEMBERS} at a time, not {group}; repeat k and "
            "v, or let all heads see the same tiles"
        )
    tiles = None
    if isinstance(plan.state, np.ndarray):
        tiles = int(np.maximum(1, (plan.state > 0).sum(-1)).sum(-1).max())
    return jobs.refusal(batch * heads, rows, columns, tiles)


class _Plan(NamedTuple):
    block_q: int
    block_k: int
    state: Any
    mask: Bound | None
    score: Bound | None
    packed: bool


def map_of(r: Request) -> BlockMap:
    """The block map this backend walks."""
    block_q, block_k = _block_sizes(r)
    return block_map(r.mask, r.geometry, block_q, block_k)


def _block_sizes(r: Request) -> tuple[int, int]:
    from pallas_kernels.tpu.choice import blocks

    g = r.geometry
    wanted = r.block_sizes or blocks()[:2]
    block_q, block_k = min(wanted[0], _round_up(g.queries)), min(wanted[1], _round_up(g.keys))
    for op in _operands(r.bound_mask()):
        if op.block is not None:  # a tile lies within one block
            block_q, block_k = math.gcd(block_q, op.block[0]), math.gcd(block_k, op.block[1])
    if block_q % 128 or block_k % 128:
        raise NotElementwise(
            f"the mask {r.mask} has blocks that tiles of a multiple of 128 queries and keys do not fit; choose multiples of 128"
        )
    return block_q, block_k


def _round_up(n: int) -> int:
    return -(-n // 128) * 128


def _plan(r: Request) -> _Plan:
    g = r.geometry
    block_q, block_k = _block_sizes(r)
    state = block_map(r.mask, g, block_q, block_k).state
    if g.keys % block_k:  # the padding of the last block must be hidden
        xp = np if isinstance(state, np.ndarray) else jnp
        last = np.arange(state.shape[3]) == state.shape[3] - 1
        state = xp.where(last & (state == FULL), PARTIAL, state)
    packed = packs(g)
    state = packed_state(state, g) if packed else state
    # The mask itself is asked in partial tiles alone.
    asks = not isinstance(state, np.ndarray) or bool((state == PARTIAL).any())
    mask = hoist(_with_slots(r.bound_mask(), g), g, f"mask {r.mask}") if asks and _hides(r) else None
    bound = r.bound_score()
    score = None if bound is None else hoist(bound, g, "score", score=True)
    if packed:
        mask = None if mask is None else packed_bound(mask, g)
        score = None if score is None else packed_bound(score, g, score=True)
        block_q = -(-packed_geometry(g).queries // 16) * 16
    return _Plan(block_q, block_k, state, mask, score, packed)


def _hides(r: Request) -> bool:
    return r.mask is not None or r.geometry.kv_positions is not None


def _with_slots(mask: Bound | None, g: Geometry) -> Bound:
    """The mask, and that a key slot holds a token where keys carry positions."""
    mask = mask or Bound((), lambda c: True)
    if g.kv_positions is None:
        return mask
    return Bound(mask.operands, lambda c, *parts: jnp.asarray(mask.apply(c, *parts)) & (c.k >= 0))


class _Arrays(NamedTuple):
    """What a device needs of a call; ``state`` is None where it is the same for all and known. offset: batch row and head at
    which the device's part begins."""

    q: Any
    k: Any
    v: Any
    mask: tuple[Any, ...]
    score: tuple[Any, ...]
    state: Any
    seed: Any
    offset: Any


def run(r: Request) -> Result:
    from pallas_kernels.tpu.problem import LOG2E

    plan = _plan(r)
    seed = jnp.zeros(2, jnp.int32) if r.dropout is None else lax.bitcast_convert_type(r.dropout.seed, jnp.int32)
    same = isinstance(plan.state, np.ndarray) and plan.state.shape[:2] == (1, 1)
    arrays = _Arrays(
        (r.q.astype(jnp.float32) * r.scale * (LOG2E if _base2(r, plan) else 1.0)).astype(r.q.dtype),
        r.k,
        r.v,
        tuple(jnp.asarray(op.x) for op in _operands(plan.mask)),
        tuple(jnp.asarray(op.x) for op in _operands(plan.score)),
        None if same else plan.state,
        seed,
        jnp.zeros(2, jnp.int32),
    )
    if plan.packed:
        arrays = arrays._replace(q=packed_queries(arrays.q, r.geometry))
    divided = division(r.geometry)
    out, lse = _local(r, plan, arrays) if divided is None else _on_mesh(r, plan, arrays, *divided)
    if plan.packed:
        out, lse = unpacked(out, r.geometry), unpacked(lse, r.geometry)
    final = None
    if isinstance(r.weights, Normalised):
        out, final = r.weights.finish(out, lse)
    return Result(jnp.moveaxis(out, 1, 2), final)


def _base2(r: Request, plan: _Plan) -> bool:
    return plan.score is None and not isinstance(r.weights, Pointwise)


def _on_mesh(r: Request, plan: _Plan, arrays: _Arrays, mesh: Any, axes: Axes) -> tuple[Any, Any]:
    """Each device computes its own batch rows and heads; nothing is communicated."""
    b, h = axes.batch or None, axes.heads or None

    def spec(x: Any, kind: str = "aligned") -> P:
        if kind == "distance":
            return P(h if x.shape[0] > 1 else None)
        return P(b if x.shape[0] > 1 else None, h if x.shape[1] > 1 else None)

    def specs(bound: Bound | None) -> tuple[P, ...]:
        return tuple(spec(op.x, op.kind) for op in _operands(bound))

    state = None if arrays.state is None else jnp.asarray(arrays.state)
    tokens = P(b, None, h)
    given = _Arrays(
        tokens, tokens, tokens, specs(plan.mask), specs(plan.score), None if state is None else spec(state), P(), P()
    )

    def local(arrays: _Arrays) -> tuple[Any, Any]:
        rows, _, heads, _ = arrays.q.shape
        start = [lax.axis_index(names) * n if names else 0 for names, n in ((b, rows), (h, heads))]
        return _local(r, plan, arrays._replace(offset=jnp.asarray(start, jnp.int32)))

    divided = jax.shard_map(local, mesh=mesh, in_specs=(given,), out_specs=(P(b, h), P(b, h)), check_vma=False)
    return divided(arrays._replace(state=state))


def _local(r: Request, plan: _Plan, x: _Arrays) -> tuple[Any, Any]:
    """``out [B, N, T, Hv]`` and ``lse [B, N, T]`` of the rows and heads that are here."""
    from pallas_kernels.tpu.attend import Lists, attend, column_lists
    from pallas_kernels.tpu.choice import blocks
    from pallas_kernels.tpu.jobs import make_jobs
    from pallas_kernels.tpu.problem import Problem, laid_out

    state = plan.state if x.state is None else x.state
    mask_ops, score_ops = (
        tuple(dataclasses.replace(op, x=here) for op, here in zip(_operands(bound), xs, strict=True))
        for bound, xs in ((plan.mask, x.mask), (plan.score, x.score))
    )
    rows, columns = blocks()[2:]
    problem = Problem(
        x.q.shape[0], x.q.shape[2], x.k.shape[2], x.q.shape[1], r.geometry.keys, plan.block_q, plan.block_k,
        _divisor(plan.block_q, rows), _divisor(plan.block_k, columns),
        None if plan.mask is None else plan.mask.apply,
        tuple(map(_layout, mask_ops)),
        None if plan.score is None else plan.score.apply,
        tuple(map(_layout, score_ops)),
        r.weights.phi if isinstance(r.weights, Pointwise) else None,
        None if r.dropout is None else functools.partial(_keep, r.dropout.rate, r.geometry if plan.packed else None),
        per_batch=state.shape[0] > 1,
        per_head=state.shape[1] > 1,
    )  # fmt: skip
    by_column, kinds_of = column_lists(problem, state)
    lists = Lists(make_jobs(state.reshape(-1, *state.shape[2:])), by_column, kinds_of)
    padded = problem.padded
    q, k, v = (_by_heads(a, n) for a, n in ((x.q, padded[0]), (x.k, padded[1]), (x.v, padded[1])))
    by_tile = (_by_tiles(op, problem) for op in mask_ops)
    mask_xs = tuple(laid_out(problem, a, layout) for a, layout in zip(by_tile, problem.mask_layouts, strict=True))
    call = jnp.concatenate([x.seed, x.offset])
    out, lse = attend(problem, q, k, v, tuple(op.x for op in score_ops), (lists, mask_xs, call))
    return out[:, :, : problem.queries], lse[:, :, 0, : problem.queries]


def _operands(bound: Bound | None) -> tuple[Operand, ...]:
    return () if bound is None else bound.operands


def _layout(op: Operand) -> Any:
    from pallas_kernels.tpu.problem import layout_by_tile, layout_of

    return layout_by_tile(op.x) if op.kind == "blocks" else layout_of(op.x, op.kind == "distance")


def _by_tiles(op: Operand, p: Any) -> Any:
    """An operand as the kernels take it: one given by blocks has an entry per tile."""
    if op.block is None:
        return op.x
    x = op.x
    for axis, length, block, tile in zip((2, 3), p.padded, op.block, (p.block_q, p.block_k), strict=True):
        x = jnp.take(x, np.arange(length // tile) * tile // block, axis=axis, mode="clip")
    return x


def _divisor(block: int, piece: int) -> int:
    return block if block <= piece else piece if block % piece == 0 else 128


def _keep(rate: float, packed: Geometry | None, seed0: Any, seed1: Any, b: Any, h: Any, t: Any, s: Any) -> Any:
    seed: Any = (seed0.astype(jnp.uint32), seed1.astype(jnp.uint32))

    def factor(b: Any, h: Any, t: Any, s: Any) -> Any:
        return keep_scale(Dropout(rate, seed), Cells(b, h, t, s, t, s))

    return factor(b, h, t, s) if packed is None else packed_bound(Bound((), factor), packed).apply(b, h, t, s)


def _by_heads(x: Any, length: int) -> Any:
    """``[B, T, N, H] -> [B, N, length, H]``, padded with zeros."""
    x = jnp.moveaxis(x, 2, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
