"""Relaxed attention: the blend, its fused form, and when a mixer relaxes."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention
from attnzoo.core.masks import Causal, Lengths, SlidingWindow
from attnzoo.core.positions import RoPE
from attnzoo.core.weights import Relaxed
from attnzoo.zoo.normalizers.relaxed_attention import (
    RelaxedAttention,
    relax_weights,
    sample_fuzzy_gamma,
    shallow_fusion_logits,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention
from tests.core.oracle import oracle

B, N, K, T, S, H = 2, 4, 2, 7, 9, 8
GAMMAS = (0.0, 0.05, 0.2, 0.35, 0.7, 1.0)
LENGTHS = jnp.array([5, 9])
MASKS = {"full": None, "causal": Causal(S - T), "padded": Lengths(LENGTHS), "both": Causal(S - T) & Lengths(LENGTHS)}


def cells(mask):
    ok = np.ones((1, 1, T, S), bool) if mask is None else mask.dense(T, S, batch=B, heads=N)
    return np.broadcast_to(ok, (B, N, T, S))


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))


@pytest.fixture
def rows(rng):
    """(weights that sum to 1 over the visible keys, what is visible), one row seeing nothing."""
    ok = rng.random((B, N, T, S)) < 0.6
    ok[1, 2, 3] = False
    e = np.where(ok, np.exp(rng.normal(size=ok.shape)), 0)
    return jnp.asarray(e / np.maximum(e.sum(-1, keepdims=True), 1e-9), jnp.float32), ok


def test_nothing_and_everything(rows):
    w, ok = rows
    np.testing.assert_array_equal(relax_weights(w, 0.0, ok), w)
    np.testing.assert_array_equal(relax_weights(w, 0.0), w)
    uniform = np.where(ok, 1 / np.maximum(ok.sum(-1, keepdims=True), 1), 0)
    np.testing.assert_array_equal(relax_weights(w, 1.0, ok), np.float32(uniform))
    np.testing.assert_array_equal(relax_weights(w, 1.0), np.full(w.shape, np.float32(1 / S)))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_rows(rows, gamma):
    w, ok = rows
    n = ok.sum(-1, keepdims=True)
    relaxed = np.asarray(relax_weights(w, gamma, ok))
    expected = np.where(ok, (1 - gamma) * np.asarray(w, np.float64) + gamma / np.maximum(n, 1), 0)
    np.testing.assert_allclose(relaxed, expected, atol=1e-7)
    np.testing.assert_allclose(relaxed.sum(-1), ok.any(-1), atol=1e-6)
    assert not relaxed[~ok].any()
    assert not relaxed[1, 2, 3].any()
    floor = np.broadcast_to(gamma / np.maximum(n, 1), ok.shape)
    assert (relaxed >= floor - 1e-7)[ok].all()
    assert (relaxed <= 1 - gamma + floor + 1e-7)[ok].all()


def test_entropy_does_not_fall(rows):
    w, ok = rows

    def entropy(gamma):
        p = np.asarray(relax_weights(w, gamma, ok), np.float64)
        return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)

    entropies = [entropy(gamma) for gamma in GAMMAS]
    for lower, higher in itertools.pairwise(entropies):
        assert (higher >= lower - 1e-7).all()
    np.testing.assert_allclose(entropies[-1], np.log(np.maximum(ok.sum(-1), 1)), atol=1e-6)


def test_a_gamma_per_head(rows):
    w, ok = rows
    gammas = np.float32([0.0, 0.1, 0.5, 1.0])
    relaxed = relax_weights(w, jnp.asarray(gammas), ok)
    for head, gamma in enumerate(gammas.tolist()):
        np.testing.assert_allclose(relaxed[:, head], relax_weights(w, gamma, ok)[:, head], atol=1e-7)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("name", MASKS)
def test_fused_form(qkv, backend, name):
    mask = MASKS[name]
    fused = jax.jit(
        lambda *x: attention(*x, mask=mask, weights=Relaxed(0.3), backend=backend, block_sizes=(4, 4)),
    )(*qkv)
    ok = cells(mask)
    plain, _, w = oracle(*qkv, ok)
    v = np.repeat(np.asarray(qkv[2], np.float64), N // K, axis=2)
    mean = np.einsum("bnts,bsnh->btnh", ok / np.maximum(ok.sum(-1, keepdims=True), 1), v)
    np.testing.assert_allclose(fused, 0.7 * plain + 0.3 * mean, atol=1e-5)
    by_rows = np.einsum("bnts,bsnh->btnh", relax_weights(jnp.asarray(w, jnp.float32), 0.3, ok), v)
    np.testing.assert_allclose(fused, by_rows, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "both"])
def test_fused_form_at_its_ends_and_its_gradients(qkv, rng, name):
    """Against the rows of weights themselves, on every backend that a CPU has."""
    mask, gammas = MASKS[name], jnp.array([0.0, 0.3, 0.7, 1.0])
    ok, upstream = jnp.asarray(cells(mask)), jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)

    def by_rows(q, k, v, gamma):
        w = attention(q, k, v, mask=mask, backend="dense", return_weights=True)[1]
        return jnp.einsum("bnts,bsnh->btnh", relax_weights(w, gamma, ok), jnp.repeat(v, N // K, axis=2))

    def slopes(f, gamma):
        return jax.jit(jax.grad(lambda *x: (upstream * f(*x)).sum(), (0, 1, 2, 3)))(*qkv, gamma)

    expected = slopes(by_rows, gammas)
    for backend in ("dense", "blockwise"):

        def fused(q, k, v, gamma, backend=backend):
            return attention(q, k, v, mask=mask, weights=Relaxed(gamma), backend=backend, block_sizes=(4, 4))

        for got, wanted in zip(slopes(fused, gammas), expected, strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-5)
        for gamma in (0.0, 1.0):  # known, so that one of the two parts is left out
            np.testing.assert_allclose(fused(*qkv, gamma), by_rows(*qkv, gamma), atol=1e-5)


def test_fused_form_computes_no_more_than_it_has_to():
    x = jnp.zeros((1, 512, 2, 16))

    def flops(mask, **options):
        f = jax.jit(lambda q, k, v: attention(q, k, v, mask=mask, backend="dense", **options))
        return f.lower(x, x, x).cost_analysis()["flops"]

    for mask, gamma, most in ((None, 0.3, 1.1), (Causal(), 0.0, 1.01), (Causal(), 0.3, 1.1), (SlidingWindow(9), 0.3, 2.0)):
        assert flops(mask, weights=Relaxed(gamma)) < most * flops(mask)


def test_fused_form_holds_no_row_of_weights():
    length, block = 1024, 128
    x = jnp.zeros((1, length, 1, 4))

    def loss(q, k, v):
        return attention(q, k, v, mask=Causal(), weights=Relaxed(0.3), backend="blockwise", block_sizes=(block, block)).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)]
    assert block * block <= max(sizes) < length * length / 4


def test_dropout_comes_last(qkv):
    q, k, _ = qkv
    q, rate = q[:, :, :K], 0.4
    values = jnp.broadcast_to(jnp.eye(S)[:, None, :], (B, S, K, S))  # so that the output is the weights
    whole, dropped = (
        attention(q, k, values, mask=Causal(S - T), weights=Relaxed(0.5), **kw)
        for kw in ({}, {"dropout_rate": rate, "dropout_rng": jax.random.key(0)})
    )
    kept = np.asarray(dropped != 0)
    assert 0.5 < kept[np.asarray(whole) > 0].mean() < 0.7
    np.testing.assert_allclose(dropped, np.where(kept, whole / (1 - rate), 0), atol=1e-6)


def test_gradient_shrinks_by_gamma(rng):
    s, upstream = (jnp.asarray(rng.normal(size=(B, N, T, S)), jnp.float32) for _ in range(2))
    ok = jnp.asarray(cells(MASKS["both"]))

    @jax.jit
    def gradient(gamma):
        def weights(s):
            return relax_weights(jax.nn.softmax(jnp.where(ok, s, -1e9)), gamma, ok)

        return jax.vjp(weights, s)[1](upstream)[0]

    plain = gradient(0.0)
    assert np.abs(plain).max() > 0.1
    for gamma in (0.1, 0.3, 1.0):
        np.testing.assert_allclose(gradient(gamma), (1 - gamma) * plain, atol=1e-7)


# --- when a mixer relaxes --------------------------------------------------------------------------------


@nnx.jit
def run(mixer, x, memory=None):
    return mixer(x) if memory is None else mixer(x, memory=memory)


def pair(causal=False, **options):
    """(plain, relaxed) with the same parameters."""
    shared = {"num_kv_heads": 2, "causal": causal}
    plain = GroupedQueryAttention(16, 4, rngs=nnx.Rngs(0), **shared)
    return plain, RelaxedAttention(16, 4, rngs=nnx.Rngs(0), **shared, **options)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(3), (2, 6, 16))


def test_training_only_unless_matched(x):
    for mode, in_training, in_inference in (("train", True, False), ("matched", True, True), ("off", False, False)):
        plain, mixer = pair(mode=mode, gamma=0.3)
        y = run(plain, x)
        for relaxes, switch in ((in_training, mixer.train), (in_inference, mixer.eval)):
            seen_as = nnx.view(mixer, deterministic=switch == mixer.eval)
            switch()
            for model in (mixer, seen_as):
                if relaxes:
                    assert np.abs(run(model, x) - y).max() > 1e-2
                    np.testing.assert_allclose(
                        model.attention_weights(x), relax_weights(plain.attention_weights(x), 0.3), atol=1e-6
                    )
                else:
                    np.testing.assert_array_equal(run(model, x), y)


@pytest.mark.parametrize(
    ("where", "relaxed"),
    [
        ("encoder_self", {"encoder"}),
        ("cross", {"cross"}),
        ("both", {"encoder", "cross"}),
        ("all", {"encoder", "cross", "decoder"}),
    ],
)
def test_where(x, where, relaxed):
    memory = x[:, ::-1] * 2
    for kind, causal, given in (("encoder", False, None), ("cross", False, memory), ("decoder", True, None)):
        plain, mixer = pair(causal, where=where, gamma=0.3)
        y = run(plain, x, given)
        if kind in relaxed:
            assert np.abs(run(mixer, x, given) - y).max() > 1e-2
        else:
            np.testing.assert_array_equal(run(mixer, x, given), y)


def test_decoding_relaxes_as_the_whole_does(x):
    for where in ("cross", "encoder_self"):
        plain, mixer = pair(where=where, mode="matched", gamma=0.3)
        mixer.eval()
        for model in (plain, mixer):
            y, _ = model.prefill(x, model.init_cache(2, 6, memory=x))
            np.testing.assert_allclose(y, run(model, x, x), atol=1e-5)


def test_the_future_and_padding_get_nothing(x):
    mixer = RelaxedAttention(16, 4, causal=True, positions=RoPE(), gamma=0.5, rngs=nnx.Rngs(0))
    w = mixer.attention_weights(x, mask=Lengths(jnp.array([3, 6])))
    ok = np.tri(6, dtype=bool) & (np.arange(6) < np.array([3, 6])[:, None])[:, None, None, :]
    ok = np.broadcast_to(ok, w.shape)
    assert not np.asarray(w)[~ok].any()
    assert (np.asarray(w) >= 0.5 / np.maximum(ok.sum(-1, keepdims=True), 1) - 1e-6)[ok].all()
    np.testing.assert_allclose(w.sum(-1), ok.any(-1), atol=1e-6)


def test_fuzzy_relaxation(x):
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda key: sample_fuzzy_gamma(key, 0.3, 0.05))(keys)
    assert abs(float(draws.mean()) - 0.3) < 4 * 0.05 / math.sqrt(4000)
    assert abs(float(draws.std()) - 0.05) < 0.003
    clipped = jax.vmap(lambda key: sample_fuzzy_gamma(key, 0.1, 1.0))(keys)
    assert float(clipped.min()) == 0 and float(clipped.max()) == 1

    _, fuzzy = pair(mode="matched", gamma=0.3, sigma=0.1)
    _, fixed = pair(mode="matched", gamma=0.3)
    first, second = run(fuzzy, x), run(fuzzy, x)
    assert np.abs(first - second).max() > 1e-4
    # What is shown is the mean, and takes no draw from the calls that follow.
    again = nnx.clone(fuzzy)
    shown = fixed.attention_weights(x)
    np.testing.assert_array_equal(again.attention_weights(x), shown)
    np.testing.assert_allclose(jax.jit(lambda x: again.attention_weights(x))(x), shown, atol=1e-6)
    np.testing.assert_array_equal(run(again, x), run(fuzzy, x))
    fuzzy.eval()
    np.testing.assert_array_equal(run(fuzzy, x), run(fixed, x))


def test_heads_have_shares_of_their_own(x):
    shares = (0.0, 0.1, 0.5, 1.0)
    plain, mixer = pair(mode="matched", gamma=shares)
    expected = relax_weights(plain.attention_weights(x), jnp.asarray(shares))
    np.testing.assert_allclose(mixer.attention_weights(x), expected, atol=1e-6)
    _, fuzzy = pair(mode="matched", gamma=jnp.asarray(shares), sigma=0.1)
    assert np.isfinite(run(fuzzy, x)).all()


def test_shallow_fusion(rng):
    dec, lm = (jnp.asarray(rng.normal(size=(3, 11)) * 3, jnp.float32) for _ in range(2))
    fused = shallow_fusion_logits(dec, lm, 0.4)
    p, q = (np.exp(np.float64(z)) / np.exp(np.float64(z)).sum(-1, keepdims=True) for z in (dec, lm))
    np.testing.assert_allclose(fused, np.log(p) + 0.4 * np.log(q), atol=1e-5)
    # What a model adds to all its logits does not matter.
    np.testing.assert_allclose(shallow_fusion_logits(dec + 5, lm - 7, 0.4), fused, atol=1e-5)
    np.testing.assert_allclose(shallow_fusion_logits(dec, lm, 0.0), jax.nn.log_softmax(dec), atol=1e-6)
    # A language model that excludes tokens excludes none where it does not count.
    excluding = lm.at[:, 2].set(-jnp.inf)
    np.testing.assert_allclose(shallow_fusion_logits(dec, excluding, jnp.zeros(())), jax.nn.log_softmax(dec), atol=1e-6)
    assert np.isneginf(shallow_fusion_logits(dec, excluding, 0.4)[:, 2]).all()
    with pytest.raises(ValueError, match=r"lm_logits.*\(3, 11\).*\(3, 10\)"):
        shallow_fusion_logits(dec, lm[:, :10], 0.4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 1.5}, r"gamma: must be in \[0, 1\].*got 1.5"),
        ({"gamma": jnp.array([0.1, 1.2, 0.1, 0.1])}, r"gamma: must be in \[0, 1\]"),
        ({"gamma": (0.1, 0.2)}, r"gamma: .*each of 4 heads.*got \(0.1, 0.2\)"),
        ({"mode": "matching"}, "unknown mode 'matching'.*'matched'"),
        ({"where": "crosses"}, "unknown where 'crosses'.*'cross'"),
        ({"sigma": -0.1}, "sigma.*-0.1"),
    ],
)
def test_wrong_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        RelaxedAttention(16, 4, rngs=nnx.Rngs(0), **options)


def test_wrong_weights(rows):
    w, ok = rows
    with pytest.raises(ValueError, match=r"mask.*\(7, 8\).*\(2, 4, 7, 9\)"):
        relax_weights(w, 0.1, ok[0, 0, :, :-1])
    for gamma in (-0.1, np.float32(1.5), jnp.array(1.5), jnp.full(N, -0.1), jnp.full((N, 1), 0.1)):
        with pytest.raises(ValueError, match=r"gamma: must be in \[0, 1\], a number or one per head"):
            relax_weights(w, gamma, ok)
        with pytest.raises(ValueError, match=r"gamma: must be in \[0, 1\], a number or one per head"):
            attention(*(jnp.zeros((1, 3, N, 2)),) * 3, weights=Relaxed(gamma))
    with pytest.raises(ValueError, match=r"gamma: weights \(2, 1, 7, 9\) need a number or \(1,\), got \(4,\)"):
        relax_weights(w[:, :1], jnp.full(4, 0.1))
    with pytest.raises(ValueError, match=r"weights: relaxed softmax mixes by \(4,\) numbers.*each of 1 heads"):
        attention(*(jnp.zeros((1, 3, 1, 2)),) * 3, weights=Relaxed(jnp.full(4, 0.1)))
