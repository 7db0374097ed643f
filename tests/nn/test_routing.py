"""Choices of routers and their losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.nn.routing import load_balance_loss, mean_over_tokens, router_z_loss, top_k_mask


def test_exactly_k_are_chosen_and_ties_go_to_the_lower():
    np.testing.assert_array_equal(top_k_mask(jnp.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]), 2), [[0, 1, 1], [1, 1, 0]])
    assert not top_k_mask(jnp.zeros((2, 3)), 0).any()


def test_z_loss(rng):
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    z = np.log(np.exp(logits).sum(-1)) ** 2
    np.testing.assert_allclose(router_z_loss(logits), z.mean(), rtol=1e-5)
    np.testing.assert_allclose(router_z_loss(logits, where=np.arange(4) < 3), z[:3].mean(), rtol=1e-5)
    np.testing.assert_allclose(router_z_loss(np.zeros((2, 5))), np.log(5) ** 2, rtol=1e-6)


def test_nobody_counts():
    none = jnp.zeros(3, bool)
    p = jnp.full((3, 2), 0.5)
    np.testing.assert_array_equal(mean_over_tokens(p, none), [0, 0])
    value, gradient = jax.value_and_grad(lambda p: load_balance_loss(p, p > 0.4, where=none))(p)
    assert value == 0 and not gradient.any()


def test_shapes_that_differ_are_said():
    with pytest.raises(ValueError, match=r"probabilities \(3, 2\).*active \(3, 4\)"):
        load_balance_loss(jnp.zeros((3, 2)), jnp.zeros((3, 4), bool))
    for where in (jnp.ones(1, bool), jnp.ones((3, 2), bool)):  # one entry would broadcast, and give the sum
        with pytest.raises(ValueError, match=r"where: needs an entry per row, \(3,\); got"):
            router_z_loss(jnp.zeros((3, 2)), where=where)
