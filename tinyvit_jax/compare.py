"""Which teacher suits a student: one student, several live teachers, and what sets them apart.

A larger teacher is better and need not teach better: its answers may be so sure that they say
little beyond the label, or so intricate that the student cannot follow (Mirzadeh et al. 2020, arXiv
1902.03393, who put an assistant of a size in between). So each teacher's accuracy stands beside its
entropy, how far the student came to agree with it, and how much larger it is.

Every training is a workdir of its own, so what is finished is not done again.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from tinyvit_jax import config as configs
from tinyvit_jax import log, measure, models, recipe, teachers, train, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import pipeline
from tinyvit_jax.models import cost
from tinyvit_jax.objectives import live_teacher

LABELS = "labels only"


class Case(NamedTuple):
    """One way to teach the student."""

    chain: tuple[str, ...]  # who teaches whom, the student's own teacher last; () = labels alone
    temperature: float

    @property
    def title(self) -> str:
        """As the table names it."""
        return " > ".join(self.chain) or LABELS


def list_cases(config: ml_collections.ConfigDict) -> list[Case]:
    """What a config compares: labels alone, then each teacher at each temperature."""
    temperatures = config.compare.temperatures or (config.objective.temperature,)
    return [Case((), 1.0), *(Case(tuple(entry.split(">")), float(t))
                             for entry in config.compare.teachers for t in temperatures)]


def run(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains whatever is not there yet, measures it and gives a row for each case.

    Args:
        config: a checked config; `compare` says what is compared, `teacher` holds the recipe of
            teachers that are trained first, all else is the student's.
        workdir: gets teachers/NAME and students/NAME, each a workdir.

    Returns:
        {"rows": a dict for each case (see `_make_row`), "classes", "uniform_entropy", "student":
        its parameters and macs, "images": how many were measured}.
    """
    config = recipe.complete(config)
    config.data.resident = False  # a live teacher's views come from the host, so all do
    data, mesh = train.open_data(config), meshes.make_mesh()
    check_chains(config, data, mesh)
    rows: list[dict[str, Any]] = []
    for case in list_cases(config):
        taught = fit_chain(config, workdir, data, case) if case.chain else None
        found = [fit_student(config, workdir, data, case, taught, config.seed + i, mesh)
                 for i in range(config.compare.seeds)]
        rows.append(_make_row(config, case, taught, found, data))
    student = train.make_student(config, data)
    return {"rows": rows, "classes": len(data.train.class_names), "images": len(data.eval),
            "uniform_entropy": float(np.log(len(data.train.class_names))),
            "student": {"parameters": cost.count_parameters(student),
                        "macs": cost.count_macs(student)}}


def check_chains(config: ml_collections.ConfigDict, data: train.Data, mesh: Mesh) -> None:
    """Opens every teacher that is compared, before hours of training come to one that fails."""
    for chain in dict.fromkeys(case.chain for case in list_cases(config)):
        sections = [open_entry(config, data, entry) for entry in chain]
        for number, section in enumerate(sections):
            c = ml_collections.ConfigDict(config.to_dict())
            c.teacher = section
            if section.epochs:
                train.make_student(recipe.teacher_config(c), data)
            elif number:
                raise configs.ConfigError(
                    f"--config.compare.teachers={'>'.join(chain)} cannot work: {chain[number]} is "
                    f"trained already, so nobody can teach it. Only the first of a chain may be.")
            else:
                _make_teacher(c, data, mesh)


def fit_chain(config: ml_collections.ConfigDict, workdir: Path, data: train.Data, case: Case
              ) -> ml_collections.ConfigDict:
    """The `teacher` section of the last of a case's chain, all of which is trained first.

    The first learns the labels by the teacher's recipe; an assistant learns from the one before it,
    as long as that recipe says, by the student's objective at the same temperature.
    """
    section: ml_collections.ConfigDict | None = None
    for number, entry in enumerate(case.chain):
        own = open_entry(config, data, entry)
        if own.epochs:
            place = workdir / "teachers" / (name_folder(case.chain[:number + 1]) + (
                f"-t{case.temperature:g}" if number else ""))
            _fit_teacher(config, own, section, case, place, data)
            own.update({"weights": str(place), "epochs": 0})
        section = own
    assert section is not None
    return section


