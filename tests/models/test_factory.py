import jax.numpy as jnp
import pytest
from flax import nnx

from attnzoo.core.positions import RoPE
from attnzoo.models import factory
from attnzoo.models.factory import accepted_arguments, make_mixer
from attnzoo.nn.mixer import Mixer
from attnzoo.zoo.projections.transformer import GroupedQueryAttention, MultiQueryAttention


class Layered(Mixer):
    layered = True
    bidirectional = False

    def __init__(self, dim, num_heads, *, causal, positions, layer, num_layers, width=3, dtype, param_dtype, rngs):
        self.place = (layer, num_layers, width)


def test_builds_what_the_key_names():
    mixer = make_mixer("transformer", 16, 4, causal=True, positions=RoPE(), num_kv_heads=2, rngs=nnx.Rngs(0))
    assert type(mixer) is GroupedQueryAttention
    assert (mixer.causal, mixer.positions, mixer.qkv.num_kv_heads) == (True, RoPE(), 2)
    assert mixer.qkv.query.param_dtype == jnp.float32


def test_layers_know_where_they_are(monkeypatch):
    monkeypatch.setattr(factory.catalog, "mixer", lambda key: Layered)
    mixer = make_mixer("layered", 16, 4, causal=True, layer=1, num_layers=5, width=7, rngs=nnx.Rngs(0))
    assert mixer.place == (1, 5, 7)
    with pytest.raises(ValueError, match="causal by nature"):
        make_mixer("layered", 16, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="did you mean 'width'"):
        make_mixer("layered", 16, 4, causal=True, widht=7, rngs=nnx.Rngs(0))


def test_own_arguments():
    own = accepted_arguments(GroupedQueryAttention)
    assert {"num_kv_heads", "head_dim", "use_bias", "dropout_rate", "backend"} <= own.keys()
    assert not {"dim", "num_heads", "causal", "positions", "rngs", "layer", "self"} & own.keys()
    # A subclass that hands its options on takes those of its base.
    assert accepted_arguments(MultiQueryAttention).keys() == own.keys()
