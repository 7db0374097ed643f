"""From logical axis names to a mesh."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attnzoo.core.sharding import attention_axes
from attnzoo.nn.linear import axis_names
from train.config import MeshConfig

AXES = ("data", "fsdp", "tensor", "context")

RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
    "experts": None,
}
"""Logical axis of a parameter -> mesh axis that it is divided over; axes without a rule stay whole."""


def make_mesh(config: MeshConfig) -> Mesh:
    """The mesh (data, fsdp, tensor, context).

    Raises ValueError when the product of its sides is neither the number of devices nor 1, which takes the
    first device.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    devices = jax.devices()
    count = math.prod(shape)
    if count not in (1, len(devices)):
        raise ValueError(
            f"--mesh: {' x '.join(f'{axis}={size}' for axis, size in zip(AXES, shape, strict=True))} needs "
            f"{count} devices, and there are {len(devices)}; the product must be {len(devices)}, or 1 for a "
            f"single device"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:count])


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
    """Trace and run on the mesh; attention's kernels learn how it divides batch rows and heads."""
    with jax.set_mesh(mesh), attention_axes(batch=("data", "fsdp"), heads="tensor"):
        yield


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding per array of `tree`, in the same structure.

    Parameters (and what the optimizer keeps per parameter) are divided by their logical names; a side that a
    mesh axis does not divide evenly stays whole. Everything else is replicated.
    """

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            names = axis_names(leaf)
            return jax.tree.map(lambda array: NamedSharding(mesh, _spec(names, array.shape, mesh)), leaf)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _spec(names: tuple[str | None, ...] | None, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if names is None or len(names) != len(shape):
        return PartitionSpec()
    axes = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES.get(name)
        axes.append(axis if axis not in axes and axis and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*axes)


def check_batch(batch: int, context: int | None, mesh: Mesh) -> None:
    """Raises ValueError when the mesh does not divide the batch, or the tokens of an example."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % rows:
        raise ValueError(f"--batch: {batch} examples do not divide over data x fsdp = {rows} devices")
    if context is not None and context % mesh.shape["context"]:
        raise ValueError(f"--data.context: {context} tokens do not divide over --mesh.context {mesh.shape['context']} devices")


def put_batch(batch: dict[str, np.ndarray], sequence: frozenset[str], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch on the mesh: rows over data and fsdp, tokens of the arrays in `sequence` over context.

    Every process holds the same global batch and hands over the part its devices need.
    """

    def put(name: str, value: np.ndarray) -> jax.Array:
        axes = (("data", "fsdp"), *(("context",) if name in sequence else ()))
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return {name: put(name, value) for name, value in batch.items()}


def idle_devices(mesh: Mesh) -> int:
    """How many devices the mesh leaves out."""
    return len(jax.devices()) - mesh.size


def describe(config: MeshConfig) -> str:
    """The mesh in words, e.g. "data=2 fsdp=2 tensor=2 context=1"."""
    return " ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(config).items())
