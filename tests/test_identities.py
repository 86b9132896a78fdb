"""What is true of these losses by themselves: limits, symmetries, constants of the papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import FOCAL, HARD, LOSSES, MODULATIONS, SOFT, by_name
from hypothesis import given
from hypothesis import strategies as st

from focaljax import (
    focal_modulation,
    hard_threshold_modulation,
    sigmoid_focal_loss,
    sigmoid_hard_threshold_loss,
    sigmoid_margin,
    sigmoid_soft_truncation_loss,
    soft_truncation_modulation,
)

Z = np.concatenate([np.linspace(-30, 30, 601), [-1e4, -300, -88, 88, 300]]).astype(np.float32)
ONES = np.ones_like(Z)


def close(got, true, relative=1e-6, absolute=0.0):
    np.testing.assert_allclose(np.asarray(got), np.asarray(true), relative, absolute)


def derivative(loss, order=1):
    """d / d margin of a loss, elementwise."""
    for _ in range(order):
        loss = partial(lambda f, z: jax.grad(lambda z: f(z).sum())(z), loss)
    return loss


def of_margin(case, **options):
    return lambda z: case(z, jnp.ones_like(z), **options)


def cross_entropy(x, y):
    with jax.numpy_dtype_promotion("standard"):
        return optax.sigmoid_binary_cross_entropy(x, y)


@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
def test_gamma_zero_is_cross_entropy(y):
    close(sigmoid_focal_loss(Z, y * ONES, gamma=0.0), cross_entropy(Z, y * ONES))
    slope = jax.grad(lambda x: sigmoid_focal_loss(x, y * ONES, gamma=0.0).sum())(Z)
    close(slope, jax.nn.sigmoid(Z) - y, absolute=1e-6)


@pytest.mark.parametrize("y", [0.0, 1.0])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_k_one_is_gamma_one(y, order):
    focal, soft = (
        jax.jit(derivative(lambda x, c=c: c(x, y * ONES, **{c.parameter: 1.0}), order))(Z)
        for c in (FOCAL, SOFT)
    )
    close(soft, focal, 1e-6, 1e-7 if order == 2 else 0)


def test_small_k_is_half_of_cross_entropy():
    # sigma(-k z) = 1/2 - k z / 4 + ...
    error = 2 * sigmoid_soft_truncation_loss(Z, ONES, k=1e-9) / cross_entropy(Z, ONES) - 1
    assert np.all(np.abs(error[Z < 80]) <= 1e-6 + 1e-9 * np.abs(Z[Z < 80]))


@pytest.mark.parametrize("case", LOSSES, ids=by_name)
@pytest.mark.parametrize("y", [0, 0.125, 0.5, 1])
def test_swapping_labels_and_the_sign_changes_nothing(case, y):
    @jax.jit
    def both(x, y, value):
        loss, pull = jax.vjp(lambda x: case(x, y, **{case.parameter: value}), x)
        return loss, *pull(jnp.ones_like(x))

    for value in case.valid:
        here, there = both(Z, y * ONES, value), both(-Z, (1 - y) * ONES, value)
        assert jnp.array_equal(here[0], there[0])
        close(here[1], -there[1], 1e-6, 1e-6 if 0 < y < 1 else 0)


@jax.jit
def focal(x, y, gamma):
    return sigmoid_focal_loss(x, y, gamma=gamma)


@given(
    st.floats(-1e4, 1e4, width=32),
    st.floats(0, 1, width=32),
    st.floats(0, 8),
    st.sampled_from([0, 1]),
)
def test_focal_lies_between_nothing_and_cross_entropy(x, y, gamma, hard):
    y = jnp.round(y) if hard else jnp.float32(y)
    loss, plain = (focal(jnp.float32(x), y, jnp.float32(g)) for g in (gamma, 0))
    assert 0 <= loss <= plain * (1 + 2e-6)


def test_the_margin_is_signed_by_the_label():
    close(sigmoid_margin(Z, ONES), Z)
    close(sigmoid_margin(Z, np.zeros(Z.shape, np.int8)), -Z)
    close(sigmoid_margin(Z, np.full(Z.shape, 0.5, np.float32)), 0 * Z)


# --- shape ----------------------------------------------------------------------------------------

FINE = np.linspace(-30, 30, 120_001)


@pytest.mark.parametrize("k", [1.4428, 1.6, 1.8, 2.0, 2.1486])
def test_soft_truncation_is_convex(k, float64):
    assert jnp.min(derivative(of_margin(SOFT, k=k), 2)(FINE)) > 0


@pytest.mark.parametrize("k", [0.5, 1.0, 1.4427, 2.1487, 3.0, 10.0])
def test_soft_truncation_is_not_convex_beyond(k, float64):
    assert jnp.min(derivative(of_margin(SOFT, k=k), 2)(FINE)) < -5e-7


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.0, 5.0])
def test_focal_is_not_convex(gamma, float64):
    assert jnp.min(derivative(of_margin(FOCAL, gamma=gamma), 2)(FINE)) < -0.003


def test_the_default_k_keeps_the_slope_within_one(float64):
    def steepest(**options):
        return jnp.max(jnp.abs(derivative(of_margin(SOFT, **options))(FINE)))

    assert steepest() <= 1
    assert steepest(k=1.0) > 1.04
    assert steepest(k=1.4) > 1


@pytest.mark.parametrize(
    ("gamma", "z", "peak"),
    [
        (0.5, -4.0185, 1.00895),
        (1.0, -3.0977, 1.04533),
        (2.0, -2.7904, 1.12898),
        (3.0, -2.7968, 1.20155),
        (5.0, -2.9395, 1.31461),
    ],
)
def test_where_focal_pulls_hardest(gamma, z, peak, float64):
    slope = jnp.abs(derivative(of_margin(FOCAL, gamma=gamma))(FINE))
    assert FINE[jnp.argmax(slope)] == pytest.approx(z, abs=3e-4)
    assert jnp.max(slope) == pytest.approx(peak, abs=5e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_second_derivative_of_focal_in_closed_form(gamma, float64):
    z = np.linspace(-20, 20, 401)
    p = 1 / (1 + np.exp(-z))
    true = (1 - p) * (1 + 2 * gamma) + gamma * (1 - (1 + gamma) * p) * np.log(p)
    true *= p * (1 - p) ** gamma
    got = derivative(of_margin(FOCAL, gamma=gamma), 2)(z)
    # the formula is written in 1 - p, which has few digits left at z = 20
    np.testing.assert_allclose(got, true, 1e-6, 1e-12)


# --- limits ---------------------------------------------------------------------------------------


def test_the_slope_of_soft_truncation_tends_to_hard_plus_a_point_mass(float64):
    soft, hard = (
        derivative(of_margin(case, **options)) for case, options in ((SOFT, {"k": 1e5}), (HARD, {}))
    )
    away = FINE[np.abs(FINE) > 0.001]
    close(soft(away), hard(away), 1e-9, 1e-30)
    near = np.linspace(-0.002, 0.002, 400_001)
    mass = np.trapezoid(np.asarray(soft(near) - hard(near)), near)
    assert mass == pytest.approx(-np.log(2), abs=1e-5)


@pytest.mark.parametrize("m", [0.1, 0.5, 0.9])
def test_the_hard_loss_jumps_at_its_threshold(m, float64):
    step = np.log(m / (1 - m))
    below, above = (sigmoid_hard_threshold_loss(step + d, 1, threshold=m) for d in (-1e-9, 1e-9))
    assert float(below) == pytest.approx(-np.log(m), abs=1e-8)
    assert above == 0


@pytest.mark.parametrize("m", [0.25, 0.5, 0.75])
def test_the_threshold_itself_still_counts(m):
    """1 where p_t <= m: at logit 0 the probability of either label is 1/2."""
    zero = jnp.float32(0)
    for y in (0, 1):
        loss, slope = jax.value_and_grad(sigmoid_hard_threshold_loss)(zero, y, threshold=m)
        assert float(loss) == pytest.approx(np.log(2) if m >= 0.5 else 0, rel=1e-6)
        assert float(slope) == (0.5 - y if m >= 0.5 else 0)


def test_the_weights_are_what_their_names_say():
    z = Z[np.abs(Z) < 15]
    p = 1 / (1 + np.exp(-z.astype(float)))
    close(focal_modulation(z, gamma=2.0), (1 - p) ** 2, 1e-6)
    close(soft_truncation_modulation(z, k=3.0), 1 / (1 + np.exp(3 * z.astype(float))), 1e-6)
    close(hard_threshold_modulation(z, threshold=0.7), p <= 0.7)


@pytest.mark.parametrize(("case", "weight"), [*zip(LOSSES, MODULATIONS, strict=True)])
def test_a_loss_is_its_weight_times_cross_entropy(case, weight):
    for value in case.valid:
        options = {case.parameter: value}
        product = weight(Z, **options) * jax.nn.softplus(-Z)
        close(case(Z, ONES, **options), product, 4e-6, 1e-37)


# --- soft labels ----------------------------------------------------------------------------------


def test_focal_sharpens_a_soft_label(float64):
    p = np.linspace(0.9, 0.999, 9901)
    x, y = np.log(p / (1 - p)), np.full(p.shape, 0.9)
    assert p[jnp.argmin(sigmoid_focal_loss(x, y, gamma=2.0))] == pytest.approx(0.986, abs=3e-4)
    slope = jax.grad(lambda x: sigmoid_focal_loss(x, y, gamma=2.0).sum())(x)
    assert np.sum(np.diff(np.sign(slope)) != 0) == 1
    assert p[jnp.argmin(sigmoid_focal_loss(x, y, gamma=0.0))] == pytest.approx(0.9, abs=3e-4)


@pytest.mark.parametrize("case", [SOFT, HARD], ids=by_name)
@pytest.mark.parametrize("y", [0.1, 0.5, 0.9])
def test_the_others_are_linear_in_the_label(case, y):
    for value in case.valid:
        options = {case.parameter: value}
        whole = y * case(Z, ONES, **options) + (1 - y) * case(Z, 0 * ONES, **options)
        close(case(Z, y * ONES, **options), whole, 1e-6)


# --- optax ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 1.7, 2.0])
def test_drop_in_for_optax(alpha, gamma, float64):
    """In float64, where what optax loses does not show."""
    rng = np.random.default_rng(0)
    x, soft = rng.normal(0, 4, 2000), rng.uniform(size=2000)

    def everything(loss, y):
        def summed(x, y, gamma):
            return loss(x, y, gamma=gamma, alpha=alpha).sum()

        by_logit, by_label, by_gamma = jax.grad(summed, (0, 1, 2))(x, y, gamma)
        # optax drops a term of the label's gradient at a label of exactly 0 or 1
        by_label = by_label if y is soft else 0
        return loss(x, y, gamma=gamma, alpha=alpha), by_logit, by_gamma, by_label

    for y in (soft, np.round(soft)):
        with jax.numpy_dtype_promotion("standard"):
            true = everything(optax.sigmoid_focal_loss, y)
        for got, expected in zip(everything(sigmoid_focal_loss, y), true, strict=True):
            close(got, expected, 1e-8, 1e-13)
