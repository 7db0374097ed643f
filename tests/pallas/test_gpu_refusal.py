"""What the GPU kernels cannot take is refused by name, before anything is compiled."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.gpu.attend import attend
from pallas_kernels.gpu.refusal import LACKING, refusal
from tests.pallas.gpu_cases import case, causal

PLAIN = case(block_k=128, mask=causal)


def shaped(width=64, length=128, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, length, 1, width), dtype)


@pytest.mark.parametrize("width", [64, 128])
def test_what_the_kernels_take_is_not_refused(width):
    assert refusal(PLAIN.p, shaped(width), shaped(width), shaped(width), backward=True) is None


@pytest.mark.parametrize(
    ("q", "v", "words"),
    [
        (shaped(dtype=jnp.float32), shaped(dtype=jnp.float32), "bfloat16 or float16"),
        (shaped(), shaped(dtype=jnp.float16), "the same for q, k and v"),
        (shaped(80), shaped(80), "multiples of 64, not 80 and 80"),
        (shaped(length=100), shaped(), r"padded to \(128, 128\) queries and keys, not \(100, 128\)"),
        (shaped(512), shaped(512), "do not fit into shared memory"),
        (shaped(192), shaped(128), "do not fit into shared memory with 128 keys"),
    ],
)
def test_shapes(q, v, words):
    assert re.search(words, refusal(PLAIN.p, q, q, v))


def test_functions_and_operands():
    narrow = dataclasses.replace(PLAIN.p, block_k=64)
    wide = shaped(256)
    assert refusal(narrow, wide, wide, wide) is None
    assert "takes heads up to 128 wide" in refusal(narrow, wide, wide, wide, backward=True)
    odd = dataclasses.replace(PLAIN.p, block_k=96)
    assert "64 or 128 keys, not 128 by 96" in refusal(odd, shaped(), shaped(), shaped())
    floors = dataclasses.replace(PLAIN.p, score=lambda x, b, h, t, s: jax.jit(jnp.floor)(x))
    assert "'floor' does not run" in refusal(floors, shaped(), shaped(), shaped())
    assert "floor" in LACKING


def test_the_operation_raises():
    x = jnp.zeros((1, 128, 1, 80), jnp.bfloat16)
    with pytest.raises(ValueError, match="flash attention on a GPU cannot run this: its head widths are multiples of 64"):
        attend(PLAIN.p, x, x, x, (), (None, (), None))
