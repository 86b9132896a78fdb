"""The margin as losses see it, right at every size, and the rule that makes a loss one visit.

XLA lets a loss and its slope go through memory apart where it sees that they share terms. So the
slope is taken at another spelling of the same logit: the compiler that makes the code for one
element then computes what they share once. `tests/test_cost.py` holds that it does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

# log1p(e) / e on [0, 1] to 2e-7: its Chebyshev fit, which costs no logarithm
_LOG1P_RATIO = (0.9999998, -0.4999745, 0.33276176, -0.24499612, 0.17757024, -0.10785368, 0.04421419,
                -0.008574676)  # fmt: skip


class Margin(NamedTuple):
    """The log-odds of a label and what follows from them: what a loss is made of."""

    z: jax.Array
    p: jax.Array  # sigmoid(z), the probability of the label
    q: jax.Array  # sigmoid(-z) = 1 - p
    log_p: jax.Array  # minus the cross entropy
    log_q: jax.Array

    def __neg__(self) -> "Margin":
        """The margin of the other label."""
        return Margin(-self.z, self.q, self.p, self.log_q, self.log_p)

    def tangent(self, by_log_p: jax.Array) -> "Margin":
        """How all of it moves as log(p) moves."""
        by_p = self.p * by_log_p
        return Margin(over(by_log_p, self.q), by_p, -by_p, by_log_p, -over(by_p, self.q))


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to compute in: at least float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


@jax.custom_jvp
@jax.jit
def margin_at(z: jax.Array) -> Margin:
    """The margin at log-odds z. An infinite one is the largest number, so that 0 times it is 0."""
    size = jnp.minimum(jnp.abs(z), jnp.finfo(z.dtype).max)
    exp_size = jnp.exp(-size)
    likely = 1 / (1 + exp_size)
    unlikely = exp_size * likely
    log_likely = -_log1p(exp_size)
    log_unlikely = log_likely - size
    positive = z >= 0
    return Margin(
        z=jnp.where(positive, size, -size),
        p=jnp.where(positive, likely, unlikely),
        q=jnp.where(positive, unlikely, likely),
        log_p=jnp.where(positive, log_likely, log_unlikely),
        log_q=jnp.where(positive, log_unlikely, log_likely),
    )


@margin_at.defjvp
def _margin_at_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Margin, Margin]:
    at, (by,) = margin_at(*primals), tangents
    slope = at.p * at.q * by
    return at, Margin(by, slope, -slope, at.q * by, -at.p * by)


@jax.jit
def _log1p(e: jax.Array) -> jax.Array:
    """log(1 + e) for e in [0, 1]."""
    if e.dtype != jnp.float32:
        return jnp.log1p(e)
    ratio = jnp.full_like(e, _LOG1P_RATIO[-1])
    for coefficient in _LOG1P_RATIO[-2::-1]:
        ratio = ratio * e + coefficient
    return e * ratio


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(p: jax.Array, exponent: float) -> jax.Array:
    """A probability to a multiple of one half. The slope of its root at 0 is finite."""
    whole, half = divmod(exponent, 1)
    result = lax.integer_pow(p, int(whole))
    return result * jnp.sqrt(p) if half else result


@power.defjvp
def _power_jvp(
    exponent: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (p,), (by,) = primals, tangents
    result = power(p, exponent)
    if exponent == 0:
        return result, jnp.zeros_like(p)
    if exponent == 0.5:
        return result, 0.5 * over(by, result)
    # a Python number takes any dtype, one of NumPy's does not
    return result, float(exponent) * power(p, exponent - 1) * by


@jax.custom_jvp
def over(part: jax.Array, p: jax.Array) -> jax.Array:
    """The ratio, whose derivatives overflow no sooner than they must."""
    # so far above the smallest number that a small multiple of the ratio is finite
    return part / jnp.maximum(p, 1024 * jnp.finfo(p.dtype).tiny)


@over.defjvp
def _over_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    ratio = over(*primals)
    return ratio, over(tangents[0] - ratio * tangents[1], primals[1])


@jax.custom_jvp
def log(p: jax.Array) -> jax.Array:
    """The logarithm of a probability. That of 0 is finite, so that 0 times it is 0."""
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


log.defjvp(lambda primals, tangents: (log(*primals), over(*tangents, *primals)))


def one_visit(loss: Callable[..., jax.Array], z: jax.Array, *others: jax.Array) -> jax.Array:
    """An elementwise `loss(z, *others)` whose value and slope in z go through memory together."""
    loss, closed_over = closed(loss, z, *others)
    result: jax.Array = _one_visit(loss, z, *others, *closed_over)
    return result


def closed(
    function: Callable[..., Any], *examples: Any
) -> tuple[Callable[..., Any], list[jax.Array]]:
    """A function of the tracers too that it closes over, to be differentiated and batched in."""
    converted, closed_over = jax.closure_convert(function, *examples)
    return (converted, closed_over) if closed_over else (function, [])


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _one_visit(loss: Callable[..., jax.Array], z: jax.Array, *others: jax.Array) -> jax.Array:
    value = loss(z, *others)
    return jnp.where((jnp.abs(z) == jnp.inf) & infinite(value), jnp.inf, value)


def infinite(value: jax.Array) -> jax.Array:
    """Whether a loss would be infinite, had `margin_at` not made an infinite z finite."""
    return value > jnp.finfo(value.dtype).max ** 0.5


@partial(_one_visit.defjvp, symbolic_zeros=True)
def _one_visit_jvp(
    loss: Callable[..., jax.Array],
    primals: tuple[jax.Array, ...],
    tangents: tuple[jax.Array | SymbolicZero, ...],
) -> tuple[jax.Array, jax.Array]:
    z = primals[0]
    at = _respelled(*primals)
    # in z the slope alone, which is one array to keep for a backward pass
    directions = [jnp.ones_like(z), *tangents[1:]]
    moves = [
        jax.jvp(lambda moving, i=i: loss(*at[:i], moving, *at[i + 1 :]), (at[i],), (direction,))[1]
        * (tangents[0] if i == 0 else 1)
        for i, direction in enumerate(directions)
        if not isinstance(tangents[i], SymbolicZero)
    ]
    return _one_visit(loss, *primals), sum(moves[1:], moves[0])


def _respelled(*arrays: jax.Array) -> list[jax.Array]:
    """The same, to XLA others; the TPU's visits them once as they are, and shares."""

    def respelled(*arrays: jax.Array) -> list[jax.Array]:
        return [
            lax.clamp(jnp.asarray(-jnp.inf, x.dtype), x, jnp.asarray(jnp.inf, x.dtype))
            if x.ndim and jnp.issubdtype(x.dtype, jnp.floating)
            else x
            for x in arrays
        ]

    same: list[jax.Array] = lax.platform_dependent(
        *arrays, tpu=lambda *arrays: list(arrays), default=respelled
    )
    return same


