"""The cases that other packages test themselves with, read from peer_cases.json.

Each case holds numbers only: inputs, the formula's parameters, the expected result and the
tolerance of the test or docstring that it is from.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import focaljax

CASES = json.loads((Path(__file__).parent / "peer_cases.json").read_text(encoding="utf-8"))

CANNOT_BE_EXPRESSED = {  # by kind or by id
    "076": "another loss: the probability of negatives is shifted and clipped",
    "077": "another loss: the probability of negatives is shifted and clipped",
    "asym_unified_focal": "another loss: a focal term for the background, and a Tversky term",
    "gaussian": "another loss: the probability is clipped to 1e-4, which bounds the loss by 9.2",
}


def reason(case):
    return CANNOT_BE_EXPRESSED.get(case["id"]) or CANNOT_BE_EXPRESSED.get(case["kind"])


RUN = [case for case in CASES if not reason(case)]


def test_every_case_is_run_or_has_a_reason():
    assert len(CASES) == len({case["id"] for case in CASES}) == 100
    assert len(RUN) == 95


@pytest.mark.parametrize("left_out", CANNOT_BE_EXPRESSED)
def test_left_out(left_out):
    cases = [case["id"] for case in CASES if left_out in (case["id"], case["kind"])]
    assert cases
    pytest.skip(f"{', '.join(cases)}: {CANNOT_BE_EXPRESSED[left_out]}")


def arrays(case, dtype):
    """Logits, dense labels and mask of a case, classes last."""
    if case["logits"] is None:
        p = np.array(case["probs"], float)
        with np.errstate(divide="ignore"):
            logits = np.log(p) - np.log1p(-p)
    else:
        logits = np.array(case["logits"], float)
    labels, axis, mask = np.array(case["labels"]), case.get("axis", -1), None
    logits = np.moveaxis(logits, axis, -1)
    if case["label_format"].startswith("index"):
        if labels.ndim == logits.ndim:
            labels = np.squeeze(labels, axis)
        mask = np.broadcast_to((labels != -2)[..., None], logits.shape)  # apex: -2 is ignored
        labels = jax.nn.one_hot(labels, logits.shape[-1])
    else:
        labels = np.moveaxis(labels, axis, -1)
    if case["params"].get("include_background") is False:
        logits, labels = logits[..., 1:], labels[..., 1:]
        mask = mask if mask is None else mask[..., 1:]
    return jnp.asarray(logits, dtype), jnp.asarray(labels, dtype), mask


def class_arrays(case, dtype):
    """Logits, class ids or distributions, and mask of a softmax case, classes last."""
    logits = np.log(case["probs"]) if case["logits"] is None else np.array(case["logits"], float)
    labels, axis, mask = np.array(case["labels"]), case.get("axis", -1), None
    logits = np.moveaxis(logits, axis, -1)
    if case["label_format"].startswith("index"):
        if labels.ndim == logits.ndim:
            labels = np.squeeze(labels, axis)
        if "ignore_index" in case["params"]:
            mask = labels != case["params"]["ignore_index"]
    else:
        smoothing = case["params"].get("label_smoothing", 0)
        labels = (1 - smoothing) * labels.astype(dtype) + smoothing / logits.shape[-1]
    return jnp.asarray(logits, dtype), jnp.asarray(labels), mask


def focal(logits, labels, mask, gamma, alpha):
    return focaljax.sigmoid_focal_loss(logits, labels, gamma=gamma, alpha=alpha, where=mask)


def softmax_focal(logits, labels, mask, gamma, alpha):
    return focaljax.softmax_focal_loss(logits, labels, gamma=gamma, alpha=alpha, where=mask)


def unreduced_of_classes(case, loss, logits, labels, mask):
    known = case["params"]
    alpha = jnp.array(known["alpha_vector"], logits.dtype) if "alpha_vector" in known else None
    values = loss(logits, labels, mask, known["gamma"], alpha) * known.get("alpha_scale", 1)
    values *= jnp.squeeze(jnp.array(known.get("sample_weight", 1), logits.dtype))
    if case.get("axis") == 1:  # MONAI, kornia: 0 for each class but the true one
        values = values[..., None] * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return values


def unreduced(case, loss, logits, labels, mask):
    """The peer's loss: ours, composed with what else the peer weighs it by."""
    known, shape = case["params"], logits.shape
    options = mask, known.get("gamma"), known.get("alpha")
    if case["kind"] == "sigmoid_star":  # cross entropy of a scaled logit
        gamma = known["gamma"]
        values = loss(gamma * logits, labels, mask, 0, known["alpha"]) / gamma
    elif case["kind"] == "asl":  # a gamma for positives and a gamma for negatives
        gamma = jnp.where(labels == 1, known["gamma_pos"], known["gamma_neg"])
        values = loss(logits, labels, mask, gamma, None)
    elif known.get("pos_weight"):  # of the positive part of the cross entropy: gamma is 0 here
        positive = labels * jnp.array(known["pos_weight"], logits.dtype).reshape(
            [1] * (len(shape) - 1) + [-1]
        )
        values = positive * loss(logits, jnp.ones_like(labels), *options)
        values += (1 - labels) * loss(logits, jnp.zeros_like(labels), *options)
    else:
        values = loss(logits, labels, *options)
    if "class_weight" in known:
        values *= jnp.broadcast_to(jnp.array(known["class_weight"], logits.dtype), shape)
    for name in ("sample_weight", "anchor_weight"):
        if name in known:
            each = jnp.array(known[name], logits.dtype)
            each = each if each.ndim in (0, len(shape)) else each[..., None]
            values *= jnp.broadcast_to(each, shape)
    if "samples_per_class" in known:
        counts = np.array(known["samples_per_class"], float)
        balance = focaljax.class_balanced_weights(counts, beta=known["beta"])
        values *= (labels @ balance.astype(logits.dtype))[:, None]
    return values


def reduced(case, values, labels, mask):
    match case["reduction"]:
        case "mean":
            return focaljax.reduce_mean(values, where=mask)
        case "sum":
            return values.sum()
        case "sum_over_N":
            return values.sum() / len(values)
        case "sum_over_num_positives":
            return focaljax.normalize_by_positives(values, labels)
    rowwise = np.ndim(case["expected"]) < values.ndim  # Keras, TensorFlow Addons
    return values.mean(axis=-1) if rowwise else values


@pytest.mark.parametrize("case", RUN, ids=lambda case: f"{case['id']} {case['source'][:60]}")
def test_peer_case(case, float64):
    # a tolerance below what float32 holds is from a test in float64
    dtype = jnp.float32 if case["tol"] >= 1e-9 else jnp.float64
    if case["kind"].startswith("softmax"):
        of_case, weighed, loss = class_arrays, unreduced_of_classes, softmax_focal
    else:
        of_case, weighed, loss = arrays, unreduced, focal
    logits, labels, mask = of_case(case, dtype)
    expected = np.array(case["expected"])
    if expected.ndim == logits.ndim:
        expected = np.moveaxis(expected, case.get("axis", -1), -1)

    def total(logits):
        return reduced(case, weighed(case, loss, logits, labels, mask), labels, mask)

    got = jax.jit(total)(logits)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=case["tol"])
    if "expected_grad" in case:
        gradient = jax.jit(jax.grad(total))(logits)
        np.testing.assert_allclose(gradient, case["expected_grad"], rtol=0, atol=case["tol"])
