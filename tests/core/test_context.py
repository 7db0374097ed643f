"""Context parallelism: attention whose tokens lie on several devices means what it means on one."""

import contextlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnzoo.core import masks, scores, weights
from attnzoo.core.attention import attention, explain
from attnzoo.core.backends import blockwise
from attnzoo.core.context.layout import Arc, Layout, critical_path, plan_ring, smallest_arc
from attnzoo.core.context.transport import into_slots, out_of_slots
from attnzoo.core.entmax import Entmax
from attnzoo.core.sharding import attention_axes
from attnzoo.core.weights import Weights

B, T, N, K, H, HV = 2, 64, 8, 4, 8, 6


class Hardmax(Weights):
    """All weight on the largest logit: a map of whole rows."""

    def rows(self, s, ok, g):
        return jax.nn.one_hot(jnp.where(ok, s, -jnp.inf).argmax(-1), s.shape[-1])


def mesh_of(**sides: int) -> Any:
    count = int(np.prod(list(sides.values())))
    return jax.make_mesh(
        tuple(sides.values()), tuple(sides), axis_types=(AxisType.Auto,) * len(sides), devices=jax.devices()[:count]
    )


MESH = mesh_of(data=2, context=4)


@contextlib.contextmanager
def on(mesh, **options):
    batch = [axis for axis in ("data",) if axis in mesh.shape]
    heads = [axis for axis in ("tensor",) if axis in mesh.shape]
    with jax.set_mesh(mesh), attention_axes(batch=batch, heads=heads, context="context", **options):
        yield


class Case(NamedTuple):
    """Arguments made of float arrays (to which gradients go) and of others (traced as well)."""

    make: Callable[..., dict[str, Any]]
    floats: tuple[Any, ...] = ()
    others: tuple[Any, ...] = ()
    keys: int = T


def numbers(*shape, seed=7):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def segment_ids():
    return jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 4, (B, T)), axis=-1))


CASES = {
    "causal": Case(lambda: {"mask": masks.Causal()}),
    "window, sinks, ALiBi, soft cap": Case(
        lambda slopes: {
            "mask": masks.Causal() & masks.SlidingWindow(11) | masks.Sinks(3),
            "score": scores.ALiBi(slopes) >> scores.SoftCap(3.0),
        },
        (jnp.abs(numbers(N)),),
    ),
    "packed documents, dropout": Case(
        lambda ids: {
            "mask": masks.Causal() & masks.Segments(ids), "dropout_rate": 0.3, "dropout_rng": jax.random.key(5),
        },
        others=(segment_ids(),),
    ),
    "lengths, relative bias, sink logits": Case(
        lambda table, sink: {
            "mask": masks.Lengths(np.array([50, 23]), np.array([61, 40])),
            "score": scores.RelativeBias(table, max_distance=20),
            "weights": weights.SinkSoftmax(sink),
        },
        (numbers(N, 12), numbers(N, seed=8)),
    ),
    "functions, positions": Case(
        lambda table, q_at, k_at: {
            "mask": lambda b, h, q, k: (k <= q + 2 * h) & ((q + k + b) % 5 > 0),
            "score": lambda s, b, h, q, k: s + table[h, (q - k) % 7] * table[b, 3],
            "q_positions": q_at,
            "kv_positions": k_at,
        },
        (numbers(N, 7),),
        (jnp.arange(T) + 3, jnp.where(jnp.arange(T) % 6 == 1, -1, jnp.arange(T))),
    ),
    "bias per cell, blocks, prefix": Case(
        lambda bias, table: {"mask": masks.Blocks(table, 12, 8) & masks.Causal() | masks.Prefix(9), "bias": bias},
        (numbers(B, 1, T, T),),
        (jnp.asarray(np.random.default_rng(1).random((1, N, 6, 8)) < 0.6),),
    ),
    "sigmoid, biases by row and column": Case(
        lambda row, column: {
            "mask": masks.Dilated(3) & masks.Causal(5),
            "weights": weights.Sigmoid(),
            "score": scores.Bias(row) >> scores.Bias(column),
        },
        (numbers(1, N, T, 1), numbers(B, 1, 1, T)),
    ),
    "other length of keys": Case(lambda: {"weights": weights.Relaxed(0.2)}, keys=32),
}  # fmt: skip
WAYS = {"ring": {}, "zigzag": {"zigzag": True}, "natural": {"zigzag": False}, "all_to_all": {"exchange": "all_to_all"}}


