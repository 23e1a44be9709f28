import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tinyvit_jax.store import claims
from tinyvit_jax.store.claims import Claims
from tinyvit_jax.store.manifest import StoreError
from tinyvit_jax.store.place import Folder

ROOT = Path(__file__).parents[1]
NAMES = [f"pass-00000/shard-{i:05d}" for i in range(8)]


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def place(tmp_path):
    return Folder(tmp_path / "claims")


def other_machine(monkeypatch, place, clock=None):
    """A process whose pid nobody here can judge."""
    with monkeypatch.context() as m:
        m.setattr(claims.files, "machine", lambda: "elsewhere")
        owner = Claims(place, 60, clock or Clock())
        name = owner.take(NAMES[:1])
    assert name == NAMES[0]
    return owner


def dead_pid():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def beat(place, file):
    """What the owner's thread does."""
    fields = json.loads(place.read(file))
    place.write(file, json.dumps(fields | {"beat": fields["beat"] + 1}).encode())


def test_a_claim_is_a_file_that_says_whose_it_is(place):
    mine = Claims(place, 60)
    assert mine.take(NAMES) == NAMES[0]
    assert list(place.list()) == ["pass-00000-shard-00000.0001"]
    fields = json.loads(place.read("pass-00000-shard-00000.0001"))
    assert fields["token"] == mine.token
    assert (fields["pid"], fields["host"]) == (os.getpid(), socket.gethostname())
    assert mine.owns(NAMES[0])
    assert not mine.owns(NAMES[1])


def test_alone_the_first_comes_first(place):
    mine = Claims(place, 60)
    for name in NAMES:
        assert mine.take(NAMES[NAMES.index(name):]) == name
        mine.finish(name)
    assert place.list() == {}


def test_what_others_own_is_left_to_them(place):
    many = [Claims(place, 60) for _ in NAMES]
    taken = [each.take(NAMES) for each in many]
    assert sorted(taken) == NAMES
    assert Claims(place, 60).take(NAMES) is None
    many[3].release(taken[3])
    assert Claims(place, 60).take(NAMES) == taken[3]


def test_starters_are_spread_over_the_list(place):
    Claims(place, 60).take(NAMES[:1])
    names = [f"pass-00000/shard-{i:05d}" for i in range(1000)]
    taken = [Claims(place, 60).take(names) for _ in range(16)]
    numbers = sorted(int(name[-5:]) for name in taken)
    assert len(set(numbers)) == 16
    assert numbers[-1] - numbers[0] > 300


def test_stale_by_the_observers_own_clock(place, monkeypatch, caplog):
    other_machine(monkeypatch, place)
    clock = Clock()
    mine = Claims(place, 60, clock)
    assert mine.take(NAMES[:1]) is None  # seen for the first time
    clock.now += 59
    assert mine.take(NAMES[:1]) is None
    beat(place, "pass-00000-shard-00000.0001")
    clock.now += 59
    assert mine.take(NAMES[:1]) is None  # its content changed: the lease begins again
    clock.now += 60
    caplog.set_level("INFO")
    assert mine.take(NAMES[:1]) == NAMES[0]
    assert "silent for 60 s" in caplog.text
    assert sorted(place.list()) == [f"pass-00000-shard-00000.000{i}" for i in (1, 2)]
    mine.finish(NAMES[0])
    assert place.list() == {}


def test_clocks_of_machines_are_not_compared(place, monkeypatch):
    """Neither a wall clock nor the times of files decide: both are years away here."""
    other_machine(monkeypatch, place, Clock())
    os.utime(place.path / "pass-00000-shard-00000.0001", (0, 0))
    monkeypatch.setattr(claims.time, "time", lambda: 4e9)
    clock = Clock()
    clock.now = -1e9
    mine = Claims(place, 60, clock)
    for _ in range(50):
        assert mine.take(NAMES[:1]) is None
        clock.now += 30
        beat(place, "pass-00000-shard-00000.0001")
        os.utime(place.path / "pass-00000-shard-00000.0001", (5e9, 5e9))


def test_a_pid_of_this_machine_that_does_not_run(place, monkeypatch, caplog):
    caplog.set_level("INFO")
    with monkeypatch.context() as m:
        m.setattr(claims.os, "getpid", dead_pid)
        Claims(place, 60).take(NAMES[:1])
    assert Claims(place, 60, Clock()).take(NAMES[:1]) == NAMES[0]
    assert "does not run any more" in caplog.text


@pytest.mark.parametrize("fields", [{"machine": "elsewhere"}, {"pid": "12"}, {"pid": -1},
                                    {"machine": None}])
def test_pids_are_judged_on_their_own_machine_alone(place, fields):
    with Claims(place, 60) as gone:
        gone.take(NAMES[:1])
        content = json.loads(place.read("pass-00000-shard-00000.0001")) | {"pid": dead_pid()}
        place.write("pass-00000-shard-00000.0001", json.dumps(content | fields).encode())
        assert Claims(place, 60, Clock()).take(NAMES[:1]) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_claim_that_says_nothing_is_judged_by_its_silence(place, content):
    place.write("pass-00000-shard-00000.0001", content)
    clock = Clock()
    mine = Claims(place, 60, clock)
    assert mine.take(NAMES[:1]) is None
    clock.now += 60
    assert mine.take(NAMES[:1]) == NAMES[0]


