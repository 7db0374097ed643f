"""MASA (Zhussip et al., 2025, arXiv 2508.04581): a decoder whose attention matrices are combinations of shared atoms."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from attnzoo.errors import unknown
from attnzoo.models.layers import Arguments
from attnzoo.models.lm import DecoderLM, LMConfig, ModelCache
from attnzoo.nn.block import Block
from attnzoo.nn.linear import axis_names, named
from attnzoo.zoo.projections.masa import (
    CoefficientMLP,
    FrozenCoefficients,
    MatrixAtomDictionary,
    group_blocks_by_kl,
    local_refinement,
    matrix_pca,
)

MODES = {"qkvo": ("query", "key", "value", "out"), "qkv": ("query", "key", "value"), "joint": ("query", "key", "value", "out")}
"""Mode -> the projections that are shared."""

MakeCoefficients = Callable[..., Any]
"""(num_layers, num_types, num_atoms, *, rngs) -> a module that returns C [L, P, S]."""


def _projection(mixer: Any, name: str) -> nnx.LinearGeneral:
    return mixer.out if name == "out" else getattr(mixer.qkv, name)


def _rows(name: str, shape: Sequence[int]) -> int:
    """How many axes of a kernel are inputs: [D, N, H] for queries, keys and values, [N, H, D] for the output."""
    return int(np.prod(shape[:2] if name == "out" else shape[:1]))


class MASATransformer(nnx.Module):
    """tokens [B, T] -> logits [B, T, V], as `DecoderLM`, with shared attention matrices.

    config: of a decoder whose mixer has the four projections of grouped-query attention. scan_layers works: the layers'
        matrices are built before the scan, and the atoms are kept once.
    num_atoms: S; L / 3 in the paper.
    mode: "qkvo" shares all four projections with a dictionary each; "qkv" leaves W_O per layer; "joint" has one dictionary
        for all four, which must then be square and alike (K = N and N·H = D).
    coefficients: the class of C: `CoefficientMLP`, `DirectCoefficients`, `SequentialSharing`, `RepeatAllOver`.

    Biases, norms and feed-forward networks stay per layer. Decoding builds the matrices at every call; `materialise` does it
    once.
    Raises ValueError for an unknown mode, a mixer without these projections, and shapes that cannot be joint.
    """

    def __init__(
        self,
        config: LMConfig,
        num_atoms: int,
        *,
        mode: str = "qkvo",
        coefficients: MakeCoefficients = CoefficientMLP,
        rngs: nnx.Rngs,
    ):
        if mode not in MODES:
            raise unknown("mode", mode, MODES)
        if num_atoms < 1:
            raise ValueError(f"num_atoms: at least one, got {num_atoms}")
        self.config, self.mode = config, mode
        self.lm = DecoderLM(config, rngs=rngs)
        mixer: Any = self.lm.layers.runs[0].mixer
        if not (hasattr(mixer, "qkv") and hasattr(mixer, "out")):
            raise ValueError(f"config: mixer {config.mixer!r} has no W_Q, W_K, W_V, W_O to share; 'transformer' has")
        shapes, axes = {}, {}
        for name in MODES[mode]:
            lead = self.lm.layers.sizes[0] > 1
            kernel = _projection(mixer, name).kernel
            shapes[name] = kernel.shape[lead:]
            axes[name] = (axis_names(kernel) or (None,) * kernel.ndim)[lead:]
        self.shapes, self.axes = Arguments(shapes), Arguments(axes)
        for run in self.lm.layers.runs:
            for name in MODES[mode]:
                _projection(run.mixer, name).kernel = nnx.data(None)  # type: ignore[arg-type]
        if mode == "joint":
            matrices = {(_rows(n, s), int(np.prod(s)) // _rows(n, s)) for n, s in shapes.items()}
            if len(matrices) != 1:
                raise ValueError(f"mode: 'joint' needs four matrices of one shape (K = N, N·H = D), got {sorted(matrices)}")
            kinds: dict[str, tuple] = {"joint": (matrices.pop(), (None, None))}
        else:
            kinds = {name: (shapes[name], axes[name]) for name in shapes}
        self.dictionaries = nnx.Dict({
            name: MatrixAtomDictionary(
                num_atoms, shape, names, fan_in=_rows(name, shape), param_dtype=config.param_dtype, rngs=rngs
            )
            for name, (shape, names) in kinds.items()
        })  # fmt: skip
        self.coefficients = coefficients(config.num_layers, len(shapes), num_atoms, rngs=rngs)
        self.refinements: Any = nnx.Dict({})

    def matrices(self) -> dict[str, Float[Array, "L ..."]]:
        """W_l of all layers by projection."""
        c = self.coefficients()
        built = {}
        for p, name in enumerate(MODES[self.mode]):
            dictionary = self.dictionaries["joint" if self.mode == "joint" else name]
            shape = (self.config.num_layers, *self.shapes[name])
            built[name] = dictionary(c[:, p]).reshape(shape)
            if name in self.refinements:
                u, v = (part[...] for part in self.refinements[name])
                built[name] += jnp.einsum("ldk,lkh->ldh", u, v).reshape(shape)
        return built

    def materialise(self) -> DecoderLM:
        """The same network with a matrix of its own in every layer."""
        lm = nnx.merge(*nnx.split(self.lm))  # other modules, the same variables: what dropout counts is kept
        for name, w in self.matrices().items():
            start = 0
            for size, run in zip(lm.layers.sizes, lm.layers.runs, strict=True):
                part, axes = (
                    (w[start], self.axes[name]) if size == 1 else (w[start : start + size], ("layers", *self.axes[name]))
                )
                _projection(run.mixer, name).kernel = nnx.Param(part, **named(*axes))
                start += size
        return lm

    def __call__(self, tokens: Int[Array, "B T"], **kwargs: Any) -> Float[Array, "B T V"]:
        """Options as in `DecoderLM`."""
        return self.materialise()(tokens, **kwargs)

    def init_cache(self, batch: int, length: int, *, dtype: DTypeLike | None = None) -> ModelCache:
        """Room for `length` tokens."""
        return self.lm.init_cache(batch, length, dtype=dtype)

    def prefill(
        self, tokens: Int[Array, "B T"], cache: ModelCache, lengths: Int[Array, "B"] | None = None, **kwargs: Any
    ) -> tuple[Float[Array, "B T V"], ModelCache]:
        """(logits, cache) of T more tokens per row; options as in `DecoderLM`."""
        return self.materialise().prefill(tokens, cache, lengths, **kwargs)

    def step(self, tokens: Int[Array, "B 1"], cache: ModelCache) -> tuple[Float[Array, "B 1 V"], ModelCache]:
        """(logits, cache) of one more token per row."""
        return self.materialise().step(tokens, cache)

    def reorder_cache(self, cache: ModelCache, rows: Int[Array, "R"]) -> ModelCache:
        """Row i of the result is row `rows[i]` of `cache`."""
        return self.lm.reorder_cache(cache, rows)


def freeze_coefficients(model: MASATransformer) -> MASATransformer:
    """The model with its coefficients as they are, fixed, and without the network that made them."""
    frozen = nnx.merge(*nnx.split(model), copy=True)
    frozen.coefficients = FrozenCoefficients(model.coefficients())
    return frozen


def decayed(params: nnx.State) -> nnx.State:
    """Which parameters of a `MASATransformer` weight decay may pull: all but the coefficients, which it would turn into
    layers of zeros. For optax: `adamw(..., mask=decayed)`."""
    return nnx.map_state(lambda path, leaf: leaf.replace("coefficients" not in path), params)


def _blocks(lm: DecoderLM) -> Iterator[Block]:
    """The layers one by one, whether scanned or not."""
    for size, run in zip(lm.layers.sizes, lm.layers.runs, strict=True):
        if size == 1:
            yield run
            continue
        graphdef, state = nnx.split(run)
        for i in range(size):
            yield nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))


class _Untouched(nnx.Module):
    """In the place of an output projection, hands out what that would be given."""

    def __call__(self, o: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        return o


def calibrate(
    lm: DecoderLM, tokens: Int[Array, "B T"]
) -> tuple[Float[np.ndarray, "L V"], dict[str, list[Float[np.ndarray, "d d"]]]]:
    """What a decoder does on data: what its blocks' mean outputs predict, and second moments of its projections' inputs.

    Without dropout, whatever mode the decoder is in, which it keeps.
    """
    lm = nnx.merge(*nnx.split(lm))
    lm.eval()
    x, predictions = lm.embed(tokens), []
    moments: dict[str, list[np.ndarray]] = {name: [] for name in MODES["qkvo"]}
    x = lm.positions(x, np.arange(tokens.shape[1]))
    for block in _blocks(lm):
        h = block.mixer_norm(x) if block.norm_first else x
        probe: Any = nnx.merge(*nnx.split(block.mixer), copy=True)
        probe.out = _Untouched()
        for name in moments:
            inputs = np.asarray(probe(h) if name == "out" else h, np.float64).reshape(tokens.size, -1)
            moments[name].append(inputs.T @ inputs / tokens.size)
        x, _ = block(x)
        mean = x.mean((0, 1))[None]
        logits = (lm.embed if lm.readout is None else lm.readout).attend(mean if lm.norm is None else lm.norm(mean))
        predictions.append(np.asarray(jax.nn.softmax(logits[0])))
    return np.stack(predictions), moments


def masa_from_pretrained(
    lm: DecoderLM,
    num_atoms: int,
    *,
    mode: str = "qkvo",
    num_groups: int = 1,
    rank: int = 0,
    tokens: Int[Array, "B T"] | None = None,
) -> MASATransformer:
    """A trained decoder with shared matrices, without training: PCA over layers, then low-rank refinement of each.

    num_atoms: S of every group; one of fewer layers leaves the rest at zero. num_groups: consecutive layers are cut into so
        many, with a dictionary each.
    rank: of the refinements, on average; 0 for none. Each projection gets a share in proportion to its smaller side, at least
        1 and at most that side, where nothing is missing any more.
    tokens: calibration data, needed for groups and for refinement.

    Raises ValueError where calibration data is missing, for groups in mode "joint", and for a negative rank or no groups.
    """
    if rank < 0 or num_groups < 1:
        raise ValueError(f"rank, num_groups: at least 0 and at least 1, got {rank} and {num_groups}")
    if tokens is None and (num_groups > 1 or rank):
        raise ValueError(f"tokens: num_groups={num_groups} and rank={rank} need calibration data [B, T]")
    if mode == "joint" and num_groups > 1:
        raise ValueError("num_groups: a joint dictionary is one for all layers; use mode 'qkvo'")
    layers = lm.config.num_layers
    model = MASATransformer(lm.config, num_groups * num_atoms, mode=mode, coefficients=_zeros, rngs=nnx.Rngs(0))
    names = MODES[mode]
    groups = np.zeros(layers, int)
    moments: dict[str, list[np.ndarray]] = {}
    if tokens is not None:
        predictions, moments = calibrate(lm, tokens)
        groups = np.array(group_blocks_by_kl(predictions, num_groups))
    given = {name: np.stack([_projection(block.mixer, name).kernel[...] for block in _blocks(lm)]) for name in names}
    c = np.zeros((layers, len(names), num_groups * num_atoms))
    if mode == "joint":
        flat = np.stack([given[name].reshape(layers, *model.dictionaries["joint"].atoms.shape[1:]) for name in names], axis=1)
        atoms, joint = matrix_pca(flat.reshape(-1, *flat.shape[2:]), num_atoms)
        c[:] = joint.reshape(c.shape)
        model.dictionaries["joint"].atoms[...] = jnp.asarray(atoms, flat.dtype)
    else:
        for p, name in enumerate(names):
            dictionary = model.dictionaries[name].atoms
            every = np.zeros(dictionary.shape)
            for group in range(num_groups):
                at, first = np.flatnonzero(groups == group), group * num_atoms
                chosen = slice(first, first + min(num_atoms, len(at)))
                every[chosen], c[at, p, chosen] = matrix_pca(given[name][at], chosen.stop - first)
            dictionary[...] = jnp.asarray(every, dictionary.dtype)
    model.coefficients = FrozenCoefficients(jnp.asarray(c, jnp.float32))
    if rank:
        shared = model.matrices()
        sides = {name: min(_rows(name, s), int(np.prod(s)) // _rows(name, s)) for name, s in model.shapes.items()}
        for name in names:
            share = min(max(round(rank * len(names) * sides[name] / sum(sides.values())), 1), sides[name])
            missing = (given[name] - np.asarray(shared[name])).reshape(layers, _rows(name, model.shapes[name]), -1)
            pairs = [local_refinement(dw, a, share) for dw, a in zip(missing, moments[name], strict=True)]
            model.refinements[name] = nnx.List(
                [
                    nnx.Param(jnp.asarray(np.stack(part), jnp.float32), **named(None, None, None))
                    for part in zip(*pairs, strict=True)
                ]
            )
    kept = {path for path, _ in nnx.to_flat_state(nnx.state(model.lm))}
    rest = [(path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(lm)) if path in kept]
    nnx.update(model.lm, nnx.from_flat_state(rest))
    return model


def _zeros(num_layers: int, num_types: int, num_atoms: int, *, rngs: nnx.Rngs) -> FrozenCoefficients:
    return FrozenCoefficients(jnp.zeros((num_layers, num_types, num_atoms)))
