"""TinyViT's weights between our variables and the two PyTorch layouts, Microsoft's and timm's.

Our module names are Microsoft's with `layers_1` for `layers.1`, so the table is short: a rule for
the path, one for the last word, and the renames that timm made.
"""

import logging
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np

from tinyvit_jax.convert import fill, tree
from tinyvit_jax.convert.files import State, WeightsError, unwrap
from tinyvit_jax.convert.resize import resize_bias_table

Layout = Literal["microsoft", "timm"]


class Model(fill.Model, Protocol):
    """What conversion asks of a model; models.TinyViT is one."""

    window_sizes: tuple[int, ...]


# ImageNet's, of pixels scaled to [0, 1], as all classifiers of TinyViT were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_RATIO = 224 / 256

_log = logging.getLogger(__name__)

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Buffers that follow from the rest; num_batches_tracked is not used where momentum is fixed.
_DERIVED = ("num_batches_tracked", "attention_bias_idxs")
# A segmentation model of which TinyViT is the trunk, and what else its files hold. The trunk's own
# classifier may be there, but segmentation never used or trained it.
_TRUNK = "image_encoder."
_AROUND = ("image_encoder.neck.", "image_encoder.head.fc.", "image_encoder.head.weight",
           "image_encoder.head.bias", "prompt_encoder.", "mask_decoder.")


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
    for path, value in tree.flatten(variables).items():
        key = torch_key(path, layout)
        state[key] = tree.transpose_to_torch(np.asarray(value, np.float32), path)
        if key.endswith("running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return state


def from_torch(state: Mapping[str, Any], model: Model, head: fill.Head = "strict"
               ) -> dict[str, Any]:
    """Makes a model's variables of PyTorch weights; each key is used, and used once.

    Understood are both layouts, {"model": ...} around the weights, "module." before every key, and
    the trunk of a segmentation model under "image_encoder.", whose classifier, neck and decoder are
    left out. Bias tables of other windows are resized. A model of no classes leaves a head out.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        model: what they are for.
        head: where the number of classes differs: "strict" refuses, "new" starts at zeros.

    Returns:
        {"params", "batch_stats"} of float32 arrays.

    Raises:
        WeightsError: any key unused or missing, or of another shape; the message lists all.
    """
    arrays = strip(unwrap(state))
    _log_around(unwrap(state))
    layout = detect_layout(arrays)
    resized = []

    def fit(found: np.ndarray, path: tree.Path, shape: tuple[int, ...]) -> np.ndarray | None:
        value = _fit(found, path, shape)
        if value is not None and value.size != found.size:
            resized.append(path)
        return value

    variables = fill.fill(arrays, model, head, fill.Rules(
        f"the weights (in the layout of {layout})", partial(torch_key, layout=layout), fit))
    if resized:
        _log.info("resized %d tables of attention biases to windows of %s tokens (bicubic)",
                  len(resized), ", ".join(map(str, model.window_sizes[1:])))
    return variables


def torch_key(path: tree.Path, layout: Layout) -> str:
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


def count_classes(state: Mapping[str, Any]) -> int:
    """How many classes a state dict's classifier has; 0 where it has none."""
    arrays = strip(unwrap(state))
    return next((len(arrays[key]) for key in ("head.bias", "head.fc.bias") if key in arrays), 0)


def _check_layout(layout: str) -> None:
    if layout not in ("microsoft", "timm"):
        raise ValueError(f"layout={layout!r} cannot work: expected microsoft or timm")


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The trunk's own arrays, under keys without what parallel training or a larger model added.

    Args:
        state: arrays by key, in either layout.

    Returns:
        The same without prefixes, without buffers that follow from the rest, and without what
        surrounds the trunk of a segmentation model.
    """
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    if any(key.startswith(_TRUNK) for key in state):
        state = {key.removeprefix(_TRUNK): value for key, value in state.items()
                 if not key.startswith(_AROUND)}
    return {key: value for key, value in state.items() if not key.endswith(_DERIVED)}


def _log_around(state: Mapping[str, Any]) -> None:
    """One line on what a segmentation model has around its trunk."""
    around = [key.removeprefix("module.") for key in state]
    around = [key for key in around if key.startswith(_AROUND)]
    if around:
        parts = sorted({".".join(key.split(".")[:2 if key.startswith(_TRUNK) else 1])
                        for key in around})
        _log.info("left out %d arrays around the trunk (%s)", len(around), ", ".join(parts))


def _fit(found: np.ndarray, path: tree.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """A PyTorch array as the variable at `path`, or None where the shape does not allow it."""
    if found.shape == tree.torch_shape(shape, path):
        return tree.transpose_to_ours(found.astype(np.float32), path)
    if path[-1] != "attention_biases" or found.ndim != 2 or len(found) != shape[0]:
        return None
    square = math.isqrt(found.shape[1]) ** 2 == found.shape[1]
    return resize_bias_table(found, math.isqrt(shape[1])) if square else None
