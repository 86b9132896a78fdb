"""The losses of exclusive classes: images, pixels, tokens. The binary ones, at their margin."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from focaljax import _checks, _losses
from focaljax._classes import expected, is_class, log_odds, log_odds_of_classes, of_class
from focaljax._pointwise import margin_at, one_visit, wide


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
        loss. May be traced, batched and differentiated. A known
        multiple of 1/2 is fastest and the most exact.
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
    return loss_of_classes(_losses.focal, logits, labels, alpha, axis, where, gamma=gamma)


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
      logits: as in `softmax_focal_loss`, like `labels`, `alpha`, `axis`, `where` and what is
        returned and raised.
      labels: class ids, or distributions over the classes.
      k: the steepness K, above 0; a number, or an array that broadcasts against the loss. May be
        traced, batched and differentiated.
      alpha: one weight per class.
      axis: the axis of the classes.
      where: True means included; masks examples, or classes.

    Returns:
      The loss of each example, in the shape of `logits` without `axis` and its dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[4.0, 0.0, -1.0], [0.5, 1.0, 2.0]])
      >>> print(focaljax.softmax_soft_truncation_loss(logits, jnp.array([0, 0])))
      [1.552e-05 1.913e+00]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017), for two classes.
    """
    return loss_of_classes(_losses.soft_truncation, logits, labels, alpha, axis, where, k=k)


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
      logits: as in `softmax_focal_loss`, like `labels`, `alpha`, `axis`, `where` and what is
        returned and raised.
      labels: class ids, or distributions over the classes.
      threshold: m, the probability of the true class above which an example no longer counts, in
        (0, 1); a number, or an array that broadcasts against the loss. May be traced and batched;
        its gradient is 0.
      alpha: one weight per class.
      axis: the axis of the classes.
      where: True means included; masks examples, or classes.

    Returns:
      The loss of each example, in the shape of `logits` without `axis` and its dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[4.0, 0.0, -1.0], [0.5, 1.0, 2.0]])
      >>> print(focaljax.softmax_hard_threshold_loss(logits, jnp.array([0, 0])))
      [0. 1.9644]

    References:
      Su Jianlin, kexue.fm archives 4293 and 4733 (2017).
    """
    return loss_of_classes(
        _losses.hard_threshold, logits, labels, alpha, axis, where, threshold=threshold
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
      logits: as in `softmax_focal_loss`, like `labels`, `alpha`, `axis`, `where` and what is
        returned and raised.
      labels: class ids, or distributions over the classes.
      k: K, above 0; a number, or an array that broadcasts against the loss. May be traced, batched
        and differentiated. The product K x is rounded, so only for a power of two is the result
        as exact as that of the other losses.
      alpha: one weight per class.
      axis: the axis of the classes.
      where: True means included; masks examples, or classes.

    Returns:
      The loss of each example, in the shape of `logits` without `axis` and its dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[0.0, 1.0, -2.0], [0.0, 1.0, -20.0]])
      >>> print(focaljax.su_softmax_soft_truncation_loss(logits, jnp.array([0, 0])))
      [1.54e-01 2.71e-09]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017).
    """
    return loss_of_classes(_losses.cross_entropy, logits, labels, alpha, axis, where, _literal, k=k)


