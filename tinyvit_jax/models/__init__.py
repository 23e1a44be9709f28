"""The models: one table of variants and `create_model`."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from tinyvit_jax.models.tinyvit import TinyViT

__all__ = ["VARIANTS", "TinyViT", "create_model"]

_21M = {"embed_dims": (96, 192, 384, 576), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 18)}

# The original's registry. Windows are in tokens; the first stage uses neither heads nor window.
VARIANTS: dict[str, dict] = {
    "tiny_vit_5m_224": {
        "image_size": 224, "embed_dims": (64, 128, 160, 320), "depths": (2, 2, 6, 2),
        "num_heads": (2, 4, 5, 10), "window_sizes": (7, 7, 14, 7)},
    "tiny_vit_11m_224": {
        "image_size": 224, "embed_dims": (64, 128, 256, 448), "depths": (2, 2, 6, 2),
        "num_heads": (2, 4, 8, 14), "window_sizes": (7, 7, 14, 7)},
    "tiny_vit_21m_224": {"image_size": 224, **_21M, "window_sizes": (7, 7, 14, 7)},
    "tiny_vit_21m_384": {"image_size": 384, **_21M, "window_sizes": (12, 12, 24, 12)},
    "tiny_vit_21m_512": {"image_size": 512, **_21M, "window_sizes": (16, 16, 32, 16)},
    # One's own: the caller gives all four.
    "tiny_vit": {
        "image_size": 224, "embed_dims": (), "depths": (), "num_heads": (), "window_sizes": ()},
}


def create_model(
    name: str,
    num_classes: int = 1000,
    image_size: int | None = None,
    *,
    embed_dims: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    num_heads: Sequence[int] | None = None,
    window_sizes: Sequence[int] | None = None,
    stem_strides: Sequence[int] | None = None,
    drop_path: float = 0.0,
    expand_ratio: float = 4.0,
    mlp_ratio: float = 4.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    freeze_norm: bool = False,
) -> TinyViT:
    """Makes a model by name, with any part of its shape overridden.

    Args:
        name: a key of VARIANTS; "tiny_vit" takes its whole shape from the arguments.
        num_classes: classes of the head; 0 = pooled features.
        image_size: side of the images in pixels; windows scale with it. None or 0 = the variant's.
        embed_dims: width of each of the four stages. None or () = the variant's, here and below.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; the first stage has no attention.
        window_sizes: side of each stage's windows, in tokens; the first is unused.
        stem_strides: of the stem's two convolutions, (2, 2); (2, 1) or (1, 1) for small images.
        drop_path: stochastic depth, the rate of the last block.
        expand_ratio: hidden width of stage 0's blocks over the stage's.
        mlp_ratio: hidden width of the other stages' MLPs over the stage's.
        dtype: of activations, float32 or bfloat16.
        remat: recompute the blocks' activations in the backward pass to save memory.
        freeze_norm: BatchNorm uses its stored statistics in training too.

    Returns:
        A flax module; `init` and `apply` make and take {"params", "batch_stats"}.

    Raises:
        ValueError: a name or a setting that cannot work.
    """
    if name not in VARIANTS:
        raise ValueError(f"there is no model {name!r}; choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    model = TinyViT(
        num_classes=num_classes,
        image_size=image_size or variant["image_size"],
        embed_dims=tuple(embed_dims or variant["embed_dims"]),
        depths=tuple(depths or variant["depths"]),
        num_heads=tuple(num_heads or variant["num_heads"]),
        window_sizes=tuple(window_sizes or variant["window_sizes"]),
        stem_strides=_check_strides(stem_strides or (2, 2)),
        drop_path=drop_path, expand_ratio=expand_ratio, mlp_ratio=mlp_ratio,
        dtype=jnp.dtype(dtype), remat=remat, freeze_norm=freeze_norm)
    _check_shape(name, model)
    _check_rates(model)
    return model if window_sizes else _scale_windows(model, variant["image_size"])


def _scale_windows(model: TinyViT, image_size: int) -> TinyViT:
    """Gives windows of `image_size` pixels' maps the same share of this model's maps.

    The original's rule: 7 7 14 7 at 224 pixels, 12 12 24 12 at 384, 16 16 32 16 at 512.
    """
    scale = (model.image_size / math.prod(model.stem_strides)) / (image_size / 4)
    windows = tuple(max(1, round(w * scale)) for w in model.window_sizes)
    return model.copy(window_sizes=windows)


def _check_shape(name: str, model: TinyViT) -> None:
    """Raises ValueError for the first part of a model's shape that cannot work."""
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
    if model.image_size < 1 or model.num_classes < 0:
        raise ValueError(f"image_size={model.image_size} and num_classes={model.num_classes} "
                         "cannot work: expected a size of 1 or more and classes of 0 or more")


def _check_rates(model: TinyViT) -> None:
    """Raises ValueError for a rate, ratio or type that cannot work."""
    if not 0 <= model.drop_path < 1:
        raise ValueError(f"drop_path={model.drop_path} cannot work: expected a rate in [0, 1)")
    for key in ("expand_ratio", "mlp_ratio"):
        if getattr(model, key) <= 0:
            raise ValueError(f"{key}={getattr(model, key)} cannot work: expected a number above 0")
    if model.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype={model.dtype} cannot work: expected float32 or bfloat16")


def _check_strides(strides: Sequence[int]) -> tuple[int, int]:
    """The stem's strides as a pair; raises ValueError for others than 1 and 2."""
    if len(strides) != 2 or not all(s in (1, 2) for s in strides):
        raise ValueError(f"stem_strides={tuple(strides)} cannot work: expected two, each 1 or 2")
    return strides[0], strides[1]
