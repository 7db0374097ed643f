"""The least time a step takes on a chip: whichever of its parts is busy longest."""

from dataclasses import dataclass

from train.plan.chips import Chip


@dataclass(frozen=True)
class Roofline:
    """Seconds at the chip's peak rates.

    compute: of the matrix units, None if their operations are not known. memory: of moving bytes to and from main memory.
    network: of receiving over all links.
    """

    compute: float | None
    memory: float
    network: float

    @property
    def limiter(self) -> str | None:
        """The part that is busy longest; None if one is not known."""
        if self.compute is None:
            return None
        return max(("compute", "memory", "network"), key=lambda part: getattr(self, part))

    @property
    def seconds(self) -> float:
        """If everything overlaps; a step takes at least this, and longer for what is not known."""
        return max(self.compute or 0.0, self.memory, self.network)


def roofline(device: Chip, flops: float | None, traffic: float, received: float) -> Roofline:
    """Of what one device does in a step; device: the figures per device."""
    compute = None if flops is None else flops / device.flops
    return Roofline(compute, traffic / device.hbm_bandwidth, received / device.ici_bandwidth)
