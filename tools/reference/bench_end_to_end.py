"""Measures what a user waits for: the import, the first step, the data; and the price of a store.

Imports and runs are fresh processes. The price is that of whole training steps, batches out of the
pipeline included, of a student that learns from stored logits against the same student, views and
batches with labels alone, by turns in one process.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference import bench_images, bench_report
from reference.bench_store import make_blocks, make_store
from reference.bench_timing import count_cpus, quartiles, race
from reference.synthetic_teachers import Teacher
from tinyvit_jax.data.source import Example

ROOT = Path(__file__).parents[2]
SUPERVISED, DISTILLED = "labels", "stored logits"
_ROUNDS = 7
_TURN = 0.5  # seconds of a turn, about
_POLL = 0.01  # seconds between looks for the first step
_LIMIT = 600.0  # seconds that a first step may take
_POOL = 4096  # distinct stored targets
_IMAGES, _VIEWS = 64, 16_384  # of the large case: files, and views that repeat them


class Settings(NamedTuple):
    """What is measured."""

    config: str = "configs/quickstart.py"
    repeats: int = 3
    epochs: float = 2.0
    seconds: float = 15.0
    model: str = "tiny_vit_5m_224"
    image_size: int = 224
    classes: int = 21_841
    top_k: int = 100
    batch: int = 16


MEANINGS = {
    "config": "whose command is timed up to its first step, and which is trained with labels",
    "repeats": "of the imports and of the command",
    "epochs": "of the training; 0 leaves it out",
    "seconds": "that each side of the distillation runs for, about, in each case; 0 leaves it out",
    "model": "of the large distillation; the small one is the config's student",
    "image_size": "of the large distillation, in pixels",
    "classes": "of the large distillation",
    "top_k": "stored classes of the large distillation",
    "batch": "of the large distillation; 0 leaves it out",
}


def check_settings(settings: Settings) -> None:
    """Raises ValueError for what cannot be measured."""
    for name, lowest in (("repeats", 1), ("epochs", 0), ("seconds", 0), ("image_size", 32),
                         ("classes", 2), ("top_k", 1), ("batch", 0)):
        if getattr(settings, name) < lowest:
            raise ValueError(f"--{name}={getattr(settings, name)}: expected {lowest} or more")
    if settings.batch % 2:
        raise ValueError(f"--batch={settings.batch}: expected an even number")
    if settings.top_k >= settings.classes:
        raise ValueError(f"--top_k={settings.top_k}: expected less than "
                         f"--classes={settings.classes}")
    if not (ROOT / settings.config.partition(":")[0]).is_file():
        raise ValueError(f"--config={settings.config}: there is no such file in {ROOT}")


def measure(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Times imports, first steps, a training and the distillation.

    Args:
        settings: checked.
        folder: for workdirs, compilation caches, images and stores.
        say: takes a line of progress.

    Returns:
        "import", "first_step", "training" (rows, or None), "distillation" (rows).
    """
    say("imports")
    found: dict[str, Any] = {"import": time_imports(settings.repeats)}
    found["first_step"] = time_first_steps(settings, folder, say)
    found["training"] = run_training(settings, folder, say) if settings.epochs else None
    found["distillation"] = []
    if settings.seconds:
        cases = {"the config's student": make_small_case(settings.config, folder)}
        if settings.batch:
            cases[settings.model] = make_large_case(settings, folder / "large")
        for name, case in cases.items():
            say(f"distils: {name}")
            found["distillation"].append({"what": name, **race_distillation(
                case, settings.seconds, _ROUNDS)})
    return found


def time_imports(repeats: int) -> list[dict[str, Any]]:
    """Seconds of a fresh Python that imports nothing, the package, or what a training needs."""
    code = {"nothing": "pass", "tinyvit_jax": "import tinyvit_jax",
            "tinyvit_jax.recipe": "import tinyvit_jax.recipe"}
    took: dict[str, list[float]] = {name: [] for name in code}
    for number in range(repeats + 1):
        for name, line in code.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", line], env=_environment(), check=True)
            if number:  # the first fills the page cache
                took[name].append(time.perf_counter() - began)
    return [{"what": name, **quartiles(values)} for name, values in took.items()]


