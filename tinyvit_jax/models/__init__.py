"""The models: one table of families, one of variants, and `create_model`.

A family is a class of models, what its shape consists of, and the function that makes one. Another
one is a file beside these, a line in FAMILIES, and a converter in convert/ that weights.py names.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinyvit_jax.models import clip, convnext, regnet, resnet, tinyvit, vit
from tinyvit_jax.models.clip import ClipViT
from tinyvit_jax.models.convnext import ConvNeXtV2
from tinyvit_jax.models.regnet import RegNetY
from tinyvit_jax.models.resnet import ResNet
from tinyvit_jax.models.tinyvit import TinyViT, scale_windows
from tinyvit_jax.models.vit import ViT

__all__ = ["FAMILIES", "VARIANTS", "ClipViT", "ConvNeXtV2", "RegNetY", "ResNet", "TinyViT", "ViT",
           "create_model", "describe_shape", "family_of", "find_image_size",
           "has_distillation_token", "scale_windows"]

Model = Any  # a flax module, of a kind that FAMILIES names


class Family(NamedTuple):
    """A class of models; its name in FAMILIES is also that of a model with a shape of one's own."""

    kind: type
    shape: tuple[str, ...]  # what model.json holds beside classes and image size
    options: tuple[str, ...]  # the other keywords of create_model that it understands
    make: Callable[[str, dict, dict], Any]  # (name, variant, settings) -> a checked model
    variants: dict[str, dict]


def create_model(
    name: str,
    num_classes: int = 1000,
    image_size: int | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    **settings: Any,
) -> Model:
    """Makes a model by name, with any part of its shape overridden.

    Args:
        name: a key of VARIANTS; one that is also a key of FAMILIES, such as "tiny_vit", takes its
            whole shape from the settings.
        num_classes: classes of the head; 0 = pooled features.
        image_size: side of the images in pixels; windows scale with it. None or 0 = the variant's.
        dtype: of activations, float32 or bfloat16.
        remat: recompute the blocks' activations in the backward pass to save memory.
        settings: attributes of the family's class, by the names that FAMILIES lists and the class
            explains: its shape, such as `embed_dims`, `depths` and `num_heads`, and its options,
            such as `drop_path`. None, and () or 0 of a shape, stand for the variant's own.

    Returns:
        A flax module; `init` and `apply` make and take {"params", "batch_stats"}.

    Raises:
        ValueError: a name, a setting that cannot work, or one that the model's family lacks.
    """
    family = FAMILIES[family_of(name)]
    variant = VARIANTS[name]
    given = _choose_known(name, family, settings)
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


def find_image_size(model: Model) -> int:
    """Pixels that a TinyViT of a variant's widths and depths is for; 0 for any other shape.

    Its windows tell them, which grow with the image: 7 7 14 7 at 224 pixels. The first stage uses
    neither heads nor window, so these do not count.
    """
    own = describe_shape(model)
    for name, variant in tinyvit.VARIANTS.items():
        if name in FAMILIES:
            continue
        size = variant["image_size"] * own["window_sizes"][1] // variant["window_sizes"][1]
        variant = {"stem_strides": (2, 2), **variant, "window_sizes": scale_windows(
            variant["window_sizes"], variant["image_size"], size)}
        if all(own[key][1:] == value[1:] if key in ("num_heads", "window_sizes") and len(value) > 1
               else own[key] == value for key, value in variant.items() if key in own
               and key != "image_size"):
            return size
    return 0


def has_distillation_token(model: Model) -> bool:
    """Whether a model has a head of its own for a teacher's answers: its method `answers`."""
    return getattr(model, "token_layout", "") == "distilled"


def _choose_known(name: str, family: Family, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say something, sequences as tuples.

    Raises:
        ValueError: some that the family does not have.
    """
    given = {key: tuple(value) if isinstance(value, list | tuple) else value
             for key, value in settings.items()}
    known = (*family.shape, *family.options)
    # Any family can do without drop path; what is off is no setting that it lacks.
    foreign = [f"{key}={value}" for key, value in given.items() if key not in known and value]
    if foreign:
        raise ValueError(f"the model {name} has no such setting as {', '.join(foreign)}; it knows "
                         f"{', '.join(known)}. Leave the others empty")
    return {key: value for key, value in given.items() if key in known and not (
        value in (None, (), "") or (key in family.shape and value == 0
                                    and not isinstance(value, bool)))}


def _check_common(settings: Mapping[str, Any]) -> None:
    """Raises ValueError for a size, a number of classes or a type that cannot work."""
    size, classes = settings["image_size"], settings["num_classes"]
    if size < 1 or classes < 0:
        raise ValueError(f"image_size={size} and num_classes={classes} cannot work: expected a "
                         "size of 1 or more and classes of 0 or more")
    if settings["dtype"] not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"dtype={settings['dtype']} cannot work: expected float32 or bfloat16")


FAMILIES: dict[str, Family] = {
    "tiny_vit": Family(
        TinyViT, ("embed_dims", "depths", "num_heads", "window_sizes", "stem_strides"),
        ("drop_path", "expand_ratio", "mlp_ratio", "freeze_norm"), tinyvit.make_tiny_vit,
        tinyvit.VARIANTS),
    "clip_vit": Family(
        ClipViT, ("embed_dims", "depths", "num_heads", "patch_size", "embed_dim"),
        ("freeze_norm",), clip.make_clip_vit, clip.VARIANTS),
    "vit": Family(
        ViT, ("embed_dims", "depths", "num_heads", "patch_size", "mlp_dims", "token_layout", "pool",
              "positions", "norm_order", "layer_scale"),
        ("drop_path", "dropout", "freeze_norm"), vit.make_vit, vit.VARIANTS),
    "resnet": Family(
        ResNet, ("embed_dims", "depths", "block", "stem_strides"), ("drop_path", "freeze_norm"),
        resnet.make_resnet, resnet.VARIANTS),
    "regnety": Family(
        RegNetY, ("embed_dims", "depths", "group_width"), ("drop_path", "freeze_norm"),
        regnet.make_regnety, regnet.VARIANTS),
    "convnextv2": Family(
        ConvNeXtV2, ("embed_dims", "depths", "patch_size"), ("drop_path", "freeze_norm"),
        convnext.make_convnextv2, convnext.VARIANTS),
}
VARIANTS: dict[str, dict] = {
    name: variant for family in FAMILIES.values() for name, variant in family.variants.items()}
