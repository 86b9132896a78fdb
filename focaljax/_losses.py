"""The losses, a line of the margin each, and what they weigh cross entropy by.

A line takes a `Margin` and the loss's own parameter: a Python float where that is a known multiple
of one half, whose powers are products and a root, and otherwise an array.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from focaljax import _checks
from focaljax._pointwise import Margin, log, margin_at, over, power, wide

_Number = float | jax.Array


def cross_entropy(at: Margin) -> jax.Array:
    return -at.log_p


def focal(at: Margin, gamma: _Number) -> jax.Array:
    return -focal_weight(at, gamma) * at.log_p


def soft_truncation(at: Margin, k: _Number) -> jax.Array:
    return -soft_truncation_weight(at, k) * at.log_p


def hard_threshold(at: Margin, threshold: _Number) -> jax.Array:
    return jnp.where(at.p > number(threshold), 0.0, cross_entropy(at))


def poly1(at: Margin, gamma: _Number, epsilon: _Number) -> jax.Array:
    return focal(at, gamma) + number(epsilon) * focal_weight(at, gamma) * at.q


def reduced_focal(at: Margin, gamma: _Number, threshold: _Number) -> jax.Array:
    relative = jnp.minimum(at.q / (1 - number(threshold)), 1)
    return -_power_of(relative, gamma) * at.log_p


def focal_star(at: Margin, steepness: _Number, offset: _Number) -> jax.Array:
    scaled: Margin = margin_at(number(steepness) * at.z + number(offset))
    return -scaled.log_p / number(steepness)


# --- lines of the margin of a positive and of a label between 0 and 1 -----------------------------
# `of_weight` is applied to the weight: nothing, or a stop to its gradient.

_OfWeight = Callable[[jax.Array], jax.Array]


def binary_cross_entropy(at: Margin, label: jax.Array) -> jax.Array:
    return -(label * at.log_p + (1 - label) * at.log_q)


def quality_focal(at: Margin, label: jax.Array, of_weight: _OfWeight, beta: _Number) -> jax.Array:
    difference = jnp.abs(label * at.q - (1 - label) * at.p)
    return of_weight(_power_of(difference, beta)) * binary_cross_entropy(at, label)


def varifocal(
    at: Margin, label: jax.Array, of_weight: _OfWeight, alpha: _Number, gamma: _Number
) -> jax.Array:
    of_negative = number(alpha) * _power_of(at.p, gamma)
    weight = of_weight(jnp.where(label > 0, label, of_negative))
    return weight * binary_cross_entropy(at, label)


def _towards(at: Margin, log_target: jax.Array) -> jax.Array:
    """Cross entropy of a target, by its logarithm: 1 - target loses digits where it is near 1."""
    return -(jnp.exp(log_target) * at.log_p - jnp.expm1(log_target) * at.log_q)


def matchability(at: Margin, label: jax.Array, of_weight: _OfWeight, gamma: _Number) -> jax.Array:
    of_other = (1 - label) * of_weight(_power_of(at.p, gamma)) * -at.log_q
    return jnp.where(label > 0, _towards(at, number(gamma) * log(label)), of_other)


def iou_aware(
    at: Margin, label: jax.Array, of_weight: _OfWeight, mixing: _Number, gamma: _Number
) -> jax.Array:
    mixed = number(mixing) * at.log_p + (1 - number(mixing)) * log(label)
    log_target = lax.stop_gradient(jnp.maximum(mixed, float(np.log(0.01))))
    of_other = (1 - label) * of_weight(_power_of(at.p, gamma)) * -at.log_q
    return jnp.where(label > 0, _towards(at, log_target), of_other)


def gaussian_focal(
    at: Margin, label: jax.Array, of_weight: _OfWeight, alpha: _Number, beta: _Number
) -> jax.Array:
    of_peak = of_weight(_power_of(at.q, alpha)) * -at.log_p
    of_other = _power_of(1 - label, beta) * of_weight(_power_of(at.p, alpha)) * -at.log_q
    return jnp.where(label == 1, of_peak, of_other)


def asymmetric(
    at: Margin,
    label: jax.Array,
    of_weight: _OfWeight,
    gamma_positive: _Number,
    gamma_negative: _Number,
    margin: _Number,
) -> jax.Array:
    of_positive = of_weight(_power_of(at.q, gamma_positive)) * -at.log_p
    shifted = jnp.maximum(at.p - number(margin), 0)
    rest = at.q + number(margin)  # where shifted is not 0, 1 - shifted with the digits of q
    log_rest = jnp.where(number(margin) == 0, at.log_q, -jnp.log1p(over(shifted, rest)))
    of_negative = of_weight(_power_of(shifted, gamma_negative)) * -log_rest
    return label * of_positive + (1 - label) * of_negative


def smoothed_focal(
    at: Margin,
    label: jax.Array,
    of_weight: _OfWeight,
    gamma: _Number,
    label_smoothing: _Number,
) -> jax.Array:
    weight = of_weight(_power_of(label * at.q + (1 - label) * at.p, gamma))
    smoothed = label + number(label_smoothing) * (0.5 - label)
    return weight * binary_cross_entropy(at, smoothed)


# --- weights --------------------------------------------------------------------------------------


def focal_weight(at: Margin, gamma: _Number) -> jax.Array:
    """The modulating factor (1 - p)^gamma."""
    return power(at.q, gamma) if isinstance(gamma, float) else jnp.exp(gamma * at.log_q)


def soft_truncation_weight(at: Margin, k: _Number) -> jax.Array:
    """The modulating factor sigmoid(-k z)."""
    weight: jax.Array
    if isinstance(k, float) and k >= 1:
        _, weight = _sigmoids(k, at, None)
    else:  # the root of p would be 0 where p is
        _, weight = _sigmoids(None, at, jnp.asarray(number(k), at.z.dtype))
    return weight


def hard_threshold_weight(at: Margin, threshold: _Number) -> jax.Array:
    """1 where p <= threshold, 0 above, NaN at NaN."""
    threshold = number(threshold)
    return jnp.where(at.p > threshold, 0.0, jnp.where(at.p <= threshold, 1.0, at.p))


def number(parameter: _Number) -> _Number:
    """A known parameter as the Python number that takes any dtype."""
    return float(parameter) if isinstance(parameter, float) else parameter


def _power_of(base: jax.Array, exponent: _Number) -> jax.Array:
    """A power of a number in [0, 1], 0 ** 0 is 1."""
    if isinstance(exponent, float) and exponent <= 16 and 2 * exponent == round(2 * exponent):
        return power(base, exponent)
    return jnp.exp(number(exponent) * log(base))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
@partial(jax.jit, static_argnums=(0,))
def _sigmoids(
    exponent: float | None, at: Margin, k: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """sigmoid(k z) and sigmoid(-k z), with k as the exponent where it is a float."""
    if exponent is not None:
        p, q = power(at.p, exponent), power(at.q, exponent)
        scale = 1 / (p + q)
        return p * scale, q * scale
    assert k is not None
    exp_size = jnp.exp(-k * jnp.abs(at.z))
    likely = 1 / (1 + exp_size)
    unlikely = exp_size * likely
    positive = at.z >= 0
    return jnp.where(positive, likely, unlikely), jnp.where(positive, unlikely, likely)


@_sigmoids.defjvp
def _sigmoids_jvp(
    exponent: float | None,
    primals: tuple[Margin, Any],
    tangents: tuple[Margin, Any],
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    (at, k), (by, by_k) = primals, tangents
    p, q = _sigmoids(exponent, *primals)
    slope = p * q * (k * by.z + at.z * by_k if exponent is None else number(exponent) * by.z)
    return (p, q), (slope, -slope)


def focal_modulation(margin: ArrayLike, *, gamma: ArrayLike) -> jax.Array:
    r"""The weight of focal loss, :math:`\sigma(-z)^\gamma`, also called the modulating factor.

    Args:
      margin: floating point, any shape; see `sigmoid_margin`.
      gamma: at least 0; a number, or an array that broadcasts against the margin.

    Returns:
      Weights in [0, 1], in the shape and dtype of `margin`; computed in at least float32.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a gamma known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.focal_modulation(jnp.array([-1.0, 0.0, 1.0]), gamma=2.0))
      [0.534 0.25  0.072]

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 4.
    """
    return _weight(focal_weight, margin, "gamma", gamma)


def soft_truncation_modulation(margin: ArrayLike, *, k: ArrayLike) -> jax.Array:
    r"""The weight of soft truncation, :math:`\sigma(-K z)`.

    Args:
      margin: floating point, any shape; see `sigmoid_margin`.
      k: above 0; a number, or an array that broadcasts against the margin.

    Returns:
      Weights in [0, 1], in the shape and dtype of `margin`; computed in at least float32.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a k known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.soft_truncation_modulation(jnp.array([-1.0, 0.0, 1.0]), k=2.0))
      [0.881 0.5   0.119]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017).
    """
    return _weight(soft_truncation_weight, margin, "k", k)


def hard_threshold_modulation(margin: ArrayLike, *, threshold: ArrayLike) -> jax.Array:
    r"""The weight of the hard threshold: 1 where :math:`\sigma(z) \le m`, else 0.

    Args:
      margin: floating point, any shape; see `sigmoid_margin`.
      threshold: m, in (0, 1); a number, or an array that broadcasts against the margin.

    Returns:
      Weights 0 or 1, in the shape and dtype of `margin`; NaN where the margin is. The gradient
      is 0.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a threshold known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> margin = jnp.array([-1.0, 0.0, 1.0])
      >>> print(focaljax.hard_threshold_modulation(margin, threshold=0.5))
      [1. 1. 0.]

    References:
      Su Jianlin, kexue.fm archives 4293 (2017).
    """
    return _weight(hard_threshold_weight, margin, "threshold", threshold)


def _weight(
    weight: Callable[[Margin, _Number], jax.Array],
    margin: ArrayLike,
    name: str,
    value: ArrayLike,
) -> jax.Array:
    margin = _checks.array("margin", margin)
    _checks.floating("margin", margin)
    z = margin.astype(wide(margin.dtype))
    parameter = _checks.parameter(name, value, z)
    return weight(margin_at(z), parameter).astype(margin.dtype)
