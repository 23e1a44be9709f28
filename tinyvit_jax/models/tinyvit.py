"""TinyViT (Wu et al., ECCV 2022): a convolutional stage, then three of windowed attention."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import bases, layers

_5M = {"embed_dims": (64, 128, 160, 320), "depths": (2, 2, 6, 2), "num_heads": (2, 4, 5, 10)}
_21M = {"embed_dims": (96, 192, 384, 576), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 18)}

# The original's registry. Windows are in tokens; the first stage uses neither heads nor window.
VARIANTS: dict[str, dict] = {
    "tiny_vit_5m_224": {"image_size": 224, **_5M, "window_sizes": (7, 7, 14, 7)},
    "tiny_vit_11m_224": {
        "image_size": 224, "embed_dims": (64, 128, 256, 448), "depths": (2, 2, 6, 2),
        "num_heads": (2, 4, 8, 14), "window_sizes": (7, 7, 14, 7)},
    "tiny_vit_21m_224": {"image_size": 224, **_21M, "window_sizes": (7, 7, 14, 7)},
    "tiny_vit_21m_384": {"image_size": 384, **_21M, "window_sizes": (12, 12, 24, 12)},
    "tiny_vit_21m_512": {"image_size": 512, **_21M, "window_sizes": (16, 16, 32, 16)},
    # Ours, for small images: the stem shrinks less, so that the four stages have maps of 32, 16, 8
    # and 4 tokens a side at 32 pixels, and of 48, 24, 12 and 6 at 96.
    "tiny_vit_5m_32": {"image_size": 32, **_5M, "window_sizes": (8, 8, 8, 4),
                       "stem_strides": (1, 1)},
    "tiny_vit_5m_96": {"image_size": 96, **_5M, "window_sizes": (8, 8, 12, 6),
                       "stem_strides": (2, 1)},
    # For CPUs: maps of 16, 8, 4 and 2, each one window.
    "tiny_vit_1m_32": {
        "image_size": 32, "embed_dims": (32, 64, 128, 192), "depths": (1, 2, 3, 1),
        "num_heads": (1, 2, 4, 6), "window_sizes": (8, 8, 4, 2), "stem_strides": (2, 1)},
    # One's own: the caller gives all four.
    "tiny_vit": {
        "image_size": 224, "embed_dims": (), "depths": (), "num_heads": (), "window_sizes": ()},
}


class PatchEmbed(nn.Module):
    """The stem: two 3x3 convolutions, by default of stride 2 each."""

    dim: int
    strides: tuple[int, int] = (2, 2)
    freeze_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, 3] -> [B, H/4, W/4, dim] (by the strides, rounded up)."""
        conv = partial(layers.ConvNorm, size=3, freeze_norm=self.freeze_norm, dtype=self.dtype)
        x = conv(self.dim // 2, stride=self.strides[0], name="seq_0")(images, train)
        return conv(self.dim, stride=self.strides[1], name="seq_2")(layers.gelu(x), train)


class MBConv(nn.Module):
    """Inverted residual block of stage 0: widen, depthwise 3x3, narrow, add, GELU."""

    hidden: int
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        conv = partial(layers.ConvNorm, freeze_norm=self.freeze_norm, dtype=self.dtype)
        zeros = nn.initializers.zeros  # the block starts as the identity
        y = layers.gelu(conv(self.hidden, name="conv1")(x, train))
        y = layers.gelu(conv(self.hidden, 3, depthwise=True, name="conv2")(y, train))
        y = conv(x.shape[-1], scale_init=zeros, name="conv3")(y, train)
        return layers.gelu(x + layers.DropPath(self.drop_path)(y, train))


class PatchMerging(nn.Module):
    """Between stages: to the next width at half the resolution (rounded up)."""

    dim: int
    freeze_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), dim]."""
        conv = partial(layers.ConvNorm, self.dim, freeze_norm=self.freeze_norm, dtype=self.dtype)
        x = layers.gelu(conv(name="conv1")(x, train))
        x = layers.gelu(conv(size=3, stride=2, depthwise=True, name="conv2")(x, train))
        return conv(name="conv3")(x, train)


class Block(nn.Module):
    """Window attention, a local convolution, an MLP: the paper's TinyViT block."""

    num_heads: int
    window: int
    hidden: int
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, H, W, C] -> [B, H, W, C]."""
        C = x.shape[-1]
        attend = layers.Attention(self.num_heads, self.window, self.dtype, name="attn")
        y = _in_windows(attend, x, self.window)
        x = x + layers.DropPath(self.drop_path)(y, train)
        x = layers.ConvNorm(C, 3, depthwise=True, freeze_norm=self.freeze_norm, dtype=self.dtype,
                            name="local_conv")(x, train)
        y = layers.Mlp(self.hidden, self.dtype, name="mlp")(x)
        return x + layers.DropPath(self.drop_path)(y, train)


def _in_windows(attend: layers.Attention, x: jax.Array, window: int) -> jax.Array:
    """Attention within each window of a map of any size: [B, H, W, C] -> [B, H, W, C].

    The map is padded with zeros right and below, before the attention's LayerNorm and without a
    mask: the original's behaviour, which its weights have learned.
    """
    B, H, W, C = x.shape
    if H == W == window:
        return attend(x.reshape(B, H * W, C)).reshape(x.shape)
    below, right = -H % window, -W % window
    padded = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
    y = attend(layers.to_windows(padded, window))
    return layers.from_windows(y, window, H + below, W + right)[:, :H, :W]


class Stage(nn.Module):
    """The blocks of a stage and, but for the last stage, the way down to the next one."""

    num_heads: int
    window: int
    hidden: int
    drop_path: tuple[float, ...]
    next_dim: int = 0
    convolutional: bool = False
    freeze_norm: bool = False
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """The stage's own map [B, H, W, C], and the next one's input."""
        make_block = self._block_maker()
        for i, rate in enumerate(self.drop_path):
            x = make_block(hidden=self.hidden, drop_path=rate, freeze_norm=self.freeze_norm,
                           dtype=self.dtype, name=f"blocks_{i}")(x, train)
        if not self.next_dim:
            return x, x
        down = PatchMerging(self.next_dim, self.freeze_norm, self.dtype, name="downsample")
        return x, down(x, train)

    def _block_maker(self) -> Callable[..., nn.Module]:
        """The class of this stage's blocks, with its own settings filled in."""
        kind: Callable[..., nn.Module] = MBConv if self.convolutional else Block
        if self.remat:
            kind = nn.remat(kind, static_argnums=(2,))  # `train`, after self and x
        if self.convolutional:
            return kind
        return partial(kind, num_heads=self.num_heads, window=self.window)


