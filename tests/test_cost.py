"""The cost promise, as far as it shows without the TPU's and the GPU's compilers.

`make cost` asks those compilers themselves, but they are a download of their own. Here: what each
platform is handed, and what the CPU's compiler makes of it.
"""

import re

import jax
import jax.numpy as jnp
import pytest

import focaljax

SHAPE = (512, 256)
ELEMENTS = SHAPE[0] * SHAPE[1]
TRANSCENDENTAL = r"stablehlo\.(exponential\w*|log\w*|power|tanh|sqrt|rsqrt|sine|cosine|cbrt)\b"

LOSSES = {
    "focal": (focaljax.sigmoid_focal_loss, 2),  # exp for the probability, exp for the weight
    "soft truncation": (focaljax.sigmoid_soft_truncation_loss, 2),
    "hard threshold": (focaljax.sigmoid_hard_threshold_loss, 1),
}
losses = pytest.mark.parametrize(("loss", "exps"), LOSSES.values(), ids=LOSSES)


def training_step(loss):
    """Value and gradient of the mean loss, traced for logits and labels of each dtype."""

    def traced(logits, labels):
        step = jax.value_and_grad(lambda x, y: focaljax.reduce_mean(loss(x, y)))
        arguments = [jax.ShapeDtypeStruct(SHAPE, dtype) for dtype in (logits, labels)]
        return jax.jit(step).trace(*arguments)

    return traced


@losses
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_every_platform_is_handed_so_many_exps_and_no_other(loss, exps, platform):
    traced = training_step(loss)(jnp.float32, jnp.float32)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # loss and slope each; the TPU's compiler is left to find that they are the same
    assert re.findall(TRANSCENDENTAL, text) == ["exponential"] * 2 * exps


@losses
@pytest.mark.parametrize("labels", [jnp.float32, jnp.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("logits", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_cpu_compiler_computes_nothing_twice_over(loss, exps, logits, labels):
    compiled = training_step(loss)(logits, labels).lower().compile()
    assert compiled.cost_analysis()["transcendentals"] == 2 * exps * ELEMENTS
    # at most three arrays, the loss itself one of them; optax's focal loss takes eight
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * ELEMENTS
    # the choice by platform is made before it runs
    assert "conditional" not in compiled.as_text()
