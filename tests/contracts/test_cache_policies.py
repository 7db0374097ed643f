"""What every cache policy promises. A new policy joins by a row in POLICIES.

Each row makes the policy for a number of prompt tokens to keep per head; UNLIMITED is an infinite budget.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.cache import (
    FullCachePolicy,
    KnormPolicy,
    ObservedAttentionPolicy,
    SnapKVPolicy,
    StreamingPolicy,
    cache_bytes,
    decode_step,
    init_cache,
    observe,
    prefill_compress,
)
from attnzoo.testing import oracle_attention, oracle_cached_attention

POLICIES = {
    "full": lambda capacity: FullCachePolicy(),
    "streaming": lambda capacity: StreamingPolicy(sinks=2, recent=capacity - 2),
    "snapkv": lambda capacity: SnapKVPolicy(capacity=capacity, window=3, kernel=3),
    "observed": lambda capacity: ObservedAttentionPolicy(capacity=capacity),
    "knorm": lambda capacity: KnormPolicy(capacity=capacity),
}
policies = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)

B, T, NEW, N, K, H = 3, 20, 6, 4, 2, 8
SPEC = {"k": (K, H), "v": (K, H)}
UNLIMITED, TIGHT = T + NEW, 8
LENGTHS = np.array([20, 13, 5])


@pytest.fixture
def text(rng):
    """q, k, v of prompt and continuation."""
    return tuple(jnp.asarray(rng.normal(size=(B, T + NEW, n, H)), jnp.float32) for n in (N, K, K))


def empty(policy):
    return init_cache(B, T + NEW, SPEC, policy=policy, layer=1, max_new=NEW)


@partial(jax.jit, static_argnums=0)
def prefill(policy, q, k, v, lengths):
    return prefill_compress(policy, empty(policy), q, {"k": k, "v": v}, lengths, layer=1)


@partial(jax.jit, static_argnums=0)
def step(policy, cache, q, k, v):
    return decode_step(policy, cache, q, {"k": k, "v": v})


def prompt(text):
    """The prompt of each row, right-padded."""
    return tuple(x[:, :T] for x in text)


def token(text, index):
    """Row b's token number index[b]."""
    return tuple(jnp.take_along_axis(x, index[:, None, None, None], axis=1) for x in text)


def run(policy, text, lengths=LENGTHS):
    """The compressed prompt, then (query, position, output, cache) of each generated token."""
    cache = prefill(policy, *prompt(text), jnp.asarray(lengths))
    steps = []
    for i in range(NEW):
        q, k, v = token(text, jnp.asarray(lengths + i))
        out, cache_after = step(policy, cache, q, k, v)
        steps.append((q, lengths + i, out, cache_after))
        cache = cache_after
    return prefill(policy, *prompt(text), jnp.asarray(lengths)), steps


def obs(policy, text, lengths=LENGTHS):
    q, k, v = prompt(text)
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    return observe(policy, q, k, v, jnp.asarray(lengths), layer=1)


@policies
def test_unlimited_budget_is_full_attention(text, make):
    cache, steps = run(make(UNLIMITED), text)
    np.testing.assert_array_equal(cache.used, np.broadcast_to(LENGTHS[:, None], (B, K)))
    for q, position, out, _ in steps:
        visible = np.arange(T + NEW) <= position[:, None]
        want, _ = oracle_attention(q, text[1], text[2], visible[:, None, None])
        np.testing.assert_allclose(out, want, atol=2e-6)


