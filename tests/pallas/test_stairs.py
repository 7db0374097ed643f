"""Tiles that a mask cuts along their diagonal: what lies above is not computed, and the results are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks
from attnzoo.core.attention import attention
from attnzoo.core.cells import Geometry
from pallas_kernels.tpu import choice, jobs, problem
from pallas_kernels.tpu.launch import simulation

T = 600
RNG = np.random.default_rng(2)
SEGMENTS = jnp.asarray(np.sort(RNG.integers(0, 3, (1, T))))
CHOSEN = jnp.asarray(RNG.random((1, 2, 3, 3)) > 0.3)
BY_KEY, BY_QUERY, BY_CELL = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((T,), (T,), (T, T)))

# name -> (arguments made of one array, that array, whether tiles are cut into stairs)
CASES = {
    "causal": (lambda x: {"mask": masks.Causal()}, None, True),
    "a block ahead, segments": (lambda x: {"mask": masks.Causal(256) & masks.Segments(x, x)}, SEGMENTS, True),
    "a block behind, or a window of that": (
        lambda x: {"mask": masks.Causal(-256) & masks.SlidingWindow(300) | masks.Causal(-512)},
        None,
        True,
    ),
    "blocks by head, chosen while running": (
        lambda x: {"mask": masks.Blocks(x, 256, 256) & masks.Causal()},
        CHOSEN,
        True,
    ),
    "a number by key": (lambda x: {"mask": masks.Causal(), "score": lambda s, b, h, q, k: s + x[k]}, BY_KEY, True),
    "a number by query": (lambda x: {"mask": masks.Causal(), "score": lambda s, b, h, q, k: s * x[q]}, BY_QUERY, True),
    "a number by cell": (lambda x: {"mask": masks.Causal(), "bias": x}, BY_CELL, False),
    "three ahead": (lambda x: {"mask": masks.Causal(3)}, None, True),
    "the last 400": (lambda x: {"mask": masks.Causal() & masks.SlidingWindow(400)}, None, True),
    "fewer than 256 away on both sides": (lambda x: {"mask": masks.SlidingWindow(256)}, None, True),
    "windows by head, chosen while running": (
        lambda x: {"mask": masks.Blocks(x, 256, 256) & masks.SlidingWindow(300), "score": lambda s, b, h, q, k: s + q},
        CHOSEN,
        True,
    ),
    "two windows": (
        lambda x: {"mask": masks.SlidingWindow(100) & masks.Causal() | masks.Causal(-200) & masks.SlidingWindow(257)},
        None,
        True,
    ),
    "a window and sinks": (lambda x: {"mask": masks.SlidingWindow(256) | masks.Sinks(3)}, None, False),
    "positions": (lambda x: {"mask": masks.Causal(), "q_positions": x, "kv_positions": x}, jnp.arange(T) * 2, False),
}


def both_passes(backend, arguments, x):
    q, k, v = (jnp.asarray(np.random.default_rng(3).normal(size=(2, T, n, 16)), jnp.float32) for n in (2, 1, 1))
    moving = x is not None and jnp.issubdtype(x.dtype, jnp.floating)

    def loss(q, k, v, x):
        sizes = {"block_sizes": (256, 256)} if backend == "pallas" else {}
        out = attention(q, k, v, backend=backend, **arguments(x), **sizes)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3) if moving else (0, 1, 2), has_aux=True))(q, k, v, x)
    return [out, *gradients]


@pytest.mark.parametrize("name", CASES)
def test_the_same_with_stairs(name, monkeypatch):
    arguments, x, cut = CASES[name]
    monkeypatch.setattr(choice, "STAIRS", dict.fromkeys(choice.STAIRS, (128, 128)))
    asked = []

    def pieces(*args):
        asked.append(args[-1] != "whole")
        return problem.pieces(*args)

    for module in ("flash", "flash_dq", "flash_dkv"):
        monkeypatch.setattr(f"pallas_kernels.tpu.{module}.pieces", pieces)
    with simulation():
        got = both_passes("pallas", arguments, x)
    assert any(asked) == cut
    for a, b in zip(got, both_passes("dense", arguments, x), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-5, rtol=2e-5)


def test_a_causal_mask_has_no_other_partial_tiles():
    state = masks.Causal().block_map(4096).state
    made = jobs.make_jobs(jobs.with_stairs(state, 0, None)[0])
    assert made.kinds == {jobs.SKIP, jobs.STAIRS, jobs.FULL}
    assert (jobs.kind(made.words.reshape(made.count.size, -1)[0, : made.count[0]]) == jobs.STAIRS).sum() == 8


def test_a_window_of_whole_tiles_has_no_other_partial_tiles():
    state = (masks.Causal() & masks.SlidingWindow(1025)).block_map(4096).state
    made = jobs.make_jobs(jobs.with_stairs(state, 0, 2)[0])
    assert jobs.PARTIAL not in made.kinds
    assert made.steps == 8 + 7 + 6


@pytest.mark.parametrize("stair", [128, 256])
def test_stairs_hold_every_cell_on_their_side_of_the_diagonal(stair):
    p = problem.Problem(1, 1, 1, 512, 512, 512, 512, 512, 512, None, (), None, (), None, None, False, False, stair)
    for cut, side in (("below", np.tril_indices(512)), ("above", np.triu_indices(512))):
        seen = np.zeros((512, 512), int)
        for at in problem.pieces(p, 0, 0, np.zeros(6, int), False, cut):
            seen[at.row : at.row + at.rows, at.column : at.column + at.columns] += 1
        assert seen.max() == 1
        assert seen[side].all()
        assert seen.sum() == 512 * (512 + stair) // 2


@pytest.mark.parametrize(
    ("mask", "ahead", "behind"),
    [
        (masks.Causal(), 0, None),
        (masks.Causal(2) & masks.Causal(-1) & masks.SlidingWindow(4), -1, 3),
        (masks.Causal(2) | masks.Causal(-1), 2, None),
        (masks.Causal(2) & masks.SlidingWindow(5) | masks.SlidingWindow(2), 2, 4),
        (masks.Causal() | masks.Sinks(3), None, None),
        (masks.SlidingWindow(3) | masks.Sinks(3), None, None),
        (~masks.Causal(), None, None),
        (masks.Causal(jnp.asarray(1)), None, None),
        (masks.Instead(masks.Causal() & masks.SlidingWindow(7)), 0, 6),
    ],
)
def test_how_far_a_mask_sees(mask, ahead, behind):
    bound = mask.bind(Geometry(1, 1, 1, 20, 20))
    assert (bound.ahead, bound.behind) == (ahead, behind)
    by_position = mask.bind(Geometry(1, 1, 1, 20, 20, q_positions=jnp.arange(20)[None]))
    assert by_position.ahead is None and by_position.behind is None
    t, s = np.nonzero(np.asarray(mask.dense(20, 20))[0, 0])
    assert ahead is None or (s - t).max() == ahead
    assert behind is None or (t - s).max() == behind