class TinyViT(bases.Pyramid):
    """The classifier; tinyvit_jax.models.create_model makes one and checks its settings.

    Attributes:
        num_classes: of the head; 0 = no head, `__call__` then gives pooled features.
        image_size: pixels the windows are meant for; images of any size pass.
        embed_dims, depths, num_heads, window_sizes: of the four stages; the first stage is
            convolutional and reads neither heads nor window.
        stem_strides: of the stem's two convolutions.
        drop_path: rate of the last block; the first has 0, between them it grows evenly.
        expand_ratio, mlp_ratio: hidden width of MBConv and MLP, over that of their stage.
        dtype: of activations; weights, norms, softmax and logits are float32.
        remat: recompute the blocks' insides in the backward pass to save memory.
        freeze_norm: BatchNorm uses its stored statistics in training too.
    """

    num_heads: tuple[int, ...]
    window_sizes: tuple[int, ...]
    stem_strides: tuple[int, int] = (2, 2)
    drop_path: float = 0.0
    expand_ratio: float = 4.0
    mlp_ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    freeze_norm: bool = False

    def setup(self) -> None:
        """Names the submodules patch_embed, layers_0 .. layers_3, norm_head, head."""
        self.patch_embed = PatchEmbed(self.embed_dims[0], self.stem_strides, self.freeze_norm,
                                      self.dtype)
        rates = bases.share_rates(self.drop_path, self.depths)
        self.layers = [self._make_stage(i, own) for i, own in enumerate(rates)]
        self.norm_head = nn.LayerNorm(layers.EPSILON)
        if self.num_classes:
            self.head = layers.Linear(self.num_classes)

    def _make_stage(self, i: int, rates: tuple[float, ...]) -> Stage:
        dims = (*self.embed_dims, 0)
        ratio = self.expand_ratio if i == 0 else self.mlp_ratio
        return Stage(self.num_heads[i], self.window_sizes[i], int(dims[i] * ratio), rates,
                     next_dim=dims[i + 1], convolutional=i == 0, freeze_norm=self.freeze_norm,
                     remat=self.remat, dtype=self.dtype)

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The maps of the four stages: [B, H/s, W/s, C] with s = 4, 8, 16, 32, rounded up.

        That is with the stem's usual strides; with (2, 1) s = 2, 4, 8, 16.
        """
        x = self.patch_embed(images, train)
        maps = []
        for stage in self.layers:
            own, x = stage(x, train)
            maps.append(own)
        return maps

    def pool(self, x: jax.Array) -> jax.Array:
        """What the head reads: [B, h, w, C] -> float32 [B, C]."""
        return self.norm_head(super().pool(x))


def scale_windows(window_sizes: Sequence[int], old_size: float, new_size: float
                  ) -> tuple[int, ...]:
    """Windows for images of another size, with the same share of their maps.

    The original's rule: 7 7 14 7 at 224 pixels, 12 12 24 12 at 384, 16 16 32 16 at 512.
    """
    return tuple(max(1, round(w * new_size / old_size)) for w in window_sizes)


def make_tiny_vit(name: str, variant: dict, settings: dict) -> TinyViT:
    """A checked TinyViT, its windows scaled to its image size where none were given.

    Args:
        name: of the variant, for messages.
        variant: its entry in VARIANTS.
        settings: TinyViT's attributes that override the variant's.

    Raises:
        ValueError: a part of its shape or a rate that cannot work.
    """
    own = variant.get("stem_strides", (2, 2))
    strides = _check_strides(settings.get("stem_strides", own))
    model = TinyViT(**{**variant, **settings, "stem_strides": strides})
    _check_shape(name, model)
    _check_rates(model)
    given = "window_sizes" in settings
    return model if given else _scale_windows(model, variant["image_size"] / math.prod(own))


def _scale_windows(model: TinyViT, tokens: float) -> TinyViT:
    """Gives windows that are meant for `tokens` behind the stem their share of this model's maps.

    Args:
        model: its windows are those of its variant.
        tokens: on a side of the variant's first map.
    """
    return model.copy(window_sizes=scale_windows(
        model.window_sizes, tokens, model.image_size / math.prod(model.stem_strides)))


def _check_shape(name: str, model: TinyViT) -> None:
    """Raises ValueError for the first part of a TinyViT's shape that cannot work."""
    for key in ("embed_dims", "depths", "num_heads", "window_sizes"):
        values = getattr(model, key)
        if not values:
            raise ValueError(f"the model {name} has no {key} of its own: give four, one for each "
                             "stage, or choose a variant that has them, such as tiny_vit_5m_224")
        if len(values) != 4 or not all(isinstance(v, int) and v > 0 for v in values):
            raise ValueError(f"{key}={values} cannot work: expected four whole numbers above 0, "
                             "one for each stage")
    if model.embed_dims[0] % 2:
        raise ValueError(f"embed_dims={model.embed_dims} cannot work: the stem's first "
                         "convolution has half the first width, which must be even")
    for stage in (1, 2, 3):
        dim, heads = model.embed_dims[stage], model.num_heads[stage]
        if dim % heads:
            raise ValueError(f"stage {stage} has embed_dims {dim} and num_heads {heads}: the width "
                             "must be a multiple of the heads; change one of the two")


def _check_rates(model: TinyViT) -> None:
    """Raises ValueError for a rate or ratio that cannot work."""
    if not 0 <= model.drop_path < 1:
        raise ValueError(f"drop_path={model.drop_path} cannot work: expected a rate in [0, 1)")
    for key in ("expand_ratio", "mlp_ratio"):
        if getattr(model, key) <= 0:
            raise ValueError(f"{key}={getattr(model, key)} cannot work: expected a number above 0")


def _check_strides(strides: Sequence[int]) -> tuple[int, int]:
    """The stem's strides as a pair; raises ValueError for others than 1 and 2."""
    if len(strides) != 2 or not all(s in (1, 2) for s in strides):
        raise ValueError(f"stem_strides={tuple(strides)} cannot work: expected two, each 1 or 2")
    return strides[0], strides[1]
