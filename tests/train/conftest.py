"""Small runs that the tests of training share."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig

TINY = (
    "--model.dim 16 --model.num-layers 1 --model.num-heads 2 --data.context 32 --batch 8 --eval.every 1000 "
    "--eval.sample 4 --log-every 2"
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Prepared data sets, so that no test writes to the user's cache."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(autouse=True)
def _cache(data_dir, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(data_dir))


@pytest.fixture
def tiny() -> Config:
    """A text run that compiles and trains in seconds; the same that the fixture `line` asks for."""
    return Config(
        data=DataConfig(context=32),
        model=ModelConfig(dim=16, num_layers=1, num_heads=2),
        eval=EvalConfig(every=1000, sample=4),
        checkpoint=CheckpointConfig(every=4),
        steps=10,
        batch=8,
        log_every=2,
    )


@pytest.fixture(scope="session")
def line():
    """The command line of a tiny run, as words, with further options."""
    return lambda text="": [*TINY.split(), *text.split()]


@pytest.fixture(scope="session")
def trained(data_dir, line, tmp_path_factory):
    """The folder of the finished tiny run with further options, trained once for each of them. Read only."""
    from train.cli import parse_train
    from train.loop import train

    @functools.cache
    def of(options: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(data_dir))
            train(parse_train(line(options)).config, folder)
        return folder

    return of


@pytest.fixture(scope="session")
def finished(trained) -> Path:
    """The folder of a finished text run with checkpoints of steps 8 and 10. Read only."""
    return trained("--steps 10 --checkpoint.every 4")


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture
def attnzoo(capsys):
    """Runs a command line in this process: (exit code, stdout, stderr)."""
    from attnzoo.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(list(words))
        except SystemExit as stop:  # tyro's own errors and --help
            code = stop.code if isinstance(stop.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def spawn(data_dir):
    """Starts a command line in a process of its own, the same device count as here."""
    started = []

    def start(*words: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "attnzoo.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(data_dir)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def replaced():
    """A configuration with fields changed by their dotted names, e.g. {"model.dim": 32}."""

    def change(config: Config, values: dict) -> Config:
        for name, value in values.items():
            part, _, field = name.rpartition(".")
            if part:
                value = dataclasses.replace(getattr(config, part), **{field: value})
            config = dataclasses.replace(config, **{part or field: value})
        return config

    return change


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Sentences of English that come with Python."""
    from train.data.builders import topics

    return [" ".join(p.split()) for _, text in list(topics().values())[:20] for p in text.split("\n\n") if len(p) > 100][:120]


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory, sentences) -> Path:
    """A tokenizer.json: byte-level BPE with an end of text, and with a truncation that must not be applied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.enable_truncation(8)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory, sentences) -> Path:
    """A SentencePiece .model without an end of text."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sentencepiece") / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(prefix), vocab_size=400, model_type="bpe", byte_fallback=True,
        eos_id=-1, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")
