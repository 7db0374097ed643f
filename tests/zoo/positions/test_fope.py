"""Fourier position embedding: tables per head, the floor, and what becomes of RoPE without either."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.positions import RoPE, positions_for
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.models.resformer import ResFormerLM
from attnzoo.zoo.positions.fope import (
    FoPEConfig,
    FourierCoefficients,
    floor_frequency,
    fope_expand,
    fope_spectrum,
    fope_tables,
    rope_zeroed,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

N, H, T = 2, 16, 7
FAR = 10**9


def build(heads=N, head_dim=H, seed=0, **options):
    return FoPEConfig(**{"train_length": 64, **options}).build(heads, head_dim, rngs=nnx.Rngs(seed))


rotate = nnx.jit(lambda positions, x, pos: positions.rotate(x, pos))


def scores(positions, q, k, at_q, at_k):
    """q'·k' of single vectors [N, H] at two positions."""
    q, k = (rotate(positions, x[None], jnp.array([at]))[0] for x, at in ((q, at_q), (k, at_k)))
    return (q * k).sum(-1)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(2, T, N, H)), jnp.float32)


# --- the equations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cap": 2}, {"reference_quirks": True}, {"per_head": False, "separate_basis": False}])
def test_it_is_the_equations(x, options):
    positions = build(**options)
    config = positions.config
    w = np.array([10000.0 ** (-2 * i / H) for i in range(H // 2)])
    w = w[w >= 2 * np.pi / 64]
    c_sin, c_cos = (np.broadcast_to(np.asarray(c[...], np.float64), (N, *c.shape[1:])) for c in (positions.sin, positions.cos))
    expected = np.zeros(x.shape)
    for t, n in enumerate(range(3, 3 + T)):
        for h in range(N):
            sin = np.full(H // 2, 1.0 if config.reference_quirks else 0.0)
            cos = np.ones(H // 2)
            sin[: c_sin.shape[2]] = np.sin(n * w) @ c_sin[h]
            cos[: c_cos.shape[2]] = np.cos(n * w) @ c_cos[h]
            v = np.asarray(x[:, t, h], np.float64)
            half = np.concatenate([-v[:, H // 2 :], v[:, : H // 2]], axis=-1)
            expected[:, t, h] = v * np.tile(cos, 2) + half * np.tile(sin, 2)
    np.testing.assert_allclose(rotate(positions, x, jnp.arange(3, 3 + T)), expected, atol=2e-5)
    rows = jnp.arange(3, 3 + T)[None].repeat(2, 0)
    np.testing.assert_allclose(rotate(positions, x, rows), expected, atol=2e-5)


def test_released_initialisation():
    """Identity plus Xavier noise; with the cap, every second frequency, and components of noise alone."""
    positions = FoPEConfig(train_length=1024, reference_quirks=True).build(8, 128, rngs=nnx.Rngs(0))
    c = np.asarray(positions.sin[...])
    assert c.shape == (8, 36, 32)
    noise_only = [i for i in range(32) if 2 * i >= 36]
    assert len(noise_only) == 14
    identity = np.zeros((36, 32))
    for i in range(18):
        identity[2 * i, i] = 1
    std = 0.3 * np.sqrt(2 / (36 * 32 + 8 * 32))
    np.testing.assert_allclose((c - identity).std(), std, rtol=0.03)
    np.testing.assert_allclose((c - identity).mean(), 0, atol=3 * std / np.sqrt(c.size))
    assert 128 // 2 - c.shape[2] == 32  # padded as if their frequency were zero


def test_padded_components_of_the_released_code_count_twice(x):
    """sinF = cosF = 1 turns by 45 degrees and stretches by sqrt 2."""
    positions = build(reference_quirks=True)
    pairs = slice(positions.config.outputs(H), H // 2)
    q, k = (jnp.zeros((N, H)).at[:, :].set(x[0, t]) for t in (0, 1))
    only = jnp.zeros(H).at[jnp.r_[pairs]].set(1).at[H // 2 + jnp.r_[pairs]].set(1)
    np.testing.assert_allclose(scores(positions, q * only, k * only, 5, 9), 2 * (q * k * only).sum(-1), rtol=1e-5)


# --- RoPE at the ends ------------------------------------------------------------------------------------


def test_no_series_and_no_floor_is_rope(x):
    positions = build(gain=0.0, train_length=FAR)
    assert len(positions.config.kept(H)) == H // 2
    for pos in (jnp.arange(T), jnp.arange(T) + 1000):
        np.testing.assert_allclose(rotate(positions, x, pos), RoPE().rotate(x, pos), atol=1e-6)


def test_the_floor_alone_is_relative(x):
    positions = build(gain=0.0)
    zeroed = rope_zeroed(64)
    np.testing.assert_allclose(rotate(positions, x, jnp.arange(T)), zeroed.rotate(x, jnp.arange(T)), atol=1e-6)
    q, k = x[0, 0], x[0, 1]
    for at in (10, 55):
        near, far = scores(positions, q, k, at, 7), scores(positions, q, k, at + 40, 47)
        np.testing.assert_allclose(near, far, atol=2e-5)
    series = build(gain=0.3)
    assert not np.allclose(scores(series, q, k, 10, 7), scores(series, q, k, 50, 47), atol=1e-3)


@pytest.mark.parametrize(("train_length", "head_dim", "kept"), [(512, 64, 16), (64, 32, 5), (1024, 128, 36), (512, 128, 31)])
def test_how_many_are_kept(train_length, head_dim, kept):
    w = FoPEConfig(train_length=train_length).kept(head_dim)
    assert len(w) == kept
    assert (w * train_length / (2 * np.pi) >= 1).all()  # at least a whole period
    assert (np.diff(w) < 0).all()
    slower = 10000.0 ** (-2 * kept / head_dim)
    assert slower * train_length / (2 * np.pi) < 1
    assert (FoPEConfig(train_length=train_length, floor_ratio=2.0).kept(head_dim) >= 2 * floor_frequency(train_length)).all()


def test_a_frequency_at_the_floor_is_kept():
    length = 100
    theta = floor_frequency(length) ** -2.0  # of two frequencies the second, theta^(-1/2), is then the floor itself
    w = FoPEConfig(train_length=length, theta=theta).kept(4)
    np.testing.assert_allclose(w, [1.0, floor_frequency(length)], rtol=1e-12)


def test_features_without_position(x):
    positions = build()
    m = positions.config.outputs(H)
    still = [*range(m, H // 2), *range(H // 2 + m, H)]
    assert still
    y = rotate(positions, x, jnp.arange(T) * 31)
    np.testing.assert_array_equal(y[..., still], x[..., still])
    moved = [i for i in range(H) if i not in still]
    assert not np.isclose(y[:, 1:, :, moved], x[:, 1:, :, moved]).all()
    sin, cos = positions.tables(jnp.array([0]))
    assert not sin.any()
    np.testing.assert_allclose(cos[0, :, :m], positions.cos[...].sum(1), atol=1e-6)


def test_whole_numbers_of_periods_repeat():
    length, coefficients = 48, build().sin[...]
    w = 2 * np.pi / length * np.array([20, 9, 1])
    sin, cos = fope_tables(jnp.arange(2 * length), w, coefficients, coefficients, H // 2)
    np.testing.assert_allclose(sin[:length], sin[length:], atol=1e-4)
    np.testing.assert_allclose(cos[:length], cos[length:], atol=1e-4)
    assert not np.allclose(cos[: length // 2], cos[length // 2 : length], atol=0.1)


# --- coefficients ----------------------------------------------------------------------------------------


def test_coefficients_are_not_trained_unless_asked(x):
    def gradient(positions, kind):
        graphdef, wanted, rest = nnx.split(positions, kind, ...)
        return jax.grad(lambda w: (nnx.merge(graphdef, w, rest).rotate(x, jnp.arange(T)) ** 2).sum())(wanted)

    fixed, learned = build(), build(learnable=True)
    assert not jax.tree.leaves(gradient(fixed, nnx.Param))
    assert not jax.tree.leaves(nnx.state(learned, FourierCoefficients))
    assert all((leaf != 0).any() for leaf in jax.tree.leaves(gradient(learned, nnx.Param)))
    assert len(jax.tree.leaves(nnx.state(build(separate_basis=False)))) == 1
    assert fixed.sin.shape == (N, 3, 3) and build(per_head=False).sin.shape == (1, 3, 3)


def test_draws():
    one, same, other = build(), build(), build(seed=1)
    np.testing.assert_array_equal(one.sin[...], same.sin[...])
    assert not np.allclose(one.sin[...], other.sin[...])
    assert not np.allclose(one.sin[0], one.sin[1])  # heads
    assert not np.allclose(one.sin[...], one.cos[...])


CONFIG = LMConfig(
    vocab_size=11,
    dim=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=H,
    mlp_dim=16,
    positions=FoPEConfig(train_length=20, gain=0.5),
)


def test_every_layer_draws_its_own():
    model = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    tables = [layer.mixer.positions.sin[...] for layer in model.layers.runs]
    assert {t.shape for t in tables} == {(2, 2, 2)}  # of the kv heads
    assert not np.allclose(tables[0], tables[1])
    other = ResFormerLM(CONFIG, rngs=nnx.Rngs(0))
    assert other.layers.runs[0].mixer.positions.config == CONFIG.positions


def test_coefficients_are_saved_with_the_model(tmp_path):
    checkpoints = pytest.importorskip("orbax.checkpoint")
    model, other = (DecoderLM(CONFIG, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    with checkpoints.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        saved = checkpointer.restore(tmp_path / "model", nnx.to_pure_dict(nnx.state(other)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(other, state)
    for ours, theirs in zip(model.layers.runs, other.layers.runs, strict=True):
        np.testing.assert_array_equal(ours.mixer.positions.cos[...], theirs.mixer.positions.cos[...])


@pytest.mark.parametrize("scan", [False, True])
def test_decoding_beyond_the_training_length(rng, scan):
    model = DecoderLM(dataclasses.replace(CONFIG, scan_layers=scan), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(rng.integers(0, 11, (2, 30)))
    full = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    step = nnx.jit(lambda model, tokens, cache: model.step(tokens, cache))
    y, cache = nnx.jit(lambda model, tokens, cache: model.prefill(tokens, cache))(
        model, tokens[:, :20], model.init_cache(2, 30)
    )
    np.testing.assert_allclose(y, full[:, :20], atol=2e-5)
    for t in range(20, 30):
        y, cache = step(model, tokens[:, t : t + 1], cache)
        np.testing.assert_allclose(y[:, 0], full[:, t], atol=2e-5)


def test_query_heads_share_the_table_of_their_keys(rng):
    positions = build()
    q = jnp.asarray(rng.normal(size=(1, T, 2 * N, H)), jnp.float32)
    y = rotate(positions, q, jnp.arange(T))
    for n in range(2 * N):
        alone = jnp.stack([q[:, :, n]] * N, axis=2)
        np.testing.assert_allclose(y[:, :, n], rotate(positions, alone, jnp.arange(T))[:, :, n // 2], atol=1e-6)


# --- extension, spectrum, bad input ----------------------------------------------------------------------


def test_expansion_keeps_what_there_was():
    old = build(train_length=512, head_dim=64)
    longer = fope_expand(old, 1024, rngs=nnx.Rngs(5))
    assert (old.sin.shape, longer.sin.shape) == ((N, 16, 16), (N, 18, 18))
    np.testing.assert_array_equal(longer.cos[:, :16, :16], old.cos[...])
    fresh = longer.sin[...] - np.eye(18)
    assert (np.abs(fresh[:, 16:]) < 0.2).all() and (fresh[:, 16:] != 0).all()
    zeros = fope_expand(old, 1024, rngs=nnx.Rngs(5), random=False)
    np.testing.assert_array_equal(zeros.sin[:, :16, :16], old.sin[...])
    assert not zeros.sin[:, 16:].any() and not zeros.sin[:, :, 16:].any()
    shorter = fope_expand(old, 256, rngs=nnx.Rngs(5))
    m = shorter.sin.shape[1]
    assert m < 16
    np.testing.assert_array_equal(shorter.sin[...], old.sin[:, :m, :m])


def test_expansion_of_the_released_code_puts_a_one_beside_the_old():
    """The cap makes the identity skip frequencies, so at the longer length the last row of E is not the old one's."""
    old = build(train_length=512, head_dim=64, reference_quirks=True)
    longer = fope_expand(old, 1024, rngs=nnx.Rngs(5))
    assert (old.sin.shape, longer.sin.shape) == ((N, 16, 16), (N, 18, 16))
    np.testing.assert_allclose(longer.sin[:, 16, 8], 1.0, atol=0.2)


