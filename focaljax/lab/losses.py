"""The losses under test, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import focaljax as fj


class Loss(NamedTuple):
    """What trains, what its logits mean afterwards, and where its head starts."""

    of: Callable[..., jax.Array]  # (logits, labels) -> the loss of each
    posterior: Callable[[ArrayLike], jax.Array] | None = None  # to logits of true probabilities
    prior: float = 0.5  # the probability of "positive" that an untrained head gives


Losses = dict[str, Loss]


def poly1(margin: jax.Array) -> jax.Array:
    """Poly-1 of cross entropy as a line of the margin."""
    return fj.softplus(-margin) + fj.sigmoid(-margin)


def sigmoid(function: Callable[..., jax.Array], prior: float = 0.5, **parameters: Any) -> Loss:
    """A loss that `sigmoid_posterior_logits` takes the same parameters for."""
    posterior = partial(fj.sigmoid_posterior_logits, **parameters)
    return Loss(partial(function, **parameters), posterior, prior)


def softmax(function: Callable[..., jax.Array], **parameters: Any) -> Loss:
    """A loss that `softmax_posterior_logits` takes the same parameters for."""
    posterior = partial(fj.softmax_posterior_logits, **parameters)
    return Loss(partial(function, **parameters), posterior)


def of_two_classes(prior: float) -> Losses:
    """For one logit a row; `prior` is the share of positives in the training rows."""
    focal, hard = fj.sigmoid_focal_loss, fj.sigmoid_hard_threshold_loss
    return {
        "BCE": sigmoid(focal, gamma=0.0),
        "BCE, prior bias": sigmoid(focal, prior, gamma=0.0),
        "BCE, class weights": sigmoid(focal, gamma=0.0, alpha=1 - prior),
        "focal gamma=.5": sigmoid(focal, gamma=0.5),
        "focal gamma=1": sigmoid(focal, gamma=1.0),
        "focal gamma=2": sigmoid(focal, gamma=2.0),
        "focal gamma=2 alpha=.25": sigmoid(focal, gamma=2.0, alpha=0.25),
        "focal gamma=2 alpha=.75": sigmoid(focal, gamma=2.0, alpha=0.75),
        "focal gamma=5": sigmoid(focal, gamma=5.0),
        "soft K=2": sigmoid(fj.sigmoid_soft_truncation_loss, k=2.0),
        "soft K=4": sigmoid(fj.sigmoid_soft_truncation_loss, k=4.0),
        "hard m=.5": Loss(partial(hard, threshold=0.5)),
        "hard m=.9": Loss(partial(hard, threshold=0.9)),
        "Poly-1": Loss(fj.sigmoid_poly1_loss, partial(fj.sigmoid_posterior_logits, loss=poly1)),
        "reduced focal": Loss(fj.sigmoid_reduced_focal_loss),
        "focal star": Loss(fj.sigmoid_focal_star_loss),
    }


def of_many_classes(counts: np.ndarray) -> Losses:
    """For a softmax; `counts` are the training rows of each class."""
    focal, hard = fj.softmax_focal_loss, fj.softmax_hard_threshold_loss
    balanced = np.asarray(fj.class_balanced_weights(counts))

    def adjusted(logits: jax.Array, ids: jax.Array) -> jax.Array:
        return focal(fj.logit_adjustment(logits, prior=counts / counts.sum()), ids, gamma=0.0)

    return {
        "CE": softmax(focal, gamma=0.0),
        "CE, balanced": softmax(focal, gamma=0.0, alpha=balanced),
        "logit adjustment": Loss(adjusted),
        "focal gamma=1": softmax(focal, gamma=1.0),
        "focal gamma=2": softmax(focal, gamma=2.0),
        "focal gamma=2, balanced": softmax(focal, gamma=2.0, alpha=balanced),
        "focal gamma=5": softmax(focal, gamma=5.0),
        "soft K=2": softmax(fj.softmax_soft_truncation_loss, k=2.0),
        "Su soft K=1": Loss(partial(fj.su_softmax_soft_truncation_loss, k=1.0)),
        "hard m=.5": Loss(partial(hard, threshold=0.5)),
        "hard m=.9": Loss(partial(hard, threshold=0.9)),
        "Poly-1": Loss(fj.softmax_poly1_loss, partial(fj.softmax_posterior_logits, loss=poly1)),
        "reduced focal": Loss(fj.softmax_reduced_focal_loss),
    }


def of_several_labels(priors: np.ndarray) -> Losses:
    """For rows that each have any number of labels; `priors` are the labels' shares."""
    several = of_two_classes(float(priors.mean()))
    kept = ("BCE", "BCE, prior bias", "focal gamma=1", "focal gamma=2", "soft K=2", "hard m=.9")
    symmetric = partial(fj.sigmoid_asymmetric_loss, gamma_positive=0.0, gamma_negative=2.0)
    return {
        **{name: several[name] for name in kept},
        "asymmetric 1, 4, m=.05": Loss(fj.sigmoid_asymmetric_loss),
        "asymmetric 0, 2, m=0": Loss(partial(symmetric, margin=0.0)),
        "Poly-1": several["Poly-1"],
    }


