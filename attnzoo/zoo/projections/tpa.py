"""Tensor Product Attention Is All You Need (Zhang et al., 2025, arXiv 2501.06425): factors instead of heads.

The N×H matrix of a token's query heads, and likewise its keys and values, is a mean of R products of a head factor a and
a feature factor b, both linear in the token. With x [B, T, D] and ranks R_q, R_k, R_v:

    A_q = x W_Aq [B, T, N, R_q]    B_q = RoPE(x W_Bq) [B, T, R_q, H]    Q = A_q B_q / R_q [B, T, N, H]     (paper §3.1)
    A_k, B_k of rank R_k likewise;                                      K = A_k B_k / R_k
    A_v = x W_Av, B_v = x W_Bv of rank R_v (not rotated);               V = A_v B_v / R_v
    y = concat_n(softmax(Q_n K_nᵀ / sqrt(H)) V_n) W_O,                  W_O [N·H, D], N·H need not be D

RoPE is linear and acts on features, so RoPE(A B) = A RoPE(B): the cache holds rotated factors (§3.2),
(R_k + R_v)(N + H) numbers per token and layer instead of 2·N·H. Decoding never makes keys or values of them. For a query at
position t and every cached token m, with r = 1..R_q and c = 1..R_k:

    s[r, m, c] = B_q[r] · B_k[m, c]
    logit[n, m] = Σ_rc A_q[n, r] A_k[m, n, c] s[r, m, c] / (R_q R_k sqrt(H)),    p = softmax_m(logit)
    o[n] = Σ_mc p[n, m] A_v[m, n, c] B_v[m, c] / R_v

2·R_q·R_k·H + 2·N·R_v·H + O(N·R_q·R_k) operations per cached token, and no key of width N·H is read.

Either factor may be a constant shared by all tokens ("non-contextual") and is then not cached. With a constant A, multi-head
(R = N, A = N·I), multi-query (R = 1, A = 1) and grouped attention (R_k = K, A[n, c] = K·[c = n // (N/K)]) are special cases
(§3.4): `mha_as_tpa`, `mqa_as_tpa`, `gqa_as_tpa`.

T6, the Transformer of the paper, is `attnzoo.models.t6`. The 1/R, the initialisation and the reshapes (head or feature index
before or after the rank, as in the shapes above) follow the authors' code; the direction of RoPE's rotation is the library's
(see the notes).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnzoo.core.cache import cached_weights
from attnzoo.core.positions import RoPE
from attnzoo.nn.latent import LatentAttention, check_rank, check_rope
from attnzoo.nn.linear import head_counts, linear, merge_heads, named
from attnzoo.nn.norms import norm
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention, plain


class TPACache(NamedTuple):
    """What tokens leave behind: the payload of `core.cache.LayerCache`. A factor that is the same for all tokens is None.

    a_k [B, 1, S, N, R_k], b_k [B, 1, S, R_k, H] (rotated), a_v [B, 1, S, N, R_v], b_v [B, 1, S, R_v, H] in the cache; other
    axes before the last two elsewhere.
    """

    a_k: Any
    b_k: Any
    a_v: Any
    b_v: Any


def assemble(a: Float[Array, "*B N R"], b: Float[Array, "*B R H"]) -> Float[Array, "*B N H"]:
    """A B / R: the heads that factors stand for."""
    return jnp.matmul(a, b) / a.shape[-1]


def tpa_decode(
    a_q: Float[Array, "B T N R_q"] | None,
    b_q: Float[Array, "B T R_q H"],
    held: TPACache,
    weigh: Callable[[Float[Array, "B N T S"]], Float[Array, "B N T S"]],
) -> Float[Array, "B T N H"]:
    """Attention to factors, without keys or values (paper §3.2). All T×S logits are held: meant for few queries.

    a_q: None where b_q are the queries themselves, one per head.
    held: factors of S tokens: a_k [B, S, N, R_k], b_k [B, S, R_k, H], a_v and b_v likewise; constant ones broadcast.
    weigh: logits, scaled by 1 / sqrt(H), to weights.
    """
    a_k, b_k, a_v, b_v = held
    rank, width = b_k.shape[-2:]
    f32: dict[str, Any] = {"preferred_element_type": jnp.float32}
    # Slots come first: the order in which factors are held, so that nothing of their size is transposed.
    logits = jnp.einsum("bsch,btrh->bsctr", b_k, b_q, **f32)
    if a_q is not None:
        logits = jnp.einsum("bsctr,btnr->bsctn", logits, a_q.astype(jnp.float32)) / a_q.shape[-1]
    logits = (logits * jnp.swapaxes(a_k, -1, -2)[:, :, :, None]).sum(2) / (rank * width**0.5)  # [B, S, T, N]
    p = weigh(jnp.transpose(logits, (0, 3, 2, 1)))  # [B, N, T, S]
    weighted = jnp.transpose(p, (0, 3, 2, 1))[..., None] * a_v[:, :, None]  # [B, S, T, N, R_v]
    o = jnp.einsum("bstnc,bsch->btnh", weighted.astype(b_v.dtype), b_v, **f32) / b_v.shape[-2]
    return o.astype(b_v.dtype)


def _glorot(dim: int, first: int, second: int) -> float:
    """The bound of Glorot's uniform distribution for [D, first, second] by torch's rule for tensors of three axes."""
    return (6 / ((first + dim) * second)) ** 0.5


class TensorProduct(nnx.Module):
    """x [B, T, D] -> factors a [B, T, N, R] and b [B, T, R, H].

    noncontextual_a, noncontextual_b: that factor is a learned constant, [N, R] or [R, H].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        width: int,
        rank: int,
        *,
        noncontextual_a: bool = False,
        noncontextual_b: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.rank, self.dtype = rank, dtype or param_dtype

        def factor(shape: tuple[int, int], axes: tuple[str | None, ...], constant: bool) -> Any:
            bound = _glorot(dim, *shape)
            if constant:  # as large as the factor of a token of unit variance
                draw = jax.random.normal(rngs.params(), shape, param_dtype)
                return nnx.Param(bound * (dim / 3) ** 0.5 * draw, **named(*axes))
            # The kernel is drawn flat, so its initialiser cannot see the three axes.
            init = lambda key, flat, dtype: jax.random.uniform(key, flat, dtype, -bound, bound)  # noqa: E731
            options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
            return linear(dim, shape, ("embed", *axes), kernel_init=init, **options)

        self.a = factor((num_heads, rank), ("heads", None), noncontextual_a)
        self.b = factor((rank, width), (None, "head_dim"), noncontextual_b)

    @property
    def contextual(self) -> tuple[bool, bool]:
        """Whether a, and whether b, depends on the token."""
        return not isinstance(self.a, nnx.Param), not isinstance(self.b, nnx.Param)

    def constants(self, batch: int, length: int) -> tuple[Array | None, Array | None]:
        """The factors that no token changes, as those of `length` tokens; None for the others."""
        a, b = (
            None if varies else f[...].astype(self.dtype) for f, varies in zip((self.a, self.b), self.contextual, strict=True)
        )
        lead = (batch, length)
        a = None if a is None else jnp.broadcast_to(a, (*lead, *a.shape))
        return a, None if b is None else jnp.broadcast_to(b, (*lead, *b.shape))

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N R"], Float[Array, "B T R H"]]:
        a, b = self.constants(*x.shape[:2])
        return self.a(x) if a is None else a, self.b(x) if b is None else b


