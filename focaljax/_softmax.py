"""The losses of exclusive classes: images, pixels, tokens. The binary ones, at their margin."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from focaljax import _checks, _margin, _modulation


def softmax_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Focal loss for classes of which one is true: cross entropy that fades as it gets easy.

    With the probability of the true class :math:`p_t = \mathrm{softmax}(x)_t`, an example costs

    .. math::
        L = -(1 - p_t)^\gamma \log p_t

    which is the binary loss at the margin of `softmax_margin`, and :math:`\gamma = 0` is cross
    entropy. Two classes are `sigmoid_focal_loss` of the difference of their logits
    (of hard labels: soft ones enter that loss by another rule).

    Trained with it, the softmax is not the probability of the classes: `softmax_posterior` is.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`. -inf is a class
        that cannot be.
      labels: class ids, integers in the shape of `logits` without `axis`; or, told apart by their
        rank, distributions over the classes in the shape of `logits`, of any real dtype, such as
        one-hot, smoothed or mixed labels, at least 0, which is not checked. The loss is linear in
        them: :math:`\sum_c y_c L(z_c)`.
      gamma: the focusing parameter, at least 0; a number, or an array that broadcasts against the
        loss. May be traced, batched and differentiated. Above 15 the float32 error passes 2e-6.
      alpha: one weight per class, at least 0, shape (C,): of the true class, or in a distribution
        of each; see `class_balanced_weights`. None: all weigh 1.
      axis: the axis of the classes; 1 for images as NCHW.
      where: booleans; where False, the loss and every gradient are exactly 0, whatever stands there
        in `logits` and `labels`. In the shape of the loss it masks examples, such as pixels with an
        id to ignore (``where=labels != 255``; give the same to `reduce_mean`). In the shape of
        `logits` it masks classes, which then are not there: no probability is theirs, an id that
        names one gives NaN, the mass that a distribution gives one is dropped. Where all classes of
        an example are masked, so is the example.

    Returns:
      The loss of each example, not reduced, in the shape of `logits` without `axis` and its dtype;
      computed in at least float32. NaN, with a NaN gradient, for an id outside [0, C).

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when `axis`, or a gamma or alpha known at trace time, is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[4.0, 0.0, -1.0], [0.5, 1.0, 2.0]])
      >>> print(focaljax.softmax_focal_loss(logits, jnp.array([0, 0])))
      [1.478e-05 1.452e+00]

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 4, with the softmax in
      place of the sigmoid.
    """
    _checks.within("gamma", gamma, 0.0, open_high=True)
    return _softmax_loss(
        _modulation.focal,
        logits,
        labels,
        "gamma",
        gamma,
        alpha=alpha,
        axis=axis,
        where=where,
    )


