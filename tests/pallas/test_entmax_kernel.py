"""Entmax on TPUs with the threshold of each row found by one kernel: in simulation, against float64 and whole rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attnzoo.core import masks, scores, weights
from attnzoo.core.attention import attention
from attnzoo.core.cells import Geometry, all_cells
from attnzoo.core.dropout import Dropout, dropout_seed, keep_scale
from attnzoo.core.entmax import Entmax
from attnzoo.core.masks.base import mask as pytree
from attnzoo.core.sharding import attention_axes
from pallas_kernels.tpu import choice
from pallas_kernels.tpu.launch import simulation
from tests.core.oracle import oracle

RNG = np.random.default_rng(0)
SMALL = {"block_sizes": (128, 128)}
BY_KEY = RNG.normal(size=280).astype(np.float32)
CHOSEN = np.array([[[[1, 0, 1], [0, 0, 0]], [[0, 1, 1], [1, 0, 0]]]], bool)
KEY = jax.random.key(3)
DROPPED = {"dropout_rate": 0.4, "dropout_rng": KEY}


def entmax64(s, ok, alpha):
    """Weights ``[B, N, T, S]`` by bisection for the largest weight, from the definition; alpha: a number or one per head."""
    b = np.broadcast_to(np.asarray(alpha, np.float64), s.shape[1])[:, None, None] - 1
    top = np.where(ok, s, -np.inf).max(-1, keepdims=True)
    d = np.where(ok, s - np.where(np.isfinite(top), top, 0), 0)

    def weights(u):
        base = np.exp(b * u) + b * d
        return np.where(ok & (base > 0), np.maximum(base, 1e-300) ** (1 / b), 0)

    low, high = np.full(top.shape, -20.0), np.zeros(top.shape)
    for _ in range(60):
        middle = (low + high) / 2
        enough = weights(middle).sum(-1, keepdims=True) >= 1
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return weights(high)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; ``cells`` and ``logits`` say the same as its mask and score."""

    alpha: Any
    arguments: Any
    cells: Any
    sizes: tuple[int, int, int, int, int, int, int] = (1, 150, 280, 2, 1, 16, 24)  # B T S N K H Hv
    logits: Any = None
    keep: Any = None

    def arrays(self):
        b, t, s, n, k, h, hv = self.sizes
        rng = np.random.default_rng(1)
        return [jnp.asarray(rng.normal(size=x), jnp.float32) for x in ((b, t, n, h), (b, s, k, h), (b, s, k, hv))]

    def expected(self):
        b, t, s, n, *_ = self.sizes
        at = np.ogrid[:b, :n, :t, :s]
        ok = np.broadcast_to(self.cells(*at), (b, n, t, s))
        s_of = None if self.logits is None else lambda x: self.logits(x, *at)
        keep = None
        if self.keep is not None:
            keep = np.asarray(keep_scale(Dropout(0.4, dropout_seed(KEY)), all_cells(Geometry(b, n, n, t, s))))
        return oracle(*self.arrays(), ok=ok, s_of=s_of, weights=lambda x: entmax64(x, ok, self.alpha), keep=keep)[0]

    @property
    def given(self):
        alpha = self.alpha if isinstance(self.alpha, float) else jnp.float32(self.alpha)
        return {"weights": Entmax(alpha), "backend": "pallas", **SMALL, **self.arguments}


