"""`attnzoo plan`: command lines, the search, and one real plan where the TPU compiler is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from train.config import MeshConfig
from train.plan.chips import CHIPS, GIB, TOPOLOGIES, Slice, device_count
from train.plan.command import parse_plan
from train.plan.compile import out_of_memory, prepare
from train.plan.roofline import roofline
from train.plan.search import Fixed, Limits, describe, nearest_that_fits
from train.plan.tasks import Sizes
from train.presets import PRESETS, preset

LINE = "--config llm-7b --topology v5e:16x16"


def test_a_plan_s_mesh_is_the_whole_slice():
    command = parse_plan(f"{LINE} --mesh fsdp=64,tensor=4 --model.remat dots --batch 256 --sizes.vocab-size 50304".split())
    assert command.settings.mesh == MeshConfig(fsdp=64, tensor=4)
    assert command.settings.model.remat == "dots"
    assert command.settings.model.dim == preset("llm-7b").model.dim
    assert (command.settings.batch, command.sizes.vocab_size) == (256, 50304)
    assert parse_plan(LINE.split()).settings.mesh == MeshConfig(fsdp=256)
    assert parse_plan(["--config", "vit-l", "--topology", "tpu7x:2x2x1"]).settings.mesh == MeshConfig(fsdp=8)
    assert parse_plan(f"{LINE} --mixer transmla --mixer.latent-dim 512".split()).settings.mixer_args == {"latent_dim": 512}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--config llm-8b --topology v5e:2x2", "unknown preset 'llm-8b': did you mean 'llm-7b' or 'llm-1b'"),
        ("--config llm-7b --topology v5e:16x17", "'v5e:16x16'.*Known of v5e: v5e:2x2, v5e:2x4"),
        ("--config llm-7b --topology v9:2x2", "unknown topology 'v9:2x2'.*tpu7x:16x16x16.*v4:2x2x1.*v6e:8x8"),
        (f"{LINE} --mesh fsdp=64,tensor=2", r"fsdp=64 x tensor=2.*is 128 devices, and v5e:16x16 has 256"),
        (f"{LINE} --mesh fsdp=64,tensr=4", "unknown axis of --mesh 'tensr': did you mean 'tensor'"),
        (f"{LINE} --mesh fsdp=64,fsdp=4", "every axis once"),
        (f"{LINE} --mesh fsdp=many", "AXIS=N"),
        (f"{LINE} --mixer transfromer", "'transformer'"),
        (f"{LINE} --sizes.vocab-size 0", "at least 1"),
    ],
)
def test_what_cannot_be_planned_is_said_before_anything_is_compiled(line, said, attnzoo):
    code, out, err = attnzoo("plan", *line.split())
    assert code == 2
    assert not out
    assert re.search(said, err), err


def test_without_the_compiler_the_extra_is_named(attnzoo, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest))
    code, _, err = attnzoo("plan", *LINE.split())
    assert code == 2
    assert "pip install 'attnzoo[train,tpu]'" in err


def test_a_slice_that_the_compiler_does_not_describe_gets_those_that_it_does(attnzoo, monkeypatch):
    """An older compiler knows fewer generations than we do."""
    from jax.experimental import topologies

    def describe(platform, topology_name, **options):
        if not topology_name.startswith("v5e:"):
            raise RuntimeError(f"Invalid TPU external name: {topology_name}")
        return SimpleNamespace(devices=jax.devices())

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: "libtpu" if name == "libtpu" else find(name, *rest))
    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    code, _, err = attnzoo("plan", "--config", "llm-100m", "--topology", "tpu7x:2x2x1")
    assert code == 2
    assert "does not describe 'tpu7x:2x2x1': Invalid TPU external name: tpu7x:2x2x1. Known to it: v5e:2x2, v5e:2x4," in err
    assert "v6e" not in err


def test_every_topology_has_a_size():
    assert device_count("v5e:16x16") == 256
    assert device_count("v5p:8x8x8") == 512
    assert device_count("tpu7x:2x2x1") == 8
    assert all(device_count(name) >= 4 for name in TOPOLOGIES)


SIZES = {"llm-100m": 110e6, "llm-1b": 1.09e9, "llm-7b": 6.61e9, "vit-l": 304e6}


def eight(chip="v5e"):
    """Host devices in place of a slice's."""
    return Slice(f"{chip}:2x4", CHIPS[chip], tuple(jax.devices()))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_parameters_they_are_named_for(name):
    config = replace(preset(name), mesh=MeshConfig(fsdp=8))
    made = prepare(config, Sizes(), eight())
    assert made.trainer.parameters == pytest.approx(SIZES[name], rel=0.01)
    # Float32: the parameters, Adam's two moments; nearly all divided by eight.
    assert made.state.parameters == pytest.approx(4 * SIZES[name] / 8, rel=0.02)
    assert made.state.optimizer == pytest.approx(2 * made.state.parameters, rel=1e-3)


