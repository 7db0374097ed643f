"""Bytes, tokenizer.json and SentencePiece: one protocol."""

import sys

import numpy as np
import pytest

from train.data.tokenizer import load_tokenizer


@pytest.fixture(params=["bytes", "bpe_file", "sentencepiece_file"])
def tokenizer(request):
    return load_tokenizer("bytes" if request.param == "bytes" else str(request.getfixturevalue(request.param)))


def test_text_comes_back(tokenizer, sentences):
    texts = [*sentences[:3], "naïve ⟶ bytes, 数"]
    encoded = tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    for ids in encoded:
        assert len(ids) > 8  # the truncation stored in the file is not applied
        assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
        assert tokenizer.end not in ids


def test_an_end_has_no_text(tokenizer):
    (ids,) = tokenizer.encode(["one two"])
    assert tokenizer.decode(np.append(ids, tokenizer.end)) == "one two"


def test_where_the_end_comes_from(bpe_file, sentencepiece_file):
    bpe, pieces = load_tokenizer(str(bpe_file)), load_tokenizer(str(sentencepiece_file))
    assert (bpe.end, bpe.vocab_size) == (0, 400)  # its <|endoftext|>
    assert (pieces.end, pieces.vocab_size) == (400, 401)  # one id more than the file has


def test_bytes_that_are_no_text():
    assert load_tokenizer("bytes").decode(np.array([0xFF])) == "\N{REPLACEMENT CHARACTER}"


def test_fingerprints_tell_files_apart(bpe_file, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe_file.read_bytes())
    assert load_tokenizer(str(copy)).fingerprint == load_tokenizer(str(bpe_file)).fingerprint
    copy.write_bytes(bpe_file.read_bytes() + b"\n")
    assert load_tokenizer(str(copy)).fingerprint != load_tokenizer(str(bpe_file)).fingerprint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.json", None, "there is no file"),
        ("a.json", b"", "is empty"),
        ("a.json", b'{"vocab": 3}', "is not a tokenizer.json"),
        ("a.model", b"", "is empty"),
        ("a.model", b"something else", "is not a SentencePiece model"),
        ("vocab.txt", b"a\nb\n", "known are .json"),
    ],
)
def test_a_file_that_is_no_tokenizer(name, content, words, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--data.tokenizer: .*{words}") as error:
        load_tokenizer(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("fixture", "module"), [("bpe_file", "tokenizers"), ("sentencepiece_file", "sentencepiece")])
def test_a_missing_package_names_the_extra(fixture, module, request, monkeypatch):
    path = request.getfixturevalue(fixture)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs the module '{module}'.*pip install 'attnzoo\[data\]'"):
        load_tokenizer(str(path))
