"""What is true of these losses by themselves: limits, symmetries, constants of the papers."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    FOCAL,
    HARD,
    LOSSES,
    MODULATIONS,
    SOFT,
    SOFTMAX_FOCAL,
    SOFTMAX_LOSSES,
    SOFTMAX_SOFT,
    SU,
    by_name,
)

from focaljax import sigmoid_margin, softmax_margin

Z = np.concatenate([np.linspace(-30, 30, 601), [-1e4, -300, -88, 88, 300]]).astype(np.float32)
ONES = np.ones_like(Z)
FINE = np.linspace(-30, 30, 120_001)  # in float64

LOGITS = np.random.default_rng(0).normal(0, 4, (40, 5)).astype(np.float32)
IDS = (np.arange(40) % 5).astype(np.int32)
ONE_HOT = np.eye(5, dtype=np.float32)[IDS]
MIXED = (0.7 * ONE_HOT + 0.3 * ONE_HOT[::-1]).astype(np.float32)
either = pytest.mark.parametrize("labels", [IDS, MIXED], ids=["ids", "distributions"])
of_classes = pytest.mark.parametrize("case", SOFTMAX_LOSSES, ids=by_name)


def close(got, true, relative=2e-6, absolute=0.0):
    for one, other in zip(got, true, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), relative, absolute)


@partial(jax.jit, static_argnums=0)
def loss_and_slope(loss, x, labels, **options):
    """Of every example, and in all of its logits."""
    value, pull = jax.vjp(lambda x: loss(x, labels, **options), x)
    return value, *pull(jnp.ones_like(value))


def at(case, order, z=FINE, **options):
    """A derivative in the margin."""
    loss = partial(case, labels=1.0, **options)
    for _ in range(order):
        loss = jax.grad(loss)
    return jax.jit(jax.vmap(loss))(z)


# --- one is another -------------------------------------------------------------------------------


@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
def test_gamma_zero_is_cross_entropy(y):
    y = y * ONES
    with jax.numpy_dtype_promotion("standard"):
        true = optax.sigmoid_binary_cross_entropy(Z, y)
    close(loss_and_slope(FOCAL, Z, y, gamma=0.0), (true, jax.nn.sigmoid(Z) - y), absolute=1e-6)


@either
def test_softmax_gamma_zero_is_cross_entropy(labels):
    true = loss_and_slope(optax.softmax_cross_entropy, LOGITS, ONE_HOT if labels is IDS else labels)
    close(loss_and_slope(SOFTMAX_FOCAL, LOGITS, labels, gamma=0.0), true, absolute=2e-7)


def test_k_one_is_gamma_one():
    for y in (0 * ONES, ONES):
        close(loss_and_slope(SOFT, Z, y, k=1.0), loss_and_slope(FOCAL, Z, y, gamma=1.0))
    for labels in (IDS, MIXED):
        focal = loss_and_slope(SOFTMAX_FOCAL, LOGITS, labels, gamma=1.0)
        close(loss_and_slope(SOFTMAX_SOFT, LOGITS, labels, k=1.0), focal, absolute=2e-7)


def test_small_k_is_half_of_cross_entropy():
    # sigma(-k z) = 1/2 - k z / 4 + ...
    error = 2 * SOFT(Z, ONES, k=1e-9) / FOCAL(Z, ONES, gamma=0.0) - 1
    assert np.all(np.abs(error[Z < 80]) <= 2e-6 + 1e-9 * np.abs(Z[Z < 80]))


@pytest.mark.parametrize("case", LOSSES, ids=by_name)
@pytest.mark.parametrize("y", [0, 0.125, 1])
def test_swapping_labels_and_the_sign_changes_nothing(case, y):
    for value in case.valid:
        options = {case.parameter: np.float32(value)}
        here = loss_and_slope(case, Z, y * ONES, **options)
        loss, slope = loss_and_slope(case, -Z, (1 - y) * ONES, **options)
        # the slope of a soft label is a difference, and any may underflow
        close(here[:1], [loss], 1e-5, 1e-37)
        close(here[1:], [-slope], 1e-5, 1e-6 if 0 < y < 1 else 1e-37)


@pytest.mark.parametrize(
    ("softmax", "sigmoid", "options"),
    [*zip(SOFTMAX_LOSSES, LOSSES, [{}] * 3, strict=False), (SU, SOFT, {"k": 2.0})],
)
def test_two_classes_are_the_sigmoid_of_the_difference(softmax, sigmoid, options):
    z = np.round(64 * Z[np.abs(Z) < 40]) / 64  # so that adding is exact
    for y, offset in ((0, 0), (1, 3.5), (1, -40)):
        x = np.stack([np.full_like(z, offset), z + np.float32(offset)], -1)
        ids = np.full(z.shape, y, np.int32)
        loss, slope = loss_and_slope(sigmoid, z, ids.astype(np.float32), **options)
        for labels in (ids, np.eye(2, dtype=np.float32)[ids]):
            got = loss_and_slope(softmax, x, labels, **options)
            close(got, (loss, np.stack([-slope, slope], -1)), absolute=1e-33)


@of_classes
@either
def test_symmetries_of_classes(case, labels):
    x = np.round(64 * LOGITS) / 64
    value, slope = loss_and_slope(case, x, labels)
    assert np.all(np.abs(slope.sum(-1)) <= 5e-7 * np.abs(slope).sum(-1))
    for offset in (1.0, -256.0, 8192.0):  # to all logits
        moved = loss_and_slope(case, x + np.float32(offset), labels)
        assert all(map(jnp.array_equal, moved, (value, slope)))
    order = np.array([3, 0, 4, 1, 2])
    moved = np.argsort(order)[labels].astype(np.int32) if labels is IDS else labels[:, order]
    close(loss_and_slope(case, x[:, order], moved), (value, slope[:, order]), absolute=2e-7)


@of_classes
def test_softmax_losses_are_linear_in_the_labels(case):
    of_class = [loss_and_slope(case, LOGITS, np.full_like(IDS, c)) for c in range(5)]
    value, slope = (np.stack(parts, -1) for parts in zip(*of_class, strict=True))
    for labels in (ONE_HOT, MIXED, 4 * MIXED):  # nor need they sum to 1
        whole = np.sum(labels * value, -1), np.sum(labels[:, None] * slope, -1)
        close(loss_and_slope(case, LOGITS, labels), whole, absolute=4e-6)


@pytest.mark.parametrize("case", [SOFT, HARD], ids=by_name)
def test_the_others_are_linear_in_the_label(case):
    for y in (0.1, 0.5, 0.9):
        whole = y * case(Z, ONES) + (1 - y) * case(Z, 0 * ONES)
        close([case(Z, y * ONES)], [whole], 1e-6)


def test_the_margins():
    close([sigmoid_margin(Z, ONES)], [Z])
    close([sigmoid_margin(Z, np.zeros(Z.shape, np.int8))], [-Z])
    close([sigmoid_margin(Z, np.full(Z.shape, 0.5, np.float32))], [0 * Z])
    p = jax.nn.softmax(LOGITS.astype(np.float64))[np.arange(40), IDS]
    for labels in (IDS, ONE_HOT):
        close([softmax_margin(LOGITS, labels)], [np.log(p) - np.log1p(-p)], 1e-4, 1e-5)


@pytest.mark.parametrize(
    ("sigmoid", "softmax", "weight"), [*zip(LOSSES, SOFTMAX_LOSSES[:3], MODULATIONS, strict=True)]
)
def test_a_loss_is_its_weight_times_cross_entropy(sigmoid, softmax, weight):
    z = softmax_margin(LOGITS, IDS)
    for value in weight.valid:
        options = {weight.parameter: value}
        product = weight(Z, **options) * jax.nn.softplus(-Z)
        close([sigmoid(Z, ONES, **options)], [product], 4e-6, 1e-37)
        product = weight(z, **options) * jax.nn.softplus(-z)
        close([softmax(LOGITS, IDS, **options)], [product], 1e-5, 1e-37)


@pytest.mark.parametrize("gamma", [1.0, 1.7])
def test_drop_in_for_optax(gamma, float64):
    """In float64, where what optax loses does not show."""
    rng = np.random.default_rng(0)
    x, soft = rng.normal(0, 4, 2000), rng.uniform(size=2000)

    @partial(jax.jit, static_argnums=0)
    def everything(loss, y, gamma, alpha):
        def summed(x, y, gamma):
            return loss(x, y, gamma=gamma, alpha=alpha).sum()

        by_logit, by_label, by_gamma = jax.grad(summed, (0, 1, 2))(x, y, gamma)
        return loss(x, y, gamma=gamma, alpha=alpha), by_logit, by_gamma, by_label

    for y, alpha in ((soft, None), (np.round(soft), 0.25)):
        with jax.numpy_dtype_promotion("standard"):
            true = everything(optax.sigmoid_focal_loss, y, gamma, alpha)
        # optax drops a term of the label's gradient at a label of exactly 0 or 1
        count = 4 if y is soft else 3
        close(everything(FOCAL, y, gamma, alpha)[:count], true[:count], 1e-8, 1e-13)


# --- shape ----------------------------------------------------------------------------------------


def test_soft_truncation_is_convex_around_its_default_and_focal_is_not(float64):
    for k in (1.4428, 1.6, 2.0, 2.1486):
        assert jnp.min(at(SOFT, 2, k=k)) > 0
    for k in (0.5, 1.0, 1.4427, 2.1487, 10.0):
        assert jnp.min(at(SOFT, 2, k=k)) < -5e-7
    for gamma in (0.5, 1.0, 2.0, 3.0, 5.0):
        assert jnp.min(at(FOCAL, 2, gamma=gamma)) < -0.003


def test_the_default_k_keeps_the_slope_within_one(float64):
    assert jnp.max(jnp.abs(at(SOFT, 1))) <= 1
    assert jnp.max(jnp.abs(at(SOFT, 1, k=1.0))) > 1.04
    assert jnp.max(jnp.abs(at(SOFT, 1, k=1.4))) > 1


def test_where_focal_pulls_hardest(float64):
    for gamma, z, peak in (
        (0.5, -4.0185, 1.00895),
        (1.0, -3.0977, 1.04533),
        (2.0, -2.7904, 1.12898),
        (3.0, -2.7968, 1.20155),
        (5.0, -2.9395, 1.31461),
    ):
        slope = jnp.abs(at(FOCAL, 1, gamma=gamma))
        assert FINE[jnp.argmax(slope)] == pytest.approx(z, abs=3e-4)
        assert jnp.max(slope) == pytest.approx(peak, abs=5e-6)


def test_focal_sharpens_a_soft_label(float64):
    p = np.linspace(0.9, 0.999, 9901)
    x, y = np.log(p / (1 - p)), np.full(p.shape, 0.9)
    loss, slope = loss_and_slope(FOCAL, x, y)
    assert p[jnp.argmin(loss)] == pytest.approx(0.986, abs=3e-4)
    assert np.sum(np.diff(np.sign(slope)) != 0) == 1
    assert p[jnp.argmin(FOCAL(x, y, gamma=0.0))] == pytest.approx(0.9, abs=3e-4)


# --- limits ---------------------------------------------------------------------------------------


def test_the_slope_of_soft_truncation_tends_to_hard_plus_a_point_mass(float64):
    away = FINE[np.abs(FINE) > 0.001]
    close([at(SOFT, 1, away, k=1e5)], [at(HARD, 1, away)], 1e-9, 1e-30)
    near = np.linspace(-0.002, 0.002, 400_001)
    mass = np.trapezoid(np.asarray(at(SOFT, 1, near, k=1e5) - at(HARD, 1, near)), near)
    assert mass == pytest.approx(-np.log(2), abs=1e-5)


def test_the_hard_loss_jumps_at_its_threshold(float64):
    for m in (0.1, 0.5, 0.9):
        step = np.log(m / (1 - m))
        below, above = (HARD(step + d, 1, threshold=m) for d in (-1e-9, 1e-9))
        assert float(below) == pytest.approx(-np.log(m), abs=1e-8)
        assert above == 0


@pytest.mark.parametrize("m", [0.25, 0.5, 0.75])
def test_the_threshold_itself_still_counts(m):
    """1 where p_t <= m: at logit 0 the probability of either label is 1/2."""
    for y in (0, 1):
        loss, slope = jax.value_and_grad(HARD)(jnp.float32(0), y, threshold=m)
        assert float(loss) == pytest.approx(np.log(2) if m >= 0.5 else 0, rel=1e-6)
        assert float(slope) == (0.5 - y if m >= 0.5 else 0)


# --- the literal form -----------------------------------------------------------------------------


def test_the_literal_form_falls_silent_on_a_misclassified_example():
    x = np.array([[0, 1, -wrong] for wrong in (2, 5, 10, 20, 40, 80)], np.float32)
    ids = np.zeros(6, np.int32)
    plain, _ = loss_and_slope(SOFTMAX_FOCAL, x, ids, gamma=0.0)
    literal, by_logit = loss_and_slope(SU, x, ids, k=1.0)
    soft, kept = loss_and_slope(SOFTMAX_SOFT, x, ids, k=1.0)
    assert np.all(np.exp(-plain) < 0.5)  # wrong in every row
    assert np.all(np.diff(literal / plain) < 0)
    assert float(literal[3]) == pytest.approx(2.7e-9, rel=0.01)
    assert literal[-1] / plain[-1] < 1e-34
    assert np.abs(by_logit[-1]).max() < 1e-33
    # where two classes are left, the weight is theirs
    np.testing.assert_allclose(soft[3:] / plain[3:], 1 / (1 + np.exp(-1)), 1e-6)
    assert np.all(np.abs(kept[:, 0]) > 0.5)


def test_training_by_the_literal_form_leaves_an_example_wrong():
    """A linear classifier of three examples, from 0: every other loss gets all of them right."""
    x, ids = np.array([[0, 1], [-1, -1], [1, 2]], np.float32), np.arange(3, dtype=np.int32)

    @partial(jax.jit, static_argnums=0)
    def right(loss):
        slope = jax.grad(lambda weights: loss(x @ weights, ids).mean())
        weights = jax.lax.fori_loop(0, 1000, lambda _, w: w - slope(w), jnp.zeros((2, 3)))
        return jnp.argmax(x @ weights, -1) == ids

    for case in SOFTMAX_LOSSES[:3]:
        assert right(case).all()
    assert right(SU).tolist() == [True, True, False]
