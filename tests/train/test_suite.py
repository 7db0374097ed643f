"""Leaderboards: every mixer on the same ground, at equal parameters and at an equal cache."""

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from attnzoo import catalog
from train import suite as suites
from train.compare import parameters
from train.leaderboard import Entry, Leaderboard, Measured, cells, table
from train.suite import (
    SUITES,
    cache_bytes,
    fitted,
    run_suite,
    settings_within,
    smoke_suite,
    suite_mixers,
    suite_named,
    train_once,
    with_positions,
)


@pytest.fixture
def small(tiny, replaced, monkeypatch):
    """A suite that compiles and runs in seconds, in place of "language"."""
    config = replaced(tiny, {"steps": 9, "batch": 4, "model.dim": 16, "model.num_heads": 4})
    suite = dataclasses.replace(SUITES["language"], config=config, decode_length=16, decode_batch=2)
    monkeypatch.setitem(SUITES, "language", suite)
    return suite


def measured(score=2.0, **changes):
    return Measured(**{
        "scores": (score - 0.25, score + 0.25), "step_seconds": 0.02, "decode_seconds": 0.001, "cache_bytes": 64.0,
        "parameters": 1000, "mlp_dim": 8, **changes,
    })  # fmt: skip


def test_names():
    assert suite_named("language").name == "language"
    with pytest.raises(ValueError, match="unknown suite 'langage': did you mean 'language'"):
        suite_named("langage")
    assert suite_mixers("all") == {key: (key, {}) for key in catalog.mixers()}
    assert suite_mixers("transformer,transformer:num_kv_heads=1").keys() == {"transformer", "transformer:num_kv_heads=1"}
    assert suite_mixers("transformer").keys() == {"transformer"}  # the suite has a reference of its own
    with pytest.raises(ValueError, match="needs an entry"):
        suite_mixers(" ,")


def test_a_smoke_suite_is_shorter():
    suite = SUITES["language"]
    smoke = smoke_suite(suite)
    assert smoke.config.steps < 10 < suite.config.steps
    assert smoke.config.model == suite.config.model
    command = Leaderboard(smoke, "a,b:c=1 2", "", {}, 1.0).as_json()["command"]
    assert command == "attnzoo compare --suite language --mixers 'a,b:c=1 2' --smoke"
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        dataclasses.replace(suite, config=dataclasses.replace(suite.config, steps=1))


def test_settings_within(small, replaced):
    plan = small.config
    whole = 2 * 4 * 4 * 4  # two of N = 4 heads of H = 4 floats, one layer
    assert cache_bytes(plan) == whole
    assert settings_within(plan, whole) == {}
    assert settings_within(plan, whole / 2) == {"num_kv_heads": 2}
    assert settings_within(plan, whole / 2 - 1) == {"num_kv_heads": 1}
    # What the plan sets itself is left alone: narrower heads then.
    fixed = dataclasses.replace(plan, mixer_args={"num_kv_heads": 4})
    assert settings_within(fixed, whole / 2) == {"head_dim": 2}
    with pytest.raises(ValueError, match=r"takes 128 bytes per token, and nothing of .*num_kv_heads.* brings it to 3"):
        settings_within(plan, 3)


def test_fewer_experts_where_they_leave_nothing(small, replaced):
    plan = replaced(small.config, {"mixer": "bam"})
    budget = parameters(replaced(plan, {"mixer_args": {"num_experts": 2}, "model.mlp_dim": 3}))
    found, settings = fitted(plan, budget)
    assert settings == {"num_experts": 2} == found.mixer_args
    assert parameters(found) == budget
    for hopeless in (replaced(plan, {"mixer": "transformer"}), found):
        with pytest.raises(ValueError, match="no mlp_dim gives it 10 parameters"):
            fitted(hopeless, 10)


def test_widths_that_a_mixer_refuses_are_passed_over(small, monkeypatch):
    def picky(plan):
        if plan.mixer_args.get("num_kv_heads") == 2:
            raise ValueError("not two")
        return cache_bytes(plan)

    monkeypatch.setattr(suites, "cache_bytes", picky)
    assert settings_within(small.config, 64) == {"num_kv_heads": 1}


