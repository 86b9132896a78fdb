"""The cost promise: the size of programs, and where both compilers are here what they count."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import LOSSES, OF_DISTRIBUTIONS, SOFT, SOFTMAX_LOSSES, SU, by_name

X = jnp.zeros((64, 10))
DISTRIBUTIONS = jnp.full((64, 10), 0.1)
SIZES = [
    # soft truncation, of two sigmoids, is 7 lines above the 200 of the others
    *((case, DISTRIBUTIONS, 207 if case is SOFT else 200) for case in LOSSES),
    *((case, jnp.zeros(64, jnp.int32), 300) for case in SOFTMAX_LOSSES if case is not SU),
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


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("libtpu", "jax_cuda13_plugin"))),
    reason="needs the compilers of focaljax[benchmarks]: make cost runs it",
)
def test_compilers_count_what_is_promised(monkeypatch):
    """A GPU's instructions and time, a TPU's transcendentals, bytes of both, of every loss."""
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[1] / "benchmarks"), *sys.path])
    import cost

    faults = [
        (device, case.name, case.labels, dtype, cost.broken(device, case, dtype, found))
        for device in cost.DEVICES
        for case in (*cost.SIGMOID, *cost.SOFTMAX)
        if case.bounds and case.shape[0] >= 2**17
        for dtype in cost.DTYPES
        for found in [cost.cost(device, case, dtype)]
    ]
    assert not [fault for fault in faults if fault[-1]]
