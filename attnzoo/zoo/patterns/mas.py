"""Segment-Based Attention Masking for GPTs (Katz et al., 2024, arXiv 2412.18487).

A causal language model need not be causal inside text that is known before it generates. With masked attention by
segment (MAS), every block of the prompt (the system's text, a user's turn) sees all of itself; blocks stay in causal
order, and generated text stays causal. With seg[b, pos] the number of the block that token pos belongs to, -1 for
generated or otherwise causal text, and blocks unbroken:

    allowed(b, q, k) = (k <= q)  or  (seg[b, q] = seg[b, k] >= 0)                                     (paper §3)

So every query sees a prefix of the keys, k < e(q), where e(q) is the end of q's block, or q + 1 outside blocks:
`attnzoo.core.masks.PrefixEnd`, whose tiles are known exactly. Positions are unchanged. A block must be processed in one
call; what is in the cache already never changes, since no token looks past the end of its own block.

Costs: L (L + 1) / 2 + Σ m (m - 1) / 2 pairs for blocks of m tokens (`mas_extra_pairs`); decoding and its cache are those
of the causal model.

A causal model needs light fine-tuning: the authors use LoRA of rank 32 and alpha 64 on the query and value projections,
learning rate 2e-4, 3 epochs. The loss counts generated tokens only: inside a block, the next token is visible.

Templates are those of the authors' code for Llama 3.2.
"""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from attnzoo.core.cache import append, cached_attention
from attnzoo.core.cells import Bound, Geometry, concrete
from attnzoo.core.intervals import Intervals
from attnzoo.core.masks import Mask, PrefixEnd, mask
from attnzoo.core.pictures import draw_mask
from attnzoo.errors import unknown
from attnzoo.paper import Paper

Known = jax.Array | np.ndarray
"""Arrays that are known before anything runs stay numpy, and so do the block maps made of them."""


@mask(leaves=("segments",))
class SegmentBlockMask(Mask):
    """Causal, and bidirectional inside each block of known text.

    segments: int ``[T]`` or ``[B, T]``, the number of each token's block, -1 for causal text; aligned with the rows of
        the call. With positions (over a cache, say) the tokens must be consecutive: a block then ends as many
        positions after a query as it ends rows after it.

    In a causal mixer it stands in place of the causal mask (`Mask.instead`). Padding is no segment: combine with `Lengths`.

    Raises ValueError for a number that comes back after a gap; inside jit, where numbers are not known,
    each unbroken run of one number counts as a block of its own.
    """

    segments: Int[Known, "*B T"]

    def __post_init__(self) -> None:
        # Transformations rebuild a mask with other things in place of its array; those are not looked into.
        is_array = isinstance(self.segments, jax.Array | np.ndarray) and self.segments.ndim in (1, 2)
        if is_array and (seg := concrete(self.segments)) is not None:
            _check_unbroken(seg.reshape(-1, seg.shape[-1]))

    @property
    def instead(self) -> bool:
        return True

    def _prefix(self, g: Geometry) -> PrefixEnd:
        shape = self.segments.shape
        if shape not in ((g.queries,), (1, g.queries), (g.batch, g.queries)):
            raise ValueError(
                f"SegmentBlockMask: segments has shape {shape}, but this call needs [T] = ({g.queries},) or "
                f"[B, T] = ({g.batch}, {g.queries})"
            )
        ends = block_ends(self.segments)
        if g.q_positions is None:
            return PrefixEnd(ends)
        known = concrete(g.q_positions)
        positions = g.q_positions if known is None else known
        return PrefixEnd(positions + ends - np.arange(g.queries, dtype=np.int32))

    def bind(self, g: Geometry) -> Bound:
        return self._prefix(g).bind(g)

    def intervals(self, g: Geometry) -> Intervals:
        return self._prefix(g).intervals(g)

    def __call__(self, b: Any, h: Any, q: Any, k: Any) -> Bool[Array, "..."]:
        """The predicate at rows b and columns q and k, index arrays that broadcast; h makes no difference."""
        ends = jnp.atleast_2d(block_ends(self.segments))
        b = jnp.zeros_like(b) if len(ends) == 1 else b
        return (k < ends[b, q]) & (h == h)

    def __repr__(self) -> str:
        return "SegmentBlockMask(...)"