def softmax_soft_truncation_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    k: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Soft truncation for classes of which one is true, in its log-odds form.

    .. math::
        L = -\sigma(-K z) \log \sigma(z), \qquad z = x_t - \log \sum_{j \ne t} e^{x_j}

    The binary loss at the margin of `softmax_margin`: its weight falls only as the true class gets
    ahead of all others together. Su Jianlin wrote another form for more than two classes, which
    can fall silent too early: `su_softmax_soft_truncation_loss`.

    Trained with it, the softmax is not the probability of the classes: `softmax_posterior` is.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`. -inf is a class
        that cannot be.
      labels: class ids, integers in the shape of `logits` without `axis`; or, told apart by their
        rank, distributions over the classes in the shape of `logits`, of any real dtype, such as
        one-hot, smoothed or mixed labels, at least 0, which is not checked. The loss is linear in
        them: :math:`\sum_c y_c L(z_c)`.
      k: the steepness K, above 0; a number, or an array that broadcasts against the loss. May be
        traced, batched and differentiated.
      alpha: one weight per class, at least 0, shape (C,): of the true class, or in a distribution
        of each; see `class_balanced_weights`. None: all weigh 1.
      axis: the axis of the classes; 1 for images as NCHW.
      where: booleans; where False, the loss and every gradient are exactly 0, whatever stands there
        in `logits` and `labels`. In the shape of the loss it masks examples, such as pixels with an
        id to ignore (``where=labels != 255``; give the same to `reduce_mean`). In the shape of
        `logits` it masks classes, which then are not there: no probability is theirs, an id that
        names one gives NaN, the mass that a distribution gives one is dropped. Where all classes of
        an example are masked, so is the example.

    Returns:
      The loss of each example, not reduced, in the shape of `logits` without `axis` and its dtype;
      computed in at least float32. NaN, with a NaN gradient, for an id outside [0, C).

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when `axis`, or a k or alpha known at trace time, is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[4.0, 0.0, -1.0], [0.5, 1.0, 2.0]])
      >>> print(focaljax.softmax_soft_truncation_loss(logits, jnp.array([0, 0])))
      [1.552e-05 1.913e+00]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017), for two classes.
    """
    _checks.within("k", k, 0.0, open_low=True, open_high=True)
    return _softmax_loss(
        _modulation.soft_truncation,
        logits,
        labels,
        "k",
        k,
        alpha=alpha,
        axis=axis,
        where=where,
    )


def softmax_hard_threshold_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: ArrayLike = 0.5,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Cross entropy for the examples not yet right enough, nothing for the others.

    .. math::
        L = -[p_t \le m] \log p_t, \qquad p_t = \mathrm{softmax}(x)_t

    The loss jumps by :math:`-\log m` at the threshold, and autodiff does not see the jump: no
    gradient tells the model to keep what it has got right. Best as fine-tuning.
    Trained with it, what the probability of a class has above the threshold is lost.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`. -inf is a class
        that cannot be.
      labels: class ids, integers in the shape of `logits` without `axis`; or, told apart by their
        rank, distributions over the classes in the shape of `logits`, of any real dtype, such as
        one-hot, smoothed or mixed labels, at least 0, which is not checked. The loss is linear in
        them: :math:`\sum_c y_c L(z_c)`.
      threshold: m, the probability of the true class above which an example no longer counts, in
        (0, 1); a number, or an array that broadcasts against the loss. May be traced and batched;
        its gradient is 0.
      alpha: one weight per class, at least 0, shape (C,): of the true class, or in a distribution
        of each; see `class_balanced_weights`. None: all weigh 1.
      axis: the axis of the classes; 1 for images as NCHW.
      where: booleans; where False, the loss and every gradient are exactly 0, whatever stands there
        in `logits` and `labels`. In the shape of the loss it masks examples, such as pixels with an
        id to ignore (``where=labels != 255``; give the same to `reduce_mean`). In the shape of
        `logits` it masks classes, which then are not there: no probability is theirs, an id that
        names one gives NaN, the mass that a distribution gives one is dropped. Where all classes of
        an example are masked, so is the example.

    Returns:
      The loss of each example, not reduced, in the shape of `logits` without `axis` and its dtype;
      computed in at least float32. NaN, with a NaN gradient, for an id outside [0, C).

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when `axis`, or a threshold or alpha known at trace time, is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[4.0, 0.0, -1.0], [0.5, 1.0, 2.0]])
      >>> print(focaljax.softmax_hard_threshold_loss(logits, jnp.array([0, 0])))
      [0. 1.9644]

    References:
      Su Jianlin, kexue.fm archives 4293 and 4733 (2017).
    """
    _checks.within("threshold", threshold, 0.0, 1.0, open_low=True, open_high=True)
    return _softmax_loss(
        _modulation.hard_threshold,
        logits,
        labels,
        "threshold",
        threshold,
        alpha=alpha,
        axis=axis,
        where=where,
    )


def su_softmax_soft_truncation_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    k: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Soft truncation for many classes as it was first written. Prefer the log-odds form.

    .. math::
        L = -\mathrm{softmax}(-K x)_t \log \mathrm{softmax}(x)_t

    Warning:
      With more than two classes its weight can vanish while the example is misclassified: one very
      unlikely wrong class is enough. At x = (0, 1, -20) and t = 0, p_t is 0.27 and the loss 2.7e-9.
      Training then leaves such examples wrong. `softmax_soft_truncation_loss` does not; with two
      classes both are the same at the same K.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`. -inf is a class
        that cannot be.
      labels: class ids, integers in the shape of `logits` without `axis`; or, told apart by their
        rank, distributions over the classes in the shape of `logits`, of any real dtype, such as
        one-hot, smoothed or mixed labels, at least 0, which is not checked. The loss is linear in
        them: :math:`\sum_c y_c L(z_c)`.
      k: K, above 0; a number, or an array that broadcasts against the loss. May be traced, batched
        and differentiated. The product K x is rounded, so only for a power of two is the result
        as exact as that of the other losses.
      alpha: one weight per class, at least 0, shape (C,): of the true class, or in a distribution
        of each; see `class_balanced_weights`. None: all weigh 1.
      axis: the axis of the classes; 1 for images as NCHW.
      where: booleans; where False, the loss and every gradient are exactly 0, whatever stands there
        in `logits` and `labels`. In the shape of the loss it masks examples, such as pixels with an
        id to ignore (``where=labels != 255``; give the same to `reduce_mean`). In the shape of
        `logits` it masks classes, which then are not there: no probability is theirs, an id that
        names one gives NaN, the mass that a distribution gives one is dropped. Where all classes of
        an example are masked, so is the example.

    Returns:
      The loss of each example, not reduced, in the shape of `logits` without `axis` and its dtype;
      computed in at least float32. NaN, with a NaN gradient, for an id outside [0, C).

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when `axis`, or a k or alpha known at trace time, is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[0.0, 1.0, -2.0], [0.0, 1.0, -20.0]])
      >>> print(focaljax.su_softmax_soft_truncation_loss(logits, jnp.array([0, 0])))
      [1.54e-01 2.71e-09]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017).
    """
    _checks.within("k", k, 0.0, open_low=True, open_high=True)
    return _softmax_loss(
        _modulation.literal, logits, labels, "k", k, alpha=alpha, axis=axis, where=where
    )


