"""Command lines as dataclasses."""

from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

Command = TypeVar("Command")


def parse(kind: type[Command], argv: Sequence[str], name: str, description: str, default: Command | None = None) -> Command:
    """A command line as an instance of `kind`, starting from `default`; mistakes end in tyro's message and exit code 2."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(kind, args=list(argv), prog=f"attnzoo {name}", description=description, **options)


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of an option before the command line is parsed, because the defaults depend on it."""
    for index, word in enumerate(argv):
        if word.startswith(name + "="):
            return word.partition("=")[2]
        if word == name and index + 1 < len(argv):
            return argv[index + 1]
    return None
