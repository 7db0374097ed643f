"""The one operation: its meaning on every backend, its transformations, its errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.attention import attention, explain
from attnzoo.core.backends import BACKENDS
from attnzoo.core.masks import Causal, Lengths, Prefix, SlidingWindow
from attnzoo.core.scores import ALiBi, Bias, RelativeBias, SoftCap, Temperature
from attnzoo.core.weights import Elementwise, Relaxed, Sigmoid, SinkSoftmax, Uniform
from tests.core.oracle import coordinates, oracle

B, T, S, N, K, H, HV = 2, 21, 26, 4, 2, 8, 6
BACKEND = pytest.mark.parametrize("backend", ["dense", "blockwise"])


@pytest.fixture(scope="module")
def qkv():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, HV)))


def run(q, k, v, backend, **kw):
    if backend == "blockwise":
        kw = {"block_sizes": (8, 8), **kw}
    return jax.jit(lambda q, k, v: attention(q, k, v, backend=backend, **kw))(q, k, v)


def rand(*shape, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


b_, h_, t_, s_ = coordinates(B, N, T, S)
TABLE = rand(N, 16)
SLOPES = np.asarray([0.5, 0.25, 0.125, 0.0625])

SCORES = {
    "bias": (lambda: Bias(rand(B, 1, T, S)), lambda s: s + np.asarray(rand(B, 1, T, S), np.float64)),
    "alibi": (lambda: ALiBi(jnp.asarray(SLOPES)), lambda s: s - SLOPES[:, None, None] * np.abs(t_ - s_)),
    "softcap": (lambda: SoftCap(1.5), lambda s: 1.5 * np.tanh(s / 1.5)),
    "temperature": (lambda: Temperature(jnp.arange(1.0, 5.0)), lambda s: s / np.arange(1.0, 5.0)[:, None, None]),
    "function": (
        lambda: lambda s, b, h, q, k: s * (1 + b) + TABLE[h, (q + k) % 16],
        lambda s: s * (1 + b_) + np.asarray(TABLE, np.float64)[h_, (t_ + s_) % 16],
    ),
    "chain": (
        lambda: Bias(rand(1, N, 1, S)) >> SoftCap(2.0) >> Temperature(0.5),
        lambda s: 2 * np.tanh((s + np.asarray(rand(1, N, 1, S), np.float64)) / 2) / 0.5,
    ),
}


@BACKEND
@pytest.mark.parametrize("name", SCORES)
def test_scores_agree_with_the_oracle(qkv, backend, name):
    make, s_of = SCORES[name]
    ok = s_ <= t_ + 3
    out, _, _ = oracle(*qkv, ok, s_of)
    np.testing.assert_allclose(run(*qkv, backend, mask=Causal(3), score=make()), out, atol=3e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("positions", [False, True])
def test_relative_bias_is_that_of_t5(qkv, bidirectional, positions):
    """Buckets by an independent loop over distances; by positions it gathers, without it shifts one row of biases."""

    def bucket(distance, count=16, far=128):
        base = 0
        if bidirectional:
            count //= 2
            base = count if distance > 0 else 0
            distance = abs(distance)
        else:
            distance = max(-distance, 0)
        exact = count // 2
        if distance < exact:
            return base + distance
        grown = exact + int(np.log(distance / exact) / np.log(far / exact) * (count - exact) + 1e-6)
        return base + min(grown, count - 1)

    bias = np.array([[bucket(s - t) for s in range(S)] for t in range(T)])
    out, _, _ = oracle(*qkv, None, lambda s: s + np.asarray(TABLE, np.float64)[:, bias])
    where = {"q_positions": np.arange(T), "kv_positions": np.arange(S)} if positions else {}
    for backend in ("dense", "blockwise"):
        got = run(*qkv, backend, score=RelativeBias(TABLE, bidirectional=bidirectional), **where)
        np.testing.assert_allclose(got, out, atol=3e-6)


@pytest.mark.parametrize("name", ["bias", "alibi", "temperature", "function", "relative"])
def test_gradients_reach_what_scores_capture(qkv, name):
    """Each score's arrays: blockwise against dense, which is plain JAX."""
    make = {
        "bias": (rand(1, N, T, S), lambda x: Bias(x)),
        "alibi": (jnp.asarray(SLOPES, jnp.float32), ALiBi),
        "temperature": (jnp.arange(1.0, 5.0), Temperature),
        "function": (TABLE, lambda x: lambda s, b, h, q, k: s + jnp.sin(x[h, (q + 2 * k) % 16]) * s),
        "relative": (TABLE, RelativeBias),
    }
    x, score = make[name]

    def loss(x, backend):
        blocks = (8, 8) if backend == "blockwise" else None
        out = attention(*qkv, mask=Causal(4), score=score(x), backend=backend, block_sizes=blocks)
        return (out**2).sum()

    dense, blockwise = (jax.jit(jax.grad(functools.partial(loss, backend=b)))(x) for b in ("dense", "blockwise"))
    assert np.abs(dense).max() > 1e-3
    np.testing.assert_allclose(blockwise, dense, atol=2e-5, rtol=1e-4)


