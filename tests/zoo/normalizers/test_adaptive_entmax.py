"""Card 129: entmax, its derivatives, and attention whose heads learn their alpha."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.attention import attention, explain
from attnzoo.core.entmax import Entmax, alpha_derivative, entmax, entmax15, sparsemax
from attnzoo.core.masks import Causal, Lengths
from attnzoo.core.positions import RoPE
from attnzoo.zoo.normalizers.adaptive_entmax import (
    AdaptiveEntmaxAttention,
    attention_density,
    fenchel_young_entmax_loss,
    head_js_diversity,
    tsallis_entropy,
)

ALPHAS = (1.1, 1.25, 1.5, 1.9)


def oracle(x, alpha):
    """The definition in float64: bisection on tau over the last axis, 200 halvings; softmax at alpha = 1."""
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    if alpha == 1:
        e = np.exp(x)
        return e / e.sum(-1, keepdims=True)
    z = (alpha - 1) * x
    low, high = np.full((*x.shape[:-1], 1), -1.0), np.zeros((*x.shape[:-1], 1))
    for _ in range(200):
        tau = (low + high) / 2
        enough = (np.maximum(z - tau, 0) ** (1 / (alpha - 1))).sum(-1, keepdims=True) >= 1
        low, high = np.where(enough, tau, low), np.where(enough, high, tau)
    return np.maximum(z - low, 0) ** (1 / (alpha - 1))


@pytest.fixture
def rows(rng):
    return np.float32(rng.normal(size=(12, 9)) * 2)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# --- the map ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 1.0005, 1.01, *ALPHAS, 2.0, 3.0])
def test_entmax_is_its_definition(rows, alpha):
    p = entmax(rows, alpha)
    np.testing.assert_allclose(p, oracle(rows, alpha), atol=1e-6)
    np.testing.assert_allclose(p.sum(-1), 1, atol=1e-6)
    assert (p >= 0).all()
    np.testing.assert_allclose(entmax(rows + 7.5, alpha), p, atol=2e-6)
    shuffled = np.random.default_rng(1).permutation(rows.shape[-1])
    np.testing.assert_allclose(entmax(rows[:, shuffled], alpha), p[:, shuffled], atol=1e-6)
    by_size = np.take_along_axis(np.asarray(p), rows.argsort(-1), -1)
    assert (np.diff(by_size, axis=-1) >= 0).all()


def test_special_alphas(rows):
    np.testing.assert_allclose(entmax(rows, 1.0), jax.nn.softmax(rows), atol=1e-6)
    np.testing.assert_allclose(entmax(rows, 1.5), entmax15(rows), atol=1e-6)
    np.testing.assert_allclose(entmax(rows, 2.0), sparsemax(rows), atol=1e-6)
    np.testing.assert_allclose(entmax15(rows), oracle(rows, 1.5), atol=1e-6)
    np.testing.assert_allclose(sparsemax(rows), oracle(rows, 2.0), atol=1e-6)


def test_known_values():
    x = jnp.array([-2, 0, 0.5])
    np.testing.assert_allclose(sparsemax(x), [0, 0.25, 0.75], atol=1e-7)
    np.testing.assert_allclose(entmax15(x), [0, 0.3260, 0.6740], atol=5e-5)
    # By hand: (sqrt p1 - sqrt p2) = 0.25 and p1 + p2 = 1.
    root = (0.25 + np.sqrt(2 - 0.25**2)) / 2
    np.testing.assert_allclose(entmax15(x), [0, 1 - root**2, root**2], atol=1e-6)


def test_ties_and_single_entries():
    for f in (sparsemax, entmax15, entmax):
        np.testing.assert_allclose(f(jnp.zeros(4)), 0.25, atol=1e-7)
        np.testing.assert_allclose(f(jnp.array([3.0, 3.0, -50.0])), [0.5, 0.5, 0], atol=1e-7)
        np.testing.assert_array_equal(f(jnp.array([[5.0], [-1e30]])), 1)


def test_support_shrinks_with_alpha_and_scale(rows):
    alphas = (1.0, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5)
    sizes = [np.asarray((entmax(rows, a) > 0).sum(-1)) for a in alphas]
    assert all((a >= b).all() for a, b in itertools.pairwise(sizes))
    assert (sizes[0] == rows.shape[-1]).all()
    assert sizes[-1].mean() < 3
    for alpha in alphas:
        np.testing.assert_allclose(entmax(rows * 1e4, alpha), np.eye(9)[rows.argmax(-1)], atol=1e-6)


def test_axis_dtype_and_where(rows):
    np.testing.assert_array_equal(entmax(rows.T, 1.3, axis=0), entmax(rows, 1.3).T)
    np.testing.assert_array_equal(sparsemax(rows.T, axis=0), sparsemax(rows).T)
    narrow = entmax(jnp.asarray(rows, jnp.bfloat16), 1.3)
    assert narrow.dtype == jnp.bfloat16
    wide = entmax(jnp.asarray(rows, jnp.bfloat16).astype(jnp.float32), 1.3)
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))
    # Fewer entries take part: as if the others were not there, however large they are.
    where = np.arange(9) < 5
    hidden = np.where(where, rows, 1e9)
    for f in (functools.partial(entmax, alpha=1.3), sparsemax, entmax15):
        p = f(hidden, where=where)
        np.testing.assert_allclose(p[:, :5], f(rows[:, :5]), atol=1e-6)
        assert (p[:, 5:] == 0).all()
        np.testing.assert_allclose(f(np.where(where, rows, -np.inf)), p, atol=1e-6)
        assert (f(rows, where=np.zeros(9, bool)) == 0).all()
        gradient = jax.grad(lambda x, f=f: (f(x, where=np.zeros(9, bool)) ** 2).sum())(rows)
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("alpha", "words"),
    [(0.0, "positive"), ([1.5, -1.0], "positive"), (np.ones((12, 9)), r"size 1 along axis 1.*\(12, 9\)")],
)
def test_wrong_alpha(rows, alpha, words):
    with pytest.raises(ValueError, match=words):
        entmax(rows, np.asarray(alpha))


# --- its derivatives -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_are_finite_differences(rng, alpha):
    x, u, d = (jnp.asarray(rng.normal(size=(4, 7))) for _ in range(3))

    @jax.jit
    def f(x, alpha):
        return (u * entmax(x, alpha)).sum()

    h = 1e-5
    dx, da = jax.grad(f, (0, 1))(x, alpha)
    for step in np.eye(7):
        np.testing.assert_allclose((dx * step).sum(), (f(x + h * step, alpha) - f(x - h * step, alpha)) / (2 * h), atol=1e-6)
    np.testing.assert_allclose(da, (f(x, alpha + h) - f(x, alpha - h)) / (2 * h), atol=1e-6)
    # Forward mode, and the curvature: the derivatives are differentiable themselves.
    np.testing.assert_allclose(jax.jvp(f, (x, alpha), (d, 1.0))[1], (dx * d).sum() + da, atol=1e-12)
    slope = jax.jit(jax.grad(f))
    curved = (slope(x + h * d, alpha) - slope(x - h * d, alpha)) / (2 * h)
    np.testing.assert_allclose(jax.jvp(lambda x: slope(x, alpha), (x,), (d,))[1], curved, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_gradients_of_the_exact_forms(rng):
    x, u = (jnp.asarray(rng.normal(size=(4, 7))) for _ in range(2))
    for exact, alpha in ((sparsemax, 2.0), (entmax15, 1.5)):
        by_sort = jax.grad(lambda x, f=exact: (u * f(x)).sum())(x)
        by_halving = jax.grad(lambda x, a=alpha: (u * entmax(x, a)).sum())(x)
        np.testing.assert_allclose(by_sort, by_halving, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_alpha_gradient_at_softmax(rng):
    """Richardson's extrapolation of central differences around alpha = 1, where no case is switched."""
    x = jnp.asarray(rng.normal(size=(3, 6)))

    def difference(h):
        return (entmax(x, 1 + h) - entmax(x, 1 - h)) / (2 * h)

    h = 4e-3
    expected = (4 * difference(h / 2) - difference(h)) / 3
    got = jax.jvp(lambda a: entmax(x, a), (1.0,), (1.0,))[1]
    np.testing.assert_allclose(got, expected, atol=1e-8)
    p = jax.nn.softmax(x)
    limit = p / 2 * ((p * jnp.log(p) ** 2).sum(-1, keepdims=True) - jnp.log(p) ** 2)
    np.testing.assert_allclose(got, limit, atol=1e-12)


