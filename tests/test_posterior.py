"""Probabilities from trained logits: what the losses' minimisers say, and what follows from it."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import optimize, special, stats

from focaljax import (
    decision_threshold,
    normalize_by_positives,
    prior_bias,
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

VALUES = {"gamma": (0.0, 0.5, 1.0, 2.0, 5.0), "k": (0.25, 1.0, 2.0, 3.3, 5.0)}
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


@pytest.mark.parametrize("alpha", [0.5, 0.25, 0.999])
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


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@each_name
def test_the_best_logits_give_their_probabilities(name, classes, float64):
    rng = np.random.default_rng(classes)
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


def test_positives_of_a_batch_that_they_are_counted_in():
    """By how much `normalize_by_positives` lowers the odds: what `sigmoid_posterior` says of it."""
    batch, eta = 400, 0.1
    others = np.arange(batch)  # how many of them are positive
    chances = stats.binom.pmf(others, batch - 1, eta)

    def weight(positive):
        labels = jnp.arange(batch) < jnp.asarray(others)[:, None] + positive
        loss = jnp.zeros(batch).at[0].set(1)
        each = jax.vmap(lambda labels: normalize_by_positives(loss, labels))(labels)
        return jnp.sum(each * chances)

    with jax.numpy_rank_promotion("allow"):
        ratio = weight(1) / weight(0)
    close(ratio, 1 - 1 / (batch * eta), 0.002)


# --- exact ----------------------------------------------------------------------------------------

# Of float64 115 epsilons count: XLA's own log1p is off by as many, on the CPU, near -0.41.
BOUND = {jnp.float32: 1e-6, jnp.float64: 2e-5}


def worst(got, true, dtype, least=0):
    """The largest error where the truth is a normal number, relative to it, as if in float32.

    Truths below `least` are held to its error.
    """
    got, true = np.asarray(got), np.asarray(true)
    assert got.dtype == dtype
    # the last stretch before underflow, where factors of it underflow, is left out
    normal = np.abs(true) > 1e4 * float(jnp.finfo(dtype).tiny)
    got, true = reference.EXACT.of(got[normal]), true[normal]
    error = np.abs(got - true) / np.maximum(np.abs(true), least)
    return float(error.max()) * float(jnp.finfo(jnp.float32).eps / jnp.finfo(dtype).eps)


def share(margin, name, value):
    return reference.posterior_share(margin, WEIGHTS[name], value)


@pytest.mark.parametrize("alpha", [None, 0.25, 0.001])
@each_parameter
def test_sigmoid_posteriors_are_exact(name, value, alpha, dtype):
    some = np.random.default_rng(0).uniform(0, 6, 20)
    x = np.concatenate([np.geomspace(1e-6, 1e4, 21), np.linspace(0, 80, 41), some])
    x = np.concatenate([-x, x]).astype(dtype)
    positive, negative = (
        share(reference.EXACT.of(z), name, mpmath.mpf(float(dtype(value)))) for z in (x, -x)
    )
    if alpha is not None:
        weight = mpmath.mpf(float(dtype(alpha)))
        positive, negative = positive / weight, negative / (1 - weight)
    options = {name: value, "alpha": alpha}
    got = sigmoid_posterior(x, **options)
    assert worst(got, positive / (positive + negative), dtype) <= BOUND[dtype]
    # alpha adds a constant, beside which the rest may cancel
    got = sigmoid_posterior_logits(x, **options)
    true = reference.EXACT.log(positive / negative)
    assert worst(got, true, dtype, 0 if alpha is None else 1) <= BOUND[dtype]


@pytest.mark.parametrize("classes", [2, 10])
@each_name
def test_softmax_posteriors_are_exact(name, classes, dtype):
    rng = np.random.default_rng(1)
    sizes = np.repeat([0, 0.1, 1, 5, 30, 3000], 3)
    x = (sizes[:, None] * rng.normal(size=(len(sizes), classes))).astype(dtype)
    x = np.concatenate([x] * len(VALUES[name]))
    values = np.repeat(VALUES[name], len(sizes)).astype(dtype)
    ids = np.arange(classes)
    margins = [reference.margin_of(reference.EXACT.of(x), np.full(len(x), c))[0] for c in ids]
    shares = np.stack([share(z, name, reference.EXACT.of(values)) for z in margins], -1)
    for alpha in (np.ones(classes, dtype), np.linspace(0.2, 3, classes).astype(dtype)):
        parts = shares / reference.EXACT.of(alpha)
        true = parts / parts.sum(-1, keepdims=True)
        options = {name: values, "alpha": alpha}
        assert worst(softmax_posterior(x, **options), true, dtype) <= BOUND[dtype]
        # the logarithm of what is nearly certain, by what is left
        left = np.stack([true[:, ids != c].sum(-1) for c in ids], -1)
        log = np.where(true > 0.5, reference.EXACT.log1p(-left), reference.EXACT.log(true))
        assert worst(softmax_posterior_logits(x, **options), log, dtype) <= BOUND[dtype]


@each_parameter
def test_derivatives_of_sigmoid_posteriors_are_exact(name, value):
    x = np.array([-30, -4.595, -1, -1e-3, 0, 0.5, 3, 20], np.float32)

    def log_odds(z, value):
        return mpmath.log(share(z, name, value) / share(-z, name, value))

    def slopes(function):
        both = jax.grad(lambda x, value: function(x, **{name: value}), (0, 1))
        return jax.vmap(both, (0, None))(x, jnp.float32(value))

    at = [(mpmath.mpf(float(z)), mpmath.mpf(float(np.float32(value)))) for z in x]
    p = [reference.sigma(log_odds(*both)) for both in at]
    for order, of_p, of_log_odds in zip([(1, 0), (0, 1)], *map(slopes, POSTERIORS), strict=True):
        true = np.array([mpmath.diff(log_odds, both, order) for both in at])
        # that by the parameter is 0 at 0 and the difference of larger terms near it
        least = 0 if order == (1, 0) else 0.1
        assert worst(of_log_odds, true, jnp.float32, least) <= 1e-6
        assert worst(of_p, true * [q * (1 - q) for q in p], jnp.float32, least) <= 1e-6


def plain_log_posterior(name, alpha, x, value):
    """The formula as it is written: good enough in float64, at logits that are not far apart."""
    log_q = jax.nn.log_softmax(x)
    q = jnp.exp(log_q)
    rest = (1 - jnp.eye(len(x), dtype=x.dtype)) @ q  # 1 - q
    if name == "gamma":
        w, slope = rest**value, -value * rest ** (value - 1)
    else:
        z = log_q - jnp.log(rest)
        w = jax.nn.sigmoid(-value * z)
        slope = -value * w * jax.nn.sigmoid(value * z) / (q * rest)
    return jax.nn.log_softmax(log_q - jnp.log(w + q * slope * log_q) - jnp.log(alpha))


@each_name
def test_derivatives_of_softmax_posteriors_are_exact(name, float64):
    x = np.array([[0, 0, 0], [1, 1, -2], [-1, 2, 0.5], [7, -3, 1], [0, -9, 0.25]])
    alpha = np.array([0.5, 2, 1])
    values = np.array(VALUES[name])

    def slopes(function, x, value):
        return jax.jacrev(function, (0, 1))(x, value)

    def bend(function, x, value):
        """How the slopes of one class change along one direction."""
        along = jnp.arange(3, dtype=x.dtype), jnp.ones_like(value)
        _, moved = jax.jvp(jax.grad(lambda *at: function(*at)[1], (0, 1)), (x, value), along)
        return moved

    def check(of, function, plain, bound):
        def everywhere(function, dtype):
            each = jax.vmap(jax.vmap(partial(of, function), (None, 0)), (0, None))
            return jax.tree.leaves(jax.jit(each)(x.astype(dtype), values.astype(dtype)))

        pairs = zip(everywhere(function, jnp.float32), everywhere(plain, jnp.float64), strict=True)
        for got, true in pairs:
            assert got.dtype == jnp.float32
            close(got, true, 0, bound * max(1, np.abs(true).max()))

    def posterior(x, value):
        return softmax_posterior(x, **{name: value}, alpha=alpha)

    def posterior_logits(x, value):
        return softmax_posterior_logits(x, **{name: value}, alpha=alpha)

    plain = partial(plain_log_posterior, name, alpha)
    check(slopes, posterior, lambda *at: jnp.exp(plain(*at)), 2e-6)
    check(slopes, posterior_logits, plain, 2e-6)
    check(bend, posterior_logits, plain, 5e-6)


@pytest.mark.parametrize("lead", [0, 2e-8, 1e-7, 5e-7])
@each_name
def test_derivatives_at_a_tie_of_two_classes(name, lead):
    """Where a margin is 0, on whose two sides the formula is spelled differently, and nearby."""
    slope = jax.grad(partial(sigmoid_posterior_logits, **{name: 2.0}))(0.0) / 2
    x = np.array([lead, 0], np.float32)
    got = jax.jacrev(partial(softmax_posterior_logits, **{name: 2.0}))(x)
    close(got, [[slope, -slope], [-slope, slope]], 1e-5)


# --- what follows from the formula ----------------------------------------------------------------

X = np.concatenate([np.linspace(-30, 30, 601), [-1e4, -300, 300, 1e4, -1e-30, 0]]).astype(
    np.float32
)


def test_after_plain_cross_entropy_nothing_changes():
    assert jnp.array_equal(sigmoid_posterior_logits(X, gamma=0), X)
    close(sigmoid_posterior(X, gamma=0.0), jax.nn.sigmoid(X), 3e-7, 1e-37)
    x = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32) * 10
    # within what JAX's own lose by rounding a difference of logits
    close(softmax_posterior(x, gamma=0), jax.nn.softmax(x), 5e-6, 1e-37)
    close(softmax_posterior_logits(x, gamma=0), jax.nn.log_softmax(x), 5e-6, 1e-6)


def test_k_one_is_gamma_one():
    close(sigmoid_posterior(X, k=1), sigmoid_posterior(X, gamma=1), 1e-6, 1e-37)
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    close(softmax_posterior(x, k=1), softmax_posterior(x, gamma=1), 1e-6)


@each_parameter
def test_two_classes_are_the_sigmoid_of_their_difference(name, value):
    pair = np.stack([X, np.zeros_like(X)], -1)
    weights = {"alpha": np.array([0.2, 0.8], np.float32)}
    p = sigmoid_posterior(X, **{name: value}, alpha=0.2)
    close(softmax_posterior(pair, **{name: value}, **weights)[:, 0], p, 2e-6, 1e-34)
    log_odds = sigmoid_posterior_logits(X, **{name: value}, alpha=0.2)
    log = softmax_posterior_logits(pair, **{name: value}, **weights)
    close(log[:, 0] - log[:, 1], log_odds, 1e-6, 1e-6)


@each_parameter
def test_the_posterior_increases_with_the_logit(name, value):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    for alpha in (None, 0.1):
        options = {name: value, "alpha": alpha}
        assert np.all(np.diff(sigmoid_posterior(x, **options)) >= 0)
        assert np.all(np.diff(sigmoid_posterior_logits(x, **options)) > 0)


@pytest.mark.parametrize(("k", "increases"), [(2.0, True), (3.318, True), (3.32, False)])
def test_up_to_which_k_the_order_of_classes_stays(k, increases, float64):
    q = np.linspace(0.01, 0.69, 20001)
    rest = np.full_like(q, 0.3)
    p = softmax_posterior(np.log(np.stack([q, rest, 0.7 - q + 1e-9], -1)), k=k)
    assert np.all(np.diff(p[:, 0] / p[:, 1]) > 0) == increases


@given(st.integers(0, 2**32 - 1), st.sampled_from(PARAMETERS), st.integers(-(2**12), 2**12))
def test_probabilities_sum_to_one_whatever_is_added(seed, parameter, shift):
    x = np.random.default_rng(seed).integers(-300, 300, (3, 5)).astype(np.float32) / 8
    name, value = parameter
    p = softmax_posterior(x, **{name: value})
    close(p.sum(-1), 1, 3e-7)
    close(softmax_posterior(x + np.float32(shift), **{name: value}), p, 1e-6, 1e-37)


@pytest.mark.parametrize("classes", [2, 5])
def test_weights_divide_the_odds(classes):
    x = np.random.default_rng(0).normal(size=(20, classes)).astype(np.float32)
    alpha = np.arange(1, classes + 1, dtype=np.float32)
    plain, weighed = (softmax_posterior(x, gamma=2.0, alpha=a) for a in (None, alpha))
    close(weighed[:, :1] / weighed * (plain / plain[:, :1]), alpha[None].repeat(20, 0), 1e-6)
    for factor in (7, 1e-37, 1e37):
        close(softmax_posterior(x, gamma=2.0, alpha=np.float32(factor) * alpha), weighed, 1e-6)
    assert jnp.array_equal(sigmoid_posterior(X, k=2.0, alpha=0.5), sigmoid_posterior(X, k=2.0))


# --- the contract ---------------------------------------------------------------------------------


@each_name
def test_at_the_ends(name):
    with jax.debug_nans(True):
        x = np.array([np.inf, -np.inf, 1e4, -1e4], np.float32)
        assert sigmoid_posterior(x, **{name: 2.0}).tolist() == [1, 0, 1, 0]
        log_odds = sigmoid_posterior_logits(x, **{name: 2.0})
        close(log_odds, [np.inf, -np.inf, 3e4 - np.log(3), np.log(3) - 3e4])
        x = np.array([[np.inf, 1, 2], [1, -np.inf, 1], [-np.inf, 3, -np.inf], [1e4, 0, -1e4]])
        x = x.astype(np.float32)
        p = softmax_posterior(x, **{name: 2.0})
        assert p.tolist() == [[1, 0, 0], [0.5, 0, 0.5], [0, 1, 0], [1, 0, 0]]
        assert not np.signbit(p).any()
        log = softmax_posterior_logits(x, **{name: 2.0})
        assert jnp.array_equal(jnp.exp(log).round(3), p)
        close(log[3], [0, np.log(3) - 3e4, np.log(3) - 4e4])


@each_name
@every
def test_gradients_at_the_ends_are_finite(function, name):
    x = np.array([[np.inf, 1, 2], [1, -np.inf, 1], [0, 0, 0], [1e4, 0, -1e4], [1e26, 0, -1e24]])
    slopes = jax.jit(jax.vmap(jax.jacrev(lambda x, value: function(x, **{name: value})), (0, None)))
    for value in (0.3, 0.5, 1.5, 2, 3, 10):
        assert np.isfinite(slopes(x.astype(np.float32), np.float32(value))).all()


@every
def test_nan_stays(function):
    x = np.array([[0, 1, 2], [np.nan, 1, 2]], np.float32)
    lost = [True] * 3 if function in POSTERIORS_OF_CLASSES else [True, False, False]
    assert np.isnan(function(x, gamma=2.0)).tolist() == [[False] * 3, lost]


def test_one_class_is_certain():
    x = np.array([[-3.0], [0], [50]], np.float32)
    for options in ({"gamma": 2.0}, {"k": 2.0}, {"gamma": 1.0, "alpha": np.ones(1)}):
        assert softmax_posterior(x, **options).tolist() == [[1]] * 3
        assert softmax_posterior_logits(x, **options).tolist() == [[0]] * 3


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_narrow_dtypes_are_computed_in_float32(function, dtype):
    x = jnp.asarray(4 * np.random.default_rng(0).normal(size=(40, 3)), dtype)
    for options in ({"gamma": 2.0}, {"k": 2.0}):
        got = function(x, **options)
        assert jnp.array_equal(got, function(x.astype(jnp.float32), **options).astype(dtype))
        assert got.dtype == dtype


@pytest.mark.parametrize("function", POSTERIORS_OF_CLASSES, ids=lambda f: f.__name__)
@each_name
def test_classes_along_any_axis_and_parameters_of_examples(function, name):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    values = np.linspace(0.5, 3, 8, dtype=np.float32).reshape(2, 4)
    alpha = np.array([1, 2, 3], np.float32)
    got = function(x, **{name: values}, alpha=alpha, axis=1)
    of_one = jax.jit(lambda x, v: function(x, **{name: v}, alpha=alpha))
    for i, j in np.ndindex(2, 4):
        close(got[i, :, j], of_one(x[i, :, j], values[i, j]), 1e-6)
    of_rows = jax.vmap(lambda x, v: function(x, **{name: v}, alpha=alpha, axis=0))
    close(of_rows(x, values), got, 1e-6)


@each_name
def test_parameters_and_alpha_of_logits(name):
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    values, alpha = np.float32([[0.5], [2]]), np.float32([0.1, 0.5, 0.9])
    for function in POSTERIORS:
        got = jax.jit(lambda x, v, a, f=function: f(x, **{name: v}, alpha=a))(x, values, alpha)
        for i, j in np.ndindex(2, 3):
            one = function(x[i, j], **{name: float(values[i, 0])}, alpha=float(alpha[j]))
            close(got[i, j], one, 1e-6)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_sharded_classes():
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    spread = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    for function in POSTERIORS_OF_CLASSES:
        run = jax.jit(partial(function, gamma=2.0))
        close(run(spread), run(x), 1e-6)


@every
def test_the_loss_must_be_told(function):
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"gamma or k must say .* got neither"):
        function(x)
    with pytest.raises(ValueError, match="different losses, got both"):
        function(x, gamma=2.0, k=1.0)
    for options in ({}, {"gamma": 2.0}):
        with pytest.raises(ValueError, match=r"^threshold: .* cannot be undone"):
            function(x, threshold=0.5, **options)
    with pytest.raises(ValueError, match=r"^k must be above 0"):
        function(x, k=0.0)
    with pytest.raises(AssertionError, match="logits must be floating point, got int32"):
        function(np.zeros((2, 3), np.int32), gamma=2.0)
    with pytest.raises(AssertionError, match="gamma must be a number or broadcast"):
        function(x, gamma=np.ones(7))


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


def test_prior_shifts_keep_dtypes_and_infinities():
    x = jnp.array([[jnp.inf, -jnp.inf, 0.5]], jnp.bfloat16)
    shifted = sigmoid_prior_shift(x, source_prior=0.5, target_prior=0.01)
    assert shifted.dtype == jnp.bfloat16
    close(shifted.astype(jnp.float32), [[np.inf, -np.inf, 0.5 + prior_bias(0.01)]], 0.01)
    shifted = softmax_prior_shift(x, source_prior=[1, 2, 3], target_prior=[1, 1, 0])
    assert shifted.dtype == jnp.bfloat16
    assert shifted.tolist() == [[np.inf, -np.inf, -np.inf]]
    by_class = sigmoid_prior_shift(
        np.zeros((2, 2), np.float32), source_prior=0.5, target_prior=np.float32([0.5, 0.1])
    )
    close(by_class, [[0, prior_bias(0.1)]] * 2)


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


def test_thresholds_of_arrays_and_tracers():
    costs = jnp.array([0.0, 1e38, 3e38])
    found = jax.jit(lambda c: decision_threshold(false_positive_cost=c, false_negative_cost=3e38))
    assert found(costs).tolist() == [0, 0.25, 0.5]
    by_cost = jax.grad(lambda c: decision_threshold(false_positive_cost=c, false_negative_cost=2.0))
    assert by_cost(0.0) == 0.5
    assert decision_threshold(false_positive_cost=3 * 10**9, false_negative_cost=10**9) == 0.75
    both = {"false_positive_cost": np.ones(2), "false_negative_cost": np.ones(3)}
    with pytest.raises(AssertionError, match="false_negative_cost must have the shape"):
        decision_threshold(**both)
    with pytest.raises(ValueError, match="must not both be 0"):
        decision_threshold(false_positive_cost=0, false_negative_cost=0.0)
    with pytest.raises(ValueError, match=r"^false_positive_cost must be at least 0"):
        decision_threshold(false_positive_cost=-1, false_negative_cost=1)
