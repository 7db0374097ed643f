"""Every built paper whose idea can be drawn is drawn."""

import pytest

from attnzoo import card, catalog

BUILT = [row.key for row in catalog.papers(status="built")]


@pytest.mark.parametrize("key", BUILT)
def test_pictures_are_drawn(key):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    paper = catalog.exhibit(key)
    draw = card.Card(catalog.paper(key), paper, {}).picture()
    parts = (paper.picture, paper.masks, paper.scores, paper.weights)
    assert (draw is not None) == any(parts)
    if draw is not None:
        axes = Figure(layout="constrained").add_subplot()
        draw(axes)
        assert axes.has_data()
        axes.figure.draw_without_rendering()
