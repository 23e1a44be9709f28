"""ResNet's weights between our variables and PyTorch keys: torchvision's, which are timm's too.

The ResNets for CIFAR of pytorch_resnet_cifar10 differ by the classifier's name alone.
"""

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

LAYOUTS = ("timm", "akamaster")
_FAMILY = "ResNet"
_MODULES = {"c": "conv1", "bn": "bn1"}


class Shape(NamedTuple):
    """The shape of a ResNet, as models.create_model takes it."""

    num_classes: int
    image_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    block: str
    stem_strides: tuple[int, int]


def owns(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds a ResNet, by its keys."""
    return "layer1.0.conv1.weight" in convnets.strip(state)


def to_torch(variables: Mapping[str, Any], layout: str = "timm") -> State:
    """Names and transposes variables for a PyTorch class, for load_state_dict(strict=True).

    Args:
        variables: {"params", "batch_stats"} of a ResNet.
        layout: "timm", which is torchvision's too, or "akamaster", for the models of CIFAR.

    Raises:
        WeightsError: another layout.
    """
    return convnets.to_torch(variables, _table(convnets.choose_layout(_FAMILY, layout, LAYOUTS)))


def from_torch(state: Mapping[str, Any], model: Model, head: Head = "strict"
               ) -> dict[str, Any]:
    """Makes a model's variables of PyTorch weights; see `convnets.from_torch`."""
    return convnets.from_torch(state, model, head, _table(detect_layout(state)))


def count_classes(state: Mapping[str, Any]) -> int:
    """How many classes a state dict's classifier has; 0 where it has none."""
    return convnets.count_classes(state, _table(detect_layout(state)))


def infer_shape(state: Mapping[str, Any], num_heads: int = 0) -> Shape:
    """Reads the shape of a ResNet off its PyTorch weights.

    A stem of 3x3 is that for small images, of 32 pixels; which shortcuts are padded, the missing
    projections tell.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        num_heads: of no meaning here.

    Raises:
        WeightsError: an array that tells the shape is missing or has another number of axes.
    """
    arrays = convnets.strip(state)
    find = partial(convnets.find_shape, arrays, family=_FAMILY)
    size = find("conv1.weight", 4)[-1]
    depths = convnets.count_blocks(arrays, r"layer(\d+)\.(\d+)\.", first=1)
    last = "conv3" if "layer1.0.conv3.weight" in arrays else "conv2"
    dims = tuple(find(f"layer{s}.0.{last}.weight", 4)[0] for s in range(1, len(depths) + 1))
    projected = any(".downsample." in key for key in arrays)
    block = "bottleneck" if last == "conv3" else "basic" if projected or len(dims) < 2 else "padded"
    return Shape(count_classes(state), 224 if size == 7 else 32, dims, depths, block,
                 (2, 2) if size == 7 else (1, 1))


def detect_layout(state: Mapping[str, Any]) -> str:
    """Whose class the keys are of; raises WeightsError where they are no ResNet's."""
    arrays = convnets.strip(state)
    if not owns(state):
        raise WeightsError(f"these are not a ResNet's weights: there is no layer1.0.conv1.weight; "
                           f"the first keys are {', '.join(list(arrays)[:5])}")
    return "akamaster" if "linear.weight" in arrays else "timm"


def torch_key(path: tree.Path, layout: str) -> str:
    """A variable's name in a PyTorch class.

    Args:
        path: such as ("params", "stages_0", "blocks_1", "conv2", "bn", "scale").
        layout: whose class.

    Returns:
        Such as "layer1.1.bn2.weight".
    """
    leaf = convnets.leaf_name(path[-1])
    words = path[1:-1]
    if words[0] == "head":
        return f"{'linear' if layout == 'akamaster' else 'fc'}.{leaf}"
    if words[0] == "stem":
        return f"{_MODULES[words[1]]}.{leaf}"
    stage, block = (int(word.rpartition("_")[2]) for word in words[:2])
    if words[2] == "downsample":
        inner = f"downsample.{int(words[3] == 'bn')}"
    else:
        inner = words[2] if words[3] == "c" else re.sub("^conv", "bn", words[2])
    return f"layer{stage + 1}.{block}.{inner}.{leaf}"


def _table(layout: str) -> Table:
    return Table(_FAMILY, layout, partial(torch_key, layout=layout))
