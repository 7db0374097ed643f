"""The lists of tiles: exactly the tiles that the mask leaves, in order, each row begun and ended once."""

import jax
import numpy as np
import pytest

from attnzoo.core.masks import Causal, SlidingWindow
from pallas_kernels.tpu import jobs


def unpacked(made: jobs.Jobs, which: int) -> list[tuple[int, int, int, bool, bool]]:
    """(row, column, kind, first, last) of one list."""
    words = np.asarray(made.words).reshape(-1, made.capacity)[which, : int(made.count[which])]
    parts = (jobs.major, jobs.minor, jobs.kind, jobs.first, jobs.last)
    return [tuple(int(part(w)) for part in parts) for w in words]  # type: ignore[misc]


@pytest.mark.parametrize("traced", [False, True])
def test_lists_hold_each_visited_tile_once(traced, rng):
    state = rng.integers(0, 3, (3, 5, 7)).astype(np.int8)
    state[1, 2] = 0  # a row that sees nothing
    made = jax.jit(jobs.make_jobs)(state) if traced else jobs.make_jobs(state)
    assert int(made.steps) == int(max(made.count))
    for n in range(3):
        found = unpacked(made, n)
        tiles = [(i, j, k) for i, j, k, _, _ in found if k != jobs.SKIP]
        assert tiles == [(i, j, state[n, i, j]) for i in range(5) for j in range(7) if state[n, i, j]]
        blind = [i for i, _, k, _, _ in found if k == jobs.SKIP]
        assert blind == [i for i in range(5) if not state[n, i].any()]
        for i in range(5):
            row = [(first, last) for r, _, _, first, last in found if r == i]
            assert [first for first, _ in row] == [1] + [0] * (len(row) - 1)
            assert [last for _, last in row] == [0] * (len(row) - 1) + [1]


def test_a_step_per_tile():
    """A window over a long sequence takes steps in proportion to its length, not to its square."""
    mask = Causal() & SlidingWindow(1024)
    for length in (2**14, 2**17):
        bm = mask.block_map(length)
        made = jobs.make_jobs(bm.state.reshape(1, *bm.state.shape[2:]))
        counts = bm.counts()
        assert made.steps == counts["partial"] + counts["full"] < 3 * length / 512
        assert made.words.nbytes < jobs.MOST_BYTES
