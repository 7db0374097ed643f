"""Decoders of parallel blocks, dense or upcycled (Zhang et al., 2024, arXiv 2408.08274)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnzoo.models.layers import layer_maker
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.models.objectives import label_smoothed_ce
from attnzoo.nn.auxiliary import collecting
from attnzoo.nn.block import Block
from attnzoo.nn.feed_forward import SwiGLU
from attnzoo.zoo.compress.bam import ALPHA, BETA, MoEFFN, ParallelBAMBlock, average_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class BAMConfig(LMConfig):
    """A language model of parallel blocks; further fields as in `LMConfig`. Feed-forward networks are SwiGLU.

    ffn_experts: how many of them a layer has; None is a dense model. ffn_top_k: how many a token uses.
    The attention is `mixer`: "transformer" in dense models and BTX, "bam" in BAM.

    Raises ValueError for other feed-forward networks, scanned layers, a top_k without experts, and remat with them: the
    losses of routers are collected layer by layer.
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
        if self.ffn_experts is None and self.ffn_top_k != 1:
            raise ValueError(f"ffn_top_k: of ffn_experts, and there are none; got {self.ffn_top_k}")
        if self.ffn_experts is not None and self.remat != "none":
            raise ValueError(f"remat: models with ffn_experts keep what they compute, so 'none' is needed; got {self.remat!r}")


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
                    dropout_rate=config.mlp_dropout_rate,
                    rngs=rngs,
                    **config.dtypes,
                )
            options: dict[str, Any] = {"norm": config.norm, "dropout_rate": config.dropout_rate, **config.dtypes}
            return ParallelBAMBlock(config.dim, layer.mixer, network, rngs=rngs, **options)

        return make

    def with_router_losses(
        self, tokens: Int[Array, "B T"], *, where: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T V"], Float[Array, ""], Float[Array, ""]]:
        """(logits, Σ_layers L_LB, Σ_layers L_z) of a model with feed-forward experts. where: tokens that routers count.

        Raises ValueError for a dense model.
        """
        if self.config.ffn_experts is None:
            raise ValueError("ffn_experts: a dense model has no routers; call it, or build it with ffn_experts")
        with collecting(where) as found:
            logits = self(tokens)
        return logits, found["expert_balance"].value, found["expert_router_z"].value


def bam_loss(
    model: BAMLM,
    tokens: Int[Array, "B T"],
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    where: Bool[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Next-token cross-entropy in nats + alpha Σ L_LB + beta Σ L_z; of a dense model the cross-entropy alone.

    where: tokens to be predicted; routers count those that predict them.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    counted = None if where is None else where[:, 1:]
    if model.config.ffn_experts is None:
        return label_smoothed_ce(model(inputs), targets, smoothing=0.0, where=counted)
    logits, balance, z = model.with_router_losses(inputs, where=counted)
    return label_smoothed_ce(logits, targets, smoothing=0.0, where=counted) + alpha * balance + beta * z


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
    Raises ValueError for models that are not dense or differ in their configuration, for a mixer other than "transformer",
    and for learned positions of mixers that have a row per head.
    """
    if seed.config.mixer != "transformer":
        raise ValueError(f"seed: its mixer becomes an expert only if it is 'transformer', got {seed.config.mixer!r}")
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
    sources = [dict(nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))) for model in dense]
    common = []
    for path, leaf in nnx.to_flat_state(nnx.state(made, nnx.Not(nnx.RngState))):
        first = sources[0].get(path)
        if first is not None and first.shape == leaf.shape:
            # Tables that are not trained, as of positions, are one for all branches.
            common.append((path, average_params([s[path] for s in sources]) if isinstance(leaf, nnx.Param) else first))
        elif not {"router", "feed_forward", "qkv", "out"} & set(path):
            got = "nothing" if first is None else first.shape
            raise ValueError(f"seed: {'.'.join(map(str, path))} of the mixture is {leaf.shape}, and the seed has {got} there")
    nnx.update(made, nnx.from_flat_state(common))
    layers: list[Any] = list(zip(made.layers.runs, zip(*(m.layers.runs for m in dense), strict=True), strict=True))
    for layer, sources in layers:
        layer.feed_forward.load([source.feed_forward for source in sources])
    return made, layers
