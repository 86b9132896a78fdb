"""The relatives of focal loss that detectors, segmenters and taggers train with.

Their lines are in `_losses`; what is not said of an argument here is said in `sigmoid_focal_loss`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from focaljax import _checks, _losses, _softmax
from focaljax._pointwise import Margin, wide
from focaljax._sigmoid import Line, elementwise_loss
from focaljax._softmax import loss_of_classes


def sigmoid_poly1_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 0.0,
    epsilon: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Poly-1: focal loss or cross entropy, with another coefficient on its first term.

    .. math::
        L = -(1 - p_t)^\gamma \log p_t + \epsilon (1 - p_t)^{\gamma + 1}

    Linear in a soft label. After training, `sigmoid_posterior` with this function of the margin as
    its `loss` gives true probabilities.

    Args:
      logits: as in `sigmoid_focal_loss`, like `labels`, `alpha`, `where`, and what is returned and
        raised.
      labels: in [0, 1].
      gamma: at least 0; 0 is Poly-1 of cross entropy.
      epsilon: the coefficient, any number.
      alpha: the weight of positives; negatives get 1 - alpha.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import focaljax
      >>> print(focaljax.sigmoid_poly1_loss(0.5, 1))
      0.8516

    References:
      Leng et al., PolyLoss, ICLR 2022, equations 5 and 8.
    """
    return elementwise_loss(
        _losses.poly1, logits, labels, alpha, where, gamma=gamma, epsilon=epsilon
    )


def softmax_poly1_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 0.0,
    epsilon: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Poly-1 for classes of which one is true; see `sigmoid_poly1_loss`.

    Args:
      logits: as in `softmax_focal_loss`, like `labels`, `alpha`, `axis`, `where`, and what is
        returned and raised.
      labels: class ids, or distributions over the classes.
      gamma: at least 0; 0 is Poly-1 of cross entropy.
      epsilon: the coefficient, any number.
      alpha: one weight per class.
      axis: the axis of the classes.
      where: True means included; masks examples, or classes.

    Returns:
      The loss of each example.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.softmax_poly1_loss(jnp.array([0.5, 0.0]), 0))
      0.8516

    References:
      Leng et al., PolyLoss, ICLR 2022, equations 5 and 8.
    """
    return loss_of_classes(
        _losses.poly1, logits, labels, alpha, axis, where, gamma=gamma, epsilon=epsilon
    )


def sigmoid_reduced_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    threshold: ArrayLike = 0.5,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Reduced focal loss: cross entropy up to a threshold, focal loss beyond it.

    .. math::
        L = -\min\left(1, \frac{1 - p_t}{1 - m}\right)^\gamma \log p_t

    It is continuous: of the hard examples none counts less than in cross entropy. Linear in a soft
    label. There is no posterior: the slope jumps at the threshold, so that near it the expected
    loss has two minima.

    Args:
      logits: as in `sigmoid_focal_loss`, like `labels`, `alpha`, `where`, and what is returned and
        raised.
      labels: in [0, 1].
      gamma: at least 0.
      threshold: m, the probability from which on an example counts less, in (0, 1).
      alpha: the weight of positives; negatives get 1 - alpha.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_reduced_focal_loss(jnp.array([-1.0, 2.0]), jnp.array([1, 1])))
      [1.3133 0.0072]

    References:
      Sergievskiy and Ponamarev, Reduced Focal Loss, 2019, equation 3, where m is 1/2.
    """
    return elementwise_loss(
        _losses.reduced_focal, logits, labels, alpha, where, gamma=gamma, threshold=threshold
    )


