"""What tests and claims share: float64 references, and a layer whose heads have known roles. Plain numpy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

Array = np.ndarray


def oracle_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    visible: Bool[Array, "*#B #N #T #S"] | None = None,
    *,
    log_w: Float[Array, "*#B #N #T #S"] | float = 0.0,
    scale: float | None = None,
) -> tuple[Float64[Array, "B T N Hv"], Float64[Array, "B N T S"]]:
    """softmax(scale · q·k + log_w) over the visible keys, in float64: (out, weights). Empty rows give 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    logits = scale * np.einsum("btnh,bsnh->bnts", q, k) + log_w
    if visible is not None:
        logits = np.where(visible, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1.0)
    return np.einsum("bnts,bsnh->btnh", weights, v), weights


def oracle_cached_attention(
    q: Float[Array, "B T N H"],
    cache: Any,
    q_positions: Int[Array, "B T"],
    *,
    scale: float | None = None,
) -> tuple[Float64[Array, "B T N Hv"], Float64[Array, "B N T S"]]:
    """The same over the slots of a cache with payload {"k", "v"}: slots that hold a token at or before q."""
    view = cache.view()
    groups = q.shape[2] // view.pos.shape[1]
    pos = np.repeat(np.asarray(view.pos), groups, axis=1)[:, :, None, :]
    w = np.repeat(np.asarray(view.w, np.float64), groups, axis=1)[:, :, None, :]
    held = (pos >= 0) & (w > 0)
    k, v = (np.swapaxes(np.asarray(view.payload[name], np.float64), 1, 2) for name in ("k", "v"))
    visible = held & (pos <= np.asarray(q_positions)[:, None, :, None])
    return oracle_attention(q, k, v, visible, log_w=np.log(np.where(held, w, 1.0)), scale=scale)


@dataclass(frozen=True)
class NeedleLayer:
    """Queries, keys and values of one attention layer whose heads do one thing each. See `needle_layer`.

    Attributes:
        q: [B, T, N, H]. k: [B, T, K, H]. v: [B, T, K, H], unit vectors.
        needle: the token [B] that every query of a retrieval head looks for.
        heavy: the tokens [B, n_heavy] that heavy heads look at.
        kinds: what each query head does.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    needle: Int[Array, "B"]
    heavy: Int[Array, "B n_heavy"]
    kinds: tuple[str, ...]

    def accuracy(self, out: Float[Array, "B N H"], head: int = 0) -> float:
        """Share of rows in which the value nearest to the head's output at the last query is the needle's."""
        group = self.q.shape[2] // self.k.shape[2]
        match = np.einsum("bth,bh->bt", self.v[:, :, head // group], np.asarray(out)[:, head])
        return float(np.mean(match.argmax(axis=-1) == self.needle))


def needle_layer(
    B: int = 64,
    T: int = 256,
    N: int = 8,
    K: int = 2,
    kinds: tuple[str, ...] = (
        "retrieval", "heavy", "heavy", "local", "local", "sink", "broad", "heavy",
    ),
    n_heavy: int = 6,
    a: float = 5.0,
    *,
    window: int = 8,
    seed: int = 0,
) -> NeedleLayer:  # fmt: skip
    """A synthetic layer with heads of known kinds, on which cache policies can be told apart in seconds.

    A key is [unit random code of its token (24); unit sinusoid of its position (24); heavy flag; sink flag]
    plus noise .15/√H, H = 50. A query reads one of these parts: "retrieval" the code of the row's needle with
    strength a√H, "local" the sinusoid of its own position with 12√H, "heavy" and "sink" their flag with 6√H
    and 9√H, and "broad" nothing; noise of .15 is added. The sink is token 0; heavy tokens and the needle are
    distinct and lie in [4, T - 2·window). Values are random unit vectors. Logits are to be scaled by 1/√H.

    Args:
        kinds: one of "retrieval", "local", "heavy", "sink", "broad" per query head.
        window: the observation window of the policies under test; keeps the needle out of it.

    Raises:
        ValueError: `kinds` of another length than N or with an unknown kind, or K that does not divide N.
    """
    unknown = sorted(set(kinds) - {"retrieval", "local", "heavy", "sink", "broad"})
    if len(kinds) != N or unknown:
        raise ValueError(f"kinds: expected N={N} known kinds, got {len(kinds)} with unknown {unknown}")
    if N % K:
        raise ValueError(f"K: must divide N={N}, got {K}")
    rng = np.random.default_rng(seed)
    width, H = 24, 50
    root = H**0.5

    def unit(*shape: int) -> np.ndarray:
        x = rng.normal(size=shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    code = unit(B, T, width)
    angle = np.arange(T)[:, None] * np.geomspace(1.0, 0.02, width // 2)
    place = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1) / (width // 2) ** 0.5
    middle = np.arange(4, T - 2 * window)
    marked = np.stack([rng.choice(middle, n_heavy + 1, replace=False) for _ in range(B)])
    heavy, needle = marked[:, :n_heavy], marked[:, n_heavy]

    flags = np.zeros((B, T, 2))
    np.put_along_axis(flags[..., 0], heavy, 1.0, axis=1)
    flags[:, 0, 1] = 1.0
    key = np.concatenate([code, np.broadcast_to(place, (B, T, width)), flags], axis=-1)
    k = key[:, :, None] + 0.15 / root * rng.normal(size=(B, T, K, H))

    q = np.zeros((B, T, N, H))
    for n, kind in enumerate(kinds):
        if kind == "retrieval":
            q[:, :, n, :width] = a * root * code[np.arange(B), needle][:, None]
        elif kind == "local":
            q[:, :, n, width : 2 * width] = 12 * root * place
        elif kind == "heavy":
            q[:, :, n, 2 * width] = 6 * root
        elif kind == "sink":
            q[:, :, n, 2 * width + 1] = 9 * root
    q += 0.15 * rng.normal(size=q.shape)
    v = unit(B, T, K, H)
    f32 = np.float32
    return NeedleLayer(q.astype(f32), k.astype(f32), v.astype(f32), needle, heavy, tuple(kinds))
