"""What every loss takes, gives and refuses."""

import inspect
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
    RANGES,
    REQUIRED,
    SOFTMAX,
    SOFTMAX_FOCAL,
    SOFTMAX_LOSSES,
    SOFTMAX_MARGIN,
    SU,
    by_name,
)
from flax import nnx

import focaljax

# every way from class logits to a margin; what is done with it, the sigmoid losses do too
FORMS = (SOFTMAX_FOCAL, SU, OF_DISTRIBUTIONS[1], OF_DISTRIBUTIONS[3])
EVERY_LOSS = (*LOSSES, *SOFTMAX_LOSSES, *FORMS[2:])
WITH_DTYPE = [case for case in CASES if {"logits", "margin"} & set(case.data)]
ELEMENTWISE = [case for case in WITH_DTYPE if "axis" not in case.options]
WITH_LABELS = [case for case in ELEMENTWISE if "labels" in case.data]
WITH_MASK = [case for case in CASES if "where" in case.options and case not in SOFTMAX]


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=by_name)


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


# --- signature and shapes -------------------------------------------------------------------------


@each(CASES)
def test_data_is_positional_and_options_are_keywords(case):
    given = inspect.signature(case.function).parameters
    options = {name: p for name, p in given.items() if p.kind is p.KEYWORD_ONLY}
    assert [*given] == [*case.data, *case.options]
    assert [*options] == [*case.options]
    defaults = [REQUIRED if p.default is p.empty else p.default for p in options.values()]
    assert defaults == [*case.options.values()]


@each([*WITH_DTYPE, *FORMS[2:]])
def test_the_shape_is_kept(case):
    def loss_and_slope(logits, *labels):
        loss, pull = jax.vjp(lambda x: case(x, *labels), logits)
        return loss, *pull(loss)

    for shape in ((), (3, 0, 2), (2, 1, 3, 2)):
        data = [jnp.ones(shape + value.shape[2:], value.dtype) for value in case.data.values()]
        # with no element there is nothing to compute, but a maximum of nothing is refused
        run = 0 in shape and case in (FOCAL, *FORMS)
        out, slope = loss_and_slope(*data) if run else jax.eval_shape(loss_and_slope, *data)
        assert out.shape == (shape if len(data) > 1 else data[0].shape)  # labels have no class axis
        assert slope.shape == data[0].shape


def test_numbers_numpy_arrays_and_single_examples_are_taken():
    loss = FOCAL(jnp.array([0.5, -1.0]), jnp.array([1, 0]))
    assert isinstance(loss, jax.Array)
    assert jnp.array_equal(FOCAL(np.array([0.5, -1.0], np.float32), np.array([1, 0])), loss)
    assert FOCAL(0.5, 1) == FOCAL(0.5, True) == loss[0]
    for case in (SOFTMAX_FOCAL, OF_DISTRIBUTIONS[0]):
        logits, labels = case.data.values()
        one = labels[1, 1].tolist() if of_ids(case) else labels[1, 1]
        np.testing.assert_allclose(case(logits[1, 1], one), case(logits, labels)[1, 1], 1e-6)


@pytest.mark.parametrize(
    ("case", "name"),
    [(FOCAL, "gamma"), (FOCAL, "alpha"), (SOFTMAX_FOCAL, "gamma"), (OF_DISTRIBUTIONS[3], "k")],
)
def test_options_broadcast_against_the_loss(case, name):
    logits, labels = case.data.values()
    values = np.array(RANGES[name][0][:3], np.float32)
    one_by_one = jax.vmap(jax.vmap(lambda *one: case(*one[:2], **{name: one[2]})))
    for given in (values, values[:2, None], np.resize(values, LOSS.shape)):
        true = one_by_one(logits, labels, np.broadcast_to(given, LOSS.shape))
        np.testing.assert_allclose(case(logits, labels, **{name: given}), true, 2e-6)


def test_alpha_weighs_positives_and_the_rest_negatives():
    balance = np.where(LABELS == 1, np.float32(0.2), np.float32(0.8))
    for case in LOSSES:
        weighed = case(LOGITS, LABELS, alpha=0.2)
        np.testing.assert_allclose(weighed, balance * case(LOGITS, LABELS), 1e-6)
        soft = np.full(LOGITS.shape, 0.75, np.float32)
        weighed = case(LOGITS, soft, alpha=0.2)
        np.testing.assert_allclose(weighed, np.float32(0.35) * case(LOGITS, soft), 1e-6)


