"""Packs: what goes in comes out, corrupt images stay out, damage is found, bad input is refused."""

import importlib.util
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tinyvit_jax import config, matching
from tinyvit_jax.data import augment, jpeg, ops, pack
from tinyvit_jax.data.images import Example, SourceError, open_source
from tinyvit_jax.data.order import Order

TOOL = Path(__file__).parents[1] / "tools/pack_images.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("pack_images", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(number: int, height: int = 30, width: int = 40) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_tree(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(ops.encode_jpeg(picture(i)))
    return root


SPLIT_NAMES = [f"train/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(5)] + [
    f"val/{c}/{i}.jpg" for c in ("cat", "dog") for i in range(2)]
PLAIN_NAMES = [f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(10)]


@pytest.fixture
def tree(tmp_path) -> Path:
    return make_tree(tmp_path / "tree", SPLIT_NAMES)


def assert_same(folder: Path, out: Path) -> None:
    """The pack serves what the folder serves, in every way."""
    for split in ("train", "eval"):
        a, b = open_source(f"folder:{folder}", split), open_source(f"pack:{out}", split)
        assert b.read(range(len(b))) == a.read(range(len(a)))
        assert b.class_names == a.class_names
        assert b.fingerprint == a.fingerprint


@pytest.mark.parametrize("names", [SPLIT_NAMES, PLAIN_NAMES], ids=["splits", "no splits"])
@pytest.mark.parametrize("shard_images", [3, 4096])
def test_pack_serves_what_the_folder_serves(tool, tmp_path, names, shard_images, capsys):
    tree, out = make_tree(tmp_path / "tree", names), tmp_path / "pack"
    assert tool.main([f"--source={tree}", f"--out={out}", f"--shard_images={shard_images}",
                      "--licence=CC0", "--origin=a camera"]) == 0
    assert_same(tree, out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["licence"], manifest["origin"]) == ("CC0", "a camera")
    entry = manifest["splits"]["train"]
    assert sum(shard["images"] for shard in entry["shards"]) == entry["images"]
    assert max(shard["images"] for shard in entry["shards"]) <= shard_images
    files = {path.name for path in out.iterdir()}
    listed = {s["file"] for e in manifest["splits"].values() for s in e["shards"]}
    assert files == listed | {"manifest.json"}
    assert f"train: {entry['images']} images in {len(entry['shards'])} files" in (
        capsys.readouterr().out)


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz")])
@pytest.mark.parametrize("top", [".", "set", "some/where"])
def test_pack_of_a_tar(tool, tree, tmp_path, suffix, mode, top):
    archive, out = tmp_path / f"set.{suffix}", tmp_path / "packs/one"
    with tarfile.open(archive, mode) as tar:
        tar.add(tree, arcname=top)
    assert tool.main([f"--source={archive}", f"--out={out}"]) == 0
    assert_same(tree, out)
    assert [path.name for path in out.parent.iterdir()] == ["one"]  # nothing unpacked stays


def test_reading_across_shards_and_pickles(tool, tree, tmp_path):
    out = tmp_path / "pack"
    tool.main([f"--source={tree}", f"--out={out}", "--shard_images=3"])
    train = open_source(f"pack:{out}", "train")
    wanted = [open_source(f"folder:{tree}", "train")[i] for i in (9, 0, 3, 3, 8, -1)]
    assert train.read([9, 0, 3, 3, 8, -1]) == wanted
    assert pickle.loads(pickle.dumps(train)).read([9, 0, 3, 3, 8, -1]) == wanted
    with pytest.raises(IndexError):
        train.read([10])


