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
from attnzoo.core.backends.part import Part, PartGradients
from attnzoo.core.backends.result import Result
from attnzoo.core.blocks import FULL, PARTIAL, BlockMap, block_map
from attnzoo.core.cells import Bound, Cells, Geometry, Operand
from attnzoo.core.dropout import Dropout, keep_scale
from attnzoo.core.hoist import NotElementwise, hoist, outside
from attnzoo.core.request import Request
from attnzoo.core.sharding import Axes, division, operand_spec
from attnzoo.core.weights import Normalised, Pointwise


def refusal(r: Request, rectangle: tuple[int, int] | None = None) -> str | None:
    """Why this backend cannot run the request (None: it can), or a rectangle of so many queries and keys at a time."""
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
    return _try_plan(r, rectangle)


def _there() -> bool:
    """Whether there is a TPU, described or simulated ones included; these take a module that is slow to import."""
    if jax.default_backend() == "tpu":
        return True
    launch = sys.modules.get("pallas_kernels.tpu.launch")
    return launch is not None and (launch.generation() is not None or launch.simulated())


def _try_plan(r: Request, rectangle: tuple[int, int] | None) -> str | None:
    from pallas_kernels.tpu import jobs, launch

    try:
        plan = _plan(r)
    except NotElementwise as e:
        return str(e)
    by_distance = any(op.kind == "distance" for bound in (plan.mask, plan.score) for op in _operands(bound))
    if by_distance and launch.generation() == "v4":
        return "TPU v4 cannot shift rows against each other, which arrays looked up by distance need"
    batch, heads, rows, columns = plan.state.shape
    if rectangle is not None:
        block_q, block_k = block_sizes(r, *rectangle)
        rows, columns = -(-rectangle[0] // block_q), -(-rectangle[1] // block_k)
    group = 1 if plan.packed else r.geometry.heads // r.geometry.kv_heads
    if heads > 1 and group > jobs.MOST_MEMBERS:
        return (
            f"heads that see different tiles may share a key head {jobs.MOST_MEMBERS} at a time, not {group}; repeat k and "
            "v, or let all heads see the same tiles"
        )
    tiles = None
    if rectangle is None and isinstance(plan.state, np.ndarray):
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
    return block_map(r.mask, r.geometry, *block_sizes(r, r.geometry.queries, r.geometry.keys))


def block_sizes(r: Request, queries: int, keys: int) -> tuple[int, int]:
    """Of the tiles in which a rectangle of the logits is computed."""
    from pallas_kernels.tpu.choice import blocks

    wanted = r.block_sizes or blocks()[:2]
    block_q, block_k = min(wanted[0], _round_up(queries)), min(wanted[1], _round_up(keys))
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
    block_q, block_k = block_sizes(r, g.queries, g.keys)
    state = _hide_padding(block_map(r.mask, g, block_q, block_k).state, g.keys, block_k)
    packed = packs(g)
    state = packed_state(state, g) if packed else state
    # The mask itself is asked in partial tiles alone.
    asks = not isinstance(state, np.ndarray) or bool((state == PARTIAL).any())
    mask, score = (_mask(r) if asks else None), _score(r)
    if packed:
        mask = None if mask is None else packed_bound(mask, g)
        score = None if score is None else packed_bound(score, g, score=True)
        block_q = -(-packed_geometry(g).queries // 16) * 16
    return _Plan(block_q, block_k, state, mask, score, packed)


def _hide_padding(state: Any, keys: int, block_k: int) -> Any:
    """Tile states in which a last, short block of keys is no full one."""
    if keys % block_k == 0:
        return state
    xp = np if isinstance(state, np.ndarray) else jnp
    last = np.arange(state.shape[3]) == state.shape[3] - 1
    return xp.where(last & (state == FULL), PARTIAL, state)


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
    return Bound(mask.operands, lambda c, *parts: jnp.asarray(mask.apply(c, *parts)) & (c.k >= 0))


def whole(r: Request, bm: BlockMap) -> Part:
    """The request as one part, its mask and score elementwise. Other parts have some of its queries, keys and operands."""
    score = _score(r)
    return Part(_scaled(r, score), r.k, r.v, r.geometry, _mask(r), score, r.weights, r.dropout, bm)


def _scaled(r: Request, score: Bound | None) -> Any:
    from pallas_kernels.tpu.problem import LOG2E

    base2 = score is None and not isinstance(r.weights, Pointwise)
    return (r.q.astype(jnp.float32) * r.scale * (LOG2E if base2 else 1.0)).astype(r.q.dtype)


class _Arrays(NamedTuple):
    """What a device needs of a call; ``state`` is None where it is the same for all and known. origin: batch row, head, query
    and key at which the device's part begins."""

    q: Any
    k: Any
    v: Any
    mask: tuple[Any, ...]
    score: tuple[Any, ...]
    state: Any
    seed: Any
    origin: Any


def run(r: Request) -> Result:
    plan = _plan(r)
    same = isinstance(plan.state, np.ndarray) and plan.state.shape[:2] == (1, 1)
    arrays = _Arrays(
        _scaled(r, plan.score),
        r.k,
        r.v,
        tuple(jnp.asarray(op.x) for op in _operands(plan.mask)),
        tuple(jnp.asarray(op.x) for op in _operands(plan.score)),
        None if same else plan.state,
        None if r.dropout is None else r.dropout.seed,
        jnp.zeros(4, jnp.int32),
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


def _on_mesh(r: Request, plan: _Plan, arrays: _Arrays, mesh: Any, axes: Axes) -> tuple[Any, Any]:
    """Each device computes its own batch rows and heads; nothing is communicated."""
    b, h = axes.batch or None, axes.heads or None

    def specs(bound: Bound | None) -> tuple[P, ...]:
        return tuple(operand_spec(op, axes) for op in _operands(bound))

    state = None if arrays.state is None else jnp.asarray(arrays.state)
    tokens = P(b, None, h)
    where = None if state is None else operand_spec(Operand(state, "blocks"), axes)
    given = _Arrays(
        tokens, tokens, tokens, specs(plan.mask), specs(plan.score), where, None if arrays.seed is None else P(), P()
    )

    def local(arrays: _Arrays) -> tuple[Any, Any]:
        rows, _, heads, _ = arrays.q.shape
        start = [lax.axis_index(names) * n if names else 0 for names, n in ((b, rows), (h, heads))]
        return _local(r, plan, arrays._replace(origin=jnp.asarray([*start, 0, 0], jnp.int32)))

    divided = jax.shard_map(local, mesh=mesh, in_specs=(given,), out_specs=(P(b, h), P(b, h)), check_vma=False)
    return divided(arrays._replace(state=state))


def _local(r: Request, plan: _Plan, x: _Arrays) -> tuple[Any, Any]:
    """``out [B, N, T, Hv]`` and ``lse [B, N, T]`` of the rows and heads that are here."""
    mask, score = (
        None if bound is None else bound._replace(
            operands=tuple(dataclasses.replace(op, x=here) for op, here in zip(bound.operands, xs, strict=True))
        )
        for bound, xs in ((plan.mask, x.mask), (plan.score, x.score))
    )  # fmt: skip
    here = Geometry(x.q.shape[0], x.q.shape[2], x.k.shape[2], x.q.shape[1], r.geometry.keys, origin=x.origin)
    state = plan.state if x.state is None else x.state
    bm = BlockMap(state, here.queries, here.keys, plan.block_q, plan.block_k, "")
    dropout = None if r.dropout is None else Dropout(r.dropout.rate, x.seed)
    part = Part(x.q, x.k, x.v, here, mask, score, r.weights, dropout, bm)
    return attend_part(part, r.geometry if plan.packed else None)


def attend_part(part: Part, packed: Geometry | None = None) -> tuple[Any, Any]:
    """``out [B, N, T, Hv]`` in the type of v and ``lse [B, N, T]``, without ``Weights.finish``. packed: the geometry of a
    call whose heads have become rows."""
    from pallas_kernels.tpu.attend import attend

    problem, arrays = _problem(part, packed)
    out, lse = attend(problem, *arrays)
    return out[:, :, : problem.queries], lse[:, :, 0, : problem.queries]


def part_gradients(part: Part, lse: Any, d_out: Any, delta: Any) -> PartGradients:
    """Of the part's arrays, where ``lse`` is of *all* keys of its queries, ``d_out`` the cotangent of their results, and
    ``delta = Σ d_out·out - d_lse``."""
    from pallas_kernels.tpu.attend import attend_gradients

    problem, arrays = _problem(part, None)
    rows = problem.padded[0] - problem.queries

    def padded(x: Any, fill: float = 0.0) -> Any:
        return jnp.pad(x, [(0, 0), (0, 0), (0, rows)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)

    norm, delta = padded(lse, -jnp.inf)[:, :, None], padded(delta)[:, :, None]
    dq, dk, dv, d_score, _ = attend_gradients(problem, arrays, norm, padded(d_out), delta)
    dq, dk, dv = (jnp.moveaxis(d[:, :, : x.shape[1]], 1, 2) for d, x in ((dq, part.q), (dk, part.k), (dv, part.v)))
    return PartGradients(dq, dk, dv, [None if d.dtype == jax.dtypes.float0 else d for d in d_score])


def _problem(part: Part, packed: Geometry | None) -> tuple[Any, tuple[Any, ...]]:
    """The kernels' problem, and ``(q, k, v, score operands, the rest)`` as they take them."""
    from pallas_kernels.tpu.attend import Lists, column_lists
    from pallas_kernels.tpu.choice import blocks
    from pallas_kernels.tpu.jobs import make_jobs
    from pallas_kernels.tpu.problem import Problem, laid_out

    g, bm, mask, score = part.geometry, part.block_map, part.mask, part.score
    state = _hide_padding(bm.state, g.keys, bm.block_k)
    mask_ops, score_ops = _operands(mask), _operands(score)
    rows, columns = blocks()[2:]
    problem = Problem(
        g.batch, g.heads, g.kv_heads, g.queries, g.keys, bm.block_q, bm.block_k,
        _divisor(bm.block_q, rows), _divisor(bm.block_k, columns),
        None if mask is None else mask.apply,
        tuple(map(_layout, mask_ops)),
        None if score is None else score.apply,
        tuple(map(_layout, score_ops)),
        part.weights.phi if isinstance(part.weights, Pointwise) else None,
        None if part.dropout is None else functools.partial(_keep, part.dropout.rate, packed),
        per_batch=state.shape[0] > 1,
        per_head=state.shape[1] > 1,
    )  # fmt: skip
    by_column, kinds_of = column_lists(problem, state)
    lists = Lists(make_jobs(state.reshape(-1, *state.shape[2:])), by_column, kinds_of)
    padded = problem.padded
    q, k, v = (_by_heads(a, n) for a, n in ((part.q, padded[0]), (part.k, padded[1]), (part.v, padded[1])))
    by_tile = (_by_tiles(op, problem) for op in mask_ops)
    mask_xs = tuple(laid_out(problem, a, layout) for a, layout in zip(by_tile, problem.mask_layouts, strict=True))
    seed = jnp.zeros(2, jnp.uint32) if part.dropout is None else part.dropout.seed
    call = jnp.concatenate([lax.bitcast_convert_type(seed, jnp.int32), jnp.asarray(g.origin)])
    return problem, (q, k, v, tuple(op.x for op in score_ops), (lists, mask_xs, call))


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
