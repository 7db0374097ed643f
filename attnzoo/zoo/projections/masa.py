"""Share Your Attention (Zhussip et al., 2025, AAAI 2026, arXiv 2508.04581): matrix atom sharing, MASA.

The L layers of a transformer share S < L matrices, its atoms, for each projection p in {Q, K, V, O}; a layer's own matrix is a
linear combination of them. Attention itself is untouched.

    W_l^p = Σ_s C^p[l, s] D^p[s],    D^p [S, d, h] atoms,  C^p [L, S] coefficients                     (paper eq. 1)

Coefficients are free: no softmax, no sparsity. While training they come from layer embeddings e_l through a 3-layer MLP, which
is evaluated once afterwards and dropped. One-hot coefficients are older ways of sharing: blocks of consecutive layers
(`SequentialSharing`), or layer l uses matrix l mod S (`RepeatAllOver`).

Without training, from matrices W_l that are there: the best atoms for Σ_l ||W_l - Σ_s c_ls D_s||² are the top left singular
vectors of [vec W_1 ... vec W_L], with c_ls = tr(D_sᵀ W_l) (eq. 2 and 3: `matrix_pca`); layers are grouped where the
predictions of consecutive ones drift apart (`group_blocks_by_kl`), a dictionary per group; and what is missing, dW_l, is
added back at a low rank that is best for the layer's inputs X: with XᵀX = A Aᵀ, the truncated SVD of Aᵀ dW_l, un-whitened by
A⁻ᵀ (eq. 4: `local_refinement`).

Costs: S d h + L S numbers per projection instead of L d h; L S d h multiply-adds per step to build the matrices, whatever the
number of tokens. The cache is unchanged.

From the paper: equations, S = L / 3, the MLP with embeddings. Its sizes (64), the initialisation and how ranks are allotted
are ours. The networks are in `attnzoo.models.masa`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from attnzoo.nn.linear import linear, named
from attnzoo.paper import Paper


def compression_rate(num_layers: int, num_atoms: int, rows: int, columns: int) -> float:
    """r = 1 - S (d h + L) / (L d h), the share of a projection's parameters that sharing saves."""
    return 1 - num_atoms * (rows * columns + num_layers) / (num_layers * rows * columns)


