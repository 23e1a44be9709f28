"""Any number of processes, devices, workers and threads show the same views and train the same."""

import hashlib
import itertools
import json
import re

import jax
import numpy as np
import processes
import pytest
import tiny

from tinyvit_jax import checkpoint, config, log, train
from tinyvit_jax.data import augment, pipeline
from tinyvit_jax.data.order import follow_store
from tinyvit_jax.store import store as stores

BATCH = 8
STEPS = 11  # 88 views: past the end of the first pass (33 or 34) and of both (66 or 68)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, the teacher's module, and two stores of two passes: "mixed" and "plain"."""
    home = tmp_path_factory.mktemp("processes")
    tiny.make_folder(home / "images")
    processes.write_teacher(home)
    processes.finish(*(processes.start(
        ["tools/save_logits.py", *flags(home, mixed), f"--workdir={home / 'none'}"],
        home / f"{mixed}.log", home) for mixed in (True, False)))
    return home


def settings(home, mixed):
    """What differs from tiny's config."""
    return {"store.path": str(home / ("mixed" if mixed else "plain")), "teacher.epochs": 0,
            "teacher.name": "own_teacher:bright", "augment.mixup": 0.8 * mixed,
            "augment.cutmix": 1.0 * mixed}


def flags(home, mixed):
    """The same on a command line."""
    return [f"--config=tests/tiny.py:{home / 'images'}",
            *(f"--config.{k}={v}" for k, v in settings(home, mixed).items())]


def make_batches(home, mixed, batch_size, process=0, count=1, steps=STEPS):
    """The batches of a process as a training on the store makes them, and the order they follow."""
    c = tiny.get_config(home / "images")
    c.update_from_flattened_dict(settings(home, mixed))
    config.check(c)
    data, store = train.open_data(c), stores.open_store(c.store.path)
    order = follow_store(data.order, store)
    spec = augment.make_spec(c.augment, c.model.image_size)
    views = pipeline.Views(data.train, spec, order, store, c.store.passes, c.store.top_k)
    rows = pipeline.Rows.of_process(batch_size, process, count)
    return pipeline.TrainBatches(views, batch_size, rows, steps)


# One process of several: joins the others, and writes what each of its rows is and shows, with the
# row's number in the global batch as the device array has it.
_DUMP = """
import sys, json
from pathlib import Path
import jax, numpy as np, test_processes as t
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import pipeline
home, out, port, process, count, cases = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
assert jax.process_count() == int(count)
mesh = meshes.make_mesh()
for number, (mixed, start, steps, threads, workers) in enumerate(json.loads(cases)):
    batches = t.make_batches(Path(home), mixed, t.BATCH, jax.process_index(), jax.process_count())
    stream = pipeline.batch_stream(batches, start, threads=threads, workers=workers)
    for step in range(start, start + steps):
        batch = next(stream)
        t.dump(Path(out) / f"{number}-{step}-{process}.npz", batches, step, batch,
               meshes.put_batch(batch, mesh))
"""


def dump(path, batches, step, batch, placed):
    """Writes a process's rows of a batch: place in the global batch, image, seed, what they show.

    Args:
        path: of the file.
        batches: from `make_batches`.
        step: number of the batch.
        batch: this process's rows.
        placed: the same as global arrays.
    """
    row = np.concatenate([np.arange(part.index[0].start or 0, (part.index[0].stop or BATCH))
                          for part in placed["image"].addressable_shards])
    for part in placed["image"].addressable_shards:
        first = (part.index[0].start or 0) - row[0]
        np.testing.assert_array_equal(part.data, batch["image"][first:first + len(part.data)])
    order = batches.views.order
    pass_number, position = order.locate(step * BATCH + row)
    image, seed = order.keys(pass_number % batches.views.passes, position)
    pixels = [hashlib.sha256(p.tobytes()).hexdigest() for p in batch["image"]]
    rest = {k: v for k, v in batch.items() if k != "image"}
    np.savez(path, row=row, image=image, seed=seed, pixels=pixels, **rest)


def dump_all(home, out, count, cases):
    """Runs `count` processes over the cases: {(case, step): rows of all, in global order}."""
    out.mkdir()
    port = processes.free_port()
    processes.finish(*(processes.start(
        ["-c", _DUMP, home, out, port, i, count, json.dumps(cases)], out / f"{i}.log", home)
        for i in range(count)))
    found = {}
    for number, (_, start, steps, _, _) in enumerate(cases):
        for step in range(start, start + steps):
            parts = [dict(np.load(out / f"{number}-{step}-{i}.npz")) for i in range(count)]
            whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
            np.testing.assert_array_equal(whole.pop("row"), np.arange(BATCH))
            found[number, step] = whole
    return found


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=str(key))


def test_one_two_and_four_processes_show_the_same_views(home, tmp_path):
    """Through the end of a pass, of all passes, and from a later step on, mixed and not."""
    cases = [(True, 0, STEPS, 2, 0), (False, 0, STEPS, 2, 0), (True, 5, 3, 1, 0)]
    alone = dump_all(home, tmp_path / "1", 1, cases)
    for step in range(5, 8):
        assert_same(alone[0, step], alone[2, step])
    mixed, plain = alone[0, 0], alone[1, 0]
    assert {"lam", "box", "index", "prob", "label", "seed"} < mixed.keys()
    assert "lam" not in plain
    for case, views in ((0, 34), (1, 33)):
        seen = np.concatenate([alone[case, step]["pixels"] for step in range(STEPS)])
        # 33 images: a pass in pairs shows one view twice. No other, until the passes come again.
        assert len(set(seen[:2 * views])) == 66
        np.testing.assert_array_equal(seen[2 * views:], seen[:STEPS * BATCH - 2 * views])
    for count in (2, 4):
        several = dump_all(home, tmp_path / str(count), count, cases)
        assert several.keys() == alone.keys()
        for key, rows in alone.items():
            assert_same(rows, several[key])


