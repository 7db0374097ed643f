"""Merging partial attentions is exact for every partition, and quiet about empty parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.merge import merge_all, merge_lse
from attnzoo.testing import oracle_attention

B, T, S, N, H = 2, 3, 12, 4, 5


def parts(rng, visibles):
    """(out, lse) of attention over each visible set of the same keys, and (out, lse) over their union."""
    q, k, v = (rng.normal(size=(B, n, N, H)) for n in (T, S, S))
    logits = np.einsum("btnh,bsnh->btns", q, k) * H**-0.5

    def one(visible):
        out, _ = oracle_attention(q, k, v, visible[None, None, None, :])
        with np.errstate(divide="ignore"):
            lse = np.log(np.sum(np.exp(logits) * visible, axis=-1))
        return jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32)

    return [one(x) for x in visibles], one(np.any(visibles, axis=0))


def random_partition(rng, count):
    return np.arange(count)[:, None] == rng.integers(count, size=S)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_partition_equals_the_union(rng, count):
    pieces, (out, lse) = parts(rng, random_partition(rng, count))
    got, got_lse = merge_all(jnp.stack([o for o, _ in pieces]), jnp.stack([l for _, l in pieces]))
    np.testing.assert_allclose(got, out, atol=2e-6)
    np.testing.assert_allclose(got_lse, lse, atol=2e-6)


def test_pairwise_is_symmetric_and_associative(rng):
    (a, b, c), _ = parts(rng, random_partition(rng, 3))
    left = merge_lse(*merge_lse(*a, *b), *c)
    right = merge_lse(*a, *merge_lse(*c, *b))
    for x, y in zip(left, right, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_an_empty_part_leaves_the_other_alone(rng):
    (full, empty), _ = parts(rng, [np.ones(S, bool), np.zeros(S, bool)])
    assert np.isneginf(empty[1]).all()
    for merged in (merge_lse(*full, *empty), merge_lse(*empty, *full)):
        np.testing.assert_allclose(merged[0], full[0], atol=1e-7)
        np.testing.assert_allclose(merged[1], full[1], atol=1e-7)
    out, lse = merge_lse(*empty, *empty)
    assert (out == 0).all()
    assert np.isneginf(lse).all()


def test_gradients_equal_those_of_the_union_and_are_finite_when_empty(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(n, H)), jnp.float32) for n in (T, S, S))

    def partial(q, k, v):
        s = q @ k.T
        lse = jax.nn.logsumexp(s, axis=-1)
        return (jnp.exp(s - lse[:, None]) @ v)[:, None], lse[:, None]

    def halves(q, k, v):
        out, lse = merge_lse(*partial(q, k[:5], v[:5]), *partial(q, k[5:], v[5:]))
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    def whole(q, k, v):
        out, lse = partial(q, k, v)
        return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

    gradients = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (halves, whole))
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    empty = jax.grad(lambda o, l: merge_lse(o, l, o, l)[0].sum(), (0, 1))(jnp.zeros((T, 1, H)), jnp.full((T, 1), -jnp.inf))
    assert all(np.isfinite(g).all() for g in empty)


def test_far_apart_lses_and_low_precision():
    o = jnp.stack([jnp.full((1, 1, 2), 1.0), jnp.full((1, 1, 2), 2.0)]).astype(jnp.bfloat16)
    out, lse = merge_all(o, jnp.asarray([[[1e4]], [[-1e4]]]))
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    assert (out == 1).all()
    assert lse == 1e4


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="lses"):
        merge_lse(jnp.zeros((T, N, H)), jnp.zeros((N, T)), jnp.zeros((T, N, H)), jnp.zeros((N, T)))
