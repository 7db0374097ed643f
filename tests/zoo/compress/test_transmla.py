"""TransMLA (Meng et al., 2025): latent attention, and grouped attention turned into it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.cache import cache_bytes
from attnzoo.core.positions import NTK, Linear, RoPE, YaRN
from attnzoo.costs import evaluate, sizes
from attnzoo.nn.linear import parameter_count
from attnzoo.nn.mla import LatentKVAttention
from attnzoo.testing import oracle_attention
from attnzoo.zoo.compress.transmla import (
    PAPER,
    MultiHeadLatentAttention,
    balanced_kv_pca,
    freqfold,
    gqa_to_deepseek_mla,
    gqa_to_mla,
    merge_heads_rope,
    mla_absorb,
    mla_cache_bytes,
    rorope_rotate,
)
from attnzoo.zoo.normalizers.relaxed_attention import RelaxedAttention
from attnzoo.zoo.positions.fope import FoPEConfig
from attnzoo.zoo.projections.transformer import GroupedQueryAttention
from train.claims.common import fit

B, T, D, N, K, H = 2, 7, 24, 4, 2, 8
C = K * H
X = jax.random.normal(jax.random.key(0), (B, T, D))
run = nnx.jit(lambda model, *args, **kwargs: model(*args, **kwargs))
prefill = nnx.jit(lambda model, x, cache, absorb: model.prefill(x, cache, absorb=absorb), static_argnames="absorb")


def mla(**options):
    options = {"causal": True, "positions": RoPE(), "head_dim": H, "latent_dim": 10, "rope_dim": 4, **options}
    return MultiHeadLatentAttention(D, N, rngs=nnx.Rngs(0), **options)


def gqa(use_bias=False, **options):
    options = {"causal": True, "positions": RoPE(), "head_dim": H, "num_kv_heads": K, **options}
    mixer = GroupedQueryAttention(D, N, use_bias=use_bias, rngs=nnx.Rngs(0), **options)
    if use_bias:
        for i, layer in enumerate((mixer.qkv.query, mixer.qkv.key, mixer.qkv.value, mixer.out)):
            layer.bias[...] = jax.random.normal(jax.random.key(i), layer.bias.shape)
    return mixer


def decode(mixer, x, first=3, absorb=None):
    """A prompt, then token by token."""
    y, cache = prefill(mixer, x[:, :first], mixer.init_cache(x.shape[0], x.shape[1] + 2), absorb)
    outputs = [y]
    for t in range(first, x.shape[1]):
        y, cache = prefill(mixer, x[:, t : t + 1], cache, absorb)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


def turn(re, im, angle):
    """A pair of halves turned by an angle, float64."""
    return re * np.cos(angle) - im * np.sin(angle), im * np.cos(angle) + re * np.sin(angle)


def f64(x):
    return np.asarray(x[...], np.float64)


# --- latent attention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"value_dim": 5, "query_latent_dim": 6, "normed": False}])
def test_latent_attention_is_its_equations(options):
    m, x = mla(**options), np.asarray(X, np.float64)
    r, P = m.latent_dim, m.rope_dim
    rms = lambda c: c / np.sqrt((c**2).mean(-1, keepdims=True) + 1e-6)  # noqa: E731
    normed = rms if options.get("normed", True) else lambda c: c
    if "query_latent_dim" in options:
        q = np.einsum("btr,rnh->btnh", normed(x @ f64(m.query.down.kernel)), f64(m.query.up.kernel))
    else:
        q = np.einsum("btd,dnh->btnh", x, f64(m.query.kernel))
    down = x @ f64(m.down.kernel)
    c, k_r = normed(down[..., :r]), down[..., r:]
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(P // 2) / (P // 2))
    k_r = np.concatenate(turn(k_r[..., : P // 2], k_r[..., P // 2 :], angle), -1)
    q_r = np.concatenate(turn(q[..., H : H + P // 2], q[..., H + P // 2 :], angle[:, None]), -1)
    k = np.einsum("btr,rnh->btnh", c, f64(m.key_up.kernel))
    k = np.concatenate([k, np.broadcast_to(k_r[:, :, None], (B, T, N, P))], -1)
    v = np.einsum("btr,rnh->btnh", c, f64(m.value_up.kernel))
    q = np.concatenate([q[..., :H], q_r], -1)
    o, _ = oracle_attention(q, k, v, np.tri(T, dtype=bool), scale=(H + P) ** -0.5)
    np.testing.assert_allclose(run(m, X), np.einsum("btnh,nhd->btd", o, f64(m.out.kernel)), atol=1e-5)


@pytest.mark.parametrize("options", [{"value_dim": 5, "query_latent_dim": 6}, {"rope_dim": 0}, {"positions": None}])
def test_absorbed_decoding_is_expanded_decoding_is_the_full_pass(options):
    m = mla(**options)
    full = run(m, X)
    for absorb in (True, False):
        np.testing.assert_allclose(decode(m, X, absorb=absorb), full, atol=1e-5)


def test_absorbing_pays_for_few_queries():
    m = MultiHeadLatentAttention(64, 4, head_dim=128, latent_dim=512, rope_dim=64, causal=True, rngs=nnx.Rngs(0))
    # Expanding a slot: r (H + Hv) = 131072 per head. A query costs 2r - H - Hv = 768 more when absorbed.
    assert m.absorbs(1) and m.absorbs(170) and not m.absorbs(171)


def test_absorbed_decoding_is_one_attention_with_one_head(monkeypatch):
    from attnzoo.core.cache import attend

    calls = []

    def spy(q, k, v, **options):
        calls.append((q.shape, k.shape, v.shape))
        return original(q, k, v, **options)

    original = attend.attention
    monkeypatch.setattr(attend, "attention", spy)
    m = mla()
    jax.eval_shape(m.step, X[:, :1], m.init_cache(B, 16))
    width = m.latent_dim + m.rope_dim
    assert calls == [((B, 1, N, width), (B, 16, 1, width), (B, 16, 1, width))]


def test_absorbing_into_the_weights_is_the_same(rng):
    m = mla()
    q_c, _ = m.split_queries(X, jnp.arange(T))
    up = m.key_up.kernel[...]
    into_weights = jnp.einsum("btd,dnr->btnr", X, mla_absorb(m.query.kernel[..., :H], up))
    np.testing.assert_allclose(mla_absorb(q_c, up), into_weights, atol=1e-5)


def test_costs():
    m = mla(value_dim=6)
    values = {**sizes(N=N, D=D, H=H, Hv=6), "r": 10, "P": 4}
    assert evaluate(PAPER.costs["cache numbers per token"], values) == m.cache_numbers_per_token() == 14
    assert evaluate(PAPER.costs["parameters"], values) == parameter_count(m)
    measured = cache_bytes(m.init_cache(3, 20))
    assert measured == mla_cache_bytes(20, num_layers=1, latent_dim=10, rope_dim=4, batch=3, dtype=jnp.float32)
    assert mla_cache_bytes(1, num_layers=1, latent_dim=512, rope_dim=64) == 2 * 576


# --- (A) exact conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "use_bias"), [(None, True), (RoPE(), False), (RoPE(interleaved=True), True)])
def test_a_is_the_same_layer_with_the_same_cache(positions, use_bias):
    plain = gqa(use_bias, positions=positions)
    full = run(plain, X)
    for method in ("svd", "identity"):
        converted = gqa_to_mla(plain, method=method)
        np.testing.assert_allclose(run(converted, X), full, atol=1e-4)
        assert converted.key.down.kernel.shape == converted.value.down.kernel.shape == (D, C)
        assert converted.cache_numbers_per_token() == plain.cache_numbers_per_token() == 2 * C
    np.testing.assert_allclose(decode(converted, X), full, atol=1e-4)


def test_positions_of_the_heads_own():
    """Tables per kv head serve its query heads; the converted layer has a copy. A latent layer builds a plan by itself."""
    plain = gqa(positions=FoPEConfig(train_length=32))
    converted = gqa_to_mla(plain)
    np.testing.assert_allclose(run(converted, X), run(plain, X), atol=1e-4)
    assert converted.positions is not plain.positions
    np.testing.assert_array_equal(converted.positions.sin[...], plain.positions.sin[...])
    options = {"latent_dim": 5, "head_dim": H, "causal": True, "rngs": nnx.Rngs(0)}
    latent = LatentKVAttention(D, N, positions=FoPEConfig(train_length=32), **options)
    assert latent.positions.num_heads == N
    np.testing.assert_allclose(decode(latent, X), run(latent, X), atol=1e-5)


def test_svd_splits_the_singular_values_evenly():
    key = gqa_to_mla(gqa()).key
    down, up = f64(key.down.kernel), f64(key.up.kernel).reshape(C, N * H)
    np.testing.assert_allclose(down.T @ down, up @ up.T, atol=1e-4)
    replicated = np.repeat(f64(gqa().qkv.key.kernel), N // K, axis=1).reshape(D, N * H)
    np.testing.assert_allclose(down @ up, replicated, atol=1e-5)


def test_fewer_inputs_than_latents():
    plain = gqa(head_dim=16)  # K·H = 32 > D
    np.testing.assert_allclose(run(gqa_to_mla(plain), X), run(plain, X), atol=1e-4)


def test_the_converse_fails():
    """Heads of a generic latent layer all have keys of their own, at the rank that grouped attention has."""
    converted = gqa_to_mla(gqa(), method="identity")
    up = f64(converted.key.up.kernel)
    assert np.array_equal(up[:, 0], up[:, 1]) and not np.array_equal(up[:, 0], up[:, 2])
    generic = np.random.default_rng(0).normal(size=up.shape)
    keys = np.einsum("dr,rnh->dnh", f64(converted.key.down.kernel), generic)
    assert all(np.abs(keys[:, i] - keys[:, j]).max() > 0.1 for i in range(N) for j in range(i))
    assert np.linalg.matrix_rank(keys.reshape(D, N * H)) == C


# --- (B) to (E) ------------------------------------------------------------------------------------------


def gqa_scores(mixer, x):
    """q·k of every head under RoPE, in float64 [B, N, T, T]."""
    x, pos = np.asarray(x, np.float64), np.arange(x.shape[1])
    one = 1 if mixer.qkv.query.bias is None else 0
    q, k = (
        np.einsum("btd,dnh->btnh", x, f64(p.kernel)) + (0 if one else f64(p.bias)) for p in (mixer.qkv.query, mixer.qkv.key)
    )
    angle = pos[:, None, None] * 10000.0 ** (-np.arange(H // 2) / (H // 2))
    q, k = (np.concatenate(turn(y[..., : H // 2], y[..., H // 2 :], angle), -1) for y in (q, k))
    return np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, axis=2))


def merged_scores(merged, x, rotated=None):
    """The same from merged heads; `rotated` [G, M]: the frequency number of each direction, -1 for none."""
    x = merged.inputs(x)
    q = np.einsum("btd,dncgm->btncgm", x, merged.lifted_queries())
    k = np.einsum("btd,dcgm->btcgm", x, merged.key)[:, :, None]
    groups, size = merged.key.shape[2:]
    number = np.broadcast_to(np.arange(groups)[:, None], (groups, size)) if rotated is None else rotated
    frequency = np.where(number < 0, 0.0, 10000.0 ** (-number / (merged.head_dim // 2)))
    angle = np.arange(x.shape[1])[:, None, None, None] * frequency
    q, k = (np.stack(turn(y[:, :, :, 0], y[:, :, :, 1], angle), 3) for y in (q, k))
    return np.einsum("btncgm,bsxcgm->bnts", q, k)


def orthogonal(rng, groups, size):
    return np.linalg.qr(rng.normal(size=(groups, size, size)))[0]


@pytest.mark.parametrize("use_bias", [False, True])
def test_merged_heads_keep_scores(use_bias):
    mixer = gqa(use_bias)
    np.testing.assert_allclose(merged_scores(merge_heads_rope(mixer), X), gqa_scores(mixer, X), atol=1e-5)


def test_interleaved_pairs_become_halves():
    mixer = gqa(positions=RoPE(interleaved=True))
    paired = gqa()
    order = np.concatenate([np.arange(0, H, 2), np.arange(1, H, 2)])
    for name in ("query", "key"):
        getattr(paired.qkv, name).kernel[...] = getattr(mixer.qkv, name).kernel[...][..., order]
    np.testing.assert_allclose(merged_scores(merge_heads_rope(mixer), X), gqa_scores(paired, X), atol=1e-5)


def test_rorope_keeps_scores(rng):
    mixer = gqa(True)
    merged, expected = merge_heads_rope(mixer), gqa_scores(mixer, X)
    directions = freqfold(merged, X)
    assert directions.shape == (H // 2, K, K)
    for rotations in (orthogonal(rng, H // 2, K), directions):
        np.testing.assert_allclose(merged_scores(rorope_rotate(merged, rotations), X), expected, atol=1e-5)


def test_rorope_must_turn_both_halves_alike(rng):
    mixer = gqa()
    merged, expected = merge_heads_rope(mixer), gqa_scores(mixer, X)
    one, other = (rorope_rotate(merged, orthogonal(rng, H // 2, K)) for _ in range(2))

    def half_and_half(name):
        axis = {"key": 1, "key_lift": 2}[name]
        pick = lambda layer, i: np.take(getattr(layer, name), [i], axis)  # noqa: E731
        return np.concatenate([pick(one, 0), pick(other, 1)], axis)

    broken = dataclasses.replace(merged, key=half_and_half("key"), key_lift=half_and_half("key_lift"))
    assert np.abs(merged_scores(broken, X) - expected).max() > 0.1
    # Without positions any rotations will do.
    still = np.full(merged.key.shape[2:], -1)
    np.testing.assert_allclose(merged_scores(broken, X, still), merged_scores(merged, X, still), atol=1e-5)


def test_rorope_gathers_energy_in_the_first_head(rng):
    mixer = gqa()
    merged = merge_heads_rope(mixer)

    def energy(layer):
        return (np.einsum("btd,dcgm->btcgm", merged.inputs(X), layer.key) ** 2).sum((0, 1, 2))  # [G, M]

    before, after = energy(merged), energy(rorope_rotate(merged, freqfold(merged, X)))
    np.testing.assert_allclose(after.sum(-1), before.sum(-1))
    assert (after[:, 0] > before.max(-1)).all() and (np.diff(after, axis=-1) <= 0).all()


@pytest.mark.parametrize("fold", [2, 4])
def test_freqfold_is_approximate(fold):
    mixer = gqa()
    merged = merge_heads_rope(mixer)
    folded = rorope_rotate(merged, freqfold(merged, X, fold))
    assert folded.key.shape == (D, 2, H // 2 // fold, K * fold) and folded.fold == fold
    still = lambda layer: np.full(layer.key.shape[2:], -1)  # noqa: E731
    np.testing.assert_allclose(merged_scores(folded, X, still(folded)), merged_scores(merged, X, still(merged)), atol=1e-5)
    first = fold * np.broadcast_to(np.arange(H // 2 // fold)[:, None], folded.key.shape[2:])
    assert np.abs(merged_scores(folded, X, first) - gqa_scores(mixer, X)).max() > 0.05


def partial_rope_model(mixer, x, rope_dim, fold):
    """(D) in float64: only the first F / c directions of every group stay rotated."""
    collapse = H // rope_dim
    merged = merge_heads_rope(mixer)
    merged = rorope_rotate(merged, freqfold(merged, x, fold))
    groups, size = merged.key.shape[2:]
    number = np.full((groups, size), -1)
    for j in range(fold // collapse):
        number[:, j] = fold * np.arange(groups) + collapse * j
    logits = merged_scores(merged, x, number) / H**0.5
    logits = np.where(np.tri(x.shape[1], dtype=bool), logits, -np.inf)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    v = np.einsum("btd,dc,cnh->btnh", merged.inputs(x), merged.value, merged.value_lift)
    y = np.einsum("bnts,bsnh,nhd->btd", p, v, f64(mixer.out.kernel))
    return y if mixer.out.bias is None else y + f64(mixer.out.bias)


@pytest.mark.parametrize(("rope_dim", "fold", "use_bias"), [(8, 1, False), (4, 2, True), (4, 4, False), (2, 4, True)])
def test_full_rank_is_exactly_the_partial_rope_model(rope_dim, fold, use_bias):
    mixer = gqa(use_bias)
    made = gqa_to_deepseek_mla(mixer, X, rope_dim=rope_dim, latent_dim=2 * C - rope_dim, fold=fold, balance=0.7)
    expected = partial_rope_model(mixer, X, rope_dim, fold)
    np.testing.assert_allclose(run(made, X), expected, atol=1e-4)
    np.testing.assert_allclose(decode(made, X, absorb=True), expected, atol=1e-4)
    assert made.cache_numbers_per_token() == 2 * C


def test_one_kv_head_whole_rope_is_the_same_layer():
    """K = 1 and P = H: everything is rotated, nothing is lost."""
    mixer = gqa(num_kv_heads=1)
    made = gqa_to_deepseek_mla(mixer, X, rope_dim=H, latent_dim=H)
    np.testing.assert_allclose(run(made, X), run(mixer, X), atol=1e-4)
    assert made.cache_numbers_per_token() == 2 * H


def test_without_positions_full_rank_is_the_same_layer():
    mixer = gqa(positions=None)
    made = gqa_to_deepseek_mla(mixer, X, rope_dim=4, latent_dim=2 * C - 4, query_latent_dim=N * H)
    np.testing.assert_allclose(run(made, X), run(mixer, X), atol=1e-4)


def test_queries_of_low_rank():
    mixer = gqa(True)
    whole = gqa_to_deepseek_mla(mixer, X, rope_dim=4, latent_dim=20)
    same = gqa_to_deepseek_mla(mixer, X, rope_dim=4, latent_dim=20, query_latent_dim=D + 1)  # all that D inputs and a bias span
    np.testing.assert_allclose(run(same, X), run(whole, X), atol=1e-4)
    assert same.query.down.kernel.shape == (D, D + 1)
    fewer = gqa_to_deepseek_mla(mixer, X, rope_dim=4, latent_dim=20, query_latent_dim=4)
    assert np.abs(run(fewer, X) - run(whole, X)).max() > 1e-3


def test_reconstruction_improves_with_rank(rng):
    k, v = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12)) * 5, rng.normal(size=(200, 16))
    directions, rho = balanced_kv_pca(k, v, rope_dim=4)
    sizes_ = [np.linalg.norm(y, axis=0).mean() for y in (k, v[:, 4:])]
    np.testing.assert_allclose(rho, sizes_[0] / sizes_[1])
    np.testing.assert_allclose(directions.T @ directions, np.eye(28), atol=1e-10)
    joint = np.concatenate([k / rho, v], 1)
    errors = [np.linalg.norm(joint - joint @ directions[:, :r] @ directions[:, :r].T) for r in range(1, 29)]
    singular = np.linalg.svd(joint, compute_uv=False)  # no r directions leave less than the singular values after the r-th
    np.testing.assert_allclose(errors, [np.linalg.norm(singular[r:]) for r in range(1, 29)], rtol=1e-9, atol=1e-9)


def test_layer_error_on_calibration_data_falls_to_that_of_partial_rope():
    mixer = gqa()
    exact = partial_rope_model(mixer, X, 4, 2)
    errors = [
        np.abs(np.asarray(run(gqa_to_deepseek_mla(mixer, X, rope_dim=4, latent_dim=r), X)) - exact).mean() for r in (4, 12, 28)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_scaled_positions_follow():
    mixer = gqa(positions=RoPE(scaling=Linear(4.0)), num_kv_heads=1)
    made = gqa_to_deepseek_mla(mixer, X, rope_dim=H, latent_dim=H)
    assert made.positions == mixer.positions
    np.testing.assert_allclose(run(made, X), run(mixer, X), atol=1e-4)


# --- expressivity ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grouped_attention_cannot_become_a_latent_teacher():
    """A teacher whose heads have keys of their own: a student of equal cache stays away from it unless it is latent."""
    teacher = gqa_to_mla(gqa(), method="identity")
    for low in (teacher.key, teacher.value):
        low.up.kernel[...] = jax.random.normal(jax.random.key(1), low.up.kernel.shape) / C**0.5
    graphdef, state = nnx.split(teacher)

    def loss(model, x):
        return ((model(x) - nnx.merge(graphdef, state, copy=True)(x)) ** 2).mean()

    def batch(key):
        return jax.random.normal(key, (16, 12, D))

    scale = float((teacher(batch(jax.random.key(5))) ** 2).mean())
    grouped = gqa()
    residual = float(fit(grouped, loss, batch, steps=1500, seed=0, learning_rate=1e-2)[-100:].mean())
    assert residual > 0.05 * scale
    # The latent student that starts at the teacher's exact form stays there.
    latent = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 0, state))
    for low in (latent.key, latent.value):
        u, s, vt = np.linalg.svd(f64(low.down.kernel) @ f64(low.up.kernel).reshape(C, -1), full_matrices=False)
        low.down.kernel[...] = jnp.float32(u[:, :C] * s[:C] ** 0.5)
        low.up.kernel[...] = jnp.float32((s[:C, None] ** 0.5 * vt[:C]).reshape(C, N, H))
    assert float(fit(latent, loss, batch, steps=300, seed=0, learning_rate=1e-4)[-50:].mean()) < 1e-6


# --- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("query_latent_dim", [None, 6])
def test_parity_with_transformers(version, query_latent_dim):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if version == "v2":
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs_module
        from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as Config

        Attention, Rotary = theirs_module.DeepseekV2Attention, theirs_module.DeepseekV2RotaryEmbedding
    else:
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs_module
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as Config

        Attention, Rotary = theirs_module.DeepseekV3Attention, theirs_module.DeepseekV3RotaryEmbedding
    torch.manual_seed(0)
    config = Config(
        hidden_size=D,
        num_attention_heads=N,
        num_key_value_heads=N,
        q_lora_rank=query_latent_dim,
        kv_lora_rank=10,
        qk_nope_head_dim=H,
        qk_rope_head_dim=4,
        v_head_dim=6,
        attention_bias=query_latent_dim is not None,
        attn_implementation="eager",
    )
    theirs = Attention(config, layer_idx=0).double().eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.tensor(np.asarray(X, np.float64), requires_grad=True)
    rotary = Rotary(config)(x, torch.arange(T)[None])
    hidden = torch.full((T, T), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = theirs(x, position_embeddings=rotary, attention_mask=hidden)[0]
    (expected**2).sum().backward()

    weights = {name: jnp.asarray(p.detach().numpy(), jnp.float32) for name, p in theirs.named_parameters()}
    ours = mla(
        positions=RoPE(interleaved=True),
        value_dim=6,
        query_latent_dim=query_latent_dim,
        use_bias=query_latent_dim is not None,
    )
    names = {}
    if query_latent_dim is None:
        names["q_proj"] = ours.query
    else:
        names |= {"q_a_proj": ours.query.down, "q_b_proj": ours.query.up}
        ours.query.norm.scale[...] = weights["q_a_layernorm.weight"]
    names |= {"kv_a_proj_with_mqa": ours.down, "o_proj": ours.out}
    for name, layer in names.items():
        layer.kernel[...] = weights[f"{name}.weight"].T.reshape(layer.kernel.shape)
        if layer.bias is not None:
            layer.bias[...] = weights[f"{name}.bias"].reshape(layer.bias.shape)
    ours.norm.scale[...] = weights["kv_a_layernorm.weight"]
    both_up = weights["kv_b_proj.weight"].T.reshape(10, N, H + 6)
    ours.key_up.kernel[...], ours.value_up.kernel[...] = both_up[..., :H], both_up[..., H:]

    gradients, dx = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum(), argnums=(0, 1)))(ours, X)
    np.testing.assert_allclose(run(ours, X), expected.detach().numpy(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(decode(ours, X, absorb=True), expected.detach().numpy(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(dx, x.grad.numpy(), atol=1e-5, rtol=1e-5)
    down = theirs.kv_a_proj_with_mqa.weight.grad.numpy().T
    np.testing.assert_allclose(gradients.down.kernel[...], down, atol=1e-5, rtol=1e-5)
    up = theirs.kv_b_proj.weight.grad.numpy().T.reshape(10, N, H + 6)
    np.testing.assert_allclose(gradients.value_up.kernel[...], up[..., H:], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(gradients.key_up.kernel[...], up[..., :H], atol=1e-5, rtol=1e-5)


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rope_dim": 3}, "positions: cannot turn rope_dim=3 features: .* multiple of 2"),
        ({"rope_dim": -2}, "rope_dim: .* got -2"),
        ({"rope_dim": 2, "positions": RoPE(scaling=NTK(2.0))}, "rope_dim=2 features: scaling: NTK needs at least 4"),
        ({"positions": FoPEConfig(train_length=32)}, "positions: RoPE or None is needed.*got FoPEConfig"),
        ({"positions": FoPEConfig(train_length=32), "rope_dim": 0}, "positions: None or .* rotate is needed, got FoPEConfig"),
        ({"latent_dim": 0}, "latent_dim: a rank is at least 1"),
        ({"query_latent_dim": 0}, "query_latent_dim"),
        ({"positions": RoPE(axes=2)}, "positions: the shared key has one axis"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        mla(**options)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match=r"method.*'svd'"):
        gqa_to_mla(gqa(), method="svdd")
    for rope in (RoPE(fraction=0.5), RoPE(scaling=YaRN(2.0, 64))):
        with pytest.raises(ValueError, match="mixer: RoPE of all features"):
            merge_heads_rope(gqa(positions=rope))
    with pytest.raises(ValueError, match="latent_dim: a rank is at least 1, got 0"):
        LatentKVAttention(D, N, latent_dim=0, head_dim=H, rngs=nnx.Rngs(0))
    for convert in (gqa_to_mla, merge_heads_rope, lambda mixer: gqa_to_deepseek_mla(mixer, X, rope_dim=4, latent_dim=8)):
        with pytest.raises(TypeError, match="got RelaxedAttention"):
            convert(RelaxedAttention(D, N, rngs=nnx.Rngs(0)))
    merged = merge_heads_rope(gqa())
    with pytest.raises(ValueError, match=r"rotations: .*G·M = 8"):
        rorope_rotate(merged, np.eye(3)[None])
    with pytest.raises(ValueError, match="fold: must divide the 4 frequencies"):
        freqfold(merged, X, 3)
    for options, words in (
        ({"rope_dim": 6}, "rope_dim: must be even and divide head_dim=8"),
        ({"rope_dim": 4, "fold": 1}, "fold: must be a multiple of head_dim / rope_dim = 2"),
        ({"rope_dim": 4, "latent_dim": 29}, "latent_dim: from 1 to .* = 28"),
        ({"rope_dim": 4, "balance": 0.0}, "balance: must be above 0, got 0.0"),
        ({"rope_dim": 4, "query_latent_dim": 33}, "query_latent_dim: None, or from 1 to N·H = 32, got 33"),
    ):
        with pytest.raises(ValueError, match=words):
            gqa_to_deepseek_mla(gqa(), X, **{"latent_dim": 8, **options})
    for use_bias in (False, True):  # one feature less or more is not taken for a layer with or without biases
        for x in (X[..., 1:], jnp.pad(X, ((0, 0), (0, 0), (0, 1))), X.at[0, 0, 0].set(jnp.nan)):
            with pytest.raises(ValueError, match=rf"x: finite inputs \[..., D=24\] .* \(2, 7, {x.shape[-1]}\)"):
                gqa_to_deepseek_mla(gqa(use_bias), x, rope_dim=4, latent_dim=8)
    with pytest.raises(ValueError, match=r"k_nope, v: .*are the calibration inputs all 0"):
        gqa_to_deepseek_mla(gqa(), jnp.zeros_like(X), rope_dim=4, latent_dim=8)
