"""The cost promise, as far as it shows without the compilers of TPUs and GPUs."""

import jax
import jax.numpy as jnp
import pytest
from cases import LOSSES, OF_DISTRIBUTIONS, SOFTMAX_LOSSES, SU, by_name

X = jnp.zeros((64, 10))
DISTRIBUTIONS = jnp.full((64, 10), 0.1)
SIZES = [
    *((case, DISTRIBUTIONS, 205) for case in LOSSES),
    *((case, jnp.zeros(64, jnp.int32), 305) for case in SOFTMAX_LOSSES if case is not SU),
    *((case, DISTRIBUTIONS, 450) for case in OF_DISTRIBUTIONS if case.function is not SU.function),
]
each = pytest.mark.parametrize(
    ("case", "labels", "most"), SIZES, ids=[by_name(case) for case, *_ in SIZES]
)


@each
def test_loss_and_gradient_are_a_small_program(case, labels, most):
    step = jax.jit(jax.value_and_grad(lambda x: jnp.mean(case(x, labels))))
    assert len(step.lower(X).as_text().splitlines()) <= most


@each
def test_a_hessian_vector_product_is_small(case, labels, most):
    def product(x, v):
        return jax.jvp(jax.grad(lambda x: jnp.mean(case(x, labels))), (x,), (v,))[1]

    text = str(jax.make_jaxpr(product)(X, X))
    assert len(text.splitlines()) <= 3 * most