SINKS = np.array([0.3, -1.0, 2.0, 0.0])
WEIGHTS = {
    "sigmoid": (Sigmoid(), lambda s: 1 / (1 + np.exp(-(s - np.log(S))))),
    "sigmoid bias": (Sigmoid(jnp.asarray(SINKS)), lambda s: 1 / (1 + np.exp(-(s + SINKS[:, None, None])))),
    "relu": (Elementwise(jax.nn.relu), lambda s: np.maximum(s, 0)),
}


@BACKEND
@pytest.mark.parametrize("name", WEIGHTS)
def test_pointwise_weights(qkv, backend, name):
    weights, phi = WEIGHTS[name]
    out, _, _ = oracle(*qkv, s_ <= t_, weights=phi)
    np.testing.assert_allclose(run(*qkv, backend, mask=Causal(), weights=weights), out, atol=1e-5)


@BACKEND
def test_sinks_take_weight_and_give_nothing(qkv, backend):
    ok = s_ <= t_ - 2  # the first two rows see nothing but the sink
    out, lse, _ = oracle(*qkv, ok)
    share = np.exp(lse) / (np.exp(lse) + np.exp(SINKS[:, None]))
    got, got_lse = run(*qkv, backend, mask=Causal(-2), weights=SinkSoftmax(jnp.asarray(SINKS)), return_lse=True)
    np.testing.assert_allclose(got, out * np.moveaxis(share, 1, 2)[..., None], atol=3e-6)
    np.testing.assert_allclose(got_lse, np.moveaxis(np.logaddexp(lse, SINKS[:, None]), 1, 2), atol=3e-6)


def test_sink_gradient_agrees_with_dense(qkv):
    def loss(sinks, backend):
        return (run(*qkv, backend, mask=Causal(-2), weights=SinkSoftmax(sinks)) ** 2).sum()

    a, b = (jax.grad(loss)(jnp.asarray(SINKS, jnp.float32), x) for x in ("dense", "blockwise"))
    assert np.isfinite(a).all() and np.abs(a).max() > 1e-3
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-6)


@BACKEND
def test_relaxed_blends_with_the_uniform_row(qkv, backend):
    ok = s_ <= t_
    hard, _, w = oracle(*qkv, ok)
    level, _, _ = oracle(*qkv, ok, lambda s: 0 * s)
    got = run(*qkv, backend, mask=Causal(), weights=Relaxed(0.3))
    np.testing.assert_allclose(got, 0.7 * hard + 0.3 * level, atol=3e-6)
    if backend == "dense":
        weights = run(*qkv, backend, mask=Causal(), weights=Relaxed(0.3), return_weights=True)[1]
        flat = np.broadcast_to(ok, w.shape) / np.broadcast_to(ok, w.shape).sum(-1, keepdims=True)
        np.testing.assert_allclose(weights, 0.7 * w + 0.3 * flat, atol=3e-6)


