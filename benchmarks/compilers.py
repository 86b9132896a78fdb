"""What the TPU's and the GPU's compiler make of a function, with neither device at hand.

Both run on any Linux machine. Counts are exact and repeatable; they are no time. The seconds
predicted for an H100 are the sum over its kernels of cbrt(memory^3 + issue^3) + 2 us, where memory
is the bytes that a kernel moves at the rate of a triad, and issue the instructions that it executes
at one a lane and clock: fitted to 22 elementwise programs on an H100, within 8 % of each.

To be imported before jax.
"""

import functools
import importlib.util
import itertools
import math
import os
import pathlib
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

DUMP = pathlib.Path(tempfile.mkdtemp())
CUDA = pathlib.Path(*importlib.util.find_spec("nvidia").submodule_search_locations) / "cu13"
FLAGS = f"--xla_gpu_cuda_data_dir={CUDA}"
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    # the TPU's compiler, told which machine it is not on
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    # for the PTX, which the newer jax writes for those emitters only that match
    "XLA_FLAGS": f"{FLAGS} --xla_dump_to={DUMP} --xla_dump_emitter_re=.*",
}

import jax
import jaxlib
import optax
from jax.experimental.topologies import get_topology_desc
from jax.sharding import SingleDeviceSharding

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
BYTES_PER_SECOND = 2.77e12  # of a triad, measured
INSTRUCTIONS_PER_SECOND = 132 * 128 * 1.755e9  # multiprocessors, lanes, clock
LAUNCH = 2e-6  # seconds a kernel

BYTES = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2}
BYTES |= {"pred": 1, "s8": 1, "u8": 1}


class Count(NamedTuple):
    moved: float  # bytes
    passes: int  # kernels that move more than 9/10 of the first argument; of the GPU alone
    work: float  # transcendentals on the TPU, instructions on the GPU
    seconds: float  # predicted; of the GPU alone
    scratch: int  # bytes


@functools.cache
def device(name: str) -> SingleDeviceSharding:
    if name == "TPU v5e":
        devices = get_topology_desc("v5e:2x2", platform="tpu").devices
    else:
        h100 = {"platform": "cuda", "topology": "1x1x1", "target_config": H100}
        devices = get_topology_desc("h100", **h100).devices
    return SingleDeviceSharding(devices[0])


_numbers = itertools.count()


def count(where: str, function: Callable, *arguments: jax.ShapeDtypeStruct) -> Count:
    """Of a function as it would be jitted, on "TPU v5e" or "H100"."""
    name = f"program_{next(_numbers)}"  # by which its PTX is found

    def program(*arguments: jax.Array) -> object:
        return function(*arguments)

    program.__name__ = name
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device(where)) for a in arguments]
    lowered = jax.jit(program).trace(*placed)
    compiled = lowered.lower(lowering_platforms=("tpu" if "TPU" in where else "cuda",)).compile()
    scratch = compiled.memory_analysis().temp_size_in_bytes
    if "TPU" in where:
        analysis = compiled.cost_analysis()
        return Count(
            analysis["bytes accessed"], 0, analysis.get("transcendentals", 0.0), 0.0, scratch
        )
    loops = {}
    for ptx in DUMP.glob(f"*jit_{name}.*.ptx"):
        loops |= main_loops(ptx)
    kernels = [
        (read + written, loops[name].instructions_for(read, written) if name in loops else 0)
        for name, (read, written) in traffic(compiled.as_text()).items()
    ]
    times = [
        math.cbrt((moved / BYTES_PER_SECOND) ** 3 + (n / INSTRUCTIONS_PER_SECOND) ** 3) + LAUNCH
        for moved, n in kernels
    ]
    first = arguments[0].size * arguments[0].dtype.itemsize
    return Count(
        moved=sum(moved for moved, _ in kernels),
        passes=sum(moved > 0.9 * first for moved, _ in kernels),
        work=sum(n for _, n in kernels),
        seconds=sum(times),
        scratch=scratch,
    )


# --- the optimised program ------------------------------------------------------------------------

