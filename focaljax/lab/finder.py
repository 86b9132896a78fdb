"""Handwritten digits on cluttered canvases, to be found cell by cell, for training on many devices.

A cell of 4 x 4 pixels that holds a digit's centre is positive for its class. The other cells of the
digit are neither positive nor negative, so the loss leaves them out; all else is background.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

STRIDE = 4  # pixels of the canvas to a cell of the output
CLASSES = 10


class Batch(NamedTuple):
    """Canvases with what is on them; [batch, size, size, 1] and twice [batch, cells, cells].

    Attributes:
      canvas: pixels, background near 0.
      ids: the digit whose centre is in this cell; -1 where there is none.
      counted: False where the loss is to look away.
    """

    canvas: Any
    ids: Any
    counted: Any

    def imbalance(self) -> float:
        """How many logits count, to one that is positive."""
        return float(CLASSES * self.counted.sum() / (self.ids >= 0).sum())

    def without_digits(self, empty: slice, masked: slice) -> "Batch":
        """No positive in some of the canvases, and nothing to count in others."""
        ids, counted = self.ids.copy(), self.counted.copy()
        ids[empty], counted[masked] = -1, False
        return Batch(self.canvas, ids, counted)


class Digits(NamedTuple):
    """Images [n, 8, 8] of digits, from 0 to 1, and which digit each is."""

    images: np.ndarray
    classes: np.ndarray

    def canvas(self, size: int, seed: tuple[int, ...]) -> Batch:
        """One canvas, the same whoever draws it: clutter, and digits that do not overlap."""
        rng = np.random.default_rng(seed)
        canvas = rng.normal(0.0, 0.1, (size, size)).astype(np.float32)
        for _ in range(size**2 // 256):  # clutter: pieces of digits
            piece = rng.choice(self.images)[2:6, 2:6] * rng.uniform(0.3, 1.0)
            y, x = rng.integers(0, size - 4, 2)
            canvas[y : y + 4, x : x + 4] = np.maximum(canvas[y : y + 4, x : x + 4], piece)
        cells = size // STRIDE
        ids, counted = np.full((cells, cells), -1, np.int32), np.ones((cells, cells), bool)
        taken = np.zeros((size, size), bool)
        for _ in range(rng.integers(1, 2 + size // 16)):
            which, scale = rng.integers(len(self.images)), rng.integers(1, 3)
            extent = 8 * scale
            y, x = rng.integers(0, size - extent, 2)
            box = np.s_[y : y + extent, x : x + extent]
            if taken[box].any():
                continue
            taken[box] = True
            digit = np.kron(self.images[which], np.ones((scale, scale)))
            canvas[box] = np.maximum(canvas[box], digit)
            last_y, last_x = (y + extent - 1) // STRIDE, (x + extent - 1) // STRIDE
            counted[y // STRIDE : last_y + 1, x // STRIDE : last_x + 1] = False
            ids[(y + extent // 2) // STRIDE, (x + extent // 2) // STRIDE] = self.classes[which]
        counted |= ids >= 0
        return Batch(canvas[..., None], ids, counted)

    def batch(self, size: int, numbers: Iterable[int], seed: int = 0) -> Batch:
        """The canvases of these numbers, `size` pixels wide, as NumPy arrays."""
        canvases = [self.canvas(size, (seed, number)) for number in numbers]
        return Batch(*(np.stack(part) for part in zip(*canvases, strict=True)))

    def on_devices(self, mesh: Mesh, size: int, numbers: range, seed: int = 0) -> Batch:
        """The same, split over the mesh's axis `data`; each host draws its own share alone."""
        share = len(numbers) // jax.process_count()
        first = jax.process_index() * share
        mine = self.batch(size, numbers[first : first + share], seed)
        split = NamedSharding(mesh, P("data"))
        return Batch(*(jax.make_array_from_process_local_data(split, part) for part in mine))


def load() -> tuple[Digits, Digits]:
    """Digits to train on, and others to test on."""
    data = load_digits()
    images = (data.images / 16).astype(np.float32)
    return Digits(images[:1400], data.target[:1400]), Digits(images[1400:], data.target[1400:])


def average_precision(logits: Any, batch: Batch) -> float:
    """Of all cells and classes that count, ranked by their logit."""
    labels = np.arange(CLASSES) == batch.ids[..., None]
    scores = np.asarray(logits, np.float32)
    counted = batch.counted
    return float(average_precision_score(labels[counted].ravel(), scores[counted].ravel()))


def relative_difference(found: Any, expected: Any) -> float:
    """The norm of the difference of two trees of arrays, relative to the second's."""
    found, expected = jax.device_get((found, expected))
    difference = jax.tree.map(np.subtract, found, expected)
    return float(optax.global_norm(difference) / optax.global_norm(expected))


def draw(batch: Batch, figure: Figure, columns: int = 4) -> None:
    """Puts the first canvases on a figure, with a square around each positive cell."""
    axes = figure.subplots(1, columns)
    for axis, canvas, ids in zip(axes, batch.canvas, batch.ids, strict=False):
        y, x = np.nonzero(ids >= 0)
        axis.imshow(canvas[..., 0], cmap="gray", extent=(0, len(ids), len(ids), 0))
        axis.scatter(x + 0.5, y + 0.5, 30, marker="s", facecolors="none", edgecolors="C1")
        axis.set(title=" ".join(map(str, ids[y, x])), xticks=[], yticks=[])


def seconds(run: Callable[..., Any], *arguments: Any, repeats: int = 10) -> float:
    """The median time until the result is there, after a first call that compiles."""
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))
