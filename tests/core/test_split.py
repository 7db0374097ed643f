"""Keys in runs: what the fused kernels make of a split decoding step, in the TPU's simulation, against the dense backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks, weights
from attnzoo.core.attention import attention
from attnzoo.core.backends.fused import tpu
from attnzoo.core.backends.split import runs
from pallas_kernels.tpu.launch import simulation

RNG = np.random.default_rng(0)
Q, K, V = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((2, 2, 2, 16), (2, 256, 1, 16), (2, 256, 1, 24)))
TABLE = jnp.asarray(RNG.normal(size=(2, 256)), jnp.float32)
FEW = {"q_positions": jnp.asarray([[59, 60], [200, 201]]), "kv_positions": jnp.arange(256), "mask": masks.Causal()}

CASES = {
    "rows of different lengths, sinks": FEW | {"weights": weights.SinkSoftmax(jnp.asarray([0.1, -1.0]))},
    "pointwise weights": FEW | {"weights": weights.Sigmoid(bias=-3.0)},
    "an array of cells": {"mask": jnp.asarray(RNG.random((2, 1, 2, 256)) > 0.6)},
}


@pytest.fixture
def seen_keys(monkeypatch):
    """Keys ``[B, S, K]`` of each call of the kernels, where they may divide keys into two runs."""
    seen, attend = [], tpu.attend
    monkeypatch.setattr(tpu, "most_runs", lambda rows_and_heads, keys: 2)
    monkeypatch.setattr(tpu, "attend", lambda part, packed: seen.append(part.k.shape[:3]) or attend(part, packed))
    return seen


@pytest.mark.parametrize("name", [next(iter(CASES)), *(pytest.param(n, marks=pytest.mark.slow) for n in [*CASES][1:])])
def test_runs_are_merged_into_the_whole(name, seen_keys):
    def total(backend, q, k, v, table):
        out = attention(
            q, k, v, backend=backend, block_sizes=(128, 128), score=lambda s, b, h, q, k: s + table[h, k], **CASES[name]
        )
        return (out * jnp.arange(24.0)).sum(), out

    run = jax.jit(jax.value_and_grad(total, (1, 2, 3, 4), has_aux=True), static_argnums=0)
    (_, want), wanted = run("dense", Q, K, V, TABLE)
    with simulation():
        (_, out), found = jax.block_until_ready(run("pallas", Q, K, V, TABLE))
    assert seen_keys == [(2, 128, 2)]
    np.testing.assert_allclose(out, want, atol=2e-6, rtol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("keys", "most", "n"), [(512, 4, 4), (512, 3, 2), (640, 4, 1), (500, 4, 1), (512, 0, 1)])
def test_only_equal_runs_of_whole_blocks(keys, most, n):
    assert runs(keys, 128, most) == n
