import dataclasses
import errno
import os
import pickle
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
import tiny_store

from tinyvit_jax.store import remote
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.remote import Remote


@pytest.fixture
def url():
    """An empty bucket of this process."""
    return f"memory://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def bucket(url, tmp_path):
    return Remote(url, str(tmp_path / "cache"))


@pytest.fixture
def no_waits(monkeypatch):
    """The seconds that were slept."""
    slept = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    return slept


class Flaky:
    """A file system of which some calls fail, as servers do now and then."""

    def __init__(self, system, failures, after=False):
        self.system, self.failures, self.after, self.calls = system, failures, after, []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append(name)
            if self.failures.get(name):
                if self.after:  # the server did it, and its answer was lost
                    getattr(self.system, name)(*args, **kwargs)
                raise self.failures[name].pop(0)
            return getattr(self.system, name)(*args, **kwargs)

        return call


def make_flaky(bucket, failures, after=False):
    system, root = bucket._open()
    flaky = Flaky(system, failures, after)
    bucket._opened = os.getpid(), (flaky, root)
    return flaky


def copies(bucket):
    return sorted(file for file in bucket._cache.rglob("*") if file.is_file())


def test_a_store_in_a_bucket_is_a_store(url, tmp_path):
    place = Remote(url, str(tmp_path))
    store = stores.create_store(place, tiny_store.make_manifest(codec="float16"))
    assert len(store.missing()) == 6
    tiny_store.fill(store)
    assert store.missing() == []
    assert store.verify() == []
    for start in range(0, 45, 5):
        tiny_store.check_range(store, 1, start, 45)
    other = stores.open_store(Remote(url, str(tmp_path / "other machine")))
    assert other.manifest == store.manifest
    assert other.path == url
    tiny_store.check_range(pickle.loads(pickle.dumps(other)), 0, 3, 44)
    assert other.bytes_per_view() == store.bytes_per_view() > 0
    grown = stores.create_store(url, dataclasses.replace(store.manifest, passes=3))
    assert [s.pass_number for s in grown.missing()] == [2, 2, 2]
    with pytest.raises(stores.StoreError, match=f"{url} .*top_k is 3 in the store, 4 here"):
        stores.create_store(url, dataclasses.replace(store.manifest, top_k=4))
    place.remove(f"{store.shards()[0].name}.array_record")
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 0 .*missing"):
        stores.open_store(place).read(0, 0, 1)


def test_a_bucket_without_a_store_is_explained(url):
    with pytest.raises(stores.StoreError, match=f"There is no store at {url}"):
        stores.open_store(url)


def test_an_object_is_downloaded_once(bucket):
    bucket.write("a/x", b"1" * 100)
    flaky = make_flaky(bucket, {})
    first = bucket.fetch("a/x")
    assert bucket.fetch("a/x") == first
    assert flaky.calls.count("get_file") == 1
    again = Remote(bucket.url, bucket._given)
    flaky = make_flaky(again, {})
    assert again.fetch("a/x") == first
    assert "get_file" not in flaky.calls


def test_a_replaced_object_is_fetched_anew_though_its_size_is_the_same(bucket):
    bucket.write("a/x", b"old")
    assert bucket.fetch("a/x").read_bytes() == b"old"
    bucket.write("a/x", b"new")
    assert bucket.fetch("a/x").read_bytes() == b"new"
    assert len(copies(bucket)) == 1


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"X" + b[1:], lambda b: b""])
def test_a_damaged_copy_is_fetched_anew(bucket, damage):
    bucket.write("a/x", b"content")
    copy = bucket.fetch("a/x")
    copy.write_bytes(damage(copy.read_bytes()))
    assert bucket.fetch("a/x").read_bytes() == b"content"


def test_names_that_begin_alike_are_apart(bucket):
    bucket.write("a/x", b"short")
    bucket.write("a/x.json", b"long")
    assert bucket.fetch("a/x.json").read_bytes() == b"long"
    assert bucket.fetch("a/x").read_bytes() == b"short"
    bucket.write("a/x", b"newer")
    assert bucket.fetch("a/x").read_bytes() == b"newer"
    assert len(copies(bucket)) == 2


