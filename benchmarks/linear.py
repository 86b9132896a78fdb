"""What a linear head of many classes costs with and without its logits.

    python benchmarks/linear.py            # exit status 1 if a promise below is broken
    python benchmarks/linear.py --save     # the same, kept in benchmarks/results/linear.md

Memory is what the TPU's and the GPU's compilers plan, with neither at hand. Promised for 8,192
tokens, 4,096 features, 128,256 classes in bfloat16, loss and gradient: beside one copy of the
kernel's gradient at most 5 % of the scratch of the usual step; over four devices that share the
classes a quarter, and nothing exchanged but 32 bytes a token and the gradient of the features. The
clock is this machine's, of 2,048 tokens, 256 features and 32,768 classes in float32.
"""

import argparse
import os
import pathlib
import re
import sys
import time
from functools import partial
from typing import Any

import compilers  # first, as it tells both compilers where they are

os.environ["XLA_FLAGS"] = compilers.FLAGS

import cost
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.topologies import get_topology_desc
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console

import focaljax

TOKENS, FEATURES, CLASSES = 8192, 4096, 128_256
SHAPES = ((TOKENS, FEATURES), (FEATURES, CLASSES), (TOKENS,))
KERNEL = 2 * FEATURES * CLASSES  # bytes


def usual(features: jax.Array, kernel: jax.Array, ids: jax.Array) -> jax.Array:
    logits = jnp.dot(features, kernel, preferred_element_type=features.dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids).mean()


def in_blocks(
    features: jax.Array,
    kernel: jax.Array,
    ids: jax.Array,
    gamma: float = 2.0,
    axis_name: str | None = None,
) -> jax.Array:
    loss = focaljax.linear_softmax_focal_loss(
        features, kernel, ids, gamma=gamma, axis_name=axis_name
    )
    return loss.mean()


def scratch(where: str, function: Any) -> int:
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(SHAPES, ("bfloat16", "bfloat16", "int32"), strict=True)
    ]
    program = jax.value_and_grad(function, argnums=(0, 1))
    placed = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=compilers.device(where)) for a in arrays
    ]
    lowered = jax.jit(program).trace(*placed)
    compiled = lowered.lower(lowering_platforms=("tpu" if "TPU" in where else "cuda",)).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def over_four(where: str) -> tuple[int, list[int]]:
    """Scratch of one of four devices that share the classes, and bytes of each exchange."""
    if "TPU" in where:
        devices = get_topology_desc("v5e:2x2", platform="tpu").devices
    else:
        devices = get_topology_desc(
            "h100", platform="cuda", topology="1x1x4", target_config=compilers.H100
        ).devices
    mesh = Mesh(np.array(devices), ("classes",), axis_types=(AxisType.Auto,))
    specs = (P(), P(None, "classes"), P())
    loss = jax.shard_map(
        partial(in_blocks, axis_name="classes"), mesh=mesh, in_specs=specs, out_specs=P()
    )
    arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(SHAPES, ("bfloat16", "bfloat16", "int32"), specs, strict=True)
    ]
    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(*arrays)
    compiled = lowered.lower(lowering_platforms=("tpu" if "TPU" in where else "cuda",)).compile()
    exchanged = []
    for shape in re.findall(
        r" = (\(.*?\)|\S+) (?:all|reduce|collective)-[a-z-]+\(", compiled.as_text()
    ):
        arrays = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shape)
        sizes = [
            compilers.BYTES[d] * int(np.prod([int(n) for n in dims.split(",") if n]))
            for d, dims in arrays
        ]
        exchanged.append(sum(sizes))
    return int(compiled.memory_analysis().temp_size_in_bytes), exchanged


def seconds(function: Any, classes: int) -> float:
    """The best of five, loss and gradient, on this machine."""
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = (
        jax.random.normal(keys[0], (2048, 256)),
        0.05 * jax.random.normal(keys[1], (256, classes)),
        jax.random.randint(keys[2], (2048,), 0, classes),
    )
    program = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    jax.block_until_ready(program(*arrays))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results")
    save = parser.parse_args().save
    console, broken = Console(width=120), []
    memory, exchanges = [], []
    for where in ("TPU v5e", "H100"):
        whole, blocks = scratch(where, usual), scratch(where, in_blocks)
        beside = max(0, blocks - KERNEL)
        memory.append(
            [where, *(f"{n / 1e6:,.0f}" for n in (whole, blocks, beside)), f"{beside / whole:.1%}"]
        )
        if beside > 0.05 * whole:
            broken.append(f"{where}: {beside / whole:.1%} of the usual scratch, promised 5 %")
        own, exchanged = over_four(where)
        small = [size for size in exchanged if size < TOKENS * FEATURES]
        exchanges.append(
            [where, f"{own / 1e6:,.0f}", ", ".join(f"{n / 1e3:,.1f}" for n in exchanged)]
        )
        if sum(small) > 32 * TOKENS:
            broken.append(f"{where}: {sum(small)} bytes exchanged, promised {32 * TOKENS}")
    clock = []
    for classes in (1024, 8192, 32_768, 131_072):
        times = [seconds(f, classes) for f in (usual, in_blocks)]
        clock.append(
            [f"{classes:,}", *(f"{1e3 * t:,.0f}" for t in times), f"{times[1] / times[0]:.2f}"]
        )
    versions = compilers.versions()
    console.print(versions)
    tables = [
        cost.show(
            console,
            f"Scratch, MB: {TOKENS:,} tokens, {FEATURES:,} features, {CLASSES:,} classes",
            ["on", "usual", "in blocks", "beside the kernel's gradient", "of the usual"],
            memory,
        ),
        cost.show(
            console,
            "Over four devices that share the classes",
            ["on", "scratch, MB per device", "exchanged, kB"],
            exchanges,
        ),
        cost.show(
            console,
            "Milliseconds on this machine's CPU: 2,048 tokens, 256 features, float32",
            ["classes", "usual CE", "focal, in blocks", "ratio"],
            clock,
        ),
    ]
    for line in broken or ["holds   memory and exchanges are as promised"]:
        console.print(line)
    if save:
        results = pathlib.Path(__file__).parent / "results" / "linear.md"
        results.write_text("\n\n".join(["# A linear head in blocks", versions, *tables]) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
