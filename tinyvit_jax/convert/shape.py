"""The shape of a TinyViT read off the names and shapes of its PyTorch weights."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tinyvit_jax.convert import tinyvit
from tinyvit_jax.convert.files import WeightsError


class Shape(NamedTuple):
    """What weights tell of their model; image size and stem strides they do not."""

    num_classes: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_sizes: tuple[int, ...]


def infer_shape(state: Mapping[str, Any]) -> Shape:
    """Reads widths, depths, heads, windows and classes off a state dict of either layout.

    Args:
        state: arrays by key, as convert.files.read_state gives them.

    Raises:
        WeightsError: a stage of which the state dict holds no block.
    """
    arrays = tinyvit.strip(state)
    layout = tinyvit.detect_layout(arrays)
    stages = "layers" if layout == "microsoft" else "stages"
    blocks = {(int(m[1]), int(m[2])) for key in arrays
              if (m := re.match(rf"{stages}\.(\d)\.blocks\.(\d+)\.", key))}
    depths = tuple(sum(stage == s for stage, _ in blocks) for s in range(4))
    if 0 in depths:
        raise WeightsError(f"these are not a whole TinyViT's weights: stages {{0..3}} have "
                           f"{', '.join(map(str, depths))} blocks; expected at least one in each")

    def find(name: str) -> tuple[int, ...]:
        if name not in arrays:
            raise WeightsError(f"these are not a whole TinyViT's weights: {name} is missing")
        return arrays[name].shape

    stem = "patch_embed.seq.2.c.weight" if layout == "microsoft" else (
        "patch_embed.conv2.conv.weight")
    head = "head.weight" if layout == "microsoft" else "head.fc.weight"
    attention = [f"{stages}.{s}.blocks.0.attn." for s in (1, 2, 3)]
    tables = [find(a + "attention_biases") for a in attention]
    windows = tuple(math.isqrt(offsets) for _, offsets in tables)
    heads = tuple(count for count, _ in tables)
    return Shape(
        num_classes=arrays[head].shape[0] if head in arrays else 0,
        embed_dims=(find(stem)[0], *(find(a + "qkv.weight")[1] for a in attention)),
        depths=depths, num_heads=(heads[0], *heads), window_sizes=(windows[0], *windows))
