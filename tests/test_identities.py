"""What is true of these losses by themselves: limits, symmetries, constants of the papers."""

import itertools
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
    softmax_focal_loss,
    softmax_hard_threshold_loss,
    softmax_margin,
    softmax_soft_truncation_loss,
    su_softmax_soft_truncation_loss,
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
        # the slope of a soft label is a difference, and any may underflow
        close(here[0], there[0], 1e-5, 1e-37)
        close(here[1], -there[1], 1e-5, 1e-6 if 0 < y < 1 else 1e-37)


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
def test_drop_in_for_optax(alpha, float64):
    """In float64, where what optax loses does not show."""
    rng = np.random.default_rng(0)
    x, soft = rng.normal(0, 4, 2000), rng.uniform(size=2000)

    @partial(jax.jit, static_argnums=0)
    def everything(loss, y, gamma):
        def summed(x, y, gamma):
            return loss(x, y, gamma=gamma, alpha=alpha).sum()

        by_logit, by_label, by_gamma = jax.grad(summed, (0, 1, 2))(x, y, gamma)
        return loss(x, y, gamma=gamma, alpha=alpha), by_logit, by_gamma, by_label

    for y, gamma in itertools.product((soft, np.round(soft)), (1.0, 1.7, 2.0)):
        with jax.numpy_dtype_promotion("standard"):
            true = everything(optax.sigmoid_focal_loss, y, gamma)
        got = everything(sigmoid_focal_loss, y, gamma)
        # optax drops a term of the label's gradient at a label of exactly 0 or 1
        count = 4 if y is soft else 3
        for one, expected in zip(got[:count], true[:count], strict=True):
            close(one, expected, 1e-8, 1e-13)


# --- softmax --------------------------------------------------------------------------------------

SOFTMAX = (softmax_focal_loss, softmax_soft_truncation_loss, softmax_hard_threshold_loss)
multiclass = pytest.mark.parametrize(
    "loss", [*SOFTMAX, su_softmax_soft_truncation_loss], ids=lambda loss: loss.__name__
)

LOGITS = np.random.default_rng(0).normal(0, 4, (40, 5)).astype(np.float32)
IDS = (np.arange(40) % 5).astype(np.int32)
MIXED = (0.7 * np.eye(5)[IDS] + 0.3 * np.eye(5)[IDS[::-1]]).astype(np.float32)
either = pytest.mark.parametrize("labels", [IDS, MIXED], ids=["ids", "distributions"])


@partial(jax.jit, static_argnums=0)
def value_and_slopes(loss, x, labels, **options):
    """Of every example, and in all of its logits."""
    value, pull = jax.vjp(lambda x: loss(x, labels, **options), x)
    return value, *pull(jnp.ones_like(value))


def all_close(got, true, relative=2e-6, absolute=2e-7):
    for one, other in zip(got, true, strict=True):
        close(one, other, relative, absolute)


@pytest.mark.parametrize("offset", [0.0, 3.5, -40.0])
@pytest.mark.parametrize(
    ("softmax", "sigmoid", "options"),
    [
        (softmax_focal_loss, sigmoid_focal_loss, {}),
        (softmax_soft_truncation_loss, sigmoid_soft_truncation_loss, {}),
        (softmax_hard_threshold_loss, sigmoid_hard_threshold_loss, {}),
        (su_softmax_soft_truncation_loss, sigmoid_soft_truncation_loss, {"k": 2.0}),
    ],
)
def test_two_classes_are_the_sigmoid_of_the_difference(softmax, sigmoid, options, offset):
    # so that adding is exact
    z = np.round(64 * Z[np.abs(Z) < 40]) / 64
    x = np.stack([np.full_like(z, offset), z + np.float32(offset)], -1)
    for y in (0, 1):
        ids = np.full(z.shape, y, np.int32)
        loss, slope = value_and_slopes(sigmoid, z, ids.astype(np.float32), **options)
        for labels in (ids, np.eye(2, dtype=np.float32)[ids]):
            got = value_and_slopes(softmax, x, labels, **options)
            all_close(got, (loss, np.stack([-slope, slope], -1)), absolute=1e-33)


@multiclass
@either
def test_adding_to_all_logits_changes_nothing(loss, labels):
    x = np.round(64 * LOGITS) / 64
    plain = value_and_slopes(loss, x, labels)
    for offset in (1.0, -256.0, 8192.0):
        moved = value_and_slopes(loss, x + np.float32(offset), labels)
        assert all(map(jnp.array_equal, moved, plain))


@pytest.mark.parametrize("labels", [IDS, MIXED], ids=["ids", "distributions"])
def test_softmax_gamma_zero_is_cross_entropy(labels):
    one_hot = np.eye(5, dtype=np.float32)[IDS] if labels is IDS else labels
    true = value_and_slopes(optax.softmax_cross_entropy, LOGITS, one_hot)
    all_close(value_and_slopes(softmax_focal_loss, LOGITS, labels, gamma=0.0), true)


@either
def test_softmax_k_one_is_gamma_one(labels):
    soft = value_and_slopes(softmax_soft_truncation_loss, LOGITS, labels, k=1.0)
    all_close(soft, value_and_slopes(softmax_focal_loss, LOGITS, labels, gamma=1.0))


