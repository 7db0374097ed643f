"""Multi-head latent attention (DeepSeek-AI, 2024, arXiv 2405.04434, §2.1), and the form that converted layers take first."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnzoo.core.cache import cached_attention
from attnzoo.core.positions import PositionPlan, Positions, RoPE, positions_for
from attnzoo.nn.latent import LatentAttention, LowRank, check_rank, check_rope, head_up
from attnzoo.nn.linear import head_counts, linear, merge_heads
from attnzoo.nn.norms import norm


class MLACache(NamedTuple):
    """What tokens leave behind: the payload of `core.cache.LayerCache`.

    c: [B, 1, S, r + P] in the cache, [B, T, 1, r + P] elsewhere: the latent and the rotated shared key side by side, so
        that one array serves as keys and as values.
    """

    c: Any


def mla_absorb(q: Float[Array, "*B N H"], key_up: Float[Array, "r N H"]) -> Float[Array, "*B N r"]:
    """q~_n = q_n (W_UK^n)ᵀ: the queries that meet latents as q_n meets keys. Takes a query kernel [D, N, H] as well."""
    return jnp.einsum("...nh,rnh->...nr", q, key_up)


class MultiHeadLatentAttention(LatentAttention):
    """Attention whose keys and values are made from one latent per token; x [B, T, D] -> [B, T, D].

        c = norm(x W_DKV) [B, T, r]      k_r = RoPE(x W_KR) [B, T, P], shared by all heads
        q = x W_Q [B, T, N, H + P] = [q_c; RoPE(q_r)]
        k_n = [c W_UK^n; k_r],  v_n = c W_UV^n,  y = concat_n(softmax(q_n k_nᵀ / sqrt(H + P)) v_n) W_O

    c carries no position, so a query can be taken to the latents instead of the latents to keys: with
    q~_n = q_c (W_UK^n)ᵀ the logits are [q~_n; q_r] · [c; k_r], and o_n = (Σ p c) W_UV^n. Decoding is then attention with
    one head of keys that are also the values, the r + P numbers of the cache.

    dim, num_heads: D and N. head_dim: H, of queries and keys without position, D / N by default.
    rope_dim: P, H / 2 by default (rounded down to even); 0 for no shared key. latent_dim: r, 4·H by default.
    value_dim: Hv, H by default. query_latent_dim: the rank of queries, x W_DQ -> norm -> W_UQ; None: full.
    normed: RMSNorm on the latents, as DeepSeek has it.
    use_bias: on the maps that start from x, and on the output.
    Further arguments as in `GroupedQueryAttention`.

    Raises ValueError for heads that do not divide, ranks below 1, a negative P, and positions that are not a RoPE of one axis
    which can turn P features.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        positions: RoPE | None = None,
        head_dim: int | None = None,
        rope_dim: int | None = None,
        latent_dim: int | None = None,
        value_dim: int | None = None,
        query_latent_dim: int | None = None,
        normed: bool = True,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        _, width = head_counts(dim, num_heads, None, head_dim)
        rope_dim = width // 4 * 2 if rope_dim is None else rope_dim
        if rope_dim < 0:
            raise ValueError(f"rope_dim: features of the shared key, 0 for none, got {rope_dim}")
        if rope_dim:
            check_rope(positions, "rope_dim", rope_dim)
        super().__init__(causal=causal, positions=positions, dropout_rate=dropout_rate, backend=backend, **options)
        self.num_heads, self.head_dim, self.rope_dim = num_heads, width, rope_dim
        self.latent_dim = check_rank("latent_dim", 4 * self.head_dim if latent_dim is None else latent_dim)
        self.value_dim = self.head_dim if value_dim is None else value_dim
        if positions is not None and positions.num_axes > 1:
            raise ValueError(f"positions: the shared key has one axis of positions, got {positions}")
        heads = (num_heads, self.head_dim + self.rope_dim)
        self.query: Any
        if query_latent_dim is None:
            self.query = linear(dim, heads, ("embed", "heads", "head_dim"), use_bias=use_bias, **options)
        else:
            rank = check_rank("query_latent_dim", query_latent_dim)
            self.query = LowRank(dim, rank, heads, normed=normed, use_bias=use_bias, **options)
        self.down = linear(dim, self.latent_dim + self.rope_dim, ("embed", None), use_bias=use_bias, **options)
        self.norm: Any = norm("rms", self.latent_dim, **options) if normed else None
        self.key_up = head_up(self.latent_dim, num_heads, self.head_dim, **options)
        self.value_up = head_up(self.latent_dim, num_heads, self.value_dim, **options)
        self.out = merge_heads(num_heads, self.value_dim, dim, use_bias=use_bias, **options)

    def attention_arguments(self) -> dict[str, Any]:
        """Logits are divided by sqrt(H + P), also where their product runs over r + P features."""
        return {**super().attention_arguments(), "scale": (self.head_dim + self.rope_dim) ** -0.5}

    def rotate(self, x: Float[Array, "B T N P"], positions: Int[Array, "..."]) -> Float[Array, "B T N P"]:
        return super().rotate(x, positions) if self.rope_dim else x

    def split_queries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "..."]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N P"]]:
        """(q_c, q_r), the second with its position applied."""
        q_c, q_r = jnp.split(self.query(x), [self.head_dim], axis=-1)
        return q_c, self.rotate(q_r, positions)

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> Float[Array, "B T N H+P"]:
        return jnp.concatenate(self.split_queries(x, positions), axis=-1)

    def latents(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> MLACache:
        c, k_r = jnp.split(self.down(x)[:, :, None], [self.latent_dim], axis=-1)
        c = c if self.norm is None else self.norm(c)
        return MLACache(jnp.concatenate([c, self.rotate(k_r, positions)], axis=-1))

    def cache_spec(self) -> MLACache:
        return MLACache((1, self.latent_dim + self.rope_dim))

    def expand(
        self, latents: MLACache, positions: Int[Array, "..."]
    ) -> tuple[Float[Array, "B S N H+P"], Float[Array, "B S N Hv"]]:
        c, k_r = jnp.split(latents.c[:, :, 0], [self.latent_dim], axis=-1)
        k_r = jnp.broadcast_to(k_r[:, :, None], (*k_r.shape[:2], self.num_heads, self.rope_dim))
        return jnp.concatenate([self.key_up(c), k_r], axis=-1), self.value_up(c)

    def absorbs(self, length: int) -> bool:
        """Expanding takes r·(H + Hv) multiply-adds per head and slot, once; absorbing 2·r - H - Hv more per query."""
        widths = self.head_dim + self.value_dim
        return length * (2 * self.latent_dim - widths) < self.latent_dim * widths

    def attend(
        self, x: Float[Array, "B T D"], cache: Any, positions: Int[Array, "B T"], **options: Any
    ) -> Float[Array, "B T N Hv"]:
        q_c, q_r = self.split_queries(x, positions)
        q = jnp.concatenate([mla_absorb(q_c, self.key_up.kernel[...].astype(q_c.dtype)), q_r], axis=-1)
        o = cached_attention(q, cache, q_positions=positions, read=lambda p: (p.c, p.c), **options)
        o = o[..., : self.latent_dim]  # the features of k_r come along: a copy without them would cost more
        return jnp.einsum("btnr,rnh->btnh", o, self.value_up.kernel[...].astype(o.dtype))


def mla_cache_bytes(
    length: int,
    *,
    num_layers: int,
    latent_dim: int,
    rope_dim: int,
    batch: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
) -> int:
    """Bytes of the latents of a whole model: B · S · L · (r + P) · itemsize."""
    return batch * length * num_layers * (latent_dim + rope_dim) * jnp.dtype(dtype).itemsize


class LatentKVAttention(LatentAttention):
    """Keys and values from a latent each, rotated after their up-projection; x [B, T, D] -> [B, T, D].

    c_K = x W_DK [B, T, r], k_n = RoPE(c_K W_UK^n);  c_V = x W_DV, v_n = c_V W_UV^n. The cache holds c_K and c_V,
    before any position, so nothing can be absorbed.

    latent_dim: r, of keys and of values. use_bias: on the maps that start from x, and on the output.
    Further arguments as in `GroupedQueryAttention`.

    Raises ValueError for heads without features and a rank below 1.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        latent_dim: int,
        head_dim: int,
        causal: bool = False,
        positions: Positions | PositionPlan | None = None,
        use_bias: bool = False,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        heads = num_heads, head_counts(dim, num_heads, None, head_dim)[1]
        made = positions_for(positions, *heads, rngs=rngs)
        super().__init__(causal=causal, positions=made, backend=backend, **options)
        options["use_bias"] = use_bias
        self.latent_dim = check_rank("latent_dim", latent_dim)
        self.query = linear(dim, heads, ("embed", "heads", "head_dim"), **options)
        self.key, self.value = (LowRank(dim, latent_dim, heads, **options) for _ in range(2))
        self.out = merge_heads(*heads, dim, **options)

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> Float[Array, "B T N H"]:
        return self.rotate(self.query(x), positions)

    def latents(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> dict[str, Float[Array, "B T 1 r"]]:
        return {"c_k": self.key.latent(x)[:, :, None], "c_v": self.value.latent(x)[:, :, None]}

    def cache_spec(self) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(("c_k", "c_v"), (1, self.latent_dim))

    def expand(
        self, latents: dict[str, Float[Array, "B S 1 r"]], positions: Int[Array, "..."]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        k, v = self.key.up(latents["c_k"][:, :, 0]), self.value.up(latents["c_v"][:, :, 0])
        return self.rotate(k, positions), v
