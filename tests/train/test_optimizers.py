"""Schedules, optimizers against their formulas, and the average of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attnzoo.nn.linear import named
from train.config import Config, MeshConfig
from train.optimizers import _matrix_axes, averaged, learning_rate, make_optimizer
from train.sharding import make_mesh
from train.tasks import make_task
from train.trainer import Trainer


@pytest.fixture
def rates(replaced):
    def of(**options):
        values = {"steps": 100, "optimizer.learning_rate": 1.0, "optimizer.warmup": 0.2}
        config = replaced(Config(), {**values, **{f"optimizer.{name}": value for name, value in options.items()}})
        return np.array([float(learning_rate(config)(count)) for count in range(100)])

    return of


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_every_schedule_warms_up_to_the_peak(schedule, rates):
    found = rates(schedule=schedule)
    np.testing.assert_allclose(found[:20], np.arange(1, 21) / 20, rtol=1e-6)
    assert found.max() == pytest.approx(1.0)
    assert rates(schedule=schedule, warmup=0.0)[0] == pytest.approx(1.0, rel=0.02)


def test_schedules_after_the_peak(rates):
    last = Config().optimizer.final_fraction
    cosine, linear, wsd = (rates(schedule=name)[19:] for name in ("cosine", "linear", "wsd"))
    place = np.arange(81) / 80
    np.testing.assert_allclose(cosine, last + (1 - last) * (1 + np.cos(np.pi * place)) / 2, rtol=1e-5)
    np.testing.assert_allclose(linear, 1 - (1 - last) * place, rtol=1e-5)
    np.testing.assert_allclose(wsd, np.minimum(1, 1 - (1 - last) * (place - 0.75) * 4), rtol=1e-5)
    assert set(rates(schedule="constant")[19:]) == {1.0}
    np.testing.assert_allclose(rates(schedule="wsd", cooldown=0.4)[59:], np.linspace(1, last, 41), rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_only_matrices_decay(scan_layers, name, tiny, replaced):
    values = {"model.scan_layers": scan_layers, "model.num_layers": 2}
    config = replaced(tiny, {**values, "optimizer.weight_decay": 0.5, "optimizer.name": name})
    trainer = Trainer(make_task(config), config, make_mesh(MeshConfig()))
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), trainer.abstract.params)
    optimizer, rate = make_optimizer(config), learning_rate(config)(0)
    updates = jax.jit(lambda ones: optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)[0])(ones)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        decays = "scale" not in jax.tree_util.keystr(path)
        np.testing.assert_allclose(update, -rate * 0.5 * decays, rtol=1e-5, err_msg=str(path))


def first_update(config: Config, params: nnx.State, gradients: nnx.State) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(config)
    updates = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, gradients)
    return {name: np.asarray(variable[...]) for name, variable in updates.items()}


@pytest.fixture
def parameters(rng):
    """(parameters, gradients small enough not to be clipped)."""
    names = {
        "matrix": ((8, 12), ("embed", "mlp")),
        "heads": ((8, 3, 4), ("embed", "heads", "head_dim")),
        "out": ((3, 4, 8), ("heads", "head_dim", "embed")),
        "scanned": ((2, 8, 12), ("layers", "embed", "mlp")),
        "vocab": ((16, 8), ("vocab", "embed")),
        "scale": ((8,), (None,)),
    }

    def draw(size):
        arrays = {name: size * rng.normal(size=shape).astype(np.float32) for name, (shape, _) in names.items()}
        return nnx.State({name: nnx.Param(jnp.asarray(a), **named(*names[name][1])) for name, a in arrays.items()})

    return draw(1.0), draw(1e-3)


@pytest.fixture
def by(replaced):
    """A configuration whose first update has the learning rate 1 and no decay."""
    values = {"optimizer.learning_rate": 1.0, "optimizer.warmup": 0.0, "optimizer.schedule": "constant"}
    return lambda name: replaced(Config(), {**values, "optimizer.weight_decay": 0.0, "optimizer.name": name})


def test_lion_takes_the_sign_and_sgd_the_gradient(parameters, by):
    params, gradients = parameters
    lion, sgd = (first_update(by(name), params, gradients) for name in ("lion", "sgd"))
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(lion[name], -np.sign(gradient[...]))
        np.testing.assert_allclose(sgd[name], -(1 + Config().optimizer.momentum) * gradient[...], rtol=1e-5)


def test_muon_turns_gradients_of_linear_maps_into_orthogonal_ones(parameters, by):
    params, gradients = parameters
    updates = first_update(by("muon"), params, gradients)
    flat = {
        "matrix": updates["matrix"],
        "heads": updates["heads"].reshape(8, 12),
        "out": updates["out"].reshape(12, 8),
        "layer 0": updates["scanned"][0],
        "layer 1": updates["scanned"][1],
    }
    for name, update in flat.items():
        assert np.sqrt(np.square(update).mean()) == pytest.approx(0.2, rel=0.15), name
        singular = np.linalg.svd(update, compute_uv=False)
        assert singular.max() < 2 * singular.min(), name  # Newton-Schulz of five steps leaves them within 0.7 to 1.2
        gradient = np.asarray(gradients["scanned" if "layer" in name else name][...])
        gradient = gradient[int(name[-1])] if "layer" in name else gradient.reshape(update.shape)
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        cosine = (update * -(u @ v)).sum() / np.linalg.norm(update) / np.sqrt(8)
        assert cosine > 0.97, name
    b1 = Config().optimizer.b1
    for name in ("vocab", "scale"):  # the first step of Adam with Nesterov's momentum
        np.testing.assert_allclose(updates[name], -(1 + b1 / (1 + b1)) * np.sign(gradients[name][...]), rtol=1e-2)


def test_what_muon_takes_for_a_linear_map():
    def axes(*names):
        variable = nnx.Param(jnp.zeros((2,) * len(names)), **named(*names))
        found = jax.tree.leaves(_matrix_axes(nnx.State({"w": variable})), is_leaf=lambda leaf: hasattr(leaf, "reduction_axis"))
        return tuple(found[0]) if found else None

    assert axes("embed", "mlp") == ((0,), (1,))
    assert axes("embed", "heads", "head_dim") == ((0,), (1, 2))
    assert axes("layers", "heads", "head_dim", "embed") == ((1, 2), (3,))
    assert axes(None, "heads", "head_dim") == ((0,), (1, 2))
    assert axes(None, "mlp", "embed") == ((1,), (2,))  # experts
    assert axes("embed", None, "head_dim") == ((0,), (1, 2))
    for vector in (("embed",), ("layers", None), ("heads", "head_dim"), ("vocab", "embed"), ("embed", "vocab")):
        assert axes(*vector) is None


@pytest.mark.parametrize("name", ["lion", "muon", "sgd"])
def test_every_optimizer_learns(name, tiny, replaced):
    rate = {"lion": 1e-3, "muon": 6e-3, "sgd": 3e-2}[name]
    config = replaced(tiny, {"optimizer.name": name, "optimizer.learning_rate": rate, "steps": 25, "optimizer.schedule": "wsd"})
    task = make_task(config)
    trainer = Trainer(task, config, make_mesh(MeshConfig()))
    state, data, losses = trainer.init(), iter(task.batches()), []
    for _ in range(25):
        state, metrics = trainer.train_step(state, trainer.put(next(data)))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < losses[0] - 0.3, losses


def test_the_average_of_parameters():
    params = [jnp.array(float(i)) for i in range(2000)]
    ema = params[0]
    for step in range(1, 4):
        ema = averaged(ema, params[step], jnp.array(step), 0.999)
    by_hand = 0.0
    for step in range(1, 4):
        d = (1 + step) / (10 + step)
        by_hand = d * by_hand + (1 - d) * step
    assert float(ema) == pytest.approx(by_hand, rel=1e-6)
    assert float(averaged(params[0], params[1], jnp.array(10**6), 0.999)) == pytest.approx(0.001, rel=1e-3)


def test_clipping(parameters, by, replaced):
    params, gradients = parameters
    large = jax.tree.map(lambda g: 1e4 * g, gradients)
    updates = first_update(replaced(by("sgd"), {"optimizer.clip": 0.5, "optimizer.momentum": 0.0}), params, large)
    assert float(optax.tree.norm(updates)) == pytest.approx(0.5, rel=1e-5)
