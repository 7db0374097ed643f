"""What all benchmarks share: the command line, interleaved medians in one process, peak memory, and the file of results."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Call = Callable[[], Any]


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of ``attnzoo bench NAME``, with what every benchmark takes."""
    parser = argparse.ArgumentParser(
        prog=f"attnzoo bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=_folder,
        default=str(RESULTS),  # a string, so that it is checked as one that was given
        metavar="FOLDER",
        help="folder for results, made if there is none (default benchmarks/results)",
    )
    return parser


def _folder(name: str) -> Path:
    """The folder of this name, which takes files: what cannot be written is to be known before it is measured."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is no folder that can be written to ({error.strerror})") from error
    return folder


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and as ``command`` the line that asked for them. argv: None takes those of the process."""
    given = sys.argv[1:] if argv is None else list(argv)
    return argparse.Namespace(**vars(parser.parse_args(given)), command=shlex.join([*parser.prog.split(), *given]))


def save(
    name: str,
    options: argparse.Namespace,
    before: Mapping[str, Any],
    measured: Mapping[str, Any],
    plot: Callable[[dict[str, Any], Path], None] | None = None,
) -> None:
    """Writes NAME.json into the folder for results and says so.

    before: `environment` as it was before measuring. plot: called with all that was written and the path of a PNG beside it.
    """
    document = {"command": options.command, "environment": before, **measured}
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)
    if plot is not None:
        plot(document, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")


def interleaved(cases: Mapping[str, Call], repeat: int) -> dict[str, dict[str, float]]:
    """Median, best and worst milliseconds of each call, taking turns so that a busy moment hits all alike."""
    for call in cases.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeat):
        for name, call in cases.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"median_ms": round(statistics.median(t), 2), "min_ms": round(min(t), 2), "max_ms": round(max(t), 2)}
        for name, t in times.items()
    }


def peak_mib(call: Call) -> float | None:
    """How far above its present size the process grows while ``call`` runs, in MiB. Linux only, else None.

    The largest of three calls: what an allocator still holds from before, a call can use without growing.
    """
    call()
    try:
        return max(_growth(call) for _ in range(3))
    except (OSError, AttributeError):
        return None


def _growth(call: Call) -> float:
    time.sleep(0.1)  # XLA frees what a call held a moment after its result is there
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    call()
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")


def environment() -> dict[str, Any]:
    """Versions, cores and load: what one has to know to believe a number."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax", "grain", "torch", "tokamax"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
        **versions,
    }
