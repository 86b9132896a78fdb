"""Logits and labels to the margin: the logit of the true label against the rest."""

import jax
from jax.typing import ArrayLike

from focaljax import _checks


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
