"""Arrays by distance for the GPU kernels: where their entries lie, and their gradients, which plain JAX makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.attention import attention
from pallas_kernels.gpu.distance import placed, table_gradients, turned
from pallas_kernels.gpu.launch import simulation
from pallas_kernels.tpu.problem import laid_out, taken_back
from tests.pallas.gpu_cases import BACKWARD_CASES, case, dense, numbers


@pytest.mark.parametrize("rows", [64, 128])
def test_tiles_are_rectangles(rows):
    """Upright and sideways, every tile holds the entries of its cells."""
    queries, keys = 200, 300
    table = numbers(2, queries + keys - 1)
    c = case(heads=2, queries=queries, keys=keys, score=lambda x, b, h, t, s, a: x + a, scores=(table,), block_k=128)
    (x,) = placed((laid_out(c.p, jnp.asarray(table), c.p.score_layouts[0]),), c.p.score_layouts, rows)
    padded = c.p.padded
    assert x.shape == (1, 2, rows, sum(padded))
    for first, other, array, sign in ((0, 1, np.asarray(x), 1), (1, 0, np.asarray(turned(x)), -1)):
        for start in range(0, padded[first], rows):
            for at in range(0, padded[other], 64):
                tile = array[0, :, :, padded[first] + at - start :][:, :, :64]
                down, across = start + np.arange(rows)[:, None], at + np.arange(64)
                t, s = (down, across) if sign == 1 else (across, down)
                t, s = np.broadcast_arrays(t, s)
                real = (t < queries) & (s < keys)
                np.testing.assert_array_equal(tile[:, real], table[:, (t - s + keys - 1)[real]])


@pytest.mark.parametrize("name", [name for name in BACKWARD_CASES if "distance" in name])
def test_gradients(name):
    c = BACKWARD_CASES[name]()
    p, x = c.p, c.x
    scores = tuple(map(jnp.asarray, c.score_operands))
    mine = [n for n, layout in enumerate(p.score_layouts) if layout.form == "distance"]
    q, k, v = (a.astype(jnp.float32)[:, :n] for a, n in ((x.q, p.queries), (x.k, p.keys), (x.v, p.keys)))
    d_out = jnp.asarray(numbers(*c.out.shape))

    def loss(scores):
        out, lse = dense(c, q, k, v, scores, ())
        return (out * d_out).sum() + (0 if p.phi is not None else (lse * 0.3).sum()), (out, lse)

    want, (out, lse) = jax.grad(loss, has_aux=True)(scores)
    rows = ((0, 0), (0, p.padded[0] - p.queries))
    delta = jnp.moveaxis((d_out * out).sum(-1), 1, 2) - (0 if p.phi is not None else 0.3)
    seen = jnp.isfinite(jnp.asarray(c.lse)) if c.lse is not None else jnp.ones(lse.shape, bool)
    norm = jnp.pad(jnp.where(seen, lse, jnp.inf), ((0, 0), *rows), constant_values=jnp.inf)
    inputs = x._replace(score=placed(x.score, p.score_layouts, 64), mask=placed(x.mask, p.mask_layouts, 64))
    d = jnp.pad(d_out, (*rows, (0, 0), (0, 0))).astype(x.v.dtype)
    found = jax.jit(lambda x: table_gradients(p, x, d, norm, jnp.pad(delta, ((0, 0), *rows)), mine))(inputs)
    for n in mine:
        got = taken_back(p, found[n], scores[n], p.score_layouts[n])
        np.testing.assert_allclose(got, want[n], atol=1e-2 * abs(want[n]).max())


@pytest.mark.slow
def test_relative_positions_of_a_call():
    """As in T5: values and gradients of `attention`, the table's among them."""
    q, k, v = (jnp.asarray(numbers(1, 140, n, 64, seed=n), jnp.bfloat16) for n in (2, 1, 1))
    table = jnp.asarray(numbers(2, 280))

    def loss(q, k, v, table, backend):
        out = attention(q, k, v, score=lambda s, b, h, t, u: s + table[h, t - u + 140], backend=backend).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True), static_argnums=4)
    with simulation():
        (_, out), found = jax.block_until_ready(both(q, k, v, table, "pallas"))
    (_, expected), wanted = both(q, k, v, table, "dense")
    np.testing.assert_allclose(out, expected, atol=2e-2)
    for a, b in zip(found, wanted, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=2e-2 * abs(b).max())
