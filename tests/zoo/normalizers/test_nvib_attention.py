"""Denoising attention over a mixture of Gaussians: its identity, its limits, its divergences."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.cache import init_paged_cache
from attnzoo.core.masks import Causal, Lengths
from attnzoo.core.merge import merge_lse
from attnzoo.core.positions import RoPE
from attnzoo.models.encoder import Encoder, EncoderConfig
from attnzoo.nn.linear import dropout_arguments
from attnzoo.zoo.normalizers.nvib_attention import (
    PAPER,
    Components,
    NVAttention,
    NVIBLayer,
    Projection,
    denoising_attention_eval,
    denoising_attention_train,
    nv_empirical_prior,
    nv_identity_init,
    nv_reinterpret,
    nvib_kl_dirichlet,
    nvib_kl_gaussian,
    sample_components,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

B, T, S, N, K, H, P = 2, 5, 6, 4, 2, 8, 32
HIDDEN = -np.inf

STATIC = ("return_weights", "backend", "block_sizes")
evaluated = jax.jit(denoising_attention_eval, static_argnames=STATIC)
trained = jax.jit(denoising_attention_train, static_argnames=STATIC)
kl_gaussian, kl_dirichlet = (jax.jit(f, static_argnames="kappa") for f in (nvib_kl_gaussian, nvib_kl_dirichlet))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def parts(rng):
    """(q, components with the prior first, projections with biases), float64."""
    q = rng.normal(size=(B, T, N, H))
    mu, logvar = rng.normal(size=(B, S + 1, P)), rng.normal(size=(B, S + 1, P)) - 1
    log_alpha = rng.normal(size=(B, S + 1)) + 1
    shapes = ((P, K, H), (K, H), (P, K, H), (K, H))
    return q, Components(mu, logvar, log_alpha), Projection(*(rng.normal(size=s) * 0.3 for s in shapes))


def jaxed(tree):
    return jax.tree.map(jnp.asarray, tree)


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_eval(q, components, projection, ok):
    """The equations, one head at a time; ok [B, T, L]."""
    mu, logvar, log_alpha = components
    var, d, out, weights = np.exp(logvar), q.shape[-1], np.zeros(q.shape), []
    noisy = var + math.sqrt(d)
    alpha = np.where(np.exp(log_alpha) > 0.1, np.exp(log_alpha), 0)
    for n in range(N):
        w_k, b_k, w_v, b_v = (part[..., n // (N // K), :] for part in projection)
        u = q[:, :, n] @ w_k.T
        score = np.einsum("btp,blp->btl", u, mu / noisy) + (q[:, :, n] @ b_k)[..., None] / math.sqrt(d)
        with np.errstate(divide="ignore"):
            log_pi = np.log(alpha / alpha.sum(-1, keepdims=True))
        score += (log_pi - 0.5 * (mu**2 / noisy).sum(-1) - 0.5 * np.log(noisy).sum(-1))[:, None]
        a = softmax(np.where(ok, score, HIDDEN))
        zhat = np.einsum("btl,blp->btp", a, var / noisy) * u + np.einsum("btl,blp->btp", a, math.sqrt(d) * mu / noisy)
        out[:, :, n] = zhat @ w_v + b_v
        weights.append(a)
    return out, np.stack(weights, 1)


def plain_train(q, z, log_pi, projection, ok):
    """The equations, one head at a time."""
    d, out = q.shape[-1], np.zeros(q.shape)
    for n in range(N):
        w_k, b_k, w_v, b_v = (part[..., n // (N // K), :] for part in projection)
        score = np.einsum("bth,blh->btl", q[:, :, n], z @ w_k + b_k) / math.sqrt(d)
        score += (log_pi - (z**2).sum(-1) / (2 * math.sqrt(d)))[:, None]
        out[:, :, n] = softmax(np.where(ok, score, HIDDEN)) @ (z @ w_v + b_v)
    return out


def with_prior(mask):
    """A mask of tokens [B, T, S] as one of components: all see the prior."""
    return np.concatenate([np.ones((*mask.shape[:-1], 1), bool), mask], -1)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_both_forms_are_their_equations(parts, rng, backend):
    q, components, projection = parts
    mask = rng.random((B, T, S)) < 0.6
    mask[1, 2] = False  # sees the prior alone
    log_alpha = components.log_alpha.copy()
    log_alpha[:, 2] = math.log(0.05)
    components = components._replace(log_alpha=log_alpha)
    options = {"mask": jnp.asarray(mask)[:, None], "backend": backend, "block_sizes": (2, 3)}
    expected, _ = plain_eval(q, components, projection, with_prior(mask))
    got, _ = evaluated(*jaxed((q, components, projection)), **options)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    z, log_pi = components.mu, np.log(softmax(log_alpha))
    got, _ = trained(*jaxed((q, z, log_pi, projection)), **options)
    np.testing.assert_allclose(got, plain_train(q, z, log_pi, projection, with_prior(mask)), atol=1e-5)


def test_weights(parts, rng):
    q, components, projection = jaxed(parts)
    mask = jnp.asarray(rng.random((B, 1, T, S)) < 0.5).at[0, 0, 1].set(False)
    forms = (
        lambda c, mask: evaluated(q, c, projection, mask=mask, return_weights=True),
        lambda c, mask: trained(q, c.mu, c.log_alpha, projection, mask=mask, return_weights=True),
    )
    for form in forms:
        out, _, w = form(components, mask)
        assert w.shape == (B, N, T, S + 1)
        np.testing.assert_allclose(w.sum(-1), 1, atol=1e-5)
        assert not np.asarray(w[..., 1:])[~np.broadcast_to(mask, (B, N, T, S))].any()
        assert (np.asarray(w[..., 0]) > 0).all()
        np.testing.assert_allclose(w[0, :, 1, 0], 1, atol=1e-6)
        # Tokens in another order, with their columns of the mask.
        order = rng.permutation(S)
        moved = jax.tree.map(lambda x, order=order: jnp.concatenate([x[:, :1], x[:, 1:][:, order]], 1), components)
        np.testing.assert_allclose(form(moved, mask[..., order])[0], out, atol=2e-5)


@pytest.mark.usefixtures("x64")
def test_without_variance_the_closed_form_is_the_sampled_one(parts):
    q, components, projection = jaxed(parts)
    exact = components._replace(logvar=jnp.full_like(components.logvar, -200.0))
    closed, _ = evaluated(q, exact, projection)
    sampled, _ = trained(q, exact.mu, exact.log_alpha, projection)
    np.testing.assert_allclose(closed, sampled, atol=2e-6)


def test_extreme_priors(parts):
    q, components, projection = jaxed(parts)
    root = math.sqrt(H)
    u = jnp.einsum("btkgh,pkh->btkgp", q.reshape(B, T, K, -1, H), projection.w_k)

    def value(zhat):
        return (jnp.einsum("btkgp,pkh->btkgh", zhat, projection.w_v) + projection.b_v[:, None]).reshape(q.shape)

    var = jnp.exp(components.logvar[:, 0])[:, None, None, None]
    of_prior = value((var * u + root * components.mu[:, 0][:, None, None, None]) / (var + root))
    # tau_alpha -> -inf: no token is left.
    alone = components._replace(log_alpha=components.log_alpha.at[:, 1:].set(-1e9))
    np.testing.assert_allclose(evaluated(q, alone, projection)[0], of_prior, atol=1e-5)
    # tau_sigma -> inf: tokens vary so much that they explain nothing.
    vague = components._replace(logvar=components.logvar.at[:, 1:].set(40.0))
    np.testing.assert_allclose(evaluated(q, vague, projection)[0], of_prior, atol=1e-5)
    # Without the prior they leave the query as it is.
    vague = vague._replace(log_alpha=components.log_alpha.at[:, 0].set(-jnp.inf))
    np.testing.assert_allclose(evaluated(q, vague, projection)[0], value(u), rtol=1e-4, atol=1e-4)
    # And where nothing is left at all there is nothing.
    nothing = evaluated(q, vague, projection, mask=jnp.zeros((T, S), bool))[0]
    assert not np.asarray(nothing).any()


# --- reading a Transformer as one of these ---------------------------------------------------------------


def pair(rng, causal=False, **temperatures):
    """(standard attention, its reinterpretation, x), W ~ N(0, 1/P), float64."""
    options = {"num_kv_heads": K, "use_bias": True, "causal": causal, "param_dtype": jnp.float64}
    plain = GroupedQueryAttention(
        P, N, kernel_init=nnx.initializers.normal(P**-0.5), rngs=nnx.Rngs(int(rng.integers(99))), **options
    )
    x = jnp.asarray(rng.normal(size=(B, S, P)) * 1.2 + 0.3)
    mixer = NVAttention(P, N, rngs=nnx.Rngs(0), **options)
    params = nnx.state(plain, nnx.Param)
    nnx.update(mixer, nv_reinterpret(params, nv_empirical_prior(x, H), **temperatures))
    return plain, mixer, x


@nnx.jit
def run(model, x, memory=None):
    return model(x) if memory is None else model(x, memory=memory)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["self", "cross", "causal"])
def test_identity(rng, kind):
    for _ in range(3):
        tau_alpha = 30.0 if kind == "causal" else 20.0
        plain, mixer, x = pair(rng, kind == "causal", tau_alpha=tau_alpha)
        queries = jnp.asarray(rng.normal(size=(B, T, P))) if kind == "cross" else x
        memory = x if kind == "cross" else None
        np.testing.assert_allclose(run(mixer, queries, memory), run(plain, queries, memory), atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_the_prior_fades_with_tau_alpha(rng):
    plain, mixer, x = pair(rng)
    prior = mixer.nvib.prior
    expected = run(plain, x)
    weights = nnx.jit(lambda mixer, x: mixer.attention_weights(x))
    errors, shares = [], []
    for tau_alpha in (-3.0, 0.0, 5.0, 10.0):
        mixer.nvib.b_a[...] = tau_alpha * prior.log_alpha_sd
        errors.append(float(jnp.abs(run(mixer, x) - expected).max()))
        shares.append(float(weights(mixer, x)[..., 0].mean()))
    assert errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(shares))


@pytest.mark.usefixtures("x64")
def test_identity_parameters_and_empirical_prior(rng):
    x = rng.normal(size=(3, 7, P)) * 2 + 1
    where = rng.random((3, 7)) < 0.7
    prior = nv_empirical_prior(jnp.asarray(x), H, jnp.asarray(where))
    size = (x[where] ** 2).sum(-1) / (2 * math.sqrt(H))
    expected = (x[where].mean(0), x[where].var(0), size.mean(), size.std())
    for got, value in zip(prior, expected, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-12)

    found = nv_identity_init(prior, H, tau_mu=0.9, tau_sigma=0.5, tau_alpha=3.0)
    layer = NVIBLayer(P, H, prior=prior, tau_mu=0.9, tau_sigma=0.5, tau_alpha=3.0, param_dtype=jnp.float64)
    for name, value in found.items():
        np.testing.assert_array_equal(getattr(layer, name)[...], value)
    mu, logvar, log_alpha = layer(jnp.asarray(x))
    assert mu.shape == (3, 8, P) and log_alpha.shape == (3, 8)
    np.testing.assert_allclose(mu[:, 1:], 0.9 * x + 0.1 * prior.mu, atol=1e-12)
    np.testing.assert_allclose(jnp.exp(logvar[:, 1:]), jnp.broadcast_to(0.25 * prior.var, x.shape), rtol=1e-12)
    np.testing.assert_allclose(log_alpha[:, 1:], (x**2).sum(-1) / (2 * math.sqrt(H)) + 3 * prior.log_alpha_sd, atol=1e-12)
    for got, value in zip((mu, jnp.exp(logvar), log_alpha), prior, strict=False):
        np.testing.assert_allclose(got[:, 0], jnp.broadcast_to(value, got[:, 0].shape), atol=1e-12)


def test_a_whole_model_is_reinterpreted(rng):
    config = EncoderConfig(vocab_size=11, dim=32, num_layers=2, num_heads=4, max_length=9, positions="learned")
    plain = Encoder(config, rngs=nnx.Rngs(0))
    model = Encoder(EncoderConfig(**{**config.__dict__, "mixer": "nvib_attention"}), rngs=nnx.Rngs(1))
    tokens = jnp.asarray(rng.integers(0, 11, (3, 9)))
    x, priors = plain.positions(plain.embed(tokens), jnp.arange(9)), []
    for layer in plain.layers.runs:
        # With gains that are all equal, tokens would be of one length.
        layer.mixer_norm.scale[...] = jnp.asarray(rng.uniform(0.2, 2, 32), jnp.float32)
        priors.append(nv_empirical_prior(layer.mixer_norm(x), 8))
        x, _ = layer(x)
    state = nv_reinterpret(nnx.state(plain, nnx.Param), priors, tau_alpha=200.0)
    nnx.update(model, state)
    np.testing.assert_allclose(run(model, tokens), run(plain, tokens), atol=1e-4)
    # Pre-norm tokens are all about as long, so a small temperature already lets the prior in.
    nnx.update(model, nv_reinterpret(nnx.state(plain, nnx.Param), priors, tau_alpha=-5.0, tau_sigma=0.5))
    assert np.abs(run(model, tokens) - run(plain, tokens)).max() > 1e-2
    with pytest.raises(ValueError, match=r"priors: 2 attention layers.*got 1"):
        nv_reinterpret(nnx.state(plain, nnx.Param), priors[:1])
    stacked = Encoder(EncoderConfig(**{**config.__dict__, "scan_layers": True}), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="scan_layers=False"):
        nv_reinterpret(nnx.state(stacked, nnx.Param), priors[0])


# --- sampling --------------------------------------------------------------------------------------------


def test_training_is_its_equations(rng):
    """The samples of the components side by side, and each sample with dropout of its own."""
    options = {"num_kv_heads": K, "use_bias": True, "tau_sigma": 0.5, "tau_alpha": 1.0, "sample": True, "kappa": 2}
    mixer = NVAttention(P, N, dropout_rate=0.4, rngs=nnx.Rngs(0), **options)
    x, seen = jnp.asarray(rng.normal(size=(B, S, P)), jnp.float32), rng.random((B, S, S)) < 0.6
    z, log_pi = sample_components(nnx.clone(mixer.rngs)(), mixer.nvib(x), 2)
    key = dropout_arguments(nnx.clone(mixer.dropout))["dropout_rng"]
    q, ok = mixer.qkv.query(x), with_prior(seen)

    @nnx.jit
    def called(mixer, x):
        return mixer(x, mask=jnp.asarray(seen)[:, None])

    dropping = called(nnx.clone(mixer), x)
    mixer.dropout.deterministic = True
    side_by_side = [np.concatenate(np.float64(each), 1) for each in (z, log_pi)]
    arguments = jax.tree.map(np.float64, mixer.projection)
    plain = plain_train(np.float64(q), *side_by_side, arguments, np.concatenate([ok, ok], -1))
    np.testing.assert_allclose(called(mixer, x), mixer.out(jnp.asarray(plain, jnp.float32)), atol=1e-5)
    outs, lses = zip(*(
        denoising_attention_train(
            q, z[i], log_pi[i], mixer.projection, mask=jnp.asarray(seen)[:, None], dropout_rate=0.4,
            dropout_rng=jax.random.fold_in(key, i),
        )
        for i in range(2)
    ), strict=True)  # fmt: skip
    np.testing.assert_allclose(dropping, mixer.out(merge_lse(outs[0], lses[0], outs[1], lses[1])[0]), atol=1e-5)


def test_sampling_mixer(rng):
    options = {"causal": True, "tau_sigma": 0.3, "tau_alpha": 1.0, "rngs": nnx.Rngs(0)}
    mixer, closed = NVAttention(P, N, sample=True, kappa=2, **options), NVAttention(P, N, **{**options, "rngs": nnx.Rngs(0)})
    x = jnp.asarray(rng.normal(size=(B, S, P)), jnp.float32)

    @nnx.jit
    def loss(mixer, x):
        def of(mixer):
            return (mixer(x) ** 2).sum() + sum(part.sum() for part in mixer.kl(x))

        return nnx.value_and_grad(of)(mixer)

    first, gradients = loss(mixer, x)
    assert abs(float(first - loss(mixer, x)[0])) > 1e-3
    for name in ("W_mu", "b_mu", "W_s", "b_s", "w_2", "w_1", "b_a"):
        g = gradients.nvib[name][...]
        assert np.isfinite(g).all() and np.abs(g).max() > 0, name
    # Nobody sees the future in training either: the draws for the past are the same.
    again = [nnx.clone(mixer) for _ in range(2)]
    y, changed = (run(m, inputs) for m, inputs in zip(again, (x, x.at[:, 3:].add(1)), strict=True))
    np.testing.assert_allclose(changed[:, :3], y[:, :3], atol=1e-5)
    still = nnx.view(mixer, deterministic=True)
    np.testing.assert_array_equal(run(still, x), run(closed, x))
    assert np.abs(run(mixer, x) - run(closed, x)).max() > 1e-3  # the mixer itself goes on sampling
    mixer.eval()
    np.testing.assert_array_equal(run(mixer, x), run(closed, x))


def test_padding_in_the_mixer_divergence(rng):
    mixer = NVAttention(P, N, rngs=nnx.Rngs(0), tau_sigma=0.4)
    x = jnp.asarray(rng.normal(size=(1, S, P)), jnp.float32)
    kl = nnx.jit(lambda mixer, *a: mixer.kl(*a))
    whole, padded = kl(mixer, x[:, :4]), kl(mixer, x, jnp.arange(S)[None] < 4)
    for a, b in zip(whole, padded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_bfloat16_components_stay_finite(rng):
    mixer = NVAttention(P, N, causal=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(B, S, P)) * 30, jnp.bfloat16)
    y = nnx.jit(lambda mixer, x: mixer(x, mask=Lengths(jnp.array([0, S]))))(mixer, x)
    assert y.dtype == jnp.bfloat16 and bool(jnp.isfinite(y).all())


def test_caches(rng):
    mixer = NVAttention(P, N, causal=True, tau_alpha=1.0, tau_sigma=0.5, rngs=nnx.Rngs(0))
    assert mixer.cache_numbers_per_token() == 2 * P + 1
    x = jnp.asarray(rng.normal(size=(B, S, P)), jnp.float32)
    step = nnx.jit(lambda mixer, x, cache: mixer.prefill(x, cache))
    # In pages.
    cache = init_paged_cache(B, S, mixer.cache_spec(), page=4)
    _, cache = step(mixer, x[:, :5], cache)
    np.testing.assert_allclose(step(mixer, x[:, 5:], cache)[0], run(mixer, x)[:, 5:], atol=1e-5)
    # A slot that stands for two tokens is those two.
    twice = jnp.concatenate([x[:, :1], x[:, :1], x[:, 1:2]], 1)
    _, cache = step(mixer, x[:, :1], mixer.init_cache(B, 3))
    counted = dataclasses.replace(cache, w=2 * cache.w, weighted=True)
    np.testing.assert_allclose(step(mixer, x[:, 1:2], counted)[0], run(mixer, twice)[:, 2:], atol=1e-5)


def test_features_that_do_not_vary(rng):
    x = jnp.asarray(rng.normal(size=(3, S, P)), jnp.float32).at[..., 5].set(0.7)
    for given in (x, x[:1, :1]):  # one token alone has no variance at all
        prior = nv_empirical_prior(given, H)
        assert (np.asarray(prior.var) > 0).all()
        mixer = NVAttention(P, N, prior=prior, sample=True, rngs=nnx.Rngs(0))
        assert np.isfinite(run(mixer, given)).all()
        assert all(np.isfinite(part).all() for part in mixer.kl(given))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NVAttention(P, N, positions=RoPE(), rngs=nnx.Rngs(0)), "positions:.*rotate.*learned"),
        (lambda: NVAttention(P, N, kappa=0, rngs=nnx.Rngs(0)), "kappa.*got 0"),
        (lambda: NVIBLayer(P, H, prior=nv_empirical_prior(jnp.zeros((3, 8)), H)), r"prior:.*dim=32.*\(8,\)"),
        (lambda: nv_empirical_prior(jnp.zeros((3, 8)), H, jnp.zeros(3, bool)), r"where:.*one of the 3 tokens.*\(3, 8\)"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_wrong_projection(parts):
    q, components, projection = jaxed(parts)
    with pytest.raises(ValueError, match=r"projection:.*\(2, 5, 4, 4\).*P = 32, H = 4.*\(32, 2, 8\)"):
        denoising_attention_eval(q[..., :4], components, projection, mask=Causal())
    alone = jax.tree.map(lambda x: x[:, :1], components)
    for wrong in (alone, jax.tree.map(lambda x: x[:1], components), components._replace(log_alpha=components.log_alpha[:, 1:])):
        with pytest.raises(ValueError, match=r"components: q \(2, 5, 4, 8\).*B = 2.*at least one"):
            denoising_attention_eval(q, wrong, projection)
        with pytest.raises(ValueError, match=r"components: q \(2, 5, 4, 8\)"):
            denoising_attention_train(q, wrong.mu, wrong.log_alpha, projection)


def test_the_picture_is_drawn():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    PAPER.picture(axes)
    assert len(axes.lines) == 4
    assert all(np.isfinite(line.get_ydata()).all() for line in axes.lines)
