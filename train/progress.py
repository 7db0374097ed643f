"""What a run shows while it goes: a live bar on a terminal, a line now and then elsewhere."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from train import processes
from train.config import Config
from train.sharding import describe

_QUIET_SECONDS = 10.0  # between the lines that are printed where there is no terminal


def print_header(console: Console, config: Config, folder: Path) -> None:
    model = config.model
    arguments = "".join(f" {name}={value}" for name, value in config.mixer_args.items())
    console.print(
        f"[bold]{config.task}[/] on {config.data.path or config.data.name}: "
        f"{model.num_layers} layers of {config.mixer}{arguments}, width {model.dim}, {model.num_heads} heads; "
        f"{config.steps} steps of {config.batch}; mesh {describe(config.mesh)}{_spread()}; seed {config.seed}\n"
        f"writing to {folder}",
        highlight=False,
        soft_wrap=True,
    )


def _spread() -> str:
    return f" on {processes.count()} processes" if processes.count() > 1 else ""


class RunDisplay:
    """Progress of one run on `console`: step, loss, last validation score, speed, time left."""

    def __init__(self, console: Console, *, steps: int, start: int, unit: str):
        self._console, self._steps, self._unit = console, steps, unit
        self._live = console.is_terminal
        self._score = ""
        self._printed = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not self._live,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task("", total=steps, completed=start, status="compiling")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def update(self, step: int, loss: float, units_per_second: float | None, left: float | None) -> None:
        """loss: mean since the last call. left: seconds, None while the speed is not known."""
        parts = [f"loss {loss:.3f}", self._score]
        if units_per_second is not None:
            parts.append(f"{units_per_second:,.0f} {self._unit}/s")
        if left is not None:
            parts.append(f"ETA {int(left) // 60}:{int(left) % 60:02d}")
        status = "  ".join(part for part in parts if part)
        self._progress.update(self._task, completed=step, status=status)
        now = time.monotonic()
        if not self._live and (now - self._printed >= _QUIET_SECONDS or step == self._steps):
            self._printed = now
            self._console.print(f"step {step}/{self._steps}  {status}", highlight=False, soft_wrap=True)

    def score(self, text: str) -> None:
        """The validation score to show from now on."""
        self._score = text
