"""What every function takes, gives and refuses."""

import inspect
from functools import lru_cache

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from cases import (
    CASES,
    FOCAL,
    INFINITE,
    LABELS,
    LOGITS,
    LOSS,
    LOSSES,
    MODULATIONS,
    NOT_A_NUMBER,
    RANGES,
    REDUCTIONS,
    REQUIRED,
    SOFT,
    by_name,
)
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import focaljax

each_loss = pytest.mark.parametrize("case", LOSSES, ids=by_name)
each_modulation = pytest.mark.parametrize("case", MODULATIONS, ids=by_name)
WITH_LABELS = [case for case in CASES if "labels" in case.data]
ELEMENTWISE = [case for case in CASES if {"logits", "margin"} & set(case.data)]
WITH_MASK = [case for case in CASES if "where" in case.options]


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
    assert {case.name for case in CASES} == public


# --- shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("case", ELEMENTWISE, ids=by_name)
def test_the_shape_is_kept(case, shape):
    data = [jnp.ones(shape, np.asarray(value).dtype) for value in case.data.values()]
    out, pull = jax.vjp(jax.jit(case), *data)
    assert isinstance(out, jax.Array)
    assert out.shape == pull(out)[0].shape == shape


@each_loss
def test_python_numbers_and_numpy_arrays_are_taken(case):
    as_array = case(jnp.array([0.5, -1.0]), jnp.array([1, 0]))
    assert jnp.array_equal(case(np.array([0.5, -1.0], np.float32), np.array([1, 0])), as_array)
    assert case(0.5, 1) == as_array[0]
    assert case(0.5, True) == as_array[0]


@each_loss
@pytest.mark.parametrize("name", ["parameter", "alpha"])
def test_options_broadcast_against_the_loss(case, name):
    name = case.parameter if name == "parameter" else name
    values = np.array(RANGES[name][0][:3], np.float32)
    per_class = case(LOGITS, LABELS, **{name: values})
    per_row = case(LOGITS, LABELS, **{name: values[:2, None]})
    everywhere = case(LOGITS, LABELS, **{name: np.broadcast_to(values, LOGITS.shape)})
    assert jnp.array_equal(per_class, everywhere)
    for i, row in enumerate(LOGITS):
        for j, x in enumerate(row):
            y = LABELS[i, j]
            np.testing.assert_allclose(per_class[i, j], case(x, y, **{name: values[j]}), 2e-6)
            np.testing.assert_allclose(per_row[i, j], case(x, y, **{name: values[i]}), 2e-6)


@each_loss
def test_alpha_weighs_positives_and_the_rest_negatives(case):
    plain = case(LOGITS, LABELS)
    np.testing.assert_allclose(
        case(LOGITS, LABELS, alpha=0.2), plain * np.where(LABELS == 1, 0.2, 0.8), 1e-6
    )
    soft = np.full(LOGITS.shape, 0.75, np.float32)
    balance = np.float32(0.2 * 0.75 + 0.8 * 0.25)
    np.testing.assert_allclose(case(LOGITS, soft, alpha=0.2), balance * case(LOGITS, soft), 1e-6)


# --- dtypes ---------------------------------------------------------------------------------------

NARROW = [jnp.bfloat16, jnp.float16, jnp.float32]
LABEL_DTYPES = [jnp.bool_, jnp.int8, jnp.uint8, jnp.int32, jnp.float32, jnp.bfloat16, jnp.float16]
names = {"ids": lambda value: getattr(value, "__name__", None)}


def dtypes(case, x, y, **options):
    """Of a loss and of its gradient, from the trace alone."""

    def loss_and_slope(x, y):
        loss, pull = jax.vjp(lambda x: case(x, y, **options), x)
        return loss, *pull(loss)

    return {out.dtype for out in jax.eval_shape(loss_and_slope, x, y)}


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, **names)
@pytest.mark.parametrize("logit_dtype", NARROW, **names)
@each_loss
def test_the_dtype_is_that_of_the_logits(case, logit_dtype, label_dtype):
    x, y = jnp.asarray(LOGITS, logit_dtype), jnp.asarray(LABELS, label_dtype)
    options = dict.fromkeys((case.parameter, "alpha"), jnp.full(3, 0.5, jnp.float32))
    where = jnp.ones(x.shape, bool)
    scalars = {name: value[0] for name, value in options.items()}
    for chosen in ({}, {"where": where, **options}, scalars):
        assert dtypes(case, x, y, **chosen) == {jnp.dtype(logit_dtype)}
    # and it is the loss in float32, rounded once
    wide = case(x.astype(jnp.float32), LABELS)
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
    for label_dtype in LABEL_DTYPES:
        y = jnp.asarray(LABELS, label_dtype)
        assert focaljax.sigmoid_margin(jnp.asarray(LOGITS, dtype), y).dtype == dtype
        assert focaljax.sigmoid_margin(jnp.asarray(LOGITS, jnp.bfloat16), y).dtype == jnp.bfloat16


