"""Uni-Encoder (arXiv 2106.01263): a context and all its candidates in one pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention
from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Geometry
from attnzoo.models.uni_encoder import UniEncoderConfig, UniEncoderRanker, response_selection_loss
from attnzoo.zoo.patterns.uni_encoder import MODES, CandidateMask, candidate_means, candidate_positions, ranking_cost

V, D, N = 13, 16, 2
LC, LENGTHS = 5, (3, 2, 4)


def packed(lengths=LENGTHS, padding=0, context=LC):
    """Segments of a context, candidates of these lengths, and padding."""
    return np.array([-1] * context + [c for c, n in enumerate(lengths) for _ in range(n)] + [-2] * padding, np.int32)


SEGMENTS = packed()
T = len(SEGMENTS)


def cells(seg, mode):
    """The definition of every mode, [T, T]."""
    q, k = seg[:, None], seg[None, :]
    ok = {
        "arrow": (q == k) | (q == -1) | (k == -1),
        "diag": q == k,
        "square": np.ones((len(seg), len(seg)), bool),
        "independent": (q == k) | ((k == -1) & (q >= 0)),
    }[mode]
    return ok & (q > -2) & (k > -2)


@functools.cache
def noisy(num_layers):
    """A small ranker whose tables and biases are far from 0, so that what differs shows."""
    config = UniEncoderConfig(vocab_size=V, dim=D, num_layers=num_layers, num_heads=N, mlp_dim=24, max_length=24)
    graphdef, state = nnx.split(UniEncoderRanker(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), state))


@functools.cache
def ranker(mode="arrow", num_layers=2):
    """The same weights under every mask."""
    model = nnx.clone(noisy(num_layers))
    model.config = dataclasses.replace(model.config, mode=mode)
    return model


scores = nnx.jit(lambda model, *args: model(*args), static_argnums=3)


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, V, (2, T)))


# --- the mask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tile", [(4, 4), (8, 5), (3, 16)])
def test_mask_and_tiles(mode, tile):
    bq, bk = tile
    for seg in (packed(padding=3), packed((1, 9, 2, 2), padding=1, context=13), packed((4,)), packed(context=0)):
        mask, visible = CandidateMask(seg, mode), cells(seg, mode)
        n = len(seg)
        np.testing.assert_array_equal(mask.dense(n)[0, 0], visible)
        made = mask.block_map(n, block_q=bq, block_k=bk)
        assert made.how == "exact (runs)"
        by_range = mask.tile_states(Geometry(1, 1, 1, n, n), bq, bk)
        for i, j in np.ndindex(made.state.shape[2:]):
            tile_cells = visible[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            by_cells = FULL if tile_cells.all() else PARTIAL if tile_cells.any() else EMPTY
            assert made.state[0, 0, i, j] == by_range[0, 0, i, j] == by_cells


def test_tiles_of_candidates_are_skipped():
    """10 candidates of one tile each behind a context of 8 tiles: the tiles that are left cost what the paper counts."""
    seg = packed((20,) * 10, context=160)
    pairs = {mode: CandidateMask(seg, mode).block_map(360, block_q=20, block_k=20) for mode in MODES}
    for mode, made in pairs.items():
        n = made.counts()
        assert n["partial"] == 0
        assert n["full"] * 20 * 20 == ranking_cost(160, [20] * 10, mode).pairs
    assert pairs["arrow"].counts()["empty"] == 10 * 9


def test_costs():
    lengths = (3, 1, 4)
    for mode in MODES:
        assert ranking_cost(LC, lengths, mode).pairs == cells(packed(lengths), mode).sum()
        assert ranking_cost(LC, lengths, mode).tokens == LC + sum(lengths)
    assert ranking_cost(LC, lengths, "cross-encoder") == (8**2 + 6**2 + 9**2, 3 * LC + sum(lengths))
    known = {"arrow": 93_600, "cross-encoder": 324_000, "square": 129_600, "diag": 29_600}
    assert {mode: ranking_cost(160, [20] * 10, mode).pairs for mode in known} == known


def test_positions():
    expected = [*range(LC), 5, 6, 7, 5, 6, 5, 6, 7, 8, 0, 0]
    np.testing.assert_array_equal(candidate_positions(packed(padding=2)), expected)
    np.testing.assert_array_equal(jax.jit(candidate_positions)(np.stack([packed(padding=2)] * 2)), [expected] * 2)


# --- ranking ---------------------------------------------------------------------------------------------


def reordered(tokens, order, lengths=LENGTHS):
    """(tokens, segments) with the candidates in another order."""
    starts = LC + np.cumsum([0, *lengths])
    parts = [tokens[:, starts[c] : starts[c + 1]] for c in order]
    return jnp.concatenate([tokens[:, :LC], *parts], 1), packed([lengths[c] for c in order])


@pytest.mark.parametrize("mode", MODES)
def test_permuting_candidates_permutes_scores(tokens, mode):
    order = [2, 0, 1]
    base = scores(ranker(mode), tokens, SEGMENTS, 3)
    assert np.ptp(base, axis=1).min() > 1e-2
    moved = scores(ranker(mode), *reordered(tokens, order), 3)
    np.testing.assert_allclose(moved, base[:, np.array(order)], atol=1e-5)


def test_with_positions_that_count_on_a_candidates_place_matters(tokens):
    order, counting = [2, 0, 1], jnp.arange(T)
    base = scores(ranker(), tokens, SEGMENTS, 3, counting)
    moved = scores(ranker(), *reordered(tokens, order), 3, counting)
    assert abs(moved - base[:, np.array(order)]).max() > 1e-2


def test_one_candidate_is_a_plain_encoder(tokens):
    seg = packed((4,))
    row = tokens[:, : LC + 4]

    @nnx.jit
    def plain(model, row):
        x = model.layers(model.embed(row, seg, jnp.arange(LC + 4)))
        return model.scorer(x[:, LC:].mean(1))

    expected = plain(ranker(), row)
    for mode in ("arrow", "square"):
        made = scores(ranker(mode), row, seg, 1)
        assert made.shape == (2, 1)
        np.testing.assert_allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2])
def test_who_hears_of_whom(tokens, depth):
    """Gradients of candidate 0's outputs in the embeddings of candidate 1 and of the context."""
    own, other, context = (s == SEGMENTS for s in (0, 1, -1))
    model = ranker("arrow", depth)
    gradient_of = jax.jit(jax.grad(lambda x, visible: (model.layers(x, mask=visible)[:, own] ** 3).sum()))
    for mode in ("arrow", "independent", "diag"):
        visible = CandidateMask(SEGMENTS, mode).dense(T)
        gradient = np.abs(gradient_of(model.embed(tokens, SEGMENTS), visible)).max((0, 2))
        assert (gradient[own] > 0).all()
        assert (gradient[other] > 0).all() if (mode, depth) == ("arrow", 2) else (gradient[other] == 0).all()
        assert (gradient[context] == 0).all() if mode == "diag" else (gradient[context] > 0).all()


