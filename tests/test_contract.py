"""What every function takes, gives and refuses."""

import inspect
import itertools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from cases import (
    CASES,
    CLASS_IDS,
    CLASS_LOGITS,
    DISTRIBUTIONS,
    FOCAL,
    INFINITE,
    LABELS,
    LOGITS,
    LOSS,
    LOSSES,
    MODULATIONS,
    NOT_A_NUMBER,
    OF_DISTRIBUTIONS,
    OWN,
    RANGES,
    REDUCTIONS,
    REQUIRED,
    SOFT,
    SOFTMAX,
    SOFTMAX_FOCAL,
    SOFTMAX_LOSSES,
    SOFTMAX_MARGIN,
    SU,
    by_name,
    of_distributions,
)
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import focaljax

# every way from class logits to a margin; what is done with it, the sigmoid losses do too
FORMS = (SOFTMAX_FOCAL, SU, OF_DISTRIBUTIONS[1], OF_DISTRIBUTIONS[3])
EVERY_LOSS = (*LOSSES, *SOFTMAX_LOSSES, *FORMS[2:])
each_loss = pytest.mark.parametrize("case", EVERY_LOSS, ids=by_name)
each_sigmoid_loss = pytest.mark.parametrize("case", LOSSES, ids=by_name)
each_softmax_loss = pytest.mark.parametrize("case", EVERY_LOSS[3:], ids=by_name)
each_form = pytest.mark.parametrize("case", FORMS, ids=by_name)
each_modulation = pytest.mark.parametrize("case", MODULATIONS, ids=by_name)
WITH_DTYPE = [case for case in CASES if {"logits", "margin"} & set(case.data)]
ELEMENTWISE = [case for case in WITH_DTYPE if "axis" not in case.options]
WITH_LABELS = [case for case in ELEMENTWISE if "labels" in case.data]
WITH_MASK = [case for case in CASES if "where" in case.options and case not in SOFTMAX]


def loss_and_slope(case, logits, labels, **options):
    @jax.jit
    def both(logits):
        loss, pull = jax.vjp(lambda x: case(x, labels, **options), logits)
        return loss, *pull(jnp.ones_like(loss))

    return both(logits)


def alpha_of(case, value):
    """One weight for positives, or the same one for every class."""
    return jnp.full(np.shape(case.data["logits"])[2:], value, jnp.float32)


def of_ids(case):
    return case.data.get("labels") is CLASS_IDS


