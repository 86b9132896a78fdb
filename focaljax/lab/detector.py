"""A small RetinaNet: anchors, network, what its heads are to say, and what they find."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

import focaljax
from focaljax.lab.canvases import CLASSES, SIZE, Canvases
from focaljax.lab.losses import Anchors

STRIDES, SCALES = (4, 8), (1, 2 ** (1 / 3), 2 ** (2 / 3))
BACKGROUND, IGNORED = -1, -2


def make_anchors() -> np.ndarray:
    """[2160, 4]: left, top, right, bottom; in the order in which the heads answer."""
    levels = []
    for stride in STRIDES:
        places = (np.arange(SIZE // stride) + 0.5) * stride
        y, x, side = np.meshgrid(places, places, 2 * stride * np.array(SCALES), indexing="ij")
        corners = [x - side / 2, y - side / 2, x + side / 2, y + side / 2]
        levels.append(np.stack(corners, axis=-1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


ANCHORS = make_anchors()


def centre_and_size(boxes: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    """Each [..., 2]."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def iou(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """Intersection over union of boxes [..., 4] that broadcast; of two empty ones 0."""
    corner, opposite = jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:])
    shared = jnp.maximum(opposite - corner, 0).prod(-1)
    area_a, area_b = centre_and_size(a)[1].prod(-1), centre_and_size(b)[1].prod(-1)
    return shared / jnp.maximum(area_a + area_b - shared, 1e-9)


def match(boxes: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each anchor of one image its class, BACKGROUND or IGNORED, and its nearest box."""
    overlaps = iou(ANCHORS[:, None], boxes)  # [2160, 5]
    best, overlap = overlaps.argmax(1), overlaps.max(1)
    classes = jnp.where(overlap < 0.4, BACKGROUND, IGNORED)
    return jnp.where(overlap >= 0.5, ids[best], classes), boxes[best]


def encode(boxes: jax.Array) -> jax.Array:
    """Where the boxes lie from the anchors, in units of the anchor, and how much larger."""
    (centre, size), (anchor, anchor_size) = centre_and_size(boxes), centre_and_size(ANCHORS)
    return jnp.concatenate([(centre - anchor) / anchor_size, jnp.log(size / anchor_size)], -1)


def decode(offsets: jax.Array) -> jax.Array:
    """Boxes of the offsets."""
    anchor, anchor_size = centre_and_size(ANCHORS)
    centre = anchor + offsets[..., :2] * anchor_size
    half = jnp.exp(offsets[..., 2:].clip(-4, 4)) * anchor_size / 2
    return jnp.concatenate([centre - half, centre + half], -1)


