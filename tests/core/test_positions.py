import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.positions import (
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    RoPE,
    YaRN,
    alibi_slopes,
    grid_positions,
    sinusoidal_positions,
)

X = jax.random.normal(jax.random.key(0), (2, 6, 3, 16))
POS = jnp.arange(6)
ROPES = [
    RoPE(),
    RoPE(interleaved=True),
    RoPE(fraction=0.5),
    RoPE(theta=500.0, scaling=Linear(4.0)),
    RoPE(scaling=NTK(4.0)),
    RoPE(scaling=Llama3(8.0, original_length=64)),
    RoPE(scaling=YaRN(4.0, original_length=64, attention_factor=1.0)),
]


def scores(rope: RoPE, q_pos: int, k_pos: int) -> np.ndarray:
    q, k = X[:1, :1], X[1:, 1:2]
    q = rope.rotate(q, jnp.array([q_pos]))
    k = rope.rotate(k, jnp.array([k_pos]))
    return np.asarray((q * k).sum(-1))


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_scores_depend_on_the_distance_alone(rope):
    np.testing.assert_allclose(scores(rope, 7, 3), scores(rope, 107, 103), atol=1e-4)
    assert not np.allclose(scores(rope, 7, 3), scores(rope, 8, 3), atol=1e-4)


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_norms_stay_and_position_0_is_the_identity(rope):
    y = rope.rotate(X, POS)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(X, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(y[:, 0], X[:, 0])


def test_equals_complex_multiplication():
    angle = np.arange(6)[:, None] * 10000.0 ** (-np.arange(8) / 8)
    turn = np.exp(1j * angle)[None, :, None]
    x = np.asarray(X, np.float64)
    halves = (x[..., :8] + 1j * x[..., 8:]) * turn
    np.testing.assert_allclose(RoPE().rotate(X, POS), np.concatenate([halves.real, halves.imag], -1), atol=1e-5)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
    expected = np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)
    np.testing.assert_allclose(RoPE(interleaved=True).rotate(X, POS), expected, atol=1e-5)


def test_partial_rotary_leaves_the_rest():
    y = RoPE(fraction=0.25).rotate(X, POS)
    np.testing.assert_array_equal(y[..., 4:], X[..., 4:])
    np.testing.assert_array_equal(y[..., :4], RoPE().rotate(X[..., :4], POS))


def test_positions_may_differ_by_row():
    pos = jnp.stack([POS, POS + 3])
    y = RoPE().rotate(X, pos)
    np.testing.assert_array_equal(y[0], RoPE().rotate(X, POS)[0])
    np.testing.assert_array_equal(y[1], RoPE().rotate(X, POS + 3)[1])


def test_angles_are_float32_in_bfloat16():
    pos = POS + 4000
    y = RoPE().rotate(X.astype(jnp.bfloat16), pos)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), RoPE().rotate(X, pos), atol=0.04)


@pytest.mark.parametrize("sizes", [(2, 3), (1, 2, 3)])
def test_axial(sizes):
    axes = len(sizes)
    x = X[..., :12]
    where = grid_positions(*sizes)
    assert where.tolist() == [list(c) for c in np.ndindex(*sizes)]
    y = RoPE(axes=axes).rotate(x, where)
    width = 12 // axes
    for axis in range(axes):
        part = slice(axis * width, (axis + 1) * width)
        np.testing.assert_allclose(y[..., part], RoPE().rotate(x[..., part], where[:, axis]), atol=1e-6)


def test_axes_of_uneven_width():
    y = RoPE(axes=(4, 12)).rotate(X, grid_positions(2, 3))
    np.testing.assert_allclose(y[..., 4:], RoPE().rotate(X[..., 4:], grid_positions(2, 3)[:, 1]), atol=1e-6)


