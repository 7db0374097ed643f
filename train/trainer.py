"""The training step: model, optimizer and mesh as pure functions on a state."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from attnzoo.nn.auxiliary import collecting, objective
from train.config import Config
from train.optimizers import averaged, learning_rate, make_optimizer
from train.sharding import batch_sharding, on_mesh, put_batch, rows_here, shardings
from train.tasks.base import Batch, Task


class TrainState(NamedTuple):
    """Everything a step changes.

    params: the model's parameters, rest: what else it holds (random streams, statistics).
    ema: the moving average of the parameters, None for a run that keeps none.
    """

    params: nnx.State
    rest: nnx.State
    opt_state: optax.OptState
    step: Int[Array, ""]
    ema: nnx.State | None = None

    @property
    def weights(self) -> nnx.State:
        """The parameters to use the model with: their average where there is one."""
        return self.params if self.ema is None else self.ema


def one_at_a_time(compiled: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`compiled`, made to finish before the next call where the mesh is of several CPU devices.

    Those share one pool of threads: two programs in flight, each waiting in a collective for devices that the other one
    occupies, stop for good (and XLA then aborts the process).
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return compiled
    return lambda *arguments: jax.block_until_ready(compiled(*arguments))


Arrays = dict[str, jax.Array]
"""By name: a batch, or what a step measured."""

Measured = Float[Array, "metrics"]
"""What a step measured, in the order of `Trainer.measured`: one array, since bringing one to the host costs time."""

Leaves = tuple[jax.Array, ...]
"""Of a `TrainState`, in the order of its tree."""


def _parts(values: jax.Array, count: int) -> jax.Array:
    """[B, ...] -> [count, B / count, ...]: every count-th row, so that each device cuts its own rows and none travel."""
    return values.reshape(-1, count, *values.shape[1:]).swapaxes(0, 1)


class Trainer:
    """The compiled functions of one run. Building it runs nothing on a device.

    parameters: how many numbers the model's parameters hold.
    measured: the names of what a step measures, known once a step was traced.
    """

    measured: tuple[str, ...]

    def __init__(self, task: Task, config: Config, mesh: Mesh):
        self.task, self.mesh, self.exchange = task, mesh, config.mesh.exchange
        self.optimizer, self.rate = make_optimizer(config), learning_rate(config)
        self.accumulate, self.ema_decay = config.accumulate, config.ema
        self.graphdef: nnx.GraphDef
        self.seed = config.seed
        self.abstract: TrainState = jax.eval_shape(self._init)
        self.shardings: TrainState = shardings(self.abstract, mesh)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.abstract.params))
        self._whole = NamedSharding(mesh, PartitionSpec())  # metrics: every process has them
        self._structure = jax.tree.structure(self.abstract)
        self._compiled_step: Any = self._compile()
        self.step_leaves: Callable[[Leaves, Arrays], tuple[Leaves, Measured]] = one_at_a_time(self._compiled_step, mesh)
        self._evaluate_batch = one_at_a_time(jax.jit(self._evaluate, out_shardings=self._whole), mesh)

    def init(self, seed: int | None = None) -> TrainState:
        """The state before the first step, created in place on the mesh. seed: instead of the configuration's."""
        with on_mesh(self.mesh, self.exchange):
            return jax.jit(functools.partial(self._init, seed), out_shardings=self.shardings)()

    def leaves(self, state: TrainState) -> Leaves:
        """The arrays of a state: what `step_leaves` takes and returns, and a loop holds at less cost than modules' trees."""
        return tuple(jax.tree.leaves(state))

    def state(self, leaves: Leaves) -> TrainState:
        """The state that these are the `leaves` of."""
        return jax.tree.unflatten(self._structure, leaves)

    def train_step(self, state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        """The state after one more step, and what was measured; the given state's arrays are given up."""
        leaves, values = self.step_leaves(self.leaves(state), batch)
        return self.state(leaves), dict(zip(self.measured, jnp.unstack(values), strict=True))

    def trace(self, batch: dict[str, jax.ShapeDtypeStruct]) -> jax.stages.Traced:
        """The training step for batches of these shapes, to be lowered; its mesh may be one of devices that are not here."""

        def laid(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        state = self.leaves(jax.tree.map(laid, self.abstract, self.shardings))
        placed = {name: laid(x, batch_sharding(name, self.task.sequence, self.mesh)) for name, x in batch.items()}
        with on_mesh(self.mesh, self.exchange):
            return self._compiled_step.trace(state, placed)

    @functools.cached_property
    def rows(self) -> Int[np.ndarray, "R"] | None:
        """The rows of a training batch that this process has to make, None for all: those its devices hold."""
        return None if jax.process_count() == 1 else rows_here(self.task.config.batch, self.mesh)

    def put(self, batch: Batch) -> Arrays:
        """The `rows` of a training batch on the mesh."""
        part_of = None if self.rows is None else (self.rows, self.task.config.batch)
        return put_batch(batch, self.task.sequence, self.mesh, part_of)

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> dict[str, float]:
        """The task's validation metrics over all batches."""
        with on_mesh(self.mesh, self.exchange):
            placed = (put_batch(batch, self.task.sequence, self.mesh) for batch in batches)
            sums = [self._evaluate_batch(state, batch) for batch in placed]
        totals = jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *jax.device_get(sums))
        return self.task.score(totals)

    def model(self, params: nnx.State, rest: nnx.State) -> nnx.Module:
        """The model in evaluation mode, with parameters gathered on one device of this process."""
        if jax.process_count() > 1:  # each device gets all, and each process keeps what one of its own has
            gathered = jax.jit(lambda tree: tree, out_shardings=self._whole)((params, rest))
            params, rest = jax.tree.map(lambda array: array.addressable_data(0), gathered)
        else:
            params, rest = jax.device_put((params, rest), self.mesh.devices.flat[0])
        model = nnx.merge(self.graphdef, params, rest, copy=True)
        model.eval()
        return model

    def _init(self, seed: int | None = None) -> TrainState:
        model = self.task.make_model(nnx.Rngs(self.seed if seed is None else seed))
        model.train()
        self.graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
        ema = None if self.ema_decay is None else jax.tree.map(jnp.copy, params)  # both are donated, so they must be two
        return TrainState(params, rest, self.optimizer.init(params), jnp.zeros((), jnp.int32), ema)

    def _compile(self) -> Callable[..., Any]:
        placed = tuple(jax.tree.leaves(self.shardings))
        return jax.jit(self._step_leaves, donate_argnums=0, out_shardings=(placed, self._whole))

    def _step_leaves(self, leaves: Leaves, batch: Arrays) -> tuple[Leaves, Measured]:
        state, metrics = self._step(self.state(leaves), batch)
        self.measured = tuple(metrics)
        return self.leaves(state), jnp.stack([jnp.asarray(value, jnp.float32) for value in metrics.values()])

    def _step(self, state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        gradients, rest, metrics = self._gradients(state.params, state.rest, batch)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params, step = optax.apply_updates(state.params, updates), state.step + 1
        ema = None if self.ema_decay is None else averaged(state.ema, params, step, self.ema_decay)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(gradients), "learning_rate": self.rate(state.step)}
        return TrainState(params, rest, opt_state, step, ema), metrics

    def _gradients(self, params: nnx.State, rest: nnx.State, batch: Arrays) -> tuple[nnx.State, nnx.State, Arrays]:
        """(gradients, rest, metrics) of the mean loss of a batch, in `accumulate` parts one after another."""
        if self.accumulate == 1:
            return self._gradients_at_once(params, rest, batch)
        parts = {name: _parts(values, self.accumulate) for name, values in batch.items()}
        weights = jax.vmap(self.task.loss_weight)(parts)
        shares = weights / jnp.maximum(weights.sum(), jnp.finfo(weights.dtype).tiny)

        def add(carry: tuple, given: tuple) -> tuple[tuple, None]:
            rest, sums = carry
            part, share = given
            gradients, rest, metrics = self._gradients_at_once(params, rest, part)
            return (rest, jax.tree.map(lambda total, one: total + share * one, sums, (gradients, metrics))), None

        first = jax.tree.map(lambda values: values[0], parts)
        metrics = jax.eval_shape(self._gradients_at_once, params, rest, first)[2]
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (params, metrics))
        (rest, (gradients, metrics)), _ = jax.lax.scan(add, (rest, zeros), (parts, shares))
        return gradients, rest, metrics

    def _gradients_at_once(self, params: nnx.State, rest: nnx.State, batch: Arrays) -> tuple[nnx.State, nnx.State, Arrays]:
        def loss(params: nnx.State) -> tuple[jax.Array, tuple[nnx.State, Arrays]]:
            model = nnx.merge(self.graphdef, params, rest, copy=True)
            with collecting(batch.get("where")) as found:
                value = self.task.loss(model, batch)
            metrics = {"loss": value, **{name: each.value for name, each in found.items()}}
            return value + objective(found), (nnx.state(model, nnx.Not(nnx.Param)), metrics)

        (_, (rest, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return gradients, rest, metrics

    def _evaluate(self, state: TrainState, batch: Arrays) -> Arrays:
        model = nnx.merge(self.graphdef, state.weights, state.rest, copy=True)
        model.eval()
        return self.task.evaluate(model, batch)
