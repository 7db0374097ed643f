"""Layers one after another: unrolled, or scanned where they are alike; with rematerialisation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from attnzoo.core.sharding import divided_tokens
from attnzoo.errors import unknown
from attnzoo.nn.auxiliary import kept_apart, pass_on
from attnzoo.nn.block import Block
from attnzoo.nn.linear import axis_names

_REMAT: dict[str, Callable | None] = {
    "none": None,
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Call = Callable[[Block, Array, PyTree, PyTree], tuple[Array, PyTree, PyTree]]
"""(layer, x, carry, cache) -> (x, carry, cache)"""


class Stack(nnx.Module):
    """x [B, T, D] -> [B, T, D] through num_layers layers, with a mixer's carry threaded from first to last.

    make_layer: i -> the i-th layer, 0-based.
    scan: compile layers that are built alike once. Consecutive layers of the same structure are kept as one
        layer whose parameters have a leading axis named "layers", and `lax.scan` runs over it; layers that
        differ stay unrolled, as does the first one of a mixer that carries (it starts the carry).
        The weights are those of scan=False with the same rngs.
    remat: what the backward pass recomputes: "none"; "full", every layer from its input; "dots", all but the
        outputs of its weight matrices.

    Raises ValueError with scan=True when no two consecutive layers are alike, and when called with scan=True
    and a carry that changes its structure from layer to layer.
    """

    def __init__(self, make_layer: Callable[[int], Block], num_layers: int, *, scan: bool = False, remat: str = "none"):
        if num_layers < 1:
            raise ValueError(f"num_layers: must be at least 1, got {num_layers}")
        if remat not in _REMAT:
            raise unknown("remat", remat, _REMAT)
        self.remat = remat
        layers = [make_layer(i) for i in range(num_layers)]
        groups = _alike(layers) if scan else [[layer] for layer in layers]
        if scan and num_layers > 1 and len(groups) == num_layers:
            raise ValueError(
                f"scan: no two consecutive layers of these {num_layers} have the same structure "
                f"({_difference(layers[-2], layers[-1])}); build with scan_layers=False"
            )
        self.sizes = tuple(len(group) for group in groups)
        self.runs = nnx.List([group[0] if len(group) == 1 else _stacked(group) for group in groups])

    def __call__(self, x: Float[Array, "B T D"], carry: PyTree = None, **kwargs: Any) -> Float[Array, "B T D"]:
        """Options as in `Block.__call__`; masks and memories are shared by all layers. carry: what the first is given."""
        return self.through(lambda layer, x, carry: layer(x, carry, **kwargs), x, carry)

    def through(
        self, call: Callable[[Any, Array, PyTree], tuple[Array, PyTree]], x: Float[Array, "B T D"], carry: PyTree = None
    ) -> Float[Array, "B T D"]:
        """x through all layers by a call of one's own: (layer, x, carry) -> (x, carry)."""

        def kept(layer: Block, x: Array, carry: PyTree, cache: PyTree) -> tuple[Array, PyTree, PyTree]:
            x, carry = call(layer, divided_tokens(x), carry)
            return divided_tokens(x), carry, cache

        return self._run(kept, x, [None] * len(self.sizes), training=True, carry=carry)[0]

    def init_cache(self, batch: int, length: int, **kwargs: Any) -> list[PyTree]:
        """One cache per run of layers; options as in `Block.init_cache`."""

        def init(layer: Block) -> PyTree:
            return layer.init_cache(batch, length, **kwargs)

        return [init(run) if size == 1 else _over_layers(init, run) for size, run in zip(self.sizes, self.runs, strict=True)]

    def prefill(
        self, x: Float[Array, "B T D"], caches: list[PyTree], **kwargs: Any
    ) -> tuple[Float[Array, "B T D"], list[PyTree]]:
        """(x, caches); options as in `Mixer.prefill`."""

        def call(layer: Block, x: Array, carry: PyTree, cache: PyTree) -> tuple[Array, PyTree, PyTree]:
            x, cache, carry = layer.prefill(x, cache, carry, **kwargs)
            return x, carry, cache

        return self._run(call, x, caches, training=False)

    def step(self, x: Float[Array, "B 1 D"], caches: list[PyTree]) -> tuple[Float[Array, "B 1 D"], list[PyTree]]:
        """(x, caches) for one more token per row."""

        def call(layer: Block, x: Array, carry: PyTree, cache: PyTree) -> tuple[Array, PyTree, PyTree]:
            x, cache, carry = layer.step(x, cache, carry)
            return x, carry, cache

        return self._run(call, x, caches, training=False)

    def reorder_cache(self, caches: list[PyTree], rows: Int[Array, "R"]) -> list[PyTree]:
        """Row i of the result is row `rows[i]` of the caches."""
        return [
            run.reorder_cache(cache, rows) if size == 1 else jax.vmap(lambda one, run=run: run.reorder_cache(one, rows))(cache)
            for size, run, cache in zip(self.sizes, self.runs, caches, strict=True)
        ]

    def _run(
        self, call: Call, x: Array, caches: list[PyTree], *, training: bool, carry: PyTree = None
    ) -> tuple[Array, list[PyTree]]:
        """Applies `call` to every layer; only training rematerialises and keeps what layers wrote."""
        out = []
        for size, run, cache in zip(self.sizes, self.runs, caches, strict=True):
            if size == 1 and (self.remat == "none" or not training):
                x, carry, cache = call(run, x, carry, cache)
            else:
                x, carry, cache = self._functional(call, size, run, x, carry, cache, training)
            out.append(cache)
        return x, out

    def _functional(
        self, call: Call, size: int, run: Block, x: Array, carry: PyTree, cache: PyTree, training: bool
    ) -> tuple[Array, PyTree, PyTree]:
        graphdef, params, rest = nnx.split(run, nnx.Param, ...)  # type: ignore[misc]

        def body(state: tuple[Array, PyTree], layer_state: Any) -> tuple[tuple[Array, PyTree], tuple]:
            params, rest, cache = layer_state
            layer = nnx.merge(graphdef, params, rest, copy=True)
            x, carry = state
            with kept_apart() as losses:
                x, carry, cache = call(layer, x, carry, cache)
            return (x, carry), (nnx.state(layer, nnx.Not(nnx.Param)), cache, losses)

        if training and self.remat != "none":
            # Inside a scan nothing can be merged with the forward pass, so no barrier against it is needed.
            body = jax.checkpoint(body, policy=_REMAT[self.remat], prevent_cse=size == 1)
        if size == 1:
            (x, carry), (rest, cache, losses) = body((x, carry), (params, rest, cache))
        else:
            layer_states = (params, rest, cache)
            if run.carries:
                _check_carry(body, (x, carry), layer_states)
            (x, carry), (rest, cache, losses) = jax.lax.scan(body, (x, carry), layer_states)
        pass_on(losses)
        if training:
            nnx.update(run, rest)
        return x, carry, cache


