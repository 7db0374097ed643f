"""Card 034: blocks of known text see all of themselves, the rest is causal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention
from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cache import append as append_tokens
from attnzoo.core.cache import cached_attention, init_cache, init_paged_cache
from attnzoo.core.masks import Causal, Lengths, Prefix, PrefixEnd
from attnzoo.core.positions import RoPE
from attnzoo.models.encoder import Encoder, EncoderConfig
from attnzoo.zoo.patterns.mas import (
    HeaderTemplate,
    SectionTemplate,
    SegmentBlockMask,
    block_ends,
    mas_extra_pairs,
    prefill_segments,
    segments_from_chat,
)

B, N, K, H = 2, 4, 2, 6


def random_segments(rng, batch, length, block=6):
    """Blocks and causal stretches of random lengths, numbered along each row."""
    rows = []
    for _ in range(batch):
        row, number = [], 0
        while len(row) < length:
            known = rng.random() < 0.6
            row += [number if known else -1] * rng.integers(1, block)
            number += known
        rows.append(row[:length])
    return np.array(rows, np.int32)


def cells(seg, lengths=None):
    """The definition: (k <= q) or the same block, and k (and q) no padding; [B, 1, T, T]."""
    at = np.arange(seg.shape[1])
    same = (seg[:, :, None] == seg[:, None, :]) & (seg[:, :, None] >= 0)
    ok = (at <= at[:, None]) | same
    if lengths is not None:
        real = at < np.asarray(lengths)[:, None]
        ok &= real[:, :, None] & real[:, None, :]
    return ok[:, None]


@pytest.fixture
def segments(rng):
    return random_segments(rng, B, 33)


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=(B, 33, n, H)), jnp.float32) for n in (N, K, K))


# --- the mask --------------------------------------------------------------------------------------------


def test_special_cases():
    t = 9
    causal, at = np.tri(t, dtype=bool), np.arange(t)
    for seg, expected in [
        (np.full(t, -1), causal),
        (np.zeros(t, int), np.ones((t, t), bool)),
        (at, causal),
        (np.where(at < 4, 0, -1), np.asarray((Causal() | Prefix(4)).dense(t))[0, 0]),
    ]:
        np.testing.assert_array_equal(SegmentBlockMask(seg).dense(t)[0, 0], expected)
    for ends, expected in [
        (at + 1, causal),
        (np.maximum(4, at + 1), np.asarray((Causal() | Prefix(4)).dense(t))[0, 0]),
        (np.full(t, t), np.ones((t, t), bool)),
        (block_ends(np.array([0, 0, 1, 1, 1, -1, -1, 2, 2])), cells(np.array([[0, 0, 1, 1, 1, -1, -1, 2, 2]]))[0, 0]),
    ]:
        np.testing.assert_array_equal(PrefixEnd(ends).dense(t)[0, 0], expected)


def test_the_mask_is_its_definition(segments):
    expected = cells(segments)
    mask = SegmentBlockMask(segments)
    np.testing.assert_array_equal(mask.dense(33, batch=B), expected)
    b, h, q, k = np.ix_(range(B), range(1), range(33), range(33))
    np.testing.assert_array_equal(mask(b, h, q, k), expected)
    np.testing.assert_array_equal(SegmentBlockMask(segments[0])(b, h, q, k), cells(segments[[0, 0]]))
    np.testing.assert_array_equal((~mask).dense(33, batch=B), ~expected)
    both = (mask & Prefix(7)).dense(33, batch=B)
    np.testing.assert_array_equal(both, expected & (np.arange(33) < 7))
    ends = block_ends(segments)
    assert (np.diff(ends) >= 0).all()
    np.testing.assert_array_equal(jax.jit(block_ends)(segments), ends)


@pytest.mark.parametrize("tile", [(4, 4), (8, 5), (16, 16)])
def test_tiles_are_exact(rng, tile):
    bq, bk = tile
    seg = random_segments(rng, 3, 37, block=14)
    mask, visible, ends = SegmentBlockMask(seg), cells(seg)[:, 0], block_ends(seg)
    lengths = np.array([37, 20, 5])
    padded_mask, padded = mask & Lengths(lengths, lengths), cells(seg, lengths)[:, 0]
    maps = [m.block_map(37, batch=3, block_q=bq, block_k=bk) for m in (mask, padded_mask)]
    traced = jax.jit(lambda seg: SegmentBlockMask(seg).block_map(37, batch=3, block_q=bq, block_k=bk).state)(seg)
    assert all(m.how == "exact (runs)" for m in maps)
    for b in range(3):
        for i, q0 in enumerate(range(0, 37, bq)):
            for j, k0 in enumerate(range(0, 37, bk)):
                q1, k1 = min(q0 + bq, 37), min(k0 + bk, 37)
                by_rule = FULL if k1 <= ends[b, q0] else EMPTY if k0 >= ends[b, q1 - 1] else PARTIAL
                tile_cells = visible[b, q0:q1, k0:k1]
                by_cells = FULL if tile_cells.all() else PARTIAL if tile_cells.any() else EMPTY
                assert maps[0].state[b, 0, i, j] == traced[b, 0, i, j] == by_rule == by_cells
                tile_cells = padded[b, q0:q1, k0:k1]
                by_cells = FULL if tile_cells.all() else PARTIAL if tile_cells.any() else EMPTY
                assert maps[1].state[b, 0, i, j] == by_cells


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_attention_with_padding(segments, qkv, backend):
    q, k, v = qkv
    lengths = np.array([33, 21])
    mask = SegmentBlockMask(segments) & Lengths(lengths, lengths)
    out = attention(q, k, v, mask=mask, backend=backend, block_sizes=(8, 8))
    expected = attention(q, k, v, mask=jnp.asarray(cells(segments, lengths)), backend="dense")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (out[1, 21:] == 0).all()
    poisoned = [x.at[1, 21:].set(1e6) for x in (k, v)]
    np.testing.assert_array_equal(attention(q, *poisoned, mask=mask, backend=backend, block_sizes=(8, 8)), out)


def test_who_is_affected_by_whom(rng):
    """Two layers: an earlier block never hears of a later one; a block's first token hears of its last."""
    seg = jnp.array([0, 0, 0, 1, 1, 1, 1, -1, -1])
    config = EncoderConfig(vocab_size=11, dim=16, num_layers=2, num_heads=2)
    model = Encoder(config, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, tokens: model(tokens, mask=SegmentBlockMask(seg)))
    tokens = jnp.asarray(rng.integers(0, 11, (1, 9)))
    base = run(model, tokens)
    later = run(model, tokens.at[0, 3:].set((tokens[0, 3:] + 1) % 11))
    np.testing.assert_array_equal(later[:, :3], base[:, :3])
    answer = run(model, tokens.at[0, 8].set((tokens[0, 8] + 1) % 11))
    np.testing.assert_array_equal(answer[:, :8], base[:, :8])
    last = run(model, tokens.at[0, 6].set((tokens[0, 6] + 1) % 11))
    np.testing.assert_array_equal(last[:, :3], base[:, :3])
    assert abs(last[0, 3] - base[0, 3]).max() > 1e-4