_ARRAY = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:,|$)")
_KERNELS = {"fusion", "copy", "custom-call", "reduce", "convert"}


def size(shapes: str) -> int:
    """Bytes of all the arrays in a piece of HLO."""
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _ARRAY.findall(shapes)
    )


def traffic(hlo: str) -> dict[str, tuple[int, int]]:
    """The bytes that each kernel reads and writes: its operands and its results, each once."""
    sizes: dict[str, int] = {}
    kernels = {}
    entry = hlo[hlo.index("\nENTRY") :].partition("\n}")[0]
    for match in map(_INSTRUCTION.match, entry.splitlines()):
        if not match:
            continue
        name, shape, operation, operands = match.groups()
        sizes[name] = size(shape)
        # a scatter is done in place: it touches what it changes
        if operation in _KERNELS and "scatter" not in name:
            read = sum(sizes.get(operand, 0) for operand in re.findall(r"%?([\w.\-]+)", operands))
            kernels[re.sub(r"\W", "_", name)] = read, sizes[name]
    return kernels


# --- the machine code -----------------------------------------------------------------------------

_LABEL = re.compile(r"(\.L_\S+):")
_CODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_KERNEL = re.compile(r"\.text\.(\S+):\n(.*?)(?=\n\.section|\n//-+ \.|\Z)", re.S)
_WIDTH = re.compile(r"\.[US]?(128|64|16|8)\b")


class Loop(NamedTuple):
    """Straight code that a thread goes through for some of the elements."""

    instructions: int
    loaded: int  # bytes each time
    stored: int

    def instructions_for(self, read: int, written: int) -> float:
        """How many it takes to move so many bytes."""
        # the larger: a load or a store may stand in the code twice, for the last elements
        of_stores = written / self.stored if self.stored else 0
        of_loads = read / self.loaded if self.loaded else 0
        return self.instructions * max(of_stores, of_loads)


def main_loops(ptx: pathlib.Path) -> dict[str, Loop]:
    """Of each kernel the loop that moves the most bytes; all of the kernel, if it has none."""
    text = ptx.read_text()
    if ".entry" not in text:
        return {}
    cubin = ptx.with_suffix(".cubin")
    target = re.search(r"\.target (\w+)", text)[1]
    subprocess.run([CUDA / "bin/ptxas", f"-arch={target}", ptx, "-o", cubin], check=True)
    listing = subprocess.run(
        [CUDA / "bin/nvdisasm", "-c", cubin], check=True, capture_output=True, text=True
    ).stdout
    return {re.sub(r"\W", "_", name): main_loop(body) for name, body in _KERNEL.findall(listing)}


def main_loop(body: str) -> Loop:
    labels, code = {}, []
    for line in body.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif instruction := _CODE.match(line):
            code.append(instruction.groups())
    last_store = max((i for i, (op, _) in enumerate(code) if op.startswith("STG")), default=None)
    if last_store is not None:
        code = code[: last_store + 1]  # then come subroutines of rare cases
    loops = []
    for i, (op, operands) in enumerate(code):
        target = re.search(r"\((\.L_\S+?)\)", operands)
        if op.startswith("BRA") and target and labels.get(target[1], i) < i - 4:
            loops.append(code[labels[target[1]] : i + 1])

    def tally(code: list[tuple[str, str]]) -> Loop:
        moved = dict.fromkeys(("LDG", "STG"), 0)
        for op, _ in code:
            if op[:3] in moved:
                width = _WIDTH.search(op)
                moved[op[:3]] += int(width[1]) // 8 if width else 4
        instructions = sum(not op.startswith("NOP") for op, _ in code)
        return Loop(instructions, moved["LDG"], moved["STG"])

    return max(map(tally, loops or [code]), key=lambda t: (t.loaded + t.stored, -t.instructions))


def versions() -> str:
    return (
        f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, optax {optax.__version__}, "
        f"focaljax {focaljax.__version__}, Python {platform.python_version()}, "
        f"{time.strftime('%Y-%m-%d')}"
    )
