"""The kernels of `pallas_kernels.gpu` for the backend "pallas"."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from attnzoo.core.backends.fused.problem import call_of, mask_operands, operands, problem_of
from attnzoo.core.backends.part import Part, PartGradients
from attnzoo.core.cells import Geometry

READS_NARROW = False
HOLDS_ROWS = False
DTYPES = ("bfloat16", "float16")


def there() -> bool:
    """Whether there is a GPU that the kernels know, described or simulated ones included; these take a module that is slow to
    import."""
    launch = sys.modules.get("pallas_kernels.gpu.launch")
    if launch is not None and (launch.simulated() or launch.generation() is not None):
        return True
    if jax.default_backend() != "gpu":
        return False
    from pallas_kernels.gpu.launch import generation

    return generation() is not None


def taken_unasked() -> bool:
    """The kernel for Blackwell has run on no GPU yet."""
    from pallas_kernels.gpu.launch import generation

    return generation() != "blackwell"


def block_sizes(wanted: tuple[int, int] | None, queries: int, keys: int) -> tuple[int, int]:
    """Raises ValueError for other tiles than the kernels have."""
    from pallas_kernels.gpu.choice import BLOCK_Q, block_queries, blocks
    from pallas_kernels.gpu.launch import generation

    has = [(block_q, blocks(BLOCK_Q, BLOCK_Q)[1]) for block_q in block_queries(generation())]
    if wanted is None:
        return has[0] if queries > BLOCK_Q else has[-1]
    if tuple(wanted) not in has:
        raise ValueError(f"its block_sizes are {' or '.join(map(str, has))}, not {wanted}")
    return wanted


def packed_rows(rows: int) -> int:
    from pallas_kernels.gpu.choice import BLOCK_Q

    return BLOCK_Q


def most_runs(rows_and_heads: int, keys: int) -> int:
    """As many as give every multiprocessor a run, of at least 512 keys."""
    from pallas_kernels.gpu.choice import MULTIPROCESSORS

    return min(MULTIPROCESSORS // rows_and_heads, keys // 512)


def holds_pages(entries: int) -> bool:
    return False  # these kernels know no block table


def refusal(part: Part, packed: Geometry | None, rectangle: tuple[int, int] | None) -> str | None:
    from pallas_kernels.gpu import refusal
    from pallas_kernels.gpu.launch import generation

    # Whether a call will be differentiated is not known here. On Blackwell, where nothing could be, it is refused then.
    backward = generation() != "blackwell"
    problem = _problem_of(part, packed)[0]
    q, k, v = (jax.eval_shape(lambda x, n=n, by=by: _padded(x, n, by), x) for x, n, by in _placed(part, problem))
    return refusal.refusal(problem, q, k, v, backward=backward)


def attend(part: Part, packed: Geometry | None) -> tuple[Any, Any]:
    from pallas_kernels.gpu import attend

    problem, arrays = _problem(part, packed)
    out, lse = attend.attend(problem, *arrays)
    return jnp.moveaxis(out[:, : problem.queries, :, : part.v.shape[3]], 2, 1), lse[:, :, : problem.queries]


def gradients(part: Part, lse: Any, d_out: Any, delta: Any) -> PartGradients:
    from pallas_kernels.gpu.attend import attend_gradients

    problem, arrays = _problem(part, None)
    rows = ((0, 0), (0, 0), (0, problem.padded[0] - problem.queries))
    norm, delta = jnp.pad(lse, rows, constant_values=-jnp.inf), jnp.pad(delta, rows)
    d_out = _padded(jnp.moveaxis(d_out, 1, 2), problem.padded[0], False)
    dq, dk, dv, d_score, _ = attend_gradients(problem, arrays, norm, d_out, delta)
    if problem.keys_by_head:
        dk, dv = (jnp.swapaxes(d, 1, 2) for d in (dk, dv))
    dq, dk, dv = (d[:, : x.shape[1], :, : x.shape[3]] for d, x in ((dq, part.q), (dk, part.k), (dv, part.v)))
    return PartGradients(dq, dk, dv, [None if d.dtype == jax.dtypes.float0 else d for d in d_score])


def _problem_of(part: Part, packed: Geometry | None) -> tuple[Any, Any]:
    """One tile of queries reads a cache, more read what projections made: of each its own order is kept."""
    from pallas_kernels.gpu.warpgroup import ROWS

    problem, state = problem_of(part, packed, ROWS, part.block_map.block_k)
    return dataclasses.replace(problem, keys_by_head=part.geometry.queries <= problem.block_q), state


def _problem(part: Part, packed: Geometry | None) -> tuple[Any, tuple[Any, ...]]:
    """The kernels' problem, and ``(q, k, v, score operands, the rest)`` as they take them."""
    from pallas_kernels.gpu.attend import Lists
    from pallas_kernels.gpu.tiles import make_tiles

    problem, state = _problem_of(part, packed)
    lists = Lists(*(make_tiles(s.reshape(-1, *s.shape[2:])) for s in (state, state.swapaxes(2, 3))))
    q, k, v = (_padded(x, n, by) for x, n, by in _placed(part, problem))
    rest = (lists, mask_operands(part, problem), call_of(part))
    return problem, (q, k, v, tuple(op.x for op in operands(part.score)), rest)


def _placed(part: Part, problem: Any) -> list[tuple[Any, int, bool]]:
    """q, k and v, their lengths in whole blocks, and whether heads come first."""
    (t, s), by = problem.padded, problem.keys_by_head
    return [(part.q, t, False), (part.k, s, by), (part.v, s, by)]


def _padded(x: Any, length: int, by_head: bool) -> Any:
    """``[B, T, N, H]`` with zeros up to a length and to a whole width; ``[B, N, T, H]`` if heads come first."""
    width = -(-x.shape[3] // 64) * 64
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))
    return jnp.swapaxes(x, 1, 2) if by_head else x
