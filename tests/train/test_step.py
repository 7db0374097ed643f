"""What a step may be made of without becoming another step: accumulation, precision, averages, pmap."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.config import MeshConfig
from train.loop import train
from train.metrics import read_metrics
from train.pmap import PmapTrainer, own_streams
from train.rundir import CHECKPOINTS
from train.sharding import make_mesh, on_mesh
from train.tasks import make_task
from train.tasks.text import Text
from train.trainer import Trainer


def run(trainer, steps, state=None):
    """(losses, final state) of the first steps."""
    state, data, losses = state or trainer.init(), iter(trainer.task.batches()), []
    with on_mesh(trainer.mesh):
        for _ in range(steps):
            state, metrics = trainer.train_step(state, trainer.put(next(data)))
            losses.append(float(metrics["loss"]))
    return losses, state


def trainer_of(config, cls=Trainer, task=None):
    return cls(task or make_task(config), config, make_mesh(config.mesh))


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


# --- accumulation ------------------------------------------------------------------------------------------


class Weighted(Text):
    """Tokens count by their weights, which differ much from row to row."""

    def batches(self):
        def weigh(batch):
            rows = np.arange(len(batch["tokens"]))[:, None]
            columns = np.arange(batch["tokens"].shape[1])
            return {**batch, "weight": (columns < 1 + 5 * rows).astype(np.float32)}

        return super().batches().map(weigh)

    def loss(self, model, batch):
        log_p = jax.nn.log_softmax(model(batch["tokens"]))
        losses = -jnp.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        return (losses * batch["weight"]).sum() / batch["weight"].sum()


@pytest.mark.parametrize("task", [Text, Weighted])
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(fsdp=2, data=2, tensor=2)], ids=["one", "eight"])
def test_parts_of_a_batch_make_the_step_of_the_batch(task, mesh, tiny, replaced):
    whole = trainer_of(tiny, task=task(tiny))
    config = replaced(tiny, {"accumulate": 2, "mesh": mesh})
    parts = trainer_of(config, task=task(config))
    batch = next(iter(whole.task.batches()))
    state = whole.init()
    expected = jax.jit(whole._gradients)(state.params, state.rest, whole.put(batch))
    other = parts.init()
    with on_mesh(parts.mesh):
        found = jax.jit(parts._gradients)(other.params, other.rest, parts.put(batch))
    assert float(found[2]["loss"]) == pytest.approx(float(expected[2]["loss"]), rel=1e-6)
    assert_close(found[0], expected[0], atol=1e-6)
    losses = [run(each, 3)[0] for each in (whole, parts)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_each_part_draws_its_own_dropout(tiny, replaced):
    config = replaced(tiny, {"accumulate": 4, "model.dropout_rate": 0.5})
    trainer = trainer_of(config)
    batch = next(iter(trainer.task.batches()))
    same = {name: np.repeat(values[:1], len(values), axis=0) for name, values in batch.items()}
    state = trainer.init()
    counts = [leaf for leaf in jax.tree.leaves(state.rest) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    before = int(max(jnp.max(leaf) for leaf in counts))
    after, _ = trainer.train_step(state, trainer.put(same))
    counts = [leaf for leaf in jax.tree.leaves(after.rest) if jnp.issubdtype(leaf.dtype, jnp.integer)]
    assert int(max(jnp.max(leaf) for leaf in counts)) - before >= 4


# --- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_master_weights_are_float32(optimizer, tiny, replaced):
    values = {"model.dtype": "bfloat16", "accumulate": 2, "ema": 0.99, "optimizer.name": optimizer}
    trainer = trainer_of(replaced(tiny, values))
    batch = next(iter(trainer.task.batches()))
    gradients, _, metrics = jax.eval_shape(trainer._gradients, trainer.abstract.params, trainer.abstract.rest, batch)
    state, _ = jax.eval_shape(trainer._step, trainer.abstract, batch)
    for tree in (trainer.abstract, state, gradients, metrics):
        floats = {leaf.dtype for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert floats == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(trainer._step)(trainer.abstract, batch))
    assert "bf16" in text  # and the computation is not


def test_bfloat16_learns_what_float32_learns(tiny, replaced):
    exact = run(trainer_of(tiny), 10)[0]
    rough = run(trainer_of(replaced(tiny, {"model.dtype": "bfloat16"})), 10)[0]
    np.testing.assert_allclose(rough, exact, atol=0.03)
    assert rough != exact


# --- the average of parameters -----------------------------------------------------------------------------


def test_the_average_is_what_is_evaluated(tiny, replaced):
    config = replaced(tiny, {"ema": 0.9})
    trainer, plain = trainer_of(config), trainer_of(tiny)
    losses, state = run(trainer, 6)
    expected, other = run(plain, 6)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)  # of two programs, which may round differently
    assert_close(state.params, other.params, atol=1e-7)
    batches = list(trainer.task.validation_batches())[:2]
    found = trainer.evaluate(state, batches)
    assert found == trainer.evaluate(state._replace(params=state.ema), batches)
    assert found["loss"] != plain.evaluate(other, batches)["loss"]
    assert found["loss"] == pytest.approx(plain.evaluate(other._replace(params=state.ema), batches)["loss"], rel=1e-6)


def test_the_average_is_kept_and_generated_from(tiny, replaced, tmp_path):
    from train.generate import load_model
    from train.rundir import find_checkpoint

    config = replaced(tiny, {"ema": 0.9, "steps": 6, "checkpoint.every": 3})
    train(config, tmp_path / "run")
    checkpoints, step = find_checkpoint(tmp_path / "run")
    trainer = trainer_of(config)
    state = checkpoints.restore(step, trainer.abstract, trainer.shardings, iter(trainer.task.batches()))
    middle = checkpoints.restore(3, trainer.abstract, trainer.shardings, iter(trainer.task.batches()))
    checkpoints.close()
    table = load_model(tmp_path / "run")[0].embed.table[...]
    np.testing.assert_array_equal(table, state.ema["embed"]["table"][...])
    assert not np.array_equal(table, state.params["embed"]["table"][...])
    data = iter(trainer.task.batches())
    for _ in range(3):
        next(data)
    for _ in range(3):  # goes on bit for bit
        middle, _ = trainer.train_step(middle, trainer.put(next(data)))
    assert_close(middle.ema, state.ema, atol=0)


# --- pmap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Text, Weighted])
def test_pmap_equals_jit(task, tiny, replaced):
    config = replaced(tiny, {"mesh.data": 8, "batch": 16, "ema": 0.9})
    jitted, mapped = (trainer_of(config, cls, task(config)) for cls in (Trainer, PmapTrainer))
    (expected, state), (losses, other) = run(jitted, 10), run(mapped, 10)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert int(other.step) == 10
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    batches = list(jitted.task.validation_batches())[:2]
    if task is Text:
        assert mapped.evaluate(other, batches)["loss"] == pytest.approx(jitted.evaluate(state, batches)["loss"], rel=1e-5)


def test_pmap_runs_and_resumes(tiny, replaced, tmp_path):
    values = {"mesh.data": 8, "batch": 16, "loop": "pmap", "accumulate": 2, "model.dropout_rate": 0.1}
    config = replaced(tiny, {**values, "mixer": "moh", "model.num_heads": 4, "steps": 6})
    whole = tmp_path / "whole"
    train(config, whole)
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    shutil.rmtree(broken / CHECKPOINTS / "6")
    train(config, broken, resume=True)
    a, b = ([line["train/loss"] for line in read_metrics(f / "metrics.jsonl") if "train/loss" in line] for f in (whole, broken))
    assert len(a) == 6
    assert a == b
    assert all("train/head_balance" in line for line in read_metrics(whole / "metrics.jsonl") if "train/loss" in line)


def test_devices_of_pmap_draw_their_own_dropout(tiny, replaced):
    config = replaced(tiny, {"mesh.data": 8, "model.dropout_rate": 0.5})
    trainer = trainer_of(config, PmapTrainer)
    rest = trainer.init().rest

    def draw(rest, _):
        keys = [leaf for leaf in jax.tree.leaves(own_streams(rest)) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
        return jnp.stack([jax.random.bits(key) for key in keys])

    drawn = np.asarray(jax.pmap(draw, "devices", in_axes=(None, 0))(rest, np.arange(8)))
    assert all(len(set(column)) == 8 for column in drawn.T)
    # What they hold in common afterwards is the streams they had, further on.
    after, _ = trainer.train_step(trainer.init(), trainer.put(next(iter(trainer.task.batches()))))
    for old, new in zip(jax.tree.leaves(rest), jax.tree.leaves(after.rest), strict=True):
        if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(jax.random.key_data(old), jax.random.key_data(new))
        else:
            assert (np.asarray(new) > np.asarray(old)).all()
