"""The notebooks' training steps, compiled for TPUs and GPUs that are not at hand.

That a step compiles for a device says that every operation is there, that it fits into the memory,
and what the devices have to tell each other. Printed are the memory that one device needs and the
collectives; nothing is run, so nothing is timed.

    python benchmarks/training.py            # exit status 1 if a step breaks a promise below
    python benchmarks/training.py --save     # the same, kept in benchmarks/results/training.md

Promised: a step fits into its device, and devices exchange nothing but sums (all-reduce), of at
most twice the size of the parameters (heads that both levels of a pyramid share are summed for
each): never logits, activations or anything else of a batch.
"""

import argparse
import json
import math
import os
import pathlib
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import compilers  # first, as it tells both compilers where they are

os.environ["XLA_FLAGS"] = compilers.FLAGS  # writing out programs of one name at once crashes

import cost
import jax
import numpy as np
import optax
from flax import nnx
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import track

from focaljax.lab import canvases, detector, finder
from focaljax.lab.losses import of_anchors

COLAB = pathlib.Path(__file__).parents[1] / "colab"


class Machine(NamedTuple):
    platform: str
    devices: list[Any]
    gigabytes: float  # of memory that one device has


MACHINES = {
    "4 x TPU v5e": Machine("tpu", get_topology_desc("v5e:2x2", platform="tpu").devices, 16),
    "4 x TPU v6e": Machine("tpu", get_topology_desc("v6e:2x2", platform="tpu").devices, 32),
    "4 x TPU v5p": Machine("tpu", get_topology_desc("v5p:2x2x1", platform="tpu").devices, 95),
    "4 x H100": Machine(
        "cuda",
        get_topology_desc(
            "h100", platform="cuda", topology="1x1x4", target_config=compilers.H100
        ).devices,
        80,
    ),
}


class Program(NamedTuple):
    """A jitted training step, and what it is given."""

    step: Callable[..., Any]
    state: Any
    batch: Any


