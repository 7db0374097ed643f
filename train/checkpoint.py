"""Checkpoints: saved in the background, whole or not at all, and checked when they are read."""

import logging
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from train.trainer import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every step of its work


class Checkpoints:
    """The checkpoints of a run, `folder/STEP` each.

    One holds four items: `model` (parameters, random streams, the average of parameters if there is one), `optimizer`
    (its state and the step), `data` (the position of the training data) and `about` (configuration, data fingerprint,
    versions).
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {
            "model": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, data: grain.DatasetIterator, about: dict[str, Any]) -> None:
        """Starts saving; training may go on. `wait` makes sure that it is on disk."""
        model, optimizer = _parts(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(_named(model)),
                optimizer=ocp.args.StandardSave(_named(optimizer)),
                data=grain.checkpoint.CheckpointSave(data),
                about=ocp.args.JsonSave(about),
            ),
            force=True,
        )

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def about(self, step: int) -> dict[str, Any]:
        """What the checkpoint says about its run."""
        with _reading(self.folder / str(step)):
            return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def restore(self, step: int, like: TrainState, shardings: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The state after `step`, bit for bit; `data` is put where it was.

        like: shapes and dtypes. Raises ValueError if the checkpoint is damaged or of another model.
        """
        parts = [
            self._restore(step, item, part, places)
            for item, part, places in zip(("model", "optimizer"), _parts(like), _parts(shardings), strict=True)
        ]
        with _reading(self.folder / str(step)):
            self._manager.restore(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(data)))
        (params, rest, ema), (opt_state, count) = parts
        return TrainState(params, rest, opt_state, count, ema)

    def restore_model(self, step: int, like: TrainState, shardings: TrainState) -> tuple[Any, Any]:
        """(parameters, or their average where the run keeps one; rest) after `step`, without the optimizer's state."""
        params, rest, ema = self._restore(step, "model", _parts(like)[0], _parts(shardings)[0])
        return (params if ema is None else ema), rest

    def _restore(self, step: int, item: str, like: Any, places: Any) -> Any:
        folder = self.folder / str(step)
        target = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            _named(like),
            _named(places),
        )
        with _reading(folder):
            found = self._manager.item_metadata(step)[item]
            stored = {name: leaf.shape for name, leaf in found.items()}
        expected = {name: leaf.shape for name, leaf in target.items()}
        if stored != expected:
            raise ValueError(f"checkpoint {folder} is of another model: {_mismatch(stored, expected)}")
        with _reading(folder):
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
            restored = self._manager.restore(step, args=args)[item]
        return _unnamed(like, restored)


class _reading:
    """Turns whatever Orbax raises over a damaged checkpoint into one paragraph."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        line = next(iter(str(error).strip().splitlines()), "").partition(". See full")[0][:160] or type(error).__name__
        others = sorted((p.name for p in self.folder.parent.glob("[0-9]*") if p != self.folder), key=int)
        fallback = (
            f"delete or move that folder away to go on from step {others[-1]}"
            if others
            else "there is no other checkpoint of this run"
        )
        raise ValueError(f"checkpoint {self.folder} cannot be read, it is truncated or damaged ({line}); {fallback}") from error


def _parts(state: TrainState) -> tuple[Any, Any]:
    return (state.params, state.rest, state.ema), (state.opt_state, state.step)


def _named(tree: Any) -> dict[str, Any]:
    """Every leaf by its path, so that a checkpoint can be compared and read without our classes.

    Random keys are stored as the numbers they are made of.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _plain(leaf) for path, leaf in leaves}


def _plain(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _unnamed(like: Any, named: dict[str, Any]) -> Any:
    leaves, structure = jax.tree.flatten(like)
    values = [
        jax.random.wrap_key_data(value) if _is_key(leaf) else value
        for leaf, value in zip(leaves, (named[name] for name in _named(like)), strict=True)
    ]
    return jax.tree.unflatten(structure, values)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _mismatch(stored: dict[str, tuple], expected: dict[str, tuple]) -> str:
    """The first few arrays in which two models differ, with both shapes."""
    lines = []
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            here = f"has shape {stored[name]} in the checkpoint" if name in stored else "is not in the checkpoint"
            there = f"{expected[name]} in this model" if name in expected else "not in this model"
            lines.append(f"{name} {here}, {there}")
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more
