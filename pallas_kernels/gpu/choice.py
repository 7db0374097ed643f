"""Block sizes of the GPU kernels, and what fits into the shared memory of a multiprocessor."""

from __future__ import annotations

from pallas_kernels.gpu.warpgroup import ROWS

#: Queries of a tile: the rows of two warpgroups on Hopper, and of one on Blackwell.
BLOCK_Q = 2 * ROWS
#: Bytes of shared memory that a block may ask for (227 KiB, on both generations), less what barriers and sums take.
SHARED_BYTES = 232448 - 3072
#: Of an H100 or H200 with all of them.
MULTIPROCESSORS = 132
#: More tiles in flight than this bring nothing.
MOST_SLOTS = 4


def forward_bytes(width: int, value_width: int, block_k: int, slots: int, block_q: int = BLOCK_Q) -> int:
    """Shared memory of the forward kernels for 16-bit inputs."""
    queries = 2 * block_q * (width + (value_width if value_width != width else 0)) + 4 * block_q
    return queries + 2 * slots * block_k * (width + value_width)


def slots(width: int, value_width: int, block_k: int, block_q: int = BLOCK_Q) -> int:
    """Tiles of keys and values that the forward kernels hold at once: at least 2, or 0 if they do not fit."""
    fit = (n for n in range(MOST_SLOTS, 1, -1) if forward_bytes(width, value_width, block_k, n, block_q) <= SHARED_BYTES)
    return next(fit, 0)


def block_queries(generation: str | None) -> tuple[int, ...]:
    """Numbers of queries that a tile of the forward kernel may have, the best one for many queries first."""
    return (2 * BLOCK_Q, BLOCK_Q) if generation == "blackwell" else (BLOCK_Q,)


def blocks(width: int, value_width: int) -> tuple[int, int]:
    """Queries and keys of a tile. Accumulators of wide heads leave registers for 64 keys only."""
    block_k = 128 if value_width <= 128 and slots(width, value_width, 128) else 64
    return BLOCK_Q, block_k


def backward_slots(width: int, value_width: int, block_k: int) -> int:
    """Tiles that the backward kernels hold at once: at least 2, or 0 if their sums do not fit into registers."""
    if max(width, value_width) > 128 or block_k != BLOCK_Q:
        return 0
    fit = (n for n in range(MOST_SLOTS, 1, -1) if 2 * (n + 1) * BLOCK_Q * (width + value_width) <= SHARED_BYTES)
    return next(fit, 0)
