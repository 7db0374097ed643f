"""`attnzoo generate`: a trained language model continues a prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnzoo.convert.weights import load_weights, read_config
from attnzoo.models.decoding import greedy, sample
from train.config import MeshConfig
from train.data import tokenizer
from train.rundir import About, find_checkpoint
from train.sharding import make_mesh
from train.tasks import make_task
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


def generate(config: GenerateConfig) -> str:
    """The continuation, without the prompt.

    Raises ValueError for a checkpoint that is missing, damaged or not of a language model, and for options
    out of range.
    """
    model = load_model(Path(config.checkpoint).expanduser())
    if not hasattr(model, "init_cache"):
        raise ValueError(f"--checkpoint: {config.checkpoint} holds a {type(model).__name__}, not a language model")
    return continue_text(
        model,
        config.prompt,
        max_new=config.max_new,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
    )


def load_model(path: Path) -> nnx.Module:
    """The model of a checkpoint or an exported file, in evaluation mode, on the first device, whatever it was trained on."""
    if path.suffix == ".safetensors":
        return _load_exported(path)
    checkpoints, step = find_checkpoint(path)
    try:
        config = About.from_json(checkpoints.about(step)).config
        trainer = Trainer(make_task(config), config, make_mesh(MeshConfig()))
        params, rest = checkpoints.restore_model(step, trainer.abstract, trainer.shardings)
    finally:
        checkpoints.close()
    return trainer.model(params, rest)


def _load_exported(path: Path) -> nnx.Module:
    config = About.from_json(read_config(path)).config
    model = make_task(config).make_model(nnx.Rngs(config.seed))
    load_weights(model, path)
    model.eval()
    return model


def continue_text(
    model: nnx.Module,
    prompt: str,
    *,
    max_new: int,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """What the model writes after `prompt`, up to the end of a document. temperature 0 is greedy."""
    if not prompt:
        raise ValueError("--prompt: is empty; the model needs at least one byte to continue")
    tokens = jnp.asarray(tokenizer.encode(prompt).astype(np.int32))[None]
    options: dict[str, Any] = {"max_new": max_new, "eos_id": tokenizer.END[0]}
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
    text = np.asarray(made.tokens[0, : int(made.lengths[0])])
    return tokenizer.decode(text[text != tokenizer.END[0]])
