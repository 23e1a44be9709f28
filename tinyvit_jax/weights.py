"""Models and their weights: made from a config, read from a run or a PyTorch file, hashed."""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tinyvit_jax import checkpoint, log, models
from tinyvit_jax.convert import files, shape, tinyvit
from tinyvit_jax.convert.files import WeightsError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Trained(NamedTuple):
    """A model with its weights and preprocessing."""

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


def load_weights(path: str | Path, model, head: Literal["strict", "new"] = "strict",
                 class_names: tuple[str, ...] = (), which: str = "last") -> dict:
    """Reads weights for a model: from a run's workdir, a .pth or a .safetensors.

    Tables of attention biases of other windows are resized.

    Args:
        path: a workdir of ours, or a file in Microsoft's or timm's key layout.
        model: from `create_model`.
        head: "strict", or "new" to fit the classifier to other classes: by name where both sides
            have names, else zeros where the count differs.
        class_names: of the model, for head="new".
        which: checkpoint of a workdir: "last", or "best" by its evaluations.

    Returns:
        {"params", "batch_stats"} of float32 arrays.

    Raises:
        WeightsError: a path that is neither, or arrays that do not fit; the message lists all.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"The weights {path} do not exist. Give a workdir of a finished run, or "
                           f"a .pth or .safetensors file.")
    if path.is_dir():
        variables, _ = checkpoint.load_variables(path / "checkpoints", which)
        if head == "new" and class_names:
            variables = map_head(variables, tuple(_read_card(path)["class_names"]), class_names)
        state = tinyvit.to_torch(variables)
    else:
        state = files.read_state(str(path))
    try:
        return tinyvit.from_torch(state, model, head=head)
    except WeightsError as error:
        raise WeightsError(f"The weights of {path} are of another model: {error}") from error


def map_head(variables: dict, trained: tuple[str, ...], wanted: tuple[str, ...]) -> dict:
    """Gives the classifier the wanted classes, each by its name.

    A class without a counterpart takes the mean of those that have one, as the original does from
    21,841 classes to 1,000; where no name is shared the head starts at zero.

    Args:
        variables: {"params", "batch_stats"}; without a head they come back as they are.
        trained: names of the head's classes, in order.
        wanted: names to have, in order.
    """
    if trained == wanted or "head" not in variables["params"]:
        return variables
    place = {name: i for i, name in enumerate(trained)}
    known = np.array([name in place for name in wanted])
    rows = np.array([place.get(name, 0) for name in wanted])
    log.logger.info("The classifier has %d of %d classes by name; %s.", known.sum(), len(wanted),
                    "the others take their mean" if known.any() else "it starts at zero")

    def fit(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)[..., rows]
        mean = x[..., known].mean(-1, keepdims=True) if known.any() else np.zeros_like(x[..., :1])
        return np.where(known, x, mean)

    head = {name: fit(x) for name, x in variables["params"]["head"].items()}
    return {**variables, "params": {**variables["params"], "head": head}}


def hash_weights(variables: dict) -> str:
    """sha256 over names, shapes and float32 bytes of all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for path, x in sorted(jax.tree_util.tree_leaves_with_path(variables),
                          key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(f"{jax.tree_util.keystr(path)}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x, np.float32).tobytes())
    return digest.hexdigest()


def describe(trained: Trained, name: str = "tiny_vit") -> dict:
    """What model.json holds: all but the weights that is needed to use them elsewhere."""
    model = trained.model
    return {
        "model": {
            "name": name, "num_classes": model.num_classes, "image_size": model.image_size,
            "embed_dims": model.embed_dims, "depths": model.depths, "num_heads": model.num_heads,
            "window_sizes": model.window_sizes, "stem_strides": model.stem_strides,
        },
        "class_names": trained.class_names, "mean": trained.mean, "std": trained.std,
        "crop": trained.crop, "crop_ratio": trained.crop_ratio,
    }


def save_trained(trained: Trained, workdir: str | Path) -> None:
    """Writes a model as the workdir of a run that has just ended: model.json and a checkpoint."""
    workdir = Path(workdir)
    if (workdir / "checkpoints").exists():
        raise WeightsError(f"{workdir} already holds checkpoints. Give another folder.")
    with checkpoint.Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(0, {**trained.variables, "ema": {}})
    log.write_json(workdir / "model.json", describe(trained))


def _read_card(workdir: str | Path) -> dict:
    """The content of a workdir's model.json."""
    card = log.read_json(Path(workdir) / "model.json")
    if card is None:
        raise WeightsError(f"{workdir} is not the workdir of a run: model.json is missing. Give "
                           f"the --workdir that was trained.")
    return card


def load_run(workdir: str | Path, which: str = "last") -> Trained:
    """The model, weights and preprocessing of a run.

    Raises:
        WeightsError: where the folder holds no model.json or no checkpoint.
    """
    card = _read_card(workdir)
    own = card["model"]
    model = models.create_model(
        own["name"], own["num_classes"], own["image_size"],
        embed_dims=own["embed_dims"], depths=own["depths"], num_heads=own["num_heads"],
        window_sizes=own["window_sizes"], stem_strides=own["stem_strides"])
    return Trained(model, load_weights(workdir, model, which=which), tuple(card["class_names"]),
               tuple(card["mean"]), tuple(card["std"]), card["crop"], card["crop_ratio"])


def open_trained(path: str | Path, image_size: int = 0, stem_strides: tuple[int, ...] = (),
                 class_names: tuple[str, ...] = ()) -> Trained:
    """A trained model from a run's workdir or from a PyTorch file alone.

    A file tells its widths, depths, heads, windows and classes; what it cannot tell is taken from
    the arguments and else from ImageNet's habits.

    Args:
        path: a workdir, a .pth or a .safetensors.
        image_size: pixels, for a file; 0 = 224.
        stem_strides: for a file; () = (2, 2).
        class_names: for a file; () = "class 0", "class 1" ...

    Raises:
        WeightsError: where it is neither, or the class names are not as many as the classes.
    """
    path = Path(path)
    if path.is_dir():
        return load_run(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist. Give the workdir of a run, or a .pth or "
                           f".safetensors file.")
    state = files.read_state(str(path))
    own = shape.infer_shape(state)
    if class_names and len(class_names) != own.num_classes:
        raise WeightsError(f"{path} has {own.num_classes} classes, and {len(class_names)} names "
                           f"were given. Give one name for each class, in order.")
    model = models.create_model(
        "tiny_vit", own.num_classes, image_size or None, embed_dims=own.embed_dims,
        depths=own.depths, num_heads=own.num_heads, window_sizes=own.window_sizes,
        stem_strides=stem_strides)
    names = class_names or tuple(f"class {i}" for i in range(own.num_classes))
    return Trained(model, tinyvit.from_torch(state, model), names, IMAGENET_MEAN, IMAGENET_STD,
                   "center", 224 / 256)
