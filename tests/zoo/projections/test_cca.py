"""Compressed convolutional attention: convolutions, means, shift and norms in the latent, and their cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention
from attnzoo.core.cache import cache_bytes
from attnzoo.core.masks import Causal, Lengths, Segments
from attnzoo.core.positions import RoPE
from attnzoo.costs import evaluate, sizes
from attnzoo.nn.linear import parameter_count
from attnzoo.zoo.projections.cca import (
    CCGQA,
    PAPER,
    CompressedConvAttention,
    cca_cache_bytes,
    cca_conv,
    cca_flops,
    qk_mean,
    value_shift,
)

B, T, D, N, K, H = 2, 9, 16, 4, 2, 4
run = nnx.jit(lambda mixer, x, **options: mixer(x, **options))
parts = nnx.jit(lambda mixer, x: mixer._heads(*mixer._latent(x)))  # q, k (position not applied), v
prefill = nnx.jit(lambda mixer, x, cache, lengths=None: mixer.prefill(x, cache, lengths=lengths))


def build(num_kv_heads=K, seed=0, **options):
    """A mixer whose biases and temperatures are not at their initial values."""
    options = {"causal": True, "positions": RoPE(), "head_dim": H, "num_kv_heads": num_kv_heads, **options}
    mixer = CompressedConvAttention(D, N, rngs=nnx.Rngs(seed), **options)
    draw = np.random.default_rng(seed)
    for name in ("depthwise_bias", "grouped_bias", "beta"):
        if hasattr(mixer, name):
            leaf = getattr(mixer, name)
            leaf[...] = leaf[...] + jnp.asarray(draw.normal(size=leaf.shape), jnp.float32) * 0.3
    return mixer


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


# --- the equations, token by token in float64 ------------------------------------------------------------


def reference(mixer, x, kv_heads):
    """(y, q, k, v) of one row x [T, D], q and k before their position."""
    p = {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(nnx.state(mixer))}
    x = np.asarray(x, np.float64)
    length, groups, heads = len(x), N // kv_heads, N + kv_heads
    q0 = np.einsum("td,dnh->tnh", x, p["qkv.query.kernel"])
    k0 = np.einsum("td,dnh->tnh", x, p["qkv.key.kernel"])
    t0, t1 = len(p["depthwise"]), len(p["grouped"])
    z = np.zeros((t0 + t1 - 2 + length, heads, H))
    z[t0 + t1 - 2 :] = np.concatenate([q0, k0], axis=1)
    y = np.stack([sum(p["depthwise"][i] * z[s + i] for i in range(t0)) + p["depthwise_bias"] for s in range(len(z) - t0 + 1)])
    mixed = np.zeros((length, heads, H))
    for t in range(length):
        for g in range(heads):
            mixed[t, g] = p["grouped_bias"][g] + sum(y[t + j, g] @ p["grouped"][j, g] for j in range(t1))
    q, k = np.zeros_like(q0), np.zeros_like(k0)
    for t in range(length):
        means = [(q0[t, n] + k0[t, n // groups]) / 2 for n in range(N)]
        for n in range(N):
            raw = mixed[t, n] + means[n]
            q[t, n] = np.sqrt(H) * raw / np.linalg.norm(raw)
        for g in range(kv_heads):
            raw = mixed[t, N + g] + np.mean(means[g * groups : (g + 1) * groups], axis=0)
            k[t, g] = p["beta"][g] * np.sqrt(H) * raw / np.linalg.norm(raw)
    w_v = p["qkv.value.kernel"].reshape(D, kv_heads * H)
    half = kv_heads * H // 2
    before = np.concatenate([np.zeros((1, D)), x[:-1]])
    v = np.concatenate([x @ w_v[:, :half], before @ w_v[:, half:]], axis=1).reshape(length, kv_heads, H)

    def rotated(a):
        angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(0, H, 2) / H)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        left, right = a[..., : H // 2], a[..., H // 2 :]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    rq, rk = rotated(q), rotated(k)
    o = np.zeros((length, N, H))
    for n in range(N):
        for t in range(length):
            s = rk[: t + 1, n // groups] @ rq[t, n] / np.sqrt(H)
            w = np.exp(s - s.max())
            o[t, n] = (w / w.sum()) @ v[: t + 1, n // groups]
    return np.einsum("tnh,nhd->td", o, p["out.kernel"]), q, k, v


@pytest.mark.parametrize(("kv_heads", "kernels"), [(4, (2, 2)), (2, (3, 4)), (1, (1, 2))])
def test_it_is_the_equations(x, kv_heads, kernels):
    mixer = build(kv_heads, kernels=kernels)
    got, heads = run(mixer, x), parts(mixer, x)
    for row in range(B):
        y, *qkv = reference(mixer, x[row], kv_heads)
        np.testing.assert_allclose(got[row], y, atol=1e-5)
        for ours, theirs in zip(heads, qkv, strict=True):
            np.testing.assert_allclose(ours[row], theirs, atol=1e-5)


# --- what the paper states -------------------------------------------------------------------------------


def test_an_output_depends_on_the_past_alone(x):
    mixer = build()
    y = run(mixer, x)
    for t in range(1, T):
        changed = run(mixer, x.at[:, t:].add(1.0))
        np.testing.assert_array_equal(changed[:, :t], y[:, :t])
        assert not np.allclose(changed[:, t], y[:, t], atol=1e-3)


def test_without_its_three_parts_it_is_normalised_gqa(x):
    mixer = build(use_mean=False, use_shift=False)
    for name, steps in (("depthwise", 2), ("grouped", 2)):
        kernel = jnp.zeros_like(getattr(mixer, name)[...])
        one = jnp.eye(H) if name == "grouped" else 1.0
        getattr(mixer, name)[...] = kernel.at[steps - 1].set(one)
        getattr(mixer, f"{name}_bias")[...] = jnp.zeros_like(getattr(mixer, f"{name}_bias")[...])
    q, k, v = mixer.qkv(x)
    q = q / jnp.linalg.norm(q, axis=-1, keepdims=True) * H**0.5
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True) * H**0.5 * mixer.beta[...][:, None]
    q, k = (RoPE().rotate(a, jnp.arange(T)) for a in (q, k))
    expected = mixer.out(attention(q, k, v, mask=Causal()))
    np.testing.assert_allclose(run(mixer, x), expected, atol=1e-5)
    # use_conv=False leaves the convolutions out, which is what identity kernels do.
    plain = build(use_conv=False, use_mean=False, use_shift=False)
    nnx.update(plain, nnx.State({name: nnx.state(mixer)[name] for name in ("qkv", "out", "beta")}))
    np.testing.assert_allclose(run(plain, x), expected, atol=1e-5)


def test_means(rng):
    q0, k0 = (jnp.asarray(rng.normal(size=(3, n, H)), jnp.float32) for n in (N, N))
    mean_q, mean_k = qk_mean(q0, k0)
    np.testing.assert_array_equal(mean_q, mean_k)
    np.testing.assert_allclose(mean_q, (q0 + k0) / 2, atol=1e-6)
    mean_q, mean_k = qk_mean(q0, k0[:, :K])
    np.testing.assert_allclose(mean_k, mean_q.reshape(3, K, N // K, H).mean(2), atol=1e-6)
    np.testing.assert_allclose(mean_k, (q0.reshape(3, K, N // K, H).mean(2) + k0[:, :K]) / 2, atol=1e-6)
    for n in range(N):
        np.testing.assert_allclose(mean_q[:, n], (q0[:, n] + k0[:, n // (N // K)]) / 2, atol=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_lengths_of_queries_and_keys(x, fraction):
    mixer = build(positions=RoPE(fraction=fraction))
    q, k, _ = parts(mixer, x)
    for rotate in (lambda a: a, lambda a: mixer.positions.rotate(a, jnp.arange(T))):
        np.testing.assert_allclose(jnp.linalg.norm(rotate(q), axis=-1), H**0.5, rtol=1e-5)
        lengths = jnp.abs(mixer.beta[...]) * H**0.5
        np.testing.assert_allclose(jnp.linalg.norm(rotate(k), axis=-1), jnp.broadcast_to(lengths, (B, T, K)), rtol=1e-5)


def test_beta_zero_is_a_running_mean(x):
    mixer = build(temp_init=0.0)
    mixer.beta[...] = jnp.zeros(K)
    weights = mixer.attention_weights(x)
    np.testing.assert_allclose(weights, jnp.broadcast_to(np.tri(T) / np.arange(1, T + 1)[:, None], weights.shape), atol=1e-6)


def test_exponential_temperature(x):
    linear, exponential = build(temp_init=1.0), build(temp_mode="exp")
    assert CompressedConvAttention(D, N, temp_mode="exp", rngs=nnx.Rngs(0)).beta[...].tolist() == [0.0] * N
    assert CompressedConvAttention(D, N, rngs=nnx.Rngs(0)).beta[...].tolist() == [1.0] * N
    linear.beta[...] = jnp.exp(exponential.beta[...])
    np.testing.assert_allclose(run(exponential, x), run(linear, x), atol=1e-6)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_values_of_the_token_before(x, kv_heads):
    mixer = build(kv_heads)
    raw = mixer.qkv.value(x).reshape(B, T, -1)
    v = parts(mixer, x)[2].reshape(B, T, -1)
    half = kv_heads * H // 2
    assert not v[:, 0, half:].any()
    np.testing.assert_array_equal(v[..., :half], raw[..., :half])
    np.testing.assert_array_equal(v[:, 1:, half:], raw[:, :-1, half:])
    if kv_heads == 2:  # whole heads: the first of the token, the last of the one before
        np.testing.assert_array_equal(value_shift(mixer.qkv.value(x))[:, 1:, 1], mixer.qkv.value(x)[:, :-1, 1])


def test_both_convolutions_are_padded_once(rng):
    """The second one reads the first one's bias before the sequence, not zeros."""
    kernel = jnp.asarray(rng.normal(size=(2, 1, 1)), jnp.float32), jnp.full((1, 1), 3.0)
    head = jnp.asarray([2.0, 0.0]).reshape(2, 1, 1, 1), jnp.zeros((1, 1))
    out = cca_conv(jnp.ones((1, 3, 1, 1)), kernel, head)[0, :, 0, 0]
    w = kernel[0][:, 0, 0]
    np.testing.assert_allclose(out, [6.0, 2 * (w[1] + 3), 2 * (w[0] + w[1] + 3)], rtol=1e-6)


