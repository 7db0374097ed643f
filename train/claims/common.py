"""What claims share: a trainer for small models, and synthetic sequences."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.models.layers import LayerConfig, layer_maker
from attnzoo.models.lm import DecoderLM
from attnzoo.nn.embed import LearnedPositions
from attnzoo.nn.linear import linear
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack

Loss = Callable[[Any, PyTree], Array]
"""(model, batch) -> a scalar."""

MakeBatch = Callable[[Array], PyTree]
"""Random key -> a batch, traced under jit."""

_T = TypeVar("_T")
_R = TypeVar("_R")


def noisy_periodic(
    key: Array,
    batch: int,
    length: int,
    *,
    symbols: int = 16,
    shortest: int = 4,
    longest: int = 12,
    noise: float = 0.05,
) -> Int[Array, "B T"]:
    """Sequences that repeat a random pattern, with some tokens replaced.

    Each row draws a period from shortest..longest and a pattern of that many symbols; a share `noise` of the
    tokens is then drawn anew from all symbols.
    """
    of_period, of_pattern, of_place, of_symbol = jax.random.split(key, 4)
    period = jax.random.randint(of_period, (batch, 1), shortest, longest + 1)
    pattern = jax.random.randint(of_pattern, (batch, longest), 0, symbols)
    clean = jnp.take_along_axis(pattern, jnp.arange(length) % period, axis=1)
    replaced = jax.random.bernoulli(of_place, noise, (batch, length))
    return jnp.where(replaced, jax.random.randint(of_symbol, (batch, length), 0, symbols), clean)


def next_token_loss(model: nnx.Module, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of every token after the first."""
    logits = model(tokens[:, :-1])  # type: ignore[operator]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def redraw(model: DecoderLM, key: Array, std: float = 0.02) -> None:
    """Draws every matrix of a model anew from N(0, std²), in place."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for i, (path, leaf) in enumerate(flat):
        if path[-1] in ("kernel", "table"):
            # A looked-up row is multiplied by sqrt(D).
            scale = std / model.embed.scale if path[-1] == "table" else std
            leaf[...] = scale * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
    nnx.update(model, nnx.from_flat_state(flat))


def fit(
    model: nnx.Module,
    loss: Loss,
    make_batch: MakeBatch,
    *,
    steps: int,
    seed: int,
    learning_rate: float = 2e-3,
    warmup: int = 20,
    probe: Callable[[int, Any], None] | None = None,
    every: int | None = None,
) -> Float[Array, "steps"]:
    """Trains `model` in place with Adam, warm-up and a cosine to 0; returns the loss of every step.

    All steps are one compiled scan; batches are made inside it. Models without random state (dropout) only. Models of one
    structure with the same `loss` and `make_batch` share what was compiled; arrays that differ by seed go into a
    `jax.tree_util.Partial`.
    probe: called with (step, model) before the first step, after the last, and each `every` steps between.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    init, run = _training(graphdef, loss, steps, learning_rate, min(warmup, steps // 4))
    state, losses, batches = (params, init(params)), [], _as_argument(make_batch)
    keys = jax.random.split(jax.random.key(seed), steps)
    for start in range(0, steps, every or steps):
        if probe is not None:
            probe(start, model)
        state, part = run(state, keys[start : start + (every or steps)], rest, batches)
        losses.append(part)
        nnx.update(model, state[0])
    if probe is not None:
        probe(steps, model)
    return jnp.concatenate(losses)


@functools.lru_cache(maxsize=16)
def _training(
    graphdef: nnx.GraphDef, loss: Loss, steps: int, learning_rate: float, warmup: int
) -> tuple[Callable[..., optax.OptState], Callable[..., tuple[Any, Array]]]:
    """(parameters -> the optimizer's state, (state, keys, rest, make_batch) -> (state, losses)), compiled when called."""
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, steps))

    @jax.jit
    def run(state: tuple[nnx.State, optax.OptState], keys: Array, rest: nnx.State, make_batch: MakeBatch) -> tuple[Any, Array]:
        def step(state: tuple[nnx.State, optax.OptState], key: Array) -> tuple[tuple, Array]:
            params, opt_state = state

            def of(params: nnx.State) -> Array:
                return loss(nnx.merge(graphdef, params, rest, copy=True), make_batch(key))

            value, gradients = jax.value_and_grad(of)(params)
            updates, opt_state = optimizer.update(gradients, opt_state)
            return (optax.apply_updates(params, updates), opt_state), value

        return jax.lax.scan(step, state, keys)

    return jax.jit(optimizer.init), run


