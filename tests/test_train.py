import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tinyvit_jax import checkpoint, evaluate, log, measure, train, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.convert import tree
from tinyvit_jax.data import augment, pipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def make_config(folder, **changes):
    c = tiny.make_config(folder)
    c.objective.name = "supervised"
    c.model.update(tiny.STUDENT)
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


def test_resume_is_bit_exact_with_other_workers(folder, tmp_path, monkeypatch):
    c = make_config(folder, **{"optim.ema": 0.9, "train.accumulate": 2})
    data = train.open_data(c)
    unbroken = train.fit(c, tmp_path / "a", data)
    with monkeypatch.context() as m:
        tiny.kill_after(m, 3)
        with pytest.raises(tiny.Killed):
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


@pytest.mark.parametrize(("changes", "asked"), [
    ({}, {"train_step", "eval_step"}),
    ({"data.resident": True, "augment.spec": "small", "augment.rand_augment": "",
      "augment.erase": 0.0}, {"run", "eval_step"})])  # the step is a part of the loop
def test_updates_and_evaluation_take_onednn_where_it_is_on(
        folder, tmp_path, given_to_onednn, changes, asked):
    c = make_config(folder, **{"train.epochs": 0.5, **changes})
    train.fit(c, tmp_path, train.open_data(c))
    assert given_to_onednn == asked


def step_once(config, data, batch):
    """One update from the initial state; returns (state, metrics)."""
    mesh = meshes.make_mesh()
    model = train.make_student(config, data)

    def schedule(step):
        return 0.01

    state = meshes.put_state(train.init_state(config, model), mesh)
    step = train.make_train_step(config, model, schedule, mesh)
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
    state = train.init_state(c, model)
    start = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
    c.model.init_from = str(tmp_path / "start")
    weights.save_trained(weights.Trained(model, start, data.train.class_names, c.data.mean,
                                         c.data.std, "center", 1.0), c.model.init_from)
    with monkeypatch.context() as m:
        tiny.kill_after(m, 4)
        with pytest.raises(tiny.Killed):
            train.fit(c, tmp_path / "run", data)
    result = train.fit(c, tmp_path / "run", data)
    final = final_state(tmp_path / "run")
    assert_equal({**start["params"], "head": 0}, {**final["params"], "head": 0})
    assert_equal(start["batch_stats"], final["batch_stats"])
    assert (start["params"]["head"]["kernel"] != final["params"]["head"]["kernel"]).any()
    lines = log.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in lines].count(0) == 1
    judge, _ = measure.make_judge(c, model, data.eval, None, meshes.make_mesh())
    expected = evaluate.score(judge(start))
    assert result["top1_before"] == lines[0]["eval_top1"] == expected["top1"]
    assert result["top5_before"] == expected["top5"]


def test_a_non_finite_update_is_skipped(folder):
    c = make_config(folder, **{"optim.ema": 0.75})
    data = train.open_data(c)
    batch = one_batch(c, data)
    batch["lam"] = np.full(4, np.nan, np.float32)
    model = train.make_student(c, data)
    before = train.init_state(c, model)
    after = step_once(c, data, one_batch(c, data))[0]
    state, metrics = step_once(c, data, batch)
    assert int(state.step) == 1
    assert int(state.skipped) == int(metrics["skipped"]) == 1
    assert_equal(before[1:5], state[1:5])
    jax.tree.map(lambda e, p, q: np.testing.assert_allclose(e, 0.75 * p + 0.25 * q, rtol=1e-6,
                                                            atol=1e-9),
                 after.ema, before.params, after.params)
    after = tree.flatten(after.params)
    still = {"/".join(path) for path, x in tree.flatten(before.params).items()
             if (x == after[path]).all()}
    # A block's last scale starts as 0: no gradient reaches its first norm, nor decay any vector.
    assert still == {f"stages_{stage}/blocks_{block}/conv1/bn/{leaf}"
                     for stage, block in ((0, 0), (1, 0), (1, 1)) for leaf in ("scale", "bias")}


def test_a_run_of_nothing_but_skipped_updates_stops(folder, tmp_path, monkeypatch):
    c = make_config(folder, **{"train.max_skipped": 2})
    monkeypatch.setattr(train.mix, "normalize", lambda x, mean, std: x * np.nan)
    with pytest.raises(train.TrainingError, match="non-finite gradient"):
        train.fit(c, tmp_path, train.open_data(c))


