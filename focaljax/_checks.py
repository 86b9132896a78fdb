"""What is refused, and the words it is refused with. Only facts known when tracing are looked at.

The only module that imports chex. Its assertions raise AssertionError; a hyper-parameter whose
value is known and out of range is a ValueError.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from focaljax._pointwise import wide


def array(name: str, value: ArrayLike) -> jax.Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be numbers or an array of them, got {value!r}") from error


def known(name: str, value: ArrayLike) -> np.ndarray | None:
    """The value of a hyper-parameter in float64, or None where it is only traced."""
    if convert := getattr(value, "__jax_array__", None):  # as of a Flax variable
        value = convert()
    if isinstance(value, jax.core.Tracer):
        return None
    number = np.asarray(value)
    if number.dtype.kind in "OUSc":
        raise TypeError(f"{name} must be a real number or an array of them, got {value!r}")
    return number.astype(np.float64)


def numbers(name: str, value: ArrayLike) -> jax.Array:
    """An array by way of float64 as far as it is known: large counts and costs fit no int32."""
    number = known(name, value)
    return array(name, value if number is None else number)


def floating(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        chex.assert_type(
            array,
            float,
            custom_message=f"{name} must be floating point, got {array.dtype}: cast by "
            f"{name}.astype(jnp.float32), or see whether two arguments were swapped",
        )


def real(name: str, array: jax.Array) -> None:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        chex.assert_type(
            array,
            float,
            custom_message=f"{name} must be real numbers, integers or booleans, got {array.dtype}",
        )


def same_shape(
    name: str,
    array: jax.Array,
    other_name: str,
    other: jax.Array | jax.ShapeDtypeStruct,
    advice: str,
) -> None:
    chex.assert_equal_shape(
        [array, other],
        custom_message=f"{name} must have the shape of {other_name}, {other.shape}, "
        f"got {array.shape}: {advice}",
    )


def mask(array: jax.Array, other_name: str, other: jax.Array | jax.ShapeDtypeStruct) -> None:
    chex.assert_type(
        array,
        bool,
        custom_message=f"where must be boolean (True means included), got {array.dtype}: "
        "write where=mask > 0 or mask.astype(bool)",
    )
    same_shape(
        "where",
        array,
        other_name,
        other,
        "spell it out, e.g. jnp.broadcast_to(mask[:, None], shape)",
    )


def broadcasts(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
    try:
        fits = jnp.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        chex.assert_shape(
            array,
            shape,
            custom_message=f"{name} must be a number or broadcast to shape {shape}, got shape "
            f"{array.shape}: to try several values use jax.vmap over {name}",
        )


def within(
    name: str,
    value: ArrayLike,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    dtype: jnp.dtype | None = None,
    advice: str = "",
) -> None:
    """Refuses a known value out of range; a traced one is let through. NaN is never in range.

    With `dtype`, one that is out of range when rounded to that is refused too.
    """
    number = known(name, value)
    if number is None:
        return
    if dtype is not None:
        number = number.astype(dtype)
    inside = (number > low if open_low else number >= low) & (
        number < high if open_high else number <= high
    )
    if not np.all(inside):
        if math.isinf(low):
            wanted = "finite"
        elif math.isinf(high):
            wanted = f"{'above' if open_low else 'at least'} {low:g} and finite"
        else:
            wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be {wanted}, got {number}{advice}")


_RANGES: dict[str, tuple[float, float, bool, bool]] = {  # low, high, and whether each is open
    "gamma": (0, math.inf, False, True),
    "k": (0, math.inf, True, True),
    "threshold": (0, 1, True, True),
    "alpha": (0, math.inf, False, True),
    "beta": (0, math.inf, False, True),
    "epsilon": (-math.inf, math.inf, True, True),
    "offset": (-math.inf, math.inf, True, True),
    "steepness": (0, math.inf, True, True),
    "margin": (0, 1, False, True),
    "mixing": (0, 1, False, False),
    "label_smoothing": (0, 1, False, False),
    "gamma_positive": (0, math.inf, False, True),
    "gamma_negative": (0, math.inf, False, True),
}


@jax.tree_util.register_static
class Known(float):
    """A number that is known when tracing, and compiled in."""


def parameter(
    name: str,
    value: ArrayLike,
    logits: jax.Array | jax.ShapeDtypeStruct,
    axis: int | None = None,
) -> float | jax.Array:
    """A loss's own parameter, beside the logits.

    A float where it is known to be a multiple of one half. An array broadcasts against the loss,
    which is without `axis`.
    """
    low, high, open_low, open_high = _RANGES[name]
    within(name, value, low, high, open_low=open_low, open_high=open_high)
    number = known(name, value)
    if (
        number is not None
        and number.ndim == 0
        and number <= 16
        and 2 * number == np.rint(2 * number)
    ):
        return Known(number)
    if axis is None:
        return beside(name, value, logits)
    result = beside(name, value, loss_of(logits, axis))
    return jnp.expand_dims(result, axis) if result.ndim else result


def loss_of(logits: jax.Array | jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the loss of classes along `axis`."""
    return jax.ShapeDtypeStruct(logits.shape[:axis] + logits.shape[axis + 1 :], logits.dtype)