def alone(tokens, c):
    """(tokens, segments, where the candidate stands) of the context and candidate c, padded to the same length."""
    start, n = LC + sum(LENGTHS[:c]), LENGTHS[c]
    row = jnp.concatenate([tokens[:, :LC], tokens[:, start : start + n]], 1)
    padding = T - row.shape[1]
    return jnp.pad(row, ((0, 0), (0, padding))), packed((n,), padding), slice(start, start + n)


def test_independent_is_each_candidate_alone(tokens):
    together = scores(ranker("independent"), tokens, SEGMENTS, 3)
    for c in range(3):
        row, seg, _ = alone(tokens, c)
        np.testing.assert_allclose(scores(ranker("independent"), row, seg, 1)[:, 0], together[:, c], atol=1e-5)


def test_first_layer_is_the_cross_encoders(tokens):
    model = ranker("arrow", 1)
    encode = nnx.jit(lambda model, tokens, seg: model.encode(tokens, seg))
    x = encode(model, tokens, SEGMENTS)
    for c, n in enumerate(LENGTHS):
        row, seg, here = alone(tokens, c)
        single = encode(model, row, seg)
        np.testing.assert_allclose(x[:, here], single[:, LC : LC + n], atol=1e-5)
        assert abs(x[:, :LC] - single[:, :LC]).max() > 1e-2


def test_padding_changes_nothing(tokens):
    seg = packed(padding=4)
    longer = jnp.pad(tokens, ((0, 0), (0, 4)))
    base = scores(ranker(), tokens, SEGMENTS, 3)
    for filled in (longer, longer.at[:, T:].set(7)):
        np.testing.assert_allclose(scores(ranker(), filled, seg, 3), base, atol=1e-5)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, T + 4, N, 4))
    for backend in ("dense", "blockwise"):
        out = attention(q, k, v, mask=CandidateMask(seg), backend=backend, block_sizes=(8, 8))
        assert (out[:, T:] == 0).all()


