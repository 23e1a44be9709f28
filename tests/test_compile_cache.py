"""Cut entries of the compilation cache go, whole ones stay; and a second start compiles nothing."""

import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from tinyvit_jax import compile_cache

ROOT = Path(__file__).parents[1]
NOISE = np.random.default_rng(0).bytes(300_000)  # blocks as they are
REPEATED = bytes(400_000)  # blocks of one byte, repeated
TEXT = b"fusion.1 = f32[128] " * 20_000  # compressed blocks


def write(path, data, age=60.0):
    path.write_bytes(data)
    os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize("content", [NOISE, REPEATED, TEXT, b"", b"x"], ids=len)
@pytest.mark.parametrize("options", [{}, {"write_checksum": True}, {"write_content_size": False}],
                         ids=str)
def test_entries_cut_anywhere_go(content, options, tmp_path):
    whole = zstandard.ZstdCompressor(**options).compress(content)
    cuts = sorted({0, 1, 4, 5, 6, 8, len(whole) // 2, len(whole) - 5, len(whole) - 1}
                  & set(range(len(whole))))
    write(tmp_path / "whole-cache", whole)
    for cut in cuts:
        write(tmp_path / f"{cut}-cache", whole[:cut])
    assert compile_cache.remove_cut_entries(tmp_path) == len(cuts)
    assert [p.name for p in tmp_path.iterdir()] == ["whole-cache"]


def test_what_is_not_known_to_be_cut_stays(tmp_path):
    frame = zstandard.compress(NOISE)
    write(tmp_path / "young-cache", frame[:1000], age=0.0)  # another process may be writing it
    write(tmp_path / "zlib-cache", zlib.compress(NOISE)[:1000])
    write(tmp_path / "other-file", frame[:1000])
    assert compile_cache.remove_cut_entries(tmp_path) == 0
    assert compile_cache.remove_cut_entries(tmp_path / "none") == 0
    assert len(list(tmp_path.iterdir())) == 3


_START = """
import jax
from tinyvit_jax import cli
cli.use_compilation_cache()
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: sum(jax.numpy.sin(x * i) @ x for i in range(20)))(jax.numpy.ones((8, 8)))
print(jax.config.jax_compilation_cache_dir, *(n.split("/")[-1] for n in found if "cache_" in n))
"""


def start(home, **changes):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _START], text=True, capture_output=True,
        env={**env, "JAX_PLATFORMS": "cpu", "HOME": str(home), "PYTHONPATH": str(ROOT), **changes})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_a_second_start_reads_what_the_first_compiled(tmp_path):
    every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    folder = tmp_path / ".cache" / "tinyvit_jax" / "xla"
    assert start(tmp_path, **every)[0] == str(folder)
    entries = list(folder.glob("*-cache"))
    assert entries
    for entry in entries:  # as a kill leaves them
        write(entry, entry.read_bytes()[:100])
    assert "cache_misses" in start(tmp_path, **every)  # a warning would be an error here
    assert "cache_misses" not in start(tmp_path, **every)
    assert start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ["None"]
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "x"))[0] == str(tmp_path / "x")
