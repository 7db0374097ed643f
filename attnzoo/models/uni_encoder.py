"""Uni-Encoder (Song et al., 2021, arXiv 2106.01263): a BERT that ranks all candidate responses in one pass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cells import Known
from attnzoo.models.encoder import EncoderConfig
from attnzoo.models.layers import layer_maker
from attnzoo.models.objectives import label_smoothed_ce
from attnzoo.nn.embed import LearnedPositions, logits
from attnzoo.nn.linear import dropout, linear, named
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack
from attnzoo.zoo.patterns.uni_encoder import CandidateMask, candidate_means, candidate_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniEncoderConfig(EncoderConfig):
    """A ranker; further fields as in `EncoderConfig`, by default those of BERT's architecture.

    mode: who sees whom, as in `CandidateMask`.
    """

    mode: str = "arrow"
    mlp: str = "gelu"
    norm: str = "layer"
    norm_first: bool = False
    positions: str = "learned"
    use_bias: bool = True
    mixer_args: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"use_bias": True})


class UniEncoderRanker(nnx.Module):
    """tokens [B, T] of a context and its candidates -> a score per candidate [B, C], in float32.

    Tables of words, positions and token types (0 context, 1 candidates), all N(0, 0.02²), are summed and normalised, as
    in BERT.

    Raises ValueError unless config.positions is "learned": candidates share positions, which are looked up.
    """

    def __init__(self, config: UniEncoderConfig, *, rngs: nnx.Rngs):
        if config.positions != "learned":
            raise ValueError(f"positions: candidates share positions of a table; 'learned' works, got {config.positions!r}")
        self.config = config
        dim, dtypes = config.dim, config.dtypes
        words = nnx.initializers.normal(0.02)(rngs.params(), (config.vocab_size, dim), config.param_dtype)
        self.words = nnx.Param(words, **named("vocab", "embed"))
        self.positions = LearnedPositions(config.max_length, dim, rngs=rngs, **dtypes)
        self.types = LearnedPositions(2, dim, rngs=rngs, **dtypes)
        self.embed_norm = norm(config.norm, dim, rngs=rngs, **dtypes)
        self.dropout = dropout(config.dropout_rate, rngs)
        self.layers = Stack(
            layer_maker(config, rngs, causal=False), config.num_layers, scan=config.scan_layers, remat=config.remat
        )
        self.norm = norm(config.norm, dim, rngs=rngs, **dtypes) if config.norm_first else None
        self.scorer = linear(dim, 1, ("embed", None), use_bias=True, rngs=rngs, **dtypes)

    def embed(
        self, tokens: Int[Array, "B T"], segments: Int[Known, "*#B T"], positions: Int[Known, "*#B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """positions: `candidate_positions` by default."""
        if tokens.ndim != 2 or segments.shape not in (tokens.shape[1:], (1, *tokens.shape[1:]), tokens.shape):
            raise ValueError(
                f"segments: tokens [B, T] need one per token, [T] or [B, T]; got tokens {tokens.shape} and "
                f"segments {segments.shape}"
            )
        where = candidate_positions(segments) if positions is None else positions
        x = jnp.take(self.words[...], tokens, axis=0, mode="clip").astype(self.positions.dtype)
        x = x + self.positions(jnp.asarray(where)) + self.types((jnp.asarray(segments) >= 0).astype(jnp.int32))
        return self.dropout(self.embed_norm(x))

    def encode(
        self, tokens: Int[Array, "B T"], segments: Int[Known, "*#B T"], positions: Int[Known, "*#B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The last layer's vectors."""
        x = self.layers(self.embed(tokens, segments, positions), mask=CandidateMask(segments, self.config.mode))
        return x if self.norm is None else self.norm(x)

    def score(self, x: Float[Array, "B T D"], segments: Int[Known, "*#B T"], num_candidates: int) -> Float[Array, "B C"]:
        """w · mean over each candidate's tokens + b; -inf for a candidate that a row does not have."""
        means, count = candidate_means(x, segments, num_candidates)
        return jnp.where(count > 0, self.scorer(means.astype(x.dtype))[..., 0].astype(jnp.float32), -jnp.inf)

    def readout(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32 by the table of words, for the masked-language-model loss."""
        return logits(x, self.words[...].T, x.dtype)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        segments: Int[Known, "*#B T"],
        num_candidates: int,
        positions: Int[Known, "*#B T"] | None = None,
    ) -> Float[Array, "B C"]:
        """segments: as in `CandidateMask`. num_candidates: C. positions: `candidate_positions` by default."""
        return self.score(self.encode(tokens, segments, positions), segments, num_candidates)


def response_selection_loss(
    scores: Float[Array, "B C"],
    right: Int[Array, "B"],
    token_logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    masked: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Cross-entropy of the right candidate plus that of the masked tokens, in nats.

    right: which candidate is. token_logits: by `readout`, of the pass that gave the scores. tokens: before masking;
    masked: where they were hidden, 15 % in the paper.
    """
    words = label_smoothed_ce(token_logits, tokens, smoothing=0.0, where=masked)
    return label_smoothed_ce(scores, right, smoothing=0.0) + words
