"""What is true: the losses and their derivatives as the papers write them, in exact numbers.

The formulas are plain, and would be poor numerics in floats; the numbers carry them: mpmath with 50
digits (`EXACT`) or, where a dense grid would take mpmath hours, numpy's long double (`DENSE`).
Nothing here is shared with the library.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import mpmath
import numpy as np

mpmath.mp.dps = 50


class Numbers(NamedTuple):
    """A number system: how floats enter it, and the functions the losses are made of."""

    of: Callable
    exp: Callable
    log: Callable
    log1p: Callable


EXACT = Numbers(
    np.frompyfunc(lambda x: mpmath.mpf(float(x)), 1, 1),
    *(np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.log, mpmath.log1p)),
)
DENSE = Numbers(partial(np.asarray, dtype=np.longdouble), np.exp, np.log, np.log1p)

# exp(1e4) must be a number, and float64 must be coarse beside it.
DENSE_WORKS = np.finfo(np.longdouble).nmant >= 63 and np.finfo(np.longdouble).maxexp >= 16384


class Sum(NamedTuple):
    """A sum, and the size of its largest term: what the rounding of a sum is relative to."""

    value: Any
    largest: Any


class Truth(NamedTuple):
    loss: Sum
    slope: Sum  # d / d logit
    bend: Sum  # d^2 / d logit^2
    label: Sum  # d / d label
    parameter: Sum  # d / d gamma or k


class Weight(NamedTuple):
    value: Any
    slope: Any  # d / d margin
    bend: tuple  # the terms of d^2 / d margin^2
    parameter: Any  # d / d gamma or k


def add(*terms):
    return Sum(sum(terms[1:], terms[0]), reduce(np.maximum, map(np.abs, terms)))


def sigma(z, n=EXACT):
    return 1 / (1 + n.exp(-z))


def softplus(z, n=EXACT):
    return n.log1p(n.exp(z))


def focal_weight(z, gamma, n=EXACT):
    p, q = sigma(z, n), sigma(-z, n)
    w = q**gamma
    return Weight(
        w, -gamma * p * w, (gamma * gamma * p * p * w, -gamma * p * q * w), -softplus(z, n) * w
    )


def soft_truncation_weight(z, k, n=EXACT):
    p, w = sigma(k * z, n), sigma(-k * z, n)
    return Weight(w, -k * p * w, (k * k * p * p * w, -k * k * p * w * w), -z * p * w)


def hard_threshold_weight(z, threshold, n=EXACT):
    return Weight(0 * z + (sigma(z, n) <= threshold), 0 * z, (0 * z,), 0 * z)


def linear_in_label(weight):
    """y L(x) + (1 - y) L(-x), with L the weight times cross entropy at a margin."""

    def truth(x, y, parameter, n=EXACT):
        loss, slope, bend, by_parameter, of_label = [], [], [], [], []
        for mass, side in ((y, 1), (1 - y, -1)):
            z = side * x
            w, cost = weight(z, parameter, n), softplus(-z, n)
            p, q = sigma(z, n), sigma(-z, n)
            loss += [mass * w.value * cost]
            slope += [side * mass * term for term in (w.slope * cost, -w.value * q)]
            bend += [mass * term * cost for term in w.bend]
            bend += [mass * term for term in (-2 * w.slope * q, w.value * p * q)]
            by_parameter += [mass * w.parameter * cost]
            of_label += [side * w.value * cost]
        return Truth(*(add(*terms) for terms in (loss, slope, bend, of_label, by_parameter)))

    return truth


def focal(x, y, gamma, n=EXACT):
    """u ** gamma times the cross entropy of y, where u = y (1 - p) + (1 - y) p."""
    p, q = sigma(x, n), sigma(-x, n)
    u, du, ddu = y * q + (1 - y) * p, (1 - 2 * y) * p * q, (1 - 2 * y) * p * q * (q - p)
    w = u**gamma
    cost = y * softplus(-x, n) + (1 - y) * softplus(x, n)
    pulls = -y * q, (1 - y) * p  # the slope of cost, label by label
    return Truth(
        loss=add(w * cost),
        slope=add(gamma * w * (du / u) * cost, *(w * pull for pull in pulls)),
        bend=add(
            gamma * (gamma - 1) * w * (du / u) ** 2 * cost,
            gamma * w * (ddu / u) * cost,
            *(2 * gamma * w * (du / u) * pull for pull in pulls),
            w * p * q,
        ),
        label=add(
            gamma * w * (q / u) * cost,
            -gamma * w * (p / u) * cost,
            w * softplus(-x, n),
            -w * softplus(x, n),
        ),
        # where u is near 1, log u is as good as u
        parameter=Sum(w * n.log(u) * cost, w * cost * np.maximum(np.abs(n.log(u)), 1)),
    )


soft_truncation = linear_in_label(soft_truncation_weight)
hard_threshold = linear_in_label(hard_threshold_weight)


def total(*sums):
    values, sizes = zip(*sums, strict=True)
    return Sum(sum(values[1:], values[0]), reduce(np.maximum, sizes))


def scaled(one, by):
    """A sum times a number for each of its axes and more; 0 times what is infinite is 0."""
    value, size = (np.reshape(part, part.shape + (1,) * (by.ndim - part.ndim)) for part in one)
    return Sum(np.where(by == 0, 0, value * by), np.where(by == 0, 0, size * np.abs(by)))


def margin_of(x, ids, n=EXACT):
    """The margin of the class `ids` of each row, and its slope in every logit of the row."""
    rows, x = np.arange(len(x)), x - np.max(x, -1, keepdims=True)
    others = n.exp(x)
    others[rows, ids] *= 0
    mass = np.sum(others, -1)
    slope = -others / mass[:, None]
    slope[rows, ids] += 1
    return x[rows, ids] - n.log(mass), slope


def softmax(of_margin):
    """L at the margin of the class `ids` of each row: loss, slopes and, if asked for, bends."""

    def truth(x, ids, parameter, n=EXACT, *, bends=False):
        z, slope = margin_of(x, ids, n)
        at = of_margin(z, 1, parameter, n)
        found = at.loss, scaled(at.slope, slope)
        if not bends:
            return found
        # the slope of the log-sum-exp of the others, and how that varies
        share = np.where(np.arange(x.shape[1]) == ids[:, None], 0, -slope)
        own = share[:, :, None] * np.eye(x.shape[1], dtype=int)
        both = share[:, :, None] * share[:, None, :]
        by_bend = scaled(at.bend, slope[:, :, None] * slope[:, None, :])
        pull = at.slope.value[:, None, None]
        return *found, total(by_bend, add(-pull * own, pull * both))

    return truth


def su_soft_truncation(x, ids, k, n=EXACT):
    """-softmax(-k x)_t log softmax(x)_t, which is not of one margin: loss and slopes."""
    z, slope = margin_of(x, ids, n)
    k = np.broadcast_to(k, z.shape)
    reverse, reverse_slope = margin_of(-k[:, None] * x, ids, n)
    w, cost = sigma(reverse, n), softplus(-z, n)
    fall = -k * w * sigma(-reverse, n) * cost
    pull = -w * sigma(-z, n)
    return add(w * cost), add(fall[:, None] * reverse_slope, pull[:, None] * slope)


def over_classes(truth):
    """sum_c y_c L_c for distributions y, where `truth` is of class ids."""

    def of_distributions(x, y, *rest, **options):
        def of_class(c):
            found = truth(x, np.full(len(x), c), *rest, **options)
            return [scaled(one, y[:, c].reshape(-1, *[1] * (one.value.ndim - 1))) for one in found]

        classes = map(of_class, range(x.shape[1]))
        return reduce(lambda one, other: list(map(total, one, other)), classes)

    return of_distributions


def class_balanced_weights(counts, beta):
    weights = [(1 - beta) / (1 - beta**count) for count in counts]
    return [len(weights) * w / sum(weights) for w in weights]


def log_odds(p):
    return mpmath.log(p) - mpmath.log(1 - p)


def posterior_share(z, weight, parameter):
    """h(p) = p / (w + p w' log p) of the probability p at margin z, where w' is d w / d p."""
    w = weight(z, parameter)
    return sigma(z) / (w.value - w.slope * softplus(-z) / sigma(-z))


# --- relatives ------------------------------------------------------------------------------------
# Of one logit z and label y. What is a constant to autodiff is taken at another logit: `at` for a
# target, `weight_at` for a weight, where that is a constant too.


def of_margin(line):
    def truth(z, y, at, **parameters):
        return y * line(z, **parameters) + (1 - y) * line(-z, **parameters)

    return truth


def poly1(z, gamma, epsilon):
    q = sigma(-z)
    return -(q**gamma) * mpmath.log(sigma(z)) + epsilon * q ** (gamma + 1)


def reduced_focal(z, gamma, threshold):
    return -(min(1, sigma(-z) / (1 - threshold)) ** gamma) * mpmath.log(sigma(z))


def focal_star(z, steepness, offset):
    return -mpmath.log(sigma(steepness * z + offset)) / steepness


def of_weight_and_target(weigh):
    """Cross entropy of a target, times a weight."""

    def truth(z, y, at, weight_at=None, **parameters):
        weight, target = weigh(z if weight_at is None else weight_at, y, at, **parameters)
        return -weight * (target * mpmath.log(sigma(z)) + (1 - target) * mpmath.log(sigma(-z)))

    return truth


def quality_focal(z, y, at, beta):
    return abs(y * sigma(-z) - (1 - y) * sigma(z)) ** beta, y


def varifocal(z, y, at, alpha, gamma):
    return y if y > 0 else alpha * sigma(z) ** gamma, y


def matchability(z, y, at, gamma):
    return 1 if y > 0 else sigma(z) ** gamma, y**gamma


def iou_aware(z, y, at, mixing, gamma):
    if y == 0:
        return sigma(z) ** gamma, y
    return 1, max(sigma(at) ** mixing * y ** (1 - mixing), mpmath.mpf(0.01))


def gaussian_focal(z, y, at, alpha, beta):
    if y == 1:
        return sigma(-z) ** alpha, 1
    return (1 - y) ** beta * sigma(z) ** alpha, 0


def smoothed_focal(z, y, at, gamma, label_smoothing):
    weight = (y * sigma(-z) + (1 - y) * sigma(z)) ** gamma
    return weight, y + label_smoothing * (mpmath.mpf(0.5) - y)


def asymmetric(z, y, at, gamma_positive, gamma_negative, margin, weight_at=None):
    where = z if weight_at is None else weight_at
    shifted, weighed = (max(sigma(x) - margin, mpmath.mpf(0)) for x in (z, where))
    of_positive = -(sigma(-where) ** gamma_positive) * mpmath.log(sigma(z))
    rest = sigma(-z) + margin if shifted > 0 else mpmath.mpf(1)  # 1 - shifted
    return y * of_positive - (1 - y) * weighed**gamma_negative * mpmath.log(rest)
