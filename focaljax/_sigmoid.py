"""The losses of independent yes-or-no labels: detection, tagging, binary classification."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from focaljax import _checks, _losses
from focaljax._pointwise import Margin, log, margin_at, one_visit, wide


def sigmoid_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Focal loss: cross entropy that fades as an example becomes easy.

    For dense detection and other tasks with very many easy negatives. A label of 0 or 1 at margin
    :math:`z = (2y - 1)x`, with :math:`p_t = \sigma(z)`, costs

    .. math::
        L = -(1 - p_t)^\gamma \log p_t

    and :math:`\gamma = 0` is cross entropy. A drop-in for
    ``optax.sigmoid_focal_loss`` with gamma and alpha by keyword.

    A soft label follows torchvision and optax: :math:`u^\gamma` times the cross entropy of `y`,
    with :math:`u = y (1 - p) + (1 - y) p`. That sharpens: at y = 0.9 and gamma = 2 the loss is
    least at p = 0.986.

    Trained with it, the sigmoid of a logit is not the probability of a positive:
    `sigmoid_posterior` is.

    Args:
      logits: floating point, any shape; the log-odds of the positive.
      labels: exactly the shape of `logits`; probabilities of any real dtype. One outside [0, 1],
        such as -1 for "unknown", gives NaN unless masked. Class ids become
        ``jax.nn.one_hot(ids, num_classes)``, where an id of -1 is background.
      gamma: the focusing parameter, at least 0; a number, or an array that broadcasts against the
        loss. May be traced, batched and differentiated. A known multiple of 1/2 is fastest and the
        most exact.
      alpha: the weight of positives, in [0, 1]; negatives get 1 - alpha. A number or an array that
        broadcasts against the loss, such as one per class. None: both weigh 1.
      where: booleans in the shape of `labels`; where False, the loss and every gradient are exactly
        0, whatever stands there in `logits` and `labels`.

    Returns:
      The loss of each element, not reduced, in the shape and dtype of `logits`; computed in at
      least float32. An infinite logit gives the limit; NaN stays NaN.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a gamma or alpha known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits, labels = jnp.array([4.0, -1.0, -3.0]), jnp.array([1, 1, 0])
      >>> print(focaljax.sigmoid_focal_loss(logits, labels))
      [5.872e-06 7.019e-01 1.093e-04]

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equations 4 and 5.
    """
    return elementwise_loss(_losses.focal, logits, labels, alpha, where, line_of_mean, gamma=gamma)


def sigmoid_soft_truncation_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    k: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Su Jianlin's soft truncation: a smooth step in place of "stop once it is right".

    .. math::
        L = -\sigma(-K z) \log \sigma(z), \qquad z = (2y - 1) x

    Convex in the logit for K in [1.4428, 2.1486], which focal loss is for no usual gamma above 0;
    at K = 2 the slope never exceeds 1. K = 1 is focal loss with gamma = 1; K near 0 is half of
    cross entropy; a large K nears the hard threshold at 1/2. Linear in a soft label:
    y L(x) + (1 - y) L(-x).

    Trained with it, the sigmoid of a logit is not the probability of a positive:
    `sigmoid_posterior` is.

    Args:
      logits: as in `sigmoid_focal_loss`, like `labels`, `alpha`, `where` and what is returned and
        raised.
      labels: the shape of `logits`, in [0, 1].
      k: the steepness K, above 0; a number, or an array that broadcasts against the loss. May be
        traced, batched and differentiated. A known multiple of 1/2 is fastest and the most exact.
      alpha: the weight of positives; negatives get 1 - alpha.
      where: True means included.

    Returns:
      The loss of each element, in the shape and dtype of `logits`.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits, labels = jnp.array([4.0, -1.0, -3.0]), jnp.array([1, 1, 0])
      >>> print(focaljax.sigmoid_soft_truncation_loss(logits, labels))
      [6.087e-06 1.1567 1.2014e-04]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017).
    """
    return elementwise_loss(_losses.soft_truncation, logits, labels, alpha, where, k=k)


def sigmoid_hard_threshold_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: ArrayLike = 0.5,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Cross entropy for the examples not yet right enough, nothing for the others.

    .. math::
        L = -[p_t \le m] \log p_t, \qquad p_t = \sigma((2y - 1) x)

    The loss jumps by :math:`-\log m` at the threshold, and autodiff does not see the jump: no
    gradient tells the model to keep what it has got right. Best as fine-tuning. Linear in a soft
    label: y L(x) + (1 - y) L(-x).

    Trained with it at m > 1/2, the sigmoid of a logit ends at the probability of a positive clipped
    to [1 - m, m]; what was beyond is lost. At other m it says nothing of the probability.

    Args:
      logits: as in `sigmoid_focal_loss`, like `labels`, `alpha`, `where` and what is returned and
        raised.
      labels: the shape of `logits`, in [0, 1].
      threshold: m, the probability of the true label above which an example no longer counts, in
        (0, 1); a number, or an array that broadcasts against the loss. May be traced and batched;
        its gradient is 0.
      alpha: the weight of positives; negatives get 1 - alpha.
      where: True means included.

    Returns:
      The loss of each element, in the shape and dtype of `logits`.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits, labels = jnp.array([4.0, -1.0, -3.0]), jnp.array([1, 1, 0])
      >>> print(focaljax.sigmoid_hard_threshold_loss(logits, labels))
      [0.     1.3133 0.    ]

    References:
      Su Jianlin, kexue.fm archives 4293 and 4733 (2017).
    """
    return elementwise_loss(
        _losses.hard_threshold, logits, labels, alpha, where, threshold=threshold
    )


