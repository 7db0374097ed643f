import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.sharding import AxisType, PartitionSpec

from attnzoo.nn.linear import (
    QKV,
    axis_names,
    dropout,
    dropout_arguments,
    head_counts,
    linear,
    merge_heads,
    parameter_count,
)

X = jax.random.normal(jax.random.key(0), (2, 3, 16))


def test_linear_over_several_axes():
    layer = linear((4, 4), (2, 3), ("heads", "head_dim", "embed", None), use_bias=True, rngs=nnx.Rngs(0))
    y = layer(X.reshape(2, 3, 4, 4))
    np.testing.assert_allclose(y, jnp.einsum("bthk,hkde->btde", X.reshape(2, 3, 4, 4), layer.kernel[...]), atol=1e-5)
    assert axis_names(layer.kernel) == ("heads", "head_dim", "embed", None)
    assert axis_names(layer.bias) == ("embed", None)


def test_names_do_not_need_a_mesh_and_become_shardings_under_one():
    layer = linear(16, (4, 2), ("embed", "heads", "head_dim"), rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = (("embed", "fsdp"), ("heads", "tensor"), ("head_dim", None))
    with logical_axis_rules(rules):
        specs = nnx.get_named_sharding(nnx.state(layer, nnx.Param), mesh)
    assert jax.tree.leaves(specs)[0].spec == PartitionSpec("fsdp", "tensor", None)


def test_a_name_per_axis_is_needed():
    with pytest.raises(ValueError, match="one name per kernel axis"):
        linear(16, (4, 2), ("embed", "heads"), rngs=nnx.Rngs(0))


def test_qkv_shapes():
    layer = QKV(16, 4, num_kv_heads=2, head_dim=6, value_dim=5, rngs=nnx.Rngs(0))
    q, k, v = layer(X, X[:, :2])
    assert (q.shape, k.shape, v.shape) == ((2, 3, 4, 6), (2, 2, 2, 6), (2, 2, 2, 5))
    assert merge_heads(4, 5, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 3, 4, 5))).shape == (2, 3, 16)
    assert parameter_count(layer) == 16 * (4 * 6 + 2 * 6 + 2 * 5)


def test_kernels_are_glorot_uniform_over_all_heads():
    layer = QKV(256, 8, rngs=nnx.Rngs(0))
    limit = (6 / (256 + 256)) ** 0.5
    assert float(jnp.abs(layer.query.kernel[...]).max()) == pytest.approx(limit, rel=0.01)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ((16, 3, None, None), "dim=16"),
        ((16, 4, 3, None), "num_kv_heads"),
        ((16, 0, None, None), "num_heads"),
        ((16, 4, None, 0), "head_dim: must be at least 1, got 0"),
        ((0, 4, None, None), "head_dim: must be at least 1, got 0"),
    ],
)
def test_head_counts_that_do_not_divide(counts, says):
    with pytest.raises(ValueError, match=says):
        head_counts(*counts)
    assert head_counts(16, 3, None, 5) == (3, 5)


def test_dropout_without_rate_holds_no_state():
    rngs = nnx.Rngs(0)
    none, some = dropout(0.0, rngs), dropout(0.5, rngs)
    assert not jax.tree.leaves(nnx.state(none))
    assert dropout_arguments(none) == {}
    assert dropout_arguments(some)["dropout_rate"] == 0.5
    some.eval()
    assert dropout_arguments(some) == {}
    with pytest.raises(ValueError, match="dropout_rate"):
        dropout(1.0, rngs)
