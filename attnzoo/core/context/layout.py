"""Which tokens each device of a ring holds, what its devices have to compute, and which shards have to travel how far."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from attnzoo.core.blocks import EMPTY, FULL, BlockMap, block_map
from attnzoo.core.cells import Geometry, concrete
from attnzoo.core.masks.base import And, Mask

#: Zig-zag moves every array there and back, so it must save at least this part of the work.
WORTH = 0.1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Device d of n holds chunk d of n of the sequence; or, zig-zag, chunks d and 2n - 1 - d of 2n.

    Under a causal mask a row of chunk c sees about c chunks: in zig-zag order every device's rows see 2n - 1 together.
    """

    devices: int
    zigzag: bool

    @property
    def slots(self) -> int:
        """Chunks that a device holds."""
        return 2 if self.zigzag else 1

    @property
    def chunks(self) -> int:
        return self.devices * self.slots

    def chunk(self, device: Any, slot: Any) -> Any:
        """The chunk in a slot of a device; of numbers or arrays, traced ones too."""
        return device + slot * (self.chunks - 1 - 2 * device)

    def work(self, tiles: np.ndarray) -> np.ndarray:
        """Tiles ``[devices (how far a shard came), devices (which computes)]`` from tiles ``[chunks, chunks]`` or finer."""
        fine = len(tiles) // self.chunks
        tiles = tiles.reshape(self.chunks, fine, self.chunks, fine).sum((1, 3))
        me = np.arange(self.devices)
        held = np.stack([self.chunk(me, slot) for slot in range(self.slots)], 1)  # [devices, slots]
        came = (me[None, :] - me[:, None]) % self.devices  # [shift, device] -> owner
        return tiles[held[None, :, :, None], held[came][:, :, None, :]].sum((2, 3))


class Arc(NamedTuple):
    """The shards that a device sees: those of the devices ``first``, ``first + 1``, ... behind it on the ring."""

    first: int
    steps: int


class Ring(NamedTuple):
    """How one call is divided. work ``[shift, device]``: tiles, as far as they are known before running; None: unknown."""

    layout: Layout
    arc: Arc
    work: np.ndarray | None


def smallest_arc(needed: np.ndarray) -> Arc:
    """The shortest run of shifts, around the ring, that has all the needed ones (bool ``[devices]``)."""
    at = np.flatnonzero(needed)
    if not len(at):
        return Arc(0, 1)
    gaps = np.diff(np.append(at, at[0] + len(needed)))
    widest = len(gaps) - 1 - int(gaps[::-1].argmax())  # of equals the last, so that a whole ring begins at home
    return Arc(int(at[(widest + 1) % len(at)]), len(needed) + 1 - int(gaps[widest]))


def critical_path(work: np.ndarray) -> int:
    """Tiles one after the other: at each step of the ring all wait for the device with most."""
    return int(work.max(1).sum())


def plan_ring(mask: Mask | None, g: Geometry, devices: int, zigzag: bool | None, block: tuple[int, int]) -> Ring:
    """The layout and the steps for a mask, judged by what of it is known before running.

    block: the largest tiles that may be. Raises ValueError where ``zigzag`` is asked for and the lengths do not divide.
    """
    halves = g.queries % (2 * devices) == 0 and g.keys % (2 * devices) == 0
    if zigzag and not halves:
        raise ValueError(
            f"attention_axes: zigzag=True cuts a sequence into 2 × {devices} parts, but the call has {g.queries} queries and "
            f"{g.keys} keys; give multiples of {2 * devices}, or zigzag=None to use it where it can be"
        )
    plain = Layout(devices, False)
    finest = Layout(devices, halves).chunks
    known = known_part(mask)
    tiles = None if known is None else _tiles_by_chunk(known, g, finest, block)
    if tiles is None:
        layout = Layout(devices, bool(zigzag))
        return Ring(layout, Arc(0, devices), None)
    layout, work = plain, plain.work(tiles)
    if halves and zigzag is not False:
        paired = Layout(devices, True)
        if zigzag or critical_path(paired.work(tiles)) <= (1 - WORTH) * critical_path(work):
            layout, work = paired, paired.work(tiles)
    return Ring(layout, smallest_arc(np.asarray(work.any(1))), work)


def known_part(mask: Mask | None) -> Mask | None:
    """A mask that shows all that ``mask`` shows, and whose arrays are known now; None: nothing is known."""
    if isinstance(mask, And):
        parts = [part for part in map(known_part, (mask.a, mask.b)) if part is not None]
        return None if not parts else parts[0] if len(parts) == 1 else And(*parts)
    return None if any(concrete(x) is None for x in jax.tree.leaves(mask)) else mask


def map_by_chunks(mask: Mask | None, g: Geometry, chunks: int, block: tuple[int, int]) -> BlockMap:
    """The block map in tiles that no border of a chunk cuts: of the given size where that divides the chunks, else a tile per
    pair of chunks."""
    rows, columns = g.queries // chunks, g.keys // chunks
    return block_map(mask, g, *(block if rows % block[0] == columns % block[1] == 0 else (rows, columns)))


def states_by_chunk(bm: BlockMap, chunks: int, block: tuple[int, int]) -> Any:
    """``[B|1, N|1, chunks, tiles down, chunks, tiles across]`` of :func:`map_by_chunks`, in tiles of the given size."""
    rows, columns = bm.queries // chunks, bm.keys // chunks
    lead = bm.state.shape[:2]
    if (bm.block_q, bm.block_k) == block:
        return bm.state.reshape(*lead, chunks, rows // block[0], chunks, columns // block[1])
    xp: Any = np if bm.known else jax.numpy
    whole = bm.state.reshape(*lead, chunks, 1, chunks, 1)
    return xp.broadcast_to(whole, (*lead, chunks, -(-rows // block[0]), chunks, -(-columns // block[1])))


def _tiles_by_chunk(mask: Mask, g: Geometry, chunks: int, block: tuple[int, int]) -> np.ndarray | None:
    """How many tiles of each pair of chunks are computed, over all batch rows and heads; None if not known now."""
    block = min(block[0], g.queries // chunks), min(block[1], g.keys // chunks)
    bm = map_by_chunks(mask, g, chunks, block)
    if not bm.known:
        return None
    return (states_by_chunk(bm, chunks, block) != EMPTY).sum((0, 1, 3, 5))


def all_full(bm: BlockMap) -> bool:
    """Whether it is known now that there is nothing to hide or to skip."""
    return bm.known and bool((bm.state == FULL).all())
