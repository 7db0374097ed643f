"""Luong et al. 2015: global and local attention of a recurrent decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.models.decoding import beam_search, greedy
from attnzoo.models.luong import LuongConfig, LuongSeq2Seq
from attnzoo.zoo.alignment.luong_attention import (
    GlobalAttention,
    LocalMonotonicAttention,
    LocalPredictiveAttention,
    alignment_error_rate,
    argmax_links,
    luong_score,
)

B, T, S, D, A = 3, 5, 9, 6, 4
LENGTHS = np.array([9, 6, 3])
MASK = np.arange(S) < LENGTHS[:, None]


@pytest.fixture
def states(rng):
    """(h_t [B, T, D], h_s [B, 1, S, D], mask [B, 1, S])."""
    h_t, h_s = (jnp.asarray(rng.normal(size=(B, n, D)), jnp.float32) for n in (T, S))
    return h_t, h_s[:, None], jnp.asarray(MASK)[:, None]


def drawn(attention, rng, size=0.7):
    """The attention with parameters of some size."""
    for _, leaf in nnx.to_flat_state(nnx.state(attention, nnx.Param)):
        leaf[...] = jnp.asarray(rng.normal(size=leaf.shape) * size, jnp.float32)
    return attention


def softmax(x, ok):
    e = np.where(ok, np.exp(x - x.max()), 0)
    return e / e.sum() if ok.any() else e


def as64(*arrays):
    return (np.asarray(a, np.float64) for a in arrays)


def reference(attention, h_t, h_s, p_t=None, length=S):
    """(h~_t, a_t) of one state h_t [D] over h_s [S, D], from the equations, in float64."""
    h_t, h_s = as64(h_t, h_s)
    scores = np.zeros(S)
    for s in range(S):
        match attention.kind:
            case "dot":
                scores[s] = h_t @ h_s[s]
            case "general":
                scores[s] = h_t @ (np.asarray(attention.w_a[...], np.float64) @ h_s[s])
            case "concat" if attention.source_identity:
                w, v = as64(attention.w_a[...], attention.v_a[...])
                scores[s] = v @ np.tanh(w @ h_t + h_s[s])
            case "concat":
                w, v = as64(attention.w_a[...], attention.v_a[...])
                scores[s] = v @ np.tanh(w @ np.concatenate([h_t, h_s[s]]))
            case "location":
                scores[s] = (np.asarray(attention.w_a[...], np.float64) @ h_t)[s]
    at = np.arange(S)
    ok = at < length
    if p_t is not None:
        ok &= np.abs(at - np.floor(p_t)) <= attention.window
    gaussian = np.ones(S)
    if isinstance(attention, LocalPredictiveAttention):
        sigma = attention.window / 2
        gaussian = np.exp(-((at - p_t) ** 2) / (2 * sigma**2))
        if attention.normalize_local:
            scores, gaussian = scores * gaussian, np.ones(S)
    a_t = softmax(scores, ok) * gaussian
    (w_c,) = as64(attention.w_c.kernel[...])
    return np.tanh(np.concatenate([a_t @ h_s, h_t]) @ w_c), a_t


# --- global ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"score": "dot"}, {"score": "general"}, {"score": "concat"}, {"score": "concat", "source_identity": True},
     {"score": "location", "max_source": S + 2}],
    ids=lambda o: "-".join(map(str, o.values())),
)  # fmt: skip
def test_global_is_its_equations(states, rng, options):
    h_t, h_s, mask = states
    attention = drawn(GlobalAttention(D, rngs=nnx.Rngs(0), **options), rng)
    htil, a = attention(h_t, h_s, mask=mask)
    for b in range(B):
        for t in range(T):
            expected = reference(attention, h_t[b, t], h_s[b, 0], length=LENGTHS[b])
            np.testing.assert_allclose(htil[b, t], expected[0], atol=1e-5)
            np.testing.assert_allclose(a[b, t], expected[1], atol=1e-6)
    np.testing.assert_allclose(a.sum(-1), 1, atol=1e-6)
    assert (np.asarray(a)[~np.broadcast_to(mask, a.shape)] == 0).all()


def test_a_source_of_padding_alone_gives_nothing(states):
    h_t, h_s, mask = states
    for attention in (GlobalAttention(D, rngs=nnx.Rngs(0)), LocalPredictiveAttention(D, window=2, rngs=nnx.Rngs(0))):
        htil, a = attention(h_t, h_s, mask=mask & False)
        assert (a == 0).all()
        assert np.isfinite(htil).all()
        np.testing.assert_allclose(htil, np.tanh(h_t @ attention.w_c.kernel[D:]), atol=1e-6)


@pytest.mark.parametrize("score", ["dot", "general"])
def test_global_is_unscaled_dot_product_attention(states, rng, score):
    h_t, h_s, mask = states
    attention = drawn(GlobalAttention(D, score=score, rngs=nnx.Rngs(0)), rng)
    h_s = h_s[:, 0]

    def ours(h_t, h_s):
        return attention.attend(h_t, h_s[:, None], mask, 0)[0]

    def theirs(h_t, h_s):
        keys = h_s if attention.w_a is None else h_s @ attention.w_a[...].T
        one = (x[:, :, None] for x in (h_t, keys, h_s))
        return jax.nn.dot_product_attention(*one, mask=mask[:, None], scale=1.0)[:, :, 0]

    np.testing.assert_allclose(ours(h_t, h_s), theirs(h_t, h_s), atol=1e-5)
    gradients = (jax.grad(lambda *x, f=f: (f(*x) ** 2).sum(), (0, 1))(h_t, h_s) for f in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# --- local -------------------------------------------------------------------------------------------------


def test_local_m_is_its_equations(states, rng):
    h_t, h_s, mask = states
    attention = drawn(LocalMonotonicAttention(D, window=2, rngs=nnx.Rngs(0)), rng)
    htil, a = attention(h_t, h_s, mask=mask, t=jnp.arange(T))
    for b in range(B):
        for t in range(T):
            p_t = min(t, LENGTHS[b] - 1)
            expected = reference(attention, h_t[b, t], h_s[b, 0], p_t, LENGTHS[b])
            np.testing.assert_allclose(htil[b, t], expected[0], atol=1e-5)
            np.testing.assert_allclose(a[b, t], expected[1], atol=1e-6)
    np.testing.assert_allclose(a.sum(-1), 1, atol=1e-6)
    assert ((a > 0).sum(-1) <= 5).all()
    # The window is cut at the ends of the sentence, not shifted.
    assert ((a[:, 0] > 0).sum(-1) == 3).all()
    # A step far past the source reads its end.
    _, late = attention(h_t, h_s, mask=mask, t=100)
    for b in range(B):
        np.testing.assert_array_equal(np.flatnonzero(late[b, 0] > 0), np.arange(LENGTHS[b] - 3, LENGTHS[b]))


@pytest.mark.parametrize("score", ["dot", "general"])
def test_a_window_wider_than_the_source_is_global(states, rng, score):
    h_t, h_s, mask = states
    wide = drawn(LocalMonotonicAttention(D, window=S, score=score, rngs=nnx.Rngs(0)), rng)
    whole = GlobalAttention(D, score=score, rngs=nnx.Rngs(0))
    nnx.update(whole, nnx.state(wide))
    for ours, theirs in zip(
        wide(h_t, h_s, mask=mask, t=jnp.arange(T)), whole(h_t, h_s, mask=mask, t=jnp.arange(T)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("normalize_local", [False, True])
@pytest.mark.parametrize("window", [1, 3])
def test_local_p_is_its_equations(states, rng, window, normalize_local):
    h_t, h_s, mask = states
    attention = LocalPredictiveAttention(D, window=window, normalize_local=normalize_local, rngs=nnx.Rngs(0))
    drawn(attention, rng)
    htil, a = attention(h_t, h_s, mask=mask)
    w_p, v_p = as64(attention.w_p[...], attention.v_p[...])
    for b in range(B):
        for t in range(T):
            p_t = (LENGTHS[b] - 1) / (1 + np.exp(-v_p @ np.tanh(w_p @ np.asarray(h_t[b, t], np.float64))))
            assert abs(attention.position(h_t[b, t], LENGTHS[b] - 1, 0) - p_t) < 1e-5
            expected = reference(attention, h_t[b, t], h_s[b, 0], p_t, LENGTHS[b])
            np.testing.assert_allclose(htil[b, t], expected[0], atol=1e-5)
            np.testing.assert_allclose(a[b, t], expected[1], atol=2e-6)
            outside = np.abs(np.arange(S) - np.floor(p_t)) > window
            assert (np.asarray(a[b, t])[outside] == 0).all()


def test_the_gaussian_only_takes_away(states, rng):
    h_t, h_s, mask = states
    attention = drawn(LocalPredictiveAttention(D, window=2, rngs=nnx.Rngs(0)), rng)
    _, a = attention(h_t, h_s, mask=mask)
    plain = LocalMonotonicAttention(D, window=2, rngs=nnx.Rngs(0))
    for name in ("w_a", "w_c"):
        setattr(plain, name, getattr(attention, name))
    last = jnp.asarray(LENGTHS)[:, None] - 1
    p_t = attention.position(h_t, last, 0)
    _, window = plain(h_t, h_s, mask=mask, t=jnp.floor(p_t).astype(jnp.int32))
    assert (a <= window + 1e-7).all()
    assert (a.sum(-1) <= 1 + 1e-6).all()
    assert (a.sum(-1) < 0.99).any()
    # The factor is largest at the whole position nearest p_t.
    factor = np.where(window > 0, a / np.where(window > 0, window, 1), 0)
    np.testing.assert_array_equal(factor.argmax(-1), np.round(p_t))


def test_the_position_learns_through_the_gaussian(states, rng):
    h_t, h_s, mask = states

    def gradient(attention):
        return nnx.grad(lambda attention: (attention(h_t, h_s, mask=mask)[0] ** 2).sum())(attention)

    predictive = gradient(drawn(LocalPredictiveAttention(D, window=2, rngs=nnx.Rngs(0)), rng))
    assert (predictive.v_p[...] != 0).all()
    assert (predictive.w_p[...] != 0).any()

    class Flat(LocalPredictiveAttention):
        def weigh(self, logits, ok, offset):
            return LocalMonotonicAttention.weigh(self, logits, ok, offset)

    flat = gradient(drawn(Flat(D, window=2, rngs=nnx.Rngs(0)), rng))
    assert (flat.v_p[...] == 0).all()
    assert not hasattr(LocalMonotonicAttention(D, rngs=nnx.Rngs(0)), "v_p")


def test_one_source_for_all_steps(states, rng):
    """h_t [T, D] takes h_s [S, D], whichever the attention; with "concat" its half of W_a computed once."""
    h_t, h_s = states[0][0], states[1][0, 0]
    for kind in (GlobalAttention, LocalMonotonicAttention, LocalPredictiveAttention):
        options = {} if kind is GlobalAttention else {"window": 2}
        attention = drawn(kind(D, score="concat", rngs=nnx.Rngs(0), **options), rng)
        source = attention.of_source(h_s)
        every = attention(h_t, h_s, t=jnp.arange(T), of_source=source)
        for t in range(T):
            for ours, theirs in zip(attention(h_t[t], h_s, t=t), every, strict=True):
                np.testing.assert_allclose(ours, theirs[t], atol=1e-5)
        # A step then multiplies vectors alone by matrices.
        step = jax.make_jaxpr(lambda h, of, attention=attention: attention(h, h_s, of_source=of))(h_t[0], source)
        assert all(e.outvars[0].aval.ndim < 2 for e in step.eqns if e.primitive.name == "dot_general")


@pytest.mark.parametrize("kind", [GlobalAttention, LocalPredictiveAttention])
def test_bfloat16(states, kind):
    h_t, h_s, mask = states
    half, whole = (kind(D, dtype=dtype, rngs=nnx.Rngs(0)) for dtype in (jnp.bfloat16, None))
    (htil, a), (htil32, a32) = half(h_t, h_s, mask=mask), whole(h_t, h_s, mask=mask)
    assert htil.dtype == jnp.bfloat16 and a.dtype == jnp.float32
    np.testing.assert_allclose(htil.astype(jnp.float32), htil32, atol=0.03)
    np.testing.assert_allclose(a, a32, atol=0.03)


# --- the decoder -------------------------------------------------------------------------------------------

V = 11


def seq2seq(attention, input_feeding=True, num_layers=2, **attention_args):
    config = LuongConfig(
        vocab_size=V, dim=8, embed_dim=5, num_layers=num_layers, attention=attention, attention_args=attention_args,
        input_feeding=input_feeding,
    )  # fmt: skip
    return LuongSeq2Seq(config, rngs=nnx.Rngs(0))


@pytest.fixture
def pair(rng):
    return jnp.asarray(rng.integers(0, V, (B, S))), jnp.asarray(rng.integers(0, V, (B, T)))


@pytest.mark.parametrize(("attention", "input_feeding"), [("global", False), ("local-p", True)])
def test_the_decoder_is_its_equations(pair, attention, input_feeding):
    """A plain loop over steps, with the LSTM cells called one by one."""
    source, target = pair
    model = seq2seq(attention, input_feeding, num_layers=1)
    decoder, mask = model.decoder, jnp.asarray(MASK)
    logits = model(source, target, source_mask=mask)
    for b in (1, 2):
        state, h_s = (jnp.zeros(8), jnp.zeros(8)), []
        for token in source[b, : LENGTHS[b]]:
            state, h = model.encoder.cells[0](state, model.embed(token))
            h_s.append(h)
        htil = jnp.zeros(8)
        for t in range(T):
            x = decoder.embed(target[b, t])
            x = jnp.concatenate([x, htil]) if input_feeding else x
            state, h = decoder.lstm.cells[0](state, x)
            htil, _ = decoder.attention(h, jnp.stack(h_s), t=t)
            np.testing.assert_allclose(logits[b, t], htil @ decoder.readout.kernel[...], atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "input_feeding", "score"),
    [("global", False, "concat"), ("global", True, "dot"), ("local-m", True, "concat"), ("local-p", False, "general"),
     ("none", True, None)],
)  # fmt: skip
def test_steps_equal_the_scan(pair, attention, input_feeding, score):
    source, target = pair
    options = {} if score is None else {"score": score}
    model, mask = seq2seq(attention, input_feeding, **options), jnp.asarray(MASK)
    whole = nnx.jit(lambda model: model(source, target, source_mask=mask))(model)
    cache = start = nnx.jit(lambda model: model.init_cache(source, source_mask=mask))(model)
    step = nnx.jit(lambda model, token, cache: model.step(token, cache))
    for t in range(T):
        logits, cache = step(model, target[:, [t]], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-5)
    # Rows of different lengths go on where they end.
    lengths = jnp.array([2, 4, 3])
    prefill = nnx.jit(lambda model, cache: model.prefill(target, cache, lengths))
    _, cache = prefill(model, start)
    np.testing.assert_array_equal(cache.seen, lengths)
    rows = jnp.arange(B)
    logits, cache = step(model, target[rows, lengths][:, None], cache)
    np.testing.assert_allclose(logits[:, 0], whole[rows, lengths], atol=1e-5)


def test_padding_and_other_rows_change_nothing(pair, rng):
    source, target = pair
    for attention in ("global", "local-p"):
        model = seq2seq(attention, num_layers=1)
        run = nnx.jit(lambda model, source: model(source, target, source_mask=jnp.asarray(MASK)))
        other = jnp.asarray(np.where(MASK, source, rng.integers(0, V, source.shape)))
        np.testing.assert_array_equal(run(model, other), run(model, source))
        np.testing.assert_array_equal(run(model, source.at[0].set(0))[1:], run(model, source)[1:])


def test_it_generates(pair):
    source, _ = pair
    model = seq2seq("global", num_layers=1)
    prompt = jnp.zeros((B, 1), jnp.int32)
    cache = model.init_cache(source)
    made = greedy(model, prompt, max_new=4, cache=cache)
    beam = beam_search(model, prompt, max_new=4, eos_id=V + 1, beam_size=1, alpha=0.0, cache=cache)
    np.testing.assert_array_equal(made.tokens, beam.tokens)
    logits = model(source, jnp.concatenate([prompt, made.tokens[:, :-1]], 1))
    np.testing.assert_array_equal(made.tokens, logits.argmax(-1))
    weights = model.attention_weights(source, prompt, source_mask=jnp.asarray(MASK))
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


# --- alignment ---------------------------------------------------------------------------------------------


def test_alignment_error_rate(rng):
    sure = np.eye(4, 6, dtype=bool)
    assert alignment_error_rate(sure, sure) == 0
    assert alignment_error_rate(~sure & np.eye(4, 6, 1, dtype=bool), sure) == 1
    a = np.zeros((4, 6), bool)
    a[0, 0] = a[1, 2] = a[2, 5] = True  # one sure link, one possible link, one wrong link
    possible = np.zeros_like(a)
    possible[1, 2] = True
    assert alignment_error_rate(a, sure, possible) == pytest.approx(1 - (1 + 2) / (3 + 4))
    assert alignment_error_rate(a & False, sure & False) == 0
    weights = rng.random((2, 4, 6))
    links = argmax_links(weights, np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool))
    assert links.sum() == 4
    assert links[0, 1, weights[0, 1].argmax()]


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda h: luong_score(h, h, "dots"), "unknown score 'dots'"),
        (lambda h: luong_score(h[0, :3], h), r"one width, got \(3,\) and \(9, 6\)"),
        (lambda h: luong_score(h[0], h, "general"), r"w_a: 'general' needs \[D, D\] = \(6, 6\), got None"),
        (lambda h: luong_score(h[0], h, "dot", w_a=h[:D, :D]), r"'dot' has neither.*got \(6, 6\) and None with 'dot'"),
        (lambda h: LocalMonotonicAttention(D, rngs=nnx.Rngs(0))(h[0], h, mask=np.arange(S) > 2), "mask: .*must come first"),
        (lambda h: LuongConfig(vocab_size=V, attention="none", attention_args={"score": "dot"}), "attention_args: .*'score'"),
        (lambda h: LuongConfig(vocab_size=V, num_layers=0), "num_layers: must be at least 1, got 0"),
        (lambda h: seq2seq("none").step(jnp.zeros((B, 2), int), None), r"target: .*one token per row, \[B, 1\], got \(3, 2\)"),
        (lambda h: luong_score(h[0], h, "location", w_a=h[:4]), r"S_max >= 9 and D = 6, got \(4, 6\)"),
        (lambda h: luong_score(h[0], h, "concat", w_a=h[:A], v_a=h[0, :A]), r"\[A, 12\] and \[A\], here A = 4; got \(4, 6\)"),
        (lambda h: GlobalAttention(D, score="bilinear", rngs=nnx.Rngs(0)), "unknown score of GlobalAttention: 'bilinear'"),
        (lambda h: GlobalAttention(D, score="location", rngs=nnx.Rngs(0)), "max_source: .*got None with 'location'"),
        (lambda h: GlobalAttention(D, max_source=4, rngs=nnx.Rngs(0)), "max_source: .*got 4 with 'general'"),
        (lambda h: LocalMonotonicAttention(D, score="location", rngs=nnx.Rngs(0)), "unknown score of LocalMonotonic"),
        (lambda h: LocalPredictiveAttention(D, window=0, rngs=nnx.Rngs(0)), "window: D_w must be at least 1, got 0"),
        (lambda h: GlobalAttention(D, rngs=nnx.Rngs(0))(h[0], h, mask=jnp.ones(4, bool)), r"mask: .*\(9, 6\).*\(4,\)"),
        (lambda h: LuongConfig(vocab_size=V, attention="local"), "unknown attention 'local'"),
        (lambda h: seq2seq("none").init_cache(jnp.zeros((2, 3), int), source_mask=jnp.ones(3)), r"source_mask: .*\(3,\)"),
        (lambda h: alignment_error_rate(np.ones((2, 3)), np.ones((2, 4))), r"one shape, got \(2, 3\), \(2, 4\)"),
    ],
)  # fmt: skip
def test_errors(states, call, words):
    with pytest.raises(ValueError, match=words):
        call(states[1][0, 0])
