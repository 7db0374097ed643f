"""The encoder-decoder Transformer of Vaswani et al. 2017, with a slot for the mixer of its self-attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cells import Known
from attnzoo.core.masks import Array as ArrayMask
from attnzoo.core.masks import Mask
from attnzoo.models.factory import make_mixer
from attnzoo.models.layers import AbsolutePositions, Arguments, LayerConfig, layer_maker
from attnzoo.models.lm import ModelCache
from attnzoo.nn.embed import Embed, Readout
from attnzoo.nn.linear import dropout
from attnzoo.nn.mixer import Mixer
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(LayerConfig):
    """An encoder-decoder; further fields as in `LayerConfig`. The defaults are the paper's base model (§3).

    vocab_size: V of the target; source_vocab_size: of the source, V by default.
    share_embeddings: one table for source, target and the readout (§3.4); needs equal vocabularies.
    num_layers: of the decoder; num_encoder_layers: of the encoder, num_layers by default.
    encoder_positions: as `positions`, which it is by default, for the encoder alone.
    cross: key of the exhibit between the two; cross_args: its own arguments.
    max_length: positions that can be told apart with positions="learned".
    """

    vocab_size: int = 37_000
    source_vocab_size: int | None = None
    share_embeddings: bool = True
    dim: int = 512
    num_layers: int = 6
    num_encoder_layers: int | None = None
    num_heads: int = 8
    mlp: str = "relu"
    use_bias: bool = True
    norm: str = "layer"
    norm_first: bool = False
    positions: str = "sinusoidal"
    encoder_positions: str | None = None
    dropout_rate: float = 0.1
    cross: str = "transformer"
    cross_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    max_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "cross_args", Arguments(self.cross_args))
        source = self.source_vocab_size
        if self.share_embeddings and source not in (None, self.vocab_size):
            raise ValueError(
                f"share_embeddings: one table needs one vocabulary, got source_vocab_size={source} and "
                f"vocab_size={self.vocab_size}; set share_embeddings=False"
            )


class Transformer(nnx.Module):
    """source [B, S], target [B, T] -> logits [B, T, V] in float32, of the token after each target token.

    Decoding: `cache = model.init_cache(source, length, source_mask=...)` encodes the source and computes its
    keys and values once;
    `prefill` and `step` then work as in `DecoderLM`, and so do greedy, sample and beam_search.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, dtypes = config.dim, config.dtypes
        encoder = dataclasses.replace(
            config,
            num_layers=config.num_encoder_layers or config.num_layers,
            positions=config.encoder_positions or config.positions,
        )

        def table(size: int) -> Embed:
            return Embed(size, dim, rngs=rngs, **dtypes)

        def final_norm() -> nnx.Module | None:
            return norm(config.norm, dim, rngs=rngs, **dtypes) if config.norm_first else None

        def cross() -> Mixer:
            return make_mixer(config.cross, dim, config.num_heads, rngs=rngs, **dtypes, **config.cross_args)

        self.embed = table(config.vocab_size)
        own_source = not config.share_embeddings
        self.source_embed = table(config.source_vocab_size or config.vocab_size) if own_source else None
        self.readout = Readout(dim, config.vocab_size, rngs=rngs, **dtypes) if own_source else None
        self.source_positions, self.positions = (
            AbsolutePositions(c.positions, config.max_length, dim, rngs=rngs, **dtypes) for c in (encoder, config)
        )
        options: dict[str, Any] = {"scan": config.scan_layers, "remat": config.remat}
        self.encoder = Stack(layer_maker(encoder, rngs, causal=False), encoder.num_layers, **options)
        self.encoder_norm = final_norm()
        decoder_layer = layer_maker(config, rngs, causal=True, make_cross=cross)
        self.decoder = Stack(decoder_layer, config.num_layers, **options)
        self.decoder_norm = final_norm()
        self.dropout = dropout(config.dropout_rate, rngs)

    def encode(self, source: Int[Array, "B S"], *, source_mask: Bool[Array, "B S"] | None = None) -> Float[Array, "B S D"]:
        """What the decoder attends to. source_mask: True at real tokens."""
        embed = self.embed if self.source_embed is None else self.source_embed
        x = self.source_positions(embed(source), np.arange(source.shape[-1]))
        x = self.encoder(self.dropout(x), mask=_of_keys(source_mask, source.shape))
        return x if self.encoder_norm is None else self.encoder_norm(x)

    def __call__(
        self,
        source: Int[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        source_mask: Bool[Array, "B S"] | None = None,
        mask: Any = None,
    ) -> Float[Array, "B T V"]:
        """mask: of the decoder's self-attention, combined with the causal one (packing, say), or in its place
        (`core.masks.Instead`)."""
        memory = self.encode(source, source_mask=source_mask)
        x = self.decoder(
            self._embed(target, np.arange(target.shape[-1])),
            mask=mask,
            memory=memory,
            memory_mask=_of_keys(source_mask, source.shape),
        )
        return self._logits(x)

    def _embed(self, target: Int[Array, "B T"], positions: Int[Known, "..."]) -> Float[Array, "B T D"]:
        return self.dropout(self.positions(self.embed(target), positions))

    def _logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        x = x if self.decoder_norm is None else self.decoder_norm(x)
        return (self.embed if self.readout is None else self.readout).attend(x)

    def init_cache(
        self,
        source: Int[Array, "B S"],
        length: int,
        *,
        source_mask: Bool[Array, "B S"] | None = None,
        dtype: DTypeLike | None = None,
    ) -> ModelCache:
        """Room for `length` target tokens, and the encoded source."""
        memory = self.encode(source, source_mask=source_mask)
        batch = source.shape[0]
        layers = self.decoder.init_cache(batch, length, dtype=dtype, memory=memory, memory_mask=source_mask)
        return ModelCache(layers, jnp.zeros(batch, jnp.int32))

    def prefill(
        self, target: Int[Array, "B T"], cache: ModelCache, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T V"], ModelCache]:
        """(logits, cache) of T more target tokens; lengths [B] are the real tokens of right-padded rows."""
        length = target.shape[-1]
        x = self._embed(target, cache.seen[:, None] + jnp.arange(length))
        x, layers = self.decoder.prefill(x, cache.layers, lengths=lengths)
        return self._logits(x), ModelCache(layers, cache.seen + (length if lengths is None else lengths))

    def step(self, target: Int[Array, "B 1"], cache: ModelCache) -> tuple[Float[Array, "B 1 V"], ModelCache]:
        """(logits, cache) of one more target token per row."""
        x, layers = self.decoder.step(self._embed(target, cache.seen[:, None]), cache.layers)
        return self._logits(x), ModelCache(layers, cache.seen + 1)

    def reorder_cache(self, cache: ModelCache, rows: Int[Array, "R"]) -> ModelCache:
        """Row i of the result is row `rows[i]` of `cache`, the encoded source included."""
        return ModelCache(self.decoder.reorder_cache(cache.layers, rows), cache.seen[rows])


def _of_keys(real: Bool[Array, "B S"] | None, shape: tuple[int, ...]) -> Mask | None:
    if real is None:
        return None
    if real.shape != shape:
        raise ValueError(f"source_mask: one entry per source token is needed: {shape}, got {real.shape}")
    return ArrayMask(real[:, None, None, :])