# --- the signature --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_data_is_positional_and_options_are_keywords(case):
    given = inspect.signature(case.function).parameters
    options = {name: p for name, p in given.items() if p.kind is p.KEYWORD_ONLY}
    data = {name: p for name, p in given.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert [*data, *options] == [*given] == [*case.data, *case.options]
    assert {
        name: REQUIRED if p.default is p.empty else p.default for name, p in options.items()
    } == dict(case.options)
    with pytest.raises(TypeError):
        case.function(*case.data.values(), 0.5)


def test_every_public_function_has_a_case():
    public = {name for name in vars(focaljax) if not name.startswith("_")}
    assert {case.name for case in (*CASES, *OWN)} == public


# every example has some of its classes, the true one among them
MOST_CLASSES = (CLASS_LOGITS > 0.2) | (np.arange(4) == CLASS_IDS[..., None])

# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3, 0, 2), (2, 1, 3, 2)])
@pytest.mark.parametrize("case", [*WITH_DTYPE, *FORMS[2:]], ids=by_name)
def test_the_shape_is_kept(case, shape):
    data = [jnp.ones(shape + value.shape[2:], value.dtype) for value in case.data.values()]

    def loss_and_slope(logits, *labels):
        loss, pull = jax.vjp(lambda x: case(x, *labels), logits)
        return loss, *pull(loss)

    # with no element there is nothing to compute, but a maximum of nothing is refused
    run = jax.jit(loss_and_slope) if 0 in shape and case in (*ELEMENTWISE, *FORMS) else None
    out, slope = run(*data) if run else jax.eval_shape(loss_and_slope, *data)
    assert out.shape == (shape if len(data) > 1 else data[0].shape)  # labels have no class axis
    assert slope.shape == data[0].shape


@pytest.mark.parametrize("case", WITH_DTYPE, ids=by_name)
def test_an_array_is_returned(case):
    assert isinstance(case(*case.data.values()), jax.Array)


@each_sigmoid_loss
def test_python_numbers_and_numpy_arrays_are_taken(case):
    as_array = case(jnp.array([0.5, -1.0]), jnp.array([1, 0]))
    assert jnp.array_equal(case(np.array([0.5, -1.0], np.float32), np.array([1, 0])), as_array)
    assert case(0.5, 1) == as_array[0]
    assert case(0.5, True) == as_array[0]


@pytest.mark.parametrize("case", [SOFTMAX_FOCAL, OF_DISTRIBUTIONS[0]], ids=by_name)
def test_numpy_arrays_and_a_single_example_are_taken(case):
    logits, labels = case.data.values()
    loss = case(logits, labels)
    assert jnp.array_equal(case(jnp.asarray(logits), jnp.asarray(labels)), loss)
    one = labels[1, 1].tolist() if of_ids(case) else labels[1, 1]
    np.testing.assert_allclose(case(logits[1, 1], one), loss[1, 1], 1e-6)


@pytest.mark.parametrize(
    ("case", "name"),
    [*((case, case.parameter) for case in EVERY_LOSS), *((case, "alpha") for case in LOSSES)],
    ids=lambda v: by_name(v) if hasattr(v, "note") else v,
)
def test_options_broadcast_against_the_loss(case, name):
    logits, labels = case.data.values()
    values = np.array(RANGES[name][0][:3], np.float32)
    per_class = case(logits, labels, **{name: values})
    per_row = case(logits, labels, **{name: values[:2, None]})
    everywhere = case(logits, labels, **{name: np.broadcast_to(values, LOSS.shape)})
    assert jnp.array_equal(per_class, everywhere)
    each = jax.vmap(jax.vmap(lambda *one: case(*one[:2], **{name: one[2]})))
    for got, given in ((per_class, values), (per_row, values[:2, None])):
        true = each(logits, labels, np.broadcast_to(given, LOSS.shape))
        np.testing.assert_allclose(got, true, 2e-6)


@each_sigmoid_loss
def test_alpha_weighs_positives_and_the_rest_negatives(case):
    plain = case(LOGITS, LABELS)
    np.testing.assert_allclose(
        case(LOGITS, LABELS, alpha=0.2), plain * np.where(LABELS == 1, 0.2, 0.8), 1e-6
    )
    soft = np.full(LOGITS.shape, 0.75, np.float32)
    balance = np.float32(0.2 * 0.75 + 0.8 * 0.25)
    np.testing.assert_allclose(case(LOGITS, soft, alpha=0.2), balance * case(LOGITS, soft), 1e-6)


@each_softmax_loss
def test_alpha_weighs_every_class(case):
    logits, labels = case.data.values()
    weights = np.array([0, 0.5, 1, 7.5], np.float32)
    every = (
        [case(logits, np.full(LOSS.shape, c)) for c in range(4)]
        if of_ids(case)
        else [
            case(logits, np.broadcast_to(row, logits.shape)) for row in np.eye(4, dtype=np.float32)
        ]
    )
    shares = np.eye(4)[labels] if of_ids(case) else labels
    true = (weights * shares * np.stack(every, -1)).sum(-1)
    loss = case(logits, labels, alpha=weights)
    np.testing.assert_allclose(loss, true, 2e-6)
    by_alpha = jax.grad(lambda a: case(logits, labels, alpha=a).sum())(weights)
    np.testing.assert_allclose(by_alpha, (shares * np.stack(every, -1)).sum((0, 1)), 2e-6)
    assert jnp.array_equal(case(logits, labels, alpha=jnp.asarray(weights)), loss)
    whole = case(logits, labels, alpha=weights.astype(np.int32))
    assert jnp.array_equal(whole, case(logits, labels, alpha=np.trunc(weights)))


@pytest.mark.parametrize(("axis", "where"), [(0, LABELS > 0), (-2, MOST_CLASSES)], ids=["0", "-2"])
@pytest.mark.parametrize(
    "case",
    [*FORMS[::3], SOFTMAX_MARGIN, of_distributions(SOFTMAX_MARGIN)],
    ids=by_name,
)
def test_classes_along_any_axis(case, axis, where):
    """With every option that has the classes' axis or the loss's."""

    def moved(array, axis):
        return np.moveaxis(array, -1, axis) if np.ndim(array) == 3 else array

    def derivatives(axis):
        logits, labels = (moved(a, axis) for a in case.data.values())
        options = {"axis": axis}
        if case.parameter:
            options[case.parameter] = np.array(case.valid[:3], np.float32)
            options |= {"alpha": np.array([0.5, 1, 2, 4], np.float32), "where": moved(where, axis)}
        loss, slope = loss_and_slope(case, logits, labels, **options)
        return loss, np.moveaxis(slope, axis, -1)

    for got, true in zip(derivatives(axis), derivatives(2), strict=True):
        assert got.shape == true.shape
        np.testing.assert_allclose(got, true, 1e-6, 1e-9)


# --- dtypes ---------------------------------------------------------------------------------------

NARROW = [jnp.bfloat16, jnp.float16, jnp.float32]
LABEL_DTYPES = [jnp.bool_, jnp.int8, jnp.uint8, jnp.int32, jnp.float32, jnp.bfloat16, jnp.float16]
MARGINS = [case for case in CASES if case.name.endswith("margin")]
MARGINS.append(of_distributions(SOFTMAX_MARGIN))
names = {"ids": lambda value: getattr(value, "__name__", None)}


def dtypes(case, x, y, **options):
    """Of a loss and of its gradient, from the trace alone."""

    def loss_and_slope(x, y):
        loss, pull = jax.vjp(lambda x: case(x, y, **options), x)
        return loss, *pull(loss)

    return {out.dtype for out in jax.eval_shape(loss_and_slope, x, y)}


def labels_as(case, dtype):
    """The labels of a case; where distributions do not fit a dtype, one-hot ones."""
    labels = case.data["labels"]
    hot = labels.ndim == 3 and not jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(np.eye(4)[CLASS_IDS] if hot else labels, dtype)


def labelled(cases, label_dtypes, *others):
    """What of a product of cases and dtypes there is: class ids are integers."""
    return [
        chosen
        for chosen in itertools.product(cases, label_dtypes, *others)
        if not of_ids(chosen[0]) or jnp.issubdtype(chosen[1], jnp.integer)
    ]


@pytest.mark.parametrize(
    ("case", "label_dtype", "logit_dtype"),
    [
        *labelled((FOCAL,), LABEL_DTYPES, NARROW),
        *labelled(LOSSES[1:], [jnp.int32, jnp.float16], NARROW[:1]),
        *labelled(SOFTMAX_LOSSES, [jnp.int32], NARROW[:1]),
        *labelled((SOFTMAX_FOCAL,), [jnp.int4, jnp.uint8, jnp.int16, jnp.uint32], NARROW[1:2]),
        *labelled(FORMS[2:], [jnp.float32], NARROW[:1]),
        *labelled(FORMS[2:3], [jnp.bool_, jnp.int8, jnp.bfloat16], NARROW[2:]),
    ],
    ids=lambda v: by_name(v) if hasattr(v, "note") else v.__name__,
)
def test_the_dtype_is_that_of_the_logits(case, label_dtype, logit_dtype):
    x, y = jnp.asarray(case.data["logits"], logit_dtype), labels_as(case, label_dtype)
    three, alpha = jnp.full(3, jnp.float32(0.5)), alpha_of(case, 0.5)
    where = jnp.ones(LOSS.shape, bool)
    for chosen in (
        {},
        {case.parameter: three, "alpha": alpha if alpha.ndim else three, "where": where},
    ):
        assert dtypes(case, x, y, **chosen) == {jnp.dtype(logit_dtype)}
    # and it is the loss in float32, rounded once
    wide = case(x.astype(jnp.float32), y.astype(jnp.int32 if of_ids(case) else jnp.float32))
    assert jnp.array_equal(case(x, y), wide.astype(logit_dtype))


@each_modulation
@pytest.mark.parametrize("dtype", NARROW, **names)
def test_modulations_keep_the_dtype_of_the_margin(case, dtype):
    value = jnp.full(3, case.valid[0], jnp.float32)
    weight = case(jnp.asarray(LOGITS, dtype), **{case.parameter: value})
    assert weight.dtype == dtype
    wide = case(jnp.asarray(LOGITS, dtype).astype(jnp.float32), **{case.parameter: value})
    assert jnp.array_equal(weight, wide.astype(dtype))


def test_the_margin_keeps_the_dtype_of_the_logits(dtype):
    for case, label_dtype in labelled(MARGINS, [jnp.int8, jnp.float32, jnp.bfloat16]):
        x, y = jnp.asarray(case.data["logits"]), labels_as(case, label_dtype)
        assert case(x.astype(dtype), y).dtype == dtype
        narrow = case(x.astype(jnp.bfloat16), y)
        wide = case(x.astype(jnp.bfloat16).astype(jnp.float32), y)
        assert jnp.array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("case", "label_dtype"),
    [
        *labelled(LOSSES, [jnp.bool_, jnp.int64, jnp.float32, jnp.float64]),
        *labelled(FORMS[::2], [jnp.int64, jnp.float64]),
    ],
    ids=lambda v: by_name(v) if hasattr(v, "note") else v.__name__,
)
def test_double_precision_stays(case, label_dtype, float64):
    x, y = jnp.asarray(case.data["logits"], jnp.float64), labels_as(case, label_dtype)
    options = {case.parameter: jnp.float32(0.5), "alpha": alpha_of(case, 0.5)}
    assert dtypes(case, x, y) == dtypes(case, x, y, **options) == {jnp.dtype(jnp.float64)}
    assert dtypes(case, x.astype(jnp.bfloat16), y, **options) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
