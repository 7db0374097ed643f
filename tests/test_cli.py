"""The command line: what it prints, and how it says no."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from attnzoo import card, catalog, cli
from attnzoo.core.masks import Causal
from attnzoo.core.scores import ALiBi
from attnzoo.core.weights import softmax
from attnzoo.paper import Paper


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs one command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.delenv("ATTNZOO_TRACEBACK", raising=False)

    def call(line: str) -> tuple[int, str, str]:
        try:
            code = cli.main(line.split())
        except SystemExit as stop:  # argparse
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def exhibit(monkeypatch):
    """Makes `tpa` an exhibit with every field of a card."""
    row = catalog.paper("tpa")
    paper = Paper(
        row.number,
        row.key,
        row.title,
        row.family,
        builds=(Paper, "attnzoo.errors:unknown"),
        costs={
            "cache numbers per token": "2 * K * H",
            "factors": "R_k * (N + H)",
            "flops": "4 * T * S * N * H",
        },
        code="owner/name",
        parity="agrees to 1e-6",
        notes="none",
    )
    monkeypatch.setattr(catalog.Row, "status", "built")
    module = SimpleNamespace(__doc__="The equations.", PAPER=paper)
    monkeypatch.setitem(sys.modules, row.module, module)


def test_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "attnzoo.cli", "list"], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 157
    assert done.stderr == ""


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in cli._COMMANDS:
        assert f"\n  {command} " in out
    assert run("")[0] == 2
    for command in ("list", "show"):
        code, out, _ = run(f"{command} --help")
        assert (code, "examples:" in out) == (0, True)
    assert run("--version")[1].startswith("attnzoo 0.")


def test_list(run):
    code, out, _ = run("list")
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 157)
    assert lines[40].split()[:3] == ["041", "transformer", "projections"]
    assert lines[-1].startswith("156 papers: ")


def test_list_selects(run):
    _, out, _ = run("list --family cache --status planned --json")
    rows = json.loads(out)
    assert rows
    assert all((row["family"], row["status"]) == ("cache", "planned") for row in rows)
    assert rows[0].keys() >= {"number", "key", "title", "what", "arxiv"}


def test_show_planned(run):
    planned = catalog.papers(status="planned")[0]
    code, out, _ = run(f"show {planned.key}")
    assert code == 0
    assert planned.title in out
    assert "Planned" in out
    assert json.loads(run(f"show {planned.key} --json")[1])["costs"] == {}


def test_show_built(run, exhibit, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path / "attnzoo")  # where no result of a claim is recorded
    code, out, _ = run("show tpa --dim 512 --num-heads 8 --num-kv-heads 2 --length 100 --memory-length 10")
    assert code == 0
    for words in (
        "042 tpa (projections, built)",
        "The equations.",
        "attnzoo.paper.Paper",
        "attnzoo.errors.unknown",
        "2 * K * H  =  256",
        "R_k * (N + H)  =  give --size R_k=...",
        "4 * T * S * N * H  =  2,048,000",
        "owner/name",
        "agrees to 1e-6",
        "no result is recorded",
    ):
        assert words in out
    assert "R_k * (N + H)  =  144" in run("show tpa --size R_k=2")[1]
    assert json.loads(run("show tpa --json --size R_k=0.5")[1])["costs"]["factors"]["value"] == 36


def test_show_claim(run, exhibit, monkeypatch, tmp_path):
    folder = tmp_path / "train" / "claims" / "results"
    folder.mkdir(parents=True)
    result = {"claim": "smaller cache", "holds": True, "ratio": 10 / 3, "runs": [{"seed": 0}, {"seed": 1}]}
    (folder / "tpa.json").write_text(json.dumps(result))
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path / "attnzoo")
    monkeypatch.setattr(card.Card, "equations", lambda self: "")
    paper = catalog.exhibit("tpa")
    shown = card.Card(catalog.paper("tpa"), paper, {})
    assert shown.claim() == result
    text = shown.as_text()
    for words in (
        "claim: smaller cache",
        "holds: True",
        "ratio: 3.33333",
        "- seed: 1",
        "train/claims/results/tpa.json",
    ):
        assert words in text


def panels(monkeypatch):
    """The axes of every figure that is saved, in a list."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def keep(figure, *args, **kwargs):
        saved.extend(figure.axes)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_show_plot(run, exhibit, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    saved = panels(monkeypatch)
    path = tmp_path / "costs.png"
    assert run(f"show tpa --plot {path}")[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in saved] == ["costs"]
    # The cache numbers per token do not depend on T, over which costs are drawn.
    assert [line.get_label() for line in saved[0].lines] == ["flops"]


@pytest.mark.parametrize(
    ("parts", "title"),
    [
        ({"picture": lambda axes: axes.set_title("its own"), "masks": {"m": None}}, "its own"),
        ({"masks": {"m": lambda T, S: Causal()}, "scores": {"s": None}}, "Causal()"),
        ({"scores": {"s": lambda T, S: ALiBi.for_heads(4)}, "weights": {"w": lambda T, S: softmax}}, "what logits of 0 become"),
        ({"weights": {"w": lambda T, S: softmax}}, "the weights of 24 keys"),
    ],
)
def test_the_picture_comes_first(run, exhibit, tmp_path, monkeypatch, parts, title):
    pytest.importorskip("matplotlib")
    module = sys.modules[catalog.paper("tpa").module]
    module.PAPER = dataclasses.replace(module.PAPER, **parts)
    saved = panels(monkeypatch)
    assert run(f"show tpa --plot {tmp_path / 'a.png'}")[0] == 0
    assert title in saved[0].get_title()
    assert saved[1].get_title() == "costs"
    saved.clear()
    module.PAPER = dataclasses.replace(module.PAPER, costs={})
    assert run(f"show tpa --plot {tmp_path / 'b.png'}")[0] == 0
    assert title in saved[0].get_title()
    assert "costs" not in [axes.get_title() for axes in saved]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lst", "unknown command 'lst': did you mean 'list'?"),
        ("list --family caches", "unknown family 'caches': did you mean 'cache'?"),
        ("list --status done", "unknown status 'done'"),
        ("list --famly cache", "--famly"),
        ("show transfromer", "did you mean 'transformer'"),
        ("show", "KEY"),
        ("show transformer --dim 100 --num-heads 7", "D=100 does not divide into N=7"),
        ("show transformer --num-kv-heads 3", "K=3 kv heads do not divide N=8"),
        ("show transformer --length 0", "T (queries (sequence length)) must be a positive integer"),
        ("show transformer --length many", "--length"),
        ("show transformer --size R", "--size 'R'"),
        ("bench attenton", "attention"),
    ],
)
def test_errors_are_one_line(run, line, words):
    code, _, err = run(line)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_nothing_to_plot(run, tmp_path):
    planned = catalog.papers(status="planned")[0]
    code, _, err = run(f"show {planned.key} --plot {tmp_path / 'x.png'}")
    assert code == 2
    assert "has no picture, and states no costs" in err


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("ATTNZOO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command"):
        cli.main(["lst"])