@policies
def test_output_is_dense_attention_over_the_kept_positions(text, make):
    """The slots hold the tokens they claim to hold, and attention sees those and no others."""
    _, steps = run(make(TIGHT), text)
    for q, position, out, cache in steps:
        kept = np.zeros((B, K, T + NEW + 1), bool)
        np.put_along_axis(kept, np.asarray(cache.pos), True, axis=-1)  # -1, empty, lands in the extra column
        kept = np.repeat(kept[..., :-1], N // K, axis=1)[:, :, None]
        assert kept[np.arange(B), :, 0, position].all(), "the newest token is in the cache"
        if cache.weighted:  # summary slots are no tokens: the cache itself is the reference
            want, _ = oracle_cached_attention(q, cache, position[:, None])
        else:
            want, _ = oracle_attention(q, text[1], text[2], kept)
        np.testing.assert_allclose(out, want, atol=2e-6)


@policies
@pytest.mark.parametrize("capacity", [TIGHT, UNLIMITED])
def test_used_stays_within_the_budget(text, make, capacity):
    policy = make(capacity)
    cache, steps = run(policy, text)
    allowed = np.minimum(policy.budget(obs(policy, text)), LENGTHS[:, None])
    assert (np.asarray(cache.used) <= allowed).all()
    slots = policy.slots(1, T, NEW)
    for _, position, _, after in [(None, LENGTHS - 1, None, cache), *steps]:
        assert after.slots == slots
        assert (after.used <= after.budget).all()
        assert (after.budget <= slots).all()
        assert (after.seen == position + 1).all()
        assert not after.overflow.any()
        assert ((np.asarray(after.w) > 0) == (np.asarray(after.pos) >= 0)).all()
    assert cache_bytes(cache) == B * K * slots * 2 * H * 4


@policies
def test_forced_tokens_survive_the_prompt(text, make):
    policy = make(TIGHT)
    seen = obs(policy, text)
    forced, keep = np.asarray(policy.forced(seen) & seen.valid[:, None]), np.asarray(policy.keep(seen))
    assert forced.sum(-1).max() <= TIGHT
    assert (keep | ~forced).all()
    held = np.asarray(prefill(policy, *prompt(text), jnp.asarray(LENGTHS)).pos)
    for b, h in np.ndindex(B, K):
        assert set(np.flatnonzero(forced[b, h])) <= set(held[b, h])
        assert set(np.flatnonzero(keep[b, h])) == set(held[b, h]) - {-1}


@policies
def test_padding_is_never_kept_and_never_matters(text, make):
    policy = make(TIGHT)
    real = (jnp.arange(T) < LENGTHS[:, None])[:, :, None, None]
    clean = prefill(policy, *prompt(text), jnp.asarray(LENGTHS))
    assert (np.asarray(clean.pos) < LENGTHS[:, None, None]).all()
    dirty = prefill(policy, *(jnp.where(real, x, jnp.nan) for x in prompt(text)), jnp.asarray(LENGTHS))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(a, b)


@policies
def test_rows_are_independent(text, make):
    policy = make(TIGHT)
    _, steps = run(policy, text)
    lengths = np.where(np.arange(B) == 1, 17, LENGTHS)
    _, others = run(policy, tuple(x.at[1].multiply(-2.0) for x in text), lengths)
    for (_, _, out, cache), (_, _, other_out, other_cache) in zip(steps, others, strict=True):
        for a, b in zip(*map(jax.tree.leaves, ((out, cache), (other_out, other_cache))), strict=True):
            np.testing.assert_array_equal(a[jnp.asarray([0, 2])], b[jnp.asarray([0, 2])])


@policies
def test_one_compile_for_all_contents(text, make):
    policy, traces = make(TIGHT), []

    @jax.jit
    def generate(q, k, v, lengths):
        traces.append(1)
        cache = prefill_compress(policy, empty(policy), q[:, :T], {"k": k[:, :T], "v": v[:, :T]}, lengths, layer=1)

        def one(cache, token):
            q, k, v = (x[:, None] for x in token)
            out, cache = decode_step(policy, cache, q, {"k": k, "v": v})
            return cache, out

        return jax.lax.scan(one, cache, tuple(jnp.moveaxis(x[:, T:], 1, 0) for x in (q, k, v)))

    for scale, lengths in ((1.0, LENGTHS), (-3.0, LENGTHS[::-1].copy()), (0.0, np.zeros(B, int))):
        cache, out = generate(*(scale * x for x in text), jnp.asarray(lengths))
        assert np.isfinite(out).all()
        assert (cache.seen == lengths + NEW).all()
    assert len(traces) == 1


@policies
def test_jit_equals_eager_and_finished_rows_stand_still(text, make):
    policy = make(TIGHT)
    q, k, v = prompt(text)
    cache = prefill_compress(policy, empty(policy), q, {"k": k, "v": v}, jnp.asarray(LENGTHS), layer=1)
    jitted = prefill(policy, q, k, v, jnp.asarray(LENGTHS))
    np.testing.assert_array_equal(cache.pos, jitted.pos)
    q, k, v = token(text, jnp.asarray(LENGTHS))
    out, after = decode_step(policy, cache, q, {"k": k, "v": v}, jnp.asarray([1, 0, 1]))
    want, all_after = step(policy, jitted, q, k, v)
    moving = jnp.asarray([0, 2])
    np.testing.assert_allclose(out[moving], want[moving], atol=2e-6)
    np.testing.assert_array_equal(after.pos[moving], all_after.pos[moving])
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a[1], b[1])


@policies
def test_low_precision_caches(text, make):
    policy = make(TIGHT)
    q, k, v = (x.astype(jnp.bfloat16) for x in prompt(text))
    cache = init_cache(B, T + NEW, SPEC, policy=policy, max_new=NEW, dtype=jnp.bfloat16)
    cache = prefill_compress(policy, cache, q, {"k": k, "v": v})
    q, k, v = token(text, jnp.full(B, T))
    out, after = decode_step(policy, cache, q.astype(jnp.bfloat16), {"k": k, "v": v})
    want, _ = oracle_cached_attention(q.astype(jnp.bfloat16), after, np.full((B, 1), T))
    np.testing.assert_allclose(out.astype(jnp.float32), want, atol=0.03)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, cache)


@policies
def test_policies_are_static_values(make):
    assert make(TIGHT) == make(TIGHT)
    assert hash(make(TIGHT)) == hash(make(TIGHT))
