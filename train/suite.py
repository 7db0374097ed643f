"""`attnzoo compare --suite NAME`: a leaderboard of mixers on fixed ground, so that boards of different days compare.

A suite fixes task, model, steps and seeds. Each mixer is measured on two axes: with the parameters of the suite's
reference, and with these and a cache of at most a share of the reference's bytes per token.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from attnzoo import catalog
from attnzoo.errors import unknown
from attnzoo.models.factory import accepted_arguments
from attnzoo.models.lm import DecoderLM
from train.compare import cache_numbers, parameters, parse_mixers, with_parameters
from train.config import Config, ModelConfig
from train.leaderboard import Entry, Leaderboard, Measured, Suite, plot
from train.metrics import write_atomically
from train.sharding import make_mesh, on_mesh
from train.tasks import make_task
from train.trainer import Trainer

FILE = "leaderboard.json"
REFUSALS = (ValueError, NotImplementedError)
"""How mixers say what they do not take; any other error is a bug."""

PARTIAL = "leaderboard.partial.json"
"""What is measured so far; becomes `FILE` at the end, so that a board that is there stays whole."""


SUITES = {
    "language": Suite(
        name="language",
        config=Config(task="text", steps=210, batch=8, model=ModelConfig(dim=64, num_layers=3, num_heads=4)),
        seeds=(0, 1),
        cache_share=0.25,
        decode_length=1024,
        decode_batch=8,
    )
}


def smoke_suite(suite: Suite) -> Suite:
    """The suite at CI length: a few steps of one seed, a short cache. What it measures means nothing."""
    config = dataclasses.replace(suite.config, steps=6, batch=4)
    return dataclasses.replace(suite, config=config, seeds=suite.seeds[:1], decode_length=64, decode_batch=2, smoke=True)


def suite_named(name: str) -> Suite:
    """The suite of that name. Raises ValueError, with the nearest names, if there is none."""
    if name not in SUITES:
        raise unknown("suite", name, SUITES)
    return SUITES[name]


def suite_mixers(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """{entry: (key, arguments)}: "all" is every built mixer of the catalog, other texts are as `parse_mixers` takes them."""
    if text == "all":
        return {key: (key, {}) for key in catalog.mixers()}
    return parse_mixers(text, least=1)


def run_suite(suite: Suite, mixers: str, folder: Path, console: Console) -> Leaderboard:
    """Measures `mixers` and writes leaderboard.json and leaderboard.png to `folder`; after every mixer, what there is so far to
    leaderboard.partial.json, which becomes leaderboard.json at the end.

    With "all", a mixer that cannot be measured (it takes no such model, or its training diverges) is left out, one that breaks
    has failed, and the reason is kept; one that was asked for by name raises. Ctrl-C ends it with what is measured, in
    leaderboard.partial.json and leaderboard.partial.png.
    """
    began = time.monotonic()
    chosen = suite_mixers(mixers)
    task = make_task(suite.config)
    budget, reference_cache = parameters(suite.config), cache_bytes(suite.config)
    assert reference_cache is not None
    board = Leaderboard(
        suite,
        mixers,
        task.quality,
        task.baselines(),
        suite.cache_share * reference_cache,
        higher_is_better=task.higher_is_better,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for number, (label, (key, arguments)) in enumerate(chosen.items(), start=1):
        console.print(f"[bold]{label}[/] ({number} of {len(chosen)})", highlight=False)
        plan = dataclasses.replace(suite.config, mixer=key, mixer_args=arguments)
        try:
            entry = measure_entry(suite, label, plan, budget, board.cache_budget)
        except KeyboardInterrupt:
            board = dataclasses.replace(board, interrupted=True)
        except Exception as error:  # hours of other mixers' work do not end with this one
            if mixers != "all":
                raise
            refused = isinstance(error, REFUSALS)
            if refused:
                board = dataclasses.replace(board, skipped={**board.skipped, label: said(error)})
            else:
                board = dataclasses.replace(board, failed={**board.failed, label: said(error)})
            console.print(f"  {'left out' if refused else 'failed'}: {said(error)}", highlight=False)
        else:
            board = board.with_entry(entry)
            if entry.reason:
                console.print(f"  no equal cache: {entry.reason}", highlight=False)
        board = dataclasses.replace(board, seconds=round(time.monotonic() - began, 1))
        if board.entries or not board.interrupted:
            write_atomically(folder / PARTIAL, json.dumps(board.as_json(), indent=1) + "\n")
        if board.interrupted:
            break
    if board.entries:
        plot(board, (folder / (PARTIAL if board.interrupted else FILE)).with_suffix(".png"))
    if not board.interrupted:
        (folder / PARTIAL).replace(folder / FILE)
    return board


def said(error: Exception) -> str:
    """What a refusal says; of other errors, which are bugs, their kind as well."""
    return str(error) if isinstance(error, REFUSALS) else f"{type(error).__name__}: {error}"


def measure_entry(suite: Suite, label: str, plan: Config, budget: int, cache_budget: float) -> Entry:
    """One mixer on both axes. Raises ValueError where it cannot have `budget` parameters.

    What goes wrong on the second axis is the reason that there is none; the first is kept.
    """
    plan, fewer = fitted(with_positions(plan), budget)
    equal, small, reason = dataclasses.replace(measure(suite, plan), settings=fewer), None, ""
    try:
        settings = settings_within(plan, cache_budget)
        small = equal  # small enough as it is, if there is nothing to set
        if settings:
            smaller = with_parameters(_with_settings(plan, settings), budget)
            small = dataclasses.replace(measure(suite, smaller), settings=fewer | settings)
    except Exception as error:
        reason = said(error)
    return Entry(label, equal, small, reason, plan.model.positions)


def fitted(plan: Config, budget: int) -> tuple[Config, dict[str, int]]:
    """The plan with `budget` parameters, and what was set for it besides mlp_dim: fewer experts, where a mixer has so many that
    they leave nothing for mlp_dim.

    Raises ValueError where that does not suffice either.
    """
    try:
        return with_parameters(plan, budget), {}
    except ValueError:
        experts = accepted_arguments(catalog.mixer(plan.mixer)).get("num_experts")
        if experts is None or "num_experts" in plan.mixer_args:
            raise
        for fewer in range(experts.default - 1, 1, -1):
            with contextlib.suppress(ValueError):
                settings = {"num_experts": fewer}
                return with_parameters(_with_settings(plan, settings), budget), settings
        raise


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
            try:
                needed = cache_bytes(_with_settings(plan, {name: value}))
            except ValueError:  # a width that this mixer does not take
                continue
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

    Batches are made and placed before a group's clock starts. The trainer is compiled once for all seeds. Raises ValueError
    when the loss is not finite at the end, or the score.
    """
    task, group = make_task(plan), min(group, plan.steps // 2)
    state, times, step = trainer.init(plan.seed), [], 0
    batches = iter(task.batches())
    with on_mesh(trainer.mesh, trainer.exchange):
        while step < plan.steps:
            count = min(group, plan.steps - step)
            ready = jax.block_until_ready([trainer.put(next(batches)) for _ in range(count)])
            clock = time.perf_counter()
            for batch in ready:
                state, metrics = trainer.train_step(state, batch)
            jax.block_until_ready(metrics)
            if step:
                times.append((time.perf_counter() - clock) / count)
            step += count
    score = trainer.evaluate(state, task.validation_batches())[task.metric]
    for name, value in (("loss", float(metrics["loss"])), ("validation score", float(score))):
        if not math.isfinite(value):
            raise ValueError(f"its {name} is {value} after {plan.steps} steps with seed {plan.seed}")
    return score, times


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