def inputs(keys=T, dtype=jnp.float32):
    shapes = (B, T, N, H), (B, keys, K, H), (B, keys, K, HV), (B, T, N, HV)
    return [numbers(*shape, seed=seed).astype(dtype) for seed, shape in enumerate(shapes)]


def results(case: Case, dtype=jnp.float32, **extra):
    """out, and the gradients of q, k, v and the float arrays, under whatever mesh there is."""

    def loss(q, k, v, floats, others, target):
        out = attention(q, k, v, block_sizes=(4, 4), **case.make(*floats, *others), **extra)
        return (out.astype(jnp.float32) * target).sum(), out

    q, k, v, target = inputs(case.keys, dtype)
    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    (_, out), gradients = jax.block_until_ready(both(q, k, v, case.floats, case.others, target.astype(jnp.float32)))
    return jax.tree.map(np.asarray, (out, gradients))


@pytest.fixture(scope="module")
def expected():
    """Results on one device, computed once per case."""
    found: dict[str, Any] = {}

    def of(name):
        if name not in found:
            found[name] = results(CASES[name], backend="dense")
        return found[name]

    return of


def assert_equal(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


# In a hurry, the cases that share least.
QUICK = ("packed documents, dropout", "functions, positions", "bias per cell, blocks, prefix")


@pytest.mark.parametrize("way", ["zigzag", "natural", "all_to_all"])
@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_means_what_it_means_on_one_device(name, way, expected):
    want = expected(name)
    with on(MESH, **WAYS[way]):
        assert_equal(results(CASES[name], backend="blockwise"), want)


@pytest.mark.parametrize("way", ["ring", "all_to_all"])
def test_rows_heads_and_tokens_divided_at_once(way, expected):
    want = expected("packed documents, dropout")
    with on(mesh_of(data=2, tensor=2, context=2), **WAYS[way]):
        assert_equal(results(CASES["packed documents, dropout"]), want)


def test_eight_devices_and_a_single_key_head(expected):
    del expected
    q, k, v, _ = inputs()
    k, v = k[:, :, :1], v[:, :, :1]
    want = attention(q, k, v, mask=masks.Causal(), return_lse=True, backend="dense")
    with on(mesh_of(context=8)):
        got = jax.jit(lambda q, k, v: attention(q, k, v, mask=masks.Causal(), return_lse=True))(q, k, v)
    assert_equal(got, want)


def test_half_precision():
    """bfloat16 in and out: the sum over shards is kept in float32, so a ring is no less exact than one device is."""
    case = CASES["causal"]
    want, got = results(case, jnp.bfloat16, backend="dense"), None
    with on(MESH):
        got = results(case, jnp.bfloat16)
    exact = results(case, jnp.float32, backend="dense")
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (got, want, exact)), strict=True):
        a, b = a.astype(np.float32), b.astype(np.float32)
        np.testing.assert_allclose(a, b, atol=0.02, rtol=0.02)
        assert np.abs(a - c).max() <= 1.5 * np.abs(b - c).max()


def test_entmax_goes_around_the_ring_for_every_trial():
    case = Case(lambda alpha: {"mask": masks.Causal(), "weights": Entmax(alpha)}, (jnp.linspace(1.1, 2, N),))
    want = results(case, backend="dense")
    with on(MESH):
        got = results(case)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_whole_rows_by_trading_heads():
    """Maps that need all logits of a row, and the weights themselves, come by exchange='all_to_all'."""
    q, k, v, _ = inputs()
    arguments = {"mask": masks.Causal(), "weights": Entmax(1.5), "return_weights": True}
    want = attention(q, k, v, **arguments)
    with on(MESH, exchange="all_to_all"):
        got = jax.jit(lambda *x: attention(*x, **arguments))(q, k, v)
    assert_equal(got, want)


