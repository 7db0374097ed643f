"""Spectra of matrices beside the law of Marchenko and Pastur (1967), which those of random matrices follow.

An n×p matrix X of independent entries of variance sigma², q = p / n <= 1, has Gram eigenvalues (of Xᵀ X / n) in [lam_-, lam_+]:

    lam_± = sigma² (1 ± sqrt q)²,   rho(l) = sqrt((lam_+ - l)(l - lam_-)) / (2 pi q sigma² l)

Everything here is numpy in float64, on the host.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from attnzoo.errors import unknown

Eigenvalues = Float64[np.ndarray, " p"]
VARIANCES = ("bulk", "mean")


def mp_edges(q: float, sigma2: float = 1.0) -> tuple[float, float]:
    """(lam_-, lam_+). Raises ValueError for a ratio outside (0, 1]."""
    if not 0 < q <= 1:
        raise ValueError(f"q: p / n with p the smaller side, so in (0, 1], got {q}; transpose the matrix")
    return sigma2 * (1 - q**0.5) ** 2, sigma2 * (1 + q**0.5) ** 2


def mp_density(l: Float[np.ndarray, "..."], q: float, sigma2: float = 1.0) -> Float64[np.ndarray, "..."]:
    """rho(l), 0 outside the bulk. For q = 1 it has no bound near 0."""
    low, high = mp_edges(q, sigma2)
    l = np.asarray(l, np.float64)
    inside = (l > low) & (l < high)
    safe = np.where(inside, l, high)
    return np.where(inside, np.sqrt((high - safe) * (safe - low)) / (2 * np.pi * q * sigma2 * safe), 0.0)


class Spectrum(NamedTuple):
    """lam: eigenvalues, largest first. q: the ratio of the smaller to the larger side of the matrix."""

    lam: Eigenvalues
    q: float


def gram_spectrum(x: Float[np.ndarray, "n p"]) -> Spectrum:
    """Eigenvalues of the smaller Gram matrix, divided by the larger side."""
    x = np.asarray(x, np.float64)
    small, large = sorted(x.shape)
    gram = x.T @ x if x.shape[1] == small else x @ x.T
    return Spectrum(np.maximum(np.linalg.eigvalsh(gram / large)[::-1], 0), small / large)


def bulk_variance(lam: Eigenvalues, q: float) -> float:
    """sigma² of the eigenvalues at or below the edge that it implies: dropped and estimated anew until none is dropped.

    Eigenvalues that are 0 but for rounding belong to no bulk and are not counted.
    """
    lam = np.asarray(lam, np.float64)
    kept = lam[lam > 1e-12 * lam.max()]
    while True:
        sigma2 = float(kept.mean())
        left = kept[kept <= mp_edges(q, sigma2)[1]]
        if len(left) in (0, len(kept)):
            return sigma2
        kept = left


@dataclass(frozen=True)
class Diagnostics:
    """What a spectrum looks like beside a random one; all but `edge` and `gap_absolute` are free of its scale.

    edge: E. n_out: eigenvalues above it. energy_out: their share of the sum. gap: lam_max / E. gap_absolute: lam_max - E.
    soft_rank: E / lam_max, at most 1. 1 <= stable_rank <= participation <= effective_rank <= number of eigenvalues.
    """

    edge: float
    n_out: int
    energy_out: float
    gap: float
    gap_absolute: float
    soft_rank: float
    stable_rank: float
    participation: float
    effective_rank: float

    def plot(self, axes: Any, spectrum: Spectrum) -> None:
        """The histogram of the spectrum, with the edge."""
        axes.hist(spectrum.lam, bins=40, density=True, alpha=0.5)
        axes.axvline(self.edge, color="tab:red", label=f"edge, {self.n_out} above")
        axes.set(xlabel="eigenvalue", ylabel="density")
        axes.legend(frameon=False)


def mp_diagnostics(
    lam: Eigenvalues, q: float | None = None, *, edge: float | None = None, variance: str = "bulk"
) -> Diagnostics:
    """Diagnostics of eigenvalues against an edge: the one given, or lam_+ for the ratio q.

    variance: "bulk" (`bulk_variance`) or "mean", of all eigenvalues.
    Raises ValueError for eigenvalues that are negative, not finite or all 0, and without an edge or a ratio.
    """
    lam = np.asarray(lam, np.float64)
    if lam.ndim != 1 or not lam.size or not np.isfinite(lam).all() or lam.min() < 0 or not lam.any():
        raise ValueError(f"lam: eigenvalues [p], finite, not negative and not all 0 are needed, got shape {lam.shape}")
    if variance not in VARIANCES:
        raise unknown("variance", variance, VARIANCES)
    if edge is None:
        if q is None:
            raise ValueError("q: without an edge the ratio of the matrix' sides is needed")
        edge = mp_edges(q, bulk_variance(lam, q) if variance == "bulk" else float(lam.mean()))[1]
    total, top = lam.sum(), lam.max()
    out = lam > edge
    share = lam[lam > 0] / total
    return Diagnostics(
        edge=float(edge),
        n_out=int(out.sum()),
        energy_out=float(lam[out].sum() / total),
        gap=float(top / edge),
        gap_absolute=float(top - edge),
        soft_rank=float(min(edge / top, 1.0)),
        stable_rank=float(total / top),
        participation=float(total**2 / (lam**2).sum()),
        effective_rank=float(np.exp(-(share * np.log(share)).sum())),
    )
