"""Every value and derivative, against exact numbers, at every size of logit.

The bounds are for float32; those of float64 are in the ratio of the epsilons.
"""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from cases import FOCAL, HARD, LOSSES, MODULATIONS, SOFT, by_name
from reference import (
    DENSE,
    DENSE_WORKS,
    EXACT,
    margin_of,
    over_classes,
    softmax,
    su_soft_truncation,
)

import focaljax

NUMBERS = DENSE if DENSE_WORKS else EXACT
EPS = 1.2e-7
LOOSE, BEND = 1e-5, 1.5e-5
LAST_STRETCH = 1e4
COUNT = 1000 if DENSE_WORKS else 80

# Where something starts or stops being representable, in float16, float32 and float64.
EDGES = (0, 1e-6, 1e-3, 0.0276, 1, 2.94, 4.595, 9.7, 11.09, 16.6, 17, 17.33, 36.04, 37, 50, 87,
         87.33, 88, 88.72, 90, 100, 103.3, 104, 300, 708, 709.8, 710, 744.5, 746,
         1e3, 5e3, 1e4)  # fmt: skip


def grid(count, dtype):
    """Margins: the edges, a line through the usual ones, and every magnitude to 1e4."""
    line = np.linspace(0, 20, count), np.linspace(0, 110 if dtype == jnp.float32 else 760, count)
    half = np.concatenate([EDGES, *line, np.geomspace(1e-30, 1e4, count)]).astype(dtype)
    return np.concatenate([-half, half])


LENGTH = len(grid(COUNT, np.float32))


def check(what, at, got, true, dtype, allowed):
    """Holds the error to what is allowed in float32, wherever the truth is a normal number."""
    info = jnp.finfo(dtype)
    got, true = np.asarray(got), np.asarray(true)
    assert got.dtype == dtype
    # in the last stretch before underflow factors underflow
    normal = np.abs(true) >= LAST_STRETCH * float(info.tiny)
    # float64 has a longer way to underflow, and k z is rounded all along it
    scale = float(info.eps) / float(jnp.finfo(jnp.float32).eps) * (4 if info.bits == 64 else 1)
    allowed = np.where(normal, allowed, 1) * scale
    error = np.where(normal, np.abs(got.astype(true.dtype) - true), 0) / allowed
    error = error.astype(float)
    worst = np.unravel_index(np.argmax(error), error.shape)  # of a NaN, if there is one
    if not error[worst] <= 1:
        pytest.fail(
            f"{what} at {at[worst[0]]!r}: got {got[worst]!r}, true {float(true[worst])!r}, "
            f"{error[worst]:.3g} times the error allowed",
            pytrace=False,
        )


def check_ulp(got, true, narrow):
    assert got.dtype == narrow
    true = true.astype(float)
    normal = np.abs(true) >= (LAST_STRETCH if narrow == jnp.bfloat16 else 1.0001) * float(
        jnp.finfo(narrow).tiny
    )
    assert normal.sum() > 50
    ulp = np.ldexp(float(jnp.finfo(narrow).eps), np.frexp(true)[1] - 1)
    assert np.all(np.abs(np.asarray(got).astype(float) - true)[normal] <= ulp[normal])


@lru_cache
def derivatives(case, value):
    """Loss, slope, bend, and the slopes in the label and the parameter. No value: traced."""

    def loss(x, y, parameter):
        return case(x, y, **{case.parameter: parameter if value is None else value})

    def slope(x, *rest):
        return jax.grad(lambda x: loss(x, *rest).sum())(x)

    @jax.jit
    def everything(x, y, parameter):
        bend = jax.grad(lambda x: slope(x, y, parameter).sum())(x)
        others = jax.grad(lambda *a: loss(*a).sum(), (1, 2))(x, y, parameter)
        return loss(x, y, parameter), slope(x, y, parameter), bend, *others

    def of_one_length(*arrays):  # so that it is compiled once
        length = len(arrays[0])
        whole = everything(*(np.resize(array, max(length, LENGTH)) for array in arrays))
        return [out[:length] for out in whole]

    return of_one_length


def off_step(z, case, value):
    """A hard threshold has either value within rounding of its step."""
    return np.abs(np.abs(z) - np.log(value / (1 - value))) > 1e-5 if case is HARD else z == z


def bound_of(case, value, traced):
    if case is HARD:
        return 1.5e-6
    if traced or value % 0.5:
        return LOOSE
    return 1.5e-6 if value <= (3 if case is FOCAL else 5) else 3e-6


PLAN = [
    *((FOCAL, value, False) for value in (0, 0.3, 0.5, 1, 2, 5)),
    *((FOCAL, value, True) for value in (0.1, 2.0, 5.0)),
    *((SOFT, value, False) for value in (0.5, 2.0, 10.0)),
    *((SOFT, value, True) for value in (0.1, 3.7, 10.0)),
    *((HARD, value, True) for value in (0.25, 0.9)),
]


