"""All losses on a dense detector."""

from functools import partial
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from focaljax.lab import losses as of
from focaljax.lab import report, scores
from focaljax.lab.canvases import CLASSES, SIZE, Canvases, draw_canvases
from focaljax.lab.detector import (
    Detections,
    Detector,
    decode,
    detect,
    iou,
    objective,
    offsets_of,
    targets,
)
from focaljax.lab.losses import Loss
from focaljax.lab.training import Trainer, adam

BINS = {"quality focal + DFL": 17}  # of each of a box's four offsets; else there are none


class Comparison(NamedTuple):
    """What came out: a row of `runs` per loss and seed, and what seed 0's networks find."""

    test: Canvases
    runs: pd.DataFrame
    found: dict[str, Detections]


def average_precision(test: Canvases, found: Detections) -> dict[str, float]:
    """COCO's AP, AP50 and AP75 in percent."""
    real, kept = test.ids >= 0, found.scores > 0
    true = {"image": np.nonzero(real)[0], "boxes": test.boxes[real], "ids": test.ids[real]}
    said = {"image": np.nonzero(kept)[0], "boxes": found.boxes[kept], "ids": found.ids[kept]}
    said["scores"] = found.scores[kept]
    return scores.coco_average_precision(true, said, len(test.images), CLASSES)


def of_probabilities(logits: np.ndarray, labels: np.ndarray, way: str) -> dict[str, float]:
    """Of all answers that count: NLL per positive, and positives expected per positive there is."""
    positives = max(1, labels.sum())
    nll = -special.log_expit(np.where(labels, logits, -logits)).sum()
    return {
        f"NLL {way}": nll / positives,
        f"expected {way}": special.expit(logits).sum() / positives,
    }


