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
# # The shapes of the losses
#
# Focal loss, soft truncation and the hard threshold are each a weight times cross entropy, both
# functions of one number, the **margin** z:
#
# | head | margin |
# |---|---|
# | sigmoid, label y of 0 or 1 | z = (2y - 1) x |
# | softmax, true class t | z = x_t - logsumexp of the other logits |
#
# The probability of the true label is p_t = sigma(z), its cross entropy softplus(-z). So one curve
# over z is the whole of a loss. This notebook draws the curves, shows where they are convex and
# what they do to the losses of a trained detector, and runs the mistakes that circulate beside the
# right code. Whatever it claims with a number it also checks: a claim that fails stops the run.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

NEEDED = ("focaljax", "flax", "optax", "sklearn", "matplotlib", "pandas", "rich")
try:
    for name in NEEDED:
        importlib.import_module(name)
except ImportError:
    here = Path(globals().get("__file__", "this notebook")).resolve().parent
    folders = (here.parent, here)
    checkout = next((path for path in folders if (path / "focaljax/__init__.py").exists()), None)
    package = f"{checkout or 'focaljax'}[colab]"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package])
    importlib.invalidate_caches()

# %%
import argparse
import os
from functools import partial
from typing import NoReturn

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pandas as pd
from flax import nnx
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import optimize
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import focaljax
from focaljax import sigmoid_focal_loss, softmax_focal_loss

# %% [markdown]
# ## Options
#
# Only part 4 trains anything. In a notebook put options into `ARGUMENTS`, e.g. `["--seeds", "5"]`.

# %%
IN_NOTEBOOK = "get_ipython" in globals()
ARGUMENTS = [] if IN_NOTEBOOK else sys.argv[1:]
if IN_NOTEBOOK and os.environ.get("FOCALJAX_SHORT"):  # set where notebooks are only tried out
    ARGUMENTS = ["--steps", "40", "--seeds", "1"]


def fail(message: str) -> NoReturn:
    print(f"loss_shapes: {message}", file=sys.stderr)
    sys.exit(2)


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw the losses, and check what is said of them.")
    parser.error = fail
    steps, seeds = (500, 3) if jax.default_backend() == "cpu" else (2000, 5)
    add = parser.add_argument
    add("--steps", type=int, default=steps, help=f"training steps of part 4 [{steps}]")
    add("--seeds", type=int, default=seeds, help=f"models to train in part 4 [{seeds}]")
    add("--gamma", type=float, default=2.0, help="what to train them with [2, as in the paper]")
    add("--out", type=Path, default=Path("results/loss_shapes"), help="folder")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seeds < 1 or not 0 <= options.gamma <= 15:
        fail("--steps and --seeds must be at least 1, --gamma between 0 and 15")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {options.out}: {error.strerror}")
    return options


options = parse_options(ARGUMENTS)
console = Console(width=None if sys.stdout.isatty() or IN_NOTEBOOK else 110)
say = partial(console.print, highlight=False, markup=False)


def print_table(title: str, columns: list[str], rows) -> None:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "mistake", "input") else "right")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{float(cell):.6g}" for cell in row))
    console.print(table)


def claims(title: str, *rows: tuple, within: float) -> None:
    """Rows of words, a measured number and an expected one, which must agree.

    `within` is an absolute tolerance below 1 and a relative one above.
    """
    for what, measured, expected in rows:
        if not abs(measured - expected) <= within * max(1, abs(expected)):
            raise AssertionError(f"{title}, {what}: {measured:g}, expected {expected:g}")
    print_table(title, ["", "measured", "expected"], rows)


def save(figure: Figure, name: str) -> None:
    for axis in (axis for axis in figure.axes if not axis.images):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path = options.out / name
    figure.savefig(path, dpi=150)
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(path, width=1000))


# %% [markdown]
# # 1. The curves
#
# | loss | weight | |
# |---|---|---|
# | cross entropy | 1 | |
# | focal, gamma | sigma(-z)^gamma | Lin et al. 2017 |
# | soft truncation, K | sigma(-K z) | Su 2017, kexue.fm archives 4733 |
# | hard threshold, m | 1 if sigma(z) <= m, else 0 | Su 2017, archives 4293 |
#
# With a label of 1 the margin is the logit, so a curve is the loss called with labels of 1. Its
# gradient is one `jax.grad`, its curvature two.


# %%
def focal(z, gamma):
    return sigmoid_focal_loss(z, jnp.ones_like(z), gamma=gamma)


def soft(z, k):
    return focaljax.sigmoid_soft_truncation_loss(z, jnp.ones_like(z), k=k)


def hard(z, m):
    return focaljax.sigmoid_hard_threshold_loss(z, jnp.ones_like(z), threshold=m)


@partial(jax.jit, static_argnums=(0, 1))
def derivative(order, loss, z, parameter):
    for _ in range(order):
        loss = jax.grad(loss)
    return jax.vmap(loss, (0, None))(z, parameter)


