"""Models and their weights: made from a config, read from a run or a PyTorch file, hashed."""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tinyvit_jax import checkpoint, heads, log, models
from tinyvit_jax.convert import clip, convnext, files, regnet, resnet, shape, tinyvit, vit
from tinyvit_jax.convert.files import WeightsError

IMAGENET_MEAN, IMAGENET_STD = tinyvit.MEAN, tinyvit.STD
# By models.FAMILIES. Each has owns (a state dict is this family's), from_torch, to_torch,
# count_classes, infer_shape (create_model's settings, from a state dict and a number of heads or 0;
# a TinyViT's is shape.py), and the MEAN, STD and CROP_RATIO that weights are made with by habit.
_CONVERTERS: dict[str, Any] = {"tiny_vit": tinyvit, "clip_vit": clip, "vit": vit, "resnet": resnet,
                               "regnety": regnet, "convnextv2": convnext}
# In which `convert_to` names weights; each family has one or two of them.
LAYOUTS = ("microsoft", "timm", "torch", *resnet.LAYOUTS[1:], *regnet.LAYOUTS[1:],
           *convnext.LAYOUTS[1:])


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
               dtype: str = "float32", remat: bool = False, **options: Any):
    """The model that a `model` or `teacher` section describes.

    Args:
        section: holds name, image_size and the keys that override the variant's shape.
        num_classes: width of the head.
        image_size: used where the section leaves its own at 0.
        dtype: of activations.
        remat: recompute activations in the backward pass.
        options: of the family, such as drop_path and freeze_norm.
    """
    section = complete(section)
    shape = {key: section[key] for key in list_shape_keys(section)}
    return models.create_model(
        section.name, num_classes, section.image_size or image_size or None,
        dtype=jnp.dtype(dtype), remat=remat, **shape, **options)


def list_shape_keys(section: ml_collections.ConfigDict) -> list[str]:
    """The keys of a `model` or `teacher` section that override a variant's shape."""
    known = {key for family in models.FAMILIES.values() for key in family.shape}
    return [key for key in section if key in known]


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
    own = describe(open_trained(section.init_from, section.image_size, tuple(section.stem_strides),
                                num_heads=tuple(section.num_heads)))["model"]
    section = ml_collections.ConfigDict(section.to_dict())
    section.name = own["name"]
    for key in (*models.FAMILIES[own["name"]].shape, "image_size"):
        section[key] = section.get(key) or own[key]
    return section


