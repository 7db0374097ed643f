"""Sizes of the recurrence kernels, chosen from compiled schedules."""

from __future__ import annotations

#: Tokens of a chunk.
CHUNK = 64
#: Heads of a step: fewer steps, larger transfers.
HEADS = 2


def heads_at_once(rows: int) -> int:
    """The most heads that divide ``rows``."""
    return next(n for n in range(HEADS, 0, -1) if rows % n == 0)