@pytest.mark.slow
def test_processes_with_workers_of_their_own_show_the_same_views(home, tmp_path):
    alone = dump_all(home, tmp_path / "1", 1, [(True, 0, STEPS, 1, 0), (False, 2, 6, 4, 2)])
    for count in (2, 4):
        several = dump_all(home, tmp_path / str(count), count,
                           [(True, 0, STEPS, 4, 2), (False, 2, 6, 1, 1)])
        for key, rows in alone.items():
            assert_same(rows, several[key])


@pytest.mark.parametrize(("threads", "workers"), [
    (1, 0), (4, 0), (1, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_threads_and_workers_give_the_same_batches_in_order(home, threads, workers):
    batches = make_batches(home, True, BATCH)
    stream = pipeline.batch_stream(batches, 1, threads=threads, workers=workers)
    found = list(stream)
    assert len(found) == STEPS - 1
    for step, batch in enumerate(found, 1):
        assert_same(batch, batches[step])


@pytest.mark.parametrize("mixed", [True, False])
def test_batches_of_any_size_show_the_same_sequence(home, mixed):
    def sequence(size):
        stream = pipeline.batch_stream(make_batches(home, mixed, size, steps=80 // size), threads=2)
        whole = list(stream)
        return {k: np.concatenate([b[k] for b in whole]) for k in whole[0]}

    expected = sequence(16)
    assert len(expected["image"]) == 80
    for size in (4, 8):
        assert_same(sequence(size), expected)


EPOCHS = 3.0  # 6 updates of 16 views: the passes are 4.25 of them
RATE = 1e-3


def start_training(home, out, count):
    """Starts a training by main in `count` processes."""
    out.mkdir()
    port = processes.free_port()
    words = ["-m", "tinyvit_jax.main", *flags(home, True), f"--workdir={out / 'run'}",
             "--config.log_every=1", "--config.train.batch_size=16",
             f"--config.train.epochs={EPOCHS}", f"--config.optim.learning_rate={RATE}",
             "--config.optim.scale_by_batch=False", "--config.eval.every_epochs=100",
             "--config.checkpoint.every_epochs=100"]
    join = [f"--coordinator=localhost:{port}", f"--processes={count}"] if count > 1 else []
    return [processes.start(
        [*words, *join, *([f"--process={i}"] if join else [])], out / f"{i}.log", home)
        for i in range(count)]


def read_training(out, running):
    """(result, metrics lines, final variables) of a run, once its processes are done."""
    said = processes.finish(*running, seconds=600)
    tables = [len(re.findall("^student, distilled", text, re.MULTILINE)) for text in said]
    assert tables == [1] + [0] * (len(said) - 1)  # who prints the table writes result.json
    assert [p.name for p in (out / "run").rglob(".*")] == []
    result = json.loads((out / "run" / "result.json").read_text())
    variables, step = checkpoint.load_variables(out / "run" / "checkpoints")
    assert step == result["steps"] == 6
    return result, log.read_metrics(out / "run" / "metrics.jsonl"), variables


def assert_same_training(one, several):
    """Two runs that add the same numbers in another order.

    The first loss comes from equal weights and pixels: float32 sums of a batch differ by some
    1e-7. AdamW divides a gradient by its own size, so where it is nothing but noise an update may
    go either way by up to the learning rate: no weight may end further apart than the peak rate,
    and 99 of 100 must agree to a hundredth of it.
    """
    result, lines, variables = one
    other_result, other_lines, other_variables = several
    assert [m["step"] for m in other_lines] == [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    loss, other = (np.array([m["loss"] for m in x]) for x in (lines, other_lines))
    np.testing.assert_allclose(other[0], loss[0], rtol=2e-6)
    np.testing.assert_allclose(other, loss, rtol=1e-4)
    assert result["count"] == other_result["count"]
    assert other_result["loss"] == pytest.approx(result["loss"], rel=1e-3)
    apart = [np.abs(a - b).ravel() for a, b in zip(
        jax.tree.leaves(variables["params"]), jax.tree.leaves(other_variables["params"]),
        strict=True)]
    apart = np.concatenate(apart)
    print(f"loss apart {np.abs(other / loss - 1).max():.1e}, parameters apart: "
          f"median {np.median(apart):.1e}, largest {apart.max():.1e}")
    assert apart.max() <= RATE
    assert np.quantile(apart, 0.99) <= RATE / 100


@pytest.mark.slow
def test_two_processes_train_as_one(home, tmp_path):
    runs = {count: start_training(home, tmp_path / str(count), count) for count in (1, 2)}
    try:
        one, two = (read_training(tmp_path / str(count), runs[count]) for count in (1, 2))
    finally:
        for running in itertools.chain(*runs.values()):
            processes.kill(running)
    assert_same_training(one, two)


@pytest.mark.slow
def test_four_processes_train_as_one(home, tmp_path):
    one = read_training(tmp_path / "1", start_training(home, tmp_path / "1", 1))
    four = read_training(tmp_path / "4", start_training(home, tmp_path / "4", 4))
    assert_same_training(one, four)
