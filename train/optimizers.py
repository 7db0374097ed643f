"""How parameters follow their gradients: schedules, optimizers, and the average of parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PyTree

from attnzoo.nn.linear import axis_names
from train.config import Config

_MUON_RMS = 0.2  # of an update, as of AdamW's: one learning rate then serves both (Liu et al., 2025, arXiv 2502.16982)


def learning_rate(config: Config) -> optax.Schedule:
    """Of the update after `count` others: linear warm-up to the peak, then what `optimizer.schedule` says."""
    options, steps = config.optimizer, config.steps
    peak, last = options.learning_rate, options.final_fraction * options.learning_rate
    warm = round(options.warmup * steps)
    cool = max(1, round(options.cooldown * steps))
    rest = max(1, steps - warm)
    parts: dict[str, list[tuple[int, optax.Schedule]]] = {
        "cosine": [(warm, optax.cosine_decay_schedule(peak, rest, options.final_fraction))],
        "linear": [(warm, optax.linear_schedule(peak, last, rest))],
        "constant": [(warm, optax.constant_schedule(peak))],
        "wsd": [
            (warm, optax.constant_schedule(peak)),
            (max(warm, steps - cool), optax.linear_schedule(peak, last, cool)),
        ],
    }
    starts, schedules = zip(*parts[options.schedule], strict=True)
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warm)), *schedules], list(starts))
    return lambda count: schedule(count + 1)  # or the first update would be nothing


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """`optimizer.name` on clipped gradients; weights decay where a parameter has more than one axis."""
    options, rate = config.optimizer, learning_rate(config)
    if options.name == "adamw":
        rule = optax.adamw(rate, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay, mask=_is_matrix)
    elif options.name == "lion":
        rule = optax.lion(rate, b1=options.b1, b2=options.b2, weight_decay=options.weight_decay, mask=_is_matrix)
    elif options.name == "muon":
        rule = optax.chain(
            optax.contrib.muon(
                1.0,
                beta=options.momentum,
                adam_b1=options.b1,
                adam_b2=options.b2,
                muon_weight_dimension_numbers=_matrix_axes,
                consistent_rms=_MUON_RMS,
            ),
            # After both of its rules, and against the sign that they have already given their updates.
            optax.add_decayed_weights(-options.weight_decay, mask=_is_matrix),
            optax.scale_by_schedule(rate),
        )
    else:
        rule = optax.chain(
            optax.trace(options.momentum, nesterov=True),
            optax.add_decayed_weights(options.weight_decay, mask=_is_matrix),
            optax.scale_by_learning_rate(rate),
        )
    return optax.chain(optax.clip_by_global_norm(options.clip), rule)


def _per_array(mark: Any, params: nnx.State) -> Any:
    """mark(names, array) for every array; the result has the structure of params."""

    def of(variable: nnx.Variable) -> Any:
        names = axis_names(variable)
        return jax.tree.map(lambda array: mark(names or (None,) * array.ndim, array), variable)

    return jax.tree.map(of, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _is_matrix(params: nnx.State) -> Any:
    return _per_array(lambda names, array: array.ndim - ("layers" in names) > 1, params)  # "layers" is scan_layers' axis


def _matrix_axes(params: nnx.State) -> Any:
    """Which axes of each parameter are the rows and the columns of a linear map, for Muon; None for what is none.

    Head and head_dim count as one axis. Of more than two axes the first maps to all others if it is "embed"; else the last
    two are the map, and the others (layers, experts) number such maps. Tables of the vocabulary are looked up, not applied.
    """

    def mark(names: tuple[str | None, ...], array: Array) -> optax.contrib.MuonDimensionNumbers | None:
        groups: list[list[int]] = []
        for axis, name in enumerate(names):
            if name == "head_dim" and groups and names[axis - 1] in ("heads", "kv_heads"):
                groups[-1].append(axis)
            elif name != "layers":
                groups.append([axis])
        if len(groups) < 2 or "vocab" in names:
            return None
        if names[groups[0][0]] == "embed":
            rows, columns = groups[0], [axis for group in groups[1:] for axis in group]
        else:
            rows, columns = groups[-2:]
        return optax.contrib.MuonDimensionNumbers(tuple(rows), tuple(columns))

    return _per_array(mark, params)


def averaged(average: PyTree, params: PyTree, step: Int[Array, ""], decay: float) -> PyTree:
    """The exponential moving average after update `step`, counted from 1.

    Early on it forgets faster, min(decay, (1 + step) / (10 + step)), so that it does not keep what training started from.
    """
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: d * old + (1 - d) * new, average, params)
