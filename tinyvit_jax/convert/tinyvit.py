"""TinyViT's weights between our variables and the two PyTorch layouts, Microsoft's and timm's.

Our module names are Microsoft's with `layers_1` for `layers.1`, so the table is short: a rule for
the path, one for the last word, and the renames that timm made.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from tinyvit_jax.convert.files import State, WeightsError, unwrap
from tinyvit_jax.convert.resize import resize_bias_table

Layout = Literal["microsoft", "timm"]
Path = tuple[str, ...]  # ("params", "layers_1", "blocks_0", "attn", "qkv", "kernel")



class Model(Protocol):
    """What conversion asks of a model; models.TinyViT is one."""

    num_classes: int
    window_sizes: tuple[int, ...]

    def variable_shapes(self) -> dict:
        """Variables with anything that has a shape for leaves."""


_log = logging.getLogger(__name__)

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Kernels by their number of axes: [in, out] for [out, in], [h, w, in, out] for [out, in, h, w].
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_TO_OURS = {2: (1, 0), 4: (2, 3, 1, 0)}
# Buffers that follow from the rest; num_batches_tracked is not used where momentum is fixed.
_DERIVED = ("num_batches_tracked", "attention_bias_idxs")
# A segmentation model of which TinyViT is the trunk, and what else its files hold.
_TRUNK = "image_encoder."
_AROUND = ("image_encoder.neck.", "prompt_encoder.", "mask_decoder.")


def to_torch(variables: Mapping[str, Any], layout: Layout = "microsoft") -> State:
    """Names and transposes variables for a PyTorch class, for load_state_dict(strict=True).

    Args:
        variables: {"params", "batch_stats"} of a TinyViT.
        layout: whose class: "microsoft" or "timm".

    Returns:
        Arrays by key, with num_batches_tracked of 0. The classes rebuild attention_bias_idxs
        themselves and refuse it.

    Raises:
        ValueError: an unknown layout.
    """
    _check_layout(layout)
    state: State = {}
    for path, value in _flatten(variables).items():
        key = torch_key(path, layout)
        state[key] = _transpose(np.asarray(value, np.float32), path, _TO_TORCH)
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state


def from_torch(state: Mapping[str, Any], model: Model,
               head: Literal["strict", "new"] = "strict") -> dict[str, Any]:
    """Makes a model's variables of PyTorch weights; each key is used, and used once.

    Understood are both layouts, {"model": ...} around the weights, "module." before every key, and
    the trunk of a segmentation model under "image_encoder.". Bias tables of other windows are
    resized.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        model: what they are for.
        head: where the number of classes differs: "strict" refuses, "new" starts at zeros.

    Returns:
        {"params", "batch_stats"} of float32 arrays.

    Raises:
        WeightsError: any key unused or missing, or of another shape; the message lists all.
    """
    if head not in ("strict", "new"):
        raise ValueError(f"head={head!r} cannot work: expected strict or new")
    left = strip(unwrap(state))
    layout = detect_layout(left)
    result: dict[Path, np.ndarray] = {}
    faults, resized, renewed = [], [], []
    for path, leaf in _flatten(model.variable_shapes()).items():
        key = torch_key(path, layout)
        found = np.asarray(left.pop(key)) if key in left else None
        value = None if found is None else _fit(found, path, leaf.shape)
        if found is not None and value is not None and value.size != found.size:
            resized.append(key)
        if value is None and head == "new" and path[1] == "head":
            value = np.zeros(leaf.shape, np.float32)
            renewed.append(key)
        if value is None:
            faults.append(_fault(key, found, _torch_shape(path, leaf.shape)))
        else:
            result[path] = value
    if head == "new" and not model.num_classes:
        renewed = [key for key in _head_keys(layout) if left.pop(key, None) is not None]
    faults += [f"unused: {key} {np.shape(value)}" for key, value in left.items()]
    _raise_faults(faults, layout)
    _log_changes(model, resized, renewed)
    return _nest(result)


def torch_key(path: Path, layout: Layout) -> str:
    """A variable's name in a PyTorch class.

    Args:
        path: such as ("params", "layers_1", "blocks_0", "attn", "qkv", "kernel").
        layout: whose class.

    Returns:
        Such as "layers.1.blocks.0.attn.qkv.weight".
    """
    words = [re.sub(r"_(\d+)$", r".\1", word) for word in path[1:-1]]
    key = ".".join([*words, _LEAVES.get(path[-1], path[-1])])
    return key if layout == "microsoft" else _to_timm(key)


def _to_timm(key: str) -> str:
    """timm's name of one of Microsoft's keys."""
    key = re.sub(r"^patch_embed\.seq\.([02])\.", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}.",
                 key)
    # timm counts the way down as the start of the next stage.
    key = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", key)
    key = re.sub(r"^layers\.", "stages.", key)
    key = re.sub(r"^head\.", "head.fc.", key)
    return re.sub(r"^norm_head\.", "head.norm.", key).replace(".c.", ".conv.")


def detect_layout(state: Mapping[str, Any]) -> Layout:
    """Whose class the keys are of; raises WeightsError where they are of neither."""
    if any(key.startswith("layers.") for key in state):
        return "microsoft"
    if any(key.startswith("stages.") for key in state):
        return "timm"
    raise WeightsError(f"these are not TinyViT's weights: no key begins with layers. (Microsoft's) "
                       f"or stages. (timm's); the first keys are {', '.join(list(state)[:5])}")


def _check_layout(layout: str) -> None:
    if layout not in ("microsoft", "timm"):
        raise ValueError(f"layout={layout!r} cannot work: expected microsoft or timm")


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The trunk's own arrays, under keys without what parallel training or a larger model added.

    Args:
        state: arrays by key, in either layout.

    Returns:
        The same without prefixes, without buffers that follow from the rest, and without what
        surrounds the trunk of a segmentation model (which is logged).
    """
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith(_TRUNK) for key in state):
        around = [key for key in state if key.startswith(_AROUND)]
        _log.info("left out %d arrays around the trunk (%s)", len(around),
                  ", ".join(prefix + "*" for prefix in _AROUND))
        state = {key.removeprefix(_TRUNK): value for key, value in state.items()
                 if not key.startswith(_AROUND)}
    return {key: value for key, value in state.items() if not key.endswith(_DERIVED)}


