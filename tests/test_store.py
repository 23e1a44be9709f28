import contextlib
import dataclasses
import errno
import json
import os
import pickle
import random
import subprocess
import sys
import tarfile
import threading
from concurrent import futures
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
    rewrite,
    shard_file,
    targets,
)

from tinyvit_jax.store import files, shards
from tinyvit_jax.store import store as stores


@pytest.fixture
def store(tmp_path):
    """A complete store of exact probabilities."""
    return fill(stores.create_store(tmp_path / "store", make_manifest(codec="float16")))


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


def test_a_killed_capture_goes_on_where_it_was(store):
    lost = store.shards()[2]
    os.remove(shard_file(store, lost))
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 2 .*missing.*save_logits\.py"):
        stores.open_store(store.path).read(0, 33, 34)
    again = stores.create_store(store.path, store.manifest)
    assert again.missing() == [lost]
    assert again.verify() == []
    check_range(fill(again), 0, 30, 45)
    assert again.missing() == []
    os.remove(store.path / f"{lost.name}.json")
    assert again.missing() == [lost]


@pytest.mark.parametrize("step", range(1, 5))
def test_a_writer_killed_at_any_step_leaves_nothing_half_there(store, step):
    """A real process dies at one of its syncs: sidecar, its name, shard, its name."""
    victim = store.shards()[1]
    os.remove(shard_file(store, victim))
    os.remove(store.path / f"{victim.name}.json")
    code = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import tiny_store as t
from tinyvit_jax.store import files
store = t.stores.open_store({str(store.path)!r})
done = []
def sync(path):
    done.append(path)
    if len(done) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
files.sync = sync
shard = store.missing()[0]
store.write_shard(shard, t.blocks(store, shard))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=os.getcwd(), check=False,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -9
    left = list(store.path.glob("pass-*/.*.tmp"))
    assert len(left) == (2, 1, 1, 0)[step - 1]
    assert store.missing() == ([] if step == 4 else [victim])
    assert store.verify() == []
    again = stores.create_store(store.path, store.manifest)
    assert not any(file.exists() for file in left)
    fill(again)
    assert again.verify() == []
    check_range(again, 0, 0, 45)


def test_files_of_living_writers_are_left_alone(store, monkeypatch):
    ours = files.temporary_path(store.path / "pass-00000" / "shard-00000.array_record")
    ours.write_bytes(b"")
    name = ours.name.split(".")
    name[-4] = "another-machine"
    theirs = ours.with_name(".".join(name))
    theirs.write_bytes(b"")
    stores.create_store(store.path, store.manifest)
    assert ours.exists()
    assert theirs.exists()
    os.utime(theirs, (0, 0))
    stores.create_store(store.path, store.manifest)
    assert ours.exists()
    assert not theirs.exists()


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_is_said_and_cleaned_up(tmp_path, monkeypatch):
    store = stores.create_store(tmp_path, make_manifest())
    made = []

    def full(path):
        link = path.with_name("full.tmp")
        link.symlink_to("/dev/full")
        made.append(link)
        return link

    monkeypatch.setattr(files, "temporary_path", full)
    shard = store.shards()[0]
    with pytest.raises(stores.StoreError, match=r"No space left .* pass 0, shard 0"):
        store.write_shard(shard, blocks(store, shard))
    assert made
    assert not made[0].is_symlink()
    assert shard in store.missing()