@pytest.mark.parametrize(("case", "value", "traced"), PLAN)
def test_hard_labels(case, value, traced):
    hold_hard_labels(case, value, traced, np.float32)


@pytest.mark.parametrize(("case", "value", "traced"), PLAN[1::4])
def test_hard_labels_in_float64(case, value, traced, float64):
    hold_hard_labels(case, value, traced, np.float64)


def hold_hard_labels(case, value, traced, dtype):
    z = grid(COUNT, dtype)
    z, bound = z[off_step(z, case, value)], bound_of(case, value, traced)
    parameter = np.full(z.shape, value, dtype)
    with np.errstate(all="ignore"):
        truth = case.truth(NUMBERS.of(z), 1, NUMBERS.of(parameter), NUMBERS)
    for label, sign in ((1, 1), (0, -1)):
        labels = np.full(z.shape, label, dtype)
        compute = derivatives(case, None if traced else value)
        loss, slope, bend, *_ = compute(sign * z, labels, parameter)
        for what, got, true in (("loss", loss, truth.loss), ("slope", sign * slope, truth.slope)):
            check(f"{what}, y={label}", z, got, true.value, dtype, bound * np.abs(true.value))
        check(f"bend, y={label}", z, bend, truth.bend.value, dtype, BEND * truth.bend.largest)


@pytest.mark.xfail(reason="a factor of the slope underflows before the slope does", strict=True)
@pytest.mark.parametrize(("gamma", "x"), [(0.5, 58.228825), (2, 29.350935), (5, 14.825482)])
def test_slopes_in_the_last_stretch(gamma, x):
    slope = jax.jit(jax.grad(lambda x: FOCAL(x, 1.0, gamma=gamma)))(x)
    true = FOCAL.truth(EXACT.of(np.float32(x)), 1, gamma).slope.value
    assert float(slope) == pytest.approx(float(true), rel=LOOSE, abs=0)


@pytest.mark.parametrize(("case", "value", "traced"), PLAN)
def test_soft_labels(case, value, traced):
    """And the derivatives in the label, in gamma and in k, relative to their largest terms."""
    z, dtype = grid(8, np.float32), np.float32
    z = z[off_step(z, case, value)]
    labels, parameter = (
        np.resize(np.array([0.001, 0.25, 0.9], dtype), z.shape),
        np.full(z.shape, value, dtype),
    )
    truth = case.truth(*(EXACT.of(a) for a in (z, labels, parameter)))
    found = derivatives(case, None if traced else value)(z, labels, parameter)
    for name, got, true in zip(truth._fields, found, truth, strict=True):
        if name == "parameter" and (not traced or case is HARD):
            assert not got.any()
            continue
        # what multiplies a weight too small to be normal is not in the promise
        kept = np.abs(true.largest) >= 1e4 * float(jnp.finfo(dtype).tiny) * np.maximum(1, abs(z))
        check(name, z[kept], got[kept], true.value[kept], dtype, LOOSE * true.largest[kept])


@pytest.mark.skipif(not DENSE_WORKS, reason="long double is no wider than double")
@pytest.mark.parametrize("case", LOSSES, ids=by_name)
@pytest.mark.parametrize("y", [0.0, 0.3, 1.0])
def test_the_dense_reference_is_exact_enough(case, y):
    z, value = grid(20, jnp.float64), 0.7
    z = z[np.abs(z) < 1000]
    with np.errstate(all="ignore"):
        dense = case.truth(DENSE.of(z), DENSE.of(y), DENSE.of(value), DENSE)
    exact = case.truth(EXACT.of(z), EXACT.of(y), EXACT.of(value))
    for got, true in zip(dense, exact, strict=True):
        high = got.value.astype(float)  # mpmath takes a long double in two pieces
        error = np.abs(EXACT.of(high) + EXACT.of(got.value - high) - true.value)
        assert np.all(error[high > 1e-290] <= 5e-17 * true.largest[high > 1e-290])


@pytest.mark.parametrize("case", LOSSES, ids=by_name)
def test_the_exact_reference_is_its_own_derivative(case):
    for x, y, parameter in ((-1.25, 1.0, 0.75), (0.375, 0.25, 0.75), (3.0, 0.875, 0.625)):
        at = x, y, mpmath.mpf(parameter)
        truth = case.truth(EXACT.of(x), *at[1:])
        for order, of in (((1, 0, 0), "slope"), ((2, 0, 0), "bend"), ((0, 1, 0), "label"),
                          ((0, 0, 1), "parameter")):  # fmt: skip
            numerical = mpmath.diff(lambda *a: case.truth(*a).loss.value, at, order)
            assert mpmath.almosteq(getattr(truth, of).value, numerical, 1e-12, 1e-12), of


