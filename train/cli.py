"""The commands `attnzoo train | compare | generate | export | claim | plan`. What a user got wrong is raised as ValueError."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from train import processes
from train.claim import ClaimConfig, run_claim
from train.command_line import option as _option
from train.command_line import parse as _parse
from train.compare import compare, table
from train.config import Config, absolute_paths, differences, smoke
from train.export import ExportConfig, export
from train.generate import GenerateConfig, generate
from train.launch import launch
from train.leaderboard import table as suite_table
from train.loop import train
from train.mixer_args import describe_mixer_args, parse_mixer_args, take_mixer_args
from train.presets import preset
from train.processes import INTERRUPTED, DistributedConfig
from train.report import print_result
from train.rundir import CONFIG, free_folder, open_run
from train.suite import run_suite, smoke_suite, suite_named
from train.tasks import task_class

_TRAIN = """\
Trains a small model with any mixer: two minutes on two CPU cores by default, a pod by configuration.

examples:
  attnzoo train
  attnzoo train --mixer transformer --mixer.num-kv-heads 1
  attnzoo train --mixer value_residual --steps 800 --seed 1
  attnzoo train --task digits
  attnzoo train --data.path "texts/*.jsonl" --data.field body --data.tokenizer tokenizer.json --data.pack
  attnzoo train --mesh.data 2 --mesh.tensor 4 --batch 64
  attnzoo train --processes 2 --mesh.data 8 --batch 64
  srun attnzoo train --mesh.fsdp 64 --batch 512 --out /shared/run
  attnzoo train --optimizer.name muon --optimizer.schedule wsd --ema 0.99
  attnzoo train --batch 64 --accumulate 8 --model.dtype bfloat16
  attnzoo train --preset llm-100m --mesh.fsdp 8
  attnzoo train --mesh.context 8 --data.context 8192
  attnzoo train --smoke --out /tmp/smoke
  attnzoo train --resume runs/text-transformer
"""

_GENERATE = """\
Continues a prompt with a trained language model.

examples:
  attnzoo generate --checkpoint runs/text-transformer --prompt "The statement"
  attnzoo generate --checkpoint runs/text-transformer --prompt "A class" --temperature 0 --max-new 80
  attnzoo generate --checkpoint runs/text-transformer/checkpoints/200 --prompt "if" --top-k 20 --seed 3
"""


_EXPORT = """\
Writes the weights of a trained model as a safetensors file, with the configuration in its metadata.

examples:
  attnzoo export runs/text-transformer --out model.safetensors
  attnzoo export runs/text-transformer/checkpoints/best --out model.safetensors --dtype bfloat16
  attnzoo generate --checkpoint model.safetensors --prompt "The "
"""

_COMPARE = """\
Trains several mixers at one parameter budget, and tabulates quality, step time and cache. An entry may set
arguments of its mixer: KEY:ARG=VALUE:ARG=VALUE. With --suite NAME the ground is fixed: see attnzoo compare --suite language
--help.

examples:
  attnzoo compare --mixers transformer,value_residual
  attnzoo compare --mixers transformer,transformer:num_kv_heads=1 --steps 200
  attnzoo compare --task digits --mixers transformer,adaptive_entmax
  attnzoo compare --suite language
"""

_SUITE = """\
A leaderboard: task, model, steps and seeds are the suite's, and every mixer has the parameters of its reference. Measures
quality at equal parameters and with a cache of at most a quarter of the reference's, time per training step and per decoded
token, and cache bytes per token. About a minute per mixer on two CPU cores.

examples:
  attnzoo compare --suite language
  attnzoo compare --suite language --mixers transformer,value_residual:mode=svformer
  attnzoo compare --suite language --out benchmarks/results/language
  attnzoo compare --suite language --mixers transformer,adaptive_entmax --smoke
"""

_CLAIM = """\
Runs the experiment that checks a paper's central claim, and records what came out.

examples:
  attnzoo claim value_residual
  attnzoo claim value_residual --quick
  attnzoo claim value_residual --seeds 0 1 2 3 --out /tmp/claims
