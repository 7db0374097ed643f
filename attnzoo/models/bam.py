"""Decoders of parallel blocks, dense or upcycled (Zhang et al., 2024, arXiv 2408.08274)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.models.layers import layer_maker
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.models.objectives import label_smoothed_ce
from attnzoo.nn.block import Block
from attnzoo.nn.feed_forward import SwiGLU
from attnzoo.zoo.compress.bam import MoEFFN, ParallelBAMBlock, average_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BAMConfig(LMConfig):
    """A language model of parallel blocks; further fields as in `LMConfig`. Feed-forward networks are SwiGLU.

    ffn_experts: how many of them a layer has; None is a dense model. ffn_top_k: how many a token uses.
    The attention is `mixer`: "transformer" in dense models and BTX, "bam" in BAM.
    """

    norm: str = "layer"
    ffn_experts: int | None = None
    ffn_top_k: int = 1
    router_init: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp != "swiglu" or self.use_bias or not self.norm_first or self.scan_layers:
            raise ValueError(
                "mlp, use_bias, norm_first, scan_layers: parallel blocks have 'swiglu' networks without biases, one norm "
                f"first, and are not scanned; got {self.mlp!r}, {self.use_bias}, {self.norm_first}, {self.scan_layers}"
            )


class BAMLM(DecoderLM):
    """tokens [B, T] -> logits [B, T, V]: `DecoderLM` with `ParallelBAMBlock`s."""

    config: BAMConfig

    def layer_maker(self, config: LMConfig, rngs: nnx.Rngs) -> Callable[[int], Block]:
        assert isinstance(config, BAMConfig)
        sequential = layer_maker(config, rngs, causal=True)

        def make(i: int) -> Block:
            layer = sequential(i)
            network = layer.feed_forward
            if config.ffn_experts is not None:
                assert isinstance(network, SwiGLU)
                network = MoEFFN(
                    config.dim,
                    network.up.kernel.shape[1],
                    config.ffn_experts,
                    top_k=config.ffn_top_k,
                    router_init=config.router_init,
                    rngs=rngs,
                    **config.dtypes,
                )
            options: dict[str, Any] = {"norm": config.norm, "dropout_rate": config.dropout_rate, **config.dtypes}
            return ParallelBAMBlock(config.dim, layer.mixer, network, rngs=rngs, **options)

        return make

    def with_router_losses(self, tokens: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], Float[Array, ""], Float[Array, ""]]:
        """(logits, Σ_layers L_LB, Σ_layers L_z) of a model with feed-forward experts."""
        x = self._embed(tokens, np.arange(tokens.shape[-1]))
        balance = z = jnp.zeros(())
        for layer in self.layers.runs:
            assert isinstance(layer.feed_forward, MoEFFN)
            routing = layer.feed_forward.route(layer.mixer_norm(x))
            balance, z = (total + loss for total, loss in zip((balance, z), routing.losses(), strict=True))
            x, _ = layer(x)
        return self._logits(x), balance, z


def bam_loss(model: BAMLM, tokens: Int[Array, "B T"], *, alpha: float = 0.01, beta: float = 0.001) -> Float[Array, ""]:
    """Next-token cross-entropy in nats + alpha Σ L_LB + beta Σ L_z; of a dense model the cross-entropy alone."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if model.config.ffn_experts is None:
        return label_smoothed_ce(model(inputs), targets, smoothing=0.0)
    logits, balance, z = model.with_router_losses(inputs)
    return label_smoothed_ce(logits, targets, smoothing=0.0) + alpha * balance + beta * z


def bam_upcycle(
    seed: BAMLM,
    experts: Sequence[BAMLM],
    *,
    variant: str = "kv_experts",
    routing: str = "soft",
    top_k: int = 1,
    router_init: str = "normal",
    rngs: nnx.Rngs,
) -> BAMLM:
    """One mixture of E = 1 + len(experts) dense models, the seed first (paper §4).

    Attention and feed-forward networks are copied, embeddings, norms and readout averaged over all E; routers are new.
    variant, routing, router_init: as in `SoftMixtureOfAttention`. top_k: of the feed-forward router.
    Raises ValueError for models that are not dense or differ in their configuration.
    """
    args = {"num_experts": 1 + len(experts), "variant": variant, "routing": routing, "router_init": router_init}
    made, layers = _mixture(seed, experts, top_k, router_init, rngs, mixer="bam", mixer_args={**seed.config.mixer_args, **args})
    for layer, sources in layers:
        layer.mixer.load([source.mixer for source in sources])
    return made


def btx_upcycle(seed: BAMLM, experts: Sequence[BAMLM], *, top_k: int = 1, router_init: str = "normal", rngs: nnx.Rngs) -> BAMLM:
    """The baseline, branch-train-mix (Sukhbaatar et al., 2024, arXiv 2403.07816): attention is averaged too."""
    return _mixture(seed, experts, top_k, router_init, rngs)[0]


def _mixture(
    seed: BAMLM, experts: Sequence[BAMLM], top_k: int, router_init: str, rngs: nnx.Rngs, **changes: Any
) -> tuple[BAMLM, list[Any]]:
    """A model with the dense models' feed-forward experts and the mean of what else it has in common with them.

    Also its layers, each with those of the dense models.
    """
    dense = [seed, *experts]
    for model in dense:
        if model.config.ffn_experts is not None or model.config != seed.config:
            raise ValueError(f"experts: dense models of one configuration are needed, {seed.config}; got {model.config}")
    options: dict[str, Any] = {"ffn_experts": len(dense), "ffn_top_k": top_k, "router_init": router_init, **changes}
    made = BAMLM(dataclasses.replace(seed.config, **options), rngs=rngs)
    mean = dict(nnx.to_flat_state(average_params([nnx.state(model, nnx.Param) for model in dense])))
    ours = nnx.to_flat_state(nnx.state(made, nnx.Param))
    common = [(path, mean[path]) for path, leaf in ours if path in mean and mean[path].shape == leaf.shape]
    nnx.update(made, nnx.from_flat_state(common))
    layers: list[Any] = list(zip(made.layers.runs, zip(*(m.layers.runs for m in dense), strict=True), strict=True))
    for layer, sources in layers:
        layer.feed_forward.load([source.feed_forward for source in sources])
    return made, layers
