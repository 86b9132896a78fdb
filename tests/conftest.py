"""Strict settings: what JAX would forgive a careless library, it does not forgive here."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported

import hypothesis
import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("fixed")

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:
    from jax.experimental import enable_x64


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["float32", "float64"])
def dtype(request):
    """A dtype to test in; x64 is on for float64, and only for it."""
    with enable_x64(request.param == jnp.float64):
        yield request.param


@pytest.fixture
def float64():
    """For what needs its digits: x64 is on, and numpy's own doubles are taken as they are."""
    with enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Thousands of small programs take gigabytes; and what is imported no collector need visit."""
    gc.freeze()
    yield
    gc.unfreeze()
    jax.clear_caches()
