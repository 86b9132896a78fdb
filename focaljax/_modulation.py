"""The weights, and weight times cross entropy with its exact derivative.

Every loss here is ``w(z) * softplus(-z)`` at the margin ``z`` of the true label. A logit ``x``
whose label is positive with probability ``y`` meets two margins, ``x`` and ``-x``. Both are
written in the gap ``a = |x|``: a *hit* is label mass on the side that the logit leans to (margin
``a``), a *miss* is label mass on the other side (margin ``-a``). With ``e = exp(-a)``

    hit    p_t = 1 / (1 + e)    cross entropy      log1p(e)
    miss   p_t = e / (1 + e)    cross entropy  a + log1p(e)

so nothing overflows and nothing cancels. Label mass enters by multiplication, and the sign of the
logit by one select: with more of them the compilers stop fusing loss and gradient into one visit.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from focaljax import _checks


class Logit(NamedTuple):
    """A logit and its label, seen from the side that the logit leans to."""

    sign: jax.Array  # +1 where that side is the positive label, else -1
    hit: jax.Array  # label mass on that side
    miss: jax.Array  # label mass on the other side
    gap: jax.Array  # a = |logit|
    reach: jax.Array  # a, but finite: an infinite logit times a weight of 0 is 0, not NaN
    odds: jax.Array  # e = exp(-a)
    near: jax.Array  # 1 / (1 + e), the probability of that side
    near_error: jax.Array  # what rounding took from `near`, relative to it
    log_ratio: jax.Array  # log1p(e) / e
    log: jax.Array  # log1p(e)


class _Weight(NamedTuple):
    """A weight w at the two margins of a logit, and what it makes of the derivatives."""

    hit: jax.Array
    miss: jax.Array
    # -(d log w / dz) * cross entropy: what the weight adds to the slope
    hit_fall: jax.Array | float
    miss_fall: jax.Array | float
    # the second derivative of w times cross entropy c, which is, with rho = -d log w / dz,
    # w (rho^2 c + 2 rho sigma(-z) - rho' c + sigma(z) sigma(-z))
    hit_bend: jax.Array
    miss_bend: jax.Array
    # d loss / d miss through the weight, and d loss / d parameter
    label_slope: jax.Array | float = 0.0
    parameter_slope: jax.Array | float = 0.0


_Arrays = tuple[jax.Array, jax.Array, jax.Array]  # for logit, label and parameter

# What takes a logit and the loss's own parameter to its weight. `power` is the parameter where
# that is a small whole number known when tracing, else None.
Modulation = Callable[[Logit, jax.Array, int | None], _Weight]


def _log1p_ratio(e: jax.Array) -> jax.Array:
    """log1p(e) / e for e in [0, 1], as 2 artanh(e / (2 + e)) / e, by its series.

    More accurate than `log1p`, and no transcendental to the compilers: of the two per element that
    the cost promise allows, the other is the exp of the weight.
    """
    # (1/9) ** (terms + 1) / (2 terms + 3) is below an eighth of the dtype's epsilon
    terms = 6 if jnp.finfo(e.dtype).bits <= 32 else 15
    ratio = 2 / (2 + e)
    square = (0.5 * e * ratio) ** 2
    tail = jnp.zeros_like(e)
    for n in range(terms, 0, -1):
        tail = square * (1 / (2 * n + 1) + tail)
    rounding = lax.stop_gradient((1 - ratio) - 0.5 * ratio * e)
    return ratio + ratio * (tail + rounding)


def decay(rate: jax.Array, gap: jax.Array) -> jax.Array:
    """exp(-rate * gap), without the error of rounding rate * gap (up to 1e-5 in float32)."""
    product = rate * gap
    info = jnp.finfo(gap.dtype)
    high = partial(
        lax.reduce_precision, exponent_bits=info.nexp, mantissa_bits=(info.nmant + 1) // 2 - 1
    )
    rate_high, gap_high = high(rate), high(gap)
    rest = rate_high * (gap - gap_high) + (rate - rate_high) * gap
    rounding = lax.stop_gradient((rate_high * gap_high - product) + rest)
    # not decay - decay * rounding, whose second term underflows first; and where the product is so
    # large that its rounding is, this must be small enough for a slope of 0 times it to be 0
    return jnp.exp(-product) * jnp.clip(1 - rounding, 0, 2)


def see(logit: jax.Array, label: jax.Array, *, apart: bool) -> Logit:
    """The gap of a logit, and what follows from it.

    With `apart`, what is computed from the result has nothing in common with what is computed
    without it, for the compilers that this helps.
    """
    positive = logit >= 0
    sign = jnp.where(positive, jnp.ones_like(logit), -jnp.ones_like(logit))
    miss = jnp.where(positive, 1 - label, label)
    gap = sign * logit  # not maximum(x, -x), whose slope at 0 is 0
    if apart:
        # Compilers write what loss and slope share to memory (on a GPU 2 to 5 times the traffic);
        # spelled differently it is computed twice, in one visit. The TPU's visits once and shares.
        gap = lax.platform_dependent(
            gap,
            logit,
            tpu=lambda gap, _: gap,
            default=lambda _, logit: jnp.where(logit >= 0, logit, -logit),
        )
    odds = jnp.exp(-gap)
    near = 1 / (1 + odds)
    # a step of Newton's: a power of `near` multiplies its error
    near = near + near * lax.stop_gradient((1 - near) - near * odds)
    log_ratio = _log1p_ratio(odds)
    return Logit(
        sign=sign,
        hit=1 - miss,
        miss=miss,
        gap=gap,
        reach=jnp.minimum(gap, 1e30),
        odds=odds,
        near=near,
        near_error=lax.stop_gradient((1 - near) - near * odds),
        log_ratio=log_ratio,
        log=odds * log_ratio,
    )


def _times_decay(factor: jax.Array, rate: ArrayLike, gap: jax.Array) -> jax.Array:
    """`factor * exp(-rate * gap)`, right also where exp(-rate * gap) alone would underflow."""
    half = jnp.exp(-0.5 * rate * gap)
    return factor * half * half


def focal(t: Logit, gamma: jax.Array, power: int | None) -> _Weight:
    """`u ** gamma`, where `u = miss * near + hit * far` is 1 - p_t for a label of 0 or 1.

    For a soft label it is the mean of 1 - p_t: torchvision's and optax's form.
    """
    pure_hit = t.miss == 0
    base = jnp.where(pure_hit, 1, t.miss + t.hit * t.odds)  # u / near, but for a pure hit
    share = jnp.where(pure_hit, 1, t.odds / base)  # of `far` in u
    cross_entropy = t.miss * t.reach + t.log
    depth = jnp.where(pure_hit, t.reach, -jnp.log(base))  # -log(u / near)
    if power is None:
        weight = decay(gamma, depth) * jnp.exp(-gamma * t.log)
    else:
        weight = jnp.where(pure_hit, decay(gamma, t.reach), lax.integer_pow(base, power))
        weight = weight * lax.integer_pow(t.near, power)
        weight = weight + weight * (gamma * t.near_error)
    fall = gamma * t.near * (share * cross_entropy)
    # with r = near, u' / u = (miss - hit) r share, and share' = -share miss / base
    tilt = gamma * (t.miss - t.hit) * t.near
    bend = (
        tilt * tilt * share * cross_entropy
        + 2 * tilt * t.near * (t.miss - t.hit * t.odds)
        + tilt * (t.odds * t.near - jnp.where(pure_hit, 0, t.miss / base)) * cross_entropy
        + t.near * t.near * jnp.where(pure_hit, t.odds, base)
    )
    bend = weight * jnp.where(pure_hit, bend, _times_decay(bend / base, 1.0, t.gap))
    return _Weight(
        hit=weight,
        miss=weight,
        hit_fall=fall,
        miss_fall=fall,
        hit_bend=bend,
        miss_bend=bend,
        label_slope=weight
        * gamma
        * (1 - t.odds)
        * jnp.where(pure_hit, t.log_ratio, cross_entropy / base),
        parameter_slope=-weight * cross_entropy * (depth + t.log),
    )


def soft_truncation(t: Logit, k: jax.Array, power: int | None) -> _Weight:
    """sigma(-k z)."""
    del power
    odds = decay(k, t.reach)
    near = 1 / (1 + odds)
    hit = odds * near
    miss_cost = odds * (t.reach + t.log)
    tilt = k * near
    far_bend = t.near * t.near
    return _Weight(
        hit=hit,
        miss=near,
        hit_fall=tilt * t.log,
        miss_fall=tilt * miss_cost,
        hit_bend=hit * (tilt * tilt * (1 - odds) * t.log + (2 * tilt * t.near + far_bend) * t.odds),
        miss_bend=near
        * (
            _times_decay(tilt * (2 * t.near + tilt * (odds - 1) * (t.reach + t.log)), k, t.reach)
            + _times_decay(far_bend, 1.0, t.reach)
        ),
        parameter_slope=t.reach * near * (t.miss * near * miss_cost - t.hit * hit * t.log),
    )


def hard_threshold(t: Logit, threshold: jax.Array, power: int | None) -> _Weight:
    """1 where p_t <= threshold, else 0: a constant to autodiff."""
    del power
    # "not above" where "at most" is meant: the weight of a NaN is 1, which keeps it
    hit = 1 - (t.near > threshold).astype(t.near.dtype)
    miss = 1 - (t.odds * t.near > threshold).astype(t.near.dtype)
    bend = t.odds * t.near * t.near
    return _Weight(
        hit=hit, miss=miss, hit_fall=0.0, miss_fall=0.0, hit_bend=hit * bend, miss_bend=miss * bend
    )


def literal(t: Logit, margin: jax.Array, power: int | None) -> _Weight:
    """The sigma of another margin, for a label of 1: the weight of Su's form for many classes."""
    del power
    weight, rest = jax.nn.sigmoid(margin), jax.nn.sigmoid(-margin)
    bend = weight * t.odds * t.near * t.near
    return _Weight(
        hit=weight,
        miss=weight,
        hit_fall=0.0,
        miss_fall=0.0,
        hit_bend=bend,
        miss_bend=bend,
        parameter_slope=weight * rest * (t.miss * t.reach + t.log),
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _weighted_cross_entropy(
    modulation: Modulation,
    power: int | None,
    logit: jax.Array,
    label: jax.Array,
    parameter: jax.Array,
) -> jax.Array:
    """Weight times cross entropy, elementwise; `label` is the probability of the positive."""
    t = see(logit, label, apart=False)
    w = modulation(t, parameter, power)
    hit_loss, miss_loss = w.hit * t.log, w.miss * (t.gap + t.log)
    # for a miss of 0 beside an infinite gap; last, so that the CPU compiler, which pulls sums and
    # products into a following reduction and writes out what they need, keeps the loss in one loop
    return jnp.where(t.miss == 0, hit_loss, t.hit * hit_loss + t.miss * miss_loss)


def _slopes(
    modulation: Modulation,
    power: int | None,
    logit: jax.Array,
    label: jax.Array,
    parameter: jax.Array,
) -> _Arrays:
    """The derivatives of the loss in logit, label and parameter."""
    t = see(logit, label, apart=True)
    w = modulation(t, parameter, power)
    hit_slope = -w.hit * (t.odds * t.near + w.hit_fall)
    miss_slope = w.miss * (t.near + w.miss_fall)
    miss_loss = jnp.where(w.miss == 0, 0, w.miss * (t.gap + t.log))
    return (
        t.sign * (t.hit * hit_slope + t.miss * miss_slope),
        t.sign * (w.hit * t.log - miss_loss - w.label_slope),
        w.parameter_slope * jnp.ones_like(logit),
    )


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _logit_slope(
    modulation: Modulation,
    power: int | None,
    logit: jax.Array,
    label: jax.Array,
    parameter: jax.Array,
) -> jax.Array:
    return _slopes(modulation, power, logit, label, parameter)[0]


@partial(_logit_slope.defjvp, symbolic_zeros=True)
def _logit_slope_jvp(
    modulation: Modulation, power: int | None, primals: _Arrays, tangents: _Arrays
) -> tuple[jax.Array, jax.Array]:
    logit, label, parameter = primals
    t = see(logit, label, apart=False)
    w = modulation(t, parameter, power)
    # Mixed derivatives are symmetric, and only in the logit is what stands above analytic.
    _, slopes = jax.jvp(
        lambda logit: _slopes(modulation, power, logit, label, parameter)[1:],
        (logit,),
        (jnp.ones_like(logit),),
    )
    return _logit_slope(modulation, power, *primals), _dot(
        (t.hit * w.hit_bend + t.miss * w.miss_bend, *slopes), tangents
    )


@partial(_weighted_cross_entropy.defjvp, symbolic_zeros=True)
def _weighted_cross_entropy_jvp(
    modulation: Modulation, power: int | None, primals: _Arrays, tangents: _Arrays
) -> tuple[jax.Array, jax.Array]:
    loss = _weighted_cross_entropy(modulation, power, *primals)
    slope = _logit_slope(modulation, power, *primals)
    return loss, _dot((slope, *_slopes(modulation, power, *primals)[1:]), tangents)


# Compiled also when the caller does not: eager code then runs what it uses of all the above, and a
# loss is traced once for each shape. Inlined, so that a compiler sees through it.
weighted_cross_entropy: Callable[..., jax.Array] = jax.jit(
    _weighted_cross_entropy, static_argnums=(0, 1), inline=True
)


def _dot(slopes: _Arrays, tangents: _Arrays) -> jax.Array:
    terms = [
        s * t for s, t in zip(slopes, tangents, strict=True) if not isinstance(t, SymbolicZero)
    ]
    return sum(terms[1:], terms[0])


def modulated_cross_entropy(
    modulation: Modulation, logits: jax.Array, labels: jax.Array, name: str, value: ArrayLike
) -> jax.Array:
    """`weighted_cross_entropy` with its parameter checked, under the name that the caller knows."""
    return weighted_cross_entropy(
        modulation, small_whole_number(name, value), logits, labels, parameter(name, value, logits)
    )


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def refined(
    cost: Callable[..., jax.Array],
    at: tuple[jax.Array, ...],
    rests: tuple[jax.Array | None, ...],
) -> jax.Array:
    """`cost`, and so its derivatives, at numbers of which rounding took `rests`."""
    moved = {i: rest for i, rest in enumerate(rests) if rest is not None}
    if not moved:
        return cost(*at)

    def moving(*moved_to: jax.Array) -> jax.Array:
        return cost(*(dict(enumerate(at)) | dict(zip(moved, moved_to, strict=True))).values())

    # by its slope; and scaled, as what it adds underflows before the cost does
    scale = jnp.where(at[-1] > 0, 1 / jnp.finfo(at[-1].dtype).eps, 1)
    value, rest = jax.jvp(moving, [at[i] for i in moved], [scale * r for r in moved.values()])
    result: jax.Array = (scale * value + rest) / scale
    return result


@partial(refined.defjvp, symbolic_zeros=True)
def _refined_jvp(
    cost: Callable[..., jax.Array],
    primals: tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]],
    tangents: tuple[tuple[jax.Array, ...], tuple[jax.Array | None, ...]],
) -> tuple[jax.Array, jax.Array]:
    # given as if others: what slope and cost share, compilers would write out
    at, rests = lax.optimization_barrier(primals)
    moves = [
        refined(partial(slope, cost, i), at, rests) * tangent
        for i, tangent in enumerate(tangents[0])
        if not isinstance(tangent, SymbolicZero)
    ]
    return refined(cost, *primals), sum(moves[1:], moves[0])


