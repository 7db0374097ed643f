"""What every mask, score and weight map of the zoo must hold. Found through the catalog."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo import catalog
from attnzoo.core.attention import attention, explain
from attnzoo.core.blocks import block_map
from attnzoo.core.cells import Geometry
from tests.core.oracle import oracle

B, T, N, K, H = 2, 24, 4, 2, 8
BLOCKS = (8, 5)
PAPERS = [catalog.exhibit(row.key) for row in catalog.papers(status="built")]


def examples(kind):
    found = [(f"{p.key}: {name}", make) for p in PAPERS for name, make in getattr(p, kind).items()]
    return pytest.mark.parametrize("make", [make for _, make in found], ids=[name for name, _ in found])


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))


def backends(qkv, **kw):
    """The names of all backends that can run this."""
    refused = explain(*qkv, **kw).refused
    return [name for name in ("dense", "blockwise") if name not in refused]


def run(qkv, backend, **kw):
    return jax.jit(lambda *x: attention(*x, backend=backend, block_sizes=BLOCKS, **kw))(*qkv)


@examples("masks")
class TestMasks:
    def test_block_map_agrees_with_the_cells(self, make):
        mask = make(T, T)
        cells = np.broadcast_to(np.asarray(mask.dense(T, batch=B, heads=N)), (B, N, T, T))
        made = block_map(mask, Geometry(B, N, K, T, T), *BLOCKS)
        assert made.exact
        states = np.broadcast_to(made.state, (B, N, *made.state.shape[2:]))
        for i in range(states.shape[2]):
            for j in range(states.shape[3]):
                tile = cells[:, :, i * BLOCKS[0] : (i + 1) * BLOCKS[0], j * BLOCKS[1] : (j + 1) * BLOCKS[1]]
                want = np.where(tile.all((2, 3)), 2, np.where(tile.any((2, 3)), 1, 0))
                np.testing.assert_array_equal(states[:, :, i, j], want)

    def test_every_backend_agrees_with_the_oracle(self, make, qkv):
        mask = make(T, T)
        out, _, _ = oracle(*qkv, np.asarray(mask.dense(T, batch=B, heads=N)))
        for backend in backends(qkv, mask=mask):
            np.testing.assert_allclose(run(qkv, backend, mask=mask), out, atol=3e-6)

    def test_is_a_pytree_and_prints(self, make):
        mask = make(T, T)
        np.testing.assert_array_equal(jax.jit(lambda m: m.dense(T))(mask), mask.dense(T))
        assert "object at 0x" not in repr(mask)


@examples("weights")
class TestWeights:
    def test_hidden_cells_get_exactly_nothing(self, make, qkv):
        ok = np.random.default_rng(1).random((B, N, T, T)) < 0.4
        ok[0, 1, 3] = False
        weights = run(qkv, "dense", mask=jnp.asarray(ok), weights=make(T, T), return_weights=True)[1]
        assert np.isfinite(weights).all()
        assert not np.asarray(weights)[~ok].any()

    def test_backends_agree_with_the_weights_they_name(self, make, qkv):
        ok = jnp.asarray(np.random.default_rng(1).random((B, N, T, T)) < 0.4)
        out, weights = run(qkv, "dense", mask=ok, weights=make(T, T), return_weights=True)
        values = np.repeat(np.asarray(qkv[2], np.float64), N // K, axis=2)
        mixed = np.einsum("bnts,bsnh->btnh", np.asarray(weights, np.float64), values)
        np.testing.assert_allclose(out, mixed, atol=3e-6)
        for backend in backends(qkv, weights=make(T, T)):
            np.testing.assert_allclose(run(qkv, backend, mask=ok, weights=make(T, T)), mixed, atol=3e-6)


@examples("scores")
class TestScores:
    def test_backends_agree_in_value_and_gradient(self, make, qkv):
        score = make(T, T)
        names = backends(qkv, score=score)
        outs = [run(qkv, backend, score=score) for backend in names]
        leaves, tree = jax.tree.flatten(score)

        def loss(leaves, backend):
            return (run(qkv, backend, score=jax.tree.unflatten(tree, leaves)) ** 2).sum()

        grads = [jax.grad(loss, allow_int=True)(leaves, backend) for backend in names]
        for out, grad in zip(outs[1:], grads[1:], strict=True):
            np.testing.assert_allclose(out, outs[0], atol=3e-6)
            for a, b in zip(grad, grads[0], strict=True):
                if a.dtype == jax.dtypes.float0:  # of an integer array there is none
                    continue
                np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)
