"""Prepared data sets: where they lie, how they get there, and how to tell two of them apart."""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train.data.builders import BUILDERS, PythonTopics, topics

_SAMPLED = 2000  # records per split that a fingerprint reads at most


def default_data_dir() -> Path:
    """Where prepared data sets are kept unless --data.dir says otherwise: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnzoo" / "data"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set with random access; `train[i]` is a dict of numpy arrays (bytes for text).

    fingerprint: sha256 over the number of records of each split and up to 2,000 evenly spaced records.
    """

    name: str
    description: str
    features: Any
    train: Sequence[dict[str, Any]]
    validation: Sequence[dict[str, Any]]
    fingerprint: str


def open_dataset(name: str, data_dir: Path | None = None) -> Dataset:
    """The data set `name`, prepared on first use.

    The sets that come along are made on the spot. Any other name is looked up in `data_dir` and otherwise
    downloaded by TFDS. Validation is the split of that name, else "test", else the last tenth of "train".
    Raises ValueError when the data set is not there and cannot be made.
    """
    root = Path(data_dir) if data_dir is not None else default_data_dir()
    tfds.disable_progress_bar()
    builder = _ours(name, root) if name in BUILDERS else _theirs(name, root)
    splits = builder.info.splits
    if "train" not in splits:
        raise ValueError(f"data set {name!r}: has no split 'train', only {', '.join(splits)}")
    held_out = next((split for split in ("validation", "test") if split in splits), None)
    parts = ("train", held_out) if held_out else ("train[:90%]", "train[90%:]")
    with _reading(name, Path(builder.data_path)):
        train, validation = (builder.as_data_source(split=part) for part in parts)
        fingerprint = _fingerprint(train, validation)
    return Dataset(
        name=name,
        description=builder.info.description,
        features=builder.info.features,
        train=train,
        validation=validation,
        fingerprint=fingerprint,
    )


def _ours(name: str, root: Path) -> tfds.core.DatasetBuilder:
    """A data set of ours. Its folder is named after what it holds, so two Pythons do not share one."""
    content = repr(topics()) if BUILDERS[name] is PythonTopics else ""
    folder = root / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        _prepare(name, folder)
    with _reading(name, folder):
        return BUILDERS[name](data_dir=folder, file_format="array_record")


@contextlib.contextmanager
def _reading(name: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"data set {name!r}: the prepared files in {folder} cannot be read ({_brief(error)}); "
            "delete that folder and it is made again"
        ) from error


def _prepare(name: str, folder: Path) -> None:
    with making(folder) as scratch, contextlib.redirect_stdout(io.StringIO()):  # TFDS announces what it does
        BUILDERS[name](data_dir=scratch, file_format="array_record").download_and_prepare()


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that is renamed to it at the end, unless an error comes: whoever is first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster, and its files are the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _theirs(name: str, root: Path) -> tfds.core.DatasetBuilder:
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record", try_gcs=False)
        builder.download_and_prepare()
    except Exception as error:
        raise ValueError(
            f"data set {name!r}: not found in {root}, and TFDS could not fetch it ({_brief(error)}). Downloading "
            "needs a network, and some data sets need TensorFlow to be prepared; give --data.dir a folder that "
            f"holds it already, or take one that comes along: {', '.join(BUILDERS)}"
        ) from error
    return builder


def _fingerprint(*splits: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for records in splits:
        digest.update(str(len(records)).encode())
        for index in np.unique(np.linspace(0, len(records) - 1, min(len(records), _SAMPLED)).astype(int)):
            for key, value in sorted(records[int(index)].items()):
                digest.update(key.encode())
                digest.update(value if isinstance(value, bytes) else np.asarray(value).tobytes())
    return digest.hexdigest()


def _brief(error: Exception) -> str:
    """The first line of an error, short enough for one paragraph."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 160 else line[:159] + "…"
