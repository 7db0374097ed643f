"""The kernel for Blackwell GPUs, simulated: where JAX simulates tensor memory, with asynchronous products and races there."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.attention import attention, explain
from attnzoo.core.masks import Causal
from pallas_kernels.gpu import choice
from pallas_kernels.gpu.launch import compiling_for, simulation
from tests.pallas.gpu_cases import CASES, case, check_forward, results

#: With two warpgroups that compute, which take turns at the products.
PAIRS = {
    "causal, odd lengths": lambda: case(block_q=256, block_k=128, queries=200, keys=190, mask=lambda b, h, t, s: s <= t + 20),
    "grouped heads, a score, more tiles than slots": lambda: case(
        block_q=256, heads=2, queries=256, keys=140, width=128, value_width=128,
        score=lambda x, b, h, t, s: 5 * jnp.tanh(x / 5) - 0.1 * h,
    ),
    "rows without tiles, keys by head": lambda: case(
        block_q=256, block_k=128, queries=512, keys=256, mask=lambda b, h, t, s: (s <= t) & (t >= 260), by_head=True
    ),
}  # fmt: skip


@contextlib.contextmanager
def blackwell():
    with compiling_for("blackwell"), simulation():
        yield


def simulated(c, state=None):
    with blackwell():
        return results(c, state)


@pytest.mark.parametrize("name", PAIRS)
def test_two_warpgroups_agree_with_the_definition(name):
    c = PAIRS[name]()
    check_forward(c, *simulated(c))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("ragged lengths", "dropout") else pytest.mark.slow) for name in CASES],
)
def test_one_warpgroup_agrees_with_the_definition(name):
    c = CASES[name]()
    check_forward(c, *simulated(c))


@pytest.mark.slow
def test_lists_made_at_run_time_and_results_are_the_same_bits():
    c = PAIRS["rows without tiles, keys by head"]()
    first, again, dynamic = simulated(c), simulated(c), simulated(c, jnp.asarray(c.state))
    for a, b, d in zip(first, again, dynamic, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, d)


def test_attention_takes_the_kernel_by_name_alone():
    long = jax.ShapeDtypeStruct((1, 1000, 1, 64), jnp.bfloat16)
    with compiling_for("blackwell"):
        found = explain(long, long, long, mask=Causal())
        assert (found.backend, found.reason) == ("blockwise", "the first of cudnn, blockwise, dense that can run this")
        assert "256×128" in str(explain(long, long, long, mask=Causal(), backend="pallas"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 140, 1, 64)), jnp.bfloat16)
    with blackwell():
        out, lse = attention(x, x, x, mask=Causal(), backend="pallas", return_lse=True)
    want, wanted = attention(x, x, x, mask=Causal(), backend="dense", return_lse=True)
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(want, np.float32), atol=2e-2)
    np.testing.assert_allclose(lse, wanted, atol=2e-2)


@compiling_for("blackwell")
def test_what_it_lacks_is_refused_by_name():
    x, wide = (jax.ShapeDtypeStruct((1, 300, 1, width), jnp.bfloat16) for width in (64, 192))

    def total(x, **how):
        return attention(x, x, x, backend="pallas", **how).astype(jnp.float32).sum()

    with pytest.raises(ValueError, match="no derivative; blockwise attention has one there"):
        jax.eval_shape(jax.grad(total), x)
    with pytest.raises(ValueError, match=r"up to 128 wide, not 192 and 192; .*'blockwise'"):
        jax.eval_shape(total, wide)
    with pytest.raises(ValueError, match=r"its block_sizes are \(256, 128\) or \(128, 128\), not \(64, 128\)"):
        jax.eval_shape(functools.partial(total, block_sizes=(64, 128)), x)


@pytest.mark.parametrize("width", [64, 128])
def test_blocks_fit_into_shared_memory(width):
    for block_q in choice.block_queries("blackwell"):
        slots = choice.slots(width, width, 128, block_q)
        assert slots >= 2
        assert choice.forward_bytes(width, width, 128, slots, block_q) <= choice.SHARED_BYTES