def test_scalings_keep_what_they_promise():
    pos = jnp.array([0])
    plain = np.asarray(10000.0 ** (-np.arange(0, 64, 2) / 64))
    ntk, _ = NTK(8.0).frequencies(10000.0, 64, pos)
    np.testing.assert_allclose([ntk[0], ntk[-1] * 8], [plain[0], plain[-1]], rtol=1e-9)
    for scaling in (Llama3(8.0, original_length=512), YaRN(8.0, original_length=512)):
        scaled, _ = scaling.frequencies(10000.0, 64, pos)
        np.testing.assert_allclose([scaled[0], scaled[-1] * 8], [plain[0], plain[-1]], rtol=1e-9)
        assert ((scaled <= plain + 1e-12) & (scaled >= plain / 8 - 1e-12)).all()
    assert YaRN(8.0, original_length=512).frequencies(1e4, 64, pos)[1] == pytest.approx(0.1 * math.log(8) + 1)


def test_dynamic_scaling_starts_past_the_original_length():
    rope = RoPE(scaling=DynamicNTK(2.0, original_length=6))
    np.testing.assert_allclose(rope.rotate(X, POS), RoPE().rotate(X, POS), atol=1e-5)
    longer = jnp.arange(6, 12)  # length 12: factor 2·12/6 - 1 = 3
    np.testing.assert_allclose(rope.rotate(X, longer), RoPE(scaling=NTK(3.0)).rotate(X, longer), atol=1e-5)


def test_ropes_are_static():
    assert jax.tree.leaves(RoPE(scaling=YaRN(2.0, 64))) == []
    assert hash(RoPE(scaling=Linear(2.0))) == hash(RoPE(scaling=Linear(2.0)))
    jax.jit(lambda rope, x: rope.rotate(x, POS))(RoPE(), X)


def test_sinusoids():
    table = np.asarray(sinusoidal_positions(5, 8))
    assert table.shape == (5, 8)
    assert table.dtype == np.float32
    for pos in range(5):
        for i in range(4):
            angle = pos / 10000 ** (2 * i / 8)
            assert table[pos, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[pos, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    halves = sinusoidal_positions(5, 8, interleave=False)
    np.testing.assert_array_equal(halves, np.concatenate([table[:, 0::2], table[:, 1::2]], axis=1))
    np.testing.assert_array_equal(sinusoidal_positions(jnp.array([[3], [1]]), 8)[:, 0], table[[3, 1]])


def test_alibi_slopes():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])
    np.testing.assert_allclose(alibi_slopes(6)[:4], alibi_slopes(4))
    np.testing.assert_allclose(alibi_slopes(6)[4:], alibi_slopes(8)[0:4:2])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RoPE().rotate(X[..., :15], POS), "head_dim=15"),
        (lambda: RoPE(fraction=0.3).rotate(X, POS), "fraction"),
        (lambda: RoPE(axes=3).rotate(X, grid_positions(1, 2, 3)), "multiple of 6"),
        (lambda: RoPE(axes=(4, 4)).rotate(X, grid_positions(2, 3)), "sum to the rotated width 16"),
        (lambda: RoPE().rotate(X, jnp.arange(5)), r"got \(5,\)"),
        (lambda: RoPE(axes=2).rotate(X, POS), "2 axes"),
        (lambda: RoPE(scaling=NTK(2.0)).rotate(X[..., :2], POS), "NTK"),
        (lambda: RoPE(theta=0.5), "theta"),
        (lambda: RoPE(fraction=0.0), "fraction"),
        (lambda: RoPE(axes=0), "axes"),
        (lambda: Linear(0.5), "factor"),
        (lambda: Llama3(low=4.0, high=4.0), "low"),
        (lambda: YaRN(2.0, 64, beta_fast=1.0), "beta_fast"),
        (lambda: sinusoidal_positions(4, 7), "even"),
        (lambda: alibi_slopes(0), "num_heads"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "parameters", "scaling"),
    [
        ("default", {}, None),
        ("linear", {"factor": 4.0}, Linear(4.0)),
        ("dynamic", {"factor": 4.0}, DynamicNTK(4.0, original_length=32)),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 32}, YaRN(4.0, original_length=32)),
        (
            "llama3",
            {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            Llama3(8.0, original_length=32),
        ),
    ],
)
def test_parity_with_transformers_llama(kind, parameters, scaling):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=32,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )
    x = np.random.default_rng(0).normal(size=(1, 80, 2, 32)).astype(np.float32)
    heads = torch.tensor(x).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(heads, torch.arange(80)[None])
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    ours = RoPE(scaling=scaling).rotate(jnp.asarray(x), jnp.arange(80))
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), atol=2e-5)
