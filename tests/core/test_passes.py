"""Thresholded weights (entmax) by passes over tiles against whole rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks, passes, scores
from attnzoo.core.attention import attention, explain
from attnzoo.core.cells import Geometry
from attnzoo.core.entmax import Entmax

ALPHAS = np.float32([0.7, 1.05, 1.2, 1.5, 2.0, 3.0])
SMALL = {"block_sizes": (16, 16)}


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [2 * jax.random.normal(k, (2, 50, n, 8)) for k, n in zip(keys, (6, 3, 3), strict=True)]


def outcome(qkv, alpha, bias, **options):
    """Outputs and the gradients of everything they depend on."""

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(qkv, alpha, bias):
        lengths = masks.Lengths(jnp.array([50, 0]), jnp.array([50, 44]))
        out = attention(*qkv, mask=masks.Causal() & lengths, score=scores.Bias(bias), weights=Entmax(alpha), **options)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    return run(qkv, alpha, bias)


@pytest.mark.parametrize("alpha", [ALPHAS, np.float32([1.5] * 6), np.float32([2.0] * 6)])
def test_equals_whole_rows(qkv, alpha):
    bias = jax.random.normal(jax.random.key(1), (1, 6, 1, 50))
    got = outcome(qkv, alpha, bias, backend="blockwise", **SMALL)
    expected = outcome(qkv, alpha, bias, backend="dense")
    names = ["loss", "out", "q", "k", "v", "alpha", "bias"]
    for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 if name in ("loss", "alpha") else 3e-5, err_msg=name)


def test_softmax_is_a_limit_not_an_edge(qkv):
    ones, bias = jnp.ones(6), jnp.zeros((1, 1, 1, 50))
    got = outcome(qkv, ones, bias, backend="blockwise", **SMALL)
    expected = outcome(qkv, ones, bias, backend="dense")
    names = ["loss", "out", "q", "k", "v", "alpha", "bias"]
    for name, a, b in zip(names, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=0.05 if name == "alpha" else 2e-3, err_msg=name)


def test_the_derivative_of_a_map_over_calls(qkv):
    """What the equation of a threshold captures is mapped too, whole numbers in a mask among it."""
    x, lengths = qkv[1], jnp.array([30, 0])

    def loss(x, alpha, backend, **options):
        def one(x, length):
            return attention(x, x, x, mask=masks.Lengths(length[None]), weights=Entmax(alpha), backend=backend, **options)

        out = jax.vmap(one)(x[:, None], lengths)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

    alpha = jnp.float32([1.2, 1.5, 2.0])
    got = jax.grad(functools.partial(loss, backend="blockwise", **SMALL), (0, 1))(x, alpha)
    want = jax.grad(functools.partial(loss, backend="dense"), (0, 1))(x, alpha)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_weights_stay_exactly_zero(qkv):
    """Values that only hidden or weightless keys carry must not show."""
    q, k, v = qkv
    _, w = attention(q, k, v, weights=Entmax(2.0), return_weights=True)
    idle = np.asarray(w).reshape(2, 3, 2, 50, 50).max((2, 3)) == 0
    assert idle.any()
    loud = jnp.where(idle.swapaxes(1, 2)[..., None], 1e30, v)
    quiet, shouted = (attention(q, k, x, weights=Entmax(2.0), backend="blockwise", **SMALL) for x in (v, loud))
    np.testing.assert_array_equal(quiet, shouted)


def test_memory_is_linear():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        f = jax.grad(lambda q: attention(q, q, q, mask=masks.Causal(), weights=Entmax(1.5), backend="blockwise").sum())
        return jax.jit(f).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.2 * temporaries(2048)


def test_chosen_where_rows_are_long():
    x = jax.ShapeDtypeStruct((1, 1024, 2, 16), jnp.float32)
    assert explain(x, x, x, weights=Entmax(1.5)).backend == "blockwise"
    assert explain(x, x, x, weights=Entmax(1.5), return_weights=True).backend == "dense"


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.1, 1.5, 2.0])
def test_a_search_takes_few_passes(alpha):
    """Rows of 1000 logits, from flat to peaked; every trial of a threshold is a pass."""
    s = jax.random.normal(jax.random.key(2), (1, 1, 64, 1000)) * jnp.geomspace(0.1, 30, 64)[:, None]
    g, slack = Geometry(1, 1, 1, 64, 1000), 0.01
    weights = Entmax(alpha)
    r = weights.reference(s.max(-1, keepdims=True) + slack / 2, slack, g)
    tried = []

    def total(u):
        tried.append(u)
        bound = weights.at(r, u).score(g).bind(g)
        return bound.apply(s, None, *(op.x for op in bound.operands)).sum(-1, keepdims=True)

    with jax.disable_jit():
        u = passes.search(total, *(jnp.broadcast_to(x, r.shape) for x in weights.bracket(slack, g)))
    assert len(tried) <= 10
    np.testing.assert_allclose(total(u), 1, atol=1e-5)


def test_low_precision_ends_as_near_as_it_can_tell():
    """Sums rounded as bfloat16 rounds them never come within the tolerance of float32."""
    x = jax.random.normal(jax.random.key(2), (1, 1, 64, 100))
    tried = []

    def total(u):
        tried.append(u)
        return jnp.exp(x + u).sum(-1, keepdims=True).astype(jnp.bfloat16).astype(jnp.float32)

    with jax.disable_jit():
        u = passes.search(total, jnp.full((1, 1, 64, 1), -20.0), jnp.zeros((1, 1, 64, 1)), float(jnp.finfo(jnp.bfloat16).eps))
    assert len(tried) <= 6
    np.testing.assert_allclose(total(u), 1, atol=0.02)
