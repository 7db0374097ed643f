"""`attnzoo compare`: several mixers at one parameter budget, in one table."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from attnzoo.nn.linear import parameter_count
from attnzoo.nn.mixer import Mixer
from train.config import Config
from train.loop import train
from train.metrics import write_atomically
from train.mixer_args import parse_mixer_args
from train.tasks import make_task, task_class

TOLERANCE = 0.01  # of the parameter budget


@dataclass(frozen=True)
class Row:
    """One mixer of the table.

    quality: the task's validation score at the end. step_seconds: median of a training step.
    cache_numbers: what decoding keeps per token, over all layers; None where the model does not decode.
    cache_bytes: the same in bytes, in the dtype of the computation.
    """

    mixer: str
    quality: float
    step_seconds: float | None
    parameters: int
    mlp_dim: int
    cache_numbers: float | None
    cache_bytes: float | None


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they are measured in."""

    quality: str
    higher_is_better: bool
    baselines: dict[str, float]
    rows: list[Row]


def compare(config: Config, mixers: str, folder: Path, console: Console) -> Comparison:
    """Trains each of `mixers` as `config` says; compare.json and compare.png go to `folder`, runs below it.

    The first mixer has the configuration's mlp_dim; the others have the one that makes their models equal to
    it in parameters. Raises ValueError, before anything is trained, when none does within one percent.
    Raises KeyboardInterrupt when a run is interrupted.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out: {folder} is not empty, and nothing in it is overwritten; choose another folder")
    plans = equal_budgets(config, parse_mixers(mixers))
    task = task_class(config.task)
    rows = []
    for number, (label, plan) in enumerate(plans.items(), start=1):
        console.print(f"\n[bold]{label}[/] ({number} of {len(plans)})", highlight=False)
        result = train(plan, folder / label.replace(":", "-"), console=console)
        if result.interrupted:
            raise KeyboardInterrupt
        numbers = cache_numbers(plan)
        rows.append(
            Row(
                mixer=label,
                quality=result.score[task.metric],
                step_seconds=result.step_seconds,
                parameters=result.parameters,
                mlp_dim=plan.model.mlp_dim or 0,
                cache_numbers=numbers,
                cache_bytes=None if numbers is None else numbers * jnp.dtype(plan.model.dtype).itemsize,
            )
        )
    comparison = Comparison(task.quality, task.higher_is_better, result.baselines, rows)
    document = {**dataclasses.asdict(comparison), "config": config.as_json()}
    write_atomically(folder / "compare.json", json.dumps(document, indent=1) + "\n")
    plot(comparison, folder / "compare.png")
    return comparison


def parse_mixers(text: str, *, least: int = 2) -> dict[str, tuple[str, dict[str, Any]]]:
    """{entry: (key, arguments)} of "a,b:ARG=VALUE:ARG=VALUE,c".

    least: different entries that are needed. Raises ValueError for fewer, and for what `parse_mixer_args` refuses.
    """
    parsed = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        key, *settings = entry.split(":")
        taken = {}
        for setting in settings:
            name, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--mixers: {entry!r} has {setting!r} where ARG=VALUE was expected")
            taken[name.replace("-", "_")] = value.split()
        parsed[entry] = (key, parse_mixer_args(key, taken))
    if len(parsed) < least:
        needed = "two different entries or more" if least == 2 else "an entry"
        raise ValueError(f"--mixers: needs {needed}, e.g. transformer,value_residual; got {text!r}")
    return parsed


def equal_budgets(config: Config, mixers: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Config]:
    """The configuration of each mixer, with the mlp_dim that gives it the parameters of the first one.

    Raises ValueError where the nearest mlp_dim misses them by more than one percent.
    """
    plans: dict[str, Config] = {}
    budget = 0
    for label, (key, arguments) in mixers.items():
        plan = dataclasses.replace(config, mixer=key, mixer_args=arguments)
        budget = budget or parameters(plan)
        try:
            plans[label] = with_parameters(plan, budget)
        except ValueError as error:
            raise ValueError(
                f"--mixers: {label!r} cannot have the parameters of {next(iter(plans), label)!r}: {error}. Choose another "
                "--model.mlp-dim or --model.dim"
            ) from error
    return plans


def with_parameters(plan: Config, budget: int) -> Config:
    """The configuration with the mlp_dim that gives its model `budget` parameters.

    Raises ValueError where the nearest mlp_dim misses them by more than one percent.
    """
    # Parameters are linear in mlp_dim, so two sizes tell all of them.
    one, two = parameters(_with_mlp_dim(plan, 1)), parameters(_with_mlp_dim(plan, 2))
    mlp_dim = max(1, round(1 + (budget - one) / (two - one)))
    plan = _with_mlp_dim(plan, mlp_dim)
    count = parameters(plan)
    if abs(count - budget) > TOLERANCE * budget:
        raise ValueError(f"no mlp_dim gives it {budget:,} parameters; nearest is {mlp_dim}, with {count:,}")
    return plan


def _with_mlp_dim(config: Config, mlp_dim: int) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_dim=mlp_dim))


def parameters(config: Config) -> int:
    """How many parameters the model of a configuration has; builds none of them."""
    task = make_task(config)
    return parameter_count(nnx.eval_shape(lambda: task.make_model(nnx.Rngs(0))))


def cache_numbers(config: Config) -> float | None:
    """Numbers per token that decoding keeps, over all layers; None for models that do not decode."""
    unrolled = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=False))
    task = make_task(unrolled)
    found: list[float] = []

    def count() -> None:
        model = task.make_model(nnx.Rngs(0))
        if hasattr(model, "init_cache"):
            mixers = [module for _, module in nnx.iter_modules(model) if isinstance(module, Mixer)]
            found.append(sum(mixer.cache_numbers_per_token() for mixer in mixers))

    jax.eval_shape(count)
    return found[0] if found else None


def table(comparison: Comparison) -> Table:
    """The comparison as it is printed."""
    better = "higher" if comparison.higher_is_better else "lower"
    baselines = ", ".join(f"{name} {value:.3f}" for name, value in comparison.baselines.items())
    shown = Table(title=f"{comparison.quality}, {better} is better", caption=f"baselines: {baselines}")
    shown.add_column("mixer")
    for name in (comparison.quality, "ms/step", "parameters", "mlp_dim", "cache/token"):
        shown.add_column(name, justify="right")
    for row in comparison.rows:
        shown.add_row(
            row.mixer,
            f"{row.quality:.4f}",
            "" if row.step_seconds is None else f"{1000 * row.step_seconds:.0f}",
            f"{row.parameters:,}",
            str(row.mlp_dim),
            "" if row.cache_numbers is None else f"{row.cache_numbers:,.0f} ({row.cache_bytes:,.0f} B)",
        )
    return shown


def plot(comparison: Comparison, path: Path) -> None:
    """Quality, step time and cache of every mixer, side by side."""
    from matplotlib.figure import Figure

    rows = comparison.rows
    panels = {
        comparison.quality: [row.quality for row in rows],
        "ms per step": [1000 * (row.step_seconds or 0.0) for row in rows],
        "cache bytes per token": [row.cache_bytes or 0.0 for row in rows],
    }
    panels = {name: values for name, values in panels.items() if any(values)}
    figure = Figure(figsize=(3.4 * len(panels), 1.6 + 0.5 * len(rows)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, (name, values) in zip(all_axes[0], panels.items(), strict=True):
        bars = axes.barh([row.mixer for row in rows], values, color="tab:blue", alpha=0.6, height=0.6)
        axes.bar_label(bars, fmt="{:.3f}" if name == comparison.quality else "{:,.0f}", padding=3)
        axes.margins(x=0.25)
        axes.set_title(name, fontsize=10)
    all_axes[0][0].invert_yaxis()
    figure.suptitle(f"equal parameters: {rows[0].parameters:,}", fontsize=11)
    figure.savefig(path, dpi=120)
