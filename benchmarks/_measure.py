"""Measuring: interleaved medians in one process, peak memory by the kernel's high-water mark, and what ran where."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Call = Callable[[], Any]


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
    """How far above its present size the process grows while ``call`` runs, in MiB. Linux only, else None."""
    try:
        call()
        ctypes.CDLL(None).malloc_trim(0)  # else what the first call freed would not count for the second
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return round((_status("VmHWM") - before) / 1024, 1)
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status")


def environment() -> dict[str, Any]:
    """Versions, cores and load: what one has to know to believe a number."""
    versions = {}
    for package in ("jax", "jaxlib", "flax", "torch", "tokamax"):
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
