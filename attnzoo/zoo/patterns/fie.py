"""FiE (Kedia et al., 2022, EMNLP 2022, arXiv 2211.10147): passages that read each other through a few global tokens.

An extractive reader gets P passages X_p [S, D], each the question and a retrieved text. A few global tokens G [g, D]
join the encoder's input: in every layer they read all passages, and every passage reads itself and them (§3.1):

    G'   = Layer(q = G,   kv = [G ; X_1 ; ... ; X_P])
    X_p' = Layer(q = X_p, kv = [G ; X_p])                       the same weights; both read what the layer was given

So evidence from all passages meets early, without a decoder. On the flat sequence [G | X_1 | ... | X_P] it is one
attention whose mask is a `HubSegmentMask` with G as its hubs (`FusionMask`); `fusion_attention` computes the two lines
instead. Positions count from 0 in every passage, global tokens have none: passages are exchangeable.

Spans of all passages compete in one softmax (§3.2). For i <= j < i + Lmax outside the question and the padding

    s_pij = w · gelu(W_1 x_pi + W_2 x_pj + b),       P(p, i, j) = exp(s_pij) / Σ over all passages and valid spans
    loss  = -log Σ P over all occurrences of the answer,      P(string) = Σ P over the spans that read so

Costs: g (g + ΣS) + ΣS (g + S) pairs per layer, linear in P, where one long sequence has (g + ΣS)².

Who reads whom follows the paper's text; the paper's code is not public, so the scorer's layers, g = 10 and the initial
N(0, 0.02²) of G are our choice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.attention import attention
from attnzoo.core.cells import Known, concrete
from attnzoo.core.masks import HubSegmentMask, Lengths
from attnzoo.core.weights import softmax_rows
from attnzoo.nn.block import Block
from attnzoo.nn.embed import Embed, LearnedPositions
from attnzoo.nn.feed_forward import feed_forward
from attnzoo.nn.linear import dropout, dropout_arguments, linear, named
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention


def FusionMask(passage_ids: Int[Known, "*B T"], n_global: int) -> HubSegmentMask:
    """Who sees whom on the flat sequence [G | X_1 | ... | X_P], as a `HubSegmentMask`.

    passage_ids: of the passages' tokens, 0, 1, ..., -2 for padding, as `passage_ids` gives them. n_global: g.
    """
    xp: Any = np if isinstance(passage_ids, np.ndarray) else jnp
    hubs = ((0, 0),) * (passage_ids.ndim - 1) + ((n_global, 0),)
    return HubSegmentMask(xp.pad(passage_ids, hubs, constant_values=-1))


def passage_ids(lengths: Int[Known, "B P"], length: int) -> Int[Known, "B P*S"]:
    """The passage of every token of P passages padded to S = length, -2 for padding."""
    xp: Any = np if isinstance(lengths, np.ndarray) else jnp
    passages = np.arange(lengths.shape[1])[:, None]
    ids = xp.where(np.arange(length) < lengths[..., None], passages, -2)
    return ids.reshape(len(lengths), -1).astype(np.int32)


def fusion_attention(
    mixer: GroupedQueryAttention, x: Float[Array, "B T D"], lengths: Int[Known, "B P"], n_global: int
) -> Float[Array, "B T D"]:
    """`mixer` over [G | X_1 | ... | X_P] under `FusionMask`, without its (g + ΣS)² logits.

    x: T = g + P·S tokens. lengths: real tokens of every right-padded passage. mixer: its head outputs are merged, and its
    weights dropped, as it does itself; one that is causal or rotates by position is refused with a ValueError, since the
    flat sequence has no such order.
    """
    if mixer.causal or mixer.positions is not None:
        raise ValueError(
            "mixer: tokens of a flat sequence of passages have no common order; build with causal=False and positions=None, "
            f"this has causal={mixer.causal} and {mixer.positions}"
        )
    (batch, passages), g = lengths.shape, n_global
    if passages < 1 or not 0 <= g < x.shape[1] or (x.shape[1] - g) % passages:
        raise ValueError(
            f"x, lengths, n_global: needed are T = g + P S tokens of at least one passage, got x {x.shape}, lengths "
            f"{lengths.shape} and n_global={g}"
        )
    q, k, v = mixer.qkv(x)
    apart = (batch, passages, (x.shape[1] - g) // passages)

    def attend(q: Array, k: Array, v: Array, mask: Any) -> Array:
        options = {**mixer.attention_arguments(), **dropout_arguments(mixer.dropout)}
        return attention(q, k, v, mask=mask, **options)

    def with_globals(y: Array) -> Array:
        ours = jnp.broadcast_to(y[:, None, :g], (batch, passages, g, *y.shape[2:]))
        return jnp.concatenate([ours, y[:, g:].reshape(*apart, *y.shape[2:])], 2)

    real: Any = lengths.reshape(-1)
    o = attend(q[:, g:].reshape(*apart, *q.shape[2:]), with_globals(k), with_globals(v), Lengths(real + g, real))
    o = o.reshape(batch, -1, *o.shape[3:])
    if g:
        everything = FusionMask(passage_ids(lengths, apart[2]), g).segments
        hubs = HubSegmentMask(np.full(g, -1, np.int32), everything)
        o = jnp.concatenate([attend(q[:, :g], k, v, hubs), o], 1)
    return mixer.merge(o, x)


class FusionBlock(Block):
    """A Transformer layer over [G | X_1 | ... | X_P]; called plainly it takes `mask=FusionMask(...)`."""

    def fuse(self, x: Float[Array, "B T D"], lengths: Int[Known, "B P"], n_global: int) -> Float[Array, "B T D"]:
        """The same layer by `fusion_attention`."""
        mixer: Any = self.mixer
        return self._layer(x, lambda h: (fusion_attention(mixer, h, lengths, n_global), None), None)[0]


class FiEEncoder(nnx.Module):
    """Passages [B, P, S] of tokens -> (global tokens [B, g, D], passages [B, P, S, D]); pre-norm.

    n_global: g; with 0 every passage is encoded alone. max_length: the longest passage.
    dropout_rate: of embeddings and of what each part adds. scan_layers, remat: as in `nn.stack.Stack`.
    dtype, param_dtype: of the computation and of the parameters.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        num_heads: int,
        num_layers: int,
        *,
        n_global: int = 10,
        max_length: int = 512,
        mlp_dim: int | None = None,
        dropout_rate: float = 0.0,
        scan_layers: bool = False,
        remat: str = "none",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if n_global < 0:
            raise ValueError(f"n_global: must be at least 0, got {n_global}")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = Embed(vocab_size, dim, **options)
        self.positions = LearnedPositions(max_length, dim, **options)
        start = nnx.initializers.normal(0.02)(rngs.params(), (n_global, dim), param_dtype)
        self.globals = nnx.Param(start, **named(None, "embed"))
        self.dropout = dropout(dropout_rate, rngs)

        def layer(_: int) -> FusionBlock:
            return FusionBlock(
                dim,
                GroupedQueryAttention(dim, num_heads, use_bias=True, **options),
                feed_forward("gelu", dim, mlp_dim, use_bias=True, **options),
                norm="layer",
                dropout_rate=dropout_rate,
                **options,
            )

        self.layers = Stack(layer, num_layers, scan=scan_layers, remat=remat)
        self.norm = norm("layer", dim, **options)

    def flat(self, passages: Int[Array, "B P S"]) -> Float[Array, "B T D"]:
        """What the first layer is given: [G | X_1 | ... | X_P]."""
        x = self.embed(passages) + self.positions(np.arange(passages.shape[-1]))
        batch, width = len(passages), x.shape[-1]
        ours = jnp.broadcast_to(self.globals[...].astype(x.dtype), (batch, *self.globals.shape))
        return self.dropout(jnp.concatenate([ours, x.reshape(batch, -1, width)], 1))

    def __call__(
        self, passages: Int[Array, "B P S"], lengths: Int[Known, "B P"] | None = None
    ) -> tuple[Float[Array, "B g D"], Float[Array, "B P S D"]]:
        """lengths: real tokens of every right-padded passage, all by default."""
        if passages.ndim != 3 or not passages.shape[1] or (lengths is not None and lengths.shape != passages.shape[:2]):
            got = f"passages {passages.shape}" + ("" if lengths is None else f" and lengths {lengths.shape}")
            raise ValueError(f"passages, lengths: needed are [B, P, S] and [B, P] with P at least 1, got {got}")
        if lengths is None:
            lengths = np.full(passages.shape[:2], passages.shape[2], np.int32)
        g = self.globals.shape[0]
        fused = self.layers.through(lambda layer, x, _: (layer.fuse(x, lengths, g), None), self.flat(passages))
        x = self.norm(fused)
        return x[:, :g], x[:, g:].reshape(*passages.shape, -1)


