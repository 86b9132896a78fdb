"""Under every transformation, and in every argument, what plain calls and exact numbers give."""

import gc
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import (
    FOCAL,
    HARD,
    LOSSES,
    MODULATIONS,
    OF_DISTRIBUTIONS,
    SOFT,
    SOFTMAX_FOCAL,
    SU,
    by_name,
)
from reference import EXACT

from focaljax import reduce_mean

X = np.array([-60, -4.595, -1.25, 0.0, 0.25, 3.0, 17.5, 90.0], np.float32)
HARD_LABELS = np.array([0, 1, 1, 0, 1, 0, 1, 0], np.float32)
SOFT_LABELS = np.array([0.1, 0.9, 0.5, 0.25, 0.75, 0.01, 0.99, 0.6], np.float32)
BOTH, BOTH_LABELS = np.tile(X, 2), np.append(HARD_LABELS, SOFT_LABELS)

# three classes: a tie of all, of two at the top and below it, and one class far ahead or behind
CLASSES = np.array(
    [[0, 0, 0], [-4.595, 0.5, 2], [2.5, -1, 2.5], [17.5, 1, 1], [-60, 0, 0.5], [40, 0.25, -3],
     [0, 1, -20], [0.25, -1.25, 0.75]],
    np.float32,
)  # fmt: skip
IDS = np.array([1, 2, 0, 0, 2, 1, 0, 1], np.int32)
DISTRIBUTIONS = np.array(
    [[0.25, 0.5, 0.25], [0, 0, 1], [0.1, 0.2, 0.7], [0.9, 0.05, 0.05], [0.5, 0.5, 0],
     [0.75, 0.125, 0.125], [0.6, 0.1, 0.3], [0, 1, 0]],
    np.float32,
)  # fmt: skip

SAMPLES = [
    (FOCAL, BOTH, BOTH_LABELS),  # what the others do with a margin, it does too
    (SOFTMAX_FOCAL, CLASSES, IDS),
    (OF_DISTRIBUTIONS[0], CLASSES, DISTRIBUTIONS),
]
each_loss = pytest.mark.parametrize("case", LOSSES, ids=by_name)
each_sample = pytest.mark.parametrize(
    ("case", "x", "y"), SAMPLES, ids=[by_name(case) for case, *_ in SAMPLES]
)


def close(got, true, relative=2e-6, absolute=1e-37):
    np.testing.assert_allclose(np.asarray(got), np.asarray(true), relative, absolute)


def scalar(case, **fixed):
    """A loss of logits, labels and values of its parameter: of one each, it is a scalar."""
    return lambda x, y, value: case(x, y, **{case.parameter: value}, **fixed)


def value_of(case):
    return jnp.float32(0.6 if case.parameter == "threshold" else 1.7)


def differentiable(*arguments):
    """The positions of those that have a gradient."""
    return [i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating)]


def zero_tangent(argument):
    integer = not jnp.issubdtype(argument.dtype, jnp.floating)
    return np.zeros(argument.shape, jax.dtypes.float0 if integer else argument.dtype)


# --- first derivatives ----------------------------------------------------------------------------


@each_sample
def test_forward_and_reverse_mode_agree(case, x, y):
    alpha = 0.25 if x is BOTH else np.array([0.25, 1, 3], np.float32)
    loss, arguments = scalar(case, alpha=alpha), (x, y, value_of(case))
    out, pull = jax.jit(partial(jax.vjp, loss))(*arguments)
    rows = jax.jit(jax.vmap(pull))(jnp.eye(len(x)))
    for i in differentiable(*arguments):
        tangents = [zero_tangent(a) for a in arguments]
        # not all the same, as the slopes of a softmax add up to 0
        towards = np.cos(np.arange(np.size(arguments[i]))).astype(np.float32)
        tangents[i] = towards.reshape(np.shape(arguments[i]))
        primal, tangent = jax.jit(lambda *a, t=tangents: jax.jvp(loss, a, tuple(t)))(*arguments)
        close(primal, out)
        close(tangent, np.tensordot(rows[i], tangents[i], tangents[i].ndim), 2e-6, 1e-6)