def _environment(cache: Path | None = None) -> dict[str, str]:
    """A user's: this one's, the package on its path, and a place for compiled programs.

    What `cli.keep_freed_memory` told this process, the command must tell itself, as it would.
    """
    own = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    paths = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH", "")]))
    return own | {"PYTHONPATH": paths} | (
        {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {})


def time_first_steps(settings: Settings, folder: Path, say: Callable[[str], None]
                     ) -> list[dict[str, Any]]:
    """Seconds from the command to the first finished step, which is logged as it ends."""
    took: dict[str, list[float]] = {"empty": [], "filled": []}
    for number in range(settings.repeats):
        cache = folder / f"cache-{number}"
        for what in took:
            say(f"runs {settings.config} to its first step, compilation cache {what}")
            took[what].append(_time_first_step(settings.config, folder / f"first-{number}-{what}",
                                               cache))
    return [{"what": what, **quartiles(values)} for what, values in took.items()]


def _command(config: str, workdir: Path, *keys: str) -> list[str]:
    return [sys.executable, "-m", "tinyvit_jax.main", f"--config={config}",
            f"--workdir={workdir}", *(f"--config.{key}" for key in keys)]


def _time_first_step(config: str, workdir: Path, cache: Path) -> float:
    began = time.perf_counter()
    log = workdir.with_suffix(".log")
    with log.open("w") as output:
        run = subprocess.Popen(_command(config, workdir, "log_every=1"), cwd=ROOT, stdout=output,
                               stderr=subprocess.STDOUT, env=_environment(cache))
        try:
            while not any(path.stat().st_size for path in workdir.rglob("metrics.jsonl")):
                if run.poll() is not None or time.perf_counter() - began > _LIMIT:
                    raise RuntimeError(f"{config} came to no first step: "
                                       f"{log.read_text()[-2000:]}")
                time.sleep(_POLL)
            return time.perf_counter() - began
        finally:
            run.kill()
            run.wait()


def run_training(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains the config's student with labels; what its metrics.jsonl says of speed and waiting.

    The first line, whose step is compiled, is left out.
    """
    say(f"trains {settings.config} with labels for {settings.epochs:g} epochs")
    workdir = folder / "training"
    command = _command(settings.config, workdir, "objective.name=supervised",
                       "label_only_twin=False", "export_torch=", f"train.epochs={settings.epochs}",
                       f"optim.warmup_epochs={settings.epochs / 5}", "log_every=10")
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=_environment(folder / "cache-0"), text=True,
                          capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{settings.config} did not train: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {"seconds": time.perf_counter() - began, **summarise(lines)}


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speed and waiting of a run by the lines of its metrics.jsonl, from the second on.

    Returns:
        "steps" in all, quartiles of "images_per_second", the share of the time spent waiting for
        data in the whole run ("data_wait") and in the line with the most ("most_data_wait").
    """
    took = [(line["step"] - before["step"]) / line["images_per_second"]
            for before, line in itertools.pairwise(lines)]  # up to the batch size, the same in all
    waits = [line["data_wait"] for line in lines[1:]]
    return {"steps": lines[-1]["step"],
            "images_per_second": quartiles([line["images_per_second"] for line in lines[1:]]),
            "data_wait": float(np.average(waits, weights=took)), "most_data_wait": max(waits)}


class Case(NamedTuple):
    """A distillation that is raced against labels."""

    config: Any  # a checked config: model, batch size, augmentation
    source: Any  # an ImageSource
    classes: int
    store: Any  # of all its views in one pass


class _Repeated:
    """An image source's files over and over, as if it had more of them."""

    def __init__(self, source: Any, images: int):
        self.source, self.images = source, images

    def __len__(self) -> int:
        return self.images

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Reads several examples at once."""
        return self.source.read([i % len(self.source) for i in indices])


def make_small_case(config_file: str, folder: Path) -> Case:
    """A config's student on its own images, and a store of as many classes as it asks for."""
    from tinyvit_jax.data import images

    config = load_config(config_file)
    source = images.open_source(config.data.source, "train", config.data.data_dir)
    classes = len(source.class_names)
    return Case(config, source, classes, fill_store(
        folder / "small_store", len(source), classes, min(config.store.top_k, classes)))


def load_config(file: str) -> Any:
    """The config of a file and, behind a colon, its stage."""
    import importlib.util

    path, _, stage = file.partition(":")
    spec = importlib.util.spec_from_file_location("benchmarked_config", ROOT / path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([stage] if stage else []))


def make_large_case(settings: Settings, folder: Path) -> Case:
    """A variant at its own size on JPEG files, and a store of many classes."""
    from tinyvit_jax import config as configs
    from tinyvit_jax.data import images

    config = configs.default()
    config.model.update({"name": settings.model, "image_size": settings.image_size})
    config.train.batch_size = settings.batch
    bench_images.make_folder(folder / "train", _IMAGES)
    (folder / "val").mkdir()
    source = _Repeated(images.open_source(f"folder:{folder}", "train"), _VIEWS)
    return Case(config, source, settings.classes,
                fill_store(folder / "store", _VIEWS, settings.classes, settings.top_k))


def fill_store(path: Path, views: int, classes: int, top_k: int) -> Any:
    """A whole store of made-up targets for one pass in the order of data seed 0."""
    from tinyvit_jax.data.order import Order

    generator, pool = np.random.default_rng(0), min(_POOL, views)
    index = np.argsort(generator.random((pool, classes), np.float32), axis=1)[:, :top_k]
    prob = np.sort(generator.dirichlet(np.ones(top_k), pool).astype(np.float32) * 0.9)[:, ::-1]
    none = np.zeros((0, top_k))
    teacher = Teacher("none", classes, index.astype(np.int32), np.ascontiguousarray(prob), none,
                      none, 0.0)
    store = make_store(path, teacher, views)
    keys = Order(0, views, False).keys(np.zeros(views, np.int64), np.arange(views))
    for shard in store.shards():
        store.write_shard(shard, make_blocks(teacher, keys, shard.start, shard.stop))
    return store


def race_distillation(case: Case, seconds: float, rounds: int, turn_seconds: float = _TURN
                      ) -> dict[str, Any]:
    """Whole steps with stored logits against whole steps with labels.

    Args:
        case: what is trained.
        seconds: of each side, about.
        rounds: at the least.
        turn_seconds: of a turn, about.

    Returns:
        Images a second of each side (quartiles); "cost" and "cpu_cost", of what a step with labels
        takes in time and in CPU time of all threads.
    """
    turns = {name: make_steps(case, store).take for name, store in (
        (SUPERVISED, None), (DISTILLED, case.store))}
    for turn in turns.values():
        turn(2)
    began = time.perf_counter()
    turns[SUPERVISED](3)
    steps = max(1, round(turn_seconds / ((time.perf_counter() - began) / 3)))
    for turn in turns.values():  # the streams have used up what they prepared during compilation
        turn(max(steps, 2 * count_cpus() + 1))
    speeds, busy = race({name: partial(_count, turn, steps, case.config.train.batch_size)
                      for name, turn in turns.items()}, seconds, rounds)
    cost, cpu_cost = ([a / b for a, b in zip(each[SUPERVISED], each[DISTILLED], strict=True)]
                      for each in (speeds, busy))
    return {**{name: quartiles(values) for name, values in speeds.items()},
            "cost": quartiles(cost), "cpu_cost": quartiles(cpu_cost), "rounds": len(cost),
            "steps": steps,
            "batch": case.config.train.batch_size, "classes": case.classes,
            "top_k": case.store.manifest.top_k}


def _count(turn: Callable[[int], None], steps: int, batch: int) -> int:
    turn(steps)
    return steps * batch


class Steps(NamedTuple):
    """Training as the loop of a run does it."""

    take: Callable[[int], None]  # so many batches and updates, until the last is done
    measure_memory: Callable[[], Any]  # bytes on each device, as a run forecasts them


def make_steps(case: Case, store: Any, teacher: Any = None, mixed: bool = False) -> Steps:
    """Training with labels, with a store's targets, or with a live teacher.

    Args:
        case: what is trained.
        store: of the teacher's targets, or None.
        teacher: live, from `teachers.make_teacher`, or None.
        mixed: mix views in pairs, as the config says.
    """
    import jax

    from tinyvit_jax import feed, live, memory, optim, train, weights
    from tinyvit_jax import mesh as meshes
    from tinyvit_jax.data import augment, pipeline
    from tinyvit_jax.data.order import Order
    from tinyvit_jax.program import compiling

    config, mesh = case.config.copy_and_resolve_references(), meshes.make_mesh()
    config.objective.name = "stored_logits" if store is not None else (
        "live_teacher" if teacher is not None else "supervised")
    model = weights.make_model(weights.complete(config.model), case.classes)
    views = pipeline.Views(case.source, augment.make_spec(config.augment, model.image_size),
                           Order(0, len(case.source), mixed), store, 1)
    batch = config.train.batch_size
    batches = pipeline.TrainBatches(views, batch, pipeline.Rows(0, batch), 1 << 20)
    # No more of them ready than two for a thread: a turn is to prepare what it shows.
    stream: Iterator = pipeline.batch_stream(batches, threads=config.data.threads,
                                             prefetch=config.data.prefetch)
    schedule = optim.make_schedule(config.optim, batch, 10_000, 100.0)
    state = meshes.put_state(train.init_state(config, model), mesh)
    step: Any = train.make_train_step(config, model, schedule, mesh)
    with compiling() as compiler:
        teaching = live.Teaching(teacher, teacher is not None, feed.describe_batch(
            batches, 0, mesh), case.classes, mesh, compiler, "benchmark")
        teaching.add_memory(memory.Memory(0, 0, 0, 0))  # waits until it is compiled
    held, shapes = [state], train.describe_state(config, model, mesh)

    def take(steps: int) -> None:
        losses: list[Any] = []
        for _ in range(steps):
            held[0], metrics = step(held[0], teaching(meshes.put_batch(next(stream), mesh)))
            losses.append(metrics["loss"])
            jax.block_until_ready(losses[-4:][0])  # the loop of a run bounds its queue so too
        jax.block_until_ready(held[0].step)

    def measure_memory() -> Any:
        return teaching.add_memory(
            memory.measure_memory(step.lower(shapes, teaching.shapes).compile()))

    return Steps(take, measure_memory)


_IMPORTS = "Seconds of a fresh Python process from its start to its end; files in the page cache."
_FIRST = """\
Seconds from the command (python -m tinyvit_jax.main --config={config}) to the first finished step
of the first training that it does, for an empty and for a filled compilation cache."""
_TRAINING = """\
The config's student with labels, lines of ten steps from metrics.jsonl without the first; data wait
is the share of the time in which the loop waits for a batch, over all lines and of the line with
the most."""
_DISTILLATION = """\
Images a second of whole steps, batches read, replayed and put on the device: median and quartiles
of turns, the two by turns. Cost: time of a step with stored logits by that of one with labels, of
the same rounds; CPU cost: likewise, in CPU time of all threads. The targets of a view are read from
the store, checked against its key."""


def format_result(result: dict[str, Any]) -> str:
    """The tables of tools/benchmark.py end_to_end."""
    settings = result["settings"]
    parts = ["# From the command to a trained model\n\n"
             f"{bench_report.format_machine(result['machine'])}",
             "## Import\n\n" + _format_seconds(result["import"]), _IMPORTS,
             "## First step\n\n" + _format_seconds(result["first_step"]),
             _FIRST.format(config=settings["config"])]
    if result["training"]:
        parts += ["## Training\n\n" + _format_training(result["training"]), _TRAINING]
    if result["distillation"]:
        parts += ["## Distillation\n\n" + _format_distillation(result["distillation"]),
                  _DISTILLATION]
    return "\n\n".join(parts) + "\n"


def _format_seconds(rows: list[dict[str, Any]]) -> str:
    return bench_report.format_table(["", "seconds", "quartiles"], [
        [row["what"], f"{row['median']:.2f}", f"{row['low']:.2f}-{row['high']:.2f}"]
        for row in rows])


def _format_training(row: dict[str, Any]) -> str:
    speed = row["images_per_second"]
    return bench_report.format_table(
        ["images/s", "quartiles", "data wait", "at most", "steps", "seconds in all"],
        [[f"{speed['median']:,.0f}", f"{speed['low']:,.0f}-{speed['high']:,.0f}",
          f"{row['data_wait']:.1%}", f"{row['most_data_wait']:.1%}",
          f"{row['steps']:,}", f"{row['seconds']:.1f}"]])


def _format_distillation(rows: list[dict[str, Any]]) -> str:
    lines = [[row["what"], str(row["batch"]), f"{row['top_k']} of {row['classes']:,}",
              *(f"{row[name]['median']:,.1f}" for name in (SUPERVISED, DISTILLED)),
              f"{row['cost']['median']:.3f}",
              f"{row['cost']['low']:.3f}-{row['cost']['high']:.3f}",
              f"{row['cpu_cost']['median']:.3f}", str(row["rounds"])]
             for row in rows]
    return bench_report.format_table(
        ["", "batch", "K of C", f"{SUPERVISED}, images/s", f"{DISTILLED}, images/s", "cost",
         "quartiles", "CPU cost", "rounds"], lines)