def definitions(notebook: pathlib.Path) -> dict[str, Any]:
    """What the cells of a notebook define that are tagged "definitions"."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "definitions" in cell["metadata"].get("tags", ())]
    found: dict[str, Any] = {"__name__": notebook.stem}
    exec("\n\n".join("".join(cell["source"]) for cell in tagged), found)
    return found


def training(mesh: Mesh, spread: str) -> Program:
    """The step of `tpu_gpu_training`, of the size that it has on a GPU or TPU."""
    notebook = definitions(COLAB / "tpu_gpu_training.ipynb")
    state, _, step = notebook["start"](notebook["Finder"](64, nnx.Rngs(0)), steps=2000)
    size, cells, canvases = 256, 256 // finder.STRIDE, 64 * mesh.size
    batch = finder.Batch(
        canvas=jax.ShapeDtypeStruct((canvases, size, size, 1), "float32"),
        ids=jax.ShapeDtypeStruct((canvases, cells, cells), "int32"),
        counted=jax.ShapeDtypeStruct((canvases, cells, cells), "bool"),
    )
    return Program(notebook[spread](step, mesh, donate_argnums=0), state, batch)


def detection(mesh: Mesh) -> Program:
    """The step of `dense_detection`, with its focal loss and 16 canvases a device."""
    images, size, most = 16 * mesh.size, canvases.SIZE, canvases.MOST
    batch = canvases.Canvases(
        images=jax.ShapeDtypeStruct((images, size, size), "uint8"),
        boxes=jax.ShapeDtypeStruct((images, most, 4), "float32"),
        ids=jax.ShapeDtypeStruct((images, most), "int32"),
    )
    graph, params = nnx.split(detector.Detector(0.01, nnx.Rngs(0)))
    loss, optimizer = of_anchors()["focal gamma=2 alpha=.25"], optax.adam(1e-3)

    def step(state: Any, batch: Any) -> Any:
        def total(params: Any) -> jax.Array:
            return detector.objective(nnx.merge(graph, params), batch, loss.of)

        value, gradient = jax.value_and_grad(total)(state[0])
        updates, moments = optimizer.update(gradient, state[1])
        return (optax.apply_updates(state[0], updates), moments), value

    held = NamedSharding(mesh, P())
    jitted = jax.jit(step, donate_argnums=0, out_shardings=held)
    return Program(jitted, (params, optimizer.init(params)), batch)


PROGRAMS = {
    "tpu_gpu_training, jit": partial(training, spread="by_jit"),
    "tpu_gpu_training, shard_map": partial(training, spread="by_shard_map"),
    "dense_detection, jit": detection,
}


class Count(NamedTuple):
    parameters: int  # bytes of the parameters, and
    arguments: int  # of them, the optimizer's state and one device's part of the batch
    scratch: int
    collectives: dict[str, list[int]]  # bytes of what each exchanges


_COLLECTIVE = re.compile(
    r" = (\(.*?\)|\S+) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-[a-z]+"
    r"|ragged-all-to-all)(?:-start)?\("
)


def count(machine: str, program: str) -> Count:
    platform, devices, _ = MACHINES[machine]
    mesh = Mesh(np.array(devices), ("data",))
    step, state, batch = PROGRAMS[program](mesh)

    def placed(tree: Any, spec: P) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    traced = step.trace(placed(state, P()), placed(batch, P("data")))
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    collectives: dict[str, list[int]] = {}
    for shape, operation in _COLLECTIVE.findall(compiled.as_text()):
        arrays = re.findall(r"([a-z]+\d+)\[([\d,]*)\]", shape)
        size = sum(
            compilers.BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
            for dtype, dims in arrays
        )
        collectives.setdefault(operation, []).append(size)
    memory = compiled.memory_analysis()
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // 3  # Adam keeps two more
    return Count(parameters, memory.argument_size_in_bytes, memory.temp_size_in_bytes, collectives)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--save", action="store_true", help="keep it in benchmarks/results/training.md"
    )
    save = parser.parse_args().save
    console = Console(width=140)
    todo = [(machine, program) for program in PROGRAMS for machine in MACHINES]
    threading.stack_size(2**28)  # the TPU's compiler recurses deeper than 8 MB reach
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = pool.map(lambda t: count(*t), todo)
        progress = track(counted, "Compiling", total=len(todo), console=Console(stderr=True))
        counts = dict(zip(todo, progress, strict=True))
    rows, broken = [], []
    for (machine, program), (parameters, arguments, scratch, collectives) in counts.items():
        name = f"{program}, {machine}"
        needed = (arguments + scratch) / 1e9
        if needed > MACHINES[machine].gigabytes:
            broken.append(f"{name}: needs {needed:.1f} GB")
        if others := collectives.keys() - {"all-reduce"}:
            broken.append(f"{name}: {', '.join(others)}")
        if (summed := sum(collectives.get("all-reduce", []))) > 2 * parameters:
            broken.append(f"{name}: sums {summed:,} bytes, of {parameters:,} of parameters")
        sums = ", ".join(f"{size / 1e3:,.3f}" for size in collectives.get("all-reduce", []))
        sizes = (parameters, arguments, scratch)
        rows.append([program, machine, *(f"{size / 1e6:,.1f}" for size in sizes), sums])
    versions = compilers.versions()
    console.print(versions)
    header = [
        "training step",
        "on",
        "parameters, MB",
        "arguments, MB per device",
        "scratch, MB per device",
        "all-reduces, kB",
    ]
    table = cost.show(console, "Training steps, compiled ahead of time", header, rows)
    for line in broken or ["holds   every step fits, and exchanges sums alone"]:
        console.print(line)
    if save:
        results = pathlib.Path(__file__).parent / "results" / "training.md"
        results.write_text("\n\n".join(["# Training steps", versions, table]) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
