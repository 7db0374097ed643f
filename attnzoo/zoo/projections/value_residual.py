"""Value Residual Learning (Zhou et al., 2024, ACL 2025, arXiv 2410.17897): ResFormer and SVFormer.

Deep layers of a Transformer put most attention on few tokens. Giving every layer the values of the first one beside its
own counters that, at no cost; it approximates attention to the first layer's tokens as well as to its own. With layers
l = 1..L, V_l = X_{l-1} W_V^l [B, T, K, H] the raw projection (no position, before heads are repeated), and
A_l = softmax(Q_l K_lᵀ / sqrt(H)):

    ResFormer:  V'_l = lam1_l V_1 + lam2_l V_l  for l >= 2,  V'_1 = V_1;     U_l = A_l V'_l             (paper §3.2)
    SVFormer:   V'_l = V_1                                                                              (§3.4)
    NeuTRENO:   U_l = A_l V_l + lam (V_1 - V_l),  lam = 0.4                    (Nguyen et al., 2023, the baseline)

so U_l = lam1 A_l V_1 + lam2 A_l V_l: two layers' values under one attention map. The modes of ResFormer differ in the
coefficients and in the layers that mix; gradients flow into V_1 from all of them.

Costs: T K H multiply-adds per layer. A ResFormer caches V'_l, so decoding needs V_1 of the current token alone and the
cache stays 2 K H numbers per token and layer. SVFormer has no W_V after the first layer, (L - 1) D K H parameters less,
and keeps one V for all layers: (L + 1) K H numbers per token instead of 2 L K H.

Constant coefficients, SVFormer, NeuTRENO and the entropy follow the authors' code; "unet" and "gated" are forms used by
others (modded-nanogpt, x-transformers).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnzoo.core.attention import attention
from attnzoo.core.cache import LayerCache, append, cached_attention, init_cache
from attnzoo.core.masks import Causal
from attnzoo.core.positions import PositionPlan, Positions, positions_for
from attnzoo.errors import unknown
from attnzoo.nn.linear import QKV, dropout, dropout_arguments, linear, merge_heads, named
from attnzoo.nn.mixer import Mixer, on_grid, with_own
from attnzoo.paper import Paper

MODES = ("identity", "constant", "learnable", "sparse", "unet", "gated", "svformer", "neutreno")
WEIGHTED = ("constant", "learnable", "sparse", "unet")

Carry = tuple[Float[Array, "B T K H"], ...]
"""Raw values of earlier layers, those that later layers want."""


def value_residual_mix(
    v: Float[Array, "*B K H"],
    v_first: Float[Array, "*B K H"],
    lam1: float | Float[Array, ""] = 0.5,
    lam2: float | Float[Array, ""] = 0.5,
) -> Float[Array, "*B K H"]:
    """V' = lam1 V_1 + lam2 V_l, of raw values before heads are repeated."""
    return lam1 * v_first + lam2 * v


