"""What a run is made of: typed, printable, and the same from the command line, from JSON and from Python."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from attnzoo.errors import nearest, unknown

SMOKE_STEPS = 20


@dataclass(frozen=True)
class DataConfig:
    """Which data, and where it is kept."""

    name: str = "python_topics"
    """A data set that comes along (python_topics, scikit_digits), or any TFDS name."""
    path: str | None = None
    """Texts of your own instead: a file, a folder or a glob (in quotes) of .txt, .md, .rst, .jsonl, .parquet, .array_record."""
    validation: str | None = None
    """Files to validate on, with --data.path; by default a tenth of its texts."""
    field: str | None = None
    """Field of a record that holds the text; by default text, or the only one that does."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json (Hugging Face) or .model (SentencePiece)."""
    pack: bool = False
    """Pack whole documents into examples, in which no document sees another."""
    max_corrupt: float = 0.01
    """Largest share of records that may be unreadable; they are skipped and counted."""
    dir: str | None = None
    """Folder of prepared data sets; by default attnzoo/data in your cache folder."""
    context: int = 128
    """Tokens per training example, for text."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network around the mixer."""

    dim: int = 96
    """Width of the residual stream."""
    num_layers: int = 3
    num_heads: int = 3
    """Query heads."""
    num_kv_heads: int | None = None
    """Heads of keys and values; by default as many as query heads."""
    head_dim: int | None = None
    """Width of a head; by default dim / num_heads."""
    mlp_dim: int | None = None
    """Hidden width of the feed-forward part; by default 4 * dim (8/3 * dim for swiglu)."""
    mlp: Literal["swiglu", "gelu", "silu", "relu"] = "swiglu"
    """Activation of the feed-forward part."""
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    """How the model knows the order of tokens."""
    patch_size: int = 2
    """Side of an image patch, for images."""
    dropout_rate: float = 0.0
    """Of embeddings and of what each layer adds."""
    scan_layers: bool = False
    """Compile one layer and scan over it: faster to compile when there are many."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters stay float32."""


OptimizerName = Literal["adamw", "lion", "muon", "sgd"]
ScheduleName = Literal["cosine", "linear", "constant", "wsd"]
LoopName = Literal["jit", "pmap"]


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: OptimizerName = "adamw"
    """lion wants a learning rate a few times smaller than adamw, muon the same; muon leaves what is no matrix, and the
    vocabulary, to adamw; sgd has Nesterov's momentum."""
    learning_rate: float = 6e-3
    """At its peak."""
    schedule: ScheduleName = "cosine"
    """From the peak on: cosine or linear down to the last rate, constant, or wsd, constant and linear in the cooldown."""
    final_fraction: float = 0.05
    """The last learning rate, as a fraction of the peak; not for constant."""
    warmup: float = 0.1
    """The fraction of all steps that warms up, linearly."""
    cooldown: float = 0.2
    """The fraction of all steps that cools down, for wsd."""
    weight_decay: float = 0.1
    """Of matrices; vectors are not decayed."""
    b1: float = 0.9
    """For adamw, lion, and what muon leaves to adamw; so is b2."""
    b2: float = 0.98
    momentum: float = 0.95
    """For muon and sgd."""
    clip: float = 1.0
    """Largest global norm of the gradient."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. The product is the number of devices; all ones is a single device."""

    data: int = 1
    """Copies of the model, each with a part of the batch."""
    fsdp: int = 1
    """Parts that parameters and optimizer state are cut into; the batch is divided here too."""
    tensor: int = 1
    """Parts that heads and hidden units are cut into."""
    context: int = 1
    """Parts that sequences are cut into."""
    exchange: Literal["ring", "all_to_all"] = "ring"
    """How devices with other parts of a sequence attend to each other: keys and values go round, or tokens become heads."""