value, gradient, curvature = (partial(derivative, order) for order in range(3))
WEIGHTS = {
    focal: lambda z, gamma: focaljax.focal_modulation(z, gamma=gamma),
    soft: lambda z, k: focaljax.soft_truncation_modulation(z, k=k),
    hard: lambda z, m: focaljax.hard_threshold_modulation(z, threshold=m),
}
BLUE, GREEN, RED, ORANGE, SKY = "#0072b2", "#009e73", "#d55e00", "#e69f00", "#56b4e9"
CURVES = {
    "cross entropy": (focal, 0.0, {"color": "0.7", "linewidth": 4}),
    "focal γ = 0.5": (focal, 0.5, {"color": SKY}),
    "focal γ = 1, soft K = 1": (focal, 1.0, {"color": BLUE, "linestyle": "--"}),
    "focal γ = 2": (focal, 2.0, {"color": BLUE}),
    "focal γ = 5": (focal, 5.0, {"color": BLUE, "linestyle": ":"}),
    "soft K = 2": (soft, 2.0, {"color": GREEN}),
    "soft K = 4": (soft, 4.0, {"color": GREEN, "linestyle": "--"}),
    "hard m = .5": (hard, 0.5, {"color": RED}),
    "hard m = .9": (hard, 0.9, {"color": RED, "linestyle": ":"}),
}
PANELS = (
    (lambda loss, *at: WEIGHTS[loss](*at), "weight $w(z)$", (-0.05, 1.1)),
    (value, "loss $w(z)\\,\\log(1 + e^{-z})$", (-0.2, 4.5)),
    (gradient, "gradient $dL/dz$", (-1.4, 0.1)),
    (curvature, "curvature $d^2L/dz^2$", (-0.4, 0.9)),
)
z = jnp.linspace(-6, 6, 1201)
figure = Figure(figsize=(12, 8.5), layout="constrained")
axes = figure.subplots(2, 2).ravel()
for axis, (quantity, title, ylim) in zip(axes, PANELS, strict=True):
    for name, (loss, parameter, style) in CURVES.items():
        curve = np.array(quantity(loss, z, parameter))
        if loss is hard:  # a gap where it jumps, not a vertical line
            curve[np.argmax(z > np.log(parameter / (1 - parameter)))] = np.nan
        axis.plot(z, curve, label=name, **style)
    axis.set(title=title, xlim=(-6, 6), ylim=ylim)
    axis.set_xlabel("margin $z$   (left: wrong, right: correct)")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
save(figure, "curves.png")

# %% [markdown]
# Who is whose neighbour, in numbers: the largest difference at 1,201 margins from -6 to 6. The
# closed form of focal loss's curvature is, with p = sigma(z),
# p (1-p)^gamma [(1-p)(1 + 2 gamma) + gamma (1 - (1+gamma) p) log p].


# %%
def largest(difference) -> float:
    return float(np.max(np.abs(difference)))


def closed_form_curvature(z, gamma):
    p, rest, log_p = jax.nn.sigmoid(z), jax.nn.sigmoid(-z), -jax.nn.softplus(-z)
    bracket = rest * (1 + 2 * gamma) + gamma * (1 - (1 + gamma) * p) * log_p
    return p * rest**gamma * bracket


cross_entropy = jax.nn.softplus(-z)
two_logits, first = jnp.stack([z, 0 * z], axis=-1), jnp.zeros(z.shape, int)
bends = [curvature(focal, z, g) - closed_form_curvature(z, g) for g in (0.5, 1.0, 2.0, 5.0)]
claims(
    "Largest differences",
    ("focal γ = 0, and cross entropy", largest(value(focal, z, 0.0) - cross_entropy), 0),
    ("soft K = 1e-8, and CE / 2", largest(value(soft, z, 1e-8) - cross_entropy / 2), 0),
    *(
        (f"γ = 1 and K = 1, {name}", largest(of(focal, z, 1.0) - of(soft, z, 1.0)), 0)
        for name, of in (("loss", value), ("gradient", gradient), ("curvature", curvature))
    ),
    (
        "softmax of two logits, and sigmoid of their difference",
        largest(softmax_focal_loss(two_logits, first) - value(focal, z, 2.0)),
        0,
    ),
    ("focal curvature by autodiff, and the closed form", largest(bends), 0),
    within=1e-5,
)

# %% [markdown]
# # 2. From soft to hard
#
# Su's first loss was the hard one: an example counts until its p_t passes 1/2. From there on the
# gradient is exactly 0, so the model is told to get an example right and never told to keep it. The
# loss itself does know: it jumps down at the threshold. Autodiff cannot see a jump.
#
# Soft truncation spreads the jump over a width of about 1/K. The right panel is what the soft
# gradient pulls more than the hard one. The area is ln 2, the height of the jump, **for every K**;
# as K grows it gathers in a point at z = 0. That point is what autodiff of the hard loss leaves
# out.

# %%
KS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
figure = Figure(figsize=(13, 4.6), layout="constrained")
axes = figure.subplots(1, 3)
z = jnp.linspace(-3, 3, 2400)  # 0, where the hard loss jumps, is not among them
for k, color in zip(KS, matplotlib.colormaps["viridis"](np.linspace(0, 0.85, 6)), strict=True):
    pull = gradient(hard, z, 0.5) - gradient(soft, z, k)
    for axis, curve in zip(axes, (value(soft, z, k), gradient(soft, z, k), pull), strict=True):
        axis.plot(z, curve, color=color, label=f"soft K = {k:g}")
for axis, quantity in zip(axes[:2], (value, gradient), strict=True):
    curve = np.where(np.abs(z) < 0.002, np.nan, quantity(hard, z, 0.5))
    axis.plot(z, curve, color=RED, lw=2, ls="--", label="hard m = .5")
