"""Brody et al. 2023: what projecting and scaling give to attention."""

import itertools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnzoo.zoo.inspect.ln_expressivity import (
    FactorizedLayerNorm,
    MajorityProbe,
    equal_attention_query,
    is_unselectable,
    leading_partitions,
    majority_task,
    project,
    projection_angle,
    rescale,
    unselectable_fraction,
)

D = 8


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(5, 3, D)) * 2 + 1, jnp.float32)


def normalised(rng, count, dim):
    """LN(x) of normal vectors, in float64."""
    k = rng.normal(size=(count, dim))
    k -= k.mean(1, keepdims=True)
    return k * np.sqrt(dim) / np.linalg.norm(k, axis=1, keepdims=True)


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- the norm ----------------------------------------------------------------------------------------------


def test_the_four_norms(x):
    layer, rms = flax.linen.LayerNorm(epsilon=0), flax.linen.RMSNorm(epsilon=0)
    for (projects, scales), expected in {
        (True, True): layer.apply(layer.init(jax.random.key(0), x), x),
        (False, True): rms.apply(rms.init(jax.random.key(0), x), x),
        (True, False): x - x.mean(-1, keepdims=True),
        (False, False): x,
    }.items():
        for affine in (True, False):
            norm = FactorizedLayerNorm(D, do_projection=projects, do_scale=scales, affine=affine)
            np.testing.assert_allclose(norm(x), expected, atol=1e-5)
            assert len(jax.tree.leaves(nnx.state(norm, nnx.Param))) == 2 * affine


def test_gain_and_bias(x, rng):
    norm = FactorizedLayerNorm(D)
    gain, bias = (jnp.asarray(rng.normal(size=D), jnp.float32) for _ in range(2))
    norm.gain[...], norm.bias[...] = gain, bias
    np.testing.assert_allclose(norm(x), gain * FactorizedLayerNorm(D, affine=False)(x) + bias, atol=1e-6)


def test_projection_and_scaling(x):
    matrix = np.asarray(project(jnp.eye(D)))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-7)
    np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-6)
    assert np.linalg.matrix_rank(matrix) == D - 1
    np.testing.assert_allclose(matrix @ np.ones(D), 0, atol=1e-6)
    y = FactorizedLayerNorm(D, affine=False)(x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), np.sqrt(D), rtol=1e-6)
    np.testing.assert_allclose(y.sum(-1), 0, atol=1e-5)


def test_zeros_stay_zeros():
    for x in (jnp.zeros(D), jnp.full(D, 3.0)):
        norm = FactorizedLayerNorm(D, affine=False)
        np.testing.assert_array_equal(norm(x), 0)
        assert np.isfinite(jax.grad(lambda x, norm=norm: norm(x).sum())(x)).all()


def test_narrow_types_and_the_legacy_norm(x):
    y = FactorizedLayerNorm(D)(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), FactorizedLayerNorm(D)(x), atol=0.03)
    legacy = FactorizedLayerNorm(D, do_projection=False, affine=False, legacy_majority_norm=True)(x)
    np.testing.assert_allclose(legacy, x / jnp.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(D), atol=1e-6)


# --- (a): equal attention ----------------------------------------------------------------------------------


def test_the_ones_query_attends_to_all_keys_alike(rng):
    keys = normalised(rng, 50, D)
    for c in (-1e3, -1.0, 0.1, 1e3):
        np.testing.assert_allclose(softmax(c * np.ones(D) @ keys.T), 1 / 50, atol=1e-6)
    single = np.asarray(FactorizedLayerNorm(D, affine=False)(jnp.asarray(rng.normal(size=(50, D)), jnp.float32)))
    for c in (-5, 0.1, 5):
        weights = softmax(np.float32(c) * np.ones(D, np.float32) @ single.T)
        np.testing.assert_allclose(weights, 1 / 50, atol=1e-5)
    unprojected = rescale(jnp.asarray(rng.normal(size=(50, D)), jnp.float32))
    assert np.abs(softmax(np.ones(D) @ np.asarray(unprojected).T) - 1 / 50).max() > 0.01


def test_an_equal_query_exists_behind_a_key_matrix(rng):
    keys, w_k = normalised(rng, 30, D), rng.normal(size=(D, D + 2))
    q = equal_attention_query(w_k, c=3.0)
    np.testing.assert_allclose(w_k @ q, 3, atol=1e-9)
    np.testing.assert_allclose(softmax(q @ (keys @ w_k).T), 1 / 30, atol=1e-6)
    with pytest.raises(ValueError, match=r"H = 3 .*H >= D = 8"):
        equal_attention_query(w_k[:, :3])
    # Without projection, no query but zero scores D + 1 generic keys alike: q · k_i = s has the solution 0 alone.
    generic = rng.normal(size=(D + 1, D))
    system = np.concatenate([generic, -np.ones((D + 1, 1))], 1)
    assert np.linalg.svd(system, compute_uv=False)[-1] > 1e-3
    system = np.concatenate([normalised(rng, D + 1, D), -np.ones((D + 1, 1))], 1)
    assert np.linalg.svd(system, compute_uv=False)[-1] < 1e-12


