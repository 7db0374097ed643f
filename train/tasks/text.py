"""Bytes of text: predict the next one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnzoo.models.lm import DecoderLM, LMConfig
from train.baselines import bigram_bits, unigram_bits
from train.config import Config
from train.data import tokenizer
from train.data.store import Dataset
from train.tasks.base import Batch, Task


class Windows:
    """Every stretch of `length` tokens and the tokens that follow each, `stride` apart, with random access."""

    def __init__(self, tokens: np.ndarray, length: int, stride: int):
        self.tokens, self.length, self.stride = tokens, length, stride

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - self.length - 1) // self.stride + 1)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(index) * self.stride
        window = self.tokens[start : start + self.length + 1].astype(np.int32)
        return {"tokens": window[:-1], "targets": window[1:]}


class Text(Task):
    """A decoder language model over bytes."""

    name = "text"
    unit = "tokens"
    metric = "bits_per_byte"
    quality = "bits per byte"
    loss_scale = 1 / math.log(2)
    sequence = frozenset({"tokens", "targets"})

    def __init__(self, config: Config):
        super().__init__(config)
        self.vocab_size = tokenizer.VOCAB_SIZE
        self.train_tokens, self.validation_tokens = _split_tokens(self.dataset)
        shortest = min(len(self.train_tokens), len(self.validation_tokens))
        if shortest <= config.data.context:
            raise ValueError(
                f"--data.context: {config.data.context} tokens and the one that follows do not fit into a split of "
                f"data set {config.data.name!r} with {shortest}"
            )

    @staticmethod
    def defaults() -> Config:
        return Config()

    @property
    def context(self) -> int:
        return self.config.data.context

    @property
    def units_per_step(self) -> int:
        return self.config.batch * self.context

    def examples(self) -> Windows:
        return Windows(self.train_tokens, self.context, stride=1)

    def validation(self) -> Batch:
        windows = Windows(self.validation_tokens, self.context, stride=self.context)
        rows = [windows[i] for i in range(len(windows))]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def make_model(self, rngs: nnx.Rngs) -> DecoderLM:
        config = LMConfig(vocab_size=self.vocab_size, max_length=self.context, **self.layer_options())
        return DecoderLM(config, rngs=rngs)

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
        return _cross_entropy(model, batch).mean()

    def evaluate(self, model: nnx.Module, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        losses = _cross_entropy(model, batch)
        weight = jnp.broadcast_to(batch["weight"][:, None], losses.shape)
        return {"nats": (losses * weight).sum(), "tokens": weight.sum()}

    def score(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["nats"] / sums["tokens"]
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def baselines(self) -> dict[str, float]:
        pairs = self.validation()
        inputs, targets = pairs["tokens"].ravel(), pairs["targets"].ravel()
        return {
            "unigram": unigram_bits(self.train_tokens, targets),
            "bigram": bigram_bits(self.train_tokens, inputs, targets),
        }

    def closing(self, model: nnx.Module) -> tuple[str, str]:
        from train.generate import continue_text

        prompt = tokenizer.decode(self.validation_tokens[:48])
        text = continue_text(model, prompt, max_new=self.config.eval.sample, temperature=0.7, seed=self.config.seed)
        return "sample (temperature 0.7; the prompt is from validation)", f"{prompt}⟶{text}"


def _cross_entropy(model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
    """Nats per token [B, T]."""
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["tokens"]), batch["targets"])  # type: ignore[operator]


def _split_tokens(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Both splits as one row of bytes each: documents in a fixed order, a zero byte after each."""
    key = _text_feature(dataset)
    order = "title" if "title" in dataset.features else key

    def joined(records) -> np.ndarray:
        documents = sorted((record[order], record[key]) for record in records)
        return tokenizer.encode(b"".join(text + tokenizer.END for _, text in documents))

    return joined(dataset.train), joined(dataset.validation)


def _text_feature(dataset: Dataset) -> str:
    import tensorflow_datasets as tfds

    texts = [name for name, feature in dataset.features.items() if isinstance(feature, tfds.features.Text)]
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise ValueError(
            f"data set {dataset.name!r}: the text task needs a feature 'text' or a single text feature; "
            f"it has {', '.join(dataset.features)}"
        )
    return texts[0]
