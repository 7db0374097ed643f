"""The parts of the policy protocol, and what tells the baselines apart."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.cache import (
    CachePolicy,
    KnormPolicy,
    Obs,
    ObservedAttentionPolicy,
    SnapKVPolicy,
    StreamingPolicy,
    attention_probe,
    average_pool,
    cached_attention,
    decode_step,
    init_cache,
    observe,
    pack,
    prefill_compress,
    topk_keep,
)
from attnzoo.testing import needle_layer, oracle_attention

B, T, N, K, H = 2, 14, 4, 2, 6
SPEC = {"k": (K, H), "v": (K, H)}


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))


def heads_major(*arrays):
    return tuple(jnp.swapaxes(x, 1, 2) for x in arrays)


def test_topk_keep_by_hand():
    score = jnp.asarray([[[1.0, 5.0, 5.0, 5.0, 9.0, 0.0]]])
    forced = jnp.asarray([[[False, False, False, False, False, True]]])
    valid = jnp.asarray([[[True, True, True, True, False, True]]])

    def kept(budget):
        return np.flatnonzero(topk_keep(score, forced, valid, jnp.asarray([[budget]]))).tolist()

    assert [kept(n) for n in range(7)] == [
        [], [5], [1, 5], [1, 2, 5], [1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 5],
    ]  # fmt: skip


def test_topk_keep_has_a_budget_per_head(rng):
    score = jnp.asarray(rng.normal(size=(B, K, T)), jnp.float32)
    budget = jnp.asarray([[3, 0], [14, 20]])
    keep = topk_keep(score, jnp.zeros_like(score, bool), jnp.ones((B, 1, T), bool), budget)
    np.testing.assert_array_equal(keep.sum(-1), [[3, 0], [14, 14]])
    best = np.argsort(-np.asarray(score[0, 0]))[:3]
    assert np.asarray(keep[0, 0])[best].all()


@pytest.mark.parametrize("slots", [5, 20])
def test_pack_left_packs_in_order(qkv, slots):
    k, v = heads_major(*qkv[1:])
    keep = np.zeros((B, K, T), bool)
    keep[0, 0, [2, 5, 6]] = keep[0, 1, [0]] = keep[1, 1, [13, 1, 4, 7, 8]] = True
    cache = jax.jit(pack, static_argnums=2)({"k": k, "v": v}, jnp.asarray(keep), slots)
    for b, h in np.ndindex(B, K):
        held = np.flatnonzero(keep[b, h])
        n = len(held)
        assert cache.pos[b, h].tolist() == [*held, *[-1] * (slots - n)]
        assert cache.w[b, h].tolist() == [1.0] * n + [0.0] * (slots - n)
        np.testing.assert_array_equal(cache.payload["v"][b, h, :n], v[b, h, held])
        assert (cache.payload["k"][b, h, n:] == 0).all()
    assert not cache.overflow.any()
    assert pack({"k": k}, jnp.ones((B, K, T), bool), 5).overflow.all()


@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize("given", [False, True])
def test_attention_probe_sums_columns(qkv, block, given):
    q, k, _ = qkv
    _, weights = oracle_attention(q, k, k, np.tri(T, dtype=bool))
    lengths = np.array([T, 9])
    real = np.arange(T) < lengths[:, None]
    want = (weights * real[:, None, :, None]).sum(2)
    logits = np.einsum("bthd,bshd->bhts", q, np.repeat(k, N // K, axis=2)) * H**-0.5
    lse = jax.nn.logsumexp(jnp.where(np.tri(T, dtype=bool), logits, -jnp.inf), axis=-1)
    positions = jnp.where(real, jnp.arange(T), -1)
    got = attention_probe(
        *heads_major(q, k), lse if given else None, q_positions=positions, kv_positions=positions, block=block
    )
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_attention_probe_makes_no_square_array(qkv):
    """The largest intermediate of 4096 queries over 4096 keys is a block of rows."""
    q = k = jax.ShapeDtypeStruct((1, 1, 4096, H), jnp.float32)
    positions = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def probe(q, k, positions):
        return attention_probe(q, k, q_positions=positions, kv_positions=positions, block=64)

    memory = jax.jit(probe).lower(q, k, positions).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096 * 4 / 4


def test_observe_gives_what_is_needed(qkv):
    @dataclasses.dataclass(frozen=True)
    class Curious(CachePolicy):
        needs = frozenset({"attn_win", "mass", "attn", "token_ids"})
        window: int = 4

    q, k, v = qkv
    lengths, ids = np.array([T, 2]), jnp.arange(B * T).reshape(B, T)
    seen = observe(Curious(), q, *heads_major(k, v), jnp.asarray(lengths), token_ids=ids, layer=3)
    _, weights = oracle_attention(q, k, v, np.tri(T, dtype=bool))
    np.testing.assert_allclose(seen.attn[0], weights[0], atol=2e-6)
    np.testing.assert_allclose(seen.attn_win[0], weights[0, :, -4:], atol=2e-6)
    np.testing.assert_array_equal(seen.q_pos, [[10, 11, 12, 13], [-1, -1, 0, 1]])
    assert (seen.attn_win[1, :, :2] == 0).all()
    np.testing.assert_allclose(seen.attn_win[1, :, 2:], weights[1, :, :2], atol=2e-6)
    np.testing.assert_allclose(seen.mass[1], weights[1, :, :2].sum(1), atol=2e-6)
    np.testing.assert_array_equal(seen.valid.sum(-1), lengths)
    np.testing.assert_array_equal(np.flatnonzero(seen.last(1)[1]), [1])
    assert seen.layer == 3
    assert (seen.token_ids == ids).all()
    assert observe(KnormPolicy(4), q, *heads_major(k, v), jnp.asarray(lengths)).attn_win is None
    with pytest.raises(ValueError, match="token_ids: Curious"):
        observe(Curious(), q, *heads_major(k, v), jnp.asarray(lengths))


def test_average_pool_counts_the_padding():
    np.testing.assert_allclose(average_pool(jnp.asarray([3.0, 0.0, 6.0, 9.0]), 3), [1.0, 3.0, 5.0, 5.0])


def test_streaming_holds_sinks_and_a_ring(qkv):
    q, k, v = qkv
    policy, cache = StreamingPolicy(sinks=2, recent=3), None
    cache = init_cache(B, T, SPEC, policy=policy, max_new=T)
    for t in range(T):
        token = (x[:, t : t + 1] for x in (q, k, v))
        qt, kt, vt = token
        out, cache = jax.jit(decode_step, static_argnums=0)(policy, cache, qt, {"k": kt, "v": vt})
        held = sorted({*range(min(2, t + 1)), *range(max(0, t - 2), t + 1)})
        assert sorted(p for p in cache.pos[0, 0].tolist() if p >= 0) == held
    visible = np.isin(np.arange(T), held)
    np.testing.assert_allclose(out, oracle_attention(q[:, -1:], k, v, visible)[0], atol=2e-6)


def test_observed_attention_evicts_the_least_observed(qkv):
    """Against the same rule written over the full attention maps of each step."""
    q, k, v = qkv
    policy, prompt, capacity = ObservedAttentionPolicy(capacity=4), 6, 4
    cache = init_cache(B, T, SPEC, policy=policy, max_new=T - prompt)
    cache = prefill_compress(policy, cache, q[:, :prompt], {"k": k[:, :prompt], "v": v[:, :prompt]})
    _, weights = oracle_attention(q[:, :prompt], k[:, :prompt], v[:, :prompt], np.tri(prompt, dtype=bool))
    mass = weights.reshape(B, K, N // K, prompt, prompt).mean(2).sum(2)
    alive = np.zeros((B, K, T), bool)
    total = np.zeros((B, K, T))
    total[..., :prompt] = mass
    order = np.argsort(-mass / (prompt - np.arange(prompt)), axis=-1)[..., :capacity]
    np.put_along_axis(alive, order, True, axis=-1)
    for t in range(prompt, T):
        mean = np.where(alive, total / np.maximum(t - np.arange(T), 1), np.inf)
        np.put_along_axis(alive, mean.argmin(-1)[..., None], False, axis=-1)
        alive[..., t] = True
        _, cache = jax.jit(decode_step, static_argnums=0)(
            policy, cache, q[:, t : t + 1], {"k": k[:, t : t + 1], "v": v[:, t : t + 1]}
        )
        _, weights = oracle_attention(q[:, t : t + 1], k, v, np.repeat(alive, N // K, axis=1)[:, :, None])
        total += weights.reshape(B, K, N // K, T).mean(2)
        for b, h in np.ndindex(B, K):
            assert sorted(cache.pos[b, h].tolist()) == np.flatnonzero(alive[b, h]).tolist()


def test_no_slot_left_is_reported(qkv):
    q, k, v = qkv
    policy = KnormPolicy(capacity=5)
    cache = init_cache(B, T, SPEC, policy=policy, max_new=1)
    cache = prefill_compress(policy, cache, q[:, :10], {"k": k[:, :10], "v": v[:, :10]})
    token = {"k": k[:, 10:11], "v": v[:, 10:11]}
    _, cache = decode_step(policy, cache, q[:, 10:11], token)
    with pytest.raises(ValueError, match="the cache is full"):
        decode_step(policy, cache, q[:, 10:11], token)
    _, after = jax.jit(decode_step, static_argnums=0)(policy, cache, q[:, 10:11], token)
    assert after.overflow.all()
    np.testing.assert_array_equal(after.pos, cache.pos)


def test_refusals(qkv):
    q, k, v = qkv
    policy = StreamingPolicy(sinks=1, recent=2)
    cache = init_cache(B, T, SPEC, policy=policy)
    new = {"k": k, "v": v}
    filled = prefill_compress(policy, cache, q, new)
    with pytest.raises(ValueError, match="fills an empty cache"):
        prefill_compress(policy, filled, q, new)
    with pytest.raises(ValueError, match="expected T=3"):
        prefill_compress(policy, cache, q[:, :3], new)
    with pytest.raises(ValueError, match="one token"):
        decode_step(policy, filled, q, new)
    with pytest.raises(ValueError, match="window"):
        SnapKVPolicy(capacity=8, window=8)
    with pytest.raises(ValueError, match="kernel"):
        SnapKVPolicy(capacity=8, window=2, kernel=4)
    with pytest.raises(ValueError, match="capacity"):
        KnormPolicy(capacity=0)
    with pytest.raises(ValueError, match="recent >= 1"):
        StreamingPolicy(sinks=0, recent=0)
    with pytest.raises(ValueError, match="a policy manages"):
        init_cache(B, T, SPEC, policy=policy, sinks=1)
    with pytest.raises(ValueError, match="max_new"):
        init_cache(B, T, SPEC, policy=policy, max_new=T + 1)
    with pytest.raises(NotImplementedError, match="budget"):
        CachePolicy().budget(Obs(*heads_major(k, v), jnp.full(B, T)))


def test_needle_layer_heads_do_what_they_are_called():
    layer = needle_layer(B=4, T=64, n_heavy=3)
    _, weights = oracle_attention(layer.q, layer.k, layer.v, np.tri(64, dtype=bool))
    last = weights[:, :, -1]  # [B, N, T]
    row = np.arange(4)
    assert layer.kinds[0] == "retrieval"
    assert (last[row, 0, layer.needle] > 0.5).all()
    for n, kind in enumerate(layer.kinds):
        if kind == "heavy":
            assert (np.take_along_axis(last[:, n], layer.heavy, axis=1).sum(-1) > 0.7).all()
        if kind == "sink":
            assert (last[:, n, 0] > 0.9).all()
        if kind == "local":
            assert (last[:, n, -8:].sum(-1) > 0.8).all()
        if kind == "broad":
            assert last[:, n].max() < 0.1
    np.testing.assert_allclose(np.linalg.norm(layer.v, axis=-1), 1, atol=1e-6)
    assert not (layer.heavy == layer.needle[:, None]).any()
    assert ((layer.needle >= 4) & (layer.needle < 48)).all()
    np.testing.assert_array_equal(layer.q, needle_layer(B=4, T=64, n_heavy=3).q)
    with pytest.raises(ValueError, match="kinds"):
        needle_layer(N=2)
    with pytest.raises(ValueError, match="unknown"):
        needle_layer(N=1, K=1, kinds=("lokal",))
    with pytest.raises(ValueError, match="K: must divide"):
        needle_layer(K=3)


def test_group_votes_lose_the_needle():
    """At 24 of 256 tokens: everything finds it, SnapKV's group mean seldom, the stream never."""
    layer = needle_layer()
    lengths = {"batch": 64, "length": 256, "spec": {"k": (2, 50), "v": (2, 50)}}
    q, k, v = (jnp.asarray(x) for x in (layer.q, layer.k, layer.v))

    def accuracy(policy):
        @jax.jit
        def last_output(q, k, v):
            new = {"k": k, "v": v}
            cache = prefill_compress(policy, init_cache(**lengths, policy=policy, max_new=0), q, new)
            return cached_attention(q[:, -1:], cache)

        return layer.accuracy(last_output(q, k, v)[:, 0])

    assert accuracy(KnormPolicy(capacity=256)) == 1.0
    assert accuracy(SnapKVPolicy(capacity=24, window=8)) <= 0.4
    assert accuracy(StreamingPolicy(sinks=4, recent=20)) <= 0.1
