"""Attention Is All You Need for Chinese Word Segmentation (Duan & Zhao, 2020, EMNLP 2020, arXiv 1910.14537).

A segmenter that only asks of every gap between characters whether a word ends there. Three encoders look left, right and
both ways, each with logits multiplied by how near the characters are (§3.2):

    g(d) = 2 Φ(-|d| / sigma),  sigma = 4          Φ the normal distribution function; g(0) = 1, then falling
    A = softmax(mask(q kᵀ / sqrt(H) · g(t - s)))   forward: s <= t,  backward: s >= t,  center: all

The factor acts on logits, not on weights: near characters count more where a logit is positive, *far* ones where it is
negative, and nothing is hidden. With sigma -> inf it is ordinary attention.

    x = x + attention(norm(x));  x = x + W_2 relu(W_1 norm(x))                          L layers, a last norm, per encoder
    f' = f + c,  b' = b + c     (or by highway gates, f' = g f + (1 - g) c with g = sigmoid(W_f (f + c) + b_f))

The gap after character t is scored from what was read up to t and what will be read from t + 1 on (§3.3):

    h = W_1 f'_t,  d = W_2 b'_{t+1},     s_t = hᵀ U d + W [h ; d] + biases in R^2,   greedy: argmax per gap

Costs: three encoders; the factor is one number per distance. T - 1 decisions, no search.

Formulas are those of the paper and of the authors' code, which masks before it multiplies: there a far padded key gets a
logit near 0 and is taken out after the softmax. Here logits are multiplied first, so rows of weights sum to 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cells import Bound, Geometry, Operand
from attnzoo.core.masks import Causal, Lengths, mask
from attnzoo.core.scores import Score
from attnzoo.errors import unknown
from attnzoo.nn.block import Block
from attnzoo.nn.embed import Embed
from attnzoo.nn.feed_forward import feed_forward
from attnzoo.nn.linear import dropout, linear, named
from attnzoo.nn.mixer import both
from attnzoo.nn.norms import norm
from attnzoo.nn.stack import Stack
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

DIRECTIONS = ("forward", "backward", "center")
MERGES = ("add", "highway")


def _check_sigma(sigma: float) -> None:
    if not sigma > 0:
        raise ValueError(f"sigma: must be positive, got {sigma}")


def _tail(distance: Int[Array, "..."], sigma: float) -> Float[Array, "..."]:
    """2 Φ(-|d| / sigma) = erfc(|d| / (sigma √2))."""
    _check_sigma(sigma)
    return jax.lax.erfc(jnp.abs(distance).astype(jnp.float32) / (sigma * 2**0.5))


def gaussian_distance_weights(length: int, sigma: float = 4.0) -> Float[Array, "T"]:
    """g(d) for d = 0, ..., length - 1; sigma > 0 is the standard deviation, not the variance."""
    return _tail(jnp.arange(length), sigma)


@mask()
class GaussianDistance(Score):
    """``s · g(q - k)``: logits shrink with the distance of positions, to 0 and no further.

    Additive masks (`bias=`) come first and would shrink too: hide keys by `mask=`. Raises ValueError unless sigma > 0.
    """

    sigma: float = 4.0

    def __post_init__(self) -> None:
        _check_sigma(self.sigma)

    def bind(self, g: Geometry) -> Bound:
        if not g.plain:
            return Bound((), lambda s, c: s * _tail(c.q - c.k, self.sigma))
        table = _tail(jnp.arange(1 - g.keys, g.queries), self.sigma)
        return Bound((Operand(table[None], "distance"),), lambda s, c, near: s * near)


class GaussianMaskedAttention(GroupedQueryAttention):
    """Attention to one side or both, its logits multiplied by g; x [B, T, D] -> [B, T, D].

    direction: "forward" (a token sees itself and what is before it), "backward" (itself and what follows) or "center"
        (all); by default "forward" where causal=True and else "center". The forward one decodes.
    gauss: whether logits are multiplied. sigma: the standard deviation.
    options: as in `GroupedQueryAttention`. Takes no memory: positions of two sequences have no distance.

    Raises ValueError for an unknown direction, and for causal=True with another than "forward".
    """

    crosses = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        direction: str | None = None,
        gauss: bool = True,
        sigma: float = 4.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if direction is None:
            direction = "forward" if causal else "center"
        if direction not in DIRECTIONS:
            raise unknown("direction", direction, DIRECTIONS)
        if causal and direction != "forward":
            raise ValueError(f"direction: a causal mixer looks 'forward', got {direction!r}")
        super().__init__(dim, num_heads, causal=direction == "forward", rngs=rngs, **options)
        self.direction = direction
        _check_sigma(sigma)
        self.sigma = sigma if gauss else None

    def attention_arguments(self) -> dict[str, Any]:
        return {**super().attention_arguments(), "score": None if self.sigma is None else GaussianDistance(self.sigma)}

    def _mask(self, mask: Any) -> Any:
        # k >= q is the opposite of k <= q - 1.
        return both(~Causal(-1), mask) if self.direction == "backward" else super()._mask(mask)

    def _check_memory(self) -> None:
        raise ValueError("memory: GaussianMaskedAttention is self-attention; tokens of two sequences have no distance")


class GDTransformerEncoder(nnx.Module):
    """x [B, T, D] -> (f', b'), each [B, T, D]: what has been read up to a character, and from it on.

    dim, num_heads, num_layers, mlp_dim: D, N, L of each of the three encoders, and F (4·D by default).
    merge: "add" or "highway". gauss, sigma: as in `GaussianMaskedAttention`. dropout_rate: of what each part adds.
    scan_layers, remat: as in `nn.stack.Stack`.
    dtype, param_dtype: of the computation and of the parameters.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 4,
        num_layers: int = 6,
        *,
        mlp_dim: int | None = None,
        merge: str = "add",
        gauss: bool = True,
        sigma: float = 4.0,
        dropout_rate: float = 0.1,
        scan_layers: bool = False,
        remat: str = "none",
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if merge not in MERGES:
            raise unknown("merge", merge, MERGES)
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def layer(direction: str) -> Block:
            look: dict[str, Any] = {"direction": direction, "gauss": gauss, "sigma": sigma}
            return Block(
                dim,
                GaussianMaskedAttention(dim, num_heads, use_bias=True, **look, **options),
                feed_forward("relu", dim, mlp_dim, use_bias=True, dropout_rate=dropout_rate, **options),
                norm="layer",
                dropout_rate=dropout_rate,
                **options,
            )

        self.stacks: Any = nnx.Dict({
            d: Stack(lambda _, d=d: layer(d), num_layers, scan=scan_layers, remat=remat)  # type: ignore[misc]
            for d in DIRECTIONS
        })  # fmt: skip
        self.norms: Any = nnx.Dict(**{d: norm("layer", dim, **options) for d in DIRECTIONS})
        sides = ("forward", "backward") if merge == "highway" else ()
        self.gates: Any = nnx.Dict(**{d: linear(dim, dim, ("embed", "mlp"), use_bias=True, **options) for d in sides})

    def __call__(
        self, x: Float[Array, "B T D"], lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """lengths: real characters of right-padded rows."""
        real = None if lengths is None else Lengths(lengths)
        f, b, c = (self.norms[d](self.stacks[d](x, mask=real)) for d in DIRECTIONS)
        return self._merge("forward", f, c), self._merge("backward", b, c)

    def _merge(self, side: str, x: Array, c: Array) -> Array:
        if side not in self.gates:
            return x + c
        gate = jax.nn.sigmoid(self.gates[side](x + c))
        return gate * x + (1 - gate) * c


class BiaffineGapScorer(nnx.Module):
    """(f', b'), each [B, T, D] -> scores of the T - 1 gaps [B, T - 1, C], in float32.

    classes: C; 2 for "join" and "split". dropout_rate: on both projections.
    """

    def __init__(
        self,
        dim: int,
        classes: int = 2,
        *,
        dropout_rate: float = 0.0,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"use_bias": True, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.head = linear(dim, dim, ("embed", "mlp"), **options)
        self.tail = linear(dim, dim, ("embed", "mlp"), **options)
        self.dropout = dropout(dropout_rate, rngs)
        pairs = nnx.initializers.normal(1 / dim)(rngs.params(), (classes, dim, dim), param_dtype)
        self.pairs = nnx.Param(pairs, **named(None, "embed", "mlp"))
        self.pairs_bias = nnx.Param(jnp.zeros(classes, param_dtype), **named(None))
        self.each = linear(2 * dim, classes, ("embed", None), **options)

    def __call__(self, f: Float[Array, "B T D"], b: Float[Array, "B T D"]) -> Float[Array, "B T-1 C"]:
        """Gap t lies between characters t and t + 1."""
        if f.shape != b.shape or f.ndim != 3:
            raise ValueError(f"f, b: one shape [B, T, D] is needed, got {f.shape} and {b.shape}")
        h, d = self.dropout(self.head(f[:, :-1])), self.dropout(self.tail(b[:, 1:]))
        pairs = jnp.einsum("bth,chd,btd->btc", h, self.pairs[...].astype(h.dtype), d, preferred_element_type=jnp.float32)
        return pairs + self.pairs_bias[...] + self.each(jnp.concatenate([h, d], -1))


def real_gaps(lengths: Int[Array, "B"], length: int) -> Bool[Array, "B T-1"]:
    """True at the gaps between two real characters of right-padded rows of T = length."""
    return jnp.arange(1, length) < jnp.asarray(lengths)[:, None]


class GDSegmenter(nnx.Module):
    """characters [B, T] -> scores of "join" and "split" for every gap [B, T - 1, 2].

    vocab_size: of characters. dim, dtype, param_dtype, options: as in `GDTransformerEncoder`.

    Trained by the cross-entropy of the gaps (`models.objectives.label_smoothed_ce`), of padded rows `where=real_gaps(...)`.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        *,
        dropout_rate: float = 0.1,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        shared: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.embed = Embed(vocab_size, dim, **shared)
        self.encoder = GDTransformerEncoder(dim, dropout_rate=dropout_rate, **shared, **options)
        self.scorer = BiaffineGapScorer(dim, dropout_rate=dropout_rate, **shared)

    def __call__(self, characters: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None) -> Float[Array, "B T-1 2"]:
        """lengths: real characters of right-padded rows; gaps past them mean nothing."""
        return self.scorer(*self.encoder(self.embed(characters), lengths))

    def segment(self, characters: Int[Array, "B T"], lengths: Int[Array, "B"] | None = None) -> Bool[Array, "B T-1"]:
        """Whether a word ends between characters t and t + 1, greedily; False in the padding."""
        ends = self(characters, lengths).argmax(-1) == 1
        return ends if lengths is None else ends & real_gaps(lengths, characters.shape[1])


def _picture(axes: Any) -> None:
    """The factor over distance, for three standard deviations."""
    for sigma in (2.0, 4.0, 8.0):
        axes.plot(gaussian_distance_weights(25, sigma), label=f"sigma = {sigma:g}")
    axes.set(xlabel="distance between characters", ylabel="factor on the logit")
    axes.legend()


PAPER = Paper(
    110,
    "gd_transformer",
    "Attention Is All You Need for Chinese Word Segmentation",
    "patterns",
    builds=(
        gaussian_distance_weights,
        GaussianDistance,
        GaussianMaskedAttention,
        GDTransformerEncoder,
        BiaffineGapScorer,
        real_gaps,
        GDSegmenter,
    ),
    mixer=GaussianMaskedAttention,
    masks={"backward": lambda T, S: ~Causal(-1)},
    scores={"sigma 4": lambda T, S: GaussianDistance(), "sigma 0.5": lambda T, S: GaussianDistance(0.5)},
    picture=_picture,
    costs={
        "pairs of the three encoders, per layer": "T * (T + 1) + T ** 2",
        "parameters of the gap scorer": "2 * (D * D + D) + 2 * D * D + 4 * D + 4",
        "cache numbers per token": "2 * K * H",
    },
    code="akibcmi/SAMS, torch",
    parity="the gap scorer with torch's nn.Bilinear and nn.Linear, outputs and gradients, to 1e-5",
    notes=(
        "Pre-norm, as is the default of the authors' code (its released scripts use post-norm and a segmentation layer in "
        "the middle). No positional encoding: the masks and distances tell the order. Two classes; the authors' third is for "
        "padding."
    ),
)
