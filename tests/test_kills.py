"""kill -9 at any moment, start again, and the bytes are those of a run that nobody touched."""

import collections
import itertools
import json
import os

import jax
import numpy as np
import processes
import pytest
import tiny

from tinyvit_jax import checkpoint, log, recipe
from tinyvit_jax.store import store as stores

CLOCK = "capture_seconds.json"  # the one file of a store that tells how long it took
SETTINGS = {"store.shard_views": 8, "store.block_views": 8, "teacher.batch_size": 4,
            "teacher.epochs": 0, "teacher.name": "own_teacher:bright"}
SHARDS_PER_PASS = 5  # 34 views


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the images and the teacher's module."""
    home = tmp_path_factory.mktemp("kills")
    tiny.make_folder(home / "images")
    processes.write_teacher(home)
    return home


def whole_store(home, passes):
    """A store that was captured unbroken, once for all tests."""
    path = home / f"whole{passes}"
    if not path.exists():
        processes.finish(start_capture(home, path, passes, home / "whole.log"))
        assert len(shards_in(path)) == SHARDS_PER_PASS * passes
    return path


def flags(home, workdir, changes):
    """The command line of a run over the images."""
    return [f"--config=tests/tiny.py:{home / 'images'}", f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in {**SETTINGS, **changes}.items())]


def start_capture(home, path, passes, file, slow=False, **changes):
    """`python tools/save_logits.py`; slow: teacher and disk take their time, for a kill to come."""
    slowness = {"TEACHER_SECONDS": 0.1, "DISK_SECONDS": 0.02,
                **processes.copy_cache(path.parent / "cache")} if slow else {}
    words = flags(home, path.parent / "work",
                  {"store.path": path, "store.passes": passes, **changes})
    return processes.start(["tools/save_logits.py", *words], file, home, **slowness)


def shards_in(path):
    """Names of the shards whose file is there."""
    return {f"{f.parent.name}/{f.stem}" for f in path.glob("pass-*/shard-*.array_record")}


def lone_sidecars(path):
    """The sidecars that are there before their shards are, each with its time."""
    there = shards_in(path)
    found = set()
    for file in path.glob("pass-*/shard-*.json"):
        if f"{file.parent.name}/{file.stem}" not in there:
            found.add((file, file.stat().st_mtime_ns))
    return found


def leftovers(path):
    """Temporary files anywhere below a folder."""
    return {str(file) for file in path.rglob(".*")}


def capture_moment(rng, path, kind, startup, total):
    """When to kill a capture; whatever its kind, once a shard was added to those there are.

    time: any moment from the start on; write: while a shard's temporary file is there, or a
    sidecar's; file: while any temporary file of the store is there; publish: between a sidecar and
    its shard; end: right after the last shard.
    """
    before = len(shards_in(path))
    late = rng.random() < 0.5  # of the moments in time, half lie where the first shard is at work
    delay = {"time": startup + rng.uniform(-0.4, 0.4) if late else rng.uniform(0, startup),
             "write": rng.uniform(0, 0.06), "file": rng.uniform(0, 0.06),
             "publish": rng.uniform(0, 0.02), "end": rng.uniform(0, 0.1)}[kind]
    known, lone, seen = leftovers(path), lone_sidecars(path), []

    def begun():
        if kind == "time":
            return True
        if kind == "end":
            return len(shards_in(path)) == total
        if kind == "publish":
            return bool(lone_sidecars(path) - lone)
        return any("/.shard-" in name or kind == "file" for name in leftovers(path) - known)

    def moment(age):
        if kind != "end" and len(shards_in(path)) > before:
            return True
        if not seen and begun():
            seen.append(0.0 if kind == "time" else age)
        return bool(seen) and age >= seen[0] + delay

    return moment


