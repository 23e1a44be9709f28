"""Weights to and from PyTorch: key by key, both layouts, and files that are not what they seem."""

import logging

import jax
import numpy as np
import pytest

from tinyvit_jax.convert import files, resize, tinyvit
from tinyvit_jax.convert.files import WeightsError
from tinyvit_jax.models import create_model

SHAPE = {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4),
         "window_sizes": (4, 4, 4, 3)}


def make_model(num_classes=5, **changes):
    return create_model("tiny_vit", num_classes, 32, **{**SHAPE, **changes})


def make_variables(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), np.float32),
                        model.variable_shapes())


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def variables(model):
    return make_variables(model)


@pytest.fixture
def state(variables):
    return tinyvit.to_torch(variables)


@pytest.mark.parametrize("layout", ["microsoft", "timm"])
def test_round_trip_is_exact(model, variables, layout):
    state = tinyvit.to_torch(variables, layout)
    assert tinyvit.detect_layout(state) == layout
    assert_same(tinyvit.from_torch(state, model), variables)


@pytest.mark.parametrize(("path", "microsoft", "timm"), [
    ("patch_embed seq_2 c kernel", "patch_embed.seq.2.c.weight", "patch_embed.conv2.conv.weight"),
    ("layers_0 blocks_1 conv3 bn scale", "layers.0.blocks.1.conv3.bn.weight",
     "stages.0.blocks.1.conv3.bn.weight"),
    ("layers_0 downsample conv1 bn mean", "layers.0.downsample.conv1.bn.running_mean",
     "stages.1.downsample.conv1.bn.running_mean"),
    ("layers_2 blocks_0 attn attention_biases", "layers.2.blocks.0.attn.attention_biases",
     "stages.2.blocks.0.attn.attention_biases"),
    ("layers_3 blocks_1 local_conv c kernel", "layers.3.blocks.1.local_conv.c.weight",
     "stages.3.blocks.1.local_conv.conv.weight"),
    ("norm_head scale", "norm_head.weight", "head.norm.weight"),
    ("head bias", "head.bias", "head.fc.bias"),
])
def test_keys(path, microsoft, timm):
    path = ("params", *path.split())
    assert tinyvit.torch_key(path, "microsoft") == microsoft
    assert tinyvit.torch_key(path, "timm") == timm


def test_export_counts_no_batches(state):
    counts = [value for key, value in state.items() if key.endswith("num_batches_tracked")]
    assert len(counts) == sum(key.endswith("running_var") for key in state)
    assert all(value.dtype == np.int64 and value.shape == () and value == 0 for value in counts)


