"""A training step across hosts: two processes of four devices each against one of a single device.

The step is that of `colab/tpu_gpu_training.ipynb`, from its cells tagged "definitions". Run as a
script this file is one of the processes:

    python tests/test_across_hosts.py FOLDER DEVICES [COORDINATOR PROCESS]
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SIZE, BATCH = 32, 16
HALF = BATCH // 2  # what each of two hosts holds
# Which canvases have no digit, and which are masked whole.
CASES = {
    "ordinary": (np.s_[:0], np.s_[:0]),
    "no positive on the first host": (np.s_[:HALF], np.s_[:0]),
    "the second host masked whole": (np.s_[:0], np.s_[HALF:]),
    "the first masked whole, the second without a positive": (np.s_[HALF:], np.s_[:HALF]),
    "all masked": (np.s_[:0], np.s_[:]),
}
SPREADS = ("by_jit", "by_shard_map")


def definitions(notebook):
    """What the cells of a notebook define that are tagged "definitions"."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "definitions" in cell["metadata"].get("tags", ())]
    found = {"__name__": notebook.stem}
    exec("\n\n".join("".join(cell["source"]) for cell in tagged), found)
    return found


def one_process(folder, devices, coordinator=None, process=0):
    """Loss, gradient and one update of every case, kept as FOLDER/result.npz by process 0."""
    import jax
    from flax import nnx
    from jax import numpy as jnp
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from focaljax.lab import finder

    jax.config.update("jax_num_cpu_devices", devices)
    if coordinator:
        jax.distributed.initialize(
            coordinator, num_processes=2, process_id=process, coordinator_bind_address=coordinator
        )
        assert (jax.process_count(), jax.device_count()) == (2, 2 * devices)
    notebook = definitions(ROOT / "colab/tpu_gpu_training.ipynb")
    mesh = Mesh(jax.devices(), ("data",))
    digits, _ = finder.load()
    batch = digits.batch(SIZE, range(BATCH))
    # a warm-up of no step, so that the one update moves the parameters
    model = notebook["Finder"](8, nnx.Rngs(0), dtype=jnp.float32)
    state, loss_of, step = notebook["start"](model, steps=1)

    def loss_gradient_update(state, batch, axis_name=None):
        loss, gradient = jax.value_and_grad(loss_of)(state[0], batch, axis_name)
        (params, _), _ = step(state, batch, axis_name)
        return {"loss": loss, "gradient": gradient, "params": params}

    ways = {f"|{spread}": notebook[spread](loss_gradient_update, mesh) for spread in SPREADS}
    if not coordinator:
        ways = {"": jax.jit(loss_gradient_update)}
    results = {}
    for case, (empty, masked) in CASES.items():
        cut = batch.without_digits(empty, masked)
        there = jax.device_put(cut, NamedSharding(mesh, P("data")))
        if case == "ordinary":  # where each host draws its own half
            there = digits.on_devices(mesh, SIZE, range(BATCH))
        for way, function in ways.items():
            for path, leaf in jax.tree.leaves_with_path(function(state, there)):
                name = jax.tree_util.keystr(path, simple=True)
                results[f"{case}|{name}{way}"] = jax.device_get(leaf)
    if jax.process_index() == 0:
        np.savez(folder / "result.npz", **results)


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # the programs are large
    with open(folder / f"log{arguments[-1]}", "w") as log:
        command = [sys.executable, __file__, str(folder), *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(folder, processes):
    """The results, once all processes have ended; none outlives this."""
    deadline = time.monotonic() + 300
    try:
        # one that failed is not waited for by the others
        while not any(codes := [p.poll() for p in processes]) and None in codes:
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * len(codes), "\n".join(log.read_text() for log in folder.glob("log*"))
    return dict(np.load(folder / "result.npz"))


def test_two_processes_give_what_one_device_gives(tmp_path):  # one test: results are made once
    for module in ("flax", "optax", "orbax.checkpoint", "sklearn", "matplotlib", "pandas"):
        pytest.importorskip(module, reason="the step is that of a notebook: needs focaljax[lab]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    two, one = tmp_path / "two", tmp_path / "one"
    of_two = finish(two, [start(two, 4, coordinator, process) for process in range(2)])
    of_one = finish(one, [start(one, 1)])
    for case in CASES:
        gradients = [np.abs(g).max() for key, g in of_one.items() if key.startswith(f"{case}|g")]
        assert (max(gradients) == 0) == (case == "all masked")  # there is something to compare
    assert of_two.keys() == {key + f"|{spread}" for key in of_one for spread in SPREADS}
    for key, found in of_two.items():
        expected = of_one[key.rpartition("|")[0]]
        assert np.isfinite(expected).all(), key
        # Adam divides a gradient by its own size, so that of one near 0 the rounding shows in the
        # update: to a hundredth of the learning rate
        atol = 3e-5 if "|params" in key else 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=atol, err_msg=key)


if __name__ == "__main__":
    folder, devices, *rest = sys.argv[1:]
    coordinator, process = rest or (None, 0)
    one_process(Path(folder), int(devices), coordinator, int(process))
