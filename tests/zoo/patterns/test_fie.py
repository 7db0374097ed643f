"""FiE (arXiv 2211.10147): passages fused by global tokens, and one softmax over all their spans."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Geometry
from attnzoo.core.masks import HubSegmentMask
from attnzoo.core.positions import RoPE
from attnzoo.zoo.patterns.fie import (
    FiEEncoder,
    FusionMask,
    SpanScorer,
    aggregate_spans,
    fusion_attention,
    global_span_probability,
    marginal_span_loss,
    passage_ids,
    valid_spans,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

V, D, N, B, P, S, G = 11, 16, 2, 2, 3, 4, 2
LENGTHS = np.array([[4, 2, 3], [1, 4, 4]], np.int32)


@functools.cache
def encoder(n_global=G, num_layers=2):
    model = FiEEncoder(V, D, N, num_layers, n_global=n_global, max_length=S, mlp_dim=24, rngs=nnx.Rngs(0))
    model.globals[...] = jnp.asarray(np.random.default_rng(1).normal(size=(n_global, D)), jnp.float32)
    return model


@nnx.jit
def encode(model, passages, lengths=None):
    return model(passages, lengths)


@nnx.jit
def encode_flat(model, passages, mask):
    """The same layers called plainly, on one sequence under a mask."""
    x = model.norm(model.layers(model.flat(passages), mask=mask))
    g = model.globals.shape[0]
    return x[:, :g], x[:, g:].reshape(*passages.shape, -1)


@pytest.fixture
def passages(rng):
    return jnp.asarray(rng.integers(0, V, (B, P, S)))


# --- the mask and the two lines --------------------------------------------------------------------------


def cells(lengths, g):
    """The definition, token by token: [B, T, T]."""
    out = []
    for row in lengths:
        seg = [-1] * g + [p if i < n else None for p, n in enumerate(row) for i in range(S)]
        out.append([[None not in (a, c) and (a == c or -1 in (a, c)) for c in seg] for a in seg])
    return np.array(out)


@pytest.mark.parametrize("tile", [(2, 2), (4, 3), (5, 16)])
@pytest.mark.parametrize("g", [0, 2])
def test_mask_and_tiles(tile, g):
    bq, bk = tile
    mask = FusionMask(passage_ids(LENGTHS, S), g)
    assert isinstance(mask, HubSegmentMask)
    visible, t = cells(LENGTHS, g), g + P * S
    np.testing.assert_array_equal(mask.dense(t, batch=B)[:, 0], visible)
    made = mask.block_map(t, batch=B, block_q=bq, block_k=bk)
    by_range = mask.tile_states(Geometry(B, 1, 1, t, t), bq, bk)
    assert made.how == "exact (runs)"
    for b, _, i, j in np.ndindex(made.state.shape):
        tile_cells = visible[b, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
        by_cells = FULL if tile_cells.all() else PARTIAL if tile_cells.any() else EMPTY
        assert made.state[b, 0, i, j] == by_range[b, 0, i, j] == by_cells


def test_pairs_are_linear_in_passages():
    for count in (4, 8):
        mask = FusionMask(passage_ids(np.full((1, count), 16), 16), 16)
        n = mask.block_map(16 * (1 + count), block_q=16, block_k=16).counts()
        assert n["partial"] == 0
        assert n["full"] * 16 * 16 == 16 * (16 + 16 * count) + 16 * count * (16 + 16)


def test_two_lines_are_the_masked_sequence(passages):
    """Outputs, and the gradients of all parameters, at real tokens; layers read what they were given, G included."""
    real = (np.arange(S) < LENGTHS[..., None])[..., None]
    graphdef, params = nnx.split(encoder())

    def of(run, arg):
        def loss(params):
            ours, x = run(nnx.merge(graphdef, params), passages, arg)
            return (ours**3).sum() + ((x * real) ** 3).sum(), (ours, x * real)

        (_, outs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return outs, jax.tree.leaves(gradients)

    (mine, my_gradients), (theirs, their_gradients) = (
        of(encode, LENGTHS),
        of(encode_flat, FusionMask(passage_ids(LENGTHS, S), G)),
    )
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(my_gradients, their_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, abs(b).max()))


def test_options_of_the_mixer(rng):
    """Fewer kv heads, bfloat16, dropout of weights and a merge of its own, against the mixer under the mask."""

    class Gated(GroupedQueryAttention):
        def merge(self, o, x):
            return self.out(o) * jax.nn.sigmoid(x)

    x, mask = jnp.asarray(rng.normal(size=(B, G + P * S, D)), jnp.float32), FusionMask(passage_ids(LENGTHS, S), G)
    real = np.concatenate([np.ones((B, G), bool), passage_ids(LENGTHS, S) >= 0], 1)
    for dtype, atol in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):
        mixer = Gated(D, 4, num_kv_heads=2, dtype=dtype, rngs=nnx.Rngs(0))
        made = fusion_attention(mixer, x.astype(dtype), LENGTHS, G)
        assert made.dtype == dtype
        np.testing.assert_allclose(made[real].astype(np.float32), mixer(x, mask=mask)[real].astype(np.float32), atol=atol)
    dropping = GroupedQueryAttention(D, 2, dropout_rate=0.5, rngs=nnx.Rngs(0))
    one, other = (fusion_attention(dropping, x, LENGTHS, G) for _ in range(2))
    assert abs(one - other).max() > 1e-3
    dropping.eval()
    np.testing.assert_allclose(fusion_attention(dropping, x, LENGTHS, G)[real], dropping(x, mask=mask)[real], atol=1e-5)


def test_scanned_and_dropped(passages):
    def build(**options):
        return FiEEncoder(V, D, N, 2, n_global=G, max_length=S, rngs=nnx.Rngs(params=0, dropout=1), **options)

    plain = encode(build(), passages, LENGTHS)
    for mine, theirs in zip(encode(build(scan_layers=True, remat="full"), passages, LENGTHS), plain, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert abs(encode(build(dropout_rate=0.5), passages, LENGTHS)[1] - plain[1]).max() > 1e-2


def test_without_globals_passages_are_alone(passages):
    _, x = encode(encoder(0), passages)
    for p in range(P):
        np.testing.assert_allclose(encode(encoder(0), passages[:, [p]])[1][:, 0], x[:, p], atol=1e-5)
    # Padding changes nothing.
    _, padded = encode(encoder(), passages, LENGTHS)
    hidden = np.arange(S) >= LENGTHS[..., None]
    _, other = encode(encoder(), jnp.where(hidden, 5, passages), LENGTHS)
    np.testing.assert_array_equal(padded[~hidden], other[~hidden])


def test_one_passage_is_dense_attention(passages):
    one = passages[:, :1]
    for mine, theirs in zip(encode(encoder(), one), encode_flat(encoder(), one, None), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_passages_are_exchangeable(passages):
    order = np.array([2, 0, 1])
    ours, x = encode(encoder(), passages, LENGTHS)
    ours_moved, x_moved = encode(encoder(), passages[:, order], LENGTHS[:, order])
    np.testing.assert_allclose(ours_moved, ours, atol=1e-5)
    np.testing.assert_allclose(x_moved, x[:, order], atol=1e-5)
    scorer = SpanScorer(D, max_length=2, rngs=nnx.Rngs(0))

    def strings(x, passages, lengths):
        p = global_span_probability(scorer(x), valid_spans(lengths, S, 2))
        second = jnp.pad(passages, ((0, 0), (0, 0), (0, 1)))[..., 1:]
        return aggregate_spans(p, jnp.stack([passages, V + V * passages + second], -1), V + V * V)

    told = strings(x, passages, LENGTHS)
    np.testing.assert_allclose(strings(x_moved, passages[:, order], LENGTHS[:, order]), told, atol=1e-5)
    np.testing.assert_allclose(told.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(("g", "depth", "hears"), [(G, 1, False), (G, 2, True), (0, 2, False)])
def test_information_goes_through_the_globals(passages, g, depth, hears):
    model = encoder(g, depth)
    other = passages.at[:, 1].set((passages[:, 1] + 1) % V)
    (ours, x), (ours_other, x_other) = encode(model, passages), encode(model, other)
    difference = abs(x_other[:, 0] - x[:, 0]).max()
    assert difference > 1e-3 if hears else difference == 0
    assert g == 0 or abs(ours_other - ours).max() > 1e-3


# --- spans -----------------------------------------------------------------------------------------------


def test_span_scores(rng):
    scorer = SpanScorer(D, max_length=3, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(B, P, S, D)), jnp.float32)
    made = scorer(x)
    assert made.shape == (B, P, S, 3)
    w1, w2, b, w = (np.asarray(p[...]) for p in (scorer.first.kernel, scorer.last.kernel, scorer.last.bias, scorer.out.kernel))
    for i in range(S):
        for j in range(i, min(i + 3, S)):
            u = x[:, :, i] @ w1 + x[:, :, j] @ w2 + b
            np.testing.assert_allclose(made[:, :, i, j - i], (jax.nn.gelu(u) @ w)[..., 0], atol=1e-5)


def test_valid_spans():
    questions = np.array([[1, 0, 2], [0, 3, 1]])
    for begins in (None, questions):
        made = valid_spans(LENGTHS, S, 3, begins)
        for b, p, i, d in np.ndindex(B, P, S, 3):
            start, j = 0 if begins is None else begins[b, p], i + d
            assert made[b, p, i, d] == (start <= i <= j < LENGTHS[b, p] and j - i + 1 <= 3)


@pytest.fixture
def spans(rng):
    """(scores, valid), some of them -inf or huge where they do not count."""
    valid = np.array(valid_spans(LENGTHS, S, 3))
    scores = rng.normal(size=valid.shape).astype(np.float32) * 3
    return jnp.asarray(np.where(valid, scores, rng.choice([-np.inf, 1e9], valid.shape)), jnp.float32), jnp.asarray(valid)


def test_one_space_for_all_spans(spans):
    scores, valid = spans
    p = global_span_probability(scores, valid)
    np.testing.assert_allclose(p.sum((1, 2, 3)), 1, atol=1e-6)
    assert not np.asarray(p)[~np.asarray(valid)].any()
    expected = np.where(valid, np.exp(np.where(valid, scores, 0).astype(np.float64)), 0)
    np.testing.assert_allclose(p, expected / expected.sum((1, 2, 3), keepdims=True), atol=1e-6)
    # A constant on one passage moves mass between passages; a softmax of each passage by itself does not see it.
    raised = scores.at[:, 0].add(2.0)

    def apart(scores):
        return global_span_probability(scores.reshape(B * P, 1, S, 3), valid.reshape(B * P, 1, S, 3))

    assert abs(global_span_probability(raised, valid) - p).max() > 0.05
    np.testing.assert_allclose(apart(raised), apart(scores), atol=1e-6)
    nothing = global_span_probability(scores, jnp.zeros_like(valid))
    assert (nothing == 0).all()


def test_a_passage_twice_counts_twice(spans):
    scores, valid = spans
    p = global_span_probability(scores, valid)
    twice = [jnp.concatenate([x, x[:, :1]], 1) for x in (scores, valid)]
    q = global_span_probability(*twice)
    odds = [float(x[0, 0].sum() / x[0, 1].sum()) for x in (p, q.at[:, 0].add(q[:, P]))]
    assert odds[1] == pytest.approx(2 * odds[0], rel=1e-5)


def test_strings_add_up(spans, rng):
    p = global_span_probability(*spans)
    ids = rng.integers(-1, 5, p.shape)
    made = aggregate_spans(p, jnp.asarray(ids), 5)
    for b, s in np.ndindex(B, 5):
        np.testing.assert_allclose(made[b, s], np.asarray(p)[b][ids[b] == s].sum(), atol=1e-6)
    # However the mass of a string is split over passages, its sum is the same.
    mass = jnp.zeros_like(p).at[0, 0, 0, 0].set(0.6).at[0, 1, 0, 0].set(0.4)
    split = jnp.zeros_like(p).at[0, 0, 0, 0].set(0.3).at[0, 2, 1, 1].set(0.3).at[0, 1, 0, 0].set(0.4)
    strings = np.zeros(p.shape, int)
    strings[0, 1] = 1
    np.testing.assert_allclose(*(aggregate_spans(x, jnp.asarray(strings), 2)[0] for x in (mass, split)))
    top = aggregate_spans(p, jnp.asarray(ids), 5, top_k=2)
    for b in range(B):
        best = np.argsort(-np.ravel(p[b]))[:2]
        for s in range(5):
            np.testing.assert_allclose(top[b, s], np.ravel(p[b])[best][np.ravel(ids[b])[best] == s].sum(), atol=1e-6)


def test_loss_sums_probabilities(spans, rng):
    scores, valid = spans
    gold = jnp.asarray(rng.random(valid.shape) < 0.3)
    p = np.asarray(global_span_probability(scores, valid))
    expected = -np.log((p * np.asarray(gold)).sum((1, 2, 3)))
    np.testing.assert_allclose(marginal_span_loss(scores, valid, gold), expected.mean(), rtol=1e-5)
    # A row without an answer counts nowhere and hurts nothing.
    some = gold.at[1].set(False)
    value, gradient = jax.value_and_grad(marginal_span_loss)(scores, valid, some)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    assert np.isfinite(gradient).all() and (gradient[1] == 0).all()
    assert marginal_span_loss(scores, valid, jnp.zeros_like(gold)) == 0


def test_bad_input(passages, spans):
    with pytest.raises(ValueError, match=r"passages \(2, 3, 4\) and lengths \(3,\)"):
        encoder()(passages, LENGTHS[0])
    with pytest.raises(ValueError, match=r"\[B, P, S\].*\(3, 4\)"):
        encoder()(passages[0])
    with pytest.raises(ValueError, match="n_global: must be at least 0"):
        FiEEncoder(V, D, N, 1, n_global=-1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="max_length: a span"):
        SpanScorer(D, max_length=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"scores \(2, 3, 4, 3\).*\(2, 3, 4, 2\)"):
        global_span_probability(spans[0], spans[1][..., :2])
    with pytest.raises(ValueError, match=r"strings: probabilities"):
        aggregate_spans(spans[0], jnp.zeros((B, P, S), int), 3)
    ids = np.full(spans[0].shape, 3)
    with pytest.raises(ValueError, match="below num_strings=3, got 3"):
        aggregate_spans(spans[0], ids, 3)
    with pytest.raises(ValueError, match="top_k: must be from 1 to the 36 spans of a row, got 37"):
        aggregate_spans(spans[0], ids, 4, top_k=37)
    with pytest.raises(ValueError, match="P at least 1"):
        encoder()(passages[:, :0])
    long = jnp.zeros((B, P, S + 1), int)
    with pytest.raises(ValueError, match="positions: 0 to 4, but the table was built for length=4"):
        encode(encoder(), long)
    x = jnp.zeros((B, G + P * S, D))
    for options in ({"causal": True}, {"positions": RoPE()}):
        with pytest.raises(ValueError, match="mixer: tokens of a flat sequence"):
            fusion_attention(GroupedQueryAttention(D, N, rngs=nnx.Rngs(0), **options), x, LENGTHS, G)
    plain = GroupedQueryAttention(D, N, rngs=nnx.Rngs(0))
    for lengths, g in ((LENGTHS[:, :0], G), (LENGTHS, 1)):
        with pytest.raises(ValueError, match=r"x, lengths, n_global.*\(2, 14, 16\)"):
            fusion_attention(plain, x, lengths, g)