def _alike(layers: list[Block]) -> list[list[Block]]:
    """Consecutive layers grouped by structure: static attributes, names, shapes and dtypes of variables."""
    groups: list[list[Block]] = []
    last = None
    for i, layer in enumerate(layers):
        graphdef, state = nnx.split(layer)
        structure = graphdef, jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(state))
        starts_carry = i == 1 and layer.carries
        if structure == last and not starts_carry:
            groups[-1].append(layer)
        else:
            groups.append([layer])
        last = structure
    return groups


def _stacked(layers: list[Block]) -> Block:
    """One layer whose variables hold those of all `layers` along a new leading axis."""
    graphdef = nnx.split(layers[0])[0]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in layers))
    for _, variable in nnx.to_flat_state(state):
        names = axis_names(variable)
        if names is not None:
            variable.set_metadata(out_sharding=("layers", *names))
    return nnx.merge(graphdef, state)


def _over_layers(f: Callable[[Block], PyTree], run: Block) -> PyTree:
    graphdef, state = nnx.split(run)
    return jax.vmap(lambda one: f(nnx.merge(graphdef, one)))(state)


def _difference(a: Block, b: Block) -> str:
    """In words, where the structures of two layers first differ."""
    lines = (str(nnx.graphdef(layer)).split("\n") for layer in (a, b))
    pairs = (pair for pair in zip(*lines, strict=False) if pair[0] != pair[1])
    return next((f"{x.strip()} against {y.strip()}" for x, y in pairs), "shapes of parameters")


def _check_carry(body: Callable, state: tuple[Array, PyTree], layer_states: tuple) -> None:
    """Raises a ValueError if a layer returns another structure, shape or dtype than it was given."""
    first = jax.tree.map(lambda leaf: leaf[0], layer_states)
    (_, carry), _ = jax.eval_shape(body, state, first)

    def described(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: f"{jnp.result_type(leaf)}{list(leaf.shape)}", tree)

    before, after = described(state[1]), described(carry)
    if jax.tree.flatten(before) != jax.tree.flatten(after):  # nodes may not compare by value
        raise ValueError(
            f"scan: the carry of these layers changes from {before} to {after}, and a scan needs every layer "
            "to return what it was given; build with scan_layers=False"
        )