def test_vectors_of_zeros_give_no_nan():
    mixer = CompressedConvAttention(D, N, causal=True, head_dim=H, rngs=nnx.Rngs(0))  # biases are zero
    value, gradient = nnx.jit(nnx.value_and_grad(lambda m: (m(jnp.zeros((1, 3, D))) ** 2).sum()))(mixer)
    assert float(value) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradient))


# --- packed and padded rows ------------------------------------------------------------------------------


def test_packed_documents_are_separate(x):
    mixer = build(kernels=(2, 3))
    cut = 4
    ids = jnp.where(jnp.arange(T) < cut, 7, 3)[None].repeat(B, 0)
    at = jnp.where(jnp.arange(T) < cut, jnp.arange(T), jnp.arange(T) - cut)
    packed = run(mixer, x, segment_ids=ids, positions=at)
    np.testing.assert_allclose(packed[:, :cut], run(mixer, x[:, :cut]), atol=1e-5)
    np.testing.assert_allclose(packed[:, cut:], run(mixer, x[:, cut:]), atol=1e-5)
    assert not np.allclose(run(mixer, x, positions=at)[:, cut:], packed[:, cut:], atol=1e-2)
    # The ids of a mask count as those of the argument do, and together with them.
    masked = run(mixer, x, mask=Lengths(jnp.full(B, T)) & Segments(ids[0]), positions=at)
    np.testing.assert_allclose(masked, packed, atol=1e-6)
    later = (jnp.arange(T) < 7).astype(jnp.int32)
    joint = run(mixer, x, mask=Segments(later), segment_ids=ids, positions=at)
    np.testing.assert_allclose(joint, run(mixer, x, segment_ids=10 * later + ids, positions=at), atol=1e-6)