class TensorProductAttention(LatentAttention):
    """Attention whose queries, keys and values are products of factors; x [B, T, D] -> [B, T, D].

    dim, num_heads: D and N. head_dim: H, D / N by default; N·H need not be D.
    rank_q, rank_k, rank_v: R_q, R_k, R_v. rank_q=None: dense queries, as in `TPAKVOnly`.
    noncontextual_a, noncontextual_b: that factor of queries, keys and values is a learned constant.
    head_norm: RMSNorm of every head's output before W_O, with one gain [H] (the code's `using_groupnorm`).
    zero_init_out: W_O starts at 0, as in the authors' code.
    Further arguments as in `GroupedQueryAttention`.

    Raises ValueError for heads that do not divide, a rank below 1, two constant factors, and positions that are not a RoPE
    which can turn H features.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        positions: RoPE | None = None,
        head_dim: int | None = None,
        rank_q: int | None = 6,
        rank_k: int = 2,
        rank_v: int = 2,
        noncontextual_a: bool = False,
        noncontextual_b: bool = False,
        head_norm: bool = False,
        zero_init_out: bool = False,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        _, width = head_counts(dim, num_heads, None, head_dim)
        check_rope(positions, "head_dim", width)
        super().__init__(causal=causal, positions=positions, dropout_rate=dropout_rate, backend=backend, **options)
        if noncontextual_a and noncontextual_b:
            raise ValueError("noncontextual_a, noncontextual_b: with both factors constant no token differs; choose one")

        def product(name: str, rank: int) -> TensorProduct:
            constant: dict[str, Any] = {"noncontextual_a": noncontextual_a, "noncontextual_b": noncontextual_b}
            return TensorProduct(dim, num_heads, width, check_rank(name, rank), **constant, **options)

        self.query: Any
        if rank_q is None:
            self.query = linear(dim, (num_heads, width), ("embed", "heads", "head_dim"), **options)
        else:
            self.query = product("rank_q", rank_q)
        self.key, self.value = product("rank_k", rank_k), product("rank_v", rank_v)
        self.num_heads, self.head_dim = num_heads, width
        self.head_norm: Any = norm("rms", width, epsilon=1e-5, **options) if head_norm else None
        if zero_init_out:
            options["kernel_init"] = nnx.initializers.zeros
        self.out = merge_heads(num_heads, width, dim, **options)

    def query_factors(
        self, x: Float[Array, "B T D"], positions: Int[Array, "..."]
    ) -> tuple[Float[Array, "B T N R_q"] | None, Float[Array, "B T R_q H"]]:
        """(A_q, B_q), rotated; (None, Q) where queries are dense."""
        if not isinstance(self.query, TensorProduct):
            return None, self.rotate(self.query(x), positions)
        a, b = self.query(x)
        return a, self.rotate(b, positions)

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> Float[Array, "B T N H"]:
        a, b = self.query_factors(x, positions)
        return b if a is None else assemble(a, b)

    def latents(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> TPACache:
        (a_k, b_k), (a_v, b_v) = self.key(x), self.value(x)
        kept = (*self.key.contextual, *self.value.contextual)
        factors = (a_k, self.rotate(b_k, positions), a_v, b_v)
        return TPACache(*(f[:, :, None] if keep else None for f, keep in zip(factors, kept, strict=True)))

    def cache_spec(self) -> TPACache:
        kept = (*self.key.contextual, *self.value.contextual)
        ranks = (self.key.rank, self.value.rank)
        shapes = [shape for r in ranks for shape in ((1, self.num_heads, r), (1, r, self.head_dim))]
        return TPACache(*(shape if keep else None for shape, keep in zip(shapes, kept, strict=True)))

    def filled(self, latents: TPACache, positions: Int[Array, "..."]) -> TPACache:
        """All four factors [B, S, ...] of tokens at these positions: those remembered, and the constant ones."""
        known = next(f for f in latents if f is not None)
        a_k, b_k, a_v, b_v = (*self.key.constants(*known.shape[:2]), *self.value.constants(*known.shape[:2]))
        constants = (a_k, None if b_k is None else self.rotate(b_k, positions), a_v, b_v)
        return TPACache(*(c if f is None else f[:, :, 0] for f, c in zip(latents, constants, strict=True)))

    def expand(
        self, latents: TPACache, positions: Int[Array, "..."]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        a_k, b_k, a_v, b_v = self.filled(latents, positions)
        return assemble(a_k, b_k), assemble(a_v, b_v)

    def absorbs(self, length: int) -> bool:
        """Factorised for single tokens; longer prompts make keys and values, once for all their queries."""
        return length == 1 and self.backend in ("auto", "dense")

    def attend(
        self, x: Float[Array, "B T D"], cache: Any, positions: Int[Array, "B T"], *, backend: str = "auto", **options: Any
    ) -> Float[Array, "B T N H"]:
        view = cache.view()
        held = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 1, 2), view.payload)
        return tpa_decode(
            *self.query_factors(x, positions),
            self.filled(held, view.pos[:, 0]),
            lambda logits: cached_weights(logits, cache, q_positions=positions, **options),
        )

    def finish(self, o: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
        return super().finish(o if self.head_norm is None else self.head_norm(o))


class TPAKVOnly(TensorProductAttention):
    """Keys and values of factors, queries by one dense map W_Q [D, N, H] (paper appendix, TPA-KVonly)."""

    def __init__(self, dim: int, num_heads: int, **options: Any):
        super().__init__(dim, num_heads, rank_q=None, **options)


def gqa_as_tpa(mixer: GroupedQueryAttention) -> TensorProductAttention:
    """The same function as tensor product attention with constant head factors (paper §3.4).

    R_q = N with A = N·I, R_k = R_v = K with A[n, c] = K·[c = n // (N / K)]; it caches B alone, 2·K·H numbers.
    Raises ValueError for a mixer with biases, which products of factors do not have, or with positions other than RoPE, and
    TypeError for a subclass.
    """
    qkv = plain(mixer).qkv
    if qkv.query.bias is not None:
        raise ValueError("mixer: has biases (use_bias=True), and a product of factors has none; build it without")
    if not isinstance(mixer.positions, RoPE | None):
        raise ValueError(f"mixer: its factors can be rotated by RoPE alone, and it has {type(mixer.positions).__name__}")
    dim, heads, width = qkv.query.kernel[...].shape
    groups = qkv.num_kv_heads
    made = TensorProductAttention(
        dim,
        heads,
        causal=mixer.causal,
        positions=mixer.positions,
        head_dim=width,
        rank_q=heads,
        rank_k=groups,
        rank_v=groups,
        noncontextual_a=True,
        backend=mixer.backend,
        dtype=qkv.query.dtype,
        param_dtype=qkv.query.kernel[...].dtype,
        rngs=nnx.Rngs(0),
    )
    for product, projection in ((made.query, qkv.query), (made.key, qkv.key), (made.value, qkv.value)):
        rank = product.rank
        product.a[...] = rank * jnp.repeat(jnp.eye(rank, dtype=product.a[...].dtype), heads // rank, axis=0)
        product.b.kernel[...] = projection.kernel[...]
    nnx.update(made.out, nnx.state(mixer.out))
    made.dropout = nnx.clone(mixer.dropout)
    return made


def mha_as_tpa(mixer: GroupedQueryAttention) -> TensorProductAttention:
    """`gqa_as_tpa` of multi-head attention: R = N, A = N·I. Raises ValueError unless K = N."""
    return _as_tpa(mixer, plain(mixer).qkv.num_heads)


def mqa_as_tpa(mixer: GroupedQueryAttention) -> TensorProductAttention:
    """`gqa_as_tpa` of multi-query attention: R_k = R_v = 1, A = 1. Raises ValueError unless K = 1."""
    return _as_tpa(mixer, 1)


def _as_tpa(mixer: GroupedQueryAttention, kv_heads: int) -> TensorProductAttention:
    if plain(mixer).qkv.num_kv_heads != kv_heads:
        raise ValueError(
            f"mixer: num_kv_heads must be {kv_heads}, got {mixer.qkv.num_kv_heads}; gqa_as_tpa takes any number of kv heads"
        )
    return gqa_as_tpa(mixer)


def tpa_cache_bytes(
    length: int,
    *,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    rank_k: int = 2,
    rank_v: int = 2,
    batch: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
) -> int:
    """Bytes of the factors of a whole model: B · S · L · (R_k + R_v) · (N + H) · itemsize."""
    return batch * length * num_layers * (rank_k + rank_v) * (num_heads + head_dim) * jnp.dtype(dtype).itemsize


def _picture(axes: Any) -> None:
    """Numbers cached per token and layer for N heads of width 64, with ranks 1 and 2."""
    heads = [8, 16, 32, 64, 128]
    axes.loglog(heads, [2 * n * 64 for n in heads], "o-", base=2, label="multi-head, 2·N·H")
    for rank in (2, 1):
        label = f"factors of rank {rank}, {2 * rank}·(N + H)"
        axes.loglog(heads, [2 * rank * (n + 64) for n in heads], "o-", base=2, label=label)
    axes.set(xlabel="heads N (H = 64)", ylabel="numbers cached per token", title="Factors instead of keys and values")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


PAPER = Paper(
    42,
    "tpa",
    "Tensor Product Attention Is All You Need",
    "projections",
    builds=(
        TensorProductAttention,
        TPAKVOnly,
        TensorProduct,
        TPACache,
        tpa_decode,
        tpa_cache_bytes,
        mha_as_tpa,
        mqa_as_tpa,
        gqa_as_tpa,
        "attnzoo.models.t6:TPAConfig",
        "attnzoo.models.t6:T6Block",
        "attnzoo.models.t6:T6LM",
    ),
    mixer=TensorProductAttention,
    picture=_picture,
    costs={
        "cache numbers per token": "(R_k + R_v) * (N + H)",
        "parameters": "D * (R_q + R_k + R_v) * (N + H) + N * H * D",
        "multiply-adds per cached token of a decoding step": "R_q * R_k * H + N * R_q * R_k + N * R_k + N * R_v * (1 + H)",
    },
    code="tensorgi/TPA",
    parity=(
        "CausalSelfAttention of the authors' model/T6.py, its cosines in full precision: outputs and gradients to 1e-6 "
        "(compared by hand, it is no package)"
    ),
    notes=(
        "The authors' code turns RoPE the other way (x1 cos + x2 sin, x2 cos - x1 sin): negate the second half of every H "
        "block of W_Bq and W_Bk to convert its weights; then the two agree exactly, but for its cosines in bfloat16. "
        "W_O and the output of the feed-forward network start at 0 there, here only with zero_init_out=True. Constant "
        "factors are not cached; a constant B_k is turned to the positions of the slots when it is read."
    ),
)