def test_spectrum():
    flat = fope_spectrum(build(gain=0.0))
    np.testing.assert_array_equal(flat.own, np.ones((N, 3)))
    assert flat.zeroed == 5
    positions = build(gain=0.5)
    found = fope_spectrum(positions)
    s, c = (np.asarray(x[...], np.float64) for x in (positions.sin, positions.cos))
    np.testing.assert_allclose(found.power, (s**2 + c**2) / 2, rtol=1e-5)
    np.testing.assert_allclose(found.own[1, 2], found.power[1, 2, 2] / found.power[1, :, 2].sum(), rtol=1e-5)
    np.testing.assert_array_equal(found.frequencies, positions.config.kept(H))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_length": 6}, "train_length: .* in 6 with floor_ratio=1.0 none finishes one"),
        ({"theta": 1.0}, "theta: must be above 1"),
        ({"gain": -0.1}, "gain: .* got -0.1"),
        ({"floor_ratio": -1.0}, "floor_ratio: .* got -1.0"),
        ({"cap": 0}, "cap: at least one"),
        ({"cap": 2, "reference_quirks": True}, "reference_quirks sets its own"),
        ({"head_dim": 5}, "head_dim: .* even, got 5"),
        ({"head_dim": 2, "reference_quirks": True}, "head_dim: reference_quirks .* at least 4, got 2"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


def test_bad_calls(x):
    positions = build()
    for length in (0, 3):
        with pytest.raises(ValueError, match=f"train_length: .* in {length} with floor_ratio=1.0 none finishes one"):
            rope_zeroed(length)
    with pytest.raises(ValueError, match=r"pos: for x \(2, 7, 2, 16\).*got \(3,\)"):
        positions.rotate(x, jnp.arange(3))
    with pytest.raises(ValueError, match=r"heads of width 16, a multiple of 2 of them; got \(2, 7, 1, 16\)"):
        positions.rotate(x[:, :, :1], jnp.arange(T))


def test_plans_are_built_and_all_else_stays():
    rope, made = RoPE(), build()
    assert positions_for(rope, 2, H, rngs=None) is rope
    assert positions_for(None, 2, H, rngs=None) is None
    assert positions_for(made, 2, H, rngs=None) is made  # one that is built is shared as it is
    mixer = GroupedQueryAttention(16, 2, positions=made, head_dim=H, rngs=nnx.Rngs(0))
    assert mixer.positions is made
    # A mixer made like another has tables of its own, which start alike.
    like = GroupedQueryAttention.like(mixer)
    assert like.positions is not made and like.positions.sin is not made.sin
    np.testing.assert_array_equal(like.positions.sin[...], made.sin[...])
    assert GroupedQueryAttention.like(GroupedQueryAttention(16, 2, positions=rope, rngs=nnx.Rngs(0))).positions == rope
