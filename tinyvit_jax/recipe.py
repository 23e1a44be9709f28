"""A whole run: teacher, store, student, its label-only twin, pictures, table, export.

Every stage is finished by its own file (a fit.json, whole shards, result.json), so a run that was
killed anywhere goes on from there when it is started again.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_collections
import numpy as np

from tinyvit_jax import (
    capture,
    forecast,
    log,
    matching,
    measure,
    mix,
    plots,
    teachers,
    train,
    weights,
)
from tinyvit_jax import config as configs
from tinyvit_jax import mesh as meshes
from tinyvit_jax.convert import files
from tinyvit_jax.data import augment, images, pipeline
from tinyvit_jax.data.order import StoredOrder, follow_store
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.place import Place, open_place
from tinyvit_jax.team import Team

logger = logging.getLogger("tinyvit_jax")
_CLOCK = "capture_seconds.json"


def run(config: ml_collections.ConfigDict, workdir: Path, flags: str = "--config=FILE") -> dict:
    """Runs everything a config asks for.

    Args:
        config: a checked config.
        workdir: where the run lives; a run that was stopped there goes on.
        flags: the command line that gave the config, for messages that say what to run.

    Returns:
        The content of WORKDIR/result.json.
    """
    if config.export_torch:
        files.check_writable(workdir / config.export_torch)  # now, not after hours of training
    config = complete(config)
    data = open_prepared_data(config, workdir, flags)
    store: stores.Store | None = None
    teacher: teachers.Teacher | None = None
    result: dict = {}
    if config.objective.name == "stored_logits":
        store, result = provide_store(config, workdir, data, flags)
        data = data._replace(order=follow_store(data.order, store))
        if config.train.epochs > config.store.passes:
            logger.info("%g epochs over %d stored passes: every stored view is shown %.1f times",
                        config.train.epochs, config.store.passes,
                        config.train.epochs / config.store.passes)
        views = make_views(config, data)
        matching.check_store(store, config, data, views.spec, alone=jax.process_count() == 1)
        matching.check_replay(store, data, views.spec, config.store.replay)
    draw_views(make_views(config, data), store, workdir / "views.png")
    if config.objective.name == "live_teacher":
        train.make_objective(config, train.make_student(config, data))  # now, not after the teacher
        teacher, result = provide_teacher(config, workdir, data)
    title = "student" if store or teacher else "train"
    student = train.fit(config, workdir, data, store, title, teacher)
    result |= student
    curves = {title: log.read_metrics(workdir / "metrics.jsonl")}
    if title == "student":
        result |= {f"student_{k}": student[k] for k in ("top1", "top5", "seconds", "parameters")}
    if store is not None:
        result["store_bytes_per_view"] = round(store.bytes_per_view(), 2)
    if config.label_only_twin:
        twin = fit_twin(config, workdir / "label_only", data)
        curves["label-only twin"] = log.read_metrics(workdir / "label_only" / "metrics.jsonl")
        result |= {f"label_only_{k}": twin[k] for k in ("top1", "top5", "seconds")}
    result["seconds"] = sum(result.get(k, 0.0) for k in (
        "teacher_seconds", "capture_seconds", "seconds", "label_only_seconds"))
    if config.export_torch:
        result["export"] = export(workdir, workdir / config.export_torch)
    if jax.process_index() == 0:
        plots.plot_curves(curves, workdir / "curves.png")
        log.write_json(workdir / "result.json", result)
        print(format_table(result), flush=True)
    return result


def complete(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A config whose model and normalisation are filled in, where the weights tell them."""
    c = ml_collections.ConfigDict(config.to_dict())
    c.model = weights.complete(c.model)
    if not c.data.mean:
        c.data.mean, c.data.std = weights.find_normalisation(c.model.init_from)
    return c


def teacher_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a supervised run of the teacher, on the same images and views."""
    c = ml_collections.ConfigDict(config.to_dict())
    c.objective.name, c.objective.smoothing = "supervised", config.teacher.smoothing
    c.model = configs.default().model  # nothing of the student's but what saves memory
    c.model.remat = config.model.remat
    own = set(c.model) | set(weights.list_shape_keys(config.teacher))
    c.model.update({key: value for key, value in config.teacher.to_dict().items() if key in own})
    if config.teacher.mean:
        c.data.mean, c.data.std = config.teacher.mean, config.teacher.std
    c.train.epochs = float(config.teacher.epochs)
    c.optim.learning_rate = config.teacher.learning_rate
    c.optim.scale_by_batch, c.optim.layer_decay = False, 1.0
    return _without_store(c)


def twin_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of the student's twin: labels instead of the teacher, all else the same."""
    c = ml_collections.ConfigDict(config.to_dict())
    c.objective.name = "supervised"
    return _without_store(c)


