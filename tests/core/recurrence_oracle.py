"""The recurrences token by token in float64, straight from their equations, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def rank_one(q, k, v, log_decay=None, a=None, b=None, *, state):
    """``S_t = diag(e^w) S_{t-1} + b (a^T S_{t-1}) + k v^T``, ``o_t = S_t^T q_t``."""
    w = jnp.zeros_like(q) if log_decay is None else log_decay
    w = jnp.broadcast_to(w if w.ndim == q.ndim else w[..., None], q.shape)
    a = jnp.zeros_like(q) if a is None else a
    b = k if b is None else b

    def step(s, t):
        q, k, v, w, a, b = t
        read = jnp.einsum("bnk,bnkv->bnv", a, s)
        s = jnp.exp(w)[..., None] * s + b[..., None] * read[..., None, :] + k[..., None] * v[..., None, :]
        return s, jnp.einsum("bnk,bnkv->bnv", q, s)

    return _run(step, state, (q, k, v, w, a, b))


def delta(q, k, v, beta, log_decay=None, *, state):
    """The naive gated delta rule: decay, read what k holds, write ``beta (v - held)``."""
    w = jnp.zeros_like(q) if log_decay is None else log_decay
    w = jnp.broadcast_to(w if w.ndim == q.ndim else w[..., None], q.shape)

    def step(s, t):
        q, k, v, w, beta = t
        s = jnp.exp(w)[..., None] * s
        held = (s * k[..., None]).sum(-2)
        s = s + k[..., None] * ((v - held) * beta[..., None])[..., None, :]
        return s, (q[..., None] * s).sum(-2)

    return _run(step, state, (q, k, v, w, beta))


def _run(step, state, tokens):
    state, out = lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in tokens])
    return jnp.moveaxis(out, 0, 1), state


def values_and_gradients(f, arguments, weights):
    """``(out, state)`` of ``f(**arguments)`` and the gradients of their sum, weighted by ``weights``, in all arguments."""

    @jax.jit
    def both(arguments, weights):
        def loss(arguments):
            made = f(**arguments)
            return sum((x * c).sum() for x, c in zip(made, weights, strict=True)), made

        (_, made), d = jax.value_and_grad(loss, has_aux=True)(arguments)
        return made, d

    return jax.tree.map(np.asarray, both(arguments, weights))


def exact(f, arguments, weights):
    """:func:`values_and_gradients` in float64."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, weights))
        return values_and_gradients(f, *double)


def worst(got, wanted):
    """The largest error, each array against its own largest entry."""
    errors = jax.tree.map(lambda x, y: float(np.abs(np.float64(x) - y).max() / (np.abs(y).max() + 1e-30)), got, wanted)
    return max(jax.tree.leaves(errors))


def draw(rng, decay="none", erases="none", batch=1, length=40, heads=2, depth=16, width=8, strength=1.0):
    """Arguments of ``linear_recurrence``. erases: "none", "shared" (the rank one term writes along k) or "own"."""

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    tokens = (batch, length, heads)
    x = {"q": normal(*tokens, depth), "k": normal(*tokens, depth), "v": normal(*tokens, width)}
    if decay != "none":
        x["log_decay"] = -strength * np.exp(normal(*tokens, *([depth] if decay == "channel" else [])))
    if erases != "none":
        unit = normal(*tokens, depth)
        unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
        x["a"] = -unit
        x["k" if erases == "shared" else "b"] = unit * rng.random((*tokens, 1), dtype=np.float32)
    x["state"] = normal(batch, heads, depth, width)
    return x


def draw_weights(rng, x):
    return tuple(rng.normal(size=x[name].shape).astype(np.float32) for name in ("v", "state"))
