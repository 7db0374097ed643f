"""The claim of MoH: with three quarters of the heads active per token, a vision Transformer is as accurate.

scikit-learn's digits in patches of 2×2 pixels (16 tokens), a 2-layer vision Transformer with D = 64, N = 8, F = 128, Adam
with a cosine from 2e-3, 600 steps of 64 of the 1200 training images. All heads against two shared heads and four of the
six others (style "code"), with the load-balance loss at the paper's coefficient of 0.01 and without it. Measured: accuracy on
the other 597 images, and how evenly the routed heads are used.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.models.vit import ViT, ViTConfig
from attnzoo.nn.auxiliary import collecting
from attnzoo.zoo.heads.moh import MixtureOfHeadAttention, active_head_fraction
from train.claims import ClaimResult
from train.claims.common import fit

TRAIN, BATCH = 1200, 64
SHARED, ROUTED = 2, 4
COEFFICIENTS: dict[str, float | None] = {"all heads": None, "MoH": 0.01, "MoH, no balance loss": 0.0}

Images = Float[Array, "B 8 8 1"]


def digits() -> tuple[Images, Int[Array, "B"], Images, Int[Array, "B"]]:
    """(training images, labels, test images, labels), in a fixed random order, of zero mean and unit variance."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = ((images - images.mean()) / images.std()).reshape(-1, 8, 8, 1)[order].astype(np.float32)
    labels = labels[order].astype(np.int32)
    return tuple(jnp.asarray(part) for part in (images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]))  # type: ignore[return-value]


def build(seed: int, *, mixture: bool) -> ViT:
    """The classifier, with all heads or a mixture."""
    args: dict[str, Any] = {"mixer": "moh", "mixer_args": {"shared_heads": SHARED, "top_k": ROUTED}} if mixture else {}
    config = ViTConfig(image_size=8, patch_size=2, channels=1, dim=64, num_layers=2, num_heads=8, mlp_dim=128, **args)
    return ViT(config, rngs=nnx.Rngs(seed))


def mixer_inputs(model: ViT, images: Images) -> Iterator[tuple[MixtureOfHeadAttention, Float[Array, "B T D"]]]:
    """Every layer's mixer with what it is given."""
    x = model.patches(images)
    x = x + model.table(jnp.arange(x.shape[1]))
    for layer in model.layers.runs:
        assert isinstance(layer.mixer, MixtureOfHeadAttention)
        yield layer.mixer, layer.mixer_norm(x)
        x, _ = layer(x)


def loss_with(coefficient: float | None) -> Callable[[ViT, tuple[Images, Array]], Array]:
    """Cross-entropy, and the balance loss averaged over layers."""

    def loss(model: ViT, batch: tuple[Images, Array]) -> Array:
        images, labels = batch
        with collecting() as found:
            logits = model(images)
        total = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return total + coefficient * found["head_balance"].value if coefficient else total

    return loss


@nnx.jit
def accuracy(model: ViT, images: Images, labels: Int[Array, "B"]) -> Float[Array, ""]:
    """The share of images that are named rightly."""
    return (model(images).argmax(-1) == labels).mean()


def run(seeds: Sequence[int] = (0, 1, 2), quick: bool = False) -> ClaimResult:
    """quick: a few steps, to see that it runs."""
    start = time.perf_counter()
    steps = 8 if quick else 600
    images, labels, test_images, test_labels = digits()

    def batch(key: Array) -> tuple[Images, Array]:
        rows = jax.random.choice(key, TRAIN, (BATCH,), replace=False)
        return images[rows], labels[rows]

    values: dict[str, list[float]] = {name: [] for name in COEFFICIENTS}
    usage: dict[str, list[list[list[float]]]] = {name: [] for name, c in COEFFICIENTS.items() if c is not None}
    objectives = {name: loss_with(coefficient) for name, coefficient in COEFFICIENTS.items()}
    for seed in seeds:
        for name, coefficient in COEFFICIENTS.items():
            model = build(seed, mixture=coefficient is not None)
            fit(model, objectives[name], batch, steps=steps, seed=seed)
            values[name].append(float(accuracy(model, test_images, test_labels)))
            if name in usage:
                routings = [mixer.route(x) for mixer, x in mixer_inputs(model, test_images)]
                used = [active_head_fraction(r.gates[..., SHARED:]) for r in routings]
                usage[name].append(np.round(np.asarray(used, float), 4).tolist())
    mean = {name: float(np.mean(given)) for name, given in values.items()}
    spread = {name: float(np.mean(np.ptp(np.asarray(used), axis=-1))) for name, used in usage.items()}
    return ClaimResult(
        key="moh",
        claim="a vision Transformer whose tokens use three quarters of the heads is as accurate as one that uses them all",
        metric="accuracy on test images",
        seeds=seeds,
        values=values,
        margin=(
            "mean accuracy of MoH at most 0.02 below that of all heads; routed heads used more evenly (largest minus "
            "smallest share of tokens, averaged over layers and seeds) with the balance loss than without"
        ),
        reproduced=mean["MoH"] >= mean["all heads"] - 0.02 and spread["MoH"] < spread["MoH, no balance loss"],
        seconds=time.perf_counter() - start,
        details={
            "steps": steps,
            "largest minus smallest use of a routed head (share of tokens)": spread,
            "use of each routed head, per seed and layer": usage,
        },
    )
