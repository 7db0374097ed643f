"""The recurrence kernels in simulation, where races, unwritten memory and reads past the end are errors, and compiled."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attnzoo.core.recurrence import linear_recurrence
from attnzoo.core.sharding import attention_axes
from pallas_kernels import operations
from pallas_kernels.tpu.launch import compiling_for, simulation
from pallas_kernels.tpu.scan.lockstep import in_lockstep
from pallas_kernels.tpu.scan.products import inverse, product, sums
from tests.core import recurrence_oracle as oracle

SOME = [("none", "shared"), ("head", "none")]
OTHERS = [("none", "none"), ("none", "own"), ("head", "shared"), ("head", "own"), ("channel", "none"),
          ("channel", "shared"), ("channel", "own")]  # fmt: skip


def kernel(size):
    return lambda **x: linear_recurrence(**x, chunk_size=size, backend="tpu")


def agrees(x, rng, size, bound=2e-6):
    weights = oracle.draw_weights(rng, x)
    with simulation():
        got = oracle.values_and_gradients(kernel(size), x, weights)
    assert oracle.worst(got, oracle.exact(oracle.rank_one, x, weights)) < bound


@pytest.mark.parametrize(("decay", "erases"), SOME)
def test_values_states_and_all_gradients(decay, erases, rng):
    """20 tokens are no multiple of 16; both heads share a step."""
    agrees(oracle.draw(rng, decay, erases, length=20), rng, 16)


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "erases"), OTHERS)
def test_values_states_and_all_gradients_of_the_other_forms(decay, erases, rng):
    agrees(oracle.draw(rng, decay, erases, length=20), rng, 16)


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "erases"), [("head", "shared"), ("channel", "own")])
def test_the_chunk_of_64(decay, erases, rng):
    agrees(oracle.draw(rng, decay, erases, batch=3, length=70, heads=1), rng, 64)


@pytest.mark.parametrize(("decay", "erases"), SOME)
def test_kernels_cost_what_the_plain_form_does(decay, erases, rng):
    """Both multiply the same matrices, and the derivative recomputes each chunk."""
    x = oracle.draw(rng, decay, erases, length=48)

    def operations_of(backend, backward):
        def out(x):
            return linear_recurrence(**x, chunk_size=16, backend=backend)[0].sum()

        with compiling_for("v5e"):
            return operations.flops(jax.make_jaxpr(jax.grad(out) if backward else out)(x))

    assert operations_of("tpu", False) == operations_of("xla", False) > 0
    assert operations_of("tpu", True) == pytest.approx(operations_of("xla", True), rel=0.05)


@pytest.mark.slow
def test_strong_decays(rng):
    x = oracle.draw(rng, "channel", "own", length=32, strength=100.0)
    x["log_decay"][:, ::7] = -1e-3
    agrees(x, rng, 16, 5e-6)


@pytest.mark.slow
def test_bfloat16_as_the_plain_form(rng):
    x = oracle.draw(rng, "channel", "own", length=20)
    weights = oracle.draw_weights(rng, x)
    x = {name: jnp.asarray(u, jnp.float32 if name in ("state", "log_decay") else jnp.bfloat16) for name, u in x.items()}
    with simulation():
        got = oracle.values_and_gradients(kernel(16), x, weights)
    wanted = oracle.exact(oracle.rank_one, jax.tree.map(np.float32, x), weights)
    assert oracle.worst(got, wanted) < 2**-6


def test_twice_the_same_bits_and_auto_takes_the_kernel(rng):
    x = oracle.draw(rng, "none", "none", length=16, heads=1)
    with simulation():
        first, second = kernel(16)(**x), linear_recurrence(**x, chunk_size=16)
        assert "attnzoo_scan" in str(jax.make_jaxpr(lambda x: linear_recurrence(**x))(x))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("decay", "erases"), SOME)
def test_divided_over_a_mesh(decay, erases, rng):
    """Each of four devices has a batch row and a head; without a rule the error says what would work."""
    x = oracle.draw(rng, decay, erases, batch=2, length=20)
    weights = oracle.draw_weights(rng, x)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with simulation(), jax.set_mesh(mesh):
        with attention_axes(batch="data", heads="tensor"):
            got = oracle.values_and_gradients(kernel(16), x, weights)
        with pytest.raises(ValueError, match=r"attention_axes.*or choose backend='xla'"):
            linear_recurrence(**x, chunk_size=16)
    assert oracle.worst(got, oracle.exact(oracle.rank_one, x, weights)) < 2e-6


def test_what_the_kernel_cannot_take_is_refused_by_name(rng):
    x = oracle.draw(rng, "head")
    with compiling_for("v5e"):
        with pytest.raises(ValueError, match="chunk_size from 16 to 128"):
            linear_recurrence(**x, chunk_size=8, backend="tpu")
        with pytest.raises(ValueError, match="the same for q, k, v"):
            linear_recurrence(**(x | {"v": x["v"].astype(np.float16)}), backend="tpu")


def test_operations_of_several_heads_take_turns(rng):
    """The results are those of one after another, to the bit; calls inside are taken apart, what nothing needs is left out."""
    given = [tuple(jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for _ in range(2)) for _ in range(3)]

    def work(a, b):
        jnp.sin(b)  # no one asks for it
        y, pull = jax.vjp(lambda a: product(jax.jit(jnp.tanh)(a), b, (1, 0), jnp.float32), a)
        return {"y": y, "d": pull(y)[0]}

    for a, b in zip(in_lockstep(work, given), [work(*x) for x in given], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    names = [e.primitive.name for e in jax.make_jaxpr(lambda given: in_lockstep(work, given))(given).jaxpr.eqns]
    assert names[:3] == ["tanh"] * 3
    assert names.count("dot_general") == 6
    assert "sin" not in names
    at = [n for n, name in enumerate(names) if name == "dot_general"]
    assert at[2] - at[0] == 2 and at[5] - at[3] == 2  # neighbours


def test_products_of_bfloat16_that_are_finer_than_it(rng):
    """Sums of decays lose nothing; an inverse has at least 12 right bits before it is rounded."""
    chosen = np.tril(np.ones((64, 64), np.float32))
    w = rng.normal(size=(64, 8)).astype(np.float32)
    wanted = chosen.astype(np.float64) @ w
    np.testing.assert_allclose(sums(chosen, w, jnp.bfloat16), wanted, atol=5e-6)
    _, pull = jax.vjp(lambda w: sums(chosen, w, jnp.bfloat16), w)
    np.testing.assert_allclose(pull(w)[0], chosen.T.astype(np.float64) @ w, atol=5e-6)
    keys = rng.normal(size=(64, 32))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    a = np.tril(-keys @ keys.T, -1).astype(np.float32)
    exact = np.linalg.inv(np.eye(64) - a.astype(np.float64))
    for dtype, bound in [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-12)]:
        assert np.abs(inverse(jnp.asarray(a), 6, dtype) - exact).max() < bound * np.abs(exact).max()


COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from attnzoo.core.recurrence import linear_recurrence
from pallas_kernels import operations
from pallas_kernels.tpu.launch import compiling_for

generation, dtype, decay, erases, size = sys.argv[1:]
device = topologies.get_topology_desc(platform="tpu", topology_name=generation + ":2x2").devices[0]

def given(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

size = int(size)
tokens = (1, 4096, 8)
x = {name: given(*tokens, size) for name in "qkv"} | {"state": given(1, 8, size, size, dtype="float32")}
if decay != "none":
    x["log_decay"] = given(*tokens, *([size] if decay == "channel" else []), dtype="float32")
if erases != "none":
    x["a"] = given(*tokens, size)
if erases == "own":
    x["b"] = given(*tokens, size)
loss = jax.grad(lambda x: sum(u.astype(jnp.float32).sum() for u in linear_recurrence(**x, backend="tpu")))
with compiling_for(generation):
    lowered = jax.jit(loss).trace(x).lower(lowering_platforms=("tpu",))
text = lowered.compile().as_text()
assert "attnzoo_scan" in text and "attnzoo_scan_backward" in text
"""


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize(
    ("dtype", "decay", "erases", "size"),
    [
        ("bfloat16", "none", "none", 64),
        ("bfloat16", "head", "shared", 128),
        ("bfloat16", "channel", "own", 128),
        ("float32", "head", "own", 64),
        ("float32", "channel", "own", 128),
        ("bfloat16", "channel", "own", 256),
    ],
)
def test_compiles_for_tpu(generation, dtype, decay, erases, size):
    """Forward and backward of 4096 tokens, by the real compiler."""
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    command = [sys.executable, "-c", COMPILE, generation, dtype, decay, erases, str(size)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
