"""The protocol of a task: data, model, loss, metrics and baselines. The loop knows nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from attnzoo.models.layers import LayerConfig
from train.config import Config
from train.data.records import Tally
from train.data.rows import Batch


class Data(Protocol):
    """What a run remembers of its data."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


class Examples(Protocol):
    """Training examples with random access."""

    def __len__(self) -> int: ...

    def rows(self, indices: Int[np.ndarray, "R"]) -> Batch:
        """The examples of these indices, stacked."""


class Task(ABC):
    """One thing to learn.

    name: as `--task` takes it. unit: what a step consumes, for the speed display.
    metric: key of the validation score that decides; quality: the same in words.
    higher_is_better: of that score.
    sequence: the arrays of a batch whose second axis is the sequence.
    weight: the array of a batch that is 1 for real examples and 0 for padding.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    metric: ClassVar[str]
    quality: ClassVar[str]
    higher_is_better: ClassVar[bool] = False
    sequence: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Config):
        self.config = config

    @property
    @abstractmethod
    def dataset(self) -> Data:
        """The data, opened when they are first asked for: a model can be made without them."""

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Tells the tokenizer of text from others, None where there is no text."""
        return None

    @property
    def tally(self) -> Tally:
        """How many records were read and skipped, where that is counted."""
        return Tally()

    @property
    def loss_scale(self) -> float | None:
        """Turns the training loss into the unit of the score, None where they are different things."""
        return None

    @staticmethod
    @abstractmethod
    def defaults() -> Config:
        """The configuration of `attnzoo train --task NAME`."""

    @property
    @abstractmethod
    def context(self) -> int | None:
        """Tokens per example, None where there is no sequence axis in a batch."""

    @property
    @abstractmethod
    def units_per_step(self) -> int:
        """How many of `unit` a step consumes."""

    @abstractmethod
    def examples(self) -> Examples:
        """The training examples, with random access."""

    @abstractmethod
    def validation(self) -> Batch:
        """All validation examples as one dict of arrays."""

    @abstractmethod
    def make_model(self, rngs: nnx.Rngs) -> nnx.Module: ...

    @abstractmethod
    def loss(self, model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
        """The mean loss that is trained on, a scalar."""

    def loss_weight(self, batch: dict[str, jax.Array]) -> jax.Array:
        """How much `loss` of this batch counts against that of another: what it is a mean over, examples or tokens.

        By default the batch's "weight" where it has one, else its number of examples.
        """
        given = batch.get("weight")
        return jnp.asarray(len(next(iter(batch.values()))), jnp.float32) if given is None else given.astype(jnp.float32).sum()

    @abstractmethod
    def evaluate(self, model: nnx.Module, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Sums over a validation batch, of which `score` makes metrics. Padding rows have weight 0."""

    @abstractmethod
    def score(self, sums: dict[str, float]) -> dict[str, float]:
        """Validation metrics from sums over all batches; has the key `metric`."""

    @abstractmethod
    def baselines(self) -> dict[str, float]:
        """Name -> what it scores, in the unit of `metric`; the hardest last."""

    @abstractmethod
    def closing(self, model: nnx.Module) -> tuple[str, str]:
        """(title, text) of something to look at: what the trained model does with an example."""

    def step_batches(self, rows: Int[np.ndarray, "R"] | None = None) -> grain.MapDataset:
        """Endless training batches by their number: `[i]` is what step i trains on, counted from 0.

        The batch is a function of the seed and i alone: a permutation of the examples per epoch, one after the other, cut into
        batches.
        rows: those of each batch to make, `Trainer.rows` of a process among several. By default all.
        """
        examples = self.examples()
        order = grain.MapDataset.range(len(examples)).seed(self.config.seed).shuffle().repeat().batch(self.config.batch)
        return order.map(lambda indices: examples.rows(indices if rows is None else indices[rows]))

    def batches(self, rows: Int[np.ndarray, "R"] | None = None, put: Callable[[Batch], Any] | None = None) -> grain.IterDataset:
        """`step_batches` in order, each made ahead by a thread; an iterator over it can be saved and restored.

        put: what the thread does with a batch, so that it comes as what this returns; `Trainer.put` brings it to the devices.
        """
        batches = self.step_batches(rows)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return (batches if put is None else batches.map(put)).to_iter_dataset(options)

    def validation_batches(self) -> Iterator[Batch]:
        """Every validation example once; the last batch is filled up with rows of weight 0."""
        everything, size = self.validation(), self.config.batch
        count = len(next(iter(everything.values())))
        for start in range(0, count, size):
            rows = np.arange(start, start + size)
            batch = {name: values[np.minimum(rows, count - 1)] for name, values in everything.items()}
            yield {**batch, "weight": (rows < count).astype(np.float32)}

    def layer_options(self) -> dict[str, Any]:
        """The configuration's part that is the same in every model, as fields of `LayerConfig`."""
        model = self.config.model
        names = LayerConfig.__dataclass_fields__.keys() & type(model).__dataclass_fields__.keys()
        options = {name: getattr(model, name) for name in names}
        return {
            **options,
            "dtype": jnp.dtype(model.dtype),
            "mixer": self.config.mixer,
            "mixer_args": dict(self.config.mixer_args),
        }
