"""`attnzoo export`: a trained model as a safetensors file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from attnzoo.convert.weights import save_weights
from train.generate import load_model
from train.rundir import find_checkpoint


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as a safetensors file."""

    checkpoint: tyro.conf.Positional[str]
    """The folder of a run, RUN/checkpoints/STEP, or RUN/checkpoints/best."""
    out: str
    """The file to write, NAME.safetensors, which must not be there yet."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the floating-point arrays in the file; by default that of the parameters."""


def export(config: ExportConfig) -> Path:
    """Writes the file and returns its path. What the checkpoint says about its run, the configuration first, goes with it.

    Raises ValueError for a checkpoint that is missing or damaged, and for a file that has another ending or is there already.
    """
    path, checkpoint = Path(config.out).expanduser(), Path(config.checkpoint).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"--out: {path} must end in .safetensors, by which it is recognised when it is read")
    checkpoints, step = find_checkpoint(checkpoint)
    try:
        about = checkpoints.about(step)
    finally:
        checkpoints.close()
    model, _ = load_model(checkpoint)
    save_weights(model, path, config=about, dtype=config.dtype)
    return path
