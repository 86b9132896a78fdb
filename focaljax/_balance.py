"""What balances a rare class besides the loss: its weight, and the bias that a head starts from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from focaljax import _checks
from focaljax._pointwise import wide


def class_balanced_weights(counts: ArrayLike, *, beta: ArrayLike = 0.999) -> jax.Array:
    r"""One weight per class, by the effective number of its examples.

    .. math::
        w_c \propto \frac{1 - \beta}{1 - \beta^{n_c}}, \qquad \sum_c w_c = C

    beta = 0 weighs all classes alike, beta near 1 by the inverse of their counts.

    Args:
      counts: shape (C,); the number of training examples of each class, at least 0. A class
        without any gets the weight of a class with one.
      beta: a number in [0, 1).

    Returns:
      Weights of mean 1, shape (C,), in JAX's default float dtype.

    Raises:
      AssertionError: when `counts` is not a vector.
      ValueError: when a count or beta known at trace time is out of range.

    Example:
      >>> import focaljax
      >>> for weight in focaljax.class_balanced_weights([900, 90, 10]):
      ...     print(weight)
      0.0444
      0.3063
      2.6493

    References:
      Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, equation 3.
    """
    _checks.within("counts", counts, 0.0)
    _checks.within("beta", beta, 0.0, 1.0, open_high=True)
    counts = _checks.numbers("counts", counts)
    _checks.vector("counts", counts)
    counts = jnp.maximum(counts.astype(float), 1)
    # in float64 if it is known: near 1 it loses its distance from 1 in float32
    known_beta = _checks.known("beta", beta)
    tiny = float(jnp.finfo(counts.dtype).tiny)  # stands for 0, whose effective number is 1 too
    if known_beta is None:
        log_beta = jnp.log(tiny + _checks.array("beta", beta).astype(counts.dtype))
    else:
        log_beta = jnp.asarray(np.log(tiny + known_beta), counts.dtype)
    _checks.broadcasts("beta", log_beta, ())
    weights = 1 / -jnp.expm1(counts * log_beta)
    return weights * (weights.size / jnp.sum(weights))


def logit_adjustment(
    logits: ArrayLike, *, prior: ArrayLike, tau: ArrayLike = 1.0, axis: int = -1
) -> jax.Array:
    r"""Logits to train with on classes of very different frequency.

    .. math::
        x_c + \tau \log \pi_c

    Train with a softmax loss of these, and decide by the logits alone: the rare classes then have
    the margin that they lack in number. Likewise at test time subtract it, by tau = -1, from logits
    that were trained without.

    Args:
      logits: floating point, at least one axis.
      prior: the share of each class in the training data, above 0, shape (C,). Counts will do,
        since a common factor changes no softmax.
      tau: how much of it; any number, which may be traced.
      axis: the axis of the classes.

    Returns:
      Logits in the shape and dtype of `logits`; computed in at least float32.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when `axis`, or a prior known at trace time, is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.logit_adjustment(jnp.zeros(2), prior=jnp.array([0.9, 0.1])))
      [-0.10536055 -2.3025851 ]

    References:
      Menon et al., Long-tail Learning via Logit Adjustment, ICLR 2021, equations 9 and 10.
    """
    logits = _checks.array("logits", logits)
    _checks.floating("logits", logits)
    _checks.axis(axis, logits)
    _checks.within("prior", prior, 0.0, open_low=True, open_high=True)
    wide_logits = logits.astype(wide(logits.dtype))
    log_prior = jnp.log(_checks.along_classes("prior", prior, wide_logits, axis))
    tau = _checks.array("tau", tau)
    _checks.broadcasts("tau", tau, ())
    return (wide_logits + tau.astype(wide_logits.dtype) * log_prior).astype(logits.dtype)


def prior_bias(prior: ArrayLike = 0.01) -> jax.Array:
    r"""The bias of a sigmoid head that starts by predicting `prior` everywhere.

    .. math::
        b = \log \frac{\pi}{1 - \pi}

    Without it the first steps on rare positives are spent, or lost, on the negatives' sum; on
    dense detection it matters more than which loss is used.

    Args:
      prior: the probability of a positive, in (0, 1); a number or an array, such as one per class.

    Returns:
      The log-odds, in the shape of `prior`, at least float32.

    Raises:
      ValueError: when a prior known at trace time is out of range.

    Example:
      >>> import focaljax
      >>> print(focaljax.prior_bias(0.01))
      -4.595

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, sections 3.3 and 4.1.
    """
    return log_odds("prior", prior)


def log_odds(name: str, prior: ArrayLike) -> jax.Array:
    """`prior_bias` of a prior that the caller knows as `name`."""
    _checks.within(name, prior, 0.0, 1.0, open_low=True, open_high=True)
    array, known = _checks.array(name, prior), _checks.known(name, prior)
    _checks.floating(name, array)
    dtype = wide(array.dtype)
    if known is None:
        return jnp.log(array.astype(dtype)) - jnp.log1p(-array.astype(dtype))
    return jnp.asarray(np.log(known) - np.log1p(-known), dtype)


def prior_bias_init(prior: ArrayLike = 0.01) -> Callable[..., jax.Array]:
    """An initializer, for Flax and JAX, that fills a bias with ``prior_bias(prior)``.

    Args:
      prior: the probability of a positive, in (0, 1); a number or an array that broadcasts against
        the bias.

    Returns:
      ``init(key, shape, dtype)``, as those of ``jax.nn.initializers``.

    Raises:
      ValueError: when a prior known at trace time is out of range.

    Example:
      >>> from flax import nnx
      >>> import focaljax
      >>> head = nnx.Linear(8, 1, bias_init=focaljax.prior_bias_init(0.01), rngs=nnx.Rngs(0))
      >>> print(head.bias[...])
      [-4.595]
    """
    return jax.nn.initializers.constant(prior_bias(prior))