def test_mixers_that_do_not_decode(small, monkeypatch):
    monkeypatch.setattr(catalog.mixer("transformer"), "decodes", False)
    assert cache_bytes(small.config) is None
    with pytest.raises(ValueError, match="does not decode"):
        settings_within(small.config, 64)


def test_mixers_that_refuse_rotation_get_learned_positions(small, monkeypatch):
    cls = catalog.mixer("transformer")
    build = cls.__init__

    def refusing(self, *args, positions=None, **kwargs):
        if positions is not None:
            raise ValueError("positions: cannot rotate keys")
        build(self, *args, positions=positions, **kwargs)

    assert with_positions(small.config) == small.config
    monkeypatch.setattr(cls, "__init__", refusing)
    assert with_positions(small.config).model.positions == "learned"
    wrong = dataclasses.replace(small.config, model=dataclasses.replace(small.config.model, num_heads=5))
    with pytest.raises(ValueError, match="5 heads"):
        with_positions(wrong)


def test_a_suite_from_the_command_line(attnzoo, small, tmp_path):
    pair, folder = "transformer,transformer:num_kv_heads=1", tmp_path / "out"
    code, out, err = attnzoo("compare", "--suite", "language", "--mixers", pair, "--out", str(folder))
    assert code == 0, err
    board = json.loads((folder / "leaderboard.json").read_text())
    assert board["command"] == f"attnzoo compare --suite language --mixers {pair}"
    assert board["suite"]["config"]["steps"] == 9
    assert board["cache_budget"] == 32
    entries = {entry["mixer"]: entry for entry in board["entries"]}
    assert set(entries) == set(pair.split(","))
    whole, single = (entries[name] for name in pair.split(","))
    assert whole["equal_parameters"]["cache_bytes"] == 128
    assert whole["equal_cache"]["cache_bytes"] == 32
    assert whole["equal_cache"]["settings"] == {"num_kv_heads": 1}
    # Within the budget as it is: the same measurement on both axes.
    assert single["equal_cache"] == single["equal_parameters"]
    budget = parameters(small.config)
    for entry in entries.values():
        for values in (entry["equal_parameters"], entry["equal_cache"]):
            assert abs(values["parameters"] - budget) <= 0.01 * budget
            assert len(values["scores"]) == 2
            assert values["scores"][0] != values["scores"][1]
            assert all(0 < score < 9 for score in values["scores"])
            assert values["step_seconds"] > 0
            assert values["decode_seconds"] > 0
    # The same mixer by two ways is the same run.
    assert whole["equal_cache"]["scores"] == single["equal_cache"]["scores"]
    means = [sum(entry["equal_parameters"]["scores"]) for entry in board["entries"]]
    assert means == sorted(means)
    assert (folder / "leaderboard.png").stat().st_size > 5000
    assert "bits per byte after 9 steps, mean of 2 seeds" in " ".join(out.split())
    assert "num_kv_heads=1" in out


def test_what_a_suite_fixes_cannot_be_set(attnzoo, small):
    code, out, err = attnzoo("compare", "--suite", "language", "--steps", "3")
    assert code == 2
    assert "--steps" in out + err
    code, out, err = attnzoo("compare", "--suite", "langage")
    assert code == 2
    assert "did you mean 'language'" in err


def test_what_cannot_be_measured_is_left_out_of_all(small, tmp_path, monkeypatch):
    """Refused or broken, the others go on; what is interrupted or raises leaves an older board whole."""
    errors = {"transformer": ValueError("it takes no such model"), "tpa": ZeroDivisionError("by zero")}

    def measure_entry(suite, label, plan, budget, cache_budget):
        if label in errors:
            raise errors[label]
        return Entry(label, measured(), None, "it has no cache")

    monkeypatch.setattr(suites, "measure_entry", measure_entry)
    board = run_suite(small, "all", tmp_path, Console(quiet=True))
    assert board.skipped == {"transformer": "it takes no such model"}
    assert board.failed == {"tpa": "ZeroDivisionError: by zero"}
    assert {entry.mixer for entry in board.entries} == catalog.mixers().keys() - errors.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"leaderboard.json", "leaderboard.png"}
    whole = (tmp_path / "leaderboard.json").read_text()
    with pytest.raises(ValueError, match="no such model"):
        run_suite(small, "value_residual,transformer", tmp_path, Console(quiet=True))
    document = json.loads((tmp_path / "leaderboard.partial.json").read_text())
    assert [entry["mixer"] for entry in document["entries"]] == ["value_residual"]
    assert (tmp_path / "leaderboard.json").read_text() == whole