def slope(cost: Callable[..., jax.Array], i: int, *at: jax.Array) -> jax.Array:
    """The derivative of a cost by its i-th argument, elementwise."""
    like = jnp.broadcast_to(at[i], at[-1].shape)  # a parameter may be one for all
    result: jax.Array
    _, result = jax.jvp(
        lambda moved: cost(*at[:i], moved, *at[i + 1 :]), (like,), (jnp.ones_like(like),)
    )
    return result


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to compute in: at least float32."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def parameter(name: str, value: ArrayLike, loss: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """A hyper-parameter as an array in the dtype of `loss`, and of its shape unless a number."""
    array = _checks.array(name, value)
    _checks.real(name, array)
    _checks.broadcasts(name, array, loss.shape)
    array = array.astype(loss.dtype)
    return jnp.broadcast_to(array, loss.shape) if array.ndim else array


def small_whole_number(name: str, value: ArrayLike) -> int | None:
    known = _checks.known(name, value)
    return int(known) if known is not None and known.ndim == 0 and known in range(9) else None


def focal_modulation(margin: ArrayLike, *, gamma: ArrayLike) -> jax.Array:
    r"""The weight of focal loss, :math:`\sigma(-z)^\gamma`, also called the modulating factor.

    Args:
      margin: floating point, any shape; see `sigmoid_margin`.
      gamma: at least 0; a number, or an array that broadcasts against the margin.

    Returns:
      Weights in [0, 1], in the shape and dtype of `margin`; computed in at least float32.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a gamma known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.focal_modulation(jnp.array([-1.0, 0.0, 1.0]), gamma=2.0))
      [0.534 0.25  0.072]

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 4.
    """
    _checks.within("gamma", gamma, 0.0, open_high=True)
    return _weight(focal, margin, "gamma", gamma)


def soft_truncation_modulation(margin: ArrayLike, *, k: ArrayLike) -> jax.Array:
    r"""The weight of soft truncation, :math:`\sigma(-K z)`.

    Args:
      margin: floating point, any shape; see `sigmoid_margin`.
      k: above 0; a number, or an array that broadcasts against the margin.

    Returns:
      Weights in [0, 1], in the shape and dtype of `margin`; computed in at least float32.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a k known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> print(focaljax.soft_truncation_modulation(jnp.array([-1.0, 0.0, 1.0]), k=2.0))
      [0.881 0.5   0.119]

    References:
      Su Jianlin, kexue.fm archives 4733 (2017).
    """
    _checks.within("k", k, 0.0, open_low=True, open_high=True)
    return _weight(soft_truncation, margin, "k", k)


def hard_threshold_modulation(margin: ArrayLike, *, threshold: ArrayLike) -> jax.Array:
    r"""The weight of the hard threshold: 1 where :math:`\sigma(z) \le m`, else 0.

    Args:
      margin: floating point, any shape; see `sigmoid_margin`.
      threshold: m, in (0, 1); a number, or an array that broadcasts against the margin.

    Returns:
      Weights 0 or 1, in the shape and dtype of `margin`; NaN where the margin is. The gradient
      is 0.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when a threshold known at trace time is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> margin = jnp.array([-1.0, 0.0, 1.0])
      >>> print(focaljax.hard_threshold_modulation(margin, threshold=0.5))
      [1. 1. 0.]

    References:
      Su Jianlin, kexue.fm archives 4293 (2017).
    """
    _checks.within("threshold", threshold, 0.0, 1.0, open_low=True, open_high=True)
    return _weight(hard_threshold, margin, "threshold", threshold)


def _weight(modulation: Modulation, margin: ArrayLike, name: str, value: ArrayLike) -> jax.Array:
    margin = _checks.array("margin", margin)
    _checks.floating("margin", margin)
    z = margin.astype(wide(margin.dtype))
    t = see(z, jnp.ones_like(z), apart=False)
    w = modulation(t, parameter(name, value, z), small_whole_number(name, value))
    weight: jax.Array = jnp.where(jnp.isnan(z), z, t.hit * w.hit + t.miss * w.miss)
    return weight.astype(margin.dtype)
