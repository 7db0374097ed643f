"""The processes of a job on one machine: started together, watched, and ended together."""

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from train.checkpoint import checkpoint_steps
from train.processes import INTERRUPTED, LOST
from train.rundir import CHECKPOINTS

_IN_GOOD_ORDER = (2, INTERRUPTED)  # what every process ends with alike: a refusal, an interrupt
_SECONDS_TO_END = 30.0  # for the others then
_LINES = 20  # of what a process wrote last


def launch(words: Sequence[str], count: int, folder: Path) -> int:
    """Runs `attnzoo train WORDS` in `count` processes that train together, and returns the exit code of the job.

    folder: of the run, for the message. Process 0 has the terminal; what another one writes is shown if it fails. When one
    dies, the others are ended at once; when this process dies, all of them (on Linux). Ctrl-C and SIGTERM are handed on.
    """
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(1, count)]
        ranks = _start(words, [None, *logs])
        stack.callback(_end, ranks)
        with _handed_on(ranks):
            failed = _first_failure(ranks)
            if failed is not None and ranks[failed].returncode in _IN_GOOD_ORDER:  # the others are about to end too
                _wait(ranks)
                failed = _first_failure(ranks)
            _end(ranks)
        if failed is None:
            return 0
        code = ranks[failed].returncode
        if code != INTERRUPTED and (failed > 0 or code < 0):  # process 0 says itself what it can say
            print(f"attnzoo: {_obituary(failed, code, count, folder)}", file=sys.stderr)
        if failed > 0 and code != INTERRUPTED:
            sys.stderr.write(_last_lines(logs[failed - 1]))
    return code if code > 0 else 1


def _start(words: Sequence[str], logs: Sequence[IO[str] | None]) -> list[subprocess.Popen]:
    meeting = f"127.0.0.1:{_free_port()}"
    ranks: list[subprocess.Popen] = []
    try:
        for index, log in enumerate(logs):
            place = {"ATTNZOO_COORDINATOR": meeting, "ATTNZOO_PROCESSES": str(len(logs)), "ATTNZOO_PROCESS": str(index)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "attnzoo.cli", "train", *words],
                    env={**os.environ, **place},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C comes to them through this process alone
                    preexec_fn=_die_with_parent(),
                )
            )
    except BaseException:
        _end(ranks)
        raise
    return ranks


def _die_with_parent():
    """What a child does before it becomes another program: ask to be killed when its parent dies. None where it cannot."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has died already
            os._exit(1)

    return ask


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _handed_on(ranks: Sequence[subprocess.Popen]) -> Iterator[None]:
    def hand_on(number: int, frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _first_failure(ranks: Sequence[subprocess.Popen]) -> int | None:
    """The process that brought the job down, None when all have ended well.

    Of several that ended in the same moment, one that was killed, and last one that only missed another.
    """
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = {index: code for index, code in enumerate(codes) if code}
        if failed:
            return min(failed, key=lambda index: (failed[index] == LOST, failed[index] > 0, index))
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.02)


def _wait(ranks: Sequence[subprocess.Popen]) -> None:
    deadline = time.monotonic() + _SECONDS_TO_END
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)


def _end(ranks: Sequence[subprocess.Popen]) -> None:
    """Kills what still runs: without one process the others can neither go on nor save."""
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.wait()


def _obituary(index: int, code: int, count: int, folder: Path) -> str:
    """What happened, and how to go on, in one paragraph."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    steps = checkpoint_steps(folder / CHECKPOINTS)
    again = f"attnzoo train --resume {shlex.quote(str(folder))} --processes {count}"
    none = f"there is no checkpoint in {folder} yet"
    left = f"the last checkpoint is of step {steps[-1]}; go on with {again}" if steps else none
    return f"process {index} of {count} {how}, and the others were ended with it; {left}"


def _last_lines(log: IO[str]) -> str:
    log.seek(0)
    lines = log.readlines()
    return "".join(f"  {line}" for line in lines[-_LINES:])
