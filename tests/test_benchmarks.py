"""What all benchmarks share: a folder for results that is there before anything is measured, and what goes into it."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from benchmarks import _measure

NAMES = sorted(path.stem for path in Path(_measure.__file__).parent.glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("name", NAMES)
def test_an_out_that_cannot_be_used_is_refused_before_measuring(name, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "environment", lambda: pytest.fail("it measures"))
    file = tmp_path / "results.json"
    file.write_text("kept")
    for out in (file, file / "below"):
        with pytest.raises(SystemExit) as stop:
            module.main(["--out", str(out)])
        assert stop.value.code == 2
        assert f"attnzoo bench {name}: error: argument --out: '{out}' is no folder that can be written to" in (
            capsys.readouterr().err
        )
    assert file.read_text() == "kept"


def test_results_say_what_asked_for_them_and_where_they_come_from(tmp_path, capsys):
    parser = _measure.arguments("some", "What is measured.")
    parser.add_argument("--rounds", type=int, default=3)
    out = tmp_path / "made" / "for it"
    options = _measure.parsed(parser, ["--rounds", "2", "--out", str(out)])
    assert out.is_dir()
    assert not any(out.iterdir())
    plotted = []
    _measure.save("some", options, {"cores": 2}, {"rows": [1]}, lambda *given: plotted.append(given))
    document = json.loads((out / "some.json").read_text())
    assert document == {
        "command": f"attnzoo bench some --rounds 2 --out '{out}'",
        "environment": {"cores": 2},
        "rows": [1],
    }
    assert plotted == [(document, out / "some.png")]
    assert f"wrote {out / 'some.json'}\n" in capsys.readouterr().out


def test_where_nothing_is_said(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["some.py"])
    options = _measure.parsed(_measure.arguments("some", None), None)
    assert options.out == _measure.RESULTS
    assert options.command == "attnzoo bench some"


def test_a_benchmark_from_its_line_to_its_file(tmp_path):
    from benchmarks.attention import main

    assert main(["--suite", "maps", "--repeat", "1", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "attention_maps.json").read_text())
    assert document["command"] == f"attnzoo bench attention --suite maps --repeat 1 --out {tmp_path}"
    assert document["environment"]["cores"] >= 1
    assert set(document["rows"]) == {"Causal() & SlidingWindow(4096) | Prefix(512)", "Causal()"}
