"""The process that a command runs in; its flags and errors are in test_config.py and others."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyvit_jax import cli

ROOT = Path(__file__).parents[1]


@pytest.fixture
def started(monkeypatch):
    """What the process was started anew with: nothing, or (program, arguments, environment)."""
    calls: list = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.extend(arguments))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return calls


def test_a_command_starts_anew_as_it_was(started, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=1")
    cli.keep_freed_memory()
    program, arguments, environment = started
    assert (program, arguments) == (sys.executable, sys.orig_argv)
    first, *rest = environment["GLIBC_TUNABLES"].split(":")
    assert first == "glibc.pthread.rseq=1"
    assert all(setting.startswith("glibc.malloc.") for setting in rest)
    assert {k: v for k, v in environment.items() if k != "GLIBC_TUNABLES"} == {
        k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}


@pytest.mark.parametrize(("version", "counted"), [
    ("glibc 2.36", True), ("glibc 2.30", True), ("glibc 2.28", False), ("", False),
    (ValueError("unrecognized configuration name"), False)])
def test_an_old_glibc_is_not_told_how_many_pieces_to_keep(started, monkeypatch, version, counted):
    def confstr(name):
        if isinstance(version, Exception):
            raise version
        return version

    monkeypatch.setattr(os, "confstr", confstr)
    cli.keep_freed_memory()
    assert ("tcache_count" in started[2]["GLIBC_TUNABLES"]) == counted


def test_it_starts_once_and_leaves_the_users_own_settings(started, monkeypatch):
    cli.keep_freed_memory()
    own = started[2]["GLIBC_TUNABLES"]
    for settings in (own, "glibc.malloc.arena_max=4"):
        started.clear()
        monkeypatch.setenv("GLIBC_TUNABLES", settings)
        cli.keep_freed_memory()
        assert not started


@pytest.mark.parametrize(("platform", "plugin"), [("darwin", ""), ("linux", "libtpu"),
                                                  ("linux", "jax_plugins")])
def test_it_stays_where_it_is_of_no_use(started, monkeypatch, platform, plugin):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == plugin or None)
    cli.keep_freed_memory()
    assert not started


def test_a_process_that_cannot_start_anew_goes_on(started, monkeypatch):
    def fail(*_):
        raise OSError("not permitted")

    monkeypatch.setattr(os, "execve", fail)
    cli.keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_main_command_keeps_its_arguments_and_memory(tmp_path):
    """Freed memory stays with the process; and the error comes from the arguments as typed."""
    code = ("import os; from tinyvit_jax import cli; cli.keep_freed_memory()\n"
            "import resource, numpy as np\n"
            "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "np.ones(1 << 23); before = faults()\n"
            "for _ in range(8): np.ones(1 << 23)\n"
            "print(faults() - before)")
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, check=True)
    if importlib.util.find_spec("jax_plugins") is None and (
            importlib.util.find_spec("libtpu") is None):
        assert int(done.stdout) < 1000  # 8 x 16,384 pages where they are given back
    done = subprocess.run([sys.executable, "-m", "tinyvit_jax.main", "--config=none of these.py"],
                          env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "none of these.py" in done.stderr
