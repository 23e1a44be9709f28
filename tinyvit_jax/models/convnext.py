"""ConvNeXt V2 (Woo et al., CVPR 2023): wide depthwise convolutions, global response norm."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import bases, convolution, layers, residual

EPSILON = 1e-6  # of every LayerNorm, and of the mean response that responses are divided by
MLP_RATIO = 4  # hidden width of a block, over the block's
KERNEL = 7


def _variant(width: int, depths: tuple[int, ...]) -> dict:
    return {"image_size": 224, "embed_dims": tuple(width * 2**s for s in range(4)),
            "depths": depths, "patch_size": 4}


# The paper's appendix, and timm's small.
VARIANTS: dict[str, dict] = {
    "convnextv2_atto": _variant(40, (2, 2, 6, 2)),
    "convnextv2_femto": _variant(48, (2, 2, 6, 2)),
    "convnextv2_pico": _variant(64, (2, 2, 6, 2)),
    "convnextv2_nano": _variant(80, (2, 2, 8, 2)),
    "convnextv2_tiny": _variant(96, (3, 3, 9, 3)),
    "convnextv2_small": _variant(96, (3, 3, 27, 3)),
    "convnextv2_base": _variant(128, (3, 3, 27, 3)),
    "convnextv2_large": _variant(192, (3, 3, 27, 3)),
    "convnextv2_huge": _variant(352, (3, 3, 27, 3)),
    # One's own: the caller gives widths and depths.
    "convnextv2": {"image_size": 224, "embed_dims": (), "depths": (), "patch_size": 4},
}

# Variance about the mean, not as E[x^2] - E[x]^2: a few channels are very large.
_Norm = partial(nn.LayerNorm, EPSILON, use_fast_variance=False)
# Compiled by itself, so that its many taps are traced once for all the blocks of a stage.
_convolve = jax.jit(convolution.depthwise_conv, static_argnums=2)


class PatchConv(nn.Module):
    """A convolution with bias whose stride is its size; pixels beyond whole patches are left out.

    Patches do not overlap, so it is a matrix product over their pixels.
    """

    features: int
    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H // size, W // size, features]."""
        B, H, W, C = x.shape
        p, h, w = self.size, H // self.size, W // self.size
        kernel = self.param("kernel", layers.linear_init, (p, p, C, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        patches = x.astype(self.dtype)[:, :h * p, :w * p].reshape(B, h, p, w, p, C)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(B, h, w, p * p * C)
        kernel = kernel.astype(self.dtype).reshape(p * p * C, self.features)
        return layers.project(patches, kernel) + bias.astype(self.dtype)


class DepthwiseConv(nn.Module):
    """A 7x7 convolution of each channel by itself, with bias."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        C = x.shape[-1]
        kernel = self.param("kernel", layers.linear_init, (KERNEL, KERNEL, 1, C), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (C,), jnp.float32)
        return _convolve(x, kernel.astype(self.dtype), 1) + bias.astype(self.dtype)


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its response over the map, relative to all channels' (section 3.3).

    scale and bias are the paper's gamma and beta; at 0, where they start, the layer is none.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        zeros = nn.initializers.zeros
        scale = self.param("scale", zeros, x.shape[-1:], jnp.float32)
        bias = self.param("bias", zeros, x.shape[-1:], jnp.float32)
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)), (1, 2), keepdims=True)
        # The square root has no gradient at 0, which a channel that is silent everywhere gives.
        heard = squares > 0
        response = jnp.where(heard, jnp.sqrt(jnp.where(heard, squares, 1.0)), 0.0)
        relative = response / (jnp.mean(response, -1, keepdims=True) + EPSILON)
        return (x * (1 + scale * relative) + bias).astype(self.dtype)


class Mlp(nn.Module):
    """A wider layer, GELU, global response norm, and back."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        C = x.shape[-1]
        x = layers.gelu(layers.Linear(MLP_RATIO * C, self.dtype, name="fc1")(x))
        x = GlobalResponseNorm(self.dtype, name="grn")(x)
        return layers.Linear(C, self.dtype, name="fc2")(x)


class Block(nn.Module):
    """Depthwise convolution, norm and MLP, added to what they read."""

    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        y = DepthwiseConv(self.dtype, name="conv_dw")(x)
        y = _Norm(dtype=self.dtype, name="norm")(y)
        y = Mlp(self.dtype, name="mlp")(y)
        return x + layers.DropPath(self.drop_path)(y, train)


class Downsample(nn.Module):
    """A norm, and patches of 2 x 2 to the next width."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H // 2, W // 2, features]."""
        x = _Norm(dtype=self.dtype, name="norm")(x)
        return PatchConv(self.features, 2, self.dtype, name="conv")(x)


class Stem(nn.Module):
    """Patches of pixels, and a norm."""

    features: int
    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, H // size, W // size, features]."""
        x = PatchConv(self.features, self.size, self.dtype, name="conv")(images)
        return _Norm(dtype=self.dtype, name="norm")(x)


class Stage(nn.Module):
    """The way down, but for the first stage, and the blocks."""

    features: int
    make_block: Callable[..., nn.Module]
    rates: tuple[float, ...]
    downsample: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C], or [B, H // 2, W // 2, features]."""
        if self.downsample:
            x = Downsample(self.features, self.dtype, name="downsample")(x)
        for i, rate in enumerate(self.rates):
            x = self.make_block(drop_path=rate, name=f"blocks_{i}")(x, train)
        return x


class ConvNeXtV2(residual.ConvNet):
    """The classifier; tinyvit_jax.models.create_model makes one and checks its settings.

    There is no BatchNorm: variables hold an empty "batch_stats" beside "params", as every other
    model's code expects one.

    Attributes:
        num_classes: of the head; 0 = no head, `__call__` then gives pooled features.
        image_size: pixels it is meant for; images of any size pass that leave the last stage a
            map: patch_size times 8 for four stages.
        embed_dims, depths: width and number of blocks of each stage; all but the first halve the
            map.
        patch_size: side of the stem's squares of pixels; 4, or less for small images.
        drop_path: rate of the last block; the first has 0, between them it grows evenly.
        dtype: of activations; weights, norms, responses and logits are float32.
        remat: recompute the blocks' insides in the backward pass to save memory.
    """

    patch_size: int = 4
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Names the submodules stem, stages_0 ..., norm_head, head."""
        self.stem = Stem(self.embed_dims[0], self.patch_size, self.dtype)
        kind = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        rates = bases.share_rates(self.drop_path, self.depths)
        self.stages = [Stage(dim, partial(kind, dtype=self.dtype), rates[i], i > 0, self.dtype)
                       for i, dim in enumerate(self.embed_dims)]
        self.norm_head = _Norm()
        if self.num_classes:
            self.head = layers.Linear(self.num_classes)

    def begin(self, images: jax.Array, train: bool) -> jax.Array:
        """What the first stage reads; raises ValueError for images too small for the last."""
        check_size(min(images.shape[1:3]), self.patch_size, len(self.depths))
        return self.stem(images)

    def pool(self, x: jax.Array) -> jax.Array:
        """What the head reads."""
        return self.norm_head(super().pool(x))

    @nn.nowrap
    def init(self, rngs: jax.Array, images: jax.Array,  # type: ignore[override]
             train: bool = False) -> dict:
        """Random variables: {"params", "batch_stats"}, the latter empty."""
        return {**super().init(rngs, images, train=train), "batch_stats": {}}


def check_size(pixels: int, patch_size: int, stages: int) -> None:
    """Raises ValueError for images that leave the last stage no map."""
    least = patch_size * 2 ** (stages - 1)
    if pixels < least:
        raise ValueError(f"images of {pixels} pixels cannot pass a ConvNeXt V2 of {stages} stages "
                         f"and patch_size={patch_size}: expected {least} or more. Give larger "
                         "images, or a smaller patch_size")


def make_convnextv2(name: str, variant: dict, settings: dict) -> ConvNeXtV2:
    """A checked ConvNeXtV2.

    Args:
        name: of the variant, for messages.
        variant: its entry in VARIANTS.
        settings: ConvNeXtV2's attributes that override the variant's; freeze_norm among them, which
            a model without BatchNorm meets by itself.

    Raises:
        ValueError: a part of its shape or a rate that cannot work.
    """
    own = {key: value for key, value in {**variant, **settings}.items() if key != "freeze_norm"}
    residual.check_stages(name, own, "convnextv2_tiny")
    if not isinstance(own["patch_size"], int) or own["patch_size"] < 1:
        raise ValueError(f"patch_size={own['patch_size']} cannot work: expected a whole number "
                         "above 0")
    check_size(own["image_size"], own["patch_size"], len(own["depths"]))
    return ConvNeXtV2(**own)