def test_closed_pipe():
    done = subprocess.run(
        f"{sys.executable} -m attnzoo.cli list | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("001")
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["train", "compare", "generate", "claim"])
def test_delegates_get_their_arguments(command, monkeypatch):
    seen = []
    fake = SimpleNamespace(**{f"{command}_main": seen.append})
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: {"train.cli": fake}[name])
    assert cli.main([command, "--steps", "3", "--help"]) == 0
    assert seen == [["--steps", "3", "--help"]]


def test_delegates_return_their_exit_code(monkeypatch):
    fake = SimpleNamespace(train_main=lambda argv: 130)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: fake)
    assert cli.main(["train"]) == 130


def test_missing_extra_is_named(run, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'optax'", name="optax")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    code, _, err = run("train")
    assert code == 2
    assert "'optax'" in err
    assert "pip install 'attnzoo[train]'" in err


def test_a_users_own_train_is_detected(tmp_path):
    (tmp_path / "train.py").write_text("print('mine')")
    done = subprocess.run(
        [sys.executable, "-m", "attnzoo.cli", "train"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "mine" not in done.stdout
    assert f"your own {tmp_path / 'train.py'} hides the package 'train'" in done.stderr


def test_bench_needs_the_repository(run, monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path / "attnzoo")
    code, _, err = run("bench attention")
    assert code == 2
    assert "clone the repository" in err


def test_bench_lists_and_runs_its_suites(run, monkeypatch):
    code, out, _ = run("bench --help")
    assert (code, "attention" in out) == (0, True)
    seen = []
    fake = SimpleNamespace(main=seen.append)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: {"benchmarks.attention": fake}[name])
    assert run("bench attention --quick")[0] == 0
    assert seen == [["--quick"]]
