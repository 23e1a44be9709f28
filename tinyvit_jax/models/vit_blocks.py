"""The blocks of the plain vision transformer, and its projection of patches.

Module names are timm's, and in PostNormBlock those of torch.nn.TransformerEncoderLayer.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from tinyvit_jax.models import attention, layers, tokens

# Variance about the mean, not as E[x^2] - E[x]^2: tokens may have a few very large channels.
Norm = partial(nn.LayerNorm, use_fast_variance=False)
EPSILON = {"pre": 1e-6, "post": 1e-5}  # of the norms of timm, DeiT and MAE; of torch's own layer


class PatchEmbed(nn.Module):
    """The projection of patches (`proj`)."""

    features: int
    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> float32 [B, H / size * W / size, features], row by row."""
        return tokens.PatchProjection(self.features, self.size, self.dtype, use_bias=True,
                                      name="proj")(images).astype(jnp.float32)


class Attention(nn.Module):
    """Multi-head attention of every token to every token.

    Attributes:
        names: of the two projections: timm's, or torch.nn.MultiheadAttention's.
        dropout: rate at which attention weights are dropped in training.
    """

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    names: tuple[str, str] = ("qkv", "proj")
    dropout: float = 0.0
    inits: tuple[layers.Initializer, layers.Initializer] = (layers.linear_init,) * 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """[B, N, C] -> [B, N, C], and the queries, keys and values, each [B, h, N, C / h]."""
        project = tokens.InputProjection(self.num_heads, self.dtype, self.inits[0],
                                         name=self.names[0])
        q, k, v = project(x.astype(self.dtype))
        drops = train and self.dropout > 0  # only weights used as they are have a CPU's form
        drop = partial(tokens.Dropout(self.dropout), train=True) if drops else None
        mixed = attention.attend(q, k, v, drop=drop)
        out = layers.Linear(x.shape[-1], self.dtype, self.inits[1], name=self.names[1])(mixed)
        return out, [q, k, v]


class Mlp(nn.Module):
    """A wider layer, GELU, and back."""

    hidden: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    kernel_init: layers.Initializer = layers.linear_init

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C] -> [..., C]."""
        wide = layers.gelu(layers.Linear(self.hidden, self.dtype, self.kernel_init, name="fc1")(x))
        wide = tokens.Dropout(self.dropout)(wide, train)
        x = layers.Linear(x.shape[-1], self.dtype, self.kernel_init, name="fc2")(wide)
        return tokens.Dropout(self.dropout)(x, train)


class LayerScale(nn.Module):
    """A factor for each channel of a branch (Touvron et al., 2021, "Going deeper")."""

    start: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> float32 [..., C]."""
        return x * self.param("gamma", nn.initializers.constant(self.start), x.shape[-1:],
                              jnp.float32)


class PreNormBlock(nn.Module):
    """Attention and an MLP, each added to what it read through a norm (timm's Block).

    Attributes:
        dropout: after every dense layer but the queries', keys' and values' (ViT, appendix B.1).
        layer_scale: initial factor of the branches; 0 = they have none.
        kernel_init: of every kernel.
    """

    num_heads: int
    hidden: int
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float = 0.0
    dtype: jnp.dtype = jnp.float32
    kernel_init: layers.Initializer = layers.linear_init

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """float32 [B, N, C] -> float32 [B, N, C], and queries, keys and values."""
        norm = partial(Norm, EPSILON["pre"], dtype=self.dtype)

        def add(x: jax.Array, branch: jax.Array, scale: str) -> jax.Array:
            if self.layer_scale:
                branch = LayerScale(self.layer_scale, name=scale)(branch)
            return x + layers.DropPath(self.drop_path)(branch, train)

        attend = Attention(self.num_heads, self.dtype, inits=(self.kernel_init,) * 2, name="attn")
        y, heads = attend(norm(name="norm1")(x), train)
        x = add(x, tokens.Dropout(self.dropout)(y, train), "ls1")
        mlp = Mlp(self.hidden, self.dropout, self.dtype, self.kernel_init, name="mlp")
        return add(x, mlp(norm(name="norm2")(x), train), "ls2"), heads


class PostNormBlock(nn.Module):
    """torch.nn.TransformerEncoderLayer as it is by default, with GELU: norms after the sums.

    Attributes:
        dropout: of attention weights, of the MLP's hidden layer, and of both branches.
    """

    num_heads: int
    hidden: int
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, list[jax.Array]]:
        """float32 [B, N, C] -> float32 [B, N, C], and queries, keys and values."""
        def add(x: jax.Array, branch: jax.Array, name: str) -> jax.Array:
            branch = tokens.Dropout(self.dropout)(branch, train)
            branch = layers.DropPath(self.drop_path)(branch, train)
            return Norm(EPSILON["post"], name=name)(x + branch)

        def linear(features: int, name: str) -> layers.Linear:
            return layers.Linear(features, self.dtype, layers.conv_init, name=name)

        attend = Attention(self.num_heads, self.dtype, ("in_proj", "out_proj"), self.dropout,
                           (nn.initializers.xavier_uniform(), layers.conv_init), name="self_attn")
        y, heads = attend(x, train)
        x = add(x, y, "norm1")
        wide = tokens.Dropout(self.dropout)(layers.gelu(linear(self.hidden, "linear1")(x)), train)
        return add(x, linear(x.shape[-1], "linear2")(wide), "norm2"), heads
