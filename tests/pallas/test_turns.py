"""Calls whose lists of tiles do not fit into scalar memory: cut into turns, with the results of one call."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks, weights
from attnzoo.core.attention import attention, explain
from attnzoo.core.backends import pallas
from attnzoo.core.backends.fused import tpu
from attnzoo.core.backends.turns import Turn, turns
from attnzoo.core.cells import Geometry
from attnzoo.core.request import make_request
from pallas_kernels.tpu import choice, jobs
from pallas_kernels.tpu.launch import compiling_for, simulation

RNG = np.random.default_rng(4)
T = 330
CHOSEN = jnp.asarray(RNG.random((2, 4, 3, 3)) > 0.3)
ROWS_OF_BLOCKS = jnp.asarray(RNG.random((1, 1, 2, 3)) > 0.2)
LENGTHS = np.asarray([100, 330])
BY_DISTANCE, BY_QUERY = (jnp.asarray(RNG.normal(size=(4, n)), jnp.float32) for n in (2 * T, T))


def scored(x):
    return lambda s, b, h, q, k: s + x[h, q - k + T]


# name -> (arguments made of one array, that array, words that there are room for, turns it takes)
CASES = {
    "lists of their own for batch rows and heads": (lambda x: {"mask": masks.Blocks(x, 128, 128)}, CHOSEN, 40, 2),
    "a key head at a time": (lambda x: {"mask": masks.Blocks(x, 128, 128) & masks.Causal()}, CHOSEN, 20, 4),
    "batch rows": (lambda x: {"mask": masks.Lengths(LENGTHS)}, None, 9, 2),
    "rows of tiles, by distance": (lambda x: {"mask": masks.Causal(), "score": scored(x)}, BY_DISTANCE, 3, 2),
    "rows of tiles, by query, dropout": (
        lambda x: {
            "mask": masks.Causal(), "score": lambda s, b, h, q, k: s * x[h, q],
            "dropout_rate": 0.3, "dropout_rng": jax.random.key(0),
        },
        BY_QUERY, 3, 2,
    ),
    "rows of tiles, by query": (
        lambda x: {"mask": masks.Causal(), "score": lambda s, b, h, q, k: s * x[h, q]}, BY_QUERY, 3, 2
    ),
    "blocks of several tiles": (lambda x: {"mask": masks.Blocks(x, 256, 128)}, ROWS_OF_BLOCKS, 5, 3),
    "everything": (lambda x: {"mask": masks.Blocks(x, 128, 128), "score": scored(BY_DISTANCE)}, CHOSEN, 12, 8),
}  # fmt: skip


def both_passes(backend, arguments, x, dtype=jnp.float32, batch=1, rounded=False):
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.normal(size=(batch, T, n, 16)), dtype) for n in (4, 2, 2))
    if rounded:
        q, k, v = (x.astype(jnp.bfloat16).astype(dtype) for x in (q, k, v))
    moving = x is not None and jnp.issubdtype(x.dtype, jnp.floating)

    def loss(q, k, v, x):
        sizes = {"block_sizes": (128, 128)} if backend == "pallas" else {}
        out = attention(q, k, v, backend=backend, **arguments(x), **sizes).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3) if moving else (0, 1, 2), has_aux=True))(q, k, v, x)
    return [out, *gradients]


@pytest.fixture
def room(monkeypatch):
    """Sets for how many words there is room; returns the turns that calls then take."""
    taken = []

    def one(*arguments):
        found = turns(*arguments)
        taken.append(found)
        return found

    def set_to(words):
        monkeypatch.setattr(jobs, "MOST_BYTES", 4 * words)
        monkeypatch.setattr(tpu, "turns", one)
        return taken

    return set_to


def check(name, room):
    arguments, x, words, count = CASES[name]
    batch = 2 if x is CHOSEN or name == "batch rows" else 1
    with simulation():
        taken = room(words)
        got = both_passes("pallas", arguments, x, batch=batch)
    assert {len(order) for order in taken} == {count}
    for a, b in zip(got, both_passes("dense", arguments, x, batch=batch), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


QUICK = ("lists of their own for batch rows and heads", "rows of tiles, by query")


@pytest.mark.parametrize("name", QUICK)
def test_the_same_in_turns(name, room):
    check(name, room)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_more_turns(name, room):
    check(name, room)


@pytest.mark.slow
def test_gradients_of_bfloat16_in_turns(room):
    """Keys that two turns share have gradients about as near to the exact ones as those of one call are."""
    arguments = lambda _: {"mask": masks.Causal()}  # noqa: E731
    with simulation():
        whole = both_passes("pallas", arguments, None, jnp.bfloat16)
        taken = room(3)
        got = both_passes("pallas", arguments, None, jnp.bfloat16)
    assert len(taken[-1]) == 2

    def worst(x, exact):
        return np.abs(np.asarray(x, np.float32) - exact).max()

    # The inputs round alike, so that the rest is the rounding of products and results.
    for a, b, exact in zip(got, whole, both_passes("dense", arguments, None, rounded=True), strict=True):
        assert worst(a, exact) < 1.5 * worst(b, exact) < 0.1


@pytest.mark.slow
def test_stairs_in_turns(room, monkeypatch):
    """What begins further down begins further down the diagonal too."""
    monkeypatch.setattr(choice, "STAIRS", dict.fromkeys(choice.STAIRS, (64, 64)))
    arguments = lambda _: {"mask": masks.Causal()}  # noqa: E731
    with simulation():
        room(3)
        got = both_passes("pallas", arguments, None)
    for a, b in zip(got, both_passes("dense", arguments, None), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_pages_in_turns(room):
    """Two rows decode, each with a list of its own."""
    rng = np.random.default_rng(6)
    q = jnp.asarray(rng.normal(size=(2, 1, 4, 16)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(5, 128, 2, 16)), jnp.float32) for _ in range(2))
    table = jnp.asarray([[4, 0], [2, 3]])
    seen = jnp.asarray([[70], [200]])

    def decoded(backend):
        where = {"q_positions": seen - 1, "kv_positions": jnp.where(jnp.arange(256) < seen, jnp.arange(256), -1)}
        return attention(q, k, v, mask=masks.Causal(), pages=table, backend=backend, **where)

    with simulation():
        taken = room(3)
        got = decoded("pallas")
    assert len(taken[-1]) == 2
    np.testing.assert_allclose(got, decoded("dense"), atol=2e-6)


def test_gradients_of_a_part_in_turns(room):
    """As a ring asks for them: of all arrays, from statistics that it has."""
    q, k, v, d = (jnp.asarray(np.random.default_rng(7).normal(size=(1, 256, n, 16)), jnp.float32) for n in (2, 1, 1, 2))
    x = jnp.asarray(np.random.default_rng(8).normal(size=256), jnp.float32)
    score = lambda s, b, h, t, u: s * x[t] + x[u]  # noqa: E731
    r, _ = make_request(
        q, k, v, mask=masks.Causal(), bias=None, score=score, weights=weights.softmax, scale=None, dropout_rate=0.0,
        dropout_rng=None, q_positions=None, kv_positions=None, block_sizes=(128, 128), return_lse=True, return_weights=False,
    )  # fmt: skip
    with simulation():
        part = pallas.whole(r, pallas.map_of(r))
        part = part._replace(geometry=dataclasses.replace(part.geometry, origin=jnp.zeros(4, jnp.int32)))
        out, lse = pallas.attend_part(part)
        rest = lse, jnp.moveaxis(d, 2, 1), (jnp.moveaxis(d, 2, 1) * out).sum(-1)
        want = pallas.part_gradients(part, *rest)
        taken = room(2)
        got = pallas.part_gradients(part, *rest)
    assert len(taken[-1]) == 2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


def test_every_row_of_tiles_has_one_turn_and_lists_fit():
    """Over many shapes, known lists and unknown ones."""
    for batch, kv_heads, group, rows, columns, room in itertools.product((1, 3), (1, 2), (1, 2), (1, 5), (4, 9), (20, 45, 200)):
        for lead in itertools.product({1, batch}, {1, kv_heads * group}):
            known = RNG.integers(1, columns + 1, (*lead, rows))
            for tiles in (None, known):
                g = Geometry(batch, kv_heads * group, kv_heads, rows * 128, columns * 128)
                order = turns(g, (*lead, rows, columns), tiles, room)
                covered = np.zeros((batch, kv_heads, rows), int)
                words = np.full((1, 1, rows), columns) if tiles is None else tiles
                words = np.broadcast_to(words, (*lead, rows))
                if lead[1] == 1:  # nothing to gain
                    assert all(turn.kv_heads == slice(0, kv_heads) for turn in order)
                for turn in order:
                    covered[turn] += 1
                    of_heads = slice(turn.kv_heads.start * group, turn.kv_heads.stop * group)
                    part = words[turn.batch if lead[0] > 1 else slice(1), of_heads if lead[1] > 1 else slice(1), turn.rows]
                    assert part.shape[0] * part.shape[1] * part.sum(-1).max() <= room
                assert (covered == 1).all()


def test_long_calls_run_and_longer_ones_are_refused():
    """A million causal tokens take 17 turns of the 512 KiB that there are."""
    causal = np.arange(1, 2049)[None, None]
    order = turns(Geometry(1, 8, 2, 2**20, 2**20), (1, 1, 2048, 2048), causal, jobs.MOST_BYTES // 4)
    assert len(order) == 17 and order[0] == Turn(slice(0, 1), slice(0, 2), slice(0, 511))
    assert turns(Geometry(1, 2, 1, 128, 5 * 128), (1, 2, 1, 5), None, 9) is None  # one row of both heads is too long
    chosen, told = jax.ShapeDtypeStruct((1, 512, 128, 128), bool), []
    with compiling_for("v5e"):
        q = jax.ShapeDtypeStruct((1, 2**16, 512, 1), jnp.bfloat16)
        jax.eval_shape(lambda chosen: told.append(explain(q, q, q, mask=masks.Blocks(chosen, 512, 512))), chosen)
    assert "more than 32 times the 512 KiB of scalar memory" in told[0].refused["pallas"]
    assert "larger block_sizes" in told[0].refused["pallas"]
