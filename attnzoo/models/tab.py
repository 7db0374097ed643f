"""A small classifier of image pairs behind an attention bottleneck (Rahmanzadehgervi et al., 2025, arXiv 2412.18675)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnzoo.models.layers import LayerConfig, layer_maker
from attnzoo.nn.linear import dropout, linear, named
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack
from attnzoo.zoo.control.tab import TABLayer, TABMap


@dataclasses.dataclass(frozen=True, kw_only=True)
class TABChangeConfig(LayerConfig):
    """What is different between two images; further fields as in `LayerConfig`, for the joint layers.

    num_patches: P. channels: numbers per patch. num_classes: logits per pair.
    gate, skip, strict: of the bottleneck, as in `TABLayer`.
    """

    num_patches: int = 9
    channels: int = 8
    num_classes: int = 5
    num_layers: int = 2
    mlp: str = "quick_gelu"
    norm: str = "layer"
    use_bias: bool = True
    positions: str = "learned"
    gate: bool = True
    skip: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positions != "learned":
            raise ValueError(f"positions: the two images are told apart by learned positions, got {self.positions!r}")


class TABChangeModel(nnx.Module):
    """(left [B, P, C], right [B, P, C]) -> (logits [B, classes] in float32, left's map, right's map).

    Joint layers over both images, then TAB; only its two CLS outputs reach the head. Maps as in `TABLayer.pair`.
    """

    def __init__(self, config: TABChangeConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, dtypes = config.dim, config.dtypes
        self.patches = linear(config.channels, dim, (None, "embed"), use_bias=True, rngs=rngs, **dtypes)

        def table(rows: int) -> nnx.Param:
            # Of unit variance, so that where a patch lies counts as much as what it holds.
            init = nnx.initializers.normal(1.0)
            return nnx.Param(init(rngs.params(), (rows, dim), config.param_dtype), **named(None, "embed"))

        # Positions within an image, alike on both sides, the first of which is the CLS token; and what tells the sides apart.
        self.positions, self.joint_positions = table(1 + config.num_patches), table(2 * (1 + config.num_patches))
        self.in_norm, self.out_norm = (norm(config.norm, dim, rngs=rngs, **dtypes) for _ in range(2))
        self.dropout = dropout(config.dropout_rate, rngs)
        make = layer_maker(config, rngs, causal=False)
        self.layers = Stack(make, config.num_layers, scan=config.scan_layers, remat=config.remat)
        self.tab = TABLayer(dim, gate=config.gate, skip=config.skip, strict=config.strict, rngs=rngs, **dtypes)
        self.head = linear(2 * dim, config.num_classes, ("embed", None), use_bias=True, rngs=rngs, **dtypes)

    def joint(self, left: Float[Array, "B P C"], right: Float[Array, "B P C"]) -> tuple[Array, Array]:
        """The tokens of both images [B, 1+P, D], after the joint layers."""
        want = (self.config.num_patches, self.config.channels)
        if left.shape != right.shape or left.shape[1:] != want:
            raise ValueError(
                f"left, right: both need [B, P, C] = [B, {want[0]}, {want[1]}], got {left.shape} and {right.shape}"
            )
        tokens = [jnp.pad(self.patches(image), ((0, 0), (1, 0), (0, 0))) for image in (left, right)]
        x = jnp.concatenate([image + self.positions[...].astype(image.dtype) for image in tokens], axis=1)
        x = self.layers(self.dropout(self.in_norm(x + self.joint_positions[...].astype(x.dtype))))
        return x[:, : 1 + want[0]], x[:, 1 + want[0] :]

    def __call__(
        self, left: Float[Array, "B P C"], right: Float[Array, "B P C"], **edits: Any
    ) -> tuple[Float[Array, "B classes"], TABMap, TABMap]:
        """edits: edit_left, edit_right [B, 1+P] and edit_mode, as in `TABLayer.pair`."""
        both, over_right, over_left = self.tab.pair(*self.joint(left, right), **edits)
        both = self.out_norm(both)
        return self.head(both.reshape(both.shape[0], -1)).astype(jnp.float32), over_right, over_left