def test_means_of_unequal_candidates(rng):
    seg = np.stack([packed((3, 2, 4)), packed((6, 1), padding=2)])
    x = rng.normal(size=(2, T, D)).astype(np.float32)
    means, count = candidate_means(jnp.asarray(x), seg, 3)
    np.testing.assert_array_equal(count, [[3, 2, 4], [6, 1, 0]])
    for b, c in np.ndindex(2, 3):
        expected = x[b, seg[b] == c].mean(0) if count[b, c] else 0
        np.testing.assert_allclose(means[b, c], expected, atol=1e-6)


def test_rows_of_a_batch_are_ranked_alone(tokens):
    """Segments of their own, one row with fewer candidates and one with none."""
    seg = np.stack([SEGMENTS, packed((6, 1), padding=2)])
    made = scores(ranker(), tokens, seg, 3)
    for row, count in ((0, 3), (1, 2)):
        alone = scores(ranker(), tokens[row : row + 1], seg[row], count)
        np.testing.assert_allclose(made[row : row + 1, :count], alone, atol=1e-5)
    assert np.isneginf(made[1, 2])
    empty = scores(ranker(), tokens[:1], packed((), padding=T - LC), 3)
    assert np.isneginf(empty).all()


def test_loss_is_of_the_ranking_and_of_masked_words(tokens):
    right, masked = jnp.array([2, 0]), jnp.zeros((2, T), bool).at[:, 1:4].set(True)
    model = ranker()
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, T, D)), jnp.float32)
    made, words = model.score(x, SEGMENTS, 3), model.readout(x)
    log_p = [jax.nn.log_softmax(y.astype(jnp.float32)) for y in (made, words)]
    ranking = -np.mean([log_p[0][0, 2], log_p[0][1, 0]])
    hidden = -np.mean([log_p[1][b, t, tokens[b, t]] for b in range(2) for t in (1, 2, 3)])
    np.testing.assert_allclose(response_selection_loss(made, right, words, tokens, masked), ranking + hidden, rtol=1e-5)
    absent = made.at[0, 1].set(-jnp.inf)  # a row with fewer candidates
    gradient = jax.grad(lambda s: response_selection_loss(s, right, words, tokens, masked))(absent)
    assert np.isfinite(gradient).all() and gradient[0, 1] == 0
    # A row without any candidate counts nowhere.
    value, gradient = jax.value_and_grad(lambda s: response_selection_loss(s, right, words, tokens, masked))(
        made.at[1].set(-jnp.inf)
    )
    np.testing.assert_allclose(value, hidden - log_p[0][0, 2], rtol=1e-5)
    assert np.isfinite(gradient).all() and (gradient[0] != 0).all() and (gradient[1] == 0).all()


def test_in_bfloat16_scores_are_float32(tokens):
    """Products too: rounding a score to bfloat16 would leave 8 bits."""
    config = dataclasses.replace(ranker().config, dtype=jnp.bfloat16)
    model = UniEncoderRanker(config, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, T, D)), jnp.bfloat16)
    made, (means, _) = model.score(x, SEGMENTS, 3), candidate_means(x, SEGMENTS, 3)
    assert x.dtype == jnp.bfloat16 and made.dtype == jnp.float32
    exact = np.asarray(means, np.float64) @ np.asarray(model.scorer.kernel[...], np.float64)
    np.testing.assert_allclose(made, exact[..., 0] + model.scorer.bias[...], atol=1e-6)


