"""The margins of exclusive classes: each logit against the log-sum-exp of the others.

Of the others, and not of all: 1 - p is theirs, and taken from p it loses its digits as p nears 1.
Only the top class can have p near 1. Reductions over the classes keep their axis.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from focaljax._pointwise import Margin, closed, infinite, log, wide

_Three = tuple[jax.Array, jax.Array, jax.Array]


def log_odds(logits: jax.Array, ids: jax.Array, axis: int) -> jax.Array:
    """The margin of one class in each example; NaN for an id that is no class."""
    return _log_odds(logits.astype(wide(logits.dtype)), ids, axis)[0]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_odds(logits: jax.Array, ids: jax.Array, axis: int) -> _Three:
    """The margin, and what the softmax of the others is made of."""
    true, top, total = _log_sum_exp_of_others(logits, ids, axis)
    exists = (ids >= 0) & (ids < logits.shape[axis])
    total = jnp.where(exists, total, jnp.nan)
    return margin_of_sums(true, top, total), top, total


def margin_of_sums(true: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
    """Of the true logit, the finite highest of the others, and their sum of exp(logit - it)."""
    infinite_top = lax.stop_gradient(top) * jnp.inf
    highest = jnp.where(jnp.abs(top) < jnp.finfo(top.dtype).max, top, infinite_top)
    return jnp.where(jnp.minimum(true, highest) == jnp.inf, 0.0, true - highest) - jnp.log(total)


@_log_odds.defjvp
def _log_odds_jvp(
    axis: int, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[_Three, _Three]:
    logits, ids = primals
    z, top, total = _log_odds(logits, ids, axis)
    of_class = is_class(logits, _anew(ids)[0], axis)
    slopes = jnp.where(of_class, 1.0, -_softmax_of_others(logits, of_class, top, total, axis))
    move = jnp.sum(slopes * tangents[0], axis, keepdims=True)
    return (z, top, total), (move, jnp.zeros_like(top), jnp.zeros_like(total))


def log_odds_of_classes(logits: jax.Array, axis: int) -> jax.Array:
    """The margins of all classes, exact for the top one too."""
    logits = logits.astype(wide(logits.dtype))
    top = lax.stop_gradient(jnp.max(logits, axis, keepdims=True))
    # no argmax, which would gather classes that are sharded
    classes = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    last = logits.shape[axis] - 1
    top_id = jnp.min(jnp.where(logits == top, classes, last), axis, keepdims=True)
    at_top = classes == top_id
    difference = _difference(logits, _finite(top))
    p = jnp.exp(difference)
    others = jnp.where(at_top, 1.0, jnp.sum(p, axis, keepdims=True) - p)
    return jnp.where(at_top, log_odds(logits, top_id, axis), difference - jnp.log(others))


def of_class(values: jax.Array, logits: jax.Array, ids: jax.Array, axis: int) -> jax.Array:
    """Of a value for each class, in the rank of the logits, that of one class in each example."""
    if jax.typeof(logits).sharding.mesh.empty:
        return jnp.take(jnp.ravel(values), ids, mode="clip")
    return jnp.sum(jnp.where(is_class(logits, ids, axis), values, 0.0), axis, keepdims=True)


def is_class(logits: jax.Array, ids: jax.Array, axis: int) -> jax.Array:
    """Whether a logit is that of the class: a gather would not let classes be sharded."""
    return lax.broadcasted_iota(ids.dtype, logits.shape, axis) == ids


@partial(jax.jit, static_argnums=(2,), inline=True)
def _log_sum_exp_of_others(logits: jax.Array, ids: jax.Array, axis: int) -> _Three:
    """The logit of the class, the finite highest of the others, their sum of exp(logit - it)."""

    def two_visits(logits: jax.Array, ids: jax.Array) -> _Three:
        of_class = is_class(logits, ids, axis)
        top = _finite(jnp.max(jnp.where(of_class, -jnp.inf, logits), axis, keepdims=True))
        exps = jnp.where(of_class, 0.0, jnp.exp(_difference(logits, top)))
        total = jnp.sum(exps, axis, keepdims=True)
        if sharded:
            return jnp.sum(jnp.where(of_class, logits, 0.0), axis, keepdims=True), top, total
        return jnp.take_along_axis(logits, ids, axis, mode="clip"), top, total

    def online(logits: jax.Array, ids: jax.Array) -> _Three:
        of_class = is_class(logits, ids, axis)
        lowest = jnp.finfo(logits.dtype).min
        others = jnp.where(of_class, lowest, _finite(logits))
        zero = jnp.zeros((), logits.dtype)
        reduced = lax.reduce(
            (jnp.where(of_class, logits, 0.0), others, jnp.ones_like(logits)),
            (zero, zero + lowest, zero),
            _merge_others,
            (axis,),
        )
        true, top, total = (jnp.expand_dims(result, axis) for result in reduced)
        return true, top, total

    sharded = _may_be_sharded(logits, axis)
    if sharded:
        return two_visits(logits, ids)
    result: _Three = lax.platform_dependent(logits, ids, cpu=two_visits, default=online)
    return result


def _merge_others(
    one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    (true, top, total), (true_2, top_2, total_2) = one, other
    scale = jnp.exp(-jnp.abs(top - top_2))
    scaled = jnp.where(top >= top_2, total + total_2 * scale, total * scale + total_2)
    return true + true_2, jnp.maximum(top, top_2), scaled


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def _softmax_of_others(
    logits: jax.Array, of_class: jax.Array, top: jax.Array, total: jax.Array, axis: int
) -> jax.Array:
    p = jnp.exp(_difference(logits, top)) * (1 / jnp.maximum(total, 1))
    return jnp.where(of_class, 0.0, p)


@_softmax_of_others.defjvp
def _softmax_of_others_jvp(
    axis: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    p, move = _softmax_of_others(*primals, axis), tangents[0]
    return p, p * (move - jnp.sum(p * move, axis, keepdims=True))


def expected(
    line: Callable[[Margin], jax.Array],
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    axis: int,
) -> jax.Array:
    """The sum over the classes of label times weight times a line of the margin."""
    example = Margin(*5 * (logits.astype(wide(logits.dtype)),))
    line, closed_over = closed(line, example)
    return _expected(line, axis, logits, labels, weights, *closed_over)


_Line = Callable[..., jax.Array]  # of a margin, and of what else it closes over


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _expected(line: _Line, axis: int, *arrays: jax.Array) -> jax.Array:
    return _loss_and_gradient(line, axis, *arrays)[0]


@partial(_expected.defjvp, symbolic_zeros=True)
def _expected_jvp(
    line: _Line,
    axis: int,
    primals: tuple[jax.Array, ...],
    tangents: tuple[jax.Array | SymbolicZero, ...],
) -> tuple[jax.Array, jax.Array]:
    loss, gradient = _loss_and_gradient(line, axis, *primals)
    moves = []
    if not isinstance(tangents[0], SymbolicZero):
        move = tangents[0].astype(gradient.dtype)
        moves.append(jnp.sum(gradient * move, axis, keepdims=True))
    if not all(isinstance(tangent, SymbolicZero) for tangent in tangents[1:]):
        directions = tuple(
            jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent
            for primal, tangent in zip(primals[1:], tangents[1:], strict=True)
        )
        of_others = partial(_loss_and_gradient, line, axis, primals[0])
        moves.append(jax.jvp(lambda *others: of_others(*others)[0], primals[1:], directions)[1])
    return loss, sum(moves[1:], moves[0])


def _loss_and_gradient(
    line: _Line,
    axis: int,
    logits: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    *closed_over: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The loss, and its gradient in the logits.

    With s_c the slope of a class's loss in log(p_c), that is ``label_c s_c - p_c sum(label s)``:
    but for the top class, of which both terms are large where 1 - p is small.
    """
    dtype = wide(logits.dtype)
    largest = jnp.finfo(dtype).max
    top, others, bottom = _top_and_others(lax.stop_gradient(logits).astype(dtype), axis)
    top = jnp.where(top > -largest, top, jnp.nan)  # no class can be

    def visit(logits: jax.Array, labels: jax.Array) -> tuple[Margin, jax.Array, jax.Array]:
        at = _margins(logits.astype(dtype), top, others, axis)
        tangent = at.tangent(jnp.ones_like(at.p))
        value, slope = jax.jvp(lambda at: line(at, *closed_over), (at,), (tangent,))
        mass = labels.astype(dtype) * weights
        return at, mass * value, mass * slope

    logits, labels = _anew(logits, labels)
    (_, value, _), (_, _, slope), (at, _, slope_of_all) = (
        visit(spelled, labels) for spelled in _spelled_apart(logits.astype(dtype))
    )
    terms = value, slope, slope_of_all * (1 - _is_top(at))
    loss, slope_sum, below_sum = (jnp.sum(term, axis, keepdims=True) for term in terms)
    any_infinite = (top >= largest) | (bottom == -jnp.inf)
    loss = jnp.where(any_infinite & infinite(loss), jnp.inf, loss)

    at, _, slope = visit(*_anew(logits, labels))
    of_top = slope * at.q - at.p * below_sum
    return loss, jnp.where(at.p > 0.5, of_top, slope - at.p * slope_sum)


