"""Zhang et al. 2024: dense models become a mixture of feed-forward and of soft attention experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.cache import cache_bytes
from attnzoo.core.positions import RoPE
from attnzoo.models.bam import BAMLM, BAMConfig, bam_loss, bam_upcycle, btx_upcycle
from attnzoo.models.objectives import label_smoothed_ce
from attnzoo.nn.feed_forward import SwiGLU
from attnzoo.nn.linear import parameter_count
from attnzoo.zoo.compress.bam import (
    VARIANTS,
    FFNRouting,
    MoEFFN,
    ParallelBAMBlock,
    SoftMixtureOfAttention,
    average_params,
    branch,
)
from attnzoo.zoo.heads.moh import MixtureOfHeadAttention
from attnzoo.zoo.positions.fope import FoPEConfig
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

B, T, D, N, K, H, E, F = 2, 7, 16, 4, 2, 4, 3, 12
CONFIG = BAMConfig(vocab_size=11, dim=D, num_layers=2, num_heads=N, num_kv_heads=K, mlp_dim=F)
OPTIONS = {"causal": True, "positions": RoPE(), "num_kv_heads": K}
TOKENS = jnp.asarray(np.random.default_rng(1).integers(0, 11, (B, T + 1)))
run = nnx.jit(lambda module, x: module(x))
both = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)


@pytest.fixture(scope="module")
def dense():
    return [GroupedQueryAttention(D, N, rngs=nnx.Rngs(i), **OPTIONS) for i in range(E)]


@pytest.fixture(scope="module")
def models():
    """A seed and its experts, all different in every parameter."""
    made = branch(BAMLM(CONFIG, rngs=nnx.Rngs(0)), E)
    rng = np.random.default_rng(2)
    for model in made:
        state = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda a: a + jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype), state))
    return made


def mixture(experts, **options):
    mixer = SoftMixtureOfAttention(D, N, num_experts=len(experts), rngs=nnx.Rngs(9), **OPTIONS, **options)
    mixer.load(experts)
    return mixer


def routed(module, seed=1):
    """With a router that has opinions."""
    module.router.kernel[...] = jax.random.normal(jax.random.key(seed), module.router.kernel[...].shape)
    return module


def kept(p, k):
    """The k largest of each row as they are, 0 for the others."""
    p = np.asarray(p)
    return np.where(p >= np.sort(p, axis=-1)[..., -k, None], p, 0)


# --- attention experts -----------------------------------------------------------------------------------


@both
def test_identical_experts_are_the_dense_attention(x, dense, variant):
    """Whatever the router says: gates sum to 1."""
    mixer = routed(mixture([dense[0]] * E, variant=variant))
    np.testing.assert_allclose(run(mixer, x), run(dense[0], x), atol=1e-5)


@pytest.mark.parametrize(("routing", "k"), [("soft", E), ("top1", 1), ("top2", 2)])
def test_output_is_the_gated_sum_of_whole_attentions(x, dense, routing, k):
    mixer = routed(mixture(dense, routing=routing))
    g = kept(jax.nn.softmax(x @ mixer.router.kernel[...]), k)
    expected = sum(g[..., e, None] * np.asarray(run(dense[e], x)) for e in range(E))
    np.testing.assert_allclose(run(mixer, x), expected, atol=1e-5)
    np.testing.assert_allclose(mixer.gates(x), g, atol=1e-6)


def test_shared_keys_are_the_mean(x, dense):
    mixer = routed(mixture(dense, variant="kv_shared"))
    g = np.asarray(jax.nn.softmax(x @ mixer.router.kernel[...]))
    experts = branch(dense[0], E)
    for expert, source in zip(experts, dense, strict=True):
        expert.qkv.query, expert.out = nnx.clone(source.qkv.query), nnx.clone(source.out)
        for name in ("key", "value"):
            getattr(expert.qkv, name).kernel[...] = sum(getattr(m.qkv, name).kernel[...] for m in dense) / E
    expected = sum(g[..., e, None] * np.asarray(run(experts[e], x)) for e in range(E))
    np.testing.assert_allclose(run(mixer, x), expected, atol=1e-5)
    # These experts agree in their keys and values: then sharing them changes nothing.
    apart = routed(mixture(experts, variant="kv_experts"))
    np.testing.assert_allclose(run(apart, x), expected, atol=1e-5)


@both
def test_sizes(variant):
    mixer = SoftMixtureOfAttention(D, N, num_experts=E, variant=variant, causal=True, rngs=nnx.Rngs(0))
    pairs = E if variant == "kv_experts" else 1
    assert mixer.cache_numbers_per_token() == pairs * 2 * N * H
    assert parameter_count(mixer) == (2 * E + 2 * pairs) * D * D + D * E


# --- feed-forward experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, E])
def test_moe_is_the_gated_sum_of_the_chosen(x, k):
    networks = [SwiGLU(D, F, rngs=nnx.Rngs(i)) for i in range(E)]
    moe = routed(MoEFFN(D, F, E, top_k=k, rngs=nnx.Rngs(5)))
    moe.load(networks)
    p = kept(jax.nn.softmax(x @ moe.router.kernel[...]), k)
    outputs = [np.asarray(run(network, x)) for network in networks]
    np.testing.assert_allclose(run(moe, x), sum(p[..., e, None] * outputs[e] for e in range(E)), atol=1e-5)
    # Identical experts leave the dense network times the chosen gates: with k = 1, p_max FFN(u).
    moe.load([networks[0]] * E)
    np.testing.assert_allclose(run(moe, x), p.sum(-1, keepdims=True) * outputs[0], atol=1e-5)


def test_moe_gradients(x):
    """Those of the same sum computed with all experts; the router learns with k = 1 too."""
    graphdef, params = nnx.split(routed(MoEFFN(D, F, E, rngs=nnx.Rngs(5))))

    def sparse(params):
        return (nnx.merge(graphdef, params, copy=True)(x) ** 2).sum()

    def plain(params):
        m = nnx.merge(graphdef, params, copy=True)
        p = m.route(x).probabilities
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, m.gate[...])) * jnp.einsum("btd,edf->btef", x, m.up[...])
        y = jnp.einsum("btef,efd->bted", h, m.down[...])
        return ((jnp.where(p == p.max(-1, keepdims=True), p, 0)[..., None] * y).sum(2) ** 2).sum()

    ours, reference = (nnx.to_flat_state(jax.jit(jax.grad(f))(params)) for f in (sparse, plain))
    for (path, a), (_, b) in zip(ours, reference, strict=True):
        np.testing.assert_allclose(a[...], b[...], atol=2e-5, err_msg=str(path))
        assert np.asarray(a[...]).any()


def test_losses_of_the_router():
    # E tokens, each with another first choice by a hair.
    uniform = FFNRouting(jnp.zeros((E, E)), jnp.full((E, E), 1 / E) + 1e-6 * jnp.eye(E))
    balance, z = uniform.losses()
    np.testing.assert_allclose(balance, 1, rtol=1e-5)
    np.testing.assert_allclose(z, np.log(E) ** 2, rtol=1e-5)
    logits = np.array([[3.0, -1.0, 0.5], [2.0, 0.0, 1.0]], np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    balance, z = FFNRouting(jnp.asarray(logits), jnp.asarray(p)).losses()
    np.testing.assert_allclose(balance, E * p[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(z, (np.log(np.exp(logits).sum(-1)) ** 2).mean(), rtol=1e-5)


# --- blocks ----------------------------------------------------------------------------------------------


def test_a_block_is_parallel(x, dense):
    block = ParallelBAMBlock(D, dense[0], routed(MoEFFN(D, F, E, rngs=nnx.Rngs(1))), rngs=nnx.Rngs(2))
    assert [name for name in nnx.state(block, nnx.Param) if "norm" in name] == ["mixer_norm"]
    u = block.mixer_norm(x)
    moe = np.asarray(run(block.feed_forward, u))
    for change in (1.0, 7.0):
        # Whatever attention found, the feed-forward part is the same.
        block.mixer.out.kernel[...] = change * block.mixer.out.kernel[...]
        np.testing.assert_allclose(run(block, x)[0] - x - run(block.mixer, u), moe, atol=1e-5)


def test_one_expert_is_the_dense_model(models):
    made = bam_upcycle(models[0], [], rngs=nnx.Rngs(4))
    np.testing.assert_allclose(run(made, TOKENS), run(models[0], TOKENS), atol=3e-6)


def test_identical_experts_are_the_dense_model_only_if_all_are_used(models):
    every, one = (bam_upcycle(models[0], [models[0]] * (E - 1), top_k=k, rngs=nnx.Rngs(4)) for k in (E, 1))
    np.testing.assert_allclose(run(every, TOKENS), run(models[0], TOKENS), atol=1e-4)
    assert not np.allclose(run(one, TOKENS), run(models[0], TOKENS), atol=1e-2)


def test_a_router_that_is_sure_gives_that_experts_block(x, models):
    layer = bam_upcycle(models[0], models[1:], rngs=nnx.Rngs(4)).layers.runs[0]
    layer.mixer_norm.bias[...] = jnp.ones(D)  # so that every u sums to D
    for expert in (0, E - 1):
        source = nnx.clone(models[expert].layers.runs[0])
        source.mixer_norm = nnx.clone(layer.mixer_norm)
        source.mixer_norm.scale[...] = layer.mixer_norm.scale[...] = jnp.ones(D)
        for router in (layer.mixer.router, layer.feed_forward.router):
            router.kernel[...] = jnp.zeros((D, E)).at[:, expert].set(10.0)
        np.testing.assert_allclose(run(layer, x)[0], run(source, x)[0], atol=1e-5)


# --- upcycling -------------------------------------------------------------------------------------------


def params(model):
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@both
def test_upcycling_copies_experts_and_averages_the_rest(models, variant):
    made, dense = params(bam_upcycle(models[0], models[1:], variant=variant, rngs=nnx.Rngs(4))), [params(m) for m in models]
    averaged = set()
    for name, value in made.items():
        if "router" in name:
            assert np.abs(value).max() < 0.1 and value.any()
        elif ".feed_forward." in name:
            for e in range(E):
                np.testing.assert_array_equal(value[e], dense[e][name + ".kernel"])
        elif ".mixer." in name and (variant == "kv_experts" or "query" in name or ".out." in name):
            axis = 0 if ".out." in name else 1
            if variant == "kv_experts":
                experts = np.split(value, E, axis=axis)
            else:  # heads are grouped by the key head that they read
                grouped = value.reshape(*value.shape[:axis], K, E, N // K, *value.shape[axis + 1 :])
                experts = [np.take(grouped, e, axis=axis + 1).reshape(dense[e][name].shape) for e in range(E)]
            for e in range(E):
                np.testing.assert_array_equal(experts[e], dense[e][name])
        else:
            np.testing.assert_allclose(value, np.mean([d[name] for d in dense], axis=0), rtol=1e-5, atol=1e-6)
            averaged.add(name.split(".")[-2])
    assert {"embed", "norm", "mixer_norm"} <= averaged
    assert ("key" in averaged) == (variant == "kv_shared")


def test_btx_averages_attention(models):
    made, dense = params(btx_upcycle(models[0], models[1:], rngs=nnx.Rngs(4))), [params(m) for m in models]
    attention = [name for name in made if ".mixer." in name]
    assert len(attention) == 4 * CONFIG.num_layers
    for name in attention:
        np.testing.assert_allclose(made[name], np.mean([d[name] for d in dense], axis=0), rtol=1e-5, atol=1e-6)
    name = "layers.runs.1.feed_forward.down"
    for e in range(E):
        np.testing.assert_array_equal(made[name][e], dense[e][name + ".kernel"])


def test_branches_are_apart(dense):
    one, other = branch(dense[0], 2)
    one.out.kernel[...] = jnp.zeros_like(one.out.kernel[...])
    np.testing.assert_array_equal(other.out.kernel[...], dense[0].out.kernel[...])
    mean = average_params([{"a": jnp.ones(2)}, {"a": 3 * jnp.ones(2)}])
    np.testing.assert_array_equal(mean["a"], [2, 2])


def test_positions_that_hold_arrays_are_kept():
    drawn = BAMLM(dataclasses.replace(CONFIG, positions=FoPEConfig(train_length=32, per_head=False)), rngs=nnx.Rngs(0))
    made = bam_upcycle(drawn, [], rngs=nnx.Rngs(4))
    np.testing.assert_allclose(run(made, TOKENS), run(drawn, TOKENS), atol=1e-5)
    learned = BAMLM(dataclasses.replace(CONFIG, positions=FoPEConfig(train_length=32, learnable=True)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"seed: layers.runs.0.mixer.positions.* of the mixture is"):
        bam_upcycle(learned, branch(learned, 1), rngs=nnx.Rngs(4))


def test_means_are_summed_in_float32():
    leaves = [{"a": jnp.asarray([x], jnp.bfloat16)} for x in (256.0, 1.0, 1.0, 1.0)]
    mean = average_params(leaves)["a"]
    assert mean.dtype == jnp.bfloat16 and mean[0] == jnp.bfloat16(64.75)


# --- training and decoding -------------------------------------------------------------------------------


def test_loss_adds_the_router_losses_of_every_layer(models):
    made = bam_upcycle(models[0], models[1:], rngs=nnx.Rngs(4))
    logits, balance, z = nnx.jit(lambda model, tokens: model.with_router_losses(tokens))(made, TOKENS[:, :-1])
    np.testing.assert_allclose(logits, run(made, TOKENS[:, :-1]), atol=1e-5)
    x, losses = made.embed(TOKENS[:, :-1]), []
    for layer in made.layers.runs:
        losses.append(layer.feed_forward.route(layer.mixer_norm(x)).losses())
        x = run(layer, x)[0]
    np.testing.assert_allclose([balance, z], np.sum(losses, axis=0), rtol=1e-5)
    loss = nnx.jit(lambda model, tokens: bam_loss(model, tokens, alpha=0.5, beta=2.0))
    nll = label_smoothed_ce(logits, TOKENS[:, 1:], smoothing=0.0)
    np.testing.assert_allclose(loss(made, TOKENS), nll + 0.5 * balance + 2 * z, rtol=1e-5)
    # Padding is neither predicted nor counted: as if the sequences were short.
    real = jnp.broadcast_to(jnp.arange(T + 1) < 4, TOKENS.shape)
    padded = nnx.jit(lambda model, tokens: bam_loss(model, tokens, alpha=0.5, beta=2.0, where=real))
    np.testing.assert_allclose(padded(made, TOKENS), loss(made, TOKENS[:, :4]), rtol=1e-5)
    plain = label_smoothed_ce(run(models[0], TOKENS[:, :-1]), TOKENS[:, 1:], smoothing=0.0)
    np.testing.assert_allclose(loss(models[0], TOKENS), plain, rtol=1e-5)


@both
def test_decoding_is_the_full_forward(models, variant):
    made = bam_upcycle(models[0], models[1:], variant=variant, rngs=nnx.Rngs(4))
    full = run(made, TOKENS)
    prefill = nnx.jit(lambda model, tokens, cache: model.prefill(tokens, cache))
    y, cache = prefill(made, TOKENS[:, :5], made.init_cache(B, T + 1))
    np.testing.assert_allclose(y, full[:, :5], atol=1e-5)
    for t in range(5, T + 1):
        y, cache = prefill(made, TOKENS[:, t : t + 1], cache)
        np.testing.assert_allclose(y[:, 0], full[:, t], atol=1e-5)
    pairs = E if variant == "kv_experts" else 1
    assert cache_bytes(cache) == 4 * CONFIG.num_layers * B * (T + 1) * pairs * 2 * K * H


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"variant": "kv"}, "unknown variant 'kv'.*kv_experts"),
        ({"routing": "top3"}, "unknown routing 'top3'.*top2"),
        ({"router_init": "zero"}, "unknown router_init 'zero'.*'zeros'"),
        ({"routing": "top2", "num_experts": 1}, "num_experts: routing 'top2' needs at least 2, got 1"),
        ({"num_experts": 0}, "num_experts: routing 'soft' needs at least 1, got 0"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        SoftMixtureOfAttention(D, N, rngs=nnx.Rngs(0), **options)


def test_models_that_do_not_fit_are_refused(dense, models):
    mixer = SoftMixtureOfAttention(D, N, num_experts=2, rngs=nnx.Rngs(0), **OPTIONS)
    with pytest.raises(ValueError, match="experts: needs 2 mixers, got 3"):
        mixer.load(dense)
    with pytest.raises(ValueError, match=r"experts: needs mixers with \(D, N, K, H\) = \(16, 4, 2, 4\), got \(16, 4, 4, 4\)"):
        mixer.load([GroupedQueryAttention(D, N, rngs=nnx.Rngs(0))] * 2)
    with pytest.raises(ValueError, match=r"top_k: must be in 1..num_experts=3, got 4"):
        MoEFFN(D, F, E, top_k=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"needs 3 networks \[D, F\] = \(16, 12\), got 1 of \[\(16, 8\)\]"):
        MoEFFN(D, F, E, rngs=nnx.Rngs(0)).load([SwiGLU(D, 8, rngs=nnx.Rngs(0))])
    other = BAMLM(dataclasses.replace(CONFIG, num_layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="experts: dense models of one configuration"):
        bam_upcycle(models[0], [other], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="not scanned"):
        dataclasses.replace(CONFIG, scan_layers=True)
    with pytest.raises(ValueError, match=r"remat: .*'none' is needed; got 'full'"):
        dataclasses.replace(CONFIG, ffn_experts=2, remat="full")
    with pytest.raises(ValueError, match=r"ffn_top_k: .*there are none; got 2"):
        dataclasses.replace(CONFIG, ffn_top_k=2)
    with pytest.raises(ValueError, match="ffn_experts: a dense model has no routers"):
        models[0].with_router_losses(TOKENS)
    with pytest.raises(ValueError, match="experts: needs mixers built with use_bias=False"):
        mixer.load([GroupedQueryAttention(D, N, use_bias=True, rngs=nnx.Rngs(0), **OPTIONS)] * 2)
    with pytest.raises(TypeError, match=r"mixer: .*MixtureOfHeadAttention"):
        mixer.load([MixtureOfHeadAttention(D, N, rngs=nnx.Rngs(0), **OPTIONS)] * 2)
    with pytest.raises(TypeError, match="SoftMixtureOfAttention is made of several mixers"):
        SoftMixtureOfAttention.like(dense[0])
    with pytest.raises(ValueError, match="experts: needs networks built with use_bias=False"):
        MoEFFN(D, F, E, rngs=nnx.Rngs(0)).load([SwiGLU(D, F, use_bias=True, rngs=nnx.Rngs(0))] * E)
    for options in ({"cross": dense[0]}, {"norm_first": False}):
        with pytest.raises(ValueError, match="cross, norm_first: "):
            ParallelBAMBlock(D, dense[0], SwiGLU(D, F, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0), **options)
    gated = BAMLM(dataclasses.replace(CONFIG, mixer="moh"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"seed: its mixer .*'transformer', got 'moh'"):
        bam_upcycle(gated, [], rngs=nnx.Rngs(0))
