"""Sources of images: folders, the embedded set, tensorflow-datasets; what they refuse, and how."""

import concurrent.futures
import hashlib
import io
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyvit_jax.data import images, labels, ops, source
from tinyvit_jax.data.images import SourceError, open_source


def png(level: int) -> bytes:
    return ops.encode_png(np.full((6, 5, 3), level, np.uint8))


def make_tree(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return root


def keys(images_of: images.ImageSource) -> list[str]:
    return [images_of[i].key for i in range(len(images_of))]


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes of 20 images, without splits."""
    return make_tree(tmp_path / "set", [f"{c}/{i:02d}.png" for c in "ba" for i in range(20)])


@pytest.fixture
def split_tree(tmp_path) -> Path:
    return make_tree(tmp_path / "set", ["train/a/1.png", "train/a/0.png", "train/b/2.png",
                                        "val/a/3.png", "val/b/4.png"])


def test_folder_with_splits(split_tree):
    train, held = (open_source(f"folder:{split_tree}", s) for s in ("train", "eval"))
    assert keys(train) == ["a/0.png", "a/1.png", "b/2.png"]
    assert keys(held) == ["a/3.png", "b/4.png"]
    assert train.class_names == held.class_names == ("a", "b")
    assert train[2] == images.Example("b/2.png", png(2), 1)
    assert train[-1] == train[2]


@pytest.mark.parametrize("name", ["val", "validation", "test", "eval"])
def test_folder_knows_the_usual_names_of_a_split(tmp_path, name):
    root = make_tree(tmp_path, ["train/a/1.png", "train/b/2.png", f"{name}/b/3.png"])
    assert keys(open_source(f"folder:{root}", "eval")) == ["b/3.png"]


def test_folder_without_splits_holds_a_tenth_out(tree, caplog):
    with caplog.at_level(logging.INFO):
        train, held = (open_source(f"folder:{tree}", s) for s in ("train", "eval"))
    assert "4 of its 40 images are the eval split" in caplog.text
    assert len(caplog.records) == 2
    assert len(held) == 4
    assert sorted(keys(train) + keys(held)) == [f"{c}/{i:02d}.png" for c in "ab" for i in range(20)]
    assert keys(held) == ["a/01.png", "a/03.png", "b/03.png", "b/13.png"]  # frozen


@pytest.mark.parametrize(("size", "held"), [(2, 1), (3, 1), (19, 1), (20, 2), (1000, 100)])
def test_hold_out_is_a_tenth_but_neither_none_nor_all(size, held):
    train, evaluation = (source.hold_out(size, s).tolist() for s in ("train", "eval"))
    assert len(evaluation) == held
    assert sorted(train + evaluation) == list(range(size))


def test_folder_takes_images_and_nothing_else(tmp_path):
    root = make_tree(tmp_path, [
        "train/a/one.JPG", "train/a/deep/er/two.jpeg", "train/a/.hidden.png", "train/a/.git/x.png",
        "train/a/notes.txt", "train/b/three.WebP", "train/.cache/x.png", "train/loose.png",
        "val/b/four.PNG"])
    assert keys(open_source(f"folder:{root}", "train")) == [
        "a/deep/er/two.jpeg", "a/one.JPG", "b/three.WebP"]


def test_folder_keeps_any_name(tmp_path):
    names = ["train/Ä b/ü%20.png", "train/z/日本.png", "val/z/1.png"]
    train = open_source(f"folder:{make_tree(tmp_path, names)}", "train")
    assert train.class_names == ("z", "Ä b")
    assert [e.key for e in train.read([0, 1])] == ["z/日本.png", "Ä b/ü%20.png"]
    assert [e.image for e in train.read([1, 0])] == [png(0), png(1)]


def test_folder_refuses_names_that_are_no_text(tmp_path):
    root = make_tree(tmp_path, ["a/1.png", "b/2.png"])
    (root / "b" / os.fsdecode(b"\xff.png")).write_bytes(png(1))
    with pytest.raises(SourceError, match=r"not UTF-8.*Rename it"):
        open_source(f"folder:{root}", "train")


def test_fingerprint_is_the_documented_hash(split_tree):
    text = "a\0b\0" + "a/0.png\0" + "0\0" + "a/1.png\0" + "0\0" + "b/2.png\0" + "1\0"
    train = open_source(f"folder:{split_tree}", "train")
    assert train.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_sees_names_labels_and_classes(split_tree):
    def fingerprint():
        return open_source(f"folder:{split_tree}", "train").fingerprint

    seen = [fingerprint()]
    (split_tree / "train/a/0.png").rename(split_tree / "train/a/00.png")
    seen.append(fingerprint())
    (split_tree / "train/a/00.png").rename(split_tree / "train/b/0.png")
    seen.append(fingerprint())
    (split_tree / "train/b").rename(split_tree / "train/c")
    seen.append(fingerprint())
    assert len(set(seen)) == 4


@pytest.mark.parametrize(("names", "message"), [
    ([], "does not exist"),
    (["a.png"], r"0 class folder\(s\) \[\].*two or more"),
    (["cats/1.png"], r"1 class folder\(s\) \['cats'\].*two or more"),
    (["train/1.png", "test.txt"], r"\['train'\].*only beside one of val/"),
    (["a/x.txt", "b/y.txt"], "no images in any class.*jpg"),
    (["a/1.png", "b/y.txt"], "no images in b.*delete the folder"),
    (["train/a/1.png", "train/b/1.png", "val/a/x.txt"], "no images in any class"),
    (["train/a/1.png", "train/b/1.png", "val/zebra/1.png"], "train/ has not: zebra"),
], ids=["missing", "no class", "one class", "train alone", "empty", "empty class", "empty val",
        "other classes"])
def test_folder_refuses_what_is_no_set(tmp_path, names, message):
    root = make_tree(tmp_path / "set", names)
    with pytest.raises(SourceError, match=message) as error:
        for split in ("train", "eval"):
            open_source(f"folder:{root}", split)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "imagenet", "folder:", "folder", "http://x", "embedded:x"])
def test_unknown_sources_are_refused_with_the_list(name):
    with pytest.raises(SourceError, match="embedded, folder:/path, pack:/path, tfds:name, "
                                          "binary:/path"):
        open_source(name, "train")


def test_unknown_splits_are_refused(tree):
    for name in (f"folder:{tree}", "embedded"):
        with pytest.raises(SourceError, match=r"no split 'dev'.*train"):
            open_source(name, "dev")


def test_unreadable_image_is_named(split_tree):
    (split_tree / "train/a/0.png").write_bytes(png(0)[:40])
    example = open_source(f"folder:{split_tree}", "train")[0]
    with pytest.raises(ops.ImageError, match=r"a/0\.png cannot be decoded"):
        ops.decode(example.image, example.key)


def test_embedded_set():
    train, held = (open_source("embedded", split) for split in ("train", "eval"))
    assert (len(train), len(held)) == (10_000, 2_000)
    assert train.class_names[0] == "T-shirt/top"
    for part, count in ((train, 1000), (held, 200)):
        labels = [example.label for example in part.read(range(len(part)))]
        assert np.bincount(labels).tolist() == [count] * 10
    assert train.fingerprint.startswith("e4bd91f9680544e1")
    assert held.fingerprint.startswith("0880c3a77584bd83")
    # The first image of the original file is an ankle boot.
    boot = train[0]
    pixels = ops.decode(boot.image, boot.key)
    assert (boot.key, boot.label, pixels.shape) == ("train/00000.png", 9, (28, 28, 3))
    assert pixels[..., 0].sum() == 76247
    assert (Path(images.__file__).parent / "embedded/LICENSE").read_text().count("Zalando") == 1


def make_all_kinds(folder: Path) -> list[images.ImageSource]:
    return [open_source(f"folder:{folder}", "train"), open_source("embedded", "train")]


def test_sources_survive_pickling(tree):
    for whole in make_all_kinds(tree):
        wanted = whole.read([5, 3, 3])
        copy = pickle.loads(pickle.dumps(whole))
        assert copy.read([5, 3, 3]) == wanted
        assert (len(copy), copy.name, copy.fingerprint) == (
            len(whole), whole.name, whole.fingerprint)


def test_sources_are_read_by_threads(tree):
    for whole in make_all_kinds(tree):
        places = (np.arange(3000) * 7919 % len(whole)).tolist()
        wanted = whole.read(places)
        fresh = pickle.loads(pickle.dumps(whole))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(fresh.__getitem__, places)) == wanted


def test_sources_refuse_positions_outside(tree):
    for whole in make_all_kinds(tree):
        for place in (len(whole), -len(whole) - 1):
            with pytest.raises(IndexError):
                whole.read([0, place])


def make_tfds(data_dir: Path, splits: dict[str, int], without: str = "",
              label: int | None = None) -> None:
    """Prepares a tiny set with tensorflow-datasets' own writer."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = {"image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["disc", "square"]),
                "file_name": tfds.features.Text()}
    features.pop(without, None)

    # Not registered, so that opening finds the prepared files, as for any user's own set.
    class TinyShapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, description="tiny", features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {name: self._generate_examples(count) for name, count in splits.items()}

        def _generate_examples(self, count):
            for i in range(count):
                example = {"image": io.BytesIO(png(i)), "file_name": f"{i}.png",
                           "label": i % 2 if label is None else label}
                yield i, {name: example[name] for name in features}

    TinyShapes(data_dir=str(data_dir), file_format="array_record").download_and_prepare()


