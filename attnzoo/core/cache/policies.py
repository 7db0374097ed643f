"""The baseline policies that papers compare with."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cache.layer import EMPTY, LayerCache
from attnzoo.core.cache.policy import CachePolicy, Obs


@dataclass(frozen=True)
class FullCachePolicy(CachePolicy):
    """Keeps everything; the reference of every comparison."""

    def slots(self, layer: int, length: int, max_new: int) -> int:
        return length + max_new

    def budget(self, obs: Obs) -> Int[Array, "B K"]:
        return jnp.full(obs.k.shape[:2], obs.k.shape[2], jnp.int32)

    def score(self, obs: Obs) -> Float[Array, "B K T"]:
        return jnp.zeros(obs.k.shape[:3], jnp.float32)


@dataclass(frozen=True)
class CapacityPolicy(CachePolicy):
    """Keeps `capacity` prompt tokens in every head and layer; a subclass says by which `score`.

    Generated tokens come on top of them, or within them if the subclass sets `grows = False`.
    """

    capacity: int

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity: must be at least 1 token, got {self.capacity}")

    def slots(self, layer: int, length: int, max_new: int) -> int:
        if self.grows:
            return min(self.capacity, length) + max_new
        return min(self.capacity, length + max_new)

    def budget(self, obs: Obs) -> Int[Array, "B K"]:
        return jnp.full(obs.k.shape[:2], self.capacity, jnp.int32)


@dataclass(frozen=True)
class StreamingPolicy(CachePolicy):
    """Attention sinks and a rolling window (StreamingLLM; Xiao et al., 2024, arXiv 2309.17453, §3.2).

    Keeps the first `sinks` tokens and the last `recent`, the current one included, in `sinks + recent` slots
    that are reused in a ring while decoding. The paper renumbers positions inside the cache; here keys stay
    rotated to their original positions, so the distance between sinks and window grows with the text.
    """

    grows = False

    sinks: int = 4
    recent: int = 252

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise ValueError(f"needs sinks >= 0 and recent >= 1, got sinks={self.sinks}, recent={self.recent}")

    def slots(self, layer: int, length: int, max_new: int) -> int:
        return min(self.sinks + self.recent, length + max_new)

    def budget(self, obs: Obs) -> Int[Array, "B K"]:
        return jnp.full(obs.k.shape[:2], self.sinks + self.recent, jnp.int32)

    def score(self, obs: Obs) -> Float[Array, "B K T"]:
        return jnp.broadcast_to(jnp.arange(obs.k.shape[2], dtype=jnp.float32), obs.k.shape[:3])

    def forced(self, obs: Obs) -> Bool[Array, "B K T"]:
        return jnp.broadcast_to(jnp.arange(obs.k.shape[2]) < self.sinks, obs.k.shape[:3])

    def victim(self, cache: LayerCache) -> Int[Array, "B K"]:
        rolling = cache.pos >= self.sinks
        return jnp.argmin(jnp.where(rolling, cache.pos, jnp.iinfo(jnp.int32).max), axis=-1)


@dataclass(frozen=True)
class SnapKVPolicy(CapacityPolicy):
    """The last `window` queries vote for the rest of the prompt (SnapKV; Li et al., 2024, arXiv 2404.14469).

    A token's score is the mean weight that the window's queries put on it, average-pooled over `kernel`
    neighbours (zero padding counted) and averaged over the query heads of the group. The window itself stays;
    `capacity` includes it.
    """

    needs = frozenset({"attn_win"})

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.window < self.capacity:
            raise ValueError(f"window: must be positive and smaller than capacity={self.capacity}, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel: must be odd and positive, got {self.kernel}")

    def score(self, obs: Obs) -> Float[Array, "B K T"]:
        assert obs.attn_win is not None
        votes = jnp.where(obs.last(self.window)[:, None], 0.0, obs.attn_win.mean(axis=2))  # [B, N, T]
        return obs.per_kv_head(average_pool(votes, self.kernel))

    def forced(self, obs: Obs) -> Bool[Array, "B K T"]:
        return jnp.broadcast_to(obs.last(self.window)[:, None], obs.k.shape[:3])


@dataclass(frozen=True)
class ObservedAttentionPolicy(CapacityPolicy):
    """Heavy hitters: the largest mean observed weights stay (H2O; Zhang et al., 2023, arXiv 2306.14048).

    A token's score is the weight it received, summed over the queries and averaged over the group, divided by
    the number of queries that could see it. While decoding the head stays within `capacity`: each new token
    replaces the one whose mean weight so far is smallest.
    """

    needs = frozenset({"mass", "weights"})
    grows = False

    def score(self, obs: Obs) -> Float[Array, "B K T"]:
        assert obs.mass is not None
        observers = obs.length[:, None] - jnp.arange(obs.k.shape[2])
        return obs.per_kv_head(obs.mass) / jnp.maximum(observers, 1)[:, None]

    def start(self, cache: LayerCache, obs: Obs) -> LayerCache:
        assert obs.mass is not None
        mass = jnp.take_along_axis(obs.per_kv_head(obs.mass), jnp.maximum(cache.pos, 0), axis=-1)
        return dataclasses.replace(cache, score=jnp.where(cache.pos == EMPTY, 0.0, mass))

    def victim(self, cache: LayerCache) -> Int[Array, "B K"]:
        observers = cache.seen[:, None, None] - cache.pos
        return jnp.argmin(jnp.where(cache.pos == EMPTY, jnp.inf, cache.score / observers), axis=-1)

    def update(self, cache: LayerCache, weights: Float[Array, "B N 1 S"]) -> LayerCache:
        batch, heads, slots = cache.pos.shape
        group = weights.reshape(batch, heads, -1, slots).mean(axis=2)
        return dataclasses.replace(cache, score=cache.score + group)


@dataclass(frozen=True)
class KnormPolicy(CapacityPolicy):
    """Keys of small norm stay (Devoto et al., 2024, arXiv 2406.11430): they draw the most attention."""

    def score(self, obs: Obs) -> Float[Array, "B K T"]:
        return -jnp.linalg.norm(obs.k.astype(jnp.float32), axis=-1)


def average_pool(x: Float[Array, "*B T"], kernel: int) -> Float[Array, "*B T"]:
    """Mean over `kernel` (odd) neighbours of the last axis, stride 1; zeros beyond the ends count."""
    window = (1,) * (x.ndim - 1) + (kernel,)
    half = ((0, 0),) * (x.ndim - 1) + ((kernel // 2, kernel // 2),)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1,) * x.ndim, half) / kernel