def test_alpha_gradient_keeps_its_digits_in_float32(rng):
    x = np.float32(rng.normal(size=(5, 8)))
    for alpha in (1.0, 1.0005, 1.002, 1.05):
        with jax.enable_x64(True):
            p = jnp.asarray(oracle(x, alpha))
            expected = np.asarray(alpha_derivative(p, alpha))
        got = jax.jvp(lambda a: entmax(x, a), (alpha,), (1.0,))[1]
        np.testing.assert_allclose(got, expected, atol=2e-6)


@pytest.mark.usefixtures("x64")
def test_alpha_derivative_is_the_papers_form(rng):
    p = sparsemax(jnp.asarray(rng.normal(size=(5, 8))))
    for alpha in (1.1, 1.5, 1.9, 2.0):
        on = p > 0
        s = jnp.where(on, jnp.where(on, p, 1) ** (2 - alpha), 0)
        ptil = s / s.sum(-1, keepdims=True)
        h = jnp.where(on, p * jnp.log(jnp.where(on, p, 1)), 0)
        paper = (p - ptil) / (alpha - 1) ** 2 - (h - ptil * h.sum(-1, keepdims=True)) / (alpha - 1)
        np.testing.assert_allclose(alpha_derivative(p, alpha), paper, atol=1e-11)


