"""The figures of an evaluation that a paper needs, from the answers image by image, and its files.

Accuracies are in percent; probabilities, and what is made of them, are fractions.
"""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyvit_jax import log, scores
from tinyvit_jax.evaluate import Judged
from tinyvit_jax.scores import Confusion

BINS = 15  # of the calibration error: Guo et al. 2017, arXiv 1706.04599, table 1
DENSE = 100  # classes up to which confusion.csv is a whole matrix, and drawn as one
_PAIRS = 50  # most confused ones that the report keeps
_LISTED = 5  # worst classes that the command prints
_COLUMNS = ("name", "count", "precision", "recall", "f1", "top1", "top5")  # of classes.csv
_PLACES = ("folder", "pack", "binary")  # sources that are called by the end of their path
NONE = "(none)"  # how a broken or tied answer is called


def keep_scored(judged: Judged, class_names: tuple[str, ...], competing: np.ndarray | None
                ) -> tuple[Judged, tuple[str, ...]]:
    """Drops images without a label, and numbers the classes that compete from 0.

    Args:
        judged: the answers for all images.
        class_names: of the evaluation set.
        competing: bool [C], the classes that answers were chosen from; None for all.

    Returns:
        The answers for the images with a label, and the names of the classes that compete.
    """
    judged = Judged(*(x[judged.label >= 0] for x in judged))
    if competing is None:
        return judged, tuple(class_names)
    place = np.where(competing, np.cumsum(competing) - 1, -1)
    predicted = np.where(judged.predicted < 0, -1, place[judged.predicted])
    kept = np.flatnonzero(competing)
    return (judged._replace(label=place[judged.label], predicted=predicted),
            tuple(class_names[i] for i in kept))


def make_report(judged: Judged, names: tuple[str, ...]) -> dict[str, Any]:
    """Everything that can be said of N answers over C classes.

    An image with several right classes belongs to the one it came with, and any right answer to it
    counts as that one.

    Args:
        judged: from `keep_scored`, likewise the names.

    Returns:
        top1_interval: Wilson's 95 % interval of the top-1, in percent.
        mean_class_top1, mean_class_top5: means over the classes that have images, in percent.
        macro: {"precision", "recall", "f1"}, likewise; see scores.py, also for the next two.
        mcc: Matthews' correlation coefficient in percent.
        calibration: {"error", "bins"}; see `measure_calibration`.
        most_confused: up to 50 of {"label", "predicted", "count", "share"}, share of the label's
            images.
        per_class: of each class {"name", "count", "top1", "top5", "precision", "recall", "f1"} in
            percent, null where a class without images has none.
        broken: images that the model gave a NaN for.
        tied: wrong answers that are no answer: several classes tie at the top.
    """
    label, rank = judged.label, judged.rank
    counts = np.bincount(label, minlength=len(names))
    top1, top5 = (np.bincount(label[rank < k], minlength=len(names)) for k in (1, 5))
    has = counts > 0
    share1, share5 = (np.where(has, 100.0 * t / np.maximum(counts, 1), np.nan)
                      for t in (top1, top5))
    broken = int(np.isnan(judged.confidence).sum())
    confusion = count_confusion(judged)
    rates = scores.rate_classes(confusion, len(names))
    table = {"top1": share1, "top5": share5, "precision": rates.precision, "recall": rates.recall,
             "f1": rates.f1}
    return {
        "top1_interval": list(wilson_interval(int((rank < 1).sum()), len(rank))),
        "mean_class_top1": float(share1[has].mean()), "mean_class_top5": float(share5[has].mean()),
        "macro": scores.average(rates), "mcc": scores.correlate(confusion, len(names)),
        "calibration": measure_calibration(judged.confidence, rank < 1),
        "broken": broken, "tied": int((judged.predicted < 0).sum()) - broken,
        "most_confused": list_confused(confusion, counts, names),
        "per_class": [
            {"name": name, "count": int(n), **{key: _number(x[i]) for key, x in table.items()}}
            for i, (name, n) in enumerate(zip(names, counts, strict=True))],
    }


