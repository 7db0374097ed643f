"""Linear maps with logical axis names, and dropout that costs nothing at rate 0."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Names = tuple[str | None, ...]
"""Logical axes of a parameter: embed, heads, kv_heads, head_dim, mlp, vocab, layers, or None."""

default_init = nnx.initializers.glorot_uniform()


def named(*axes: str | None) -> dict[str, Any]:
    """Metadata that gives a parameter its logical axis names.

    The names are only kept: which mesh axis each one means is decided where the model is sharded, so a module
    builds the same with and without a mesh.
    """
    return {"out_sharding": axes, "eager_sharding": False}


def axis_names(variable: nnx.Variable) -> Names | None:
    """The logical names of a variable's axes, or None if it was given none."""
    return variable.get_metadata().get("out_sharding")


def linear(
    features_in: int | Sequence[int],
    features_out: int | Sequence[int],
    axes: Names,
    *,
    use_bias: bool = False,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    precision: Any = None,
    kernel_init: nnx.Initializer = default_init,
    rngs: nnx.Rngs,
) -> nnx.LinearGeneral:
    """A linear map over the last axes: [..., *features_in] -> [..., *features_out].

    axes: logical names of the kernel's axes, those of features_in first.
    """
    ins = (features_in,) if isinstance(features_in, int) else tuple(features_in)
    outs = (features_out,) if isinstance(features_out, int) else tuple(features_out)
    if len(axes) != len(ins) + len(outs):
        raise ValueError(f"axes: one name per kernel axis is needed: {(*ins, *outs)} has {axes}")
    return nnx.LinearGeneral(
        ins,
        outs,
        axis=tuple(range(-len(ins), 0)),
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        kernel_init=kernel_init,
        kernel_metadata=named(*axes),
        bias_metadata=named(*axes[len(ins) :]),
        rngs=rngs,
    )


def head_counts(dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """(K, H) with their defaults: K = N, H = D / N.

    Raises ValueError when the heads do not divide the width, or the kv heads the heads, and for heads without features.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: must be at least 1, got {num_heads}")
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} heads do not divide dim={dim}; choose a divisor, or give head_dim")
        head_dim = dim // num_heads
    if head_dim < 1:
        raise ValueError(f"head_dim: must be at least 1, got {head_dim}")
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads} key/value heads do not divide num_heads={num_heads} query heads")
    return num_kv_heads, head_dim


class QKV(nnx.Module):
    """Queries, keys and values by heads: x [B, T, D] -> q [B, T, N, H], k [B, T, K, H], v [B, T, K, Hv].

    num_kv_heads: K, N by default. head_dim: H, D / N by default. value_dim: Hv, H by default.
    The three kernels are [D, heads, width]; `query`, `key`, `value` may be called one by one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: nnx.Initializer = default_init,
        rngs: nnx.Rngs,
    ):
        kv_heads, head_dim = head_counts(dim, num_heads, num_kv_heads, head_dim)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.value_dim = head_dim if value_dim is None else value_dim

        def heads(count: int, width: int, name: str) -> nnx.LinearGeneral:
            return linear(
                dim,
                (count, width),
                ("embed", name, "head_dim"),
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.query = heads(num_heads, head_dim, "heads")
        self.key = heads(kv_heads, head_dim, "kv_heads")
        self.value = heads(kv_heads, self.value_dim, "kv_heads")

    def __call__(
        self, x: Float[Array, "B T D"], memory: Float[Array, "B S D"] | None = None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """Keys and values come from `memory` where it is given."""
        source = x if memory is None else memory
        return self.query(x), self.key(source), self.value(source)


def merge_heads(num_heads: int, head_dim: int, dim: int, *, use_bias: bool = False, **options: Any) -> nnx.LinearGeneral:
    """The output projection [B, T, N, H] -> [B, T, D]; options as in `linear`."""
    return linear((num_heads, head_dim), dim, ("heads", "head_dim", "embed"), use_bias=use_bias, **options)


def dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    """nnx.Dropout that holds no random state when its rate is 0.

    Raises ValueError for a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate: must be in [0, 1), got {rate}")
    return nnx.Dropout(rate, rngs=rngs if rate else None)


def dropout_arguments(layer: nnx.Dropout) -> dict[str, Any]:
    """`core.attention`'s dropout arguments for a layer that drops attention weights; empty in eval mode."""
    if layer.deterministic or layer.rate == 0:
        return {}
    return {"dropout_rate": layer.rate, "dropout_rng": layer.rngs()}


def parameter_count(module: nnx.Module) -> int:
    """How many numbers the parameters of a module hold."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
