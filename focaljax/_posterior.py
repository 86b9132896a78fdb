r"""From the logits that a loss has trained to the probabilities of the classes, and to decisions.

Where training is done the slopes of the loss balance. With h the slope of the loss in log p over
that of cross entropy, they balance where cross entropy's would with each class weighed by h. So the
true probability of a class is in proportion to ``p / (alpha h)``: for every loss, from its slope
alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from focaljax import _checks, _losses
from focaljax._balance import log_odds
from focaljax._classes import log_odds_of_classes
from focaljax._pointwise import Margin, margin_at, one_visit, wide

_Loss = Callable[[jax.Array], jax.Array]
_Line = Callable[..., jax.Array]  # of a `Margin` and, by keyword, of its parameters
_Parameters = dict[str, float | jax.Array]


def sigmoid_posterior(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    loss: _Loss | None = None,
    alpha: ArrayLike | None = None,
) -> jax.Array:
    r"""The probability of a positive, from logits that a sigmoid loss here has trained.

    After focal loss or soft truncation :math:`p = \sigma(x)` is not the probability :math:`\eta` of
    a positive: with gamma = 2 it is .58 where that is .7. But it tells it, without further data,
    through the slope L' of the loss:

    .. math::
        \eta = \frac{(1 - \alpha) |L'(-x)|}{\alpha |L'(x)| + (1 - \alpha) |L'(-x)|}

    That increases with the logit for every gamma, k and alpha, so rankings stay; gamma = 0 without
    alpha is the sigmoid.

    It holds where the expected loss is least, given hard labels: for a network that has the
    capacity and the training. Like the sigmoid after cross entropy it does not mend overfitting,
    and not what was done to the data: negatives left out call for `sigmoid_prior_shift`, and of
    smoothed labels it gives the smoothed probability (of soft truncation; the focal loss of a soft
    label is another). A mask must not depend on the label. `normalize_by_positives` divides by a
    count that a positive itself is in: with n of them in a batch, the odds come out low by about
    1 / n. After hard example mining and the hard threshold loss there is no such formula.

    Args:
      logits: floating point, any shape; the log-odds that the network gives.
      gamma: of `sigmoid_focal_loss`, as the logits were trained with it; a number, or an array that
        broadcasts against the logits. May be traced, batched and differentiated, like `k` and
        `alpha`. Exactly one of `gamma`, `k` and `loss` is needed.
      k: of `sigmoid_soft_truncation_loss`, likewise.
      threshold: refused, with the reason: what `sigmoid_hard_threshold_loss` has cut off is lost.
      loss: of `sigmoid_margin_loss`, likewise: a function of the margin. Where its slope is 0 on
        one side, as a hinge's is, the probability is 0 or 1.
      alpha: the weight of positives that the loss was given, in (0, 1); a number, or an array that
        broadcasts against the logits. None: both weighed 1.

    Returns:
      Probabilities in the shape and dtype of `logits`; computed in at least float32. Near 1, ask
      for the negative's: that of ``-logits``, with 1 - alpha. NaN stays NaN.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when not exactly one of `gamma`, `k` and `loss` is given, when a `threshold` is,
        or when a value known at trace time is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([-2.0, 0.317, 3.0])
      >>> print(jax.nn.sigmoid(logits))
      [0.119 0.579 0.953]
      >>> print(focaljax.sigmoid_posterior(logits, gamma=2.0))
      [0.0045 0.7003 0.9997]

    References:
      Charoenphakdee et al., On Focal Loss for Class-Posterior Probability Estimation: A Theoretical
      Perspective, CVPR 2021, for focal loss; the derivation holds for any other.
    """
    dtype, log_odds = _of_sigmoid(logits, alpha, gamma=gamma, k=k, threshold=threshold, loss=loss)
    at: Margin = margin_at(log_odds)
    return at.p.astype(dtype)


def sigmoid_posterior_logits(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    loss: _Loss | None = None,
    alpha: ArrayLike | None = None,
) -> jax.Array:
    r"""The log-odds of a positive, from logits that a sigmoid loss here has trained.

    ``jax.nn.sigmoid`` of them is `sigmoid_posterior`, which says when it holds. Log-odds are what
    further steps want: ``jax.nn.log_sigmoid``, `sigmoid_prior_shift`, a temperature, a loss from
    logits. Probabilities are 1 or 0 to the last digit long before their log-odds end.

    Args:
      logits: as in `sigmoid_posterior`, like all others and what is raised.
      gamma: of `sigmoid_focal_loss`.
      k: of `sigmoid_soft_truncation_loss`.
      threshold: refused.
      loss: of `sigmoid_margin_loss`.
      alpha: the weight of positives that the loss was given.

    Returns:
      Log-odds in the shape and dtype of `logits`; computed in at least float32. They grow as
      (1 + gamma) or (1 + k) times the logits do, until the slope of the loss is 0 in that dtype
      (at a logit of 43 for gamma = 2 in float32), and from there as the logits do. Infinities stay;
      NaN stays NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_posterior_logits(jnp.array([-2.0, 2.0]), gamma=2.0))
      [-5.398  5.398]
    """
    dtype, log_odds = _of_sigmoid(logits, alpha, gamma=gamma, k=k, threshold=threshold, loss=loss)
    return log_odds.astype(dtype)


def softmax_posterior(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    loss: _Loss | None = None,
    alpha: ArrayLike | None = None,
    axis: int = -1,
) -> jax.Array:
    r"""The probabilities of the classes, from logits that a softmax loss here has trained.

    After focal loss or soft truncation :math:`p = \mathrm{softmax}(x)` are not the probabilities
    :math:`\eta` of the classes. But they tell them, without further data, through the slope L' of
    the loss at the margins z of `softmax_margin`:

    .. math::
        \eta_c \propto \frac{p_c (1 - p_c)}{\alpha_c |L'(z_c)|}

    gamma = 0 without alpha is the softmax.

    It holds where the expected loss is least: for a network that has the capacity and the training.
    Like the softmax after cross entropy it does not mend overfitting, and not what was done to the
    data: classes sampled at other rates call for `softmax_prior_shift`, and of smoothed labels it
    gives the smoothed probabilities. A mask must not depend on the label. After the hard threshold
    loss and `su_softmax_soft_truncation_loss` of more than two classes it does not hold.

    But for `alpha` the order of the classes stays for every gamma and for k up to 3.318. With a
    larger k and more than two classes it may not, between p = .32 and .5. Where the expected loss
    is least no two classes are there, so the formula still holds, but a network short of that may
    have them change places.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`. -inf is a class
        that cannot be, so classes masked by `where` in the loss are masked here by
        ``jnp.where(mask, logits, -jnp.inf)``.
      gamma: of `softmax_focal_loss`, as the logits were trained with it; a number, or an array that
        broadcasts against the loss, the shape of `logits` without `axis`. May be traced, batched
        and differentiated, like `k` and `alpha`. Exactly one of `gamma`, `k` and `loss` is needed.
      k: of `softmax_soft_truncation_loss`, likewise.
      threshold: refused, with the reason: what `softmax_hard_threshold_loss` has cut off is lost.
      loss: of `softmax_margin_loss`, likewise: a function of the margin.
      alpha: the weights of the classes that the loss was given, above 0, shape (C,). None: all
        weighed 1.
      axis: the axis of the classes; 1 for images as NCHW.

    Returns:
      Probabilities, which sum to 1 along `axis`, in the shape and dtype of `logits`; computed in at
      least float32. NaN stays NaN, in all classes of an example.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when not exactly one of `gamma`, `k` and `loss` is given, when a `threshold` is,
        or when `axis`, or a value known at trace time, is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([2.0, 1.0, -1.0])
      >>> print(jax.nn.softmax(logits))
      [0.705 0.26  0.035]
      >>> print(focaljax.softmax_posterior(logits, gamma=2.0))
      [0.917 0.073 0.009]

    References:
      Charoenphakdee et al., On Focal Loss for Class-Posterior Probability Estimation: A Theoretical
      Perspective, CVPR 2021, for focal loss; the derivation holds for any other.
    """
    dtype, at = _of_softmax(logits, alpha, axis, gamma=gamma, k=k, threshold=threshold, loss=loss)
    return at.p.astype(dtype)


def softmax_posterior_logits(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    loss: _Loss | None = None,
    alpha: ArrayLike | None = None,
    axis: int = -1,
) -> jax.Array:
    r"""The log-probabilities of the classes, from logits that a softmax loss here has trained.

    The logarithm of `softmax_posterior`, which says when it holds. They are logits as well, whose
    softmax is the posterior: what `softmax_prior_shift`, a temperature or a loss from logits wants.

    Args:
      logits: as in `softmax_posterior`, like all others and what is raised.
      gamma: of `softmax_focal_loss`.
      k: of `softmax_soft_truncation_loss`.
      threshold: refused.
      loss: of `softmax_margin_loss`.
      alpha: the weights of the classes that the loss was given.
      axis: the axis of the classes.

    Returns:
      Log-probabilities in the shape and dtype of `logits`; computed in at least float32. -inf for a
      class that cannot be. NaN stays NaN, in all classes of an example.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.softmax_posterior_logits(jnp.array([9.0, 1.0, -50.0]), gamma=2.0))
      [-1.126e-10 -2.291e+01 -7.390e+01]
    """
    dtype, at = _of_softmax(logits, alpha, axis, gamma=gamma, k=k, threshold=threshold, loss=loss)
    # `margin_at` has made an infinite margin finite
    return jnp.where(at.z <= jnp.finfo(at.z.dtype).min, -jnp.inf, at.log_p).astype(dtype)


def _of_sigmoid(
    logits: ArrayLike, alpha: ArrayLike | None, **trained_by: Any
) -> tuple[jnp.dtype, jax.Array]:
    """The dtype of the logits, and the log-odds of a positive in the one to compute in."""
    logits = _checks.array("logits", logits)
    _checks.floating("logits", logits)
    line, parameters = _line(logits, None, **trained_by)
    x = logits.astype(wide(logits.dtype))
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, 1.0, open_low=True, open_high=True, dtype=x.dtype)
        alpha = _checks.beside("alpha", alpha, logits)
    compute = _compiled_sigmoid if parameters else _balanced_sigmoid
    return logits.dtype, compute(line, parameters, x, alpha)


def _balanced_sigmoid(
    line: _Line, parameters: _Parameters, x: jax.Array, alpha: jax.Array | None
) -> jax.Array:
    def balanced(x: jax.Array) -> jax.Array:
        positive, negative = (_slope(line, parameters, at) for at in (margin_at(x), margin_at(-x)))
        return x + (jnp.log(negative) - jnp.log(positive))

    result = one_visit(balanced, x)
    return result if alpha is None else result + (jnp.log1p(-alpha) - jnp.log(alpha))


_compiled_sigmoid = jax.jit(_balanced_sigmoid, static_argnames="line")


def _of_softmax(
    logits: ArrayLike, alpha: ArrayLike | None, axis: int, **trained_by: Any
) -> tuple[jnp.dtype, Margin]:
    """The dtype of the logits, and the margins of the classes in the one to compute in."""
    logits = _checks.array("logits", logits)
    _checks.floating("logits", logits)
    _checks.axis(axis, logits)
    axis = axis % logits.ndim
    line, parameters = _line(logits, axis, **trained_by)
    x = logits.astype(wide(logits.dtype))
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, open_low=True, open_high=True, dtype=x.dtype)
        alpha = _checks.along_classes("alpha", alpha, x, axis)
    compute = _compiled_softmax if parameters else _balanced_softmax
    return logits.dtype, margin_at(compute(line, parameters, x, alpha, axis))


def _balanced_softmax(
    line: _Line, parameters: _Parameters, x: jax.Array, alpha: jax.Array | None, axis: int
) -> jax.Array:
    def balanced(z: jax.Array) -> jax.Array:
        at: Margin = margin_at(z)
        return at.log_p - jnp.log(_slope(line, parameters, at))

    log_p = one_visit(balanced, log_odds_of_classes(x, axis))
    if alpha is not None:
        log_p -= jnp.log(alpha)
    return log_odds_of_classes(jnp.where(x == -jnp.inf, x, log_p), axis)


_compiled_softmax = jax.jit(_balanced_softmax, static_argnames=("line", "axis"))


def _line(
    logits: jax.Array,
    axis: int | None,
    *,
    gamma: ArrayLike | None,
    k: ArrayLike | None,
    threshold: ArrayLike | None,
    loss: _Loss | None,
) -> tuple[_Line, _Parameters]:
    """The line that has trained the logits, and its parameters: none of one of the user's own."""
    if threshold is not None:
        raise ValueError(
            "threshold: the hard threshold loss cannot be undone. It stops moving a probability "
            "that is past the threshold m, so how far past it the true one lies is lost: of two "
            "classes and m > 1/2, training ends at the true one clipped to [1 - m, m], and with "
            "m <= 1/2 the outcome says nothing. Train with focal loss or soft truncation, and give "
            "gamma or k"
        )
    given = {"gamma": gamma, "k": k, "loss": loss}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(
            "exactly one of gamma, k and loss must say which loss trained the logits, got "
            f"{' and '.join(names) or 'none'}: gamma of focal loss, k of soft truncation, loss for "
            "one of your own; cross entropy is gamma=0"
        )
    if loss is not None:
        return lambda at: loss(at.z), {}
    if k is not None:
        return _losses.soft_truncation, {"k": _checks.parameter("k", k, logits, axis)}
    assert gamma is not None
    return _losses.focal, {"gamma": _checks.parameter("gamma", gamma, logits, axis)}


def _slope(line: _Line, parameters: _Parameters, at: Margin) -> jax.Array:
    """Of a loss in log p, over that of cross entropy; not 0, so that its logarithm is finite."""
    slope = jax.jvp(partial(line, **parameters), (at,), (at.tangent(jnp.ones_like(at.p)),))[1]
    return jnp.maximum(jnp.abs(slope), jnp.finfo(slope.dtype).tiny)


def sigmoid_prior_shift(
    logits: ArrayLike, *, source_prior: ArrayLike, target_prior: ArrayLike
) -> jax.Array:
    r"""Log-odds for data where positives are rarer, or commoner, than in the training data.

    .. math::
        x + \log \frac{\pi'}{1 - \pi'} - \log \frac{\pi}{1 - \pi}

    turns log-odds that hold where a share :math:`\pi` of all is positive into log-odds that hold
    where :math:`\pi'` is, as after training on balanced or subsampled data. What positives look
    like, and negatives, must be the same in both.

    Args:
      logits: floating point, any shape; log-odds as they hold at `source_prior`:
        `sigmoid_posterior_logits`, or after cross entropy the logits themselves.
      source_prior: the share of positives that the logits were trained with, in (0, 1); a number,
        or an array that broadcasts against the logits. May be traced, like `target_prior`.
      target_prior: the share of positives where they will be used, likewise.

    Returns:
      Log-odds in the shape and dtype of `logits`; computed in at least float32.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a prior known at trace time is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = focaljax.sigmoid_posterior_logits(jnp.array([0.0, 1.0]), gamma=2.0)
      >>> print(jax.nn.sigmoid(logits))
      [0.5  0.936]
      >>> logits = focaljax.sigmoid_prior_shift(logits, source_prior=0.5, target_prior=0.01)
      >>> print(jax.nn.sigmoid(logits))
      [0.01 0.129]

    References:
      Saerens, Latinne and Decaestecker, Adjusting the Outputs of a Classifier to New a Priori
      Probabilities, Neural Computation 14 (2002); Elkan, The Foundations of
      Cost-Sensitive Learning, IJCAI 2001, theorem 2.
    """
    logits = _checks.array("logits", logits)
    _checks.floating("logits", logits)
    wide_logits = logits.astype(wide(logits.dtype))
    source, target = (
        _checks.beside(name, log_odds(name, prior), logits)
        for name, prior in (("source_prior", source_prior), ("target_prior", target_prior))
    )
    return (wide_logits + (target - source)).astype(logits.dtype)


def softmax_prior_shift(
    logits: ArrayLike, *, source_prior: ArrayLike, target_prior: ArrayLike, axis: int = -1
) -> jax.Array:
    r"""Logits for data where the classes have other shares than in the training data.

    .. math::
        x_c + \log \pi'_c - \log \pi_c

    turns logits whose softmax holds where class c has the share :math:`\pi_c` into logits whose
    softmax holds where it has :math:`\pi'_c`, as after training on balanced data or for a test on
    them. What each class looks like must be the same in both.

    Args:
      logits: floating point, at least one axis; log-probabilities as they hold at `source_prior`,
        but for a constant: `softmax_posterior_logits`, or after cross entropy the logits.
      source_prior: the share of each class that the logits were trained with, above 0, shape (C,).
        Counts will do, since a common factor changes nothing. May be traced, like `target_prior`.
      target_prior: the share of each class where they will be used, at least 0, shape (C,),
        likewise.
      axis: the axis of the classes; 1 for images as NCHW.

    Returns:
      Logits in the shape and dtype of `logits`, not normalized; computed in at least float32. -inf
      for a class whose `target_prior` is 0.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when `axis`, or a prior known at trace time, is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits, counts = jnp.array([1.0, 0.0, 0.0]), jnp.array([900, 90, 10])
      >>> logits = focaljax.softmax_prior_shift(
      ...     logits, source_prior=counts, target_prior=jnp.ones(3)
      ... )
      >>> print(jax.nn.softmax(logits))
      [0.026 0.097 0.876]

    References:
      Saerens, Latinne and Decaestecker, Adjusting the Outputs of a Classifier to New a Priori
      Probabilities, Neural Computation 14 (2002).
    """
    logits = _checks.array("logits", logits)
    _checks.floating("logits", logits)
    _checks.axis(axis, logits)
    wide_logits = logits.astype(wide(logits.dtype))
    _checks.within("source_prior", source_prior, 0.0, open_low=True, open_high=True)
    _checks.within("target_prior", target_prior, 0.0, open_high=True)
    source, target = (
        jnp.log(_checks.along_classes(name, prior, wide_logits, axis))
        for name, prior in (("source_prior", source_prior), ("target_prior", target_prior))
    )
    return (wide_logits + (target - source)).astype(logits.dtype)


def decision_threshold(
    *, false_positive_cost: ArrayLike, false_negative_cost: ArrayLike
) -> jax.Array:
    r"""The probability from which on "positive" is the cheaper decision.

    .. math::
        t = \frac{c_{FP}}{c_{FP} + c_{FN}}

    With the true probability :math:`\eta`, calling it positive costs :math:`(1 - \eta) c_{FP}` on
    average and calling it negative :math:`\eta c_{FN}`. Compare it with `sigmoid_posterior`, not
    with the sigmoid of logits that focal loss has trained. Among more classes the cheapest decision
    is ``jnp.argmin(posterior @ costs, -1)``, with ``costs[true class, decision]``.

    Args:
      false_positive_cost: what it costs to call a negative positive, over what the right decision
        would; at least 0, in any unit; a number or an array.
      false_negative_cost: what it costs to call a positive negative, likewise in the same unit; a
        number, or an array in the shape of the other. Not both may be 0.

    Returns:
      Thresholds in [0, 1], in JAX's default float dtype; positive is the decision where
      ``sigmoid_posterior(...) >= threshold``.

    Raises:
      AssertionError: when the shapes differ.
      ValueError: when a cost known at trace time is out of range, or both are 0.

    Example:
      >>> import focaljax
      >>> print(focaljax.decision_threshold(false_positive_cost=1.0, false_negative_cost=20.0))
      0.0476

    References:
      Elkan, The Foundations of Cost-Sensitive Learning, IJCAI 2001, equation 2.
    """
    costs = {"false_positive_cost": false_positive_cost, "false_negative_cost": false_negative_cost}
    for name, cost in costs.items():
        _checks.within(name, cost, 0.0, open_high=True)
    of_positive, of_negative = (_checks.numbers(*named).astype(float) for named in costs.items())
    if of_positive.ndim and of_negative.ndim:
        _checks.same_shape(
            "false_negative_cost",
            of_negative,
            "false_positive_cost",
            of_positive,
            "or give one of them as a number",
        )
    total = 0.5 * of_positive + 0.5 * of_negative  # half, so that it is finite
    known = _checks.known("costs", total)
    if known is not None and not known.all():
        raise ValueError("false_positive_cost and false_negative_cost must not both be 0")
    return 0.5 * of_positive / total
