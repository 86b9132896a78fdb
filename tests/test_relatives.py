"""The relatives of focal loss, against the formulas of their papers in exact numbers."""

from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from cases import RELATIVES, by_name
from scipy import optimize

import focaljax

X = np.array([-300, -90, -17, -2.5, 0, 1e-9, 0.7, 3, 16, 40, 300])
Y = np.array([0.0, 1e-6, 0.3, 0.8, 1.0])
each = pytest.mark.parametrize("case", RELATIVES, ids=by_name)


def pairs():
    x, y = np.meshgrid(X, Y)
    return x.ravel(), y.ravel()


@each
def test_value_and_slope_are_those_of_the_paper(case, float64):
    for options in ({}, *case.others):
        options = {**case.defaults, **options}
        x, y = pairs()
        loss, slope = jax.jit(jax.vmap(jax.value_and_grad(partial(case, **options))))(x, y)

        def exact(z, label, at, options=options):
            """Where a target or a weight is a constant to autodiff it is that at `at`."""
            return case.truth(mpmath.mpf(z), mpmath.mpf(label), mpmath.mpf(at), **options)

        with mpmath.workdps(320):
            true = [float(exact(z, label, z)) for z, label in zip(x, y, strict=True)]
            by_z = [
                float(mpmath.diff(lambda z, y=y, at=at: exact(z, y, at), at))
                for at, y in zip(map(float, x), y, strict=True)
            ]
        np.testing.assert_allclose(loss, true, 1e-12, 1e-290)
        # a slope is a difference of terms as large as the loss
        np.testing.assert_allclose(slope, by_z, 1e-11, 1e-15)


@each
def test_contract_of_relatives(case):
    x, y = (a.astype(np.float32) for a in pairs())
    loss = jax.jit(lambda x, y, where=None: case(x, y, where=where))
    plain = loss(x, y)
    narrow = x.astype(jnp.bfloat16)
    assert jnp.array_equal(loss(narrow, y), loss(narrow.astype(np.float32), y).astype(narrow.dtype))
    kept = np.arange(len(x)) % 3 > 0
    masked_x, masked_y = np.where(kept, x, np.nan), np.where(kept, y, -1).astype(np.float32)
    step = jax.jit(jax.grad(lambda x, y: loss(x, y, where=kept).sum(), (0, 1)))
    np.testing.assert_allclose(loss(masked_x, masked_y, where=kept), np.where(kept, plain, 0), 1e-6)
    for got, true in zip(step(masked_x, masked_y), step(x, y), strict=True):
        assert np.all(got[~kept] == 0)
        np.testing.assert_allclose(got, true, 1e-6)
        assert np.isfinite(got).all()
    for wrong in (-0.1, 1.1, np.nan):
        assert np.isnan(case(jnp.float32(1), jnp.float32(wrong)))
    assert np.isfinite(jax.jit(jax.vmap(jax.hessian(case)))(x, y)).all()
    for name, value in case.defaults.items():
        close = case(x, y, **{name: jnp.full(x.shape, value, jnp.float32)})
        np.testing.assert_allclose(close, plain, 2e-5, 1e-30)
        with pytest.raises(ValueError, match=f"^{name} must be"):
            case(x, y, **{name: np.nan})
        with pytest.raises(AssertionError, match=f"{name} must be a number or broadcast"):
            case(x, y, **{name: np.full(3, value, np.float32)})
    with pytest.raises(AssertionError, match="labels must have the shape of logits"):
        case(x, y[:1])
    with jax.debug_nans(True):
        jax.jit(jax.value_and_grad(lambda x: loss(x, y).sum()))(x)


@pytest.mark.parametrize("case", [c for c in RELATIVES if c.constant_weight], ids=by_name)
def test_a_constant_weight_gives_the_gradient_of_cross_entropy_alone(case, float64):
    x, y = pairs()
    x, y = x[np.abs(x) < 20], y[np.abs(x) < 20]
    value, slope = jax.vmap(jax.value_and_grad(partial(case, constant_weight=True)))(x, y)
    np.testing.assert_allclose(value, case(x, y), 1e-12)

    def exact(z, label, at):
        options = {**case.defaults, "weight_at": at}
        return case.truth(mpmath.mpf(z), mpmath.mpf(label), at, **options)

    true = [
        float(mpmath.diff(lambda z, y=y, at=at: exact(z, y, mpmath.mpf(at)), at))
        for at, y in zip(map(float, x), y, strict=True)
    ]
    np.testing.assert_allclose(slope, true, 1e-10, 1e-13)


