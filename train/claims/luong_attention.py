"""The claim of Luong et al. 2015: attention carries long sources, and a small window suffices where the order is kept.

Strings of 8 to 16 symbols out of 20, to be written backwards or copied, by an LSTM encoder-decoder (1 layer, D = 64) with
input feeding; 600 steps of 64 strings with Adam, cosine from 3e-3. Backwards: global attention (general) and none; copying:
global, local-m that reads 2 D_w + 1 = 5 states, and none. Measured: the share of tokens of 512 fresh strings of 16 symbols
that are right, each predicted from the right ones before it. local-p on the backward task and none on copying are reported
only.

Beside it the alignment error rate of the largest weights, and how many of them lie one state past the symbol that is
written, in a state that has read it: on the backward task the output is right though the alignment is not.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from attnzoo.models.luong import LuongConfig, LuongSeq2Seq
from attnzoo.models.objectives import label_smoothed_ce
from attnzoo.zoo.alignment.luong_attention import alignment_error_rate, argmax_links
from train.claims import ClaimResult
from train.claims.common import fit

PAD, BOS, FIRST = 0, 1, 2
SYMBOLS, SHORTEST, LONGEST, BATCH = 20, 8, 16, 64
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {  # name -> (backwards, configuration)
    "reverse: global": (True, {"attention": "global"}),
    "reverse: none": (True, {"attention": "none"}),
    "reverse: local-p": (True, {"attention": "local-p", "attention_args": {"window": 5}}),
    "copy: global": (False, {"attention": "global"}),
    "copy: none": (False, {"attention": "none"}),
    "copy: local-m, D_w = 2": (False, {"attention": "local-m", "attention_args": {"window": 2}}),
}


def strings(
    backwards: bool | Bool[Array, ""], key: Array, batch: int = BATCH, shortest: int = SHORTEST
) -> tuple[Int[Array, "B 16"], Int[Array, "B 16"]]:
    """(source, target), padded with PAD."""
    lengths_key, symbols_key = jax.random.split(key)
    lengths = jax.random.randint(lengths_key, (batch, 1), shortest, LONGEST + 1)
    symbols = jax.random.randint(symbols_key, (batch, LONGEST), FIRST, FIRST + SYMBOLS)
    at = jnp.arange(LONGEST)
    source = jnp.where(at < lengths, symbols, PAD)
    read = jnp.where(backwards, jnp.maximum(lengths - 1 - at, 0), at)
    return source, jnp.where(at < lengths, jnp.take_along_axis(symbols, read, 1), PAD)


def shifted(target: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """What the decoder is given: BOS and all but the last token."""
    return jnp.pad(target, ((0, 0), (1, 0)), constant_values=BOS)[:, :-1]


def loss(model: LuongSeq2Seq, pair: tuple[Array, Array]) -> Float[Array, ""]:
    """Mean cross-entropy of the target in nats, padding left out."""
    source, target = pair
    logits = model(source, shifted(target), source_mask=source != PAD)
    return label_smoothed_ce(logits, target, smoothing=0.0, where=target != PAD)


@nnx.jit
def evaluate(model: LuongSeq2Seq, source: Int[Array, "B S"], target: Int[Array, "B T"]) -> tuple[Array, Array]:
    """(share of right tokens, attention weights [B, T, S])."""
    right = model(source, shifted(target)).argmax(-1) == target
    return right.mean(), model.attention_weights(source, shifted(target))


def run(seeds: Sequence[int] = (0, 1), quick: bool = False) -> ClaimResult:
    """quick: a few steps, to see that it runs."""
    start = time.perf_counter()
    steps = 8 if quick else 600
    values: dict[str, list[float]] = {name: [] for name in METHODS}
    errors: dict[str, list[float]] = {name: [] for name in METHODS if "none" not in name}
    past: dict[str, list[float]] = {name: [] for name in errors}
    for seed in seeds:
        for name, (backwards, options) in METHODS.items():
            model = LuongSeq2Seq(LuongConfig(vocab_size=FIRST + SYMBOLS, **options), rngs=nnx.Rngs(seed))
            fit(model, loss, Partial(strings, backwards), steps=steps, seed=seed, learning_rate=3e-3)
            fresh = jax.random.fold_in(jax.random.key(seed), 1)
            right, weights = evaluate(model, *strings(backwards, fresh, 512, shortest=LONGEST))
            values[name].append(float(right))
            if name in errors:
                truth = np.eye(LONGEST, dtype=bool)[::-1] if backwards else np.eye(LONGEST, dtype=bool)
                links = argmax_links(np.asarray(weights))
                errors[name].append(round(alignment_error_rate(links, np.broadcast_to(truth, links.shape)), 4))
                past[name].append(round(float(links[:, np.pad(truth, ((0, 0), (1, 0)))[:, :-1]].sum() / links.sum()), 4))
    reverse, none, copy, local = (
        np.array(values[name]) for name in ("reverse: global", "reverse: none", "copy: global", "copy: local-m, D_w = 2")
    )
    return ClaimResult(
        key="luong_attention",
        claim=(
            "attention to all source states lets a recurrent decoder write long strings backwards, where one without "
            "attention gets many tokens wrong, and a window of five states copies as well as the whole source"
        ),
        metric="right tokens of 16-symbol strings (share)",
        seeds=seeds,
        values=values,
        margin="reverse: global above 0.9 and at least 0.2 above none; copy: local-m within 0.05 of global; with every seed",
        reproduced=bool(((reverse > 0.9) & (reverse - none >= 0.2) & (np.abs(copy - local) <= 0.05)).all()),
        seconds=time.perf_counter() - start,
        details={"steps": steps, "alignment error rate of the largest weights": errors, "share of them one state past": past},
    )
