"""Tensor product attention (Zhang et al., 2025): factors, what they cache, and what they contain as special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core as jex_core

from attnzoo.core.cache import append, cache_bytes, init_paged_cache
from attnzoo.core.positions import RoPE
from attnzoo.costs import evaluate, sizes
from attnzoo.models.t6 import T6LM, T6Block, TPAConfig
from attnzoo.nn.linear import parameter_count
from attnzoo.testing import oracle_attention
from attnzoo.zoo.normalizers.relaxed_attention import RelaxedAttention
from attnzoo.zoo.positions.fope import FoPEConfig
from attnzoo.zoo.projections.tpa import (
    PAPER,
    TensorProductAttention,
    TPACache,
    TPAKVOnly,
    assemble,
    gqa_as_tpa,
    mha_as_tpa,
    mqa_as_tpa,
    tpa_cache_bytes,
    tpa_decode,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention, kv_cache_bytes

B, T, D, N, H = 2, 7, 24, 4, 8  # N·H is not D
X = jax.random.normal(jax.random.key(0), (B, T, D))
run = nnx.jit(lambda model, *args, **kwargs: model(*args, **kwargs))
at = jnp.arange(T)
heads = nnx.jit(lambda m, x: (m.queries(x, at), *m.expand(m.latents(x, at), at)))
prefill = nnx.jit(lambda model, x, cache, absorb: model.prefill(x, cache, absorb=absorb), static_argnames="absorb")


def build(cls=TensorProductAttention, **options):
    options = {"causal": True, "positions": RoPE(), "head_dim": H, "rngs": nnx.Rngs(0), **options}
    return cls(D, N, **options)


def rope64(b, pos, sign=1.0):
    """RoPE in float64, pairs (i, i + H/2); sign=-1 turns the other way."""
    half = b.shape[-1] // 2
    angle = sign * pos[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    x, y = b[..., :half], b[..., half:]
    return np.concatenate([x * np.cos(angle) - y * np.sin(angle), y * np.cos(angle) + x * np.sin(angle)], -1)


def reference(mixer, x, sign=1.0):
    """The equations of §3.1 in float64: Q, K, V and the output."""
    x, pos = np.asarray(x, np.float64), np.arange(x.shape[1])
    f64 = lambda p: np.asarray(p[...], np.float64)  # noqa: E731

    def heads(product, rotated):
        a = np.einsum("btd,dnr->btnr", x, f64(product.a.kernel))
        b = np.einsum("btd,drh->btrh", x, f64(product.b.kernel))
        b = rope64(b, pos, sign) if rotated else b
        return np.einsum("btnr,btrh->btnh", a, b) / product.rank

    q, k, v = heads(mixer.query, True), heads(mixer.key, True), heads(mixer.value, False)
    o, _ = oracle_attention(q, k, v, np.tri(x.shape[1], dtype=bool))
    return q, k, v, np.einsum("btnh,nhd->btd", o, f64(mixer.out.kernel))


# --- the equations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(6, 2, 2), (3, 1, 5)])
def test_is_its_equations(ranks):
    mixer = build(rank_q=ranks[0], rank_k=ranks[1], rank_v=ranks[2])
    for ours, theirs in zip((*heads(mixer, X), run(mixer, X)), reference(mixer, X), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_rope_of_the_product_is_the_product_of_rope(rng):
    a, b = (jnp.asarray(rng.normal(size=(B, T, *shape)), jnp.float32) for shape in ((N, 3), (3, H)))
    at = jnp.asarray(rng.integers(0, 500, (B, T)))
    rope = RoPE()
    np.testing.assert_allclose(rope.rotate(assemble(a, b), at), assemble(a, rope.rotate(b, at)), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_keys_of_a_token_have_rank_r(rank):
    mixer = build(rank_k=rank)
    _, k, _ = heads(mixer, X)
    singular = np.linalg.svd(np.asarray(k), compute_uv=False)
    assert (singular[..., rank:] < 1e-5).all()
    assert (singular[..., rank - 1] > 1e-3).all()


def test_initialisation_follows_the_fan_rule_of_three_axes():
    mixer = TensorProductAttention(64, 8, head_dim=32, rank_q=6, rngs=nnx.Rngs(0))
    for kernel, (first, second) in ((mixer.query.a.kernel, (8, 6)), (mixer.query.b.kernel, (6, 32))):
        bound = (6 / (first * second + 64 * second)) ** 0.5
        top = float(jnp.abs(kernel[...]).max())
        assert 0.95 * bound < top <= bound
    assert abs(float(jnp.abs(build(TPAKVOnly).query.kernel[...]).max()) / (6 / (D + N * H)) ** 0.5 - 1) < 0.05
    assert not build(zero_init_out=True).out.kernel[...].any()


def bare(**options):
    """With W_O the identity, so that the output is that of the heads, side by side."""
    mixer = TensorProductAttention(N * H, N, causal=True, rngs=nnx.Rngs(0), **options)
    mixer.out.kernel[...] = jnp.eye(N * H).reshape(N, H, N * H)
    return mixer


def test_head_norm():
    x = jax.random.normal(jax.random.key(1), (B, T, N * H))
    o = np.asarray(run(bare(), x), np.float64).reshape(B, T, N, H)
    expected = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(run(bare(head_norm=True), x).reshape(B, T, N, H), expected, atol=1e-4)


def test_costs():
    mixer = build(rank_q=5, rank_k=3, rank_v=2)
    values = {**sizes(N=N, D=D, H=H), "R_q": 5, "R_k": 3, "R_v": 2}
    assert evaluate(PAPER.costs["parameters"], values) == parameter_count(mixer)
    assert evaluate(PAPER.costs["cache numbers per token"], values) == mixer.cache_numbers_per_token() == 5 * (N + H)


# --- special cases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kv_heads", "convert"), [(N, mha_as_tpa), (2, gqa_as_tpa), (1, mqa_as_tpa)])
def test_grouped_attention_is_a_special_case(kv_heads, convert):
    plain = build(GroupedQueryAttention, num_kv_heads=kv_heads)
    factors = convert(plain)
    assert (factors.query.rank, factors.key.rank, factors.value.rank) == (N, kv_heads, kv_heads)
    np.testing.assert_allclose(run(factors, X), run(plain, X), atol=1e-5)
    # Constant factors are not remembered: the cache is as large as that of the original, and decodes to the same.
    assert factors.cache_numbers_per_token() == plain.cache_numbers_per_token() == 2 * kv_heads * H
    decoded, _ = decode(factors, X)
    np.testing.assert_allclose(decoded, run(plain, X), atol=1e-5)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="biases"):
        gqa_as_tpa(build(GroupedQueryAttention, use_bias=True))
    with pytest.raises(ValueError, match="by RoPE alone, and it has FourierPositionEmbedding"):
        gqa_as_tpa(build(GroupedQueryAttention, positions=FoPEConfig(train_length=64)))
    for convert in (gqa_as_tpa, mha_as_tpa, mqa_as_tpa):
        with pytest.raises(TypeError, match="got RelaxedAttention"):
            convert(build(RelaxedAttention))
    with pytest.raises(ValueError, match="num_kv_heads must be 4, got 2"):
        mha_as_tpa(build(GroupedQueryAttention, num_kv_heads=2))
    with pytest.raises(ValueError, match="num_kv_heads must be 1, got 4"):
        mqa_as_tpa(build(GroupedQueryAttention))


def test_dropout_is_converted_too():
    made = gqa_as_tpa(build(GroupedQueryAttention, dropout_rate=0.5))
    assert made.dropout.rate == 0.5 and not np.allclose(run(made, X), run(made, X))


def test_dense_queries_are_the_product_form_when_a_is_constant():
    full = build(noncontextual_a=True)
    kv_only = build(TPAKVOnly, noncontextual_a=True)
    a, b = full.query.a[...], full.query.b.kernel[...]
    kv_only.query.kernel[...] = jnp.einsum("nr,drh->dnh", a, b) / full.query.rank
    for name in ("key", "value", "out"):
        setattr(kv_only, name, getattr(full, name))
    np.testing.assert_allclose(run(kv_only, X), run(full, X), atol=1e-5)


def test_the_other_direction_of_rope_converts_exactly():
    """The authors' code turns by -theta: with the second half of W_Bq and W_Bk negated, ours is the same function."""
    mixer = build()
    _, _, _, theirs = reference(mixer, X, sign=-1.0)
    assert np.abs(run(mixer, X) - theirs).max() > 1e-3
    for product in (mixer.query, mixer.key):
        kernel = product.b.kernel[...]
        product.b.kernel[...] = kernel.at[..., H // 2 :].multiply(-1)
    np.testing.assert_allclose(run(mixer, X), theirs, atol=1e-5)


# --- decoding --------------------------------------------------------------------------------------------


def decode(mixer, x, first=3, *, cache=None, absorb=None):
    """A prompt, then token by token: (outputs, cache)."""
    cache = mixer.init_cache(x.shape[0], x.shape[1] + 2) if cache is None else cache
    y, cache = prefill(mixer, x[:, :first], cache, absorb)
    outputs = [y]
    for t in range(first, x.shape[1]):
        y, cache = prefill(mixer, x[:, t : t + 1], cache, absorb)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_factorised_decoding_is_materialised_decoding_is_the_full_pass(rank):
    mixer = build(rank_k=rank, rank_v=rank)
    full = run(mixer, X)
    for absorb in (True, False):
        np.testing.assert_allclose(decode(mixer, X, absorb=absorb)[0], full, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"noncontextual_a": True}, {"noncontextual_b": True}, {"rank_q": None}, {"positions": None}]
)
def test_every_variant_decodes(options):
    mixer = build(**options)
    np.testing.assert_allclose(decode(mixer, X)[0], run(mixer, X), atol=1e-5)
    kept = {"noncontextual_a": 4 * H, "noncontextual_b": 4 * N}.get(next(iter(options)), 4 * (N + H))
    assert mixer.cache_numbers_per_token() == kept


