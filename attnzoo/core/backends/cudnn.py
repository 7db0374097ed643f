"""cuDNN's fused attention on NVIDIA GPUs, for what it can express: half precision, softmax, plain masks, no score."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from attnzoo.core.backends.result import Result
from attnzoo.core.masks import And, Causal, Lengths, Mask, SlidingWindow
from attnzoo.core.request import Request
from attnzoo.core.weights import Softmax


def refusal(r: Request) -> str | None:
    """Why this backend cannot run the request (None: it can)."""
    if jax.default_backend() != "gpu":
        return f"it needs an NVIDIA GPU, and the default device is a {jax.default_backend()}"
    if r.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {r.q.dtype}"
    if not isinstance(r.weights, Softmax):
        return f"it computes softmax only, not {r.weights}"
    if r.score is not None or r.dropout is not None or not r.geometry.plain:
        return "it takes no score modifier, bias, dropout or positions"
    if r.return_lse or r.return_weights:
        return "it returns neither the log-sum-exp nor the weights"
    if not isinstance(r.scale, int | float):
        return "it takes no traced scale"
    if r.mask is not None and (_arguments(r.mask) is None or r.geometry.queries != r.geometry.keys):
        return f"it cannot express the mask {r.mask} at T={r.geometry.queries}, S={r.geometry.keys}"
    return None


def _arguments(mask: Mask) -> dict[str, Any] | None:
    """The mask as arguments of ``jax.nn.dot_product_attention``, or None."""
    if isinstance(mask, Causal):
        return {"is_causal": True} if isinstance(mask.offset, int) and mask.offset == 0 else None
    if isinstance(mask, SlidingWindow):
        return {"local_window_size": (mask.size - 1, mask.size - 1)}
    if isinstance(mask, Lengths):
        return {"key_value_seq_lengths": mask.kv} if mask.q is None else None
    if isinstance(mask, And):
        a, b = _arguments(mask.a), _arguments(mask.b)
        if a is None or b is None or a.keys() & b.keys():
            return None
        both = a | b
        if both.get("is_causal") and "local_window_size" in both:
            both["local_window_size"] = (both["local_window_size"][0], 0)
        return both
    return None


def run(r: Request) -> Result:
    arguments = {} if r.mask is None else _arguments(r.mask)
    assert arguments is not None
    plain: Any = jax.nn.dot_product_attention  # whose overloads do not take keyword dictionaries
    out = plain(r.q, r.k, r.v, scale=r.scale, implementation="cudnn", **arguments)
    return Result(out, None)
