"""CLIP's image tower between our variables and PyTorch keys.

The keys are those of the original's teacher file: "visual.*" as in OpenAI's own CLIP, and "head.*"
for the classifier on top. Our module names are the same with `resblocks_1` for `resblocks.1`.
"""

import logging
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from tinyvit_jax.convert import fill, tree
from tinyvit_jax.convert.files import State, WeightsError, unwrap
from tinyvit_jax.convert.resize import resize_positions

# CLIP's own, of pixels scaled to [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

CROP_RATIO = 224 / 256
HEAD_WIDTH = 64  # channels of a head in every one of OpenAI's models; no key tells it

_log = logging.getLogger(__name__)
_LEAVES = {"kernel": "weight", "scale": "weight"}
_POSITIONS = ("params", "visual", "positional_embedding")
# The text tower and constants of a whole CLIP, which a classifier of images has no use for.
_TEXT = ("transformer.", "token_embedding.", "ln_final.")
_TEXT_KEYS = ("positional_embedding", "text_projection", "logit_scale", "input_resolution",
              "context_length", "vocab_size")


class Shape(NamedTuple):
    """The shape of a CLIP, as models.create_model takes it."""

    num_classes: int
    image_size: int
    patch_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    embed_dim: int


def owns(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds CLIP's image tower, by its keys."""
    return any(key.removeprefix("module.").startswith("visual.") for key in unwrap(state))


def to_torch(variables: Mapping[str, Any], layout: str = "microsoft") -> State:
    """Names and transposes variables as in the original's teacher file.

    Args:
        variables: {"params", "batch_stats"} of a ClipViT.
        layout: "microsoft", the one there is.

    Returns:
        Arrays by key, for load_state_dict(strict=True) of the original's class.

    Raises:
        WeightsError: another layout.
    """
    if layout != "microsoft":
        raise WeightsError(f"CLIP's weights are written in the layout of microsoft only, and "
                           f"{layout} was asked for. Leave --layout out.")
    return {torch_key(path): tree.transpose_to_torch(np.asarray(value, np.float32), path)
            for path, value in tree.flatten(variables).items()}


def from_torch(state: Mapping[str, Any], model: fill.Model, head: fill.Head = "strict"
               ) -> dict[str, Any]:
    """Makes a model's variables of PyTorch weights; each key is used, and used once.

    Understood are the original's teacher file and a whole CLIP of OpenAI's, whose text tower is
    left out, with {"model": ...} around the weights or "module." before every key. Positions of
    another image size are resized. A model of no classes leaves a head out.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        model: what they are for.
        head: where the number of classes differs: "strict" refuses, "new" starts at zeros.

    Returns:
        {"params", "batch_stats"} of float32 arrays, the latter empty.

    Raises:
        WeightsError: any key unused or missing, or of another shape; the message lists all.
    """
    arrays = strip(state)
    _log_left_out([key for key in unwrap(state) if key.removeprefix("module.") not in arrays])
    return fill.fill(arrays, model, head, fill.Rules("the weights of CLIP", torch_key, _fit))


def infer_shape(state: Mapping[str, Any], num_heads: int = 0) -> Shape:
    """Reads the shape of a CLIP off its PyTorch weights.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        num_heads: heads of each block; 0 = one for each 64 channels, as in all of OpenAI's models.

    Raises:
        WeightsError: an array that tells the shape is missing or has another rank, or the width is
            no multiple of 64 and num_heads is 0.
    """
    arrays = strip(state)

    def find(name: str, axes: int) -> tuple[int, ...]:
        shape = np.shape(arrays.get(name, ()))
        if len(shape) != axes:
            raise WeightsError(f"these are not a whole CLIP image tower's weights: {name} is "
                               f"{shape if name in arrays else 'missing'}; expected {axes} axes")
        return shape

    width, _, patch_size, _ = find("visual.conv1.weight", 4)
    positions, _ = find("visual.positional_embedding", 2)
    _, embed_dim = find("visual.proj", 2)
    if math.isqrt(positions - 1) ** 2 != positions - 1:
        raise WeightsError(f"visual.positional_embedding has {positions} rows; expected one for "
                           f"the class token and those of a square grid")
    blocks = {m[1] for key in arrays if (m := re.match(r"visual\.transformer\.resblocks\.(\d+)\.",
                                                       key))}
    if not num_heads and width % HEAD_WIDTH:
        raise WeightsError(f"these weights of CLIP have {width} channels, no multiple of "
                           f"{HEAD_WIDTH}, and no key tells how many heads share them. Give the "
                           f"number as --config.teacher.num_heads='(HEADS,)'.")
    heads = num_heads or width // HEAD_WIDTH
    _log.info("The weights are taken for one of OpenAI's CLIP: %d heads and the GELU "
              "x sigmoid(1.702 x), which no key tells.", heads)
    return Shape(
        num_classes=find("head.weight", 2)[0] if "head.weight" in arrays else 0,
        image_size=math.isqrt(positions - 1) * patch_size, patch_size=patch_size,
        embed_dims=(width,), depths=(len(blocks),),
        num_heads=(heads,), embed_dim=embed_dim)


def count_classes(state: Mapping[str, Any]) -> int:
    """How many classes a state dict's classifier has; 0 where it has none."""
    head = strip(state).get("head.weight")
    return 0 if head is None else len(head)


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of the image tower and its classifier.

    Args:
        state: arrays by key, with or without {"model": ...} around them.

    Returns:
        The same without what parallel training put before the keys, and without the text tower and
        the constants of a whole CLIP.

    Raises:
        WeightsError: no key of an image tower.
    """
    state = unwrap(state)
    if not owns(state):
        raise WeightsError(f"these are not CLIP's weights: no key begins with visual.; the first "
                           f"keys are {', '.join(list(state)[:5])}")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return _without(state, [key for key in state if key.startswith(_TEXT) or key in _TEXT_KEYS])


def torch_key(path: tree.Path) -> str:
    """A variable's name in the PyTorch class.

    Args:
        path: such as ("params", "visual", "transformer", "resblocks_0", "attn", "in_proj",
            "kernel").

    Returns:
        Such as "visual.transformer.resblocks.0.attn.in_proj_weight".
    """
    words = [re.sub(r"^resblocks_(\d+)$", r"resblocks.\1", word) for word in path[1:-1]]
    key = ".".join([*words, _LEAVES.get(path[-1], path[-1])])
    # torch.nn.MultiheadAttention keeps this one layer as two bare parameters.
    return key.replace(".in_proj.", ".in_proj_")


def _fit(found: np.ndarray, path: tree.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """A PyTorch array as the variable at `path`, or None where the shape does not allow it."""
    if found.shape == tree.torch_shape(shape, path):
        return tree.transpose_to_ours(found.astype(np.float32, copy=False), path)
    square = path == _POSITIONS and found.ndim == 2 and found.shape[1] == shape[1] and (
        len(found) > 1 and math.isqrt(len(found) - 1) ** 2 == len(found) - 1)
    if not square:
        return None
    _log.info("resized the positions of %d tokens to %d (bicubic)", len(found), shape[0])
    return resize_positions(found, shape[0])


def _without(state: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The state dict without some keys."""
    return {key: value for key, value in state.items() if key not in keys}


def _log_left_out(keys: list[str]) -> None:
    """One line on what a file holds beside the image tower that the model is."""
    if keys:
        parts = sorted({key.removeprefix("module.").split(".")[0] for key in keys})
        _log.info("left out %d arrays around the image tower (%s)", len(keys), ", ".join(parts))
