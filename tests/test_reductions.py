"""What makes one number of a loss, here and across devices, and what balances classes."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import reference
from cases import (
    INFINITE,
    LABELS,
    LOSS,
    NOT_A_NUMBER,
    RANGES,
    REDUCTIONS,
    by_name,
)
from flax import nnx

import focaljax

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
    for dtype in (jnp.bool_, jnp.int8, jnp.uint8, jnp.bfloat16):
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


@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float16])
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


def test_counts_and_priors_known_beyond_float32():
    many = np.array([2**33 + 5, 7])
    true = reference.class_balanced_weights([mpmath.mpf(int(n)) for n in many], mpmath.mpf(0.999))
    np.testing.assert_allclose(focaljax.class_balanced_weights(many), np.array(true, float), 1e-6)
    near_one = 1 - 1e-9
    true = reference.log_odds(reference.EXACT.of(near_one))
    np.testing.assert_allclose(focaljax.prior_bias(near_one), float(true), 1e-6)


def test_a_prior_or_a_count_out_of_range():
    for value in RANGES["prior"][1]:
        for function in (focaljax.prior_bias, focaljax.prior_bias_init):
            with pytest.raises(ValueError, match=rf"^prior must be in \(0, 1\), got {value:g}"):
                function(value)
    for counts in ([1.0, -1.0], [NOT_A_NUMBER, 1.0], [-2, 3]):
        with pytest.raises(ValueError, match=r"^counts must be at least 0"):
            focaljax.class_balanced_weights(counts)
    assert jax.jit(focaljax.prior_bias)(jnp.float32(0.5)) == 0


def test_a_sum_over_many_axes_is_right_to_rounding():
    shape = (32, 32, 32, 10)
    loss = np.random.default_rng(0).lognormal(-9, 1, shape).astype(np.float32)
    exact = loss.astype(np.float64).sum()
    np.testing.assert_allclose(jax.jit(focaljax.reduce_mean)(loss), exact / loss.size, rtol=1e-6)
    found = jax.jit(focaljax.normalize_by_positives)(loss, np.zeros(shape))
    np.testing.assert_allclose(found, exact, rtol=1e-6)