def test_padding_on_either_side(x):
    mixer = build()
    y = run(mixer, x[:, 3:])
    left = run(mixer, x, segment_ids=jnp.where(jnp.arange(T) < 3, -1, 0)[None].repeat(B, 0))
    np.testing.assert_allclose(left[:, 3:], y, atol=1e-5)
    # Zeros instead of an id, with the padding hidden from attention, are the same: no projection has a bias.
    zeros = run(mixer, x.at[:, :3].set(0.0), mask=jnp.arange(T) >= 3)
    np.testing.assert_allclose(zeros[:, 3:], y, atol=1e-5)
    right = run(mixer, x, mask=Lengths(jnp.array([T - 2, T])))
    np.testing.assert_allclose(right[0, : T - 2], run(mixer, x[:, : T - 2])[0], atol=1e-5)


# --- decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"kernels": (3, 4)},
        {"use_conv": False, "use_shift": False},
        {"use_shift": False, "num_kv_heads": 1, "head_dim": 1, "positions": None},  # a value without halves
    ],
    ids=str,
)
def test_any_split_of_the_prompt_is_the_full_forward(x, options):
    mixer = build(**options)
    full = run(mixer, x)
    for pieces in ([T], [1] * T, [1, 4, 4], [4, 1, 4]):
        cache, outputs, at = mixer.init_cache(B, T), [], 0
        for piece in pieces:
            y, cache = prefill(mixer, x[:, at : at + piece], cache)
            outputs.append(y)
            at += piece
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)


