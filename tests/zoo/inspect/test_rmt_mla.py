"""Random matrix theory of query-key spectra (Jha & Reagen, 2025): the law, the diagnostics, and what they are taken of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.positions import RoPE
from attnzoo.costs import evaluate, sizes
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.nn.linear import parameter_count
from attnzoo.testing import oracle_attention
from attnzoo.zoo.inspect.rmt_mla import (
    PAPER,
    MLADecoupled,
    MLAPreRoPE,
    QKFactors,
    SpectralProbe,
    bulk_variance,
    gram_spectrum,
    mp_density,
    mp_diagnostics,
    mp_edges,
    null_edge,
    qk_factors,
    qk_gram_spectrum,
)
from attnzoo.zoo.normalizers.relaxed_attention import RelaxedAttention
from attnzoo.zoo.positions.fope import FoPEConfig
from attnzoo.zoo.projections.cca import CompressedConvAttention
from attnzoo.zoo.projections.transformer import GroupedQueryAttention
from train.claims.common import fit, next_token_loss, noisy_periodic

B, T, D, N, H = 2, 6, 16, 4, 6
RATIOS = ("n_out", "energy_out", "gap", "soft_rank", "stable_rank", "participation", "effective_rank")
X = jax.random.normal(jax.random.key(0), (B, T, D))


def planted(rng, n, p, thetas):
    """Noise, and a direction of each strength."""
    u, v = (np.linalg.qr(rng.normal(size=(side, len(thetas))))[0] for side in (n, p))
    return rng.normal(size=(n, p)) + n**0.5 * (u * thetas) @ v.T


def ratios(d):
    return [getattr(d, name) for name in RATIOS]


# --- the law ---------------------------------------------------------------------------------------------


def test_edges_and_density():
    assert mp_edges(64 / 256) == (0.25, 2.25)
    assert mp_edges(64 / 256, 2.0) == (0.5, 4.5)
    for q, sigma2 in ((0.25, 1.0), (0.5, 3.0)):
        low, high = mp_edges(q, sigma2)
        l = np.linspace(low, high, 200_001)
        rho = mp_density(l, q, sigma2)
        assert abs(np.trapezoid(rho, l) - 1) < 1e-3
        assert abs(np.trapezoid(rho * l, l) - sigma2) < 1e-3 * sigma2  # the mean eigenvalue is the variance
        assert not mp_density(np.array([low - 0.01, high + 0.01, 0.0]), q, sigma2).any()


def test_noise_follows_the_law(rng):
    lam, q = gram_spectrum(rng.normal(size=(2048, 512)))
    assert q == 0.25
    assert mp_diagnostics(lam, q).n_out <= 1
    l = np.linspace(*mp_edges(q), 20_001)
    density = mp_density(l, q)
    law = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(l))])
    at = np.interp(np.sort(lam), l, law)
    steps = np.arange(len(lam) + 1) / len(lam)
    assert max(np.abs(at - steps[1:]).max(), np.abs(at - steps[:-1]).max()) < 0.03


def test_either_side_may_be_the_smaller(rng):
    x = rng.normal(size=(20, 50))
    for a, b in zip(gram_spectrum(x), gram_spectrum(x.T), strict=True):
        np.testing.assert_allclose(a, b)
    np.testing.assert_allclose(gram_spectrum(x).lam, np.linalg.eigvalsh(x @ x.T / 50)[::-1])
    with pytest.raises(ValueError, match=r"q: .*\(0, 1\], got 2"):
        mp_edges(2.0)


@pytest.mark.parametrize("strength", [(1.3, 1.7, 2.2), (0.9, 1.0, 1.1)])
def test_planted_directions_stand_out(rng, strength):
    n, p = 2048, 512
    q = p / n
    thetas = np.array(strength)
    assert (thetas > q**0.25).all()
    lam, q = gram_spectrum(planted(rng, n, p, thetas))
    assert mp_diagnostics(lam, q).n_out == 3
    predicted = np.sort((1 + thetas**2) * (q + thetas**2) / thetas**2)[::-1]
    np.testing.assert_allclose(lam[:3], predicted, rtol=0.05)
    # The top of noise alone varies about the edge by this much (Johnstone, 2001); three times that is no spike.
    room = 3 * (n**0.5 + p**0.5) * (n**-0.5 + p**-0.5) ** (1 / 3) / n
    edge = mp_edges(q)[1] + room
    assert mp_diagnostics(lam, edge=edge).n_out == 3
    weak = 0.5 * q**0.25 * np.ones(3)
    assert mp_diagnostics(gram_spectrum(planted(rng, n, p, weak)).lam, edge=edge).n_out == 0


def test_the_bulk_is_what_spikes_do_not_inflate(rng):
    lam, q = gram_spectrum(planted(rng, 512, 128, np.full(6, 3.0)))
    assert abs(bulk_variance(lam, q) - 1) < 0.05 < lam.mean() - 1
    hidden = planted(rng, 512, 128, np.array([6.0, 5.0, 1.1]))
    bulk, mean = (mp_diagnostics(*gram_spectrum(hidden), variance=v) for v in ("bulk", "mean"))
    assert bulk.n_out == 3 > mean.n_out


# --- diagnostics -----------------------------------------------------------------------------------------


def test_diagnostics_are_their_formulas():
    lam = np.array([4.0, 2.0, 1.0, 1.0])
    d = mp_diagnostics(lam, edge=1.5)
    assert (d.edge, d.n_out, d.gap_absolute) == (1.5, 2, 2.5)
    share = lam / 8
    expected = [2, 6 / 8, 4 / 1.5, 1.5 / 4, 8 / 4, 64 / 22, np.exp(-(share * np.log(share)).sum())]
    np.testing.assert_allclose(ratios(d), expected)
    assert mp_diagnostics(lam, edge=9.0).soft_rank == 1.0


def test_order_and_scale(rng):
    for x in (rng.normal(size=(40, 30)), planted(rng, 40, 30, np.array([3.0])), rng.normal(size=(40, 1)) @ np.ones((1, 30))):
        lam, q = gram_spectrum(x)
        d = mp_diagnostics(lam, q)
        assert 0 < d.soft_rank <= 1
        assert d.stable_rank * (1 + 1e-9) >= 1
        assert d.stable_rank <= d.participation * (1 + 1e-9) <= d.effective_rank * (1 + 1e-6) <= 30 * (1 + 1e-6)
        assert d.stable_rank <= np.linalg.matrix_rank(x) + 1e-6
        np.testing.assert_allclose(ratios(mp_diagnostics(gram_spectrum(7 * x).lam, q)), ratios(d), rtol=1e-6)
    w_q, w_k = rng.normal(size=(2, 24, 24))
    np.testing.assert_allclose(qk_gram_spectrum(5 * w_q, 0.1 * w_k).lam, qk_gram_spectrum(w_q, w_k).lam)


@pytest.mark.parity
def test_parity_with_weightwatcher(rng):
    pytest.importorskip("weightwatcher")
    from weightwatcher.RMT_Util import calc_lambda_plus, calc_mp_soft_rank, stable_rank

    lam, q = gram_spectrum(planted(rng, 200, 80, np.array([3.0, 2.0])))
    sigma = bulk_variance(lam, q) ** 0.5  # theirs is the standard deviation, and Q = n / p
    d = mp_diagnostics(lam, q)
    np.testing.assert_allclose(d.edge, calc_lambda_plus(1 / q, sigma), rtol=1e-10)
    np.testing.assert_allclose(d.soft_rank, calc_mp_soft_rank(lam, 1 / q, sigma), rtol=1e-10)
    np.testing.assert_allclose(d.stable_rank, stable_rank(lam), rtol=1e-10)


# --- spectra of layers -----------------------------------------------------------------------------------


def test_product_spectrum(rng):
    w_q, w_k = rng.normal(size=(2, 12, 5))
    lam, q = qk_gram_spectrum(w_q, w_k)
    s = np.linalg.svd(w_q @ w_k.T, compute_uv=False)
    assert len(lam) == 5 and q == 5 / 12  # the zeros of the larger Gram matrix are no part of it
    np.testing.assert_allclose(lam, s[:5] ** 2 / (s[:5] ** 2).mean())
    for kind, w in (("query", w_q), ("key", w_k)):
        np.testing.assert_allclose(qk_gram_spectrum(w_q, w_k, kind).lam, np.linalg.eigvalsh(w.T @ w / 12)[::-1])


def test_the_edge_of_a_product_lies_further_out(rng):
    """With the MP edge a product of noise has spikes; with the calibrated one it has not."""
    factors = QKFactors((rng.normal(size=(64, 4, 16)),), (rng.normal(size=(64, 4, 16)),))
    lam, q = qk_gram_spectrum(*factors.combined())
    assert mp_diagnostics(lam, q).n_out > 3
    edge = null_edge(factors)
    assert edge > mp_edges(q)[1] and mp_diagnostics(lam, q, edge=edge).n_out <= 1


def test_effective_weights_are_what_logits_are_made_of():
    """q_n·k_n without positions is x W_Q^n (W_K^n)ᵀ y, for every kind of mixer."""
    options = {"head_dim": H, "rngs": nnx.Rngs(0)}
    x = np.asarray(X, np.float64)
    at = jnp.arange(T)

    def check(factors, q, k):
        w_q, w_k = (w.reshape(D, N, -1) for w in factors.combined())
        logits = np.einsum("btd,dnh,enh,bse->bnts", x, w_q, w_k, x)
        np.testing.assert_allclose(np.einsum("btnh,bsnh->bnts", q, k), logits, atol=1e-3)

    grouped = GroupedQueryAttention(D, N, num_kv_heads=2, **options)
    check(qk_factors(grouped), grouped.qkv.query(X), jnp.repeat(grouped.qkv.key(X), 2, axis=2))
    relaxed = RelaxedAttention(D, N, **options)  # changes weights, not logits
    check(qk_factors(relaxed), relaxed.qkv.query(X), relaxed.qkv.key(X))
    pre = MLAPreRoPE(D, N, **options)
    check(qk_factors(pre), pre.queries(X, at), pre.latents(X, at)["k"])
    for rank in (None, 5):
        latent = MLADecoupled(D, N, latent_dim=7, rope_dim=4, normed=False, query_latent_dim=rank, **options)
        (q_c, q_r), (k, _) = latent.split_queries(X, at), latent.expand(latent.latents(X, at), at)
        check(qk_factors(latent), q_c, k[..., :H])
        check(qk_factors(latent, "rope"), q_r, k[..., H:])


def test_shuffling_keeps_entries_and_shapes(rng):
    factors = qk_factors(MLAPreRoPE(D, N, head_dim=H, rngs=nnx.Rngs(0)))
    shuffled = factors.shuffled(rng)
    for a, b in zip(factors.query + factors.key, shuffled.query + shuffled.key, strict=True):
        assert a.shape == b.shape and not np.array_equal(a, b)
        np.testing.assert_array_equal(np.sort(a, axis=None), np.sort(b, axis=None))


def test_a_probe_follows_training():
    config = LMConfig(vocab_size=16, dim=16, num_layers=2, num_heads=2, mlp_dim=16)
    model, probe = DecoderLM(config, rngs=nnx.Rngs(0)), SpectralProbe(every=10)
    batch = lambda key: noisy_periodic(key, 4, 9)  # noqa: E731
    losses = fit(model, next_token_loss, batch, steps=20, seed=0, probe=probe, every=10)
    assert losses.shape == (20,)
    assert [(row["step"], row["layer"]) for row in probe.log] == [(s, i) for s in (0, 10, 20) for i in (0, 1)]
    assert all(np.isfinite(list(row.values())).all() for row in probe.log)
    assert all(row["n_out"] <= 1 for row in probe.log if row["step"] == 0)
    gap = probe.mean("gap")
    assert list(gap) == [0, 10, 20] and len(set(gap.values())) == 3
    lam, _ = qk_gram_spectrum(*qk_factors(model.layers.runs[1].mixer).combined())
    np.testing.assert_allclose(probe.log[-1]["stable_rank"], lam.sum() / lam[0])
    probe(1, None)  # between probes the model is not looked at


def test_a_probe_reads_the_part_it_is_told():
    config = LMConfig(vocab_size=8, dim=16, num_layers=1, num_heads=2, mixer="transmla", mixer_args={"rope_dim": 4})
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    for part in ("content", "rope"):
        probe = SpectralProbe(part=part)
        probe(0, model)
        lam, _ = qk_gram_spectrum(*qk_factors(model.layers.runs[0].mixer, part).combined())
        np.testing.assert_allclose(probe.log[0]["stable_rank"], lam.sum() / lam[0])


def test_shuffling_a_trained_matrix_leaves_noise(rng):
    """Trained to prefer two directions, a layer has two outliers; with the entries shuffled, none of them."""
    mixer = GroupedQueryAttention(32, 2, head_dim=16, rngs=nnx.Rngs(0))
    u, v = (np.linalg.qr(rng.normal(size=(32, 2)))[0] for _ in range(2))
    target = jnp.float32(u @ np.diag([16.0, 12.0]) @ v.T)
    start = mixer.qkv.query.kernel[...].reshape(32, -1) @ mixer.qkv.key.kernel[...].reshape(32, -1).T

    def loss(mixer, _):
        made = jnp.einsum("dnh,enh->de", mixer.qkv.query.kernel[...], mixer.qkv.key.kernel[...])
        return ((made - start - target) ** 2).sum()

    fit(mixer, loss, lambda key: key, steps=300, seed=0, learning_rate=1e-2)
    factors = qk_factors(mixer)
    edge = null_edge(factors)
    learned, shuffled = (
        mp_diagnostics(qk_gram_spectrum(*f.combined()).lam, edge=edge) for f in (factors, factors.shuffled(rng))
    )
    assert learned.n_out == 2 and learned.energy_out > 0.5
    assert shuffled.n_out <= 1


# --- the variants of latent attention --------------------------------------------------------------------


def test_pre_rope_is_its_equations():
    mixer = MLAPreRoPE(D, N, head_dim=H, causal=True, positions=RoPE(), rngs=nnx.Rngs(0))
    x = np.asarray(X, np.float64)
    f64 = lambda p: np.asarray(p[...], np.float64)  # noqa: E731
    angle = np.arange(T)[:, None, None] * 10000.0 ** (-np.arange(H // 2) / (H // 2))

    def turned(kernel, down):
        y = np.einsum("btd,dnh->btnh", x, f64(kernel))
        a, b = y[..., : H // 2], y[..., H // 2 :]
        y = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
        return np.einsum("btnh,nhc->btnc", y, f64(down))

    q, k = turned(mixer.qkv.query.kernel, mixer.query_down), turned(mixer.qkv.key.kernel, mixer.key_down)
    assert q.shape[-1] == H // 2
    o, _ = oracle_attention(q, k, np.einsum("btd,dnh->btnh", x, f64(mixer.qkv.value.kernel)), np.tri(T, dtype=bool))
    y = nnx.jit(lambda m, x: m(x))(mixer, X)
    np.testing.assert_allclose(y, np.einsum("btnh,nhd->btd", o, f64(mixer.out.kernel)), atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (MLAPreRoPE, {}),
        (MLAPreRoPE, {"positions": FoPEConfig(train_length=32)}),
        (MLADecoupled, {"latent_dim": 7, "rope_dim": 4}),
    ],
)
def test_variants_are_causal_and_decode(cls, options):
    mixer = cls(D, N, head_dim=H, causal=True, rngs=nnx.Rngs(0), **{"positions": RoPE(), **options})
    run = nnx.jit(lambda m, x: m(x))
    full = run(mixer, X)
    changed = run(mixer, X.at[:, 3:].set(0.0))
    np.testing.assert_array_equal(changed[:, :3], full[:, :3])
    prefill = nnx.jit(lambda m, x, c: m.prefill(x, c))
    y, cache = prefill(mixer, X[:, :4], mixer.init_cache(B, T))
    outputs = [y]
    for t in (4, 5):
        y, cache = prefill(mixer, X[:, t : t + 1], cache)
        outputs.append(y)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), full, atol=1e-5)


def test_costs():
    pre = MLAPreRoPE(D, N, head_dim=H, causal=True, rngs=nnx.Rngs(0))
    values = {**sizes(N=N, D=D, H=H), "r": 7, "P": 4}
    assert evaluate(PAPER.costs["cache numbers per token"], values) == pre.cache_numbers_per_token() == N * H / 2 + N * H
    assert evaluate(PAPER.costs["parameters"], values) == parameter_count(pre)
    decoupled = MLADecoupled(D, N, head_dim=H, latent_dim=7, rope_dim=4, causal=True, rngs=nnx.Rngs(0))
    assert evaluate(PAPER.costs["cache numbers per token, MLADecoupled"], values) == decoupled.cache_numbers_per_token() == 11


# --- bad input -------------------------------------------------------------------------------------------


def test_bad_arguments():
    eye = np.eye(4)
    with pytest.raises(ValueError, match=r"kind.*'product'"):
        qk_gram_spectrum(eye, eye, "prodcut")
    with pytest.raises(ValueError, match=r"w_q, w_k: .*\(4, 4\) and \(4, 3\)"):
        qk_gram_spectrum(eye, eye[:, :3])
    with pytest.raises(ValueError, match="q: without an edge"):
        mp_diagnostics(np.ones(3))
    for lam in (np.zeros(3), np.array([1.0, np.nan]), np.array([-1.0, 2.0])):
        with pytest.raises(ValueError, match="lam: eigenvalues"):
            mp_diagnostics(lam, 0.5)
    with pytest.raises(ValueError, match=r"variance.*'bulk'"):
        mp_diagnostics(np.ones(3), 0.5, variance="bluk")
    with pytest.raises(ValueError, match=r"edge.*'null'"):
        SpectralProbe(edge="nul")
    with pytest.raises(ValueError, match="edge: 'null' is calibrated for kind='product'"):
        SpectralProbe(kind="key")
    with pytest.raises(ValueError, match="head_dim: is halved"):
        MLAPreRoPE(D, N, head_dim=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="part: only MultiHeadLatentAttention"):
        qk_factors(MLAPreRoPE(D, N, rngs=nnx.Rngs(0)), "rope")
    with pytest.raises(ValueError, match="no rotary part"):
        qk_factors(MLADecoupled(D, N, rope_dim=0, rngs=nnx.Rngs(0)), "rope")
    for other in (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), CompressedConvAttention(D, N, rngs=nnx.Rngs(0))):
        with pytest.raises(TypeError, match=f"got {type(other).__name__}"):
            qk_factors(other)
        with pytest.raises(TypeError, match=f"model: .*Stack of layers.*got {type(other).__name__}"):
            SpectralProbe()(0, other)
    for options, words in (
        ({"every": 0}, "every: .* at least 1, got 0"),
        ({"kind": "querry", "edge": "mp"}, "kind.*'query'"),
        ({"part": "roap"}, "part.*rope"),
    ):
        with pytest.raises(ValueError, match=words):
            SpectralProbe(**options)
    for options in ({"samples": 0}, {"quantile": 1.5}):
        with pytest.raises(ValueError, match="samples, quantile: at least 1"):
            null_edge(qk_factors(GroupedQueryAttention(D, N, rngs=nnx.Rngs(0))), **options)
    scanned = DecoderLM(LMConfig(vocab_size=5, dim=8, num_heads=2, num_layers=2, scan_layers=True), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="scan_layers=False"):
        SpectralProbe()(0, scanned)
