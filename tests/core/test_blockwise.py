"""How blockwise attention walks its tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.attention import attention
from attnzoo.core.backends import blockwise
from attnzoo.core.masks import Causal, Lengths
from attnzoo.core.scores import Bias

B, T, N, K, H = 3, 21, 4, 2, 8


@pytest.mark.parametrize("mask", [Causal(), Causal() & Lengths(jnp.asarray([21, 9, 0]))])
def test_batch_rows_one_after_another_are_those_together(mask, monkeypatch):
    """Where a cache would not hold the tiles of all batch rows. Bias has a row for all of them, and one for each."""
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, N, T, T), (1, N, 1, T))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]

    def both(backend):
        def loss(q, k, v, own, shared):
            score = Bias(own) >> Bias(shared)
            out = attention(
                q, k, v, mask=mask, score=score, backend=backend, block_sizes=(8, 8),
                dropout_rate=0.2, dropout_rng=jax.random.key(1),
            )  # fmt: skip
            return (out**2).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True))(*arrays)

    made = []
    walk = blockwise.Walk
    monkeypatch.setattr(blockwise, "Walk", lambda *a: made.append(walk(*a)) or made[-1])
    together = both("blockwise")
    monkeypatch.setattr(blockwise, "CACHED", B * N * 8 * 8 - 1)
    apart = both("blockwise")
    assert made[-1].jobs[0] == B
    assert made[0].jobs[0] == (1 if isinstance(mask, Causal) else B)  # rows of other lengths have other tiles in any case
    for other in (together, both("dense")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), apart, other)
