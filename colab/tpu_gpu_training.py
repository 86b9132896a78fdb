# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One training step on every device there is
#
# Data-parallel training with a focal loss on a CPU, a GPU, a TPU, or many of them: a bfloat16
# model, a loss that is reduced in float32, donated buffers, a checkpoint. The step is written
# once and spread over the devices in two ways, by `jax.jit` with shardings and by
# `jax.shard_map`, and the notebook checks that both give what a single device gives.
#
# **Where it goes wrong elsewhere.** A dense loss is divided by the number of positives. Where
# each device divides by its own and the results are averaged, an image with one object weighs as
# much as one with fifty, and a device without any divides by nothing. Here one sum is divided by
# one count, over all devices of all hosts.
#
# **Across hosts** start it as a script on each of them, with `--distributed`: on a TPU pod and
# under Slurm the processes find each other, elsewhere `--coordinator`, `--processes` and
# `--process` say which is which. The commands are in `colab/README.md`.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

NEEDED = ("focaljax", "flax", "optax", "orbax.checkpoint", "sklearn", "matplotlib", "rich")
try:
    for name in NEEDED:
        importlib.import_module(name)
except ImportError:
    here = Path(globals().get("__file__", "this notebook")).resolve().parent
    folders = (here.parent, here)
    checkout = next((path for path in folders if (path / "focaljax/__init__.py").exists()), None)
    package = f"{checkout or 'focaljax'}[colab]"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package])
    importlib.invalidate_caches()

# %%
import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

from focaljax import normalize_by_positives, prior_bias_init, sigmoid_focal_loss

# %% [markdown]
# ## Options
#
# In a notebook put them into `ARGUMENTS`, for example `["--steps", "1000"]`. What is not given is
# chosen by the device.
#
# The cells that run something begin with `if __name__ == "__main__":`, which holds in a notebook.
# The other cells can thus be imported: the tests run this very step in two processes, and `make
# cost` compiles it for TPUs and GPUs that are not there.

# %%
IN_NOTEBOOK = "get_ipython" in globals()
ARGUMENTS = [] if IN_NOTEBOOK else sys.argv[1:]
if IN_NOTEBOOK and os.environ.get("FOCALJAX_SHORT"):  # set where notebooks are only tried out
    ARGUMENTS = ["--steps", "30"]


def parse_options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on all devices of all hosts.")
    parser.add_argument("--steps", type=int, help="training steps [300; 2000 on a GPU or TPU]")
    parser.add_argument("--batch", type=int, help="canvases per device [8; 64]")
    parser.add_argument("--size", type=int, help="their width, a multiple of 4 [64; 256]")
    parser.add_argument("--pool", type=int, help="batches to draw and go through again [64; 16]")
    parser.add_argument("--width", type=int, help="channels of the first layer [16; 64]")
    parser.add_argument("--cpu-devices", type=int, default=4, help="a CPU acts as so many [4]")
    parser.add_argument("--out", type=Path, default=Path("results/tpu_gpu_training"), help="folder")
    parser.add_argument("--checkpoint", help="where to put finder-checkpoint, gs://... too [OUT]")
    parser.add_argument("--distributed", action="store_true", help="one process of several")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0 [found on TPUs and Slurm]")
    parser.add_argument("--processes", type=int, help="how many there are [found likewise]")
    parser.add_argument("--process", type=int, help="which one this is [found likewise]")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "pool", "cpu_devices"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, and must be at least 1")
    for name, multiple, least in (("size", STRIDE, 20), ("width", 8, 8)):
        value = getattr(options, name)
        if value is not None and (value < least or value % multiple):
            parser.error(
                f"--{name} is {value}, and must be a multiple of {multiple}, at least {least}"
            )
    return options


STRIDE = 4  # pixels of the canvas to a cell of the output
CLASSES = 10

if __name__ == "__main__":
    options = parse_options(ARGUMENTS)
    jax.config.update("jax_num_cpu_devices", options.cpu_devices)  # of no effect on a GPU or TPU
    if options.distributed:  # before anything is computed
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    small = {"steps": 300, "batch": 8, "size": 64, "pool": 64, "width": 16}
    large = {"steps": 2000, "batch": 64, "size": 256, "pool": 16, "width": 64}
    for name, value in (small if jax.default_backend() == "cpu" else large).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Devices
