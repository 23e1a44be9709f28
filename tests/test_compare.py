"""Comparing teachers: who is trained, in which order, what the table says, and nothing twice."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tinyvit_jax import compare, recipe, train, weights
from tinyvit_jax import config as configs

ROOT = Path(__file__).parents[1]


def make_config(folder, **changes):
    c = tiny.make_config(folder, mixed=False)
    c.objective.update({"name": "live_teacher", "alpha": 0.9})
    c.teacher.epochs, c.train.epochs = 1, 1.0
    c.eval.every_epochs = c.checkpoint.every_epochs = 1.0
    c.compare.teachers = ("x2>x1",)
    c.update_from_flattened_dict(changes)
    configs.check(c)
    return c


def get_config(folder):
    """For --config=tests/test_compare.py:FOLDER."""
    return make_config(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def bright(images):
    return images.reshape(len(images), -1, 3).mean(1) / 10


def test_entries(folder, tmp_path):
    c = make_config(folder)
    data = train.open_data(c)
    twice = compare.open_entry(c, data, "x2")
    assert (twice.name, twice.embed_dims, twice.num_heads) == (
        "tiny_vit", (16, 16, 32, 32), (2, 2, 4, 4))
    assert (twice.image_size, twice.depths, twice.epochs) == (16, (1, 1, 1, 1), 1)
    half = compare.open_entry(c, data, "x0.5")
    assert (half.embed_dims, half.num_heads) == ((4, 4, 8, 8), (1, 1, 1, 1))
    large = compare.open_entry(c, data, "tiny_vit_21m_224")
    assert (large.name, large.image_size, large.embed_dims) == ("tiny_vit_21m_224", 0, ())
    own = compare.open_entry(c, data, "test_compare:bright")
    assert (own.name, own.weights, own.epochs) == ("test_compare:bright", "", 0)
    wide = {"resnet50": {"block": "bottleneck", "embed_dims": (512, 1024, 2048, 4096)},
            "regnety_002": {"group_width": 8, "embed_dims": (48, 112, 304, 736)},
            "vit_mini_patch4_32": {"dropout": 0.1, "embed_dims": (256,),
                                   "num_heads": (16,)}}
    for name, shape in wide.items():
        plain = {key: () for key in ("embed_dims", "depths", "num_heads", "window_sizes",
                                     "stem_strides")}
        student = make_config(folder, **{f"model.{k}": v for k, v in plain.items()} | {
            "model.name": name, "model.image_size": 32, "compare.teachers": ("x2",)})
        section = compare.open_entry(student, data, "x2")
        student.teacher = section
        model = train.make_student(recipe.teacher_config(student), data)
        assert {key: getattr(model, key) for key in shape} == shape
    c.teacher.mean = c.teacher.std = (0.5,) * 3
    place = compare.open_entry(c, data, str(tmp_path))
    assert (place.name, place.weights, place.epochs, place.mean) == ("", str(tmp_path), 0, ())
    with pytest.raises(configs.ConfigError, match=r"'huge' is no teacher\. Expected x2"):
        compare.open_entry(c, data, "huge")
    c.teacher.epochs = 0
    with pytest.raises(configs.ConfigError, match=r"teacher\.epochs=0 cannot work: x2 of"):
        compare.open_entry(c, data, "x2")


@pytest.mark.parametrize(("teachers", "message"), [
    (("x1", "huge"), "'huge' is no teacher"), (("x1", "tests"), "model.json is missing"),
    (("x1", "no_module:f"), "no_module:f: No module named"),
    (("x1>test_compare:bright",), "test_compare:bright is trained already")])
def test_every_teacher_is_opened_before_the_first_training(folder, tmp_path, teachers, message,
                                                           monkeypatch):
    monkeypatch.setattr(train, "fit", None)
    c = make_config(folder, **{"compare.teachers": teachers, "model.name": ""})
    model = train.make_student(make_config(folder), train.open_data(c))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), model.variable_shapes())
    weights.save_trained(weights.Trained(model, variables, tiny.CLASSES, (0.5,) * 3, (0.5,) * 3,
                                         "center", 1.0), tmp_path / "start")
    c.model.init_from = str(tmp_path / "start")
    c.data.mean = c.data.std = ()  # as configs/finetune.py: all of it comes with the weights
    with pytest.raises((ValueError, RuntimeError), match=message):
        compare.run(c, tmp_path)


def test_cases():
    c = configs.default()
    c.compare.teachers, c.compare.temperatures = ("x2", "x4>x2"), (1.0, 4.0)
    cases = compare.list_cases(c)
    assert [(case.title, case.temperature) for case in cases] == [
        ("labels only", 1.0), ("x2", 1.0), ("x2", 4.0), ("x4 > x2", 1.0), ("x4 > x2", 4.0)]
    c.compare.temperatures, c.objective.temperature = (), 3.0
    assert [case.temperature for case in compare.list_cases(c)] == [1.0, 3.0, 3.0]
    for key, value in (("teachers", ()), ("teachers", ("x2>",)), ("temperatures", (0.0,)),
                       ("seeds", 0)):
        wrong = configs.default()
        wrong.compare[key] = value
        with pytest.raises(configs.ConfigError, match=rf"--config\.compare\.{key}="):
            configs.check(wrong)


@pytest.mark.slow
def test_a_chain_is_trained_once_each_from_its_own_teacher(folder, tmp_path, monkeypatch):
    """x2 learns the labels, x1 from x2, the student from x1; the second time nothing is trained."""
    c = make_config(folder, **{"compare.seeds": 2, "objective.temperature": 2.0})
    fits, fit = [], train.fit

    def note(config, place, data, *args, title="", teacher=None, **options):
        live = config.objective.name == "live_teacher"
        assert config.objective.temperature == (2.0 if live else 1.0)
        assert config.model.embed_dims == ((16, 16, 32, 32) if place.name == "x2" else (
            8, 8, 16, 16))
        assert config.teacher.epochs == 0 or not live
        fits.append((str(place.relative_to(tmp_path)), config.objective.name, config.seed,
                     teacher.description["weights"] if teacher else ""))
        return fit(config, place, data, *args, title=title, teacher=teacher, **options)

    monkeypatch.setattr(train, "fit", note)
    result = compare.run(c, tmp_path)

    def hash_of(place):
        return weights.hash_weights(weights.load_run(tmp_path / place).variables)

    assert fits == [
        ("students/labels_only-t1-s0", "supervised", 0, ""),
        ("students/labels_only-t1-s1", "supervised", 1, ""),
        ("teachers/x2", "supervised", 0, ""),
        ("teachers/x2-x1-t2", "live_teacher", 0, hash_of("teachers/x2")),
        ("students/x2-x1-t2-s0", "live_teacher", 0, hash_of("teachers/x2-x1-t2")),
        ("students/x2-x1-t2-s1", "live_teacher", 1, hash_of("teachers/x2-x1-t2"))]
    alone, taught = result["rows"]
    assert (alone["teacher"], taught["teacher"], taught["seeds"]) == ("labels only", "x2 > x1", 2)
    assert alone["low"] <= alone["student_top1"] <= alone["high"]
    assert taught["parameter_ratio"] == taught["mac_ratio"] == 1.0
    assert taught["parameters"] == result["student"]["parameters"]
    assert 0 <= taught["entropy"] <= result["uniform_entropy"] + 1e-6
    assert 0 <= taught["entropy_views"] <= result["uniform_entropy"] + 1e-6
    assert 0 <= taught["agreement"] <= 100
    assert taught["kl"] >= 0

    steps = []
    monkeypatch.setattr(train, "make_train_step", lambda *_: steps.append(1))
    assert compare.run(c, tmp_path) == result
    assert not steps


def test_what_is_measured(folder, tmp_path):
    """Against the same figures from whole arrays of a student and a function as its teacher."""
    c = make_config(folder, **{"compare.teachers": ("test_compare:bright",),
                               "compare.temperatures": (3.0,)})
    c.model.update(tiny.STUDENT)
    result = compare.run(c, tmp_path)
    row = result["rows"][1]
    data = train.open_data(c)
    trained = weights.load_run(tmp_path / "students" / "test_compare_bright-t3-s0")
    views = [train.augment.eval_view(compare.pipeline.ops.decode(e.image, e.key), 16, "center", 1.0)
             for e in data.eval.read(list(range(len(data.eval))))]
    label = np.array([e.label for e in data.eval.read(list(range(len(data.eval))))])
    pixels = train.mix.normalize(jnp.asarray(np.stack(views), jnp.float32), trained.mean,
                                 trained.std)
    student = jax.nn.log_softmax(jax.jit(trained.model.apply)(trained.variables, pixels))
    teacher = jax.nn.log_softmax(jnp.asarray(bright(np.stack(views)), jnp.float32))
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    p = np.exp(teacher)
    expected = {
        "student_top1": 100 * (student.argmax(-1) == label).mean(),
        "teacher_top1": 100 * (teacher.argmax(-1) == label).mean(),
        "confidence": 100 * p.max(-1).mean(), "entropy": -(p * teacher).sum(-1).mean(),
        "agreement": 100 * (student.argmax(-1) == teacher.argmax(-1)).mean(),
        "kl": (p * (teacher - student)).sum(-1).mean()}
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-3)
    assert row["parameter_ratio"] is None
    assert row["entropy_views"] > row["entropy"]  # at T = 3
    table = compare.format_table(result)
    assert len({len(line) for line in table.splitlines()}) == 1
    assert len(table.splitlines()) == 4


def test_classes_of_the_evaluation_that_the_model_lacks():
    answers = [jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]]))] * 2
    found = compare._judge(answers, jnp.array([1, 2]), np.array([-1, 0, 1]))
    assert found["student_top1"].tolist() == found["teacher_top1"].tolist() == [100, 100]
    assert found["agreement"].tolist() == [100, 100]
    np.testing.assert_allclose(found["kl"], 0, atol=1e-6)


@pytest.mark.slow
def test_the_command_writes_a_table_and_a_picture(folder, tmp_path):
    def run(*flags, code=0):
        done = subprocess.run(
            [sys.executable, "tools/compare_teachers.py",
             f"--config=tests/test_compare.py:{folder}", f"--workdir={tmp_path / 'run'}", *flags],
            cwd=ROOT, text=True, capture_output=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
        assert done.returncode == code, done.stderr[-2000:]
        return done

    failed = run("--config.compare.teachers=('huge',)", code=1)
    assert failed.stderr.strip().splitlines()[-1].startswith("error: --config.compare.teachers")
    done = run("--config.compare.teachers=('x1','test_compare:bright')")
    assert (tmp_path / "run" / "teachers.md").read_text() == done.stdout
    rows = list(csv.DictReader((tmp_path / "run" / "teachers.csv").open()))
    assert [row["teacher"] for row in rows] == ["labels only", "x1", "test_compare:bright"]
    assert json.loads((tmp_path / "run" / "teachers.json").read_text())["images"] == 3
    assert (tmp_path / "run" / "teachers.png").stat().st_size > 10_000
    again = run("--config.compare.teachers=('x1','test_compare:bright')")
    assert again.stdout == done.stdout
    assert "compiled in" not in again.stderr


def test_a_student_config_is_the_recipes(folder):
    """What a comparison changes of a config leaves nothing that a supervised run would read."""
    c = make_config(folder)
    c.objective.temperature = 4.0
    assert recipe.twin_config(c).objective == configs.default().objective
    assert recipe.twin_config(c).teacher == configs.default().teacher