class MatrixAtomDictionary(nnx.Module):
    """S atoms of one shape; coefficients [..., S] -> matrices [..., *shape].

    shape, axes: of a kernel, and the logical names of its axes. fan_in: d; atoms are N(0, 1/d), so that coefficients of unit
    norm give matrices of a usual layer's variance.
    """

    def __init__(
        self,
        num_atoms: int,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        fan_in: int,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        atoms = jax.random.normal(rngs.params(), (num_atoms, *shape), param_dtype) * fan_in**-0.5
        self.atoms = nnx.Param(atoms, **named(None, *axes))

    def __call__(self, c: Float[Array, "*L S"]) -> Float[Array, "..."]:
        atoms = self.atoms[...]
        return jnp.tensordot(c.astype(atoms.dtype), atoms, 1, precision=jax.lax.Precision.HIGHEST)


class CoefficientMLP(nnx.Module):
    """C [L, P, S] of P projections from layer embeddings [L, m], through 3 layers with GELU.

    num_types: P. width, hidden: m and the MLP's width. The last layer is scaled so that the rows C[l, p] have norm 1 on
    average over l.
    """

    def __init__(self, num_layers: int, num_types: int, num_atoms: int, *, width: int = 64, hidden: int = 64, rngs: nnx.Rngs):
        self.shape = num_layers, num_types, num_atoms
        self.embeddings = nnx.Param(jax.random.normal(rngs.params(), (num_layers, width)), **named(None, None))
        sizes = (width, hidden, hidden, num_types * num_atoms)
        self.layers = nnx.List([linear(a, b, (None, None), use_bias=True, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        norms = jnp.sqrt((self() ** 2).sum(-1).mean(0))  # [P]
        last = self.layers[-1].kernel
        last[...] = last[...] / jnp.repeat(norms, num_atoms)

    def __call__(self) -> Float[Array, "L P S"]:
        first, second, last = self.layers
        hidden = jax.nn.gelu(second(jax.nn.gelu(first(self.embeddings[...]))))
        return last(hidden).reshape(self.shape)


class DirectCoefficients(nnx.Module):
    """C [L, P, S] as parameters.

    near_sharing: start where `SequentialSharing` is, with noise of standard deviation 0.1, instead of at N(0, 1/S). S must
        then divide L.
    Raises ValueError if it does not.
    """

    def __init__(self, num_layers: int, num_types: int, num_atoms: int, *, near_sharing: bool = False, rngs: nnx.Rngs):
        noise = jax.random.normal(rngs.params(), (num_layers, num_types, num_atoms))
        start = sequential(num_layers, num_atoms)[:, None] + 0.1 * noise if near_sharing else noise * num_atoms**-0.5
        self.c = nnx.Param(start, **named(None, None, None))

    def __call__(self) -> Float[Array, "L P S"]:
        return self.c[...]


class Frozen(nnx.Variable):
    """What is kept with a model and not trained."""


class FrozenCoefficients(nnx.Module):
    """C [L, P, S] that is not trained."""

    def __init__(self, c: Float[Array, "L P S"]):
        self.c = Frozen(jnp.asarray(c))

    def __call__(self) -> Float[Array, "L P S"]:
        return self.c[...]


def sequential(num_layers: int, num_atoms: int) -> Float[np.ndarray, "L S"]:
    """C[l, s] = 1 if l is in the s-th block of L / S consecutive layers. Raises ValueError if S does not divide L."""
    if num_atoms < 1 or num_layers % num_atoms:
        raise ValueError(f"num_atoms: blocks of equal size need a divisor of num_layers={num_layers}, got {num_atoms}")
    return np.repeat(np.eye(num_atoms, dtype=np.float32), num_layers // num_atoms, axis=0)


class SequentialSharing(FrozenCoefficients):
    """Blocks of L / S consecutive layers use one matrix. Raises ValueError if S does not divide L."""

    def __init__(self, num_layers: int, num_types: int, num_atoms: int, *, rngs: nnx.Rngs | None = None):
        super().__init__(jnp.repeat(jnp.asarray(sequential(num_layers, num_atoms))[:, None], num_types, axis=1))


class RepeatAllOver(FrozenCoefficients):
    """Layer l uses matrix l mod S."""

    def __init__(self, num_layers: int, num_types: int, num_atoms: int, *, rngs: nnx.Rngs | None = None):
        one_hot = jnp.eye(num_atoms)[jnp.arange(num_layers) % num_atoms]
        super().__init__(jnp.repeat(one_hot[:, None], num_types, axis=1))


def matrix_pca(
    matrices: Float[np.ndarray, "L ..."], num_atoms: int
) -> tuple[Float[np.ndarray, "S ..."], Float[np.ndarray, "L S"]]:
    """(atoms, coefficients), float64: the best S atoms, orthonormal under the trace, for the sum of squared errors.

    The matrices are not centred. Directions that they do not have (S above their rank, to the precision they are given in)
    become atoms and coefficients of zeros. Through the L × L Gram matrix, on the host.
    Raises ValueError unless 1 <= S <= L.
    """
    given = np.asarray(matrices)
    count = len(given)
    if not 1 <= num_atoms <= count:
        raise ValueError(f"num_atoms: between 1 and the {count} matrices there are, got {num_atoms}")
    flat = given.reshape(count, -1).astype(np.float64)
    values, vectors = np.linalg.eigh(flat @ flat.T)
    values, vectors = values[::-1][:num_atoms], vectors[:, ::-1][:, :num_atoms]
    # A matrix rounded to eps is known up to eps² in the Gram matrix, which itself is rounded to float64's.
    rounding = max(np.finfo(np.float64).eps, float(jnp.finfo(given.dtype).eps) ** 2)
    there = values > 4 * count * rounding * values[0]
    sigma = np.sqrt(np.where(there, values, 1.0))
    atoms = np.where(there[:, None], vectors.T @ flat / sigma[:, None], 0.0)
    return atoms.reshape(num_atoms, *given.shape[1:]), flat @ atoms.T


def group_blocks_by_kl(probabilities: Float[np.ndarray, "L V"], num_groups: int) -> tuple[int, ...]:
    """The group of every layer, 0, 1, ...: consecutive layers, cut where KL(p_l || p_{l+1}) is largest.

    probabilities: what each block's output, averaged over tokens, predicts through the final norm and the readout.
    Raises ValueError unless 1 <= num_groups <= L.
    """
    p = np.asarray(probabilities, np.float64)
    if not 1 <= num_groups <= len(p):
        raise ValueError(f"num_groups: between 1 and the {len(p)} layers, got {num_groups}")
    log = np.log(np.maximum(p, np.finfo(np.float64).tiny))
    drift = (p[:-1] * (log[:-1] - log[1:])).sum(-1)
    cuts = np.sort(np.argsort(-drift, kind="stable")[: num_groups - 1])
    return tuple(int((cuts < l).sum()) for l in range(len(p)))


def local_refinement(
    residual: Float[np.ndarray, "d h"], moment: Float[np.ndarray, "d d"], rank: int, *, eps: float = 1e-6
) -> tuple[Float[np.ndarray, "d k"], Float[np.ndarray, "k h"]]:
    """Factors U V of rank k that minimise ||X dW - X U V||_F, float64.

    residual: dW, what sharing left out of a layer's matrix. moment: XᵀX of that layer's inputs X, or a multiple of it.
    eps: added to the diagonal, relative to its mean, so that inputs may lack directions.
    Raises ValueError for a moment of another size, or a rank outside 1..min(d, h).
    """
    dw, a = np.asarray(residual, np.float64), np.asarray(moment, np.float64)
    if a.shape != (len(dw), len(dw)):
        raise ValueError(f"moment: for a residual {dw.shape} it must be {(len(dw), len(dw))}, got {a.shape}")
    if not 1 <= rank <= min(dw.shape):
        raise ValueError(f"rank: between 1 and {min(dw.shape)} for a residual {dw.shape}, got {rank}")
    lower = np.linalg.cholesky(a + eps * np.trace(a) / len(a) * np.eye(len(a)))
    u, s, v = np.linalg.svd(lower.T @ dw, full_matrices=False)
    return np.linalg.solve(lower.T, u[:, :rank] * s[:rank]), v[:rank]


def _picture(axes: Any) -> None:
    """How 12 layers combine 4 atoms: at the start of training, and where layers share one matrix each."""
    learned = CoefficientMLP(12, 1, 4, rngs=nnx.Rngs(0))()[:, 0]
    both = np.concatenate([learned, np.full((12, 1), np.nan), sequential(12, 4)], axis=1)
    image = axes.imshow(both, cmap="RdBu", vmin=-1.2, vmax=1.2, aspect="auto")
    axes.set(ylabel="layer", title="coefficients of MASA (left) and of sequential sharing (right)")
    axes.set_xticks([*range(4), *range(5, 9)], [f"D{s + 1}" for s in (*range(4), *range(4))])
    axes.figure.colorbar(image, ax=axes)


PAPER = Paper(
    67,
    "masa",
    "Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning",
    "projections",
    builds=(
        MatrixAtomDictionary,
        CoefficientMLP,
        DirectCoefficients,
        SequentialSharing,
        RepeatAllOver,
        compression_rate,
        matrix_pca,
        group_blocks_by_kl,
        local_refinement,
        "attnzoo.models.masa:MASATransformer",
        "attnzoo.models.masa:freeze_coefficients",
        "attnzoo.models.masa:masa_from_pretrained",
        "attnzoo.models.masa:decayed",
    ),
    picture=_picture,
    costs={
        "cache numbers per token": "2 * K * H",
        "parameters of one projection, all layers": "M * D * D + L * M",
        "parameters of one projection, unshared": "L * D * D",
        "multiply-adds to build one projection, all layers": "L * M * D * D",
    },
    notes=(
        "M is S, the number of atoms, in the formulas of costs. Groups of layers with a dictionary each are one dictionary "
        "whose coefficients are zero outside a layer's group. The whitening is that which minimises the error on the inputs, "
        "Lᵀ dW with XᵀX = L Lᵀ. Coefficients and their network should not be decayed: `decayed` is the mask for it."
    ),
)