def wrap_parallel(state):
    return {"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}


def wrap_trunk(state):
    around = {"image_encoder.neck.0.weight": np.zeros(3), "mask_decoder.x.y": np.zeros(2)}
    return {f"image_encoder.{key}": value for key, value in state.items()} | around


def add_buffers(state):
    return state | {"layers.1.blocks.0.attn.attention_bias_idxs": np.zeros((16, 16), np.int64)}


@pytest.mark.parametrize("wrap", [wrap_parallel, add_buffers])
def test_wrappers_of_the_weights(model, variables, state, wrap, caplog):
    with caplog.at_level(logging.INFO):
        assert_same(tinyvit.from_torch(wrap(state), model), variables)
    assert not caplog.records


@pytest.mark.parametrize("layout", ["microsoft", "timm"])
@pytest.mark.parametrize("with_head", [True, False])
def test_trunk_of_a_segmentation_model(model, variables, layout, with_head, caplog):
    """Its classifier, where there is one, was never used: it must not pass for a trained one."""
    state = tinyvit.to_torch(variables, layout)
    if not with_head:
        heads = ("head.weight", "head.bias", "head.fc.weight", "head.fc.bias")
        state = {key: value for key, value in state.items() if key not in heads}
    state = wrap_trunk(state)
    with caplog.at_level(logging.INFO):
        trunk = tinyvit.from_torch(state, make_model(0))
    assert [record.getMessage() for record in caplog.records] == [
        f"left out {4 if with_head else 2} arrays around the trunk ("
        f"{'image_encoder.head, ' if with_head else ''}image_encoder.neck, mask_decoder)"]
    assert_same(trunk["params"], {k: v for k, v in variables["params"].items() if k != "head"})
    assert_same(trunk["batch_stats"], variables["batch_stats"])
    with pytest.raises(WeightsError, match=r'missing: head.*head="new".*num_classes=0|'
                                           r'head="new".*num_classes=0.*missing: head'):
        tinyvit.from_torch(state, model)
    with caplog.at_level(logging.INFO):
        fresh = tinyvit.from_torch(state, model, head="new")
    assert "starts at zero: the weights had none" in caplog.text
    assert not fresh["params"]["head"]["kernel"].any()


def test_all_faults_come_at_once(model, state):
    del state["norm_head.bias"]
    state["layers.7.weight"] = np.zeros(3)
    state["patch_embed.seq.0.c.weight"] = np.zeros((4, 3, 5, 5))
    state["layers.1.blocks.0.attn.attention_biases"] = np.zeros((2, 15))
    with pytest.raises(WeightsError) as error:
        tinyvit.from_torch(state, model)
    faults = str(error.value)[str(error.value).index("mis-shaped"):]
    assert faults.split("; ") == [
        "mis-shaped: layers.1.blocks.0.attn.attention_biases is (2, 15), expected (2, 16)",
        "mis-shaped: patch_embed.seq.0.c.weight is (4, 3, 5, 5), expected (4, 3, 3, 3)",
        "missing: norm_head.bias (32,)",
        "unused: layers.7.weight (3,)"]


def test_weights_of_something_else(model):
    with pytest.raises(WeightsError, match=r"not TinyViT's weights.*conv1.weight"):
        tinyvit.from_torch({"conv1.weight": np.zeros(3)}, model)


def test_head_of_other_classes(state, variables, caplog):
    with pytest.raises(WeightsError, match='head="new"'):
        tinyvit.from_torch(state, make_model(7))
    with caplog.at_level(logging.INFO):
        loaded = tinyvit.from_torch(state, make_model(7), head="new")
    assert len(caplog.records) == 1
    assert "classifier of 7 classes starts at zero: the weights had 5." in caplog.text
    assert "--config.model.class_names=FILE" in caplog.text
    assert loaded["params"]["head"]["kernel"].shape == (32, 7)
    assert not loaded["params"]["head"]["kernel"].any()
    assert_same(loaded["params"]["layers_3"], variables["params"]["layers_3"])


def test_new_head_keeps_one_that_fits(model, variables, state):
    assert_same(tinyvit.from_torch(state, model, head="new"), variables)


@pytest.mark.parametrize("head", ["strict", "new"])
def test_a_model_of_no_classes_leaves_the_head_out(state, head, caplog):
    with caplog.at_level(logging.INFO):
        assert "head" not in tinyvit.from_torch(state, make_model(0), head)["params"]
    assert [record.getMessage() for record in caplog.records] == [
        "left out head.weight and head.bias: the model has no classifier"]


def test_tables_are_resized_to_other_windows(state, variables, caplog):
    with caplog.at_level(logging.INFO):
        loaded = tinyvit.from_torch(state, make_model(window_sizes=(4, 4, 6, 3)))
    old = variables["params"]["layers_2"]["blocks_1"]["attn"]["attention_biases"]
    new = loaded["params"]["layers_2"]["blocks_1"]["attn"]["attention_biases"]
    np.testing.assert_array_equal(new, resize.resize_bias_table(old, 6))
    assert "resized 2 tables" in caplog.text


@pytest.mark.parametrize("call", [lambda s, m: tinyvit.to_torch(make_variables(m), "jax"),
                                  lambda s, m: tinyvit.from_torch(s, m, head="old")])
def test_unknown_choices(state, model, call):
    with pytest.raises(ValueError, match="expected"):
        call(state, model)


def test_resizing_to_the_same_size_changes_nothing():
    table = np.random.default_rng(0).normal(size=(3, 49)).astype(np.float32)
    np.testing.assert_array_equal(resize.resize_bias_table(table, 7), table)


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), [(7, 12), (14, 24), (12, 7), (16, 3), (1, 4)])
def test_resizing_equals_torch(old, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(3, old * old)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(table).view(1, 3, old, old), (new, new), mode="bicubic",
        align_corners=False).reshape(3, -1)
    np.testing.assert_allclose(resize.resize_bias_table(table, new), expected, atol=1e-5)


