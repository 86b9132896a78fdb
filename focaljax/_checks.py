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
        if math.isinf(high):
            wanted = f"{'above' if open_low else 'at least'} {low:g} and finite"
        else:
            wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be {wanted}, got {number}")


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


def axis(value: int, array: jax.Array) -> None:
    if not isinstance(value, int | np.integer):
        raise TypeError(f"axis must be an integer known when tracing, got {value!r}")
    if not -array.ndim <= value < array.ndim:
        raise ValueError(
            f"axis must be one of the {array.ndim} axes of logits, whose shape is {array.shape}, "
            f"got {value}"
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