def _fit_teacher(config: ml_collections.ConfigDict, own: ml_collections.ConfigDict,
                 teacher: ml_collections.ConfigDict | None, case: Case, place: Path,
                 data: train.Data) -> None:
    """Trains a teacher on the labels, or an assistant on its own teacher."""
    c = ml_collections.ConfigDict(config.to_dict())
    c.teacher = own
    c = recipe.teacher_config(c)
    live = None
    if teacher is not None:
        c = _learn_from(c, config, teacher, case)
        live = _make_teacher(c, data, meshes.make_mesh())
    train.fit(c, place, data, title=place.name, teacher=live)


def _learn_from(c: ml_collections.ConfigDict, config: ml_collections.ConfigDict,
                teacher: ml_collections.ConfigDict, case: Case) -> ml_collections.ConfigDict:
    """A config that learns from a live teacher by the objective of the comparison's config."""
    c = ml_collections.ConfigDict(c.to_dict())
    c.objective.update({**config.objective.to_dict(), "name": "live_teacher",
                        "temperature": case.temperature})
    c.teacher.update(teacher.to_dict())
    configs.check(c)
    return c


def open_entry(config: ml_collections.ConfigDict, data: train.Data, entry: str
               ) -> ml_collections.ConfigDict:
    """The `teacher` section of an entry of compare.teachers: with epochs where it is to be trained.

    Raises:
        ConfigError: an entry that is nothing of what it may be.
    """
    section = ml_collections.ConfigDict(config.teacher.to_dict())
    section.update({"weights": "", "ensemble": (), "name": entry})
    if re.fullmatch(r"x\d+(\.\d+)?", entry):
        section.update(_scale_student(train.make_student(config, data), float(entry[1:]), section))
    elif entry in models.VARIANTS:
        section.update(_no_shape(section))
    elif Path(entry).exists() or ":" in entry:
        function = ":" in entry and not Path(entry).exists()
        section.update({**_no_shape(section), "epochs": 0, "name": entry if function else "",
                        "weights": "" if function else entry})
        if Path(entry).is_dir():
            section.mean, section.std = (), ()
        return section
    else:
        raise configs.ConfigError(
            f"--config.compare.teachers: {entry!r} is no teacher. Expected x2 (the student at "
            f"twice its width), the name of a variant, a workdir, a weights file or "
            f"module:function.")
    if not section.epochs:
        raise configs.ConfigError(f"--config.teacher.epochs=0 cannot work: {entry} of "
                                  f"--config.compare.teachers is to be trained first.")
    return section


def _no_shape(section: ml_collections.ConfigDict) -> dict[str, Any]:
    """Resets what overrides a variant's shape."""
    return {"image_size": 0} | {k: type(section[k])() for k in weights.list_shape_keys(section)}


def _scale_student(student: Any, factor: float, section: ml_collections.ConfigDict
                   ) -> dict[str, Any]:
    """The keys of a section for the student's model with so many times its width and heads.

    Those of a shape that no section has by itself, such as a ResNet's kind of block, come with it.
    """
    shape = models.describe_shape(student)
    del shape["num_classes"]
    shape |= {key: tuple(max(1, round(n * factor)) for n in shape[key])
              for key in ("embed_dims", "num_heads", "mlp_dims") if key in shape}
    options = {"dropout": student.dropout} if hasattr(student, "dropout") else {}
    return _no_shape(section) | shape | options | {"name": models.family_of(student)}