class SpanScorer(nnx.Module):
    """x [B, P, S, D] -> scores [B, P, S, Lmax] in float32: entry (i, d) belongs to the span of tokens i, ..., i + d.

    max_length: Lmax. options: dtype, param_dtype, as in `nn.linear.linear`.
    """

    def __init__(self, dim: int, *, max_length: int = 10, rngs: nnx.Rngs, **options: Any):
        if max_length < 1:
            raise ValueError(f"max_length: a span has at least 1 token, got {max_length}")
        self.max_length = max_length
        self.first = linear(dim, dim, ("embed", "mlp"), rngs=rngs, **options)
        self.last = linear(dim, dim, ("embed", "mlp"), use_bias=True, rngs=rngs, **options)
        self.out = linear(dim, 1, ("mlp", None), rngs=rngs, **options)

    def __call__(self, x: Float[Array, "B P S D"]) -> Float[Array, "B P S L"]:
        """Spans that reach past the passage have meaningless scores; `valid_spans` tells them."""
        first, last = self.first(x), self.last(x)
        length = x.shape[-2]
        last = jnp.pad(last, ((0, 0), (0, 0), (0, self.max_length - 1), (0, 0)))

        @jax.checkpoint  # else a gradient would keep [B, P, S, Lmax, D]
        def scores(first: Array, last: Array) -> Array:
            return self.out(jax.nn.gelu(first + last))[..., 0].astype(jnp.float32)

        return jnp.stack([scores(first, last[:, :, d : d + length]) for d in range(self.max_length)], -1)


