"""The claims of Brody et al. 2023: scaling makes every key selectable, projecting lets a query attend to all keys alike.

Scaling: 1000 normal keys in 8 and in 4 dimensions, as they are and after LayerNorm without gain and bias. Measured: the share
of un-select-able keys.
Projecting, constructively: a query and key projection that give equal attention for every input behind the projection (how far
its weights are from 1/S), and how far any non-zero query is from scoring D + 1 unprojected keys alike (the smallest singular
value of [K, -1], 0 when one does).
Reported only: the majority task (20 tokens of 6 classes, lead of at least 3; D = 16, 1 head; Adam, cosine from 1e-3, 600 steps
of 64) with and without the projection: the loss on fresh sequences, and the mean angle of queries to the vector of ones.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from attnzoo.zoo.inspect.ln_expressivity import (
    FactorizedLayerNorm,
    MajorityProbe,
    equal_attention_query,
    majority_task,
    unselectable_fraction,
)
from train.claims import ClaimResult
from train.claims.common import fit, mean_loss

KEYS, WIDTHS = 1000, (8, 4)
BATCH = 64
make_batch = functools.partial(majority_task, batch=BATCH)


def equal_attention(seed: int, dim: int = 16, count: int = 100) -> dict[str, float]:
    """How nearly equal attention is behind the projection, and how far from possible it is without."""
    rng = np.random.default_rng(seed)
    x, w_k = rng.normal(size=(count, dim)), rng.normal(size=(dim, dim)) / dim**0.5
    w_q = np.outer(np.ones(dim) / dim, equal_attention_query(w_k))  # every x with x · 1 = c queries c · q
    projected = x - x.mean(1, keepdims=True)
    logits = (1 + x) @ w_q @ (projected @ w_k).T / dim**0.5
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    unprojected = np.concatenate([x[: dim + 1], -np.ones((dim + 1, 1))], 1)
    return {
        "largest distance of a weight from 1/S": float(np.abs(weights - 1 / count).max()),
        "smallest singular value without projection": float(np.linalg.svd(unprojected, compute_uv=False)[-1]),
    }


def loss(model: MajorityProbe, sequences: tuple[Array, Array]) -> Float[Array, ""]:
    """Mean cross-entropy over all positions, in nats."""
    tokens, labels = sequences
    logits = model(tokens)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(labels[:, None], tokens.shape)).mean()


def majority(seed: int, norm: str, steps: int) -> dict[str, float]:
    """The probe with this norm, trained."""
    model = MajorityProbe(6, 16, norm=norm, rngs=nnx.Rngs(seed))
    fit(model, loss, make_batch, steps=steps, seed=seed, learning_rate=1e-3)
    return {
        "loss (nats)": round(mean_loss(model, loss, make_batch, seed=seed), 4),
        "angle to the ones vector (degrees)": round(float(model.angles().mean()), 1),
    }


def run(seeds: Sequence[int] = (0, 1, 2), quick: bool = False) -> ClaimResult:
    """quick: few keys and steps, to see that it runs."""
    start = time.perf_counter()
    count, steps = (60, 8) if quick else (KEYS, 600)
    values: dict[str, list[float]] = {f"{kind}, D={dim}": [] for dim in WIDTHS for kind in ("normal", "LayerNorm")}
    details: dict[str, Any] = {"steps": steps, "equal attention": [], "majority task": {"layer": [], "no projection": []}}
    for seed in seeds:
        for dim in WIDTHS:
            keys = jax.random.normal(jax.random.fold_in(jax.random.key(seed), dim), (count, dim))
            values[f"normal, D={dim}"].append(unselectable_fraction(keys))
            norm = FactorizedLayerNorm(dim, affine=False)
            values[f"LayerNorm, D={dim}"].append(unselectable_fraction(norm(keys)))
        details["equal attention"].append(equal_attention(seed))
        for norm_name, runs in details["majority task"].items():
            runs.append(majority(seed, norm_name, steps))
    least = {8: 0.3, 4: 0.8}
    selectable = all(min(values[f"normal, D={dim}"]) > least[dim] and max(values[f"LayerNorm, D={dim}"]) == 0 for dim in WIDTHS)
    distance, singular = zip(*(each.values() for each in details["equal attention"]), strict=True)
    return ClaimResult(
        key="ln_expressivity",
        claim=(
            "scaling keys to one norm makes each of them selectable, and projecting them lets a query attend to all alike, "
            "which no query does to unprojected keys"
        ),
        metric=f"un-select-able keys of {count} (share)",
        seeds=seeds,
        values=values,
        margin=(
            "normal keys above 0.3 (D=8) and 0.8 (D=4), 0 after LayerNorm; weights within 1e-6 of 1/S with projection, "
            "smallest singular value above 1e-6 without; with every seed"
        ),
        reproduced=selectable and max(distance) < 1e-6 and min(singular) > 1e-6,
        seconds=time.perf_counter() - start,
        details=details,
    )
