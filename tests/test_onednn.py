"""Products by oneDNN: where they are asked for, that they are the same, and that nothing warns."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tinyvit_jax import onednn

ROOT = Path(__file__).parents[1]
_INTEL = "vendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"


@pytest.fixture(autouse=True)
def _forget():
    onednn.find_options.cache_clear()
    yield
    onednn.find_options.cache_clear()


def info(folder, text):
    path = folder / "cpuinfo"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("text", "measured"), [
    (_INTEL, True), (_INTEL.replace("GenuineIntel", "AuthenticAMD"), False),
    (_INTEL.replace("avx512f ", ""), False), ("", False)])
def test_only_processors_it_was_measured_on_are_asked_to_use_it(tmp_path, text, measured):
    assert onednn.is_measured(info(tmp_path, text)) == measured


def test_a_system_that_does_not_describe_its_processors_goes_without(tmp_path):
    assert not onednn.is_measured(tmp_path / "none")


@pytest.mark.parametrize("change", ["flags", "backend", "processor", "library"])
def test_each_reason_against_it_is_enough(tmp_path, monkeypatch, change):
    monkeypatch.setattr(onednn, "_CPU_INFO", info(tmp_path, _INTEL))
    monkeypatch.setattr(onednn, "_is_at_hand", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert dict(onednn.find_options()) == onednn._OPTIONS
    onednn.find_options.cache_clear()
    if change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_onednn=true")
    elif change == "backend":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    elif change == "processor":
        onednn._CPU_INFO.write_text("", encoding="utf-8")
    else:
        monkeypatch.setattr(onednn, "_is_at_hand", lambda: False)
    assert onednn.find_options() == ()


def test_an_xla_without_the_options_goes_without(monkeypatch):
    monkeypatch.setattr(onednn, "_OPTIONS", {"xla_of_another_year": True})
    assert not onednn._is_at_hand()


_RUN = """
import pathlib, sys
import jax, numpy as np
from tinyvit_jax import cli, models, onednn
onednn._CPU_INFO = pathlib.Path(sys.argv[1])
cli.use_compilation_cache()
model = models.create_model("tiny_vit_1m_32", 10, None)
draw = np.random.default_rng(0).standard_normal
x = draw((4, 32, 32, 3)).astype(np.float32)
shapes = jax.eval_shape(lambda k: model.init(k, x, train=False), jax.random.key(0))
v = jax.tree.map(lambda a: np.abs(draw(a.shape) * 0.3).astype(np.float32), shapes)
apply = lambda v, x: model.apply(v, x, train=False)
program = onednn.jit(apply)
print(onednn._is_at_hand(), "onednn" in program.lower(v, x).compile().as_text())
np.savez(sys.argv[2], ours=program(v, x), plain=jax.jit(apply)(v, x))
"""


def test_a_model_gives_the_same_and_nothing_warns(tmp_path):
    """On a machine where XLA has it; elsewhere that both programs are the plain one."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _RUN, info(tmp_path, _INTEL), tmp_path / "out.npz"],
        text=True, capture_output=True,
        env={**env, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")})
    assert done.returncode == 0, done.stderr[-2000:]
    at_hand, used = done.stdout.split()
    assert used == at_hand
    found = np.load(tmp_path / "out.npz")
    scale = np.abs(found["plain"]).max()
    assert scale > 0.1
    np.testing.assert_allclose(found["ours"], found["plain"], atol=1e-5 * scale, rtol=0)