@pytest.mark.parametrize(
    ("seg", "words"),
    [
        ([[0, 0, 1, 1], [0, 1, 1, 0]], r"block 0 of row 1 is broken.*\[0, 3\]"),
        ([2, -1, 2], "block 2 of row 0"),
    ],
)
def test_a_broken_block_is_refused(seg, words):
    with pytest.raises(ValueError, match=words):
        SegmentBlockMask(jnp.array(seg))


def test_wrong_shapes(qkv):
    q, k, v = qkv
    with pytest.raises(ValueError, match=r"segments has shape \(5,\).*\(33,\)"):
        attention(q, k, v, mask=SegmentBlockMask(np.zeros(5, int)))
    with pytest.raises(ValueError, match=r"ends has shape \(2, 5\).*\(33,\)"):
        attention(q, k, v, mask=PrefixEnd(np.zeros((2, 5), int)))


def test_it_is_a_pytree(segments):
    mask = jax.tree.map(lambda x: x, SegmentBlockMask(jnp.asarray(segments)))
    jitted = jax.jit(lambda mask: mask.dense(33, batch=B))
    np.testing.assert_array_equal(jitted(mask), cells(segments))


# --- over a cache ----------------------------------------------------------------------------------------


def test_block_by_block_is_the_full_forward(rng):
    """Prefill block 0, then block 1, then token by token."""
    seg = np.array([0] * 5 + [1] * 7 + [-1] * 3, np.int32)
    length, rope = len(seg), RoPE()
    q, k, v = (jnp.asarray(rng.normal(size=(B, length, n, H)), jnp.float32) for n in (N, K, K))
    at = jnp.arange(length)
    full = attention(rope.rotate(q, at), rope.rotate(k, at), v, mask=SegmentBlockMask(seg))

    def feed(cuts):
        cache = init_cache(B, 16, {"k": (K, H), "v": (K, H)})
        parts = []
        for a, z in cuts:
            where = cache.next_positions(z - a)
            new = {"k": rope.rotate(k[:, a:z], where), "v": v[:, a:z]}
            if z - a == 1:  # generated text needs nothing of this exhibit
                out, cache = step(cache, rope.rotate(q[:, a:z], where), new)
            else:
                out, cache = prefill(cache, rope.rotate(q[:, a:z], where), new, seg[a:z])
            parts.append(out)
        return jnp.concatenate(parts, 1)

    @jax.jit
    def step(cache, q, new):
        cache = append_tokens(cache, new)
        return cached_attention(q, cache), cache

    prefill = jax.jit(prefill_segments)
    np.testing.assert_allclose(feed([(0, 5), (5, 12), (12, 13), (13, 14), (14, 15)]), full, atol=1e-5)
    np.testing.assert_allclose(feed([(0, 12), (12, 15)]), full, atol=1e-5)
    # In two parts, the first tokens of block 1 have not seen its last.
    split = feed([(0, 5), (5, 8), (8, 12), (12, 15)])
    np.testing.assert_allclose(split[:, :5], full[:, :5], atol=1e-5)
    assert abs(split[:, 5:8] - full[:, 5:8]).max() > 1e-2
    np.testing.assert_allclose(split[:, 8:12], full[:, 8:12], atol=1e-5)


