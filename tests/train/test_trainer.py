"""The training step against what one would write by hand, and the optimizer's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.config import Config, MeshConfig
from train.sharding import make_mesh
from train.tasks import make_task
from train.trainer import Trainer, learning_rate, make_optimizer


def test_learning_rate(replaced):
    config = replaced(Config(), {"steps": 100, "optimizer.learning_rate": 1.0, "optimizer.warmup": 0.2})
    rates = [float(learning_rate(config)(count)) for count in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == rates[19] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(config.optimizer.final_fraction)
    assert np.all(np.diff(rates[20:]) < 0)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_only_matrices_decay(scan_layers, tiny, replaced):
    config = replaced(tiny, {"model.scan_layers": scan_layers, "model.num_layers": 2, "optimizer.weight_decay": 0.5})
    trainer = Trainer(make_task(config), config, make_mesh(MeshConfig()))
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), trainer.abstract.params)
    optimizer = make_optimizer(config)
    updates = jax.jit(lambda ones: optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)[0])(ones)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        decays = bool((update != 0).all())
        assert decays == ("scale" not in jax.tree_util.keystr(path)), path


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
