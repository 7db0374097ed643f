"""The mask algebra: small objects that say who may see whom, combined by ``&``, ``|`` and ``~``.

>>> from attnzoo.core.masks import Causal, Prefix, SlidingWindow
>>> Causal() & SlidingWindow(4096) | Prefix(512)
Causal() & SlidingWindow(4096) | Prefix(512)
"""

from attnzoo.core.blocks import BlockMap
from attnzoo.core.masks.base import And, Instead, Mask, Not, Or, mask
from attnzoo.core.masks.folded import Folded
from attnzoo.core.masks.function import Function
from attnzoo.core.masks.grid import Neighborhood
from attnzoo.core.masks.hubs import HubSegmentMask
from attnzoo.core.masks.positional import Causal, Dilated, Prefix, Sinks, SlidingWindow
from attnzoo.core.masks.prefix_end import PrefixEnd
from attnzoo.core.masks.tokens import Array, Blocks, Lengths, Segments, Stripes, TreeAncestors

__all__ = [
    "And",
    "Array",
    "BlockMap",
    "Blocks",
    "Causal",
    "Dilated",
    "Folded",
    "Function",
    "HubSegmentMask",
    "Instead",
    "Lengths",
    "Mask",
    "Neighborhood",
    "Not",
    "Or",
    "Prefix",
    "PrefixEnd",
    "Segments",
    "Sinks",
    "SlidingWindow",
    "Stripes",
    "TreeAncestors",
    "mask",
]