class Judge:
    """Answers at once, in place of an evaluation that takes seconds to compile."""

    eval_step = staticmethod(jax.jit(lambda variables, batch: batch))

    def __call__(self, variables):
        return evaluate.Judged(*(np.zeros(3, np.int32) for _ in evaluate.Judged._fields))

    def describe_batch(self):
        return {}


@pytest.fixture
def quick(folder, monkeypatch):
    """A run whose update and evaluation compile at once: what is tested is the loop around them."""
    def make_train_step(config, model, schedule, mesh):
        def step(state, batch):
            pixels = batch["image"].mean(dtype=jnp.float32)
            params = jax.tree.map(lambda p: p + pixels, state.params)
            return (state._replace(step=state.step + 1, params=params),
                    {"loss": pixels, "skipped": state.skipped, "learning_rate": pixels})

        return jax.jit(step, donate_argnums=0, out_shardings=meshes.replicated(mesh))

    monkeypatch.setattr(train, "make_train_step", make_train_step)
    monkeypatch.setattr(measure, "make_judge", lambda *_: (Judge(), None))
    return make_config(folder, **{"log_every": 3, "eval.every_epochs": 2.0,
                                  "checkpoint.every_epochs": 2.0})


def test_the_host_reads_nothing_between_two_lines(quick, tmp_path, monkeypatch):
    data = train.open_data(quick)
    seen = tiny.watch_reads(monkeypatch)
    train.fit(quick, tmp_path, data)
    assert seen == {0, 3, 6}  # the first weights; a line; a line and a checkpoint


def test_the_next_batch_travels_while_an_update_runs(quick, tmp_path, monkeypatch):
    happened = []

    def note(name, owner, attribute):
        call = getattr(owner, attribute)
        monkeypatch.setattr(owner, attribute, lambda *a: (happened.append(name), call(*a))[1])

    note("update", train.Program, "__call__")
    note("send", meshes, "put_batch")
    note("wait", jax, "block_until_ready")
    quick.log_every = 6
    train.fit(quick, tmp_path, train.open_data(quick))
    # Each wait is for the update before the one that was just given to the device.
    assert happened == ["send", "update", "send", *(4 * ["update", "send", "wait"]), "update"]


def test_memory_and_compile_time_come_before_the_first_update(quick, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        result = train.fit(quick, tmp_path, train.open_data(quick))
    said = [m for m in caplog.messages if m.startswith("train")]
    assert "train: compiled in " in said[0]
    assert f"peak memory {result['peak_bytes'] / 1e9:.2f} GB on each device" in said[0]
    assert said[1].startswith("train 3/6 ")
    assert "data_wait" in said[1]
    assert result["peak_bytes"] > 3 * 4 * result["parameters"]  # weights and two moments


def test_a_run_that_does_not_fit_does_not_begin(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(train.memory, "find_limit", lambda: 10_000)
    with pytest.raises(train.memory.OutOfMemory, match=r"train\.accumulate.*model\.remat"):
        train.fit(quick, tmp_path, train.open_data(quick))
    assert log.read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_device_that_runs_out_of_memory_is_explained(quick, tmp_path, monkeypatch):
    def put_batch(batch, mesh):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(meshes, "put_batch", put_batch)
    with pytest.raises(train.memory.OutOfMemory, match=r"allocating 7 bytes\. What helps: "):
        train.fit(quick, tmp_path, train.open_data(quick))


def test_a_batch_of_another_shape_compiles_again_and_says_so(quick, tmp_path, monkeypatch, caplog):
    whole = pipeline.batch_stream

    def stream(source, start=0, **options):
        for number, batch in enumerate(whole(source, start, **options)):
            yield {k: v[:len(v) // 2] for k, v in batch.items()} if number == 4 else batch

    with monkeypatch.context() as m, caplog.at_level(logging.WARNING):
        m.setattr(pipeline, "batch_stream", stream)
        result = train.fit(quick, tmp_path / "other", train.open_data(quick))
    assert result["compilations"] == 1
    lines = log.read_metrics(tmp_path / "other" / "metrics.jsonl")
    assert [m.get("compilations") for m in lines] == [None, 1]
    assert "image was uint8[8, 16, 16, 3]" in caplog.text
    assert "is uint8[4, 16, 16, 3]" in caplog.text
    assert "compilations" not in train.fit(quick, tmp_path / "same", train.open_data(quick))


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


@pytest.mark.slow
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