def test_varifocal_both_ways():
    """The two gradients that are in use, at x = 1/2 and y = 0."""
    for constant, true in ((False, 0.395), (True, 0.181)):
        loss = partial(focaljax.sigmoid_varifocal_loss, constant_weight=constant)
        assert float(jax.grad(loss)(0.5, 0.0)) == pytest.approx(true, abs=5e-4)


@pytest.mark.parametrize(
    ("softmax", "sigmoid"),
    [
        (focaljax.softmax_poly1_loss, focaljax.sigmoid_poly1_loss),
        (focaljax.softmax_reduced_focal_loss, focaljax.sigmoid_reduced_focal_loss),
    ],
)
def test_softmax_relatives_of_two_classes_are_the_sigmoid_ones(softmax, sigmoid):
    x = np.linspace(-20, 20, 41, dtype=np.float32)
    pair = np.stack([x, 0 * x], -1)
    step = jax.jit(jax.vmap(jax.value_and_grad(sigmoid), (0, None)))
    of_pair = jax.jit(jax.vmap(jax.value_and_grad(softmax), (0, None)))
    true, slope = step(x, 1)
    for labels in (0, np.array([1, 0], np.float32)):
        loss, slopes = of_pair(pair, labels)
        np.testing.assert_allclose(loss, true, 5e-6)
        np.testing.assert_allclose(slopes, np.stack([slope, -slope], -1), 1e-5, 1e-9)


@pytest.mark.parametrize("margin", [0.0, 1e-9])
@pytest.mark.parametrize("traced", [False, True])
def test_asymmetric_of_a_margin_near_nothing(margin, traced):
    """Where p - m is rounded to 1 the loss is that of 1 - p + m."""
    x = jnp.array([12.0, 40.0, 100.0, -100.0])
    margin = jnp.float32(margin) if traced else margin
    step = jax.vmap(jax.value_and_grad(partial(focaljax.sigmoid_asymmetric_loss, margin=margin)))
    loss, slope = step(x, jnp.zeros(4))
    rest = np.exp(-np.logaddexp(0, np.float64(x))) + float(margin)
    np.testing.assert_allclose(loss[:3], -np.log(rest)[:3], 1e-4)
    assert jnp.isfinite(slope).all()
    assert loss[3] == 0


def test_asymmetric_of_classes(float64):
    rng = np.random.default_rng(0)
    x, ids = rng.normal(0, 3, (50, 6)), np.arange(50) % 6
    p, hot = jax.nn.softmax(x), np.eye(6)[ids]
    weight = (1 - np.where(hot, p, 1 - p)) ** np.where(hot, 1.5, 4)
    smoothed = 0.9 * hot + 0.1 / 6
    options = {"gamma_positive": 1.5}
    loss = jax.jit(partial(focaljax.softmax_asymmetric_loss, **options))(x, ids)
    np.testing.assert_allclose(loss, -(smoothed * weight * np.log(p)).sum(-1), 1e-11)
    unsmoothed = partial(focaljax.softmax_asymmetric_loss, label_smoothing=0, **options)
    plain = jax.jit(unsmoothed)(x, ids)
    np.testing.assert_allclose(plain, focaljax.softmax_focal_loss(x, ids, gamma=1.5), 1e-11)
    assert np.isnan(jax.jit(focaljax.softmax_asymmetric_loss)(x[0], 6))
    kept = ids > 2
    masked = jax.jit(partial(focaljax.softmax_asymmetric_loss, where=kept, **options))
    masked = masked(x, np.where(kept, ids, -1))
    np.testing.assert_allclose(masked, np.where(kept, loss, 0), 1e-12)


