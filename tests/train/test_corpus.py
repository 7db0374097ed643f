"""Files of the user's own: read, counted, split, encoded, and refused where they cannot be."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from train.config import DataConfig
from train.data import corpus as corpora
from train.data.corpus import held_out, open_corpus
from train.data.tokenizer import Bytes, load_tokenizer

TEXTS = [f"document {i} " * (3 + i % 5) + "ends — " + "xyz"[i % 3] for i in range(40)]


def write(folder: Path, kind: str, texts=TEXTS, field="text") -> Path:
    """The texts as a file of this kind."""
    path = folder / f"texts.{kind}"
    records = [{field: text, "number": i} for i, text in enumerate(texts)]
    if kind == "jsonl":
        path.write_text(
            "".join(json.dumps(r, ensure_ascii=bool(i % 2)) + "\n" for i, r in enumerate(records)), encoding="utf-8"
        )
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=10, compression="none", write_page_checksum=True)
    elif kind.endswith("array_record"):
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write((record[field] if kind == "plain.array_record" else json.dumps(record)).encode())
        writer.close()
    return path


def documents(split) -> list[str]:
    begins = [0, *split.ends[:-1]]
    return [Bytes().decode(split.stream[a + 1 : b]) for a, b in zip(begins, split.ends, strict=True)]


def opened(path, tokenizer=None, **options):
    return open_corpus(DataConfig(path=str(path), **options), tokenizer or Bytes())


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record", "plain.array_record"])
def test_every_kind_of_file_holds_the_same(kind, tmp_path):
    corpus = opened(write(tmp_path, kind))
    expected = list(held_out(TEXTS))
    for name in ("train", "validation"):
        split = getattr(corpus, name)
        assert documents(split) == [text for of, text in expected if of == name]
        assert split.text_bytes == sum(len(text.encode()) for of, text in expected if of == name)
        assert split.stream[0] == 0 and (split.stream[split.ends] == 0).all()
        assert split.bytes_per_token == 1
    assert (corpus.tally.records, corpus.tally.skipped) == (40, {})


def test_text_files_are_documents(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:02d}.txt").write_text(text + "\nand\n\nmore\n", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("not this")
    (tmp_path / "other.csv").write_text("nor this")
    everything = [text + "\nand\n\nmore\n" for text in TEXTS]
    folder, pattern = opened(tmp_path), opened(tmp_path / "*.txt")
    assert sorted(documents(folder.train) + documents(folder.validation)) == sorted(everything)
    assert documents(pattern.train) == documents(folder.train)
    assert pattern.fingerprint == folder.fingerprint


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("\N{BYTE ORDER MARK}one\ntwo\n".encode())
    (validation := tmp_path / "b.md").write_text("text")
    assert documents(opened(tmp_path / "a.txt", validation=str(validation)).train) == ["one\ntwo\n"]


@pytest.mark.parametrize("count", [1, 2, 5, 9, 40, 400])
def test_the_split_takes_a_tenth_at_most_and_never_nothing(count):
    texts = [f"{i}: " + "word\n" * (20 + 7 * i % 11) for i in range(count)]
    parts = {"train": [], "validation": []}
    for name, text in held_out(texts):
        parts[name].append(text)
    sizes = {name: sum(map(len, part)) for name, part in parts.items()}
    assert sum(sizes.values()) == sum(map(len, texts))
    assert 0 < sizes["validation"] <= sum(sizes.values()) / 10
    assert sizes["validation"] > sum(sizes.values()) / 25
    if count < 10:
        assert "".join(parts["train"] + parts["validation"]) == "".join(texts)  # the end of the last document
        assert parts["train"][-1].endswith("\n")


def test_the_split_keeps_validation_short(monkeypatch):
    monkeypatch.setattr(corpora, "VALIDATION_BYTES", 300)
    sizes = {"train": 0, "validation": 0}
    for name, text in held_out(["x" * 100] * 100):
        sizes[name] += len(text)
    assert sizes == {"train": 9700, "validation": 300}
    (_, head), (_, tail) = held_out(["line\n" * 1000])
    assert (len(head), len(tail)) == (4700, 300)


def test_files_to_validate_on(tmp_path):
    (tmp_path / "a.txt").write_text("train on this\n")
    (tmp_path / "b.txt").write_text("validate on this\n")
    corpus = opened(tmp_path / "a.txt", validation=str(tmp_path / "b.txt"))
    assert documents(corpus.train) == ["train on this\n"]
    assert documents(corpus.validation) == ["validate on this\n"]
    assert corpus.fingerprint != opened(tmp_path / "?.txt").fingerprint


def test_a_field_by_another_name(tmp_path):
    path = write(tmp_path, "jsonl", field="body")
    assert documents(opened(path).train) == documents(opened(path, field="body").train)
    for kind in ("jsonl", "parquet"):
        with pytest.raises(ValueError, match=r"--data.field: unknown field of .* 'boddy': did you mean 'body'"):
            opened(write(tmp_path, kind, field="body"), field="boddy")
        with pytest.raises(ValueError, match=r"'number' of .* does not hold text; its fields: body \(text\), number"):
            opened(write(tmp_path, kind, field="body"), field="number")


def test_bytes_are_counted_from_the_text(tmp_path, bpe_file, sentencepiece_file):
    path = write(tmp_path, "jsonl")
    in_bytes = opened(path)
    for file in (bpe_file, sentencepiece_file):
        corpus = opened(path, load_tokenizer(str(file)))
        for a, b in ((corpus.train, in_bytes.train), (corpus.validation, in_bytes.validation)):
            assert (a.text_bytes, len(a.ends)) == (b.text_bytes, len(b.ends))
            assert len(a.stream) < len(b.stream)
            assert a.bytes_per_token * (len(a.stream) - 1) == pytest.approx(len(b.stream) - 1)


def test_a_long_text_is_encoded_in_pieces(tmp_path, monkeypatch, bpe_file):
    text = "".join(f"line {i}\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    tokenizer = load_tokenizer(str(bpe_file))
    whole = opened(tmp_path, tokenizer).train.stream
    monkeypatch.setattr(corpora, "_PIECE", 100)
    monkeypatch.setattr(corpora, "FORMAT", -1)
    pieces = opened(tmp_path, tokenizer).train.stream
    np.testing.assert_array_equal(whole, pieces)


CORRUPT = {
    "jsonl": [b'{"text": "cut', b"[1, 2]", b'{"text": 3}', b'{"text": null}', b"{}", b'{"text": "\xff"}',
              b'{"text": "\\ud800"}', b'{"text": "\\u0000"}'],
    "txt": [b"\xff\xfe", b"zero \0 byte", b"caf\xe9"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "reasons"),
    [
        ("jsonl", {"invalid JSON": 2, "without text in the field": 3, "undecodable text": 3}),
        ("txt", {"undecodable text": 3}),
    ],
)
def test_corrupt_lines_are_skipped_and_counted(kind, reasons, tmp_path):
    good = TEXTS if kind == "txt" else [json.dumps({"text": text}) for text in TEXTS]
    lines = [line.encode() for line in good]
    for i, line in enumerate(CORRUPT[kind]):
        lines.insert(3 * i + 2, line)
    (tmp_path / f"a.{kind}").write_bytes(b"\n".join(lines) + b"\n")
    corpus = opened(tmp_path, max_corrupt=0.5)
    assert corpus.tally.skipped == reasons
    assert corpus.tally.records == len(TEXTS) + len(CORRUPT[kind])
    text = "".join(documents(corpus.train) + documents(corpus.validation))
    assert all(good in text for good in TEXTS)
    again = opened(tmp_path, max_corrupt=0.5)  # from what is prepared
    assert again.tally == corpus.tally
    with pytest.raises(ValueError, match=r"records skipped \(.*--data.max-corrupt allows a share of 0.01"):
        opened(tmp_path)


def test_a_damaged_row_group_is_skipped(tmp_path):
    path = write(tmp_path, "parquet")
    content = bytearray(path.read_bytes())
    at = content.index(b"document 15 ")
    content[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    corpus = opened(path, max_corrupt=0.5)
    assert corpus.tally.skipped == {"row of an unreadable row group": 10}
    assert len(documents(corpus.train) + documents(corpus.validation)) == 30


@pytest.mark.parametrize("kind", ["parquet", "array_record"])
def test_a_truncated_file_is_skipped(kind, tmp_path):
    path = write(tmp_path, kind)
    shard = tmp_path / f"shard.{kind}"
    shard.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    corpus = opened(tmp_path, max_corrupt=0.5)
    assert corpus.tally.skipped == {"unreadable file": 1}
    assert corpus.tally.records == 41
    with pytest.raises(ValueError, match="unreadable file"):  # one of 41 records, but one of two files
        opened(tmp_path, max_corrupt=0.4)
    with pytest.raises(ValueError, match=r"there is no usable record for train and validation; 1 of 1 records skipped"):
        opened(shard, max_corrupt=1.0)


def test_a_damaged_array_record_is_skipped(tmp_path, rng):
    path = write(tmp_path, "array_record", texts=[rng.bytes(600).hex() for _ in range(400)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 65536 * 65536  # the header of a block
    content[middle : middle + 8] = b"\xff" * 8
    path.write_bytes(content)
    corpus = opened(path, max_corrupt=0.5)
    assert set(corpus.tally.skipped) == {"damaged record"}
    assert 1 <= corpus.tally.skipped.total() < 40
    assert corpus.tally.records == 400


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "--data.path: there is no file"),
        ("a.txt", b"", "--data.path: .* is empty"),
        ("a.txt", b" \n\n", "there is no usable record"),
        ("a.txt", b"\xff\xff\n", "there is no usable record for train and validation; 1 of 1 records skipped"),
        ("a.jsonl", b"\n\n", "there is no usable record"),
        ("a.jsonl", b"not JSON\n", "there is no usable record.*1 invalid JSON"),
        ("a.csv", b"a,b\n", "is of no kind that can be read; known are .txt"),
    ],
)
def test_files_that_cannot_be_used(name, content, words, tmp_path):
    path = tmp_path / "own" / name
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        opened(path)
    assert "\n" not in str(error.value)


def test_a_text_file_has_no_fields(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 20)
    with pytest.raises(ValueError, match=r"--data.field: a text file has no fields, got 'body'"):
        opened(tmp_path, field="body")


def test_validation_files_need_a_path(data_dir):
    with pytest.raises(ValueError, match=r"--data.validation: goes with --data.path"):
        open_corpus(DataConfig(validation="a.txt"), Bytes())


def test_other_texts_have_another_fingerprint(tmp_path):
    path = write(tmp_path, "jsonl")
    before = opened(path).fingerprint
    path.write_bytes(path.read_bytes().replace(b"document 7", b"document 8"))
    after = opened(path)
    assert after.fingerprint != before
    assert not any("document 7" in text for text in documents(after.train))


def test_large_files_are_compared_in_places(tmp_path, monkeypatch):
    from train.data import sources

    monkeypatch.setattr(sources, "_WHOLE", 4096)
    monkeypatch.setattr(sources, "_BLOCK", 64)
    path = tmp_path / "a.txt"
    fingerprints = set()
    for ending in (b"a\n", b"b\n", b"ab\n"):
        path.write_bytes(b"line\n" * 4000 + ending)
        fingerprints.add(sources._content(path))
    assert len(fingerprints) == 3


def test_damaged_tokens_are_explained(tmp_path, monkeypatch):
    path = write(tmp_path, "jsonl")
    data = DataConfig(path=str(path), dir=str(tmp_path / "prepared"))
    open_corpus(data, Bytes())
    tokens = next((tmp_path / "prepared").rglob("train.tokens"))
    tokens.write_bytes(tokens.read_bytes()[:-3])
    with pytest.raises(ValueError, match="delete that folder and they are made again"):
        open_corpus(data, Bytes())


def test_nothing_is_left_of_a_corpus_that_failed(tmp_path):
    (tmp_path / "a.jsonl").write_text("not JSON\n")
    with pytest.raises(ValueError, match="no usable record"):
        opened(tmp_path / "a.jsonl", dir=str(tmp_path / "prepared"))
    assert not list((tmp_path / "prepared" / "tokens").iterdir())


def test_parquet_needs_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path, "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the module 'pyarrow.parquet'.*attnzoo\[data\]"):
        opened(path, dir=str(tmp_path / "prepared"))


def test_a_damaged_record_of_a_named_set_is_skipped(data_dir, tmp_path, monkeypatch):
    from train.data import sources

    opened_set = sources.open_dataset("python_topics", data_dir)

    class Damaged(list):
        def __getitem__(self, i):
            if i == 5:
                raise RuntimeError("damaged")
            return super().__getitem__(i)

    records = Damaged({"text": text.encode()} for text in TEXTS)

    class Set:
        name, features, fingerprint = "some_set", opened_set.features, "0" * 64
        train, validation = records, TEXTS and [{"text": b"validate on this"}]

    monkeypatch.setattr(sources, "open_dataset", lambda name, folder: Set)
    corpus = open_corpus(DataConfig(name="some_set", dir=str(tmp_path), max_corrupt=0.1), Bytes())
    assert corpus.tally.skipped == {"damaged record": 1}
    assert len(corpus.train.ends) == 39