@each_sample
def test_scan_and_checkpoint(case, x, y):
    def step(total, one):
        return total + scalar(case)(*one, value_of(case)) / len(x), None

    def scanned(x):
        return jax.lax.scan(jax.checkpoint(step), jnp.float32(0), (x, y))[0]

    def mean(x):
        return reduce_mean(scalar(case)(x, y, value_of(case)))

    for got, true in zip(*(jax.value_and_grad(f)(x) for f in (scanned, mean)), strict=True):
        close(got, true)


@each_sample
def test_vmap_over_everything(case, x, y):
    """Loss and gradients of batches, and of one batch under many values of the options."""
    x, y = (np.broadcast_to(a, (3, *a.shape)) for a in (x, y))
    where = np.arange(3 * y.shape[1]).reshape(3, -1) % 3 > 0
    value, alpha = (np.array([a, 0.5, 0.9], np.float32) for a in (0.25, 0.1))
    if x.ndim == 3:
        alpha = np.outer(alpha, np.array([1, 2, 0.5], np.float32))
    arguments = x, y, value, alpha, where

    def total(x, y, value, alpha, where):
        loss = case(x, y, **{case.parameter: value}, alpha=alpha, where=where)
        return loss.sum(), loss

    step = jax.grad(total, differentiable(*arguments), has_aux=True)
    alone = jax.jit(step)
    for axes in ((0, 0, 0, 0, 0), (None, None, 0, 0, None)):
        given = [a if axis == 0 else a[0] for a, axis in zip(arguments, axes, strict=True)]
        got = jax.jit(jax.vmap(step, axes))(*given)
        for i in range(3):
            one = [a[i] if axis == 0 else a for a, axis in zip(given, axes, strict=True)]
            jax.tree.map(lambda g, t, i=i: close(g[i], t, 1e-5, 1e-6), got, alone(*one))
        assert not jnp.array_equal(got[1][0], got[1][2])


def test_labels_of_every_dtype_under_grad():
    for case, x, y in ((FOCAL, X, HARD_LABELS), (OF_DISTRIBUTIONS[0], CLASSES, np.eye(3)[IDS])):
        slope = jax.jit(jax.grad(lambda x, y, c=case: c(x, y).sum()))
        true = slope(x, y.astype(np.float32))
        for dtype in (jnp.bool_, jnp.uint8):
            close(slope(x, jnp.asarray(y, dtype)), true, 2e-6, 1e-9)
    close(jax.grad(lambda x: SOFTMAX_FOCAL(x, IDS).sum())(CLASSES), true, 2e-6, 1e-9)
    # a tangent of an integer is float0
    jax.hessian(lambda x: FOCAL(x, HARD_LABELS.astype(int)).sum())(X)


# --- higher derivatives ---------------------------------------------------------------------------

