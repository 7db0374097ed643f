"""``attention`` by the fused kernels of the accelerator that is here, against the dense backend in float32.

    pytest -m accelerator tests/pallas       # JAX_PLATFORMS=cuda or tpu

Without one, some of it runs by JAX's GPU simulator.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks, scores, weights
from attnzoo.core.attention import attention, explain
from pallas_kernels.gpu.launch import generation, simulation

RNG = np.random.default_rng(0)
TABLE = jnp.asarray(RNG.normal(size=(4, 2048)), jnp.float32)
CHOSEN = RNG.random((1, 4, 2, 2)) > 0.4


@dataclasses.dataclass(frozen=True)
class Case:
    """sizes: B T S N K H Hv. score_of: a score of a learned array."""

    sizes: tuple[int, ...] = (1, 200, 200, 2, 1, 48, 48)
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    score_of: Any = None
    learned: Any = None


def segments(length):
    return masks.Segments(np.sort(RNG.integers(0, 3, (2, length))))


CASES = {
    "padded widths and lengths": Case(arguments={"mask": masks.Causal()}),
    "window, sinks": Case(
        arguments={"mask": masks.Causal() & masks.SlidingWindow(50), "weights": weights.SinkSoftmax(jnp.asarray([0.3, -1.0]))}
    ),
    "documents, soft cap": Case(
        (2, 256, 256, 2, 2, 64, 64), {"mask": segments(256) & masks.Causal(), "score": scores.SoftCap(5.0)}
    ),
    "chosen blocks": Case((1, 256, 256, 4, 2, 64, 64), {"mask": masks.Blocks(CHOSEN, 128, 128) & masks.Causal()}),
    "a decoding step": Case((2, 1, 300, 4, 2, 64, 32), {"mask": masks.Causal(299)}),
    "a decoding step over runs of keys": Case(
        (2, 1, 2048, 4, 2, 64, 64),
        {"mask": masks.Causal(), "q_positions": jnp.asarray([[700], [1900]]), "kv_positions": jnp.arange(2048)},
        lambda table: lambda s, b, h, q, k: s + table[h, k], TABLE,
    ),
    "dropout": Case(arguments={"dropout_rate": 0.3, "dropout_rng": jax.random.key(1)}),
    "sigmoid": Case(arguments={"weights": weights.Sigmoid(bias=-3.0), "mask": masks.Causal()}),
    "a learned score of heads and keys": Case(
        (1, 200, 200, 2, 2, 64, 64), {"mask": masks.Causal()},
        lambda table: lambda s, b, h, q, k: s + table[h, k], TABLE,
    ),
}  # fmt: skip


def check(case, backend="pallas"):
    batch, t, s, heads, kv_heads, width, value_width = case.sizes
    shapes = (batch, t, heads, width), (batch, s, kv_heads, width), (batch, s, kv_heads, value_width)
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=x), jnp.bfloat16) for x in shapes)
    d_out = jnp.asarray(rng.normal(size=(batch, t, heads, value_width)), jnp.bfloat16)

    def of(backend, q, k, v, learned):
        score = {} if case.score_of is None else {"score": case.score_of(learned)}
        out = attention(q, k, v, backend=backend, **case.arguments, **score)
        return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(), out

    learned = jnp.zeros(()) if case.learned is None else case.learned
    inputs = (q, k, v, learned)
    run = jax.jit(jax.value_and_grad(of, (1, 2, 3, 4), has_aux=True), static_argnums=0)
    (_, out), found = jax.block_until_ready(run(backend, *inputs))
    with jax.default_matmul_precision("float32"):
        exact = [x.astype(jnp.float32) for x in inputs]
        (_, expected), gradients = run("dense", *exact)
    for got, want, atol in [(out, expected, 1.2e-2), *((a, b, 2.5e-2) for a, b in zip(found, gradients, strict=True))]:
        got, want = (np.asarray(x, np.float64) for x in (got, want))
        np.testing.assert_allclose(got, want, atol=atol * abs(want).max())


def test_simulated_on_a_gpu():
    with simulation():
        check(CASES["padded widths and lengths"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n != "padded widths and lengths"])
def test_all_simulated_on_a_gpu(name):
    with simulation():
        check(CASES[name])


LARGE = {
    "causal": Case((2, 2048, 2048, 8, 2, 128, 128), {"mask": masks.Causal()}),
    "window of 256": Case((1, 3000, 3000, 4, 4, 64, 64), {"mask": masks.Causal() & masks.SlidingWindow(256)}),
    "prefix": Case((1, 1024, 1024, 4, 1, 96, 96), {"mask": masks.Causal() | masks.Prefix(100)}),
    "more keys than queries": Case((1, 600, 1500, 4, 2, 80, 128), {"mask": masks.Causal(900)}),
    "ALiBi": Case((1, 1024, 1024, 4, 4, 64, 64), {"mask": masks.Causal(), "score": scores.ALiBi.for_heads(4)}),
    "a bias for every cell": Case(
        (1, 700, 700, 4, 4, 64, 64),
        {"mask": masks.Causal(), "bias": jnp.asarray(RNG.normal(size=(1, 4, 700, 700)), jnp.float32)},
    ),
}  # fmt: skip


def _needs_a_kernel():
    if jax.default_backend() != "tpu" and generation() is None:
        pytest.skip(f"a TPU or a Hopper GPU is needed, and this is a {jax.devices()[0].device_kind}")


@pytest.mark.accelerator
@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_on_the_accelerator(name):
    _needs_a_kernel()
    check((CASES | LARGE)[name])


@pytest.mark.accelerator
def test_auto_takes_the_kernels_or_a_vendors():
    _needs_a_kernel()
    x = jnp.zeros((1, 1024, 2, 64), jnp.bfloat16)
    assert explain(x, x, x, mask=masks.Causal() & masks.SlidingWindow(100), score=scores.SoftCap(5.0)).backend == "pallas"
    assert explain(x, x, x, mask=masks.Causal()).backend in ("pallas", "cudnn")
    check(LARGE["causal"], backend="auto")


@pytest.mark.accelerator
def test_the_same_bits_twice():
    _needs_a_kernel()
    q, k, v = (jnp.asarray(np.random.default_rng(n).normal(size=(2, 2048, 4, 64)), jnp.bfloat16) for n in range(3))
    run = jax.jit(
        jax.grad(lambda *x: attention(*x, mask=masks.Causal(), backend="pallas").astype(jnp.float32).sum(), (0, 1, 2))
    )
    first = run(q, k, v)
    for _ in range(5):
        for a, b in zip(first, run(q, k, v), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
