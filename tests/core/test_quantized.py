"""Keys and values in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks
from attnzoo.core.attention import attention, explain
from attnzoo.core.quantized import NARROW, Quantized, quantize
from pallas_kernels.tpu.launch import simulation


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (2, 150, n, 16)) for k, n in zip(keys, (4, 2, 2), strict=True)]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("per", ["token", "feature"])
def test_rounding_is_within_half_a_step(qkv, dtype, per):
    x = qkv[1] * jnp.geomspace(0.01, 100, 16)
    made = quantize(x, dtype, per=per)
    assert made.values.dtype == dtype and made.scale.shape == ((2, 150, 2, 1) if per == "token" else (2, 1, 2, 16))
    step = made.scale / 2 if dtype == "int8" else jnp.abs(x) * 2.0 ** -(4 if "e4" in dtype else 3) + made.scale * 2.0**-9
    assert (jnp.abs(made.expand() - x) <= 1.001 * step).all()
    np.testing.assert_array_equal(quantize(jnp.zeros((3, 2, 4)), dtype, per=per).expand(), 0)


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_stands_for_what_it_expands_to(qkv, backend):
    q, k, v = qkv
    k, v = quantize(k, per="feature"), quantize(v)
    want = attention(q, k.expand(), v.expand(), mask=masks.Causal(), backend=backend)
    np.testing.assert_array_equal(attention(q, k, v, mask=masks.Causal(), backend=backend), want)


CASES = {
    "int8, keys per feature, values per token": ("int8", "feature", "token", {"mask": masks.Causal()}),
    "float8, keys per token, values per feature": (
        "float8_e4m3fn", "token", "feature", {"mask": masks.Causal(), "score": lambda s, b, h, q, k: s - 0.01 * (q - k)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("queries", [150, 1])
def test_the_kernels_read_eight_bits(qkv, name, queries):
    dtype, keys, values, arguments = CASES[name]
    q, k, v = qkv
    q, k, v = q[:, -queries:], quantize(k, dtype, per=keys), quantize(v, dtype, per=values)
    arguments = {**arguments, "q_positions": jnp.arange(150 - queries, 150), "return_lse": True}
    with simulation():
        got = attention(q, k, v, backend="pallas", block_sizes=(128, 128), **arguments)
    want = attention(q, k.expand(), v.expand(), backend="dense", **arguments)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6, rtol=2e-5)


def test_only_one_of_them_may_be_narrow(qkv):
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv)
    with simulation():
        got = attention(q, k, quantize(v), backend="pallas")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), attention(*qkv), atol=0.03, rtol=0.03)


def test_gradients_reach_the_queries(qkv):
    q, k, v = qkv
    k, v = quantize(k), quantize(v)
    got = jax.grad(lambda q: attention(q, k, v, backend="blockwise").sum())(q)
    want = jax.grad(lambda q: attention(q, k.expand(), v.expand(), backend="blockwise").sum())(q)
    np.testing.assert_array_equal(got, want)
    with simulation(), pytest.raises(ValueError, match="quantized keys and values have no derivative in the kernels"):
        jax.grad(lambda q: attention(q, k, v, backend="pallas").sum())(q)


def test_bad_input(qkv):
    q, k, v = qkv
    good = quantize(k)
    with pytest.raises(TypeError, match=r"k: Quantized holds int8 or .* got float32"):
        attention(q, Quantized(k, good.scale), v)
    with pytest.raises(ValueError, match=r"v: the scale .* \(2, 150, 2, 16\).* got \(2, 150, 2\)"):
        attention(q, k, Quantized(good.values, good.scale[..., 0]))
    with pytest.raises(TypeError, match="k has dtype int8"):
        attention(q, good.values, v)
    with pytest.raises(ValueError, match=r"dtype is one of int8, .* got int4 and 'token'"):
        quantize(k, jnp.int4)
    assert "16" in str(good.shape) and explain(q, good, v).backend == "dense"
