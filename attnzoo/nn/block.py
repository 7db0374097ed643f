"""The residual layer of a Transformer: token mixing, cross-attention, feed-forward."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.nn.linear import dropout
from attnzoo.nn.mixer import Mixer
from attnzoo.nn.norms import norm as make_norm


class Block(nnx.Module):
    """x [B, T, D] -> [B, T, D]: each part in a residual connection with a norm.

    mixer: mixes the tokens of x. feed_forward: works on each token.
    cross: a mixer with the trait `crosses`, between the two, or None.
    norm: "rms" or "layer". norm_first: x + f(norm(x)) (pre-norm), else norm(x + f(x)) as Vaswani et al. 2017.
    dropout_rate: on the output of each part before it is added.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        feed_forward: nnx.Module,
        *,
        cross: Mixer | None = None,
        norm: str = "rms",
        norm_first: bool = True,
        dropout_rate: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def norm_layer() -> nnx.Module:
            return make_norm(norm, dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        if cross is not None and not cross.crosses:
            raise ValueError(f"cross: {type(cross).__name__} takes no memory (its trait `crosses` is False)")
        self.mixer = mixer
        self.mixer_norm = norm_layer()
        self.cross: Any = cross
        self.cross_norm: Any = None if cross is None else norm_layer()
        self.feed_forward = feed_forward
        self.feed_forward_norm = norm_layer()
        self.norm_first = norm_first
        self.dropout = dropout(dropout_rate, rngs)

    @property
    def carries(self) -> bool:
        return self.mixer.carries

    def _residual(self, norm: Callable, x: Array, f: Callable) -> tuple[Array, Any]:
        y, extra = f(norm(x) if self.norm_first else x)
        x = x + self.dropout(y)
        return (x if self.norm_first else norm(x)), extra

    def _layer(self, x: Array, mix: Callable, cross: Callable | None) -> tuple[Array, Any, Any]:
        """The three parts in order; `mix` and `cross` return an extra beside the output."""
        x, mixed = self._residual(self.mixer_norm, x, mix)
        crossed = None
        if cross is not None:
            x, crossed = self._residual(self.cross_norm, x, cross)
        x, _ = self._residual(self.feed_forward_norm, x, lambda h: (self.feed_forward(h), None))
        return x, mixed, crossed

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carry: PyTree = None,
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
        memory: Float[Array, "B S D"] | None = None,
        memory_mask: Any = None,
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """(x, carry). memory_mask: who may see whom in cross-attention, as a mixer's `mask`."""
        cross = None
        if self.cross is not None:
            if memory is None:
                raise ValueError("memory: this layer attends to another sequence [B, S, D]; none was given")

            def cross(h: Array) -> tuple[Array, None]:
                return self.cross(h, memory=memory, mask=memory_mask), None

        x, carry, _ = self._layer(x, lambda h: self.mixer.thread(h, carry, mask=mask, positions=positions), cross)
        return x, carry

    def init_cache(
        self,
        batch: int,
        length: int,
        *,
        dtype: DTypeLike | None = None,
        memory: Float[Array, "B S D"] | None = None,
        memory_mask: Array | None = None,
    ) -> dict[str, PyTree]:
        """{"mixer": ..., "cross": ...}, every leaf with the rows on its first axis."""
        cache = {"mixer": self.mixer.init_cache(batch, length, dtype=dtype)}
        if self.cross is not None:
            cache["cross"] = self.cross.init_cache(batch, length, dtype=dtype, memory=memory, memory_mask=memory_mask)
        return cache

    def prefill(
        self, x: Float[Array, "B T D"], cache: dict[str, PyTree], carry: PyTree = None, **kwargs: Any
    ) -> tuple[Float[Array, "B T D"], dict[str, PyTree], PyTree]:
        """(x, cache, carry); options as in `Mixer.prefill`."""
        return self._decode(self.mixer.thread_prefill, x, cache, carry, **kwargs)

    def step(
        self, x: Float[Array, "B 1 D"], cache: dict[str, PyTree], carry: PyTree = None
    ) -> tuple[Float[Array, "B 1 D"], dict[str, PyTree], PyTree]:
        """(x, cache, carry) for one more token per row."""
        return self._decode(self.mixer.thread_step, x, cache, carry)

    def _decode(self, mix: Callable, x: Array, cache: dict[str, PyTree], carry: PyTree, **kwargs: Any):
        def mixed(h: Array) -> tuple[Array, Any]:
            y, *rest = mix(h, cache["mixer"], carry, **kwargs)
            return y, rest

        cross = None
        if self.cross is not None:

            def cross(h: Array) -> tuple[Array, Any]:
                return self.cross.prefill(h, cache["cross"])

        x, (mixer_cache, carry), cross_cache = self._layer(x, mixed, cross)
        new = {"mixer": mixer_cache}
        if cross is not None:
            new["cross"] = cross_cache
        return x, new, carry

    def reorder_cache(self, cache: dict[str, PyTree], rows: Int[Array, "R"]) -> dict[str, PyTree]:
        """Row i of the result is row `rows[i]` of `cache`."""
        parts = {"mixer": self.mixer, "cross": self.cross}
        return {name: parts[name].reorder_cache(part, rows) for name, part in cache.items()}