def sigmoid(x: ArrayLike) -> jax.Array:
    r"""The logistic function :math:`1 / (1 + e^{-x})`, with exact derivatives of every order.

    In a loss of your own it costs less than ``jax.nn.sigmoid``: it shares with `softplus`.

    Args:
      x: floating point, any shape.

    Returns:
      Numbers in [0, 1], in the shape and dtype of `x`; computed in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.sigmoid(jnp.array([-1.0, 0.0, 1.0])))
      [0.26894143 0.5        0.7310586 ]
    """
    x = jnp.asarray(x)
    at: Margin = margin_at(x.astype(wide(x.dtype)))
    return at.p.astype(x.dtype)


def softplus(x: ArrayLike) -> jax.Array:
    r"""The softplus :math:`\log(1 + e^x)`, with exact derivatives of every order.

    Cross entropy of the margin z is ``softplus(-z)``. In a loss of your own it costs less than
    ``jax.nn.softplus``: it shares with `sigmoid`.

    Args:
      x: floating point, any shape.

    Returns:
      Numbers of at least 0, in the shape and dtype of `x`; computed in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.softplus(jnp.array([-1.0, 0.0, 1.0])))
      [0.31326172 0.69314706 1.3132617 ]
    """
    x = jnp.asarray(x)
    at: Margin = margin_at(x.astype(wide(x.dtype)))
    return jnp.where(x == jnp.inf, jnp.inf, -at.log_q).astype(x.dtype)
