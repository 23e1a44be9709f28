"""What the families of residual convolutional networks share: stages, start values, checks."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from tinyvit_jax.models import bases

# He et al., 2015: what keeps a ReLU network's gradients of one size, as the originals start.
he_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Stage(nn.Module):
    """Blocks of one width; the first of them may halve the map.

    Attributes:
        make_block: a block's class with what all of them share filled in; takes stride and
            drop_path.
        rates: drop path of each block.
        stride: of the first block.
    """

    make_block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), D]."""
        for i, rate in enumerate(self.rates):
            x = self.make_block(stride=1 if i else self.stride, drop_path=rate,
                                name=f"blocks_{i}")(x, train)
        return x


class ConvNet(bases.Pyramid):
    """A stem and stages; a family's setup names `stem`, `stages` and, with classes, `head`."""

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The stages' maps: [B, H/s, W/s, C] with s = 4, 8, 16, 32.

        A stem for small images makes s less. The quotients are rounded up, in a ConvNeXt V2 down.
        """
        x = self.begin(images, train)
        maps = []
        for stage in self.stages:
            x = stage(x, train)
            maps.append(x)
        return maps

    def begin(self, images: jax.Array, train: bool) -> jax.Array:
        """What the first stage reads: [B, H, W, 3] -> [B, h, w, C]."""
        return nn.relu(self.stem(images, train))


def check_stages(name: str, own: Mapping[str, Any], example: str) -> None:
    """Raises ValueError for widths, depths or a drop path that cannot work.

    Args:
        name: of the variant, for messages.
        own: the model's settings, embed_dims and depths among them.
        example: a variant of the family that has both.
    """
    for key in ("embed_dims", "depths"):
        if not own[key]:
            raise ValueError(f"the model {name} has no {key} of its own: give one for each stage, "
                             f"or choose a variant that has them, such as {example}")
        if not isinstance(own[key], tuple) or not all(
                isinstance(n, int) and n > 0 for n in own[key]):
            raise ValueError(f"{key}={own[key]} cannot work: expected a tuple of whole numbers "
                             "above 0, one for each stage")
    if len(own["embed_dims"]) != len(own["depths"]):
        raise ValueError(f"embed_dims={own['embed_dims']} and depths={own['depths']} cannot work: "
                         "expected one of each for every stage")
    if not 0 <= own.get("drop_path", 0) < 1:
        raise ValueError(f"drop_path={own['drop_path']} cannot work: expected a rate in [0, 1)")
