import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from tinyvit_jax import checkpoint
from tinyvit_jax import mesh as meshes


def make_state(value, ema=True):
    state = {"step": jnp.asarray(value), "params": {"a": jnp.full((2, 3), float(value))},
             "batch_stats": {"m": jnp.zeros(3)}, "opt_state": (jnp.ones(2), (), {"x": jnp.ones(1)}),
             "ema": {"a": jnp.full((2, 3), value / 2)} if ema else {}, "skipped": jnp.asarray(0)}
    return meshes.put_state(state, meshes.make_mesh())


def test_keeps_the_last_and_the_best(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c", keep_last=2, keep_best=True) as c:
        for step, top1 in ((1, 10.0), (2, 90.0), (3, 50.0), (4, None), (5, 60.0)):
            c.save(step, make_state(step), top1)
    assert sorted(p.name for p in (tmp_path / "c").iterdir() if p.is_dir()) == ["2", "4", "5"]
    assert checkpoint.load_variables(tmp_path / "c")[1] == 5
    variables, step = checkpoint.load_variables(tmp_path / "c", "best")
    assert step == checkpoint.find_step(tmp_path / "c", "best") == 2
    assert checkpoint.find_step(tmp_path / "c") == 5
    np.testing.assert_array_equal(variables["params"]["a"], np.full((2, 3), 1.0))  # the average
    variables, _ = checkpoint.load_variables(tmp_path / "c", 5)
    np.testing.assert_array_equal(variables["params"]["a"], np.full((2, 3), 2.5))


def test_restores_exactly(tmp_path):
    state = make_state(3, ema=False)
    with checkpoint.Checkpoints(tmp_path / "c") as c:
        assert c.latest is None
        c.save(3, state)
    with checkpoint.Checkpoints(tmp_path / "c") as c:
        assert c.latest == 3
        again = c.restore(3, make_state(0, ema=False))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_another_model_is_refused(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c") as c:
        c.save(1, make_state(1))
    other = make_state(1) | {"params": {"a": jnp.zeros((4, 4)), "b": jnp.zeros(2)}}
    with checkpoint.Checkpoints(tmp_path / "c") as c, pytest.raises(
            checkpoint.CheckpointError, match="another --workdir"):
        c.restore(1, meshes.put_state(other, meshes.make_mesh()))


def test_another_optimisers_state_is_not_called_damaged(tmp_path):
    def with_optimizer(opt_state):
        return meshes.put_state(make_state(1) | {"opt_state": opt_state}, meshes.make_mesh())

    each = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    packed = {"decayed": jnp.ones(6), "plain": jnp.ones(3)}
    with checkpoint.Checkpoints(tmp_path / "c") as c:
        c.save(1, with_optimizer(({"mu": each, "nu": each}, ())))
    with checkpoint.Checkpoints(tmp_path / "c") as c:
        with pytest.raises(checkpoint.CheckpointError, match=(
                r"holds this model, and the state of another optimiser.*--config\.model\.init_from="
                + str(tmp_path))) as caught:
            c.restore(1, with_optimizer(({"mu": packed, "nu": packed}, ())))
        assert "damaged" not in str(caught.value)
    variables, _ = checkpoint.load_variables(tmp_path / "c")  # what init_from reads
    np.testing.assert_array_equal(variables["params"]["a"], np.full((2, 3), 0.5))


def test_half_written_and_damaged_checkpoints(tmp_path):
    with checkpoint.Checkpoints(tmp_path / "c") as c:
        c.save(1, make_state(1))
    for file in (tmp_path / "c" / "1").rglob("*"):
        if file.is_file() and "ocdbt" in str(file) and file.stat().st_size > 64:
            file.write_bytes(file.read_bytes()[:40])
    # A process of its own: orbax gives up at the first array it cannot read, and what it had
    # asked for besides may come back while another test runs ("Event loop is closed").
    code = ("import sys; from tinyvit_jax import checkpoint\n"
            "checkpoint.load_variables(sys.argv[1])")
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "c"], capture_output=True,
                           text=True, cwd=processes.ROOT, timeout=300)
    assert ended.returncode == 1
    assert re.search(rf"CheckpointError: The checkpoint {tmp_path}/c/1 is damaged: .*Delete it",
                     ended.stderr), ended.stderr
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        checkpoint.load_variables(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(checkpoint.CheckpointError, match="no whole checkpoint"):
        checkpoint.load_variables(tmp_path / "empty")
