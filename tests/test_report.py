import csv
import json

import numpy as np
import pytest

from tinyvit_jax import report
from tinyvit_jax.evaluate import BROKEN, Judged


def make_judged(label, predicted, confidence=None, rank=None):
    label, predicted = np.array(label, np.int32), np.array(predicted, np.int32)
    rank = np.where(label == predicted, 0, 1) if rank is None else np.array(rank)
    confidence = np.full(len(label), 0.5) if confidence is None else np.array(confidence)
    return Judged(label, predicted, confidence.astype(np.float32), rank.astype(np.int32),
                  np.zeros(len(label), np.float32))


def random_judged(classes, images, seed=0):
    generator = np.random.default_rng(seed)
    label, predicted = generator.integers(0, classes, (2, images))
    predicted = np.where(generator.random(images) < 0.6, label, predicted)
    rank = np.where(label == predicted, 0, generator.integers(1, 9, images))
    return make_judged(label, predicted, generator.random(images), rank)


def test_calibration_of_a_case_counted_by_hand():
    """Four images in (0.4, 0.6] of two bins in five, one in (0.8, 1]; a bin takes its upper end."""
    out = report.measure_calibration(np.array([0.45, 0.55, 0.6, 0.6, 1.0]),
                                     np.array([True, False, True, True, False]), bins=5)
    assert [b["count"] for b in out["bins"]] == [0, 0, 4, 0, 1]
    assert out["bins"][2]["accuracy"] == pytest.approx(0.75)
    assert out["bins"][2]["confidence"] == pytest.approx(0.55)
    assert out["bins"][0] == {"low": 0.0, "high": 0.2, "count": 0, "accuracy": None,
                              "confidence": None}
    assert out["error"] == pytest.approx(4 / 5 * 0.2 + 1 / 5 * 1.0)


def test_calibration_against_a_loop_over_bins():
    generator = np.random.default_rng(1)
    confidence, right = generator.random(5000), generator.random(5000) < 0.7
    error = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        error += inside.sum() / 5000 * abs(right[inside].mean() - confidence[inside].mean())
    assert report.measure_calibration(confidence, right)["error"] == pytest.approx(error, rel=1e-9)


def test_calibration_of_a_broken_model_is_a_number():
    out = report.measure_calibration(np.full(3, np.nan, np.float32), np.zeros(3, bool))
    assert out["error"] == 0.0
    assert out["bins"][0]["count"] == 3


def test_wilson_interval():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81/263 and 0/20.
    assert report.wilson_interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert report.wilson_interval(0, 20) == pytest.approx((0.0, 16.11), abs=0.01)


def test_report_counts_each_class():
    judged = make_judged([0, 0, 0, 1, 1, 3], [0, 1, 1, 1, 0, -1], rank=[0, 1, 7, 0, 4, BROKEN],
                         confidence=[0.5, 0.5, 0.5, 0.5, 0.5, np.nan])
    out = report.make_report(judged, ("a", "b", "c", "d"))
    assert [c["count"] for c in out["per_class"]] == [3, 2, 0, 1]
    assert [c["top1"] for c in out["per_class"]] == [pytest.approx(100 / 3), 50.0, None, 0.0]
    assert [c["top5"] for c in out["per_class"]] == [pytest.approx(200 / 3), 100.0, None, 0.0]
    assert out["mean_class_top1"] == pytest.approx((100 / 3 + 50 + 0) / 3)
    assert out["most_confused"] == [
        {"label": "a", "predicted": "b", "count": 2, "share": pytest.approx(2 / 3)},
        {"label": "b", "predicted": "a", "count": 1, "share": 0.5}]
    assert (out["broken"], out["tied"]) == (1, 0)
    json.loads(json.dumps(out, allow_nan=False))


