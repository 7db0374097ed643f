"""TransMLA: Multi-head Latent Attention Is All You Need (Meng et al., 2025, arXiv 2502.07864).

A layer of grouped-query attention (GQA; N query heads, K kv heads of width H, so C = K·H) is a special layer of multi-head
latent attention (MLA, `MultiHeadLatentAttention`) with the same cache; not the other way round. So a trained GQA model can be
turned into MLA and then be trained on, with heads that no longer share their keys.

(A) Exactly, first version of the paper. Repeat W_K [D, C] for every query head: W_K' [D, N·H] has rank C at most. A thin
    SVD W_K' = U S Vᵀ gives W_DK = U sqrt(S) [D, C] and W_UK = sqrt(S) Vᵀ [C, N·H]; values likewise. The cache holds
    c_K = x W_DK and c_V, 2·K·H numbers as before. RoPE comes after the up-projection, k_n = RoPE(c_K W_UK^n): exact, but
    nothing can be absorbed.
(B) Exactly, with RoPE: all kv heads are one head of width C. The query of head n goes to block n // (N / K) of a vector of
    zeros; in general to q_n W_lift^n. RoPE turns every block by the same H / 2 frequencies.
(C) RoRoPE: for each frequency f, an orthogonal U_f [K, K] mixes what the K heads hold at f, the same for the real and
    the imaginary half of keys and of lifted queries. Equal rotations commute with U_f: scores do not change. With U_f the
    principal directions of keys, the energy of each frequency moves to the first merged head.
    FreqFold takes F neighbouring frequencies for one: principal directions over K·F coordinates. Approximate for F > 1.
(D) Partial RoPE, where something is lost: only P = H / c of the C key features stay rotated, with every c-th frequency;
    for a group of F frequencies those are its first F / c directions. They are MLA's shared key k_r.
(E) Balanced PCA of the rest: k_nope (C - P features) and v (C features) are brought to one size, k_nope / rho, and the top r
    of their joint principal directions R make W_DKV = [W_k_nope / rho, W_v] R, W_UK = rho R_kᵀ lift, W_UV = R_vᵀ lift.
    Queries take in the lift of the rotated part, and a factor sqrt(H + P) / sqrt(H), for MLA divides by sqrt(H + P).

Cache per token and layer: 2·K·H numbers (GQA, A), r + P (MLA). MLA's decoding attends to the latents as they are.

(A) is from the paper's first version; (B) to (E) follow the authors' code for its later one. Conversions are computed in
float64 on the host.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Float64

from attnzoo.core.positions import Linear, Llama3, RoPE
from attnzoo.errors import unknown
from attnzoo.nn.mixer import unshared
from attnzoo.nn.mla import LatentKVAttention, MLACache, MultiHeadLatentAttention, mla_absorb, mla_cache_bytes
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention, plain

METHODS = ("svd", "identity")

Numbers = Float64[np.ndarray, "..."]
"""Weights on the host while they are converted."""


def gqa_to_mla(mixer: GroupedQueryAttention, *, method: str = "svd") -> LatentKVAttention:
    """The same function with keys and values from latents of K·H numbers (A).

    method: "svd" (the paper), or "identity": the latents are the old keys and values, W_UK repeats them.
    Raises ValueError for an unknown method, with the nearest name, and TypeError for a subclass of grouped-query attention.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    qkv = plain(mixer).qkv
    dim, heads, width = qkv.query.kernel[...].shape
    made = LatentKVAttention(
        dim,
        heads,
        latent_dim=qkv.num_kv_heads * width,
        head_dim=width,
        **_options(mixer),
    )
    for name, low in (("key", made.key), ("value", made.value)):
        weights = _with_bias(getattr(qkv, name))  # [D', K, H]; D' = D + 1 with a bias, which is one more input
        rank = weights.shape[1] * width
        down, up = weights.reshape(-1, rank), _repeated(weights.shape[1], width, heads)
        if method == "svd":
            down, up = _halved(down @ up.reshape(rank, -1), rank)
        _put(low.down, down)
        _put(low.up, up.reshape(-1, heads, width))
    _put(made.query, _with_bias(qkv.query))
    nnx.update(made.out, nnx.state(mixer.out))
    return made