def _number(x: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(x) else float(x)


def wilson_interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share in percent, by default at 95 %: (low, high)."""
    p, n = right / count, count
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100.0 / (1 + z * z / n)
    return max(0.0, scale * (centre - half)), min(100.0, scale * (centre + half))


def measure_calibration(confidence: np.ndarray, right: np.ndarray, bins: int = BINS
                        ) -> dict[str, Any]:
    """The expected calibration error over bins of equal width: Guo et al. 2017, equation 3.

    Args:
        confidence: float [N], the largest probability of each answer; a NaN counts as 0.
        right: bool [N].
        bins: how many; bin m of M holds confidences in ((m - 1) / M, m / M].

    Returns:
        {"error": sum over bins of n / N |accuracy - confidence|, "bins": [{"low", "high", "count",
        "accuracy", "confidence"}]}, all fractions; null in an empty bin.
    """
    confidence = np.nan_to_num(confidence.astype(np.float64))
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    accuracy = np.bincount(place, right, bins) / np.maximum(counts, 1)
    mean = np.bincount(place, confidence, bins) / np.maximum(counts, 1)
    return {
        "error": float((counts * np.abs(accuracy - mean)).sum() / len(right)),
        "bins": [{"low": m / bins, "high": (m + 1) / bins, "count": int(n),
                  "accuracy": float(a) if n else None, "confidence": float(c) if n else None}
                 for m, (n, a, c) in enumerate(zip(counts, accuracy, mean, strict=True))],
    }


def count_confusion(judged: Judged) -> Confusion:
    """Counts how often each label was answered with each class, pairs that occur alone.

    Returns:
        label, predicted and images, int64 [P] each, ascending by label and then by prediction.
    """
    predicted = np.where(judged.rank < 1, judged.label, judged.predicted)
    pairs, images = np.unique(np.stack([judged.label, predicted], -1).astype(np.int64), axis=0,
                              return_counts=True)
    return pairs[:, 0], pairs[:, 1], images


def list_confused(confusion: Confusion, counts: np.ndarray, names: tuple[str, ...]
                  ) -> list[dict[str, Any]]:
    """The wrong answers that were given most often, up to 50.

    Args:
        confusion: from `count_confusion`.
        counts: images of each class, int [C].
        names: of the classes.
    """
    label, predicted, images = confusion
    wrong = np.flatnonzero((label != predicted) & (predicted >= 0))
    most = wrong[np.argsort(-images[wrong], kind="stable")][:_PAIRS]
    return [{"label": names[label[i]], "predicted": names[predicted[i]], "count": int(images[i]),
             "share": float(images[i] / counts[label[i]])} for i in most]


def write_report(made: dict[str, Any], confusion: Confusion, names: tuple[str, ...], folder: Path
                 ) -> None:
    """Writes report.json, classes.csv (a line for each class) and confusion.csv.

    Up to 100 classes the CSV is a matrix, labels down and predictions across; of more classes it
    has a line for each pair that occurs, as 21,841 classes would make a matrix of 477 million.
    """
    label, predicted, images = confusion
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    if len(names) <= DENSE:
        lines.writerow(["label \\ predicted", *names, NONE])
        table = np.zeros((len(names), len(names) + 1), np.int64)
        table[label, predicted] = images  # -1 is the last column
        lines.writerows([name, *row] for name, row in zip(names, table.tolist(), strict=True))
    else:
        called = (*names, NONE)
        lines.writerow(["label", "predicted", "images", "label_name", "predicted_name"])
        lines.writerows([i, j, n, names[i], called[j]] for i, j, n in zip(
            label.tolist(), predicted.tolist(), images.tolist(), strict=True))
    log.write_atomic(folder / "confusion.csv", text.getvalue().encode())
    _write_classes(made["per_class"], folder / "classes.csv")
    log.write_json(folder / "report.json", made)


def _write_classes(per_class: list[dict[str, Any]], path: Path) -> None:
    """The table of single classes; what a class has no number for stays empty."""
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(_COLUMNS)
    for row in per_class:
        lines.writerow([f"{x:.4f}" if isinstance(x, float) else x
                        for x in (row[key] for key in _COLUMNS)])
    log.write_atomic(path, text.getvalue().encode())


def name_folder(source: str, unusual: Sequence[str]) -> str:
    """What the folder of a report is called: "imagenet_v2-matched-frequency", "photos-384px".

    Args:
        source: name of the source.
        unusual: what else tells this evaluation from others of the same set.
    """
    scheme, _, rest = source.partition(":")
    own = rest.rstrip("/").rpartition("/")[2] if scheme in _PLACES else rest or scheme
    return re.sub(r"[^\w.-]+", "-", "-".join([own, *unusual])).strip("-.") or "report"


def format_report(made: dict[str, Any], folder: Path) -> str:
    """The few lines that the command prints."""
    low, high = made["top1_interval"]
    loss = "not finite" if made["loss"] is None else f"{made['loss']:.4f}"
    lines = [
        f"{made['source']}: top-1 {made['top1']:.2f} %  top-5 {made['top5']:.2f} %  loss {loss}  "
        f"over {made['count']:,} images",
        f"top-1 is within {low:.2f} to {high:.2f} % (95 %); expected calibration error "
        f"{made['calibration']['error']:.4f}",
        "mean over classes: precision {precision:.2f} %  recall {recall:.2f} %  F1 {f1:.2f} %; MCC "
        "{mcc:.2f} %".format(**made["macro"], mcc=made["mcc"]),
        f"weights {made['weights']['path']}, {made['image_size']} pixels, crop {made['crop']}",
    ]
    if made["classes"]["competing"] < made["classes"]["of"]:
        lines.append("answers chosen from the {competing:,} of {of:,} classes that have images"
                     .format(**made["classes"]))
    if made["left_out"]:
        lines.append(f"{made['left_out']:,} images have no label and are not scored")
    if made["broken"] or made["tied"]:
        lines.append(f"{made['broken'] + made['tied']:,} images have no answer and count as wrong: "
                     f"a NaN for {made['broken']:,}, a tie at the top for {made['tied']:,}")
    rated = sorted((c for c in made["per_class"] if c["count"]), key=lambda c: c["top1"])
    lines.append("worst classes: " + ", ".join(
        f"{c['name']} {c['top1']:.1f} %" for c in rated[:_LISTED]))
    drawn = "confusion.png, " if len(made["per_class"]) <= DENSE else ""
    return "\n".join([*lines, f"report: {folder}/report.json, report.png, {drawn}confusion.csv, "
                      f"classes.csv"])
