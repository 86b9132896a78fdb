"""The losses of independent yes-or-no labels: detection, tagging, binary classification."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from focaljax import _checks, _margin, _modulation


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
      labels: exactly the shape of `logits`; probabilities in [0, 1], which is not checked, of
        any real dtype. Class ids become ``jax.nn.one_hot(ids, num_classes)``, where an id of -1 is
        background.
      gamma: the focusing parameter, at least 0; a number, or an array that broadcasts against the
        loss. May be traced, batched and differentiated. Above 15 the float32 error passes 2e-6.
      alpha: the weight of positives, in [0, 1]; negatives get 1 - alpha. A number or an array that
        broadcasts against the loss, such as one per class. None: both weigh 1.
      where: booleans in the shape of `labels`; where False, the loss and every gradient are exactly
        0, whatever stands there in `logits` and `labels`.

    Returns:
      The loss of each element, not reduced, in the shape and dtype of `logits`; computed in at
      least float32. At z = inf it is 0 with slope 0, at z = -inf it is inf with slope -1 in z, both
      times the weight of `alpha`; NaN stays NaN.

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
    _checks.within("gamma", gamma, 0.0, open_high=True)
    return _sigmoid_loss(
        _modulation.focal, logits, labels, "gamma", gamma, alpha=alpha, where=where
    )


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
      logits: floating point, any shape; the log-odds of the positive.
      labels: exactly the shape of `logits`; probabilities in [0, 1], which is not checked, of
        any real dtype. Class ids become ``jax.nn.one_hot(ids, num_classes)``, where an id of -1 is
        background.
      k: the steepness K, above 0; a number, or an array that broadcasts against the loss. May be
        traced, batched and differentiated.
      alpha: the weight of positives, in [0, 1]; negatives get 1 - alpha. A number or an array that
        broadcasts against the loss, such as one per class. None: both weigh 1.
      where: booleans in the shape of `labels`; where False, the loss and every gradient are exactly
        0, whatever stands there in `logits` and `labels`.

    Returns:
      The loss of each element, not reduced, in the shape and dtype of `logits`; computed in at
      least float32. At z = inf it is 0 with slope 0, at z = -inf it is inf with slope -1 in z, both
      times the weight of `alpha`; NaN stays NaN.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a k or alpha known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits, labels = jnp.array([4.0, -1.0, -3.0]), jnp.array([1, 1, 0])
      >>> print(focaljax.sigmoid_soft_truncation_loss(logits, labels))
      [6.087e-06 1.1567 1.2014e-04]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017).
    """
    _checks.within("k", k, 0.0, open_low=True, open_high=True)
    return _sigmoid_loss(
        _modulation.soft_truncation, logits, labels, "k", k, alpha=alpha, where=where
    )


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
      logits: floating point, any shape; the log-odds of the positive.
      labels: exactly the shape of `logits`; probabilities in [0, 1], which is not checked, of
        any real dtype. Class ids become ``jax.nn.one_hot(ids, num_classes)``, where an id of -1 is
        background.
      threshold: m, the probability of the true label above which an example no longer counts, in
        (0, 1); a number, or an array that broadcasts against the loss. May be traced and batched;
        its gradient is 0.
      alpha: the weight of positives, in [0, 1]; negatives get 1 - alpha. A number or an array that
        broadcasts against the loss, such as one per class. None: both weigh 1.
      where: booleans in the shape of `labels`; where False, the loss and every gradient are exactly
        0, whatever stands there in `logits` and `labels`.

    Returns:
      The loss of each element, not reduced, in the shape and dtype of `logits`; computed in at
      least float32. At z = inf it is 0 with slope 0, at z = -inf it is inf with slope -1 in z, both
      times the weight of `alpha`; NaN stays NaN.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a threshold or alpha known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits, labels = jnp.array([4.0, -1.0, -3.0]), jnp.array([1, 1, 0])
      >>> print(focaljax.sigmoid_hard_threshold_loss(logits, labels))
      [0.     1.3133 0.    ]

    References:
      Su Jianlin, kexue.fm archives 4293 and 4733 (2017).
    """
    _checks.within("threshold", threshold, 0.0, 1.0, open_low=True, open_high=True)
    return _sigmoid_loss(
        _modulation.hard_threshold,
        logits,
        labels,
        "threshold",
        threshold,
        alpha=alpha,
        where=where,
    )


def _sigmoid_loss(
    modulation: _modulation.Modulation,
    logits: ArrayLike,
    labels: ArrayLike,
    name: str,
    value: ArrayLike,
    *,
    alpha: ArrayLike | None,
    where: ArrayLike | None,
) -> jax.Array:
    logits, labels = _margin.sigmoid_arrays(logits, labels)
    dtype = logits.dtype
    # before the masks: a select among 16-bit or 8-bit numbers costs the TPU compiler its fusion
    logits = logits.astype(_modulation.wide(dtype))
    labels = labels.astype(logits.dtype)
    if where is not None:
        where = _checks.array("where", where)
        _checks.mask(where, "labels", labels)
        # before the loss: a NaN or an infinity that is masked only afterwards has a NaN gradient
        logits = jnp.where(where, logits, 0)
        labels = jnp.where(where, labels, 0)
    loss = _modulation.modulated_cross_entropy(modulation, logits, labels, name, value)
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, 1.0)
        alpha = _modulation.parameter("alpha", alpha, loss)
        loss = loss * (alpha * labels + (1 - alpha) * (1 - labels))
    if where is not None:
        loss = jnp.where(where, loss, 0)
    return loss.astype(dtype)
