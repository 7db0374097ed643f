"""Documents packed into rows: nothing is lost, nothing is seen that should not be, losses are those of each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from train.config import MeshConfig
from train.data.corpus import Split
from train.data.rows import Cover, Packed, best_fit
from train.sharding import make_mesh, on_mesh
from train.tasks import make_task
from train.tasks.text import Text, _cross_entropy
from train.trainer import Trainer

LENGTH = 16


def split_of(sizes, seed=0) -> Split:
    """Documents of these many tokens, their ends included; 0 is the end."""
    rng = np.random.default_rng(seed)
    documents = [np.append(rng.integers(1, 256, size - 1), 0) for size in sizes]
    return Split(np.concatenate([[0], *documents]).astype(np.uint8), np.cumsum(sizes), sum(sizes) - len(sizes))


@pytest.mark.parametrize("sizes", [[5], [16], [17], [40], [3, 9, 2, 16, 33, 1, 1, 7], list(range(1, 50))])
def test_every_token_is_predicted_once_from_the_one_before_it(sizes):
    split = split_of(sizes)
    packed = Packed(split, LENGTH)
    batch = packed.rows(np.arange(len(packed)))
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(batch, (len(packed), LENGTH))
    real = batch["where"]
    pairs = np.stack([batch["tokens"][real], batch["targets"][real]], 1)
    expected = np.stack([split.stream[:-1], split.stream[1:]], 1)
    assert sorted(map(tuple, pairs.tolist())) == sorted(map(tuple, expected.tolist()))
    np.testing.assert_array_equal(real, batch["segments"] > 0)
    for row in range(len(packed)):
        segments, positions = batch["segments"][row], batch["positions"][row]
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            np.testing.assert_array_equal(here, np.arange(here[0], here[0] + len(here)))  # side by side
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            inner = batch["targets"][row, here][:-1]
            np.testing.assert_array_equal(batch["tokens"][row, here][1:], inner)
            assert 0 not in inner  # no end within: one document each


def test_best_fit(rng):
    sizes = rng.integers(1, 17, 500)
    rows = best_fit(sizes, 32)
    filled = np.bincount(rows, weights=sizes)
    assert filled.max() <= 32 and filled.min() > 0
    assert len(filled) <= sizes.sum() / 32 + 1  # nothing but the last row is left open
    np.testing.assert_array_equal(best_fit(np.array([2, 3, 5]), 5), [1, 1, 0])


def test_windows_for_validation_cover_every_token():
    split = split_of([9, 14, 10])
    batch = Cover(split, LENGTH).rows(np.arange(len(Cover(split, LENGTH))))
    np.testing.assert_array_equal(batch["targets"][batch["where"]], split.stream[1:])
    np.testing.assert_array_equal(batch["tokens"][batch["where"]], split.stream[:-1])
    assert batch["where"].sum(1).tolist() == [16, 16, 1]


@pytest.fixture
def packing(tiny, replaced):
    return lambda **values: replaced(tiny, {"data.pack": True, **values})


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_losses_in_a_packed_row_are_those_of_each_document_alone(positions, packing):
    sizes = [3, 9, 2, 16, 33, 1, 4, 7, 12, 5]
    split = split_of(sizes)
    model = make_task(packing(**{"model.positions": positions, "data.context": LENGTH})).make_model(nnx.Rngs(0))
    packed = Packed(split, LENGTH)
    batch = packed.rows(np.arange(len(packed)))
    losses = jax.jit(lambda batch: _cross_entropy(model, batch))(batch)

    def alone(tokens, targets):
        """The document in a row of its own, at its beginning."""
        pad = (0, LENGTH - len(tokens))
        logits = forward(np.pad(tokens, pad)[None])
        return optax.softmax_cross_entropy_with_integer_labels(logits, np.pad(targets, pad)[None])[0, : len(tokens)]

    forward = jax.jit(lambda tokens: model(tokens))
    compared = 0
    for row, segments in enumerate(batch["segments"]):
        for number in range(1, segments.max() + 1):
            here = segments == number
            expected = alone(batch["tokens"][row, here], batch["targets"][row, here])
            np.testing.assert_allclose(losses[row, here], expected, rtol=2e-6, atol=2e-6)
            compared += here.sum()
    assert compared == sum(sizes)
    assert packed._bounds[-1] > len(packed)  # documents do share rows


def test_no_document_sees_another(packing):
    task = make_task(packing(**{"data.context": LENGTH}))
    model = task.make_model(nnx.Rngs(0))
    packed = Packed(split_of([6, 9, 5, 3, 7]), LENGTH)
    batch = packed.rows(np.arange(len(packed)))
    losses = jax.jit(lambda batch: _cross_entropy(model, batch))
    before = losses(batch)
    assert batch["segments"][0].max() > 1
    for number in range(int(batch["segments"][0].max()) + 1):  # and padding, which is segment 0
        here = batch["segments"][0] == number
        if not here.any():
            continue
        tokens = batch["tokens"].copy()
        tokens[0, here] = (tokens[0, here] + 1) % 256
        after = losses({**batch, "tokens": tokens})
        np.testing.assert_array_equal(after[0, ~here], before[0, ~here])  # bit for bit
        assert (after[0, here] != before[0, here]).all()


def test_padding_is_not_learned(packing):
    task = make_task(packing(**{"data.context": LENGTH}))
    model = task.make_model(nnx.Rngs(0))
    packed = Packed(split_of([10, 13]), LENGTH)
    batch = packed.rows(np.arange(2))
    value = task.loss(model, batch)
    losses = np.asarray(_cross_entropy(model, batch))
    assert float(value) == pytest.approx(losses[batch["where"]].mean(), rel=1e-6)
    other = {**batch, "targets": np.where(batch["where"], batch["targets"], 77)}
    assert float(task.loss(model, other)) == float(value)


def test_bits_per_byte_of_packed_validation(packing):
    config = packing()
    task = make_task(config)
    trainer = Trainer(task, config, make_mesh(MeshConfig()))
    state = trainer.init()
    score = trainer.evaluate(state, task.validation_batches())
    everything = task.validation()
    losses = jax.jit(_cross_entropy)(trainer.model(state.params, state.rest), everything)
    bits = float(jnp.where(everything["where"], losses, 0).sum()) / np.log(2)
    held_out = task.dataset.validation
    assert everything["where"].sum() == len(held_out.stream) - 1
    assert score["bits_per_byte"] == pytest.approx(bits / (held_out.text_bytes + len(held_out.ends)), rel=1e-4)


def test_packed_steps_on_a_mesh(packing):
    losses = []
    for mesh_config in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        config = packing(mesh=mesh_config)
        task, mesh = make_task(config), make_mesh(mesh_config)
        trainer = Trainer(task, config, mesh)
        state, batches = trainer.init(), task.step_batches()
        with on_mesh(mesh):
            for step in range(3):
                state, metrics = trainer.train_step(state, trainer.put(batches[step]))
                losses.append(float(metrics["loss"]))
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)


def test_a_mixer_that_looks_past_the_mask_is_refused(packing):
    with pytest.raises(ValueError, match=r"--data.pack: the mixer 'cca' mixes tokens by more than attention"):
        Text(packing(mixer="cca"))