@each(FORMS)
def test_alpha_weighs_every_class(case):
    logits, labels = case.data.values()
    weights = np.array([0, 0.5, 1, 7.5], np.float32)
    one_hot = np.eye(4, dtype=np.float32)
    loss_of = jax.jit(case)
    of_class = [
        loss_of(logits, np.full(LOSS.shape, c) if of_ids(case) else np.resize(row, logits.shape))
        for c, row in enumerate(one_hot)
    ]
    mass = one_hot[labels] if of_ids(case) else labels
    parts = mass * np.stack(of_class, -1)

    def total(alpha):
        loss = case(logits, labels, alpha=alpha)
        return loss.sum(), loss

    by_weight, loss = jax.jit(jax.grad(total, has_aux=True))(weights)
    np.testing.assert_allclose(loss, (weights * parts).sum(-1), 2e-6)
    np.testing.assert_allclose(by_weight, parts.sum((0, 1)), 2e-6)
    whole = case(logits, labels, alpha=weights.astype(np.int32))
    np.testing.assert_allclose(whole, (np.trunc(weights) * parts).sum(-1), 2e-6)


# every example has some of its classes, the true one among them
MOST_CLASSES = (CLASS_LOGITS > 0.2) | (np.arange(4) == CLASS_IDS[..., None])


