"""GraDe (Zhang et al., 2025, arXiv 2507.18504): a small language model that writes rows of tables along a feature graph."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.core.masks import Causal
from attnzoo.core.positions import RoPE
from attnzoo.models.layers import AbsolutePositions
from attnzoo.models.lm import LMConfig
from attnzoo.nn.block import Block
from attnzoo.nn.embed import Embed
from attnzoo.nn.feed_forward import feed_forward
from attnzoo.nn.norms import norm
from attnzoo.zoo.graph.grade import (
    FeatureGraph,
    FeatureGraphMask,
    GraphGuidedAttention,
    GraphGuidedBias,
    serialize_rows,
    strongest_columns,
)


class GraDeLM(nnx.Module):
    """tokens [B, T] of serialised rows -> logits [B, T, V] in float32, by a decoder whose layers share one graph.

    config: sizes; its mixer is replaced. graph: A, or None for a plain causal model.
    strength, eps: as in `GraphGuidedBias`. keep: attend along this many strongest columns of each feature only (the hard
        form); A is then trained straight through.
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
        self.config, self.strength, self.eps, self.keep = config, strength, eps, keep
        dim, dtypes = config.dim, config.dtypes
        self.graph: Any = graph
        self.embed = Embed(config.vocab_size, dim, rngs=rngs, **dtypes)
        self.positions = AbsolutePositions(config.positions, config.max_length, dim, rngs=rngs, **dtypes)
        rope = RoPE() if config.positions == "rope" else None
        self.layers = nnx.List(
            Block(
                dim,
                GraphGuidedAttention(
                    dim, config.num_heads, causal=True, positions=rope, rngs=rngs, **dtypes, **config.all_mixer_args
                ),
                feed_forward(config.mlp, dim, config.mlp_dim, use_bias=config.use_bias, rngs=rngs, **dtypes),
                norm=config.norm,
                norm_first=config.norm_first,
                rngs=rngs,
                **dtypes,
            )
            for _ in range(config.num_layers)
        )
        self.norm = norm(config.norm, dim, rngs=rngs, **dtypes) if config.norm_first else None

    def __call__(self, tokens: Int[Array, "B T"], features: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """features: what every token belongs to, -1 for special tokens."""
        bias = mask = None
        if self.graph is not None:
            edges = self.graph()
            if self.keep is not None:
                edges = strongest_columns(edges, self.keep)
                mask = Causal() & FeatureGraphMask(edges > 0.5, features)
            bias = GraphGuidedBias(edges, features, self.strength, self.eps)
        x = self.positions(self.embed(tokens), jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            x, _ = layer(x, bias, mask=mask)
        return self.embed.attend(x if self.norm is None else self.norm(x))

    def sample(self, orders: Int[Array, "R m"], num_values: int, key: Array) -> Int[Array, "R m"]:
        """A new row of a table per order of its features, each of `num_values` values."""
        count, m = orders.shape

        def write(i: Array, table: Array) -> Array:
            # What is not written yet reads 0; being later, it is not seen.
            logits = self(*serialize_rows(table, orders))
            here = jax.lax.dynamic_index_in_dim(logits, 2 * i + 1, 1, keepdims=False)[:, 1 + m : 1 + m + num_values]
            drawn = jax.random.categorical(jax.random.fold_in(key, i), here)
            feature = jax.lax.dynamic_index_in_dim(orders, i, 1, keepdims=False)
            return table.at[jnp.arange(count), feature].set(drawn)

        return jax.lax.fori_loop(0, m, write, jnp.zeros((count, m), jnp.int32))
