"""Masks, scores and weight maps on matplotlib axes, for sizes at which single cells can be seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnzoo.core.attention import attention
from attnzoo.core.blocks import EMPTY, FULL
from attnzoo.core.cells import Geometry, Tile, all_cells, spread
from attnzoo.core.masks import Mask
from attnzoo.core.scores import Score
from attnzoo.core.weights import HIDDEN, Weights, softmax

SHADES = {
    "hidden, in an empty tile": "#ffffff",
    "hidden, in a partial tile": "#dfe7ec",
    "seen, in a partial tile": "#8ecae6",
    "seen, in a full tile": "#126782",
}
"""What the colours of a drawn mask mean, in the order of the numbers it is drawn from."""

LOGITS = 3.0  # rows of logits run from this down to its negative
CURVE = 60.0  # and the logits of a score that does the same everywhere from minus this to this


def draw_mask(
    ax: Any, mask: Mask, queries: int, keys: int | None = None, *, heads: int = 1, batch: int = 1, tile: int = 4
) -> None:
    """Draws every cell of the first batch row by whether it is seen and by its tile; heads that differ stand side by side.

    tile: queries and keys of a tile. Tiles are counted of what is drawn.

    Raises ValueError for a mask whose tiles contradict its cells.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    keys = queries if keys is None else keys
    seen = np.asarray(mask.dense(queries, keys, batch=batch, heads=heads))[0]
    tiles = mask.block_map(queries, keys, block_q=tile, block_k=tile, batch=batch, heads=heads).state[0]
    state = tiles.repeat(tile, 1)[:, :queries].repeat(tile, 2)[..., :keys]
    wrong = np.broadcast_to(np.where(seen, state == EMPTY, state == FULL), np.broadcast_shapes(seen.shape, state.shape))
    if wrong.any():
        n, t, s = np.argwhere(wrong)[0]
        kind = "empty" if seen[n % len(seen), t, s] else "full"
        raise ValueError(f"mask: {mask} has a tile that is {kind}, but not so at its query {t}, key {s} (head {n})")
    shade = np.where(seen, np.where(state == FULL, 3, 2), np.where(state == EMPTY, 0, 1))
    _cells(ax, shade, cmap=ListedColormap(list(SHADES.values())), vmin=-0.5, vmax=3.5)
    drawn = tiles[:1] if _alike(shade) else np.broadcast_to(tiles, (len(shade), *tiles.shape[1:]))
    empty, partial, full = np.bincount(drawn.ravel(), minlength=3)
    title = f"{mask}\n{full} full, {partial} partial, {empty} empty tiles of {tile}×{tile}"
    ax.set_title(title, fontsize=9, wrap=True)
    patches = [Patch(facecolor=colour, edgecolor="0.6", label=name) for name, colour in SHADES.items()]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8, frameon=False)


def draw_score(
    ax: Any, score: Score, queries: int, keys: int | None = None, *, heads: int = 1, kv_heads: int = 1, batch: int = 1
) -> None:
    """Draws what a score makes of logits that are all 0, or all 1 where zeros stay alike, as a map of the cells.

    A score that does the same everywhere is drawn as the curve of the new logit over the old one.
    """
    keys = queries if keys is None else keys
    g = Geometry(batch, heads, kv_heads, queries, keys)
    for logit in (0.0, 1.0):
        new = scored(score, jnp.float32(logit), g)[0]
        if not (new == new.flat[0]).all():  # NaN, a hidden cell, is unlike itself
            image = _cells(ax, new, cmap="viridis")
            ax.figure.colorbar(image, ax=ax, shrink=0.8)
            ax.set_title(f"{score}\nwhat logits of {logit:g} become", fontsize=9, wrap=True)
            return
    old = np.linspace(-CURVE, CURVE, keys, dtype=np.float32)
    ax.plot(old, old, color="0.6", linestyle="--", label="unchanged")
    ax.plot(old, scored(score, jnp.asarray(old), g)[0, 0, 0], color="#126782", label=str(score))
    ax.set(xlabel="logit", ylabel="new logit", title="the same at every cell")
    ax.legend()


def draw_weights(ax: Any, maps: Mapping[str, Weights], keys: int, *, heads: int = 1, kv_heads: int = 1, batch: int = 1) -> None:
    """Draws the weights of one row of falling logits under softmax and under each of `maps`, a line per head where they differ.

    Maps are asked for the last row of a square of logits.
    """
    logits = np.linspace(LOGITS, -LOGITS, keys, dtype=np.float32)
    k = jnp.broadcast_to(jnp.asarray(logits)[:, None, None], (batch, keys, kv_heads, 1))
    q = jnp.ones((batch, keys, heads, 1))
    for number, (name, weights) in enumerate([("softmax", softmax), *maps.items()]):
        w = np.asarray(attention(q, k, k, scale=1.0, weights=weights, backend="dense", return_weights=True)[1])[0, :, -1]
        style = {"color": f"C{number - 1}", "marker": "."} if number else {"color": "0.6", "linestyle": "--"}
        rows = w if np.ptp(w, axis=0).max() > 0 else w[:1]
        for head, row in enumerate(rows):
            ax.plot(logits, row, label=f"{name}, head {head}" if len(rows) > 1 else name, **style)
    ax.set(xlabel="logit", ylabel="weight", title=f"the weights of {keys} keys with these logits")
    ax.grid(alpha=0.3)
    ax.legend()


def scored(score: Score, s: Float[Array, ...], g: Geometry) -> Float[np.ndarray, "B N T S"]:
    """What a score makes of logits that broadcast to ``[B, N, T, S]``; NaN where it hides the cell."""
    size = (g.batch, g.heads, g.queries, g.keys)
    bound, tile = score.bind(g), Tile((0, 0, 0, 0), size)
    parts = (spread(op, jnp.asarray(op.x), tile) for op in bound.operands)
    new = np.broadcast_to(bound.apply(jnp.broadcast_to(s, size), all_cells(g), *parts), size)
    return np.where(new <= HIDDEN, np.nan, new)


def _alike(values: np.ndarray) -> bool:
    """Whether all heads of [N, T, S] are equal."""
    return np.array_equal(values, np.broadcast_to(values[:1], values.shape), equal_nan=True)


def _cells(ax: Any, values: np.ndarray, **options: Any) -> Any:
    """An image of [N, T, S]: one head if all are alike, else all of them, a cell apart."""
    values = values[:1] if _alike(values) else values
    heads, queries, keys = values.shape
    apart = np.full((heads, queries, 1), np.nan)
    row = np.concatenate([np.concatenate([values, apart], 2)[n] for n in range(heads)], 1)[:, :-1]
    image = ax.imshow(row, interpolation="nearest", **options)
    ax.set(xlabel="key", ylabel="query")
    if heads > 1:
        ax.set_xticks([n * (keys + 1) + (keys - 1) / 2 for n in range(heads)], [f"head {n}" for n in range(heads)])
    return image
