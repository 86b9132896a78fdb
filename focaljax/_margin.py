"""Logits and labels to the margin: the logit of the true label against the rest.

Among many classes it is ``z = x - log(sum of exp of the other logits)``. The others, and not all
of them, since 1 - p_t = sigma(-z) is theirs: taken from p_t it loses its digits as p_t nears 1.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.typing import ArrayLike

from focaljax import _checks
from focaljax._modulation import wide


def sigmoid_margin(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    r"""The margin of independent yes-or-no labels, positive where the logit is right.

    .. math::
        z = (2y - 1)\, x

    Then :math:`p_t = \sigma(z)` is the probability of the true label and
    :math:`\mathrm{softplus}(-z)` its cross entropy.

    Args:
      logits: floating point, any shape; the log-odds of the positive.
      labels: exactly the shape of `logits`; 0 or 1, of any integer, boolean or floating dtype.

    Returns:
      The margins, in the shape and dtype of `logits`.

    Raises:
      AssertionError: when a shape or dtype is not as above.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_margin(jnp.array([2.0, -3.0]), jnp.array([1, 1])))
      [ 2. -3.]
    """
    logits, labels = sigmoid_arrays(logits, labels)
    return logits * (2 * labels.astype(logits.dtype) - 1)


def sigmoid_arrays(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """`logits` and `labels` of a sigmoid head as arrays, checked."""
    logits, labels = _checks.array("logits", logits), _checks.array("labels", labels)
    _checks.floating("logits", logits)
    _checks.real("labels", labels)
    _checks.same_shape(
        "labels",
        labels,
        "logits",
        logits,
        "nothing is broadcast; class ids become jax.nn.one_hot(ids, num_classes), a missing last "
        "axis labels[..., None]",
    )
    return logits, labels


def softmax_margin(logits: ArrayLike, labels: ArrayLike, *, axis: int = -1) -> jax.Array:
    r"""The margin of the true class against all others together.

    .. math::
        z = x_t - \log \sum_{j \ne t} e^{x_j}

    Then :math:`p_t = \mathrm{softmax}(x)_t = \sigma(z)` is the probability of the true class and
    :math:`\mathrm{softplus}(-z)` its cross entropy. It is positive where :math:`p_t > 1/2`, which
    with more than two classes is more than being the highest. Classes to leave out get -inf logits.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`.
      labels: class ids, integers in the shape of `logits` without `axis`; or distributions over the
        classes, of any real dtype in the shape of `logits`, for which this is
        :math:`\sum_c y_c z_c`: of a one-hot label, the margin of its class.
      axis: the axis of the classes.

    Returns:
      The margins, in the shape of `logits` without `axis` and its dtype; computed in at least
      float32. NaN for an id outside [0, C).

    Raises:
      AssertionError: when a shape or dtype is not as above.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.softmax_margin(jnp.array([[2.0, 0.0, 0.0]]), jnp.array([0])))
      [1.307]
    """
    logits, labels = softmax_arrays(logits, labels, axis)
    dtype, axis = logits.dtype, axis % logits.ndim
    logits = logits.astype(wide(dtype))
    if labels.ndim < logits.ndim:
        return margin_of(logits, labels, axis, exact=dtype == logits.dtype).value.astype(dtype)
    labels = labels.astype(logits.dtype)
    of_classes = margins_of(logits, leading_of(logits, axis), axis)
    return jnp.sum(labels * jnp.where(labels == 0, 0, of_classes), axis).astype(dtype)


def softmax_arrays(logits: ArrayLike, labels: ArrayLike, axis: int) -> tuple[jax.Array, jax.Array]:
    """`logits` and `labels` of a softmax head as arrays, checked; class ids as int32."""
    logits, labels = _checks.array("logits", logits), _checks.array("labels", labels)
    _checks.floating("logits", logits)
    _checks.axis(axis, logits)
    if labels.ndim == logits.ndim:
        _checks.real("labels", labels)
        _checks.same_shape(
            "labels",
            labels,
            "logits",
            logits,
            "labels of the same rank are distributions, as of jax.nn.one_hot(ids, num_classes, "
            "axis=axis); class ids have one axis less, as labels[..., 0] has",
        )
        return logits, labels
    _checks.class_ids(labels, logits, axis)
    ids = labels.astype(jnp.int32)
    return logits, jnp.where(ids.astype(labels.dtype) == labels, ids, -1)


def along_classes(name: str, values: ArrayLike, logits: jax.Array, axis: int) -> jax.Array:
    """A vector with an entry for each class, beside `logits` and in the dtype they need."""
    array = _checks.numbers(name, values)
    _checks.real(name, array)
    _checks.per_class(name, array, logits.shape[axis])
    others = [i for i in range(logits.ndim) if i != axis % logits.ndim]
    return jnp.expand_dims(array.astype(wide(logits.dtype)), others)


class Margin(NamedTuple):
    """The margin of one class in each example, and what its slope is made of."""

    value: jax.Array
    rest: jax.Array | None  # what rounding took from `value`, where that may show in a loss
    logit: jax.Array  # of that class
    # another class has the share exp(its logit - top) * scale of what that class leaves
    top: jax.Array
    scale: jax.Array


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def margin_of(logits: jax.Array, ids: jax.Array | None, axis: int, exact: bool) -> Margin:
    """The margin of class `ids`, by default the leading one; NaN where there is no such class.

    To the last digit where `exact`: half precision shows less, and costs less without the `rest`.
    """
    logit, _, top, total, carry = _log_sum_exp(logits, ids, axis, exact)
    alone = top == jnp.finfo(top.dtype).min
    total = jnp.where(alone, 1, total)
    # NaN with the margin, and so its slope
    scale = jnp.where(jnp.isnan(logit), logit, (1 - carry / total) / total)
    if not exact:
        value = jnp.where(alone, logit + jnp.inf, logit - top - jnp.log(total))
        return Margin(value, None, logit, top, scale)
    # log(total) in two parts: where a loss is nearly 0, it multiplies the error of its margin
    mantissa, exponent = jnp.frexp(total)
    exponent = (exponent - 1).astype(total.dtype)
    coarse = 355 / 512  # log(2) in so few bits that its multiples are exact
    value, first = _add(logit, -top)
    value, second = _add(value, -coarse * exponent)
    value, third = _add(value, -(jnp.log1p(2 * mantissa - 1) + (math.log(2) - coarse) * exponent))
    rest = first + second + third - carry / total
    value = jnp.where(alone, logit + jnp.inf, value)
    return Margin(value, jnp.where(jnp.isfinite(rest), rest, 0), logit, top, scale)


@margin_of.defjvp
def _margin_of_jvp(
    axis: int,
    exact: bool,
    primals: tuple[jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, ...],
) -> tuple[Margin, Margin]:
    logits, move = primals[0], tangents[0]
    margin = margin_of(*primals, axis, exact)
    ids = _leading_class(logits, axis) if primals[1] is None else primals[1]
    hit = is_class(logits, ids, axis)
    others = jnp.where(hit, -jnp.inf, logits)
    exponentials = exp_from(others, margin.top, margin.scale, axis)
    # scaled after the sum, and so before it where this is transposed: by example, not by class
    slope = jnp.sum(jnp.where(hit, move, 0), axis) - margin.scale * jnp.sum(
        exponentials * move, axis
    )
    still = jax.tree.map(jnp.zeros_like, margin)
    return margin, still._replace(value=slope)


def _leading_class(logits: jax.Array, axis: int) -> jax.Array:
    """The class of the highest logit: a part of `margin_of`, which compilers compute only once."""
    return _log_sum_exp(lax.stop_gradient(logits), None, axis, exact=True)[1]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def exp_from(logits: jax.Array, top: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """exp(logits - top); times `scale`, the softmax."""
    del scale  # the derivative's
    return exp_difference(logits, jnp.expand_dims(top, axis))


@exp_from.defjvp
def _exp_from_jvp(
    axis: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    exponentials = exp_from(*primals, axis)
    mean = jnp.expand_dims(primals[2] * jnp.sum(exponentials * tangents[0], axis), axis)
    return exponentials, exponentials * (tangents[0] - mean)


def share(logits: jax.Array, top: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """The softmax of `logits` whose log-sum-exp is `top - log(scale)`."""
    scale = lax.stop_gradient(scale)  # how it moves is in the derivative of `exp_from`
    return exp_from(logits, top, scale, axis) * jnp.expand_dims(scale, axis)


class Leading(NamedTuple):
    """The class of the highest logit in each example, of which alone 1 - p can be small."""

    ids: jax.Array
    margin: Margin
    p: jax.Array  # its probability


def leading_of(logits: jax.Array, axis: int) -> Leading:
    margin, ids = margin_of(logits, None, axis, exact=True), _leading_class(logits, axis)
    # of all other classes together
    odds = jnp.exp(-margin.value) * (1 - (0 if margin.rest is None else margin.rest))
    return Leading(ids, margin, 1 / (1 + odds))


def margins_of(logits: jax.Array, leading: Leading, axis: int) -> jax.Array:
    """The margins of all classes."""
    below = margins_below(logits, leading, axis)
    hit = is_class(logits, leading.ids, axis)
    return jnp.where(hit, jnp.expand_dims(leading.margin.value, axis), below)


def margins_below(logits: jax.Array, leading: Leading, axis: int) -> jax.Array:
    """The margins of the other classes: at most 0, so that their 1 - p can be had from p."""
    hit = is_class(logits, leading.ids, axis)
    return _margins_below(logits, hit, leading.margin.logit, leading.p, axis)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _margins_below(
    logits: jax.Array, hit: jax.Array, highest: jax.Array, p_highest: jax.Array, axis: int
) -> jax.Array:
    p = jnp.where(hit, 0, share(logits, highest, p_highest, axis))
    rest = jnp.log(1 - p) - jnp.expand_dims(jnp.log(p_highest), axis)
    return jnp.where(hit, 0, logits - jnp.expand_dims(highest, axis) - rest)


@_margins_below.defjvp
def _margins_below_jvp(
    axis: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    logits, hit, highest, p_highest = primals
    p = share(logits, highest, p_highest, axis)
    mean = jnp.sum(p * tangents[0], axis, keepdims=True)
    slopes = (tangents[0] - mean) / (1 - jnp.where(hit, 0, p))
    return _margins_below(*primals, axis), jnp.where(hit, 0, slopes)


def pull_terms(
    slopes: jax.Array, mass: jax.Array, logits: jax.Array, leading: Leading, axis: int
) -> tuple[jax.Array, jax.Array]:
    """What `pull` needs the sums of: the slopes over 1 - p but for the leading class, its mass."""
    hit = is_class(logits, leading.ids, axis)
    p = jnp.where(hit, 0, share(logits, leading.margin.logit, leading.p, axis))
    return jnp.where(hit, 0, slopes / (1 - p)), jnp.where(hit, mass, 0)


def pull(
    slopes: jax.Array,
    total: jax.Array,
    leading_slope: jax.Array,
    logits: jax.Array,
    leading: Leading,
    axis: int,
) -> jax.Array:
    """From the slopes in the margins to those in the logits."""
    hit = is_class(logits, leading.ids, axis)
    total, leading_slope = jnp.expand_dims(total, axis), jnp.expand_dims(leading_slope, axis)
    margin = leading.margin
    p = share(logits, margin.logit, leading.p, axis)
    others = share(jnp.where(hit, -jnp.inf, logits), margin.top, margin.scale, axis)
    own = slopes / (1 - jnp.where(hit, 0, p))
    return own - p * total - others * leading_slope


def is_class(logits: jax.Array, ids: jax.Array, axis: int) -> jax.Array:
    """Whether a logit is that of the class `ids`: a gather would not let classes be sharded."""
    classes = lax.broadcasted_iota(ids.dtype, logits.shape, axis)
    return classes == jnp.expand_dims(ids, axis)


def _add(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of a and b, and what rounding took from it."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def exp_difference(logits: jax.Array, top: jax.Array) -> jax.Array:
    """exp(logits - top), without the error of rounding the difference (up to 4e-6 in float32)."""
    bound = jnp.finfo(logits.dtype).max / 4  # for infinity, whose difference to itself is NaN
    difference, rounding = _add(jnp.clip(logits, -bound, bound), -jnp.clip(top, -bound, bound))
    # not exponentials + exponentials * rounding, whose second term underflows first
    return jnp.exp(difference) * (1 + rounding)


def _log_sum_exp(
    logits: jax.Array, ids: jax.Array | None, axis: int, exact: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | float]:
    """The logit of class `ids`, by default the highest; which class that is; and the others.

    Theirs is log(sum(exp)) = top + log(total + carry).
    """
    lowest = jnp.finfo(logits.dtype).min  # for -inf, of which the difference to itself is NaN
    classes = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    if _may_be_sharded(logits, axis):
        # maxima and sums, each of which is one small all-reduce
        if ids is None:
            level = logits == jnp.max(logits, axis, keepdims=True)
            ids = jnp.min(jnp.where(level, classes, logits.shape[axis] - 1), axis)
        hit = is_class(logits, ids, axis)
        logit = jnp.sum(jnp.where(hit, logits, 0), axis)
        logit = jnp.where((ids >= 0) & (ids < logits.shape[axis]), logit, jnp.nan)
        tops = jnp.where(hit, lowest, jnp.maximum(logits, lowest))
        top = jnp.max(tops, axis, keepdims=True)
        exponentials = exp_difference(tops, top)
        # so coarse that its sum is exact, of up to 2 ** 16 classes in float32
        coarse = jnp.round(256 * exponentials) / 256
        total, carry = _add(jnp.sum(coarse, axis), jnp.sum(exponentials - coarse, axis))
        return logit, ids, jnp.squeeze(top, axis), total, carry
    # one visit, where a maximum and then a sum would be two
    zero = jnp.zeros((), logits.dtype)
    ones, zeros = jnp.ones_like(logits), jnp.zeros_like(logits)
    if ids is None:
        last = jnp.int32(logits.shape[axis] - 1)
        logit, ids, top, total, carry = lax.reduce(
            (logits, classes, jnp.full_like(logits, lowest), zeros, zeros),
            (zero - jnp.inf, last, zero + lowest, zero, zero),
            _merge_leading,
            (axis,),
        )
        return logit, ids, top, total, carry
    hit = is_class(logits, ids, axis)
    tops = jnp.where(hit, lowest, jnp.maximum(logits, lowest))
    parts = 4 if exact else 3  # without the carry
    logit, top, total, *carry = lax.reduce(
        (jnp.where(hit, logits, jnp.nan), tops, ones, zeros)[:parts],
        (zero + jnp.nan, zero + lowest, zero, zero)[:parts],
        _merge,
        (axis,),
    )
    return logit, ids, top, total, carry[0] if exact else 0.0


_Others = tuple[jax.Array, ...]  # of log-sum-exp: top, total and, where it is exact, carry


def _merge_others(one: _Others, other: _Others) -> _Others:
    (top, total, *carry), (top_2, total_2, *carry_2) = one, other
    ahead = top >= top_2
    behind = jnp.exp(-jnp.abs(top - top_2))
    by, by_2 = jnp.where(ahead, 1, behind), jnp.where(ahead, behind, 1)
    total, rounding = _add(total * by, total_2 * by_2)
    carry = [a * by + b * by_2 + rounding for a, b in zip(carry, carry_2, strict=True)]
    return jnp.maximum(top, top_2), total, *carry


def _merge(one: _Others, other: _Others) -> _Others:
    """Two partial results as one, where NaN stands for a logit not met yet."""
    logit = jnp.where(jnp.isnan(one[0]), other[0], one[0])
    return logit, *_merge_others(one[1:], other[1:])


def _merge_leading(one: _Others, other: _Others) -> _Others:
    """Two partial results as one, where the lower of two leading logits joins the others."""
    (logit, ids), (logit_2, ids_2) = one[:2], other[:2]
    ahead = (logit > logit_2) | ((logit == logit_2) & (ids < ids_2))
    others = _merge_others(one[2:], other[2:])
    joins = jnp.maximum(jnp.where(ahead, logit_2, logit), jnp.finfo(logit.dtype).min)
    return (
        jnp.where(ahead, logit, logit_2),
        jnp.where(ahead, ids, ids_2),
        *_merge_others(others, (joins, jnp.ones_like(joins), jnp.zeros_like(joins))),
    )


def sums(terms: list[jax.Array], axis: int) -> list[jax.Array]:
    """The sums over the classes in one visit, rounded as if once."""
    if _may_be_sharded(terms[0], axis):
        return [jnp.sum(term, axis) for term in terms]
    zero = jnp.zeros((), terms[0].dtype)

    def merge(one: list[_Pair], other: list[_Pair]) -> list[_Pair]:
        merged = []
        for (total, carry), (total_2, carry_2) in zip(one, other, strict=True):
            total, rounding = _add(total, total_2)
            merged.append((total, carry + carry_2 + rounding))
        return merged

    pairs = [(term, jnp.zeros_like(term)) for term in terms]
    merged = lax.reduce(pairs, [(zero, zero)] * len(terms), merge, (axis,))
    return [jnp.where(jnp.isfinite(total), total + carry, total) for total, carry in merged]


_Pair = tuple[jax.Array, jax.Array]


def _may_be_sharded(logits: jax.Array, axis: int) -> bool:
    """Whether `axis` is, or where only the compiler knows may be, split over devices."""
    sharding = jax.typeof(logits).sharding
    mesh = sharding.mesh
    kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    automatic = any(kinds[name] == AxisType.Auto and mesh.shape[name] > 1 for name in kinds)
    return automatic or sharding.spec[axis] is not None
