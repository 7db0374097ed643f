"""Mask -> BlockMap: which tiles of the logits are empty, full or partial.

Exact and without touching T×S cells where the mask is a few runs of keys per row (:mod:`attnzoo.core.intervals`); otherwise
by evaluating the mask tile by tile up to :data:`PROBE_LIMIT` cells; past that conservatively (a tile may be called partial
that is empty or full, a visible cell is never dropped). ``BlockMap.how`` says which.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnzoo.core.cells import (
    Bound,
    Geometry,
    Tile,
    cells_of,
    concrete,
    cut,
    pad_operand,
    spread,
    visible_slots,
)
from attnzoo.core.intervals import Intervals

if TYPE_CHECKING:
    from attnzoo.core.masks import Mask

EMPTY, PARTIAL, FULL = 0, 1, 2

#: A mask that can only be asked cell by cell is probed up to this many cells (about a second of work).
PROBE_LIMIT = 2**26
_ROWS_AT_A_TIME = 2**16
_STRIP = 2**20


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """``state [B|1, N|1, ceil(T/block_q), ceil(S/block_k)]`` int8: 0 empty, 1 partial, 2 full.

    numpy when it is known now, a JAX array when it depends on traced values. ``how`` is "exact (runs)", "exact (by the
    mask)", "exact (probed)" or "conservative".
    """

    state: Any
    queries: int
    keys: int
    block_q: int
    block_k: int
    how: str

    @property
    def known(self) -> bool:
        """Whether the states are concrete (numpy)."""
        return isinstance(self.state, np.ndarray)

    @property
    def exact(self) -> bool:
        return self.how.startswith("exact")

    def counts(self) -> dict[str, int]:
        """Number of tiles by state, over all batch rows and heads the map tells apart."""
        n = np.bincount(self._known_state().ravel(), minlength=3)
        return {"empty": int(n[EMPTY]), "partial": int(n[PARTIAL]), "full": int(n[FULL])}

    @property
    def visited(self) -> float:
        """Share of the tiles that have to be computed."""
        return float((self._known_state() != EMPTY).mean())

    def plot(self, ax: Any = None, batch: int = 0, head: int = 0) -> Any:
        """Draw the map of one batch row and head (matplotlib); returns the axes."""
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap

        ax = ax or plt.subplots(figsize=(4, 4))[1]
        state = self._known_state()
        state = state[min(batch, state.shape[0] - 1), min(head, state.shape[1] - 1)]
        box = (0, self.keys, self.queries, 0)
        colours = ListedColormap(["#f2f2f2", "#8ecae6", "#126782"])
        ax.imshow(state, cmap=colours, vmin=0, vmax=2, extent=box, interpolation="nearest", aspect="auto")
        ax.set(xlabel="key", ylabel="query")
        n = self.counts()
        ax.set_title(f"{n['full']} full, {n['partial']} partial, {n['empty']} empty tiles", fontsize=9)
        return ax

    def _known_state(self) -> np.ndarray:
        if not self.known:
            raise ValueError("this block map depends on traced values: its tiles can be counted only when it is run")
        return self.state

    def __repr__(self) -> str:
        head = f"BlockMap({self.queries}×{self.keys} in tiles of {self.block_q}×{self.block_k}, {self.how}"
        if not self.known:
            return head + ", known when run)"
        n = self.counts()
        return f"{head}: {n['full']} full, {n['partial']} partial, {n['empty']} empty)"


def block_map(mask: Mask | None, g: Geometry, block_q: int, block_k: int) -> BlockMap:
    """The block map of ``mask`` (None: everything is visible) over geometry ``g``."""
    how = "conservative"
    if mask is None:
        state: Any = np.full((1, 1, _tiles(g.queries, block_q), _tiles(g.keys, block_k)), FULL, np.int8)
        if g.kv_positions is None:
            how = "exact (runs)"
        else:  # slots may be empty
            state = np.full_like(state, PARTIAL)
        return BlockMap(state, g.queries, g.keys, block_q, block_k, how)
    if g.plain and (known := mask.exact_states(g, block_q, block_k)) is not None:
        return BlockMap(known, g.queries, g.keys, block_q, block_k, "exact (by the mask)")
    runs = mask.intervals(g)
    if runs is not None and runs.exact and g.kv_positions is None:
        state, how = states_of_runs(runs, g, block_q, block_k), "exact (runs)"
    elif (probed := _probe(mask, g, block_q, block_k)) is not None:
        state, how = probed, "exact (probed)"
    else:
        state = mask.tile_states(g, block_q, block_k)
    return BlockMap(state, g.queries, g.keys, block_q, block_k, how)


def _tiles(n: int, block: int) -> int:
    return -(-n // block)


def _sizes(n: int, block: int) -> np.ndarray:
    """Length of every block of ``n`` items; only the last may be short."""
    return np.minimum(block, n - block * np.arange(_tiles(n, block)))


def states_of_runs(runs: Intervals, g: Geometry, block_q: int, block_k: int) -> Any:
    """Tile states from the runs of visible keys: exact if the runs are, else a tile is full never, empty only if surely so."""
    count = _count_known(runs, g, block_q, block_k) if runs.known else _count_traced(runs, g, block_q, block_k)
    area = _sizes(g.queries, block_q)[:, None] * _sizes(g.keys, block_k)[None, :]
    xp = np if runs.known else jnp
    full = (count == area) if runs.exact else xp.zeros(count.shape, bool)
    return xp.where(full, FULL, xp.where(count > 0, PARTIAL, EMPTY)).astype(np.int8)


def _count_known(runs: Intervals, g: Geometry, block_q: int, block_k: int) -> np.ndarray:
    """Visible cells per tile, ``[B|1, N|1, nq, nk]``, in O(T·r): each end of a run is one ramp of the count along the keys."""
    nq, nk = _tiles(g.queries, block_q), _tiles(g.keys, block_k)
    lead, rows = runs.lo.shape[:2], runs.lo.shape[2]
    if rows == 1:  # every row alike
        one = _ramps(runs, nk, block_k, np.zeros(1, np.int64), 1, g.keys)
        return one * _sizes(g.queries, block_q)[:, None]
    step = max(1, _ROWS_AT_A_TIME // block_q) * block_q
    out = np.empty((*lead, nq, nk), np.int64)
    for at in range(0, g.queries, step):
        part = Intervals(runs.lo[:, :, at : at + step], runs.hi[:, :, at : at + step], runs.exact)
        block = np.arange(part.lo.shape[2]) // block_q
        out[:, :, at // block_q : at // block_q + block[-1] + 1] = _ramps(part, nk, block_k, block, block[-1] + 1, g.keys)
    return out


def _ramps(runs: Intervals, nk: int, block_k: int, block: np.ndarray, blocks: int, keys: int) -> np.ndarray:
    """Sum of overlaps of the runs with each key block, per row block."""
    lead = runs.lo.shape[:2]
    width = nk + 2
    row = np.arange(int(np.prod(lead)))[:, None] * blocks + block[None, :]
    row = (row.reshape(*lead, -1, 1) * width).astype(np.int64)
    diff = np.zeros(int(np.prod(lead)) * blocks * width, np.int64)
    for end, sign in ((runs.lo, 1), (runs.hi, -1)):
        # cells of block j at or after `end`: 0 before its own block, the rest of that block, then whole blocks
        end = np.clip(end, 0, keys)
        j = end // block_k
        inside = end - j * block_k
        at = (row + j).ravel()
        diff += sign * np.bincount(at, (block_k - inside).ravel(), diff.size).astype(np.int64)
        diff += sign * np.bincount(at + 1, inside.ravel(), diff.size).astype(np.int64)
    return np.cumsum(diff.reshape(*lead, blocks, width), axis=-1)[..., :nk]


def _count_traced(runs: Intervals, g: Geometry, block_q: int, block_k: int) -> jax.Array:
    """The same inside a trace: O(T·r·nk) arithmetic, O(block_q·r·nk) memory at a time."""
    nq, nk = _tiles(g.queries, block_q), _tiles(g.keys, block_k)
    edge = jnp.minimum(jnp.arange(nk + 1) * block_k, g.keys)
    lo, hi = jnp.clip(runs.lo, 0, g.keys), jnp.clip(runs.hi, 0, g.keys)

    def overlap(lo: jax.Array, hi: jax.Array) -> jax.Array:  # [..., rows, r] -> [..., nk]
        left = jnp.maximum(lo[..., None], edge[:-1])
        right = jnp.minimum(hi[..., None], edge[1:])
        return jnp.maximum(right - left, 0).sum((-3, -2))

    if runs.lo.shape[2] == 1:
        return overlap(lo, hi)[:, :, None, :] * _sizes(g.queries, block_q)[:, None]
    rows = ((0, 0), (0, 0), (0, nq * block_q - g.queries), (0, 0))
    blocks = (jnp.moveaxis(jnp.pad(x, rows).reshape(*x.shape[:2], nq, block_q, -1), 2, 0) for x in (lo, hi))
    return jnp.moveaxis(lax.map(lambda pair: overlap(*pair), tuple(blocks)), 0, 2)


def states_by_position(runs: Intervals, g: Geometry, block_q: int, block_k: int) -> Any:
    """Conservative states when keys carry positions of their own: hulls of the rows' runs against each key block's range."""
    nq, nk = _tiles(g.queries, block_q), _tiles(g.keys, block_k)
    pos = jnp.asarray(g.kv_positions)
    pad = ((0, 0), (0, 0), (0, nk * block_k - g.keys))
    slots = jnp.pad(pos, pad, constant_values=-1).reshape(*pos.shape[:2], nk, block_k)
    if pos.shape[1] > 1:
        slots = jnp.repeat(slots, g.heads // g.kv_heads, axis=1)
    first = jnp.where(slots < 0, 2**31 - 1, slots).min(-1)[:, :, None]
    last = slots.max(-1)[:, :, None]
    real = jnp.arange(nk * block_k).reshape(nk, block_k) < g.keys
    gap = ((slots < 0) & real).any(-1)[:, :, None]

    rows = jnp.broadcast_to(jnp.asarray(runs.lo), (*runs.lo.shape[:2], g.queries, runs.runs))
    ends = jnp.broadcast_to(jnp.asarray(runs.hi), rows.shape)
    more = ((0, 0), (0, 0), (0, nq * block_q - g.queries), (0, 0))

    def by_block(x: Any) -> Any:
        return jnp.pad(x, more, mode="edge").reshape(*x.shape[:2], nq, block_q, x.shape[-1])

    lo, hi = by_block(rows), by_block(ends)
    some = hi > lo
    hull_lo = jnp.where(some, lo, 2**31 - 1).min((-2, -1))[..., None]
    hull_hi = jnp.where(some, hi, -(2**30)).max((-2, -1))[..., None]
    empty = (last < 0) | (last < hull_lo) | (first >= hull_hi)
    full = jnp.zeros((), bool)
    if runs.exact:
        inside = (lo.max(-2)[..., None, :] <= first[..., None]) & (last[..., None] < hi.min(-2)[..., None, :])
        full = inside.any(-1) & ~gap
    return jnp.where(empty, EMPTY, jnp.where(full, FULL, PARTIAL)).astype(jnp.int8)


def _probe(mask: Mask, g: Geometry, block_q: int, block_k: int) -> Any | None:
    """Exact states by asking every cell, a tile at a time.

    None when there are too many cells to ask, or when asking would cost run time (its arrays are traced) although the mask
    knows something of its tiles by itself.
    """
    bound = mask.bind(g)
    one = Tile((0, 0, 0, 0), (g.batch, g.heads, 1, 1))
    lead = jax.eval_shape(lambda: _visible(bound, g, one, g.keys)).shape[:2]
    if lead[0] * lead[1] * g.queries * g.keys > PROBE_LIMIT:
        return None
    carried = [op.x for op in bound.operands] + [g.q_positions, g.kv_positions]
    if any(concrete(x) is None for x in carried if x is not None):
        return _probe_tiles(bound, g, block_q, block_k, lead) if mask.opaque else None
    with jax.ensure_compile_time_eval():
        return np.asarray(_probe_tiles(bound, g, block_q, block_k, lead))


def _visible(bound: Bound, g: Geometry, tile: Tile, keys: int) -> jax.Array:
    parts = [spread(op, cut(op, tile, keys), tile) for op in bound.operands]
    cells = cells_of(g, tile)
    ok = jnp.asarray(bound.apply(cells, *parts), bool)
    slots = visible_slots(g, cells)
    return ok if slots is None else ok & slots


def _probe_tiles(bound: Bound, g: Geometry, block_q: int, block_k: int, lead: tuple[int, int]) -> jax.Array:
    """Ask in strips of whole rows of tiles, as many rows at a time as keeps a strip near ``_STRIP`` cells."""
    nq, nk = _tiles(g.queries, block_q), _tiles(g.keys, block_k)
    many = min(nq, max(1, _STRIP // (lead[0] * lead[1] * block_q * block_k * nk)))
    strips, keys = _tiles(nq, many), nk * block_k
    padded = Bound(
        tuple(pad_operand(op, strips * many * block_q - g.queries, keys - g.keys) for op in bound.operands),
        bound.apply,
    )
    size = (g.batch if lead[0] > 1 else 1, g.heads if lead[1] > 1 else 1, many * block_q, keys)

    def states(i: jax.Array | int) -> jax.Array:
        tile = Tile((0, 0, i * many * block_q, 0), size)
        cells = cells_of(g, tile)
        ok, real = _visible(padded, g, tile, keys), (cells.t < g.queries) & (cells.s < g.keys)
        some, every = (
            jnp.broadcast_to(x, (*lead, *size[2:])).reshape(*lead, many, block_q, nk, block_k) for x in (ok & real, ok | ~real)
        )
        return jnp.where(every.all((3, 5)), FULL, jnp.where(some.any((3, 5)), PARTIAL, EMPTY)).astype(jnp.int8)

    if strips == 1:
        return states(0)
    stacked = jnp.moveaxis(lax.map(states, jnp.arange(strips, dtype=jnp.int32)), 0, 2)
    return stacked.reshape(*lead, strips * many, nk)[:, :, :nq]
