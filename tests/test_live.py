"""A teacher that runs beside the student: through fit(), the main command, devices, processes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import tiny
import tiny_clip

from tinyvit_jax import (
    checkpoint,
    live,
    log,
    measure,
    memory,
    mix,
    program,
    recipe,
    resume,
    teachers,
    train,
    weights,
)
from tinyvit_jax import config as configs
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import augment, pipeline

ROOT = Path(__file__).parents[1]
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
DISTILLED = {"name": "vit", "embed_dims": (16,), "depths": (1,), "num_heads": (2,), "patch_size": 8,
             "token_layout": "distilled", "window_sizes": (), "stem_strides": (), "drop_path": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A teacher of another size, normalisation, order and number of classes than the student."""
    model = tiny_clip.make_small(4, image_size=24, depths=(1,))
    trained = weights.Trained(model, tiny_clip.random_variables(model),
                              ("stripes", "waves", "checks", "blobs"), MEAN, STD, "center", 1.0)
    path = tmp_path_factory.mktemp("teacher") / "large"
    weights.save_trained(trained, path)
    return path


def make_config(folder, workdir, **changes):
    c = tiny.make_config(folder)
    c.objective.update({"name": "live_teacher", "alpha": 0.7, "temperature": 2.0})
    c.model.update(tiny.STUDENT)
    c.teacher.update({key: () for key in ("embed_dims", "depths", "num_heads", "window_sizes",
                                          "stem_strides")})
    c.teacher.update({"name": "", "weights": str(workdir), "image_size": 0, "epochs": 0})
    c.train.epochs = 1.5  # 33 images in batches of 8: 6 updates
    c.checkpoint.every_epochs = c.eval.every_epochs = 0.25
    c.checkpoint.keep_last = 10
    c.log_every = 1
    c.update_from_flattened_dict(changes)
    configs.check(c)
    return c


def make_teacher(config, data):
    return teachers.make_teacher(config.teacher, tuple(data.train.class_names), 16,
                                 meshes.make_mesh(), config.objective.temperature)


def fit(config, place):
    data = train.open_data(config)
    return train.fit(config, place, data, title="student", teacher=make_teacher(config, data))


def read_batch(config, data, size=8):
    spec = augment.make_spec(config.augment, 16)
    rows = pipeline.Views(data.train, spec, data.order).read(np.arange(size))
    return meshes.put_batch(rows, meshes.make_mesh())


def make_teaching(teacher, batch, compiler, wanted=True):
    mesh = meshes.make_mesh()
    return live.Teaching(teacher, wanted, program.describe_arrays(batch, meshes.sharded(mesh)), 3,
                         mesh, compiler, "student")


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(x)))


def test_a_batch_gets_what_its_teacher_says_of_the_mixed_pixels(folder, workdir):
    """Enlarged, normalised and with its classes picked as the teacher's own weights want it."""
    c = make_config(folder, workdir)
    data = train.open_data(c)
    batch, teacher = read_batch(c, data), make_teacher(c, data)
    with program.compiling() as compiler:
        teaching = make_teaching(teacher, batch, compiler)
        found = teaching(batch)
        built = program.count_compilations()
        again = teaching(read_batch(c, data))
    assert program.count_compilations() == built
    assert {k: (x.shape, x.dtype) for k, x in found.items()} == {
        k: (x.shape, x.dtype) for k, x in teaching.shapes.items()}
    assert {k: x for k, x in found.items() if k != "log_prob"} == batch
    trained = weights.load_run(workdir)
    pixels = mix.view_pixels(batch)
    assert (pixels != batch["image"]).any()
    pixels = jnp.clip(jax.image.resize(pixels, (8, 24, 24, 3), "cubic"), 0, 255)
    logits = jax.jit(trained.model.apply)(trained.variables, mix.normalize(pixels, MEAN, STD))
    expected = log_softmax(logits[:, np.array([3, 2, 0])] / 2.0)
    np.testing.assert_allclose(found["log_prob"], expected, atol=1e-5)
    assert np.ptp(expected, 0).min() > 0.01  # a teacher that tells views apart
    np.testing.assert_array_equal(found["log_prob"], again["log_prob"])


