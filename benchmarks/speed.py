"""How long a loss and its gradient take, as a ratio to others on the device there is.

    python benchmarks/speed.py               # the tables
    python benchmarks/speed.py --save        # the same, kept in benchmarks/results/speed-DEVICE.md

Each loss is ``jit(value_and_grad(mean loss))``. The losses take turns, so that a slow moment of the
machine falls on all of them; of each the median and the quartiles are shown. The sigmoid losses are
given float32 labels, the softmax losses class ids.
"""

import argparse
import datetime
import pathlib
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import focaljax

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def naive_softmax_focal(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """What most snippets do, with the right p_t."""
    log_p = jax.nn.log_softmax(logits)
    one_hot = jax.nn.one_hot(ids, logits.shape[-1])
    return -jnp.sum(one_hot * (1 - jnp.exp(log_p)) ** 2 * log_p, axis=-1)


SIGMOID: dict[str, Loss] = {
    "focaljax focal, gamma 2": focaljax.sigmoid_focal_loss,
    "focaljax focal, gamma 1.5": lambda x, y: focaljax.sigmoid_focal_loss(x, y, gamma=1.5),
    "focaljax soft, K 2": focaljax.sigmoid_soft_truncation_loss,
    "focaljax hard": focaljax.sigmoid_hard_threshold_loss,
    "focaljax cross entropy (gamma 0)": lambda x, y: focaljax.sigmoid_focal_loss(x, y, gamma=0),
    "optax focal": optax.sigmoid_focal_loss,
    "optax BCE": optax.sigmoid_binary_cross_entropy,
}
SOFTMAX: dict[str, Loss] = {
    "focaljax focal, gamma 2": focaljax.softmax_focal_loss,
    "focaljax soft, K 2": focaljax.softmax_soft_truncation_loss,
    "focaljax hard": focaljax.softmax_hard_threshold_loss,
    "focaljax cross entropy (gamma 0)": lambda x, y: focaljax.softmax_focal_loss(x, y, gamma=0),
    "naive focal": naive_softmax_focal,
    "optax CE": optax.softmax_cross_entropy_with_integer_labels,
}


def measure(
    losses: dict[str, Loss], logits: jax.Array, labels: jax.Array, rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of each loss in each round."""
    steps = {}
    for name, loss in losses.items():

        def mean(logits, labels, loss=loss):
            return jnp.mean(loss(logits, labels), dtype=jnp.float32)

        steps[name] = jax.jit(jax.value_and_grad(mean)).lower(logits, labels).compile()
    seconds = {name: [] for name in losses}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(logits, labels))
            seconds[name].append(time.perf_counter() - begin)
    return {name: np.asarray(times[2:]) for name, times in seconds.items()}


def table(losses: dict[str, Loss], classes: int, elements: int, rounds: int) -> list[str]:
    """Markdown; the last two of `losses` are what the others are compared with."""
    rng = np.random.default_rng(0)
    examples = elements // classes
    if losses is SIGMOID:
        logits = rng.normal(-4, 3, (examples, classes))
        labels = jax.nn.one_hot(jnp.asarray(rng.integers(-1, classes, examples)), classes)
    else:
        logits = rng.normal(0, 3, (examples, classes))
        labels = jnp.asarray(rng.integers(0, classes, examples), jnp.int32)
    others = list(losses)[-2:]
    lines = [
        f"## {'Sigmoid' if losses is SIGMOID else 'Softmax'}, logits {(examples, classes)}",
        "",
        f"| logits | loss | median ms (quartiles) | of {others[0]} | of {others[1]} |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        seconds = measure(losses, jnp.asarray(logits, dtype), labels, rounds)
        median = {name: np.median(times) for name, times in seconds.items()}
        for name, times in seconds.items():
            low, high = np.quantile(times, [0.25, 0.75]) * 1e3
            ratios = " | ".join(f"{median[name] / median[other]:.2f}" for other in others)
            lines.append(
                f"| {dtype} | {name} | {median[name] * 1e3:.2f} ({low:.2f} to {high:.2f}) "
                f"| {ratios} |"
            )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()

    device = jax.devices()[0]
    # on an accelerator the anchors of RetinaNet on two images, times the classes of COCO
    elements = 80 * (50_000 if device.platform == "cpu" else 392_832)
    lines = [
        "# Wall clock",
        "",
        f"{device.device_kind}, {args.rounds} rounds; "
        f"jax {jax.__version__}, optax {optax.__version__}, focaljax {focaljax.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}",
        "",
        *table(SIGMOID, 80, elements, args.rounds),
    ]
    for classes in (21, 1000, 32768):
        lines += table(SOFTMAX, classes, elements, args.rounds)
    text = "\n".join(lines)
    print(text)
    if args.save:
        results = pathlib.Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        name = device.device_kind.lower().replace(" ", "-")
        (results / f"speed-{name}.md").write_text(text)


if __name__ == "__main__":
    main()
