"""`--mixer.ARG VALUE`: arguments of a mixer's constructor, typed by its signature."""

import dataclasses
import inspect
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from attnzoo import catalog
from attnzoo.errors import unknown
from attnzoo.models.factory import accepted_arguments

PREFIX = "--mixer."


def take_mixer_args(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """(other arguments, {ARG: its words}) of a command line; `--mixer.ARG=VALUE` works too.

    An argument's words run up to the next option.
    """
    rest: list[str] = []
    taken: dict[str, list[str]] = {}
    words: list[str] = rest
    for word in argv:
        if word.startswith(PREFIX):
            name, equals, value = word.removeprefix(PREFIX).partition("=")
            words = taken.setdefault(name.replace("-", "_"), [])
            words.extend([value] if equals else [])
        else:
            if word.startswith("--"):
                words = rest
            words.append(word)
    return rest, taken


def parse_mixer_args(key: str, taken: dict[str, list[str]]) -> dict[str, Any]:
    """The values for the constructor of mixer `key`.

    Types come from the annotations, or the defaults where there is none. Raises ValueError for an unknown
    mixer or argument (with the nearest names), and for a value of another type.
    """
    own = accepted_arguments(catalog.mixer(key))
    kinds = {name: kind for name, parameter in own.items() if (kind := _kind(parameter)) is not None}
    for name, words in taken.items():
        if name not in own:
            raise unknown(f"argument of mixer {key!r}", name, kinds)
        if name not in kinds:
            raise ValueError(
                f"{PREFIX}{name}: takes an object, which only Python code can give; "
                f"from here: {', '.join(sorted(kinds)) or 'nothing'}"
            )
        if not words:
            raise ValueError(f"{PREFIX}{name}: needs a value")
    fields = [(name, kinds[name], dataclasses.field(default=own[name].default)) for name in taken]
    values = dataclasses.make_dataclass(key, fields)
    line = [word for name, words in taken.items() for word in (f"--{name}", *words)]
    try:
        parsed: Any = tyro.cli(
            values, args=line, console_outputs=False, use_underscores=True, config=(tyro.conf.FlagConversionOff,)
        )
    except SystemExit:
        given = ", ".join(f"{PREFIX}{name} {' '.join(words)}".strip() for name, words in taken.items())
        kinds_text = ", ".join(f"{name}: {_spelled(kinds[name])}" for name in taken)
        raise ValueError(f"{given}: mixer {key!r} takes {kinds_text}") from None
    return {name: getattr(parsed, name) for name in taken}


def describe_mixer_args(key: str) -> str:
    """One line per argument of mixer `key` that the command line can set."""
    lines = []
    for name, parameter in accepted_arguments(catalog.mixer(key)).items():
        kind = _kind(parameter)
        if kind is not None:
            lines.append(f"  {PREFIX}{name} {_spelled(kind)} (default: {parameter.default})")
    return "\n".join(lines)


_SCALARS = (bool, int, float, str)


def _kind(parameter: inspect.Parameter) -> Any:
    """The type of an argument, None if no word on a command line could say its value."""
    kind = parameter.annotation
    if kind is inspect.Parameter.empty or isinstance(kind, str):
        kind = type(parameter.default)
        if kind is tuple:
            kind = tuple[tuple(type(value) for value in parameter.default)]  # type: ignore[misc]
    return kind if _plain(kind) else None


def _plain(kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:
        return True
    inner = typing.get_args(kind)
    if inner:
        return all(_plain(part) for part in inner if part is not Ellipsis)
    return kind in (*_SCALARS, type(None))


def _spelled(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
