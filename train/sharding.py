"""From logical axis names to a mesh."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from attnzoo.core.sharding import Exchange, attention_axes
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

LARGE = 2**16
"""Numbers from which on a parameter is divided over fsdp whatever its axes are called; less is not worth gathering."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor, context) of `devices`, by default all there are, neighbours next to each other.

    Raises ValueError when the product of its sides is neither the number of devices nor, in a single process, 1, which
    takes the first device.
    """
    shape = tuple(getattr(config, axis) for axis in AXES)
    devices = jax.devices() if devices is None else devices
    count = math.prod(shape)
    single = 1 if jax.process_count() == 1 else len(devices)
    if count not in (single, len(devices)):
        raise ValueError(
            f"--mesh: {' x '.join(f'{axis}={size}' for axis, size in zip(AXES, shape, strict=True))} needs "
            f"{count} devices, and there are {len(devices)}; the product must be {len(devices)}"
            + (", or 1 for a single device" if single == 1 else f", the devices of all {jax.process_count()} processes")
        )
    # An axis of the mesh may take a part of an axis of the torus: jax.make_mesh refuses that on most generations.
    grid = mesh_utils.create_device_mesh(shape, list(devices[:count]), allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def on_mesh(mesh: Mesh, exchange: Exchange = "ring") -> Iterator[None]:
    """Trace and run on the mesh; attention learns how it divides batch rows, heads and tokens.

    exchange: how attention brings together tokens that lie on several devices; see `attention_axes`.
    """
    with jax.set_mesh(mesh), attention_axes(batch=("data", "fsdp"), heads="tensor", context="context", exchange=exchange):
        yield


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding per array of `tree`, in the same structure.

    Parameters (and what the optimizer keeps per parameter) are divided by their logical names; a side that a
    mesh axis does not divide evenly stays whole. A large parameter that this leaves whole on every device of `fsdp` is divided
    over it along its longest side that divides: nothing but storage hangs on which. Everything else is replicated.
    """

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            names = axis_names(leaf)
            return jax.tree.map(lambda array: NamedSharding(mesh, _spec(names, array.shape, mesh)), leaf)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _spec(names: tuple[str | None, ...] | None, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if names is None or len(names) != len(shape):
        names = (None,) * len(shape)
    axes: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        axis = RULES.get(name)
        axes.append(axis if axis not in axes and axis and size % mesh.shape[axis] == 0 else None)
    parts = mesh.shape["fsdp"]
    if parts > 1 and "fsdp" not in axes and math.prod(shape) >= LARGE:
        sides = [i for i, name in enumerate(names) if axes[i] is None and name != "layers" and shape[i] % parts == 0]
        if sides:
            axes[max(sides, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def check_batch(batch: int, context: int | None, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises ValueError when the mesh does not divide the (accumulated parts of a) batch, or the tokens of an example."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch % (rows * accumulate):
        over = f"data x fsdp = {rows} devices"
        over = over if accumulate == 1 else f"{over} x --accumulate {accumulate} = {rows * accumulate}"
        raise ValueError(f"--batch: {batch} examples do not divide over {over}")
    if context is not None and context % mesh.shape["context"]:
        raise ValueError(f"--data.context: {context} tokens do not divide over --mesh.context {mesh.shape['context']} devices")


def check_axes(params: Any, sequence: frozenset[str], mesh: Mesh) -> None:
    """Raises ValueError for an axis of the mesh, with more than one device, that divides nothing.

    params: the shardings of the parameters. sequence: the arrays of a batch that have an axis of tokens.
    """
    axes = {axis for leaf in jax.tree.leaves(params) for axis in leaf.spec if axis}
    used = {"data"} | axes | ({"context"} if sequence else set())
    for axis in AXES:
        size = mesh.shape[axis]
        if size > 1 and axis not in used:
            names = [str(name) for name, over in RULES.items() if over == axis]
            lacking = f"no parameter has a side of {', '.join(names)} that {size} divides"
            what = lacking if names else "examples have no axis of tokens"
            raise ValueError(
                f"--mesh.{axis}: {size} devices would all hold and do the same, because {what}; "
                f"use --mesh.{axis} 1, and --mesh.data for these devices"
            )


def batch_sharding(name: str, sequence: frozenset[str], mesh: Mesh) -> NamedSharding:
    """Where the array `name` of a batch lies: rows over data and fsdp, tokens of those in `sequence` over context."""
    axes = (("data", "fsdp"), *(("context",) if name in sequence else ()))
    return NamedSharding(mesh, PartitionSpec(*axes))


def rows_here(batch: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch that devices of this process hold, in order."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    held = np.zeros(batch, bool)
    for index in sharding.addressable_devices_indices_map((batch,)).values():
        held[index] = True
    return np.flatnonzero(held)


def put_batch(
    batch: dict[str, np.ndarray], sequence: frozenset[str], mesh: Mesh, part_of: tuple[np.ndarray, int] | None = None
) -> dict[str, jax.Array]:
    """A batch on the mesh. part_of: which rows these are of a batch of how many, at least :func:`rows_here` (None: all)."""

    def put(name: str, value: np.ndarray) -> jax.Array:
        sharding = batch_sharding(name, sequence, mesh)
        if part_of is None:
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
        rows, size = part_of

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            at = np.searchsorted(rows, (first, last))
            return value[(slice(*at), *index[1:])]

        return jax.make_array_from_callback((size, *value.shape[1:]), sharding, part)

    return {name: put(name, value) for name, value in batch.items()}


def idle_devices(mesh: Mesh) -> int:
    """How many devices the mesh leaves out."""
    return len(jax.devices()) - mesh.size


def describe(config: MeshConfig) -> str:
    """The mesh in words, e.g. "data=2 fsdp=2 tensor=1 context=2 (ring)"."""
    sides = " ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
    return f"{sides} ({config.exchange})" if config.context > 1 else sides
