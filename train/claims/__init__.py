"""One small experiment per paper: its central claim on this library.

`train/claims/KEY.py` has a function `run(seeds=..., quick=False) -> ClaimResult`; `attnzoo claim KEY` runs it
and records what came out, reproduced or not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ClaimResult:
    """What an experiment on a paper's claim measured.

    key: of the paper. claim: what was tested, in one sentence.
    metric: what `values` are, with their unit, e.g. "validation loss (nats per token)".
    seeds: one run each. values: method -> its metric per seed, in the order of `seeds`.
    margin: what had to come out for "reproduced", in words.
    reproduced: whether it did.
    seconds: that the experiment took.
    details: further measurements, anything JSON can hold.
    Raises ValueError when a method does not have one value per seed.
    """

    key: str
    claim: str
    metric: str
    seeds: Sequence[int]
    values: Mapping[str, Sequence[float]]
    margin: str
    reproduced: bool
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for method, values in self.values.items():
            if len(values) != len(self.seeds):
                raise ValueError(f"values: {method!r} has {len(values)} values for {len(self.seeds)} seeds")

    @property
    def verdict(self) -> str:
        return "reproduced" if self.reproduced else "not reproduced at this size"
