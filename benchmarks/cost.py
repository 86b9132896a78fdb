"""What losses cost on a TPU and a GPU, as the compilers count and as the counts predict.

    python benchmarks/cost.py            # the tables; exit status 1 if a promise is broken
    python benchmarks/cost.py --save     # the same, kept in benchmarks/results/cost.md

Of ``jit(value_and_grad(loss reduced to a number))``, over the ideal, which is every input read once
and every gradient written once (and read once before, what a normaliser counts: the labels).
`compilers.py` says how. A bound is the most that is promised; None promises nothing.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import compilers  # first, as it tells both compilers where they are
import jax
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table
from speed import sigmoid_log_space, sigmoid_naive, softmax_naive

import focaljax

Loss = Callable[..., jax.Array]
DEVICES = ("H100", "TPU v5e")
DTYPES = ("float32", "bfloat16")

# The anchors of RetinaNet on two 800 x 1333 images, times the 80 classes of COCO
ANCHORS = (392_832, 80)
# Images; tokens; the pixels of four 512 x 512 images and the classes of Pascal VOC
IMAGES, TOKENS, PIXELS = (131_072, 1000), (4096, 32_768), (2**20, 21)


class Bounds(NamedTuple):
    traffic: float  # over the ideal, on both devices
    seconds: tuple[float, float]  # over the ideal's on an H100, float32 and bfloat16
    transcendentals: float = 2  # an element, on the TPU


class Case(NamedTuple):
    name: str
    loss: Loss
    shape: tuple[int, int]
    labels: str  # "each": one for each logit; "one-hot": made of ids; "ids"; "distributions"
    bounds: Bounds | None = None
    reduction: str = "mean"  # or "positives" or "masked"


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if labels.ndim < logits.ndim:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def own(z: jax.Array) -> jax.Array:
    return focaljax.softplus(-z) + focaljax.sigmoid(-z)


FOCAL, SOFT = focaljax.sigmoid_focal_loss, focaljax.sigmoid_soft_truncation_loss
SOFTMAX_FOCAL = focaljax.softmax_focal_loss
GAMMA_2 = Bounds(1.001, (1.15, 1.47))
ANY_GAMMA = Bounds(1.001, (1.25, 1.75), 3)
OF_IDS = Bounds(1.01, (1.3, 1.9))

SIGMOID = [
    Case("focal, gamma 2", FOCAL, ANCHORS, "each", GAMMA_2),
    Case("focal, gamma 2, alpha .25", partial(FOCAL, alpha=0.25), ANCHORS, "each", ANY_GAMMA),
    Case(
        "focal, gamma 1.5", partial(FOCAL, gamma=1.5), ANCHORS, "each", Bounds(1.001, (1.2, 1.6))
    ),
    Case("focal, gamma 1.7", partial(FOCAL, gamma=1.7), ANCHORS, "each"),
    Case("soft truncation, K 2", SOFT, ANCHORS, "each", Bounds(1.001, (1.2, 1.6))),
    Case(
        "cross entropy (gamma 0)", partial(FOCAL, gamma=0), ANCHORS, "each",
        Bounds(1.001, (1.12, 1.37)),
    ),
    Case(
        "hard threshold", focaljax.sigmoid_hard_threshold_loss, ANCHORS, "each",
        Bounds(1.001, (1.12, 1.41)),
    ),
    Case(
        "one's own: softplus(-z) + sigmoid(-z)",
        partial(focaljax.sigmoid_margin_loss, loss=own), ANCHORS, "each",
        Bounds(1.001, (1.15, 1.52)),
    ),
    Case("focal, gamma 2", FOCAL, ANCHORS, "one-hot", OF_IDS),
    Case(
        "focal, gamma 2, over positives", FOCAL, ANCHORS, "one-hot", Bounds(1.01, (1.35, 2.0)),
        "positives",
    ),
    Case("focal, gamma 2, masked", FOCAL, ANCHORS, "one-hot", Bounds(1.01, (1.5, 2.0)), "masked"),
    Case("optax BCE", optax.sigmoid_binary_cross_entropy, ANCHORS, "each"),
    Case("optax BCE", optax.sigmoid_binary_cross_entropy, ANCHORS, "one-hot"),
    Case("optax focal", optax.sigmoid_focal_loss, ANCHORS, "each"),
    Case("optax's next focal (formula)", sigmoid_log_space, ANCHORS, "each"),
    Case("naive focal", sigmoid_naive, ANCHORS, "each"),
]  # fmt: skip
BCE_TIME = Bounds(1.001, (2.16, 2.96), 5)  # no slower than optax BCE
SIGMOID += [
    Case(
        name.replace("_", " "), getattr(focaljax, f"sigmoid_{name}_loss"), ANCHORS, "each",
        BCE_TIME,
    )
    for name in (
        "poly1", "reduced_focal", "focal_star", "quality_focal", "varifocal", "matchability",
        "iou_aware", "gaussian_focal", "asymmetric", "smoothed_focal",
    )
]  # fmt: skip
SOFTMAX = [
    Case("focal, gamma 2", SOFTMAX_FOCAL, IMAGES, "ids", Bounds(1.53, (1.65, 2.1), 2.1)),
    Case("focal, gamma 2", SOFTMAX_FOCAL, TOKENS, "ids", Bounds(1.53, (1.65, 2.1), 2.1)),
    Case("focal, gamma 2", SOFTMAX_FOCAL, PIXELS, "ids", Bounds(5.0, (2.1, 2.7), 2.2)),
    Case(
        "soft truncation, K 2", focaljax.softmax_soft_truncation_loss, IMAGES, "ids",
        Bounds(1.53, (1.65, 2.1), 2.1),
    ),
    Case("Su's literal form", focaljax.su_softmax_soft_truncation_loss, IMAGES, "ids"),
    Case("focal, gamma 2", SOFTMAX_FOCAL, IMAGES, "distributions", Bounds(2.05, (2.3, 2.7), 4.1)),
    Case("focal, gamma 2", SOFTMAX_FOCAL, TOKENS, "distributions", Bounds(2.05, (2.3, 2.7), 4.1)),
    Case(
        "soft truncation, K 2", focaljax.softmax_soft_truncation_loss, IMAGES, "distributions",
        Bounds(2.05, (2.3, 2.95), 8),
    ),
    Case(
        "one's own: softplus(-z) + sigmoid(-z)",
        partial(focaljax.softmax_margin_loss, loss=own), IMAGES, "distributions",
        Bounds(2.05, (2.7, 4.0), 16),
    ),
    Case("focal, gamma 2", SOFTMAX_FOCAL, PIXELS, "distributions", Bounds(6.3, (2.7, 3.5), 4.2)),
    *(
        Case("optax CE", softmax_cross_entropy, shape, labels)
        for labels in ("ids", "distributions")
        for shape in (IMAGES, TOKENS, PIXELS)
    ),
    Case("naive focal", softmax_naive, IMAGES, "distributions"),
]  # fmt: skip


def step(case: Case, dtype: str) -> tuple[Loss, list[jax.ShapeDtypeStruct], int]:
    """The function to compile, its arguments, and the ideal in bytes."""
    logits = jax.ShapeDtypeStruct(case.shape, dtype)
    of_ids = case.labels in ("ids", "one-hot")
    labels = jax.ShapeDtypeStruct(case.shape[:1], "int32") if of_ids else logits
    mask = [jax.ShapeDtypeStruct(case.shape, bool)] * (case.reduction == "masked")

    def reduced(logits: jax.Array, labels: jax.Array, *mask: jax.Array) -> jax.Array:
        if case.labels == "one-hot":
            labels = jax.nn.one_hot(labels, case.shape[1])
        where = dict(zip(("where",), mask, strict=False))
        loss = case.loss(logits, labels, **where)
        if case.reduction == "positives":
            return focaljax.normalize_by_positives(loss, labels)
        return focaljax.reduce_mean(loss, **where)

    arguments = [logits, labels, *mask]
    sizes = [a.size * a.dtype.itemsize for a in arguments]
    counted = {"mean": 0, "positives": sizes[1], "masked": sum(sizes[2:])}[case.reduction]
    return jax.value_and_grad(reduced), arguments, sum(sizes) + counted + sizes[0]


class Cost(NamedTuple):
    traffic: float  # over the ideal
    passes: int
    work: float  # an element: instructions on the H100, transcendentals on the TPU
    seconds: float  # over the ideal's, predicted
    microseconds: float
    scratch: float  # MB


def cost(device: str, case: Case, dtype: str) -> Cost:
    function, arguments, ideal = step(case, dtype)
    found = compilers.count(device, function, *arguments)
    return Cost(
        found.moved / ideal,
        found.passes,
        found.work / arguments[0].size,
        found.seconds * compilers.BYTES_PER_SECOND / ideal,
        found.seconds * 1e6,
        found.scratch / 1e6,
    )


def broken(device: str, case: Case, dtype: str, found: Cost) -> list[str]:
    """What the case promises and does not hold."""
    if not case.bounds:
        return []
    bounds, held = case.bounds, []
    if device == "H100":
        time, most = found.seconds, bounds.seconds[DTYPES.index(dtype)]
        held.append((f"predicted time {time:.2f}x, promised {most}x", time <= most))
        # what is kept of each of a million examples counts beside 21 logits
        most = 2.9 if case.shape == PIXELS else bounds.traffic
    else:
        most = bounds.traffic
        text = f"{found.work:.2f} transcendentals, promised {bounds.transcendentals}"
        held.append((text, found.work <= bounds.transcendentals))
    held.append((f"traffic {found.traffic:.3f}x, promised {most}x", found.traffic <= most))
    if case in SIGMOID:
        held.append((f"{found.passes} passes, promised 1", found.passes <= 1))
        held.append((f"scratch {found.scratch:.2f} MB, promised none", found.scratch < 1))
    return [text for text, holds in held if not holds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results/cost.md")
    save = parser.parse_args().save
    console = Console(width=140)
    todo = [(d, case, t) for d in DEVICES for case in (*SIGMOID, *SOFTMAX) for t in DTYPES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = pool.map(lambda t: cost(*t), todo)
        progress = track(counted, "Compiling", total=len(todo), console=Console(stderr=True))
        costs = dict(zip(todo, progress, strict=True))
    sections = [f"{compilers.versions()}. Loss and gradient, reduced to a number."]
    console.print(*sections)
    for title, cases in (("Sigmoid", SIGMOID), ("Softmax", SOFTMAX)):
        rows = [
            [
                case.name,
                f"{case.shape[0]} x {case.shape[1]}, {case.labels}",
                *(h100(costs["H100", case, t]) for t in DTYPES),
                *(tpu(costs["TPU v5e", case, t]) for t in DTYPES),
            ]
            for case in cases
        ]
        header = ["loss", "logits, labels", *(f"{d}, {t}" for d in DEVICES for t in DTYPES)]
        sections.append(show(console, title, header, rows))
    sections.append(
        "H100: predicted microseconds and, in brackets, those over the memory's floor; bytes over "
        "the ideal; instructions an element. TPU v5e: bytes over the ideal; transcendentals an "
        "element. Scratch where it is more than 1 MB."
    )
    console.print(sections[-1])
    faults = [
        f"{device}, {case.name}, {case.shape}, {case.labels}, {dtype}: {fault}"
        for (device, case, dtype), found in costs.items()
        for fault in broken(device, case, dtype, found)
    ]
    for fault in faults:
        console.print("BROKEN", fault)
    if save:
        results = pathlib.Path(__file__).parent / "results" / "cost.md"
        results.write_text("\n\n".join(["# What the compilers count", *sections]) + "\n")
    return 1 if faults else 0


def h100(found: Cost) -> str:
    return (
        f"{found.microseconds:.0f} ({found.seconds:.2f}x); {found.traffic:.2f}x; {found.work:.0f}"
        + scratch(found)
    )


def tpu(found: Cost) -> str:
    return f"{found.traffic:.2f}x; {found.work:.0f}" + scratch(found)


def scratch(found: Cost) -> str:
    return f"; {found.scratch:.0f} MB" if found.scratch > 1 else ""


def show(console: Console, title: str, header: list[str], rows: list[list[str]]) -> str:
    """Prints a table, and returns it as Markdown."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [f"## {title}", "", *("| " + " | ".join(r) + " |" for r in [header, *rows])]
    lines.insert(3, "|" + "---|" * len(header))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
