"""What the TPU and the GPU compiler make of a loss: traffic, transcendentals, scratch.

Neither device is needed: both compilers run here and are asked what they made of
``jit(value_and_grad(loss reduced to a number))``. The counts are exact and repeatable. They are
traffic and operations, not time; `speed.py` measures time.

    python benchmarks/cost.py            # the tables, then each promise with its figure
    python benchmarks/cost.py --save     # the same, kept in benchmarks/results/cost.md

"Ideal" is every input read once and every gradient written once, and what a normaliser counts (the
mask, the labels) read once before, since no gradient can be written until the count is known. Exit
status 1 says that a promise of the README is broken.

What is counted: on the H100 what the kernels of the compiled program read and write, by the sizes
of their operands and results (of a gather or scatter, what it picks); on the TPU what the
compiler's own cost analysis says, and in brackets, where it differs, what the kernels read and
write in memory. It differs where the compiler copies into the chip an array that fits there (a v5e
has 128 MB): the analysis counts that copy and each read of it, the second figure that memory was
read once. And it counts more than is picked by a gather. The second figure includes the padding of
the TPU's tiles: 21 classes take the room of 24, so that 1.14x is the least that a loss can do.
"""

import argparse
import datetime
import importlib.util
import itertools
import math
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

DEVICES = {
    "TPU v5e": get_topology_desc("v5e:2x2", platform="tpu").devices[0],
    "H100": get_topology_desc(
        "h100", platform="cuda", topology="1x1x1", target_config=H100
    ).devices[0],
}
PLATFORM = {"TPU v5e": "tpu", "H100": "cuda"}
WORK = {"TPU v5e": "transcendentals per element", "H100": "passes over the logits"}

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def naive_sigmoid_focal(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What most snippets do, with the right p_t."""
    p = jax.nn.sigmoid(logits)
    cross_entropy = -(labels * jnp.log(p + 1e-8) + (1 - labels) * jnp.log(1 - p + 1e-8))
    p_t = jnp.where(labels == 1, p, 1 - p)
    return (1 - p_t) ** 2 * cross_entropy


def naive_softmax_focal(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The same for exclusive classes, by a one-hot product: a gather costs more."""
    if labels.ndim < logits.ndim:
        labels = jax.nn.one_hot(labels, logits.shape[-1])
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(labels * (1 - jnp.exp(log_p)) ** 2 * log_p, axis=-1)


def optax_softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    if labels.ndim < logits.ndim:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


LOSSES: dict[str, dict[str, Loss]] = {
    "sigmoid": {
        "focaljax focal": focaljax.sigmoid_focal_loss,
        "focaljax soft": focaljax.sigmoid_soft_truncation_loss,
        "focaljax hard": focaljax.sigmoid_hard_threshold_loss,
        "optax focal": optax.sigmoid_focal_loss,
        "optax BCE": optax.sigmoid_binary_cross_entropy,
        "naive focal": naive_sigmoid_focal,
    },
    "softmax": {
        "focaljax focal": focaljax.softmax_focal_loss,
        "focaljax soft": focaljax.softmax_soft_truncation_loss,
        "focaljax hard": focaljax.softmax_hard_threshold_loss,
        "optax CE": optax_softmax_cross_entropy,
        "naive focal": naive_softmax_focal,
    },
}


class Case(NamedTuple):
    """What a loss is given, and what is made of it."""

    head: str  # "sigmoid" or "softmax"
    shape: tuple[int, int]  # examples, classes
    dtype: str
    labels: str  # a dtype; "ids" of classes; or "one-hot", made of ids inside the step
    reduction: str = "mean"  # "mean", "masked mean", or "positives"

    def __str__(self) -> str:
        examples, classes = self.shape
        return f"{examples} x {classes} {self.dtype}, {self.labels}, {self.reduction}"


# The anchors of RetinaNet on two 800 x 1333 images, times the 80 classes of COCO
ANCHORS = (392832, 80)
# The pixels of four 512 x 512 images and the classes of Pascal VOC; images; tokens. The last two
# are more than the TPU can hold on the chip, in bfloat16 too.
PIXELS, IMAGES, TOKENS = SOFTMAX_SHAPES = ((2**20, 21), (131072, 1000), (4096, 32768))

DTYPES = ("float32", "bfloat16")
CASES = [
    *(Case("sigmoid", ANCHORS, d, y) for d in DTYPES for y in ("float32", "int8", "one-hot")),
    Case("sigmoid", ANCHORS, "float32", "float32", "masked mean"),
    Case("sigmoid", ANCHORS, "bfloat16", "int8", "masked mean"),
    *(Case("sigmoid", ANCHORS, d, "one-hot", "positives") for d in DTYPES),
    *(
        Case("softmax", shape, d, y)
        for shape in SOFTMAX_SHAPES
        for d, y in (
            ("float32", "ids"),
            ("float32", "one-hot"),
            ("float32", "float32"),
            ("bfloat16", "ids"),
            ("bfloat16", "float32"),
        )
    ),
]


def is_counted(name: str, case: Case) -> bool:
    """The softmax losses differ by their weight only, and compiling for the TPU takes its time."""
    of_weight = name in ("focaljax soft", "focaljax hard")
    return (
        case.head == "sigmoid" or not of_weight or (case.shape, case.dtype) == (IMAGES, "float32")
    )


class Bound(NamedTuple):
    """The most traffic over ideal that is promised of a softmax loss."""

    device: str
    labels: str
    shape: tuple[int, int]
    dtype: str
    traffic: float


# Of class ids: a visit of the logits for the loss, and another for the gradient, which is 1.5x. Of
# distributions, where every class has a loss, one more: what it needs to know of the others, 2x.
# Of 21 classes, what is kept of an example counts beside its logits, the more in bfloat16.
SOFTMAX_TRAFFIC = [
    *(
        Bound(device, labels, shape, dtype, 1.55 if labels == "ids" else 2.05)
        for device in ("TPU v5e", "H100")
        for labels in ("ids", "one-hot", "float32")
        for shape in (IMAGES, TOKENS)
        for dtype in ("float32", "bfloat16")
        if (labels, dtype) != ("one-hot", "bfloat16")
    ),
    Bound("TPU v5e", "ids", PIXELS, "float32", 4.6),
    Bound("TPU v5e", "ids", PIXELS, "bfloat16", 4.9),
    Bound("TPU v5e", "one-hot", PIXELS, "float32", 6.0),
    Bound("TPU v5e", "float32", PIXELS, "float32", 5.0),
    Bound("TPU v5e", "float32", PIXELS, "bfloat16", 5.0),
    Bound("H100", "ids", PIXELS, "float32", 2.1),
    Bound("H100", "ids", PIXELS, "bfloat16", 2.35),
    Bound("H100", "one-hot", PIXELS, "float32", 3.2),
    Bound("H100", "float32", PIXELS, "float32", 2.8),
    Bound("H100", "float32", PIXELS, "bfloat16", 3.2),
]


class Count(NamedTuple):
    traffic: float  # bytes over the ideal, as the compiler counts them where it does
    memory: float  # the same without what is read and written on the chip
    passes: int | None  # kernels that visit the logits, where the compiler's text tells
    transcendentals: float | None  # per element, where the compiler counts them
    scratch: float  # bytes
    arrays: float  # the same in arrays of the logits' size

    def __str__(self) -> str:
        traffic = f"{self.traffic:.2f}x"
        if abs(self.memory - self.traffic) > 0.02 * self.traffic:
            traffic += f" ({self.memory:.2f}x)"
        work = f"{self.transcendentals:.0f}" if self.passes is None else f"{self.passes}"
        scratch = f" {self.scratch / 1e6:.0f} MB" if self.scratch > 1e6 else ""
        return f"{traffic} {work}{scratch}"


def step(loss: Loss, case: Case) -> tuple[Callable[..., object], list[jax.ShapeDtypeStruct], int]:
    """The function to compile, its arguments, and its ideal traffic in bytes."""
    arguments = [
        jax.ShapeDtypeStruct(case.shape, case.dtype),
        jax.ShapeDtypeStruct(case.shape[:1], "int32")
        if case.labels in ("ids", "one-hot")
        else jax.ShapeDtypeStruct(case.shape, case.labels),
    ]
    if case.reduction == "masked mean":
        arguments.append(jax.ShapeDtypeStruct(case.shape, "bool"))
    ours = loss.__module__.startswith("focaljax")

    def reduced(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        if case.labels == "one-hot":
            labels = jax.nn.one_hot(labels, case.shape[1])
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


def count(device: str, loss: Loss, case: Case) -> Count:
    function, arguments, ideal = step(loss, case)
    where = SingleDeviceSharding(DEVICES[device])
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for a in arguments]
    traced = jax.jit(function).trace(*placed)
    compiled = traced.lower(lowering_platforms=(PLATFORM[device],)).compile()
    kernels = kernel_bytes(compiled.as_text())
    logits = arguments[0].size * arguments[0].dtype.itemsize
    scratch = compiled.memory_analysis().temp_size_in_bytes
    analysis = compiled.cost_analysis()  # of the TPU's compiler alone
    return Count(
        traffic=(analysis["bytes accessed"] if analysis else sum(kernels)) / ideal,
        memory=sum(kernels) / ideal,
        passes=None if analysis else sum(b > 0.9 * logits for b in kernels),
        transcendentals=analysis and analysis.get("transcendentals", 0.0) / math.prod(case.shape),
        scratch=scratch,
        arrays=scratch / logits,
    )


# --- the text of a compiled program ---------------------------------------------------------------

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_LAYOUT = re.compile(r"\{.*?\}")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_NO_KERNEL = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


class Instruction(NamedTuple):
    shape: str
    operation: str
    operands: list[str]
    rest: str


Computation = dict[str, Instruction]


def kernel_bytes(text: str) -> list[int]:
    """Bytes read plus written in memory by each kernel of optimised HLO."""
    computations: dict[str, Computation] = {}
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            computation = computations[begin[1]] = {}
            if line.startswith("ENTRY"):
                entry = computation
        elif match := _INSTRUCTION.match(line):
            name, shape, operation, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            computation[name] = Instruction(shape, operation, operands, rest)
    kernels = []
    for kernel in entry.values():
        if kernel.operation.endswith("-done"):  # of a copy between the memory and the chip
            kernels.append(_size(kernel.shape.replace("S(1)", "")))
        elif kernel.operation not in _NO_KERNEL and not kernel.operation.endswith("-start"):
            read = sum(_read(kernel, i, entry, computations) for i in range(len(kernel.operands)))
            kernels.append(read + _size(kernel.shape))
    return kernels


def _read(
    kernel: Instruction, index: int, entry: Computation, computations: dict[str, Computation]
) -> int:
    """Bytes that a kernel reads of an operand; below 0 for what it need not write either."""
    name, body, users = kernel.operands[index], entry, [kernel]
    size = _size(entry[name].shape)
    if called := re.search(r"calls=%([\w.\-]+)", kernel.rest):
        body = computations[called[1]]
        name = next(
            name
            for name, inside in body.items()
            if inside.operation == "parameter" and inside.rest.startswith(f"{index})")
        )
        users = [inside for inside in body.values() if name in inside.operands]
    uses = {(user.operation, user.operands[0] == name) for user in users}
    if size and uses == {("gather", True)}:
        return sum(_size(_LAYOUT.sub("", user.shape)) for user in users)
    if size and uses == {("scatter", True)}:  # in place
        return 2 * _size(_LAYOUT.sub("", body[users[0].operands[2]].shape)) - size
    return size


def _size(shape: str) -> int:
    """Bytes of the arrays of a shape that are in memory, padded to the tiles of their layout."""
    size = 0
    for dtype, dims, order, layout in _ARRAY.findall(shape):
        if "S(" in layout:
            continue  # on the chip
        major_to_minor = [int(d) for d in dims.split(",") if d]
        sizes = [major_to_minor[int(i)] for i in order.split(",") if i] or major_to_minor
        if tile := re.match(r"T\(([\d,]+)\)", layout):
            tiles = [int(t) for t in reversed(tile[1].split(","))]
            sizes = [
                *(math.ceil(d / t) * t for d, t in zip(sizes, tiles, strict=False)),
                *sizes[len(tiles) :],
            ]
        size += BYTES[dtype] * math.prod(sizes)
    return size


Counts = dict[tuple[str, str, Case], Count]


def promises(counts: Counts) -> list[tuple[str, str, bool]]:
    """Each promise, the worst figure that it speaks of, and whether it holds."""

    def line(
        text: str,
        bound: float,
        form: str,
        figure: Callable[[Count], float],
        device: str,
        **of_case: object,
    ) -> tuple[str, str, bool]:
        worst = max(
            figure(count)
            for (d, name, case), count in counts.items()
            if d == device and name.startswith("focaljax")
            if of_case.items() <= case._asdict().items()
        )
        return f"{device} {of_case['head']} {text}", form.format(worst), worst <= bound

    return [
        *(
            line("traffic <= 1.01x ideal", 1.01, "{:.3f}x", lambda c: c.traffic, d, head="sigmoid")
            for d in DEVICES
        ),
        *(
            line(
                f"transcendentals <= {bound} per element, {dtype}",
                bound,
                "{:.2f}",
                lambda c: c.transcendentals,
                "TPU v5e",
                head="sigmoid",
                dtype=dtype,
            )
            for dtype, bound in (("float32", 2), ("bfloat16", 4))
        ),
        line("passes over the logits = 1", 1, "{:.0f}", lambda c: c.passes, "H100", head="sigmoid"),
        *(
            line("scratch < 1 MB", 1, "{:.2f} MB", lambda c: c.scratch / 1e6, d, head="sigmoid")
            for d in DEVICES
        ),
        *(
            line(
                f"traffic <= {b.traffic}x ideal, {b.shape[1]} classes, {b.dtype} from {b.labels}",
                b.traffic,
                "{:.3f}x",
                lambda c: c.traffic,
                b.device,
                head="softmax",
                labels=b.labels,
                shape=b.shape,
                dtype=b.dtype,
            )
            for b in SOFTMAX_TRAFFIC
        ),
        *(
            line(
                f"scratch <= {bound} of the logits, {shape[1]} classes",
                bound,
                "{:.2f}",
                lambda c: c.arrays,
                device,
                head="softmax",
                shape=shape,
            )
            for device in DEVICES
            # never an array of their size: what is kept of an example, over few classes
            for shape, bound in ((PIXELS, 1.5), (IMAGES, 0.05), (TOKENS, 0.05))
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", action="store_true", help="keep it in benchmarks/results/cost.md")
    save = parser.parse_args().save

    console = Console(width=140)
    todo = [
        (device, name, case)
        for device in DEVICES
        for case in CASES
        for name in LOSSES[case.head]
        if is_counted(name, case)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counted = pool.map(lambda t: count(t[0], LOSSES[t[2].head][t[1]], t[2]), todo)
        progress = track(counted, "Compiling", total=len(todo), console=Console(stderr=True))
        counts: Counts = dict(zip(todo, progress, strict=True))
    tables = [f"{versions()}; value_and_grad of the reduced loss"]
    console.print(tables[0])
    for device, head in itertools.product(DEVICES, LOSSES):
        names = list(LOSSES[head])
        rows = [
            [str(case), *(str(counts.get((device, name, case), "")) for name in names)]
            for case in CASES
            if case.head == head
        ]
        title = (
            f"{device}, {head}: traffic over ideal (in memory only), {WORK[device]}, "
            "scratch over 1 MB"
        )
        tables.append(show(console, title, ["logits, labels, reduction", *names], rows))
    checked = promises(counts)
    for text, figure, holds in checked:
        console.print(f"{'holds ' if holds else 'BROKEN'}  {text}: {figure}")
    if save:
        results = pathlib.Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "cost.md").write_text("\n\n".join(["# Compiler counts", *tables]) + "\n")
    return 0 if all(holds for *_, holds in checked) else 1


def versions() -> str:
    return (
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, optax {optax.__version__}, "
        f"focaljax {focaljax.__version__}, Python {platform.python_version()}, "
        f"{datetime.date.today()}"
    )


def show(console: Console, title: str, header: list[str], rows: list[list[str]]) -> str:
    """Prints a table, and returns it as Markdown."""
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [f"## {title}", "", *("| " + " | ".join(r) + " |" for r in [header, *rows])]
    lines.insert(3, "|" + "---|" * len(header))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
