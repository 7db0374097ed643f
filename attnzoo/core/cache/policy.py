"""The protocol of cache policies: which tokens of a prompt stay, and which go while decoding."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from attnzoo.core.cache.layer import EMPTY, LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Obs:
    """What a policy may look at after the prompt: heads-major, T prompt tokens, right-padded. See `observe`.

    Attributes:
        k, v: keys (position applied) and values of the prompt.
        length: real tokens of each row.
        q_win: the queries of the last W real tokens of each row.
        q_pos: their positions; -1 where a row is shorter than W (such queries attend to nothing).
        attn_win: softmax weights of `q_win` over all keys they see, window included.
        mass: column sums of the whole causal attention map, Σ_t A[t, s].
        attn: the map itself; only tests and offline calibration should ask for T×T numbers.
        token_ids: token ids of the prompt, where the caller gave them.
        layer: index of the layer (static).
    """

    k: Float[Array, "B K T H"]
    v: Float[Array, "B K T Hv"]
    length: Int[Array, "B"]
    q_win: Float[Array, "B N W H"] | None = None
    q_pos: Int[Array, "B W"] | None = None
    attn_win: Float[Array, "B N W T"] | None = None
    mass: Float[Array, "B N T"] | None = None
    attn: Float[Array, "B N T T"] | None = None
    token_ids: Int[Array, "B T"] | None = None
    layer: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def valid(self) -> Bool[Array, "B T"]:
        """Which prompt tokens are real."""
        return jnp.arange(self.k.shape[2]) < self.length[:, None]

    def last(self, n: int) -> Bool[Array, "B T"]:
        """Which tokens are among the last n real ones of their row."""
        return self.valid & (jnp.arange(self.k.shape[2]) >= self.length[:, None] - n)

    def per_kv_head(self, x: Float[Array, "B N ..."]) -> Float[Array, "B K ..."]:
        """Mean over the query heads of each kv head's group."""
        heads = self.k.shape[1]
        return x.reshape(x.shape[0], heads, -1, *x.shape[2:]).mean(axis=2)


class CachePolicy:
    """Decides what a `LayerCache` holds. Subclasses are frozen dataclasses of Python values, static in jit.

    A policy that ranks tokens once, after the prompt, defines `slots`, `budget` and `score`; one that forgets
    while decoding sets `grows = False` and defines `victim`, and `update` if it watches the weights.

    Attributes:
        needs: which optional fields of `Obs` to compute ("q_win", "attn_win", "mass", "attn", "token_ids"),
            and "weights" if `update` is to see the attention weights of each decoding step.
        window: how many of the last queries `q_win` and `attn_win` show.
        grows: whether generated tokens come on top of the prompt's budget (up to all slots) or within it.
        weighted: whether slots may stand for more than one token.
    """

    needs: frozenset[str] = frozenset()
    window: int = 0
    grows: bool = True
    weighted: bool = False

    def slots(self, layer: int, length: int, max_new: int) -> int:
        """S of a layer's buffers, for prompts of at most `length` tokens and `max_new` generated ones."""
        raise NotImplementedError(f"{type(self).__name__} does not define slots(layer, length, max_new)")

    def budget(self, obs: Obs) -> Int[Array, "B K"]:
        """How many prompt tokens each head may keep."""
        raise NotImplementedError(f"{type(self).__name__} does not define budget(obs)")

    def score(self, obs: Obs) -> Float[Array, "B K T"]:
        """How much a prompt token is worth keeping; only the order within a head matters."""
        raise NotImplementedError(f"{type(self).__name__} defines neither score(obs) nor keep(obs)")

    def forced(self, obs: Obs) -> Bool[Array, "B K T"]:
        """Prompt tokens that are kept whatever their score, as far as the budget reaches."""
        return jnp.zeros(obs.k.shape[:3], bool)

    def keep(self, obs: Obs) -> Bool[Array, "B K T"]:
        """The prompt tokens that stay."""
        return topk_keep(self.score(obs), self.forced(obs), obs.valid[:, None], self.budget(obs))

    def start(self, cache: LayerCache, obs: Obs) -> LayerCache:
        """Sets up statistics, summary slots or `aux` in the cache that holds the kept tokens."""
        return cache

    def victim(self, cache: LayerCache) -> Int[Array, "B K"]:
        """The slot to overwrite when a head is at its budget; S means none, which loses the new token."""
        return jnp.full(cache.pos.shape[:2], cache.slots, jnp.int32)

    def update(self, cache: LayerCache, weights: Float[Array, "B N 1 S"]) -> LayerCache:
        """Takes note of one decoding step's attention weights (if `needs` has "weights")."""
        return cache


def topk_keep(
    score: Float[Array, "B K T"],
    forced: Bool[Array, "B K T"],
    valid: Bool[Array, "B K T"],
    budget: Int[Array, "B K"],
) -> Bool[Array, "B K T"]:
    """The `budget` best tokens of each head: forced ones first, invalid ones never; of equals the earlier."""
    score = jnp.where(forced, jnp.inf, score.astype(jnp.float32))
    score = jnp.where(valid, score, -jnp.inf)
    order = jnp.argsort(-score, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1)
    return (rank < budget[..., None]) & valid


