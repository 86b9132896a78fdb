"""Classes and examples split over devices: the same numbers, and few of them exchanged."""

import math
import re
from functools import partial

import jax
import numpy as np
import pytest
from cases import OF_DISTRIBUTIONS, REDUCTIONS, SOFT, SOFTMAX_FOCAL, SU, by_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import focaljax

# --- across devices -------------------------------------------------------------------------------

ROWS = np.arange(24, dtype=np.float32).reshape(4, 6)
UNEVEN = (np.arange(24) % 5 < 2).reshape(4, 6) & (np.arange(4) != 2)[:, None]  # none in one row


def over_devices(function, *data):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    sharded = [jax.device_put(a, NamedSharding(mesh, P("data"))) for a in data]
    specs = {"in_specs": (P("data"),) * len(data), "out_specs": P()}
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs))(*sharded)


def over_vmap(function, *data):
    out = jax.vmap(function, axis_name="data")(*data)
    assert np.all(np.asarray(out) == out[0])
    return out[0]


@pytest.mark.parametrize("over", [over_vmap, over_devices])
@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
def test_a_reduction_over_devices_is_that_of_the_whole(case, over):
    if over is over_devices and len(jax.devices()) < 4:
        pytest.skip("needs four devices")
    labels = [UNEVEN.astype(np.float32)] * (len(case.data) - 1)
    for mask in (UNEVEN, ~UNEVEN, UNEVEN & False):
        whole = case(ROWS, *labels, where=mask)
        parts = over(
            lambda rows, mask, *labels: case(rows, *labels, where=mask, axis_name="data"),
            ROWS, mask, *labels,
        )  # fmt: skip
        np.testing.assert_allclose(parts, whole, 1e-6)
    np.testing.assert_allclose(
        over(lambda rows, *labels: case(rows, *labels, axis_name="data"), ROWS, *labels),
        case(ROWS, *labels),
        1e-6,
    )


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
@pytest.mark.parametrize("case", REDUCTIONS, ids=by_name)
def test_the_gradient_over_devices_is_that_of_the_whole(case):
    labels = [UNEVEN.astype(np.float32)] * (len(case.data) - 1)

    def train(mapped):
        def objective(x, mask, *labels):
            loss = SOFT(x, mask, where=~mask)
            return case(loss, *labels, where=~mask, axis_name="data" if mapped else None)

        if mapped:
            return jax.grad(lambda x: over_devices(objective, x, UNEVEN, *labels))
        return jax.grad(lambda x: objective(x, UNEVEN, *labels))

    np.testing.assert_allclose(train(True)(ROWS), train(False)(ROWS), 1e-6)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")
def test_arrays_sharded_under_plain_jit():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, mask = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (ROWS, UNEVEN))
    got = jax.jit(lambda x, m: focaljax.reduce_mean(SOFT(x, m, where=~m), where=~m))(rows, mask)
    true = focaljax.reduce_mean(SOFT(ROWS, UNEVEN, where=~UNEVEN), where=~UNEVEN)
    np.testing.assert_allclose(got, true, 1e-6)


# --- sharded classes ------------------------------------------------------------------------------

eight_devices = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs eight devices")
OLD_JAX = jax.__version_info__ < (0, 8)
COLLECTIVE = re.compile(
    r" = (.+?) (all-gather|all-reduce|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast|reduce-scatter)(?:-start)?\("
)
MANY_LOGITS = np.random.default_rng(0).normal(0, 3, (16, 32)).astype(np.float32)
MANY_LOGITS[3] = 0  # a tie of all classes, over all devices
MANY_IDS = np.arange(0, 48, 3, dtype=np.int32) % 32
MANY_DISTRIBUTIONS = 0.875 * np.eye(32, dtype=np.float32)[MANY_IDS] + np.float32(1 / 256)


def collectives(compiled):
    """Of a compiled program, each with the number of elements that it gives one device."""
    return [
        (name, sum(math.prod(int(n) for n in dims.split(",") if n) for dims in shapes))
        for result, name in COLLECTIVE.findall(compiled.as_text())
        for shapes in [re.findall(r"\[([\d,]*)\]", result)]
    ]