axes[0].annotate("", (0, 0), (0, np.log(2)), arrowprops={"arrowstyle": "<->", "shrinkA": 0})
axes[0].text(0.12, 0.52, "jump of ln 2")
axes[0].set(title="loss", ylim=(-0.1, 3.1))
axes[1].set(title="gradient", ylim=(-6.2, 0.2))
axes[2].set(title="hard gradient minus soft: area ln 2 each", ylim=(-0.3, 6.1))
for axis in axes:
    axis.set(xlabel="margin $z$", xlim=(-3, 3))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
save(figure, "soft_to_hard.png")

# %%
step = 0.002
z = (jnp.arange(-20_000, 20_000) + 0.5) * step  # midpoints of small intervals from -40 to 40
pulls = {k: step * np.float64(gradient(hard, z, 0.5) - gradient(soft, z, k)) for k in KS}
claims("Area", *((f"K = {k:g}", pull.sum(), np.log(2)) for k, pull in pulls.items()), within=1e-4)
near = {k: pull[np.abs(z) < 0.25].sum() / np.log(2) for k, pull in pulls.items()}
print_table("Share of it at |z| < 0.25", [f"K = {k:g}" for k in KS], [near.values()])
assert near[32.0] > 0.99

jumps = []
for m in (0.3, 0.5, 0.9):
    edge = np.log(m / (1 - m))
    before, after = value(hard, jnp.array([edge - 1e-4, edge + 1e-4]), m)
    jumps.append((f"m = {m:g}, down by -log m", before - after, -np.log(m)))
    assert not np.any(gradient(hard, jnp.linspace(edge + 1e-4, 50, 100), m))  # never "keep it"
claims("The jump of the hard loss", *jumps, within=1e-3)

# %% [markdown]
# # 3. Where they are convex, and how steep they get
#
# Where a loss is concave (orange) its gradient *shrinks* as an example gets worse: outliers are
# given up to some degree, and Newton steps go astray. Soft truncation is convex everywhere for K in
# a small interval, found below by bisection, which the default K = 2 is in. Focal loss is convex
# for no gamma above 0: far to the left its curvature is about gamma z e^z, which is negative.


# %%
@partial(jax.jit, static_argnums=0)
def lowest_curvature(loss, parameter):
    """Its sign says whether the loss is convex where it has any curvature to speak of."""
    return jnp.min(curvature(loss, jnp.linspace(-10, 4, 5601), parameter))


low = optimize.bisect(partial(lowest_curvature, soft), 1.2, 1.8, xtol=1e-5)
high = optimize.bisect(partial(lowest_curvature, soft), 1.8, 3.0, xtol=1e-5)
convex = [lowest_curvature(focal, gamma) >= 0 for gamma in np.linspace(0.5, 5, 91)]
claims(
    "Convexity",
    ("soft truncation: from K", low, 1.4428),
    ("soft truncation: to K", high, 2.1486),
    ("focal: how many of 91 γ from .5 to 5 are convex", sum(convex), 0),
    within=1e-4,
)

figure = Figure(figsize=(13, 4.6), layout="constrained")
axes = figure.subplots(1, 3)
z = jnp.linspace(-8, 6, 701)
for axis, title, loss, values in (
    (axes[0], "soft truncation, against $K$", soft, np.linspace(0.1, 4, 196)),
    (axes[1], "focal, against $γ$   (orange: concave)", focal, np.linspace(0, 5, 201)),
):
    bend = np.stack([curvature(loss, z, v) for v in values])
    axis.contourf(z, values, bend, levels=[-9, 0, 9], colors=["#f2bf5e", "#d9e9f5"])
    axis.contour(z, values, bend, levels=[0], colors="black", linewidths=1)
    axis.set(title=title, xlabel="margin $z$")
inward = f"{np.ceil(low * 1e4) / 1e4} to {np.floor(high * 1e4) / 1e4}"
axes[0].axhspan(low, high, color=GREEN, alpha=0.3, lw=0)
axes[0].text(5.7, (low + high) / 2, f"convex for K from {inward}", ha="right", va="center")
z = jnp.linspace(-40, 4, 22_001)
for loss, values, label, color in (
    (focal, np.linspace(0, 5, 51), "focal, against $γ$", BLUE),
    (soft, np.linspace(0.1, 5, 50), "soft truncation, against $K$", GREEN),
):
    steepest = [-gradient(loss, z, v).min() for v in values]
    axes[2].plot(values, steepest, color=color, label=label)
axes[2].plot(2, -gradient(soft, z, 2.0).min(), "o", color=GREEN)
axes[2].axhline(1, color="black", lw=1, ls=":", label="cross entropy")
axes[2].set(title="steepest slope, the largest $|dL/dz|$", xlabel="$γ$ or $K$", xlim=(0, 5))
axes[2].legend(frameon=False)
save(figure, "convexity.png")

peaks = {0.5: 1.00895, 1.0: 1.04533, 2.0: 1.12898, 3.0: 1.20155, 5.0: 1.31461}
slopes = {gamma: gradient(focal, z, gamma) for gamma in peaks}
claims(
    "Steepest slope",
    *(
        (f"focal γ = {gamma:g}, at z = {z[slope.argmin()]:.2f}", -slope.min(), peaks[gamma])
        for gamma, slope in slopes.items()
    ),
    ("soft truncation K = 2, far to the left", -gradient(soft, z, 2.0).min(), 1),
    within=2e-5,
)