def block_ends(segments: Int[Known, "*B T"]) -> Int[Known, "*B T"]:
    """e(q): one past the last token of q's block, q + 1 outside blocks. numpy where segments are known."""
    known = concrete(segments)
    seg, xp = (jnp.asarray(segments), jnp) if known is None else (known, np)
    at = np.arange(1, seg.shape[-1] + 1, dtype=np.int32)
    last = xp.concatenate([seg[..., 1:] != seg[..., :-1], xp.ones((*seg.shape[:-1], 1), bool)], -1)
    # Read backwards, the end of a run is the smallest end met so far.
    ends = xp.minimum.accumulate(xp.where(last, at, at[-1])[..., ::-1], axis=-1)[..., ::-1]
    return xp.where(seg >= 0, ends, at).astype(np.int32)


def _check_unbroken(seg: Int[np.ndarray, "B T"]) -> None:
    for b, row in enumerate(seg):
        starts = np.flatnonzero(np.diff(row, prepend=row[:1] - 1))
        numbers = row[starts][row[starts] >= 0]
        found, count = np.unique(numbers, return_counts=True)
        if (count > 1).any():
            number = found[count > 1][0]
            places = starts[row[starts] == number].tolist()
            raise ValueError(
                f"segments: block {number} of row {b} is broken, it starts at tokens {places}; a block is one stretch "
                "of text, so give each its own number (also where several conversations share a row)"
            )


def mas_extra_pairs(segments: Int[Known, "*B T"]) -> Int[np.ndarray, "*B"]:
    """Σ m (m - 1) / 2 over the blocks of each row: the pairs that MAS sees beyond the causal L (L + 1) / 2."""
    seg = np.asarray(segments)
    return (np.asarray(block_ends(seg), np.int64) - np.arange(1, seg.shape[-1] + 1)).sum(-1)