def test_corrupt_images_are_left_out_and_listed(tool, tree, tmp_path, capsys):
    broken = tree / "train/cat/3.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    (tree / "val/dog/0.jpg").write_bytes(b"")
    out = tmp_path / "pack"
    assert tool.main([f"--source={tree}", f"--out={out}", "--shard_images=4"]) == 0
    lines = (out / "corrupt.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["eval/dog/0.jpg", "train/cat/3.jpg"]
    assert "cannot be decoded" in lines[0]
    assert "2 images cannot be decoded and were left out" in capsys.readouterr().out
    train = open_source(f"pack:{out}", "train")
    assert [e.key for e in train.read(range(9))] == [
        n.removeprefix("train/") for n in SPLIT_NAMES[:10] if n != "train/cat/3.jpg"]
    shards = json.loads((out / "manifest.json").read_text())["splits"]["train"]["shards"]
    assert [shard["images"] for shard in shards] == [4, 4, 1]
    broken.unlink()
    assert train.fingerprint == open_source(f"folder:{tree}", "train").fingerprint


@pytest.mark.parametrize("spelling", ["--short-side", "--short_side"])
def test_short_side_has_other_pixels_and_the_same_fingerprint(tool, tmp_path, spelling):
    """So the hashes of views that a store keeps are what tells the two packs apart."""
    tree = make_tree(tmp_path / "tree", PLAIN_NAMES)
    for name, arguments in {"whole": [], "small": [f"{spelling}=24"]}.items():
        assert tool.main([f"--source={tree}", f"--out={tmp_path / name}", *arguments]) == 0
    whole, small = (open_source(f"pack:{tmp_path / name}", "train") for name in ("whole", "small"))
    assert whole.fingerprint == small.fingerprint
    spec = augment.make_spec(config.default().augment, 16)
    order = Order(0, len(whole), paired=False)
    hashes = [matching.make_replay(source, spec, order)["sha256"] for source in (whole, small)]
    assert all(one != other for one, other in zip(*hashes, strict=True))


def test_short_side_writes_restart_markers_for_crops(tool, tmp_path):
    tree = make_tree(tmp_path / "tree", PLAIN_NAMES)
    tool.main([f"--source={tree}", f"--out={tmp_path / 'pack'}", "--short-side=24"])
    example = open_source(f"pack:{tmp_path / 'pack'}", "train")[0]
    assert jpeg.read_header(example.image).interval == 1


def test_short_side_shrinks_the_large_ones_alone(tool, tmp_path):
    tree = make_tree(tmp_path / "tree", PLAIN_NAMES)
    (tree / "cat/0.jpg").write_bytes(ops.encode_png(picture(0, 90, 60)))
    (tree / "dog/0.jpg").write_bytes(ops.encode_png(picture(0, 20, 60)))
    out = tmp_path / "pack"
    tool.main([f"--source={tree}", f"--out={out}", "--short_side=24"])
    splits = [open_source(f"pack:{out}", split) for split in ("train", "eval")]
    examples = [example for split in splits for example in split.read(range(len(split)))]
    shapes = {e.key: ops.decode(e.image, e.key).shape[:2] for e in examples}
    assert shapes.pop("cat/0.jpg") == (36, 24)
    assert shapes.pop("dog/0.jpg") == (20, 60)
    assert set(shapes.values()) == {(24, 32)}
    small = next(e for e in examples if e.key == "dog/0.jpg")
    assert small.image == ops.encode_png(picture(0, 20, 60))  # its own bytes


@pytest.mark.parametrize(("arguments", "message"), [
    (["--source=nowhere", "--out=new"], "nowhere does not exist"),
    (["--source=tree/train/cat", "--out=new"], "two or more"),
    (["--source=tree", "--out=tree"], "not an empty folder"),
    (["--source=tree", "--out=tree/train/cat/0.jpg"], "not an empty folder"),
    (["--source=broken.tar.gz", "--out=new"], "cannot be unpacked.*tar.gz"),
    (["--source=text.tar", "--out=new"], "cannot be unpacked"),
], ids=["missing", "one class", "not empty", "a file", "half a tar", "no tar"])
def test_bad_input_is_one_paragraph_and_status_1(tool, tree, tmp_path, monkeypatch, capsys,
                                                 arguments, message):
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as tar:
        tar.add(tree, arcname=".")
    data = (tmp_path / "whole.tar.gz").read_bytes()
    (tmp_path / "broken.tar.gz").write_bytes(data[:len(data) // 2])
    (tmp_path / "text.tar").write_text("no tar")
    monkeypatch.chdir(tmp_path)
    assert tool.main(arguments) == 1
    error = capsys.readouterr().err
    assert message.split(".*")[0] in error
    assert error.strip().count("\n") == 0
    assert not (tmp_path / "new/manifest.json").exists()


def test_bad_numbers_are_refused(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--source=x", "--out=y", "--shard_images=0"])
    assert "--shard_images must be 1 or more" in capsys.readouterr().err


@pytest.fixture
def packed(tool, tree, tmp_path) -> Path:
    out = tmp_path / "pack"
    tool.main([f"--source={tree}", f"--out={out}", "--shard_images=4"])
    return out


def test_missing_manifest_is_found(packed):
    (packed / "manifest.json").unlink()
    with pytest.raises(SourceError, match=r"no pack in .*pack_images\.py --source"):
        open_source(f"pack:{packed}", "train")


def test_other_versions_are_refused(packed):
    path = packed / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(SourceError, match=r"version 2, and this tinyvit_jax reads version 1"):
        open_source(f"pack:{packed}", "train")


@pytest.mark.parametrize(("harm", "message"), [
    (lambda p: p.unlink(), "is missing"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1000]), r"has \d+ bytes"),
    (lambda p: p.write_bytes(p.read_bytes() + b"x"), r"has \d+ bytes")])
def test_missing_and_truncated_shards_are_found_when_opened(packed, harm, message):
    harm(packed / "train-00001.array_record")
    with pytest.raises(SourceError, match=rf"train-00001\.array_record {message}.*Copy this file"):
        open_source(f"pack:{packed}", "train")
    assert len(open_source(f"pack:{packed}", "eval")) == 4


def test_changed_bytes_are_found_when_read(packed):
    path = packed / "train-00001.array_record"
    data = bytearray(path.read_bytes())
    data[200:260] = bytes(60)
    path.write_bytes(data)
    train = open_source(f"pack:{packed}", "train")
    with pytest.raises(SourceError, match=r"train-00001\.array_record cannot be read"):
        train.read(range(len(train)))


class Stop(Exception):
    """Power fails."""


def test_interrupted_packing_leaves_no_pack(tree, tmp_path):
    class Failing:
        count = 0

        def update(self, images):
            self.count += images
            if self.count == 7:
                raise Stop

    sources = {split: open_source(f"folder:{tree}", split) for split in ("train", "eval")}
    out = tmp_path / "pack"
    with pytest.raises(Stop):
        pack.write_pack(out, sources, pack.PackSettings(shard_images=4), Failing())
    assert [path.name for path in out.iterdir()] == ["train-00000.array_record"]
    with pytest.raises(SourceError, match="no manifest"):
        open_source(f"pack:{out}", "train")


def test_packing_twice_gives_the_same_bytes(tool, tree, tmp_path):
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        tool.main([f"--source={tree}", f"--out={out}"])
    for path in outs[0].iterdir():
        assert path.read_bytes() == (outs[1] / path.name).read_bytes()


def test_several_labels_do_not_go_into_a_pack(tmp_path):
    class Several:
        class_names = ("a", "b")

        def __len__(self):
            return 1

        def __getitem__(self, i):
            return Example("it", ops.encode_jpeg(picture(0)), 0, (0, 1))

    with pytest.raises(SourceError, match="it has several labels, and a pack keeps one"):
        pack.write_pack(tmp_path / "pack", {"eval": Several()}, pack.PackSettings(), None)
