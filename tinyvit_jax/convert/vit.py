"""Plain vision transformers between our variables and PyTorch keys.

Blocks that norm before their branches have timm's keys, which DeiT, MAE and DINOv2 use too; blocks
that norm after the sums have those of torch.nn.TransformerEncoder around them ("torch"). Which of
the two variables or weights are is told by their names.
"""

import logging
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tinyvit_jax.convert import fill, tree
from tinyvit_jax.convert.files import State, WeightsError, unwrap
from tinyvit_jax.convert.resize import resize_positions

# ImageNet's, of pixels scaled to [0, 1], as DeiT, MAE and DINOv2 have them. Google's own ViT was
# trained with 0.5 for all six, which no key tells.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CROP_RATIO = 224 / 256
HEAD_WIDTH = 64  # channels of a head in ViT, DeiT, MAE and DINOv2; no key tells it
_TORCH_HEADS = 8  # of the small ViT whose layers are torch's own; no key tells it either

_log = logging.getLogger(__name__)
_LEAVES = {"kernel": "weight", "scale": "weight"}
# How a module around torch's layers has to call the rest.
_TORCH_KEYS = (". Around torch's own layers, transformer.layers.*, the keys are patch_embed.proj, "
               "cls_token, pos_embed, norm and classifier")
_POSITIONS = ("params", "pos_embed")
_PATCHES = ("params", "patch_embed", "proj", "kernel")
_HEADS = ("head", "head_dist", "classifier", "classifier_dist")
_BLOCK = r"(?:blocks|transformer\.layers)\.(\d+)\."
# A masked autoencoder's decoder and what else was only used in pretraining.
_AROUND = ("decoder_", "mask_token", "encoderfeature_pred.", "decoderfeature_pred.")


class Shape(NamedTuple):
    """The shape of a ViT, as models.create_model takes it."""

    num_classes: int
    image_size: int
    patch_size: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_dims: tuple[int, ...]
    token_layout: str
    pool: str
    norm_order: str
    layer_scale: float


