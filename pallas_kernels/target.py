"""Whether the kernels of a platform are simulated now, and what they are traced for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any


class Target:
    """One platform's choice, kept per context."""

    def __init__(self, platform: str):
        self._simulated = contextvars.ContextVar(f"{platform} simulated", default=False)
        self._generation: contextvars.ContextVar[str | None] = contextvars.ContextVar(f"{platform} generation", default=None)

    @property
    def simulated(self) -> bool:
        return self._simulated.get()

    @property
    def generation(self) -> str | None:
        """What :meth:`compiling_for` names; None outside."""
        return self._generation.get()

    @contextlib.contextmanager
    def simulation(self, races: Callable[[], Any], reset: Callable[[], None]) -> Iterator[None]:
        """Simulate what is traced inside. races: the simulator's findings; reset: forget its memory.

        Raises RuntimeError on leaving if there was a race.
        """
        token = self._simulated.set(True)
        try:
            yield
            found = races()
            if found is not None and found.races_found:
                raise RuntimeError("the simulated kernel has a race between reading and writing the same memory")
        finally:
            self._simulated.reset(token)
            reset()

    @contextlib.contextmanager
    def compiling_for(self, generation: str) -> Iterator[None]:
        """Trace for a generation on a machine that has none."""
        token = self._generation.set(generation)
        try:
            yield
        finally:
            self._generation.reset(token)
