"""The one attention operation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnzoo.core import context, passes
from attnzoo.core.backends import BACKENDS, pallas
from attnzoo.core.backends.choice import by_tiles, choose, record, refusals
from attnzoo.core.backends.result import Result
from attnzoo.core.blocks import BlockMap
from attnzoo.core.cells import Geometry
from attnzoo.core.request import Request, make_request
from attnzoo.core.sharding import context_division
from attnzoo.core.weights import Mixture, Thresholded, Weights, softmax
from attnzoo.errors import unknown


def attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    mask: Any = None,
    bias: Float[Array, ...] | None = None,
    score: Any = None,
    weights: Weights = softmax,
    scale: float | Array | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: Array | None = None,
    q_positions: Int[Array, "*B T"] | None = None,
    kv_positions: Int[Array, "*B S"] | None = None,
    backend: str = "auto",
    block_sizes: tuple[int, int] | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    pages: Int[Array, "B M"] | None = None,
) -> Any:
    """Attention that can be changed anywhere: ``out = weights(mask(score(scale · q kᵀ + bias))) v``.

    Args:
        q, k, v: queries, keys and values; N query heads are a multiple of the K key heads, head n reads key head
            ``n // (N / K)``. Leading batch axes: any number, the same for all three. Where v is the very array k is, as for
            latents that are both, TPU kernels read it once. k and v may be :class:`~attnzoo.core.quantized.Quantized`: TPU
            kernels read their 8 bits (no derivative), all else expands them first.
        mask: who may see whom: a :class:`~attnzoo.core.masks.Mask`, a bool array that broadcasts to ``[*B, N, T, S]``
            (True: may be seen), or a function of int32 scalars ``(b, h, q, k) -> bool``. None: all see all.
        bias: added to the scaled logits; broadcasts to ``[*B, N, T, S]``. -inf or the dtype's minimum hides a cell.
        score: what is done to a logit next: a :class:`~attnzoo.core.scores.Score` or a function of scalars
            ``(s, b, h, q, k) -> s``. Gradients reach the arrays it captures.
        weights: how logits become weights, of :mod:`attnzoo.core.weights`. Default softmax.
        scale: default ``H ** -0.5``.
        dropout_rate, dropout_rng: dropout on the weights; which cells are dropped depends on the key and the cell alone.
        q_positions, kv_positions: token positions (int32, ``[T]`` or ``[*B, T]``; ``[S]``, ``[*B, S]`` or ``[*B, K, S]``)
            for masks and scores that compare positions. A key at position -1 is an empty slot that nobody sees.
        backend: "auto", or one of "dense", "blockwise", "pallas", "cudnn". :func:`explain` says what "auto" takes and why.
        block_sizes: tile sizes (queries, keys) of "blockwise" and "pallas".
        return_lse: also return the log-sum-exp of each row, ``[*B, T, N]`` float32.
        return_weights: also return the weights, ``[*B, N, T, S]`` float32, before dropout (dense only).
        pages: a block table. k and v are then pools ``[P, page, K, ·]``, and batch row b sees the pages ``pages[b, 0]``,
            ``pages[b, 1]``, ... one after the other, S = M · page; -1 stands for none, and ``kv_positions`` must hide its
            slots. TPU kernels read pages of a multiple of 128 where they lie (no derivative); all else gathers them first.

    Returns:
        ``out [*B, T, N, Hv]`` in the type of ``v`` (of ``q`` where v is quantized), or a tuple ``(out, lse, weights)`` of what
        was asked for. A query that sees nothing gets zeros, an lse of -inf, and zero gradients.

    Raises:
        ValueError: shapes that do not fit, an unknown backend, or a named backend that cannot run this.
        TypeError: arguments of the wrong kind.

    Logits and statistics are float32 whatever the inputs. "dense" differentiates to any order and in forward mode;
    "blockwise" and "pallas" once, in reverse mode.
    """
    request, lead = make_request(
        q, k, v, mask=mask, bias=bias, score=score, weights=weights, scale=scale, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, q_positions=q_positions, kv_positions=kv_positions, block_sizes=block_sizes,
        return_lse=return_lse, return_weights=return_weights, pages=pages,
    )  # fmt: skip
    result = _run(request, backend)
    out = result.out.astype(request.v.dtype if request.scales[1] is None else request.q.dtype)
    returned = [out.reshape(*lead, *out.shape[1:])]
    if return_lse:
        lse = jnp.moveaxis(result.lse, 1, 2)
        returned.append(lse.reshape(*lead, *lse.shape[1:]))
    if return_weights:
        returned.append(result.weights.reshape(*lead, *result.weights.shape[1:]))
    return returned[0] if len(returned) == 1 else tuple(returned)


def _run(request: Request, backend: str) -> Any:
    if not pallas.reads_pages(request):
        request = request.gathered()
    if not pallas.reads_narrow(request):
        request = request.widened()
    if not isinstance(request.weights, Mixture):
        uniform = not request.weights.reads_logits and request.score is None
        if uniform:
            # Any finite logits do. (Zeros would do too, but compilers multiply constants out while they compile.)
            request = request.gathered()
            request = dataclasses.replace(request, q=request.q[..., :1], k=request.k[..., :1])
        divided = context_division(request.geometry)
        if isinstance(request.weights, Thresholded):
            name, _ = choose(request, backend, refusals(request) if divided is None else context.refusals(request, *divided))
            if by_tiles(name):
                held = None if divided is not None else getattr(BACKENDS[name], "thresholds", None)
                return passes.run(request, lambda r: _run(r, name), held)
        if divided is not None:
            return context.run(request, backend, *divided)
        if uniform and _rows_are_alike(request):
            one = dataclasses.replace(request.geometry, queries=1, q_positions=None)
            row = _run(dataclasses.replace(request, q=request.q[:, :1], geometry=one), backend)
            return _repeated(row, request.geometry.queries)
        reasons = refusals(request)
        name, reason = choose(request, backend, reasons)
        if uniform and (counts := _prefixes(request)) is not None:
            record(name, "uniform weights over the first keys are running means, of which no backend is asked", reasons)
            return _prefix_means(request.v, counts, request.geometry)
        record(name, reason, reasons)
        return BACKENDS[name].run(request if name == "pallas" else request.gathered().widened())
    if request.return_lse:
        raise ValueError(f"return_lse: {request.weights} has no log-sum-exp; leave it out, or use softmax weights")
    parts, heads, given = [], request.geometry.heads, request.weights.parts()
    # What is known to count for nothing is not computed.
    for coefficient, weights in [part for part in given if not _is_zero(part[0])] or given[:1]:
        c = jnp.asarray(coefficient, jnp.float32)
        if c.shape not in ((), (heads,)):
            raise ValueError(
                f"weights: {request.weights} mixes by {c.shape} numbers; give one, or one for each of {heads} heads"
            )
        part = _run(dataclasses.replace(request, weights=weights), backend)
        parts.append(part._replace(
            out=part.out * c.reshape(-1, 1),
            lse=None,
            weights=part.weights * c.reshape(-1, 1, 1) if request.return_weights else None,
        ))  # fmt: skip
    return jax.tree.map(lambda *xs: sum(xs), *parts)


def _rows_are_alike(r: Request) -> bool:
    """Whether all rows of weights that depend on what is visible alone are the same: one of several will do."""
    return r.geometry.queries > 1 and r.mask is None and r.dropout is None and r.geometry.kv_positions is None


def _repeated(row: Result, queries: int) -> Result:
    """One row of results for each of so many queries."""
    lse, weights = (None if x is None else jnp.repeat(x, queries, 2) for x in (row.lse, row.weights))
    return Result(jnp.repeat(row.out, queries, 1), lse, weights)


def _prefixes(r: Request) -> np.ndarray | None:
    """How many keys each row sees, int ``[B|1, T]``, where all rows are known to see the first so many; None elsewhere."""
    g = r.geometry
    if r.mask is None or r.dropout is not None or r.return_weights or g.kv_positions is not None:
        return None
    runs = r.mask.intervals(g)
    if runs is None or not (runs.known and runs.exact) or runs.lo.shape[1] > 1 or runs.runs > 1 or (runs.lo > 0).any():
        return None
    counts = np.clip(runs.hi[:, 0, :, 0], 0, g.keys)
    return np.broadcast_to(counts, (len(counts), g.queries))


def _prefix_means(v: Array, counts: np.ndarray, g: Geometry) -> Result:
    """The mean of the first ``counts`` values for every row, by one running sum over the keys instead of T×S weights."""
    # Not cumsum, which may be lowered to S² adds.
    sums = jnp.pad(jax.lax.associative_scan(jnp.add, v.astype(jnp.float32), axis=1), ((0, 0), (1, 0), (0, 0), (0, 0)))
    means = jnp.take_along_axis(sums, counts[..., None, None], axis=1) / np.maximum(counts, 1)[..., None, None]
    lse = jnp.log(counts.astype(np.float32))[:, None]  # of nothing, -inf
    return Result(jnp.repeat(means, g.heads // g.kv_heads, axis=2), jnp.broadcast_to(lse, (g.batch, g.heads, g.queries)))


def _is_zero(coefficient: Any) -> bool:
    return isinstance(coefficient, int | float) and coefficient == 0


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What ``attention`` would do with the same arguments; across: what moves between devices that divide the tokens."""

    backend: str
    reason: str
    refused: dict[str, str]
    block_map: BlockMap | None
    mask: str
    score: str
    weights: str
    across: str | None = None

    def __str__(self) -> str:
        lines = [f"backend: {self.backend} ({self.reason})"]
        lines += [f"  {name} cannot: {why}" for name, why in self.refused.items()]
        lines += [f"mask: {self.mask}", f"score: {self.score}", f"weights: {self.weights}"]
        if self.block_map is not None:
            lines.append(f"tiles: {self.block_map}")
        if self.across is not None:
            lines.append(f"across the mesh: {self.across}")
        return "\n".join(lines)