def test_the_mean_of_two_teachers(folder, workdir):
    c = make_config(folder, workdir, **{"teacher.ensemble": ("test_live:bright",)})
    data = train.open_data(c)
    batch = read_batch(c, data)
    parts = []
    with program.compiling() as compiler:
        for ensemble in (("test_live:bright",), ()):
            c.teacher.ensemble = ensemble
            teaching = make_teaching(make_teacher(c, data), batch, compiler)
            parts.append(np.asarray(teaching(batch)["log_prob"], np.float64))
    pixels = np.asarray(mix.view_pixels(batch)).round().astype(np.uint8)
    other = log_softmax(bright(pixels) / 2.0).astype(np.float64)
    np.testing.assert_allclose(parts[0], np.log((np.exp(parts[1]) + np.exp(other)) / 2), atol=1e-5)


def test_without_a_teacher_nothing_changes(folder, workdir):
    c = make_config(folder, workdir)
    data = train.open_data(c)
    batch = read_batch(c, data)
    with program.compiling() as compiler:
        idle = make_teaching(None, batch, compiler, wanted=False)
        assert idle(batch) is batch
        assert "log_prob" not in idle.shapes
        needs = memory.Memory(1, 2, 3, 4)
        assert idle.add_memory(needs) == needs
        for teacher, wanted, said in ((None, True, "given none"),
                                      (make_teacher(c, data), False, "given one")):
            with pytest.raises(teachers.TeacherError, match=f"name=live_teacher.*{said}"):
                make_teaching(teacher, batch, compiler, wanted)
    assert live.describe_teacher(None) == {}


def test_the_memory_of_a_teacher_counts(folder, workdir):
    c = make_config(folder, workdir)
    data = train.open_data(c)
    batch, teacher = read_batch(c, data), make_teacher(c, data)
    variables = teacher.programs[0][1]
    own = sum(x.nbytes for x in jax.tree.leaves(variables)) + 4 * batch["image"].size
    with program.compiling() as compiler:
        teaching = make_teaching(teacher, batch, compiler)
        few = teaching.add_memory(memory.Memory(100, 10, 0, 5))
        many = teaching.add_memory(memory.Memory(100, 10, 1 << 40, 5))
    assert few.arguments == many.arguments == 100 + own
    assert few.outputs == 10 + 4 * 8 * 3
    assert 0 < few.temporaries < many.temporaries == 1 << 40  # one program after the other
    c.teacher.batch_size, c.train.batch_size = 2, 8
    with program.compiling() as compiler:
        less = make_teaching(make_teacher(c, data), batch, compiler).add_memory(
            memory.Memory(100, 10, 0, 5))
    assert less.temporaries < few.temporaries


@pytest.mark.parametrize("most", [2, 3, 1])
def test_parts_of_a_batch_say_the_same(folder, workdir, most):
    """A teacher takes no more than teacher.batch_size views at once, nor does a function."""
    c = make_config(folder, workdir)
    data = train.open_data(c)
    batch = read_batch(c, data)
    pixels = mix.view_pixels(batch)
    whole = make_teacher(c, data).log_probs(pixels)
    c.teacher.batch_size = most
    np.testing.assert_allclose(make_teacher(c, data).log_probs(pixels), whole, atol=1e-5)
    c.teacher.update({"name": "test_live:counts", "weights": ""})
    _seen.clear()
    found = make_teacher(c, data).log_probs(pixels)
    assert max(_seen) <= most
    assert sum(_seen) == 8
    c.teacher.update({"name": "test_live:bright", "batch_size": 8})
    np.testing.assert_array_equal(found, make_teacher(c, data).log_probs(pixels))


_seen: list[int] = []


def counts(images):
    _seen.append(len(images))
    return bright(images)