def neutreno(
    u: Float[Array, "*B N H"], v: Float[Array, "*B K H"], v_first: Float[Array, "*B K H"], lam: float = 0.4
) -> Float[Array, "*B N H"]:
    """U_l + lam (V_1 - V_l), on the output of attention; the difference is repeated over each group of query heads."""
    return u + lam * jnp.repeat(v_first - v, u.shape[-2] // v.shape[-2], axis=-2)


class ValueResidualAttention(Mixer):
    """Causal or bidirectional self-attention with the first layer's values; (x [B, T, D], carry) -> (y [B, T, D], carry).

    layer, num_layers: l - 1 and L. The first layer is plain attention and hands on its values.
    mode: how V_1 enters layers l >= 2.
        "constant": lam1 V_1 + lam2 V_l with fixed coefficients. "identity": both 1.
        "learnable": two parameters per layer, starting there.
        "sparse": "constant" in some layers, the others are plain.
        "unet": layer l > (L + 1) / 2 mixes the values of layer L + 1 - l instead of V_1, the first half is plain.
        "gated": m V_l + (1 - m) V_1, with m = sigmoid(x W_m + b) per token and kv head.
        "svformer": V_1 alone; no W_V.  "neutreno": 0.4 (V_1 - V_l) is added to the output.
    lambdas: (lam1, lam2) of "constant", "learnable", "sparse" and "unet"; 0.5 each by default.
    sparse_layers: the layers l that mix in mode "sparse", counted from 1; the last third by default.
    Further arguments as in `GroupedQueryAttention`.

    Raises ValueError for head counts that do not divide, an unknown mode, arguments that the mode does not have, and a
    call without the carry of the layers before.
    """

    carries = True
    layered = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layer: int = 0,
        num_layers: int = 1,
        mode: str = "constant",
        lambdas: tuple[float, float] | None = None,
        sparse_layers: Sequence[int] | None = None,
        causal: bool = False,
        positions: Positions | PositionPlan | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if lambdas is not None and (mode not in WEIGHTED or len(lambdas) != 2):
            raise ValueError(f"lambdas: two numbers, for the modes {', '.join(WEIGHTED)}; got {lambdas} with {mode!r}")
        if sparse_layers is not None and mode != "sparse":
            raise ValueError(f"sparse_layers: only mode 'sparse' chooses its layers, this is {mode!r}")
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer: must be in [0, num_layers={num_layers}), got {layer}")
        options: dict[str, Any] = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.qkv = QKV(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, **options)
        self.out = merge_heads(num_heads, self.qkv.head_dim, dim, **options)
        self.dropout = dropout(dropout_rate, rngs)
        self.causal, self.backend = causal, backend
        self.positions = positions_for(positions, self.qkv.num_kv_heads, self.qkv.head_dim, rngs=rngs)
        self.cache_dtype = dtype or param_dtype
        l, last = layer + 1, num_layers
        self.mode = mode
        # Which of the values handed on this layer mixes in (None: it is plain), and whether it hands on its own.
        self.source: int | None = 0 if l > 1 else None
        self.saves = l == 1
        if mode == "unet":
            opposite = last + 1 - l
            self.source = opposite - 1 if l > opposite else None
            self.saves = l < opposite
        elif mode == "sparse":
            chosen = range(2 * last // 3 + 1, last + 1) if sparse_layers is None else sparse_layers
            if sparse_layers is not None and not set(sparse_layers) <= set(range(2, last + 1)):
                raise ValueError(f"sparse_layers: layers from 2 to {last} can mix, got {tuple(sparse_layers)}")
            self.source = 0 if l > 1 and l in chosen else None
        if self.source is None:
            return
        if mode == "svformer":
            self.qkv.value = nnx.data(None)  # type: ignore[assignment]
        elif mode == "gated":
            self.gate = linear(dim, self.qkv.num_kv_heads, ("embed", "kv_heads"), **{**options, "use_bias": True})
        elif mode != "neutreno":
            pair = (1.0, 1.0) if mode == "identity" else tuple(lambdas or (0.5, 0.5))
            learned = mode == "learnable"
            self.lambdas = nnx.Param(jnp.asarray(pair, jnp.float32), **named(None)) if learned else pair

    def _mask(self, mask: Any) -> Any:
        return with_own(Causal() if self.causal else None, mask)

    def _rotate(self, x: Array, positions: Array) -> Array:
        return x if self.positions is None else self.positions.rotate(x, positions)

    @property
    def _shares(self) -> bool:
        """Whether this layer has no values of its own."""
        return self.mode == "svformer" and self.source is not None

    def _first(self, carry: Any) -> Any:
        """What this layer takes from the carry."""
        if self.source is None:
            return None
        if carry is None or len(carry) <= self.source:
            raise ValueError(
                f"carry: this layer mixes in the values of layer {self.source + 1}; give the carry that the layer before "
                f"returned, got {'None' if carry is None else f'{len(carry)} values'}"
            )
        return carry[self.source]

    def _mix(self, x: Array, v: Array, first: Any) -> Array:
        """V'_l of layers with values of their own."""
        if first is None or self.mode == "neutreno":
            return v
        if self.mode == "gated":
            m = jax.nn.sigmoid(self.gate(x))[..., None]
            return m * v + (1 - m) * first
        lam1, lam2 = self.lambdas if isinstance(self.lambdas, tuple) else self.lambdas[...].astype(v.dtype)
        return value_residual_mix(v, first, lam1, lam2)

    def _finish(self, u: Array, v: Any, first: Any) -> Array:
        if self.mode == "neutreno" and first is not None:
            u = neutreno(u, v, first)
        return self.out(u)

    def _handed_on(self, carry: Any, v: Any) -> Carry:
        return (*(carry or ()), v) if self.saves else carry or ()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Any = None,
        positions: Int[Array, "..."] | None = None,
        carry: Carry | None = None,
    ) -> tuple[Float[Array, "B T D"], Carry]:
        """carry: what the layer before returned; None at the first."""
        first = self._first(carry)
        q, k = self.qkv.query(x), self.qkv.key(x)
        v = None if self._shares else self.qkv.value(x)
        tokens = jnp.arange(x.shape[1]) if positions is None else positions
        sequence = None if on_grid(self.positions) else positions
        u = attention(
            self._rotate(q, tokens),
            self._rotate(k, tokens),
            first if v is None else self._mix(x, v, first),
            mask=self._mask(mask),
            q_positions=sequence,
            kv_positions=sequence,
            backend=self.backend,
            **dropout_arguments(self.dropout),
        )
        return self._finish(u, v, first), self._handed_on(carry, v)

    def init_cache(self, batch: int, length: int, *, dtype: DTypeLike | None = None) -> LayerCache:
        """Room for `length` tokens: keys and mixed values, or keys alone where the values are the first layer's."""
        if not self.causal:
            raise ValueError("causal: only a mixer built with causal=True can decode")
        one = (self.qkv.num_kv_heads, self.qkv.head_dim)
        spec = {"k": one} if self._shares else {"k": one, "v": one}
        return init_cache(batch, length, spec, dtype=dtype or self.cache_dtype)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        *,
        mask: Any = None,
        lengths: Int[Array, "B"] | None = None,
        carry: Any = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache, Any]:
        """carry: the raw values of these tokens alone; in mode "svformer" the first layer's cached values, which all
        layers read: every layer fills the same slots."""
        first = self._first(carry)
        positions = cache.next_positions(x.shape[1])
        q, k = (self._rotate(f(x), positions) for f in (self.qkv.query, self.qkv.key))
        v = None if self._shares else self.qkv.value(x)
        new = {"k": k} if v is None else {"k": k, "v": self._mix(x, v, first)}
        cache = append(cache, new, lengths)

        def read(payload: Any) -> tuple[Array, Array]:
            return payload["k"], first if v is None else payload["v"]

        u = cached_attention(q, cache, q_positions=positions, mask=self._mask(mask), read=read, backend=self.backend)
        handed = cache.view().payload["v"] if self.mode == "svformer" and self.saves else v
        return self._finish(u, v, first), cache, self._handed_on(carry, handed)


