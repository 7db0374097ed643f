"""Attention over listed keys in plain JAX: against float64, and against the dense backend under the same mask."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.attention import attention
from attnzoo.core.gathered import gathered_attention, kept_positions
from attnzoo.core.merge import merge_lse
from tests.core.listed import Case
from tests.core.oracle import oracle

CASES = {
    "a list for every query head": Case(),
    "lists that the query heads of a key head share": Case(lists=(2, 3, 9)),
    "a short last block": Case((2, 11, 20, 4, 2, 8, 6), (4, 3, 9), block_q=4),
    "one query": Case((3, 1, 20, 4, 1, 8, 8), (1, 1, 15)),
    "up to the query's own position": Case(causal=True),
    "shared lists, up to the query's own position": Case((2, 11, 20, 4, 2, 8, 6), (2, 3, 9), block_q=4, causal=True),
    "longer lists than keys": Case((1, 4, 5, 2, 2, 8, 8), (2, 2, 12)),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    case = CASES[name]
    out, lse = gathered_attention(*case.arrays(), **case.arguments(), return_lse=True)
    want, want_lse, _ = oracle(*case.arrays(), ok=case.cells())
    np.testing.assert_allclose(out, want, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(jnp.moveaxis(lse, 2, 1), want_lse, atol=2e-6, rtol=1e-5)
    blind = ~case.cells().any(-1)
    assert blind.any()
    assert (np.moveaxis(np.asarray(out), 2, 1)[blind] == 0).all()
    assert np.isneginf(np.moveaxis(np.asarray(lse), 2, 1)[blind]).all()


def loss_of(attend, q, k, v, scale):
    out, lse = attend(q, k, v, scale=scale, return_lse=True)
    weighed = (out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()
    return weighed + (jnp.where(jnp.isfinite(lse), lse, 0) * 0.3).sum()


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_dense_backend(name):
    case = CASES[name]
    arrays = [*map(jnp.asarray, case.arrays()), jnp.float32(0.4)]
    listed = functools.partial(gathered_attention, **case.arguments())
    dense = functools.partial(attention, mask=jnp.asarray(case.cells()), backend="dense")
    gradients = (jax.jit(jax.grad(functools.partial(loss_of, attend), range(4)))(*arrays) for attend in (listed, dense))
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_within_its_rounding_of_float64():
    case = CASES["a short last block"]
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in case.arrays())
    out, lse = gathered_attention(q, k, v, **case.arguments(), return_lse=True)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    want, want_lse, _ = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), ok=case.cells())
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=0.02)
    np.testing.assert_allclose(jnp.moveaxis(lse, 2, 1), want_lse, atol=0.02)


def test_any_leading_axes():
    case = Case((6, 12, 20, 4, 2, 8, 6))
    arrays, arguments = case.arrays(), case.arguments()
    flat = gathered_attention(*arrays, **arguments)
    arguments["positions"] = arguments["positions"].reshape(2, 3, *arguments["positions"].shape[1:])
    deep = gathered_attention(*(x.reshape(2, 3, *x.shape[1:]) for x in arrays), **arguments)
    np.testing.assert_array_equal(deep.reshape(flat.shape), flat)


def test_merges_with_a_dense_part():
    case = Case()
    listed = case.cells() & (np.arange(20) >= 6)
    positions = np.where(case.positions() >= 6, case.positions(), -1)
    near = np.broadcast_to(np.arange(20) < 6, listed.shape)
    dense = attention(*case.arrays(), mask=jnp.asarray(near), return_lse=True)
    out, lse = merge_lse(*dense, *gathered_attention(*case.arrays(), positions, return_lse=True))
    want, want_lse, _ = oracle(*case.arrays(), ok=listed | near)
    np.testing.assert_allclose(out, want, atol=2e-6, rtol=1e-5)
    np.testing.assert_allclose(jnp.moveaxis(lse, 2, 1), want_lse, atol=2e-6, rtol=1e-5)


def test_a_place_that_stands_twice_counts_twice():
    q, k, v = Case((1, 2, 3, 1, 1, 4, 4)).arrays()
    got = gathered_attention(q, k, v, np.array([[[[0, 2, 2]]]]))
    twice = [0, 2, 2]
    np.testing.assert_allclose(got, oracle(q, k[:, twice], v[:, twice])[0], atol=1e-6)


def test_what_no_list_names_is_not_read():
    """Unwritten slots of a cache may hold anything."""
    q, k, v = Case((1, 2, 4, 1, 1, 4, 4)).arrays()
    k[:, 0], v[:, 0] = np.nan, np.inf
    positions = np.array([[[[-1, 2, 1]]]])

    def run(q, k, v):
        return gathered_attention(q, k, v, positions)

    out, pull = jax.vjp(run, *map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(out, oracle(q, k[:, 1:3], v[:, 1:3])[0], atol=1e-6)
    assert all(np.isfinite(d).all() for d in pull(out))


def test_memory_is_that_of_one_block():
    """32 blocks gather four times what k and v hold; neither pass holds it at once."""
    b, t, s, heads, h, listed = 1, 1024, 2048, 4, 64, 256
    blocks = 32
    of = jax.ShapeDtypeStruct
    arrays = [of((b, t, heads, h), "float32"), *[of((b, s, heads, h), "float32")] * 2, of((b, heads, blocks, listed), "int32")]

    def loss(q, k, v, positions):
        return gathered_attention(q, k, v, positions).sum()

    gathered = 2 * blocks * heads * listed * h * 4
    memory = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile().memory_analysis()
    held = 4 * (4 * s + 6 * t) * heads * h  # k, v and their gradients; q, out and theirs
    assert memory.temp_size_in_bytes < held + gathered / 8


def test_kept_positions():
    hit = np.random.default_rng(0).random((2, 3, 4, 30)) < 0.2
    hit[0, 0, 0] = False
    most = int(np.sort(hit.sum(-1).ravel())[-3])
    positions, overflow = jax.jit(kept_positions, static_argnums=1)(jnp.asarray(hit), most)
    assert (positions.shape, positions.dtype) == ((2, 3, 4, most), jnp.int32)
    for at in np.ndindex(hit.shape[:-1]):
        want = np.flatnonzero(hit[at])
        assert bool(overflow[at]) == (len(want) > most)
        want = want[:most]
        np.testing.assert_array_equal(positions[at], np.pad(want, (0, most - len(want)), constant_values=-1))
    assert overflow.any() and not overflow.all()


X = np.zeros((2, 12, 4, 8), np.float32)
P = np.zeros((2, 4, 3, 5), np.int32)
ERRORS = {
    "positions has dtype float32": (TypeError, {"positions": P.astype(np.float32)}),
    r"shape \(2, 3, 3, 5\), but with q \(2, 12, 4, 8\) and k \(2, 12, 2, 8\) it needs \(2, 4, 'Tq', 'M'\) or \(2, 2": (
        ValueError, {"positions": P[:, :3]},
    ),
    r"positions has shape \(1, 4, 3, 5\)": (ValueError, {"positions": P[:1]}),
    r"positions has shape \(2, 4, 3, 0\)": (ValueError, {"positions": P[..., :0]}),
    "5 blocks, which do not divide the 12 queries; give block_q": (ValueError, {"positions": np.zeros((2, 4, 5, 5), np.int32)}),
    r"block_q=5: 12 queries .* make 3 blocks, but positions \(2, 4, 4, 5\) has lists for 4": (
        ValueError, {"positions": np.zeros((2, 4, 4, 5), np.int32), "block_q": 5},
    ),
    r"places 0 to 11 \(-1: none\), got 12": (ValueError, {"positions": P + 12}),
    "q_positions has shape": (ValueError, {"q_positions": np.zeros((2, 5), np.int32)}),
    "unknown backend 'triton'": (ValueError, {"backend": "triton"}),
    "'pallas' cannot run this: it needs a TPU.*; 'blockwise' can": (ValueError, {"backend": "pallas"}),
    "must have the same width": (ValueError, {"q": X[..., :4]}),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message):
    kind, changed = ERRORS[message]
    arguments = {"q": X, "k": X[:, :, :2], "v": X[:, :, :2], "positions": P} | changed
    with pytest.raises(kind, match=message):
        gathered_attention(**arguments)


def test_places_beyond_the_keys_count_as_none_where_they_are_not_known():
    q, k, v = Case((1, 2, 3, 1, 1, 4, 4)).arrays()
    got = jax.jit(gathered_attention)(q, k, v, jnp.asarray([[[[0, 2, 3, -5]]]]))
    np.testing.assert_allclose(got, oracle(q, k[:, [0, 2]], v[:, [0, 2]])[0], atol=1e-6)
