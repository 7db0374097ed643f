"""GraDe (Zhang et al., 2025, arXiv 2507.18504): a small language model that writes rows of tables along a feature graph."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.models.layers import layer_maker
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.nn.block import Block
from attnzoo.zoo.graph.grade import (
    FeatureGraph,
    FeatureGraphMask,
    GraphGuidedAttention,
    GraphGuidedBias,
    serialize_rows,
    strongest_columns,
)


class GraDeLM(DecoderLM):
    """tokens [B, T] of serialised rows -> logits [B, T, V] in float32, by a decoder whose layers share one graph.

    config: as in `DecoderLM`; its mixer is replaced. graph: A, or None for a plain causal model.
    strength, eps: as in `GraphGuidedBias`. keep: attend along this many strongest columns of each feature only (the hard
        form). Gradients of the edges that are kept go straight through the choice; those of dropped ones are 0.

    Does not decode with a cache. Raises ValueError for a dynamic graph: made from the row's own tokens, it would show every
    token what follows it.
    """

    def __init__(
        self,
        config: LMConfig,
        graph: FeatureGraph | None,
        *,
        strength: float = 1.0,
        eps: float = 1e-3,
        keep: int | None = None,
        rngs: nnx.Rngs,
    ):
        if graph is not None and graph.update is not None:
            raise ValueError(
                "graph: a dynamic graph is made from all tokens of a row, so a causal model would see what it is to predict; "
                "give a FeatureGraph with dynamic=None"
            )
        super().__init__(config, rngs=rngs)
        self.strength, self.eps, self.keep = strength, eps, keep
        self.graph: Any = graph

    def layer_maker(self, config: LMConfig, rngs: nnx.Rngs) -> Callable[[int], Block]:
        return layer_maker(config, rngs, causal=True, mixer=GraphGuidedAttention)

    def __call__(  # type: ignore[override]
        self, tokens: Int[Array, "B T"], features: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """features: what every token belongs to, -1 for special tokens."""
        bias = mask = None
        if self.graph is not None:
            edges = self.graph()
            if self.keep is not None:
                edges = strongest_columns(edges, self.keep)
                mask = FeatureGraphMask(edges > 0.5, features)
            bias = GraphGuidedBias(edges, features, self.strength, self.eps)
        x = self._embed(tokens, np.arange(tokens.shape[-1]))
        return self._logits(self.layers(x, carry=bias, mask=mask))

    def sample(self, orders: Int[Array, "R m"], num_values: int, key: Array) -> Int[Array, "R m"]:
        """A new row of a table per order of its features, each of `num_values` values; m passes over whole rows."""
        count, m = orders.shape

        def write(i: Array, table: Array) -> Array:
            # What is not written yet reads 0; being later, it is not seen.
            logits = self(*serialize_rows(table, orders))
            here = jax.lax.dynamic_index_in_dim(logits, 2 * i + 1, 1, keepdims=False)[:, 1 + m : 1 + m + num_values]
            drawn = jax.random.categorical(jax.random.fold_in(key, i), here)
            feature = jax.lax.dynamic_index_in_dim(orders, i, 1, keepdims=False)
            return table.at[jnp.arange(count), feature].set(drawn)

        return jax.lax.fori_loop(0, m, write, jnp.zeros((count, m), jnp.int32))
