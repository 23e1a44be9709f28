"""A set on the devices trains as the same set from the host does, and goes on where it stopped."""

import jax
import numpy as np
import pytest
import tiny

from tinyvit_jax import checkpoint, feed, log, program, recipe, resident, train
from tinyvit_jax import config as configs
from tinyvit_jax import mesh as meshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def make_config(folder, **changes):
    c = tiny.make_config(folder)
    c.objective.name = "supervised"
    c.model.update(tiny.STUDENT)
    c.augment.update({"rand_augment": "", "color_jitter": 0.0, "erase": 0.0})
    c.data.resident = True
    c.train.epochs = 1.5  # 33 images in batches of 8: 6 updates
    c.eval.every_epochs, c.checkpoint.every_epochs, c.checkpoint.keep_last = 0.75, 0.25, 10
    c.log_every = 4
    c.update_from_flattened_dict(changes)
    return c


def weights_of(workdir, step):
    return checkpoint.load_variables(workdir / "checkpoints", step)[0]


def fit(config, workdir):
    return train.fit(config, workdir, train.open_data(config))


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """A run from the set on the devices, and its result."""
    workdir = tmp_path_factory.mktemp("resident")
    return workdir, fit(make_config(folder), workdir)


def test_it_learns_what_a_stream_of_batches_teaches(folder, unbroken, tmp_path):
    """The views are the same, and the programs differ in the order of sums alone."""
    workdir, result = unbroken
    streamed = fit(make_config(folder, **{"data.resident": False}), tmp_path)
    assert result["loss"] == pytest.approx(streamed["loss"], rel=1e-3)
    lines, others = (log.read_metrics(w / "metrics.jsonl") for w in (workdir, tmp_path))
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "accuracy", "learning_rate", "gradient_norm", "skipped"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
        assert line["data_wait"] == 0
        assert line["images_per_second"] > 0
    assert "compilations" not in result


def test_a_run_goes_on_where_it_stopped(folder, unbroken, tmp_path, monkeypatch):
    save = checkpoint.Checkpoints.save

    def save_and_die(self, step, *args):
        save(self, step, *args)
        if step == 2:
            raise tiny.Killed

    monkeypatch.setattr(checkpoint.Checkpoints, "save", save_and_die)
    with pytest.raises(tiny.Killed):
        fit(make_config(folder), tmp_path)
    monkeypatch.undo()
    fit(make_config(folder), tmp_path)
    for step in (4, 6):
        jax.tree.map(np.testing.assert_array_equal, weights_of(tmp_path, step),
                     weights_of(unbroken[0], step))


def test_what_cannot_live_there_is_refused_before_anything_runs(folder, tmp_path):
    c = make_config(folder, **{"augment.erase": 0.25, "augment.rand_augment": "rand-m9"})
    with pytest.raises(resident.ResidentError, match=r"rand_augment=rand-m9.*erase=0\.25"):
        fit(c, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    c.update_from_flattened_dict({"augment.erase": 0.0, "augment.rand_augment": ""})
    assert fit(c, tmp_path)["steps"]  # what the error advised, in the same workdir


@pytest.mark.parametrize(("changes", "ready"), [
    ({}, 0),  # 2 MiB of them
    ({"model.image_size": 320, "train.batch_size": 12}, 2),
    ({"data.prefetch": 3}, 3),
])
def test_more_batches_are_kept_ready_where_they_are_small(folder, tmp_path, monkeypatch, changes,
                                                          ready):
    told = []
    monkeypatch.setattr(feed.pipeline, "batch_stream", lambda *_, prefetch, **__: told.append(
        prefetch))
    c = make_config(folder, **{"data.resident": False, "model.image_size": 24, **changes})
    views = recipe.make_views(c, train.open_data(c))
    batch = views.read(np.arange(c.train.batch_size))
    with program.compiling() as compiler:
        run = feed.Run(c, views, 6, 0, 3, meshes.make_mesh(), compiler, "")
        feed.Streamed(run, {}, jax.jit(lambda state, batch: (state, batch)), None).open(tmp_path)
    assert told == [ready or (2 << 20) // sum(x.nbytes for x in batch.values())]


def test_grain_is_there_before_threads_compile(monkeypatch):
    """Its import in one thread puts off those of all others, JAX's internal modules among them."""
    order = []
    monkeypatch.setattr(feed.pipeline, "import_grain", lambda: order.append("grain"))
    monkeypatch.setattr(feed, "Streamed", lambda *_: order.append("threads compile"))
    feed.open_feed(feed.Run(configs.default(), None, 1, 0, 2, None, None, ""), None, None, None)
    assert order == ["grain", "threads compile"]
