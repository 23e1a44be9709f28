"""The processes of a race: each contender's own, by turns, and what happens when one fails."""

import os

import pytest
from reference import bench_process


def make_counting(step):
    """A turn that does `step` things more each time, in a process that says its number."""
    done = [0]

    def turn():
        done[0] += step * len(list(range(1000))) // 1000  # long enough for any clock
        return done[0]

    return turn, float(os.getpid())


def make_failing():
    raise ValueError("no such device")


def make_failing_turn():
    def turn():
        raise ValueError("out of memory")

    return turn, 1.0


def make_dying():
    os._exit(3)


def test_contenders_live_apart_and_take_turns():
    with bench_process.start("a", make_counting, 3) as a, \
            bench_process.start("b", make_counting, 5) as b:
        processes = {os.getpid(), a.wait(), b.wait()}
        assert len(processes) == 3
        for _ in range(2):
            for contender in (a, b):
                per_second, per_cpu_second = contender.speed()
                assert 0 < per_second < float("inf")
                assert per_cpu_second > 0
    for process in processes - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(int(process), 0)


def test_failures_are_told_by_name():
    with (bench_process.start("x", make_failing) as x,
          pytest.raises(RuntimeError, match=r"(?s)contender 'x' failed.*no such device")):
        x.wait()
    with bench_process.start("y", make_failing_turn) as y:
        assert y.wait() == 1
        with pytest.raises(RuntimeError, match=r"(?s)contender 'y' failed.*out of memory"):
            y.speed()
    with (bench_process.start("z", make_dying) as z,
          pytest.raises(RuntimeError, match="process of the contender 'z' ended")):
        z.wait()
