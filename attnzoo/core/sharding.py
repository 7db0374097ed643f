"""On which axes of a mesh attention is divided, for backends that the compiler cannot divide by itself."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType

from attnzoo.core.cells import Geometry


class Axes(NamedTuple):
    """Names of mesh axes that divide the batch rows and the heads."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]


_AXES: contextvars.ContextVar[Axes | None] = contextvars.ContextVar("attention_axes", default=None)


@contextlib.contextmanager
def attention_axes(*, batch: str | Sequence[str] = (), heads: str | Sequence[str] = ()) -> Iterator[None]:
    """Say on which axes of the current mesh (``jax.set_mesh``) batch rows and heads lie.

    Kernels are then run on each device's own rows and heads. Matrix products and the other backends need no such rule:
    the compiler divides them.
    """
    names = Axes(*((x,) if isinstance(x, str) else tuple(x) for x in (batch, heads)))
    token = _AXES.set(names)
    try:
        yield
    finally:
        _AXES.reset(token)


def division(g: Geometry) -> tuple[Any, Axes] | None:
    """The current mesh and the axes that divide a call of geometry ``g`` on it; None on one device, and inside ``shard_map``.

    Raises ValueError when no rule was given, or it does not divide the batch or the key heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or all(t == AxisType.Manual for t in mesh.axis_types):
        return None
    axes = _AXES.get()
    if axes is None:
        raise ValueError(
            f"the call runs on a mesh of {dict(mesh.shape)}, and a kernel must be told what each axis divides: wrap it in "
            "attnzoo.core.sharding.attention_axes(batch=..., heads=...), or choose backend='blockwise'"
        )
    for what, names, size in (("batch", axes.batch, g.batch), ("heads", axes.heads, g.kv_heads)):
        unknown = [n for n in names if n not in mesh.shape]
        if unknown:
            raise ValueError(f"attention_axes: {what} names {unknown}, but the mesh has {list(mesh.shape)}")
        parts = math.prod(mesh.shape[n] for n in names)
        if size % parts:
            of = "batch rows" if what == "batch" else "key/value heads"
            raise ValueError(f"attention_axes: {size} {of} do not divide over {names} of the mesh, {parts} devices")
    return mesh, axes
