"""The claim of Fehr & Henderson 2024: a trained Transformer, read as a denoiser, is regularised without training.

scikit-learn's digits, 8 rows of 8 pixels as tokens, through 2 layers (D = 48, N = 4) and their mean; 400 steps of 64 of the
first 1000 images with Adam. Its attention is then reinterpreted with the prior of what each layer was given in training. The
pair (tau_alpha, tau_sigma) is chosen by accuracy on images 1000 to 1400 with Gaussian noise of 0.3 on every pixel; the
identity (1000, 0) is among those to choose from. Measured: accuracy on the other 397 images with fresh noise, four times over,
and how many predictions without noise the identity changes.

Tokens are normalised before attention, so their lengths differ little and sd_p is small: the identity needs a tau_alpha far
above the 10 or so that does for tokens of many lengths.

The identity holds to the last prediction. That more weight on the prior, or more variance, helps with noise was not found:
on validation images accuracy falls slowly with both. The choice is the identity with seeds 0 and 1; with seed 2 it is
(20, 0.25), which loses 0.9 points on the noisy test images and 1.8 on those without noise. tau_mu is 1 throughout, so moving
the means towards the prior's was not tried.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnzoo.models.layers import LayerConfig
from attnzoo.zoo.normalizers.nvib_attention import Prior, nv_empirical_prior, nv_reinterpret
from train.claims import ClaimResult
from train.claims.common import RowClassifier, digit_rows, fit, label_loss

TRAINING, VALIDATION, TEST = slice(0, 1000), slice(1000, 1400), slice(1400, None)
NOISE, DRAWS = 0.3, 4
IDENTITY = (1000.0, 0.0)
CHOICES = (IDENTITY, *((alpha, sigma) for alpha in (100.0, 20.0, 5.0, 0.0, -5.0, -20.0) for sigma in (0.0, 0.25, 0.5)))
CONFIG = LayerConfig(dim=48, num_layers=2, num_heads=4, positions="learned")


def layer_priors(model: RowClassifier, images: Float[Array, "B 8 8"]) -> list[Prior]:
    """The empirical prior of every layer's attention."""
    x, found = model.tokens(images), []
    for layer in model.layers.runs:
        found.append(nv_empirical_prior(layer.mixer_norm(x), CONFIG.dim // CONFIG.num_heads))
        x, _ = layer(x)
    return found


@nnx.jit
def predictions(model: RowClassifier, images: Float[Array, "B 8 8"]) -> Array:
    return model(images).argmax(-1)


def run(seeds: Sequence[int] = (0, 1, 2), quick: bool = False) -> ClaimResult:
    """quick: a few steps, to see that it runs."""
    start = time.perf_counter()
    steps = 8 if quick else 400
    values: dict[str, list[float]] = {"Transformer": [], "identity": [], "chosen": []}
    changed, chosen, validation, spread = [], [], [], []
    clean: dict[str, list[float]] = {"Transformer": [], "chosen": []}
    for seed in seeds:
        images, labels = (jnp.asarray(x) for x in digit_rows(seed))

        def batch(key: Array, images: Array = images, labels: Array = labels) -> tuple[Array, Array]:
            at = jax.random.choice(key, TRAINING.stop, (64,), replace=False)
            return images[at], labels[at]

        model = RowClassifier(CONFIG, rngs=nnx.Rngs(seed))
        fit(model, label_loss, batch, steps=steps, seed=seed)
        priors, params = layer_priors(model, images[TRAINING]), nnx.state(model, nnx.Param)
        spread.append([round(float(prior.log_alpha_sd), 4) for prior in priors])
        denoiser = RowClassifier(dataclasses.replace(CONFIG, mixer="nvib_attention"), rngs=nnx.Rngs(0))

        def noisy(part: slice, draws: int, key: Array, images: Array = images) -> Array:
            clean = jnp.tile(images[part], (draws, 1, 1))
            return clean + NOISE * jax.random.normal(key, clean.shape)

        def accuracy(model: RowClassifier, part: slice, inputs: Array, labels: Array = labels) -> float:
            right = predictions(model, inputs) == jnp.tile(labels[part], len(inputs) // len(labels[part]))
            return float(right.mean())

        of_validation, of_test = jax.random.split(jax.random.key(seed))
        for_choice, for_test = noisy(VALIDATION, 1, of_validation), noisy(TEST, DRAWS, of_test)
        scores = {}
        for tau_alpha, tau_sigma in CHOICES:
            nnx.update(denoiser, nv_reinterpret(params, priors, tau_alpha=tau_alpha, tau_sigma=tau_sigma))
            scores[tau_alpha, tau_sigma] = accuracy(denoiser, VALIDATION, for_choice)
        best = max(scores, key=lambda pair: scores[pair])
        chosen.append(best)
        validation.append({str(pair): round(score, 4) for pair, score in scores.items()})
        values["Transformer"].append(accuracy(model, TEST, for_test))
        clean["Transformer"].append(accuracy(model, TEST, images[TEST]))
        for name, (tau_alpha, tau_sigma) in (("identity", IDENTITY), ("chosen", best)):
            nnx.update(denoiser, nv_reinterpret(params, priors, tau_alpha=tau_alpha, tau_sigma=tau_sigma))
            values[name].append(accuracy(denoiser, TEST, for_test))
            if name == "identity":
                changed.append(int((predictions(denoiser, images) != predictions(model, images)).sum()))
            else:
                clean[name].append(accuracy(denoiser, TEST, images[TEST]))
    gains = np.subtract(values["chosen"], values["identity"])
    return ClaimResult(
        key="nvib_attention",
        claim=(
            "read as a denoiser a trained Transformer is what it was, and is better with noise once regularised "
            "without training"
        ),
        metric="accuracy on noisy test images",
        seeds=seeds,
        values=values,
        margin=(
            "the identity changes no prediction on clean images; chosen is above it in the mean of the seeds and at most 1 "
            "point below it with any"
        ),
        reproduced=not any(changed) and bool((gains >= -0.01).all() and gains.mean() > 0),
        seconds=time.perf_counter() - start,
        details={
            "steps": steps,
            "clean predictions changed by the identity": changed,
            "gain of the chosen setting over the identity": gains.round(4).tolist(),
            "chosen (tau_alpha, tau_sigma)": chosen,
            "accuracy on test images without noise": clean,
            "sd_p of the layers": spread,
            "validation accuracy": validation,
        },
    )
