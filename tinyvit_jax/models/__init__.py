"""The models: one table of families, one of variants, and `create_model`.

A family is a class of models, what its shape consists of, and the function that makes one. Another
one is a file beside these, a line in FAMILIES, and a converter in convert/ that weights.py names.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinyvit_jax.models import clip
from tinyvit_jax.models.clip import ClipViT
from tinyvit_jax.models.tinyvit import TinyViT

__all__ = ["FAMILIES", "VARIANTS", "ClipViT", "TinyViT", "create_model", "describe_shape",
           "family_of", "find_image_size", "scale_windows"]

Model = TinyViT | ClipViT


class Family(NamedTuple):
    """A class of models; its name in FAMILIES is also that of a model with a shape of one's own."""

    kind: type
    shape: tuple[str, ...]  # what model.json holds beside classes and image size
    options: tuple[str, ...]  # the other keywords of create_model that it understands
    make: Callable[[str, dict, dict], Any]  # (name, variant, settings) -> a checked model
    variants: dict[str, dict]


_21M = {"embed_dims": (96, 192, 384, 576), "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 18)}

# The original's registry. Windows are in tokens; the first stage uses neither heads nor window.
_TINY_VIT: dict[str, dict] = {
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
    patch_size: int | None = None,
    embed_dim: int | None = None,
    drop_path: float = 0.0,
    expand_ratio: float | None = None,
    mlp_ratio: float | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    freeze_norm: bool = False,
) -> Model:
    """Makes a model by name, with any part of its shape overridden.

    Args:
        name: a key of VARIANTS; "tiny_vit" and "clip_vit" take their shape from the arguments.
        num_classes: classes of the head; 0 = pooled features.
        image_size: side of the images in pixels; windows scale with it. None or 0 = the variant's.
        embed_dims: width of each stage: four of TinyViT, one of CLIP. None or () = the variant's,
            here and below.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; TinyViT's first stage has no attention.
        window_sizes: TinyViT: side of each stage's windows, in tokens; the first is unused.
        stem_strides: TinyViT: of the stem's two convolutions, (2, 2); (2, 1) or (1, 1) for small
            images.
        patch_size: CLIP: side of a token's square of pixels. None or 0 = the variant's.
        embed_dim: CLIP: width of the embedding that the head reads. None or 0 = the variant's.
        drop_path: TinyViT: stochastic depth, the rate of the last block.
        expand_ratio: TinyViT: hidden width of stage 0's blocks over the stage's; None = 4.
        mlp_ratio: TinyViT: hidden width of the other stages' MLPs over the stage's; None = 4.
        dtype: of activations, float32 or bfloat16.
        remat: recompute the blocks' activations in the backward pass to save memory.
        freeze_norm: BatchNorm uses its stored statistics in training too; CLIP has no BatchNorm,
            so this holds of it either way.

    Returns:
        A flax module; `init` and `apply` make and take {"params", "batch_stats"}.

    Raises:
        ValueError: a name, a setting that cannot work, or one that the model's family lacks.
    """
    family = FAMILIES[family_of(name)]
    variant = VARIANTS[name]
    given = _drop_empty({
        "embed_dims": embed_dims, "depths": depths, "num_heads": num_heads,
        "window_sizes": window_sizes, "stem_strides": stem_strides,
        "patch_size": patch_size or None, "embed_dim": embed_dim or None,
        "drop_path": drop_path or None, "expand_ratio": expand_ratio, "mlp_ratio": mlp_ratio,
        "freeze_norm": freeze_norm or None})
    _check_known(name, family, given)
    common = {"num_classes": num_classes, "image_size": image_size or variant["image_size"],
              "dtype": jnp.dtype(dtype), "remat": remat}
    _check_common(common)
    return family.make(name, variant, given | common)


def family_of(model: Model | str) -> str:
    """The family of a model or of a variant's name: a key of FAMILIES.

    Raises:
        ValueError: a name that is no variant's.
    """
    for name, family in FAMILIES.items():
        if model in family.variants if isinstance(model, str) else isinstance(model, family.kind):
            return name
    raise ValueError(f"there is no model {model!r}; choose one of {', '.join(VARIANTS)}")


def describe_shape(model: Model) -> dict[str, Any]:
    """The keywords that, with its family's name, make a model of this shape again."""
    keys = ("num_classes", "image_size", *FAMILIES[family_of(model)].shape)
    return {key: getattr(model, key) for key in keys}


def scale_windows(window_sizes: Sequence[int], old_size: float, new_size: float
                  ) -> tuple[int, ...]:
    """Windows for images of another size, with the same share of their maps.

    The original's rule: 7 7 14 7 at 224 pixels, 12 12 24 12 at 384, 16 16 32 16 at 512.
    """
    return tuple(max(1, round(w * new_size / old_size)) for w in window_sizes)


def find_image_size(model: Model) -> int:
    """Pixels that a model of a variant's widths and depths is for; 0 for any other shape.

    A TinyViT tells them by its windows, which grow with the image: 7 7 14 7 at 224 pixels. Its
    first stage uses neither heads nor window, so these do not count.
    """
    own = describe_shape(model)
    if own.get("stem_strides", (2, 2)) != (2, 2):
        return 0
    for name, variant in VARIANTS.items():
        if name in FAMILIES or family_of(name) != family_of(model):
            continue
        size = variant["image_size"]
        if "window_sizes" in variant:
            size = size * own["window_sizes"][1] // variant["window_sizes"][1]
            variant = {**variant, "window_sizes": scale_windows(
                variant["window_sizes"], variant["image_size"], size)}
        if all(own[key][1:] == value[1:] if key in ("num_heads", "window_sizes") and len(value) > 1
               else own[key] == value for key, value in variant.items() if key != "image_size"):
            return size
    return 0


def _drop_empty(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, their sequences as tuples."""
    given = {key: tuple(value) if isinstance(value, Sequence) else value
             for key, value in settings.items()}
    return {key: value for key, value in given.items() if value not in (None, ())}


def _check_known(name: str, family: Family, given: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that the family does not have."""
    known = (*family.shape, *family.options)
    foreign = [f"{key}={value}" for key, value in given.items() if key not in known]
    if foreign:
        raise ValueError(f"the model {name} has no such setting as {', '.join(foreign)}; it knows "
                         f"{', '.join(known)}. Leave the others empty")


def _check_common(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a size, a number of classes or a type that cannot work."""
    size, classes = settings["image_size"], settings["num_classes"]
    if size < 1 or classes < 0:
        raise ValueError(f"image_size={size} and num_classes={classes} cannot work: expected a "
                         "size of 1 or more and classes of 0 or more")
    if settings["dtype"] not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype={settings['dtype']} cannot work: expected float32 or bfloat16")


def _make_tiny_vit(name: str, variant: dict, settings: dict) -> TinyViT:
    """A TinyViT, its windows scaled to its image size where none were given."""
    strides = _check_strides(settings.get("stem_strides", (2, 2)))
    model = TinyViT(**{**variant, **settings, "stem_strides": strides})
    _check_shape(name, model)
    _check_rates(model)
    given = "window_sizes" in settings
    return model if given else _scale_windows(model, variant["image_size"])


def _scale_windows(model: TinyViT, image_size: int) -> TinyViT:
    """Gives windows that are meant for `image_size` pixels their share of this model's maps."""
    strides = math.prod(model.stem_strides) / 4
    return model.copy(window_sizes=scale_windows(model.window_sizes, image_size * strides,
                                                 model.image_size))


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


FAMILIES: dict[str, Family] = {
    "tiny_vit": Family(
        TinyViT, ("embed_dims", "depths", "num_heads", "window_sizes", "stem_strides"),
        ("drop_path", "expand_ratio", "mlp_ratio", "freeze_norm"), _make_tiny_vit, _TINY_VIT),
    "clip_vit": Family(
        ClipViT, ("embed_dims", "depths", "num_heads", "patch_size", "embed_dim"),
        ("freeze_norm",), clip.make_clip_vit, clip.VARIANTS),
}
VARIANTS: dict[str, dict] = {
    name: variant for family in FAMILIES.values() for name, variant in family.variants.items()}
