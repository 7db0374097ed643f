"""The mask protocol and its algebra: ``&``, ``|`` and ``~``."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnzoo.core.blocks import FULL, PARTIAL, BlockMap, block_map, states_by_position, states_of_runs
from attnzoo.core.cells import Bound, Cells, Geometry, Tile, all_cells, cut, spread, visible_slots
from attnzoo.core.intervals import Intervals


class Mask:
    """Who may see whom: a predicate of (batch row, query head, query, key), True where the key may be seen.

    Masks combine with ``&``, ``|`` and ``~`` and are pytrees: arrays they carry are leaves, their structure is static.
    Positional masks compare token *positions*, which are the row and column numbers unless the call gives others; masks
    that carry an array per token are aligned with the rows and columns of the call.

    To write one, subclass, decorate with :func:`mask`, and give ``bind``; give ``intervals`` too if every row sees a few
    runs of keys, and its block map is exact for free. Where no row sees far beyond its own number, or far before it, the bound
    mask may say so (`Bound.ahead`, `Bound.behind`): fused kernels then leave out what lies on that side of a tile's diagonal.
    """

    def bind(self, g: Geometry) -> Bound:
        """The predicate and the arrays it needs, for geometry ``g``."""
        raise NotImplementedError

    def intervals(self, g: Geometry) -> Intervals | None:
        """The keys each row sees as runs (of positions, for positional masks), or None if that is not how it is made."""
        return None

    def exact_states(self, g: Geometry, block_q: int, block_k: int) -> Any | None:
        """Tile states ``[B|1, N|1, nq, nk]`` where the mask knows a way to them of its own, else None. Exact, but rows that no
        one reads need not count."""
        return None

    @property
    def opaque(self) -> bool:
        """Whether nothing is known of it but its cells, so that without asking them every tile counts as partial."""
        return False

    @property
    def instead(self) -> bool:
        """Whether it stands in place of the mask that a mixer adds itself (a causal one, say), rather than beside it."""
        return False

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        """Conservative tile states ``[B|1, N|1, nq, nk]`` for when cells are too many to ask; never hides a visible cell."""
        runs = self.intervals(g)
        if runs is None:
            nq, nk = -(-g.queries // block_q), -(-g.keys // block_k)
            return np.full((1, 1, nq, nk), PARTIAL, np.int8)
        if g.kv_positions is not None:
            return states_by_position(runs, g, block_q, block_k)
        return states_of_runs(runs, g, block_q, block_k)

    def block_map(
        self,
        queries: int,
        keys: int | None = None,
        *,
        block_q: int = 512,
        block_k: int = 512,
        batch: int = 1,
        heads: int = 1,
    ) -> BlockMap:
        """Which ``block_q × block_k`` tiles of a ``queries × keys`` problem are empty, full or partial.

        keys defaults to ``queries``; batch and heads matter only to masks that tell them apart.
        """
        keys = queries if keys is None else keys
        g = Geometry(batch, heads, heads, queries, keys)
        return block_map(self, g, min(block_q, queries), min(block_k, keys))

    def dense(self, queries: int, keys: int | None = None, *, batch: int = 1, heads: int = 1) -> jax.Array:
        """The mask as a bool array ``[B|1, N|1, T, S]``, for looking at small cases."""
        g = Geometry(batch, heads, heads, queries, queries if keys is None else keys)
        cells = all_cells(g)
        ok = visible(self.bind(g), g, cells, Tile((0, 0, 0, 0), (batch, heads, g.queries, g.keys)))
        return jnp.broadcast_to(ok, (*ok.shape[:2], g.queries, g.keys))

    def __and__(self, other: Mask) -> Mask:
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self) -> Mask:
        return Not(self)


def visible(bound: Bound, g: Geometry, cells: Cells, tile: Tile) -> jax.Array:
    """Evaluate a bound mask on the whole rectangle, empty key slots included."""
    ok = jnp.asarray(bound.apply(cells, *(spread(op, cut(op, tile, g.keys), tile) for op in bound.operands)), bool)
    slots = visible_slots(g, cells)
    return ok if slots is None else ok & slots


@typing.dataclass_transform(frozen_default=True, eq_default=False)
def mask(*, leaves: tuple[str, ...] = ()) -> Callable[[type], type]:
    """Class decorator: a frozen dataclass registered as a pytree, with the named fields as leaves, the others static."""

    def wrap(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=cls.__repr__ is object.__repr__)(cls)
        static = [f.name for f in dataclasses.fields(cls) if f.name not in leaves]
        return jax.tree_util.register_dataclass(cls, data_fields=list(leaves), meta_fields=static)

    return wrap


@mask(leaves=("a", "b"))
class And(Mask):
    """Visible in both."""

    a: Mask
    b: Mask

    @property
    def opaque(self) -> bool:
        return self.a.opaque and self.b.opaque

    @property
    def instead(self) -> bool:
        return self.a.instead or self.b.instead

    def bind(self, g: Geometry) -> Bound:
        a, b = self.a.bind(g), self.b.bind(g)
        return _both(a, b, lambda x, y: x & y, _least)

    def intervals(self, g: Geometry) -> Intervals | None:
        a, b = self.a.intervals(g), self.b.intervals(g)
        if a is None or b is None:
            # Either alone is a superset of what both allow.
            some = a if b is None else b
            return None if some is None else dataclasses.replace(some, exact=False)
        return a.intersect(b)

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        return _minimum(self.a.tile_states(g, block_q, block_k), self.b.tile_states(g, block_q, block_k))

    def __repr__(self) -> str:
        return " & ".join(f"({x})" if isinstance(x, Or) else str(x) for x in (self.a, self.b))


@mask(leaves=("a", "b"))
class Or(Mask):
    """Visible in either."""

    a: Mask
    b: Mask

    @property
    def opaque(self) -> bool:
        return self.a.opaque or self.b.opaque

    @property
    def instead(self) -> bool:
        return self.a.instead or self.b.instead

    def bind(self, g: Geometry) -> Bound:
        a, b = self.a.bind(g), self.b.bind(g)
        return _both(a, b, lambda x, y: x | y, _most)

    def intervals(self, g: Geometry) -> Intervals | None:
        a, b = self.a.intervals(g), self.b.intervals(g)
        return None if a is None or b is None else a.union(b)

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        a, b = self.a.tile_states(g, block_q, block_k), self.b.tile_states(g, block_q, block_k)
        return (np if _numpy(a, b) else jnp).maximum(a, b)

    def __repr__(self) -> str:
        return f"{self.a} | {self.b}"


@mask(leaves=("a",))
class Not(Mask):
    """Visible where the other is not."""

    a: Mask

    @property
    def opaque(self) -> bool:
        return self.a.opaque

    def bind(self, g: Geometry) -> Bound:
        inner = self.a.bind(g)
        return Bound(inner.operands, lambda c, *parts: ~inner.apply(c, *parts))

    def intervals(self, g: Geometry) -> Intervals | None:
        inner = self.a.intervals(g)
        return None if inner is None else inner.complement()

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        if g.kv_positions is not None:
            # Empty key slots are hidden both ways, so an empty tile need not become a full one.
            return _minimum(FULL - self.a.tile_states(g, block_q, block_k), np.int8(PARTIAL))
        return FULL - self.a.tile_states(g, block_q, block_k)

    def __repr__(self) -> str:
        return f"~({self.a})" if isinstance(self.a, And | Or) else f"~{self.a}"


@mask(leaves=("a",))
class Instead(Mask):
    """The same cells, in place of the mask that a mixer adds itself: what a causal model sees is ``a`` alone.

    Also as a part of ``&`` and ``|``. ``Instead(Causal() | Prefix(n))`` makes a causal language model a prefix one.
    """

    a: Mask

    @property
    def opaque(self) -> bool:
        return self.a.opaque

    @property
    def instead(self) -> bool:
        return True

    def bind(self, g: Geometry) -> Bound:
        return self.a.bind(g)

    def intervals(self, g: Geometry) -> Intervals | None:
        return self.a.intervals(g)

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        return self.a.tile_states(g, block_q, block_k)

    def __repr__(self) -> str:
        return f"Instead({self.a})"


Reach = int | None


def _both(a: Bound, b: Bound, join: Callable[[Any, Any], Any], reach: Callable[[Reach, Reach], Reach]) -> Bound:
    cut = len(a.operands)

    def apply(c: Cells, *p: Any) -> Any:
        return join(a.apply(c, *p[:cut]), b.apply(c, *p[cut:]))

    return Bound((*a.operands, *b.operands), apply, reach(a.ahead, b.ahead), reach(a.behind, b.behind))


def _least(x: Reach, y: Reach) -> Reach:
    """How far rows see that see what both of two masks show."""
    return min((n for n in (x, y) if n is not None), default=None)


def _most(x: Reach, y: Reach) -> Reach:
    """How far rows see that see what either of two masks shows."""
    return None if x is None or y is None else max(x, y)


def _numpy(*xs: Any) -> bool:
    return all(isinstance(x, np.ndarray | np.generic) for x in xs)


def _minimum(a: Any, b: Any) -> Any:
    return (np if _numpy(a, b) else jnp).minimum(a, b)