CASES = {
    "1.5, causal over several tiles": Case(
        1.5, {"mask": masks.Causal(130), **DROPPED}, lambda b, h, q, k: k <= q + 130, keep=DROPPED
    ),
    "per head, window": Case(
        [1.1, 2.0], {"mask": masks.SlidingWindow(90)}, lambda b, h, q, k: abs(q - k) < 90, (1, 300, 150, 2, 2, 16, 16)
    ),
    "2, lengths, some rows blind": Case(
        2.0,
        {"mask": masks.Lengths(jnp.array([190, 0]), jnp.array([150, 20]))},
        lambda b, h, q, k: (k < np.array([190, 0])[b]) & (q < np.array([150, 20])[b]),
        (2, 150, 280, 2, 1, 16, 16),
    ),
    "1.1, blocks by head, rows of tiles that are empty": Case(
        1.1,
        {"mask": masks.Blocks(jnp.asarray(CHOSEN), 128, 128)},
        lambda b, h, q, k: CHOSEN[0, h, q // 128, k // 128],
    ),
    "below 1, scores that hide": Case(
        [0.7, 1.3],
        {
            "score": lambda s, b, h, q, k: jnp.where(
                jnp.asarray(BY_KEY)[k] > 1, -jnp.inf, s - 0.1 * h * jnp.asarray(BY_KEY)[k]
            ),
        },
        lambda b, h, q, k: BY_KEY[k] <= 1,
        logits=lambda s, b, h, q, k: s - 0.1 * h * BY_KEY[k],
    ),
    "one query, heads as rows, ragged slots": Case(
        [1.2, 1.5, 2.0, 1.1],
        {
            "q_positions": jnp.array([[140], [270]]),
            "kv_positions": jnp.where(jnp.arange(280) < jnp.array([[141], [271]]), jnp.arange(280), -1),
            "mask": masks.Causal(),
        },
        lambda b, h, q, k: k < np.array([141, 271])[b],
        (2, 1, 280, 4, 2, 16, 24),
    ),
}


def kernels(f, *arguments):
    """A program's kernels, in order: names, and the shapes of their references."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["name"].removeprefix("attnzoo_"), [v.aval.shape for v in eqn.params["jaxpr"].invars]
                continue
            for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from walk(getattr(inner, "jaxpr", inner))

    return list(walk(jax.make_jaxpr(f)(*arguments).jaxpr))


def names(f, *arguments):
    return [name for name, _ in kernels(f, *arguments)]


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name):
    case = CASES[name]
    with simulation():
        got = jax.jit(lambda *x: attention(*x, **case.given))(*case.arrays())
    np.testing.assert_allclose(got, case.expected(), atol=6e-6, rtol=2e-5)


def test_two_kernels_and_no_more_before_a_derivative_is_asked_for():
    case = CASES["1.5, causal over several tiles"]

    def run(*x):
        return attention(*x, **case.given)

    with simulation():
        assert names(run, *case.arrays()) == ["thresholds", "flash_forward"]
        both = names(lambda *x: jax.vjp(run, *x)[1](jnp.ones((1, 150, 2, 24))), *case.arrays())
    # The result, the sum of the weights and its slope, and the derivatives of result and sum.
    assert sorted(both) == ["flash_dkv"] * 2 + ["flash_dq"] * 2 + ["flash_forward"] * 3 + ["thresholds"]


def test_fewer_queries_at_a_time_or_passes_where_rows_are_long(monkeypatch):
    q, k, v = (jnp.zeros((1, 512, 1, 16)) for _ in range(3))

    def first(size):
        monkeypatch.setattr(choice, "HELD_BYTES", dict.fromkeys(choice.HELD_BYTES, size))
        sizes = {"block_sizes": (256, 128)}
        return kernels(lambda *x: attention(*x, weights=Entmax(1.5), backend="pallas", **sizes), q, k, v)[0]

    with simulation():
        for rows in (256, 128):
            name, shapes = first(512 * rows * 4)
            assert name == "thresholds"
            assert (512, rows) in shapes
        assert first(512 * 128 * 4 - 1)[0] == "flash_forward"


def test_gradients_match_whole_rows():
    """In q, k, v, one alpha per head, and an array that the score looks up by key."""
    q, k, v = Case(1.5, {}, None, (1, 120, 280, 2, 1, 16, 16)).arrays()

    def loss(q, k, v, alpha, table, backend):
        out = attention(
            q, k, v, mask=masks.Causal(100), score=lambda s, b, h, q, k: s + table[h, k], weights=Entmax(alpha),
            backend=backend, **SMALL,
        )  # fmt: skip
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()

    given = q, k, v, jnp.float32([1.3, 2.0]), jnp.stack([jnp.asarray(BY_KEY)] * 2)
    with simulation():
        got = jax.jit(jax.grad(lambda *x: loss(*x, "pallas"), range(5)))(*given)
    want = jax.grad(lambda *x: loss(*x, "dense"), range(5))(*given)
    for name, a, b in zip(["q", "k", "v", "alpha", "table"], got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 if name == "alpha" else 5e-5, rtol=1e-4, err_msg=name)


def test_tiles_chosen_while_running():
    """A traced table: lists of any length; a row of tiles that has none gives zeros."""
    table = np.array([[True, False, True], [False, False, False], [True, True, False]])
    ok = np.kron(table, np.ones((128, 128), bool))[:300, :300] & np.tril(np.ones((300, 300), bool))
    case = Case(1.5, {}, lambda *_: ok, (1, 300, 300, 2, 1, 16, 16))

    @jax.jit
    def run(q, k, v, table):
        mask = masks.Blocks(table, 128, 128) & masks.Causal()
        return attention(q, k, v, mask=mask, weights=Entmax(1.5), backend="pallas")

    with simulation():
        out = run(*case.arrays(), jnp.asarray(table))
    np.testing.assert_allclose(out, case.expected(), atol=6e-6, rtol=2e-5)
    assert (out[:, 128:256] == 0).all()


def test_bfloat16_is_near_float64_and_the_same_bits_twice():
    """Logits and the search are in float32: what is left is the rounding of inputs and of weights, 2^-8 each."""
    case = CASES["per head, window"]
    run = jax.jit(lambda *x: attention(*x, **case.given))
    with simulation():
        one, two = (run(*(x.astype(jnp.bfloat16) for x in case.arrays())) for _ in range(2))
    assert one.dtype == jnp.bfloat16
    np.testing.assert_allclose(one.astype(jnp.float32), case.expected(), atol=0.03, rtol=0.03)
    np.testing.assert_array_equal(one, two)


def test_divided_over_a_mesh():
    """Rows and heads on devices of their own, with an alpha for each head and tiles by batch row."""
    case = Case(
        [1.2, 1.5, 2.0, 1.1],
        {"mask": masks.Lengths(jnp.array([90, 150])) & masks.Causal(), "score": scores.ALiBi.for_heads(4)},
        lambda b, h, q, k: (k <= q) & (k < np.array([90, 150])[b]),
        (2, 150, 150, 4, 2, 8, 8),
        logits=lambda s, b, h, q, k: s - np.asarray(scores.ALiBi.for_heads(4).slopes)[h] * abs(q - k),
    )
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def run(*x):
        return attention(*x, **case.given)

    with simulation(), jax.set_mesh(mesh), attention_axes(batch="data", heads="tensor"):
        assert names(run, *case.arrays()) == ["thresholds", "flash_forward"]
        got = jax.block_until_ready(jax.jit(run)(*case.arrays()))
    np.testing.assert_allclose(got, case.expected(), atol=6e-6, rtol=2e-5)


def test_pages_are_read_where_they_lie():
    q, k, v = Case(1.5, {}, None, (1, 1, 384, 2, 1, 16, 16)).arrays()
    table = jnp.array([[2, 0, 1]])
    pools = [jnp.zeros_like(x).reshape(3, 128, 1, 16).at[table[0]].set(x.reshape(3, 128, 1, 16)) for x in (k, v)]
    with simulation():
        got = jax.jit(lambda *x: attention(*x, pages=table, weights=Entmax(1.5), backend="pallas"))(q, *pools)
    np.testing.assert_allclose(got, attention(q, k, v, weights=Entmax(1.5), backend="dense"), atol=6e-6, rtol=2e-5)


@pytree()
class Tilted(weights.Thresholded):
    """``w = e^u sigmoid(4 (s - r + 2))``: a threshold that has nothing to do with entmax."""

    def bracket(self, slack, g):
        return jnp.full((1, 1, 1, 1), -jnp.log(float(g.keys))), jnp.full((1, 1, 1, 1), 8.0)

    def reference(self, top, slack, g):
        return top

    def weight(self, x, u):
        return jnp.exp(u) * jax.nn.sigmoid(4 * (x + 2))

    steepness = weight


def test_any_map_with_a_threshold():
    q, k, v = Case(1.5, {}, None, (1, 150, 280, 2, 1, 16, 16)).arrays()

    def run(q, k, v):
        return attention(q, k, v, weights=Tilted(), mask=masks.Causal(100), backend="pallas", **SMALL)

    with simulation():
        assert names(run, q, k, v) == ["thresholds", "flash_forward"]
        got = jax.jit(run)(q, k, v)
    ok = np.tri(150, 280, 100, dtype=bool)

    def rows(s):
        w = np.where(ok, 1 / (1 + np.exp(-4 * (s - np.where(ok, s, -np.inf).max(-1, keepdims=True) + 2))), 0)
        return w / w.sum(-1, keepdims=True)

    np.testing.assert_allclose(got, oracle(q, k, v, ok=ok, weights=rows)[0], atol=6e-6, rtol=2e-5)