def _without_store(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Resets what a supervised part of a run does not read, so that a change of it is no matter."""
    plain = configs.default()
    c.store, c.teacher = plain.store, plain.teacher
    for key in ("alpha", "kind", "temperature"):
        c.objective[key] = plain.objective[key]
    c.label_only_twin, c.export_torch = plain.label_only_twin, plain.export_torch
    return c


def fit_twin(config: ml_collections.ConfigDict, workdir: Path, data: train.Data) -> dict:
    """Trains the student on labels alone for as many updates."""
    return train.fit(twin_config(config), workdir, data, title="label-only twin")


def open_prepared_data(config: ml_collections.ConfigDict, workdir: Path, flags: str) -> train.Data:
    """Opens the images; where some are missing, the error says all that the run needs, in order."""
    try:
        return train.open_data(config)
    except images.SourceError as error:
        steps = [str(error)]
        try:
            train.open_eval_source(config)
        except images.SourceError as other:
            steps += [str(other)] if str(other) != steps[0] else []
        place = store_place(config, workdir)
        if config.objective.name == "stored_logits" and not config.store.capture and (
                "manifest.json" not in place.names()):
            steps.append(f"The run also learns from a store of teacher logits, which {place.url} "
                         f"is not yet. Capture it with  {capture_command(config, flags)}")
        if len(steps) > 1:
            steps = [f"({i}) {step}" for i, step in enumerate(steps, 1)]
        raise images.SourceError(" ".join(steps)) from error


def store_place(config: ml_collections.ConfigDict, workdir: Path) -> Place:
    """Where the run's store is; of one in a bucket, shards are kept in the cache of the config."""
    s = config.store
    return open_place(s.path or workdir / "store", s.cache, round(s.cache_gb * 1e9))


def provide_store(config: ml_collections.ConfigDict, workdir: Path, data: train.Data,
                  flags: str = "--config=FILE") -> tuple[stores.Store, dict]:
    """Opens the run's store; captures what it lacks where the config says so.

    Raises:
        StoreError: passes are missing and store.capture is off; it names the command.
    """
    place = store_place(config, workdir)
    if not config.store.capture:
        return _open_captured(config, place, flags), {}
    mesh = meshes.make_mesh()
    result = fit_teacher(config, workdir, data)
    store, seconds = fill_store(with_teacher(config, workdir), place, data, mesh)
    return store, {**result, "capture_seconds": seconds}


def provide_teacher(config: ml_collections.ConfigDict, workdir: Path, data: train.Data
                    ) -> tuple[teachers.Teacher, dict]:
    """The live teacher of a run, trained first where the config says so, and its figures."""
    result = fit_teacher(config, workdir, data)
    size = make_views(config, data).spec.image_size
    return Team().together(lambda: teachers.make_teacher(
        with_teacher(config, workdir).teacher, tuple(data.train.class_names), size,
        meshes.make_mesh(), config.objective.temperature)), result


def fit_teacher(config: ml_collections.ConfigDict, workdir: Path, data: train.Data) -> dict:
    """Trains the run's own teacher, where it has one: teacher_top1, _top5, _seconds, _parameters.
    """
    if not teaches_itself(config):
        return {}
    taught = train.fit(teacher_config(config), workdir / "teacher", data, title="teacher")
    return {f"teacher_{k}": taught[k] for k in ("top1", "top5", "seconds", "parameters")}


def _open_captured(config: ml_collections.ConfigDict, place: Place, flags: str) -> stores.Store:
    """Opens a store that has all the passes that a run asks for."""
    try:
        place.read("manifest.json")
    except FileNotFoundError:
        raise stores.StoreError(f"There is no store of teacher logits in {place.url}. Capture it "
                                f"with  {capture_command(config, flags)}") from None
    store = stores.open_store(place)
    missing = [s for s in store.missing() if s.pass_number < config.store.passes]
    if missing or store.manifest.passes < config.store.passes:
        raise stores.StoreError(
            f"The store {place.url} holds {store.manifest.passes} passes and lacks {len(missing)} "
            f"of their shards; --config.store.passes asks for {config.store.passes}. Capture "
            f"what is missing with  {capture_command(config, flags)}")
    return store


def teaches_itself(config: ml_collections.ConfigDict) -> bool:
    """Whether the run trains its own teacher first."""
    t = config.teacher
    return bool(t.epochs) and not t.weights and ":" not in t.name


def with_teacher(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """The config with teacher.weights set to the teacher that the run itself trained, if any."""
    c = ml_collections.ConfigDict(config.to_dict())
    if teaches_itself(c):
        c.teacher.weights = str(workdir / "teacher")
    return c


def check_captured(config: ml_collections.ConfigDict, workdir: Path, count: int,
                   repair: bool = False) -> tuple[list[str], dict]:
    """Verifies a store and runs its teacher again on `count` views spread over its passes.

    Args:
        config: a checked config.
        workdir: of the run.
        count: how many views the teacher sees again.
        repair: capture damaged and missing shards again, and verify them.

    Returns:
        The problems found, and {"views", "kl", "top1"} of the comparison (empty where the store
        could not be read).
    """
    store = stores.open_store(store_place(config, workdir))
    data = train.open_data(config, evaluated=False)
    data = data._replace(order=follow_store(data.order, store))
    views = make_views(config, data)
    matching.check_store(store, config, data, views.spec)
    matching.check_replay(store, data, views.spec, config.store.replay)
    damage = store.verify(_key_finder(data))
    missing = store.missing()
    damage = [problem for problem in damage if problem.shard not in missing]
    problems = [*map(str, damage), *(f"{shard} is missing" for shard in missing)]
    if problems and repair:
        broken = sorted({*missing, *(problem.shard for problem in damage)}, key=lambda s: s.name)
        problems = _repair(with_teacher(config, workdir), store, data, broken, problems)
    if problems:
        return problems, {}
    mesh = meshes.make_mesh()
    c = with_teacher(config, workdir)
    teacher = teachers.make_teacher(c.teacher, tuple(data.train.class_names),
                                   views.spec.image_size, mesh, store.manifest.temperature)
    if store.manifest.teacher["weights"]:  # the original's files do not tell whose they are
        store.check({"teacher.weights": teacher.description["weights"]})
    stored = pipeline.Views(data.train, views.spec, data.order, store)
    found = capture.compare(c, teacher, stored, count, mesh)
    if not found["kl"] <= capture.MAX_KL:
        problems.append(f"the teacher gives other targets now: KL {found['kl']:.2e} between stored "
                        f"and recomputed, at most {capture.MAX_KL:.0e} expected")
    return problems, found


def _repair(config: ml_collections.ConfigDict, store: stores.Store, data: train.Data,
            broken: list[stores.Shard], problems: list[str]) -> list[str]:
    """Captures shards again, each replaced once its new content is whole; what is wrong then."""
    own = store.manifest
    if own.origin:
        files_of = ", ".join(f"{shard.name}.array_record" for shard in broken)
        raise stores.StoreError(
            f"The store {store.path} was not captured here, so no teacher can repair it: "
            f"{'; '.join(problems)}. Remove {files_of} from it and run {own.command}, which "
            f"writes what is missing (tools/import_store.py reads the files it came from).")
    for problem in problems:
        logger.info("repair: %s", problem)
    logger.info("repair: capturing again %s", "; ".join(map(str, broken)))
    for key in ("passes", "top_k", "codec", "temperature", "tail", "shard_views", "block_views"):
        config.store[key] = getattr(own, key)
    fill_store(config, store.place, data, meshes.make_mesh(), broken)
    again = stores.open_store(store.place)
    return [*map(str, again.verify(_key_finder(data), broken)),
            *(f"{shard} is missing" for shard in again.missing())]


def _key_finder(data: train.Data) -> Callable | None:
    """Gives `Store.verify` the keys of places; None where the store alone knows them."""
    if isinstance(data.order, StoredOrder):
        return None
    return lambda number, start, stop: data.order.keys(np.full(stop - start, number),
                                                       np.arange(start, stop))


def capture_command(config: ml_collections.ConfigDict, flags: str) -> str:
    """The command line that captures a run's store."""
    teacher = "" if config.teacher.weights or ":" in config.teacher.name else (
        " --config.teacher.name=VARIANT_OR_MODULE:FUNCTION --config.teacher.weights=FILE")
    return f"python tools/save_logits.py {flags}{teacher}"


def run_eval(config: ml_collections.ConfigDict, workdir: Path) -> dict:
    """Measures weights on the config's evaluation images; see `measure.run`."""
    return measure.run(config, workdir, train.open_eval_source(config))


def make_views(config: ml_collections.ConfigDict, data: train.Data) -> pipeline.Views:
    """The views that the teacher and the student both see."""
    model = train.make_student(config, data)
    return pipeline.Views(data.train, augment.make_spec(config.augment, model.image_size),
                          data.order)


def fill_store(config: ml_collections.ConfigDict, path: str | Path | Place, data: train.Data, mesh,
               chosen: Sequence[stores.Shard] = ()) -> tuple[stores.Store, float]:
    """Captures every missing shard, or those that are chosen, beside any number of processes.

    Returns:
        The store, and the seconds it took, over all starts.
    """
    team = Team()
    views = make_views(config, data)
    meshes.check_rows(config.teacher.batch_size, "teacher.batch_size",
                      2 if views.order.paired else 1)
    teacher = team.together(lambda: teachers.make_teacher(
        config.teacher, tuple(data.train.class_names), views.spec.image_size, mesh,
        config.store.temperature))
    manifest = team.together(lambda: capture.make_manifest(
        config, teacher.description, data.train, views.spec, data.order))
    store = team.in_turn(lambda: stores.create_store(path, manifest))
    before = _read_seconds(store)
    missing = team.together(store.missing)
    if missing or chosen:
        needs = team.together(lambda: forecast.estimate(config, data.train, data.order,
                                                        store.place))
        part = len(chosen or missing) / needs.shards
        team.together(lambda: forecast.check_fits(needs, store.place, part))
        logger.info("capture: %d of %d shards of %s are missing, about %s bytes for %s views",
                    len(missing), needs.shards, store.path, f"{needs.most_bytes:,}",
                    f"{needs.views:,}")
        seconds = capture.capture(config, teacher, views, store, mesh, chosen)
        # Processes that share the work share the time: the longest of them counts.
        before = max(before + seconds, _read_seconds(store))
    team.together(lambda: _tidy(config, store, before) if team.first else None)
    return store, before


def _tidy(config: ml_collections.ConfigDict, store: stores.Store, seconds: float) -> None:
    """Removes what writers of this machine that died left, and notes the time it all took."""
    capture.open_claims(config, store).sweep(())
    store.remove_leftovers()
    if seconds != _read_seconds(store):
        store.place.write(_CLOCK, json.dumps({"seconds": seconds}).encode())


def _read_seconds(store: stores.Store) -> float:
    """What the captures of a store took, as far as they came to their end."""
    try:
        return float(json.loads(store.place.read(_CLOCK))["seconds"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # nothing hangs on it
        return 0.0


def draw_views(views: pipeline.Views, store: stores.Store | None, path: Path, count: int = 12
               ) -> None:
    """Draws a run's first views, once, with their labels and the top classes of a store's teacher.
    """
    if path.exists() or jax.process_index() > 0:
        return
    count = min(count, views.order.views_per_pass)  # even where views come in pairs
    shown = pipeline.Views(views.source, views.spec, views.order, store).read(np.arange(count))
    pixels = np.asarray(mix.view_pixels(shown))
    names = views.source.class_names
    titles = [f"label: {names[label]}" for label in shown["label"]]
    if store is not None:
        for view, (index, prob) in enumerate(zip(shown["index"], shown["prob"], strict=True)):
            titles[view] += "".join(f"\n{p:5.1%}  {names[i]}"
                                    for i, p in list(zip(index, prob, strict=True))[:3])
    plots.plot_views(pixels, titles, path)


def export(workdir: Path, path: Path) -> str:
    """Writes a run's weights in its family's first key layout; returns the file's name."""
    trained = weights.load_run(workdir)  # in every process: they read a checkpoint together
    if jax.process_index() == 0:
        weights.write_file(path, trained)
    return path.name


def format_table(result: dict) -> str:
    """The figures of a run as a small table."""
    rows = [("teacher", "teacher_top1", "teacher_top5", "teacher_parameters", "teacher_seconds"),
            ("student, distilled", "student_top1", "student_top5", "student_parameters",
             "student_seconds"),
            ("student, labels only", "label_only_top1", "label_only_top5", "student_parameters",
             "label_only_seconds")]
    if "student_top1" not in result:
        rows = [("model", "top1", "top5", "parameters", "seconds")]
    lines = [f"{'':<22}{'top-1 %':>9}{'top-5 %':>9}{'parameters':>13}{'seconds':>9}"]
    for title, top1, top5, parameters, seconds in rows:
        if top1 in result:
            lines.append(f"{title:<22}{result[top1]:>9.2f}{result[top5]:>9.2f}"
                         f"{result[parameters]:>13,}{result[seconds]:>9.0f}")
    if "top1_before" in result:
        lines.insert(1, f"{'before training':<22}{result['top1_before']:>9.2f}"
                        f"{result['top5_before']:>9.2f}")
    if "store_bytes_per_view" in result:
        lines.append(f"store: {result['store_bytes_per_view']:.1f} bytes a view, captured in "
                     f"{result.get('capture_seconds', 0.0):.0f} s")
    return "\n".join(lines)
