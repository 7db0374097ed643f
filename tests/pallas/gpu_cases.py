"""Problems for the GPU kernels, and what they should give, in float64 from the definition."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gpu.attend import Lists, attend, forward
from pallas_kernels.gpu.distance import placed
from pallas_kernels.gpu.flash import Inputs
from pallas_kernels.gpu.launch import generation
from pallas_kernels.gpu.tiles import FULL, PARTIAL, SKIP, make_tiles
from pallas_kernels.gpu.warpgroup import lay_of
from pallas_kernels.tpu.problem import LOG2E, Layout, Problem, laid_out


@dataclasses.dataclass
class Case:
    p: Problem
    state: np.ndarray
    x: Inputs
    score_operands: tuple[Any, ...]
    out: np.ndarray
    lse: np.ndarray | None


def case(
    batch=1, heads=1, kv_heads=1, queries=128, keys=128, width=64, value_width=64, block_q=128, block_k=64, mask=None, masks=(),
    score=None, scores=(), phi=None, keep=None, by_head=False, seed=0,
) -> Case:  # fmt: skip
    """masks, scores: operands ``[B|1, N|1, T|1, S|1]``, or ``[N|1, T + S - 1]`` by distance. Tiles are as exact as the cells;
    lengths need not be whole blocks. by_head: keys and values lie as in caches."""
    rng = np.random.default_rng(seed)
    base = Problem(
        batch, heads, kv_heads, queries, keys, block_q, block_k, 64, block_k, mask, layouts(masks), score, layouts(scores),
        phi, keep, False, False,
    )  # fmt: skip
    rows, columns = base.padded
    q, k, v = (
        jnp.asarray(rng.normal(size=s), jnp.bfloat16)
        for s in ((batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, value_width))
    )
    scale = width**-0.5 * (LOG2E if base.base2 else 1.0)
    q = (q * scale).astype(jnp.bfloat16)
    b, h, t, s = np.ogrid[:batch, :heads, :queries, :keys]
    ok = np.broadcast_to(
        True if mask is None else np.asarray(mask(b, h, t, s, *spread(masks, queries, keys))), (batch, heads, queries, keys)
    )
    per_batch, per_head = bool((ok != ok[:1]).any()), bool((ok != ok[:, :1]).any())
    p = dataclasses.replace(base, per_batch=per_batch, per_head=per_head)
    lists = np.pad(ok[: batch if per_batch else 1, : heads if per_head else 1], ((0, 0), (0, 0), (0, 0), (0, columns - keys)))
    lists = np.pad(lists, ((0, 0), (0, 0), (0, rows - queries), (0, 0)), mode="edge")
    cells = lists.reshape(*lists.shape[:2], rows // block_q, block_q, columns // block_k, block_k).swapaxes(3, 4)
    state = np.where(cells.all((-1, -2)), FULL, np.where(cells.any((-1, -2)), PARTIAL, SKIP))

    qf, kf, vf = (np.asarray(x, np.float64) for x in (q, k, v))
    kf, vf = (np.repeat(x, heads // kv_heads, 2) for x in (kf, vf))
    logits = np.einsum("btnh,bsnh->bnts", qf, kf) / (LOG2E if base.base2 else 1.0)
    if score is not None:
        logits = np.asarray(score(logits, b, h, t, s, *spread(scores, queries, keys)), np.float64)
    if phi is not None:
        weights, lse = np.where(ok, np.asarray(phi(logits), np.float64), 0), None
    else:
        top = np.where(ok, logits, -np.inf).max(-1, keepdims=True)
        e = np.where(ok, np.exp(logits - np.where(np.isfinite(top), top, 0)), 0)
        total = e.sum(-1, keepdims=True)
        weights = e / np.where(total > 0, total, 1)
        with np.errstate(divide="ignore"):
            lse = (np.where(np.isfinite(top), top, 0) + np.log(total))[..., 0]
    if keep is not None:
        weights = weights * np.asarray(keep(jnp.int32(3), jnp.int32(4), b, h, t, s))
    out = np.einsum("bnts,bsnh->btnh", weights, vf)
    pad = [(0, 0), (0, rows - queries), (0, 0), (0, 0)], [(0, 0), (0, columns - keys), (0, 0), (0, 0)]
    # What lies past the end must not matter: the padding of keys is large, not zero.
    k, v = jnp.pad(k, pad[1], constant_values=9), jnp.pad(v, pad[1])
    if by_head:
        p, k, v = dataclasses.replace(p, keys_by_head=True), k.swapaxes(1, 2), v.swapaxes(1, 2)
    x = Inputs(
        jnp.pad(q, pad[0]), k, v,
        tuple(laid_out(p, jnp.asarray(o), layout) for o, layout in zip(scores, p.score_layouts, strict=True)),
        tuple(laid_out(p, jnp.asarray(o), layout) for o, layout in zip(masks, p.mask_layouts, strict=True)),
        jnp.array([3, 4, 0, 0, 0, 0], jnp.int32),
    )  # fmt: skip
    if keys != columns:
        state[..., -1] = np.where(state[..., -1] == FULL, PARTIAL, state[..., -1])
    return Case(p, state, x, tuple(scores), out, lse)


def layouts(operands) -> tuple[Layout, ...]:
    forms = {(False, False): "one", (True, False): "row", (False, True): "column", (True, True): "cell"}
    return tuple(
        Layout("distance", False, x.shape[0] > 1, x.dtype.kind != "f")
        if x.ndim == 2
        else Layout(forms[x.shape[2] > 1, x.shape[3] > 1], x.shape[0] > 1, x.shape[1] > 1, x.dtype.kind != "f")
        for x in operands
    )


def spread(operands, queries, keys):
    """Operands by distance with an entry for each cell, the others as they are."""
    t, s = np.ogrid[:queries, :keys]
    return [x[None, :, t - s + keys - 1] if x.ndim == 2 else x for x in operands]


def numbers(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def causal(b, h, t, s):
    return s <= t


def segments(b, h, t, s, mine, its):
    return (s <= t) & (mine == its)


def segment_operands(batch, queries, keys, seed=0):
    ids = np.sort(np.random.default_rng(seed).integers(0, 3, (batch, max(queries, keys))), axis=-1).astype(np.int32)
    return ids[:, None, :queries, None], ids[:, None, None, :keys]


def some_dropout(seed0, seed1, b, h, t, s):
    """A stand-in for dropout: keeps two of three cells, by arithmetic on their numbers and the seed."""
    return jnp.where((t * 7 + s * 5 + h * 3 + seed0 + seed1) % 3 != 0, 1.5, 0.0).astype(jnp.float32)


CASES = {
    "plain": lambda: case(queries=128, keys=128),
    "causal": lambda: case(queries=256, keys=256, mask=causal),
    "ragged lengths": lambda: case(queries=100, keys=90, mask=lambda b, h, t, s: s <= t + 20),
    "grouped heads, packed documents": lambda: case(batch=2, heads=2, mask=segments, masks=segment_operands(2, 128, 128)),
    "rows without tiles": lambda: case(queries=256, mask=lambda b, h, t, s: (s <= t) & (t >= 130)),
    "heads with masks of their own": lambda: case(heads=2, keys=192, mask=lambda b, h, t, s: s < 64 * (h + 1)),
    "cell mask": lambda: case(mask=lambda b, h, t, s, c: c != 0, masks=(numbers(1, 1, 128, 128) > 0.2,)),
    "cell bias": lambda: case(
        heads=2, score=lambda x, b, h, t, s, bias, one: x + bias * one, mask=causal,
        scores=(numbers(1, 2, 128, 128), numbers(1, 1, 1, 1)),
    ),
    "row and column scores": lambda: case(
        score=lambda x, b, h, t, s, row, column: jnp.tanh(x) * row + column,
        scores=(numbers(1, 1, 128, 1), numbers(1, 1, 1, 128, seed=2)),
    ),
    "by distance": lambda: case(
        heads=2, queries=150, keys=200, score=lambda x, b, h, t, s, table, row: x * row + table,
        scores=(numbers(2, 349), numbers(1, 1, 150, 1)),
        mask=lambda b, h, t, s, chosen: (chosen != 0) & (s <= t + 100), masks=(numbers(1, 349) > -0.5,),
    ),
    "pointwise weights": lambda: case(keys=90, phi=lambda x: x * x, mask=causal),
    "dropout": lambda: case(keep=some_dropout),
    "values of another width": lambda: case(width=128, value_width=64),
}  # fmt: skip


BACKWARD_CASES = {
    "ragged lengths": lambda: case(block_k=128, queries=100, keys=90, mask=lambda b, h, t, s: s <= t + 20),
    "grouped heads, packed documents": lambda: case(
        block_k=128, heads=2, queries=128, keys=256, mask=segments, masks=segment_operands(1, 128, 256)
    ),
    "rows and columns without tiles": lambda: case(
        block_k=128, queries=256, keys=256, mask=lambda b, h, t, s: (s <= t) & (t >= 130) & (s < 128)
    ),
    "scores with operands of every form": lambda: case(
        block_k=128, heads=2, mask=causal,
        score=lambda x, b, h, t, s, one, row, column, cell: jnp.tanh(x * one) * row + column * cell,
        scores=(numbers(1, 1, 1, 1), numbers(1, 2, 128, 1), numbers(1, 1, 1, 128, seed=2), numbers(1, 2, 128, 128, seed=3)),
    ),
    "by distance": lambda: case(
        block_k=128, batch=2, heads=2, queries=150, keys=200, mask=lambda b, h, t, s: s <= t + 60, keep=some_dropout,
        score=lambda x, b, h, t, s, table, column, shared: jnp.tanh(x * column) * shared + table,
        scores=(numbers(2, 349), numbers(1, 1, 1, 200, seed=2), numbers(1, 349, seed=3)),
    ),
    "by distance, pointwise weights": lambda: case(
        block_k=128, heads=2, score=lambda x, b, h, t, s, table: x + table, scores=(numbers(2, 255),), phi=lambda x: x * x,
        mask=lambda b, h, t, s: (s <= t) & (h + t > 3),
    ),
    "wide heads": lambda: case(
        block_k=128, width=128, value_width=128, score=lambda x, b, h, t, s: jnp.tanh(x) * x, mask=causal
    ),
    "pointwise weights": lambda: case(block_k=128, phi=lambda x: x * x, mask=causal),
    "dropout": lambda: case(block_k=128, keep=some_dropout),
}  # fmt: skip


def results(c, state=None, slots=2):
    """(out, lse) of the forward kernel as float64, without padding. state: tiles to visit instead of the exact ones; an array
    of JAX's makes their lists at run time."""
    state = c.state if state is None else state

    def run(x, state):
        rows = lay_of(generation()).rows
        x = x._replace(score=placed(x.score, c.p.score_layouts, rows), mask=placed(x.mask, c.p.mask_layouts, rows))
        return forward(c.p, make_tiles(state.reshape(-1, *state.shape[2:])), x, slots)

    known = isinstance(state, np.ndarray)
    out, lse = jax.block_until_ready(jax.jit(lambda x: run(x, state))(c.x) if known else jax.jit(run)(c.x, state))
    return np.asarray(out, np.float64)[:, : c.p.queries], np.asarray(lse, np.float64)[:, :, : c.p.queries]


