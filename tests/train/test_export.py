"""A trained model as one file, and back."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from train.generate import load_model
from train.rundir import CHECKPOINTS, open_run


@pytest.fixture
def exported(finished, tmp_path, attnzoo):
    path = tmp_path / "model.safetensors"
    code, out, err = attnzoo("export", str(finished), "--out", str(path))
    assert code == 0, err
    assert out.startswith(f"wrote {path}: ")
    return path


def parameters(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


def test_a_run_goes_out_and_comes_in_bit_exactly(exported, finished, attnzoo):
    for a, b in zip(parameters(load_model(exported)[0]), parameters(load_model(finished)[0]), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    texts = []
    for source in (finished, exported):
        code, out, err = attnzoo("generate", "--checkpoint", str(source), "--prompt", "The ", "--max-new", "8")
        assert code == 0, err
        texts.append(out)
    assert texts[0] == texts[1]


def test_the_file_says_what_it_is(exported, finished):
    with safe_open(exported, framework="np") as file:
        about = json.loads(file.metadata()["config"])
        assert "layers.runs.0.feed_forward.up.kernel" in file.keys()  # noqa: SIM118
    assert about == open_run(finished).as_json()


def test_another_dtype(finished, tmp_path, attnzoo):
    path = tmp_path / "half.safetensors"
    code, _, err = attnzoo("export", str(finished / CHECKPOINTS / "8"), "--out", str(path), "--dtype", "bfloat16")
    assert code == 0, err
    for a, b in zip(parameters(load_model(path)[0]), parameters(load_model(finished / CHECKPOINTS / "8")[0]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=2**-8)


def test_what_is_refused(exported, finished, tmp_path, attnzoo):
    for words, expected in (
        ((str(finished), "--out", str(exported)), "is there already, and nothing is overwritten"),
        ((str(finished), "--out", str(tmp_path / "model.bin")), "must end in .safetensors"),
        ((str(tmp_path / "none"), "--out", str(tmp_path / "a.safetensors")), "there is no run in"),
    ):
        code, _, err = attnzoo("export", *words)
        assert code == 2
        assert expected in err
    renamed = shutil.copy(finished / "config.json", tmp_path / "b.safetensors")
    code, _, err = attnzoo("generate", "--checkpoint", str(renamed), "--prompt", "a")
    assert code == 2
    assert "cannot be read as safetensors" in err