def check_store(path, whole):
    """What is there of a store after a kill is whole, sound and the unbroken one's."""
    present = shards_in(path)
    for name in present:
        assert (path / f"{name}.json").exists()
        for suffix in (".json", ".array_record"):
            assert (path / (name + suffix)).read_bytes() == (whole / (name + suffix)).read_bytes()
    if (path / "manifest.json").exists():
        assert (path / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()
        store = stores.open_store(path)
        assert len(store.missing()) == len(shards_in(whole)) - len(present)
        assert store.verify() == []
    else:
        assert not present


def check_complete(path, whole):
    """A store that was killed and finished is the unbroken one, and nothing else lies about."""
    assert leftovers(path) == set()
    assert not [*path.glob("claims/*")]
    assert processes.tree(path, (CLOCK,)) == processes.tree(whole, (CLOCK,))


def phase_of(path, pid, before):
    """Where a kill fell, as the folder tells it."""
    mine = [f.name for f in path.glob("pass-*/.*") if f".{pid}." in f.name]
    if lone_sidecars(path) - before[1]:
        return "publishing"
    if any(name.startswith(".shard") for name in mine):
        return "inside a shard"
    return "between shards" if len(shards_in(path)) > len(before[0]) else "before its first shard"


def kill_capture(home, folder, passes, kills, seed):
    """Captures through `kills` kills and to the end; how many fell in which phase."""
    path, whole = folder / "store", whole_store(home, passes)
    total = len(shards_in(whole))
    assert total > kills  # each life but the last may add one
    rng, phases, startup = np.random.default_rng(seed), collections.Counter(), 5.0
    for i in range(kills):
        kind = "end" if i == kills - 1 else ("write", "publish", "time", "file")[i % 4]
        before = shards_in(path), lone_sidecars(path)
        running = start_capture(home, path, passes, folder / f"{i:02d}.log", slow=True)
        killed = processes.kill_when(running, capture_moment(rng, path, kind, startup, total))
        assert killed, f"life {i} ({kind}) ended before its kill:\n{processes.tail(running)}"
        startup = running.age if i == 0 else startup  # the first one dies in its first shard
        phases["after the last shard" if kind == "end" else phase_of(
            path, running.process.pid, before)] += 1
        check_store(path, whole)
        assert (len(shards_in(path)) < total) == (kind != "end")
    processes.finish(start_capture(home, path, passes, folder / "last.log", slow=True))
    check_complete(path, whole)
    print(f"capture, kills by phase: {dict(phases)}")
    return phases


def test_a_killed_capture_ends_in_the_same_bytes(home, tmp_path):
    phases = kill_capture(home, tmp_path, passes=1, kills=3, seed=1)
    assert phases["after the last shard"] == 1
    assert phases["inside a shard"] + phases["publishing"] >= 1


@pytest.mark.slow
def test_capture_through_thirty_kills(home, tmp_path):
    phases = kill_capture(home, tmp_path, passes=8, kills=33, seed=2)
    assert sum(phases.values()) == 33
    assert phases["inside a shard"] >= 5
    assert phases["publishing"] >= 3
    assert phases["before its first shard"] >= 3


def kill_captures(home, folder, passes, kills, seed):
    """Two captures of one store at once, either killed and started again, to the end."""
    path, whole = folder / "store", whole_store(home, passes)
    total, rng = len(shards_in(whole)), np.random.default_rng(seed)
    names = (folder / f"{i:03d}.log" for i in itertools.count())

    def begin():
        return start_capture(home, path, passes, next(names), slow=True, **{"store.lease": 2.0})

    running, phases = [begin(), begin()], collections.Counter()
    try:
        for i in range(kills):
            victim = int(rng.integers(2))
            kind = ("write", "publish", "time", "file")[i % 4]
            before = shards_in(path), lone_sidecars(path)
            lived = running[victim].age
            moment = capture_moment(rng, path, kind, max(0.0, 4.0 - lived), total)
            killed = processes.kill_when(running[victim],
                                         lambda age, m=moment, lived=lived: m(age - lived))
            assert killed, f"it ended before kill {i}:\n{processes.tail(running[victim])}"
            phases[phase_of(path, running[victim].process.pid, before)] += 1
            check_store(path, whole)
            running[victim] = begin()
        assert len(shards_in(path)) < total
        processes.finish(*running)
    finally:
        for r in running:
            processes.kill(r)
    check_complete(path, whole)
    print(f"two captures, kills by phase: {dict(phases)}")
    return phases


def test_two_captures_with_kills_end_in_the_same_bytes(home, tmp_path):
    assert sum(kill_captures(home, tmp_path, passes=2, kills=2, seed=3).values()) == 2


@pytest.mark.slow
def test_two_captures_through_thirty_kills(home, tmp_path):
    assert sum(kill_captures(home, tmp_path, passes=16, kills=32, seed=4).values()) == 32


def train_settings(home, epochs):
    """Of a training on the unbroken store: a checkpoint and a line after each update."""
    return {"store.path": str(whole_store(home, 2)), "store.capture": False,
            "train.epochs": epochs, "eval.every_epochs": epochs / 2,
            "checkpoint.every_epochs": 0.01, "log_every": 1}


def train_whole(home, workdir, epochs):
    """The same training unbroken, in this process, with every checkpoint kept."""
    config = tiny.get_config(home / "images")
    config.update_from_flattened_dict({**SETTINGS, **train_settings(home, epochs)})
    config.checkpoint.keep_last = 1000
    return recipe.run(config, workdir)


def steps_in(workdir):
    """Updates of the whole checkpoints, 0 among them."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return {0} | {int(name) for name in names if name.isdigit()}


def training_moment(rng, workdir, kind, startup, last):
    """When to kill a training; whatever its kind, once a checkpoint or two were added.

    time: any moment of its start; write: while a checkpoint is being written; after: between two
    checkpoints; end: after the last one, while the run is evaluated and its files are written.
    """
    before, folder = max(steps_in(workdir)), workdir / "checkpoints"
    known = set(os.listdir(folder)) if folder.exists() else set()
    delay = {"time": rng.uniform(0, startup), "write": rng.uniform(0, 0.1),
             "after": rng.uniform(0, 0.3), "end": rng.uniform(0, 2)}[kind]
    seen = []

    def begun():
        newest = max(steps_in(workdir))
        return {"time": True, "end": newest == last, "after": newest > before, "write": any(
            not name.isdigit() for name in (
                set(os.listdir(folder)) if folder.exists() else set()) - known)}[kind]

    def moment(age):
        if kind != "end" and max(steps_in(workdir)) > before + (kind == "after"):
            return True
        if not seen and begun():
            seen.append(0.0 if kind == "time" else age)
        return bool(seen) and age >= seen[0] + delay

    return moment


def assert_same_weights(workdir, whole, step):
    """The checkpoint of an update, restored, is bit for bit the unbroken run's."""
    ours, found = checkpoint.load_variables(workdir / "checkpoints")
    assert found == step
    theirs, _ = checkpoint.load_variables(whole / "checkpoints", step)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def assert_same_figures(workdir, whole, expected):
    """result.json and the loss of every update are the unbroken run's."""
    def figures(result):
        return {k: v for k, v in result.items() if "seconds" not in k}

    assert figures(json.loads((workdir / "result.json").read_text())) == figures(expected)
    keys = ("step", "loss", "gradient_norm", "parameter_norm", "update_norm", "learning_rate")
    lines, others = (log.read_metrics(folder / "metrics.jsonl") for folder in (workdir, whole))
    assert [[m[k] for k in keys] for m in lines] == [[m[k] for k in keys] for m in others]


def kill_training(home, folder, kinds, epochs, seed):
    """Trains through a kill of each of the kinds and to the end; how many starts were resumed."""
    workdir, whole = folder / "killed", folder / "whole"
    expected = train_whole(home, whole, epochs)
    last, cache = max(steps_in(whole)), processes.copy_cache(folder / "cache")
    rng, startup = np.random.default_rng(seed), 10.0
    words = ["-m", "tinyvit_jax.main", *flags(home, workdir, train_settings(home, epochs))]
    for i, kind in enumerate(kinds):
        running = processes.start(words, folder / f"{i:02d}.log", home, **cache)
        killed = processes.kill_when(running, training_moment(rng, workdir, kind, startup, last))
        assert killed, f"life {i} ({kind}) ended before its kill:\n{processes.tail(running)}"
        startup = running.age if i == 0 else startup  # the first one dies in its first checkpoint
        newest = max(steps_in(workdir))
        assert (newest < last) == (kind != "end")
        if newest:
            assert_same_weights(workdir, whole, newest)
    processes.finish(processes.start(words, folder / "last.log", home, **cache))
    assert_same_weights(workdir, whole, last)
    assert_same_figures(workdir, whole, expected)
    assert leftovers(workdir) == set()
    return sum("resumed at update" in file.read_text() for file in folder.glob("*.log"))


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_bits(home, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(home)
    assert kill_training(home, tmp_path, ("after", "write"), epochs=1.25, seed=5) == 2


@pytest.mark.slow
def test_training_through_thirty_kills(home, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(home)
    kinds = [*("write", "time", "after") * 10, "end", "end"]
    assert kill_training(home, tmp_path, kinds, epochs=16.0, seed=6) >= 20
