"""Adaptively Sparse Transformers (Correia et al., 2019, EMNLP-IJCNLP 2019, arXiv 1909.00015).

Softmax gives every token some weight. Here each head n has alpha-entmax weights with an alpha of its own, learned by
gradient, so that heads choose for themselves how many tokens get none:

    P_n = entmax_{alpha_n}(Q_n K_nᵀ / sqrt(H))  [T, S],     o_n = P_n V_n                               (paper §3.1)
    alpha_n = 1 + sigmoid(r_n)  in [1, 2],                  r [N] parameters                              (§3.2)

    entmax_a(x) = argmax over p in the simplex of  p·x + H_a(p)                                           (eq. 4)
    H_a(p) = Σ_j (p_j - p_j^a) / (a (a - 1)),   H_1 the Shannon entropy                                    (eq. 5)

a = 1 is softmax, a = 2 sparsemax; from a > 1 on, weights are exactly 0 wherever (a - 1) x_j <= tau. The map, its
bisection and its derivatives in x and in alpha (Proposition 1) are `attnzoo.core.entmax`.

Costs: tau needs a whole row, so a row of S logits is read once per halving, 28 times in float32. One parameter per head;
the cache is that of grouped-query attention.

Equations and parametrisation follow the paper; numbers are compared with the authors' package `entmax`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.entmax import Entmax, entmax, entmax15, sparsemax
from attnzoo.nn.linear import named
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention


class AdaptiveEntmaxAttention(GroupedQueryAttention):
    """Grouped-query attention whose heads learn the alpha of their entmax; x [B, T, D] -> [B, T, D].

    init_alpha: where every alpha starts, between 1 and 2; None draws r ~ N(0, 1), so that heads start apart.
    options: as in `GroupedQueryAttention`. Self- and cross-attention of every layer are mixers of their own, each with
        its alphas.

    Raises ValueError for an init_alpha outside (1, 2).
    """

    def __init__(self, dim: int, num_heads: int, *, init_alpha: float | None = None, rngs: nnx.Rngs, **options: Any):
        super().__init__(dim, num_heads, rngs=rngs, **options)
        if init_alpha is None:
            r = jax.random.normal(rngs.params(), (num_heads,))
        elif 1 < init_alpha < 2:
            r = jnp.full(num_heads, math.log(init_alpha - 1) - math.log(2 - init_alpha))
        else:
            raise ValueError(f"init_alpha: must lie between 1 and 2, got {init_alpha}")
        self.alpha_logits = nnx.Param(r, **named("heads"))

    @property
    def alpha(self) -> Float[Array, " N"]:
        """alpha_n = 1 + sigmoid(r_n), in [1, 2]."""
        return 1 + jax.nn.sigmoid(self.alpha_logits[...].astype(jnp.float32))

    def attention_arguments(self) -> dict[str, Any]:
        return {**super().attention_arguments(), "weights": Entmax(self.alpha)}


def tsallis_entropy(p: Float[Array, "*B"], alpha: float | Float[Array, "*#B"] = 1.5, axis: int = -1) -> Float[Array, "..."]:
    """H_alpha(p) = Σ_j (p_j - p_j^alpha) / (alpha (alpha - 1)) (eq. 5); the Shannon entropy in nats at alpha = 1.

    p: probabilities; zeros add nothing. alpha: a number, or an array that broadcasts to p with size 1 along `axis`.
    """
    b = jnp.asarray(alpha) - 1
    l = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1)), 0)
    # (p^b - 1) / b = l · expm1(b l) / (b l), and expm1(t) / t -> 1 + t/2: no digits are lost as alpha -> 1.
    t = b * l
    small = jnp.abs(t) < 1e-5
    rate = jnp.where(small, 1 + t / 2, jnp.expm1(t) / jnp.where(small, 1, t))
    return -(p * l * rate).sum(axis) / jnp.squeeze(jnp.broadcast_to(1 + b, _unit(p, axis)), axis)


def _unit(p: Array, axis: int) -> tuple[int, ...]:
    """The shape of p with size 1 along `axis`."""
    return tuple(1 if i == axis % p.ndim else n for i, n in enumerate(p.shape))


def fenchel_young_entmax_loss(
    x: Float[Array, "*B V"], targets: Int[Array, "*B"], alpha: float | Float[Array, "*#B 1"] = 1.5
) -> Float[Array, "*B"]:
    """(p - e_y)·x + H_alpha(p) with p = entmax_alpha(x): cross-entropy at alpha = 1, the sparsemax loss at alpha = 2.

    x: logits over V classes. targets: class y. Never negative, and 0 once p is one-hot at y, which happens at finite
    logits for alpha > 1. The gradient in x is p - e_y (Blondel et al., 2019, arXiv 1901.02324, Proposition 2).
    """
    if targets.shape != x.shape[:-1]:
        raise ValueError(f"targets: logits {x.shape} need {x.shape[:-1]}, got {targets.shape}")
    return _fenchel_young(x, jax.nn.one_hot(targets, x.shape[-1], dtype=x.dtype), jnp.asarray(alpha, x.dtype))


@jax.custom_jvp
def _fenchel_young(x: Array, y: Array, alpha: Array) -> Array:
    p = entmax(x, alpha)
    # Both p and y sum to 1, so x may be shifted; small numbers keep their digits.
    shifted = x - x.max(-1, keepdims=True)
    return ((p - y) * shifted).sum(-1) + tsallis_entropy(p, alpha)


@_fenchel_young.defjvp
def _fenchel_young_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, y, alpha = primals
    dx, _, dalpha = tangents
    p = entmax(x, alpha)
    # p maximises what the loss is made of, so to first order its own change adds nothing.
    _, dh = jax.jvp(lambda a: tsallis_entropy(p, a), (alpha,), (dalpha,))
    return _fenchel_young(*primals), ((p - y) * dx).sum(-1) + dh


def attention_density(
    weights: Float[Array, "*B T S"],
    where: Bool[Array, "..."] | None = None,
    axis: int | tuple[int, ...] | None = None,
) -> Float[Array, "..."]:
    """The share of weights that are not exactly 0 (§5.1).

    where: True at the cells that count, usually those the mask allows; broadcasts to weights. axis: what to average
    over, everything by default; NaN where no cell counts.
    """
    where = None if where is None else jnp.broadcast_to(where, weights.shape)
    return (weights != 0).mean(axis, where=where)


def head_js_diversity(weights: Float[Array, "*B N T S"]) -> Float[Array, "*B T"]:
    """Jensen-Shannon divergence between heads, H(mean_n P_n) - mean_n H(P_n), in nats per query (§5.1).

    0 when all heads attend alike; at most log N.
    """
    mean = weights.mean(-3)
    return tsallis_entropy(mean, 1.0) - tsallis_entropy(weights, 1.0).mean(-2)


PAPER = Paper(
    129,
    "adaptive_entmax",
    "Adaptively Sparse Transformers",
    "normalizers",
    builds=(
        entmax,
        sparsemax,
        entmax15,
        Entmax,
        AdaptiveEntmaxAttention,
        tsallis_entropy,
        fenchel_young_entmax_loss,
        head_js_diversity,
        attention_density,
    ),
    mixer=AdaptiveEntmaxAttention,
    weights={
        "entmax 1.25": lambda T, S: Entmax(jnp.float32(1.25)),
        "entmax 1.5": lambda T, S: Entmax(1.5),
        "sparsemax": lambda T, S: Entmax(2),
    },
    costs={
        "cache numbers per token": "2 * K * H",
        "parameters": "2 * D * N * H + 2 * D * K * H + N",
        "passes over a row of logits": "28",
    },
    code="entmax, deep-spin/entmax",
    parity="entmax_bisect, sparsemax and entmax15 of the package entmax, and their gradients in x and alpha, to 1e-5",
    notes=(
        "The derivatives are given as a JVP, so forward mode and higher orders work too. Bisection runs over the "
        "logarithm of the largest weight, which stays exact as alpha -> 1 where the usual form loses its digits; there "
        "is no separate softmax case. alpha = 1 + sigmoid(r) may saturate at 1 or 2 in float32."
    ),
)
