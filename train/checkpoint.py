"""Checkpoints: saved in the background, whole or not at all, and checked when they are read."""

import asyncio
import contextlib
import copy
import logging
import shutil
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from train.trainer import TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax reports every step of its work, and what it raises too


_REMOVED = "removed"
"""Beside the checkpoints: those that are being deleted."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `last` newest, and the `best` of those that were validated."""

    last: int
    best: int


class Checkpoints:
    """The checkpoints of a run, `folder/STEP` each.

    One holds four items: `model` (parameters, random streams, the average of parameters if there is one), `optimizer`
    (its state and the step), `data` (the position of the training data) and `about` (configuration, data fingerprint,
    versions); and, where the model was validated after that step, `metrics`, its quality. Several processes write their
    parts into the same folder; every one of them must make each call.

    keep: what stays when more is saved; None for reading alone. Writing first removes what killed runs left unfinished.
    """

    def __init__(self, folder: Path, keep: Keep | None = None):
        self.folder = Path(folder).absolute()
        handlers = {
            "model": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "data": ocp.JsonCheckpointHandler(),
            "about": ocp.JsonCheckpointHandler(),
        }
        self._open = contextlib.ExitStack()
        if keep is not None:
            self._open.enter_context(_own_loops())  # for the threads that write
            self._discard()
        self._manager = ocp.CheckpointManager(self.folder, options=_options(keep), item_handlers=handlers)
        self._aside = self._open.enter_context(futures.ThreadPoolExecutor(1))
        self._begun: futures.Future[Any] | None = None

    def steps(self) -> list[int]:
        """The steps there are complete checkpoints of, in order; one that is being saved counts."""
        return sorted(self._settled().all_steps())

    def best(self) -> tuple[int, float] | None:
        """(step, quality) of the best validated checkpoint, None if there is none."""
        manager = self._settled()
        step = manager.best_step()
        return None if step is None else (step, _quality(manager.metrics(step)))

    def save(
        self, step: int, state: TrainState, data: grain.DatasetIterator, about: dict[str, Any], quality: float | None = None
    ) -> None:
        """Starts saving; training may go on. `wait` makes sure that it is on disk.

        quality: by the validation after this step, if there was one; higher is better. Raises OSError if the save before this
        one could not be written, or this one could not be begun (with one process, the next `save` or `wait` says so); the
        checkpoints before stay as they are.
        """
        self.wait()  # so that a kill costs no more than what came after the save before, and one copy of the state is held
        model, optimizer = (_named(part) for part in _parts(state))
        position = copy.deepcopy(data.get_state())
        alone = jax.process_count() == 1
        if alone:
            model, optimizer = _copied((model, optimizer))

        def begin() -> None:
            self._manager.save(
                step,
                metrics=None if quality is None else {"quality": quality},
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model),
                    optimizer=ocp.args.StandardSave(optimizer),
                    data=ocp.args.JsonSave(position),
                    about=ocp.args.JsonSave(about),
                ),
                force=True,
            )

        with self._writing():
            self._aside.submit(self._discard)
            if alone:
                # Orbax starts a dozen threads and waits for each, a tenth of a second for small models.
                self._begun = self._aside.submit(begin)
            else:  # all processes have to talk to each other in the same order
                begin()

    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises OSError if it could not be written."""
        with self._writing():
            self._check()
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends as `wait` does, and reads and writes no more."""
        with self._open, self._writing():
            try:
                self._check()
            finally:
                self._manager.close()
                self._discard()

    def _settled(self) -> ocp.CheckpointManager:
        """The manager, once it knows of every save."""
        if self._begun is not None:
            futures.wait([self._begun])
        return self._manager

    def _check(self) -> None:
        """Raises what the beginning of the last save raised, once."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()

    def _discard(self) -> None:
        """Deletes what was set aside. A folder that a kill left half deleted must not look like a checkpoint, so those that
        do not stay are renamed first."""
        if jax.process_index() == 0:
            for folder in (self.folder / _REMOVED).glob("*"):
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns whatever a failed write raises into one paragraph."""
        try:
            yield
        except jax.errors.JaxRuntimeError:
            raise  # another process is gone
        except Exception as error:
            steps = checkpoint_steps(self.folder)
            left = f"the one of step {steps[-1]} is whole" if steps else "there is none before it"
            free = shutil.disk_usage(self.folder).free / 2**20
            raise OSError(
                f"a checkpoint could not be written to {self.folder} ({_first_line(error)}; {free:,.0f} MB are free there). "
                f"Nothing else was touched: {left}; make room and go on with --resume"
            ) from error

    def about(self, step: int) -> dict[str, Any]:
        """What the checkpoint says about its run."""
        with _reading(self.folder / str(step)):
            return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def restore(self, step: int, like: TrainState, shardings: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The state after `step`, bit for bit, on whatever mesh and processes wrote it; `data` is put where it was.

        like: shapes and dtypes. Raises ValueError if the checkpoint is damaged, of another model or of an older format.
        """
        _check_format(self.folder / str(step))
        parts = [
            self._restore(step, item, part, places)
            for item, part, places in zip(("model", "optimizer"), _parts(like), _parts(shardings), strict=True)
        ]
        with _reading(self.folder / str(step)):
            data.set_state(self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore()))["data"])
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


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints in a folder, in order: a folder has its name only once it is whole."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def _options(keep: Keep | None) -> ocp.CheckpointManagerOptions:
    if keep is None:
        return ocp.CheckpointManagerOptions(read_only=True, create=False, best_fn=_quality)
    policies = ocp.checkpoint_managers
    best = policies.BestN(get_metric_fn=_quality, n=keep.best, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        best_fn=_quality,
        preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep.last), best]),
        cleanup_tmp_directories=True,
        todelete_subdir=_REMOVED,
        enable_async_checkpointing=True,
    )


def _quality(metrics: dict[str, float]) -> float:
    return metrics["quality"]


def _check_format(folder: Path) -> None:
    """Raises ValueError for a checkpoint with a position in the data for each process, as they once were."""
    if any((folder / "data").glob("process_*-of-*.json")):
        raise ValueError(
            f"checkpoint {folder} is of an older format: it has a position in the data for each process, which this version "
            "does not go on from. Its model is of use as it is, to `attnzoo generate` and `attnzoo export`; to train on, take "
            "the version of attnzoo that began the run, or begin a new one"
        )


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns whatever Orbax raises over a damaged checkpoint into one paragraph."""
    try:
        with _own_loops():
            yield
    except Exception as error:
        others = [step for step in checkpoint_steps(folder.parent) if str(step) != folder.name]
        fallback = (
            f"delete or move that folder away to go on from step {others[-1]}"
            if others
            else "there is no other checkpoint of this run"
        )
        raise ValueError(
            f"checkpoint {folder} cannot be read, it is truncated or damaged ({_first_line(error)}); {fallback}"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "").partition(". See full")[0][:160] or type(error).__name__


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that ends what it began before it is closed.

    Orbax reads and writes all arrays at once, stops at the first that fails, and closes the loop over the others. Each of
    them would then say so on stderr, with a traceback: at once, or whenever the garbage collector comes to it.
    """

    def close(self) -> None:
        if not self.is_closed() and not self.is_running():
            self.run_until_complete(self._ended())
        super().close()

    async def _ended(self) -> None:
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


@contextlib.contextmanager
def _own_loops() -> Iterator[None]:
    """Within it new event loops are ours, in every thread.

    Orbax makes its loops by `asyncio.new_event_loop` and takes none from us; the policies of asyncio, which were the way to
    change what that makes, end with Python 3.14.
    """
    before = asyncio.new_event_loop
    asyncio.new_event_loop = asyncio.events.new_event_loop = _Loop
    try:
        yield
    finally:
        asyncio.new_event_loop = asyncio.events.new_event_loop = before


def _copied(tree: Any) -> Any:
    """The arrays in the memory of the host: the next step writes over those it was given."""
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()
    return jax.tree.map(np.array, tree)


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
