"""Card 041: what the base of the zoo must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.cache import cache_bytes
from attnzoo.core.masks import Lengths
from attnzoo.core.positions import RoPE, sinusoidal_positions
from attnzoo.costs import evaluate, sizes
from attnzoo.models.objectives import noam_schedule
from attnzoo.models.seq2seq import Transformer, TransformerConfig
from attnzoo.nn.linear import parameter_count
from attnzoo.zoo.projections.transformer import (
    PAPER,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiQueryAttention,
    kv_cache_bytes,
    mha_to_gqa,
    plain,
    scaled_dot_product_attention,
)

B, T, S, D, N = 2, 7, 10, 32, 4
X = jax.random.normal(jax.random.key(0), (B, T, D))
HEADS = [(4, 4), (4, 2), (4, 1)]


def qkv(heads: int, kv_heads: int, length: int = T, keys: int = S) -> tuple[jax.Array, ...]:
    shapes = ((B, length, heads, 8), (B, keys, kv_heads, 8), (B, keys, kv_heads, 8))
    return tuple(jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(1), 3), shapes, strict=True))


def build(kv_heads: int = N, **options) -> GroupedQueryAttention:
    return GroupedQueryAttention(D, N, num_kv_heads=kv_heads, rngs=nnx.Rngs(0), **options)


run = nnx.jit(lambda model, *args, **kwargs: model(*args, **kwargs))
prefill = nnx.jit(lambda model, x, cache: model.prefill(x, cache))
step = nnx.jit(lambda model, x, cache: model.step(x, cache))
sdpa = jax.jit(scaled_dot_product_attention, static_argnames="causal")


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_parity_with_jax_nn(heads, kv_heads):
    for causal, (q, k, v) in ((False, qkv(heads, kv_heads)), (True, qkv(heads, kv_heads, keys=T))):
        expected = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        np.testing.assert_allclose(sdpa(q, k, v, causal=causal), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_bias", [False, True])
def test_parity_with_flax_linen(use_bias):
    import flax.linen

    theirs = flax.linen.MultiHeadDotProductAttention(num_heads=N, use_bias=use_bias)
    params = theirs.init(jax.random.key(3), X)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # biases that are not zero
    ours = MultiHeadAttention(D, N, use_bias=use_bias, rngs=nnx.Rngs(0))
    flat = {"query": ours.qkv.query, "key": ours.qkv.key, "value": ours.qkv.value, "out": ours.out}
    for name, layer in flat.items():
        layer.kernel[...] = params[name]["kernel"]
        if use_bias:
            layer.bias[...] = params[name]["bias"]
    allowed = jnp.arange(T) < jnp.array([4, T])[:, None]
    mask = jnp.broadcast_to(allowed[:, None, None], (B, N, T, T))
    for m in (None, mask):
        expected = theirs.apply({"params": params}, X, mask=m)
        np.testing.assert_allclose(ours(X, mask=m), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_parity_with_torch(heads, kv_heads):
    torch = pytest.importorskip("torch")
    for causal, arrays in ((False, qkv(heads, kv_heads)), (True, qkv(heads, kv_heads, keys=T))):
        q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2) for x in arrays)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        np.testing.assert_allclose(
            sdpa(*arrays, causal=causal),
            expected.transpose(1, 2).numpy(),
            atol=1e-5,
            rtol=1e-5,
        )


def test_causal_lines_up_the_ends():
    q, k, v = qkv(4, 2, length=3, keys=T)
    whole = sdpa(*qkv(4, 2, length=3, keys=T), causal=True)
    for i in range(3):
        alone = jax.nn.dot_product_attention(q[:, i : i + 1], k[:, : T - 2 + i], v[:, : T - 2 + i])
        np.testing.assert_allclose(whole[:, i : i + 1], alone, atol=1e-6)


def test_hidden_rows_are_zero():
    q, k, v = qkv(4, 2)
    mask = jnp.ones((T, S), bool).at[2].set(False)
    out = sdpa(q, k, v, mask=mask)
    assert not out[:, 2].any()
    assert bool(jnp.isfinite(out).all())


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_gqa_is_mha_with_repeated_heads(kv_heads):
    gqa, mha = build(kv_heads, causal=True), build(causal=True)
    state = nnx.to_flat_state(nnx.state(gqa))
    repeated = [
        (
            path,
            leaf.replace(jnp.repeat(leaf[...], N // kv_heads, axis=-2)) if path[1] in ("key", "value") else leaf,
        )
        for path, leaf in state
    ]
    nnx.update(mha, nnx.from_flat_state(repeated))
    np.testing.assert_allclose(run(gqa, X), run(mha, X), atol=1e-6)


def test_the_ends_of_the_range_have_names():
    for named, kv_heads in ((MultiHeadAttention, N), (MultiQueryAttention, 1)):
        ours = named(D, N, causal=True, rngs=nnx.Rngs(0))
        assert ours.qkv.num_kv_heads == kv_heads
        np.testing.assert_array_equal(run(ours, X), run(build(kv_heads, causal=True), X))
    default = GroupedQueryAttention(D, N, causal=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(run(default, X), run(build(N, causal=True), X))


def test_an_encoder_without_positions_is_permutation_equivariant():
    order = jnp.array([3, 0, 6, 1, 5, 2, 4])
    plain, rotary = build(2), build(2, positions=RoPE())
    np.testing.assert_allclose(run(plain, X[:, order]), run(plain, X)[:, order], atol=1e-6)
    assert not np.allclose(run(rotary, X[:, order]), run(rotary, X)[:, order], atol=1e-3)
    absolute = X + sinusoidal_positions(T, D)
    shuffled = X[:, order] + sinusoidal_positions(T, D)
    assert not np.allclose(run(plain, shuffled), run(plain, absolute)[:, order], atol=1e-3)


@pytest.mark.parametrize(("kv_heads", "rope"), [(4, False), (4, True), (2, True), (1, True), (1, False)])
def test_cached_decoding_equals_the_full_pass(kv_heads, rope):
    model = build(kv_heads, causal=True, positions=RoPE() if rope else None)
    full = run(model, X)
    for prefix in (0, 3):
        cache = model.init_cache(B, T)
        outputs = []
        if prefix:
            y, cache = prefill(model, X[:, :prefix], cache)
            outputs.append(y)
        for t in range(prefix, T):
            y, cache = step(model, X[:, t : t + 1], cache)
            outputs.append(y)
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-4)
    assert cache.payload["k"].shape == (B, kv_heads, T, D // N)


def test_keys_are_cached_at_their_absolute_position():
    model = build(2, causal=True, positions=RoPE())
    _, cache = model.prefill(X, model.init_cache(B, T))
    k = RoPE().rotate(model.qkv.key(X), jnp.arange(T))
    np.testing.assert_allclose(jnp.swapaxes(cache.payload["k"], 1, 2), k, atol=1e-6)


def test_a_full_cache_says_so():
    model = build(2, causal=True)
    _, cache = model.prefill(X, model.init_cache(B, T))
    with pytest.raises(ValueError, match="full"):
        model.step(X[:, :1], cache)
    _, cache = step(model, X[:, :1], cache)
    assert bool(cache.overflow.all())


def test_padding_content_never_matters():
    lengths = jnp.array([4, T])
    real = jnp.arange(T) < lengths[:, None]
    other = jnp.where(real[..., None], X, 100.0)
    model = build(2)
    mask = Lengths(lengths)
    np.testing.assert_array_equal(run(model, X, mask=mask)[real], run(model, other, mask=mask)[real])


def test_given_positions_order_the_tokens():
    model = build(2, causal=True, positions=RoPE())
    order = jnp.array([3, 0, 6, 1, 5, 2, 4])
    np.testing.assert_allclose(run(model, X[:, order], positions=order), run(model, X)[:, order], atol=1e-5)


def test_dropout_of_weights():
    model = build(2, causal=True, dropout_rate=0.5)
    assert not np.allclose(run(model, X), run(model, X))
    model.eval()
    np.testing.assert_array_equal(run(model, X), run(build(2, causal=True), X))


def test_mha_to_gqa_averages_the_heads_of_a_group():
    mha, gqa = build(causal=True, use_bias=True), build(2, causal=True, use_bias=True)
    nnx.update(gqa, mha_to_gqa(nnx.state(mha, nnx.Param), 2))
    for name in ("key", "value"):
        heads = getattr(mha.qkv, name).kernel[...]
        pooled = getattr(gqa.qkv, name).kernel[...]
        np.testing.assert_allclose(pooled[:, 0], (heads[:, 0] + heads[:, 1]) / 2, atol=1e-7)
        np.testing.assert_allclose(pooled[:, 1], (heads[:, 2] + heads[:, 3]) / 2, atol=1e-7)
    same = mha_to_gqa(nnx.state(mha, nnx.Param), N)
    jax.tree.map(np.testing.assert_array_equal, same, nnx.state(mha, nnx.Param))
    with pytest.raises(ValueError, match="does not divide"):
        mha_to_gqa(nnx.state(mha, nnx.Param), 3)
    with pytest.raises(ValueError, match="params"):
        mha_to_gqa(nnx.state(mha.out, nnx.Param), 2)


def test_base_model_has_63_045_632_parameters():
    base = nnx.eval_shape(lambda: Transformer(TransformerConfig(), rngs=nnx.Rngs(0)))
    assert parameter_count(base) == 63_045_632
    small = TransformerConfig(vocab_size=10, dim=16, num_heads=2, mlp_dim=24, num_layers=1)
    layers = nnx.eval_shape(lambda: Transformer(small, rngs=nnx.Rngs(0)))
    d, f = 16, 24
    assert parameter_count(layers.encoder) == 4 * d * d + 2 * d * f + f + d + 4 * d
    assert parameter_count(layers.decoder) == 8 * d * d + 2 * d * f + f + d + 6 * d


def test_noam_peaks_at_warmup():
    schedule = noam_schedule(512, warmup=40)
    rates = np.array([schedule(step) for step in range(1, 200)])
    assert rates.argmax() + 1 == 40
    assert rates.max() == pytest.approx((512 * 40) ** -0.5)
    assert schedule(0) == 0


def test_costs():
    for heads, kv_heads in HEADS:
        values = sizes(D=D, N=heads, K=kv_heads, T=T, L=3)
        model = build(kv_heads, causal=True)
        assert evaluate(PAPER.costs["cache numbers per token"], values) == model.cache_numbers_per_token()
        assert evaluate(PAPER.costs["parameters"], values) == parameter_count(model)
        caches = [model.init_cache(B, T, dtype=jnp.bfloat16) for _ in range(3)]
        assert cache_bytes(caches) == kv_cache_bytes(T, num_layers=3, num_kv_heads=kv_heads, head_dim=D // N, batch=B)


def test_precision_and_dtypes_are_those_of_flax():
    model = build(2, causal=True, dtype=jnp.bfloat16, param_dtype=jnp.float32, precision="highest")
    assert model.qkv.query.kernel.dtype == jnp.float32
    assert model.qkv.query.precision == "highest"
    assert run(model, X).dtype == jnp.bfloat16
    assert model.init_cache(B, T).payload["k"].dtype == jnp.bfloat16


def test_conversions_take_the_plain_classes_alone():
    class Gated(GroupedQueryAttention):
        pass

    for cls in (GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention):
        mixer = cls(D, N, rngs=nnx.Rngs(0))
        assert plain(mixer) is mixer
    for other in (Gated(D, N, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match=f"mixer: .*MultiQueryAttention itself is converted, got {type(other).__name__}"):
            plain(other)
        with pytest.raises(TypeError, match=f"got {type(other).__name__}"):
            GroupedQueryAttention.like(other)
    assert type(Gated.like(Gated(D, N, rngs=nnx.Rngs(0)))) is Gated


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: build(3), "3 key/value heads do not divide num_heads=4"),
        (lambda: GroupedQueryAttention(30, 4, rngs=nnx.Rngs(0)), "4 heads do not divide dim=30"),
        (lambda: build(dropout_rate=1.0), "dropout_rate"),
        (lambda: build(positions=RoPE())(X, memory=X), "memory"),
        (lambda: build(causal=True).init_cache(B, T, memory=X), "memory"),
        (lambda: build().init_cache(B, T), "causal"),
        (lambda: build().init_cache(B, T, memory=X, memory_mask=jnp.ones((B, T + 1), bool)), "memory_mask"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