@pytest.mark.skipif(not DENSE_WORKS, reason="long double is no wider than double")
@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("case", "value"), [(FOCAL, 2.0), (SOFT, 2.0), (HARD, 0.9)])
def test_narrow_dtypes_at_every_number(case, value, narrow):
    every = np.arange(2**16, dtype=np.uint16).view(narrow)
    every = every[np.abs(every.astype(np.float32)) <= 1e4]
    for sign, label in ((1, 1), (-1, 0)):
        with np.errstate(all="ignore"):
            truth = case.truth(DENSE.of(sign * every), 1, DENSE.of(np.float32(value)), DENSE)
        labels = np.full(every.shape, label, narrow)
        loss, slope, *_ = derivatives(case, value)(every, labels, labels)
        check_ulp(loss, truth.loss.value, narrow)
        check_ulp(sign * slope, truth.slope.value, narrow)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            MODULATIONS[0],
            marks=pytest.mark.xfail(reason="1 - p underflows before its root", strict=True),
        ),
        *MODULATIONS[1:],
    ],
)
def test_modulations(case, dtype):
    def weight(z, parameter):
        return case(z, **{case.parameter: parameter})

    @jax.jit
    def weight_and_slopes(z, parameter):
        return weight(z, parameter), *jax.grad(lambda *a: weight(*a).sum(), (0, 1))(z, parameter)

    z = grid(40, dtype)
    for value in case.valid:
        truth = case.truth(EXACT.of(z), EXACT.of(dtype(value)))
        parameter = jnp.full(z.shape, value, dtype)
        kept = np.abs(z - np.log(value / (1 - value))) > 1e-5 if 0 < value < 1 else z == z
        found = weight(z, value), *weight_and_slopes(z, parameter)
        for got, true in zip(found, (truth.value, *truth[:2], truth.parameter), strict=True):
            near_underflow = np.abs(true) < 1e5 * float(jnp.finfo(dtype).tiny)
            true = np.where(near_underflow, 0, true)[kept]
            check(f"{case.name}({value})", z[kept], got[kept], true, dtype, LOOSE * np.abs(true))


# --- softmax --------------------------------------------------------------------------------------

SOFTMAX = {
    FOCAL: focaljax.softmax_focal_loss,
    SOFT: focaljax.softmax_soft_truncation_loss,
    HARD: focaljax.softmax_hard_threshold_loss,
}


def examples(classes, count, dtype):
    """Logits and a true class, ahead or behind by any margin; all tie, or two, in the first."""
    rng, rows = np.random.default_rng(classes), np.arange(count)
    x = rng.normal(size=(count, classes))
    x *= np.where(rows < 2, 0, rng.choice([0, 1e-3, 0.1, 1, 3, 10, 100], count))[:, None]
    ids = rng.integers(classes, size=count)
    x[rows, ids] = -np.inf
    edges = rng.choice([*EDGES, *np.negative(EDGES)], count)
    ahead = np.where(rows % 2, edges, rng.normal(0, 6, count))
    x[rows, ids] = np.max(x, -1) + np.where(rows < 4, 0, ahead)
    return x.astype(dtype), ids.astype(np.int32)


def distributions(x, ids):
    """One-hot, smoothed and any, in turn."""
    rng, one_hot = np.random.default_rng(0), np.eye(x.shape[1])[ids]
    kinds = one_hot, 0.9 * one_hot + 0.1 / x.shape[1], rng.dirichlet(np.ones(x.shape[1]), len(x))
    return np.choose(np.arange(len(x))[:, None] % 3, kinds).astype(x.dtype)


@partial(jax.jit, static_argnums=0)
def loss_and_slopes(loss_of, x):
    loss, pull = jax.vjp(loss_of, x)
    return loss, *pull(jnp.ones_like(loss))


GAMMAS, KS = (0.1, 0.5, 2.5, 5.0, 8.3), (0.1, 0.5, 1.4428, 2.0, 10.0)
SOFTMAX_PLAN = [
    *((3, FOCAL, (gamma,), soft) for gamma in (0, 2, 5) for soft in (False, True)),
    (3, FOCAL, GAMMAS, False), (3, FOCAL, GAMMAS, True),
    (3, SOFT, KS, False), (3, SOFT, KS, True),
    (2, FOCAL, (4,), False), (3, HARD, (0.9,), False), (30, FOCAL, (2,), True),
    (300, FOCAL, (2,), False),
]  # fmt: skip


@pytest.mark.parametrize(("classes", "case", "values", "soft"), SOFTMAX_PLAN)
def test_softmax(classes, case, values, soft):
    hold_softmax(classes, case, values, soft, np.float32)


