"""Weights as safetensors: everything back bit for bit, and nothing that does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.flax import save_file

from attnzoo.convert.weights import load_weights, read_config, save_weights


class Model(nnx.Module):
    def __init__(self, width: int = 3, *, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(4, width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Variable(jnp.zeros((), jnp.int32) + seed)


def arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.state(model, nnx.Not(nnx.RngState)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "model.safetensors"
    save_weights(Model(seed=1), file, config={"width": 3, "name": "é"})
    return file


def test_round_trip_is_bit_exact(path):
    model = Model(seed=2)
    assert load_weights(model, path) == {"width": 3, "name": "é"} == read_config(path)
    expected = arrays(Model(seed=1))
    assert {name: (a.dtype, a.tobytes()) for name, a in arrays(model).items()} == {
        name: (a.dtype, a.tobytes()) for name, a in expected.items()
    }


def test_what_is_in_the_file(path):
    with safe_open(path, framework="np") as file:
        assert set(file.keys()) == {
            *(f"layers.{i}.{name}" for i in (0, 1) for name in ("kernel", "bias")),
            *(f"norm.{name}" for name in ("scale", "bias", "mean", "var")),
            "seen",
        }
        assert file.metadata()["format"] == "attnzoo"
        assert json.loads(file.metadata()["config"]) == {"width": 3, "name": "é"}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_of_the_file(dtype, tmp_path):
    file, model = tmp_path / "m.safetensors", Model(seed=2)
    save_weights(Model(seed=1), file, config={}, dtype=dtype)
    load_weights(model, file)
    kernel = Model(seed=1).layers[0].kernel[...]
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel.astype(dtype).astype(jnp.float32))
    assert model.seen[...] == 1 and model.seen[...].dtype == jnp.int32


def test_nothing_is_overwritten(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is there already, and nothing is overwritten"):
        save_weights(Model(), path, config={})
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="dtype: 'int8' is not one of float32, bfloat16, float16"):
        save_weights(Model(), path.with_name("other"), config={}, dtype="int8")


def spoiled(path, **changes):
    """The file with arrays replaced, or without those that are None; `__` in a name stands for a dot."""
    with safe_open(path, framework="flax") as file:
        stored, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for name, value in changes.items():
        stored[name.replace("__", ".")] = value
    other = path.with_name("spoiled.safetensors")
    save_file({name: value for name, value in stored.items() if value is not None}, other, metadata)
    return other


def test_what_does_not_fit_is_refused_and_changes_nothing(path):
    cases = {
        r"layers.0.kernel has shape \(4, 5\) in the file, \(4, 3\) in the model": {"layers__0__kernel": jnp.zeros((4, 5))},
        "layers.0.kernel is not in the file, which has layers.0.kernal instead": {
            "layers__0__kernel": None,
            "layers__0__kernal": jnp.zeros((4, 3)),
        },
        "layers.2.kernel is not in the model": {"layers__2__kernel": jnp.zeros(2)},
        "layers.0.bias has dtype int32 in the file, float32 in the model": {"layers__0__bias": jnp.zeros(3, jnp.int32)},
    }
    model = Model(seed=2)
    before = arrays(model)
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            load_weights(model, spoiled(path, **changes))
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_other_files_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match="there is no such file"):
        read_config(tmp_path / "none")
    truncated = tmp_path / "truncated"
    truncated.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="another format or truncated"):
        read_config(truncated)
    pickled = tmp_path / "pickle"
    pickled.write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match="another format or truncated"):
        load_weights(Model(), pickled)
    foreign = tmp_path / "foreign"
    save_file({"a": jnp.zeros(2)}, foreign, {"format": "pt"})
    with pytest.raises(ValueError, match=r"not a file of attnzoo \(its metadata have format 'pt', and no configuration"):
        load_weights(Model(), foreign)
