"""The public functions, a record each: what they take, and what is true of their results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import reference

import focaljax

LOGITS = np.array([[-4.595, 0.5, 2.0], [3.0, -1.0, 0.0]], np.float32)
LABELS = np.array([[0, 1, 0], [1, 1, 0]], np.int32)
LOSS = np.array([[0.5, 1.0, 2.0], [0.0, 4.0, 0.25]], np.float32)

# Softmax: an example of four classes for every element of the above.
CLASS_LOGITS = np.array(
    [
        [[-4.595, 0.5, 2.0, 0.25], [3.0, -1.0, 0.0, 1.5], [0.75, 2.25, -0.5, -3.0]],
        [[1.0, 1.0, -2.0, 0.5], [-1.25, 0.0, 9.5, 0.5], [0.1, 0.2, 0.3, 0.4]],
    ],
    np.float32,
)
CLASS_IDS = np.array([[2, 3, 1], [0, 2, 1]], np.int32)
DISTRIBUTIONS = np.array(
    [
        [[0.0, 0.25, 0.5, 0.25], [0.0, 0.0, 0.0, 1.0], [0.125, 0.625, 0.125, 0.125]],
        [[0.75, 0.0, 0.0, 0.25], [0.0625, 0.0625, 0.8125, 0.0625], [0.25, 0.25, 0.25, 0.25]],
    ],
    np.float32,
)

NOT_A_NUMBER = float("nan")
INFINITE = float("inf")


@dataclass(frozen=True, eq=False)
class Case:
    function: Callable
    data: Mapping[str, Any]  # positional: a name, and a value to call it with
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword-only: a name, its default
    parameter: str = ""  # the hyper-parameter, where there is one
    valid: tuple = ()
    invalid: tuple = ()
    truth: Callable | None = None  # in reference.py, of a loss or a modulation
    chosen: Mapping[str, Any] = field(default_factory=dict)  # options given unless others are
    note: str = ""  # what tells it from another case of the function

    @property
    def name(self):
        return self.function.__name__

    def __call__(self, *data, **options):
        """The function; where the hyper-parameter has no default, a value is chosen for it."""
        chosen = dict(self.chosen)
        if self.options.get(self.parameter) is REQUIRED:
            chosen[self.parameter] = self.valid[0]
        return self.function(*data, **{**chosen, **options})


REQUIRED = object()

RANGES = {
    "gamma": ((2.0, 0, 0.5, 1, 5, 3.7), (-1, -0.25, INFINITE, NOT_A_NUMBER)),
    "k": ((2.0, 0.1, 1, 10.5), (0, -2.0, INFINITE, NOT_A_NUMBER)),
    "threshold": ((0.5, 0.01, 0.99), (0, 1, 0.0, 1.0, -0.5, 1.5, NOT_A_NUMBER)),
    "alpha": ((0.25, 0, 1, 0.5), (-0.1, 1.1, 2, NOT_A_NUMBER)),
    "beta": ((0.999, 0, 0.0, 0.5, 1 - 1e-7), (1, 1.0, -0.1, 2, NOT_A_NUMBER)),
    "prior": ((0.01, 1e-6, 0.5, 0.999), (0, 1, 0.0, 1.0, -0.1, 1.5, NOT_A_NUMBER)),
}


def loss(function, parameter, default, truth):
    options = {parameter: default, "alpha": None, "where": None}
    data = {"logits": LOGITS, "labels": LABELS}
    return Case(function, data, options, parameter, *RANGES[parameter], truth)


def modulation(function, parameter, truth):
    options = {parameter: REQUIRED}
    return Case(function, {"margin": LOGITS}, options, parameter, *RANGES[parameter], truth)


FOCAL = loss(focaljax.sigmoid_focal_loss, "gamma", 2.0, reference.focal)
SOFT = loss(focaljax.sigmoid_soft_truncation_loss, "k", 2.0, reference.soft_truncation)
HARD = loss(focaljax.sigmoid_hard_threshold_loss, "threshold", 0.5, reference.hard_threshold)
LOSSES = (FOCAL, SOFT, HARD)


def softmax_loss(function, parameter, default):
    options = {parameter: default, "alpha": None, "axis": -1, "where": None}
    data = {"logits": CLASS_LOGITS, "labels": CLASS_IDS}
    return Case(function, data, options, parameter, *RANGES[parameter])


SOFTMAX_FOCAL = softmax_loss(focaljax.softmax_focal_loss, "gamma", 2.0)
SOFTMAX_SOFT = softmax_loss(focaljax.softmax_soft_truncation_loss, "k", 2.0)
SOFTMAX_HARD = softmax_loss(focaljax.softmax_hard_threshold_loss, "threshold", 0.5)
SU = softmax_loss(focaljax.su_softmax_soft_truncation_loss, "k", 1.0)
SOFTMAX_LOSSES = (SOFTMAX_FOCAL, SOFTMAX_SOFT, SOFTMAX_HARD, SU)


def of_distributions(case):
    """The same of labels that are distributions, where those of `case` are class ids."""
    data = {"logits": CLASS_LOGITS, "labels": DISTRIBUTIONS}
    return replace(case, data=data, note=" of distributions")


OF_DISTRIBUTIONS = tuple(of_distributions(case) for case in SOFTMAX_LOSSES)


def of_two_classes(case, truth):
    """A softmax loss as one of a logit, the first class's, and of the label that it is true."""

    def loss(logits, labels, **options):
        pair = jnp.stack([logits, jnp.zeros_like(logits)], -1)
        return case(pair, jnp.stack([labels, 1 - labels], -1), **options)

    loss.__name__ = case.name
    data = {"logits": LOGITS, "labels": LABELS}
    return replace(case, function=loss, data=data, truth=truth, note=" of two classes")


