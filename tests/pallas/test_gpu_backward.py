"""The GPU kernels' derivatives, simulated, against those of the definition in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu.launch import simulation
from tests.pallas.gpu_cases import BACKWARD_CASES as CASES
from tests.pallas.gpu_cases import check_gradients, gradients, segment_operands


def check(c, masks=()):
    with simulation():
        computed = gradients(c, masks)
    check_gradients(*computed)


def test_ragged_lengths():
    check(CASES["ragged lengths"]())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "ragged lengths"])
def test_agrees_with_the_definition(name):
    check(CASES[name](), segment_operands(1, 128, 256) if "packed" in name else ())


@pytest.mark.slow
def test_lists_made_at_run_time_give_the_same_bits():
    c = CASES["rows and columns without tiles"]()
    dynamic = dataclasses.replace(c, state=jnp.asarray(c.state))
    with simulation():
        first, again = gradients(c, ())[0], gradients(dynamic, ())[0]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
