"""`attnzoo compare --suite NAME`: a leaderboard of mixers on fixed ground, so that boards of different days compare.

A suite fixes task, model, steps and seeds. Each mixer is measured on two axes: with the parameters of the suite's
reference, and with these and a cache of at most a share of the reference's bytes per token.
"""

import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from attnzoo import catalog
from attnzoo.errors import unknown
from attnzoo.models.factory import accepted_arguments
from attnzoo.models.lm import DecoderLM
from train.compare import cache_numbers, parameters, parse_mixers, with_parameters
from train.config import Config, ModelConfig
from train.metrics import write_atomically
from train.sharding import make_mesh, on_mesh
from train.tasks import make_task
from train.trainer import Trainer

FILE = "leaderboard.json"


@dataclass(frozen=True)
class Suite:
    """What every mixer of a leaderboard is measured on.

    config: of the reference, whose mixer, parameters and cache set the budgets. seeds: one training run each.
    cache_share: of the reference's cache bytes per token, the most that "equal cache" allows.
    decode_length: tokens in the cache when decoding is timed; decode_batch: rows then.
    """

    name: str
    config: Config
    seeds: tuple[int, ...]
    cache_share: float
    decode_length: int
    decode_batch: int


SUITES = {
    "language": Suite(
        name="language",
        config=Config(task="text", steps=240, batch=8, model=ModelConfig(dim=64, num_layers=3, num_heads=4)),
        seeds=(0, 1),
        cache_share=0.25,
        decode_length=1024,
        decode_batch=8,
    )
}


def smoke_suite(suite: Suite) -> Suite:
    """The suite at CI length: a few steps of one seed, a short cache. What it measures means nothing."""
    config = dataclasses.replace(suite.config, steps=6, batch=4)
    return dataclasses.replace(suite, config=config, seeds=suite.seeds[:1], decode_length=64, decode_batch=2)


