"""Models and their weights: made from a config, read from a run or a PyTorch file, hashed."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tinyvit_jax import checkpoint, models
from tinyvit_jax.convert import files, tinyvit


class WeightsError(ValueError):
    """Weights that cannot be used; the message names the file and says what to do."""


class Run(NamedTuple):
    """A trained model as its workdir describes it (model.json)."""

    model: Any
    variables: dict
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: str
    crop_ratio: float


def make_model(section: ml_collections.ConfigDict, num_classes: int, image_size: int = 0,
               drop_path: float = 0.0, dtype: str = "float32", remat: bool = False,
               freeze_norm: bool = False):
    """The model that a `model` or `teacher` section describes.

    Args:
        section: holds name, image_size and the keys that override the variant's shape.
        num_classes: width of the head.
        image_size: used where the section leaves its own at 0.
        drop_path: stochastic depth, the last block's rate.
        dtype: of activations.
        remat: recompute activations in the backward pass.
        freeze_norm: BatchNorm uses its stored statistics while training.
    """
    return models.create_model(
        section.name, num_classes, section.image_size or image_size or None,
        embed_dims=tuple(section.embed_dims), depths=tuple(section.depths),
        num_heads=tuple(section.num_heads), window_sizes=tuple(section.window_sizes),
        stem_strides=tuple(section.stem_strides), drop_path=drop_path, dtype=jnp.dtype(dtype),
        remat=remat, freeze_norm=freeze_norm)


def variable_shapes(model) -> dict:
    """Shapes and dtypes of a model's variables, without computing them."""
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.eval_shape(lambda k, x: model.init(k, x, train=False), jax.random.key(0), image)


def load_weights(path: str | Path, model, head: str = "strict") -> dict:
    """Reads weights for a model: from a run's workdir, a .pth or a .safetensors.

    Args:
        path: a workdir of ours, or a file in Microsoft's or timm's key layout.
        model: from `create_model`.
        head: "strict", or "new" to start the classifier at zero where its class count differs.

    Returns:
        {"params", "batch_stats"} of float32 arrays.

    Raises:
        WeightsError, or the converter's error that lists every key that does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"The weights {path} do not exist. Give a workdir of a finished run, or "
                           f"a .pth or .safetensors file.")
    if path.is_dir():
        variables, _ = checkpoint.load_variables(path / "checkpoints")
        variables = _replace_head(variables, model) if head == "new" else variables
        check_variables(variables, model, str(path))
        return jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    return tinyvit.from_torch(files.read_state(str(path)), model, head=head)


def _replace_head(variables: dict, model) -> dict:
    """Zeroes the classifier where its shape is not the model's."""
    wanted = variable_shapes(model)["params"].get("head", {})
    own = variables["params"].get("head", {})
    if all(own[k].shape == wanted[k].shape for k in wanted if k in own):
        return variables
    new = {k: np.zeros(v.shape, np.float32) for k, v in wanted.items()}
    checkpoint.logger.info("The classifier starts at zero: the weights have %s classes, the model "
                           "%s.", own["bias"].shape[0], model.num_classes)
    return {**variables, "params": {**variables["params"], "head": new}}


def check_variables(variables: dict, model, origin: str) -> None:
    """Raises WeightsError listing every array that the model lacks, misses or shapes otherwise."""
    def flat(tree):
        return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape)
                for p, x in jax.tree_util.tree_leaves_with_path(tree)}

    found, wanted = flat(variables), flat(variable_shapes(model))
    wrong = [f"{k}: found {found.get(k, 'nothing')}, expected {wanted.get(k, 'nothing')}"
             for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k)]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise WeightsError(
            f"The weights of {origin} are of another model, {len(wrong)} arrays differ: {shown}. "
            f"Give the model section of the config that trained them, or other weights.")


def hash_weights(variables: dict) -> str:
    """sha256 over names, shapes and float32 bytes of all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for path, x in sorted(jax.tree_util.tree_leaves_with_path(variables),
                          key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(f"{jax.tree_util.keystr(path)}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x, np.float32).tobytes())
    return digest.hexdigest()


def describe_run(config: ml_collections.ConfigDict, model, class_names: tuple[str, ...]) -> dict:
    """What model.json holds: all that is needed to use the weights elsewhere."""
    return {
        "model": {
            "name": config.model.name, "num_classes": len(class_names),
            "image_size": model.image_size, "embed_dims": model.embed_dims,
            "depths": model.depths, "num_heads": model.num_heads,
            "window_sizes": model.window_sizes, "stem_strides": model.stem_strides,
        },
        "class_names": class_names, "mean": config.data.mean, "std": config.data.std,
        "crop": config.eval.crop, "crop_ratio": config.eval.crop_ratio,
    }


def load_run(workdir: str | Path) -> Run:
    """The model, weights and preprocessing of a run.

    Raises:
        WeightsError: where the folder holds no model.json or no checkpoint.
    """
    path = Path(workdir) / "model.json"
    if not path.exists():
        raise WeightsError(f"{workdir} is not the workdir of a run: {path.name} is missing. Give "
                           f"the --workdir that was trained.")
    card = json.loads(path.read_text())
    shape = card["model"]
    model = models.create_model(
        shape["name"], shape["num_classes"], shape["image_size"],
        **{k: tuple(shape[k]) for k in ("embed_dims", "depths", "num_heads", "window_sizes",
                                        "stem_strides")})
    return Run(model, load_weights(workdir, model), tuple(card["class_names"]),
               tuple(card["mean"]), tuple(card["std"]), card["crop"], card["crop_ratio"])
