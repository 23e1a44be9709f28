"""The conversion tool as typed: what it writes, that PyTorch agrees, and what it refuses."""

import sys

import convert_checkpoint
import jax
import numpy as np
import pytest
import tiny

from tinyvit_jax import weights
from tinyvit_jax.convert import files, tinyvit
from tinyvit_jax.models import create_model

SHAPE = {"embed_dims": (8, 8, 16, 24), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 3),
         "window_sizes": (4, 4, 3, 2)}


@pytest.fixture(scope="module")
def trained():
    model = create_model("tiny_vit", 3, 32, **SHAPE)
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return noise / np.float32(np.prod(leaf.shape[:-1]) ** 0.5)
        return np.exp(0.3 * noise) if path[-1].key in ("scale", "var") else 0.3 * noise

    variables = jax.tree_util.tree_map_with_path(draw, model.variable_shapes())
    return weights.Trained(model, variables, tiny.CLASSES, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0),
                           "square", 0.9)


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the tool; gives what it printed, or its error."""
    monkeypatch.setattr(convert_checkpoint.log, "set_up_logging", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
        try:
            convert_checkpoint.main()
        except SystemExit as stop:
            message = stop.code  # Python prints a text and exits with 1
            assert "\n" not in message
            return message
        return capsys.readouterr().out.splitlines()

    return call


@pytest.fixture
def folder(trained, tmp_path):
    weights.save_trained(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.torch
@pytest.mark.parametrize("layout", ["microsoft", "timm"])
def test_out_and_back_with_the_check(run, folder, tmp_path, trained, layout):
    pytest.importorskip("torch")
    file, again = tmp_path / "w.pth", tmp_path / "again"
    done = run(f"--from={folder}", f"--to={file}", f"--layout={layout}", "--image_size=32")
    assert "arrays in" in done[0]
    assert done[1].startswith("checked: in PyTorch w.pth gives the same outputs, largest diff")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(tiny.CLASSES))
    done = run(f"--from={file}", f"--to={again}", "--image_size=32", f"--classes={names}")
    assert done[1].startswith("checked: in PyTorch w.pth")
    found = weights.load_run(again)
    assert found.class_names == tiny.CLASSES
    jax.tree.map(np.testing.assert_array_equal, found.variables, trained.variables)
    assert "already exists" in run(f"--from={folder}", f"--to={file}")


@pytest.mark.torch
def test_a_difference_is_an_error(run, trained, tmp_path, monkeypatch):
    """Were one tensor transposed on the way out, its shape would not tell."""
    pytest.importorskip("torch")
    convert_to = weights.convert_to

    def wrong(model, variables, layout="microsoft"):
        state = convert_to(model, variables, layout)
        return state | {"layers.3.blocks.0.attn.proj.weight":
                        state["layers.3.blocks.0.attn.proj.weight"].T.copy()}

    monkeypatch.setattr(convert_checkpoint.weights, "open_trained", lambda *_: trained)
    monkeypatch.setattr(weights, "convert_to", wrong)
    error = run("--from=run", f"--to={tmp_path / 'w.pth'}", "--image_size=32")
    assert "w.pth does not give the same outputs in PyTorch" in error


@pytest.mark.torch
def test_strict_loading_finds_a_missing_key(run, trained, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    convert_to = weights.convert_to

    def wrong(model, variables, layout="microsoft"):
        state = convert_to(model, variables, layout)
        del state["patch_embed.seq.0.bn.weight"]
        return state

    monkeypatch.setattr(convert_checkpoint.weights, "open_trained", lambda *_: trained)
    monkeypatch.setattr(weights, "convert_to", wrong)
    error = run("--from=run", f"--to={tmp_path / 'w.pth'}")
    assert "patch_embed.seq.0.bn.weight" in error


@pytest.mark.torch
def test_a_segmentation_models_file(run, trained, tmp_path):
    torch = pytest.importorskip("torch")
    state = {f"image_encoder.{key}": torch.tensor(value)
             for key, value in tinyvit.to_torch(trained.variables).items()}
    torch.save(state | {"mask_decoder.x": torch.ones(2)}, tmp_path / "sam.pt")
    done = run(f"--from={tmp_path / 'sam.pt'}", f"--to={tmp_path / 'trunk'}", "--image_size=32")
    assert done[1].startswith("checked: in PyTorch sam.pt")
    assert weights.load_run(tmp_path / "trunk").model.num_classes == 0


def test_without_torch_the_check_is_said_to_be_missing(run, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    done = run(f"--from={folder}", f"--to={tmp_path / 'w.safetensors'}")
    assert done[1].startswith("not checked")
    assert "pip install torch" in done[1]


@pytest.mark.torch
def test_a_file_with_more_than_tensors(run, trained, tmp_path):
    torch = pytest.importorskip("torch")

    class Settings(dict):
        pass

    Settings.__module__, Settings.__qualname__ = __name__, "Settings"
    globals()["Settings"] = Settings
    state = {key: torch.tensor(value) for key, value in tinyvit.to_torch(trained.variables).items()}
    source, target = tmp_path / "w.pth", tmp_path / "w.safetensors"
    torch.save({"model": state, "config": Settings(a=1)}, source)
    error = run(f"--from={source}", f"--to={tmp_path / 'run'}")
    assert "test_convert_checkpoint.Settings" in error
    assert f"--from={source} --to={target} --tensors_only" in error
    assert not (tmp_path / "run").exists()
    assert f"the {len(state)} tensors" in run(f"--from={source}", f"--to={target}",
                                              "--tensors_only")[0]
    found = tinyvit.from_torch(files.read_state(target), trained.model)
    jax.tree.map(np.testing.assert_array_equal, found, trained.variables)


def test_all_that_does_not_fit_is_listed(run, trained, tmp_path):
    state = tinyvit.to_torch(trained.variables)
    del state["norm_head.bias"], state["layers.1.blocks.0.mlp.fc1.bias"]
    state["layers.9.extra"] = np.zeros(2, np.float32)
    state["layers.1.blocks.0.mlp.fc2.weight"] = np.zeros((3, 3), np.float32)
    files.write_state(tmp_path / "w.safetensors", state)
    error = run(f"--from={tmp_path / 'w.safetensors'}", f"--to={tmp_path / 'run'}")
    for words in ("missing: norm_head.bias", "missing: layers.1.blocks.0.mlp.fc1.bias",
                  "unused: layers.9.extra (2,)", "mis-shaped: layers.1.blocks.0.mlp.fc2.weight"):
        assert words in error


def test_names_that_do_not_fit(run, trained, tmp_path):
    files.write_state(tmp_path / "w.safetensors", tinyvit.to_torch(trained.variables))
    (tmp_path / "names.txt").write_text("a\nb\n")
    error = run(f"--from={tmp_path / 'w.safetensors'}", f"--to={tmp_path / 'run'}",
                f"--classes={tmp_path / 'names.txt'}")
    assert "3 classes, and 2 names" in error
    (tmp_path / "list.txt").write_text("\n".join(map(str, range(5, 1005))))
    error = run(f"--from={tmp_path / 'w.safetensors'}", f"--to={tmp_path / 'run'}",
                f"--classes={tmp_path / 'list.txt'}")
    assert "3 classes, and 21841 names" in error