@nnx.jit
def answers(model: Detector, part: Canvases) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Class logits, labels, and where they count."""
    logits, boxes = model(part.images)
    to, _ = targets(part, decode(offsets_of(boxes)[0]))
    return logits, to.labels, to.where


def score(model: Detector, loss: Loss, test: Canvases) -> tuple[dict[str, float], Detections]:
    """Average precision and how true the probabilities are, on the test canvases."""
    parts = [Canvases(*(a[i : i + 64] for a in test)) for i in range(0, len(test.images), 64)]
    found = [detect(model, part.images) for part in parts]
    found = Detections(*(np.concatenate(part) for part in zip(*found, strict=True)))
    every = [[np.asarray(a) for a in answers(model, part)] for part in parts]
    logits, labels = (np.concatenate([a[place][a[2]] for a in every]) for place in (0, 1))
    ways = {"raw": logits}
    if loss.posterior is not None:
        ways["closed form"] = np.asarray(loss.posterior(logits))
    numbers = average_precision(test, found)
    for way, log_odds in ways.items():
        numbers |= of_probabilities(np.float64(log_odds), labels > 0, way)
    return numbers, found


def compare(
    *,
    names: list[str] | None = None,
    seeds: int = 1,
    steps: int = 600,
    batch: int = 16,
    rate: float = 4e-3,
    train: int = 4000,
    test: int = 256,
) -> Comparison:
    """Train and score every loss with every seed: the same canvases, batches and first weights."""
    losses = of.chosen(of.of_anchors(), names)
    drawn, tested = draw_canvases(train, seed=1), draw_canvases(test, seed=2, test=True)
    optimizer = adam(rate, steps)
    trainers = {
        bins: Trainer(partial(Detector, bins=bins), objective, drawn, losses, optimizer)
        for bins in {BINS.get(name, 1) for name in losses}
    }
    runs, found = [], {}
    with report.progress_bar("runs") as bar:
        task = bar.add_task("", total=len(losses) * seeds)
        for seed in range(seeds):
            rows = np.random.default_rng(seed).integers(train, size=(steps, batch))
            for name, loss in losses.items():
                bar.update(task, description=name)
                trainer = trainers[BINS.get(name, 1)]
                state = trainer.run(trainer.start(name, seed), name, rows)
                numbers, detections = score(trainer.model(state), loss, tested)
                runs.append({"loss": name, "seed": seed} | numbers)
                if seed == 0:
                    found[name] = detections
                bar.advance(task)
    return Comparison(tested, pd.DataFrame(runs), found)


# --- what it shows --------------------------------------------------------------------------------


def score_tables(compared: Comparison) -> dict[str, pd.DataFrame]:
    """Average precision, its differences from CE, and how true the probabilities are."""
    runs = compared.runs
    main = ("AP", "AP50", "AP75")
    ways = [c for c in runs if c.startswith(("NLL", "expected"))]
    return {
        f"COCO AP in % on test, {report.of_seeds(runs)}": (report.scores_table(runs, main, ".1f")),
        "minus CE, mean ± 95 % interval, seeds better": report.differences_table(
            runs, main, "+.1f"
        ),
        "negative log-likelihood, and positives expected, each per positive there is": (
            runs.groupby("loss", sort=False)[ways].mean().map(partial(report.short, form=".2f"))
        ),
    }


def draw_boxes(axis: Axes, image: np.ndarray, boxes: np.ndarray, texts, colors) -> None:
    """A canvas with boxes."""
    axis.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, SIZE, SIZE, 0))
    for (left, top, right, bottom), text, color in zip(boxes, texts, colors, strict=True):
        x, y = [left, right, right, left, left], [top, top, bottom, bottom, top]
        axis.plot(x, y, color=color, lw=1.2)
        axis.text(left, max(top, 9) - 1, text, color=color, size=7, va="bottom", clip_on=True)
    axis.set(xlim=(0, SIZE), ylim=(SIZE, 0), xticks=[], yticks=[])


def pictures(compared: Comparison, names: list[str], canvases: int = 3, bar: float = 0.3) -> Figure:
    """Test canvases with what is there and what seed 0 of each loss finds, with a score of `bar`.

    Green is right: its class, and an IoU of .5 or more. Red is wrong. In one place only what is
    likeliest there is drawn.
    """
    test, columns = compared.test, len(names) + 1
    figure = plt.figure(figsize=(2.3 * columns, 2.4 * canvases), layout="constrained")
    axes = figure.subplots(canvases, columns, squeeze=False)
    for row, image, true_boxes, true_ids in zip(axes, *(a[:canvases] for a in test), strict=True):
        real = true_ids >= 0
        draw_boxes(row[0], image, true_boxes[real], true_ids[real], ["#f0e442"] * real.sum())
    for name, column in zip(names, axes.T[1:], strict=True):
        for place, axis in enumerate(column):
            boxes, ids, points = (np.asarray(a[place]) for a in compared.found[name])
            kept = np.flatnonzero(points >= bar)
            rivals = np.asarray(iou(boxes[kept][:, None], boxes[kept])) > 0.5
            kept = kept[~np.tril(rivals, -1).any(axis=1)]  # the likeliest stand first
            same = ids[kept][:, None] == test.ids[place]
            hits = ((np.asarray(iou(boxes[kept][:, None], test.boxes[place])) >= 0.5) & same).any(1)
            texts = [f"{ids[k]}: {points[k]:.2f}" for k in kept]
            colors = np.where(hits, "#2ee66b", "#ff5a4d")
            draw_boxes(axis, test.images[place], boxes[kept], texts, colors)
    for axis, title in zip(axes[0], ["truth", *names], strict=True):
        axis.set_title(title.replace(" alpha", "\nalpha"), fontsize=10)
    return figure


def figures(compared: Comparison) -> dict[str, Figure]:
    """By file name."""
    names = list(compared.found)
    picked = ["CE, no prior", "CE", "focal gamma=1 alpha=.25", "quality focal"]
    bars = plt.figure(figsize=(7, 1 + 0.3 * len(names)), layout="constrained")
    axis = bars.subplots()
    report.dots(axis, compared.runs, "AP")
    axis.set(xlabel="COCO AP in % on test   (dots: seeds, bars: means)")
    return {
        "ap": report.tidy(bars),
        "detections": pictures(compared, [n for n in picked if n in names] or names[:4]),
    }
