"""How the arrays of a state dict become a model's variables: each is used, and used once."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from tinyvit_jax.convert import tree
from tinyvit_jax.convert.files import WeightsError

Head = Literal["strict", "new"]

_log = logging.getLogger(__name__)


class Model(Protocol):
    """What conversion asks of a model."""

    num_classes: int

    def variable_shapes(self) -> dict:
        """Variables with anything that has a shape for leaves."""


class Rules(NamedTuple):
    """What a family says of its arrays in PyTorch.

    Attributes:
        title: what the arrays are, for messages: "the weights of CLIP".
        key: a variable's path -> its key.
        fit: (found, path, shape of the variable) -> the variable, or None where it cannot be.
        expected: (path, shape of the variable) -> the shape in PyTorch, for messages.
        heads: modules of ours that are classifiers.
        start: (path, shape) -> the variable where the weights have none and head is "new", or None.
    """

    title: str
    key: Callable[[tree.Path], str]
    fit: Callable[[np.ndarray, tree.Path, tuple[int, ...]], np.ndarray | None]
    expected: Callable[[tree.Path, tuple[int, ...]], tuple[int, ...]] = (
        lambda path, shape: tree.torch_shape(shape, path))
    heads: tuple[str, ...] = ("head",)
    start: Callable[[tree.Path, tuple[int, ...]], np.ndarray | None] = lambda path, shape: None

    def head_keys(self) -> list[str]:
        """The keys of the classifiers."""
        return [self.key(("params", head, leaf)) for head in self.heads
                for leaf in ("kernel", "bias")]


def fill(arrays: Mapping[str, Any], model: Model, head: Head, rules: Rules) -> dict[str, Any]:
    """Makes a model's variables of a state dict.

    A model of no classes leaves a classifier out.

    Args:
        arrays: by key, without what the model never has a use for.
        model: what they are for.
        head: where the number of classes differs: "strict" refuses, "new" starts at zeros.
        rules: of the family whose keys these are.

    Returns:
        {"params", "batch_stats"} of float32 arrays; the latter may be empty.

    Raises:
        WeightsError: any key unused or missing, or of another shape; the message lists all.
    """
    if head not in ("strict", "new"):
        raise ValueError(f"head={head!r} cannot work: expected strict or new")
    left = dict(arrays)
    old_head = {key: np.shape(left[key]) for key in rules.head_keys() if key in left}
    if not model.num_classes:
        left = {key: value for key, value in left.items() if key not in old_head}
    result: dict[tree.Path, np.ndarray] = {}
    faults: list[str] = []
    new_head = False
    for path, leaf in tree.flatten(model.variable_shapes()).items():
        key = rules.key(path)
        found = np.asarray(left.pop(key)) if key in left else None
        value = None if found is None else rules.fit(found, path, leaf.shape)
        if value is None and head == "new":
            if path[1] in rules.heads:
                value, new_head = np.zeros(leaf.shape, np.float32), True
            elif found is None:
                value = rules.start(path, leaf.shape)
        if value is None:
            faults.append(tree.describe_fault(key, found, rules.expected(path, leaf.shape)))
        else:
            result[path] = value
    faults += [f"unused: {key} {np.shape(value)}" for key, value in left.items()]
    _raise_faults(faults, rules, model.num_classes)
    _log_head(model, old_head, new_head)
    return tree.nest(result, {"params": {}, "batch_stats": {}})


def _raise_faults(faults: list[str], rules: Rules, num_classes: int) -> None:
    """Raises WeightsError naming every key that does not fit."""
    if not faults:
        return
    advice = ""
    if any(f" {key} " in fault for key in rules.head_keys() for fault in faults):
        advice = (f' For a classifier of {num_classes} classes that starts at zero give head="new"'
                  ', for the features alone num_classes=0.')
    raise WeightsError(
        f"{rules.title} do not fit the model: {len(faults)} keys. Check that the variant, its "
        f"widths, depths and patches are those the weights were trained with.{advice} "
        + "; ".join(sorted(faults)))


def _log_head(model: Model, old: Mapping[str, tuple[int, ...]], new: bool) -> None:
    """One line on a classifier that is not that of the weights."""
    if new:
        had = f"had {max(shape[0] for shape in old.values())}" if old else "had none"
        _log.info("the classifier of %d classes starts at zero: the weights %s. To keep classes of "
                  "the same name, name those of the weights: trained_names=, or "
                  "--config.model.class_names=FILE", model.num_classes, had)
    elif old and not model.num_classes:
        _log.info("left out %s: the model has no classifier", " and ".join(old))