@BACKEND
def test_uniform_weights_need_no_product_but_see_what_a_bias_hides(qkv, backend):
    ok = np.broadcast_to((s_ + t_) % 3 > 0, (B, N, T, S)).copy()
    ok[0, 1, 5] = False
    level, _, _ = oracle(*qkv, ok, lambda s: 0 * s)
    np.testing.assert_allclose(run(*qkv, backend, mask=jnp.asarray(ok), weights=Uniform()), level, atol=3e-6)
    hidden = jnp.where(ok, 0.0, -jnp.inf)
    np.testing.assert_allclose(run(*qkv, backend, bias=hidden, weights=Uniform()), level, atol=3e-6)
    dq = jax.grad(lambda q: (run(q, *qkv[1:], backend, mask=jnp.asarray(ok), weights=Uniform()) ** 2).sum())(qkv[0])
    assert dq.shape == qkv[0].shape and not np.asarray(dq).any()


PREFIXES = {
    "causal": Causal(3),
    "nothing at first": Causal(-2),
    "per row": Causal(5) & Lengths(jnp.array([9, 26])),
    "all alike": Prefix(7),
    "positions": Causal(),
    "window": Causal() & SlidingWindow(4),  # whose rows do not begin at the first key
}


@BACKEND
@pytest.mark.parametrize("name", PREFIXES)
def test_uniform_weights_of_prefixes_are_running_means(qkv, backend, name):
    mask, positions = PREFIXES[name], np.arange(T)[::-1] if name == "positions" else None
    ok = np.broadcast_to(mask.dense(T, S, batch=B), (B, 1, T, S))
    ok = ok[:, :, ::-1] if name == "positions" else ok
    level, level_lse, _ = oracle(*qkv, ok, lambda s: 0 * s)

    def uniform(q, k, v, mask=mask, **options):
        return attention(q, k, v, mask=mask, weights=Uniform(), backend=backend, block_sizes=(8, 8), **options)

    f = functools.partial(uniform, q_positions=positions, return_lse=True)
    out, lse = jax.jit(f)(*qkv)
    np.testing.assert_allclose(out, level, atol=3e-6)
    np.testing.assert_allclose(lse, np.moveaxis(level_lse, 1, 2), atol=3e-6)
    program = str(jax.make_jaxpr(f)(*qkv))
    assert (" dot_general" in program) == (name == "window")  # no product with weights but there
    upstream = rand(B, T, N, HV)
    got, expected = (
        jax.jit(jax.grad(lambda v, g=g: (upstream * g(*qkv[:2], v)).sum()))(qkv[2])
        for g in (functools.partial(uniform, q_positions=positions), functools.partial(uniform, mask=jnp.asarray(ok)))
    )
    np.testing.assert_allclose(got, expected, atol=3e-6)


@BACKEND
def test_additive_minus_infinity_hides(qkv, backend):
    ok = np.broadcast_to((s_ + t_) % 3 > 0, (B, N, T, S)).copy()
    ok[0, 1, 5] = False
    out, lse, _ = oracle(*qkv, ok)
    for hidden in (-np.inf, np.finfo(np.float32).min):
        got, got_lse = run(*qkv, backend, bias=jnp.where(ok, 0.0, hidden), return_lse=True)
        np.testing.assert_allclose(got, out, atol=3e-6)
        np.testing.assert_allclose(got_lse, np.moveaxis(lse, 1, 2), atol=3e-6)
    assert not np.asarray(got)[0, 5, 1].any()


@BACKEND
def test_bool_mask_and_bias_broadcast_as_in_jax_nn(qkv, backend):
    q, k, v = qkv[0], qkv[1], qkv[1] + 1
    mask, bias = rand(B, 1, 1, S, seed=5) > -1, rand(N, T, S)
    want = jax.nn.dot_product_attention(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), bias=bias[None], mask=mask)
    np.testing.assert_allclose(run(q, k, v, backend, mask=mask, bias=bias), want, atol=3e-6)


@BACKEND
def test_leading_batch_axes_are_flattened_row_major(qkv, backend):
    q, k, v = (jnp.stack([x, x[::-1] + 1, 2 * x]) for x in qkv)  # [3, B, ...]
    ok = rand(3, 1, N, T, S, seed=7) > 0
    got = run(q, k, v, backend, mask=ok)
    for i in range(3):
        np.testing.assert_allclose(got[i], run(q[i], k[i], v[i], backend, mask=ok[i]), atol=1e-6)
    alone = run(q[0, 0], k[0, 0], v[0, 0], backend, mask=ok[0, 0])
    np.testing.assert_allclose(alone, got[0, 0], atol=1e-6)