def test_the_cache_keeps_its_limit_and_what_was_used_last(url, tmp_path, monkeypatch):
    bucket = Remote(url, str(tmp_path), 1000)
    theirs = tmp_path / "stores" / "of the user.dat"
    theirs.parent.mkdir()
    theirs.write_bytes(b"." * 5000)
    for number in range(5):
        bucket.write(f"a/{number}", b"." * 300)
        copy = bucket.fetch(f"a/{number}")
        os.utime(copy, (number + 1, number + 1))
    # A copy that was asked for a moment ago may not be open yet: it stays, and so do 4 and 1.
    first = bucket.fetch("a/1")
    bucket.write("a/5", b"." * 300)
    opened = bucket.fetch("a/5").open("rb")
    assert [file.name.split(".")[0] for file in copies(bucket)] == ["1", "4", "5", "of the user"]
    monkeypatch.setattr(remote, "_IN_USE_SECONDS", -1.0)
    os.utime(first, (9, 9))
    os.utime(opened.name, (1, 1))
    bucket.write("a/6", b"." * 300)
    bucket.fetch("a/6")
    assert not os.path.exists(opened.name)
    assert opened.read() == b"." * 300
    opened.close()
    assert theirs.exists()


def test_threads_share_the_cache(bucket, monkeypatch):
    # memory:// gives every reader the same open file, with one position; a server does not.
    monkeypatch.setattr(type(bucket._locate("")[0]), "get_file",
                        lambda fs, path, local: Path(local).write_bytes(fs.cat_file(path)))
    bucket.write("a/x", b"." * 100_000)
    start, found, failures = threading.Barrier(8), [], []

    def work():
        own = Remote(bucket.url, bucket._given)
        start.wait()
        try:
            found.append(own.fetch("a/x").read_bytes())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert found == [b"." * 100_000] * 8
    assert len(copies(bucket)) == 1


def test_a_full_cache_says_what_to_set(bucket):
    bucket.write("a/x", b"1")
    flaky = make_flaky(bucket, {"get_file": [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]})
    with pytest.raises(OSError, match=r"No space left for a copy of .*/a/x.*store\.cache_gb"):
        bucket.fetch("a/x")
    assert flaky.calls.count("get_file") == 1
    assert copies(bucket) == []


def test_leftovers_of_dead_downloads_go(bucket):
    bucket._folder.joinpath("a").mkdir(parents=True)
    dead = bucket._folder / "a" / f".x.{remote.files._host()}.4194399.0123abcd.tmp"
    dead.write_bytes(b"half")
    bucket.write("a/x", b"1")
    assert not dead.exists()


@pytest.mark.parametrize(("method", "call"), [
    ("find", lambda b: b.list()), ("cat_file", lambda b: b.read("a/x")),
    ("pipe_file", lambda b: b.write("a/x", b"1")), ("rm_file", lambda b: b.remove("a/x")),
    ("info", lambda b: b.fetch("a/x")), ("get_file", lambda b: b.fetch("a/x"))])
def test_what_fails_twice_is_tried_again_and_three_times_is_an_error(bucket, no_waits, method,
                                                                     call):
    bucket.write("a/x", b"1")
    flaky = make_flaky(bucket, {method: [TimeoutError("slow"), RuntimeError("broken pipe")]})
    call(bucket)
    assert flaky.calls.count(method) == 3
    assert no_waits == [0.5, 2.0]
    bucket.write("a/x", b"2")
    make_flaky(bucket, {method: [TimeoutError("slow")] * 3})
    with pytest.raises(OSError, match=rf"{bucket.url}/.*TimeoutError: slow \(after 3 tries\)"):
        call(bucket)


