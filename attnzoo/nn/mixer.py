"""The protocol every drop-in for attention follows."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from attnzoo.core import masks
from attnzoo.core.positions import Positions


class Mixer(nnx.Module):
    """A drop-in for attention: mixes tokens, x [B, T, D] -> [B, T, D].

    Constructors share a head and add their own arguments, all with defaults:

        Mixer(dim, num_heads, *, causal=False, positions=None, dtype=None, param_dtype=jnp.float32, rngs, ...)

    `positions` is what is applied to queries and keys, or None: `RoPE()`, another object with its two methods, or a plan
    that becomes one when the heads are known (`core.positions.positions_for`).

    A class says what it can do by its traits; the contract tests run by them:

    decodes: has `init_cache` and `prefill` (built with causal=True, or given a memory).
    bidirectional: may be built with causal=False.
    crosses: takes `memory=`, another sequence [B, S, D] that keys and values come from.
    carries: threads a value through depth. The call takes `carry=` (None at the first layer) and returns
        (y, carry); so does `prefill`, last.
    layered: the constructor also takes `layer=` (0-based) and `num_layers=`.
    padding_invariant: what padded tokens hold never changes the output at real ones.
    batch_independent: no row of a batch changes another.
    packs: a mask of `Segments` keeps documents that share a row apart: nothing mixes tokens but what the mask governs.
    """

    decodes: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True
    crosses: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    layered: ClassVar[bool] = False
    padding_invariant: ClassVar[bool] = True
    batch_independent: ClassVar[bool] = True
    packs: ClassVar[bool] = True

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view(model, deterministic=...)`: switches what `eval()` and `train()` switch, where training differs."""
        if deterministic is not None and hasattr(self, "deterministic"):
            self.deterministic = deterministic

    # Mixers declare the keywords that they take; a base that listed them all would forbid leaving any out.
    def __call__(self, x: Float[Array, "B T D"], *args: Any, **kwargs: Any) -> Any:
        """(x, *, mask=None, positions=None) -> y [B, T, D]; or (y, carry) for a mixer that carries.

        mask: who may see whom, as `core.attention` takes it; combined with the causal mask that a mixer built
            with causal=True adds itself, or in its place (`core.masks.Instead`).
        positions: of the tokens, [T] or [B, T] (with a trailing axis for grids); 0, 1, ... by default.
        memory: [B, S, D], for a mixer that crosses. carry: for one that carries.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define __call__")

    def init_cache(self, batch: int, length: int, *args: Any, **kwargs: Any) -> Any:
        """(batch, length, *, dtype=None) -> what decoding remembers: buffers of fixed size for `length` tokens.

        Every leaf has the rows on its first axis. Mixers that cross also take `memory` [B, S, D] and
        `memory_mask` [B, S] (True where a token is real) and keep its keys and values instead.
        """
        raise NotImplementedError(f"{type(self).__name__} does not decode: it has no cache")

    def prefill(self, x: Float[Array, "B T D"], cache: Any, *args: Any, **kwargs: Any) -> Any:
        """(x, cache, *, mask=None, lengths=None) -> (y, cache), or (y, cache, carry).

        T more tokens, which see everything the cache holds.
        lengths: [B] real tokens of right-padded rows; padding is not remembered and its outputs mean nothing.
        mask: compared by position; masks that hold one entry per token are aligned with the cache's slots.
        carry: for a mixer that carries.
        """
        raise NotImplementedError(f"{type(self).__name__} does not decode: it has no prefill")

    def step(self, x: Float[Array, "B 1 D"], cache: Any, *args: Any, **kwargs: Any) -> Any:
        """One more token per row: `prefill` with T = 1, unless a mixer has a shorter way."""
        return self.prefill(x, cache, *args, **kwargs)

    def reorder_cache(self, cache: PyTree, rows: Int[Array, "R"]) -> PyTree:
        """The cache whose row i is row `rows[i]` of this one (beam search)."""
        return jax.tree.map(lambda leaf: leaf[rows], cache)

    def thread(self, x: Float[Array, "B T D"], carry: PyTree = None, **kwargs: Any) -> tuple[Array, PyTree]:
        """(y, carry), whether this mixer carries or not: what models call."""
        if self.carries:
            return self(x, carry=carry, **kwargs)
        return self(x, **kwargs), carry

    def thread_prefill(
        self, x: Float[Array, "B T D"], cache: PyTree, carry: PyTree = None, **kwargs: Any
    ) -> tuple[Array, PyTree, PyTree]:
        """(y, cache, carry), whether this mixer carries or not."""
        if self.carries:
            return self.prefill(x, cache, carry=carry, **kwargs)
        return *self.prefill(x, cache, **kwargs), carry

    def thread_step(
        self, x: Float[Array, "B 1 D"], cache: PyTree, carry: PyTree = None, **kwargs: Any
    ) -> tuple[Array, PyTree, PyTree]:
        """(y, cache, carry), whether this mixer carries or not."""
        if self.carries:
            return self.step(x, cache, carry=carry, **kwargs)
        return *self.step(x, cache, **kwargs), carry

    def cache_numbers_per_token(self) -> float:
        """Payload numbers a row's cache grows by for each further token; 0 for states of fixed size.

        Counts the floating-point leaves of `init_cache`, less what is kept about a slot rather than in it
        (leaves without a feature axis: positions, multiplicities, running scores).
        """

        def numbers(length: int) -> int:
            shapes = jax.eval_shape(lambda: self.init_cache(1, length))
            return sum(
                math.prod(leaf.shape)
                for leaf in jax.tree.leaves(shapes)
                if leaf.ndim > 3 and jnp.issubdtype(leaf.dtype, jnp.floating)
            )

        return (numbers(2048) - numbers(1024)) / 1024


def token_mask(lengths: Int[Array, "B"], length: int) -> Bool[Array, "B T"]:
    """True at the first `lengths` of `length` tokens."""
    return jnp.arange(length) < jnp.asarray(lengths)[:, None]


def both(mask: Any, other: Any) -> Any:
    """What both masks allow; either may be a mask object, a bool array, a callable or None (everything)."""
    if mask is None or other is None:
        return other if mask is None else mask
    return as_mask(mask) & as_mask(other)


def with_own(own: masks.Mask | None, mask: Any) -> Any:
    """The mask of a call to a mixer that has one of its own: what both allow, or `mask` alone where it is `instead`."""
    return mask if isinstance(mask, masks.Mask) and mask.instead else both(own, mask)


def as_mask(mask: Any) -> masks.Mask:
    """A mask object, a bool array or a callable as a mask object."""
    if isinstance(mask, masks.Mask):
        return mask
    return masks.Function(mask) if callable(mask) else masks.Array(jnp.asarray(mask))


def on_grid(positions: Positions | None) -> bool:
    """Whether tokens of a mixer with these positions stand at coordinates, which masks do not compare."""
    return positions is not None and positions.num_axes > 1


def unshared(positions: Positions | None) -> Positions | None:
    """A mixer's positions for another mixer: a copy where they hold arrays, so that no two train or load the same."""
    return nnx.clone(positions) if isinstance(positions, nnx.Module) else positions


