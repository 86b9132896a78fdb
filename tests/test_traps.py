"""Inputs on which other packages go wrong: what they return there, and what is right.

Each was seen, on the version named where one is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import EXACT

from focaljax import sigmoid_focal_loss, softmax_focal_loss

# what others return: dtype, label, logit, gamma
TRAPS = {
    "Keras 3.15.1: gradient ~0 for -1": (jnp.float32, 1, -50.0, 2.0),
    "Keras 3.15.1: NaN loss for 1.5e-8": (jnp.bfloat16, 1, 6.0, 2.0),
    "scenic, kauldron: NaN gradient for ~0": (jnp.float32, 1, 50.0, 0.5),
    "torchvision, fvcore, transformers, mmdet, ultralytics, smp: NaN gradient": (
        jnp.float32, 1, 40.0, 0.5
    ),
    "torchvision, MONAI: 7% too small": (jnp.float32, 0, -12.0, 2.0),
    "torchvision, transformers, mmdet, smp: 0 for 1.0e-6": (jnp.bfloat16, 0, -4.595, 2.0),
    "torch BCE: 0 for 0.01005": (jnp.bfloat16, 0, -4.595, 0.0),
    "balanced-loss, effdet legacy: loss 0, gradient NaN for 89": (jnp.float32, 1, -89.0, 2.0),
    "focal-ce-loss 0.0.3: 0.0843 for 0.00105": (jnp.float32, 1, float(np.log(9)), 2.0),
    "autodiff of u ** 0: NaN gradient": (jnp.float32, 1, 200.0, 0.0),
    "clipped p: no gradient": (jnp.float32, 1, -1e4, 2.0),
    "product of two tiny factors: 0": (jnp.float32, 1, -90.0, 5.0),
    "sigmoid and log in bfloat16: 14% off": (jnp.bfloat16, 0, 2.703125, 5.0),
}  # fmt: skip


SIGMOID_FOCAL = jax.value_and_grad(sigmoid_focal_loss)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("trap", TRAPS)
def test_the_right_value_and_slope(trap, traced):
    dtype, y, x, gamma = TRAPS[trap]
    x = jnp.asarray(x, dtype)
    truth = reference.focal(EXACT.of(x), y, EXACT.of(gamma))
    step = jax.jit(SIGMOID_FOCAL) if traced else SIGMOID_FOCAL
    got = step(x, jnp.asarray(y, dtype), gamma=gamma)
    bound = 2e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    for value, true in zip(got, (truth.loss, truth.slope), strict=True):
        assert value.dtype == dtype
        # what is less than the least normal number may be 0
        assert float(value) == pytest.approx(float(true.value), rel=bound, abs=1.2e-38)


def test_optax_loses_the_second_derivative():
    """optax 0.2.8: 0 for 1.9e-22 at y = 1, x = -50, gamma 0, as does jax's own sigmoid."""
    second = jax.grad(jax.grad(lambda x: sigmoid_focal_loss(x, 1.0, gamma=0.0)))(-50.0)
    assert float(second) == pytest.approx(np.exp(-50), rel=5e-6)


@pytest.mark.parametrize(("gamma", "y"), [(0.0, 1.0), (0.5, 0.0), (2.0, 0.25), (3.7, 1.0)])
def test_second_derivatives_where_training_starts(gamma, y):
    """exp(-|x|) left to autodiff has slope 0 at x = 0."""
    truth = reference.focal(EXACT.of(0.0), EXACT.of(y), EXACT.of(gamma))
    second = jax.grad(jax.grad(lambda x: sigmoid_focal_loss(x, y, gamma=gamma)))
    for got in jax.jit(jax.vmap(second))(jnp.array([0.0, -0.0])):
        error = abs(float(got) - float(truth.bend.value))
        assert error <= 5e-6 * float(truth.bend.largest)


# --- softmax --------------------------------------------------------------------------------------

# what others return: dtype, logits (the first is the true class's), gamma
SOFTMAX_TRAPS = {
    "Keras 3.15.1 categorical: gradient 0 for -1": (jnp.float32, [-20, 0], 2),
    "fortuna: inf, NaN gradient, for 200 and -1": (jnp.float32, [-200, 0], 2),
    "MONAI: NaN": (jnp.float32, [1, 0.5, -np.inf], 2),
    "smp multiclass: 0.292 for 3.638": (jnp.float32, [0, 1, 2], 2),
    "the same, shifted": (jnp.float32, [5, 6, 7], 2),
    "1 - exp(log_p): 0 for 8.5e-9": (jnp.float32, [20, 0, 1], 1),
    "log1mexp: NaN gradient": (jnp.float32, [120, 0, 1], 0.5),
    "softmax in bfloat16": (jnp.bfloat16, [4, 0, -1], 5),
}


SOFTMAX_FOCAL = jax.jit(jax.value_and_grad(softmax_focal_loss))


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("trap", SOFTMAX_TRAPS)
def test_the_right_value_and_slopes_of_softmax(trap, soft):
    dtype, x, gamma = SOFTMAX_TRAPS[trap]
    x = jnp.asarray(x, dtype)
    label = jax.nn.one_hot(0, len(x)) if soft else 0
    got = SOFTMAX_FOCAL(x, label, gamma=float(gamma))
    truth = reference.softmax(reference.focal)
    true = truth(EXACT.of(x)[None], np.array([0]), EXACT.of([gamma]))
    bound = 2e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    for value, (exact, _) in zip(got, true, strict=True):
        assert value.dtype == dtype
        # what is less than the least normal number may be 0
        np.testing.assert_allclose(value.astype(float), exact.astype(float)[0], bound, 1.2e-38)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_dominating_class_of_a_distribution(gamma):
    """Its 1 - p_c, from 1 - exp(log_p) or log1mexp, is off by up to 1.6e7 units."""
    x = np.tile(np.float32([22, 0, -1, 2]), (3, 1))
    labels = np.array([[1, 0, 0, 0], [0.5, 0, 0, 0], [1, 0, 0, 1e-20]], np.float32)
    loss, pull = jax.vjp(lambda x: softmax_focal_loss(x, labels, gamma=gamma), x)
    truth = reference.over_classes(reference.softmax(reference.focal))
    true = truth(EXACT.of(x), EXACT.of(labels), EXACT.of([gamma]))
    for value, (exact, _) in zip((loss, *pull(jnp.ones(3))), true, strict=True):
        np.testing.assert_allclose(value, exact.astype(float), 2e-6)
