"""All losses on a table: two classes, many classes, or several labels."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from sklearn import metrics

import focaljax
from focaljax.lab import losses as of
from focaljax.lab import report, scores, tables
from focaljax.lab.losses import Loss, Losses
from focaljax.lab.tables import Part, Problem
from focaljax.lab.training import Trainer, adam

TEST_TO_TRAIN = 0.2 / 0.6  # of the split: what a long tail then leaves out is no overlap
SCORES = {
    "two classes": scores.of_two_classes,
    "many classes": scores.of_many_classes,
    "several labels": scores.of_several_labels,
}
SHOWN = {  # the first is the main score; of all of them higher is better
    "two classes": ("AP", "ROC-AUC", "F1", "bal.acc"),
    "many classes": ("bal.acc", "macro F1", "accuracy", "head", "middle", "tail"),
    "several labels": ("mAP", "micro AP", "macro F1"),
}
PROBABILITIES = ("ECE", "NLL", "Brier")  # of all of them lower is better
VARIANTS = ("raw", "temperature", "closed form", "shifted")  # of probabilities


class MLP(nnx.Module):
    """Two hidden layers; one logit a row where `outputs` is None."""

    def __init__(
        self, features: int, outputs: int | None, prior: ArrayLike, rngs: nnx.Rngs, hidden: int = 32
    ):
        bias = focaljax.prior_bias_init(prior)
        self.first = nnx.Linear(features, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.last = nnx.Linear(hidden, outputs or 1, bias_init=bias, rngs=rngs)
        self.squeeze = outputs is None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        return self.last(x)[..., 0] if self.squeeze else self.last(x)


def objective(model: MLP, batch: Part, loss: Callable[..., jax.Array]) -> jax.Array:
    """The mean loss of a batch."""
    return focaljax.reduce_mean(loss(model(batch.x), batch.y))


class Comparison(NamedTuple):
    """What came out: a row of `runs` per loss and seed, and the logits by loss, variant, seed."""

    problem: Problem
    losses: Losses
    parts: list[list[Part]]  # by seed: train, validation and test
    runs: pd.DataFrame
    logits: dict[str, dict[str, list[np.ndarray]]]


def losses_for(problem: Problem, train: Part) -> Losses:
    """All that fit the problem."""
    if problem.kind == "two classes":
        return of.of_two_classes(float(train.y.mean()))
    if problem.kind == "several labels":
        return of.of_several_labels(train.y.mean(axis=0))
    return of.of_many_classes(np.bincount(train.y))


def variants(problem: Problem, loss: Loss, parts: list[Part], logits: list[np.ndarray]):
    """Test logits as the network gives them, and put right in up to three ways."""
    train, validation, _ = parts
    temperature = scores.best_temperature(validation.y, logits[0])
    found = {"raw": logits[1], "temperature": logits[1] / temperature}
    if loss.posterior is not None:
        found["closed form"] = np.asarray(loss.posterior(logits[1]))
        if problem.tail > 1:  # the test has as many rows of each class
            counts = np.bincount(train.y).astype(np.float32)
            shift = partial(focaljax.softmax_prior_shift, source_prior=counts)
            found["shifted"] = np.asarray(
                shift(found["closed form"], target_prior=np.ones_like(counts))
            )
    return found


def compare(
    problem: Problem,
    *,
    names: list[str] | None = None,
    seeds: int = 8,
    steps: int = 1000,
    batch: int = 256,
) -> Comparison:
    """Train and score every loss with every seed, each of which splits the table anew."""
    parts = [tables.split_and_encode(problem, seed) for seed in range(seeds)]
    losses = of.chosen(losses_for(problem, parts[0][0]), names)
    rows = len(parts[0][0].y)
    drawn = np.random.default_rng(0).integers(rows, size=(seeds, steps, batch))
    data = Part(*map(np.concatenate, zip(*(of_seed[0] for of_seed in parts), strict=True)))
    outputs = {"two classes": None}.get(problem.kind, len(problem.classes))
    new_model = partial(MLP, data.x.shape[1], outputs)
    trainer = Trainer(new_model, objective, data, losses, adam(2e-3, steps))
    with report.progress_bar(problem.kind) as bar:
        task = bar.add_task("training", total=steps)
        own_rows = drawn + rows * np.arange(seeds)[:, None, None]  # each seed has its own block
        states = trainer.run_all(own_rows, partial(bar.advance, task))
        task = bar.add_task("scoring", total=len(losses) * seeds)
        predict, runs = nnx.jit(lambda model, x: model(x)), []
        kept = {name: {variant: [] for variant in VARIANTS} for name in losses}
        for name, seed, model in trainer.models(states, list(losses)):
            labels = [part.y for part in parts[seed]]
            logits = [np.asarray(predict(model, part.x)) for part in parts[seed][1:]]
            run = {"loss": name, "seed": seed} | SCORES[problem.kind](labels, logits)
            for variant, x in variants(problem, losses[name], parts[seed], logits).items():
                kept[name][variant].append(x)
                quality = scores.of_probabilities(labels[-1], x)
                run |= {f"{score} {variant}": quality[score] for score in PROBABILITIES}
            runs.append(run)
            bar.advance(task)
    return Comparison(problem, losses, parts, pd.DataFrame(runs), kept)


# --- what it shows --------------------------------------------------------------------------------


def describe(compared: Comparison) -> str:
    """The data in a sentence or two."""
    problem, train = compared.problem, compared.parts[0][0]
    frame, features, labels = problem.frame, problem.features, problem.labels
    if problem.kind == "two classes":
        counts = np.bincount(labels)
        kind = f"{counts[1]:,} of them {problem.target} = {problem.classes[1]}"
        kind += f" (1 in {len(labels) / counts[1]:.0f})"
    elif problem.kind == "many classes":
        counts = np.bincount(train.y)
        kind = f"{len(counts)} classes of {problem.target}; to train on, {counts.max():,} rows of"
        kind += f" the commonest and {counts.min():,} of the rarest"
    else:
        shares = labels.mean(axis=0)
        kind = f"{len(shares)} labels, each in {shares.max():.1%} to {shares.min():.1%} of them"
    said = [f"{problem.source}: {len(labels):,} rows, {kind}."]
    if features is not frame:
        said.append(f"Described by {tables.some(list(features))}.")
        unused = [str(name) for name in frame if name not in features and name != problem.target]
        if unused:
            said.append(
                f"Not used, constant or different in almost every row: {', '.join(unused)}."
            )
    if unlabelled := len(frame) - len(labels):
        said.append(f"Left out, without a label: {unlabelled:,} rows.")
    if problem.kind != "several labels" and (again := frame.loc[features.index].duplicated().sum()):
        said.append(f"Kept, but perhaps in train and test at once: {again:,} repeated rows.")
    return " ".join(said)


def score_tables(compared: Comparison) -> dict[str, pd.DataFrame]:
    """Scores, their differences from the first loss, and the probabilities."""
    runs, kind = compared.runs, compared.problem.kind
    first = runs["loss"].iloc[0]
    main, how = SHOWN[kind], {"test_to_train": TEST_TO_TRAIN}
    columns = [f"{s} {v}" for s in PROBABILITIES for v in VARIANTS if f"{s} {v}" in runs]
    probabilities = pd.DataFrame(
        {column: runs.groupby("loss", sort=False)[column].mean() for column in columns}
    ).map(report.short)
    return {
        f"{kind}: test scores, {report.of_seeds(runs)}": (report.scores_table(runs, main, **how)),
        f"{kind}: minus {first}, mean ± 95 % interval, seeds better": (
            report.differences_table(runs, main[:3], **how)
        ),
        f"{kind}: test probabilities, lower is better": probabilities,
    }


def verdicts(compared: Comparison) -> list[str]:
    """What the scores say, whichever way they fall out."""
    runs, main = compared.runs, SHOWN[compared.problem.kind][0]
    said = [
        report.verdict(runs, main, test_to_train=TEST_TO_TRAIN),
        report.verdict(runs, "ECE raw", higher=False, test_to_train=TEST_TO_TRAIN),
    ]
    focusing = runs[runs["loss"].str.match("focal gamma|soft")]
    means = {v: focusing[f"ECE {v}"].mean() for v in VARIANTS if f"ECE {v}" in runs}
    ways = ", ".join(f"{report.short(mean)} {variant}" for variant, mean in means.items())
    return [*said, f"ECE of focal loss and soft truncation, on average: {ways}."] if ways else said


# Okabe and Ito's colours, which colour-blind readers can tell apart; the dashes help in print.
STYLES = {
    "BCE": ("#000000", "-"),
    "CE": ("#000000", "-"),
    "BCE, class weights": ("#cc79a7", "-."),
    "CE, balanced": ("#cc79a7", "-."),
    "logit adjustment": ("#e69f00", "--"),
    "focal gamma=2": ("#0072b2", "-"),
    "soft K=2": ("#009e73", "-"),
    "asymmetric 1, 4, m=.05": ("#cc79a7", "-."),
    "Poly-1": ("#56b4e9", ":"),
    "hard m=.5": ("#d55e00", "-"),
    "hard m=.9": ("#d55e00", ":"),
}


def styled(compared: Comparison):
    """Name and style of the losses that a figure has room for."""
    for name, (color, line) in STYLES.items():
        if name in compared.losses:
            yield name, {"color": color, "linestyle": line, "label": name}


def reliability(compared: Comparison) -> Figure:
    """How often what was predicted came true, in a panel for each kind of probabilities."""
    shown = [v for v in VARIANTS if f"ECE {v}" in compared.runs]
    figure = plt.figure(figsize=(3.6 * len(shown), 4.6), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True)
    labels = np.concatenate([part[-1].y for part in compared.parts])
    for axis, variant in zip(panels, shown, strict=True):
        for name, style in styled(compared):
            if found := compared.logits[name][variant]:
                bins = scores.calibration_bins(labels, np.concatenate(found))
                drawn = bins.rows >= 50  # fewer are left to chance
                axis.plot(bins.predicted[drawn], bins.observed[drawn], marker="o", ms=3, **style)
        axis.plot([0, 1], [0, 1], color="0.6", lw=1)
        axis.set(title=variant, xlabel="predicted probability", xlim=(0, 1), ylim=(0, 1))
    panels[0].set_ylabel("share that came true")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    return report.tidy(figure)


def precision_recall(compared: Comparison) -> Figure:
    """Precision against recall of two classes, the mean over the seeds."""
    figure = plt.figure(figsize=(7, 4.6), layout="constrained")
    axis, grid = figure.subplots(), np.linspace(0.01, 1, 200)  # at recall 0 it is a convention
    for name, style in styled(compared):
        curves = []
        for of_seed, x in zip(compared.parts, compared.logits[name]["raw"], strict=True):
            precision, recall, _ = metrics.precision_recall_curve(of_seed[-1].y, x)
            curves.append(np.interp(grid, recall[::-1], precision[::-1]))
        axis.plot(grid, np.mean(curves, axis=0), **style)
    axis.set(xlabel="recall: share of the positives found", xlim=(0, 1), ylim=(0, 1))
    axis.set(ylabel="precision: share of the finds that are positive")
    axis.legend(frameon=False)
    return report.tidy(figure)


def recall_by_class(compared: Comparison) -> Figure:
    """Recall of each class, from frequent to rare, the mean over the seeds."""
    figure = plt.figure(figsize=(8, 4.6), layout="constrained")
    axis, counts = figure.subplots(), np.bincount(compared.parts[0][0].y)
    columns = [f"recall {c}" for c in range(len(counts))]
    recalls = compared.runs.groupby("loss")[columns].mean()
    for name, style in styled(compared):
        axis.plot(recalls.loc[name], marker="o", ms=3, **style)
    axis.set_xticks(range(len(counts)), counts)
    axis.set(xlabel="training rows of the class", ylabel="recall: share of it found", ylim=(0, 1))
    axis.legend(frameon=False)
    return report.tidy(figure)


def figures(compared: Comparison) -> dict[str, Figure]:
    """All that fit the problem, by file name."""
    kind = compared.problem.kind.replace(" ", "_")
    drawn = {f"reliability_{kind}": reliability(compared)}
    if compared.problem.kind == "two classes":
        drawn["precision_recall"] = precision_recall(compared)
    elif compared.problem.kind == "many classes":
        drawn["recall_by_class"] = recall_by_class(compared)
    figure = plt.figure(figsize=(7, 1 + 0.3 * len(compared.losses)), layout="constrained")
    report.dots(figure.subplots(), compared.runs, SHOWN[compared.problem.kind][0])
    return drawn | {f"scores_{kind}": report.tidy(figure)}