def document_ids(mask: Any) -> list[Int[Array, "..."]]:
    """The ids [T] or [*, T] of every `Segments` mask that a mask demands: itself, or parts of it joined by &.

    Masks joined by | or ~ demand none of their parts; segments whose keys have ids of their own are not looked at.
    """
    if isinstance(mask, masks.And):
        return document_ids(mask.a) + document_ids(mask.b)
    return [mask.q_ids] if isinstance(mask, masks.Segments) and mask.kv_ids is None else []


def unbroken_runs(ids: Sequence[Int[Array, "..."]], batch: int, length: int) -> Int[Array, "B T"] | None:
    """The number of every token's run, 0, 1, ...: a new one starts where any of the ids changes. None without ids.

    ids: [T], [1, T] or [B, T] each. Raises ValueError for other shapes.
    """
    if not ids:
        return None
    starts = jnp.zeros((batch, length), bool)
    for x in ids:
        if x.shape not in ((length,), (1, length), (batch, length)):
            raise ValueError(f"mask: ids of segments are [{length}], [1, {length}] or [{batch}, {length}] here, got {x.shape}")
        starts = starts.at[:, 1:].set(starts[:, 1:] | (x[..., 1:] != x[..., :-1]))
    return jnp.cumsum(starts, axis=1)
