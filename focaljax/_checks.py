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


def same_shape(name: str, array: jax.Array, other_name: str, other: jax.Array, advice: str) -> None:
    chex.assert_equal_shape(
        [array, other],
        custom_message=f"{name} must have the shape of {other_name}, {other.shape}, "
        f"got {array.shape}: {advice}",
    )


def mask(array: jax.Array, other_name: str, other: jax.Array) -> None:
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
) -> None:
    """Refuses a known value out of range; a traced one is let through. NaN is never in range."""
    number = known(name, value)
    if number is None:
        return
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
