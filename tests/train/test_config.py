"""Configurations and the command lines that make them."""

import json

import pytest

from train.cli import parse_train
from train.config import Config, ModelConfig, differences, from_json, smoke
from train.mixer_args import parse_mixer_args, take_mixer_args


def test_json_is_a_round_trip(replaced):
    config = replaced(Config(), {"model.num_kv_heads": 1, "mixer_args": {"a": (1, 2), "b": True}, "seed": 7})
    assert from_json(json.loads(json.dumps(config.as_json()))) == config


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model", "dim"), "wide", "model.dim must be"),
        (("model", "depth"), 3, "model.depth is not a field of ModelConfig; its fields are dim, "),
        (("model", "num_layer"), 3, "model.num_layer is not a field of ModelConfig; did you mean model.num_layers"),
        (("optimiser",), {}, "optimiser is not a field of Config; did you mean optimizer"),
        (("model", "norm"), "none", "model.norm must be one of rms, layer, got 'none'"),
        (("optimizer", "name"), "adam", "optimizer.name must be one of adamw, lion, muon, sgd, got 'adam'"),
        (("steps",), True, "steps must be int"),
    ],
)
def test_a_damaged_description_is_refused(path, value, words):
    values = Config().as_json()
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=words):
        from_json(values)


def test_differences_name_both_values(replaced):
    asked = replaced(Config(), {"model.dim": 32, "log_every": 3, "mesh.data": 2, "loop": "pmap", "checkpoint.keep": 9})
    assert differences(Config(), asked) == [f"--model.dim 32 (the run has {ModelConfig().dim})"]
    assert differences(Config(), Config()) == []


@pytest.mark.parametrize("name", ["steps", "batch", "eval.every", "mesh.tensor"])
def test_counts_are_positive(name, replaced):
    with pytest.raises(ValueError, match=f"--{name}: must be at least 1, got 0"):
        replaced(Config(), {name: 0})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer.name": "adam"}, "unknown --optimizer.name 'adam': did you mean 'adamw'"),
        ({"optimizer.schedule": "cosin"}, "unknown --optimizer.schedule 'cosin': did you mean 'cosine'"),
        ({"loop": "pjit"}, "unknown --loop 'pjit'"),
        ({"optimizer.warmup": 1.5}, r"--optimizer.warmup: is a fraction of all steps, in \[0, 1\], got 1.5"),
        ({"optimizer.schedule": "wsd", "optimizer.cooldown": 0.95}, "--optimizer.cooldown: 0.95 and the warmup, 0.1, are more"),
        ({"ema": 1.0}, "--ema: is a decay between 0 and 1, e.g. 0.999, got 1.0"),
        ({"accumulate": 0}, "--accumulate: must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(values, words, replaced):
    with pytest.raises(ValueError, match=words):
        replaced(Config(), values)


def test_smoke_is_short():
    short = smoke(Config())
    assert short.steps == 20
    assert short.batch <= 8
    assert smoke(short) == short
    assert parse_train(["--smoke", "--steps", "3"]).config.steps == 3


def test_defaults_are_those_of_the_task():
    assert parse_train([]).config == Config()
    digits = parse_train(["--task=digits", "--seed", "4"]).config
    assert (digits.data.name, digits.seed) == ("scikit_digits", 4)


def test_mixer_arguments_are_taken_from_anywhere():
    line = ["--mixer.num-kv-heads", "1", "--steps", "3", "--mixer.use_bias=True"]
    assert take_mixer_args(line) == (["--steps", "3"], {"num_kv_heads": ["1"], "use_bias": ["True"]})
    config = parse_train(line).config
    assert config.mixer_args == {"num_kv_heads": 1, "use_bias": True}
    assert config.steps == 3


@pytest.mark.parametrize(
    ("taken", "words"),
    [
        ({"num_kv_head": ["1"]}, "did you mean 'num_kv_heads'"),
        ({"num_kv_heads": ["many"]}, r"--mixer.num_kv_heads many: mixer 'transformer' takes num_kv_heads: int"),
        ({"dropout_rate": []}, "--mixer.dropout_rate: needs a value"),
        ({"kernel_init": ["zeros"]}, "which only Python code can give"),
    ],
)
def test_bad_mixer_arguments(taken, words):
    with pytest.raises(ValueError, match=words):
        parse_mixer_args("transformer", taken)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--mixer transformr", "did you mean 'transformer'"),
        ("--task txt", "did you mean 'text'"),
        ("--mixer.headdim 3", "did you mean 'head_dim'"),
        ("--data.name no_such_set", "data set 'no_such_set'"),
        ("--data.context 100000000", "do not fit into the training split"),
        ("--mesh.data 3", "needs 3 devices, and there are 8"),
        ("--mesh.data 8 --batch 12", "--batch: 12 examples do not divide over data x fsdp = 8 devices"),
        (
            "--mesh.data 8 --batch 16 --accumulate 4",
            "16 examples do not divide over data x fsdp = 8 devices x --accumulate 4 = 32",
        ),
        ("--mesh.data 4 --mesh.tensor 2 --loop pmap", "--loop pmap: copies of the whole model"),
        ("--task digits --mesh.context 8", "--mesh.context: 8 devices would all hold and do the same"),
        ("--mesh.context 8 --data.context 12", "--data.context: 12 tokens do not divide over --mesh.context 8"),
        ("--model.num-heads 3", "3 heads do not divide dim=16"),
        ("--task digits --model.patch-size 3", "--model.patch-size: 3 does not divide the images"),
        ("--task digits --data.name python_topics", "needs features 'image' and 'label'"),
        ("--data.name scikit_digits", "has no field 'text' and 0 that hold text; its fields: image, label"),
        ("--resume nowhere", "there is no run in nowhere"),
        ("--resume nowhere --out there", "a resumed run stays in its folder"),
    ],
)
def test_what_a_user_can_get_wrong(words, expected, attnzoo, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = attnzoo("train", *line(words))
    assert code == 2
    assert expected in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("config.json"))  # nothing was started


def test_an_unknown_option_names_the_nearest(attnzoo):
    code, out, err = attnzoo("train", "--model.dims", "3")
    assert code == 2
    assert "--model.dim" in out + err


@pytest.mark.parametrize("command", ["train", "compare", "generate", "claim"])
def test_help_has_examples(command, attnzoo):
    code, out, _ = attnzoo(command, "--help")
    assert code == 0
    assert f"examples:\n  attnzoo {command}" in out


def test_help_lists_the_arguments_of_the_mixer(attnzoo):
    _, out, _ = attnzoo("train", "--mixer", "transformer", "--help")
    assert "--mixer.num_kv_heads int | None (default: None)" in out
