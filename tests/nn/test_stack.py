"""Blocks and stacks: residuals, the carry through depth, scan over layers, rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.nn.block import Block
from attnzoo.nn.feed_forward import feed_forward
from attnzoo.nn.linear import axis_names, linear
from attnzoo.nn.mixer import Mixer
from attnzoo.nn.stack import Stack

D, L = 8, 4
X = jax.random.normal(jax.random.key(0), (2, 5, D))


class Mean(Mixer):
    """The mean of the tokens so far, mapped linearly."""

    crosses = True

    def __init__(self, rngs, *, name="a"):
        self.map = linear(D, D, ("embed", None), rngs=rngs)
        self.name = name

    def __call__(self, x, *, mask=None, positions=None, memory=None):
        if memory is not None:
            return self.map(jnp.broadcast_to(memory.mean(axis=1, keepdims=True), x.shape))
        return self.map(jnp.cumsum(x, axis=1) / jnp.arange(1, x.shape[1] + 1)[:, None])

    def init_cache(self, batch, length, *, dtype=None, memory=None, memory_mask=None):
        total = jnp.zeros((batch, D)) if memory is None else memory.mean(axis=1)
        return {"total": total, "seen": jnp.zeros(batch) if memory is None else -jnp.ones(batch)}

    def prefill(self, x, cache, *, mask=None, lengths=None):
        total, seen = cache["total"], cache["seen"]
        if mask is not None or lengths is not None:
            raise NotImplementedError
        fixed = (seen < 0)[:, None, None]
        count = seen[:, None] + jnp.arange(1, x.shape[1] + 1)
        running = total[:, None] + jnp.cumsum(x, axis=1)
        mean = jnp.where(fixed, total[:, None], running / jnp.where(fixed[..., 0], 1, count)[..., None])
        new = {
            "total": jnp.where(fixed[:, 0], total, running[:, -1]),
            "seen": jnp.where(seen < 0, seen, count[:, -1]),
        }
        return self.map(mean), new


class First(Mixer):
    """Adds the first layer's output to every later one's; only the first layer has a second matrix."""

    carries = True

    def __init__(self, rngs, *, first, grows=False):
        self.map = linear(D, D, ("embed", None), rngs=rngs)
        self.start = linear(D, D, ("embed", None), rngs=rngs) if first else None
        self.grows = grows

    def __call__(self, x, *, mask=None, positions=None, carry=None):
        y = self.map(x)
        if carry is None:
            return self.start(y), (y,)
        return y + carry[0], (*carry, y) if self.grows else carry

    def init_cache(self, batch, length, *, dtype=None):
        return jnp.zeros((batch, 1))

    def prefill(self, x, cache, *, mask=None, lengths=None, carry=None):
        y, carry = self(x, carry=carry)
        return y, cache + 1, carry


def block(mixer, rngs, **options):
    network = feed_forward("relu", D, 2 * D, rngs=rngs)
    return Block(D, mixer, network, rngs=rngs, **options)


def stack(make_mixer=lambda i, rngs: Mean(rngs), *, block_options=None, **options):
    rngs = nnx.Rngs(params=0, dropout=1)
    return Stack(lambda i: block(make_mixer(i, rngs), rngs, **(block_options or {})), L, **options)


def carrying(grows=False):
    return lambda i, rngs: First(rngs, first=i == 0, grows=grows)


run = nnx.jit(lambda model, x, **kwargs: model(x, **kwargs))


@nnx.jit
def gradient(model, x):
    return nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)


def test_pre_and_post_norm():
    pre, post = (block(Mean(nnx.Rngs(1)), nnx.Rngs(0), norm="layer", norm_first=f) for f in (True, False))
    x = X + pre.mixer(pre.mixer_norm(X))
    x = x + pre.feed_forward(pre.feed_forward_norm(x))
    np.testing.assert_allclose(pre(X)[0], x, atol=1e-5)
    x = post.mixer_norm(X + post.mixer(X))
    x = post.feed_forward_norm(x + post.feed_forward(x))
    np.testing.assert_allclose(post(X)[0], x, atol=1e-5)


def test_cross_attention_in_a_block():
    layer = block(Mean(nnx.Rngs(1)), nnx.Rngs(0), cross=Mean(nnx.Rngs(2)))
    memory = X[:, ::-1] * 2
    full, _ = layer(X, memory=memory)
    cache = layer.init_cache(2, 5, memory=memory)
    y, cache, _ = layer.prefill(X[:, :4], cache)
    z, cache, _ = layer.step(X[:, 4:], cache)
    np.testing.assert_allclose(jnp.concatenate([y, z], axis=1), full, atol=1e-5)
    with pytest.raises(ValueError, match="memory"):
        layer(X)
    with pytest.raises(ValueError, match="crosses"):
        block(Mean(nnx.Rngs(1)), nnx.Rngs(0), cross=First(nnx.Rngs(1), first=True))


@pytest.mark.parametrize("make", [lambda i, rngs: Mean(rngs), carrying()], ids=["plain", "carry"])
def test_scanned_equals_unrolled(make):
    plain, scanned = stack(make), stack(make, scan=True)
    assert scanned.sizes == ((1, L - 1) if plain.runs[0].carries else (L,))
    np.testing.assert_allclose(run(scanned, X), run(plain, X), atol=1e-5)
    # The same gradients: those of the scanned run stack those of the unrolled layers.
    flat = dict(nnx.to_flat_state(gradient(plain, X)))
    last = scanned.sizes[-1]
    for (_, number, *rest), leaf in nnx.to_flat_state(gradient(scanned, X)):
        if number == len(scanned.sizes) - 1:
            layers = [flat["runs", i, *rest][...] for i in range(L - last, L)]
            np.testing.assert_allclose(leaf[...], jnp.stack(layers), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_keeps_the_gradients(scan, remat):
    plain, other = stack(carrying(), scan=scan), stack(carrying(), scan=scan, remat=remat)
    np.testing.assert_allclose(run(other, X), run(plain, X), atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), gradient(other, X), gradient(plain, X))


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_moves_on_and_switches_off(scan):
    model = stack(block_options={"dropout_rate": 0.5}, scan=scan, remat="full")
    first, second = run(model, X), run(model, X)
    assert not np.allclose(first, second)
    model.eval()
    np.testing.assert_allclose(run(model, X), run(stack(), X), atol=1e-5)


def test_every_layer_drops_for_itself():
    model = stack(block_options={"dropout_rate": 0.5}, scan=True)
    keys = jax.random.key_data(model.runs[0].dropout.rngs.key[...])
    assert len(np.unique(keys, axis=0)) == L


@pytest.mark.parametrize("scan", [False, True])
def test_decoding(scan):
    model = stack(scan=scan)
    full = run(model, X)
    caches = model.init_cache(2, 5)
    y, caches = model.prefill(X[:, :3], caches)
    outputs = [y]
    swap = jnp.array([1, 0])
    for t in (3, 4):
        y, caches = model.step(X[:, t : t + 1], caches)
        outputs.append(y)
        y, _ = model.step(X[::-1, t : t + 1], model.reorder_cache(caches, swap))
        z, _ = model.step(X[:, t : t + 1], caches)
        np.testing.assert_allclose(y, z[::-1], atol=1e-5)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)


def test_decoding_threads_the_carry():
    for scan in (False, True):
        model = stack(carrying(), scan=scan)
        y, caches = model.prefill(X, model.init_cache(2, 5))
        np.testing.assert_allclose(y, run(model, X), atol=1e-5)
        assert all(bool((leaf == 1).all()) for leaf in jax.tree.leaves(caches))


def test_scanned_parameters_name_their_layers():
    for path, leaf in nnx.to_flat_state(nnx.state(stack(scan=True), nnx.Param)):
        assert axis_names(leaf)[0] == "layers", path
        assert leaf.shape[0] == L


def test_layers_that_differ_are_grouped():
    model = stack(lambda i, rngs: Mean(rngs, name="a" if i < 1 else "b"), scan=True)
    assert model.sizes == (1, L - 1)
    with pytest.raises(ValueError, match="no two consecutive layers") as error:
        stack(lambda i, rngs: Mean(rngs, name=str(i)), scan=True)
    assert "'2'" in str(error.value)


def test_a_carry_that_grows_cannot_be_scanned():
    run(stack(carrying(grows=True)), X)
    with pytest.raises(ValueError, match="carry of these layers changes"):
        stack(carrying(grows=True), scan=True)(X)


@pytest.mark.parametrize(("options", "says"), [({"remat": "ful"}, "did you mean 'full'"), ({"num_layers": 0}, "num_layers")])
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        Stack(lambda i: block(Mean(nnx.Rngs(0)), nnx.Rngs(0)), **{"num_layers": 2, **options})