def test_reductions_give_at_least_float32(case, dtype):
    labels = [LABELS] * (len(case.data) - 1)
    assert case(jnp.asarray(LOSS, dtype), *labels).dtype == dtype
    for narrow in (jnp.bfloat16, jnp.float16):
        assert case(jnp.asarray(LOSS, narrow), *labels).dtype == jnp.float32


# --- where ----------------------------------------------------------------------------------------

UNDER_THE_MASK = {
    "nan": (NOT_A_NUMBER, NOT_A_NUMBER),
    "inf": (INFINITE, 0),
    "-inf": (-INFINITE, INFINITE),
    "an ignore label": (2.0, -100),
    "huge": (3e38, 3e38),
    "hit for sure": (INFINITE, 1),
}


@pytest.mark.parametrize("case", [*LOSSES, *FORMS[::2], FORMS[3]], ids=by_name)
def test_nothing_passes_the_mask(case):
    """Into the loss, its derivatives in every argument, and the second in each logit."""

    def loss(x, y, value, alpha, where):
        return case(x, y, **{case.parameter: value}, alpha=alpha, where=where)

    def slope(*arguments):
        by_label = () if of_ids(case) else (1,)
        return jax.grad(lambda *a: loss(*a).sum(), (0, *by_label, 2, 3))(*arguments)

    @jax.jit
    def everything(x, *rest):
        # squared, as all the slopes of one softmax add up to 0
        bend = jax.grad(lambda x: (slope(x, *rest)[0] ** 2).sum())(x)
        return loss(x, *rest), *slope(x, *rest), bend

    dtype = np.int32 if of_ids(case) else np.float32
    clean_x, clean_y = (case.data["logits"], case.data["labels"].astype(dtype))
    kept = np.array([[True, False, True], [True, True, False]])
    per_class = alpha_of(case, 0.25).ndim
    alpha = np.full(4 if per_class else LOSS.shape, 0.25, np.float32)
    for value in (0.5, 0.75):
        value = np.full(LOSS.shape, value, np.float32)
        clean = everything(clean_x, clean_y, value, alpha, kept)
        whole = everything(clean_x, clean_y, value, alpha, kept | True)
        for got, unmasked in zip(clean, whole, strict=True):
            if got.ndim > 1:  # not the slope in a weight for each class
                assert jnp.all(got[~kept] == 0)
                np.testing.assert_allclose(got[kept], unmasked[kept], 1e-6)
        for under, (logit, label) in UNDER_THE_MASK.items():
            x, y = clean_x.copy(), clean_y.copy()
            x[~kept], y[~kept] = logit, -100 if of_ids(case) else label
            for got, true in zip(everything(x, y, value, alpha, kept), clean, strict=True):
                np.testing.assert_array_equal(got, true, under)


@pytest.mark.parametrize("case", [*LOSSES, *SOFTMAX_LOSSES], ids=by_name)
def test_an_integer_ignore_id_under_the_mask(case):
    logits, labels = case.data.values()
    ignored = labels.copy()
    ignored[0, 1], ignored[1, 0] = -100, -1
    kept = ignored >= 0
    loss = case(logits, ignored, where=kept)
    np.testing.assert_array_equal(loss, np.where(kept, case(logits, labels), 0))


@each_loss
def test_all_true_is_no_mask(case):
    logits, labels = case.data.values()
    alpha = alpha_of(case, 0.25)
    for shape in (LOSS.shape, logits.shape):
        masked = case(logits, labels, where=np.ones(shape, bool), alpha=alpha)
        np.testing.assert_allclose(masked, case(logits, labels, alpha=alpha), 1e-6)


# --- edges ----------------------------------------------------------------------------------------


@each_sigmoid_loss
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], **names)
def test_infinite_logits(case, traced, dtype):
    x = jnp.array([INFINITE, -INFINITE, -INFINITE, INFINITE], dtype)
    y = jnp.array([1, 0, 1, 0])

    @partial(jax.jit, static_argnums=() if traced else 0)
    def both(value):
        loss, pull = jax.vjp(lambda x: case(x, y, **{case.parameter: value}), x)
        return loss, *pull(jnp.ones_like(loss))

    for value in case.valid:
        loss, slope = both(jnp.float32(value) if traced else value)
        np.testing.assert_array_equal(loss, jnp.array([0, 0, INFINITE, INFINITE], dtype))
        np.testing.assert_array_equal(slope, jnp.array([0, 0, -1, 1], dtype))


@each_sigmoid_loss
@pytest.mark.parametrize("y", [0.0, 0.25, 1.0])
def test_nan_stays(case, y):
    for value in case.valid:
        loss, slope = jax.value_and_grad(case)(
            jnp.float32(NOT_A_NUMBER), jnp.float32(y), **{case.parameter: value}
        )
        assert jnp.isnan(loss)
        assert jnp.isnan(slope)
        assert jnp.isnan(case(jnp.float32(1), jnp.float32(NOT_A_NUMBER), **{case.parameter: value}))


@each_modulation
def test_modulations_at_the_ends(case):
    z = jnp.array([INFINITE, -INFINITE, NOT_A_NUMBER])
    weight = case(z, **{case.parameter: 0.5})
    np.testing.assert_array_equal(weight, [0, 1, NOT_A_NUMBER])
    slope = jax.grad(jax.jit(lambda z: case(z, **{case.parameter: 0.5}).sum()))(z)
    np.testing.assert_array_equal(slope[:2], [0, 0])