# --- in attention ----------------------------------------------------------------------------------------

B, T, N, K, H = 2, 8, 4, 2, 6


@pytest.fixture
def qkv(rng):
    return tuple(jnp.asarray(rng.normal(size=(B, T, n, H)) * 1.5, jnp.float32) for n in (N, K, K))


def test_attention_with_an_alpha_per_head(qkv):
    q, k, v = qkv
    alphas = np.float32([1.0, 1.2, 1.5, 2.0])
    out, w = attention(q, k, v, mask=Causal(), weights=Entmax(alphas), return_weights=True)
    s = np.einsum("btnh,bsnh->bnts", *(np.float64(np.repeat(x, N // x.shape[2], 2)) for x in (q, k))) / H**0.5
    for n, alpha in enumerate(alphas):
        for t in range(T):
            np.testing.assert_allclose(w[:, n, t, : t + 1], oracle(s[:, n, t, : t + 1], alpha), atol=2e-6)
        alone = attention(q[:, :, [n]], k[:, :, [n // 2]], v[:, :, [n // 2]], mask=Causal(), weights=Entmax(float(alpha)))
        np.testing.assert_allclose(out[:, :, n], alone[:, :, 0], atol=2e-6)
    np.testing.assert_allclose(out[:, :, 0], attention(q, k, v, mask=Causal())[:, :, 0], atol=2e-6)
    assert "blockwise" not in explain(q, k, v, weights=Entmax(1.5)).refused
    with pytest.raises(ValueError, match=r"alpha.*\(4,\).*\(3,\)"):
        attention(q, k, v, weights=Entmax(jnp.ones(3)))


def test_forbidden_weights_are_zero(qkv):
    q, k, v = qkv
    mask = Causal() & Lengths(jnp.array([T, 5]), jnp.array([T, 5]))
    allowed = np.broadcast_to(mask.dense(T, batch=B), (B, N, T, T))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def f(q, alpha, v):
        out, w = attention(q, k, v, mask=mask, weights=Entmax(alpha), return_weights=True)
        return (out**2).sum(), (out, w)

    (_, (out, w)), (dq, dalpha, dv) = f(q, jnp.full(N, 1.4), v)
    assert (np.asarray(w)[~allowed] == 0).all()
    np.testing.assert_allclose(w.sum(-1), allowed.any(-1), atol=1e-6)
    # The first query sees one key: all weight on it, and nothing that could move.
    np.testing.assert_allclose(w[:, :, 0, 0], 1, atol=1e-7)
    np.testing.assert_array_equal(dq[:, 0], 0)
    # Padding: no output, no gradient.
    assert (out[1, 5:] == 0).all()
    assert (dq[1, 5:] == 0).all()
    assert (dv[1, 5:] == 0).all()
    assert all(np.isfinite(x).all() for x in (dq, dalpha, dv))
    one = jax.jit(jax.grad(lambda a: (attention(q[:, :1], k[:, :1], v[:, :1], weights=Entmax(a)) ** 2).sum()))
    np.testing.assert_array_equal(one(jnp.full(N, 1.4)), 0)


def test_alpha_stays_between_one_and_two():
    mixer = AdaptiveEntmaxAttention(16, 4, causal=True, rngs=nnx.Rngs(0))
    assert len(np.unique(mixer.alpha)) == 4
    assert ((mixer.alpha > 1) & (mixer.alpha < 2)).all()
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    gradient = nnx.jit(nnx.grad(lambda mixer: (mixer(x) ** 2).sum()))
    for r in (-1e30, -40.0, -17.0, 0.0, 17.0, 40.0, 1e30):
        mixer.alpha_logits[...] = jnp.full(4, r)
        assert ((mixer.alpha >= 1) & (mixer.alpha <= 2)).all()
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient(mixer)))
    np.testing.assert_allclose(AdaptiveEntmaxAttention(16, 4, init_alpha=1.25, rngs=nnx.Rngs(0)).alpha, 1.25, atol=1e-6)
    for wrong in (1.0, 2.0, 0.5):
        with pytest.raises(ValueError, match="init_alpha"):
            AdaptiveEntmaxAttention(16, 4, init_alpha=wrong, rngs=nnx.Rngs(0))


def test_the_mixer_attends_with_its_weights():
    mixer = AdaptiveEntmaxAttention(16, 4, num_kv_heads=2, causal=True, positions=RoPE(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    y, w = nnx.jit(lambda mixer, x: (mixer(x), mixer.attention_weights(x)))(mixer, x)
    assert 0 < attention_density(w, where=jnp.tri(9, dtype=bool)) < 1
    values = jnp.repeat(mixer.qkv.value(x), 2, axis=2)
    np.testing.assert_allclose(mixer.out(jnp.einsum("bnts,bsnh->btnh", w, values)), y, atol=1e-5)
    assert mixer.cache_numbers_per_token() == 2 * 2 * 4


# --- entropy, loss, metrics ------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_tsallis_entropy(rng):
    p = jnp.asarray(rng.dirichlet(np.ones(6), size=5))
    for alpha in (1.2, 1.5, 2.0):
        expected = (p - p**alpha).sum(-1) / (alpha * (alpha - 1))
        np.testing.assert_allclose(tsallis_entropy(p, alpha), expected, atol=1e-12)
        np.testing.assert_allclose(tsallis_entropy(p.T, alpha, axis=0), expected, atol=1e-12)
    shannon = -(p * jnp.log(p)).sum(-1)
    np.testing.assert_allclose(tsallis_entropy(p, 1.0), shannon, atol=1e-12)
    np.testing.assert_allclose(tsallis_entropy(p, 1 + 1e-9), shannon, atol=1e-7)
    np.testing.assert_allclose(tsallis_entropy(jnp.eye(3), 1.5), 0, atol=1e-12)
    # entmax is where p·x + H(p) is largest.
    x = jnp.asarray(rng.normal(size=6))
    best = entmax(x, 1.3)
    others = jnp.asarray(rng.dirichlet(np.ones(6), size=200))
    for q in (others, 0.99 * best + 0.01 * others):
        assert (q @ x + tsallis_entropy(q, 1.3) <= best @ x + tsallis_entropy(best, 1.3) + 1e-12).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_fenchel_young_loss(rng, alpha):
    x, targets = jnp.asarray(rng.normal(size=(5, 6)) * 2), jnp.arange(5)
    loss = fenchel_young_entmax_loss(x, targets, alpha)
    y = jax.nn.one_hot(targets, 6)
    p = entmax(x, alpha)
    np.testing.assert_allclose(loss, ((p - y) * x).sum(-1) + tsallis_entropy(p, alpha), atol=1e-12)
    assert (loss >= 0).all()
    gradient = jax.jit(jax.grad(lambda x: fenchel_young_entmax_loss(x, targets, alpha).sum()))
    np.testing.assert_allclose(gradient(x), p - y, atol=1e-12)
    if alpha == 1:
        log_p = jnp.take_along_axis(jax.nn.log_softmax(x), targets[:, None], 1)[:, 0]
        np.testing.assert_allclose(loss, -log_p, atol=1e-12)
    else:
        np.testing.assert_allclose(fenchel_young_entmax_loss(20 * y, targets, alpha), 0, atol=1e-12)
    h, d = 1e-6, jnp.asarray(rng.normal(size=x.shape))
    by_alpha = jax.jit(lambda a: fenchel_young_entmax_loss(x, targets, a).sum())
    slope = (by_alpha(alpha + h) - by_alpha(alpha - h)) / (2 * h)
    np.testing.assert_allclose(jax.jit(jax.grad(by_alpha))(alpha), slope, atol=1e-6)
    curved = (gradient(x + h * d) - gradient(x - h * d)) / (2 * h)
    curvature = jax.jit(lambda d: jax.jvp(gradient, (x,), (d,))[1])
    np.testing.assert_allclose(curvature(d), curved, atol=1e-6)


def test_fenchel_young_loss_wants_one_class_per_row():
    with pytest.raises(ValueError, match=r"targets.*\(2, 3\).*\(2,\).*\(3,\)"):
        fenchel_young_entmax_loss(jnp.zeros((2, 3)), jnp.zeros(3, jnp.int32))


def test_metrics():
    alike = jnp.full((1, 4, 2, 5), 0.2)
    apart = jax.nn.one_hot(jnp.arange(4), 4)[None, :, None, :]
    np.testing.assert_allclose(head_js_diversity(alike), np.zeros((1, 2)), atol=1e-6)
    np.testing.assert_allclose(head_js_diversity(apart), np.full((1, 1), np.log(4)), atol=1e-6)
    w = jnp.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    np.testing.assert_allclose(attention_density(w), 5 / 9, atol=1e-6)
    np.testing.assert_allclose(attention_density(w, where=jnp.tri(3, dtype=bool)), 5 / 6, atol=1e-6)
    np.testing.assert_allclose(attention_density(w, axis=-1), [1 / 3, 2 / 3, 2 / 3], atol=1e-6)


# --- against the authors' package ------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [1.05, *ALPHAS, 2.0])
def test_parity_with_the_entmax_package(rng, alpha):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("entmax")
    x, u = (np.float32(rng.normal(size=(16, 24)) * 2) for _ in range(2))
    x_t = torch.tensor(x, requires_grad=True)
    a_t = torch.full((16, 1), alpha, requires_grad=True)
    p_t = theirs.entmax_bisect(x_t, a_t)
    (p_t * torch.tensor(u)).sum().backward()

    p, pull = jax.vjp(entmax, x, jnp.full((16, 1), alpha))
    dx, da = pull(u)
    np.testing.assert_allclose(p, p_t.detach(), atol=1e-5)
    np.testing.assert_allclose(dx, x_t.grad, atol=1e-5)
    # At alpha = 1.05 their float32 formula divides rounding errors by (alpha - 1)²; float64 has digits to spare.
    x_d, a_d = torch.tensor(x, dtype=torch.float64), torch.full((16, 1), alpha, dtype=torch.float64, requires_grad=True)
    (theirs.entmax_bisect(x_d, a_d) * torch.tensor(u)).sum().backward()
    np.testing.assert_allclose(da, a_d.grad, atol=1e-5)


@pytest.mark.parity
def test_parity_of_the_exact_forms(rng):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("entmax")
    x, u = (np.float32(rng.normal(size=(16, 24)) * 2) for _ in range(2))
    for mine, other in ((sparsemax, theirs.sparsemax), (entmax15, theirs.entmax15)):
        x_t = torch.tensor(x, requires_grad=True)
        p_t = other(x_t, dim=-1)
        (p_t * torch.tensor(u)).sum().backward()
        p, pull = jax.vjp(mine, x)
        np.testing.assert_allclose(p, p_t.detach(), atol=1e-5)
        np.testing.assert_allclose(pull(u)[0], x_t.grad, atol=1e-5)
