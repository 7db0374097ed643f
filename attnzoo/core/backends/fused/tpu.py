"""The kernels of `pallas_kernels.tpu` for the backend "pallas"."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.core.backends.fused.problem import call_of, mask_operands, operands, pages_of, problem_of
from attnzoo.core.backends.part import Part, PartGradients
from attnzoo.core.cells import Geometry

DTYPES = ("float32", "bfloat16")
READS_NARROW = True


def there() -> bool:
    """Whether there is a TPU, described or simulated ones included; these take a module that is slow to import."""
    if jax.default_backend() == "tpu":
        return True
    launch = sys.modules.get("pallas_kernels.tpu.launch")
    return launch is not None and (launch.generation() is not None or launch.simulated())


def taken_unasked() -> bool:
    return True


def block_sizes(wanted: tuple[int, int] | None, queries: int, keys: int) -> tuple[int, int]:
    """Raises ValueError for tiles that are no multiples of 128."""
    from pallas_kernels.tpu.choice import blocks

    if wanted is not None and any(n % 128 for n in wanted):
        raise ValueError(f"its block_sizes are multiples of 128, not {wanted}")
    block_q, block_k = wanted or blocks()[:2]
    return min(block_q, -(-queries // 128) * 128), min(block_k, -(-keys // 128) * 128)


def packed_rows(rows: int) -> int:
    return -(-rows // 16) * 16


def most_runs(rows_and_heads: int, keys: int) -> int:
    return 1  # one core reads the cache as fast as the memory gives it


def holds_pages(entries: int) -> bool:
    from pallas_kernels.tpu.jobs import MOST_BYTES

    return 4 * entries <= MOST_BYTES // 2  # lists of tiles take scalar memory too


def refusal(part: Part, packed: Geometry | None, rectangle: tuple[int, int] | None) -> str | None:
    from pallas_kernels.tpu import jobs, launch

    by_distance = any(op.kind == "distance" for bound in (part.mask, part.score) for op in operands(bound))
    if by_distance and launch.generation() == "v4":
        return "TPU v4 cannot shift rows against each other, which arrays looked up by distance need"
    bm, g = part.block_map, part.geometry
    batch, heads, rows, columns = bm.state.shape
    if rectangle is not None:
        rows, columns = -(-rectangle[0] // bm.block_q), -(-rectangle[1] // bm.block_k)
    group = g.heads // g.kv_heads
    if heads > 1 and group > jobs.MOST_MEMBERS:
        return (
            f"heads that see different tiles may share a key head {jobs.MOST_MEMBERS} at a time, not {group}; repeat k and "
            "v, or let all heads see the same tiles"
        )
    tiles = None
    if rectangle is None and isinstance(bm.state, np.ndarray):
        tiles = int(np.maximum(1, (bm.state > 0).sum(-1)).sum(-1).max())
    return jobs.refusal(batch * heads, rows, columns, tiles)


def attend(part: Part, packed: Geometry | None) -> tuple[Any, Any]:
    from pallas_kernels.tpu import attend

    problem, arrays = _problem(part, packed)
    out, lse = attend.attend(problem, *arrays) if part.pages is None else attend.attend_pages(problem, *arrays, pages_of(part))
    return out[:, :, : problem.queries], lse[:, :, 0, : problem.queries]


def gradients(part: Part, lse: Any, d_out: Any, delta: Any) -> PartGradients:
    from pallas_kernels.tpu.attend import attend_gradients

    problem, arrays = _problem(part, None)
    rows = problem.padded[0] - problem.queries

    def padded(x: Any, fill: float = 0.0) -> Any:
        return jnp.pad(x, [(0, 0), (0, 0), (0, rows)] + [(0, 0)] * (x.ndim - 3), constant_values=fill)

    norm, delta = padded(lse, -jnp.inf)[:, :, None], padded(delta)[:, :, None]
    dq, dk, dv, d_score, _ = attend_gradients(problem, arrays, norm, padded(d_out), delta)  # a ring's k and v are two
    dq, dk, dv = (jnp.moveaxis(d[:, :, : x.shape[1]], 1, 2) for d, x in ((dq, part.q), (dk, part.k), (dv, part.v)))
    return PartGradients(dq, dk, dv, [None if d.dtype == jax.dtypes.float0 else d for d in d_score])


def _problem(part: Part, packed: Geometry | None) -> tuple[Any, tuple[Any, ...]]:
    """The kernels' problem, and ``(q, k, v, score operands, the rest)`` as they take them."""
    from pallas_kernels.tpu.attend import Lists, column_lists
    from pallas_kernels.tpu.choice import blocks, stairs
    from pallas_kernels.tpu.jobs import make_jobs, with_stairs

    bm = part.block_map
    rows, columns = blocks()[2:]
    problem, state = problem_of(part, packed, _divisor(bm.block_q, rows), _divisor(bm.block_k, columns))
    problem = dataclasses.replace(problem, keys_are_values=part.v is part.k)
    ahead = None if part.mask is None else part.mask.ahead
    if ahead is not None and _cut_along_diagonals(ahead, problem, stairs()):
        problem = dataclasses.replace(problem, stair=stairs()[0])
        state = with_stairs(state, ahead // bm.block_q)
    by_column, kinds_of = column_lists(problem, state)
    lists = Lists(make_jobs(state.reshape(-1, *state.shape[2:]), problem.kinds), by_column, kinds_of)
    padded = problem.padded
    keys = padded[1] if part.pages is None else part.k.shape[1]
    q, k = _by_heads(part.q, padded[0]), _by_heads(part.k, keys)
    v = None if problem.keys_are_values else _by_heads(part.v, keys)
    value_scale = None
    if part.value_scale is not None:
        value_scale = jnp.pad(jnp.moveaxis(part.value_scale, 1, 2), ((0, 0), (0, 0), (0, keys - part.k.shape[1])))[:, :, None]
    rest = (lists, mask_operands(part, problem), call_of(part), value_scale)
    return problem, (q, k, v, tuple(op.x for op in operands(part.score)), rest)


def _cut_along_diagonals(ahead: int, p: Any, stairs: tuple[int, int]) -> bool:
    """Whether a mask of which row t sees nothing beyond column t + ahead cuts tiles along their diagonals into pieces that pay,
    and cells above are not asked for: the gradient of a score's operand by cell is written by whole tiles."""
    if p.block_q != p.block_k or ahead % p.block_q or p.block_q % max(stairs) or p.block_q == min(stairs):
        return False
    return not any(d and layout.form == "cell" for layout, d in zip(p.score_layouts, p.differentiable, strict=True))


def _divisor(block: int, piece: int) -> int:
    return block if block <= piece else piece if block % piece == 0 else 128


def _by_heads(x: Any, length: int) -> Any:
    """``[B, T, N, H] -> [B, N, length, H]``, padded with zeros."""
    x = jnp.moveaxis(x, 2, 1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
