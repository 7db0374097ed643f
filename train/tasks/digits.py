"""Images: say what is on them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Int

from attnzoo.models.vit import ViT, ViTConfig
from train.baselines import logistic_accuracy, majority_accuracy
from train.config import Config, DataConfig, ModelConfig, OptimizerConfig
from train.data.sources import data_folder
from train.data.store import Dataset, open_dataset
from train.tasks.base import Batch, Task


class Digits(Task):
    """A vision transformer on images with labels; scikit-learn's digits by default."""

    name = "digits"
    unit = "images"
    metric = "accuracy"
    quality = "accuracy"
    higher_is_better = True

    def __init__(self, config: Config):
        super().__init__(config)
        if config.data.path is not None:
            raise ValueError(f"--data.path: the digits task reads named data sets of images, got {config.data.path!r}")
        missing = {"image", "label"} - set(self.dataset.features)
        if missing:
            raise ValueError(
                f"data set {config.data.name!r}: the digits task needs features 'image' and 'label'; it has "
                f"{', '.join(self.dataset.features)}"
            )
        self.shape = tuple(self.dataset.features["image"].shape)
        self.classes = self.dataset.features["label"].num_classes
        side = config.model.patch_size
        if None in self.shape or self.shape[0] % side or self.shape[1] % side:
            raise ValueError(
                f"--model.patch-size: {side} does not divide the images of data set {config.data.name!r}, "
                f"which are {self.shape}"
            )

    @staticmethod
    def defaults() -> Config:
        return Config(
            task="digits",
            data=DataConfig(name="scikit_digits"),
            model=ModelConfig(dim=64, num_layers=4, num_heads=4, mlp="gelu", norm="layer", positions="learned",
                              dropout_rate=0.1),
            optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.05),
            steps=400,
            batch=64,
        )  # fmt: skip

    @functools.cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.config.data.name, data_folder(self.config.data))

    @property
    def context(self) -> None:
        return None

    @property
    def units_per_step(self) -> int:
        return self.config.batch

    def examples(self) -> "Images":
        return Images(self.dataset.train)

    def validation(self) -> Batch:
        return _all(Images(self.dataset.validation))

    def make_model(self, rngs: nnx.Rngs) -> ViT:
        height, width, channels = self.shape
        config = ViTConfig(
            image_size=(height, width),
            channels=channels,
            patch_size=self.config.model.patch_size,
            num_classes=self.classes,
            **self.layer_options(),
        )
        return ViT(config, rngs=rngs)

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"]).mean()  # type: ignore[operator]

    def evaluate(self, model: nnx.Module, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        logits = model(batch["image"])  # type: ignore[operator]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        right = logits.argmax(-1) == batch["label"]
        weight = batch["weight"]
        return {"nats": (losses * weight).sum(), "right": (right * weight).sum(), "images": weight.sum()}

    def score(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["nats"] / sums["images"], "accuracy": sums["right"] / sums["images"]}

    def baselines(self) -> dict[str, float]:
        train, validation = _all(self.examples()), self.validation()
        return {
            "majority class": majority_accuracy(train["label"], validation["label"]),
            "logistic regression": logistic_accuracy(train["image"], train["label"], validation["image"], validation["label"]),
        }

    def closing(self, model: nnx.Module) -> tuple[str, str]:
        shown = {name: values[:4] for name, values in self.validation().items()}
        answers = np.asarray(jnp.argmax(model(shown["image"]), -1))  # type: ignore[operator]
        pictures = [_picture(image) for image in shown["image"]]
        rows = ["   ".join(parts) for parts in zip(*pictures, strict=True)]
        width = len(pictures[0][0])
        labels = zip(answers, shown["label"], strict=True)
        rows.append("   ".join(f"says {a}, is {b}".ljust(width) for a, b in labels))
        return "the first validation images", "\n".join(rows)


class Images:
    """Records with a float image in 0..1 and an int32 label, with random access."""

    def __init__(self, records: Any):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def rows(self, indices: Int[np.ndarray, "R"]) -> Batch:
        records = [self.records[int(index)] for index in indices]
        images = np.stack([record["image"] for record in records])
        scale = 255 if images.dtype == np.uint8 else 1
        return {"image": images.astype(np.float32) / scale, "label": np.array([r["label"] for r in records], np.int32)}


def _all(images: Images) -> Batch:
    return images.rows(np.arange(len(images)))


def _picture(image: np.ndarray) -> list[str]:
    """Rows of characters, darker for larger values; large images are thinned out."""
    grey = image.mean(-1)[:: max(1, len(image) // 14), :: max(1, image.shape[1] // 14)]
    shades = " .:-=+*#%@"
    return ["".join(2 * shades[min(9, int(9 * value + 0.5))] for value in row) for row in grey]
