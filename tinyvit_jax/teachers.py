"""Teachers: what turns replayed pixels into the probabilities that a student learns."""

import hashlib
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tinyvit_jax import evaluate, heads, log, mix, models, onednn, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.team import Team


class TeacherError(ValueError):
    """A teacher that cannot be used; the message says what it gave and what was expected."""


class Teacher(NamedTuple):
    """A teacher ready to run, in one process or, all at once, in each of several.

    `log_probs` takes pixels float32 [B, S, S, 3] in 0-255, a global array on the mesh, and gives
    float32 [B, C], the log of each class's probability, its rows cut over the devices.
    """

    log_probs: Callable[[jax.Array], jax.Array]
    description: dict  # as the manifest holds it: name, weights hash, image_size, mean, std, dtype
    # What runs on the devices: compiled functions of (variables, pixels), and their variables.
    programs: tuple[tuple[Any, dict], ...] = ()


def make_teacher(config: ml_collections.ConfigDict, class_names: tuple[str, ...], view_size: int,
                 mesh: Mesh, temperature: float = 1.0) -> Teacher:
    """The teacher of a run: one, or several whose probabilities are averaged.

    Args:
        config: the `teacher` section: weights of a workdir, which bring their own shape, image
            size, normalisation and class names; those of a PyTorch file, which lack the last; or a
            `module:function` that takes uint8 [B, S, S, 3] RGB and gives logits [B, C] as anything
            numpy can read. Those in `ensemble` are used in the same way, each by itself.
        class_names: of the student, in order; the teacher's are put into that order by name.
        view_size: S of the views.
        mesh: over which batches are cut, and with `shard` the weights too.
        temperature: that logits are divided by before the softmax.

    Raises:
        TeacherError, or the errors of loading weights.
    """
    sections = list_members(config)
    if config.shard and all(":" in section.name for section in sections):
        raise TeacherError(f"--config.teacher.shard=True cannot work: {config.name} is a function, "
                           f"whose weights are its own. Leave it False.")
    members = [_make_member(s, class_names, view_size, mesh, temperature) for s in sections]
    if len(members) == 1:
        return members[0]
    average = jax.jit(average_log_probs, out_shardings=meshes.sharded(mesh))
    descriptions = [member.description for member in members]
    return Teacher(lambda pixels: average([m.log_probs(pixels) for m in members]), {
        "name": "+".join(d["name"] for d in descriptions),
        "weights": hash_members([d["weights"] for d in descriptions]), "image_size": view_size,
        "mean": [], "std": [], "dtype": config.dtype, "members": descriptions},
        sum((member.programs for member in members), ()))


def list_members(config: ml_collections.ConfigDict) -> list[ml_collections.ConfigDict]:
    """A `teacher` section for each teacher of a run: the first is described by the keys around it.

    The shape is the first one's alone, and so is the normalisation where another is a workdir: it
    has its own. `dtype`, `shard`, and the normalisation of files hold for all.
    """
    first = ml_collections.ConfigDict(config.to_dict())
    first.ensemble = ()
    sections = [first]
    for entry in config.ensemble:
        section = ml_collections.ConfigDict(first.to_dict())
        function = ":" in entry and not Path(entry).exists()
        section.update({"name": entry if function else "", "weights": "" if function else entry,
                        "image_size": 0})
        section.update({key: type(section[key])() for key in weights.list_shape_keys(section)})
        if Path(entry).is_dir():
            section.mean, section.std = (), ()
        sections.append(section)
    return sections


def average_log_probs(parts: Sequence[jax.Array]) -> jax.Array:
    """The log of the mean of N teachers' probabilities.

    Args:
        parts: N arrays of log-probabilities, float32 [B, C].

    Returns:
        float32 [B, C]: log((p_1 + ... + p_N) / N), without ever leaving the log.
    """
    return jax.nn.logsumexp(jnp.stack(parts), axis=0) - math.log(len(parts))


