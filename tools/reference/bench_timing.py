"""How races are run: contenders by turns in one process, medians and quartiles of what they did."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np


@contextlib.contextmanager
def one_cpu() -> Iterator[set[int]]:
    """Keeps this thread, and what it starts, on one CPU; yields those that it may use else.

    Where the system cannot do that, it yields none and the figures are of more than one core.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield set()
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield before - {max(before)}
    finally:
        os.sched_setaffinity(0, before)


def count_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
        os.cpu_count() or 1)


def speed(turn: Callable[[], int]) -> tuple[float, float]:
    """Things of a turn, which it counts, in each second and in each of this process's CPU time."""
    began, busy = time.perf_counter(), time.process_time()
    count = turn()
    return count / (time.perf_counter() - began), count / (time.process_time() - busy)


def race(turns: Mapping[str, Callable[[], int]], seconds: float, rounds: int
         ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """`race_speeds` of turns in this process, each of which returns how many things it did."""
    return race_speeds({name: partial(speed, turn) for name, turn in turns.items()}, seconds,
                       rounds)


def race_speeds(turns: Mapping[str, Callable[[], tuple[float, float]]], seconds: float, rounds: int
                ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Lets contenders take turns, one after the other, round by round.

    Args:
        turns: by name; each does some work and returns what `speed` does.
        seconds: that a contender has, about, on average.
        rounds: at the least.

    Returns:
        Of each contender and round: things a second, and things a second of CPU time.
    """
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    busy: dict[str, list[float]] = {name: [] for name in turns}
    began, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - began < seconds * len(turns):
        for name, turn in turns.items():
            per_second, per_cpu_second = turn()
            speeds[name].append(per_second)
            busy[name].append(per_cpu_second)
        done += 1
    return speeds, busy


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, low and high: the three quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(middle), "low": float(low), "high": float(high)}


def race_rows(speeds: Mapping[str, list[float]], rivals: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each contender: its speed, and its ratio to each rival in the same rounds."""
    return [{"what": name, "rounds": len(values), **quartiles(values),
             "against": {rival: quartiles([a / b for a, b in zip(values, speeds[rival],
                                                                 strict=False)])
                         for rival in rivals}}
            for name, values in speeds.items()]
