"""Weight maps by themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.core.weights import softmax_rows


def test_derivatives_of_softmax_rows_are_those_of_its_steps():
    """To the second order, in float64, with cells and whole rows hidden, and with weights and log-sum-exp both in use."""

    def steps(s, ok):
        e = jnp.where(ok, jnp.exp(jnp.where(ok, s, 0)), 0)
        total = e.sum(-1, keepdims=True)
        safe = jnp.where(total > 0, total, 1)
        return e / safe, jnp.where(total > 0, jnp.log(safe), -jnp.inf)[..., 0]

    rng = np.random.default_rng(0)
    ok = rng.random((5, 7)) < 0.6
    ok[2] = False
    with jax.enable_x64(True):
        s, a, b = jnp.asarray(rng.normal(size=(5, 7))), jnp.asarray(rng.normal(size=(5, 7))), jnp.asarray(rng.normal(size=5))

        def loss(rows):
            def f(s):
                w, lse = rows(s, jnp.asarray(ok))
                return (a * w**2).sum() + jnp.where(jnp.isneginf(lse), 0, b * lse**2).sum()

            return f

        s = jnp.where(ok, s, -jnp.inf)
        first, second = jax.grad(loss(softmax_rows)), jax.hessian(loss(softmax_rows))
        finite = jnp.where(ok, s, 0.0)
        np.testing.assert_allclose(first(s), jax.grad(loss(steps))(finite), atol=1e-12)
        np.testing.assert_allclose(second(finite), jax.hessian(loss(steps))(finite), atol=1e-12)
        assert np.abs(first(s)).max() > 0.1
        _, forward = jax.jvp(loss(softmax_rows), (finite,), (a,))
        np.testing.assert_allclose(forward, (first(finite) * a).sum(), rtol=1e-12)