def test_distribution_focal_loss(float64):
    x = np.random.default_rng(0).normal(0, 3, (9, 8))
    targets = np.array([0, 0.25, 1, 3.5, 6.75, 7, -1e-9, 7.001, np.nan])
    log_p, left = jax.nn.log_softmax(x), np.clip(np.floor(targets[:6]), 0, 6).astype(int)
    share, rows = targets[:6] - left, np.arange(6)
    true = -(1 - share) * log_p[rows, left] - share * log_p[rows, left + 1]
    loss = focaljax.distribution_focal_loss(x, targets)
    np.testing.assert_allclose(loss[:6], true, 1e-12)
    assert np.isnan(loss[6:]).all()
    assert jnp.array_equal(focaljax.distribution_focal_loss(x.T, targets, axis=0)[:6], loss[:6])
    masked = focaljax.distribution_focal_loss(x, targets, where=np.arange(9) < 6)
    assert jnp.array_equal(masked, np.where(np.arange(9) < 6, loss, 0))
    with pytest.raises(AssertionError, match="targets must have the shape of logits without axis"):
        focaljax.distribution_focal_loss(x, targets[:, None])


def test_a_heatmap_without_a_peak_is_nothing():
    heatmap = jnp.array([0.0, 0.5, 0.9])
    loss = focaljax.sigmoid_gaussian_focal_loss(jnp.full(3, -200.0), heatmap)
    assert focaljax.normalize_by_positives(loss, heatmap == 1) == 0


def test_matching_cost_is_that_of_the_loss():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 7, 5)).astype(np.float32)
    ids, real = (
        np.array([[1, 4, 1, -1], [0, 2, 9, 3]]),
        np.array([[1, 1, 1, 0], [1, 1, 0, 1]], bool),
    )
    loss = partial(focaljax.sigmoid_focal_loss, alpha=0.25)
    cost = jax.jit(partial(focaljax.matching_cost, loss=loss))(logits, ids, where=real)
    assert cost.shape == (2, 7, 4)
    for b, q, t in np.ndindex(cost.shape):
        x = logits[b, q, ids[b, t]] if real[b, t] else 0
        true = loss(x, 1.0) - loss(x, 0.0) if real[b, t] else 0
        np.testing.assert_allclose(cost[b, q, t], true, 1e-6, 1e-7)
    assert np.isnan(focaljax.matching_cost(logits, ids, loss)).sum() == 14
    for one, columns in zip(cost, real, strict=True):
        queries, objects = optimize.linear_sum_assignment(one[:, columns])
        best = np.asarray(one)[:, columns][queries, objects].sum()
        ours = optax.assignment.hungarian_algorithm(one)
        assert float(one[ours].sum()) == pytest.approx(best, rel=1e-5)
    with pytest.raises(AssertionError, match="ids must have the shape of logits"):
        focaljax.matching_cost(logits, ids[0], loss)
    with pytest.raises(AssertionError, match="ids must be integers, got float32"):
        focaljax.matching_cost(logits, ids.astype(np.float32), loss)


def test_logit_adjustment_is_undone_by_its_negative():
    x, prior = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), [900, 90, 10]
    there = focaljax.logit_adjustment(x, prior=prior, tau=1.5)
    back = focaljax.logit_adjustment(there, prior=prior, tau=-1.5)
    np.testing.assert_allclose(back, x, 1e-5, 1e-5)
    np.testing.assert_allclose((there - x)[:, 0] - (there - x)[:, 2], 1.5 * np.log(90), 1e-5)
    moved = focaljax.logit_adjustment(x.T, prior=prior, tau=1.5, axis=0)
    assert jnp.array_equal(moved.T, there)
    with pytest.raises(ValueError, match="prior must be above 0"):
        focaljax.logit_adjustment(x, prior=[1, 0, 1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: focaljax.softplus(-z) + focaljax.sigmoid(-z),
        lambda z: focaljax.softplus(-(2 * z + 1)) / 2,
    ],
    ids=["poly-1", "FL*"],
)
def test_posteriors_of_relatives_are_where_the_risk_is_least(loss, float64):
    for eta in (0.02, 0.4, 0.9):
        risk = jax.jit(lambda x, eta=eta: eta * loss(x) + (1 - eta) * loss(-x))
        best = optimize.minimize_scalar(lambda x, r=risk: float(r(float(x))), (-5, 5), tol=1e-12).x
        assert float(focaljax.sigmoid_posterior(best, loss=loss)) == pytest.approx(eta, abs=1e-6)
