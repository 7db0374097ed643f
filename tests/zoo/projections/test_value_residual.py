"""Card 076: the first layer's values beside, or in place of, a layer's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention
from attnzoo.core.cache import cache_bytes
from attnzoo.core.masks import Causal
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.models.resformer import ResFormerLM, SVFormerLM
from attnzoo.nn.linear import parameter_count
from attnzoo.zoo.projections.transformer import GroupedQueryAttention
from attnzoo.zoo.projections.value_residual import (
    MODES,
    ValueResidualAttention,
    neutreno,
    svformer_cache_bytes,
    token_importance_entropy,
    value_residual_mix,
    value_sources,
)

V, D, N, K, H, L = 11, 16, 4, 2, 4, 3
CONFIG = LMConfig(vocab_size=V, dim=D, num_layers=L, num_heads=N, num_kv_heads=K)
forward = nnx.jit(lambda model, tokens: model(tokens))
prefill = nnx.jit(lambda model, tokens, cache, lengths: model.prefill(tokens, cache, lengths))
step = nnx.jit(lambda model, tokens, cache: model.step(tokens, cache))


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, V, (2, 9)))


def by_path(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}


def identity_out(mixer):
    """Makes W_O the identity, so that the output is U."""
    mixer.out.kernel[...] = jnp.eye(N * H).reshape(N, H, N * H)
    return mixer


# --- what it is ------------------------------------------------------------------------------------------


def test_own_values_alone_is_the_plain_model(tokens):
    plain = forward(DecoderLM(CONFIG, rngs=nnx.Rngs(0)), tokens)
    for mode in ("constant", "learnable", "unet"):
        model = ResFormerLM(CONFIG, mode=mode, lambdas=(0.0, 1.0), rngs=nnx.Rngs(0))
        np.testing.assert_array_equal(forward(model, tokens), plain)


def test_the_first_layer_is_never_altered():
    x, options = jax.random.normal(jax.random.key(0), (2, 5, D)), {"causal": True, "num_kv_heads": K}
    plain = GroupedQueryAttention(D, N, rngs=nnx.Rngs(0), **options)(x)
    for mode in MODES:
        mixer = ValueResidualAttention(D, N, layer=0, num_layers=3, mode=mode, rngs=nnx.Rngs(0), **options)
        np.testing.assert_array_equal(mixer(x)[0], plain)


def test_first_values_alone_is_svformer(tokens):
    resformer = ResFormerLM(CONFIG, lambdas=(1.0, 0.0), rngs=nnx.Rngs(0))
    svformer = SVFormerLM(CONFIG, rngs=nnx.Rngs(0))
    more, less = by_path(resformer), by_path(svformer)
    assert less.keys() == {path for path in more if "value" not in path or ".0." in path}
    for path, leaf in less.items():
        np.testing.assert_array_equal(leaf, more[path])
    np.testing.assert_array_equal(forward(svformer, tokens), forward(resformer, tokens))
    saved = parameter_count(resformer) - parameter_count(svformer)
    assert saved == (L - 1) * D * K * H


@pytest.mark.parametrize("lambdas", [(0.5, 0.5), (1.0, 1.0), (0.3, -0.8)])
def test_output_is_linear_in_both_values(rng, lambdas):
    x, v_first = (jnp.asarray(rng.normal(size=(2, 7, *shape)), jnp.float32) for shape in ((N * H,), (K, H)))
    mixer = identity_out(
        ValueResidualAttention(N * H, N, layer=2, num_layers=L, num_kv_heads=K, lambdas=lambdas, causal=True, rngs=nnx.Rngs(0))
    )
    u, carry = mixer(x, carry=(v_first,))
    assert carry == (v_first,)
    q, k, v = mixer.qkv(x)
    own, weights = attention(q, k, v, mask=Causal(), return_weights=True)
    first = jnp.einsum("bnts,bsnh->btnh", weights, jnp.repeat(v_first, N // K, 2))
    lam1, lam2 = lambdas
    np.testing.assert_allclose(u.reshape(own.shape), lam1 * first + lam2 * own, atol=1e-5)
    np.testing.assert_array_equal(value_residual_mix(v, v_first, lam1, lam2), lam1 * v_first + lam2 * v)


def test_gated_mix(rng):
    x, v_first = (jnp.asarray(rng.normal(size=(2, 7, *shape)), jnp.float32) for shape in ((N * H,), (K, H)))
    options = {"layer": 1, "num_layers": 2, "num_kv_heads": K, "rngs": nnx.Rngs(0)}
    mixer = identity_out(ValueResidualAttention(N * H, N, mode="gated", **options))
    q, k, v = mixer.qkv(x)
    m = jax.nn.sigmoid(x @ mixer.gate.kernel[...] + mixer.gate.bias[...])[..., None]
    expected = attention(q, k, v * m + v_first * (1 - m))
    np.testing.assert_allclose(mixer(x, carry=(v_first,))[0].reshape(expected.shape), expected, atol=1e-5)


def test_neutreno_adds_to_the_output(rng):
    x, v_first = (jnp.asarray(rng.normal(size=(2, 7, *shape)), jnp.float32) for shape in ((N * H,), (K, H)))
    options = {"layer": 1, "num_layers": 2, "num_kv_heads": K, "rngs": nnx.Rngs(0)}
    mixer = identity_out(ValueResidualAttention(N * H, N, mode="neutreno", **options))
    q, k, v = mixer.qkv(x)
    expected = attention(q, k, v) + 0.4 * jnp.repeat(v_first - v, N // K, 2)
    np.testing.assert_allclose(mixer(x, carry=(v_first,))[0].reshape(expected.shape), expected, atol=1e-5)
    np.testing.assert_allclose(neutreno(attention(q, k, v), v, v_first), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "options", "sources", "saves"),
    [
        ("constant", {}, [None, 0, 0, 0, 0], [0]),
        ("svformer", {}, [None, 0, 0, 0, 0], [0]),
        ("sparse", {}, [None, None, None, 0, 0], [0]),
        ("sparse", {"sparse_layers": (2, 5)}, [None, 0, None, None, 0], [0]),
        # Layer l mixes the raw values of layer 6 - l; the middle one is left alone.
        ("unet", {}, [None, None, None, 1, 0], [0, 1]),
    ],
)
def test_who_mixes_whose_values(mode, options, sources, saves):
    mixers = [ValueResidualAttention(D, N, layer=i, num_layers=5, mode=mode, rngs=nnx.Rngs(i), **options) for i in range(5)]
    assert [m.source for m in mixers] == sources
    assert [i for i, m in enumerate(mixers) if m.saves] == saves
    x = jax.random.normal(jax.random.key(0), (2, 3, D))
    carry = None
    for mixer in mixers:
        _, carry = mixer(x, carry=carry)
    assert len(carry) == len(saves)
    for i, v in zip(saves, carry, strict=True):
        np.testing.assert_array_equal(v, mixers[i].qkv.value(x))


def test_sources():
    half = np.array([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0.5, 0, 0, 0.5]])
    np.testing.assert_array_equal(value_sources(4, "constant"), half)
    np.testing.assert_array_equal(value_sources(4, "svformer"), np.eye(4)[[0] * 4])
    unet = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, 0.5, 0], [0.5, 0, 0, 0.5]])
    np.testing.assert_array_equal(value_sources(4, "unet"), unet)
    sparse = value_sources(4, "sparse", sparse_layers=(3,), lambdas=(0.2, 0.8))
    np.testing.assert_array_equal(sparse, np.diag([1, 1, 0.8, 1]) + 0.2 * np.eye(4)[2][:, None] * np.eye(4)[0])


def test_learned_coefficients(tokens):
    model = ResFormerLM(CONFIG, mode="learnable", rngs=nnx.Rngs(0))
    lambdas = {path: leaf for path, leaf in by_path(model).items() if "lambdas" in path}
    assert len(lambdas) == L - 1
    for leaf in lambdas.values():
        np.testing.assert_array_equal(leaf, [0.5, 0.5])
    np.testing.assert_array_equal(forward(model, tokens), forward(ResFormerLM(CONFIG, rngs=nnx.Rngs(0)), tokens))
    gradient = nnx.jit(nnx.grad(lambda model: (model(tokens) ** 2).mean()))(model)
    moved = [leaf for path, leaf in nnx.to_flat_state(gradient) if "lambdas" in path]
    assert all((leaf[...] != 0).all() for leaf in moved)


# --- gradients reach the first layer's values ------------------------------------------------------------


def test_every_layer_teaches_the_first_values(tokens):
    """With every W_O but one layer's cut, the first W_V still learns, through that layer alone."""

    @nnx.jit
    @nnx.grad
    def gradient(model):
        return (model(tokens) ** 2).mean()

    for heard in range(L):
        model = ResFormerLM(CONFIG, rngs=nnx.Rngs(0))
        for i, layer in enumerate(model.layers.runs):
            if i != heard:
                layer.mixer.out.kernel[...] = jnp.zeros_like(layer.mixer.out.kernel[...])
        assert (np.abs(gradient(model).layers.runs[0].mixer.qkv.value.kernel[...]) > 0).any()
    plain = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    first = plain.layers.runs[0].mixer
    first.out.kernel[...] = jnp.zeros_like(first.out.kernel[...])
    assert (gradient(plain).layers.runs[0].mixer.qkv.value.kernel[...] == 0).all()


