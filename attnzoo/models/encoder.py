"""A bidirectional encoder of tokens."""

import dataclasses
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.core.masks import Lengths
from attnzoo.models.layers import AbsolutePositions, LayerConfig, layer_maker
from attnzoo.nn.embed import Embed
from attnzoo.nn.linear import dropout
from attnzoo.nn.mixer import both
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(LayerConfig):
    """An encoder; further fields as in `LayerConfig`.

    vocab_size: V. max_length: positions that can be told apart with positions="learned".
    """

    vocab_size: int = 256
    max_length: int = 1024


class Encoder(nnx.Module):
    """tokens [B, T] -> vectors [B, T, D]; with `readout` -> logits [B, T, V] by the embedding table.

    embed: an embedding shared with another part of a model; by default the encoder has its own.
    """

    def __init__(self, config: EncoderConfig, *, embed: Embed | None = None, rngs: nnx.Rngs):
        self.config = config
        dim, dtypes = config.dim, config.dtypes
        self.embed = Embed(config.vocab_size, dim, rngs=rngs, **dtypes) if embed is None else embed
        self.positions = AbsolutePositions(config.positions, config.max_length, dim, rngs=rngs, **dtypes)
        self.dropout = dropout(config.dropout_rate, rngs)
        self.layers = Stack(
            layer_maker(config, rngs, causal=False),
            config.num_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        self.norm = norm(config.norm, dim, rngs=rngs, **dtypes) if config.norm_first else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        lengths: Int[Array, "B"] | None = None,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
    ) -> Float[Array, "B T D"]:
        """lengths: real tokens of right-padded rows. mask: who may see whom, besides."""
        where = np.arange(tokens.shape[-1]) if positions is None else positions
        x = self.dropout(self.positions(self.embed(tokens), where))
        if lengths is not None:
            mask = both(Lengths(lengths), mask)
        x = self.layers(x, mask=mask, positions=positions)
        return x if self.norm is None else self.norm(x)

    def readout(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits in float32 by the embedding table, for masked-token objectives."""
        return self.embed.attend(x)