def test_rows_of_different_lengths_keep_their_own_window(x):
    mixer = build(kernels=(3, 2))
    full = run(mixer, x)
    lengths = jnp.array([5, 0])
    _, cache = prefill(mixer, x[:, :7], mixer.init_cache(B, T), lengths)
    z, v = mixer._latent(x)
    np.testing.assert_allclose(cache.window[0], z[0, 2:5], atol=1e-6)
    np.testing.assert_allclose(cache.delayed[0], v[0, 4].reshape(-1)[K * H // 2 :], atol=1e-6)
    assert not cache.window[1].any()
    y, _ = prefill(mixer, jnp.stack([x[0, 5:7], x[1, 0:2]]), cache)
    np.testing.assert_allclose(y[0], full[0, 5:7], atol=1e-5)
    np.testing.assert_allclose(y[1], full[1, :2], atol=1e-5)


def test_what_the_cache_holds(x):
    mixer = build(kernels=(2, 3))
    _, cache = prefill(mixer, x, mixer.init_cache(B, T))
    _, k, v = parts(mixer, x)
    np.testing.assert_allclose(jnp.swapaxes(cache.kv.payload["k"], 1, 2), RoPE().rotate(k, jnp.arange(T)), atol=1e-6)
    np.testing.assert_allclose(jnp.swapaxes(cache.kv.payload["v"], 1, 2), v, atol=1e-6)
    z, raw = mixer._latent(x)
    np.testing.assert_allclose(cache.window, z[:, -3:], atol=1e-6)
    np.testing.assert_allclose(cache.delayed, raw[:, -1].reshape(B, -1)[:, K * H // 2 :], atol=1e-6)
    assert cache.kv.payload.keys() == {"k", "v"}
    stated = cca_cache_bytes(
        T, num_layers=1, num_heads=N, num_kv_heads=K, head_dim=H, kernels=(2, 3), batch=B, dtype=jnp.float32
    )
    assert cache_bytes(cache) + cache.window.nbytes + cache.delayed.nbytes == stated
    assert mixer.cache_numbers_per_token() == 2 * K * H


# --- costs, bad input ------------------------------------------------------------------------------------


def test_costs():
    zaya = {"num_layers": 1, "num_heads": 8, "num_kv_heads": 2, "head_dim": 128}
    assert cca_cache_bytes(11, **zaya) - cca_cache_bytes(10, **zaya) == 1024  # 8192 for 2·D in bfloat16
    values = {**sizes(D=D, N=N, K=K, H=H, T=T), "t0": 3, "t1": 2}
    mixer = build(kernels=(3, 2))
    assert evaluate(PAPER.costs["parameters"], values) == parameter_count(mixer)
    operations = cca_flops(T, T, dim=D, num_heads=N, num_kv_heads=K, head_dim=H, kernels=(3, 2))
    assert operations == 2 * evaluate(PAPER.costs["multiply-adds"], values)
    constant = evaluate(PAPER.costs["cache numbers besides"], values)
    cache = mixer.init_cache(1, 5)
    assert constant == cache.window.size + cache.delayed.size
    # Scores and values cost 1 / C_1 of what they cost at full width.
    wide, narrow = (
        cca_flops(1, 9, dim=32, num_heads=4, num_kv_heads=4, head_dim=h) - cca_flops(1, 8, dim=32, num_heads=4,
        num_kv_heads=4, head_dim=h) for h in (8, 2)
    )  # fmt: skip
    assert wide == 4 * narrow


def test_grouped_heads_by_name():
    mixer = CCGQA(32, 8, rngs=nnx.Rngs(0))
    assert (mixer.qkv.num_kv_heads, mixer.qkv.head_dim) == (2, 2)
    assert CompressedConvAttention(32, 8, rngs=nnx.Rngs(0)).qkv.num_kv_heads == 8


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (CompressedConvAttention, {"compression": 3}, "compression: 4 heads of dim=16 are 4 wide, which 3 does not"),
        (CompressedConvAttention, {"kernels": (2, 0)}, r"kernels: .* at least one token each, got \(2, 0\)"),
        (CompressedConvAttention, {"kernels": 3}, r"kernels: \(t0, t1\).*got 3"),
        (CompressedConvAttention, {"head_dim": 0}, "head_dim: must be at least 1, got 0"),
        (CompressedConvAttention, {"num_kv_heads": 1, "head_dim": 3}, r"K·H must be even, got 1·3"),
        (CompressedConvAttention, {"temp_mode": "log"}, "temp_mode 'log'.*exp, linear"),
        (CompressedConvAttention, {"num_kv_heads": 3}, "num_kv_heads: 3"),
        (CCGQA, {"num_kv_heads": 4}, "fewer than num_heads=4, got 4"),
    ],
)
def test_bad_arguments(cls, options, words):
    with pytest.raises(ValueError, match=words):
        cls(D, N, rngs=nnx.Rngs(0), **options)


def test_bad_calls(x):
    mixer = build()
    with pytest.raises(ValueError, match=r"segment_ids: .*\(2, 9\), got \(9,\)"):
        mixer(x, segment_ids=jnp.zeros(T, jnp.int32))
    with pytest.raises(ValueError, match=r"memory: .*one sequence"):
        mixer.attention_weights(x, memory=x)
    with pytest.raises(ValueError, match=r"mask: ids of segments are \[9\].*got \(3,\)"):
        mixer(x, mask=Segments(jnp.zeros(3, jnp.int32)))
    with pytest.raises(ValueError, match=r"mask: .*without Segments"):
        mixer.prefill(x, mixer.init_cache(B, T), mask=Segments(jnp.zeros(T, jnp.int32)))


# --- parity ----------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_parity_with_transformers(x):
    torch = pytest.importorskip("torch")
    zaya = pytest.importorskip("transformers.models.zaya.modeling_zaya", reason="this transformers has no ZAYA")
    from transformers import DynamicCache

    head_dim = 8  # half of it is rotated
    sizes = {"hidden_size": D, "num_attention_heads": N, "num_key_value_heads": K, "head_dim": head_dim}
    config = zaya.ZayaConfig(num_hidden_layers=1, num_experts=2, vocab_size=8, **sizes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = zaya.ZayaAttention(config, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.4)
    ours = build(head_dim=head_dim, positions=RoPE(theta=5e6, fraction=0.5))

    def to_ours(get):
        """Arrays of theirs (parameters or gradients), in our shapes."""
        p = theirs.qkv_proj
        heads = N + K
        value = np.concatenate([get(p.v_proj_current.weight), get(p.v_proj_delayed.weight)]).T
        return {
            "qkv.query.kernel": get(p.q_proj.weight).T.reshape(D, N, head_dim),
            "qkv.key.kernel": get(p.k_proj.weight).T.reshape(D, K, head_dim),
            "qkv.value.kernel": value.reshape(D, K, head_dim),
            "out.kernel": get(theirs.o_proj.weight).T.reshape(N, head_dim, D),
            "depthwise": get(p.conv_qk_depthwise.weight)[:, 0].T.reshape(2, heads, head_dim),
            "depthwise_bias": get(p.conv_qk_depthwise.bias).reshape(heads, head_dim),
            "grouped": get(p.conv_qk_grouped.weight).reshape(heads, head_dim, head_dim, 2).transpose(3, 0, 2, 1),
            "grouped_bias": get(p.conv_qk_grouped.bias).reshape(heads, head_dim),
            "beta": get(theirs.qk_norm.temp),
        }

    copied = to_ours(lambda parameter: parameter.detach().numpy())
    for path, leaf in nnx.to_flat_state(nnx.state(ours)):
        leaf[...] = jnp.asarray(copied.pop(".".join(map(str, path))))
    assert not copied

    inputs = torch.tensor(np.asarray(x))
    rotary = zaya.ZayaRotaryEmbedding(config)
    hidden = torch.full((T, T), float("-inf")).triu(1)[None, None]

    def attend(tokens, first, cache=None):
        at = torch.arange(first, first + tokens.shape[1])[None]
        mask = hidden[:, :, first : first + tokens.shape[1], : first + tokens.shape[1]]
        embeddings = rotary(tokens, at, "hybrid")
        return theirs(tokens, {"causal": mask}, position_embeddings=embeddings, cache=cache)[0]

    expected = attend(inputs, 0)
    np.testing.assert_allclose(run(ours, x), expected.detach().numpy(), atol=1e-5, rtol=1e-5)

    (expected**2).sum().backward()
    gradients = nnx.jit(nnx.grad(lambda mixer: (mixer(x) ** 2).sum()))(ours)
    wanted = to_ours(lambda parameter: parameter.grad.numpy())
    for path, leaf in nnx.to_flat_state(gradients):
        theirs_gradient = wanted[".".join(map(str, path))]
        scale = np.abs(theirs_gradient).max()
        np.testing.assert_allclose(leaf[...] / scale, theirs_gradient / scale, atol=1e-5)

    cached, cache = DynamicCache(config=config), ours.init_cache(B, T)
    for first, last in ((0, 4), (4, 5), (5, 6)):
        y, cache = prefill(ours, x[:, first:last], cache)
        with torch.no_grad():
            expected = attend(inputs[:, first:last], first, cached)
        np.testing.assert_allclose(y, expected.numpy(), atol=1e-5, rtol=1e-5)
