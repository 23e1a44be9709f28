"""The commands as a user types them: a whole distillation, killed and resumed, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import convert_checkpoint
import jax
import predict
import pytest
import tiny

from tinyvit_jax import config as configs
from tinyvit_jax import log, mix, recipe, weights
from tinyvit_jax.data import augment, ops

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "tiny.py"
FIGURES = ("teacher_top1", "student_top1", "label_only_top1", "loss", "store_bytes_per_view")


def command(*arguments, tool="-m tinyvit_jax.main"):
    return [sys.executable, *tool.split(), *map(str, arguments)]


def run(*arguments, tool="-m tinyvit_jax.main", code=0, **options):
    done = subprocess.run(command(*arguments, tool=tool), cwd=ROOT, capture_output=True, text=True,
                          env=environment(), **options)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def flags(folder, workdir):
    return (f"--config={CONFIG}:{folder}", f"--workdir={workdir}",
            "--config.label_only_twin=True", "--config.export_torch=student.safetensors")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*flags(folder, workdir))
    return workdir, done


def test_one_command_from_images_to_an_exported_student(finished):
    workdir, done = finished
    result = json.loads((workdir / "result.json").read_text())
    assert {*FIGURES, "seconds", "export"} <= set(result)
    assert 0 <= result["student_top1"] <= 100
    assert result["store_bytes_per_view"] > 0
    for name in ("curves.png", "views.png", "config.json", "model.json", "student.safetensors"):
        assert (workdir / name).stat().st_size > 500, name
    for title in ("teacher", "student, distilled", "student, labels only", "bytes a view"):
        assert title in done.stdout
    lines = log.read_metrics(workdir / "metrics.jsonl")
    assert {"loss", "accuracy", "agreement", "learning_rate", "gradient_norm", "data_wait",
            "images_per_second"} <= set(lines[0])
    assert "capture: 6 of 6 shards" in done.stderr
    assert "student 8/8" in done.stderr


@pytest.mark.slow
def test_killed_three_times_gives_the_same_figures(folder, finished, tmp_path):
    """kill -9 while the teacher trains, while its logits are captured, while the student trains."""
    workdir, signs = tmp_path / "killed", ("teacher/metrics.jsonl", "store/pass-00000/*.json",
                                           "metrics.jsonl")
    for sign in signs:
        process = subprocess.Popen(command(*flags(folder, workdir)), cwd=ROOT, env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any(
                p.stat().st_size for p in workdir.glob(sign)):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (workdir / "result.json").exists()
    run(*flags(folder, workdir))
    results = [json.loads((w / "result.json").read_text()) for w in (finished[0], workdir)]
    assert {k: results[0][k] for k in FIGURES} == {k: results[1][k] for k in FIGURES}


def test_a_teachers_config_has_nothing_of_the_students():
    """But the images, the views, and what saves memory."""
    c = configs.default()
    c.model.update({"trainable": "head", "init_from": "x", "class_names": "y", "dropout": 0.1,
                    "drop_path": 0.2, "remat": True, "patch_size": 4, "freeze_norm": True,
                    "dtype": "bfloat16", "group_width": 8})
    c.optim.layer_decay, c.objective.temperature = 0.8, 3.0
    c.teacher.update({"name": "resnet18", "learning_rate": 0.3, "block": "padded", "epochs": 2})
    found, plain = recipe.teacher_config(c), configs.default()
    configs.check(found)
    assert found.model.to_dict() == {**plain.model.to_dict(), "name": "resnet18", "remat": True,
                                     "block": "padded"}
    assert (found.optim.layer_decay, found.optim.learning_rate) == (1.0, 0.3)
    assert (found.objective.temperature, found.train.epochs) == (1.0, 2.0)


def test_a_finished_run_is_not_run_again(folder, finished):
    workdir, _ = finished
    before = (workdir / "result.json").read_text()
    done = run(*flags(folder, workdir))
    assert "left" not in done.stderr
    assert json.loads((workdir / "result.json").read_text()) == json.loads(before)


def test_evaluate_predict_convert_and_check(folder, finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished

    def call(tool, *arguments):
        monkeypatch.setattr(tool.log, "set_up_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        tool.main()
        return capsys.readouterr().out

    result = json.loads((workdir / "result.json").read_text())
    done = run(f"--config={CONFIG}:{folder}", f"--workdir={workdir}", "--mode=eval")
    scores = json.loads((workdir / "eval.json").read_text())
    assert f"top-1 {scores['top1']:.2f} %" in done.stdout
    assert {k: scores[k] for k in ("top1", "top5", "loss")} == {
        k: result[k] for k in ("top1", "top5", "loss")}
    image = next((folder / "stripes").glob("*.jpg"))
    ours = call(predict, f"--weights={workdir}", image)
    trained = weights.load_run(workdir)
    pixels = augment.eval_view(ops.decode(image.read_bytes(), "it"), 16, "center", 1.0)
    logits = jax.jit(trained.model.apply)(trained.variables, mix.normalize(
        pixels[None], trained.mean, trained.std))
    first = ours.splitlines()[1].split()
    assert first[1] == tiny.CLASSES[int(logits.argmax())]
    assert float(first[0].rstrip("%")) == pytest.approx(100 * float(jax.nn.softmax(logits).max()),
                                                        abs=0.02)
    timm = tmp_path / "timm.safetensors"
    call(convert_checkpoint, f"--from={workdir}", f"--to={timm}", "--layout=timm")
    again = tmp_path / "again"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(tiny.CLASSES) + "\n")
    call(convert_checkpoint, f"--from={timm}", f"--to={again}", "--image_size=16",
         "--stem_strides", "2", "1", f"--classes={names}")
    back = tmp_path / "back.safetensors"
    call(convert_checkpoint, f"--from={again}", f"--to={back}")
    assert back.read_bytes() == (workdir / "student.safetensors").read_bytes()
    checked = run(f"--config={CONFIG}:{folder}", f"--workdir={workdir}",
                  tool="tools/check_store.py")
    assert "store is good" in checked.stdout


def test_fine_tuning_in_one_command(folder, finished, tmp_path):
    """From the exported PyTorch file, at another size, to other classes of the same images."""
    names = tmp_path / "names.txt"
    names.write_text("blobs\nstripes\nwaves\n")  # two of the three classes go by name
    done = run("--config=configs/finetune.py:frozen", f"--workdir={tmp_path / 'run'}",
               f"--config.data.source=folder:{folder}",
               f"--config.model.init_from={finished[0] / 'student.safetensors'}",
               f"--config.model.class_names={names}", "--config.model.image_size=24",
               "--config.model.stem_strides=(2,1)", "--config.model.window_sizes=(6,6,6,6)",
               "--config.train.batch_size=8", "--config.train.epochs=1", "--config.data.threads=2")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert {"top1", "top5", "top1_before", "top5_before"} <= set(result)
    assert "before training" in done.stdout
    assert "resized 3 tables of attention biases to windows of 6, 6, 6 tokens" in done.stderr
    assert "The classifier has 2 of 3 classes by name" in done.stderr
    before, after = (weights.load_run(path).variables["params"] for path in (
        finished[0], tmp_path / "run"))
    assert before.keys() == after.keys()
    same = jax.tree.map(lambda a, b: a.shape == b.shape and bool((a == b).all()), before, after)
    assert all(jax.tree.leaves(same["patch_embed"]))
    assert not any(jax.tree.leaves(same["head"]))


def test_estimate_says_what_a_capture_takes(folder, tmp_path):
    done = run(f"--config={CONFIG}:{folder}", f"--workdir={tmp_path}", "--estimate",
               tool="tools/save_logits.py")
    assert "68 views (2 passes over 33 images)" in done.stdout
    assert "bytes free" in done.stdout
    assert not (tmp_path / "store").exists()


def test_a_store_that_lacks_passes_names_the_command(folder, finished):
    workdir, _ = finished
    done = run(f"--config={CONFIG}:{folder}", f"--workdir={workdir.parent / 'new'}",
               f"--config.store.path={workdir / 'store'}", "--config.store.passes=3",
               "--config.store.capture=False", code=1)
    assert "python tools/save_logits.py" in done.stderr
    assert "passes" in done.stderr


def damaged_checkpoint(folder, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "w", ignore=shutil.ignore_patterns("result.json"))
    for file in (tmp_path / "w" / "checkpoints").rglob("*.ocdbt"):
        file.write_bytes(file.read_bytes()[:30])
    return [f"--config={CONFIG}:{folder}", f"--workdir={tmp_path / 'w'}", "--mode=eval"]


def another_model(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{folder}", f"--workdir={tmp_path}",
            f"--config.model.init_from={finished[0]}", "--config.model.embed_dims=(8, 8, 8, 8)",
            "--config.objective.name=supervised"]


def truncated_weights(folder, finished, tmp_path):
    file = tmp_path / "cut.safetensors"
    file.write_bytes((finished[0] / "student.safetensors").read_bytes()[:1000])
    return [f"--config={CONFIG}:{folder}", f"--workdir={tmp_path}",
            f"--config.teacher.weights={file}"]


def unreadable_image(folder, finished, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "images")
    (broken / "checks" / "000.jpg").write_bytes(b"no picture")
    return [f"--config={CONFIG}:{broken}", f"--workdir={tmp_path / 'w'}"]


def one_class(folder, finished, tmp_path):
    shutil.copytree(folder / "checks", tmp_path / "images" / "checks")
    return [f"--config={CONFIG}:{tmp_path / 'images'}", f"--workdir={tmp_path / 'w'}"]


def empty_folder(folder, finished, tmp_path):
    (tmp_path / "images").mkdir()
    return [f"--config={CONFIG}:{tmp_path / 'images'}", f"--workdir={tmp_path / 'w'}"]


def missing_folder(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{tmp_path / 'nowhere'}", f"--workdir={tmp_path / 'w'}"]


def unknown_key(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{folder}", "--config.train.bach_size=8"]


def unknown_argument(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{folder}", "train.batch_size=8"]


def missing_config(folder, finished, tmp_path):
    return ["--config=configs/nowhere.py"]


def no_such_stage(folder, finished, tmp_path):
    return ["--config=configs/21m.py:9k"]


def not_a_number(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{folder}", "--config.train.batch_size=many"]


def wrong_k(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{folder}", f"--workdir={tmp_path}", "--config.store.top_k=3",
            f"--config.store.path={finished[0] / 'store'}", "--config.store.capture=False"]


def other_image_size(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{folder}", f"--workdir={tmp_path}", "--config.model.image_size=24",
            f"--config.store.path={finished[0] / 'store'}", "--config.store.capture=False"]


def other_config(folder, finished, tmp_path):
    return [f"--config={CONFIG}:{folder}", f"--workdir={finished[0]}", "--config.seed=9"]


@pytest.mark.parametrize(("case", "message"), [
    (damaged_checkpoint, "is damaged"), (another_model, "of another model"),
    (truncated_weights, "cut.safetensors"), (unreadable_image, "checks/000.jpg"),
    (one_class, "class"), (empty_folder, "images"), (missing_folder, "nowhere"),
    (unknown_key, "bach_size"), (unknown_argument, "--config.section.key=value"),
    (missing_config, "nowhere.py"), (no_such_stage, "22k_distill, 22kto1k"),
    (not_a_number, "batch_size=many"), (wrong_k, "top_k"), (other_image_size, "image_size"),
    (other_config, "another --workdir"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_bad_input_is_one_paragraph(case, message, folder, finished, tmp_path):
    done = run(*case(folder, finished, tmp_path), code=1)
    error = done.stderr[done.stderr.index("error: "):]
    assert message in error
    if case is not damaged_checkpoint:  # tensorstore's threads write there before we can
        assert "Traceback" not in done.stderr
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("name", ["5m", "11m", "21m"])
def test_a_recipe_without_data_fails_fast_and_says_what_to_run(name, tmp_path):
    began = time.monotonic()
    done = run(f"--config=configs/{name}.py", f"--workdir={tmp_path}", code=1)
    assert time.monotonic() - began < 10
    for step in ("tools/pack_images.py", "tfds build imagenet2012",
                 f"tools/save_logits.py --config=configs/{name}.py --workdir={tmp_path}"):
        assert step in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_from_labels_needs_no_store(tmp_path):
    done = run("--config=configs/21m.py:1k", f"--workdir={tmp_path}", code=1)
    assert "tfds build imagenet2012 --file_format=array_record" in done.stderr
    assert "save_logits" not in done.stderr