def collectives(text: str) -> set[str]:
    kinds = ("collective-permute", "all-gather", "all-to-all", "all-reduce", "reduce-scatter")
    return {kind for kind in kinds if re.search(rf"= .* {kind}(-start)?\(", text)}


def compiled(mesh, t, mask, n=4, k=2, h=16, block_sizes=None, **options):
    with on(mesh, **options):
        where = NamedSharding(mesh, P(None, "context"))
        shapes = [jax.ShapeDtypeStruct((1, t, heads, h), jnp.float32, sharding=where) for heads in (n, k, k)]

        def loss(q, k, v):
            return (attention(q, k, v, mask=mask, backend="blockwise", block_sizes=block_sizes) ** 2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)), out_shardings=(where,) * 3).lower(*shapes).compile()


def test_what_moves():
    """A ring moves keys and values from neighbour to neighbour, and nothing is ever gathered."""
    mesh = mesh_of(context=8)
    assert collectives(compiled(mesh, 256, masks.Causal()).as_text()) == {"collective-permute"}
    traded = collectives(compiled(mesh, 256, masks.Causal(), n=16, k=8, exchange="all_to_all").as_text())
    assert traded == {"all-to-all"}


def test_memory_falls_with_the_devices():
    """Forward and backward at 32k tokens: arguments, results and temporaries per device, against one device.

    An eighth of the tokens, and on top of it the shards of keys, values and their gradients that are on their way.
    """

    def bytes_of(mesh):
        m = compiled(mesh, 2**15, masks.Causal(), n=2, k=2, h=128, block_sizes=(256, 256)).memory_analysis()
        return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes

    assert bytes_of(mesh_of(context=8)) <= bytes_of(mesh_of(context=1)) / 5


@pytest.mark.parametrize("zigzag", [False, True])
def test_hidden_shards_cost_no_compute(zigzag, monkeypatch):
    computed = []
    original = blockwise.attend_part

    def counted(part):
        jax.debug.callback(lambda _: computed.append(1), part.geometry.origin)
        return original(part)

    monkeypatch.setattr(blockwise, "attend_part", counted)
    q, k, v, _ = inputs()
    with on(mesh_of(context=4), zigzag=zigzag):
        jax.block_until_ready(jax.jit(lambda *x: attention(*x, mask=masks.Causal(), backend="blockwise"))(q, k, v))
    jax.effects_barrier()
    chunks = 8 if zigzag else 4
    assert len(computed) == chunks * (chunks + 1) // 2


def plan(mask, devices=8, zigzag=None, t=1024):
    from attnzoo.core.cells import Geometry

    return plan_ring(mask, Geometry(1, 1, 1, t, t), devices, zigzag, (32, 32))


def test_zigzag_levels_causal_work():
    ring = plan(masks.Causal())
    assert ring.layout.zigzag
    per_device = ring.work.sum(0)
    assert per_device.max() == per_device.min()
    natural = plan(masks.Causal(), zigzag=False)
    assert natural.work.sum() == ring.work.sum() == 32 * 33 // 2
    assert critical_path(ring.work) < 0.6 * critical_path(natural.work)


@pytest.mark.parametrize("mask", [None, masks.SlidingWindow(100), masks.Causal() & masks.SlidingWindow(100)], ids=str)
def test_zigzag_only_where_it_gains(mask):
    assert not plan(mask).layout.zigzag


def test_a_ring_goes_only_as_far_as_the_mask_sees():
    assert plan(masks.Causal()).arc == Arc(0, 8)
    assert plan(masks.Causal() & masks.SlidingWindow(100)).arc == Arc(0, 2)
    assert plan(masks.SlidingWindow(100)).arc == Arc(7, 3)
    assert plan(masks.Causal() & masks.Prefix(100), zigzag=False).arc == Arc(0, 8)