def softmax_reduced_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    threshold: ArrayLike = 0.5,
    alpha: ArrayLike | None = None,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Reduced focal loss for classes of which one is true; see `sigmoid_reduced_focal_loss`.

    Args:
      logits: as in `softmax_focal_loss`, like `labels`, `alpha`, `axis`, `where`, and what is
        returned and raised.
      labels: class ids, or distributions over the classes.
      gamma: at least 0.
      threshold: the probability from which on an example counts less, in (0, 1).
      alpha: one weight per class.
      axis: the axis of the classes.
      where: True means included; masks examples, or classes.

    Returns:
      The loss of each example.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.softmax_reduced_focal_loss(jnp.array([2.0, 0.0]), 0))
      0.0072

    References:
      Sergievskiy and Ponamarev, Reduced Focal Loss, 2019, equation 3, where the threshold is 1/2.
    """
    return loss_of_classes(
        _losses.reduced_focal, logits, labels, alpha, axis, where, gamma=gamma, threshold=threshold
    )


def sigmoid_focal_star_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    steepness: ArrayLike = 2.0,
    offset: ArrayLike = 1.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""FL*: cross entropy of a margin that is steeper and shifted, which is convex.

    .. math::
        L = -\frac{1}{\gamma} \log \sigma(\gamma z + \beta), \qquad z = (2y - 1) x

    Linear in a soft label. `sigmoid_posterior` with this function of the margin as its `loss` gives
    true probabilities.

    Args:
      logits: as in `sigmoid_focal_loss`, like `labels`, `alpha`, `where`, and what is returned and
        raised.
      labels: in [0, 1].
      steepness: the paper's gamma, above 0.
      offset: the paper's beta, any number.
      alpha: the weight of positives; negatives get 1 - alpha.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import focaljax
      >>> print(focaljax.sigmoid_focal_star_loss(0.5, 1))
      0.0635

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, appendix A.
    """
    return elementwise_loss(
        _losses.focal_star, logits, labels, alpha, where, steepness=steepness, offset=offset
    )


def sigmoid_quality_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    beta: ArrayLike = 2.0,
    constant_weight: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Quality focal loss (QFL): focal loss towards the quality of a box.

    .. math::
        L = |y - p|^\beta\, \mathrm{BCE}(x, y)

    It is least at p = y, the quality; so p is to be taken as it is: there is no posterior.

    Args:
      logits: as in `sigmoid_focal_loss`, like `where`, and what is returned and raised.
      labels: the quality, such as the overlap (IoU) of the box with the object, in [0, 1]; 0 for
        background and for the other classes.
      beta: at least 0.
      constant_weight: whether autodiff takes the weight for a constant.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_quality_focal_loss(jnp.array([0.5, -2.0]), jnp.array([0.8, 0.0])))
      [0.0181 0.0018]

    References:
      Li et al., Generalized Focal Loss, NeurIPS 2020, equation 2.
    """
    of_label = _by_label(constant_weight)
    return elementwise_loss(_losses.quality_focal, logits, labels, None, where, of_label, beta=beta)


def sigmoid_varifocal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 0.75,
    gamma: ArrayLike = 2.0,
    constant_weight: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Varifocal loss (VFL): positives weigh what they are worth, negatives fade.

    .. math::
        L = y\, \mathrm{BCE}(x, y) \;\text{if } y > 0, \qquad
        \alpha p^\gamma\, \mathrm{softplus}(x) \;\text{if } y = 0

    The gradient is that of the formula, as in the authors' code. RT-DETR's takes the weight for a
    constant: `constant_weight`. There is no posterior: it is no function of the margin.

    Args:
      logits: as in `sigmoid_focal_loss`, like `where`, and what is returned and raised.
      labels: the quality, such as the overlap (IoU) of the box with the object, in [0, 1]; 0 for
        background and for the other classes.
      alpha: the weight of negatives, at least 0.
      gamma: at least 0.
      constant_weight: whether autodiff takes the weight for a constant.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_varifocal_loss(jnp.array([0.5, 0.5]), jnp.array([0.8, 0.0])))
      [0.45926163 0.2830587 ]

    References:
      Zhang et al., VarifocalNet, CVPR 2021, equation 2.
    """
    of_label = _by_label(constant_weight)
    return elementwise_loss(
        _losses.varifocal, logits, labels, None, where, of_label, alpha=alpha, gamma=gamma
    )


