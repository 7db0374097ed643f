"""The training step: model, optimizer and mesh as pure functions on a state."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from attnzoo.nn.linear import axis_names
from train.config import Config
from train.sharding import on_mesh, put_batch, shardings
from train.tasks.base import Batch, Task


class TrainState(NamedTuple):
    """Everything a step changes: `model` is parameters and the rest (random streams, statistics)."""

    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]


def learning_rate(config: Config) -> optax.Schedule:
    """Of the update after `count` others: linear warm-up to the peak, then a cosine down to its final fraction."""
    options = config.optimizer
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=options.learning_rate,
        warmup_steps=round(options.warmup * config.steps),
        decay_steps=config.steps,
        end_value=options.final_fraction * options.learning_rate,
    )
    return lambda count: schedule(count + 1)  # or the first update would be nothing


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW on clipped gradients; weights decay where a parameter has more than one axis."""
    options = config.optimizer
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(
            learning_rate(config),
            b1=options.b1,
            b2=options.b2,
            weight_decay=options.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params: nnx.State) -> Any:
    def mark(variable: nnx.Variable) -> Any:
        stacked = "layers" in (axis_names(variable) or ())  # by scan_layers
        return jax.tree.map(lambda array: array.ndim - stacked > 1, variable)

    return jax.tree.map(mark, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def one_at_a_time(compiled: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`compiled`, made to finish before the next call where the mesh is of several CPU devices.

    Those share one pool of threads: two programs in flight, each waiting in a collective for devices that the other one
    occupies, stop for good (and XLA then aborts the process).
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return compiled
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


class Trainer:
    """The compiled functions of one run. Building it runs nothing on a device.

    parameters: how many numbers the model's parameters hold.
    """

    def __init__(self, task: Task, config: Config, mesh: Mesh):
        self.task, self.mesh, self.exchange = task, mesh, config.mesh.exchange
        self.optimizer = make_optimizer(config)
        self.graphdef: nnx.GraphDef
        self.seed = config.seed
        self.abstract: TrainState = jax.eval_shape(self._init)
        self.shardings: TrainState = shardings(self.abstract, mesh)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, None))
        self.train_step = one_at_a_time(step, mesh)
        self._evaluate_batch = one_at_a_time(jax.jit(self._evaluate), mesh)

    def init(self, seed: int | None = None) -> TrainState:
        """The state before the first step, created in place on the mesh. seed: instead of the configuration's."""
        with on_mesh(self.mesh, self.exchange):
            return jax.jit(functools.partial(self._init, seed), out_shardings=self.shardings)()

    def put(self, batch: Batch) -> dict[str, jax.Array]:
        return put_batch(batch, self.task.sequence, self.mesh)

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's validation metrics over all batches."""
        with on_mesh(self.mesh, self.exchange):
            sums = [self._evaluate_batch(state, self.put(batch)) for batch in batches]
        totals = jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *jax.device_get(sums))
        return self.task.score(totals)

    def model(self, params: nnx.State, rest: nnx.State) -> nnx.Module:
        """The model in evaluation mode, with parameters gathered on one device."""
        params, rest = jax.device_put((params, rest), self.mesh.devices.flat[0])
        model = nnx.merge(self.graphdef, params, rest, copy=True)
        model.eval()
        return model

    def _init(self, seed: int | None = None) -> TrainState:
        model = self.task.make_model(nnx.Rngs(self.seed if seed is None else seed))
        model.train()
        self.graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
        return TrainState(params, rest, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def _step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss(params: nnx.State, rest: nnx.State) -> tuple[jax.Array, nnx.State]:
            model = nnx.merge(self.graphdef, params, rest, copy=True)
            value = self.task.loss(model, batch)
            return value, nnx.state(model, nnx.Not(nnx.Param))

        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state.rest)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(params, rest, opt_state, state.step + 1), metrics

    def _evaluate(self, state: TrainState, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        model = nnx.merge(self.graphdef, state.params, state.rest, copy=True)
        model.eval()
        return self.task.evaluate(model, batch)
