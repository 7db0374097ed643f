"""In Conclusion Not Repetition: summarization with diversified attention (Li et al., 2019, CoNLL 2019, arXiv 1909.10852).

Averaged over decoder steps, attention to the source tends to collapse on a few spans that say the same. A determinantal point
process (DPP) scores sets Y of source positions by quality, the attention q they get, and diversity, how unlike their source
vectors e are; two losses made of it widen attention in training. With attention A [B, T, S], q = mean_t A [B, S] and
e [B, S, E], ê = e / |e|:

    L_ij = q_i q_j ê_i·ê_j  [S, S]            log P(Y) = log det L_Y - log det(L + I)

Micro: m positions mu_k that are good and diverse are picked greedily among every 20th, from a random start; attention is
pulled to a mixture of Gaussians around them, which has no gradient of its own:

    g(s) = Σ_k N(s; mu_k, 3²),   G = softmax_s(g),   loss = KL(q ‖ G)

Macro: loss = -log P(Y), gradients through L. Half of the time for quality (ê fixed) with Y every 10th position from a random
start, half for diversity (q fixed) with Y the 15 positions of most attention.

In training rho · cross-entropy + (1 - rho) · loss is minimised, with rho 0.7 for micro (per attention layer) and 0.6 for
macro (on attention averaged over layers).

Greedy picking raises det L_Y by the largest factor d_j each time, by an incremental Cholesky factorisation:

    d_i = L_ii;   pick j = argmax d;   c_i <- [c_i, r_i],  r_i = (L_ji - c_j·c_i) / sqrt(d_j);   d_i <- d_i - r_i²

Costs: S'² E for the kernel of S' candidates, S' k² for k picks. Macro: the determinant of one matrix of size M = min(S, E),
since det(L + I) is det(I + bᵀ b) too where L = b bᵀ, and S E M for that matrix; that of a set is small. Nothing at inference.

The losses and the attention of the convolutional host model follow thinkwee/DPP_CNN_Summarization, where they are what the
paper says; `PAPER.notes` has where not.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.attention import attention
from attnzoo.errors import unknown
from attnzoo.nn.linear import linear
from attnzoo.paper import Paper

NONE = -1
"""In place of a position that was not picked."""

JITTER = 1e-5
"""What is added to the kernel of a set, over the mean of its diagonal."""

DIRECTIONS = ("forward", "reverse")
BRANCHES = ("random", "quality", "diversity")


def dpp_kernel(q: Float[Array, "*B S"], e: Float[Array, "*B S E"]) -> Float[Array, "*B S S"]:
    """L_ij = q_i q_j ê_i·ê_j in float32 or wider: symmetric and positive semidefinite.

    q: quality, not negative; positions of quality 0 (padding) are in no likely set. e: any vectors; a zero stays zero.
    """
    if e.shape[:-1] != q.shape:
        raise ValueError(f"e: one vector for each quality is needed: {(*q.shape, 'E')}, got {e.shape}")
    return _gram(_scaled(q, e))


def _scaled(q: Array, e: Array) -> Array:
    """q_i ê_i [B, S, E], whose inner products are the kernel."""
    q, e = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, e))
    norm2 = (e**2).sum(-1, keepdims=True)
    # Not sqrt(0), whose derivative is infinite.
    return q[..., None] * e * jax.lax.rsqrt(jnp.where(norm2 > 0, norm2, 1))


def _gram(b: Array) -> Array:
    return b @ jnp.swapaxes(b, -1, -2)


def dpp_log_prob(L: Float[Array, "*B S S"], chosen: Bool[Array, "*B S"], *, jitter: float = JITTER) -> Float[Array, "*B"]:
    """log P(Y) = log det(L_Y + j I) - log det(L + I).

    chosen: True at the members of Y. jitter: j over the mean of L_Y's diagonal; keeps log and gradient finite where two members
        are alike. With 0 such sets have -inf.
    """
    if L.shape[-2:] != chosen.shape[-1:] * 2:
        raise ValueError(f"chosen: a kernel {L.shape} needs one entry per position, [..., {L.shape[-1]}], got {chosen.shape}")
    return _log_det_of_set(L, chosen, jitter) - _log_det_with_one(L)


def _log_det_with_one(L: Array) -> Array:
    """log det(L + I)"""
    return jnp.linalg.slogdet(L + jnp.eye(L.shape[-1], dtype=L.dtype))[1]


def _log_det_of_set(L: Array, chosen: Array, jitter: float) -> Array:
    """log det(L_Y + j I)"""
    one = jnp.eye(L.shape[-1], dtype=L.dtype)
    both = chosen[..., :, None] & chosen[..., None, :]
    # The other positions become rows and columns of the identity, which leave the determinant alone.
    count = jnp.maximum(chosen.sum(-1), 1)
    mean = jnp.where(chosen, jnp.diagonal(L, axis1=-2, axis2=-1), 0).sum(-1) / count
    # Members that all have no quality at all still leave something to divide by.
    ridge = jitter * jnp.maximum(mean, jnp.finfo(L.dtype).eps ** 4)[..., None, None]
    sign, log_det = jnp.linalg.slogdet(jnp.where(both, L + ridge * one, one))
    return jnp.where(sign > 0, log_det, -jnp.inf)


def greedy_map_dpp(
    L: Float[Array, "*B S S"], k: int, *, least: float = 1e-10
) -> tuple[Int[Array, "*B k"], Float[Array, "*B k"]]:
    """(positions, gains): up to k picks, each the position that multiplies det L_Y most, and by how much.

    The product of the gains is det L_Y. Picking stops where no gain exceeds `least`: `NONE` and 0 from there on.

    Raises ValueError for k outside 1..S.
    """
    size = L.shape[-1]
    if L.ndim < 2 or L.shape[-2] != size:
        raise ValueError(f"L: a kernel [..., S, S] is needed, got {L.shape}")
    if not 1 <= k <= size:
        raise ValueError(f"k: from 1 to the {size} positions of the kernel {L.shape}, got {k}")

    def of_one(L: Array) -> tuple[Array, Array]:
        def pick(state: tuple[Array, Array, Array], step: Array) -> tuple[tuple, tuple[Array, Array]]:
            d, c, left = state
            gains = jnp.where(left, d, -jnp.inf)
            j = gains.argmax()
            found = gains[j] > least
            gain = jnp.where(found, d[j], 1)
            row = (L[j] - c[:, j] @ c) / jnp.sqrt(gain)
            row = jnp.where(found, row, 0)
            left = left.at[j].set(False) & found
            return (d - row**2, c.at[step].set(row), left), (jnp.where(found, j, NONE), jnp.where(found, gain, 0))

        start = (jnp.diagonal(L), jnp.zeros((k, size), L.dtype), jnp.ones(size, bool))
        return jax.lax.scan(pick, start, jnp.arange(k))[1]

    positions, gains = jax.vmap(of_one)(L.reshape(-1, size, size))
    return positions.astype(jnp.int32).reshape(*L.shape[:-2], k), gains.reshape(*L.shape[:-2], k)


def gaussian_mixture_target(
    positions: Int[Array, "*B m"], length: int, *, sigma: float = 3.0, where: Bool[Array, "*B S"] | None = None
) -> Float[Array, "*B S"]:
    """G = softmax_s Σ_k N(s; mu_k, sigma²) over `length` source positions; no gradient. `NONE` among positions adds nothing.

    where: True at real source positions; the others get 0. The densities are at most 0.4 / sigma each, so G is a gentle hill
    on nearly uniform ground. Raises ValueError for a sigma that is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"sigma: a width of the Gaussians above 0 is needed, got {sigma}")
    s = jnp.arange(length)
    distance = (s - positions[..., None]) / sigma
    density = jnp.exp(-(distance**2) / 2) / (sigma * math.sqrt(2 * math.pi))
    g = jnp.where(positions[..., None] == NONE, 0, density).sum(-2)
    g = jax.nn.softmax(g, where=where)
    return jax.lax.stop_gradient(g if where is None else jnp.where(where, g, 0))


