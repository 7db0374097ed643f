"""Text: predict the next token."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnzoo import catalog
from attnzoo.core.masks import Segments
from attnzoo.models.lm import DecoderLM, LMConfig
from train.baselines import bigram_bits, unigram_bits
from train.config import Config
from train.data.corpus import Corpus, open_corpus
from train.data.records import Tally
from train.data.rows import Cover, Packed, Windows
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.tasks.base import Batch, Task

COUNTED = 1 << 24
"""Training tokens that the baselines count at most, from the first on."""


class Text(Task):
    """A decoder language model over the tokens of a text.

    Whatever the tokenizer, the score is bits per byte: the bits that all tokens of the validation texts take, over
    their UTF-8 bytes (and one byte for the end of each).
    """

    name = "text"
    unit = "tokens"
    metric = "bits_per_byte"
    quality = "bits per byte"
    sequence = frozenset({"tokens", "targets", "segments", "positions", "where"})

    def __init__(self, config: Config):
        super().__init__(config)
        mixer: Any = catalog.mixer(config.mixer)
        if config.data.pack and not mixer.packs:
            raise ValueError(
                f"--data.pack: the mixer {config.mixer!r} mixes tokens by more than attention under a mask, so documents "
                "in one row would see each other; leave --data.pack out, or take another mixer"
            )
        self.tokenizer: Tokenizer = load_tokenizer(config.data.tokenizer)
        self.vocab_size = self.tokenizer.vocab_size

    @staticmethod
    def defaults() -> Config:
        return Config()

    @functools.cached_property
    def dataset(self) -> Corpus:
        corpus = open_corpus(self.config.data, self.tokenizer)
        size = len(corpus.train.stream) - 1
        if size <= self.context:
            raise ValueError(
                f"--data.context: {self.context} tokens and the one that follows do not fit into the training split of "
                f"data {corpus.name!r} with {size}"
            )
        return corpus

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.tokenizer.fingerprint

    @property
    def tally(self) -> Tally:
        return self.dataset.tally

    @property
    def loss_scale(self) -> float:
        return 1 / math.log(2) / self.dataset.validation.bytes_per_token

    @property
    def context(self) -> int:
        return self.config.data.context

    @property
    def units_per_step(self) -> int:
        return self.config.batch * self.context

    def examples(self) -> Windows | Packed:
        train = self.dataset.train
        return Packed(train, self.context) if self.config.data.pack else Windows(train.stream[1:], self.context)

    def validation(self) -> Batch:
        rows = (Packed if self.config.data.pack else Cover)(self.dataset.validation, self.context)
        return rows.rows(np.arange(len(rows)))

    def make_model(self, rngs: nnx.Rngs) -> DecoderLM:
        config = LMConfig(vocab_size=self.vocab_size, max_length=self.context, **self.layer_options())
        return DecoderLM(config, rngs=rngs)

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
        losses = _cross_entropy(model, batch)
        if "where" not in batch:
            return losses.mean()
        return (losses * batch["where"]).sum() / jnp.maximum(batch["where"].sum(), 1)

    def loss_weight(self, batch: dict[str, jax.Array]) -> jax.Array:
        return batch["where"].astype(jnp.float32).sum() if "where" in batch else super().loss_weight(batch)

    def evaluate(self, model: nnx.Module, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        losses = _cross_entropy(model, batch)
        weight = batch["weight"][:, None] * batch["where"]
        return {"nats": (losses * weight).sum(), "tokens": weight.sum()}

    def score(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["nats"] / sums["tokens"]
        return {"loss": loss, "bits_per_byte": loss * self.loss_scale}

    def baselines(self) -> dict[str, float]:
        validation, size = self.dataset.validation, self.tokenizer.vocab_size
        train = self.dataset.train.stream[1 : 1 + COUNTED]
        inputs, targets = validation.stream[:-1], validation.stream[1:]
        bits = {
            "unigram": unigram_bits(train, targets, size),
            "bigram": bigram_bits(train, inputs, targets, size),
        }
        return {name: value / validation.bytes_per_token for name, value in bits.items()}

    def closing(self, model: nnx.Module) -> tuple[str, str]:
        from train.generate import continue_text

        prompt = self.tokenizer.decode(self.dataset.validation.stream[1:49])
        options: dict[str, Any] = {"max_new": self.config.eval.sample, "temperature": 0.7, "seed": self.config.seed}
        text = continue_text(model, self.tokenizer, prompt, after_end=self.config.data.pack, **options)
        return "sample (temperature 0.7; the prompt is from validation)", f"{prompt}⟶{text}"


def _cross_entropy(model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
    """Nats per token [B, T]; in packed rows every document is by itself."""
    options: dict[str, Any] = {}
    if "segments" in batch:
        options = {"mask": Segments(batch["segments"]), "positions": batch["positions"]}
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"], **options), batch["targets"])  # type: ignore[operator]