def fit_student(config: ml_collections.ConfigDict, workdir: Path, data: train.Data, case: Case,
                taught: ml_collections.ConfigDict | None, seed: int, mesh: Mesh) -> dict[str, Any]:
    """Trains the student from one teacher and one seed: fit.json's figures and the measured ones.

    Args:
        config: of the comparison.
        workdir: likewise.
        data: likewise.
        case: who teaches, and how soft.
        taught: the teacher's section; None = labels alone.
        seed: of the student's first weights and drop path.
        mesh: over which batches are cut.
    """
    place = workdir / "students" / f"{name_folder(case.chain or (LABELS,))}-t{case.temperature:g}" \
        f"-s{seed}"
    c = recipe.twin_config(config)
    c.seed, teacher = seed, None
    if taught is not None:
        c = _learn_from(c, config, taught, case)
        teacher = _make_teacher(c, data, mesh)
    fitted = train.fit(c, place, data, title=f"{case.title}, T={case.temperature:g}",
                       teacher=teacher)
    lines = log.read_metrics(place / "metrics.jsonl")
    measured = _measure(c, place, data, teacher, mesh)
    return {**fitted, **measured, "views": {
        key: lines[-1].get(key) for key in ("agreement", "kl", "teacher_entropy")}}


def _make_teacher(config: ml_collections.ConfigDict, data: train.Data, mesh: Mesh
                  ) -> teachers.Teacher:
    """The live teacher of a config that is compared."""
    return teachers.make_teacher(config.teacher, tuple(data.train.class_names),
                                 recipe.make_views(config, data).spec.image_size, mesh,
                                 config.objective.temperature)


def name_folder(chain: tuple[str, ...]) -> str:
    """A folder's name for who teaches whom."""
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", entry).strip("_") for entry in chain)


