"""A mask of tokens over the parts that tokens were split into."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from attnzoo.core.cells import Bound, Cells, Geometry, Operand, Tile, cut, spread
from attnzoo.core.intervals import Intervals
from attnzoo.core.masks.base import Mask, mask

_FAR = 2**30


@mask(leaves=("inner",))
class Folded(Mask):
    """A mask of tokens, lifted to `factor` sub-tokens each: sub-tokens see what their tokens see.

    Positions and slots of the call are those of sub-tokens, t·F + i; the inner mask is asked about t.
    """

    inner: Mask
    factor: int

    @property
    def opaque(self) -> bool:
        return self.inner.opaque

    def _tokens(self, g: Geometry) -> Geometry:
        f = self.factor
        if g.queries % f or g.keys % f:
            raise ValueError(f"Folded: T={g.queries} and S={g.keys} sub-tokens are no whole tokens of {f}")
        q, k = g.q_positions, g.kv_positions
        return Geometry(
            g.batch,
            g.heads,
            g.kv_heads,
            g.queries // f,
            g.keys // f,
            None if q is None else q[..., ::f] // f,
            None if k is None else k[..., ::f] // f,
        )

    def bind(self, g: Geometry) -> Bound:
        tokens, f = self._tokens(g), self.factor
        inner = self.inner.bind(tokens)
        whole = Tile((0, 0, 0, 0), (tokens.batch, tokens.heads, tokens.queries, tokens.keys))

        def lifted(op: Operand) -> Operand:
            if op.kind == "whole":
                return op
            if op.block is not None:
                return Operand(op.x, "blocks", (op.block[0] * f, op.block[1] * f))
            x = jnp.asarray(spread(op, cut(op, whole, tokens.keys), whole))
            for axis in (2, 3):
                x = jnp.repeat(x, f, axis=axis) if x.shape[axis] > 1 else x
            return Operand(x, "aligned")

        def apply(c: Cells, *parts: Any) -> Any:
            return inner.apply(Cells(c.b, c.h, c.t // f, c.s // f, c.q // f, c.k // f), *parts)

        return Bound(tuple(lifted(op) for op in inner.operands), apply)

    def intervals(self, g: Geometry) -> Intervals | None:
        runs, f = self.inner.intervals(self._tokens(g)), self.factor
        if runs is None:
            return None
        xp: Any = np if runs.known else jnp
        ends = (xp.clip(end, -_FAR // f, _FAR // f) * f for end in (runs.lo, runs.hi))
        lo, hi = (xp.repeat(end, f, axis=2) if end.shape[2] > 1 else end for end in ends)
        return Intervals(lo, hi, runs.exact)

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        f = self.factor
        if block_q % f or block_k % f:
            return super().tile_states(g, block_q, block_k)
        return self.inner.tile_states(self._tokens(g), block_q // f, block_k // f)

    def __repr__(self) -> str:
        return f"Folded({self.inner}, {self.factor})"