class Anchors(NamedTuple):
    """What a dense detector's class head is to say, all [n, anchors, classes]."""

    labels: jax.Array  # 0 or 1
    quality: jax.Array  # of positives the overlap (IoU) of the box predicted there, else 0
    heat: jax.Array  # 1 on positives, falling as a Gaussian with the distance from the object
    where: jax.Array  # False where anchors are ignored


def of_hard_examples(logits: jax.Array, to: Anchors, *, ratio: int) -> jax.Array:
    """Cross entropy of positive anchors and each image's hardest others (OHEM)."""
    losses = fj.sigmoid_focal_loss(logits, to.labels, gamma=0.0, where=to.where)
    positive = to.labels.any(-1)
    hardness = jnp.where(positive, -jnp.inf, jax.lax.stop_gradient(losses.sum(-1)))
    last = (ratio * positive.sum(-1)).astype(int).clip(1, hardness.shape[-1]) - 1
    bar = jnp.take_along_axis(jnp.sort(hardness, descending=True), last[:, None], axis=-1)
    return losses * (positive | (hardness >= bar))[..., None]


def of_anchors() -> Losses:
    """For a dense detector; all but one start from a prior of .01."""

    def on(labels: str, function: Callable[..., jax.Array], **parameters: Any) -> Loss:
        def of(logits: jax.Array, to: Anchors) -> jax.Array:
            return function(logits, getattr(to, labels), where=to.where, **parameters)

        return Loss(of, prior=0.01)

    def with_posterior(function: Callable[..., jax.Array], **parameters: Any) -> Loss:
        posterior = partial(fj.sigmoid_posterior_logits, **parameters)
        return on("labels", function, **parameters)._replace(posterior=posterior)

    focal, soft = fj.sigmoid_focal_loss, fj.sigmoid_soft_truncation_loss
    cross_entropy, quality = (
        with_posterior(focal, gamma=0.0),
        on("quality", fj.sigmoid_quality_focal_loss),
    )
    return {
        "CE": cross_entropy,
        "CE, no prior": cross_entropy._replace(prior=0.5),
        "CE alpha=.75": with_posterior(focal, gamma=0.0, alpha=0.75),
        "OHEM 1:3": Loss(partial(of_hard_examples, ratio=3), prior=0.01),
        "focal gamma=1": with_posterior(focal, gamma=1.0),
        "focal gamma=1 alpha=.25": with_posterior(focal, gamma=1.0, alpha=0.25),
        "focal gamma=2": with_posterior(focal, gamma=2.0),
        "focal gamma=2 alpha=.25": with_posterior(focal, gamma=2.0, alpha=0.25),
        "soft K=2": with_posterior(soft, k=2.0),
        "hard m=.5": on("labels", fj.sigmoid_hard_threshold_loss, threshold=0.5),
        "hard m=.9": on("labels", fj.sigmoid_hard_threshold_loss, threshold=0.9),
        "Poly-1": on("labels", fj.sigmoid_poly1_loss),
        "asymmetric": on("labels", fj.sigmoid_asymmetric_loss),
        "smoothed focal": on("labels", fj.sigmoid_smoothed_focal_loss, alpha=0.25),
        "quality focal": quality,
        "quality focal + DFL": quality,
        "varifocal": on("quality", fj.sigmoid_varifocal_loss),
        "matchability": on("quality", fj.sigmoid_matchability_loss),
        "IoU-aware": on("quality", fj.sigmoid_iou_aware_loss),
        "Gaussian focal": on("heat", fj.sigmoid_gaussian_focal_loss),
    }


def of_tags(counts: np.ndarray) -> Losses:
    """For a tag on every character; `counts` are the training characters of each tag."""
    of_classes = of_many_classes(counts)
    weights = {beta: np.asarray(fj.class_balanced_weights(counts, beta=beta)) for beta in BETAS}
    kept = ("CE", "focal gamma=1", "focal gamma=2", "soft K=2", "hard m=.5", "hard m=.9")
    return {
        **{name: of_classes[name] for name in (*kept, "Su soft K=1", "Poly-1")},
        **{
            f"CE, weights {1 - beta:.0e}": softmax(fj.softmax_focal_loss, gamma=0.0, alpha=weight)
            for beta, weight in weights.items()
        },
        "logit adjustment": of_classes["logit adjustment"],
    }


BETAS = (1 - 1e-4, 1 - 1e-6)  # of class-balanced weights, for counts of 10,000 and more


def chosen(losses: Losses, names: list[str] | None) -> Losses:
    """Those of these names, the first one always among them: the others are compared with it."""
    if names is None:
        return losses
    if unknown := [name for name in names if name not in losses]:
        raise ValueError(f"no loss is called {unknown[0]!r}; there are: {'; '.join(losses)}")
    first = next(iter(losses))
    return {name: loss for name, loss in losses.items() if name in (first, *names)}
