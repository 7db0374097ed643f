"""Matrix atom sharing: layers whose matrices are combinations of shared ones, trained or found by PCA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.core.cache import cache_bytes
from attnzoo.costs import evaluate, sizes
from attnzoo.models.decoding import greedy
from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.models.masa import MASATransformer, calibrate, decayed, freeze_coefficients, masa_from_pretrained
from attnzoo.nn.linear import parameter_count
from attnzoo.zoo.projections.masa import (
    PAPER,
    CoefficientMLP,
    DirectCoefficients,
    MatrixAtomDictionary,
    RepeatAllOver,
    SequentialSharing,
    compression_rate,
    group_blocks_by_kl,
    local_refinement,
    matrix_pca,
)

V, D, N, K, H, L, S = 11, 16, 4, 2, 4, 4, 2
CONFIG = LMConfig(vocab_size=V, dim=D, num_layers=L, num_heads=N, num_kv_heads=K, mlp_dim=16)
NAMES = ("query", "key", "value", "out")
forward = nnx.jit(lambda model, tokens: model(tokens))


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, V, (2, 7)))


def kernel(block, name):
    return block.mixer.out.kernel if name == "out" else getattr(block.mixer.qkv, name).kernel


def tied(lm, source):
    """The decoder whose layer l has the attention matrices of layer source[l], written out."""
    out = DecoderLM(lm.config, rngs=nnx.Rngs(9))
    nnx.update(out, nnx.state(lm))
    for block, of in zip(out.layers.runs, source, strict=True):
        for name in NAMES:
            kernel(block, name)[...] = kernel(lm.layers.runs[of], name)[...]
    return out


def sharing(lm, num_atoms, coefficients, atoms_of):
    """A MASA model with the rest of `lm`, its atoms those of the layers `atoms_of`."""
    model = MASATransformer(lm.config, num_atoms, coefficients=coefficients, rngs=nnx.Rngs(3))
    for name in NAMES:
        model.dictionaries[name].atoms[...] = jnp.stack([kernel(lm.layers.runs[l], name)[...] for l in atoms_of])
    rest = dict(nnx.to_flat_state(nnx.state(lm)))
    for path, leaf in nnx.to_flat_state(nnx.state(model.lm)):
        leaf[...] = rest[path][...]
    return model


# --- sharing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("coefficients", "num_atoms", "atoms_of", "source"),
    [
        (SequentialSharing, L, [0, 1, 2, 3], [0, 1, 2, 3]),  # C = I: an ordinary transformer
        (SequentialSharing, 1, [2], [2, 2, 2, 2]),  # full sharing
        (SequentialSharing, 2, [0, 3], [0, 0, 3, 3]),
        (RepeatAllOver, 2, [0, 3], [0, 3, 0, 3]),
        (RepeatAllOver, 3, [0, 1, 2], [0, 1, 2, 0]),
    ],
)
def test_one_hot_coefficients_are_sharing(tokens, coefficients, num_atoms, atoms_of, source):
    lm = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(
        forward(sharing(lm, num_atoms, coefficients, atoms_of), tokens), forward(tied(lm, source), tokens)
    )


@pytest.mark.parametrize("mode", ["qkvo", "qkv", "joint"])
def test_matrices_are_combinations(mode):
    config = dataclasses.replace(CONFIG, num_kv_heads=N)
    model = MASATransformer(config, S, mode=mode, rngs=nnx.Rngs(0))
    c, built = np.asarray(model.coefficients()), model.matrices()
    assert c.shape == (L, 3 if mode == "qkv" else 4, S)
    assert list(built) == list(NAMES[: c.shape[1]])
    assert len(model.dictionaries) == (1 if mode == "joint" else c.shape[1])
    for p, (name, w) in enumerate(built.items()):
        atoms = np.asarray(model.dictionaries["joint" if mode == "joint" else name].atoms[...])
        for l in range(L):
            expected = sum(c[l, p, s] * atoms[s] for s in range(S)).reshape(w.shape[1:])
            np.testing.assert_allclose(w[l], expected, atol=1e-5)
    if mode == "qkv":  # W_O stays per layer
        assert all(block.mixer.out.kernel is not None for block in model.lm.layers.runs)


@pytest.mark.parametrize("scan", [False, True])
def test_materialised_scanned_and_decoded_alike(tokens, scan):
    config = dataclasses.replace(CONFIG, scan_layers=scan)
    model = MASATransformer(config, S, rngs=nnx.Rngs(0))
    y = forward(model, tokens)
    np.testing.assert_allclose(forward(MASATransformer(CONFIG, S, rngs=nnx.Rngs(0)), tokens), y, atol=1e-5)
    lm = model.materialise()
    assert isinstance(lm, DecoderLM) and jax.tree.structure(nnx.state(lm)) == jax.tree.structure(
        nnx.state(DecoderLM(config, rngs=nnx.Rngs(0)))
    )
    np.testing.assert_allclose(forward(lm, tokens), y, atol=1e-5)
    cache = model.init_cache(2, 7)
    first, cache = nnx.jit(lambda m, t, c: m.prefill(t, c))(model, tokens[:, :6], cache)
    last, cache = nnx.jit(lambda m, t, c: m.step(t, c))(model, tokens[:, 6:], cache)
    np.testing.assert_allclose(jnp.concatenate([first, last], axis=1), y, atol=1e-5)
    assert cache_bytes(cache) == cache_bytes(lm.init_cache(2, 7))
    if scan:  # atoms are kept once, whatever the number of layers
        assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.dictionaries))) == S * (2 * D * N * H + 2 * D * K * H)


def test_generation(tokens):
    model = freeze_coefficients(MASATransformer(CONFIG, S, rngs=nnx.Rngs(0)))
    ours, theirs = (greedy(m, tokens, max_new=4).tokens for m in (model, model.materialise()))
    np.testing.assert_array_equal(ours, theirs)


def test_dropout_goes_on(tokens):
    model = MASATransformer(dataclasses.replace(CONFIG, dropout_rate=0.5), S, rngs=nnx.Rngs(0))
    assert not np.allclose(forward(model, tokens), forward(model, tokens))
    model.eval()
    np.testing.assert_array_equal(forward(model, tokens), forward(model, tokens))


# --- coefficients ----------------------------------------------------------------------------------------


def test_freezing(tokens):
    model = MASATransformer(CONFIG, S, rngs=nnx.Rngs(0))
    frozen = freeze_coefficients(model)
    np.testing.assert_allclose(forward(frozen, tokens), forward(model, tokens), atol=4e-6, rtol=1e-6)
    assert any("embeddings" in path for path, _ in nnx.to_flat_state(nnx.state(model)))
    left = [path for path, _ in nnx.to_flat_state(nnx.state(frozen)) if "coefficients" in path]
    assert left == [("coefficients", "c")]
    assert not [path for path, _ in nnx.to_flat_state(nnx.state(frozen, nnx.Param)) if "coefficients" in path]


def test_coefficients_start_with_unit_rows():
    c = CoefficientMLP(12, 4, 4, rngs=nnx.Rngs(0))()
    np.testing.assert_allclose((c**2).sum(-1).mean(0), np.ones(4), rtol=1e-4)
    assert np.linalg.matrix_rank(np.asarray(c[:, 0])) == 4  # layers differ
    c = DirectCoefficients(300, 4, 4, rngs=nnx.Rngs(0))()
    np.testing.assert_allclose(c.var(), 1 / 4, rtol=0.1)
    near = DirectCoefficients(12, 4, 4, near_sharing=True, rngs=nnx.Rngs(0))()
    noise = near - SequentialSharing(12, 4, 4)()
    np.testing.assert_allclose(noise.std(), 0.1, rtol=0.2)
    # With rows of unit norm a matrix has a usual layer's variance.
    d = MatrixAtomDictionary(4, (64, 64), (None, None), fan_in=64, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(d(jnp.full((1, 4), 0.5)).var(), 1 / 64, rtol=0.1)


def test_gradients_reach_every_atom_and_every_layers_coefficients(tokens):
    model = MASATransformer(CONFIG, S, coefficients=DirectCoefficients, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda m: (m(tokens) ** 2).mean()))
    shared, own = gradient(model), gradient(model.materialise())
    c = np.asarray(model.coefficients())
    assert (np.abs(shared["coefficients"]["c"][...]) > 0).all()
    for p, name in enumerate(NAMES):
        of_layers = [np.asarray(kernel_gradient(own, l, name)) for l in range(L)]
        atoms = shared["dictionaries"][name]["atoms"][...]
        for s in range(S):
            np.testing.assert_allclose(atoms[s], sum(c[l, p, s] * of_layers[l] for l in range(L)), atol=1e-6)
            assert np.abs(atoms[s]).max() > 0
        inner = [[(np.asarray(a) * g).sum() for a in model.dictionaries[name].atoms[...]] for g in of_layers]
        np.testing.assert_allclose(shared["coefficients"]["c"][:, p], inner, atol=1e-6)


def test_gradients_reach_every_layers_embedding():
    mlp = CoefficientMLP(L, 4, S, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda mlp: (mlp()[..., 0] ** 3).sum()))(mlp)
    assert (np.abs(gradient["embeddings"][...]).max(1) > 0).all()


def kernel_gradient(state, layer, name):
    mixer = state["layers"]["runs"][layer]["mixer"]
    return (mixer["out"] if name == "out" else mixer["qkv"][name])["kernel"][...]


def test_decay_spares_coefficients():
    optax = pytest.importorskip("optax")
    params = nnx.state(MASATransformer(CONFIG, S, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = optax.adamw(1.0, weight_decay=0.5, mask=decayed)
    still = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda p: optimizer.update(still, optimizer.init(p), p)[0])(params)
    values = dict(nnx.to_flat_state(params))
    for path, update in nnx.to_flat_state(updates):
        np.testing.assert_allclose(update[...], 0 if "coefficients" in path else -0.5 * values[path][...], rtol=1e-6)


# --- sizes -----------------------------------------------------------------------------------------------


def test_sizes():
    assert compression_rate(12, 4, 768, 768) == pytest.approx(0.6666599, abs=5e-8)
    square = dataclasses.replace(CONFIG, num_kv_heads=N)
    model = freeze_coefficients(MASATransformer(square, S, rngs=nnx.Rngs(0)))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(nnx.state((model.dictionaries, model.coefficients))))
    values = {**sizes(D=D, N=N, L=L), "M": S}
    assert numbers == 4 * evaluate(PAPER.costs["parameters of one projection, all layers"], values)
    plain = 4 * evaluate(PAPER.costs["parameters of one projection, unshared"], values)
    assert numbers == pytest.approx((1 - compression_rate(L, S, D, D)) * plain)
    assert parameter_count(DecoderLM(square, rngs=nnx.Rngs(0))) - parameter_count(model) == plain - (numbers - 4 * L * S)


# --- matrices that are there already ---------------------------------------------------------------------


@pytest.fixture
def stack(rng):
    return rng.normal(size=(6, 5, 8)) + 0.5 * rng.normal(size=(1, 5, 8))


def error(stack, atoms, c):
    return ((stack - np.tensordot(c, atoms, 1)) ** 2).sum()


def test_pca_is_the_best_rank(stack):
    singular = np.linalg.svd(stack.reshape(6, -1), compute_uv=False)
    last = np.inf
    for s in range(1, 7):
        atoms, c = matrix_pca(stack, s)
        flat = atoms.reshape(s, -1)
        np.testing.assert_allclose(flat @ flat.T, np.eye(s), atol=1e-10)
        np.testing.assert_allclose(c, stack.reshape(6, -1) @ flat.T, atol=1e-10)
        found = error(stack, atoms, c)
        np.testing.assert_allclose(found, (singular[s:] ** 2).sum(), atol=1e-10)
        assert found <= last
        last = found
        if 6 % s == 0:  # no worse than the best sharing: the means of blocks, or of classes
            blocks = np.repeat(stack.reshape(s, 6 // s, 5, 8).mean(1), 6 // s, axis=0)
            classes = np.tile(stack.reshape(6 // s, s, 5, 8).mean(0), (6 // s, 1, 1))
            assert found <= ((stack - blocks) ** 2).sum() + 1e-10
            assert found <= ((stack - classes) ** 2).sum() + 1e-10


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_pca_beyond_the_rank(rng, dtype):
    stack = np.tensordot(rng.normal(size=(6, 2)), rng.normal(size=(2, 5, 8)), 1).astype(dtype)
    atoms, c = matrix_pca(stack, 5)
    flat = atoms.reshape(5, -1)
    np.testing.assert_allclose(flat @ flat.T, np.diag([1, 1, 0, 0, 0]), atol=1e-6)
    assert not c[:, 2:].any()
    assert error(stack, atoms, c) < 1e-10


def test_groups_are_cut_where_predictions_drift(rng):
    p = rng.dirichlet(np.ones(5), size=3)[[0, 0, 0, 1, 2, 2]] + 0.01 * rng.random((6, 5))
    p /= p.sum(-1, keepdims=True)
    drift = [float((p[l] * np.log(p[l] / p[l + 1])).sum()) for l in range(5)]
    assert set(np.argsort(drift)[-2:]) == {2, 3}
    assert group_blocks_by_kl(p, 3) == (0, 0, 0, 1, 2, 2)
    first = 2 if drift[2] > drift[3] else 3
    assert group_blocks_by_kl(p, 2) == tuple(int(l > first) for l in range(6))
    assert group_blocks_by_kl(p, 1) == (0,) * 6 and group_blocks_by_kl(p, 6) == (0, 1, 2, 3, 4, 5)


def test_refinement_minimises_the_error_on_the_inputs(rng):
    x = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)) * np.array([9, 3, 1, 0.5, 0.1, 0.1])
    dw = rng.normal(size=(6, 4))
    u, v = local_refinement(dw, x.T @ x, 4, eps=0.0)
    np.testing.assert_allclose(u @ v, dw, atol=1e-9)
    left, s, right = np.linalg.svd(dw, full_matrices=False)
    for k in (1, 2, 3):
        u, v = local_refinement(dw, x.T @ x, k, eps=0.0)
        assert u.shape == (6, k) and v.shape == (k, 4)
        ours = ((x @ (dw - u @ v)) ** 2).sum()
        plain = ((x @ (dw - (left[:, :k] * s[:k]) @ right[:k])) ** 2).sum()
        assert ours < plain
        best = np.linalg.svd(x @ dw, compute_uv=False)
        np.testing.assert_allclose(ours, (best[k:] ** 2).sum(), rtol=1e-6)  # Eckart and Young, of X dW


@pytest.mark.parametrize("mode", ["qkvo", "qkv", "joint"])
def test_from_pretrained(tokens, mode):
    config = dataclasses.replace(CONFIG, num_kv_heads=N, scan_layers=mode == "qkv")
    lm = DecoderLM(config, rngs=nnx.Rngs(0))
    y = forward(lm, tokens)
    whole = masa_from_pretrained(lm, 4 * L if mode == "joint" else L, mode=mode)
    np.testing.assert_allclose(forward(whole, tokens), y, atol=1e-4)
    fewer = masa_from_pretrained(lm, 1, mode=mode)
    assert parameter_count(fewer) < parameter_count(lm)
    refined = masa_from_pretrained(lm, 1, mode=mode, rank=D, tokens=tokens)
    np.testing.assert_allclose(forward(refined, tokens), y, atol=1e-4)
    of_fewer, of_refined = fewer.matrices(), refined.matrices()
    assert not np.allclose(of_fewer["query"], of_refined["query"], atol=0.1)


def test_groups_have_their_own_atoms(tokens):
    lm = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
    predictions, moments = calibrate(lm, tokens)
    assert predictions.shape == (L, V)
    np.testing.assert_allclose(predictions.sum(-1), 1, atol=1e-5)
    h = np.asarray(lm.layers.runs[0].mixer_norm(lm.embed(tokens)), np.float64).reshape(-1, D)
    np.testing.assert_allclose(moments["key"][0], h.T @ h / tokens.size, atol=1e-5)
    block = lm.layers.runs[0]
    written = np.asarray(block.mixer(block.mixer_norm(lm.embed(tokens))), np.float64).reshape(-1, D)
    w_o = np.asarray(block.mixer.out.kernel[...], np.float64).reshape(D, D)
    np.testing.assert_allclose(w_o.T @ moments["out"][0] @ w_o, written.T @ written / tokens.size, atol=1e-4)

    groups = np.array(group_blocks_by_kl(predictions, 2))
    model = masa_from_pretrained(lm, 1, num_groups=2, tokens=tokens)
    c = np.asarray(model.coefficients())
    for l in range(L):
        assert not c[l, :, 1 - groups[l]].any() and c[l, :, groups[l]].all()
    given = np.stack([kernel(b, "value")[...] for b in lm.layers.runs])
    for group in (0, 1):
        atoms, _ = matrix_pca(given[groups == group], 1)
        overlap = (atoms[0] * np.asarray(model.dictionaries["value"].atoms[group])).sum()
        np.testing.assert_allclose(abs(overlap), 1, atol=1e-5)


def test_grouped_heads_get_smaller_ranks(tokens):
    lm = DecoderLM(dataclasses.replace(CONFIG, num_kv_heads=1), rngs=nnx.Rngs(0))  # keys and values are 16 × 4
    for rank, shares in ((5, (8, 2, 2, 8)), (1, (2, 1, 1, 2)), (D, (16, 4, 4, 16))):  # 4 · rank in all, 4:1:1:4
        model = masa_from_pretrained(lm, 1, rank=rank, tokens=tokens)
        assert tuple(model.refinements[name][0].shape[-1] for name in NAMES) == shares
    np.testing.assert_allclose(forward(model, tokens), forward(lm, tokens), atol=1e-4)  # nothing is missing any more


def test_calibration_drops_nothing(tokens):
    config = dataclasses.replace(CONFIG, num_layers=2, dropout_rate=0.5, mixer_args={"dropout_rate": 0.5})
    lm = DecoderLM(config, rngs=nnx.Rngs(0))
    found = calibrate(lm, tokens)
    assert not np.allclose(forward(lm, tokens), forward(lm, tokens))  # the decoder keeps its mode
    lm.eval()
    jax.tree.map(np.testing.assert_array_equal, found, calibrate(lm, tokens))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MASATransformer(CONFIG, S, mode="qk", rngs=nnx.Rngs(0)), "unknown mode 'qk'.*joint, qkv, qkvo"),
        (lambda: MASATransformer(CONFIG, S, mode="joint", rngs=nnx.Rngs(0)), r"'joint' needs four .*\(16, 8\), \(16, 16\)"),
        (lambda: MASATransformer(CONFIG, 0, rngs=nnx.Rngs(0)), "num_atoms: at least one, got 0"),
        (lambda: SequentialSharing(4, 1, 3), "num_atoms: .* divisor of num_layers=4, got 3"),
        (lambda: matrix_pca(np.ones((3, 2, 2)), 4), "num_atoms: between 1 and the 3"),
        (lambda: group_blocks_by_kl(np.ones((3, 2)), 4), "num_groups: between 1 and the 3 layers, got 4"),
        (lambda: local_refinement(np.ones((3, 2)), np.eye(2), 1), r"moment: .* \(3, 3\), got \(2, 2\)"),
        (lambda: local_refinement(np.ones((3, 2)), np.eye(3), 3), "rank: between 1 and 2"),
        (lambda: masa_from_pretrained(DecoderLM(CONFIG, rngs=nnx.Rngs(0)), 1, rank=2), "tokens: .*rank=2"),
        (lambda: masa_from_pretrained(DecoderLM(CONFIG, rngs=nnx.Rngs(0)), 1, rank=-1), "rank, num_groups: .* got -1 and 1"),
        (lambda: masa_from_pretrained(DecoderLM(CONFIG, rngs=nnx.Rngs(0)), 1, num_groups=0), "rank, num_groups: .* 0 and 0"),
        (lambda: DirectCoefficients(4, 1, 3, near_sharing=True, rngs=nnx.Rngs(0)), "num_atoms: .* divisor of num_layers=4"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
