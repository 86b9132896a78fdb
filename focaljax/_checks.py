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


def floating(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        chex.assert_type(
            array,
            float,
            custom_message=f"{name} must be floating point, got {array.dtype}: cast them first, "
            f"or were {name} and labels swapped?",
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
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        chex.assert_shape(
            array,
            shape,
            custom_message=f"{name} must be a number or broadcast against the loss of shape "
            f"{shape}, got shape {array.shape}: to try several values use jax.vmap over {name}",
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
    if isinstance(value, jax.core.Tracer):
        return
    known = np.asarray(value, dtype=np.float64)
    inside = (known > low if open_low else known >= low) & (
        known < high if open_high else known <= high
    )
    if not np.all(inside):
        if math.isinf(high):
            wanted = f"{'above' if open_low else 'at least'} {low:g} and finite"
        else:
            wanted = f"in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{name} must be {wanted}, got {known}")


def vector(name: str, array: jax.Array) -> None:
    chex.assert_rank(
        array,
        1,
        custom_message=f"{name} must be a vector with one entry per class, got {array.shape}",
    )
