"""How long losses take on the default device, beside others and beside what its memory allows.

    python benchmarks/speed.py        # prints and writes benchmarks/results/speed-DEVICE.md

The losses of a shape take turns, so that a slow moment of the machine falls on all of them; the
best turn counts. On an accelerator a turn is many calls in a row, which hides their dispatch.
"""

import datetime
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import focaljax

ON_CPU = jax.default_backend() == "cpu"
Loss = Callable[[jax.Array, jax.Array], jax.Array]
Shape = tuple[int, int]


def sigmoid_naive(logits: jax.Array, labels: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(logits)
    p_t = labels * p + (1 - labels) * (1 - p)
    return -((1 - p_t) ** 2) * jnp.log(p_t)


def sigmoid_log_space(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The formula of the sigmoid focal loss in the optax after 0.2.8, for hard labels."""
    z = (2 * labels - 1) * logits
    return jnp.exp(2.0 * jax.nn.log_sigmoid(-z)) * jax.nn.softplus(-z)


def softmax_naive(logits: jax.Array, labels: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(labels * (1 - jnp.exp(log_p)) ** 2 * log_p, axis=-1)


class Case(NamedTuple):
    labels: str  # hard: 0 or 1 for each logit; ids; distributions
    name: str
    loss: Loss


# all with gamma 2 and no alpha
CASES = [
    Case("hard", "focaljax focal", focaljax.sigmoid_focal_loss),
    Case("hard", "focaljax soft truncation", focaljax.sigmoid_soft_truncation_loss),
    Case("hard", "focaljax hard threshold", focaljax.sigmoid_hard_threshold_loss),
    Case("hard", "optax focal", optax.sigmoid_focal_loss),
    Case("hard", "optax BCE", optax.sigmoid_binary_cross_entropy),
    Case("hard", "optax's next focal (formula)", sigmoid_log_space),
    Case("hard", "naive focal", sigmoid_naive),
    Case("ids", "focaljax focal", focaljax.softmax_focal_loss),
    Case("ids", "optax CE", optax.softmax_cross_entropy_with_integer_labels),
    Case("distributions", "focaljax focal", focaljax.softmax_focal_loss),
    Case("distributions", "optax CE", optax.softmax_cross_entropy),
    Case("distributions", "naive focal", softmax_naive),
]
ALONE, GRADIENT = "loss alone", "with gradient"
PROMISES = [  # of a CPU: the labels, the loss of theirs, what is timed, at most how much of theirs
    ("hard", "optax focal", GRADIENT, 0.2),
    ("hard", "optax BCE", GRADIENT, 0.5),
    ("ids", "optax CE", GRADIENT, 1.5),
    ("ids", "optax CE", ALONE, 2),
    ("distributions", "naive focal", GRADIENT, 1.2),
    ("distributions", "optax CE", GRADIENT, 5),
    ("distributions", "naive focal", ALONE, 2),
]
SIGMOID: list[Shape] = [(64, 10), (50_000, 80)] if ON_CPU else [(392_832, 80)]
SOFTMAX: list[Shape] = (
    [(64, 10), (4096, 1000), (200_000, 21)] if ON_CPU else [(131_072, 1000), (1_048_576, 21)]
)
SHAPES = {"hard": SIGMOID, "ids": SOFTMAX, "distributions": SOFTMAX}
DTYPES = ("float32", "bfloat16")
Seconds = dict[tuple[str, Shape, str, str, str], float]


def data(labels: str, shape: Shape, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Logits and labels; those that are no ids are in the dtype of the logits."""
    examples, classes = shape
    logits_key, labels_key = jax.random.split(jax.random.key(0))
    logits = 3 * jax.random.normal(logits_key, shape, dtype) - (4 if labels == "hard" else 0)
    ids = jax.random.randint(labels_key, (examples,), -1 if labels == "hard" else 0, classes)
    if labels == "ids":
        return logits, ids
    one_hot = jax.nn.one_hot(ids, classes, dtype=dtype)
    return logits, one_hot if labels == "hard" else optax.smooth_labels(one_hot, 0.1)


def step(loss: Loss, what: str) -> Loss:
    def mean(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(loss(logits, labels), dtype=jnp.float32)

    return loss if what == ALONE else jax.value_and_grad(mean)


def best(steps: dict, args: tuple[jax.Array, ...], rounds: int) -> dict:
    """Seconds of each step, in the best of its turns."""
    calls = 1 if ON_CPU else 20
    compiled = {key: jax.jit(fun).lower(*args).compile() for key, fun in steps.items()}
    seconds = dict.fromkeys(steps, float("inf"))
    for warm in range(rounds + 2):
        for key, fun in compiled.items():
            begin = time.perf_counter()
            for _ in range(calls):
                result = fun(*args)
            jax.block_until_ready(result)
            if warm >= 2:
                seconds[key] = min(seconds[key], (time.perf_counter() - begin) / calls)
    return seconds


def bandwidth() -> float:
    """Bytes a second of a triad, in arrays as large as the largest logits."""
    b = jnp.ones(2**22 if ON_CPU else 2**27, jnp.float32)
    return 3 * b.nbytes / best({"triad": lambda b, c: b + 3 * c}, (b, b + 1), 20)["triad"]


def measure() -> tuple[Seconds, dict]:
    """Seconds of everything, and the bytes that each kind of step has to move."""
    seconds, moved = {}, {}
    for labels, shapes in SHAPES.items():
        for shape in shapes:
            for dtype in DTYPES:
                args = data(labels, shape, dtype)
                steps = {
                    (labels, shape, dtype, what, case.name): step(case.loss, what)
                    for case in CASES
                    if case.labels == labels
                    for what in (ALONE, GRADIENT)
                }
                seconds |= best(steps, args, 1000 if shape == (64, 10) else 12)
                read, logits = args[0].nbytes + args[1].nbytes, args[0].nbytes
                loss = logits if labels == "hard" else logits // shape[1]
                moved[labels, shape, dtype, ALONE] = read + loss
                moved[labels, shape, dtype, GRADIENT] = read + logits
    return seconds, moved


def timings(seconds: Seconds, floor: dict) -> Iterator[str]:
    """A cell is the time and, in brackets, its ratio to the memory's floor."""
    columns = [(dtype, what) for dtype in DTYPES for what in (ALONE, GRADIENT)]
    for labels, shapes in SHAPES.items():
        for shape in shapes:
            kind = "Sigmoid, hard labels" if labels == "hard" else f"Softmax, {labels}"
            yield f"\n## {kind}, {shape[0]} x {shape[1]}\n"
            yield "| ms (of the floor) | " + " | ".join(f"{d}, {w}" for d, w in columns) + " |"
            yield "|---" * (1 + len(columns)) + "|"
            for case in CASES:
                if case.labels == labels:
                    keys = [(labels, shape, *column) for column in columns]
                    taken = [seconds[(*key, case.name)] for key in keys]
                    ratios = [t / floor[key] for t, key in zip(taken, keys, strict=True)]
                    cells = [f"{t * 1e3:.3f} ({r:.1f})" for t, r in zip(taken, ratios, strict=True)]
                    yield f"| {case.name} | {' | '.join(cells)} |"


def promises(seconds: Seconds) -> Iterator[str]:
    yield "\n## Promises: ours / theirs\n"
    yield "| labels | shape | what | theirs | promised at most | " + " | ".join(DTYPES) + " |"
    yield "|---" * 7 + "|"
    for labels, theirs, what, limit in PROMISES:
        for shape in SHAPES[labels]:
            keys = [(labels, shape, dtype, what) for dtype in DTYPES]
            ratios = [seconds[(*key, "focaljax focal")] / seconds[(*key, theirs)] for key in keys]
            cells = " | ".join(f"{r:.2f}" + " (missed)" * (r > limit) for r in ratios)
            yield f"| {labels} | {shape[0]} x {shape[1]} | {what} | {theirs} | {limit} | {cells} |"


def main() -> None:
    kind = jax.devices()[0].device_kind
    rate = bandwidth()
    seconds, moved = measure()
    rate = max(rate, bandwidth())  # again: the machine may have been busy
    lines = [
        f"# Wall clock: {kind}\n",
        f"jax {jax.__version__}, optax {optax.__version__}, focaljax {focaljax.__version__}, "
        f"Python {platform.python_version()}, {datetime.date.today()}. Gamma is 2. The floor is "
        "the time to read logits and labels and to write the loss, or with gradient the gradient, "
        f"once, at the {rate / 1e9:.1f} GB/s of a triad a = b + s c in this run.",
        *timings(seconds, {key: size / rate for key, size in moved.items()}),
        *(promises(seconds) if ON_CPU else ()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    path = pathlib.Path(__file__).parent / "results" / f"speed-{kind.lower().replace(' ', '-')}.md"
    path.write_text(text)


if __name__ == "__main__":
    main()