def explain(q: Array, k: Array, v: Array, *, backend: str = "auto", **arguments: Any) -> Explanation:
    """Which backend ``attention`` takes for these arguments and why, which cannot run them, and which tiles are visited.

    Takes what :func:`attention` takes; computes nothing of the attention itself. Also accepts ``jax.ShapeDtypeStruct`` for
    q, k and v.
    """
    absent = ("mask", "bias", "score", "scale", "dropout_rng", "q_positions", "kv_positions", "block_sizes", "pages")
    defaults: dict[str, Any] = dict.fromkeys(absent) | {
        "weights": softmax, "dropout_rate": 0.0, "return_lse": False, "return_weights": False,
    }  # fmt: skip
    for name in arguments:
        if name not in defaults:
            raise unknown("argument", name, defaults)
    q, k, v = (jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x for x in (q, k, v))
    r, _ = make_request(q, k, v, **(defaults | arguments))
    parts = [w for _, w in r.weights.parts()] if isinstance(r.weights, Mixture) else [r.weights]
    r = dataclasses.replace(r if pallas.reads_pages(r) else r.gathered(), weights=parts[0])
    r = r if pallas.reads_narrow(r) else r.widened()
    divided = context_division(r.geometry)
    if divided is None:
        reasons, across = refusals(r), None
    else:
        reasons, across = context.refusals(r, *divided), context.describe(r, backend, *divided)
    name, reason = choose(r, backend, reasons)
    refused = {n: why for n, why in reasons.items() if why is not None}
    tiles = BACKENDS[name].map_of(r) if hasattr(BACKENDS[name], "map_of") else None
    shown = arguments.get("weights", softmax)
    return Explanation(name, reason, refused, tiles, str(r.mask), str(r.score), str(shown), across)