def micro_dpp_loss(
    A: Float[Array, "B T S"],
    e: Float[Array, "B S E"],
    key: Array,
    *,
    stride: int = 20,
    m: int = 20,
    sigma: float = 3.0,
    direction: str = "forward",
    source_mask: Bool[Array, "B S"] | None = None,
    target_mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, " B"]:
    """KL(q ‖ G) per row, or KL(G ‖ q) with direction="reverse"; never negative.

    A: attention, rows sum to 1. e: the vectors attended to. stride: every how many-th real position is a candidate.
    m: picks, at most. source_mask, target_mask: True at real positions and decoder steps; attention to padding does not count.
    direction: "reverse" cannot pull at positions whose attention is 0 (to the last digit): log q has no slope there.

    Raises ValueError for shapes that do not fit, a stride or m below 1, a sigma not above 0, and an unknown direction.
    """
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    if stride < 1 or m < 1:
        raise ValueError(f"stride and m: must be at least 1, got stride={stride} and m={m}")
    q = _quality(A, e, source_mask, target_mask)
    size = q.shape[-1]
    # Places beyond the candidates have no quality, so that they are never picked.
    candidates, real = _every(stride, key, q, source_mask)
    quality = jnp.where(real, jnp.take_along_axis(q, candidates, axis=-1), 0)
    kernel = dpp_kernel(quality, jnp.take_along_axis(e, candidates[..., None], axis=1))
    picks, _ = greedy_map_dpp(jax.lax.stop_gradient(kernel), min(m, candidates.shape[-1]))
    chosen = jnp.where(picks == NONE, NONE, jnp.take_along_axis(candidates, picks, axis=-1))
    target = gaussian_mixture_target(chosen, size, sigma=sigma, where=source_mask)
    return _kl(q, target) if direction == "forward" else _kl(target, q)


