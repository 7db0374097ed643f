"""The fused TPU kernels in simulation (races, unwritten memory and reads past the end are errors) against float64."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attnzoo.core import masks, scores, weights
from attnzoo.core.attention import attention, explain
from attnzoo.core.backends import dense, pallas
from attnzoo.core.blocks import BlockMap
from attnzoo.core.cells import Geometry, all_cells
from attnzoo.core.dropout import Dropout, dropout_seed, keep_scale
from attnzoo.core.entmax import Entmax
from attnzoo.core.neighborhood import neighborhood_attention
from attnzoo.core.request import make_request
from attnzoo.core.sharding import attention_axes
from pallas_kernels.tpu import choice
from pallas_kernels.tpu.launch import compiling_for, simulation
from tests.core.oracle import oracle


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; ``cells`` and ``logits`` say the same as its mask and score, for the oracle."""

    sizes: tuple[int, int, int, int, int, int, int] = (1, 150, 150, 2, 1, 16, 16)  # B T S N K H Hv
    arguments: Any = dataclasses.field(default_factory=dict)
    cells: Any = None
    logits: Any = None
    weights: Any = "softmax"

    def arrays(self):
        b, t, s, n, k, h, hv = self.sizes
        rng = np.random.default_rng(0)
        return [rng.normal(size=x).astype(np.float32) for x in ((b, t, n, h), (b, s, k, h), (b, s, k, hv))]

    def coordinates(self):
        b, t, s, n, *_ = self.sizes
        return np.ogrid[:b, :n, :t, :s]

    def expected(self):
        b, h, q, k = self.coordinates()
        ok = None if self.cells is None else self.cells(b, h, q, k)
        s_of = None if self.logits is None else lambda s: self.logits(s, b, h, q, k)
        return oracle(*self.arrays(), ok=ok, s_of=s_of, weights=self.weights)


RNG = np.random.default_rng(1)
TABLE = RNG.normal(size=(4, 600)).astype(np.float32)
SEGMENTS = np.sort(RNG.integers(0, 3, (2, 300)))
CELLS = RNG.random((2, 1, 150, 150)) > 0.4
CHOSEN = RNG.random((1, 4, 2, 3)) > 0.5
SMALL = {"block_sizes": (128, 128)}

