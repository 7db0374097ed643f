"""Segments that see each other only through hubs: cells, tiles, gradients of what is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.attention import attention, explain
from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Geometry
from attnzoo.core.masks import Causal, HubSegmentMask, Lengths

HUB, PADDING = -1, -2


def cells(q, kv, hubs_see=True):
    """The definition, cell by cell: [B, T, S]."""
    out = np.zeros((len(q), q.shape[1], kv.shape[1]), bool)
    for b, t, s in np.ndindex(out.shape):
        a, c = q[b, t], kv[b, s]
        out[b, t, s] = PADDING not in (a, c) and (a == c or c == HUB or (hubs_see and a == HUB))
    return out


def states(visible, block_q, block_k):
    """Tile states by asking every cell: [B, nq, nk]."""
    batch, queries, keys = visible.shape
    out = np.zeros((batch, -(-queries // block_q), -(-keys // block_k)), np.int8)
    for b, i, j in np.ndindex(out.shape):
        tile = visible[b, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        out[b, i, j] = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
    return out


def packed(rng, batch, length):
    """Hubs and segments that are unbroken runs with growing numbers, hubs in between, padding at the end."""
    rows = []
    for _ in range(batch):
        row, number = [], 0
        while len(row) < length:
            kind = rng.random()
            row += [HUB if kind < 0.3 else number] * rng.integers(1, 7)
            number += kind >= 0.3
        padding = rng.integers(0, 6)
        rows.append(row[: length - padding] + [PADDING] * padding)
    return np.array(rows, np.int32)


@pytest.mark.parametrize("hubs_see", [True, False])
@pytest.mark.parametrize("tile", [(4, 4), (8, 5), (16, 16)])
def test_tiles_of_packed_segments_are_exact(rng, tile, hubs_see):
    bq, bk = tile
    for _ in range(4):
        seg = packed(rng, 3, 37)
        mask, visible = HubSegmentMask(seg, hubs_see=hubs_see), cells(seg, seg, hubs_see)
        np.testing.assert_array_equal(mask.dense(37, batch=3)[:, 0], visible)
        known = mask.block_map(37, batch=3, block_q=bq, block_k=bk)
        assert known.how == "exact (runs)"
        np.testing.assert_array_equal(known.state[:, 0], states(visible, bq, bk))
        # By ranges of segments, as under jit: exact as well, since numbers grow.
        by_range = mask.tile_states(Geometry(3, 1, 1, 37, 37), bq, bk)
        np.testing.assert_array_equal(by_range[:, 0], states(visible, bq, bk))


def test_tiles_of_traced_segments():
    rng = np.random.default_rng(1)
    seg = packed(rng, 3, 37)
    traced = jax.jit(lambda seg: HubSegmentMask(seg).block_map(37, batch=3, block_q=8, block_k=5).state)(seg)
    np.testing.assert_array_equal(traced[:, 0], states(cells(seg, seg), 8, 5))


@pytest.mark.parametrize("hubs_see", [True, False])
def test_any_numbers(rng, hubs_see):
    """Broken segments in any order, queries and keys of their own: probed exactly; ranges never hide a visible cell."""
    for _ in range(4):
        q, kv = rng.integers(-2, 5, (2, 23)), rng.integers(-2, 5, (2, 31))
        mask, visible = HubSegmentMask(q, kv, hubs_see), cells(q, kv, hubs_see)
        np.testing.assert_array_equal(mask.dense(23, 31, batch=2)[:, 0], visible)
        made = mask.block_map(23, 31, batch=2, block_q=4, block_k=4)
        assert made.how == "exact (probed)"
        exact = states(visible, 4, 4)
        np.testing.assert_array_equal(made.state[:, 0], exact)
        by_range = mask.tile_states(Geometry(2, 1, 1, 23, 31), 4, 4)[:, 0]
        assert ((by_range == exact) | (by_range == PARTIAL)).all()


def test_composed_with_others(rng):
    seg, lengths = packed(rng, 3, 37), np.array([37, 20, 5])
    mask = HubSegmentMask(seg) & Causal() & Lengths(lengths, lengths)
    at = np.arange(37)
    real = at < lengths[:, None]
    visible = cells(seg, seg) & (at <= at[:, None]) & real[:, :, None] & real[:, None, :]
    made = mask.block_map(37, batch=3, block_q=8, block_k=8)
    assert made.how == "exact (runs)"
    np.testing.assert_array_equal(made.state[:, 0], states(visible, 8, 8))
    inverse = (~HubSegmentMask(seg)).block_map(37, batch=3, block_q=8, block_k=8)
    np.testing.assert_array_equal(inverse.state[:, 0], states(~cells(seg, seg), 8, 8))


def test_empty_tiles_of_a_long_sequence_are_skipped():
    """A context of one tile and 255 segments of one tile each, over a quarter of a million tokens."""
    seg = np.repeat(np.arange(256) - 1, 1024).astype(np.int32)
    made = HubSegmentMask(seg).block_map(len(seg), block_q=1024, block_k=1024)
    assert made.how == "exact (runs)"
    assert made.counts() == {"empty": 255 * 254, "partial": 0, "full": 256 + 255 + 255}


@pytest.mark.parametrize("hubs_see", [True, False])
def test_blockwise_visits_what_is_not_empty(rng, hubs_see):
    seg = np.repeat(np.array([HUB, 0, 1, 2, 3, PADDING], np.int32), 8)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 48, n, 4)), jnp.float32) for n in (4, 2, 2))
    mask = HubSegmentMask(seg, hubs_see=hubs_see)
    options = {"mask": mask, "backend": "blockwise", "block_sizes": (8, 8)}
    tiles = explain(q, k, v, **options).block_map
    assert tiles.counts() == {"empty": 36 - (13 if hubs_see else 9), "partial": 0, "full": 13 if hubs_see else 9}

    def run(q, k, v, **options):
        return attention(q, k, v, **options)

    expected = {"mask": jnp.asarray(cells(seg[None], seg[None], hubs_see)), "backend": "dense"}
    np.testing.assert_allclose(run(q, k, v, **options), run(q, k, v, **expected), atol=2e-6)
    grads = [jax.jit(jax.grad(lambda *x, o=o: (run(*x, **o) ** 2).sum(), (0, 1, 2)))(q, k, v) for o in (options, expected)]
    for mine, theirs in zip(*grads, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    # Tiles that are not visited cannot spoil anything, whatever they hold.
    alone = jnp.asarray(seg == 3)[None, :, None, None]
    spoiled = [jnp.where(alone, jnp.inf, x) for x in (k, v)]
    np.testing.assert_array_equal(run(q, *spoiled, **options)[:, 8:32], run(q, k, v, **options)[:, 8:32])


def test_key_positions_mark_empty_slots():
    seg = np.array([HUB, HUB, 0, 0, 1, 1, 1, 1], np.int32)
    where = jnp.array([0, 1, 2, -1, 3, 4, -1, -1])
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
    visible = cells(seg[None], seg[None]) & (np.asarray(where) >= 0)
    expected = attention(q, k, v, mask=jnp.asarray(visible)[:, None], backend="dense")
    options = {"mask": HubSegmentMask(seg), "kv_positions": where, "backend": "blockwise", "block_sizes": (2, 2)}
    np.testing.assert_allclose(attention(q, k, v, **options), expected, atol=2e-6)
    np.testing.assert_allclose(
        jax.jit(lambda w: attention(q, k, v, **{**options, "kv_positions": w}))(where), expected, atol=2e-6
    )


def test_wrong_shapes_and_printing():
    with pytest.raises(ValueError, match=r"kv_segments has shape \(3,\).*\[S\] = \(5,\)"):
        HubSegmentMask(np.zeros(4, int), np.zeros(3, int)).dense(4, 5)
    with pytest.raises(ValueError, match=r"segments has shape \(2, 4\).*\(3, 4\)"):
        HubSegmentMask(np.zeros((2, 4), int)).dense(4, batch=3)
    assert repr(HubSegmentMask(np.zeros(4, int)) & Causal()) == "HubSegmentMask(...) & Causal()"
