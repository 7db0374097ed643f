"""Mixture-of-head attention (Jin et al., 2024, ICML 2025, arXiv 2410.11842).

Multi-head attention is a sum over heads, y = Σ_n o_n W_O^n. MoH weighs the summands anew for every token: h_s shared
heads (the first) always count, and of the h_r = N - h_s others a router takes the k that suit the token best. Attention
itself is unchanged. With x [B, T, D] and o [B, T, N, H] (paper §3.2):

    p       = softmax(x W_r)   [B, T, h_r]        A = the k largest of p
    sh      = softmax(x W_s)   [B, T, h_s]        (1 for a single shared head)
    (a1,a2) = softmax(x W_h)                      only where there are shared and routed heads
    y       = Σ_n g_n o_n W_O^n

    style      g of a shared head      g of a routed head in A, 0 outside
    "paper"    a1 sh_n                 a2 p_n
    "code"     2 a1 h_s sh_n           2 a2 k p_n / Σ_A p           (released ViT and DiT)
    "tuned"    1                       1                            (continue-tuned LLaMA3)

Without shared heads a1 and a2 are left out, and so is their 2. In "code" an undecided router gives every active head the
gate 1, so that y is attention over the active heads. "tuned" has no parameters: the logit of a routed head is
||q_n||_2, before any position is applied, over the standard deviation of those logits; gates are 1 or 0 and gradients
pass straight through to p.

Load balance (training): L_b = h_r Σ_e P_e f_e, with P_e the mean of p_e over tokens and f_e the share of tokens that take
e, averaged over layers, with a coefficient of 0.01. It is k for a uniform router.

Costs: D (h_r + h_s + 2) parameters with h_s > 1, D (h_r + 2) with one shared head, D h_r without any, none for "tuned",
which asks for the query projection again (compiled, it is computed once and differentiated twice). The keys and values of all
heads are computed and cached. Heads that are off are multiplied by 0 here, which saves nothing; a kernel that leaves (token,
head) pairs out would save their share of scores, values and output projection.

Gates and the load-balance loss follow the authors' code (SkyworkAI/MoH).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from attnzoo.errors import unknown
from attnzoo.nn.auxiliary import auxiliary_loss
from attnzoo.nn.linear import linear
from attnzoo.nn.routing import load_balance_loss as moh_load_balance_loss
from attnzoo.nn.routing import mean_over_tokens, top_k_mask
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

STYLES = ("paper", "code", "tuned")


class Routing(NamedTuple):
    """What a router decided, in float32.

    gates: g, shared heads first. probabilities: p. active: whether a routed head is in A.
    """

    gates: Float[Array, "*B N"]
    probabilities: Float[Array, "*B h_r"]
    active: Bool[Array, "*B h_r"]


def moh_router(
    routed: Float[Array, "*B h_r"],
    *,
    top_k: int,
    shared: Float[Array, "*B h_s"] | None = None,
    kinds: Float[Array, "*B 2"] | None = None,
    style: str = "code",
) -> Routing:
    """Gates from logits, x W_r and (where there are shared heads) x W_s and x W_h.

    top_k: k, the routed heads that are active; ties go to the lower head.
    shared: of style "tuned" only the width counts.
    kinds: needed where there are both shared and routed heads, except in style "tuned", which has no such gate.

    Raises ValueError for an unknown style, a k that is not in 0..h_r (0 only if there is nothing to route), and missing
    or superfluous kinds.
    """
    if style not in STYLES:
        raise unknown("style", style, STYLES)
    h_r, h_s = routed.shape[-1], 0 if shared is None else shared.shape[-1]
    check_heads(h_s, h_r, top_k)
    wanted = bool(h_s and h_r) and style != "tuned"
    if wanted != (kinds is not None):
        raise ValueError(
            f"kinds: {'needed' if wanted else 'not used'} by style {style!r} with {h_s} shared, {h_r} routed heads"
        )
    p = jax.nn.softmax(routed.astype(jnp.float32), axis=-1)
    sh = jnp.ones((*p.shape[:-1], 0)) if shared is None else jax.nn.softmax(shared.astype(jnp.float32), axis=-1)
    active = top_k_mask(p, top_k)
    if style == "tuned":
        # Forward exactly 1 or 0; backward the gradient of p.
        gates = [jnp.ones_like(sh), active + (p - jax.lax.stop_gradient(p))]
    else:
        on = jnp.where(active, p, 0.0)
        gates = [sh, on]
        if style == "code":
            total = jnp.maximum(on.sum(axis=-1, keepdims=True), jnp.finfo(jnp.float32).eps)
            gates = [h_s * sh, top_k * on / total]
        if kinds is not None:
            a = jax.nn.softmax(kinds.astype(jnp.float32), axis=-1) * (2 if style == "code" else 1)
            gates = [a[..., i : i + 1] * gate for i, gate in enumerate(gates)]
    return Routing(jnp.concatenate(gates, axis=-1), p, active)


def check_heads(h_s: int, h_r: int, top_k: int) -> None:
    """Raises ValueError unless some heads are active, and k of the h_r routed ones can be (none only if there are none)."""
    if h_s < 0 or h_r < 0:
        raise ValueError(f"shared_heads: must be in 0..N={h_s + h_r}, got {h_s}")
    if not min(1, h_r) <= top_k <= h_r:
        raise ValueError(f"top_k: of {h_r} routed heads {min(1, h_r)} to {h_r} can be active, got {top_k}")


def query_norm_logits(q: Float[Array, "*B h_r H"]) -> Float[Array, "*B h_r"]:
    """||q_n||_2 over its standard deviation among the heads: the parameter-free router's logits.

    Norms that do not differ, up to rounding, are left as they are. Gradients are 0 where a query is 0.
    """
    square = jnp.square(q.astype(jnp.float32)).sum(axis=-1)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    centred = norm - norm.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).sum(axis=-1, keepdims=True) / max(norm.shape[-1] - 1, 1)
    differ = variance > (4 * jnp.finfo(jnp.float32).eps * norm.mean(axis=-1, keepdims=True)) ** 2
    return norm / jnp.where(differ, jnp.sqrt(jnp.where(differ, variance, 1.0)), 1.0)


def active_head_fraction(gates: Float[Array, "*B N"], *, where: Bool[Array, "*B"] | None = None) -> Float[Array, "N"]:
    """Share of the tokens for which each head is on; their mean is (h_s + k) / N. where: tokens that count."""
    return mean_over_tokens(gates != 0, where)


class MixtureOfHeadAttention(GroupedQueryAttention):
    """Attention whose heads are gated token by token; x [B, T, D] -> [B, T, D].

    style: how router outputs become gates, "paper", "code" or "tuned".
    shared_heads: h_s, heads 0..h_s-1, always active; a quarter of them by default.
    top_k: k, how many of the others are active for a token; by default as many as makes three quarters of all heads.
    balance: coefficient of the load-balance loss, "head_balance", which training adds (see `nn.auxiliary`); 0 for none.
    Further arguments as in `GroupedQueryAttention`. Routing is the query token's; with a memory too.

    Raises ValueError for an unknown style and for head counts that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        style: str = "code",
        shared_heads: int | None = None,
        top_k: int | None = None,
        balance: float = 0.01,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(dim, num_heads, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)
        if style not in STYLES:
            raise unknown("style", style, STYLES)
        h_s = num_heads // 4 if shared_heads is None else shared_heads
        h_r = num_heads - h_s
        top_k = max(-(-3 * num_heads // 4) - h_s, min(1, h_r)) if top_k is None else top_k
        check_heads(h_s, h_r, top_k)
        self.style, self.shared_heads, self.top_k, self.balance = style, h_s, top_k, balance

        def router(outputs: int) -> nnx.LinearGeneral:
            return linear(dim, outputs, ("embed", None), dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        routes = style != "tuned"
        self.router = router(h_r) if routes and h_r else None
        self.shared_router = router(h_s) if routes and h_s > 1 else None
        self.kind_router = router(2) if routes and h_s and h_r else None

    def route(self, x: Float[Array, "B T D"]) -> Routing:
        """The gates of every token and what they were made from, for losses and statistics."""
        h_s, tokens = self.shared_heads, x.shape[:-1]

        def logits(router: nnx.LinearGeneral | None, count: int) -> Array:
            return jnp.zeros((*tokens, count), jnp.float32) if router is None else router(x)

        shared = jnp.zeros((*tokens, h_s), jnp.float32) if h_s else None
        if self.style == "tuned":
            routed = query_norm_logits(self.qkv.query(x)[..., h_s:, :])
            return moh_router(routed, shared=shared, top_k=self.top_k, style=self.style)
        return moh_router(
            logits(self.router, 0),
            shared=logits(self.shared_router, h_s) if h_s else None,
            kinds=None if self.kind_router is None else self.kind_router(x),
            top_k=self.top_k,
            style=self.style,
        )

    def merge(self, o: Float[Array, "B T N H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Σ_n g_n o_n W_O^n."""
        routing = self.route(x)
        if self.balance and self.top_k:
            auxiliary_loss(
                "head_balance",
                lambda: moh_load_balance_loss(routing.probabilities, routing.active),
                self.balance,
                average=True,
            )
        return super().merge(o * routing.gates[..., None].astype(o.dtype), x)


def moh_from_mha(
    mixer: GroupedQueryAttention,
    *,
    style: str = "tuned",
    shared_heads: int | None = None,
    top_k: int | None = None,
) -> MixtureOfHeadAttention:
    """A trained mixer with its heads routed, for further training; W_Q, W_K, W_V and W_O are copied.

    style "tuned" adds no parameters, as in the paper's LLaMA3. The routers of the others start at zero where all heads stay
    active; "code" then computes what `mixer` did. Where routed heads have to be chosen they start as N(0, 0.02), drawn with
    seed 0: alike for all they would tie, and every token would take the lowest heads. Defaults as in `MixtureOfHeadAttention`.
    """
    made = MixtureOfHeadAttention.like(mixer, style=style, shared_heads=shared_heads, top_k=top_k)
    routed = made.qkv.num_heads - made.shared_heads
    std = 0.02 if made.top_k < routed else 0.0
    for i, router in enumerate((made.router, made.shared_router, made.kind_router)):
        if router is not None:
            kernel = router.kernel[...]
            router.kernel[...] = std * jax.random.normal(jax.random.key(i), kernel.shape, kernel.dtype)
    return made


def _picture(axes: Any) -> None:
    """The gates of a few tokens."""
    mixer = MixtureOfHeadAttention(32, 8, rngs=nnx.Rngs(0))
    gates = mixer.route(jax.random.normal(jax.random.key(0), (1, 16, 32))).gates[0]
    image = axes.imshow(gates.T, cmap="Blues", vmin=0)
    axes.axhline(mixer.shared_heads - 0.5, color="tab:red", lw=1)
    axes.set(xlabel="token", ylabel="head (shared ones above the line)", title="gates: white heads are off")
    axes.figure.colorbar(image, ax=axes, shrink=0.6)


PAPER = Paper(
    123,
    "moh",
    "MoH: Multi-Head Attention as Mixture-of-Head Attention",
    "heads",
    builds=(
        MixtureOfHeadAttention,
        Routing,
        moh_router,
        query_norm_logits,
        moh_load_balance_loss,
        moh_from_mha,
        active_head_fraction,
    ),
    mixer=MixtureOfHeadAttention,
    picture=_picture,
    costs={
        "cache numbers per token": "2 * K * H",
        "parameters": "2 * D * N * H + 2 * D * K * H",
        "parameters of the routers (h_s > 1, not tuned)": "D * (N + 2)",
        "multiply-adds of scores and values": "2 * T * S * N * H",
        "the same if heads that are off were left out": "2 * T * S * (h_s + k) * H",
    },
    code="SkyworkAI/MoH",
    notes=(
        "The default style 'code' is what was released: the factors 2, h_s and k, and routed gates that are renormalised "
        "over the active heads, keep the output at the scale of plain attention; the paper's formula ('paper') has none "
        "of them. In 'tuned' the gradient of p passes straight through for every routed head, on or off. Gates multiply "
        "dense head outputs, so no time is saved."
    ),
)
