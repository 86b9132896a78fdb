"""All softmax losses on names in newspaper text, from the start and as fine-tuning."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from seqeval.metrics.sequence_labeling import get_entities

import focaljax
from focaljax.lab import losses as of
from focaljax.lab import report, scores
from focaljax.lab.losses import Loss
from focaljax.lab.news import KINDS, TAGS, News, Text, load_news, pack
from focaljax.lab.training import Trainer, shuffled_rows

AFTER_HALF = "CE, then "  # for half of the steps cross entropy, then another loss
FINE_TUNED = {  # by name, the other loss and the factor of the learning rate
    f"{AFTER_HALF}{name}{', slowly' * (speed < 1)}": (name, speed)
    for name, speed in (("hard m=.5", 1.0), ("hard m=.9", 1.0), ("hard m=.5", 0.1), ("CE", 0.1))
}


class Tagger(nnx.Module):
    """An embedding and three dilated convolutions that see seven characters to either side."""

    def __init__(self, characters: int, width: int, prior: ArrayLike, rngs: nnx.Rngs):
        del prior  # a softmax head starts at 0

        def convolution(dilation: int) -> nnx.Conv:
            return nnx.Conv(width, width, (3,), kernel_dilation=(dilation,), rngs=rngs)

        self.embed = nnx.Embed(characters, width, rngs=rngs)
        self.near, self.middle, self.far = map(convolution, (1, 2, 4))
        self.tags = nnx.Linear(width, len(TAGS), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.embed(x)
        for convolution in (self.near, self.middle, self.far):
            x += nnx.relu(convolution(x))
        return self.tags(x)


def objective(model: Tagger, batch: Text, loss: Callable[..., jax.Array]) -> jax.Array:
    """The mean loss of the characters; padding has a label, but no say."""
    seen = batch.labels >= 0
    return focaljax.reduce_mean(loss(model(batch.x), batch.labels.clip(0)), where=seen)


class Comparison(NamedTuple):
    """What came out: a row of `runs` per loss and seed, and the networks of seed 0."""

    news: News
    runs: pd.DataFrame
    models: dict[str, Tagger]


predict = nnx.jit(lambda model, x: jax.nn.log_softmax(model(x)))


def names_in(text: Text, tags: np.ndarray) -> set[tuple[str, int, int]]:
    """(kind, first, last) of every name, as seqeval reads BIO tags."""
    rows = [np.array(TAGS)[row[seen]] for row, seen in zip(tags, text.labels >= 0, strict=True)]
    return set(get_entities([row.tolist() for row in rows]))


def score(model: Tagger, loss: Loss | None, test: Text) -> dict[str, float]:
    """Of names: F1, precision, recall. Of characters: how true the probabilities are."""
    log_p = np.asarray(predict(model, test.x))
    true, found = names_in(test, test.labels), names_in(test, log_p.argmax(-1))
    by_kind = {
        kind: scores.f1(*({n for n in every if n[0] == kind} for every in (true, found)))
        for kind in KINDS.values()
    }
    seen = test.labels >= 0
    ways = {"raw": log_p[seen]}
    if loss is not None and loss.posterior is not None:
        ways["closed form"] = np.asarray(loss.posterior(log_p[seen]))
    quality = {way: scores.of_probabilities(test.labels[seen], x) for way, x in ways.items()}
    return {
        "F1": scores.f1(true, found),
        "precision": len(true & found) / max(1, len(found)),
        "recall": len(true & found) / max(1, len(true)),
        **by_kind,
        **{f"{s} {way}": quality[way][s] for s in ("NLL", "ECE") for way in ways},
    }


def compare(
    *,
    names: list[str] | None = None,
    seeds: int = 3,
    steps: int = 500,
    batch: int = 8,
    width: int = 48,
    rate: float = 0.02,
    sentences: int | None = None,
    fine_tune: bool = True,
) -> Comparison:
    """Train and score every loss with every seed: the same text, batches and first weights."""
    news = load_news(sentences)
    counts = np.bincount(news.train.labels[news.train.labels >= 0], minlength=len(TAGS))
    losses = of.chosen(of.of_tags(counts), names)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    new_model = partial(Tagger, len(news.vocabulary) + 2, width)
    trainer = Trainer(new_model, objective, news.train, losses, optimizer)
    tuned = {k: v for k, v in FINE_TUNED.items() if fine_tune and v[0] in losses}
    runs, models = [], {}
    with report.progress_bar("runs") as bar:
        task = bar.add_task("", total=(len(losses) + len(tuned)) * seeds)
        for seed in range(seeds):
            rows = shuffled_rows(seed, len(news.train.x), steps, batch)
            for name in (*losses, *tuned):
                bar.update(task, description=name)
                state = trainer.start(name if name in losses else "CE", seed)
                if name in losses:
                    state = trainer.run(state, name, rows)
                else:
                    loss, speed = tuned[name]
                    state = trainer.run(state, "CE", rows[: steps // 2])
                    state = trainer.run(state, loss, rows[steps // 2 :], speed)
                model = trainer.model(state)
                runs.append(
                    {"loss": name, "seed": seed} | score(model, losses.get(name), news.test)
                )
                if seed == 0:
                    models[name] = model
                bar.advance(task)
    return Comparison(news, pd.DataFrame(runs), models)


# --- what it shows --------------------------------------------------------------------------------


def score_tables(compared: Comparison) -> dict[str, pd.DataFrame]:
    """Names found, the differences from CE, and how true the probabilities are."""
    runs = compared.runs
    ways = [column for column in runs if column.startswith(("NLL", "ECE"))]
    by_loss = runs.groupby("loss", sort=False)
    return {
        f"names found in the last days, {report.of_seeds(runs)}": (
            report.scores_table(runs, ("F1", "precision", "recall"))
        ),
        "minus CE, mean ± 95 % interval, seeds better": report.differences_table(runs, ["F1"]),
        "F1 by kind of name": by_loss[list(KINDS.values())].mean().map(report.short),
        "probabilities of characters, lower is better": (
            by_loss[ways].mean().map(partial(report.short, form=".4f"))
        ),
    }


def marked_names(
    news: News, models: dict[str, Tagger], count: int = 3
) -> list[dict[str, list[tuple[str, str]]]]:
    """Test sentences that the networks tag differently: (character, kind of name or "") of each."""
    fit = [s for s in news.test_sentences if 20 <= len(s.characters) <= 36 and any(s.tags)][:400]
    x = np.concatenate([pack([sentence], news.vocabulary).x for sentence in fit])
    tags = {name: np.asarray(predict(model, x)).argmax(-1) for name, model in models.items()}
    marked = []
    for place, sentence in enumerate(fit):
        length = len(sentence.characters)
        found = {name: every[place, :length].tolist() for name, every in tags.items()}
        if len(set(map(tuple, found.values()))) > 1:
            every = {"marked": sentence.tags} | found
            kinds = {n: [TAGS[t].partition("-")[2] for t in each] for n, each in every.items()}
            marked.append(
                {n: list(zip(sentence.characters, k, strict=True)) for n, k in kinds.items()}
            )
    return marked[:: max(1, len(marked) // count)][:count]


def figures(compared: Comparison) -> dict[str, Figure]:
    """By file name."""
    by_loss = compared.runs.groupby("loss")["F1"].mean()
    figure = plt.figure(figsize=(7, 1 + 0.3 * len(by_loss)), layout="constrained")
    axis = figure.subplots()
    report.dots(axis, compared.runs, "F1")
    low = 0.6 * by_loss["CE"]  # what is further down would squeeze the others together
    axis.set(xlim=(low, None), xlabel="F1 of names on test   (dots: seeds, bars: means)")
    for place, name in enumerate(compared.runs["loss"].unique()):
        if by_loss[name] < low:
            axis.text(low, place, f"  ← {report.short(by_loss[name])}", va="center")
    return {"f1": report.tidy(figure)}
