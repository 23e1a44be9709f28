"""Writers of a store: killed, on a full disk, and several at once."""

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
from concurrent import futures

import pytest
import tiny_store

from tinyvit_jax.store import files
from tinyvit_jax.store import store as stores


@pytest.fixture
def store(tmp_path):
    return tiny_store.make_store(tmp_path / "store")


def test_a_killed_capture_goes_on_where_it_was(store):
    lost = store.shards()[2]
    os.remove(tiny_store.shard_file(store, lost))
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 2 .*missing.*save_logits\.py"):
        stores.open_store(store.path).read(0, 33, 34)
    again = stores.create_store(store.path, store.manifest)
    assert again.missing() == [lost]
    assert again.verify() == []
    tiny_store.check_range(tiny_store.fill(again), 0, 30, 45)
    assert again.missing() == []
    os.remove(store.path / f"{lost.name}.json")
    assert again.missing() == [lost]


@pytest.mark.parametrize("step", range(1, 5))
def test_a_writer_killed_at_any_step_leaves_nothing_half_there(store, step):
    """A real process dies at one of its syncs: sidecar, its name, shard, its name."""
    victim = store.shards()[1]
    os.remove(tiny_store.shard_file(store, victim))
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
    tiny_store.fill(again)
    assert again.verify() == []
    tiny_store.check_range(again, 0, 0, 45)


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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is always full")
def test_a_full_disk_is_said_and_cleaned_up(tmp_path, monkeypatch):
    store = stores.create_store(tmp_path, tiny_store.make_manifest())
    made = []

    def full(path):
        link = path.with_name("full.tmp")
        link.symlink_to("/dev/full")
        made.append(link)
        return link

    monkeypatch.setattr(files, "temporary_path", full)
    shard = store.shards()[0]
    with pytest.raises(stores.StoreError, match=r"No space left .* pass 0, shard 0"):
        store.write_shard(shard, tiny_store.blocks(store, shard))
    assert made
    assert not made[0].is_symlink()
    assert shard in store.missing()


def test_a_disk_full_at_the_last_moment(tmp_path, monkeypatch):
    store = stores.create_store(tmp_path, tiny_store.make_manifest())

    def sync(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "sync", sync)
    shard = store.shards()[0]
    with pytest.raises(stores.StoreError, match="No space left"):
        store.write_shard(shard, tiny_store.blocks(store, shard))
    assert os.listdir(tmp_path / "pass-00000") == []


def test_a_shard_that_is_no_longer_ours_is_dropped(tmp_path):
    store = stores.create_store(tmp_path, tiny_store.make_manifest())
    shard = store.shards()[0]

    def still_mine():
        assert any(name.endswith(".tmp") for name in os.listdir(tmp_path / "pass-00000"))
        return False

    assert store.write_shard(shard, tiny_store.blocks(store, shard), still_mine) is False
    assert os.listdir(tmp_path / "pass-00000") == []
    assert store.write_shard(shard, tiny_store.blocks(store, shard), lambda: True) is True
    assert store.write_shard(shard, tiny_store.blocks(store, shard)) is True
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
    manifest = tiny_store.make_manifest(passes=1, views_per_pass=4)
    stores.create_store(tmp_path, manifest)
    shard = stores.open_store(tmp_path).shards()[0]
    contents = list(tiny_store.blocks(stores.open_store(tmp_path), shard))
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
            return stores.create_store(path, tiny_store.make_manifest(top_k=top_k)).manifest.top_k
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