def test_the_cache_is_the_factors():
    mixer = build(rank_k=3, rank_v=2)
    _, cache = decode(mixer, X)
    assert isinstance(cache.payload, TPACache)
    (a_k, b_k), (a_v, b_v) = mixer.key(X), mixer.value(X)
    expected = TPACache(a_k, RoPE().rotate(b_k, jnp.arange(T)), a_v, b_v)
    for held, made in zip(cache.payload, expected, strict=True):
        np.testing.assert_allclose(held[:, 0, :T], made, atol=1e-6)
    # Rotated before they were cached is the same as cached and rotated at their absolute positions.
    b = np.asarray(b_k, np.float64)
    np.testing.assert_allclose(held_b := np.asarray(cache.payload.b_k[:, 0, :T]), rope64(b, np.arange(T)), atol=1e-5)
    assert held_b.shape == (B, T, 3, H)


def test_factors_live_in_pages_too():
    mixer = build()
    paged = init_paged_cache(B, T + 2, mixer.cache_spec(), page=4, pages=6)
    np.testing.assert_allclose(decode(mixer, X, cache=paged)[0], run(mixer, X), atol=1e-5)


def test_decoding_reads_no_keys(rng):
    """No array of the compiled step is as large as the keys or values of all slots."""
    slots, heads, width = 64, 16, 32
    mixer = TensorProductAttention(16, heads, head_dim=width, rank_k=1, rank_v=1, causal=True, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(mixer)
    step = lambda s, x, c: nnx.merge(graphdef, s).step(x, c)[0]  # noqa: E731
    jaxpr = jax.make_jaxpr(step)(state, jnp.zeros((1, 1, 16)), mixer.init_cache(1, slots))
    shapes = [v.aval.size for eqn in all_equations(jaxpr.jaxpr) for v in eqn.outvars]
    assert max(shapes) < slots * heads * width
    # The head factors and feature factors are what is largest.
    assert max(shapes) >= slots * width


def all_equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jex_core.jaxprs_in_params(eqn.params):
            yield from all_equations(inner)


def test_tpa_decode_is_the_sum_over_ranks(rng):
    """The formula of §3.2 term by term, with a masked slot."""
    S, R_q, R_k, R_v = 5, 3, 2, 4
    a_q, b_q, a_k, b_k, a_v, b_v = (
        rng.normal(size=(1, *s)) for s in ((1, N, R_q), (1, R_q, H), (S, N, R_k), (S, R_k, H), (S, N, R_v), (S, R_v, H))
    )
    logits = np.zeros((N, S))
    for n, m, r, c in np.ndindex(N, S, R_q, R_k):
        logits[n, m] += a_q[0, 0, n, r] * a_k[0, m, n, c] * (b_q[0, 0, r] @ b_k[0, m, c]) / (R_q * R_k * H**0.5)
    p = np.exp(logits) * (np.arange(S) < S - 1)
    p /= p.sum(-1, keepdims=True)
    o = np.zeros((N, H))
    for n, m, c in np.ndindex(N, S, R_v):
        o[n] += p[n, m] * a_v[0, m, n, c] * b_v[0, m, c] / R_v
    hide = jnp.where(jnp.arange(S) < S - 1, 0.0, -jnp.inf)
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    held = TPACache(*map(f32, (a_k, b_k, a_v, b_v)))
    made = tpa_decode(f32(a_q), f32(b_q), held, lambda logits: jax.nn.softmax(logits + hide, axis=-1))
    np.testing.assert_allclose(made[0, 0], o, atol=1e-5)


def test_low_precision_decoding():
    mixer = build(dtype=jnp.bfloat16)
    x = X.astype(jnp.bfloat16)
    y, cache = decode(mixer, x)
    assert y.dtype == jnp.bfloat16 and cache.payload.a_k.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), run(build(), X), atol=0.05)


