"""Random compositions of masks: block maps against the cells, every backend against the float64 oracle."""

from __future__ import annotations

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from attnzoo.core.attention import attention
from attnzoo.core.blocks import block_map
from attnzoo.core.cells import Geometry
from tests.core.compositions import SIZES, compositions
from tests.core.oracle import oracle


def inputs(z, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shapes = (
        (z.queries, z.heads, z.width),
        (z.keys, z.kv_heads, z.width),
        (z.keys, z.kv_heads, z.value_width),
    )
    return tuple(jnp.asarray(rng.normal(size=(z.batch, *s)), dtype) for s in shapes)


def run(z, pair, backend, **options):
    """Compiled: op by op, each tile of each row would be some hundred calls."""
    return jax.jit(lambda q, k, v: attention(q, k, v, mask=pair.mask, backend=backend, block_sizes=z.blocks, **options))


def states(cells, block_q, block_k):
    """The states of all tiles, cell by cell."""
    b, n, t, s = cells.shape
    out = np.zeros((b, n, -(-t // block_q), -(-s // block_k)), int)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            tile = cells[:, :, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
            out[:, :, i, j] = np.where(tile.all((2, 3)), 2, np.where(tile.any((2, 3)), 1, 0))
    return out


def check_map(z, pair, block_q, block_k):
    g = Geometry(z.batch, z.heads, z.kv_heads, z.queries, z.keys)
    bm = block_map(pair.mask, g, block_q, block_k)
    want = states(pair.cells, block_q, block_k)
    got = np.broadcast_to(bm.state, want.shape)
    if bm.exact:
        np.testing.assert_array_equal(got, want)
    else:  # may say partial where it is not, nothing else
        assert ((got == want) | (got == 1)).all(), (pair, got, want)
    # What the mask says of its tiles by itself may be less sharp, never wrong.
    alone = np.broadcast_to(np.asarray(pair.mask.tile_states(g, block_q, block_k)), want.shape)
    assert ((alone == want) | (alone == 1)).all(), (pair, alone, want)


# 125 compositions of each of the four problems: 500 in all
EACH = pytest.mark.parametrize("z", SIZES, ids=str)


class TestBlockMaps:
    @EACH
    @settings(max_examples=125)
    @given(data=st.data())
    def test_block_map_agrees_with_the_cells(self, z, data):
        pair = data.draw(compositions(z))
        check_map(z, pair, *data.draw(st.sampled_from([z.blocks, (4, 4), (z.queries, z.keys)])))

    @settings(max_examples=25)
    @given(st.data())
    def test_traced_masks_give_maps_that_hide_nothing(self, data):
        z = SIZES[0]
        pair = data.draw(compositions(z))
        leaves, tree = jax.tree.flatten(pair.mask)
        g = Geometry(z.batch, z.heads, z.kv_heads, z.queries, z.keys)

        def traced(leaves):
            return block_map(jax.tree.unflatten(tree, leaves), g, *z.blocks).state

        want = states(pair.cells, *z.blocks)
        got = np.broadcast_to(jax.jit(traced)(leaves), want.shape)
        assert ((got == want) | (got == 1)).all(), (pair, got, want)


class TestBackends:
    @EACH
    @settings(max_examples=125)
    @given(data=st.data())
    def test_every_backend_agrees_with_the_oracle(self, z, data):
        pair = data.draw(compositions(z))
        q, k, v = inputs(z)
        out, lse, _ = oracle(q, k, v, pair.cells)
        for backend in ("dense", "blockwise"):
            got = run(z, pair, backend, return_lse=True)(q, k, v)
            np.testing.assert_allclose(got[0], out, atol=3e-6, err_msg=f"{backend} {pair}")
            np.testing.assert_allclose(np.moveaxis(got[1], 2, 1), lse, atol=3e-6, err_msg=f"{backend} {pair}")
        hidden = ~pair.cells.any(-1)
        assert not np.asarray(got[0])[np.moveaxis(hidden, 1, 2)].any()

    @settings(max_examples=40)
    @given(st.data())
    def test_bfloat16(self, data):
        z = data.draw(st.sampled_from(SIZES))
        pair = data.draw(compositions(z))
        q, k, v = inputs(z, jnp.bfloat16)
        out, _, _ = oracle(q, k, v, pair.cells)  # of the rounded inputs
        for backend in ("dense", "blockwise"):
            got = run(z, pair, backend)(q, k, v)
            assert got.dtype == jnp.bfloat16
            # 2^-8 relative: the output's own rounding, and that of the weights in the dense product
            np.testing.assert_allclose(np.asarray(got, np.float64), out, atol=2e-2, rtol=2e-2)

    @settings(max_examples=25)
    @given(st.data())
    def test_gradients_agree_with_dense(self, data):
        z = data.draw(st.sampled_from(SIZES[:2]))
        pair = data.draw(compositions(z))
        q, k, v = inputs(z)
        bias = jnp.asarray(np.random.default_rng(2).normal(size=(1, z.heads, z.queries, z.keys)), jnp.float32)

        def loss(q, k, v, bias, backend):
            out, lse = attention(q, k, v, mask=pair.mask, bias=bias, backend=backend, block_sizes=z.blocks, return_lse=True)
            return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

        gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3)), static_argnums=4)
        dense, blockwise = (gradient(q, k, v, bias, backend) for backend in ("dense", "blockwise"))
        for name, a, b in zip(("q", "k", "v", "bias"), dense, blockwise, strict=True):
            assert np.isfinite(np.asarray(a)).all()
            np.testing.assert_allclose(b, a, atol=2e-5, rtol=1e-5, err_msg=f"d{name} {pair}")


@settings(max_examples=12)
@given(data=st.data())
def test_traced_masks(data):
    """The same with the mask's arrays as arguments, so that the block map is made as it runs."""
    z = data.draw(st.sampled_from(SIZES[:3]))
    pair = data.draw(compositions(z))
    q, k, v = inputs(z)
    out, _, _ = oracle(q, k, v, pair.cells)
    leaves, tree = jax.tree.flatten(pair.mask)

    @jax.jit
    def traced(leaves, q, k, v):
        return attention(q, k, v, mask=jax.tree.unflatten(tree, leaves), backend="blockwise", block_sizes=z.blocks)

    np.testing.assert_allclose(traced(leaves, q, k, v), out, atol=3e-6, err_msg=str(pair))
