"""Running a policy: compress the prompt once, then decode token by token in fixed buffers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.core.cache.attend import Read, cached_attention, read_kv
from attnzoo.core.cache.layer import LayerCache, check_lengths, check_new, raise_overflow
from attnzoo.core.cache.policy import CachePolicy, observe, pack


def prefill_compress(
    policy: CachePolicy,
    cache: LayerCache,
    q: Float[Array, "B T N H"],
    new: PyTree[Float[Array, "B T K ..."]],
    lengths: Int[Array, "B"] | None = None,
    *,
    layer: int = 0,
    lse: Float[Array, "B T N"] | None = None,
    token_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    read: Read = read_kv,
) -> LayerCache:
    """Fills an empty cache with what the policy keeps of a prompt, whose own attention is done elsewhere.

    Args:
        policy: static under jit.
        cache: empty, from `init_cache(..., policy=policy, layer=layer)`.
        q: queries of the prompt, position applied (policies look at some of them).
        new: payload of the prompt, tokens-major as for `append`.
        lengths: real tokens of right-padded rows; default all T.
        layer: index of the layer.
        lse: of the prompt's attention (`return_lse=True`); saves policies that need column sums one pass.
        token_ids: for policies that treat special tokens specially.
        scale: of the logits, as in `attention`.
        read: turns the payload into keys and values, as in `cached_attention`.

    Raises:
        ValueError: shapes that do not fit, a cache that is not empty, token ids missing, or (outside jit;
            inside `overflow` is set) more tokens kept than the cache has slots.
    """
    batch, length = q.shape[:2]
    if check_new(cache.payload, new, batch) != length:
        raise ValueError(f"new: expected T={length} tokens as in q {q.shape}")
    if not isinstance(cache.seen, jax.core.Tracer) and np.any(np.asarray(cache.seen) > 0):
        raise ValueError("cache: prefill_compress fills an empty cache; this one has seen tokens already")
    lengths = jnp.full(batch, length, jnp.int32) if lengths is None else check_lengths(lengths, batch, length)
    heads_new = jax.tree.map(lambda x, buffer: jnp.swapaxes(x, 1, 2).astype(buffer.dtype), new, cache.payload)
    k, v = read(heads_new)
    obs = observe(policy, q, k, v, lengths, lse=lse, token_ids=token_ids, scale=scale, layer=layer)
    packed = pack(heads_new, policy.keep(obs) & obs.valid[:, None], cache.slots)
    budget = cache.budget if policy.grows else jnp.minimum(policy.budget(obs), cache.slots)
    filled = dataclasses.replace(
        cache,
        payload=packed.payload,
        pos=packed.pos,
        w=packed.w,
        score=packed.score,
        budget=budget,
        seen=lengths,
        overflow=cache.overflow | packed.overflow,
    )
    raise_overflow(filled, cache.overflow)
    return policy.start(filled, obs)


def decode_step(
    policy: CachePolicy,
    cache: LayerCache,
    q: Float[Array, "B 1 N H"],
    new: PyTree[Float[Array, "B 1 K ..."]],
    lengths: Int[Array, "B"] | None = None,
    *,
    read: Read = read_kv,
    **options: Any,
) -> tuple[Float[Array, "B 1 N Hv"], LayerCache]:
    """One token: choose a slot, write, attend (the token sees itself), let the policy take note.

    The slot is the first empty one while a head is under its budget, else the policy's victim.

    Args:
        policy: static under jit.
        cache: as filled by `prefill_compress`, or empty.
        q, new: query and payload of the token, position `cache.next_positions(1)` applied.
        lengths: 1, or 0 for rows that are finished and must not change; default all 1.
        read, options: as in `cached_attention`.

    Raises:
        ValueError: shapes that do not fit, or (outside jit; inside `overflow` is set) a head without a slot
            for the token: all used and no victim.
    """
    batch = q.shape[0]
    if check_new(cache.payload, new, batch) != 1 or q.shape[1] != 1:
        raise ValueError(f"decode_step: expected one token, got q {q.shape}")
    lengths = jnp.ones(batch, jnp.int32) if lengths is None else check_lengths(lengths, batch, 1)
    active = lengths > 0
    empty, fits = cache.free_slots(1)
    slot = jnp.where(fits[..., 0], empty[..., 0], policy.victim(cache))
    lost = active & jnp.any(slot >= cache.slots, axis=-1)
    slot = jnp.where(active[:, None], slot, cache.slots)
    before = cache.overflow
    heads_new = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), new)
    cache = cache.write(heads_new, slot[..., None], cache.next_positions(1))
    cache = dataclasses.replace(cache, seen=cache.seen + lengths, overflow=before | lost)
    raise_overflow(cache, before)
    if "weights" not in policy.needs:
        return cached_attention(q, cache, read=read, **options), cache
    out, weights = cached_attention(q, cache, read=read, return_weights=True, **options)
    weights = jnp.where(active[:, None, None, None], weights, 0.0)
    return out, policy.update(cache, weights)