def test_the_angle(rng):
    x, w_q, w_k = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, D), (D, 3), (D, 3)))
    met = np.asarray(x, np.float64) @ np.asarray(w_q, np.float64) @ np.asarray(w_k, np.float64).T
    cosine = met.sum(-1) / np.linalg.norm(met, axis=-1) / np.sqrt(D)
    np.testing.assert_allclose(projection_angle(x, w_q, w_k), 90 - np.abs(np.degrees(np.arccos(cosine)) - 90), atol=0.01)
    # W_Q that maps every input to the equal query: an angle of 0, whichever the sign.
    for c in (2.0, -2.0):
        q = equal_attention_query(rng_matrix := rng.normal(size=(D, D)), c)
        w_q = jnp.asarray(np.outer(np.ones(D), q), jnp.float32)
        assert (projection_angle(jnp.abs(x), w_q, jnp.asarray(rng_matrix, jnp.float32)) < 0.5).all()


# --- (b): un-select-able keys ------------------------------------------------------------------------------


def test_planted_keys(rng):
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=2)))
    np.testing.assert_array_equal(is_unselectable(np.vstack([corners, [[0, 0]]])), [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(is_unselectable(np.vstack([corners, [[0.3, -0.9]]]) + 5), [0, 0, 0, 0, 1])
    for dim in (2, 3, 5):
        keys = rng.normal(size=(dim + 1, dim))  # in general position: all selectable
        mixed = rng.dirichlet(np.ones(dim + 1), size=3) @ keys
        np.testing.assert_array_equal(is_unselectable(np.vstack([keys, mixed])), [0] * (dim + 1) + [1] * 3)
    assert is_unselectable(corners[[0, 0, 1]]).tolist() == [True, True, False]
    assert is_unselectable(corners[:1]).tolist() == [False]


def test_rounding_counts(rng):
    flat = rng.normal(size=(40, 2))
    lost = is_unselectable(flat)
    assert 20 < lost.sum() < 40
    plane = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    single = (flat @ plane).astype(np.float32)
    assert is_unselectable(single).sum() < lost.sum()
    np.testing.assert_array_equal(is_unselectable(single, tol=1e-5), lost)


def test_few_generic_keys_are_all_selectable(rng):
    for count in (2, 5, D):
        assert unselectable_fraction(rng.normal(size=(count, D))) == 0


def test_hulls_of_the_plane(rng):
    """Against the convex hull by another algorithm."""
    from scipy.spatial import ConvexHull

    keys = rng.normal(size=(60, 2))
    np.testing.assert_array_equal(np.flatnonzero(~is_unselectable(keys)), np.sort(ConvexHull(keys).vertices))


@pytest.mark.parametrize("dim", [3, 4, 8])
def test_normalised_keys_are_all_selectable(rng, dim):
    keys = rng.normal(size=(200, dim)).astype(np.float32)
    assert unselectable_fraction(keys) > 0.05
    assert unselectable_fraction(FactorizedLayerNorm(dim, affine=False)(jnp.asarray(keys))) == 0
    assert unselectable_fraction(normalised(rng, 200, dim)) == 0
    # Each is selected by itself.
    k = normalised(rng, 200, dim)
    np.testing.assert_array_equal((k @ k.T).argmax(1), np.arange(200))


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "more_than"), [(4, 0.8), (8, 0.3)])
def test_normal_keys_often_are_not(rng, dim, more_than):
    keys = rng.normal(size=(1000, dim))
    assert unselectable_fraction(keys) > more_than
    assert unselectable_fraction(FactorizedLayerNorm(dim, affine=False)(jnp.asarray(keys, jnp.float32))) == 0


# --- the majority task -------------------------------------------------------------------------------------


def test_partitions():
    rows = leading_partitions(7, 3, 2)
    counts = [c for c in itertools.product(range(8), repeat=3) if sum(c) == 7]
    expected = {c for c in counts if c[0] >= c[1] >= c[2] and c[0] - c[1] >= 2}
    assert {tuple(row) for row in rows.tolist()} == expected
    assert len(rows) == len(expected)


def test_majority_task():
    tokens, labels = majority_task(jax.random.key(0), 500, length=20, num_classes=6, min_delta=3)
    counts = np.stack([np.bincount(row, minlength=6) for row in np.asarray(tokens)])
    ranked = np.sort(counts, 1)
    np.testing.assert_array_equal(counts.argmax(1), labels)
    assert (ranked[:, -1] - ranked[:, -2] >= 3).all()
    assert (ranked[:, -1] - ranked[:, -2] == 3).any()
    assert set(np.asarray(labels)) == set(range(6))
    assert np.mean(np.asarray(tokens)[:, 0] == np.asarray(labels)) < 0.9  # shuffled
    again, _ = jax.jit(lambda key: majority_task(key, 500))(jax.random.key(0))
    np.testing.assert_array_equal(again, tokens)


