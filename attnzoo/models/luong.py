"""The recurrent encoder-decoder of Luong et al. 2015 (arXiv 1508.04025), with a slot for its attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.errors import unknown
from attnzoo.models.layers import Arguments
from attnzoo.nn.embed import Embed, Readout
from attnzoo.nn.linear import named
from attnzoo.zoo.alignment.luong_attention import GlobalAttention, LocalMonotonicAttention, LocalPredictiveAttention

ATTENTIONS: dict[str, type[GlobalAttention] | None] = {
    "global": GlobalAttention,
    "local-m": LocalMonotonicAttention,
    "local-p": LocalPredictiveAttention,
    "none": None,
}

State = tuple[Float[Array, "B D"], Float[Array, "B D"]]
"""(c, h) of one LSTM layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LuongConfig:
    """A recurrent encoder-decoder.

    vocab_size: V of the target; source_vocab_size: of the source, V by default.
    dim: D, of all states. embed_dim: E, D by default. num_layers: L, of the encoder and of the decoder.
    attention: "global", "local-m", "local-p", or "none" (the decoder then knows the source by its first state alone).
    attention_args: its own arguments, e.g. {"score": "dot"}.
    input_feeding: whether the attentional state of a step is part of the next step's input.

    Raises ValueError for an unknown attention, arguments for none, and fewer than one layer.
    """

    vocab_size: int
    source_vocab_size: int | None = None
    dim: int = 64
    embed_dim: int | None = None
    num_layers: int = 1
    attention: str = "global"
    attention_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    input_feeding: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise unknown("attention", self.attention, ATTENTIONS)
        if self.attention == "none" and self.attention_args:
            raise ValueError(f"attention_args: attention 'none' takes none, got {dict(self.attention_args)}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers: must be at least 1, got {self.num_layers}")
        object.__setattr__(self, "attention_args", Arguments(self.attention_args))

    @property
    def dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LuongCache:
    """What decoding remembers: the LSTM states, the last attentional state h~, the source's states with a mask that is True
    at its real tokens, what a "concat" score makes of them, and the target tokens each row has seen."""

    states: list[State]
    attentional: Float[Array, "B D"]
    source: Float[Array, "B S D"]
    source_mask: Bool[Array, "B S"]
    of_source: Float[Array, "B S A"] | None
    seen: Int[Array, "B"]


class LSTM(nnx.Module):
    """A stack of LSTM layers, one step at a time: ([(c, h), ...], x [B, in]) -> (states, h of the last layer)."""

    def __init__(self, features_in: int, dim: int, num_layers: int, *, rngs: nnx.Rngs, **dtypes: Any):
        names: dict[str, Any] = {
            "kernel_metadata": named("embed", "mlp"),
            "recurrent_kernel_metadata": named("embed", "mlp"),
            "bias_metadata": named("mlp"),
        }
        self.dim = dim
        self.cells = nnx.List(
            [
                nnx.OptimizedLSTMCell(dim if layer else features_in, dim, rngs=rngs, **names, **dtypes)
                for layer in range(num_layers)
            ]
        )

    def zeros(self, batch: int, dtype: DTypeLike) -> list[State]:
        """The states before the first step."""
        return [(jnp.zeros((batch, self.dim), dtype),) * 2 for _ in self.cells]

    def __call__(self, states: list[State], x: Float[Array, "B E"]) -> tuple[list[State], Float[Array, "B D"]]:
        new = []
        for cell, state in zip(self.cells, states, strict=True):
            state, x = cell(state, x)
            new.append(state)
        return new, x


