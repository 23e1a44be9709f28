"""What a live teacher costs against a stored one and against labels alone: time and memory.

Whole updates of one student on the same views, batches out of the pipeline included, by turns in
one process; and the teacher by itself, which is what a capture pays once for each stored view.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference import bench_report
from reference.bench_end_to_end import ROOT, Case, Steps, fill_store, load_config, make_steps
from reference.bench_timing import count_cpus, quartiles, race

LABELS, STORED, LIVE, ALONE = "labels only", "stored teacher", "live teacher", "the teacher alone"
_ROUNDS = 7
_TURN = 0.5  # seconds of a turn, about


class Settings(NamedTuple):
    """What is measured."""

    config: str = "configs/quickstart.py:live"
    seconds: float = 15.0
    batch: int = 0
    top_k: int = 10


MEANINGS = {
    "config": "whose student and teacher are raced, the teacher with random weights",
    "seconds": "that each side runs for, about",
    "batch": "views of an update; 0 = the config's",
    "top_k": "stored classes, at most as many as there are",
}


def check_settings(settings: Settings) -> None:
    """Raises ValueError for what cannot be measured."""
    for name, lowest in (("seconds", 0), ("batch", 0), ("top_k", 1)):
        if getattr(settings, name) < lowest:
            raise ValueError(f"--{name}={getattr(settings, name)}: expected {lowest} or more")
    if settings.batch % 2:
        raise ValueError(f"--batch={settings.batch}: expected an even number")
    if not (ROOT / settings.config.partition(":")[0]).is_file():
        raise ValueError(f"--config={settings.config}: there is no such file in {ROOT}")


def measure(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Races labels, store and live teacher.

    Args:
        settings: checked.
        folder: for the store and the teacher's weights.
        say: takes a line of progress.

    Returns:
        "rows": of each side "milliseconds" and "cpu_milliseconds" of an update, "cost" and
        "cpu_cost" against labels alone (quartiles all), and "memory", bytes on each device;
        "batch", "classes", "image_size", and "parameters" and "macs" of student and teacher.
    """
    from tinyvit_jax.data import images

    config = load_config(settings.config)
    config.train.batch_size = settings.batch or config.train.batch_size
    source = images.open_source(config.data.source, "train", config.data.data_dir)
    classes = len(source.class_names)
    store = fill_store(folder / "store", len(source), classes, min(settings.top_k, classes))
    case = Case(config, source, classes, store)
    teacher, about = make_random_teacher(case, folder / "teacher")
    sides: dict[str, Steps] = {}
    for name, own, live in ((LABELS, None, None), (STORED, store, None), (LIVE, None, teacher)):
        say(f"compiles: {name}")
        sides[name] = make_steps(case, own, live)
    turns: dict[str, Callable[[int], None]] = {
        **{name: side.take for name, side in sides.items()},
        ALONE: _make_alone(config.train.batch_size, about["image_size"], teacher)}
    for turn in turns.values():
        turn(2)
    say("races")
    began = time.perf_counter()
    turns[LABELS](3)
    steps = max(1, round(_TURN / ((time.perf_counter() - began) / 3)))
    for turn in turns.values():  # the streams have used up what they prepared during compilation
        turn(max(steps, 2 * count_cpus() + 1))
    speeds, busy = race({name: partial(_count, turn, steps) for name, turn in turns.items()},
                        settings.seconds, _ROUNDS)
    rows = [{"what": name, "rounds": len(speeds[name]),
             "milliseconds": quartiles([1e3 / v for v in speeds[name]]),
             "cpu_milliseconds": quartiles([1e3 / v for v in busy[name]]),
             "cost": _compare(speeds, name), "cpu_cost": _compare(busy, name),
             "memory": sides[name].measure_memory()._asdict() if name in sides else None}
            for name in turns]
    return {"rows": rows, "batch": config.train.batch_size, "classes": classes, **about}


def _count(turn: Callable[[int], None], steps: int) -> int:
    turn(steps)
    return steps


