"""A user's own predicate as a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from attnzoo.core.cells import Bound, Geometry
from attnzoo.core.masks.base import Mask, mask
from attnzoo.core.traced import bind_function


@mask()
class Function(Mask):
    """``f(b, h, q, k) -> bool`` on int32 scalars: batch row, query head, query and key position.

    f may capture arrays, traced ones too, and use any JAX operation; it is traced once per call and evaluated on whole tiles.
    Its block map is found by asking it cell by cell (up to 2**26 cells; past that every tile counts as partial), so say
    what you can with the known masks and leave the rest to ``f``: ``Causal() & Function(f)`` skips what Causal hides.
    """

    f: Callable[[Any, Any, Any, Any], Any]

    @property
    def opaque(self) -> bool:
        return True

    def bind(self, g: Geometry) -> Bound:
        int32 = jax.ShapeDtypeStruct((), "int32")
        operands, apply = bind_function(self.f, (int32,) * 4, "mask function", bool)
        return Bound(operands, lambda c, *parts: apply((c.b, c.h, c.q, c.k), parts))

    def __repr__(self) -> str:
        return f"Function({getattr(self.f, '__name__', type(self.f).__name__)})"
