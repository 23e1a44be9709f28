import errno
import os
import pickle
import threading
import uuid

import pytest

from tinyvit_jax.store import files
from tinyvit_jax.store import place as places
from tinyvit_jax.store.remote import Remote


@pytest.fixture(params=["folder", "memory", "file"])
def place(request, tmp_path):
    """An empty place of each kind; what fsspec calls file:// stands for any of its systems."""
    if request.param == "folder":
        return places.Folder(tmp_path / "place")
    root = f"/{uuid.uuid4().hex}" if request.param == "memory" else tmp_path / "place"
    if request.param == "file":
        root.mkdir()
        (root / "a").mkdir()
    return Remote(f"{request.param}://{root}", str(tmp_path / "cache"))


def test_what_is_written_is_listed_and_read(place):
    assert place.list() == {}
    assert place.names() == set()
    place.write("top.json", b"123")
    place.write("a/inner.json", b"")
    place.write("top.json", b"12345")
    assert place.list() == {"top.json": 5, "a/inner.json": 0}
    assert place.names() == {"top.json", "a/inner.json"}
    assert place.read("top.json") == b"12345"
    assert place.fetch("top.json").read_bytes() == b"12345"
    copy = pickle.loads(pickle.dumps(place))
    assert copy.read("top.json") == b"12345"
    assert copy.url == place.url
    place.remove("top.json")
    place.remove("top.json")
    assert place.names() == {"a/inner.json"}


def test_what_is_not_there_is_said(place):
    place.write("a/b.json", b"1")
    for name in ("none", "a", "a/none"):
        with pytest.raises(FileNotFoundError):
            place.fetch(name)
    with pytest.raises(FileNotFoundError):
        place.read("none")


def test_create_never_replaces(place):
    assert place.create("a/x", b"mine")
    assert not place.create("a/x", b"theirs")
    assert not place.create("a/x", b"mine")
    assert place.list() == {"a/x": 4}
    assert place.read("a/x") == b"mine"


def test_a_published_file_appears_at_the_end(place):
    with place.publish("a/big") as temporary:
        temporary.write_bytes(b"half")
        assert place.names() == set()
        temporary.write_bytes(b"whole")
        assert place.names() == set()
    assert place.fetch("a/big").read_bytes() == b"whole"
    with place.publish("a/big") as temporary:
        temporary.write_bytes(b"another")
        assert place.fetch("a/big").read_bytes() == b"whole"
    assert place.fetch("a/big").read_bytes() == b"another"
    assert not temporary.exists()


def test_a_publication_that_fails_leaves_nothing(place):
    with pytest.raises(KeyError), place.publish("a/big") as temporary:
        temporary.write_bytes(b"half")
        raise KeyError
    assert place.names() == set()
    assert not temporary.exists()


def test_one_of_many_creates(tmp_path):
    folder = places.Folder(tmp_path)
    for round_number in range(20):
        start, won = threading.Barrier(16), []

        def work(number, name=f"claims/{round_number}", start=start, won=won):
            start.wait()
            if folder.create(name, str(number).encode()):
                won.append(number)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert folder.read(f"claims/{round_number}") == str(won[0]).encode()
    assert len(os.listdir(tmp_path / "claims")) == 20


def test_unfinished_files_of_a_folder_are_not_listed(tmp_path):
    folder = places.Folder(tmp_path / "new" / "place")
    with folder.publish("pass/one") as temporary:
        temporary.write_bytes(b"1")
        assert folder.list() == {}
    assert folder.list() == {"pass/one": 1}
    assert folder.free() > 0


def test_a_folder_syncs_what_it_renames_and_the_name(tmp_path, monkeypatch):
    """The content before its name appears, and the name before the call returns."""
    folder, steps = places.Folder(tmp_path), []
    replace = os.replace
    monkeypatch.setattr(files, "sync", lambda path: steps.append(
        "folder" if path.is_dir() else "file"))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    folder.write("a/x", b"1")
    assert steps == ["file", "rename", "folder"]


def test_leftovers_are_told_from_other_hidden_files(tmp_path):
    dead = files.temporary_path(tmp_path / "claims" / "x")
    dead = dead.with_name(dead.name.replace(f".{os.getpid()}.", ".4194399."))  # no such process
    others = [tmp_path / ".tmp", tmp_path / ".a.tmp", tmp_path / "claims" / ".a.b.c.d.tmp"]
    dead.parent.mkdir()
    for file in (dead, *others):
        file.write_bytes(b"")
    files.remove_leftovers(tmp_path)
    assert not dead.exists()
    assert all(file.exists() for file in others)


@pytest.mark.parametrize(("url", "path"), [
    ("stores/a", "stores/a"), ("/stores/a", "/stores/a"), ("file:///stores/a", "/stores/a"),
    ("/odd:/name", "/odd:/name")])
def test_paths_are_folders(url, path):
    found = places.open_place(url)
    assert isinstance(found, places.Folder)
    assert found.url == path


def test_urls_are_buckets(tmp_path):
    found = places.open_place("s3://bucket/store/", str(tmp_path), 10)
    assert isinstance(found, Remote)
    assert found.url == "s3://bucket/store"
    assert isinstance(places.open_place("gs://bucket/store"), Remote)


@pytest.mark.parametrize(("url", "message"), [
    (places.Path("gs://bucket/store"), r"gs:/bucket/store is neither .* two slashes"),
    ("gs:/bucket/store", "two slashes"),
    ("http://host/store", r"Expected a folder or one of gs://, s3://.*found http://host/store")])
def test_what_names_no_place_is_refused(url, message):
    with pytest.raises(ValueError, match=message):
        places.open_place(url)


def test_a_full_disk_leaves_nothing_in_a_folder(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="full"):
        places.Folder(tmp_path).write("a/x", b"1")
    assert os.listdir(tmp_path / "a") == []
