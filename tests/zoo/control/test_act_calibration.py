"""Yu et al. 2024: sinks after the first token are found, and their excess goes to the other keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.masks import Array as ArrayMask
from attnzoo.core.masks import Lengths, Segments, SlidingWindow
from attnzoo.core.positions import RoPE
from attnzoo.zoo.control.act_calibration import (
    ACTAttention,
    CalibratedSoftmax,
    SinkRule,
    act_calibrate,
    act_candidates,
    find_attention_sinks,
    select_act_heads,
    sink_report,
)
from attnzoo.zoo.projections.transformer import GroupedQueryAttention

B, T, D, N, K = 2, 12, 16, 4, 2
TRIANGLE = np.tri(T, dtype=bool)
RULE = SinkRule("ratio", 1.6)
find = jax.jit(find_attention_sinks, static_argnums=1)
calibrate = jax.jit(act_calibrate)
run = nnx.jit(lambda mixer, x, mask=None: mixer(x, mask=mask))
weights_of = nnx.jit(lambda mixer, x, mask=None: mixer.attention_weights(x, mask=mask))
prefill = nnx.jit(lambda mixer, x, cache, lengths=None: mixer.prefill(x, cache, lengths=lengths))


def causal(logits):
    e = np.where(np.tri(logits.shape[-1], dtype=bool), np.exp(logits), 0)
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def maps(rng):
    """Causal maps [B, N, T, T] with a strong column here and there."""
    logits = rng.normal(size=(B, N, T, T)) + 3.0 * (rng.random((B, N, 1, T)) < 0.25)
    return causal(logits)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(B, T, D)) * 2, jnp.float32)


def plain(**options):
    return GroupedQueryAttention(D, N, causal=True, positions=RoPE(), num_kv_heads=K, rngs=nnx.Rngs(0), **options)


def slow_sinks(A, threshold):
    """One map [T, T], straight from the equations, in float64."""
    length = len(A)
    averages = [sum(A[t, j] for t in range(j, length)) / (length - j) for j in range(length)]
    return {j for j in range(1, length) if averages[j] > threshold}


def slow_calibrate(A, S, beta):
    out = A.astype(np.float64).copy()
    for t in range(len(A)):
        removed = (1 - beta) * sum(A[t, j] for j in S)
        rest = sum(A[t, j] for j in range(A.shape[1]) if j not in S)
        if rest == 0 or removed == 0:
            continue
        for j in range(A.shape[1]):
            out[t, j] = beta * A[t, j] if j in S else A[t, j] + removed * A[t, j] / rest
    return out


# --- finding sinks ---------------------------------------------------------------------------------------


def test_sinks_are_those_of_the_equations(maps):
    for rule, threshold in ((SinkRule("abs", 0.15), 0.15), (SinkRule("ratio", 1.6), 1.6 / T), (SinkRule(), 0.1)):
        found = np.asarray(find(jnp.asarray(maps, jnp.float32), rule))
        for place in np.ndindex(B, N):
            assert set(np.flatnonzero(found[place])) == slow_sinks(maps[place], threshold)
    assert len({tuple(row) for row in found.reshape(-1, T)}) > 1  # per sample and head


def test_uniform_attention_has_no_sinks_by_the_papers_rule():
    length = 40
    uniform = causal(np.zeros((length, length)))
    found = np.asarray(find_attention_sinks(jnp.asarray(uniform), SinkRule("ratio")))
    averages = uniform.sum(0) / (length - np.arange(length))
    assert not found[averages <= 5 / length].any()
    assert found[(averages > 5 / length) & (np.arange(length) > 0)].all()
    # Averages are over the rows that see a column: tokens that attend to themselves alone have 1 / (T - j).
    found, few = (np.flatnonzero(find_attention_sinks(jnp.eye(length), SinkRule("ratio", min_rows=n))) for n in (1, 3))
    assert found.tolist() == list(range(length - 7, length))
    assert few.tolist() == list(range(length - 7, length - 2))


@pytest.mark.parametrize("threshold", [0.1, 0.45])
def test_a_planted_sink(threshold):
    planted = np.zeros((T, T))
    for t in range(T):
        others = [j for j in range(t + 1) if j != 7]
        planted[t, others] = (0.5 if t >= 7 else 1) / len(others)
        planted[t, 7] = 0.5 if t >= 7 else 0
    A = jnp.asarray(planted, jnp.float32)
    sinks = find(A, SinkRule("abs", threshold))
    assert sinks[7] and not sinks[0]
    calibrated = calibrate(A, sinks, beta=0.4)
    np.testing.assert_allclose(calibrated[7:, 7], 0.2, atol=1e-6)
    np.testing.assert_allclose(calibrated[0], np.eye(T)[0], atol=0)


def test_the_codes_quirk():
    """It leaves out the first column found, whichever that is."""
    A = jnp.zeros((T, T)).at[:, 4].set(0.6).at[:, 7].set(0.4)
    all_rows = jnp.ones((T, T), bool)
    ours, theirs = (find_attention_sinks(A, SinkRule(reference_quirk=quirk), visible=all_rows) for quirk in (False, True))
    assert np.flatnonzero(ours).tolist() == [4, 7]
    assert np.flatnonzero(theirs).tolist() == [7]
    A = A.at[:, 0].set(0.2)
    theirs = find_attention_sinks(A, SinkRule(reference_quirk=True), visible=all_rows)
    assert np.flatnonzero(theirs).tolist() == [4, 7]


def test_padding_does_not_count(maps):
    length = 8
    real = np.arange(T) < length
    visible = TRIANGLE & real
    A = np.where(visible, maps, 0)
    A = jnp.asarray(A / A.sum(-1, keepdims=True), jnp.float32)
    found = find(A, RULE, visible=jnp.asarray(visible))
    np.testing.assert_array_equal(found[..., :length], find(A[..., :length, :length], RULE))
    assert not found[..., length:].any()


# --- calibration -----------------------------------------------------------------------------------------


def test_calibration_is_that_of_a_slow_loop(maps):
    A = jnp.asarray(maps, jnp.float32)
    sinks = find(A, RULE)
    calibrated = np.asarray(calibrate(A, sinks, beta=0.4))
    for place in np.ndindex(B, N):
        S = slow_sinks(maps[place], 1.6 / T)
        np.testing.assert_allclose(calibrated[place], slow_calibrate(maps[place], S, 0.4), atol=1e-6)
    assert (calibrated >= 0).all()
    np.testing.assert_allclose(calibrated.sum(-1), 1, atol=1e-6)
    assert (calibrated[..., ~TRIANGLE] == 0).all()
    np.testing.assert_array_equal(calibrated[..., 0, :], np.broadcast_to(np.eye(T)[0], (B, N, T)))
    # Sinks keep exactly beta, and the others their proportions.
    at = np.broadcast_to(np.asarray(sinks)[..., None, :], A.shape)
    moved = np.broadcast_to((np.where(at, A, 0).sum(-1, keepdims=True) > 0), A.shape)
    np.testing.assert_allclose(calibrated[at & moved], 0.4 * np.asarray(A)[at & moved], rtol=1e-6)
    ratio = np.where(at | ~TRIANGLE, np.nan, calibrated / np.where(TRIANGLE, A, 1))
    spread = np.nanmax(ratio, -1) - np.nanmin(ratio, -1)
    np.testing.assert_allclose(spread, 0, atol=1e-5)
    assert (np.nanmax(ratio, -1) > 1.01).any()


def test_nothing_to_do_is_the_identity(maps):
    A = jnp.asarray(maps, jnp.float32)
    np.testing.assert_array_equal(calibrate(A, find(A, RULE), beta=1.0), A)
    np.testing.assert_array_equal(calibrate(A, jnp.zeros((B, N, T), bool), beta=0.4), A)
    # A row that sees sinks alone has nobody to give to.
    only = jnp.array([[1.0, 0, 0], [0, 1, 0], [0.2, 0.5, 0.3]])
    np.testing.assert_array_equal(act_calibrate(only, jnp.array([False, True, False]))[:2], only[:2])
    assert np.isfinite(jax.grad(lambda w: act_calibrate(w, jnp.array([False, True, True])).sum())(only)).all()


# --- the mixer -------------------------------------------------------------------------------------------


def test_only_the_chosen_heads_change(x):
    base = plain()
    before = np.asarray(weights_of(base, x))
    mixer = ACTAttention.like(base, heads=(1, 3), rule=RULE)
    after = np.asarray(weights_of(mixer, x))
    np.testing.assert_array_equal(after[:, [0, 2]], before[:, [0, 2]])
    expected = act_calibrate(before, find_attention_sinks(before, RULE))
    np.testing.assert_allclose(after[:, [1, 3]], expected[:, [1, 3]], atol=1e-6)
    assert not np.allclose(after[:, [1, 3]], before[:, [1, 3]], atol=1e-2)
    # The same by the switch, without building anew.
    mixer = ACTAttention.like(base, rule=RULE)
    mixer.switch[...] = jnp.array([False, True, False, True])
    np.testing.assert_array_equal(weights_of(mixer, x), after)
    mixer.switch[...] = jnp.zeros(N, bool)
    np.testing.assert_array_equal(run(mixer, x), run(base, x))


def test_without_heads_it_is_the_base_model(x):
    base = plain()
    mixer = ACTAttention.like(base, heads=())
    np.testing.assert_array_equal(run(mixer, x), run(base, x))
    assert mixer.attention_arguments() == base.attention_arguments()  # on whatever backend
    y, cache = prefill(mixer, x, mixer.init_cache(B, T))
    np.testing.assert_array_equal(y, prefill(base, x, base.init_cache(B, T))[0])
    assert cache.aux is None


def test_padded_rows_are_calibrated_as_if_they_were_short(x):
    mixer = ACTAttention.like(plain(), rule=RULE)
    lengths = jnp.array([8, T])
    padded = run(mixer, x, Lengths(lengths))
    np.testing.assert_allclose(padded[0, :8], run(mixer, x[:, :8])[0], atol=1e-5)
    np.testing.assert_allclose(padded[1], run(mixer, x)[1], atol=1e-5)
    y, cache = prefill(mixer, x, mixer.init_cache(B, T), lengths)
    np.testing.assert_allclose(y[0, :8], padded[0, :8], atol=1e-5)
    np.testing.assert_allclose(
        cache.aux.total[0], np.asarray(weights_of(plain(), x[:, :8]))[0].sum(-2) @ np.eye(8, T), atol=1e-5
    )


def test_decoding_finds_sinks_by_running_sums(x):
    """A prompt of 7, then one by one: each new row is calibrated by the averages over all raw rows so far."""
    base, heads = plain(), (0, 3)
    mixer = ACTAttention.like(base, heads=heads, rule=RULE)
    raw = np.asarray(weights_of(base, x), np.float64)
    v = np.repeat(np.asarray(mixer.qkv.value(x), np.float64), N // K, axis=2)
    y, cache = prefill(mixer, x[:, :7], mixer.init_cache(B, T))
    np.testing.assert_allclose(y, run(mixer, x[:, :7]), atol=1e-5)
    changed = 0
    for t in range(7, T):
        y, cache = prefill(mixer, x[:, t : t + 1], cache)
        np.testing.assert_allclose(cache.aux.total[..., : t + 1], raw[:, :, : t + 1, : t + 1].sum(2), atol=1e-5)
        rows = raw[:, :, t, : t + 1].copy()
        for b in range(B):
            for n in heads:
                S = slow_sinks(raw[b, n, : t + 1, : t + 1], 1.6 / (t + 1))
                rows[b, n] = slow_calibrate(rows[b, n][None], S, 0.4)[0]
                changed += bool(S)
        o = np.einsum("bns,bsnh->bnh", rows, v[:, : t + 1])
        np.testing.assert_allclose(y[:, 0], np.einsum("bnh,nhd->bd", o, mixer.out.kernel[...]), atol=1e-5)
    assert changed > 3


def test_cache_holds_three_numbers_more_per_key_and_head():
    shapes = jax.eval_shape(lambda: ACTAttention.like(plain()).init_cache(1, 10))
    assert [leaf.shape for leaf in shapes.aux] == [(1, N, 10)] * 3
    swapped = ACTAttention.like(plain())
    cache = swapped.init_cache(2, 3)
    total = jnp.arange(2.0)[:, None, None] * jnp.ones((2, N, 3))
    cache = dataclasses.replace(cache, aux=cache.aux._replace(total=total))
    assert swapped.reorder_cache(cache, jnp.array([1, 0])).aux.total[0, 0, 0] == 1


def test_every_document_is_calibrated_as_if_alone(x):
    mixer = ACTAttention.like(plain(), rule=RULE)
    packed = run(mixer, x, Segments(jnp.where(jnp.arange(T) < 5, 0, 1)))
    np.testing.assert_allclose(packed[:, :5], run(mixer, x[:, :5]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], run(mixer, x[:, 5:]), atol=1e-5)
    # So is what follows padding on the left.
    padded = run(mixer, x, ArrayMask(jnp.broadcast_to(jnp.arange(T) >= 4, (T, T))))
    np.testing.assert_allclose(padded[:, 4:], run(mixer, x[:, 4:]), atol=1e-5)


def test_a_prompt_in_the_cache_is_calibrated_like_a_whole_one_under_a_mask(x):
    mixer = ACTAttention.like(plain(), rule=RULE)
    window = SlidingWindow(4)
    y, cache = nnx.jit(lambda mixer, x, cache: mixer.prefill(x, cache, mask=window))(mixer, x, mixer.init_cache(B, T + 2))
    full = run(mixer, x, window)
    np.testing.assert_allclose(y, full, atol=1e-5)
    assert not np.allclose(full, run(plain(), x, window), atol=1e-2)
    np.testing.assert_array_equal(cache.aux.rows[0, 0, :T], np.minimum(4, T - np.arange(T)))
    np.testing.assert_array_equal(cache.aux.own[0, 0, :T], np.minimum(4, 1 + np.arange(T)))


def test_the_cache_in_bfloat16(x):
    """With beta = 1: averages near the threshold may fall on either side of it."""
    mixer = ACTAttention.like(plain(dtype=jnp.bfloat16), rule=RULE, beta=1.0)
    x = x.astype(jnp.bfloat16)
    y, _ = prefill(mixer, x, mixer.init_cache(B, T))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(o, np.float32) for o in (y, run(mixer, x))), atol=0.1)


# --- choosing heads, reports -----------------------------------------------------------------------------


def accuracy(heads):
    """Heads that interact: (0, 1) and (1, 0) help alone and hurt together, (1, 1) always helps, (0, 0) never."""
    gain = 0.05 * ((0, 1) in heads) + 0.06 * ((1, 0) in heads) + 0.02 * ((1, 1) in heads) - 0.03 * ((0, 0) in heads)
    return 0.5 + gain - 0.3 * ({(0, 1), (1, 0)} <= set(heads))


def test_choosing_heads():
    candidates = [(layer, head) for layer in (0, 1) for head in (0, 1)]
    alone = select_act_heads(accuracy, candidates)
    assert alone.heads == ((0, 1), (1, 0), (1, 1))
    assert alone.accuracy < alone.base == 0.5
    assert alone.alone[0, 0] < 0.5
    asked = []
    select_act_heads(lambda heads: asked.append(heads) or accuracy(heads), candidates, mode="greedy")
    assert len(set(asked)) == len(asked)
    greedy = select_act_heads(accuracy, candidates, mode="greedy")
    assert greedy.heads == ((1, 0), (1, 1))
    np.testing.assert_allclose(greedy.accuracy, 0.58)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_never_worse_than_nothing(seed):
    rng = np.random.default_rng(seed)
    table = {}

    def random_accuracy(heads):
        return table.setdefault(heads, float(rng.random()))

    found = select_act_heads(random_accuracy, [(0, h) for h in range(6)], mode="greedy")
    assert found.accuracy == table[found.heads] >= found.base == table[()]


def test_the_papers_candidates():
    heads = act_candidates(32, 32)
    assert {layer for layer, _ in heads} == set(range(2, 31))
    assert len(heads) == 29 * 32


def test_report_on_planted_weights(maps):
    """A head with a sink at column 5 in the second layer; the first is uniform."""
    uniform = np.broadcast_to(causal(np.zeros((T, T))), (B, N, T, T))
    logits = np.zeros((B, N, T, T))
    logits[:, 2, :, 5] = 4.0
    report = sink_report([jnp.asarray(uniform), jnp.asarray(causal(logits))], SinkRule("abs", 0.4))
    assert report.count.shape == (2, N)
    assert report.at[1, 2].tolist() == [float(j == 5) for j in range(T)]
    assert not report.count[0].any() and report.count[1].tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(report.first[0], uniform[0, 0, :, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(report.later[1, 2], causal(logits)[0, 2, :, 5].mean(), rtol=1e-5)
    # Padded rows count for nothing.
    visible = TRIANGLE & (np.arange(T) < 8) & (np.arange(T) < 8)[:, None]
    cut = jnp.asarray(np.where(visible, maps, 0) / np.maximum(np.where(visible, maps, 0).sum(-1, keepdims=True), 1e-9))
    padded, short = sink_report([cut], RULE, visible=jnp.asarray(visible)), sink_report([cut[..., :8, :8]], RULE)
    for part in ("count", "first", "later"):
        np.testing.assert_allclose(getattr(padded, part), getattr(short, part), rtol=1e-5)
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    report.plot(axes)
    np.testing.assert_array_equal(axes.images[0].get_array(), report.later)
    plt.close(figure)


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SinkRule(threshold=-0.1), "threshold: .*got -0.1"),
        (lambda: SinkRule(min_rows=0), "min_rows: must be at least 1, got 0"),
        (lambda: CalibratedSoftmax(jnp.ones(N, bool), beta=2.0), r"beta: must be in \[0, 1\], got 2.0"),
        (lambda: act_calibrate(jnp.eye(T), jnp.ones(T, bool), beta=-1.0), r"beta: must be in \[0, 1\], got -1.0"),
        (lambda: sink_report([]), r"weights: needs layers of one shape \[B, N, T, T\], got \[\]"),
        (lambda: sink_report([jnp.zeros((N, T, T))]), r"weights: needs layers of one shape .*got \[\(4, 12, 12\)\]"),
        (lambda: SinkRule("absolute"), "unknown thr_mode 'absolute'.*'abs'"),
        (lambda: find_attention_sinks(jnp.zeros((2, 3, 4))), r"weights: .*\[..., T, T\]; got \(2, 3, 4\)"),
        (lambda: ACTAttention(D, N, heads=(4,), rngs=nnx.Rngs(0)), r"heads: must be in 0\.\.3, got \[4\]"),
        (lambda: ACTAttention(D, N, beta=1.5, rngs=nnx.Rngs(0)), r"beta: must be in \[0, 1\], got 1.5"),
        (lambda: ACTAttention(D, N, causal=False, rngs=nnx.Rngs(0)), "causal: "),
        (lambda: select_act_heads(accuracy, [], mode="all"), "unknown mode 'all'.*greedy"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_weights_print_and_are_static_but_for_the_heads():
    w = CalibratedSoftmax(jnp.ones(N, bool), 0.3)
    assert [leaf.shape for leaf in jax.tree.leaves(w)] == [(N,)]
    assert repr(w) == "CalibratedSoftmax(beta=0.3)"
