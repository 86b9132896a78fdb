"""Training with every loss and every seed, from the same initial weights and batches."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from focaljax.lab.losses import Losses


class State(NamedTuple):
    """Of one run, or of many along leading axes [losses, seeds]."""

    params: Any
    moments: optax.OptState


class Trainer:
    """Runs of one model on one set of data, which differ by loss and seed.

    Args:
      new_model: of a prior and `nnx.Rngs`, the network at its start.
      objective: of the network, a batch and a loss function, the number to make small.
      data: arrays whose first axis are the examples, such as features and labels.
      losses: by name.
      optimizer: from optax.
    """

    def __init__(
        self,
        new_model: Callable[..., nnx.Module],
        objective: Callable[..., jax.Array],
        data: Any,
        losses: Losses,
        optimizer: optax.GradientTransformation,
    ):
        self.losses = losses
        self._data = jax.tree.map(jnp.asarray, data)
        self._priors = jnp.array([loss.prior for loss in losses.values()])
        self._graph = nnx.graphdef(nnx.eval_shape(lambda: new_model(0.5, nnx.Rngs(0))))
        functions = [loss.of for loss in losses.values()]

        def start(prior: jax.Array, key: jax.Array) -> State:
            params = nnx.state(new_model(prior, nnx.Rngs(key)))
            return State(params, optimizer.init(params))

        def step(loss_of: Any, state: State, rows: jax.Array, data: Any, speed: float) -> State:
            batch = jax.tree.map(lambda array: array[rows], data)

            def total(params: Any) -> jax.Array:
                return objective(nnx.merge(self._graph, params), batch, loss_of)

            gradient = jax.grad(total)(state.params)
            updates, moments = optimizer.update(gradient, state.moments, state.params)
            updates = jax.tree.map(lambda update: speed * update, updates)
            return State(optax.apply_updates(state.params, updates), moments)

        def step_of_any(which: jax.Array, *rest: Any) -> State:
            return step(partial(jax.lax.switch, which, functions), *rest)

        self._start = jax.jit(start)
        self._step = jax.jit(step, static_argnums=0, donate_argnums=1)
        of_seeds = jax.vmap(step_of_any, (None, 0, 0, None, None))
        of_losses = jax.vmap(of_seeds, (0, 0, None, None, None))
        self._step_all = jax.jit(of_losses, donate_argnums=1)
        self._start_all = jax.jit(jax.vmap(jax.vmap(start, (None, 0)), (0, None)))

    def start(self, name: str, seed: int) -> State:
        """A run before its first step; runs of a seed differ by their prior alone."""
        prior = self._priors[list(self.losses).index(name)]
        return self._start(prior, jax.random.key(seed))

    def run(self, state: State, name: str, rows: np.ndarray, speed: float = 1.0) -> State:
        """One run over the batches [steps, batch] of row numbers.

        `speed` is a factor of the learning rate. `state` is used up.
        """
        for step, batch in enumerate(rows):
            state = self._step(self.losses[name].of, state, batch, self._data, speed)
            if step % 16 == 0:  # a queue of steps that never empties holds their buffers
                jax.block_until_ready(state)
        return state

    def run_all(self, rows: np.ndarray, advance: Callable[[], object] = lambda: None) -> State:
        """All runs as one vmapped program; `rows` are [seeds, steps, batch]."""
        keys = jax.vmap(jax.random.key)(jnp.arange(len(rows)))
        state, which = self._start_all(self._priors, keys), jnp.arange(len(self.losses))
        for batch in rows.swapaxes(0, 1):
            state = self._step_all(which, state, batch, self._data, 1.0)
            jax.block_until_ready(state)
            advance()
        return state

    def model(self, state: State) -> nnx.Module:
        """The network of one run."""
        return nnx.merge(self._graph, state.params)

    def models(self, states: State, names: list[str]) -> Iterator[tuple[str, int, nnx.Module]]:
        """Name, seed and network of each run of `run_all`."""
        for place, name in enumerate(names):
            for seed in range(len(jax.tree.leaves(states.params)[0][place])):
                one = jax.tree.map(lambda leaf: leaf[place, seed], states)  # noqa: B023
                yield name, seed, self.model(one)


def shuffled_rows(seed: int, examples: int, steps: int, batch: int) -> np.ndarray:
    """Row numbers [steps, batch]: epoch after epoch, each in an order of its own."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // examples)
    order = np.concatenate([rng.permutation(examples) for _ in range(epochs)])
    return order[: steps * batch].reshape(steps, batch)


def adam(rate: float, steps: int) -> optax.GradientTransformation:
    """Adam whose rate rises in the first tenth of the steps and falls along a cosine."""
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))