def sigmoid_matchability_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 1.5,
    constant_weight: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Matchability-aware loss (MAL): a poorly matched box asks for a low score.

    .. math::
        L = \mathrm{BCE}(x, y^\gamma) \;\text{if } y > 0, \qquad
        p^\gamma\, \mathrm{softplus}(x) \;\text{if } y = 0

    The gradient is that of the formula. DEIM's code takes the weight for a constant:
    `constant_weight`. There is no posterior: it is no function of the margin.

    Args:
      logits: as in `sigmoid_focal_loss`, like `where`, and what is returned and raised.
      labels: the overlap (IoU) of a matched box, in [0, 1]; 0 for all others.
      gamma: at least 0.
      constant_weight: whether autodiff takes the weight for a constant.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_matchability_loss(jnp.array([0.5, 0.5]), jnp.array([0.8, 0.0])))
      [0.6163 0.4784]

    References:
      Huang et al., DEIM, CVPR 2025, equation 4.
    """
    of_label = _by_label(constant_weight)
    return elementwise_loss(
        _losses.matchability, logits, labels, None, where, of_label, gamma=gamma
    )


def sigmoid_iou_aware_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mixing: ArrayLike = 0.25,
    gamma: ArrayLike = 2.0,
    constant_weight: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""IoU-aware cross entropy (IA-BCE): towards a mean of the score and the overlap.

    .. math::
        L = \mathrm{BCE}(x, t),\; t = \max(p^a y^{1 - a}, 0.01) \;\text{if } y > 0, \qquad
        p^\gamma\, \mathrm{softplus}(x) \;\text{if } y = 0

    The target t is a constant to autodiff, as in the codes of Align-DETR and LW-DETR; the weight of
    a negative is not, unless `constant_weight`. There is no posterior: it is no function of the
    margin.

    Args:
      logits: as in `sigmoid_focal_loss`, like `where`, and what is returned and raised.
      labels: the overlap (IoU) of a matched box, in [0, 1]; 0 for all others.
      mixing: a, the share of the score in the target, in [0, 1].
      gamma: at least 0.
      constant_weight: whether autodiff takes the weight of a negative for a constant.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_iou_aware_loss(jnp.array([0.5, 0.5]), jnp.array([0.8, 0.0])))
      [0.5984 0.3774]

    References:
      Cai et al., Align-DETR, BMVC 2024, equation 5.
    """
    of_label = _by_label(constant_weight)
    return elementwise_loss(
        _losses.iou_aware, logits, labels, None, where, of_label, mixing=mixing, gamma=gamma
    )


def sigmoid_gaussian_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: ArrayLike = 2.0,
    beta: ArrayLike = 4.0,
    constant_weight: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Penalty-reduced focal loss of a heatmap: a miss beside a peak counts less.

    .. math::
        L = -(1 - p)^\alpha \log p \;\text{if } y = 1, \qquad
        -(1 - y)^\beta p^\alpha \log(1 - p) \;\text{otherwise}

    For the mean over the peaks write ``normalize_by_positives(loss, heatmap == 1)``; with no peak
    that is the sum. There is no posterior: it is no function of the margin.

    Args:
      logits: as in `sigmoid_focal_loss`, like `where`, and what is returned and raised.
      labels: the heatmap, in [0, 1]: exactly 1 at a peak, a Gaussian around it.
      alpha: at least 0.
      beta: at least 0.
      constant_weight: whether autodiff takes the weight by p for a constant.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> heatmap = jnp.array([1.0, 0.5])
      >>> print(focaljax.sigmoid_gaussian_focal_loss(jnp.array([0.5, 0.5]), heatmap))
      [0.0676 0.0236]

    References:
      Law and Deng, CornerNet, ECCV 2018, equation 1; Zhou et al., Objects as Points, 2019.
    """
    of_label = _by_label(constant_weight)
    return elementwise_loss(
        _losses.gaussian_focal, logits, labels, None, where, of_label, alpha=alpha, beta=beta
    )


def sigmoid_asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_positive: ArrayLike = 1.0,
    gamma_negative: ArrayLike = 4.0,
    margin: ArrayLike = 0.05,
    constant_weight: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Asymmetric loss (ASL) for several labels: negatives fade faster, the easiest are dropped.

    .. math::
        L_+ = -(1 - p)^{\gamma_+} \log p, \qquad
        L_- = -p_m^{\gamma_-} \log(1 - p_m), \qquad p_m = \max(p - m, 0)

    Linear in a soft label: y L+ + (1 - y) L-. The gradient is that of the formula; the authors'
    code, by default, takes the weights for constants: `constant_weight`. There is no posterior: an
    easy negative has no gradient.

    Args:
      logits: as in `sigmoid_focal_loss`, like `where`, and what is returned and raised.
      labels: in [0, 1].
      gamma_positive: at least 0.
      gamma_negative: at least 0.
      margin: m, up to which a probability of a negative costs nothing, in [0, 1).
      constant_weight: whether autodiff takes the weights for constants.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_asymmetric_loss(jnp.array([0.5, 0.5]), jnp.array([1, 0])))
      [0.179 0.0913]

    References:
      Ridnik et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021, equations 4 to 7.
    """
    return elementwise_loss(
        _losses.asymmetric,
        logits,
        labels,
        None,
        where,
        _by_label(constant_weight),
        gamma_positive=gamma_positive,
        gamma_negative=gamma_negative,
        margin=margin,
    )


