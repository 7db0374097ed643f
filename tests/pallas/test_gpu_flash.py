"""The GPU forward kernel, simulated: warpgroups, copies and barriers; races, unwritten memory and reads past ends raise."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import choice
from pallas_kernels.gpu.launch import simulation
from tests.pallas.gpu_cases import CASES, results
from tests.pallas.gpu_cases import check_forward as check


def simulated(c, state=None):
    with simulation():
        return results(c, state)


def test_ragged_lengths():
    c = CASES["ragged lengths"]()
    check(c, *simulated(c))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name):
    c = CASES[name]()
    check(c, *simulated(c))


@pytest.mark.slow
def test_lists_made_at_run_time_and_results_are_the_same_bits():
    c = CASES["rows without tiles"]()
    first, again, dynamic = simulated(c), simulated(c), simulated(c, jnp.asarray(c.state))
    for a, b, d in zip(first, again, dynamic, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, d)


@pytest.mark.parametrize(("width", "value_width"), [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_blocks_fit_into_shared_memory(width, value_width):
    _, block_k = choice.blocks(width, value_width)
    slots = choice.slots(width, value_width, block_k)
    assert slots >= 2
    assert choice.forward_bytes(width, value_width, block_k, slots) <= choice.SHARED_BYTES