# --- decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_decoding_is_the_full_forward(tokens, mode):
    model = ResFormerLM(CONFIG, mode=mode, rngs=nnx.Rngs(0))
    full = forward(model, tokens)
    cache = model.init_cache(2, 10)
    lengths = jnp.array([6, 4])
    y, cache = prefill(model, tokens[:, :6], cache, lengths)
    for b, n in enumerate([6, 4]):
        np.testing.assert_allclose(y[b, :n], full[b, :n], atol=1e-5)
    for i in range(3):
        at = lengths + i
        y, cache = step(model, tokens[jnp.arange(2), at][:, None], cache)
        np.testing.assert_allclose(y[:, 0], full[jnp.arange(2), at], atol=1e-5)
    plain = 2 * L * K * H * 4 * 2 * 10
    assert cache_bytes(cache) == (plain * (L + 1) // (2 * L) if mode == "svformer" else plain)


def test_the_cache_holds_mixed_values():
    model = ResFormerLM(CONFIG, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, D))
    first, second = (model.layers.runs[i].mixer for i in (0, 1))

    @nnx.jit
    def both_layers(first, second, x):
        _, c0, carry = first.prefill(x, first.init_cache(2, 9))
        _, c1, _ = second.prefill(x, second.init_cache(2, 9), carry=carry)
        return c0, c1

    c0, c1 = both_layers(first, second, x)
    v_first, v = first.qkv.value(x), second.qkv.value(x)
    np.testing.assert_allclose(jnp.swapaxes(c0.payload["v"], 1, 2), v_first, atol=1e-6)
    np.testing.assert_allclose(jnp.swapaxes(c1.payload["v"], 1, 2), (v_first + v) / 2, atol=1e-6)


