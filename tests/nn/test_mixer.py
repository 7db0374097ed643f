import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.masks import Causal, Lengths, Mask, Segments, Sinks
from attnzoo.nn.mixer import Mixer, both, document_ids, unbroken_runs
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

X = jax.random.normal(jax.random.key(0), (2, 6, 16))


def test_masks_of_every_kind_combine():
    array = jnp.arange(6) < jnp.array([4, 6])[:, None, None, None]
    masks = [Lengths(jnp.array([4, 6])), array, lambda b, h, q, k: k < jnp.where(b == 0, 4, 6)]
    for mask in masks:
        joint = both(Causal(), mask)
        assert isinstance(joint, Mask)
        expected = np.tril(np.ones((6, 6), bool)) & np.asarray(array)
        np.testing.assert_array_equal(
            jnp.broadcast_to(joint.dense(6, batch=2), (2, 1, 6, 6)), np.broadcast_to(expected, (2, 1, 6, 6))
        )
        assert both(None, mask) is mask
        assert both(mask, None) is mask
    assert both(None, None) is None


def test_documents_are_what_a_mask_demands():
    one, two = jnp.array([5, 5, 3, 3, 5, 5]), jnp.array([[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1]])
    joint = Segments(one) & Causal() & Segments(two)
    for mask in (None, one, Causal(), Segments(one) | Sinks(1), ~Segments(one), Segments(one, kv_ids=one)):
        assert not document_ids(mask)
    np.testing.assert_array_equal(unbroken_runs(document_ids(joint), 2, 6), [[0, 0, 1, 1, 2, 2], [0, 1, 2, 2, 3, 3]])
    assert unbroken_runs([], 2, 6) is None


def test_a_mixer_that_defines_nothing_says_so():
    mixer = Mixer()
    for call in (lambda: mixer(X), lambda: mixer.init_cache(2, 6), lambda: mixer.prefill(X, None)):
        with pytest.raises(NotImplementedError, match="Mixer"):
            call()


def test_numbers_per_token():
    mixer = GroupedQueryAttention(16, 4, num_kv_heads=2, causal=True, rngs=nnx.Rngs(0))
    assert mixer.cache_numbers_per_token() == 2 * 2 * 4


class LinenNet(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.Dense(16)(x)
        return nnx.bridge.ToLinen(GroupedQueryAttention, args=(16, 4), kwargs={"causal": True})(x)


def test_a_mixer_in_a_linen_network():
    net = LinenNet()
    variables = jax.jit(net.init)(jax.random.key(0), X)
    apply = jax.jit(net.apply)
    y = apply(variables, X)
    assert y.shape == X.shape

    def loss(params):
        return jnp.sum(net.apply({**variables, "params": params}, X) ** 2)

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(variables["params"]))
    assert len(gradients) == 6
    assert all(bool(jnp.isfinite(g).all() & (g != 0).any()) for g in gradients)
    # The past does not see the future here either.
    np.testing.assert_array_equal(apply(variables, X.at[:, 3:].set(0.0))[:, :3], y[:, :3])
