"""What an exhibit says about itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Example = Callable[[int, int], Any]
"""(T, S) -> a mask, score or weights object for a call with T queries and S keys."""


@dataclass(frozen=True)
class Paper:
    """One paper as the zoo builds it; the last statement of an exhibit file is `PAPER = Paper(...)`.

    number: its number in the list of papers, 1 to 156.
    key: its one name everywhere: file, test, claim, command line.
    title: the paper's title, as in `attnzoo/papers.json`.
    family: the folder of `attnzoo/zoo` it lives in.
    builds: its public objects; what lives outside the zoo is named as "module:name".
    mixer: the drop-in class, if it is one (`attnzoo train --mixer KEY` builds this).
    masks, scores, weights: name -> (T, S) -> object; the shared contract tests run over each of them.
    picture: draws the idea on the matplotlib axes it is given (a pattern, a curve), in seconds; `attnzoo show KEY --plot`
        saves it. Without one the first mask, the first score or the weight maps are drawn.
    costs: what -> arithmetic formula in the letters of `attnzoo.costs`, e.g.
        {"cache numbers per token": "2 * K * H"}; `attnzoo show KEY --num-kv-heads 2` evaluates them.
    code: the public implementation it was compared with, as owner/name or a package's name.
    parity: what was compared and how closely they agree.
    notes: where the exhibit departs from the paper, and why.

    Raises ValueError for a number outside 1..156, or a key or family that is not a Python identifier.
    """

    number: int
    key: str
    title: str
    family: str
    builds: tuple[Any, ...] = ()
    mixer: type | None = None
    masks: Mapping[str, Example] = field(default_factory=dict)
    scores: Mapping[str, Example] = field(default_factory=dict)
    weights: Mapping[str, Example] = field(default_factory=dict)
    picture: Callable[[Any], None] | None = None
    costs: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    parity: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.number <= 156:
            raise ValueError(f"number: papers are numbered 1 to 156, got {self.number}")
        for name in ("key", "family"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value.isidentifier()):
                raise ValueError(f"{name}: must be a Python identifier (it names files), got {value!r}")