def sigmoid_smoothed_focal_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: ArrayLike = 2.0,
    label_smoothing: ArrayLike = 0.1,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Focal loss with smoothed labels: they enter the cross entropy, and not the weight.

    .. math::
        L = u^\gamma\, \mathrm{BCE}(x, y'), \qquad y' = y + s (1/2 - y), \qquad
        u = y (1 - p) + (1 - y) p

    There is no posterior: it is no function of the margin.

    Args:
      logits: as in `sigmoid_focal_loss`, like `labels`, `alpha`, `where`, and what is returned and
        raised.
      labels: in [0, 1], not smoothed.
      gamma: at least 0.
      label_smoothing: s, in [0, 1].
      alpha: the weight of positives; negatives get 1 - alpha.
      where: True means included.

    Returns:
      The loss of each element.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid_smoothed_focal_loss(jnp.array([0.5, 0.5]), jnp.array([1, 0])))
      [0.0711 0.3677]

    References:
      Tan et al., EfficientDet, CVPR 2020, and its code.
    """
    return elementwise_loss(
        _losses.smoothed_focal,
        logits,
        labels,
        alpha,
        where,
        _of_both,
        gamma=gamma,
        label_smoothing=label_smoothing,
    )


def distribution_focal_loss(
    logits: ArrayLike, targets: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
    r"""Distribution focal loss (DFL): cross entropy to the two bins beside a real target.

    .. math::
        L = -(\lceil t \rceil - t) \log p_{\lfloor t \rfloor}
            - (t - \lfloor t \rfloor) \log p_{\lfloor t \rfloor + 1}

    Bin i stands for the number i. Despite its name there is no modulating factor.

    Args:
      logits: floating point, at least one axis; the bins along `axis`.
      targets: real numbers in the shape of `logits` without `axis`, in [0, bins - 1]; the last bin
        is one of them. One outside gives NaN unless masked.
      axis: the axis of the bins.
      where: as in `softmax_focal_loss`.

    Returns:
      The loss of each target, in the dtype of `logits`.

    Raises:
      AssertionError: when a shape or dtype is not as above.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> logits = jnp.array([[0.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 0.0]])
      >>> print(focaljax.distribution_focal_loss(logits, jnp.array([1.25, 3.0])))
      [1.2438 2.4938]

    References:
      Li et al., Generalized Focal Loss, NeurIPS 2020, equation 6.
    """
    logits, targets = _checks.array("logits", logits), _checks.array("targets", targets)
    _checks.floating("logits", logits)
    _checks.axis(axis, logits)
    _checks.real("targets", targets)
    expected = _checks.loss_of(logits, axis % logits.ndim)
    advice = "one real number for each row of bins"
    _checks.same_shape("targets", targets, "logits without axis", expected, advice)
    targets = jnp.expand_dims(targets.astype(wide(logits.dtype)), axis)
    bins = lax.broadcasted_iota(targets.dtype, logits.shape, axis % logits.ndim)
    last = logits.shape[axis] - 1
    targets = jnp.where((targets >= 0) & (targets <= last), targets, jnp.nan)
    labels = jnp.maximum(1 - jnp.abs(bins - targets), 0)
    return _softmax.softmax_focal_loss(logits, labels, gamma=0.0, axis=axis, where=where)


def softmax_asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_positive: float = 0.0,
    gamma_negative: float = 4.0,
    label_smoothing: float = 0.1,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""Asymmetric loss (ASL) for classes of which one is true.

    .. math::
        L = -\sum_c y'_c\, w_c \log p_c, \qquad w_t = (1 - p_t)^{\gamma_+},
        \qquad w_c = p_c^{\gamma_-} \;\text{for } c \ne t

    with y' the smoothed label, 1 - s + s/C for the true class and s/C for each other. Without
    smoothing it is `softmax_focal_loss` with gamma_positive.

    Args:
      logits: as in `softmax_focal_loss`, the classes along the last axis; so are `where`, and what
        is returned and raised.
      labels: class ids, integers in the shape of `logits` without its last axis.
      gamma_positive: at least 0.
      gamma_negative: at least 0.
      label_smoothing: s, in [0, 1].
      where: True means included; masks examples.

    Returns:
      The loss of each example.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.softmax_asymmetric_loss(jnp.array([2.0, 0.0, 1.0]), 0))
      0.3806

    References:
      Ridnik et al., Asymmetric Loss For Multi-Label Classification, ICCV 2021, and its code.
    """
    logits, ids, axis = _softmax.arrays(logits, labels, -1)
    _checks.class_ids(jnp.squeeze(ids, axis), logits, axis)
    parameters = {
        "gamma_positive": gamma_positive,
        "gamma_negative": gamma_negative,
        "label_smoothing": label_smoothing,
    }
    positive, negative, smoothing = (
        _checks.parameter(name, value, logits, axis) for name, value in parameters.items()
    )
    classes = logits.shape[axis]
    is_true = jax.nn.one_hot(jnp.squeeze(ids, axis), classes, dtype=wide(logits.dtype))
    smoothed = is_true + _losses.number(smoothing) * (1 / classes - is_true)
    exists = (ids >= 0) & (ids < classes)
    smoothed = jnp.where(exists, smoothed, jnp.nan)

    def line(at: Margin) -> jax.Array:
        return _losses.focal(at, positive) * is_true - (1 - is_true) * at.log_p * (
            _losses.focal_weight(-at, negative)
        )

    return loss_of_classes(line, logits, smoothed, None, axis, where)


