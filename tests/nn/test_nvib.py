"""Mixtures of Gaussians with pseudo-counts: their samples and divergences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import digamma, gammaln, polygamma

from attnzoo.nn.nvib import (
    Components,
    NVIBLayer,
    Prior,
    _log_gamma,
    nvib_kl_dirichlet,
    nvib_kl_gaussian,
    sample_components,
)

B, L, P = 2, 7, 32
kl_gaussian, kl_dirichlet = (jax.jit(f, static_argnames="kappa") for f in (nvib_kl_gaussian, nvib_kl_dirichlet))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def components(rng):
    """float64."""
    return Components(rng.normal(size=(B, L, P)), rng.normal(size=(B, L, P)) - 1, rng.normal(size=(B, L)) + 1)


@pytest.mark.parametrize("kappa", [1, 3])
def test_samples(components, kappa):
    components = jax.tree.map(lambda x: jnp.asarray(x[:1, :4], jnp.float32), components)
    keys = jax.random.split(jax.random.key(0), 4000)
    z, log_pi = jax.jit(jax.vmap(lambda key: sample_components(key, components, kappa)))(keys)
    assert z.shape == (4000, kappa, 1, 4, P) and log_pi.shape == (4000, kappa, 1, 4)
    pi = np.exp(np.float64(log_pi[:, :, 0]))
    np.testing.assert_allclose(pi.sum((1, 2)), 1, atol=1e-4)
    alpha = np.exp(np.float64(components.log_alpha[0]))
    share = alpha / alpha.sum()
    # The mean and variance of a Dirichlet, per component over its samples.
    np.testing.assert_allclose(pi.sum(1).mean(0), share, atol=0.02)
    np.testing.assert_allclose(pi.sum(1).var(0), share * (1 - share) / (alpha.sum() + 1), atol=5e-3)
    first = pi[:, 0] / pi.sum(1)
    np.testing.assert_allclose(first.mean(0), 1 / kappa, atol=0.03)
    spread = (kappa - 1) / (kappa**2 * (alpha + 1))
    np.testing.assert_allclose(first.var(0), spread, atol=0.01)
    sigma = np.exp(np.asarray(components.logvar[0]) / 2)
    np.testing.assert_allclose(z[:, 0, 0].mean(0), components.mu[0], atol=0.1 * sigma.max())
    np.testing.assert_allclose(z[:, 0, 0].std(0) / sigma, 1, atol=0.06)


def test_large_pseudo_counts_are_sampled_and_differentiated():
    """Beyond float32's range of alpha too, and without a seam where the way of sampling changes."""
    log_alpha = jnp.array([4.9, 5.1, 12.0, 22.0, 90.0])

    @jax.jit
    def drawn(key):
        log_g, slope = jax.jvp(lambda a: _log_gamma(key, a), (log_alpha,), (jnp.ones(5),))
        return log_g - log_alpha, slope

    apart, slope = (np.float64(x) for x in jax.vmap(drawn)(jax.random.split(jax.random.key(0), 20000)))
    alpha = np.exp(np.float64(log_alpha))
    sd = np.sqrt(polygamma(1, alpha))
    resolution = 4e-7 * np.asarray(log_alpha)  # of log alpha in float32
    assert (np.abs(apart.mean(0) - digamma(alpha) + np.log(alpha)) < 4 * sd / np.sqrt(20000) + resolution).all()
    np.testing.assert_allclose(apart.std(0), sd, rtol=0.03, atol=resolution.max())
    # E[d log G / d log alpha] = alpha trigamma(alpha); its spread is that of log G, nearly halved.
    assert (np.abs(slope.mean(0) - alpha * polygamma(1, alpha)) < 4 * sd / np.sqrt(20000) + 1e-6).all()
    np.testing.assert_allclose(slope.std(0), sd / 2, rtol=0.1, atol=1e-6)

    # The default layer: d log pi_i / d log alpha_i = 1 - pi_i where pseudo-counts are large.
    layer = NVIBLayer(64, 8)
    components = layer(jax.random.normal(jax.random.key(1), (1, 4, 64)))
    assert components.log_alpha[0, 1:].min() > 12

    @jax.jit
    def shares(log_alpha):
        return sample_components(jax.random.key(2), components._replace(log_alpha=log_alpha))[1][0, 0]

    log_pi, jacobian = shares(components.log_alpha), jax.jacobian(shares)(components.log_alpha)[:, 0]
    np.testing.assert_allclose(log_pi[1:], jax.nn.log_softmax(components.log_alpha[0])[1:], atol=0.02)
    np.testing.assert_allclose(np.diag(jacobian)[1:], 1 - np.exp(log_pi[1:]), atol=0.02)
    huge = jnp.array([[64.0, 90.0, 95.0, 110.0]])
    np.testing.assert_allclose(shares(huge), jax.nn.log_softmax(huge[0]), atol=1e-4)


