"""Uni-Encoder (Song et al., 2021, Findings of ACL 2023, arXiv 2106.01263): all responses ranked in one pass.

A dialogue's context and its C candidate responses are one sequence, [context | candidate 1 | ... | candidate C]. A mask
keeps the candidates apart, and all of them have the same positions, so that none is further from the context than another.
With seg[pos] = -1 in the context and c in candidate c ("arrow", the paper's, §3):

    allowed(q, k) = seg[q] = seg[k]  or  seg[q] = -1  or  seg[k] = -1
    position:       context 0, ..., Lc - 1;   every candidate Lc, Lc + 1, ...

Context and candidates see each other fully, as in a cross-encoder, but the context is encoded once. Since the context
sees all candidates, they hear of each other through it from the second layer on. Beside it, for comparison: "diag" (a
bi-encoder: segments see only themselves), "square" (no mask: candidates see each other), and "independent", which is not
in the paper (the context sees itself alone, so scores do not depend on the other candidates, and the context's keys and
values can be kept across sets of candidates; under "arrow" they cannot).

    score_c = w · mean over candidate c's tokens of the last layer + b,      softmax over the candidates
    loss    = cross-entropy of the right one + masked-language-model loss of the same pass

The mean includes a candidate's first and last special tokens. In training, the others' responses of a batch are the
wrong candidates.

Costs in pairs of tokens, with ΣLr over the candidates: arrow Lc² + 2 Lc ΣLr + ΣLr², cross-encoder Σ (Lc + Lr)², square
(Lc + ΣLr)², diag Lc² + ΣLr²; linear maps see Lc + ΣLr tokens, of the cross-encoder C Lc + ΣLr (`ranking_cost`).

The mask and the pooling are those of the authors' code; the ranker is `attnzoo.models.uni_encoder`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnzoo.core.cells import Bound, Geometry, Known, concrete
from attnzoo.core.intervals import Intervals
from attnzoo.core.masks import HubSegmentMask, Mask, mask
from attnzoo.errors import unknown
from attnzoo.paper import Paper

CONTEXT, PADDING = -1, -2
MODES = ("arrow", "diag", "square", "independent")


@mask(leaves=("segments",))
class CandidateMask(Mask):
    """Who may see whom among a context and its candidates.

    segments: int ``[T]`` or ``[B, T]``, -1 for the context, the number of its candidate for other tokens, -2 for padding,
        which nobody sees.
    mode: "arrow", "diag", "square" or "independent".

    A `HubSegmentMask` in every mode: tiles of two candidates are empty and not visited. Raises ValueError for an unknown
    mode.
    """

    segments: Int[Known, "*B T"]
    mode: str = "arrow"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)

    @property
    def _hubs(self) -> HubSegmentMask:
        """The same cells, said by hubs: of all tokens ("square"), of none ("diag"), of the context."""
        known = concrete(self.segments)
        seg, xp = (self.segments, jnp) if known is None else (known, np)
        if self.mode == "square":
            seg = xp.where(seg >= 0, CONTEXT, seg)
        elif self.mode == "diag":
            seg = xp.where(seg >= CONTEXT, seg + 1, seg)
        return HubSegmentMask(seg, hubs_see=self.mode != "independent")

    def bind(self, g: Geometry) -> Bound:
        return self._hubs.bind(g)

    def intervals(self, g: Geometry) -> Intervals | None:
        return self._hubs.intervals(g)

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        return self._hubs.tile_states(g, block_q, block_k)

    def __repr__(self) -> str:
        return f"CandidateMask({self.mode!r})"


def candidate_positions(segments: Int[Known, "*B T"]) -> Int[Known, "*B T"]:
    """Positions in which every candidate follows the context directly; 0 for padding. numpy where segments are known.

    segments: as in `CandidateMask`, the context first and every candidate one run of tokens. Raises ValueError for
    others, where the numbers are known.
    """
    known = concrete(segments)
    seg, xp = (segments, jnp) if known is None else (known, np)
    if known is not None:
        _check_order(known)
    at = np.arange(seg.shape[-1], dtype=np.int32)
    first = xp.concatenate([xp.ones((*seg.shape[:-1], 1), bool), seg[..., 1:] != seg[..., :-1]], -1)
    start = xp.maximum.accumulate(xp.where(first, at, 0), axis=-1)
    context = (seg == CONTEXT).sum(-1, keepdims=True)
    return xp.where(seg == PADDING, 0, at - start + xp.where(seg >= 0, context, 0)).astype(np.int32)


def _check_order(segments: np.ndarray) -> None:
    for b, row in enumerate(np.atleast_2d(segments)):
        runs = row[np.flatnonzero(np.diff(row, prepend=row[:1] - 1))]
        numbers = runs[runs != PADDING]
        if len(np.unique(numbers)) < len(numbers) or CONTEXT in numbers[1:] or (row < PADDING).any():
            raise ValueError(
                f"segments: row {b} runs through {runs.tolist()}; give the context (-1) first, then each candidate "
                "(0, 1, ...) as one run of tokens, -2 for padding"
            )


def candidate_means(
    x: Float[Array, "B T D"], segments: Int[Known, "*#B T"], num_candidates: int
) -> tuple[Float[Array, "B C D"], Int[Array, "#B C"]]:
    """(mean of every candidate's tokens, how many it has); 0 for a candidate without any. The mean is float32.

    Raises ValueError where known segments hold a candidate that num_candidates leaves out.
    """
    if (known := concrete(segments)) is not None and known.size and known.max() >= num_candidates:
        raise ValueError(f"num_candidates: segments go up to candidate {known.max()}, so at least {known.max() + 1} are "
                         f"needed, got {num_candidates}")  # fmt: skip
    member = jnp.atleast_2d(segments)[:, None, :] == jnp.arange(num_candidates)[:, None]
    count = member.sum(-1)
    total = jnp.matmul(member.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return total / jnp.maximum(count, 1)[..., None], count


class RankingCost(NamedTuple):
    """pairs: of tokens in every attention layer. tokens: that linear maps see."""

    pairs: int
    tokens: int


def ranking_cost(context: int, responses: Sequence[int], mode: str = "arrow") -> RankingCost:
    """What ranking candidates of these lengths costs, in a mode of `CandidateMask` or by a "cross-encoder".

    >>> ranking_cost(160, [20] * 10), ranking_cost(160, [20] * 10, "cross-encoder")
    (RankingCost(pairs=93600, tokens=360), RankingCost(pairs=324000, tokens=1800))
    """
    apart, total = sum(n * n for n in responses), sum(responses)
    pairs = {
        "arrow": context**2 + 2 * context * total + apart,
        "diag": context**2 + apart,
        "square": (context + total) ** 2,
        "independent": context**2 + context * total + apart,
        "cross-encoder": sum((context + n) ** 2 for n in responses),
    }
    if mode not in pairs:
        raise unknown("mode", mode, pairs)
    repeats = len(responses) if mode == "cross-encoder" else 1
    return RankingCost(pairs[mode], repeats * context + total)


def _example(T: int, S: int, *, mode: str) -> CandidateMask:
    """A context of a third of the tokens, candidates of unequal lengths, a padded tail."""
    at = np.arange(T) * 12 // T
    return CandidateMask(np.array([-1, -1, -1, -1, 0, 0, 0, 1, 1, 2, 2, -2], np.int32)[at], mode)


PAPER = Paper(
    83,
    "uni_encoder",
    "Uni-Encoder: A Fast and Accurate Response Selection Paradigm for Generation-Based Dialogue Systems",
    "patterns",
    builds=(
        CandidateMask,
        candidate_positions,
        candidate_means,
        ranking_cost,
        "attnzoo.core.masks:HubSegmentMask",
        "attnzoo.models.uni_encoder:UniEncoderRanker",
        "attnzoo.models.uni_encoder:response_selection_loss",
    ),
    masks={mode: functools.partial(_example, mode=mode) for mode in MODES},
    costs={
        "pairs, C candidates of R tokens, context of T": "T ** 2 + 2 * T * C * R + C * R ** 2",
        "pairs of a cross-encoder": "C * (T + R) ** 2",
        "tokens in linear maps": "T + C * R",
    },
    code="dll-wu/Uni-Encoder, transformers",
    parity=(
        "transformers' BertModel (with hidden_act='gelu_new' and layer_norm_eps=1e-6, which are this library's) with the mask "
        "as an additive array: last layer, scores and gradients to 1e-5"
    ),
    notes=(
        'The mode "independent" is not in the paper. The masked-language-model head is the embedding table alone, without '
        "BERT's dense layer before it. Neither BERT's sizes nor its exact gelu and its 1e-12 in norms are defaults: any "
        "`EncoderConfig` builds."
    ),
)