def test_svformer_cache_bytes():
    model = SVFormerLM(CONFIG, rngs=nnx.Rngs(0))
    sizes = {"num_layers": L, "num_kv_heads": K, "head_dim": H, "batch": 3}
    expected = svformer_cache_bytes(20, dtype=jnp.float32, **sizes)
    assert cache_bytes(model.init_cache(3, 20)) == expected
    plain = cache_bytes(DecoderLM(CONFIG, rngs=nnx.Rngs(0)).init_cache(3, 20))
    assert expected * 2 * L == plain * (L + 1)
    assert [layer.mixer.cache_numbers_per_token() for layer in model.layers.runs] == [2 * K * H] + [K * H] * (L - 1)


# --- scan, bad input, entropy ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["learnable", "svformer"])
def test_scanned_layers_are_the_same_model(tokens, mode):
    plain, scanned = (
        ResFormerLM(dataclasses.replace(CONFIG, **scan), mode=mode, rngs=nnx.Rngs(0))
        for scan in ({}, {"scan_layers": True, "remat": "full"})
    )
    assert scanned.layers.sizes == (1, L - 1)
    full = forward(plain, tokens)
    np.testing.assert_allclose(forward(scanned, tokens), full, atol=1e-5)
    y, cache = prefill(scanned, tokens[:, :8], scanned.init_cache(2, 9), None)
    np.testing.assert_allclose(y, full[:, :8], atol=1e-5)
    np.testing.assert_allclose(step(scanned, tokens[:, 8:], cache)[0], full[:, 8:], atol=1e-5)


def test_unet_cannot_scan_a_carry_that_grows(tokens):
    config = dataclasses.replace(CONFIG, num_layers=6, scan_layers=True)
    model = ResFormerLM(config, mode="unet", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="scan_layers=False"):
        model(tokens)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "constnat"}, "mode.*'constant'"),
        ({"mode": "identity", "lambdas": (0.5, 0.5)}, "lambdas.*'identity'"),
        ({"lambdas": (1.0,)}, "lambdas: two numbers"),
        ({"sparse_layers": (2,)}, "sparse_layers.*'constant'"),
        ({"mode": "sparse", "sparse_layers": (1,)}, r"sparse_layers: layers from 2 to 3.*\(1,\)"),
        ({"layer": 3}, "layer: must be in"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        ValueResidualAttention(D, N, num_layers=3, rngs=nnx.Rngs(0), **{"layer": 1, **options})


def test_a_missing_carry_is_said():
    mixer = ValueResidualAttention(D, N, layer=1, num_layers=2, causal=True, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 3, D))
    with pytest.raises(ValueError, match=r"carry.*values of layer 1.*None"):
        mixer(x)
    with pytest.raises(ValueError, match=r"carry.*0 values"):
        mixer.prefill(x, mixer.init_cache(1, 4), carry=())


def test_importance_entropy():
    t = 12
    uniform = np.tri(t) / np.arange(1, t + 1)[:, None]
    importance = np.array([sum(1 / (i + 1) for i in range(j, t)) for j in range(t)])
    np.testing.assert_allclose(uniform.sum(0), importance)
    p = importance / importance.sum()
    weights = jnp.asarray(np.stack([uniform] * 3)[None], jnp.float32)
    np.testing.assert_allclose(token_importance_entropy(weights), [-(p * np.log(p)).sum()], atol=1e-5)
    np.testing.assert_allclose(token_importance_entropy(jnp.eye(t)[None]), np.log(t), atol=1e-6)
    sink = jnp.zeros((2, t, t)).at[:, :, 0].set(1.0)
    np.testing.assert_allclose(token_importance_entropy(sink), 0, atol=1e-6)
    # Averaged over heads before anything else: two heads that look at different tokens spread the attention.
    apart = sink.at[1].set(jnp.zeros((t, t)).at[:, 1].set(1.0))
    np.testing.assert_allclose(token_importance_entropy(apart), np.log(2), atol=1e-6)
