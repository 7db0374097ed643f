"""What a run leaves behind and prints, and what can be made of it."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event

from train.generate import GenerateConfig, generate
from train.loop import train
from train.metrics import Metrics, plot_run, read_metrics


def events(folder) -> list[tuple[int, str, float]]:
    """(step, name, value) of every scalar in TensorBoard's files."""
    found = []
    for file in sorted(folder.glob("events*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return found


def test_a_run_leaves_everything(finished):
    assert {p.name for p in finished.iterdir()} == {
        "checkpoints", "config.json", "loss.png", "metrics.jsonl", "result.json", "tensorboard",
    }  # fmt: skip
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "validation/bits_per_byte" in line] == [10]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((finished / "result.json").read_text())
    assert result["score"]["bits_per_byte"] == lines[-1]["validation/bits_per_byte"]
    assert set(result["baselines"]) == {"unigram", "bigram"}
    written = events(finished / "tensorboard")
    shown = {step: value for step, name, value in written if name == "train/loss"}
    assert shown == pytest.approx({line["step"]: line["train/loss"] for line in lines if "train/loss" in line})


def test_metrics_reopened_are_cut(tmp_path):
    metrics = Metrics(tmp_path, keep=0)
    for step in range(1, 5):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    metrics = Metrics(tmp_path, keep=2)
    metrics.write(3, {"loss": 30.0})
    metrics.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": s, "loss": v} for s, v in ((1, 1.0), (2, 2.0), (3, 30.0))]


@pytest.mark.parametrize("scale", [1.44, None])
def test_plot(scale, tmp_path):
    lines = [{"step": s, "train/loss": 5 / s} for s in range(1, 30)] + [{"step": 29, "validation/q": 0.5}]
    plot_run(tmp_path / "p.png", lines, metric="q", quality="quality", scale=scale, baselines={"a": 1.0}, title="t")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_digits_from_the_command_line(attnzoo, tmp_path):
    words = "--task digits --model.dim 16 --model.num-layers 1 --steps 150 --optimizer.learning-rate 1e-2"
    code, out, err = attnzoo("train", *words.split(), "--out", str(tmp_path / "run"))
    assert code == 0, err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["baselines"]["majority class"] < 0.15
    assert result["baselines"]["logistic regression"] > 0.9
    assert result["score"]["accuracy"] > 0.7
    assert "majority class" in out
    assert "says" in out


def test_learning_beats_the_unigram_baseline(tiny, replaced, tmp_path):
    config = replaced(tiny, {"steps": 150, "optimizer.learning_rate": 2e-2, "log_every": 50})
    result = train(config, tmp_path / "run")
    assert result.score["bits_per_byte"] < result.baselines["unigram"]
    assert result.step_seconds > 0


def test_generate_is_determined_by_its_seed(finished):
    def text(**options) -> str:
        return generate(GenerateConfig(str(finished), "The", max_new=12, **options))

    assert text(seed=1) == text(seed=1)
    assert text(temperature=0.0) == text(temperature=0.0, seed=3)
    assert text(top_k=1, temperature=2.0) == text(temperature=0.0)


def test_generate_from_the_command_line(finished, attnzoo):
    where = str(finished / "checkpoints" / "8")
    code, out, err = attnzoo("generate", "--checkpoint", where, "--prompt", "The", "--max-new", "5")
    assert code == 0, err
    assert out.startswith("The")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--checkpoint", "nowhere", "--prompt", "a"], "there is no run in nowhere"),
        (["--checkpoint", "{run}/checkpoints/9", "--prompt", "a"], "no finished checkpoint of step 9"),
        (["--checkpoint", "{run}", "--prompt", ""], "--prompt: is empty"),
        (["--checkpoint", "{run}", "--prompt", "a", "--temperature", "-1"], "temperature"),
        (["--checkpoint", "{run}", "--prompt", "a", "--top-p", "2"], "top_p"),
        (["--checkpoint", "{run}", "--prompt", "a", "--max-new", "0"], "max_new"),
    ],
)
def test_bad_generate(words, expected, finished, attnzoo):
    code, _, err = attnzoo("generate", *(word.format(run=finished) for word in words))
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