def _measure(config: ml_collections.ConfigDict, place: Path, data: train.Data,
             teacher: teachers.Teacher | None, mesh: Mesh) -> dict[str, Any]:
    """What teacher and student say of the evaluation images at T = 1; kept in measured.json."""
    mark = teacher.description["weights"] if teacher else ""
    done = log.read_json(place / "measured.json")
    if done is not None and done["teacher"] == mark:
        return done
    c = ml_collections.ConfigDict(config.to_dict())
    c.objective.temperature, c.teacher = 1.0, configs.default().teacher
    c.teacher.weights = str(place)
    student, t = _make_teacher(c, data, mesh), config.objective.temperature

    def judge(answers: list[jax.Array], batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        plain = [answers[0], *(jax.nn.log_softmax(t * x) for x in answers[1:])]  # both at 1
        return _judge(plain, batch["label"], data.class_map) | {"weight": batch["weight"]}

    compiled = jax.jit(judge, out_shardings=meshes.replicated(mesh))
    to_float = jax.jit(lambda x: x.astype(jnp.float32), out_shardings=meshes.sharded(mesh))
    found: list[dict[str, np.ndarray]] = []
    for batch in _eval_batches(config, data, mesh):
        pixels = to_float(batch["image"])
        found.append(jax.device_get(compiled(
            [who.log_probs(pixels) for who in (student, teacher) if who], batch)))
    weight = np.concatenate([f.pop("weight") for f in found])
    result = {"teacher": mark} | {key: float(np.concatenate([f[key] for f in found])[
        weight > 0].mean(dtype=np.float64)) for key in found[0]}
    if jax.process_index() == 0:
        log.write_json(place / "measured.json", result)
    return result


def _eval_batches(config: ml_collections.ConfigDict, data: train.Data, mesh: Mesh
                  ) -> Iterator[dict[str, jax.Array]]:
    """The evaluation images as the student sees them, on the devices; the last are padding."""
    judge, _ = measure.make_judge(config, train.make_student(config, data), data.eval,
                                  data.class_map, mesh)
    for batch in pipeline.batch_stream(judge.batches, threads=config.data.threads,
                                       prefetch=config.data.prefetch):
        yield meshes.put_batch(batch, mesh)


def _judge(answers: list[jax.Array], label: jax.Array, class_map: Any) -> dict[str, jax.Array]:
    """What each row says, [B] each: of the student, and where there is one of its teacher."""
    def right(log_prob: jax.Array) -> jax.Array:
        if class_map is not None:  # the last column is that of a class that is not known
            log_prob = jnp.pad(log_prob, ((0, 0), (0, 1)), constant_values=-jnp.inf)[:, class_map]
        return 100.0 * (log_prob.argmax(-1) == label)

    student, *others = answers
    found = {"student_top1": right(student),
             "student_entropy": live_teacher.entropy(student)}
    for teacher in others:
        found |= {"teacher_top1": right(teacher),
                  "teacher_entropy": live_teacher.entropy(teacher),
                  "teacher_confidence": 100.0 * jnp.exp(teacher.max(-1)),
                  "agreement": 100.0 * (teacher.argmax(-1) == student.argmax(-1)),
                  "kl": live_teacher.divergence(student, teacher)}
    return found


def _make_row(config: ml_collections.ConfigDict, case: Case,
              taught: ml_collections.ConfigDict | None, found: list[dict[str, Any]],
              data: train.Data) -> dict[str, Any]:
    """A row of the table: the mean of the student's seeds, and what its teacher is.

    Returns:
        "teacher", "temperature", "seeds", "student_top1" and its "low" and "high" over the seeds,
        "seconds" of a training; and, but for labels alone, "teacher_top1", "confidence" (mean
        largest probability, %), "entropy" (nats, evaluation images), "entropy_views" (of the last
        training views, at T), "agreement" (%), "kl", "parameters", "macs" and, times the student's,
        "parameter_ratio", "mac_ratio" (None for a function, whose size nobody knows).
    """
    def mean(key: str) -> float:
        return float(np.mean([f[key] for f in found]))

    scores = [f["student_top1"] for f in found]
    row: dict[str, Any] = {
        "teacher": case.title, "temperature": case.temperature, "seeds": len(found),
        "student_top1": mean("student_top1"), "low": min(scores), "high": max(scores),
        "seconds": mean("seconds")}
    if taught is None:
        return row
    row |= {"teacher_top1": mean("teacher_top1"), "confidence": mean("teacher_confidence"),
            "entropy": mean("teacher_entropy"), "agreement": mean("agreement"), "kl": mean("kl"),
            "entropy_views": float(np.mean([f["views"]["teacher_entropy"] for f in found])),
            "parameters": None, "macs": None, "parameter_ratio": None, "mac_ratio": None}
    if taught.weights:
        teacher = weights.open_trained(taught.weights, taught.image_size,
                                       tuple(taught.stem_strides),
                                       num_heads=tuple(taught.num_heads)).model
        student = train.make_student(config, data)
        for key, ratio, count in (("parameters", "parameter_ratio", cost.count_parameters),
                                  ("macs", "mac_ratio", cost.count_macs)):
            row[key] = count(teacher)
            row[ratio] = row[key] / count(student)
    return row


Column = tuple[str, Callable[[dict[str, Any]], str]]


def format_table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    def number(key: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: "-" if row.get(key) is None else format(row[key], form)

    def top1(row: dict[str, Any]) -> str:
        spread = f" ({row['low']:.2f}-{row['high']:.2f})" if row["seeds"] > 1 else ""
        return f"{row['student_top1']:.2f}{spread}"

    columns: list[Column] = [
        ("teacher", lambda row: row["teacher"]),
        ("T", lambda row: "-" if row["teacher"] == LABELS else f"{row['temperature']:g}"),
        ("parameters", number("parameters", ",")), ("x student", number("parameter_ratio", ".1f")),
        ("multiply-adds x", number("mac_ratio", ".1f")),
        ("teacher top-1", number("teacher_top1", ".2f")), ("sure, %", number("confidence", ".1f")),
        ("entropy", number("entropy", ".3f")), ("entropy at T, views", number("entropy_views",
                                                                             ".3f")),
        ("student top-1", top1), ("agreement, %", number("agreement", ".1f")),
        ("KL", number("kl", ".3f")), ("seconds", number("seconds", ".0f"))]
    lines = [[head for head, _ in columns],
             *([show(row) for _, show in columns] for row in result["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
             for line in lines]
    return "\n".join([table[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *table[1:]])
