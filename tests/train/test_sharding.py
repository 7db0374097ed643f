"""Meshes: where parameters go, and that training means the same on all of them."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attnzoo import catalog
from attnzoo.core.sharding import attention_axes, divided_tokens
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.nn.linear import axis_names, named
from train.config import MeshConfig
from train.presets import preset
from train.sharding import AXES, LARGE, RULES, check_axes, describe, make_mesh, on_mesh, shardings
from train.tasks import make_task
from train.trainer import Trainer


def train(config, steps=3):
    """(losses, validation, final state) of a few steps."""
    mesh = make_mesh(config.mesh)
    task = make_task(config)
    trainer = Trainer(task, config, mesh)
    state, data = trainer.init(), iter(task.batches())
    losses = []
    with on_mesh(mesh, config.mesh.exchange):
        for _ in range(steps):
            state, metrics = trainer.train_step(state, trainer.put(next(data)))
            losses.append(float(metrics["loss"]))
    score = trainer.evaluate(state, list(task.validation_batches())[:3])
    return losses, score, state


@pytest.fixture
def eight(tiny, replaced):
    return replaced(tiny, {"model.mlp_dim": 32})


# One of each kind: plain attention, a carry through depth, factors, latents, convolutions along the sequence.
EQUAL = ["transformer", "value_residual", "tpa", "transmla", "cca"]


@pytest.mark.parametrize("mixer", [m if m in ("tpa", "cca") else pytest.param(m, marks=pytest.mark.slow) for m in EQUAL[1:]])
def test_a_mesh_does_not_change_the_loss_of_other_mixers(mixer, eight, replaced):
    config = replaced(eight, {"mixer": mixer, "model.num_layers": 2, "model.dim": 32, "model.num_heads": 4})
    one, _, _ = train(config, 8)
    many, _, _ = train(replaced(config, {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)}), 8)
    np.testing.assert_allclose(many, one, rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_layers_keep_is_divided(remat, replaced):
    """Scanned layers of images, whose weights of attention are kept: an eighth on each device, not all of it on each."""
    values = {"task": "digits", "data.name": "scikit_digits", "batch": 64, "model.dim": 64, "model.num_layers": 3,
              "model.num_heads": 8, "model.patch_size": 2, "model.scan_layers": True, "model.remat": remat}  # fmt: skip

    def temporaries(mesh):
        config = replaced(preset("vit-l"), {**values, "mesh": mesh, "model.mlp_dim": 128, "model.dtype": "float32"})
        trainer = Trainer(make_task(config), config, make_mesh(mesh))
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in next(iter(trainer.task.batches())).items()}
        with on_mesh(trainer.mesh, trainer.exchange):
            return trainer.trace(batch).lower().compile().memory_analysis().temp_size_in_bytes

    assert temporaries(MeshConfig(fsdp=8)) < temporaries(MeshConfig()) / 4


@pytest.mark.parametrize(
    ("rule", "rows", "spec"),
    [
        ({"batch": "data", "context": "context"}, 8, P("data", "context")),
        ({"batch": "data"}, 8, P("data")),
        ({"heads": "context"}, 8, P("data")),  # of rows nothing is said: they stay where they are
        ({"batch": "context", "context": "data"}, 7, P(None, "data")),
    ],
)
def test_tokens_lie_where_the_rule_says(rule, rows, spec):
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh), attention_axes(**rule):
        x = jax.device_put(np.ones((rows, 16, 4)), NamedSharding(mesh, P("data") if rows == 8 else P()))
        assert jax.jit(lambda x: divided_tokens(x * 2))(x).sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, tensor=2)], ids=["2x2x2", "4x2"])
@pytest.mark.parametrize("mixer", EQUAL)
def test_fifty_steps_on_a_mesh(mixer, mesh, eight, replaced):
    values = {"mixer": mixer, "model.num_layers": 2, "model.dim": 32, "model.num_heads": 4, "model.mlp_dim": 64, "steps": 50}
    config = replaced(eight, values)
    one, _, _ = train(config, 50)
    many, _, _ = train(replaced(config, {"mesh": mesh}), 50)
    np.testing.assert_allclose(many, one, rtol=1e-5)


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, context=2)],
    ids=["data-fsdp-tensor", "fsdp-context"],
)
def test_a_mesh_does_not_change_the_loss(mesh, eight, replaced):
    one, one_score, one_state = train(eight)
    many, many_score, many_state = train(replaced(eight, {"mesh": mesh}))
    np.testing.assert_allclose(many, one, rtol=2e-5)
    assert many_score == pytest.approx(one_score, rel=2e-5)
    for a, b in zip(jax.tree.leaves(one_state.params), jax.tree.leaves(many_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)
    kernel = many_state.params["layers"]["runs"][0]["feed_forward"]["up"]["kernel"][...]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == mesh.fsdp * mesh.tensor


def test_parameters_and_optimizer_state_are_divided_alike(eight):
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    trainer = Trainer(make_task(eight), eight, mesh)
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
        for path, sharding in jax.tree_util.tree_flatten_with_path(trainer.shardings)[0]
    }
    kernels = {path: spec for path, spec in specs.items() if "feed_forward/up/kernel" in path}
    assert len(kernels) == 3  # the parameter and Adam's two moments
    assert set(kernels.values()) == {P("fsdp", "tensor")}
    assert specs["step"] == P()


def test_what_does_not_divide_stays_whole():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    names = named("embed", "heads", "head_dim")
    params = {
        "divides": nnx.Param(np.zeros((4, 8, 3)), **names),
        "does not": nnx.Param(np.zeros((4, 6, 3)), **names),
        "has no names": nnx.Param(np.zeros((4, 8))),
        "twice the same": nnx.Param(np.zeros((4, 4)), **named("embed", "embed")),
    }
    specs = {name: jax.tree.leaves(found)[0].spec for name, found in shardings(params, mesh).items()}
    assert specs == {
        "divides": P("fsdp", "tensor", None),
        "does not": P("fsdp", None, None),
        "has no names": P(),
        "twice the same": P("fsdp", None),
    }


@pytest.mark.parametrize("mixer", catalog.mixers())
def test_every_mixer_is_divided(mixer):
    """At a real width: every name has a rule, and next to nothing stays whole on fsdp=4, tensor=2."""
    config = LMConfig(dim=512, num_layers=2, num_heads=8, positions="none", mixer=mixer)
    params = jax.eval_shape(lambda: nnx.split(DecoderLM(config, rngs=nnx.Rngs(0)), nnx.Param, ...)[1])
    variables = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    names = {name for v in variables for name in axis_names(v) or ()}
    assert names - {None} <= RULES.keys()
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(shardings(params, mesh)), strict=True)
    sizes = [(leaf.size, any(sharding.spec)) for leaf, sharding in pairs]
    whole, everything = sum(size for size, divided in sizes if not divided), sum(size for size, _ in sizes)
    assert whole < 0.01 * everything


def test_a_large_parameter_is_divided_over_fsdp_whatever_its_names():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    half = int(LARGE**0.5) // 2
    params = {
        "no rule": nnx.Param(np.zeros((4 * half, half)), **named(None, None)),
        "unnamed": nnx.Param(np.zeros((half, 4 * half))),
        "tensor alone": nnx.Param(np.zeros((4 * half, half)), **named("mlp", "head_dim")),
        "layers": nnx.Param(np.zeros((8 * half, half)), **named("layers", None)),
        "does not divide": nnx.Param(np.zeros((half + 1, 4 * half + 1)), **named(None, None)),
        "small": nnx.Param(np.zeros((half, half)), **named(None, None)),
        "by its name": nnx.Param(np.zeros((half, 4 * half)), **named("embed", None)),
    }
    specs = {name: jax.tree.leaves(found)[0].spec for name, found in shardings(params, mesh).items()}
    assert specs == {
        "no rule": P("fsdp", None),
        "unnamed": P(None, "fsdp"),
        "tensor alone": P("tensor", "fsdp"),
        "layers": P(None, "fsdp"),
        "does not divide": P(),
        "small": P(),
        "by its name": P("fsdp", None),
    }


@pytest.mark.parametrize(
    ("mesh", "params", "sequence", "words"),
    [
        (MeshConfig(tensor=8), [("fsdp",)], {"tokens"}, "--mesh.tensor: 8 devices would all hold and do the same.*heads"),
        (MeshConfig(data=4, fsdp=2), [("tensor",), ()], {"tokens"}, "--mesh.fsdp: 2 devices.*embed"),
        (MeshConfig(data=4, context=2), [("fsdp",)], set(), "--mesh.context: 2 devices.*examples have no axis of tokens"),
    ],
)
def test_an_axis_that_divides_nothing_is_refused(mesh, params, sequence, words):
    mesh = make_mesh(mesh)
    with pytest.raises(ValueError, match=words):
        check_axes([NamedSharding(mesh, P(*axes)) for axes in params], frozenset(sequence), mesh)


def test_one_device_is_the_mesh_of_ones():
    mesh = make_mesh(MeshConfig())
    assert mesh.size == 1
    assert mesh.axis_names == AXES


@pytest.fixture(scope="module")
def fifty_alone():
    """Losses of 50 steps on one device, computed once."""
    found: list[float] = []

    def of(config):
        if not found:
            found.extend(train(config, steps=50)[0])
        return found

    return of


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, tensor=2, context=2),
        pytest.param(MeshConfig(context=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=4, context=2, exchange="all_to_all"), marks=pytest.mark.slow),
    ],
    ids=describe,
)
def test_fifty_steps_with_sequences_divided(mesh, tiny, replaced, fifty_alone):
    many, *_ = train(replaced(tiny, {"mesh": mesh, "steps": 50}), steps=50)
    np.testing.assert_allclose(many, fifty_alone(replaced(tiny, {"steps": 50})), atol=1e-5, rtol=1e-5)
