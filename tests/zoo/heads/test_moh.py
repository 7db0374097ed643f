"""Jin et al. 2024: heads gated token by token, some always on, the others routed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.positions import RoPE
from attnzoo.zoo.heads.moh import (
    MixtureOfHeadAttention,
    active_head_fraction,
    moh_from_mha,
    moh_load_balance_loss,
    moh_router,
    query_norm_logits,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

D, N, H = 32, 8, 4
COUNTS = [(0, 3), (1, 4), (2, 4), (2, 6), (8, 0)]  # (h_s, k)
route = nnx.jit(lambda mixer, x: mixer.route(x))
forward = nnx.jit(lambda mixer, x: mixer(x))
logits_of = jax.jit(query_norm_logits)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, 7, D)), jnp.float32)


def build(h_s, k, style="code", **options):
    return MixtureOfHeadAttention(D, N, style=style, shared_heads=h_s, top_k=k, rngs=nnx.Rngs(0), **options)


def plain(**options):
    return GroupedQueryAttention(D, N, rngs=nnx.Rngs(0), **options)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_gates(mixer, x):
    """The gates of one token after another, from the equations, in float64."""
    h_s, k, style = mixer.shared_heads, mixer.top_k, mixer.style
    h_r = N - h_s
    gates = np.zeros((*x.shape[:2], N))
    for place in np.ndindex(x.shape[:2]):
        token = np.asarray(x[place], np.float64)
        if style == "tuned":
            query = np.einsum("d,dnh->nh", token, np.asarray(mixer.qkv.query.kernel[...], np.float64))
            norms = np.linalg.norm(query[h_s:], axis=-1)
            chosen = np.argsort(-norms / norms.std(ddof=1))[:k] if h_r else []
            gates[place][:h_s] = 1
            gates[place][[h_s + n for n in chosen]] = 1
            continue
        # One shared head has no router of its own: its share is 1.
        sh = softmax(token @ np.asarray(mixer.shared_router.kernel[...])) if h_s > 1 else np.ones(h_s)
        a1 = a2 = 1.0
        if h_s and k:
            a1, a2 = softmax(token @ np.asarray(mixer.kind_router.kernel[...])) * (2 if style == "code" else 1)
        gates[place][:h_s] = a1 * sh * (h_s if style == "code" else 1)
        if k:
            p = softmax(token @ np.asarray(mixer.router.kernel[...]))
            chosen = np.argsort(-p)[:k]
            gates[place][h_s + chosen] = a2 * p[chosen] * (k / p[chosen].sum() if style == "code" else 1)
    return gates


# --- gates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["paper", "code", "tuned"])
@pytest.mark.parametrize(("h_s", "k"), COUNTS)
def test_gates_are_the_equations(x, h_s, k, style):
    mixer = build(h_s, k, style)
    gates = np.asarray(route(mixer, x).gates)
    np.testing.assert_allclose(gates, reference_gates(mixer, x), rtol=1e-6, atol=1e-6)
    assert ((gates != 0).sum(-1) == h_s + k).all()
    assert (gates[..., :h_s] > 0).all()
    if style == "tuned":
        assert set(np.unique(gates)) <= {0.0, 1.0}


@pytest.mark.parametrize(("h_s", "k"), [(1, 4), (2, 4)])
def test_sums_of_the_released_gates(x, h_s, k):
    mixer = build(h_s, k)
    a = jax.nn.softmax(x @ mixer.kind_router.kernel[...])
    gates = route(mixer, x).gates
    np.testing.assert_allclose(gates[..., :h_s].sum(-1), 2 * a[..., 0] * h_s, atol=1e-5)
    np.testing.assert_allclose(gates[..., h_s:].sum(-1), 2 * a[..., 1] * k, atol=1e-5)
    # 2 (a1 + a2) = 2: the means of both kinds of gates add up to it.
    np.testing.assert_allclose(gates[..., :h_s].mean(-1) + gates[..., h_s:].sum(-1) / k, 2, atol=1e-5)


def test_an_undecided_router_is_plain_attention(x):
    """All gates are 1 where all heads are active and routers are zero; also for GQA, with RoPE."""
    options = {"causal": True, "positions": RoPE(), "num_kv_heads": 2, "use_bias": True}
    source = plain(**options)
    expected = forward(source, x)
    for h_s in (0, 2):
        mixer = moh_from_mha(source, style="code", shared_heads=h_s, top_k=N - h_s)
        np.testing.assert_allclose(forward(mixer, x), expected, atol=1e-6)


@pytest.mark.parametrize("h_s", [0, 2])
def test_the_papers_gates_shrink_an_undecided_router(x, h_s):
    source = plain()
    mixer = moh_from_mha(source, style="paper", shared_heads=h_s, top_k=N - h_s)
    expected = [0.5 / h_s] * h_s + [0.5 / (N - h_s)] * (N - h_s) if h_s else [1 / N] * N
    np.testing.assert_allclose(route(mixer, x).gates, np.broadcast_to(expected, (2, 7, N)), atol=1e-6)
    assert not np.allclose(forward(mixer, x), forward(source, x), atol=1e-2)


def test_output_is_a_sum_over_heads(x):
    mixer = build(2, 3, causal=True)
    q, k, v = mixer.qkv(x)
    o = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    gates, w = mixer.route(x).gates, mixer.out.kernel[...]
    expected = sum(gates[..., n, None] * (o[..., n, :] @ w[n]) for n in range(N))
    np.testing.assert_allclose(forward(mixer, x), expected, atol=1e-5)


@pytest.mark.parametrize("style", ["code", "tuned"])
def test_heads_that_are_off_learn_nothing_from_that_token(x, style):
    mixer = build(2, 3, style)
    gradient = jax.jit(jax.grad(lambda o: (mixer.merge(o, x) ** 2).sum()))(jnp.ones((2, 7, N, H)))
    gradient, off = np.asarray(gradient), np.asarray(route(mixer, x).gates) == 0
    assert off.any()
    assert (gradient[off] == 0).all()
    assert (gradient[~off] != 0).any(-1).all()


# --- the router without parameters -----------------------------------------------------------------------


def test_query_norms_choose_whatever_the_scale_and_the_positions(x):
    mixer = build(2, 3, "tuned", positions=RoPE(), causal=True)
    chosen = route(mixer, x).active
    for c in (0.01, 3.0, 100.0):
        np.testing.assert_array_equal(route(mixer, c * x).active, chosen)
    # Of rotated attention only differences of positions count, and of the gates not even those.
    shifted = nnx.jit(lambda mixer, x: mixer(x, positions=jnp.arange(7) + 11))(mixer, x)
    np.testing.assert_allclose(shifted, forward(mixer, x), atol=2e-5)
    assert nnx.state(mixer, nnx.Param).keys() == nnx.state(plain(), nnx.Param).keys()


def test_query_norm_logits_are_finite_where_norms_do_not_differ(rng):
    q = jnp.asarray(rng.normal(size=(5, 6, 4)), jnp.float32)
    norms = np.linalg.norm(q, axis=-1)
    np.testing.assert_allclose(logits_of(q), norms / norms.std(-1, ddof=1, keepdims=True), rtol=1e-5)
    gradient_of = jax.jit(jax.grad(lambda q: logits_of(q).sum()))
    for same in (np.zeros((5, 6, 4)), np.ones((5, 6, 4)), np.ones((5, 1, 4))):
        np.testing.assert_allclose(logits_of(same), np.linalg.norm(same, axis=-1))
        # Nor is what rounding makes of equal norms scaled up.
        same = same * np.where(np.arange(same.shape[1]) == 1, 1 + 1e-7, 1)[:, None]
        np.testing.assert_allclose(logits_of(jnp.asarray(same, jnp.float32)), np.linalg.norm(same, axis=-1), rtol=1e-6)
        assert np.isfinite(gradient_of(same)).all()


def test_gradients_pass_straight_through(x):
    mixer = build(2, 3, "tuned")
    graphdef, params = nnx.split(mixer)

    def gated(params):
        weight = jnp.arange(1.0, N + 1)
        return (nnx.merge(graphdef, params, copy=True).route(x).gates * weight).sum()

    gradient = jax.jit(jax.grad(gated))(params)
    assert (jnp.abs(gradient.qkv.query.kernel[...][:, 2:]) > 0).any()
    assert (gradient.qkv.query.kernel[...][:, :2] == 0).all()
    # The same gradient as that of p.
    weight = jnp.arange(3.0, N + 1)

    def soft(q):
        return (jax.nn.softmax(query_norm_logits(q)) * weight).sum()

    def hard(q):
        return (moh_router(query_norm_logits(q), top_k=2, style="tuned").gates * weight).sum()

    q = mixer.qkv.query(x)[..., 2:, :]
    np.testing.assert_allclose(jax.jit(jax.grad(hard))(q), jax.jit(jax.grad(soft))(q), atol=1e-6)


def test_conversion_copies_the_weights(x):
    source = plain(causal=True, positions=RoPE(), num_kv_heads=4, use_bias=True)
    mixer = moh_from_mha(source)
    assert (mixer.style, mixer.shared_heads, mixer.top_k) == ("tuned", 2, 4)
    for path, leaf in nnx.to_flat_state(nnx.state(source, nnx.Param)):
        got = dict(nnx.to_flat_state(nnx.state(mixer, nnx.Param)))[path]
        np.testing.assert_array_equal(got[...], leaf[...])
    # Copied, not shared.
    mixer.out.kernel[...] = jnp.zeros_like(mixer.out.kernel[...])
    assert (source.out.kernel[...] != 0).any()


@pytest.mark.parametrize("style", ["paper", "code"])
def test_a_converted_router_that_has_to_choose_does_not_start_collapsed(x, style):
    mixer = moh_from_mha(plain(), style=style, shared_heads=2, top_k=3)
    used = np.asarray(active_head_fraction(route(mixer, x).gates))[2:]
    assert used.min() > 0 and used.max() < 1


# --- load balance ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "h_r"), [(1, 4), (3, 6)])
def test_balance_of_a_uniform_router_is_k(k, h_r):
    p = jnp.full((h_r, h_r), 1 / h_r)
    active = (jnp.arange(h_r)[:, None] + jnp.arange(k)) % h_r
    active = (active[..., None] == jnp.arange(h_r)).any(1)  # every head k times
    np.testing.assert_allclose(moh_load_balance_loss(p, active), k, rtol=1e-6)


def test_balance_of_a_collapsed_router():
    logits = jnp.asarray([[4.0, 0.0, 1.0, 0.0], [3.0, 1.0, 0.0, 2.0]])
    routing = moh_router(logits, top_k=1)
    P_max = routing.probabilities[:, 0].mean()
    np.testing.assert_allclose(moh_load_balance_loss(routing.probabilities, routing.active), 4 * P_max, rtol=1e-6)


def test_padding_does_not_count(rng):
    logits = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.float32)
    routing = jax.jit(lambda logits: moh_router(logits, top_k=2))(logits)
    p, active, gates = (np.asarray(part) for part in (routing.probabilities, routing.active, routing.gates))
    real = np.arange(5) < np.array([[3], [5]])
    masked = moh_load_balance_loss(p, active, where=real)
    np.testing.assert_allclose(masked, 4 * (p[real].mean(0) * active[real].mean(0)).sum(), rtol=1e-6)
    assert abs(masked - moh_load_balance_loss(p, active)) > 1e-3
    used = active_head_fraction(gates, where=real)
    np.testing.assert_allclose(used, (gates[real] != 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(used.mean(), 2 / 4, rtol=1e-6)
    # Gradients through the mean probability alone: f is a count.
    f = active.reshape(-1, 4).mean(0)

    def through_P(logits):
        return 4 * (jax.nn.softmax(logits).reshape(-1, 4).mean(0) * f).sum()

    def loss(logits):
        routing = moh_router(logits, top_k=2)
        return moh_load_balance_loss(routing.probabilities, routing.active)

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(logits), jax.jit(jax.grad(through_P))(logits), atol=1e-6)


# --- decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["code", "tuned"])
def test_decoding_is_the_full_forward_and_causal(x, style):
    mixer = build(2, 3, style, causal=True, positions=RoPE(), num_kv_heads=2)
    full = forward(mixer, x)
    prefill = nnx.jit(lambda mixer, x, cache: mixer.prefill(x, cache))
    y, cache = prefill(mixer, x[:, :4], mixer.init_cache(2, 7))
    np.testing.assert_allclose(y, full[:, :4], atol=1e-5)
    for t in range(4, 7):
        y, cache = prefill(mixer, x[:, t : t + 1], cache)
        np.testing.assert_allclose(y[:, 0], full[:, t], atol=1e-5)
    np.testing.assert_array_equal(forward(mixer, x.at[:, 4:].set(0.0))[:, :4], full[:, :4])
    assert mixer.cache_numbers_per_token() == 2 * 2 * H


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"style": "released"}, "unknown style 'released'.*code"),
        ({"shared_heads": 9}, r"shared_heads: must be in 0\.\.N=8, got 9"),
        ({"shared_heads": 2, "top_k": 7}, "top_k: of 6 routed heads 1 to 6 can be active, got 7"),
        ({"shared_heads": 2, "top_k": 0}, "top_k: of 6 routed heads 1 to 6.*got 0"),
        ({"shared_heads": 8, "top_k": 1}, "top_k: of 0 routed heads 0 to 0.*got 1"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        MixtureOfHeadAttention(D, N, rngs=nnx.Rngs(0), **options)


def test_bad_calls():
    p = jnp.zeros((2, 3, 4))
    with pytest.raises(ValueError, match="kinds: needed by style 'code' with 2 shared, 4 routed heads"):
        moh_router(p, shared=jnp.zeros((2, 3, 2)), top_k=2)
    with pytest.raises(ValueError, match="kinds: not used by style 'paper' with 0 shared"):
        moh_router(p, kinds=jnp.zeros((2, 3, 2)), top_k=2, style="paper")
    with pytest.raises(ValueError, match=r"where: needs an entry per row, \(2, 3\); got \(3,\)"):
        active_head_fraction(p, where=jnp.ones(3, bool))


@pytest.mark.parametrize(("heads", "h_s", "k"), [(1, 0, 1), (2, 0, 2), (4, 1, 2), (8, 2, 4), (32, 8, 16)])
def test_three_quarters_of_the_heads_are_active_by_default(heads, h_s, k):
    mixer = MixtureOfHeadAttention(2 * heads, heads, rngs=nnx.Rngs(0))
    assert (mixer.shared_heads, mixer.top_k) == (h_s, k)


def test_compiled_the_tuned_router_costs_no_second_query_projection():
    x = jnp.zeros((2, 32, D))

    def flops(mixer):
        graphdef, state = nnx.split(mixer)
        return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x).compile().cost_analysis()["flops"]

    projection = 2 * x.size * N * H
    assert flops(build(2, 4, "tuned")) < flops(plain()) + projection / 2
