"""A run that is broken off and resumed is, bit for bit, the run that was not."""

import contextlib
import json
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from train.checkpoint import Checkpoints
from train.cli import parse_train
from train.config import MeshConfig
from train.loop import train
from train.metrics import read_metrics
from train.rundir import CHECKPOINTS, find_checkpoint, open_run
from train.sharding import make_mesh
from train.tasks import make_task
from train.trainer import Trainer

LONG = "--steps 60 --checkpoint.every 3 --model.dropout-rate 0.1"


def final_state(folder: Path) -> list[np.ndarray]:
    """Every array of the last checkpoint, random state and optimizer included."""
    config = open_run(folder).config
    task = make_task(config)
    trainer = Trainer(task, config, make_mesh(MeshConfig()))
    checkpoints, step = find_checkpoint(folder)
    assert step == config.steps
    state = checkpoints.restore(step, trainer.abstract, trainer.shardings, iter(task.batches()))
    checkpoints.close()
    leaves = jax.tree.leaves(state)
    keys = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(a) if key else a) for a, key in zip(leaves, keys, strict=True)]


def losses(folder: Path) -> list[tuple]:
    """What was written about each step, without speeds."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [tuple(row.items()) for row in rows if not any("per_second" in name for name in row)]


def assert_same(a: Path, b: Path) -> None:
    for x, y in zip(final_state(a), final_state(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert losses(a) == losses(b)
    results = [json.loads((folder / "result.json").read_text()) for folder in (a, b)]
    assert results[0]["score"] == results[1]["score"]


def newest(folder: Path) -> int:
    steps = [int(p.name) for p in (folder / CHECKPOINTS).glob("[0-9]*") if p.name.isdigit()]
    return max(steps, default=-1)


def progress(folder: Path):
    """Asks whether there is a checkpoint newer than those that are there now."""
    before = newest(folder)
    return lambda: newest(folder) > before


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_resume_after_kill(line, spawn, trained, tmp_path, attnzoo):
    folder = tmp_path / "killed"
    process = spawn("train", *line(LONG), "--out", str(folder))
    wait_for(progress(folder), process)
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.wait()
    assert newest(folder) < 60
    code, _, err = attnzoo("train", "--resume", str(folder))
    assert code == 0, err
    assert_same(trained(LONG), folder)


def unfinished(folder: Path) -> set[tuple]:
    """The saves that are in progress, or were when a process was killed."""
    found = set()
    for path in (folder / CHECKPOINTS).glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError):  # it was just finished
            if not path.name.isdigit():
                found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns))
    return found


def readable(folder: Path) -> list[int]:
    """The steps of all checkpoints, after each was read from end to end."""
    config = open_run(folder).config
    task = make_task(config)
    trainer = Trainer(task, config, make_mesh(MeshConfig()))
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    for step in checkpoints.steps():
        data = iter(task.batches())
        state = checkpoints.restore(step, trainer.abstract, trainer.shardings, data)
        assert int(state.step) == data.get_state()["next_index"] == step
        assert checkpoints.about(step)["config"]["steps"] == config.steps
    checkpoints.close()
    return checkpoints.steps()


@pytest.mark.slow
def test_resume_after_many_kills(line, spawn, tmp_path):
    """Twenty kills at random moments: nothing finished is lost, all that is there can be read, and the end is the same."""
    every, options = 5, "--steps 1500 --checkpoint.every 5 --model.dropout-rate 0.1"
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(parse_train(line(options)).config, whole)
    rolls = random.Random(5)
    saves, lost = 0, []
    for number in range(20):
        words = ("--resume", str(folder)) if (folder / "config.json").exists() else (*line(options), "--out", str(folder))
        left = unfinished(folder)
        process = spawn("train", *words)
        kind = number % 3
        if kind == 0:  # anywhere: while importing, preparing data, compiling, training
            time.sleep(rolls.uniform(0, 10))
        else:
            wait_for(progress(folder) if kind == 1 else lambda: unfinished(folder) - left, process)  # noqa: B023
            time.sleep(rolls.uniform(0, 0.2 if kind == 1 else 0.03))
        before = newest(folder)
        process.kill()
        process.wait()
        saves += bool(unfinished(folder) - left)
        if newest(folder) < 0:
            continue
        assert newest(folder) >= before
        assert readable(folder)[-1] == newest(folder)
        lost.append(max((step for (_, step), *_ in losses(folder)), default=0) - newest(folder))
    print(f"{saves} kills during a save, steps lost: {lost}")
    assert saves >= 5
    assert max(lost) <= 2 * every  # a save goes on behind the steps that follow it, and the next one waits for it
    process = spawn("train", "--resume", str(folder))
    assert process.wait(timeout=600) == 0
    assert_same(whole, folder)
    assert not unfinished(folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_interrupt_saves_and_says_how_to_go_on(number, line, spawn, tmp_path):
    folder = tmp_path / "with a space"
    process = spawn("train", *line(f"{LONG} --steps 100000"), "--out", str(folder))
    while newest(folder) < 3:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"attnzoo train --resume '{folder}'" in out
    assert "Traceback" not in out
    saved = newest(folder)
    assert f"interrupted after step {saved} of 100000" in out
    assert losses(folder)[-1][0] == ("step", saved)


def test_a_run_without_a_checkpoint_starts_over(tiny, tmp_path, finished):
    folder = tmp_path / "run"
    train(tiny, folder)
    for checkpoint in (folder / CHECKPOINTS).iterdir():
        checkpoint.rename(tmp_path / checkpoint.name)
    train(tiny, folder, resume=True)
    assert_same(finished, folder)


def test_a_finished_run_can_be_asked_again(copied, finished, attnzoo):
    (copied / "result.json").unlink()
    code, out, _ = attnzoo("train", "--resume", str(copied))
    assert code == 0
    assert "bits per byte" in out
    assert_same(finished, copied)


def test_another_mesh_continues_closely(copied, finished, attnzoo):
    shorter(copied)
    code, _, err = attnzoo("train", "--resume", str(copied), "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
    assert code == 0, err
    for a, b in zip(losses(finished), losses(copied), strict=True):
        assert a[0] == b[0]
        assert a[1][1] == pytest.approx(b[1][1], rel=1e-5)


def shorter(folder: Path) -> None:
    """Takes the last checkpoint away, as if the run had been killed after step 8."""
    import shutil

    shutil.rmtree(folder / CHECKPOINTS / "10")


def test_metrics_are_cut_to_the_checkpoint(copied, finished, attnzoo):
    shorter(copied)
    metrics = copied / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 99, "train/loss": 1.0}\n{"step": 100, "tra')
    code, _, err = attnzoo("train", "--resume", str(copied))
    assert code == 0, err
    assert losses(copied) == losses(finished)