# %% [markdown]
# # 4. Which examples make up the loss
#
# Figure 4 of the focal paper: take a detector trained with gamma = 2, compute the loss of every
# window, of positives and of negatives apart, normalise it to a sum of 1, sort from easy to hard
# and add up; then the same windows with another gamma, without training again. (That a larger gamma
# moves the loss to the hard examples is certain for any decreasing weight. *How far* depends on how
# the margins of a trained model are spread.)
#
# Here: real handwritten digits (scikit-learn's, 8 x 8 pixels; 1,400 to train, 397 to test), three
# on every canvas of 64 x 64 among halves of twelve others, and a perceptron that looks at every 8 x
# 8 window with ten sigmoids. A window within a pixel of a whole digit is a positive of its class.

# %%
SIZE, PATCH, CLASSES = 64, 8, 10
SPOTS = SIZE - PATCH + 1
images, names = load_digits(return_X_y=True)
images = (images.reshape(-1, PATCH, PATCH) / 16).astype(np.float32)
shuffled = np.random.default_rng(0).permutation(len(images))
half = np.arange(PATCH) < PATCH // 2
HALVES = (half[:, None], ~half[:, None], half, ~half)


def scenes(rows: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Canvases, and of every window the class of its digit or -1."""
    rng = np.random.default_rng(seed)
    canvases = np.zeros((count, SIZE, SIZE), np.float32)
    ids = np.full((count, SPOTS, SPOTS), -1, np.int32)
    for canvas, windows in zip(canvases, ids, strict=True):
        for whole in [False] * 12 + [True] * 3:
            row, (top, left) = rng.choice(rows), rng.integers(SPOTS, size=2)
            spot = canvas[top : top + PATCH, left : left + PATCH]
            if whole:
                spot[:] = images[row]
                windows[max(top - 1, 0) : top + 2, max(left - 1, 0) : left + 2] = names[row]
            else:
                np.maximum(spot, images[row] * HALVES[rng.integers(4)], out=spot)
    return canvases, ids


class Detector(nnx.Module):
    """A perceptron at every window: its first layer sees 8 x 8 pixels, the others one place."""

    def __init__(self, rngs: nnx.Rngs, hidden: int = 64):
        bias = focaljax.prior_bias_init(0.01)
        self.first = nnx.Conv(1, hidden, (PATCH, PATCH), padding="VALID", rngs=rngs)
        self.second = nnx.Conv(hidden, hidden, (1, 1), rngs=rngs)
        self.last = nnx.Conv(hidden, CLASSES, (1, 1), bias_init=bias, rngs=rngs)

    def __call__(self, canvases: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(canvases[..., None]))
        return self.last(nnx.relu(self.second(x)))


@nnx.jit
def train_step(model, optimizer, canvases, ids):
    def loss_fn(model):
        labels = jax.nn.one_hot(ids, CLASSES)
        loss = sigmoid_focal_loss(model(canvases), labels, gamma=options.gamma, alpha=0.25)
        return focaljax.normalize_by_positives(loss, labels)

    optimizer.update(model, nnx.grad(loss_fn)(model))


predict = nnx.jit(lambda model, canvases: model(canvases))
train, test = scenes(shuffled[:1400], 400, seed=1), scenes(shuffled[1400:], 60, seed=2)
no_bar = IN_NOTEBOOK and importlib.util.find_spec("ipywidgets") is None
logits = []
for seed in range(options.seeds):
    model = Detector(nnx.Rngs(seed))
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, options.steps))
    optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    label = f"model {seed + 1} of {options.seeds}"
    for _ in track(range(options.steps), label, console=console, disable=no_bar):
        batch = rng.integers(len(train[0]), size=4)
        train_step(model, optimizer, train[0][batch], train[1][batch])
    logits.append(np.asarray(predict(model, test[0])))

truth = np.asarray(jax.nn.one_hot(test[1], CLASSES)) > 0
precision = [average_precision_score(truth.ravel(), x.ravel()) for x in logits]
say(
    f"{truth.sum():,} positives, {(~truth).sum():,} negatives to test on; average precision of "
    f"{options.seeds} models {np.mean(precision):.3f}, standard deviation {np.std(precision):.3f}"
)
figure = Figure(figsize=(12, 4.2), layout="constrained")
pictures = {
    "a test canvas": test[0][0],
    "windows that are positives, by their corner": test[1][0] >= 0,
    "highest probability of the ten classes": jax.nn.sigmoid(logits[0][0].max(axis=-1)),
}
for axis, (title, picture) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
    axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])
save(figure, "scene.png")

# %%
GAMMAS = {0.0: "black", 0.5: SKY, 1.0: BLUE, 2.0: RED, 5.0: GREEN}


def cumulative(hardest_first: np.ndarray, gamma: float) -> np.ndarray:
    """The share of the loss that the hardest 1, 2, 3, ... examples hold."""
    total = np.cumsum(np.float64(focal(jnp.asarray(hardest_first), gamma)))
    return total / total[-1]


figure = Figure(figsize=(13, 4.8), layout="constrained")
axes = figure.subplots(1, 3)
records = []
for kind, axis, chosen in (("positives", axes[0], truth), ("negatives", axes[1], ~truth)):
    margins = [np.asarray(focaljax.sigmoid_margin(x, truth))[chosen] for x in logits]
    margins = [np.sort(m) for m in margins]  # all these losses fall as the margin grows
    hardest = np.arange(1, chosen.sum() + 1) / chosen.sum()
    thin = np.unique(np.geomspace(1, len(hardest), 2000).astype(int)) - 1  # enough for a figure
    for gamma, color in GAMMAS.items():
        shares = np.stack([cumulative(m, gamma) for m in margins])
        held = {q: shares[:, int(q * len(hardest)) - 1] for q in (0.001, 0.01, 0.05, 0.2)}
        records.append({"kind": kind, "γ": gamma, **held, "half": (shares < 0.5).mean(axis=1)})
        style = {"color": color, "label": f"γ = {gamma:g}" if gamma else "cross entropy (γ = 0)"}
        share = shares.mean(axis=0)[thin]
        axis.plot(1 - hardest[thin], 1 - share, **style)
        if kind == "negatives":
            axes[2].semilogx(hardest[thin], share, **style)
    axis.set(title=kind, xlabel=f"share of the {kind}, easy to hard", xlim=(0, 1), ylim=(0, 1.01))
axes[0].set_ylabel("cumulative share of their loss")
axes[2].set(title="negatives, from the hard end", xlabel="share of the negatives, hardest first")
axes[2].set(xlim=(1e-6, 1), ylim=(0, 1.01))
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
save(figure, "concentration.png")

# %%
for kind in ("positives", "negatives"):
    print_table(
        f"Share in % of the loss of the {kind}, mean ± sd of {options.seeds} models",
        ["γ", "held by the hardest .1 %", "1 %", "5 %", "20 %", "half is held by the hardest"],
        [
            [
                f"{r['γ']:g}",
                *(f"{100 * r[q].mean():.1f} ± {100 * r[q].std():.1f}" for q in held),
                f"{100 * r['half'].mean():.2g} %",
            ]
            for r in records
            if r["kind"] == kind
        ],
    )
means = pd.DataFrame([{k: np.mean(v) if k != "kind" else v for k, v in r.items()} for r in records])
means.to_csv(options.out / "concentration.csv", index=False)
hard_twentieth = means.set_index(["kind", "γ"])[0.05]
assert np.all(hard_twentieth.groupby("kind").diff().dropna() > -1e-6)
if options.steps >= 300 and options.gamma == 2:
    assert hard_twentieth["negatives", 2.0] > 0.95  # nearly all of the loss
    assert hard_twentieth["positives", 2.0] < 0.5

# %% [markdown]
# # 5. Mistakes that circulate
#
# All of these stand in public code. The table has the loss and the slope, which is the gradient in
# the first logit, of the wrong code and of the right.
#
# 1. **A log-probability used as p_t.** `1 - log_pt` is above 1, so the "focusing" weight *raises*
#    every loss. The cross entropy used as p_t gives a weight of 0 at p_t = 1/e, growing on both
#    sides, and at p_t = .5 a slope of the wrong sign: training makes the example worse.
# 2. **log(p + eps), or p clipped.** The loss stops growing and its gradient dies exactly where the
#    model is most wrong.
# 3. **First the sigmoid, then its log**, in the dtype of the logits. p rounds to 0 or 1, and inf
#    and NaN follow. With gamma below 1, (1 - p) ** gamma has an infinite slope at p = 1 besides.
# 4. **A softmax where sigmoids are meant.** Of two true classes each gets 1/2 at most; and a window
#    of background, with no true class, costs nothing whatever is predicted.


# %%
def log_probability_as_p(logits, label, gamma=2.0):  # wrong
    log_pt = jax.nn.log_softmax(logits)[label]
    return -((1 - log_pt) ** gamma) * log_pt


def cross_entropy_as_p(logits, label, gamma=2.0):  # wrong
    ce = -jax.nn.log_softmax(logits)[label]
    return (1 - ce) ** gamma * ce


def true_probability(logits, labels):
    p = jax.nn.sigmoid(logits)
    return labels * p + (1 - labels) * (1 - p)


def with_eps(logits, labels, gamma=2.0):  # wrong
    p_t = true_probability(logits, labels)
    return -((1 - p_t) ** gamma) * jnp.log(p_t + 1e-7)


def clipped(logits, labels, gamma=2.0):  # wrong
    p_t = jnp.clip(true_probability(logits, labels), 1e-7, 1 - 1e-7)
    return -((1 - p_t) ** gamma) * jnp.log(p_t)


def sigmoid_then_log(logits, labels, gamma=2.0):  # wrong
    p_t = true_probability(logits, labels)
    return -((1 - p_t) ** gamma) * jnp.log(p_t)


mistakes = {}


def beside(mistake, given, wrong, logits, labels, right=sigmoid_focal_loss, dtype=float, **options):
    """What `wrong` and `right` make of the same input."""
    logits = jnp.asarray(logits, dtype)
    labels = labels if right is softmax_focal_loss else jnp.asarray(labels, dtype)
    numbers = []
    for loss in (wrong, right):
        of = jax.value_and_grad(lambda x, loss=loss: jnp.sum(loss(x, labels, **options)))
        numbers.append([float(jnp.ravel(number)[0]) for number in of(logits)])
    mistakes[mistake, given] = [n for pair in zip(*numbers, strict=True) for n in pair]


for p in (0.9, 0.5, 0.02):
    x = [np.log(p / (1 - p)), 0]
    beside("log p as p_t", f"p_t = {p}", log_probability_as_p, x, 0, softmax_focal_loss)
    beside("CE as p_t", f"p_t = {p}", cross_entropy_as_p, x, 0, softmax_focal_loss)
for x in (-20, -40, -100):
    beside("log(p + 1e-7)", f"y = 1, x = {x}", with_eps, x, 1)
    beside("p clipped at 1e-7", f"y = 1, x = {x}", clipped, x, 1)
beside("sigmoid, then log", "y = 0, x = 20", sigmoid_then_log, 20, 0)
beside("sigmoid, then log", "y = 1, x = -110", sigmoid_then_log, -110, 1)
beside("sigmoid, then log", "γ = .5, y = 1, x = 40", sigmoid_then_log, 40, 1, gamma=0.5)
beside("sigmoid, then log", "bfloat16, y = 0, x = 7", sigmoid_then_log, 7, 0, dtype="bfloat16")
beside("sigmoid, then log", "bfloat16, y = 1, x = 6", sigmoid_then_log, 6, 1, dtype="bfloat16")
one_softmax = optax.softmax_cross_entropy  # right if exactly one class is true
beside("softmax", "two true, x = (12, 12, -12)", one_softmax, [12, 12, -12], [1, 1, 0])
beside("softmax", "background, x = (9, 0, 0)", one_softmax, [9, 0, 0], [0, 0, 0])

COLUMNS = ["mistake", "input", "its loss", "right loss", "its slope", "right slope"]
mistakes = pd.DataFrame([[*k, *v] for k, v in mistakes.items()], columns=COLUMNS)
mistakes.to_csv(options.out / "mistakes.csv", index=False)
rows = mistakes.sort_values("mistake", kind="stable", key=lambda s: s.map(list(s.unique()).index))
print_table("Mistakes, γ = 2 unless said otherwise", COLUMNS, rows.itertuples(index=False))

of = dict(list(mistakes.groupby("mistake")))
assert np.all(np.isfinite(mistakes[["right loss", "right slope"]]))
assert np.all(of["log p as p_t"]["its loss"] > 7 * of["log p as p_t"]["right loss"])
assert of["CE as p_t"]["its slope"].iloc[1] > 0 > of["CE as p_t"]["right slope"].iloc[1]
assert np.all(np.abs(of["log(p + 1e-7)"]["its slope"]) < 0.03)
assert np.all(of["p clipped at 1e-7"]["its slope"] == 0)
assert np.sum(~np.isfinite(of["sigmoid, then log"]["its slope"])) == 4
assert np.all(np.abs(of["softmax"]["its slope"]) < 1e-6)

# %% [markdown]
# 5. **One constant alpha for every class of a softmax**, usually .25. It multiplies every gradient
#    by the same number: for SGD a learning rate of a quarter, for Adam nothing at all.
#    (`softmax_focal_loss(alpha=0.25)` is refused for that.)

# %%
x, ids = jnp.asarray(logits[0][test[1] >= 0]), jnp.asarray(test[1][test[1] >= 0])
slope = jax.jit(jax.grad(lambda x, alpha: (alpha * softmax_focal_loss(x, ids)).sum()))
plain, quarter = slope(x, 1.0), slope(x, 0.25)
ratio = np.asarray(quarter / plain)[np.abs(plain) > 1e-30]
adam = optax.scale_by_adam(eps=0)
steps = [adam.update(g, adam.init(g))[0] for g in (plain, quarter)]
claims(
    f"One α of .25 over {len(x):,} windows with a digit",
    ("smallest ratio of a gradient with it to one without", ratio.min(), 0.25),
    ("largest", ratio.max(), 0.25),
    ("Adam's first step with it minus without, largest", largest(steps[0] - steps[1]), 0),
    within=1e-5,
)
try:
    softmax_focal_loss(x, ids, alpha=0.25)
except AssertionError as error:
    say(error)
else:
    raise AssertionError("one α for all classes was let through")

# %% [markdown]
# 6. **Taking it for granted that a library has it right**, or wrong. The largest relative error at
#    4,001 margins from -20 to 20, gamma = 2, against closed forms in float64. *CE from logits, 1 -
#    p_t from p* is the form of torchvision and many detectors: the cross entropy is right, the
#    weight of an easy example is not. optax's is right at ordinary float32 logits; given bfloat16
#    it computes in bfloat16.


# %%
def weight_from_p(logits, labels, gamma=2.0):
    cross_entropy = optax.sigmoid_binary_cross_entropy(logits, labels)
    return (1 - true_probability(logits, labels)) ** gamma * cross_entropy


IMPLEMENTATIONS = {
    "sigmoid, then log": (sigmoid_then_log, RED),
    "CE from logits, 1 - p_t from p": (weight_from_p, ORANGE),
    f"optax {optax.__version__}": (optax.sigmoid_focal_loss, BLUE),
    "focaljax": (sigmoid_focal_loss, GREEN),
}


def relative_errors(loss, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins, and the errors of loss and slope there."""
    margins = jnp.linspace(-20, 20, 4001).astype(dtype)
    one = jnp.ones((), dtype)
    of = jax.value_and_grad(lambda x: loss(x, one, gamma=2.0))
    outputs = jax.jit(jax.vmap(of))(margins)
    z, loss, slope = (np.float64(a.astype(jnp.float32)) for a in (margins, *outputs))
    p, rest, ce = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z)), np.log1p(np.exp(-z))
    true_loss, true_slope = rest**2 * ce, -(rest**2) * (2 * p * ce + rest)
    return z, np.abs(loss / true_loss - 1), np.abs(slope / true_slope - 1)


