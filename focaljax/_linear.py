"""Softmax losses of a linear head, whose logits are made a block of classes at a time.

A loss is a function of the margin, and the margin is three sums over the classes: the true logit,
the highest of the others, and the others' exponentials. So no array of all logits is needed, nor
one of their gradients.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from focaljax import _checks, _losses
from focaljax._classes import margin_of_sums
from focaljax._pointwise import Margin, margin_at, one_visit, wide


def linear_softmax_focal_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    gamma: ArrayLike = 2.0,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
    block_bytes: int = 2**25,
) -> jax.Array:
    r"""Focal loss of the softmax of a linear head, without its logits in memory.

    It is `softmax_focal_loss` of the logits ``features @ kernel + bias``, and at gamma = 0 cross
    entropy. The logits of a block of classes are made, used, and made once more for the gradient:
    one matrix product of three is done twice. For a vocabulary of 100,000 and more.

    Products are in the dtype of `features`, their sums and all that follows in at least float32.
    Reverse mode only: jvp is refused.

    Args:
      features: floating point, shape (..., D).
      kernel: the dtype of `features`, shape (D, C): a column for each class.
      labels: class ids, integers of shape (...). An id outside [0, C) gives NaN.
      bias: of each class, shape (C,).
      gamma: at least 0; may be traced and differentiated.
      alpha: one weight per class, at least 0, shape (C,).
      where: booleans of shape (...); True means included. Elsewhere the loss is 0 and so is every
        gradient, whatever stands there.
      axis_name: within `jax.shard_map`, the mesh axis over which the classes of `kernel` and `bias`
        are split, in order. `labels` and `alpha` are then of all classes.
      block_bytes: how much memory the logits of a block may take; at least 128 classes are a block.

    Returns:
      The loss of each example, shape (...), in at least float32.

    Raises:
      AssertionError: when a shape or dtype is not as above.
      ValueError: when `block_bytes`, or a gamma or alpha known at trace time, is out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> features, kernel = jnp.eye(3, 4), jnp.ones((4, 1000)).at[0, 7].set(9.0)
      >>> print(focaljax.linear_softmax_focal_loss(features, kernel, jnp.array([7, 7, 7])))
      [0.01821 6.89395   6.89395  ]
    """
    features = _checks.array("features", features)
    _checks.floating("features", features)
    _checks.axis(-1, features)
    checked = _checks.parameter("gamma", gamma, _checks.loss_of(features, features.ndim - 1))
    line = partial(_losses.focal, gamma=checked)
    return _loss(features, kernel, labels, line, bias, alpha, where, axis_name, block_bytes)


def linear_softmax_margin_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    loss: Callable[[jax.Array], jax.Array],
    *,
    bias: ArrayLike | None = None,
    alpha: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
    block_bytes: int = 2**25,
) -> jax.Array:
    """A loss of your own, of the softmax of a linear head; see `linear_softmax_focal_loss`.

    Args:
      features: shape (..., D).
      kernel: shape (D, C).
      labels: class ids, shape (...).
      loss: an elementwise function of the margin, as in `softmax_margin_loss`.
      bias: shape (C,).
      alpha: one weight per class.
      where: True means included.
      axis_name: the mesh axis of the classes.
      block_bytes: memory for the logits of a block.

    Returns:
      The loss of each example.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> features, kernel = jnp.eye(3, 4), jnp.ones((4, 1000))
      >>> poly1 = lambda z: focaljax.softplus(-z) + focaljax.sigmoid(-z)
      >>> print(focaljax.linear_softmax_margin_loss(features, kernel, jnp.array([1, 2, 3]), poly1))
      [7.9067 7.9067 7.9067]
    """
    line = lambda at: loss(at.z)  # noqa: E731
    return _loss(features, kernel, labels, line, bias, alpha, where, axis_name, block_bytes)


def _loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    line: Callable[[Margin], jax.Array],
    bias: ArrayLike | None,
    alpha: ArrayLike | None,
    where: ArrayLike | None,
    axis_name: str | None,
    block_bytes: int,
) -> jax.Array:
    features, kernel, labels = (
        _checks.array(name, value)
        for name, value in (("features", features), ("kernel", kernel), ("labels", labels))
    )
    _checks.floating("features", features)
    _checks.axis(-1, features)
    _checks.head(kernel, features)
    _checks.class_ids(labels, features, features.ndim - 1)
    dtype, classes = wide(features.dtype), kernel.shape[1]
    bias = jnp.zeros(classes, dtype) if bias is None else _checks.array("bias", bias)
    _checks.real("bias", bias)
    _checks.per_class("bias", bias, classes)
    every = classes if axis_name is None else classes * lax.axis_size(axis_name)
    weights = jnp.ones((), dtype)
    if alpha is not None:
        _checks.within("alpha", alpha, 0.0, open_high=True)
        alpha = _checks.array("alpha", alpha)
        _checks.per_class("alpha", alpha, every)
    if where is not None:
        where = _checks.array("where", where)
        _checks.mask(where, "labels", labels)
        # before the products: a NaN that is masked only afterwards has a NaN gradient
        features = jnp.where(where[..., None], features, 0)
        labels = jnp.where(where, labels, 0)
    if alpha is not None:
        weights = jnp.take(alpha.astype(dtype), labels, mode="clip")
    block = _block_size(block_bytes, labels.size, classes)
    # large unsigned ones become negative, which are no class either
    ids = labels.reshape(-1).astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)
    ids = jnp.where((ids >= 0) & (ids < every), ids, -1).astype(jnp.int32)
    flat = features.reshape(-1, features.shape[-1])
    z = _log_odds(flat, kernel, bias[None, :], ids, block, axis_name).reshape(labels.shape)
    value = one_visit(lambda z, weights: line(margin_at(z)) * weights, z, weights)
    return value if where is None else jnp.where(where, value, 0.0)


def _block_size(block_bytes: int, examples: int, classes: int) -> int:
    """How many classes; 128 take less memory than the gradient of 128 features does."""
    if not block_bytes > 0:
        raise ValueError(f"block_bytes must be above 0, got {block_bytes}")
    return max(1, min(max(128, block_bytes // (4 * max(examples, 1)) // 128 * 128), classes))


# --- the margin of the true class -----------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _log_odds(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    ids: jax.Array,
    block: int,
    axis_name: str | None,
) -> jax.Array:
    return _log_odds_fwd(features, kernel, bias, ids, block, axis_name)[0]


_Saved = tuple[jax.Array, ...]


def _log_odds_fwd(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    ids: jax.Array,  # -1 for one that is no class
    block: int,
    axis_name: str | None,
) -> tuple[jax.Array, _Saved]:
    own = ids if axis_name is None else ids - lax.axis_index(axis_name) * kernel.shape[1]
    lowest = jnp.finfo(wide(features.dtype)).min

    def visit(sums: _Saved, first: jax.Array) -> tuple[_Saved, None]:
        true, top, total = sums
        _, _, logits, of_class, is_new = _block(features, kernel, bias, own, first, block)
        is_other = ~of_class & is_new
        others = jnp.where(is_other, jnp.clip(logits, lowest, -lowest), lowest)
        new_top = jnp.maximum(top, jnp.max(others, axis=1))
        exps = jnp.where(is_other, jnp.exp(others - new_top[:, None]), 0.0)
        total = total * jnp.exp(top - new_top) + jnp.sum(exps, axis=1)
        true += jnp.sum(jnp.where(of_class & is_new, logits, 0.0), axis=1)
        return (true, new_top, total), None

    zero = jnp.zeros(len(ids), wide(features.dtype))
    true, top, total = _visit_all(visit, (zero, zero + lowest, zero), kernel, block)
    if axis_name is not None:
        own_top, top = top, lax.pmax(top, axis_name)
        true, total = lax.psum((true, total * jnp.exp(own_top - top)), axis_name)
    total = jnp.where(ids >= 0, total, jnp.nan)
    return margin_of_sums(true, top, total), (features, kernel, bias, own, top, total)


def _log_odds_bwd(
    block: int, axis_name: str | None, saved: _Saved, slope: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    features, kernel, bias, own, top, total = saved
    largest = jnp.finfo(top.dtype).max

    def visit(gradients: _Saved, first: jax.Array) -> tuple[_Saved, None]:
        of_features, of_kernel, of_bias = gradients
        start, part, logits, of_class, is_new = _block(features, kernel, bias, own, first, block)
        p = jnp.exp(jnp.minimum(logits, largest) - top[:, None]) / total[:, None]
        of_logits = jnp.where(is_new, slope[:, None] * jnp.where(of_class, 1.0, -p), 0.0)
        narrow = of_logits.astype(features.dtype)
        product = partial(jnp.einsum, preferred_element_type=top.dtype)

        def with_block(gradient: jax.Array, of_block: jax.Array) -> jax.Array:
            # a class that an earlier block has had keeps what it has
            before = lax.dynamic_slice_in_dim(gradient, start, block, axis=1)
            after = jnp.where(is_new, of_block.astype(gradient.dtype), before)
            return lax.dynamic_update_slice_in_dim(gradient, after, start, axis=1)

        of_features += product("nc,dc->nd", narrow, part)
        of_kernel = with_block(of_kernel, product("nd,nc->dc", features, narrow))
        of_bias = with_block(of_bias, jnp.sum(of_logits, axis=0, keepdims=True))
        return (of_features, of_kernel, of_bias), None

    zeros = jnp.zeros(features.shape, top.dtype), jnp.zeros_like(kernel), jnp.zeros_like(bias)
    of_features, of_kernel, of_bias = _visit_all(visit, zeros, kernel, block)
    of_features = _over_devices(features.astype(top.dtype), of_features).astype(features.dtype)
    return of_features, _over_devices(kernel, of_kernel), _over_devices(bias, of_bias), None


def _over_devices(array: jax.Array, gradient: jax.Array) -> jax.Array:
    """A gradient, summed over the mesh axes that the array itself does not vary over.

    That is what autodiff makes of the gradient of a sum of both.
    """
    total: jax.Array = jax.vjp(lambda array: array + gradient, array)[1](gradient)[0]
    return total


_log_odds.defvjp(_log_odds_fwd, _log_odds_bwd)


def _visit_all(
    visit: Callable[[_Saved, jax.Array], tuple[_Saved, None]],
    start: _Saved,
    kernel: jax.Array,
    block: int,
) -> _Saved:
    """Goes through the blocks of classes, of each its first one."""
    firsts = jnp.arange(0, kernel.shape[1], block, dtype=jnp.int32)
    # the first visit stands alone: what leaves it varies over the devices as what leaves the others
    return lax.scan(visit, visit(start, firsts[0])[0], firsts[1:])[0]


def _block(
    features: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    ids: jax.Array,
    first: jax.Array,
    block: int,
) -> _Saved:
    """Where a block starts, its part of the kernel, its logits, which are true, and which are new.

    The last block starts early enough to be whole, so some of its classes were in the one before.
    """
    start = jnp.minimum(first, kernel.shape[1] - block)
    part = lax.dynamic_slice_in_dim(kernel, start, block, axis=1)
    logits = jnp.dot(features, part, preferred_element_type=wide(features.dtype))
    logits += lax.dynamic_slice_in_dim(bias, start, block, axis=1).astype(logits.dtype)
    classes = (start + jnp.arange(block, dtype=ids.dtype))[None, :]
    return start, part, logits, classes == ids[:, None], classes >= first
