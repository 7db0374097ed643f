"""Where a corpus comes from: files of the user's own, or a data set by name."""

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import DataConfig
from train.data.builders import BUILDERS
from train.data.records import READERS, Field, Tally, documents
from train.data.store import default_data_dir, open_dataset

_WHOLE = 64 << 20  # bytes: a fingerprint reads files up to this size whole
_BLOCK = 64 << 10  # and of larger ones this much at 1,024 evenly spaced places

Documents = Callable[[Tally], Iterator[str]]
"""Reads all documents in a fixed order, counting what was skipped."""


@dataclass(frozen=True)
class Source:
    """Texts to train and to validate on; validation is None where it is to be taken from the training texts.

    fingerprint: tells two sources with different content apart, whatever they are called.
    """

    name: str
    fingerprint: str
    train: Documents
    validation: Documents | None


def data_folder(data: DataConfig) -> Path:
    """Where prepared data are kept."""
    return Path(data.dir).expanduser() if data.dir else default_data_dir()


def open_source(data: DataConfig) -> Source:
    """The texts that `--data.path`, or else `--data.name`, stands for."""
    if data.path is not None:
        return _files(data)
    if data.validation is not None:
        raise ValueError("--data.validation: goes with --data.path; a named data set has a validation split of its own")
    return _named(data)


def _files(data: DataConfig) -> Source:
    assert data.path is not None
    train = find_files("--data.path", data.path)
    held_out = None if data.validation is None else find_files("--data.validation", data.validation)
    digest = hashlib.sha256(repr(data.field).encode())
    for path in (*train, *(held_out or ())):
        digest.update(_content(path))
    digest.update(str(None if held_out is None else len(held_out)).encode())
    return Source(
        data.path,
        digest.hexdigest(),
        _reading(train, data.field),
        None if held_out is None else _reading(held_out, data.field),
    )


def find_files(option: str, pattern: str) -> list[Path]:
    """The files of a path, a folder or a glob, in the order of their names; files and folders named ".…" are left out.

    Raises ValueError when there is none, when all are empty, and for a file of a kind that cannot be read.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        within = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        found = [p for p in within if p.is_file() and _ending(p) is not None]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        found = found or ([path] if path.is_file() else [])  # a name with brackets in it is no glob
    if not found:
        raise ValueError(f"{option}: there is no file {pattern!r}; give a file, a folder or a glob of {', '.join(READERS)}")
    for file in found:
        if _ending(file) is None:
            raise ValueError(f"{option}: {file} is of no kind that can be read; known are {', '.join(READERS)}")
    if not any(file.stat().st_size for file in found):
        raise ValueError(f"{option}: {pattern} is empty" + (f" (all {len(found)} files)" if len(found) > 1 else ""))
    return sorted(found)


def _ending(path: Path) -> str | None:
    """Which reader a file's name asks for; shards are named name.array_record-00000-of-00002."""
    if ".array_record" in path.name:
        return ".array_record"
    return path.suffix if path.suffix in READERS else None


def _reading(files: Sequence[Path], name: str | None) -> Documents:
    def read(tally: Tally) -> Iterator[str]:
        field = Field(name)
        for path in files:
            if path.stat().st_size:
                tally.files += 1
                yield from READERS[_ending(path) or ""](path, field, tally)

    return read


def _content(path: Path) -> bytes:
    """A hash of a file's size and content; of a large file's content in evenly spaced blocks."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            count = _WHOLE // _BLOCK
            for i in range(count):
                file.seek(i * (size - _BLOCK) // (count - 1))
                digest.update(file.read(_BLOCK))
    return digest.digest()


def _named(data: DataConfig) -> Source:
    import tensorflow_datasets as tfds

    dataset = open_dataset(data.name, data_folder(data))
    field = Field(data.field)
    kinds = {name: isinstance(feature, tfds.features.Text) for name, feature in dataset.features.items()}
    name = field.of(kinds, f"data set {data.name!r}")
    fingerprint = dataset.fingerprint
    if data.field is not None:
        fingerprint = hashlib.sha256(f"{fingerprint} {data.field}".encode()).hexdigest()

    def reading(records: Sequence[dict[str, Any]]) -> Documents:
        def read(tally: Tally) -> Iterator[str]:
            tally.files += 1
            order: Sequence[int] = range(len(records))
            if data.name in BUILDERS:  # TFDS stores records in the order of hashes; titles are an order that means something
                order = sorted(order, key=lambda i: records[i]["title"])
            return documents(_values(records, order, name, tally), tally)

        return read

    return Source(data.name, fingerprint, reading(dataset.train), reading(dataset.validation))


def _values(records: Sequence[dict[str, Any]], order: Sequence[int], name: str, tally: Tally) -> Iterator[Any]:
    for i in order:
        try:
            value = records[i][name]
        except Exception:  # whatever the file's format and its decoder raise
            tally.skip("damaged record")
        else:
            yield value
