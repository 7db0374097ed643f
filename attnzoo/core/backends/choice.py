"""Which backend runs a request."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from attnzoo.core import passes
from attnzoo.core.backends import BACKENDS
from attnzoo.core.request import Request
from attnzoo.errors import unknown

#: Up to this many logits per head, one dense product beats any walk over tiles.
SMALL = 256 * 256


def refusals(r: Request) -> dict[str, str | None]:
    """Why each backend cannot run the request on one device, or with its batch rows and heads divided (None: it can)."""
    return {name: module.refusal(_asked(r, name)) for name, module in BACKENDS.items()}


def by_tiles(name: str) -> bool:
    """Whether a backend never holds the rows of the weights."""
    return hasattr(BACKENDS[name], "attend_part")


def _asked(r: Request, name: str) -> Request:
    """What a backend is asked to do at last for a request."""
    return passes.last_pass(r) if by_tiles(name) else r


def refusals_by_parts(r: Request, rectangle: tuple[int, int]) -> dict[str, str | None]:
    """The same where queries and keys are divided too, and a device sees ``rectangle`` of them at a time."""
    whole_rows = "it computes whole rows of logits, and a ring brings them in parts; exchange='all_to_all' brings whole rows"
    return {
        name: module.refusal(_asked(r, name), rectangle) if by_tiles(name) else whole_rows for name, module in BACKENDS.items()
    }


def choose(r: Request, backend: str, reasons: Mapping[str, str | None]) -> tuple[str, str]:
    """The backend to run and why; raises ValueError for a named one that cannot, or when none can. A backend that has a
    function ``taken_unasked`` which says no is taken only by name.

    reasons: of :func:`refusals` or :func:`refusals_by_parts`.
    """
    able = [name for name, reason in reasons.items() if reason is None]
    if backend != "auto":
        if backend not in BACKENDS:
            raise unknown("backend", backend, [*BACKENDS, "auto"])
        if reasons[backend] is not None:
            can = f"{' and '.join(repr(x) for x in able)} can" if able else "no backend can"
            raise ValueError(f"backend {backend!r} cannot run this: {reasons[backend]}; {can}")
        return backend, "asked for"
    by_name = [name for name in able if not getattr(BACKENDS[name], "taken_unasked", lambda: True)()]
    able = [name for name in able if name not in by_name]
    if not able:
        whys = "; ".join(f"{name}: {why or 'it has to be asked for by name'}" for name, why in reasons.items())
        raise ValueError(f"no backend can run this: {whys}")
    g = r.geometry
    if "dense" in able and "cudnn" not in able and g.queries * g.keys <= SMALL:
        return "dense", f"T×S = {g.queries}×{g.keys} is small: one dense product is quickest"
    order = ", ".join(name for name in BACKENDS if name not in by_name)
    return able[0], f"the first of {order} that can run this"


class Choice(NamedTuple):
    """A backend that a call took, why, and why others could not run it."""

    backend: str
    reason: str
    refused: dict[str, str]


_CHOICES: contextvars.ContextVar[list[Choice] | None] = contextvars.ContextVar("attention_choices", default=None)


@contextlib.contextmanager
def recorded_choices() -> Iterator[list[Choice]]:
    """What every call of ``attention`` chooses, in order, while it is traced inside."""
    choices: list[Choice] = []
    token = _CHOICES.set(choices)
    try:
        yield choices
    finally:
        _CHOICES.reset(token)


def record(name: str, reason: str, reasons: Mapping[str, str | None]) -> None:
    """Note a choice for :func:`recorded_choices`."""
    choices = _CHOICES.get()
    if choices is not None:
        choices.append(Choice(name, reason, {other: why for other, why in reasons.items() if why is not None}))