def test_an_owner_that_was_passed_over_owns_nothing(place, monkeypatch):
    slow = other_machine(monkeypatch, place)
    clock = Clock()
    fast = Claims(place, 60, clock)
    fast.take(NAMES[:1])
    clock.now += 60
    assert fast.take(NAMES[:1]) == NAMES[0]
    assert fast.owns(NAMES[0])
    assert not slow.owns(NAMES[0])
    slow.release(NAMES[0])  # leaves the other's
    assert list(place.list()) == ["pass-00000-shard-00000.0002"]
    fast.finish(NAMES[0])
    assert place.list() == {}
    assert not fast.owns(NAMES[0])


def test_two_generations_on(place, monkeypatch):
    """Whoever makes generation 3 owns; 1 and 2 go with it."""
    clock = Clock()
    line = []
    for generation in range(3):
        each = Claims(place, 60, clock)
        with monkeypatch.context() as m:
            m.setattr(claims.files, "machine", lambda generation=generation: str(generation))
            each.take(NAMES[:1])
            clock.now += 60
            assert generation == 0 or each.take(NAMES[:1]) == NAMES[0]
        line.append(each)
    assert [each.owns(NAMES[0]) for each in line] == [False, False, True]
    line[2].finish(NAMES[0])
    assert place.list() == {}


def test_leaving_removes_what_is_claimed(place):
    with pytest.raises(KeyboardInterrupt), Claims(place, 60) as mine:
        mine.take(NAMES)
        mine.take(NAMES)
        assert len(place.list()) == 2
        raise KeyboardInterrupt
    assert place.list() == {}


def test_an_interrupt_while_a_claim_is_written(place, monkeypatch):
    create = place.create

    def interrupted(name, data):
        create(name, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, "create", interrupted)
    with pytest.raises(KeyboardInterrupt), Claims(place, 60) as mine:
        mine.take(NAMES)
    assert place.list() == {}


def test_it_beats_while_it_works_and_not_after(place):
    file = "pass-00000-shard-00000.0001"
    with Claims(place, 0.2) as mine:
        mine.take(NAMES)
        observer = Claims(place, 0.2)
        until = time.monotonic() + 0.8
        beats = set()
        while time.monotonic() < until:
            assert observer.take(NAMES[:1]) is None
            beats.add(json.loads(place.read(file))["beat"])
            time.sleep(0.02)
        assert len(beats) > 5
        mine.finish(NAMES[0])
        time.sleep(0.15)
        assert place.list() == {}  # no beat brought it back
    assert not mine._thread.is_alive()


def test_a_beat_does_not_undo_a_takeover(place):
    """The owner's file was removed with its name's work done: beating must not bring it back."""
    with Claims(place, 0.1) as mine:
        mine.take(NAMES[:1])
        place.remove("pass-00000-shard-00000.0001")
        time.sleep(0.15)
        assert place.list() == {}
        assert not mine.owns(NAMES[0])


def test_sweeping(place, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(claims.os, "getpid", dead_pid)
        dead = Claims(place, 60)
        dead.take(NAMES[1:2])
        dead.take(NAMES[2:3])
    alive = Claims(place, 60)
    alive.take(NAMES[3:4])
    Claims(place, 60).sweep(NAMES[2:3])
    assert sorted(place.list()) == ["pass-00000-shard-00002.0001", "pass-00000-shard-00003.0001"]


def test_a_place_that_cannot_be_written(place, monkeypatch):
    def full(name, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, "create", full)
    with Claims(place, 60) as mine, pytest.raises(
            StoreError, match=r"shard-00000\.0001 cannot be written to .*claims: No space left"):
        mine.take(NAMES)


@pytest.mark.parametrize("dead", [False, True])
def test_of_threads_that_try_at_once_one_wins(place, monkeypatch, dead):
    """100 rounds of a free name, and of one whose owner died."""
    rounds, takers = 100, 4
    names = [f"pass-00000/shard-{i:05d}" for i in range(rounds)]
    if dead:
        with monkeypatch.context() as m:
            pid = dead_pid()
            m.setattr(claims.os, "getpid", lambda: pid)
            gone = Claims(place, 60)
            assert all(gone.take([name]) for name in names)
    barrier, won = threading.Barrier(takers), [[] for _ in range(takers)]

    def take(me):
        mine = Claims(place, 60)
        for name in names:
            barrier.wait()
            if mine.take([name]):
                won[me].append(name)
                assert mine.owns(name)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(takers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for each in won for name in each) == names


_TAKER = """
import sys, time
from pathlib import Path
from tinyvit_jax.store.claims import Claims
from tinyvit_jax.store.place import Folder
root, me = Path(sys.argv[1]), sys.argv[2]
(root / me).touch()
while not ((root / "0").exists() and (root / "1").exists()):
    time.sleep(0.001)
with Claims(Folder(root / "claims"), 60) as mine:
    won = [n for n in range(100) if mine.take([f"shard-{n}"])]
    print(*won, flush=True)
    sys.stdin.read()
"""


def test_of_processes_that_try_at_once_one_wins(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", _TAKER, str(tmp_path), str(i)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT)}) for i in range(2)]
    won = [[int(n) for n in p.stdout.readline().split()] for p in both]
    assert sorted(won[0] + won[1]) == list(range(100))
    both[0].kill()  # its claims stay, and its pid tells
    both[0].wait()
    left = [f"shard-{n}" for n in won[0]]
    mine = Claims(Folder(tmp_path / "claims"), 60)
    assert not left or mine.take(left) in left
    both[1].communicate("")
    assert both[1].returncode == 0