#
# One axis, `data`: a batch is split along it, everything else is held by every device. All
# processes compute; the first one speaks.


# %%
def data_mesh(devices: Iterable[jax.Device]) -> Mesh:
    return Mesh(np.array(list(devices)), ("data",))


if __name__ == "__main__":
    mesh = data_mesh(jax.devices())
    console = Console(
        width=None if sys.stdout.isatty() or IN_NOTEBOOK else 100, quiet=jax.process_index() > 0
    )
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    console.print(f"{device}, {jax.process_count()} process(es), jax {jax.__version__}")
    no_bar = IN_NOTEBOOK and importlib.util.find_spec("ipywidgets") is None
    bar = partial(track, console=console, disable=no_bar)

# %% [markdown]
# ## Data: where is which digit?
#
# Real handwritten digits (scikit-learn's, 8 x 8 pixels) on canvases cluttered with pieces of
# others. A cell of 4 x 4 pixels that holds a digit's centre is positive for its class; the other
# cells of the digit are neither positive nor negative, so they are left out by a mask; all else is
# background. On the small canvases of a CPU about one logit in 900 is positive. The digits of the
# test canvases are never trained on.
#
# Canvas number i is the same whoever makes it, so each host makes its share of a batch and no
# other. Making them takes a CPU longer than training takes a GPU: a pool of batches is drawn once.


# %%
class Batch(NamedTuple):
    canvas: jax.Array  # [batch, size, size, 1]
    ids: jax.Array  # [batch, cells, cells]: the digit whose centre is here; -1 is background
    counted: jax.Array  # [batch, cells, cells]: False where the loss is to look away


