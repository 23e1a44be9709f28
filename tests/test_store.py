import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_store import (
    CLASSES,
    FIELDS,
    blocks,
    check_range,
    fill,
    make_manifest,
    make_store,
    shard_file,
    targets,
)

from tinyvit_jax.store import shards
from tinyvit_jax.store import store as stores


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def test_every_range_comes_back(store):
    for start in range(45):
        for stop in range(start + 1, 46):
            check_range(store, start % 2, start, stop)


def test_shards_cover_every_pass_once(store):
    for p in range(2):
        cuts = [(s.start, s.stop) for s in store.shards() if s.pass_number == p]
        assert cuts == [(0, 16), (16, 32), (32, 45)]
    assert [s.name for s in store.shards()][:2] == [
        "pass-00000/shard-00000", "pass-00000/shard-00001"]
    assert str(store.shards()[4]) == "pass 1, shard 1"
    assert store.missing() == []
    assert store.verify() == []


def test_compact_mode_is_the_default_and_comes_back(tmp_path):
    store = fill(stores.create_store(tmp_path, make_manifest()))
    keys, _, prob = targets(1, 3, 40)
    np.testing.assert_allclose(store.read(1, 3, 40, keys)[1], -np.sort(-prob, axis=1), atol=0.006)
    assert store.verify() == []


def test_what_was_read_may_be_changed(store):
    store.read(0, 0, 4)[1][:] = 0
    check_range(store, 0, 0, 4)


def test_caches_stay_bounded(store, monkeypatch):
    monkeypatch.setattr(stores, "_CACHED_BLOCKS", 2)
    monkeypatch.setattr(stores, "_OPEN_READERS", 1)
    for p in (0, 1, 0):
        check_range(store, p, 0, 45)
    assert len(store._blocks) == 2
    assert len(store._readers) == 1


@pytest.mark.parametrize(("p", "start", "stop"), [(2, 0, 1), (-1, 0, 1), (0, -1, 3), (0, 3, 3),
                                                  (0, 44, 46)])
def test_positions_outside_are_refused(store, p, start, stop):
    with pytest.raises(stores.StoreError, match="2 passes of 45 views"):
        store.read(p, start, stop)


def test_keys_of_another_length_are_refused(store):
    with pytest.raises(ValueError, match="4 images and seeds, found 3 and 3"):
        store.read(0, 0, 4, targets(0, 0, 3)[0])


def test_pickled_store_opens_its_own_files(store):
    check_range(store, 0, 0, 45)
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 3000
    check_range(copy, 1, 2, 44)


