"""Attention calibration, ACT (Yu et al., 2024, ICML 2024, arXiv 2406.15765).

Attention sinks, tokens that get far more than their share, appear after the first token too, and some of them hurt. ACT
finds them while the model runs and, in heads chosen once with a few labelled samples, scales their columns down and gives
what is freed to the other keys of the same row. Nothing is trained. With A [T, T] a head's causal weights of a whole prompt
(0-based; paper §4):

    avg_j = Σ_t A[t, j] / (T - j)                     over the rows that see column j
    S     = {j : avg_j > threshold} \\ {0}             threshold: alpha / T with alpha = 5 (paper), or 0.1 (code)
    R_t   = (1 - beta) Σ_{j in S} A[t, j]             beta = 0.4
    A'[t, j] = beta A[t, j]                           j in S
    A'[t, j] = A[t, j] + R_t A[t, j] / Σ_{i not in S} A[t, i]       j not in S, the first token included

Rows keep their sum and their zeros; a row that sees sinks alone is left as it is. The first token is never calibrated. Under
a mask that is a column whose own row sees nothing else: the first token of every document, and the first after padding.
T - j is then the number of rows that see j, and T that of the tokens that j sees or that see j.

The sinks of a prompt depend on all its rows, so this is no causal map: a longer prompt may calibrate its beginning otherwise.
Decoding keeps the column sums of the raw weights and what the mask shows, finds the sinks of each new row by the sums so
far, and does not return to earlier rows.

Costs: T² weights of a layer with a calibrated head (dense backend), 3 N numbers per token in its cache. Layers without one
stay as fast as they were. The calibration follows the authors' code (GATECH-EIC/ACT).
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attnzoo.core.cache import LayerCache, append, cached_attention
from attnzoo.core.cells import Geometry
from attnzoo.core.masks.base import mask as pytree
from attnzoo.core.weights import Weights, softmax_rows
from attnzoo.errors import unknown
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

Head = tuple[int, int]
"""(layer, head), 0-based."""

THRESHOLDS = {"abs": 0.1, "ratio": 5.0}


@dataclasses.dataclass(frozen=True)
class SinkRule:
    """When a column is a sink.

    thr_mode: "abs", avg_j > threshold (the code; 0.1 is below the even share of a short prompt, which then has sinks alone);
        "ratio", avg_j > threshold / T (the paper's alpha).
    threshold: 0.1 for "abs" and 5 for "ratio" by default.
    min_rows: columns that fewer rows see are no sinks; the last token, which it alone sees, easily looks like one.
    reference_quirk: leave out the first column found, as the code does, rather than first tokens. The two differ where the
        first token is below the threshold, and where a row of weights holds several documents.

    Raises ValueError for an unknown mode, a negative threshold and a min_rows below 1.
    """

    thr_mode: str = "abs"
    threshold: float | None = None
    min_rows: int = 1
    reference_quirk: bool = False

    def __post_init__(self) -> None:
        if self.thr_mode not in THRESHOLDS:
            raise unknown("thr_mode", self.thr_mode, THRESHOLDS)
        if self.threshold is not None and self.threshold < 0:
            raise ValueError(f"threshold: averages of weights are at least 0, and so must it be; got {self.threshold}")
        if self.min_rows < 1:
            raise ValueError(f"min_rows: must be at least 1, got {self.min_rows}")

    def __call__(self, columns: "Columns") -> Bool[Array, "*B S"]:
        """The sinks."""
        total, rows, own = columns
        threshold = jnp.asarray(THRESHOLDS[self.thr_mode] if self.threshold is None else self.threshold, jnp.float32)
        if self.thr_mode == "ratio":
            threshold = threshold / jnp.maximum(rows + own - 1, 1)
        found = (rows >= self.min_rows) & (total / jnp.maximum(rows, 1) > threshold)
        first = jnp.cumsum(found, axis=-1) == 1 if self.reference_quirk else own == 1
        return found & ~first


class Columns(NamedTuple):
    """What is known of the columns of attention: their sums, how many rows see each, how many keys its own row sees."""

    total: Float[Array, "*B S"]
    rows: Int[Array, "*#B S"]
    own: Int[Array, "*#B S"]


def _columns(weights: Float[Array, "*B T T"], visible: Bool[Array, "*#B T T"] | None) -> Columns:
    """Those of whole prompts; rows that do not see their own token are padding and do not count."""
    seen = jnp.tri(weights.shape[-1], dtype=bool) if visible is None else visible
    real = jnp.diagonal(seen, axis1=-2, axis2=-1)[..., None]
    rows, own = ((seen & real).sum(axis, dtype=jnp.int32) for axis in (-2, -1))
    return Columns(jnp.where(real, weights, 0).sum(axis=-2), rows, own)


def find_attention_sinks(
    weights: Float[Array, "*B T T"],
    rule: SinkRule = SinkRule(),
    *,
    visible: Bool[Array, "*#B T T"] | None = None,
) -> Bool[Array, "*B T"]:
    """S of every map by itself: per sample and head.

    weights: post-softmax, of a whole prompt. visible: which cells can be seen, causal by default; rows that do not see
    their own token are padding and do not count.
    Raises ValueError for maps that are not square.
    """
    if weights.ndim < 2 or weights.shape[-2] != weights.shape[-1]:
        raise ValueError(f"weights: sinks are those of a whole prompt, [..., T, T]; got {weights.shape}")
    return rule(_columns(weights, visible))


def act_calibrate(weights: Float[Array, "*B T S"], sinks: Bool[Array, "*#B S"], *, beta: float = 0.4) -> Float[Array, "*B T S"]:
    """A': the columns of sinks times beta, what is freed given to the other keys of each row in proportion.

    Raises ValueError for a beta outside [0, 1].
    """
    _check_beta(beta)
    at = sinks[..., None, :]
    held = jnp.where(at, weights, 0).sum(axis=-1, keepdims=True)
    others = jnp.where(at, 0, weights)
    rest = others.sum(axis=-1, keepdims=True)
    receives = rest > 0
    calibrated = jnp.where(at, beta * weights, others * (1 + (1 - beta) * held / jnp.where(receives, rest, 1)))
    return jnp.where(receives & (held > 0), calibrated, weights)


def _check_beta(beta: Any) -> None:
    if not isinstance(beta, jax.core.Tracer) and not 0 <= beta <= 1:
        raise ValueError(f"beta: must be in [0, 1], got {beta}")


@pytree(leaves=("heads",))
class CalibratedSoftmax(Weights):
    """Softmax weights of a whole prompt (T = S), calibrated in the heads [N] that are True.

    Raises ValueError for a beta outside [0, 1].
    """

    heads: Bool[Array, " N"]
    beta: float = 0.4
    rule: SinkRule = SinkRule()

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def rows(self, s: Array, ok: Array, g: Geometry) -> Array:
        w = softmax_rows(s, ok)[0]
        calibrated = act_calibrate(w, find_attention_sinks(w, self.rule, visible=ok), beta=self.beta)
        return jnp.where(self.heads[:, None, None], calibrated, w)

    def __repr__(self) -> str:
        return f"CalibratedSoftmax(beta={self.beta})"


@pytree()
class _Visible(Weights):
    """1 at every visible cell."""

    reads_logits = False

    def rows(self, s: Array, ok: Array, g: Geometry) -> Array:
        return jnp.broadcast_to(ok, s.shape).astype(jnp.float32)


class HeadSwitch(nnx.Variable):
    """Which heads of a layer are calibrated, [N] bool: an array, so that a search over heads compiles once."""


class ACTAttention(GroupedQueryAttention):
    """Causal self-attention whose chosen heads are calibrated; x [B, T, D] -> [B, T, D].

    heads: the query heads that are calibrated; all by default. With none the mixer is the plain one, on any backend.
        `mixer.switch[...]` is the same as a bool [N], to be changed at will.
    beta: what sinks keep. rule: what is a sink.
    Further arguments as in `GroupedQueryAttention`. `ACTAttention.like(mixer, heads=...)` wraps a trained one.

    Raises ValueError for heads that there are not, a beta outside [0, 1], and causal=False.
    """

    crosses = False
    bidirectional = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        heads: Sequence[int] | None = None,
        beta: float = 0.4,
        rule: SinkRule = SinkRule(),
        causal: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if not causal:
            raise ValueError("causal: sinks are averages over the rows that see them; only causal attention has them here")
        chosen = set(range(num_heads) if heads is None else heads)
        if not chosen <= set(range(num_heads)):
            raise ValueError(f"heads: must be in 0..{num_heads - 1}, got {sorted(chosen)}")
        _check_beta(beta)
        super().__init__(dim, num_heads, causal=causal, rngs=rngs, **options)
        self.beta, self.rule = beta, rule
        self.switch = HeadSwitch(jnp.array([n in chosen for n in range(num_heads)])) if chosen else None

    def attention_arguments(self) -> dict[str, Any]:
        if self.switch is None:
            return super().attention_arguments()
        return {**super().attention_arguments(), "weights": CalibratedSoftmax(self.switch[...], self.beta, self.rule)}

    def init_cache(self, batch: int, length: int, *, dtype: DTypeLike | None = None, **memory: Any) -> LayerCache:
        """Room for `length` tokens; `aux` holds the `Columns` of the raw weights, each [B, N, S]."""
        cache = super().init_cache(batch, length, dtype=dtype, **memory)
        if self.switch is None:
            return cache
        shape = (batch, self.qkv.num_heads, length)
        return dataclasses.replace(
            cache, aux=Columns(*(jnp.zeros(shape, kind) for kind in (jnp.float32, jnp.int32, jnp.int32)))
        )

    def prefill(
        self, x: Float[Array, "B T D"], cache: LayerCache, *, mask: Any = None, lengths: Int[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """T more tokens, calibrated by the sinks of all tokens so far, these included."""
        if self.switch is None:
            return super().prefill(x, cache, mask=mask, lengths=lengths)
        T = x.shape[1]
        positions = cache.next_positions(T)
        q = self._rotate(self.qkv.query(x), positions)
        cache = append(cache, self.cache_entries(x, positions), lengths)
        call: dict[str, Any] = {"q_positions": positions, "mask": self._mask(mask), "return_weights": True}
        _, w = cached_attention(q, cache, **call, **super().attention_arguments())
        ok = cached_attention(q, cache, **call, weights=_Visible())[1] > 0
        columns = self._seen(cache, positions, w, ok)
        calibrated = act_calibrate(w, self.rule(columns), beta=self.beta)
        w = jnp.where(self.switch[...][:, None, None], calibrated, w)
        v = cache.payload["v"].astype(jnp.float32)
        o = jnp.einsum("bkgts,bksh->btkgh", w.reshape(w.shape[0], v.shape[1], -1, *w.shape[2:]), v).reshape(q.shape)
        return self.merge(o.astype(x.dtype), x), dataclasses.replace(cache, aux=columns)

    def _seen(self, cache: LayerCache, positions: Array, w: Float[Array, "B N T S"], ok: Bool[Array, "B N T S"]) -> Columns:
        """The columns of all rows so far, those of the tokens just appended included."""
        real = (positions < cache.seen[:, None])[:, None, :, None]
        ok &= real
        group = self.qkv.num_heads // self.qkv.num_kv_heads
        itself = positions[:, None, :, None] == jnp.repeat(cache.pos, group, axis=1)[:, :, None]
        keys = ok.sum(axis=-1, keepdims=True)
        new = jnp.where(real, w, 0).sum(-2), ok.sum(-2), jnp.where(itself, keys, 0).sum(-2)
        return Columns(*(old + more for old, more in zip(cache.aux, new, strict=True)))


class HeadSelection(NamedTuple):
    """heads: those to calibrate. accuracy: with all of them calibrated; base: with none; alone: with each by itself."""

    heads: tuple[Head, ...]
    accuracy: float
    base: float
    alone: dict[Head, float]


def act_candidates(num_layers: int, num_heads: int) -> list[Head]:
    """The heads the paper searches: all of the layers but the first two and the last."""
    return [(layer, head) for layer in range(2, num_layers - 1) for head in range(num_heads)]


def select_act_heads(
    accuracy: Callable[[tuple[Head, ...]], float], candidates: Iterable[Head], *, mode: str = "alone"
) -> HeadSelection:
    """The heads whose calibration helps on a small labelled set.

    accuracy: calibrated heads -> accuracy on that set.
    mode: "alone" keeps every head that by itself is better than none. "greedy" goes through those from the best on and
        keeps a head if it makes the set better, so that the set is never worse than none.
    Raises ValueError for an unknown mode.
    """
    if mode not in ("alone", "greedy"):
        raise unknown("mode", mode, ("alone", "greedy"))
    base = accuracy(())
    alone = {head: accuracy((head,)) for head in candidates}
    helpful = sorted((head for head in alone if alone[head] > base), key=lambda head: -alone[head])
    if mode == "alone":
        chosen = tuple(sorted(helpful))
        return HeadSelection(chosen, accuracy(chosen) if chosen else base, base, alone)
    kept, best = tuple(helpful[:1]), alone[helpful[0]] if helpful else base
    for head in helpful[1:]:
        tried = tuple(sorted((*kept, head)))
        value = accuracy(tried)
        if value > best:
            kept, best = tried, value
    return HeadSelection(kept, best, base, alone)


@dataclasses.dataclass(frozen=True)
class SinkReport:
    """Where the sinks of L layers are; averages over samples.

    count: sinks per map, [L, N]. at: share of samples in which a column is one, [L, N, T].
    first, later: shares of all attention that first tokens and sinks get, [L, N].
    """

    count: Float[np.ndarray, "L N"]
    at: Float[np.ndarray, "L N T"]
    first: Float[np.ndarray, "L N"]
    later: Float[np.ndarray, "L N"]

    def plot(self, axes: Any) -> None:
        """The attention that later sinks get, by layer and head, on matplotlib axes."""
        image = axes.imshow(self.later, cmap="Reds", vmin=0)
        axes.set(xlabel="head", ylabel="layer", title="attention on sinks after the first token")
        axes.figure.colorbar(image, ax=axes, shrink=0.6)


def sink_report(
    weights: Sequence[Float[Array, "B N T T"]],
    rule: SinkRule = SinkRule(),
    *,
    visible: Bool[Array, "*#B T T"] | None = None,
) -> SinkReport:
    """Statistics of the weights of each layer. visible: as in `find_attention_sinks`, for all layers.

    Raises ValueError for no layers, and for weights that are not [B, N, T, T] of one shape.
    """
    shapes = {w.shape for w in weights}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f"weights: needs layers of one shape [B, N, T, T], got {sorted(shapes)}")
    columns = [_columns(w, visible) for w in weights]
    sinks, total = (np.stack(list(part)) for part in ((rule(one) for one in columns), (one.total for one in columns)))
    share = total / np.maximum(total.sum(-1, keepdims=True), np.finfo(np.float32).tiny)  # [L, B, N, T], of all that is seen
    first = np.stack([np.broadcast_to(one.own == 1, shape[:-1]) for one in columns])
    return SinkReport(
        count=sinks.sum(-1).mean(1),
        at=sinks.mean(1),
        first=(share * first).sum(-1).mean(1),
        later=(share * sinks).sum(-1).mean(1),
    )


def _picture(axes: Any) -> None:
    """A map with a sink at column 7, before (left) and after."""
    T = 16
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(T, T))).at[:, 7].add(3.5)
    w = softmax_rows(logits, jnp.tri(T, dtype=bool))[0]
    calibrated = act_calibrate(w, find_attention_sinks(w, SinkRule("abs", 0.4)))
    axes.imshow(jnp.concatenate([w, jnp.full((T, 1), jnp.nan), calibrated], axis=1), cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="key (left: as it was, right: calibrated)", ylabel="query", title="the sink at key 7 keeps beta of its weight"
    )


def _every_other(T: int, S: int) -> CalibratedSoftmax:
    """An example for calls with four heads."""
    return CalibratedSoftmax(jnp.array([True, False] * 2), 0.4, SinkRule("ratio", 1.5))


PAPER = Paper(
    23,
    "act_calibration",
    "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through Attention "
    "Calibration",
    "control",
    builds=(
        SinkRule,
        Columns,
        find_attention_sinks,
        act_calibrate,
        CalibratedSoftmax,
        ACTAttention,
        HeadSelection,
        act_candidates,
        select_act_heads,
        SinkReport,
        sink_report,
    ),
    weights={"every other head": _every_other},
    picture=_picture,
    costs={
        "cache numbers per token": "2 * K * H + 3 * N",
        "weights held by a calibrated layer": "N * T * S",
        "multiply-adds of the calibration": "3 * T * S * N",
    },
    code="GATECH-EIC/ACT",
    notes=(
        "Not a drop-in for training: the sinks of a prompt depend on its end. A layer with a calibrated head runs all its "
        "heads on the dense backend. Ours: rows that see sinks alone stay as they are; decoding finds sinks by running sums "
        "and leaves earlier rows alone; greedy selection. The code leaves out the first column that it finds, which is "
        "another than the first token where that one is no sink: SinkRule(reference_quirk=True). The claim's model has "
        "few sinks, and calibrating them raises nothing."
    ),
)
