"""From text to numbers and back: bytes, or a tokenizer's file."""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

BYTES = "bytes"

# What the end of a document is called, by tokenizers that have a token for it; the first that is there counts.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end|>", "<|im_end|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What the text task asks of a tokenizer.

    vocab_size: ids are 0 ... vocab_size - 1. end: the id after every document.
    name: "bytes" or the path of its file. fingerprint: "bytes" or the sha256 of its file.
    """

    name: str
    vocab_size: int
    end: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, "n"]]:
        """The ids of each text, without beginnings or ends."""

    def decode(self, tokens: Int[np.ndarray, "n"]) -> str:
        """The text of ids; ends of documents have none."""


class Bytes:
    """The UTF-8 bytes of a text: 256 of them, nothing to learn. A zero byte ends a document."""

    name = BYTES
    vocab_size = 256
    end = 0
    fingerprint = BYTES

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, "n"]]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Int[np.ndarray, "n"]) -> str:
        """Bytes that are no UTF-8 become the replacement character."""
        return _without(tokens, self.end).astype(np.uint8).tobytes().decode(errors="replace")


class HuggingFace:
    """A `tokenizer.json` of Hugging Face's tokenizers. Special tokens are neither added nor decoded."""

    def __init__(self, path: Path, content: bytes):
        library = optional("tokenizers", f"--data.tokenizer {path}")
        try:
            self._tokenizer = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception
            raise _unreadable(path, "a tokenizer.json of Hugging Face's tokenizers", error) from error
        self._tokenizer.no_truncation()  # both may be stored in the file
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[name] for name in _ENDS if name in vocabulary]
        self._known = max(vocabulary.values(), default=-1) + 1
        self.name, self.fingerprint = str(path), hashlib.sha256(content).hexdigest()
        self.end = ends[0] if ends else self._known
        self.vocab_size = max(self._known, self.end + 1)

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, "n"]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, np.int64) for one in found]

    def decode(self, tokens: Int[np.ndarray, "n"]) -> str:
        return self._tokenizer.decode(_without(tokens, self.end).tolist(), skip_special_tokens=True)


class SentencePiece:
    """A `.model` of SentencePiece."""

    def __init__(self, path: Path, content: bytes):
        library = optional("sentencepiece", f"--data.tokenizer {path}")
        try:
            self._processor = library.SentencePieceProcessor(model_proto=content)
        except Exception as error:
            raise _unreadable(path, "a SentencePiece model", error) from error
        known = self._processor.get_piece_size()
        self.name, self.fingerprint = str(path), hashlib.sha256(content).hexdigest()
        self.end = self._processor.eos_id() if self._processor.eos_id() >= 0 else known
        self.vocab_size = max(known, self.end + 1)

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, "n"]]:
        return [np.asarray(ids, np.int64) for ids in self._processor.encode(list(texts), out_type=int)]

    def decode(self, tokens: Int[np.ndarray, "n"]) -> str:
        return self._processor.decode(_without(tokens, self.end).tolist())


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `--data.tokenizer` names: "bytes", a tokenizer.json, or a SentencePiece .model.

    A tokenizer without a token for the end of a document gets one more id for it, after its last.
    Raises ValueError for a file that is missing, empty or something else, ModuleNotFoundError when the package
    that reads it is not installed.
    """
    if spec == BYTES:
        return Bytes()
    path = Path(spec).expanduser()
    kinds: dict[str, Callable[[Path, bytes], Tokenizer]] = {".json": HuggingFace, ".model": SentencePiece}
    if not path.is_file():
        raise ValueError(
            f"--data.tokenizer: there is no file {spec!r}; give 'bytes', the path of a tokenizer.json (Hugging Face's "
            "tokenizers) or of a .model (SentencePiece)"
        )
    if path.suffix not in kinds:
        raise ValueError(
            f"--data.tokenizer: {path} ends in {path.suffix!r}; known are .json (Hugging Face's tokenizers) and .model "
            "(SentencePiece)"
        )
    content = path.read_bytes()
    if not content:
        raise ValueError(f"--data.tokenizer: {path} is empty")
    return kinds[path.suffix](path, content)


def optional(module: str, wanted_by: str) -> Any:
    """A module of the extra `data`. Raises ModuleNotFoundError, which names the extra, when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{wanted_by} needs the module {module!r}, which is not installed: pip install 'attnzoo[data]'"
        ) from error


def _without(tokens: Int[np.ndarray, "n"], end: int) -> Int[np.ndarray, "n"]:
    tokens = np.asarray(tokens)
    return tokens[tokens != end]


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    return ValueError(f"--data.tokenizer: {path} is not {kind} ({line})")
