"""Bytes as tokens: 256 of them, and nothing to learn."""

import numpy as np
from jaxtyping import UInt8

VOCAB_SIZE = 256
END = b"\0"
"""Stands after every document."""


def encode(text: str | bytes) -> UInt8[np.ndarray, "n"]:
    """The UTF-8 bytes of a text."""
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)


def decode(tokens) -> str:
    """The text of tokens; bytes that are no UTF-8 become the replacement character."""
    return bytes(np.asarray(tokens, np.uint8)).decode(errors="replace")
