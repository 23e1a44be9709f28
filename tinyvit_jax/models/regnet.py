"""RegNetY (Radosavovic et al., CVPR 2020): grouped bottlenecks with squeeze and excitation.

RegNetY-16GF (regnety_160) is the teacher of DeiT (Touvron et al., 2021) and of MiniViT.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import bases, layers, residual

STEM_WIDTH = 32
SE_RATIO = 0.25  # hidden width of squeeze and excitation, over what the block reads


def _variant(group_width: int, dims: tuple[int, ...], depths: tuple[int, ...]) -> dict:
    return {"image_size": 224, "embed_dims": dims, "depths": depths, "group_width": group_width}


# timm's names: multiply-adds in units of 0.1 G. The paper's rule gives these widths and depths.
VARIANTS: dict[str, dict] = {
    "regnety_002": _variant(8, (24, 56, 152, 368), (1, 1, 4, 7)),
    "regnety_004": _variant(8, (48, 104, 208, 440), (1, 3, 6, 6)),
    "regnety_006": _variant(16, (48, 112, 256, 608), (1, 3, 7, 4)),
    "regnety_008": _variant(16, (64, 128, 320, 768), (1, 3, 8, 2)),
    "regnety_016": _variant(24, (48, 120, 336, 888), (2, 6, 17, 2)),
    "regnety_032": _variant(24, (72, 216, 576, 1512), (2, 5, 13, 1)),
    "regnety_040": _variant(64, (128, 192, 512, 1088), (2, 6, 12, 2)),
    "regnety_064": _variant(72, (144, 288, 576, 1296), (2, 7, 14, 2)),
    "regnety_080": _variant(56, (168, 448, 896, 2016), (2, 4, 10, 1)),
    "regnety_120": _variant(112, (224, 448, 896, 2240), (2, 5, 11, 1)),
    "regnety_160": _variant(112, (224, 448, 1232, 3024), (2, 4, 11, 1)),
    "regnety_320": _variant(232, (232, 696, 1392, 3712), (2, 5, 12, 1)),
    # One's own: the caller gives all three.
    "regnety": _variant(0, (), ()),
}


class Pointwise(nn.Module):
    """A 1x1 convolution with bias, of pooled channels."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, C] -> [B, features]."""
        shape = (1, 1, x.shape[-1], self.features)
        kernel = self.param("kernel", residual.he_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return layers.project(x, kernel[0, 0].astype(self.dtype)) + bias.astype(self.dtype)


class SqueezeExcite(nn.Module):
    """Scales each channel by a factor in (0, 1) that all channels' means decide."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        y = jnp.mean(x, (1, 2), dtype=jnp.float32).astype(self.dtype)
        y = nn.relu(Pointwise(self.hidden, self.dtype, name="fc1")(y))
        y = nn.sigmoid(Pointwise(x.shape[-1], self.dtype, name="fc2")(y))
        return x * y[:, None, None]


class Block(nn.Module):
    """1x1, grouped 3x3, squeeze and excitation, 1x1, added to what they read: the Y block."""

    features: int
    group_width: int
    stride: int = 1
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        dim = self.features
        conv = partial(layers.ConvNorm, dim, freeze_norm=self.freeze_norm, dtype=self.dtype,
                       kernel_init=residual.he_init)
        groups = dim // min(self.group_width, dim)
        y = nn.relu(conv(name="conv1")(x, train))
        y = nn.relu(conv(3, self.stride, groups=groups, name="conv2")(y, train))
        y = SqueezeExcite(round(SE_RATIO * x.shape[-1]), self.dtype, name="se")(y)
        y = conv(scale_init=nn.initializers.zeros, name="conv3")(y, train)
        if self.stride > 1 or x.shape[-1] != dim:
            x = conv(1, self.stride, name="downsample")(x, train)
        return nn.relu(x + layers.DropPath(self.drop_path)(y, train))


class RegNetY(residual.ConvNet):
    """The classifier; tinyvit_jax.models.create_model makes one and checks its settings.

    Attributes:
        num_classes: of the head; 0 = no head, `__call__` then gives pooled features.
        image_size: pixels it is meant for; images of any size pass.
        embed_dims, depths: width and number of blocks of each stage; every stage halves the map.
        group_width: channels of a group of the 3x3 convolutions.
        drop_path: rate of the last block; the first has 0, between them it grows evenly.
        dtype: of activations; weights, norms and logits are float32.
        remat: recompute the blocks' insides in the backward pass to save memory.
        freeze_norm: BatchNorm uses its stored statistics in training too.
    """

    group_width: int
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    freeze_norm: bool = False

    def setup(self) -> None:
        """Names the submodules stem, stages_0 ..., head."""
        self.stem = layers.ConvNorm(STEM_WIDTH, 3, 2, freeze_norm=self.freeze_norm,
                                    dtype=self.dtype, kernel_init=residual.he_init)
        kind = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        rates = bases.share_rates(self.drop_path, self.depths)
        self.stages = [
            residual.Stage(partial(kind, dim, self.group_width, freeze_norm=self.freeze_norm,
                                   dtype=self.dtype), rates[i], stride=2)
            for i, dim in enumerate(self.embed_dims)]
        if self.num_classes:
            self.head = layers.Linear(self.num_classes)


def make_regnety(name: str, variant: dict, settings: dict) -> RegNetY:
    """A checked RegNetY.

    Args:
        name: of the variant, for messages.
        variant: its entry in VARIANTS.
        settings: RegNetY's attributes that override the variant's.

    Raises:
        ValueError: a part of its shape or a rate that cannot work.
    """
    own = {**variant, **settings}
    residual.check_stages(name, own, "regnety_160")
    width = own["group_width"]
    if not width:
        raise ValueError(f"the model {name} has no group_width of its own: give it, or choose a "
                         "variant that has one, such as regnety_160")
    if not isinstance(width, int) or width < 1 or any(
            dim % min(width, dim) for dim in own["embed_dims"]):
        raise ValueError(f"group_width={width} and embed_dims={own['embed_dims']} cannot work: "
                         "expected a whole number above 0 that divides each width above it")
    return RegNetY(**own)
