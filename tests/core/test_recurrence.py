"""Chunked recurrences against the same token by token in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.recurrence import gated_delta_rule, gated_linear_attention, linear_recurrence, recurrence_step
from tests.core import recurrence_oracle as oracle

CHUNKED = [("none", "shared"), ("head", "none"), ("channel", "own")]
ALL = [(decay, erases) for decay in ("none", "head", "channel") for erases in ("none", "shared", "own")]
FORMS = [form if form in CHUNKED else pytest.param(*form, marks=pytest.mark.slow) for form in ALL]


def chunked(size):
    return lambda **x: linear_recurrence(**x, chunk_size=size, backend="xla")


def agrees(x, rng, size, bound=2e-6):
    weights = oracle.draw_weights(rng, x)
    wanted = oracle.exact(oracle.rank_one, x, weights)
    assert oracle.worst(oracle.values_and_gradients(chunked(size), x, weights), wanted) < bound


@pytest.mark.parametrize(("decay", "erases"), FORMS)
def test_values_states_and_all_gradients(decay, erases, rng):
    """40 tokens are no multiple of 16; the state comes in and goes out."""
    agrees(oracle.draw(rng, decay, erases), rng, 16)


@pytest.mark.parametrize("size", [1, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("decay", "erases"), CHUNKED)
def test_chunk_sizes(size, decay, erases, rng):
    agrees(oracle.draw(rng, decay, erases, length=20 if size == 1 else 70), rng, size)


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_strong_decay_neither_overflows_nor_loses_digits(decay, rng):
    """Decays down to e^-1000 per token: a quotient of exponentials would overflow within a chunk."""
    x = oracle.draw(rng, decay, "own", length=64, strength=100.0)
    x["log_decay"][:, ::7] = -1e-3
    agrees(x, rng, 64, 5e-6)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_decay_of_minus_infinity_forgets_everything(decay, rng):
    x = oracle.draw(rng, decay, length=12)
    x["log_decay"][:, 6] = -np.inf
    out, state = chunked(4)(**x)
    later = {name: u[:, 6:] if name != "state" else np.zeros_like(u) for name, u in x.items()}
    out_later, state_later = chunked(4)(**later)
    np.testing.assert_allclose(out[:, 6:], out_later, atol=1e-5)
    np.testing.assert_allclose(state, state_later, atol=1e-5)
    gradient = jax.grad(lambda w: linear_recurrence(**(x | {"log_decay": w}), chunk_size=4)[0].sum())(x["log_decay"])
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("decay", "erases"), CHUNKED)
def test_a_sequence_in_two_parts_is_the_whole(decay, erases, rng):
    x = oracle.draw(rng, decay, erases, length=14)
    out, state = chunked(4)(**x)
    first = {name: u if name == "state" else u[:, :9] for name, u in x.items()}
    second = {name: u if name == "state" else u[:, 9:] for name, u in x.items()}
    out1, middle = chunked(4)(**first)
    out2, last = chunked(4)(**(second | {"state": middle}))
    np.testing.assert_allclose(np.concatenate([out1, out2], 1), out, atol=2e-5)
    np.testing.assert_allclose(last, state, atol=2e-5)


@pytest.mark.parametrize(("decay", "erases"), CHUNKED)
def test_step_by_step_is_the_whole(decay, erases, rng):
    x = oracle.draw(rng, decay, erases, length=6)
    out, state = chunked(4)(**x)
    here = jnp.asarray(x.pop("state"))
    for t in range(6):
        step, here = recurrence_step(here, **{name: u[:, t] for name, u in x.items()})
        np.testing.assert_allclose(step, out[:, t], atol=2e-5)
    np.testing.assert_allclose(here, state, atol=2e-5)


@pytest.mark.parametrize("decay", ["none", "head", pytest.param("channel", marks=pytest.mark.slow)])
def test_gated_delta_rule_is_the_naive_one(decay, rng):
    x = oracle.draw(rng, decay, length=10)
    x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
    x["beta"] = rng.random(x["k"].shape[:-1], dtype=np.float32)
    weights = oracle.draw_weights(rng, x)
    got = oracle.values_and_gradients(lambda **x: gated_delta_rule(**x, chunk_size=4), x, weights)
    assert oracle.worst(got, oracle.exact(oracle.delta, x, weights)) < 2e-6


def test_swapping_keys_by_reflections_permutes_the_state():
    """Eigenvalue -1: a transposition per token; 300 of them still permute exactly."""
    rng, tokens = np.random.default_rng(1), 300
    pairs = np.stack([rng.choice(5, 2, replace=False) for _ in range(tokens)])
    unit = (np.eye(5)[pairs[:, 0]] - np.eye(5)[pairs[:, 1]]) / np.sqrt(2)
    order = np.arange(5)
    for i, j in pairs:
        order[[i, j]] = order[[j, i]]
    unit = jnp.asarray(unit, jnp.float32)[None, :, None]
    zero = jnp.zeros_like(unit)
    _, state = linear_recurrence(zero, zero, zero, a=-unit, b=2 * unit, state=jnp.eye(5)[None, None])
    np.testing.assert_allclose(state[0, 0], np.eye(5)[order], atol=1e-4)


def test_bfloat16_is_as_good_as_its_inputs(rng):
    x = oracle.draw(rng, "channel", "own", length=20)
    rounded = {name: jnp.asarray(u, jnp.float32 if name in ("state", "log_decay") else jnp.bfloat16) for name, u in x.items()}
    out, state = linear_recurrence(**rounded, chunk_size=16)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = oracle.exact(oracle.rank_one, jax.tree.map(np.float32, rounded), oracle.draw_weights(rng, x))[0]
    assert oracle.worst((out, state), wanted) < 2**-8


def test_any_number_of_leading_axes(rng):
    x = oracle.draw(rng, "head", "shared", batch=4, length=6)
    out, state = chunked(4)(**x)
    for lead in ((2, 2), ()):
        part = {name: u.reshape(*lead, *u.shape[1:]) if lead else u[0] for name, u in x.items()}
        out_part, state_part = chunked(4)(**part)
        assert out_part.shape == part["v"].shape and state_part.shape == part["state"].shape
        np.testing.assert_allclose(out_part.reshape(-1, *out.shape[1:]), out if lead else out[:1], atol=1e-5)
        np.testing.assert_allclose(state_part.reshape(-1, *state.shape[1:]), state if lead else state[:1], atol=1e-5)


def test_no_tokens_leave_the_state(rng):
    x = oracle.draw(rng, "head")
    x = {name: u if name == "state" else u[:, :0] for name, u in x.items()}
    out, state = gated_linear_attention(**x)
    assert out.shape == x["v"].shape
    np.testing.assert_array_equal(state, x["state"])


@pytest.mark.parametrize(("decay", "erases"), [("head", "none"), pytest.param("channel", "own", marks=pytest.mark.slow)])
def test_memory_is_linear_in_length(decay, erases, rng):
    """Of the compiled gradient: twice the tokens take at most twice the temporary memory, and far less than T×T."""
    x = oracle.draw(rng, decay, erases, length=1)

    def temporary(length):
        shapes = {name: jax.ShapeDtypeStruct(u.shape if name == "state" else (u.shape[0], length, *u.shape[2:]), u.dtype)
                  for name, u in x.items()}  # fmt: skip
        loss = jax.grad(lambda x: sum(u.sum() for u in linear_recurrence(**x, backend="xla")))
        return jax.jit(loss).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(4096)
    assert long < 2.05 * short
    assert long < 4096 * 4096 * 4 / 4


def test_what_does_not_fit_is_refused_by_name(rng):
    x = oracle.draw(rng, "head", "own")
    for change, message in [
        ({"k": x["k"][..., :3]}, "the same"),
        ({"log_decay": x["log_decay"][:, :3]}, "per head"),
        ({"a": x["a"][:, :3]}, "a .* must have the shape of q"),
        ({"a": None}, "give a"),
        ({"state": x["state"][..., :3]}, r"\[\*B, N, K, V\]"),
        ({"chunk_size": 48}, "power of two"),
        ({"backend": "triton"}, "unknown backend"),
        ({"backend": "tpu"}, "needs a TPU"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_recurrence(**(x | change))
    with pytest.raises(ValueError, match="beta"):
        gated_delta_rule(x["q"], x["k"], x["v"], x["log_decay"][:, :3])
