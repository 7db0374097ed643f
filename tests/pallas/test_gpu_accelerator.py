"""The kernels on a Hopper or Blackwell GPU: what the simulator cannot show are products, their layouts, and real races.

JAX_PLATFORMS=cuda pytest -m accelerator tests/pallas
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import choice
from pallas_kernels.gpu.launch import generation
from tests.pallas.gpu_cases import (
    BACKWARD_CASES,
    CASES,
    case,
    causal,
    check_forward,
    check_gradients,
    gradients,
    numbers,
    results,
    segment_operands,
    segments,
    some_dropout,
)

pytestmark = [
    pytest.mark.accelerator,
    pytest.mark.skipif(
        generation() is None, reason=f"a Hopper or Blackwell GPU is needed, and this is a {jax.default_backend()}"
    ),
]
differentiable = pytest.mark.skipif(generation() == "blackwell", reason="there is no derivative on a Blackwell GPU")
WIDTHS = [64, 128] if generation() == "blackwell" else [64, 128, 192, 256]


def window(b, h, t, s):
    return (s <= t) & (t - s < 200)


def blocks(width):
    return {"block_q": choice.block_queries(generation())[0], "block_k": choice.blocks(width, width)[1]}


# Many tiles, so that the ring of slots turns and warpgroups take turns: sizes that the simulator would need hours for.
LONG = {
    "plain": lambda width: case(batch=2, heads=4, kv_heads=2, queries=1024, keys=1024, width=width, value_width=width,
                                **blocks(width)),
    "causal": lambda width: case(heads=4, queries=1024, keys=1024, width=width, value_width=width, mask=causal,
                                 **blocks(width)),
    "window": lambda width: case(heads=2, queries=1500, keys=1500, width=width, value_width=width, mask=window,
                                 **blocks(width)),
    "packed documents, soft cap": lambda width: case(
        batch=2, heads=4, kv_heads=2, queries=768, keys=768, width=width, value_width=width, mask=segments,
        masks=segment_operands(2, 768, 768), score=lambda x, b, h, t, s: 20 * jnp.tanh(x / 20),
        **blocks(width)),
    "bias": lambda width: case(heads=2, queries=640, keys=640, width=width, value_width=width, mask=causal,
                               score=lambda x, b, h, t, s, bias: x + bias, scores=(numbers(1, 2, 640, 640),),
                               **blocks(width)),
    "dropout": lambda width: case(heads=2, queries=512, keys=512, width=width, value_width=width, keep=some_dropout,
                                  **blocks(width)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_agrees_with_the_definition(name):
    c = CASES[name]()
    check_forward(c, *results(c))


@differentiable
@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_gradients_agree_with_those_of_the_definition(name):
    c = BACKWARD_CASES[name]()
    check_gradients(*gradients(c, segment_operands(1, 128, 256) if "packed" in name else ()))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", LONG)
def test_forward_over_many_tiles(name, width):
    c = LONG[name](width)
    check_forward(c, *results(c, slots=choice.slots(width, width, c.p.block_k, c.p.block_q)))


@differentiable
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("name", LONG)
def test_gradients_over_many_tiles(name, width):
    c = LONG[name](width)
    check_gradients(*gradients(c, segment_operands(2, 768, 768) if "documents" in name else ()))


def test_the_same_bits_every_time_and_with_lists_made_at_run_time():
    c = LONG["causal"](128)
    first = results(c, slots=2)
    for _ in range(5):
        for a, b in zip(first, results(c, slots=2), strict=True):
            np.testing.assert_array_equal(a, b)
    for a, b in zip(first, results(c, jnp.asarray(c.state), slots=2), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_tile_that_is_empty_is_read():
    c = LONG["window"](128)
    spoiled = c.x._replace(v=c.x.v.at[:, : 4 * c.p.block_k].set(jnp.nan))
    lists = c.state.copy()
    lists[..., :4] = 0
    out, _ = results(type(c)(c.p, lists, spoiled, (), c.out, c.lse))
    first = 4 * c.p.block_k + 200
    np.testing.assert_allclose(out[:, first:], c.out[:, first:], atol=1.2e-2 * abs(c.out).max())
