"""Runs on files and tokenizers of the user's own, from the command line."""

import json
import shutil

import numpy as np
import pytest

from train.data.tokenizer import load_tokenizer
from train.tasks import make_task


@pytest.fixture(scope="module")
def texts(tmp_path_factory, sentences):
    """A JSONL file with a corrupt line."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [json.dumps({"body": text, "n": i}) for i, text in enumerate(sentences)]
    path.write_text("\n".join([*lines[:7], "{corrupt", *lines[7:]]) + "\n")
    return path


@pytest.fixture(scope="module")
def run(texts, bpe_file, line, data_dir, tmp_path_factory):
    """The folder of a finished run, packed, with a BPE. Read only."""
    from attnzoo.cli import main

    folder = tmp_path_factory.mktemp("own") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(data_dir))
        patch.chdir(texts.parent)
        words = line(f"--steps 6 --checkpoint.every 3 --data.path {texts.name} --data.field body --data.pack")
        assert main(["train", *words, "--data.tokenizer", str(bpe_file), "--out", str(folder)]) == 0
    return folder


def test_what_was_skipped_is_reported(run, attnzoo, line, texts, tmp_path):
    result = json.loads((run / "result.json").read_text())
    assert result["skipped"] == {"invalid JSON": 1}
    assert result["records"] == 121
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["data/skipped_records"] for line in lines if "validation/bits_per_byte" in line] == [1]
    options = ["--data.path", str(texts), "--data.field", "body", "--steps", "1", "--out", str(tmp_path / "run")]
    code, out, _ = attnzoo("train", *line(), *options)
    assert code == 0
    assert "1 of 121 records skipped (1 invalid JSON)" in out


def test_the_vocabulary_is_the_tokenizers(run, bpe_file):
    from train.generate import load_model

    model, task = load_model(run)
    assert model.config.vocab_size == task.tokenizer.vocab_size == 400
    assert task.tokenizer.fingerprint == load_tokenizer(str(bpe_file)).fingerprint


def test_generating_decodes_with_the_runs_tokenizer(run, attnzoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the run's own paths were relative to another folder
    words = ("--checkpoint", str(run), "--prompt", "The ", "--max-new", "12", "--temperature", "0")
    code, out, err = attnzoo("generate", *words)
    assert code == 0, err
    assert out.startswith("The ") and len(out) > 12
    assert attnzoo("generate", *words)[1] == out


def test_generating_needs_no_data(run, texts, attnzoo):
    aside = texts.rename(texts.with_name("aside"))
    try:
        code, _, err = attnzoo("generate", "--checkpoint", str(run), "--prompt", "", "--max-new", "2")
    finally:
        aside.rename(texts)
    assert code == 0, err  # a packed model knows how a document begins: an empty prompt will do


def test_another_tokenizer_is_refused(run, attnzoo, sentencepiece_file, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copied")
    words = "the tokenizer is not the run's"
    for tokenizer in ("bytes", str(sentencepiece_file)):
        code, _, err = attnzoo("train", "--resume", str(copied), "--data.tokenizer", tokenizer)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1
        code, _, err = attnzoo("generate", "--checkpoint", str(run), "--prompt", "The", "--tokenizer", tokenizer)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_a_tokenizer_that_has_moved(run, attnzoo, bpe_file, tmp_path):
    moved = bpe_file.rename(tmp_path / "moved.json")
    try:
        code, _, err = attnzoo("generate", "--checkpoint", str(run), "--prompt", "The", "--max-new", "2")
        assert code == 2 and f"there is no file '{bpe_file}'" in err
        options = ("--prompt", "The", "--max-new", "2", "--tokenizer", str(moved))
        code, _, err = attnzoo("generate", "--checkpoint", str(run), *options)
        assert code == 0, err
    finally:
        moved.rename(bpe_file)


def test_resuming_with_the_data_elsewhere(run, attnzoo, texts, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copied")
    shutil.rmtree(copied / "checkpoints" / "6")
    elsewhere = shutil.copy(texts, tmp_path / "elsewhere.jsonl")
    code, _, err = attnzoo("train", "--resume", str(copied), "--data.path", str(elsewhere))
    assert code == 0, err
    kept = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, copied)]
    losses = [{line["step"]: line["train/loss"] for line in lines if "train/loss" in line} for lines in kept]
    assert losses[0] == losses[1]  # bit for bit


def test_resuming_with_other_data_is_refused(run, attnzoo, texts, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copied")
    other = tmp_path / "other.jsonl"
    other.write_text(texts.read_text().replace("the", "teh"))
    code, _, err = attnzoo("train", "--resume", str(copied), "--data.path", str(other))
    assert code == 2 and "the data is not what this run was trained on" in err


@pytest.mark.parametrize("pack", [False, True])
def test_processes_make_their_rows_of_a_step(pack, tiny, replaced):
    task = make_task(replaced(tiny, {"data.pack": pack}))
    rows = np.array([0, 1, 4, 5])
    whole, part = task.step_batches(), task.step_batches(rows)
    for step in (0, 1, 57, 10**6):
        for name, value in whole[step].items():
            np.testing.assert_array_equal(part[step][name], value[rows])


def test_a_batch_is_a_function_of_its_step(tiny, replaced):
    config = replaced(tiny, {"data.pack": True})
    in_order = iter(make_task(config).batches())
    for _ in range(7):
        last = next(in_order)
    for name, value in make_task(config).step_batches()[6].items():
        np.testing.assert_array_equal(value, last[name])


def test_a_position_holds_for_any_number_of_processes(tiny):
    task = make_task(tiny)
    rows = np.arange(4, 8)
    one, second = iter(task.batches()), iter(task.batches(rows))
    for _ in range(5):
        next(one), next(second)
    assert one.get_state() == second.get_state()
    resumed = iter(task.batches(rows))
    resumed.set_state(one.get_state())
    np.testing.assert_array_equal(next(resumed)["tokens"], next(one)["tokens"][4:])


def test_every_example_once_per_epoch(tiny, replaced):
    task = make_task(replaced(tiny, {"data.pack": True, "batch": 1}))
    count = len(task.examples())
    batches = task.step_batches()
    for epoch in (0, 1):
        rows = [batches[epoch * count + i]["tokens"].tobytes() for i in range(count)]
        assert sorted(rows) == sorted(row.tobytes() for row in task.examples().rows(np.arange(count))["tokens"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--data.path nowhere.txt", "there is no file"),
        ("--data.path . ", "there is no file '{here}'"),
        ("--data.tokenizer nowhere.json", "--data.tokenizer: there is no file"),
        ("--data.max-corrupt 2", "--data.max-corrupt: is a share, 0 to 1, got 2"),
        ("--data.pack --mixer cca", "--data.pack: the mixer 'cca'"),
        ("--task digits --model.patch-size 2 --data.path x.txt", "--data.path: the digits task reads named data sets"),
        ("--data.path {texts} --data.field bdy", "unknown field of {texts} 'bdy': did you mean 'body'?"),
        (
            "--data.path {texts} --data.field body --data.context 1000000",
            "do not fit into the training split of data '{texts}'",
        ),
        ("--data.path {texts} --data.field body --data.max-corrupt 0", "1 of 121 records skipped (1 invalid JSON)"),
    ],
)
def test_what_a_user_can_get_wrong(words, expected, attnzoo, line, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = attnzoo("train", *line(words.format(texts=texts)))
    assert code == 2
    assert expected.format(texts=texts, here=tmp_path) in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("config.json"))
