"""Folding attention: narrower sub-tokens, lifted masks, and what that costs."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from attnzoo.core.cache import cache_bytes
from attnzoo.core.cells import Geometry
from attnzoo.core.masks import Array, Blocks, Causal, Lengths, Mask, Segments, SlidingWindow, Stripes
from attnzoo.core.positions import RoPE, grid_positions
from attnzoo.costs import evaluate, sizes
from attnzoo.nn.feed_forward import MLP
from attnzoo.nn.linear import QKV, parameter_count
from attnzoo.zoo.projections.folding_attention import (
    PAPER,
    Folded,
    FoldedBlock,
    FoldingAttention,
    FoldingFFN,
    StreamingChunks,
    fold_tokens,
    folding_counts,
    streaming_chunk_mask,
    unfold_tokens,
)
from attnzoo.zoo.projections.transformer import MultiHeadAttention

B, T, D, N, F = 2, 6, 16, 4, 2
run = nnx.jit(lambda mixer, x, **options: mixer(x, **options))
prefill = nnx.jit(lambda mixer, x, cache: mixer.prefill(x, cache))


def build(factor=F, bias=True, **options):
    mixer = FoldingAttention(D, N, factor=factor, rngs=nnx.Rngs(0), **options)
    if bias and factor > 1:
        mixer.subtoken_bias[...] = jax.random.normal(jax.random.key(7), mixer.subtoken_bias.shape)
    return mixer


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)


# --- folding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_unfolding_folds_back(x, factor):
    z = fold_tokens(x, factor)
    assert z.shape == (B, T * factor, D // factor)
    np.testing.assert_array_equal(unfold_tokens(z, factor), x)
    for i in range(factor):  # channels are split, not time
        np.testing.assert_array_equal(z[:, 3 * factor + i], x[:, 3, i * D // factor : (i + 1) * D // factor])


@pytest.mark.parametrize(("factor", "strict"), [(2, False), (4, False), (2, True)])
def test_it_is_the_equations(x, factor, strict):
    mixer = build(factor, causal=True, positions=RoPE(), strict_subtoken_causal=strict)
    got = run(mixer, x)
    d, heads = D // factor, max(1, N // factor)
    width = d // heads
    p = {".".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in nnx.to_flat_state(nnx.state(mixer))}
    for row in range(B):
        z = np.asarray(x[row], np.float64).reshape(T, factor, d) + p["subtoken_bias"]
        q, k, v = (np.einsum("tid,dnh->tinh", z, p[f"qkv.{name}.kernel"]) for name in ("query", "key", "value"))

        def rotated(a, width=width):
            angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, width, 2) / width)  # of tokens
            cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
            left, right = a[..., : width // 2], a[..., width // 2 :]
            return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

        q, k = rotated(q), rotated(k)
        y = np.zeros((T, factor, d))
        for t in range(T):
            for i in range(factor):
                seen = [(s, j) for s in range(t + 1) for j in range(factor) if not strict or (s, j) <= (t, i)]
                for n in range(heads):
                    logits = np.array([q[t, i, n] @ k[s, j, n] for s, j in seen]) / np.sqrt(width)
                    w = np.exp(logits - logits.max())
                    o = sum(a * v[s, j, n] for a, (s, j) in zip(w / w.sum(), seen, strict=True))
                    y[t, i] += o @ p["out.kernel"][n]
        np.testing.assert_allclose(got[row], y.reshape(T, D), atol=1e-5)


def test_a_factor_of_one_is_the_plain_layer(x):
    for options in ({}, {"causal": True, "positions": RoPE()}):
        plain = MultiHeadAttention(D, N, rngs=nnx.Rngs(0), **options)
        np.testing.assert_array_equal(run(FoldingAttention(D, N, factor=1, rngs=nnx.Rngs(0), **options), x), run(plain, x))
    np.testing.assert_array_equal(FoldingFFN(D, 32, factor=1, rngs=nnx.Rngs(0))(x), MLP(D, 32, rngs=nnx.Rngs(0))(x))


def test_folded_projections_are_block_diagonal_ones(x):
    """With W = I_F ⊗ W_f the unfolded projections are those of the sub-tokens, side by side."""
    folded, plain = QKV(D // F, N // F, rngs=nnx.Rngs(0)), QKV(D, N, rngs=nnx.Rngs(1))
    for name in ("query", "key", "value"):
        w_f = getattr(folded, name).kernel[...].reshape(D // F, D // F)
        getattr(plain, name).kernel[...] = jnp.kron(jnp.eye(F), w_f).reshape(D, N, D // N)
    for ours, theirs in zip(folded(fold_tokens(x, F)), plain(x), strict=True):
        np.testing.assert_allclose(unfold_tokens(ours.reshape(B, T * F, -1), F), theirs.reshape(B, T, D), atol=1e-5)


def test_ffn_is_one_network_for_all_slices(x):
    ffn = FoldingFFN(D, 32, factor=F, rngs=nnx.Rngs(0))
    half = D // F
    expected = jnp.concatenate([ffn.mlp(x[..., :half]), ffn.mlp(x[..., half:])], axis=-1)
    np.testing.assert_allclose(ffn(x), expected, atol=1e-6)


# --- who sees whom ---------------------------------------------------------------------------------------


def test_a_token_sees_all_its_sub_tokens_and_nothing_ahead(x):
    mixer, last = build(causal=True), slice(D // F, D)
    y = run(mixer, x)
    changed = run(mixer, x.at[:, 3, last].add(1.0))
    np.testing.assert_array_equal(changed[:, :3], y[:, :3])
    assert not np.allclose(changed[:, 3, : D // F], y[:, 3, : D // F], atol=1e-3)
    strict = build(causal=True, strict_subtoken_causal=True)
    y, changed = run(strict, x), run(strict, x.at[:, 3, last].add(1.0))
    np.testing.assert_array_equal(changed[:, 3, : D // F], y[:, 3, : D // F])
    assert not np.allclose(changed[:, 3, last], y[:, 3, last], atol=1e-3)


@pytest.mark.parametrize(
    "inner",
    [
        Causal(),
        Causal() & SlidingWindow(2),
        ~SlidingWindow(3),
        Lengths(jnp.array([3, T])),
        Segments(jnp.array([0, 0, 1, 1, 1, 2])),
        Array(jnp.asarray(np.random.default_rng(0).random((B, 1, T, T)) < 0.5)),
        streaming_chunk_mask(2, 1),
        Blocks(jnp.array([[True, False, True], [False, True, False]]), 3, 2),
        Causal() & Blocks(jnp.asarray(np.random.default_rng(2).random((B, 1, 3, 2)) < 0.5), 2, 3),
    ],
    ids=str,
)
def test_masks_are_lifted_cell_by_cell(inner):
    lifted = np.asarray(Folded(inner, F).dense(T * F, batch=B))
    tokens = np.broadcast_to(np.asarray(inner.dense(T, batch=B)), (B, 1, T, T))
    np.testing.assert_array_equal(np.broadcast_to(lifted, (B, 1, T * F, T * F)), tokens.repeat(F, 2).repeat(F, 3))
    made = Folded(inner, F).block_map(T * F, block_q=4, block_k=3, batch=B)
    assert made.exact


def test_tiles_that_a_mask_knows_are_skipped():
    columns, f = Stripes(jnp.array([0])), Geometry(1, 1, 1, T * F, T * F)
    np.testing.assert_array_equal(Folded(columns, F).tile_states(f, 6, 4)[0, 0], [[1, 0, 0]] * 2)
    # Tiles that cut tokens through are all asked.
    np.testing.assert_array_equal(Folded(columns, F).tile_states(f, 3, 4), Mask.tile_states(columns, f, 3, 4))


@pytest.mark.parametrize("form", ["object", "array", "function"])
def test_a_mask_given_to_the_call_is_of_tokens(x, form):
    seen = jnp.asarray(np.random.default_rng(1).random((T, T)) < 0.6)
    given = {"object": Array(seen), "array": seen, "function": lambda b, h, q, k: seen[q, k]}[form]
    mixer = build()
    narrow = FoldingAttention(D // F, N // F, factor=1, rngs=nnx.Rngs(0))  # the same matrices
    expected = run(narrow, mixer._fold(x), mask=seen.repeat(F, 0).repeat(F, 1))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x, mask=given))(mixer, x), unfold_tokens(expected, F), atol=1e-5)


def test_positions_are_those_of_tokens(x):
    mixer = build(causal=True, positions=RoPE())
    at = jnp.arange(T)
    np.testing.assert_allclose(run(mixer, x, positions=at), run(mixer, x), atol=1e-6)
    np.testing.assert_allclose(run(mixer, x, positions=at + 100), run(mixer, x), atol=1e-4)  # RoPE is relative
    back = at[::-1]
    np.testing.assert_allclose(run(mixer, x[:, ::-1], positions=back)[:, ::-1], run(mixer, x), atol=1e-5)
    grid = build(positions=RoPE(axes=2))
    moved = grid(x, positions=grid_positions(2, 3) + 5)
    np.testing.assert_allclose(moved, grid(x, positions=grid_positions(2, 3)), atol=1e-4)
    assert not np.allclose(moved, grid(x, positions=grid_positions(3, 2)), atol=1e-3)


def test_sub_tokens_are_told_apart_by_their_bias(x):
    permuted = x.reshape(B, T, F, -1)[:, :, ::-1].reshape(x.shape)

    def swapped(y):
        return y.reshape(B, T, F, -1)[:, :, ::-1].reshape(y.shape)

    pure = build(bias=False, causal=True, positions=RoPE())
    assert not pure.subtoken_bias[...].any()
    np.testing.assert_allclose(run(pure, permuted), swapped(run(pure, x)), atol=1e-6)
    biased = build(causal=True, positions=RoPE())
    assert not np.allclose(run(biased, permuted), swapped(run(biased, x)), atol=1e-2)


# --- streaming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1])
def test_streaming_by_chunks_is_the_full_forward(rng, left):
    x = jnp.asarray(rng.normal(size=(B, 7, D)), jnp.float32)  # the last chunk is shorter
    mixer = build(streaming=(2, left), positions=RoPE())
    full = run(mixer, x)
    plain = build(positions=RoPE())
    np.testing.assert_allclose(full, run(plain, x, mask=streaming_chunk_mask(2, left)), atol=1e-6)
    cache, outputs = mixer.init_cache(B, 7), []
    for first in (0, 2, 4, 6):
        y, cache = prefill(mixer, x[:, first : first + 2], cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)


def test_streaming_goes_on_at_the_ends_of_chunks(x):
    mixer = build(streaming=(2, 1))
    _, cache = prefill(mixer, x[:, :3], mixer.init_cache(B, T))
    with pytest.raises(ValueError, match=r"x: streaming goes on where a chunk of 2 tokens ends.*had \[3, 3\]"):
        mixer.prefill(x[:, 3:], cache)
    with pytest.raises(ValueError, match=r"x: tokens see to the end of their chunk of 2"):
        mixer.step(x[:, 3:4], cache)
    # What sees nothing ahead goes on anywhere.
    for options in ({"causal": True}, {"strict_subtoken_causal": True}):
        mixer = build(streaming=(2, 1), **options)
        cache, outputs = mixer.init_cache(B, 3), []
        for t in range(3):
            y, cache = mixer.step(x[:, t : t + 1], cache)
            outputs.append(y)
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), run(mixer, x[:, :3]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "size", "room"), [({}, 2, 4), ({}, 4, 6), ({"causal": True}, 1, 4), ({"causal": True}, 3, 6)]
)
def test_a_rolling_cache_serves_a_stream_without_end(rng, options, size, room):
    """`room` tokens are the least that pieces of `size` need, of which each sees its chunk of 2 and the one before."""
    length = 24
    x = jnp.asarray(rng.normal(size=(B, length, D)), jnp.float32)
    mixer = build(streaming=(2, 1), positions=RoPE(), **options)
    cache, outputs = mixer.init_cache(B, room, rolling=True), []
    sizes = jax.tree.map(jnp.shape, cache)
    for first in range(0, length, size):
        y, cache = prefill(mixer, x[:, first : first + size], cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), run(mixer, x), atol=1e-5)
    assert jax.tree.map(jnp.shape, cache) == sizes and cache.slots == room * F
    with pytest.raises(ValueError, match=f"x: a rolling cache of {room} tokens takes {size} at a time, got {size + 1}"):
        jax.eval_shape(lambda: mixer.prefill(x[:, : size + 1], cache))


def test_streaming_mask():
    t = np.arange(9)
    chunk = t // 3
    expected = (chunk[:, None] >= chunk) & (chunk[:, None] - chunk <= 1)
    np.testing.assert_array_equal(streaming_chunk_mask(3, 1).dense(9)[0, 0], expected)
    both = build(streaming=(3, 1), causal=True)._mask(None).inner
    np.testing.assert_array_equal(both.dense(9)[0, 0], expected & (t[:, None] >= t))


# --- costs -----------------------------------------------------------------------------------------------


def multiply_adds(f, *args):
    """Of all matrix products of a function, from the shapes in its jaxpr."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                contracted = [eqn.invars[0].aval.shape[a] for a in eqn.params["dimension_numbers"][0][0]]
                total += eqn.outvars[0].aval.size * int(np.prod(contracted))
            for inner in jaxprs_in_params(eqn.params):
                total += count(getattr(inner, "jaxpr", inner))
        return total

    return count(jax.make_jaxpr(f)(*args).jaxpr)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_counts(factor):
    length, hidden = 4, 32
    counts = folding_counts(D, hidden, factor, length, dtype=jnp.float32)
    mixer = FoldingAttention(D, N, factor=factor, backend="dense", rngs=nnx.Rngs(0))
    ffn = FoldingFFN(D, hidden, factor=factor, use_bias=False, rngs=nnx.Rngs(0))
    bias = D if factor > 1 else 0
    assert parameter_count(mixer) - bias == counts["attention parameters"] == 4 * D**2 // factor**2
    assert parameter_count(ffn) == counts["ffn parameters"] == 2 * D * hidden // factor**2
    x = jnp.zeros((1, length, D))
    of_attention = counts["projection multiply-adds"] + counts["score and value multiply-adds"]
    assert multiply_adds(mixer, x) == of_attention
    assert multiply_adds(ffn, x) == counts["ffn multiply-adds"]
    values = {**sizes(D=D, N=N, T=length), "f": factor}
    assert evaluate(PAPER.costs["multiply-adds of projections"], values) == counts["projection multiply-adds"]
    assert evaluate(PAPER.costs["multiply-adds of scores and values"], values) == counts["score and value multiply-adds"]
    if factor > 1:
        assert evaluate(PAPER.costs["parameters"], values) == parameter_count(mixer)
    decoder = FoldingAttention(D, N, factor=factor, causal=True, rngs=nnx.Rngs(0))
    assert cache_bytes(decoder.init_cache(1, length)) == counts["cache bytes"] == 2 * D * length * 4
    assert decoder.cache_numbers_per_token() == evaluate(PAPER.costs["cache numbers per token"], values)