def macro_dpp_loss(
    A: Float[Array, "B T S"],
    e: Float[Array, "B S E"],
    key: Array,
    *,
    stride: int = 10,
    top: int = 15,
    branch: str = "random",
    source_mask: Bool[Array, "B S"] | None = None,
    target_mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, " B"]:
    """-log P(Y) per row, with Y and what is learned drawn by `key`.

    branch: "quality" learns A alone, with Y every stride-th position from a random start; "diversity" learns e alone, with Y
    the `top` positions of most attention; "random" is either, with probability 1/2. Further arguments as in `micro_dpp_loss`.

    Raises ValueError for shapes that do not fit, a stride or top below 1, and an unknown branch.
    """
    if branch not in BRANCHES:
        raise unknown("branch", branch, BRANCHES)
    if stride < 1 or top < 1:
        raise ValueError(f"stride and top: must be at least 1, got stride={stride} and top={top}")
    q = _quality(A, e, source_mask, target_mask)
    size = q.shape[-1]
    of_branch, of_start = jax.random.split(key)
    by_quality = jax.random.bernoulli(of_branch) if branch == "random" else branch == "quality"
    spread, of_spread = _every(stride, of_start, q, source_mask)
    best = jax.lax.top_k(q, min(top, size))[1]
    of_best = jnp.ones(best.shape, bool) if source_mask is None else jnp.take_along_axis(source_mask, best, axis=-1)
    most = max(spread.shape[-1], best.shape[-1])

    def either(spread: Array, best: Array) -> Array:
        spread, best = (jnp.pad(x, ((0, 0), (0, most - x.shape[-1]))) for x in (spread, best))
        return jnp.where(by_quality, spread, best)

    members, real = either(spread, best), either(of_spread, of_best)
    fixed_q, fixed_e = jax.lax.stop_gradient((q, e))
    b = _scaled(jnp.where(by_quality, q, fixed_q), jnp.where(by_quality, fixed_e, e))
    of_set = _log_det_of_set(_gram(jnp.take_along_axis(b, members[..., None], axis=1)), real, JITTER)
    # det(b bᵀ + I) = det(bᵀ b + I): the smaller of the two is factorised.
    return _log_det_with_one(_gram(jnp.swapaxes(b, -1, -2) if e.shape[-1] < size else b)) - of_set