@multiclass
def test_class_ids_are_one_hot_labels(loss):
    one_hot = np.eye(5, dtype=np.float32)[IDS]
    ids = value_and_slopes(loss, LOGITS, IDS)
    all_close(ids, value_and_slopes(loss, LOGITS, one_hot), absolute=1e-20)


@multiclass
@either
def test_the_order_of_classes_does_not_matter(loss, labels):
    order = np.array([3, 0, 4, 1, 2])
    moved = np.argsort(order)[labels].astype(np.int32) if labels is IDS else labels[:, order]
    value, slope = value_and_slopes(loss, LOGITS, labels)
    all_close(value_and_slopes(loss, LOGITS[:, order], moved), (value, slope[:, order]))


@multiclass
@either
def test_the_slopes_of_an_example_sum_to_nothing(loss, labels):
    _, slope = value_and_slopes(loss, LOGITS, labels)
    assert np.all(np.abs(slope.sum(-1)) <= 5e-7 * np.abs(slope).sum(-1))


@multiclass
def test_softmax_losses_are_linear_in_the_labels(loss):
    of_class = [value_and_slopes(loss, LOGITS, np.full_like(IDS, c)) for c in range(5)]
    value, slope = (np.stack(parts, -1) for parts in zip(*of_class, strict=True))
    whole = np.sum(MIXED * value, -1), np.sum(MIXED[:, None] * slope, -1)
    all_close(value_and_slopes(loss, LOGITS, MIXED), whole, absolute=1e-6)
    # nor need they sum to 1
    all_close(
        value_and_slopes(loss, LOGITS, 4 * MIXED), [4 * part for part in whole], absolute=4e-6
    )


@pytest.mark.parametrize(("loss", "weight"), [*zip(SOFTMAX, MODULATIONS, strict=True)])
def test_a_softmax_loss_is_its_weight_times_cross_entropy_at_the_margin(loss, weight):
    options = {weight.parameter: {"gamma": 2.0, "k": 2.0, "threshold": 0.5}[weight.parameter]}
    margin = softmax_margin(LOGITS, IDS)
    close(loss(LOGITS, IDS), weight(margin, **options) * jax.nn.softplus(-margin), 1e-5, 1e-37)


def test_the_margin_is_the_log_odds_of_the_true_class():
    p = jax.nn.softmax(LOGITS.astype(np.float64))[np.arange(40), IDS]
    close(softmax_margin(LOGITS, IDS), np.log(p) - np.log1p(-p), 1e-4, 1e-5)
    close(softmax_margin(LOGITS, np.eye(5)[IDS]), softmax_margin(LOGITS, IDS), 1e-6, 1e-6)
    close(softmax_margin(np.array([[2.0, -3.0]], np.float32), np.array([0])), [5.0])


@given(
    st.tuples(*[st.floats(-1e4, 1e4, width=32)] * 3), st.integers(0, 2), st.floats(0, 8, width=32)
)
def test_softmax_focal_lies_between_nothing_and_cross_entropy(x, label, gamma):
    x, label = np.array([x], np.float32), np.array([label], np.int32)
    loss, plain = (value_and_slopes(softmax_focal_loss, x, label, gamma=g)[0] for g in (gamma, 0.0))
    assert 0 <= loss <= plain * (1 + 2e-6)


# --- the literal form -----------------------------------------------------------------------------


def test_the_literal_form_falls_silent_on_a_misclassified_example():
    x = np.array([[0, 1, -wrong] for wrong in (2, 5, 10, 20, 40, 80)], np.float32)
    ids = np.zeros(6, np.int32)
    plain, _ = value_and_slopes(softmax_focal_loss, x, ids, gamma=0.0)
    literal, by_logit = value_and_slopes(su_softmax_soft_truncation_loss, x, ids, k=1.0)
    log_odds, kept = value_and_slopes(softmax_soft_truncation_loss, x, ids, k=1.0)
    assert np.all(np.exp(-plain) < 0.5)  # wrong in every row
    assert np.all(np.diff(literal / plain) < 0)
    close(literal[3], 2.7e-9, 0.01)
    assert literal[-1] / plain[-1] < 1e-34
    assert np.abs(by_logit[-1]).max() < 1e-33
    # where two classes are left, the weight is theirs
    close(log_odds[3:] / plain[3:], 1 / (1 + np.exp(-1)), 1e-6)
    assert np.all(np.abs(kept[:, 0]) > 0.5)


def test_training_by_the_literal_form_leaves_an_example_wrong():
    """A linear classifier of three examples, from 0: every other loss gets all of them right."""
    x, ids = np.array([[0, 1], [-1, -1], [1, 2]], np.float32), np.arange(3, dtype=np.int32)

    @partial(jax.jit, static_argnums=0)
    def right(loss):
        def slope(weights):
            return jax.grad(lambda weights: loss(x @ weights, ids).mean())(weights)

        weights = jnp.zeros((2, 3))
        weights = jax.lax.fori_loop(0, 1000, lambda _, weights: weights - slope(weights), weights)
        return jnp.argmax(x @ weights, -1) == ids

    for loss in SOFTMAX:
        assert right(loss).all()
    assert right(su_softmax_soft_truncation_loss).tolist() == [True, True, False]
