"""Scores: of rankings, decisions and probabilities, and their differences in pairs."""

import contextlib
import io
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import optimize, special, stats
from sklearn import metrics
from sklearn.calibration import calibration_curve

# --- of rankings and decisions --------------------------------------------------------------------


def best_f1_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    """The logit above which to say yes."""
    precision, recall, thresholds = metrics.precision_recall_curve(labels, logits)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return thresholds[np.argmax(f1[:-1])]  # the last point has no threshold


def best_balanced_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    """Likewise, for balanced accuracy."""
    false_positives, true_positives, thresholds = metrics.roc_curve(labels, logits)
    return thresholds[np.argmax(true_positives - false_positives)]


def of_two_classes(labels: list[np.ndarray], logits: list[np.ndarray]) -> dict[str, float]:
    """On test; decisions are at thresholds that validation chose.

    `labels` are those of train, validation and test, `logits` of the last two.
    """
    (_, validation, test), (validation_logits, test_logits) = labels, logits
    f1_threshold = best_f1_threshold(validation, validation_logits)
    balanced_threshold = best_balanced_threshold(validation, validation_logits)
    return {
        "AP": metrics.average_precision_score(test, test_logits),
        "ROC-AUC": metrics.roc_auc_score(test, test_logits),
        "F1": metrics.f1_score(test, test_logits >= f1_threshold),
        "bal.acc": metrics.balanced_accuracy_score(test, test_logits >= balanced_threshold),
    }


def of_many_classes(labels: list[np.ndarray], logits: list[np.ndarray]) -> dict[str, float]:
    """On test; head, middle and tail are recalls of thirds of the classes, frequent to rare."""
    train, _, test = labels
    predicted = logits[-1].argmax(axis=-1)
    recall = metrics.recall_score(test, predicted, average=None, zero_division=0)
    head, middle, tail = (third.mean() for third in np.array_split(recall, 3))
    as_in_training = (np.bincount(train) / np.bincount(test))[test]
    return {
        "bal.acc": metrics.balanced_accuracy_score(test, predicted),
        "macro F1": metrics.f1_score(test, predicted, average="macro"),
        "accuracy": metrics.accuracy_score(test, predicted, sample_weight=as_in_training),
        "head": head,
        "middle": middle,
        "tail": tail,
        **{f"recall {c}": r for c, r in enumerate(recall)},
    }


def of_several_labels(labels: list[np.ndarray], logits: list[np.ndarray]) -> dict[str, float]:
    """On test: the mean over the labels of average precision and F1, and AP of all answers."""
    (_, validation, test), (validation_logits, test_logits) = labels, logits
    thresholds = list(map(best_f1_threshold, validation.T, validation_logits.T))
    return {
        "mAP": metrics.average_precision_score(test, test_logits),
        "micro AP": metrics.average_precision_score(test, test_logits, average="micro"),
        "macro F1": metrics.f1_score(test, test_logits >= thresholds, average="macro"),
    }


def f1(true: set, found: set) -> float:
    """Of sets of names, say."""
    return 2 * len(true & found) / max(1, len(true) + len(found))


def coco_average_precision(
    true: dict[str, np.ndarray], found: dict[str, np.ndarray], images: int, classes: int
) -> dict[str, float]:
    """COCO's AP in percent: over classes and over overlaps (IoU) from .5 to .95.

    Both hold `image`, `ids` and `boxes` (left, top, right, bottom), a row each; `found` also
    `scores`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if not len(found["ids"]):  # of a network that has come to nothing, NaN for one
        return dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
    truth = COCO()
    sized = [np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]) for b in (true["boxes"], found["boxes"])]
    rows = zip(true["image"].tolist(), true["ids"].tolist(), sized[0].tolist(), strict=True)
    truth.dataset = {
        "images": [{"id": i} for i in range(images)],
        "categories": [{"id": c} for c in range(classes)],
        "annotations": [  # numbered from 1, since pycocotools takes a 0 for "not matched"
            {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(rows, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # it reports every phase
        truth.createIndex()
        answers = np.column_stack([found["image"], sized[1], found["scores"], found["ids"]])
        evaluation = COCOeval(truth, truth.loadRes(answers), "bbox")
        evaluation.params.maxDets = [100]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]  # [IoU, recall, class]
    by_iou = [100 * at[at >= 0].mean() for at in precision]  # -1: no such class in the test
    return {"AP": float(np.mean(by_iou)), "AP50": by_iou[0], "AP75": by_iou[5]}


# --- of probabilities -----------------------------------------------------------------------------


def log_probabilities(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Of the classes, along a last axis; of one logit per label, of no and yes."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim == labels.ndim:
        return np.stack([special.log_expit(-logits), special.log_expit(logits)], axis=-1)
    return special.log_softmax(logits, axis=-1)


def of_the_label(labels: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """Each label's own log-probability."""
    return np.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]


