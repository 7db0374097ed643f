"""The training step against what one would write by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.config import MeshConfig
from train.optimizers import make_optimizer
from train.sharding import make_mesh
from train.tasks import make_task
from train.trainer import Trainer


def test_a_step_is_the_one_written_by_hand(tiny):
    task = make_task(tiny)
    trainer = Trainer(task, tiny, make_mesh(MeshConfig()))
    state, data = trainer.init(), iter(task.batches())
    batches = [next(data) for _ in range(2)]

    graphdef, params = nnx.split(task.make_model(nnx.Rngs(tiny.seed)), nnx.Param)
    optimizer = make_optimizer(tiny)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            logits = nnx.merge(graphdef, params)(batch["tokens"])
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    for batch in batches:
        params, opt_state, expected = step(params, opt_state, batch)
        state, metrics = trainer.train_step(state, trainer.put(batch))
        assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_evaluation_counts_every_token_once(tiny):
    task = make_task(tiny)
    trainer = Trainer(task, tiny, make_mesh(MeshConfig()))
    state = trainer.init()
    score = trainer.evaluate(state, task.validation_batches())
    pairs = task.validation()
    logits = jax.jit(trainer.model(state.params, state.rest))(pairs["tokens"])
    bits = -jnp.take_along_axis(jax.nn.log_softmax(logits), pairs["targets"][..., None], -1)[..., 0] / np.log(2)
    assert score["bits_per_byte"] == pytest.approx(float(bits[pairs["where"]].mean()), rel=1e-4)


def test_dropout_is_off_in_evaluation(tiny, replaced):
    config = replaced(tiny, {"model.dropout_rate": 0.5})
    task = make_task(config)
    trainer = Trainer(task, config, make_mesh(MeshConfig()))
    state = trainer.init()
    batches = list(task.validation_batches())[:2]
    assert trainer.evaluate(state, batches) == trainer.evaluate(state, batches)
    batch = trainer.put(next(iter(task.batches())))
    after, first = trainer.train_step(state, batch)
    _, second = trainer.train_step(after._replace(params=trainer.init().params), batch)
    assert float(first["loss"]) != float(second["loss"])  # the random stream went on
