"""Imports go one way: train -> models -> zoo -> nn -> core -> pallas_kernels.

The check reads every import statement, wherever it stands in a file, without running anything.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = [
    "pallas_kernels",
    "attnzoo.core",
    "attnzoo.nn",
    "attnzoo.zoo",
    "attnzoo.models",
    "train",
]  # low to high
LEAVES = {
    "attnzoo.paper",
    "attnzoo.errors",
    "attnzoo.costs",
    "attnzoo.host_memory",
}  # import nothing of ours; anyone may import them
RUNTIME = {"jax", "flax", "jaxtyping", "numpy"}
# What stands beside the layers, and what of ours it may import.
BESIDE = {
    "attnzoo.catalog": {"attnzoo.zoo"},
    "attnzoo.card": {"attnzoo.catalog", "attnzoo.core"},
    "attnzoo.cli": {"attnzoo.catalog", "attnzoo.card"},
    "attnzoo.convert": {"attnzoo.core", "attnzoo.nn", "attnzoo.zoo", "attnzoo.models", "attnzoo.catalog"},
    "attnzoo": set(),
}


def room(module: str) -> str:
    """The layer, leaf or neighbour that `module` belongs to; "" if it is not ours."""
    rooms = [*LAYERS, *LEAVES, *BESIDE]
    inside = [r for r in rooms if module == r or module.startswith(r + ".")]
    return max(inside, key=len, default="")


def allowed(importer: str) -> set[str]:
    """The rooms that code of the room `importer` may import."""
    if importer in LEAVES:
        return set()
    if importer in BESIDE:
        return BESIDE[importer] | LEAVES
    below = set(LAYERS[: LAYERS.index(importer) + 1])
    if importer == "pallas_kernels":
        return below
    if importer in ("attnzoo.models", "train"):  # they take a mechanism by its key
        below |= {"attnzoo.catalog"}
    if importer == "train":
        below |= {"attnzoo", "attnzoo.card", "attnzoo.convert"}
    return below | LEAVES


def imports(tree: ast.Module, module: str, is_package: bool):
    """(line, module, names, at_top) of each import in the file, relative ones resolved."""
    nested = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, [], id(node) not in nested
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, *([base] if base else [])])
            yield node.lineno, base, [alias.name for alias in node.names], id(node) not in nested


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """Every import in `source`, the text of `module`, that goes against the arrows."""
    tree, here, found = ast.parse(source), room(module), []
    aliases: dict[str, str] = {}  # local name -> the module of ours that it may stand for
    for line, base, names, at_top in imports(tree, module, is_package):
        top = base.partition(".")[0]
        targets = [base, *(f"{base}.{name}" for name in names)]
        for target in targets if names else [base]:
            if target == base and names and room(base) == "attnzoo" and here != "attnzoo":
                continue  # `from attnzoo import core` is judged by what it names
            there = room(target)
            if there and there not in allowed(here) | {here}:
                found.append(f"{module}:{line}: {here} may not import {there} ({target})")
                break
        if not room(base):
            if here in ("attnzoo.core", "pallas_kernels") and top == "flax":
                found.append(f"{module}:{line}: {here} is Flax-free, but imports {base}")
            if top not in sys.stdlib_module_names | RUNTIME and here != "train" and at_top:
                found.append(f"{module}:{line}: {top} is not a runtime dependency; import it inside the function")
            continue
        private = [part for target in targets for part in target.split(".") if part.startswith("_")]
        private = [part for part in private if not (part.startswith("__") and part.endswith("__"))]
        if private and separate(module, base):
            found.append(f"{module}:{line}: {private[0]} is a private name of {base}")
        aliases.update({name: f"{base}.{name}" for name in names})
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.attr.startswith("_"):
            target = aliases.get(node.value.id, "")
            if target and is_module(target) and not node.attr.startswith("__") and separate(module, target):
                found.append(f"{module}:{node.lineno}: {node.attr} is a private name of {target}")
    return found


def separate(a: str, b: str) -> bool:
    """Whether two modules keep their private names from each other: other rooms, or other exhibits."""
    if room(a) != room(b):
        return True
    return room(a) == "attnzoo.zoo" and a != b


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def source_files() -> list[Path]:
    return sorted(f for package in ("attnzoo", "pallas_kernels", "train") for f in (ROOT / package).rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def cli_exceptions(found: list[str]) -> list[str]:
    """Without the one exception there is: the command line hands commands to `train` when they run."""
    return [v for v in found if not (v.startswith("attnzoo.cli:") and "may not import train" in v)]


def test_arrows():
    found = []
    for file in source_files():
        text = file.read_text(encoding="utf-8")
        found += violations(module_name(file), text, file.name == "__init__.py")
    assert cli_exceptions(found) == []


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("attnzoo.core.masks", "import flax", "Flax-free"),
        ("attnzoo.core.masks", "def f():\n    from flax import nnx", "Flax-free"),
        ("attnzoo.core.masks", "from attnzoo.nn import mixer", "core may not import attnzoo.nn"),
        ("attnzoo.core.masks", "from attnzoo import zoo", "core may not import attnzoo.zoo"),
        ("attnzoo.core.masks", "from .. import models", "core may not import attnzoo.models"),
        ("attnzoo.core.masks", "from attnzoo import catalog", "core may not import attnzoo.catalog"),
        ("attnzoo.core.masks", "import torch", "torch is not a runtime dependency"),
        ("attnzoo.nn.mixer", "from attnzoo.zoo.cache.fastgen import f", "nn may not import attnzoo.zoo"),
        ("attnzoo.zoo.cache.fastgen", "def f():\n    import train.loop", "zoo may not import train"),
        ("attnzoo.zoo.cache.fastgen", "from attnzoo import attention", "zoo may not import attnzoo "),
        ("attnzoo.zoo.cache.fastgen", "from ..cache.duo import _probe", "_probe is a private name"),
        ("attnzoo.zoo.cache.fastgen", "from attnzoo.zoo.cache import _shared", "_shared is a private name"),
        (
            "attnzoo.zoo.cache.fastgen",
            "from attnzoo.core import masks\nmasks._pad(1)",
            "_pad is a private name",
        ),
        ("attnzoo.zoo.cache.fastgen", "from attnzoo.core.masks import _pad", "_pad is a private name"),
        ("attnzoo.models.lm", "from train.config import Config", "models may not import train"),
        ("attnzoo.errors", "from attnzoo.paper import Paper", "errors may not import attnzoo.paper"),
        ("attnzoo.catalog", "from attnzoo.models import lm", "catalog may not import attnzoo.models"),
        ("pallas_kernels.tpu.forward", "from attnzoo.errors import unknown", "pallas_kernels may not import"),
    ],
)
def test_a_wrong_import_is_found(module, source, words):
    assert any(words in v for v in violations(module, source)), violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "attnzoo.core.masks",
            "import jax.numpy as jnp\nfrom attnzoo.errors import unknown\nfrom . import blocks",
        ),
        ("attnzoo.core.masks", "from attnzoo.core.blocks import _probe"),
        ("attnzoo.core.backends.pallas", "def f():\n    import pallas_kernels.tpu"),
        ("attnzoo.zoo.cache.fastgen", "from attnzoo.core import masks\nfrom attnzoo.nn.mixer import Mixer"),
        ("attnzoo.zoo.cache.fastgen", "from attnzoo.zoo.cache.duo_attention import probe"),
        ("attnzoo.zoo.inspect.rmt_mla", "def plot():\n    import matplotlib.pyplot as plt"),
        ("attnzoo.models.lm", "from attnzoo import catalog\nfrom attnzoo.paper import Paper"),
        (
            "train.loop",
            "import optax\nfrom attnzoo.models.lm import DecoderLM\nfrom attnzoo import attention",
        ),
    ],
)
def test_a_right_import_passes(module, source):
    assert violations(module, source) == []
