"""Dense caches: appending, attending, running out of room."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.cache import (
    LayerCache,
    append,
    cache_bytes,
    cached_attention,
    init_cache,
    init_paged_cache,
)
from attnzoo.core.masks import Causal, SlidingWindow
from attnzoo.testing import oracle_attention, oracle_cached_attention

B, T, N, K, H, HV = 3, 10, 4, 2, 8, 6
SPEC = {"k": (K, H), "v": (K, HV)}
LAYOUTS = {
    "dense": lambda length: init_cache(B, length, SPEC),
    "paged": lambda length: init_paged_cache(B, length, SPEC, page=4),
}
layouts = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, h)), jnp.float32) for n, h in ((N, H), (K, H), (K, HV)))


@partial(jax.jit, static_argnames=("window",))
def forward(cache, q, k, v, lengths=None, window=None):
    positions = cache.next_positions(q.shape[1])
    cache = append(cache, {"k": k, "v": v}, lengths)
    mask = Causal() if window is None else Causal() & SlidingWindow(window)
    return cached_attention(q, cache, q_positions=positions, mask=mask), cache


def causal(q, k, v, window=T):
    age = np.arange(T)[:, None] - np.arange(T)
    return oracle_attention(q, k, v, (age >= 0) & (age < window))[0]


@layouts
def test_prefill_chunks_and_single_tokens_agree_with_dense_attention(qkv, make):
    want = causal(*qkv)
    for chunks in ((10,), (4, 6), (1,) * 10):
        cache, start, outs = make(12), 0, []
        for size in chunks:
            out, cache = forward(cache, *(x[:, start : start + size] for x in qkv))
            outs.append(out)
            start += size
        np.testing.assert_allclose(np.concatenate(outs, 1), want, atol=2e-6)
        assert (cache.seen == T).all()
        assert (cache.used == T).all()
        assert not cache.overflow.any()


@layouts
def test_ragged_rows_go_on_at_their_own_length(qkv, make):
    lengths = np.array([3, 7, 1])
    _, cache = forward(make(12), *(x[:, :7] for x in qkv), jnp.asarray(lengths))
    assert (cache.seen == lengths).all()
    assert (cache.used == lengths[:, None]).all()
    want = causal(*qkv)
    for step in range(3):
        now = lengths + step
        token = [np.take_along_axis(np.asarray(x), now[:, None, None, None], 1) for x in qkv]
        out, cache = forward(cache, *token)
        np.testing.assert_allclose(out[:, 0], want[np.arange(B), now], atol=2e-6)


@layouts
def test_padding_is_not_written(qkv, make):
    q, k, v = qkv
    lengths = jnp.asarray([3, 10, 0])
    real = (jnp.arange(T) < lengths[:, None])[:, :, None, None]
    clean, cache = forward(make(T), q, k, v, lengths)
    dirty, other = forward(make(T), q, jnp.where(real, k, jnp.nan), jnp.where(real, v, jnp.nan), lengths)
    np.testing.assert_array_equal(clean, dirty)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@layouts
def test_rows_are_independent(qkv, make):
    one, _ = forward(make(T), *qkv)
    two, _ = forward(make(T), *(x.at[1].multiply(-3.0) for x in qkv), jnp.asarray([T, 4, T]))
    np.testing.assert_array_equal(one[jnp.asarray([0, 2])], two[jnp.asarray([0, 2])])


@layouts
def test_running_out_of_room(qkv, make):
    q, k, v = qkv
    with pytest.raises(ValueError, match=r"full: row\(s\) \[0, 1\].*room for"):
        append(make(8), {"k": k, "v": v}, jnp.asarray([9, 10, 8]))
    out, cache = forward(make(8), q, k, v, jnp.asarray([9, 10, 8]))
    np.testing.assert_array_equal(cache.overflow, [True, True, False])
    assert (cache.used == 8).all()
    np.testing.assert_allclose(out[:, :8], causal(*qkv)[:, :8], atol=2e-6)
    _, cache = forward(cache, q[:, :1], k[:, :1], v[:, :1], jnp.asarray([1, 1, 0]))
    assert not cache.overflow[2]
    assert (cache.used == 8).all()


def test_append_fills_the_holes_of_each_head(qkv):
    """A policy may free slots anywhere, differently per head; nothing alive is overwritten."""
    q, k, v = qkv
    cache = append(init_cache(B, 8, SPEC), {"k": k[:, :6], "v": v[:, :6]})
    gone = np.zeros((B, K, 8), bool)
    gone[:, 0, [1, 4]] = gone[:, 1, [0]] = True
    cache = dataclasses.replace(cache, pos=jnp.where(gone, -1, cache.pos), w=jnp.where(gone, 0, cache.w))
    cache = append(cache, {"k": k[:, 6:9], "v": v[:, 6:9]})
    assert sorted(np.asarray(cache.pos[0, 0])) == [-1, 0, 2, 3, 5, 6, 7, 8]
    assert sorted(np.asarray(cache.pos[0, 1])) == [1, 2, 3, 4, 5, 6, 7, 8]
    visible = np.zeros((1, N, 1, T), bool)
    visible[0, :2, 0, [0, 2, 3, 5, 6, 7, 8]] = visible[0, 2:, 0, 1:9] = True
    np.testing.assert_allclose(cached_attention(q[:, 8:9], cache), oracle_attention(q[:, 8:9], k, v, visible)[0], atol=2e-6)


@pytest.mark.parametrize("sinks", [0, 2])
def test_rolling_window_without_end(qkv, sinks):
    """S slots hold the first n and the last S - n tokens, whatever the size of the steps."""
    q, k, v = qkv
    slots, age = 6, np.arange(T)[:, None] - np.arange(T)
    want, _ = oracle_attention(q, k, v, (age >= 0) & ((age < slots - sinks) | (np.arange(T) < sinks)))
    for chunks in ((1,) * T, (5, 1, 1, 1, 1, 1), (9, 1), (10,)):
        cache, start = init_cache(B, slots, SPEC, sinks=sinks), 0
        for size in chunks:
            out, cache = forward(cache, *(x[:, start : start + size] for x in qkv))
            start += size
        held = set(range(sinks)) | set(range(T - slots + sinks, T))
        assert all(set(row.tolist()) == held for row in np.asarray(cache.pos).reshape(-1, slots))
        np.testing.assert_allclose(out[:, -1], want[:, -1], atol=2e-6)
        assert not cache.overflow.any()


def test_rolling_cache_serves_chunks_of_a_sliding_window(qkv):
    """Slots for window + T - 1 tokens make chunks of T exact."""
    window, size = 4, 3
    cache, outs = init_cache(B, window + size - 1, SPEC, sinks=0), []
    for start in range(0, T, size):
        out, cache = forward(cache, *(x[:, start : start + size] for x in qkv), window=window)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, 1), causal(*qkv, window=window), atol=2e-6)


def test_rolling_rows_of_different_lengths(qkv):
    lengths = np.array([2, 9, 5])
    _, cache = forward(init_cache(B, 5, SPEC, sinks=1), *qkv, jnp.asarray(lengths))
    held = [{0, 1}, {0, 5, 6, 7, 8}, {0, 1, 2, 3, 4}]
    for row, want in zip(np.asarray(cache.pos[:, 0]), held, strict=True):
        assert set(row.tolist()) - {-1} == want


def test_multiplicities_count(qkv, rng):
    """A slot with w = n weighs as n equal tokens."""
    q, k, v = qkv
    w = rng.integers(1, 4, size=(B, K, T)).astype(np.float32)
    cache = append(init_cache(B, T, SPEC), {"k": k, "v": v})
    cache = dataclasses.replace(cache, w=jnp.asarray(w), weighted=True)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    got = cached_attention(q, cache, q_positions=positions)
    log_w = np.repeat(np.log(w), N // K, axis=1)[:, :, None]
    want, _ = oracle_attention(q, k, v, np.tri(T, dtype=bool), log_w=log_w)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(got, oracle_cached_attention(q, cache, positions)[0], atol=2e-6)
    emptied = dataclasses.replace(cache, w=cache.w.at[:, :, 0].set(0.0))
    assert np.isfinite(cached_attention(q, emptied, q_positions=positions)).all()


def test_memory_of_cross_attention(qkv):
    q, k, v = qkv
    lengths = np.array([4, 10, 0])
    cache = append(init_cache(B, T, SPEC), {"k": k, "v": v}, jnp.asarray(lengths))
    want, _ = oracle_attention(q[:, :2], k, v, (np.arange(T) < lengths[:, None])[:, None, None])
    np.testing.assert_allclose(cached_attention(q[:, :2], cache, mask=None), want, atol=2e-6)


@pytest.mark.parametrize("paged", [False, True])
def test_any_payload(rng, paged):
    """A latent of one head that is expanded on reading; leaves of their own dtype and rank."""
    spec = {"c": jax.ShapeDtypeStruct((1, 5), jnp.float32), "f": (1, 3, 2)}
    make = partial(init_paged_cache, page=4) if paged else init_cache
    cache = make(B, T, spec, dtype=jnp.bfloat16)
    assert cache.payload["c"].dtype == jnp.float32
    assert cache.payload["f"].dtype == jnp.bfloat16
    c = jnp.asarray(rng.normal(size=(B, T, 1, 5)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.float32)
    up_k, up_v = (jnp.asarray(rng.normal(size=(5, K, h)), jnp.float32) for h in (H, HV))
    positions = cache.next_positions(T)
    cache = append(cache, {"c": c, "f": jnp.ones((B, T, 1, 3, 2))})

    def read(payload):
        latent = payload["c"][:, 0]
        return jnp.einsum("bsr,rkh->bksh", latent, up_k), jnp.einsum("bsr,rkh->bksh", latent, up_v)

    got = cached_attention(q, cache, q_positions=positions, read=read)
    k, v = (jnp.einsum("btr,rkh->btkh", c[:, :, 0], up) for up in (up_k, up_v))
    np.testing.assert_allclose(got, causal(q, k, v), atol=5e-6)


def test_options_reach_attention(qkv):
    q, k, v = qkv
    cache = append(init_cache(B, T, SPEC), {"k": k, "v": v})
    out, lse, weights = cached_attention(q[:, -1:], cache, scale=0.3, return_lse=True, return_weights=True)
    want, want_weights = oracle_attention(q[:, -1:], k, v, scale=0.3)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(weights, want_weights, atol=2e-6)
    assert lse.shape == (B, 1, N)


def test_decoding_in_a_scan_compiles_once_and_casts(qkv):
    traces = []

    @jax.jit
    def decode(cache, tokens):
        traces.append(1)

        def step(cache, token):
            q, k, v = (x[:, None] for x in token)
            cache = append(cache, {"k": k, "v": v})
            return cache, cached_attention(q, cache)[:, 0]

        return jax.lax.scan(step, cache, tokens)

    tokens = tuple(jnp.moveaxis(x, 1, 0).astype(jnp.bfloat16) for x in qkv)
    cache = init_cache(B, T, SPEC, dtype=jnp.bfloat16)
    for scale in (1.0, -2.0):
        moved = tuple(scale * x for x in tokens)
        filled, outs = decode(cache, moved)
        want = causal(*(jnp.moveaxis(x, 0, 1).astype(jnp.float32) for x in moved))
        np.testing.assert_allclose(np.moveaxis(outs.astype(jnp.float32), 0, 1), want, atol=0.04)
        assert jax.tree.map(lambda x: x.dtype, filled) == jax.tree.map(lambda x: x.dtype, cache)
    assert len(traces) == 1


def test_gradients_flow_through_a_cache(qkv):
    def loss(q, k, v):
        return jnp.sum(jnp.sin(forward(init_cache(B, T, SPEC), q, k, v)[0]))

    def plain(q, k, v):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        s = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
        p = jax.nn.softmax(jnp.where(np.tri(T, dtype=bool), s, -jnp.inf), axis=-1)
        return jnp.sum(jnp.sin(jnp.einsum("bnts,bsnh->btnh", p, v)))

    gradients = (jax.jit(jax.grad(f, (0, 1, 2)))(*qkv) for f in (loss, plain))
    for got, want in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_bytes():
    cache = init_cache(B, 16, SPEC, dtype=jnp.bfloat16)
    assert cache_bytes(cache) == B * 16 * K * (H + HV) * 2
    assert cache_bytes([cache, {"x": cache}]) == 2 * cache_bytes(cache)
    assert cache_bytes(cache, bookkeeping=True) == cache_bytes(cache) + B * K * (16 * 12 + 4) + B * 5
    assert cache_bytes(init_paged_cache(B, 30, SPEC, page=4, pages=5)) == 5 * 4 * K * (H + HV) * 4
    abstract = jax.eval_shape(lambda: init_cache(B, 16, SPEC))
    assert cache_bytes(abstract) == B * 16 * K * (H + HV) * 4


def test_empty_batch_and_heads():
    for batch, heads in ((0, 2), (2, 0)):
        cache = init_cache(batch, 4, {"k": (heads, H), "v": (heads, H)})
        x = jnp.zeros((batch, 3, heads, H))
        assert append(cache, {"k": x, "v": x}).pos.shape == (batch, heads, 4)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"length": 0}, "length >= 1"),
        ({"spec": {"k": (2, 8), "v": (1, 8)}}, "same number of heads"),
        ({"spec": {"k": 8}}, "spec: leaves are"),
        ({"sinks": 4}, "sinks < length"),
        ({"sinks": -1}, "sinks"),
    ],
)
def test_init_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match):
        init_cache(**{"batch": 2, "length": 4, "spec": SPEC} | kwargs)


def test_append_and_attention_refuse(qkv):
    q, k, v = qkv
    cache = init_cache(B, T, SPEC)
    assert isinstance(cache, LayerCache)
    with pytest.raises(ValueError, match=r"new\['v'\].*\[3, T, 2, 6\], got \[3, 10, 2, 8\]"):
        append(cache, {"k": k, "v": k})
    with pytest.raises(ValueError, match="same number of tokens"):
        append(cache, {"k": k, "v": v[:, 1:]})
    with pytest.raises(ValueError, match="tree of the cache's payload"):
        append(cache, {"k": k})
    with pytest.raises(ValueError, match=r"lengths: expected shape \(3,\)"):
        append(cache, {"k": k, "v": v}, jnp.zeros(2, int))
    with pytest.raises(ValueError, match="between 0 and the T=10"):
        append(cache, {"k": k, "v": v}, jnp.asarray([0, 11, 1]))
    with pytest.raises(ValueError, match="q_positions: needed"):
        cached_attention(q, append(cache, {"k": k, "v": v}))