def test_cache_bytes():
    kw = {"num_layers": 1, "dtype": jnp.bfloat16}
    assert tpa_cache_bytes(1, num_heads=32, head_dim=128, rank_k=2, rank_v=2, **kw) == 1280
    assert kv_cache_bytes(1, num_kv_heads=32, head_dim=128, **kw) == 16384
    mixer = build(rank_k=3, rank_v=1)
    measured = cache_bytes(mixer.init_cache(5, 20))
    sizes_ = {"num_layers": 1, "num_heads": N, "head_dim": H, "rank_k": 3, "rank_v": 1}
    assert measured == tpa_cache_bytes(20, batch=5, dtype=jnp.float32, **sizes_)


def test_rows_that_see_nothing_are_zero():
    mixer = build()
    first = jnp.zeros((B, 1), jnp.int32)
    cache = append(mixer.init_cache(B, 4), mixer.latents(X[:, :1], first), jnp.array([0, 1]))
    o = nnx.jit(lambda m, x, c: m.attend(x, c, first, mask=None))(mixer, X[:, :1], cache)
    assert not o[0].any() and o[1].any()


# --- T6 --------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 11, "dim": 16, "num_layers": 2, "num_heads": 5, "head_dim": 4}


def test_t6_is_causal_and_decodes():
    model = T6LM(TPAConfig(**SMALL), rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)
    full = run(model, tokens)
    changed = run(model, tokens.at[:, 4:].set((tokens[:, 4:] + 1) % 11))
    np.testing.assert_array_equal(changed[:, :4], full[:, :4])
    assert not np.allclose(changed[:, 4], full[:, 4])
    y, cache = nnx.jit(lambda m, x, c: m.prefill(x, c))(model, tokens[:, :5], model.init_cache(2, 6))
    np.testing.assert_allclose(y, full[:, :5], atol=1e-5)
    last, _ = nnx.jit(lambda m, x, c: m.step(x, c))(model, tokens[:, 5:], cache)
    np.testing.assert_allclose(last, full[:, 5:], atol=1e-5)


