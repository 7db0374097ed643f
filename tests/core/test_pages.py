"""Keys behind a block table: the same results as of the gathered ones, by every backend, and in place by the kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.core import masks
from attnzoo.core.attention import attention, explain
from attnzoo.core.backends.fused import tpu
from attnzoo.core.cache import append, cached_attention, init_cache, init_paged_cache
from pallas_kernels.tpu.launch import simulation

RNG = np.random.default_rng(0)
TABLE = jnp.asarray([[4, 1, -1], [0, 3, 2]])
HELD = jnp.asarray([[200], [380]])


def inputs(page, queries=1, dtype=jnp.float32):
    shapes = (2, queries, 4, 16), (5, page, 2, 16), (5, page, 2, 24)
    return [jnp.asarray(RNG.normal(size=s), dtype) for s in shapes]


def positions(page, queries=1):
    slots = jnp.arange(3 * page)
    return {
        "q_positions": HELD - queries + jnp.arange(queries),
        "kv_positions": jnp.where(slots < HELD, slots, -1),
        "mask": masks.Causal(),
    }


def by_hand(q, k, v, page):
    k, v = (np.asarray(x)[np.maximum(TABLE, 0)].reshape(2, 3 * page, 2, -1) for x in (k, v))
    return attention(q, jnp.asarray(k), jnp.asarray(v), backend="dense", **positions(page, q.shape[1]))


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_other_backends_gather_them(backend):
    q, k, v = inputs(130)
    out = attention(q, k, v, pages=TABLE, backend=backend, **positions(130))
    np.testing.assert_allclose(out, by_hand(q, k, v, 130), atol=2e-6)
    assert np.isfinite(jax.grad(lambda k: attention(q, k, v, pages=TABLE, backend=backend, **positions(130)).sum())(k)).all()


@pytest.mark.parametrize("queries", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_tpu_reads_them_in_place(queries, monkeypatch):
    q, k, v = inputs(128, queries)
    where = positions(128, queries)
    seen, attend = [], tpu.attend
    monkeypatch.setattr(tpu, "attend", lambda part, packed: seen.append(part.k.shape) or attend(part, packed))
    with simulation():
        run = jax.jit(lambda q, k, v, t: attention(q, k, v, pages=t, backend="pallas", **where))
        out = jax.block_until_ready(run(q, k, v, TABLE))
    assert seen == [(5, 128, 2, 16)]
    np.testing.assert_allclose(out, by_hand(q, k, v, 128), atol=2e-6)


def test_no_derivative_in_the_kernels():
    q, k, v = inputs(128)
    with simulation(), pytest.raises(ValueError, match="read through a block table have no derivative"):
        jax.grad(lambda q: attention(q, k, v, pages=TABLE, backend="pallas", **positions(128)).sum())(q)


def test_a_paged_cache_is_read_through_its_table():
    spec = {"k": (2, 8), "v": (2, 8)}
    new = {name: jnp.asarray(RNG.normal(size=(2, 5, 2, 8)), jnp.float32) for name in spec}
    lengths = jnp.asarray([3, 5])
    q = jnp.asarray(RNG.normal(size=(2, 1, 4, 8)), jnp.float32)
    paged = append(init_paged_cache(2, 8, spec, page=2), new, lengths=lengths)
    dense = append(init_cache(2, 8, spec), new, lengths=lengths)
    np.testing.assert_allclose(cached_attention(q, paged), cached_attention(q, dense), atol=1e-6)


def test_bad_tables():
    q, k, v = inputs(128)
    with pytest.raises(TypeError, match="pages has dtype float32"):
        attention(q, k, v, pages=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"pages: needs q \[B, T, N, H\], pools .* got q \(2, 1, 4, 16\)"):
        attention(q, k, v, pages=TABLE[0])
    with pytest.raises(ValueError, match="as many pages as each other"):
        attention(q, k, v[:3], pages=TABLE)
    with pytest.raises(ValueError, match=r"pages 0 to 4 \(-1: none\), got -1 to 5"):
        attention(q, k, v, pages=TABLE.at[1, 0].set(5), **positions(128))
    with pytest.raises(ValueError, match="need kv_positions"):
        attention(q, k, v, pages=TABLE)
    assert "blockwise" in str(explain(q, k, v, pages=TABLE, backend="blockwise", **positions(128)))
