"""On the Expressivity Role of LayerNorm in Transformers' Attention (Brody et al., 2023, Findings of ACL 2023, 2305.02582).

LayerNorm before attention is two things, each of which gives attention something. With 1 the vector of D ones:

    proj(x)  = x - (x · 1 / D) 1               onto the hyperplane orthogonal to 1                      (paper §3)
    scale(x) = sqrt(D) x / ||x||               onto the sphere of radius sqrt(D)
    LN(x)    = gain · scale(proj(x)) + bias

(a) Projection: a query q with W_K q = c 1, where k = x W_K, scores every key 0, since x · 1 = 0. So attention can weigh all
    keys alike, 1/S each, as counting a majority needs.                                                  (§4.1)
(b) Scaling: keys of one norm are the corners of their own convex hull, so every one of them can get the largest score
    (q = k_j, by Cauchy-Schwarz). A key inside the hull of the others is "un-select-able": no query scores it highest.  (§4.2)

Key j is un-select-able iff max { t : q · (k_j - k_i) >= t for all i != j, |q| <= 1 } is 0: a linear program in D + 1 variables.
Of 1000 normal keys in 4 dimensions nine in ten are un-select-able.

Costs: D per token; a linear program with S - 1 constraints per key that no quick query selects.

Both statements are about the output without gain and bias, which bring back a component along 1. There is no epsilon under
the root: identities are exact, a vector of zeros stays zeros, and of a constant vector whose mean is rounded the rounding is
scaled to full norm. The majority task and its probe follow the authors' code.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnzoo.errors import unknown
from attnzoo.nn.feed_forward import MLP
from attnzoo.nn.linear import named
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

Known = jax.Array | np.ndarray

SHORT = 1e-12  # norms below this count as this


def project(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """proj(x): x without its mean over features."""
    return x - x.mean(-1, keepdims=True)


def rescale(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """scale(x): x with norm sqrt(D), computed at least in float32; zeros stay zeros."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = (y * y).sum(-1, keepdims=True)
    return (y / jnp.sqrt(jnp.maximum(square, SHORT**2)) * x.shape[-1] ** 0.5).astype(x.dtype)


class FactorizedLayerNorm(nnx.Module):
    """LayerNorm whose two halves can be left out, x [..., D] -> [..., D]; statistics at least in float32, no epsilon.

    do_projection, do_scale: both is LayerNorm, scaling alone RMSNorm, neither the identity (before gain and bias).
    affine: whether it has a gain and a bias.
    legacy_majority_norm: divides by sqrt(D) where scale multiplies, x / (||x|| sqrt(D)), as the authors' majority experiment
        does in its norm without projection.

    Raises ValueError for legacy_majority_norm in any but that norm.
    """

    def __init__(
        self,
        dim: int,
        *,
        do_projection: bool = True,
        do_scale: bool = True,
        affine: bool = True,
        legacy_majority_norm: bool = False,
    ):
        if legacy_majority_norm and (do_projection or not do_scale):
            raise ValueError(
                "legacy_majority_norm: is the norm without projection of the majority experiment; it needs "
                f"do_projection=False and do_scale=True, got {do_projection} and {do_scale}"
            )
        self.do_projection, self.do_scale = do_projection, do_scale
        self.shrink = 1 / dim if legacy_majority_norm else 1.0
        self.gain = nnx.Param(jnp.ones(dim), **named(None)) if affine else None
        self.bias = nnx.Param(jnp.zeros(dim), **named(None)) if affine else None

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = project(y) if self.do_projection else y
        y = rescale(y) * self.shrink if self.do_scale else y
        if self.gain is not None and self.bias is not None:
            y = y * self.gain[...] + self.bias[...]
        return y.astype(x.dtype)


# --- (b): which keys can be selected -----------------------------------------------------------------------