def find_normalisation(path: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the images that weights were trained with: a run's own, else a habit.

    Args:
        path: a workdir, or a file, for which OpenAI's stand for a CLIP and ImageNet's for the rest.
    """
    if Path(path).is_dir():
        card = _read_card(path)
        return tuple(card["mean"]), tuple(card["std"])
    converter = _CONVERTERS[find_family(files.read_state(path))]
    return converter.MEAN, converter.STD


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
            PyTorch file does not. `heads.read_class_names` reads them.

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
        card = _read_card(path)
        state = convert_to(card["model"]["name"],
                           checkpoint.load_variables(path / "checkpoints", which)[0])
        _compare_heads(path, tuple(card["model"].get("num_heads", ())), model)
        if head == "new" and not trained_names:
            trained_names = heads.find_names(card["class_names"])
    else:
        state, notes = files.read_described(path)
        _compare_heads(path, _read_heads(notes), model)
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
        heads.check_count(class_names, model.num_classes, "class_names")
        variables = convert_from(state, model.copy(num_classes=old_classes), head)
        return heads.map_head(variables, trained_names, class_names)
    except WeightsError as error:
        raise WeightsError(f"The weights of {path} are of another model: {error}") from error


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


def convert_to(model: Any, variables: dict, layout: str = "") -> files.State:
    """Names variables for a PyTorch class, by the table of the model's family.

    Args:
        model: whose they are; the name of a variant will do.
        variables: {"params", "batch_stats"}.
        layout: one that the family has; "" = its own first choice.
    """
    to_torch = _CONVERTERS[models.family_of(model)].to_torch
    return to_torch(variables, layout) if layout else to_torch(variables)


def write_file(path: str | Path, trained: Trained, layout: str = "") -> int:
    """Writes a model's weights as a PyTorch file; returns how many arrays it holds.

    What its keys do not tell, the number of heads, stands in the file's notes.

    Args:
        path: a .pth, .pt or .safetensors.
        trained: the model and its weights.
        layout: as in `convert_to`.
    """
    state = convert_to(trained.model, trained.variables, layout)
    plain = models.family_of(trained.model) != "tiny_vit"  # whose bias tables tell the heads
    heads_ = models.describe_shape(trained.model).get("num_heads", ()) if plain else ()
    files.write_state(path, state, {"num_heads": ",".join(map(str, heads_))} if heads_ else {})
    return len(state)


def _read_heads(notes: dict[str, str]) -> tuple[int, ...]:
    """The number of heads in a file's notes, or () where it tells none."""
    words = notes.get("num_heads", "").split(",")
    return tuple(map(int, words)) if all(word.isdecimal() for word in words) else ()


def _compare_heads(path: Path, told: tuple[int, ...], model: Any) -> None:
    """Warns where weights were trained with another number of heads: no array's shape shows it."""
    own = models.describe_shape(model).get("num_heads", ())
    if told and models.family_of(model) != "tiny_vit" and tuple(told) != own:
        log.logger.warning("The weights %s are of a model with %s heads, and are used with %s: its "
                           "attention is another one.", path, *(
                               " ".join(map(str, heads)) for heads in (told, own)))


def find_family(state: files.State) -> str:
    """The family whose weights a state dict holds, by its keys; a TinyViT's where none claims it.

    What a TinyViT's converter then finds wrong, it names.
    """
    own = [name for name, converter in _CONVERTERS.items()
           if name != "tiny_vit" and converter.owns(state)]
    return own[0] if own else "tiny_vit"


def count_classes(state: files.State) -> int:
    """How many classes the classifier of a state dict has; 0 where it has none."""
    return _CONVERTERS[find_family(state)].count_classes(state)


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
        convert_to(model, trained.variables), resized))


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
        stem_strides: for a TinyViT file; () = those of the variant whose shape it has, else (2, 2).
            A ResNet's tells them.
        class_names: for a file; () = "class 0", "class 1" ...
        num_heads: for a file; () = as the bias tables of a TinyViT or the notes of a file that was
            written here say, else one for each 64 channels of a CLIP or a ViT.

    Raises:
        WeightsError: where it is neither, or the class names are not as many as the classes.
    """
    path = Path(path)
    if path.is_dir():
        return load_run(path, image_size=image_size)
    if not path.exists():
        raise WeightsError(f"{path} does not exist. Give the workdir of a run, or a .pth or "
                           f".safetensors file.")
    state, notes = files.read_described(path)
    family = find_family(state)
    if family == "tiny_vit":
        trained = _open_tiny_vit(state, image_size, stem_strides, num_heads)
    else:
        trained = _open_other(family, state, image_size, stem_strides,
                              num_heads or _read_heads(notes))
    count = trained.model.num_classes
    if class_names and len(class_names) != count:
        raise WeightsError(f"{path} has {count} classes, and {len(class_names)} names were given. "
                           f"Give one name for each class, in order.")
    return trained._replace(class_names=class_names or tuple(f"class {i}" for i in range(count)))


def _open_tiny_vit(state: files.State, image_size: int, stem_strides: tuple[int, ...],
                   num_heads: tuple[int, ...]) -> Trained:
    """A TinyViT from its PyTorch weights alone, without names of classes."""
    own = shape.infer_shape(state)
    own = own._replace(num_heads=num_heads or own.num_heads)
    # Strides are in no array, but a variant's windows tell of which variant they are.
    likely = [stem_strides] if stem_strides else [(2, 2), (2, 1), (1, 1)]
    found = [models.create_model("tiny_vit", image_size=image_size or None, stem_strides=strides,
                                 **own._asdict()) for strides in likely]
    model = next((m for m in found if models.find_image_size(m)), found[0])
    native = models.find_image_size(model)
    model = model.copy(image_size=native or model.image_size)
    trained = Trained(model, tinyvit.from_torch(state, model), (), tinyvit.MEAN, tinyvit.STD,
                      "center", tinyvit.CROP_RATIO)
    return resize(trained, image_size)


def _open_other(family: str, state: files.State, image_size: int, stem_strides: tuple[int, ...],
                num_heads: tuple[int, ...]) -> Trained:
    """A model of another family from its PyTorch weights alone, without names of classes."""
    converter = _CONVERTERS[family]
    own = converter.infer_shape(state, num_heads[0] if num_heads else 0)._asdict()
    given = {"num_heads": num_heads, "stem_strides": stem_strides}
    model = models.create_model(family, **own | {k: v for k, v in given.items() if v})
    trained = Trained(model, converter.from_torch(state, model), (), converter.MEAN, converter.STD,
                      "center", converter.CROP_RATIO)
    return resize(trained, image_size)