errors = {
    name: relative_errors(loss, jnp.float32) + relative_errors(loss, jnp.bfloat16)[1:]
    for name, (loss, _) in IMPLEMENTATIONS.items()
}
print_table(
    "Largest relative error (rounding to bfloat16 alone: 3.9e-03)",
    ["", "float32 loss", "slope", "bfloat16 loss", "slope"],
    [[name, *(f"{error.max():.1e}" for error in rest)] for name, (_, *rest) in errors.items()],
)
assert max(error.max() for error in errors["focaljax"][1:3]) < 1e-5
assert max(error.max() for error in errors["focaljax"][3:]) < 0.008
assert errors["CE from logits, 1 - p_t from p"][1].max() > 0.5

figure = Figure(figsize=(13, 4.8), layout="constrained")
axes = figure.subplots(1, 3)
z = jnp.linspace(-6, 6, 601)
ce = jax.nn.softplus(-z)
axes[0].plot(z, focaljax.focal_modulation(z, gamma=2.0), color=GREEN, label="right: $(1 - p_t)^2$")
axes[0].plot(z, (1 + ce) ** 2, color=RED, label="$(1 - \\log p_t)^2$")
axes[0].plot(z, (1 - ce) ** 2, color=ORANGE, label="$(1 - \\mathrm{CE})^2$")
axes[0].set(title="a log-probability used as $p_t$: the weight", ylim=(0, 5))
z = jnp.linspace(-40, 5, 901)
for name, loss, style in (
    ("right", sigmoid_focal_loss, {"color": GREEN, "lw": 4, "alpha": 0.6}),
    ("$\\log(p + 10^{-7})$", with_eps, {"color": RED}),
    ("$p$ clipped at $10^{-7}$", clipped, {"color": ORANGE}),
):
    slope = jax.vmap(jax.grad(lambda x, loss=loss: loss(x, jnp.ones_like(x))))(z)
    axes[1].plot(z, slope, label=name, **style)