def _halved(product: Numbers, rank: int) -> tuple[Numbers, Numbers]:
    """U sqrt(S) [D', r] and sqrt(S) Vᵀ [r, N·H] of a matrix of at most that rank; 0 beyond its own rank."""
    u, s, vt = np.linalg.svd(product, full_matrices=False)
    spare = max(rank - len(s), 0)
    root = np.sqrt(s[:rank])
    down, up = u[:, :rank] * root, root[:, None] * vt[:rank]
    return np.pad(down, ((0, 0), (0, spare))), np.pad(up, ((0, spare), (0, 0)))


def _repeated(groups: int, width: int, heads: int) -> Numbers:
    """[K·H, N, H]: the map that hands kv head n // (N / K) to head n, as it is."""
    owner = np.repeat(np.eye(groups), heads // groups, axis=1)  # [K, N]
    return np.einsum("kn,ij->kinj", owner, np.eye(width)).reshape(groups * width, heads, width)


def _options(mixer: GroupedQueryAttention) -> dict[str, Any]:
    """What a converted mixer is built with besides its sizes; dropout is left off."""
    query = mixer.qkv.query
    return {
        "causal": mixer.causal,
        "positions": unshared(mixer.positions),
        "use_bias": query.bias is not None,
        "backend": mixer.backend,
        "dtype": query.dtype,
        "param_dtype": query.kernel[...].dtype,
        "rngs": nnx.Rngs(0),
    }


def _with_bias(layer: nnx.LinearGeneral) -> Numbers:
    """The kernel [D, ...] in float64, its bias below it as the weights of an input that is always 1."""
    kernel = np.asarray(layer.kernel[...], np.float64)
    return kernel if layer.bias is None else np.concatenate([kernel, np.asarray(layer.bias[...], np.float64)[None]])


def _put(layer: nnx.LinearGeneral, weights: Numbers) -> None:
    """The inverse of `_with_bias`."""
    dtype = layer.kernel[...].dtype
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(weights[-1], dtype)
        weights = weights[:-1]
    layer.kernel[...] = jnp.asarray(weights, dtype)


@dataclass(frozen=True)
class MergedHeads:
    """A GQA layer as one wide kv head that every query head meets through a lift (B); float64, on the host.

    query: [D', N, H]. key: [D', 2, G, M]. key_lift: [N, H, 2, G, M], so that
        q_n · k = Σ (query_n lift_n) key over (2, G, M): real and imaginary half, group of frequencies, direction.
        At first G = H / 2 and the M = K directions are the kv heads; FreqFold makes G = H / 2F, M = K·F.
    value: [D', K·H]. value_lift: [K·H, N, H], v_n = value value_lift_n.
    rope: of the pairs (real, imaginary), None without positions. head_dim: H.
    D' = D, or D + 1 where `biased`: the last row then holds the biases.
    """

    query: Numbers
    key: Numbers
    key_lift: Numbers
    value: Numbers
    value_lift: Numbers
    rope: RoPE | None
    biased: bool

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1]

    @property
    def fold(self) -> int:
        """F: how many frequencies a group has."""
        return self.head_dim // 2 // self.key.shape[2]

    def inputs(self, x: Float[np.ndarray, "*B D"]) -> Numbers:
        """x in float64, with the input that is always 1 where there are biases; [..., D'].

        Raises ValueError for another width, and for numbers that are not finite.
        """
        x, dim = np.asarray(x, np.float64), len(self.query) - self.biased
        if x.shape[-1:] != (dim,) or not np.isfinite(x).all():
            raise ValueError(f"x: finite inputs [..., D={dim}] of the layer are needed, got {x.shape}")
        return np.concatenate([x, np.ones((*x.shape[:-1], 1))], axis=-1) if self.biased else x

    def lifted_queries(self) -> Numbers:
        """[D', N, 2, G, M]: from tokens to the queries of the merged head."""
        return np.einsum("dnh,nhcgm->dncgm", self.query, self.key_lift)