def valid_spans(
    lengths: Int[Known, "B P"], length: int, max_length: int, questions: Int[Known, "B P"] | None = None
) -> Bool[Array, "B P S L"]:
    """Spans that lie in the passage's text: not in the question that precedes it, not in the padding.

    questions: tokens of the question at the start of every passage, 0 by default.
    """
    start, extra = jnp.arange(length)[:, None], jnp.arange(max_length)
    begins = jnp.asarray(0 if questions is None else questions)[..., None, None]
    return (start >= begins) & (start + extra < jnp.asarray(lengths)[..., None, None])


def global_span_probability(scores: Float[Array, "B P S L"], valid: Bool[Array, "B P S L"]) -> Float[Array, "B P S L"]:
    """One softmax over the valid spans of all passages; others get 0, as does everything where none is valid."""
    return _rows(scores, valid)[0].reshape(scores.shape)


def marginal_span_loss(
    scores: Float[Array, "B P S L"], valid: Bool[Array, "B P S L"], gold: Bool[Array, "B P S L"]
) -> Float[Array, ""]:
    """Mean of -log Σ P over the gold spans, in nats, over the rows that have one (0 if none has)."""
    answered = (gold & valid).any((1, 2, 3))
    everything, right = _rows(scores, valid)[1], _rows(scores, gold & valid)[1]
    loss = jnp.where(answered, everything - jnp.where(answered, right, 0), 0)
    return loss.sum() / jnp.maximum(answered.sum(), 1)


def _rows(scores: Array, where: Array) -> tuple[Array, Array]:
    if scores.shape != where.shape:
        raise ValueError(f"valid, gold: scores {scores.shape} need the same shape, got {where.shape}")
    return softmax_rows(scores.astype(jnp.float32).reshape(len(scores), -1), where.reshape(len(scores), -1))


def aggregate_spans(
    probabilities: Float[Array, "B P S L"], strings: Int[Array, "B P S L"], num_strings: int, *, top_k: int | None = None
) -> Float[Array, "B V"]:
    """P(string): the sum of the probabilities of all spans that read so, several in one passage too.

    strings: a number below num_strings for every span, the same for equal (normalised) strings; -1 counts nowhere.
    top_k: only the most probable spans of a row count.

    Raises ValueError for known strings at or above num_strings, and for a top_k of more spans than a row has.
    """
    if probabilities.shape != strings.shape:
        raise ValueError(f"strings: probabilities {probabilities.shape} need the same shape, got {strings.shape}")
    if (known := concrete(strings)) is not None and known.size and known.max() >= num_strings:
        raise ValueError(f"strings: numbers are below num_strings={num_strings}, got {known.max()}")
    p, ids = (x.reshape(len(x), -1) for x in (probabilities, strings))
    if top_k is not None and not 1 <= top_k <= p.shape[1]:
        raise ValueError(f"top_k: must be from 1 to the {p.shape[1]} spans of a row, got {top_k}")
    if top_k is not None:
        p, best = jax.lax.top_k(p, top_k)
        ids = jnp.take_along_axis(ids, best, 1)
    ids = jnp.where(ids < 0, num_strings, ids)
    return jax.vmap(lambda p, ids: jnp.zeros(num_strings).at[ids].add(p, mode="drop"))(p, ids)


def _example(T: int, S: int) -> HubSegmentMask:
    """A few global tokens, three passages, the second with padding."""
    g = max(1, T // 8)
    at = np.arange(T - g) * 12 // (T - g)
    return FusionMask(np.array([0, 0, 0, 0, 1, 1, 1, -2, 2, 2, 2, 2], np.int32)[at], g)


PAPER = Paper(
    155,
    "fie",
    "FiE: Building a Global Probability Space by Leveraging Early Fusion in Encoder for Open-Domain Question Answering",
    "patterns",
    builds=(
        FusionMask,
        passage_ids,
        fusion_attention,
        FusionBlock,
        FiEEncoder,
        SpanScorer,
        valid_spans,
        global_span_probability,
        marginal_span_loss,
        aggregate_spans,
        "attnzoo.core.masks:HubSegmentMask",
    ),
    masks={"three passages": _example},
    costs={
        "pairs, P passages of T tokens, g global tokens": "g * (g + P * T) + P * T * (g + T)",
        "pairs of one long sequence": "(g + P * T) ** 2",
        "parameters of the global tokens": "g * D",
    },
    parity="none: no implementation is public",
    notes=(
        "Equal strings are given to aggregate_spans as equal numbers: normalising text is the caller's. A padded token sees "
        "nothing and gets nothing from attention."
    ),
)
