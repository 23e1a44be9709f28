"""What every table between our variables and PyTorch keys needs: paths, axes, words of faults."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]  # ("params", "head", "kernel")

# Kernels by their number of axes: [in, out] for [out, in], [h, w, in, out] for [out, in, h, w].
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}


def flatten(tree: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    """Nested dicts to one of paths; empty dicts leave nothing."""
    flat: dict[Path, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, (*path, name)) if nested else {(*path, name): value}
    return flat


def nest(flat: Mapping[Path, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Puts values at their paths into nested dicts, and gives these back."""
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def transpose_to_torch(value: np.ndarray, path: Path) -> np.ndarray:
    """Reorders the axes of a kernel; other variables are the same in both worlds."""
    return value.transpose(_TO_TORCH[value.ndim]) if path[-1] == "kernel" else value


def transpose_to_ours(value: np.ndarray, path: Path) -> np.ndarray:
    """Undoes `transpose_to_torch`."""
    return value.transpose(_TO_OURS[value.ndim]) if path[-1] == "kernel" else value


def torch_shape(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """The shape that one of our variables has in PyTorch."""
    return tuple(shape[i] for i in _TO_TORCH[len(shape)]) if path[-1] == "kernel" else shape


def describe_fault(key: str, found: np.ndarray | None, expected: tuple[int, ...]) -> str:
    """One line on a key that is missing or of another shape."""
    if found is None:
        return f"missing: {key} {expected}"
    return f"mis-shaped: {key} is {found.shape}, expected {expected}"
