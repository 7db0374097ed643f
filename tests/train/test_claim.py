"""The machinery of claims, with an experiment that takes no time."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from train import claim
from train.claims import ClaimResult
from train.claims.common import fit, mean_loss, next_token_loss, noisy_periodic


@pytest.fixture
def experiment(monkeypatch, tmp_path):
    """An experiment called `transformer` that measures made-up numbers, recorded below tmp_path."""

    def run(seeds=(0, 1), quick=False):
        values = {"ours": [1.0 + s for s in seeds], "theirs": [2.0 + s for s in seeds]}
        margin = "ours lower"
        return ClaimResult("transformer", "It is lower.", "loss", seeds, values, margin, not quick, 0.1, {"n": np.int32(3)})

    monkeypatch.setitem(sys.modules, "train.claims.transformer", SimpleNamespace(run=run))
    monkeypatch.setattr(claim, "claims", lambda: ["transformer"])
    monkeypatch.setattr(claim, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def test_a_claim_is_recorded(experiment, attnzoo):
    code, out, err = attnzoo("claim", "transformer")
    assert code == 0, err
    assert "It is lower." in out
    assert "reproduced (asked: ours lower)" in out
    recorded = json.loads((experiment / "transformer.json").read_text())
    assert recorded["verdict"] == "reproduced"
    assert recorded["values"] == {"ours": [1.0, 2.0], "theirs": [2.0, 3.0]}
    assert recorded["mean"] == {"ours": 1.5, "theirs": 2.5}
    assert recorded["details"] == {"n": 3}
    assert recorded["versions"]["jax"] == jax.__version__
    assert (experiment / "transformer.png").stat().st_size > 5000


def test_a_quick_run_is_not_recorded(experiment, attnzoo, tmp_path):
    code, out, _ = attnzoo("claim", "transformer", "--quick", "--seeds", "3")
    assert code == 0
    assert "no verdict" in out
    assert "seed 3" in out
    assert not experiment.exists()
    attnzoo("claim", "transformer", "--quick", "--out", str(tmp_path / "here"))
    assert json.loads((tmp_path / "here" / "transformer.json").read_text())["verdict"] == "none: a quick run"


@pytest.mark.parametrize(("key", "words"), [("tranformer", "did you mean 'transformer'"), ("tpa", "has no experiment yet")])
def test_an_unknown_claim(key, words, experiment, attnzoo, monkeypatch):
    monkeypatch.setattr(claim, "claims", lambda: ["transformer"])
    code, _, err = attnzoo("claim", key)
    assert code == 2
    assert words in err


def test_one_value_per_seed():
    with pytest.raises(ValueError, match="'a' has 1 values for 2 seeds"):
        ClaimResult("k", "c", "m", (0, 1), {"a": [1.0]}, "", True, 0.0)


def test_noisy_periodic():
    tokens = np.asarray(noisy_periodic(jax.random.key(0), 64, 48, noise=0.0))
    periods = [next(p for p in range(1, 13) if (row[p:] == row[:-p]).all()) for row in tokens]
    assert min(periods) >= 2  # a pattern may happen to repeat within itself
    assert set(periods) >= {5, 7, 9, 11}
    noisy = np.asarray(noisy_periodic(jax.random.key(0), 64, 48, noise=0.2))
    assert 0.15 < (noisy != tokens).mean() < 0.22  # a sixteenth of the new symbols are the old ones
    assert noisy.min() >= 0
    assert noisy.max() < 16


class Bigram(nnx.Module):
    def __init__(self):
        self.table = nnx.Param(jnp.zeros((16, 16)))

    def __call__(self, tokens):
        return self.table[tokens]


def test_fit_trains_in_place():
    model = Bigram()
    batch = lambda key: noisy_periodic(key, 8, 24, shortest=4, longest=4)  # noqa: E731
    before = mean_loss(model, next_token_loss, batch, seed=0)
    losses = fit(model, next_token_loss, batch, steps=200, seed=0, learning_rate=0.1)
    assert before == pytest.approx(np.log(16), rel=1e-5)
    assert losses.shape == (200,)
    assert mean_loss(model, next_token_loss, batch, seed=0) == pytest.approx(float(losses[-40:].mean()), abs=0.1)


def test_models_of_one_structure_are_compiled_once():
    """And each is trained on the arrays of its own batches."""
    traced = []

    def loss(model, tokens):
        traced.append(tokens.shape)
        return next_token_loss(model, tokens)

    def same(tokens, key):
        return tokens

    counts = []
    for symbol in (3, 5):
        model, batch = Bigram(), Partial(same, jnp.full((2, 9), symbol))
        fit(model, loss, batch, steps=30, seed=0, learning_rate=0.3)
        assert mean_loss(model, loss, batch, seed=0) < 0.5
        assert int(model.table[symbol].argmax()) == symbol
        counts.append(len(traced))
    assert counts[0] == counts[1] > 0
    fit(Bigram(), loss, batch, steps=29, seed=0)
    assert len(traced) > counts[0]