def bright(images):
    """A teacher of a user's own: how red, green and blue an image is."""
    return images.reshape(len(images), -1, 3).mean(1) / 10


def test_a_run_with_accumulation_resumes_to_the_bit_and_keeps_its_teacher(
        folder, workdir, tmp_path, monkeypatch, caplog):
    c = make_config(folder, workdir, **{"train.accumulate": 2})
    before = weights.load_run(workdir).variables
    data = train.open_data(c)
    teacher = make_teacher(c, data)
    with caplog.at_level(logging.INFO):
        unbroken = train.fit(c, tmp_path / "a", data, title="student", teacher=teacher)
    assert "compiled again" not in caplog.text
    assert "compilations" not in unbroken
    with monkeypatch.context() as m:
        tiny.kill_after(m, 3)
        with pytest.raises(tiny.Killed):
            fit(c, tmp_path / "b")
    resumed = fit(c, tmp_path / "b")
    states = [checkpoint.load_variables(tmp_path / x / "checkpoints", 6)[0] for x in "ab"]
    assert_equal(*states)
    assert {k: unbroken[k] for k in ("top1", "top5", "loss")} == {
        k: resumed[k] for k in ("top1", "top5", "loss")}

    # Frozen: neither its arrays nor its folder changed, and no checkpoint holds them.
    assert_equal(before, jax.device_get(teacher.programs[0][1]))
    assert_equal(before, weights.load_run(workdir).variables)
    student = train.make_student(c, data)
    assert jax.tree.map(np.shape, states[0]["params"]) == jax.tree.map(
        lambda x: x.shape, student.variable_shapes()["params"])
    lines = log.read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "accuracy", "agreement", "kl", "teacher_entropy"} <= set(m) for m in lines)
    judge, _ = measure.make_judge(c, student, data.eval, None, meshes.make_mesh())
    expected = train.evaluate.score(judge(states[0]))  # the student alone
    assert {k: unbroken[k] for k in expected} == expected

    other = tmp_path / "other"
    weights.save_trained(weights.load_run(workdir)._replace(mean=(0.3,) * 3), other)
    c.teacher.weights = str(other)
    with pytest.raises(resume.ResumeError, match=r"live_teacher\.mean was \[0\.1, 0\.2, 0\.3\], "
                       r"now \[0\.3"):
        fit(c, tmp_path / "a")
    moved = tmp_path / "moved"
    weights.save_trained(weights.load_run(workdir), moved)
    c.teacher.weights = str(moved)
    assert fit(c, tmp_path / "a") == unbroken


def test_functions_of_one_file_are_two_teachers():
    """Their hash is that of the file."""
    of_a, of_b, model = (teachers.Teacher(None, {"name": name, "weights": "0"}) for name in (
        "own:a", "own:b", "runs/a"))
    assert live.describe_teacher(of_a) != live.describe_teacher(of_b)
    assert live.describe_teacher(model) == {"live_teacher": {"weights": "0"}}
    both = teachers.Teacher(None, {"name": "mean", "members": [
        teacher.description for teacher in (of_a, model)]})
    assert live.describe_teacher(both)["live_teacher"]["members"] == [
        {"name": "own:a", "weights": "0"}, {"weights": "0"}]


class Judge:
    """Answers at once, in place of an evaluation that takes seconds to compile."""

    eval_step = staticmethod(jax.jit(lambda variables, batch: batch))

    def __call__(self, variables):
        return train.evaluate.Judged(*(
            np.zeros(3, np.int32) for _ in train.evaluate.Judged._fields))

    def describe_batch(self):
        return {}


