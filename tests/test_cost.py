"""The cost promise, as far as it shows without the TPU's and the GPU's compilers.

`make cost` asks those compilers themselves, but they are a download of their own. Here: what each
platform is handed, and what the CPU's compiler makes of it.
"""

import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import pytest

import focaljax

SHAPE = (512, 256)
ELEMENTS = SHAPE[0] * SHAPE[1]
TRANSCENDENTAL = re.compile(
    r"stablehlo\.(exponential\w*|log\w*|power|tanh|sqrt|rsqrt|sine|cosine|cbrt)\b"
)

LOSSES = {
    "focal": (focaljax.sigmoid_focal_loss, 2),  # exp for the probability, exp for the weight
    "soft truncation": (focaljax.sigmoid_soft_truncation_loss, 2),
    "hard threshold": (focaljax.sigmoid_hard_threshold_loss, 1),
}
losses = pytest.mark.parametrize(("loss", "exps"), LOSSES.values(), ids=LOSSES)


SOFTMAX_LOSSES = {
    "focal": focaljax.softmax_focal_loss,
    "soft truncation": focaljax.softmax_soft_truncation_loss,
    "hard threshold": focaljax.softmax_hard_threshold_loss,
}
softmax_losses = pytest.mark.parametrize("loss", SOFTMAX_LOSSES.values(), ids=SOFTMAX_LOSSES)
logits_dtypes = pytest.mark.parametrize(
    "logits", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"]
)
OF_LOGITS = f"tensor<{SHAPE[0]}x{SHAPE[1]}x"


@lru_cache
def training_step(loss, logits, labels, labels_shape=SHAPE):
    """Value and gradient of the mean loss, traced for logits and labels of these dtypes."""
    step = jax.value_and_grad(lambda x, y: focaljax.reduce_mean(loss(x, y)))
    arguments = [
        jax.ShapeDtypeStruct(SHAPE, logits),
        jax.ShapeDtypeStruct(labels_shape, labels),
    ]
    return jax.jit(step).trace(*arguments)


@losses
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_every_platform_is_handed_so_many_exps_and_no_other(loss, exps, platform):
    traced = training_step(loss, jnp.float32, jnp.float32)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # loss and slope each; the TPU's compiler is left to find that they are the same
    assert TRANSCENDENTAL.findall(text) == ["exponential"] * 2 * exps


@losses
@pytest.mark.parametrize("labels", [jnp.float32, jnp.int8], ids=["float32", "int8"])
@logits_dtypes
def test_cpu_compiler_computes_nothing_twice_over(loss, exps, logits, labels):
    compiled = training_step(loss, logits, labels).lower().compile()
    assert compiled.cost_analysis()["transcendentals"] == 2 * exps * ELEMENTS
    # at most three arrays, the loss itself one of them; optax's focal loss takes eight
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * ELEMENTS
    # the choice by platform is made before it runs
    assert "conditional" not in compiled.as_text()


@softmax_losses
@logits_dtypes
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_class_ids_take_one_visit_for_the_loss_and_one_for_the_gradient(loss, logits, platform):
    traced = training_step(loss, logits, jnp.int32, SHAPE[:1])
    lines = traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
    # what the loss needs to know of all classes comes of one reduction
    reductions = [line for line in lines if "stablehlo.reduce(" in line and OF_LOGITS in line]
    assert len(reductions) <= 1
    # an exp for each class in that visit, within the reducer, and another in the gradient's
    transcendentals = [(match[1], line) for line in lines if (match := TRANSCENDENTAL.search(line))]
    in_reducer = [name for name, line in transcendentals if line.endswith(": tensor<f32>")]
    assert in_reducer in ([], ["exponential"])
    assert [name for name, line in transcendentals if OF_LOGITS in line] in ([], ["exponential"])


@pytest.mark.parametrize("ids", [True, False], ids=["ids", "distributions"])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_softmax_losses_gather_nothing(ids, platform):
    labels = (jnp.int32, SHAPE[:1]) if ids else (jnp.float32, SHAPE)
    traced = training_step(focaljax.softmax_focal_loss, jnp.float32, *labels)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert not re.search(r"gather|scatter|dynamic_slice", text)


@softmax_losses
@logits_dtypes
def test_cpu_compiler_keeps_no_copy_of_the_logits_for_class_ids(loss, logits):
    compiled = training_step(loss, logits, jnp.int32, SHAPE[:1]).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < ELEMENTS * jnp.dtype(logits).itemsize
    assert "conditional" not in compiled.as_text()