@pytest.mark.parametrize("factor", [2, 4])
def test_it_pays_up_to_the_break_even(factor):
    def counted(factor, length):
        mixer = FoldingAttention(D, N, factor=factor, backend="dense", rngs=nnx.Rngs(0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return multiply_adds(mixer, jnp.zeros((1, length, D)))

    even = 2 * D // factor
    assert evaluate(PAPER.costs["tokens up to which it pays"], {**sizes(), "D": D, "f": factor}) == even
    assert counted(factor, even) == counted(1, even)
    assert counted(factor, even - 1) < counted(1, even - 1)
    assert counted(factor, even + 1) > counted(1, even + 1)

    def warned(mixer, length, memory=None):
        x = jnp.zeros((1, length, D))
        given = {} if memory is None else {"memory": jnp.zeros((1, memory, D))}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            jax.eval_shape(lambda: mixer(x, **given))
        return [str(w.message) for w in caught]

    mixer = build(factor)
    assert f"here {even + 1} tokens see up to {even + 1} each, and it pays up to {even}" in warned(mixer, even + 1)[0]
    assert not warned(mixer, even) and not warned(build(1), 3 * D)
    # A stream sees its chunks alone, whatever it has been given.
    assert not warned(build(factor, streaming=(3, 0)), 3 * even)
    # Few queries save less: of a memory of S tokens, T queries pay while T S < (T + S) D / F.
    each = D // factor
    assert not warned(mixer, each // 2, each) and not warned(mixer, 2 * each, 2 * each)
    assert warned(mixer, 2 * each, 2 * each + 1)
    causal = build(factor, causal=True)
    cache = causal.init_cache(1, even + 1)
    with pytest.warns(UserWarning, match=f"here 1 tokens see up to {even + 1} each, and it pays up to {even}"):
        jax.eval_shape(lambda: causal.step(jnp.zeros((1, 1, D)), cache))


# --- blocks, bad input -----------------------------------------------------------------------------------


def test_blocks(x):
    hidden = 32
    attention, ffn = 4 * D**2, 2 * D * hidden
    for where, expected in {
        "attn": attention // 4 + D + ffn,
        "ffn": attention + ffn // 4,
        "both": (attention + ffn) // 4 + D,
    }.items():
        block = FoldedBlock(D, N, hidden, factor=2, where=where, rngs=nnx.Rngs(0))
        assert parameter_count(block) == expected + 2 * D  # and two norms
    y, _ = block(x)
    h = x + block.mixer(block.mixer_norm(x))
    np.testing.assert_allclose(y, h + block.feed_forward(block.feed_forward_norm(h)), atol=1e-5)
    low = FoldedBlock(
        D, N, hidden, mixer_args={"streaming": (2, 1)}, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    assert low.mixer.own_mask.left_chunks == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(low, nnx.Param))} == {jnp.dtype(jnp.bfloat16)}
    assert {part(x).dtype for part in (low.mixer, low.feed_forward)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FoldingAttention(D, N, factor=3, rngs=nnx.Rngs(0)), "factor: tokens of dim=16 .* divisor of it, got 3"),
        (lambda: FoldingAttention(D, N, factor=0, rngs=nnx.Rngs(0)), "factor: .* got 0"),
        (lambda: FoldingFFN(D, 33, rngs=nnx.Rngs(0)), "factor: hidden=33 .* got 2"),
        (lambda: FoldedBlock(D, N, 32, where="mlp", rngs=nnx.Rngs(0)), "unknown where 'mlp'.*attn, both, ffn"),
        (lambda: fold_tokens(jnp.zeros((2, 3, 5)), 2), "dim=5 .* got 2"),
        (lambda: unfold_tokens(jnp.zeros((2, 5, 3)), 2), "factor: 5 sub-tokens"),
        (lambda: StreamingChunks(0, 1), r"StreamingChunks\(chunk=0, left_chunks=1\)"),
        (lambda: Folded(Causal(), 2).dense(5), "Folded: T=5 and S=5 .* whole tokens of 2"),
        (lambda: FoldingAttention(24, 6, factor=4, rngs=nnx.Rngs(0)), "factor: the 6 heads .* among 4 sub-tokens"),
        (lambda: FoldingAttention(30, 10, factor=3, rngs=nnx.Rngs(0)), "factor: the 10 heads .* among 3 sub-tokens"),
        (lambda: build(strict_subtoken_causal=True), "strict_subtoken_causal: .* causal or streaming"),
        (lambda: build(streaming=(2, 1))(jnp.zeros((1, 2, D)), memory=jnp.zeros((1, 3, D))), "memory"),
        (lambda: build(streaming=(2, 1)).init_cache(1, 3, rolling=True), "rolling: .*at least the 4 tokens .* length=3"),
        (lambda: build(causal=True).init_cache(1, 9, rolling=True), "rolling: .*needs a streaming mixer"),
        (
            lambda: build().init_cache(1, 2, memory=jnp.zeros((1, 3, D)), memory_mask=jnp.ones((1, 2), bool)),
            r"memory_mask: .* memory \(1, 3, 16\) is needed: \(1, 3\), got \(1, 2\)",
        ),
        (
            lambda: FoldingAttention.like(MultiHeadAttention(D, N, rngs=nnx.Rngs(0))),
            "mixer: the matrices of MultiHeadAttention",
        ),
        (lambda: folding_counts(16, 32, 3, 4), "factor: tokens of dim=16 .* got 3"),
        (lambda: folding_counts(16, 33, 2, 4), "factor: hidden=33 .* got 2"),
        (lambda: folding_counts(16, 32, 0, 4), "factor: .* got 0"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
