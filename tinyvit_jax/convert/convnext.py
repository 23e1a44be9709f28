"""ConvNeXt V2's weights between our variables and PyTorch keys: timm's and the original's."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from tinyvit_jax.convert import convnets, tree
from tinyvit_jax.convert.convnets import CROP_RATIO, MEAN, STD, Table
from tinyvit_jax.convert.files import State, WeightsError
from tinyvit_jax.convert.fill import Head, Model

__all__ = ["CROP_RATIO", "LAYOUTS", "MEAN", "STD", "Shape", "count_classes", "from_torch",
           "infer_shape", "owns", "to_torch"]

LAYOUTS = ("timm", "facebook")
_FAMILY = "ConvNeXt V2"
_OWN = {"timm": "stages.0.blocks.0.conv_dw.weight", "facebook": "stages.0.0.dwconv.weight"}
_FACEBOOK = {"conv_dw": "dwconv", "mlp.fc1": "pwconv1", "mlp.fc2": "pwconv2",
             "mlp.grn.weight": "grn.gamma", "mlp.grn.bias": "grn.beta"}
# timm's classes of smaller widths than the tiny one's keep the MLP's matrices as 1x1 convolutions.
_MATRICES_FROM = 96


class Shape(NamedTuple):
    """The shape of a ConvNeXt V2, as models.create_model takes it."""

    num_classes: int
    image_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    patch_size: int


def owns(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds a ConvNeXt, by its keys."""
    arrays = convnets.strip(state)
    return any(key in arrays for key in _OWN.values())


def to_torch(variables: Mapping[str, Any], layout: str = "timm") -> State:
    """Names and transposes variables for a PyTorch class, for load_state_dict(strict=True).

    Args:
        variables: {"params", "batch_stats"} of a ConvNeXtV2.
        layout: "timm" or "facebook", the original's.

    Raises:
        WeightsError: another layout.
    """
    layout = convnets.choose_layout(_FAMILY, layout, LAYOUTS)
    width = variables["params"]["stem"]["norm"]["bias"].shape[0]
    return convnets.to_torch(variables, _table(layout, width))


def from_torch(state: Mapping[str, Any], model: Model, head: Head = "strict"
               ) -> dict[str, Any]:
    """Makes a model's variables of PyTorch weights; see `convnets.from_torch`."""
    layout = detect_layout(state)
    arrays = convnets.strip(state)
    own = torch_key(("params", "stages_0", "blocks_0", "mlp", "grn", "scale"), layout)
    if own not in arrays:
        raise WeightsError(f"these are no ConvNeXt V2's weights: {own} is missing, the scale of "
                           "global response norm, which the first ConvNeXt does not have. Give "
                           "weights of a V2.")
    return convnets.from_torch(state, model, head, _table(layout))


def count_classes(state: Mapping[str, Any]) -> int:
    """How many classes a state dict's classifier has; 0 where it has none."""
    return convnets.count_classes(state, _table(detect_layout(state)))


def infer_shape(state: Mapping[str, Any], num_heads: int = 0) -> Shape:
    """Reads the shape of a ConvNeXt V2 off its PyTorch weights.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        num_heads: of no meaning here.

    Raises:
        WeightsError: an array that tells the shape is missing or has another number of axes.
    """
    arrays, layout = convnets.strip(state), detect_layout(state)
    find = partial(convnets.find_shape, arrays, family=_FAMILY)
    pattern = (r"stages\.(\d+)\.blocks\.(\d+)\." if layout == "timm" else
               r"stages\.(\d+)\.(\d+)\.")
    depths = convnets.count_blocks(arrays, pattern, first=0)
    stem = find(torch_key(("params", "stem", "conv", "kernel"), layout), 4)
    dims = tuple(find(torch_key(("params", f"stages_{s}", "blocks_0", "norm", "scale"), layout), 1
                      )[0] for s in range(len(depths)))
    return Shape(count_classes(state), 224, dims, depths, stem[-1])


def detect_layout(state: Mapping[str, Any]) -> str:
    """Whose class the keys are of; raises WeightsError where they are no ConvNeXt's."""
    arrays = convnets.strip(state)
    for layout, key in _OWN.items():
        if key in arrays:
            return layout
    raise WeightsError(f"these are not a ConvNeXt V2's weights: there is no {_OWN['timm']} "
                       f"(timm's) and no {_OWN['facebook']} (the original's); the first keys are "
                       f"{', '.join(list(arrays)[:5])}")


def torch_key(path: tree.Path, layout: str) -> str:
    """A variable's name in a PyTorch class.

    Args:
        path: such as ("params", "stages_0", "blocks_1", "mlp", "grn", "scale").
        layout: whose class.

    Returns:
        Such as "stages.0.blocks.1.mlp.grn.weight", or "stages.0.1.grn.gamma".
    """
    words = [re.sub(r"_(\d+)$", r".\1", word) for word in path[1:-1]]
    key = ".".join([*words, convnets.leaf_name(path[-1])])
    # Both count what comes before a stage's blocks: the stem's convolution and norm, and later
    # norm and convolution.
    key = re.sub(r"^stem\.(\w+)", lambda m: f"stem.{int(m[1] == 'norm')}", key)
    key = re.sub(r"\.downsample\.(\w+)", lambda m: f".downsample.{int(m[1] == 'conv')}", key)
    if layout == "timm":
        key = re.sub(r"^head\.", "head.fc.", key)
        return re.sub(r"^norm_head\.", "head.norm.", key)
    key = re.sub(r"^stem\.", "downsample_layers.0.", key)
    key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key)
    key = re.sub(r"^norm_head\.", "norm.", key).replace(".blocks.", ".")
    for ours, theirs in _FACEBOOK.items():
        key = key.replace(f".{ours}", f".{theirs}")
    return key


def _table(layout: str, width: int = _MATRICES_FROM) -> Table:
    """The table of a class; `width` is that of its first stage."""

    def shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if layout == "facebook":
            return (1, 1, 1, *shape) if ".grn." in key else shape
        convolution = width < _MATRICES_FROM and ".mlp.fc" in key and len(shape) == 2
        return (*shape, 1, 1) if convolution else shape

    return Table(_FAMILY, layout, partial(torch_key, layout=layout), shape)