def matching_cost(
    logits: ArrayLike,
    ids: ArrayLike,
    loss: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    r"""What it costs to have a query find an object, for the matching of a DETR-style detector.

    .. math::
        \mathrm{cost}_{q, t} = L(x_{q, c_t}, 1) - L(x_{q, c_t}, 0)

    Give it the loss that you train with, with the same alpha: matching by another is a bug that
    others have had to fix. Add the costs of the boxes, then find the assignment by
    ``optax.assignment.hungarian_algorithm`` or ``scipy.optimize.linear_sum_assignment``.

    Args:
      logits: floating point, [..., Q, C]; of each query, the log-odds of each class.
      ids: integers, [..., T]; the class of each object. One outside [0, C) gives NaN unless masked.
      loss: a sigmoid loss of logits and labels, such as `sigmoid_focal_loss` or a
        ``functools.partial`` of it.
      where: booleans, [..., T]; where False, the cost is 0 for every query: padding.

    Returns:
      The costs, [..., Q, T], in the dtype of `logits`.

    Raises:
      AssertionError: when a shape or dtype is not as above.

    Example:
      >>> import functools
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import focaljax
      >>> logits = jnp.array([[2.0, -1.0], [-1.0, 3.0], [0.0, 0.0]])
      >>> loss = functools.partial(focaljax.sigmoid_focal_loss, alpha=0.25)
      >>> cost = focaljax.matching_cost(logits, jnp.array([1, 0]), loss)
      >>> print(cost.shape)
      (3, 2)
      >>> queries, objects = optax.assignment.hungarian_algorithm(cost)
      >>> print(queries, objects)
      [0 1] [1 0]

    References:
      Carion et al., End-to-End Object Detection with Transformers, ECCV 2020; Zhu et al.,
      Deformable DETR, ICLR 2021, for focal loss in the cost.
    """
    logits, ids = _checks.array("logits", logits), _checks.array("ids", ids)
    _checks.floating("logits", logits)
    _checks.batches("ids", ids, logits)
    cost = loss(logits, jnp.ones_like(logits)) - loss(logits, jnp.zeros_like(logits))
    picked = jnp.take_along_axis(cost, ids[..., None, :], -1, mode="clip")
    exists = (ids >= 0) & (ids < logits.shape[-1])
    picked = jnp.where(exists[..., None, :], picked, jnp.nan)
    if where is not None:
        where = _checks.array("where", where)
        _checks.mask(where, "ids", ids)
        picked = jnp.where(where[..., None, :], picked, 0)
    return picked


def _of_both(line: Line, at: Margin, labels: jax.Array) -> jax.Array:
    return line(at, labels, lambda weight: weight)


def _of_both_by_constant_weight(line: Line, at: Margin, labels: jax.Array) -> jax.Array:
    return line(at, labels, lax.stop_gradient)


def _by_label(constant_weight: bool) -> Callable[[Line, Margin, jax.Array], jax.Array]:
    return _of_both_by_constant_weight if constant_weight else _of_both