@pytest.mark.torch
def test_a_chain_of_sizes_equals_torch(caplog):
    """224 pixels to 384 and on to 512, with the windows of the original's recipes."""
    torch = pytest.importorskip("torch")
    models = [create_model("tiny_vit_21m_224", 5, size, embed_dims=SHAPE["embed_dims"],
                           depths=SHAPE["depths"], num_heads=SHAPE["num_heads"])
              for size in (224, 384, 512)]
    assert [m.window_sizes for m in models] == [(7, 7, 14, 7), (12, 12, 24, 12), (16, 16, 32, 16)]
    ours = make_variables(models[0])
    expected = {}
    with caplog.at_level(logging.INFO):
        for model in models[1:]:
            state = tinyvit.to_torch(ours)
            ours = tinyvit.from_torch(state, model)
            windows = dict(enumerate(model.window_sizes))
            for key, table in state.items() if not expected else list(expected.items()):
                if key.endswith("attention_biases"):
                    heads, old = len(table), round(table.shape[1] ** 0.5)
                    new = windows[int(key.split(".")[1])]
                    expected[key] = torch.nn.functional.interpolate(
                        torch.as_tensor(table).view(1, heads, old, old), (new, new),
                        mode="bicubic").view(heads, new * new)
    found = tinyvit.to_torch(ours)
    assert len(expected) == 4
    for key, table in expected.items():
        np.testing.assert_allclose(found[key], table, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == [
        f"resized 4 tables of attention biases to windows of {windows} tokens (bicubic)"
        for windows in ("12, 24, 12", "16, 32, 16")]


@pytest.mark.torch
def test_a_resized_model_equals_torch(model):
    """Whole: weights of windows 4 4 4 3 in a model of 6 5 2, the tables resized by torch itself."""
    torch = pytest.importorskip("torch")
    from reference import compare, torch_tinyvit

    other = make_model(window_sizes=(4, 6, 5, 2))
    theirs = torch_tinyvit.randomize(torch_tinyvit.TorchTinyViT(model))
    small = {key: value.clone() for key, value in theirs.state_dict().items()}
    loaded = tinyvit.from_torch({key: value.numpy() for key, value in small.items()}, other)
    resized = torch_tinyvit.TorchTinyViT(other)
    for key, table in small.items():
        if key.endswith("attention_biases"):
            heads, old = len(table), round(table.shape[1] ** 0.5)
            new = other.window_sizes[int(key.split(".")[1])]
            small[key] = torch.nn.functional.interpolate(
                table.view(1, heads, old, old), (new, new), mode="bicubic").view(heads, new * new)
    resized.load_state_dict(small, strict=True)
    assert compare.compare_logits(resized.eval(), other, loaded) <= compare.TOLERANCE


@pytest.mark.torch
def test_strict_load_both_ways(model, variables, state):
    torch = pytest.importorskip("torch")
    import torch_tinyvit

    theirs = torch_tinyvit.TorchTinyViT(model)
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
    assert_same(torch_tinyvit.variables_of(theirs), variables)
    back = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert_same(tinyvit.from_torch(back, model), variables)


@pytest.mark.torch
def test_strict_load_under_the_names_of_timm(model, variables):
    """Names and shapes by themselves; timm's own class comes next, where it is installed."""
    torch = pytest.importorskip("torch")
    import torch_tinyvit

    theirs = torch_tinyvit.TimmTinyViT(model)
    state = tinyvit.to_torch(variables, "timm")
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
    back = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert_same(tinyvit.from_torch(back, model), variables)


@pytest.mark.torch
def test_strict_load_both_ways_in_timm():
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tiny_vit_5m_224", num_classes=5)
    model = create_model("tiny_vit_5m_224", 5)
    variables = make_variables(model)
    state = tinyvit.to_torch(variables, "timm")
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in state.items()}, strict=True)
    back = {key: value.numpy() for key, value in theirs.state_dict().items()}
    assert_same(tinyvit.from_torch(back, model), variables)


ENDINGS = [pytest.param(".pth", marks=pytest.mark.torch),
           pytest.param(".pt", marks=pytest.mark.torch), ".safetensors"]


def need(ending):
    pytest.importorskip("safetensors" if ending == ".safetensors" else "torch")


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_round_trip(tmp_path, model, variables, state, ending):
    need(ending)
    path = tmp_path / "new" / f"weights{ending}"
    files.write_state(path, state)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    back = files.read_state(path)
    assert {k: (v.dtype, v.shape) for k, v in back.items()} == {
        k: (v.dtype, v.shape) for k, v in state.items()}
    assert_same(tinyvit.from_torch(back, model), variables)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files(tmp_path, state, ending, damage):
    need(ending)
    path = tmp_path / f"weights{ending}"
    files.write_state(path, state)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:len(whole) // 2], "foreign": b"<html>" * 100,
                      "empty": b""}[damage])
    with pytest.raises(WeightsError, match=rf"weights\{ending} cannot be read.*truncated"):
        files.read_state(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_failed_write_leaves_the_old_file(tmp_path, ending, monkeypatch):
    need(ending)
    path = tmp_path / f"weights{ending}"
    files.write_state(path, {"a": np.ones(3, np.float32)})
    monkeypatch.setattr(files.os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.write_state(path, {"a": np.zeros(3, np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert files.read_state(path)["a"].all()


@pytest.mark.torch
def test_torch_file_of_half_precision_and_objects(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {"a": torch.ones(2, dtype=torch.bfloat16)}, "epoch": 3}, path)
    back = files.read_state(path)
    assert back["a"].dtype == np.float32
    torch.save([torch.ones(2)], path)
    with pytest.raises(WeightsError, match="holds a list"):
        files.read_state(path)
    torch.save({"a": torch.ones(2), "epoch": 3}, path)
    with pytest.raises(WeightsError, match="other things than tensors: epoch"):
        files.read_state(path)


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(WeightsError, match=r"expected \.pth, \.pt or \.safetensors"):
        files.read_state(tmp_path / "weights.ckpt")
    with pytest.raises(WeightsError, match="there is no file"):
        files.read_state(tmp_path / "weights.pth")


@pytest.mark.parametrize(("ending", "package"), [(".pth", "torch"),
                                                 (".safetensors", "safetensors")])
def test_missing_packages_are_named(tmp_path, monkeypatch, ending, package):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.numpy", None)
    with pytest.raises(WeightsError, match=f"pip install {package}"):
        files.write_state(tmp_path / f"weights{ending}", {})
    assert not list(tmp_path.iterdir())