def trained(loss, mesh, *data):
    """A step on `data`, each an array and how it is sharded: compiled, checked against a whole."""
    if OLD_JAX and AxisType.Explicit in mesh.axis_types:
        pytest.skip("jax 0.7 wants the mesh in its context for the tangents of class ids")
    step = jax.jit(jax.value_and_grad(loss))
    placed = [jax.device_put(a, NamedSharding(mesh, P(*spec))) for a, spec in data]
    compiled = step.lower(*placed).compile()
    value, slope = compiled(*placed)
    for got, true in zip((value, slope), step(*(a for a, _ in data)), strict=True):
        np.testing.assert_allclose(got, true, 2e-6, 1e-8)
    assert slope.sharding.is_equivalent_to(placed[0].sharding, 2)
    return compiled


@eight_devices
@pytest.mark.parametrize(
    ("case", "shape", "weighed", "mode"),
    [
        (SOFTMAX_FOCAL, (2, 4), True, AxisType.Explicit),
        (SOFTMAX_FOCAL, (1, 8), False, AxisType.Auto),
        (SU, (2, 4), True, AxisType.Auto),
        (OF_DISTRIBUTIONS[0], (2, 4), True, AxisType.Explicit),
        (OF_DISTRIBUTIONS[3], (1, 8), False, AxisType.Auto),
    ],
    ids=lambda v: by_name(v) if hasattr(v, "note") else getattr(v, "name", str(v)),
)
def test_sharded_classes(case, shape, weighed, mode):
    mesh = jax.make_mesh(shape, ("data", "classes"), axis_types=(mode, mode))
    y, spec = (MANY_IDS, ("data",)) if not case.note else (MANY_DISTRIBUTIONS, ("data", "classes"))
    kept = np.arange(16) % 5 > 0
    options = {"alpha": np.linspace(0.5, 2, 32, dtype=np.float32), "where": kept} if weighed else {}
    compiled = trained(
        lambda x, y: focaljax.reduce_mean(case(x, y, **options), where=options.get("where")),
        mesh,
        (MANY_LOGITS, ("data", "classes")),
        (y, spec),
    )
    found = collectives(compiled)
    assert {name for name, _ in found} == {"all-reduce"}
    of_mean = [size for _, size in found if size == 1]
    assert len(of_mean) == (shape[0] > 1)
    of_classes = [size for _, size in found if size > 1]
    examples = 16 // shape[0]
    assert max(of_classes) <= 8 * examples
    if not case.note and not OLD_JAX:  # whose compiler leaves apart what could go together
        assert len(of_classes) == 2, found


@eight_devices
@pytest.mark.parametrize("case", [SOFTMAX_FOCAL, OF_DISTRIBUTIONS[0]], ids=by_name)
def test_sharded_examples_need_only_the_sum_of_the_mean(case):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    y = MANY_IDS if not case.note else MANY_DISTRIBUTIONS
    compiled = trained(
        lambda x, y: focaljax.reduce_mean(case(x, y)),
        mesh,
        (MANY_LOGITS, ("data",)),
        (y, ("data",)),
    )
    assert collectives(compiled) == [("all-reduce", 1)]


@eight_devices
def test_classes_under_shard_map_over_examples():
    kept = np.arange(16) % 5 > 0

    def mean(x, y, kept, axis_name=None):
        return focaljax.reduce_mean(
            SOFTMAX_FOCAL(x, y, where=kept), where=kept, axis_name=axis_name
        )

    def mapped(x):
        return over_devices(partial(mean, axis_name="data"), x, MANY_IDS, kept)

    found, true = (
        jax.value_and_grad(f)(MANY_LOGITS) for f in (mapped, lambda x: mean(x, MANY_IDS, kept))
    )
    for got, expected in zip(found, true, strict=True):
        np.testing.assert_allclose(got, expected, 2e-6, 1e-8)