class LuongDecoder(nnx.Module):
    """Stacked LSTM, attention to the source from its top state, input feeding; tokens one step at a time."""

    def __init__(self, config: LuongConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, width, dtypes = config.dim, config.embed_dim or config.dim, config.dtypes
        kind = ATTENTIONS[config.attention]
        self.embed = Embed(config.vocab_size, width, rngs=rngs, **dtypes)
        self.lstm = LSTM(width + dim * config.input_feeding, dim, config.num_layers, rngs=rngs, **dtypes)
        self.attention = None if kind is None else kind(dim, rngs=rngs, **config.attention_args, **dtypes)
        self.readout = Readout(dim, config.vocab_size, rngs=rngs, **dtypes)

    def step(self, tokens: Int[Array, "B"], cache: LuongCache) -> tuple[Float[Array, "B D"], Float[Array, "B S"], LuongCache]:
        """(h~_t, a_t, cache) of one more token per row; without attention h~_t is h_t. Logits are `readout.attend(h~_t)`."""
        x = self.embed(tokens)
        if self.config.input_feeding:
            x = jnp.concatenate([x, cache.attentional], -1)
        states, h_t = self.lstm(cache.states, x)
        if self.attention is None:
            a_t = jnp.zeros(cache.source_mask.shape)
        else:
            source: dict[str, Any] = {"mask": cache.source_mask, "of_source": cache.of_source}
            h_t, a_t = self.attention(h_t, cache.source, t=cache.seen, **source)
        return h_t, a_t, _moved(cache, (states, h_t, cache.seen + 1))

    def scan(
        self, tokens: Int[Array, "B T"], cache: LuongCache, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T S"], LuongCache]:
        """The same for T tokens per row; rows stand still after their `lengths` [B]."""

        def body(moving: tuple, inputs: tuple[Array, Array]) -> tuple[tuple, tuple[Array, Array]]:
            t, token = inputs
            h_t, a_t, new = self.step(token, _moved(cache, moving))
            ahead = _moving(new)
            return ahead if lengths is None else _where(t < lengths, ahead, moving), (h_t, a_t)

        moving, (h, a) = jax.lax.scan(body, _moving(cache), (jnp.arange(tokens.shape[1]), tokens.T))
        return jnp.moveaxis(h, 0, 1), jnp.moveaxis(a, 0, 1), _moved(cache, moving)


def _moving(cache: LuongCache) -> tuple:
    """What steps change."""
    return cache.states, cache.attentional, cache.seen


def _moved(cache: LuongCache, moving: tuple) -> LuongCache:
    states, attentional, seen = moving
    return dataclasses.replace(cache, states=states, attentional=attentional, seen=seen)


def _where(ok: Bool[Array, "B"], new: Any, old: Any) -> Any:
    """Row by row one tree or the other."""
    return jax.tree.map(lambda a, b: jnp.where(ok.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)


class LuongSeq2Seq(nnx.Module):
    """source [B, S], target [B, T] -> logits [B, T, V] in float32, of the token after each target token.

    An LSTM reads the source; its last states start the decoder's. Decodes as `models.seq2seq.Transformer` does.
    """

    def __init__(self, config: LuongConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.embed_dim or config.dim
        self.embed = Embed(config.source_vocab_size or config.vocab_size, width, rngs=rngs, **config.dtypes)
        self.encoder = LSTM(width, config.dim, config.num_layers, rngs=rngs, **config.dtypes)
        self.decoder = LuongDecoder(config, rngs=rngs)

    def __call__(
        self, source: Int[Array, "B S"], target: Int[Array, "B T"], *, source_mask: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B T V"]:
        """source_mask: True at real tokens, which come first."""
        cache = self.init_cache(source, source_mask=source_mask)
        return self.prefill(target, cache)[0]

    def attention_weights(
        self, source: Int[Array, "B S"], target: Int[Array, "B T"], *, source_mask: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B T S"]:
        """a_t at every target token; row t is used to predict the token after it."""
        return self.decoder.scan(target, self.init_cache(source, source_mask=source_mask))[1]

    def init_cache(
        self, source: Int[Array, "B S"], length: int | None = None, *, source_mask: Bool[Array, "B S"] | None = None
    ) -> LuongCache:
        """The source, read; decoding then needs the same room for any length."""
        mask = jnp.ones(source.shape, bool) if source_mask is None else source_mask
        if mask.shape != source.shape:
            raise ValueError(f"source_mask: one entry per source token is needed: {source.shape}, got {mask.shape}")
        x = self.embed(source)

        def body(states: list[State], inputs: tuple[Array, Array]) -> tuple[list[State], Array]:
            x, real = inputs
            new, h = self.encoder(states, x)
            return _where(real, new, states), h

        batch = source.shape[0]
        states, h_s = jax.lax.scan(body, self.encoder.zeros(batch, x.dtype), (jnp.moveaxis(x, 1, 0), mask.T))
        attentional, h_s = jnp.zeros_like(h_s[0]), jnp.moveaxis(h_s, 0, 1)
        attention = self.decoder.attention
        of_source = None if attention is None else attention.of_source(h_s)
        return LuongCache(states, attentional, h_s, mask, of_source, jnp.zeros(batch, jnp.int32))

    def prefill(
        self, target: Int[Array, "B T"], cache: LuongCache, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T V"], LuongCache]:
        """(logits, cache) of T more target tokens; lengths [B] are the real tokens of right-padded rows."""
        h, _, cache = self.decoder.scan(target, cache, lengths)
        return self.decoder.readout.attend(h), cache

    def step(self, target: Int[Array, "B 1"], cache: LuongCache) -> tuple[Float[Array, "B 1 V"], LuongCache]:
        """(logits, cache) of one more target token per row. Raises ValueError for more than one."""
        if target.ndim != 2 or target.shape[1] != 1:
            raise ValueError(f"target: a step takes one token per row, [B, 1], got {target.shape}; `prefill` takes more")
        h_t, _, cache = self.decoder.step(target[:, 0], cache)
        return self.decoder.readout.attend(h_t)[:, None], cache

    def reorder_cache(self, cache: LuongCache, rows: Int[Array, "R"]) -> LuongCache:
        """Row i of the result is row `rows[i]` of `cache`, the source included."""
        return jax.tree.map(lambda leaf: leaf[rows], cache)
