"""A loss of the user's own, given as a function of the margin, against its plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CLASS_IDS, CLASS_LOGITS, DISTRIBUTIONS, LABELS, LOGITS, squared_hinge

import focaljax


def plus_error(z):
    return focaljax.softplus(-z) + focaljax.sigmoid(-z)


def plain_plus_error(z):
    return jnp.logaddexp(0, -z) + 1 / (1 + jnp.exp(z))


LOSSES = {plus_error: plain_plus_error, squared_hinge: squared_hinge}
each = pytest.mark.parametrize("loss", LOSSES)


def close(got, true):
    np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-6)


def class_margins(x):
    others = jnp.where(jnp.eye(x.shape[-1], dtype=bool), -jnp.inf, x[..., None, :])
    return x - jax.nn.logsumexp(others, -1)


def value_slope_curvature(function, x):
    @jax.jit
    def everything(x):
        value, slope = jax.value_and_grad(lambda x: jnp.sum(function(x)))(x)
        product = jax.jvp(jax.grad(lambda x: jnp.sum(function(x))), (x,), (jnp.cos(x),))[1]
        return value, slope, product

    return everything(x)


@each
def test_sigmoid(loss):
    plain, alpha = LOSSES[loss], jnp.array([[0.25, 0.5, 0.75]])
    x, y = jnp.asarray(LOGITS), jnp.asarray(LABELS, jnp.float32)
    for got, true in zip(
        value_slope_curvature(lambda x: focaljax.sigmoid_margin_loss(x, y, loss, alpha=alpha), x),
        value_slope_curvature(
            lambda x: alpha * y * plain(x) + (1 - alpha) * (1 - y) * plain(-x), x
        ),
        strict=True,
    ):
        close(got, true)


@each
def test_softmax(loss):
    plain, alpha = LOSSES[loss], jnp.arange(1.0, 5)
    x = jnp.asarray(CLASS_LOGITS)
    for labels in (CLASS_IDS, DISTRIBUTIONS):
        mass = jax.nn.one_hot(labels, 4) if labels is CLASS_IDS else labels
        true = value_slope_curvature(
            lambda x, mass=mass: jnp.sum(
                mass * jnp.reshape(alpha, (1, 1, 4)) * plain(class_margins(x)), -1
            ),
            x,
        )
        first = value_slope_curvature(
            lambda x, labels=labels: focaljax.softmax_margin_loss(
                jnp.moveaxis(x, -1, 1),
                jnp.moveaxis(labels, -1, 1) if labels.ndim == 3 else labels,
                loss,
                alpha=alpha,
                axis=1,
            ),
            x,
        )
        for got, wanted in zip(first, true, strict=True):
            close(got, wanted)


@pytest.mark.parametrize(
    "head",
    [
        lambda loss: focaljax.sigmoid_margin_loss(LOGITS, LABELS, loss),
        lambda loss: focaljax.softmax_margin_loss(CLASS_LOGITS, CLASS_IDS, loss),
        lambda loss: focaljax.softmax_margin_loss(CLASS_LOGITS, DISTRIBUTIONS, loss),
    ],
    ids=["sigmoid", "ids", "distributions"],
)
def test_what_it_closes_over_may_be_traced(head):
    @jax.jit
    def total(gamma):
        return jnp.sum(head(lambda z: focaljax.sigmoid(-z) ** gamma * focaljax.softplus(-z)))

    step = 1e-2
    slope = (total(2 + step) - total(2 - step)) / (2 * step)
    gammas = jnp.array([1.0, 2.0])
    np.testing.assert_allclose(jax.grad(total)(2.0), slope, rtol=2e-3)
    np.testing.assert_allclose(jax.vmap(total)(gammas), [total(1.0), total(2.0)], 1e-5)
    np.testing.assert_allclose(jax.vmap(jax.grad(total))(gammas)[1], slope, rtol=2e-3)


def test_a_bounded_loss_stays_so_at_infinite_logits():
    def losses(x):
        first = jnp.zeros(2, int)
        yield focaljax.sigmoid_margin_loss(x[:, 0], jnp.ones(2), error)
        for labels in (first, jax.nn.one_hot(first, 2)):
            for loss in (error, plus_error):
                yield focaljax.softmax_margin_loss(x, labels, loss)

    def error(z):
        return focaljax.sigmoid(-z)

    found = jax.jit(lambda x: [*losses(x)])(jnp.array([[jnp.inf, 0], [-jnp.inf, 0]]))
    assert [loss.tolist() for loss in found] == [[0, 1], *2 * [[0, 1], [0, jnp.inf]]]


@each
def test_the_posterior_is_where_the_expected_loss_is_least(loss):
    x = jnp.array([-0.9, 0.0, 0.4])
    eta = jax.jit(partial(focaljax.sigmoid_posterior, loss=loss))(x)
    slope = jax.grad(lambda x: jnp.sum(eta * loss(x) + (1 - eta) * loss(-x)))(x)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    log_odds = jax.jit(partial(focaljax.sigmoid_posterior_logits, loss=loss))(x)
    close(jax.nn.sigmoid(log_odds), eta)
