"""Position-wise feed-forward networks."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from attnzoo.errors import unknown
from attnzoo.nn.linear import dropout, linear

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
}


class MLP(nnx.Module):
    """act(x W1 + b1) W2 + b2 (Vaswani et al. 2017, eq. 2, with act = ReLU).

    activation: "relu", "gelu", "silu" or "quick_gelu". dropout_rate: on the hidden units.
    options: dtype, param_dtype, precision, kernel_init, as in `nn.linear.linear`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: str = "gelu",
        use_bias: bool = True,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if activation not in _ACTIVATIONS:
            raise unknown("activation", activation, _ACTIVATIONS)
        self.activation = activation
        self.up = linear(dim, hidden, ("embed", "mlp"), use_bias=use_bias, rngs=rngs, **options)
        self.down = linear(hidden, dim, ("mlp", "embed"), use_bias=use_bias, rngs=rngs, **options)
        self.dropout = dropout(dropout_rate, rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(self.dropout(_ACTIVATIONS[self.activation](self.up(x))))


class SwiGLU(nnx.Module):
    """(silu(x Wg) ⊙ x Wu) Wd (Shazeer 2020, arXiv 2002.05202). Arguments as in `MLP`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        self.gate = linear(dim, hidden, ("embed", "mlp"), use_bias=use_bias, rngs=rngs, **options)
        self.up = linear(dim, hidden, ("embed", "mlp"), use_bias=use_bias, rngs=rngs, **options)
        self.down = linear(hidden, dim, ("mlp", "embed"), use_bias=use_bias, rngs=rngs, **options)
        self.dropout = dropout(dropout_rate, rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(self.dropout(jax.nn.silu(self.gate(x)) * self.up(x)))


def feed_forward(kind: str, dim: int, hidden: int | None = None, **options: Any) -> MLP | SwiGLU:
    """The network named `kind`: "relu", "gelu", "silu", "quick_gelu" or "swiglu".

    hidden: F; by default 4·D, or 8/3·D rounded up to a multiple of 8 for "swiglu", which has three matrices.
    """
    if kind == "swiglu":
        return SwiGLU(dim, hidden or -(-8 * dim // 24) * 8, **options)
    if kind not in _ACTIVATIONS:
        raise unknown("mlp", kind, [*_ACTIVATIONS, "swiglu"])
    return MLP(dim, hidden or 4 * dim, activation=kind, **options)
