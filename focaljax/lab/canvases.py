"""Handwritten digits on cluttered canvases, to be detected."""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from sklearn.datasets import load_digits

SIZE, CLASSES, MOST = 96, 10, 5


class Canvases(NamedTuple):
    """A batch, or all there are. Unused places have an empty box and the id -1."""

    images: ArrayLike  # [n, 96, 96], uint8
    boxes: ArrayLike  # [n, 5, 4], float32: left, top, right, bottom
    ids: ArrayLike  # [n, 5], int32


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """A square image with `side` pixels, by linear interpolation between pixel centres."""
    source = (np.arange(side) + 0.5) * len(image) / side - 0.5
    weights = np.maximum(0, 1 - abs(source.clip(0, len(image) - 1)[:, None] - range(len(image))))
    return weights @ image @ weights.T


def paste(canvas: np.ndarray, image: np.ndarray, x: int, y: int) -> None:
    """The brighter of the two wins."""
    target = canvas[y : y + len(image), x : x + len(image)]
    np.maximum(target, image, out=target)


def draw_canvas(rng: np.random.Generator, digits: np.ndarray, ids: np.ndarray) -> Canvases:
    """One to five digits of 12 to 28 pixels, over noise and among 16 fragments of others."""
    canvas = np.zeros((SIZE, SIZE))
    for _ in range(16):
        row, column = rng.integers(0, 5, 2)
        fragment = rng.choice(digits)[row : row + 4, column : column + 4]
        side = rng.integers(5, 14)
        x, y = rng.integers(0, SIZE - side + 1, 2)
        paste(canvas, rng.uniform(0.3, 0.8) * resized(fragment, side), x, y)
    boxes = np.zeros((MOST, 4), np.float32)
    classes = np.full(MOST, -1, np.int32)
    taken = np.zeros((SIZE, SIZE), bool)
    for place in range(rng.integers(1, MOST + 1)):
        side = round(np.exp(rng.uniform(np.log(12), np.log(28))))
        x, y = rng.integers(0, SIZE - side + 1, 2)
        here = np.s_[y : y + side, x : x + side]
        if taken[here].any():
            continue
        taken[here] = True
        canvas[here] *= 0.2  # so that it can be read
        digit = rng.integers(len(digits))
        paste(canvas, rng.uniform(0.7, 1) * resized(digits[digit], side), x, y)
        boxes[place], classes[place] = (x, y, x + side, y + side), ids[digit]
    canvas += rng.normal(0, 0.05, canvas.shape)
    return Canvases(np.uint8(255 * canvas.clip(0, 1)), boxes, classes)


def draw_canvases(count: int, seed: int, *, test: bool = False) -> Canvases:
    """Canvases with scikit-learn's digits: 1,400 to train on, the other 397 to test on."""
    images, ids = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(ids))
    own = order[1400:] if test else order[:1400]
    rng = np.random.default_rng(seed)
    drawn = [draw_canvas(rng, images[own].reshape(-1, 8, 8) / 16, ids[own]) for _ in range(count)]
    return Canvases(*map(np.stack, zip(*drawn, strict=True)))
