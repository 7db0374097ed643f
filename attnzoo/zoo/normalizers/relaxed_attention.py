"""Relaxed Attention for Transformer Models (Lohrenz et al., 2022, arXiv 2209.09735).

After the softmax, every row of attention weights is blended with the uniform distribution over the keys it may see:

    w     = softmax(q kᵀ / sqrt(H))                     [B, N, T, S]
    n_t   = how many keys query t may see
    w_rel = (1 - gamma) w + gamma / n_t   at those keys,   0 elsewhere              (paper §3.1)
    o     = dropout(w_rel) v

In the encoder's self-attention this regularises, as label smoothing does for outputs. In cross-attention it keeps the
decoder from relying on a language model of its own, so that an external one can be fused with more gain:

    log p = log p_dec + lambda log p_lm                                              (shallow fusion)

It is done in training, and in "matched inference" also afterwards. In fuzzy relaxation every step draws its gamma from
N(gamma, sigma²). Since dw_rel / dw = 1 - gamma, gradients into the logits shrink by that factor.

Costs: no parameters, the cache of grouped-query attention. Fused, the output is (1 - gamma) softmax(..) v plus gamma times
the mean of the values seen: `attnzoo.core.weights.Relaxed` runs the two by tiles and never holds a row of weights. Where every
query is known to see the first so many keys (all, causal), and no weights are dropped, the means are one running sum.

The formula and its place before dropout follow freewym/espresso; the variants follow the paper.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnzoo.core.weights import Relaxed, check_gamma, softmax
from attnzoo.errors import unknown
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

MODES = ("train", "matched", "off")

WHERE: dict[str, frozenset[str]] = {
    "encoder_self": frozenset({"encoder"}),
    "cross": frozenset({"cross"}),
    "both": frozenset({"encoder", "cross"}),
    "all": frozenset({"encoder", "cross", "decoder"}),
}
"""Which kinds of attention are relaxed: of an encoder (bidirectional), across to a memory, of a decoder (causal)."""


def relax_weights(
    weights: Float[Array, "*B N T S"],
    gamma: float | Float[Array, " N"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, "*B N T S"]:
    """(1 - gamma) w + gamma / n_t at the keys a row may see, 0 elsewhere; rows that see nothing stay 0.

    weights: rows that sum to 1 over the keys they may see. gamma: in [0, 1]; a number, or one for each of the N heads.
    mask: True at keys that may be seen, broadcasts to weights; None: all of them.

    Raises ValueError for a gamma of another shape, or outside [0, 1] where its value is known, and a mask that does not
    broadcast.
    """
    check_gamma(gamma)
    if jnp.shape(gamma) not in ((), weights.shape[-3:-2]):
        raise ValueError(f"gamma: weights {weights.shape} need a number or {weights.shape[-3:-2]}, got {jnp.shape(gamma)}")
    mixed = jnp.asarray(gamma, weights.dtype).reshape(-1, 1, 1)
    if mask is None:
        return (1 - mixed) * weights + mixed / weights.shape[-1]
    try:
        ok = jnp.broadcast_to(mask, weights.shape)
    except ValueError:
        raise ValueError(f"mask: has shape {jnp.shape(mask)}, which does not broadcast to weights {weights.shape}") from None
    seen = ok.sum(-1, keepdims=True)
    return jnp.where(ok, (1 - mixed) * weights + mixed / jnp.maximum(seen, 1), 0)


def sample_fuzzy_gamma(key: Array, gamma: float | Float[Array, " N"], sigma: float) -> Float[Array, "..."]:
    """A draw from N(gamma, sigma²), clipped to [0, 1]; several gammas are moved alike."""
    return jnp.clip(gamma + sigma * jax.random.normal(key), 0, 1)


def shallow_fusion_logits(
    dec_logits: Float[Array, "*B V"], lm_logits: Float[Array, "*B V"], lam: float | Float[Array, ""]
) -> Float[Array, "*B V"]:
    """log p_dec + lam log p_lm in float32, from the logits of both; not normalised again.

    lam: weight of the external language model, usually between 0 and 1. With 0 it says nothing, even of tokens that it excludes
        (-inf). A negative one takes its scores away, and what it excludes then gets +inf.
    Raises ValueError for vocabularies that differ.
    """
    if dec_logits.shape[-1] != lm_logits.shape[-1]:
        raise ValueError(
            f"lm_logits: both models need one vocabulary, got logits {dec_logits.shape} and {lm_logits.shape}; "
            "map the language model's tokens to the decoder's first"
        )
    dec, lm = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (dec_logits, lm_logits))
    return dec + jnp.where(jnp.asarray(lam) == 0, 0, lam * lm)


class RelaxedAttention(GroupedQueryAttention):
    """Grouped-query attention with relaxed weights; x [B, T, D] -> [B, T, D].

    gamma: how much of every row is uniform, in [0, 1], for all heads or one for each; the paper's range is about 0.005 to 0.35.
    mode: "train" relaxes in training mode only (`model.eval()` ends it), "matched" always, "off" never.
    where: "encoder_self", "cross" or "both" as in the paper, which leaves the decoder's causal self-attention alone; "all"
        relaxes that too, over the keys before each query.
    sigma: of fuzzy relaxation, 0 for none. Every call in training mode then draws a gamma; otherwise, and in what
        `attention_weights` shows, gamma itself is used.
    options: as in `GroupedQueryAttention`.

    Raises ValueError for a gamma outside [0, 1], a negative sigma, and unknown modes or places.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gamma: float | Sequence[float] | Float[Array, " N"] = 0.1,
        mode: str = "train",
        where: str = "all",
        sigma: float = 0.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        shares = np.asarray(gamma, np.float32)
        check_gamma(shares)
        if shares.shape not in ((), (num_heads,)):
            raise ValueError(f"gamma: a number, or one for each of {num_heads} heads, is needed, got {gamma}")
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if where not in WHERE:
            raise unknown("where", where, WHERE)
        if sigma < 0:
            raise ValueError(f"sigma: a standard deviation of at least 0 is needed, got {sigma}")
        super().__init__(dim, num_heads, rngs=rngs, **options)
        self.gamma = tuple(shares.tolist()) if shares.ndim else float(gamma)  # type: ignore[arg-type]
        self.mode, self.where, self.sigma = mode, where, sigma
        self.deterministic = False
        self.rngs = rngs.dropout.fork() if sigma else nnx.data(None)

    def call_arguments(self, crosses: bool) -> dict[str, Any]:
        kind = "cross" if crosses else "decoder" if self.causal else "encoder"
        relaxes = self.mode == "matched" or (self.mode == "train" and not self.deterministic)
        weights = Relaxed(self._gamma()) if relaxes and kind in WHERE[self.where] else softmax
        return {**super().call_arguments(crosses), "weights": weights}

    def attention_weights(self, x: Float[Array, "B T D"], **options: Any) -> Float[Array, "B N T S"]:
        """As in `GroupedQueryAttention`; nothing is drawn for it."""
        shown = self
        if self.rngs is not None:
            shown = nnx.clone(self)
            shown.rngs = nnx.data(None)
        return super(RelaxedAttention, shown).attention_weights(x, **options)

    def _gamma(self) -> float | Float[Array, "..."]:
        gamma = jnp.asarray(self.gamma) if isinstance(self.gamma, tuple) else self.gamma
        if self.rngs is None or self.deterministic:
            return gamma
        return sample_fuzzy_gamma(self.rngs(), gamma, self.sigma)


PAPER = Paper(
    1,
    "relaxed_attention",
    "Relaxed Attention for Transformer Models",
    "normalizers",
    builds=(relax_weights, Relaxed, RelaxedAttention, sample_fuzzy_gamma, shallow_fusion_logits),
    mixer=RelaxedAttention,
    weights={"gamma 0.1": lambda T, S: Relaxed(0.1), "gamma 0.35": lambda T, S: Relaxed(0.35)},
    costs={
        "cache numbers per token": "2 * K * H",
        "parameters": "2 * D * N * H + 2 * D * K * H",
        "multiply-adds beyond softmax attention": "T * S * N * H",
        "adds instead, where each query sees the first so many keys": "S * K * H",
    },
    code="freewym/espresso",
    notes=(
        "The paper writes gamma / T with T the length of the key axis, and espresso divides by the padded length; here the "
        "uniform part covers the keys a query may see, so padding and the future get none. Fuzzy draws are clipped to "
        "[0, 1], and every layer draws its own. The default gamma of 0.1 is ours; espresso uses 0.35 in cross-attention. "
        "where='all', the default, relaxes causal self-attention too, so that a decoder alone is relaxed at all; the paper "
        "leaves it as it is."
    ),
)
