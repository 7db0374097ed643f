"""What every mixer of the zoo must hold, by its traits. Found through the catalog."""

import functools
import importlib.util
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from attnzoo import catalog
from attnzoo.core.masks import Causal, Instead, Lengths, Prefix, Segments
from attnzoo.models.factory import make_mixer
from attnzoo.nn.linear import axis_names
from attnzoo.nn.mixer import Mixer

B, T, D, N = 2, 8, 32, 4
STEPWISE = 2e-5  # how far cached decoding may be from the full forward pass, in float32
COMPILED = 1e-5  # and compiled from eager

MIXERS = catalog.mixers()


def having(**traits: bool) -> pytest.MarkDecorator:
    """Over the mixers that have all of these traits."""
    keys = [key for key, cls in MIXERS.items() if all(getattr(cls, t) == v for t, v in traits.items())]
    return pytest.mark.parametrize("key", keys)


class Tower(nnx.Module):
    """Mixers in residual connections: one, or three where layers differ or hand something on."""

    def __init__(self, key: str, **options: Any):
        cls = MIXERS[key]
        count = 3 if cls.carries or cls.layered else 1
        options = {"causal": True, "rngs": nnx.Rngs(0), **options}
        self.mixers = nnx.List([make_mixer(key, D, N, layer=i, num_layers=count, **options) for i in range(count)])

    def __call__(self, x, **kwargs):
        carry = None
        for mixer in self.mixers:
            y, carry = mixer.thread(x, carry, **kwargs)
            x = x + y
        return x

    def init_cache(self, batch, length, **kwargs):
        return [mixer.init_cache(batch, length, **kwargs) for mixer in self.mixers]

    def _decode(self, method, x, caches, **kwargs):
        carry, new = None, []
        for mixer, cache in zip(self.mixers, caches, strict=True):
            y, cache, carry = getattr(mixer, method)(x, cache, carry, **kwargs)
            x = x + y
            new.append(cache)
        return x, new

    def prefill(self, x, caches, **kwargs):
        return self._decode("thread_prefill", x, caches, **kwargs)

    def step(self, x, caches):
        return self._decode("thread_step", x, caches)

    def reorder_cache(self, caches, rows):
        return [m.reorder_cache(cache, rows) for m, cache in zip(self.mixers, caches, strict=True)]


@functools.cache
def tower(key: str, causal: bool = True, dtype: Any = None) -> Tower:
    return Tower(key, causal=causal, dtype=dtype)


def tokens(seed: int = 0, batch: int = B, length: int = T) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, length, D))


@nnx.jit
def run(model, x, mask=None, memory=None):
    return model(x, mask=mask) if memory is None else model(x, mask=mask, memory=memory)


@nnx.jit
def prefill(model, x, cache, lengths=None, mask=None):
    return model.prefill(x, cache, lengths=lengths, mask=mask)


@nnx.jit
def step(model, x, cache):
    return model.step(x, cache)


def causals(cls: type[Mixer]) -> tuple[bool, ...]:
    return (True, False) if cls.bidirectional else (True,)


@having()
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shape_and_dtype(key, dtype):
    for causal in causals(MIXERS[key]):
        y = run(tower(key, causal, dtype), tokens().astype(dtype))
        assert y.shape == (B, T, D)
        assert y.dtype == dtype
        assert bool(jnp.isfinite(y).all())


@having()
def test_bfloat16_is_near_float32(key):
    y, low = (run(tower(key, True, dtype), tokens().astype(dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    np.testing.assert_allclose(low.astype(jnp.float32), y, atol=0.1, rtol=0.1)


@having()
def test_compiled_equals_eager(key):
    model, x = tower(key), tokens()
    np.testing.assert_allclose(run(model, x), model(x), atol=COMPILED, rtol=COMPILED)


@having()
def test_gradients_are_finite(key):
    graphdef, params, rest = nnx.split(tower(key), nnx.Param, ...)

    @jax.jit
    def gradient(params, rest, x):
        return jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest, copy=True)(x) ** 2))(params)

    gradients = nnx.to_flat_state(gradient(params, rest, tokens()))
    assert gradients
    for path, leaf in gradients:
        assert bool(jnp.isfinite(leaf[...]).all()), path