BOTH_WAYS = {
    "forward over reverse": lambda f: jax.jacfwd(jax.jacrev(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.jacrev(f)),
}


@pytest.mark.parametrize(
    ("case", "way"),
    [*((FOCAL, way) for way in BOTH_WAYS), *((c, "reverse over reverse") for c in (SOFT, HARD))],
)
def test_second_derivatives_every_way(case, way):
    x, y, value = BOTH, BOTH_LABELS, value_of(case)
    second = jax.jit(BOTH_WAYS[way](lambda x: scalar(case)(x, y, value).sum()))(x)
    truth = case.truth(EXACT.of(x), EXACT.of(y), EXACT.of(value)).bend
    assert jnp.array_equal(second != 0, jnp.diag(jnp.diag(second) != 0))
    error = np.abs(EXACT.of(jnp.diag(second)) - truth.value)
    assert np.all((error <= 5e-6 * truth.largest) | (truth.largest < 1e-33))


def naive(case, x, y, value):
    """A softmax loss as its formula reads: in float64 and at moderate logits, right."""
    p = jax.nn.softmax(x)
    weight = {
        "softmax_focal_loss": lambda: (1 - p) ** value,
        "su_softmax_soft_truncation_loss": lambda: jax.nn.softmax(-value * x),
    }[case.name]()
    return -(y * weight * jnp.log(p)).sum(-1)


MODERATE = [0, 1, 2, 6, 7]  # of CLASSES


@pytest.mark.parametrize(
    ("case", "y", "way"),
    [
        (SOFTMAX_FOCAL, IDS, "reverse over reverse"),
        (SU, IDS, "forward over reverse"),
        (OF_DISTRIBUTIONS[3], DISTRIBUTIONS, "forward over reverse"),
    ],
    ids=lambda v: v if isinstance(v, str) else by_name(v) if hasattr(v, "note") else "",
)
def test_derivatives_in_all_logits(case, y, way, float64):
    """In every logit, and in every pair of them."""
    x, y = CLASSES[MODERATE].astype(float), y[MODERATE]
    shares = np.eye(3)[y] if y.ndim == 1 else y.astype(float)
    value = float(value_of(case))

    def derivatives(loss, y):
        def each(x, y):
            f = partial(loss, y=y, value=value)
            return f(x), jax.grad(f)(x), BOTH_WAYS[way](f)(x)

        return jax.jit(jax.vmap(each))(x, y)

    found = derivatives(scalar(case), y)
    true = derivatives(partial(naive, case), shares)
    jax.tree.map(lambda got, true: close(got, true, 1e-9, 1e-9), found, true)


def exact_derivative(case, x, y, value, order):
    """A partial derivative of any order in logit, label and parameter, to 20 digits and more."""
    of = tuple(mpmath.mpf(float(a)) for a in (x, y, value))
    with mpmath.workdps(80):
        return float(mpmath.diff(lambda *a: case.truth(*a).loss.value, of, order))


def derivative(case, order):
    f = scalar(case)
    for argument, times in enumerate(order):
        for _ in range(times):
            f = jax.grad(f, argument)
    return jax.jit(jax.vmap(f))


@pytest.mark.parametrize("case", [FOCAL, SOFT], ids=by_name)
def test_mixed_and_third_derivatives(case):
    points = np.array([*product((0, -1.25, 3), (0, 0.3, 1), (0.5, 2, 3.5))], np.float32)
    for order in ((3, 0, 0), (2, 0, 1), (1, 1, 0), (1, 0, 1), (2, 1, 0)):
        got = derivative(case, order)(*points.T)
        true = [exact_derivative(case, *point, order) for point in points]
        np.testing.assert_allclose(got, true, 2e-4, 2e-5, err_msg=str(order))


OVERFLOWS = pytest.mark.xfail(
    strict=True, reason="with gamma traced, p / (1 - p) overflows far out on the way to a label"
)


@pytest.mark.parametrize(
    ("case", "order"),
    [
        pytest.param(FOCAL, (1, 1, 0), marks=OVERFLOWS),
        (FOCAL, (1, 0, 1)),
        (SOFT, (1, 1, 0)),
        (SOFT, (1, 0, 1)),
    ],
)
def test_mixed_derivatives_do_not_depend_on_the_order(case, order):
    argument = 1 if order[1] else 2
    f = scalar(case)
    one, other = (
        jax.jit(jax.vmap(g, (0, 0, None)))
        for g in (jax.grad(jax.grad(f, argument)), jax.grad(jax.grad(f), argument))
    )
    for y in (HARD_LABELS, SOFT_LABELS):
        close(one(X, y, jnp.float32(1.7)), other(X, y, jnp.float32(1.7)), 1e-5, 1e-6)


# --- weights of one's own -------------------------------------------------------------------------


def test_a_weight_composes_to_the_loss():
    for case, weight in ((FOCAL, MODULATIONS[0]), (SOFT, MODULATIONS[1])):
        options = {case.parameter: 0.5}

        def composed(z, weight=weight, options=options):
            return (weight(z, **options) * jax.nn.softplus(-z)).sum()

        def loss(z, case=case, options=options):
            return case(z, jnp.ones_like(z), **options).sum()

        steps = (jax.jit(jax.value_and_grad(f)) for f in (composed, loss))
        for got, true in zip(*(step(X[X < 80]) for step in steps), strict=True):
            close(got, true, 5e-6)


@pytest.mark.parametrize("case", MODULATIONS, ids=by_name)
def test_second_derivatives_of_modulations(case):
    value = value_of(HARD) if case.parameter == "threshold" else jnp.float32(2.7)
    second = jax.hessian(lambda z: case(z, **{case.parameter: value}))
    truth = case.truth(EXACT.of(X), EXACT.of(value))
    largest = np.maximum.reduce([np.abs(term) for term in truth.bend])
    error = np.abs(EXACT.of(jax.jit(jax.vmap(second))(X)) - sum(truth.bend))
    assert np.all((error <= 5e-6 * largest) | (largest < 1e-36))


# --- tracing --------------------------------------------------------------------------------------


@each_sample
def test_a_new_value_does_not_retrace(case, x, y):
    traces = 0

    @jax.jit
    def step(x, y, value, alpha):
        nonlocal traces
        traces += 1
        return jax.value_and_grad(
            lambda x: case(x, y, **{case.parameter: value}, alpha=alpha).sum()
        )(x)

    of_alpha = (lambda a: a) if x is BOTH else (lambda a: np.float32([a, 1, 1]))
    values = [(jnp.float32(v), of_alpha(jnp.float32(a))) for v in (0.2, 0.9) for a in (0.25, 0.5)]
    found = [step(x, y, *pair)[0] for pair in values]
    assert traces == 1
    assert len({float(f) for f in found}) == 4
    # a Python number is weakly typed: one trace more, not one each
    step(x, y, 0.3, of_alpha(0.1))
    step(x, y, 0.4, of_alpha(0.2))
    assert traces <= 2


@each_sample
def test_no_tracer_leaks(case, x, y):
    def loss(x, value):
        return scalar(case)(x, y, value).sum()

    gc.freeze()  # else every trace searches all that other tests have left
    with jax.checking_leaks():
        jax.jit(jax.grad(loss, (0, 1)))(x, value_of(case))


@pytest.mark.parametrize("case", LOSSES, ids=by_name)
@pytest.mark.parametrize("traced", [False, True])
def test_debug_nans_finds_nothing_on_finite_input(case, traced):
    half = np.array([0, 1e-38, 1e-6, 1, 17, 50, 87, 88.5, 104, 300, 1e4, 1e30], np.float32)
    x = np.tile([half, -half], (3, 1))
    y = np.broadcast_to(np.repeat([0, 0.1, 1], 2)[:, None], x.shape).astype(np.float32)

    def total(x, y, value):
        return scalar(case)(x, y, value).sum()

    with jax.debug_nans(True), jax.debug_infs(True):
        for value in (0.25, 0.99) if case is HARD else (0.5, 2.0, 5.0):
            if traced:
                jax.jit(jax.value_and_grad(total, (0, 1, 2)))(x, y, jnp.full(x.shape, value))
            else:
                jax.jit(jax.value_and_grad(partial(total, value=value), (0, 1)))(x, y)


@pytest.mark.parametrize("case", [SOFTMAX_FOCAL, SU], ids=by_name)
def test_debug_nans_finds_nothing_among_three_classes(case):
    sizes = np.array([0, -1e-38, 1, -17, 88.5, -104, 1e4, -1e30], np.float32)
    x = np.stack([a.ravel() for a in np.meshgrid(sizes, sizes, sizes[:4])], -1)
    alpha, where = np.float32([0, 1, 2]), np.arange(3) != np.arange(len(x))[:, None] % 7
    for y in (np.arange(len(x)) % 3, np.tile(DISTRIBUTIONS, (len(x) // 8, 1))):
        kept = where if y.ndim == 2 else where | (np.arange(3) == y[:, None])

        def total(x, y=y, kept=kept):
            weighed = scalar(case, alpha=alpha, where=kept)(x, y, value_of(case))
            return (weighed + scalar(case)(x, y, value_of(case))).sum()

        with jax.debug_nans(True):
            jax.jit(jax.value_and_grad(total))(x)