@pytest.mark.parametrize("case", ELEMENTWISE, ids=by_name)
def test_large_finite_logits_stay_finite(case):
    big = float(jnp.finfo(jnp.float32).max)
    if case.name == "sigmoid_posterior_logits":
        big /= 4  # at gamma = 2 they are three times as large
    x = jnp.array([big, -big, 1e30, -1e30, 1e-45, -1e-45, 0.0, -0.0])
    for y in (jnp.ones(8), jnp.zeros(8), jnp.full(8, 0.5)):
        data = [x, y][: len(case.data)]
        loss, pull = jax.vjp(jax.jit(lambda x, data=data: case(x, *data[1:])), x)
        assert jnp.all(jnp.isfinite(loss))
        assert jnp.all(jnp.isfinite(pull(jnp.ones_like(loss))[0]))


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "under"),
    [*((case, "a mask") for case in FORMS), *((case, "-inf") for case in FORMS[::2])],
    ids=lambda v: by_name(v) if hasattr(v, "note") else v,
)
def test_a_class_left_out_is_as_if_not_there(case, under):
    logits, labels = (a.copy() for a in case.data.values())
    out = (CLASS_IDS + 1) % 4
    classes = np.arange(4) != out[..., None]
    if of_ids(case):
        left = labels - (out < labels)
    else:
        labels *= np.array([1, 0.5, 2, 0.25], np.float32)  # they need not add up to 1
        left = labels[classes].reshape(2, 3, 3)
        labels[~classes] = 0 if under == "-inf" else [1, 0.5, 1, np.nan, np.inf, -1]
    true = loss_and_slope(case, logits[classes].reshape(2, 3, 3), left)
    if under == "-inf":
        logits[~classes], options = -np.inf, {}
    else:
        logits[~classes] = [np.nan, np.inf, -np.inf, 3e38, 100, 0]
        options = {"where": classes}
        if case is SOFTMAX_FOCAL:  # without jit too
            np.testing.assert_allclose(case(logits, labels, **options), true[0], 1e-6)
    loss, slope = loss_and_slope(case, logits, labels, **options)
    np.testing.assert_allclose(loss, true[0], 1e-6)
    np.testing.assert_allclose(slope[classes], true[1].ravel(), 2e-6, 1e-8)
    assert jnp.all(slope[~classes] == 0)


def test_a_class_left_out_is_below_any_that_is_not():
    logits, classes = jnp.array([-2e5, -2e5 + 1, 0]), jnp.array([True, True, False])
    loss = focaljax.softmax_focal_loss(logits, 0, gamma=0.0, where=classes)
    np.testing.assert_allclose(loss, np.log1p(np.e), 1e-6)


@pytest.mark.parametrize("case", FORMS[::3], ids=by_name)
def test_an_example_of_no_class_is_masked(case):
    logits, labels = case.data.values()
    classes = np.ones(logits.shape, bool)
    classes[0, 1] = classes[1, 2] = False
    bad_logits, bad_labels = logits.copy(), labels.copy()
    bad_logits[0, 1], bad_logits[1, 2] = np.nan, -np.inf
    bad_labels[0, 1] = bad_labels[1, 2] = -100 if of_ids(case) else np.nan
    kept = classes[..., 0]
    found = loss_and_slope(case, bad_logits, bad_labels, where=classes)
    for got, true in zip(found, loss_and_slope(case, logits, labels, where=kept), strict=True):
        assert jnp.all(got[~kept] == 0)
        np.testing.assert_allclose(got, true, 1e-6, 1e-9)


@pytest.mark.parametrize("case", FORMS[:2], ids=by_name)
def test_the_id_of_a_class_left_out_is_loud(case):
    classes = np.arange(4) != CLASS_IDS[..., None]
    classes[0, 0] = True
    loss, slope = loss_and_slope(case, CLASS_LOGITS, CLASS_IDS, where=classes)
    bad = ~classes.all(-1)
    assert jnp.array_equal(jnp.isnan(loss), bad)
    assert jnp.array_equal(jnp.isnan(slope), bad[..., None] & classes)
    assert jnp.all(slope[~classes] == 0)


IDS_OUT_OF_RANGE = {  # of 200 classes
    jnp.int8: [-1, -128],
    jnp.uint8: [200, 255],
    jnp.int32: [200, -1, -100, 2**31 - 1],
    jnp.uint32: [200, 2**32 - 1, 2**31 + 3],
    jnp.int64: [-1, 2**31 + 3, 2**32, 2**32 + 3, -(2**32)],
    jnp.uint64: [2**32, 2**32 + 3, 2**64 - 1],
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((SOFTMAX_FOCAL, dtype) for dtype in IDS_OUT_OF_RANGE),
        *((case, jnp.int32) for case in (SU, SOFTMAX_MARGIN)),
    ],
    ids=lambda v: by_name(v) if hasattr(v, "note") else v.__name__,
)
def test_ids_out_of_range_are_loud(case, dtype, float64):
    """They name no class, the one that they wrap around to neither."""
    known, loud = [0, 3, 127], IDS_OUT_OF_RANGE[dtype]
    labels = jnp.asarray(np.resize(np.array([*known, *loud], dtype), 8))
    assert labels.dtype == dtype
    in_range = np.resize([True] * 3 + [False] * len(loud), 8)
    logits = np.tile(np.linspace(-3, 3, 200, dtype=np.float32), (8, 1))
    loss, slope = loss_and_slope(case, logits, labels)
    assert jnp.array_equal(jnp.isnan(loss), ~in_range)
    assert jnp.array_equal(jnp.isnan(slope), np.broadcast_to(~in_range[:, None], logits.shape))
    assert jnp.argmax(jnp.abs(slope[2])) == 127
    if case.parameter and dtype == jnp.int32:  # nor does a weight of 0 silence them
        weighed, _ = loss_and_slope(case, logits, labels, alpha=np.zeros(200, np.float32))
        assert jnp.array_equal(jnp.isnan(weighed), ~in_range)


AMONG_CLASSES = {  # logits of which the first is true, loss and slopes
    "impossible": ([-INFINITE, 0, 0, -INFINITE], INFINITE, [-1, 0.5, 0.5, 0]),
    "impossible beside one": ([-INFINITE, 5, -INFINITE, -3e38], INFINITE, [-1, 1, 0, 0]),
    "another for sure": ([1, INFINITE, 2, 3], INFINITE, [-1, 1, 0, 0]),
    "for sure": ([INFINITE, 3, 2, 1], 0, [0, 0, 0, 0]),
    "nothing else": ([-3, -INFINITE, -INFINITE, -INFINITE], 0, [0, 0, 0, 0]),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, jnp.float32) for case in EVERY_LOSS[3:] if case.name != SU.name),
        (SOFTMAX_FOCAL, jnp.bfloat16),
    ],
    ids=lambda v: by_name(v) if hasattr(v, "note") else v.__name__,
)
def test_infinite_logits_among_classes(case, dtype):
    """The limits; of the literal form, where they depend on the path, none is promised."""
    logits, true_loss, true_slope = (
        jnp.array(column, dtype) for column in zip(*AMONG_CLASSES.values(), strict=True)
    )
    first = np.zeros(len(logits), np.int32)
    labels = first if of_ids(case) else np.eye(4, dtype=np.float32)[first]
    loss, slope = loss_and_slope(case, logits, labels)
    np.testing.assert_array_equal(loss, true_loss)
    np.testing.assert_array_equal(slope, true_slope)


