"""What a run writes down: metrics.jsonl, TensorBoard events and the loss plot."""

import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class Metrics:
    """One line of metrics.jsonl and one TensorBoard event per `write`.

    Opening it cuts both to what happened up to step `keep`, so a resumed run writes nothing twice.
    """

    def __init__(self, folder: Path, keep: int):
        self.path = folder / "metrics.jsonl"
        kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= keep]
        write_atomically(self.path, "".join(kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._events = Events(folder / "tensorboard", after=keep)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._events.write(step, values)

    def flush(self) -> None:
        self._file.flush()
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


class Events:
    """A file of TensorBoard's; to TensorBoard, what older files of the folder say about steps past `after` did not happen.

    All values of a step are one event, encoded where it is written, and a flush hands them to the system. (tensorboardX's
    SummaryWriter makes an event of each value, sends it through a pipe to a thread and waits for the disk at every flush:
    milliseconds per step, all within the loop.)
    """

    def __init__(self, folder: Path, after: int):
        folder.mkdir(exist_ok=True)
        now = int(time.time())  # the name begins as TensorBoard wants it, and ends so that no two files are the same
        self._file = (folder / f"events.out.tfevents.{now}.{socket.gethostname()}.{os.getpid()}.{after}").open("wb")
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=after + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))


class NoMetrics(Metrics):
    """For the processes that leave writing to another."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a killed run left unfinished is dropped."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path` and renames: a reader sees the old text or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def plot_run(
    path: Path,
    lines: list[dict[str, Any]],
    *,
    metric: str,
    quality: str,
    scale: float | None,
    baselines: dict[str, float],
    title: str,
) -> None:
    """The training and validation curves of a run with its baselines, as a PNG.

    metric: key of the validation score, quality: what it is called.
    scale: turns the training loss into the unit of the score; None draws the loss on an axis of its own.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    key = f"validation/{metric}"
    validation = [(line["step"], line[key]) for line in lines if key in line]
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    loss_axes = axes if scale is not None else axes.twinx()
    if train:
        steps, losses = np.array(train).T
        losses = losses * (scale or 1.0)
        loss_axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        loss_axes.plot(steps, _smooth(losses), color="tab:blue", label="training" + ("" if scale else " loss"))
    if scale is None:
        loss_axes.set_ylabel("training loss (nats)", color="tab:blue")
        loss_axes.set_ylim(bottom=0)
    if validation:
        axes.plot(*np.array(validation).T, color="tab:orange", marker="o", markersize=4, label="validation")
    for (name, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="0.35", linestyle=style, label=f"{name} {value:.3f}")
    if scale is not None and validation:
        low = min(v for _, v in validation)
        high = max([*baselines.values(), low])
        axes.set_ylim(low - 0.12 * (high - low) - 0.05, high + 0.25 * (high - low) + 0.05)
    axes.set_xlabel("step")
    axes.set_ylabel(quality + (" (validation)" if scale is None else ""))
    axes.set_title(title)
    axes.grid(alpha=0.25)
    lines_shown = [line for each in {axes, loss_axes} for line in each.get_legend_handles_labels()[0]]
    axes.legend(handles=lines_shown, loc="center right" if scale is None else "upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """A running mean over the last few percent of the run."""
    width = max(1, round(share * len(values)))
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (total[ends] - total[starts]) / (ends - starts)
