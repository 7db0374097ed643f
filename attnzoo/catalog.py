"""The catalog: one row per paper, and from a key to what the zoo builds for it.

Rows are facts about papers and stand in `papers.json`. Whether a paper is built is not written anywhere:
it is, exactly when its exhibit file `attnzoo/zoo/<family>/<key>.py` exists. Exhibits are imported only when
something of theirs is asked for, so listing the catalog costs no JAX import.
"""

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

from attnzoo.errors import unknown
from attnzoo.paper import Paper

PACKAGE = Path(__file__).resolve().parent
"""The folder of the installed `attnzoo` package."""

STATUSES = ("built", "planned")


@dataclass(frozen=True)
class Row:
    """One paper of the list.

    number: 1 to 156. key: its one name everywhere. authors: as cited. year: of its first version.
    venue: where it appeared, or "". arxiv: its identifier there, or "".
    family: the folder of `attnzoo/zoo` it belongs in. what: one sentence on the idea.
    """

    number: int
    key: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    family: str
    what: str

    @property
    def file(self) -> Path:
        """Where its exhibit stands, or will stand."""
        return PACKAGE / "zoo" / self.family / f"{self.key}.py"

    @property
    def module(self) -> str:
        """The import name of its exhibit."""
        return f"attnzoo.zoo.{self.family}.{self.key}"

    @property
    def status(self) -> str:
        """Either "built" (its exhibit exists) or "planned"."""
        return "built" if self.file.is_file() else "planned"

    @property
    def citation(self) -> str:
        """Authors, year, venue and arXiv identifier in one line."""
        arxiv = f"arXiv {self.arxiv}" if self.arxiv else ""
        return ", ".join(part for part in (self.authors, str(self.year), self.venue, arxiv) if part)


@functools.cache
def _rows() -> tuple[Row, ...]:
    return tuple(Row(**row) for row in json.loads((PACKAGE / "papers.json").read_text(encoding="utf-8")))


def families() -> tuple[str, ...]:
    """The families, in alphabetical order."""
    return tuple(sorted({row.family for row in _rows()}))


def papers(family: str | None = None, status: str | None = None) -> tuple[Row, ...]:
    """Every paper by number; of one family and one status ("built" or "planned") if given.

    Raises ValueError, with the nearest names, for an unknown family or status.
    """
    if family is not None and family not in families():
        raise unknown("family", family, families())
    if status is not None and status not in STATUSES:
        raise unknown("status", status, STATUSES)
    return tuple(row for row in _rows() if family in (None, row.family) and status in (None, row.status))


def paper(key: str) -> Row:
    """The row of `key`. Raises ValueError, with the nearest keys, if there is none."""
    for row in _rows():
        if row.key == key:
            return row
    raise unknown("paper", key, (row.key for row in _rows()))


def exhibit(key: str) -> Paper:
    """What the exhibit of `key` says about itself; imports it.

    Raises ValueError for an unknown key, for a paper that is only planned, and for an exhibit that
    contradicts its row.
    """
    row = paper(key)
    if row.status == "planned":
        built = ", ".join(r.key for r in papers(status="built")) or "none"
        raise ValueError(f"paper {row.number} {key!r} is planned, there is no exhibit yet; built: {built}")
    card = importlib.import_module(row.module).PAPER
    for name in ("number", "key", "title", "family"):
        said, listed = getattr(card, name), getattr(row, name)
        if said != listed:
            raise ValueError(f"{row.module}: PAPER.{name} is {said!r}, but the catalog's row says {listed!r}")
    return card


def mixers() -> dict[str, type]:
    """Key -> drop-in class, of every built paper that has one; imports the built exhibits."""
    cards = (exhibit(row.key) for row in papers(status="built"))
    return {card.key: card.mixer for card in cards if card.mixer is not None}


def mixer(key: str) -> type:
    """The drop-in class of `key`, as `attnzoo train --mixer KEY` builds it.

    Raises ValueError, naming the mixers there are, if `key` is no paper, not built, or not a mixer.
    """
    row = next((row for row in _rows() if row.key == key), None)
    if row is not None and row.status == "built":
        cls = exhibit(key).mixer
        if cls is not None:
            return cls
    known = mixers()
    if row is None:
        raise unknown("mixer", key, known)
    reason = "planned, not built" if row.status == "planned" else "built, but not a drop-in mixer"
    raise ValueError(f"mixer {key!r}: paper {row.number} is {reason}. Known: {', '.join(sorted(known)) or 'none'}.")


def build(entry: object) -> object:
    """One entry of `Paper.builds` as the object itself: "module:name" is imported, an object stays.

    Raises ImportError or AttributeError when the named thing does not exist.
    """
    if not isinstance(entry, str):
        return entry
    module, _, name = entry.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
