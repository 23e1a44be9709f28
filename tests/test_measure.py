"""Weights on a set of images: the report of --mode=eval, however the work is cut."""

import contextlib
import csv
import io
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_images import REAL, make_imagenet

from tinyvit_jax import config as configs
from tinyvit_jax import evaluate, log, measure, models, recipe, report, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.convert import files, tinyvit
from tinyvit_jax.convert.files import WeightsError
from tinyvit_jax.data import augment, images, pipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def random_weights(names, **shape):
    """Weights that tell images apart: no gamma is 0 as it is before training."""
    model = models.create_model("tiny_vit", len(names), 16, stem_strides=(2, 1), **{
        "depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 1, 2, 2),
        "window_sizes": (4, 4, 4, 4), **shape})
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    generator = np.random.default_rng(3)

    def draw(path, x):
        fan_in = max(1, np.prod(x.shape[:-1]))
        scale = {"kernel": 2 * fan_in ** -0.5, "scale": 0.0}.get(path[-1].key, 0.1)
        return (generator.normal(size=x.shape) * scale + (
            path[-1].key in ("scale", "var"))).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return weights.Trained(model, variables, tuple(names), weights.IMAGENET_MEAN,
                           weights.IMAGENET_STD, "center", 1.0)


@pytest.fixture(scope="module")
def seen(folder):
    """The images as the model sees them, and their labels."""
    source = images.open_source(f"folder:{folder}", "train")
    batch = pipeline.EvalBatches(source, lambda x: augment.eval_view(x, 16, "center", 1.0), 33,
                                 pipeline.Rows(0, 33))[0]
    pixels = (batch["image"] / 255 - weights.IMAGENET_MEAN) / weights.IMAGENET_STD
    return pixels.astype(np.float32), batch["label"]


@pytest.fixture(scope="module")
def made_run(seen, tmp_path_factory):
    """A workdir as a run leaves it, its classes in another order than the images', and logits."""
    trained = random_weights(tiny.CLASSES[::-1])
    logits = np.asarray(jax.jit(trained.model.apply)(trained.variables, seen[0]))
    trained.variables["params"]["head"]["bias"] -= logits.mean(0)  # no class wins always
    path = tmp_path_factory.mktemp("run")
    weights.save_trained(trained, path)
    return path, (logits - logits.mean(0))[:, ::-1]


@pytest.fixture(scope="module")
def workdir(made_run):
    return made_run[0]


