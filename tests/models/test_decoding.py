import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.models.decoding import beam_search, greedy, sample
from attnzoo.models.lm import DecoderLM, LMConfig

V, EOS, NEW = 6, 0, 5
PROMPT = jnp.array([[3, 1, 4], [5, 2, 2]], jnp.int32)


@pytest.fixture(scope="module")
def lm() -> DecoderLM:
    config = LMConfig(vocab_size=V, dim=16, num_layers=2, num_heads=2, dropout_rate=0.5)
    return DecoderLM(config, rngs=nnx.Rngs(params=0, dropout=1))


class Bigram(nnx.Module):
    """A model whose logits depend on the last two tokens; its cache is the last token."""

    def __init__(self, seed: int, sharpness: float = 1.5):
        self.table = nnx.Param(jax.random.normal(jax.random.key(seed), (V, V, V)) * sharpness)

    def init_cache(self, batch, length):
        return jnp.zeros(batch, jnp.int32)

    def prefill(self, tokens, cache, lengths=None):
        before = jnp.concatenate([cache[:, None], tokens[:, :-1]], axis=1)
        last = tokens[:, -1] if lengths is None else tokens[jnp.arange(len(tokens)), lengths - 1]
        return self.table[...][before, tokens], last

    def step(self, tokens, cache):
        return self.prefill(tokens, cache)

    def reorder_cache(self, cache, rows):
        return cache[rows]


full = nnx.jit(lambda model, tokens: model(tokens))


