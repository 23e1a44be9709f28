"""Precision, recall, F1 and Matthews' coefficient, from how often each label got each answer.

They are scikit-learn's, where "no answer" is one more class that images are taken for and that none
belongs to: an image without an answer is missed by its own class and claimed by no other.
"""

import math
from typing import NamedTuple

import numpy as np

Confusion = tuple[np.ndarray, np.ndarray, np.ndarray]  # label, predicted (-1: none), images


class Rates(NamedTuple):
    """Of each of C classes, float64 [C] in percent; NaN where there is nothing to divide by.

    Attributes:
        precision: share of the images taken for the class that are of it. 0 where none is taken
            for a class that has images; NaN for a class that has none and is never answered.
        recall: share of the class's images that are taken for it; NaN without images.
        f1: harmonic mean of the two, 0 where both are 0; NaN without images.
        support: int64, images of the class.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray


def rate_classes(confusion: Confusion, num_classes: int) -> Rates:
    """Rates every class.

    Args:
        confusion: from `report.count_confusion`.
        num_classes: C.
    """
    label, predicted, images = confusion
    right, answered = label == predicted, predicted >= 0
    hits = _add(label[right], images[right], num_classes)
    count = _add(label, images, num_classes)
    claimed = _add(predicted[answered], images[answered], num_classes)
    precision = 100.0 * hits / np.maximum(claimed, 1)
    return Rates(
        precision=np.where(count + claimed > 0, precision, np.nan),
        recall=np.where(count > 0, 100.0 * hits / np.maximum(count, 1), np.nan),
        f1=np.where(count > 0, 200.0 * hits / np.maximum(count + claimed, 1), np.nan),
        support=count)


def _add(place: np.ndarray, images: np.ndarray, num_classes: int) -> np.ndarray:
    """Sums of images by class, int64 [C]."""
    total = np.zeros(num_classes, np.int64)
    np.add.at(total, place, images)
    return total


def average(rates: Rates) -> dict[str, float]:
    """Plain means over the classes that have images: {"precision", "recall", "f1"} in percent."""
    has = rates.support > 0
    return {key: float(getattr(rates, key)[has].mean()) for key in ("precision", "recall", "f1")}


def correlate(confusion: Confusion, num_classes: int) -> float:
    """Matthews' correlation coefficient of labels and answers in percent, from -100 to 100.

    For several classes it is Gorodkin's R_K (Computational Biology and Chemistry 28, 2004, equation
    8); 0 where all labels or all answers are the same.

    Args:
        confusion: from `report.count_confusion`.
        num_classes: C.
    """
    label, predicted, images = confusion
    # Whole numbers of Python: squares of a million images overflow no int64, their products do.
    said = _add(np.where(predicted < 0, num_classes, predicted), images, num_classes + 1).tolist()
    true = _add(label, images, num_classes + 1).tolist()
    total, right = sum(true), int(images[label == predicted].sum())
    between = right * total - sum(t * s for t, s in zip(true, said, strict=True))
    spread = (total**2 - sum(t * t for t in true)) * (total**2 - sum(s * s for s in said))
    return 100.0 * between / math.sqrt(spread) if spread else 0.0
