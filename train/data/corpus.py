"""A corpus as tokens on disk: read and encoded once, mapped into memory ever after.

Random access to every token is what makes a batch a pure function of the step and the seed, for any number of
processes: nothing is shuffled through a buffer, and no reader has a position of its own to be saved.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from train.config import DataConfig
from train.data.records import Tally
from train.data.sources import Source, data_folder, open_source
from train.data.store import making
from train.data.tokenizer import Tokenizer

FORMAT = 1  # of the prepared folder; another number makes it anew
VALIDATION_SHARE = 10  # one part in ten ...
VALIDATION_BYTES = 1 << 20  # ... and not more than this, so that validating stays short
_PIECE = 1 << 20  # characters that are encoded in one go


@dataclass(frozen=True)
class Split:
    """The tokens of one split, in a row.

    stream: an end of document, then every document with its end after it.
    ends: for every document, the index in `stream` of its end.
    text_bytes: UTF-8 bytes of all texts.
    """

    stream: Int[np.ndarray, "n+1"]
    ends: Int[np.ndarray, "d"]
    text_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """What a token stands for, on average; the end of a document counts as one byte, as it is with bytes."""
        return (self.text_bytes + len(self.ends)) / (len(self.stream) - 1)


@dataclass(frozen=True)
class Corpus:
    """Both splits, and what was met when they were made.

    fingerprint: of the texts, whatever tokenizer encoded them. tokenizer: the same of the tokenizer.
    tally: of both splits together.
    """

    name: str
    fingerprint: str
    tokenizer: str
    train: Split
    validation: Split
    tally: Tally


def open_corpus(data: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """The corpus that `data` names in the tokens of `tokenizer`, prepared on first use.

    Validation is what the source holds for it; else what `held_out` takes from the training texts.
    Raises ValueError when there is no such source, when it holds no usable record, and when more than
    `data.max_corrupt` of it had to be skipped.
    """
    source = open_source(data)
    key = f"{FORMAT} {source.fingerprint} {tokenizer.fingerprint}"
    folder = data_folder(data) / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.is_dir():
        _prepare(source, tokenizer, folder)
    corpus = _load(source, tokenizer, folder)
    if corpus.tally.share > data.max_corrupt:
        raise ValueError(
            f"data {source.name!r}: {corpus.tally.describe()}, and --data.max-corrupt allows a share of {data.max_corrupt:g} "
            "of the records and of the files; mend the data, or allow more"
        )
    return corpus


def _load(source: Source, tokenizer: Tokenizer, folder: Path) -> Corpus:
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        splits = {name: _load_split(folder, name, values) for name, values in about["splits"].items()}
        tally = Tally(**{**about["tally"], "skipped": Counter(about["tally"]["skipped"])})
        return Corpus(source.name, source.fingerprint, tokenizer.fingerprint, splits["train"], splits["validation"], tally)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"data {source.name!r}: the prepared tokens in {folder} cannot be read ({error}); delete that folder and they "
            "are made again"
        ) from error


def _load_split(folder: Path, name: str, about: dict[str, Any]) -> Split:
    stream = np.memmap(folder / f"{name}.tokens", np.dtype(about["dtype"]), mode="r")
    if len(stream) != about["tokens"]:
        raise ValueError(f"{name}.tokens holds {len(stream)} tokens, expected {about['tokens']}")
    return Split(stream, np.load(folder / f"{name}.ends.npy"), about["text_bytes"])


def _prepare(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    tally = Tally()
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    display = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with making(folder) as scratch, display:
        bar = display.add_task("", total=None)
        writers = {name: _Writer(scratch, name, tokenizer) for name in ("train", "validation")}
        for name, text in _split(source, tally):
            if writers[name].add(text):
                size = sum(writer.text_bytes for writer in writers.values())
                display.update(bar, description=f"encoding {source.name}: {size / 1e6:,.0f} MB of text")
        splits = {name: writer.close() for name, writer in writers.items()}
        empty = [name for name, about in splits.items() if about["tokens"] <= 1]
        if empty:
            skipped = f"; {tally.describe()}" if tally.skipped else ""
            raise ValueError(f"data {source.name!r}: there is no usable record for {' and '.join(empty)}{skipped}")
        about = {"source": source.name, "tokenizer": tokenizer.name, "splits": splits, "tally": vars(tally)}
        (scratch / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _split(source: Source, tally: Tally) -> Iterator[tuple[str, str]]:
    if source.validation is None:
        yield from held_out(source.train(tally))
        return
    for name, documents in (("train", source.train), ("validation", source.validation)):
        yield from ((name, text) for text in documents(tally))


def held_out(documents: Iterable[str]) -> Iterator[tuple[str, str]]:
    """("train" or "validation", text) of every document, in order.

    A document goes to validation whenever that keeps validation at most a tenth of the bytes so far, and at most
    1 MiB. If there is none that does, the end of the last document goes there: from a line's start, as much as
    a tenth of all, at most half of that document.
    """
    total = taken = 0
    last = None
    for text in documents:
        size = len(text.encode())
        total += size
        if taken + size <= min(total // VALIDATION_SHARE, VALIDATION_BYTES):
            taken += size
            yield "validation", text
            continue
        if last is not None:
            yield "train", last
        last = text
    if last is None:
        return
    if taken:
        yield "train", last
        return
    head, tail = _cut(last, min(total // VALIDATION_SHARE, VALIDATION_BYTES))
    yield "train", head
    yield "validation", tail


def _cut(text: str, size: int) -> tuple[str, str]:
    """The text in two: the second part has at most `size` characters or half of them, and begins a line if it can."""
    start = len(text) - max(1, min(size, len(text) // 2))
    line = text.find("\n", start - 1, len(text) - 1) + 1
    at = line or start
    return text[:at], text[at:]


class _Writer:
    """Encodes documents, some at a time, and appends them to a file."""

    def __init__(self, folder: Path, name: str, tokenizer: Tokenizer):
        self.folder, self.name, self.tokenizer = folder, name, tokenizer
        self.dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        self.file = (folder / f"{name}.tokens").open("wb")
        self.ends: list[int] = []
        self.waiting: list[str] = []
        self.waiting_size = self.text_bytes = 0
        self.tokens = 0
        self._append(np.array([tokenizer.end]))

    def add(self, text: str) -> bool:
        """Whether it wrote what was waiting, rather than let it wait for more."""
        self.waiting.append(text)
        self.waiting_size += len(text)
        self.text_bytes += len(text.encode())
        full = self.waiting_size >= _PIECE
        if full:
            self._flush()
        return full

    def close(self) -> dict[str, Any]:
        self._flush()
        self.file.close()
        np.save(self.folder / f"{self.name}.ends.npy", np.array(self.ends, np.int64))
        return {"dtype": self.dtype.name, "tokens": self.tokens, "text_bytes": self.text_bytes}

    def _flush(self) -> None:
        pieces = [list(_pieces(text)) for text in self.waiting]
        encoded = iter(self.tokenizer.encode([piece for document in pieces for piece in document]))
        for document in pieces:
            for _ in document:
                self._append(next(encoded))
            self._append(np.array([self.tokenizer.end]))
            self.ends.append(self.tokens - 1)
        self.waiting, self.waiting_size = [], 0

    def _append(self, tokens: Int[np.ndarray, "n"]) -> None:
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.tokens += len(tokens)


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end where a line does: tokenizers slow down and need much memory beyond."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]