def official_dirichlet(a, a_p, n, kappa):
    """The formula as it stands, in float64."""
    length = kappa * n
    kl = gammaln(a) - gammaln(a_p) + (a - a_p) * (digamma(a / length) - digamma(a))
    return (kl + length * (gammaln(a_p / length) - gammaln(a / length))) / n


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kappa", [1, 2])
def test_kl_dirichlet(rng, kappa):
    where = np.array([[True] * 7, [True] * 4 + [False] * 3])
    for _ in range(20):
        log_alpha, log_p, delta = rng.normal(size=(2, 7)) * 3, rng.normal() * 3, rng.random()
        a, n = np.where(where, np.exp(log_alpha), 0).sum(-1), where.sum(-1)
        expected = official_dirichlet(a, np.exp(log_p) + delta * (n - 1), n, kappa)
        got = kl_dirichlet(jnp.asarray(log_alpha), log_p, where=jnp.asarray(where), kappa=kappa, delta=delta)
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10)
        assert (np.asarray(got) >= 0).all()
    same = jnp.full((1, 5), math.log((np.exp(0.3) + 4) / 5))
    np.testing.assert_allclose(kl_dirichlet(same, 0.3), 0, atol=1e-12)
    gradient = jax.jit(jax.grad(lambda l: nvib_kl_dirichlet(l, 0.3).sum()))(same)
    np.testing.assert_allclose(gradient, 0, atol=1e-10)


def test_kl_dirichlet_keeps_its_digits_in_float32():
    """Where the formula as it stands subtracts numbers of 1e10."""
    for level in (5.0, 12.0, 20.0):
        log_alpha = np.float32(level + np.linspace(-1, 1, 9))[None]
        with jax.enable_x64(True):
            expected = kl_dirichlet(jnp.asarray(log_alpha, jnp.float64), level)
        np.testing.assert_allclose(kl_dirichlet(jnp.asarray(log_alpha), jnp.float32(level)), expected, rtol=1e-4)
    huge = jnp.full((1, 4), 500.0)
    value, gradient = jax.jit(jax.value_and_grad(lambda l: nvib_kl_dirichlet(l, 400.0).sum()))(huge)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_kl_gaussian(components, rng):
    prior = Prior(*map(jnp.asarray, (rng.normal(size=P), rng.random(P) + 0.5, 0.0, 1.0)))
    where = np.ones((B, L), bool)
    where[0, 4:] = False
    var = np.exp(components.logvar)
    each = var / prior.var + (components.mu - prior.mu) ** 2 / prior.var - 1 - np.log(var / prior.var)
    alpha = np.where(where, np.exp(components.log_alpha), 0)
    for kappa in (1, 3):
        expected = 0.5 * kappa * (alpha / alpha.sum(-1, keepdims=True) * each.mean(-1)).sum(-1)
        got = kl_gaussian(jax.tree.map(jnp.asarray, components), prior, where=jnp.asarray(where), kappa=kappa)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        assert (np.asarray(got) > 0).all()
    at_prior = Components(
        jnp.broadcast_to(prior.mu, (B, 3, P)), jnp.broadcast_to(jnp.log(prior.var), (B, 3, P)), jnp.zeros((B, 3))
    )
    np.testing.assert_allclose(kl_gaussian(at_prior, prior), 0, atol=1e-6)
    for other in (at_prior._replace(mu=at_prior.mu.at[0, 1, 2].add(0.5)), at_prior._replace(logvar=at_prior.logvar - 0.2)):
        assert float(kl_gaussian(other, prior)[0]) > 1e-4
