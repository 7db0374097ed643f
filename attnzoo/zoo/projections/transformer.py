"""Attention Is All You Need (Vaswani et al., 2017, arXiv 1706.03762): the base that every exhibit varies.

Tokens x [B, T, D] (and a memory [B, S, D], or x itself) become N query heads and K heads of keys and values:

    q = x W_Q [B, T, N, H]      k = m W_K [B, S, K, H]      v = m W_V [B, S, K, H]            (paper §3.2.2)
    o_n = softmax(q_n k_{n // G}ᵀ / sqrt(H)) v_{n // G},   G = N / K                           (eq. 1)
    y = concat_n(o_n) W_O

K = N is the paper's multi-head attention, K = 1 multi-query (Shazeer 2019, arXiv 1911.02150), between them
grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245). Decoding keeps k (after its position is
applied) and v: 2·K·H numbers per token and layer.

The networks around it (encoder-decoder, decoder LM), beam search, the learning-rate schedule and the
label-smoothed loss of the paper live in `attnzoo.models`.
"""

import dataclasses
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.attention import attention
from attnzoo.core.cache import EMPTY, LayerCache, append, cached_attention, init_cache
from attnzoo.core.masks import Causal
from attnzoo.core.positions import PositionPlan, Positions, positions_for
from attnzoo.nn.linear import QKV, default_init, dropout, dropout_arguments, merge_heads
from attnzoo.nn.mixer import Mixer, both, on_grid, unshared, with_own
from attnzoo.paper import Paper


def scaled_dot_product_attention(
    q: Float[Array, "*B T N H"],
    k: Float[Array, "*B S K H"],
    v: Float[Array, "*B S K Hv"],
    *,
    mask: Any = None,
    causal: bool = False,
) -> Float[Array, "*B T N Hv"]:
    """softmax(q kᵀ / sqrt(H)) v (eq. 1); query head n reads key and value head n // (N / K).

    causal: query t sees keys s <= t + (S - T), so the ends of both sequences line up.
    mask: as in `core.attention`; what both allow is seen. Queries that see nothing give 0.
    """
    triangle = Causal(offset=k.shape[-3] - q.shape[-3]) if causal else None
    return attention(q, k, v, mask=both(triangle, mask))


def check_memory_mask(memory: Float[Array, "B S D"], memory_mask: Bool[Array, "B S"]) -> None:
    """Raises ValueError where they do not fit."""
    if memory_mask.shape != memory.shape[:2]:
        raise ValueError(
            f"memory_mask: one entry per token of memory {memory.shape} is needed: {memory.shape[:2]}, got {memory_mask.shape}"
        )


