"""A decoder-only language model with a slot for the mixer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.core.cells import Known
from attnzoo.models.layers import AbsolutePositions, LayerConfig, layer_maker
from attnzoo.nn.block import Block
from attnzoo.nn.embed import Embed, Readout
from attnzoo.nn.linear import dropout
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig(LayerConfig):
    """A language model; further fields as in `LayerConfig`.

    vocab_size: V. max_length: positions that can be told apart with positions="learned".
    tie_embeddings: read out with the embedding table.
    """

    vocab_size: int = 256
    max_length: int = 1024
    tie_embeddings: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelCache:
    """What decoding remembers: caches of the layers, and the tokens each row has seen [B]."""

    layers: list[PyTree]
    seen: Int[Array, "B"]


class DecoderLM(nnx.Module):
    """tokens [B, T] -> logits [B, T, V] in float32.

    `model.train()` and `model.eval()` switch dropout. Decoding is pure: caches go in and come out.
    """

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, dtypes = config.dim, config.dtypes
        self.embed = Embed(config.vocab_size, dim, rngs=rngs, **dtypes)
        self.positions = AbsolutePositions(config.positions, config.max_length, dim, rngs=rngs, **dtypes)
        self.dropout = dropout(config.dropout_rate, rngs)
        self.layers = Stack(
            self.layer_maker(config, rngs),
            config.num_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        self.norm = norm(config.norm, dim, rngs=rngs, **dtypes) if config.norm_first else None
        self.readout = None if config.tie_embeddings else Readout(dim, config.vocab_size, rngs=rngs, **dtypes)

    def layer_maker(self, config: LMConfig, rngs: nnx.Rngs) -> Callable[[int], Block]:
        """i -> layer i; models of other layers than `Block` override this."""
        return layer_maker(config, rngs, causal=True)

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Known, "..."]) -> Float[Array, "B T D"]:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens: expected integers [B, T], got {tokens.dtype} {tokens.shape}")
        return self.dropout(self.positions(self.embed(tokens), positions))

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = x if self.norm is None else self.norm(x)
        return (self.embed if self.readout is None else self.readout).attend(x)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
    ) -> Float[Array, "B T V"]:
        """mask: combined with the causal one, or in its place (`core.masks.Instead`). positions: [T] or [B, T], 0, 1, ... by
        default."""
        where = np.arange(tokens.shape[-1]) if positions is None else positions
        return self._logits(self.layers(self._embed(tokens, where), mask=mask, positions=positions))

    def init_cache(self, batch: int, length: int, *, dtype: DTypeLike | None = None) -> ModelCache:
        """Room for `length` tokens, prompt and generated ones together."""
        return ModelCache(self.layers.init_cache(batch, length, dtype=dtype), jnp.zeros(batch, jnp.int32))

    def prefill(
        self, tokens: Int[Array, "B T"], cache: ModelCache, lengths: Int[Array, "B"] | None = None, *, mask: Any = None
    ) -> tuple[Float[Array, "B T V"], ModelCache]:
        """(logits, cache) of T more tokens per row; lengths [B] are the real tokens of right-padded rows.

        mask: as in a call, compared by position. What one token sees ahead of it must come in the same call.
        """
        length = tokens.shape[-1]
        x = self._embed(tokens, cache.seen[:, None] + jnp.arange(length))
        x, layers = self.layers.prefill(x, cache.layers, lengths=lengths, mask=mask)
        seen = cache.seen + (length if lengths is None else lengths)
        return self._logits(x), ModelCache(layers, seen)

    def step(self, tokens: Int[Array, "B 1"], cache: ModelCache) -> tuple[Float[Array, "B 1 V"], ModelCache]:
        """(logits, cache) of one more token per row."""
        x, layers = self.layers.step(self._embed(tokens, cache.seen[:, None]), cache.layers)
        return self._logits(x), ModelCache(layers, cache.seen + 1)

    def reorder_cache(self, cache: ModelCache, rows: Int[Array, "R"]) -> ModelCache:
        """Row i of the result is row `rows[i]` of `cache`."""
        return ModelCache(self.layers.reorder_cache(cache.layers, rows), cache.seen[rows])