def attention_coverage(
    A: Float[Array, "*B T S"],
    *,
    source_mask: Bool[Array, "*B S"] | None = None,
    target_mask: Bool[Array, "*B T"] | None = None,
) -> Float[Array, "*B"]:
    """How much of the source attention covers: exp(entropy of q) over the number of source positions, in (0, 1].

    Attention to padding does not count; a row without source positions has 1.
    """
    q = _mean_over_steps(A, source_mask, target_mask)
    entropy = -jnp.where(q > 0, q * jnp.log(jnp.where(q > 0, q, 1)), 0).sum(-1)
    count = q.shape[-1] if source_mask is None else jnp.maximum(source_mask.sum(-1), 1)
    return jnp.exp(entropy) / count


def _mean_over_steps(A: Array, source_mask: Array | None, target_mask: Array | None) -> Array:
    """q: the mean of attention over real steps, shared out among real positions."""
    A = A.astype(jnp.promote_types(A.dtype, jnp.float32))
    if target_mask is None:
        q = A.mean(-2)
    else:
        q = jnp.where(target_mask[..., None], A, 0).sum(-2) / jnp.maximum(target_mask.sum(-1, keepdims=True), 1)
    if source_mask is None:
        return q
    q = jnp.where(source_mask, q, 0)
    total = q.sum(-1, keepdims=True)
    return q / jnp.where(total > 0, total, 1)


def _every(stride: int, key: Array, q: Array, source_mask: Array | None) -> tuple[Int[Array, "B C"], Bool[Array, "B C"]]:
    """Every stride-th real position from a random start that the row has, in order, and True; beyond them any, and False."""
    size = q.shape[-1]
    real = jnp.ones(q.shape, bool) if source_mask is None else source_mask
    rank = jnp.cumsum(real, axis=-1) - 1
    start = jax.random.randint(key, (), 0, min(stride, size)) % jnp.clip(real.sum(-1, keepdims=True), 1, stride)
    spread = real & (rank % stride == start)
    places = jnp.argsort(jnp.where(spread, rank, size), axis=-1)[:, : -(-size // stride)]
    return places, jnp.take_along_axis(spread, places, axis=-1)


def _quality(A: Array, e: Array, source_mask: Array | None, target_mask: Array | None) -> Array:
    """q [B, S], 0 at padding, after checking shapes."""
    if A.ndim != 3 or e.ndim != 3 or A.shape[::2] != e.shape[:2]:
        raise ValueError(f"A and e: attention [B, T, S] and source vectors [B, S, E] are needed, got {A.shape} and {e.shape}")
    for name, given, shape in (("source_mask", source_mask, e.shape[:2]), ("target_mask", target_mask, A.shape[:2])):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name}: attention {A.shape} needs {shape}, got {given.shape}")
    return _mean_over_steps(A, source_mask, target_mask)


def _kl(p: Array, q: Array) -> Array:
    """Σ p log (p / q), where p = 0 adds nothing."""
    tiny = jnp.finfo(q.dtype).tiny
    ratio = jnp.log(jnp.where(p > 0, p, 1)) - jnp.log(jnp.maximum(q, tiny))
    return jnp.where(p > 0, p * ratio, 0).sum(-1)


class ConvSeq2SeqAttention(nnx.Module):
    """Attention of the convolutional sequence-to-sequence model (Gehring et al., 2017, arXiv 1705.03122), the paper's host.

        d = (W_in h + g) sqrt(1/2),   A = softmax(d zᵀ),   out = (W_out (sqrt(S) A (z + x)) + h) sqrt(1/2)

    dim: D of the decoder's states h. embed_dim: E of embeddings and of the encoder's outputs.
    """

    def __init__(
        self,
        dim: int,
        embed_dim: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"use_bias": True, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.project_in = linear(dim, embed_dim, ("embed", None), **options)
        self.project_out = linear(embed_dim, dim, (None, "embed"), **options)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        g: Float[Array, "B T E"],
        z: Float[Array, "B S E"],
        x: Float[Array, "B S E"],
        *,
        source_mask: Bool[Array, "B S"] | None = None,
        return_weights: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "B T S"]]:
        """out, or (out, A) with return_weights, for the losses. g: target embeddings. z: encoder outputs. x: source embeddings.
        source_mask: True at real positions, whose number takes the place of S.

        Raises ValueError for shapes that do not fit."""
        dim, embed_dim = self.project_in.in_features[0], self.project_out.in_features[0]
        if h.shape[-1] != dim or g.shape != (*h.shape[:-1], embed_dim):
            raise ValueError(f"h and g: [B, T, {dim}] and [B, T, {embed_dim}] are needed, got {h.shape} and {g.shape}")
        if z.shape != x.shape or z.shape[-1] != embed_dim:
            raise ValueError(f"z and x: one shape [B, S, {embed_dim}] is needed, got {z.shape} and {x.shape}")
        d = (self.project_in(h) + g) * math.sqrt(0.5)
        mask = None if source_mask is None else source_mask[:, None, None, :]
        heads = (a[:, :, None] for a in (d, z, z + x))
        found = attention(*heads, mask=mask, scale=1.0, return_weights=return_weights)
        context = found[0] if return_weights else found
        count = jnp.asarray(z.shape[1]) if source_mask is None else source_mask.sum(-1)[:, None, None]
        context = context[:, :, 0] * jnp.sqrt(count).astype(context.dtype)
        out = (self.project_out(context) + h) * math.sqrt(0.5)
        return (out, found[1][:, 0]) if return_weights else out