def test_prefill_of_rows_of_different_lengths(rng):
    seg = np.array([[0] * 6, [0] * 4 + [1] * 2], np.int32)  # the second row's last two are padding
    q, k, v = (jnp.asarray(rng.normal(size=(B, 6, n, H)), jnp.float32) for n in (N, K, K))
    cache = init_paged_cache(B, 8, {"k": (K, H), "v": (K, H)}, page=4)
    prefill = jax.jit(lambda cache, lengths: prefill_segments(cache, q, {"k": k, "v": v}, seg, lengths=lengths))
    out, cache = prefill(cache, jnp.array([6, 4]))
    np.testing.assert_array_equal(cache.seen, [6, 4])
    for b, n in ((0, 6), (1, 4)):
        alone = attention(q[[b], :n], k[[b], :n], v[[b], :n])
        np.testing.assert_allclose(out[[b], :n], alone, atol=1e-5)


# --- pairs and templates ---------------------------------------------------------------------------------


def test_pairs(segments):
    causal = 33 * 34 // 2
    np.testing.assert_array_equal(mas_extra_pairs(segments), cells(segments).sum((1, 2, 3)) - causal)
    assert mas_extra_pairs(np.array([0] * 5 + [1] * 3 + [-1] * 4)) == 10 + 3


def test_chat_template():
    head, end, system, user, assistant = 128006, 128009, 9125, 882, 78191
    ids = [128000]
    expected = [-1]
    for role, words, block in [(system, 2, 0), (user, 3, 1), (assistant, 4, -1), (user, 1, 2), (assistant, 2, -1)]:
        message = [head, role, 128007, *range(words), end]
        ids += message
        expected += [block] * len(message)
    np.testing.assert_array_equal(segments_from_chat(ids), expected)
    # Padded on the left with the end token, on the right with it too: no block there.
    padded = [end] * 3 + ids + [end] * 2
    np.testing.assert_array_equal(segments_from_chat(padded), [-1] * 3 + expected + [-1] * 2)
    # A message whose end is missing runs to the next header, or to the end.
    cut = [head, user, 128007, 1, 2, head, assistant, 128007, 3, end, head, user, 128007]
    np.testing.assert_array_equal(segments_from_chat(cut), [0] * 5 + [-1] * 5 + [1] * 3)
    np.testing.assert_array_equal(segments_from_chat([ids, ids]), [expected, expected])
    SegmentBlockMask(segments_from_chat([ids, ids]))
    np.testing.assert_array_equal(
        segments_from_chat([7, 1, 5, 8, 7, 2, 8], HeaderTemplate(header=7, end=8, block_roles=(1,))),
        [0, 0, 0, 0, -1, -1, -1],
    )