def merge_heads_rope(mixer: GroupedQueryAttention) -> MergedHeads:
    """All kv heads as one of width K·H (B); exact.

    Raises ValueError where frequencies depend on more than their number, or not all features are rotated: RoPE with a
    fraction, several axes, or a scaling other than Linear and Llama3. Raises TypeError for a subclass.
    """
    rope, qkv = plain(mixer).positions, mixer.qkv
    if rope is not None and not (
        isinstance(rope, RoPE)
        and rope.fraction == 1
        and rope.num_axes == 1
        and isinstance(rope.scaling, Linear | Llama3 | None)
    ):
        raise ValueError(f"mixer: RoPE of all features, unscaled or with Linear or Llama3 scaling is needed, got {rope}")
    groups, width, heads = qkv.num_kv_heads, qkv.head_dim, qkv.num_heads
    if width % 2:
        raise ValueError(f"mixer: features are taken in pairs, so head_dim must be even, got {width}")

    def halves(weights: Numbers) -> Numbers:
        """[..., K, H] -> [..., 2, H / 2, K], real halves first."""
        lead = weights.shape[:-1]
        if rope is not None and rope.interleaved:
            paired = np.swapaxes(weights.reshape(*lead, width // 2, 2), -1, -2)
        else:
            paired = weights.reshape(*lead, 2, width // 2)
        return np.moveaxis(paired, -3, -1)

    up = _repeated(groups, width, heads).reshape(groups, width, heads, width)
    return MergedHeads(
        query=_with_bias(qkv.query),
        key=halves(_with_bias(qkv.key)),
        key_lift=halves(np.transpose(up, (2, 3, 0, 1))),
        value=_with_bias(qkv.value).reshape(-1, groups * width),
        value_lift=up.reshape(groups * width, heads, width),
        rope=None if rope is None else replace(rope, interleaved=False),
        biased=qkv.query.bias is not None,
    )


def freqfold(merged: MergedHeads, x: Float[np.ndarray, "*B D"], fold: int = 1) -> Float64[np.ndarray, "G M M"]:
    """The principal directions of the keys of tokens x, for each group of `fold` neighbouring frequencies (C).

    Column j is the direction of j-th most energy, real and imaginary halves together. Directions are those of the second
    moment; the damping of the authors' code would add to all energies alike.
    Raises ValueError unless `fold` divides H / 2.
    """
    keys = merged.inputs(x).reshape(-1, len(merged.key)) @ _folded(merged.key, fold).reshape(len(merged.key), -1)
    keys = keys.reshape(len(keys), *_folded(merged.key, fold).shape[1:])
    moment = np.einsum("tcgm,tcgn->gmn", keys, keys, optimize=True)
    return np.linalg.eigh(moment)[1][..., ::-1]


def _folded(weights: Numbers, fold: int) -> Numbers:
    """[..., 2, H / 2, K] -> [..., 2, G, M]."""
    *lead, frequencies, heads = weights.shape
    if fold < 1 or frequencies % fold:
        raise ValueError(f"fold: must divide the {frequencies} frequencies of a head, got {fold}")
    return weights.reshape(*lead, frequencies // fold, fold * heads)


def rorope_rotate(merged: MergedHeads, rotations: Float[np.ndarray, "G M M"]) -> MergedHeads:
    """The same layer in other directions: real and imaginary halves of keys and lifts by one orthogonal U_g each (C).

    With G = H / 2 scores under RoPE do not change. With fewer, larger groups they do not change without RoPE, and under
    RoPE only as far as the frequencies of a group differ.
    Raises ValueError for rotations that do not fit.
    """
    frequencies = merged.key.shape[2]
    groups, size = rotations.shape[:2]
    total = frequencies * merged.key.shape[3]
    if rotations.shape != (groups, size, size) or groups * size != total or frequencies % groups:
        raise ValueError(
            f"rotations: [G, M, M] with G a divisor of {frequencies} and G·M = {total} is needed, got {rotations.shape}"
        )
    fold = frequencies // groups

    def rotated(weights: Numbers) -> Numbers:
        return np.einsum("...gm,gmj->...gj", _folded(weights, fold), rotations)

    return replace(merged, key=rotated(merged.key), key_lift=rotated(merged.key_lift))


def balanced_kv_pca(
    k_nope: Float[np.ndarray, "tokens A"],
    v: Float[np.ndarray, "tokens C"],
    *,
    rope_dim: int,
    balance: float = 1.0,
) -> tuple[Float64[np.ndarray, "A+C A+C"], float]:
    """(R, rho): joint principal directions of [k_nope / rho; v], most energy first, as columns (E).

    rho = mean column norm of k_nope / (that of v without its first `rope_dim` columns, times `balance`), as in the authors'
    code; 1 where there is no k_nope to balance.
    Raises ValueError for a balance that is not positive, and for keys or values that are all 0, which nothing balances.
    """
    if not balance > 0:
        raise ValueError(f"balance: must be above 0, got {balance}")
    rho = 1.0
    if k_nope.shape[1]:
        keys, values = (float(np.linalg.norm(y, axis=0).mean()) for y in (k_nope, v[:, rope_dim:]))
        if not (keys and values):
            raise ValueError(
                f"k_nope, v: columns of mean norm {keys:g} and {values:g} cannot be balanced; are the calibration inputs all 0?"
            )
        rho = keys / (values * balance)
    joint = np.concatenate([k_nope / rho, v], axis=1)
    return np.linalg.eigh(joint.T @ joint)[1][:, ::-1], rho


def gqa_to_deepseek_mla(
    mixer: GroupedQueryAttention,
    x: Float[np.ndarray, "*B D"],
    *,
    rope_dim: int,
    latent_dim: int,
    fold: int | None = None,
    balance: float = 1.0,
    query_latent_dim: int | None = None,
) -> MultiHeadLatentAttention:
    """A layer of MLA with decoupled RoPE near a GQA layer: steps (B) to (E); train it on afterwards.

    x: inputs of the layer, to calibrate on (the authors take 128 texts of 256 tokens).
    rope_dim: P = H / c features stay rotated, for a whole c. latent_dim: r, at most 2·K·H - P, where (E) is exact.
    fold: F frequencies are taken for one, a multiple of c that divides H / 2; c by default.
    balance: of keys against values, as in `balanced_kv_pca`.
    query_latent_dim: None, or the rank of a PCA of queries, at most N·H.

    Raises ValueError for sizes that do not fit and calibration inputs that say nothing, and raises where `merge_heads_rope`
    does.
    """
    merged = merge_heads_rope(mixer)
    heads, width = merged.query.shape[1:]
    wide = merged.value.shape[1]
    if rope_dim < 2 or rope_dim % 2 or width % rope_dim:
        raise ValueError(f"rope_dim: must be even and divide head_dim={width}, got {rope_dim}")
    collapse = width // rope_dim
    fold = collapse if fold is None else fold
    if fold % collapse:
        raise ValueError(f"fold: must be a multiple of head_dim / rope_dim = {collapse}, got {fold}")
    if not 1 <= latent_dim <= 2 * wide - rope_dim:
        raise ValueError(f"latent_dim: from 1 to 2·K·H - P = {2 * wide - rope_dim}, got {latent_dim}")
    if query_latent_dim is not None and not 1 <= query_latent_dim <= heads * width:
        raise ValueError(f"query_latent_dim: None, or from 1 to N·H = {heads * width}, got {query_latent_dim}")
    merged = rorope_rotate(merged, freqfold(merged, x, fold))
    kept = fold // collapse

    def parts(weights: Numbers) -> tuple[Numbers, Numbers]:
        """The rotated features [..., P], frequency after frequency in both halves, and the others [..., C - P]."""
        lead = weights.shape[:-3]
        return weights[..., :kept].reshape(*lead, rope_dim), weights[..., kept:].reshape(*lead, wide - rope_dim)

    (key_rope, key_nope), (lift_rope, lift_nope) = parts(merged.key), parts(merged.key_lift)
    tokens = merged.inputs(x).reshape(-1, len(merged.query))
    directions, rho = balanced_kv_pca(tokens @ key_nope, tokens @ merged.value, rope_dim=rope_dim, balance=balance)
    directions = directions[:, :latent_dim]
    of_keys, of_values = np.split(directions, [wide - rope_dim])
    made = MultiHeadLatentAttention(
        mixer.qkv.query.kernel[...].shape[0],
        heads,
        head_dim=width,
        rope_dim=rope_dim,
        latent_dim=latent_dim,
        query_latent_dim=query_latent_dim,
        normed=False,
        **{**_options(mixer), "positions": merged.rope},
    )
    _put(made.down, np.concatenate([np.concatenate([key_nope / rho, merged.value], axis=1) @ directions, key_rope], axis=1))
    _put(made.key_up, rho * np.einsum("jr,nhj->rnh", of_keys, lift_nope))
    _put(made.value_up, np.einsum("jr,jnh->rnh", of_values, merged.value_lift))
    query = merged.query
    if query_latent_dim is not None:
        flat = query.reshape(len(query), -1)
        q = tokens @ flat
        basis = np.linalg.eigh(q.T @ q)[1][:, ::-1][:, :query_latent_dim]
        _put(made.query.down, flat @ basis)
        query = basis.T.reshape(-1, heads, width)
    query = np.concatenate([query, np.einsum("dnh,nhp->dnp", query, lift_rope)], axis=-1)
    _put(made.query if query_latent_dim is None else made.query.up, query * ((width + rope_dim) / width) ** 0.5)
    nnx.update(made.out, nnx.state(mixer.out))
    return made


def _picture(axes: Any) -> None:
    """Energy of the merged heads of random keys that share much, before and after RoRoPE."""
    mixer = GroupedQueryAttention(64, 8, num_kv_heads=8, positions=RoPE(), rngs=nnx.Rngs(0))
    shared = mixer.qkv.key.kernel[...].mean(1, keepdims=True)
    mixer.qkv.key.kernel[...] = 0.4 * mixer.qkv.key.kernel[...] + 2 * shared
    x = np.random.default_rng(0).normal(size=(512, 64))
    merged = merge_heads_rope(mixer)
    places = np.arange(merged.key.shape[-1])
    for shift, (name, layer) in enumerate({"before": merged, "after": rorope_rotate(merged, freqfold(merged, x))}.items()):
        energy = (np.tensordot(merged.inputs(x), layer.key, 1) ** 2).sum((0, 1, 2))
        axes.bar(places + 0.4 * shift, energy / energy.sum(), 0.38, label=f"{name} RoRoPE")
    axes.set(xlabel="merged head", ylabel="share of the keys' energy", title="RoRoPE gathers position in one head")
    axes.legend(frameon=False)


PAPER = Paper(
    44,
    "transmla",
    "TransMLA: Multi-head Latent Attention Is All You Need",
    "compress",
    builds=(
        MultiHeadLatentAttention,
        MLACache,
        mla_absorb,
        mla_cache_bytes,
        LatentKVAttention,
        gqa_to_mla,
        MergedHeads,
        merge_heads_rope,
        rorope_rotate,
        freqfold,
        balanced_kv_pca,
        gqa_to_deepseek_mla,
    ),
    mixer=MultiHeadLatentAttention,
    picture=_picture,
    costs={
        "cache numbers per token": "r + P",
        "cache numbers per token, grouped-query attention and (A)": "2 * K * H",
        "parameters": "D * (r + P) + r + r * N * (H + Hv) + D * N * (H + P) + N * Hv * D",
        "multiply-adds per cached token of a decoding step": "N * (2 * r + 2 * P)",
    },
    code="MuLabPKU/TransMLA, transformers",
    parity="DeepseekV2Attention and DeepseekV3Attention of transformers: outputs and gradients to 1e-5",
    notes=(
        "MLA itself is DeepSeek-V2's, built here because the paper is about it (`attnzoo.nn.mla`). Latents are cached with "
        "the shared key beside them, and values of r + P features are summed of which P are dropped: one buffer serves as "
        "keys and as values. Converted layers have no norm on their latents. Dropout is not carried over by conversions."
    ),
)
