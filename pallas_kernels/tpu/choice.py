"""Block sizes by TPU generation, chosen from compiled schedules (`attnzoo bench kernels`)."""

from __future__ import annotations

from pallas_kernels.tpu.launch import generation

#: generation -> queries and keys of a tile, and of the pieces it is worked through in.
BLOCKS: dict[str, tuple[int, int, int, int]] = {
    "v4": (512, 512, 128, 512),
    "v5e": (512, 512, 128, 512),
    "v5p": (512, 512, 128, 512),
    "v6e": (512, 512, 512, 512),
    "7x": (512, 512, 512, 512),
}


def blocks() -> tuple[int, int, int, int]:
    """For the generation that kernels are traced for now."""
    return BLOCKS.get(generation() or "", BLOCKS["v6e"])
