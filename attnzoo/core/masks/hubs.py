"""Segments that see each other only through hubs."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Bound, Geometry, Known, Operand
from attnzoo.core.intervals import MAX_RUNS, Intervals
from attnzoo.core.masks.base import Mask, mask
from attnzoo.core.masks.positional import as_known

HUB, PADDING = -1, -2
_NONE = 2**30


@mask(leaves=("segments", "kv_segments"))
class HubSegmentMask(Mask):
    """Tokens see their own segment and all hubs; hubs see everything.

    With seg the number of a token's segment, -1 for a hub (a context, global tokens) and -2 for padding, which nobody
    sees and which sees nothing:

        allowed(q, k) = seg[q] = seg[k]  or  seg[q] = -1  or  seg[k] = -1

    segments: int ``[T]`` or ``[B, T]``; kv_segments: the same for the S keys (default: segments). Aligned with the rows and
        columns of the call.
    hubs_see: whether hubs see the segments. Without it they see each other alone, so that no segment hears of another at
        any depth.

    Block maps are exact where every segment is one unbroken run, from one run of keys per row and one per run of hubs;
    otherwise tiles are told by the segments that their rows and columns range over, also under jit: exact where numbers
    do not decrease along the sequence (hubs may stand anywhere), and never hiding a visible cell.
    """

    segments: Int[Known, "*B T"]
    kv_segments: Int[Known, "*B S"] | None = None
    hubs_see: bool = True

    def _ids(self, g: Geometry) -> tuple[Any, Any]:
        q = as_known(self.segments)
        kv = q if self.kv_segments is None else as_known(self.kv_segments)
        for name, x, letter, n in (("segments", q, "T", g.queries), ("kv_segments", kv, "S", g.keys)):
            if tuple(x.shape) not in ((n,), (1, n), (g.batch, n)):
                raise ValueError(f"HubSegmentMask: {name} has shape {tuple(x.shape)}, but this call needs [{letter}] = ({n},) "
                                 f"or [B, {letter}] = ({g.batch}, {n})")  # fmt: skip
        return q.reshape(-1, g.queries), kv.reshape(-1, g.keys)

    def bind(self, g: Geometry) -> Bound:
        q, kv = self._ids(g)
        ops = Operand(q[:, None, :, None], "aligned"), Operand(kv[:, None, None, :], "aligned")

        def apply(c: Any, q: Any, k: Any) -> Any:
            seen = (q == k) | (k == HUB)
            if self.hubs_see:
                seen = seen | (q == HUB)
            return seen & (q > PADDING) & (k > PADDING)

        return Bound(ops, apply)

    def intervals(self, g: Geometry) -> Intervals | None:
        """The row's own segment and each run of hubs; None where a segment is broken or numbers are traced."""
        q, kv = self._ids(g)
        if g.kv_positions is not None or not (isinstance(q, np.ndarray) and isinstance(kv, np.ndarray)):
            return None
        rows = []
        for i in range(max(len(q), len(kv))):
            runs = self._row_runs(q[i % len(q)], kv[i % len(kv)])
            if runs is None:
                return None
            rows.append(runs)
        count = max(lo.shape[-1] for lo, _ in rows)
        if count > MAX_RUNS:
            return None
        padded = [[np.pad(x, ((0, 0), (0, count - x.shape[-1]))) for x in ends] for ends in zip(*rows, strict=True)]
        lo, hi = (np.stack(ends)[:, None] for ends in padded)
        return Intervals(lo.astype(np.int32), hi.astype(np.int32))

    def _row_runs(self, q: np.ndarray, kv: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Runs ``[T, r]`` of keys that the rows see, of one batch row."""
        starts = np.flatnonzero(np.diff(kv, prepend=kv[:1] - 1))
        stops, ids = np.append(starts[1:], len(kv)), kv[starts]
        own = np.argsort(ids, kind="stable")
        own = own[ids[own] >= 0]  # one run per segment, by number
        if len(np.unique(ids[own])) < len(own):
            return None
        hubs = [(starts[i], stops[i]) for i in np.flatnonzero(ids == HUB)]
        real = _runs(kv > PADDING) if self.hubs_see else hubs
        count = max(1 + len(hubs), len(real))
        runs = np.zeros((2, len(q), count), np.int64)
        if len(own):
            at = np.minimum(np.searchsorted(ids[own], q), len(own) - 1)
            found = (q >= 0) & (ids[own][at] == q)
            runs[:, :, 0] = np.where(found, (starts[own][at], stops[own][at]), 0)
        runs[:, q >= 0, 1 : 1 + len(hubs)] = np.reshape(hubs, (-1, 2)).T[:, None]
        runs[:, q == HUB, : len(real)] = np.reshape(real, (-1, 2)).T[:, None]
        return runs[0], runs[1]

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        """By the hubs, the padding and the range of segments among a tile's rows and among its columns."""
        q, kv = self._ids(g)
        xp: Any = np if isinstance(q, np.ndarray) and isinstance(kv, np.ndarray) else jnp
        rows, cols = _ranges(xp, q, block_q), _ranges(xp, kv, block_k)
        r_low, r_high, r_hub, r_gap = (x[:, None, :, None] for x in rows)
        c_low, c_high, c_hub, c_gap = (x[:, None, None, :] for x in cols)
        one = xp.maximum(r_high, c_high) == xp.minimum(r_low, c_low)  # the same segment on both sides, and no other
        only_hubs_r, only_hubs_c = r_high < 0, c_high < 0
        apart = (r_high < c_low) | (c_high < r_low)
        if self.hubs_see:
            full = only_hubs_r | only_hubs_c | one
            hidden = ~r_hub & ~c_hub & apart
        else:
            full = only_hubs_c | (one & ~(r_hub & ~only_hubs_c))
            hidden = ~c_hub & apart
        nothing = (only_hubs_r & ~r_hub) | (only_hubs_c & ~c_hub)  # all padding on one side
        state = xp.where(nothing | hidden, EMPTY, xp.where(full & ~r_gap & ~c_gap, FULL, PARTIAL)).astype(np.int8)
        # Key slots may be empty where keys have positions of their own.
        return state if g.kv_positions is None else xp.minimum(state, np.int8(PARTIAL))

    def __repr__(self) -> str:
        return f"HubSegmentMask(...{'' if self.hubs_see else ', hubs_see=False'})"


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """The stretches of True."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return [(int(a), int(z)) for a, z in edges.reshape(-1, 2)]


def _ranges(xp: Any, ids: Any, block: int) -> tuple[Any, Any, Any, Any]:
    """Per block of tokens ``[B, blocks]``: lowest and highest segment, whether it has a hub, whether it has padding."""
    tiles = -(-ids.shape[1] // block)
    past = _NONE  # a last block may be short; what lies past the end is no token
    ids = xp.pad(ids, ((0, 0), (0, tiles * block - ids.shape[1])), constant_values=past).reshape(len(ids), tiles, block)
    own = (ids >= 0) & (ids != past)
    low, high = xp.where(own, ids, _NONE).min(-1), xp.where(own, ids, HUB).max(-1)
    return low, high, (ids == HUB).any(-1), (ids <= PADDING).any(-1)