TWO_CLASSES = tuple(
    of_two_classes(case, reference.linear_in_label(weight))
    for case, weight in (
        (SOFTMAX_FOCAL, reference.focal_weight),
        (SOFTMAX_SOFT, reference.soft_truncation_weight),
        (SOFTMAX_HARD, reference.hard_threshold_weight),
        (SU, reference.soft_truncation_weight),
    )
)

SOFTMAX_MARGIN = Case(
    focaljax.softmax_margin, {"logits": CLASS_LOGITS, "labels": CLASS_IDS}, {"axis": -1}
)
SOFTMAX = (*SOFTMAX_LOSSES, SOFTMAX_MARGIN)

MODULATIONS = (
    modulation(focaljax.focal_modulation, "gamma", reference.focal_weight),
    modulation(focaljax.soft_truncation_modulation, "k", reference.soft_truncation_weight),
    modulation(focaljax.hard_threshold_modulation, "threshold", reference.hard_threshold_weight),
)


def posterior(function, **options):
    options = {"gamma": None, "k": None, "threshold": None, "loss": None, "alpha": None, **options}
    data = {"logits": CLASS_LOGITS if "axis" in options else LOGITS}
    return Case(function, data, options, "gamma", *RANGES["gamma"], chosen={"gamma": 2.0})


POSTERIORS = (
    posterior(focaljax.sigmoid_posterior),
    posterior(focaljax.sigmoid_posterior_logits),
    posterior(focaljax.softmax_posterior, axis=-1),
    posterior(focaljax.softmax_posterior_logits, axis=-1),
)
PRIOR_SHIFTS = (
    Case(
        focaljax.sigmoid_prior_shift,
        {"logits": LOGITS},
        {"source_prior": REQUIRED, "target_prior": REQUIRED},
        chosen={"source_prior": 0.5, "target_prior": 0.01},
    ),
    Case(
        focaljax.softmax_prior_shift,
        {"logits": CLASS_LOGITS},
        {"source_prior": REQUIRED, "target_prior": REQUIRED, "axis": -1},
        chosen={"source_prior": np.arange(1, 5), "target_prior": np.full(4, 0.25)},
    ),
)

REDUCTIONS = (
    Case(focaljax.reduce_mean, {"loss": LOSS}, {"where": None, "axis_name": None}),
    Case(
        focaljax.normalize_by_positives,
        {"loss": LOSS, "labels": LABELS},
        {"where": None, "axis_name": None},
    ),
)


def squared_hinge(z):
    return jnp.maximum(0, 1 - z) ** 2


@dataclass(frozen=True, eq=False)
class Relative:
    function: Callable
    truth: Callable  # of a logit, a label, and the logit that a constant target is of
    defaults: Mapping[str, float]
    others: tuple = ()  # values to try besides
    constant_weight: bool = False  # whether it has that option
    note: str = ""

    @property
    def name(self):
        return self.function.__name__

    def __call__(self, *data, **options):
        return self.function(*data, **options)


