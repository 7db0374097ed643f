"""Masks that carry arrays aligned with the rows and columns of the call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Int

from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Bound, Geometry, Operand, concrete
from attnzoo.core.intervals import Intervals, span
from attnzoo.core.masks.base import Mask, mask
from attnzoo.core.masks.positional import as_known


def _expect(name: str, x: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    if tuple(x.shape) not in shapes.values():
        wants = " or ".join(f"{letters} = {size}" for letters, size in shapes.items())
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but this call needs {wants}")


@mask(leaves=("q_ids", "kv_ids"))
class Segments(Mask):
    """Only tokens of the same segment see each other: documents packed in one row.

    q_ids: int ``[T]`` or ``[B, T]``; kv_ids: the same for the S keys (default: q_ids). Ids are compared for equality only.
    Where every id is one unbroken run, the block map is exact.
    """

    q_ids: Int[jax.Array, "*B T"]
    kv_ids: Int[jax.Array, "*B S"] | None = None

    def _ids(self, g: Geometry) -> tuple[Any, Any]:
        q = jnp.asarray(self.q_ids) if concrete(self.q_ids) is None else np.asarray(self.q_ids)
        kv = q if self.kv_ids is None else as_known(self.kv_ids)
        b, t, s = g.batch, g.queries, g.keys
        _expect("Segments: q_ids", q, {"[T]": (t,), "[1, T]": (1, t), "[B, T]": (b, t)})
        _expect("Segments: kv_ids", kv, {"[S]": (s,), "[1, S]": (1, s), "[B, S]": (b, s)})
        return q.reshape(-1, t), kv.reshape(-1, s)

    def bind(self, g: Geometry) -> Bound:
        q, kv = self._ids(g)
        ops = Operand(q[:, None, :, None], "aligned"), Operand(kv[:, None, None, :], "aligned")
        return Bound(ops, lambda c, q, kv: q == kv)

    def intervals(self, g: Geometry) -> Intervals | None:
        if g.kv_positions is not None:
            return None
        q, kv = self._ids(g)
        rows = max(len(q), len(kv))
        if isinstance(q, np.ndarray) and isinstance(kv, np.ndarray):
            pairs = [_first_and_last(np, q[i % len(q)], kv[i % len(kv)]) for i in range(rows)]
            lo, hi, count = (np.stack(x)[:, None] for x in zip(*pairs, strict=True))
            return span(lo, hi, exact=bool((hi - lo == count).all()))
        pair = (jnp.broadcast_to(x, (rows, x.shape[1])) for x in (q, kv))
        lo, hi, _ = jax.vmap(lambda a, b: _first_and_last(jnp, a, b))(*pair)
        return span(lo[:, None], hi[:, None], exact=False)

    def __repr__(self) -> str:
        return "Segments(...)"


def _first_and_last(xp: Any, q: Any, kv: Any) -> tuple[Any, Any, Any]:
    """For every id in q: first key with it, one past the last, and how many there are."""
    order = xp.argsort(kv, stable=True)
    left, right = (xp.searchsorted(kv[order], q, side=side) for side in ("left", "right"))
    last = len(kv) - 1
    lo, hi = order[xp.minimum(left, last)], order[xp.maximum(right - 1, 0)] + 1
    none = left == right
    return xp.where(none, 0, lo), xp.where(none, 0, hi), right - left


@mask(leaves=("kv", "q"))
class Lengths(Mask):
    """Right padding: batch row b has ``kv[b]`` real keys and, if given, ``q[b]`` real queries; the others see nothing.

    kv, q: int ``[B]``.
    """

    kv: Int[jax.Array, " B"]
    q: Int[jax.Array, " B"] | None = None

    def _column(self, name: str, x: Any, g: Geometry) -> Any:
        x = as_known(x)
        _expect(f"Lengths: {name}", x, {"[B]": (g.batch,), "[1]": (1,)})
        return x.reshape(-1, 1, 1)

    def bind(self, g: Geometry) -> Bound:
        kv = Operand(self._column("kv", self.kv, g)[..., None], "aligned")
        if self.q is None:
            return Bound((kv,), lambda c, kv: c.s < kv)
        q = Operand(self._column("q", self.q, g)[..., None], "aligned")
        return Bound((kv, q), lambda c, kv, q: (c.s < kv) & (c.t < q))

    def intervals(self, g: Geometry) -> Intervals | None:
        if g.kv_positions is not None:
            return None
        hi = self._column("kv", self.kv, g)
        if self.q is not None:
            q = self._column("q", self.q, g)
            xp = np if isinstance(hi, np.ndarray) and isinstance(q, np.ndarray) else jnp
            hi = xp.where(np.arange(g.queries) < q, hi, 0)
        return span(0, hi)

    def __repr__(self) -> str:
        return "Lengths(...)"


@mask(leaves=("cells",))
class Array(Mask):
    """A bool array that broadcasts to ``[B, N, T, S]``, True where the key may be seen, as ``jax.nn`` takes it."""

    cells: Bool[jax.Array, ...]

    def bind(self, g: Geometry) -> Bound:
        x = jnp.asarray(self.cells)
        want = (g.batch, g.heads, g.queries, g.keys)
        if x.ndim > 4 or any(n not in (1, m) for n, m in zip(x.shape[::-1], want[::-1], strict=False)):
            raise ValueError(f"mask array has shape {x.shape}, which does not broadcast to [B, N, T, S] = {want}")
        return Bound((Operand(x.reshape((1,) * (4 - x.ndim) + x.shape), "aligned"),), lambda c, ok: ok)

    @property
    def opaque(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"Array({'×'.join(map(str, self.cells.shape))})"


@mask(leaves=("table",))
class Blocks(Mask):
    """Block-sparse attention from a table: query block i sees key block j where ``table[..., i, j]``.

    table: bool ``[ceil(T/block_q), ceil(S/block_k)]``, or with leading ``[B|1, N|1]``; it may be traced (chosen by the model
    itself), the map of tiles is then built when it runs. block_q, block_k: tokens per block.
    """

    table: Bool[jax.Array, "*BN nq nk"]
    block_q: int
    block_k: int

    def _table(self, g: Geometry) -> Any:
        table = as_known(self.table)
        nq, nk = -(-g.queries // self.block_q), -(-g.keys // self.block_k)
        lead = table.shape[:-2]
        fits = table.shape[-2:] == (nq, nk) and len(lead) in (0, 2)
        if not fits or any(n not in (1, m) for n, m in zip(lead, (g.batch, g.heads), strict=False)):
            want = f"[{nq}, {nk}] or [{g.batch}|1, {g.heads}|1, {nq}, {nk}]"
            raise ValueError(f"Blocks: table has shape {table.shape}, but T={g.queries}, S={g.keys} in blocks of "
                             f"{self.block_q}×{self.block_k} needs {want}")  # fmt: skip
        return table.reshape((1,) * (4 - table.ndim) + table.shape)

    def bind(self, g: Geometry) -> Bound:
        operand = Operand(jnp.asarray(self._table(g)), "blocks", (self.block_q, self.block_k))
        return Bound((operand,), lambda c, seen: seen)

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        """Exact where one block size is a multiple of the other along each axis."""
        table = self._table(g)
        some = every = table
        for axis, mine, theirs, n in (
            (2, self.block_q, block_q, g.queries),
            (3, self.block_k, block_k, g.keys),
        ):
            tiles = -(-n // theirs)
            if theirs % mine == 0:
                some, every = (_reduce(x, axis, theirs // mine, tiles, fill) for x, fill in ((some, False), (every, True)))
            elif mine % theirs == 0:
                grow = (np if isinstance(table, np.ndarray) else jnp).repeat
                take = (slice(None),) * axis + (slice(tiles),)
                some, every = (grow(x, mine // theirs, axis=axis)[take] for x in (some, every))
            else:
                return super().tile_states(g, block_q, block_k)
        xp = np if isinstance(table, np.ndarray) else jnp
        return xp.where(every, FULL, xp.where(some, PARTIAL, EMPTY)).astype(np.int8)

    def __repr__(self) -> str:
        return f"Blocks({'×'.join(map(str, self.table.shape))}, {self.block_q}×{self.block_k})"


def _reduce(x: Any, axis: int, by: int, tiles: int, fill: bool) -> Any:
    """any (fill False) or all (fill True) over groups of ``by`` along ``axis``, the last group padded with ``fill``."""
    xp = np if isinstance(x, np.ndarray) else jnp
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, tiles * by - x.shape[axis])
    x = xp.pad(x, pad, constant_values=fill)
    x = x.reshape(*x.shape[:axis], tiles, by, *x.shape[axis + 1 :])
    return x.all(axis + 1) if fill else x.any(axis + 1)


@mask(leaves=("columns",))
class Stripes(Mask):
    """Every query sees the listed key columns and no others (vertical stripes).

    columns: int ``[r]``, or ``[B|1, N|1, r]`` for a set per batch row and head; -1 marks an unused entry.
    """

    columns: Int[jax.Array, "*BN r"]

    def _flags(self, g: Geometry) -> Any:
        columns = jnp.asarray(self.columns)
        if columns.ndim not in (1, 3) or any(
            n not in (1, m) for n, m in zip(columns.shape[:-1], (g.batch, g.heads), strict=False)
        ):
            raise ValueError(
                f"Stripes: columns has shape {columns.shape}; give [r], or [B|1, N|1, r] with B={g.batch}, N={g.heads}"
            )
        columns = columns.reshape((1,) * (3 - columns.ndim) + columns.shape)
        at = jnp.where(columns < 0, g.keys, columns)
        flags = jnp.zeros((*columns.shape[:2], g.keys + 1), bool)
        b, h = (jnp.arange(n) for n in columns.shape[:2])
        return flags.at[b[:, None, None], h[None, :, None], at].set(True, mode="drop")[:, :, None, : g.keys]

    def bind(self, g: Geometry) -> Bound:
        return Bound((Operand(self._flags(g), "aligned"),), lambda c, seen: seen)

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        nq, nk = -(-g.queries // block_q), -(-g.keys // block_k)
        if concrete(self.columns) is None:
            flags = self._flags(g)
        else:
            with jax.ensure_compile_time_eval():
                flags = np.asarray(self._flags(g))
        some, every = (_reduce(flags, 3, block_k, nk, fill) for fill in (False, True))
        xp = np if isinstance(flags, np.ndarray) else jnp
        state = xp.where(every, FULL, xp.where(some, PARTIAL, EMPTY)).astype(np.int8)
        return xp.broadcast_to(state, (*state.shape[:2], nq, nk))

    def __repr__(self) -> str:
        return f"Stripes({self.columns.shape[-1]} columns)"


@mask(leaves=("parents",))
class TreeAncestors(Mask):
    """A token of a tree sees itself and its ancestors: verification of drafted continuations, structured text.

    parents: int ``[T]``, the index of each token's parent, smaller than its own; -1 for roots. Keys that come before the
    tree (the first S - T columns) are context, visible to all.
    """

    parents: Int[jax.Array, " T"]

    @property
    def opaque(self) -> bool:
        return True

    def bind(self, g: Geometry) -> Bound:
        n = g.queries
        _expect("TreeAncestors: parents", jnp.asarray(self.parents), {"[T]": (n,)})
        if g.keys < n:
            raise ValueError(f"TreeAncestors: the tree has {n} tokens, but there are only S={g.keys} keys")
        enter, leave = _depth_first(jnp.asarray(self.parents))
        context = g.keys - n
        # A context column is an ancestor of all: it is entered first and never left.
        first = jnp.pad(enter, (context, 0), constant_values=-1)
        last = jnp.pad(leave, (context, 0), constant_values=n)
        ops = (enter[None, None, :, None], first[None, None, None], last[None, None, None])
        return Bound(tuple(Operand(x, "aligned") for x in ops), lambda c, q, a, z: (a <= q) & (q < z))

    def __repr__(self) -> str:
        return f"TreeAncestors({self.parents.shape[-1]} tokens)"


def _depth_first(parents: Any) -> tuple[Any, Any]:
    """Preorder number of every node, and one past that of its last descendant: i is an ancestor of j iff
    ``enter[i] <= enter[j] < leave[i]``."""
    n = parents.shape[0]

    def add(i: Any, size: Any) -> Any:  # children come after their parents: run backwards
        at = n - 1 - i
        return size.at[jnp.where(parents[at] < 0, n, parents[at])].add(size[at], mode="drop")

    size = lax.fori_loop(0, n, add, jnp.ones(n, jnp.int32))

    def place(i: Any, carry: Any) -> Any:
        enter, free = carry  # free[p + 1]: next preorder number among the children of p
        slot = parents[i] + 1
        at = free[slot]
        return enter.at[i].set(at), free.at[slot].add(size[i]).at[i + 1].set(at + 1)

    enter, _ = lax.fori_loop(0, n, place, (jnp.zeros(n, jnp.int32), jnp.zeros(n + 1, jnp.int32)))
    return enter, enter + size