def hash_teacher(config: ml_collections.ConfigDict) -> str:
    """The `weights` of the description that `make_teacher` would give, without making it."""
    hashes = [_import_function(s.name)[1] if ":" in s.name else
              weights.hash_weights(_open(s).variables) for s in list_members(config)]
    return hashes[0] if len(hashes) == 1 else hash_members(hashes)


def hash_members(hashes: Sequence[str]) -> str:
    """sha256 over the hashes of several teachers, in their order."""
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _make_member(section: ml_collections.ConfigDict, class_names: tuple[str, ...], view_size: int,
                 mesh: Mesh, temperature: float) -> Teacher:
    """One teacher of a section without an ensemble."""
    if ":" in section.name:
        if section.weights:
            raise TeacherError(
                f"--config.teacher.weights={section.weights} cannot work beside the function "
                f"--config.teacher.name={section.name}, which brings its own. Leave one empty.")
        return _function_teacher(section, len(class_names), view_size, mesh, temperature)
    return _model_teacher(section, class_names, view_size, mesh, temperature)


def _model_teacher(section: ml_collections.ConfigDict, class_names: tuple[str, ...],
                   view_size: int, mesh: Mesh, temperature: float) -> Teacher:
    """A model of ours with its weights."""
    trained = _open(section)
    class_map = _match_classes(section.weights, trained, class_names)
    mean, std = (section.mean, section.std) if section.mean else (trained.mean, trained.std)
    model = trained.model.copy(dtype=jnp.dtype(section.dtype))
    put = meshes.shard_state if section.shard else meshes.put_state
    variables, size = put(trained.variables, mesh), model.image_size

    def judge(variables: dict, pixels: jax.Array) -> jax.Array:
        if size != view_size:
            shape = (pixels.shape[0], size, size, 3)
            pixels = jnp.clip(jax.image.resize(pixels, shape, "cubic"), 0.0, 255.0)
        out = model.apply(variables, mix.normalize(pixels, mean, std), train=False)
        out = out if class_map is None else out[:, class_map]
        return jax.nn.log_softmax(out.astype(jnp.float32) / temperature)

    def log_probs(variables: dict, pixels: jax.Array) -> jax.Array:
        # Weights come together where they are used; else XLA might cut activations like them.
        variables = jax.lax.with_sharding_constraint(variables, meshes.replicated(mesh))
        return _by_parts(lambda part: judge(variables, part), pixels, section.batch_size, mesh)

    compiled = onednn.jit(log_probs, out_shardings=meshes.sharded(mesh))

    def run(pixels: jax.Array) -> jax.Array:
        with jax.transfer_guard("disallow"):  # nothing of it may wait for the host
            return compiled(variables, pixels)

    return Teacher(run, {
        "name": section.name or Path(section.weights).name,
        "weights": weights.hash_weights(trained.variables), "image_size": size,
        "mean": list(mean), "std": list(std), "dtype": section.dtype}, ((compiled, variables),))


