"""What the training loop costs beside its step.

    attnzoo bench loop

Runs `attnzoo train` as it is, with a model whose step takes about 50 ms, and waits for every step to finish before the
loop goes on. The time between the end of one step and the beginning of the next is then all that the loop does itself:
data, their way to the device, metrics, the progress display, checkpoints. Nothing of it is hidden behind the step, as it
is on a device of its own, so this is the most that it can cost. Validation is left out: it is a computation too. Writes
results/loop.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
from rich.console import Console

import train.loop
from train.config import Config, EvalConfig
from train.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
TARGET = 0.02
STEP_SECONDS = 0.05


class Watched(Trainer):
    """Notes when each training step begins and ends."""

    began: list[float]
    ended: list[float]

    def _compile(self):
        step = super()._compile()
        self.began, self.ended = [], []
        watched.append(self)

        def timed(state, batch):
            self.began.append(time.perf_counter())
            result = jax.block_until_ready(step(state, batch))
            self.ended.append(time.perf_counter())
            return result

        return timed


watched: list[Watched] = []


def measure(config: Config) -> tuple[list[float], list[float]]:
    """(seconds of each step, seconds between it and the next) of a run, without the first steps, which compile."""
    watched.clear()
    usual, train.loop.Trainer = train.loop.Trainer, Watched  # type: ignore[misc]
    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            train.loop.train(config, Path(folder) / "run", console=Console(file=nowhere, force_terminal=True))
    finally:
        train.loop.Trainer = usual  # type: ignore[misc]
    began, ended = watched[0].began, watched[0].ended
    first = config.log_every
    steps = [end - begin for begin, end in zip(began, ended, strict=True)]
    gaps = [begin - end for begin, end in zip(began[1:], ended, strict=False)]
    return steps[first:], gaps[first:]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="attnzoo bench loop",
        description="What the training loop costs beside its step.",
        epilog="examples:\n  attnzoo bench loop\n  attnzoo bench loop --steps 1000 --out /tmp/loop.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=600, help="steps to take (default: 600)")
    parser.add_argument("--out", type=Path, default=RESULTS / "loop.json", help="where the JSON goes")
    args = parser.parse_args(argv)
    config = replace(Config(), steps=args.steps, eval=EvalConfig(every=10 * args.steps, sample=1))
    load = os.getloadavg()
    steps, gaps = measure(config)
    mean = statistics.fmean(gaps)
    document = {
        "command": f"attnzoo bench loop --steps {args.steps}",
        "share_of_a_50_ms_step": mean / STEP_SECONDS,
        "target": TARGET,
        "milliseconds_between_steps": {
            "mean": 1e3 * mean,
            "median": 1e3 * statistics.median(gaps),
            "largest": 1e3 * max(gaps),
        },
        "milliseconds_per_step": {"mean": 1e3 * statistics.fmean(steps), "median": 1e3 * statistics.median(steps)},
        "steps": args.steps,
        "log_every": config.log_every,
        "checkpoint_every": config.checkpoint.every,
        "load_average_before": load,
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("jax", "flax", "optax", "grain")}},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(
        f"between steps {1e3 * mean:.2f} ms in the mean ({1e3 * statistics.median(gaps):.2f} ms at the median), steps of "
        f"{1e3 * statistics.median(steps):.1f} ms: {100 * mean / STEP_SECONDS:.2f} % of a step of 50 ms (target "
        f"{100 * TARGET:.0f} %); wrote {args.out}"
    )
    return 0