def _compare(speeds: dict[str, list[float]], name: str) -> dict[str, float]:
    """What a side takes against labels alone, in the same rounds."""
    return quartiles([a / b for a, b in zip(speeds[LABELS], speeds[name], strict=True)])


def make_random_teacher(case: Case, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The config's own teacher, whose weights do not matter for what it costs; and both sizes."""
    import jax

    from tinyvit_jax import mesh as meshes
    from tinyvit_jax import teachers, weights
    from tinyvit_jax.models import cost

    config = case.config.copy_and_resolve_references()
    names = tuple(case.source.class_names)
    student = weights.make_model(weights.complete(config.model), case.classes)
    model = weights.make_model(config.teacher, case.classes, student.image_size)
    generator = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        if path[-1].key in ("scale", "var"):
            return np.ones(leaf.shape, np.float32)
        return generator.normal(0, 0.05, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, model.variable_shapes())
    weights.save_trained(weights.Trained(
        model, variables, names, tuple(config.data.mean), tuple(config.data.std), "center", 1.0),
        folder)
    config.teacher.weights = str(folder)
    made = teachers.make_teacher(config.teacher, names, student.image_size, meshes.make_mesh(),
                                 config.objective.temperature)
    return made, {"image_size": student.image_size,
                  "parameters": [cost.count_parameters(m) for m in (student, model)],
                  "macs": [cost.count_macs(m) for m in (student, model)]}


def _make_alone(batch: int, size: int, teacher: Any) -> Callable[[int], None]:
    """The teacher on one batch of pixels over and over, without what prepares them."""
    import jax

    from tinyvit_jax import mesh as meshes

    views = np.random.default_rng(0).uniform(0, 255, (batch, size, size, 3)).astype(np.float32)
    pixels = meshes.put_batch({"pixels": views}, meshes.make_mesh())["pixels"]

    def turn(steps: int) -> None:
        for _ in range(steps):
            jax.block_until_ready(teacher.log_probs(pixels))

    return turn


_READING = """\
Milliseconds of an update of {batch} views of {size} pixels, batches read, replayed and put on the
device: median and quartiles of turns, by turns in one process; CPU: of all threads. Cost: against
labels only, of the same rounds. Memory of each device by the compilers' figures, as a run forecasts
it: what stays (weights, moments, a batch, and a live teacher's weights) and what the larger of the
two programs works with. The teacher alone is what a capture pays, once for each view that is
stored; a live teacher is paid in every update of every student. Student and teacher have
{student:,} and {teacher:,} parameters, {student_macs:.1f} and {teacher_macs:.1f} million
multiply-adds."""


def format_result(result: dict[str, Any]) -> str:
    """The table of tools/benchmark.py live."""
    (student, teacher), (own, other) = result["parameters"], result["macs"]
    table = bench_report.format_table(
        ["", "ms an update", "quartiles", "cost", "quartiles", "CPU ms", "CPU cost",
         "MiB that stay", "MiB at work", "MiB in all", "rounds"],
        [[row["what"], *_format_time(row), *_format_memory(row["memory"]), str(row["rounds"])]
         for row in result["rows"]])
    reading = _READING.format(batch=result["batch"], size=result["image_size"], student=student,
                              teacher=teacher, student_macs=own / 1e6, teacher_macs=other / 1e6)
    return "\n\n".join([
        "# Labels, a stored and a live teacher\n\n"
        f"{bench_report.format_machine(result['machine'])}", table, reading]) + "\n"


def _format_time(row: dict[str, Any]) -> list[str]:
    took, cost = row["milliseconds"], row["cost"]
    return [f"{took['median']:.1f}", f"{took['low']:.1f}-{took['high']:.1f}",
            f"{cost['median']:.2f}", f"{cost['low']:.2f}-{cost['high']:.2f}",
            f"{row['cpu_milliseconds']['median']:.1f}", f"{row['cpu_cost']['median']:.2f}"]


def _format_memory(memory: dict[str, int] | None) -> list[str]:
    if memory is None:
        return ["-"] * 3
    work = memory["temporaries"]
    return [f"{size / 2**20:.1f}" for size in (
        sum(memory.values()) - work, work, sum(memory.values()))]
