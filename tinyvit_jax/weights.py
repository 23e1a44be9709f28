"""Models and their weights: made from a config, read from a run or a PyTorch file, hashed."""

import collections
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tinyvit_jax import checkpoint, log, models
from tinyvit_jax.convert import clip, files, shape, tinyvit
from tinyvit_jax.convert.files import WeightsError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLASSES_22K = 21841  # of ImageNet-22k
_CONVERTERS: dict[str, Any] = {"tiny_vit": tinyvit, "clip_vit": clip}  # by models.FAMILIES


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
    section = complete(section)
    return models.create_model(
        section.name, num_classes, section.image_size or image_size or None,
        embed_dims=tuple(section.embed_dims), depths=tuple(section.depths),
        num_heads=tuple(section.num_heads), window_sizes=tuple(section.window_sizes),
        stem_strides=tuple(section.stem_strides), drop_path=drop_path, dtype=jnp.dtype(dtype),
        remat=remat, freeze_norm=freeze_norm)


def complete(section: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A `model` section whose empty name is filled in: with the shape of init_from's weights.

    Args:
        section: comes back as it is where it names a model; what it sets itself stays.
    """
    if section.name:
        return section
    if not section.init_from:
        raise WeightsError("--config.model.init_from='' cannot work where model.name is empty: "
                           "expected the weights to start from (a workdir, a .pth or a "
                           ".safetensors), or a variant in --config.model.name.")
    own = describe(open_trained(section.init_from, section.image_size,
                                tuple(section.stem_strides)))["model"]
    section = ml_collections.ConfigDict(section.to_dict())
    section.name = own["name"]
    for key in (*models.FAMILIES[own["name"]].shape, "image_size"):
        if key in section:
            section[key] = section[key] or own[key]
    return section


def find_normalisation(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the images that weights were trained with: a run's own, else a habit.

    Args:
        path: a workdir, or a file, for which OpenAI's stand for a CLIP and ImageNet's for the rest.
    """
    if Path(path).is_dir():
        card = _read_card(path)
        return tuple(card["mean"]), tuple(card["std"])
    if clip.is_clip(files.read_state(path)):
        return clip.MEAN, clip.STD
    return IMAGENET_MEAN, IMAGENET_STD


def load_weights(path: str | Path, model, head: Literal["strict", "new"] = "strict",
                 class_names: tuple[str, ...] = (), which: str = "last",
                 trained_names: tuple[str, ...] = ()) -> dict:
    """Reads weights for a model: from a run's workdir, a .pth or a .safetensors.

    Tables of attention biases of other windows are resized.

    Args:
        path: a workdir of ours, or a file in Microsoft's or timm's key layout.
        model: from `create_model`.
        head: "strict", or "new" to fit the classifier to other classes: by name where both sides
            have names; else it is kept where it has as many classes, and starts at zero where not.
        class_names: of the model, for head="new".
        which: checkpoint of a workdir: "last", or "best" by its evaluations.
        trained_names: of the weights' classes, for head="new"; () = as a workdir tells them, a
            PyTorch file does not. `read_class_names` reads them.

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
        state = convert_to(checkpoint.load_variables(path / "checkpoints", which)[0])
        if head == "new" and not trained_names:
            trained_names = _named(_read_card(path)["class_names"])
    else:
        state = files.read_state(path)
    try:
        old_classes = count_classes(state)
        if head == "strict" or not (old_classes and model.num_classes and class_names
                                    and trained_names):
            if head == "new" and old_classes and old_classes == model.num_classes:
                log.logger.info(
                    "The classifier is kept: the weights name none of their %d classes, which are "
                    "taken to be these, in this order. Where they are others, name them by "
                    "--config.model.class_names=FILE.", old_classes)
            return convert_from(state, model, head)
        _check_count(class_names, model.num_classes, "class_names")
        variables = convert_from(state, model.copy(num_classes=old_classes))
        return map_head(variables, trained_names, class_names)
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

    Raises:
        WeightsError: `trained` are not as many as the head's classes.
    """
    if "head" not in variables["params"]:
        return variables
    _check_count(trained, variables["params"]["head"]["bias"].size, "trained_names")
    if trained == wanted:
        return variables
    check_distinct(trained)
    place = {name: i for i, name in enumerate(trained)}
    known = np.array([name in place for name in wanted])
    rows = np.array([place.get(name, 0) for name in wanted])
    _log_mapping([name for name in wanted if name not in place], len(wanted))

    def fit(x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)[..., rows]
        mean = x[..., known].mean(-1, keepdims=True) if known.any() else np.zeros_like(x[..., :1])
        return np.where(known, x, mean)

    head = {name: fit(x) for name, x in variables["params"]["head"].items()}
    return {**variables, "params": {**variables["params"], "head": head}}


def _named(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names of a workdir's classes, or none where it was converted without any."""
    names = tuple(class_names)
    return () if names == tuple(f"class {i}" for i in range(len(names))) else names


def check_distinct(names: Sequence[str]) -> None:
    """Raises WeightsError where classes go by name and two have the same."""
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise WeightsError(f"{len(twice)} class names stand twice ({', '.join(twice[:5])}): nobody "
                           f"can tell these classes apart. Give names that differ, for instance "
                           f"WordNet ids.")


def _log_mapping(missing: list[str], count: int) -> None:
    """One line on how many classes were found by name, and what becomes of the others."""
    text = f"The classifier has {count - len(missing)} of {count} classes by name"
    if missing:
        first = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        text += f"; {len(missing)} were not trained ({first})"
        text += ", so it starts at zero" if len(missing) == count else " and take the others' mean"
    log.logger.info("%s.", text)


def _check_count(names: tuple[str, ...], count: int, key: str) -> None:
    if len(names) != count:
        raise WeightsError(
            f"{key} holds {len(names)} names ({', '.join(names[:3])} ...), and the classifier has "
            f"{count} classes. Give one name for each class, in the order of its training.")


def read_class_names(path: str | Path, num_classes: int = 0,
                     imagenet_names: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Reads the names of a classifier's classes from a text file, one a line.

    The original's imagenet_1kto22k.txt is understood too: for each class of ImageNet-1k, in the
    order of their WordNet ids, its index among the 21,841 of ImageNet-22k, or -1 for none.

    Args:
        path: of the file; blank lines do not count.
        num_classes: of the classifier; 0 = as many as the file names, or 21,841 for that list.
        imagenet_names: the WordNet ids of ImageNet-1k, needed for that list alone.

    Returns:
        A name for each class; "class i" for those that the original's list does not tell.

    Raises:
        WeightsError: no such file, or a number of names that does not fit.
    """
    if not Path(path).is_file():
        raise WeightsError(f"The file of class names {path} does not exist. Give a text file with "
                           f"one class a line, in the order of the classifier.")
    lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    indices = _read_indices(lines)
    if indices and num_classes != len(lines):
        return _spread_names(path, indices, num_classes or _CLASSES_22K, imagenet_names)
    check_distinct(lines)
    if num_classes:
        _check_count(tuple(lines), num_classes, str(path))
    return tuple(lines)


def _read_indices(lines: list[str]) -> list[int]:
    """The numbers of the original's list, or none where the lines are names."""
    if len(lines) != 1000 or not all(re.fullmatch(r"-1|\d+", line) for line in lines):
        return []
    indices = [int(line) for line in lines]
    return indices if min(indices) < 0 or max(indices) >= len(lines) else []


def _spread_names(path: str | Path, indices: list[int], num_classes: int,
                  imagenet_names: tuple[str, ...]) -> tuple[str, ...]:
    """Gives the classes at `indices` the names of ImageNet-1k."""
    if len(imagenet_names) != len(indices):
        raise WeightsError(
            f"{path} tells where the 1,000 classes of ImageNet-1k are among {num_classes:,}, and "
            f"not what they are called: {len(imagenet_names)} names were given with it. Give the "
            f"1,000 WordNet ids in their order, or a file with one class name a line.")
    used = [i for i in indices if i >= 0]
    if len(set(used)) < len(used) or max(used) >= num_classes:
        raise WeightsError(f"{path} does not fit a classifier of {num_classes} classes: its "
                           f"largest index is {max(used)}, and {len(used) - len(set(used))} stand "
                           f"there twice. Give the list that belongs to these weights.")
    names = [f"class {i}" for i in range(num_classes)]
    for i, name in zip(indices, imagenet_names, strict=True):
        if i >= 0:
            names[i] = name
    return tuple(names)


def convert_from(state: files.State, model, head: Literal["strict", "new"] = "strict") -> dict:
    """Makes a model's variables of PyTorch weights, by the table of the model's family.

    Args:
        state: arrays by key, as convert.files.read_state gives them.
        model: from `create_model`.
        head: where the number of classes differs: "strict" refuses, "new" starts at zeros.

    Returns:
        {"params", "batch_stats"} of float32 arrays.

    Raises:
        WeightsError: arrays that do not fit; the message lists all.
    """
    return _CONVERTERS[models.family_of(model)].from_torch(state, model, head)


def convert_to(variables: dict, layout: str = "microsoft") -> files.State:
    """Names variables for a PyTorch class, by the table of the family whose they are.

    Args:
        variables: {"params", "batch_stats"}.
        layout: "microsoft", or "timm" for a TinyViT.
    """
    family = "clip_vit" if "visual" in variables["params"] else "tiny_vit"
    return _CONVERTERS[family].to_torch(variables, layout)


def count_classes(state: files.State) -> int:
    """How many classes the classifier of a state dict has; 0 where it has none."""
    return _CONVERTERS["clip_vit" if clip.is_clip(state) else "tiny_vit"].count_classes(state)


def hash_weights(variables: dict) -> str:
    """sha256 over names, shapes and float32 bytes of all arrays, in the order of their names."""
    digest = hashlib.sha256()
    for path, x in sorted(jax.tree_util.tree_leaves_with_path(variables),
                          key=lambda item: jax.tree_util.keystr(item[0])):
        digest.update(f"{jax.tree_util.keystr(path)}{x.shape}".encode())
        digest.update(np.ascontiguousarray(x, np.float32).tobytes())
    return digest.hexdigest()


def describe(trained: Trained, name: str = "") -> dict:
    """What model.json holds: all but the weights that is needed to use them elsewhere.

    Args:
        trained: the model; its weights are not read.
        name: of its variant; "" = its family's.
    """
    name = name or models.family_of(trained.model)
    return {
        "model": {"name": name, **models.describe_shape(trained.model)},
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


def load_run(workdir: str | Path, which: str = "last", image_size: int = 0) -> Trained:
    """The model, weights and preprocessing of a run.

    Args:
        workdir: of the run.
        which: checkpoint: "last", or "best" by its evaluations.
        image_size: pixels that the model is wanted for, see `resize`; 0 = the run's.

    Raises:
        WeightsError: where the folder holds no model.json or no checkpoint.
    """
    card = _read_card(workdir)
    own = card["model"]
    shaped = {key: own[key] for key in models.FAMILIES[models.family_of(own["name"])].shape}
    model = models.create_model(own["name"], own["num_classes"], own["image_size"], **shaped)
    trained = Trained(model, load_weights(workdir, model, which=which), tuple(card["class_names"]),
                      tuple(card["mean"]), tuple(card["std"]), card["crop"], card["crop_ratio"])
    return resize(trained, image_size)


def resize(trained: Trained, image_size: int) -> Trained:
    """Fits weights to another image size: windows keep their share of the map, tables follow.

    Args:
        trained: a model with its weights.
        image_size: pixels; 0 = leave it as it is.
    """
    model = trained.model
    if image_size in (0, model.image_size):
        return trained
    log.logger.info("The weights were trained at %d pixels and are used at %d.", model.image_size,
                    image_size)
    own = {**models.describe_shape(model), "image_size": image_size}
    if "window_sizes" in own:
        own["window_sizes"] = models.scale_windows(model.window_sizes, model.image_size, image_size)
    resized = models.create_model(models.family_of(model), dtype=model.dtype, **own)
    return trained._replace(model=resized, variables=convert_from(
        convert_to(trained.variables), resized))


def open_trained(path: str | Path, image_size: int = 0, stem_strides: tuple[int, ...] = (),
                 class_names: tuple[str, ...] = (), num_heads: tuple[int, ...] = ()) -> Trained:
    """A trained model from a run's workdir or from a PyTorch file alone.

    A file tells its family, widths, depths, windows and classes; what it cannot tell is taken from
    the arguments and else from the habits of ImageNet, or of OpenAI for a CLIP.

    Args:
        path: a workdir, a .pth or a .safetensors.
        image_size: pixels, see `resize`; 0 = those of the run, of a CLIP file, or of the variant
            whose shape a TinyViT file has. Of another TinyViT file nobody knows them: there it
            is what the file's windows are for, and 0 is 224.
        stem_strides: for a TinyViT file; () = (2, 2).
        class_names: for a file; () = "class 0", "class 1" ...
        num_heads: for a file; () = as the bias tables of a TinyViT say, one for each 64 channels of
            a CLIP.

    Raises:
        WeightsError: where it is neither, or the class names are not as many as the classes.
    """
    path = Path(path)
    if path.is_dir():
        return load_run(path, image_size=image_size)
    if not path.exists():
        raise WeightsError(f"{path} does not exist. Give the workdir of a run, or a .pth or "
                           f".safetensors file.")
    state = files.read_state(path)
    open_state = _open_clip if clip.is_clip(state) else _open_tiny_vit
    trained = open_state(state, image_size, stem_strides, num_heads)
    count = trained.model.num_classes
    if class_names and len(class_names) != count:
        raise WeightsError(f"{path} has {count} classes, and {len(class_names)} names were given. "
                           f"Give one name for each class, in order.")
    return trained._replace(class_names=class_names or tuple(f"class {i}" for i in range(count)))


def _open_tiny_vit(state: files.State, image_size: int, stem_strides: tuple[int, ...],
                   num_heads: tuple[int, ...]) -> Trained:
    """A TinyViT from its PyTorch weights alone, without names of classes."""
    own = shape.infer_shape(state)
    model = models.create_model(
        "tiny_vit", own.num_classes, image_size or None, embed_dims=own.embed_dims,
        depths=own.depths, num_heads=num_heads or own.num_heads, window_sizes=own.window_sizes,
        stem_strides=stem_strides)
    native = models.find_image_size(model)
    model = model.copy(image_size=native or model.image_size)
    trained = Trained(model, tinyvit.from_torch(state, model), (), IMAGENET_MEAN, IMAGENET_STD,
                      "center", 224 / 256)
    return resize(trained, image_size)


def _open_clip(state: files.State, image_size: int, stem_strides: tuple[int, ...],
               num_heads: tuple[int, ...]) -> Trained:
    """A CLIP from its PyTorch weights alone, without names of classes."""
    own = clip.infer_shape(state, num_heads[0] if num_heads else 0)
    model = models.create_model(
        "clip_vit", own.num_classes, own.image_size, embed_dims=own.embed_dims,
        depths=own.depths, num_heads=num_heads or own.num_heads, stem_strides=stem_strides,
        patch_size=own.patch_size, embed_dim=own.embed_dim)
    log.logger.info("The weights are taken for one of OpenAI's CLIP: %d heads and the GELU "
                    "x sigmoid(1.702 x), which no key tells.", own.num_heads[0])
    trained = Trained(model, clip.from_torch(state, model), (), clip.MEAN, clip.STD, "center",
                      224 / 256)
    return resize(trained, image_size)