def is_unselectable(keys: Float[Known, "S D"], *, tol: float = 1e-9) -> Bool[np.ndarray, " S"]:
    """Whether no query scores a key above all others by more than `tol`, for queries whose entries are at most 1.

    tol: as a share of the largest entry of the keys around their mean, so that scaling and moving all keys changes nothing.
    A key is called selectable only with a query that selects it. Of equal keys none is selectable. Rounding counts: float32
    keys that should lie in a plane are selectable by what sticks out of it, unless `tol` is larger, as 1e-5.
    Raises ValueError for anything but a matrix with a row, and RuntimeError where a linear program is not solved.
    """
    from scipy.optimize import linprog

    k = np.asarray(keys, np.float64)
    if k.ndim != 2 or not len(k):
        raise ValueError(f"keys: expected [S, D] with S >= 1, got {k.shape}")
    count, dim = k.shape
    k = k - k.mean(0)
    k = k / max(np.abs(k).max(initial=0), np.finfo(np.float64).tiny)
    lost = np.ones(count, bool)
    # Each key itself, and some random queries, select many keys without a linear program.
    quick = np.concatenate([k, np.random.default_rng(0).normal(size=(4096, dim))])
    for q in np.array_split(quick, -(-len(quick) // 1024)):
        q = q / np.maximum(np.abs(q).max(1, keepdims=True), SHORT)
        scores = q @ k.T
        best = scores.argmax(1)
        top = scores[np.arange(len(q)), best].copy()
        scores[np.arange(len(q)), best] = -np.inf
        lost[best[top - scores.max(1) > tol]] = False
    for j in np.flatnonzero(lost):
        ahead = k[j] - np.delete(k, j, 0)
        # max t subject to t - q · ahead_i <= 0
        found = linprog(
            np.append(np.zeros(dim), -1.0),
            A_ub=np.concatenate([-ahead, np.ones((count - 1, 1))], 1),
            b_ub=np.zeros(count - 1),
            bounds=[(-1, 1)] * dim + [(None, None)],
        )
        if not found.success:
            raise RuntimeError(f"keys: the linear program of key {j} was not solved: {found.message}")
        # The solver's own t is only as exact as its tolerance; the query it found is not in doubt.
        lost[j] = (ahead @ found.x[:dim]).min(initial=np.inf) <= tol
    return lost


def unselectable_fraction(keys: Float[Known, "S D"], *, tol: float = 1e-9) -> float:
    """The share of keys that are un-select-able; tol and errors as in `is_unselectable`."""
    return float(is_unselectable(keys, tol=tol).mean())


# --- (a): attention to all keys alike ----------------------------------------------------------------------


def equal_attention_query(w_k: Float[Known, "D H"], c: float = 1.0) -> Float[np.ndarray, " H"]:
    """The query q [H] with W_K q = c 1, for keys k = x W_K: it scores every x with x · 1 = 0 the same, 0.

    Raises ValueError when there is none: 1 must lie in the span of W_K's columns.
    """
    w = np.asarray(w_k, np.float64)
    ones = np.ones(len(w))
    q = np.linalg.lstsq(w, ones, rcond=None)[0]
    error = np.abs(w @ q - ones).max()
    if error > 1e-6:
        raise ValueError(
            f"w_k: no query of width H = {w.shape[1]} makes W_K q the vector of ones (nearest: off by {error:.2g}); "
            f"with H >= D = {len(w)} independent columns there is one"
        )
    return c * q


def projection_angle(x: Float[Array, "*B D"], w_q: Float[Array, "D H"], w_k: Float[Array, "D H"]) -> Float[Array, "*B"]:
    """Degrees in [0, 90] between 1 and the query as keys' inputs meet it, W_K W_Qᵀ x; 0 is equal attention.

    x: what query and key projections are given, q = x W_Q and k = x W_K.
    """
    met = (x @ w_q) @ w_k.T
    size = jnp.sqrt(jnp.maximum((met * met).sum(-1) * met.shape[-1], SHORT**2))
    return jnp.rad2deg(jnp.arccos(jnp.clip(jnp.abs(met.sum(-1)) / size, 0, 1)))


# --- the majority task -------------------------------------------------------------------------------------


MOST_PARTITIONS = 1_000_000


@functools.cache
def leading_partitions(length: int, num_classes: int, min_delta: int) -> Int[np.ndarray, "P C"]:
    """Every way to write `length` as at most `num_classes` falling counts, the first ahead of the second by min_delta.

    The array is shared between calls and cannot be written to.
    Raises ValueError when there is none, for fewer than two classes, and where a million partitions would be gone through.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: needs at least 2, got {num_classes}")
    if not 1 <= min_delta <= length:
        raise ValueError(f"min_delta: no counts of {length} tokens lead by {min_delta}; choose 1 to {length}")
    ways = [1] + [0] * length  # to write 0..length with parts of at most 1, 2, ... num_classes
    for part in range(1, num_classes + 1):
        for n in range(part, length + 1):
            ways[n] += ways[n - part]
    if ways[length] > MOST_PARTITIONS:
        raise ValueError(
            f"length, num_classes: {length} tokens of {num_classes} classes have {ways[length]} partitions, of which at most "
            f"{MOST_PARTITIONS} are listed; choose fewer of either"
        )

    def falling(rest: int, most: int, parts: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(rest,)] if rest <= most else []
        return [
            (n, *tail) for n in range(min(rest, most), -1, -1) if n * parts >= rest for tail in falling(rest - n, n, parts - 1)
        ]

    found = np.array([p for p in falling(length, length, num_classes) if p[0] - p[1] >= min_delta], np.int32)
    found.setflags(write=False)
    return found


def majority_task(
    key: Array, batch: int, *, length: int = 20, num_classes: int = 6, min_delta: int = 3
) -> tuple[Int[Array, "B T"], Int[Array, "B"]]:
    """(tokens, their most frequent class) of random sequences; that class leads by at least `min_delta` tokens.

    Counts are drawn evenly among all partitions of `length` that lead so far, and classes and places at random.
    """
    table = jnp.asarray(leading_partitions(length, num_classes, min_delta))
    of_counts, of_classes, of_places = jax.random.split(key, 3)
    counts = table[jax.random.randint(of_counts, (batch,), 0, len(table))]
    rank = (jnp.arange(length) >= jnp.cumsum(counts, 1)[..., None]).sum(1)
    classes = jnp.argsort(jax.random.uniform(of_classes, (batch, num_classes)), 1)
    tokens = jnp.take_along_axis(classes, rank, 1)
    places = jnp.argsort(jax.random.uniform(of_places, (batch, length)), 1)
    return jnp.take_along_axis(tokens, places, 1), classes[:, 0]


NORMS: dict[str, dict[str, bool]] = {
    "layer": {},
    "no projection": {"do_projection": False},
    "none": {"do_projection": False, "do_scale": False},
}


class MajorityProbe(nnx.Module):
    """tokens [B, T] -> logits [B, T, C]: an embedding, one pre-norm Transformer layer, and the embedding again.

    norm: the one before attention, without gain and bias: "layer", "no projection" or "none". The one before the
        feed-forward network (of width D, with ReLU) is always a whole LayerNorm.
    legacy_majority_norm: as in `FactorizedLayerNorm`, for "no projection".

    Raises ValueError for another norm.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        num_heads: int = 1,
        *,
        norm: str = "layer",
        legacy_majority_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        if norm not in NORMS:
            raise unknown("norm", norm, NORMS)
        table = jax.random.normal(rngs.params(), (num_classes, dim))
        self.table = nnx.Param(table, **named("vocab", "embed"))
        self.attention_norm = FactorizedLayerNorm(dim, affine=False, legacy_majority_norm=legacy_majority_norm, **NORMS[norm])
        self.attention = GroupedQueryAttention(dim, num_heads, rngs=rngs)
        self.norm = FactorizedLayerNorm(dim)
        self.feed_forward = MLP(dim, dim, activation="relu", rngs=rngs)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T C"]:
        x = self.table[...][tokens]
        x = x + self.attention(self.attention_norm(x))
        x = x + self.feed_forward(self.norm(x))
        return x @ self.table[...].T

    def angles(self) -> Float[Array, "C N"]:
        """`projection_angle` of the query of each class and head."""
        x = self.attention_norm(self.table[...])
        kernels = (f.kernel[...] for f in (self.attention.qkv.query, self.attention.qkv.key))
        return jax.vmap(functools.partial(projection_angle, x), in_axes=1, out_axes=1)(*kernels)


def draw_hulls(ax: Any, count: int = 40) -> None:
    """Draws keys in 3 dimensions after the projection, in its plane, and where the scaling puts them."""
    keys = project(jax.random.normal(jax.random.key(0), (count, 3)))
    basis = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])  # of the plane
    flat, scaled = (np.asarray(x) @ basis.T for x in (keys, rescale(keys)))
    lost = is_unselectable(flat)
    for inner, outer in zip(flat, scaled, strict=True):
        ax.plot(*np.stack([inner, outer]).T, color="0.85", linewidth=0.7, zorder=1)
    ax.scatter(*flat[lost].T, color="#d1495b", s=22, label=f"projected: {lost.sum()} un-select-able", zorder=2)
    ax.scatter(*flat[~lost].T, color="#8ecae6", s=22, label=f"projected: {(~lost).sum()} select-able", zorder=2)
    ax.scatter(*scaled.T, color="#126782", s=22, label=f"scaled too: {(~is_unselectable(scaled)).sum()} select-able", zorder=2)
    ax.set(aspect="equal", title=f"{count} keys of width 3 in the plane orthogonal to (1, 1, 1)")
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3, frameon=False)


PAPER = Paper(
    80,
    "ln_expressivity",
    "On the Expressivity Role of LayerNorm in Transformers' Attention",
    "inspect",
    builds=(
        project,
        rescale,
        FactorizedLayerNorm,
        is_unselectable,
        unselectable_fraction,
        equal_attention_query,
        projection_angle,
        leading_partitions,
        majority_task,
        MajorityProbe,
    ),
    picture=draw_hulls,
    costs={
        "multiply-adds of the norm": "2 * T * D",
        "variables of a linear program": "D + 1",
        "constraints of a linear program": "S - 1",
    },
    code="tech-srl/layer_norm_expressivity_role",
    parity="torch.nn.functional.layer_norm with eps = 0, and the factors by torch's normalize, to 1e-5 with gradients",
    notes=(
        "The authors solve the linear programs with Gurobi, with a radius in place of the margin t; here SciPy does, and the "
        "query it finds is checked. The majority sequences are drawn evenly from all partitions that lead far enough, and "
        "shuffled; the authors enumerate partitions in a random order and leave equal tokens together, which attention "
        "without positions cannot tell."
    ),
)
