"""Folding attention (Li et al., 2023, ICASSP 2024, arXiv 2309.07988).

In streaming speech recognition sequences are short, and the D × D projections cost the memory and the power, not the scores.
So each token of width D is split into F sub-tokens of width d = D / F, attention runs over the F times longer sequence with
matrices that all sub-tokens share, and the sub-tokens are put together again:

    fold:    z[t F + i] = x[t, i d : (i + 1) d]                                [B, T F, d]                 (paper §3)
    Q, K, V = z W_Q, z W_K, z W_V,   W_* [d, d];    N_f = max(1, N / F) heads of width d / N_f
    o = softmax(Q Kᵀ / sqrt(d / N_f) + mask) V,     M_f[t F + i, s F + j] = M[t, s]
    unfold:  y[t] = [o[t F] W_O | ... | o[t F + F - 1] W_O]                     [B, T, D]

A sub-token sees all sub-tokens of the tokens that its token sees, later ones of its own token among them; positions are those
of tokens. The feed-forward network is folded the same way. What follows is not from the paper: a learned bias e [F, d], zero at
first, tells sub-tokens apart (without it the layer commutes with permuting them); with N_f = N / F heads keep their width.

Costs: 4 D² / F² parameters and 4 T D² / F multiply-adds of projections, but 2 T S D F of scores and values, S being how many
tokens each sees: it pays while S < 2 D / F, and a call where it does not warns. The cache holds as many numbers as before, 2 D
per token.

The idea and its savings are the paper's; the wiring of heads, masks and positions is ours (there is no public code).
"""

import warnings
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cache import LayerCache, init_cache
from attnzoo.core.cells import Bound, Cells, Geometry, concrete
from attnzoo.core.intervals import Intervals, span
from attnzoo.core.masks import Causal, Folded, Mask, mask
from attnzoo.core.masks.positional import row_positions
from attnzoo.core.positions import PositionPlan, Positions
from attnzoo.errors import unknown
from attnzoo.nn.block import Block
from attnzoo.nn.feed_forward import MLP
from attnzoo.nn.linear import head_counts, named
from attnzoo.nn.mixer import as_mask, both, on_grid, with_own
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention, check_memory_mask

WHERE = ("attn", "ffn", "both")


def _width(dim: int, factor: int) -> int:
    if factor < 1 or dim % factor:
        raise ValueError(f"factor: tokens of dim={dim} split into equal parts only by a divisor of it, got {factor}")
    return dim // factor


def _units(hidden: int, factor: int) -> int:
    if factor < 1 or hidden % factor:
        raise ValueError(f"factor: hidden={hidden} units split only by a divisor of it, got {factor}")
    return hidden // factor


def fold_tokens(x: Float[Array, "*B T D"], factor: int) -> Float[Array, "*B T*F D/F"]:
    """Every token as F sub-tokens one after another. Raises ValueError when F does not divide D."""
    *lead, length, dim = x.shape
    return x.reshape(*lead, length * factor, _width(dim, factor))


