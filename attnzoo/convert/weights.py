"""A model's weights as a safetensors file: plain arrays under stable names, nothing that runs when it is read.

    save_weights(model, "model.safetensors", config={"dim": 96}, dtype="bfloat16")
    config = load_weights(model, "model.safetensors")

An array's name is its place in the model, e.g. `layers.runs.0.feed_forward.up.kernel`. All variables of the model are there
but the states of its random streams.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnzoo.errors import nearest

FORMAT = "attnzoo"
DTYPES = ("float32", "bfloat16", "float16")


def save_weights(model: nnx.Module, path: Path | str, *, config: Mapping[str, Any], dtype: str | None = None) -> None:
    """Writes the model's variables to a new file, whole or not at all.

    config: what the model was built from; kept as JSON in the file's metadata.
    dtype: what floating-point arrays are cast to, one of float32, bfloat16, float16; by default they stay as they are.
    Raises ValueError for another dtype, or when there is something at `path` already.
    """
    save_file = _safetensors().flax.save_file
    path = Path(path)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    if path.exists():
        raise ValueError(f"{path} is there already, and nothing is overwritten")
    arrays = {
        name: jnp.asarray(array, dtype if jnp.issubdtype(array.dtype, jnp.floating) else None)
        for name, array in _arrays(model).items()
    }
    metadata = {"format": FORMAT, "config": json.dumps(config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(arrays, scratch, metadata)
        try:
            os.link(scratch, path)  # fails if something is there by now, unlike a rename
        except FileExistsError:
            raise ValueError(f"{path} is there already, and nothing is overwritten") from None
    finally:
        os.unlink(scratch)


def read_config(path: Path | str) -> dict[str, Any]:
    """The configuration that a file of `save_weights` holds. Raises ValueError for any other file."""
    with _opened(path) as file:
        return _config(path, file)


def load_weights(model: nnx.Module, path: Path | str) -> dict[str, Any]:
    """Puts the arrays of a file of `save_weights` into the model, and returns the configuration that is stored with them.

    A floating-point array is cast to the dtype of the model's. Nothing is changed unless everything fits.
    Raises ValueError when the file is no safetensors file of ours, or its names, shapes or kinds of dtype are not the model's.
    """
    expected = _arrays(model)
    with _opened(path) as file:
        config = _config(path, file)
        stored = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        _check_names(path, set(stored), set(expected))
        for name, array in expected.items():
            shape = tuple(stored[name].get_shape())
            if shape != array.shape:
                raise ValueError(f"{path}: {name} has shape {shape} in the file, {array.shape} in the model")
        arrays = {name: file.get_tensor(name) for name in expected}
    for name, array in expected.items():
        if jnp.issubdtype(arrays[name].dtype, jnp.floating) != jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{path}: {name} has dtype {arrays[name].dtype} in the file, {array.dtype} in the model")
    state = _state(model)
    leaves, structure = jax.tree.flatten(state)
    values = [arrays[name].astype(leaf.dtype) for name, leaf in zip(expected, leaves, strict=True)]
    nnx.update(model, jax.tree.unflatten(structure, values))
    return config


def _state(model: nnx.Module) -> nnx.State:
    return nnx.state(model, nnx.Not(nnx.RngState))


def _arrays(model: nnx.Module) -> dict[str, Any]:
    """Every array by its name, in the order of the state's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(_state(model))
    names = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves)
    return {name.removesuffix(".value"): leaf for name, (_, leaf) in zip(names, leaves, strict=True)}  # a Variable's own key


def _safetensors() -> Any:
    try:
        import safetensors.flax
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ModuleNotFoundError(
            "safetensors files need the module 'safetensors', which is not installed: pip install 'attnzoo[convert]'"
        ) from error
    return safetensors


def _opened(path: Path | str):
    library = _safetensors()
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        return library.safe_open(str(path), framework="flax")
    except (library.SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: it is another format or truncated ({error})") from error


def _config(path: Path | str, file: Any) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise ValueError(
            f"{path}: is not a file of attnzoo (its metadata have format {metadata.get('format')!r}, and "
            f"{'a' if 'config' in metadata else 'no'} configuration); attnzoo export writes one"
        )
    return json.loads(metadata["config"])


def _check_names(path: Path | str, stored: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - stored), sorted(stored - expected)
    if not missing and not extra:
        return
    lines = []
    for name in missing[:3]:
        close = nearest(name, extra, 1)
        lines.append(f"{name} is not in the file" + (f", which has {close[0]} instead" if close else ""))
    if extra and not missing:
        lines = [f"{name} is not in the model" for name in extra[:3]]
    more = len(missing or extra) - len(lines)
    raise ValueError(f"{path} is of another model: {'; '.join(lines)}" + (f"; and {more} more" if more else ""))
