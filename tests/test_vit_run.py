"""A plain vision transformer through the ordinary recipe and the tools: train, measure, convert."""

import json
import sys

import convert_checkpoint
import jax
import numpy as np
import predict
import pytest
import tiny

from tinyvit_jax import benchmark, log, recipe, train, weights
from tinyvit_jax import config as configs
from tinyvit_jax.convert import files
from tinyvit_jax.models import create_model

SHAPE = {"name": "vit", "image_size": 16, "patch_size": 4, "embed_dims": (32,), "depths": (1,),
         "num_heads": (4,), "token_layout": "distilled", "window_sizes": (), "stem_strides": ()}


def make_config(folder, **model):
    c = tiny.make_config(folder)
    c.model.update({**SHAPE, "drop_path": 0.0, "dropout": 0.1, **model})
    c.objective.name = "supervised"
    c.train.epochs = 3.0
    c.optim.update({"learning_rate": 0.05, "layer_decay": 0.9})
    c.eval.every_epochs = c.checkpoint.every_epochs = 3.0
    c.export_torch = "student.safetensors"
    configs.check(c)
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "vit"
    return workdir, recipe.run(make_config(folder), workdir)


def test_a_run_learns_and_exports(finished):
    workdir, result = finished
    losses = [line["loss"] for line in log.read_metrics(workdir / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    state, notes = files.read_described(workdir / "student.safetensors")
    assert notes == {"num_heads": "4"}
    assert state["dist_token"].shape == (1, 1, 32)
    card = json.loads((workdir / "model.json").read_text())["model"]
    assert card["token_layout"] == "distilled"
    model = create_model(card.pop("name"), **card)
    assert model == weights.load_run(workdir).model
    assert result["parameters"] == sum(x.size for x in jax.tree.leaves(
        model.variable_shapes()["params"]))


def test_evaluation_of_the_run_and_of_its_file(folder, finished, tmp_path):
    workdir, result = finished
    own = recipe.run_eval(make_config(folder), workdir)
    assert own["top1"] == pytest.approx(result["top1"])
    c = make_config(folder, name="", init_from=str(workdir / "student.safetensors"), num_heads=())
    again = recipe.run_eval(c, tmp_path / "eval")
    assert {k: again[k] for k in ("top1", "loss")} == pytest.approx(
        {k: own[k] for k in ("top1", "loss")})


def test_the_tools(folder, finished, tmp_path, monkeypatch, capsys):
    workdir, _ = finished
    for module, arguments in (
            (convert_checkpoint, (f"--from={workdir}", f"--to={tmp_path / 'w.pth'}")),
            (convert_checkpoint, (f"--from={tmp_path / 'w.pth'}", f"--to={tmp_path / 'again'}")),
            (convert_checkpoint, (f"--from={workdir / 'student.safetensors'}",
                                  f"--to={tmp_path / 'b.safetensors'}", "--num_heads=2")),
            (predict, (f"--weights={workdir}", next((folder / "stripes").glob("*.jpg"))))):
        monkeypatch.setattr(module.log, "set_up_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["tool", *map(str, arguments)])
        pytest.importorskip("torch")
        module.main()
    said = capsys.readouterr().out
    assert said.count("gives the same outputs") == 4
    assert any(name in said for name in tiny.CLASSES)
    before, after = (weights.load_run(run) for run in (workdir, tmp_path / "again"))
    assert after.model == before.model
    jax.tree.map(np.testing.assert_array_equal, after.variables, before.variables)
    assert weights.open_trained(tmp_path / "b.safetensors").model.num_heads == (2,)


def test_benchmark(tmp_path):
    c = configs.default()
    c.model.update({**SHAPE, "num_classes": 3})
    c.benchmark.update({"batch_sizes": (2,), "dtypes": ("bfloat16",), "seconds": 0.01})
    result = benchmark.run(c, tmp_path)
    assert result["rows"][0]["images_per_second"] > 0
    assert result["macs"] > 0


@pytest.mark.parametrize(("changes", "message"), [
    ({"image_size": 18}, "multiple of patch_size=4, such as 16 or 20"),
    ({"patch_size": 32}, "images of 16 pixels are smaller than one patch of 32"),
    ({"window_sizes": (4,)}, "no such setting as window_sizes"),
    ({"name": "tiny_vit_5m_224", "embed_dims": (), "depths": (), "num_heads": ()},
     "no such setting as patch_size=4, token_layout=distilled, dropout=0.1"),
])
def test_a_config_that_cannot_work(folder, changes, message):
    c = make_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        train.make_student(c, train.open_data(c))


def test_dropout_of_the_config_and_of_the_variant(folder):
    c = make_config(folder)
    data = train.open_data(c)
    c.model.update({key: type(c.model[key])() for key in SHAPE})
    c.model.name = "vit_mini_patch4_32"
    for given, expected in ((-1.0, 0.1), (0.0, 0.0), (0.3, 0.3)):
        c.model.dropout = given
        configs.check(c)
        assert train.make_student(c, data).dropout == expected
    c.model.dropout = -0.5
    with pytest.raises(configs.ConfigError, match="-1 for the variant's own"):
        configs.check(c)