def pack(payload: PyTree[Float[Array, "B K T ..."]], keep: Bool[Array, "B K T"], slots: int) -> LayerCache:
    """A cache of S slots that holds the kept tokens of each head, left-packed in order of position.

    The remaining slots are empty (pos -1, w 0, payload 0). Tokens beyond S slots are lost and set `overflow`.
    """
    length = keep.shape[-1]
    count = jnp.sum(keep, axis=-1, dtype=jnp.int32)
    order = jnp.argsort(~keep, axis=-1, stable=True)[..., :slots]
    order = jnp.pad(order, ((0, 0), (0, 0), (0, max(slots - length, 0))))
    held = jnp.arange(slots) < count[..., None]

    def gather(x):
        trailing = (1,) * (x.ndim - 3)
        x = jnp.take_along_axis(x, order.reshape(*order.shape, *trailing), axis=2)
        return jnp.where(held.reshape(*held.shape, *trailing), x, 0).astype(x.dtype)

    return LayerCache(
        payload=jax.tree.map(gather, payload),
        pos=jnp.where(held, order, EMPTY).astype(jnp.int32),
        w=held.astype(jnp.float32),
        score=jnp.zeros(held.shape, jnp.float32),
        budget=jnp.full(count.shape, slots, jnp.int32),
        seen=jnp.full(count.shape[:1], length, jnp.int32),
        overflow=jnp.any(count > slots, axis=-1),
    )


def window_weights(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K S H"],
    lse: Float[Array, "B N W"] | None = None,
    *,
    q_positions: Int[Array, "B W"],
    kv_positions: Int[Array, "B S"],
    scale: float | None = None,
) -> Float[Array, "B N W S"]:
    """Causal softmax weights of a few queries in float32; rows at position -1 are 0. `lse` saves a pass."""
    batch, heads, width, features = q.shape
    scale = features**-0.5 if scale is None else scale
    grouped = q.reshape(batch, k.shape[1], -1, width, features)
    logits = jnp.einsum("bkgwh,bksh->bkgws", grouped, k, preferred_element_type=jnp.float32) * scale
    logits = logits.reshape(batch, heads, width, -1)
    seen = (kv_positions[:, None, :] <= q_positions[:, :, None]) & (kv_positions[:, None, :] != EMPTY)
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    if lse is None:
        lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(logits - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])


def attention_probe(
    q: Float[Array, "B N W H"],
    k: Float[Array, "B K S H"],
    lse: Float[Array, "B N W"] | None = None,
    *,
    q_positions: Int[Array, "B W"],
    kv_positions: Int[Array, "B S"],
    scale: float | None = None,
    block: int = 128,
) -> Float[Array, "B N S"]:
    """Σ over the queries of their causal weights on each key, in O(block · S) memory instead of W · S.

    `lse` is that of the prompt's attention (heads-major) if it is at hand; otherwise it is computed block by
    block. Queries at position -1 count nothing.
    """
    width = q.shape[2]
    block = min(block, width)
    blocks = -(-width // block)
    fill = blocks * block - width

    def split(x, axis, value=0):
        x = jnp.pad(x, [(0, fill if i == axis else 0) for i in range(x.ndim)], constant_values=value)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, block, *x.shape[axis + 1 :]), axis, 0)

    tiles = (split(q, 2), split(q_positions, 1, EMPTY), None if lse is None else split(lse, 2))

    def step(total, tile):
        queries, pos, row_lse = tile
        weights = window_weights(queries, k, row_lse, q_positions=pos, kv_positions=kv_positions, scale=scale)
        return total + weights.sum(axis=2), None

    return jax.lax.scan(step, jnp.zeros((*q.shape[:2], k.shape[2]), jnp.float32), tiles)[0]


def observe(
    policy: CachePolicy,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T Hv"],
    lengths: Int[Array, "B"],
    *,
    lse: Float[Array, "B T N"] | None = None,
    token_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    layer: int = 0,
) -> Obs:
    """The `Obs` of a prompt with exactly the fields that the policy needs.

    Raises:
        ValueError: the policy needs token ids and none were given.
    """
    length = q.shape[1]
    needs = policy.needs
    if "token_ids" in needs and token_ids is None:
        raise ValueError(f"token_ids: {type(policy).__name__} needs the prompt's token ids [B, T]")
    kv_positions = jnp.where(jnp.arange(length) < lengths[:, None], jnp.arange(length), EMPTY)
    heads_q = jnp.swapaxes(q, 1, 2)
    heads_lse = None if lse is None else jnp.swapaxes(lse, 1, 2)
    context: dict[str, Any] = {"kv_positions": kv_positions, "scale": scale}
    fields: dict[str, Any] = {}
    if needs & {"q_win", "attn_win"}:
        q_pos = lengths[:, None] - policy.window + jnp.arange(policy.window)  # [B, W]
        q_pos = jnp.where(q_pos < 0, EMPTY, q_pos)
        q_win = jnp.take_along_axis(heads_q, jnp.maximum(q_pos, 0)[:, None, :, None], axis=2)
        fields |= {"q_win": q_win, "q_pos": q_pos}
        if "attn_win" in needs:
            fields["attn_win"] = window_weights(q_win, k, q_positions=q_pos, **context)
    if "mass" in needs:
        fields["mass"] = attention_probe(heads_q, k, heads_lse, q_positions=kv_positions, **context)
    if "attn" in needs:
        fields["attn"] = window_weights(heads_q, k, heads_lse, q_positions=kv_positions, **context)
    if "token_ids" in needs:
        fields["token_ids"] = token_ids
    return Obs(k=k, v=v, length=lengths, layer=layer, **fields)