def test_traced_documents_leave_what_is_known_of_a_mask():
    def traced(ids):
        window = masks.Causal() & masks.SlidingWindow(100) & masks.Segments(ids)
        assert plan(window).arc == Arc(0, 2)
        assert plan(masks.Causal() & masks.Segments(ids)).layout.zigzag
        assert plan(masks.Segments(ids)).arc == Arc(0, 8)
        return ids

    jax.eval_shape(traced, jax.ShapeDtypeStruct((1024,), "int32"))


@pytest.mark.parametrize(
    ("needed", "arc"),
    [("10000000", (0, 1)), ("11000001", (7, 3)), ("00110000", (2, 2)), ("00000000", (0, 1)), ("1111", (0, 4))],
)
def test_smallest_arc(needed, arc):
    assert smallest_arc(np.array([c == "1" for c in needed])) == arc


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_into_zigzag_order_and_back(devices):
    layout, mesh = Layout(devices, True), mesh_of(context=devices)
    x = jnp.arange(4 * devices * 3).reshape(1, 4 * devices, 3)

    def local(x):
        slots = into_slots(x, layout, ("context",), axis=1)
        return slots[None], out_of_slots(slots, layout, ("context",), axis=1)

    given = P(None, "context")
    slots, back = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=(P("context"), given))(x)
    np.testing.assert_array_equal(back, x)
    chunks = x.reshape(1, 2 * devices, 2, 3)
    for device in range(devices):
        for slot in (0, 1):
            np.testing.assert_array_equal(slots[device, slot], chunks[:, layout.chunk(device, slot)])


def test_explain_says_what_happens_across_the_mesh():
    x = jax.ShapeDtypeStruct((2, 4096, 8, 64), jnp.float32)
    with on(MESH):
        text = str(explain(x, x, x, mask=masks.Causal()))
        assert "ring over context=4 in zig-zag order" in text
        assert "4 of 4 shards" in text
        assert "dense cannot: it computes whole rows" in text
        assert "2 of 4 shards" in str(explain(x, x, x, mask=masks.Causal() & masks.SlidingWindow(512)))
    with on(MESH, exchange="all_to_all"):
        assert "all-to-all over context=4" in str(explain(x, x, x, mask=masks.Causal()))
    assert "across the mesh" not in str(explain(x, x, x))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"weights": Hardmax()}, "needs whole rows of logits at once.*exchange='all_to_all' brings whole rows"),
        ({}, {"return_weights": True}, "return_weights asks for"),
        ({}, {"backend": "dense"}, "'dense' cannot run this: it computes whole rows.*'blockwise' can"),
        ({"t": 62}, {}, "62 queries do not divide over .'context',. of the mesh, 4 devices; pad"),
        ({"s": 30}, {}, "30 keys do not divide"),
        ({"t": 60, "zigzag": True}, {}, "zigzag=True cuts a sequence into 2 × 4 parts, but the call has 60 queries"),
        ({"k": 2, "exchange": "all_to_all"}, {}, "own heads, but the call has 2 key/value heads for 8.*'ring' takes any"),
        ({"b": 3}, {}, "3 batch rows do not divide"),
        ({"exchange": "rong"}, {}, "unknown exchange 'rong': did you mean 'ring'"),
        ({"context": "tokens"}, {}, "context names .'tokens'., but the mesh has"),
    ],
)
def test_what_cannot_work_says_so(change, options, words):
    sizes = {"b": 2, "t": 64, "s": 64, "k": 4, **{n: x for n, x in change.items() if n in "btsk"}}
    axes = {"context": "context", **{n: x for n, x in change.items() if n not in "btsk"}}
    q = jnp.zeros((sizes["b"], sizes["t"], 8, 8))
    k = jnp.zeros((sizes["b"], sizes["s"], sizes["k"], 8))
    with jax.set_mesh(MESH), pytest.raises(ValueError, match=words), attention_axes(batch="data", **axes):
        attention(q, k, k, **options)


def test_a_context_of_one_device_changes_nothing():
    q, k, v, _ = inputs()
    with on(mesh_of(data=2, context=1)):
        assert "across the mesh" not in str(explain(q, k, v))