def _picture(axes: Any) -> None:
    """Quality, greedy picks and the target around them, for a source of four spans that each say one thing."""
    size = 40
    s = jnp.arange(size)
    q = jax.nn.softmax(-(((s - 6) / 5.0) ** 2) / 2 + 0.3 * jnp.sin(3.0 * s))
    e = jax.nn.one_hot(s // 10, 4) + 0.1 * jax.random.normal(jax.random.key(0), (size, 4))
    picks, _ = greedy_map_dpp(dpp_kernel(q, e), 4)
    axes.bar(s, q, color="tab:blue", alpha=0.4, label="attention q")
    axes.plot(picks, q[picks], "ko", label="4 greedy picks")
    axes.plot(s, gaussian_mixture_target(picks, size), "tab:red", label="target G")
    axes.set(xlabel="source position (spans of 10 say the same)", ylabel="share")
    axes.legend(fontsize=8)


PAPER = Paper(
    14,
    "dpp_attention",
    "In Conclusion Not Repetition: Comprehensive Abstractive Summarization With Diversified Attention Based On Determinantal "
    "Point Processes",
    "training",
    builds=(
        dpp_kernel,
        dpp_log_prob,
        greedy_map_dpp,
        gaussian_mixture_target,
        micro_dpp_loss,
        macro_dpp_loss,
        ConvSeq2SeqAttention,
        attention_coverage,
    ),
    picture=_picture,
    costs={
        "multiply-adds of the micro loss": "B * (S / 20) ** 2 * D + 20 ** 2 * B * S / 20",
        "multiply-adds of the macro loss": "B * S * D * min(S, D) + B * min(S, D) ** 3 / 3",
        "at inference": "0",
    },
    code="thinkwee/DPP_CNN_Summarization",
    notes=(
        "The released greedy loop divides by d_j where Cholesky's method divides by its root, leaves "
        "picks among every 20th position unmapped to source positions, and calls torch's KL divergence with a first argument "
        "that is no logarithm and a negated result. Here picks are mapped and the divergence is KL(q ‖ G), or KL(G ‖ q). Its "
        "losses are left out for padded batches; here padding is left out of the sets. In the claim macro spreads attention as "
        "far with vectors that say nothing about the source, and micro nearly so: most of it is where the sets are drawn."
    ),
)
