"""CLIP's image tower (Radford et al., 2021) with a classifier: the teacher of TinyViT's paper.

A plain vision transformer with a class token and norms before the branches. Module names are those
of the PyTorch class whose weights the original distils from, with `resblocks_1` for `resblocks.1`.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import layers

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


class InputProjection(nn.Module):
    """Queries, keys and values of each head, all queries first, then all keys, then all values."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """[B, N, C] -> three of [B, h, N, d], with d = C / h."""
        B, N, C = x.shape
        kernel = self.param("kernel", layers.linear_init, (C, 3 * C), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * C,), jnp.float32)
        kernels = jnp.split(kernel.astype(self.dtype), 3, axis=1)
        biases = jnp.split(bias.astype(self.dtype), 3)
        parts = [layers.project(x, k) + b for k, b in zip(kernels, biases, strict=True)]
        return [part.reshape(B, N, self.num_heads, -1).transpose(0, 2, 1, 3) for part in parts]


class Attention(nn.Module):
    """Multi-head attention of every token to every token."""

    num_heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, C] -> [B, N, C]."""
        q, k, v = InputProjection(self.num_heads, self.dtype, name="in_proj")(x)
        scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
        scores = nn.softmax(scores * q.shape[-1]**-0.5).astype(self.dtype)
        mixed = jnp.einsum("bhnm,bhmd->bhnd", scores, v)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        return layers.Linear(x.shape[-1], self.dtype, name="out_proj")(mixed)


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


class PatchProjection(nn.Module):
    """One token for each patch: a convolution whose stride is its size, without bias."""

    features: int
    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, (H / size) * (W / size), features], row by row."""
        B, H, W, C = images.shape
        p = self.size
        kernel = self.param("kernel", layers.conv_init, (p, p, C, self.features), jnp.float32)
        # Patches do not overlap, so the convolution is a matrix product over their pixels.
        patches = images.astype(self.dtype).reshape(B, H // p, p, W // p, p, C)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, p * p * C)
        return layers.project(patches, kernel.astype(self.dtype).reshape(-1, self.features))


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
        tokens = 1 + self.grid**2
        self.conv1 = PatchProjection(self.width, self.patch_size, self.dtype)
        self.class_embedding = self.param("class_embedding", random, (self.width,), jnp.float32)
        self.positional_embedding = self.param("positional_embedding", random,
                                               (tokens, self.width), jnp.float32)
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


class ClipViT(nn.Module):
    """The classifier; tinyvit_jax.models.create_model makes one and checks its settings.

    There is no BatchNorm and no drop path, so training and inference are one function; variables
    hold an empty "batch_stats" beside "params", as every other model's code expects one.

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

    num_classes: int
    image_size: int
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
        self._check_images(images)
        x = self.visual(images)
        return self.head(x) if self.num_classes else x

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The patches' tokens after the last block: one map [B, S/p, S/p, width], not yet normed.

        CLIP itself reads none of them, but the class token alone.
        """
        self._check_images(images)
        grid = self.image_size // self.patch_size
        return [self.visual.tokens(images)[:, 1:].reshape(len(images), grid, grid, -1)]

    def _check_images(self, images: jax.Array) -> None:
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

    @nn.nowrap
    def variable_shapes(self) -> dict:
        """The variables as jax.ShapeDtypeStruct in place of arrays, without computing any."""
        images = jnp.zeros((1, self.image_size, self.image_size, 3))
        return jax.eval_shape(partial(self.init, train=False), jax.random.key(0), images)


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
    for key in ("embed_dims", "depths", "num_heads", "patch_size", "embed_dim"):
        value = own[key]
        if not value:
            raise ValueError(f"the model {name} has no {key} of its own: give it, or choose a "
                             f"variant that has one, such as clip_vit_large14_224")
        numbers = value if isinstance(value, tuple) else (value,)
        if len(numbers) != 1 or not all(isinstance(n, int) and n > 0 for n in numbers):
            raise ValueError(f"{key}={value} cannot work: expected one whole number above 0, as "
                             f"CLIP has one stage")
    width, heads = own["embed_dims"][0], own["num_heads"][0]
    if width % heads:
        raise ValueError(f"embed_dims {width} and num_heads {heads} cannot work: the width must be "
                         f"a multiple of the heads; change one of the two")
    if own["image_size"] % own["patch_size"]:
        raise ValueError(f"image_size={own['image_size']} cannot work: expected a multiple of "
                         f"patch_size={own['patch_size']}")
    return ClipViT(**own)