axes[1].set(title="log(p + eps): the gradient dies", ylim=(-1.25, 0.1))
for name, (z, error, *_) in errors.items():
    worst = error[:-1].reshape(100, 40).max(axis=1)  # of 40 neighbours
    axes[2].semilogy(z[20:-1:40], worst, color=IMPLEMENTATIONS[name][1], label=name)
axes[2].set(title="relative error of the float32 loss", ylim=(1e-8, 1e2))
for axis in axes:
    axis.set_xlabel("margin $z$")
    axis.legend(frameon=False)
save(figure, "mistakes.png")

# %% [markdown]
# # 6. Three ways to go multiclass
#
# | | margin | true classes | use it |
# |---|---|---|---|
# | independent sigmoids | of each class | any number; none is background | detection, tags |
# | softmax, one alpha per class | true class against rest | one | rare classes should count more |
# | softmax, no alpha | true class against rest | one | otherwise |
#
# Side by side on the same three logits, class 1 true, with 900, 90 and 10 training examples of
# each.

# %%
x, true_class, counts = jnp.array([2.0, 1.0, -1.0]), 1, [900, 90, 10]


def independent_sigmoids(x):
    labels = jax.nn.one_hot(true_class, 3)  # in a batch one_hot(ids, 3); an id of -1 is background
    return sigmoid_focal_loss(x, labels, gamma=2.0, alpha=0.25).sum()


