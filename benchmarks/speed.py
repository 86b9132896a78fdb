"""How long a loss and its gradient take, as a ratio to optax on the device there is.

    python benchmarks/speed.py               # the table
    python benchmarks/speed.py --save        # the same, kept in benchmarks/results/speed-DEVICE.md

Each loss is ``jit(value_and_grad(mean loss))``. The losses take turns, so that a slow moment of the
machine falls on all of them; of each the median and the quartiles are shown.
"""

import argparse
import datetime
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import focaljax

LOSSES = {
    "focaljax focal, gamma 2": focaljax.sigmoid_focal_loss,
    "focaljax focal, gamma 1.5": lambda x, y: focaljax.sigmoid_focal_loss(x, y, gamma=1.5),
    "focaljax soft, K 2": focaljax.sigmoid_soft_truncation_loss,
    "focaljax hard": focaljax.sigmoid_hard_threshold_loss,
    "focaljax cross entropy (gamma 0)": lambda x, y: focaljax.sigmoid_focal_loss(x, y, gamma=0),
    "optax focal": optax.sigmoid_focal_loss,
    "optax BCE": optax.sigmoid_binary_cross_entropy,
}


def measure(dtype: str, rows: int, rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each loss in each round."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(-4, 3, (rows, 80)), dtype)
    labels = jax.nn.one_hot(jnp.asarray(rng.integers(-1, 80, rows)), 80)
    steps = {}
    for name, loss in LOSSES.items():

        def mean(logits, labels, loss=loss):
            return jnp.mean(loss(logits, labels), dtype=jnp.float32)

        steps[name] = jax.jit(jax.value_and_grad(mean)).lower(logits, labels).compile()
    seconds = {name: [] for name in LOSSES}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(logits, labels))
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.asarray(times[2:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    device = jax.devices()[0]
    rows = 50_000 if device.platform == "cpu" else 392_832
    lines = [
        "# Wall clock",
        "",
        f"{device.device_kind}, logits {(rows, 80)}, float32 labels, {args.rounds} rounds; "
        f"jax {jax.__version__}, optax {optax.__version__}, focaljax {focaljax.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}",
        "",
        "| logits | loss | median ms (quartiles) | of optax focal | of optax BCE |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        seconds = measure(dtype, rows, args.rounds)
        median = {name: np.median(times) for name, times in seconds.items()}
        for name, times in seconds.items():
            low, high = np.quantile(times, [0.25, 0.75]) * 1e3
            lines.append(
                f"| {dtype} | {name} | {median[name] * 1e3:.2f} ({low:.2f} to {high:.2f}) "
                f"| {median[name] / median['optax focal']:.2f} "
                f"| {median[name] / median['optax BCE']:.2f} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.save:
        results = pathlib.Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        name = device.device_kind.lower().replace(" ", "-")
        (results / f"speed-{name}.md").write_text(text)


if __name__ == "__main__":
    main()
