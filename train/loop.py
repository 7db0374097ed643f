"""The training loop: from a configuration to a trained model, a folder and a verdict."""

import dataclasses
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from train.checkpoint import Checkpoints
from train.config import Config
from train.metrics import Metrics, plot_run, read_metrics, write_atomically
from train.progress import RunDisplay, print_header
from train.rundir import CHECKPOINTS, About, new_run, open_run
from train.sharding import check_batch, make_mesh, on_mesh
from train.tasks import Task, make_task
from train.trainer import Trainer, TrainState, learning_rate


@dataclass(frozen=True)
class Result:
    """What came out of a run; `result.json` in its folder.

    step: where it ended; interrupted: whether that was before its last step.
    score: validation metrics. baselines: name -> the same metric. step_seconds: median of a training step,
    None if too few were timed. seconds: of this process's part of the run. sample: (title, text).
    """

    folder: Path
    step: int
    interrupted: bool
    parameters: int
    score: dict[str, float]
    baselines: dict[str, float]
    step_seconds: float | None
    seconds: float
    sample: tuple[str, str]

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {**values, "folder": str(self.folder)}


class NotFinite(ValueError):
    """The loss or its gradient became NaN or infinite."""


def train(config: Config, folder: Path, *, resume: bool = False, console: Console | None = None) -> Result:
    """Runs a configuration to its end, or until it is interrupted.

    folder: where everything goes. It must not hold a run, unless `resume` continues the one in it, bit for
    bit what it would have been without the break (on a mesh of the same shape).
    Raises ValueError for a configuration, data or checkpoint that does not fit, before anything is written;
    NotFinite, which names the step, when training diverges: the last good checkpoint stays.
    """
    began = time.monotonic()
    console = console or Console(quiet=True)
    task = make_task(config)
    mesh = make_mesh(config.mesh)
    check_batch(config.batch, task.context, mesh)
    trainer = Trainer(task, config, mesh)
    about = About.now(config, task.dataset.name, task.dataset.fingerprint)
    if resume:
        open_run(folder).check_data(task.dataset.fingerprint)
    else:
        new_run(folder, about)
    print_header(console, config, folder)
    run = _Run(task, config, trainer, about, folder, console)
    try:
        with _interrupts() as interrupted:
            run.to_the_end(interrupted)
        return run.close(began)
    finally:
        run.checkpoints.close()
        run.metrics.close()


