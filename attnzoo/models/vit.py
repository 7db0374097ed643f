"""A vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929) with a slot for the mixer."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnzoo.core.positions import RoPE, grid_positions, sinusoidal_positions
from attnzoo.errors import unknown
from attnzoo.models.layers import LayerConfig, layer_maker
from attnzoo.nn.embed import LearnedPositions, PatchEmbed
from attnzoo.nn.linear import dropout, linear, named
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(LayerConfig):
    """A classifier of images; further fields as in `LayerConfig`.

    image_size: height and width (one number if square). patch_size: p. channels: C.
    num_classes: logits per image.
    pool: "mean" of the patches, or "class", a learned token in front of them.
    positions: "learned"; "sinusoidal", half the features for each axis; "rope", axial over rows and columns;
        "none".
    """

    image_size: int | tuple[int, int] = 32
    patch_size: int = 4
    channels: int = 3
    num_classes: int = 10
    pool: str = "mean"
    mlp: str = "gelu"
    use_bias: bool = True
    norm: str = "layer"
    positions: str = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool not in ("mean", "class"):
            raise unknown("pool", self.pool, ("mean", "class"))
        height, width = self.size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size: {self.patch_size} does not divide the image, {height}×{width} pixels")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size


class ViT(nnx.Module):
    """images [B, h, w, C] -> logits [B, num_classes] in float32. Raises ValueError for another image size."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, dtypes = config.dim, config.dtypes
        rows, columns = config.grid
        self.patches = PatchEmbed(config.patch_size, config.channels, dim, rngs=rngs, **dtypes)
        if config.pool == "class":
            token = nnx.initializers.normal(0.02)(rngs.params(), (dim,), config.param_dtype)
            self.class_token = nnx.Param(token, **named("embed"))
        if config.positions == "learned":
            self.table = LearnedPositions(rows * columns, dim, rngs=rngs, **dtypes)
        self.dropout = dropout(config.dropout_rate, rngs)
        self.layers = Stack(
            layer_maker(config, rngs, causal=False, rope=RoPE(axes=2)),
            config.num_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        self.norm = norm(config.norm, dim, rngs=rngs, **dtypes) if config.norm_first else None
        self.head = linear(dim, config.num_classes, ("embed", None), use_bias=True, rngs=rngs, **dtypes)

    def features(self, images: Float[Array, "B h w C"]) -> Float[Array, "B T D"]:
        """The last layer's tokens, the class token first where there is one."""
        (height, width), channels = self.config.size, self.config.channels
        if images.shape[1:] != (height, width, channels):
            raise ValueError(f"images: needs [B, h, w, C] = [B, {height}, {width}, {channels}], got {images.shape}")
        x = self.patches(images)
        where = grid_positions(*self.config.grid)
        if self.config.positions == "learned":
            x = x + self.table(np.arange(x.shape[1]))
        elif self.config.positions == "sinusoidal":
            axes = [sinusoidal_positions(where[:, axis], self.config.dim // 2) for axis in (0, 1)]
            x = x + jnp.concatenate(axes, axis=-1).astype(x.dtype)
        if self.config.pool == "class":
            token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
            # The class token is at the origin, in front of the grid.
            where = jnp.concatenate([jnp.zeros((1, 2), jnp.int32), where + 1])
        positions = where if self.config.positions == "rope" else None
        x = self.layers(self.dropout(x), positions=positions)
        return x if self.norm is None else self.norm(x)

    def __call__(self, images: Float[Array, "B h w C"]) -> Float[Array, "B classes"]:
        x = self.features(images)
        pooled = x[:, 0] if self.config.pool == "class" else x.mean(axis=1)
        return self.head(pooled).astype(jnp.float32)
