"""Which checkpoints stay, what a full disk does, and a model on its way out and in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.checkpoint import Checkpoints, Keep, checkpoint_steps
from train.config import MeshConfig
from train.generate import load_model
from train.loop import train
from train.rundir import CHECKPOINTS, find_checkpoint, open_run
from train.sharding import make_mesh
from train.tasks import make_task
from train.trainer import Trainer


def test_the_newest_and_the_best_stay(finished, tmp_path):
    about = open_run(finished)
    trainer = Trainer(task := make_task(about.config), about.config, make_mesh(MeshConfig()))
    state, data = trainer.init(), iter(task.batches())
    for keep, kept in (
        (Keep(last=2, best=1), [2, 5, 6]),
        (Keep(last=1, best=2), [2, 4, 6]),
        (Keep(last=1, best=0), [6]),
    ):
        folder = tmp_path / f"{keep.last}-{keep.best}"
        checkpoints = Checkpoints(folder, keep)
        for step, quality in enumerate([-4.0, -1.0, -3.0, -2.0, None, -3.5], start=1):
            checkpoints.save(step, state, data, about.as_json(), quality)
        checkpoints.close()
        assert checkpoint_steps(folder) == kept
        reader = Checkpoints(folder)
        assert reader.steps() == kept
        assert reader.best() == ((2, -1.0) if 2 in kept else (6, -3.5))
        reader.close()


def test_a_run_keeps_and_finds_its_best(tiny, replaced, tmp_path, monkeypatch):
    """Validation after every second step, best after step 4: saved there, beside the two newest of every third."""
    scores = {2: 5.0, 4: 3.0, 6: 4.0, 8: 4.5, 10: 3.5}

    def evaluate(self, state, batches):
        return {"loss": 1.0, "bits_per_byte": scores[int(state.step)]}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    folder = tmp_path / "run"
    train(replaced(tiny, {"eval.every": 2, "checkpoint.every": 3}), folder)
    assert checkpoint_steps(folder / CHECKPOINTS) == [4, 9, 10]
    checkpoints, step = find_checkpoint(folder / CHECKPOINTS / "best")
    checkpoints.close()
    assert step == 4
    checkpoints, step = find_checkpoint(folder)
    checkpoints.close()
    assert step == 10


def test_best_needs_a_validation(copied, attnzoo):
    for path in (copied / CHECKPOINTS).glob("*/metrics"):
        shutil.rmtree(path)
    code, _, err = attnzoo("generate", "--checkpoint", str(copied / CHECKPOINTS / "best"), "--prompt", "a")
    assert code == 2
    assert "no checkpoint with a validation score" in err


def test_what_a_killed_save_left_is_removed(copied, attnzoo):
    left = copied / CHECKPOINTS / "12.orbax-checkpoint-tmp"
    shutil.copytree(copied / CHECKPOINTS / "10", left)
    shutil.rmtree(copied / CHECKPOINTS / "10")
    assert load_model(copied) is not None  # reading leaves it alone: it may be another's save in progress
    assert left.exists()
    code, _, err = attnzoo("train", "--resume", str(copied))
    assert code == 0, err
    assert not left.exists()


def test_one_place_in_the_data_for_all_processes(finished):
    """However many processes wrote it, any number of them can go on."""
    data = json.loads((finished / CHECKPOINTS / "10" / "data" / "metadata").read_text())
    assert data["next_index"] == 10


FULL = """
import sys
from pathlib import Path
import train.loop as loop
from attnzoo.cli import main
{spoil}
sys.exit(main(["train", "--resume", sys.argv[1]]))
"""

FEW_BYTES = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = loop._Run._save
def limited(self):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    save(self)
loop._Run._save = limited
"""


def states(folder: Path, step: int) -> dict[str, bytes]:
    found = (folder / CHECKPOINTS / str(step)).rglob("*")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found if p.is_file()}


def test_a_disk_that_takes_no_more(copied):
    """The write of a checkpoint fails: one paragraph, and the one before is whole."""
    shutil.rmtree(copied / CHECKPOINTS / "10")
    before = states(copied, 8)
    command = [sys.executable, "-c", FULL.format(spoil=FEW_BYTES), str(copied)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    said = done.stderr.strip()
    assert said.startswith(f"attnzoo: a checkpoint could not be written to {copied / CHECKPOINTS} (")
    assert said.endswith("the one of step 8 is whole; make room and go on with --resume")
    assert len(said.splitlines()) == 1
    assert checkpoint_steps(copied / CHECKPOINTS) == [8]
    assert states(copied, 8) == before


@pytest.mark.slow
def test_a_full_disk(finished, tmp_path):
    """The same on a file system without room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        folder = Path(shutil.copytree(finished, disk / "run"))
        shutil.rmtree(folder / CHECKPOINTS / "10")
        before = states(folder, 8)
        (disk / "filling").write_bytes(bytes(shutil.disk_usage(disk).free - 40 * 1024))
        command = [sys.executable, "-m", "attnzoo.cli", "train", "--resume", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"attnzoo: a checkpoint could not be written to {folder / CHECKPOINTS} (")
        assert len(done.stderr.strip().splitlines()) == 1
        assert states(folder, 8) == before
        (disk / "filling").unlink()
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert checkpoint_steps(folder / CHECKPOINTS) == [8, 10]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