@pytest.mark.parametrize(
    ("case", "axis", "where"),
    [
        (SOFTMAX_FOCAL, 0, MOST_CLASSES),
        (OF_DISTRIBUTIONS[0], -2, MOST_CLASSES),
        (OF_DISTRIBUTIONS[3], 0, LABELS > 0),
        (SOFTMAX_MARGIN, -2, None),
    ],
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

NARROW = [jnp.bfloat16, jnp.float16]
LABEL_DTYPES = [jnp.bool_, jnp.int8, jnp.uint8, jnp.int32, jnp.float32, jnp.bfloat16, jnp.float16]


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


@each([FOCAL, SOFTMAX_FOCAL, OF_DISTRIBUTIONS[0]])
def test_the_dtype_is_that_of_the_logits(case):
    options = {
        case.parameter: jnp.full(3, jnp.float32(0.5)),
        "alpha": alpha_of(case, 0.5),
        "where": jnp.ones(LOSS.shape, bool),
    }
    of_logits = itertools.cycle([*NARROW, jnp.float32])
    for x_dtype, y_dtype in zip(of_logits, [*LABEL_DTYPES, jnp.uint32], strict=False):
        if of_ids(case) and not jnp.issubdtype(y_dtype, jnp.integer):
            continue
        x, y = jnp.asarray(case.data["logits"], x_dtype), labels_as(case, y_dtype)
        assert dtypes(case, x, y, **options) == {jnp.dtype(x_dtype)}


@each([*WITH_DTYPE, *FORMS[2:]])
def test_narrow_dtypes_are_float32_rounded_once(case):
    narrow, (x, *labels) = jnp.bfloat16, case.data.values()
    x = jnp.asarray(x, narrow)
    assert jnp.array_equal(case(x, *labels), case(x.astype(jnp.float32), *labels).astype(narrow))


@each([FOCAL, *FORMS[::2]])
def test_double_precision_stays(case, float64):
    for label_dtype in (jnp.int64, jnp.float64, jnp.bool_)[: 1 if of_ids(case) else 3]:
        x, y = jnp.asarray(case.data["logits"], jnp.float64), labels_as(case, label_dtype)
        options = {case.parameter: jnp.float32(0.5), "alpha": alpha_of(case, 0.5)}
        assert dtypes(case, x, y) == dtypes(case, x, y, **options) == {jnp.dtype(jnp.float64)}
        assert dtypes(case, x.astype(jnp.bfloat16), y, **options) == {jnp.dtype(jnp.bfloat16)}


# --- where ----------------------------------------------------------------------------------------

UNDER_THE_MASK = {
    "nan": (NOT_A_NUMBER, NOT_A_NUMBER),
    "inf": (INFINITE, 0),
    "-inf": (-INFINITE, INFINITE),
    "an ignore label": (2.0, -100),
    "huge": (3e38, 3e38),
}


@each([FOCAL, SOFTMAX_FOCAL, *OF_DISTRIBUTIONS[::3]])
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

    clean_x, clean_y = case.data["logits"], case.data["labels"]
    clean_y = clean_y if of_ids(case) else clean_y.astype(np.float32)
    kept = np.array([[True, False, True], [True, True, False]])
    value = np.full(LOSS.shape, 0.75, np.float32)
    alpha = np.full(4 if alpha_of(case, 0).ndim else LOSS.shape, 0.25, np.float32)
    clean = everything(clean_x, clean_y, value, alpha, kept)
    whole = everything(clean_x, clean_y, value, alpha, kept | True)
    np.testing.assert_allclose(
        whole[0], case(clean_x, clean_y, **{case.parameter: value}, alpha=alpha), 1e-6
    )
    for got, unmasked in zip(clean, whole, strict=True):
        if got.ndim > 1:  # not the slope in a weight for each class
            assert jnp.all(got[~kept] == 0)
            np.testing.assert_allclose(got[kept], unmasked[kept], 1e-6)
    for under, (logit, label) in UNDER_THE_MASK.items():
        x, y = clean_x.copy(), clean_y.copy()
        x[~kept], y[~kept] = logit, -100 if of_ids(case) else label
        for got, true in zip(everything(x, y, value, alpha, kept), clean, strict=True):
            np.testing.assert_array_equal(got, true, under)


def test_labels_that_mean_nothing_are_loud():
    x, y = jnp.ones(5), jnp.array([-1.0, 2.0, 1.0 + 1e-6, 0.0, 1.0])
    for case in LOSSES:
        loss, slope = loss_and_slope(case, x, y)
        assert jnp.isnan(loss).tolist() == jnp.isnan(slope).tolist() == [True] * 3 + [False] * 2
        assert jnp.isfinite(case(x, y, where=(y == 0) | (y == 1))).all()


# --- infinite and not a number --------------------------------------------------------------------


@each(LOSSES)
@pytest.mark.parametrize("traced", [False, True])
def test_infinite_logits(case, traced):
    x, y = jnp.array([INFINITE, -INFINITE, -INFINITE, INFINITE]), jnp.array([1, 0, 1, 0])

    @partial(jax.jit, static_argnums=() if traced else 0)
    def both(value):
        loss, pull = jax.vjp(lambda x: case(x, y, **{case.parameter: value}), x)
        return loss, *pull(jnp.ones_like(loss))

    for value in case.valid:
        loss, slope = both(jnp.float32(value) if traced else value)
        np.testing.assert_array_equal(loss, jnp.array([0, 0, INFINITE, INFINITE]))
        np.testing.assert_array_equal(slope, jnp.array([0, 0, -1, 1]))


@each(LOSSES)
def test_nan_stays(case):
    x, y = np.array([NOT_A_NUMBER] * 3 + [1], np.float32), np.array([0, 0.25, 1, NOT_A_NUMBER])
    for value in case.valid[:3]:
        for out in loss_and_slope(case, x, y.astype(np.float32), **{case.parameter: value}):
            assert jnp.isnan(out).all()


@each(MODULATIONS)
def test_modulations_at_the_ends(case):
    z = jnp.array([INFINITE, -INFINITE, NOT_A_NUMBER])
    weight, slope = jax.vmap(jax.value_and_grad(partial(case, **{case.parameter: 0.5})))(z)
    np.testing.assert_array_equal(weight, [0, 1, NOT_A_NUMBER])
    np.testing.assert_array_equal(slope[:2], [0, 0])


@each(ELEMENTWISE)
def test_large_finite_logits_stay_finite(case):
    big = float(jnp.finfo(jnp.float32).max)
    if case.name == "sigmoid_posterior_logits":
        big /= 4  # at gamma = 2 they are three times as large
    x = jnp.tile(jnp.array([big, -big, 1e30, -1e30, 1e-45, -1e-45, 0.0, -0.0]), 3)
    labels = [jnp.repeat(jnp.array([0, 0.5, 1]), 8)][: len(case.data) - 1]
    for out in loss_and_slope(lambda x, labels: case(x, *labels), x, labels):
        assert jnp.all(jnp.isfinite(out))


# --- classes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "under"),
    [*((case, "a mask") for case in FORMS), *((case, "-inf") for case in FORMS[::2])],
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
        logits[~classes], options = [np.nan, np.inf, -np.inf, 3e38, 100, 0], {"where": classes}
    loss, slope = loss_and_slope(case, logits, labels, **options)
    np.testing.assert_allclose(loss, true[0], 1e-6)
    np.testing.assert_allclose(slope[classes], true[1].ravel(), 2e-6, 1e-8)
    assert jnp.all(slope[~classes] == 0)


def test_a_class_left_out_is_below_any_that_is_not():
    logits, classes = jnp.array([-2e5, -2e5 + 1, 0]), jnp.array([True, True, False])
    loss = focaljax.softmax_focal_loss(logits, 0, gamma=0.0, where=classes)
    np.testing.assert_allclose(loss, np.log1p(np.e), 1e-6)


@each(FORMS[::3])
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


@each(FORMS[:2])
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
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((SOFTMAX_FOCAL, dtype) for dtype in IDS_OUT_OF_RANGE),
        *((case, jnp.int32) for case in (SU, SOFTMAX_MARGIN)),
    ],
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
    if case is SOFTMAX_FOCAL and dtype == jnp.int32:  # nor does a weight of 0 silence them
        weighed, _ = loss_and_slope(case, logits, labels, alpha=np.zeros(200, np.float32))
        assert jnp.array_equal(jnp.isnan(weighed), ~in_range)


