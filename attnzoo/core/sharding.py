"""On which axes of a mesh attention is divided, for what the compiler cannot divide by itself."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from attnzoo.core.cells import Geometry, Operand
from attnzoo.errors import unknown

Exchange = Literal["ring", "all_to_all"]


class Axes(NamedTuple):
    """Names of mesh axes that divide the batch rows, the heads and the tokens, and how devices that hold different tokens
    come to see each other's."""

    batch: tuple[str, ...]
    heads: tuple[str, ...]
    context: tuple[str, ...] = ()
    exchange: Exchange = "ring"
    zigzag: bool | None = None


_AXES: contextvars.ContextVar[Axes | None] = contextvars.ContextVar("attention_axes", default=None)


@contextlib.contextmanager
def attention_axes(
    *,
    batch: str | Sequence[str] = (),
    heads: str | Sequence[str] = (),
    context: str | Sequence[str] = (),
    exchange: Exchange = "ring",
    zigzag: bool | None = None,
) -> Iterator[None]:
    """Say on which axes of the current mesh (``jax.set_mesh``) batch rows, heads and tokens lie.

    Kernels are then run on each device's own rows and heads, and a `Stack` in training lays the tokens between its layers out
    so. Matrix products and the other backends need no such rule: the compiler divides them. Where ``context`` has several
    devices, every call of ``attention`` is context-parallel: queries, keys and values lie divided along their length, and

    - exchange="ring": keys and values travel from device to device, and each attends to them by blocks. Memory per device
      falls with the number of devices, any number of heads will do.
    - exchange="all_to_all": devices trade tokens for heads, each computes some heads over all tokens, and they trade back.
      For weight maps that need whole rows at once too; the heads must divide.

    zigzag: whether a ring hands each device a part from the beginning and one from the end of the sequence, so that a causal
        mask gives all the same work; None: where the mask gains by it. Tokens lie in their natural order outside either way.

    Raises ValueError for another exchange.
    """
    if exchange not in get_args(Exchange):
        raise unknown("exchange", exchange, get_args(Exchange))
    rows, columns, tokens = ((x,) if isinstance(x, str) else tuple(x) for x in (batch, heads, context))
    token = _AXES.set(Axes(rows, columns, tokens, exchange, zigzag))
    try:
        yield
    finally:
        _AXES.reset(token)


def division(g: Geometry, otherwise: str = "blockwise") -> tuple[Any, Axes] | None:
    """The current mesh and the axes that divide a call of geometry ``g`` on it; None on one device, and inside ``shard_map``.

    otherwise: a backend that needs no rule.

    Raises ValueError when no rule was given, or it does not divide the batch or the key heads.
    """
    mesh = current_mesh()
    if mesh is None:
        return None
    axes = _AXES.get()
    if axes is None:
        raise ValueError(
            f"the call runs on a mesh of {dict(mesh.shape)}, and a kernel must be told what each axis divides: wrap it in "
            f"attnzoo.core.sharding.attention_axes(batch=..., heads=...), or choose backend={otherwise!r}"
        )
    for what, names, size in (("batch", axes.batch, g.batch), ("heads", axes.heads, g.kv_heads)):
        parts = devices_along(mesh, what, names)
        if size % parts:
            of = "batch rows" if what == "batch" else "key/value heads"
            raise ValueError(f"attention_axes: {size} {of} do not divide over {names} of the mesh, {parts} devices")
    return mesh, axes


def context_division(g: Geometry) -> tuple[Any, Axes] | None:
    """The current mesh and axes if a call of geometry ``g`` is divided along its tokens, else None.

    Raises ValueError where they do not divide its batch, heads or lengths.
    """
    mesh, axes = current_mesh(), _AXES.get()
    if mesh is None or axes is None or not axes.context:
        return None
    parts = devices_along(mesh, "context", axes.context)
    if parts == 1:
        return None
    if axes.exchange == "all_to_all":
        together = devices_along(mesh, "heads", axes.heads) * parts
        if g.kv_heads % together:
            raise ValueError(
                f"attention_axes: exchange='all_to_all' gives each of {together} devices ({axes.heads + axes.context} of the "
                f"mesh) its own heads, but the call has {g.kv_heads} key/value heads for {g.heads} query heads; "
                "exchange='ring' takes any number of heads"
            )
    for what, size in (("queries", g.queries), ("keys", g.keys)):
        if size % parts:
            raise ValueError(
                f"attention_axes: {size} {what} do not divide over {axes.context} of the mesh, {parts} devices; pad the "
                f"sequence to a multiple of {parts} (and hide the padding by attnzoo.core.masks.Lengths)"
            )
    return division(g)


def divided_tokens(x: Any) -> Any:
    """x ``[B, T, ...]`` with its rows and tokens where :func:`attention_axes` says that they lie, whole along its other axes.

    x as it is on one device, without such a rule, and on a mesh whose axes are explicit. An axis whose length does not divide,
    and rows of which nothing is said, are left to the compiler. What it finds out from the inputs and the parameters alone may
    as well be features divided and rows repeated.
    """
    mesh, axes = current_mesh(), _AXES.get()
    if mesh is None or axes is None or any(t != AxisType.Auto for t in mesh.axis_types):
        return x

    def place(what: str, names: tuple[str, ...], size: int) -> Any:
        return names if size % devices_along(mesh, what, names) == 0 else P.UNCONSTRAINED

    rows = place("batch", axes.batch, x.shape[0]) if axes.batch else P.UNCONSTRAINED
    tokens = place("context", axes.context, x.shape[1]) if axes.context else None
    return jax.lax.with_sharding_constraint(x, P(rows, tokens))


def devices_along(mesh: Any, what: str, names: tuple[str, ...]) -> int:
    """How many devices the named axes of a mesh have together. Raises ValueError for a name that it does not have."""
    missing = [n for n in names if n not in mesh.shape]
    if missing:
        raise ValueError(f"attention_axes: {what} names {missing}, but the mesh has {list(mesh.shape)}")
    return math.prod(mesh.shape[n] for n in names)


def operand_spec(op: Operand, axes: Axes) -> P:
    """How an array of a mask or a score lies on the mesh: divided where batch rows and heads differ, and along its rows."""
    b, h = axes.batch or None, axes.heads or None
    if op.kind == "whole":
        return P()
    if op.kind == "distance":
        return P(h if op.x.shape[0] > 1 else None)
    rows = axes.context if op.kind == "aligned" and axes.context and op.x.shape[2] > 1 else None
    return P(b if op.x.shape[0] > 1 else None, h if op.x.shape[1] > 1 else None, rows)


def current_mesh() -> Any | None:
    """The current mesh; None on one device, and inside ``shard_map``."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or all(t == AxisType.Manual for t in mesh.axis_types):
        return None
    return mesh