def test_a_preset_can_be_trained_and_a_run_keeps_its_own(attnzoo):
    from train.cli import parse_train

    config = parse_train(["--preset", "llm-100m", "--batch", "16"]).config
    assert config == replace(preset("llm-100m"), batch=16)
    code, _, err = attnzoo("train", "--preset", "llm-100m", "--resume", "somewhere")
    assert code == 2
    assert "--preset" in err


def test_the_roofline_is_the_longest_part():
    chip = CHIPS["v5e"]
    found = roofline(chip, flops=197e12, traffic=819e9 / 2, received=200e9 * 2)
    assert (found.compute, found.memory, found.network) == (1.0, 0.5, 2.0)
    assert (found.limiter, found.seconds) == ("network", 2.0)
    unknown = roofline(chip, flops=None, traffic=819e9 / 2, received=200e9 * 2)
    assert (unknown.compute, unknown.limiter, unknown.seconds) == (None, None, 2.0)


def test_out_of_memory_is_read_and_nothing_else():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 26.16G of 15.75G hbm. Exceeded ..."
    assert out_of_memory(RuntimeError(text)) == (int(26.16 * GIB), int(15.75 * GIB))
    text = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (2.00T) exceeds available "
        "HBM (95.74G)."
    )
    assert out_of_memory(RuntimeError(text)) == (2048 * GIB, int(95.74 * GIB))
    with pytest.raises(RuntimeError, match="other"):
        out_of_memory(RuntimeError("other"))


MIB = 2**20


@pytest.fixture
def searched():
    """Searches with a compiler that is a function of the configuration: bytes per device."""

    def run(needed, usable, start, most=10, minutes=1.0):
        pod = eight()
        compiled = []

        def attempt(config, change):
            compiled.append(config)
            bytes_ = needed(config)
            return SimpleNamespace(fits=bytes_ <= usable, needed=bytes_, usable=usable)

        prepared = prepare(start, Sizes(vocab_size=64), pod)
        plan = SimpleNamespace(needed=needed(start), usable=usable)
        return nearest_that_fits(prepared, plan, pod, Limits(most, minutes), attempt), compiled

    return run


@pytest.fixture
def small(tiny, replaced):
    return replaced(tiny, {"mesh": MeshConfig(fsdp=4, tensor=2), "batch": 16, "model.dim": 32, "model.num_heads": 4})


def rows(config):
    """Examples that a device works on at once."""
    return config.batch // (config.mesh.data * config.mesh.fsdp * config.accumulate)


def test_the_nearest_that_fits_recomputes_first(searched, small):
    by_remat = {"none": 100 * MIB, "dots": 60 * MIB, "full": 40 * MIB}
    found, compiled = searched(lambda config: by_remat[config.model.remat], 64 * MIB, small)
    assert found.found.change == "--model.remat dots"
    assert [config.model.remat for config in compiled] == ["dots"]


