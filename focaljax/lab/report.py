"""Reports: tables in the terminal and as Markdown, figures, and the runs as files."""

import datetime
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
import pandas as pd
import sklearn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from focaljax.lab.scores import in_pairs

Section = tuple[dict[str, pd.DataFrame], list[str]]  # tables by title, and what they say

MARKS = {"better": "▲", "worse": "▼", "unclear": ""}


def console() -> Console:
    """The terminal, or 110 columns where what is printed goes into a pipe or a log."""
    terminal = Console()
    return terminal if terminal.is_terminal or terminal.is_jupyter else Console(width=110)


def progress_bar(name: str) -> Progress:
    """A bar with the count and the time that is left."""
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    return Progress(TextColumn(f"{name} {{task.description}}"), *columns, console=console())


def of_seeds(runs: pd.DataFrame) -> str:
    """What stands in a table's title: mean ± sd of so many seeds."""
    seeds, first = runs["seed"].nunique(), runs["loss"].iloc[0]
    return "1 seed" if seeds == 1 else f"mean ± sd of {seeds} seeds, ▲▼ clearly off {first}"


def short(number: float, form: str = ".3f") -> str:
    """0.2904 as .290, the way journals of statistics do, so that the tables fit a terminal."""
    if np.isnan(number):
        return "-"
    return format(number, form).replace("0.", ".", 1) if abs(number) < 1 else format(number, form)


def scores_table(
    runs: pd.DataFrame, scores: Iterable[str], form: str = ".3f", **how: Any
) -> pd.DataFrame:
    """Mean ± sd of each score, and ▲ or ▼ where `in_pairs` finds it clearly off the first loss."""

    def cell(line: pd.Series) -> str:
        spread = "" if np.isnan(line["sd"]) else f" ± {short(line['sd'], form)}"
        return f"{short(line['mean'], form)}{spread}{MARKS[line['outcome']]}"

    columns = {score: in_pairs(runs, score, **how).apply(cell, axis=1) for score in scores}
    return pd.DataFrame(columns).reindex(runs["loss"].unique()).fillna("-")


def differences_table(
    runs: pd.DataFrame, scores: Iterable[str], form: str = "+.3f", **how: Any
) -> pd.DataFrame:
    """Paired difference from the first loss ± half its 95 % interval, and seeds better."""

    def cell(line: pd.Series) -> str:
        reach = (line["high"] - line["low"]) / 2
        interval = "" if line["seeds"] < 2 else f" ± {short(reach, form[1:])}"
        ahead = f"{line['seeds_better']}/{line['seeds']}"
        return f"{short(line['difference'], form)}{interval}, {ahead}{MARKS[line['outcome']]}"

    columns = {score: in_pairs(runs, score, **how).apply(cell, axis=1) for score in scores}
    return pd.DataFrame(columns).drop(index=runs["loss"].iloc[0])


def verdict(runs: pd.DataFrame, score: str, form: str = ".3f", **how: Any) -> str:
    """A sentence on which losses are ahead of the first one and which are behind it."""
    lines = in_pairs(runs, score, **how)
    first, others = lines.iloc[0], lines.iloc[1:].sort_values("difference")
    others = others if how.get("higher", True) else others[::-1]
    counts = [(others["outcome"] == outcome).sum() or "none" for outcome in ("better", "worse")]
    ends = [
        f"{name} ({short(line['difference'], f'+{form}')}, better in {line['seeds_better']} of"
        f" {line['seeds']} seeds)"
        for name, line in (*others.iloc[-1:].iterrows(), *others.iloc[:1].iterrows())
    ]
    return (
        f"{score}: {first.name} has {short(first['mean'], form)}. Of {len(others)} other losses"
        f" {counts[0]} clearly better, {counts[1]} clearly worse; best {ends[0]}, last {ends[1]}."
    )


def show(frame: pd.DataFrame, title: str) -> None:
    """A table in the terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in frame:
        table.add_column(str(column), justify="right")
    for name, line in frame.iterrows():
        table.add_row(str(name), *map(str, line))
    console().print(table)


def device() -> str:
    """What it ran on, and when."""
    kind = jax.devices()[0].device_kind
    return f"{jax.device_count()} x {kind}, jax {jax.__version__}, {datetime.date.today()}"


def tidy(figure: Figure) -> Figure:
    """Without a frame, on a light grid."""
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def dots(axis: Axes, runs: pd.DataFrame, score: str) -> None:
    """A line per loss: a dot for each seed, a bar at the mean, the first loss's mean dashed."""
    by_loss = runs.groupby("loss", sort=False)[score]
    for place, (_, values) in enumerate(by_loss):
        axis.plot(values, [place] * len(values), "o", ms=4, alpha=0.5, color="#0072b2")
        axis.plot(values.mean(), place, "|", ms=14, mew=2.5, color="#d55e00")
        if place == 0:
            axis.axvline(values.mean(), color="0.5", lw=1, ls="--")
    axis.set_yticks(range(len(by_loss)), by_loss.groups)
    axis.set_ylim(len(by_loss) - 0.4, -0.6)
    axis.set(xlabel=f"{score}   (dots: seeds, bars: means)")


def save(
    out: Path,
    runs: pd.DataFrame,
    sections: list[Section],
    figures: dict[str, Figure],
    settings: dict[str, Any],
) -> None:
    """`runs.csv`, `tables.md`, `settings.json` and the figures, into the folder."""
    out.mkdir(parents=True, exist_ok=True)
    runs.to_csv(out / "runs.csv", index=False, float_format="%.6g")
    blocks = []
    for tables, said in sections:
        for title, frame in tables.items():
            blocks += [f"**{title}**", frame.to_markdown(disable_numparse=True)]
        blocks += said
    (out / "tables.md").write_text("\n\n".join([*blocks, device()]) + "\n", "utf-8")
    versions = {module.__name__: module.__version__ for module in (jax, flax, optax, sklearn)}
    record = settings | {"device": device(), "versions": versions}
    (out / "settings.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for name, figure in figures.items():
        tidy(figure).savefig(out / f"{name}.png", dpi=110)
    console().print(f"Figures, tables and runs are in {out}.", highlight=False)


def tell(section: Section) -> None:
    """Tables, then sentences, in the terminal."""
    tables, said = section
    for title, frame in tables.items():
        show(frame, title)
    for sentence in said:
        console().print(sentence, highlight=False, markup=False)
