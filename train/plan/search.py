"""The nearest settings that fit, by compiling the candidates nearest first."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from train.config import Config, MeshConfig
from train.plan.chips import Slice
from train.plan.compile import Planned, Prepared
from train.plan.memory import state_bytes
from train.sharding import make_mesh, shardings

REMAT = ("none", "dots", "full")
"""From most memory to most recomputation."""


@dataclass(frozen=True)
class Limits:
    """How far a search goes. compiled: candidates at most. minutes: after which no further one is begun."""

    compiled: int
    minutes: float


@dataclass(frozen=True)
class Try:
    """A candidate. change: in words. least: bytes per device that it needs at least. plan: None if it was not compiled,
    because least is too much already. refused: why the compiler has no program for it, where that is not memory."""

    change: str
    least: int
    plan: Planned | None
    refused: str | None = None


@dataclass(frozen=True)
class Search:
    """What was tried, in order. found: the first that fits, None if none did; left: candidates not tried any more."""

    tries: tuple[Try, ...]
    found: Try | None
    left: int

    @property
    def compiled(self) -> tuple[Try, ...]:
        """The tries that the compiler was asked about."""
        return tuple(t for t in self.tries if t.plan is not None or t.refused is not None)


def nearest_that_fits(
    prepared: Prepared, plan: Planned, pod: Slice, limits: Limits, attempt: Callable[[Config, str], Planned]
) -> Search:
    """Candidates near a plan that does not fit, compiled one after another until one fits or `limits` are reached.

    Not compiled is what cannot fit: where state, gradients and the inputs of layers alone take more than there is, or the
    rest of a setting that was compiled, in proportion. attempt: compiles a candidate, whose change it is told.
    """
    began = time.monotonic()
    fixed = Fixed(prepared, pod)
    failed = [(prepared.config, plan.needed - fixed.bytes(prepared.config))]
    candidates = list(_candidates(prepared.config))
    tries: list[Try] = []
    compiled = 0
    for n, config in enumerate(candidates):
        change = describe(prepared.config, config)
        rest = max(layer_inputs(prepared, config), *(_rest(config, other, size) for other, size in failed))
        least = fixed.bytes(config) + int(rest)
        if least > plan.usable:
            tries.append(Try(change, least, None))
            continue
        if compiled == limits.compiled or time.monotonic() - began > 60 * limits.minutes:
            return Search(tuple(tries), None, len(candidates) - n)
        compiled += 1
        try:
            made = attempt(config, change)
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # of this candidate; the next may do
            tries.append(Try(change, least, None, str(error).partition("\n")[0]))
            continue
        tries.append(Try(change, least, made))
        if made.fits:
            return Search(tuple(tries), tries[-1], len(candidates) - n - 1)
        failed.append((config, made.needed - fixed.bytes(config)))
    return Search(tuple(tries), None, 0)


def _candidates(config: Config) -> Iterator[Config]:
    """Other settings of the same model on as many devices, nearest first.

    A stronger rematerialisation is nearest (1 a step), then taking the batch in twice as many parts (1.25 each time, which
    changes nothing that is learned), another division among data, fsdp and tensor (1.5 per factor of two that moves), and
    half the batch (4 each time); then what these make together.
    """
    mesh, model = config.mesh, config.model
    found: list[tuple[float, int, Config]] = []
    for data, fsdp, tensor in _meshes(config):
        moved = abs(math.log2(tensor / mesh.tensor)) + math.log2(mesh.data / data)
        rows = config.batch // (data * fsdp) if config.batch % (data * fsdp) == 0 else 0
        for remat in REMAT[REMAT.index(model.remat) :]:
            for batch, accumulate, apart in _divisions(config, rows):
                changed = replace(
                    config,
                    batch=batch,
                    accumulate=accumulate,
                    mesh=replace(mesh, data=data, fsdp=fsdp, tensor=tensor),
                    model=replace(model, remat=remat),  # type: ignore[arg-type]
                )
                distance = REMAT.index(remat) - REMAT.index(model.remat) + 1.5 * moved + apart
                found.append((distance, len(found), changed))
    return (changed for distance, _, changed in sorted(found, key=lambda row: row[:2]) if distance)


def _divisions(config: Config, rows: int) -> Iterator[tuple[int, int, float]]:
    """(batch, accumulate, distance): more parts, or a smaller batch, as far as `rows` per device divide."""
    parts = rows // config.accumulate if rows % config.accumulate == 0 else 0
    for times in range((parts & -parts).bit_length()):
        yield config.batch, config.accumulate << times, 1.25 * times
        if times:
            yield config.batch >> times, config.accumulate, 4.0 * times


def _meshes(config: Config) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor) of as many devices: tensor divides the heads of keys, and data, which holds copies, only shrinks."""
    mesh, model = config.mesh, config.model
    heads = model.num_kv_heads or model.num_heads
    for data in (n for n in range(1, mesh.data + 1) if mesh.data % n == 0):
        product = mesh.data // data * mesh.fsdp * mesh.tensor
        for tensor in range(1, product + 1):
            if product % tensor == 0 and heads % tensor == 0:
                yield data, product // tensor, tensor