@pytest.mark.parametrize("label_dtype", [jnp.bool_, jnp.int64, jnp.float32, jnp.float64], **names)
@each_loss
def test_double_precision_stays(case, label_dtype, float64):
    x, y = jnp.asarray(LOGITS, jnp.float64), jnp.asarray(LABELS, label_dtype)
    single = jnp.float32(0.5)
    for options in ({}, {case.parameter: single, "alpha": single}):
        assert dtypes(case, x, y, **options) == {jnp.dtype(jnp.float64)}
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


@lru_cache
def masked_derivatives(case):
    """Loss, its derivatives in every argument, and the second in each logit."""

    def loss(x, y, value, alpha, where):
        return case(x, y, **{case.parameter: value}, alpha=alpha, where=where)

    def slope(*arguments):
        return jax.grad(lambda *a: loss(*a).sum(), (0, 1, 2, 3))(*arguments)

    def everything(x, *rest):
        bend = jax.grad(lambda x: slope(x, *rest)[0].sum())(x)
        return loss(x, *rest), *slope(x, *rest), bend

    return jax.jit(everything)


@pytest.mark.parametrize("under", UNDER_THE_MASK)
@pytest.mark.parametrize("value", [0.5, 0.75])
@each_loss
def test_nothing_passes_the_mask(case, under, value):
    x, y = (np.array(a, np.float32) for a in (LOGITS, LABELS))
    kept = np.array([[True, False, True], [True, True, False]])
    x[~kept], y[~kept] = UNDER_THE_MASK[under]
    value, alpha = np.full(x.shape, value, np.float32), np.full(x.shape, 0.25, np.float32)
    found = masked_derivatives(case)(x, y, value, alpha, kept)
    clean = masked_derivatives(case)(LOGITS, LABELS.astype(np.float32), value, alpha, kept | True)
    names = ("loss", "in logits", "in labels", "in parameter", "in alpha", "second")
    for name, got, true in zip(names, found, clean, strict=True):
        assert jnp.all(got[~kept] == 0), name
        np.testing.assert_allclose(got[kept], true[kept], 1e-6, err_msg=name)


@each_loss
def test_an_integer_ignore_id_under_the_mask(case):
    labels = np.array([[1, -100, 0], [-1, 1, 0]], np.int32)
    loss = case(LOGITS, labels, where=labels >= 0)
    assert jnp.array_equal(loss == 0, (labels < 0))


@each_loss
def test_all_true_is_no_mask(case):
    everything = np.ones(LOGITS.shape, bool)
    for options in ({}, {"alpha": 0.25}):
        masked = case(LOGITS, LABELS, where=everything, **options)
        assert jnp.array_equal(masked, case(LOGITS, LABELS, **options))


# --- edges ----------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], **names)
def test_infinite_logits(case, traced, dtype):
    x = jnp.array([INFINITE, -INFINITE, -INFINITE, INFINITE], dtype)
    y = jnp.array([1, 0, 1, 0])
    for value in case.valid:
        value = jnp.float32(value) if traced else value
        loss, pull = jax.vjp(jax.jit(lambda x, v=value: case(x, y, **{case.parameter: v})), x)
        (slope,) = pull(jnp.ones_like(loss))
        np.testing.assert_array_equal(loss, jnp.array([0, 0, INFINITE, INFINITE], dtype))
        np.testing.assert_array_equal(slope, jnp.array([0, 0, -1, 1], dtype))


@each_loss
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
    x = jnp.array([big, -big, 1e30, -1e30, 1e-45, -1e-45, 0.0, -0.0])
    for y in (jnp.ones(8), jnp.zeros(8), jnp.full(8, 0.5)):
        data = [x, y][: len(case.data)]
        loss, pull = jax.vjp(jax.jit(lambda x, data=data: case(x, *data[1:])), x)
        assert jnp.all(jnp.isfinite(loss))
        assert jnp.all(jnp.isfinite(pull(jnp.ones_like(loss))[0]))


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


@each_loss
@pytest.mark.parametrize("value", RANGES["alpha"][1])
def test_alpha_out_of_range(case, value):
    with pytest.raises(ValueError, match=rf"^alpha must be in \[0, 1\], got .*{value:g}"):
        case(LOGITS, LABELS, alpha=value)


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
}  # fmt: skip


@pytest.mark.parametrize("jitted", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_shapes_and_dtypes(wrong, jitted):
    cases, data, options, said = WRONG[wrong]
    for case in cases:
        call = jax.jit(case) if jitted else case
        with pytest.raises(AssertionError) as error:
            call(*data[: len(case.data)], **options)
        assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.parametrize("case", [*LOSSES, *MODULATIONS], ids=by_name)
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


def test_a_flax_variable_is_a_hyper_parameter_like_any_other():
    class Learned(nnx.Module):
        def __init__(self):
            self.gamma = nnx.Param(jnp.float32(2))

    def loss(gamma):
        return focaljax.sigmoid_focal_loss(jnp.float32(1), 1, gamma=gamma)

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
