"""The claim of Lohrenz et al. 2022: relaxed attention regularises, and a model trained with it wants it at inference too.

200 of scikit-learn's digits, 8 rows of 8 pixels as tokens, through 2 layers of the original Transformer (post-norm, ReLU,
biases; D = 48, N = 4) and their mean; 400 steps of 64 images with Adam. gamma 0, 0.1 and 0.3, relaxed in training; then
tested without relaxation and with it ("matched"). Measured: cross-entropy and accuracy on the 1297 images after the first
500, and cross-entropy on the 200 training images without relaxation.

That the model wants relaxation at inference holds for gamma 0.3 in the mean of the seeds (0.463 against 0.481 nats) but not
with seed 3 (0.4997 against 0.4960), which alone fails the margin; for gamma 0.1 it does not hold in the mean (0.436 against
0.430).

The paper's gains over gamma = 0 come from its scale (speech and translation with external language models); whether there
is one here is reported only.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array

from attnzoo.models.layers import LayerConfig
from train.claims import ClaimResult
from train.claims.common import RowClassifier, digit_rows, fit, label_loss

GAMMAS = (0.0, 0.1, 0.3)
TRAINING, TEST = slice(0, 200), slice(500, None)
CONFIG = LayerConfig(
    dim=48,
    num_layers=2,
    num_heads=4,
    positions="learned",
    mixer="relaxed_attention",
    mlp="relu",
    use_bias=True,
    norm="layer",
    norm_first=False,
)


def build(seed: int, gamma: float, mode: str = "train") -> RowClassifier:
    """The classifier, in training mode."""
    config = dataclasses.replace(CONFIG, mixer_args={"gamma": gamma, "mode": mode})
    return RowClassifier(config, rngs=nnx.Rngs(seed))


def batch(images: Array, labels: Array, key: Array) -> tuple[Array, Array]:
    """64 of them, with their labels."""
    chosen = jax.random.choice(key, len(images), (64,), replace=False)
    return images[chosen], labels[chosen]


@nnx.jit
def measure(model: RowClassifier, images: Array, labels: Array) -> tuple[Array, Array]:
    """(cross-entropy in nats, accuracy)."""
    return label_loss(model, (images, labels)), (model(images).argmax(-1) == labels).mean()


def run(seeds: Sequence[int] = (0, 1, 2, 3), quick: bool = False) -> ClaimResult:
    """quick: a few steps, to see that it runs."""
    start = time.perf_counter()
    steps = 8 if quick else 400
    values: dict[str, list[float]] = {}
    accuracy: dict[str, list[float]] = {}
    training: dict[str, list[float]] = {}
    for seed in seeds:
        images, labels = (jnp.asarray(x) for x in digit_rows(seed))

        make_batch = Partial(batch, images[TRAINING], labels[TRAINING])
        for gamma in GAMMAS:
            model = build(seed, gamma)
            fit(model, label_loss, make_batch, steps=steps, seed=seed, learning_rate=2e-3)
            matched = build(seed, gamma, "matched")
            nnx.update(matched, nnx.state(model, nnx.Param))
            for name, tested in ((f"gamma {gamma}", model), (f"gamma {gamma}, matched", matched)):
                if gamma == 0 and tested is matched:
                    continue
                tested.eval()
                loss, right = measure(tested, images[TEST], labels[TEST])
                values.setdefault(name, []).append(float(loss))
                accuracy.setdefault(name, []).append(round(float(right), 4))
            training.setdefault(f"gamma {gamma}", []).append(float(measure(model, images[TRAINING], labels[TRAINING])[0]))
    most = f"gamma {GAMMAS[-1]}"
    wants_it = all(m < u for m, u in zip(values[f"{most}, matched"], values[most], strict=True))
    regularises = all(r > p for r, p in zip(training[most], training["gamma 0.0"], strict=True))
    as_good = bool((np.abs(np.subtract(accuracy[f"{most}, matched"], accuracy["gamma 0.0"])) <= 0.025).all())
    return ClaimResult(
        key="relaxed_attention",
        claim="relaxed attention fits the training data less closely, and what was trained with it is better tested with it",
        metric="test cross-entropy (nats)",
        seeds=seeds,
        values=values,
        margin=(
            "with every seed: gamma 0.3 tested with relaxation below gamma 0.3 tested without, its cross-entropy on the "
            "training images (unrelaxed) above gamma 0's, and its matched accuracy within 2.5 points of gamma 0's"
        ),
        reproduced=wants_it and regularises and as_good,
        seconds=time.perf_counter() - start,
        details={
            "steps": steps,
            "test accuracy": accuracy,
            "training cross-entropy without relaxation (nats)": training,
            "matched below unmatched": wants_it,
            "training cross-entropy higher": regularises,
            "accuracy within 2.5 points": as_good,
        },
    )
