"""The command `attnzoo plan`."""

import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import tyro
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attnzoo import catalog
from attnzoo.errors import unknown
from train.command_line import option, parse
from train.config import Config, MeshConfig
from train.mixer_args import parse_mixer_args, take_mixer_args
from train.plan.chips import GIB, Slice, described, device_count, without_tpus
from train.plan.compile import Planned, Prepared, compile_step, prepare
from train.plan.report import Report
from train.plan.search import Limits, nearest_that_fits
from train.plan.tasks import Sizes
from train.presets import PRESETS, preset
from train.sharding import AXES

DESCRIPTION = f"""\
Compiles the training step for a TPU pod that need not be there, and says what it takes: memory per device by kind,
operations, collectives, the least time of a step, and whether it fits; if not, the nearest settings that do. Needs the TPU
compiler (pip install 'attnzoo[train,tpu]'), and no TPU. Exits with 1 if it does not fit.

presets: {", ".join(PRESETS)}. Every option of attnzoo train changes a preset.

examples:
  attnzoo plan --config llm-7b --topology v5e:16x16 --mesh fsdp=64,tensor=4
  attnzoo plan --config llm-1b --topology v6e:4x4 --model.remat full --batch 64
  attnzoo plan --config llm-1b --topology v5p:4x4x4 --mixer transmla --data.context 8192
  attnzoo plan --config vit-l --topology v5e:4x4 --json
  attnzoo plan --config llm-7b --topology v5e:8x8 --tries 0 --out plans/small
"""


@dataclass(frozen=True)
class PlanCommand:
    """`attnzoo plan`."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.arg(name="config", metavar="NAME")]
    """The preset to start from."""
    topology: str
    """The slice, e.g. v5e:16x16."""
    sides: Annotated[str | None, tyro.conf.arg(name="mesh", metavar="AXIS=N,...")] = None
    """Devices along the axes data, fsdp, tensor and context; by default all along fsdp."""
    sizes: Sizes = field(default_factory=Sizes)
    tries: int = 6
    """How many other settings are compiled at most, where these do not fit."""
    minutes: float = 30.0
    """No other setting is begun after this."""
    json: bool = False
    """Print JSON."""
    out: str | None = None
    """Folder for plan.json and plan.png."""


def run_plan(argv: Sequence[str]) -> int:
    """0 if the settings fit, 1 if not."""
    command = parse_plan(argv)
    without_tpus()
    with _Display(Console(stderr=True), command) as display:
        report = make_plan(command, described(command.topology), f"attnzoo plan {shlex.join(argv)}", display)
    if command.out is not None:
        report.write(Path(command.out).expanduser())
    if command.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        report.show(Console())
        if command.out is not None:
            print(f"in {command.out}: plan.json, plan.png")
    sys.stdout.flush()
    return 0 if report.plan.fits else 1


def parse_plan(argv: Sequence[str]) -> PlanCommand:
    """The command of a command line, its mesh complete.

    Raises ValueError for an unknown preset, topology, axis or mixer, and for a mesh that is not as large as the slice.
    """
    line, taken = take_mixer_args(argv)
    name = option(line, "--config")
    settings = Config() if name is None else preset(name)
    default = PlanCommand(settings, tyro.MISSING if name is None else name, tyro.MISSING)
    command = parse(PlanCommand, line, "plan", DESCRIPTION, default)
    config = command.settings
    catalog.mixer(config.mixer)  # raises for an unknown one
    if taken:
        config = replace(config, mixer_args={**config.mixer_args, **parse_mixer_args(config.mixer, taken)})
    devices = device_count(command.topology)
    sides: dict[str, Any] = _sides(command.sides)
    mesh = replace(config.mesh, **sides)
    if mesh == MeshConfig():
        mesh = MeshConfig(fsdp=devices)
    count = math.prod(getattr(mesh, axis) for axis in AXES)
    if count != devices:
        given = " x ".join(f"{axis}={getattr(mesh, axis)}" for axis in AXES)
        raise ValueError(
            f"--mesh: {given} is {count} devices, and {command.topology} has {devices}; the product must be {devices}, "
            f"e.g. --mesh fsdp={devices}"
        )
    return replace(command, settings=replace(config, mesh=mesh))


def _sides(text: str | None) -> dict[str, int]:
    """{"fsdp": 64, "tensor": 4} of "fsdp=64,tensor=4"."""
    sides: dict[str, int] = {}
    for part in (text or "").split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if not part:
            continue
        if axis not in AXES:
            raise unknown("axis of --mesh", axis, AXES)
        if not size.isdigit() or int(size) < 1 or axis in sides:
            raise ValueError(f"--mesh {text}: expected AXIS=N,... with every axis once and N at least 1")
        sides[axis] = int(size)
    return sides


class _Display:
    """What is being compiled and for how long, live on a terminal; what came out stays, a line each."""

    def __init__(self, console: Console, command: PlanCommand):
        self._console, self._where = console, f"compiling for {command.topology}"
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self._live = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._live.stop()

    def compiled(self, prepared: Prepared, pod: Slice, what: str) -> Planned:
        task = self._live.add_task(f"{self._where}: {what}", total=None)
        plan = compile_step(prepared, pod)
        self._live.remove_task(task)
        verdict = f"{plan.needed / GIB:.2f} of {plan.usable / GIB:.2f} GiB, {'fits' if plan.fits else 'does not fit'}"
        self._console.print(f"{what}: {verdict} ({plan.seconds:.0f} s)", highlight=False, soft_wrap=True, markup=False)
        return plan


def make_plan(command: PlanCommand, pod: Slice, line: str, display: _Display) -> Report:
    """The plan of a command, and the search for settings that fit if it does not."""
    config, sizes = command.settings, command.sizes
    prepared = prepare(config, sizes, pod)
    plan = display.compiled(prepared, pod, "as asked")
    search = None
    if not plan.fits and command.tries > 0:

        def attempt(config: Config, change: str) -> Planned:
            return display.compiled(prepare(config, sizes, pod), pod, change)

        search = nearest_that_fits(prepared, plan, pod, Limits(command.tries, command.minutes), attempt)
    task = prepared.trainer.task
    return Report(command.preset, pod, plan, search, task.unit, task.units_per_step, line)
