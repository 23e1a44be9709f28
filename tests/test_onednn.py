"""Products by oneDNN: only where they are asked for, the same numbers, and no process that ends."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import cli, onednn
from tinyvit_jax import config as configs

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _restore():
    yield
    onednn.turn_on(False)
    onednn._kept.clear()


def test_nobody_gets_it_who_did_not_ask(monkeypatch):
    monkeypatch.setattr(onednn, "_OPTIONS", {"xla_of_another_year": True})
    assert float(onednn.jit(lambda x: x + 1)(1.0)) == 2.0
    assert onednn._kept == []


def test_an_xla_that_does_not_know_it_goes_without(monkeypatch, caplog):
    monkeypatch.setattr(onednn, "_OPTIONS", {"xla_of_another_year": True})
    config = configs.default()
    cli.use_onednn(config)
    assert not caplog.messages
    config.onednn = True
    cli.use_onednn(config)
    assert "--config.onednn=True changes nothing here" in caplog.text
    assert float(onednn.jit(lambda x: x + 1)(1.0)) == 2.0


def test_another_device_goes_without(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not onednn.turn_on()


def test_what_is_asked_for_reaches_the_compiler_and_can_be_turned_off(monkeypatch):
    monkeypatch.setattr(onednn, "_is_at_hand", lambda: True)
    monkeypatch.setattr(onednn, "_OPTIONS", {"xla_of_another_year": True})
    assert onednn.turn_on()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_another_year"):
        onednn.jit(jnp.sin)(1.0)
    assert len(onednn._kept) == 1
    assert not onednn.turn_on(False)
    assert float(onednn.jit(jnp.sin)(0.0)) == 0.0


_RUN = """
import sys
import jax, jax.numpy as jnp, numpy as np
from tinyvit_jax import cli, models, onednn
cli.use_compilation_cache()
model = models.create_model("tiny_vit_1m_32", 10, None)
draw = np.random.default_rng(0).standard_normal
x = draw((4, 32, 32, 3)).astype(np.float32)
shapes = jax.eval_shape(lambda k: model.init(k, x, train=False), jax.random.key(0))
v = jax.tree.map(lambda a: np.abs(draw(a.shape) * 0.3).astype(np.float32), shapes)

def value(v, x):
    return model.apply(v, x, train=False)

def gradient(v, x):
    return jax.grad(lambda p: jnp.square(value({**v, "params": p}, x)).mean())(v["params"])

at_hand = onednn.turn_on()
programs = onednn.jit(value), onednn.jit(gradient)
print(at_hand, *("onednn" in p.lower(v, x).compile().as_text() for p in programs))
flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
np.savez(sys.argv[1], value=programs[0](v, x), plain_value=jax.jit(value)(v, x),
         gradient=flat(programs[1](v, x)), plain_gradient=flat(jax.jit(gradient)(v, x)))
square = jnp.ones((256, 256))
for i in range(40):  # forgotten while they run
    result = onednn.jit(lambda x: jnp.tanh(jnp.tanh(x @ x) @ x) @ x * i)(square)
result.block_until_ready()
"""


def test_a_model_gives_the_same_and_nothing_warns(tmp_path):
    """Where XLA has it, and where it has not; value and gradient."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _RUN, tmp_path / "out.npz"],
        text=True, capture_output=True,
        env={**env, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")})
    assert done.returncode == 0, done.stderr[-2000:]
    at_hand, *used = done.stdout.split()
    assert set(used) == {at_hand}
    found = np.load(tmp_path / "out.npz")
    for what in ("value", "gradient"):
        plain = found[f"plain_{what}"]
        assert np.abs(plain).max() > 0
        np.testing.assert_allclose(found[what], plain, atol=1e-5 * np.abs(plain).max(), rtol=0)
