"""Neighborhood attention by boxes of the grid against the same mask over flattened tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks
from attnzoo.core.attention import attention
from attnzoo.core.blocks import EMPTY, FULL, PARTIAL, block_map
from attnzoo.core.cells import Geometry
from attnzoo.core.neighborhood import Boxes, Order, best_box, neighborhood_attention

GRIDS = {
    "a line": (masks.Neighborhood((37,), 5), (8,)),
    "a causal line, dilated": (masks.Neighborhood((37,), 4, 3, True), (4,)),
    "a plane": (masks.Neighborhood((9, 13), (3, 5)), (4, 2)),
    "a plane, dilated unevenly": (masks.Neighborhood((9, 13), (2, 3), (2, 3)), (2, 4)),
    "a video, causal in time": (masks.Neighborhood((3, 6, 5), (2, 3, 3), (1, 2, 1), (True, False, False)), (2, 2, 4)),
}


def arrays(tokens, heads=2, kv_heads=1, width=8):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, tokens, n, width)) for k, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)]


@pytest.mark.parametrize("name", GRIDS)
def test_equals_the_flattened_mask(name):
    window, box = GRIDS[name]
    q, k, v = arrays(math.prod(window.shape))

    def loss(run, q, k, v):
        out, lse = run(q, k, v)
        return (out**2).sum() + jnp.sin(lse).sum(), (out, lse)

    def flat(q, k, v):
        return attention(q, k, v, mask=window, backend="dense", return_lse=True)

    def boxed(q, k, v):
        return neighborhood_attention(q, k, v, window, box=box, backend="blockwise", return_lse=True)

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1, 2), has_aux=True))(q, k, v)
        for run in (boxed, flat)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_states_are_those_of_the_cells(name):
    window, box = GRIDS[name]
    boxes, size = Boxes(window, box), math.prod(box)
    order = boxes.order
    groups = math.prod(window.dilation)
    tokens = size * math.prod(order.boxes)
    g = Geometry(2 * groups, 1, 1, tokens, tokens)
    made = block_map(boxes, g, size, size)
    assert made.how == "exact (by the mask)"
    seen = np.broadcast_to(boxes.dense(tokens, batch=2 * groups), (2 * groups, 1, tokens, tokens))[:, 0]
    real = np.asarray(order.into(jnp.ones((2, math.prod(window.shape), 1))))[..., 0] > 0
    n = tokens // size
    cells = seen.reshape(-1, n, size, n, size)
    rows = real.reshape(-1, n, size)[:, :, :, None, None]
    some, every = (cells & rows).any((2, 4)), (cells | ~rows).all((2, 4))
    expected = np.where(every & some, FULL, np.where(some, PARTIAL, EMPTY))
    np.testing.assert_array_equal(np.broadcast_to(made.state[:, 0], expected.shape), expected)


def test_there_and_back():
    order = Order((5, 7), (2, 3), (2, 2))
    x = jnp.arange(2 * 35 * 3.0).reshape(2, 35, 3)
    np.testing.assert_array_equal(order.back(order.into(x)), x)


def test_visits_the_tiles_of_the_paper():
    """Card of the method: a 16 × 16 grid, window 5 × 5, tiles of 4 × 4: 100 of 256 pairs."""
    states = [Boxes(masks.Neighborhood((16, 16), 5), (4, 4)).axis_states(a)[0] for a in (0, 1)]
    assert math.prod(int((s != EMPTY).sum()) for s in states) == 100


def test_boxes_visit_fewer_tiles_than_lines():
    window = masks.Neighborhood((512, 512), 13)

    def visited(box):
        return math.prod(int((Boxes(window, box).axis_states(a) != EMPTY).sum()) for a in (0, 1))

    assert visited(best_box(window)) < 0.34 * visited((1, 256))  # which are tiles of the flattened tokens
    # Short lines are best kept whole.
    assert best_box(masks.Neighborhood((64, 64), 7)) == (4, 64)
    assert best_box(masks.Neighborhood((4096,), 64)) == (256,)


def test_bad_input():
    q, k, v = arrays(12)
    window = masks.Neighborhood((3, 4), 3)
    with pytest.raises(ValueError, match=r"k must be .*12 tokens of the grid \(3, 4\), got \(2, 11, 1, 8\)"):
        neighborhood_attention(q, k[:, :11], v, window)
    with pytest.raises(ValueError, match=r"box: needs a positive size for each of the 2 axes of \(3, 4\), got \(4,\)"):
        neighborhood_attention(q, k, v, window, box=(4,))
    with pytest.raises(ValueError, match="bias: tiles that are boxes cannot have it"):
        neighborhood_attention(q, k, v, window, bias=jnp.zeros((12, 12)))