def uncached(model: DecoderLM, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities [B, V] after the last token, from a forward pass over a fixed length."""
    model = nnx.merge(*nnx.split(model))
    model.eval()
    padded = np.pad(tokens, ((0, 0), (0, 8 - tokens.shape[1])))
    return np.asarray(jax.nn.log_softmax(full(model, jnp.asarray(padded))[:, tokens.shape[1] - 1]))


def test_greedy_equals_uncached(lm):
    made = greedy(lm, PROMPT, max_new=NEW)
    tokens, total = np.asarray(PROMPT), np.zeros(2)
    for _ in range(NEW):
        log_p = uncached(lm, tokens)
        total += log_p.max(axis=1)
        tokens = np.concatenate([tokens, log_p.argmax(axis=1)[:, None]], axis=1)
    np.testing.assert_array_equal(made.tokens, tokens[:, 3:])
    np.testing.assert_allclose(made.scores, total, atol=1e-4)
    assert made.lengths.tolist() == [NEW, NEW]
    assert not lm.dropout.deterministic  # the caller's model keeps its mode


def test_sampling_equals_uncached(lm):
    key = jax.random.key(7)
    made = sample(lm, PROMPT, key, max_new=NEW, temperature=0.8)
    tokens = np.asarray(PROMPT)
    for i in range(NEW):
        token = jax.random.categorical(jax.random.fold_in(key, i), jnp.asarray(uncached(lm, tokens)) / 0.8)
        tokens = np.concatenate([tokens, np.asarray(token)[:, None]], axis=1)
    np.testing.assert_array_equal(made.tokens, tokens[:, 3:])


def reference_beams(log_p_after, prompt, width, alpha, max_new):
    """Beam search over whole token lists, nothing cached, no early stop."""
    live, finished = [(0.0, list(prompt))], []
    for length in range(1, max_new + 1):
        penalty = ((5 + length) / 6) ** alpha
        candidates = []
        for score, tokens in live:
            log_p = log_p_after(tokens)
            candidates += [(score + float(log_p[t]), [*tokens, t]) for t in range(V)]
        candidates.sort(key=lambda c: -c[0])
        finished += [(s / penalty, t, length) for s, t in candidates[:width] if t[-1] == EOS]
        finished = sorted(finished, key=lambda c: -c[0])[:width]
        live = [c for c in candidates if c[1][-1] != EOS][:width]
    if finished:
        return finished[0]
    return live[0][0] / penalty, live[0][1], max_new


def test_beam_search_equals_uncached(lm):
    made = beam_search(lm, PROMPT, max_new=NEW, eos_id=EOS, beam_size=3)
    for row, prompt in enumerate(np.asarray(PROMPT).tolist()):
        score, tokens, length = reference_beams(lambda t: uncached(lm, np.array([t]))[0], prompt, 3, 0.6, NEW)
        assert made.tokens[row, :length].tolist() == tokens[3:]
        assert made.lengths[row] == length
        assert made.scores[row] == pytest.approx(score, abs=1e-4)


def bigram_log_p(model):
    table = np.asarray(jax.nn.log_softmax(model.table[...]))
    return lambda tokens: table[tokens[-2], tokens[-1]]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_beam_search_with_ends(width, alpha):
    for seed in range(6):
        model = Bigram(seed)
        made = beam_search(model, PROMPT, max_new=NEW, eos_id=EOS, beam_size=width, alpha=alpha, pad_id=1)
        for row, prompt in enumerate(np.asarray(PROMPT).tolist()):
            score, tokens, length = reference_beams(bigram_log_p(model), prompt, width, alpha, NEW)
            assert made.scores[row] == pytest.approx(score, abs=1e-4)
            assert made.lengths[row] == length
            assert made.tokens[row].tolist() == tokens[3:] + [1] * (NEW - length)


def test_a_wide_beam_finds_the_best_of_all():
    model = Bigram(3)
    log_p = bigram_log_p(model)
    best = -np.inf
    for length in range(1, 4):
        for body in itertools.product(range(1, V), repeat=length - 1):
            tokens, total = PROMPT[0].tolist(), 0.0
            for t in (*body, EOS):
                total += log_p(tokens)[t]
                tokens.append(t)
            best = max(best, total / ((5 + length) / 6) ** 0.6)
    made = beam_search(model, PROMPT[:1], max_new=3, eos_id=EOS, beam_size=40)
    assert made.scores[0] == pytest.approx(best, abs=1e-4)


def test_one_beam_without_penalty_is_greedy(lm):
    for model in (lm, *(Bigram(seed) for seed in range(6))):
        beam = beam_search(model, PROMPT, max_new=NEW, eos_id=EOS, beam_size=1, alpha=0.0)
        line = greedy(model, PROMPT, max_new=NEW, eos_id=EOS)
        np.testing.assert_array_equal(beam.tokens, line.tokens)
        np.testing.assert_array_equal(beam.lengths, line.lengths)
        np.testing.assert_allclose(beam.scores, line.scores, atol=1e-4)


def test_rows_do_not_see_each_other():
    for seed in range(3):
        model = Bigram(seed)
        both = beam_search(model, PROMPT, max_new=NEW, eos_id=EOS)
        for row in range(2):
            alone = beam_search(model, PROMPT[row : row + 1], max_new=NEW, eos_id=EOS)
            np.testing.assert_array_equal(alone.tokens[0], both.tokens[row])


def test_rows_end_by_themselves():
    model = Bigram(0)
    table = jnp.full((V, V, V), -5.0).at[:, :, 2].set(5.0).at[:, 4, EOS].set(9.0)
    model.table[...] = table
    made = greedy(model, PROMPT, max_new=NEW, eos_id=EOS, pad_id=3)
    assert made.tokens.tolist() == [[EOS, 3, 3, 3, 3], [2, 2, 2, 2, 2]]
    assert made.lengths.tolist() == [1, NEW]
    unending = greedy(model, PROMPT, max_new=NEW)
    assert unending.lengths.tolist() == [NEW, NEW]


def test_ties_go_to_the_lowest_id():
    model = Bigram(0)
    model.table[...] = jnp.zeros((V, V, V)).at[:, :, 0].set(-1.0)
    assert greedy(model, PROMPT, max_new=2).tokens.tolist() == [[1, 1], [1, 1]]


def test_prompts_of_different_lengths(lm):
    lengths = jnp.array([2, 3])
    for decode in (
        lambda prompt, **kw: greedy(lm, prompt, max_new=NEW, **kw),
        lambda prompt, **kw: beam_search(lm, prompt, max_new=NEW, eos_id=EOS, beam_size=2, **kw),
    ):
        ragged = decode(PROMPT, lengths=lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = decode(PROMPT[row : row + 1, :length])
            np.testing.assert_array_equal(ragged.tokens[row], alone.tokens[0])


def frequencies(model, **options):
    prompt = jnp.tile(PROMPT[:1], (4000, 1))
    made = sample(model, prompt, jax.random.key(0), max_new=1, **options)
    return np.bincount(np.asarray(made.tokens[:, 0]), minlength=V) / 4000


def test_sampling_restrictions():
    model = Bigram(0)
    p = np.array([0.05, 0.4, 0.1, 0.25, 0.15, 0.05])
    model.table[...] = jnp.broadcast_to(jnp.log(p), (V, V, V))
    np.testing.assert_allclose(frequencies(model), p, atol=0.03)
    sharp = p**2 / (p**2).sum()
    np.testing.assert_allclose(frequencies(model, temperature=0.5), sharp, atol=0.03)
    two = np.where(p >= 0.25, p, 0) / 0.65
    np.testing.assert_allclose(frequencies(model, top_k=2), two, atol=0.03)
    np.testing.assert_allclose(frequencies(model, top_p=0.6), two, atol=0.03)
    np.testing.assert_allclose(frequencies(model, top_p=0.66), np.where(p >= 0.15, p, 0) / 0.8, atol=0.03)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert frequencies(model, **options)[1] == 1
    np.testing.assert_allclose(frequencies(model, top_k=V + 3, top_p=1.0), p, atol=0.03)


def test_the_same_key_gives_the_same_tokens(lm):
    one, two = (sample(lm, PROMPT, jax.random.key(1), max_new=NEW, top_k=4, top_p=0.9) for _ in range(2))
    np.testing.assert_array_equal(one.tokens, two.tokens)
    other = sample(lm, PROMPT, jax.random.key(2), max_new=NEW, top_k=4, top_p=0.9)
    assert not np.array_equal(one.tokens, other.tokens)


def test_inside_jit(lm):
    inside = nnx.jit(lambda model, prompt: beam_search(model, prompt, max_new=NEW, eos_id=EOS).tokens)
    outside = beam_search(lm, PROMPT, max_new=NEW, eos_id=EOS).tokens
    np.testing.assert_array_equal(inside(lm, PROMPT), outside)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: greedy(m, PROMPT[0], max_new=1), "prompt"),
        (lambda m: greedy(m, PROMPT, max_new=0), "max_new"),
        (lambda m: sample(m, PROMPT, jax.random.key(0), max_new=1, temperature=0.0), "temperature"),
        (lambda m: sample(m, PROMPT, jax.random.key(0), max_new=1, top_k=0), "top_k"),
        (lambda m: sample(m, PROMPT, jax.random.key(0), max_new=1, top_p=1.5), "top_p"),
        (lambda m: beam_search(m, PROMPT, max_new=1, eos_id=EOS, beam_size=0), "beam_size"),
        (lambda m: beam_search(m, PROMPT, max_new=1, eos_id=EOS, alpha=-1.0), "alpha"),
    ],
)
def test_bad_input(lm, call, says):
    with pytest.raises(ValueError, match=says):
        call(lm)
