"""Probabilities from trained logits: what the losses' minimisers say, and what follows from it."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from reference import EXACT
from scipy import optimize, special

from focaljax import (
    decision_threshold,
    sigmoid_focal_loss,
    sigmoid_hard_threshold_loss,
    sigmoid_posterior,
    sigmoid_posterior_logits,
    sigmoid_prior_shift,
    sigmoid_soft_truncation_loss,
    softmax_focal_loss,
    softmax_posterior,
    softmax_posterior_logits,
    softmax_prior_shift,
    softmax_soft_truncation_loss,
)

VALUES = {"gamma": (0.0, 0.5, 2.0, 5.0), "k": (0.25, 2.0, 3.3, 5.0)}
PARAMETERS = [(name, value) for name, values in VALUES.items() for value in values]
WEIGHTS = {"gamma": reference.focal_weight, "k": reference.soft_truncation_weight}
SIGMOID = {"gamma": sigmoid_focal_loss, "k": sigmoid_soft_truncation_loss}
SOFTMAX = {"gamma": softmax_focal_loss, "k": softmax_soft_truncation_loss}

each_parameter = pytest.mark.parametrize(("name", "value"), PARAMETERS)
each_name = pytest.mark.parametrize("name", ["gamma", "k"])
POSTERIORS = (sigmoid_posterior, sigmoid_posterior_logits)
POSTERIORS_OF_CLASSES = (softmax_posterior, softmax_posterior_logits)
EVERY = (*POSTERIORS, *POSTERIORS_OF_CLASSES)
every = pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)


def close(got, true, relative=1e-6, absolute=0.0):
    np.testing.assert_allclose(np.asarray(got), np.asarray(true), relative, absolute)


# --- the minimiser of the expected loss gives the true probabilities back ------------------------


@partial(jax.jit, static_argnums=0)
def risk(name, x, eta, value, alpha):
    """The expected loss of the logit x of a positive of probability eta."""
    loss = partial(SIGMOID[name], x, **{name: value, "alpha": alpha})
    return eta * loss(jnp.ones_like(x)) + (1 - eta) * loss(jnp.zeros_like(x))


risk_slope = jax.jit(jax.grad(risk, argnums=1), static_argnums=0)


@pytest.mark.parametrize("alpha", [0.5, 0.001])
@each_parameter
def test_the_best_logit_gives_its_probability(name, value, alpha, float64):
    everywhere = np.linspace(-60, 60, 12001)
    for eta in (1e-9, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.95, 1 - 1e-6):
        at = (eta, value, alpha)
        best = optimize.brentq(lambda x, at=at: risk_slope(name, x, *at), -60, 60, xtol=1e-13)
        assert risk(name, best, *at) <= (1 + 1e-12) * jnp.min(risk(name, everywhere, *at))
        options = {name: value, "alpha": alpha}
        close(sigmoid_posterior(best, **options), eta, 1e-6)
        close(sigmoid_posterior(-best, **options | {"alpha": 1 - alpha}), 1 - eta, 1e-6)
        close(sigmoid_posterior_logits(best, **options), special.logit(eta), 1e-6, 1e-6)


@partial(jax.jit, static_argnums=0)
def risk_of_classes(name, x, eta, value, alpha):
    """The expected loss of the logits x where class c has the probability eta_c."""

    def of_class(c):
        return SOFTMAX[name](x, c, **{name: value, "alpha": alpha})

    return jnp.sum(eta * jax.vmap(of_class)(jnp.arange(len(eta))))


risk_and_slopes = jax.jit(jax.value_and_grad(risk_of_classes, argnums=1), static_argnums=0)
risks = jax.jit(
    lambda name, x, *at: jax.vmap(lambda x: risk_of_classes(name, x, *at))(x), static_argnums=0
)


@each_name
def test_the_best_logits_give_their_probabilities(name, float64):
    rng, classes = np.random.default_rng(4), 4
    choices = itertools.product(VALUES[name], (0.5, 5.0), (False, True))
    for value, concentration, weighed in choices:
        eta = rng.dirichlet(np.full(classes, concentration))
        alpha = rng.uniform(0.2, 3, classes) if weighed else np.ones(classes)
        at = (eta, value, alpha)
        found = optimize.minimize(
            lambda x, at=at: tuple(map(np.asarray, risk_and_slopes(name, x, *at))),
            np.log(eta / alpha),
            jac=True,
            options={"gtol": 1e-10},
        )
        others = 4 * rng.normal(size=(1000, classes))
        assert found.fun <= risks(name, others, *at).min()
        got = softmax_posterior(found.x, **{name: value}, alpha=alpha)
        close(got, eta, 0, 1e-6)
        if not weighed:
            assert np.array_equal(np.argsort(got), np.argsort(found.x))


def test_gradient_flow_of_the_hard_threshold_stops_at_the_threshold():
    """Why there is no way back from it: what the docstrings say of clip(eta, 1 - m, m)."""
    eta = jnp.linspace(0.02, 0.98, 25)

    @jax.jit
    def flow(x, m):
        def pull(x):
            loss = partial(sigmoid_hard_threshold_loss, x, threshold=m)
            return jnp.sum(eta * loss(jnp.ones_like(x)) + (1 - eta) * loss(jnp.zeros_like(x)))

        return jax.lax.fori_loop(0, 4000, lambda _, x: x - 0.02 * jax.grad(pull)(x), x)

    for m in (0.6, 0.9):
        for start in (-1.0, 0.0, 1.0):
            q = jax.nn.sigmoid(flow(jnp.full_like(eta, start), m))
            close(q, jnp.clip(eta, 1 - m, m), 0, 0.006)


# --- exact ----------------------------------------------------------------------------------------


def share(margin, name, value):
    return reference.posterior_share(margin, WEIGHTS[name], value)


@pytest.mark.parametrize(
    ("name", "value", "alpha"), [*((*p, None) for p in PARAMETERS), ("gamma", 2.0, 0.001)]
)
def test_sigmoid_posteriors_and_their_slopes_are_exact(name, value, alpha):
    """As far as the slopes of the losses are normal numbers."""
    reach = 80 / (1 + value)
    x = np.concatenate([np.linspace(-reach, reach, 61), np.geomspace(1e-6, 1, 9)])
    x = x.astype(np.float32)
    value, weight = EXACT.of(np.float32(value)), EXACT.of(np.float32(alpha or 0.5))

    def log_odds(x):
        odds = share(x, name, value) / share(-x, name, value) * (1 - weight) / weight
        return EXACT.log(odds)

    true = log_odds(EXACT.of(x))
    p = reference.sigma(true)
    options = {name: float(value), "alpha": alpha}
    # log-odds of 80 are rounded by 4e-6, and those near 0 by what their parts are
    close(sigmoid_posterior(x, **options), p.astype(float), 1e-5)
    close(sigmoid_posterior_logits(x, **options), true.astype(float), 3e-6, 3e-6)
    slope = np.array([mpmath.diff(log_odds, z) for z in EXACT.of(x)])
    for function, exact in zip(POSTERIORS, (p * (1 - p) * slope, slope), strict=True):
        got = jax.grad(lambda x, f=function: f(x, **options).sum())(x)
        close(got, exact.astype(float), 1e-5)


@each_parameter
def test_softmax_posteriors_are_exact(name, value):
    rng, classes = np.random.default_rng(1), 5
    sizes = np.repeat([0, 0.1, 1, 5], 4)
    x = (sizes[:, None] * rng.normal(size=(len(sizes), classes))).astype(np.float32)
    margins = [reference.margin_of(EXACT.of(x), np.full(len(x), c))[0] for c in range(classes)]
    shares = np.stack([share(z, name, EXACT.of(np.float32(value))) for z in margins], -1)
    # what is rounded is the distance of the logits, which a posterior multiplies by 1 + value
    rounding = 3e-6 + 4 * 1.2e-7 * (1 + value) * np.ptp(x, -1, keepdims=True)
    for alpha in (np.ones(classes, np.float32), np.linspace(0.2, 3, classes, dtype=np.float32)):
        parts = shares / EXACT.of(alpha)
        true = (parts / parts.sum(-1, keepdims=True)).astype(float)
        options = {name: value, "alpha": alpha}
        for got in (
            softmax_posterior(x, **options),
            jnp.exp(softmax_posterior_logits(x, **options)),
        ):
            error = np.abs(np.asarray(got) - true) / true
            assert np.all((error <= rounding) | (true < 1e-30))


@each_name
def test_slopes_of_softmax_posteriors(name):
    """Of two classes those of the sigmoid, also at a tie."""
    lead = np.float32([0, 2e-8, 1e-3, -2, 5])
    options = {name: 2.0}
    slope = jax.jit(jax.vmap(jax.grad(lambda x: sigmoid_posterior(x, **options))))(lead)
    pair = jnp.stack([lead, jnp.zeros(5)], -1)
    got = jax.jit(jax.vmap(jax.jacrev(lambda x: softmax_posterior(x, **options))))(pair)
    close(got, np.asarray(slope)[:, None, None] * np.float32([[1, -1], [-1, 1]]), 1e-5)


# --- what follows from the formula ----------------------------------------------------------------


def test_after_plain_cross_entropy_nothing_changes():
    x = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 10
    close(sigmoid_posterior(x, gamma=0.0), jax.nn.sigmoid(x), 3e-6)
    close(softmax_posterior(x, gamma=0), jax.nn.softmax(x), 2e-5)


@each_parameter
def test_the_posterior_increases_with_the_logit(name, value):
    x = np.linspace(-12, 12, 401, dtype=np.float32)
    assert np.all(np.diff(sigmoid_posterior_logits(x, **{name: value}, alpha=0.1)) > 0)


@pytest.mark.parametrize(("k", "increases"), [(2.0, True), (3.318, True), (3.32, False)])
def test_up_to_which_k_the_order_of_classes_stays(k, increases, float64):
    q = np.linspace(0.01, 0.69, 20001)
    rest = np.full_like(q, 0.3)
    p = softmax_posterior(np.log(np.stack([q, rest, 0.7 - q + 1e-9], -1)), k=k)
    assert np.all(np.diff(p[:, 0] / p[:, 1]) > 0) == increases


# --- the contract ---------------------------------------------------------------------------------


@each_name
def test_at_the_ends(name):
    x = np.array([np.inf, -np.inf, 1e4, -1e4, np.nan], np.float32)
    close(sigmoid_posterior(x, **{name: 2.0}), [1, 0, 1, 0, np.nan])
    log_odds = sigmoid_posterior_logits(x, **{name: 2.0})
    assert np.isnan(log_odds[4])
    assert log_odds[0] == np.inf == -log_odds[1]
    assert log_odds[2] == -log_odds[3] >= 1e4
    x = np.array([[np.inf, 1, 2], [1, -np.inf, 1], [-np.inf, 3, -np.inf], [1e4, 0, -1e4]])
    p = softmax_posterior(x.astype(np.float32), **{name: 2.0})
    close(p, [[1, 0, 0], [0.5, 0, 0.5], [0, 1, 0], [1, 0, 0]])
    for function in EVERY:
        slopes = jax.jit(jax.vmap(jax.jacrev(partial(function, **{name: 2.0}))))
        assert np.isfinite(slopes(x.astype(np.float32))).all()


def test_one_class_is_certain():
    for x in (-3.0, 0.0, 50.0):
        assert softmax_posterior(jnp.array([x]), gamma=2.0) == 1
        assert softmax_posterior_logits(jnp.array([x]), k=2.0) == 0


@pytest.mark.parametrize("function", POSTERIORS_OF_CLASSES, ids=lambda f: f.__name__)
@each_name
def test_classes_along_any_axis_and_parameters_of_examples(function, name):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    values = np.linspace(0.5, 3, 8, dtype=np.float32).reshape(2, 4)
    alpha = np.array([1, 2, 3], np.float32)
    got = function(x, **{name: values}, alpha=alpha, axis=1)
    of_rows = jax.vmap(lambda x, v: function(x, **{name: v}, alpha=alpha, axis=0))
    close(of_rows(x, values), got, 3e-6)


@every
def test_the_loss_must_be_told(function):
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"exactly one of gamma, k and loss must say .* got none"):
        function(x)
    with pytest.raises(ValueError, match="got gamma and k"):
        function(x, gamma=2.0, k=1.0)
    with pytest.raises(ValueError, match=r"^threshold: .* cannot be undone"):
        function(x, threshold=0.5)
    with pytest.raises(AssertionError, match="logits must be floating point, got int32"):
        function(np.zeros((2, 3), np.int32), gamma=2.0)


def test_alpha_that_says_nothing_of_a_class():
    x = np.zeros((2, 3), np.float32)
    for function in POSTERIORS:
        for alpha in (0.0, 1.0, np.nan, 1 - 1e-9, 1e-50):  # the last two are rounded to 1 and 0
            with pytest.raises(ValueError, match=r"^alpha must be in \(0, 1\)"):
                function(x, gamma=2.0, alpha=alpha)
    for function in POSTERIORS_OF_CLASSES:
        for weight in (0.0, -1.0, np.inf, 1e-50):
            with pytest.raises(ValueError, match=r"^alpha must be above 0"):
                function(x, gamma=2.0, alpha=np.array([1, weight, 1]))
        with pytest.raises(AssertionError, match="each of the 3 classes"):
            function(x, gamma=2.0, alpha=0.25)


# --- priors and costs -----------------------------------------------------------------------------


def test_prior_shift_is_bayes_rule():
    """On a table of five kinds of examples: how often each class looks like each of them."""
    rng = np.random.default_rng(0)
    looks = rng.dirichlet(np.ones(5), 3)  # [class, kind]
    source, target = rng.dirichlet(np.ones(3), 2)

    def log_posterior(prior):
        joint = (looks * prior[:, None]).T
        return np.log(joint / joint.sum(-1, keepdims=True)).astype(np.float32)

    shift = partial(softmax_prior_shift, source_prior=source, target_prior=target)
    close(jax.nn.log_softmax(shift(log_posterior(source))), log_posterior(target), 1e-5, 1e-6)
    counts = partial(softmax_prior_shift, source_prior=900 * source, target_prior=7 * target)
    moved = counts(log_posterior(source).T, axis=0)
    close(jax.nn.log_softmax(moved, 0).T, log_posterior(target), 1e-5, 1e-6)
    billions = np.array([5_000_000_000, 5])
    moved = softmax_prior_shift(jnp.zeros(2), source_prior=billions, target_prior=[1, 1])
    close(moved[0] - moved[1], -np.log(1e9), 1e-6)

    looks = looks[:2]
    source, target = np.array([0.7, 0.3]), np.array([0.999, 0.001])
    log_odds = [np.diff(log_posterior(prior))[:, 0] for prior in (source, target)]
    got = sigmoid_prior_shift(log_odds[0], source_prior=0.3, target_prior=0.001)
    close(got, log_odds[1], 1e-5)
    close(sigmoid_prior_shift(got, source_prior=0.001, target_prior=0.3), log_odds[0], 1e-5)


def test_priors_that_cannot_be():
    x = np.zeros((2, 3), np.float32)
    for prior in (0.0, 1.0, np.nan):
        with pytest.raises(ValueError, match=r"^source_prior must be in"):
            sigmoid_prior_shift(x, source_prior=prior, target_prior=0.5)
        with pytest.raises(ValueError, match=r"^target_prior must be in"):
            sigmoid_prior_shift(x, source_prior=0.5, target_prior=prior)
    with pytest.raises(ValueError, match=r"^source_prior must be above 0"):
        softmax_prior_shift(x, source_prior=[1, 0, 1], target_prior=[1, 1, 1])
    with pytest.raises(ValueError, match=r"^target_prior must be at least 0"):
        softmax_prior_shift(x, source_prior=[1, 1, 1], target_prior=[1, -1, 1])
    with pytest.raises(AssertionError, match="target_prior must have one entry for each of the 3"):
        softmax_prior_shift(x, source_prior=[1, 1, 1], target_prior=[1, 1])
    with pytest.raises(AssertionError, match="source_prior must be a number or broadcast"):
        sigmoid_prior_shift(x, source_prior=np.full(4, 0.5), target_prior=0.5)


@pytest.mark.parametrize(
    ("false_positive", "false_negative"), [(1, 20), (3.0, 1.0), (2, 2), (0, 5)]
)
def test_the_threshold_is_where_the_expected_cost_is_least(false_positive, false_negative):
    p = np.linspace(0.0005, 0.9995, 1000)
    costs = [p * false_negative, (1 - p) * false_positive]  # of calling it negative, positive
    threshold = decision_threshold(
        false_positive_cost=false_positive, false_negative_cost=false_negative
    )
    assert np.array_equal(p >= threshold, np.argmin(costs, 0) == 1)
    assert threshold.dtype == jnp.float32
