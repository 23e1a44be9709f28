"""The plain vision transformer: ViT (Dosovitskiy et al., 2021), DeiT, MAE's encoder, a small one.

Module names are timm's with `blocks_1` for `blocks.1`, and torch.nn.TransformerEncoderLayer's
inside blocks that norm after their branches.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tinyvit_jax.models import bases, layers, tokens
from tinyvit_jax.models.vit_blocks import EPSILON, Norm, PatchEmbed, PostNormBlock, PreNormBlock

_WIDTHS = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12),
           "large": (1024, 24, 16)}
_CHOICES = {"token_layout": ("class", "distilled"), "pool": ("token", "mean"),
            "positions": ("learned", "sincos"), "norm_order": ("pre", "post")}


def _variant(size: str, patch_size: int, image_size: int = 224, **others) -> dict:
    """An entry of VARIANTS with one of the widths of ViT and DeiT."""
    width, depth, heads = _WIDTHS[size]
    return {"image_size": image_size, "patch_size": patch_size, "embed_dims": (width,),
            "depths": (depth,), "num_heads": (heads,), **others}


# Names are timm's; "mae_vit_*" are the encoders of Masked Autoencoders (He et al., 2022).
VARIANTS: dict[str, dict] = {
    **{f"vit_{size}_patch{patch}_224": _variant(size, patch)
       for size in _WIDTHS for patch in (16, 14)},
    **{f"vit_{size}_patch14_dinov2": _variant(size, 14, 518, layer_scale=1e-5)
       for size in ("small", "base", "large")},
    **{f"deit_{size}_patch16_224": _variant(size, 16) for size in ("tiny", "small", "base")},
    **{f"deit_{size}_distilled_patch16_224": _variant(size, 16, token_layout="distilled")
       for size in ("tiny", "small", "base")},
    **{f"mae_vit_{size}_patch16_224": _variant(size, 16, positions="sincos") for size in _WIDTHS},
    # For images of 32 pixels, of layers as torch.nn.TransformerEncoderLayer is by default.
    "vit_mini_patch4_32": {
        "image_size": 32, "patch_size": 4, "embed_dims": (128,), "depths": (6,), "num_heads": (8,),
        "norm_order": "post", "dropout": 0.1},
    # One's own: the caller gives all four.
    "vit": {"image_size": 224, "patch_size": 0, "embed_dims": (), "depths": (), "num_heads": ()},
}


class LayerView(NamedTuple):
    """What one block saw and made, for objectives that compare layers."""

    tokens: jax.Array  # float32 [B, N, C] that the block gave
    queries: jax.Array  # [B, h, N, C / h], not yet divided by the root of C / h
    keys: jax.Array
    values: jax.Array


class Encoded(NamedTuple):
    """What `ViT.encode` gives."""

    tokens: jax.Array  # float32 [B, T + M, C]: T of the token layout first, then the patches'
    layers: dict[int, LayerView]  # by the block's index


class ViT(tokens.FixedSize):
    """The classifier; tinyvit_jax.models.create_model makes one and checks its settings.

    Attributes:
        num_classes: of the head; 0 = no head, `__call__` then gives what the head would read.
        image_size: pixels; the table of positions is for this size, and images must have it.
        patch_size: side of a token's square of pixels; divides image_size.
        embed_dims, depths, num_heads: of the one stage: its width, its blocks, their heads.
        mlp_dims: hidden width of the one stage's MLPs; () = four times its width.
        token_layout: what stands before the patches' tokens: "class" a class token; "distilled" a
            class token, then a distillation token with a head of its own (DeiT, section 4).
        pool: what a head reads: "token" = its token, normed; "mean" = the mean of the patches'
            tokens, normed after it, as in MAE's fine-tuning (global pool).
        positions: "learned", or "sincos" = MAE's fixed table, which no update changes.
        norm_order: "pre" = norms before the branches; "post" = after the sums.
        layer_scale: initial factor of the branches' channels; 0 = none.
        dropout: rate; what it drops stands with the blocks, and for "pre" the tokens too, once
            positions are added.
        drop_path: rate of the last block; the first has 0, between them it grows evenly.
        dtype: of activations within the branches; weights, norms, softmax, the sum that branches
            are added to, and logits are float32.
        remat: recompute the blocks' insides in the backward pass to save memory.
    """

    patch_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_dims: tuple[int, ...] = ()
    token_layout: str = "class"
    pool: str = "token"
    positions: str = "learned"
    norm_order: str = "pre"
    layer_scale: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Names the parameters and submodules as timm does."""
        width, grid = self.embed_dims[0], self.image_size // self.patch_size
        random = nn.initializers.truncated_normal(0.02)
        first = self._count_first()
        self.patch_embed = PatchEmbed(width, self.patch_size, self.dtype)
        self.cls_token = self.param("cls_token", random, (1, 1, width), jnp.float32)
        if first == 2:
            self.dist_token = self.param("dist_token", random, (1, 1, width), jnp.float32)
        fixed = partial(_fixed_positions, grid=grid)
        self.pos_embed = self.param("pos_embed", fixed if self.positions == "sincos" else random,
                                    (1, first + grid**2, width), jnp.float32)
        self.drop_tokens = tokens.Dropout(self.dropout)
        (rates,) = bases.share_rates(self.drop_path, self.depths)
        self.blocks = [self._make_block(rate) for rate in rates]
        norm = Norm(EPSILON[self.norm_order])
        if self.pool == "mean":
            self.fc_norm = norm
        else:
            self.norm = norm
        if self.num_classes:
            self.head = layers.Linear(self.num_classes)
            if first == 2:
                self.head_dist = layers.Linear(self.num_classes)

    def _count_first(self) -> int:
        """Tokens before the patches'."""
        return 2 if self.token_layout == "distilled" else 1

    def _make_block(self, rate: float) -> nn.Module:
        post = self.norm_order == "post"
        kind: Callable[..., Any] = PostNormBlock if post else PreNormBlock
        if self.remat:
            kind = nn.remat(kind, static_argnums=(2,))  # `train`, after self and x
        # MAE's encoder starts with the weights that its paper's code draws.
        init = nn.initializers.xavier_uniform() if self.positions == "sincos" else (
            layers.linear_init)
        own = {} if post else {"layer_scale": self.layer_scale, "kernel_init": init}
        hidden = self.mlp_dims[0] if self.mlp_dims else 4 * self.embed_dims[0]
        return kind(num_heads=self.num_heads[0], hidden=hidden, dropout=self.dropout,
                    drop_path=rate, dtype=self.dtype, **own)

    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
            images: float [B, S, S, 3] of S = image_size, normalised.
            train: dropout and drop path (apply needs rngs={"drop_path": key} where a rate is
                above 0).

        Returns:
            float32 logits [B, num_classes], or what a head reads [B, C] where num_classes is 0;
            with a distillation token the mean of what both give.
        """
        found = self._answer(images, train)
        return found[0] if len(found) == 1 else (found[0] + found[1]) / 2

    def answers(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """What each head says: logits of the class token and of the distillation token.

        Returns:
            Two of float32 [B, num_classes].

        Raises:
            ValueError: the model has no distillation token.
        """
        if self.token_layout != "distilled":
            raise ValueError(
                "this model has one head, for it has no distillation token. Make it with "
                "token_layout=distilled (--config.model.token_layout=distilled), or choose a "
                "variant such as deit_tiny_distilled_patch16_224.")
        first, second = self._answer(images, train)
        return first, second

    def _answer(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """The logits of every head, or what they would read."""
        x = self._run(images, train)[0]
        first = self._count_first()
        if self.pool == "mean":
            pooled = [self.fc_norm(x[:, first:].mean(1))]
        else:
            normed = self.norm(x[:, :first])
            pooled = [normed[:, i] for i in range(first)]
        if not self.num_classes:
            return pooled
        heads = [self.head, self.head_dist] if first == 2 else [self.head]
        return [head(y) for head, y in zip(heads, pooled, strict=True)]

    def features(self, images: jax.Array, train: bool = False) -> list[jax.Array]:
        """The patches' tokens after the last block: one map [B, S/p, S/p, C], not yet normed."""
        x = self._run(images, train)[0][:, self._count_first():]
        grid = self.image_size // self.patch_size
        return [x.reshape(len(x), grid, grid, -1)]

    def encode(self, images: jax.Array, train: bool = False, keep: jax.Array | None = None,
               layers: Sequence[int] = ()) -> Encoded:
        """The tokens of some patches or of all, and what single blocks saw.

        Args:
            images: float [B, S, S, 3] of S = image_size, normalised.
            train: as in `__call__`.
            keep: int [B, M], the patches that are kept, by their number row by row, each with its
                position; None = all of them, in order.
            layers: blocks of which `layers` tells, from 0 to depth - 1; a tuple, for it is static.

        Returns:
            Tokens, normed by the model's last norm where that is of tokens (pool "token"), and the
            views of `layers`.

        Raises:
            ValueError: a block that there is not, or a `keep` of another shape or type.
        """
        depth = self.depths[0]
        unknown = [i for i in layers if not 0 <= i < depth]
        if unknown:
            raise ValueError(f"layers={tuple(layers)} cannot work: the model's blocks are 0 to "
                             f"{depth - 1}, and there is no {unknown[0]}")
        if keep is not None and (keep.ndim != 2 or len(keep) != len(images)
                                 or not jnp.issubdtype(keep.dtype, jnp.integer)):
            raise ValueError(f"keep of shape {keep.shape} and type {keep.dtype} cannot work: "
                             f"expected whole numbers [{len(images)}, M], one row for each image")
        x, views = self._run(images, train, keep)
        return Encoded(self.norm(x) if self.pool == "token" else x, {i: views[i] for i in layers})

    def _run(self, images: jax.Array, train: bool, keep: jax.Array | None = None
             ) -> tuple[jax.Array, list[LayerView]]:
        """Tokens after the last block, and the views of all; XLA drops those that nobody reads."""
        self.check_images(images)
        # A fixed table is a variable all the same, so that it loads, resizes and exports.
        table = self.pos_embed if self.positions == "learned" else jax.lax.stop_gradient(
            self.pos_embed)
        first = self._count_first()
        patches = self.patch_embed(images) + table[:, first:]
        if keep is not None:
            patches = jnp.take_along_axis(patches, keep[..., None], axis=1)
        own = [self.cls_token, self.dist_token] if first == 2 else [self.cls_token]
        front = jnp.concatenate(own, axis=1) + table[:, :first]
        front = jnp.broadcast_to(front, (len(patches), *front.shape[1:]))
        x = jnp.concatenate([front, patches], axis=1)
        if self.norm_order == "pre":
            x = self.drop_tokens(x, train)
        views = []
        for block in self.blocks:
            x, heads = block(x, train)
            views.append(LayerView(x, *heads))
        return x, views


