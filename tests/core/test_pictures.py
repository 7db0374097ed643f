"""What is drawn is what masks, scores and weight maps do."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.blocks import EMPTY, FULL
from attnzoo.core.cells import Geometry
from attnzoo.core.masks import Array, Causal
from attnzoo.core.pictures import draw_mask, draw_score, draw_weights, scored
from attnzoo.core.scores import ALiBi, Bias, SoftCap
from attnzoo.core.weights import Sigmoid, SinkSoftmax

T = 12


@pytest.fixture
def ax():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    return Figure().add_subplot()


def image(ax):
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


def test_a_mask_is_drawn_by_cells_and_tiles(ax):
    draw_mask(ax, Causal(), T, tile=4)
    block = np.arange(T) // 4
    full, empty = block < block[:, None], block > block[:, None]
    seen = np.tri(T, dtype=bool)
    np.testing.assert_array_equal(image(ax), np.where(full, 3, np.where(empty, 0, np.where(seen, 2, 1))))
    assert "3 full, 3 partial, 3 empty tiles of 4×4" in ax.get_title()
    # Heads that are alike are drawn, and counted, once.
    draw_mask(ax, Array(jnp.broadcast_to(jnp.asarray(seen), (2, 3, T, T))), T, batch=2, heads=3, tile=4)
    assert "3 full, 3 partial, 3 empty tiles of 4×4" in ax.get_title()


@pytest.mark.parametrize(("state", "said"), [(FULL, "full, .* query 0, key 1"), (EMPTY, "empty, .* query 0, key 0")])
def test_tiles_that_contradict_cells_are_refused(ax, state, said):
    class Wrong(Causal):
        def block_map(self, *args, **sizes):
            made = super().block_map(*args, **sizes)
            return dataclasses.replace(made, state=np.full_like(made.state, state))

    with pytest.raises(ValueError, match=said):
        draw_mask(ax, Wrong(), T, tile=4)


def test_tiles_that_do_not_divide(ax):
    draw_mask(ax, Causal(), 7, 9, tile=4)
    np.testing.assert_array_equal(image(ax) >= 2, np.tri(7, 9, dtype=bool))


def test_heads_that_differ_stand_side_by_side(ax, rng):
    cells = rng.random((2, 3, T, T)) < 0.5
    draw_mask(ax, Array(jnp.asarray(cells)), T, batch=2, heads=3)
    drawn = image(ax)
    assert drawn.shape == (T, 3 * (T + 1) - 1)
    for head in range(3):
        np.testing.assert_array_equal(drawn[:, head * (T + 1) :][:, :T] >= 2, cells[0, head])
    assert np.isnan(drawn[:, T]).all()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["head 0", "head 1", "head 2"]


def test_a_score_is_drawn_from_zeros(ax):
    draw_score(ax, ALiBi(jnp.array([0.5])), T)
    np.testing.assert_allclose(image(ax), -0.5 * np.abs(np.arange(T) - np.arange(T)[:, None]), atol=1e-6)
    assert "logits of 0" in ax.get_title()


def test_a_score_that_leaves_zeros_alone_is_drawn_from_ones(ax):
    score = ScaleByDistance()
    draw_score(ax, score, T)
    np.testing.assert_allclose(image(ax), np.abs(np.arange(T) - np.arange(T)[:, None]))
    assert "logits of 1" in ax.get_title()


class ScaleByDistance(SoftCap):
    """s · |q - k|."""

    def __init__(self):
        super().__init__(1.0)

    def bind(self, g):
        from attnzoo.core.cells import Bound

        return Bound((), lambda s, c: s * abs(c.q - c.k))


def test_a_score_that_hides_is_blank_there(ax):
    bias = jnp.where(jnp.tri(T, dtype=bool), 0.0, -jnp.inf)
    draw_score(ax, Bias(bias), T)
    np.testing.assert_array_equal(np.isnan(image(ax)), ~np.tri(T, dtype=bool))


def test_a_score_that_does_the_same_everywhere_is_a_curve(ax):
    draw_score(ax, SoftCap(30.0), 25, heads=2, batch=2)
    x, y = ax.lines[1].get_data()
    np.testing.assert_allclose(y, 30 * np.tanh(np.asarray(x) / 30), rtol=1e-5)
    assert (min(x), max(x)) == (-60, 60)


def test_weights_are_drawn_beside_softmax(ax):
    draw_weights(ax, {"sigmoid": Sigmoid(), "sinks": SinkSoftmax(jnp.array([0.0, 2.0]))}, T, heads=2, kv_heads=1, batch=2)
    plain, sigmoid, *sinks = (line.get_data() for line in ax.lines)
    x = plain[0]
    np.testing.assert_allclose(plain[1], np.exp(x) / np.exp(x).sum(), rtol=1e-5)
    np.testing.assert_allclose(sigmoid[1], 1 / (1 + T * np.exp(-x)), rtol=1e-5)
    assert len(sinks) == 2
    for (_, w), sink in zip(sinks, (0.0, 2.0), strict=True):
        np.testing.assert_allclose(w, np.exp(x) / (np.exp(x).sum() + np.exp(sink)), rtol=1e-5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["softmax", "sigmoid", "sinks, head 0", "sinks, head 1"]


def test_scored(rng):
    bias = jnp.asarray(rng.normal(size=(2, 4, T, T)), jnp.float32)
    g = Geometry(2, 4, 2, T, T)
    np.testing.assert_allclose(scored(Bias(bias), jnp.float32(1.0), g), 1 + bias, rtol=1e-6)
