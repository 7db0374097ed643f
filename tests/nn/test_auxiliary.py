"""Auxiliary losses: silent unless collected, and the same whether layers are unrolled, scanned or recomputed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnzoo.models.lm import DecoderLM, LMConfig
from attnzoo.nn.auxiliary import auxiliary_loss, collecting, kept_apart, objective, pass_on
from attnzoo.zoo.heads.moh import MixtureOfHeadAttention, moh_load_balance_loss

TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)


def model(**options) -> DecoderLM:
    config = LMConfig(vocab_size=32, dim=16, num_layers=3, num_heads=4, mixer="moh", **options)
    return DecoderLM(config, rngs=nnx.Rngs(0))


def balance(model: DecoderLM):
    """(value, its gradient by name) of what is added to the objective."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def added(params):
        with collecting() as found:
            nnx.merge(graphdef, params, rest, copy=True)(TOKENS)
        assert list(found) == ["head_balance"]
        assert found["head_balance"].values.shape == (3,)
        return objective(found)

    return jax.jit(jax.value_and_grad(added))(params)


def test_nothing_is_computed_unless_someone_collects():
    def fail():
        raise AssertionError

    auxiliary_loss("a", fail, 1.0)
    with kept_apart() as found:
        auxiliary_loss("a", fail, 1.0)
    pass_on(found)
    with collecting() as found:
        auxiliary_loss("a", lambda: jnp.array(2.0), 0.5)
    auxiliary_loss("a", fail, 1.0)
    assert float(objective(found)) == 1.0
    assert float(objective({})) == 0.0


def test_sums_and_averages_over_layers():
    with collecting() as found:
        for value in (1.0, 3.0):
            auxiliary_loss("sum", lambda value=value: jnp.array(value), 0.5)
            auxiliary_loss("mean", lambda value=value: jnp.array(value), 0.1, average=True)
    assert float(found["sum"].value) == 4.0
    assert float(found["mean"].value) == 2.0
    assert float(objective(found)) == pytest.approx(0.5 * 4 + 0.1 * 2)


def test_layers_that_share_a_name_share_a_coefficient():
    with collecting():
        auxiliary_loss("a", lambda: jnp.array(1.0), 0.5)
        with pytest.raises(ValueError, match=r"'a': reported with coefficient 0.5 and average False, then with 0.1"):
            auxiliary_loss("a", lambda: jnp.array(1.0), 0.1)


@pytest.mark.parametrize(
    "options",
    [{"remat": "full"}, {"scan_layers": True}, {"scan_layers": True, "remat": "dots"}],
    ids=["remat", "scan", "scan-remat"],
)
def test_scan_and_remat_change_nothing(options):
    (expected, plain), (value, other) = balance(model()), balance(model(**options))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    router = [layer["mixer"]["router"]["kernel"][...] for layer in plain["layers"]["runs"].values()]
    assert max(float(jnp.abs(kernel).max()) for kernel in router) > 0
    if "scan_layers" in options:
        np.testing.assert_allclose(other["layers"]["runs"][0]["mixer"]["router"]["kernel"][...], jnp.stack(router), atol=1e-6)
    else:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, other)


def test_moh_reports_the_mean_over_layers_of_its_balance_loss():
    lm, losses = model(), []
    x = lm.embed(TOKENS)
    for layer in lm.layers.runs:
        assert isinstance(layer.mixer, MixtureOfHeadAttention)
        routing = layer.mixer.route(layer.mixer_norm(x))
        losses.append(moh_load_balance_loss(routing.probabilities, routing.active))
        x, _ = layer(x)
    np.testing.assert_allclose(balance(lm)[0], 0.01 * np.mean(losses), rtol=1e-5)


def test_moh_without_its_balance_loss():
    with collecting() as found:
        model(mixer_args={"balance": 0.0})(TOKENS)
    assert found == {}
