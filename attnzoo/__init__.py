"""Attention for JAX that you can change anywhere, and a zoo of attention papers built on it.

Everything here is imported on first use, so that `import attnzoo` costs next to nothing:

    attention, explain      the one operation, and what it would run and why
    masks, scores, weights  what changes it: who sees whom, the logits, how logits become weights
    positions, cache        rotary and other positions; key/value caches
    merge                   partial attentions combined by their log-sum-exp
    nn, zoo, models         Flax parts, the papers, complete networks
    catalog                 which papers there are, and what they build
"""

import importlib
from typing import Any

# public name -> (module, attribute); the attribute None stands for the module itself
_LAZY: dict[str, tuple[str, str | None]] = {
    "attention": ("attnzoo.core.attention", "attention"),
    "explain": ("attnzoo.core.attention", "explain"),
    "merge": ("attnzoo.core.merge", None),
    "masks": ("attnzoo.core.masks", None),
    "scores": ("attnzoo.core.scores", None),
    "weights": ("attnzoo.core.weights", None),
    "positions": ("attnzoo.core.positions", None),
    "cache": ("attnzoo.core.cache", None),
    "catalog": ("attnzoo.catalog", None),
    "core": ("attnzoo.core", None),
    "nn": ("attnzoo.nn", None),
    "zoo": ("attnzoo.zoo", None),
    "models": ("attnzoo.models", None),
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("attnzoo")
    if name not in _LAZY:
        raise AttributeError(f"module 'attnzoo' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _LAZY[name]
    value = importlib.import_module(module)
    if attribute is not None:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
