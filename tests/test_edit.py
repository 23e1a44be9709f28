"""Edited stores hold the views that were asked for, each with the target that it had."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny

from tinyvit_jax import matching, recipe, train
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import pipeline
from tinyvit_jax.data.order import follow_store
from tinyvit_jax.data.source import Example
from tinyvit_jax.store import edit, rows
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.manifest import StoreError

ROOT = Path(__file__).parents[1]
CLASSES = tuple(f"class {i}" for i in range(20))
MIXED = {"spec": "small", "mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0}
UNMIXED = {"spec": "small", "mixup": 0.0, "cutmix": 0.0, "mix_prob": 0.0}


class Images:
    """A source of nothing but keys and labels: image i is of class i % 20."""

    def __init__(self, keys, name="synthetic"):
        self.name, self._keys, self.class_names = name, [str(k) for k in keys], CLASSES
        self.fingerprint = "of " + " ".join(self._keys)

    def __len__(self):
        return len(self._keys)

    def __getitem__(self, i):
        return Example(self._keys[i], b"", int(self._keys[i].rpartition("/")[2]) % 20)

    def read(self, indices):
        return [self[i] for i in indices]

    def keys(self):
        return np.array([k.encode() for k in self._keys])


def targets(seed):
    """Classes and float16-exact probabilities that a view seed alone decides, descending."""
    a = seed.astype(np.int64) % 20
    index = np.stack([a, (a + 3) % 20, (a + 7) % 20], 1).astype(np.int32)
    step = (seed.astype(np.int64) >> 8) % 100
    prob = np.stack([np.full(len(a), 0.5), (250 - step) / 1024, (step + 1) / 1024], 1)
    return index, prob.astype(np.float32)


def fill(store, shards=None):
    """Writes shards, by default all that are missing, as a capture does."""
    size = store.manifest.block_views
    for shard in store.missing() if shards is None else shards:
        def blocks(shard=shard):
            for start in range(shard.start, shard.stop, size):
                keys = rows.read_keys(store, shard.pass_number, start,
                                      min(start + size, shard.stop))
                yield (keys, *targets(keys[1]))
        store.write_shard(shard, blocks())
    return store


def make_manifest(source, seed=7, mixed=False, **changes):
    images = len(source)
    fields = {
        "teacher": {"name": "t", "weights": "ab12"}, "class_names": CLASSES, "top_k": 3,
        "augment": MIXED if mixed else UNMIXED, "data_seed": seed, "passes": 2,
        "image_set": {"name": source.name, "fingerprint": source.fingerprint, "images": images},
        "views_per_pass": images + (images % 2 if mixed else 0), "shard_views": 16,
        "block_views": 4, "codec": "float16"}
    return stores.Manifest(**{**fields, **changes})


def make_store(path, source, seed=7, mixed=False, **changes):
    return fill(stores.create_store(path, make_manifest(source, seed, mixed, **changes)))


def read_views(store, p):
    """(image index, seed) of every position of a pass; its targets are held against `targets`."""
    views = store.manifest.views_per_pass
    keys = rows.read_keys(store, p, 0, views)
    index, prob = store.read(p, 0, views, keys)
    expected = targets(keys[1])
    k = store.manifest.top_k
    np.testing.assert_array_equal(index, expected[0][:, :k])
    np.testing.assert_array_equal(prob, expected[1][:, :k])
    return list(zip(keys[0].tolist(), keys[1].tolist(), strict=True))


def shard_bytes(store):
    return {str(f.relative_to(store.path)): f.read_bytes() for f in store.path.rglob("shard-*")}


@pytest.fixture
def source():
    return Images(range(45))


def test_first_passes_stay_a_formula_store_byte_for_byte(source, tmp_path):
    whole = make_store(tmp_path / "a", source, passes=3)
    cut = edit.subset(whole, tmp_path / "b", passes=[0, 1])
    assert (cut.manifest.keys, cut.manifest.origin, cut.manifest.passes) == ("formula", {}, 2)
    assert shard_bytes(cut).items() <= shard_bytes(whole).items()
    assert len(shard_bytes(cut)) == 12
    assert cut.missing() == []
    assert not cut.verify()
    # And more passes are captured into it as into any other.
    longer = fill(stores.create_store(cut.path, make_manifest(source, passes=3)))
    assert [read_views(longer, p) for p in range(3)] == [read_views(whole, p) for p in range(3)]


def test_other_passes_keep_their_seeds(source, tmp_path):
    whole = make_store(tmp_path / "a", source, passes=3)
    cut = edit.subset(whole, tmp_path / "b", passes=[2, 0])
    assert cut.manifest.keys == "stored"
    assert cut.manifest.origin["format"] == "edited"
    assert [read_views(cut, 0), read_views(cut, 1)] == [read_views(whole, 2), read_views(whole, 0)]
    assert not cut.verify()
    again = edit.subset(cut, tmp_path / "c", passes=[1])  # its own keys: copied as they are
    assert read_views(again, 0) == read_views(whole, 0)
    copied = sorted(shard_bytes(again).items())
    assert [b for _, b in copied] == [b for n, b in sorted(shard_bytes(cut).items())
                                      if n.startswith("pass-00001")]


def test_some_images_in_their_order(source, tmp_path):
    whole = make_store(tmp_path / "a", source)
    chosen = np.array([3, 44, 7, 20, 21, 0, 9, 30, 31, 32, 33])
    cut = edit.subset(whole, tmp_path / "b", images=chosen)
    assert cut.manifest.views_per_pass == len(chosen)
    assert cut.manifest.image_set == whole.manifest.image_set
    for p in range(2):
        assert read_views(cut, p) == [v for v in read_views(whole, p) if v[0] in chosen]
    twice = edit.subset(cut, tmp_path / "c", images=np.array([3, 7]), passes=[1])
    assert read_views(twice, 0) == [v for v in read_views(whole, 1) if v[0] in (3, 7)]


def test_shards_of_the_new_store_begin_anywhere(tmp_path):
    """Every shard is written from where the views before it end, whatever was killed when."""
    source = Images(range(300))
    whole = make_store(tmp_path / "a", source)
    chosen = np.random.default_rng(0).permutation(300)[:170]
    cut = edit.subset(whole, tmp_path / "b", images=chosen)
    before = shard_bytes(cut)
    for name in list(before)[::3]:
        (cut.path / name).unlink()
    assert cut.missing()
    assert edit.subset(whole, tmp_path / "b", images=chosen).missing() == []
    assert shard_bytes(cut) == before
    with pytest.raises(StoreError, match=r"origin\.images is"):
        edit.subset(whole, tmp_path / "b", images=np.append(chosen[1:], 0))


def test_pairs_stay_where_both_images_do(source, tmp_path, caplog):
    whole = make_store(tmp_path / "a", source, mixed=True)
    chosen = np.arange(30)
    with caplog.at_level(logging.INFO, "tinyvit_jax"):
        cut = edit.subset(whole, tmp_path / "b", images=chosen)
    expected, alone = [], 0
    for p in range(2):
        views = read_views(whole, p)
        pairs = list(zip(views[::2], views[1::2], strict=True))
        kept = [pair for pair in pairs if pair[0][0] < 30 and pair[1][0] < 30]
        alone += sum(image < 30 for image, _ in views) - 2 * len(kept)
        expected.append([view for pair in kept for view in pair])
    shortest = min(map(len, expected))
    assert [read_views(cut, p) for p in range(2)] == [views[:shortest] for views in expected]
    assert f"{alone} views of these images are left out because their partner" in caplog.text
    lost = sum(map(len, expected)) - 2 * shortest
    assert lost
    assert f"{lost} views are left out to cut all passes" in caplog.text


def test_classes_and_keys(source, tmp_path):
    whole = make_store(tmp_path / "a", source)
    cut = edit.subset(whole, tmp_path / "b", source, classes=["class 3", "class 19"])
    assert {i % 20 for i, _ in read_views(cut, 0)} == {3, 19}
    assert cut.manifest.class_names == CLASSES
    listed = tmp_path / "keys.txt"
    listed.write_text("3\n44\n\n7\n")
    cut = edit.subset(whole, tmp_path / "c", source, images=listed)
    assert {i for i, _ in read_views(cut, 1)} == {3, 44, 7}
    both = edit.subset(whole, tmp_path / "d", source, images=listed, classes=["class 3"])
    assert [i for i, _ in read_views(both, 1)] == [3]


def test_a_smaller_k_is_the_most_probable(source, tmp_path):
    whole = make_store(tmp_path / "a", source)
    cut = edit.subset(whole, tmp_path / "b", top_k=2)
    assert (cut.manifest.keys, cut.manifest.top_k) == ("formula", 2)
    assert read_views(cut, 1) == read_views(whole, 1)
    assert not cut.verify()


def test_compact_targets_are_rounded_once_more_only(tmp_path):
    """Encoding again moves a target as far as encoding did, and no further."""
    generator = np.random.default_rng(0)
    source = Images(range(512))
    logits = generator.normal(0, 3, (512, 20))
    prob = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    index = np.argsort(-prob, 1)[:, :3].astype(np.int32)
    prob = np.take_along_axis(prob, index, 1).astype(np.float32)
    store = stores.create_store(tmp_path / "a", make_manifest(source, codec="compact", passes=1,
                                                              shard_views=512, block_views=256))
    keys = rows.read_keys(store, 0, 0, 512)
    store.write_shard(store.shards()[0], [
        ((keys[0][s], keys[1][s]), index[keys[0][s]], prob[keys[0][s]])
        for s in (slice(0, 256), slice(256, 512))])
    cut = edit.subset(store, tmp_path / "b", images=np.arange(0, 512, 2))
    stay = keys[0] % 2 == 0
    before, after = store.read(0, 0, 512)[1][stay], cut.read(0, 0, 256)[1]
    truth = prob[keys[0][stay]]

    def divergence(p, q):
        p, q = (np.append(x.astype(np.float64), 1 - x.sum(1, keepdims=True, dtype=np.float64), 1)
                for x in (p, q))
        return float((p * np.log(p / q)).sum(1).mean())

    assert 0 < divergence(before, after) < 1.5 * divergence(truth, before) < 3e-4
    assert divergence(truth, after) < 3 * divergence(truth, before)


@pytest.mark.parametrize(("asked", "message"), [
    ({"passes": [2]}, r"passes=\[2\] cannot be taken: expected numbers from 0 to 1"),
    ({"passes": [0, 0]}, "each once"), ({"passes": []}, "each once"),
    ({"top_k": 4}, "top_k=4 cannot be cut from .* holds top_k=3"), ({"top_k": 0}, "top_k=0"),
    ({"images": np.array([45])}, r"indices in \[0, 45\)"),
    ({"images": np.array([0.5])}, "indices"),
    ({"images": np.array([], int)}, "would have no view"),
    ({"classes": ["class 3", "cat"]}, "has no class cat"),
    ({"images": "absent.txt"}, "absent.txt cannot be read"),
])
def test_what_cannot_be_cut_out(source, tmp_path, asked, message):
    whole = make_store(tmp_path / "a", source)
    with pytest.raises(StoreError, match=message):
        edit.subset(whole, tmp_path / "b", source, **asked)
    assert not (tmp_path / "b").exists()


def test_what_is_not_there(source, tmp_path):
    whole = make_store(tmp_path / "a", source)
    (tmp_path / "keys.txt").write_text("3\nx/9\n")
    with pytest.raises(StoreError, match=r"1 of its 2 keys have no image .* the first: x/9"):
        edit.subset(whole, tmp_path / "b", source, images=tmp_path / "keys.txt")
    with pytest.raises(StoreError, match="known by the images alone"):
        edit.subset(whole, tmp_path / "b", classes=["class 3"])
    with pytest.raises(StoreError, match=r"are not those of synthetic.*--config\.data\.source"):
        edit.subset(whole, tmp_path / "b", Images(range(44)), classes=["class 3"])
    (whole.path / f"{whole.shards()[4].name}.array_record").unlink()
    with pytest.raises(StoreError, match=r"lacks 1 shards .* first: pass 1, shard 1"):
        edit.subset(whole, tmp_path / "b")
    assert edit.subset(whole, tmp_path / "b", passes=[0]).missing() == []


def test_another_store_at_the_place_of_the_new_one(source, tmp_path):
    whole = make_store(tmp_path / "a", source)
    edit.subset(whole, tmp_path / "b", passes=[1])
    with pytest.raises(StoreError, match=r"store .*/b is not .*name another folder by --out") as e:
        edit.subset(whole, tmp_path / "b", passes=[0])
    assert "config.store" not in str(e.value)
    assert "save_logits" not in str(e.value)


def test_a_damaged_shard_is_not_copied(source, tmp_path):
    whole = make_store(tmp_path / "a", source)
    file = whole.path / f"{whole.shards()[1].name}.array_record"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StoreError, match=r"pass 0, shard 1 of .* is damaged"):
        edit.subset(whole, tmp_path / "b")
    left = sorted(p.name for p in (tmp_path / "b").rglob("*") if p.is_file())
    assert left == ["manifest.json", "shard-00000.array_record", "shard-00000.json"]


def hashes(*views):
    return {"views": [list(v) for v in views], "versions": {"opencv": "4.10"},
            "sha256": [f"{p}{q:063d}" for p, q in views]}


def test_pixel_hashes_go_with_their_views(source, tmp_path):
    hashed = [(0, 0), (0, 9), (0, 17), (0, 30), (1, 44)]
    whole = make_store(tmp_path / "a", source, replay=hashes(*hashed))
    views = [read_views(whole, p) for p in range(2)]
    gone = {views[0][q][0] for q in (2, 17, 20, 21)}
    cut = edit.subset(whole, tmp_path / "b", images=np.array([i for i in range(45) if
                                                              i not in gone]), passes=[1, 0])
    replay = cut.manifest.replay
    told = {digest: read_views(cut, p)[q] for (p, q), digest in zip(
        replay["views"], replay["sha256"], strict=True)}
    assert told == {f"{p}{q:063d}": views[p][q] for p, q in hashed if views[p][q][0] not in gone}
    assert len(told) >= 3
    assert cut.manifest.replay["versions"] == {"opencv": "4.10"}
    other = edit.subset(whole, tmp_path / "c", passes=[1], top_k=2)
    assert other.manifest.replay == hashes((1, 44)) | {"views": [[0, 44]]}
    lost = edit.subset(make_store(tmp_path / "d", source, replay=hashes((0, 3))), tmp_path / "e",
                       passes=[1])
    assert lost.manifest.replay == {}


def test_more_than_fits_into_memory_is_never_held(tmp_path, monkeypatch):
    """Reading asks for a block at a time, whatever the length of a shard."""
    source = Images(range(600))
    whole = make_store(tmp_path / "a", source, shard_views=512)
    asked = []
    read = stores.Store.read
    monkeypatch.setattr(stores.Store, "read", lambda s, p, a, b, keys=None: (
        asked.append(b - a), read(s, p, a, b, keys))[1])
    edit.subset(whole, tmp_path / "b", images=np.arange(0, 600, 3))
    assert max(asked) == whole.manifest.block_views


@pytest.mark.parametrize("labelled", [True, False])
def test_a_parquet_file_says_what_the_store_does(source, tmp_path, labelled):
    parquet = pytest.importorskip("pyarrow.parquet")
    whole = make_store(tmp_path / "a", source, passes=3)
    path = tmp_path / "deep" / "views.parquet"
    assert edit.export(whole, path, [0, 2], source if labelled else None) == 90
    file = parquet.ParquetFile(path)
    assert [file.metadata.row_group(i).num_rows for i in range(6)] == [16, 16, 13] * 2
    table = file.read().to_pydict()
    assert [*table] == (["pass", "position", "image", "seed"] + ["key", "label"] * labelled
                        + ["index", "prob", "left_over"])
    assert table["pass"] == [0] * 45 + [2] * 45
    assert table["position"] == [*range(45)] * 2
    views = read_views(whole, 0) + read_views(whole, 2)
    assert list(zip(table["image"], table["seed"], strict=True)) == views
    index, prob = targets(np.array(table["seed"]))
    assert table["index"] == index.tolist()
    assert table["prob"] == prob.tolist()
    np.testing.assert_allclose(table["left_over"], 1 - prob.sum(1), atol=1e-7)
    if labelled:
        assert table["key"] == [str(i) for i, _ in views]
        assert table["label"] == [f"class {i % 20}" for i, _ in views]
    assert json.loads(file.schema_arrow.metadata[b"tinyvit_jax"])["top_k"] == 3
    types = {f.name: str(f.type) for f in file.schema_arrow}
    assert (types["seed"], types["index"], types["prob"]) == (
        "uint32", "list<element: int32>", "list<element: float>")


def test_an_export_without_pyarrow_says_what_to_install(source, tmp_path, monkeypatch):
    whole = make_store(tmp_path / "a", source)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match=r"needs pyarrow\. Install it with: pip install '\.\[parq"):
        edit.export(whole, tmp_path / "views.parquet")


def test_an_export_that_fails_leaves_nothing(source, tmp_path):
    pytest.importorskip("pyarrow")
    whole = make_store(tmp_path / "a", source)
    path = tmp_path / "views.parquet"
    path.write_bytes(b"before")
    file = whole.path / f"{whole.shards()[2].name}.array_record"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StoreError, match="pass 0, shard 2"):
        edit.export(whole, path)
    assert path.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "views.parquet"]


def bright(images):
    """A teacher of a user's own: how red, green and blue an image is."""
    return images.reshape(len(images), -1, 3).mean(1) / 10