def _softmax_loss(
    modulation: _modulation.Modulation,
    logits: ArrayLike,
    labels: ArrayLike,
    name: str,
    value: ArrayLike,
    *,
    alpha: ArrayLike | None,
    axis: int,
    where: ArrayLike | None,
) -> jax.Array:
    logits, labels = _margin.softmax_arrays(logits, labels, axis)
    axis = axis % logits.ndim
    dtype = _modulation.wide(logits.dtype)
    example = jax.ShapeDtypeStruct(logits.shape[:axis] + logits.shape[axis + 1 :], dtype)
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, open_high=True)
        alpha = _margin.along_classes("alpha", alpha, logits, axis)
    loss: jax.Array = _loss(
        modulation,
        _modulation.small_whole_number(name, value),
        axis,
        logits,
        labels if labels.ndim < logits.ndim else labels.astype(dtype),
        _modulation.parameter(name, value, example),
        alpha,
        *_masks(where, logits, example, axis),
    )
    return loss


# Compiled also when the caller does not: there is too much of it to be run piece by piece.
@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _loss(
    modulation: _modulation.Modulation,
    power: int | None,
    axis: int,
    logits: jax.Array,
    labels: jax.Array,
    parameter: jax.Array,
    weights: jax.Array | None,
    classes: jax.Array | None,
    examples: jax.Array | None,
) -> jax.Array:
    dtype = _modulation.wide(logits.dtype)
    one_class = labels.ndim < logits.ndim  # and not a distribution
    if examples is not None:
        kept = possible = jnp.expand_dims(examples, axis)
        if classes is not None:
            kept, possible = classes, classes | ~possible
        labels = jnp.where(examples if one_class else kept, labels, 0)
        if classes is not None and one_class:
            named = _margin.is_class(logits, labels, axis) & possible
            labels = jnp.where(jnp.any(named, axis), labels, -1)

    def views(logits: jax.Array) -> tuple[jax.Array, ...]:
        """The logits that the margins are taken in: they, and for the literal form -K x before."""
        logits = logits.astype(dtype)
        if examples is not None:
            # before the loss: a NaN or an infinity masked only afterwards has a NaN gradient
            logits = jnp.where(kept, logits, 0)
        seen: tuple[jax.Array, ...] = (logits,)
        if modulation is _modulation.literal:
            absent = logits == -jnp.inf
            seen = jnp.where(absent, logits, -_beside(parameter, axis) * logits), logits
        if classes is not None:
            seen = tuple(jnp.where(possible, view, -jnp.inf) for view in seen)
        return seen

    cost = partial(_cost, modulation, power)
    seen = views(logits)
    if one_class:
        exact = dtype == logits.dtype
        margins = [_margin.margin_of(view, labels, axis, exact) for view in seen]
        at = tuple(margin.value for margin in margins)
        rests: tuple[jax.Array | None, ...] = tuple(margin.rest for margin in margins)
        if modulation is not _modulation.literal:
            at, rests = (parameter, *at), (None, *rests)
        loss = _modulation.refined(cost, at, rests)
        if weights is not None:
            hit = _margin.is_class(logits, labels, axis)
            loss = _of_mass(jnp.sum(jnp.where(hit, weights, 0), axis), loss, at[-1])
    else:
        if weights is not None:
            # where no mass is weighed, a weight has no slope, whatever the class would cost
            weights = jnp.where(labels == 0, lax.stop_gradient(weights), weights)
        mass = labels if weights is None else labels * weights
        if modulation is _modulation.literal:
            at = tuple(_margin.margins_of(v, _margin.leading_of(v, axis), axis) for v in seen)
            loss = jnp.sum(_of_mass(mass, cost(*at), at[1]), axis)
        else:
            # Given the logits once more, as if they were others, compilers compute what the slope
            # needs of a class in the visit that needs it, where they would write it out before.
            copy = lax.optimization_barrier(logits)
            copies = *views(copy), *views(lax.optimization_barrier(copy))
            loss = _expected(cost, axis, *seen, copies, mass, parameter)
    if examples is not None:
        loss = jnp.where(examples, loss, 0)
    return loss.astype(logits.dtype)


