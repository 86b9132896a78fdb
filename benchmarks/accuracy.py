"""The largest relative errors of the losses, against 50-digit arithmetic at the float32 input.

    python benchmarks/accuracy.py            # the table
    python benchmarks/accuracy.py --save     # the same, kept in benchmarks/results/accuracy.md

Wherever the truth is a normal float32 number, for labels 1 and margins between -1e4 and 1e4. The
curvature is relative to the largest of its terms.
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


ROWS: dict[str, tuple[Loss, Callable, float]] = {
    **{f"focaljax focal, gamma {g:g}": (focal(g), reference.focal, g) for g in range(6)},
    **{f"focaljax focal, gamma {g:g}": (focal(g), reference.focal, g) for g in (0.5, 1.5, 2.5)},
    **{f"focaljax soft, K {k:g}": (soft(k), reference.soft_truncation, k) for k in (0.5, 1, 2, 10)},
    "optax focal, gamma 2": (lambda x: optax.sigmoid_focal_loss(x, ONE), reference.focal, 2),
    "naive focal, gamma 2": (naive, reference.focal, 2),
}


def grid() -> np.ndarray:
    near = np.random.default_rng(0).uniform(0, 20, 1500)
    steps = np.concatenate([[0], np.logspace(-6, 4, 500), np.linspace(0, 100, 500), near])
    return np.unique(np.concatenate([-steps, steps]).astype(np.float32))


def largest_error(got: jax.Array, true: reference.Sum, of_largest_term: bool) -> str:
    scale = true.largest if of_largest_term else np.abs(true.value)
    normal = np.abs(true.value) > np.finfo(np.float32).tiny
    error = np.abs(reference.EXACT.of(np.nan_to_num(got, nan=np.inf)) - true.value)
    return f"{float(max(error[normal] / scale[normal])):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results")
    save = parser.parse_args().save

    points = grid()
    exact = reference.EXACT.of(points)
    lines = [
        "# Largest relative error in float32",
        "",
        f"{len(points)} margins; {jax.devices()[0].device_kind}, jax {jax.__version__}, "
        f"optax {optax.__version__}, focaljax {focaljax.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}",
        "",
        "| loss | value | slope | curvature |",
        "|---|---|---|---|",
    ]
    for name, (loss, truth, parameter) in track(ROWS.items(), "Comparing"):
        true = truth(exact, reference.EXACT.of(1), reference.EXACT.of(parameter))
        slope = jax.grad(loss)
        derivatives = (loss, slope, jax.grad(slope))
        errors = [
            largest_error(jax.jit(jax.vmap(f))(points), t, of_largest_term=f is derivatives[2])
            for f, t in zip(derivatives, true, strict=False)
        ]
        lines.append(f"| {name} | " + " | ".join(errors) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if save:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "accuracy.md").write_text(text)


if __name__ == "__main__":
    main()
