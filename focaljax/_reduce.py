"""A number from the losses of many elements: with a mask, by positives, across devices."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from focaljax import _checks
from focaljax._pointwise import wide


def reduce_mean(
    loss: ArrayLike, *, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
    """The mean loss of the included elements.

    Args:
      loss: floating point, any shape.
      where: booleans in the shape of `loss`; True means included. What stands elsewhere is neither
        summed nor counted.
      axis_name: a mapped axis (of `jax.shard_map`, `jax.pmap` or `jax.vmap`) to reduce over too:
        the sums and the counts are added up, so that devices with fewer included elements do not
        weigh more. With arrays sharded under plain `jax.jit` leave it None.

    Returns:
      A scalar in at least float32; 0 where nothing is included.

    Raises:
      AssertionError: when a shape or dtype is not as above.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> loss = jnp.array([1.0, 3.0, jnp.nan])
      >>> print(focaljax.reduce_mean(loss, where=jnp.array([True, True, False])))
      2.0
    """
    loss, mask = _loss_and_mask(loss, where)
    count = jnp.asarray(loss.size, loss.dtype) if mask is None else _count(mask, loss.dtype)
    total = _sum(loss)
    if axis_name is not None:
        # one by one: jax 0.7 cannot differentiate a psum of two of which one has no gradient
        total, count = lax.psum(total, axis_name), lax.psum(count, axis_name)
    return total / jnp.maximum(count, 1)


def normalize_by_positives(
    loss: ArrayLike,
    labels: ArrayLike,
    *,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
) -> jax.Array:
    """The summed loss over the number of positives, at least 1: RetinaNet's normaliser.

    In dense detection nearly all elements are easy negatives whose number says nothing, so their
    sum is divided by what there is to find.

    Args:
      loss: floating point, any shape.
      labels: the shape of `loss`; a label above 1/2 is a positive (so a class id of 0 or below is
        background).
      where: booleans in the shape of `loss`; True means included. What stands elsewhere is neither
        summed nor counted.
      axis_name: a mapped axis (of `jax.shard_map`, `jax.pmap` or `jax.vmap`) to reduce over too:
        one sum over one count of positives. With arrays sharded under plain `jax.jit` leave it
        None.

    Returns:
      A scalar in at least float32; with no positive, the sum.

    Raises:
      AssertionError: when a shape or dtype is not as above.

    Example:
      >>> import jax.numpy as jnp
      >>> import focaljax
      >>> loss, labels = jnp.array([1.0, 3.0, 2.0]), jnp.array([1, 1, 0])
      >>> print(focaljax.normalize_by_positives(loss, labels))
      3.0

    References:
      Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4.1.
    """
    loss, mask = _loss_and_mask(loss, where)
    positive = _checks.array("labels", labels)
    _checks.same_shape(
        "labels", positive, "loss", loss, "give the labels that the loss was computed from"
    )
    positive = positive.astype(loss.dtype) > 0.5
    if mask is not None:
        positive = positive & mask
    count = _count(positive, loss.dtype)
    if axis_name is not None:
        count = lax.psum(count, axis_name)
    # Divided before the sum: the gradient has to wait for the count, and a GPU visits the logits
    # a second time for it unless the sum waits too.
    total = _sum(loss / jnp.maximum(count, 1))
    return total if axis_name is None else lax.psum(total, axis_name)


def _loss_and_mask(loss: ArrayLike, where: ArrayLike | None) -> tuple[jax.Array, jax.Array | None]:
    loss = _checks.array("loss", loss)
    _checks.floating("loss", loss)
    result = loss.astype(wide(loss.dtype))
    if where is None:
        return result, None
    mask = _checks.array("where", where)
    _checks.mask(mask, "loss", loss)
    return jnp.where(mask, result, 0), mask


def _sum(loss: jax.Array) -> jax.Array:
    # Of several axes at once XLA's CPU compiler adds up to 32 ** ndim terms one after the other,
    # which is off by up to 4e-4 in float32 (jax 0.9 and older). One axis at a time is right to
    # rounding; the barrier keeps the compiler from making it one sum again.
    def by_axis(part: jax.Array) -> jax.Array:
        while part.ndim:
            part = lax.optimization_barrier(jnp.sum(part, axis=-1))
        return part

    total: jax.Array = lax.platform_dependent(loss, cpu=by_axis, default=jnp.sum)
    return total


def _count(mask: jax.Array, dtype: jnp.dtype) -> jax.Array:
    # float32 would stop counting at 2 ** 24, int32 at 2 ** 31
    return jnp.sum(mask, dtype=jnp.uint32).astype(dtype)