@having()
def test_every_parameter_names_its_axes(key):
    for path, leaf in nnx.to_flat_state(nnx.state(tower(key), nnx.Param)):
        names = axis_names(leaf)
        assert names is not None, path
        assert len(names) == leaf.ndim, (path, names, leaf.shape)


@having()
def test_the_past_does_not_see_the_future(key):
    model, x = tower(key), tokens()
    y = run(model, x)
    for t in (1, T // 2, T - 1):
        changed = run(model, x.at[:, t:].set(tokens(1)[:, t:]))
        np.testing.assert_array_equal(changed[:, :t], y[:, :t])
        assert not np.allclose(changed[:, t], y[:, t], atol=1e-3)


@having(batch_independent=True)
def test_rows_do_not_see_each_other(key):
    model, x = tower(key), tokens()
    np.testing.assert_array_equal(run(model, x.at[1].set(tokens(1)[1]))[0], run(model, x)[0])


@having(padding_invariant=True)
def test_padding_does_not_matter(key):
    x, lengths = tokens(), jnp.array([T - 3, T])
    real = jnp.arange(T) < lengths[:, None]
    other = jnp.where(real[..., None], x, tokens(1))
    for causal in causals(MIXERS[key]):
        y, changed = (run(tower(key, causal), inputs, Lengths(lengths)) for inputs in (x, other))
        np.testing.assert_array_equal(changed[real], y[real])


@having(decodes=True)
def test_steps_equal_prefill_equal_full(key):
    model, x = tower(key), tokens()
    full = run(model, x)
    whole, _ = prefill(model, x, model.init_cache(B, T))
    np.testing.assert_allclose(whole, full, atol=STEPWISE, rtol=STEPWISE)
    for prefix in (0, T - 3):
        cache, outputs = model.init_cache(B, T), []
        if prefix:
            y, cache = prefill(model, x[:, :prefix], cache)
            outputs.append(y)
        for t in range(prefix, T):
            y, cache = step(model, x[:, t : t + 1], cache)
            outputs.append(y)
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=STEPWISE, rtol=STEPWISE)


@having(bidirectional=True)
def test_a_mask_may_stand_in_place_of_the_causal_one(key):
    """A causal mixer reads a prefix both ways; the mask alone, beside the causal one, changes nothing."""
    model, x = tower(key), tokens()
    prefixes = Causal() | Prefix(jnp.array([3, 5]))
    y = run(model, x, Instead(prefixes))
    np.testing.assert_allclose(run(model, x, prefixes), run(model, x), atol=COMPILED, rtol=COMPILED)
    assert (abs(run(model, x.at[:, 2].set(0.0), Instead(prefixes)) - y)[:, 0].max(-1) > 1e-4).all()
    np.testing.assert_array_equal(run(model, x.at[:, 5:].set(0.0), Instead(prefixes))[:, :5], y[:, :5])
    if MIXERS[key].decodes:
        first, cache = prefill(model, x[:, : T - 1], model.init_cache(B, T), None, Instead(prefixes))
        last, _ = step(model, x[:, T - 1 :], cache)
        np.testing.assert_allclose(jnp.concatenate([first, last], axis=1), y, atol=STEPWISE, rtol=STEPWISE)


@having(decodes=True, padding_invariant=True)
def test_rows_of_different_lengths_go_on_where_they_end(key):
    model, x = tower(key), tokens()
    full = run(model, x)
    lengths = jnp.array([T - 5, T - 2])
    y, cache = prefill(model, x[:, : T - 2], model.init_cache(B, T), lengths)
    for row, length in enumerate(lengths.tolist()):
        np.testing.assert_allclose(y[row, :length], full[row, :length], atol=STEPWISE, rtol=STEPWISE)
    for i in range(2):
        at = lengths + i
        y, cache = step(model, x[jnp.arange(B), at][:, None], cache)
        np.testing.assert_allclose(y[:, 0], full[jnp.arange(B), at], atol=STEPWISE, rtol=STEPWISE)


@having(decodes=True)
def test_caches_follow_their_rows(key):
    model, x = tower(key), tokens()
    _, cache = prefill(model, x[:, : T - 3], model.init_cache(B, T))
    y, _ = step(model, x[:, T - 3 : T - 2], cache)
    swapped, _ = step(model, x[::-1, T - 3 : T - 2], model.reorder_cache(cache, jnp.array([1, 0])))
    np.testing.assert_allclose(swapped, y[::-1], atol=STEPWISE, rtol=STEPWISE)


