"""Captures by several real processes: on one store at once, killed, and joined to one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from tinyvit_jax import mesh as meshes
from tinyvit_jax import recipe, train

ROOT = Path(__file__).parents[1]
TEACHER = """
import os, time

def bright(images):
    time.sleep(float(os.environ.get("TEACHER_SECONDS", 0)))
    return images.reshape(len(images), -1, 3).mean(1) / 10
"""
SETTINGS = {"store.shard_views": 8, "store.block_views": 4, "store.passes": 3, "store.lease": 2.0,
            "teacher.name": "slow_teacher:bright", "teacher.epochs": 0, "teacher.batch_size": 4}
SHARDS = 15  # of 34 views in each of three passes


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, a teacher, and the store that one process makes."""
    home = tmp_path_factory.mktemp("home")
    tiny.make_folder(home / "images")
    (home / "slow_teacher.py").write_text(TEACHER)
    config = tiny.make_config(home / "images")
    config.update_from_flattened_dict(SETTINGS)
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(home)
        store, _ = recipe.fill_store(config, home / "alone", train.open_data(config),
                                     meshes.make_mesh())
    assert len(store.shards()) == SHARDS
    return home


def environment(home, **changes):
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{home}", **changes}


def start(home, path, seconds, *more):
    """`python tools/save_logits.py` with a teacher that takes so long for a batch of 4."""
    words = [f"--config.{key}={value}" for key, value in {**SETTINGS, "store.path": path}.items()]
    return subprocess.Popen(
        [sys.executable, "tools/save_logits.py", f"--config=tests/tiny.py:{home / 'images'}",
         f"--workdir={path}.work", *words, *more], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(home, TEACHER_SECONDS=str(seconds)))


def finish(process):
    """Its messages, if it ended well."""
    out, messages = process.communicate(timeout=120)
    assert process.returncode == 0, messages[-3000:]
    return out + messages


def count_shards(messages):
    """How many shards a process says it captured."""
    return int(re.findall(r"shards, (\d+) by this process", messages)[-1])


def files(path):
    """All files of a store but its clock."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*")
            if f.is_file() and f.name != "capture_seconds.json"}


def wait_for(found, seconds=60):
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return value


def test_three_processes_fill_one_store(home, tmp_path):
    """Byte for byte what one makes, and no shard twice."""
    three = [start(home, tmp_path / "store", 0.15) for _ in range(3)]
    said = [finish(process) for process in three]
    assert files(tmp_path / "store") == files(home / "alone")
    assert sum(map(count_shards, said)) == SHARDS
    assert all(f"{SHARDS} of {SHARDS} shards" in text for text in said)  # each saw it complete
    assert "took it over" not in "".join(said)


@pytest.mark.slow
def test_one_is_killed_and_the_other_takes_over(home, tmp_path):
    """By its pid at once; and of another machine, as it seems, after the lease."""
    path = tmp_path / "store"
    both = [start(home, path, 0.3) for _ in range(2)]

    def claims():
        found = {}
        for file in path.glob("claims/pass*"):
            try:
                found[json.loads(file.read_text())["pid"]] = file
            except (FileNotFoundError, ValueError):  # it is done, or being written
                continue
        return found

    wait_for(lambda: len(claims()) == 2)
    killed, other = both
    while True:  # until it is stopped within a shard: it may be between two
        killed.send_signal(signal.SIGSTOP)
        time.sleep(0.05)
        claim = claims().get(killed.pid)
        if claim:
            break
        killed.send_signal(signal.SIGCONT)
        time.sleep(0.1)
    content = json.loads(claim.read_text())
    killed.kill()
    killed.wait()
    claim.write_text(json.dumps(content | {"machine": "elsewhere"}))
    messages = finish(other)
    assert re.search(rf"taken over from pid {killed.pid} on \S+, silent for", messages)
    assert files(path) == files(home / "alone")


_ONE_OF_TWO = """
import os, sys, tiny, jax
from pathlib import Path
from tinyvit_jax import mesh, recipe, train
from tinyvit_jax.data import pipeline
from tinyvit_jax.store import store as stores
images, root, port, settings, process = *sys.argv[1:5], int(sys.argv[5])
jax.distributed.initialize(f"localhost:{port}", 2, process)
c = tiny.make_config(images)
c.update_from_flattened_dict(eval(settings))
data, mesh, root = train.open_data(c), mesh.make_mesh(), Path(root)
recipe.fill_store(c, root / "two", data, mesh)

def attempt(name):
    try:
        recipe.fill_store(c, root / name, data, mesh)
    except Exception as error:
        print(f"{name}: {type(error).__name__} {error}", flush=True)

read, write = pipeline.Views.read, stores.Store.write_shard
if process == 1:
    def fail(self, view):
        if view[0] >= 8:
            raise OSError("an image is gone")
        return read(self, view)
    pipeline.Views.read = fail
attempt("unread")
pipeline.Views.read = read
if process == 0:
    def full(*_):
        raise stores.StoreError("no space left")
    stores.Store.write_shard = full
attempt("unwritten")
stores.Store.write_shard = write
recipe.fill_store(c, root / "unread", data, mesh)
"""


def test_two_that_jax_joined_are_one(home, tmp_path):
    """The bytes of one process; and where one of them fails, the other stops too."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    both = [subprocess.Popen(
        [sys.executable, "-c", _ONE_OF_TWO, home / "images", tmp_path, str(port), repr(SETTINGS),
         str(i)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(home))
        for i in range(2)]
    out = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], out[0][1][-3000:] + out[1][1][-3000:]
    assert files(tmp_path / "two") == files(home / "alone")
    assert files(tmp_path / "unread") == files(home / "alone")
    said = [re.findall(r"^un.*", text, re.MULTILINE) for text, _ in out]
    assert said[0][0].startswith("unread: TeamError Process 1 of 2 stopped")
    assert said[1][0] == "unread: OSError an image is gone"
    assert said[0][1] == "unwritten: StoreError no space left"
    assert said[1][1].startswith("unwritten: TeamError Process 0 of 2 stopped")
    assert not [*(tmp_path / "unwritten").glob("claims/*")]


def test_the_estimate_runs_a_pilot(home, tmp_path):
    out = finish(start(home, tmp_path / "store", 0, "--estimate"))
    assert "102 views (3 passes over 33 images)" in out
    assert "in 31 files" in out
    assert re.search(r"by 16 views of one process: \S+ views/s \(preparing views \S+, the teacher "
                     r"\S+, encoding \S+\); \S+ bytes a view, \S+ bytes in all", out)
    assert "hours for the whole store" in out
    assert not (tmp_path / "store").exists()


def test_the_estimate_without_a_teacher(home, tmp_path):
    out = finish(start(home, tmp_path / "store", 0, "--estimate", "--config.teacher.name="))
    assert "no teacher weights to measure" in out
    assert "views/s" not in out


def test_sigterm_leaves_nothing_half_done(home, tmp_path):
    running = start(home, tmp_path / "store", 0.3)
    wait_for(lambda: [*(tmp_path / "store").glob("claims/pass*")])
    running.terminate()
    running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM
    left = files(tmp_path / "store")
    assert not [name for name in left if "claims/" in name or "/." in name]