def test_a_right_answer_of_several_is_on_the_diagonal():
    judged = make_judged([0, 0], [2, 2], rank=[0, 1])
    label, predicted, images = report.count_confusion(judged)
    assert (label.tolist(), predicted.tolist(), images.tolist()) == ([0, 0], [0, 2], [1, 1])


def test_confusion_and_balanced_accuracy_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    judged = random_judged(7, 900)
    label, predicted, images = report.count_confusion(judged)
    table = np.zeros((7, 7), int)
    table[label, predicted] = images
    np.testing.assert_array_equal(table, metrics.confusion_matrix(judged.label, judged.predicted))
    assert report.make_report(judged, tuple("abcdefg"))["mean_class_top1"] == pytest.approx(
        100 * metrics.balanced_accuracy_score(judged.label, judged.predicted), rel=1e-12)


def test_only_competing_classes_and_labelled_images_stay():
    judged = make_judged([5, 2, -1, 5], [2, 2, 0, -1])
    competing = np.isin(np.arange(6), [2, 5])
    kept, names = report.keep_scored(judged, tuple("abcdef"), competing)
    assert names == ("c", "f")
    assert kept.label.tolist() == [1, 0, 1]
    assert kept.predicted.tolist() == [0, 0, -1]
    kept, names = report.keep_scored(judged, tuple("abcdef"), None)
    assert kept.label.tolist() == [5, 2, 5]
    assert names == tuple("abcdef")


def write(tmp_path, judged, names):
    made = {"x": 1, "per_class": []}
    report.write_report(made, report.count_confusion(judged), names, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == made
    return list(csv.reader((tmp_path / "confusion.csv").open(newline="")))


def test_few_classes_make_a_matrix(tmp_path):
    judged = make_judged([0, 0, 1, 2], [0, 1, 1, -1])
    assert write(tmp_path, judged, ("a", "b, c", "d")) == [
        ["label \\ predicted", "a", "b, c", "d", "(none)"], ["a", "1", "1", "0", "0"],
        ["b, c", "0", "1", "0", "0"], ["d", "0", "0", "0", "1"]]


def test_classes_have_a_table_of_their_own(tmp_path):
    judged = make_judged([0, 0, 1, 1], [0, 1, 1, -1])
    names = ("a", "b, c", "none")
    made = report.make_report(judged, names)
    report.write_report(made, report.count_confusion(judged), names, tmp_path)
    assert list(csv.reader((tmp_path / "classes.csv").open(newline=""))) == [
        ["name", "count", "precision", "recall", "f1", "top1", "top5"],
        ["a", "2", "100.0000", "50.0000", "66.6667", "50.0000", "100.0000"],
        ["b, c", "2", "50.0000", "50.0000", "50.0000", "50.0000", "100.0000"],
        ["none", "0", "", "", "", "", ""]]


def test_many_classes_make_a_list_of_pairs(tmp_path):
    names = tuple(f"n{i}" for i in range(21_841))
    lines = write(tmp_path, make_judged([21_840, 7, 7, 8], [3, 7, 7, -1]), names)
    assert lines == [["label", "predicted", "images", "label_name", "predicted_name"],
                     ["7", "7", "2", "n7", "n7"], ["8", "-1", "1", "n8", "(none)"],
                     ["21840", "3", "1", "n21840", "n3"]]


@pytest.mark.parametrize(("source", "unusual", "name"), [
    ("embedded", [], "embedded"), ("folder:/data/my photos/", [], "my-photos"),
    ("pack:data/photos", ["train"], "photos-train"), ("tfds:imagenet_a", [], "imagenet_a"),
    ("tfds:imagenet_v2/matched-frequency:3.0.0", ["384px", "square"],
     "imagenet_v2-matched-frequency-3.0.0-384px-square"), ("folder:..", [], "report"),
    ("binary:data/cifar-100-binary/", [], "cifar-100-binary")])
def test_a_report_is_called_by_its_set(source, unusual, name):
    assert report.name_folder(source, unusual) == name
