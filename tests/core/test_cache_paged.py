"""The page pool: allocation inside jit, sharing between rows, release."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.cache import append, cached_attention, init_cache, init_paged_cache

B, K, H = 3, 2, 4
SPEC = {"k": (K, H), "v": (K, H)}


def tokens(rng, length):
    return {name: jnp.asarray(rng.normal(size=(B, length, K, H)), jnp.float32) for name in SPEC}


def owned(cache):
    """The pages of each row; checks that none is owned twice or both owned and free."""
    rows = [[int(p) for p in row if p >= 0] for row in np.asarray(cache.table)]
    free = np.asarray(cache.free)[: int(cache.num_free)].tolist()
    everything = [p for row in rows for p in row] + free
    assert sorted(everything) == list(range(cache.free.shape[0]))
    return rows


def test_rows_share_one_pool(rng):
    """Ten pages serve rows of 20, 3 and 9 tokens, which full rows (3 · 5 pages) could not."""
    cache = init_paged_cache(B, 20, SPEC, page=4, pages=10)
    full = init_cache(B, 20, SPEC)
    step = jax.jit(append)
    totals = np.array([20, 3, 9])
    while (np.asarray(cache.seen) < totals).any():
        new, lengths = tokens(rng, 5), jnp.asarray(np.minimum(5, totals - cache.seen))
        cache, full = step(cache, new, lengths), step(full, new, lengths)
        assert [len(r) for r in owned(cache)] == [-(-int(n) // 4) for n in cache.seen]
    assert not cache.overflow.any()
    assert cache.num_free == 1
    q = jnp.asarray(rng.normal(size=(B, 1, 2 * K, H)), jnp.float32)
    np.testing.assert_allclose(cached_attention(q, cache), cached_attention(q, full), atol=1e-6)
    np.testing.assert_array_equal(cache.used, full.used)


def test_view_equals_the_dense_cache_slot_by_slot(rng):
    new, lengths = tokens(rng, 7), jnp.asarray([7, 2, 5])
    view = append(init_paged_cache(B, 8, SPEC, page=4), new, lengths).view()
    full = append(init_cache(B, 8, SPEC), new, lengths)
    np.testing.assert_array_equal(view.pos, full.pos)
    np.testing.assert_array_equal(view.w, full.w)
    held = np.asarray(full.pos >= 0)[..., None]
    for name in SPEC:
        np.testing.assert_array_equal(view.payload[name] * held, full.payload[name])


def test_an_empty_pool_is_reported(rng):
    cache = init_paged_cache(B, 8, SPEC, page=4, pages=4)
    new = tokens(rng, 8)
    with pytest.raises(ValueError, match=r"row\(s\) \[2\].*4 pages in all"):
        append(cache, new)
    cache = jax.jit(append)(cache, new)
    np.testing.assert_array_equal(cache.overflow, [False, False, True])
    np.testing.assert_array_equal(cache.used[:, 0], [8, 8, 0])
    owned(cache)


def test_a_full_table_is_reported(rng):
    cache = append(init_paged_cache(B, 8, SPEC, page=4, pages=10), tokens(rng, 8))
    with pytest.raises(ValueError, match="2 pages of 4 slots per row"):
        append(cache, tokens(rng, 1), jnp.asarray([0, 1, 0]))


def test_released_pages_serve_the_next_request(rng):
    cache = append(init_paged_cache(B, 8, SPEC, page=4, pages=6), tokens(rng, 8))
    assert cache.num_free == 0
    cache = jax.jit(lambda c: c.release(jnp.asarray([False, True, False])))(cache)
    np.testing.assert_array_equal(cache.seen, [8, 0, 8])
    assert owned(cache)[1] == []
    assert cache.num_free == 2
    again = append(cache, tokens(rng, 8), jnp.asarray([0, 8, 0]))
    assert len(owned(again)[1]) == 2
    assert not again.overflow.any()
    before, after = cache.view(), again.view()
    np.testing.assert_array_equal(before.payload["k"][0], after.payload["k"][0])


def test_an_exhausted_row_recovers_after_release(rng):
    cache = jax.jit(append)(init_paged_cache(B, 8, SPEC, page=4, pages=5), tokens(rng, 8))
    np.testing.assert_array_equal(cache.overflow, [False, False, True])
    np.testing.assert_array_equal(cache.used[:, 0], [8, 8, 4])
    cache = cache.release(jnp.asarray([True, False, True]))
    assert not cache.overflow.any()
    cache = append(cache, tokens(rng, 5), jnp.asarray([5, 0, 3]))
    np.testing.assert_array_equal(cache.used[:, 0], [5, 8, 3])


def test_init_refuses():
    for kwargs in ({"page": 0}, {"pages": 0}, {"length": 0}):
        with pytest.raises(ValueError, match="must be >= 1"):
            init_paged_cache(**{"batch": 2, "length": 8, "spec": SPEC} | kwargs)
