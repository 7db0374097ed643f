"""`attnzoo claim`: runs the experiment on a paper's claim and records what came out."""

import importlib
import json
import platform
import textwrap
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from attnzoo import catalog
from attnzoo.errors import unknown
from train.claims import ClaimResult
from train.metrics import write_atomically

FOLDER = Path(__file__).parent / "claims"
RESULTS = FOLDER / "results"


@dataclass(frozen=True)
class ClaimConfig:
    """Check the central claim of a paper with a small experiment."""

    key: tyro.conf.Positional[str]
    """The paper's key, as `attnzoo list` prints it."""
    seeds: tuple[int, ...] | None = None
    """One run each; by default those of the experiment."""
    quick: bool = False
    """A few steps, to see that it runs; the verdict means nothing and is recorded only where --out says."""
    out: str | None = None
    """Folder for KEY.json and KEY.png; by default train/claims/results, none with --quick."""


def claims() -> list[str]:
    """The keys of all papers that have an experiment."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem not in ("__init__", "common"))


def run_claim(config: ClaimConfig) -> tuple[ClaimResult, Path | None]:
    """(result, where its JSON went, None if nowhere).

    Raises ValueError, with the nearest names, for a key that has no experiment.
    """
    if config.key not in claims():
        if config.key in {row.key for row in catalog.papers()}:
            raise ValueError(f"claim {config.key!r}: this paper has no experiment yet; there are {', '.join(claims())}")
        raise unknown("claim", config.key, claims())
    options: dict[str, Any] = {} if config.seeds is None else {"seeds": config.seeds}
    result = importlib.import_module(f"train.claims.{config.key}").run(quick=config.quick, **options)
    folder = Path(config.out).expanduser() if config.out else None if config.quick else RESULTS
    if folder is None:
        return result, None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.key}.json"
    write_atomically(path, json.dumps(as_json(result, quick=config.quick), indent=1, ensure_ascii=False) + "\n")
    plot(result, path.with_suffix(".png"))
    return result, path


def as_json(result: ClaimResult, *, quick: bool) -> dict[str, Any]:
    """The result as it is recorded, with its verdict, means and what it ran on."""
    values = {method: [float(value) for value in given] for method, given in result.values.items()}
    return {
        "claim": result.claim,
        "verdict": "none: a quick run" if quick else result.verdict,
        "margin": result.margin,
        "metric": result.metric,
        "mean": {method: round(float(np.mean(given)), 6) for method, given in values.items()},
        "values": values,
        "seeds": list(result.seeds),
        "details": _plain(asdict(result)["details"]),
        "seconds": round(result.seconds, 1),
        "command": f"attnzoo claim {result.key}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("attnzoo", "jax", "flax", "optax")},
        },
    }


def plot(result: ClaimResult, path: Path) -> None:
    """Every method's values: a bar for the mean, a dot per seed."""
    from matplotlib.figure import Figure

    methods = list(result.values)
    figure = Figure(figsize=(1.8 + 1.5 * len(methods), 4.2), layout="constrained")
    axes = figure.subplots()
    labels = [textwrap.fill(method, 20) for method in methods]  # as much as goes under a bar
    axes.bar(labels, [np.mean(result.values[m]) for m in methods], color="tab:blue", alpha=0.35, width=0.6)
    for place, method in enumerate(methods):
        spread = np.linspace(-0.12, 0.12, len(result.seeds)) if len(result.seeds) > 1 else [0.0]
        axes.plot(place + np.asarray(spread), result.values[method], "o", color="tab:blue", markersize=5)
        axes.annotate(
            f"{np.mean(result.values[method]):.3f}",
            (place, max(result.values[method])),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
    axes.margins(y=0.15)
    axes.set_ylabel(result.metric)
    axes.set_title(f"{result.key}: {result.verdict}", fontsize=11)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=120)


def _plain(value: Any) -> Any:
    """Arrays and NumPy numbers as what JSON knows."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value