@BACKEND
def test_positions_move_masks_and_minus_one_is_an_empty_slot(qkv, backend):
    q_pos = np.random.default_rng(0).integers(0, 30, (B, T)).astype(np.int32)
    kv_pos = np.random.default_rng(1).integers(-1, 30, (B, K, S)).astype(np.int32)
    at = np.repeat(kv_pos, N // K, 1)[:, :, None, :]
    ok = (at >= 0) & (at <= q_pos[:, None, :, None]) & (np.abs(at - q_pos[:, None, :, None]) < 9)
    out, _, _ = oracle(*qkv, ok)
    got = run(*qkv, backend, mask=Causal() & SlidingWindow(9), q_positions=q_pos, kv_positions=kv_pos)
    np.testing.assert_allclose(got, out, atol=3e-6)
    traced = jax.jit(
        lambda a, b: attention(
            *qkv, mask=Causal() & SlidingWindow(9), q_positions=a, kv_positions=b, backend=backend, block_sizes=(8, 8)
        )
    )(q_pos, kv_pos)
    np.testing.assert_allclose(traced, out, atol=3e-6)
    empty = run(*qkv, backend, kv_positions=np.where(np.arange(S) < 5, np.arange(S), -1))
    np.testing.assert_allclose(empty, oracle(*qkv, s_ < 5)[0], atol=3e-6)


@BACKEND
def test_vmap_and_remat(qkv, backend):
    kw = {"mask": Lengths(jnp.array([9, 20])), "backend": backend, "block_sizes": (8, 8)}
    many = tuple(jnp.stack([x, x + 1]) for x in qkv)
    f = lambda q, k, v: attention(q, k, v, **kw)  # noqa: E731
    mapped = jax.jit(jax.vmap(f))(*many)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], f(*(x[i] for x in many)), atol=1e-6)
    grad = jax.jit(jax.grad(lambda q: f(q, *qkv[1:]).sum()))(qkv[0])
    again = jax.jit(jax.grad(lambda q: jax.checkpoint(f)(q, *qkv[1:]).sum()))(qkv[0])
    np.testing.assert_allclose(again, grad, atol=1e-6)


def test_sharded_over_batch_and_heads(qkv):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, "tensor", None))
    parts = [jax.device_put(x, spec) for x in qkv]
    for backend in ("dense", "blockwise"):
        np.testing.assert_allclose(run(*parts, backend, mask=Causal()), run(*qkv, backend, mask=Causal()), atol=1e-6)


def test_only_the_tiles_that_are_not_empty_are_computed(qkv):
    seen = []
    q = k = v = jnp.ones((1, 64, 1, 4))
    mask = Causal() & SlidingWindow(9) | Prefix(3)

    def counted(s, b, h, t, u):
        jax.debug.callback(lambda *x: seen.append(x), t, u)
        return s

    out = jax.jit(lambda: attention(q, k, v, mask=mask, score=counted, backend="blockwise", block_sizes=(8, 8)))()
    jax.block_until_ready(out)
    jax.effects_barrier()
    tiles = mask.block_map(64, block_q=8, block_k=8).counts()
    assert tiles["empty"] > 20
    assert len(seen) == 64 * (tiles["partial"] + tiles["full"])  # the callback runs once per cell
    assert {(int(t) // 8, int(u) // 8) for t, u in seen} == set(
        zip(*(x.tolist() for x in np.nonzero(mask.block_map(64, block_q=8, block_k=8).state[0, 0])), strict=True)
    )


def test_dropout_is_the_same_on_every_backend_and_keeps_its_share(qkv):
    key = jax.random.key(7)
    outs = [run(*qkv, b, mask=Causal(), dropout_rate=0.25, dropout_rng=key) for b in ("dense", "blockwise")]
    np.testing.assert_allclose(outs[0], outs[1], atol=3e-6)
    other = run(*qkv, "dense", mask=Causal(), dropout_rate=0.25, dropout_rng=jax.random.key(8))
    assert np.abs(other - outs[0]).max() > 0.1
    from attnzoo.core.cells import Geometry, all_cells
    from attnzoo.core.dropout import Dropout, dropout_seed, keep_scale

    keep = np.asarray(keep_scale(Dropout(0.25, dropout_seed(key)), all_cells(Geometry(4, 4, 4, 128, 128))))
    assert set(np.unique(keep)) == {0.0, np.float32(1 / 0.75)}
    share = (keep > 0).mean()
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / keep.size)
    for axis in range(4):  # no axis along which neighbours share their fate
        near = ((keep > 0) == np.roll(keep > 0, 1, axis)).mean()
        assert abs(near - (0.75**2 + 0.25**2)) < 0.005
    grads = [
        jax.jit(jax.grad(lambda q, b=b: (run(q, *qkv[1:], b, dropout_rate=0.25, dropout_rng=key) ** 2).sum()))(qkv[0])
        for b in ("dense", "blockwise")
    ]
    np.testing.assert_allclose(grads[0], grads[1], atol=1e-5)