AMONG_CLASSES = {  # logits of which the first is true, loss and slopes
    "impossible": ([-INFINITE, 0, 0, -INFINITE], INFINITE, [-1, 0.5, 0.5, 0]),
    "impossible beside one": ([-INFINITE, 5, -INFINITE, -3e38], INFINITE, [-1, 1, 0, 0]),
    "another for sure": ([1, INFINITE, 2, 3], INFINITE, [-1, 1, 0, 0]),
    "for sure": ([INFINITE, 3, 2, 1], 0, [0, 0, 0, 0]),
    "nothing else": ([-3, -INFINITE, -INFINITE, -INFINITE], 0, [0, 0, 0, 0]),
}


@each([case for case in (*SOFTMAX_LOSSES, *OF_DISTRIBUTIONS) if case.name != SU.name])
def test_infinite_logits_among_classes(case):
    """The limits; of the literal form, where they depend on the path, none is promised."""
    logits, true_loss, true_slope = map(np.float32, zip(*AMONG_CLASSES.values(), strict=True))
    first = np.zeros(len(logits), np.int32)
    labels = first if of_ids(case) else np.eye(4, dtype=np.float32)[first]
    loss, slope = loss_and_slope(case, logits, labels)
    np.testing.assert_array_equal(loss, true_loss)
    np.testing.assert_array_equal(slope, true_slope)


@each(FORMS)
def test_nan_logits_and_labels_among_classes(case):
    logits, labels = (a.copy() for a in case.data.values())
    logits[0, 0, 1] = logits[1, 2, 3] = np.nan
    bad = np.isnan(logits).any(-1)
    if not of_ids(case):
        labels[1, 1, 2] = np.nan
    loss, slope = loss_and_slope(case, logits, labels)
    loud = bad | (np.isnan(labels).any(-1) if labels.ndim == 3 else bad)
    assert jnp.array_equal(jnp.isnan(loss), loud)
    assert jnp.all(jnp.isnan(slope[bad]))
    assert jnp.all(jnp.isfinite(slope[0, 1:]))


@each(FORMS)
def test_one_class_is_always_right(case):
    logits = np.array([[5.0], [-3e38], [0.0]], np.float32)
    labels = np.zeros(3, np.int32) if of_ids(case) else np.array([[1], [0.5], [0]], np.float32)
    for out in loss_and_slope(case, logits, labels):
        assert jnp.all(out == 0)


