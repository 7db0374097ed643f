"""ResFormer and SVFormer (Zhou et al., 2024, arXiv 2410.17897): the decoder with residual or shared values."""

import dataclasses
from typing import Any

from flax import nnx

from attnzoo.models.lm import DecoderLM, LMConfig


class ResFormerLM(DecoderLM):
    """`DecoderLM` with the mixer "value_residual"; its Llama-style defaults are the paper's architecture.

    config: sizes; its mixer is replaced, mixer_args are kept.
    mode: how the first layer's values enter the others, as in `ValueResidualAttention`.
    mixer_args: further arguments of the mixer.
    """

    def __init__(self, config: LMConfig, *, mode: str = "constant", rngs: nnx.Rngs, **mixer_args: Any):
        args = {**config.mixer_args, "mode": mode, **mixer_args}
        super().__init__(dataclasses.replace(config, mixer="value_residual", mixer_args=args), rngs=rngs)


class SVFormerLM(ResFormerLM):
    """All layers use the first layer's values: no W_V after it, and one V in the cache."""

    def __init__(self, config: LMConfig, *, rngs: nnx.Rngs):
        super().__init__(config, mode="svformer", rngs=rngs)