def unfold_tokens(z: Float[Array, "*B T*F D/F"], factor: int) -> Float[Array, "*B T D"]:
    """The inverse of `fold_tokens`. Raises ValueError when F does not divide the number of sub-tokens."""
    *lead, length, width = z.shape
    if factor < 1 or length % factor:
        raise ValueError(f"factor: {length} sub-tokens are no whole number of tokens of {factor}")
    return z.reshape(*lead, length // factor, width * factor)


@mask()
class StreamingChunks(Mask):
    """A token sees its own chunk of `chunk` tokens, to its end, and `left_chunks` chunks before."""

    chunk: int
    left_chunks: int

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.left_chunks < 0:
            raise ValueError(f"StreamingChunks: chunks of at least one token, and none or more before; got {self}")

    def bind(self, g: Geometry) -> Bound:
        def apply(c: Cells) -> Any:
            behind = c.q // self.chunk - c.k // self.chunk
            return (behind >= 0) & (behind <= self.left_chunks)

        return Bound((), apply)

    def intervals(self, g: Geometry) -> Intervals:
        here = row_positions(g) // self.chunk
        return span((here - self.left_chunks) * self.chunk, (here + 1) * self.chunk)


def streaming_chunk_mask(chunk: int, left_chunks: int) -> StreamingChunks:
    """Who sees whom in a streaming encoder: token t the chunks c(t) - left_chunks to c(t), with c(t) = t // chunk."""
    return StreamingChunks(chunk, left_chunks)


class FoldingAttention(GroupedQueryAttention):
    """Attention over sub-tokens; x [B, T, D] -> [B, T, D].

    dim, num_heads: D and N; sub-tokens have N / F heads, or one if N < F.
    factor: F, a divisor of D, and of N unless N < F. With 1 it is multi-head attention.
    streaming: (chunk, left_chunks), the mask of a streaming encoder in place of the causal one (together with causal=True,
        both). Such a mixer decodes too, by whole chunks: a piece given to `prefill` ends where a chunk ends, or the sequence;
        by single tokens where nothing ahead is seen (chunks of one, causal, or strict_subtoken_causal). A rolling cache
        (`init_cache`) serves a stream without end.
    strict_subtoken_causal: hide the later sub-tokens of the same token as well, and those of tokens ahead; of a mixer that is
        causal or streaming.
    causal, positions, use_bias, dropout_rate, backend: as in `GroupedQueryAttention`.

    Warns (once per compiled shape) where it costs more multiply-adds than attention unfolded: for T tokens that see up to S of
    themselves, S > 2 D / F.
    Raises ValueError for heads or a factor that do not divide, and strict_subtoken_causal of a mixer that sees everything.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        factor: int = 2,
        streaming: tuple[int, int] | None = None,
        strict_subtoken_causal: bool = False,
        causal: bool = False,
        positions: Positions | PositionPlan | None = None,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        head_counts(dim, num_heads, None, None)
        width = _width(dim, factor)
        if num_heads >= factor and num_heads % factor:
            raise ValueError(
                f"factor: the {num_heads} heads are shared out among {factor} sub-tokens; choose a divisor of num_heads, or "
                f"fewer heads than {factor} for one head"
            )
        if strict_subtoken_causal and not causal and streaming is None:
            raise ValueError(
                "strict_subtoken_causal: it orders the sub-tokens of a causal or streaming mixer, and this is neither"
            )
        self.factor, self.width = factor, width
        super().__init__(
            width,
            max(1, num_heads // factor),
            causal=causal or streaming is not None,
            positions=positions,
            use_bias=use_bias,
            dropout_rate=dropout_rate,
            backend=backend,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        chunks = None if streaming is None else streaming_chunk_mask(*streaming)
        self.own_mask = both(Causal() if causal else None, chunks)
        self.strict_subtoken_causal = strict_subtoken_causal
        # How many tokens one sees at most, and by how many at once they have to come.
        self.reach = None if streaming is None else (streaming[1] + 1) * streaming[0]
        self.piece = 1 if streaming is None or causal or strict_subtoken_causal else streaming[0]
        if factor > 1:
            self.subtoken_bias = nnx.Param(jnp.zeros((factor, width), param_dtype), **named(None, "embed"))

    @classmethod
    def like(cls, mixer: GroupedQueryAttention, **own: Any) -> Self:
        """Raises ValueError: sub-tokens have other matrices than tokens."""
        raise ValueError(f"mixer: the matrices of {type(mixer).__name__} are of whole tokens; build and train {cls.__name__}")

    def _warn(self, queries: int, keys: int, source: int) -> None:
        """If the products of so many queries and keys cost more than the projections of the queries and of `source` save."""
        seen = keys if self.reach is None else min(keys, self.reach)
        pays = (queries + source) * self.width / queries
        if self.factor > 1 and seen > pays:
            warnings.warn(
                f"folding by {self.factor} costs more than it saves: here {queries} tokens see up to {seen} each, and it pays "
                f"up to {pays:g}",
                stacklevel=3,
            )

    def _fold(self, x: Float[Array, "B T D"]) -> Float[Array, "B T*F d"]:
        if self.factor == 1:
            return x
        return fold_tokens(x + self.subtoken_bias[...].reshape(-1).astype(x.dtype), self.factor)

    def _mask(self, mask: Any) -> Any:
        tokens = with_own(self.own_mask, mask)
        lifted = tokens if tokens is None or self.factor == 1 else Folded(as_mask(tokens), self.factor)
        return both(lifted, Causal() if self.strict_subtoken_causal else None)

    def _rotate(self, x: Array, positions: Array) -> Array:
        return super()._rotate(x, positions if on_grid(self.positions) else positions // self.factor)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
        memory: Float[Array, "B S D"] | None = None,
    ) -> Float[Array, "B T D"]:
        """mask, positions, memory: of tokens."""
        tokens = (x if memory is None else memory).shape[1]
        self._warn(x.shape[1], tokens, tokens)
        if positions is not None:
            positions = self._subtokens(jnp.asarray(positions))
        memory = None if memory is None else self._fold(memory)
        y = super().__call__(self._fold(x), mask=mask, positions=positions, memory=memory)
        return unfold_tokens(y, self.factor)

    def _subtokens(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """t -> t F + i on the last axis; coordinates on a grid are those of the token."""
        if on_grid(self.positions):
            return jnp.repeat(positions, self.factor, axis=-2)
        return (positions[..., None] * self.factor + jnp.arange(self.factor)).reshape(*positions.shape[:-1], -1)

    def init_cache(
        self,
        batch: int,
        length: int,
        *,
        rolling: bool = False,
        dtype: DTypeLike | None = None,
        memory: Float[Array, "B S D"] | None = None,
        memory_mask: Bool[Array, "B S"] | None = None,
    ) -> LayerCache:
        """Room for the sub-tokens of `length` tokens, or those of a memory.

        rolling: hold the last `length` tokens of a stream without end; at least the (left_chunks + 1) chunk that one sees.
        Raises ValueError for a rolling cache that is shorter, or not of a streaming mixer.
        """
        if rolling and (self.reach is None or length < self.reach):
            needed = "a streaming mixer" if self.reach is None else f"at least the {self.reach} tokens that one may see"
            raise ValueError(f"rolling: the cache forgets what no token sees any more and needs {needed}, got length={length}")
        if rolling and memory is None:
            return init_cache(batch, length * self.factor, self.cache_spec(), dtype=dtype or self.cache_dtype, sinks=0)
        if memory is not None and memory_mask is not None:
            check_memory_mask(memory, memory_mask)
        memory = None if memory is None else self._fold(memory)
        memory_mask = None if memory_mask is None else jnp.repeat(memory_mask, self.factor, axis=-1)
        return super().init_cache(batch, length * self.factor, dtype=dtype, memory=memory, memory_mask=memory_mask)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        *,
        mask: Any = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The tokens x after those in the cache; lengths are those of tokens.

        Raises ValueError, outside jit, where streaming goes on in the middle of a chunk; and for more tokens at once than a
        rolling cache can take without losing what they see.
        """
        seen = concrete(cache.seen)
        if self.piece > 1 and self.causal and seen is not None and (seen % (self.piece * self.factor)).any():
            raise ValueError(
                f"x: streaming goes on where a chunk of {self.piece} tokens ends, and the rows have had "
                f"{(seen // self.factor).tolist()}; give whole chunks at a time"
            )
        view = jax.eval_shape(cache.view)
        held = view.slots // self.factor
        if view.sinks is not None and self.reach is not None and x.shape[1] > (most := held - self.reach + self.piece):
            raise ValueError(f"x: a rolling cache of {held} tokens takes {most} at a time, got {x.shape[1]}")
        self._warn(x.shape[1], held, x.shape[1] if self.causal else 0)
        lengths = None if lengths is None else lengths * self.factor
        y, cache = super().prefill(self._fold(x), cache, mask=mask, lengths=lengths)
        return unfold_tokens(y, self.factor), cache

    def step(self, x: Float[Array, "B 1 D"], cache: LayerCache, **options: Any) -> tuple[Float[Array, "B 1 D"], LayerCache]:
        """`prefill` of one token. Raises ValueError for a streaming mixer whose tokens see ahead in their chunk."""
        if self.piece > 1:
            raise ValueError(f"x: tokens see to the end of their chunk of {self.piece}; give whole chunks to prefill")
        return self.prefill(x, cache, **options)


class FoldingFFN(nnx.Module):
    """`MLP` on sub-tokens, with F times fewer hidden units; x [..., T, D] -> [..., T, D].

    hidden: of the network unfolded; F divides it and D. options: as in `MLP`.
    """

    def __init__(self, dim: int, hidden: int, *, factor: int = 2, rngs: nnx.Rngs, **options: Any):
        self.factor = factor
        self.mlp = MLP(_width(dim, factor), _units(hidden, factor), rngs=rngs, **options)

    def __call__(self, x: Float[Array, "*B T D"]) -> Float[Array, "*B T D"]:
        return unfold_tokens(self.mlp(fold_tokens(x, self.factor)), self.factor)


class FoldedBlock(Block):
    """A residual layer, folded in part: x [B, T, D] -> [B, T, D].

    where: what is folded: "attn", "ffn" or "both". A model chooses the layers and the factor (the paper: 1, 2 or 4).
    use_bias: of the feed-forward network. mixer_args: of `FoldingAttention`. dtype, param_dtype: of all parts.
    options: of `Block`.
    Raises ValueError for an unknown `where`, and sizes that the factor does not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        *,
        factor: int = 2,
        where: str = "both",
        activation: str = "gelu",
        use_bias: bool = False,
        mixer_args: dict[str, Any] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if where not in WHERE:
            raise unknown("where", where, WHERE)
        attn, ffn = (factor if where in (part, "both") else 1 for part in ("attn", "ffn"))
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        mixer = FoldingAttention(dim, num_heads, factor=attn, **{**shared, **(mixer_args or {})})
        network = FoldingFFN(dim, hidden, factor=ffn, activation=activation, use_bias=use_bias, **shared)
        super().__init__(dim, mixer, network, **shared, **options)


def folding_counts(
    dim: int, hidden: int, factor: int, queries: int, keys: int | None = None, *, dtype: DTypeLike = jnp.bfloat16
) -> dict[str, int]:
    """What one layer costs on one row: parameters (matrices alone), multiply-adds, and bytes of weights and cache.

    keys: as many as queries by default. Raises ValueError for a factor that does not divide dim and hidden.
    """
    s, size = queries if keys is None else keys, jnp.dtype(dtype).itemsize
    width, units = _width(dim, factor), _units(hidden, factor)
    attention, ffn = 4 * width**2, 2 * width * units
    return {
        "attention parameters": attention,
        "ffn parameters": ffn,
        "projection multiply-adds": 2 * (queries + s) * dim * width,
        "score and value multiply-adds": 2 * queries * s * dim * factor,
        "ffn multiply-adds": 2 * queries * dim * units,
        "weight bytes": (attention + ffn) * size,
        "cache bytes": 2 * s * dim * size,
    }


def _picture(axes: Any) -> None:
    """A streaming mask of 8 tokens in chunks of 2, lifted to 2 sub-tokens each."""
    cells = np.asarray(Folded(streaming_chunk_mask(2, 1), 2).dense(16)[0, 0])
    axes.imshow(cells, cmap="Blues", vmax=1.6)
    lines = np.arange(0, 17, 2) - 0.5
    axes.set_xticks(lines, [*map(str, range(8)), ""])
    axes.set_yticks(lines, [*map(str, range(8)), ""])
    axes.grid(color="white")
    axes.set(xlabel="sub-tokens of token s", ylabel="sub-tokens of token t", title="a chunk mask, folded by 2")


PAPER = Paper(
    64,
    "folding_attention",
    "Folding Attention: Memory and Power Optimization for On-Device Transformer-based Streaming Speech Recognition",
    "projections",
    builds=(
        FoldingAttention,
        FoldingFFN,
        FoldedBlock,
        fold_tokens,
        unfold_tokens,
        Folded,
        StreamingChunks,
        streaming_chunk_mask,
        folding_counts,
    ),
    mixer=FoldingAttention,
    masks={
        "streaming chunks": lambda T, S: streaming_chunk_mask(5, 1),
        "causal, folded": lambda T, S: Folded(Causal(), 2),
        "streaming chunks, folded": lambda T, S: Folded(streaming_chunk_mask(3, 1), 2),
    },
    picture=_picture,
    costs={
        "cache numbers per token": "2 * D",
        "parameters": "4 * D ** 2 / f ** 2 + D",
        "multiply-adds of projections": "4 * T * D ** 2 / f",
        "multiply-adds of scores and values": "2 * T * S * D * f",
        "tokens up to which it pays": "2 * D / f",
    },
    notes=(
        "f is the folding factor in the formulas of costs (F is the feed-forward width). The bias that tells sub-tokens apart, "
        "N / F heads, and positions and masks of tokens are our choices. The paper does not compare with a narrower model of "
        "as many parameters; the claim reports one (0.958 against 0.969 folded and 0.967 unfolded, means of three seeds)."
    ),
)
