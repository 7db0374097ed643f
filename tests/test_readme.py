"""What the README says can be done: its Python runs, its commands and their options exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from attnzoo import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the README's shell blocks, one list of words each."""
    lines = "".join(blocks("bash")).splitlines()
    parts = [part for line in lines for part in line.split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def test_the_two_set_up_commands_stand_there():
    shell = "".join(blocks("bash"))
    assert 'pip install -e ".[train]" && attnzoo train\n' in shell
    assert 'pip install -e ".[test]" && pytest\n' in shell


def test_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, code in enumerate(blocks("python"), 1):
        exec(compile(code, f"README.md, Python block {number}", "exec"), namespace)
    assert namespace["y"].shape == namespace["q"].shape


def test_extras_exist():
    named = {extra for group in re.findall(r"\.\[([\w,]+)\]", README) for extra in group.split(",")}
    assert named
    assert named <= PROJECT["optional-dependencies"].keys()


def _exit_code(argv: list[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as stop:  # how argument parsers end after --help
        return stop.code or 0


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command(words, capsys):
    """Listing and showing run as they stand; of the long ones, the command and each option must be known to
    its help. The continuous integration runs those for real, at smoke length.
    """
    if words[0] in ("pip", "pytest"):
        assert words[0] == "pytest" or words[1:3] == ["install", "-e"]
        return
    assert words[0] == "attnzoo", f"not checked by anything: {words}"
    if words[1] in ("list", "show"):
        assert cli.main(words[1:]) == 0
        return
    positional = [word for word in words[1:] if not word.startswith("-")]
    command = positional[:2] if words[1] == "bench" else positional[:1]
    assert _exit_code([*command, "--help"]) == 0
    text = capsys.readouterr().out
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{option} is not in the help"