def _by_parts(judge: Callable[[jax.Array], jax.Array], pixels: jax.Array, most: int, mesh: Mesh
              ) -> jax.Array:
    """Judges [B, S, S, 3] part by part, each of at most so many rows, from all devices alike.

    What stands for a capture's batch bounds the memory of a live teacher too, whose batch is the
    student's: where that is larger, its activations are those of a part.
    """
    rows = len(pixels) // mesh.size
    parts = next(n for n in range(1, rows + 1) if rows % n == 0 and (
        len(pixels) // n <= most or n == rows))
    if parts == 1:
        return judge(pixels)
    cut = jnp.moveaxis(pixels.reshape(-1, parts, *pixels.shape[1:]), 1, 0)
    cut = jax.lax.with_sharding_constraint(cut, NamedSharding(mesh, PartitionSpec(None, "data")))
    found = jax.lax.map(judge, cut)
    return jnp.moveaxis(found, 0, 1).reshape(len(pixels), -1)


def _open(section: ml_collections.ConfigDict) -> weights.Trained:
    """The model and weights that a section names."""
    if section.name and section.name not in models.VARIANTS:
        raise TeacherError(
            f"--config.teacher.name={section.name} is no model of ours. Leave it empty, as weights "
            f"bring their own shape, or write one of {', '.join(models.VARIANTS)}, or "
            f"module:function for a function of your own.")
    if not section.weights:
        raise TeacherError(
            f"The teacher {section.name or '(none named)'} has no weights. Set "
            f"--config.teacher.weights=WORKDIR_OR_FILE, or name a function by "
            f"--config.teacher.name=module:function.")
    trained = weights.open_trained(section.weights, section.image_size,
                                   tuple(section.stem_strides), num_heads=tuple(section.num_heads))
    _check_model(section, trained.model)
    return trained


def _check_model(section: ml_collections.ConfigDict, model) -> None:
    """Raises TeacherError where the weights are of another model than the section describes."""
    found = {"family": models.family_of(model), **models.describe_shape(model)}
    wanted = {key: section[key] for key in weights.list_shape_keys(section) if section[key]}
    if section.name:
        family = models.family_of(section.name)
        named = models.VARIANTS[section.name] if section.name not in models.FAMILIES else {}
        own = {key: named[key] for key in models.FAMILIES[family].shape if named.get(key)}
        wanted = {"family": family, **own, **wanted}
    faults = [f"{key} {found.get(key, 'is none of its settings')}, expected {wanted[key]}"
              for key in wanted
              if key not in _FITTED and not _agree(key, found.get(key), wanted[key], model)]
    if faults:
        raise TeacherError(
            f"The weights {section.weights} are not those of --config.teacher.name={section.name}: "
            f"{'; '.join(faults)}. Give the weights of that model, or leave the name and the keys "
            f"of its shape empty: weights bring their own.")


# Of a model's shape, what weights may be used with in more than one way.
_FITTED = ("window_sizes", "positions", "layer_scale")


def _agree(key: str, found: Any, wanted: Any, model: Any) -> bool:
    """Whether weights have a part of the shape that is asked for."""
    if key == "num_heads" and models.family_of(model) == "tiny_vit":
        return tuple(found[1:]) == tuple(wanted[1:])  # the first stage has no attention
    if key == "mlp_dims" and not found:  # four times the width
        return tuple(wanted) == (4 * model.embed_dims[0],)
    return found == wanted


def _match_classes(path: str, trained: weights.Trained, class_names: tuple[str, ...]
                   ) -> np.ndarray | None:
    """Which of the teacher's classes each of the student's is; a file has no names to go by."""
    if Path(path).is_dir():
        return _match_names(path, trained.class_names, class_names)
    count = trained.model.num_classes
    if not count:
        raise _no_classifier(path)
    if count != len(class_names):
        raise TeacherError(f"The teacher {path} has {count} classes, and the "
                           f"images have {len(class_names)}. Convert it with its class names "
                           f"(tools/convert_checkpoint.py --classes) and name the folder instead.")
    log.logger.info("The teacher %s names none of its %d classes: they are taken to be in the "
                    "order of the images' (%s ... %s).", path, count, class_names[0],
                    class_names[-1])
    return None


def _no_classifier(path: str) -> TeacherError:
    return TeacherError(f"The teacher {path} has no classifier, so it says nothing to learn from. "
                        f"Fine-tune it first (configs/finetune.py), or give weights with a head.")


def _match_names(path: str, own: tuple[str, ...], class_names: tuple[str, ...]
                 ) -> np.ndarray | None:
    """Which of a teacher's classes each of the student's is, by name: all must be there."""
    if not own:
        raise _no_classifier(path)
    known = set(own)
    missing = [name for name in class_names if name not in known]
    if missing:
        raise TeacherError(
            f"The teacher {path} lacks {len(missing)} of the {len(class_names)} classes of the "
            f"images: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; its own "
            f"{len(own)} are {', '.join(own[:3])} ... Give a teacher of all these classes; where "
            f"only the names differ, convert its PyTorch file with the images' "
            f"(tools/convert_checkpoint.py --classes).")
    if tuple(own) != tuple(class_names):
        for names, whose in ((own, f"of the teacher {path}"), (class_names, "of the images")):
            try:
                heads.check_distinct(names)
            except ValueError as error:
                raise TeacherError(f"The classes {whose} cannot be matched by name: {error}"
                                   ) from error
    return evaluate.make_class_map(own, class_names, max_missing=0.0)


def _function_teacher(section: ml_collections.ConfigDict, num_classes: int, view_size: int,
                      mesh: Mesh, temperature: float) -> Teacher:
    """Wraps a user's own function, which each process calls with its own rows of every batch."""
    name = section.name
    function, source = _import_function(name)
    rows = meshes.sharded(mesh)
    # A mixed pixel is no whole number; a user's function is promised uint8.
    to_uint8 = jax.jit(lambda pixels: jnp.round(pixels).astype(jnp.uint8), out_shardings=rows)
    soften = jax.jit(lambda logits: jax.nn.log_softmax(logits / temperature), out_shardings=rows)
    most = max(1, section.batch_size // jax.process_count())

    def call(images: np.ndarray) -> np.ndarray:
        return np.concatenate([_call_function(function, name, images[i:i + most], num_classes)
                               for i in range(0, len(images), most)])

    def log_probs(pixels: jax.Array) -> jax.Array:
        images = meshes.local_rows(to_uint8(pixels))
        # Where it fails in one process, no other may go on: what comes next may need them all.
        logits = Team().together(lambda: call(images))
        return soften(meshes.put_batch({"logits": logits}, mesh)["logits"])

    return Teacher(log_probs, {"name": name, "weights": source, "image_size": view_size,
                               "mean": [], "std": []})


def _import_function(name: str) -> tuple[Callable, str]:
    """A user's function, and the sha256 of its file."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except Exception as error:  # whatever a user's module does while it is imported
        raise TeacherError(f"The teacher {name}: {_describe(error)}. Expected module:function with "
                           f"the module on PYTHONPATH.") from error
    if not callable(function):
        raise TeacherError(f"The teacher {name} is a {type(function).__name__}; expected a "
                           f"function of uint8 images [B, S, S, 3] that gives logits [B, C].")
    # The function's file stands for the weights: the best there is without knowing them.
    file = getattr(module, "__file__", None)
    return function, hashlib.sha256(Path(file).read_bytes() if file else name.encode()).hexdigest()


def _describe(error: BaseException) -> str:
    """An error of somebody else's code on one line; what its type says where it says no more."""
    said = " ".join(str(error).split()).rstrip(".")
    plain = isinstance(error, ImportError | AttributeError) and said
    return said if plain else f"{type(error).__name__}{f': {said}' if said else ''}"


def _call_function(function: Callable, name: str, images: np.ndarray, num_classes: int
                   ) -> np.ndarray:
    """What a user's function gives: float32 [B, C].

    Raises:
        TeacherError: it failed, or gave no finite real numbers of that shape.
    """
    shape = (len(images), num_classes)
    given = f"uint8 images of shape {images.shape}"
    try:
        found = function(images)
        logits = np.asarray(found)
    except Exception as error:
        raise TeacherError(f"The teacher {name} failed with {given}: {_describe(error)}. With "
                           f"TINYVIT_TRACEBACK=1 the command shows where.") from error
    if not (jnp.issubdtype(logits.dtype, np.floating) or jnp.issubdtype(logits.dtype, np.integer)):
        what = "None" if found is None else f"an array of {logits.dtype} of shape {logits.shape}"
        raise TeacherError(f"The teacher {name} gave {what} for {given}; expected real numbers, "
                           f"finite logits of shape {shape}, one column for each class.")
    finite = logits.size == 0 or bool(np.isfinite(logits.astype(np.float32)).all())
    if logits.shape != shape or not finite:
        raise TeacherError(
            f"The teacher {name} gave an array of shape {logits.shape}"
            f"{'' if finite else ' with values that are not finite'} for {given}; expected "
            f"finite logits of shape {shape}, one column for each class.")
    return logits.astype(np.float32)