def sigmoid_margin_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    loss: Callable[[jax.Array], jax.Array],
    *,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""A loss of your own: any function of the margin, at the cost of those here.

    .. math::
        y L(x) + (1 - y) L(-x)

    Args:
      logits: as in `sigmoid_focal_loss`, like `labels`, `alpha`, `where` and what is returned and
        raised.
      labels: the shape of `logits`, in [0, 1].
      loss: an elementwise function of the margin :math:`z`, an array in at least float32 and
        finite: an infinite logit is the largest number. ``focaljax.softplus(-z)`` is cross entropy.
        What it closes over may be traced, batched and differentiated.
      alpha: the weight of positives; negatives get 1 - alpha.
      where: True means included.

    Returns:
      The loss of each element, in the shape and dtype of `logits`.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits, labels = jnp.array([4.0, -1.0, 0.5]), jnp.array([1, 1, 0])
      >>> squared_hinge = lambda z: jnp.maximum(0, 1 - z) ** 2
      >>> print(focaljax.sigmoid_margin_loss(logits, labels, squared_hinge))
      [0.   4.   2.25]
    """
    return elementwise_loss(lambda at: loss(at.z), logits, labels, alpha, where)


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
    logits, labels = arrays(logits, labels)
    return logits * (2 * labels.astype(logits.dtype) - 1)


def arrays(logits: ArrayLike, labels: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """`logits` and `labels` as arrays, checked."""
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


Line = Callable[..., jax.Array]  # a loss: of a `Margin` and, by keyword, of its parameters
OfLabel = Callable[[Line, Margin, jax.Array], jax.Array]


def mean_of_line(line: Line, at: Margin, labels: jax.Array) -> jax.Array:
    return labels * line(at) + (1 - labels) * line(-at)


def line_of_mean(line: Line, at: Margin, labels: jax.Array) -> jax.Array:
    """As torchvision and optax have focal loss of a soft label."""
    z, p, q, log_p, _ = (
        labels * of_positive + (1 - labels) * of_negative
        for of_positive, of_negative in zip(at, -at, strict=True)
    )
    return line(Margin(z, p, q, log_p, log_q=log(q)))


def elementwise_loss(
    line: Line,
    logits: ArrayLike,
    labels: ArrayLike,
    alpha: ArrayLike | None,
    where: ArrayLike | None,
    of_label: OfLabel = mean_of_line,
    /,
    **parameters: ArrayLike,
) -> jax.Array:
    logits, labels = arrays(logits, labels)
    checked = {name: _checks.parameter(name, value, logits) for name, value in parameters.items()}
    if where is not None:
        where = _checks.array("where", where)
        _checks.mask(where, "labels", labels)
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, 1.0, advice=": for no weights give alpha=None")
        alpha = _checks.beside("alpha", alpha, logits)
    # a line of the user's own, which has none, may close over what changes
    compute = _compiled if parameters else _compute
    return compute(line, of_label, checked, logits, labels, alpha, where)


def _compute(
    line: Line,
    of_label: OfLabel,
    parameters: dict[str, float | jax.Array],
    logits: jax.Array,
    labels: jax.Array,
    alpha: jax.Array | None,
    where: jax.Array | None,
) -> jax.Array:
    dtype = logits.dtype
    # before the masks: a select among 16-bit or 8-bit numbers costs the TPU compiler its fusion
    logits = logits.astype(wide(dtype))
    labels = labels.astype(logits.dtype)
    if where is not None:
        # before the loss: a NaN or an infinity that is masked only afterwards has a NaN gradient
        logits = jnp.where(where, logits, 0.0)
        labels = jnp.where(where, labels, 0.0)
    labels = jnp.where(jnp.abs(labels - 0.5) <= 0.5, labels, jnp.nan)

    def weighted(logits: jax.Array, labels: jax.Array) -> jax.Array:
        value = of_label(partial(line, **parameters), margin_at(logits), labels)
        return value if alpha is None else value * (alpha * labels + (1 - alpha) * (1 - labels))

    value = one_visit(weighted, logits, labels)
    if where is not None:
        value = jnp.where(where, value, 0.0)
    return value.astype(dtype)


# eager code then runs one program, not many
_compiled = jax.jit(_compute, static_argnames=("line", "of_label"), inline=True)