def _rest(config: Config, failed: Config, rest: int) -> float:
    """Bytes that a candidate needs beside what is `Fixed`, at least, where a setting that did not fit needed `rest`.

    Of that, activations grow with the examples of a device, some of them are divided by tensor, and so are gathered weights,
    which are there for any number of examples; which part is how large is not known, so the one that shrinks most counts.
    """
    if REMAT.index(config.model.remat) > REMAT.index(failed.model.remat):
        return 0.0
    rows, tensor = _rows(config) / _rows(failed), failed.mesh.tensor / config.mesh.tensor
    return rest * min(rows, rows * tensor, tensor)


def _rows(config: Config) -> float:
    """Examples that a device works on at once."""
    return config.batch / (config.mesh.data * config.mesh.fsdp * config.accumulate)


class Fixed:
    """Bytes per device that a model takes whatever its batch: its state, and its gradients."""

    def __init__(self, prepared: Prepared, pod: Slice):
        self._trainer, self._pod = prepared.trainer, pod
        self._of_mesh: dict[MeshConfig, tuple[int, int]] = {}

    def bytes(self, config: Config) -> int:
        """Gradients are there twice where a batch is taken in parts: their sum, and those of a part."""
        if config.mesh not in self._of_mesh:
            mesh = make_mesh(config.mesh, self._pod.devices)
            state = state_bytes(self._trainer, {}, shardings(self._trainer.abstract, mesh), {})
            self._of_mesh[config.mesh] = state.total, state.parameters
        state_, gradients = self._of_mesh[config.mesh]
        return state_ + gradients * (1 if config.accumulate == 1 else 2)


def layer_inputs(prepared: Prepared, config: Config) -> int:
    """Bytes per device of the input of every layer, which each policy keeps."""
    tokens = _rows(config) * (prepared.trainer.task.context or 1) / config.mesh.context
    return int(config.model.num_layers * tokens * config.model.dim * jnp.dtype(config.model.dtype).itemsize)


def describe(before: Config, after: Config) -> str:
    """The difference as options, e.g. "--model.remat full --accumulate 2"."""
    options = []
    if after.model.remat != before.model.remat:
        options.append(f"--model.remat {after.model.remat}")
    if after.mesh != before.mesh:
        sides = {axis: getattr(after.mesh, axis) for axis in ("data", "fsdp", "tensor", "context")}
        options.append("--mesh " + ",".join(f"{axis}={size}" for axis, size in sides.items() if size > 1))
    if after.accumulate != before.accumulate:
        options.append(f"--accumulate {after.accumulate}")
    if after.batch != before.batch:
        options.append(f"--batch {after.batch}")
    return " ".join(options)
