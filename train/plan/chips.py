"""TPU generations in numbers, and the slices of them that can be planned for."""

import importlib.util
import math
import os
from dataclasses import dataclass, replace
from typing import Any

from attnzoo.errors import unknown

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One generation, per chip. All figures are the maker's peak values.

    flops: bfloat16 operations per second. hbm: bytes of memory. usable: how many of them the compiler gives to a program.
    hbm_bandwidth: bytes per second.
    ici_bandwidth: bytes per second that the links to all neighbours can receive together.
    devices: how many devices a chip shows itself as.
    platform: how the compiler's names for slices begin. kernels: the name that `pallas_kernels` knows it by.
    cores: how the compiler is to take the cores of a chip, None for its own way.
    """

    flops: float
    hbm: float
    usable: float
    hbm_bandwidth: float
    ici_bandwidth: float
    devices: int
    platform: str
    kernels: str
    cores: str | None = None


# Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "system architecture". The interconnect is given there as
# bidirectional bandwidth per chip, of which half arrives; v4's is 6 links of 50 GB/s each way (Jouppi et al., 2023,
# arXiv 2304.01433). Usable memory is what libtpu says when it refuses a program.
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 30.75 * GIB, 1.2e12, 300e9, 1, "v4", "v4", "megacore"),
    "v5e": Chip(197e12, 16 * GIB, 15.75 * GIB, 819e9, 200e9, 1, "v5e", "v5e"),
    "v5p": Chip(459e12, 95 * GIB, 95.74 * GIB, 2.765e12, 600e9, 1, "v5p", "v5p"),
    "v6e": Chip(918e12, 32 * GIB, 31.25 * GIB, 1.638e12, 400e9, 1, "v6e", "v6e"),
    "7x": Chip(2307e12, 192 * GIB, 2 * 94.75 * GIB, 7.38e12, 600e9, 2, "tpu7x", "7x"),
}

_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
TOPOLOGIES = tuple(
    f"{chip.platform}:{shape}" for name, chip in CHIPS.items() for shape in (_FLAT if name in ("v5e", "v6e") else _CUBES)
)
"""Slices that can be planned for, as the compiler names them."""


@dataclass(frozen=True)
class Slice:
    """Chips that are only described. topology: its name. devices: for shardings; they cannot hold arrays."""

    topology: str
    chip: Chip
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.devices

    @property
    def per_device(self) -> Chip:
        """The chip's figures for one of its devices."""
        chip, n = self.chip, self.chip.devices
        shared = {name: getattr(chip, name) / n for name in ("flops", "hbm", "usable", "hbm_bandwidth", "ici_bandwidth")}
        return replace(chip, devices=1, **shared)


def check_topology(topology: str) -> Chip:
    """The chip of a slice. Raises ValueError, with the nearest names and all of its generation, if it is not known."""
    platform = topology.partition(":")[0]
    if topology in TOPOLOGIES:
        return next(chip for chip in CHIPS.values() if chip.platform == platform)
    same = [name for name in TOPOLOGIES if name.startswith(f"{platform}:")]
    error = unknown("topology", topology, TOPOLOGIES)
    listed = ", ".join(same or sorted(TOPOLOGIES))
    raise ValueError(f"--topology: {error} Known{f' of {platform}' if same else ''}: {listed}")


def device_count(topology: str) -> int:
    """Devices of a slice, by its name. Raises ValueError if it is not known."""
    return check_topology(topology).devices * math.prod(map(int, topology.partition(":")[2].split("x")))


def described(topology: str) -> Slice:
    """The slice called `topology`.

    Raises ValueError if it is not known, or the TPU compiler is not installed or does not know it.
    """
    chip = check_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "plan needs the TPU compiler, which is not installed: pip install 'attnzoo[train,tpu]' (no TPU needed)"
        )
    try:
        return Slice(topology, chip, _devices(topology))
    except Exception as error:  # whatever the compiler's own library raises
        listed = ", ".join(filter(_is_described, TOPOLOGIES)) or "none"
        raise ValueError(
            f"--topology: the installed TPU compiler does not describe {topology!r}: {error}. Known to it: {listed}"
        ) from error


def _devices(topology: str) -> tuple[Any, ...]:
    from jax.experimental import topologies

    chip = check_topology(topology)
    options = {} if chip.cores is None else {"chip_config_name": chip.cores}
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)


def _is_described(topology: str) -> bool:
    try:
        return bool(_devices(topology))
    except Exception:
        return False


def without_tpus() -> None:
    """Sets this process up to compile for TPUs on a machine that has none. Before JAX is first used.

    The compiler's library then neither claims a TPU nor asks the cloud's metadata server which one it is on.
    """
    import jax

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