def test_bad_input(tokens):
    with pytest.raises(ValueError, match=r"mode 'arow'.*'arrow'"):
        CandidateMask(SEGMENTS, "arow")
    with pytest.raises(ValueError, match=r"mode 'cross'.*'cross-encoder'"):
        ranking_cost(4, [2], "cross")
    with pytest.raises(ValueError, match=r"tokens \(2, 12\) and segments \(14,\)"):
        ranker()(tokens[:, :12], SEGMENTS, 3)
    with pytest.raises(ValueError, match=r"positions: tokens.*\(2, 14\) and positions \(13,\)"):
        ranker()(tokens, SEGMENTS, 3, np.arange(T - 1))
    with pytest.raises(ValueError, match="candidate 2, so at least 3 are needed, got 2"):
        ranker()(tokens, SEGMENTS, 2)
    with pytest.raises(ValueError, match=r"mode 'arow'.*'arrow'"):
        UniEncoderConfig(mode="arow")
    short = UniEncoderRanker(dataclasses.replace(ranker().config, max_length=6), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions: 0 to 8, but the table was built for length=6"):
        nnx.jit(lambda model, tokens: model(tokens, SEGMENTS, 3))(short, tokens)
    for seg, words in (
        [[-1, 0, 1, 0], r"row 0 runs through \[-1, 0, 1, 0\]"],
        [[[-1, 0], [0, -1]], r"row 1.*context \(-1\) first"],
    ):
        with pytest.raises(ValueError, match=words):
            candidate_positions(np.array(seg))
    with pytest.raises(ValueError, match=r"positions.*'learned' works, got 'rope'"):
        UniEncoderRanker(UniEncoderConfig(positions="rope"), rngs=nnx.Rngs(0))


# --- against transformers --------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("mode", MODES)
def test_parity_with_bert(rng, mode):
    """Last layer, scores, and gradients in the words' table and the first layer's queries."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=N, intermediate_size=24,
        max_position_embeddings=24, hidden_act="gelu_new", layer_norm_eps=1e-6, attn_implementation="eager",
    )  # fmt: skip
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    model = ranker(mode)

    def copy(theirs, ours, transpose=False):
        value = np.asarray(ours[...])
        value = value.reshape(-1, D).T if transpose == "out" else value.reshape(len(value), -1).T if transpose else value
        with torch.no_grad():
            theirs.copy_(torch.tensor(np.array(value.reshape(theirs.shape))))

    def copy_linear(theirs, ours, transpose=True):
        copy(theirs.weight, ours.kernel, transpose)
        copy(theirs.bias, ours.bias)

    def copy_norm(theirs, ours):
        copy(theirs.weight, ours.scale)
        copy(theirs.bias, ours.bias)

    copy(bert.embeddings.word_embeddings.weight, model.words.table)
    copy(bert.embeddings.position_embeddings.weight, model.positions.table)
    copy(bert.embeddings.token_type_embeddings.weight, model.types.table)
    copy_norm(bert.embeddings.LayerNorm, model.embed_norm)
    for theirs, ours in zip(bert.encoder.layer, model.layers.runs, strict=True):
        for name in ("query", "key", "value"):
            copy_linear(getattr(theirs.attention.self, name), getattr(ours.mixer.qkv, name))
        copy_linear(theirs.attention.output.dense, ours.mixer.out, "out")
        copy_norm(theirs.attention.output.LayerNorm, ours.mixer_norm)
        copy_linear(theirs.intermediate.dense, ours.feed_forward.up)
        copy_linear(theirs.output.dense, ours.feed_forward.down)
        copy_norm(theirs.output.LayerNorm, ours.feed_forward_norm)

    seg = packed(padding=2)
    tokens = rng.integers(1, V, (2, len(seg)))  # BERT's token 0 is padding and has no gradient
    additive = np.where(cells(seg, mode), 0, np.finfo(np.float32).min)
    out = bert(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(additive, dtype=torch.float32)[None, None].expand(2, 1, -1, -1),
        position_ids=torch.tensor(np.array(candidate_positions(seg))).long()[None].expand(2, -1),
        token_type_ids=torch.tensor(seg >= 0).long()[None].expand(2, -1),
    ).last_hidden_state
    real = seg > -2
    encode = nnx.jit(lambda model, tokens: model.encode(tokens, seg))
    np.testing.assert_allclose(encode(model, tokens)[:, real], out.detach().numpy()[:, real], atol=1e-5)

    weight, bias = (torch.tensor(np.array(x[...])) for x in (model.scorer.kernel, model.scorer.bias))
    theirs = torch.stack([out[:, seg == c].mean(1) @ weight[:, 0] + bias[0] for c in range(3)], 1)
    made = scores(model, tokens, seg, 3)
    np.testing.assert_allclose(made, theirs.detach().numpy(), atol=1e-5)

    torch.nn.functional.cross_entropy(theirs, torch.tensor([1, 2])).backward()

    @nnx.jit
    @nnx.grad
    def gradients(model):
        log_p = jax.nn.log_softmax(model(tokens, seg, 3))
        return -(log_p[0, 1] + log_p[1, 2]) / 2

    gradient = gradients(model)
    pairs = [
        (gradient.words.table, bert.embeddings.word_embeddings.weight.grad),
        (gradient.layers.runs[0].mixer.qkv.query.kernel, bert.encoder.layer[0].attention.self.query.weight.grad.T),
    ]
    for mine, grad in pairs:
        np.testing.assert_allclose(np.reshape(mine[...], grad.shape), grad.numpy(), atol=1e-5)