def test_t6_blocks_are_the_papers():
    model = T6LM(TPAConfig(**SMALL, zero_init_out=True), rngs=nnx.Rngs(0))
    block = model.layers.runs[0]
    assert isinstance(block, T6Block) and isinstance(block.mixer, TensorProductAttention)
    assert block.feed_forward.up.kernel.shape == (16, 8 * 16 // 3)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert not any("norm" in name for name in names)  # RMSNorm without gains
    x = jax.random.normal(jax.random.key(0), (1, 3, 16))
    np.testing.assert_array_equal(run(block, x)[0], x)  # both parts start at zero
    kv_only = T6LM(TPAConfig(**SMALL, rank_q=None), rngs=nnx.Rngs(0))
    assert kv_only.layers.runs[0].mixer.query.kernel.shape == (16, 5, 4)


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank_q": 0}, "rank_q: a rank is at least 1, got 0"),
        ({"rank_v": -1}, "rank_v"),
        ({"head_dim": 5}, "head_dim.*multiple of 2"),
        ({"positions": FoPEConfig(train_length=64)}, "positions: RoPE or None is needed.*got FoPEConfig"),
        ({"noncontextual_a": True, "noncontextual_b": True}, "noncontextual_a, noncontextual_b"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_t6_says_what_it_fixes():
    with pytest.raises(ValueError, match="positions: a T6 has positions='rope'"):
        TPAConfig(positions="learned")
