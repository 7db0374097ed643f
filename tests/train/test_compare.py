"""Comparisons at one parameter budget."""

import json

import pytest

from train.compare import cache_numbers, equal_budgets, parameters, parse_mixers

PAIR = "transformer,transformer:num_kv_heads=1"


def test_parse_mixers():
    assert parse_mixers(PAIR + ":dropout-rate=0.5") == {
        "transformer": ("transformer", {}),
        "transformer:num_kv_heads=1:dropout-rate=0.5": ("transformer", {"num_kv_heads": 1, "dropout_rate": 0.5}),
    }


@pytest.mark.parametrize(
    ("mixers", "expected"),
    [
        ("transformer", "two different entries"),
        ("transformer,transformer", "two different entries"),
        ("transformer,tranformer", "did you mean 'transformer'"),
        ("transformer,transformer:num_kv_heads", "ARG=VALUE was expected"),
        ("transformer,transformer:kv=2", "unknown argument of mixer 'transformer' 'kv'"),
    ],
)
def test_bad_mixers(mixers, expected):
    with pytest.raises(ValueError, match=expected):
        parse_mixers(mixers)


@pytest.mark.parametrize("mlp_dim", [None, 100])
def test_budgets_are_equal(mlp_dim, tiny, replaced):
    config = replaced(tiny, {"model.mlp_dim": mlp_dim, "model.dim": 32, "model.num_heads": 4})
    plans = equal_budgets(config, parse_mixers(PAIR))
    counts = [parameters(plan) for plan in plans.values()]
    assert counts[0] == parameters(config)
    assert abs(counts[1] - counts[0]) <= 0.01 * counts[0]
    assert plans["transformer:num_kv_heads=1"].model.mlp_dim > plans["transformer"].model.mlp_dim


def test_a_budget_that_cannot_be_met(tiny, replaced):
    config = replaced(tiny, {"model.mlp_dim": 1, "model.dim": 32, "model.num_heads": 4})
    with pytest.raises(ValueError, match=r"'transformer' cannot have the parameters of 'transformer:num_kv_heads=1': no mlp"):
        equal_budgets(config, parse_mixers("transformer:num_kv_heads=1,transformer"))


def test_cache_numbers(tiny, replaced):
    config = replaced(tiny, {"model.num_layers": 3, "model.num_kv_heads": 1, "model.scan_layers": True})
    assert cache_numbers(config) == 3 * 2 * 1 * 8
    digits = replaced(tiny, {"task": "digits", "data.name": "scikit_digits"})
    assert cache_numbers(digits) is None


def test_compare_from_the_command_line(attnzoo, line, tmp_path):
    folder = tmp_path / "out"
    code, out, err = attnzoo("compare", *line("--steps 6"), "--mixers", PAIR, "--out", str(folder))
    assert code == 0, err
    document = json.loads((folder / "compare.json").read_text())
    rows = {row["mixer"]: row for row in document["rows"]}
    assert set(rows) == set(PAIR.split(","))
    assert [row["cache_bytes"] for row in rows.values()] == [2 * 16 * 4, 2 * 8 * 4]
    assert rows["transformer"]["quality"] > 0
    assert "32 (128 B)" in out
    assert (folder / "compare.png").stat().st_size > 5000
    assert (folder / "transformer-num_kv_heads=1" / "result.json").is_file()

    code, _, err = attnzoo("compare", *line("--steps 6"), "--mixers", PAIR, "--out", str(folder))
    assert code == 2
    assert "nothing in it is overwritten" in err
