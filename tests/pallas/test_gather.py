"""The TPU kernels over listed keys in simulation (races, unwritten memory and reads past the end are errors)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attnzoo.core.gathered import gathered_attention
from attnzoo.core.sharding import attention_axes
from pallas_kernels.tpu import gather
from pallas_kernels.tpu.launch import simulation
from tests.core.listed import Case
from tests.core.oracle import oracle


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch):
    """Few keys make several groups, and few copies to simulate."""
    monkeypatch.setattr(gather, "GROUP", 32)


CASES = {
    "two groups of keys, a list for every query head": Case((1, 20, 200, 2, 1, 16, 24), (2, 1, 150)),
    "decoding, lists of key heads": Case((1, 1, 90, 4, 2, 16, 16), (2, 1, 60)),
    "short last block, up to the query's own position": Case((1, 11, 61, 2, 2, 16, 16), (2, 2, 40), block_q=8, causal=True),
}
SLOW = {
    "several batch rows and blocks": Case((2, 40, 300, 4, 2, 136, 40), (4, 3, 280), block_q=16),
    "shared lists, up to the query's own position": Case((2, 40, 301, 4, 2, 16, 16), (2, 2, 200), causal=True),
    "blocks in pieces": Case((1, 150, 200, 2, 1, 16, 16), (2, 1, 190)),
}


def check(case, dtype=jnp.float32, atol=3e-6):
    q, k, v = (jnp.asarray(x, dtype) for x in case.arrays())
    with simulation():
        out, lse = gathered_attention(q, k, v, **case.arguments(), backend="pallas", return_lse=True)
    want, want_lse, _ = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), ok=case.cells())
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=atol)
    np.testing.assert_allclose(jnp.moveaxis(lse, 2, 1), want_lse, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    check(CASES[name])


def test_bfloat16_rows_share_words():
    """An odd number of keys, of which two lie in each other's words."""
    check(CASES["short last block, up to the query's own position"], jnp.bfloat16, 0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_more_against_float64(name, dtype):
    check(SLOW[name], dtype, 3e-6 if dtype == jnp.float32 else 0.03)


def gradients(case, backend, dtype=jnp.float32):
    def loss(q, k, v):
        out, lse = gathered_attention(q, k, v, **case.arguments(), backend=backend, return_lse=True)
        weighed = (out.astype(jnp.float32) * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()
        return weighed + (jnp.where(jnp.isfinite(lse), lse, 0) * 0.3).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))(*(jnp.asarray(x, dtype) for x in case.arrays()))


@pytest.mark.parametrize("name", ["short last block, up to the query's own position"])
def test_gradients_are_those_of_plain_jax(name):
    with simulation():
        got = gradients(CASES[name], "pallas")
    for a, b in zip(got, gradients(CASES[name], "blockwise"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_more_gradients(name, dtype):
    with simulation():
        got = gradients(SLOW[name], "pallas", dtype)
    atol = 2e-5 if dtype == jnp.float32 else 0.06
    for a, b in zip(got, gradients(SLOW[name], "blockwise"), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=atol, rtol=atol)


def test_large_blocks_are_divided(monkeypatch):
    monkeypatch.setattr(gather, "MOST_ROWS", 16)
    case = Case((1, 20, 40, 2, 1, 16, 16), (1, 1, 30), causal=True)
    check(case)
    with simulation():
        dq, *_ = gradients(case, "pallas")
    np.testing.assert_allclose(dq, gradients(case, "blockwise")[0], atol=1e-5)


def test_what_no_list_names_is_not_read():
    q, k, v = Case((1, 2, 4, 1, 1, 16, 16)).arrays()
    k[:, 0], v[:, 0] = np.nan, np.inf
    with simulation():
        out = gathered_attention(q, k, v, np.array([[[[-1, 2, 1]]]]), backend="pallas")
    np.testing.assert_allclose(out, oracle(q, k[:, 1:3], v[:, 1:3])[0], atol=3e-6)


REFUSED = {
    "the same for q, k and v": {"v": jnp.zeros((1, 8, 2, 16), jnp.bfloat16)},
    "it takes float32 or bfloat16": dict.fromkeys("qkv", jnp.zeros((1, 8, 2, 16), jnp.float16)),
    "more than the 65536": {"positions": jnp.zeros((1, 2, 1, 70000), jnp.int32)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_reason(reason):
    x = jnp.zeros((1, 8, 2, 16))
    arguments = {"q": x, "k": x, "v": x, "positions": jnp.zeros((1, 2, 1, 4), jnp.int32)} | REFUSED[reason]
    with simulation(), pytest.raises(ValueError, match=f"'pallas' cannot run this: .*{reason}.*; 'blockwise' can"):
        gathered_attention(**arguments, backend="pallas")


@pytest.mark.slow
def test_groups_of_their_real_size(monkeypatch):
    monkeypatch.undo()
    check(SLOW["several batch rows and blocks"], jnp.bfloat16, 0.03)


@pytest.mark.slow
def test_divided_over_a_mesh():
    case = Case((2, 8, 40, 4, 2, 16, 16), (2, 1, 30))
    arrays = [jnp.asarray(x) for x in case.arrays()]
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def run(*arrays):
        return gathered_attention(*arrays, **case.arguments(), backend="pallas")

    with simulation(), jax.set_mesh(mesh), attention_axes(batch="data", heads="tensor"):
        got = jax.block_until_ready(jax.jit(run)(*arrays))
    np.testing.assert_allclose(got, oracle(*arrays, ok=case.cells())[0], atol=3e-6)
