"""Effective Approaches to Attention-based Neural Machine Translation (Luong et al., 2015, EMNLP 2015, arXiv 1508.04025).

A recurrent decoder attends from its current state h_t [D] to the source states h_s [S, D] and reads the next token off an
attentional state:

    a_t = softmax_s(score(h_t, h_s))      c_t = Σ_s a_t(s) h_s      h~_t = tanh(W_c [c_t; h_t])        (paper §3, eq. 5)

    score = h_t · h_s                    dot, without 1/sqrt(D)
            h_t · W_a h_s                general
            v_a · tanh(W_a [h_t; h_s])   concat
            (W_a h_t)_s                  location                                                      (eq. 8)

Global attention reads the whole source. Local attention reads 2 D_w + 1 states around a position p_t:

    local-m:  p_t = t;                                       a_t the softmax over the window           (§3.2)
    local-p:  p_t = (S - 1) sigmoid(v_p · tanh(W_p h_t));    a_t = softmax · exp(-(s - p_t)² / 2σ²),  σ = D_w / 2   (eq. 9, 10)

where the window is centred on floor(p_t), S is the true length of each source, and the product with the Gaussian is not
normalised again. The floor has no derivative: W_p and v_p learn through the Gaussian alone.

With input feeding the decoder's input at step t is [embedding; h~_{t-1}], so training is sequential in t as decoding is:
`attnzoo.models.luong` scans.

Costs: S D multiply-adds per target token for the score and as many for c_t; (2 D_w + 1) D each when local. "general" and
"concat" add D² for W_a h_t, and "concat" S D² once per source for its half of W_a.

The window, sigma and p_t in [0, S - 1] (the paper writes S · sigmoid) follow the authors' Matlab code.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cells import concrete
from attnzoo.core.weights import softmax_rows
from attnzoo.errors import unknown
from attnzoo.nn.linear import linear, named
from attnzoo.paper import Paper

SCORES = ("dot", "general", "concat", "location")


def luong_score(
    h_t: Float[Array, "*B D"],
    h_s: Float[Array, "*#B S D"],
    kind: str = "dot",
    *,
    w_a: Float[Array, "..."] | None = None,
    v_a: Float[Array, " A"] | None = None,
    source_identity: bool = False,
    of_source: Float[Array, "*#B S A"] | None = None,
) -> Float[Array, "*B S"]:
    """The score of every source state, in float32.

    kind: of `SCORES`. w_a: W_a, [D, D] for "general", [A, 2D] for "concat" (columns of h_t first), [S_max, D] with
    S <= S_max for "location". v_a: for "concat".
    source_identity: "concat" as the authors' code has it, v_a · tanh(W_a h_t + h_s) with W_a [D, D].
    of_source: of "concat", W_a's half of the source states, h_s W_a[:, D:]ᵀ, where it has been computed before.
    Raises ValueError for an unknown kind, and parameters that are missing, have another shape or no use.
    """
    if kind not in SCORES:
        raise unknown("score", kind, SCORES)
    dim, source = h_s.shape[-1], h_s.shape[-2]
    if h_t.shape[-1] != dim:
        raise ValueError(f"h_t, h_s: states must have one width, got {h_t.shape} and {h_s.shape}")
    w_shape, v_shape = (None if p is None else jnp.shape(p) for p in (w_a, v_a))
    if (kind == "dot" and w_a is not None) or (kind != "concat" and v_a is not None):
        raise ValueError(f"w_a, v_a: 'dot' has neither and v_a is of 'concat' alone; got {w_shape} and {v_shape} with {kind!r}")
    if kind == "dot":
        return _read(h_t, h_s)
    w, v = (jnp.zeros(0) if p is None else jnp.asarray(p) for p in (w_a, v_a))
    if kind == "location":
        if w.ndim != 2 or w.shape[0] < source or w.shape[1] != dim:
            raise ValueError(f"w_a: 'location' needs [S_max, D] with S_max >= {source} and D = {dim}, got {w_shape}")
        return jnp.matmul(h_t, w[:source].T, preferred_element_type=jnp.float32)
    if kind == "general":
        if w.shape != (dim, dim):
            raise ValueError(f"w_a: 'general' needs [D, D] = {(dim, dim)}, got {w_shape}")
        return _read(h_t @ w, h_s)
    rows, columns = (dim, dim) if source_identity else (v.size, 2 * dim)
    if v.shape != (rows,) or w.shape != (rows, columns):
        raise ValueError(f"w_a, v_a: 'concat' needs [A, {columns}] and [A], here A = {rows}; got {w_shape} and {v_shape}")
    if of_source is None:
        of_source = h_s if source_identity else h_s @ w[:, dim:].T
    hidden = jnp.tanh((h_t @ w[:, :dim].T)[..., None, :] + of_source)
    return jnp.matmul(hidden, v, preferred_element_type=jnp.float32)


def _read(a: Float[Array, "*B D"], h_s: Float[Array, "*#B S D"]) -> Float[Array, "*B S"]:
    """a · h_s for every s, in float32."""
    return jnp.einsum("...d,...sd->...s", a, h_s, preferred_element_type=jnp.float32)


def _init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32, out_sharding: Any = None) -> Array:
    return jax.random.uniform(key, shape, dtype, -0.1, 0.1)


class GlobalAttention(nnx.Module):
    """(h_t [B, D], h_s [B, S, D]) -> (h~_t [B, D], a_t [B, S]); leading axes broadcast: h_t [B, T, D] takes h_s [B, 1, S, D].

    score: of `SCORES`. source_identity: as in `luong_score`. max_source: S_max of "location", which needs it.
    Parameters start uniform in [-0.1, 0.1], as in the paper.

    Raises ValueError for an unknown score, and a max_source that is missing or has no use.
    """

    scores: ClassVar[tuple[str, ...]] = SCORES

    def __init__(
        self,
        dim: int,
        *,
        score: str = "general",
        source_identity: bool = False,
        max_source: int | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if score not in self.scores:
            raise unknown(f"score of {type(self).__name__}:", score, self.scores)
        if (max_source is not None) != (score == "location"):
            raise ValueError(f"max_source: the longest source, for score 'location' alone; got {max_source} with {score!r}")
        shapes: dict[str, tuple[int, ...]] = {
            "dot": (),
            "general": (dim, dim),
            "concat": (dim, dim if source_identity else 2 * dim),
            "location": (max_source or 0, dim),
        }
        self.kind, self.source_identity = score, source_identity
        self.dtype, self.param_dtype = dtype, param_dtype
        self.w_a = self._matrix(shapes[score], rngs) if shapes[score] else None
        self.v_a = self._matrix((dim,), rngs) if score == "concat" else None
        self.w_c = linear(2 * dim, dim, ("embed", "embed"), kernel_init=_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def _matrix(self, shape: tuple[int, ...], rngs: nnx.Rngs) -> nnx.Param:
        return nnx.Param(_init(rngs.params(), shape, self.param_dtype), **named(*(None,) * len(shape)))

    def __call__(
        self,
        h_t: Float[Array, "*B D"],
        h_s: Float[Array, "*#B S D"],
        *,
        mask: Bool[Array, "*#B S"] | None = None,
        t: int | Int[Array, "*#B"] = 0,
        of_source: Float[Array, "*#B S A"] | None = None,
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B S"]]:
        """mask: True at real source tokens, which come first. t: the step, counted from 0, for local-m.

        of_source: what `of_source` made of h_s, once for all steps.
        Raises ValueError for a mask of another length; local ones also for real tokens after padding, unless it is traced.
        """
        if mask is None:
            mask = jnp.ones(h_s.shape[:-1], bool)
        elif mask.shape[-1] != h_s.shape[-2]:
            raise ValueError(f"mask: one entry per source state of {h_s.shape} is needed, got {mask.shape}")
        h_t, h_s = (x if self.dtype is None else x.astype(self.dtype) for x in (h_t, h_s))
        of_source = self.of_source(h_s) if of_source is None else of_source
        c_t, a_t = self.attend(h_t, h_s, mask, t, of_source)
        return jnp.tanh(self.w_c(jnp.concatenate([c_t.astype(h_t.dtype), h_t], -1))), a_t

    def of_source(self, h_s: Float[Array, "*B S D"]) -> Float[Array, "*B S A"] | None:
        """What the score needs of the source and no step changes: "concat"'s half of W_a; None for the others."""
        if self.kind != "concat" or self.source_identity or self.w_a is None:
            return None
        h_s = h_s if self.dtype is None else h_s.astype(self.dtype)
        return h_s @ self.w_a[:, h_s.shape[-1] :].astype(h_s.dtype).T

    def score(
        self, h_t: Float[Array, "*B D"], h_s: Float[Array, "*#B S D"], of_source: Float[Array, "*#B S A"] | None = None
    ) -> Float[Array, "*B S"]:
        """`luong_score` with the parameters of this attention."""
        w_a, v_a = (None if p is None else p[...].astype(h_t.dtype) for p in (self.w_a, self.v_a))
        known: dict[str, Any] = {"source_identity": self.source_identity, "of_source": of_source}
        return luong_score(h_t, h_s, self.kind, w_a=w_a, v_a=v_a, **known)

    def attend(
        self, h_t: Array, h_s: Array, mask: Array, t: Any, of_source: Array | None = None
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B S"]]:
        """(c_t, a_t) in float32."""
        a_t = softmax_rows(self.score(h_t, h_s, of_source), mask)[0]
        return _mean(a_t, h_s), a_t


class LocalMonotonicAttention(GlobalAttention):
    """local-m: reads the 2 window + 1 states around p_t = t, which stays within the source; arguments as in `GlobalAttention`.

    window: D_w. Raises ValueError for one below 0, and for score "location", which has no window.
    """

    scores: ClassVar[tuple[str, ...]] = SCORES[:3]
    least_window: ClassVar[int] = 0

    def __init__(self, dim: int, *, window: int = 10, rngs: nnx.Rngs, **options: Any):
        if window < self.least_window:
            raise ValueError(f"window: D_w must be at least {self.least_window}, got {window}")
        super().__init__(dim, rngs=rngs, **options)
        self.window = window

    def position(self, h_t: Float[Array, "*B D"], last: Int[Array, "*#B"], t: Any) -> Float[Array, "*B"]:
        """p_t in [0, last], where `last` is S - 1 of each source."""
        return jnp.broadcast_to(jnp.minimum(t, last), h_t.shape[:-1]).astype(jnp.float32)

    def weigh(
        self, logits: Float[Array, "*B W"], ok: Bool[Array, "*B W"], offset: Float[Array, "*B W"]
    ) -> Float[Array, "*B W"]:
        """Weights of the window. offset: s - p_t."""
        return softmax_rows(logits, ok)[0]

    def attend(
        self, h_t: Array, h_s: Array, mask: Array, t: Any, of_source: Array | None = None
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B S"]]:
        known = concrete(mask)
        if known is not None and (known[..., 1:] & ~known[..., :-1]).any():
            raise ValueError("mask: local attention counts positions from the first token, so real tokens must come first")
        source = h_s.shape[-2]
        p_t = self.position(h_t, jnp.maximum(mask.sum(-1) - 1, 0), t)
        first = jnp.floor(p_t).astype(jnp.int32)[..., None] - self.window
        at = first + jnp.arange(2 * self.window + 1)
        near = jnp.clip(at, 0, source - 1)
        ok = (at == near) & jnp.take_along_axis(jnp.broadcast_to(mask, (*at.shape[:-1], source)), near, -1)

        def gathered(states: Array) -> Array:
            states = states.reshape(*(1,) * (at.ndim + 1 - states.ndim), *states.shape)
            return jnp.take_along_axis(states, near[..., None], -2)

        h_w = gathered(h_s)
        score = self.score(h_t, h_w, None if of_source is None else gathered(of_source))
        a_w = self.weigh(score, ok, at - p_t[..., None])
        place = jnp.arange(source) - first  # of each source state in the window
        inside = jnp.clip(place, 0, 2 * self.window)
        return _mean(a_w, h_w), jnp.where(place == inside, jnp.take_along_axis(a_w, inside, -1), 0)


class LocalPredictiveAttention(LocalMonotonicAttention):
    """local-p: reads around a predicted p_t, weighted by a Gaussian; arguments as in `LocalMonotonicAttention`.

    normalize_local: multiply the scores by the Gaussian before the softmax, instead of the weights after it.
    Raises ValueError for a window below 1: sigma is half of it.
    """

    least_window: ClassVar[int] = 1

    def __init__(self, dim: int, *, normalize_local: bool = False, rngs: nnx.Rngs, **options: Any):
        super().__init__(dim, rngs=rngs, **options)
        self.normalize_local = normalize_local
        self.w_p, self.v_p = self._matrix((dim, dim), rngs), self._matrix((dim,), rngs)

    def position(self, h_t: Float[Array, "*B D"], last: Int[Array, "*#B"], t: Any) -> Float[Array, "*B"]:
        w_p, v_p = (p[...].astype(h_t.dtype) for p in (self.w_p, self.v_p))
        return last * jax.nn.sigmoid(jnp.matmul(jnp.tanh(h_t @ w_p.T), v_p, preferred_element_type=jnp.float32))

    def weigh(
        self, logits: Float[Array, "*B W"], ok: Bool[Array, "*B W"], offset: Float[Array, "*B W"]
    ) -> Float[Array, "*B W"]:
        gaussian = jnp.exp(-2 * (offset / self.window) ** 2)  # sigma = window / 2
        if self.normalize_local:
            return softmax_rows(logits * gaussian, ok)[0]
        return softmax_rows(logits, ok)[0] * gaussian


def _mean(a: Float[Array, "*B S"], h: Float[Array, "*#B S D"]) -> Float[Array, "*B D"]:
    return jnp.einsum("...s,...sd->...d", a.astype(h.dtype), h, preferred_element_type=jnp.float32)


def draw_window(ax: Any, source: int = 24, window: int = 6) -> None:
    """Draws one row of weights: global, local-m and local-p around the same position, with its Gaussian."""
    dim, rngs = 16, nnx.Rngs(4)
    h_t, h_s = jax.random.normal(rngs.params(), (dim,)), jax.random.normal(rngs.params(), (source, dim)) / 2
    local_p = LocalPredictiveAttention(dim, window=window, score="dot", rngs=rngs)
    p_t = float(local_p.position(h_t, jnp.int32(source - 1), 0))
    local_m = LocalMonotonicAttention(dim, window=window, score="dot", rngs=rngs)
    s = np.arange(source)
    for name, attention, t, color in (
        ("global", GlobalAttention(dim, score="dot", rngs=rngs), 0, "0.6"),
        (f"local-m, t = {int(p_t)}", local_m, int(p_t), "#8ecae6"),
        (f"local-p, p_t = {p_t:.1f}", local_p, 0, "#126782"),
    ):
        ax.plot(s, attention(h_t, h_s, t=t)[1], label=name, color=color, marker=".", drawstyle="steps-mid")
    wide = np.linspace(p_t - window, p_t + window)
    top = ax.get_ylim()[1]
    ax.plot(wide, top * np.exp(-2 * ((wide - p_t) / window) ** 2), "k:", label="Gaussian of local-p (scaled)")
    ax.set(xlabel="source position s", ylabel="weight a_t(s)", title=f"one target position, D_w = {window}")
    ax.legend(fontsize=8)


def argmax_links(
    weights: Float[np.ndarray, "*B T S"], target_mask: Bool[np.ndarray, "*B T"] | None = None
) -> Bool[np.ndarray, "*B T S"]:
    """One link per target token, to the source token of the largest weight; none where `target_mask` is False."""
    weights = np.asarray(weights)
    links = np.arange(weights.shape[-1]) == weights.argmax(-1)[..., None]
    return links if target_mask is None else links & np.asarray(target_mask)[..., None]


def alignment_error_rate(
    links: Bool[np.ndarray, "*B T S"], sure: Bool[np.ndarray, "*B T S"], possible: Bool[np.ndarray, "*B T S"] | None = None
) -> float:
    """AER = 1 - (|A ∩ S| + |A ∩ P|) / (|A| + |S|), counted over everything (Och & Ney, 2003).

    links: A. sure: S. possible: P, which sure links always belong to; S by default. 0 where there is no link at all.
    Raises ValueError for shapes that differ.
    """
    a, s = np.asarray(links, bool), np.asarray(sure, bool)
    p = s if possible is None else s | np.asarray(possible, bool)
    if not a.shape == s.shape == p.shape:
        raise ValueError(f"links, sure, possible: need one shape, got {a.shape}, {s.shape} and {p.shape}")
    total = int(a.sum() + s.sum())
    return 1 - int((a & s).sum() + (a & p).sum()) / total if total else 0.0


PAPER = Paper(
    16,
    "luong_attention",
    "Effective Approaches to Attention-based Neural Machine Translation",
    "alignment",
    builds=(
        luong_score,
        GlobalAttention,
        LocalMonotonicAttention,
        LocalPredictiveAttention,
        argmax_links,
        alignment_error_rate,
        "attnzoo.models.luong:LuongDecoder",
        "attnzoo.models.luong:LuongSeq2Seq",
    ),
    picture=draw_window,
    costs={
        "multiply-adds of scores and c_t per target token, global": "2 * S * D",
        "multiply-adds of scores and c_t per target token, local": "2 * (2 * D_w + 1) * D",
        "multiply-adds of W_a per target token (general, concat)": "D * D",
        "multiply-adds of W_a once per source (concat)": "S * D * D",
        "numbers kept while decoding": "S * D + (2 * L + 1) * D",
        "numbers kept while decoding (concat)": "2 * S * D + (2 * L + 1) * D",
    },
    code="lmthang/nmt.matlab, OpenNMT-py",
    parity=(
        "jax.nn.dot_product_attention with scale 1 (dot, and general with keys W_a h_s) to 1e-5; GlobalAttention of "
        "OpenNMT-py 3.5.1 (dot, general, and mlp as concat without its biases; outputs, weights and gradients) to 1e-6, "
        "checked by hand and in no test: that package pins an older torch"
    ),
    notes=(
        "score='concat' is the paper's form; source_identity=True is the authors' code, which leaves h_s as it is. p_t lies "
        "in [0, S - 1] with S the true length of each source, as in the authors' code; the paper writes S · sigmoid. Local "
        "attention gathers its window, so it costs 2 D_w + 1 positions whatever the source; positions outside the source "
        "are masked, and the window is never shifted."
    ),
)
