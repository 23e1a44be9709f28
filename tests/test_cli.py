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


needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))),
    reason="glibc, and a machine without accelerators")


def _run(code: str, **options) -> subprocess.CompletedProcess:
    """Runs Python's `code` in a process whose allocator nothing has told anything."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": str(ROOT)}, check=True, **options)


@needs_glibc
def test_freed_memory_stays_with_the_process():
    done = _run("import os; from tinyvit_jax import cli; cli.keep_freed_memory()\n"
                "import resource, numpy as np\n"
                "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
                "np.ones(1 << 23); before = faults()\n"
                "for _ in range(8): np.ones(1 << 23)\n"
                "print(faults() - before)")
    assert int(done.stdout) < 1000  # 8 x 16,384 pages where they are given back


@needs_glibc
def test_memory_that_is_kept_is_used_again():
    """Batch after batch of inference, no memory is added but at the beginning."""
    done = _run("""
from tinyvit_jax import cli
cli.keep_freed_memory()
from functools import partial
from pathlib import Path
import jax, jax.numpy as jnp
from tinyvit_jax.models import create_model

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

model = create_model("tiny_vit_1m_32", 10)
images = jnp.zeros((64, 32, 32, 3))
shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
apply = jax.jit(partial(model.apply, train=False)).lower(variables, images).compile()
apply(variables, images).block_until_ready()
before = resident()
for _ in range(100):
    apply(variables, images).block_until_ready()
print((resident() - before) / apply.memory_analysis().temp_size_in_bytes)
""")
    assert float(done.stdout) < 15  # times the working memory of a call


def test_the_main_command_keeps_its_arguments(tmp_path):
    """The error comes from the arguments as typed, though the process began anew."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-m", "tinyvit_jax.main", "--config=none of these.py"],
                          env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode != 0
    assert "none of these.py" in done.stderr