def test_an_upload_is_tried_again(bucket, no_waits):
    flaky = make_flaky(bucket, {"put_file": [TimeoutError("slow")] * 2})
    with bucket.publish("a/x") as temporary:
        temporary.write_bytes(b"1")
    assert bucket.read("a/x") == b"1"
    assert flaky.calls.count("put_file") == 3
    make_flaky(bucket, {"put_file": [TimeoutError("slow")] * 3})
    with pytest.raises(OSError, match="after 3 tries"), bucket.publish("a/y") as temporary:
        temporary.write_bytes(b"1")
    assert not temporary.exists()
    assert bucket.names() == {"a/x"}


def test_what_will_not_change_is_not_tried_again(bucket, no_waits):
    for error in (PermissionError, FileNotFoundError):
        flaky = make_flaky(bucket, {"cat_file": [error("no")]})
        with pytest.raises(error):
            bucket.read("a/x")
        assert flaky.calls == ["cat_file"]
    assert no_waits == []


def test_a_creation_whose_answer_was_lost_is_ours(bucket, no_waits):
    make_flaky(bucket, {"pipe_file": [TimeoutError("slow")]}, after=True)
    assert bucket.create("claims/a", b"ours")
    assert not bucket.create("claims/a", b"ours")


def test_a_creation_that_failed_may_be_theirs(bucket, monkeypatch):
    """Ours fails; before it is tried again, another process makes the name."""
    make_flaky(bucket, {"pipe_file": [TimeoutError("slow")]})
    monkeypatch.setattr(remote.time, "sleep", lambda _: bucket.write("claims/a", b"theirs"))
    assert not bucket.create("claims/a", b"ours")
    assert bucket.read("claims/a") == b"theirs"


def test_between_the_question_and_the_write_a_name_may_be_made(bucket):
    flaky = make_flaky(bucket, {"pipe_file": [FileExistsError("412")]})
    assert not bucket.create("claims/a", b"ours")
    assert flaky.calls.count("pipe_file") == 1


@pytest.mark.parametrize(("kind", "package", "extra"), [("s3", "s3fs", "s3"),
                                                        ("gs", "gcsfs", "gcs")])
def test_a_package_that_is_not_installed_is_named(monkeypatch, kind, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(OSError, match=rf"{kind}://b/s needs .*'tinyvit_jax\[{extra}\]'"):
        stores.open_store(f"{kind}://b/s")


def test_nothing_of_fsspec_is_imported_for_a_folder():
    code = ("import sys; from tinyvit_jax.store import store; "
            "store.open_place('s3://bucket/store'); sys.exit('fsspec' in sys.modules)")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0


@pytest.mark.slow
def test_a_store_on_an_s3_server(tmp_path, monkeypatch):
    """The protocol itself, of a server that keeps If-None-Match."""
    server = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    at_work = server.ThreadedMotoServer(port=0, verbose=False)
    at_work.start()
    host, port = at_work.get_host_and_port()
    for key, value in (("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
                       ("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"),
                       ("AWS_DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(key, value)
    try:
        s3fs.S3FileSystem().mkdir("bucket")
        place = Remote("s3://bucket/store", str(tmp_path))
        assert place.names() == set()
        with pytest.raises(stores.StoreError, match="no store at s3://bucket/store"):
            stores.open_store(place)
        store = tiny_store.fill(stores.create_store(place, tiny_store.make_manifest(
            codec="float16")))
        assert store.verify() == []
        fresh = stores.open_store(Remote("s3://bucket/store", str(tmp_path / "other")))
        assert fresh.missing() == []
        tiny_store.check_range(fresh, 1, 2, 44)
        won = []
        threads = [threading.Thread(target=lambda i=i: won.append(
            place.create("claims/a", str(i).encode()))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False] * 7 + [True]
        shard = store.shards()[0]
        store.write_shard(shard, [(k, i, p / 2) for k, i, p in tiny_store.blocks(store, shard)])
        assert stores.open_store(fresh.place).read(0, 0, 1)[1][0, 0] == 0.25
    finally:
        at_work.stop()
