"""Compressed Convolutional Attention (Figliolia et al., 2025, arXiv 2510.04476): CCA and CCGQA.

Queries, keys and values are projected down, and the whole attention runs in that latent; nothing is projected up before the
softmax. Convolutions over a few tokens, a mean shared by queries and keys, values of the token before, and normalised
queries and keys give back what the narrow latent takes away. With N query heads and K kv heads of width H, G = N / K,
E_q = N H = D / C_1 and E_k = K H = D / C_2:

    q0 = x W_q [B, T, N, H]      k0 = x W_k [B, T, K, H]      z = [q0 | k0]  [B, T, N + K, H]              (paper §3)
    z' = conv_{t1}(conv_{t0}(z))         causal; conv_{t0} per channel, conv_{t1} mixes the H channels of each head
    m_q[n] = (q0[n] + k0[n // G]) / 2    m_k[g] = mean of m_q[n] over the group g
    q = sqrt(H) norm(z'_q + m_q)         k = beta_g sqrt(H) norm(z'_k + m_k)          norm: to length 1, per head
    v_t = [x_t W_v1 | x_{t-1} W_v2]      halves of the flat latent, x_{-1} = 0
    y = softmax(q kᵀ / sqrt(H)) v W_O,   after RoPE on q and k

K = N is CCA, K < N CCGQA (grouped heads inside the latent). Before its first token a sequence is padded with zeros once,
t0 + t1 - 2 of them before both convolutions; the second one therefore reads the first one's bias there. Every other path
starts from zero as well, so a document packed behind another is treated as one of its own (`segment_ids`, or a mask
`Segments`).

Costs: 2 E_k numbers of cache per token instead of 2 D, and a constant (N + K) H (t0 + t1 - 2) + E_k / 2 for the
convolutions and the shift; all of attention shrinks by C_1, the projections by C_1 and C_2.

Equations follow the authors' model ZAYA1 (Zyphra/transformers) and its port in transformers. There beta starts at 0, which
makes attention uniform and stops the gradient of q and k until beta has moved; here it starts at 1 (`temp_init`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import variance_scaling
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnzoo.core.attention import attention
from attnzoo.core.cache import LayerCache, append, cached_attention
from attnzoo.core.masks import Segments
from attnzoo.core.positions import PositionPlan, Positions
from attnzoo.errors import unknown
from attnzoo.nn.linear import dropout_arguments, head_counts, named
from attnzoo.nn.mixer import both, document_ids, on_grid, unbroken_runs
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

TEMP_MODES = ("linear", "exp")
_EPS = float(jnp.finfo(jnp.float32).eps)

Convolution = tuple[Float[Array, "t ..."], Float[Array, "N+K H"]]
"""(kernel, bias); the kernel's entry i is for the token t - 1 - i steps back."""


