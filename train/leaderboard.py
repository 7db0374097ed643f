"""A leaderboard: what every mixer of a suite came to, as JSON, as a table and as a picture."""

import dataclasses
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from train.config import Config


@dataclass(frozen=True)
class Suite:
    """What every mixer of a leaderboard is measured on.

    config: of the reference, whose mixer, parameters and cache set the budgets. seeds: one training run each.
    cache_share: of the reference's cache bytes per token, the most that "equal cache" allows.
    decode_length: tokens in the cache when decoding is timed; decode_batch: rows then. smoke: whether it is cut to CI length.

    Raises ValueError for fewer than two steps: the first ones compile, so they tell no time.
    """

    name: str
    config: Config
    seeds: tuple[int, ...]
    cache_share: float
    decode_length: int
    decode_batch: int
    smoke: bool = False

    def __post_init__(self) -> None:
        if self.config.steps < 2:
            raise ValueError(f"config: a suite takes at least 2 steps, got {self.config.steps}")


@dataclass(frozen=True)
class Measured:
    """One mixer on one axis.

    scores: validation, per seed. step_seconds: median of a training step. decode_seconds: of one token for each of
    `decode_batch` rows, with `decode_length` tokens in the cache. cache_bytes: per token, over all layers. Both are None for
    mixers that do not decode. settings: what was set to meet the axes, besides mlp_dim.
    """

    scores: tuple[float, ...]
    step_seconds: float
    decode_seconds: float | None
    cache_bytes: float | None
    parameters: int
    mlp_dim: int
    settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores)


@dataclass(frozen=True)
class Entry:
    """One row: a mixer, and what it came to with equal parameters, and with an equal cache too.

    equal_cache: None where the mixer cannot have it, for `reason`.
    positions: of the model; "learned" where the mixer takes none of the suite's.
    """

    mixer: str
    equal_parameters: Measured
    equal_cache: Measured | None
    reason: str = ""
    positions: str = "rope"

    @property
    def set_for_parameters(self) -> list[str]:
        """What was set to meet the first axis, as it is shown."""
        return [f"{name}={value}" for name, value in self.equal_parameters.settings.items()]


@dataclass(frozen=True)
class Leaderboard:
    """All rows in the order of their score at equal parameters, and what they are measured in.

    mixers: as they were asked for. cache_budget: bytes per token of "equal cache". skipped: mixer -> why it has no row; failed:
    the same, where it broke. interrupted: whether mixers are missing. seconds: what it took.
    """

    suite: Suite
    mixers: str
    metric: str
    baselines: Mapping[str, float]
    cache_budget: float
    entries: tuple[Entry, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    failed: Mapping[str, str] = field(default_factory=dict)
    higher_is_better: bool = False
    interrupted: bool = False

    @property
    def better(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    def with_entry(self, entry: Entry) -> "Leaderboard":
        """The board with one row more, the best first."""
        rows = sorted((*self.entries, entry), key=lambda row: row.equal_parameters.score, reverse=self.higher_is_better)
        return dataclasses.replace(self, entries=tuple(rows))

    def as_json(self) -> dict[str, Any]:
        return {
            "command": f"attnzoo compare --suite {self.suite.name} --mixers {shlex.quote(self.mixers)}"
            + " --smoke" * self.suite.smoke,
            **dataclasses.asdict(self),
            "environment": {
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                **{name: version(name) for name in ("attnzoo", "jax", "flax", "optax")},
            },
        }


def table(board: Leaderboard) -> Table:
    """The leaderboard as it is printed."""
    suite, positions = board.suite, board.suite.config.model.positions
    baselines = ", ".join(f"{name} {value:.3f}" for name, value in board.baselines.items())
    shown = Table(
        title=f"{board.metric} after {suite.config.steps} steps, mean of {len(suite.seeds)} seeds ({board.better})",
        caption=(
            f"baselines: {baselines}; decoding: {suite.decode_batch} rows with {suite.decode_length} tokens in the cache; "
            f"small cache: what brings it to {board.cache_budget:,.0f} bytes per token or less"
        ),
        box=box.SIMPLE,
    )
    for name in ("mixer", "score", "ms/step", "ms/token", "cache B", "small cache"):
        shown.add_column(name, justify="left" if name == "mixer" else "right")
    for entry in board.entries:
        label = ", ".join((entry.mixer, *entry.set_for_parameters, *["learned positions"] * (entry.positions != positions)))
        small = entry.equal_cache
        how = "cannot" if small is None else "below" if small.settings != entry.equal_parameters.settings else "as it is"
        shown.add_row(label, *cells(entry.equal_parameters), how)
        if small is not None and how == "below":
            settings = ", ".join(f"{name}={value}" for name, value in small.settings.items())
            shown.add_row(f"  {settings}", *cells(small), style="dim")
    return shown


def cells(measured: Measured) -> tuple[str, str, str, str]:
    """Score, ms per step, ms per decoded token, cache bytes."""
    decode, size = measured.decode_seconds, measured.cache_bytes
    return (
        f"{measured.score:.3f}",
        f"{1000 * measured.step_seconds:.1f}",
        "" if decode is None else f"{1000 * decode:.2f}",
        "" if size is None else f"{size:,.0f}",
    )


def plot(board: Leaderboard, path: Path) -> None:
    """Scores against training time, decoding time and cache; a line joins the two axes of a mixer."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels: dict[str, Callable[[Measured], float | None]] = {
        "ms per training step": lambda m: 1000 * m.step_seconds,
        f"ms per decoded token, {board.suite.decode_length} in the cache": lambda m: (
            m.decode_seconds and 1000 * m.decode_seconds
        ),
        "cache bytes per token": lambda m: m.cache_bytes,
    }
    figure = Figure(figsize=(5 * len(panels), 5), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, of) in zip(all_axes, panels.items(), strict=True):
        for number, entry in enumerate(board.entries):
            both = (entry.equal_parameters, entry.equal_cache)
            points = [(of(m), m.score) for m in both if m is not None and of(m) is not None]
            if points:
                color = colormaps["tab20"](number % 20)
                axes.plot(*zip(*points, strict=True), "-", color=color, alpha=0.6)
                axes.plot(*points[0], "o", color=color, label=entry.mixer if axes is all_axes[0] else None)
                axes.plot(*points[-1], "s", color=color, markersize=7, fillstyle="none")
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
    all_axes[0].set_ylabel(f"{board.metric} (validation, {board.better})")
    figure.legend(loc="outside right center", fontsize=8, frameon=False)  # in the order of the scores
    figure.suptitle(f"{board.suite.name}: dots at equal parameters, squares with a small cache as well", fontsize=11)
    figure.savefig(path, dpi=120)
