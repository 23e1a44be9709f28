"""Cores of this process: affinity and quota."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvit_jax import cores

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("text", "expected"), [
    ("max 100000\n", 7), ("200000 100000\n", 2), ("150000 100000\n", 2), ("5000 100000\n", 1)])
def test_quota_is_rounded_up(tmp_path, text, expected):
    path = tmp_path / "cpu.max"
    path.write_text(text)
    assert cores.read_quota(path, 7) == expected


def test_without_a_quota_every_allowed_core_counts(tmp_path):
    assert cores.read_quota(tmp_path / "cpu.max", 7) == 7


def test_quota_limits_the_count(tmp_path, monkeypatch):
    path = tmp_path / "cpu.max"
    path.write_text("5000 100000")
    monkeypatch.setattr(cores, "_QUOTA", path)
    assert cores.count_cores() == 1
    path.write_text("max 100000")
    assert 1 <= cores.count_cores() <= (os.cpu_count() or 1)


def test_processes_share_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(cores.os, "process_cpu_count", lambda: 6, raising=False)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: range(6), raising=False)
    monkeypatch.setattr(cores.os, "cpu_count", lambda: 6)
    assert [cores.count_cores(n) for n in (1, 2, 4, 9)] == [6, 3, 1, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux pins a process to cores")
def test_affinity_limits_the_count():
    code = ("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
            "from tinyvit_jax import cores; print(cores.count_cores())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          check=True)
    assert done.stdout.strip() == "1"
