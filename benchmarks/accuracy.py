"""The largest relative errors of the losses in float32, against far more digits.

    python benchmarks/accuracy.py            # the tables
    python benchmarks/accuracy.py --save     # the same, kept in benchmarks/results/accuracy.md

Wherever the truth, at the float32 input, is 1e4 times the smallest normal float32 number: nearer to
it factors of a slope underflow. Sigmoid: labels 1 and margins
between -1e4 and 1e4; the curvature is relative to the largest of its terms. Softmax: the gradient
of every logit; ties, and one class up to 80 ahead of or behind all others, among the examples.
"""

import argparse
import datetime
import pathlib
import platform
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import focaljax

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))
import reference  # noqa: E402

Loss = Callable[[jax.Array], jax.Array]
ONE = jnp.float32(1)


def focal(gamma: float) -> Loss:
    return lambda x: focaljax.sigmoid_focal_loss(x, ONE, gamma=gamma)


def soft(k: float) -> Loss:
    return lambda x: focaljax.sigmoid_soft_truncation_loss(x, ONE, k=k)


def naive(x: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(x)
    return -((1 - p) ** 2) * jnp.log(p + 1e-8)


SIGMOID: dict[str, tuple[Loss, Callable, float]] = {
    **{f"focaljax focal, gamma {g:g}": (focal(g), reference.focal, g) for g in range(6)},
    **{f"focaljax focal, gamma {g:g}": (focal(g), reference.focal, g) for g in (0.5, 1.5, 2.5)},
    **{f"focaljax soft, K {k:g}": (soft(k), reference.soft_truncation, k) for k in (0.5, 1, 2, 10)},
    "optax focal, gamma 2": (lambda x: optax.sigmoid_focal_loss(x, ONE), reference.focal, 2),
    "naive focal, gamma 2": (naive, reference.focal, 2),
}


SoftmaxLoss = Callable[[jax.Array, jax.Array], jax.Array]


def softmax_focal(gamma: float) -> SoftmaxLoss:
    return lambda x, ids: focaljax.softmax_focal_loss(x, ids, gamma=gamma)


def softmax_soft(k: float) -> SoftmaxLoss:
    return lambda x, ids: focaljax.softmax_soft_truncation_loss(x, ids, k=k)


def of_one_hot(loss: SoftmaxLoss) -> SoftmaxLoss:
    return lambda x, ids: loss(x, jax.nn.one_hot(ids, x.shape[-1]))


def naive_softmax(x: jax.Array, ids: jax.Array) -> jax.Array:
    log_p = jnp.take_along_axis(jax.nn.log_softmax(x), ids[:, None], axis=-1)[:, 0]
    return -((1 - jnp.exp(log_p)) ** 2) * log_p


SOFTMAX: dict[str, tuple[SoftmaxLoss, Callable, float]] = {
    **{f"focaljax focal, gamma {g:g}": (softmax_focal(g), reference.focal, g) for g in range(6)},
    **{
        f"focaljax soft, K {k:g}": (softmax_soft(k), reference.soft_truncation, k)
        for k in (0.5, 1, 2, 10)
    },
    "focaljax focal, gamma 2, one-hot": (of_one_hot(softmax_focal(2)), reference.focal, 2),
    "focaljax soft, K 2, one-hot": (of_one_hot(softmax_soft(2)), reference.soft_truncation, 2),
    "optax CE": (optax.softmax_cross_entropy_with_integer_labels, reference.focal, 0),
    "naive focal, gamma 2": (naive_softmax, reference.focal, 2),
}
EXAMPLES = {2: 20_000, 21: 5_000, 1000: 300}  # by the number of classes


def grid() -> np.ndarray:
    near = np.random.default_rng(0).uniform(0, 20, 1500)
    steps = np.concatenate([[0], np.logspace(-6, 4, 500), np.linspace(0, 100, 500), near])
    return np.unique(np.concatenate([-steps, steps]).astype(np.float32))


def examples(classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and class ids, the true class level with others or far from them as often as near."""
    rng = np.random.default_rng(0)
    n = EXAMPLES[classes]
    logits = rng.normal(size=(n, classes)) * rng.choice([0, 0.1, 1, 3, 10], (n, 1))
    ids = rng.integers(0, classes, n)
    logits[np.arange(n), ids] += rng.uniform(-1, 1, n) * rng.choice([0, 3, 20, 80], n)
    logits[::10] = np.round(logits[::10])
    return logits.astype(np.float32), ids


def largest_error(got: jax.Array, true: np.ndarray, scale: np.ndarray | None = None) -> str:
    numbers = reference.EXACT if true.dtype == object else reference.DENSE
    normal = np.abs(true) > 1e4 * np.finfo(np.float32).tiny
    error = np.abs(numbers.of(np.nan_to_num(got, nan=np.inf)) - true)
    return f"{float(max(error[normal] / np.abs(true if scale is None else scale)[normal])):.1e}"


def sigmoid_table() -> list[str]:
    points = grid()
    exact = reference.EXACT.of(points)
    lines = [
        f"## Sigmoid, {len(points)} margins",
        "",
        "| loss | value | slope | curvature |",
        "|---|---|---|---|",
    ]
    for name, (loss, truth, parameter) in track(SIGMOID.items(), "Sigmoid"):
        true = truth(exact, reference.EXACT.of(1), reference.EXACT.of(parameter))
        slope = jax.grad(loss)
        value, slopes, bends = (
            jax.jit(jax.vmap(f))(points) for f in (loss, slope, jax.grad(slope))
        )
        errors = (
            largest_error(value, true.loss.value),
            largest_error(slopes, true.slope.value),
            largest_error(bends, true.bend.value, true.bend.largest),
        )
        lines.append(f"| {name} | " + " | ".join(errors) + " |")
    return [*lines, ""]


def softmax_table() -> list[str]:
    columns = [f"{what}, {c} classes" for c in EXAMPLES for what in ("value", "gradient")]
    lines = [
        "## Softmax",
        "",
        "| loss | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    numbers = reference.DENSE if reference.DENSE_WORKS else reference.EXACT
    for name, (loss, truth, parameter) in track(SOFTMAX.items(), "Softmax"):
        errors = []
        for classes in EXAMPLES:
            logits, ids = examples(classes)
            loss_of, slopes_of = reference.softmax(truth)(
                numbers.of(logits), ids, numbers.of(parameter), numbers
            )
            value = jax.jit(loss)(logits, jnp.asarray(ids))
            total = lambda x, y, loss=loss: jnp.sum(loss(x, y))  # noqa: E731
            slopes = jax.jit(jax.grad(total))(logits, jnp.asarray(ids))
            errors += [largest_error(value, loss_of.value), largest_error(slopes, slopes_of.value)]
        lines.append(f"| {name} | " + " | ".join(errors) + " |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results")
    save = parser.parse_args().save

    lines = [
        "# Largest relative error in float32",
        "",
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"optax {optax.__version__}, focaljax {focaljax.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}",
        "",
        *sigmoid_table(),
        *softmax_table(),
    ]
    text = "\n".join(lines)
    print(text)
    if save:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "accuracy.md").write_text(text)


if __name__ == "__main__":
    main()
