"""How fast texts become batches, against how fast the default model consumes them.

    attnzoo bench data

For every kind of source and every tokenizer: tokens per second of the preparation (read, check, encode, write, once
per corpus) and of serving (shuffled batches of windows, and of packed documents, as `attnzoo train` takes them).
`ratio` compares the slower way through both, as if the corpus were used for one epoch only, with the training step
of the default model. Writes results/data.json.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks._measure import arguments, environment, parsed, save
from benchmarks.train_step import attnzoo_loop
from train.config import Config, DataConfig
from train.data.builders import topics
from train.data.store import open_dataset
from train.data.tokenizer import BYTES
from train.tasks import make_task
from train.tasks.text import Text

TARGET = 10.0
VOCABULARY = 4096


def documents(megabytes: float) -> list[str]:
    """The topics of Python's help over and over, numbered so that no two are the same."""
    texts = [text for _, text in topics().values()]
    made: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        text = f"{len(made)}\n{texts[len(made) % len(texts)]}"
        made.append(text)
        size += len(text.encode())
    return made


def write_sources(texts: Sequence[str], folder: Path) -> dict[str, DataConfig]:
    """The texts as files of every kind, and the data set that comes along."""
    import pyarrow
    import pyarrow.parquet
    from array_record.python.array_record_module import ArrayRecordWriter

    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:06d}.txt").write_text(text, encoding="utf-8")
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), folder / "texts.parquet")
    writer = ArrayRecordWriter(str(folder / "texts.array_record"), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()
    files = {"text": "text", "jsonl": "texts.jsonl", "parquet": "texts.parquet", "array_record": "texts.array_record"}
    return {kind: DataConfig(path=str(folder / name)) for kind, name in files.items()} | {"tfds": DataConfig()}


def write_tokenizers(texts: Sequence[str], folder: Path) -> dict[str, str]:
    """Two tokenizers made from the texts; name -> what --data.tokenizer takes."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], **options))
    bpe.save(str(folder / "tokenizer.json"))
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "pieces"), vocab_size=VOCABULARY, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return {
        "bytes": BYTES,
        f"BPE, {VOCABULARY}": str(folder / "tokenizer.json"),
        f"SentencePiece, {VOCABULARY}": str(folder / "pieces.model"),
    }


def serving(config: Config, batches: int) -> float:
    """Tokens per second of the training batches; the first ones, which start threads, are not timed."""
    task = make_task(config)
    data = iter(task.batches())
    for _ in range(20):
        next(data)
    return tokens_per_second(batches * task.units_per_step, lambda: [next(data) for _ in range(batches)])


def preparing(config: Config) -> float:
    """Tokens per second from the source to the prepared folder, which must not be there yet."""
    task = make_task(config)
    assert isinstance(task, Text)
    began = time.perf_counter()
    corpus = task.dataset
    seconds = time.perf_counter() - began
    return (len(corpus.train.stream) + len(corpus.validation.stream)) / seconds


def tokens_per_second(tokens: int, call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return tokens / (time.perf_counter() - began)


def measure(source: DataConfig, tokenizer: str, rounds: int, batches: int) -> dict[str, float]:
    """Medians over rounds, each with a folder of its own for the prepared tokens."""
    values: dict[str, list[float]] = {"prepare": [], "windows": [], "packed": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            if source.path is None:
                open_dataset(source.name, Path(folder))  # TFDS makes its own files first
            data = replace(source, tokenizer=tokenizer, dir=folder)
            values["prepare"].append(preparing(Config(data=data)))
            values["windows"].append(serving(Config(data=data), batches))
            values["packed"].append(serving(Config(data=replace(data, pack=True)), batches))
    return {name: statistics.median(found) for name, found in values.items()}


def model_speed(rounds: int, steps: int) -> float:
    """Tokens per second of the default model's training step, the median of some rounds."""
    task = make_task(Config())
    run, data = attnzoo_loop(Config()), iter(task.batches())
    run([next(data) for _ in range(2)])
    speeds = []
    for _ in range(rounds):
        batches = [next(data) for _ in range(steps)]
        speeds.append(tokens_per_second(steps * task.units_per_step, lambda batches=batches: run(batches)))
    return statistics.median(speeds)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write; returns the exit code."""
    parser = arguments("data", __doc__)
    parser.add_argument("--megabytes", type=float, default=2.0, help="text in each file source (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each, of which the median counts (default 3)")
    parser.add_argument("--batches", type=int, default=500, help="batches per measurement of serving (default 500)")
    options = parsed(parser, argv)
    before = environment()
    speed = model_speed(options.rounds, 20)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        texts = documents(options.megabytes)
        tokenizers = write_tokenizers(texts[: len(topics())], Path(folder))
        for kind, source in write_sources(texts, Path(folder)).items():
            for name, tokenizer in tokenizers.items():
                found = measure(source, tokenizer, options.rounds, options.batches)
                through = 1 / (1 / found["prepare"] + 1 / min(found["windows"], found["packed"]))
                speeds = {f"{part}_tokens_per_second": round(value) for part, value in found.items()}
                rows.append({"source": kind, "tokenizer": name, **speeds, "ratio": round(through / speed, 1)})
    lowest = min(row["ratio"] for row in rows)
    shown = Table(title=f"thousand tokens per second; the default model trains on {speed / 1000:.1f}")
    for column in ("source", "tokenizer", "prepare", "windows", "packed", "ratio"):
        shown.add_column(column, justify="left" if column in ("source", "tokenizer") else "right")
    for row in rows:
        speeds = [f"{row[f'{part}_tokens_per_second'] / 1000:,.0f}" for part in ("prepare", "windows", "packed")]
        shown.add_row(row["source"], row["tokenizer"], *speeds, f"{row['ratio']:.0f}x")
    Console().print(shown)
    print(f"lowest ratio {lowest:.1f} (target {TARGET:.0f})")
    measured = {
        "model_tokens_per_second": round(speed),
        "lowest_ratio": lowest,
        "target": TARGET,
        "rows": rows,
        "megabytes": options.megabytes,
        "rounds": options.rounds,
        "batches": options.batches,
    }
    save("data", options, before, measured)
    return 0
