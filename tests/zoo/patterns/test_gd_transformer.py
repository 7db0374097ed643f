"""Segmentation by attention in three directions under a Gaussian of distance (arXiv 1910.14537)."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention
from attnzoo.core.cache import append, cached_attention, init_cache
from attnzoo.core.masks import Causal, Lengths
from attnzoo.zoo.patterns.gd_transformer import (
    DIRECTIONS,
    BiaffineGapScorer,
    GaussianDistance,
    GaussianMaskedAttention,
    GDSegmenter,
    GDTransformerEncoder,
    gaussian_distance_weights,
    real_gaps,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

V, D, N, B, T = 9, 16, 2, 2, 8
MASKS = {"forward": np.tri(T, dtype=bool), "backward": np.tri(T, dtype=bool).T, "center": np.ones((T, T), bool)}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


@functools.cache
def mixer(direction, **options):
    return GaussianMaskedAttention(D, N, direction=direction, use_bias=True, rngs=nnx.Rngs(0), **options)


@functools.cache
def encoder(merge="add"):
    return GDTransformerEncoder(D, N, 2, mlp_dim=24, merge=merge, dropout_rate=0.0, rngs=nnx.Rngs(0))


encode = nnx.jit(lambda model, x, lengths=None: model(x, lengths))


def phi(z):
    return (1 + math.erf(z / 2**0.5)) / 2


# --- the factor ------------------------------------------------------------------------------------------


def test_factor():
    made = gaussian_distance_weights(40)
    np.testing.assert_allclose(made, [2 * phi(-d / 4) for d in range(40)], atol=1e-6)
    np.testing.assert_allclose(made[jnp.array([0, 1, 2, 4, 8])], [1, 0.802587, 0.617075, 0.317311, 0.045500], atol=1e-6)
    assert (np.diff(made) < 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_attention_is_its_definition(x, direction):
    """Multiplied after scaling and before the mask, in float64; and each direction at both ends of sigma."""
    layer = mixer(direction)
    q, k, v = (np.asarray(y, np.float64) for y in layer.qkv(x))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / (D // N) ** 0.5
    distance = np.abs(np.subtract.outer(np.arange(T), np.arange(T)))

    def expected(factor):
        s = np.where(MASKS[direction], logits * factor, -np.inf)
        w = np.exp(s - s.max(-1, keepdims=True))
        return w / w.sum(-1, keepdims=True)

    weights = layer.attention_weights(x)
    np.testing.assert_allclose(weights, expected(np.vectorize(lambda d: 2 * phi(-d / 4))(distance)), atol=1e-6)
    mixed = np.einsum("bnts,bsnh->btnh", np.asarray(weights, np.float64), v)
    out = np.einsum("btnh,nhd->btd", mixed, layer.out.kernel[...]) + layer.out.bias[...]
    np.testing.assert_allclose(layer(x), out, atol=1e-5)
    # sigma -> inf and no factor at all: ordinary attention in that direction.
    for flat in (mixer(direction, sigma=1e9), mixer(direction, gauss=False)):
        np.testing.assert_allclose(flat.attention_weights(x), expected(1.0), atol=1e-6)
    plain = GroupedQueryAttention(D, N, use_bias=True, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(mixer(direction, sigma=1e9)(x), plain(x, mask=jnp.asarray(MASKS[direction])), atol=1e-5)
    # sigma -> 0: logits off the diagonal are 0, which hides nobody.
    near = mixer(direction, sigma=1e-3).attention_weights(x)
    np.testing.assert_allclose(near, expected(distance == 0), atol=1e-6)
    assert (np.asarray(near)[..., MASKS[direction]] > 0).all()


def test_logits_at_and_below_zero():
    def weights(q, k):
        shape = (1, T, 1, 4)
        q, k = jnp.full(shape, q), jnp.full(shape, k)
        return attention(q, k, k, score=GaussianDistance(), mask=Causal(), backend="dense", return_weights=True)[1][0, 0]

    np.testing.assert_allclose(weights(0.0, 1.0), np.tri(T) / np.arange(1, T + 1)[:, None], atol=1e-6)
    assert (np.diff(weights(1.0, 1.0)[-1]) > 0).all()  # nearer tokens win
    assert (np.diff(weights(1.0, -1.0)[-1]) < 0).all()  # farther tokens win


def test_positions_and_a_cache_measure_distance_too(x):
    where = jnp.array([0, 1, 2, 5, 6, 20, 21, 22])
    spread = mixer("forward")(x, positions=where)
    q, k, v = mixer("forward").qkv(x)
    factor = np.vectorize(lambda d: 2 * phi(-abs(d) / 4))(np.subtract.outer(where, where))
    expected = attention(q, k, v, mask=Causal(), score=lambda s, b, h, q, k: s * jnp.asarray(factor, jnp.float32)[q, k])
    np.testing.assert_allclose(spread, mixer("forward").out(expected), atol=1e-5)
    # The last token over a cache that holds all of them at these positions.
    cache = append(init_cache(B, T, mixer("forward").cache_spec()), {"k": k, "v": v})
    cache = dataclasses.replace(cache, pos=jnp.broadcast_to(where, cache.pos.shape))
    at = jnp.broadcast_to(where[-1:], (B, 1))
    stepped = cached_attention(q[:, -1:], cache, q_positions=at, score=GaussianDistance())
    np.testing.assert_allclose(stepped, expected[:, -1:], atol=1e-5)


# --- directions ------------------------------------------------------------------------------------------


def test_who_is_affected_by_whom(x):
    model, at = encoder(), 3
    look = nnx.jit(lambda model, x: {d: model.norms[d](model.stacks[d](x)) for d in DIRECTIONS})
    base = look(model, x)
    later, earlier = (x.at[:, where].multiply(-1.0) for where in (slice(at + 1, None), slice(at)))
    np.testing.assert_array_equal(look(model, later)["forward"][:, : at + 1], base["forward"][:, : at + 1])
    np.testing.assert_array_equal(look(model, earlier)["backward"][:, at:], base["backward"][:, at:])
    # The merged states know all characters, through the center alone.
    f, b = encode(model, x)
    np.testing.assert_allclose(f, base["forward"] + base["center"], atol=1e-6)
    np.testing.assert_allclose(b, base["backward"] + base["center"], atol=1e-6)
    assert (abs(encode(model, later)[0] - f)[:, : at + 1].max((0, 2)) > 1e-3).all()
    assert (abs(encode(model, earlier)[1] - b)[:, at:].max((0, 2)) > 1e-3).all()


@pytest.mark.parametrize("merge", ["add", "highway"])
def test_reversal(x, merge):
    """The reversed input with forward and backward weights exchanged gives f' and b' reversed and exchanged."""
    model = encoder(merge)
    mirror = nnx.clone(model)
    for parts in (mirror.stacks, mirror.norms, *([mirror.gates] if merge == "highway" else [])):
        states = {d: jax.tree.map(jnp.array, nnx.state(parts[d])) for d in ("forward", "backward")}
        nnx.update(parts["forward"], states["backward"])
        nnx.update(parts["backward"], states["forward"])
    (f, b), (f_new, b_new) = encode(model, x), encode(mirror, x[:, ::-1])
    np.testing.assert_allclose(f_new, b[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(b_new, f[:, ::-1], atol=1e-5)
    assert abs(f - b).max() > 1e-2


def test_highway_gates(x):
    model = encoder("highway")
    f, b, c = (model.norms[d](model.stacks[d](x)) for d in DIRECTIONS)
    for side, own, made in zip(("forward", "backward"), (f, b), encode(model, x), strict=True):
        gate = jax.nn.sigmoid((own + c) @ model.gates[side].kernel[...] + model.gates[side].bias[...])
        np.testing.assert_allclose(made, gate * own + (1 - gate) * c, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding(x, direction):
    lengths = np.array([T, 5])
    weights = np.asarray(mixer(direction).attention_weights(x, mask=Lengths(lengths)))
    real = np.arange(T) < lengths[:, None]
    np.testing.assert_allclose(weights.sum(-1)[np.broadcast_to(real[:, None], (B, N, T))], 1, atol=1e-6)
    assert not weights[1, :, :, 5:].any() and np.isfinite(weights).all()
    if direction == "backward":
        assert not weights[1, :, 5:].any()
    layer = GaussianMaskedAttention(D, N, direction=direction, backend="blockwise", rngs=nnx.Rngs(0))

    def energy(x):
        out = layer(x, mask=Lengths(lengths))
        return (out[real] ** 2).sum(), out

    run = jax.jit(jax.value_and_grad(energy, has_aux=True))
    ((_, out), gradient), ((_, other), _) = run(x), run(x.at[1, 5:].set(9.0))
    np.testing.assert_array_equal(out[real], other[real])
    assert np.isfinite(gradient).all() and not gradient[1, 5:].any()


# --- gaps ------------------------------------------------------------------------------------------------


def test_gap_scores(rng):
    scorer = BiaffineGapScorer(D, 3, rngs=nnx.Rngs(0))
    scorer.pairs_bias[...] = jnp.array([0.3, -0.2, 0.1])
    f, b = (jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32) for _ in range(2))
    made = scorer(f, b)
    assert made.shape == (B, T - 1, 3)
    for t in range(T - 1):
        h, d = scorer.head(f[:, t]), scorer.tail(b[:, t + 1])
        pairs = np.einsum("bh,chd,bd->bc", h, scorer.pairs[...], d) + scorer.pairs_bias[...]
        each = np.concatenate([h, d], -1) @ scorer.each.kernel[...] + scorer.each.bias[...]
        np.testing.assert_allclose(made[:, t], pairs + each, atol=1e-5)


def test_segmenter(rng):
    model = GDSegmenter(V, D, num_heads=N, num_layers=1, rngs=nnx.Rngs(0))
    model.eval()
    characters, lengths = jnp.asarray(rng.integers(0, V, (B, T))), jnp.array([T, 5])
    run = nnx.jit(lambda model, *args: (model(*args), model.segment(*args)))
    made, ends = run(model, characters, lengths)
    np.testing.assert_allclose(made[1, :4], run(model, characters[:, :5], None)[0][1], atol=1e-5)
    np.testing.assert_array_equal(ends, np.where(np.arange(1, T) < lengths[:, None], made[..., 1] > made[..., 0], False))
    np.testing.assert_array_equal(real_gaps(lengths, T).sum(1), lengths - 1)
    assert model(characters[:, :1]).shape == (B, 0, 2)  # one character has no gap
    model.train()
    assert abs(run(model, characters, lengths)[0] - made).max() > 1e-3  # dropout


def test_segmenter_options(rng):
    """Precision reaches every part; layers may be scanned."""
    low = GDSegmenter(V, D, num_heads=N, num_layers=1, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    characters = jnp.asarray(rng.integers(0, V, (B, T)))
    assert low.embed(characters).dtype == jnp.bfloat16
    run = nnx.jit(lambda model: model(characters))
    plain, scanned = (
        run(GDSegmenter(V, D, num_heads=N, num_layers=2, dropout_rate=0.0, rngs=nnx.Rngs(0), **options))
        for options in ({}, {"scan_layers": True, "remat": "full"})
    )
    np.testing.assert_allclose(scanned, plain, atol=1e-5)


def test_bad_input(x):
    with pytest.raises(ValueError, match=r"direction 'foward'.*'forward'"):
        GaussianMaskedAttention(D, N, direction="foward", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"looks 'forward', got 'backward'"):
        GaussianMaskedAttention(D, N, causal=True, direction="backward", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sigma: must be positive, got 0"):
        GaussianDistance(0)
    with pytest.raises(ValueError, match="sigma: must be positive, got 0"):
        gaussian_distance_weights(T, 0)
    with pytest.raises(ValueError, match="memory"):
        mixer("center")(x, memory=x)
    with pytest.raises(ValueError, match="merge 'sum'"):
        GDTransformerEncoder(D, N, 1, merge="sum", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"f, b: one shape.*\(2, 8, 16\) and \(2, 7, 16\)"):
        BiaffineGapScorer(D, rngs=nnx.Rngs(0))(x, x[:, 1:])


# --- against torch ---------------------------------------------------------------------------------------


@pytest.mark.parity
def test_parity_with_torch(rng):
    torch = pytest.importorskip("torch")
    scorer = BiaffineGapScorer(D, 2, rngs=nnx.Rngs(0))
    scorer.pairs_bias[...] = jnp.array([0.3, -0.2])
    first, last, each = torch.nn.Linear(D, D), torch.nn.Linear(D, D), torch.nn.Linear(2 * D, 2)
    bilinear = torch.nn.Bilinear(D, D, 2)
    with torch.no_grad():
        for theirs, ours in ((first, scorer.head), (last, scorer.tail), (each, scorer.each)):
            theirs.weight.copy_(torch.tensor(np.array(ours.kernel[...]).T))
            theirs.bias.copy_(torch.tensor(np.array(ours.bias[...])))
        bilinear.weight.copy_(torch.tensor(np.array(scorer.pairs[...])))
        bilinear.bias.copy_(torch.tensor(np.array(scorer.pairs_bias[...])))
    f, b = (rng.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    h, d = first(torch.tensor(f[:, :-1])), last(torch.tensor(b[:, 1:]))
    out = bilinear(h, d) + each(torch.cat([h, d], -1))
    np.testing.assert_allclose(scorer(jnp.asarray(f), jnp.asarray(b)), out.detach().numpy(), atol=1e-5)
    (out**2).mean().backward()
    gradient = nnx.grad(lambda scorer: (scorer(jnp.asarray(f), jnp.asarray(b)) ** 2).mean())(scorer)
    np.testing.assert_allclose(gradient.pairs[...], bilinear.weight.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(gradient.head.kernel[...], first.weight.grad.numpy().T, atol=1e-5)
