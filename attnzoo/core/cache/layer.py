"""The dense cache layout: every row and kv head owns S slots of one buffer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

if TYPE_CHECKING:
    from attnzoo.core.cache.policy import CachePolicy

EMPTY = -1
"""Position of a slot that holds nothing. No mask can make such a slot visible."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What one attention layer remembers: B rows, K kv heads, S slots; a pytree of fixed shapes.

    Slots may be filled in any order and may differ between heads: attention reads `pos`, never the slot
    number.

    Attributes:
        payload: pytree of (B, K, S, ...) leaves; {"k": (B, K, S, H), "v": (B, K, S, Hv)} for plain attention.
            Keys are stored with their position already applied (rotary) and are never rotated again.
        pos: token position of each slot, `EMPTY` (-1) where the slot is free.
        w: how many tokens a slot stands for: 1 normally, 0 empty, > 1 for a summary token.
        score: a running statistic of each slot, owned by the policy.
        budget: how many slots a head may use, at most S.
        seen: tokens this row has been given so far, which is also the position of the next one.
        overflow: set, inside jit, once a row lost a token because there was no slot for it.
        aux: any further state of a policy.
        weighted: whether attention must count multiplicities (static; adds a bias of log w).
        sinks: None for a cache that ends at S tokens; n for a rolling one that keeps the first n tokens and
            the last S - n (static). Keys of a rolling cache keep their original positions, they are not
            re-rotated.
    """

    payload: PyTree[Array]
    pos: Int[Array, "B K S"]
    w: Float[Array, "B K S"]
    score: Float[Array, "B K S"]
    budget: Int[Array, "B K"]
    seen: Int[Array, "B"]
    overflow: Bool[Array, "B"]
    aux: Any = None
    weighted: bool = dataclasses.field(default=False, metadata={"static": True})
    sinks: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def slots(self) -> int:
        return self.pos.shape[-1]

    @property
    def used(self) -> Int[Array, "B K"]:
        """Slots that hold something."""
        return jnp.sum(self.pos != EMPTY, axis=-1, dtype=jnp.int32)

    def room(self) -> str:
        """How much fits, in words for error messages."""
        return f"{np.asarray(self.budget).min()} slots per head"

    def next_positions(self, length: int) -> Int[Array, "B T"]:
        """Positions of the next `length` tokens of each row: call it before `append`."""
        return self.seen[:, None] + jnp.arange(length, dtype=jnp.int32)

    def view(self) -> Self:
        """The cache as dense slots; a paged cache gathers its pages here."""
        return self

    def write(
        self,
        new: PyTree[Float[Array, "B K T ..."]],
        slots: Int[Array, "B K T"],
        pos: Int[Array, "B T"],
        w: Float[Array, "B K T"] | float = 1.0,
    ) -> Self:
        """Puts heads-major `new` into the named slots; a slot number of S or more writes nothing."""
        b = jnp.arange(slots.shape[0])[:, None, None]
        k = jnp.arange(slots.shape[1])[None, :, None]

        def put(buffer, value):
            return buffer.at[b, k, slots].set(jnp.asarray(value, buffer.dtype), mode="drop")

        return dataclasses.replace(
            self,
            payload=jax.tree.map(put, self.payload, new),
            pos=put(self.pos, pos[:, None, :]),
            w=put(self.w, w),
            score=put(self.score, 0.0),
        )

    def extend(self, new: PyTree[Float[Array, "B K T ..."]], lengths: Int[Array, "B"]) -> Self:
        """Writes the first `lengths` of T heads-major tokens; use `append`, which also checks shapes."""
        length = jax.tree.leaves(new)[0].shape[2]
        pos = self.next_positions(length)
        valid = jnp.arange(length) < lengths[:, None]  # [B, T]
        if self.sinks is None:
            slots, fits = self.free_slots(length)
        else:
            slots = self._rolling_slots(pos, lengths)
            fits = jnp.ones(slots.shape, bool)
        lost = jnp.any(valid[:, None, :] & ~fits, axis=(1, 2))
        slots = jnp.where(valid[:, None, :] & fits, slots, self.slots)
        written = self.write(new, slots, pos)
        return dataclasses.replace(written, seen=self.seen + lengths, overflow=self.overflow | lost)

    def free_slots(self, length: int) -> tuple[Int[Array, "B K T"], Bool[Array, "B K T"]]:
        """The first `length` empty slots of each head (S: there is none), and which are within the budget."""
        number = jnp.where(self.pos == EMPTY, jnp.arange(self.slots, dtype=jnp.int32), self.slots)
        if length == 1:
            slots = jnp.min(number, axis=-1, keepdims=True)
        else:
            slots = jnp.sort(number, axis=-1)[..., :length]
            beyond = [(0, 0), (0, 0), (0, max(length - self.slots, 0))]
            slots = jnp.pad(slots, beyond, constant_values=self.slots)
        return slots, self.used[..., None] + jnp.arange(length) < self.budget[..., None]

    def _rolling_slots(self, pos: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Int[Array, "B K T"]:
        sinks = self.sinks or 0
        window = self.slots - sinks
        ring = sinks + (pos - sinks) % window
        # A token that a later one of the same call would overwrite must not be written at all: the order of
        # colliding writes is undefined.
        last = self.seen + lengths
        slots = jnp.where(pos < sinks, pos, jnp.where(pos >= last[:, None] - window, ring, self.slots))
        return jnp.broadcast_to(slots[:, None, :], (*self.pos.shape[:2], pos.shape[1]))


def init_cache(
    batch: int,
    length: int,
    spec: PyTree,
    *,
    dtype: DTypeLike = jnp.float32,
    sinks: int | None = None,
    policy: "CachePolicy | None" = None,
    layer: int = 0,
    max_new: int = 0,
) -> LayerCache:
    """An empty cache for `length` tokens per row.

    Args:
        batch: B.
        length: tokens a row will hold, prompt and generated ones together.
        spec: what one token leaves behind, a pytree of (heads, *features) tuples, e.g.
            {"k": (K, H), "v": (K, Hv)}, or of `jax.ShapeDtypeStruct`s with such shapes where leaves differ in
            dtype. All leaves have the same number of heads; give 1 where nothing is per head (a shared
            latent).
        dtype: of the leaves given as tuples; what is appended is cast to it.
        sinks: None for a cache that ends after `length` tokens; n for a rolling one of `length` slots that
            keeps the first n tokens and the last `length - n`, without end. Appending T tokens at once to a
            rolling cache and then attending is exact for a window of at most `length - n - T + 1` tokens.
        policy: decides the number of slots (and what is kept: see `prefill_compress` and `decode_step`).
        layer: index of the layer, for policies whose budget differs by layer.
        max_new: how many of `length` are generated after the prompt; only policies ask.

    Raises:
        ValueError: a size that is not positive, leaves with different numbers of heads, `sinks` that leave no
            rolling slot, or `sinks` together with `policy`.
    """
    leaves = [_leaf(s, dtype) for s in jax.tree.leaves(spec, is_leaf=_is_shape)]
    treedef = jax.tree.structure(spec, is_leaf=_is_shape)
    heads = {leaf.shape[0] for leaf in leaves}
    if len(heads) != 1:
        raise ValueError(f"spec: all leaves need the same number of heads (1 where a leaf has none), got {spec}")
    if batch < 0 or length < 1:
        raise ValueError(f"init_cache: needs batch >= 0 and length >= 1, got batch={batch}, length={length}")
    if policy is not None:
        if sinks is not None:
            raise ValueError("sinks: a policy manages its own slots; give StreamingPolicy(sinks=...) instead")
        if not 0 <= max_new <= length:
            raise ValueError(f"max_new: must be between 0 and length={length}, got {max_new}")
        length = policy.slots(layer, length - max_new, max_new)
    if sinks is not None and not 0 <= sinks < length:
        raise ValueError(f"sinks: a rolling cache of length={length} needs 0 <= sinks < length, got {sinks}")
    shape = (batch, heads.pop(), length)
    buffers = [jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    return LayerCache(
        payload=jax.tree.unflatten(treedef, buffers),
        pos=jnp.full(shape, EMPTY, jnp.int32),
        w=jnp.zeros(shape, jnp.float32),
        score=jnp.zeros(shape, jnp.float32),
        budget=jnp.full(shape[:2], length, jnp.int32),
        seen=jnp.zeros(batch, jnp.int32),
        overflow=jnp.zeros(batch, bool),
        weighted=policy is not None and policy.weighted,
        sinks=sinks,
    )


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def _leaf(x: Any, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    if _is_shape(x):
        x = jax.ShapeDtypeStruct(x, dtype)
    if not isinstance(x, jax.ShapeDtypeStruct) or len(x.shape) < 1:
        raise ValueError(f"spec: leaves are (heads, *features) tuples or jax.ShapeDtypeStruct, got {x!r}")
    return x


def cache_bytes(cache: PyTree, *, bookkeeping: bool = False) -> int:
    """Bytes of the payload buffers of all caches in a pytree: slots × numbers × itemsize, as papers count.

    `bookkeeping=True` adds positions, multiplicities, statistics, block tables and a policy's own state.
    Allocated, not used, slots are counted; works on `jax.eval_shape` results too.
    """
    if bookkeeping:
        counted = cache
    else:
        is_cache = lambda x: hasattr(x, "payload")  # noqa: E731
        counted = [c.payload for c in jax.tree.leaves(cache, is_leaf=is_cache) if is_cache(c)]
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(counted))


def append(
    cache: Any,
    new: Mapping[str, Array] | PyTree[Float[Array, "B T K ..."]],
    lengths: Int[Array, "B"] | None = None,
) -> Any:
    """Adds T tokens per row to a cache of any layout; prefill (T > 1) and decode (T = 1) alike.

    This is the one place where the tokens-major arrays of a projection, [B, T, K, ...], become the
    heads-major ones of a cache, (B, K, S, ...); `cached_attention` is where they are read back.

    Args:
        cache: from `init_cache` or `init_paged_cache`.
        new: the payload of the new tokens, tokens-major, same tree as the cache's payload; cast to its dtype.
        lengths: how many of the T tokens of each row are real, for right-padded rows; default all. The rest
            is not written and does not count as seen.

    Raises:
        ValueError: shapes that do not fit the cache, lengths of a wrong shape; a row that runs out of room,
            where the values are known (outside jit). Inside jit such tokens are dropped and `overflow` set.
    """
    batch = cache.seen.shape[0]
    length = check_new(cache.payload, new, batch)
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    else:
        lengths = check_lengths(lengths, batch, length)
    before = cache.overflow
    cache = cache.extend(jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), new), lengths)
    raise_overflow(cache, before)
    return cache


def raise_overflow(cache: Any, before: Bool[Array, "B"]) -> None:
    """Raises ValueError for rows whose overflow flag is newly set, outside jit."""
    if isinstance(cache.overflow, jax.core.Tracer) or isinstance(before, jax.core.Tracer):
        return
    rows = np.flatnonzero(np.asarray(cache.overflow) & ~np.asarray(before))
    if rows.size:
        raise ValueError(
            f"the cache is full: row(s) {rows.tolist()} were given {np.asarray(cache.seen)[rows].tolist()} "
            f"tokens in all, but there is room for {cache.room()}; make it longer, or use a rolling cache "
            "or a policy that evicts"
        )


def check_new(payload: PyTree[Array], new: PyTree[Array], batch: int) -> int:
    """The number of new tokens T, after checking that `new` is [B, T, K, ...] like the payload."""
    expected, given = str(jax.tree.structure(payload)), str(jax.tree.structure(new))
    if expected != given:
        raise ValueError(f"new: expected the tree of the cache's payload, {expected}, got {given}")
    lengths = set()
    for (path, value), buffer in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(payload), strict=True):
        heads, features = buffer.shape[1], buffer.shape[3:]
        if value.ndim != buffer.ndim or value.shape[0] != batch or value.shape[2:] != (heads, *features):
            shape = ", ".join(map(str, (batch, "T", heads, *features)))
            raise ValueError(f"new{jax.tree_util.keystr(path)}: expected tokens-major shape [{shape}], got {list(value.shape)}")
        lengths.add(value.shape[1])
    if len(lengths) != 1:
        raise ValueError(f"new: all leaves need the same number of tokens T, got {sorted(lengths)}")
    return lengths.pop()


def check_lengths(lengths: Int[Array, "B"], batch: int, length: int) -> Int[Array, "B"]:
    lengths = jnp.asarray(lengths, jnp.int32)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), one per row, got {lengths.shape}")
    if not isinstance(lengths, jax.core.Tracer) and np.any((np.asarray(lengths) < 0) | (np.asarray(lengths) > length)):
        raise ValueError(f"lengths: must be between 0 and the T={length} tokens given, got {lengths}")
    return jnp.clip(lengths, 0, length)
