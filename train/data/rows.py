"""Training examples out of a stream of tokens: windows over it, or whole documents packed into rows.

Both have random access: `rows(indices)` is a batch, and what a row holds depends on its index alone.
"""

import numpy as np
from jaxtyping import Int

from train.data.corpus import Split

Batch = dict[str, np.ndarray]

_MOST = 1 << 31  # examples that grain can shuffle


class Windows:
    """Every stretch of `length` tokens and the tokens that follow each, `stride` apart.

    tokens, targets: int32 [R, length].
    """

    def __init__(self, tokens: Int[np.ndarray, "n"], length: int, stride: int = 1):
        self.tokens, self.length = tokens, length
        self.stride = max(stride, len(tokens) // _MOST + 1)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.length - 1) // self.stride + 1)

    def rows(self, indices: Int[np.ndarray, "R"]) -> Batch:
        starts = np.asarray(indices, np.int64)[:, None] * self.stride
        windows = self.tokens[starts + np.arange(self.length + 1)].astype(np.int32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}


class Cover:
    """Windows that predict every token of a split once: side by side, the last one filled up.

    tokens, targets: int32 [R, length]. where: bool [R, length], whether a target is a real token.
    """

    def __init__(self, split: Split, length: int):
        self.stream, self.length = split.stream, length

    def __len__(self) -> int:
        return -(-(len(self.stream) - 1) // self.length)

    def rows(self, indices: Int[np.ndarray, "R"]) -> Batch:
        starts = np.asarray(indices, np.int64)[:, None] * self.length
        places = starts + np.arange(self.length + 1)
        last = len(self.stream) - 1
        windows = self.stream[np.minimum(places, last)].astype(np.int32)
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:], "where": places[:, 1:] <= last}


class Packed:
    """Rows of `length` tokens that hold whole documents side by side; longer documents are cut into pieces.

    Every token of the split is a target once. The input before a document's first target is the end of a document, the one
    before a later piece's is the last token of the piece before it.

    tokens, targets: int32 [R, length]. segments: int32 [R, length], 1, 2, ... by document, 0 for padding.
    positions: int32 [R, length], from 0 in every document. where: bool [R, length], whether a target is a real token.

    Documents are put together best fit, longest first, so little is padding; with one and the same companions in every
    epoch. (grain packs streams; then what a batch holds depends on how many processes read.)
    """

    def __init__(self, split: Split, length: int):
        self.stream, self.length = split.stream, length
        ends = np.asarray(split.ends, np.int64)
        begins = np.concatenate([[0], ends[:-1]])
        counts = -(-(ends - begins) // length)
        piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        self._starts = np.repeat(begins, counts) + piece * length
        self._sizes = np.minimum(length, np.repeat(ends, counts) - self._starts)
        row_of = best_fit(self._sizes, length)
        self._pieces = np.argsort(row_of, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(row_of))])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def rows(self, indices: Int[np.ndarray, "R"]) -> Batch:
        shape = (len(indices), self.length)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments", "positions")}
        for row, index in enumerate(indices):
            at = 0
            for number, piece in enumerate(self._pieces[self._bounds[index] : self._bounds[index + 1]], start=1):
                start, size = self._starts[piece], self._sizes[piece]
                here = slice(at, at + size)
                tokens = self.stream[start : start + size + 1]
                batch["tokens"][row, here], batch["targets"][row, here] = tokens[:-1], tokens[1:]
                batch["segments"][row, here] = number
                batch["positions"][row, here] = np.arange(size)
                at += size
        return {**batch, "where": batch["segments"] > 0}


def best_fit(sizes: Int[np.ndarray, "p"], capacity: int) -> Int[np.ndarray, "p"]:
    """For every piece the row it is put into: longest first, each where it leaves the least room.

    sizes: 1 ... capacity. Time is linear in their number.
    """
    row_of = np.empty(len(sizes), np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    there = 0  # the bits of the rooms that some row has
    rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = there >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                there ^= 1 << room
        else:
            room, row, rows = capacity, rows, rows + 1
        row_of[piece] = row
        left = room - size
        rows_with[left].append(row)
        there |= 1 << left
    return row_of