_Cost = Callable[[jax.Array, jax.Array], jax.Array]  # from parameter and margin
_Arguments = tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array, jax.Array]


def _cost(
    modulation: _modulation.Modulation, power: int | None, parameter: jax.Array, margin: jax.Array
) -> jax.Array:
    if parameter.ndim:
        parameter = jnp.broadcast_to(parameter, margin.shape)
    return _modulation.weighted_cross_entropy(
        modulation, power, margin, jnp.ones_like(margin), parameter
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _expected(
    cost: _Cost,
    axis: int,
    logits: jax.Array,
    copies: tuple[jax.Array, jax.Array],
    mass: jax.Array,
    parameter: jax.Array,
) -> jax.Array:
    """The costs of the classes times their `mass`, summed. The `copies` are for the slope."""
    return _margin.sums(_terms(cost, axis, logits, copies[0], mass, parameter), axis)[0]


@partial(_expected.defjvp, symbolic_zeros=True)
def _expected_jvp(
    cost: _Cost, axis: int, primals: _Arguments, tangents: _Arguments
) -> tuple[jax.Array, jax.Array]:
    logits, copies, mass, parameter = primals
    logits_move, _, mass_move, parameter_move = tangents
    moves = []
    if isinstance(logits_move, SymbolicZero):
        loss = _expected(cost, axis, *primals)
    else:
        loss, gradient = _with_gradient(cost, axis, *primals)
        moves.append(gradient * logits_move)
    leading = _margin.leading_of(logits, axis)
    if not isinstance(mass_move, SymbolicZero):
        moves.append(_at_classes(cost, axis, copies[1], leading, parameter) * mass_move)
    if not isinstance(parameter_move, SymbolicZero):
        by_parameter = partial(_modulation.slope, cost, 0)
        slopes = mass * _at_classes(by_parameter, axis, copies[1], leading, parameter)
        moves.append(slopes * _beside(parameter_move, axis))
    return loss, jnp.sum(sum(moves[1:], moves[0]), axis)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _with_gradient(
    cost: _Cost,
    axis: int,
    logits: jax.Array,
    copies: tuple[jax.Array, jax.Array],
    mass: jax.Array,
    parameter: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`_expected` and its slope in the logits, whose sums are of the same visit."""
    loss, *sums = _margin.sums(_terms(cost, axis, logits, copies[0], mass, parameter), axis)
    return loss, _pulled(cost, axis, logits, copies[1], mass, parameter, sums)


@_with_gradient.defjvp
def _with_gradient_jvp(
    cost: _Cost, axis: int, primals: _Arguments, tangents: _Arguments
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    def loss(logits: jax.Array, mass: jax.Array, parameter: jax.Array) -> jax.Array:
        return _expected(cost, axis, logits, (logits, logits), mass, parameter)

    def gradient(logits: jax.Array, mass: jax.Array, parameter: jax.Array) -> jax.Array:
        _, *terms = _terms(cost, axis, logits, logits, mass, parameter)
        sums = [jnp.sum(term, axis) for term in terms]
        return _pulled(cost, axis, logits, logits, mass, parameter, sums)

    at, moves = ((logits, *rest) for logits, _, *rest in (primals, tangents))
    slopes = jax.jvp(loss, at, moves)[1], jax.jvp(gradient, at, moves)[1]
    return _with_gradient(cost, axis, *primals), slopes


def _pulled(
    cost: _Cost,
    axis: int,
    logits: jax.Array,
    copy: jax.Array,
    mass: jax.Array,
    parameter: jax.Array,
    sums: list[jax.Array],
) -> jax.Array:
    leading = _margin.leading_of(logits, axis)
    slope = partial(_modulation.slope, cost, 1)
    total, leading_mass = sums
    slopes = mass * _at_classes(slope, axis, copy, leading, parameter)
    leading_slope = leading_mass * _at_leading(slope, leading, parameter)
    return _margin.pull(slopes, total, leading_slope, copy, leading, axis)


def _terms(
    cost: _Cost,
    axis: int,
    logits: jax.Array,
    copy: jax.Array,
    mass: jax.Array,
    parameter: jax.Array,
) -> list[jax.Array]:
    """What `_expected` sums over the classes."""
    leading = _margin.leading_of(logits, axis)
    costs = _at_classes(cost, axis, logits, leading, parameter)
    slope = partial(_modulation.slope, cost, 1)
    slopes = mass * _at_classes(slope, axis, copy, leading, parameter)
    return [
        _of_mass(mass, costs, logits),
        *_margin.pull_terms(slopes, mass, copy, leading, axis),
    ]


def _at_classes(
    function: _Cost, axis: int, logits: jax.Array, leading: _margin.Leading, parameter: jax.Array
) -> jax.Array:
    """A function of the margin at every class."""
    below = function(_beside(parameter, axis), _margin.margins_below(logits, leading, axis))
    at_leading = jnp.expand_dims(_at_leading(function, leading, parameter), axis)
    return jnp.where(_margin.is_class(logits, leading.ids, axis), at_leading, below)


def _at_leading(function: _Cost, leading: _margin.Leading, parameter: jax.Array) -> jax.Array:
    """The same at the leading class, where it may be near 0 and so must be refined."""
    margin = leading.margin
    return _modulation.refined(function, (parameter, margin.value), (None, margin.rest))


def _of_mass(mass: jax.Array, costs: jax.Array, logits: jax.Array) -> jax.Array:
    """The costs times their mass."""
    # a class that cannot be costs nothing where it has no mass
    nothing = (mass == 0) & (jnp.isinf(costs) | (logits == -jnp.inf))
    return mass * jnp.where(nothing, 0, costs)


def _beside(parameter: jax.Array, axis: int) -> jax.Array:
    """A parameter of the examples beside their logits."""
    return jnp.expand_dims(parameter, axis) if parameter.ndim else parameter


def _masks(
    where: ArrayLike | None, logits: jax.Array, example: jax.ShapeDtypeStruct, axis: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """`where` as a mask of classes, or None, and a mask of examples, or None."""
    if where is None:
        return None, None
    where = _checks.array("where", where)
    if where.ndim == logits.ndim:
        _checks.mask(where, "logits", logits)
        return where, jnp.any(where, axis)
    _checks.mask(where, "the loss", example)
    return None, where