class Detector(nnx.Module):
    """Five convolutions, a feature pyramid of two levels, and two heads that both levels share."""

    def __init__(self, prior: ArrayLike, rngs: nnx.Rngs, bins: int = 1, width: int = 32):
        def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **options):
            return nnx.Conv(inputs, outputs, (kernel, kernel), stride, rngs=rngs, **options)

        prior_bias = focaljax.prior_bias_init(prior)
        self.stem = conv(1, width // 2, stride=2)
        self.down4 = conv(width // 2, width, stride=2)
        self.block4 = conv(width, width)
        self.down8 = conv(width, width, stride=2)
        self.block8 = conv(width, width)
        self.lateral4 = conv(width, width, kernel=1)
        self.lateral8 = conv(width, width, kernel=1)
        self.smooth4 = conv(width, width)
        self.class_tower = conv(width, width)
        self.class_head = conv(width, len(SCALES) * CLASSES, bias_init=prior_bias)
        self.box_tower = conv(width, width)
        self.box_head = conv(width, len(SCALES) * 4 * bins)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Class logits [n, 2160, 10], and boxes [n, 2160, 4 bins]: offsets, or bins of each."""
        x = nnx.relu(self.stem(images[..., None] / 255))
        c4 = nnx.relu(self.block4(nnx.relu(self.down4(x))))
        c8 = nnx.relu(self.block8(nnx.relu(self.down8(c4))))
        p8 = self.lateral8(c8)
        p4 = self.smooth4(self.lateral4(c4) + p8.repeat(2, 1).repeat(2, 2))
        heads = (self.class_tower, self.class_head), (self.box_tower, self.box_head)
        logits, boxes = (
            jnp.concatenate(
                [
                    head(nnx.relu(tower(p))).reshape(len(p), p.shape[1] ** 2 * len(SCALES), -1)
                    for p in (p4, p8)
                ],
                axis=1,
            )
            for tower, head in heads
        )
        return logits, boxes


def offsets_of(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Offsets [..., 4], and the logits of their bins [..., 4, bins].

    Of more than one bin the offset is the mean over bins from -1 to 1.
    """
    bins = boxes.reshape(*boxes.shape[:-1], 4, -1)
    if bins.shape[-1] == 1:
        return bins[..., 0], bins
    return jax.nn.softmax(bins) @ jnp.linspace(-1, 1, bins.shape[-1]), bins


def targets(batch: Canvases, boxes: jax.Array) -> tuple[Anchors, jax.Array]:
    """What the class head is to say, where `boxes` are predicted; and each anchor's true box."""
    classes, true_boxes = jax.vmap(match)(batch.boxes, batch.ids)
    labels = jax.nn.one_hot(classes, CLASSES)  # of BACKGROUND and IGNORED all 0
    quality = labels * jax.lax.stop_gradient(iou(boxes, true_boxes))[..., None]
    centre, size = centre_and_size(batch.boxes)
    away = centre_and_size(ANCHORS)[0][:, None] - centre[:, None]  # [n, 2160, 5, 2]
    gaussian = jnp.exp(-0.5 * jnp.square(6 * away / jnp.maximum(size, 1)[:, None]).sum(-1))
    present = jax.nn.one_hot(batch.ids, CLASSES)[:, None]  # [n, 1, 5, 10]
    heat = jnp.maximum(labels, 0.99 * (gaussian[..., None] * present).max(2))
    where = jnp.broadcast_to((classes != IGNORED)[..., None], labels.shape)
    return Anchors(labels, quality.clip(0, 1), heat, where), true_boxes


def objective(model: Detector, batch: Canvases, loss: Callable[..., jax.Array]) -> jax.Array:
    """The losses of classes and boxes, each a sum over the number of positive anchors."""
    logits, boxes = model(batch.images)
    offsets, bins = offsets_of(boxes)
    to, true_boxes = targets(batch, decode(offsets))
    class_loss = focaljax.normalize_by_positives(loss(logits, to), to.labels, where=to.where)
    positive = to.labels.any(-1)
    true_offsets = encode(jnp.where(positive[..., None], true_boxes, ANCHORS))
    box_loss = 10 * optax.huber_loss(offsets, true_offsets, delta=0.1).sum(-1)
    if (last := bins.shape[-1] - 1) > 0:
        places = (last * (true_offsets + 1) / 2).clip(0, last)
        box_loss += 0.25 * focaljax.distribution_focal_loss(bins, places).sum(-1)
    return class_loss + focaljax.normalize_by_positives(box_loss, positive, where=positive)


class Detections(NamedTuple):
    """Of each image the 200 likeliest."""

    boxes: jax.Array  # [n, 200, 4]
    ids: jax.Array  # [n, 200]
    scores: jax.Array  # [n, 200], 0 where suppressed


def suppress(boxes: jax.Array, ids: jax.Array) -> jax.Array:
    """Which of these boxes of one image, the likeliest first, to keep (NMS at an IoU of .5)."""
    overlap = (iou(boxes[:, None], boxes) > 0.5) & (ids[:, None] == ids)
    place = jnp.arange(len(ids))

    def visit(i: jax.Array, keep: jax.Array) -> jax.Array:
        return keep & ~(keep[i] & overlap[i] & (place > i))

    return jax.lax.fori_loop(0, len(ids), visit, jnp.ones(len(ids), bool))


@nnx.jit
def detect(model: Detector, images: jax.Array) -> Detections:
    """What the network finds."""
    logits, boxes = model(images)
    best, places = jax.lax.top_k(logits.reshape(len(images), -1), 200)
    anchors, ids = jnp.divmod(places, CLASSES)
    boxes = decode(offsets_of(boxes)[0])
    boxes = jnp.take_along_axis(boxes, anchors[..., None], axis=1).clip(0, SIZE)
    return Detections(boxes, ids, jax.nn.sigmoid(best) * jax.vmap(suppress)(boxes, ids))