def make_imagenet(data_dir: Path, set_name: str, split: str, examples: list[dict],
                  version: str = "1.0.0", config: str = "", names: tuple[str, ...] = ()) -> None:
    """Prepares images under the name, the features and the classes of a set that tfds knows.

    Some sets, such as CIFAR, name their classes only while they are prepared.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    known = tfds.builder(f"{set_name}/{config}".rstrip("/"), data_dir=str(data_dir))

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = set_name
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, description="as known",
                                         features=known.info.features)

        def _split_generators(self, _):
            if names:
                self.info.features["label"].names = names
            return {split: self._generate_examples()}

        def _generate_examples(self):
            for i, fields in enumerate(examples):
                known_fields = {"image": io.BytesIO(png(i)), "file_name": f"{i}.JPEG", **fields}
                yield i, {key: known_fields[key] for key in known.info.features}

    options = {"config": config} if config else {}
    Builder(data_dir=str(data_dir), file_format="array_record", **options).download_and_prepare()


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    make_tfds(folder, {"train": 9, "test": 4, "other": 2})
    return folder


def test_tfds_is_read_without_tensorflow(tfds_dir):
    train = open_source("tfds:tiny_shapes", "train", str(tfds_dir))
    assert train.class_names == ("disc", "square")
    examples = train.read(range(9))
    assert sorted(e.key for e in examples) == [f"{i}.png" for i in range(9)]
    for example in examples:
        number = int(example.key[0])
        assert example.label == number % 2
        assert (ops.decode(example.image, "x") == number).all()
    assert train[3] == train[-6] == examples[3]
    assert "tensorflow" not in sys.modules


def test_tfds_splits(tfds_dir):
    assert len(open_source("tfds:tiny_shapes", "eval", str(tfds_dir))) == 4  # no validation: test
    assert len(open_source("tfds:tiny_shapes", "other", str(tfds_dir))) == 2
    with pytest.raises(SourceError, match=r"no split dev: it has train, test, other"):
        open_source("tfds:tiny_shapes", "dev", str(tfds_dir))


def test_tfds_without_an_evaluation_split(tmp_path):
    make_tfds(tmp_path, {"train": 3})
    with pytest.raises(SourceError, match=r"validation or test: it has train.*eval_split"):
        open_source("tfds:tiny_shapes", "eval", str(tmp_path))


def test_tfds_without_names_is_keyed_by_content(tmp_path):
    make_tfds(tmp_path, {"train": 3}, without="file_name")
    example = open_source("tfds:tiny_shapes", "train", str(tmp_path))[1]
    assert example.key == hashlib.sha256(example.image).hexdigest()


def test_tfds_source_survives_pickling(tfds_dir):
    train = open_source("tfds:tiny_shapes", "train", str(tfds_dir))
    copy = pickle.loads(pickle.dumps(train))
    assert copy.read([2, 0]) == train.read([2, 0])
    assert copy.fingerprint == train.fingerprint


def test_tfds_fingerprints_differ_by_split(tfds_dir):
    prints = {open_source("tfds:tiny_shapes", s, str(tfds_dir)).fingerprint
              for s in ("train", "test", "other")}
    assert len(prints) == 3


def test_tfds_fingerprint_is_the_documented_hash(tfds_dir):
    held = open_source("tfds:tiny_shapes", "eval", str(tfds_dir))
    text = "disc\0square\0" + "1.0.0\0" + "0\0" + "test\0" + "4\0"
    text += "".join(f"{e.key}\0{e.label}\0" for e in held.read(range(4)))
    assert held.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_tfds_images_without_a_label_are_refused(tmp_path):
    make_tfds(tmp_path, {"train": 2}, label=-1)
    with pytest.raises(SourceError, match=r"split train, has images without a label"):
        open_source("tfds:tiny_shapes", "train", str(tmp_path))[0]


def test_tfds_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(SourceError, match=r"not prepared.*tfds build cifar10 "
                                          r"--file_format=array_record --data_dir="):
        open_source("tfds:cifar10", "train", str(tmp_path))


def test_tfds_in_another_format_says_how(tmp_path):
    make_tfds(tmp_path, {"train": 3})
    info = tmp_path / "tiny_shapes/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(SourceError, match=r"format tfrecord: expected array_record.*tfds build"):
        open_source("tfds:tiny_shapes", "train", str(tmp_path))


def test_tfds_of_an_unknown_name(tmp_path):
    with pytest.raises(SourceError, match=r"does not know tiny_nothing.*Check the name") as error:
        open_source("tfds:tiny_nothing", "train", str(tmp_path))
    assert "\n" not in str(error.value)


def test_tfds_without_labels(tmp_path):
    make_tfds(tmp_path, {"train": 3}, without="label")
    with pytest.raises(SourceError, match=r"features image and label.*found file_name"):
        open_source("tfds:tiny_shapes", "train", str(tmp_path))


REAL = [([3], 3), ([], 5), ([999, 0], 7), ([4, 8, 6], 8)]  # its labels and the one it came with


def test_tfds_real_has_several_labels_or_none(tmp_path):
    make_imagenet(tmp_path, "imagenet2012_real", "validation", [
        {"original_label": own, "real_label": several} for several, own in REAL])
    held = open_source("tfds:imagenet2012_real", "eval", str(tmp_path))
    assert len(held.class_names) == 1000
    found = {e.key: (e.labels, e.label) for e in held.read(range(4))}
    assert found == {"0.JPEG": ((3,), 3), "1.JPEG": ((), 5),
                     "2.JPEG": ((0, 999), 0),  # the class it came with is not right
                     "3.JPEG": ((4, 6, 8), 8)}
    assert labels.has_several(held)
    table = labels.read_labels(held)
    assert table.shape == (4, 3)
    assert sorted(map(tuple, table.tolist())) == [(-1, -1, -1), (0, 999, -1), (3, -1, -1),
                                                  (4, 6, 8)]
    assert held.split == "validation"
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(("name", "version", "config"), [
    ("imagenet_a", "0.1.0", ""), ("imagenet_r", "0.2.0", ""), ("imagenet_sketch", "1.0.0", ""),
    ("imagenet_v2", "3.0.0", "matched-frequency"),
    ("imagenet_v2", "3.0.0", "threshold-0.7"), ("imagenet_v2", "3.0.0", "topimages")])
def test_tfds_sets_beside_imagenet_have_a_test_split(tmp_path, name, version, config):
    make_imagenet(tmp_path, name, "test", [{"label": i} for i in (7, 7, 999)], version, config)
    full = f"tfds:{name}/{config}".rstrip("/")
    held = open_source(full, "eval", str(tmp_path))
    assert sorted(e.label for e in held.read(range(3))) == [7, 7, 999]
    assert (held.split, len(held.class_names)) == ("test", 1000)
    assert not labels.has_several(held)
    assert np.flatnonzero(labels.find_present(labels.read_labels(held), 1000)).tolist() == [7, 999]
    present_only = name in ("imagenet_a", "imagenet_r")
    assert labels.scores_present_only("auto", full) == present_only
    assert labels.scores_present_only("auto", f"{full}:{version}") == present_only


def test_tfds_cifar(tmp_path):
    """Keyed by tensorflow-datasets' own ids; CIFAR-100 by its fine labels."""
    fine = tuple(f"fine{i}" for i in range(100))
    make_imagenet(tmp_path, "cifar10", "train", [
        {"id": f"train_{i:05d}", "label": i} for i in (9, 0, 4)], "3.0.2", names=fine[:10])
    make_imagenet(tmp_path, "cifar100", "test", [
        {"id": f"test_{i:05d}", "label": i, "coarse_label": 3} for i in (99, 17)], "3.0.2",
        names=fine)
    train = open_source("tfds:cifar10", "train", str(tmp_path))
    assert {e.key: e.label for e in train.read(range(3))} == {
        "train_00009": 9, "train_00000": 0, "train_00004": 4}
    assert train.class_names == fine[:10]
    assert sorted(ops.decode(e.image, e.key)[0, 0, 0] for e in train.read(range(3))) == [0, 1, 2]
    held = open_source("tfds:cifar100", "eval", str(tmp_path))
    assert {e.key: e.label for e in held.read(range(2))} == {"test_00099": 99, "test_00017": 17}
    assert (held.class_names, held.split) == (fine, "test")


