"""Precision, recall, F1 and MCC against scikit-learn, and the cases it leaves open."""

import numpy as np
import pytest
from test_report import make_judged, random_judged

from tinyvit_jax import report, scores
from tinyvit_jax.evaluate import BROKEN

metrics = pytest.importorskip("sklearn.metrics")


def measure(judged, classes):
    confusion = report.count_confusion(judged)
    rates = scores.rate_classes(confusion, classes)
    return rates, scores.average(rates), scores.correlate(confusion, classes)


def answers(judged):
    """What scikit-learn is given: any right answer is the label, none is -1."""
    return judged.label, np.where(judged.rank < 1, judged.label, judged.predicted)


@pytest.mark.parametrize(("classes", "images", "none"), [(2, 50, 0), (10, 2000, 0), (10, 900, 60),
                                                         (100, 5000, 200), (30, 20, 3)])
def test_scores_are_those_of_scikit_learn(classes, images, none):
    judged = random_judged(classes, images, seed=classes)
    predicted, rank = judged.predicted.copy(), judged.rank.copy()
    predicted[:none], rank[:none] = -1, BROKEN
    judged = judged._replace(predicted=predicted, rank=rank)
    rates, macro, mcc = measure(judged, classes)
    label, said = answers(judged)
    has = np.unique(label)  # with 20 images not all of 30 classes
    expected = metrics.precision_recall_fscore_support(label, said, labels=has, zero_division=0)
    for found, wanted in zip(rates, expected, strict=True):
        scale = 1 if found is rates.support else 100
        np.testing.assert_allclose(found[has], scale * wanted, rtol=1e-12)
    for key, function in (("precision", metrics.precision_score), ("recall", metrics.recall_score),
                          ("f1", metrics.f1_score)):
        wanted = 100 * function(label, said, labels=has, average="macro", zero_division=0)
        assert macro[key] == pytest.approx(wanted, rel=1e-12), key
    assert mcc == pytest.approx(100 * metrics.matthews_corrcoef(label, said), rel=1e-9)


def test_top1_is_the_accuracy_and_recall_its_share_in_each_class():
    judged = random_judged(7, 900)
    made = report.make_report(judged, tuple("abcdefg"))
    label, said = answers(judged)
    assert 100 * metrics.accuracy_score(label, said) == pytest.approx(
        100 * (judged.rank < 1).mean(), rel=1e-12)
    for row in made["per_class"]:
        assert row["recall"] == pytest.approx(row["top1"], rel=1e-12)
    assert made["macro"]["recall"] == pytest.approx(made["mean_class_top1"], rel=1e-12)


def test_top5_is_scikit_learns():
    generator = np.random.default_rng(4)
    logits = generator.normal(size=(400, 12))
    label = generator.integers(0, 12, 400)
    rank = (logits > logits[np.arange(400), label][:, None]).sum(-1)
    judged = make_judged(label, logits.argmax(-1), rank=rank)
    wanted = 100 * metrics.top_k_accuracy_score(label, logits, k=5, labels=range(12))
    from tinyvit_jax import evaluate

    assert evaluate.score(judged)["top5"] == pytest.approx(wanted, rel=1e-12)


def test_a_case_counted_by_hand():
    """a: 3 images, 1 right, 1 taken for b, 1 without answer; b: 1, right; c: none, answered once;
    d: 1 image, taken for c; e: none of both."""
    judged = make_judged([0, 0, 0, 1, 3], [0, 1, -1, 1, 2])
    rates, macro, _ = measure(judged, 5)
    np.testing.assert_allclose(rates.precision, [100, 50, 0, 0, np.nan])
    np.testing.assert_allclose(rates.recall, [100 / 3, 100, np.nan, 0, np.nan])
    np.testing.assert_allclose(rates.f1, [50, 200 / 3, np.nan, 0, np.nan])
    assert rates.support.tolist() == [3, 1, 0, 1, 0]
    assert macro == {"precision": pytest.approx(50), "recall": pytest.approx((100 / 3 + 100) / 3),
                     "f1": pytest.approx((50 + 200 / 3) / 3)}


@pytest.mark.parametrize("predicted", [[0, 0, 0, 0], [-1, -1, -1, -1]])
def test_a_constant_answer_correlates_with_nothing(predicted):
    judged = make_judged([0, 1, 2, 3], predicted)
    assert measure(judged, 4)[2] == 0.0
    assert metrics.matthews_corrcoef([0, 1, 2, 3], predicted) == 0.0


def test_perfect_and_reversed_answers():
    assert measure(make_judged([0, 1, 0, 1], [0, 1, 0, 1]), 2)[2] == pytest.approx(100)
    assert measure(make_judged([0, 1, 0, 1], [1, 0, 1, 0]), 2)[2] == pytest.approx(-100)


def test_large_counts_do_not_overflow():
    confusion = (np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]),
                 np.array([7, 1, 1, 7]) * 4_000_000_000)
    assert scores.correlate(confusion, 2) == pytest.approx(75)


def test_several_right_labels_count_as_the_images_own():
    judged = make_judged([0, 0, 1], [2, 2, 1], rank=[0, 1, 0])
    rates, _, _ = measure(judged, 3)
    np.testing.assert_allclose(rates.recall[:2], [50, 100])
    np.testing.assert_allclose(rates.precision, [100, 100, 0])