def make_canvas(digits: np.ndarray, classes: np.ndarray, size: int, seed: tuple[int, ...]) -> Batch:
    rng = np.random.default_rng(seed)
    canvas = rng.normal(0.0, 0.1, (size, size)).astype(np.float32)
    for _ in range(size**2 // 256):  # clutter
        piece = rng.choice(digits)[2:6, 2:6] * rng.uniform(0.3, 1.0)
        y, x = rng.integers(0, size - 4, 2)
        canvas[y : y + 4, x : x + 4] = np.maximum(canvas[y : y + 4, x : x + 4], piece)
    cells = size // STRIDE
    ids, counted = np.full((cells, cells), -1, np.int32), np.ones((cells, cells), bool)
    taken = np.zeros((size, size), bool)
    for _ in range(rng.integers(1, 2 + size // 16)):
        which, scale = rng.integers(len(digits)), rng.integers(1, 3)
        extent = 8 * scale
        y, x = rng.integers(0, size - extent, 2)
        box = np.s_[y : y + extent, x : x + extent]
        if taken[box].any():
            continue
        taken[box] = True
        canvas[box] = np.maximum(canvas[box], np.kron(digits[which], np.ones((scale, scale))))
        first_y, first_x = y // STRIDE, x // STRIDE
        last_y, last_x = (y + extent - 1) // STRIDE, (x + extent - 1) // STRIDE
        counted[first_y : last_y + 1, first_x : last_x + 1] = False
        centre = (y + extent // 2) // STRIDE, (x + extent // 2) // STRIDE
        ids[centre] = classes[which]
    counted |= ids >= 0
    return Batch(canvas[..., None], ids, counted)


class Digits(NamedTuple):
    images: np.ndarray  # [n, 8, 8], from 0 to 1
    classes: np.ndarray

    def batch(self, size: int, seed: int, numbers: Iterable[int]) -> Batch:
        """The canvases of these numbers."""
        canvases = [make_canvas(self.images, self.classes, size, (seed, n)) for n in numbers]
        return Batch(*(np.stack(part) for part in zip(*canvases, strict=True)))


def on_all_devices(local: Batch, mesh: Mesh) -> Batch:
    """One batch of what every process holds a part of."""
    split = NamedSharding(mesh, P("data"))
    return Batch(*(jax.make_array_from_process_local_data(split, part) for part in local))


if __name__ == "__main__":
    data = load_digits()
    train_digits = Digits(data.images[:1400].astype(np.float32) / 16, data.target[:1400])
    test_digits = Digits(data.images[1400:].astype(np.float32) / 16, data.target[1400:])
    batch_size = options.batch * jax.device_count()

    def my_numbers(step: int) -> range:
        """The canvases of a step that this process makes."""
        share = batch_size // jax.process_count()
        first = step * batch_size + jax.process_index() * share
        return range(first, first + share)

    pool = [
        train_digits.batch(options.size, 0, my_numbers(step))
        for step in bar(range(min(options.pool, options.steps)), "Drawing")
    ]
    positives = sum((batch.ids >= 0).sum() for batch in pool)
    logits = CLASSES * sum(batch.counted.sum() for batch in pool)
    console.print(f"1 logit in {logits / positives:,.0f} is positive")

# %% [markdown]
# ## Model
#
# Patches of 4 x 4 pixels, then two convolutions. Parameters in float32, arithmetic in bfloat16. The
# head starts at a small probability of a digit (`prior_bias_init`), or the background's many small
# losses would drown the first steps.


# %%
class Finder(nnx.Module):
    def __init__(self, width: int, *, dtype: Any = jnp.bfloat16, rngs: nnx.Rngs):
        def block(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nnx.Sequential:
            both = {"dtype": dtype, "rngs": rngs}
            shape = (kernel, kernel)
            return nnx.Sequential(
                nnx.Conv(inputs, outputs, shape, strides=stride, use_bias=False, **both),
                nnx.GroupNorm(outputs, num_groups=8, **both),
                nnx.relu,
            )

        self.body = nnx.Sequential(
            block(1, width, kernel=STRIDE, stride=STRIDE),
            block(width, 2 * width, kernel=3),
            block(2 * width, 4 * width, kernel=3),
        )
        self.head = nnx.Conv(
            4 * width, CLASSES, (1, 1), bias_init=prior_bias_init(0.01), dtype=dtype, rngs=rngs
        )

    def __call__(self, canvas: jax.Array) -> jax.Array:
        return self.head(self.body(canvas))


# %% [markdown]
# ## The step
#
# A pure function of the state and a batch. It says nothing of devices, but for `axis_name`:
# within `shard_map` a device sees its own part of the batch only, and `normalize_by_positives`
# then adds up losses and positives along that axis. The loss of each logit is bfloat16 as the
# logits are; what is summed is float32.


# %%
class TrainState(NamedTuple):
    params: nnx.State
    opt_state: optax.OptState


class Trainer(NamedTuple):
    """What stays the same in training."""

    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation

    def loss(self, params: nnx.State, batch: Batch, axis_name: str | None = None) -> jax.Array:
        logits = nnx.merge(self.graphdef, params)(batch.canvas)
        labels = jax.nn.one_hot(batch.ids, CLASSES, dtype=logits.dtype)
        where = jnp.broadcast_to(batch.counted[..., None], logits.shape)
        loss = sigmoid_focal_loss(logits, labels, gamma=2.0, alpha=0.25, where=where)
        return normalize_by_positives(loss, labels, where=where, axis_name=axis_name)

    def step(
        self, state: TrainState, batch: Batch, axis_name: str | None = None
    ) -> tuple[TrainState, jax.Array]:
        loss, gradient = jax.value_and_grad(self.loss)(state.params, batch, axis_name)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss


def make_trainer(width: int, steps: int, dtype: Any = jnp.bfloat16) -> tuple[Trainer, TrainState]:
    graphdef, params = nnx.split(Finder(width, dtype=dtype, rngs=nnx.Rngs(0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 10, max(steps, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    return Trainer(graphdef, optimizer), TrainState(params, optimizer.init(params))


# %% [markdown]
# ## Over all devices, in two ways
#
# **`jax.jit` with shardings.** The program is written for the whole batch; the compiler splits it
# and puts in the sums over devices. **`jax.shard_map`.** The program is written for one device's
# part; the sums are asked for by name. Gradients of what every device holds are added up by
# autodiff in both. The step's state is donated: the new one is written where the old one was.


# %%
def by_jit(function: Callable, mesh: Mesh, **options: Any) -> Callable:
    """Of (what every device holds, a batch that is split), returning what every device holds."""
    held, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    return jax.jit(function, in_shardings=(held, split), out_shardings=held, **options)


def by_shard_map(function: Callable, mesh: Mesh, **options: Any) -> Callable:
    """The same; `function` takes the name of the axis to sum over."""
    local = partial(function, axis_name="data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    return jax.jit(mapped, **options)


# %% [markdown]
# ## The same numbers?
#
# Loss and gradient of one batch, over all devices in both ways and on a single one; the last
# devices' parts have no positive and are masked whole. The difference of two gradients is by norm,
# relative to the norm of one. In float32 (at the highest precision, which a GPU and a TPU do not
# use by default) it is rounding, in another order of summation; in bfloat16 each device rounds its
# part of a gradient to 8 bits before they are added.


# %%
def relative_difference(gradient: Any, reference: Any) -> float:
    gradient, reference = jax.device_get((gradient, reference))
    difference = jax.tree.map(np.subtract, gradient, reference)
    return float(optax.global_norm(difference) / optax.global_norm(reference))


def without_digits(batch: Batch, empty: slice, masked: slice) -> Batch:
    """No positive in some of the canvases, nothing to count in others."""
    ids, counted = batch.ids.copy(), batch.counted.copy()
    ids[empty] = -1
    counted[masked] = False
    return batch._replace(ids=ids, counted=counted)


if __name__ == "__main__":
    table = Table("model", "spread by", "loss", "on one device", "gradient off by", "allowed")
    devices = jax.device_count()
    count = devices * max(2, 8 // devices)  # few, since one device is to hold them all
    part = count // max(4, devices)
    last, second_last = count - part, count - 2 * part
    whole = train_digits.batch(options.size, 0, range(count))
    whole = without_digits(whole, empty=np.s_[second_last:last], masked=np.s_[last:])
    share = count // jax.process_count()
    first = jax.process_index() * share
    mine = Batch(*(each[first : first + share] for each in whole))
    for dtype, allowed in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02)):
        trainer, state = make_trainer(options.width, options.steps, dtype)
        value_and_grad = jax.value_and_grad(trainer.loss)
        with jax.default_matmul_precision("highest"):
            loss, reference = jax.jit(value_and_grad)(state.params, whole)
        for spread in (by_jit, by_shard_map):
            with jax.default_matmul_precision("highest"):
                spread_out = spread(value_and_grad, mesh)
                total, gradient = spread_out(state.params, on_all_devices(mine, mesh))
            difference = relative_difference(gradient, reference)
            table.add_row(
                jnp.dtype(dtype).name,
                spread.__name__,
                f"{float(total):.6f}",
                f"{float(loss):.6f}",
                f"{difference:.1e}",
                f"{allowed:.0e}",
            )
            np.testing.assert_allclose(float(total), float(loss), rtol=allowed)
            assert difference < allowed, f"{spread.__name__}: the gradient is off by {difference}"
    console.print(table)

# %% [markdown]
# ## Train


# %%
def cell_average_precision(trainer: Trainer, params: nnx.State, batch: Batch) -> float:
    """Of all logits that count, ranked by probability."""
    logits = jax.jit(lambda p, x: nnx.merge(trainer.graphdef, p)(x))(params, batch.canvas)
    labels = np.arange(CLASSES) == batch.ids[..., None]
    scores = np.asarray(logits, np.float32)
    return average_precision_score(labels[batch.counted].ravel(), scores[batch.counted].ravel())


if __name__ == "__main__":
    trainer, state = make_trainer(options.width, options.steps)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    train_step = by_jit(trainer.step, mesh, donate_argnums=0)
    test_batch = test_digits.batch(options.size, 1, range(64))
    before = cell_average_precision(trainer, jax.device_get(state.params), test_batch)
    losses = []
    for step in bar(range(options.steps), "Training"):
        state, loss = train_step(state, on_all_devices(pool[step % len(pool)], mesh))
        losses.append(loss)  # a device array: reading it would wait for the step
        if jax.default_backend() == "cpu":
            # Its devices share a few threads, where steps under way together can block each other.
            loss.block_until_ready()
    after = cell_average_precision(trainer, jax.device_get(state.params), test_batch)
    console.print(f"average precision on test canvases: {before:.3f} before, {after:.3f} after")

# %%
if __name__ == "__main__":
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(np.array([float(loss) for loss in losses]), lw=1)
    axis.set(xlabel="step", ylabel="focal loss per positive", yscale="log", title="Training")
    axis.grid(alpha=0.3)
    if jax.process_index() == 0:
        figure.savefig(options.out / "training.png", dpi=150)
    if IN_NOTEBOOK:
        from IPython.display import Image, display

        display(Image(options.out / "training.png", width=700))

# %% [markdown]
# ## Checkpoint
#
# Parameters and optimizer, saved by all processes together and restored into the shardings that
# they had. What is restored must be what was saved to the last bit; training goes on from it.

# %%
if __name__ == "__main__":
    folder = options.checkpoint or options.out
    if "://" not in str(folder):
        folder = Path(folder).resolve()
    path = f"{folder}/finder-checkpoint"
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, state, force=True)  # over an earlier one
    checkpointer.wait_until_finished()
    as_saved = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)  # with its shardings
    restored = checkpointer.restore(path, as_saved)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    batch = on_all_devices(pool[0], mesh)
    state, loss = train_step(restored, batch)
    console.print(f"restored to the last bit; the loss of the next step is {float(loss):.4f}")

# %% [markdown]
# ## How fast, and what of it is the loss
#
# Steps over one batch that is on the devices already, so without making canvases. Beside it the
# loss alone, value and gradient, on logits of the same shape and dtype. Within a step the compiler
# merges it with its neighbours, so its share there is roughly this or less.


# %%
def seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """The median time until the result is there, compiling left out."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def normalised(loss: Callable) -> Callable:
    def total(logits: jax.Array, ids: jax.Array) -> jax.Array:
        labels = jax.nn.one_hot(ids, CLASSES, dtype=logits.dtype)
        return normalize_by_positives(loss(logits, labels), labels)

    return jax.jit(jax.value_and_grad(total))


if __name__ == "__main__":

    def one_step() -> jax.Array:
        global state  # the old one is donated
        state, loss = train_step(state, batch)
        return loss

    step_seconds = seconds(one_step)
    memory = train_step.lower(state, batch).compile().memory_analysis()
    peak = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6
    table = Table("on " + device, "milliseconds", "share of a step", title="Loss and gradient")
    table.add_row("training step", f"{1e3 * step_seconds:.2f}", "")
    logits = jax.jit(
        lambda ids: jax.random.normal(jax.random.key(0), (*ids.shape, CLASSES), jnp.bfloat16),
        out_shardings=batch.ids.sharding,
    )(batch.ids)
    shares = {}
    for name, loss in (
        ("focaljax focal", sigmoid_focal_loss),
        ("optax focal", optax.sigmoid_focal_loss),
        ("optax BCE", optax.sigmoid_binary_cross_entropy),
    ):
        alone = seconds(partial(normalised(loss), logits, batch.ids))
        shares[name] = alone / step_seconds
        table.add_row(name, f"{1e3 * alone:.2f}", f"{shares[name]:.1%}")
    console.print(table)
    console.print(
        f"{batch_size / step_seconds:,.0f} canvases per second ({options.size} x {options.size}, "
        f"{batch_size} in a batch), {peak:,.0f} MB per device for arguments and scratch"
    )
    if jax.process_index() == 0:
        record = {
            "device": device,
            "versions": {m.__name__: m.__version__ for m in (jax, flax, optax)},
            "options": {k: str(v) for k, v in vars(options).items() if v is not None},
            "average_precision": {"before": before, "after": after},
            "canvases_per_second": batch_size / step_seconds,
            "share_of_step": shares,
        }
        (options.out / "summary.json").write_text(json.dumps(record, indent=1))

# %% [markdown]
# ## What to take from it
#
# - The same loss, `axis_name` apart, serves one device, many, and many hosts.
# - Divide once, by the positives of all devices. `normalize_by_positives` does.
# - Devices that a CPU pretends to have share its cores, so they show that the numbers are right and
#   nothing about speed.
