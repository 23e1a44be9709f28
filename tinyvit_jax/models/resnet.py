"""ResNet (He et al., CVPR 2016): for ImageNet as in torchvision and timm, and for CIFAR."""

from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import bases, layers, residual

_BASIC = {"image_size": 224, "embed_dims": (64, 128, 256, 512), "block": "basic",
          "stem_strides": (2, 2)}
_DEEP = {"image_size": 224, "embed_dims": (256, 512, 1024, 2048), "block": "bottleneck",
         "stem_strides": (2, 2)}
_CIFAR = {"image_size": 32, "embed_dims": (16, 32, 64), "block": "padded", "stem_strides": (1, 1)}

# timm's names; those for CIFAR (section 4.2 of the paper) have 6 n + 2 layers.
VARIANTS: dict[str, dict] = {
    "resnet18": {**_BASIC, "depths": (2, 2, 2, 2)},
    "resnet34": {**_BASIC, "depths": (3, 4, 6, 3)},
    "resnet26": {**_DEEP, "depths": (2, 2, 2, 2)},
    "resnet50": {**_DEEP, "depths": (3, 4, 6, 3)},
    "resnet101": {**_DEEP, "depths": (3, 4, 23, 3)},
    "resnet152": {**_DEEP, "depths": (3, 8, 36, 3)},
    "resnet20_cifar": {**_CIFAR, "depths": (3, 3, 3)},
    "resnet32_cifar": {**_CIFAR, "depths": (5, 5, 5)},
    "resnet44_cifar": {**_CIFAR, "depths": (7, 7, 7)},
    "resnet56_cifar": {**_CIFAR, "depths": (9, 9, 9)},
    "resnet110_cifar": {**_CIFAR, "depths": (18, 18, 18)},
    # One's own: the caller gives widths and depths, and a block other than basic.
    "resnet": {"image_size": 224, "embed_dims": (), "depths": (), "block": "basic",
               "stem_strides": (2, 2)},
}
BLOCKS = ("basic", "bottleneck", "padded")
BOTTLENECK = 4  # width of a bottleneck block, over that of its 3x3 convolution


class Block(nn.Module):
    """Two 3x3 convolutions, or one between two of 1x1, added to what they read."""

    features: int
    kind: str
    stride: int = 1
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]."""
        conv = partial(layers.ConvNorm, freeze_norm=self.freeze_norm, dtype=self.dtype,
                       kernel_init=residual.he_init)
        zeros = nn.initializers.zeros  # the branch starts as nothing
        if self.kind == "bottleneck":
            inner = self.features // BOTTLENECK
            y = nn.relu(conv(inner, name="conv1")(x, train))
            y = nn.relu(conv(inner, 3, self.stride, name="conv2")(y, train))
            y = conv(self.features, scale_init=zeros, name="conv3")(y, train)
        else:
            y = nn.relu(conv(self.features, 3, self.stride, name="conv1")(x, train))
            y = conv(self.features, 3, scale_init=zeros, name="conv2")(y, train)
        if self.stride > 1 or x.shape[-1] != self.features:
            if self.kind == "padded":
                x = pad_channels(x[:, ::self.stride, ::self.stride], self.features)
            else:
                x = conv(self.features, 1, self.stride, name="downsample")(x, train)
        return nn.relu(x + layers.DropPath(self.drop_path)(y, train))


def pad_channels(x: jax.Array, features: int) -> jax.Array:
    """Channels of zeros, half of them before and half behind: the paper's option A.

    Args:
        x: [..., C].
        features: C and an even number more.

    Returns:
        [..., features].
    """
    side = (features - x.shape[-1]) // 2
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(side, side)])


class ResNet(residual.ConvNet):
    """The classifier; tinyvit_jax.models.create_model makes one and checks its settings.

    Attributes:
        num_classes: of the head; 0 = no head, `__call__` then gives pooled features.
        image_size: pixels it is meant for; images of any size pass.
        embed_dims, depths: width and number of blocks of each stage; all but the first halve the
            map.
        block: "basic", "bottleneck", or "padded": basic, with channels of zeros for a shortcut
            where the width grows, as for CIFAR.
        stem_strides: of the stem's convolution and its max pooling: (2, 2), 7x7 and 3x3; or (1, 1)
            for small images, a convolution of 3x3 and no pooling.
        drop_path: rate of the last block; the first has 0, between them it grows evenly.
        dtype: of activations; weights, norms and logits are float32.
        remat: recompute the blocks' insides in the backward pass to save memory.
        freeze_norm: BatchNorm uses its stored statistics in training too.
    """

    block: str
    stem_strides: tuple[int, int]
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    freeze_norm: bool = False

    def setup(self) -> None:
        """Names the submodules stem, stages_0 ..., head."""
        ratio = BOTTLENECK if self.block == "bottleneck" else 1
        stride = self.stem_strides[0]
        self.stem = layers.ConvNorm(
            self.embed_dims[0] // ratio, 7 if stride == 2 else 3, stride,
            freeze_norm=self.freeze_norm, dtype=self.dtype, kernel_init=residual.he_init)
        kind = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        rates = bases.share_rates(self.drop_path, self.depths)
        self.stages = [
            residual.Stage(partial(kind, dim, self.block, freeze_norm=self.freeze_norm,
                                   dtype=self.dtype), rates[i], stride=2 if i else 1)
            for i, dim in enumerate(self.embed_dims)]
        if self.num_classes:
            self.head = layers.Linear(self.num_classes)

    def begin(self, images: jax.Array, train: bool) -> jax.Array:
        """What the first stage reads, a quarter of the images' side or, for small ones, all."""
        x = super().begin(images, train)
        if self.stem_strides[1] == 2:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return x


def make_resnet(name: str, variant: dict, settings: dict) -> ResNet:
    """A checked ResNet.

    Args:
        name: of the variant, for messages.
        variant: its entry in VARIANTS.
        settings: ResNet's attributes that override the variant's.

    Raises:
        ValueError: a part of its shape or a rate that cannot work.
    """
    own = {**variant, **settings}
    residual.check_stages(name, own, "resnet18")
    if own["block"] not in BLOCKS:
        raise ValueError(f"block={own['block']!r} cannot work: expected one of {', '.join(BLOCKS)}")
    if own["stem_strides"] not in ((2, 2), (1, 1)):
        raise ValueError(f"stem_strides={own['stem_strides']} cannot work: a ResNet's stem has "
                         "(2, 2), or (1, 1) for small images")
    dims = own["embed_dims"]
    if own["block"] == "bottleneck" and any(dim % BOTTLENECK for dim in dims):
        raise ValueError(f"embed_dims={dims} cannot work: with bottleneck blocks each width must "
                         f"be a multiple of {BOTTLENECK}")
    steps = [after - before for before, after in pairwise(dims)]
    if own["block"] == "padded" and any(step < 0 or step % 2 for step in steps):
        raise ValueError(f"embed_dims={dims} cannot work: padded shortcuts need widths that never "
                         "shrink and grow by even numbers")
    return ResNet(**own)
