"""Teachers: what turns replayed pixels into the logits that a store keeps the top K of."""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import evaluate, log, mix, models, weights
from tinyvit_jax import mesh as meshes


class TeacherError(ValueError):
    """A teacher that cannot be used; the message says what it gave and what was expected."""


class Teacher(NamedTuple):
    """A teacher ready to run: pixels float32 [B, S, S, 3] in 0-255 -> logits [B, C]."""

    logits: Callable[[jax.Array], jax.Array]
    description: dict  # as the manifest holds it: name, weights hash, image_size, mean, std, dtype


def make_teacher(config: ml_collections.ConfigDict, class_names: tuple[str, ...], view_size: int,
                 mesh: Mesh) -> Teacher:
    """The teacher of a run.

    Args:
        config: the `teacher` section: weights of a workdir, which bring their own shape, image
            size, normalisation and class names; those of a PyTorch file, which lack the last; or a
            `module:function` that takes uint8 [B, S, S, 3] RGB and gives logits [B, C] as anything
            numpy can read.
        class_names: of the student, in order; the teacher's are put into that order by name.
        view_size: S of the views.
        mesh: over which batches are cut.

    Raises:
        TeacherError, or the errors of loading weights.
    """
    if ":" in config.name:
        return _user_teacher(config.name, len(class_names), view_size)
    if not config.weights:
        raise TeacherError(
            f"The teacher {config.name or '(none named)'} has no weights. Set "
            f"--config.teacher.weights=WORKDIR_OR_FILE, or name a function by "
            f"--config.teacher.name=module:function.")
    trained = weights.open_trained(config.weights, config.image_size, tuple(config.stem_strides),
                                   num_heads=tuple(config.num_heads))
    _check_model(config, trained.model)
    class_map = _match_classes(config.weights, trained, class_names)
    mean, std = (config.mean, config.std) if config.mean else (trained.mean, trained.std)
    model = trained.model.copy(dtype=jnp.dtype(config.dtype))
    variables, size = meshes.put_state(trained.variables, mesh), model.image_size

    @jax.jit
    def logits(variables: dict, pixels: jax.Array) -> jax.Array:
        if size != view_size:
            shape = (pixels.shape[0], size, size, 3)
            pixels = jnp.clip(jax.image.resize(pixels, shape, "cubic"), 0.0, 255.0)
        out = model.apply(variables, mix.normalize(pixels, mean, std), train=False)
        return out if class_map is None else out[:, class_map]

    return Teacher(lambda pixels: logits(variables, pixels), {
        "name": config.name or Path(config.weights).name,
        "weights": weights.hash_weights(trained.variables), "image_size": size,
        "mean": list(mean), "std": list(std), "dtype": config.dtype})


def _check_model(config: ml_collections.ConfigDict, model) -> None:
    """Raises TeacherError where the weights are of another model than the config describes."""
    variant = models.VARIANTS.get(config.name, {})
    wanted = {key: tuple(config[key]) or variant.get(key, ()) for key in ("embed_dims", "depths")}
    found = {key: getattr(model, key) for key in wanted}
    if variant:
        wanted["family"], found["family"] = map(models.family_of, (config.name, model))
    faults = [f"{key} {found[key]}, expected {wanted[key]}" for key in wanted
              if wanted[key] and found[key] != wanted[key]]
    if faults:
        raise TeacherError(
            f"The weights {config.weights} are not those of --config.teacher.name={config.name}: "
            f"{'; '.join(faults)}. Give the weights of that model, or leave the name and the keys "
            f"of its shape empty: weights bring their own.")


def _match_classes(path: str, trained: weights.Trained, class_names: tuple[str, ...]
                   ) -> np.ndarray | None:
    """Which of the teacher's classes each of the student's is; a file has no names to go by."""
    if Path(path).is_dir():
        return evaluate.make_class_map(trained.class_names, class_names, max_missing=0.0)
    count = trained.model.num_classes
    if count != len(class_names):
        raise TeacherError(f"The teacher {path} has {count} classes, and the "
                           f"images have {len(class_names)}. Convert it with its class names "
                           f"(tools/convert_checkpoint.py --classes) and name the folder instead.")
    log.logger.info("The teacher %s names none of its %d classes: they are taken to be in the "
                    "order of the images' (%s ... %s).", path, count, class_names[0],
                    class_names[-1])
    return None


def _user_teacher(name: str, num_classes: int, view_size: int) -> Teacher:
    """Wraps a user's own function, and checks what it gives on every batch."""
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise TeacherError(f"--config.teacher.name={name}: {error}. Expected module:function with "
                           f"the module on PYTHONPATH.") from error

    def logits(pixels: jax.Array) -> jax.Array:
        # A mixed pixel is no whole number; a user's function is promised uint8.
        out = np.asarray(function(np.asarray(jnp.round(pixels)).astype(np.uint8)), np.float32)
        if out.shape != (len(pixels), num_classes) or not np.isfinite(out).all():
            raise TeacherError(
                f"The teacher {name} gave an array of shape {out.shape}"
                f"{'' if np.isfinite(out).all() else ' with values that are not finite'}; expected "
                f"finite logits of shape {(len(pixels), num_classes)}, one column for each class.")
        return jnp.asarray(out)

    # The function's file stands for the weights: the best there is without knowing them.
    file = getattr(importlib.import_module(module_name), "__file__", None)
    source = Path(file).read_bytes() if file else name.encode()
    return Teacher(logits, {"name": name, "weights": hashlib.sha256(source).hexdigest(),
                            "image_size": view_size, "mean": [], "std": []})