def _as_argument(make_batch: MakeBatch) -> MakeBatch:
    """A function of which compiled ones take the arrays it holds, if any, as arguments."""
    return make_batch if isinstance(make_batch, jax.tree_util.Partial) else jax.tree_util.Partial(make_batch)


def two_at_a_time(call: Callable[[_T], _R], arguments: Iterable[_T]) -> list[_R]:
    """The result for each argument, in their order; two calls run beside each other.

    For models so small that half of a step goes by while threads wait for each other: the other call uses that half. What
    each call returns does not depend on it.
    """
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, arguments))


def mean_loss(model: nnx.Module, loss: Loss, make_batch: MakeBatch, *, seed: int, batches: int = 8) -> float:
    """The loss over batches that `fit` with the same seed never saw, without dropout; compiled as there."""
    model = nnx.merge(*nnx.split(model))  # the caller's keeps its mode
    model.eval()
    graphdef, state = nnx.split(model)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), batches)
    return float(_testing(graphdef, loss)(state, keys, _as_argument(make_batch)))


@functools.lru_cache(maxsize=16)
def _testing(graphdef: nnx.GraphDef, loss: Loss) -> Callable[..., Array]:
    """(state, keys, make_batch) -> the mean loss."""

    @jax.jit
    def run(state: nnx.State, keys: Array, make_batch: MakeBatch) -> Array:
        return jax.lax.map(lambda key: loss(nnx.merge(graphdef, state, copy=True), make_batch(key)), keys).mean()

    return run


def digit_rows(seed: int) -> tuple[Float[np.ndarray, "1797 8 8"], Int[np.ndarray, "1797"]]:
    """(images, labels) of scikit-learn's digits in an order drawn by seed; a row of 8 pixels in [0, 1] is a token."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    return (digits.images[order] / 16).astype(np.float32), digits.target[order].astype(np.int32)


class RowClassifier(nnx.Module):
    """images [B, T, width] -> logits [B, classes]: rows as tokens through an encoder, then their mean.

    config: of the layers; positions are learned.
    """

    def __init__(self, config: LayerConfig, *, length: int = 8, width: int = 8, classes: int = 10, rngs: nnx.Rngs):
        self.embed = linear(width, config.dim, (None, "embed"), use_bias=True, rngs=rngs)
        self.positions = LearnedPositions(length, config.dim, rngs=rngs)
        self.layers = Stack(layer_maker(config, rngs, causal=False), config.num_layers)
        self.norm = norm(config.norm, config.dim, rngs=rngs) if config.norm_first else None
        self.head = linear(config.dim, classes, ("embed", None), use_bias=True, rngs=rngs)

    def tokens(self, images: Float[Array, "B T width"]) -> Float[Array, "B T D"]:
        """What the first layer is given."""
        return self.embed(images) + self.positions(np.arange(images.shape[1]))

    def __call__(self, images: Float[Array, "B T width"]) -> Float[Array, "B classes"]:
        x = self.layers(self.tokens(images))
        return self.head((x if self.norm is None else self.norm(x)).mean(1))


def label_loss(model: nnx.Module, batch: tuple[Array, Array]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of (inputs, labels)."""
    inputs, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), labels).mean()  # type: ignore[operator]
