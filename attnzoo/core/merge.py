"""Combining attention over parts of the keys into attention over all of them.

A part is (out, lse): its own normalised output and the log-sum-exp of its (scaled, modified, masked) logits.
With m = max lse_i, the whole is

    out = Σ_i e^(lse_i - m) out_i / Σ_i e^(lse_i - m),      lse = m + log Σ_i e^(lse_i - m),

exact for any partition of the keys, associative, and symmetric. A part that sees nothing has lse = -inf and
leaves the others alone; if all do, out is 0 and lse is -inf. Differentiable, without NaN in the empty cases.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_all(
    outs: Float[Array, "P *B T N Hv"], lses: Float[Array, "P *B T N"]
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]:
    """Merges P partial attentions stacked on axis 0. Arithmetic in float32; out keeps the dtype of `outs`.

    Raises:
        ValueError: if `lses` has not the shape of `outs` without its last axis.
    """
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"lses: expected the shape {outs.shape[:-1]} of outs {outs.shape}, got {lses.shape}")
    lses = lses.astype(jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share = jnp.exp(lses - top)
    total = jnp.sum(share, axis=0)
    some = total > 0
    divisor = jnp.where(some, total, 1.0)  # keeps 0/0 and log 0 out of the gradients
    out = jnp.sum(share[..., None] * outs.astype(jnp.float32), axis=0) / divisor[..., None]
    lse = jnp.where(some, top + jnp.log(divisor), -jnp.inf)
    return out.astype(outs.dtype), lse


def merge_lse(
    o1: Float[Array, "*B T N Hv"],
    l1: Float[Array, "*B T N"],
    o2: Float[Array, "*B T N Hv"],
    l2: Float[Array, "*B T N"],
) -> tuple[Float[Array, "*B T N Hv"], Float[Array, "*B T N"]]:
    """Merges two partial attentions; see `merge_all`."""
    return merge_all(jnp.stack([o1, o2]), jnp.stack([l1, l2]))
