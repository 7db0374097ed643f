"""Block sizes by TPU generation, chosen from compiled schedules (`attnzoo bench kernels`)."""

from __future__ import annotations

from typing import Any

from pallas_kernels.tpu.launch import generation

#: generation -> queries and keys of a tile, and of the pieces it is worked through in.
BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "v4": (512, 512, 512, 512),
    "v5e": (512, 512, 128, 512),
    "v5p": (512, 512, 128, 512),
    "v6e": (512, 512, 512, 512),
    "7x": (512, 512, 512, 512),
}

#: generation -> queries of a piece of a tile that the mask cuts along its diagonal, forward and backward.
STAIRS: dict[str, tuple[int, int]] = {
    "v4": (128, 128),
    "v5e": (256, 128),
    "v5p": (256, 128),
    "v6e": (256, 256),
    "7x": (256, 128),
}

#: Queries of a piece where one kernel makes dq, dk and dv: of 128, 256 and 512 the best or near it on every generation.
ROWS_WITH_QUERIES = 256

#: generation -> bytes on the chip that sums of dq may take, a quarter of what it has or less.
QUERIES_BYTES: dict[str, int] = {
    "v4": 4 * 2**20,
    "v5e": 32 * 2**20,
    "v5p": 24 * 2**20,
    "v6e": 32 * 2**20,
    "7x": 16 * 2**20,
}

#: generation -> bytes on the chip that the logits of a block of queries may take, half of what it has or less.
HELD_BYTES: dict[str, int] = {
    "v4": 8 * 2**20,
    "v5e": 64 * 2**20,
    "v5p": 48 * 2**20,
    "v6e": 64 * 2**20,
    "7x": 32 * 2**20,
}


def _here(table: dict[str, Any]) -> Any:
    """The entry of the generation that kernels are traced for now; of one that is not known, that of v6e."""
    return table.get(generation() or "", table["v6e"])


def blocks() -> tuple[int, int, int, int]:
    return _here(BLOCKS)


def stairs() -> tuple[int, int]:
    return _here(STAIRS)


def queries_bytes() -> int:
    return _here(QUERIES_BYTES)


def held_bytes() -> int:
    return _here(HELD_BYTES)
