import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.models.vit import ViT, ViTConfig

IMAGES = jax.random.normal(jax.random.key(0), (2, 8, 12, 1))
SIZES = {"image_size": (8, 12), "patch_size": 4, "channels": 1, "num_classes": 5} | {
    "dim": 16, "num_layers": 2, "num_heads": 2
}  # fmt: skip

run = nnx.jit(lambda model, images: model(images))


def build(**options) -> ViT:
    return ViT(ViTConfig(**SIZES, **options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("positions", "pool", "scan"),
    [("learned", "mean", False), ("rope", "class", True), ("sinusoidal", "class", False)],
)
def test_logits(positions, pool, scan):
    model = build(positions=positions, pool=pool, scan_layers=scan)
    y = run(model, IMAGES)
    assert y.shape == (2, 5)
    assert y.dtype == jnp.float32
    assert jax.eval_shape(lambda: model.features(IMAGES)).shape == (2, 6 + (pool == "class"), 16)
    swapped = jnp.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)  # rows of patches change places
    assert not np.allclose(run(model, swapped), y, atol=1e-4)


def test_without_positions_patches_are_a_set():
    model = build(positions="none")
    swapped = jnp.concatenate([IMAGES[:, 4:], IMAGES[:, :4]], axis=1)
    np.testing.assert_allclose(run(model, swapped), run(model, IMAGES), atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match=r"\[B, 8, 12, 1\], got \(2, 12, 8, 1\)"):
        build()(IMAGES.swapaxes(1, 2))
    with pytest.raises(ValueError, match="patch_size: 5"):
        ViTConfig(**{**SIZES, "patch_size": 5})
    with pytest.raises(ValueError, match="unknown pool"):
        build(pool="max")
