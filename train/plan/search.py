"""The nearest settings that fit, by compiling the candidates nearest first."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax.numpy as jnp

from train.config import Config
from train.plan.chips import Slice
from train.plan.compile import Planned, Prepared, compile_step, prepare
from train.plan.memory import state_bytes
from train.plan.tasks import Sizes
from train.sharding import batch_sharding, make_mesh, shardings

REMAT = ("none", "dots", "full")
"""From most memory to most recomputation."""


@dataclass(frozen=True)
class Try:
    """A candidate. change: in words. least: bytes per device that it needs at least. plan: None if least is too much
    already, so that it was not compiled."""

    change: str
    least: int
    plan: Planned | None


@dataclass(frozen=True)
class Search:
    """What was tried, in order. found: the first that fits, None if none did; left: candidates not tried any more."""

    tries: tuple[Try, ...]
    found: Try | None
    left: int


def nearest_that_fits(
    prepared: Prepared, plan: Planned, sizes: Sizes, pod: Slice, most: int, say: Callable[[str], None]
) -> Search:
    """Candidates near a plan that does not fit, compiled one after another until one fits; at most `most` of them.

    A stronger rematerialisation is nearest, then another division between fsdp and tensor, then half the batch, and
    what these make together. Not compiled is what cannot fit: where state, gradients and the inputs of layers alone take
    more than there is, and what needs more than a candidate that did not fit.
    """
    tries: list[Try] = []
    failed = [prepared.config]
    candidates = list(_candidates(prepared.config))
    compiled = 0
    for n, config in enumerate(candidates):
        if any(_needs_more(config, other) for other in failed):
            continue
        least = least_bytes(prepared, config, pod)
        if least > plan.usable:
            tries.append(Try(describe(prepared.config, config), least, None))
            continue
        if compiled == most:
            return Search(tuple(tries), None, len(candidates) - n)
        change = describe(prepared.config, config)
        say(change)
        compiled += 1
        made = Try(change, least, compile_step(prepare(config, sizes, pod), pod))
        tries.append(made)
        assert made.plan is not None
        if made.plan.fits:
            return Search(tuple(tries), made, len(candidates) - n - 1)
        failed.append(config)
    return Search(tuple(tries), None, 0)


def _candidates(config: Config) -> Iterator[Config]:
    """Other settings of the same model on as many devices, nearest first."""
    mesh, model = config.mesh, config.model
    heads = model.num_kv_heads or model.num_heads
    product = mesh.fsdp * mesh.tensor
    splits = [t for t in range(1, product + 1) if product % t == 0 and heads % t == 0]
    found: list[tuple[float, int, Config]] = []
    for remat in REMAT[REMAT.index(model.remat) :]:
        for tensor in splits:
            fsdp = product // tensor
            batch, halvings = config.batch, 0
            while batch % (mesh.data * fsdp) == 0:
                moved = abs(math.log2(tensor / mesh.tensor))
                distance = (REMAT.index(remat) - REMAT.index(model.remat)) + 1.5 * moved + 2 * halvings
                changed = replace(
                    config,
                    batch=batch,
                    mesh=replace(mesh, fsdp=fsdp, tensor=tensor),
                    model=replace(model, remat=remat),  # type: ignore[arg-type]
                )
                found.append((distance, len(found), changed))
                if batch % 2:
                    break
                batch, halvings = batch // 2, halvings + 1
    return (changed for distance, _, changed in sorted(found, key=lambda row: row[:2]) if distance)


def _needs_more(config: Config, failed: Config) -> bool:
    """Whether a candidate needs at least what one that did not fit needed."""
    weaker = REMAT.index(config.model.remat) <= REMAT.index(failed.model.remat)
    return config.mesh == failed.mesh and config.batch >= failed.batch and weaker


def least_bytes(prepared: Prepared, config: Config, pod: Slice) -> int:
    """Bytes per device below which no program gets: state, gradients, and the input of every layer, which each policy keeps."""
    mesh = make_mesh(config.mesh, pod.devices)
    task = prepared.trainer.task
    placed = {name: batch_sharding(name, task.sequence, mesh) for name in prepared.batch}
    state = state_bytes(prepared.trainer, prepared.batch, shardings(prepared.trainer.abstract, mesh), placed)
    rows = config.batch // (config.mesh.data * config.mesh.fsdp)
    tokens = rows * (task.context or 1) // config.mesh.context
    inputs = config.model.num_layers * tokens * config.model.dim * jnp.dtype(config.model.dtype).itemsize
    return state.total + state.parameters + inputs


def describe(before: Config, after: Config) -> str:
    """The difference as options, e.g. "--model.remat full --batch 256"."""
    options = []
    if after.model.remat != before.model.remat:
        options.append(f"--model.remat {after.model.remat}")
    if after.mesh != before.mesh:
        options.append(f"--mesh fsdp={after.mesh.fsdp},tensor={after.mesh.tensor}")
    if after.batch != before.batch:
        options.append(f"--batch {after.batch}")
    return " ".join(options)
