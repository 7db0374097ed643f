"""Attention that remembers less than keys and values: factors of them, or a latent they are made from."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.core.attention import attention
from attnzoo.core.cache import LayerCache, append, cached_attention, init_cache
from attnzoo.core.masks import Causal
from attnzoo.core.positions import Positions, RoPE
from attnzoo.nn.linear import Names, dropout, dropout_arguments, linear
from attnzoo.nn.mixer import Mixer, on_grid, with_own
from attnzoo.nn.norms import norm


class LatentAttention(Mixer):
    """Self-attention whose cache holds what a subclass makes of a token; x [B, T, D] -> [B, T, D].

    A subclass calls this constructor, sets `out` [B, T, N, Hv] -> [B, T, D], and defines

        queries(x, positions) -> [B, T, N, H], position applied
        latents(x, positions) -> what the tokens leave behind: a pytree of [B, T, K, ...]
        cache_spec() -> the same tree of (K, ...), as `core.cache.init_cache` takes it
        expand(latents, positions) -> (k [B, S, K, H], v [B, S, K, Hv]), position applied

    Full passes expand. So does decoding, unless the subclass can attend to latents as they are, and says when:

        absorbs(T) -> whether T queries over a cache are better attended without expanding it
        attend(x, cache, positions, **options) -> o [B, T, N, Hv]; options: mask, and `attention_arguments()`

    causal, dropout_rate, backend: as in `Mixer` and `core.attention`.
    positions: None, or what rotates queries and keys; a plan is built by the subclass, which knows the heads.
    Raises ValueError for positions that are neither.
    """

    out: nnx.Module

    def __init__(
        self,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if positions is not None and not hasattr(positions, "rotate"):
            raise ValueError(f"positions: None or what has a method rotate is needed, got {type(positions).__name__}")
        self.causal, self.positions, self.backend = causal, positions, backend
        self.cache_dtype = dtype or param_dtype
        self.dropout = dropout(dropout_rate, rngs)

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> Float[Array, "B T N H"]:
        """The queries of tokens x at these positions."""
        raise NotImplementedError

    def latents(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> PyTree[Float[Array, "B T K ..."]]:
        """What tokens x at these positions leave behind."""
        raise NotImplementedError

    def cache_spec(self) -> PyTree:
        """(K, ...) of every leaf of the latents."""
        raise NotImplementedError

    def expand(
        self, latents: PyTree[Float[Array, "B S K ..."]], positions: Int[Array, "..."]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
        """The keys and values that latents of tokens at these positions stand for."""
        raise NotImplementedError

    def absorbs(self, length: int) -> bool:
        """Whether `length` queries over a cache are better attended without expanding it."""
        return False

    def attend(self, x: Float[Array, "B T D"], cache: Any, positions: Int[Array, "B T"], **options: Any) -> Array:
        """The heads' outputs [B, T, N, Hv], from the latents as they are."""
        raise NotImplementedError

    def attention_arguments(self) -> dict[str, Any]:
        """What every call of `core.attention` is given besides q, k, v, mask and positions."""
        return {"backend": self.backend}

    def combined_mask(self, mask: Any) -> Any:
        """`mask` and, in a causal mixer, the causal one."""
        return with_own(Causal() if self.causal else None, mask)

    def rotate(self, x: Float[Array, "B T N H"], positions: Int[Array, "..."]) -> Float[Array, "B T N H"]:
        """x with its position applied, if this mixer has positions."""
        return x if self.positions is None else self.positions.rotate(x, positions)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
    ) -> Float[Array, "B T D"]:
        tokens = jnp.arange(x.shape[1]) if positions is None else positions
        sequence = None if on_grid(self.positions) else positions
        k, v = self.expand(self.latents(x, tokens), tokens)
        o = attention(
            self.queries(x, tokens),
            k,
            v,
            mask=self.combined_mask(mask),
            q_positions=sequence,
            kv_positions=sequence,
            **self.attention_arguments(),
            **dropout_arguments(self.dropout),
        )
        return self.finish(o)

    def finish(self, o: Float[Array, "B T N Hv"]) -> Float[Array, "B T D"]:
        """From the heads' outputs to the mixer's."""
        return self.out(o)  # type: ignore[operator]

    def init_cache(self, batch: int, length: int, *, dtype: DTypeLike | None = None) -> LayerCache:
        """Room for the latents of `length` tokens. Raises ValueError for a mixer that is not causal."""
        if not self.causal:
            raise ValueError("causal: only a mixer built with causal=True can decode")
        return init_cache(batch, length, self.cache_spec(), dtype=dtype or self.cache_dtype)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        *,
        mask: Any = None,
        lengths: Int[Array, "B"] | None = None,
        absorb: bool | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """absorb: attend to the latents as they are, or to keys and values made from them; by default whichever
        `absorbs` says is better."""
        positions = cache.next_positions(x.shape[1])
        cache = append(cache, self.latents(x, positions), lengths)
        options = {"mask": self.combined_mask(mask), **self.attention_arguments()}
        if self.absorbs(x.shape[1]) if absorb is None else absorb:
            return self.finish(self.attend(x, cache, positions, **options)), cache
        held = cache.view().pos[:, 0]

        def read(payload: PyTree) -> tuple[Array, Array]:
            k, v = self.expand(jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), payload), held)
            return jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)

        o = cached_attention(self.queries(x, positions), cache, q_positions=positions, read=read, **options)
        return self.finish(o), cache


class LowRank(nnx.Module):
    """A linear map of bounded rank, x [..., D] -> c [..., r] -> [..., N, H].

    down, up: the two maps, to be called one by one where the latent c is wanted.
    normed: RMSNorm between the two. use_bias: on `down`; what `up` adds would be no function of the latent.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        heads: tuple[int, int],
        *,
        normed: bool = False,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.down = linear(dim, rank, ("embed", None), use_bias=use_bias, **options)
        self.norm: Any = norm("rms", rank, **options) if normed else None
        self.up = head_up(rank, *heads, **options)

    def latent(self, x: Float[Array, "*B D"]) -> Float[Array, "*B r"]:
        """c, normalised."""
        c = self.down(x)
        return c if self.norm is None else self.norm(c)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B N H"]:
        return self.up(self.latent(x))


HEAD_UP: Names = (None, "heads", "head_dim")
"""The axes of a map from a latent to heads."""


def head_up(rank: int, num_heads: int, width: int, **options: Any) -> nnx.LinearGeneral:
    """The linear map [..., r] -> [..., N, H]; options as in `linear`."""
    return linear(rank, (num_heads, width), HEAD_UP, **options)


def check_rank(name: str, rank: int) -> int:
    """`rank`. Raises ValueError, naming the argument, unless it is at least 1."""
    if rank < 1:
        raise ValueError(f"{name}: a rank is at least 1, got {rank}")
    return rank


def check_rope(positions: Any, name: str, width: int) -> None:
    """Raises ValueError unless positions are None, or a `RoPE` that can turn `width` features (argument `name`).

    For what several heads share, such as a latent's rotary key.
    """
    if positions is None:
        return
    if not isinstance(positions, RoPE):
        raise ValueError(
            "positions: RoPE or None is needed, for what is rotated here is shared by heads, and tables of each head's own do "
            f"not apply; got {type(positions).__name__}"
        )
    try:
        positions.widths(width)
    except ValueError as error:
        raise ValueError(f"positions: cannot turn {name}={width} features: {error}") from None