@each_form
def test_nan_logits_and_labels_among_classes(case):
    logits, labels = (a.copy() for a in case.data.values())
    logits[0, 0, 1] = logits[1, 2, 3] = np.nan
    bad = np.isnan(logits).any(-1)
    if not of_ids(case):
        labels[1, 1, 2] = np.nan
    loss, slope = loss_and_slope(case, logits, labels)
    assert jnp.array_equal(
        jnp.isnan(loss), bad | (np.isnan(labels).any(-1) if labels.ndim == 3 else bad)
    )
    assert jnp.all(jnp.isnan(slope[bad]))
    assert jnp.all(jnp.isfinite(slope[0, 1:]))


@each_form
def test_one_class_is_always_right(case):
    logits = np.array([[5.0], [-3e38], [0.0]], np.float32)
    labels = np.zeros(3, np.int32) if of_ids(case) else np.array([[1], [0.5], [0]], np.float32)
    for out in loss_and_slope(case, logits, labels):
        assert jnp.all(out == 0)


@pytest.mark.parametrize("case", FORMS[::3], ids=by_name)
def test_large_finite_logits_among_classes(case):
    sizes = np.array([0, -1e-45, 1, -1e30, 8e37, -8e37], np.float32)
    logits = np.stack([a.ravel() for a in np.meshgrid(sizes, sizes, sizes[::-2])], -1)
    labels = np.arange(len(logits)) % 3
    if not of_ids(case):
        labels = np.eye(3, dtype=np.float32)[labels] * 0.5 + 0.125
    for out in loss_and_slope(case, logits, labels):
        assert jnp.all(jnp.isfinite(out))


def test_class_balanced_weights_are_weights_of_classes():
    alpha = focaljax.class_balanced_weights([900, 90, 10, 1])
    assert alpha[-1] > 1
    loss = SOFTMAX_FOCAL(CLASS_LOGITS, CLASS_IDS, alpha=alpha)
    np.testing.assert_allclose(
        loss, SOFTMAX_FOCAL(CLASS_LOGITS, CLASS_IDS) * alpha[CLASS_IDS], 1e-6
    )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "value"),
    [(case, value) for case in CASES if case.parameter for value in case.invalid],
    ids=lambda v: getattr(v, "name", v),
)
def test_a_known_hyper_parameter_out_of_range(case, value):
    name = case.parameter
    for given in (value, np.float32(value), np.array([case.valid[0], value, case.valid[0]])):
        with pytest.raises(ValueError, match=f"^{name} must be .*, got .*{value:g}"):
            case(*case.data.values(), **{name: given})


@each_sigmoid_loss
@pytest.mark.parametrize("value", RANGES["alpha"][1])
def test_alpha_out_of_range(case, value):
    with pytest.raises(ValueError, match=rf"^alpha must be in \[0, 1\], got .*{value:g}"):
        case(LOGITS, LABELS, alpha=value)


@each_softmax_loss
@pytest.mark.parametrize("value", [-0.1, INFINITE, NOT_A_NUMBER])
def test_a_class_weight_out_of_range(case, value):
    with pytest.raises(ValueError, match=rf"^alpha must be at least 0 and finite, got .*{value:g}"):
        case(*case.data.values(), alpha=np.array([1, 2, value, 0.5], np.float32))


@pytest.mark.parametrize("function", [focaljax.prior_bias, focaljax.prior_bias_init])
@pytest.mark.parametrize("value", RANGES["prior"][1])
def test_a_prior_out_of_range(function, value):
    with pytest.raises(ValueError, match=rf"^prior must be in \(0, 1\), got {value:g}"):
        function(value)


@pytest.mark.parametrize("counts", [[1.0, -1.0], [NOT_A_NUMBER, 1.0], [-2, 3]])
def test_counts_out_of_range(counts):
    with pytest.raises(ValueError, match=r"^counts must be at least 0"):
        focaljax.class_balanced_weights(counts)


def test_the_ends_of_the_ranges_are_taken():
    for case in CASES:
        for value in case.valid if case.parameter else ():
            assert jnp.all(jnp.isfinite(case(*case.data.values(), **{case.parameter: value})))
    for alpha in RANGES["alpha"][0]:
        assert jnp.all(jnp.isfinite(FOCAL(LOGITS, LABELS, alpha=alpha)))


def test_traced_hyper_parameters_are_let_through():
    for case in CASES:
        if case.parameter:
            traced = jax.jit(lambda value, c=case: c(*c.data.values(), **{c.parameter: value}))
            for value in (*case.valid, *case.invalid):
                traced(jnp.float32(value))
    jax.jit(lambda alpha: FOCAL(LOGITS, LABELS, alpha=alpha))(jnp.float32(2))
    jax.jit(lambda alpha: SOFTMAX_FOCAL(CLASS_LOGITS, CLASS_IDS, alpha=alpha))(-jnp.ones(4))
    assert jax.jit(focaljax.prior_bias)(jnp.float32(0.5)) == 0


