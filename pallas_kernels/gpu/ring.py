"""Tiles on their way from global to shared memory: a ring of slots that one warpgroup fills and the others empty."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Ring(NamedTuple):
    """Tiles of one array: where they come from, the slots, and per slot a barrier "it is here" and one "it is free"."""

    source: Any
    slots: Any
    here: Any
    free: Any

    @property
    def length(self) -> int:
        return self.slots.shape[0]

    def at(self, n: Any) -> Any:
        """The slot of tile number n."""
        return lax.rem(n, jnp.int32(self.length))


def barriers(slots: int, readers: int) -> list[Any]:
    """The barriers of a ring, as scratch."""
    return [plgpu.Barrier(num_barriers=slots), plgpu.Barrier(num_arrivals=readers, num_barriers=slots)]


def fetch(rings: list[Ring], begin: Any, count: Any, place: Callable[[Any], tuple[Any, ...]]) -> Any:
    """Bring in ``count`` tiles, the first of which is tile number ``begin`` of the rings; place: where number 0, 1 ... of them
    lies in its source. Returns the number of the next tile."""

    @pl.loop(0, count)
    def _(i: Any) -> None:
        n, there = begin + i, place(i)
        for ring in rings:

            @pl.when(n >= ring.length)
            def _(ring: Ring = ring) -> None:
                plgpu.barrier_wait(ring.free.at[ring.at(n)])

            plgpu.copy_gmem_to_smem(ring.source.at[there], ring.slots.at[ring.at(n)], ring.here.at[ring.at(n)])

    return begin + count


def drain(rings: list[Ring], total: Any) -> None:
    """Wait until all of ``total`` tiles have been read: a block's memory may go only then."""
    for ring in rings:

        @pl.loop(jnp.maximum(total - ring.length, 0), total)
        def _(n: Any, ring: Ring = ring) -> None:
            plgpu.barrier_wait(ring.free.at[ring.at(n)])
