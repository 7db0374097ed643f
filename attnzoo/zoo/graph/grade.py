"""GraDe (Zhang et al., 2025, Findings of EMNLP 2025, arXiv 2507.18504): tables written by a language model that knows
which columns depend on which.

A row of m features becomes text, its features in random order: [BOS, name, value, name, value, ...]. Most pairs of
features have nothing to say to each other, so attention is biased by a learned, directed graph A in (0, 1)^{m x m}, which
functional dependencies found beforehand guide:

    A = sigmoid(E_1 E_2ᵀ / sqrt(r) + b),  E_1, E_2 [m, r]         A[i, j]: how much feature i depends on feature j
    bias(q, k) = 0 where f(q) = f(k) or either token is special, else lambda log(A[f(q), f(k)] + eps)
    loss = language model + alpha Σ BCE(A, G0) + beta mean(A),    G0[r, l] = 1 where l in Left determines r in Right

f is the feature of a token, its name and its value (the value is predicted at the name). Queries are rows of A: they are
the dependent side. Hard form: every feature keeps its k strongest columns (`FeatureGraphMask`).

Costs: a number per pair of tokens from an m x m table; 2 m r + 1 parameters. Hard: about T² / 2 · (k + 1) / m pairs.

In the hard form A's dropped edges are hidden: the language model's loss says nothing about them, so only the regulariser,
and edges that lose to them, can bring one back.

The authors' code could not be read: that there is a sparse dynamic graph, guided by dependencies and integrated into
attention, is the paper's; the formulas above are this library's way to do it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.core.blocks import EMPTY, FULL, PARTIAL
from attnzoo.core.cells import Bound, Geometry, Known, Operand, concrete
from attnzoo.core.masks import Causal, Mask, mask
from attnzoo.core.masks.positional import as_known
from attnzoo.core.scores import Score
from attnzoo.nn.linear import dropout_arguments, linear, named
from attnzoo.nn.mixer import Mixer
from attnzoo.paper import Paper
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

SPECIAL = -1
Dependency = tuple[Sequence[int], Sequence[int]]
"""(Left, Right): the columns in Left determine those in Right."""


def prior_graph(num_features: int, dependencies: Iterable[Dependency]) -> Float[np.ndarray, "m m"]:
    """G0: row = dependent, column = determinant."""
    prior = np.zeros((num_features, num_features), np.float32)
    for left, right in dependencies:
        if not all(0 <= feature < num_features for feature in (*left, *right)):
            raise ValueError(f"dependencies: features are 0 to {num_features - 1}, got {left} -> {right}")
        prior[np.ix_(right, left)] = 1
    return prior


class FeatureGraph(nnx.Module):
    """The learned graph A, [m, m]; with `dynamic` also one per row of the table, [B, m, m].

    prior: G0 [m, m], kept for the loss; None where no dependencies are known. rank: r, at least 1.
    dynamic: D, the width of embedded tokens, for E_1 + U(mean embedding of a feature's tokens); None for a fixed graph.
    param_dtype: of the parameters; A has it too.
    """

    def __init__(
        self,
        num_features: int,
        prior: Float[Known, "m m"] | None = None,
        rank: int = 8,
        *,
        dynamic: int | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if rank < 1:
            raise ValueError(f"rank: must be at least 1, got {rank}")
        if prior is not None and prior.shape != (num_features, num_features):
            raise ValueError(f"prior: {num_features} features need {(num_features,) * 2}, got {prior.shape}")
        init = nnx.initializers.normal(0.1)
        self.rows = nnx.Param(init(rngs.params(), (num_features, rank), param_dtype), **named(None, None))
        self.columns = nnx.Param(init(rngs.params(), (num_features, rank), param_dtype), **named(None, None))
        self.bias = nnx.Param(jnp.zeros((), param_dtype), **named())
        self.prior: Any = None if prior is None else nnx.Variable(jnp.asarray(prior, jnp.float32))
        self.update: Any = (
            None if dynamic is None else linear(dynamic, rank, ("embed", None), param_dtype=param_dtype, rngs=rngs)
        )

    def __call__(
        self, x: Float[Array, "B T D"] | None = None, features: Int[Known, "B T"] | None = None
    ) -> Float[Array, "*B m m"]:
        """x, features: embedded tokens and what they belong to, for a dynamic graph."""
        rows = self.rows[...]
        if self.update is not None:
            if x is None or features is None or features.shape != x.shape[:2]:
                raise ValueError("x, features: a dynamic graph needs embedded tokens [B, T, D] and their features [B, T]")
            member = (features[:, None, :] == jnp.arange(len(rows))[:, None]).astype(x.dtype)
            mean = member @ x / jnp.maximum(member.sum(-1, keepdims=True), 1)
            rows = rows + self.update(mean)
        logits = rows @ self.columns[...].T / math.sqrt(rows.shape[-1])
        return jax.nn.sigmoid(logits + self.bias[...])


def strongest_columns(graph: Float[Array, "*B m m"], k: int) -> Float[Array, "*B m m"]:
    """1 at the k largest entries of every row, else 0; gradients pass straight through to `graph`."""
    if not 1 <= k <= graph.shape[-1]:
        raise ValueError(f"k: must be from 1 to the {graph.shape[-1]} features, got {k}")
    best = jax.lax.top_k(graph, k)[1]
    kept = jax.nn.one_hot(best, graph.shape[-1], dtype=graph.dtype).sum(-2)
    return graph + jax.lax.stop_gradient(kept - graph)


def _features(name: str, features: Any, g: Geometry, table: Any) -> Any:
    """Features of the tokens [B|1, T], -1 or rows of the table [B|1, m, m]; traced ones are clipped to that."""
    x, m = as_known(features), table.shape[-1]
    if g.queries != g.keys or tuple(x.shape) not in ((g.queries,), (1, g.queries), (g.batch, g.queries)):
        raise ValueError(f"{name}: features has shape {tuple(x.shape)}, but this call has B={g.batch}, T={g.queries}, "
                         f"S={g.keys}; give [T] or [B, T], with T = S")  # fmt: skip
    if isinstance(x, np.ndarray) and x.size and not SPECIAL <= x.min() <= x.max() < m:
        raise ValueError(f"{name}: features are 0 to {m - 1}, or -1 for special tokens; got {x.min()} to {x.max()}")
    return x.clip(SPECIAL, m - 1).reshape(-1, g.queries)


def _table(name: str, table: Any, g: Geometry) -> Any:
    """[m, m] or [B, m, m] -> [1|B, m, m]."""
    if table.ndim not in (2, 3) or table.shape[-1] != table.shape[-2] or (table.ndim == 3 and len(table) not in (1, g.batch)):
        raise ValueError(f"{name}: the graph has shape {tuple(table.shape)}; give [m, m], or [B, m, m] with B={g.batch}")
    return table.reshape(-1, *table.shape[-2:])


def _edges(table: Any, b: Any, q: Any, k: Any) -> Any:
    """table[b, q, k] for features q of rows and k of columns; anything where one is special."""
    return table[b if table.shape[0] > 1 else 0, jnp.maximum(q, 0), jnp.maximum(k, 0)]


@mask(leaves=("graph", "features"))
class GraphGuidedBias(Score):
    """``s + lambda log(A[f(q), f(k)] + eps)`` between different features; special tokens and a feature's own are free.

    graph: A, float ``[m, m]`` or ``[B, m, m]``; gradients reach it. features: f, int ``[T]`` or ``[B, T]``, -1 for special
        tokens; aligned with rows and columns, so T = S.
    strength: lambda. eps: keeps the logarithm finite, at least 0; with 0, absent edges are hidden.

    Raises ValueError for a negative eps, a graph or features of other shapes, and known features that the graph has not.
    """

    graph: Float[Array, "*B m m"]
    features: Int[Known, "*B T"]
    strength: float = 1.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"GraphGuidedBias: eps must be at least 0, got {self.eps}")

    def bind(self, g: Geometry) -> Bound:
        graph = _table("GraphGuidedBias", jnp.asarray(self.graph), g).astype(jnp.float32)
        f = _features("GraphGuidedBias", self.features, g, graph)
        table = jnp.zeros_like(graph)
        if self.strength:
            present = graph + self.eps > 0  # where not, the logarithm has no gradient but NaN
            table = self.strength * jnp.where(present, jnp.log(jnp.where(present, graph + self.eps, 1)), -jnp.inf)
        ops = Operand(f[:, None, :, None], "aligned"), Operand(f[:, None, None, :], "aligned"), Operand(table)

        def apply(s: Any, c: Any, q: Any, k: Any, table: Any) -> Any:
            return s + jnp.where((q == k) | (q == SPECIAL) | (k == SPECIAL), 0.0, _edges(table, c.b, q, k))

        return Bound(ops, apply)

    def __repr__(self) -> str:
        return f"GraphGuidedBias({self.graph.shape[-1]} features)"


@mask(leaves=("edges", "features"))
class FeatureGraphMask(Mask):
    """A token sees its own feature, special tokens, and the features that its own has an edge to.

    edges: bool ``[m, m]`` or ``[B, m, m]``, row = query, such as ``strongest_columns(A, k) > 0``. features: as in
        `GraphGuidedBias`. A language model adds ``Causal() &``.

    Special tokens see everything. Which tiles are empty follows from the features in their rows and columns, exactly.
    """

    edges: Any
    features: Int[Known, "*B T"]

    def bind(self, g: Geometry) -> Bound:
        table = _table("FeatureGraphMask", jnp.asarray(self.edges, bool), g)
        f = _features("FeatureGraphMask", self.features, g, table)
        ops = Operand(f[:, None, :, None], "aligned"), Operand(f[:, None, None, :], "aligned"), Operand(table)
        return Bound(ops, lambda c, q, k, table: (q == k) | (q == SPECIAL) | (k == SPECIAL) | _edges(table, c.b, q, k))

    def tile_states(self, g: Geometry, block_q: int, block_k: int) -> Any:
        edges = _table("FeatureGraphMask", as_known(self.edges), g)
        f = _features("FeatureGraphMask", self.features, g, edges)
        xp: Any = np if isinstance(f, np.ndarray) and isinstance(edges, np.ndarray) else jnp
        m = edges.shape[-1]
        # Feature m stands for special tokens.
        allowed = xp.pad(edges.astype(bool) | np.eye(m, dtype=bool), ((0, 0), (0, 1), (0, 1)), constant_values=True)
        rows, cols = (_feature_sets(xp, f, m, block) for block in (block_q, block_k))

        def pairs(table: Any) -> Any:  # of features of a tile's rows and columns that are in the table
            return xp.matmul(xp.matmul(rows, table.astype(np.int32)), xp.swapaxes(cols, 1, 2))

        some, missing = pairs(allowed), pairs(~allowed)
        state = xp.where(missing == 0, FULL, xp.where(some > 0, PARTIAL, EMPTY)).astype(np.int8)[:, None]
        return state if g.kv_positions is None else xp.minimum(state, np.int8(PARTIAL))

    def __repr__(self) -> str:
        return f"FeatureGraphMask({self.edges.shape[-1]} features)"


def _feature_sets(xp: Any, features: Any, m: int, block: int) -> Any:
    """Which features occur in each block of tokens, ``[B|1, blocks, m + 1]``; the last says whether a special token does."""
    tiles = -(-features.shape[1] // block)
    features = xp.where(features < 0, m, features)
    features = xp.pad(features, ((0, 0), (0, tiles * block - features.shape[1])), constant_values=m + 1)
    return (features.reshape(len(features), tiles, block, 1) == np.arange(m + 1)).any(2).astype(np.int32)


class GraphGuidedAttention(GroupedQueryAttention):
    """Attention that takes its score as the carry, so that all layers share one; x [B, T, D] -> (y, carry).

    carry: a `GraphGuidedBias`, or None for plain attention. options: as in `GroupedQueryAttention`. Does not decode: the
    features of what is to come would have to be cached too.
    """

    decodes = False
    crosses = False
    carries = True

    def __call__(  # type: ignore[override]
        self, x: Float[Array, "B T D"], *, carry: PyTree = None, mask: Any = None, positions: Any = None
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        o = self._attend(x, mask, positions, None, score=carry, **dropout_arguments(self.dropout))
        return self.merge(o, x), carry

    def attention_weights(  # type: ignore[override]
        self, x: Float[Array, "B T D"], *, carry: PyTree = None, mask: Any = None, positions: Any = None
    ) -> Float[Array, "B N T T"]:
        """The weights of the same call, in float32 and before dropout."""
        return self._attend(x, mask, positions, None, score=carry, return_weights=True)[1]

    init_cache = Mixer.init_cache  # type: ignore[assignment]
    prefill = Mixer.prefill  # type: ignore[assignment]


def grade_regularizer(
    graph: Float[Array, "*B m m"],
    prior: Float[Known, "m m"] | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.01,
    covered_only: bool = False,
) -> Float[Array, ""]:
    """alpha BCE(A, G0) + beta mean(A): towards the known dependencies, and sparse.

    The cross-entropy is summed over pairs of features: averaged, it would drown in what the language model's loss says.
    prior: G0, or None where none are known (then alpha is 0). covered_only: cross-entropy of G0's ones alone.
    """
    sparsity = beta * graph.mean()
    if prior is None:
        return sparsity
    if prior.shape != graph.shape[-2:]:
        raise ValueError(f"prior: a graph {graph.shape} needs {graph.shape[-2:]}, got {prior.shape}")
    tiny = jnp.finfo(graph.dtype).eps
    present, absent = (jnp.log(jnp.maximum(p, tiny)) for p in (graph, 1 - graph))
    entropy = -(prior * present + (1 - prior) * absent)
    counted = jnp.broadcast_to(jnp.asarray(prior, bool) | (not covered_only), entropy.shape)
    return alpha * jnp.where(counted, entropy, 0).sum((-2, -1)).mean() + sparsity


def random_orders(key: Array, count: int, num_features: int) -> Int[Array, "R m"]:
    """An order of the features for every row of a table."""
    return jnp.argsort(jax.random.uniform(key, (count, num_features)))


def serialize_rows(table: Int[Array, "R m"], orders: Int[Array, "R m"]) -> tuple[Int[Array, "R T"], Int[Array, "R T"]]:
    """(tokens, features), T = 1 + 2 m: BOS, then name and value of every feature in the order given.

    table: values 0, 1, ... Tokens: 0 is BOS, 1 + i the name of feature i, 1 + m + v the value v of any feature.
    orders: a permutation of 0, ..., m - 1 per row. Raises ValueError for shapes that do not fit, and for known values below
        0 and known orders that are no permutations.
    """
    if table.ndim != 2 or table.shape != orders.shape:
        raise ValueError(f"orders: a table [R, m] needs one order per row, got {table.shape} and {orders.shape}")
    count, m = table.shape
    known = concrete(table)
    if known is not None and known.size and known.min() < 0:
        raise ValueError(f"table: values count from 0, got {known.min()}")
    if (order := concrete(orders)) is not None and (np.sort(order, axis=1) != np.arange(m)).any():
        raise ValueError(f"orders: every row must be a permutation of 0 to {m - 1}")
    values = 1 + m + jnp.take_along_axis(jnp.asarray(table), orders, 1)
    start = ((0, 0), (1, 0))
    tokens = jnp.stack([1 + orders, values], -1).reshape(count, 2 * m)
    return jnp.pad(tokens, start), jnp.pad(jnp.repeat(orders, 2, 1), start, constant_values=SPECIAL)


def find_functional_dependencies(table: Int[Known, "R m"], *, min_support: float = 2.0) -> list[Dependency]:
    """All X -> Y between single columns: every value of X goes with one value of Y. Use training rows only.

    min_support: rows per value of X, on average, that it takes; a column whose values are all different would determine
        every other. Raises ValueError for a table without rows.
    """
    rows = np.asarray(table)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"table: needs rows [R, m] with R at least 1, got {rows.shape}")
    found: list[Dependency] = []
    for x, y in itertools.permutations(range(rows.shape[1]), 2):
        pairs = np.unique(rows[:, [x, y]], axis=0)
        values = len(np.unique(rows[:, x]))
        if len(pairs) == values and len(rows) >= min_support * values:
            found.append(((x,), (y,)))
    return found


def fd_violation(table: Int[Known, "R m"], dependency: Dependency) -> float:
    """The share of rows whose Right differs from the commonest Right of their Left."""
    left, right = (np.unique(np.asarray(table)[:, list(side)], axis=0, return_inverse=True)[1] for side in dependency)
    counts = np.zeros((left.max() + 1, right.max() + 1), int)
    np.add.at(counts, (left.ravel(), right.ravel()), 1)
    return 1 - counts.max(1).sum() / len(left)


def _columns(T: int) -> np.ndarray:
    """A special token, then six features of a few tokens each."""
    return np.where(np.arange(T) == 0, SPECIAL, np.array([3, 0, 5, 1, 4, 2])[np.arange(T) * 6 // T]).astype(np.int32)


def _graph(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 1, (6, 6)).astype(np.float32)


PAPER = Paper(
    46,
    "grade",
    "Not All Features Deserve Attention: Graph-Guided Dependency Learning for Tabular Data Generation with Language Models",
    "graph",
    builds=(
        prior_graph,
        FeatureGraph,
        strongest_columns,
        GraphGuidedBias,
        FeatureGraphMask,
        GraphGuidedAttention,
        grade_regularizer,
        random_orders,
        serialize_rows,
        find_functional_dependencies,
        fd_violation,
        "attnzoo.models.grade:GraDeLM",
    ),
    masks={
        "two strongest columns": lambda T, S: FeatureGraphMask(
            np.asarray(strongest_columns(jnp.asarray(_graph(0)), 2)) > 0.5, _columns(T)
        ),
        "causal": lambda T, S: Causal() & FeatureGraphMask(_graph(0) > 0.8, _columns(T)),
    },
    scores={"random graph": lambda T, S: GraphGuidedBias(jnp.asarray(_graph(1)), _columns(T))},
    costs={
        "parameters of the graph, m features of rank r": "2 * m * r + 1",
        "pairs of the hard form, k columns kept": "T ** 2 / 2 * (k + 1) / m",
    },
    parity="none: the authors' code could not be read",
    notes=(
        "The formulas are this library's choice, consistent with the paper's abstract. The language model uses one graph for "
        "all rows: a graph made from a row's own tokens, as FeatureGraph's dynamic part makes it, would show a causal model "
        "the value it is to predict. In the claim, the number of steps, the summed cross-entropy and the margin were "
        "settled after a look at seeds 0 and 1, where the graph seemed to decide. With fresh seeds, 2 and 3, the plain model "
        "has learned the dependencies too by then, and the two cannot be told apart."
    ),
)
