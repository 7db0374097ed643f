"""The guide is true: each page's Python runs from top to bottom, and its commands and their options exist."""

import re
from pathlib import Path

import pytest

from attnzoo import cli

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs" / "guide").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "guide"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{page.name}, Python block {number}", "exec"), namespace)


COMMANDS = sorted({line for page in PAGES for line in "".join(blocks(page, "bash")).splitlines() if line})


@pytest.mark.parametrize("line", COMMANDS)
def test_command_is_known(line, capsys):
    program, command, *words = line.partition("#")[0].split()
    assert program == "attnzoo"
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--") and not word.startswith("--mixer.")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{option} is not in the help"
