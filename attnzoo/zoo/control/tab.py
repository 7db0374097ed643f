"""TAB, a Transformer attention bottleneck (Rahmanzadehgervi et al., 2025, ICCV 2025, arXiv 2412.18675).

The last layer of an encoder of image pairs becomes one head of attention between the images, without a residual connection
around it, so that all that is said about a pair has gone through one map that can be seen, supervised and overwritten. With
the tokens of both images after joint layers, x [B, 1+P, D] and y [B, 1+P, D], token 0 the [CLS] (paper §3):

    q = LN1(x) W_q + b_q      k = LN1(y) W_k + b_k      v = LN1(y) W_v + b_v                      [B, 1+P, D]
    a = softmax(q kᵀ / sqrt(D))                                                                  [B, 1+P, 1+P]
    gbar = a_0 (1 - a_00)      of the CLS row: the more it looks at the CLS, the less of anything passes
    h = gbar v W_o + b_o                                                                          no skip connection
    h = h + MLP(LN2(h))                                                                           x sigmoid(1.702 x), F = 4 D

Left is TAB(x, y) and right TAB(y, x), with the same weights; only the two CLS outputs go on. Over all tokens gbar sums to
1 - a_00, over the patches to (1 - a_00)². At a_00 = 1 nothing passes: the output is the same for every pair.

The map that is shown and supervised is a_0, ungated: 1 - cos(a_0, m), with m the changed patches of the image whose patches
it looks at, or the CLS where nothing changed. Users edit gbar: all zeros, one patch, a region set to zero.

Costs: the CLS row is P scores of width D; queries do not see each other, so the pair form computes that row alone.

Equations and losses follow the authors' code (anguyen8/TAB). What an edit replaces is ours: the released function ignores it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from attnzoo.core.attention import attention
from attnzoo.core.weights import softmax_rows
from attnzoo.errors import unknown
from attnzoo.nn.feed_forward import MLP
from attnzoo.nn.linear import linear
from attnzoo.nn.norms import norm
from attnzoo.nn.routing import mean_over_tokens
from attnzoo.paper import Paper

EDIT_MODES = ("gated", "ungated", "logits")


class TABMap(NamedTuple):
    """The CLS row: a_0 as it is shown and supervised, and gbar as it is used (edited, where it was)."""

    attention: Float[Array, "B S"]
    gated: Float[Array, "B S"]

    @property
    def patch_mass(self) -> Float[Array, "B"]:
        """How much of the patches passes, in [0, 1]."""
        return self.gated[:, 1:].sum(axis=-1)


class TABAttention(nnx.Module):
    """One head from the tokens x of one image to those of the other; (x [B, T, D], y [B, S, D]) -> [B, T, D].

    Row 0 of x and y is the CLS; T may be 1.
    gate: multiply the CLS row by 1 - a_00; without it this is plain attention of one head.
    strict: leave out the CLS's value too, so that nothing but patches passes.
    """

    def __init__(
        self,
        dim: int,
        *,
        gate: bool = True,
        strict: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def projection(*axes: str) -> nnx.LinearGeneral:
            return linear(dim, dim, axes, use_bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.query, self.key, self.value = (projection("embed", "head_dim") for _ in range(3))
        self.out = projection("head_dim", "embed")
        self.gate, self.strict = gate, strict

    def __call__(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B S D"],
        *,
        edit: Float[Array, "B S"] | None = None,
        edit_mode: str = "gated",
    ) -> tuple[Float[Array, "B T D"], TABMap]:
        """edit: takes the place of gbar ("gated"), of a_0 before the gate ("ungated") or of its logits ("logits").

        A logit of -inf hides a token; a row of nothing else lets nothing pass.
        """
        if x.ndim != 3 or y.ndim != 3 or x.shape[::2] != y.shape[::2] or not x.shape[1] or not y.shape[1]:
            raise ValueError(f"x, y: needs tokens [B, 1+P, D] of the same B and D, the CLS first; got {x.shape} and {y.shape}")
        if edit_mode not in EDIT_MODES:
            raise unknown("edit_mode", edit_mode, EDIT_MODES)
        if edit is not None and edit.shape != y.shape[:2]:
            raise ValueError(f"edit: needs a weight per token of the other image, {y.shape[:2]}; got {edit.shape}")
        q, k, v = (f(tokens)[..., None, :] for f, tokens in ((self.query, x), (self.key, y), (self.value, y)))
        if edit is not None and edit_mode == "logits":
            a = softmax_rows(edit.astype(jnp.float32), edit > -jnp.inf)[0]
        elif edit is not None and edit_mode == "ungated":
            a = edit.astype(jnp.float32)
        else:
            a = attention(q[:, :1], k, v, return_weights=True)[1][:, 0, 0]
        gated = a * (1 - a[:, :1]) if self.gate else a
        if edit is not None and edit_mode == "gated":
            gated = edit.astype(jnp.float32)
        if self.strict:
            gated = gated.at[:, 0].set(0.0)
        o = jnp.einsum("bs,bsd->bd", gated.astype(v.dtype), v[..., 0, :])[:, None]
        if x.shape[1] > 1:
            o = jnp.concatenate([o, attention(q[:, 1:], k, v)[..., 0, :]], axis=1)
        return self.out(o), TABMap(a, gated)


class TABLayer(nnx.Module):
    """TAB with its norms and MLP; (x [B, T, D], y [B, S, D]) -> ([B, T, D], map).

    skip: a residual connection around the attention, which opens the bottleneck (for comparison).
    Further arguments as in `TABAttention`.
    """

    def __init__(self, dim: int, *, gate: bool = True, skip: bool = False, strict: bool = False, rngs: nnx.Rngs, **dtypes: Any):
        self.attn = TABAttention(dim, gate=gate, strict=strict, rngs=rngs, **dtypes)
        self.attn_norm, self.mlp_norm = (norm("layer", dim, epsilon=1e-5, rngs=rngs, **dtypes) for _ in range(2))
        self.mlp = MLP(dim, 4 * dim, activation="quick_gelu", rngs=rngs, **dtypes)
        self.skip = skip

    def __call__(self, x: Float[Array, "B T D"], y: Float[Array, "B S D"], **edit: Any) -> tuple[Float[Array, "B T D"], TABMap]:
        """Options as in `TABAttention.__call__`."""
        h, seen = self.attn(self.attn_norm(x), self.attn_norm(y), **edit)
        h = x + h if self.skip else h
        return h + self.mlp(self.mlp_norm(h)), seen

    def pair(
        self,
        x: Float[Array, "B S D"],
        y: Float[Array, "B S D"],
        *,
        edit_left: Float[Array, "B S"] | None = None,
        edit_right: Float[Array, "B S"] | None = None,
        edit_mode: str = "gated",
    ) -> tuple[Float[Array, "B 2 D"], TABMap, TABMap]:
        """(CLS of the left and the right image, map of the left CLS over y, map of the right CLS over x)."""
        left, over_y = self(x[:, :1], y, edit=edit_left, edit_mode=edit_mode)
        right, over_x = self(y[:, :1], x, edit=edit_right, edit_mode=edit_mode)
        return jnp.concatenate([left, right], axis=1), over_y, over_x


def edit_attention(
    weights: Float[Array, "*B S"], region: Bool[Array, "*#B S"], value: float | Float[Array, "*#B S"] = 0.0
) -> Float[Array, "*B S"]:
    """A map with the tokens of a region set to a value (nothing by default) and not renormalised, to be given as an edit."""
    return jnp.where(region, value, weights)


def change_map(changed: Bool[Array, "*B P"]) -> Float[Array, "*B S"]:
    """m [*B, 1+P] for supervision: 1 at the changed patches, or at the CLS where there is none."""
    none = ~changed.any(axis=-1, keepdims=True)
    return jnp.concatenate([none, changed], axis=-1).astype(jnp.float32)


def map_supervision_loss(
    weights: Float[Array, "*B S"], target: Float[Array, "*B S"], *, where: Bool[Array, "*B"] | None = None
) -> Float[Array, ""]:
    """The mean of 1 - cos(a_0, m), in float32.

    weights: ungated; gated, the map of a pair without change would vanish. target: as `change_map` makes it. Of the
    left CLS's map, which lies over the right image, the right image's, and the other way round.
    where: the maps that count, as where only some pairs have a target; all by default, 0 where none does.
    A map or a target of zeros has the cosine 0, and no gradient.
    Raises ValueError for shapes that differ.
    """
    if weights.shape != target.shape:
        raise ValueError(f"target: needs the shape of weights, {weights.shape}; got {target.shape}")
    a, m = weights.astype(jnp.float32), target.astype(jnp.float32)
    square = (a * a).sum(axis=-1, keepdims=True) * (m * m).sum(axis=-1, keepdims=True)
    some = square > 1e-16
    cosine = (a * m).sum(axis=-1, keepdims=True) / jnp.sqrt(jnp.where(some, square, 1))
    return mean_over_tokens(1 - jnp.where(some, cosine, 0), where)[0]


def pointing_game(weights: Float[Array, "*B S"], changed: Bool[Array, "*B P"]) -> Float[Array, ""]:
    """How often the patch with the largest weight is a changed one, of the maps whose image has a change; NaN if none has.

    Raises ValueError for shapes that do not fit.
    """
    if weights.shape != (*changed.shape[:-1], changed.shape[-1] + 1):
        raise ValueError(f"changed: weights {weights.shape} are over a CLS and P patches, got {changed.shape}")
    pointed = weights[..., 1:].argmax(axis=-1)[..., None]
    hit = jnp.take_along_axis(changed, pointed, axis=-1)[..., 0]
    return hit.sum() / changed.any(axis=-1).sum()


def _picture(axes: Any) -> None:
    """How much passes, by how much the CLS row keeps for the CLS."""
    a = jnp.linspace(0, 1, 101)
    axes.plot(a, 1 - a, label="all tokens: 1 - a₀₀")
    axes.plot(a, (1 - a) ** 2, label="patches: (1 - a₀₀)²")
    axes.set(xlabel="attention of the CLS on the CLS, a₀₀", ylabel="weight that passes", title="the gate of the bottleneck")
    axes.legend()


PAPER = Paper(
    142,
    "tab",
    "TAB: Transformer Attention Bottlenecks enable User Intervention and Debugging in Vision-Language Models",
    "control",
    builds=(
        TABAttention,
        TABLayer,
        TABMap,
        edit_attention,
        change_map,
        map_supervision_loss,
        pointing_game,
        "attnzoo.models.tab:TABChangeConfig",
        "attnzoo.models.tab:TABChangeModel",
    ),
    picture=_picture,
    costs={
        "parameters of the attention": "4 * D * D + 4 * D",
        "multiply-adds of both CLS rows": "2 * (2 * D * D + 2 * S * D + 2 * S * D * D)",
        "weights on view": "2 * S",
    },
    code="anguyen8/TAB",
    notes=(
        "Not a drop-in: it changes what its network may know. gbar keeps the weight a_00 (1 - a_00) on the other image's CLS, "
        "as in the code; strict=True drops it. Edits replace the gated row and are not renormalised. In the claim all three "
        "networks name every change. That the map points at it is its supervision's work: 1.00 of the pairs with TAB, 0.97 "
        "and 0.99 with the bottleneck opened, 0.17 and 0.19 without supervision. Erasing both maps leaves TAB one answer for "
        "all pairs, the opened network several (0.97 and 0.12 of the pairs get the same)."
    ),
)
