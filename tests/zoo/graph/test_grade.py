"""GraDe (arXiv 2507.18504): attention between the columns of a table along a graph of their dependencies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention
from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Geometry, all_cells
from attnzoo.core.masks import Causal
from attnzoo.core.positions import RoPE
from attnzoo.models.grade import GraDeLM
from attnzoo.models.lm import LMConfig
from attnzoo.nn.linear import parameter_count
from attnzoo.zoo.graph.grade import (
    FeatureGraph,
    FeatureGraphMask,
    GraphGuidedBias,
    fd_violation,
    find_functional_dependencies,
    grade_regularizer,
    prior_graph,
    random_orders,
    serialize_rows,
    strongest_columns,
)

M, VALUES, B = 4, 3, 2
T = 1 + 2 * M


@pytest.fixture
def graph(rng):
    return rng.uniform(0.05, 0.95, (M, M)).astype(np.float32)


@pytest.fixture
def features(rng):
    return np.stack([np.concatenate([[-1], np.repeat(rng.permutation(M), 2)]) for _ in range(B)]).astype(np.int32)


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, 4)), jnp.float32) for n in (4, 2, 2))


def bias_of(graph, features, strength=1.0, eps=1e-3):
    """The definition, token by token: [B, T, T]."""
    graph = np.broadcast_to(graph, (len(features), M, M)).astype(np.float64)
    out = np.zeros((*features.shape, features.shape[1]))
    for b, i, j in np.ndindex(out.shape):
        f, g = features[b, i], features[b, j]
        out[b, i, j] = 0 if f == g or -1 in (f, g) else strength * np.log(graph[b, f, g] + eps)
    return out


def seen(edges, features):
    edges = np.broadcast_to(edges, (len(features), M, M))
    out = np.zeros((*features.shape, features.shape[1]), bool)
    for b, i, j in np.ndindex(out.shape):
        f, g = features[b, i], features[b, j]
        out[b, i, j] = f == g or -1 in (f, g) or edges[b, f, g]
    return out


# --- the graph -------------------------------------------------------------------------------------------


def test_graph_and_prior():
    prior = prior_graph(M, [((0, 2), (1,)), ((3,), (0, 2))])
    assert {tuple(x) for x in np.argwhere(prior)} == {(1, 0), (1, 2), (0, 3), (2, 3)}  # row = dependent
    graph = FeatureGraph(M, prior, rank=3, rngs=nnx.Rngs(0))
    assert parameter_count(graph) == 2 * M * 3 + 1
    assert FeatureGraph(M, dynamic=6, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).update.kernel.dtype == jnp.bfloat16
    e1, e2 = graph.rows[...], graph.columns[...]
    graph.bias[...] = jnp.float32(0.4)
    np.testing.assert_allclose(graph(), jax.nn.sigmoid(e1 @ e2.T / 3**0.5 + 0.4), atol=1e-6)
    assert abs(graph() - graph().T).max() > 1e-4


def test_dynamic_graph(rng, features):
    graph = FeatureGraph(M, dynamic=6, rngs=nnx.Rngs(0))
    x = rng.normal(size=(B, T, 6)).astype(np.float32)
    made = graph(jnp.asarray(x), features)
    for b in range(B):
        mean = np.stack([x[b, features[b] == f].mean(0) for f in range(M)])
        rows = graph.rows[...] + mean @ graph.update.kernel[...]
        np.testing.assert_allclose(made[b], jax.nn.sigmoid(rows @ graph.columns[...].T / 8**0.5), atol=1e-5)
    with pytest.raises(ValueError, match="x, features: a dynamic graph"):
        graph()


def test_regulariser():
    prior = prior_graph(M, [((2,), (0,))])
    graph = FeatureGraph(M, prior, rngs=nnx.Rngs(0))
    a = np.asarray(graph(), np.float64)
    entropy = -(prior * np.log(a) + (1 - prior) * np.log(1 - a))
    made = functools.partial(grade_regularizer, graph(), prior)
    np.testing.assert_allclose(made(), entropy.sum() + 0.01 * a.mean(), rtol=1e-5)
    np.testing.assert_allclose(made(alpha=2, beta=0, covered_only=True), 2 * entropy[0, 2], rtol=1e-5)
    np.testing.assert_allclose(grade_regularizer(graph(), None), 0.01 * a.mean(), rtol=1e-5)
    gradient = jax.grad(grade_regularizer)(graph(), prior)
    assert gradient[0, 2] < 0 and (np.delete(gradient.ravel(), 2) > 0).all()  # descent pulls up the edge alone, not (2, 0)
    assert jnp.isfinite(jax.grad(grade_regularizer)(jnp.asarray(prior), prior)).all()  # A of exactly 0 and 1


def test_strongest_columns(graph):
    made = strongest_columns(jnp.asarray(graph), 2)
    np.testing.assert_allclose(made, (graph >= np.sort(graph)[:, [-2]]).astype(np.float32), atol=1e-6)
    weight = jnp.arange(M * M, dtype=jnp.float32).reshape(M, M)
    np.testing.assert_allclose(jax.grad(lambda a: (strongest_columns(a, 2) * weight).sum())(jnp.asarray(graph)), weight)


# --- the bias --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_bias_in_value_and_gradient(qkv, graph, features, backend):
    """Against the array it stands for; a graph per row of the batch, so that gradients differ."""
    graphs = jnp.stack([graph, graph.T])

    @jax.jit
    def run(a):
        return attention(*qkv, mask=Causal(), score=GraphGuidedBias(a, features), backend=backend, block_sizes=(4, 4))

    def dense(a):
        f, g = np.maximum(features, 0)[:, :, None], np.maximum(features, 0)[:, None]
        free = (f == g) | (features[:, :, None] < 0) | (features[:, None] < 0)
        bias = jnp.where(free, 0, jnp.log(a[np.arange(B)[:, None, None], f, g] + 1e-3))
        return attention(*qkv, mask=Causal(), bias=bias[:, None], backend="dense")

    exact = jnp.asarray(bias_of(graphs, features), jnp.float32)[:, None]
    np.testing.assert_allclose(run(graphs), attention(*qkv, mask=Causal(), bias=exact, backend="dense"), atol=3e-6)
    mine, theirs = (jax.grad(lambda a, f=f: (f(a) ** 2).sum())(graphs) for f in (run, dense))
    assert abs(theirs).max() > 1e-2
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_limits(qkv, graph, features):
    def run(a, **options):
        return attention(*qkv, mask=Causal(), score=GraphGuidedBias(jnp.asarray(a), features, **options))

    plain = attention(*qkv, mask=Causal())
    np.testing.assert_allclose(run(graph, strength=0.0), plain, atol=1e-6)
    np.testing.assert_allclose(run(np.ones_like(graph), eps=0.0), plain, atol=1e-6)
    edges = graph > 0.5
    hard = attention(*qkv, mask=Causal() & FeatureGraphMask(edges, features))
    np.testing.assert_allclose(run(edges.astype(np.float32), eps=0.0), hard, atol=1e-6)
    assert abs(hard - plain).max() > 1e-2
    gradient = jax.grad(lambda a: (run(a, eps=0.0) ** 2).sum())(edges.astype(np.float32))
    assert np.isfinite(gradient).all() and abs(gradient[edges]).max() > 1e-3 and (gradient[~edges] == 0).all()

    # The hard form: no gradient but that of the edges it keeps.
    def kept(a):
        edges = strongest_columns(a, 2)
        mask = Causal() & FeatureGraphMask(edges > 0.5, features)
        return attention(*qkv, mask=mask, score=GraphGuidedBias(edges, features))

    gradient = jax.grad(lambda a: (kept(a) ** 2).sum())(jnp.asarray(graph))
    best = np.asarray(strongest_columns(jnp.asarray(graph), 2)) > 0.5
    assert (gradient[~best] == 0).all() and abs(gradient[best]).max() > 1e-3


def test_bias_belongs_to_features_not_positions(graph, features):
    def bias(features):
        g = Geometry(1, 1, 1, T, T)
        bound = GraphGuidedBias(jnp.asarray(graph), features).bind(g)
        return np.asarray(bound.apply(jnp.zeros((1, 1, T, T)), all_cells(g), *(op.x for op in bound.operands)))[0, 0]

    order = np.array([0, 3, 4, 1, 2, *range(5, T)])  # two features change places
    np.testing.assert_allclose(bias(features[0][order]), bias(features[0])[np.ix_(order, order)])
    made = bias(features[0])
    assert (made[0] == 0).all() and (made[:, 0] == 0).all()
    same = features[0][:, None] == features[0]
    assert (made[same] == 0).all() and (made[1:, 1:][~same[1:, 1:]] < 0).all()


# --- the mask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [(2, 2), (4, 3), (1, 2)])
def test_mask_and_tiles(graph, features, tile):
    bq, bk = tile
    graphs = np.stack([graph, graph.T]) > 0.7
    for edges, which in ((graph > 0.7, features), (graphs, features), (np.zeros((M, M), bool), features[:1])):
        mask, visible = FeatureGraphMask(edges, which), seen(edges, np.broadcast_to(which, (B, T)))
        np.testing.assert_array_equal(np.broadcast_to(mask.dense(T, batch=B)[:, 0], (B, T, T)), visible)
        known = mask.tile_states(Geometry(B, 1, 1, T, T), bq, bk)
        traced = jax.jit(lambda mask: mask.block_map(T, batch=B, block_q=bq, block_k=bk).state)(mask)
        assert mask.block_map(T, batch=B, block_q=bq, block_k=bk).exact
        np.testing.assert_array_equal(traced, known)
        # What no known features may be is clipped where they are traced, by cells and tiles alike.
        outside = np.where(which < 0, -2, np.where(which == M - 1, M + 3, which))
        cells_of = jax.jit(lambda mask: mask.dense(T, batch=B))
        np.testing.assert_array_equal(cells_of(FeatureGraphMask(edges, outside)), cells_of(mask))
        tiles = jax.jit(lambda mask: mask.block_map(T, batch=B, block_q=bq, block_k=bk).state)
        np.testing.assert_array_equal(tiles(FeatureGraphMask(edges, outside)), known)
        for b, i, j in np.ndindex(B, *known.shape[2:]):
            cells = visible[b, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            by_cells = FULL if cells.all() else PARTIAL if cells.any() else EMPTY
            assert known[b % len(known), 0, i, j] == by_cells


def test_mask_composes(graph, features):
    mask = Causal() & FeatureGraphMask(graph > 0.7, features)
    visible = seen(graph > 0.7, features) & np.tri(T, dtype=bool)
    np.testing.assert_array_equal(mask.dense(T, batch=B)[:, 0], visible)
    assert visible[:, np.arange(T), np.arange(T)].all()  # at least itself
    empty = (Causal() & FeatureGraphMask(np.zeros((M, M), bool), features)).block_map(T, batch=B, block_q=1, block_k=1)
    assert empty.counts()["empty"] == B * T * T - B * (T + M + 2 * M)  # itself, its name, BOS
    assert repr(mask) == "Causal() & FeatureGraphMask(4 features)"


# --- rows, dependencies, the model -----------------------------------------------------------------------


def test_rows_as_text():
    table, orders = jnp.array([[2, 0, 1, 1]]), jnp.array([[3, 0, 2, 1]])
    tokens, features = serialize_rows(table, orders)
    np.testing.assert_array_equal(tokens, [[0, 4, 6, 1, 7, 3, 6, 2, 5]])
    np.testing.assert_array_equal(features, [[-1, 3, 3, 0, 0, 2, 2, 1, 1]])
    made = random_orders(jax.random.key(0), 50, M)
    np.testing.assert_array_equal(np.sort(made), np.broadcast_to(np.arange(M), (50, M)))
    assert len(np.unique(made, axis=0)) > 10


def test_dependencies(rng):
    table = rng.integers(0, 10, (500, 6))
    table[:, 2] = rng.integers(0, 5, 10)[table[:, 0]]
    table[:, 5] = rng.integers(0, 5, 10)[table[:, 4]]
    found = find_functional_dependencies(table)
    assert found == [((0,), (2,)), ((4,), (5,))]
    for dependency in found:
        assert fd_violation(table, dependency) == 0
    broken = table.copy()
    rows = np.flatnonzero(table[:, 0] == table[0, 0])[:3]  # three of some fifty
    broken[rows, 2] = 9
    assert fd_violation(broken, ((0,), (2,))) == pytest.approx(3 / 500)
    assert fd_violation(table, ((1,), (3,))) > 0.5
    assert fd_violation(table, ((0, 4), (2, 5))) == 0
    table[:, 1] = np.arange(500)  # determines everything, which says nothing
    assert find_functional_dependencies(table) == found
    assert len(find_functional_dependencies(table, min_support=1)) == len(found) + 5


CONFIG = LMConfig(vocab_size=1 + M + VALUES, dim=16, num_layers=2, num_heads=2)


def test_model(rng):
    graph = FeatureGraph(M, rngs=nnx.Rngs(1))
    table, orders = jnp.asarray(rng.integers(0, VALUES, (B, M))), random_orders(jax.random.key(0), B, M)
    tokens, features = serialize_rows(table, orders)
    run = nnx.jit(lambda model: model(tokens, features))
    plain = run(GraDeLM(CONFIG, None, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(run(GraDeLM(CONFIG, graph, strength=0.0, rngs=nnx.Rngs(0))), plain, atol=1e-5)
    model = GraDeLM(CONFIG, graph, rngs=nnx.Rngs(0))
    assert abs(run(model) - plain).max() > 1e-3
    for keep in (None, 1):
        model.keep = keep
        gradient = nnx.jit(nnx.grad(lambda model: (model(tokens, features) ** 2).mean()))(model)
        assert abs(gradient.graph.rows[...]).max() > 0 and abs(gradient.graph.bias[...]) > 0

    # Nothing reads ahead, and samples are rows in the order asked for.
    ahead = nnx.jit(lambda model, tokens: model(tokens, features))
    changed = ahead(model, tokens.at[:, 5:].set(1))
    np.testing.assert_array_equal(changed[:, :5], ahead(model, tokens)[:, :5])
    sample = nnx.jit(lambda model, key: model.sample(orders, VALUES, key))
    made = sample(model, jax.random.key(1))
    assert made.shape == (B, M) and (made >= 0).all() and (made < VALUES).all()


def test_samples_follow_the_model():
    """A model whose readout prefers value i (mod 3) at the i-th name, and another anywhere else, writes these."""
    model = GraDeLM(CONFIG, FeatureGraph(M, rngs=nnx.Rngs(1)), rngs=nnx.Rngs(0))
    at = np.arange(T)
    wanted = jax.nn.one_hot(1 + M + np.where(at % 2, at // 2, at // 2 + 1) % VALUES, CONFIG.vocab_size) * 99.0
    model.embed.attend = lambda x: jnp.broadcast_to(wanted, (*x.shape[:2], CONFIG.vocab_size))
    orders = random_orders(jax.random.key(0), B, M)
    made = model.sample(orders, VALUES, jax.random.key(1))
    np.testing.assert_array_equal(jnp.take_along_axis(made, orders, 1), [[0, 1, 2, 0]] * B)


def test_config_and_layers(rng):
    """The language model's options hold; layers drop, tell their weights and refuse to decode."""
    table, orders = jnp.asarray(rng.integers(0, VALUES, (B, M))), random_orders(jax.random.key(0), B, M)
    tokens, features = serialize_rows(table, orders)

    def build(**options):
        config = dataclasses.replace(CONFIG, num_layers=3, **options)
        return GraDeLM(config, FeatureGraph(M, rngs=nnx.Rngs(1)), keep=2, rngs=nnx.Rngs(params=0, dropout=1))

    run = nnx.jit(lambda model: model(tokens, features))
    plain = run(build())
    np.testing.assert_allclose(run(build(scan_layers=True, remat="full")), plain, atol=1e-5)
    np.testing.assert_allclose(run(build(positions=RoPE())), plain, atol=1e-5)
    assert abs(run(build(positions=RoPE(theta=3.0))) - plain).max() > 1e-3
    assert hasattr(build(tie_embeddings=False).readout, "kernel")
    for rates in ({"dropout_rate": 0.5}, {"mlp_dropout_rate": 0.5}, {"mixer_args": {"dropout_rate": 0.5}}):
        model = build(**rates)
        assert abs(run(model) - plain).max() > 1e-3
        model.eval()
        np.testing.assert_allclose(run(model), plain, atol=1e-5)

    layer, bias = build().layers.runs[0].mixer, GraphGuidedBias(jnp.zeros((M, M)), features, eps=0.0)
    x = jnp.asarray(rng.normal(size=(B, T, 16)), jnp.float32)
    seen = layer.attention_weights(x, carry=bias) > 0
    q, k = np.asarray(features)[:, :, None], np.asarray(features)[:, None]
    free = (q == k) | (q < 0) | (k < 0)
    np.testing.assert_array_equal(seen, np.broadcast_to((free & np.tri(T, dtype=bool))[:, None], seen.shape))
    with pytest.raises(NotImplementedError, match="does not decode"):
        layer.init_cache(B, T)
    with pytest.raises(NotImplementedError, match="does not decode"):
        layer.prefill(x, None)


