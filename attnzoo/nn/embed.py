"""From tokens, positions and images to vectors, and back to logits."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnzoo.core.cells import Known, concrete
from attnzoo.nn.linear import linear, named


class Embed(nnx.Module):
    """A [V, D] table: tokens -> vectors, and with `attend` vectors -> logits by the same table.

    Rows are N(0, stddev²), with stddev D^-0.5 by default. Looked-up rows are multiplied by `scale`, sqrt(D) by default
    (Vaswani et al. 2017, §3.4), so inputs have unit variance and logits of normalised vectors do too; the logits themselves
    are not scaled. Token ids outside [0, V) are clipped.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        *,
        scale: float | None = None,
        stddev: float | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(dim**-0.5 if stddev is None else stddev)
        self.table = nnx.Param(init(rngs.params(), (vocab_size, dim), param_dtype), **named("vocab", "embed"))
        self.dtype = dtype or param_dtype
        self.scale = dim**0.5 if scale is None else scale

    def __call__(self, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        rows = jnp.take(self.table[...], tokens, axis=0, mode="clip")
        return rows.astype(self.dtype) * jnp.asarray(self.scale, self.dtype)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32."""
        return logits(x, self.table[...].T, self.dtype)


class Readout(nnx.Module):
    """An untied map from vectors to float32 logits, [..., D] -> [..., V]."""

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(dim**-0.5)
        kernel = init(rngs.params(), (dim, vocab_size), param_dtype)
        self.kernel = nnx.Param(kernel, **named("embed", "vocab"))
        self.dtype = dtype or param_dtype

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits in float32."""
        return logits(x, self.kernel[...], self.dtype)


def logits(x: Float[Array, "*B D"], kernel: Float[Array, "D V"], dtype: DTypeLike) -> Float[Array, "*B V"]:
    """x · kernel multiplied in `dtype` and summed in float32."""
    return jnp.matmul(x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


class LearnedPositions(nnx.Module):
    """A [length, D] table of N(0, 0.02²), one row per position.

    Known positions outside [0, length) raise ValueError; traced ones are clipped, so give numpy ones where they are known.
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(0.02)
        self.table = nnx.Param(init(rngs.params(), (length, dim), param_dtype), **named(None, "embed"))
        self.dtype = dtype or param_dtype

    def __call__(self, positions: Int[Known, "*B T"]) -> Float[Array, "*B T D"]:
        length = self.table.shape[0]
        if (known := concrete(positions)) is not None and known.size and not 0 <= known.min() <= known.max() < length:
            raise ValueError(f"positions: {known.min()} to {known.max()}, but the table was built for length={length}")
        return jnp.take(self.table[...], positions, axis=0, mode="clip").astype(self.dtype)


class PatchEmbed(nnx.Module):
    """Images [B, h, w, C] -> tokens [B, (h/p)(w/p), D] in row-major order: one linear map per p×p patch.

    Raises ValueError when the patch size does not divide the image.
    """

    def __init__(
        self,
        patch_size: int,
        channels: int,
        dim: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch_size = patch_size
        self.proj = linear(
            patch_size * patch_size * channels,
            dim,
            (None, "embed"),
            use_bias=True,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "B h w C"]) -> Float[Array, "B T D"]:
        p = self.patch_size
        if images.ndim != 4 or images.shape[1] % p or images.shape[2] % p:
            raise ValueError(f"images: needs [B, h, w, C] with h and w multiples of {p}, got {images.shape}")
        batch, height, width, channels = images.shape
        patches = images.reshape(batch, height // p, p, width // p, p, channels).swapaxes(2, 3)
        return self.proj(patches.reshape(batch, -1, p * p * channels))
