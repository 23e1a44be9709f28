"""What plain vision transformers share: patches to tokens, the heads' projection, dropout, checks.

Tokens are [B, N, C]. Weights, norms, softmax and the sum that branches are added to are float32
whatever `dtype` the branches have.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import bases, layers


class PatchProjection(nn.Module):
    """One token for each patch: a convolution whose stride is its size."""

    features: int
    size: int
    dtype: jnp.dtype = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, (H / size) * (W / size), features], row by row."""
        B, H, W, C = images.shape
        p = self.size
        kernel = self.param("kernel", layers.conv_init, (p, p, C, self.features), jnp.float32)
        # Patches do not overlap, so the convolution is a matrix product over their pixels.
        patches = images.astype(self.dtype).reshape(B, H // p, p, W // p, p, C)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, p * p * C)
        x = layers.project(patches, kernel.astype(self.dtype).reshape(-1, self.features))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return x


class InputProjection(nn.Module):
    """Queries, keys and values of each head, all queries first, then all keys, then all values."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: layers.Initializer = layers.linear_init

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[B, N, C] -> three of [B, h, N, d], with d = C / h."""
        B, N, C = x.shape
        kernel = self.param("kernel", self.kernel_init, (C, 3 * C), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * C,), jnp.float32)
        kernels = jnp.split(kernel.astype(self.dtype), 3, axis=1)
        biases = jnp.split(bias.astype(self.dtype), 3)
        parts = [layers.project(x, k) + b for k, b in zip(kernels, biases, strict=True)]
        return [part.reshape(B, N, self.num_heads, -1).transpose(0, 2, 1, 3) for part in parts]


class Dropout(nn.Module):
    """Sets single numbers to zero while training, and scales up the kept ones.

    Draws from the "drop_path" key, as everything that is random in training does.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Any shape."""
        if not train or self.rate == 0:
            return x
        n, low = x.shape[-1], round((1 - self.rate) * _STEPS)
        # Drawing is what dropout costs: each 32 random bits decide on two numbers (on a CPU 1.2
        # times the small ViT's update without dropout, and 1.4 times with a draw for each).
        shape = (*x.shape[:-1], -(-n // 2))
        words = jax.random.bits(self.make_rng("drop_path"), shape, jnp.uint32)
        halves = jnp.concatenate([words % _STEPS, words // _STEPS], axis=-1)[..., :n]
        return jnp.where(halves < low, x * (_STEPS / low), 0).astype(x.dtype)


_STEPS = 2**16  # a rate is rounded to this part of 1, and what is kept is scaled by the rounded one


class FixedSize(bases.Classifier):
    """A classifier with positions for one image size, and without BatchNorm.

    Variables hold an empty "batch_stats" beside "params", as every other model's code expects one.
    """

    def check_images(self, images: jax.Array) -> None:
        """Raises ValueError for images of another size than the table of positions is for."""
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels cannot work: this model's "
                f"positions are for {self.image_size} x {self.image_size}. Resize the images, or "
                f"make the model with their image_size and load its weights, which fits the "
                f"positions.")

    @nn.nowrap
    def init(self, rngs: jax.Array, images: jax.Array,  # type: ignore[override]
             train: bool = False) -> dict:
        """Random variables: {"params", "batch_stats"}, the latter empty."""
        return {**super().init(rngs, images, train=train), "batch_stats": {}}


def check_shape(name: str, own: dict[str, Any], keys: Sequence[str], example: str) -> None:
    """Raises ValueError for a part of a plain transformer's shape that is missing or cannot work.

    Args:
        name: of the variant, for messages.
        own: all its settings.
        keys: those that are one whole number, or, of stages, a tuple of one.
        example: a variant that has them all.
    """
    for key in keys:
        value = own[key]
        if not value:
            raise ValueError(f"the model {name} has no {key} of its own: give it, or choose a "
                             f"variant that has one, such as {example}")
        staged = key in ("embed_dims", "depths", "num_heads", "mlp_dims")
        numbers = value if staged else (value,)
        if not isinstance(numbers, tuple) or len(numbers) != 1 or not all(
                isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"{key}={value} cannot work: expected "
                             f"{'a tuple of ' * staged}one whole number above 0, as the model has "
                             f"one stage")
    width, heads = own["embed_dims"][0], own["num_heads"][0]
    if width % heads:
        raise ValueError(f"embed_dims {width} and num_heads {heads} cannot work: the width must be "
                         f"a multiple of the heads; change one of the two")
    size, patch = own["image_size"], own["patch_size"]
    if size < patch:
        raise ValueError(f"image_size={size} cannot work: images of {size} pixels are smaller than "
                         f"one patch of {patch}. Choose larger images, or a smaller patch_size")
    if size % patch:
        raise ValueError(f"image_size={size} cannot work: expected a multiple of "
                         f"patch_size={patch}, such as {size // patch * patch} or "
                         f"{(size // patch + 1) * patch}")