@each(FORMS[::3])
def test_large_finite_logits_among_classes(case):
    sizes = np.array([0, -1e-45, 1, -1e30, 8e37, -8e37], np.float32)
    logits = np.stack([a.ravel() for a in np.meshgrid(sizes, sizes, sizes[::-2])], -1)
    labels = np.arange(len(logits)) % 3
    if not of_ids(case):
        labels = np.eye(3, dtype=np.float32)[labels] * 0.5 + 0.125
    for out in loss_and_slope(case, logits, labels):
        assert jnp.all(jnp.isfinite(out))


@each([FOCAL, SOFTMAX_FOCAL])
def test_a_flax_variable_is_a_hyper_parameter_like_any_other(case):
    class Learned(nnx.Module):
        def __init__(self):
            self.gamma = nnx.Param(jnp.float32(2))

    def loss(gamma):
        return case(*case.data.values(), gamma=gamma).sum()

    with jax.numpy_dtype_promotion("standard"):
        by_module = nnx.jit(nnx.grad(lambda model: loss(model.gamma)))(Learned())
    np.testing.assert_allclose(by_module.gamma[...], jax.grad(loss)(2.0), 1e-6)


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


def test_alpha_out_of_range():
    for case, value in itertools.product(LOSSES, RANGES["alpha"][1]):
        with pytest.raises(ValueError, match=rf"^alpha must be in \[0, 1\], got .*{value:g}"):
            case(LOGITS, LABELS, alpha=value)
    with pytest.raises(ValueError, match=r"got -1.*: for no weights give alpha=None"):
        FOCAL(LOGITS, LABELS, alpha=-1)  # torchvision's "no weights"
    for case, value in itertools.product(FORMS, (-0.1, INFINITE, NOT_A_NUMBER)):
        with pytest.raises(ValueError, match=r"^alpha must be at least 0 and finite, got"):
            case(*case.data.values(), alpha=np.array([1, 2, value, 0.5], np.float32))


def test_the_ends_of_the_ranges_are_taken():
    for case in CASES:
        for value in case.valid:
            jax.eval_shape(partial(case, **{case.parameter: value}), *case.data.values())
    for alpha in RANGES["alpha"][0]:
        jax.eval_shape(partial(FOCAL, alpha=alpha), LOGITS, LABELS)


def test_traced_hyper_parameters_are_let_through():
    for case in (*CASES[:3], SOFTMAX_FOCAL):
        for name in (case.parameter, "alpha"):
            shape = 4 if case is SOFTMAX_FOCAL and name == "alpha" else ()
            traced = jnp.full(shape, -1, jnp.float32)
            jax.eval_shape(lambda v, c=case, n=name: c(*c.data.values(), **{n: v}), traced)


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


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_and_dtypes(wrong):
    cases, data, options, said = WRONG[wrong]
    for case in cases:
        with pytest.raises(AssertionError) as error:
            jax.jit(case, static_argnames="axis")(*data[: len(case.data)], **options)
        assert all(part in str(error.value) for part in said), str(error.value)


@each(SOFTMAX)
def test_an_axis_that_is_not_there(case):
    for axis in (3, -4):
        said = rf"^axis must be one of the 3 axes of logits, .*\(2, 3, 4\), got {axis}"
        with pytest.raises(ValueError, match=said):
            case(*case.data.values(), axis=axis)
    for labels in (0, 1.0):
        with pytest.raises(ValueError, match=r"axes of logits, whose shape is \(\)"):
            case(0.5, labels)


@each([*EVERY_LOSS, *MODULATIONS])
def test_a_hyper_parameter_of_another_shape(case):
    value = np.full(4, case.valid[0], np.float32)
    with pytest.raises(AssertionError, match=rf"{case.parameter} must be .*\(2, 3\).*\(4,\).*vmap"):
        case(*case.data.values(), **{case.parameter: value})


def test_other_data_of_the_wrong_kind():
    with pytest.raises(AssertionError, match=r"counts must be a vector .*\(1, 3\)"):
        focaljax.class_balanced_weights(LABELS[:1])
    with pytest.raises(AssertionError, match="margin must be floating point, got int32"):
        focaljax.focal_modulation(LABELS, gamma=2.0)
    with pytest.raises(AssertionError, match="loss must be floating point, got int32"):
        focaljax.reduce_mean(LABELS)
