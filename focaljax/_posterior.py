r"""From the logits that a loss has trained to the probabilities of the classes, and to decisions.

Where training is done the slopes of the loss balance. If at margin z its slope is r(z) times that
of cross entropy, they balance where cross entropy's would with each class weighed by r: at a
probability q in proportion to ``eta * alpha * r``, with eta the true probability of the class. So
eta is in proportion to ``q / (alpha * r)``. With w the weight of the loss and p_t = q,

    r = w(q) + q w'(q) log q

As in `_modulation` all is written in the gap a = abs(z), with e = exp(-a).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from focaljax import _checks, _margin, _modulation
from focaljax._balance import log_odds


class _SlopeRatio(NamedTuple):
    """What makes up the slope of a loss over that of cross entropy.

    at the margin  a    exp(-parameter a) common (1 + pull log1p(e) / e)
    at the margin -a    common (1 + pull fade (a + log1p(e)))
    """

    log_common: jax.Array
    pull: jax.Array
    fade: jax.Array
    fade_rate: jax.Array | float  # fade = exp(-fade_rate a)


_Ratio = Callable[[_modulation.Logit, jax.Array], _SlopeRatio]  # of a logit and gamma or k


def _focal(t: _modulation.Logit, gamma: jax.Array) -> _SlopeRatio:
    return _SlopeRatio(log_common=-gamma * t.log, pull=gamma, fade=t.odds, fade_rate=1.0)


def _soft_truncation(t: _modulation.Logit, k: jax.Array) -> _SlopeRatio:
    fade = _modulation.decay(k, t.reach)
    return _SlopeRatio(
        log_common=-jnp.log1p(fade), pull=k / ((1 + fade) * t.near), fade=fade, fade_rate=k
    )


def _ratio_of(
    gamma: ArrayLike | None, k: ArrayLike | None, threshold: ArrayLike | None
) -> tuple[_Ratio, str, ArrayLike]:
    """The loss that the caller's hyper-parameter is of, with the parameter's name and value."""
    if threshold is not None:
        raise ValueError(
            "threshold: the hard threshold loss cannot be undone. It stops moving a probability "
            "that is past the threshold m, so how far past it the true one lies is lost: of two "
            "classes and m > 1/2, training ends at the true one clipped to [1 - m, m], and with "
            "m <= 1/2 the outcome says nothing. Train with focal loss or soft truncation, and give "
            "gamma or k"
        )
    if gamma is not None and k is not None:
        raise ValueError(
            "gamma and k are of different losses, got both: give the one that the logits were "
            "trained with"
        )
    if gamma is not None:
        _checks.within("gamma", gamma, 0.0, open_high=True)
        return _focal, "gamma", gamma
    if k is not None:
        _checks.within("k", k, 0.0, open_low=True, open_high=True)
        return _soft_truncation, "k", k
    raise ValueError(
        "gamma or k must say which loss trained the logits, got neither: gamma of focal loss, k of "
        "soft truncation; cross entropy is gamma=0"
    )


def sigmoid_posterior(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
) -> jax.Array:
    r"""The probability of a positive, from logits that a sigmoid loss here has trained.

    After focal loss or soft truncation :math:`q = \sigma(x)` is not the probability :math:`\eta` of
    a positive: with gamma = 2 it is .58 where that is .7. But it tells it, without further data:

    .. math::
        \eta = \frac{h(q) / \alpha}{h(q) / \alpha + h(1 - q) / (1 - \alpha)}, \qquad
        h(v) = \frac{v}{w(v) + v\, w'(v) \log v}

    with w the weight of the loss. That increases with the logit for every gamma, k and alpha, so
    rankings stay; gamma = 0 without alpha is the sigmoid.

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
        `alpha`.
      k: of `sigmoid_soft_truncation_loss`, likewise. Exactly one of `gamma` and `k` is needed.
      threshold: refused, with the reason: what `sigmoid_hard_threshold_loss` has cut off is lost.
      alpha: the weight of positives that the loss was given, in (0, 1); a number, or an array that
        broadcasts against the logits. None: both weighed 1.

    Returns:
      Probabilities in the shape and dtype of `logits`; computed in at least float32, where they are
      exact to 1e-6 of themselves for gamma and k up to 5. Near 1, ask for the negative's: that of
      ``-logits``, with 1 - alpha. NaN stays NaN.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when not exactly one of `gamma` and `k` is given, when a `threshold` is, or when a
        value known at trace time is out of range.

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
      Perspective, CVPR 2021, for focal loss; the derivation holds for soft truncation too.
    """
    return _of_sigmoid(logits, gamma, k, threshold, alpha, as_logits=False)


def sigmoid_posterior_logits(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
) -> jax.Array:
    r"""The log-odds of a positive, from logits that a sigmoid loss here has trained.

    ``jax.nn.sigmoid`` of them is `sigmoid_posterior`, which says when it holds. Log-odds are what
    further steps want: ``jax.nn.log_sigmoid``, `sigmoid_prior_shift`, a temperature, a loss from
    logits. Probabilities are 1 or 0 to the last digit long before their log-odds end.

    Args:
      logits: floating point, any shape; the log-odds that the network gives.
      gamma: of `sigmoid_focal_loss`, as the logits were trained with it; a number, or an array that
        broadcasts against the logits. May be traced, batched and differentiated, like `k` and
        `alpha`.
      k: of `sigmoid_soft_truncation_loss`, likewise. Exactly one of `gamma` and `k` is needed.
      threshold: refused, with the reason: what `sigmoid_hard_threshold_loss` has cut off is lost.
      alpha: the weight of positives that the loss was given, in (0, 1); a number, or an array that
        broadcasts against the logits. None: both weighed 1.

    Returns:
      Log-odds in the shape and dtype of `logits`; computed in at least float32. They grow as
      (1 + gamma) or (1 + k) times the logits do. Infinities stay; NaN stays NaN.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when not exactly one of `gamma` and `k` is given, when a `threshold` is, or when a
        value known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_posterior_logits(jnp.array([-2.0, 2.0]), gamma=2.0))
      [-5.398  5.398]

    References:
      Charoenphakdee et al., On Focal Loss for Class-Posterior Probability Estimation: A Theoretical
      Perspective, CVPR 2021, for focal loss; the derivation holds for soft truncation too.
    """
    return _of_sigmoid(logits, gamma, k, threshold, alpha, as_logits=True)


def _of_sigmoid(
    logits: ArrayLike,
    gamma: ArrayLike | None,
    k: ArrayLike | None,
    threshold: ArrayLike | None,
    alpha: ArrayLike | None,
    *,
    as_logits: bool,
) -> jax.Array:
    ratio, name, value = _ratio_of(gamma, k, threshold)
    logits = _checks.array("logits", logits)
    _checks.floating("logits", logits)
    wide = logits.astype(_modulation.wide(logits.dtype))
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, 1.0, open_low=True, open_high=True, dtype=wide.dtype)
        alpha = _modulation.parameter("alpha", alpha, wide)
    parameter = _modulation.parameter(name, value, wide)
    result: jax.Array = _sigmoid_posterior(ratio, as_logits, wide, parameter, alpha)
    return result.astype(logits.dtype)


# Compiled also when the caller does not: eager code then runs one program in place of many.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _sigmoid_posterior(
    ratio: _Ratio,
    as_logits: bool,
    logits: jax.Array,
    parameter: jax.Array,
    alpha: jax.Array | None,
) -> jax.Array:
    t = _modulation.see(logits, jnp.ones_like(logits), apart=False)
    r = ratio(t, parameter)
    at_miss = 1 + r.pull * r.fade * (t.reach + t.log)  # at the margin -a
    if as_logits:
        # that at a less that at -a, without cancellation where the logit is near 0
        excess = -jnp.expm1(-(1 + r.fade_rate) * t.reach) * t.log_ratio - r.fade * t.reach
        posterior = t.sign * ((1 + parameter) * t.gap - jnp.log1p(r.pull * excess / at_miss))
        return posterior if alpha is None else posterior + (jnp.log1p(-alpha) - jnp.log(alpha))
    # of the side that the logit does not lean to; what underflows comes last
    odds = (1 + r.pull * t.log_ratio) / at_miss
    if alpha is not None:
        weights = alpha, 1 - alpha  # rounded as in the loss
        near, far = (jnp.where(t.sign > 0, *pair) for pair in (weights, weights[::-1]))
        odds = odds * (near / far)
    odds = odds * t.odds * _modulation.decay(parameter, t.reach)
    return jnp.where(t.sign > 0, 1, odds) / (1 + odds)


def softmax_posterior(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    axis: int = -1,
) -> jax.Array:
    r"""The probabilities of the classes, from logits that a softmax loss here has trained.

    After focal loss or soft truncation :math:`q = \mathrm{softmax}(x)` are not the probabilities
    :math:`\eta` of the classes. But they tell them, without further data:

    .. math::
        \eta_c \propto \frac{h(q_c)}{\alpha_c}, \qquad
        h(v) = \frac{v}{w(v) + v\, w'(v) \log v}

    with w the weight of the loss. gamma = 0 without alpha is the softmax.

    It holds where the expected loss is least: for a network that has the capacity and the training.
    Like the softmax after cross entropy it does not mend overfitting, and not what was done to the
    data: classes sampled at other rates call for `softmax_prior_shift`, and of smoothed labels it
    gives the smoothed probabilities. A mask must not depend on the label. After the hard threshold
    loss and `su_softmax_soft_truncation_loss` of more than two classes it does not hold.

    But for `alpha` the order of the classes stays, as h increases for every gamma and for k up to
    3.318. With a larger k and more than two classes h falls somewhere between q = .32 and .5. Where
    the expected loss is least no two classes are there, so the formula still holds, but a network
    short of that may have them change places.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`. -inf is a class
        that cannot be, so classes masked by `where` in the loss are masked here by
        ``jnp.where(mask, logits, -jnp.inf)``.
      gamma: of `softmax_focal_loss`, as the logits were trained with it; a number, or an array that
        broadcasts against the loss, the shape of `logits` without `axis`. May be traced, batched
        and differentiated, like `k` and `alpha`.
      k: of `softmax_soft_truncation_loss`, likewise. Exactly one of `gamma` and `k` is needed.
      threshold: refused, with the reason: what `softmax_hard_threshold_loss` has cut off is lost.
      alpha: the weights of the classes that the loss was given, above 0, shape (C,). None: all
        weighed 1.
      axis: the axis of the classes; 1 for images as NCHW.

    Returns:
      Probabilities, which sum to 1 along `axis`, in the shape and dtype of `logits`; computed in at
      least float32, where they are exact to 1e-6 of themselves for gamma and k up to 5. NaN stays
      NaN, in all classes of an example.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when not exactly one of `gamma` and `k` is given, when a `threshold` is, or when
        `axis`, or a value known at trace time, is out of range.

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
      Perspective, CVPR 2021, for focal loss; the derivation holds for soft truncation too.
    """
    return _of_softmax(logits, gamma, k, threshold, alpha, axis, as_logits=False)


def softmax_posterior_logits(
    logits: ArrayLike,
    *,
    gamma: ArrayLike | None = None,
    k: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    axis: int = -1,
) -> jax.Array:
    r"""The log-probabilities of the classes, from logits that a softmax loss here has trained.

    The logarithm of `softmax_posterior`, which says when it holds. They are logits as well, whose
    softmax is the posterior: what `softmax_prior_shift`, a temperature or a loss from logits wants.

    Args:
      logits: floating point, at least one axis; any number of classes along `axis`. -inf is a class
        that cannot be, so classes masked by `where` in the loss are masked here by
        ``jnp.where(mask, logits, -jnp.inf)``.
      gamma: of `softmax_focal_loss`, as the logits were trained with it; a number, or an array that
        broadcasts against the loss, the shape of `logits` without `axis`. May be traced, batched
        and differentiated, like `k` and `alpha`.
      k: of `softmax_soft_truncation_loss`, likewise. Exactly one of `gamma` and `k` is needed.
      threshold: refused, with the reason: what `softmax_hard_threshold_loss` has cut off is lost.
      alpha: the weights of the classes that the loss was given, above 0, shape (C,). None: all
        weighed 1.
      axis: the axis of the classes; 1 for images as NCHW.

    Returns:
      Log-probabilities in the shape and dtype of `logits`; computed in at least float32. -inf for a
      class that cannot be. NaN stays NaN, in all classes of an example.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when not exactly one of `gamma` and `k` is given, when a `threshold` is, or when
        `axis`, or a value known at trace time, is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.softmax_posterior_logits(jnp.array([9.0, 1.0, -50.0]), gamma=2.0))
      [-1.126e-10 -2.291e+01 -7.390e+01]

    References:
      Charoenphakdee et al., On Focal Loss for Class-Posterior Probability Estimation: A Theoretical
      Perspective, CVPR 2021, for focal loss; the derivation holds for soft truncation too.
    """
    return _of_softmax(logits, gamma, k, threshold, alpha, axis, as_logits=True)


def _of_softmax(
    logits: ArrayLike,
    gamma: ArrayLike | None,
    k: ArrayLike | None,
    threshold: ArrayLike | None,
    alpha: ArrayLike | None,
    axis: int,
    *,
    as_logits: bool,
) -> jax.Array:
    ratio, name, value = _ratio_of(gamma, k, threshold)
    logits = _checks.array("logits", logits)
    _checks.floating("logits", logits)
    _checks.axis(axis, logits)
    axis = axis % logits.ndim
    wide = logits.astype(_modulation.wide(logits.dtype))
    example = jax.ShapeDtypeStruct(wide.shape[:axis] + wide.shape[axis + 1 :], wide.dtype)
    parameter = _modulation.parameter(name, value, example)
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, open_low=True, open_high=True, dtype=wide.dtype)
        alpha = _margin.along_classes("alpha", alpha, wide, axis)
        alpha = alpha / jnp.max(alpha)  # a common factor changes nothing
    result: jax.Array = _softmax_posterior(ratio, as_logits, axis, wide, parameter, alpha)
    return result.astype(logits.dtype)


@partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _softmax_posterior(
    ratio: _Ratio,
    as_logits: bool,
    axis: int,
    logits: jax.Array,
    parameter: jax.Array,
    alpha: jax.Array | None,
) -> jax.Array:
    leading = _margin.leading_of(logits, axis)
    margin = leading.margin  # but not its logit, which is a constant to autodiff
    hit = _margin.is_class(logits, leading.ids, axis)
    below = _margin.margins_below(logits, leading, axis)
    beside = partial(jnp.expand_dims, axis=axis)
    parameters = beside(parameter) if parameter.ndim else parameter

    # Everything beside the leading class, of which alone the slope ratio can be near 0.
    at_leading = _modulation.refined(
        partial(_slope_ratio, ratio), (parameter, margin.value), (None, margin.rest)
    )
    log_below = _log_slope_ratio(ratio, parameters, below)
    highest = jnp.sum(jnp.where(hit, logits, 0), axis, keepdims=True)
    odds = _margin.exp_difference(logits, highest) * beside(at_leading) * jnp.exp(-log_below)
    odds = jnp.where(hit, 1, jnp.maximum(odds, 0))  # not -0, where the exponential underflows
    parts = odds if alpha is None else odds / alpha
    total = jnp.sum(parts, axis, keepdims=True)
    posterior = parts / total
    if not as_logits:
        return posterior

    # The same in logarithms, which do not underflow; one after the other, as two logits may be
    # large beside their difference.
    log = logits - highest + beside(_log_slope_ratio(ratio, parameter, margin.value)) - log_below
    log = jnp.where(hit, 0, log) - jnp.log(total)
    if alpha is not None:
        log = log - jnp.log(alpha)
    # a logarithm near 0, which that of the one likely class may be, is known by what it leaves
    likely = posterior > 0.5
    left = jnp.sum(jnp.where(likely, 0, posterior), axis, keepdims=True)
    return jnp.where(likely, jnp.log1p(-jnp.where(likely, left, 0)), log)


def _slope_ratio(ratio: _Ratio, parameter: jax.Array, margin: jax.Array) -> jax.Array:
    bounded, lead = _bounded_slope_ratio(ratio, parameter, margin)
    return jnp.exp(bounded) * _modulation.decay(parameter, lead)


def _log_slope_ratio(ratio: _Ratio, parameter: jax.Array, margin: jax.Array) -> jax.Array:
    bounded, lead = _bounded_slope_ratio(ratio, parameter, margin)
    return bounded - parameter * lead


def _bounded_slope_ratio(
    ratio: _Ratio, parameter: jax.Array, margin: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the slope ratio but for ``-parameter * lead``, and that lead."""
    t = _modulation.see(margin, jnp.ones_like(margin), apart=False)
    r = ratio(t, parameter)
    ahead = jnp.where(t.sign > 0, t.log_ratio, r.fade * (t.reach + t.log))
    return r.log_common + jnp.log1p(r.pull * ahead), jnp.where(t.sign > 0, t.reach, 0)


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
    wide = logits.astype(_modulation.wide(logits.dtype))
    source, target = (
        _modulation.parameter(name, log_odds(name, prior), wide)
        for name, prior in (("source_prior", source_prior), ("target_prior", target_prior))
    )
    return (wide + (target - source)).astype(logits.dtype)


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
    wide = logits.astype(_modulation.wide(logits.dtype))
    _checks.within("source_prior", source_prior, 0.0, open_low=True, open_high=True)
    _checks.within("target_prior", target_prior, 0.0, open_high=True)
    source, target = (
        jnp.log(_margin.along_classes(name, prior, wide, axis))
        for name, prior in (("source_prior", source_prior), ("target_prior", target_prior))
    )
    return (wide + (target - source)).astype(logits.dtype)


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
