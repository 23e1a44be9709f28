"""What the families of residual convolutional networks share: the way through, rates, checks."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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


class Classifier(nn.Module):
    """A stem, stages, the mean of the last map and a head; the families fill in the parts.

    A family's setup names stem, stages and, where num_classes is not 0, head.
    """

    num_classes: int
    image_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
            images: float [B, H, W, 3], normalised.
            train: batch statistics in BatchNorm (apply needs mutable=["batch_stats"]) and drop
                path (apply needs rngs={"drop_path": key} where the rate is above 0).

        Returns:
            float32 logits [B, num_classes], or pooled features [B, C] where num_classes is 0.

        Raises:
            ValueError: images too small for the last stage of a ConvNeXt V2.
        """
        x = self.pool(self.features(images, train)[-1])
        return self.head(x) if self.num_classes else x

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

    def pool(self, x: jax.Array) -> jax.Array:
        """What the head reads: [B, h, w, C] -> float32 [B, C]."""
        return jnp.mean(x, (1, 2), dtype=jnp.float32)

    @nn.nowrap
    def variable_shapes(self) -> dict:
        """The variables as jax.ShapeDtypeStruct in place of arrays, without computing any."""
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        return jax.eval_shape(partial(self.init, train=False), jax.random.key(0), images)


def share_rates(drop_path: float, depths: Sequence[int]) -> list[tuple[float, ...]]:
    """The drop path of each block, stage by stage: 0 at the first, growing evenly to the last."""
    rates = np.linspace(0, drop_path, sum(depths)).tolist()
    ends = np.cumsum(depths)
    return [tuple(rates[end - depth:end]) for depth, end in zip(depths, ends, strict=True)]


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
