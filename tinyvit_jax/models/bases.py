"""What the classifiers share: what each says of itself, and the way through those with maps."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


class Classifier(nn.Module):
    """A model whose variables are known without computing any.

    Attributes:
        num_classes: of the head; 0 = no head.
        image_size: pixels of the square images that the model is meant for.
    """

    num_classes: int
    image_size: int

    @nn.nowrap
    def variable_shapes(self) -> dict:
        """The variables as jax.ShapeDtypeStruct in place of arrays."""
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        return jax.eval_shape(partial(self.init, train=False), jax.random.key(0), images)


class Pyramid(Classifier):
    """Stages of smaller and smaller maps, the mean of the last map and a head.

    A family gives `features` and, where num_classes is not 0, `head`.

    Attributes:
        embed_dims, depths: of the stages: width, and number of blocks.
    """

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
        """The maps of the stages, each [B, h, w, C]."""
        raise NotImplementedError

    def pool(self, x: jax.Array) -> jax.Array:
        """What the head reads: [B, h, w, C] -> float32 [B, C]."""
        return jnp.mean(x, (1, 2), dtype=jnp.float32)


def share_rates(drop_path: float, depths: Sequence[int]) -> list[tuple[float, ...]]:
    """The drop path of each block, stage by stage: 0 at the first, growing evenly to the last."""
    rates = np.linspace(0, drop_path, sum(depths)).tolist()
    ends = np.cumsum(depths)
    return [tuple(rates[end - depth:end]) for depth, end in zip(depths, ends, strict=True)]
