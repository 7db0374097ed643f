"""The claim of card 129: heads that learn their alpha become sparse, at next to no cost in quality.

A 2-layer language model (D = 64, N = 4) on noisy periodic sequences of 64 tokens, 400 steps of 32 sequences with Adam,
RoPE. Softmax against entmax with one alpha per head, all starting at 1.5. Measured: the loss on fresh
sequences; the share of causal weights that are not zero; where the alphas ended; how differently the heads of a layer
attend (Jensen-Shannon divergence).
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.zoo.normalizers.adaptive_entmax import AdaptiveEntmaxAttention, attention_density, head_js_diversity
from train.claims import ClaimResult
from train.claims.common import fit, mean_loss, next_token_loss, noisy_periodic

LENGTH, BATCH, START = 64, 32, 1.5
VARIANTS: dict[str, dict[str, Any]] = {
    "softmax": {"mixer": "transformer"},
    "adaptive entmax": {"mixer": "adaptive_entmax", "mixer_args": {"init_alpha": START}},
}


def batch(key: Array) -> Int[Array, "B T"]:
    return noisy_periodic(key, BATCH, LENGTH + 1)


def build(seed: int, **variant: Any) -> DecoderLM:
    """The model of one variant."""
    config = LMConfig(vocab_size=16, dim=64, num_layers=2, num_heads=4, max_length=LENGTH, **variant)
    return DecoderLM(config, rngs=nnx.Rngs(seed))


def inspect(model: DecoderLM, tokens: Int[Array, "B T"]) -> dict[str, list]:
    """Per layer of an adaptive model: its alphas, the density of its causal weights, its heads' divergence."""
    tokens = tokens[:, :LENGTH]
    x = model.positions(model.embed(tokens), jnp.arange(LENGTH))
    triangle = jnp.tri(LENGTH, dtype=bool)
    found: dict[str, list] = {"alpha": [], "density": [], "divergence between heads (nats)": []}
    for layer in model.layers.runs:
        mixer = layer.mixer
        assert isinstance(mixer, AdaptiveEntmaxAttention)
        weights = mixer.attention_weights(layer.mixer_norm(x))
        found["alpha"].append([round(float(a), 4) for a in mixer.alpha])
        found["density"].append(round(float(attention_density(weights, where=triangle)), 4))
        found["divergence between heads (nats)"].append(round(float(head_js_diversity(weights).mean()), 4))
        x, _ = layer(x)
    return found


def run(seeds: Sequence[int] = (0, 1), quick: bool = False) -> ClaimResult:
    """quick: a few steps, to see that it runs."""
    start = time.perf_counter()
    steps = 8 if quick else 400
    values: dict[str, list[float]] = {name: [] for name in VARIANTS}
    found = []
    for seed in seeds:
        for name, variant in VARIANTS.items():
            model = build(seed, **variant)
            fit(model, next_token_loss, batch, steps=steps, seed=seed, learning_rate=3e-3)
            values[name].append(mean_loss(model, next_token_loss, batch, seed=seed))
            if name == "adaptive entmax":
                found.append(inspect(model, batch(jax.random.fold_in(jax.random.key(seed), 2))))
    pairs = zip(values["softmax"], values["adaptive entmax"], strict=True)
    close = all(abs(adaptive - softmax) < 0.12 for softmax, adaptive in pairs)
    sparse = all(density < 0.7 for each in found for density in each["density"])
    moved = all(abs(a - START) > 0.03 for each in found for layer in each["alpha"] for a in layer)
    return ClaimResult(
        key="adaptive_entmax",
        claim="heads that learn the alpha of their entmax give most tokens no weight at all and model as well as softmax",
        metric="loss on fresh sequences (nats per token)",
        seeds=seeds,
        values=values,
        margin=(
            "losses within 0.12 of each other, fewer than 0.7 of the causal weights not zero in every layer, every "
            "alpha more than 0.03 from where it started"
        ),
        reproduced=close and sparse and moved,
        seconds=time.perf_counter() - start,
        details={"steps": steps, "adaptive entmax, per seed": found},
    )