def token_importance_entropy(weights: Float[Array, "*B N T S"]) -> Float[Array, "*B"]:
    """Entropy in nats of how much attention the tokens get; low means that few tokens get most of it (paper §4.4).

    Weights averaged over heads and summed over queries, normalised over the S keys. Identity attention gives log S.
    """
    importance = weights.mean(-3).sum(-2)
    p = importance / importance.sum(-1, keepdims=True)
    return -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(-1)


def svformer_cache_bytes(
    length: int,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    batch: int = 1,
    dtype: DTypeLike = jnp.bfloat16,
) -> int:
    """Bytes of the keys of all layers and of one V: B · S · (L + 1) · K · H · itemsize."""
    return batch * length * (num_layers + 1) * num_kv_heads * head_dim * jnp.dtype(dtype).itemsize


def value_sources(num_layers: int, mode: str, **options: Any) -> Float[np.ndarray, "L L"]:
    """Row l: how much of each layer's own values V_1..V_L is in the values that layer l attends to.

    mode: one with fixed coefficients. options: of `ValueResidualAttention`.
    """
    sources = np.zeros((num_layers, num_layers))
    saved: list[int] = []  # layers whose values are handed on, in order
    for layer in range(num_layers):

        def build(layer: int = layer) -> ValueResidualAttention:
            return ValueResidualAttention(2, 1, layer=layer, num_layers=num_layers, mode=mode, rngs=nnx.Rngs(0), **options)

        mixer = nnx.eval_shape(build)
        own, first = 1.0, 0.0
        if mixer.source is not None:
            first, own = (1.0, 0.0) if mode == "svformer" else mixer.lambdas
            sources[layer, saved[mixer.source]] = first
        sources[layer, layer] = own
        saved += [layer] if mixer.saves else []
    return sources


def draw_sources(ax: Any, num_layers: int = 8) -> None:
    """Draws whose values the layers attend to, for four modes."""
    modes = {"constant": "ResFormer", "sparse": "sparse", "unet": "unet", "svformer": "SVFormer"}
    gap = np.full((num_layers, 1), np.nan)
    panels = [np.hstack([value_sources(num_layers, mode), gap]) for mode in modes]
    image = ax.imshow(np.hstack(panels)[:, :-1], cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    centers = [i * (num_layers + 1) + (num_layers - 1) / 2 for i in range(len(modes))]
    ax.set_xticks(centers, [f"{name}\nV_1 .. V_{num_layers}" for name in modes.values()])
    ax.set_yticks(range(num_layers), range(1, num_layers + 1))
    ax.set(ylabel="layer l", title="share of each layer's values in what layer l attends to")
    ax.figure.colorbar(image, ax=ax)


PAPER = Paper(
    76,
    "value_residual",
    "Value Residual Learning For Alleviating Attention Concentration In Transformers",
    "projections",
    builds=(
        value_residual_mix,
        neutreno,
        ValueResidualAttention,
        token_importance_entropy,
        svformer_cache_bytes,
        value_sources,
        "attnzoo.models.resformer:ResFormerLM",
        "attnzoo.models.resformer:SVFormerLM",
    ),
    mixer=ValueResidualAttention,
    picture=draw_sources,
    costs={
        "cache numbers per token": "2 * K * H",
        "cache numbers per token, all layers": "2 * L * K * H",
        "cache numbers per token, all layers of SVFormer": "(L + 1) * K * H",
        "parameters": "2 * D * N * H + 2 * D * K * H",
        "parameters that SVFormer saves": "(L - 1) * D * K * H",
        "multiply-adds of the mix": "2 * T * K * H",
    },
    code="Zcchill/Value-Residual-Learning, x-transformers",
    notes=(
        "The choice of layers in mode 'sparse' (the last third) and the coefficients of 'unet' (those of 'constant') are "
        "ours. 'gated' is the mix of x-transformers with one gate per kv head. How much is gained depends on the "
        "initialisation: with embeddings of unit variance deep layers know the token anyway (see the claim)."
    ),
)
