"""Key/value caches: fixed-size pytrees that everything jits over, and the protocol of policies that evict.

A layer that decodes is written once, for prompts (T > 1) and single tokens (T = 1) alike:

    cache = init_cache(batch, length, {"k": (K, H), "v": (K, Hv)}, dtype=jnp.bfloat16)

    positions = cache.next_positions(T)                    # [B, T], before the append; also what RoPE takes
    q, k = rope(q, positions), rope(k, positions)          # q [B, T, N, H], k [B, T, K, H], v [B, T, K, Hv]
    cache = append(cache, {"k": k, "v": v}, lengths)       # lengths [B] of right-padded rows, or None
    out = cached_attention(q, cache, q_positions=positions)  # [B, T, N, Hv]; causal by position

- `lengths` makes ragged batches: padding is neither written nor counted, so every row goes on at its own
  length (`cache.seen`). The outputs of padded query rows are finite and meaningless.
- Donate the cache to a jitted step (`jax.jit(step, donate_argnames="cache")`): writes are then in place; in a
  `lax.scan` they are anyway.
- Any further mask is compared with positions: `cached_attention(..., mask=Causal() & SlidingWindow(256))`.
- Memories of cross-attention: append once, then attend with `mask=None`.
- The payload is any pytree of per-token arrays. A latent cache holds {"c": (1, r), "k_rope": (1, P)} and
  passes `read=lambda p: (keys, values)` to `cached_attention`; a layer that shares another's values holds
  {"k": ...}. Factors whose logits are no single product of query and key go through `cached_weights`.
- `init_paged_cache` takes the place of `init_cache` without any other change.
- `init_cache(..., sinks=n)` is a rolling window: decode without end in a fixed number of slots.
- Policies that compress replace the two lines by `prefill_compress(policy, cache, q, new, lengths)` after the
  prompt's own attention, and `out, cache = decode_step(policy, cache, q, new)` per token.

Layout: projections make tokens-major [B, T, K, ·], caches hold heads-major (B, K, S, ·); `append` and
`cached_attention` are the only places that convert. Running out of slots raises outside jit; inside it drops
the token and sets `cache.overflow`.
"""

from attnzoo.core.cache.attend import cached_attention, cached_weights, read_kv, weigh_slots
from attnzoo.core.cache.decode import decode_step, prefill_compress
from attnzoo.core.cache.layer import EMPTY, LayerCache, append, cache_bytes, init_cache
from attnzoo.core.cache.paged import PagedCache, init_paged_cache
from attnzoo.core.cache.policies import (
    CapacityPolicy,
    FullCachePolicy,
    KnormPolicy,
    ObservedAttentionPolicy,
    SnapKVPolicy,
    StreamingPolicy,
    average_pool,
)
from attnzoo.core.cache.policy import (
    CachePolicy,
    Obs,
    attention_probe,
    observe,
    pack,
    topk_keep,
    window_weights,
)
from attnzoo.core.merge import merge_lse

__all__ = [
    "EMPTY",
    "CachePolicy",
    "CapacityPolicy",
    "FullCachePolicy",
    "KnormPolicy",
    "LayerCache",
    "Obs",
    "ObservedAttentionPolicy",
    "PagedCache",
    "SnapKVPolicy",
    "StreamingPolicy",
    "append",
    "attention_probe",
    "average_pool",
    "cache_bytes",
    "cached_attention",
    "cached_weights",
    "decode_step",
    "init_cache",
    "init_paged_cache",
    "merge_lse",
    "observe",
    "pack",
    "prefill_compress",
    "read_kv",
    "topk_keep",
    "weigh_slots",
    "window_weights",
]