@dataclass(frozen=True)
class Measured:
    """One mixer on one axis.

    scores: validation, per seed. step_seconds: median of a training step. decode_seconds: of one token for each of
    `decode_batch` rows, with `decode_length` tokens in the cache. cache_bytes: per token, over all layers. Both are None for
    mixers that do not decode. settings: what was set to meet the axis, besides mlp_dim.
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


@dataclass(frozen=True)
class Leaderboard:
    """All rows in the order of their score at equal parameters, and what they are measured in.

    mixers: as they were asked for. cache_budget: bytes per token of "equal cache". skipped: mixer -> why it has no row.
    """

    suite: Suite
    mixers: str
    metric: str
    baselines: Mapping[str, float]
    cache_budget: float
    entries: tuple[Entry, ...]
    skipped: Mapping[str, str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "command": f"attnzoo compare --suite {self.suite.name} --mixers {self.mixers}",
            **dataclasses.asdict(self),
            "environment": {
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "python": platform.python_version(),
                **{name: version(name) for name in ("attnzoo", "jax", "flax", "optax")},
            },
        }


def suite_named(name: str) -> Suite:
    """The suite of that name. Raises ValueError, with the nearest names, if there is none."""
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    return SUITES[name]


def suite_mixers(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """{entry: (key, arguments)}: "all" is every built mixer of the catalog, other texts are as `parse_mixers` takes them."""
    if text == "all":
        return {key: (key, {}) for key in catalog.mixers()}
    return parse_mixers(text)


def run_suite(suite: Suite, mixers: str, folder: Path, console: Console) -> Leaderboard:
    """Measures `mixers` and writes leaderboard.json and leaderboard.png to `folder`; the JSON after every mixer.

    With "all", a mixer that cannot be measured (it takes no such model, or its training diverges) is left out, and the
    reason is kept; one that was asked for by name raises.
    """
    began = time.monotonic()
    chosen = suite_mixers(mixers)
    task = make_task(suite.config)
    budget, reference_cache = parameters(suite.config), cache_bytes(suite.config)
    assert reference_cache is not None
    board = Leaderboard(suite, mixers, task.quality, task.baselines(), suite.cache_share * reference_cache, (), {}, 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (label, (key, arguments)) in enumerate(chosen.items(), start=1):
        console.print(f"[bold]{label}[/] ({number} of {len(chosen)})", highlight=False)
        plan = dataclasses.replace(suite.config, mixer=key, mixer_args=arguments)
        try:
            entry = measure_entry(suite, label, plan, budget, board.cache_budget)
        except (ValueError, TypeError, NotImplementedError) as error:
            if mixers != "all":
                raise
            board = dataclasses.replace(board, skipped={**board.skipped, label: str(error)})
            console.print(f"  left out: {error}", highlight=False)
        else:
            entries = sorted((*board.entries, entry), key=lambda entry: entry.equal_parameters.score)
            board = dataclasses.replace(board, entries=tuple(entries))
            if entry.reason:
                console.print(f"  no equal cache: {entry.reason}", highlight=False)
        board = dataclasses.replace(board, seconds=round(time.monotonic() - began, 1))
        write_atomically(folder / FILE, json.dumps(board.as_json(), indent=1) + "\n")
    plot(board, folder / "leaderboard.png")
    return board


def measure_entry(suite: Suite, label: str, plan: Config, budget: int, cache_budget: float) -> Entry:
    """One mixer on both axes. Raises ValueError where it cannot have `budget` parameters."""
    plan = with_positions(plan)
    equal, small, reason = measure(suite, with_parameters(plan, budget)), None, ""
    try:
        settings = settings_within(plan, cache_budget)
        small = equal  # small enough as it is, if there is nothing to set
        if settings:
            smaller = with_parameters(_with_settings(plan, settings), budget)
            small = dataclasses.replace(measure(suite, smaller), settings=settings)
    except ValueError as error:
        reason = str(error)
    return Entry(label, equal, small, reason, plan.model.positions)


def with_positions(plan: Config) -> Config:
    """The plan, with learned positions added to the tokens where the mixer refuses to have its keys rotated."""
    try:
        parameters(plan)
        return plan
    except ValueError:
        learned = dataclasses.replace(plan, model=dataclasses.replace(plan.model, positions="learned"))
        parameters(learned)  # whatever else is wrong is raised from here
        return learned


def settings_within(plan: Config, cache_budget: float) -> dict[str, int]:
    """The model settings that bring the cache of `plan` to the most bytes per token within the budget; {} if it is there.

    Tries what mixers have for it, in this order, and stops at the first that suffices: fewer kv heads, a narrower latent, then
    narrower heads. Arguments that the plan sets itself are left alone.
    Raises ValueError when none suffices, or the mixer does not decode.
    """
    now = cache_bytes(plan)
    if now is None:
        raise ValueError("it does not decode")
    if now <= cache_budget:
        return {}
    model = plan.model
    heads, width = model.num_heads, model.head_dim or model.dim // model.num_heads
    knobs: dict[str, list[int]] = {
        "num_kv_heads": [n for n in range(heads - 1, 0, -1) if heads % n == 0],
        "latent_dim": list(range(model.dim - 4, 0, -4)),
        "head_dim": list(range(width - 2, 0, -2)),
    }
    own = accepted_arguments(catalog.mixer(plan.mixer))
    for name, values in knobs.items():
        if name not in own or name in plan.mixer_args:
            continue
        for value in values:
            needed = cache_bytes(_with_settings(plan, {name: value}))
            if needed is not None and needed <= cache_budget:
                return {name: value}
    raise ValueError(
        f"its cache takes {now:,.0f} bytes per token, and nothing of {', '.join(knobs)} that it has brings it to "
        f"{cache_budget:,.0f}"
    )


def _with_settings(plan: Config, settings: Mapping[str, int]) -> Config:
    return dataclasses.replace(plan, mixer_args={**plan.mixer_args, **settings})


def cache_bytes(plan: Config) -> float | None:
    """Bytes per token that decoding keeps, over all layers; None for mixers that do not decode."""
    cls: Any = catalog.mixer(plan.mixer)
    numbers = cache_numbers(plan) if cls.decodes else None
    return None if numbers is None else numbers * jnp.dtype(plan.model.dtype).itemsize


def measure(suite: Suite, plan: Config) -> Measured:
    """Trains a configuration with every seed of the suite, and times its decoding."""
    trainer = Trainer(make_task(plan), plan, make_mesh(plan.mesh))
    runs = [train_once(trainer, dataclasses.replace(plan, seed=seed)) for seed in suite.seeds]
    size = cache_bytes(plan)
    return Measured(
        scores=tuple(score for score, _ in runs),
        step_seconds=statistics.median(seconds for _, times in runs for seconds in times),
        decode_seconds=None if size is None else time_decoding(suite, plan),
        cache_bytes=size,
        parameters=trainer.parameters,
        mlp_dim=plan.model.mlp_dim or 0,
    )


def train_once(trainer: Trainer, plan: Config, group: int = 3) -> tuple[float, list[float]]:
    """(validation score, seconds per step of each group of steps after the first, which compiles).

    The trainer is compiled once for all seeds. Raises ValueError when the loss is not finite at the end.
    """
    task = make_task(plan)
    state, times, step = trainer.init(plan.seed), [], 0
    batches = iter(task.batches())
    with on_mesh(trainer.mesh, trainer.exchange):
        while step < plan.steps:
            count, clock = min(group, plan.steps - step), time.perf_counter()
            for _ in range(count):
                state, metrics = trainer.train_step(state, trainer.put(next(batches)))
            jax.block_until_ready(metrics)
            if step:
                times.append((time.perf_counter() - clock) / count)
            step += count
    if not math.isfinite(float(metrics["loss"])):
        raise ValueError(f"its loss is {float(metrics['loss'])} after {plan.steps} steps with seed {plan.seed}")
    return trainer.evaluate(state, task.validation_batches())[task.metric], times


def time_decoding(suite: Suite, plan: Config, tokens: int = 32, rounds: int = 5) -> float:
    """Seconds per token of greedy decoding through the mixer's own cache, after a prompt of the suite's decode_length."""
    model = make_task(plan).make_model(nnx.Rngs(0))
    assert isinstance(model, DecoderLM)
    model.eval()
    graphdef, state = nnx.split(model)
    length, batch = suite.decode_length, suite.decode_batch

    @jax.jit
    def read(state: Any) -> tuple[Any, Any]:
        model = nnx.merge(graphdef, state)
        prompt = jax.random.randint(jax.random.key(0), (batch, length), 32, 127)
        logits, cache = model.prefill(prompt, model.init_cache(batch, length + (rounds + 1) * tokens))
        return logits[:, -1].argmax(-1), cache

    @jax.jit
    def write(state: Any, token: Any, cache: Any) -> tuple[Any, Any]:
        def one(carry: tuple, _: None) -> tuple[tuple, None]:
            token, cache = carry
            logits, cache = nnx.merge(graphdef, state).step(token[:, None], cache)
            return (logits[:, 0].argmax(-1), cache), None

        return jax.lax.scan(one, (token, cache), length=tokens)[0]

    token, cache = read(state)
    return timed(lambda token, cache: write(state, token, cache), token, cache, rounds) / tokens


def timed(call: Callable[..., tuple[Any, Any]], token: Any, cache: Any, rounds: int) -> float:
    """The median seconds of `rounds` calls, each on what the last one gave, after one that compiles."""
    token, cache = jax.block_until_ready(call(token, cache))
    seconds = []
    for _ in range(rounds):
        clock = time.perf_counter()
        token, cache = jax.block_until_ready(call(token, cache))
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds)


def table(board: Leaderboard) -> Table:
    """The leaderboard as it is printed."""
    suite = board.suite
    baselines = ", ".join(f"{name} {value:.3f}" for name, value in board.baselines.items())
    shown = Table(
        title=f"{board.metric} after {suite.config.steps} steps, mean of {len(suite.seeds)} seeds (lower is better)",
        caption=(
            f"baselines: {baselines}; decoding: {suite.decode_batch} rows with {suite.decode_length} tokens in the cache; "
            f"indented: what brings the cache to {board.cache_budget:,.0f} bytes per token or less"
        ),
        box=box.SIMPLE,
    )
    for name in ("mixer", "score", "ms/step", "ms/token", "cache B"):
        shown.add_column(name, justify="left" if name == "mixer" else "right")
    for entry in board.entries:
        learned = ", learned positions" * (entry.positions != suite.config.model.positions)
        shown.add_row(entry.mixer + learned, *cells(entry.equal_parameters))
        if entry.equal_cache is not None and entry.equal_cache.settings:
            settings = ", ".join(f"{name}={value}" for name, value in entry.equal_cache.settings.items())
            shown.add_row(f"  {settings}", *cells(entry.equal_cache), style="dim")
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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, Callable[[Measured], float | None]] = {
        "ms per training step": lambda m: 1000 * m.step_seconds,
        f"ms per decoded token, {board.suite.decode_length} in the cache": lambda m: (
            m.decode_seconds and 1000 * m.decode_seconds
        ),
        "cache bytes per token": lambda m: m.cache_bytes,
    }
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 5), layout="constrained", sharey=True)
    for axes, (name, of) in zip(all_axes, panels.items(), strict=True):
        for number, entry in enumerate(board.entries):
            both = (entry.equal_parameters, entry.equal_cache)
            points = [(of(m), m.score) for m in both if m is not None and of(m) is not None]
            if points:
                color = f"C{number % 10}"
                axes.plot(*zip(*points, strict=True), "-", color=color, alpha=0.4)
                axes.plot(*points[0], "o", color=color)
                axes.plot(*points[-1], "s", color=color, markersize=5, fillstyle="none")
                axes.annotate(entry.mixer, points[0], xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set_xlabel(name)
        axes.grid(alpha=0.25)
    all_axes[0].set_ylabel(f"{board.metric} (validation)")
    figure.suptitle(f"{board.suite.name}: dots at equal parameters, squares with a small cache as well", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)
