"""Rematerialisation and scanned layers in every kind of model: another computation, the same loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.models.encoder import Encoder, EncoderConfig
from attnzoo.models.seq2seq import Transformer, TransformerConfig
from attnzoo.models.tab import TABChangeConfig, TABChangeModel
from attnzoo.models.vit import ViT, ViTConfig

SIZES = {"dim": 16, "num_layers": 2, "num_heads": 2}
TOKENS = jax.random.randint(jax.random.key(0), (2, 6), 0, 32)
PATCHES = jax.random.normal(jax.random.key(1), (2, 9, 8))

MODELS = {
    "encoder": (Encoder, EncoderConfig, {"vocab_size": 32}, lambda m: m(TOKENS)),
    "seq2seq": (Transformer, TransformerConfig, {"vocab_size": 32, "dropout_rate": 0.0}, lambda m: m(TOKENS, TOKENS[:, ::-1])),
    "vit": (
        ViT,
        ViTConfig,
        {"image_size": 6, "patch_size": 2, "channels": 2},
        lambda m: m(PATCHES.reshape(2, 6, 6, 2)),
    ),
    "tab": (TABChangeModel, TABChangeConfig, {}, lambda m: m(PATCHES, PATCHES[::-1])[0]),
}


def loss_and_gradient(name: str, **options):
    """(loss, norm of its gradient, what is traced for it)."""
    cls, config, own, call = MODELS[name]
    graphdef, params, rest = nnx.split(cls(config(**SIZES, **own, **options), rngs=nnx.Rngs(0)), nnx.Param, ...)

    def loss(params):
        return jnp.square(call(nnx.merge(graphdef, params, rest, copy=True))).mean()

    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    value, gradient = traced.lower().compile()(params)
    return float(value), np.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(gradient))), str(traced.jaxpr)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_recomputed_does_not_change_the_loss(name):
    value, norm, plain = loss_and_gradient(name)
    assert "remat" not in plain
    for options in ({"remat": "dots"}, {"remat": "full", "scan_layers": True}):
        other, other_norm, traced = loss_and_gradient(name, **options)
        assert "remat" in traced
        assert ("scan[" in traced) == ("scan_layers" in options)
        assert other == pytest.approx(value, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
