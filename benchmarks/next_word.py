"""A small next-word model whose head never makes all of its logits: plain and focal.

python benchmarks/next_word.py FOLDER    # writes curves.png and tables.md there
"""

import datetime
import pathlib
import pydoc_data.topics
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from flax import nnx

import focaljax

STEPS, BATCH, CONTEXT = 600, 512, 6

# --- the text: Python's own help pages ------------------------------------------------------------

text = " ".join(pydoc_data.topics.topics.values())
words = re.findall(r"\w+|[^\w\s]", text)
vocabulary = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
tokens = np.array([vocabulary[word] for word in words], np.int32)
windows = np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)
split = int(0.9 * len(windows))
train, test = windows[:split], windows[split:][::4]


# --- the model and its loss -----------------------------------------------------------------------


class NextWord(nnx.Module):
    def __init__(self, classes: int, rngs: nnx.Rngs, width: int = 64):
        self.embed = nnx.Embed(classes, width, rngs=rngs)
        self.hidden = nnx.Linear(CONTEXT * width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def features(self, context: jax.Array) -> jax.Array:
        x = self.embed(context).reshape(len(context), -1)
        return self.out(nnx.relu(self.hidden(x)))


def mean_loss(model: NextWord, windows: jax.Array, gamma: float) -> jax.Array:
    loss = focaljax.linear_softmax_focal_loss(
        model.features(windows[:, :-1]),
        model.head.kernel[...],
        windows[:, -1],
        bias=model.head.bias[...],
        gamma=gamma,
    )
    return focaljax.reduce_mean(loss)


@nnx.jit
def train_step(model: NextWord, optimizer: nnx.Optimizer, batch: jax.Array, gamma: float):
    loss, gradient = nnx.value_and_grad(mean_loss)(model, batch, gamma)
    optimizer.update(model, gradient)
    return loss


# --- training -------------------------------------------------------------------------------------


def main(folder: pathlib.Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = {}
    evaluate = nnx.jit(mean_loss)
    for name, gamma in (("cross entropy", 0.0), ("focal, gamma = 2", 2.0)):
        model = NextWord(len(vocabulary), nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
        rng, curve = np.random.default_rng(0), []
        for step in range(STEPS):
            train_step(model, optimizer, train[rng.integers(len(train), size=BATCH)], gamma)
            if step % 20 == 19:
                curve.append(float(evaluate(model, test, 0.0)))
        axis.plot(np.arange(20, STEPS + 1, 20), curve, label=name)
        logits = model.head(model.features(test[:, :-1]))
        true = focaljax.softmax_posterior_logits(logits, gamma=gamma)
        of_true = optax.softmax_cross_entropy_with_integer_labels(true, jnp.asarray(test[:, -1]))
        right = logits.argmax(-1) == test[:, -1]
        rows[name] = [curve[-1], float(of_true.mean()), float(right.mean())]
    axis.set(xlabel="step", ylabel="cross entropy on held-out text", title="Next word")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "curves.png", dpi=110)
    columns = ["NLL of the softmax", "NLL by the closed form", "share right"]
    frame = pd.DataFrame(rows, index=columns).T.map("{:.3f}".format)
    data = f"{len(train):,} windows of {CONTEXT} words, {len(vocabulary):,} different words"
    where = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {datetime.date.today()}"
    table = frame.to_markdown(disable_numparse=True)
    (folder / "tables.md").write_text(f"{table}\n\n{data}; {STEPS} steps of {BATCH}; {where}\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
