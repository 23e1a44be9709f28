"""RegNetY's weights between our variables and PyTorch keys: timm's and torchvision's."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from tinyvit_jax.convert import convnets, tree
from tinyvit_jax.convert.convnets import CROP_RATIO, MEAN, STD, Table
from tinyvit_jax.convert.files import State, WeightsError
from tinyvit_jax.convert.fill import Head, Model

__all__ = ["CROP_RATIO", "LAYOUTS", "MEAN", "STD", "Shape", "count_classes", "from_torch",
           "infer_shape", "owns", "to_torch"]

LAYOUTS = ("timm", "torchvision")
_FAMILY = "RegNetY"
_OWN = {"timm": "s1.b1.conv1.conv.weight",
        "torchvision": "trunk_output.block1.block1-0.f.a.0.weight"}
_TORCHVISION = {"conv1": "f.a", "conv2": "f.b", "se": "f.se", "conv3": "f.c", "downsample": "proj",
                "c": "0", "bn": "1"}


class Shape(NamedTuple):
    """The shape of a RegNetY, as models.create_model takes it."""

    num_classes: int
    image_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    group_width: int


def owns(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds a RegNet, by its keys."""
    arrays = convnets.strip(state)
    return any(key in arrays for key in _OWN.values())


def to_torch(variables: Mapping[str, Any], layout: str = "timm") -> State:
    """Names and transposes variables for a PyTorch class, for load_state_dict(strict=True).

    Args:
        variables: {"params", "batch_stats"} of a RegNetY.
        layout: "timm" or "torchvision".

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
    """Reads the shape of a RegNetY off its PyTorch weights.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        num_heads: of no meaning here.

    Raises:
        WeightsError: an array that tells the shape is missing or has another number of axes.
    """
    arrays, layout = convnets.strip(state), detect_layout(state)
    find = partial(convnets.find_shape, arrays, family=_FAMILY)
    pattern = (r"s(\d+)\.b(\d+)\." if layout == "timm" else
               r"trunk_output\.block(\d+)\.block\d+-(\d+)\.")
    depths = convnets.count_blocks(arrays, pattern, first=1)

    def kernel(stage: int, conv: str) -> tuple[int, ...]:
        path = ("params", f"stages_{stage}", "blocks_0", conv, "c", "kernel")
        return find(torch_key(path, layout), 4)

    stages = range(len(depths))
    return Shape(count_classes(state), 224, tuple(kernel(s, "conv3")[0] for s in stages), depths,
                 max(kernel(s, "conv2")[1] for s in stages))


def detect_layout(state: Mapping[str, Any]) -> str:
    """Whose class the keys are of; raises WeightsError where they are no RegNet's."""
    arrays = convnets.strip(state)
    for layout, key in _OWN.items():
        if key in arrays:
            return layout
    raise WeightsError(f"these are not a RegNetY's weights: there is no {_OWN['timm']} (timm's) "
                       f"and no {_OWN['torchvision']} (torchvision's); the first keys are "
                       f"{', '.join(list(arrays)[:5])}")


def torch_key(path: tree.Path, layout: str) -> str:
    """A variable's name in a PyTorch class.

    Args:
        path: such as ("params", "stages_0", "blocks_1", "conv2", "bn", "scale").
        layout: whose class.

    Returns:
        Such as "s1.b2.conv2.bn.weight", or "trunk_output.block1.block1-1.f.b.1.weight".
    """
    leaf = convnets.leaf_name(path[-1])
    words = list(path[1:-1])
    if words[0] == "head":
        return f"{'head.fc' if layout == 'timm' else 'fc'}.{leaf}"
    if layout == "timm":
        names = {"c": "conv"}
    else:
        names = _TORCHVISION
    inner = ".".join(names.get(word, word) for word in words if "_" not in word)
    if words[0] == "stem":
        return f"{inner}.{leaf}"
    stage, block = (int(word.rpartition("_")[2]) for word in words[:2])
    if layout == "timm":
        return f"s{stage + 1}.b{block + 1}.{inner}.{leaf}"
    return f"trunk_output.block{stage + 1}.block{stage + 1}-{block}.{inner}.{leaf}"


def _table(layout: str) -> Table:
    return Table(_FAMILY, layout, partial(torch_key, layout=layout))