def softmax_margin_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    loss: Callable[[jax.Array], jax.Array],
    *,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""A loss of your own: any function of the margin, at the cost of those here.

    .. math::
        L(z_t) \quad\text{or}\quad \sum_c y_c L(z_c), \qquad
        z_c = x_c - \log \sum_{j \ne c} e^{x_j}

    Args:
      logits: as in `softmax_focal_loss`, like `labels`, `alpha`, `axis`, `where` and what is
        returned and raised.
      labels: class ids, or distributions over the classes.
      loss: an elementwise function of the margin :math:`z`, an array in at least float32 and
        finite: an infinite margin is the largest number. ``focaljax.softplus(-z)`` is cross
        entropy. What it closes over may be traced, batched and differentiated, and an array must
        broadcast against the margins of one class as against those of all. Of a distribution z is
        at most 87 in float32, 708 in float64.
      alpha: one weight per class.
      axis: the axis of the classes.
      where: True means included; masks examples, or classes.

    Returns:
      The loss of each example, in the shape of `logits` without `axis` and its dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[4.0, 0.0, -1.0], [0.5, 1.0, 2.0]])
      >>> squared_hinge = lambda z: jnp.maximum(0, 1 - z) ** 2
      >>> print(focaljax.softmax_margin_loss(logits, jnp.array([0, 0]), squared_hinge))
      [0.      7.91444]
    """
    return loss_of_classes(lambda at: loss(at.z), logits, labels, alpha, axis, where)


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
    logits, labels, axis = arrays(logits, labels, axis)
    if _are_ids(labels):
        z = log_odds(logits, labels, axis)
    else:
        z = log_odds_of_classes(logits, axis)
        labels = labels.astype(z.dtype)
        z = jnp.sum(labels * jnp.where(labels == 0, 0.0, z), axis, keepdims=True)
    return jnp.squeeze(z, axis).astype(logits.dtype)


def arrays(logits: ArrayLike, labels: ArrayLike, axis: int) -> tuple[jax.Array, jax.Array, int]:
    """`logits`, `labels` and the axis counted from 0, checked.

    Class ids come as signed integers with `axis` of size 1, distributions as floats.
    """
    logits, labels = _checks.array("logits", logits), _checks.array("labels", labels)
    _checks.floating("logits", logits)
    _checks.axis(axis, logits)
    axis = axis % logits.ndim
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
        is_float = jnp.issubdtype(labels.dtype, jnp.floating)
        return logits, labels if is_float else labels.astype(wide(logits.dtype)), axis
    _checks.class_ids(labels, logits, axis)
    # large unsigned ones become negative, which are no class either
    ids = labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)
    return logits, jnp.expand_dims(ids, axis), axis


def _are_ids(labels: jax.Array) -> bool:
    return jnp.issubdtype(labels.dtype, jnp.integer)


Line = Callable[..., jax.Array]  # a loss: of a `Margin` and, by keyword, of its parameters
_Parameters = dict[str, float | jax.Array]


def _of_margin(
    line: Line,
    parameters: _Parameters,
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    axis: int,
) -> jax.Array:
    line = partial(line, **parameters)
    if not _are_ids(labels):
        return expected(line, logits, labels, weights, axis)
    z = log_odds(logits, labels, axis)
    return one_visit(lambda z, weights: line(margin_at(z)) * weights, z, weights)


def _literal(
    line: Line,
    parameters: _Parameters,
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    axis: int,
) -> jax.Array:
    """Su's: the line, weighed by softmax(-K x) in place of a function of the margin."""
    logits = logits.astype(weights.dtype)
    negated = jnp.where(logits == -jnp.inf, logits, -_losses.number(parameters["k"]) * logits)
    if _are_ids(labels):
        z, negated_z = (log_odds(x, labels, axis) for x in (logits, negated))
    else:
        z, negated_z = (log_odds_of_classes(x, axis) for x in (logits, negated))
        weights = labels.astype(weights.dtype) * weights
    weights = weights * margin_at(negated_z).p
    value = one_visit(lambda z, weights: line(margin_at(z)) * weights, z, weights)
    return jnp.sum(value, axis, keepdims=True)


def loss_of_classes(
    line: Line,
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike | None,
    axis: int,
    where: ArrayLike | None,
    head: Callable[..., jax.Array] = _of_margin,
    **parameters: ArrayLike,
) -> jax.Array:
    logits, labels, axis = arrays(logits, labels, axis)
    checked = {n: _checks.parameter(n, value, logits, axis) for n, value in parameters.items()}
    if where is not None:
        where = _checks.array("where", where)
        of_classes = where.ndim == logits.ndim
        masked = logits if of_classes else _checks.loss_of(logits, axis)
        _checks.mask(where, "logits" if of_classes else "the loss", masked)
    if alpha is not None:
        advice = ": for no weights give alpha=None"
        _checks.within("alpha", alpha, 0.0, open_high=True, advice=advice)
        alpha = _checks.along_classes("alpha", alpha, logits, axis)
    # a line of the user's own, which has none, may close over what changes
    compute = _compiled if parameters else _compute
    return compute(line, head, checked, logits, labels, alpha, axis, where)


def _compute(
    line: Line,
    head: Callable[..., jax.Array],
    parameters: _Parameters,
    logits: jax.Array,
    labels: jax.Array,
    alpha: jax.Array | None,
    axis: int,
    where: jax.Array | None,
) -> jax.Array:
    dtype = logits.dtype
    if where is not None and where.ndim < logits.ndim:
        where = jnp.expand_dims(where, axis)
    elif where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
        if _are_ids(labels):
            is_there = jnp.any(where & is_class(logits, labels, axis), axis, keepdims=True)
            labels = jnp.where(is_there, labels, -1)
        else:
            labels = jnp.where(where, labels, 0)
        where = jnp.any(where, axis, keepdims=True)
    if where is not None:
        # before the loss: a NaN or an infinity that is masked only afterwards has a NaN gradient
        logits = jnp.where(where, logits, 0.0)
        labels = jnp.where(where, labels, 0)
    weights = jnp.ones((), wide(dtype)) if alpha is None else alpha
    if alpha is not None and _are_ids(labels):
        weights = of_class(alpha, logits, labels, axis)
    value = head(line, parameters, logits, labels, weights, axis)
    if where is not None:
        value = jnp.where(where, value, 0.0)
    return jnp.squeeze(value, axis).astype(dtype)


# eager code then runs one program, not many
_compiled = jax.jit(_compute, static_argnames=("line", "head", "axis"), inline=True)
