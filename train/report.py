"""What `attnzoo train` prints at the end."""

import shlex
from collections import Counter

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from train.config import Config
from train.data.records import Tally
from train.loop import Result
from train.tasks import task_class


def print_result(console: Console, config: Config, result: Result) -> None:
    task = task_class(config.task)
    score = result.score[task.metric]
    table = Table(title=f"validation, {task.quality} ({'higher' if task.higher_is_better else 'lower'} is better)")
    table.add_column("")
    table.add_column(task.quality, justify="right")
    for name, value in result.baselines.items():
        table.add_row(name, f"{value:.3f}")
    table.add_row(f"{config.mixer}, {result.parameters:,} parameters", f"{score:.3f}", style="bold green")
    console.print(table)
    title, text = result.sample
    console.print(Panel(Text(text), title=title, title_align="left"))
    if result.skipped:
        skipped = Tally(result.records, Counter(result.skipped)).describe()
        console.print(f"[yellow]data: {skipped}[/]", highlight=False, soft_wrap=True)
    timing = f"{result.seconds:.0f} s in all"
    if result.step_seconds is not None:
        timing += f", {1000 * result.step_seconds:.0f} ms per step"
    console.print(
        f"{timing}. In {result.folder}: loss.png, metrics.jsonl, result.json, tensorboard/, checkpoints/",
        highlight=False,
        soft_wrap=True,
    )
    if config.task == "text":
        console.print(
            f"continue a text of yours: attnzoo generate --checkpoint {shlex.quote(str(result.folder))} --prompt 'The '",
            highlight=False,
            soft_wrap=True,
        )
