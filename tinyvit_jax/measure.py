"""Measures weights on a set of images: --mode=eval, and the evaluations of a training run."""

import functools
import importlib.metadata
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import checkpoint, evaluate, heads, log, models, plots, report, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import augment, images, labels, pipeline
from tinyvit_jax.data.tfds import TfdsSource

_PACKAGES = ("tinyvit_jax", "jax", "flax", "numpy", "opencv-python-headless")


def make_judge(config: ml_collections.ConfigDict, model, source: images.ImageSource,
               class_map: np.ndarray | None, mesh: Mesh
               ) -> tuple["Judge", np.ndarray | None]:
    """Makes what runs a model over the images of a source.

    Args:
        config: its sections data and eval.
        model: to evaluate.
        source: the images.
        class_map: from `evaluate.make_class_map`.
        mesh: over which batches are cut.

    Returns:
        A Judge; and the classes that answers are chosen from, bool [C], or None for all.
    """
    size = max(1, config.eval.batch_size // jax.device_count()) * jax.device_count()
    rows = pipeline.Rows.of_process(size, jax.process_index(), jax.process_count())
    view = functools.partial(augment.eval_view, image_size=model.image_size, crop=config.eval.crop,
                             crop_ratio=config.eval.crop_ratio)
    several = labels.has_several(source)
    present = labels.scores_present_only(config.eval.classes, source.name)
    table = labels.read_labels(source) if several or present else np.zeros((0, 1), np.int32)
    competing = labels.find_present(table, len(source.class_names)) if present else None
    batches = pipeline.EvalBatches(source, view, size, rows, table.shape[1] if several else 0)
    eval_step = evaluate.make_eval_step(model, mesh, tuple(config.data.mean),
                                        tuple(config.data.std), class_map, competing)

    return Judge(config, eval_step, batches, mesh), competing


class Judge:
    """Runs a model over the images of a source: fn(variables, title) -> evaluate.Judged.

    Args:
        config: its section data.
        eval_step: from `evaluate.make_eval_step`.
        batches: of the images.
        mesh: over which batches are cut.
    """

    def __init__(self, config: ml_collections.ConfigDict, eval_step: Callable,
                 batches: pipeline.EvalBatches, mesh: Mesh):
        self.eval_step, self.batches, self.mesh = eval_step, batches, mesh
        self.threads, self.prefetch = config.data.threads, config.data.prefetch

    def __call__(self, variables: dict, title: str = "") -> evaluate.Judged:
        """The answers for all images, with a progress bar where there is a title."""
        stream = pipeline.batch_stream(self.batches, threads=self.threads, prefetch=self.prefetch)
        progress = log.Progress(title, len(self.batches), quiet=not title)
        judged = evaluate.evaluate(self.eval_step, variables, stream, self.mesh, progress.advance)
        progress.close()
        return judged

    def describe_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of its batches, from one image."""
        own = self.batches
        one = pipeline.EvalBatches(own.source, own.view, 1, pipeline.Rows(0, 1), own.most_labels)
        row: Any = one[0]
        return {name: jax.ShapeDtypeStruct((own.batch_size, *x.shape[1:]), x.dtype,
                                           sharding=meshes.sharded(self.mesh))
                for name, x in row.items()}


def run(config: ml_collections.ConfigDict, workdir: Path, source: images.ImageSource) -> dict:
    """Measures a run's weights, or those of model.init_from where the workdir holds no run.

    Args:
        config: a checked config.
        workdir: gets eval/NAME/ with report.json, its tables and its pictures, and the same report
            as eval.json.
        source: the evaluation images.

    Returns:
        The content of report.json: what `report.make_report` says, and besides it source, split,
        count, left_out (images without a label), top1, top5, loss, classes, weights, image_size,
        crop, crop_ratio, mean, std and versions.
    """
    original, origin = open_weights(config, workdir, source.class_names)
    own_size = original.model.image_size
    trained = weights.resize(original, _choose_size(config, workdir, own_size))
    class_map = match_classes(trained, source)
    mesh = meshes.make_mesh()
    c = ml_collections.ConfigDict(config.to_dict())
    c.data.mean, c.data.std = trained.mean, trained.std  # they belong to the weights
    if "step" in origin and original.crop != config.eval.crop:
        log.logger.info("The run was evaluated with eval.crop=%s; this measures with %s.",
                        original.crop, config.eval.crop)
    judge, competing = make_judge(c, trained.model, source, class_map, mesh)
    first = jax.process_index() == 0
    judged = judge(meshes.put_state(trained.variables, mesh), "eval" if first else "")
    kept, names = report.keep_scored(judged, source.class_names, competing)
    made = {**_score(judged), "left_out": len(judged.label) - len(kept.label),
            "classes": _describe_classes(source, names, class_map, competing),
            "weights": origin, "trained_image_size": own_size, **_describe_view(c, trained.model),
            "versions": _list_versions(), **report.make_report(kept, names)}
    made = {"source": source.name, "split": _split_of(source, config), **made}
    if first:
        folder = workdir / "eval" / report.name_folder(
            source.name, _list_unusual(config, original, trained.model.image_size))
        confusion = report.count_confusion(kept)
        report.write_report(made, confusion, names, folder)
        plots.plot_report(made, confusion, folder / "report.png")
        if len(names) <= report.DENSE:
            plots.plot_confusion(made, confusion, folder / "confusion.png")
        log.write_json(workdir / "eval.json", made)
        print(report.format_report(made, folder), flush=True)
    return made


def open_weights(config: ml_collections.ConfigDict, workdir: Path, names: tuple[str, ...]
                 ) -> tuple[weights.Trained, dict[str, Any]]:
    """Opens a run's weights, or those of model.init_from where the workdir holds no run.

    Args:
        config: a checked config.
        workdir: of the run.
        names: of the evaluation set's classes, for a model.class_names that lists ImageNet-1k.

    Returns:
        The weights, and {"path", "sha256"} of them, with "step" and "checkpoint" for a run.

    Raises:
        WeightsError: neither is there, or the weights do not fit.
    """
    path = workdir if (workdir / "model.json").exists() else Path(config.model.init_from)
    if path == Path():
        raise weights.WeightsError(
            f"{workdir} is not the workdir of a run: model.json is missing. Give the --workdir "
            f"that was trained, or weights of any other origin by "
            f"--config.model.init_from=WORKDIR_OR_FILE.")
    if path.is_dir():
        which = config.eval.checkpoint
        trained = weights.load_run(path, which)
        origin = {"checkpoint": which,
                  "step": checkpoint.find_step(path / "checkpoints", which)}
    else:
        trained, origin = _open_file(config, path), {}
    if config.model.class_names and path != workdir:
        trained = trained._replace(class_names=heads.read_class_names(
            config.model.class_names, trained.model.num_classes, names))
    return trained, {"path": str(path), **origin,
                     "sha256": weights.hash_weights(trained.variables)}


def _open_file(config: ml_collections.ConfigDict, path: Path) -> weights.Trained:
    """A PyTorch file, at the size it was trained at as far as it tells."""
    m = config.model
    trained = weights.open_trained(path, 0, tuple(m.stem_strides), num_heads=tuple(m.num_heads))
    model = trained.model
    told = models.family_of(model) != "tiny_vit" or models.find_image_size(model)
    if m.image_size and not told:
        trained = trained._replace(model=model.copy(image_size=m.image_size))
    return trained


def _choose_size(config: ml_collections.ConfigDict, workdir: Path, own_size: int) -> int:
    """Pixels to measure at; 0 = those of the training.

    A run keeps its own size: the config's model section tells how a new one would be trained.
    """
    asked = config.model.image_size
    if config.eval.image_size or not (workdir / "model.json").exists():
        return config.eval.image_size or asked
    if asked not in (0, own_size):
        log.logger.info("The run is measured at %d pixels, as it was trained, and not at "
                        "model.image_size=%d: --config.eval.image_size=%d would do that.",
                        own_size, asked, asked)
    return 0


def match_classes(trained: weights.Trained, source: images.ImageSource) -> np.ndarray | None:
    """Which of the weights' classes each class of a source is, by name.

    Weights without class names are taken to have the source's, if they have as many.
    """
    unnamed = tuple(f"class {i}" for i in range(trained.model.num_classes))
    if tuple(trained.class_names) == unnamed and len(unnamed) == len(source.class_names):
        log.logger.info("The weights have no class names: their %d classes are taken in the order "
                        "of %s.", len(unnamed), source.name)
        return None
    return evaluate.make_class_map(trained.class_names, source.class_names)


def _score(judged: evaluate.Judged) -> dict[str, Any]:
    """The scores, with a loss that is not finite as None: JSON has no NaN."""
    scores = evaluate.score(judged)
    return scores | {"loss": scores["loss"] if math.isfinite(scores["loss"]) else None}


def _describe_classes(source: images.ImageSource, names: tuple[str, ...],
                      class_map: np.ndarray | None, competing: np.ndarray | None) -> dict[str, Any]:
    missing = np.flatnonzero(class_map < 0) if class_map is not None else ()
    return {"rule": "all" if competing is None else "present", "competing": len(names),
            "of": len(source.class_names), "missing": [source.class_names[i] for i in missing]}


def _describe_view(config: ml_collections.ConfigDict, model) -> dict[str, Any]:
    return {"image_size": model.image_size, "crop": config.eval.crop,
            "crop_ratio": config.eval.crop_ratio, "mean": list(config.data.mean),
            "std": list(config.data.std)}


def _list_unusual(config: ml_collections.ConfigDict, original: weights.Trained, image_size: int
                  ) -> list[str]:
    """What is not as a plain evaluation has it, for the name of the report's folder."""
    e = config.eval
    said = [(config.data.eval_split, config.data.eval_split != "eval"),
            (f"{image_size}px", image_size != original.model.image_size),
            (e.crop, e.crop != original.crop),
            (f"crop{e.crop_ratio:.3g}", e.crop == "center" and e.crop_ratio != original.crop_ratio),
            (e.classes, e.classes != "auto"), (e.checkpoint, e.checkpoint != "last")]
    return [text for text, unusual in said if unusual]


def _split_of(source: images.ImageSource, config: ml_collections.ConfigDict) -> str:
    """The set's own name of the split: "test" where the config says eval."""
    return source.split if isinstance(source, TfdsSource) else config.data.eval_split


def _list_versions() -> dict[str, str]:
    """Of what the figures hang on."""
    found = {"python": platform.python_version(), "backend": jax.default_backend(),
             "device": jax.devices()[0].device_kind}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # OpenCV goes by several names
    return found
