"""`attnzoo generate`: a trained language model continues a prompt."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnzoo.convert.weights import load_weights, read_config
from attnzoo.models.decoding import greedy, sample
from train.config import Config, MeshConfig
from train.data.tokenizer import Tokenizer
from train.rundir import About, find_checkpoint
from train.sharding import make_mesh
from train.tasks import Task, make_task
from train.tasks.text import Text
from train.trainer import Trainer


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a trained language model."""

    checkpoint: str
    """The folder of a run, RUN/checkpoints/STEP, RUN/checkpoints/best, or a file that attnzoo export wrote."""
    prompt: str
    """Text to continue."""
    max_new: int = 200
    """Tokens to generate."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float | None = None
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    tokenizer: str | None = None
    """The file of the run's tokenizer, if it is no longer where it was."""


def generate(config: GenerateConfig) -> str:
    """The continuation, without the prompt.

    Raises ValueError for a checkpoint that is missing, damaged or not of a language model, for a tokenizer that is
    not the run's, and for options out of range.
    """
    model, task = load_model(Path(config.checkpoint).expanduser(), config.tokenizer)
    if not isinstance(task, Text):
        raise ValueError(f"--checkpoint: {config.checkpoint} holds a {type(model).__name__}, not a language model")
    return continue_text(
        model,
        task.tokenizer,
        config.prompt,
        after_end=task.config.data.pack,
        max_new=config.max_new,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )


def load_model(path: Path, tokenizer: str | None = None) -> tuple[nnx.Module, Task]:
    """The model of a checkpoint or an exported file in evaluation mode, on the first device, whatever it was trained on; and
    its task.

    tokenizer: where the run's tokenizer lies now. Text need not be there any more.
    """
    if path.suffix == ".safetensors":
        return _load_exported(path, tokenizer)
    checkpoints, step = find_checkpoint(path)
    try:
        config, task = _task(About.from_json(checkpoints.about(step)), tokenizer)
        trainer = Trainer(task, config, make_mesh(MeshConfig()))
        params, rest = checkpoints.restore_model(step, trainer.abstract, trainer.shardings)
    finally:
        checkpoints.close()
    return trainer.model(params, rest), task


def _load_exported(path: Path, tokenizer: str | None) -> tuple[nnx.Module, Task]:
    config, task = _task(About.from_json(read_config(path)), tokenizer)
    model = task.make_model(nnx.Rngs(config.seed))
    load_weights(model, path)
    model.eval()
    return model, task


def _task(about: About, tokenizer: str | None) -> tuple[Config, Task]:
    """What a run was about, its tokenizer found at another place if one is given."""
    config = about.config
    if tokenizer is not None:
        config = replace(config, data=replace(config.data, tokenizer=tokenizer))
    task = make_task(config)
    about.check_tokenizer(task.tokenizer_fingerprint)
    return config, task


def continue_text(
    model: nnx.Module,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    after_end: bool = False,
    max_new: int,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """What the model writes after `prompt`, up to the end of a document. temperature 0 is greedy.

    after_end: put the end of a document before the prompt, as models saw it that were trained on packed rows.
    """
    ids = tokenizer.encode([prompt])[0].astype(np.int32)
    if after_end:
        ids = np.concatenate([[tokenizer.end], ids]).astype(np.int32)
    if not len(ids):
        raise ValueError("--prompt: is empty; the model needs at least one token to continue")
    tokens = jnp.asarray(ids)[None]
    options: dict[str, Any] = {"max_new": max_new, "eos_id": tokenizer.end}
    if temperature == 0:
        made = greedy(model, tokens, **options)
    else:
        made = sample(
            model,
            tokens,
            jax.random.key(seed),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            **options,
        )
    return tokenizer.decode(np.asarray(made.tokens[0, : int(made.lengths[0])]))
