"""Masks one by one: what they print, refuse and carry, and block maps of a size nobody could evaluate cell by cell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import blocks
from attnzoo.core.masks import (
    Array,
    Blocks,
    Causal,
    Dilated,
    Function,
    Instead,
    Lengths,
    Neighborhood,
    Prefix,
    Segments,
    Sinks,
    SlidingWindow,
    Stripes,
    TreeAncestors,
)


def rows(text):
    """A picture of a mask: one line a query, x for visible."""
    return np.array([[c == "x" for c in line.split()[0]] for line in text.strip().splitlines()])


PICTURES = {
    "causal": (Causal(), "x...\nxx..\nxxx.\nxxxx"),
    "look-ahead": (Causal(1), "xx..\nxxx.\nxxxx\nxxxx"),
    "window": (Causal() & SlidingWindow(2), "x...\nxx..\n.xx.\n..xx"),
    "both sides": (SlidingWindow(2), "xx..\nxxx.\n.xxx\n..xx"),
    "dilated": (Dilated(2), "x.x.\n.x.x\nx.x.\n.x.x"),
    "prefix": (Causal() | Prefix(2), "xx..\nxx..\nxxx.\nxxxx"),
    "sinks": (Causal() & SlidingWindow(1) | Sinks(1), "x...\nxx..\nx.x.\nx..x"),
    "packed": (Segments(np.array([7, 7, 3, 3])) & Causal(), "x...\nxx..\n..x.\n..xx"),
    "blocks": (Blocks(np.array([[True, False], [True, True]]), 2, 2), "xx..\nxx..\nxxxx\nxxxx"),
    "stripes": (Stripes(np.array([0, 3, -1])), "x..x\nx..x\nx..x\nx..x"),
    "tree": (TreeAncestors(np.array([-1, 0, 0, 1])), "x...\nxx..\nx.x.\nxx.x"),
    "neighborhood": (Neighborhood((4,), 3), "xxx.\nxxx.\n.xxx\n.xxx"),
    "grid": (Neighborhood((2, 2), (2, 1)), "x.x.\n.x.x\nx.x.\n.x.x"),
    "none": (~Prefix(4), "....\n....\n....\n...."),
    "instead": (Instead(Causal() | Prefix(2)), "xx..\nxx..\nxxx.\nxxxx"),
    "own": (Function(lambda b, h, q, k: (q + k) % 3 == 0), "x..x\n..x.\n.x..\nx..x"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    mask, picture = PICTURES[name]
    np.testing.assert_array_equal(np.asarray(mask.dense(4))[0, 0], rows(picture))


def test_they_print_as_they_are_written():
    assert repr(Causal() & SlidingWindow(4096) | Prefix(512)) == "Causal() & SlidingWindow(4096) | Prefix(512)"
    assert repr(Instead(Causal())) == "Instead(Causal())"
    assert (Lengths(np.array([3])) & (Sinks(1) | Instead(Causal()))).instead
    assert not (Causal() | Prefix(2)).instead
    assert repr((Causal() | Sinks(4)) & ~Dilated(2)) == "(Causal() | Sinks(4)) & ~Dilated(2)"
    assert repr(~(Causal(2) & Lengths(np.ones(2)))) == "~(Causal(offset=2) & Lengths(...))"
    assert repr(Neighborhood((8, 8), 3)) == "Neighborhood((8, 8), (3, 3))"


def test_they_are_pytrees_whose_arrays_may_be_traced():
    mask = Causal() & Segments(jnp.array([0, 0, 1])) | Lengths(jnp.array([2]))
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 3  # the offset is a leaf too
    np.testing.assert_array_equal(jax.jit(lambda m: m.dense(3))(mask), mask.dense(3))
    assert repr(jax.tree.unflatten(tree, leaves)) == repr(mask)


class TestBlockMap:
    def test_a_million_tokens(self):
        made = (Causal() & SlidingWindow(4096) | Prefix(512)).block_map(2**20)
        n = made.counts()
        # Every row of tiles sees its diagonal tile, the 7 before it and part of the 8th; the prefix adds column 0.
        assert made.how == "exact (runs)" and made.state.shape == (1, 1, 2048, 2048)
        assert n["full"] + n["partial"] == sum(min(i, 8) + 1 + (i > 8) for i in range(2048))
        assert n["partial"] == 2047 + 2040 - 1  # diagonal (row 0 is full by the prefix), the far end; row 8's end is column 0
        assert n["empty"] + n["full"] + n["partial"] == 2048**2

    def test_says_how_it_knows(self):
        odd = Function(lambda b, h, q, k: (q * k) % 7 == 1)
        assert (Causal() & odd).block_map(64, block_q=16, block_k=16).how == "exact (probed)"
        far = (Causal() & odd).block_map(2**15)
        assert far.how == "conservative" and far.counts()["empty"] == 64 * 63 // 2
        assert Segments(np.arange(64) % 3).block_map(64, block_q=16, block_k=16).how == "exact (probed)"
        assert Segments(np.arange(64) // 9).block_map(64, block_q=16, block_k=16).how == "exact (runs)"

    def test_probing_in_strips_agrees_with_one_go(self, monkeypatch):
        mask = Function(lambda b, h, q, k: (q * k + h) % 5 == 1)
        whole = mask.block_map(40, 56, block_q=8, block_k=8, heads=2).state
        monkeypatch.setattr(blocks, "_STRIP", 100)
        np.testing.assert_array_equal(mask.block_map(40, 56, block_q=8, block_k=8, heads=2).state, whole)

    def test_repr_and_plot(self):
        made = Causal().block_map(1024)
        assert repr(made) == "BlockMap(1024×1024 in tiles of 512×512, exact (runs): 1 full, 2 partial, 1 empty)"
        assert made.visited == 0.75
        ax = made.plot()
        assert ax.get_xlabel() == "key" and "2 partial" in ax.get_title()

    def test_of_traced_values_is_known_when_run(self):
        def states(lengths):
            made = Lengths(lengths).block_map(8, block_q=4, block_k=4, batch=2)
            assert "known when run" in repr(made) and not made.known
            with pytest.raises(ValueError, match="only when it is run"):
                made.counts()
            return made.state

        np.testing.assert_array_equal(jax.jit(states)(jnp.array([3, 4]))[:, 0, 0], [[1, 0], [2, 0]])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SlidingWindow(0), "at least 1"),
        (lambda: Dilated(0), "at least 1"),
        (lambda: Neighborhood((8,), 5, 2), r"window 5 × dilation 2 does not fit an axis of length 8"),
        (lambda: Neighborhood((8, 8), (3, 3, 3)), "window has 3 values for 2 axes"),
        (lambda: Neighborhood((2, 2, 2, 2), 1), "1 to 3 axes"),
        (lambda: Neighborhood((4, 4), 3).dense(15), r"16 tokens, but the call has T=15"),
        (lambda: Segments(jnp.zeros(3, int)).dense(4), r"q_ids has shape \(3,\).*\[T\] = \(4,\)"),
        (lambda: Blocks(np.ones((2, 3), bool), 2, 2).dense(4), r"table has shape \(2, 3\).*\[2, 2\]"),
        (lambda: Stripes(np.ones((2, 3), int)).dense(4), r"columns has shape \(2, 3\)"),
        (lambda: TreeAncestors(np.zeros(3, int)).dense(4), r"parents has shape \(3,\)"),
        (lambda: Array(np.ones((3, 4), bool)).dense(4), r"mask array has shape \(3, 4\).*\(1, 1, 4, 4\)"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(ValueError, match=match):
        make()