def check_forward(c, out, lse):
    np.testing.assert_allclose(out, c.out, atol=1.2e-2 * abs(c.out).max())
    if c.lse is not None:
        np.testing.assert_allclose(lse, c.lse, atol=2e-5)


def dense(c, q, k, v, scores, masks):
    """(out, lse) from the definition."""
    p = c.p
    b, h, t, s = np.ogrid[: p.batch, : p.heads, : p.queries, : p.keys]
    k, v = (jnp.repeat(x, p.group, axis=2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) / (LOG2E if p.base2 else 1.0)
    x = x if p.score is None else p.score(x, b, h, t, s, *spread(scores, p.queries, p.keys))
    ok = jnp.broadcast_to(True if p.mask is None else p.mask(b, h, t, s, *spread(masks, p.queries, p.keys)), x.shape)
    if p.phi is not None:
        weights, lse = jnp.where(ok, p.phi(x), 0), jnp.zeros(x.shape[:3])
    else:
        seen = ok.any(-1)
        x = jnp.where(ok, x, -1e30)
        lse = jnp.where(seen, jax.nn.logsumexp(x, axis=-1), 0)
        weights = jnp.where(ok, jnp.exp(x - lse[..., None]), 0)
    if p.keep is not None:
        weights = weights * p.keep(jnp.int32(3), jnp.int32(4), b, h, t, s)
    return jnp.einsum("bnts,bsnh->btnh", weights, v), lse


def gradients(c, masks):
    """(computed, defined) gradients in q, k, v and the score's operands of one random combination of the results."""
    p, x = c.p, c.x
    d_out, d_lse = numbers(p.batch, p.queries, p.heads, x.v.shape[-1]), numbers(p.batch, p.heads, p.queries, seed=5)
    d_out = np.asarray(jnp.asarray(d_out, jnp.bfloat16), np.float32)
    d_lse = np.zeros_like(d_lse) if p.phi is not None else np.where(np.isneginf(c.lse), 0, d_lse)
    lists = Lists(*(make_tiles(s.reshape(-1, *s.shape[2:])) for s in (c.state, c.state.swapaxes(2, 3))))

    def kernels(q, k, v, scores):
        out, lse = attend(p, q, k, v, scores, (lists, x.mask, x.call))
        out, lse = out[:, : p.queries], lse[:, :, : p.queries]
        return (out.astype(jnp.float32) * d_out).sum() + jnp.where(d_lse != 0, lse * d_lse, 0).sum()

    def definition(q, k, v, scores):
        out, lse = dense(c, q[:, : p.queries], k[:, : p.keys], v[:, : p.keys], scores, masks)
        return (out * d_out).sum() + (lse * d_lse).sum()

    scores = tuple(map(jnp.asarray, c.score_operands))
    got = jax.block_until_ready(jax.jit(jax.grad(kernels, (0, 1, 2, 3)))(x.q, x.k, x.v, scores))
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a, np.float64)) for a in (x.q, x.k, x.v))
        want = jax.grad(definition, (0, 1, 2, 3))(
            *wide, tuple(jnp.asarray(np.asarray(a, np.float64)) for a in c.score_operands)
        )
    return jax.tree.leaves(got), jax.tree.leaves(want)


def check_gradients(computed, defined):
    for got, want in zip(computed, defined, strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, atol=2e-2 * abs(want).max())
