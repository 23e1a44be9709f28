"""What the tables of convolutional networks share: keys stripped, arrays fitted, faults told."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinyvit_jax.convert import fill, tree
from tinyvit_jax.convert.files import State, WeightsError, unwrap
from tinyvit_jax.convert.fill import Head, Model

# ImageNet's, of pixels scaled to [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_RATIO = 224 / 256

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class Table(NamedTuple):
    """How a PyTorch class calls the variables of a family."""

    family: str  # for messages
    layout: str
    key: Callable[[tree.Path], str]  # a variable's path -> its key
    # a key and the shape by PyTorch's habit -> the shape that this class has instead
    shape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda key, shape: shape


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays that are learned, without what parallel training put before their keys.

    Args:
        state: arrays by key, with or without {"model": ...} around them.

    Returns:
        The same without num_batches_tracked, which nothing reads where momentum is fixed.
    """
    state = unwrap(state)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def leaf_name(leaf: str) -> str:
    """PyTorch's name of a variable's last word."""
    return _LEAVES.get(leaf, leaf)


def choose_layout(family: str, layout: str, layouts: Sequence[str]) -> str:
    """The layout to write, where the family has it.

    Raises:
        WeightsError: one that the family does not have.
    """
    if layout not in layouts:
        raise WeightsError(f"weights of a {family} are written in the layout of "
                           f"{' or '.join(layouts)}, and {layout} was asked for. Give "
                           f"--layout={layouts[0]}, or leave it out.")
    return layout


def to_torch(variables: Mapping[str, Any], table: Table) -> State:
    """Names and transposes variables for a PyTorch class, for load_state_dict(strict=True).

    Args:
        variables: {"params", "batch_stats"}.
        table: of the class.

    Returns:
        Arrays by key, with num_batches_tracked of 0 beside every running variance.
    """
    state: State = {}
    for path, value in tree.flatten(variables).items():
        key = table.key(path)
        value = tree.transpose_to_torch(np.asarray(value, np.float32), path)
        state[key] = value.reshape(table.shape(key, value.shape))
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state


def from_torch(state: Mapping[str, Any], model: Model, head: Head, table: Table
               ) -> dict[str, Any]:
    """Makes a model's variables of PyTorch weights; each key is used, and used once.

    Matrices may be kept as 1x1 convolutions. A model of no classes leaves a head out.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        model: what they are for.
        head: where the number of classes differs: "strict" refuses, "new" starts at zeros.
        table: of the class whose keys these are.

    Returns:
        {"params", "batch_stats"} of float32 arrays.

    Raises:
        WeightsError: any key unused or missing, or of another shape; the message lists all.
    """

    def fit(found: np.ndarray, path: tree.Path, shape: tuple[int, ...]) -> np.ndarray | None:
        wanted = tree.torch_shape(shape, path)
        if _long_axes(found.shape) != _long_axes(wanted):
            return None
        return tree.transpose_to_ours(found.astype(np.float32, copy=False).reshape(wanted), path)

    def expected(path: tree.Path, shape: tuple[int, ...]) -> tuple[int, ...]:
        return table.shape(table.key(path), tree.torch_shape(shape, path))

    title = f"the weights of a {table.family} (in the layout of {table.layout})"
    return fill.fill(strip(state), model, head, fill.Rules(title, table.key, fit, expected))


def count_blocks(keys: Iterable[str], pattern: str, first: int) -> tuple[int, ...]:
    """How many blocks each stage has.

    Args:
        keys: of a state dict.
        pattern: a regular expression for the start of a block's key; its groups are the numbers of
            stage and block.
        first: the first stage's number.

    Returns:
        One number for each stage, up to the first that has no block.
    """
    blocks = {(int(m[1]), int(m[2])) for key in keys if (m := re.match(pattern, key))}
    depths: list[int] = []
    while count := sum(stage == first + len(depths) for stage, _ in blocks):
        depths.append(count)
    return tuple(depths)


def find_shape(arrays: Mapping[str, Any], key: str, axes: int, family: str) -> tuple[int, ...]:
    """The shape of an array that tells the model's.

    Raises:
        WeightsError: where it is missing or has another number of axes.
    """
    shape = np.shape(arrays.get(key, ()))
    if len(shape) != axes:
        raise WeightsError(f"these are not a whole {family}'s weights: {key} is "
                           f"{shape if key in arrays else 'missing'}; expected {axes} axes")
    return shape


def count_classes(state: Mapping[str, Any], table: Table) -> int:
    """How many classes a state dict's classifier has; 0 where it has none."""
    found = strip(state).get(table.key(("params", "head", "kernel")))
    return 0 if found is None else len(found)


def _long_axes(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]