def test_then_takes_the_batch_in_parts_then_divides_otherwise(searched, small):
    small = replace(small, model=replace(small.model, remat="full"))
    found, _ = searched(lambda config: 16 * MIB * rows(config), 40 * MIB, small)
    assert found.found.change == "--accumulate 2"
    found, _ = searched(lambda config: 128 * MIB // config.mesh.tensor, 40 * MIB, small)
    assert found.found.change == "--mesh fsdp=2,tensor=4"


def test_the_batch_is_halved_where_there_is_no_room_for_a_sum_of_gradients(searched, small):
    small = replace(small, model=replace(small.model, remat="full"))
    fixed = Fixed(prepare(small, Sizes(vocab_size=64), eight()), eight())
    gradients = fixed.bytes(replace(small, accumulate=2)) - fixed.bytes(small)
    assert gradients > 0

    def needed(config):
        return fixed.bytes(config) + gradients * config.batch // (8 * config.accumulate)

    found, _ = searched(needed, fixed.bytes(small) + gradients + gradients // 5, small)
    assert found.found.change == "--batch 8"


def test_copies_of_the_model_are_divided(searched, small, replaced):
    copied = replaced(small, {"mesh": MeshConfig(data=8), "batch": 8, "model.remat": "full"})
    fixed = Fixed(prepare(copied, Sizes(vocab_size=64), eight()), eight())
    found, _ = searched(fixed.bytes, int(0.7 * fixed.bytes(copied)), copied)
    assert found.found.change == "--mesh data=4,fsdp=2"


def test_a_change_of_the_mesh_is_a_whole_mesh(small, replaced):
    """--mesh names all axes that divide, or the product would not be the slice."""
    before = replaced(small, {"mesh": MeshConfig(fsdp=2, tensor=2, context=2)})
    after = replaced(before, {"mesh": MeshConfig(fsdp=4, tensor=1, context=2)})
    assert describe(before, after) == "--mesh fsdp=4,context=2"


def test_what_cannot_fit_is_estimated_and_not_compiled(searched, small):
    found, compiled = searched(lambda config: 1 << 40, 1 << 10, small)
    assert found.found is None
    assert not compiled
    assert found.tries
    assert not found.compiled
    assert all(t.plan is None and t.least > 1 << 10 for t in found.tries)


def test_what_was_compiled_tells_of_what_takes_more(searched, small):
    """A quarter of the rows is needed: neither a weaker rematerialisation nor half the rows is compiled any more."""
    small = replace(small, batch=64, model=replace(small.model, remat="dots"))
    found, compiled = searched(lambda config: 16 * MIB * rows(config), 72 * MIB, small)
    assert found.found.change == "--accumulate 4"
    assert [(c.model.remat, rows(c)) for c in compiled] == [("full", 16), ("dots", 4)]
    assert "--accumulate 2" in {t.change for t in found.tries if t.plan is None}


def test_a_search_ends_at_its_limits(searched, small):
    small = replace(small, batch=4096)
    found, compiled = searched(lambda config: GIB + 1, GIB, small, most=2)
    assert (found.found, len(compiled)) == (None, 2)
    assert found.left > 0
    found, compiled = searched(lambda config: 100 * GIB, GIB, small, minutes=0.0)
    assert (found.found, len(compiled)) == (None, 0)
    assert found.left > 0


def test_a_candidate_that_the_compiler_refuses_is_passed_over(searched, small):
    def needed(config):
        if config.model.remat == "dots":
            raise jax.errors.JaxRuntimeError("INTERNAL: no such layout\nand more")
        return 100 * MIB if config.model.remat == "none" else 10 * MIB

    found, _ = searched(needed, 64 * MIB, small)
    assert found.found.change == "--model.remat full"
    assert found.compiled[0].refused == "INTERNAL: no such layout"


DESCRIBE = """
from jax.experimental import topologies
from train.plan.chips import CHIPS, TOPOLOGIES, described, device_count, without_tpus

without_tpus()
for name in TOPOLOGIES:
    assert len(described(name).devices) == device_count(name), name
try:
    topologies.get_topology_desc(platform="tpu", topology_name="v9:2x2")
except Exception as error:
    print("refused:", error)
"""


def test_the_compiler_describes_every_topology():
    """With as many devices as `device_count` says, which a mesh is checked against before anything is described."""
    pytest.importorskip("libtpu")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "refused:" in done.stdout


PLAN = """
--config llm-100m --topology v5e:2x2 --mesh fsdp=2,tensor=2 --model.num-layers 2 --model.dim 256 --model.num-heads 2
--model.mlp-dim 512 --data.context 512 --batch 8 --sizes.vocab-size 1024 --json
"""


def test_a_real_plan(tmp_path):
    """The TPU compiler's own verdict on a small step for four chips; in a process of its own, which holds the compiler."""
    pytest.importorskip("libtpu")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    line = [sys.executable, "-m", "attnzoo.cli", "plan", *PLAN.split(), "--out", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made == json.loads((tmp_path / "plan.json").read_text())
    assert (tmp_path / "plan.png").stat().st_size > 1000
    plan, memory = made["plan"], made["plan"]["memory"]
    assert plan["fits"]
    kinds = ("parameters", "optimizer", "gradients", "activations", "workspace", "other")
    assert sum(memory[kind] for kind in kinds) == plan["needed"] <= plan["usable"] == 15.75 * 2**30
    assert memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporaries"] <= plan["needed"]
    # Everything but the norms is divided by four.
    assert memory["parameters"] == pytest.approx(plan["parameters"] * 4 / 4, rel=0.02)
    assert memory["arguments"] >= memory["parameters"] + memory["optimizer"]
    assert {"attnzoo_flash_forward", "attnzoo_flash_backward"} <= plan["kernels"].keys()
    assert plan["attention"] == ["pallas (the first of cudnn, pallas, blockwise, dense that can run this)"]
    assert plan["loops_of_unknown_length"] == 0
    flops = plan["flops"]
    assert flops["model"] < flops["traced"] <= flops["compiled"] * 1.01
    gathered = sum(c["bytes"] for c in plan["collectives"] if c["kind"] == "all-gather" and c["group"] == 2)
    assert gathered > 0
    assert plan["roofline"]["seconds"] > 0
