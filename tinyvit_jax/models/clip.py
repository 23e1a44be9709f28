"""CLIP's image tower (Radford et al., 2021) with a classifier: the teacher of TinyViT's paper.

A plain vision transformer with a class token and norms before the branches. Module names are those
of the PyTorch class whose weights the original distils from, with `resblocks_1` for `resblocks.1`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import attention, layers, tokens

MLP_RATIO = 4  # hidden width of every block's MLP, over the block's

# The original's teacher ("clip_vit_large14_224"); without a head it is OpenAI's ViT-L/14.
VARIANTS: dict[str, dict] = {
    "clip_vit_large14_224": {
        "image_size": 224, "patch_size": 14, "embed_dims": (1024,), "depths": (24,),
        "num_heads": (16,), "embed_dim": 768},
    # One's own: the caller gives all five.
    "clip_vit": {"image_size": 224, "patch_size": 0, "embed_dims": (), "depths": (),
                 "num_heads": (), "embed_dim": 0},
}


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's stand-in for the GELU: x * sigmoid(1.702 x)."""
    return x * nn.sigmoid(1.702 * x)


# Variance about the mean, not as E[x^2] - E[x]^2: CLIP's tokens have a few very large channels.
_Norm = partial(nn.LayerNorm, layers.EPSILON, use_fast_variance=False)


class Attention(nn.Module):
    """Multi-head attention of every token to every token."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, C] -> [B, N, C]."""
        q, k, v = tokens.InputProjection(self.num_heads, self.dtype, name="in_proj")(x)
        return layers.Linear(x.shape[-1], self.dtype, name="out_proj")(attention.attend(q, k, v))


class Mlp(nn.Module):
    """A wider layer, CLIP's GELU, and back."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., C]."""
        wide = quick_gelu(layers.Linear(self.hidden, self.dtype, name="c_fc")(x))
        # Without the barrier a TPU's compiler puts the sigmoid inside the product that reads it,
        # and works it out anew for each of its tiles: 1.5 times the whole teacher's cycles.
        wide = jax.lax.optimization_barrier(wide)
        return layers.Linear(x.shape[-1], self.dtype, name="c_proj")(wide)


class Block(nn.Module):
    """Attention and an MLP, each added to what it read through a norm."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, N, C] -> float32 [B, N, C]; the sum stays float32 whatever `dtype` is."""
        C = x.shape[-1]
        y = _Norm(dtype=self.dtype, name="ln_1")(x)
        x = x + Attention(self.num_heads, self.dtype, name="attn")(y)
        y = _Norm(dtype=self.dtype, name="ln_2")(x)
        return x + Mlp(MLP_RATIO * C, self.dtype, name="mlp")(y)


class Transformer(nn.Module):
    """The blocks."""

    depth: int
    num_heads: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float32 [B, N, C] -> float32 [B, N, C]."""
        make_block = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            x = make_block(self.num_heads, self.dtype, name=f"resblocks_{i}")(x)
        return x


class ImageTower(nn.Module):
    """Images to tokens, through the transformer, and the class token to CLIP's embedding."""

    grid: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Names the parameters and submodules as the PyTorch class does."""
        random = nn.initializers.normal(self.width**-0.5)
        self.conv1 = tokens.PatchProjection(self.width, self.patch_size, self.dtype)
        self.class_embedding = self.param("class_embedding", random, (self.width,), jnp.float32)
        self.positional_embedding = self.param("positional_embedding", random,
                                               (1 + self.grid**2, self.width), jnp.float32)
        self.ln_pre, self.ln_post = _Norm(), _Norm()
        self.transformer = Transformer(self.depth, self.num_heads, self.dtype, self.remat)
        self.proj = self.param("proj", random, (self.width, self.embed_dim), jnp.float32)

    def tokens(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> float32 [B, 1 + grid^2, width], the class token first."""
        patches = self.conv1(images).astype(jnp.float32)
        first = jnp.broadcast_to(self.class_embedding, (len(patches), 1, self.width))
        x = jnp.concatenate([first, patches], axis=1) + self.positional_embedding
        return self.transformer(self.ln_pre(x))

    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> float32 [B, embed_dim]."""
        return self.ln_post(self.tokens(images)[:, 0]) @ self.proj


class ClipViT(tokens.FixedSize):
    """The classifier; tinyvit_jax.models.create_model makes one and checks its settings.

    There is no BatchNorm and no drop path, so training and inference are one function.

    Attributes:
        num_classes: of the head; 0 = no head, `__call__` then gives CLIP's image embedding.
        image_size: pixels; the table of positions is for this size, and images must have it.
        patch_size: side of a token's square of pixels; divides image_size.
        embed_dims, depths, num_heads: of the one stage: its width, its blocks, their heads.
        embed_dim: of the embedding that images share with texts, which the head reads.
        dtype: of activations within the branches; weights, norms, softmax, the sum that branches
            are added to, the embedding and logits are float32.
        remat: recompute the blocks' insides in the backward pass to save memory.
    """

    patch_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    embed_dim: int
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Names the submodules visual and head."""
        self.visual = ImageTower(
            self.image_size // self.patch_size, self.patch_size, self.embed_dims[0],
            self.depths[0], self.num_heads[0], self.embed_dim, self.dtype, self.remat)
        if self.num_classes:
            self.head = layers.Linear(self.num_classes)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
            images: float [B, S, S, 3] of S = image_size, normalised.
            train: changes nothing here.

        Returns:
            float32 logits [B, num_classes], or the embedding [B, embed_dim] where num_classes is 0.
        """
        self.check_images(images)
        x = self.visual(images)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The patches' tokens after the last block: one map [B, S/p, S/p, width], not yet normed.

        CLIP itself reads none of them, but the class token alone.
        """
        self.check_images(images)
        grid = self.image_size // self.patch_size
        return [self.visual.tokens(images)[:, 1:].reshape(len(images), grid, grid, -1)]


def make_clip_vit(name: str, variant: dict, settings: dict) -> ClipViT:
    """A checked ClipViT.

    Args:
        name: of the variant, for messages.
        variant: its entry in VARIANTS.
        settings: ClipViT's attributes that override the variant's; freeze_norm among them, which a
            model without BatchNorm meets by itself.

    Raises:
        ValueError: a part of its shape that is missing or cannot work.
    """
    own = {key: value for key, value in {**variant, **settings}.items() if key != "freeze_norm"}
    tokens.check_shape(name, own, ("embed_dims", "depths", "num_heads", "patch_size", "embed_dim"),
                       "clip_vit_large14_224")
    return ClipViT(**own)