class GroupedQueryAttention(Mixer):
    """Attention with N query heads and K heads of keys and values; x [B, T, D] -> [B, T, D].

    dim, num_heads: D and N.
    causal: every token sees itself and what is before it, by position.
    positions: applied to queries and keys (`RoPE()`), or None. Not together with a memory.
    num_kv_heads: K, a divisor of N; N by default (multi-head attention), 1 is multi-query attention.
    head_dim: H, D / N by default.
    use_bias: biases on the four projections; the paper has none.
    dropout_rate: of attention weights.
    backend: of `core.attention`.

    Raises ValueError for head counts that do not divide.
    """

    crosses = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        positions: Positions | PositionPlan | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        kernel_init: nnx.Initializer = default_init,
        precision: Any = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {
            "use_bias": use_bias,
            "kernel_init": kernel_init,
            "precision": precision,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.qkv = QKV(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
        self.out = merge_heads(num_heads, self.qkv.head_dim, dim, **options)
        self.causal, self.backend = causal, backend
        self.positions = positions_for(positions, self.qkv.num_kv_heads, self.qkv.head_dim, rngs=rngs)
        self.cache_dtype = dtype or param_dtype
        self.dropout = dropout(dropout_rate, rngs)

    def attention_arguments(self) -> dict[str, Any]:
        """What every call of `core.attention` is given besides q, k, v, mask and positions.

        Exhibits that change the score or the weights extend this one method; cached decoding follows.
        """
        return {"backend": self.backend}

    @classmethod
    def like(cls, mixer: "GroupedQueryAttention", **own: Any) -> Self:
        """A mixer of this class with the weights and settings of another; `own` are this class' further arguments.

        Weights are copied, and positions that hold arrays. Further parameters start as the class has them, drawn with seed 0.
        Raises TypeError for a mixer that is neither plain (`plain`) nor of this very class.
        """
        if type(mixer) is not cls:
            plain(mixer)
        qkv, first = mixer.qkv, mixer.qkv.query
        made = cls(
            first.in_features[0],
            qkv.num_heads,
            causal=mixer.causal,
            positions=unshared(mixer.positions),
            num_kv_heads=qkv.num_kv_heads,
            head_dim=qkv.head_dim,
            use_bias=first.use_bias,
            dropout_rate=mixer.dropout.rate,
            backend=mixer.backend,
            precision=first.precision,
            dtype=first.dtype,
            param_dtype=first.param_dtype,
            rngs=nnx.Rngs(0),
            **own,
        )
        made.qkv, made.out, made.dropout = nnx.clone(qkv), nnx.clone(mixer.out), nnx.clone(mixer.dropout)
        return made

    def merge(self, o: Float[Array, "B T N H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What becomes of the head outputs o of the tokens x: W_O here.

        Exhibits that gate or exchange what heads found extend this one method; cached decoding follows.
        """
        return self.out(o)

    def call_arguments(self, crosses: bool) -> dict[str, Any]:
        """The same for one call, which attends to a memory or does not; for exhibits that tell the two apart."""
        return self.attention_arguments()

    def _mask(self, mask: Any) -> Any:
        return with_own(Causal() if self.causal else None, mask)

    def _check_memory(self) -> None:
        if self.causal or self.positions is not None:
            raise ValueError(
                "memory: positions of two sequences do not compare; cross-attention is built with "
                f"causal=False and positions=None, this has causal={self.causal} and {self.positions}"
            )

    def _rotate(self, x: Array, positions: Array) -> Array:
        return x if self.positions is None else self.positions.rotate(x, positions)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
        memory: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """memory: attend to this sequence instead of x itself; `mask` is then of T queries and S keys."""
        return self.merge(self._attend(x, mask, positions, memory, **dropout_arguments(self.dropout)), x)

    def attention_weights(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
        memory: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B N T S"]:
        """The weights of the same call, in float32 and before dropout (needs a backend that holds them)."""
        return self._attend(x, mask, positions, memory, return_weights=True)[1]

    def _attend(self, x: Array, mask: Any, positions: Any, memory: Any, **options: Any) -> Any:
        if memory is not None:
            self._check_memory()
        q, k, v = self.qkv(x, memory)
        tokens = jnp.arange(x.shape[1]) if positions is None else positions
        q, k = self._rotate(q, tokens), self._rotate(k, tokens)
        sequence = None if on_grid(self.positions) else positions
        return attention(
            q,
            k,
            v,
            mask=self._mask(mask),
            q_positions=sequence,
            kv_positions=sequence if memory is None else None,
            **self.call_arguments(crosses=memory is not None),
            **options,
        )

    def cache_spec(self) -> dict[str, Any]:
        """What one token leaves behind, as `core.cache.init_cache` takes it."""
        one = (self.qkv.num_kv_heads, self.qkv.head_dim)
        return {"k": one, "v": one}

    def cache_entries(self, x: Float[Array, "B T D"], positions: Int[Array, "..."] | None = None) -> dict[str, Array]:
        """What tokens leave behind, [B, T, K, ...]. positions: None for a memory, whose keys are not rotated."""
        k = self.qkv.key(x)
        return {"k": k if positions is None else self._rotate(k, positions), "v": self.qkv.value(x)}

    def init_cache(
        self,
        batch: int,
        length: int,
        *,
        dtype: DTypeLike | None = None,
        memory: Float[Array, "B S D"] | None = None,
        memory_mask: Bool[Array, "B S"] | None = None,
    ) -> LayerCache:
        """Room for `length` tokens; with a memory, its keys and values, computed once.

        memory_mask: True at the memory's real tokens.
        Raises ValueError for a mixer that is neither causal nor given a memory: its earlier outputs would
        depend on later tokens.
        """
        spec = self.cache_spec()
        if memory is None:
            if not self.causal:
                raise ValueError("causal: only a mixer built with causal=True, or given a memory, can decode")
            return init_cache(batch, length, spec, dtype=dtype or self.cache_dtype)
        self._check_memory()
        if memory_mask is not None:
            check_memory_mask(memory, memory_mask)
        cache = init_cache(batch, memory.shape[1], spec, dtype=dtype or self.cache_dtype)
        cache = append(cache, self.cache_entries(memory))
        if memory_mask is None:
            return cache
        return dataclasses.replace(cache, pos=jnp.where(memory_mask[:, None, :], cache.pos, EMPTY))

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        *,
        mask: Any = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The tokens x after those in the cache; a mixer that is not causal finds its memory there."""
        positions = cache.next_positions(x.shape[1])
        q = self._rotate(self.qkv.query(x), positions)
        if self.causal:
            cache = append(cache, self.cache_entries(x, positions), lengths)
        arguments = self.call_arguments(crosses=not self.causal)
        o = cached_attention(q, cache, q_positions=positions, mask=self._mask(mask), **arguments)
        return self.merge(o, x), cache


class MultiHeadAttention(GroupedQueryAttention):
    """K = N (paper §3.2.2): every query head has its own keys and values."""

    def __init__(self, dim: int, num_heads: int, **options: Any):
        super().__init__(dim, num_heads, num_kv_heads=num_heads, **options)


class MultiQueryAttention(GroupedQueryAttention):
    """K = 1 (Shazeer 2019): all query heads share one head of keys and values."""

    def __init__(self, dim: int, num_heads: int, **options: Any):
        super().__init__(dim, num_heads, num_kv_heads=1, **options)


def plain(mixer: Any) -> GroupedQueryAttention:
    """`mixer`, which is one of the three classes above: what conversions start from.

    Raises TypeError, naming the type, for anything else: a subclass computes another function of the same weights.
    """
    known = GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
    if type(mixer) not in known:
        names = ", ".join(cls.__name__ for cls in known)
        raise TypeError(f"mixer: one of {names} itself is converted, got {type(mixer).__name__}, which may compute otherwise")
    return mixer


def mha_to_gqa(params: nnx.State, num_kv_heads: int) -> nnx.State:
    """Parameters with fewer heads of keys and values, each the mean of its group (Ainslie et al. 2023, §2.1).

    params: of a mixer, or of a whole model (stacked layers too); every `QKV` in it is converted, the rest is
    kept. Put them into a model built with that num_kv_heads by `nnx.update`.
    Raises ValueError when num_kv_heads does not divide the heads, or nothing is there to convert.
    """
    flat = []
    converted = 0
    for path, variable in nnx.to_flat_state(params):
        if path[-3:-1] in (("qkv", "key"), ("qkv", "value")):
            value = variable.get_value()
            *lead, heads, width = value.shape
            if num_kv_heads < 1 or heads % num_kv_heads:
                raise ValueError(f"num_kv_heads: {num_kv_heads} does not divide the {heads} heads of {path}")
            pooled = value.reshape(*lead, num_kv_heads, heads // num_kv_heads, width).mean(axis=-2)
            variable = variable.replace(pooled)
            converted += 1
        flat.append((path, variable))
    if not converted:
        raise ValueError("params: no key or value projection found (paths end in qkv, key|value, kernel)")
    return nnx.from_flat_state(flat)


def kv_cache_bytes(
    length: int,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
) -> int:
    """Bytes of keys and values of a whole model: 2 · B · S · L · K · H · itemsize."""
    return 2 * batch * length * num_layers * num_kv_heads * head_dim * jnp.dtype(dtype).itemsize


def draw_sharing(ax: Any, num_heads: int = 8, kv_heads: tuple[int, ...] = (8, 2, 1)) -> None:
    """Draws which head of keys and values each query head reads, a row per number of kv heads."""
    for row, K in enumerate(kv_heads):
        group = num_heads // K
        for n in range(num_heads):
            center = (n // group + 0.5) * group - 0.5
            ax.plot([n, center], [-row, -row - 0.5], color="0.7", linewidth=1, zorder=1)
        read = [(k + 0.5) * group - 0.5 for k in range(K)]
        ax.scatter(range(num_heads), [-row] * num_heads, s=90, color="#8ecae6", zorder=2)
        ax.scatter(read, [-row - 0.5] * K, s=130, marker="s", color="#126782", zorder=2)
        kind = {num_heads: "multi-head", 1: "multi-query"}.get(K, "grouped-query")
        said = f"{kind}, K = {K}\n{2 * K} H numbers\nper token"
        ax.annotate(said, (num_heads - 0.3, -row - 0.25), va="center", fontsize=9)
    ax.set(xlim=(-0.6, num_heads + 2.6), ylim=(-len(kv_heads) + 0.2, 0.3), xticks=[], yticks=[])
    ax.set_title(f"{num_heads} query heads (dots) and the K heads of keys and values (squares) they read", fontsize=10)


PAPER = Paper(
    41,
    "transformer",
    "Attention Is All You Need",
    "projections",
    builds=(
        scaled_dot_product_attention,
        GroupedQueryAttention,
        MultiHeadAttention,
        MultiQueryAttention,
        mha_to_gqa,
        kv_cache_bytes,
        "attnzoo.core.positions:sinusoidal_positions",
        "attnzoo.core.positions:RoPE",
        "attnzoo.core.cache:LayerCache",
        "attnzoo.models.lm:DecoderLM",
        "attnzoo.models.encoder:Encoder",
        "attnzoo.models.seq2seq:Transformer",
        "attnzoo.models.decoding:greedy",
        "attnzoo.models.decoding:beam_search",
        "attnzoo.models.objectives:label_smoothed_ce",
        "attnzoo.models.objectives:noam_schedule",
    ),
    mixer=GroupedQueryAttention,
    picture=draw_sharing,
    costs={
        "cache numbers per token": "2 * K * H",
        "parameters": "2 * D * N * H + 2 * D * K * H",
        "multiply-adds": "T * (2 * D * N * H + 2 * D * K * H) + 2 * T * S * N * H",
    },
    code="flax, torch, transformers",
    parity=(
        "flax.linen.MultiHeadDotProductAttention, jax.nn.dot_product_attention and torch's "
        "scaled_dot_product_attention(enable_gqa=True), each to 1e-5"
    ),
    notes=(
        "Multi-query and grouped-query attention are later papers, built here because others vary them. "
        "Beam search lets an end of sequence finish only when it ranks within the beam, so that one beam "
        "without length penalty is greedy search."
    ),
)
