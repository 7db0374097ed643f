"""Sizes of the recurrence kernels, chosen from compiled schedules."""

from __future__ import annotations

#: Tokens of a chunk.
CHUNK = 64
#: Heads of a step that take turns, of width 128 and 16 bits: without and with an erasing term. More fill the units a little
#: better, but take longer to compile, and those of the longest form no longer fit on the chip.
HEADS = {False: 8, True: 4}
_USUAL = 128 * 128 * 2


def heads_at_once(rows: int, size: int, erases: bool) -> int:
    """Of ``rows`` heads, which it divides. size: numbers of a state times the bytes of one in the products."""
    most = max(1, HEADS[erases] * _USUAL // max(size, _USUAL))
    return next(n for n in range(most, 0, -1) if rows % n == 0)
