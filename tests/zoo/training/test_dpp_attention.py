"""Determinantal point processes over source positions, and the losses made of them."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.zoo.training.dpp_attention import (
    NONE,
    PAPER,
    ConvSeq2SeqAttention,
    attention_coverage,
    dpp_kernel,
    dpp_log_prob,
    gaussian_mixture_target,
    greedy_map_dpp,
    macro_dpp_loss,
    micro_dpp_loss,
)

macro_of_quality = jax.jit(functools.partial(macro_dpp_loss, branch="quality"))
micro_of_one = jax.jit(functools.partial(micro_dpp_loss, m=1))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def source(rng):
    """(q, e) of one sequence of 7 positions, float64."""
    return rng.random(7) + 0.2, rng.normal(size=(7, 5))


def plain_kernel(q, e):
    unit = e / np.linalg.norm(e, axis=-1, keepdims=True)
    return q[:, None] * q[None] * (unit @ unit.T)


def subset(indices, size):
    return jnp.asarray(np.isin(np.arange(size), indices))


# --- the process -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_kernel(source):
    q, e = source
    L = dpp_kernel(jnp.asarray(q), jnp.asarray(e))
    np.testing.assert_allclose(L, plain_kernel(q, e), atol=1e-12)
    np.testing.assert_allclose(L, L.T, atol=1e-15)  # products of matrices need not sum both halves in one order
    assert np.linalg.eigvalsh(L).min() > -1e-12
    np.testing.assert_allclose(jnp.diagonal(L), q**2, atol=1e-12)
    np.testing.assert_allclose(dpp_kernel(jnp.asarray(q), 3 * jnp.asarray(e)), L, atol=1e-12)
    batched = dpp_kernel(jnp.stack([jnp.asarray(q)] * 2), jnp.stack([jnp.asarray(e), -jnp.asarray(e)]))
    np.testing.assert_allclose(batched, np.stack([L, L]), atol=1e-12)
    # A zero vector (padding) has zeros, and a derivative.
    gradient = jax.grad(lambda e: dpp_kernel(jnp.asarray(q), e).sum())(jnp.asarray(e).at[2].set(0.0))
    assert np.isfinite(gradient).all()


@pytest.mark.usefixtures("x64")
def test_probabilities_of_all_sets_sum_to_one(rng):
    L = jnp.asarray(plain_kernel(rng.random(4) + 0.5, rng.normal(size=(4, 6))))
    sets = jnp.asarray(list(itertools.product([False, True], repeat=4)))
    log_p = dpp_log_prob(jnp.broadcast_to(L, (16, 4, 4)), sets, jitter=0.0)
    np.testing.assert_allclose(jnp.exp(log_p).sum(), 1, atol=1e-12)
    whole = np.linalg.det(np.asarray(L) + np.eye(4))
    minors = [np.linalg.det(np.asarray(L)[np.ix_(np.flatnonzero(s), np.flatnonzero(s))]) for s in np.asarray(sets)]
    np.testing.assert_allclose(sum(minors), whole, rtol=1e-12)
    np.testing.assert_allclose(jnp.exp(log_p), np.asarray(minors) / whole, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_two_alike_are_never_both_chosen(source):
    q, e = source
    e[4] = 2 * e[1]
    L = dpp_kernel(jnp.asarray(q), jnp.asarray(e))
    for others in ([], [0], [0, 3]):
        assert float(jnp.exp(dpp_log_prob(L, subset([1, 4, *others], 7), jitter=0.0))) < 1e-12
        assert float(jnp.exp(dpp_log_prob(L, subset([1, *others], 7), jitter=0.0))) > 1e-5
    assert np.isfinite(dpp_log_prob(L, subset([1, 4], 7)))
    assert np.isfinite(jax.grad(lambda L: dpp_log_prob(L, subset([1, 4], 7)))(L)).all()


@pytest.mark.usefixtures("x64")
def test_gradient_of_the_probability(source, rng):
    q, e = (jnp.asarray(x) for x in source)
    chosen = subset([0, 2, 5], 7)
    loss = jax.jit(lambda q, e: -dpp_log_prob(dpp_kernel(q, e), chosen))
    dq, de = jax.grad(loss, (0, 1))(q, e)
    for _ in range(4):
        u, v, h = jnp.asarray(rng.normal(size=7)), jnp.asarray(rng.normal(size=(7, 5))), 1e-6
        slope = (loss(q + h * u, e + h * v) - loss(q - h * u, e - h * v)) / (2 * h)
        np.testing.assert_allclose((dq * u).sum() + (de * v).sum(), slope, atol=1e-6)
    # The less alike two members are, the likelier the set.
    losses = [float(loss(q, e.at[2].set(e[0] * cos + (1 - cos) * e[1]))) for cos in (0.95, 0.7, 0.3)]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.usefixtures("x64")
def test_greedy_picks(rng):
    kernels = np.stack([plain_kernel(rng.random(8) + 0.5, rng.normal(size=(8, 10))) for _ in range(5)])
    for L, picks, gains in zip(kernels, *greedy_map_dpp(jnp.asarray(kernels), 5), strict=True):
        chosen: list[int] = []

        def det(members, L=L):
            return np.linalg.det(L[np.ix_(members, members)])

        for pick, gain in zip(picks.tolist(), gains.tolist(), strict=True):
            ratios = {i: det([*chosen, i]) / det(chosen) for i in range(8) if i not in chosen}
            assert pick == max(ratios, key=ratios.get)
            np.testing.assert_allclose(gain, ratios[pick], rtol=1e-9)
            chosen.append(pick)
            np.testing.assert_allclose(np.prod(gains[: len(chosen)]), det(chosen), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_greedy_on_kernels_that_are_known(rng):
    # Diagonal: the exact optimum takes all entries above 1, and greedy takes the largest.
    d = np.array([0.5, 3.0, 1.2, 0.1, 2.0])
    picks, gains = greedy_map_dpp(jnp.diag(jnp.asarray(d)), 3)
    best = max(itertools.combinations(range(5), 3), key=lambda members: d[list(members)].prod())
    assert set(picks.tolist()) == set(best) == {1, 4, 2}
    np.testing.assert_allclose(gains, [3.0, 2.0, 1.2], atol=1e-12)
    # Orthogonal vectors: the k of most quality.
    q = rng.random(6)
    picks, gains = greedy_map_dpp(dpp_kernel(jnp.asarray(q), jnp.eye(6)), 4)
    np.testing.assert_array_equal(picks, np.argsort(-q)[:4])
    np.testing.assert_allclose(gains, np.sort(q)[::-1][:4] ** 2, atol=1e-12)
    # All alike: one is enough.
    picks, gains = greedy_map_dpp(dpp_kernel(jnp.asarray(q), jnp.ones((6, 3))), 4)
    np.testing.assert_array_equal(picks, [q.argmax(), NONE, NONE, NONE])
    np.testing.assert_allclose(gains, [q.max() ** 2, 0, 0, 0], atol=1e-12)


def test_greedy_in_batches_and_in_float32(rng):
    L = jnp.stack([dpp_kernel(jnp.asarray(rng.random(9)), jnp.asarray(rng.normal(size=(9, 4)))) for _ in range(3)])
    greedy = jax.jit(greedy_map_dpp, static_argnums=1)
    picks, gains = greedy(L, 6)
    for i in range(3):
        alone, gain = greedy(L[i], 6)
        np.testing.assert_array_equal(picks[i], alone)
        np.testing.assert_allclose(gains[i], gain, atol=1e-6)
    # Four dimensions hold four directions; what is left then is rounding.
    assert (np.asarray(gains)[:, 3] > 1e-4).all()
    assert (np.asarray(gains)[:, 4:] < 1e-6).all()


# --- the losses ------------------------------------------------------------------------------------------


def test_target():
    positions = jnp.array([[3, 17], [9, NONE]])
    G = gaussian_mixture_target(positions, 24)
    np.testing.assert_allclose(G.sum(-1), 1, atol=1e-6)
    s = np.arange(24)
    g = [sum(np.exp(-((s - mu) ** 2) / 18) / (3 * math.sqrt(2 * math.pi)) for mu in mus) for mus in ([3, 17], [9])]
    np.testing.assert_allclose(G, np.exp(g) / np.exp(g).sum(-1, keepdims=True), atol=1e-6)
    assert set(np.argsort(-G[0])[:2].tolist()) == {3, 17} and int(G[1].argmax()) == 9
    where = jnp.arange(24) < jnp.array([[20], [24]])
    masked = gaussian_mixture_target(positions, 24, where=where)
    assert not np.asarray(masked[0, 20:]).any()
    np.testing.assert_allclose(masked.sum(-1), 1, atol=1e-6)


@pytest.fixture
def attended(rng):
    """(A, e, source_mask) of 2 rows, 6 steps, 60 positions, the second row with 47 real ones; attention leaves out padding."""
    where = np.arange(60) < np.array([[60], [47]])
    logits = np.where(where[:, None], rng.normal(size=(2, 6, 60)) * 1.5, -np.inf)
    A = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return jnp.asarray(A, jnp.float32), jnp.asarray(rng.normal(size=(2, 60, 8)), jnp.float32), jnp.asarray(where)


def test_micro_loss(attended):
    A, e, where = attended
    key = jax.random.key(1)
    start = int(jax.random.randint(key, (), 0, 5))
    both = jax.jit(
        lambda key: tuple(
            micro_dpp_loss(A, e, key, stride=5, m=4, direction=direction, source_mask=where)
            for direction in ("forward", "reverse")
        )
    )
    loss, reverse = both(key)
    q = np.float64(A.mean(1))
    for row in range(2):
        candidates = np.arange(start, 60, 5)
        candidates = candidates[np.asarray(where[row])[candidates]]
        picks, _ = greedy_map_dpp(jnp.asarray(plain_kernel(q[row, candidates], np.float64(e[row, candidates]))), 4)
        G = np.float64(gaussian_mixture_target(jnp.asarray(candidates[picks]), 60, where=where[row]))
        real = np.asarray(where[row])
        attention, target = q[row, real], G[real]
        np.testing.assert_allclose(loss[row], (attention * np.log(attention / target)).sum(), rtol=1e-4)
        np.testing.assert_allclose(reverse[row], (target * np.log(target / attention)).sum(), rtol=1e-4)
    assert (loss > 0).all() and (reverse > 0).all()
    assert len({round(float(both(jax.random.key(i))[0][0]), 5) for i in range(6)}) > 1  # the start is drawn


def test_micro_loss_is_least_at_its_target(attended):
    _, e, _ = attended
    key = jax.random.key(1)
    # With one candidate in every window of the source the picks do not depend on q.
    picks = jax.random.randint(key, (), 0, 60) + jnp.zeros((2, 1), jnp.int32)
    G = gaussian_mixture_target(picks, 60)
    A = jnp.broadcast_to(G[:, None], (2, 6, 60))

    for direction in ("forward", "reverse"):

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1))
        def value(logits, e, direction=direction):
            return micro_dpp_loss(jax.nn.softmax(logits), e, key, stride=60, m=1, direction=direction).sum()

        least, (slope, _) = value(jnp.log(A), e)
        np.testing.assert_allclose(least, 0, atol=1e-6)
        np.testing.assert_allclose(slope, 0, atol=1e-6)
        more, (slope, of_source) = value(jnp.log(A).at[:, :, 3].add(2.0), e)
        assert more > 1e-3 and np.abs(slope).max() > 1e-4
        # No gradient goes through the target: it reaches no source vectors.
        assert not np.asarray(of_source).any()


def test_macro_loss(attended):
    A, e, where = attended
    key = jax.random.key(3)
    _, of_start = jax.random.split(key)
    start = int(jax.random.randint(of_start, (), 0, 10))
    options = {"source_mask": where}
    run = jax.jit(lambda key, branch: macro_dpp_loss(A, e, key, branch=branch, **options), static_argnums=1)
    quality, diversity = run(key, "quality"), run(key, "diversity")
    q = np.float64(A.mean(1))
    for row in range(2):
        L = plain_kernel(q[row], np.float64(e[row]))
        spread = np.arange(start, 60, 10)
        spread = spread[np.asarray(where[row])[spread]]
        top = np.argsort(-q[row])[:15]
        for loss, members in ((quality, spread), (diversity, top)):
            L_Y = L[np.ix_(members, members)]
            of_set = np.linalg.slogdet(L_Y + 1e-5 * np.trace(L_Y) / len(members) * np.eye(len(members)))[1]
            np.testing.assert_allclose(loss[row], np.linalg.slogdet(L + np.eye(60))[1] - of_set, rtol=1e-3)
    # Vectors of more dimensions than there are positions: the other of two determinants, of the same value.
    wide = jnp.pad(e, ((0, 0), (0, 0), (0, 60)))
    np.testing.assert_allclose(macro_dpp_loss(A, wide, key, branch="quality", **options), quality, rtol=1e-5)
    program = str(jax.make_jaxpr(lambda A, e: macro_dpp_loss(A, e, key))(A, e))
    assert "f32[2,8,8]" in program and "60,60]" not in program
    of_A, of_e = (jax.jit(jax.grad(lambda A, e, b=b: macro_dpp_loss(A, e, key, branch=b, **options).sum(), (0, 1))) for b in
                  ("quality", "diversity"))  # fmt: skip
    dA, de = of_A(A, e)
    assert np.abs(dA).max() > 0.1 and not np.asarray(de).any()
    assert not np.asarray(dA)[1, :, 47:].any()
    dA, de = of_e(A, e)
    assert np.abs(de).max() > 1e-3 and not np.asarray(dA).any()
    drawn = [float(run(jax.random.key(i), "random")[0]) for i in range(12)]
    at_diversity = np.isclose(drawn, float(diversity[0]), rtol=1e-4)
    assert 1 <= at_diversity.sum() <= 11


def test_attention_to_padding_does_not_count(attended):
    """Wherever the padding is, whatever attention it got; rows are as if they had come alone."""
    A, e, where = attended
    leaky = jax.nn.softmax(jnp.log(A + 0.01))  # some of it on padding
    shared_out = jnp.where(where[:, None], leaky, 0)
    shared_out = shared_out / shared_out.mean(1, keepdims=True).sum(-1, keepdims=True)
    front = [jnp.roll(x, 13, axis=axis) for x, axis in ((leaky[1:], 2), (e[1:], 1), (where[1:], 1))]
    key, alone = jax.random.key(4), (shared_out[1:, :, :47], e[1:, :47])
    for loss in (functools.partial(micro_dpp_loss, stride=5, m=4), macro_dpp_loss):
        loss = jax.jit(loss)
        value = loss(leaky, e, key, source_mask=where)
        assert (value > 0).all()
        np.testing.assert_allclose(value[1], loss(*alone, key)[0], rtol=1e-3)
    np.testing.assert_allclose(value[1], loss(*front[:2], key, source_mask=front[2])[0], rtol=1e-3)
    covered = attention_coverage(leaky, source_mask=where)
    assert (covered <= 1).all()
    np.testing.assert_allclose(covered[1], attention_coverage(alone[0])[0], rtol=1e-5)


def test_short_rows_have_sets_too(attended):
    A, e, _ = attended
    for length in (0, 1, 3):
        short = jnp.arange(60) < jnp.array([[60], [length]])
        for i in range(4):
            key = jax.random.key(i)
            macro, micro = (loss(A, e, key, source_mask=short) for loss in (macro_of_quality, micro_of_one))
            assert np.isfinite(macro).all() and np.isfinite(micro).all()
            # -log P of one position is at least log(1 + q²) - log q², and of none that much less.
            assert length == 0 or macro[1] > 0.5
            assert (attention_coverage(A, source_mask=short) <= 1).all()


def test_jitter_is_relative(source):
    q, e = source
    L = dpp_kernel(jnp.asarray(q, jnp.float32), jnp.asarray(e, jnp.float32))
    chosen = subset([0, 2, 5], 7)
    whole = [np.linalg.slogdet(np.asarray(L * c) + np.eye(7))[1] for c in (1.0, 1e-6)]
    large, small = (float(dpp_log_prob(L * c, chosen)) + w for c, w in zip((1.0, 1e-6), whole, strict=True))
    np.testing.assert_allclose(small, large + 3 * math.log(1e-6), atol=1e-3)
    assert np.isfinite(dpp_log_prob(0 * L, chosen))
    assert np.isfinite(jax.grad(lambda L: dpp_log_prob(L, chosen))(0 * L)).all()


def test_padded_steps_do_not_count(attended):
    A, e, _ = attended
    steps = jnp.arange(6) < jnp.array([[4], [6]])
    changed = A.at[0, 4:].set(A[0, :2])
    for loss in (jax.jit(micro_dpp_loss), jax.jit(macro_dpp_loss)):
        one, other = (loss(x, e, jax.random.key(0), target_mask=steps) for x in (A, changed))
        np.testing.assert_array_equal(one, other)
        np.testing.assert_allclose(one[0], loss(A[:1, :4], e[:1], jax.random.key(0))[0], rtol=1e-5)


def test_coverage():
    even, one = jnp.full((3, 10), 0.1), jax.nn.one_hot(jnp.zeros(3, int), 10)
    np.testing.assert_allclose(attention_coverage(even), 1, atol=1e-6)
    np.testing.assert_allclose(attention_coverage(one), 0.1, atol=1e-6)
    moving = jax.nn.one_hot(jnp.arange(5), 10)  # one position at a time, half of the source in all
    np.testing.assert_allclose(attention_coverage(moving), 0.5, atol=1e-6)
    np.testing.assert_allclose(attention_coverage(moving, source_mask=jnp.arange(10) < 5), 1, atol=1e-6)
    np.testing.assert_allclose(attention_coverage(moving, target_mask=jnp.arange(5) < 2), 0.2, atol=1e-6)


# --- the host's attention --------------------------------------------------------------------------------


def test_convs2s_attention(rng):
    module = ConvSeq2SeqAttention(6, 4, rngs=nnx.Rngs(0))
    h, g, z, x = (rng.normal(size=(2, n, w)) for n, w in ((3, 6), (3, 4), (5, 4), (5, 4)))
    where = np.arange(5) < np.array([[5], [3]])
    w_in, w_out = (np.float64(m.kernel[...]) for m in (module.project_in, module.project_out))
    module.project_in.bias[...], module.project_out.bias[...] = (jnp.asarray(rng.normal(size=n)) for n in (4, 6))
    b_in, b_out = (np.float64(m.bias[...]) for m in (module.project_in, module.project_out))
    d = (h @ w_in + b_in + g) * math.sqrt(0.5)
    s = np.where(where[:, None], np.einsum("bte,bse->bts", d, z), -np.inf)
    a = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    context = np.einsum("bts,bse->bte", a, z + x) * np.sqrt(where.sum(-1))[:, None, None]
    expected = (context @ w_out + b_out + h) * math.sqrt(0.5)
    inputs = [jnp.asarray(v, jnp.float32) for v in (h, g, z, x)]
    out, A = nnx.jit(lambda m, *a: m(*a, source_mask=jnp.asarray(where), return_weights=True))(module, *inputs)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(A, a, atol=1e-6)
    whole = module(*(v[:1] for v in inputs))
    np.testing.assert_allclose(whole, out[:1], atol=1e-5)


HOST = ConvSeq2SeqAttention(6, 4, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda A, e, key: micro_dpp_loss(A, e[:, :5], key), r"A and e:.*\(2, 6, 60\) and \(2, 5, 8\)"),
        (lambda A, e, key: micro_dpp_loss(A, e, key, direction="back"), "unknown direction 'back'"),
        (lambda A, e, key: micro_dpp_loss(A, e, key, m=0), "stride and m:.*m=0"),
        (lambda A, e, key: macro_dpp_loss(A, e, key, branch="both"), "unknown branch 'both'"),
        (lambda A, e, key: macro_dpp_loss(A, e, key, stride=0), "stride and top:.*stride=0"),
        (lambda A, e, key: macro_dpp_loss(A, e, key, source_mask=A[:, 0, :9] > 0), r"source_mask:.*\(2, 60\), got \(2, 9\)"),
        (lambda A, e, key: dpp_kernel(A[:, 0], e[:1]), r"e:.*\(2, 60, 'E'\), got \(1, 60, 8\)"),
        (lambda A, e, key: dpp_log_prob(A[0, :3, :3], e[0, 0, :4] > 0), r"chosen:.*\[..., 3\], got \(4,\)"),
        (lambda A, e, key: greedy_map_dpp(A[:, :3, :3], 4), "k: from 1 to the 3.*got 4"),
        (lambda A, e, key: greedy_map_dpp(A, 4), r"L:.*\(2, 6, 60\)"),
        (lambda A, e, key: HOST(e[..., :6], e[..., :4], e, e), r"z and x:.*\[B, S, 4\].*\(2, 60, 8\)"),
        (lambda A, e, key: HOST(e[..., :6], e[..., :5], e, e), r"h and g: \[B, T, 6\] and \[B, T, 4\].*\(2, 60, 5\)"),
        (lambda A, e, key: micro_dpp_loss(A, e, key, sigma=0.0), "sigma: .*above 0.*got 0.0"),
        (lambda A, e, key: gaussian_mixture_target(jnp.array([3]), 9, sigma=-1.0), "sigma: .*got -1.0"),
    ],
)
def test_wrong_input(attended, call, words):
    with pytest.raises(ValueError, match=words):
        call(*attended[:2], jax.random.key(0))


def test_the_picture_is_drawn():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    PAPER.picture(axes)
    assert len(axes.lines) == 2 and len(axes.patches) == 40
