"""Several processes that train together: how they meet, agree, and end."""

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is taken for dead, and the runtime ends the others."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

LOST = 3
"""Exit code of a process that ended because another one was gone."""

_MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class DistributedConfig:
    """Where the processes of a job on several machines meet.

    Under Slurm and Open MPI, on TPU pods, and in Kubernetes with `pip install jax[k8s]`, all three are found without being
    given. Each can stand in the environment instead: ATTNZOO_COORDINATOR, ATTNZOO_PROCESSES and ATTNZOO_PROCESS, or
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    coordinator: str | None = None
    """HOST:PORT at which process 0 can be reached, the same for all."""
    processes: int | None = None
    """How many processes the job has."""
    process: int | None = None
    """Which of them this one is, from 0."""


class Shared(ValueError):
    """An error that every process of the job raises alike; the first one tells the user."""


class PeerLost(RuntimeError):
    """Another process of the job is gone, and without it nothing can be computed."""


def connect(config: DistributedConfig) -> None:
    """Joins the job that this process belongs to, if it belongs to one. Before anything runs on a device.

    Raises ValueError when a part of what is needed is missing or wrong, or the other processes cannot be reached.
    """
    variables = {
        "coordinator": ("ATTNZOO_COORDINATOR", "JAX_COORDINATOR_ADDRESS"),
        "processes": ("ATTNZOO_PROCESSES", "JAX_NUM_PROCESSES"),
        "process": ("ATTNZOO_PROCESS", "JAX_PROCESS_ID"),
    }
    given = {name: _given(getattr(config, name), names) for name, names in variables.items()}
    # JAX_COORDINATOR_ADDRESS alone corrects what a cluster says of itself.
    if given == {"coordinator": os.environ.get("JAX_COORDINATOR_ADDRESS"), "processes": None, "process": None}:
        _detect()
        return
    missing = [f"--distributed.{name} (or {variables[name][0]})" for name, value in given.items() if value is None]
    if missing:
        have = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise ValueError(f"several processes: {' and '.join(missing)} must be given too; there is only {have}")
    coordinator = given["coordinator"] or ""
    count, index = (_whole(name, given[name] or "") for name in ("processes", "process"))
    if not 0 <= index < count:
        raise ValueError(f"--distributed.process: {index} is not one of the {count} processes 0 to {count - 1}")
    if not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"--distributed.coordinator: {coordinator!r} is not HOST:PORT, e.g. 10.0.0.1:1234")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is for the loop, which saves
    try:
        jax.distributed.initialize(
            coordinator, count, index, cluster_detection_method="deactivate", heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except Exception as error:
        raise ValueError(
            f"--distributed.coordinator: process {index} of {count} did not get to the others at {coordinator} "
            f"({_line(error)}); process 0 must be able to open that port, and the others to reach it"
        ) from error


def _given(flag: object, names: tuple[str, ...]) -> str | None:
    return str(flag) if flag is not None else next((os.environ[name] for name in names if os.environ.get(name)), None)


def _whole(name: str, text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"--distributed.{name}: {text!r} is not a whole number")
    return int(text)


def _detect() -> None:
    """Joins the job that the cluster's own variables describe, where there are any."""
    if "1" in (os.environ.get("SLURM_NTASKS"), os.environ.get("OMPI_COMM_WORLD_SIZE")):
        return  # JAX would give this process one device only
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):  # which says that no cluster was found
            raise
    except RuntimeError as error:
        if "must be called before" not in str(error):  # an interpreter that has computed already is in no job
            raise


def count() -> int:
    """How many processes the job has, 1 if it is none."""
    return jax.process_count()


def index() -> int:
    """Which one this is. Process 0 is the one that talks to the user and writes what needs one writer."""
    return jax.process_index()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """An error of one process within it becomes an error of all, so that none of them waits for it in vain.

    Every process must pass through it, and nothing within may itself wait for the others.
    Raises Shared, which names the process unless it is the first.
    """
    if count() == 1:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    texts = _gather("" if failed is None else str(failed) or type(failed).__name__)
    told = next((f"process {i}: {text}" if i else text for i, text in enumerate(texts) if text), None)
    if told is not None:
        raise Shared(told) from failed


def same(values: Mapping[str, str]) -> None:
    """Raises Shared when a value is not the same in every process; the keys say what the values are."""
    if count() == 1:
        return
    digests = _gather(" ".join(hashlib.sha256(value.encode()).hexdigest() for value in values.values()))
    for other, text in enumerate(digests):
        for name, here, there in zip(values, digests[0].split(), text.split(), strict=True):
            if here != there:
                raise Shared(f"process {other} has another {name} than process 0; every process must be given the same")


def from_first(text: str) -> str:
    """The text that process 0 has."""
    return text if count() == 1 else _gather(text if index() == 0 else "")[0]


def anywhere(flag: bool) -> bool:
    """Whether it is true in any process. Every process must ask."""
    return flag if count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def _gather(text: str) -> list[str]:
    """A text of every process, cut to 4 KB."""
    sent = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    sent[: len(data)] = data
    received = multihost_utils.process_allgather(sent)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in received]


@contextlib.contextmanager
def watching(where: str) -> Iterator[None]:
    """Within it, a computation that fails because a process of the job is gone raises PeerLost.

    where: a sentence on what is left, for the message.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise PeerLost(
            f"process {index()} of {count()} stops because it lost the others: one of them has ended, or cannot be reached "
            f"({_line(error)}). {where}"
        ) from error


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Leaves at once, with a message, when this process of several fails on its own.

    An ordinary exit would wait for the others, which wait for this one. What every process raises alike passes through,
    and so does everything where there is only one.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or count() == 1:
            raise
        if isinstance(error, Shared):
            if index() == 0:
                raise
            raise SystemExit(2) from error  # the first one says it
        if isinstance(error, PeerLost | ValueError | OSError):
            print(f"attnzoo: {error}", file=sys.stderr)
        elif not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(LOST if isinstance(error, PeerLost) else INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1)


def _line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 160 else line[:159] + "…"