@pytest.mark.parametrize(
    ("mask", "score"),
    [
        (Causal(), ALiBi(SLOPES)),
        (Lengths(jnp.asarray([26, 9])), Bias(np.ones((N, T, S)))),
        (lambda b, h, q, k: (q + k + h) % 3 != 0, None),
    ],
)
def test_x64_changes_nothing(qkv, mask, score):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x) for x in qkv)
        found = [
            jax.value_and_grad(
                lambda *a, b=b: run(*a, b, mask=mask, score=score, dropout_rate=0.2, dropout_rng=jax.random.key(7)).sum(),
                (0, 1, 2),
            )(q, k, v)
            for b in ("dense", "blockwise")
        ]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *found)


def test_second_derivatives_are_dense_only(qkv):
    def twice(backend):
        f = lambda q: (attention(q, *qkv[1:], backend=backend) ** 2).sum()  # noqa: E731
        return jax.grad(lambda q: (jax.grad(f)(q) ** 2).sum())(qkv[0])

    assert np.isfinite(twice("dense")).all()
    with pytest.raises(NotImplementedError, match="backend='dense'"):
        twice("blockwise")


def test_nan_inputs_are_not_hidden(qkv):
    q = qkv[0].at[0, 3, 0, 0].set(jnp.nan)
    for backend in ("dense", "blockwise"):
        got = np.isnan(run(q, *qkv[1:], backend))
        assert got[0, 3, 0].all() and got.sum() == HV


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@BACKEND
def test_low_precision_keeps_float32_statistics(qkv, backend, dtype):
    low = tuple(x.astype(dtype) for x in qkv)
    out, lse, _ = oracle(*low, s_ <= t_)
    got, got_lse = run(*low, backend, mask=Causal(), return_lse=True)
    assert got.dtype == dtype and got_lse.dtype == jnp.float32
    np.testing.assert_allclose(got_lse, np.moveaxis(lse, 1, 2), atol=3e-6)  # float32 logits of the rounded inputs
    np.testing.assert_allclose(np.asarray(got, np.float64), out, atol=1e-2 if dtype == jnp.bfloat16 else 2e-3)


