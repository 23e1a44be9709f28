"""The published binary files of CIFAR-10, CIFAR-100 and STL-10, at a few images each."""

import hashlib
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from tinyvit_jax.data import binary, images, ops, pack
from tinyvit_jax.data.images import SourceError, open_source

FEW = {10_000: 6, 50_000: 30, 5_000: 6, 8_000: 5}  # images of a file: the real ones and here


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """The same layouts with a few images in each file."""
    def shrink(layout):
        return layout._replace(files={
            split: tuple((name, FEW[count]) for name, count in files)
            for split, files in layout.files.items()})

    monkeypatch.setattr(binary, "LAYOUTS", tuple(map(shrink, binary.LAYOUTS)))


def make_pixels(count: int, side: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def make_set(folder: Path, title: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Writes a set's files as its page describes them; split -> pixels, labels."""
    layout = next(x for x in binary.LAYOUTS if x.title == title)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / layout.names).write_text("".join(f"class_{i}\n" for i in range(layout.classes)) +
                                       ("\n" if title == "CIFAR-10" else ""))
    made = {}
    for number, (split, files) in enumerate(layout.files.items()):
        total = sum(count for _, count in files)
        pixels = make_pixels(total, layout.side, number)
        labels = np.arange(total) * 7 % layout.classes
        made[split] = pixels, labels
        start = 0
        for name, count in files:
            part = slice(start, start + count)
            start += count
            if title == "STL-10":  # channel by channel, down the columns
                (folder / name).write_bytes(pixels[part].transpose(0, 3, 2, 1).tobytes())
                (folder / f"{split}_y.bin").write_bytes((labels[part] + 1).astype(np.uint8))
                continue
            with open(folder / name, "wb") as file:
                for image, label in zip(pixels[part], labels[part], strict=True):
                    file.write(bytes([label // 5, label] if title == "CIFAR-100" else [label]))
                    file.write(image.transpose(2, 0, 1).tobytes())
    return made


SETS = pytest.mark.parametrize("title", ["CIFAR-10", "CIFAR-100", "STL-10"])


@SETS
def test_pixels_and_labels_are_those_written(tmp_path, title):
    made = make_set(tmp_path, title)
    for split, own in (("train", "train"), ("eval", "test")):
        pixels, labels = made[own]
        found = open_source(f"binary:{tmp_path}", split)
        assert len(found) == len(labels)
        assert found.class_names[:2] == ("class_0", "class_1")
        examples = found.read(range(len(found)))
        assert [e.label for e in examples] == labels.tolist()
        for example, image in zip(examples, pixels, strict=True):
            assert np.array_equal(ops.decode(example.image, "x"), image)
        assert examples[3].key == f"{own}/00003"
        order = [4, 0, len(found) - 1, 0, -1]
        assert found.read(order) == [examples[i] for i in order]
        assert found[2] == examples[2]
        assert found.read([]) == []


@SETS
def test_an_archives_own_folder_is_found(tmp_path, title):
    layout = next(x for x in binary.LAYOUTS if x.title == title)
    make_set(tmp_path / layout.folder, title)
    assert len(open_source(f"binary:{tmp_path}", "eval")) == sum(
        count for _, count in layout.files["test"])


def test_two_sets_in_one_folder_are_refused(tmp_path):
    make_set(tmp_path / "cifar-10-batches-bin", "CIFAR-10")
    make_set(tmp_path / "cifar-100-binary", "CIFAR-100")
    with pytest.raises(SourceError, match=r"could be CIFAR-10 in .*bin and CIFAR-100 in .*binary"):
        open_source(f"binary:{tmp_path}", "train")


@SETS
def test_fingerprint_pickling_and_positions(tmp_path, title):
    make_set(tmp_path, title)
    whole = open_source(f"binary:{tmp_path}", "train")
    digest = hashlib.sha256("".join(f"{name}\0" for name in whole.class_names).encode())
    for e in whole.read(range(len(whole))):
        digest.update(f"{e.key}\0{e.label}\0".encode())
    assert whole.fingerprint == digest.hexdigest()
    data = pickle.dumps(whole)
    assert len(data) < 8000  # not the images
    copy = pickle.loads(data)
    assert copy.read([5, 1]) == whole.read([5, 1])
    assert (copy.fingerprint, copy.name) == (whole.fingerprint, whole.name)
    assert whole.keys().tolist() == [e.key.encode() for e in whole.read(range(len(whole)))]
    for place in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            whole.read([0, place])


def test_a_pack_of_it_has_the_same_images(tmp_path):
    make_set(tmp_path / "set", "CIFAR-10")
    whole = open_source(f"binary:{tmp_path / 'set'}", "train")

    class Progress:
        def update(self, count):
            pass

    pack.write_pack(tmp_path / "pack", {"train": whole}, pack.PackSettings(), Progress())
    packed = open_source(f"pack:{tmp_path / 'pack'}", "train")
    assert packed.fingerprint == whole.fingerprint
    assert packed.read([3, 29]) == whole.read([3, 29])


def damage(folder: Path, name: str, change) -> None:
    (folder / name).write_bytes(change((folder / name).read_bytes()))


@pytest.mark.parametrize(("title", "name", "change", "message"), [
    ("CIFAR-10", "data_batch_3.bin", lambda b: b[:-1],
     r"data_batch_3\.bin has 18,437 bytes: expected 18,438 bytes, 6 of 3,073.*unpack cifar-10-bin"),
    ("CIFAR-10", "data_batch_5.bin", None, r"data_batch_5\.bin is missing"),
    ("CIFAR-10", "data_batch_4.bin", lambda b: b"\x0b" + b[1:],
     r"image 18 of the train split has the label 11, expected 0 to 9"),
    ("CIFAR-10", "batches.meta.txt", lambda b: b"\xff\n" + b, r"names 11 classes: expected"),
    ("CIFAR-10", "batches.meta.txt", None, r"batches\.meta\.txt cannot be read"),
    ("CIFAR-10", "batches.meta.txt", lambda b: b[8:], r"names 9 classes: expected the 10"),
    ("CIFAR-10", "batches.meta.txt", lambda b: b.replace(b"_1", b"_2"), "10 of CIFAR-10, each"),
    ("CIFAR-100", "train.bin", lambda b: b + b, r"train\.bin has 184,440 bytes: expected 92,220"),
    ("CIFAR-100", "train.bin", lambda b: b[:1] + b"\x64" + b[2:], r"has the label 100"),
    ("STL-10", "train_X.bin", lambda b: b[:-27648], r"train_X\.bin has 138,240 bytes"),
    ("STL-10", "train_y.bin", None, r"train_y\.bin is missing: expected 6 bytes"),
    ("STL-10", "train_y.bin", lambda b: b"\0" + b[1:], r"has the label 0, expected 1 to 10"),
])
def test_damaged_files_are_named(tmp_path, title, name, change, message):
    make_set(tmp_path, title)
    if change is None:
        (tmp_path / name).unlink()
    else:
        damage(tmp_path, name, change)
    with pytest.raises(SourceError, match=message) as error:
        open_source(f"binary:{tmp_path}", "train")
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_other_folders_and_forms(tmp_path):
    with pytest.raises(SourceError, match="the folder does not exist"):
        open_source(f"binary:{tmp_path / 'no'}", "train")
    with pytest.raises(SourceError, match=r"has none of their files.*CIFAR-100: train\.bin"):
        open_source(f"binary:{tmp_path}", "train")
    (tmp_path / "data_batch_1").touch()
    with pytest.raises(SourceError, match=r"data_batch_1, a file of the versions for Python"):
        open_source(f"binary:{tmp_path}", "train")
    with pytest.raises(SourceError, match="binary:/path"):
        open_source("binary:", "train")


@pytest.mark.parametrize("split", ["unlabelled", "test", "dev"])
def test_other_splits(tmp_path, split):
    make_set(tmp_path, "STL-10")
    with pytest.raises(SourceError, match=f"no split '{split}': expected train or eval.*labels"):
        open_source(f"binary:{tmp_path}", split)


def test_the_published_sizes():
    """Those of the sets' own pages, whatever the other tests put in their place."""
    import importlib

    fresh = importlib.util.module_from_spec(importlib.util.find_spec(binary.__name__))
    fresh.__spec__.loader.exec_module(fresh)
    found = {x.title: {split: sum(n for _, n in files) for split, files in x.files.items()}
             for x in fresh.LAYOUTS}
    assert found == {"CIFAR-10": {"train": 50_000, "test": 10_000},
                     "CIFAR-100": {"train": 50_000, "test": 10_000},
                     "STL-10": {"train": 5_000, "test": 8_000}}
    assert [x.record for x in fresh.LAYOUTS] == [3073, 3074, 27_648]


def test_reading_is_fast(tmp_path):
    """Some microseconds an image: a slow form (one by one, with an encoder) takes far more."""
    make_set(tmp_path, "CIFAR-10")
    whole = open_source(f"binary:{tmp_path}", "train")
    places = (np.arange(3000) % len(whole)).tolist()
    whole.read(places)
    best = min(_seconds(lambda: [ops.decode(e.image, e.key) for e in whole.read(places)])
               for _ in range(3))
    assert best / len(places) < 2e-4


def _seconds(call) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def test_every_kind_of_source_is_listed():
    assert "binary:/path" in images.SCHEMES
