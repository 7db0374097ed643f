import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnzoo.models.objectives import label_smoothed_ce, noam_schedule

LOGITS = jax.random.normal(jax.random.key(0), (2, 3, 5))
TARGETS = jnp.array([[0, 1, 2], [4, 3, 0]])


@pytest.mark.parametrize("exclude_target", [False, True])
def test_equals_the_cross_entropy_with_the_smoothed_target(exclude_target):
    onehot = np.eye(5)[np.asarray(TARGETS)]
    if exclude_target:
        target = 0.9 * onehot + 0.1 * (1 - onehot) / 4
    else:
        target = 0.9 * onehot + 0.1 / 5
    expected = -(target * np.asarray(jax.nn.log_softmax(LOGITS))).sum(-1)
    loss = label_smoothed_ce(LOGITS, TARGETS, exclude_target=exclude_target)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)


def test_padding_is_ignored():
    real = jnp.array([[True, True, False], [True, False, False]])
    loss = label_smoothed_ce(LOGITS, TARGETS, where=real)
    other = label_smoothed_ce(jnp.where(real[..., None], LOGITS, 50.0), TARGETS, where=real)
    assert loss == other
    assert label_smoothed_ce(LOGITS, TARGETS, where=jnp.zeros_like(real)) == 0
    one = label_smoothed_ce(LOGITS[:1, :2], TARGETS[:1, :2])
    two = label_smoothed_ce(LOGITS[1:, :1], TARGETS[1:, :1])
    np.testing.assert_allclose(loss, (2 * one + two) / 3, rtol=1e-6)


def test_bad_input():
    with pytest.raises(ValueError, match="smoothing"):
        label_smoothed_ce(LOGITS, TARGETS, smoothing=1.0)
    with pytest.raises(ValueError, match="targets"):
        label_smoothed_ce(LOGITS, TARGETS[:, :2])
    with pytest.raises(ValueError, match="warmup"):
        noam_schedule(16, warmup=0)