def test_nothing_waits_for_a_teacher_of_ours(folder, workdir, tmp_path, monkeypatch):
    """The host reads no array between two log lines, and each batch has its answers in time."""
    def make_train_step(config, model, schedule, mesh):
        def step(state, batch):
            said = jnp.exp(batch["log_prob"]).sum(-1).mean()
            return (state._replace(step=state.step + 1),
                    {"loss": said, "skipped": state.skipped, "learning_rate": said})

        return jax.jit(step, donate_argnums=0, out_shardings=meshes.replicated(mesh))

    monkeypatch.setattr(train, "make_train_step", make_train_step)
    monkeypatch.setattr(measure, "make_judge", lambda *_: (Judge(), None))
    c = make_config(folder, workdir, **{"log_every": 3, "eval.every_epochs": 2.0,
                                        "checkpoint.every_epochs": 2.0})
    data = train.open_data(c)
    teacher = make_teacher(c, data)
    seen = tiny.watch_reads(monkeypatch)
    train.fit(c, tmp_path, data, teacher=teacher)
    assert seen == {0, 3, 6}  # the first weights; a line; a line and a checkpoint
    lines = log.read_metrics(tmp_path / "metrics.jsonl")
    assert [m["loss"] for m in lines] == pytest.approx([1, 1], abs=1e-5)


def test_a_run_that_does_not_fit_says_what_makes_its_teacher_smaller(folder, workdir, tmp_path,
                                                                     monkeypatch):
    monkeypatch.setattr(train.memory, "find_limit", lambda: 10_000)
    with pytest.raises(memory.OutOfMemory, match=r"teacher\.batch_size=8 .*teacher\.dtype=bfloat16"
                       r".*objective\.name=stored_logits"):
        fit(make_config(folder, workdir), tmp_path)


@pytest.mark.slow
def test_a_whole_run_trains_its_teacher_first(folder, tmp_path, capsys):
    c = tiny.make_config(folder)
    c.objective.update({"name": "live_teacher", "kind": "hard"})
    c.teacher.epochs, c.train.epochs, c.label_only_twin = 1, 1.0, True
    configs.check(c)
    result = recipe.run(c, tmp_path)
    said = capsys.readouterr().out
    for title in ("teacher", "student, distilled", "student, labels only"):
        assert title in said
    assert {"teacher_top1", "student_top1", "label_only_top1"} <= set(result)
    assert json.loads((tmp_path / "config.json").read_text())["live_teacher"]["weights"] == (
        weights.hash_weights(weights.load_run(tmp_path / "teacher").variables))
    assert "live_teacher" not in json.loads((tmp_path / "label_only/config.json").read_text())
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "store").exists()
    assert recipe.run(c, tmp_path) == result  # nothing runs again


def test_a_student_that_cannot_learn_is_told_before_its_teacher_is_trained(folder, tmp_path,
                                                                           monkeypatch):
    monkeypatch.setattr(train, "fit", None)
    c = tiny.make_config(folder)
    c.objective.update({"name": "live_teacher", "alpha": 1.0})
    c.teacher.epochs = 1
    c.model.update(DISTILLED)
    with pytest.raises(ValueError, match=r"objective\.alpha=1\.0 cannot work.*such as 0\.5"):
        recipe.run(c, tmp_path)


def test_the_head_of_a_distillation_token_learns_from_the_teacher(folder, workdir):
    """An update through `make_train_step` moves each head by its own target alone."""
    c = make_config(folder, workdir, **{"objective.alpha": 0.5, "objective.temperature": 1.0,
                                        "train.accumulate": 2, "model.remat": True})
    c.model.update(DISTILLED)
    data = train.open_data(c)
    batch, model, mesh = read_batch(c, data), train.make_student(c, data), meshes.make_mesh()
    log_prob = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 8)).astype(np.float32)

    def update(batch):
        state = meshes.put_state(train.init_state(c, model), mesh)
        step = train.make_train_step(c, model, lambda s: 0.01, mesh)
        return step(state, batch)

    first, metrics = update({**batch, "log_prob": jnp.asarray(log_prob)})
    second, _ = update({**batch, "log_prob": jnp.asarray(log_prob[::-1].copy())})
    np.testing.assert_array_equal(first.params["head"]["kernel"], second.params["head"]["kernel"])
    assert (first.params["head_dist"]["kernel"] != second.params["head_dist"]["kernel"]).any()
    assert set(metrics) >= {"kl", "agreement"}