def owns(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds a plain vision transformer, by its keys."""
    keys = {key.removeprefix("module.") for key in unwrap(state)}
    return {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= keys or any(
        key.endswith("layers.0.self_attn.in_proj_weight") for key in keys)


def to_torch(variables: Mapping[str, Any], layout: str = "") -> State:
    """Names and transposes variables for a PyTorch class, for load_state_dict(strict=True).

    Args:
        variables: {"params", "batch_stats"} of a ViT.
        layout: "timm" for blocks that norm first, "torch" for the others; "" = the one it is.

    Raises:
        WeightsError: another layout than the variables have.
    """
    flat = tree.flatten(variables)
    own = "torch" if _is_post(flat) else "timm"
    if layout not in ("", own):
        raise WeightsError(f"the weights of this ViT are written in the layout of {own} only, and "
                           f"{layout} was asked for. Leave --layout out.")
    state = {}
    for path, value in flat.items():
        value = np.asarray(value, np.float32)
        if own == "torch" and path == _PATCHES:  # a dense layer of each patch's pixels
            value = value.reshape(-1, value.shape[-1]).T
        else:
            value = tree.transpose_to_torch(value, path)
        state[torch_key(path, own)] = value
    return state


def from_torch(state: Mapping[str, Any], model: fill.Model, head: fill.Head = "strict"
               ) -> dict[str, Any]:
    """Makes a model's variables of PyTorch weights; each key is used, and used once.

    Understood are timm's, DeiT's, MAE's and DINOv2's files, and a module of torch's encoder layers,
    with {"model": ...} around the weights or "module." before every key. A masked autoencoder's
    decoder is left out. Positions of another image size are resized, and rows of tokens that have
    none are zeros. A model of no classes leaves a head out.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        model: what they are for.
        head: where the number of classes differs: "strict" refuses, "new" starts at zeros. With
            "new" a model that pools by the mean may also take weights that pool by a token, as
            MAE's fine-tuning does: their last norm is left out, and its own starts anew.

    Returns:
        {"params", "batch_stats"} of float32 arrays, the latter empty.

    Raises:
        WeightsError: other tokens or another order of norms than the model's, or any key unused,
            missing or of another shape; the message lists all.
    """
    _log_left_out(state)
    arrays = strip(state)
    shapes = tree.flatten(model.variable_shapes())
    layout = "torch" if _is_post(shapes) else "timm"
    _check_layout(arrays, shapes, layout)
    arrays = _check_pool(arrays, shapes, head == "new")
    return fill.fill(arrays, model, head, fill.Rules(
        "the weights of a ViT", partial(torch_key, layout=layout), partial(_fit, layout=layout),
        partial(_torch_shape, layout=layout), ("head", "head_dist"), _start_norm))


def infer_shape(state: Mapping[str, Any], num_heads: int = 0) -> Shape:
    """Reads the shape of a ViT off its PyTorch weights.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        num_heads: heads of each block; 0 = one for each 64 channels, or 8 of torch's own layers.

    Raises:
        WeightsError: an array that tells the shape is missing or has another rank, or the width is
            no multiple of the heads that no key tells.
    """
    arrays = strip(state)

    def find(name: str, axes: int) -> tuple[int, ...]:
        shape = np.shape(arrays.get(name, ()))
        if len(shape) != axes:
            raise WeightsError(f"these are not a whole vision transformer's weights: {name} is "
                               f"{shape if name in arrays else 'missing'}; expected {axes} axes"
                               f"{_TORCH_KEYS if post else ''}")
        return shape

    post = any(key.endswith("layers.0.self_attn.in_proj_weight") for key in arrays)
    patches = find("patch_embed.proj.weight", 2 if post else 4)
    width = patches[0]
    patch_size = math.isqrt(patches[1] // 3) if post else patches[2]
    find("cls_token", 3)
    rows = find("pos_embed", 3)[1]
    first = _count_first(rows, "dist_token" in arrays)
    if first is None:
        raise WeightsError(f"pos_embed has {rows} rows; expected those of a square grid, and one "
                           f"for each token before it or for none")
    _log_habits(post)
    hidden = find("transformer.layers.0.linear1.weight" if post else "blocks.0.mlp.fc1.weight", 2)
    return Shape(
        num_classes=count_classes(arrays), image_size=math.isqrt(rows - first) * patch_size,
        patch_size=patch_size, embed_dims=(width,),
        depths=(len({m[1] for key in arrays if (m := re.match(_BLOCK, key))}),),
        num_heads=(num_heads or _assume_heads(width, post),),
        mlp_dims=() if hidden[0] == 4 * width else (hidden[0],),
        token_layout="distilled" if "dist_token" in arrays else "class",
        pool="mean" if "fc_norm.weight" in arrays else "token",
        norm_order="post" if post else "pre",
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in arrays else 0.0)


def _log_habits(post: bool) -> None:
    """One line on what no key tells and weights may have otherwise."""
    _log.info("No key tells what images a ViT was trained on: they are taken to be normalised as "
              "ImageNet's, mean %s and std %s. Google's own (timm's augreg) have 0.5 for all six: "
              "--config.data.mean and std, --config.teacher.mean and std, or --mean and --std of "
              "tools/convert_checkpoint.py.", MEAN, STD)
    if post:
        _log.info("Nor does one tell what torch's layers are: taken for such that norm after the "
                  "sums (norm_first=False), with GELU, and read patches row by row, colours last.")


def count_classes(state: Mapping[str, Any]) -> int:
    """How many classes a state dict's classifier has; 0 where it has none."""
    arrays = strip(state)
    return next((len(arrays[f"{name}.weight"]) for name in _HEADS if f"{name}.weight" in arrays), 0)


def strip(state: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer's own arrays, under timm's spelling of a layer scale.

    Args:
        state: arrays by key, with or without {"model": ...} around them.

    Returns:
        The same without what parallel training put before the keys, and without the decoder and
        mask token of a masked autoencoder.
    """
    state = unwrap(state)
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in state.items()
            if not key.startswith(_AROUND)}


def torch_key(path: tree.Path, layout: str) -> str:
    """A variable's name in the PyTorch class.

    Args:
        path: such as ("params", "blocks_0", "attn", "qkv", "kernel").
        layout: "timm" or "torch".

    Returns:
        Such as "blocks.0.attn.qkv.weight".
    """
    words = [re.sub(r"^blocks_(\d+)$", r"blocks.\1", word) for word in path[1:-1]]
    key = ".".join([*words, _LEAVES.get(path[-1], path[-1])])
    if layout == "timm":
        return key
    # torch.nn.MultiheadAttention keeps this one layer as two bare parameters.
    key = key.replace(".in_proj.", ".in_proj_")
    key = re.sub(r"^blocks\.", "transformer.layers.", key)
    return re.sub(r"^head(?=[._])", "classifier", key)


def fit_positions(table: np.ndarray, rows: int, first: int, distilled: bool) -> np.ndarray | None:
    """Fits a table of positions to another grid and to other tokens before it.

    A token that the table has no row for gets zeros, which is to have no position: so do the class
    token of DeiT III, and the distillation token of G2SD, which stands last there.

    Args:
        table: float [R, C] of a square grid and 0, 1 or 2 rows before it.
        rows: that are wanted.
        first: how many of them are of tokens before the patches'.
        distilled: the weights have a distillation token.

    Returns:
        float32 [rows, C], or None where R is no such number.
    """
    old = _count_first(len(table), distilled)
    if old is None or old > first:
        return None
    table = table.astype(np.float32, copy=False)
    if old < first:
        empty = np.zeros((first - old, table.shape[1]), np.float32)
        table = np.concatenate([table[:old], empty, table[old:]])
        _log.info("%d of the %d tokens before the patches' have no position in the weights, and "
                  "get zeros", first - old, first)
    if len(table) != rows:
        _log.info("resized the positions of %d tokens to %d (bicubic)", len(table), rows)
        table = resize_positions(table, rows, first)
    return table


def _count_first(rows: int, distilled: bool) -> int | None:
    """How many of a table's rows stand before those of a square grid; None where none is square."""
    for first in (2, 1, 0) if distilled else (1, 0):
        if rows > first and math.isqrt(rows - first) ** 2 == rows - first:
            return first
    return None


def _assume_heads(width: int, post: bool) -> int:
    """The number of heads that no key tells, with a line that says so."""
    heads = _TORCH_HEADS if post else width // HEAD_WIDTH
    if not heads or width % heads or (not post and width % HEAD_WIDTH):
        raise WeightsError(
            f"these weights have {width} channels, and no key tells how many heads share them"
            + (f": {width} is no multiple of {HEAD_WIDTH}, the width of a head in ViT, DeiT and MAE"
               if not post else "") + ". Give the number as --config.model.num_heads='(HEADS,)' "
            "(--config.teacher.num_heads for a teacher, --num_heads for a tool).")
    _log.info("The ViT is taken to have %d heads (%s), which no key tells. For others: "
              "--config.model.num_heads='(HEADS,)', or --num_heads for a tool.", heads,
              "as vit_mini_patch4_32 has" if post else f"one for each {HEAD_WIDTH} channels")
    return heads


def _is_post(flat: Mapping[tree.Path, Any]) -> bool:
    """Whether variables are of blocks that norm after their sums."""
    return any("self_attn" in path for path in flat)


def _check_layout(state: Mapping[str, Any], shapes: Mapping[tree.Path, Any], layout: str) -> None:
    """Raises WeightsError for weights of other tokens or another order of norms than the model's.

    One error that says which, in place of a list of all the keys that follow from it.
    """
    if not owns(state):
        raise WeightsError(f"these are not a plain vision transformer's weights: no key is "
                           f"blocks.0.attn.qkv.weight (timm's) or "
                           f"transformer.layers.0.self_attn.in_proj_weight (torch's); the first "
                           f"keys are {', '.join(list(state)[:5])}")
    found = "timm" if any(key.startswith("blocks.") for key in state) else "torch"
    if found != layout:
        orders = {"timm": "pre", "torch": "post"}
        raise WeightsError(f"the weights are of blocks in the order norm_order={orders[found]} "
                           f"(keys of {found}), and the model has norm_order={orders[layout]}. "
                           f"Make the model with the weights' order.")
    if "cls_token" not in state:
        raise WeightsError("the weights have no class token (cls_token), which every ViT here has. "
                           "Give weights that were trained with one.")
    wanted = ("params", "dist_token") in shapes
    if wanted != ("dist_token" in state):
        fault = ("the model has a distillation token, and the weights have none (dist_token)"
                 if wanted else
                 "the weights have a distillation token (dist_token), and the model has none")
        raise WeightsError(f"{fault}. Make the model with "
                           f"token_layout={'class' if wanted else 'distilled'}, or give other "
                           f"weights.")


def _check_pool(state: dict[str, Any], shapes: Mapping[tree.Path, Any], new: bool
                ) -> dict[str, Any]:
    """The weights without a last norm that the model's pooling replaces; else WeightsError."""
    mean = ("params", "fc_norm", "scale") in shapes
    own = "fc_norm.weight" in state
    if mean == own or (not own and "norm.weight" not in state):
        return state
    if mean and new:
        _log.info("left out the weights' last norm (norm.*): the model pools by the mean of the "
                  "patches, and the norm after it (fc_norm) starts anew, as in MAE's fine-tuning")
        return {key: value for key, value in state.items() if not key.startswith("norm.")}
    names = {True: "mean (fc_norm.*)", False: "token (norm.*)"}
    raise WeightsError(f"the weights pool by pool={names[own]}, and the model by "
                       f"pool={names[mean]}. Make the model with the weights' pool"
                       + (', or give head="new" to fine-tune them as MAE does.' if mean else "."))


def _start_norm(path: tree.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The norm after a mean as it starts; None for any other variable."""
    if path[1] != "fc_norm":
        return None
    return np.full(shape, float(path[-1] == "scale"), np.float32)


def _torch_shape(path: tree.Path, shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The shape that one of our variables has in PyTorch."""
    if layout == "torch" and path == _PATCHES:
        return shape[-1], math.prod(shape[:-1])
    return tree.torch_shape(shape, path)


def _fit(found: np.ndarray, path: tree.Path, shape: tuple[int, ...], layout: str
         ) -> np.ndarray | None:
    """A PyTorch array as the variable at `path`, or None where the shape does not allow it."""
    if found.shape == _torch_shape(path, shape, layout):
        value = found.astype(np.float32, copy=False)
        if layout == "torch" and path == _PATCHES:
            return value.T.reshape(shape)
        return tree.transpose_to_ours(value, path)
    if path != _POSITIONS or found.ndim != 3 or found.shape[2] != shape[2]:
        return None
    first = next(n for n in (1, 2) if math.isqrt(shape[1] - n) ** 2 == shape[1] - n)
    table = fit_positions(found[0], shape[1], first, distilled=first == 2)
    return None if table is None else table[None]


def _log_left_out(state: Mapping[str, Any]) -> None:
    """One line on a masked autoencoder's parts that a classifier has no use for."""
    keys = [key.removeprefix("module.") for key in unwrap(state)]
    keys = [key for key in keys if key.startswith(_AROUND)]
    if keys:
        parts = sorted({key.split(".")[0] for key in keys})
        _log.info("left out %d arrays of pretraining (%s)", len(keys), ", ".join(parts))