def beside(name: str, value: ArrayLike, loss: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """A number, or an array that broadcasts against the loss, in its rank and dtype."""
    result = array(name, value)
    real(name, result)
    broadcasts(name, result, loss.shape)
    result = result.astype(wide(loss.dtype))
    return result if result.ndim == 0 else jnp.broadcast_to(result, loss.shape)


def vector(name: str, array: jax.Array) -> None:
    chex.assert_rank(
        array,
        1,
        custom_message=f"{name} must be a vector with one entry per class, got {array.shape}",
    )


def per_class(name: str, array: jax.Array, classes: int) -> None:
    chex.assert_shape(
        array,
        (classes,),
        custom_message=f"{name} must have one entry for each of the {classes} classes, shape "
        f"({classes},), got shape {array.shape}: one number for all classes would only rescale the "
        "loss, or shift all logits alike",
    )


def along_classes(name: str, values: ArrayLike, logits: jax.Array, axis: int) -> jax.Array:
    """A vector with an entry for each class, in the rank and dtype of `logits`."""
    vector = numbers(name, values)
    real(name, vector)
    per_class(name, vector, logits.shape[axis])
    others = [i for i in range(logits.ndim) if i != axis % logits.ndim]
    return jnp.expand_dims(vector.astype(wide(logits.dtype)), others)


def axis(value: int, array: jax.Array) -> None:
    if not isinstance(value, int | np.integer):
        raise TypeError(f"axis must be an integer known when tracing, got {value!r}")
    if not -array.ndim <= value < array.ndim:
        raise ValueError(
            f"axis must be one of the {array.ndim} axes of logits, whose shape is {array.shape}, "
            f"got {value}"
        )


def head(kernel: jax.Array, features: jax.Array) -> None:
    depth = features.shape[-1]
    chex.assert_shape(
        kernel,
        (depth, None),
        custom_message=f"kernel must have shape (D, C) with D = {depth}, as features has, a column "
        f"for each class, got {kernel.shape}: perhaps kernel.T is meant",
    )
    if kernel.dtype != features.dtype:
        raise AssertionError(
            f"kernel must have the dtype of features, {features.dtype}, got {kernel.dtype}: "
            "cast one, as by kernel.astype(features.dtype)"
        )


def class_ids(labels: jax.Array, logits: jax.Array, axis: int) -> None:
    shapes = [logits.shape[:i] + logits.shape[i + 1 :] for i in range(logits.ndim)]
    shape = shapes[axis]
    fitting = [f"axis={i}" for i, other in enumerate(shapes) if other == labels.shape]
    hint = f"; they fit {' and '.join(fitting)}" if fitting else ""
    chex.assert_shape(
        labels,
        shape,
        custom_message=f"labels must be class ids in shape {shape}, that of logits without axis "
        f"{axis}, or distributions in the shape of logits, {logits.shape}, "
        f"got {labels.shape}{hint}",
    )
    chex.assert_type(
        labels,
        int,
        custom_message=f"labels must be integers where they are class ids, got {labels.dtype}: "
        "cast by labels.astype(jnp.int32), or give distributions in the shape of logits, "
        f"{logits.shape}",
    )


def batches(name: str, ids: jax.Array, logits: jax.Array) -> None:
    """Class ids for rows of logits [..., rows, classes]: [..., any number]."""
    chex.assert_shape(
        ids,
        (*logits.shape[:-2], None),
        custom_message=f"{name} must have the shape of logits, {logits.shape}, without its last "
        f"two axes and with one for the objects, got {ids.shape}: pad the objects, and mask them "
        "by where",
    )
    chex.assert_type(
        ids, int, custom_message=f"{name} must be integers, got {ids.dtype}: class ids"
    )