def test_threads_read_the_same(store, monkeypatch):
    monkeypatch.setattr(stores, "_CACHED_BLOCKS", 3)
    monkeypatch.setattr(stores, "_OPEN_READERS", 2)
    failures = []

    def work(seed):
        r = np.random.default_rng(seed)
        try:
            for _ in range(100):
                start = int(r.integers(0, 44))
                check_range(store, int(r.integers(2)), start, int(r.integers(start + 1, 46)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(("change", "message"), [
    (lambda b: b[:-1], r"end at position 44 of \[32, 45\)"),
    (lambda b: [*b, b[-1]], "position 45 should have 0 views"),
    (lambda b: b[::-1], "position 32 should have 4 views"),
    (lambda b: [(b[0][0], b[0][1][:, :2], b[0][2][:, :2]), *b[1:]], "top_k=3"),
    (lambda b: [((b[0][0][0], b[0][0][1][:3]), *b[0][1:]), *b[1:]], "3 seeds"),
])
def test_blocks_that_are_no_shard_are_refused(tmp_path, change, message):
    store = stores.create_store(tmp_path, make_manifest())
    shard = store.shards()[2]
    with pytest.raises(stores.StoreError, match=message):
        store.write_shard(shard, change(list(blocks(store, shard))))
    assert shard in store.missing()
    assert os.listdir(tmp_path / "pass-00000") == []


def test_rewritten_shard_is_read_anew(store):
    shard = store.shards()[0]
    check_range(store, 0, 0, 16)
    store.write_shard(shard, [(k, i, p / 2) for k, i, p in blocks(store, shard)])
    np.testing.assert_array_equal(store.read(0, 0, 1)[1][0, 0], 0.25)


def test_a_store_that_grows_keeps_what_its_manifest_says(tmp_path):
    first = {"views": [[0, 1]], "sha256": ["ab" * 32], "versions": {"opencv": "1"}}
    stores.create_store(tmp_path, make_manifest(replay=first))
    other = {**first, "versions": {"opencv": "2"}}
    grown = stores.create_store(tmp_path, make_manifest(replay=other, passes=5))
    assert grown.manifest == make_manifest(replay=first, passes=5)
    assert stores.open_store(tmp_path).manifest == grown.manifest


def test_manifest_is_read_as_it_was_written(store):
    assert stores.open_store(store.path).manifest == store.manifest
    text = (store.path / "manifest.json").read_text()
    assert json.loads(text)["class_names"] == list(CLASSES)
    assert list(json.loads(text))[-1] == "class_names"


def test_opening_reads_the_manifest_alone(store, monkeypatch):
    read = []
    monkeypatch.setattr(stores.Folder, "_scan", None)
    monkeypatch.setattr(stores.Folder, "read", lambda self, name: (
        read.append(name), (self.path / name).read_bytes())[1])
    stores.open_store(store.path)
    assert read == ["manifest.json"]


def make_empty_files(path, manifest):
    """A store of shards without content."""
    store = stores.create_store(path, manifest)
    for number in range(manifest.passes):
        (path / f"pass-{number:05d}").mkdir()
    for shard in store.shards():
        for suffix in (".array_record", ".json"):
            os.close(os.open(path / (shard.name + suffix), os.O_CREAT | os.O_WRONLY))
    return store


def test_what_is_missing_of_many_shards(tmp_path):
    store = make_empty_files(tmp_path, make_manifest(passes=10, views_per_pass=1600))
    assert len(store.shards()) == 1000
    assert store.missing() == []
    lost = [store.shard(3, 7), store.shard(9, 99)]
    os.remove(shard_file(store, lost[0]))
    os.remove(store.path / f"{lost[1].name}.json")
    assert store.missing() == lost


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_the_largest_store_opens_at_once(tmp_path):
    """90 passes of ImageNet-22k, 156,060 files: CPU seconds and memory of a process of its own."""
    manifest = make_manifest(passes=90, views_per_pass=14_197_122, shard_views=16384,
                             block_views=256, class_names=tuple(map(str, range(21841))))
    assert len(make_empty_files(tmp_path, manifest).shards()) == 78_030
    code = f"""
import re, time
from tinyvit_jax.store import store as stores
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before, began = peak(), time.process_time()
store = stores.open_store({str(tmp_path)!r})
opened = time.process_time() - began
assert store.missing() == []
listed = time.process_time() - began - opened
grown = peak() - before
assert opened < 1 and listed < 1 and 0 < grown < 200, (opened, listed, grown)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr


CHANGES = [
    ("teacher.weights", {"teacher": {**FIELDS["teacher"], "weights": "zz"}}, "'ab12'", "'zz'"),
    ("teacher.mean", {"teacher": {**FIELDS["teacher"], "mean": [0.4]}}, r"\[0.5\]", r"\[0.4\]"),
    (r"class_names\[19\]", {"class_names": (*CLASSES[:19], "x")}, "'class 19'", "'x'"),
    (r"len\(class_names\)", {"class_names": (*CLASSES, "x")}, "20", "21"),
    ("top_k", {"top_k": 4}, "3", "4"),
    ("augment.flip", {"augment": {"name": "small", "flip": 0.0}}, "0.5", "0.0"),
    ("augment.pad", {"augment": {**FIELDS["augment"], "pad": 2}}, r"'\(absent\)'", "2"),
    ("augment.flip", {"augment": {"name": "small"}}, "0.5", r"'\(absent\)'"),
    ("image_set.fingerprint", {"image_set": {**FIELDS["image_set"], "fingerprint": "q"}}, "'cd34'",
     "'q'"),
    ("data_seed", {"data_seed": 8}, "7", "8"),
    ("passes", {"passes": 1}, "2", "1"),
    ("views_per_pass", {"views_per_pass": 46}, "45", "46"),
    ("shard_views", {"shard_views": 8}, "16", "8"),
    ("block_views", {"block_views": 2}, "4", "2"),
    ("codec", {"codec": "float16"}, "'compact'", "'float16'"),
    ("temperature", {"temperature": 2.0}, "1.0", "2.0"),
]


@pytest.mark.parametrize(("field", "change", "theirs", "ours"), CHANGES)
def test_another_manifest_is_refused_by_name(tmp_path, field, change, theirs, ours):
    stores.create_store(tmp_path, make_manifest())
    with pytest.raises(stores.StoreError,
                       match=f"{field} is {theirs} in the store, {ours} here.*save_logits"):
        stores.create_store(tmp_path, make_manifest(**change))
    assert stores.open_store(tmp_path).manifest == make_manifest()


def test_every_difference_is_named_at_once(tmp_path):
    stores.create_store(tmp_path, make_manifest())
    with pytest.raises(stores.StoreError, match=r"top_k .*data_seed "):
        stores.create_store(tmp_path, make_manifest(top_k=5, data_seed=1, passes=9))


def test_passes_may_grow(store):
    more = stores.create_store(store.path, dataclasses.replace(store.manifest, passes=3))
    assert [s.pass_number for s in more.missing()] == [2, 2, 2]
    assert stores.open_store(store.path).manifest.passes == 3
    check_range(fill(more), 2, 0, 45)
    check_range(more, 0, 0, 45)


def test_check_names_what_differs(store):
    store.check({"top_k": 3, "augment": {"name": "small", "flip": 0.5}, "class_names": CLASSES,
                 "image_set.fingerprint": "cd34", "teacher.mean": (0.5,)})
    with pytest.raises(stores.StoreError, match=r"top_k is 3 in the store, 10 here; "
                       r"augment.flip is 0.5 in the store, 0.1 here.*config"):
        store.check({"top_k": 10, "augment": {"name": "small", "flip": 0.1}, "data_seed": 7})
    for expected in ({"augment": {"name": "small"}}, {"augment.flop": 1}, {"nothing": 1}):
        with pytest.raises(stores.StoreError, match="absent"):
            store.check(expected)


@pytest.mark.parametrize(("field", "value"), [
    ("passes", 0), ("views_per_pass", 0), ("top_k", 0), ("top_k", 21), ("block_views", 3),
    ("shard_views", 18), ("codec", "zip"), ("temperature", 0.0), ("tail", "all")])
def test_a_manifest_that_cannot_work_is_refused(tmp_path, field, value):
    with pytest.raises(stores.StoreError, match=field):
        stores.create_store(tmp_path / "new", make_manifest(**{field: value}))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("text", "message"), [
    (None, "no manifest.json"), ("{", "is not a manifest"), ("[]", "is not a manifest"),
    ('{"format_version": 1}', "is not a manifest"), ('{"format_version": 99}', "format 99"),
])
def test_half_made_stores_are_explained(tmp_path, text, message):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(stores.StoreError, match=message):
        stores.open_store(tmp_path)


def test_no_store_is_explained(tmp_path):
    with pytest.raises(stores.StoreError, match=r"no store at .*save_logits\.py"):
        stores.open_store(tmp_path / "none")


def test_shards_without_a_manifest_are_not_adopted(store):
    os.remove(store.path / "manifest.json")
    with pytest.raises(stores.StoreError, match=r"shards without a manifest\.json"):
        stores.create_store(store.path, store.manifest)


def test_bytes_are_counted_from_the_files(store):
    size = sum(f.stat().st_size for f in store.path.glob("pass-*/*"))
    assert store.bytes_per_view() == pytest.approx(size / 90)
    os.remove(shard_file(store, store.shards()[0]))
    assert store.bytes_per_view() > 0
    for file in store.path.glob("pass-*/*"):
        file.unlink()
    with pytest.raises(stores.StoreError, match="no shard yet"):
        store.bytes_per_view()


@pytest.mark.parametrize(("k", "classes"), [(10, 1000), (3, 10), (10, 10), (100, 21841)])
@pytest.mark.parametrize("mode", ["compact", "float16"])
def test_estimate_is_an_upper_bound(tmp_path, k, classes, mode):
    """Classes drawn evenly and probabilities of any size: more bits than a teacher's."""
    r = np.random.default_rng(0)
    views = 2048
    store = stores.create_store(tmp_path, make_manifest(
        class_names=tuple(map(str, range(classes))), top_k=k, passes=1, views_per_pass=views,
        shard_views=2048, block_views=256, codec=mode))
    index = np.argpartition(r.random((views, classes)), k - 1, axis=1)[:, :k].astype(np.int32)
    prob = (r.dirichlet(np.full(k, 1.0), views) * 0.9).astype(np.float32)
    place = np.arange(views)
    store.write_shard(store.shards()[0], [
        ((place[s:s + 256], place[s:s + 256]), index[s:s + 256], prob[s:s + 256])
        for s in range(0, views, 256)])
    expected = shards.estimate(views, k, classes, shard_views=2048, mode=mode)
    assert store.bytes_per_view() * views <= expected
    assert shards.estimate(100 * 32768, k, classes) > 99 * shards.estimate(32768, k, classes)


@pytest.mark.parametrize(("name", "atol"), [
    ("formula-compact", 0.006), ("formula-float16", 0), ("stored-float16", 0)])
def test_stores_of_the_first_release_are_read(tmp_path, name, atol):
    """Files that its own code wrote, of the same targets."""
    with tarfile.open(Path(__file__).with_name("first_release_stores.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    store = stores.open_store(tmp_path / name)
    assert store.missing() == []
    assert store.verify(lambda *place: targets(*place)[0]) == []
    keys, _, prob = targets(0, 0, 45)
    np.testing.assert_allclose(store.read(0, 0, 45, keys)[1], -np.sort(-prob, axis=1), atol=atol)
    if name.startswith("stored"):
        np.testing.assert_array_equal(store.keys(0, 3, 40)[0], targets(0, 3, 40)[0][0])
    changes = {"keys": "stored", "origin": {"format": "other"}} if name.startswith("stored") else {}
    more = stores.create_store(store.path, make_manifest(codec=name.split("-")[1], **changes))
    fill(more)
    assert more.verify() == []
    more.read(1, 0, 45, targets(1, 0, 45)[0])
