"""The least time a step takes on a chip: whichever of its parts is busy longest."""

from dataclasses import dataclass

from train.plan.chips import Chip


@dataclass(frozen=True)
class Roofline:
    """Seconds at the chip's peak rates.

    compute: of the matrix units. memory: of moving bytes to and from main memory. network: of receiving over all links.
    """

    compute: float
    memory: float
    network: float

    @property
    def limiter(self) -> str:
        return max(("compute", "memory", "network"), key=lambda part: getattr(self, part))

    @property
    def seconds(self) -> float:
        """If everything overlaps; a step takes at least this."""
        return max(self.compute, self.memory, self.network)


def roofline(device: Chip, flops: float, traffic: float, received: float) -> Roofline:
    """Of what one device does in a step; device: the figures per device."""
    return Roofline(flops / device.flops, traffic / device.hbm_bandwidth, received / device.ici_bandwidth)
