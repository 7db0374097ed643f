"""The running softmax of a block of queries while its keys come by."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.problem import HIDDEN, HIDDEN_BELOW, LANES, LOG2E, wide


class Online(NamedTuple):
    """References to vector memory, float32: the largest logit of each row and the sum of its weights (``[rows, 128]``, equal
    along a row), and the sum of weighted values ``[rows, Hv]``."""

    top: Any
    total: Any
    acc: Any

    @staticmethod
    def scratch(rows: int, width: int) -> list[Any]:
        return [pltpu.VMEM((rows, n), jnp.float32) for n in (LANES, LANES, width)]

    def clear(self) -> None:
        self.top[...] = jnp.full_like(self.top, HIDDEN)
        self.total[...] = jnp.zeros_like(self.total)
        self.acc[...] = jnp.zeros_like(self.acc)

    def weights(self, rows: Any, s: Any, base2: bool) -> tuple[Any, Any]:
        """Of the logits ``s`` of some rows, counted from here on; and the factor on what these rows have summed so far."""
        exp = jnp.exp2 if base2 else jnp.exp
        before = self.top[rows]
        now = jnp.maximum(before, s.max(-1, keepdims=True))
        weight, shrink = exp(s - wide(now, s.shape[1])), exp(before - now)
        self.top[rows] = now
        self.total[rows] = self.total[rows] * shrink + weight.sum(-1, keepdims=True)
        return weight, shrink

    def add(self, rows: Any, values: Any, shrink: Any) -> None:
        self.acc[rows] = self.acc[rows] * wide(shrink, values.shape[1]) + values

    def results(self, base2: bool) -> tuple[Any, Any]:
        """Output ``[rows, Hv]`` and natural log-sum-exp ``[1, rows]``; of rows that saw nothing, 0 and -inf."""
        seen = self.top[...] > HIDDEN_BELOW
        safe = jnp.where(seen, self.total[...], 1.0)
        scale = jnp.where(seen, 1.0 / safe, 0.0)
        log = self.top[...] / LOG2E + jnp.log(safe) if base2 else self.top[...] + jnp.log(safe)
        return self.acc[...] * wide(scale, self.acc.shape[1]), jnp.where(seen, log, -jnp.inf).T[:1]
