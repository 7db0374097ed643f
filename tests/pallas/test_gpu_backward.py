"""The GPU kernels' derivatives, simulated, against those of the definition in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu.attend import Lists, attend
from pallas_kernels.gpu.launch import simulation
from pallas_kernels.gpu.tiles import make_tiles
from pallas_kernels.tpu.problem import LOG2E
from tests.pallas.gpu_cases import case, causal, numbers, segment_operands, segments, some_dropout

CASES = {
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
    "wide heads": lambda: case(
        block_k=128, width=128, value_width=128, score=lambda x, b, h, t, s: jnp.tanh(x) * x, mask=causal
    ),
    "pointwise weights": lambda: case(block_k=128, phi=lambda x: x * x, mask=causal),
    "dropout": lambda: case(block_k=128, keep=some_dropout),
}  # fmt: skip


def dense(c, q, k, v, scores, masks):
    """(out, lse) from the definition."""
    p = c.p
    b, h, t, s = np.ogrid[: p.batch, : p.heads, : p.queries, : p.keys]
    k, v = (jnp.repeat(x, p.group, axis=2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q, k) / (LOG2E if p.base2 else 1.0)
    x = x if p.score is None else p.score(x, b, h, t, s, *scores)
    ok = jnp.broadcast_to(True if p.mask is None else p.mask(b, h, t, s, *masks), x.shape)
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
    """(simulated, defined) gradients in q, k, v and the score's operands of one random combination of the results."""
    p, x = c.p, c.x
    d_out, d_lse = numbers(p.batch, p.queries, p.heads, x.v.shape[-1]), numbers(p.batch, p.heads, p.queries, seed=5)
    d_out = np.asarray(jnp.asarray(d_out, jnp.bfloat16), np.float32)
    d_lse = np.zeros_like(d_lse) if p.phi is not None else np.where(np.isneginf(c.lse), 0, d_lse)
    lists = Lists(*(make_tiles(s.reshape(-1, *s.shape[2:])) for s in (c.state, c.state.swapaxes(2, 3))))

    def kernels(q, k, v, scores):
        out, lse = attend(p, q, k, v, scores, (lists, x.mask, x.seed))
        out, lse = out[:, : p.queries], lse[:, :, : p.queries]
        return (out.astype(jnp.float32) * d_out).sum() + jnp.where(d_lse != 0, lse * d_lse, 0).sum()

    def definition(q, k, v, scores):
        out, lse = dense(c, q[:, : p.queries], k[:, : p.keys], v[:, : p.keys], scores, masks)
        return (out * d_out).sum() + (lse * d_lse).sum()

    with simulation():
        scores = tuple(map(jnp.asarray, c.score_operands))
        got = jax.block_until_ready(jax.jit(jax.grad(kernels, (0, 1, 2, 3)))(x.q, x.k, x.v, scores))
    with jax.enable_x64(True):
        wide = (jnp.asarray(np.asarray(a, np.float64)) for a in (x.q, x.k, x.v))
        want = jax.grad(definition, (0, 1, 2, 3))(
            *wide, tuple(jnp.asarray(np.asarray(a, np.float64)) for a in c.score_operands)
        )
    return jax.tree.leaves(got), jax.tree.leaves(want)


def check(c, masks=()):
    for got, want in zip(*gradients(c, masks), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, atol=2e-2 * abs(want).max())


def test_ragged_lengths():
    check(CASES["ragged lengths"]())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "ragged lengths"])
def test_agrees_with_the_definition(name):
    check(CASES[name](), segment_operands(1, 128, 256) if "packed" in name else ())


@pytest.mark.slow
def test_lists_made_at_run_time_give_the_same_bits():
    c = CASES["rows and columns without tiles"]()
    dynamic = dataclasses.replace(c, state=jnp.asarray(c.state))
    for a, b in zip(gradients(c, ())[0], gradients(dynamic, ())[0], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