@pytest.mark.parametrize("norm", ["layer", "no projection", "none"])
def test_the_probe_is_its_equations(norm):
    model = MajorityProbe(6, D, 2, norm=norm, rngs=nnx.Rngs(0))
    tokens, _ = majority_task(jax.random.key(0), 3)
    x = model.table[...][tokens]
    projected = project(x) if norm == "layer" else x
    h = projected if norm == "none" else projected / jnp.sqrt((projected**2).mean(-1, keepdims=True))
    q, k, v = (jnp.einsum("btd,dnh->btnh", h, f.kernel[...]) for f in
               (model.attention.qkv.query, model.attention.qkv.key, model.attention.qkv.value))  # fmt: skip
    weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(D // 2))
    x = x + jnp.einsum("bnts,bsnh,nhd->btd", weights, v, model.attention.out.kernel[...])
    mean, deviation = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    x = x + model.feed_forward((x - mean) / deviation)
    np.testing.assert_allclose(model(tokens), x @ model.table[...].T, atol=2e-4)
    assert model.angles().shape == (6, 2)
    w_q, w_k = (f.kernel[:, 1] for f in (model.attention.qkv.query, model.attention.qkv.key))
    np.testing.assert_allclose(
        model.angles()[:, 1], projection_angle(model.attention_norm(model.table[...]), w_q, w_k), rtol=1e-5
    )


def test_the_probe_learns():
    model = MajorityProbe(6, D, rngs=nnx.Rngs(0))
    tokens, labels = majority_task(jax.random.key(0), 64)

    @nnx.jit
    def loss_and_gradient(model):
        def loss(model):
            each = optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels[:, None].repeat(20, 1))
            return each.mean()

        return nnx.value_and_grad(loss)(model)

    before, gradient = loss_and_gradient(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.02 * g, params, gradient))
    assert loss_and_gradient(model)[0] < before - 0.01


def test_which_keys_are_selectable_does_not_depend_on_scale_and_place(rng):
    keys = rng.normal(size=(40, 3))
    lost = is_unselectable(keys)
    assert 0 < lost.sum() < 40
    for same in (1e-10 * keys, 1e10 * keys, keys + 1e4):
        np.testing.assert_array_equal(is_unselectable(same), lost)
    # Keys of a plane, written in float32: its rounding selects them unless it is tolerated.
    plane = np.asarray(project(jnp.asarray(rng.normal(size=(40, 3)), jnp.float32)))
    flat = plane.astype(np.float64) - plane.astype(np.float64).mean(1, keepdims=True)
    assert unselectable_fraction(plane, tol=1e-5) == unselectable_fraction(flat, tol=1e-5) > unselectable_fraction(plane)


def test_half_precision_and_shared_tables():
    small = jnp.array([[1e-4, -1e-4, 0.0, 0.0]], jnp.float16)
    np.testing.assert_allclose(rescale(small), [[2**0.5, -(2**0.5), 0, 0]], rtol=1e-2)
    assert not rescale(jnp.zeros((1, 4), jnp.float16)).any()
    with pytest.raises(ValueError, match="read-only"):
        leading_partitions(5, 2, 1)[0, 0] = 7


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: is_unselectable(np.zeros((2, 3, 4))), r"keys: expected \[S, D\].*got \(2, 3, 4\)"),
        (lambda: is_unselectable(np.zeros((0, 4))), r"keys: expected \[S, D\] with S >= 1, got \(0, 4\)"),
        (lambda: leading_partitions(5, 1, 1), "num_classes: needs at least 2, got 1"),
        (lambda: leading_partitions(200, 100, 1), "length, num_classes: 200 tokens of 100 classes have .* at most 1000000"),
        (lambda: FactorizedLayerNorm(D, legacy_majority_norm=True), "legacy_majority_norm: .*do_projection=False"),
        (lambda: MajorityProbe(6, D, norm="rms", rngs=nnx.Rngs(0)), "unknown norm 'rms'"),
        (lambda: majority_task(jax.random.key(0), 2, length=5, min_delta=6), "min_delta: no counts of 5 tokens lead by 6"),
        (lambda: majority_task(jax.random.key(0), 2, num_classes=1), "num_classes: needs at least 2, got 1"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_parity_with_torch(x):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    given = torch.tensor(np.asarray(x), requires_grad=True)
    centred = given - given.mean(-1, keepdim=True)
    for options, theirs in (
        ({}, functional.layer_norm(given, (D,), eps=0.0)),
        ({}, functional.normalize(centred, dim=-1) * D**0.5),
        ({"do_projection": False}, functional.normalize(given, dim=-1) * D**0.5),
    ):
        norm = FactorizedLayerNorm(D, **options)
        np.testing.assert_allclose(norm(x), theirs.detach().numpy(), atol=1e-5)
        (wanted,) = torch.autograd.grad((theirs**3).sum(), given, retain_graph=True)
        got = jax.grad(lambda x, norm=norm: (norm(x) ** 3).sum())(x)
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5 * float(wanted.abs().max()))