def test_tfds_stl_and_its_images_without_labels(tmp_path):
    make_imagenet(tmp_path / "train", "stl10", "train", [{"label": i} for i in (1, 9)], "1.0.0")
    make_imagenet(tmp_path / "rest", "stl10", "unlabelled", [{"label": -1}], "1.0.0")
    train = open_source("tfds:stl10", "train", str(tmp_path / "train"))
    assert sorted(e.label for e in train.read(range(2))) == [1, 9]
    assert {e.key for e in train.read(range(2))} == {
        hashlib.sha256(png(i)).hexdigest() for i in range(2)}
    with pytest.raises(SourceError, match=r"split unlabelled, has images without a label\. Choose"):
        open_source("tfds:stl10", "unlabelled", str(tmp_path / "rest"))[0]


def test_which_classes_compete():
    assert labels.scores_present_only("present", "embedded")
    assert not labels.scores_present_only("all", "tfds:imagenet_a")
    assert not labels.scores_present_only("auto", "tfds:imagenet_a_of_mine")
    assert not labels.scores_present_only("auto", "folder:imagenet_a")


def test_opening_a_set_loads_nothing_heavy():
    code = ("import sys; from tinyvit_jax.data import images; images.open_source('embedded', "
            "'train')[0]; heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'grain'}; "
            "print(*(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(images.__file__).parents[2])
    assert (done.stderr, done.stdout.strip()) == ("", "")