class _Run:
    """A run in progress."""

    def __init__(self, task: Task, config: Config, trainer: Trainer, about: About, folder: Path, console: Console):
        self.task, self.config, self.trainer, self.about = task, config, trainer, about
        self.folder, self.console = folder, console
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, keep=config.checkpoint.keep)
        self.data = iter(task.batches())
        self.state, self.step = self._start()
        self.start = self.step
        self.metrics = Metrics(folder, keep=self.step)
        self.schedule = learning_rate(config)
        self.pending: list[tuple[int, dict[str, jax.Array]]] = []
        self.seconds_per_step: list[float] = []
        self.score: dict[str, float] = {}

    def _start(self) -> tuple[TrainState, int]:
        steps = self.checkpoints.steps()
        if not steps:
            return self.trainer.init(), 0
        About.from_json(self.checkpoints.about(steps[-1])).check_data(self.about.data["fingerprint"])
        state = self.checkpoints.restore(steps[-1], self.trainer.abstract, self.trainer.shardings, self.data)
        return state, steps[-1]

    def to_the_end(self, interrupted: Callable[[], bool]) -> None:
        config, steps = self.config, self.config.steps
        display = RunDisplay(self.console, steps=steps, start=self.step, unit=self.task.unit)
        with display, on_mesh(self.trainer.mesh, self.trainer.exchange):
            clock = time.monotonic()
            while self.step < steps and not interrupted():
                batch = self.trainer.put(next(self.data))
                self.state, metrics = self.trainer.train_step(self.state, batch)
                self.step += 1
                self.pending.append((self.step, metrics))
                at_end = self.step == steps
                evaluate = at_end or self.step % config.eval.every == 0
                save = at_end or self.step % config.checkpoint.every == 0
                if not (evaluate or save or self.step % config.log_every == 0):
                    continue
                self._fetch(display, clock)
                if evaluate:
                    self._evaluate(display)
                if save:
                    self._save()
                self.metrics.flush()
                clock = time.monotonic()
            if interrupted() and self.step > self.start:
                self._fetch(display, clock)
                self._save()
        self.checkpoints.wait()

    def _fetch(self, display: RunDisplay, clock: float) -> None:
        """Brings the metrics of the steps since the last time to the host: the only wait for the device."""
        if not self.pending:
            return
        steps, metrics = zip(*self.pending, strict=True)
        self.pending = []
        fetched = jax.device_get(list(metrics))
        seconds = (time.monotonic() - clock) / len(steps)
        if steps[0] > self.start + 1:  # the first step of a process compiles
            self.seconds_per_step.append(seconds)
        for step, values in zip(steps, fetched, strict=True):
            loss, norm = float(values["loss"]), float(values["gradient_norm"])
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._not_finite(step, loss, norm)
            rate = float(self.schedule(step - 1))
            self.metrics.write(step, {"train/loss": loss, "train/gradient_norm": norm, "train/learning_rate": rate})
        speed = left = None
        if self.seconds_per_step:
            typical = statistics.median(self.seconds_per_step[-5:])
            speed, left = self.task.units_per_step / typical, typical * (self.config.steps - self.step)
            self.metrics.write(self.step, {f"train/{self.task.unit}_per_second": speed})
        mean = sum(float(values["loss"]) for values in fetched) / len(fetched)
        display.update(self.step, mean, speed, left)

    def _not_finite(self, step: int, loss: float, norm: float) -> NotFinite:
        self.metrics.flush()
        self.checkpoints.wait()
        kept = self.checkpoints.steps()
        where = (
            f"the last good checkpoint, of step {kept[-1]}, is kept in {self.checkpoints.folder}"
            if kept
            else "no checkpoint had been made"
        )
        return NotFinite(
            f"training stopped: at step {step} the loss was {loss} and the norm of its gradient {norm}; {where}. "
            f"A smaller --optimizer.learning-rate (now {self.config.optimizer.learning_rate:g}) often helps"
        )

    def _evaluate(self, display: RunDisplay) -> None:
        self.score = self.trainer.evaluate(self.state, self.task.validation_batches())
        self.metrics.write(self.step, {f"validation/{name}": value for name, value in self.score.items()})
        display.score(f"validation {self.score[self.task.metric]:.3f} {self.task.quality}")

    def _save(self) -> None:
        if self.step not in self.checkpoints.steps():
            self.checkpoints.save(self.step, self.state, self.data, self.about.as_json())

    def close(self, began: float) -> Result:
        """Scores, baselines, sample, plot: everything after the last step."""
        finished = self.step == self.config.steps
        score = self.score if self.score and finished else {}
        if finished and not score:  # resumed after the last step
            score = self.trainer.evaluate(self.state, self.task.validation_batches())
        baselines = self.task.baselines() if finished else {}
        sample = self.task.closing(self.trainer.model(self.state.params, self.state.rest)) if finished else ("", "")
        self.metrics.flush()
        if finished:
            self._plot(baselines)
        result = Result(
            folder=self.folder,
            step=self.step,
            interrupted=not finished,
            parameters=self.trainer.parameters,
            score=score,
            baselines=baselines,
            step_seconds=statistics.median(self.seconds_per_step) if self.seconds_per_step else None,
            seconds=time.monotonic() - began,
            sample=sample,
        )
        if finished:
            write_atomically(self.folder / "result.json", json.dumps(result.as_json(), indent=1) + "\n")
        return result

    def _plot(self, baselines: dict[str, float]) -> None:
        config = self.config
        plot_run(
            self.folder / "loss.png",
            read_metrics(self.folder / "metrics.jsonl"),
            metric=self.task.metric,
            quality=self.task.quality,
            scale=self.task.loss_scale,
            baselines=baselines,
            title=f"{config.task}, {config.mixer}: {self.trainer.parameters:,} parameters, seed {config.seed}",
        )


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C and a request to end (SIGTERM) are remembered; a second one ends the process.

    Outside the main thread, where signals cannot be caught, they keep their usual effect.
    """
    received: list[int] = []

    def remember(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, remember)
    except ValueError:
        pass
    try:
        yield lambda: bool(received)
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
