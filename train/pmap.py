"""The plain data-parallel loop: every device holds the whole model and takes its part of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.config import Config
from train.sharding import AXES, describe
from train.tasks.base import Batch, Task
from train.trainer import Arrays, Trainer

_AXIS = "devices"  # of the pmap, whatever the mesh calls it


class PmapTrainer(Trainer):
    """`Trainer` whose training step is a `jax.pmap`, with one sum of the gradients over all devices.

    States, checkpoints and evaluation are those of `Trainer` on the same mesh; so are the losses, but for rounding and for
    dropout, of which each device draws its own.

    Raises ValueError for a mesh that divides anything but the batch, and in a run of several processes.
    """

    def __init__(self, task: Task, config: Config, mesh: Mesh):
        if mesh.size != mesh.shape["data"] or jax.process_count() > 1:
            raise ValueError(
                f"--loop pmap: copies of the whole model on the devices of one process, --mesh.data N, are all that it can do; "
                f"the mesh is {describe(config.mesh)} in {jax.process_count()} processes. Take --loop jit"
            )
        super().__init__(task, config, mesh)

    def put(self, batch: Batch) -> Arrays:
        """A training batch on the mesh, [devices, rows, ...]."""
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES[0]))

        def placed(values: np.ndarray) -> jax.Array:
            return jax.device_put(values.reshape(self.mesh.size, -1, *values.shape[1:]), sharding)

        return {name: placed(values) for name, values in batch.items()}

    def _compile(self) -> Callable[..., Any]:
        devices = list(self.mesh.devices.flat)
        step = jax.pmap(self._step_leaves, _AXIS, in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0)
        nowhere = Mesh(np.empty((), object), ())  # a pmap makes its own mesh, and refuses to run within another

        def run(*arguments: Any) -> Any:
            with jax.set_mesh(nowhere):
                return step(*arguments)

        return run

    def _gradients(self, params: nnx.State, rest: nnx.State, batch: Arrays) -> tuple[nnx.State, nnx.State, Arrays]:
        gradients, after, metrics = super()._gradients(params, own_streams(rest), batch)
        weight = self.task.loss_weight(batch)
        share = weight / jnp.maximum(jax.lax.psum(weight, _AXIS), jnp.finfo(weight.dtype).tiny)
        gradients, metrics = jax.lax.psum(jax.tree.map(lambda leaf: share * leaf, (gradients, metrics)), _AXIS)
        return gradients, jax.tree.map(_agreed, rest, after), metrics


def own_streams(rest: nnx.State) -> nnx.State:
    """The same state, but every device of the pmap with random streams of its own."""
    here = jax.lax.axis_index(_AXIS)

    def folded(keys: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, here))(keys.reshape(-1)).reshape(keys.shape)

    return jax.tree.map(lambda leaf: folded(leaf) if _is_key(leaf) else leaf, rest)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _agreed(before: jax.Array, after: jax.Array) -> jax.Array:
    """What all devices hold after a step: the keys they had in common, their count, the mean of statistics."""
    if _is_key(before):
        return before
    return jax.lax.pmean(after, _AXIS) if jnp.issubdtype(after.dtype, jnp.floating) else jax.lax.pmax(after, _AXIS)
