"""The tasks of `train.tasks` as shapes: the same models and losses, and no data."""

from dataclasses import dataclass

import jax
import numpy as np

from attnzoo.errors import unknown
from train.config import Config
from train.tasks.digits import Digits
from train.tasks.text import Text


@dataclass(frozen=True)
class Sizes:
    """What a model takes from its data."""

    vocab_size: int = 32_000
    """Tokens of the vocabulary, for text."""
    image_size: int = 224
    """Side of an image in pixels, for images."""
    classes: int = 1000
    """Labels of images."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"--sizes.{name.replace('_', '-')}: must be at least 1, got {value}")


class TextShapes(Text):
    """Language modelling over a vocabulary of any size."""

    def __init__(self, config: Config, sizes: Sizes):
        self.config, self.vocab_size = config, sizes.vocab_size

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.config.batch, self.context)
        return {name: jax.ShapeDtypeStruct(shape, np.int32) for name in ("tokens", "targets")}


class ImageShapes(Digits):
    """Classification of square colour images."""

    def __init__(self, config: Config, sizes: Sizes):
        side = config.model.patch_size
        if sizes.image_size % side:
            raise ValueError(f"--model.patch-size: {side} does not divide --sizes.image-size {sizes.image_size}")
        self.config, self.shape, self.classes = config, (sizes.image_size, sizes.image_size, 3), sizes.classes

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        image = jax.ShapeDtypeStruct((self.config.batch, *self.shape), np.float32)
        return {"image": image, "label": jax.ShapeDtypeStruct((self.config.batch,), np.int32)}


def shapes_task(config: Config, sizes: Sizes) -> TextShapes | ImageShapes:
    """The task of a configuration without its data. Raises ValueError, with the nearest names, for an unknown one."""
    tasks: dict[str, type[TextShapes | ImageShapes]] = {task.name: task for task in (TextShapes, ImageShapes)}
    if config.task not in tasks:
        raise unknown("task", config.task, tasks)
    return tasks[config.task](config, sizes)
