"""What the TPU and the GPU compiler make of a loss: traffic, transcendentals, scratch.

Neither device is needed: both compilers run here and are asked what they made of
``jit(value_and_grad(loss reduced to a number))``. The counts are exact and repeatable. They are
traffic and operations, not time; `speed.py` measures time.

    python benchmarks/cost.py            # the tables, then each promise with its figure
    python benchmarks/cost.py --save     # the same, kept in benchmarks/results/cost.md

"Ideal" is every input read once and every gradient written once, and what a normaliser counts (the
mask, the labels) read once before, since no gradient can be written until the count is known. Exit
status 1 says that a promise of the README is broken.
"""

import argparse
import datetime
import importlib.util
import math
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    # the TPU compiler, told which machine it is not on
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
}
if nvidia := importlib.util.find_spec("nvidia"):
    # ptxas and libdevice, as the wheels nvidia-cuda-nvcc and nvidia-nvvm install them
    os.environ["XLA_FLAGS"] = (
        f"--xla_gpu_cuda_data_dir={next(iter(nvidia.submodule_search_locations))}/cu13"
    )

import jax
import jax.numpy as jnp
import jaxlib
import optax
from jax.experimental.topologies import get_topology_desc
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.progress import track
from rich.table import Table

import focaljax

# An H100 SXM, from its public data sheet
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  threads_per_core_limit: 2048  core_count: 132
  fpus_per_core: 128  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84978434048  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# The anchors of RetinaNet on two 800 x 1333 images, times the 80 classes of COCO
