"""What routers share: who is chosen, and the losses that keep them useful."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def top_k_mask(scores: Float[Array, "*B E"], k: int) -> Bool[Array, "*B E"]:
    """True at the k largest of each row, exactly k; ties go to the lower index."""
    chosen = jax.lax.top_k(scores, k)[1]
    return (chosen[..., None] == jnp.arange(scores.shape[-1])).any(axis=-2)


def load_balance_loss(
    probabilities: Float[Array, "*B E"],
    active: Bool[Array, "*B E"],
    *,
    where: Bool[Array, "*B"] | None = None,
) -> Float[Array, ""]:
    """E Σ_e P_e f_e: P_e the mean probability of e over tokens, f_e the share of tokens that take it; float32.

    With k taken per token it is k when the router is uniform (Fedus et al. 2021, arXiv 2101.03961, eq. 4, for k = 1), and
    more the more probability and choices gather. Gradients flow through P alone.
    where: tokens that count (not padding); all by default.
    Raises ValueError for shapes that differ.
    """
    if active.shape != probabilities.shape:
        raise ValueError(f"active: needs the shape of probabilities {probabilities.shape}, got active {active.shape}")
    P, f = (mean_over_tokens(x, where) for x in (probabilities, active))
    return probabilities.shape[-1] * (P * f).sum()


def router_z_loss(logits: Float[Array, "*B E"], *, where: Bool[Array, "*B"] | None = None) -> Float[Array, ""]:
    """The mean of (log Σ exp logits)² over tokens: keeps logits small (Zoph et al. 2022, arXiv 2202.08906, eq. 5); float32.

    where: tokens that count; all by default.
    """
    z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
    return mean_over_tokens(jnp.square(z), where)[0]


def mean_over_tokens(x: Array, where: Bool[Array, "*B"] | None = None) -> Float[Array, "E"]:
    """x [*B, E] averaged over the tokens that count, in float32; 0 where none does.

    Raises ValueError for a `where` that does not have one entry per token.
    """
    if where is not None and where.shape != x.shape[:-1]:
        raise ValueError(f"where: needs an entry per row, {x.shape[:-1]}; got {where.shape}")
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if where is None:
        return flat.mean(axis=0)
    counted = where.reshape(-1, 1)
    return jnp.where(counted, flat, 0).sum(axis=0) / jnp.maximum(counted.sum(), 1)