def softmax_with_alpha(x):
    alpha = focaljax.class_balanced_weights(counts)
    return softmax_focal_loss(x, true_class, gamma=2.0, alpha=alpha)


def softmax_without_alpha(x):
    return softmax_focal_loss(x, true_class, gamma=2.0)


WAYS = {
    "independent sigmoids, α = .25": (independent_sigmoids, GREEN),
    "softmax, α per class": (softmax_with_alpha, BLUE),
    "softmax, no α": (softmax_without_alpha, SKY),
}
gradients = {name: jax.jit(jax.grad(way))(x) for name, (way, _) in WAYS.items()}
sigmoids, with_alpha, without = gradients.values()
print_table(
    "Logits (2, 1, -1), class 1 true",
    ["", "loss", "gradient in x_0", "x_1", "x_2"],
    [[name, way(x), *gradients[name]] for name, (way, _) in WAYS.items()],
)
alone = jax.grad(lambda x: sigmoid_focal_loss(x, 0.0, alpha=0.25))(x[0])
margin = focaljax.softmax_margin(x, true_class)
rarity = focaljax.class_balanced_weights(counts)[true_class]
claims(
    "What follows",
    ("sigmoids: x_0's gradient as if it were alone", sigmoids[0], alone),
    ("softmax: a sigmoid at the softmax's margin", softmax_without_alpha(x), focal(margin, 2.0)),
    ("softmax: the gradients' sum", without.sum(), 0),
    ("α per class: times the true class's weight", with_alpha[1] / without[1], rarity),
    within=1e-5,
)

# %% [markdown]
# ## Su's literal form, and its blind spot
#
# For many classes Su's article writes -softmax(-K x)_t log softmax(x)_t. For two that is the soft
# truncation of above, for more it is another loss: its weight asks how *low* the true logit is
# among all logits. One wrong class far below takes all the weight, and the example falls silent
# while still misclassified. focaljax has it as `su_softmax_soft_truncation_loss`;
# `softmax_soft_truncation_loss` is the log-odds form, sigma(-K z) log sigma(z) at the softmax's
# margin.

