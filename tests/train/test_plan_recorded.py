"""The plans of the guide: can be planned, and mixers set against each other have equal parameters."""

import json
import shlex
from dataclasses import replace

import jax
import pytest

from train.config import MeshConfig
from train.plan import recorded as plans
from train.plan.chips import CHIPS, Slice
from train.plan.command import parse_plan
from train.plan.compile import prepare

MIXERS = [name for name, line in plans.PLANS.items() if "--mixer" in line]


@pytest.mark.parametrize("name", plans.PLANS)
def test_a_row_is_a_command_line(name):
    command = parse_plan(shlex.split(plans.PLANS[name]))
    rows = command.settings.mesh.data * command.settings.mesh.fsdp
    assert command.settings.batch % rows == 0
    assert command.settings.data.context % command.settings.mesh.context == 0


def parameters(name):
    command = parse_plan(shlex.split(plans.PLANS[name]))
    pod = Slice("v5e:2x4", CHIPS["v5e"], tuple(jax.devices()))
    return prepare(replace(command.settings, mesh=MeshConfig(fsdp=8)), command.sizes, pod).trainer.parameters


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_are_compared_at_equal_parameters(name):
    assert parameters(name) == pytest.approx(parameters("llm-1b"), rel=0.01)


def test_what_is_recorded_is_what_the_rows_say():
    """A row that is changed is measured again."""
    made = plans.recorded(plans.RESULTS)
    assert {path.stem for path in plans.RESULTS.glob("*.json")} == made.keys()
    assert {name: one["command"] for name, one in made.items()} == {
        name: f"attnzoo plan {plans.PLANS[name]} --json" for name in made
    }


MEMORY = {
    "parameters": 1 << 30, "optimizer": 2 << 30, "gradients": 1 << 30, "activations": 3 << 30, "workspace": 1 << 30,
    "other": 0, "arguments": 0, "outputs": 0, "aliased": 0, "temporaries": 0,
}  # fmt: skip


def test_plans_are_compiled_recorded_and_drawn(tmp_path, monkeypatch, capsys):
    fits = {"fits": True, "needed": 8 << 30, "usable": 16 << 30, "memory": MEMORY}
    fails = {"fits": False, "needed": 20 << 30, "usable": 16 << 30, "memory": None}
    search = {"found": "--accumulate 2", "tries": [{"change": "--accumulate 2", "plan": fits}]}
    asked = []

    def compiled(line):
        asked.append(line)
        return {"command": line, "plan": fails, "search": search}

    monkeypatch.setattr(plans, "plan", compiled)
    assert plans.main(["llm-1b", "vit-l", "--out", str(tmp_path)]) == 0
    assert asked == [plans.PLANS["llm-1b"], plans.PLANS["vit-l"]]
    assert json.loads((tmp_path / "vit-l.json").read_text())["command"] == plans.PLANS["vit-l"]
    assert (tmp_path / "plans.png").stat().st_size > 1000
    assert "vit-l: fits" in capsys.readouterr().out
    # The rest, and what is there is left alone.
    assert plans.main(["--out", str(tmp_path)]) == 0
    assert sorted(asked) == sorted(plans.PLANS.values())
    with pytest.raises(SystemExit):
        plans.main(["llm-2b", "--out", str(tmp_path)])
    assert "did you mean" in capsys.readouterr().err