"""


@dataclass(frozen=True)
class TrainCommand:
    """`attnzoo train`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: str | None = None
    """Folder of the run; by default runs/TASK-MIXER, with a number if that is taken."""
    resume: str | None = None
    """Continue the run in this folder, exactly where its last checkpoint stands."""
    smoke: bool = False
    """A run of CI length: at most 20 steps with 8 examples each."""
    processes: int = 1
    """Start this many processes on this machine, each with its own devices, which train together."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    preset: str | None = None
    """Start from the sizes of llm-100m, llm-1b, llm-7b or vit-l instead of the task's own."""


@dataclass(frozen=True)
class CompareCommand:
    """`attnzoo compare`."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    mixers: str
    """Keys of exhibits, separated by commas; the first sets the number of parameters."""
    out: str | None = None
    """Folder of the comparison; by default runs/compare-TASK, with a number if that is taken."""
    smoke: bool = False
    """Runs of CI length: at most 20 steps with 8 examples each."""


@dataclass(frozen=True)
class SuiteCommand:
    """`attnzoo compare --suite NAME`."""

    suite: str
    """Which suite: language."""
    mixers: str = "all"
    """Keys of exhibits, separated by commas, or all that are built."""
    out: str | None = None
    """Folder for leaderboard.json and leaderboard.png; by default runs/suite-NAME, with a number if that is taken."""
    smoke: bool = False
    """A few steps of one seed, to see that it runs; the numbers mean nothing."""


def train_main(argv: Sequence[str]) -> int:
    """`attnzoo train`: 0 when the run is finished, 130 when it was interrupted and can be resumed.

    Of several processes: 3 when another one is gone, 1 when this one failed alone.
    """
    command = parse_train(argv)
    if command.processes > 1 and "ATTNZOO_PROCESS" not in os.environ:  # which those that are started have
        folder = _folder(command)
        place = [] if command.resume or command.out else ["--out", str(folder)]
        return launch([*argv, *place], command.processes, folder)
    with processes.ending():
        processes.connect(command.distributed)
        return _train(command)


def _folder(command: TrainCommand) -> Path:
    if command.resume is not None:
        return Path(command.resume).expanduser()
    if command.out is not None:
        return Path(command.out).expanduser()
    return free_folder(f"{command.config.task}-{command.config.mixer}")


def _train(command: TrainCommand) -> int:
    config, folder = command.config, Path(processes.from_first(str(_folder(command))))
    console = Console(quiet=processes.index() > 0)
    resume = f"attnzoo train --resume {shlex.quote(str(folder))}"
    if command.processes > 1:
        resume += f" --processes {command.processes}"
    try:
        result = train(config, folder, resume=command.resume is not None, console=console)
    except KeyboardInterrupt:  # before the first step, after the last one, or a second time
        started = (folder / CONFIG).is_file()
        said = f"continue from its last checkpoint with\n  {resume}" if started else "nothing was started"
        console.print(f"\ninterrupted; {said}", highlight=False, soft_wrap=True)
        if processes.count() > 1:  # the others may wait for this one
            raise
        return INTERRUPTED
    if result.interrupted:
        said = f"interrupted after step {result.step} of {config.steps}, which is saved"
        console.print(f"\n{said}. Continue with\n  {resume}", highlight=False, soft_wrap=True)
        return INTERRUPTED
    print_result(console, config, result)
    return 0


def parse_train(argv: Sequence[str]) -> TrainCommand:
    """The command of a command line. Defaults are those of the task, or of the run to be resumed.

    Raises ValueError for unknown tasks, mixers and mixer arguments, and for options that would make a resumed
    run another one. Other mistakes end in tyro's own message and exit code 2.
    """
    line, taken = take_mixer_args(argv)
    resume = _option(line, "--resume")
    if resume is not None and _option(line, "--out") is not None:
        raise ValueError("--out: a resumed run stays in its folder; give --resume alone")
    named = _option(line, "--preset")
    if resume is not None and named is not None:
        raise ValueError("--preset: a resumed run keeps its configuration; give --resume alone")
    stored = None if resume is None else open_run(Path(resume).expanduser()).config
    default = stored or (preset(named) if named else task_class(_option(line, "--task") or Config.task).defaults())
    mixer = _option(line, "--mixer") or default.mixer
    description = f"{_TRAIN}\narguments of the mixer {mixer}:\n{describe_mixer_args(mixer)}"
    command = _parse(TrainCommand, line, "train", description, TrainCommand(config=default))
    config = absolute_paths(smoke(command.config) if command.smoke else command.config)
    if taken:
        config = replace(config, mixer_args={**config.mixer_args, **parse_mixer_args(config.mixer, taken)})
    if command.processes < 1:
        raise ValueError(f"--processes: must be at least 1, got {command.processes}")
    if command.processes > 1 and command.distributed != DistributedConfig():
        raise ValueError("--processes: starts all processes of a job here, without --distributed, which joins one")
    changed = differences(stored, config) if stored else []
    if changed:
        raise ValueError(
            f"--resume: {resume} is a run of another configuration: {', '.join(changed)}. Leave these options "
            "out to continue it, or start a new run with --out"
        )
    return replace(command, config=config)


def generate_main(argv: Sequence[str]) -> int:
    """`attnzoo generate`: prints the prompt and what the model makes of it."""
    config = _parse(GenerateConfig, argv, "generate", _GENERATE)
    print(config.prompt + generate(config))
    return 0


def export_main(argv: Sequence[str]) -> int:
    """`attnzoo export`: 0 when the file is written."""
    path = export(_parse(ExportConfig, argv, "export", _EXPORT))
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MB")
    return 0


def compare_main(argv: Sequence[str]) -> int:
    """`attnzoo compare`: 0, 1 when mixers of a suite failed, or 130 when it was interrupted."""
    if _option(argv, "--suite") is not None:
        return _suite_main(argv)
    defaults = task_class(_option(argv, "--task") or Config.task).defaults()
    command = _parse(CompareCommand, argv, "compare", _COMPARE, CompareCommand(defaults, tyro.MISSING))
    config = absolute_paths(smoke(command.config) if command.smoke else command.config)

    def run(folder: Path, console: Console) -> int:
        comparison = compare(config, command.mixers, folder, console)
        console.print(table(comparison))
        console.print(f"In {folder}: compare.json, compare.png, and the folder of each run", highlight=False)
        return 0

    return _in_folder(command.out, f"compare-{config.task}", run)


def _suite_main(argv: Sequence[str]) -> int:
    command = _parse(SuiteCommand, argv, "compare", _SUITE)
    suite = suite_named(command.suite)
    suite = smoke_suite(suite) if command.smoke else suite

    def run(folder: Path, console: Console) -> int:
        board = run_suite(suite, command.mixers, folder, console)
        console.print(suite_table(board))
        if board.interrupted:
            raise KeyboardInterrupt
        console.print(f"{board.seconds:.0f} s. In {folder}: leaderboard.json, leaderboard.png", highlight=False)
        return 1 if board.failed else 0

    return _in_folder(command.out, f"suite-{suite.name}", run)


def _in_folder(out: str | None, name: str, run: Callable[[Path, Console], int]) -> int:
    """What `run` returns, given the folder `out`, by default runs/NAME; 130 when it is interrupted."""
    folder, console = Path(out).expanduser() if out else free_folder(name), Console()
    try:
        return run(folder, console)
    except KeyboardInterrupt:
        written = folder.is_dir() and any(folder.iterdir())
        said = f"what is finished lies in {folder}" if written else "nothing was finished"
        console.print(f"\ninterrupted; {said}", highlight=False)
        return INTERRUPTED


def claim_main(argv: Sequence[str]) -> int:
    """`attnzoo claim`: 0 whether or not the claim was reproduced."""
    config = _parse(ClaimConfig, argv, "claim", _CLAIM)
    result, path = run_claim(config)
    console = Console()
    console.print(f"[bold]{result.key}[/]: {result.claim}", highlight=False)
    shown = Table(title=result.metric)
    shown.add_column("")
    for seed in result.seeds:
        shown.add_column(f"seed {seed}", justify="right")
    for method, values in result.values.items():
        shown.add_row(method, *(f"{value:.4f}" for value in values))
    console.print(shown)
    verdict = "a quick run, no verdict" if config.quick else result.verdict
    console.print(f"{verdict} (asked: {result.margin}); {result.seconds:.0f} s", highlight=False)
    if path is not None:
        console.print(f"wrote {path} and {path.with_suffix('.png').name}", highlight=False, soft_wrap=True)
    return 0


def plan_main(argv: Sequence[str]) -> int:
    """`attnzoo plan`: 0 if it fits, 1 if not."""
    from train.plan.command import run_plan  # other commands need nothing of it

    return run_plan(argv)