def test_bad_input(qkv, graph, features):
    for make, words in [
        (lambda: prior_graph(M, [((0,), (4,))]), r"features are 0 to 3, got \(0,\) -> \(4,\)"),
        (lambda: FeatureGraph(M, np.zeros((3, 3)), rngs=nnx.Rngs(0)), r"prior: 4 features need \(4, 4\), got \(3, 3\)"),
        (lambda: strongest_columns(jnp.asarray(graph), 5), "k: must be from 1 to the 4 features, got 5"),
        (lambda: FeatureGraphMask(graph > 0.5, features[:, :3]).dense(T, batch=B), r"features has shape \(2, 3\)"),
        (lambda: attention(*qkv, score=GraphGuidedBias(graph[:2], features)), r"graph has shape \(2, 4\)"),
        (lambda: grade_regularizer(jnp.asarray(graph), np.zeros((3, 3))), r"needs \(4, 4\), got \(3, 3\)"),
        (lambda: serialize_rows(jnp.zeros((2, 3), int), jnp.zeros((2, 4), int)), r"\(2, 3\) and \(2, 4\)"),
        (lambda: serialize_rows(np.array([[0, -1]]), np.array([[1, 0]])), "table: values count from 0, got -1"),
        (lambda: serialize_rows(np.array([[0, 1]]), np.array([[1, 1]])), "orders: every row must be a permutation of 0 to 1"),
        (lambda: FeatureGraph(M, rank=0, rngs=nnx.Rngs(0)), "rank: must be at least 1, got 0"),
        (lambda: GraphGuidedBias(graph, features, eps=-0.1), "eps must be at least 0, got -0.1"),
        (lambda: FeatureGraphMask(graph > 0.5, features - 1).dense(T, batch=B), "0 to 3, or -1 for special.*got -2 to 2"),
        (lambda: attention(*qkv, score=GraphGuidedBias(graph, features + 1)), "got 0 to 4"),
        (lambda: find_functional_dependencies(np.zeros((0, 3), int)), r"R at least 1, got \(0, 3\)"),
        (lambda: GraDeLM(CONFIG, FeatureGraph(M, dynamic=16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), "graph: a dynamic graph"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
