"""A linear head in blocks: the numbers of the softmax losses at its logits, not their memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import focaljax


def data(examples, depth, classes, dtype=np.float64):
    rng = np.random.default_rng(classes)
    features = rng.normal(size=(examples, depth)).astype(dtype)
    kernel = (2 * rng.normal(size=(depth, classes))).astype(dtype)
    bias, ids = rng.normal(size=classes).astype(dtype), rng.integers(0, classes, examples)
    return (features, kernel, bias), ids


def poly1(z):
    return focaljax.softplus(-z) + focaljax.sigmoid(-z)


def blocks(arrays, ids, gamma=2.0, loss=None, **options):
    features, kernel, bias = arrays
    options = {"bias": bias, "block_bytes": 1} | options  # the smallest blocks there are
    if loss is not None:
        return focaljax.linear_softmax_margin_loss(features, kernel, ids, loss, **options)
    return focaljax.linear_softmax_focal_loss(features, kernel, ids, gamma=gamma, **options)


def whole(arrays, ids, gamma=2.0, loss=None, **options):
    features, kernel, bias = arrays
    logits = jnp.matmul(features, kernel) + jnp.broadcast_to(bias, (*ids.shape, len(bias)))
    if loss is not None:
        return focaljax.softmax_margin_loss(logits, ids, loss, **options)
    return focaljax.softmax_focal_loss(logits, ids, gamma=gamma, **options)


def value_and_gradient(function, arrays, *rest, **options):
    total = jax.jit(jax.value_and_grad(lambda arrays: function(arrays, *rest, **options).sum()))
    return total(arrays)


def assert_same(found, expected, **tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(other))
        np.testing.assert_allclose(one, other, **tolerance)


SHAPES = [(9, 4, 300), (1, 2, 1), (7, 5, 256), (3, 4, 129)]


@pytest.mark.parametrize(
    ("shape", "options"),
    [*((shape, {}) for shape in SHAPES), (SHAPES[0], {"gamma": 0.0}), (SHAPES[0], {"loss": poly1})],
)
def test_is_the_loss_at_the_logits(shape, options, float64):
    arrays, ids = data(*shape)
    rng = np.random.default_rng(0)
    weighed = {"where": rng.random(shape[0]) < 0.8, "alpha": rng.uniform(0.5, 2, shape[2])}
    found, expected = (
        value_and_gradient(f, arrays, ids, **options, **weighed) for f in (blocks, whole)
    )
    assert_same(found, expected, rtol=1e-10, atol=1e-12)


def test_second_derivatives_and_transformations(float64):
    arrays, ids = data(6, 3, 200)

    def curvature(function):
        def turned(arrays):
            gradient = jax.grad(lambda arrays: function(arrays, ids).sum())(arrays)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(gradient))

        return jax.jit(jax.grad(turned))(arrays)

    assert_same(curvature(blocks), curvature(whole), rtol=1e-8, atol=1e-10)
    by_gamma = jax.jit(jax.vmap(lambda gamma: blocks(arrays, ids, gamma)))(jnp.array([0.5, 2.0]))
    assert_same(by_gamma, jnp.stack([whole(arrays, ids, g) for g in (0.5, 2.0)]), rtol=1e-10)
    found, expected = (
        jax.jit(jax.grad(lambda gamma: f(arrays, ids, gamma).sum()))(1.7)  # noqa: B023
        for f in (blocks, whole)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    kept = jax.jit(jax.grad(jax.checkpoint(lambda arrays: blocks(arrays, ids).sum())))(arrays)
    assert_same(kept, value_and_gradient(blocks, arrays, ids)[1], rtol=1e-12)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda arrays: blocks(arrays, ids), (arrays,), (arrays,))


def test_more_axes_and_dtypes():
    arrays, ids = data(12, 8, 500, np.float32)
    (features, kernel, bias), by_two = arrays, (3, 4)
    found = blocks((features.reshape(*by_two, 8), kernel, bias), ids.reshape(by_two))
    np.testing.assert_array_equal(found, blocks(arrays, ids).reshape(by_two))
    exact, gradient = value_and_gradient(whole, arrays, ids)
    small = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), arrays)
    exact, gradient = value_and_gradient(whole, jax.tree.map(jnp.float32, small), ids)
    loss, found = value_and_gradient(blocks, small, ids)
    assert (loss.dtype, found[1].dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
    for one, other in zip(
        found, gradient, strict=True
    ):  # the logits' gradient is rounded to 8 bits
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.01 * np.abs(other).max())


def test_what_means_nothing_is_loud_and_what_is_masked_is_silent():
    (features, kernel, bias), ids = data(4, 3, 9, np.float32)
    loss = blocks((features, kernel, bias), np.array([0, 9, -1, 3]))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])
    unsigned = blocks((features, kernel, bias), np.array([0, 9, 255, 3], np.uint8))
    np.testing.assert_array_equal(unsigned, loss)
    features[1:3], ids[1:3] = np.nan, [-100, 9]
    where = np.array([True, False, False, True])
    loss, gradient = value_and_gradient(blocks, (features, kernel, bias), ids, where=where)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    assert not np.any(gradient[0][1:3])
    nothing = value_and_gradient(blocks, (features, kernel, bias), ids, where=where & False)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nothing))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": np.ones((9, 3), np.float32)}, r"kernel must have shape \(D, C\) with D = 3"),
        ({"kernel": np.ones((3, 9), np.float16)}, "kernel must have the dtype of features"),
        ({"labels": np.ones((4, 9), np.int32)}, "labels must be class ids"),
        ({"labels": np.ones(4, np.float32)}, "labels must be integers"),
        ({"bias": np.ones(3, np.float32)}, "bias"),
        ({"alpha": np.ones(3, np.float32)}, "alpha"),
        ({"alpha": -np.ones(9, np.float32)}, "alpha"),
        ({"gamma": -1.0}, "gamma"),
        ({"where": np.ones(9, bool)}, "where"),
        ({"block_bytes": 0}, "block_bytes must be above 0"),
    ],
    ids=str,
)
def test_refuses(change, message):
    (features, kernel, bias), ids = data(4, 3, 9, np.float32)
    call = {"features": features, "kernel": kernel, "labels": ids, "bias": bias} | change
    with pytest.raises((AssertionError, ValueError), match=message):
        focaljax.linear_softmax_focal_loss(**call)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_split_over_examples_and_classes_it_is_the_same():
    arrays, ids = data(8, 4, 600, np.float32)
    mesh = Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2),
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
    )
    specs = (P("data"), P(None, "model"), P("model"))

    def total(arrays, ids):
        return jax.lax.psum(blocks(arrays, ids, axis_name="model").sum(), "data")

    outside = jax.shard_map(total, mesh=mesh, in_specs=(specs, P("data")), out_specs=P())
    inside = jax.shard_map(
        jax.value_and_grad(total), mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs)
    )
    expected = jax.value_and_grad(lambda arrays: whole(arrays, ids).sum())(arrays)
    for spread in (jax.value_and_grad(outside), inside):
        program = jax.jit(spread).lower(arrays, ids).compile()
        assert "all-gather" not in program.as_text()
        assert_same(program(arrays, ids), expected, rtol=1e-5, atol=1e-5)


def test_memory_is_not_that_of_the_logits():
    examples, depth, classes = 2048, 64, 65_536
    arrays = tuple(
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((examples, depth), (depth, classes), (classes,))
    )
    ids = jax.ShapeDtypeStruct((examples,), jnp.int32)

    def scratch(function):
        program = jax.jit(jax.grad(lambda arrays, ids: function(arrays, ids).sum()))
        compiled = program.lower(arrays, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    kernel = 4 * depth * classes
    in_blocks = partial(blocks, block_bytes=2**22)
    assert scratch(in_blocks) <= 0.05 * scratch(whole) + kernel