def best_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """Of least NLL, which has one minimum, being convex in 1 / T (Guo et al. 2017)."""
    log_p = log_probabilities(labels, logits)
    ahead = log_p - of_the_label(labels, log_p)[..., None]

    def nll(log_t: float) -> float:
        return special.logsumexp(ahead / np.exp(log_t), axis=-1).mean()

    best = optimize.minimize_scalar(nll, bounds=(-8, 8), method="bounded", options={"xatol": 1e-7})
    return float(np.exp(best.x))


class Bins(NamedTuple):
    """What was forecast, in 15 bins of probability: a number for each bin in use."""

    observed: np.ndarray  # share that came true
    predicted: np.ndarray  # mean probability
    rows: np.ndarray


def calibration_bins(labels: np.ndarray, logits: np.ndarray) -> Bins:
    """Of one logit per label: is it a yes? Of more: is the most probable class the right one?"""
    p = np.exp(log_probabilities(labels, logits))
    if logits.ndim == labels.ndim:
        came_true, forecast = labels.ravel() == 1, p[..., 1].ravel()
    else:
        came_true, forecast = (p.argmax(-1) == labels).ravel(), p.max(-1).ravel()
    observed, predicted = calibration_curve(came_true, forecast, n_bins=15)
    # calibration_curve has the first two; these are its bins again, for the third
    rows = np.bincount(np.searchsorted(np.linspace(0, 1, 16)[1:-1], forecast))
    return Bins(observed, predicted, rows[rows > 0])


def of_probabilities(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Negative log-likelihood, Brier score, expected calibration error; lower is better."""
    log_p = log_probabilities(labels, logits)
    squares = np.square(np.exp(log_p) - np.eye(log_p.shape[-1])[labels]).sum(axis=-1)
    bins = calibration_bins(labels, logits)
    return {
        "NLL": float(-of_the_label(labels, log_p).mean()),
        "Brier": float(squares.mean() / (2 if logits.ndim == labels.ndim else 1)),  # as customary
        "ECE": float(np.average(np.abs(bins.observed - bins.predicted), weights=bins.rows)),
    }


# --- in pairs -------------------------------------------------------------------------------------


def in_pairs(
    runs: pd.DataFrame, score: str, *, higher: bool = True, test_to_train: float = 0.0
) -> pd.DataFrame:
    """A line per loss: mean, sd, and the difference from the first loss, seed by seed.

    The outcome is "better" or "worse" where the 95 % interval of the mean difference leaves out 0:
    that of a paired t-test with Bonferroni's correction for the number of losses, and, where every
    seed has its own split, Nadeau and Bengio's for the rows that the splits share.

    Args:
      runs: a row per run, with columns `loss`, `seed` and `score`.
      score: the column to compare.
      higher: whether higher is better.
      test_to_train: the size of the test over that of the training set if seeds split anew.
    """
    scores = runs.pivot(index="seed", columns="loss", values=score)[runs["loss"].unique()]
    scores = scores.dropna(axis="columns", how="all")
    first = runs.pivot(index="seed", columns="loss", values=score)[runs["loss"].iloc[0]]
    difference = scores.sub(first, axis=0)
    seeds = difference.count()
    error = difference.std() * np.sqrt(1 / seeds + test_to_train)
    comparisons = max(1, scores.shape[1] - 1)
    reach = error * stats.t.ppf(1 - 0.05 / (2 * comparisons), np.maximum(seeds - 1, 1))
    gain = difference.mean() * (1 if higher else -1)
    ahead = (difference > 0 if higher else difference < 0).sum()
    clear = [(gain > reach) & (seeds > 1), (gain < -reach) & (seeds > 1)]
    return pd.DataFrame(
        {
            "mean": scores.mean(),
            "sd": scores.std(),
            "difference": difference.mean(),
            "low": difference.mean() - reach,
            "high": difference.mean() + reach,
            "seeds_better": ahead,
            "seeds": seeds,
            "outcome": np.select(clear, ["better", "worse"], "unclear"),
        }
    )
