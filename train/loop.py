"""The training loop: from a configuration to a trained model, a folder and a verdict."""

import contextlib
import dataclasses
import json
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from train import processes
from train.checkpoint import Checkpoints, Keep
from train.config import Config
from train.metrics import Metrics, NoMetrics, plot_run, read_metrics, write_atomically
from train.pmap import PmapTrainer
from train.progress import RunDisplay, print_header
from train.rundir import CHECKPOINTS, About, check_seen, new_run, open_run
from train.sharding import check_axes, check_batch, make_mesh, on_mesh
from train.tasks import Task, make_task
from train.trainer import Measured, Trainer, TrainState


@dataclass(frozen=True)
class Result:
    """What came out of a run; `result.json` in its folder.

    step: where it ended; interrupted: whether that was before its last step.
    score: validation metrics. baselines: name -> the same metric. step_seconds: median of a training step,
    None if too few were timed. seconds: of this process's part of the run. sample: (title, text).
    Of several processes only the first has baselines and a sample.
    records: of the data, where they are counted. skipped: reason -> how many of them could not be read.
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
    records: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {**values, "folder": str(self.folder)}


class NotFinite(processes.Shared):
    """The loss or its gradient became NaN or infinite."""


def train(config: Config, folder: Path, *, resume: bool = False, console: Console | None = None) -> Result:
    """Runs a configuration to its end, or until it is interrupted.

    folder: where everything goes. It must not hold a run, unless `resume` continues the one in it, bit for
    bit what it would have been without the break (on a mesh of the same shape and as many processes).
    Of several processes (`jax.distributed`) each calls it with the same arguments; the first one writes everything but the
    checkpoints, of which each writes its part.
    Raises ValueError for a configuration, data or checkpoint that does not fit, before anything is written;
    NotFinite, which names the step, when training diverges: the last good checkpoint stays; OSError when a checkpoint
    cannot be written; PeerLost when another process is gone.
    """
    began = time.monotonic()
    first = processes.index() == 0
    console = console if console and first else Console(quiet=True)
    with processes.together():
        task = make_task(config)
        mesh = make_mesh(config.mesh)
        check_batch(config.batch, task.context, mesh, config.accumulate)
        trainer = (PmapTrainer if config.loop == "pmap" else Trainer)(task, config, mesh)
        check_axes(trainer.shardings.params, task.sequence, mesh)
        if resume:  # before the data are encoded with another tokenizer
            open_run(folder).check_tokenizer(task.tokenizer_fingerprint)
        about = About.now(config, task.dataset.name, task.dataset.fingerprint, task.tokenizer_fingerprint)
    processes.same({"configuration": json.dumps(about.config.as_json()), "data set": about.data["fingerprint"]})
    with processes.together():
        if resume:
            open_run(folder).check_data(task.dataset.fingerprint)
        elif first:
            new_run(folder, about)
    with processes.together():
        check_seen(folder)
    print_header(console, config, folder)
    with processes.watching(f"Go on from the last checkpoint in {folder} with --resume"):
        run = _Run(task, config, trainer, about, folder, console)
        try:
            with _interrupts() as interrupted:
                run.to_the_end(interrupted)
            result = run.close(began)
        except BaseException:
            run.abandon()
            raise
        run.checkpoints.close()
        run.metrics.close()
        return result


class _Run:
    """A run in progress."""

    def __init__(self, task: Task, config: Config, trainer: Trainer, about: About, folder: Path, console: Console):
        self.task, self.config, self.trainer, self.about = task, config, trainer, about
        self.folder, self.console = folder, console
        self.first, self.alone = processes.index() == 0, processes.count() == 1
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, Keep(config.checkpoint.keep, config.checkpoint.best))
        self.data = iter(task.batches(trainer.rows, trainer.put))
        state, self.step = self._start()
        self.leaves = trainer.leaves(state)
        self.start = self.step
        self.metrics = Metrics(folder, keep=self.step) if self.first else NoMetrics()
        self.pending: list[tuple[int, Measured]] = []
        self.seconds_per_step: list[float] = []
        self.score: dict[str, float] = {}
        self.scored: int | None = None  # the step after which it was
        best = self.checkpoints.best()
        self.best = -math.inf if best is None else best[1]

    @property
    def state(self) -> TrainState:
        return self.trainer.state(self.leaves)

    def _start(self) -> tuple[TrainState, int]:
        steps = self.checkpoints.steps()
        if not steps:
            return self.trainer.init(), 0
        stored = About.from_json(self.checkpoints.about(steps[-1]))
        stored.check_tokenizer(self.task.tokenizer_fingerprint)
        stored.check_data(self.about.data["fingerprint"])
        state = self.checkpoints.restore(steps[-1], self.trainer.abstract, self.trainer.shardings, self.data)
        return state, steps[-1]

    def to_the_end(self, interrupted: Callable[[], bool]) -> None:
        config, steps = self.config, self.config.steps
        display = RunDisplay(self.console, steps=steps, start=self.step, unit=self.task.unit)
        with display, on_mesh(self.trainer.mesh, self.trainer.exchange):
            clock = time.monotonic()
            stopped = processes.anywhere(interrupted())
            while self.step < steps and not stopped:
                self.leaves, measured = self.trainer.step_leaves(self.leaves, next(self.data))
                self.step += 1
                self.pending.append((self.step, measured))
                at_end = self.step == steps
                evaluate = at_end or self.step % config.eval.every == 0
                save = at_end or self.step % config.checkpoint.every == 0
                if not (evaluate or save or self.step % config.log_every == 0):
                    stopped = self.alone and interrupted()
                    continue
                self._fetch(display, clock)
                if evaluate:
                    self._evaluate(display)
                if save or (evaluate and self._is_best()):
                    self._save()
                with self._recording():
                    self.metrics.flush()
                stopped = processes.anywhere(interrupted())  # several processes must stop after the same step
                clock = time.monotonic()
            if stopped and self.step > self.start:
                self._fetch(display, clock)
                self._save()
        self.checkpoints.wait()

    def _fetch(self, display: RunDisplay, clock: float) -> None:
        """Brings the metrics of the steps since the last time to the host: the only wait for the device."""
        if not self.pending:
            return
        steps, measured = zip(*self.pending, strict=True)
        self.pending = []
        names = self.trainer.measured
        # Not jax.device_get, which takes ten times as long to bring an array of a few numbers.
        fetched = [dict(zip(names, np.asarray(values).tolist(), strict=True)) for values in measured]
        seconds = (time.monotonic() - clock) / len(steps)
        if steps[0] > self.start + 1:  # the first step of a process compiles
            self.seconds_per_step.append(seconds)
        for step, values in zip(steps, fetched, strict=True):
            loss, norm = values["loss"], values["gradient_norm"]
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._not_finite(step, loss, norm)
            self._record(step, {f"train/{name}": value for name, value in values.items()})
        speed = left = None
        if self.seconds_per_step:
            typical = statistics.median(self.seconds_per_step[-5:])
            speed, left = self.task.units_per_step / typical, typical * (self.config.steps - self.step)
            self._record(self.step, {f"train/{self.task.unit}_per_second": speed})
        mean = sum(values["loss"] for values in fetched) / len(fetched)
        display.update(self.step, mean, speed, left)

    def _record(self, step: int, values: dict[str, float]) -> None:
        with self._recording():
            self.metrics.write(step, values)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Turns a failed write of metrics into one paragraph; a checkpoint that is on its way to the same disk says more."""
        try:
            yield
        except OSError as error:
            if self.alone:
                self.checkpoints.wait()
            kept = self.checkpoints.steps()
            left = f"the checkpoint of step {kept[-1]} is whole" if kept else "there is no checkpoint yet"
            raise OSError(
                f"metrics could not be written to {self.folder} ({error}). Nothing else was touched: {left}; make room and go "
                "on with --resume"
            ) from error

    def _not_finite(self, step: int, loss: float, norm: float) -> NotFinite:
        with self._recording():
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
        self.scored = self.step
        scores = {f"validation/{name}": value for name, value in self.score.items()}
        self._record(self.step, {**scores, "data/skipped_records": self.task.tally.skipped.total()})
        display.score(f"validation {self.score[self.task.metric]:.3f} {self.task.quality}")

    def _quality(self) -> float | None:
        """Of the model as it is, if it was just validated; higher is better."""
        if self.scored != self.step:
            return None
        return self.score[self.task.metric] * (1 if self.task.higher_is_better else -1)

    def _is_best(self) -> bool:
        """Of the checkpoints that stay."""
        quality = self._quality()
        return self.config.checkpoint.best > 0 and quality is not None and quality > self.best

    def _save(self) -> None:
        quality = self._quality()
        if self.step not in self.checkpoints.steps():
            self.checkpoints.save(self.step, self.state, self.data, self.about.as_json(), quality)
            self.best = self.best if quality is None else max(self.best, quality)

    def abandon(self) -> None:
        """After an error: keeps what is on the way to the disk, where no other process has to be waited for."""
        with contextlib.suppress(OSError):
            self.metrics.close()
        if self.alone:
            with contextlib.suppress(OSError):  # that the disk is full has been said
                self.checkpoints.close()

    def close(self, began: float) -> Result:
        """Scores, baselines, sample, plot: everything after the last step."""
        finished = self.step == self.config.steps
        score = self.score if self.score and finished else {}
        if finished and not score:  # resumed after the last step
            score = self.trainer.evaluate(self.state, self.task.validation_batches())
        state = self.state
        model = self.trainer.model(state.weights, state.rest) if finished else None
        shown = finished and self.first
        baselines = self.task.baselines() if shown else {}
        sample = self.task.closing(model) if shown and model is not None else ("", "")
        with self._recording():
            self.metrics.flush()
        if shown:
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
            records=self.task.tally.records,
            skipped=dict(self.task.tally.skipped),
        )
        if shown:
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


@contextlib.contextmanager
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
