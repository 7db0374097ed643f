"""CausalLM is not optimal for in-context learning (Ding et al., 2023, ICLR 2024, arXiv 2308.06912).

What a prompt's examples (x_i in R^d, y_i) teach depends on who sees whom. Tokens z_j = (x_j, d_j) hold d_j = y_j for the n
examples and 0 for the queries behind them. With K = diag(I, 0) and V = diag(0, 1), a layer of linear attention

    z_j = z_j - (eta / n) Σ_{i in A(j)} (K z_i · K z_j) V z_i                                                    (§3)

is a step of gradient descent on in-context linear regression, d_j = y_j - w x_j. Which, the mask says:

    prefix  A(j) = {1..n}:            w   = w + (eta / n) Σ_{i <= n} (y_i - w x_i) x_i
    causal  A(j) = {i <= min(j, n)}:  w_j = w_j + (eta / n) Σ_{i <= j} (y_i - w_i x_i) x_i;   queries use w_n

Both read their prediction w x off as -d. Where the layers lead (§4):

    prefix  least squares, the solution of least norm
    causal  w_j = w_{j-1} + (y_j - w_{j-1} x_j) x_j / |x_j|²: one pass of online learning. Each w_j only fits example j
            exactly; the last one is not the optimum, however many layers there are

Prefix contracts by |I - (eta / n) XᵀX| on the span of the examples; causal by max_j |1 - eta |x_j|² / n| in the long run,
but its matrix is triangular and far from normal, so errors may grow first.

Costs: both masks take the same pairs up to the n² of the examples; decoding is that of a causal model, once the prefix was
read in one call (a causal model takes `PrefixLMMask` in its calls and in prefill). Layers go through the attention engine, so
they are quadratic, although without a softmax they need not be.

Construction and recursions follow the paper and its code; the code's softmax variant has logits -|q - k|² / 2 instead of
q·k, which `rbf_key_bias` gives.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnzoo.core.masks import Causal, Instead, Mask, Prefix
from attnzoo.core.weights import Elementwise
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention


def PrefixLMMask(prefix_len: int | Int[Array, "B"]) -> Mask:
    """The first prefix_len positions are visible to all, the rest is causal: ``Causal() | Prefix(prefix_len)``.

    As `Instead`: a causal model takes it in place of its own mask.
    """
    return Instead(Causal() | Prefix(prefix_len))


def ICLPrefixMask(n: int | Int[Array, "B"]) -> Mask:
    """Everyone sees the n examples, and nothing else: queries see neither each other nor themselves. `Prefix(n)`."""
    return Prefix(n)


def ICLCausalMask(n: int | Int[Array, "B"]) -> Mask:
    """Everyone sees the examples up to its own place: ``Prefix(n) & Causal()``."""
    return Prefix(n) & Causal()


def _identity(s: Array) -> Array:
    return s


class LinearSelfAttention(GroupedQueryAttention):
    """Attention whose weights are the logits, Σ_i (q_j · k_i) v_i, with no softmax and no scale; x [B, T, D] -> [B, T, D].

    options: as in `GroupedQueryAttention`.
    """

    def attention_arguments(self) -> dict[str, Any]:
        return {**super().attention_arguments(), "weights": Elementwise(_identity), "scale": 1.0}


class LSAWeights(NamedTuple):
    """Square maps of tokens z [d + 1], applied as z @ W; `out` holds the step."""

    query: Float[Array, "D D"]
    key: Float[Array, "D D"]
    value: Float[Array, "D D"]
    out: Float[Array, "D D"]


def lsa_gd_weights(d: int, n: int, eta: float = 1.0) -> LSAWeights:
    """The weights with which a layer of one head does a step of gradient descent: K, K, V, and -(eta / n) I.

    Raises ValueError unless d and n are at least 1.
    """
    if d < 1 or n < 1:
        raise ValueError(f"d, n: must be at least 1, got {d} and {n}")
    inputs = jnp.diag(jnp.append(jnp.ones(d), 0.0))
    whole = jnp.eye(d + 1)
    return LSAWeights(inputs, inputs, whole - inputs, -eta / n * whole)


def gradient_descent_layer(d: int, n: int, eta: float = 1.0) -> LinearSelfAttention:
    """A `LinearSelfAttention` that holds `lsa_gd_weights`; to be added to its input."""
    layer = LinearSelfAttention(d + 1, 1, rngs=nnx.Rngs(0))
    weights = lsa_gd_weights(d, n, eta)
    for name in ("query", "key", "value"):
        getattr(layer.qkv, name).kernel[...] = getattr(weights, name)[:, None, :]
    layer.out.kernel[...] = weights.out[None]
    return layer


def icl_tokens(x: Float[Array, "*B n d"], y: Float[Array, "*B n"], queries: Float[Array, "*B m d"]) -> Float[Array, "..."]:
    """z [*B, n + m, d + 1]: the examples with their y, the queries with 0; as floats, of one dtype."""
    x, y, queries = _problem(x, y, queries)
    targets = jnp.concatenate([y, jnp.zeros(queries.shape[:-1], y.dtype)], -1)
    return jnp.concatenate([jnp.concatenate([x, queries], -2), targets[..., None]], -1)


def _problem(x: Array, y: Array, queries: Array | None = None) -> tuple[Array, ...]:
    """The arrays as floats of one dtype, float32 or wider, after a look at their shapes."""
    fits = x.ndim >= 2 and x.shape[-2] >= 1 and y.shape == x.shape[:-1]
    if queries is not None:
        fits = fits and queries.shape[:-2] + queries.shape[-1:] == x.shape[:-2] + x.shape[-1:]
    arrays = [x, y] if queries is None else [x, y, queries]
    if not fits:
        raise ValueError(
            "x, y, queries: needed are [..., n, d], [..., n] and [..., m, d] with n at least 1, got "
            + ", ".join(str(a.shape) for a in arrays)
        )
    dtype = jnp.result_type(*arrays, jnp.float32)
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def prefix_icl_recursion(
    x: Float[Array, "*B n d"], y: Float[Array, "*B n"], steps: int, eta: float = 1.0
) -> Float[Array, "L *B d"]:
    """w after each of `steps` prefix layers, from w = 0: gradient descent on all examples."""
    x, y = _problem(x, y)

    def step(w: Array, _: None) -> tuple[Array, Array]:
        residual = y - jnp.einsum("...nd,...d->...n", x, w)
        w = w + eta / x.shape[-2] * jnp.einsum("...n,...nd->...d", residual, x)
        return w, w

    return jax.lax.scan(step, jnp.zeros_like(x[..., 0, :]), None, length=steps)[1]


def causal_icl_recursion(
    x: Float[Array, "*B n d"], y: Float[Array, "*B n"], steps: int, eta: float = 1.0
) -> Float[Array, "L *B n d"]:
    """w_1, ..., w_n after each of `steps` causal layers, from 0: example i is corrected by its own w_i. Queries use w_n."""
    return _causal_recursion(x, y, steps, eta, lambda w: w)


def _causal_recursion(x: Array, y: Array, steps: int, eta: float, keep: Callable[[Array], Array]) -> Array:
    """What `keep` takes of w_1, ..., w_n after each layer."""
    x, y = _problem(x, y)

    def step(w: Array, _: None) -> tuple[Array, Array]:
        residual = y - jnp.einsum("...nd,...nd->...n", x, w)
        w = w + eta / x.shape[-2] * jnp.cumsum(residual[..., None] * x, -2)
        return w, keep(w)

    return jax.lax.scan(step, jnp.zeros_like(x), None, length=steps)[1]


def prefix_stationary(x: Float[Array, "*B n d"], y: Float[Array, "*B n"]) -> Float[Array, "*B d"]:
    """Where prefix layers lead: least squares, of least norm where there are fewer examples than dimensions."""
    x, y = _problem(x, y)
    return jnp.einsum("...dn,...n->...d", jnp.linalg.pinv(x), y)


def causal_stationary(x: Float[Array, "*B n d"], y: Float[Array, "*B n"]) -> Float[Array, "*B n d"]:
    """Where causal layers lead: w_1, ..., w_n of one pass of online learning with steps 1 / |x_j|² (Kaczmarz)."""
    x, y = _problem(x, y)

    def step(w: Array, example: tuple[Array, Array]) -> tuple[Array, Array]:
        x, y = example
        norm = (x * x).sum(-1)
        residual = (y - (w * x).sum(-1)) / jnp.where(norm > 0, norm, 1)
        w = w + residual[..., None] * x
        return w, w

    examples = jnp.moveaxis(x, -2, 0), jnp.moveaxis(y, -1, 0)
    return jnp.moveaxis(jax.lax.scan(step, jnp.zeros_like(x[..., 0, :]), examples)[1], 0, -2)


@dataclasses.dataclass(frozen=True)
class ICLGap:
    """Mean squared error at the queries, at the stationary points and, if asked for, after each layer [L]."""

    prefix: float
    causal: float
    prefix_by_layer: Float[Array, "L"]
    causal_by_layer: Float[Array, "L"]

    @property
    def ratio(self) -> float:
        """How many times as large the causal error is; infinite where a prefix leaves none."""
        return self.causal / self.prefix if self.prefix else math.inf

    def plot(self, ax: Any) -> Any:
        """The errors over layers on matplotlib axes, with their limits dotted; returns the axes."""
        for name, colour in (("prefix", "tab:blue"), ("causal", "tab:red")):
            errors = getattr(self, f"{name}_by_layer")
            ax.semilogy(range(1, len(errors) + 1), errors, color=colour, label=name)
            ax.axhline(getattr(self, name), color=colour, linestyle=":")
        ax.set(xlabel="layers", ylabel="squared error at the queries")
        ax.legend()
        return ax


def icl_gap(
    x: Float[Array, "*B n d"],
    y: Float[Array, "*B n"],
    queries: Float[Array, "*B m d"],
    targets: Float[Array, "*B m"],
    *,
    steps: int = 0,
    eta: float = 1.0,
) -> ICLGap:
    """How much worse in-context regression is under a causal than under a prefix mask.

    steps: layers to follow, none by default. eta: their step; prefix layers need eta · lambda_max(XᵀX) / n < 2.
    """
    if targets.shape != queries.shape[:-1]:
        raise ValueError(f"targets: queries {queries.shape} need {queries.shape[:-1]}, got {targets.shape}")
    x, y, queries = _problem(x, y, queries)

    def error(w: Array) -> Array:
        return ((jnp.einsum("...md,...d->...m", queries, w) - targets) ** 2).mean(range(-targets.ndim, 0))

    return ICLGap(
        float(error(prefix_stationary(x, y))),
        float(error(causal_stationary(x, y)[..., -1, :])),
        error(prefix_icl_recursion(x, y, steps, eta)),
        error(_causal_recursion(x, y, steps, eta, lambda w: w[..., -1, :])),
    )


def rbf_key_bias(k: Float[Array, "*B S K H"], num_heads: int) -> Float[Array, "*B N 1 S"]:
    """The `bias=` that makes softmax attention weigh by distance: softmax(-|q' - k|² / 2) with q' = scale · q.

    It is -|k|² / 2: the -|q'|² / 2 that is missing is the same for all keys. scale is what `attention` multiplies q·k by,
    H^-0.5 by default. num_heads: N, of the queries. Raises ValueError unless K divides it.
    """
    if num_heads < 1 or num_heads % k.shape[-2]:
        raise ValueError(f"num_heads: must be a multiple of the {k.shape[-2]} heads of k {k.shape}, got {num_heads}")
    bias = -0.5 * (k.astype(jnp.float32) ** 2).sum(-1)
    return jnp.repeat(jnp.moveaxis(bias, -1, -2), num_heads // k.shape[-2], -2)[..., None, :]


def _picture(axes: Any) -> None:
    """Errors over layers for 64 problems of 40 examples in 16 dimensions."""
    x, queries, w, noise = (
        jax.random.uniform(jax.random.key(0), (64, 40, 16), minval=-1),
        jax.random.uniform(jax.random.key(1), (64, 50, 16), minval=-1),
        jax.random.normal(jax.random.key(2), (64, 16, 1)),
        0.1 * jax.random.normal(jax.random.key(3), (64, 40)),
    )
    icl_gap(x, (x @ w)[..., 0] + noise, queries, (queries @ w)[..., 0], steps=300, eta=1.5).plot(axes)


PAPER = Paper(
    101,
    "causallm_icl",
    "CausalLM is not optimal for in-context learning",
    "inspect",
    builds=(
        PrefixLMMask,
        ICLPrefixMask,
        ICLCausalMask,
        LinearSelfAttention,
        lsa_gd_weights,
        gradient_descent_layer,
        icl_tokens,
        prefix_icl_recursion,
        causal_icl_recursion,
        prefix_stationary,
        causal_stationary,
        icl_gap,
        rbf_key_bias,
    ),
    mixer=LinearSelfAttention,
    masks={
        "prefix language model": lambda T, S: PrefixLMMask(T // 3),
        "examples seen by all": lambda T, S: ICLPrefixMask(2 * T // 3),
        "examples seen causally": lambda T, S: ICLCausalMask(2 * T // 3),
    },
    weights={"linear": lambda T, S: Elementwise(_identity)},
    picture=_picture,
    costs={
        "pairs of a prefix of n tokens": "T * (T + 1) / 2 + n * (n - 1) / 2",
        "cache numbers per token": "2 * K * H",
    },
    code="google-research/causallm_icl",
    parity="none installable: layers, recursions and stationary points are compared with each other and with numpy",
    notes=(
        "Logits of the engine are float32, so the layers agree with the float64 recursions to about 1e-6, the recursions with "
        "the written sums to 1e-12. The masks are compositions of the core's. The paper's trained transformers are not built; "
        "mas (34) learns with a causal and with a prefix mask."
    ),
)
