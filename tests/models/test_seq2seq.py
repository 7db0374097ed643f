import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.models.decoding import greedy
from attnzoo.models.encoder import Encoder, EncoderConfig
from attnzoo.models.seq2seq import Transformer, TransformerConfig

SOURCE = jax.random.randint(jax.random.key(0), (2, 6), 1, 13)
TARGET = jax.random.randint(jax.random.key(1), (2, 5), 1, 13)
REAL = jnp.arange(6) < jnp.array([4, 6])[:, None]
SIZES = {"vocab_size": 13, "dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 16}


def build(**options) -> Transformer:
    model = Transformer(TransformerConfig(**SIZES, **options), rngs=nnx.Rngs(params=0, dropout=1))
    model.eval()
    return model


run = nnx.jit(lambda model, *args, **kwargs: model(*args, **kwargs))
start = nnx.jit(lambda model, source, real: model.init_cache(source, 5, source_mask=real))
prefill = nnx.jit(lambda model, target, cache: model.prefill(target, cache))
step = nnx.jit(lambda model, target, cache: model.step(target, cache))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": True, "num_kv_heads": 1, "cross_args": {"num_kv_heads": 1}, "positions": "rope"},
        {"scan_layers": True, "share_embeddings": False, "source_vocab_size": 20},
    ],
    ids=["paper", "pre-norm, multi-query, rope", "scanned, own tables"],
)
def test_cached_equals_uncached(options):
    model = build(**options)
    full = run(model, SOURCE, TARGET, source_mask=REAL)
    y, cache = prefill(model, TARGET[:, :3], start(model, SOURCE, REAL))
    outputs = [y]
    for t in (3, 4):
        y, cache = step(model, TARGET[:, t : t + 1], cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-4)


def test_padding_of_the_source_does_not_matter():
    model = build()
    other = jnp.where(REAL, SOURCE, 7)
    np.testing.assert_array_equal(run(model, SOURCE, TARGET, source_mask=REAL), run(model, other, TARGET, source_mask=REAL))
    np.testing.assert_allclose(
        run(model, SOURCE, TARGET, source_mask=REAL)[:1], run(model, SOURCE[:1, :4], TARGET[:1]), atol=1e-5
    )


def test_the_past_does_not_see_the_future():
    model = build()
    changed = TARGET.at[:, 3:].set(1)
    np.testing.assert_array_equal(run(model, SOURCE, changed)[:, :3], run(model, SOURCE, TARGET)[:, :3])


def test_one_table_or_three():
    assert build().source_embed is None
    assert build().readout is None
    model = build(share_embeddings=False, source_vocab_size=20)
    assert model.source_embed.table.shape == (20, 16)
    assert model.readout.kernel.shape == (16, 13)
    with pytest.raises(ValueError, match="share_embeddings"):
        TransformerConfig(source_vocab_size=20)


def test_greedy_decoding_with_a_source():
    model = build()
    cache = start(model, SOURCE, REAL)
    prompt = jnp.ones((2, 1), jnp.int32)
    made = greedy(model, prompt, max_new=4, cache=cache)
    target = prompt
    for _ in range(4):
        best = run(model, SOURCE, jnp.pad(target, ((0, 0), (0, 5 - target.shape[1]))), source_mask=REAL)
        target = jnp.concatenate([target, best[:, target.shape[1] - 1].argmax(-1)[:, None]], axis=1)
    np.testing.assert_array_equal(made.tokens, target[:, 1:])


def test_errors():
    with pytest.raises(ValueError, match="source_mask"):
        build()(SOURCE, TARGET, source_mask=REAL[:, :5])
    with pytest.raises(ValueError, match="mixer"):
        build(cross="transformers")


def test_encoder():
    config = EncoderConfig(**SIZES, positions="sinusoidal", norm="layer", mlp="gelu")
    encoder = Encoder(config, rngs=nnx.Rngs(0))
    encoder.eval()
    lengths = jnp.array([4, 6])
    y = run(encoder, SOURCE, lengths=lengths)
    assert y.shape == (2, 6, 16)
    changed = run(encoder, jnp.where(REAL, SOURCE, 7), lengths=lengths)
    np.testing.assert_array_equal(changed[REAL], y[REAL])
    assert not np.allclose(run(encoder, SOURCE.at[:, 3].set(12), lengths=lengths)[:, 0], y[:, 0])
    assert encoder.readout(y).shape == (2, 6, 13)
    order = jnp.array([2, 0, 1, 5, 3, 4])
    plain = Encoder(EncoderConfig(**SIZES, positions="none"), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(run(plain, SOURCE[:, order]), run(plain, SOURCE)[:, order], atol=1e-5)