def capture(config, path):
    """A captured store, and the data that it is of."""
    config.teacher.name, config.teacher.epochs = "test_edit:bright", 0
    data = train.open_data(config)
    store, _ = recipe.fill_store(config, path, data, meshes.make_mesh())
    return store, data


def shown(config, data, store):
    """(image key, seed) -> pixels, mixing and target, of every view as a training shows it."""
    data = data._replace(order=follow_store(data.order, store))
    views = pipeline.Views(data.train, recipe.make_views(config, data).spec, data.order, store)
    found = {}
    for p in range(store.manifest.passes):
        places = np.arange(store.manifest.views_per_pass)
        batch = views.read(p * len(places) + places)
        images, seeds = data.order.keys(np.full(len(places), p), places)
        keys = data.train.keys()[images].tolist()
        for i in places:
            partner = (keys[i ^ 1], int(seeds[i ^ 1])) if "lam" in batch else None
            facts = [batch["image"][i].tobytes(), batch["label"][i], partner]
            facts += [batch["lam"][i // 2], *batch["box"][i // 2]] if partner else []
            found[keys[i], int(seeds[i])] = (facts, dict(zip(
                batch["index"][i].tolist(), batch["prob"][i].tolist(), strict=True)))
    return found


def assert_same_views(some, all_of_them):
    """Each view has the pixels, the partner and, but for rounding, the target that it had."""
    for key, (facts, target) in some.items():
        before = all_of_them[key]
        assert facts == before[0]
        assert target.keys() == before[1].keys()
        np.testing.assert_allclose([target[k] for k in before[1]], [*before[1].values()], atol=0.01)


def fit(config, data, store, workdir):
    """Trains for an epoch and returns the updates done."""
    config.train.epochs, config.store.passes = 1.0, store.manifest.passes
    config.data.seed = store.manifest.data_seed
    data = data._replace(order=follow_store(data.order, store))
    return train.fit(config, workdir, data, store)["steps"]


def cut_classes(tmp_path):
    config = tiny.make_config(tiny.make_folder(tmp_path / "images"))
    whole, data = capture(config, tmp_path / "store")
    return config, data, whole, edit.subset(whole, tmp_path / "cut", data.train,
                                            classes=["blobs", "stripes"])


def test_a_subset_shows_what_the_whole_store_did(tmp_path):
    config, data, whole, cut = cut_classes(tmp_path)
    everything, some = (shown(config, data, s) for s in (whole, cut))
    assert {key.split(b"/")[0] for key, _ in some} == {b"blobs", b"stripes"}
    assert 8 <= len(some) < len(everything)
    assert_same_views(some, everything)


def make_pixels(config, mode="refuse"):
    """How tools/edit_store.py looks at views."""
    return edit.Pixels(lambda: train.open_data(config, evaluated=False).train,
                       matching.check_replay, matching.make_replay, mode)


def assert_hashed(store, config, whole, data):
    """Eight views of the store have hashes, and they are those of the same views of the whole."""
    assert stores.open_store(store.path).manifest == store.manifest
    places = np.array(store.manifest.replay["views"])
    assert len(places) == 8
    keys = rows.read_keys(store, 0, 0, store.manifest.views_per_pass)
    image, seed = (k[places[:, 1]] for k in keys)
    every = rows.read_keys(whole, 1, 0, whole.manifest.views_per_pass)
    at = [int(np.flatnonzero((every[0] == i) & (every[1] == s))[0])
          for i, s in zip(image, seed, strict=True)]
    _, seen = matching._hash_views(recipe.make_views(config, data), [[1, q] for q in at])
    assert store.manifest.replay["sha256"] == seen


def test_a_subset_without_known_pixels_gets_some(tmp_path, caplog):
    config = tiny.make_config(tiny.make_folder(tmp_path / "images"))
    whole, data = capture(config, tmp_path / "store")
    away = make_pixels(tiny.make_config(tmp_path / "gone"))
    for number, asked in enumerate(({"passes": [1]}, {"passes": [1], "images": np.arange(30)})):
        path = tmp_path / f"cut{number}"
        assert edit.subset(whole, path, pixels=away, **asked).manifest.replay == {}
        assert f"nobody can check the pixels that a training from {path}" in caplog.text
        cut = edit.subset(whole, path, pixels=make_pixels(config), **asked)
        assert_hashed(cut, config, whole, data)
        again = edit.subset(whole, path, pixels=away, **asked)  # goes on, and keeps what it knows
        assert again.manifest == cut.manifest


def test_a_subset_of_views_that_look_otherwise_here(tmp_path, caplog):
    config = tiny.make_config(tiny.make_folder(tmp_path / "images"))
    whole, data = capture(config, tmp_path / "store")
    changed = rows.read_keys(whole, 0, 0, 1)[0][0]
    file = tmp_path / "images" / data.train[int(changed)].key
    cv2.imwrite(str(file), 255 - cv2.imread(str(file)))
    with pytest.raises(StoreError, match="of 8 views have other pixels here"):
        edit.subset(whole, tmp_path / "cut", passes=[1], pixels=make_pixels(config))
    assert not (tmp_path / "cut").exists()
    cut = edit.subset(whole, tmp_path / "cut", passes=[1], pixels=make_pixels(config, "warn"))
    assert cut.manifest.replay == {}
    assert "of 8 views have other pixels here" in caplog.text


@pytest.mark.slow
def test_a_student_learns_from_a_subset(tmp_path):
    config, data, _, cut = cut_classes(tmp_path)
    assert fit(config, data, cut, tmp_path / "run") > 0


def test_more_passes_are_captured_into_the_same_store(tmp_path):
    """No edit: the same command with a larger store.passes adds what is missing."""
    config = tiny.make_config(tiny.make_folder(tmp_path / "images"))
    config.store.passes = 1
    before = shard_bytes(capture(config, tmp_path / "store")[0])
    config.store.passes = 2
    store, _ = capture(config, tmp_path / "store")
    assert store.manifest.passes == 2
    assert store.missing() == []
    assert before.items() < shard_bytes(store).items()


def run_tool(*flags, fails=False):
    """What tools/edit_store.py prints."""
    done = subprocess.run([sys.executable, "tools/edit_store.py", *flags], cwd=ROOT,
                          capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert (done.returncode == 0) != fails, done.stderr
    return done.stderr if fails else done.stdout


def test_the_tool_cuts(tmp_path):
    _, _, _, cut = cut_classes(tmp_path)
    said = run_tool(f"--config=tests/tiny.py:{tmp_path}/images", "--do=subset",
                    f"--config.store.path={tmp_path}/store", "--classes=blobs,stripes",
                    f"--out={tmp_path}/by_tool")
    assert shard_bytes(stores.open_store(tmp_path / "by_tool")) == shard_bytes(cut)
    assert f"complete, 2 passes of {cut.manifest.views_per_pass} views" in said
    assert f"--config.store.path={tmp_path}/by_tool --config.store.passes=2" in said


def test_the_tool_hashes_what_it_cuts(tmp_path):
    config = tiny.make_config(tiny.make_folder(tmp_path / "images"))
    whole, data = capture(config, tmp_path / "store")
    run_tool(f"--config=tests/tiny.py:{tmp_path}/images", "--do=subset", "--passes=1",
             f"--config.store.path={tmp_path}/store", f"--out={tmp_path}/cut")
    assert_hashed(stores.open_store(tmp_path / "cut"), config, whole, data)


def test_the_tool_merges(source, tmp_path):
    a, b = make_store(tmp_path / "a", source), make_store(tmp_path / "b", source, 8)
    said = run_tool("--config=tests/tiny.py:none", "--do=merge", f"--config.store.path={a.path}",
                    f"--with={b.path}", f"--out={tmp_path}/out")
    assert "complete, 4 passes of 45 views" in said
    out = stores.open_store(tmp_path / "out")
    assert read_views(out, 3) == read_views(b, 1)


@pytest.mark.parametrize(("flags", "message"), [
    ("--do=subset", "name it by --out"),
    ("--do=subset --out=x --passes=a", "expected numbers with commas"),
    ("--do=stats --out=x.png", "expected a name that ends in .json"),
    ("--do=stats --out=gs://b/x.json", "--do=stats writes a local file, found --out=gs://b/x.json"),
    ("--do=export --out=gs://b/x", "--do=export writes a local file, found --out=gs://b/x"),
    ("--do=merge --out=x --passes=1",
     "--do=merge does not take --passes. It takes --out, --out_source, --with, --with_source."),
    ("--do=stats --passes=1", "--do=stats does not take --passes. It takes --labels, --out, --v"),
    ("--do=subset --out=x --nolabels", "--do=subset does not take --labels"),
])
def test_flags_that_an_action_does_not_take(flags, message):
    assert message in run_tool("--config=tests/tiny.py:none", *flags.split(), fails=True)


@pytest.mark.slow
def test_the_tool_exports_and_measures(tmp_path):
    capture(tiny.make_config(tiny.make_folder(tmp_path / "images")), tmp_path / "store")
    flags = [f"--config=tests/tiny.py:{tmp_path}/images", f"--config.store.path={tmp_path}/store"]
    assert "68 views" in run_tool(*flags, "--do=export", f"--out={tmp_path}/v.parquet")
    said = run_tool(*flags, "--do=stats", f"--out={tmp_path}/stats.json")
    assert "top class is either label of a mixed pair" in said
    assert json.loads((tmp_path / "stats.json").read_text())["views"] == 68
    assert (tmp_path / "stats.png").stat().st_size > 10_000