@dataclass(frozen=True)
class EvalConfig:
    """Validation."""

    every: int = 200
    """Steps between validations; the last step is always followed by one."""
    sample: int = 200
    """Tokens of the continuation that is sampled at the end, for text."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept on disk."""

    every: int = 200
    """Steps between checkpoints; the last step always makes one."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    best: int = 1
    """How many of the best by the validation score stay besides; a new best is saved where it is found. 0 for none."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    task: str = "text"
    """What to learn: text (bytes, next-token) or digits (images, classification)."""
    mixer: str = "transformer"
    """Key of the exhibit that mixes tokens; --mixer.ARG VALUE sets its own arguments."""
    mixer_args: tyro.conf.Suppress[Mapping[str, Any]] = field(default_factory=dict)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int = 1200
    """Optimizer steps."""
    batch: int = 8
    """Examples per step, over all devices."""
    accumulate: int = 1
    """Parts that a batch is taken in, one after another: less memory, the same step."""
    ema: float | None = None
    """Decay of a moving average of the parameters, e.g. 0.999, which is then what is evaluated and generated from."""
    loop: LoopName = "jit"
    """pmap is the plain data-parallel loop for small models: every device holds all of it. Only for --mesh.data."""
    seed: int = 0
    """Of parameters, data order and dropout."""
    log_every: int = 10
    """Steps between fetching metrics from the device."""

    def __post_init__(self) -> None:
        positive = {
            "steps": self.steps,
            "batch": self.batch,
            "accumulate": self.accumulate,
            "log-every": self.log_every,
            "eval.every": self.eval.every,
            "checkpoint.every": self.checkpoint.every,
            "checkpoint.keep": self.checkpoint.keep,
            "data.context": self.data.context,
            "model.dim": self.model.dim,
            "model.num-layers": self.model.num_layers,
            **{f"mesh.{axis}": getattr(self.mesh, axis) for axis in ("data", "fsdp", "tensor", "context")},
        }
        for name, value in positive.items():
            if value < 1:
                raise ValueError(f"--{name}: must be at least 1, got {value}")
        if self.checkpoint.best < 0:
            raise ValueError(f"--checkpoint.best: must be at least 0, got {self.checkpoint.best}")
        if not 0 <= self.data.max_corrupt <= 1:
            raise ValueError(f"--data.max-corrupt: is a share, 0 to 1, got {self.data.max_corrupt:g}")
        options = self.optimizer
        choices = {
            "--optimizer.name": (options.name, OptimizerName),
            "--optimizer.schedule": (options.schedule, ScheduleName),
            "--loop": (self.loop, LoopName),
        }
        for name, (value, known) in choices.items():
            if value not in typing.get_args(known):
                raise unknown(name, value, typing.get_args(known))
        parts = {"optimizer.warmup": options.warmup, "optimizer.cooldown": options.cooldown}
        for name, part in parts.items():
            if not 0 <= part <= 1:
                raise ValueError(f"--{name}: is a fraction of all steps, in [0, 1], got {part}")
        if options.schedule == "wsd" and sum(parts.values()) > 1:
            raise ValueError(
                f"--optimizer.cooldown: {options.cooldown} and the warmup, {options.warmup}, are more than all steps"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"--ema: is a decay between 0 and 1, e.g. 0.999, got {self.ema}")

    def as_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; `from_json` is the way back."""
        return dataclasses.asdict(self)


def smoke(config: Config) -> Config:
    """A run of CI length: a small batch, and 20 steps unless the configuration asks for fewer."""
    steps = min(config.steps, SMOKE_STEPS)
    return dataclasses.replace(
        config,
        steps=steps,
        batch=min(config.batch, 8),
        eval=dataclasses.replace(config.eval, every=steps, sample=min(config.eval.sample, 40)),
        checkpoint=dataclasses.replace(config.checkpoint, every=max(1, steps // 2)),
    )


def absolute_paths(config: Config) -> Config:
    """With the paths of data as they read from anywhere, so that the run can be resumed from anywhere."""
    data = config.data
    given = {name: getattr(data, name) for name in ("path", "validation", "tokenizer", "dir")}
    paths = {name: value for name, value in given.items() if value is not None and (name, value) != ("tokenizer", "bytes")}
    absolute = {name: os.path.abspath(os.path.expanduser(value)) for name, value in paths.items()}
    return dataclasses.replace(config, data=dataclasses.replace(data, **absolute))


def from_json(values: Mapping[str, Any], cls: type = Config, path: str = "") -> Any:
    """The configuration that `as_json` wrote.

    Raises ValueError for a field that there is not, or whose value has another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    result = {}
    for name, value in values.items():
        if name not in fields:
            near = " or ".join(path + known for known in nearest(name, fields))
            meant = f"did you mean {near}?" if near else f"its fields are {', '.join(sorted(fields))}"
            raise ValueError(f"configuration: {path}{name} is not a field of {cls.__name__}; {meant}")
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            value = from_json(value, typing.cast(type, kind), f"{path}{name}.")
        elif name == "mixer_args":
            value = {argument: _tuples(given) for argument, given in value.items()}
        elif not _fits(value, kind):
            wanted = _spelled(kind)
            raise ValueError(f"configuration: {path}{name} must be {wanted}, got {value!r}")
        result[name] = value
    return cls(**result)


def _tuples(value: Any) -> Any:
    """JSON knows lists only; arguments on a command line are tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _spelled(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return value in typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model.dim": 160, ...} of nested dicts."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


# What may change when a run is resumed without making it another run. A mesh of another shape, and another way to
# take a batch through it, keep the mathematics but not the last bit of every sum.
# The data and the tokenizer may lie elsewhere: their content is compared, not their place.
RESUMABLE = (
    "mesh.", "loop", "accumulate", "eval.", "checkpoint.", "data.dir", "data.path", "data.validation", "data.tokenizer",
    "data.max_corrupt", "log_every",
)  # fmt: skip


def differences(stored: Config, asked: Config) -> list[str]:
    """The options in which `asked` would make another run than `stored`, as "--model.dim 64 (the run has 160)"."""
    old, new = flatten(stored.as_json()), flatten(asked.as_json())
    found = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) and not name.startswith(RESUMABLE):
            option = name.replace("mixer_args.", "mixer.").replace("_", "-")
            found.append(f"--{option} {new.get(name)} (the run has {old.get(name)})")
    return found
