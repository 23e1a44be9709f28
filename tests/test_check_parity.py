"""The parity tool: what it measures, that it sees a difference, and its exit code."""

import json

import numpy as np
import pytest

from tinyvit_jax.models import create_model

pytestmark = pytest.mark.torch
pytest.importorskip("torch")
check_parity = pytest.importorskip("check_parity")
compare, originals, torch_tinyvit = (
    check_parity.compare, check_parity.originals, check_parity.torch_tinyvit)

KINDS = ("microsoft", "bare", "safetensors", "timm", "trunk")


@pytest.fixture(scope="module")
def small():
    """A model at the widths of the 5M, and a PyTorch model of the same weights."""
    model = create_model("tiny_vit_5m_224", 10, 32, depths=(1, 1, 1, 1))
    module = torch_tinyvit.randomize(torch_tinyvit.TorchTinyViT(model))
    return model, module, torch_tinyvit.variables_of(module)


def test_every_kind_of_file_of_a_variant(monkeypatch):
    """At the variant's widths; one block a stage and small images are what a test has time for."""
    make = check_parity.tinyvit_jax.create_model
    monkeypatch.setattr(check_parity.tinyvit_jax, "create_model",
                        lambda *args: make(*args, depths=(1, 1, 1, 1)))
    row = check_parity.measure("tiny_vit_5m_224", "", timm=False, image_size=32)
    assert max(row[kind] for kind in KINDS) <= compare.TOLERANCE
    assert 0 < row["layer_relative"] <= compare.LAYER_TOLERANCE
    names = [layer["name"] for layer in row["layers"]]
    assert names == ["patch_embed", *(name for s, depth in enumerate((1, 1, 1, 1)) for name in (
        *(f"layers.{s}.blocks.{i}" for i in range(depth)), f"layers.{s}.downsample"))][:-1]
    table = check_parity.format_table([row]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| tiny_vit_5m_224 | ")


@pytest.mark.parametrize("name", [
    "tiny_vit_5m_224", pytest.param("tiny_vit_11m_224", marks=pytest.mark.slow),
    pytest.param("tiny_vit_21m_224", marks=pytest.mark.slow),
    pytest.param("tiny_vit_21m_384", marks=pytest.mark.slow),
    pytest.param("tiny_vit_21m_512", marks=pytest.mark.slow)])
def test_every_layer_at_a_variants_widths_and_windows(name):
    size = 32 if "5m" in name else 64
    windows = create_model(name).window_sizes
    model = create_model(name, 10, size, window_sizes=windows, depths=(1, 1, 1, 1))
    module = torch_tinyvit.randomize(torch_tinyvit.TorchTinyViT(model))
    layers = compare.compare_layers(module, model, torch_tinyvit.variables_of(module))
    assert len(layers) == 8
    for layer in layers:
        assert layer.difference <= compare.LAYER_TOLERANCE, layer


def test_a_layer_that_differs_is_found(small):
    model, module, variables = small
    table = variables["params"]["layers_2"]["blocks_0"]["attn"]["attention_biases"]
    table[0, 1] += 0.01
    layers = compare.compare_layers(module, model, variables)
    table[0, 1] -= 0.01
    assert [x.name for x in layers if x.difference > compare.LAYER_TOLERANCE] == [
        "layers.2.blocks.0"]


def test_differences_that_are_none():
    assert compare.largest([1.0, 2.0], [1.0, 2.5]) == 0.5
    assert compare.largest([1.0, np.nan], [1.0, 2.0]) == np.inf
    assert compare.largest([1.0], [1.0, 1.0]) == np.inf


@pytest.mark.parametrize("difference", [1e-5, 2e-4, float("inf")])
def test_exit_code_and_json(monkeypatch, tmp_path, capsys, difference):
    row = {"variant": "tiny_vit_5m_224", **dict.fromkeys(KINDS, 1e-6), "layer": difference,
           "layer_relative": 1e-6, "layers": []}
    monkeypatch.setattr(check_parity, "measure", lambda *_: row)
    monkeypatch.setattr("sys.argv", ["check_parity.py", "--variants", "tiny_vit_5m_224",
                                     f"--json={tmp_path / 'rows.json'}"])
    if difference <= 1e-4:
        check_parity.main()
    else:
        with pytest.raises(SystemExit, match="largest difference is"):
            check_parity.main()
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    assert "| tiny_vit_5m_224 | 1.0e-06 |" in capsys.readouterr().out


CODE = '''
from timm.models.layers import DropPath, to_2tuple, trunc_normal_
from timm.models.registry import register_model
from timm.models._builder import build_model_with_cfg
import torch

class TinyViT(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings = settings
        self.drop = DropPath(0.1)
        trunc_normal_(torch.empty(2, 2), std=0.02)
        self.size = to_2tuple(settings["img_size"])

@register_model
def tiny():
    return build_model_with_cfg
'''


@pytest.mark.filterwarnings("ignore:Importing from timm.models:FutureWarning")
def test_microsofts_file_finds_the_timm_it_asks_for(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="microsoft/Cream"):
        originals.make_microsoft(str(tmp_path), small[0])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny_vit.py").write_text(CODE)
    module = originals.make_microsoft(str(tmp_path), small[0])
    assert module.size == (32, 32)
    assert module.settings["window_sizes"] == list(small[0].window_sizes)
    assert module.eval().drop(3) == 3
    import sys

    stand_in = getattr(sys.modules.get("timm"), "__version__", None)
    assert stand_in != "0.6"
