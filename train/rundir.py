"""The folder of a run: how it is claimed, what it holds, how it is found again."""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from train.checkpoint import Checkpoints
from train.config import Config, from_json
from train.data.tokenizer import BYTES
from train.metrics import write_atomically

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
BEST = "best"


@dataclass(frozen=True)
class About:
    """What has to be the same for a run to go on: stored in its folder and in every checkpoint."""

    config: Config
    data: dict[str, str]
    versions: dict[str, str]

    @staticmethod
    def now(config: Config, data_name: str, fingerprint: str, tokenizer: str | None = None) -> "About":
        """tokenizer: its fingerprint, for text."""
        versions = {name: version(name) for name in ("jax", "flax", "optax", "grain")}
        data = {"name": data_name, "fingerprint": fingerprint} | ({} if tokenizer is None else {"tokenizer": tokenizer})
        return About(config, data, {"python": platform.python_version(), **versions})

    def as_json(self) -> dict[str, Any]:
        return {"config": self.config.as_json(), "data": self.data, "versions": self.versions}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "About":
        return About(from_json(values["config"]), values["data"], values["versions"])

    def check_tokenizer(self, fingerprint: str | None) -> None:
        """Raises ValueError when the run's tokenizer was another one: ids would stand for other text."""
        stored = self.data.get("tokenizer") or (fingerprint and BYTES)  # runs of old knew bytes only
        if fingerprint != stored:
            raise ValueError(
                f"--data.tokenizer: the tokenizer is not the run's: it has fingerprint {str(fingerprint)[:12]}, the run was "
                f"trained with {self.config.data.tokenizer!r} of fingerprint {str(stored)[:12]}; give the path of that file"
            )

    def check_data(self, fingerprint: str) -> None:
        """Raises ValueError when the data of the run was other data."""
        if fingerprint != self.data["fingerprint"]:
            raise ValueError(
                f"the data is not what this run was trained on: {self.data['name']!r} has fingerprint "
                f"{fingerprint[:12]}, the run has {self.data['fingerprint'][:12]} (made with Python "
                f"{self.versions['python']}; this is {platform.python_version()}, and the text of python_topics "
                "differs between versions of Python). Resume with the same data, or start a new run"
            )


def new_run(folder: Path, about: About) -> None:
    """Claims `folder` for a run, before anything is written there.

    Raises ValueError when it holds a run already. Of two processes that try at once, one gets it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / CHECKPOINTS).exists():
        raise _taken(folder)
    scratch = folder / f".{CONFIG}.{os.getpid()}"
    write_atomically(scratch, json.dumps(about.as_json(), indent=1) + "\n")
    try:
        os.link(scratch, folder / CONFIG)  # fails if it is there, unlike a rename
    except FileExistsError:
        raise _taken(folder) from None
    finally:
        scratch.unlink()


def _taken(folder: Path) -> ValueError:
    return ValueError(
        f"--out: {folder} already holds a run, and nothing in it is overwritten; continue it with "
        f"--resume {folder}, or choose another folder"
    )


def open_run(folder: Path) -> About:
    """What the run in `folder` is. Raises ValueError when there is none, or its description is damaged."""
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"--resume: there is no run in {folder} ({CONFIG} is missing)")
    try:
        return About.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--resume: {path} cannot be read ({error})") from error


def check_seen(folder: Path) -> None:
    """Raises ValueError when this process does not see the run's folder that the first one claimed."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"--out: {folder} is not seen here; it must lie on a file system that all processes share")


def free_folder(name: str) -> Path:
    """The first of runs/NAME, runs/NAME-2, ... that holds nothing."""
    root, count = Path("runs"), 1
    while (folder := root / (name if count == 1 else f"{name}-{count}")).exists():
        count += 1
    return folder


def find_checkpoint(path: Path) -> tuple[Checkpoints, int]:
    """The newest checkpoint of a run's folder, the one of `RUN/checkpoints/STEP`, or the best: `RUN/checkpoints/best`.

    Raises ValueError when there is none.
    """
    named = path.parent.name == CHECKPOINTS and (path.name.isdigit() or path.name == BEST)
    folder, wanted = (path.parent, path.name) if named else (path / CHECKPOINTS, None)
    if not folder.is_dir():
        raise ValueError(f"--checkpoint: there is no run in {path}; give the folder that `attnzoo train` wrote")
    checkpoints = Checkpoints(folder)
    steps = checkpoints.steps()
    if wanted == BEST:
        best = checkpoints.best()
        step = None if best is None else best[0]
    elif wanted is not None:
        step = int(wanted) if int(wanted) in steps else None
    else:
        step = steps[-1] if steps else None
    if step is None:
        which = {None: "no finished checkpoint", BEST: "no checkpoint with a validation score"}.get(
            wanted, f"no finished checkpoint of step {wanted}"
        )
        raise ValueError(f"--checkpoint: {which} in {folder}; it has {', '.join(map(str, steps)) or 'none'}")
    return checkpoints, step