_ON_DEVICES = """
import sys, jax, test_live
from pathlib import Path
folder, teacher, place, port, process = sys.argv[1:]
if port != "0":
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
c = test_live.make_config(folder, teacher, **{
    "train.epochs": 2.0, "train.batch_size": 16, "train.accumulate": 2, "teacher.shard": True,
    "optim.learning_rate": 1e-3, "teacher.ensemble": ("test_live:bright",),
    "eval.every_epochs": 9.0, "checkpoint.every_epochs": 9.0})
test_live.fit(c, Path(place))
print(jax.process_count(), len(jax.devices()))
"""


def start(devices, *arguments):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", _ON_DEVICES, *map(str, arguments)], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})


@pytest.mark.slow
def test_devices_and_processes_agree(folder, workdir, tmp_path):
    """One device, others, and two processes of two: a model in parts, and a function."""
    port = processes.free_port()
    running = {place: [start(devices, folder, workdir, tmp_path / place, p, i)
                       for i, p in enumerate(ports)]
               for place, devices, ports in (("1", 1, [0]), ("2", 2, [0]), ("4", 4, [0]),
                                             ("2x2", 2, [port, port]))}
    losses = {}
    for place, started in running.items():
        said = [p.communicate(timeout=600) for p in started]
        assert not any(p.returncode for p in started), "\n".join(e[-2000:] for _, e in said)
        assert said[0][0].split()[-2:] == {"2x2": ["2", "4"]}.get(place, ["1", place])
        lines = log.read_metrics(tmp_path / place / "metrics.jsonl")
        assert len(lines) == 4
        losses[place] = np.array([[m[k] for k in ("loss", "kl", "teacher_entropy")]
                                  for m in lines])
    for place in ("2", "4", "2x2"):
        np.testing.assert_allclose(losses[place][0], losses["1"][0], rtol=2e-5)
        np.testing.assert_allclose(losses[place], losses["1"], rtol=1e-3)


def complex_numbers(images):
    return bright(images) * 1j


def raises(images):
    raise KeyError("weights of layer 7")


@pytest.mark.parametrize(("flags", "message"), [
    (["teacher.weights="], "has no weights. Set --config.teacher.weights=WORKDIR_OR_FILE"),
    (["data.source=folder:{other}"], "lacks 1 of the 3 classes of the images: dots; its own 4"),
    (["teacher.weights=", "teacher.name=test_live:complex_numbers"],
     "test_live:complex_numbers gave an array of complex128 of shape (8, 3) for uint8 images"),
    (["teacher.weights=", "teacher.name=test_live:raises"],
     "test_live:raises failed with uint8 images of shape (8, 16, 16, 3): KeyError: 'weights of"),
    (["teacher.weights=", "teacher.name=no_such_module:f"], "No module named 'no_such_module'"),
    (["objective.alpha=2.0"], "--config.objective.alpha=2.0 cannot work"),
])
def test_a_bad_teacher_is_one_paragraph(folder, workdir, tmp_path, flags, message):
    other = tmp_path / "other"
    for name, own in zip(("blobs", "checks", "dots"), tiny.CLASSES, strict=True):
        other.mkdir(exist_ok=True)
        (other / name).symlink_to(folder / own)
    done = subprocess.run(
        [sys.executable, "-m", "tinyvit_jax.main",
         f"--config=tests/test_live.py:{folder},{workdir}", f"--workdir={tmp_path / 'run'}",
         *(f"--config.{flag.format(other=other)}" for flag in flags)], cwd=ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 1, done.stderr
    error = done.stderr[done.stderr.index("error: "):]
    assert message in error
    assert "Traceback" not in done.stderr
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "fit.json").exists()


def get_config(places):
    """For --config=tests/test_live.py:FOLDER,TEACHER."""
    return make_config(*places.split(","))
