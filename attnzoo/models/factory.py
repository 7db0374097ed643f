"""From a key to a mixer: how models fill their slot for the mechanism."""

import inspect
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from attnzoo import catalog
from attnzoo.errors import unknown
from attnzoo.nn.mixer import Mixer


def make_mixer(
    key: str,
    dim: int,
    num_heads: int,
    *,
    layer: int = 0,
    num_layers: int = 1,
    causal: bool = False,
    positions: Any = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **mixer_args: Any,
) -> Mixer:
    """The drop-in of exhibit `key` for layer `layer` of `num_layers`.

    mixer_args: the class' own arguments, e.g. num_kv_heads=2.
    Raises ValueError for an unknown key, an argument that the class does not take (naming those it does), or
    causal=False for one that is always causal.
    """
    cls: Any = catalog.mixer(key)
    if not causal and not cls.bidirectional:
        raise ValueError(f"mixer {key!r} is causal by nature and cannot be used with causal=False")
    own = accepted_arguments(cls)
    for name in mixer_args:
        if name not in own:
            raise unknown(f"argument of mixer {key!r}:", name, own)
    if cls.layered:
        mixer_args = {**mixer_args, "layer": layer, "num_layers": num_layers}
    return cls(
        dim,
        num_heads,
        causal=causal,
        positions=positions,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        **mixer_args,
    )


_SHARED = {"self", "dim", "num_heads", "layer", "num_layers"} | {
    "causal", "positions", "dtype", "param_dtype", "rngs"
}  # fmt: skip


def accepted_arguments(cls: type[Mixer]) -> dict[str, inspect.Parameter]:
    """A mixer class' own arguments, without those that every mixer shares.

    A constructor that passes `**options` on to its base class accepts the base's arguments too.
    """
    own: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for name, parameter in parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD and name not in _SHARED:
                own.setdefault(name, parameter)
        if not passes_on:
            break
    return own
