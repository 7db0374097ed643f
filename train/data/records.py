"""Texts out of files: what can be read is read, what cannot is counted."""

import codecs
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnzoo.errors import unknown
from train.data.tokenizer import optional

_AT_ONCE = 256  # records of an array_record file that are read in one call


@dataclass
class Tally:
    """How many records were met, and why some were skipped.

    A record is a line of a text file, a line of JSONL, a row of parquet or a record of array_record. A file that
    cannot be opened counts as one skipped record, and as a skipped file.
    """

    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    files: int = 0
    unreadable: int = 0

    def skip(self, reason: str, count: int = 1) -> None:
        self.records += count
        self.skipped[reason] += count

    def skip_file(self) -> None:
        self.unreadable += 1
        self.skip("unreadable file")

    @property
    def share(self) -> float:
        """The skipped share of the records or of the files, whichever is larger: 0 ... 1."""
        return max(self.skipped.total() / max(1, self.records), self.unreadable / max(1, self.files))

    def describe(self) -> str:
        """E.g. "3 of 1,000 records skipped (2 invalid JSON, 1 undecodable text)"."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
        return f"{self.skipped.total():,} of {self.records:,} records skipped ({reasons})"


class Field:
    """The field of a record that holds its text; the first record decides which one that is.

    name: as asked for; None takes "text", or the only field with text.
    """

    def __init__(self, name: str | None):
        self.name = name
        self._found: str | None = None

    def of(self, kinds: Mapping[str, bool], where: str) -> str:
        """The field's name. kinds: field -> whether it holds text. Raises ValueError if there is none to take."""
        if self._found is None or self._found not in kinds:
            self._found = self._choose(kinds, where)
        return self._found

    def _choose(self, kinds: Mapping[str, bool], where: str) -> str:
        if self.name is not None and self.name not in kinds:
            raise ValueError(f"--data.field: {unknown(f'field of {where}', self.name, kinds)}")
        if self.name is not None:
            if not kinds[self.name]:
                raise ValueError(f"--data.field: {self.name!r} of {where} does not hold text; {_listed(kinds)}")
            return self.name
        texts = [name for name, is_text in kinds.items() if is_text]
        if "text" in texts:
            return "text"
        if len(texts) != 1:
            raise ValueError(f"--data.field: {where} has no field 'text' and {len(texts)} that hold text; {_listed(kinds)}")
        return texts[0]


def _listed(kinds: Mapping[str, bool]) -> str:
    return "its fields: " + (", ".join(f"{name} (text)" if text else name for name, text in kinds.items()) or "none")


def as_text(value: str | bytes) -> str:
    """The text of a record.

    Raises ValueError for bytes that are not UTF-8, for halves of surrogate pairs, which no UTF-8 can hold, and for
    zero bytes, which are no text and end a document.
    """
    text = value.decode() if isinstance(value, bytes) else value
    text.encode()
    if "\0" in text:
        raise ValueError("a zero byte")
    return text


def checked(value: Any, tally: Tally) -> str | None:
    """The value as text, counted as a record; None, counted as skipped, for what is no text."""
    if not isinstance(value, str | bytes):
        tally.skip("without text in the field")
        return None
    try:
        text = as_text(value)
    except ValueError:
        tally.skip("undecodable text")
        return None
    tally.records += 1
    return text


def documents(values: Iterable[Any], tally: Tally) -> Iterator[str]:
    """The values that are texts and not blank."""
    found = (checked(value, tally) for value in values)
    return (text for text in found if text is not None and text.strip())


def read_lines(path: Path, field: Field, tally: Tally) -> Iterator[str]:
    """A text file is one document, less the lines that are not UTF-8."""
    if field.name is not None:
        raise ValueError(f"--data.field: a text file has no fields, got {field.name!r} for {path}; leave the option out")
    with path.open("rb") as file:
        lines = [checked(line.removeprefix(codecs.BOM_UTF8) if i == 0 else line, tally) for i, line in enumerate(file)]
    text = "".join(line for line in lines if line is not None)
    if text.strip():
        yield text


def read_jsonl(path: Path, field: Field, tally: Tally) -> Iterator[str]:
    """A document per line, which is a JSON object."""
    with path.open("rb") as file:
        yield from documents(_values((line for line in file if line.strip()), field, tally, str(path)), tally)


def _values(lines: Iterable[bytes], field: Field, tally: Tally, where: str) -> Iterator[Any]:
    """The field of each JSON object; None where an object does not have it."""
    name = None
    for line in lines:
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            tally.skip("undecodable text")
            continue
        except (ValueError, RecursionError):
            tally.skip("invalid JSON")
            continue
        if not isinstance(record, dict):
            tally.skip("invalid JSON")
            continue
        if name is None:
            name = field.of({key: isinstance(value, str) for key, value in record.items()}, where)
        yield record.get(name)


def read_parquet(path: Path, field: Field, tally: Tally) -> Iterator[str]:
    """A document per row. A row group that cannot be read is skipped with all its rows."""
    arrow, parquet = (optional(name, f"--data.path {path}") for name in ("pyarrow", "pyarrow.parquet"))
    failures = (arrow.ArrowException, OSError)
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
    except failures:
        tally.skip_file()
        return
    with file:
        kinds = {column.name: _is_text(arrow, column.type) for column in file.schema_arrow}
        name = field.of(kinds, str(path))
        for group in range(file.num_row_groups):
            try:
                column = file.read_row_group(group, columns=[name]).column(0)
                values = column.cast(arrow.large_binary()).to_pylist()  # so that text is decoded here, row by row
            except failures:
                tally.skip("row of an unreadable row group", file.metadata.row_group(group).num_rows)
                continue
            yield from documents(values, tally)


def _is_text(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    return any(is_kind(kind) for is_kind in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary))


def read_array_record(path: Path, field: Field, tally: Tally) -> Iterator[str]:
    """A document per record: UTF-8 text, or a JSON object where the first record is one."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    try:
        if not reader.ok():
            tally.skip_file()
            return
        records = _array_records(reader, tally)
        first = next(records, None)
        if first is None:
            return
        records = itertools.chain([first], records)
        yield from documents(_values(records, field, tally, str(path)) if _is_object(first) else records, tally)
    finally:
        with contextlib.suppress(RuntimeError):  # closing reports once more what was wrong
            reader.close()


def _array_records(reader: Any, tally: Tally) -> Iterator[bytes]:
    count = reader.num_records()
    for start in range(0, count, _AT_ONCE):
        indices = range(start, min(start + _AT_ONCE, count))
        try:
            yield from reader.read(list(indices))
            continue
        except RuntimeError:  # one of them at least: each by itself
            pass
        for index in indices:
            try:
                record = reader.read([index])[0]
            except RuntimeError:
                tally.skip("damaged record")
            else:
                yield record


def _is_object(record: bytes) -> bool:
    try:
        return isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False


Reader = Callable[[Path, Field, Tally], Iterator[str]]

READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), read_lines),
    **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl),
    ".parquet": read_parquet,
    ".array_record": read_array_record,
}
"""Ending of a file's name -> how it is read."""
