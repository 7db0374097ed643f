"""Gaussian adaptive attention: weights, their symmetries, blocks, and the authors' package."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.zoo.normalizers.gaam import (
    PAPER,
    GATPoolHead,
    GaussianAdaptiveAttention,
    GaussianBlock,
    MultiHeadGaussianAdaptiveAttention,
    gaussian_weights,
    importance_factor,
)


def plain(u, delta, c, eps=1e-8):
    """The weights of one head in float64, along the last axis, from the equations."""
    u, delta, c = (np.asarray(x, np.float64) for x in (u, delta, c))
    mu, n = u.mean(-1, keepdims=True), u.shape[-1]
    var = ((u - mu) ** 2).sum(-1, keepdims=True) / (n - 1) + eps
    m = np.ones_like(u)
    for d, s in zip(delta, c, strict=True):
        m = m * np.exp(-(((u - (mu + d)) / np.sqrt(var)) ** 2) / (2 * s**2)) / np.sqrt(2 * np.pi * s**2)
    return m / m.sum(-1, keepdims=True)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def u(rng):
    return rng.normal(size=(3, 5, 13)) * 2 + 1


def layer(num_heads, num_gaussians=3, **options):
    """A layer whose deltas are not 0."""
    made = MultiHeadGaussianAdaptiveAttention(num_heads, num_gaussians, rngs=nnx.Rngs(0), **options)
    shifts = 0.1 * jnp.arange(num_heads)[:, None]
    for parameter, least, most in ((made.delta, -0.5, 1), (made.c, 0.8, 2)):
        parameter[...] = (jnp.linspace(least, most, num_gaussians) + shifts).astype(parameter.dtype)
    return made


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["log", "reference"])
def test_weights_are_their_definition(u, mode):
    delta, c = np.array([0.0, 0.7, -1.0]), np.array([1.0, 2.0, 0.7])
    expected = plain(u, delta, c)
    np.testing.assert_allclose(gaussian_weights(jnp.asarray(u), delta, c, mode=mode), expected, atol=1e-9)
    for axis in (0, 1, -1):
        moved = gaussian_weights(jnp.moveaxis(jnp.asarray(u), -1, axis), delta, c, axis=axis, mode=mode)
        np.testing.assert_allclose(jnp.moveaxis(moved, axis, -1), expected, atol=1e-9)


@pytest.mark.parametrize("axis", [1, 2])
def test_every_head_gives_its_chunk_a_weight_of_one(rng, axis):
    x = jnp.asarray(rng.normal(size=(2, 14, 11)), jnp.float32)
    module = layer(4, axis=axis)
    m = np.moveaxis(np.asarray(module.weights(x)), axis, -1)
    size = x.shape[axis] // 4
    edges = [0, size, 2 * size, 3 * size, x.shape[axis]]
    for start, stop in itertools.pairwise(edges):
        np.testing.assert_allclose(m[..., start:stop].sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(m.sum(-1), 4, atol=1e-5)
    y = module(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    np.testing.assert_allclose(y, x * module.weights(x), atol=1e-7)
    # Heads are chunks of the axis, each with its own parameters.
    moved = np.moveaxis(np.asarray(x), axis, -1)
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        expected = plain(moved[..., start:stop], module.delta[i], module.c[i])
        np.testing.assert_allclose(m[..., start:stop], expected, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_shift_and_scale_do_not_matter(u):
    zero, one, x = np.zeros(1), np.array([1.3]), jnp.asarray(u)
    m = gaussian_weights(x, zero, one)
    for a, b in ((3.0, 0.0), (1.0, -5.0), (-0.5, 2.0)):
        np.testing.assert_allclose(gaussian_weights(a * x + b, zero, one), m, atol=1e-7)
    # An offset is measured in the units of u, so it breaks this.
    assert np.abs(gaussian_weights(3 * x, zero + 1, one) - gaussian_weights(x, zero + 1, one)).max() > 1e-2


def test_wide_gaussians_are_uniform(u):
    x, delta, wide = jnp.asarray(u, jnp.float32), np.zeros(4, np.float32), np.full(4, 1e3, np.float32)
    m = gaussian_weights(x, delta, wide)
    np.testing.assert_allclose(m, 1 / 13, atol=1e-6)
    np.testing.assert_allclose(x * m, x / 13, atol=1e-5)
    # In the authors' form the clamp wins: its weights nearly vanish.
    assert gaussian_weights(x, delta, wide, mode="reference").sum(-1).max() < 1e-3


@pytest.mark.usefixtures("x64")
def test_equal_gaussians_multiply_to_a_narrower_one(u):
    x, zeros = jnp.asarray(u), np.zeros(5)
    many = gaussian_weights(x, zeros, np.full(5, 2.0))
    np.testing.assert_allclose(many, gaussian_weights(x, zeros[:1], np.array([2 / np.sqrt(5)])), atol=1e-12)
    mixture = sum(plain(u, [d], [0.5]) for d in (0.0, 3.0)) / 2
    assert np.abs(gaussian_weights(x, np.array([0.0, 3.0]), np.array([0.5, 0.5])) - mixture).max() > 0.1


def test_order_matters_across_chunks_alone(rng):
    x = jnp.asarray(rng.normal(size=(4, 12)), jnp.float32)
    one, two = layer(1), layer(2)
    anyhow = rng.permutation(12)
    np.testing.assert_allclose(one(x[:, anyhow]), one(x)[:, anyhow], atol=1e-6)
    within = np.concatenate([rng.permutation(6), 6 + rng.permutation(6)])
    np.testing.assert_allclose(two(x[:, within]), two(x)[:, within], atol=1e-6)
    across = np.roll(np.arange(12), 3)
    assert np.abs(two(x[:, across]) - two(x)[:, across]).max() > 1e-2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 2, 6])
def test_both_modes_agree_while_the_clamp_sleeps(u, rng, count):
    """And so do their gradients: the constants cancel."""
    x = jnp.asarray(u)
    delta, c = jnp.asarray(rng.normal(size=count)), jnp.asarray(0.6 + rng.random(count))
    upstream = jnp.asarray(rng.normal(size=u.shape))

    def both(mode):
        return jax.jit(jax.value_and_grad(lambda *a: (upstream * gaussian_weights(*a, mode=mode)).sum(), (0, 1, 2)))

    for mine, theirs in zip(
        jax.tree.leaves(both("log")(x, delta, c)), jax.tree.leaves(both("reference")(x, delta, c)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_narrow_and_many_gaussians_do_not_underflow(u):
    x = jnp.asarray(u, jnp.float32)
    narrow = np.full(8, 0.05, np.float32), np.zeros(8, np.float32)
    np.testing.assert_allclose(gaussian_weights(x, narrow[1], narrow[0]).sum(-1), 1, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda c: (gaussian_weights(x, narrow[1], c) * x).sum()))(narrow[0])
    assert np.isfinite(gradient).all()
    for c in (0.0, 1e-30):  # a needle at the mean, in front of others and alone
        both = np.array([c, 1.0], np.float32)
        value, gradient = jax.jit(jax.value_and_grad(lambda c: (gaussian_weights(x, narrow[1][:2] + 0.1, c) * x).sum()))(both)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    # Only the square of c is used.
    np.testing.assert_array_equal(gaussian_weights(x, narrow[1], -narrow[0]), gaussian_weights(x, *narrow[::-1]))


def test_constant_chunks_are_uniform_and_dtypes_stay():
    m = gaussian_weights(jnp.full((2, 6), 3.0), np.zeros(2, np.float32), np.ones(2, np.float32))
    np.testing.assert_allclose(m, 1 / 6, atol=1e-6)
    x = jax.random.normal(jax.random.key(0), (2, 16), jnp.bfloat16)
    module = layer(2)
    assert module.weights(x).dtype == jnp.float32
    assert module(x).dtype == jnp.bfloat16
    # Parameters of few digits are not calculated with in few digits.
    low = layer(2, param_dtype=jnp.bfloat16)
    wide = layer(2)
    wide.delta[...], wide.c[...] = (jnp.asarray(p[...], jnp.float32) for p in (low.delta, low.c))
    np.testing.assert_array_equal(low.weights(x), wide.weights(x))
    np.testing.assert_allclose(module(x).astype(jnp.float32), module(x.astype(jnp.float32)), rtol=1e-2)


def test_padding(rng):
    x = np.float32(rng.normal(size=(3, 10)))
    x[0, 6:], x[1, 1:], x[2] = -9.0, -9.0, -9.0
    real = x != -9
    options = {"num_gaussians": 2, "padding_value": -9.0, "rngs": nnx.Rngs(0)}
    counted, exact = (GaussianAdaptiveAttention(exact_padding=e, **options) for e in (False, True))
    for module in (counted, exact):
        np.testing.assert_array_equal(module(x)[~real], -9)
    # By default padding enters the statistics as zeros, and is weighted by its own value.
    zeroed = np.where(real, x, 0)
    mu, sigma = zeroed.mean(-1, keepdims=True), np.sqrt(zeroed.var(-1, ddof=1, keepdims=True) + 1e-8)
    s = -sum(((x - mu - d) / sigma) ** 2 / (2 * c**2) for d, c in zip(counted.delta[...], counted.c[...], strict=True))
    np.testing.assert_allclose(counted.weights(x), jax.nn.softmax(s), atol=1e-5)
    # Exactly: as if it were not there.
    w = exact.weights(x)
    assert not np.asarray(w)[~real].any()
    np.testing.assert_allclose(w[:1, :6], exact.weights(x[:1, :6]), atol=1e-6)
    np.testing.assert_allclose(w[1, 0], 1, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: (exact(x) ** 2).sum()))(jnp.asarray(x))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("exact", [False, True])
def test_padding_stays_padding_through_layers(rng, exact):
    """By its value or by `where`; what it holds does not matter, and pooling leaves it out."""
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    real = (jnp.arange(6) < jnp.array([[4], [6]]))[..., None]
    padded = jnp.where(real, x, -9.0)
    options = {"num_layers": 2, "axes": (1, 2), "num_heads": 2, "num_gaussians": 2, "exact_padding": exact}
    by_value, by_where = (GATPoolHead(8, 3, rngs=nnx.Rngs(0), **options, **p) for p in ({"padding_value": -9.0}, {}))
    block = by_where.block
    y = block(padded, real)
    np.testing.assert_array_equal(by_value.block(padded), y)
    np.testing.assert_array_equal(y[0, 4:], padded[0, 4:])
    first, second = block.layers
    h = jnp.where(real, first(padded, real) + padded, padded)
    np.testing.assert_array_equal(y, jnp.where(real, second(h, real) + h, h))
    for got, expected in zip(block.weights(padded, real), (first.weights(padded, real), second.weights(h, real)), strict=True):
        np.testing.assert_array_equal(got, expected)
    pooled = jnp.stack([y[0, :4].mean(0), y[1].mean(0)])
    np.testing.assert_allclose(by_value(padded), by_value.out(pooled), atol=1e-6)
    np.testing.assert_array_equal(by_where(padded, real), by_value(padded))
    assert np.isfinite(by_where(padded, jnp.zeros_like(real))).all()
    if exact:
        np.testing.assert_allclose(by_where(x, real), by_where(padded, real), atol=1e-6)


def test_block(rng):
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    block = GaussianBlock(2, axes=(1, 2), num_heads=(2, 4), num_gaussians=(3, 1), rngs=nnx.Rngs(0))
    first, second = block.layers
    h = first(x) + x
    np.testing.assert_array_equal(block(x), second(h) + h)
    assert (first.axis, first.c.shape) == (1, (2, 3))
    assert (second.axis, second.c.shape) == (2, (4, 1))
    for got, expected in zip(block.weights(x), (first.weights(x), second.weights(h)), strict=True):
        np.testing.assert_array_equal(got, expected)
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block, nnx.Param)))
    assert count == 2 * 2 * 3 + 2 * 4 * 1


def test_importance_factor():
    w = jnp.array([[[0.1, 0.2, 0.7], [0.3, 0.2, 0.5]], [[0.2, 0.2, 0.6], [0.2, 0.2, 0.6]]])
    np.testing.assert_allclose(importance_factor(w), [0, 0, 1], atol=1e-6)
    a = np.array([0.3, 0.2, 0.1, 0.4])
    np.testing.assert_allclose(importance_factor(jnp.asarray(a)[:, None] + jnp.zeros((4, 6)), 0), (a - 0.1) / 0.3, atol=1e-6)
    np.testing.assert_array_equal(importance_factor(jnp.ones((3, 4))), 0)


def test_pool_head(rng):
    features = jnp.asarray(rng.normal(size=(3, 2, 7, 16)), jnp.float32)
    model = GATPoolHead(16, 5, num_layers=2, num_heads=2, num_gaussians=2, rngs=nnx.Rngs(0))
    logits, by_hand = nnx.jit(lambda model, x: (model(x), model.out(model.block(x).mean((1, 2)))))(model, features)
    assert logits.shape == (3, 5) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, by_hand, atol=1e-5)
    gradients = nnx.jit(nnx.grad(lambda model: (model(features) ** 2).sum()))(model)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: layer(4)(x), r"x: 4 heads share the 7 elements of axis -1 of \(2, 7\).*at most 3 heads"),
        (lambda x: layer(1, axis=2)(x), r"x:.*axis 2.*\(2, 7\)"),
        (lambda x: layer(1)(x[0]), r"at least 2 axes.*\(7,\)"),
        (lambda x: gaussian_weights(x[:, :1], [0.0], [1.0]), r"at least 2 elements along axis -1, got shape \(2, 1\)"),
        (lambda x: gaussian_weights(x, [0.0], [1.0], mode="logs"), "unknown mode 'logs'.*'log'"),
        (lambda x: layer(1, mode="exact"), "unknown mode 'exact'"),
        (lambda x: layer(0), "num_heads.*got 0"),
        (lambda x: layer(1, 0), "num_gaussians.*got 0"),
        (lambda x: layer(2)(x, x[:, :3] > 0), r"where: \(2, 3\) does not broadcast to x \(2, 7\)"),
        (lambda x: gaussian_weights(x, [0.0], [1.0], where=x[:, :3] > 0), r"where: \(2, 3\) does not .* u \(2, 7\)"),
        (lambda x: gaussian_weights(x, [0.0, 1.0], [1.0]), r"delta and c: .*\(2,\) and \(1,\)"),
        (lambda x: GaussianBlock(0, rngs=nnx.Rngs(0)), "num_layers.*got 0"),
        (lambda x: importance_factor(x, 2), r"axis: weights \(2, 7\) have no axis 2"),
        (lambda x: GaussianBlock(3, axes=(1, 2), rngs=nnx.Rngs(0)), r"axes:.*3 layers, got \(1, 2\)"),
    ],
)
def test_wrong_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.zeros((2, 7)))


def test_whole_numbers_are_refused():
    x = jnp.arange(14).reshape(2, 7)
    for name, call in (("x", layer(2)), ("u", lambda x: gaussian_weights(x, [0.0], [1.0]))):
        with pytest.raises(TypeError, match=rf"{name}: a floating-point array.*int32 \(2, 7\)"):
            call(x)


def test_the_picture_is_drawn():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    PAPER.picture(axes)
    assert len(axes.lines) == 4
    assert all(np.isfinite(line.get_ydata()).all() for line in axes.lines)


@pytest.mark.parity
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("padding", [None, 0.25])
def test_parity_with_the_authors_package(rng, double, padding):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("gaussian_adaptive_attention.GaussianBlock")
    dtype = np.float64 if double else np.float32
    with jax.enable_x64(double):
        x, upstream = (rng.normal(size=(3, 14, 6)).astype(dtype) for _ in range(2))
        if padding is not None:
            x[1, 9:] = padding
        other = theirs.MultiHeadGaussianAdaptiveAttention(1, 4, 3, padding).to(getattr(torch, np.dtype(dtype).name))
        mine = MultiHeadGaussianAdaptiveAttention(
            4, 3, axis=1, padding_value=padding, mode="reference", param_dtype=dtype, rngs=nnx.Rngs(0)
        )
        deltas, cs = rng.normal(size=(4, 3)) / 2, 0.7 + rng.random((4, 3))
        mine.delta[...], mine.c[...] = jnp.asarray(deltas, dtype), jnp.asarray(cs, dtype)
        for delta, c, module in zip(deltas, cs, other.attention_heads, strict=True):
            module.mean_offsets.data, module.c.data = (torch.tensor(v, dtype=module.c.dtype) for v in (delta, c))
        x_t = torch.tensor(x, requires_grad=True)
        y_t, m_t = other(x_t, return_attention_details=True)
        (y_t * torch.tensor(upstream)).sum().backward()

        def loss(module, x):
            return (upstream * module(x)).sum()

        of_module, dx = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(mine, jnp.asarray(x))
        atol = 1e-6 if double else 1e-5
        np.testing.assert_allclose(mine(jnp.asarray(x)), y_t.detach(), atol=atol)
        np.testing.assert_allclose(mine.weights(jnp.asarray(x)), m_t, atol=atol)
        np.testing.assert_allclose(dx, x_t.grad, atol=atol, rtol=atol)
        for i, module in enumerate(other.attention_heads):
            np.testing.assert_allclose(of_module.delta[i], module.mean_offsets.grad, atol=atol, rtol=atol)
            np.testing.assert_allclose(of_module.c[i], module.c.grad, atol=atol, rtol=atol)
        mine.mode = "log"
        total = np.add.reduceat(m_t.numpy(), [0, 3, 6, 9], axis=1)
        unclamped = np.repeat(np.abs(total - 1) < 1e-5, [3, 3, 3, 5], axis=1)
        assert unclamped.mean() > 0.5
        np.testing.assert_allclose(mine(jnp.asarray(x))[unclamped], y_t.detach().numpy()[unclamped], atol=atol)
