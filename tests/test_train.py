import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tinyvit_jax import checkpoint, log, optim, train, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import augment, pipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def make_config(folder, **changes):
    c = tiny.make_config(folder)
    c.objective.name = "supervised"
    c.train.epochs = 1.5  # 33 images in batches of 8: 6 updates
    c.checkpoint.every_epochs = c.eval.every_epochs = 0.25
    c.checkpoint.keep_last = 10
    c.update_from_flattened_dict(changes)
    return c


def final_state(workdir, step=6):
    variables, _ = checkpoint.load_variables(workdir / "checkpoints", step)
    return variables


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Killed(BaseException):
    pass


def kill_after(monkeypatch, batches):
    """Makes the stream of training batches die, as the process would, after so many."""
    whole = pipeline.batch_stream

    def stream(source, start=0, **options):
        for number, batch in enumerate(whole(source, start, **options)):
            if isinstance(source, pipeline.TrainBatches) and number == batches:
                raise Killed
            yield batch

    monkeypatch.setattr(pipeline, "batch_stream", stream)


def test_resume_is_bit_exact_with_other_workers(folder, tmp_path, monkeypatch):
    c = make_config(folder, **{"optim.ema": 0.9, "train.accumulate": 2})
    data = train.open_data(c)
    unbroken = train.fit(c, tmp_path / "a", data)
    with monkeypatch.context() as m:
        kill_after(m, 3)
        with pytest.raises(Killed):
            train.fit(c, tmp_path / "b", data)
    assert not (tmp_path / "b" / "fit.json").exists()
    c.data.threads, c.data.workers = 1, 2
    resumed = train.fit(c, tmp_path / "b", data)
    assert_equal(final_state(tmp_path / "a"), final_state(tmp_path / "b"))
    assert {k: unbroken[k] for k in ("top1", "top5", "loss")} == {
        k: resumed[k] for k in ("top1", "top5", "loss")}
    steps = [m["step"] for m in log.read_metrics(tmp_path / "b" / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert train.fit(c, tmp_path / "b", data) == resumed  # done: nothing runs again


def test_another_config_does_not_resume(folder, tmp_path):
    c = make_config(folder)
    data = train.open_data(c)
    train.record_config(c, tmp_path, data)
    moved = make_config(shutil.copytree(folder, tmp_path / "moved"), **{"data.threads": 7})
    train.record_config(moved, tmp_path, train.open_data(moved))
    with pytest.raises(train.TrainingError, match=r"optim\.learning_rate was 0\.05, now 0\.1"):
        train.record_config(make_config(folder, **{"optim.learning_rate": 0.1}), tmp_path, data)
    (tmp_path / "moved" / "blobs" / "000.jpg").unlink()
    with pytest.raises(train.TrainingError, match=r"images\.train was"):
        train.record_config(moved, tmp_path, train.open_data(moved))


def step_once(config, data, batch):
    """One update from the initial state; returns (state, metrics)."""
    mesh = meshes.make_mesh()
    model = train.make_student(config, data)

    def schedule(step):
        return 0.01

    def make_tx(params):
        return optim.make_optimizer(config.optim, params)

    state = meshes.put_state(train.init_state(config, model, make_tx), mesh)
    step = train.make_train_step(config, model, make_tx(state.params), schedule, mesh)
    return step(state, meshes.put_batch(batch, mesh))


def one_batch(config, data, size=8):
    spec = augment.make_spec(config.augment, 16)
    return pipeline.Views(data.train, spec, data.order).read(np.arange(size))


def test_accumulation_is_the_mean_of_its_parts(folder):
    """With BatchNorm frozen and no drop path, k micro-batches are one large batch."""
    changes = {"model.freeze_norm": True, "model.drop_path": 0.0}
    c = make_config(folder, **changes)
    data = train.open_data(c)
    batch = one_batch(c, data)
    whole, whole_metrics = step_once(c, data, batch)
    parts, metrics = step_once(make_config(folder, **changes, **{"train.accumulate": 4}), data,
                               batch)
    assert float(metrics["loss"]) == pytest.approx(float(whole_metrics["loss"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.opt_state,
                 parts.opt_state)


def test_micro_batches_keep_pairs_and_their_mixing():
    batch = {"image": jnp.arange(8), "lam": jnp.arange(4), "box": jnp.arange(16).reshape(4, 4)}
    parts = train._micro_batches(batch, 2)
    assert parts["image"].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert parts["lam"].tolist() == [[0, 2], [1, 3]]
    assert parts["box"].shape == (2, 2, 4)


def test_fine_tuning_the_head_alone(folder, tmp_path, monkeypatch):
    """Nothing else moves, and the accuracy before is measured once, though the run was killed."""
    c = make_config(folder, **{"model.trainable": "head", "optim.weight_decay": 0.5})
    data = train.open_data(c)
    model = train.make_student(c, data)
    state = train.init_state(c, model, lambda p: optim.make_optimizer(c.optim, p))
    start = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    c.model.init_from = str(tmp_path / "start")
    weights.save_trained(weights.Trained(model, start, data.train.class_names, c.data.mean,
                                         c.data.std, "center", 1.0), c.model.init_from)
    with monkeypatch.context() as m:
        kill_after(m, 4)
        with pytest.raises(Killed):
            train.fit(c, tmp_path / "run", data)
    result = train.fit(c, tmp_path / "run", data)
    final = final_state(tmp_path / "run")
    assert_equal({**start["params"], "head": 0}, {**final["params"], "head": 0})
    assert_equal(start["batch_stats"], final["batch_stats"])
    assert (start["params"]["head"]["kernel"] != final["params"]["head"]["kernel"]).any()
    lines = log.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in lines].count(0) == 1
    expected = train.make_evaluator(c, model, data.eval, None, meshes.make_mesh())(start)
    assert result["top1_before"] == lines[0]["eval_top1"] == expected["top1"]
    assert result["top5_before"] == expected["top5"]


def test_a_non_finite_update_is_skipped(folder):
    c = make_config(folder, **{"optim.ema": 0.5})
    data = train.open_data(c)
    batch = one_batch(c, data)
    batch["lam"] = np.full(4, np.nan, np.float32)
    model = train.make_student(c, data)
    before = train.init_state(c, model, lambda p: optim.make_optimizer(c.optim, p))
    after = step_once(c, data, one_batch(c, data))[0]
    state, metrics = step_once(c, data, batch)
    assert int(state.step) == 1
    assert int(state.skipped) == int(metrics["skipped"]) == 1
    assert_equal(before[1:5], state[1:5])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert sum(jax.tree.leaves(moved)) > 20


def test_a_run_of_nothing_but_skipped_updates_stops(folder, tmp_path, monkeypatch):
    c = make_config(folder, **{"train.max_skipped": 2})
    monkeypatch.setattr(train.mix, "normalize", lambda x, mean, std: x * np.nan)
    with pytest.raises(train.TrainingError, match="non-finite gradient"):
        train.fit(c, tmp_path, train.open_data(c))


def test_the_source_decides_the_number_of_classes(folder):
    with pytest.raises(ValueError, match=r"num_classes=7 contradicts .* 3 classes"):
        train.open_data(make_config(folder, **{"model.num_classes": 7}))


_ON_DEVICES = """
import sys, tiny, jax, numpy as np
from pathlib import Path
from tinyvit_jax import train
folder, workdir = sys.argv[1:]
c = tiny.make_config(folder)
c.objective.name = "supervised"
c.train.epochs, c.train.batch_size, c.train.accumulate = 2.0, 16, 2
c.optim.learning_rate = 1e-3
result = train.fit(c, Path(workdir), train.open_data(c))
print(len(jax.devices()), result["loss"])
"""


def test_one_and_four_devices_agree(folder, tmp_path):
    states = {}
    for devices in (1, 4):
        flags = (f"{os.environ['XLA_FLAGS']} "
                 f"--xla_force_host_platform_device_count={devices}")
        done = subprocess.run(
            [sys.executable, "-c", _ON_DEVICES, folder, tmp_path / str(devices)], text=True,
            capture_output=True, env={**os.environ, "XLA_FLAGS": flags,
                                      "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split()[0] == str(devices)
        states[devices] = final_state(tmp_path / str(devices), step=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), states[1], states[4])
    losses = [json.loads((tmp_path / d / "metrics.jsonl").read_text().splitlines()[0])["loss"]
              for d in ("1", "4")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr(meshes.jax, "device_count", lambda: 8)
    meshes.check_rows(64, "train.batch_size")
    with pytest.raises(ValueError, match=r"train\.batch_size: a batch of 100 .* 8 devices.*96"):
        meshes.check_rows(100, "train.batch_size")
    with pytest.raises(ValueError, match=r"8 devices, in multiples of 4 on each.* 96"):
        meshes.check_rows(104, "train.batch_size", 4)


_ONE_OF_TWO = """
import sys, tiny, jax
from pathlib import Path
from tinyvit_jax import train
folder, workdir, port, process = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
c = tiny.make_config(folder)
c.objective.name = "supervised"
c.train.epochs, c.train.batch_size, c.train.accumulate = 2.0, 16, 2
c.optim.learning_rate = 1e-3
result = train.fit(c, Path(workdir), train.open_data(c))
print(jax.process_count(), len(jax.devices()), result["count"], result["loss"])
"""


def test_two_processes_are_one_run(folder, tmp_path):
    """Two real processes over loopback give what one process with two devices gives."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    both = [subprocess.Popen(
        [sys.executable, "-c", _ONE_OF_TWO, folder, tmp_path / "two", str(port), str(i)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for i in range(2)]
    out = [p.communicate(timeout=300) for p in both]
    assert [p.returncode for p in both] == [0, 0], out[0][1][-2000:] + out[1][1][-2000:]
    said = [text.splitlines()[-1].split() for text, _ in out]
    assert said[0] == said[1]
    assert said[0][:3] == ["2", "2", "3"]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    alone = subprocess.run(
        [sys.executable, "-c", _ON_DEVICES, folder, tmp_path / "one"], text=True,
        capture_output=True, env={**environment, "XLA_FLAGS": flags})
    assert alone.returncode == 0, alone.stderr[-2000:]
    a, b = (final_state(tmp_path / w, step=4) for w in ("one", "two"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)