FLAT = np.ones(6, np.float32)
WRONG = {  # function, data, options, and what the message must say
    "integer logits": (WITH_LABELS, (LABELS, LABELS), {}, ("int32", "floating point")),
    "fewer labels": (WITH_LABELS, (LOGITS, LABELS[0]), {}, ("labels", "(3,)", "(2, 3)")),
    "more labels": (
        WITH_LABELS, (LOGITS, LABELS[..., None]), {}, ("labels", "(2, 3, 1)", "(2, 3)")
    ),
    "labels that would broadcast": (
        WITH_LABELS, (LOGITS, LABELS[:1]), {}, ("labels", "(1, 3)", "(2, 3)")
    ),
    "optax's (4, 1) with (4,)": (
        WITH_LABELS, (FLAT[:4, None], FLAT[:4]), {}, ("labels", "(4,)", "(4, 1)")
    ),
    "complex labels": (LOSSES, (LOGITS, LABELS + 1j), {}, ("labels", "complex")),
    "a mask of integers": (
        WITH_MASK, (LOGITS, LABELS), {"where": LABELS},
        ("where", "boolean", "int32", ".astype(bool)"),
    ),
    "a mask of floats": (
        WITH_MASK, (LOGITS, LABELS), {"where": LOGITS}, ("where", "boolean", "float32")
    ),
    "a mask that would broadcast": (
        WITH_MASK, (LOGITS, LABELS), {"where": LABELS[:, :1] > 0},
        ("where", "(2, 1)", "(2, 3)", "broadcast_to"),
    ),
    "alpha of another shape": (
        LOSSES, (LOGITS, LABELS), {"alpha": FLAT[:4] / 2}, ("alpha", "(4,)", "(2, 3)", "vmap")
    ),
    "alpha with more axes": (
        LOSSES, (LOGITS, LABELS), {"alpha": FLAT[:2, None, None] / 2},
        ("alpha", "(2, 1, 1)", "vmap"),
    ),
    "ids and logits swapped": (
        SOFTMAX, (CLASS_IDS, CLASS_LOGITS), {}, ("logits", "int32", "floating point", "swapped")
    ),
    "distributions and logits swapped": (
        SOFTMAX, (DISTRIBUTIONS > 0, CLASS_LOGITS), {}, ("logits", "bool", "floating point")
    ),
    "ids as floats": (
        SOFTMAX, (CLASS_LOGITS, LOSS), {}, ("labels", "integers", "float32", ".astype(jnp.int32)")
    ),
    "ids as booleans": (SOFTMAX, (CLASS_LOGITS, CLASS_IDS > 0), {}, ("labels", "integers", "bool")),
    "ids of fewer axes": (
        SOFTMAX, (CLASS_LOGITS, CLASS_IDS[0]), {},
        ("labels", "class ids in shape (2, 3)", "distributions", "(2, 3, 4)", "got (3,)"),
    ),
    "ids of more axes": (
        SOFTMAX, (CLASS_LOGITS, CLASS_IDS[..., None, None]), {},
        ("labels", "(2, 3)", "got (2, 3, 1, 1)"),
    ),
    "ids that would broadcast": (
        SOFTMAX, (CLASS_LOGITS, CLASS_IDS[:1]), {}, ("labels", "(2, 3)", "got (1, 3)")
    ),
    "ids with a last axis": (
        SOFTMAX, (CLASS_LOGITS, CLASS_IDS[..., None]), {}, ("labels", "(2, 3, 4)", "(2, 3, 1)")
    ),
    "ids without the wrong axis": (
        SOFTMAX, (CLASS_LOGITS, CLASS_IDS), {"axis": 1},
        ("labels", "(2, 4)", "without axis 1", "got (2, 3)"),
    ),
    "distributions that would broadcast": (
        SOFTMAX, (CLASS_LOGITS, DISTRIBUTIONS[:1]), {}, ("labels", "(2, 3, 4)", "(1, 3, 4)")
    ),
    "one class too many": (
        SOFTMAX, (CLASS_LOGITS, FLAT[:5] * LOSS[..., None]), {},
        ("labels", "(2, 3, 4)", "(2, 3, 5)"),
    ),
    "complex distributions": (
        SOFTMAX, (CLASS_LOGITS, CLASS_LOGITS + 1j), {}, ("labels", "complex")
    ),
    "a mask of class ids": (
        SOFTMAX_LOSSES, (CLASS_LOGITS, CLASS_IDS), {"where": CLASS_IDS},
        ("where", "boolean", "int32", ".astype(bool)"),
    ),
    "a mask of examples that would broadcast": (
        SOFTMAX_LOSSES, (CLASS_LOGITS, CLASS_IDS), {"where": LABELS[:, :1] > 0},
        ("where", "(2, 1)", "(2, 3)", "broadcast_to"),
    ),
    "a mask of classes without examples": (
        SOFTMAX_LOSSES, (CLASS_LOGITS, CLASS_IDS), {"where": FLAT[:4] > 0},
        ("where", "(4,)", "(2, 3)", "broadcast_to"),
    ),
    "a mask of classes that would broadcast": (
        SOFTMAX_LOSSES, (CLASS_LOGITS, CLASS_IDS), {"where": CLASS_LOGITS[:1, :1] > 0},
        ("where", "(1, 1, 4)", "(2, 3, 4)", "broadcast_to"),
    ),
    "one alpha for all classes": (
        SOFTMAX_LOSSES, (CLASS_LOGITS, CLASS_IDS), {"alpha": 0.25},
        ("alpha", "each of the 4 classes", "shape (4,)", "got shape ()", "rescale"),
    ),
    "an alpha too few": (
        SOFTMAX_LOSSES, (CLASS_LOGITS, CLASS_IDS), {"alpha": FLAT[:3]},
        ("alpha", "each of the 4 classes", "got shape (3,)"),
    ),
    "an alpha for each example and class": (
        SOFTMAX_LOSSES, (CLASS_LOGITS, CLASS_IDS), {"alpha": DISTRIBUTIONS},
        ("alpha", "each of the 4 classes", "got shape (2, 3, 4)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_and_dtypes(wrong, jitted):
    cases, data, options, said = WRONG[wrong]
    for case in cases:
        call = jax.jit(case, static_argnames="axis") if jitted else case
        with pytest.raises(AssertionError) as error:
            call(*data[: len(case.data)], **options)
        assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.parametrize("axis", [3, -4, 100])
@pytest.mark.parametrize("case", SOFTMAX, ids=by_name)
def test_an_axis_that_is_not_there(case, axis):
    said = rf"^axis must be one of the 3 axes of logits, .*\(2, 3, 4\), got {axis}"
    with pytest.raises(ValueError, match=said):
        case(*case.data.values(), axis=axis)


@pytest.mark.parametrize("case", SOFTMAX, ids=by_name)
def test_logits_without_classes(case):
    for labels in (0, 1.0):
        with pytest.raises(ValueError, match=r"axes of logits, whose shape is \(\)"):
            case(0.5, labels)


@pytest.mark.parametrize("case", [*EVERY_LOSS, *MODULATIONS], ids=by_name)
def test_a_hyper_parameter_of_another_shape(case):
    value = np.full(4, case.valid[0], np.float32)
    with pytest.raises(AssertionError, match=rf"{case.parameter} must be .*\(2, 3\).*\(4,\).*vmap"):
        case(*case.data.values(), **{case.parameter: value})


@each_modulation
def test_an_integer_margin(case):
    with pytest.raises(AssertionError, match="margin must be floating point, got int32"):
        case(LABELS)


def test_other_data_of_the_wrong_kind():
    with pytest.raises(AssertionError, match=r"counts must be a vector .*\(1, 3\)"):
        focaljax.class_balanced_weights(LABELS[:1])
    with pytest.raises(AssertionError, match="loss must be floating point, got int32"):
        focaljax.reduce_mean(LABELS)


# --- reductions -----------------------------------------------------------------------------------

MASK = np.array([[True, False, True], [True, True, False]])


def test_reduce_mean():
    assert focaljax.reduce_mean(LOSS) == LOSS.mean()
    assert focaljax.reduce_mean(LOSS, where=MASK) == LOSS[MASK].mean()
    under = np.where(MASK, LOSS, np.nan)
    mean, slope = jax.value_and_grad(focaljax.reduce_mean)(under, where=MASK)
    assert mean == LOSS[MASK].mean()
    assert jnp.array_equal(slope, MASK / np.float32(4))


def test_normalize_by_positives():
    labels = np.array([[0, 1, 0], [1, 1, 0]], np.int32)

    def check(labels, true, **options):
        got = focaljax.normalize_by_positives(LOSS, labels, **options)
        np.testing.assert_allclose(got, true, 1e-6)

    check(labels, LOSS.sum() / 3)
    check(labels, LOSS[MASK].sum() / 2, where=MASK)
    check(0 * labels, LOSS.sum())
    check(labels - 5, LOSS.sum())  # class ids: background is not a positive
    check(np.array([[0.4, 0.6, 0.1], [1.0, 0.51, 0.5]], np.float32), LOSS.sum() / 3)
    for dtype in LABEL_DTYPES:
        check(jnp.asarray(labels, dtype), LOSS.sum() / 3)

    under = np.where(MASK, LOSS, np.nan)
    total, slope = jax.value_and_grad(focaljax.normalize_by_positives)(under, labels, where=MASK)
    assert total == LOSS[MASK].sum() / 2
    assert jnp.array_equal(slope, MASK / np.float32(2))


@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
@pytest.mark.parametrize("under", [1.0, NOT_A_NUMBER, INFINITE])
def test_nothing_included_is_zero(case, under):
    loss = np.full(LOSS.shape, under, np.float32)
    rest = [LABELS] * (len(case.data) - 1)
    value, slope = jax.value_and_grad(case)(loss, *rest, where=np.zeros(LOSS.shape, bool))
    assert value == 0
    assert jnp.array_equal(slope, 0 * LOSS)


@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
def test_an_empty_loss_is_zero(case):
    empty = [np.zeros((0, 3), np.float32)] * len(case.data)
    assert case(*empty) == 0


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16], **names)
@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
def test_reductions_accumulate_in_float32(case, narrow):
    """4,000 ones and 0.125 more: bfloat16 stops counting at 256, float16 at 2048."""
    loss = jnp.ones(4001, narrow).at[0].set(0.125)
    labels = [jnp.zeros(loss.shape)] * (len(case.data) - 1)
    true = 4000.125 / (1 if labels else 4001)
    assert float(case(loss, *labels)) == pytest.approx(true, rel=1e-7)
    assert float(jax.jit(case)(loss, *labels)) == pytest.approx(true, rel=1e-7)


def test_counts_beyond_what_float32_counts():
    size = 2**24 + 4  # adding ones in float32 stops at 2 ** 24
    loss, mask = jnp.ones(size, jnp.bfloat16), jnp.ones(size, bool)
    half = mask.at[: size // 2].set(False)
    for where in (None, mask, half):
        assert float(focaljax.reduce_mean(loss, where=where)) == pytest.approx(1, rel=1e-6)
        positives = focaljax.normalize_by_positives(loss, mask, where=where)
        assert float(positives) == pytest.approx(1, rel=1e-6)


# --- across devices -------------------------------------------------------------------------------

ROWS = np.arange(24, dtype=np.float32).reshape(4, 6)
UNEVEN = (np.arange(24) % 5 < 2).reshape(4, 6) & (np.arange(4) != 2)[:, None]  # none in one row


def over_devices(function, *data):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharded = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in data]
    specs = {"in_specs": (P("data"),) * len(data), "out_specs": P()}
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs))(*sharded)


