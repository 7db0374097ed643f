"""What the training loop costs beside its step.

    attnzoo bench loop

Runs `attnzoo train` as it is, with a model whose step takes about 50 ms, and waits for every step to finish before the
loop goes on. The time between the end of one step and the beginning of the next is then all that the loop itself does:
taking the next batch, metrics, the progress display, checkpoints. None of it is hidden behind the step, as it is on a device
of its own, so this is the most that it can cost. What threads do while the step runs, above all making the next batches and
bringing them to the device, takes nothing from a device of its own either; on a CPU it may slow the step down, so the same
steps are then timed without a loop, and reported too. So is the processor time that the thread of the loop took between
steps: on a busy machine the clock also counts what others do there. Validation is left out: it is a computation too. Writes
loop.json.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from rich.console import Console

import train.loop
from benchmarks._measure import arguments, environment, parsed, save
from train.config import Config, EvalConfig
from train.sharding import on_mesh
from train.trainer import Trainer

TARGET = 0.02
STEP_SECONDS = 0.05


class Watched(Trainer):
    """Notes when each training step begins and ends: by the clock, and by the processor time of its thread."""

    began: list[tuple[float, float]]
    ended: list[tuple[float, float]]

    def _compile(self):
        step = super()._compile()
        self.began, self.ended = [], []
        watched.append(self)

        def timed(leaves, batch):
            self.began.append(_now())
            result = jax.block_until_ready(step(leaves, batch))
            self.ended.append(_now())
            return result

        return timed


watched: list[Watched] = []


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


@dataclass(frozen=True)
class Measured:
    """Seconds, without the first steps, which compile.

    steps: of each step. gaps: between it and the next; busy: of which the processor worked for the loop's thread.
    alone: of each step without a loop around it.
    """

    steps: list[float]
    gaps: list[float]
    busy: list[float]
    alone: list[float]


def measure(config: Config) -> Measured:
    """A run, and half as many steps again by themselves."""
    watched.clear()
    usual, train.loop.Trainer = train.loop.Trainer, Watched  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            train.loop.train(config, Path(folder) / "run", console=Console(file=nowhere, force_terminal=True))
    finally:
        train.loop.Trainer = usual  # type: ignore[misc]
    trainer, first = watched[0], config.log_every
    leaves, batch = trainer.leaves(trainer.init()), trainer.put(next(iter(trainer.task.batches())))
    with on_mesh(trainer.mesh, trainer.exchange):
        for _ in range(config.steps // 2):
            leaves, _ = trainer.step_leaves(leaves, batch)
    steps = [end - begin for (begin, _), (end, _) in zip(trainer.began, trainer.ended, strict=True)]
    between = list(zip(trainer.ended, trainer.began[1:], strict=False))[first : config.steps - 1]
    return Measured(
        steps=steps[first : config.steps],
        gaps=[begin - end for (end, _), (begin, _) in between],
        busy=[begin - end for (_, end), (_, begin) in between],
        alone=steps[config.steps :],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns the exit code."""
    parser = arguments("loop", __doc__)
    parser.add_argument("--steps", type=int, default=600, help="steps to take (default 600)")
    options = parsed(parser, argv)
    config = replace(Config(), steps=options.steps, eval=EvalConfig(every=10 * options.steps, sample=1))
    before = environment()
    found = measure(config)

    def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
        shown = {"mean": statistics.fmean(seconds), "median": statistics.median(seconds), "largest": max(seconds)}
        return {name: round(1e3 * value, 3) for name, value in shown.items()}

    between, busy, steps, alone = map(milliseconds, (found.gaps, found.busy, found.steps, found.alone))
    share = between["mean"] / (1e3 * STEP_SECONDS)
    measured = {
        "share_of_a_50_ms_step": round(share, 5),
        "target": TARGET,
        "milliseconds_between_steps": between,
        "processor_milliseconds_between_steps": busy,
        "milliseconds_per_step": steps,
        "milliseconds_per_step_without_the_loop": alone,
        "steps": config.steps,
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint.every,
    }
    print(
        f"between steps {between['mean']:.2f} ms in the mean ({between['median']:.2f} ms at the median; the processor worked "
        f"for {busy['mean']:.2f} ms of the mean), "
        f"{100 * share:.2f} % of a step of 50 ms (target {100 * TARGET:.0f} %); steps of {steps['median']:.1f} ms at the "
        f"median, {alone['median']:.1f} ms without the loop"
    )
    save("loop", options, before, measured)
    return 0
