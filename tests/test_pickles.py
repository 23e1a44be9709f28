"""PyTorch files read without PyTorch: every kind of tensor, and nothing else, ever."""

import argparse
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from tinyvit_jax.convert import files, pickles
from tinyvit_jax.convert.files import WeightsError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


class Settings(dict):
    """As a training script's config is: a dict of a class of its own, with attributes."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__["frozen"] = True


class Runs:
    """What a hostile file does: names a function that is called while the file is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def make_training(**extra):
    """A training checkpoint as the original writes it, around one weight."""
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return layer, {"model": layer.state_dict(), "optimizer": optimizer.state_dict(),
                   "lr_scheduler": scheduler.state_dict(), "scaler": {"scale": 2.0**16},
                   "max_accuracy": np.float64(81.3), "epoch": 7, "size": torch.Size([1, 2]),
                   "device": torch.device("cpu"), "dtype": torch.float16, **extra}


def assert_weights(state, layer):
    assert set(state) == {"weight", "bias"}
    np.testing.assert_array_equal(state["weight"], layer.weight.detach())
    np.testing.assert_array_equal(state["bias"], layer.bias.detach())


DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
          "bool")


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_as_torch_has_it(tmp_path, name):
    tensor = (torch.arange(-6, 6) * 1.25).to(getattr(torch, name)).view(3, 4)
    path = tmp_path / "w.pth"
    torch.save({"whole": tensor, "turned": tensor.T, "part": tensor[1:, ::2], "one": tensor[2, 1],
                "none": tensor[:0], "parameter": torch.nn.Parameter(tensor, requires_grad=False)},
               path)
    value, foreign = pickles.read(path)
    assert foreign == ()
    for key, expected in torch.load(path, weights_only=True).items():
        expected = (expected.float() if expected.is_floating_point() else expected).numpy()
        assert value[key].dtype == expected.dtype
        np.testing.assert_array_equal(value[key], expected)


def test_arrays_can_be_written_to(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    array = files.read_state(tmp_path / "w.pth")["a"]
    array += 1
    assert array.tolist() == [2, 2]


def test_a_training_checkpoint_of_the_original(tmp_path, monkeypatch):
    """Its settings' class need not be there: the name is known and is not looked up."""
    node = type("CfgNode", (Settings,), {"__module__": "yacs.config"})
    with monkeypatch.context() as patch:
        for name in ("yacs", "yacs.config"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["yacs.config"].CfgNode = node
        layer, checkpoint = make_training(config=node(MODEL=node(NAME="tiny", DROP=[0.1])))
        torch.save(checkpoint, tmp_path / "ckpt_epoch_7.pth")
    assert_weights(files.read_state(tmp_path / "ckpt_epoch_7.pth"), layer)


def test_a_training_checkpoint_of_timm(tmp_path):
    layer, checkpoint = make_training(args=argparse.Namespace(lr=1e-3), arch="tiny_vit_5m_224")
    checkpoint["state_dict"] = checkpoint.pop("model")
    torch.save(checkpoint, tmp_path / "last.pth")
    assert_weights(files.read_state(tmp_path / "last.pth"), layer)


def test_reading_needs_no_torch(tmp_path, monkeypatch):
    layer, checkpoint = make_training()
    torch.save(checkpoint, tmp_path / "w.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_weights(files.read_state(tmp_path / "w.pth"), layer)


@pytest.mark.parametrize("protocol", [2, 4])
def test_other_classes_are_named_and_never_run(tmp_path, protocol):
    layer, checkpoint = make_training(config=Settings(a=[1], b={"c": {2}}),
                                      hook=Runs(tmp_path / "written"), norm=torch.nn.ReLU())
    path = tmp_path / "w.pth"
    torch.save(checkpoint, path, pickle_protocol=protocol)
    with pytest.raises(WeightsError) as error:
        files.read_state(path)
    message = str(error.value)
    assert "test_pickles.Settings" in message
    assert "io.open" in message
    assert "ReLU" in message
    assert "numpy" not in message
    assert (f"python tools/convert_checkpoint.py --from={path} "
            f"--to={tmp_path / 'w.safetensors'} --tensors_only") in message
    assert "\n" not in message
    assert_weights(files.read_state(path, tensors_only=True), layer)
    assert not (tmp_path / "written").exists()
    with open(path, "rb"):  # the file is one that does harm in a reader that trusts it
        torch.load(path, weights_only=False)["hook"].close()
    assert (tmp_path / "written").exists()


def write_archive(path, content):
    """A file of PyTorch's format around a pickle of one's own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", np.arange(4, dtype="<f4").tobytes())
    return path


def make_pickle(size, stride, offset=0):
    """A tensor of four numbers, written by hand."""
    return (b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n("
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
            b"X\x03\x00\x00\x00cpuK\x04tQK" + bytes([offset]) + b"(K" + bytes([size])
            + b"t(K" + bytes([stride]) + b"t\x89NtRu.")


def test_the_archive_by_hand(tmp_path):
    path = write_archive(tmp_path / "w.pth", make_pickle(2, 1, offset=1))
    assert files.read_state(path)["a"].tolist() == [1, 2]


@pytest.mark.parametrize(("size", "stride", "offset"), [(5, 1, 0), (4, 1, 1), (2, 9, 0),
                                                        (200, 0, 0)])
def test_a_tensor_cannot_reach_beyond_its_numbers(tmp_path, size, stride, offset):
    path = write_archive(tmp_path / "w.pth", make_pickle(size, stride, offset))
    with pytest.raises(WeightsError, match="cannot be read"):
        files.read_state(path)


@pytest.mark.parametrize("content", [
    b"cos\nsystem\n(X\x04\x00\x00\x00falsetR.",  # calls a function
    b"cbuiltins\neval\n(X\x03\x00\x00\x001/0tR.",
    b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemscos\nsystem\nsb.",  # replaces a method
    b"ctorch._utils\n_rebuild_parameter\n}X\x08\x00\x00\x00__call__K\x01sb.",  # alters the reader
], ids=["system", "eval", "method", "reader"])
def test_nothing_that_a_pickle_names_is_found(tmp_path, content):
    path = write_archive(tmp_path / "w.pth", b"\x80\x02" + content)
    try:
        value = pickles.read(path).value
    except (pickle.UnpicklingError, AttributeError, TypeError):
        return
    assert isinstance(value, pickles.Inert) or value == {}


def test_big_endian_numbers_are_refused(tmp_path):
    path = write_archive(tmp_path / "w.pth", make_pickle(2, 1))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    with pytest.raises(WeightsError, match="big-endian"):
        files.read_state(path)


def test_files_from_before_archives(tmp_path):
    layer, checkpoint = make_training()
    path = tmp_path / "w.pth"
    torch.save({"model": checkpoint["model"]}, path, _use_new_zipfile_serialization=False)
    assert_weights(files.read_state(path), layer)
    with pytest.raises(WeightsError, match=r"PyTorch 1\.6"):
        files.read_state(path, tensors_only=True)


def test_a_whole_model_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(torch.nn.Linear(2, 3), path)
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear"):
        files.read_state(path)
    with pytest.raises(WeightsError, match="holds a whole object"):
        files.read_state(path, tensors_only=True)