def test_sections_template():
    text, head, instruction, addition, response = 128000, 14711, 30151, 5688, 6075
    system = [text, 1, 2]
    ask, more, answer = [head, instruction, 3, 4], [head, addition, 5], [head, response, 6, 7]
    np.testing.assert_array_equal(segments_from_chat(system + ask + more + answer, "alpaca"), [0] * 3 + [1] * 7 + [-1] * 4)
    np.testing.assert_array_equal(
        segments_from_chat(system + ask + answer + ask, "alpaca"), [0] * 3 + [1] * 4 + [-1] * 4 + [2] * 4
    )
    # No next header: to the end of the row. No text token: the system's block begins with the row.
    np.testing.assert_array_equal(segments_from_chat(system, "alpaca"), [0] * 3)
    np.testing.assert_array_equal(segments_from_chat([9, 9, *system, *ask], "alpaca"), [-1] * 2 + [0] * 3 + [1] * 4)
    np.testing.assert_array_equal(segments_from_chat(ask + answer, SectionTemplate()), [0] * 4 + [-1] * 4)
    # An addition without its instruction is a block of its own.
    np.testing.assert_array_equal(segments_from_chat(system + more + answer, "alpaca"), [0] * 3 + [1] * 3 + [-1] * 4)


def test_separator_template():
    ids = [1, 2, 17010, 3, 4, 5, 17010, 6, 7]
    np.testing.assert_array_equal(segments_from_chat(ids, "commonsense"), [0, 0, 0, 1, 1, 1, 1, -1, -1])
    np.testing.assert_array_equal(segments_from_chat([1, 2], "commonsense"), [-1, -1])
    with pytest.raises(ValueError, match=r"template.*alpaca"):
        segments_from_chat(ids, "alpaka")


# --- against transformers --------------------------------------------------------------------------------


@pytest.mark.parity
def test_parity_with_transformers(rng):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.masking_utils")
    if not hasattr(theirs, "blockwise_overlay"):
        pytest.skip("this transformers has no blockwise_overlay")
    for _ in range(5):
        seg = random_segments(rng, 3, 40)
        predicate = theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(torch.tensor(seg)))
        b, h, q, k = (torch.tensor(x) for x in np.ix_(range(3), range(1), range(40), range(40)))
        np.testing.assert_array_equal(SegmentBlockMask(seg).dense(40, batch=3), predicate(b, h, q, k).numpy())
