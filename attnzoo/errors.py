"""Errors that name what was given and what would have worked."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to `count` entries of `known` that look most like `name`, best first.

    A known name that contains `name`, or is contained in it, counts as near whatever their lengths.
    """
    low = name.lower()
    by_low = {k.lower(): k for k in sorted(known)}
    alike = difflib.get_close_matches(low, by_low, n=count, cutoff=0.6)
    contained = [k for k in by_low if min(len(low), len(k)) >= 2 and (low in k or k in low)]
    return [by_low[k] for k in dict.fromkeys(alike + contained)][:count]


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that is not in `known`, naming the nearest; `raise` what this returns.

    kind: what the name should have named, e.g. "mixer".
    known: every name that would work. Up to a dozen are listed in full.

    >>> raise unknown("mixer", "transfromer", ["transformer", "tpa"])
    Traceback (most recent call last):
    ValueError: unknown mixer 'transfromer': did you mean 'transformer'? Known: tpa, transformer.
    """
    names = sorted(set(known))
    close = nearest(str(name), names)
    parts = []
    if close:
        parts.append("did you mean " + " or ".join(repr(c) for c in close) + "?")
    if not names:
        parts.append(f"there is no {kind} to choose from.")
    elif len(names) <= 12:
        parts.append("Known: " + ", ".join(names) + ".")
    elif not close:
        parts.append(f"none of the {len(names)} known names is near.")
    return ValueError(f"unknown {kind} {name!r}: " + " ".join(parts))
