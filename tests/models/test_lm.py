import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.masks import Causal, Instead, Prefix, Segments
from attnzoo.models.decoding import greedy
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.nn.linear import parameter_count

TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)
SIZES = {"vocab_size": 32, "dim": 16, "num_layers": 3, "num_heads": 2}


def build(**options) -> DecoderLM:
    model = DecoderLM(LMConfig(**SIZES, **options), rngs=nnx.Rngs(params=0, dropout=1))
    model.eval()
    return model


run = nnx.jit(lambda model, tokens, **kwargs: model(tokens, **kwargs))
prefill = nnx.jit(lambda model, tokens, cache, lengths=None: model.prefill(tokens, cache, lengths))
step = nnx.jit(lambda model, tokens, cache: model.step(tokens, cache))
gradient = nnx.jit(lambda model, tokens: nnx.grad(lambda m: (m(tokens) ** 2).mean())(model))

VARIANTS = {
    "rope": {},
    "learned, grouped, untied": {
        "positions": "learned", "max_length": 8, "num_kv_heads": 1, "tie_embeddings": False
    },
    "sinusoidal, post-norm": {"positions": "sinusoidal", "norm": "layer", "norm_first": False, "mlp": "relu"},
    "scanned": {"scan_layers": True, "head_dim": 6},
}  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_cached_equals_uncached(options):
    model = build(**options)
    full = run(model, TOKENS)
    assert full.shape == (2, 8, 32)
    assert full.dtype == jnp.float32
    y, cache = prefill(model, TOKENS[:, :5], model.init_cache(2, 8))
    outputs = [y]
    for t in range(5, 8):
        y, cache = step(model, TOKENS[:, t : t + 1], cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"positions": "learned", "scan_layers": True}])
def test_ragged_prefill(options):
    model = build(**options)
    full = run(model, TOKENS)
    lengths = jnp.array([3, 6])
    y, cache = prefill(model, TOKENS[:, :6], model.init_cache(2, 8), lengths)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(y[row, :length], full[row, :length], atol=1e-4)
    rows = jnp.arange(2)
    for i in range(2):
        y, cache = step(model, TOKENS[rows, lengths + i][:, None], cache)
        np.testing.assert_allclose(y[:, 0], full[rows, lengths + i], atol=1e-4)
    assert cache.seen.tolist() == [5, 8]


def test_scan_and_remat_change_nothing():
    plain = build()
    scanned = build(scan_layers=True, remat="full")
    np.testing.assert_allclose(run(scanned, TOKENS), run(plain, TOKENS), atol=1e-5)
    expected = gradient(plain, TOKENS)
    np.testing.assert_allclose(gradient(scanned, TOKENS).embed.table[...], expected.embed.table[...], atol=1e-6, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
        gradient(build(remat="dots"), TOKENS),
        expected,
    )


def test_the_past_does_not_see_the_future():
    model = build()
    changed = TOKENS.at[:, 5:].set((TOKENS[:, 5:] + 1) % 32)
    np.testing.assert_array_equal(run(model, changed)[:, :5], run(model, TOKENS)[:, :5])


def test_packed_documents_are_documents():
    model = build()
    packed = run(
        model,
        TOKENS[:1],
        mask=Segments(jnp.array([0, 0, 0, 1, 1, 1, 1, 1])),
        positions=jnp.array([0, 1, 2, 0, 1, 2, 3, 4]),
    )
    alone = run(model, TOKENS[:1, 3:])
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-5)


def test_train_and_eval_switch_dropout():
    model = build(dropout_rate=0.3, mixer_args={"dropout_rate": 0.3}, mlp_dropout_rate=0.3)
    np.testing.assert_array_equal(run(model, TOKENS), run(model, TOKENS))
    model.train()
    assert not np.allclose(run(model, TOKENS), run(model, TOKENS))


def test_bfloat16():
    model = build(dtype=jnp.bfloat16)
    assert run(model, TOKENS).dtype == jnp.float32
    assert model.embed.table.dtype == jnp.float32
    np.testing.assert_allclose(run(model, TOKENS), run(build(), TOKENS), atol=0.2)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.init_cache(2, 8)) if leaf.ndim == 4} == {jnp.dtype("bfloat16")}


def test_untied_has_one_more_table():
    assert parameter_count(build(tie_embeddings=False)) - parameter_count(build()) == 32 * 16


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"positions": "ropes"}, "unknown positions 'ropes': did you mean 'rope'"),
        ({"norm": "batch"}, "norm"),
        ({"mixer": "transfromer"}, "did you mean 'transformer'"),
        ({"mixer_args": {"num_kv_head": 1}}, "did you mean 'num_kv_heads'"),
        ({"remat": "some"}, "remat"),
    ],
)
def test_bad_configurations(options, says):
    with pytest.raises(ValueError, match=says):
        build(**options)


def test_bad_tokens():
    with pytest.raises(ValueError, match="tokens"):
        build()(TOKENS[0])
    with pytest.raises(ValueError, match="tokens"):
        build()(TOKENS.astype(jnp.float32))


def test_configurations_can_be_compared_and_hashed():
    one, other = (LMConfig(**SIZES, mixer_args={"num_kv_heads": 1}) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)


def test_a_prefix_language_model():
    """Prefixes of a causal model's rows are read both ways, in one call and in decoding."""
    model = build()
    mask = Instead(Causal() | Prefix(jnp.array([2, 5])))
    full = run(model, TOKENS, mask=mask)
    other = run(model, TOKENS.at[:, 1].add(1), mask=mask)
    assert (abs(other - full)[:, 0].max(-1) > 1e-4).all()
    np.testing.assert_array_equal(run(model, TOKENS.at[:, 5].add(1), mask=mask)[:, :5], full[:, :5])
    y, cache = model.prefill(TOKENS[:, :7], model.init_cache(2, 8), mask=mask)
    last, _ = step(model, TOKENS[:, 7:], cache)
    np.testing.assert_allclose(jnp.concatenate([y, last], axis=1), full, atol=1e-4)
    made = greedy(model, TOKENS, max_new=2, mask=mask)
    np.testing.assert_array_equal(made.tokens[:, 0], full[:, -1].argmax(-1))
    longer = run(model, jnp.concatenate([TOKENS, made.tokens[:, :1]], 1), mask=mask)
    np.testing.assert_array_equal(made.tokens[:, 1], longer[:, -1].argmax(-1))


def test_a_sequence_longer_than_the_table_of_positions():
    """Also where nothing but the shape is known."""
    with pytest.raises(ValueError, match="positions: 0 to 7, but the table was built for length=6"):
        run(build(positions="learned", max_length=6), TOKENS)