def weighed(name, truth, defaults, others=()):
    function = getattr(focaljax, f"sigmoid_{name}_loss")
    return Relative(function, reference.of_weight_and_target(truth), defaults, others, True)


RELATIVES = (
    Relative(
        focaljax.sigmoid_poly1_loss,
        reference.of_margin(reference.poly1),
        {"gamma": 0.0, "epsilon": 1.0},
        ({"gamma": 2.0, "epsilon": -0.5},),
    ),
    Relative(
        focaljax.sigmoid_reduced_focal_loss,
        reference.of_margin(reference.reduced_focal),
        {"gamma": 2.0, "threshold": 0.5},
        ({"threshold": 0.875},),
    ),
    Relative(
        focaljax.sigmoid_focal_star_loss,
        reference.of_margin(reference.focal_star),
        {"steepness": 2.0, "offset": 1.0},
        ({"steepness": 3.5, "offset": -2.0},),
    ),
    weighed("quality_focal", reference.quality_focal, {"beta": 2.0}, ({"beta": 1.0},)),
    weighed("varifocal", reference.varifocal, {"alpha": 0.75, "gamma": 2.0}, ({"gamma": 1.5},)),
    weighed("matchability", reference.matchability, {"gamma": 1.5}, ({"gamma": 1.0},)),
    weighed("iou_aware", reference.iou_aware, {"mixing": 0.25, "gamma": 2.0}, ({"mixing": 0.5},)),
    weighed(
        "gaussian_focal", reference.gaussian_focal, {"alpha": 2.0, "beta": 4.0}, ({"alpha": 1.0},)
    ),
    Relative(
        focaljax.sigmoid_asymmetric_loss,
        reference.asymmetric,
        {"gamma_positive": 1.0, "gamma_negative": 4.0, "margin": 0.05},
        ({"margin": 0.0}, {"gamma_positive": 0.0, "gamma_negative": 2.0, "margin": 0.2}),
        constant_weight=True,
    ),
    Relative(
        focaljax.sigmoid_smoothed_focal_loss,
        reference.of_weight_and_target(reference.smoothed_focal),
        {"gamma": 2.0, "label_smoothing": 0.1},
        ({"label_smoothing": 0.0},),
    ),
)

BY_THEMSELVES = (  # in tests/test_relatives.py and tests/test_linear.py
    focaljax.softmax_poly1_loss,
    focaljax.softmax_reduced_focal_loss,
    focaljax.softmax_asymmetric_loss,
    focaljax.distribution_focal_loss,
    focaljax.matching_cost,
    focaljax.logit_adjustment,
    focaljax.linear_softmax_focal_loss,
    focaljax.linear_softmax_margin_loss,
)


CASES = (
    *LOSSES,
    *SOFTMAX_LOSSES,
    *MODULATIONS,
    *REDUCTIONS,
    *POSTERIORS,
    *PRIOR_SHIFTS,
    Case(
        focaljax.decision_threshold,
        {},
        {"false_positive_cost": REQUIRED, "false_negative_cost": REQUIRED},
        chosen={"false_positive_cost": 1.0, "false_negative_cost": 20.0},
    ),
    Case(focaljax.sigmoid_margin, {"logits": LOGITS, "labels": LABELS}),
    SOFTMAX_MARGIN,
    Case(focaljax.sigmoid, {"x": LOGITS}),
    Case(focaljax.softplus, {"x": LOGITS}),
    Case(
        focaljax.class_balanced_weights,
        {"counts": np.array([900, 90, 10], np.int32)},
        {"beta": 0.999},
        "beta",
        *RANGES["beta"],
    ),
    Case(focaljax.prior_bias, {"prior": 0.01}),
    Case(focaljax.prior_bias_init, {"prior": 0.01}),
)


OWN = (  # which a loss is given to: tests/test_own_loss.py
    Case(
        focaljax.sigmoid_margin_loss,
        {"logits": LOGITS, "labels": LABELS, "loss": squared_hinge},
        {"alpha": None, "where": None},
    ),
    Case(
        focaljax.softmax_margin_loss,
        {"logits": CLASS_LOGITS, "labels": CLASS_IDS, "loss": squared_hinge},
        {"alpha": None, "axis": -1, "where": None},
    ),
)


def by_name(case):
    return case.name + case.note
