"""The arithmetic that the GPU kernels do per tile, run by plain JAX over the same lists of tiles."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gpu import tile
from pallas_kernels.gpu.tiles import FULL, PARTIAL, SKIP, make_tiles
from pallas_kernels.tpu.problem import HIDDEN
from tests.pallas.gpu_cases import CASES


def part(p, x, layout, b, h, t0, s0, shape):
    """A piece of a laid-out operand as the kernel hands it to a score or mask."""
    b, h = b if layout.per_batch else 0, h if layout.per_head else 0
    rows, columns = slice(t0, t0 + shape[0]), slice(s0, s0 + shape[1])
    if layout.form == "one":
        return x[b, h, 0, 0]
    if layout.form == "row":
        return tile.across(x[b, h, 0, rows], shape)
    if layout.form == "column":
        return tile.down(x[b, h, 0, columns], shape)
    if layout.form == "distance":
        t, s = np.ogrid[rows, columns]
        return x[h, 1, p.padded[0] + s - t]  # the copy that runs backwards
    return x[b, h, rows, columns].astype(jnp.int32 if x.dtype == jnp.int8 else x.dtype)


def walked(c):
    """out, lse and the number of tiles computed, by the kernels' arithmetic on the kernels' lists."""
    p, x, tiles = c.p, c.x, make_tiles(c.state.reshape(-1, *c.state.shape[2:]))
    out = np.full((*x.q.shape[:3], x.v.shape[-1]), np.nan)
    lse = np.full((p.batch, p.heads, x.q.shape[1]), np.nan)
    visited = 0
    shape = (p.rows, p.block_k)
    for b, h, t0 in np.ndindex(p.batch, p.heads, x.q.shape[1] // p.rows):
        t0 *= p.rows
        at = p.which_list(b, h) * tiles.rows + t0 // p.block_q
        r = tile.Running(jnp.zeros((p.rows, out.shape[-1])), jnp.full(p.rows, HIDDEN), jnp.zeros(p.rows))
        q = x.q[b, t0 : t0 + p.rows, h].astype(jnp.float32)
        for n in range(tiles.count[at]):
            s0 = int(tiles.minor[tiles.begin[at] + n]) * p.block_k
            k, v = (a[b, s0 : s0 + p.block_k, h // p.group].astype(jnp.float32) for a in (x.k, x.v))
            cells = b, h, *(start + i for start, i in zip((t0, s0), np.indices(shape), strict=True))
            parts = lambda xs, ls: [part(p, a, f, b, h, t0, s0, shape) for a, f in zip(xs, ls, strict=True)]  # noqa: B023, E731
            s = tile.scored(p, q @ k.T, *cells, parts(x.score, p.score_layouts))
            if n >= tiles.full[at]:
                s = tile.hidden(p, s, *cells, parts(x.mask, p.mask_layouts), p.keys)
            acc, top, total = r
            if p.phi is None:
                weight, shrink, top, total = tile.weigh(p, s, top, total)
                acc = acc * tile.across(shrink, acc.shape)
            else:
                weight = tile.pointwise(p, s)
            if p.keep is not None:
                weight = weight * p.keep(x.call[0], x.call[1], *cells)
            r = tile.Running(acc + weight.astype(x.v.dtype).astype(jnp.float32) @ v, top, total)
            visited += 1
        out[b, t0 : t0 + p.rows, h], lse[b, h, t0 : t0 + p.rows] = tile.finish(p, r)
    return out[:, : p.queries], lse[:, :, : p.queries], visited


@pytest.mark.parametrize("name", CASES)
def test_arithmetic_agrees_with_the_definition(name):
    c = CASES[name]()
    out, lse, visited = walked(c)
    # Weights are rounded to bfloat16 before they meet the values.
    np.testing.assert_allclose(out, c.out, atol=8e-3 * abs(c.out).max())
    if c.lse is not None:
        np.testing.assert_allclose(lse, c.lse, atol=2e-5)
    lists = c.p.batch * c.p.heads // (c.state.shape[0] * c.state.shape[1])
    assert visited == lists * 2 * (c.state != SKIP).sum()


def test_static_and_dynamic_lists_mean_the_same_tiles():
    state = np.random.default_rng(0).integers(0, 3, (3, 5, 7))
    static, dynamic = make_tiles(state), make_tiles(jnp.asarray(state))
    for at, row in enumerate(state.reshape(15, 7)):
        for tiles in (static, dynamic):
            minor = np.asarray(tiles.minor)[tiles.begin[at] : tiles.begin[at] + tiles.count[at]]
            assert list(minor) == [*np.flatnonzero(row == FULL), *np.flatnonzero(row == PARTIAL)]
            assert tiles.full[at] == (row == FULL).sum()
    assert static.kinds == {SKIP, PARTIAL, FULL}


def test_a_map_without_tiles_makes_lists_that_can_be_read():
    tiles = make_tiles(np.zeros((1, 2, 3), int))
    assert tiles.minor.shape == (1,)
    assert not tiles.count.any()
