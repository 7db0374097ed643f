"""The loop around the step: when it waits for the device, and what it writes down."""

import json
import threading

import jax

import train.loop
from train.metrics import read_metrics
from train.rundir import CHECKPOINTS
from train.trainer import Trainer


class OnDevice:
    """A metric that notes when it is read."""

    def __init__(self, value, reads, clock):
        self.value, self.reads, self.clock = value, reads, clock

    def __array__(self, *args, **kwargs):
        self.reads.append(self.clock())
        return self.value.__array__(*args, **kwargs)


def test_metrics_are_read_only_where_they_are_logged(tiny, replaced, tmp_path, monkeypatch):
    config = replaced(tiny, {"steps": 12, "log_every": 5, "checkpoint.every": 100})
    steps, reads = [], []

    class Watched(Trainer):
        def _compile(self):
            step = super()._compile()

            def watched(leaves, batch):
                leaves, measured = step(leaves, batch)
                steps.append(1)
                return leaves, OnDevice(measured, reads, lambda: len(steps))

            return watched

    monkeypatch.setattr(train.loop, "Trainer", Watched)
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: reads.append(len(steps)) or tree)
    train.loop.train(config, tmp_path / "run")
    assert set(reads) == {5, 10, 12}
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))


def test_steps_send_nothing_to_the_host_and_take_only_the_batch(tiny, replaced):
    """Under a guard that refuses every transfer that is not asked for."""
    from train.sharding import make_mesh
    from train.tasks import make_task

    trainer = Trainer(make_task(tiny), tiny, make_mesh(tiny.mesh))
    data = iter(trainer.task.batches())
    first, *batches = (trainer.put(next(data)) for _ in range(3))
    state, metrics = trainer.train_step(trainer.init(), first)
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics = trainer.train_step(state, batch)
    assert float(metrics["loss"]) > 0


def test_auxiliary_losses_are_added_and_logged(tiny, replaced, tmp_path):
    rows = {}
    for balance in (0.0, 0.01, 5.0):
        args = {"balance": balance}
        config = replaced(tiny, {"mixer": "moh", "model.num_heads": 4, "mixer_args": args, "steps": 6})
        folder = tmp_path / str(balance)
        train.loop.train(config, folder)
        rows[balance] = [line for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    assert not any("train/head_balance" in row for row in rows[0.0])
    first = {balance: found[0] for balance, found in rows.items()}
    assert first[0.0]["train/loss"] == first[5.0]["train/loss"]  # the cross-entropy alone
    assert first[5.0]["train/gradient_norm"] > first[0.01]["train/gradient_norm"]
    lowest = {b: min(row["train/head_balance"] for row in rows[b]) for b in (0.01, 5.0)}
    assert lowest[5.0] < lowest[0.01] - 0.01


def test_the_benchmark_of_the_loop_sees_every_step(tiny):
    from benchmarks.loop import measure

    found = measure(tiny)
    assert len(found.steps) == tiny.steps - tiny.log_every
    assert len(found.gaps) == len(found.busy) == len(found.steps) - 1
    assert len(found.alone) == tiny.steps // 2
    assert min(found.steps + found.gaps + found.busy + found.alone) > 0
    assert train.loop.Trainer is Trainer


def test_batches_come_to_the_device_while_the_step_runs(tiny, replaced, tmp_path, monkeypatch):
    """The thread that runs the steps finds them there; and a checkpoint knows which of them were not used yet."""
    put, threads, made = Trainer.put, set(), []

    def watched(self, batch):
        threads.add(threading.current_thread())
        made.append(put(self, batch))
        return made[-1]

    monkeypatch.setattr(Trainer, "put", watched)
    train.loop.train(replaced(tiny, {"steps": 6, "checkpoint.every": 3}), tmp_path / "run")
    assert threads and threading.current_thread() not in threads
    assert len(made) > 6
    for step in (3, 6):
        stored = json.loads((tmp_path / "run" / CHECKPOINTS / str(step) / "data" / "metadata").read_text())
        assert stored["next_index"] == step