@having(crosses=True)
def test_cross_attention(key):
    x, memory = tokens(), tokens(2, length=T + 3)
    model = tower(key, False)
    y = run(model, x, None, memory)
    assert y.shape == x.shape
    assert not np.allclose(y, run(model, x, None, memory[:, ::2]))
    # The queries do not see each other.
    np.testing.assert_array_equal(run(model, x.at[:, 3:].set(0.0), None, memory)[:, :3], y[:, :3])
    with pytest.raises(ValueError, match="memory"):
        tower(key, True)(x, memory=memory)


@having(crosses=True, decodes=True)
def test_a_cached_memory_equals_the_memory(key):
    x, memory = tokens(), tokens(2, length=T + 3)
    lengths = jnp.array([T, T + 3])
    real = jnp.arange(T + 3) < lengths[:, None]
    model = tower(key, False)
    full = run(model, x, Lengths(lengths), memory)
    cache = model.init_cache(B, T, memory=memory, memory_mask=real)
    y, cache = prefill(model, x[:, :5], cache)
    z, cache = step(model, x[:, 5:6], cache)
    np.testing.assert_allclose(jnp.concatenate([y, z], axis=1), full[:, :6], atol=STEPWISE, rtol=STEPWISE)


@having(bidirectional=False)
def test_causal_by_nature_is_said(key):
    with pytest.raises(ValueError, match="causal"):
        Tower(key, causal=False)


@having(bidirectional=True, decodes=True)
def test_decoding_needs_causality(key):
    with pytest.raises(ValueError, match="causal"):
        tower(key, False).init_cache(B, T)


@having()
def test_heads_that_do_not_divide_are_refused(key):
    with pytest.raises(ValueError, match="5 heads"):
        make_mixer(key, D, 5, causal=True, rngs=nnx.Rngs(0))


RULES = {"embed": "data", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "head_dim": None}


def placed(state: nnx.State, mesh: jax.sharding.Mesh) -> nnx.State:
    """Parameters divided over the mesh by their names; a side that does not divide stays whole."""
    with logical_axis_rules(tuple(RULES.items())):
        specs = nnx.get_named_sharding(state, mesh)

    def place(leaf, sharding):
        spec = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for size, axis in zip(leaf.shape, (*sharding.spec, *[None] * leaf.ndim), strict=False)
        ]
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state, specs)


@having()
def test_sharded_equals_whole(key):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x = tokens(batch=4)
    whole = run(tower(key), x)
    graphdef, params, rest = nnx.split(tower(key), nnx.Param, ...)
    params = placed(params, mesh)
    rest = jax.device_put(rest, NamedSharding(mesh, PartitionSpec()))
    shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    y = jax.jit(lambda p, r, x: nnx.merge(graphdef, p, r, copy=True)(x))(params, rest, shared)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(y, whole, atol=COMPILED, rtol=COMPILED)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@having()
def test_compiles_for_tpu(key):
    from jax.experimental import topologies

    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def abstract(tree):
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)

    graphdef, state = nnx.split(tower(key))
    jax.jit(lambda s, x: nnx.merge(graphdef, s)(x)).trace(abstract(state), abstract(tokens())).lower(
        lowering_platforms=("tpu",)
    ).compile()


@having(packs=True)
def test_packed_documents_do_not_see_each_other(key):
    """Under `Segments` and with positions that begin anew, a document is what it is alone; causal, as in a packed row."""
    model, x = tower(key), tokens(3)
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]] * B)
    positions = jnp.array([0, 1, 2, 0, 1, 2, 3, 4] * B).reshape(B, T)

    @nnx.jit
    def packed(model, x):
        return model(x, mask=Segments(segments), positions=positions)

    y = packed(model, x)
    np.testing.assert_array_equal(packed(model, x.at[:, :3].add(1.0))[:, 3:], y[:, 3:])
    np.testing.assert_allclose(y[:, :3], run(model, x[:, :3]), atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(y[:, 3:], run(model, x[:, 3:]), atol=2e-5, rtol=2e-5)