def prefill_segments(
    cache: Any,
    q: Float[Array, "B T N H"],
    new: PyTree[Float[Array, "B T K ..."]],
    segments: Int[Known, "*B T"],
    *,
    lengths: Int[Array, " B"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T N Hv"], Any]:
    """(out, cache): T more tokens, whole blocks or causal text, after those that the cache holds.

    Each block must come in one call, though a call may hold several: a block's first tokens have to see its last. Given
    in two parts, it would silently be two blocks. Generated tokens are `cached_attention` as ever, or this with -1.

    Args:
        cache: of any layout. q, new: queries, and keys and values as `append` takes them, rotated for
            ``cache.next_positions(T)``.
        segments: of these tokens alone. lengths: how many of them are real, for right-padded rows; padding belongs to
            no block.
        options: as in `cached_attention`.
    """
    positions = cache.next_positions(q.shape[1])
    if lengths is not None:
        segments = jnp.where(jnp.arange(q.shape[1]) < jnp.asarray(lengths)[:, None], segments, -1)
    cache = append(cache, new, lengths)
    return cached_attention(q, cache, q_positions=positions, mask=SegmentBlockMask(segments), **options), cache


@dataclass(frozen=True)
class HeaderTemplate:
    """Messages with a header and an end: each of a block role is a block, header and end included (Llama 3 chat).

    header: the token that begins a header. end: the token that ends a message; it may also be what rows are padded with.
    block_roles: tokens after `header` that say whose message it is, of those that are known text (not the assistant's).
    A message without an end runs to the next header, or to the end of the row.
    """

    header: int = 128006
    end: int = 128009
    block_roles: tuple[int, ...] = (9125, 882)  # system, user

    def blocks(self, ids: Int[np.ndarray, " T"]) -> Iterator[tuple[int, int]]:
        starts = np.flatnonzero(ids == self.header)
        for start, following in zip(starts, [*starts[1:], len(ids)], strict=True):
            if start + 1 < len(ids) and ids[start + 1] in self.block_roles:
                ends = np.flatnonzero(ids[start:following] == self.end)
                yield int(start), int(start + ends[0] + 1 if len(ends) else following)


@dataclass(frozen=True)
class SectionTemplate:
    """Sections that begin with a header and run up to the next, which is not included (Alpaca).

    text: the token that begins a text; from there (from the start of the row, if it is missing) to the first header is
    the system's block. header: the token that begins a header; instruction, addition: the tokens after it that make
    a block, where an addition directly after an instruction belongs to its block. Other sections (the response) are
    causal.
    """

    text: int = 128000
    header: int = 14711
    instruction: int = 30151
    addition: int = 5688

    def blocks(self, ids: Int[np.ndarray, " T"]) -> Iterator[tuple[int, int]]:
        begins = np.flatnonzero(ids == self.text)
        starts = np.flatnonzero(ids == self.header)
        edges = [begins[0] if len(begins) else 0, *starts, len(ids)]
        kinds = [self.text, *(ids[s + 1] if s + 1 < len(ids) else -1 for s in starts)]
        for i, kind in enumerate(kinds):
            joined = i + 1 < len(kinds) and (kind, kinds[i + 1]) == (self.instruction, self.addition)
            merged = i > 0 and (kinds[i - 1], kind) == (self.instruction, self.addition)
            if kind in (self.text, self.instruction, self.addition) and not merged:
                yield int(edges[i]), int(edges[i + 2 if joined else i + 1])


@dataclass(frozen=True)
class SeparatorTemplate:
    """Blocks that run up to and including a separator (the authors' commonsense data); the rest is causal."""

    separator: int = 17010

    def blocks(self, ids: Int[np.ndarray, " T"]) -> Iterator[tuple[int, int]]:
        ends = np.flatnonzero(ids == self.separator) + 1
        yield from itertools.pairwise([0, *ends.tolist()])


Template = HeaderTemplate | SectionTemplate | SeparatorTemplate

TEMPLATES: dict[str, Template] = {"llama3": HeaderTemplate(), "alpaca": SectionTemplate(), "commonsense": SeparatorTemplate()}
"""By name, with the token ids of Llama 3's tokenizer; for another, build the template with its ids."""


def segments_from_chat(ids: Int[Known, "*B T"], template: str | Template = "llama3") -> Int[np.ndarray, "*B T"]:
    """Tokens of a conversation -> the block number of each token, 0, 1, ... along each row, -1 outside blocks; int32.

    ids: token ids, on the host. template: how blocks are marked, or one of `TEMPLATES` by name.
    Raises ValueError for an unknown name, with the nearest ones.
    """
    if isinstance(template, str) and template not in TEMPLATES:
        raise unknown("template", template, TEMPLATES)
    marks = TEMPLATES[template] if isinstance(template, str) else template
    tokens = np.asarray(ids)
    segments = np.full(tokens.shape, -1, np.int32)
    for row, out in zip(np.atleast_2d(tokens), np.atleast_2d(segments), strict=True):
        nonempty = (block for block in marks.blocks(row) if block[0] < block[1])
        for number, (start, stop) in enumerate(nonempty):
            out[start:stop] = number
    return segments


def _halves(T: int, S: int, *, tail: int) -> SegmentBlockMask:
    """An example: two blocks, then `tail` causal tokens."""
    seg = np.arange(T) * 2 // max(T - tail, 1)
    return SegmentBlockMask(np.where(np.arange(T) < T - tail, seg, -1).astype(np.int32))


def draw_conversation(ax: Any, tokens: tuple[int, int, int] = (8, 14, 10)) -> None:
    """Draws who sees whom in a conversation of a system's text, a user's turn and an answer of so many tokens."""
    draw_mask(ax, SegmentBlockMask(np.repeat([0, 1, -1], tokens)), sum(tokens))
    ends = np.cumsum(tokens)
    for end in ends[:-1]:
        ax.axhline(end - 0.5, color="0.3", linewidth=0.8)
        ax.axvline(end - 0.5, color="0.3", linewidth=0.8)
    names, centers = ("system", "user", "answer"), ends - np.array(tokens) / 2 - 0.5
    ax.set_xticks(centers, names)
    ax.set_yticks(centers, names, rotation=90, va="center")


PAPER = Paper(
    34,
    "mas",
    "Segment-Based Attention Masking for GPTs",
    "patterns",
    builds=(
        SegmentBlockMask,
        block_ends,
        segments_from_chat,
        HeaderTemplate,
        SectionTemplate,
        SeparatorTemplate,
        prefill_segments,
        mas_extra_pairs,
        "attnzoo.core.masks:PrefixEnd",
    ),
    masks={
        "two blocks": functools.partial(_halves, tail=0),
        "two blocks and an answer": functools.partial(_halves, tail=3),
    },
    picture=draw_conversation,
    costs={
        "pairs of one block of m tokens": "T * (T + 1) / 2 + m * (m - 1) / 2",
        "cache numbers per token": "2 * K * H",
    },
    code="transformers, shacharKZ/MAS-Segment-Based-Attention-Masking",
    parity="masking_utils.or_masks(causal_mask_function, blockwise_overlay(segments)) of transformers, cell by cell",
    notes=(
        "A causal model takes the mask as it is, also in prefill, where the blocks of a call's own tokens are given; "
        "prefill_segments is the same for queries, keys and values."
    ),
)
