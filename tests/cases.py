"""The public functions, a record each: what they take, and what is true of their results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference

import focaljax

LOGITS = np.array([[-4.595, 0.5, 2.0], [3.0, -1.0, 0.0]], np.float32)
LABELS = np.array([[0, 1, 0], [1, 1, 0]], np.int32)
LOSS = np.array([[0.5, 1.0, 2.0], [0.0, 4.0, 0.25]], np.float32)

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

    @property
    def name(self):
        return self.function.__name__

    def __call__(self, *data, **options):
        """The function; where the hyper-parameter has no default, a value is chosen for it."""
        if self.options.get(self.parameter) is REQUIRED:
            options = {self.parameter: self.valid[0], **options}
        return self.function(*data, **options)


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

MODULATIONS = (
    modulation(focaljax.focal_modulation, "gamma", reference.focal_weight),
    modulation(focaljax.soft_truncation_modulation, "k", reference.soft_truncation_weight),
    modulation(focaljax.hard_threshold_modulation, "threshold", reference.hard_threshold_weight),
)

REDUCTIONS = (
    Case(focaljax.reduce_mean, {"loss": LOSS}, {"where": None, "axis_name": None}),
    Case(
        focaljax.normalize_by_positives,
        {"loss": LOSS, "labels": LABELS},
        {"where": None, "axis_name": None},
    ),
)

CASES = (
    *LOSSES,
    *MODULATIONS,
    *REDUCTIONS,
    Case(focaljax.sigmoid_margin, {"logits": LOGITS, "labels": LABELS}),
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


def by_name(case):
    return case.name