def qk_mean(q0: Float[Array, "*B N H"], k0: Float[Array, "*B K H"]) -> tuple[Float[Array, "*B N H"], Float[Array, "*B K H"]]:
    """(m_q, m_k): every query head with its key head halved, and the mean of that over each group of query heads."""
    *lead, heads, width = q0.shape
    kv_heads = k0.shape[-2]
    mean_q = (q0 + jnp.repeat(k0, heads // kv_heads, axis=-2)) / 2
    return mean_q, mean_q.reshape(*lead, kv_heads, heads // kv_heads, width).mean(-2)


def _taps(x: Array, size: int) -> list[Array]:
    """The `size` windows of x [B, T, ...] that a convolution without padding sees, the oldest token first."""
    return [x[:, i : x.shape[1] - size + 1 + i] for i in range(size)]


def cca_conv(
    z: Float[Array, "B T N+K H"],
    depthwise: Convolution,
    grouped: Convolution,
    *,
    window: Float[Array, "B P N+K H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N+K H"]:
    """Two causal convolutions over tokens without an activation between them.

    depthwise: kernel [t0, N+K, H], one weight per channel and step. grouped: kernel [t1, N+K, H, H] (in, out), per head.
    window: the P = t0 + t1 - 2 tokens before z; zeros by default, as at the start of a sequence.
    segment_ids: where the id changes, a sequence starts and sees nothing of what lies before.
    """
    (w, b), (u, c) = (tuple(x.astype(z.dtype) for x in pair) for pair in (depthwise, grouped))
    before = len(w) + len(u) - 2
    if window is None:
        window = jnp.zeros((z.shape[0], before, *z.shape[2:]), z.dtype)
    z = jnp.concatenate([window.astype(z.dtype), z], axis=1)
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (before, 0)), mode="edge")

    def here(taps: list[Array], at: Array | None, otherwise: Array | float) -> list[Array]:
        """What each window shows to the newest token's sequence."""
        if at is None:
            return taps
        of = _taps(at, len(taps))
        return [jnp.where((i == of[-1])[..., None, None], tap, otherwise) for tap, i in zip(taps, of, strict=True)]

    y = b + sum(w[i] * tap for i, tap in enumerate(here(_taps(z, len(w)), ids, 0.0)))
    late = None if ids is None else ids[:, len(w) - 1 :]
    # Before a sequence starts, the first convolution's output is its bias.
    taps = here(_taps(y, len(u)), late, b)
    return c + sum(jnp.einsum("btgh,ghe->btge", tap, u[i]) for i, tap in enumerate(taps))


def value_shift(
    v: Float[Array, "B T K H"],
    delayed: Float[Array, "B E"] | None = None,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T K H"]:
    """The second half of the flat latent K·H is that of the token before: of the last K/2 heads, for even K.

    delayed: that half of the token before v, E = K·H / 2; zeros by default. segment_ids: as in `cca_conv`.
    """
    flat = v.reshape(*v.shape[:2], -1)
    now, late = jnp.split(flat, 2, axis=-1)
    first = jnp.zeros_like(late[:, 0]) if delayed is None else delayed.astype(v.dtype)
    earlier = jnp.concatenate([first[:, None], late[:, :-1]], axis=1)
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        earlier = jnp.where(starts[..., None], 0, earlier)
    return jnp.concatenate([now, earlier], axis=-1).reshape(v.shape)


def _to_length(x: Float[Array, "*B H"], length: float | Array) -> Float[Array, "*B H"]:
    """x scaled to the given length, statistics in float32; a vector of zeros stays one and gets no NaN as its gradient."""
    f32 = x.astype(jnp.float32)
    square = jnp.maximum((f32 * f32).sum(-1, keepdims=True), _EPS**2)
    return (f32 * jax.lax.rsqrt(square) * length).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CCACache:
    """What one layer remembers: keys (convolved, normalised, rotated) and values of all tokens, and of the last ones what
    the convolutions and the shift still need.

    window: z of the last t0 + t1 - 2 tokens. delayed: x W_v2 of the last token, E = K·H / 2, or 0 without the shift.
    """

    kv: LayerCache
    window: Float[Array, "B P N+K H"]
    delayed: Float[Array, "B E"]


class CompressedConvAttention(GroupedQueryAttention):
    """Attention in a compressed latent; x [B, T, D] -> [B, T, D].

    dim, num_heads: D and N, the heads of the latent.
    num_kv_heads: K; N by default (CCA), fewer for CCGQA.
    compression: C_1 = D / (N H). head_dim: H, given instead of it.
    kernels: (t0, t1), tokens that the two convolutions see.
    use_conv, use_mean, use_shift: the three parts, to be left out one by one (without the mean, z' alone is normalised).
    temp_init, temp_mode: k is multiplied by beta ("linear", beta starts at 1) or by exp(beta) ("exp", at 0).
    Further arguments as in `GroupedQueryAttention`; projections have no bias, so that padding with zeros is exact.

    Raises ValueError for head counts or a compression that do not divide, an odd K·H, kernels below 1 and unknown modes.
    """

    crosses = False
    packs = False  # the convolutions and the shift know of documents by segment_ids alone

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        compression: int = 2,
        head_dim: int | None = None,
        kernels: tuple[int, int] = (2, 2),
        use_conv: bool = True,
        use_mean: bool = True,
        use_shift: bool = True,
        temp_init: float | None = None,
        temp_mode: str = "linear",
        causal: bool = False,
        positions: Positions | PositionPlan | None = None,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if temp_mode not in TEMP_MODES:
            raise unknown("temp_mode", temp_mode, TEMP_MODES)
        kv_heads, width = head_counts(dim, num_heads, num_kv_heads, head_dim)
        if head_dim is None:
            if compression < 1 or width % compression:
                raise ValueError(
                    f"compression: {num_heads} heads of dim={dim} are {width} wide, which {compression} does not divide; "
                    "choose a divisor, or give head_dim"
                )
            width //= compression
        if not isinstance(kernels, tuple | list) or len(kernels) != 2 or min(kernels) < 1:
            raise ValueError(f"kernels: (t0, t1), two convolutions of at least one token each, got {kernels}")
        if use_shift and kv_heads * width % 2:
            raise ValueError(
                f"num_kv_heads, head_dim: half of the value latent is shifted, so K·H must be even, got {kv_heads}·{width}"
            )
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        options = {"causal": causal, "positions": positions, "dropout_rate": dropout_rate, "backend": backend, **dtypes}
        super().__init__(dim, num_heads, num_kv_heads=kv_heads, head_dim=width, rngs=rngs, **options)
        heads = num_heads + kv_heads
        self.kernels = tuple(kernels) if use_conv else (1, 1)
        self.delayed_width = kv_heads * width // 2 if use_shift else 0
        self.use_conv, self.use_mean, self.use_shift, self.temp_mode = use_conv, use_mean, use_shift, temp_mode
        if use_conv:
            # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), where a channel reads t0 and then t1·H numbers.
            t0, t1 = kernels
            per_channel = variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=(1, 2))
            per_head = variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 2), out_axis=3, batch_axis=1)
            depthwise = per_channel(rngs.params(), (t0, heads, width), param_dtype)
            grouped = per_head(rngs.params(), (t1, heads, width, width), param_dtype)
            self.depthwise = nnx.Param(depthwise, **named(None, "heads", "head_dim"))
            self.depthwise_bias = nnx.Param(jnp.zeros((heads, width), param_dtype), **named("heads", "head_dim"))
            self.grouped = nnx.Param(grouped, **named(None, "heads", "head_dim", None))
            self.grouped_bias = nnx.Param(jnp.zeros((heads, width), param_dtype), **named("heads", "head_dim"))
        start = float(temp_mode == "linear") if temp_init is None else temp_init
        self.beta = nnx.Param(jnp.full(kv_heads, start, param_dtype), **named("kv_heads"))

    def _latent(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N+K H"], Float[Array, "B T K H"]]:
        """z, and values of which nothing is shifted yet."""
        return jnp.concatenate([self.qkv.query(x), self.qkv.key(x)], axis=-2), self.qkv.value(x)

    def _heads(
        self, z: Array, v: Array, window: Any = None, delayed: Any = None, segment_ids: Any = None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """q and k, position not yet applied, and v."""
        heads = self.qkv.num_heads
        q0, k0 = z[..., :heads, :], z[..., heads:, :]
        if self.use_conv:
            depthwise = self.depthwise[...], self.depthwise_bias[...]
            z = cca_conv(z, depthwise, (self.grouped[...], self.grouped_bias[...]), window=window, segment_ids=segment_ids)
        q, k = z[..., :heads, :], z[..., heads:, :]
        if self.use_mean:
            mean_q, mean_k = qk_mean(q0, k0)
            q, k = q + mean_q, k + mean_k
        beta = self.beta[...].astype(jnp.float32)[:, None]
        beta = jnp.exp(beta) if self.temp_mode == "exp" else beta
        root = math.sqrt(self.qkv.head_dim)
        v = value_shift(v, delayed, segment_ids=segment_ids) if self.use_shift else v
        return _to_length(q, root), _to_length(k, root * beta), v

    def __call__(  # type: ignore[override]
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """segment_ids: documents packed in one row, each an unbroken run of one id. They do not see each other, neither by
        attention nor by the convolutions and the shift. Ids of a mask `Segments`, alone or joined to others by &, count
        likewise; with several, a document starts where any of them changes.

        All other masks are attention's alone: convolutions and shift read the few tokens before, hidden or not. That does not
        matter for padding on the right; padding on the left has to be a document of its own, or zeros."""
        if segment_ids is not None and segment_ids.shape != x.shape[:2]:
            raise ValueError(f"segment_ids: one per token of x {x.shape} is needed: {x.shape[:2]}, got {segment_ids.shape}")
        return self.out(self._attend(x, mask, positions, None, segment_ids, **dropout_arguments(self.dropout)))

    def _attend(self, x: Array, mask: Any, positions: Any, memory: Any, segment_ids: Any = None, **options: Any) -> Any:
        if memory is not None:
            raise ValueError("memory: queries and keys share their convolution and mean, so they come from one sequence")
        ids = document_ids(mask) + ([] if segment_ids is None else [segment_ids])
        q, k, v = self._heads(*self._latent(x), segment_ids=unbroken_runs(ids, *x.shape[:2]))
        tokens = jnp.arange(x.shape[1]) if positions is None else positions
        sequence = None if on_grid(self.positions) else positions
        return attention(
            self._rotate(q, tokens),
            self._rotate(k, tokens),
            v,
            mask=self._mask(mask if segment_ids is None else both(Segments(segment_ids), mask)),
            q_positions=sequence,
            kv_positions=sequence,
            **self.attention_arguments(),
            **options,
        )

    def init_cache(  # type: ignore[override]
        self, batch: int, length: int, *, dtype: DTypeLike | None = None
    ) -> CCACache:
        """Room for `length` tokens."""
        kv = super().init_cache(batch, length, dtype=dtype)
        kind = dtype or self.cache_dtype
        heads, width = self.qkv.num_heads + self.qkv.num_kv_heads, self.qkv.head_dim
        window = jnp.zeros((batch, sum(self.kernels) - 2, heads, width), kind)
        return CCACache(kv, window, jnp.zeros((batch, self.delayed_width), kind))

    def prefill(  # type: ignore[override]
        self,
        x: Float[Array, "B T D"],
        cache: CCACache,
        *,
        mask: Any = None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], CCACache]:
        """The tokens x after those in the cache, of one document per row. Raises ValueError for a mask `Segments`."""
        if document_ids(mask):
            raise ValueError("mask: the cache holds a window of one document for the convolutions; decode without Segments")
        positions = cache.kv.next_positions(x.shape[1])
        z, v = self._latent(x)
        q, k, shifted = self._heads(z, v, cache.window, cache.delayed)
        kv = append(cache.kv, {"k": self._rotate(k, positions), "v": shifted}, lengths)
        flat = v.reshape(*v.shape[:2], -1)
        late = flat[..., flat.shape[-1] - self.delayed_width :]
        real = jnp.full(len(x), x.shape[1]) if lengths is None else lengths

        def last(old: Array, new: Array) -> Array:
            """The newest tokens, as many as `old` [B, P, ...] holds, counted back from each row's last real one."""
            joined = jnp.concatenate([old, new.astype(old.dtype)], axis=1)
            at = real[:, None] + jnp.arange(old.shape[1])
            return joined[jnp.arange(len(x))[:, None], at]

        delayed = last(cache.delayed[:, None], late)[:, 0]
        o = cached_attention(
            self._rotate(q, positions), kv, q_positions=positions, mask=self._mask(mask), **self.attention_arguments()
        )
        return self.out(o), CCACache(kv, last(cache.window, z), delayed)


class CCGQA(CompressedConvAttention):
    """K < N: heads are grouped inside the latent. num_kv_heads: K, a quarter of N by default (as in ZAYA1-8B).

    Raises ValueError when K is not a proper divisor of N.
    """

    def __init__(self, dim: int, num_heads: int, *, num_kv_heads: int | None = None, **options: Any):
        kv_heads = max(num_heads // 4, 1) if num_kv_heads is None else num_kv_heads
        if kv_heads >= num_heads:
            raise ValueError(f"num_kv_heads: grouped heads need fewer than num_heads={num_heads}, got {kv_heads}")
        super().__init__(dim, num_heads, num_kv_heads=kv_heads, **options)


def cca_flops(
    queries: int,
    keys: int,
    *,
    dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kernels: tuple[int, int] = (2, 2),
) -> int:
    """Floating-point operations of one layer on one row, two per multiply-add: projections, convolutions, scores, values."""
    latent_q, latent_k = num_heads * head_dim, num_kv_heads * head_dim
    per_token = dim * (2 * latent_q + 2 * latent_k) + (latent_q + latent_k) * (kernels[0] + kernels[1] * head_dim)
    return 2 * (queries * per_token + 2 * queries * keys * latent_q)


def cca_cache_bytes(
    length: int,
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kernels: tuple[int, int] = (2, 2),
    batch: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
) -> int:
    """Bytes of a whole model's caches: keys, values, and the constant for convolutions and shift."""
    constant = (num_heads + num_kv_heads) * head_dim * (sum(kernels) - 2) + num_kv_heads * head_dim // 2
    numbers = 2 * length * num_kv_heads * head_dim + constant
    return batch * num_layers * numbers * jnp.dtype(dtype).itemsize


def _picture(axes: Any) -> None:
    """Which tokens make up the key and the value of a token."""
    back = np.arange(8)[:, None] - np.arange(8)
    axes.imshow(np.where(back < 0, 0, np.where(back < 2, 2, np.where(back < 3, 1, 0))), cmap="Blues", vmax=3)
    axes.set(xlabel="token s", ylabel="token t", title="what makes up token t: its key (3 wide) and value (2 wide)")
    for t in range(8):
        for s in range(max(t - 2, 0), t + 1):
            axes.text(s, t, "k, v" if t - s < 2 else "k", ha="center", va="center")


PAPER = Paper(
    131,
    "cca",
    "Compressed Convolutional Attention: Efficient Attention in a Compressed Latent Space",
    "projections",
    builds=(CompressedConvAttention, CCGQA, CCACache, qk_mean, value_shift, cca_conv, cca_flops, cca_cache_bytes),
    mixer=CompressedConvAttention,
    picture=_picture,
    costs={
        "cache numbers per token": "2 * K * H",
        "cache numbers besides": "(N + K) * H * (t0 + t1 - 2) + K * H / 2",
        "parameters": "2 * D * (N + K) * H + (N + K) * H * (t0 + 1) + (N + K) * H * (t1 * H + 1) + K",
        "multiply-adds": "T * (2 * D * (N + K) * H + (N + K) * H * (t0 + t1 * H)) + 2 * T * S * N * H",
    },
    code="Zyphra/transformers, transformers",
    parity="ZayaAttention of transformers 5.24 with half of each head rotated: outputs, gradients, cached decoding, to 1e-5",
    notes=(
        "beta starts at 1 rather than 0 (see above). The norm is taken in float32 in every dtype. H is the width of a head "
        "of the latent: costs with the default of attnzoo.costs, H = D / N, are those of C_1 = 1, so give --head-dim. "
        "segment_ids, which the released code lacks, keep packed documents apart."
    ),
)
