"""What models are trained for, and how fast."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int


def label_smoothed_ce(
    logits: Float[Array, "*B V"],
    targets: Int[Array, "*B"],
    *,
    smoothing: float = 0.1,
    where: Bool[Array, "*B"] | None = None,
    exclude_target: bool = False,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats against (1 - ε)·onehot + ε/V (Vaswani et al. 2017, §5.4); float32.

    smoothing: ε; 0 is the plain cross-entropy.
    where: tokens that count (not padding); all by default. 0 when none does.
    exclude_target: ε/(V - 1) on every class but the target, as tensor2tensor has it.
    Raises ValueError for ε outside [0, 1) and for shapes that do not fit.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: must be in [0, 1), got {smoothing}")
    if targets.shape != logits.shape[:-1] or (where is not None and where.shape != targets.shape):
        shapes = f"targets {targets.shape}" + ("" if where is None else f", where {where.shape}")
        raise ValueError(f"targets, where: logits {logits.shape} need {logits.shape[:-1]}, got {shapes}")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    target = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    loss = -(1 - smoothing) * target
    if smoothing:
        classes = logits.shape[-1]
        total = log_p.sum(axis=-1)
        others = (total - target) / (classes - 1) if exclude_target else total / classes
        loss = loss - smoothing * others
    if where is None:
        return loss.mean()
    return jnp.where(where, loss, 0).sum() / jnp.maximum(where.sum(), 1)


def noam_schedule(dim: int, *, warmup: int = 4000, scale: float = 1.0) -> Callable[[ArrayLike], Array]:
    """step -> scale · dim^-0.5 · min(step^-0.5, step · warmup^-1.5) (Vaswani et al. 2017, eq. 3).

    Steps count from 1: the peak, (dim · warmup)^-0.5, is at step = warmup, and step 0 gives 0. For optax,
    which counts from 0, pass `lambda count: schedule(count + 1)`.
    """
    if dim < 1 or warmup < 1:
        raise ValueError(f"dim, warmup: must be at least 1, got {dim} and {warmup}")

    def schedule(step: ArrayLike) -> Array:
        step = jnp.asarray(step, jnp.float32)
        return scale * dim**-0.5 * jnp.minimum(jnp.maximum(step, 1) ** -0.5, step * warmup**-1.5)

    return schedule
