"""Norms, feed-forward networks and embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.nn.embed import Embed, LearnedPositions, PatchEmbed, Readout
from attnzoo.nn.feed_forward import feed_forward
from attnzoo.nn.linear import parameter_count
from attnzoo.nn.norms import norm

X = jax.random.normal(jax.random.key(0), (2, 3, 16)) * 3 + 1


def test_norms():
    rms = norm("rms", 16, rngs=nnx.Rngs(0))(X)
    np.testing.assert_allclose(jnp.mean(rms**2, axis=-1), 1, atol=1e-4)
    layer = norm("layer", 16, rngs=nnx.Rngs(0))(X)
    np.testing.assert_allclose(layer.mean(axis=-1), 0, atol=1e-5)
    np.testing.assert_allclose(layer.std(axis=-1), 1, atol=1e-3)
    assert norm("layer", 16, epsilon=1e-5, rngs=nnx.Rngs(0)).epsilon == 1e-5
    with pytest.raises(ValueError, match="unknown norm 'rmsnorm'"):
        norm("rmsnorm", 16, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["relu", "gelu", "silu", "swiglu"])
def test_feed_forward(kind):
    network = feed_forward(kind, 16, use_bias=False, rngs=nnx.Rngs(0))
    up = network.up(X)
    if kind == "swiglu":
        assert network.up.kernel.shape == (16, 48)
        hidden = jax.nn.silu(network.gate(X)) * up
    else:
        assert network.up.kernel.shape == (16, 64)
        hidden = getattr(jax.nn, kind)(up)
    np.testing.assert_allclose(network(X), hidden @ network.down.kernel[...], atol=1e-5)


def test_feed_forward_options():
    network = feed_forward("relu", 16, 24, use_bias=True, dropout_rate=0.5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert parameter_count(network) == 2 * 16 * 24 + 24 + 16
    assert not np.array_equal(network(X), network(X))
    network.eval()
    assert network(X).dtype == jnp.bfloat16
    np.testing.assert_array_equal(network(X), network(X))
    with pytest.raises(ValueError, match="unknown mlp 'swish'"):
        feed_forward("swish", 16, rngs=nnx.Rngs(0))


def test_embedding_and_tied_logits():
    embed = Embed(50, 16, rngs=nnx.Rngs(0))
    tokens = jnp.array([[0, 49, 7]])
    np.testing.assert_allclose(embed(tokens), embed.table[...][tokens] * 4.0, rtol=1e-6)
    np.testing.assert_array_equal(embed(jnp.array([[50]])), embed(jnp.array([[49]])))
    np.testing.assert_allclose(embed.attend(X), X @ embed.table[...].T, atol=1e-4)
    low = Embed(50, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert (low(tokens).dtype, low.attend(X).dtype) == (jnp.bfloat16, jnp.float32)
    assert Readout(16, 50, rngs=nnx.Rngs(0)).attend(X).shape == (2, 3, 50)


def test_learned_positions():
    table = LearnedPositions(5, 16, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(table(jnp.array([[4, 0]]))[0], table.table[...][jnp.array([4, 0])])
    with pytest.raises(ValueError, match="length=5"):
        table(jnp.arange(6))


def test_patches_are_row_major():
    layer = PatchEmbed(2, 3, 16, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (2, 4, 6, 3))
    tokens = layer(images)
    assert tokens.shape == (2, 6, 16)
    second = images[:, 0:2, 2:4].reshape(2, -1)  # the second patch of the first row
    np.testing.assert_allclose(tokens[:, 1], layer.proj(second), atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 2"):
        layer(images[:, :3])
