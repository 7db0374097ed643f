"""Generation through caches: greedy, sampling, beam search.

Each function takes a model with `init_cache`, `prefill`, `step` and `reorder_cache` (`DecoderLM`, or
`Transformer` with a cache that holds its source), runs it without dropout, and compiles once per model
structure and shapes. They may also be called inside jit.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated.

    tokens: without the prompt; pad_id after the end.
    lengths: how many of them were generated, the end of sequence included.
    scores: log-probability of the generated tokens under the model; beam search divides it by the length
        penalty.
    """

    tokens: Int[Array, "B max_new"]
    lengths: Int[Array, "B"]
    scores: Float[Array, "B"]


def greedy(
    model: nnx.Module,
    prompt: Int[Array, "B P"],
    *,
    max_new: int,
    lengths: Int[Array, "B"] | None = None,
    cache: PyTree = None,
    mask: Any = None,
    eos_id: int | None = None,
    pad_id: int = 0,
) -> Generated:
    """The most probable token at every step, of equals the lowest id.

    max_new: tokens to generate at most; generation stops when every row has produced eos_id.
    lengths: real tokens of right-padded prompts.
    cache: as `model.init_cache` gives it, with room for P + max_new tokens; needed by models that have a
        source. By default an empty one is made.
    mask: of the prompt, for a model whose prefill takes one (`core.masks.Instead(Causal() | Prefix(P))` for a prefix language
        model).
    """
    _check(prompt, max_new)
    graphdef, state = _evaluating(model)
    static = {"max_new": max_new, "eos_id": eos_id, "pad_id": pad_id}
    return _generate(graphdef, state, prompt, lengths, cache, mask, None, 1.0, None, top_k=None, **static)


def sample(
    model: nnx.Module,
    prompt: Int[Array, "B P"],
    rng: Array,
    *,
    max_new: int,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    lengths: Int[Array, "B"] | None = None,
    cache: PyTree = None,
    mask: Any = None,
    eos_id: int | None = None,
    pad_id: int = 0,
) -> Generated:
    """Tokens drawn from softmax(logits / temperature), restricted first by top_k, then by top_p.

    rng: a JAX random key; the same key gives the same tokens.
    top_k: only the k most probable tokens. top_p: only the most probable tokens whose probabilities sum to at
        least p (Holtzman et al. 2020, arXiv 1904.09751); the first is always among them.
    Others as in `greedy`. Raises ValueError for temperature <= 0, top_k < 1 or top_p outside (0, 1].
    """
    _check(prompt, max_new)
    for name, value, ok in (
        ("temperature", temperature, lambda x: x > 0),
        ("top_k", top_k, lambda x: x >= 1),
        ("top_p", top_p, lambda x: 0 < x <= 1),
    ):
        if isinstance(value, int | float) and not ok(value):
            raise ValueError(f"{name}: {value} is out of range (temperature > 0, top_k >= 1, 0 < top_p <= 1)")
    graphdef, state = _evaluating(model)
    static = {"max_new": max_new, "eos_id": eos_id, "pad_id": pad_id}
    return _generate(graphdef, state, prompt, lengths, cache, mask, rng, temperature, top_p, top_k=top_k, **static)


def beam_search(
    model: nnx.Module,
    prompt: Int[Array, "B P"],
    *,
    max_new: int,
    eos_id: int,
    beam_size: int = 4,
    alpha: float = 0.6,
    lengths: Int[Array, "B"] | None = None,
    cache: PyTree = None,
    mask: Any = None,
    pad_id: int = 0,
) -> Generated:
    """The best of `beam_size` hypotheses by log-probability / ((5 + length) / 6)^alpha.

    A hypothesis finishes when eos_id ranks among the beam_size best continuations; a row stops when no live
    one can still beat the worst of beam_size finished ones. Returns the best finished hypothesis, or the best
    live one where none finished within max_new tokens. One beam with alpha = 0 is `greedy`.
    Others as in `greedy`. Raises ValueError for beam_size < 1 or alpha < 0.

    Source: Vaswani et al. 2017, §6.1; the length penalty is Wu et al. 2016 (arXiv 1609.08144), eq. 14.
    """
    _check(prompt, max_new)
    if beam_size < 1 or alpha < 0:
        raise ValueError(f"beam_size, alpha: need beam_size >= 1 and alpha >= 0, got {beam_size} and {alpha}")
    graphdef, state = _evaluating(model)
    static = {"max_new": max_new, "eos_id": eos_id, "pad_id": pad_id, "beam_size": beam_size}
    return _beam_search(graphdef, state, prompt, lengths, cache, mask, alpha, **static)


