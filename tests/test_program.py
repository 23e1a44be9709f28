import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinyvit_jax import mesh as meshes
from tinyvit_jax import program


@pytest.fixture
def mesh():
    return meshes.make_mesh()


def make_update():
    def update(state, batch):
        return jax.tree.map(lambda x: x + batch["x"].sum(), state), batch["x"].mean()

    return jax.jit(update, donate_argnums=0)


def put(mesh, rows):
    return meshes.put_batch({"x": np.ones((rows, 3), np.float32)}, mesh)


def start(mesh, compiler, rows=4):
    state = meshes.put_state({"w": np.zeros((2, 5), np.float32)}, mesh)
    shapes = (program.describe_arrays(state, meshes.replicated(mesh)),
              program.describe_arrays(put(mesh, rows), meshes.sharded(mesh)))
    return program.Program(make_update(), shapes, compiler, "the update"), state


def test_what_was_compiled_ahead_is_what_is_called(mesh, caplog):
    with program.compiling() as compiler:
        update, state = start(mesh, compiler)
        memory, seconds = update.wait()
        batch, built = put(mesh, 4), program.count_compilations()
        for _ in range(3):
            state, _ = update(state, batch)
    assert program.count_compilations() == built
    assert not caplog.messages
    assert update.recompiled == 0
    assert memory.arguments == 4 * (10 + 12)
    assert seconds > 0
    assert float(state["w"][0, 0]) == 36


def test_another_shape_is_said(mesh, caplog):
    with program.compiling() as compiler, caplog.at_level(logging.WARNING):
        update, state = start(mesh, compiler)
        update.wait()
        state, _ = update(state, put(mesh, 2))
        state, _ = update(state, put(mesh, 2))  # known by now
    assert update.recompiled == 1
    assert len(caplog.messages) == 1
    assert "the update: compiled again" in caplog.text
    assert "x was float32[4, 3] " in caplog.text
    assert "is float32[2, 3] " in caplog.text
    assert "w was" not in caplog.text


def test_an_error_of_the_compilation_is_the_waiters(mesh):
    broken = jax.jit(lambda state, batch: state["w"] @ batch["x"])
    with program.compiling() as compiler:
        _, state = start(mesh, compiler)
        shapes = program.describe_arrays((state, put(mesh, 4)), meshes.replicated(mesh))
        with pytest.raises(TypeError, match="dot_general"):
            program.Program(broken, shapes, compiler, "broken").wait()


def test_only_this_threads_compilations_count(mesh):
    before = program.count_compilations()
    with program.compiling() as compiler:
        compiler.submit(lambda: jax.jit(lambda x: x * 3)(jnp.ones(7))).result()
        assert program.count_compilations() == before
        jax.jit(lambda x: x * 4)(np.ones(7))
    assert program.count_compilations() == before + 1


@pytest.mark.parametrize("unknown", [{}, {"xla_of_another_year": False}])
def test_a_program_that_runs_once_gives_the_same(unknown, monkeypatch):
    def draw(key, scale):
        return {"w": jax.random.truncated_normal(key, -2, 2, (7, 5)) * scale}

    monkeypatch.setattr(program, "_OLD_EMITTERS", program._OLD_EMITTERS | unknown)
    key, scale = jax.random.key(3), jnp.float32(0.02)
    found = program.run_once(draw, key, scale)
    np.testing.assert_array_equal(found["w"], jax.jit(draw)(key, scale)["w"])


def test_another_error_of_xla_is_not_taken_for_an_unknown_option(monkeypatch):
    tried = []

    class Lowered:
        def compile(self, compiler_options):
            tried.append(compiler_options)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax, "jit", lambda function: type("", (), {"lower": lambda *_: Lowered()}))
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        program.run_once(None)
    assert len(tried) == 1
