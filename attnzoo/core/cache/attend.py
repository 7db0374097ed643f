"""Attention over a cache."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.core.attention import attention
from attnzoo.core.cache.layer import EMPTY, LayerCache
from attnzoo.core.cache.paged import PagedCache
from attnzoo.core.masks import Causal
from attnzoo.core.scores import Bias

Read = Callable[[PyTree], tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]]
"""How a payload becomes keys and values, both heads-major."""


def read_kv(payload: PyTree) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S Hv"]]:
    """The default `read`: payloads that are {"k": ..., "v": ...}."""
    return payload["k"], payload["v"]


def weigh_slots(pos: Int[Array, "B K S"], w: Float[Array, "B K S"]) -> tuple[Float[Array, "B K S"], Int[Array, "B K S"]]:
    """(log w, positions) of the slots of a weighted cache: what their logits gain, slots of weight 0 being made empty."""
    some = w > 0
    return jnp.log(jnp.where(some, w, 1.0)), jnp.where(some, pos, EMPTY)


def cached_attention(
    q: Float[Array, "B T N H"],
    cache: Any,
    *,
    q_positions: Int[Array, "B T"] | None = None,
    mask: Any = Causal(),  # noqa: B008  (immutable)
    read: Read = read_kv,
    **options: Any,
) -> Any:
    """`attention` of T queries over everything a cache holds, the tokens just appended included.

    Logits are `scale * q·k + log w`; a slot is visible if it holds something and `mask` admits its position.

    Args:
        q: queries, position already applied.
        cache: any layout with a `view()`: `LayerCache`, `PagedCache`.
        q_positions: positions of the queries, `cache.next_positions(T)` taken before the append. May be left
            out for T = 1 (the newest token of each row) and when `mask` is None.
        mask: compared with token positions; the default hides slots whose position is greater than the
            query's. None shows every slot that holds something (cross-attention memories, imported prompt
            modules).
        read: turns the payload into heads-major keys and values; latents and factors are expanded here. Heads
            that share one payload head may be returned expanded: (B, N, S, H) from a payload of one head.
        options: score, weights, scale, backend, return_lse, return_weights, ..., as in `attention`.

    Returns:
        out [B, T, N, Hv], or what `attention` returns when more is asked for. Rows that see nothing give 0.

    Raises:
        ValueError: T > 1 queries under a mask without `q_positions`.
    """
    batch, length, heads, _ = q.shape
    if q_positions is None:
        if length > 1 and mask is not None:
            raise ValueError(
                f"q_positions: needed for T={length} queries under {mask}; take cache.next_positions(T) before append"
            )
        q_positions = jnp.broadcast_to(cache.seen[:, None] - 1, (batch, length))
    if isinstance(cache, PagedCache) and read is read_kv:
        k, v = (jnp.swapaxes(x, 1, 2) for x in read(cache.payload))
        placed: dict[str, Any] = {"q_positions": q_positions, "kv_positions": cache.positions, "pages": cache.table}
        return attention(q, k, v, mask=mask, **placed, **options)
    view: LayerCache = cache.view()
    k, v = read(view.payload)
    one = v is k  # latents are both
    k = jnp.swapaxes(k, 1, 2)
    v = k if one else jnp.swapaxes(v, 1, 2)
    pos, w = view.pos, view.w
    if k.shape[2] != pos.shape[1]:
        pos, w = (jnp.broadcast_to(x, (batch, k.shape[2], k.shape[1])) for x in (pos, w))
    bias = None
    if view.weighted:
        log_w, pos = weigh_slots(pos, w)
        bias = jnp.repeat(log_w, heads // k.shape[2], axis=1)[:, :, None, :]  # [B, N, 1, S]
    return attention(
        q,
        k,
        v,
        mask=mask,
        bias=bias,
        q_positions=q_positions,
        kv_positions=pos,
        **options,
    )


def cached_weights(
    logits: Float[Array, "B N T S"],
    cache: Any,
    *,
    q_positions: Int[Array, "B T"] | None = None,
    mask: Any = Causal(),  # noqa: B008  (immutable)
    **options: Any,
) -> Float[Array, "B N T S"]:
    """How `cached_attention` would weigh the slots under logits that are more than one product q·k; float32.

    For caches of factors, whose logits the caller computes slot by slot. All T×S cells are held: meant for few
    queries.

    Args:
        logits: scaled, of every slot in the order of `cache.view()`; what is hidden or empty may hold anything finite.
        options: weights, ..., as in `attention`; q_positions, mask as in `cached_attention`.
    """
    batch, heads, length, slots = logits.shape
    kv_heads = cache.view().pos.shape[1]
    nothing = jnp.zeros((batch, kv_heads, slots, 1), jnp.float32)
    return cached_attention(
        jnp.zeros((batch, length, heads, 1), jnp.float32),
        cache,
        q_positions=q_positions,
        mask=mask,
        read=lambda _: (nothing, nothing),
        score=Bias(logits.astype(jnp.float32)),
        return_weights=True,
        **{**options, "backend": "dense"},
    )[1]
