"""In-context regression by linear attention under a prefix and a causal mask (arXiv 2308.06912)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.attention import attention
from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.masks import Causal
from attnzoo.zoo.inspect.causallm_icl import (
    ICLCausalMask,
    ICLPrefixMask,
    PrefixLMMask,
    causal_icl_recursion,
    causal_stationary,
    gradient_descent_layer,
    icl_gap,
    icl_tokens,
    lsa_gd_weights,
    prefix_icl_recursion,
    prefix_stationary,
    rbf_key_bias,
)

WIDTH, EXAMPLES, QUERIES, LAYERS = 4, 12, 5, 6
MASKS = {"prefix": ICLPrefixMask, "causal": ICLCausalMask}
RECURSIONS = {"prefix": prefix_icl_recursion, "causal": causal_icl_recursion}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def problem(rng, n=EXAMPLES, d=WIDTH, noise=0.1):
    x, queries, w = rng.uniform(-1, 1, (n, d)), rng.uniform(-1, 1, (QUERIES, d)), rng.normal(size=d)
    return x, x @ w + noise * rng.normal(size=n), queries, w


def written_out(kind, x, y, steps, eta):
    """The sums of the paper, term by term in float64: w_1, ..., w_n after each step."""
    n, w, out = len(x), np.zeros_like(x), []
    for _ in range(steps):
        w = np.stack([
            w[j] + eta / n * sum((y[i] - w[i] @ x[i]) * x[i] for i in range(n) if kind == "prefix" or i <= j)
            for j in range(n)
        ])  # fmt: skip
        out.append(w)
    return np.stack(out)


# --- layers, recursions and the written sums -------------------------------------------------------------


@pytest.mark.parametrize("kind", MASKS)
def test_layers_are_steps_of_gradient_descent(rng, kind):
    x, y, queries, _ = problem(rng)
    eta = 0.8
    expected = written_out(kind, x, y, LAYERS, eta)
    z = jnp.asarray(icl_tokens(x, y, queries), jnp.float32)[None]
    layer, mask = gradient_descent_layer(WIDTH, EXAMPLES, eta), MASKS[kind](EXAMPLES)
    run = jax.jit(lambda z: z + layer(z, mask=mask))
    for w in expected:
        z = run(z)
        np.testing.assert_allclose(z[0, :, :WIDTH], np.concatenate([x, queries]), atol=1e-6)
        np.testing.assert_allclose(z[0, :EXAMPLES, -1], y - (w * x).sum(-1), atol=1e-6)
        np.testing.assert_allclose(-z[0, EXAMPLES:, -1], queries @ w[-1], atol=1e-6)


@pytest.mark.parametrize("kind", MASKS)
def test_recursions_are_the_written_sums(rng, kind, x64):
    """In float64; as are layers that are computed there from `lsa_gd_weights`, without the engine."""
    x, y, queries, _ = problem(rng)
    expected = written_out(kind, x, y, LAYERS, 0.8)
    made = RECURSIONS[kind](jnp.asarray(x), jnp.asarray(y), LAYERS, 0.8)
    assert made.dtype == np.float64
    np.testing.assert_allclose(made, expected[:, 0] if kind == "prefix" else expected, atol=1e-12)
    z = np.asarray(icl_tokens(x, y, queries))
    weights = [np.asarray(w) for w in lsa_gd_weights(WIDTH, EXAMPLES, 0.8)]
    visible = np.asarray(MASKS[kind](EXAMPLES).dense(EXAMPLES + QUERIES))[0, 0]
    for w in expected:
        q, k, v = (z @ weight for weight in weights[:3])
        z = z + ((q @ k.T) * visible) @ v @ weights[3]
        np.testing.assert_allclose(-z[EXAMPLES:, -1], queries @ w[-1], atol=1e-12)


# --- where they lead -------------------------------------------------------------------------------------


def test_causal_layers_lead_to_one_pass_of_online_learning(rng, x64):
    x, y, _, _ = problem(rng)
    made = causal_stationary(jnp.asarray(x), jnp.asarray(y))
    a = np.linalg.solve(np.tril(x @ x.T), y)  # T a = y
    np.testing.assert_allclose(made, np.cumsum(a[:, None] * x, 0), atol=1e-9)
    eta = EXAMPLES / (x**2).sum(-1).max()
    w = causal_icl_recursion(jnp.asarray(x), jnp.asarray(y), 8000, eta)[-1]
    np.testing.assert_allclose(w, made, atol=1e-5)


def test_prefix_layers_lead_to_least_squares(rng, x64):
    for n in (EXAMPLES, 3):  # more examples than dimensions, and fewer
        x, y, _, _ = problem(rng, n)
        expected = np.linalg.lstsq(x, y, rcond=None)[0]
        np.testing.assert_allclose(prefix_stationary(jnp.asarray(x), jnp.asarray(y)), expected, atol=1e-9)
        eta = n / np.linalg.eigvalsh(x.T @ x).max()
        w = prefix_icl_recursion(jnp.asarray(x), jnp.asarray(y), 40_000, eta)[-1]
        np.testing.assert_allclose(w, expected, atol=1e-6)


def test_order_of_examples(rng, x64):
    x, y, _, _ = problem(rng)
    order = rng.permutation(EXAMPLES)
    for f in (prefix_stationary, lambda x, y: prefix_icl_recursion(x, y, LAYERS)):
        np.testing.assert_allclose(f(x[order], y[order]), f(jnp.asarray(x), jnp.asarray(y)), atol=1e-9)
    last, moved = (causal_stationary(jnp.asarray(a), jnp.asarray(b))[-1] for a, b in ((x, y), (x[order], y[order])))
    assert abs(last - moved).max() > 1e-2


def test_without_noise_only_prefix_is_exact(rng, x64):
    for n in (WIDTH, WIDTH + 2):
        x, y, queries, w = (jnp.asarray(a) for a in problem(rng, n, noise=0))
        gap = icl_gap(x, y, queries, queries @ w)
        assert gap.prefix < 1e-16
        assert gap.causal > 1e-3
    x, y, queries, w = (jnp.asarray(a) for a in problem(rng))
    gap = icl_gap(x, y, queries, queries @ w, steps=LAYERS, eta=0.5)
    for kind, by_layer in (("prefix", gap.prefix_by_layer), ("causal", gap.causal_by_layer)):
        errors = queries @ (written_out(kind, x, y, LAYERS, 0.5)[:, -1].T) - (queries @ w)[:, None]
        np.testing.assert_allclose(by_layer, (errors**2).mean(0), rtol=1e-9)
    assert gap.ratio == gap.causal / gap.prefix
    assert dataclasses.replace(gap, prefix=0.0).ratio == np.inf


def test_plot(rng):
    import matplotlib.pyplot as plt

    x, y, queries, w = (jnp.asarray(a, jnp.float32) for a in problem(rng))
    figure, axes = plt.subplots()
    icl_gap(x, y, queries, queries @ w, steps=9).plot(axes)
    assert [line.get_label() for line in axes.lines if len(line.get_xdata()) == 9] == ["prefix", "causal"]
    plt.close(figure)


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(4, 4), (5, 3), (16, 8)])
def test_masks_and_tiles(tile):
    bq, bk = tile
    t, n = 17, 11
    q, k = np.arange(t)[:, None], np.arange(t)[None, :]
    prefixes = np.array([0, 5, 17])
    cases = [
        (PrefixLMMask(jnp.asarray(prefixes)), (k < prefixes[:, None, None]) | (k <= q)),
        (ICLPrefixMask(n), np.broadcast_to(k < n, (1, t, t))),
        (ICLCausalMask(n), ((k < n) & (k <= q))[None]),
    ]
    for mask, visible in cases:
        np.testing.assert_array_equal(
            np.broadcast_to(mask.dense(t, batch=3)[:, 0], (3, t, t)), np.broadcast_to(visible, (3, t, t))
        )
        made = mask.block_map(t, batch=3, block_q=bq, block_k=bk)
        assert made.how == "exact (runs)"
        for b, _, i, j in np.ndindex(made.state.shape):
            cells = visible[b, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            assert made.state[b, 0, i, j] == (FULL if cells.all() else PARTIAL if cells.any() else EMPTY)
    np.testing.assert_array_equal(PrefixLMMask(0).dense(t), Causal().dense(t))
    assert PrefixLMMask(t).dense(t).all()
    for make in MASKS.values():
        assert make(1).dense(t).any(-1).all()


def test_tiles_of_a_prefix_follow_the_rule():
    """For rows [q0, q1) and columns [k0, k1): full where the columns end in the prefix or before q0."""
    made = PrefixLMMask(10).block_map(24, block_q=4, block_k=3)
    for i, j in np.ndindex(made.state.shape[2:]):
        q0, q1, k0, k1 = 4 * i, 4 * i + 4, 3 * j, 3 * j + 3
        rule = FULL if k1 <= 10 or k1 - 1 <= q0 else EMPTY if k0 >= 10 and k0 > q1 - 1 else PARTIAL
        assert made.state[0, 0, i, j] == rule


# --- the softmax variant, bad input ----------------------------------------------------------------------


def test_rbf_logits(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 7, n, 4)), jnp.float32) for n in (4, 2, 2))
    out = attention(q, k, v, bias=rbf_key_bias(k, 4))
    keys, values = (jnp.repeat(x, 2, 2) for x in (k, v))
    logits = -0.5 * ((q[:, :, None] / 2 - keys[:, None]) ** 2).sum(-1)  # q' = q / sqrt(H)
    np.testing.assert_allclose(out, jnp.einsum("btsn,bsnh->btnh", jax.nn.softmax(logits, 2), values), atol=1e-6)


def test_bad_input(rng):
    x, y, queries, _ = problem(rng)
    with pytest.raises(ValueError, match=r"\[..., n, d\].*\(12, 4\), \(11,\), \(5, 4\)"):
        icl_tokens(x, y[1:], queries)
    with pytest.raises(ValueError, match=r"\(5, 3\)"):
        icl_tokens(x, y, queries[:, 1:])
    with pytest.raises(ValueError, match=r"targets: queries \(5, 4\) need \(5,\), got \(4,\)"):
        icl_gap(x, y, queries, np.zeros(4))
    for f in (lambda x, y: prefix_icl_recursion(x, y, 2), lambda x, y: causal_icl_recursion(x, y, 2), prefix_stationary,
              causal_stationary):  # fmt: skip
        with pytest.raises(ValueError, match=r"n at least 1, got \(12, 4\), \(11,\)"):
            f(x, y[1:])
        with pytest.raises(ValueError, match=r"n at least 1, got \(0, 4\), \(0,\)"):
            f(x[:0], y[:0])
        # Integers and mixed precisions are taken as floats.
        whole = f(np.arange(12).reshape(3, 4), np.arange(3))
        assert whole.dtype == jnp.float32
        np.testing.assert_allclose(f(jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4), np.arange(3.0)), whole, rtol=1e-5)
    with pytest.raises(ValueError, match="d, n: must be at least 1, got 4 and 0"):
        lsa_gd_weights(4, 0)
    with pytest.raises(ValueError, match="num_heads: must be a multiple of the 2 heads"):
        rbf_key_bias(jnp.zeros((2, 7, 2, 4)), 3)