SHAPE = (392832, 80)
ELEMENTS = SHAPE[0] * SHAPE[1]

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def naive_focal(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What most snippets do, with the right p_t."""
    p = jax.nn.sigmoid(logits)
    cross_entropy = -(labels * jnp.log(p + 1e-8) + (1 - labels) * jnp.log(1 - p + 1e-8))
    p_t = jnp.where(labels == 1, p, 1 - p)
    return (1 - p_t) ** 2 * cross_entropy


LOSSES: dict[str, Loss] = {
    "focaljax focal": focaljax.sigmoid_focal_loss,
    "focaljax soft": focaljax.sigmoid_soft_truncation_loss,
    "focaljax hard": focaljax.sigmoid_hard_threshold_loss,
    "optax focal": optax.sigmoid_focal_loss,
    "optax BCE": optax.sigmoid_binary_cross_entropy,
    "naive focal": naive_focal,
}


class Case(NamedTuple):
    """What a loss is given, and what is made of it."""

    dtype: str
    labels: str  # a dtype, or "ids" of classes, made one-hot inside the step
    reduction: str  # "mean", "masked mean", or "positives"

    def __str__(self) -> str:
        return f"{self.dtype}, {self.labels}, {self.reduction}"


CASES = [
    *(Case(d, y, "mean") for d in ("float32", "bfloat16") for y in ("float32", "int8", "ids")),
    *(Case(d, y, "masked mean") for d, y in (("float32", "float32"), ("bfloat16", "int8"))),
    *(Case(d, "ids", "positives") for d in ("float32", "bfloat16")),
]


class Count(NamedTuple):
    ideal: float  # bytes accessed over the ideal
    passes: int | None  # kernels that visit the logits, where the compiler's text tells
    transcendentals: float | None  # per element, where the compiler counts them
    scratch: float  # bytes

    def __str__(self) -> str:
        work = f"{self.transcendentals:.0f}" if self.passes is None else f"{self.passes}"
        scratch = f" {self.scratch / 1e6:.0f} MB" if self.scratch > 1e6 else ""
        return f"{self.ideal:.2f}x {work}{scratch}"


def step(loss: Loss, case: Case) -> tuple[Callable[..., object], list[jax.ShapeDtypeStruct], int]:
    """The function to compile, its arguments, and its ideal traffic in bytes."""
    ids = case.labels == "ids"
    arguments = [
        jax.ShapeDtypeStruct(SHAPE, case.dtype),
        jax.ShapeDtypeStruct(SHAPE[:1], "int32")
        if ids
        else jax.ShapeDtypeStruct(SHAPE, case.labels),
    ]
    if case.reduction == "masked mean":
        arguments.append(jax.ShapeDtypeStruct(SHAPE, "bool"))
    ours = loss.__module__.startswith("focaljax")

    def reduced(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        if ids:
            labels = jax.nn.one_hot(labels, SHAPE[1])
        if case.reduction == "positives":
            if ours:
                return focaljax.normalize_by_positives(loss(logits, labels), labels)
            total = jnp.sum(loss(logits, labels), dtype=jnp.float32)
            return total / jnp.maximum(jnp.sum(labels), 1)
        if mask is None:
            if ours:
                return focaljax.reduce_mean(loss(logits, labels))
            return jnp.mean(loss(logits, labels), dtype=jnp.float32)
        if ours:
            return focaljax.reduce_mean(loss(logits, labels, where=mask), where=mask)
        total = jnp.sum(jnp.where(mask, loss(logits, labels), 0), dtype=jnp.float32)
        return total / jnp.sum(mask)

    logits, labels, *mask = sizes = [a.size * a.dtype.itemsize for a in arguments]
    counted = {"mean": 0, "masked mean": sum(mask), "positives": labels}[case.reduction]
    return jax.value_and_grad(reduced), arguments, sum(sizes) + counted + logits


def tpu(loss: Loss, case: Case) -> Count:
    function, arguments, ideal = step(loss, case)
    compiled = _compile(function, arguments, "tpu", get_topology_desc("v5e:2x2", platform="tpu"))
    cost = compiled.cost_analysis()
    return Count(
        cost["bytes accessed"] / ideal,
        None,
        cost.get("transcendentals", 0.0) / ELEMENTS,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def gpu(loss: Loss, case: Case) -> Count:
    function, arguments, ideal = step(loss, case)
    topology = get_topology_desc("h100", platform="cuda", topology="1x1x1", target_config=H100)
    compiled = _compile(function, arguments, "cuda", topology)
    kernels = _kernel_bytes(compiled.as_text())
    return Count(
        sum(kernels) / ideal,
        sum(b > 0.9 * ELEMENTS * arguments[0].dtype.itemsize for b in kernels),
        None,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def _compile(function, arguments, platform_name, topology):
    where = SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for a in arguments]
    lowered = jax.jit(function).trace(*placed).lower(lowering_platforms=(platform_name,))
    return lowered.compile()


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")


def _kernel_bytes(text: str) -> list[int]:
    """Bytes read plus written by each kernel, from the entry of optimised HLO."""
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    size: dict[str, int] = {}
    kernels = []
    for line in entry.splitlines():
        if not (match := _INSTRUCTION.match(line)):
            continue
        name, shape, operation, rest = match.groups()
        size[name] = sum(
            _BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape)
        )
        if operation in ("parameter", "get-tuple-element", "tuple", "bitcast", "constant"):
            continue
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        kernels.append(size[name] + sum(size[o] for o in operands))
    return kernels


COMPILERS = {"TPU v5e": tpu, "H100": gpu}
WORK = {"TPU v5e": "transcendentals per element", "H100": "passes over the logits"}
Counts = dict[tuple[str, str, Case], Count]


def promises(counts: Counts) -> list[tuple[str, str, bool]]:
    """Each promise, the worst figure that it speaks of, and whether it holds."""
    ours = {key: c for key, c in counts.items() if key[1].startswith("focaljax")}

    def worst(device: str, figure: Callable[[Count], float], dtype: str = "") -> float:
        return max(
            figure(count)
            for (d, _, case), count in ours.items()
            if d == device and case.dtype.startswith(dtype)
        )

    def line(text: str, value: float, bound: float, form: str) -> tuple[str, str, bool]:
        return text, form.format(value), value <= bound

    return [
        line("TPU traffic <= 1.01x ideal", worst("TPU v5e", lambda c: c.ideal), 1.01, "{:.3f}x"),
        line(
            "TPU transcendentals <= 2 per element, float32",
            worst("TPU v5e", lambda c: c.transcendentals, "float32"),
            2,
            "{:.2f}",
        ),
        line(
            "TPU transcendentals <= 4 per element, bfloat16",
            worst("TPU v5e", lambda c: c.transcendentals, "bfloat16"),
            4,
            "{:.2f}",
        ),
        line("TPU scratch < 1 MB", worst("TPU v5e", lambda c: c.scratch / 1e6), 1, "{:.2f} MB"),
        line("H100 traffic <= 1.01x ideal", worst("H100", lambda c: c.ideal), 1.01, "{:.3f}x"),
        line("H100 passes over the logits = 1", worst("H100", lambda c: c.passes), 1, "{:.0f}"),
        line("H100 scratch < 1 MB", worst("H100", lambda c: c.scratch / 1e6), 1, "{:.2f} MB"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results/cost.md")
    save = parser.parse_args().save

    console = Console(width=140)
    todo = [(d, name, case) for d in COMPILERS for name in LOSSES for case in CASES]
    counts: Counts = {
        (d, name, case): COMPILERS[d](LOSSES[name], case)
        for d, name, case in track(todo, "Compiling", console=Console(stderr=True))
    }
    tables = [
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, optax {optax.__version__}, "
        f"focaljax {focaljax.__version__}, Python {platform.python_version()}, "
        f"{datetime.date.today()}; logits {SHAPE}, value_and_grad of the reduced loss"
    ]
    console.print(tables[0])
    for device in COMPILERS:
        rows = [
            [str(case), *(str(counts[device, name, case]) for name in LOSSES)] for case in CASES
        ]
        title = f"{device}: traffic over ideal, {WORK[device]}, scratch where it is over 1 MB"
        tables.append(_show(console, title, rows))
    checked = promises(counts)
    for text, figure, holds in checked:
        console.print(f"{'holds ' if holds else 'BROKEN'}  {text}: {figure}")
    if save:
        results = pathlib.Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "cost.md").write_text("\n\n".join(["# Compiler counts", *tables]) + "\n")
    return 0 if all(holds for *_, holds in checked) else 1


def _show(console: Console, title: str, rows: list[list[str]]) -> str:
    """Prints a table, and returns it as Markdown."""
    header = ["logits, labels, reduction", *LOSSES]
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [f"## {title}", "", *("| " + " | ".join(r) + " |" for r in [header, *rows])]
    lines.insert(3, "|" + "---|" * len(header))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
