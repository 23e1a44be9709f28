"""The labels of a whole set, read once without decoding an image."""

import re

import numpy as np

from tinyvit_jax.data.source import ImageSource

_CHUNK = 256  # images of a reading

# Sets that show 200 of ImageNet's 1,000 classes and are scored over these alone:
# Hendrycks et al., arXiv 1907.07174 and 2006.16241.
_OF_SOME_CLASSES = ("imagenet_a", "imagenet_r")


def has_several(source: ImageSource) -> bool:
    """Whether images of a set have any number of labels instead of one."""
    return source[0].labels is not None


def read_labels(source: ImageSource) -> np.ndarray:
    """Every right class of every image.

    Returns:
        int32 [N, M], ascending in each row and filled up with -1; M is 1 where each image has one.
    """
    found: list[tuple[int, ...]] = []
    for start in range(0, len(source), _CHUNK):
        examples = source.read(range(start, min(start + _CHUNK, len(source))))
        found += [(e.label,) if e.labels is None else e.labels for e in examples]
    return pad_labels(found, max(1, max(map(len, found))))


def pad_labels(labels: list[tuple[int, ...]], width: int) -> np.ndarray:
    """Rows of any length as one table: int32 [len(labels), width], filled up with -1."""
    table = np.full((len(labels), width), -1, np.int32)
    for row, own in zip(table, labels, strict=True):
        row[:len(own)] = own
    return table


def scores_present_only(rule: str, name: str) -> bool:
    """Whether answers are chosen from the classes that a set has images of, or from all.

    Args:
        rule: config.eval.classes: all | present | auto, which knows sets that are scored so.
        name: of the source.
    """
    return rule == "present" or (
        rule == "auto" and re.split("[:/]", f"{name}:")[:2] in [["tfds", s] for s in
                                                               _OF_SOME_CLASSES])


def find_present(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Which classes [N, M] labels name: bool [num_classes]."""
    return np.isin(np.arange(num_classes), labels)