@pytest.fixture(scope="module")
def measured(folder, workdir):
    """The report of the run, and what the command printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        made = recipe.run_eval(make_config(folder), workdir)
    return made, said.getvalue()


def make_config(folder, **changes):
    c = tiny.make_config(folder)
    c.data.eval_split = "train"
    c.model.image_size = 0
    c.update_from_flattened_dict(changes)
    return c


def test_a_report_holds_what_the_model_says(folder, made_run, seen, measured):
    (workdir, logits), (made, said) = made_run, measured
    place = workdir / "eval" / f"{folder.name}-train"
    assert json.loads((workdir / "eval.json").read_text()) == made
    assert json.loads((place / "report.json").read_text()) == made
    assert (place / "report.png").stat().st_size > 10_000
    labels, predicted = seen[1], logits.argmax(-1)
    right = predicted == labels
    assert np.bincount(predicted).min() > 2  # the model tells images apart
    assert made["top1"] == pytest.approx(100 * right.mean(), abs=1e-9)
    assert made["count"] == 33
    assert made["weights"] == {"path": str(workdir), "checkpoint": "last", "step": 0,
                               "sha256": weights.hash_weights(
                                   weights.load_run(workdir).variables)}
    assert (made["source"], made["split"], made["image_size"]) == (f"folder:{folder}", "train", 16)
    matrix = np.array([line[1:] for line in csv.reader(
        (place / "confusion.csv").open(newline=""))][1:], int)
    expected = np.zeros((3, 4), int)
    np.add.at(expected, (labels, predicted), 1)
    np.testing.assert_array_equal(matrix, expected)
    assert f"top-1 {made['top1']:.2f} %" in said
    assert f"{place}/report.json" in said


def test_a_file_is_measured_as_its_run_is(folder, workdir, measured, tmp_path, caplog,
                                            monkeypatch):
    file, names = tmp_path / "weights.safetensors", tmp_path / "names.txt"
    files.write_state(str(file), tinyvit.to_torch(weights.load_run(workdir).variables,
                                                  layout="microsoft"))
    names.write_text("\n".join(tiny.CLASSES[::-1]))
    own, _ = measured
    changes = {"model.init_from": str(file), "model.image_size": 16}
    made = recipe.run_eval(make_config(folder, **changes, **{"model.class_names": str(names)}),
                           tmp_path / "new")
    same = ("top1", "top5", "loss", "count", "per_class", "calibration", "most_confused",
            "image_size", "classes")
    assert {k: made[k] for k in same} == {k: own[k] for k in same}
    assert made["weights"] == {"path": str(file), "sha256": own["weights"]["sha256"]}
    trained, _ = measure.open_weights(make_config(folder, **changes), tmp_path / "none", ())
    source = images.open_source(f"folder:{folder}", "train")
    monkeypatch.setattr(log.logger, "propagate", True)
    with caplog.at_level(logging.INFO):
        assert measure.match_classes(trained, source) is None
    assert "no class names: their 3 classes are taken in the order of folder:" in caplog.text


def test_neither_a_run_nor_weights(folder, tmp_path):
    with pytest.raises(WeightsError, match=r"model\.json is missing.*--config\.model\.init_from="):
        recipe.run_eval(make_config(folder), tmp_path)


def test_a_size_that_was_not_trained_is_said(folder, workdir, tmp_path, monkeypatch):
    """The figures of a model that is resized, without running it."""
    seen = []

    def judge(variables, title=""):
        seen.append(variables["params"])
        rank = np.arange(33) % 2
        return evaluate.Judged(np.arange(33) % 3, (np.arange(33) + rank) % 3, rank + 0.5, rank,
                               rank * 1.0)

    monkeypatch.setattr(measure, "make_judge", lambda *arguments: (judge, None))
    config = make_config(folder, **{"model.image_size": 32, "model.init_from": str(workdir),
                                    "eval.crop": "square", "data.eval_split": "eval"})
    made = measure.run(config, tmp_path, images.open_source(f"folder:{folder}", "eval"))
    assert (made["trained_image_size"], made["image_size"]) == (16, 32)
    assert made["top1"] == pytest.approx(100 * 17 / 33)
    assert (tmp_path / "eval" / f"{folder.name}-32px-square" / "report.json").exists()
    larger = models.create_model("tiny_vit", 3, 32, stem_strides=(2, 1), depths=(1, 1, 1, 1),
                                 embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2),
                                 window_sizes=(8, 8, 8, 8))
    jax.tree.map(np.testing.assert_array_equal, seen[0],
                 weights.load_weights(workdir, larger)["params"])


def test_a_run_keeps_its_size_but_for_eval_image_size(folder, workdir, tmp_path, caplog):
    def choose(workdir, **changes):
        return measure._choose_size(make_config(folder, **changes), workdir, 16)

    with caplog.at_level(logging.INFO):
        assert choose(workdir, **{"model.image_size": 16}) == 0
        assert not caplog.text
        assert choose(workdir, **{"model.image_size": 32}) == 0
    assert "--config.eval.image_size=32 would do that" in caplog.text
    assert choose(workdir, **{"model.image_size": 32, "eval.image_size": 24}) == 24
    assert choose(tmp_path, **{"model.image_size": 32}) == 32
    assert choose(tmp_path, **{"model.image_size": 0}) == 0


def test_a_file_that_does_not_tell_its_size_is_taken_at_the_asked_one(folder, tmp_path):
    trained = random_weights(tiny.CLASSES)
    file = tmp_path / "w.safetensors"
    files.write_state(str(file), tinyvit.to_torch(trained.variables, layout="timm"))
    found, origin = measure.open_weights(
        make_config(folder, **{"model.init_from": str(file), "model.image_size": 16}), tmp_path, ())
    assert (found.model.image_size, found.model.window_sizes) == (16, (4, 4, 4, 4))
    assert origin == {"path": str(file), "sha256": weights.hash_weights(trained.variables)}


class Table:
    """Logits of 1,000 classes by the level of a uniform image."""

    image_size = 6

    def __init__(self, best):
        self.table = jnp.asarray(np.eye(1000)[best] * 5 + np.linspace(0, 1, 1000), jnp.float32)

    def apply(self, variables, pixels, train):
        return self.table[jnp.round(pixels[:, 0, 0, 0] * 255).astype(int)]


def judge_table(source, best, **changes):
    c = configs.default()
    c.data.mean, c.data.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    c.eval.batch_size, c.eval.crop, c.data.threads = 3, "square", 1
    c.update_from_flattened_dict(changes)
    judge, competing = measure.make_judge(c, Table(best), source, None, meshes.make_mesh())
    return *report.keep_scored(judge({}), source.class_names, competing), judge({})


def test_imagenet_real(tmp_path):
    make_imagenet(tmp_path, "imagenet2012_real", "validation", [
        {"original_label": own, "real_label": several} for several, own in REAL])
    source = images.open_source("tfds:imagenet2012_real", "eval", str(tmp_path))
    # right; without a label; right by the label that it did not come with; wrong
    kept, names, judged = judge_table(source, [3, 5, 999, 7])
    assert len(names) == 1000
    assert len(judged.label) - len(kept.label) == 1
    scores = evaluate.score(judged)
    assert scores["count"] == 3
    assert scores["top1"] == pytest.approx(200 / 3)
    assert report.make_report(kept, names)["most_confused"] == [
        {"label": names[8], "predicted": names[7], "count": 1, "share": 1.0}]


def test_imagenet_a_is_scored_over_the_classes_it_shows(tmp_path):
    make_imagenet(tmp_path, "imagenet_a", "test", [{"label": i} for i in (2, 4, 4)], "0.1.0")
    source = images.open_source("tfds:imagenet_a", "eval", str(tmp_path))
    best = [2, 900, 4]  # where 900 does not compete, 4 is the best of the others
    kept, names, judged = judge_table(source, best)
    assert names == (source.class_names[2], source.class_names[4])
    assert evaluate.score(judged)["top1"] == 100
    assert report.count_confusion(kept)[2].tolist() == [1, 2]
    kept, names, judged = judge_table(source, best, **{"eval.classes": "all"})
    assert len(names) == 1000
    assert evaluate.score(judged)["top1"] == pytest.approx(200 / 3)


_ONE_OF_TWO = """
import sys, tiny, jax
from pathlib import Path
from tinyvit_jax import recipe
folder, run, workdir, port, process = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
c = tiny.make_config(folder)
c.data.eval_split, c.eval.batch_size, c.model.init_from = "train", 20, run
made = recipe.run_eval(c, Path(workdir))
print(jax.process_count(), jax.device_count(), made["top1"])
"""


def test_batches_devices_and_processes_change_nothing(folder, workdir, measured, tmp_path):
    """Four devices of two processes over loopback against the one device of this process."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": (
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2")}
    both = [subprocess.Popen(
        [sys.executable, "-c", _ONE_OF_TWO, folder, workdir, tmp_path / "four", str(port), str(i)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for i in range(2)]
    alone, _ = measured
    out = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], out[0][1][-2000:] + out[1][1][-2000:]
    assert [text.splitlines()[-1] for text, _ in out] == [f"2 4 {alone['top1']}"] * 2
    assert "report:" not in out[1][0]  # the first process alone writes and speaks
    tables = [(w / "eval" / f"{folder.name}-train" / "confusion.csv").read_text()
              for w in (workdir, tmp_path / "four")]
    assert tables[0] == tables[1]
    made = json.loads((tmp_path / "four" / "eval.json").read_text())
    assert made["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert made["calibration"]["error"] == pytest.approx(alone["calibration"]["error"], rel=1e-4)
    for key in ("count", "top1", "top5", "per_class", "most_confused", "top1_interval"):
        assert made[key] == alone[key], key
