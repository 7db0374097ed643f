"""Random masks with, beside each, the bool array it must equal, built from the definition alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from attnzoo.core import masks
from tests.core.oracle import coordinates


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One problem: few of them, so that few programs are compiled."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    blocks: tuple[int, int]

    def __str__(self):
        return f"B{self.batch}-T{self.queries}-S{self.keys}-N{self.heads}-K{self.kv_heads}"

    @property
    def cells(self):
        return coordinates(self.batch, self.heads, self.queries, self.keys)


SIZES = [
    Sizes(2, 13, 17, 4, 2, 4, 3, (5, 6)),
    Sizes(1, 16, 16, 2, 2, 4, 4, (8, 4)),
    Sizes(2, 12, 9, 4, 1, 4, 5, (12, 5)),
    Sizes(1, 1, 9, 2, 1, 4, 4, (1, 4)),
]


@dataclasses.dataclass(frozen=True)
class Pair:
    """A mask and its cells [B, N, T, S]."""

    mask: masks.Mask
    cells: Any

    def __repr__(self):
        return str(self.mask)


def _leaves(z: Sizes) -> st.SearchStrategy[Pair]:
    b, h, q, k = z.cells
    shape = (z.batch, z.heads, z.queries, z.keys)

    def pair(mask, cells):
        return Pair(mask, np.broadcast_to(cells, shape))

    def of_seed(make):
        return st.integers(0, 2**16).map(lambda seed: make(np.random.default_rng(seed)))

    def causal(offset):
        return pair(masks.Causal(offset), k <= q + offset)

    def window(size):
        return pair(masks.SlidingWindow(size), np.abs(q - k) < size)

    def dilated(step):
        return pair(masks.Dilated(step), (q - k) % step == 0)

    def prefix(length):
        return pair(masks.Prefix(length), k < length)

    def prefixes(rng):
        length = rng.integers(0, z.keys + 1, z.batch)
        return pair(masks.Prefix(jnp.asarray(length)), k < length[:, None, None, None])

    def lengths(rng):
        kv, rows = rng.integers(0, z.keys + 1, z.batch), rng.integers(0, z.queries + 1, z.batch)
        real = (k < kv[:, None, None, None]) & (q < rows[:, None, None, None])
        return pair(masks.Lengths(jnp.asarray(kv), rows), real)

    def segments(rng):
        q_ids, kv_ids = (rng.integers(0, 4, (z.batch, n)) for n in (z.queries, z.keys))
        if rng.random() < 0.6:  # packed: every id one run
            q_ids, kv_ids = np.sort(q_ids), np.sort(kv_ids)
        return pair(masks.Segments(q_ids, kv_ids), q_ids[:, None, :, None] == kv_ids[:, None, None, :])

    def array(rng):
        lead = rng.choice([1, z.batch]), rng.choice([1, z.heads])
        cells = rng.random((*lead, z.queries, z.keys)) < rng.choice([0.1, 0.5])
        return pair(masks.Array(jnp.asarray(cells)), cells)

    def blocks(rng):
        bq, bk = (int(x) for x in rng.integers(1, 7, 2))
        lead = rng.choice([1, z.batch]), rng.choice([1, z.heads])
        table = rng.random((*lead, -(-z.queries // bq), -(-z.keys // bk))) < 0.4
        cells = np.repeat(np.repeat(table, bq, 2), bk, 3)[:, :, : z.queries, : z.keys]
        return pair(masks.Blocks(table, bq, bk), cells)

    def stripes(rng):
        columns = rng.integers(-1, z.keys, (rng.choice([1, z.batch]), rng.choice([1, z.heads]), 3))
        seen = (columns[..., None] == np.arange(z.keys)).any(2)[:, :, None]
        return pair(masks.Stripes(columns), seen)

    def function(rng):
        a, c, m = (int(x) for x in rng.integers(1, 6, 3))
        table = jnp.asarray(rng.random(8) < 0.5)
        cells = np.asarray(table)[(a * q + c * k + h) % 8] | ((q + b) % (m + 1) == 0)
        return pair(
            masks.Function(lambda b, h, q, k: table[(a * q + c * k + h) % 8] | ((q + b) % (m + 1) == 0)),
            cells,
        )

    options = [
        st.integers(-3, 6).map(causal),
        st.integers(1, 9).map(window),
        st.integers(1, 4).map(dilated),
        st.integers(0, 20).map(prefix),
        *(of_seed(f) for f in (prefixes, lengths, segments, array, blocks, stripes, function)),
    ]
    if z.queries == z.keys == 16:
        options.append(of_seed(lambda rng: _grid(rng, pair)))
    if z.keys >= z.queries:
        options.append(of_seed(lambda rng: _tree(rng, z, pair)))
    return st.one_of(options)


def _tree(rng, z, pair):
    parents = np.array([rng.integers(-1, i) if i else -1 for i in range(z.queries)])
    seen = np.zeros((z.queries, z.keys), bool)
    context = z.keys - z.queries
    seen[:, :context] = True
    for i in range(z.queries):
        at = i
        while at >= 0:
            seen[i, context + at] = True
            at = parents[at]
    return pair(masks.TreeAncestors(parents), seen)


def _grid(rng, pair):
    shape = [(16,), (4, 4), (2, 4, 2), (2, 8)][rng.integers(4)]
    dilation = tuple(int(rng.integers(1, x // 2 + 1)) for x in shape)
    window = tuple(int(rng.integers(1, x // d + 1)) for x, d in zip(shape, dilation, strict=True))
    causal = tuple(bool(rng.integers(2)) for _ in shape)
    seen = np.ones((16, 16), bool)
    for t in range(16):
        at = np.unravel_index(t, shape)
        for s in range(16):
            to = np.unravel_index(s, shape)
            seen[t, s] = all(map(_near, at, to, shape, window, dilation, causal))
    return pair(masks.Neighborhood(shape, window, dilation, causal), seen)


def _near(i, j, length, window, dilation, causal):
    """One axis of the neighborhood: list what i sees, nearest first, inside its own dilation group."""
    group = [x for x in range(length) if x % dilation == i % dilation]
    place = group.index(i)
    if causal:
        return j in group[max(0, place - window + 1) : place + 1]
    start = min(max(place - window // 2, 0), len(group) - window)
    return j in group[start : start + window]


def compositions(z: Sizes) -> st.SearchStrategy[Pair]:
    """Masks of up to six leaves joined by & | ~."""

    def grow(inner):
        two = st.tuples(inner, inner)
        return st.one_of(
            two.map(lambda ab: Pair(ab[0].mask & ab[1].mask, ab[0].cells & ab[1].cells)),
            two.map(lambda ab: Pair(ab[0].mask | ab[1].mask, ab[0].cells | ab[1].cells)),
            inner.map(lambda a: Pair(~a.mask, ~a.cells)),
        )

    return st.recursive(_leaves(z), grow, max_leaves=6)
