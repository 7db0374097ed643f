"""Uni-Encoder (Song et al., 2021, arXiv 2106.01263): a BERT that ranks all candidate responses in one pass."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cells import Known
from attnzoo.errors import unknown
from attnzoo.models.encoder import EncoderConfig
from attnzoo.models.layers import layer_maker
from attnzoo.models.objectives import label_smoothed_ce
from attnzoo.nn.embed import Embed, LearnedPositions
from attnzoo.nn.linear import dropout, linear
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack
from attnzoo.zoo.patterns.uni_encoder import MODES, CandidateMask, candidate_means, candidate_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniEncoderConfig(EncoderConfig):
    """A ranker; further fields as in `EncoderConfig`, by default close to BERT's: the gelu is the one by tanh, and norms add
    1e-6 where BERT's add 1e-12.

    mode: who sees whom, as in `CandidateMask`.
    """

    mode: str = "arrow"
    mlp: str = "gelu"
    norm: str = "layer"
    norm_first: bool = False
    positions: str = "learned"
    use_bias: bool = True
    mixer_args: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"use_bias": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)


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
        self.words = Embed(config.vocab_size, dim, scale=1.0, stddev=0.02, rngs=rngs, **dtypes)
        self.positions = LearnedPositions(config.max_length, dim, rngs=rngs, **dtypes)
        self.types = LearnedPositions(2, dim, rngs=rngs, **dtypes)
        self.embed_norm = norm(config.norm, dim, rngs=rngs, **dtypes)
        self.dropout = dropout(config.dropout_rate, rngs)
        self.layers = Stack(
            layer_maker(config, rngs, causal=False), config.num_layers, scan=config.scan_layers, remat=config.remat
        )
        self.norm = norm(config.norm, dim, rngs=rngs, **dtypes) if config.norm_first else None
        self.scorer = linear(
            dim, 1, ("embed", None), use_bias=True, dtype=jnp.float32, param_dtype=config.param_dtype, rngs=rngs
        )

    def embed(
        self, tokens: Int[Array, "B T"], segments: Int[Known, "*#B T"], positions: Int[Known, "*#B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """positions: `candidate_positions` by default."""
        aligned = tokens.shape[1:], (1, *tokens.shape[1:]), tokens.shape
        for name, given in (("segments", segments), ("positions", positions)):
            if given is not None and (tokens.ndim != 2 or given.shape not in aligned):
                raise ValueError(
                    f"{name}: tokens [B, T] need one per token, [T] or [B, T]; got tokens {tokens.shape} and "
                    f"{name} {given.shape}"
                )
        where = candidate_positions(segments) if positions is None else positions
        x = self.words(tokens) + self.positions(where) + self.types((segments >= 0).astype(np.int32))
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
        return jnp.where(count > 0, self.scorer(means)[..., 0], -jnp.inf)

    def readout(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32 by the table of words, for the masked-language-model loss."""
        return self.words.attend(x)

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

    right: which candidate is; rows that have no candidate at all (-inf everywhere) do not count. token_logits: by `readout`,
        of the pass that gave the scores. tokens: before masking; masked: where they were hidden, 15 % in the paper.
    """
    words = label_smoothed_ce(token_logits, tokens, smoothing=0.0, where=masked)
    # Absent candidates get no probability; a row of -inf alone would have no gradient but NaN.
    finite = jnp.maximum(scores, jnp.finfo(scores.dtype).min)
    return label_smoothed_ce(finite, right, smoothing=0.0, where=jnp.isfinite(scores).any(-1)) + words
