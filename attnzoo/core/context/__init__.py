"""Context parallelism: one call of attention whose tokens lie on several devices of a mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from attnzoo.core.backends import BACKENDS, choice
from attnzoo.core.backends.result import Result
from attnzoo.core.context import ring
from attnzoo.core.context.layout import Arc, Layout, Ring, critical_path, plan_ring
from attnzoo.core.context.transport import to_heads, to_tokens
from attnzoo.core.request import Request
from attnzoo.core.sharding import Axes, attention_axes, devices_along

__all__ = ["describe", "plan", "refusals", "run"]


def run(r: Request, backend: str, mesh: Any, axes: Axes) -> Result:
    """The request on a mesh whose ``axes.context`` divides its tokens, by the exchange that ``axes`` names.

    Raises ValueError where no backend, or not the named one, can run it so.
    """
    reasons = refusals(r, mesh, axes)
    name, reason = choice.choose(r, backend, reasons)
    choice.record(name, reason, reasons)
    if axes.exchange == "all_to_all":
        return _all_to_all(r, name, mesh, axes)
    return ring.run(r, BACKENDS[name], mesh, axes, plan(r, name, mesh, axes))


def refusals(r: Request, mesh: Any, axes: Axes) -> dict[str, str | None]:
    """Why each backend cannot run the request so (None: it can)."""
    if axes.exchange == "all_to_all":
        with _heads_only(axes):
            return choice.refusals(r)
    devices, g = devices_along(mesh, "context", axes.context), r.geometry
    return choice.refusals_by_parts(r, (g.queries // devices, g.keys // devices))


def plan(r: Request, name: str, mesh: Any, axes: Axes) -> Ring:
    """Which tokens each device of the ring holds for this request, and which shards travel."""
    devices, g = devices_along(mesh, "context", axes.context), r.geometry
    block = BACKENDS[name].block_sizes(r, g.queries // devices, g.keys // devices)
    return plan_ring(r.mask, g, devices, axes.zigzag, block)


def describe(r: Request, backend: str, mesh: Any, axes: Axes) -> str:
    """What moves between devices, in a line."""
    name, _ = choice.choose(r, backend, refusals(r, mesh, axes))
    devices = devices_along(mesh, "context", axes.context)
    over = f"{'×'.join(axes.context)}={devices}"
    if axes.exchange == "all_to_all":
        return f"all-to-all over {over}: each device gets some heads of the whole sequence, and the result comes back"
    made = plan(r, name, mesh, axes)
    order = "zig-zag order (first and last parts paired)" if made.layout.zigzag else "natural order"
    steps = f"each device sees {made.arc.steps} of {devices} shards of keys and values"
    tiles = ""
    if made.work is not None:
        per_device = made.work.sum(0)
        tiles = f"; {per_device.min()} to {per_device.max()} tiles per device, {critical_path(made.work)} one after the other"
    return f"ring over {over} in {order}; {steps}{tiles}"


def _all_to_all(r: Request, name: str, mesh: Any, axes: Axes) -> Result:
    """Ulysses (Jacobs et al., 2023, arXiv 2309.14509): each device computes some heads over all tokens."""
    b, h, t = axes.batch or None, axes.heads or None, axes.context
    tokens, heads = P(b, t, h), P(b, None, (*axes.heads, *t))

    def move(x: Any, way: Any, before: P, after: P) -> Any:
        local = functools.partial(way, names=t)
        return jax.shard_map(local, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)(x)

    q, k, v = (move(x, to_heads, tokens, heads) for x in (r.q, r.k, r.v))
    exchanged = dataclasses.replace(r, q=q, k=k, v=v)
    backend, by_heads = BACKENDS[name], axes._replace(heads=(*axes.heads, *t), context=())
    if hasattr(backend, "attend_part"):
        result = ring.run(exchanged, backend, mesh, by_heads, Ring(Layout(1, False), Arc(0, 1), None))
    else:  # the compiler divides it, by heads
        with _heads_only(axes):
            result = backend.run(exchanged)
    return result._replace(out=move(result.out, to_tokens, heads, tokens))


def _heads_only(axes: Axes) -> Any:
    return attention_axes(batch=axes.batch, heads=(*axes.heads, *axes.context))
