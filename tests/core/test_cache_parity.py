"""Scores and kept sets agree with NVIDIA's kvpress."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core.cache import KnormPolicy, Obs, ObservedAttentionPolicy, SnapKVPolicy, StreamingPolicy

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
kvpress = pytest.importorskip("kvpress")

B, T, N, K, H = 2, 40, 4, 2, 8


@pytest.fixture
def prompt(rng):
    """k, v heads-major and a random causal attention map."""
    k, v = (rng.normal(size=(B, K, T, H)).astype(np.float32) for _ in range(2))
    logits = np.where(np.tri(T, dtype=bool), rng.normal(size=(B, N, T, T)), -np.inf)
    weights = np.exp(logits)
    return k, v, (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def theirs(press, k, v, attn):
    module = SimpleNamespace(config=SimpleNamespace(num_attention_heads=N), layer_idx=0)
    hidden, *tensors = (torch.from_numpy(x) for x in (np.zeros((B, T, 1), np.float32), k, v, attn))
    return press.score(module, hidden, tensors[0], tensors[1], tensors[2], {}).numpy()


def ours(policy, k, v, attn):
    k, v, attn = (jnp.asarray(x) for x in (k, v, attn))
    return policy, Obs(k, v, jnp.full(B, T), attn_win=attn[:, :, -8:], mass=attn.sum(2), attn=attn)


def test_snapkv(prompt):
    press = kvpress.SnapKVPress(window_size=8, kernel_size=5)
    policy, obs = ours(SnapKVPolicy(capacity=16, window=8, kernel=5), *prompt)
    np.testing.assert_allclose(policy.score(obs)[..., :-8], theirs(press, *prompt)[..., :-8], rtol=1e-5)


def test_knorm(prompt):
    policy, obs = ours(KnormPolicy(capacity=16), *prompt)
    np.testing.assert_allclose(policy.score(obs), theirs(kvpress.KnormPress(), *prompt), rtol=1e-5)


def test_observed_attention(prompt):
    policy, obs = ours(ObservedAttentionPolicy(capacity=16), *prompt)
    want = theirs(kvpress.ObservedAttentionPress(), *prompt)
    np.testing.assert_allclose(policy.score(obs), want, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_streaming_keeps_the_same_tokens(prompt, ratio):
    press = kvpress.StreamingLLMPress(compression_ratio=ratio, n_sink=4)
    kept = int(T * (1 - ratio))
    policy, obs = ours(StreamingPolicy(sinks=4, recent=kept - 4), *prompt)
    np.testing.assert_array_equal(policy.keep(obs), theirs(press, *prompt) > 0)