def sincos_positions(width: int, grid: int) -> np.ndarray:
    """MAE's fixed positions of a square grid of patches.

    Half of the channels tell the column, the other half the row; of each half, the first half are
    sines and the second cosines of the place times 10000^(-k / (width / 4)), k = 0 ... width / 4 -
    1.

    Returns:
        float32 [grid * grid, width].
    """
    quarter = width // 4
    speeds = 10000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(grid * grid), grid)
    angles = [place[:, None] * speeds for place in (column, row)]
    return np.concatenate([part for a in angles for part in (np.sin(a), np.cos(a))], 1).astype(
        np.float32)


def _fixed_positions(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, grid: int
                     ) -> jax.Array:
    """`sincos_positions` as an initializer; the tokens before the patches' have zeros."""
    table = sincos_positions(shape[-1], grid)
    return jnp.asarray(np.pad(table, ((shape[1] - len(table), 0), (0, 0)))[None], dtype)


def make_vit(name: str, variant: dict, settings: dict) -> ViT:
    """A checked ViT.

    Args:
        name: of the variant, for messages.
        variant: its entry in VARIANTS.
        settings: ViT's attributes that override the variant's; freeze_norm among them, which a
            model without BatchNorm meets by itself.

    Raises:
        ValueError: a part of its shape or a rate that is missing or cannot work.
    """
    own = {key: value for key, value in {**variant, **settings}.items() if key != "freeze_norm"}
    tokens.check_shape(name, own, ("embed_dims", "depths", "num_heads", "patch_size"),
                       "vit_small_patch16_224")
    if own.get("mlp_dims"):
        tokens.check_shape(name, own, ("mlp_dims",), "vit_mini_patch4_32")
    model = ViT(**own)
    for key, choices in _CHOICES.items():
        if getattr(model, key) not in choices:
            raise ValueError(f"{key}={getattr(model, key)} cannot work: expected "
                             f"{' or '.join(choices)}")
    for key in ("drop_path", "dropout"):
        if not 0 <= getattr(model, key) < 1:
            raise ValueError(f"{key}={getattr(model, key)} cannot work: expected a rate in [0, 1)")
    if model.layer_scale < 0:
        raise ValueError(f"layer_scale={model.layer_scale} cannot work: expected 0, for none, or "
                         f"the factor that branches start with")
    _check_together(model)
    return model


def _check_together(model: ViT) -> None:
    """Raises ValueError for settings that exclude one another."""
    if model.token_layout == "distilled" and model.pool == "mean":
        raise ValueError("token_layout=distilled and pool=mean cannot work together: the second "
                         "head reads its token and not the patches'; choose pool=token")
    if model.norm_order == "post" and model.layer_scale:
        raise ValueError(f"norm_order=post and layer_scale={model.layer_scale} cannot work "
                         f"together: torch's layer has none; choose norm_order=pre")
    if model.positions == "sincos" and model.embed_dims[0] % 4:
        raise ValueError(f"positions=sincos and embed_dims {model.embed_dims[0]} cannot work "
                         f"together: the width must be a multiple of 4")