def _check(prompt: Array, max_new: int) -> None:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt: expected tokens [B, P] with P >= 1, got {prompt.shape}")
    if max_new < 1:
        raise ValueError(f"max_new: must be at least 1, got {max_new}")


def _evaluating(model: nnx.Module) -> tuple[Any, Any]:
    """The model in eval mode, split; the caller's keeps its mode."""
    copy = nnx.merge(*nnx.split(model))
    copy.eval()
    return nnx.split(copy)


def _prefill(model: Any, prompt: Array, lengths: Array | None, cache: PyTree, mask: Any, max_new: int) -> tuple[Array, PyTree]:
    """Logits [B, V] after each row's last real token, and the cache."""
    batch, length = prompt.shape
    if cache is None:
        cache = model.init_cache(batch, length + max_new)
    logits, cache = model.prefill(prompt, cache, lengths, **({} if mask is None else {"mask": mask}))
    last = jnp.full(batch, length - 1) if lengths is None else lengths - 1
    return logits[jnp.arange(batch), last], cache


def _restrict(logits: Array, top_k: int | None, top_p: ArrayLike | None) -> Array:
    """-inf for the tokens that may not be drawn."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][:, -1:], -jnp.inf, logits)
    if top_p is not None:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        p = jax.nn.softmax(ranked)
        within = jnp.cumsum(p, axis=-1) - p < top_p  # what comes before it does not yet reach top_p
        logits = jnp.where(logits < jnp.min(ranked, axis=-1, where=within, initial=jnp.inf, keepdims=True), -jnp.inf, logits)
    return logits


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new", "eos_id", "pad_id", "top_k"))
def _generate(
    graphdef: Any,
    state: Any,
    prompt: Array,
    lengths: Array | None,
    cache: PyTree,
    mask: Any,
    rng: Array | None,
    temperature: ArrayLike,
    top_p: ArrayLike | None,
    *,
    top_k: int | None,
    max_new: int,
    eos_id: int | None,
    pad_id: int,
) -> Generated:
    batch = prompt.shape[0]

    def choose(i: Array | int, logits: Array) -> tuple[Array, Array]:
        """The next token of each row and its log-probability."""
        if rng is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            allowed = _restrict(logits / temperature, top_k, top_p)
            token = jax.random.categorical(jax.random.fold_in(rng, i), allowed)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        return token.astype(prompt.dtype), log_p

    def record(i: Array | int, logits: Array, made: Generated, done: Array) -> tuple[Array, Generated, Array]:
        token, log_p = choose(i, logits)
        token = jnp.where(done, pad_id, token)
        made = Generated(
            made.tokens.at[:, i].set(token),
            made.lengths + ~done,
            made.scores + jnp.where(done, 0, log_p),
        )
        return token, made, done if eos_id is None else done | (token == eos_id)

    def body(loop: tuple) -> tuple:
        i, cache, token, made, done = loop
        logits, cache = nnx.merge(graphdef, state).step(token[:, None], cache)
        return i + 1, cache, *record(i, logits[:, 0], made, done)

    logits, cache = _prefill(nnx.merge(graphdef, state), prompt, lengths, cache, mask, max_new)
    made = Generated(jnp.full((batch, max_new), pad_id, prompt.dtype), jnp.zeros(batch, jnp.int32), jnp.zeros(batch))
    first = record(0, logits, made, jnp.zeros(batch, bool))
    loop = (jnp.int32(1), cache, *first)
    *_, made, _ = jax.lax.while_loop(lambda s: (s[0] < max_new) & ~jnp.all(s[-1]), body, loop)
    return made


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Beams:
    """W live hypotheses per row, and the W best finished ones (score -inf where there is none)."""

    tokens: Int[Array, "B W max_new"]
    log_p: Float[Array, "B W"]
    done_tokens: Int[Array, "B W max_new"]
    done_lengths: Int[Array, "B W"]
    done_scores: Float[Array, "B W"]


def _take(values: Array, index: Int[Array, "B M"]) -> Array:
    """values[b, index[b, m]]"""
    return values[jnp.arange(index.shape[0])[:, None], index]


def _extend(
    beams: _Beams, i: Array | int, logits: Float[Array, "B W V"], penalty: Array, eos_id: int
) -> tuple[_Beams, Int[Array, "B W"]]:
    """Hypotheses one token longer, and which live one each new live one continues."""
    width, classes = logits.shape[1:]
    log_p = beams.log_p[..., None] + jax.nn.log_softmax(logits)
    # At most W of the candidates end, so 2W always leave W that go on.
    best, index = jax.lax.top_k(log_p.reshape(len(log_p), -1), min(2 * width, width * classes))
    parent, token = index // classes, index % classes
    tokens = _take(beams.tokens, parent).at[:, :, i].set(token.astype(beams.tokens.dtype))
    ends = token == eos_id

    # An end that ranks below the beam is no hypothesis of the search: with one beam it would beat greedy's.
    finishes = ends & (jnp.arange(token.shape[1]) < width)
    scores = jnp.where(finishes, best / penalty, -jnp.inf)
    done_scores, kept = jax.lax.top_k(jnp.concatenate([beams.done_scores, scores], axis=1), width)
    done_tokens = _take(jnp.concatenate([beams.done_tokens, tokens], axis=1), kept)
    lengths = jnp.concatenate([beams.done_lengths, jnp.full(token.shape, i + 1, jnp.int32)], axis=1)

    live_log_p, live = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), width)
    beams = _Beams(_take(tokens, live), live_log_p, done_tokens, _take(lengths, kept), done_scores)
    return beams, _take(parent, live)


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new", "eos_id", "pad_id", "beam_size"))
def _beam_search(
    graphdef: Any,
    state: Any,
    prompt: Array,
    lengths: Array | None,
    cache: PyTree,
    mask: Any,
    alpha: Array,
    *,
    max_new: int,
    eos_id: int,
    pad_id: int,
    beam_size: int,
) -> Generated:
    batch = prompt.shape[0]
    rows = jnp.arange(batch)[:, None] * beam_size

    def penalty(length: Array | int) -> Array:
        return ((5.0 + length) / 6.0) ** alpha

    def going_on(loop: tuple) -> Array:
        i, _, beams = loop
        reachable = beams.log_p.max(axis=1) / penalty(max_new)
        return (i < max_new) & jnp.any(reachable >= beams.done_scores.min(axis=1))

    def body(loop: tuple) -> tuple:
        i, cache, beams = loop
        model = nnx.merge(graphdef, state)
        last = jax.lax.dynamic_index_in_dim(beams.tokens, i - 1, axis=2, keepdims=False)
        logits, cache = model.step(last.reshape(-1, 1), cache)
        beams, parent = _extend(beams, i, logits.reshape(batch, beam_size, -1), penalty(i + 1), eos_id)
        return i + 1, model.reorder_cache(cache, (rows + parent).reshape(-1)), beams

    model = nnx.merge(graphdef, state)
    logits, cache = _prefill(model, prompt, lengths, cache, mask, max_new)
    cache = model.reorder_cache(cache, jnp.repeat(jnp.arange(batch), beam_size))
    logits = jnp.broadcast_to(logits[:, None], (batch, beam_size, logits.shape[-1]))

    empty = jnp.full((batch, beam_size, max_new), pad_id, prompt.dtype)
    minus = jnp.full((batch, beam_size), -jnp.inf)
    # All hypotheses are equal at first, so only one is live.
    beams = _Beams(empty, minus.at[:, 0].set(0.0), empty, jnp.zeros((batch, beam_size), jnp.int32), minus)
    beams, _ = _extend(beams, 0, logits, penalty(1), eos_id)
    steps, _, beams = jax.lax.while_loop(going_on, body, (jnp.int32(1), cache, beams))

    finished = beams.done_scores[:, 0] > -jnp.inf
    return Generated(
        jnp.where(finished[:, None], beams.done_tokens[:, 0], beams.tokens[:, 0]),
        jnp.where(finished, beams.done_lengths[:, 0], steps),
        jnp.where(finished, beams.done_scores[:, 0], beams.log_p[:, 0] / penalty(steps)),
    )