def _is_top(at: Margin) -> jax.Array:
    """1 at a class with p > 1/2, else 0; no mask, which compilers would write out."""
    return jnp.round(lax.stop_gradient(at.p))


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _margins(logits: jax.Array, top: jax.Array, others: jax.Array, axis: int) -> Margin:
    """The margins of all classes, z of them at most the logarithm of the largest number."""
    difference = _difference(logits, top)
    p = jnp.exp(difference) * (1 / (1 + others))
    is_top = jnp.round(p)
    q = (1 - p) * (1 - is_top) + others * (1 / (1 + others)) * is_top
    log_p = jnp.maximum(difference, jnp.finfo(logits.dtype).min) - jnp.log1p(others)
    log_q = log(q)
    return Margin(log_p - log_q, p, q, log_p, log_q)


@_margins.defjvp
def _margins_jvp(
    axis: int, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[Margin, Margin]:
    at, move = _margins(*primals, axis), tangents[0]
    is_top = at.p > 0.5
    below = jnp.sum(jnp.where(is_top, 0.0, at.p * move), axis, keepdims=True)
    every = jnp.sum(at.p * move, axis, keepdims=True)
    return at, at.tangent(jnp.where(is_top, at.q * move - below, move - every))


@partial(jax.jit, static_argnums=(1,), inline=True)
def _top_and_others(logits: jax.Array, axis: int) -> _Three:
    """The finite highest logit, the sum of exp(logit - it) of the others, and the lowest logit."""

    def two_visits(logits: jax.Array) -> _Three:
        top = _finite(jnp.max(logits, axis, keepdims=True))
        exps = jnp.exp(_difference(logits, top))
        total = jnp.sum(exps, axis, keepdims=True)
        below = jnp.sum(exps - jnp.floor(exps), axis, keepdims=True)
        others = jnp.where(total < 2, below, total - 1)
        return top, others, jnp.min(logits, axis, keepdims=True)

    def online(logits: jax.Array) -> _Three:
        zero = jnp.zeros((), logits.dtype)
        # of the others there is none so far, and where there is no class one less
        initial = zero + jnp.finfo(logits.dtype).min, zero - 1, zero + jnp.inf
        operands = _finite(logits), jnp.zeros_like(logits), logits
        top, others, bottom = (
            jnp.expand_dims(result, axis)
            for result in lax.reduce(operands, initial, _merge_top, (axis,))
        )
        return top, jnp.maximum(others, 0), bottom

    if _may_be_sharded(logits, axis):
        return two_visits(logits)
    result: _Three = lax.platform_dependent(logits, cpu=two_visits, default=online)
    return result


def _merge_top(one: tuple[jax.Array, ...], other: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    (top, others, bottom), (top_2, others_2, bottom_2) = one, other
    scale = jnp.exp(-jnp.abs(top - top_2))
    scaled = jnp.where(top >= top_2, others + others_2 * scale, others * scale + others_2)
    return jnp.maximum(top, top_2), scale + scaled, jnp.minimum(bottom, bottom_2)


def _difference(logits: jax.Array, top: jax.Array) -> jax.Array:
    """Of logits to a finite one, from which an infinite one is as far as the largest number.

    By no comparison and no clamp: with one, XLA's CPU compiler writes out what it then sums.
    """
    return jnp.minimum(logits, jnp.finfo(logits.dtype).max) - top


def _finite(logits: jax.Array) -> jax.Array:
    largest = jnp.finfo(logits.dtype).max
    return jnp.clip(logits, -largest, largest)


def _anew(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same, and to a compiler others: what is made of them is not kept from before."""
    same: tuple[jax.Array, ...] = lax.platform_dependent(
        *arrays,
        cpu=lambda *arrays: arrays,
        default=lambda *arrays: lax.optimization_barrier(arrays),
    )
    return same


def _spelled_apart(logits: jax.Array) -> tuple[jax.Array, ...]:
    """The same three times, and to XLA three: what is made of them then goes through memory once.

    It writes out what two sums share; the compiler of the code for an element finds it anyway.
    """

    def apart(logits: jax.Array) -> tuple[jax.Array, ...]:
        infinity = jnp.asarray(jnp.inf, logits.dtype)
        largest = jnp.asarray(jnp.finfo(logits.dtype).max, logits.dtype)
        return logits, *(lax.clamp(-infinity, logits, most) for most in (infinity, largest))

    def same(logits: jax.Array) -> tuple[jax.Array, ...]:
        return logits, logits, logits

    spelled: tuple[jax.Array, ...] = lax.platform_dependent(
        logits, cpu=same, tpu=same, default=apart
    )
    return spelled


def _may_be_sharded(logits: jax.Array, axis: int) -> bool:
    """Whether `axis` is, or where only the compiler knows may be, split over devices."""
    sharding = jax.typeof(logits).sharding
    mesh = sharding.mesh
    kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    automatic = any(kinds[name] == AxisType.Auto and mesh.shape[name] > 1 for name in kinds)
    return automatic or sharding.spec[axis] is not None