def test_a_disk_full_at_the_last_moment(tmp_path, monkeypatch):
    store = stores.create_store(tmp_path, make_manifest())

    def sync(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", sync)
    shard = store.shards()[0]
    with pytest.raises(stores.StoreError, match="No space left"):
        store.write_shard(shard, blocks(store, shard))
    assert os.listdir(tmp_path / "pass-00000") == []


def test_a_shard_that_is_no_longer_ours_is_dropped(tmp_path):
    store = stores.create_store(tmp_path, make_manifest())
    shard = store.shards()[0]

    def still_mine():
        assert any(name.endswith(".tmp") for name in os.listdir(tmp_path / "pass-00000"))
        return False

    assert store.write_shard(shard, blocks(store, shard), still_mine) is False
    assert os.listdir(tmp_path / "pass-00000") == []
    assert store.write_shard(shard, blocks(store, shard), lambda: True) is True
    assert store.write_shard(shard, blocks(store, shard)) is True
    assert shard not in store.missing()


class Turns:
    """Lets several threads go on one step at a time, in an order drawn from a seed."""

    def __init__(self, seed, count):
        self.random, self.count = random.Random(seed), count
        self.waiting, self.chosen = set(), None
        self.changed = threading.Condition()

    def wait(self, number):
        with self.changed:
            self.waiting.add(number)
            self._choose()
            self.changed.wait_for(lambda: self.chosen == number, timeout=20)
            self.chosen = None
            self.waiting.discard(number)

    def leave(self):
        with self.changed:
            self.count -= 1
            self._choose()

    def _choose(self):
        if self.chosen is None and len(self.waiting) == self.count > 0:
            self.chosen = self.random.choice(sorted(self.waiting))
            self.changed.notify_all()


class SteppedFolder(stores.Folder):
    """A folder whose every step waits for its turn."""

    def __init__(self, path, turns, number):
        super().__init__(path)
        self.step = lambda: turns.wait(number)

    def read(self, name):
        self.step()
        return super().read(name)

    def fetch(self, name):
        self.step()
        return super().fetch(name)

    @contextlib.contextmanager
    def publish(self, name):
        with super().publish(name) as temporary:
            yield temporary
            self.step()


@pytest.mark.parametrize(("writers", "orders"), [(2, 30), (3, 20)])
def test_writers_of_other_bytes_at_one_shard_leave_a_pair_that_fits(tmp_path, writers, orders):
    """Whatever the order of their steps."""
    manifest = make_manifest(passes=1, views_per_pass=4)
    stores.create_store(tmp_path, manifest)
    shard = stores.open_store(tmp_path).shards()[0]
    contents = list(blocks(stores.open_store(tmp_path), shard))
    for seed in range(orders):
        turns, failures = Turns(seed, writers), []

        def write(number, turns=turns, failures=failures):
            try:
                store = stores.Store(SteppedFolder(tmp_path, turns, number), manifest)
                store.write_shard(shard, [(k, i, p / (number + 1)) for k, i, p in contents])
            except BaseException as error:
                failures.append(error)
            finally:
                turns.leave()

        threads = [threading.Thread(target=write, args=(i,)) for i in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert stores.open_store(tmp_path).verify() == []


def test_of_different_stores_made_at_once_in_one_place_one_is(tmp_path):
    start = threading.Barrier(8)

    def make(path, top_k):
        start.wait()
        try:
            return stores.create_store(path, make_manifest(top_k=top_k)).manifest.top_k
        except stores.StoreError as refusal:
            return str(refusal)

    with futures.ThreadPoolExecutor(8) as pool:
        for path in [tmp_path / str(i) for i in range(10)]:
            results = list(pool.map(make, [path] * 8, [1, 1, 2, 2, 3, 3, 4, 4]))
            refusals = [result for result in results if isinstance(result, str)]
            assert len(refusals) == 6
            assert all("top_k is" in refusal for refusal in refusals)
            made = stores.open_store(path).manifest.top_k
            assert [result for result in results if isinstance(result, int)] == [made] * 2


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


@pytest.fixture
def keyed(tmp_path):
    """A complete store that keeps its keys."""
    return fill(stores.create_store(tmp_path / "keyed", make_manifest(
        codec="float16", keys="stored", origin={"format": "other"})))


def test_stored_keys_come_back_from_every_range(keyed):
    fresh = stores.open_store(keyed.path)
    assert fresh.verify() == []
    assert fresh.manifest == keyed.manifest
    for start in range(45):
        for stop in range(start + 1, 46):
            keys, _, _ = targets(start % 2, start, stop)
            image, seed = fresh.keys(start % 2, start, stop)
            assert (image.dtype, seed.dtype) == (np.int64, np.uint32)
            np.testing.assert_array_equal(image, keys[0])
            np.testing.assert_array_equal(seed, keys[1])
    check_range(fresh, 1, 3, 45)
    with pytest.raises(stores.StoreError, match=r"2 passes of 45 views\.$"):
        fresh.keys(2, 0, 1)


@pytest.mark.parametrize("images", [1 << 32, (1 << 32) + 1, 1 << 40])
def test_the_largest_stored_keys_come_back(tmp_path, images):
    m = make_manifest(keys="stored", views_per_pass=4, passes=1,
                      image_set={**FIELDS["image_set"], "images": images})
    store = stores.create_store(tmp_path, m)
    keys = np.array([0, images - 1, 255, 1 << 16]), np.array([0, (1 << 32) - 1, 1 << 31, 7])
    _, index, prob = targets(0, 0, 4)
    store.write_shard(store.shards()[0], [(keys, index, prob)])
    for wanted, found in zip(keys, store.keys(0, 0, 4), strict=True):
        assert wanted.tolist() == found.tolist()


@pytest.mark.parametrize(("which", "value", "message"), [
    (0, 45, r"view 2 .*image index must lie in \[0, 45\), found 45"),
    (0, -1, "image index.*found -1"), (1, 1 << 32, "view seed.*found 4294967296")])
def test_keys_that_cannot_be_stored_are_refused(tmp_path, which, value, message):
    store = stores.create_store(tmp_path, make_manifest(keys="stored"))
    contents = list(blocks(store, store.shards()[0]))
    keys = [part.astype(np.int64) for part in contents[0][0]]
    keys[which][2] = value
    with pytest.raises(ValueError, match=message):
        store.write_shard(store.shards()[0], [(tuple(keys), *contents[0][1:]), *contents[1:]])


def test_changed_keys_are_named_though_every_other_checksum_fits(keyed):
    """A shard written anew with one key flipped behind the back of its digest."""
    shard = keyed.shards()[3]
    reader = stores.Reader(shard_file(keyed, shard))
    records = [bytearray(reader.read(i)) for i in range(reader.count)]
    records[1][8 + 2] ^= 1  # the low byte of the third view's image index
    rewrite(shard_file(keyed, shard), records)
    fresh = stores.open_store(keyed.path)
    with pytest.raises(stores.StoreError, match=r"pass 1, shard 0 .*block 1: .*digest of its keys"):
        fresh.keys(1, 4, 8)
    assert [(p.shard, p.block) for p in fresh.verify()] == [(shard, 1)]


def test_a_store_by_formula_has_no_keys_to_give(store):
    with pytest.raises(stores.StoreError, match="keys=formula"):
        store.keys(0, 0, 1)


def test_other_views_of_a_store_with_keys_are_refused(keyed):
    image, seed = targets(0, 0, 45)[0]
    keyed.read(0, 0, 45, (image, seed))
    with pytest.raises(stores.StoreError, match=r"block 0 .*other views.*follow_store"):
        keyed.read(0, 0, 45, (image[::-1], seed[::-1]))


def test_what_an_imported_store_lacks_is_imported(keyed):
    os.remove(shard_file(keyed, keyed.shards()[0]))
    with pytest.raises(stores.StoreError, match=r"missing. Make it with: .*import_store\.py"):
        stores.open_store(keyed.path).keys(0, 0, 4)
    assert [str(s) for s in keyed.missing()] == ["pass 0, shard 0"]
    assert fill(keyed).verify() == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"keys": "none"}, "keys='none'.*formula, stored"),
    ({"keys": "stored", "image_set": {"name": "x"}}, "image_set=.*number of images"),
    ({"origin": {"format": "other"}}, "origin=.*formula gives the keys")])
def test_manifests_about_keys_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(stores.StoreError, match=message):
        stores.create_store(tmp_path / "new", make_manifest(**changes))


def test_the_kind_of_keys_is_compared(keyed):
    with pytest.raises(stores.StoreError, match=r"keys is 'stored' in the store, 'formula' here"):
        stores.create_store(keyed.path, make_manifest(codec="float16"))


def test_estimate_counts_stored_keys(tmp_path):
    m = make_manifest(keys="stored")
    assert stores.blocks.key_bytes(m) == 1 + 4  # 45 images
    assert stores.blocks.key_bytes(make_manifest()) == 0
    plain = shards.estimate(1000, 3, 20)
    assert shards.estimate(1000, 3, 20, key_bytes=8) == plain + 8000