def test_memory_of_both_passes_is_linear_in_length():
    """Temporaries the compiler reserves, forward with backward: doubling T doubles them."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        f = lambda q, k, v: attention(q, k, v, mask=Causal(), backend="blockwise", block_sizes=(128, 128)).sum()  # noqa: E731
        return jax.jit(jax.grad(f, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporaries(t) for t in (2048, 4096, 8192)]
    assert sizes[1] / sizes[0] < 2.1
    assert sizes[2] / sizes[1] < 2.1
    assert sizes[2] < 8192 * 8192  # far from one byte per logit


class TestErrors:
    q, k, v = jnp.zeros((2, 5, 4, 8)), jnp.zeros((2, 7, 2, 8)), jnp.zeros((2, 7, 2, 6))

    def refused(self, match, error=ValueError, **kw):
        arrays = {name: kw.pop(name, getattr(self, name)) for name in ("q", "k", "v")}
        with pytest.raises(error, match=match):
            attention(**arrays, **kw)

    def test_shapes(self):
        self.refused(r"q has shape \(5, 8\)", q=jnp.zeros((5, 8)))
        self.refused(r"same leading.*\(3, 7, 2, 8\)", k=jnp.zeros((3, 7, 2, 8)))
        self.refused(r"k and v must agree.*\(2, 7, 2, 8\).*\(2, 6, 2, 6\)", v=jnp.zeros((2, 6, 2, 6)))
        self.refused(r"same width.*\(2, 5, 4, 9\).*\(2, 7, 2, 8\)", q=jnp.zeros((2, 5, 4, 9)))
        self.refused(r"multiple of the number of key/value heads, got 3 .*and 2", q=jnp.zeros((2, 5, 3, 8)))
        self.refused("length is 0", k=jnp.zeros((2, 0, 2, 8)), v=jnp.zeros((2, 0, 2, 6)))
        self.refused("floating-point", TypeError, q=jnp.zeros((2, 5, 4, 8), int))

    def test_masks_and_scores(self):
        self.refused(r"mask has shape \(5, 6\).*\(2, 4, 5, 7\)", mask=jnp.ones((5, 6), bool))
        self.refused(r"bias has shape \(3, 1, 1\).*\(2, 4, 5, 7\)", bias=jnp.ones((3, 1, 1)))
        self.refused("goes to bias=", TypeError, mask=jnp.ones((5, 7)))
        self.refused("goes to bias=", TypeError, score=jnp.ones((5, 7)))
        self.refused(r"Lengths: kv has shape \(3,\).*\[B\] = \(2,\)", mask=Lengths(jnp.ones(3, int)))
        self.refused("mask function could not be traced", TypeError, mask=lambda b, h, q, k: q > 0 if q else k)
        self.refused(r"must return one scalar.*\(3,\)", TypeError, score=lambda s, b, h, q, k: jnp.ones(3))
        self.refused(r"ALiBi: slopes has shape \(3,\).*N=4", score=ALiBi(jnp.ones(3)))
        self.refused("weights must be a weight map", TypeError, weights="softmax")

    def test_the_rest(self):
        self.refused("unknown backend 'blokwise': did you mean 'blockwise'", backend="blokwise")
        self.refused("'blockwise' cannot run this: .*return_weights.*'dense' can", backend="blockwise", return_weights=True)
        self.refused("'cudnn' cannot run this.*GPU", backend="cudnn")
        self.refused("log-sum-exp", weights=Sigmoid(), return_lse=True)
        self.refused("log-sum-exp", weights=Relaxed(), return_lse=True)
        self.refused(r"dropout_rate must be in \[0, 1\)", dropout_rate=1.0)
        self.refused("needs dropout_rng", dropout_rate=0.5)
        self.refused(r"q_positions has shape \(4,\).*\(5,\)", q_positions=np.arange(4))
        self.refused("positions are integers", TypeError, kv_positions=np.ones(7))
        self.refused("block_sizes must be a pair", block_sizes=64)
        with pytest.raises(ValueError, match="unknown argument 'msk': did you mean 'mask'"):
            explain(self.q, self.k, self.v, msk=None)


class TestExplain:
    def test_says_what_auto_takes_and_why(self):
        x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.float32)
        big = explain(x, x, x, mask=Causal() & SlidingWindow(512))
        assert big.backend == "blockwise" and set(big.refused) == {"cudnn", "pallas"}
        assert big.block_map is not None and big.block_map.counts() == {"empty": 49, "partial": 15, "full": 0}
        assert "Causal() & SlidingWindow(512)" in str(big) and "49 empty" in str(big)
        small = jax.ShapeDtypeStruct((1, 64, 8, 64), jnp.float32)
        assert explain(small, small, small).backend == "dense"
        assert explain(x, x, x, return_weights=True).backend == "dense"

    def test_names_are_the_backends(self):
        assert set(BACKENDS) == {"dense", "blockwise", "cudnn", "pallas"}
