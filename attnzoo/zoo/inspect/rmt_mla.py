"""A Random Matrix Theory Perspective on the Learning Dynamics of Multi-head Latent Attention (Jha & Reagen, 2025).

arXiv 2507.09394, HiLD workshop at ICML 2025.

The spectrum of a layer's query-key matrix against the Marchenko-Pastur (MP) law that a random matrix would follow. Eigenvalues
above the edge of the bulk are spikes, directions that have been learned; few active directions with much energy in spikes are
rank collapse. Watched in multi-head attention and in two forms of latent attention while they train.

An n×p matrix X of independent entries of variance sigma², q = p / n <= 1, has Gram eigenvalues (of Xᵀ X / n) in [lam_-, lam_+]:

    lam_± = sigma² (1 ± sqrt q)²,   rho(l) = sqrt((lam_+ - l)(l - lam_-)) / (2 pi q sigma² l)

Spectra of a layer, with W_Q, W_K [D, N·H] the effective maps of tokens to queries and keys (the products, where a map is
factored: W_DK W_UK for latent attention):

    "product": squared singular values of W_Q W_Kᵀ [D, D], those that can differ from 0, scaled to mean 1   (the paper's matrix)
    "query", "key": eigenvalues of Wᵀ W / D, or of W Wᵀ / (N·H), whichever is smaller

With an edge E and eigenvalues lam: outliers n_out = #{lam > E}, their energy Σ_{lam > E} lam / Σ lam, gap lam_max / E, MP soft
rank min(E / lam_max, 1), stable rank Σ lam / lam_max, participation (Σ lam)² / Σ lam², effective rank exp(entropy(lam / Σ)).

The product of two random matrices is not MP, its edge lies further out: `null_edge` calibrates it on products of the same
matrices with their entries shuffled. The variance of the MP edge is that of the bulk, for spikes inflate the mean of all.

Variants: multi-head attention; `MLAPreRoPE`, whose queries and keys are rotated per head and then projected down to H / 2;
`MLADecoupled`, a latent without positions and one shared rotary key (`attnzoo.nn.mla`). An SVD of a layer is O(D³) per probe.

Definitions of the diagnostics are standard or weightwatcher's; the scaling, the calibrated edge and the wiring of MLAPreRoPE
are ours, for the paper leaves them open.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float64, Int

from attnzoo.core.positions import PositionPlan, Positions, positions_for
from attnzoo.core.spectra import (
    Diagnostics,
    Spectrum,
    bulk_variance,
    gram_spectrum,
    mp_density,
    mp_diagnostics,
    mp_edges,
)
from attnzoo.errors import unknown
from attnzoo.nn.latent import LatentAttention, LowRank
from attnzoo.nn.linear import QKV, head_counts, merge_heads, named
from attnzoo.nn.mixer import Mixer
from attnzoo.nn.mla import MultiHeadLatentAttention
from attnzoo.nn.stack import Stack
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

KINDS = ("product", "query", "key")
PARTS = ("content", "rope")
EDGES = ("mp", "null")


def qk_gram_spectrum(w_q: Float[np.ndarray, "D A"], w_k: Float[np.ndarray, "D A"], kind: str = "product") -> Spectrum:
    """The spectrum of a layer: of W_Q W_Kᵀ, or of one of the two ("query", "key").

    Raises ValueError for an unknown kind, and for matrices of different shapes.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    w_q, w_k = np.asarray(w_q, np.float64), np.asarray(w_k, np.float64)
    if w_q.ndim != 2 or w_q.shape != w_k.shape:
        raise ValueError(f"w_q, w_k: two matrices [D, N·H] of one shape are needed, got {w_q.shape} and {w_k.shape}")
    if kind != "product":
        return gram_spectrum(w_q if kind == "query" else w_k)
    small, large = sorted(w_q.shape)
    lam = np.linalg.svd(w_q @ w_k.T, compute_uv=False)[:small] ** 2
    mean = lam.mean()
    return Spectrum(lam / mean if mean > 0 else lam, small / large)


