"""Rahmanzadehgervi et al. 2025: one visible, editable map that all information about an image pair goes through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.models.tab import TABChangeConfig, TABChangeModel
from attnzoo.zoo.control.tab import (
    TABAttention,
    TABLayer,
    change_map,
    edit_attention,
    map_supervision_loss,
    pointing_game,
)

B, P, D = 3, 5, 8
S = 1 + P
run = nnx.jit(lambda module, x, y, edit=None: module(x, y, edit=edit))
ungated = nnx.jit(lambda module, x, y, edit: module(x, y, edit=edit, edit_mode="ungated"))
logits = nnx.jit(lambda module, x, y, edit: module(x, y, edit=edit, edit_mode="logits"))
pair = nnx.jit(lambda layer, x, y, left=None, right=None: layer.pair(x, y, edit_left=left, edit_right=right))
model_of = nnx.jit(lambda model, x, y, left=None, right=None: model(x, y, edit_left=left, edit_right=right))


@pytest.fixture(scope="module")
def xy():
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32) for _ in range(2))


def moved(module, seed=3):
    """With every parameter, biases too, away from where it starts."""
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda a: a + jnp.asarray(0.5 * rng.normal(size=a.shape), a.dtype), state))
    return module


@pytest.fixture(scope="module")
def layer():
    return moved(TABLayer(D, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def attn():
    return moved(TABAttention(D, rngs=nnx.Rngs(0)))


def linear(part, x):
    return np.asarray(x, np.float64) @ np.asarray(part.kernel[...], np.float64) + np.asarray(part.bias[...], np.float64)


def layer_norm(part, x):
    x = np.asarray(x, np.float64)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * np.asarray(part.scale[...]) + np.asarray(part.bias[...])


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_attention(attn, x, y):
    """One head of ordinary attention, float64: (output before the projection, weights)."""
    a = softmax(linear(attn.query, x) @ linear(attn.key, y).swapaxes(1, 2) / np.sqrt(D))
    return a @ linear(attn.value, y), a


def after_mlp(layer, h):
    """h + MLP(LN2(h))."""
    u = linear(layer.mlp.up, layer_norm(layer.mlp_norm, h))
    return h + linear(layer.mlp.down, u / (1 + np.exp(-1.702 * u)))


# --- the layer -------------------------------------------------------------------------------------------


def test_layer_is_the_equations(layer, xy):
    x, y = (layer_norm(layer.attn_norm, tokens) for tokens in xy)
    o, a = plain_attention(layer.attn, x, y)
    gated = a[:, 0] * (1 - a[:, :1, 0])
    o[:, 0] = np.einsum("bs,bsd->bd", gated, linear(layer.attn.value, y))
    h, seen = run(layer, *xy)
    np.testing.assert_allclose(h, after_mlp(layer, linear(layer.attn.out, o)), atol=2e-5)
    np.testing.assert_allclose(seen.attention, a[:, 0], atol=1e-6)
    np.testing.assert_allclose(seen.gated, gated, atol=1e-6)
    # How much passes.
    a00 = a[:, 0, 0]
    np.testing.assert_allclose(seen.gated.sum(-1), 1 - a00, atol=1e-6)
    np.testing.assert_allclose(seen.patch_mass, (1 - a00) ** 2, atol=1e-6)
    assert (seen.patch_mass >= 0).all() and (seen.patch_mass <= 1).all()


def test_only_the_cls_row_is_gated(attn, xy):
    plain, a = plain_attention(attn, *xy)
    o, _ = run(attn, *xy)
    np.testing.assert_allclose(o[:, 1:], linear(attn.out, plain[:, 1:]), atol=2e-5)
    gate = 1 - a[:, 0, 0]
    np.testing.assert_allclose(o[:, 0], linear(attn.out, gate[:, None] * plain[:, 0]), atol=2e-5)
    alone, _ = run(attn, xy[0][:, :1], xy[1])
    np.testing.assert_allclose(alone[:, 0], o[:, 0], atol=1e-6)


def test_open_it_is_an_ordinary_cross_attention_block(xy):
    layer = moved(TABLayer(D, gate=False, skip=True, rngs=nnx.Rngs(0)))
    x, y = (layer_norm(layer.attn_norm, tokens) for tokens in xy)
    h = np.asarray(xy[0], np.float64) + linear(layer.attn.out, plain_attention(layer.attn, x, y)[0])
    np.testing.assert_allclose(run(layer, *xy)[0], after_mlp(layer, h), atol=2e-5)


def test_looking_at_the_cls_alone_says_nothing(layer, xy):
    """b_o + MLP(LN2(b_o)), for every pair."""
    silent = after_mlp(layer, np.asarray(layer.attn.out.bias[...], np.float64))
    cls = jnp.full((B, S), -1e4).at[:, 0].set(1e4)
    for h in (logits(layer, *xy, cls)[0], run(layer, *xy, jnp.zeros((B, S)))[0]):
        np.testing.assert_allclose(h[:, 0], np.broadcast_to(silent, (B, D)), atol=2e-5)
        assert np.asarray(h[:, 0]).std(axis=0).max() < 1e-6
    hidden = logits(layer, *xy, jnp.full((B, S), -jnp.inf))
    np.testing.assert_allclose(hidden[0][:, 0], np.broadcast_to(silent, (B, D)), atol=2e-5)
    assert not hidden[1].attention.any()
    # The same brought about by the tokens: queries along the first feature, which only the CLS has.
    sure = nnx.clone(layer)
    sure.attn.query.kernel[...], sure.attn.key.kernel[...] = jnp.zeros((D, D)), jnp.eye(D)
    sure.attn.query.bias[...] = jnp.zeros(D).at[0].set(1e3)
    sure.attn_norm.scale[...], sure.attn_norm.bias[...] = jnp.ones(D), jnp.zeros(D)
    y = xy[1].at[..., 0].set(-9.0).at[:, 0, 0].set(9.0)
    h, seen = run(sure, xy[0], y)
    np.testing.assert_array_equal(seen.attention[:, 0], 1)
    assert not seen.gated.any()
    np.testing.assert_allclose(h[:, 0], np.broadcast_to(silent, (B, D)), atol=2e-5)


def test_strict_lets_patches_alone_through(xy):
    attn = moved(TABAttention(D, strict=True, rngs=nnx.Rngs(0)))
    o, seen = run(attn, *xy)
    assert (seen.gated[:, 0] == 0).all()
    np.testing.assert_allclose(seen.patch_mass, seen.gated.sum(-1), atol=1e-6)
    a = seen.attention
    np.testing.assert_allclose(seen.gated[:, 1:], a[:, 1:] * (1 - a[:, :1]), atol=1e-6)
    np.testing.assert_allclose(run(attn, *xy, seen.gated)[0], o, atol=1e-6)


# --- edits -----------------------------------------------------------------------------------------------


def test_giving_back_what_was_there_changes_nothing(layer, xy):
    h, seen = run(layer, *xy)
    np.testing.assert_allclose(run(layer, *xy, seen.gated)[0], h, atol=1e-6)
    np.testing.assert_allclose(ungated(layer, *xy, seen.attention)[0], h, atol=1e-6)
    np.testing.assert_allclose(logits(layer, *xy, jnp.log(seen.attention))[0], h, atol=1e-5)


def test_output_is_linear_in_the_edited_map(attn, xy):
    edit = jnp.asarray(np.random.default_rng(1).random((B, S)), jnp.float32)
    bias = attn.out.bias[...]
    once, thrice, part, rest = (
        np.asarray(run(attn, *xy, e)[0][:, 0] - bias)
        for e in (edit, 3 * edit, edit_attention(edit, jnp.arange(S) < 3), edit_attention(edit, jnp.arange(S) >= 3))
    )
    np.testing.assert_allclose(thrice, 3 * once, atol=1e-5)
    np.testing.assert_allclose(part + rest, once, atol=1e-5)
    # One patch: its value, projected.
    patch = jnp.zeros((B, S)).at[:, 4].set(1.0)
    expected = linear(attn.out, linear(attn.value, xy[1])[:, 4])
    np.testing.assert_allclose(run(attn, *xy, patch)[0][:, 0], expected, atol=2e-5)


def test_edits_are_not_renormalised():
    weights = jnp.array([[0.1, 0.2, 0.3, 0.4]])
    np.testing.assert_allclose(edit_attention(weights, jnp.array([0, 1, 0, 1], bool)), [[0.1, 0, 0.3, 0]])
    np.testing.assert_allclose(edit_attention(weights, jnp.arange(4) == 2, 1.0), [[0.1, 0.2, 1, 0.4]])


# --- what passes -----------------------------------------------------------------------------------------


def test_nothing_of_its_own_image_goes_around(layer, xy):
    x, y = xy
    h, _ = run(layer, x, y)
    other = x.at[:, 1:].set(-x[:, 1:])
    np.testing.assert_array_equal(run(layer, other, y)[0][:, 0], h[:, 0])
    # Its CLS matters, but only as a query.
    other = x.at[:, 0].set(-x[:, 0])
    assert not np.allclose(run(layer, other, y)[0][:, 0], h[:, 0], atol=1e-3)
    blind = nnx.clone(layer)
    blind.attn.query.kernel[...] = jnp.zeros((D, D))
    np.testing.assert_array_equal(run(blind, other, y)[0][:, 0], run(blind, x, y)[0][:, 0])


def test_gradients_reach_queries_and_keys_through_the_gate(attn, xy):
    graphdef, params = nnx.split(attn)

    def passing(params):
        return nnx.merge(graphdef, params, copy=True)(*xy)[1].gated.sum()  # 1 - a_00

    gradient = jax.jit(jax.grad(passing))(params)
    for part in (gradient.query, gradient.key):
        assert np.abs(part.kernel[...]).max() > 1e-4
    assert not np.asarray(gradient.value.kernel[...]).any()


def test_sides_swap(layer, xy):
    both, over_y, over_x = pair(layer, *xy)
    swapped, over_x2, over_y2 = pair(layer, *xy[::-1])
    np.testing.assert_array_equal(swapped, both[:, ::-1])
    np.testing.assert_array_equal(over_x2.attention, over_x.attention)
    np.testing.assert_array_equal(over_y2.gated, over_y.gated)
    for side, (x, y) in enumerate((xy, xy[::-1])):
        np.testing.assert_allclose(both[:, side], run(layer, x, y)[0][:, 0], atol=4e-6)


# --- losses and measures ---------------------------------------------------------------------------------


def test_map_loss():
    changed = jnp.array([[0, 1, 0, 1], [0, 0, 0, 0]], bool)
    target = change_map(changed)
    np.testing.assert_array_equal(target, [[0, 0, 1, 0, 1], [1, 0, 0, 0, 0]])
    a = np.array([[0.2, 0.1, 0.3, 0.1, 0.3], [0.6, 0.1, 0.1, 0.1, 0.1]])
    cosines = [0.6 / (np.linalg.norm(a[0]) * np.sqrt(2)), 0.6 / np.linalg.norm(a[1])]
    np.testing.assert_allclose(map_supervision_loss(jnp.asarray(a), target), 1 - np.mean(cosines), rtol=1e-5)
    np.testing.assert_allclose(map_supervision_loss(target, target), 0, atol=1e-6)
    # Zeros on either side are worth 1 and push nothing; maps that do not count are left out.
    for weights, wanted in ((jnp.zeros((2, 5)), target), (jnp.asarray(a, jnp.float32), jnp.zeros((2, 5)))):
        value, gradient = jax.value_and_grad(map_supervision_loss)(weights, wanted)
        assert value == 1 and not gradient.any()
    counted = map_supervision_loss(jnp.asarray(a), target, where=jnp.array([True, False]))
    np.testing.assert_allclose(counted, 1 - cosines[0], rtol=1e-5)


def test_pointing_game():
    changed = jnp.array([[0, 1, 0], [1, 0, 0], [0, 0, 0]], bool)
    weights = jnp.array([[0.9, 0.0, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(pointing_game(weights, changed), 1 / 2)
    assert np.isnan(pointing_game(weights[2:], changed[2:]))


# --- the model -------------------------------------------------------------------------------------------


def test_model_sees_a_pair_only_through_its_maps():
    config = TABChangeConfig(dim=D, num_heads=2, num_layers=1, num_patches=P, channels=4, num_classes=3)
    model = moved(TABChangeModel(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.normal(size=(B, P, 4)), jnp.float32) for _ in range(2))
    found, over_right, over_left = model_of(model, left, right)
    assert found.shape == (B, 3) and found.dtype == jnp.float32
    assert found.std(axis=0).max() > 1e-3
    same = model_of(model, left, right, over_right.gated, over_left.gated)[0]
    np.testing.assert_allclose(same, found, atol=1e-5)
    nothing = jnp.zeros((B, S))
    silent = model_of(model, left, right, nothing, nothing)[0]
    assert silent.std(axis=0).max() < 1e-6
    # Both directions have to be closed.
    assert model_of(model, left, right, nothing, over_left.gated)[0].std(axis=0).max() > 1e-3
    # The sides have embeddings of their own: swapped images are another pair.
    swapped, over_left2, _ = model_of(model, right, left)
    assert not np.allclose(over_left2.attention, over_left.attention, atol=1e-3)
    assert not np.allclose(swapped, found, atol=1e-3)


def test_the_models_layers_follow_its_configuration():
    config = TABChangeConfig(dim=D, num_heads=2, num_patches=P, channels=4, strict=True, dropout_rate=0.5)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, B, P, 4)), jnp.float32)
    scanned, unrolled = (
        TABChangeModel(dataclasses.replace(config, scan_layers=scan), rngs=nnx.Rngs(0)) for scan in (True, False)
    )
    assert len(scanned.layers.runs) == 1 and unrolled.dropout.rate == 0.5
    results = []
    for model in (scanned, unrolled):
        model.eval()
        results.append(model_of(model, *images))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    assert not results[0][1].gated[:, 0].any()


def test_bfloat16(xy):
    layer = moved(TABLayer(D, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    h, seen = run(layer, *xy)
    assert h.dtype == jnp.bfloat16 and seen.attention.dtype == seen.gated.dtype == jnp.float32
    np.testing.assert_allclose(h.astype(jnp.float32), run(moved(TABLayer(D, rngs=nnx.Rngs(0))), *xy)[0], atol=0.3, rtol=0.1)


# --- bad input -------------------------------------------------------------------------------------------


def test_bad_input(attn, xy):
    x, y = xy
    with pytest.raises(ValueError, match=r"x, y: needs tokens.*got \(3, 6, 8\) and \(2, 6, 8\)"):
        attn(x, y[:2])
    with pytest.raises(ValueError, match=r"edit: needs a weight per token.*\(3, 6\); got \(3, 5\)"):
        attn(x, y, edit=jnp.zeros((B, P)))
    with pytest.raises(ValueError, match=r"unknown edit_mode 'gate'.*'gated'"):
        attn(x, y, edit=jnp.zeros((B, S)), edit_mode="gate")
    with pytest.raises(ValueError, match=r"target: needs the shape of weights, \(2, 4\); got \(2, 3\)"):
        map_supervision_loss(jnp.zeros((2, 4)), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"where: needs an entry per row, \(2,\); got \(1,\)"):
        map_supervision_loss(jnp.zeros((2, 4)), jnp.zeros((2, 4)), where=jnp.ones(1, bool))
    with pytest.raises(ValueError, match=r"changed: weights \(2, 4\).*got \(2, 4\)"):
        pointing_game(jnp.zeros((2, 4)), jnp.zeros((2, 4), bool))
    config = TABChangeConfig(dim=D, num_heads=2, num_patches=P)
    with pytest.raises(ValueError, match=r"left, right: both need \[B, P, C\] = \[B, 5, 8\], got \(3, 5, 7\)"):
        TABChangeModel(config, rngs=nnx.Rngs(0))(jnp.zeros((3, 5, 7)), jnp.zeros((3, 5, 7)))
    with pytest.raises(ValueError, match=r"positions: .*'rope'"):
        dataclasses.replace(config, positions="rope")