@pytest.mark.parametrize(("classes", "case", "values", "soft"), SOFTMAX_PLAN[2:8:2])
def test_softmax_in_float64(classes, case, values, soft, float64):
    hold_softmax(classes, case, values, soft, np.float64)


def hold_softmax(classes, case, values, soft, dtype):
    """One value is known when tracing; several are traced, one for each row in turn."""
    x, labels = examples(classes, {2: 300, 3: 300, 30: 30, 300: 9}[classes], dtype)
    if case is HARD:
        kept = off_step(margin_of(EXACT.of(x), labels)[0].astype(float), case, values[0])
        x, labels = x[kept], labels[kept]
    labels = distributions(x, labels) if soft else labels
    parameter = np.resize(np.array(values, dtype), len(x))
    options = {case.parameter: values[0] if len(values) == 1 else parameter}
    got = loss_and_slopes(lambda x: SOFTMAX[case](x, labels, **options), x)
    n = NUMBERS
    with np.errstate(all="ignore"):
        truth = over_classes(softmax(case.truth)) if soft else softmax(case.truth)
        true = truth(n.of(x), n.of(labels) if soft else labels, n.of(parameter), n, bends=True)
    loss, slope, bend = (part.value for part in true)
    d = n.of(np.max(x, -1, keepdims=True)) - n.of(x)
    relative = max(3e-6, bound_of(case, values[0], len(values) > 1))
    rounding = 4 * EPS * np.sum(d * np.abs(slope), -1)
    check("loss", x, got[0], loss, dtype, relative * np.abs(loss) + rounding)
    rounding = 4 * EPS * np.sum(d[:, None] * np.abs(bend), -1)
    row = 2e-6 * np.max(np.abs(slope), -1, keepdims=True)
    allowed = np.maximum(relative * np.abs(slope) + rounding, row)
    check("slope", x, got[1], slope, dtype, allowed)


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0])
def test_the_literal_form(k):
    x, labels = examples(3, 200, np.float32)
    x, labels = (a[np.ptp(x, -1) < 20] for a in (x, labels))
    loss, slope = loss_and_slopes(
        lambda x: focaljax.su_softmax_soft_truncation_loss(x, labels, k=k), x
    )
    true = su_soft_truncation(EXACT.of(x), labels, EXACT.of(k))
    allowed = 3e-6 + 4 * EPS * (1 + k) * np.ptp(x, -1)
    check("loss", x, loss, true[0].value, np.float32, allowed * true[0].largest)
    row = np.max(true[1].largest, -1)
    check("slope", x, slope, true[1].value, np.float32, (allowed * row)[:, None])


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize(("case", "value"), [(FOCAL, 0.5), (FOCAL, 2), (SOFT, 2)])
def test_second_derivatives(case, value, soft):
    x, labels = examples(3, 100, np.float32)
    x, labels = (a[np.ptp(x, -1) < 20] for a in (x, labels))
    labels = distributions(x, labels) if soft else labels
    options = {case.parameter: np.float32(value)}
    got = jax.jit(jax.vmap(jax.hessian(lambda x, y: SOFTMAX[case](x, y, **options))))(x, labels)
    truth = over_classes(softmax(case.truth)) if soft else softmax(case.truth)
    labels, value = EXACT.of(labels) if soft else labels, EXACT.of(np.full(len(x), value))
    *_, true = truth(EXACT.of(x), labels, value, bends=True)
    check(case.name, x, got, true.value, np.float32, BEND * true.largest)


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
def test_narrow_dtypes_of_softmax(narrow, soft):
    x, labels = examples(21, 200, narrow)
    labels = distributions(x, labels) if soft else labels
    got = loss_and_slopes(lambda x: focaljax.softmax_focal_loss(x, labels), x)
    truth, n = over_classes(softmax(FOCAL.truth)) if soft else softmax(FOCAL.truth), NUMBERS
    exact = truth(n.of(x), n.of(labels) if soft else labels, n.of(np.full(len(x), 2)), n)
    for found, true in zip(got, exact, strict=True):
        check_ulp(found, true.value, narrow)


@pytest.mark.parametrize("soft", [False, True], ids=["ids", "distributions"])
@pytest.mark.parametrize("case", [FOCAL, SOFT], ids=by_name)
def test_nothing_is_infinite_where_the_logits_are_not(case, soft):
    x, labels = examples(3, 100, np.float32)
    x = np.concatenate([x, [[1e38, -1e38, 0], [-3e38, -3e38, 1e-38]]]).astype(np.float32)
    labels = np.append(labels, np.int32([0, 2]))
    labels = distributions(x, labels) if soft else labels

    @jax.jit
    def of_value(value):
        return loss_and_slopes(lambda x: SOFTMAX[case](x, labels, **{case.parameter: value}), x)

    for value in case.valid:
        for out in of_value(np.float32(value)):
            assert np.isfinite(out).all()