# %%
literal = jax.jit(partial(focaljax.su_softmax_soft_truncation_loss, labels=0, k=1.0))
log_odds = jax.jit(partial(focaljax.softmax_soft_truncation_loss, labels=0, k=1.0))
blind = jnp.array([0.0, 1.0, -20.0])  # class 0 is true, class 1 is predicted
pair = blind[:2]
claims(
    "Logits (0, 1, -20), class 0 true, K = 1",
    ("p_t", jax.nn.softmax(blind)[0], 0.26894),
    ("literal form, times 1e9", 1e9 * literal(blind), 2.7068),
    ("literal form, largest gradient, times 1e9", 1e9 * largest(jax.grad(literal)(blind)), 4.2137),
    ("log-odds form", log_odds(blind), 0.96007),
    ("log-odds form, largest gradient", largest(jax.grad(log_odds)(blind)), 0.79265),
    ("the two without the third class, difference", literal(pair) - log_odds(pair), 0),
    within=1e-4,
)
figure = Figure(figsize=(12, 4.4), layout="constrained")
axes = figure.subplots(1, 2)
for i, (name, (_, color)) in enumerate(WAYS.items()):
    axes[0].bar(np.arange(3) + 0.27 * (i - 1), gradients[name], 0.25, color=color, label=name)
axes[0].axhline(0, color="black", lw=0.8)
axes[0].set_xticks(range(3), ["logit 2", "logit 1, true", "logit -1"])
axes[0].set(title="three ways: the gradient in each logit")
third = jnp.linspace(-15, 5, 201)
points = jnp.stack([0 * third, 0 * third + 1, third], axis=-1)
for name, form, color in (("log-odds form", log_odds, GREEN), ("Su's literal form", literal, RED)):
    axes[1].plot(third, jax.vmap(form)(points), color=color, label=name)
axes[1].set(title="loss of logits (0, 1, s), class 0 true, K = 1", xlabel="third logit $s$")
for axis in axes:
    axis.legend(frameon=False)
save(figure, "multiclass.png")

# %% [markdown]
# # 7. What the network says, and what is true
#
# Of examples that are positive with probability eta, the loss of a logit x is eta L(x) +
# (1 - eta) L(-x) on average. Where that is least, sigma(x) is eta for cross entropy alone: the
# others leave the network less sure. Lines: the eta that `sigmoid_posterior` takes from sigma(x).
# Dots: the least average loss, where its slope is 0, found without it.


# %%
def best_logit(eta, loss, parameter) -> float:
    def slope(x):
        return eta * gradient(loss, x, parameter) - (1 - eta) * gradient(loss, -x, parameter)

    return optimize.brentq(lambda x: float(slope(jnp.array([x]))[0]), -9, 9)


figure = Figure(figsize=(7, 5.6), layout="constrained")
axis = figure.subplots()
etas, rows = np.linspace(0.05, 0.95, 7), []
for name, (loss, parameter, style) in CURVES.items():
    if loss is hard:  # has none
        continue
    posterior = partial(
        focaljax.sigmoid_posterior, **{"gamma" if loss is focal else "k": parameter}
    )
    best = np.array([best_logit(eta, loss, parameter) for eta in etas])
    axis.plot(jax.nn.sigmoid(z), posterior(z), label=name, **style)
    axis.plot(jax.nn.sigmoid(best), etas, "o", ms=4, color=style["color"])
    rows.append((f"{name}, largest difference", largest(posterior(best) - etas), 0))
axis.set(xlabel="probability the network says: σ(x)", ylabel="probability that is true: η")
axis.legend(frameon=False)
save(figure, "probabilities.png")
claims("The posterior of the best logit, and eta", *rows, within=1e-5)
say(f"Figures and tables are in {options.out}")

# %% [markdown]
# # What the figures show
#
# Measured on CPU, jax 0.10.2, optax 0.2.8, 2026-11-22, default settings:
#
# - **Shapes.** Focal loss is steepest at wrong examples, up to 1.13 at gamma = 2, where cross
#   entropy stays below 1. Soft truncation stays at 1 or below for K from 1.4 to 3.5 and is convex
#   for K from 1.4428 to 2.1486. The hard threshold has cross entropy's gradient or none; what it
#   lacks is the pull of ln 2 at the threshold.
# - **Concentration.** As in the paper, gamma acts on the negatives: their hardest twentieth holds
#   37 % of the loss at gamma = 0 and 99.7 % at gamma = 2. In the paper half of the positives' loss
#   is in their hardest fifth and gamma changes little; here that fifth holds 39 % at gamma = 0 and
#   58 % at gamma = 2, much less of a change than the negatives', but not a small one. The paper's
#   curves at gamma = 0 are alike; here the negatives' is the more bent.
# - **It is a picture of a model trained with gamma = 2**, which leaves its easy negatives at modest
#   probabilities. Trained with cross entropy instead (`--gamma 0`) they are pushed so far down that
#   the hardest hundredth holds 96 % of the negatives' loss even at gamma = 0.
# - **Mistakes.** A log-probability used as p_t costs 122 times the right loss at p_t = .9, and the
#   cross entropy used as p_t trains backwards at p_t = .5. log(p + 1e-7) leaves 2 % of the gradient
#   at a logit of -20 and nothing at -40. One alpha for all classes is a learning rate.
# - **Libraries.** At ordinary float32 logits optax's focal loss and gradient are right to a few
#   parts in a million. In bfloat16 it is off by up to 3 %, its gradient by 5 %; rounding alone
#   costs 0.4 %. A weight computed from p loses every digit of an easy positive's loss by a logit of
#   17; so small a loss is harmless, unless a gamma below 1 makes its gradient NaN.
# - **Multiclass.** A sigmoid's gradient knows nothing of the other classes, a softmax's only moves
#   logits against each other, and one alpha per class weighs whole examples. Su's literal form can
#   be silent on a misclassified example; hence the log-odds form under the plain name.
# - **Probabilities.** Focal loss and soft truncation leave a network less sure than it should be,
#   the more so the larger gamma or K; `sigmoid_posterior` says by how much.