def _fit(found: np.ndarray, path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """A PyTorch array as the variable at `path`, or None where the shape does not allow it."""
    if found.shape == _torch_shape(path, shape):
        return _transpose(found.astype(np.float32), path, _TO_OURS)
    if path[-1] != "attention_biases" or found.ndim != 2 or len(found) != shape[0]:
        return None
    square = math.isqrt(found.shape[1]) ** 2 == found.shape[1]
    return resize_bias_table(found, math.isqrt(shape[1])) if square else None


def _transpose(value: np.ndarray, path: Path, axes: dict[int, tuple[int, ...]]) -> np.ndarray:
    """Reorders the axes of a kernel; other variables are the same in both worlds."""
    return value.transpose(axes[value.ndim]) if path[-1] == "kernel" else value


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape a variable has in PyTorch."""
    return tuple(shape[i] for i in _TO_TORCH[len(shape)]) if path[-1] == "kernel" else shape


def _fault(key: str, found: np.ndarray | None, expected: tuple[int, ...]) -> str:
    if found is None:
        return f"missing: {key} {expected}"
    return f"mis-shaped: {key} is {found.shape}, expected {expected}"


def _head_keys(layout: Layout) -> list[str]:
    return [torch_key(("params", "head", leaf), layout) for leaf in ("kernel", "bias")]


def _raise_faults(faults: list[str], layout: Layout) -> None:
    if not faults:
        return
    advice = ""
    if any(key in fault for key in _head_keys(layout) for fault in faults):
        advice = ' head="new" takes a head of another number of classes, as zeros.'
    raise WeightsError(
        f"the weights (in the layout of {layout}) do not fit the model: {len(faults)} keys. Check "
        f"that the variant, its widths and depths are those the weights were trained with.{advice}"
        " " + "; ".join(sorted(faults)))


def _log_changes(model: Model, resized: list[str], renewed: list[str]) -> None:
    if resized:
        _log.info("resized %d tables of attention biases to windows %s", len(resized),
                  model.window_sizes[1:])
    if renewed:
        then = (f"they do not fit {model.num_classes} classes, the head starts at zero"
                if model.num_classes else "the model has no head")
        _log.info("left out %s: %s", " and ".join(renewed), then)


def _flatten(tree: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    flat: dict[Path, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, (*path, name)) if nested else {(*path, name): value}
    return flat


def _nest(flat: Mapping[Path, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