def over_vmap(function, *data):
    out = jax.vmap(function, axis_name="data")(*data)
    assert np.all(np.asarray(out) == out[0])
    return out[0]


@pytest.mark.parametrize("over", [over_vmap, over_devices])
@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
def test_a_reduction_over_devices_is_that_of_the_whole(case, over):
    if over is over_devices and len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    labels = [UNEVEN.astype(np.float32)] * (len(case.data) - 1)
    for mask in (UNEVEN, ~UNEVEN, UNEVEN & False):
        whole = case(ROWS, *labels, where=mask)
        parts = over(
            lambda rows, mask, *labels: case(rows, *labels, where=mask, axis_name="data"),
            ROWS, mask, *labels,
        )  # fmt: skip
        np.testing.assert_allclose(parts, whole, 1e-6)
    np.testing.assert_allclose(
        over(lambda rows, *labels: case(rows, *labels, axis_name="data"), ROWS, *labels),
        case(ROWS, *labels),
        1e-6,
    )


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
def test_the_gradient_over_devices_is_that_of_the_whole(case):
    labels = [UNEVEN.astype(np.float32)] * (len(case.data) - 1)

    def train(mapped):
        def objective(x, mask, *labels):
            loss = SOFT(x, mask, where=~mask)
            return case(loss, *labels, where=~mask, axis_name="data" if mapped else None)

        if mapped:
            return jax.grad(lambda x: over_devices(objective, x, UNEVEN, *labels))
        return jax.grad(lambda x: objective(x, UNEVEN, *labels))

    np.testing.assert_allclose(train(True)(ROWS), train(False)(ROWS), 1e-6)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_arrays_sharded_under_plain_jit():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, mask = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (ROWS, UNEVEN))
    got = jax.jit(lambda x, m: focaljax.reduce_mean(SOFT(x, m, where=~m), where=~m))(rows, mask)
    true = focaljax.reduce_mean(SOFT(ROWS, UNEVEN, where=~UNEVEN), where=~UNEVEN)
    np.testing.assert_allclose(got, true, 1e-6)


# --- sharded classes ------------------------------------------------------------------------------

eight_devices = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
OLD_JAX = jax.__version_info__ < (0, 8)
COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast|reduce-scatter)(?:-start)?\("
)
MANY_LOGITS = np.random.default_rng(0).normal(0, 3, (16, 32)).astype(np.float32)
MANY_LOGITS[3] = 0  # a tie of all classes, over all devices
MANY_IDS = np.arange(0, 48, 3, dtype=np.int32) % 32
MANY_DISTRIBUTIONS = 0.875 * np.eye(32, dtype=np.float32)[MANY_IDS] + np.float32(1 / 256)


def collectives(compiled):
    """Of a compiled program, each with the number of elements that it gives one device."""
    return [
        (name, sum(math.prod(int(n) for n in dims.split(",") if n) for dims in shapes))
        for result, name in COLLECTIVE.findall(compiled.as_text())
        for shapes in [re.findall(r"\[([\d,]*)\]", result)]
    ]


def trained(loss, mesh, *data):
    """A step on `data`, each an array and how it is sharded: compiled, checked against a whole."""
    if OLD_JAX and AxisType.Explicit in mesh.axis_types:
        pytest.skip("jax 0.7 wants the mesh in its context for the tangents of class ids")
    step = jax.jit(jax.value_and_grad(loss))
    placed = [jax.device_put(a, NamedSharding(mesh, P(*spec))) for a, spec in data]
    compiled = step.lower(*placed).compile()
    value, slope = compiled(*placed)
    for got, true in zip((value, slope), step(*(a for a, _ in data)), strict=True):
        np.testing.assert_allclose(got, true, 2e-6, 1e-8)
    assert slope.sharding.is_equivalent_to(placed[0].sharding, 2)
    return compiled