CASES = {
    "plain, odd lengths, other value width": Case((2, 150, 200, 2, 2, 24, 40), {}),
    "causal over several tiles": Case(
        (1, 300, 300, 2, 1, 16, 16), {"mask": masks.Causal(), **SMALL}, lambda b, h, q, k: k <= q
    ),
    "window and sinks": Case(
        (1, 300, 300, 1, 1, 16, 16),
        {"mask": masks.Causal() & masks.SlidingWindow(50) | masks.Sinks(3), **SMALL},
        lambda b, h, q, k: ((k <= q) & (q - k < 50)) | (k < 3),
    ),
    "lengths, some rows blind": Case(
        (2, 150, 150, 2, 1, 16, 16),
        {"mask": masks.Lengths(jnp.array([90, 0]), jnp.array([150, 20]))},
        lambda b, h, q, k: (k < np.array([90, 0])[b]) & (q < np.array([150, 20])[b]),
    ),
    "segments": Case(
        (2, 150, 300, 2, 1, 16, 16),
        {"mask": masks.Segments(jnp.asarray(SEGMENTS[:, :150]), jnp.asarray(SEGMENTS)), **SMALL},
        lambda b, h, q, k: SEGMENTS[b, q] == SEGMENTS[b, k],
    ),
    "an array of cells": Case(
        (2, 150, 150, 2, 1, 16, 16), {"mask": jnp.asarray(CELLS)}, lambda b, h, q, k: np.broadcast_to(CELLS, (2, 2, 150, 150))
    ),
    "blocks by head under grouped heads": Case(
        (1, 150, 300, 4, 2, 16, 16),
        {"mask": masks.Blocks(jnp.asarray(CHOSEN), 128, 128)},
        lambda b, h, q, k: CHOSEN[0, h, q // 128, k // 128],
    ),
    "a function that looks up by distance and by key": Case(
        arguments={
            "mask": lambda b, h, q, k: (
                (jnp.asarray(TABLE)[h, q - k + 300] > -1) & (jnp.asarray(TABLE)[0, k] < 1) | (jnp.sign(k - q - 9) > 0)
            )
        },
        cells=lambda b, h, q, k: (TABLE[h, q - k + 300] > -1) & (TABLE[0, k] < 1) | (k > q + 9),
    ),
    "positions": Case(
        arguments={
            "mask": masks.Causal(),
            "q_positions": jnp.arange(150) * 2,
            "kv_positions": jnp.where(jnp.arange(150) % 5 == 0, -1, jnp.arange(150) + 40),
        },
        cells=lambda b, h, q, k: (k % 5 > 0) & (k + 40 <= 2 * q),
    ),
    "soft cap, ALiBi": Case(
        arguments={"score": scores.SoftCap(2.0) >> scores.ALiBi(jnp.array([0.1, 0.02]))},
        logits=lambda s, b, h, q, k: 2 * np.tanh(s / 2) - np.array([0.1, 0.02])[h] * abs(q - k),
    ),
    "one query, ragged slots": Case(
        (2, 1, 300, 4, 2, 16, 24),
        {
            "mask": masks.Causal(),
            "q_positions": jnp.array([[140], [270]]),
            "kv_positions": jnp.where(jnp.arange(300) < jnp.array([[141], [271]]), jnp.arange(300), -1),
            "block_sizes": (128, 128),
        },
        lambda b, h, q, k: k < np.array([141, 271])[b],
    ),
    "three queries, heads of their own": Case(
        (1, 3, 300, 4, 2, 16, 16),
        {
            "mask": lambda b, h, q, k: k <= q + 50 * h,
            "score": lambda s, b, h, q, k: s + jnp.asarray(TABLE)[h, q - k + 300],
        },
        lambda b, h, q, k: k <= q + 50 * h,
        lambda s, b, h, q, k: s + TABLE[h, q - k + 300],
    ),
    "sigmoid weights": Case(
        arguments={"weights": weights.Sigmoid(), "mask": masks.Causal()},
        cells=lambda b, h, q, k: k <= q,
        weights=lambda s: 1 / (1 + np.exp(-(s - np.log(150)))),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    case = CASES[name]
    lse = case.weights == "softmax"
    with simulation():
        got = attention(*case.arrays(), backend="pallas", return_lse=lse, **case.arguments)
    out, want_lse, _ = case.expected()
    np.testing.assert_allclose(got[0] if lse else got, out, atol=2e-6, rtol=1e-5)
    if lse:
        np.testing.assert_allclose(jnp.moveaxis(got[1], 2, 1), want_lse, atol=2e-6, rtol=1e-5)


def gradients(backend: str, case: Case, what: dict[str, Any], dtype: Any = jnp.float32):
    """Of a sum that uses the output and the log-sum-exp, in q, k, v and what is captured."""

    def loss(q, k, v, captured):
        arguments = {**case.arguments, **{name: f(captured[name]) for name, (f, _) in what.items()}}
        lse = case.weights == "softmax"
        got = attention(q, k, v, backend=backend, return_lse=lse, **arguments)
        out = (got[0] if lse else got).astype(jnp.float32)
        total = (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()
        return total + (jnp.where(jnp.isfinite(got[1]), got[1], 0) * 0.3).sum() if lse else total

    captured = {name: x for name, (_, x) in what.items()}
    arrays = [jnp.asarray(x, dtype) for x in case.arrays()]
    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arrays, captured)


GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal, grouped": ("causal over several tiles", {}),
    "three queries": ("three queries, heads of their own", {}),
    "blocks by head": ("blocks by head under grouped heads", {}),
    "sigmoid": ("sigmoid weights", {}),
    "by distance, query, key and head": (
        "causal over several tiles",
        {
            "score": (
                lambda t: lambda s, b, h, q, k: s * t[h, 0] + t[h, q - k + 300] + t[0, q] * t[1, k],
                jnp.asarray(TABLE[:2]),
            )
        },
    ),
    "bias by cell": (
        "plain, odd lengths, other value width",
        {"bias": (lambda x: x, jnp.asarray(RNG.normal(size=(2, 150, 200))))},
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_match_the_dense_backend(name):
    key, what = GRADIENTS[name]
    with simulation():
        got = gradients("pallas", CASES[key], what)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("dense", CASES[key], what)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["causal, grouped", "blocks by head", "sigmoid"])
def test_queries_without_room_on_the_chip_have_a_kernel_of_their_own(name, monkeypatch):
    """The same gradients from two kernels, also where rows of tiles are empty; one kernel where there is room."""
    key, _ = GRADIENTS[name]

    def kernels():
        text = str(jax.make_jaxpr(lambda: gradients("pallas", CASES[key], {}))())
        return [kernel for kernel in ("backward", "dq", "dkv") if f"attnzoo_flash_{kernel}" in text]

    with simulation():
        assert kernels() == ["backward"]
        together = gradients("pallas", CASES[key], {})
        monkeypatch.setattr(choice, "QUERIES_BYTES", dict.fromkeys(choice.QUERIES_BYTES, 0))
        assert kernels() == ["dq", "dkv"]
        apart = gradients("pallas", CASES[key], {})
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_entmax_by_passes(monkeypatch):
    """Where the chip does not hold rows. Every pass is a simulated kernel; against whole rows."""
    monkeypatch.setattr(choice, "HELD_BYTES", dict.fromkeys(choice.HELD_BYTES, 0))
    case = Case((1, 150, 150, 2, 1, 16, 16), {"mask": masks.Causal(), **SMALL}, weights=None)
    what = {"weights": (Entmax, jnp.float32([1.3, 2.0]))}
    with simulation():
        got = gradients("pallas", case, what)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("dense", case, what)), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5, rtol=1e-4)


def kernels(jaxpr):
    """The kernel calls of a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from kernels(getattr(inner, "jaxpr", inner))


def test_keys_that_are_values_are_read_once():
    q, k, _ = Case((1, 150, 300, 4, 1, 24, 24)).arrays()
    q, k = jnp.asarray(q), jnp.asarray(k)

    def run(backend, q, k, v):
        out, lse = attention(q, k, v, mask=masks.Causal(150), backend=backend, return_lse=True, **SMALL)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + lse.sum()

    def latents(backend):
        return jax.value_and_grad(lambda q, k: run(backend, q, k, k), argnums=(0, 1))(q, k)

    with simulation():
        got = latents("pallas")
        (kernel,) = kernels(jax.make_jaxpr(lambda q, k: run("pallas", q, k, k))(q, k).jaxpr)
    assert [v.aval.shape for v in kernel.invars].count((1, 1, 384, 24)) == 1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(latents("blockwise")), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_neighborhoods_by_boxes():
    window = masks.Neighborhood((20, 24), (5, 3), causal=(True, False))
    q, k, v = Case((1, 480, 480, 2, 1, 16, 16)).arrays()
    with simulation():
        got = neighborhood_attention(q, k, v, window, box=(8, 16), backend="pallas")
    ok = np.asarray(window.dense(480))
    np.testing.assert_allclose(got, oracle(q, k, v, ok=ok)[0], atol=2e-6, rtol=1e-5)


def test_bfloat16_is_near_float32():
    case = CASES["causal over several tiles"]
    with simulation():
        got = gradients("pallas", case, {}, jnp.bfloat16)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("dense", case, {})), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.06, rtol=0.06)


def test_dropout_drops_the_same_cells_forward_and_backward():
    key, rate = jax.random.key(3), 0.4
    case = Case(arguments={"mask": masks.Causal(), "dropout_rate": rate, "dropout_rng": key})
    keep = np.asarray(keep_scale(Dropout(rate, dropout_seed(key)), all_cells(Geometry(1, 2, 1, 150, 150))))
    ok = np.tril(np.ones((150, 150), bool))
    with simulation():
        out = attention(*case.arrays(), backend="pallas", **case.arguments)
        got = gradients("pallas", case, {})
    np.testing.assert_allclose(out, oracle(*case.arrays(), ok=ok, keep=keep)[0], atol=2e-6, rtol=1e-5)
    for a, b in zip(got, gradients("dense", case, {}), strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5), a, b)


def test_tiles_chosen_while_running():
    """A traced table: the lists are made on the device, and an empty row of tiles gives zeros."""
    table = np.array([[True, False, True], [False, False, False], [True, True, False]])
    case = Case((1, 300, 300, 2, 1, 16, 16))
    ok = np.kron(table, np.ones((128, 128), bool))[:300, :300] & np.tril(np.ones((300, 300), bool))

    @jax.jit
    def run(q, k, v, table):
        def out(q, k, v):
            return attention(q, k, v, mask=masks.Blocks(table, 128, 128) & masks.Causal(), backend="pallas")

        y, pull = jax.vjp(out, q, k, v)
        return y, pull(y)

    with simulation():
        y, got = run(*case.arrays(), jnp.asarray(table))
    np.testing.assert_allclose(y, oracle(*case.arrays(), ok=ok)[0], atol=2e-6, rtol=1e-5)
    assert (y[:, 128:256] == 0).all()
    dense, pull = jax.vjp(lambda *x: attention(*x, mask=jnp.asarray(ok), backend="dense"), *map(jnp.asarray, case.arrays()))
    for a, b in zip(got, pull(dense), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_the_same_bits_twice():
    case = CASES["causal over several tiles"]
    with simulation():
        one, two = (gradients("pallas", case, {}) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


class Hardmax(weights.Weights):
    def rows(self, s, ok, g):
        return jax.nn.one_hot(jnp.where(ok, s, -jnp.inf).argmax(-1), s.shape[-1])


REFUSED = {
    "never holds the weights": {"return_weights": True},
    "multiples of 128": {"block_sizes": (64, 128)},
    "may share a key head 16 at a time, not 18": {
        **{name: jnp.zeros((1, 32, 18 if name == "q" else 1, 8)) for name in "qkv"},
        "mask": masks.Array(jnp.ones((1, 18, 32, 32), bool).at[0, 0].set(False)),
    },
    "the same for q, k and v": {"v": jnp.zeros((1, 32, 2, 8), jnp.bfloat16)},
    "'dynamic_slice' on values that depend on query and key at once": {
        "score": lambda s, b, h, q, k: s + jnp.zeros((32, 32))[q, k]
    },
    "whole rows of logits": {"weights": Hardmax()},
    "uses 'cumsum'": {"weights": weights.Elementwise(lambda s: jnp.cumsum(s[None])[0])},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_name_the_reason(reason):
    arguments = {name: jnp.zeros((1, 32, 2, 8)) for name in "qkv"} | REFUSED[reason]
    with simulation(), pytest.raises(ValueError, match=f"backend 'pallas' cannot run this: .*{reason}"):
        attention(**arguments, backend="pallas")


def test_chosen_on_a_tpu_and_nowhere_else():
    x = jnp.zeros((1, 512, 2, 64), jnp.bfloat16)
    here = explain(x, x, x, mask=masks.Causal())
    assert here.backend == "blockwise"
    assert "needs a TPU" in here.refused["pallas"]
    with compiling_for("v6e"):
        there = explain(x, x, x, mask=masks.Causal())
        sparse = explain(x, x, x, mask=masks.Causal() & masks.SlidingWindow(64), block_sizes=(128, 128))
    assert there.backend == "pallas"
    assert sparse.block_map.counts() == {"empty": 9, "partial": 7, "full": 0}


def test_tables_by_distance_are_refused_on_v4():
    x = jnp.zeros((1, 512, 2, 64), jnp.bfloat16)
    table = jnp.zeros(1024)
    with compiling_for("v4"), pytest.raises(ValueError, match="TPU v4 cannot shift rows"):
        attention(x, x, x, score=lambda s, b, h, q, k: s + table[q - k + 512], backend="pallas")


@functools.cache
def _compositions(seed: int):
    """A random mask over a few tiles, with its cells from the definition."""
    rng = np.random.default_rng(seed)
    b, _, q, k = np.ogrid[:2, :2, :150, :280]

    def leaf():
        n = int(rng.integers(1, 200))
        choice = rng.integers(6)
        if choice == 0:
            return masks.Causal(n - 60), k <= q + n - 60
        if choice == 1:
            return masks.SlidingWindow(n), abs(q - k) < n
        if choice == 2:
            return masks.Prefix(n), k < n
        if choice == 3:
            return masks.Dilated(1 + n % 7), (q - k) % (1 + n % 7) == 0
        if choice == 4:
            lengths = rng.integers(0, 281, 2)
            return masks.Lengths(jnp.asarray(lengths)), k < lengths[b]
        ids = rng.integers(0, 3, (2, 280))
        return masks.Segments(jnp.asarray(ids[:, :150]), jnp.asarray(ids)), ids[b, q] == ids[b, k]

    def tree(depth):
        if depth == 0:
            return leaf()
        (m, x), (n, y) = tree(depth - 1), tree(depth - 1)
        return [(m & n, x & y), (m | n, x | y), (~m & n, ~x & y)][rng.integers(3)]

    return tree(1 + seed % 2)


def _check_composition(seed):
    mask, cells = _compositions(seed)
    case = Case((2, 150, 280, 2, 1, 8, 8), {"mask": mask, **SMALL}, lambda *_: np.broadcast_to(cells, (2, 2, 150, 280)))
    with simulation():
        got, lse = attention(*case.arrays(), backend="pallas", return_lse=True, **case.arguments)
    out, want, _ = case.expected()
    np.testing.assert_allclose(got, out, atol=3e-6, rtol=1e-5, err_msg=str(mask))
    np.testing.assert_allclose(jnp.moveaxis(lse, 2, 1), want, atol=3e-6, rtol=1e-5, err_msg=str(mask))


@pytest.mark.parametrize("seed", range(20))
def test_random_compositions(seed):
    _check_composition(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 200))
def test_more_random_compositions(seed):
    _check_composition(seed)


def test_divided_over_a_mesh():
    """Rows and heads on devices of their own: the same numbers, dropout and masks that ask for row and head included.

    Forward only: the simulator waits for all devices at every kernel, and devices order the two backward kernels freely.
    """
    case = Case(
        (2, 150, 150, 4, 2, 8, 8),
        {
            "mask": lambda b, h, q, k: k <= q + 20 * b + 10 * h,
            "score": scores.ALiBi.for_heads(4),
            "dropout_rate": 0.3,
            "dropout_rng": jax.random.key(1),
        },
    )
    arrays = [jnp.asarray(x) for x in case.arrays()]
    expected = attention(*arrays, backend="dense", **case.arguments)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with simulation(), jax.set_mesh(mesh), attention_axes(batch="data", heads="tensor"):
        got = jax.block_until_ready(jax.jit(lambda *x: attention(*x, backend="pallas", **case.arguments))(*arrays))
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=1e-5)


def test_a_mesh_without_a_rule_is_an_error():
    x = jnp.zeros((2, 64, 2, 8))
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    with simulation(), jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=r"attention_axes\(batch"):
            attention(x, x, x, backend="pallas")
        with attention_axes(heads=("data", "tensor")), pytest.raises(ValueError, match="2 key/value heads do not divide"):
            attention(x, x, x, backend="pallas")


def test_a_part_of_a_call_has_the_coordinates_of_the_whole():
    """The last rows against the last keys, as on a device of a ring: values, statistics and gradients, in terms of what the
    whole call says of them. (A ring itself the simulator cannot run: it waits for all devices at every kernel.)"""
    length, half = 256, 128
    slopes = jnp.asarray([0.3, 0.1])
    q, k, v, d_out = (jnp.asarray(RNG.normal(size=(1, length, n, 16)), jnp.float32) for n in (2, 1, 1, 2))
    d_out = d_out.at[:, :half].set(0)

    def request(q, k, v, slopes, mask):
        return make_request(
            q, k, v, mask=mask, bias=None, score=scores.ALiBi(slopes), weights=weights.softmax, scale=None,
            dropout_rate=0.2, dropout_rng=jax.random.key(2), q_positions=None, kv_positions=None, block_sizes=(128, 128),
            return_lse=True, return_weights=False,
        )[0]  # fmt: skip

    def whole(q, k, v, slopes):
        result = dense.run(request(q, k, v, slopes, masks.Causal(3) & masks.Function(lambda b, h, q, k: k >= half)))
        return (result.out * d_out).sum(), result

    (_, want), gradients = jax.value_and_grad(whole, (0, 1, 2, 3), has_aux=True)(q, k, v, slopes)
    with simulation():
        r = request(q, k, v, slopes, masks.Causal(3))
        part = pallas.whole(r, pallas.map_of(r))
        g = Geometry(1, 2, 1, half, half, origin=jnp.asarray([0, 0, half, half], jnp.int32))
        state = np.full((1, 1, 1, 1), 1, np.int8)
        part = part._replace(
            q=part.q[:, half:], k=k[:, half:], v=v[:, half:], geometry=g, block_map=BlockMap(state, half, half, half, half, "")
        )
        out, lse = pallas.attend_part(part)
        d = jnp.moveaxis(d_out[:, half:], 2, 1)
        found = pallas.part_gradients(part, lse, d, (d * out).sum(-1))
    np.testing.assert_allclose(jnp.moveaxis(out, 1, 2), want.out[:, half:], atol=3e-6, rtol=1e-5)
    np.testing.assert_allclose(lse, want.lse[:, :, half:], atol=3e-6, rtol=1e-5)
    dq, dk, dv, d_slopes = gradients
    for a, b in ((found.q * r.scale, dq), (found.k, dk), (found.v, dv)):
        np.testing.assert_allclose(a, b[:, half:], atol=3e-6, rtol=1e-4)
    (by_head,) = found.score
    np.testing.assert_allclose(by_head.ravel(), d_slopes, atol=3e-5, rtol=1e-4)
