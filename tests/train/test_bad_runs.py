"""What can be wrong with a run's folder: one paragraph each, and nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.loop import NotFinite, train
from train.rundir import CHECKPOINTS, free_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def refused(attnzoo):
    """The command is refused with these words in one paragraph, and leaves the folder as it was."""

    def check(folder: Path, expected: str, *words: str) -> None:
        before = contents(folder)
        code, _, err = attnzoo(*words)
        assert code == 2
        assert expected in err
        assert len(err.strip().splitlines()) == 1
        after = contents(folder)
        assert {name: after.get(name) for name in before} == before

    return check


def test_a_folder_with_a_run_is_not_used_again(copied, refused, line):
    refused(copied, f"already holds a run, and nothing in it is overwritten; continue it with --resume {copied}",
            "train", *line(), "--out", str(copied))  # fmt: skip


def test_checkpoints_without_a_description_are_not_used_again(copied, refused, line):
    (copied / "config.json").unlink()
    refused(copied, "already holds a run", "train", *line(), "--out", str(copied))


def test_options_of_another_run(copied, refused):
    refused(copied, "--model.dim 32 (the run has 16)", "train", "--resume", str(copied), "--model.dim", "32")
    refused(copied, "--mixer.num-kv-heads 1 (the run has None)", "train", "--resume", str(copied),
            "--mixer.num-kv-heads", "1")  # fmt: skip


def test_a_checkpoint_of_another_model(copied, refused):
    path = copied / "config.json"
    about = json.loads(path.read_text())
    about["config"]["model"]["dim"] = 32
    path.write_text(json.dumps(about))
    refused(copied, "is of another model: ", "train", "--resume", str(copied))


def test_a_checkpoint_of_another_model_names_both_shapes(copied, attnzoo):
    path = copied / "config.json"
    about = json.loads(path.read_text())
    about["config"]["model"]["num_layers"] = 2
    about["config"]["model"]["mlp_dim"] = 8
    path.write_text(json.dumps(about))
    _, _, err = attnzoo("train", "--resume", str(copied))
    assert "has shape (16, 48) in the checkpoint, (16, 8) in this model" in err


@pytest.mark.parametrize("item", ["model", "optimizer", "about", "data"])
@pytest.mark.parametrize("left", [0, 100])
def test_a_truncated_checkpoint(item, left, copied, refused):
    files = [p for p in (copied / CHECKPOINTS / "10" / item).rglob("*") if p.is_file()]
    files = [p for p in files if not p.name.startswith(("_", "commit_success"))]  # notes of Orbax, never read back
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: left if item != "data" else left // 10])
    refused(copied, "cannot be read, it is truncated or damaged", "train", "--resume", str(copied))


def test_a_truncated_checkpoint_says_what_is_left(copied, attnzoo):
    manifest = copied / CHECKPOINTS / "10" / "model" / "manifest.ocdbt"
    manifest.write_bytes(b"")
    _, _, err = attnzoo("train", "--resume", str(copied))
    assert "delete or move that folder away to go on from step 8" in err
    shutil.rmtree(copied / CHECKPOINTS / "10")
    code, _, err = attnzoo("train", "--resume", str(copied))
    assert code == 0, err


def test_a_truncated_checkpoint_leaves_no_errors_behind(finished, tmp_path):
    """Nothing but the paragraph comes to stderr, neither at once nor when the garbage collector runs."""
    runs = []
    for item in ("model", "optimizer"):
        for left in (0, 100):
            runs.append(Path(shutil.copytree(finished, tmp_path / f"{item}-{left}")))
            files = [p for p in (runs[-1] / CHECKPOINTS / "10" / item / "d").iterdir() if p.is_file()]
            for path in files:
                path.write_bytes(path.read_bytes()[:left])
    script = (
        "import gc, sys\n"
        "from attnzoo.cli import main\n"
        "gc.disable()\n"
        "for run in sys.argv[1:]:\n"
        "    assert main(['train', '--resume', run]) == 2\n"
        "    gc.collect()\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, runs)], capture_output=True, text=True, check=True)
    said = [line.partition(" cannot be read")[0] for line in done.stderr.splitlines()]
    assert said == [f"attnzoo: checkpoint {run / CHECKPOINTS / '10'}" for run in runs]


def test_a_checkpoint_of_an_older_format(copied, refused, attnzoo):
    """Where each process had a position in the data: it cannot be gone on from, but its model can be used."""
    data = copied / CHECKPOINTS / "10" / "data"
    (data / "metadata").unlink()
    (data / "process_0-of-1.json").write_text('{"next_index": 10}')
    refused(copied, "10 is of an older format", "train", "--resume", str(copied))
    code, _, err = attnzoo("generate", "--checkpoint", str(copied), "--prompt", "a", "--max-new", "2")
    assert code == 0, err


def test_a_truncated_description(copied, refused):
    path = copied / "config.json"
    path.write_text(path.read_text()[:50])
    refused(copied, f"{path} cannot be read", "train", "--resume", str(copied))


@pytest.mark.parametrize("place", ["config.json", f"{CHECKPOINTS}/10/about/metadata"])
def test_other_data_are_refused(place, copied, refused):
    path = copied / place
    about = json.loads(path.read_text())
    about["data"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(about))
    refused(copied, "the data is not what this run was trained on", "train", "--resume", str(copied))


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tiny, replaced, tmp_path):
    config = replaced(tiny, {"optimizer.learning_rate": 1e38, "checkpoint.every": 1, "checkpoint.keep": 3})
    folder = tmp_path / "run"
    with pytest.raises(NotFinite, match=r"at step \d+ the loss was") as error:
        train(config, folder)
    kept = sorted(int(p.name) for p in (folder / CHECKPOINTS).iterdir())
    step = int(str(error.value).split("at step ")[1].split()[0])
    assert kept[-1] == step - 1
    assert f"the last good checkpoint, of step {step - 1}, is kept in {folder / CHECKPOINTS}" in str(error.value)


def test_divergence_before_any_checkpoint(tiny, replaced, tmp_path):
    config = replaced(tiny, {"optimizer.learning_rate": 1e38, "checkpoint.every": 100})
    with pytest.raises(NotFinite, match="no checkpoint had been made"):
        train(config, tmp_path / "run")


def test_free_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_folder("text-a") == Path("runs/text-a")
    Path("runs/text-a").mkdir(parents=True)
    assert free_folder("text-a") == Path("runs/text-a-2")