@eight_devices
@pytest.mark.parametrize(
    ("case", "shape", "weighed", "mode"),
    [
        (SOFTMAX_FOCAL, (2, 4), True, AxisType.Explicit),
        (SOFTMAX_FOCAL, (1, 8), False, AxisType.Auto),
        (SU, (2, 4), True, AxisType.Auto),
        (OF_DISTRIBUTIONS[0], (2, 4), True, AxisType.Explicit),
        (OF_DISTRIBUTIONS[3], (1, 8), False, AxisType.Auto),
    ],
    ids=lambda v: by_name(v) if hasattr(v, "note") else getattr(v, "name", str(v)),
)
def test_sharded_classes(case, shape, weighed, mode):
    mesh = jax.make_mesh(shape, ("data", "classes"), axis_types=(mode, mode))
    y, spec = (MANY_IDS, ("data",)) if of_ids(case) else (MANY_DISTRIBUTIONS, ("data", "classes"))
    kept = np.arange(16) % 5 > 0
    options = {"alpha": np.linspace(0.5, 2, 32, dtype=np.float32), "where": kept} if weighed else {}
    compiled = trained(
        lambda x, y: focaljax.reduce_mean(case(x, y, **options), where=options.get("where")),
        mesh,
        (MANY_LOGITS, ("data", "classes")),
        (y, spec),
    )
    found = collectives(compiled)
    assert {name for name, _ in found} == {"all-reduce"}
    of_mean = [size for _, size in found if size == 1]
    assert len(of_mean) == (shape[0] > 1)
    of_classes = [size for _, size in found if size > 1]
    examples = 16 // shape[0]
    assert max(of_classes) <= 8 * examples
    if of_ids(case) and not OLD_JAX:  # whose compiler leaves apart what could go together
        assert len(of_classes) == 2, found


@eight_devices
@pytest.mark.parametrize("case", [SOFTMAX_FOCAL, OF_DISTRIBUTIONS[0]], ids=by_name)
def test_sharded_examples_need_only_the_sum_of_the_mean(case):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    y = MANY_IDS if of_ids(case) else MANY_DISTRIBUTIONS
    compiled = trained(
        lambda x, y: focaljax.reduce_mean(case(x, y)),
        mesh,
        (MANY_LOGITS, ("data",)),
        (y, ("data",)),
    )
    assert collectives(compiled) == [("all-reduce", 1)]


@eight_devices
def test_classes_under_shard_map_over_examples():
    kept = np.arange(16) % 5 > 0

    def mean(x, y, kept, axis_name=None):
        return focaljax.reduce_mean(
            SOFTMAX_FOCAL(x, y, where=kept), where=kept, axis_name=axis_name
        )

    def mapped(x):
        return over_devices(partial(mean, axis_name="data"), x, MANY_IDS, kept)

    found, true = (
        jax.value_and_grad(f)(MANY_LOGITS) for f in (mapped, lambda x: mean(x, MANY_IDS, kept))
    )
    for got, expected in zip(found, true, strict=True):
        np.testing.assert_allclose(got, expected, 2e-6, 1e-8)


# --- balance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", RANGES["beta"][0])
def test_class_balanced_weights(beta):
    counts = [900, 90, 10, 1, 123456]
    weights = focaljax.class_balanced_weights(np.array(counts), beta=beta)
    assert weights.dtype == jnp.float32
    true = reference.class_balanced_weights(counts, reference.EXACT.of(beta))
    np.testing.assert_allclose(weights, np.array(true, float), 1e-6)
    np.testing.assert_allclose(np.mean(weights), 1, 1e-6)


def test_class_balanced_weights_of_a_traced_beta_and_of_no_example():
    counts = jnp.array([100.0, 10.0, 0.0])
    known = focaljax.class_balanced_weights(counts, beta=0.99)
    assert known[1] < known[2] == focaljax.class_balanced_weights(counts.at[2].set(1), beta=0.99)[2]
    traced = jax.jit(lambda beta: focaljax.class_balanced_weights(counts, beta=beta))(0.99)
    np.testing.assert_allclose(traced, known, 1e-4)


def test_class_balanced_weights_keep_float64(float64):
    assert focaljax.class_balanced_weights(np.array([3.0, 4.0])).dtype == jnp.float64


@pytest.mark.parametrize("prior", RANGES["prior"][0])
def test_prior_bias(prior):
    bias = focaljax.prior_bias(prior)
    assert bias.dtype == jnp.float32
    true = reference.log_odds(reference.EXACT.of(prior))
    np.testing.assert_allclose(bias, float(true), 5e-7, 1e-7)
    np.testing.assert_allclose(jax.nn.sigmoid(bias), prior, 2e-6)


def test_prior_bias_per_class_and_of_narrow_dtypes():
    priors = jnp.array([0.01, 0.1, 0.5])
    assert jnp.array_equal(
        focaljax.prior_bias(priors), jnp.stack([focaljax.prior_bias(p) for p in priors])
    )
    assert focaljax.prior_bias(jnp.bfloat16(0.25)).dtype == jnp.float32
    with pytest.raises(AssertionError, match="prior must be floating point"):
        jax.jit(focaljax.prior_bias)(jnp.array([1, 2]))


def test_prior_bias_init_in_a_layer():
    init = focaljax.prior_bias_init(0.01)
    head = nnx.Linear(4, 3, bias_init=init, rngs=nnx.Rngs(0))
    narrow = nnx.Linear(4, 3, bias_init=init, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with jax.numpy_rank_promotion("allow"):
        p = jax.nn.sigmoid(head(jnp.zeros((2, 4))))
    np.testing.assert_allclose(p, 0.01, 1e-5)
    assert narrow.bias[...].dtype == jnp.bfloat16
    bias = focaljax.prior_bias_init(np.array([0.1, 0.2], np.float32))(jax.random.key(0), (3, 2))
    np.testing.assert_allclose(jax.nn.sigmoid(bias), [[0.1, 0.2]] * 3, 1e-6)


@pytest.mark.parametrize("case", [FOCAL, SOFTMAX_FOCAL], ids=by_name)
def test_a_flax_variable_is_a_hyper_parameter_like_any_other(case):
    class Learned(nnx.Module):
        def __init__(self):
            self.gamma = nnx.Param(jnp.float32(2))

    def loss(gamma):
        return case(*case.data.values(), gamma=gamma).sum()

    with jax.numpy_dtype_promotion("standard"):
        by_module = nnx.jit(nnx.grad(lambda model: loss(model.gamma)))(Learned())
    np.testing.assert_allclose(by_module.gamma[...], jax.grad(loss)(2.0), 1e-6)


def test_counts_and_priors_known_beyond_float32():
    many = np.array([2**33 + 5, 7])
    true = reference.class_balanced_weights([mpmath.mpf(int(n)) for n in many], mpmath.mpf(0.999))
    np.testing.assert_allclose(focaljax.class_balanced_weights(many), np.array(true, float), 1e-6)
    near_one = 1 - 1e-9
    true = reference.log_odds(reference.EXACT.of(near_one))
    np.testing.assert_allclose(focaljax.prior_bias(near_one), float(true), 1e-6)
