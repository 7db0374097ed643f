"""What the TPU compiler makes of a kernel: its final schedule, read on any machine.

A TPU core issues one bundle of instructions per cycle, and the compiler fixes every bundle ahead of time. How many bundles a
tile takes, and how full the matrix units are meanwhile, is therefore known without running anything: it is what the kernel
costs while its data arrive in time. The compiler comes with the package `libtpu`; it reads its dump flags once, so a
process compiles for one generation, and starts with :func:`prepare` before JAX is used.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: generation -> the smallest slice that can be described to the compiler.
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
_UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One kernel's final program.

    bundles: of the whole program; a rolled loop counts once. hot: from the first to the last use of the matrix units, the
    work on a tile. matmuls: issues to the matrix units in the hot stretch; ``bound``: bundles these take at least.
    use: share of each unit's slots that is filled in the hot stretch. spills: loads and stores of registers that did not
    fit. vmem: bytes of on-chip memory asked for by name (scratch and internal).
    """

    kernel: str
    bundles: int
    hot: int
    matmuls: int
    bound: int
    use: dict[str, float]
    spills: int
    vmem: int


def prepare(folder: Path) -> None:
    """Set the environment so that kernels compiled by this process leave their schedules in ``folder``."""
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def check(generation: str) -> None:
    """Raises ValueError for a generation that is not known, and ImportError where the compiler is not installed."""
    if generation not in SLICES:
        raise ValueError(f"generation: one of {', '.join(SLICES)} is needed, got {generation!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError('the TPU compiler is not installed: pip install -e ".[tpu]"')


def device(generation: str, topology: str | None = None) -> Any:
    """A described, absent device to compile for."""
    return devices(generation, topology)[0]


def devices(generation: str, topology: str | None = None) -> list[Any]:
    """All devices of a described slice; topology such as "v5e:16x16", by default the smallest.

    Raises ValueError for a generation that is not known, and ImportError where the compiler is not installed.
    """
    from jax.experimental import topologies

    check(generation)
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology or SLICES[generation])
    return list(described.devices)


def compiled(generation: str, f: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """``f`` compiled for one device of a generation; arguments are arrays or shapes with a dtype."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.tpu.launch import compiling_for

    where = SingleDeviceSharding(device(generation))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in arguments]
    with compiling_for(generation):
        return jax.jit(f).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()


def read(folder: Path) -> list[Schedule]:
    """The schedules of all kernels that use the matrix units."""
    found = []
    for path in sorted(folder.glob("*final_hlo-static-per-bundle-utilization.txt")):
        name = re.sub(r"^\d+-(.*?)(\.\d+)?-\d+-final_hlo.*$", r"\1", path.name)
        if name == "TLP":  # the program around the kernels
            continue
        schedule = parse(name, path.read_text(), _vmem(folder, path.name))
        if schedule is not None:
            found.append(schedule)
    return found


def parse(kernel: str, text: str, vmem: int = 0) -> Schedule | None:
    """From the compiler's table of unit use per bundle; None for a program without matrix products."""
    head, _, table = text.partition("== UTILIZATION:")
    names_line, capacity_line = head.strip().splitlines()[-2:]
    names = [n.strip() for n in names_line.split(",")]
    capacity = dict(zip(names, map(int, capacity_line.split()), strict=True))
    rows = [list(map(int, line.split())) for line in table.splitlines() if re.fullmatch(r"[\s\d]+", line) and line.strip()]
    matrix = names.index("MXU")
    busy = [n for n, row in enumerate(rows) if row[matrix]]
    if not busy:
        return None
    hot = rows[busy[0] : busy[-1] + 1]
    total = {name: sum(row[n] for row in hot) for n, name in enumerate(names)}
    matmuls = total["MXU"]
    return Schedule(
        kernel,
        bundles=len(rows),
        hot=len(hot),
        matmuls=matmuls,
        bound=-(-matmuls // capacity["MXU"]),
        use={unit: round(total[unit] / (capacity[unit] * len(hot)), 3) for unit in _UNITS},
        spills=sum(row[n] for row in rows for n, name in enumerate(names) if name in ("VLOAD:FILL", "VSTORE:SPILL")),
        vmem=vmem,
    )


def _vmem(folder: Path, table: str) -> int:
    """Bytes of vector memory that the kernel's program allocates by name."""
    stem = re.sub(r"-\d+-final_hlo.*$", "", table)
    sources = list(folder.glob(f"{stem}-02-original.txt"))
    if not sources:
        return 0
    sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", sources[0].read_text())
    return sum(int(size, 16) for size in sizes)