@dataclass(frozen=True)
class QKFactors:
    """How a layer's W_Q and W_K come about: chains of weights, to be multiplied in order.

    query, key: (W [D, N, H],), or (W [D, N, H], U [N, H, h]), or (down [D, r], up [r, N, H]). Keys may have fewer heads,
    which are then shared by consecutive query heads.
    """

    query: tuple[np.ndarray, ...]
    key: tuple[np.ndarray, ...]

    def combined(self) -> tuple[Float64[np.ndarray, "D A"], Float64[np.ndarray, "D A"]]:
        """The effective (W_Q, W_K), [D, N·H] each."""
        w_q, w_k = _product(self.query), _product(self.key)
        w_k = np.repeat(w_k, w_q.shape[1] // w_k.shape[1], axis=1)
        return w_q.reshape(len(w_q), -1), w_k.reshape(len(w_k), -1)

    def shuffled(self, rng: np.random.Generator) -> "QKFactors":
        """The same with the entries of every weight in random order: no structure but that of the chain."""
        shuffle = lambda chain: tuple(rng.permutation(w.reshape(-1)).reshape(w.shape) for w in chain)  # noqa: E731
        return QKFactors(shuffle(self.query), shuffle(self.key))


def _product(chain: tuple[np.ndarray, ...]) -> np.ndarray:
    first, *rest = (np.asarray(w, np.float64) for w in chain)
    for w in rest:
        first = np.einsum("dr,rnh->dnh", first, w) if first.ndim == 2 else np.einsum("dnh,nhc->dnc", first, w)
    return first


def null_edge(factors: QKFactors, *, samples: int = 20, quantile: float = 0.995, seed: int = 0) -> float:
    """The quantile of the top eigenvalue of "product" spectra of shuffled weights: the edge that chance reaches.

    A high quantile of few samples is in effect their maximum, which is noisy: for random 64 × 64 matrices 20 samples give an
    edge that scatters by 4 % from seed to seed and lies 4 % below that of 400. More samples cost an SVD each.
    Raises ValueError for fewer than one sample, and a quantile outside [0, 1].
    """
    if samples < 1 or not 0 <= quantile <= 1:
        raise ValueError(f"samples, quantile: at least 1, and in [0, 1], got {samples} and {quantile}")
    rng = np.random.default_rng(seed)
    tops = [qk_gram_spectrum(*factors.shuffled(rng).combined()).lam[0] for _ in range(samples)]
    return float(np.quantile(tops, quantile))


class MLAPreRoPE(LatentAttention):
    """Queries and keys rotated per head, then projected down per head to half their width; x [B, T, D] -> [B, T, D].

        q_n = RoPE(x W_Q^n) U_q^n [B, T, N, h],  k_n = RoPE(x W_K^n) U_k^n,  h = H / 2;  softmax(q_n k_nᵀ / sqrt(h)) v_n

    The cache holds N·h numbers of keys and N·H of values. Arguments as in `GroupedQueryAttention`.
    Raises ValueError for heads that do not divide, and an odd H.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        positions: Positions | PositionPlan | None = None,
        head_dim: int | None = None,
        dropout_rate: float = 0.0,
        backend: str = "auto",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        _, width = head_counts(dim, num_heads, None, head_dim)
        if width % 2:
            raise ValueError(f"head_dim: is halved, so an even number is needed, got {width}")
        made = positions_for(positions, num_heads, width, rngs=rngs)
        super().__init__(causal=causal, positions=made, dropout_rate=dropout_rate, backend=backend, **options)
        self.qkv = QKV(dim, num_heads, head_dim=width, **options)

        def down() -> nnx.Param:
            draw = width**-0.5 * nnx.initializers.normal(1.0)(rngs.params(), (num_heads, width, width // 2), param_dtype)
            return nnx.Param(draw, **named("heads", "head_dim", None))

        self.query_down, self.key_down = down(), down()
        self.out = merge_heads(num_heads, width, dim, **options)

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> Float[Array, "B T N h"]:
        q = self.rotate(self.qkv.query(x), positions)
        return jnp.einsum("btnh,nhc->btnc", q, self.query_down[...].astype(q.dtype))

    def latents(self, x: Float[Array, "B T D"], positions: Int[Array, "..."]) -> dict[str, Float[Array, "B T N ..."]]:
        k = self.rotate(self.qkv.key(x), positions)
        return {"k": jnp.einsum("btnh,nhc->btnc", k, self.key_down[...].astype(k.dtype)), "v": self.qkv.value(x)}

    def cache_spec(self) -> dict[str, tuple[int, int]]:
        heads, width = self.qkv.num_heads, self.qkv.head_dim
        return {"k": (heads, width // 2), "v": (heads, width)}

    def expand(
        self, latents: dict[str, Float[Array, "B S N ..."]], positions: Int[Array, "..."]
    ) -> tuple[Float[Array, "B S N h"], Float[Array, "B S N H"]]:
        return latents["k"], latents["v"]


class MLADecoupled(MultiHeadLatentAttention):
    """`MultiHeadLatentAttention`, by the name the paper gives it: content without positions, one shared rotary key."""


def qk_factors(mixer: Mixer, part: str = "content") -> QKFactors:
    """The weights behind a mixer's logits: of attention, grouped or latent.

    part: "content", or "rope" for the shared rotary key of `MultiHeadLatentAttention`. The gains of its norms count as
    weights; what the norms divide by depends on the token and is left out. Subclasses of `GroupedQueryAttention` are read
    where they take queries and keys as it does (`_attend`); what they do to scores and weights does not count.
    Raises TypeError for mixers whose logits are not of this kind, ValueError for a part that they do not have.
    """
    if part not in PARTS:
        raise unknown("part", part, PARTS)
    if isinstance(mixer, MultiHeadLatentAttention):
        return _latent_factors(mixer, part)
    if part == "rope":
        raise ValueError(f"part: only MultiHeadLatentAttention has a rotary part of its own, got {type(mixer).__name__}")
    if isinstance(mixer, MLAPreRoPE):
        w_q, w_k = _weights(mixer.qkv.query.kernel), _weights(mixer.qkv.key.kernel)
        return QKFactors((w_q, _weights(mixer.query_down)), (w_k, _weights(mixer.key_down)))
    if isinstance(mixer, GroupedQueryAttention) and type(mixer)._attend is GroupedQueryAttention._attend:
        return QKFactors((_weights(mixer.qkv.query.kernel),), (_weights(mixer.qkv.key.kernel),))
    raise TypeError(
        "mixer: MultiHeadLatentAttention, MLAPreRoPE or GroupedQueryAttention is needed, or a subclass that makes queries and "
        f"keys as it does, got {type(mixer).__name__}"
    )


def _weights(p: Any) -> np.ndarray:
    return np.asarray(p[...], np.float64)


def _latent_factors(mixer: MultiHeadLatentAttention, part: str) -> QKFactors:
    down, r = _weights(mixer.down.kernel), mixer.latent_dim
    at = slice(mixer.head_dim) if part == "content" else slice(mixer.head_dim, None)
    if isinstance(mixer.query, LowRank):
        gain = 1.0 if mixer.query.norm is None else _weights(mixer.query.norm.scale)
        query: tuple[np.ndarray, ...] = (_weights(mixer.query.down.kernel) * gain, _weights(mixer.query.up.kernel)[..., at])
    else:
        query = (_weights(mixer.query.kernel)[..., at],)
    if part == "rope":
        if not mixer.rope_dim:
            raise ValueError("part: this mixer has no rotary part (rope_dim=0)")
        return QKFactors(query, (down[:, None, r:],))
    gain = 1.0 if mixer.norm is None else _weights(mixer.norm.scale)
    return QKFactors(query, (down[:, :r] * gain, _weights(mixer.key_up.kernel)))


@dataclass
class SpectralProbe:
    """Called with (step, model) while training; every so many steps logs the diagnostics of every layer.

    every: steps between probes. kind: as in `qk_gram_spectrum`. edge: "null" (calibrated, of kind "product") or "mp".
    part: of the logits, as in `qk_factors`. Where logits have two, as in `MLADecoupled`, a probe reads one of them: the
        content by default, which leaves out what the shared rotary key adds.
    log: one row per layer and probe, {"step", "layer", and the fields of `Diagnostics`}.
    Raises ValueError for unknown names, an edge that the kind does not have, and scanned layers, which it cannot read; and
    TypeError for a model without layers of attention.
    """

    every: int = 50
    kind: str = "product"
    edge: str = "null"
    part: str = "content"
    log: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every: steps between probes, at least 1, got {self.every}")
        if self.kind not in KINDS:
            raise unknown("kind", self.kind, KINDS)
        if self.part not in PARTS:
            raise unknown("part", self.part, PARTS)
        if self.edge not in EDGES:
            raise unknown("edge", self.edge, EDGES)
        if self.edge == "null" and self.kind != "product":
            raise ValueError(f"edge: 'null' is calibrated for kind='product', got kind={self.kind!r}; use edge='mp'")

    def __call__(self, step: int, model: nnx.Module) -> None:
        if step % self.every:
            return
        for layer, mixer in enumerate(self.mixers(model)):
            factors = qk_factors(mixer, self.part)
            lam, q = qk_gram_spectrum(*factors.combined(), self.kind)
            edge = null_edge(factors) if self.edge == "null" else None
            self.log.append({"step": step, "layer": layer, **asdict(mp_diagnostics(lam, q, edge=edge))})

    def mixers(self, model: Any) -> Iterator[Mixer]:
        """The mixers of a model of `attnzoo.models`, first layer first."""
        layers = getattr(model, "layers", None)
        if not isinstance(layers, Stack):
            raise TypeError(f"model: one with a Stack of layers is needed, as DecoderLM has, got {type(model).__name__}")
        if any(size > 1 for size in layers.sizes):
            raise ValueError("model: its layers are scanned, several in one; build it with scan_layers=False")
        for layer in layers.runs:
            yield layer.mixer

    def mean(self, name: str) -> dict[int, float]:
        """Step -> the mean over layers of one diagnostic."""
        steps = dict.fromkeys(row["step"] for row in self.log)
        return {step: float(np.mean([row[name] for row in self.log if row["step"] == step])) for step in steps}


def _picture(axes: Any) -> None:
    """A random matrix with three planted directions against the Marchenko-Pastur law."""
    rng = np.random.default_rng(1)
    n, p = 1024, 256
    x = rng.normal(size=(n, p))
    for theta in (1.2, 1.6, 2.0):
        u, v = (y / np.linalg.norm(y) for y in (rng.normal(size=n), rng.normal(size=p)))
        x = x + n**0.5 * theta * np.outer(u, v)
    spectrum = gram_spectrum(x)
    mp_diagnostics(*spectrum).plot(axes, spectrum)
    l = np.linspace(*mp_edges(spectrum.q), 200)
    axes.plot(l, mp_density(l, spectrum.q), color="black", label="Marchenko-Pastur")
    axes.set(title="Noise, and three directions that are not")
    axes.legend(frameon=False)


PAPER = Paper(
    109,
    "rmt_mla",
    "A Random Matrix Theory Perspective on the Learning Dynamics of Multi-head Latent Attention",
    "inspect",
    builds=(
        mp_edges,
        mp_density,
        qk_gram_spectrum,
        gram_spectrum,
        mp_diagnostics,
        Diagnostics,
        bulk_variance,
        QKFactors,
        qk_factors,
        null_edge,
        MLAPreRoPE,
        MLADecoupled,
        SpectralProbe,
    ),
    mixer=MLAPreRoPE,
    picture=_picture,
    costs={
        "cache numbers per token": "N * H / 2 + N * H",
        "parameters": "4 * D * N * H + N * H * H",
        "cache numbers per token, MLADecoupled": "r + P",
        "multiply-adds of a probe, about": "D ** 3",
    },
    code="weightwatcher",
    parity="weightwatcher's formulas of the MP soft rank and the stable rank, to 1e-10",
    notes=(
        "The paper leaves the scaling of its spectra and the wiring of MLA-PreRoPE open; ours are stated above. On products "
        "the MP edge reports spikes at initialisation, so probes use an edge calibrated on shuffled weights. For factored maps "
        "the factors are shuffled, not their product, whose spectrum is of another kind."
    ),
)
