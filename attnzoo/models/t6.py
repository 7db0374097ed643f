"""T6 (Zhang et al., 2025, arXiv 2501.06425): a Llama-like decoder with tensor product attention."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from attnzoo.core.positions import RoPE
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.nn.block import Block
from attnzoo.nn.feed_forward import SwiGLU
from attnzoo.zoo.projections.tpa import TensorProductAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class TPAConfig(LMConfig):
    """A T6; further fields as in `LMConfig`. The defaults are small: the paper's medium size has 24 layers, D = 1024 and
    47 heads of 64.

    rank_q, rank_k, rank_v: of the factors; rank_q=None for dense queries.
    noncontextual_a, noncontextual_b, head_norm: as in `TensorProductAttention`.
    zero_init_out: the outputs of attention and of the feed-forward network start at 0.
    norm: "plain_rms", without a gain.

    Raises ValueError for fields of `LMConfig` that T6 leaves no choice in.
    """

    mixer: str = "tpa"
    norm: str = "plain_rms"
    rank_q: int | None = 6
    rank_k: int = 2
    rank_v: int = 2
    noncontextual_a: bool = False
    noncontextual_b: bool = False
    head_norm: bool = False
    zero_init_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {f.name: f.default for f in dataclasses.fields(self)} | {"mixer_args": {}}
        for name in ("mixer", "mixer_args", "num_kv_heads", "mlp", "positions", "use_bias", "norm_first"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}: a T6 has {name}={defaults[name]!r}, got {getattr(self, name)!r}; DecoderLM takes any layer, "
                    "with mixer='tpa' too"
                )


class T6Block(Block):
    """RMSNorm, tensor product attention with RoPE, RMSNorm, SwiGLU of width floor(8 D / 3); x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: TPAConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {**config.dtypes, "rngs": rngs}
        names = ("head_dim", "rank_q", "rank_k", "rank_v", "noncontextual_a", "noncontextual_b", "head_norm", "zero_init_out")
        mixer = TensorProductAttention(
            config.dim,
            config.num_heads,
            causal=True,
            positions=RoPE(),
            **{name: getattr(config, name) for name in names},
            **options,
        )
        rate = config.mlp_dropout_rate
        network = SwiGLU(config.dim, config.mlp_dim or 8 * config.dim // 3, dropout_rate=rate, **options)
        if config.zero_init_out:
            network.down.kernel[...] = jnp.zeros_like(network.down.kernel[...])
        super().__init__(config.dim, mixer, network, norm=config.norm, dropout_rate=config.dropout_rate, **options)


class T6LM(DecoderLM):
    """tokens [B, T] -> logits [B, T, V]: `T6Block`s, tied embeddings. Takes a `TPAConfig`."""

    def layer_maker(self, config: LMConfig, rngs: nnx.Rngs) -> Callable[[int], Block]:
        if not isinstance(config, TPAConfig):
            raise TypeError(f"config: T6LM takes a TPAConfig, got {type(config).__name__}")
        return lambda i: T6Block(config, rngs=rngs)
