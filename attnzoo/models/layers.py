"""What all models build their layers from."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from attnzoo.core.cells import Known
from attnzoo.core.positions import PositionPlan, Positions, RoPE, sinusoidal_positions
from attnzoo.errors import unknown
from attnzoo.models.factory import make_mixer
from attnzoo.nn.block import Block
from attnzoo.nn.embed import LearnedPositions
from attnzoo.nn.feed_forward import feed_forward
from attnzoo.nn.mixer import Mixer


class Arguments(dict):
    """Keyword arguments that can be hashed, as a module's static attributes must be; not to be changed."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name, value in self.items():
            if isinstance(value, list):
                self[name] = tuple(value)

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


POSITIONS = ("rope", "learned", "sinusoidal", "none")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """The part of a configuration that every model shares.

    dim: D. num_layers: L. num_heads: N.
    num_kv_heads, head_dim: passed to the mixer when given.
    mlp_dim: F, by default 4·D (8/3·D for "swiglu"). mlp: "swiglu", "gelu", "silu", "relu"
        or "quick_gelu".
    mixer: key of the exhibit that mixes tokens. mixer_args: its own arguments.
    norm: "rms" or "layer". norm_first: pre-norm (with a final norm) or post-norm (without).
    positions: "rope", "learned", "sinusoidal" or "none"; or what the mixers are to apply to queries and keys.
    use_bias: on the feed-forward maps (attention's biases are a mixer argument).
    dropout_rate: of embeddings and of what each part adds; mlp_dropout_rate of hidden units. Attention
        weights have a rate of their own, mixer_args={"dropout_rate": ...}.
    scan_layers, remat: as in `nn.stack.Stack`.
    dtype: of the computation, param_dtype by default. param_dtype: of the parameters.
    """

    dim: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    mlp: str = "swiglu"
    mixer: str = "transformer"
    mixer_args: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "rms"
    norm_first: bool = True
    positions: str | Positions | PositionPlan = "rope"
    use_bias: bool = False
    dropout_rate: float = 0.0
    mlp_dropout_rate: float = 0.0
    scan_layers: bool = False
    remat: str = "none"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        if isinstance(self.positions, str) and self.positions not in POSITIONS:
            raise unknown("positions", self.positions, POSITIONS)
        object.__setattr__(self, "mixer_args", Arguments(self.mixer_args))

    @property
    def dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def all_mixer_args(self) -> dict[str, Any]:
        """mixer_args with the head counts that were given."""
        heads = {"num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        return {**{name: n for name, n in heads.items() if n is not None}, **self.mixer_args}


def layer_maker(
    config: LayerConfig,
    rngs: nnx.Rngs,
    *,
    causal: bool,
    rope: RoPE | None = None,
    mixer: type[Mixer] | None = None,
    make_cross: Callable[[], Mixer] | None = None,
) -> Callable[[int], Block]:
    """i -> layer i of a stack. rope: of the mixers when config.positions is "rope" (default `RoPE()`).

    mixer: a class in place of the one that config.mixer names.
    """
    named = {"rope": rope or RoPE()}
    positions = named.get(config.positions) if isinstance(config.positions, str) else config.positions

    def make(i: int) -> Block:
        build: Any = mixer or functools.partial(make_mixer, config.mixer, layer=i, num_layers=config.num_layers)
        mixing = build(
            config.dim,
            config.num_heads,
            causal=causal,
            positions=positions,
            rngs=rngs,
            **config.dtypes,
            **config.all_mixer_args,
        )
        network = feed_forward(
            config.mlp,
            config.dim,
            config.mlp_dim,
            use_bias=config.use_bias,
            dropout_rate=config.mlp_dropout_rate,
            rngs=rngs,
            **config.dtypes,
        )
        return Block(
            config.dim,
            mixing,
            network,
            cross=make_cross() if make_cross else None,
            norm=config.norm,
            norm_first=config.norm_first,
            dropout_rate=config.dropout_rate,
            rngs=rngs,
            **config.dtypes,
        )

    return make


class AbsolutePositions(nnx.Module):
    """What is added to token vectors by position: learned, sinusoidal (interleaved), or nothing.

    Any other kind adds nothing here: it is done to queries and keys.
    """

    def __init__(self, kind: str | Positions | PositionPlan, length: int, dim: int, *, rngs: nnx.Rngs, **dtypes: Any):
        self.kind = kind
        if kind == "learned":
            self.table = LearnedPositions(length, dim, rngs=rngs, **dtypes)

    def __call__(self, x: Array, positions: Int[Known, "..."]) -> Array:
        if self.kind == "learned":
            return x + self.table(positions)
        if self.kind == "sinusoidal":
            return x + sinusoidal_positions(positions, x.shape[-1]).astype(x.dtype)
        return x
