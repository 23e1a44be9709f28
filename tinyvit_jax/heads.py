"""Classifiers by the names of their classes: read from a file, matched, carried over."""

import collections
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tinyvit_jax import log
from tinyvit_jax.convert.files import WeightsError

_CLASSES_22K = 21841  # of ImageNet-22k


def map_head(variables: dict, trained: tuple[str, ...], wanted: tuple[str, ...]) -> dict:
    """Gives the classifier the wanted classes, each by its name; a distillation head likewise.

    A class without a counterpart takes the mean of those that have one, as the original does from
    21,841 classes to 1,000; where no name is shared the head starts at zero.

    Args:
        variables: {"params", "batch_stats"}; without a head they come back as they are.
        trained: names of the head's classes, in order.
        wanted: names to have, in order.

    Raises:
        WeightsError: `trained` are not as many as the head's classes.
    """
    if "head" not in variables["params"]:
        return variables
    check_count(trained, variables["params"]["head"]["bias"].size, "trained_names")
    if trained == wanted:
        return variables
    check_distinct(trained)
    place = {name: i for i, name in enumerate(trained)}
    known = np.array([name in place for name in wanted])
    rows = np.array([place.get(name, 0) for name in wanted])
    _log_mapping([name for name in wanted if name not in place], len(wanted))

    def fit(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)[..., rows]
        mean = x[..., known].mean(-1, keepdims=True) if known.any() else np.zeros_like(x[..., :1])
        return np.where(known, x, mean)

    params = {name: {key: fit(x) for key, x in part.items()} if name in ("head", "head_dist")
              else part for name, part in variables["params"].items()}
    return {**variables, "params": params}


def find_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names of a workdir's classes, or none where it was converted without any."""
    names = tuple(class_names)
    return () if names == tuple(f"class {i}" for i in range(len(names))) else names


def check_distinct(names: Sequence[str]) -> None:
    """Raises WeightsError where classes go by name and two have the same."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise WeightsError(f"{len(twice)} class names stand twice ({', '.join(twice[:5])}): nobody "
                           f"can tell these classes apart. Give names that differ, for instance "
                           f"WordNet ids.")


def _log_mapping(missing: list[str], count: int) -> None:
    """One line on how many classes were found by name, and what becomes of the others."""
    text = f"The classifier has {count - len(missing)} of {count} classes by name"
    if missing:
        first = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        text += f"; {len(missing)} were not trained ({first})"
        text += ", so it starts at zero" if len(missing) == count else " and take the others' mean"
    log.logger.info("%s.", text)


def check_count(names: tuple[str, ...], count: int, key: str) -> None:
    """Raises WeightsError where there is not one name for each class; `key` says whose names."""
    if len(names) != count:
        raise WeightsError(
            f"{key} holds {len(names)} names ({', '.join(names[:3])} ...), and the classifier has "
            f"{count} classes. Give one name for each class, in the order of its training.")


def read_class_names(path: str | Path, num_classes: int = 0,
                     imagenet_names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Reads the names of a classifier's classes from a text file, one a line.

    The original's imagenet_1kto22k.txt is understood too: for each class of ImageNet-1k, in the
    order of their WordNet ids, its index among the 21,841 of ImageNet-22k, or -1 for none.

    Args:
        path: of the file; blank lines do not count.
        num_classes: of the classifier; 0 = as many as the file names, or 21,841 for that list.
        imagenet_names: the WordNet ids of ImageNet-1k, needed for that list alone.

    Returns:
        A name for each class; "class i" for those that the original's list does not tell.

    Raises:
        WeightsError: no such file, or a number of names that does not fit.
    """
    if not Path(path).is_file():
        raise WeightsError(f"The file of class names {path} does not exist. Give a text file with "
                           f"one class a line, in the order of the classifier.")
    lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    indices = _read_indices(lines)
    if indices and num_classes != len(lines):
        return _spread_names(path, indices, num_classes or _CLASSES_22K, imagenet_names)
    check_distinct(lines)
    if num_classes:
        check_count(tuple(lines), num_classes, str(path))
    return tuple(lines)


def _read_indices(lines: list[str]) -> list[int]:
    """The numbers of the original's list, or none where the lines are names."""
    if len(lines) != 1000 or not all(re.fullmatch(r"-1|\d+", line) for line in lines):
        return []
    indices = [int(line) for line in lines]
    return indices if min(indices) < 0 or max(indices) >= len(lines) else []


def _spread_names(path: str | Path, indices: list[int], num_classes: int,
                  imagenet_names: tuple[str, ...]) -> tuple[str, ...]:
    """Gives the classes at `indices` the names of ImageNet-1k."""
    if len(imagenet_names) != len(indices):
        raise WeightsError(
            f"{path} tells where the 1,000 classes of ImageNet-1k are among {num_classes:,}, and "
            f"not what they are called: {len(imagenet_names)} names were given with it. Give the "
            f"1,000 WordNet ids in their order, or a file with one class name a line.")
    used = [i for i in indices if i >= 0]
    if len(set(used)) < len(used) or max(used) >= num_classes:
        raise WeightsError(f"{path} does not fit a classifier of {num_classes} classes: its "
                           f"largest index is {max(used)}, and {len(used) - len(set(used))} stand "
                           f"there twice. Give the list that belongs to these weights.")
    names = [f"class {i}" for i in range(num_classes)]
    for i, name in zip(indices, imagenet_names, strict=True):
        if i >= 0:
            names[i] = name
    return tuple(names)