def test_an_interrupted_suite_shows_what_it_has(attnzoo, small, tmp_path, monkeypatch):
    def measure_entry(suite, label, plan, budget, cache_budget):
        if label == "transformer":
            raise KeyboardInterrupt
        return Entry(label, measured(), None, "it has no cache")

    monkeypatch.setattr(suites, "measure_entry", measure_entry)
    line = ("compare", "--suite", "language", "--out", str(tmp_path / "out"), "--mixers")
    code, out, _ = attnzoo(*line, "value_residual,transformer,tpa")
    assert code == 130
    assert "value_residual" in out and "2.000" in out and "what is finished lies in" in " ".join(out.split())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"leaderboard.partial.json", "leaderboard.partial.png"}
    code, out, _ = attnzoo(*line[:-2], str(tmp_path / "none"), "--mixers", "transformer,tpa")
    assert code == 130
    assert "nothing was finished" in out


def test_the_first_axis_outlives_the_second(small, monkeypatch):
    def settings_within(plan, cache_budget):
        raise TypeError("unhashable")

    monkeypatch.setattr(suites, "measure", lambda suite, plan: measured())
    monkeypatch.setattr(suites, "settings_within", settings_within)
    entry = suites.measure_entry(small, "transformer", small.config, parameters(small.config), 64)
    assert entry == Entry("transformer", measured(), None, "TypeError: unhashable")


def test_cells_and_table(small):
    assert cells(measured()) == ("2.000", "20.0", "1.00", "64")
    assert cells(measured(decode_seconds=None, cache_bytes=None)) == ("2.000", "20.0", "", "")
    entries = (
        Entry("a", measured(), dataclasses.replace(measured(2.5), settings={"head_dim": 2})),
        Entry("b", measured(3.0), None, "no", "learned"),
        Entry("c", measured(4.0), measured(4.0)),
    )
    board = Leaderboard(small, "a,b,c", "bits per byte", {"bigram": 3.7}, 16.0, entries, {}, 1.0)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(board))
    rows = [line.split() for line in console.export_text().splitlines() if "20.0" in line]
    assert rows == [
        ["a", "2.000", "20.0", "1.00", "64", "below"],
        ["head_dim=2", "2.500", "20.0", "1.00", "64"],
        ["b,", "learned", "positions", "3.000", "20.0", "1.00", "64", "cannot"],
        ["c", "4.000", "20.0", "1.00", "64", "as", "it", "is"],
    ]
    assert "lower is better" in table(board).title
    higher = dataclasses.replace(board, higher_is_better=True, entries=()).with_entry(entries[0]).with_entry(entries[1])
    assert [entry.mixer for entry in higher.entries] == ["b", "a"]
    assert "higher is better" in table(higher).title


def test_divergence_is_said(small, replaced, monkeypatch):
    from train.sharding import make_mesh
    from train.tasks import make_task
    from train.trainer import Trainer

    plan = replaced(small.config, {"optimizer.learning_rate": math.inf})
    trainer = Trainer(make_task(plan), plan, make_mesh(plan.mesh))
    with pytest.raises(ValueError, match="its loss is nan after 9 steps with seed 3"):
        train_once(trainer, dataclasses.replace(plan, seed=3))
    plan = dataclasses.replace(small.config, seed=4)
    trainer = Trainer(make_task(plan), plan, make_mesh(plan.mesh))
    monkeypatch.setattr(trainer, "evaluate", lambda state, batches: {make_task(plan).metric: math.inf})
    with pytest.raises(ValueError, match="its validation score is inf after 9 steps with seed 4"):
        train_once(trainer, plan)
