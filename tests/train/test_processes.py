"""Two processes of four devices: the same training as one of eight, and an end that says why."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from train.config import MeshConfig
from train.metrics import read_metrics
from train.processes import DistributedConfig, connect, together
from train.rundir import CHECKPOINTS, find_checkpoint, open_run
from train.sharding import make_mesh
from train.tasks import make_task
from train.trainer import Trainer

RUN = "--steps 30 --checkpoint.every 5 --model.dropout-rate 0.1 --mesh.data 2 --mesh.fsdp 2 --mesh.tensor 2"


@pytest.fixture(scope="module")
def job(data_dir):
    """Starts `attnzoo train` in processes of four devices each; its stdout and stderr together."""
    started = []

    def start(*words: str, **variables: str) -> subprocess.Popen:
        flags = re.sub(r"(device_count)=\d+", r"\1=4", os.environ["XLA_FLAGS"])
        process = subprocess.Popen(
            [sys.executable, "-m", "attnzoo.cli", "train", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags, "XDG_CACHE_HOME": str(data_dir), **variables},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def steps_written(folder: Path) -> int:
    return max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)


def curve(folder: Path) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row}


def ranks(launcher: subprocess.Popen) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True)
    return sorted(int(pid) for pid in found.stdout.split())


def gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def wait_until(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killed(job, line, tmp_path_factory) -> tuple[Path, str]:
    """A run of two processes of which the second was killed after step 10: its folder, and what was said."""
    folder = tmp_path_factory.mktemp("processes") / "killed"
    process = job(*line(RUN), "--processes", "2", "--out", str(folder))
    wait_until(lambda: steps_written(folder) >= 12, process)
    pids = ranks(process)
    assert len(pids) == 2
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == 1
    assert gone(pids, 5)
    return folder, said


@pytest.fixture(scope="module")
def whole(trained) -> Path:
    """The same run in one process of eight devices."""
    return trained(RUN)


@pytest.fixture
def copy(killed, tmp_path) -> Path:
    return Path(shutil.copytree(killed[0], tmp_path / "copy"))


def test_a_killed_process_ends_the_job(killed):
    folder, said = killed
    last = max(int(p.name) for p in (folder / CHECKPOINTS).glob("[0-9]*") if p.name.isdigit())
    assert last >= 5
    assert (
        "attnzoo: process 1 of 2 was killed by SIGKILL, and the others were ended with it; the last checkpoint is of step "
        f"{last}; go on with attnzoo train --resume {folder} --processes 2\n" in said
    )
    assert "Traceback" not in said
    assert "data=2 fsdp=2 tensor=2 context=1 on 2 processes" in said


def test_two_processes_go_on_and_equal_one(killed, copy, whole, job):
    before = curve(killed[0])
    process = job("--resume", str(copy), "--processes", "2")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    after, expected = curve(copy), curve(whole)
    assert len(before) >= 12
    assert {step: after[step] for step in before} == before  # also the steps that were lost and made again
    assert list(after) == list(expected) == list(range(1, 31))
    np.testing.assert_allclose(list(after.values()), list(expected.values()), rtol=1e-5)
    assert said.count("validation, bits per byte") == 1
    for name in ("result.json", "loss.png"):
        assert (copy / name).is_file()


def restored(folder: Path, mesh: MeshConfig) -> list[np.ndarray]:
    config = open_run(folder).config
    trainer = Trainer(task := make_task(config), config, make_mesh(mesh))
    checkpoints, step = find_checkpoint(folder)
    state = checkpoints.restore(step, trainer.abstract, trainer.shardings, iter(task.batches()))
    checkpoints.close()
    return [
        np.asarray(jax.random.key_data(a) if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key) else a)
        for a in jax.tree.leaves(state)
    ]


def test_another_mesh_in_one_process_goes_on(copy, whole, attnzoo):
    other = MeshConfig(data=1, fsdp=4, tensor=2)
    for a, b in zip(restored(copy, other), restored(copy, MeshConfig()), strict=True):
        assert a.tobytes() == b.tobytes()
    words = ["--mesh.data", "1", "--mesh.fsdp", "4", "--mesh.tensor", "2"]
    code, _, err = attnzoo("train", "--resume", str(copy), *words)
    assert code == 0, err
    assert list(curve(copy)) == list(curve(whole))
    np.testing.assert_allclose(list(curve(copy).values()), list(curve(whole).values()), rtol=1e-5)


@pytest.mark.slow
def test_one_process_goes_on_in_two(whole, job, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(folder / CHECKPOINTS / "30")
    words = ["--mesh.data", "4", "--mesh.fsdp", "2", "--mesh.tensor", "1"]
    process = job("--resume", str(folder), "--processes", "2", *words)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    np.testing.assert_allclose(list(curve(folder).values()), list(curve(whole).values()), rtol=1e-5)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_orphans(line, job, tmp_path):
    process = job(*line(RUN), "--processes", "2", "--out", str(tmp_path / "run"))
    wait_until(lambda: steps_written(tmp_path / "run") >= 4, process)
    pids = ranks(process)
    process.kill()
    process.communicate(timeout=60)
    assert len(pids) == 2 and gone(pids, 5)


@pytest.mark.slow
def test_an_interrupt_saves_in_all(line, job, tmp_path):
    folder = tmp_path / "run"
    process = job(*line(RUN), "--steps", "100000", "--processes", "2", "--out", str(folder))
    wait_until(lambda: steps_written(folder) >= 4, process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    saved = max(int(p.name) for p in (folder / CHECKPOINTS).glob("[0-9]*") if p.name.isdigit())
    assert f"interrupted after step {saved} of 100000, which is saved" in said
    assert f"attnzoo train --resume {folder} --processes 2" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_without_a_launcher_a_dead_process_ends_the_other(dead, line, job, tmp_path, free_port):
    folder = tmp_path / "run"
    where = {"ATTNZOO_COORDINATOR": f"127.0.0.1:{free_port}", "ATTNZOO_PROCESSES": "2"}
    pair = [job(*line(RUN), "--steps", "100000", "--out", str(folder), **where, ATTNZOO_PROCESS=str(i)) for i in (0, 1)]
    wait_until(lambda: steps_written(folder) >= 4, pair[dead])
    pair[dead].kill()
    said, _ = pair[1 - dead].communicate(timeout=60)
    assert pair[1 - dead].returncode not in (0, None)
    if dead == 1 or "another task died" not in said:  # which the runtime says when process 0 is gone, if it comes first
        assert f"attnzoo: process {1 - dead} of 2 stops because it lost the others" in said
        assert f"Go on from the last checkpoint in {folder} with --resume" in said


@pytest.mark.slow
def test_a_refusal_is_said_once(killed, line, job):
    process = job(*line(RUN), "--processes", "2", "--out", str(killed[0]))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.count("already holds a run") == 1
    assert len([line for line in said.splitlines() if "[Gloo]" not in line]) == 1


@pytest.mark.slow
def test_an_error_of_one_process_is_told_by_all(line, job, tmp_path, free_port):
    """Two processes that were given different things do not wait for each other."""
    where = {"ATTNZOO_COORDINATOR": f"127.0.0.1:{free_port}", "ATTNZOO_PROCESSES": "2"}
    pair = [job(*line(RUN), "--seed", str(i), "--out", str(tmp_path / "run"), **where, ATTNZOO_PROCESS=str(i)) for i in (0, 1)]
    said = [process.communicate(timeout=120)[0] for process in pair]
    said = ["".join(line for line in text.splitlines() if "[Gloo]" not in line) for text in said]
    assert [process.returncode for process in pair] == [2, 2]
    assert said[0] == ("attnzoo: process 1 has another configuration than process 0; every process must be given the same")
    assert said[1] == ""
    assert not (tmp_path / "run").exists()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"coordinator": "a:1"},
            r"--distributed.processes \(or ATTNZOO_PROCESSES\) and --distributed.process \(or",
        ),
        ({"process": 1}, "must be given too; there is only process 1"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "2 is not one of the 2 processes 0 to 1"),
        ({"coordinator": "somewhere", "processes": 2, "process": 0}, "'somewhere' is not HOST:PORT"),
    ],
)
def test_where_to_meet_is_checked(given, expected):
    with pytest.raises(ValueError, match=expected):
        connect(DistributedConfig(**given))


def test_variables_say_where_to_meet(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("ATTNZOO_PROCESS", "x")
    with pytest.raises(ValueError, match=r"--distributed\.process: 'x' is not a whole number"):
        connect(DistributedConfig())
    monkeypatch.setenv("ATTNZOO_PROCESS", "5")
    with pytest.raises(ValueError, match="5 is not one of the 3 processes"):
        connect(DistributedConfig())


def test_one_process_needs_nothing(monkeypatch):
    for name in ("COORDINATOR", "PROCESSES", "PROCESS"):
        monkeypatch.delenv(f"ATTNZOO_{name}", raising=False)
    connect(DistributedConfig())
    assert not jax.distributed.is_initialized()
    with pytest.raises(KeyError), together():
        raise KeyError("as it is")


def test_processes_are_started_or_joined_not_both(attnzoo, line):
    code, _, err = attnzoo("train", *line("--processes 2 --distributed.process 1"))
    assert code == 2
    assert "--processes: starts all processes of a job here" in err
    code, _, err = attnzoo("train", *line("--processes 0"))
    assert code == 2
    assert "--processes: must be at least 1, got 0" in err
