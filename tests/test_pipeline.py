import functools
import pickle

import numpy as np
import pytest
import tiny

from tinyvit_jax.data import augment, images, pipeline
from tinyvit_jax.data.order import Order


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny.make_folder(tmp_path_factory.mktemp("images"))
    return images.open_source(f"folder:{folder}", "train")


def make_views(source, mixed=True):
    config = tiny.make_config("unused", mixed)
    spec = augment.make_spec(config.augment, 16)
    return pipeline.Views(source, spec, Order(0, len(source), mixed))


def same(a, b):
    assert a.keys() == b.keys()
    for k in a:
        np.testing.assert_array_equal(a[k], b[k])


def test_batch_has_the_promised_shapes(source):
    batch = make_views(source).read(np.arange(6))
    shapes = {k: (v.dtype, v.shape) for k, v in batch.items()}
    assert shapes == {"image": (np.uint8, (6, 16, 16, 3)), "label": (np.int32, (6,)),
                      "weight": (np.float32, (6,)), "lam": (np.float32, (3,)),
                      "box": (np.int32, (3, 4))}
    assert set(make_views(source, mixed=False).read(np.arange(3))) == {"image", "label", "weight"}


def test_batch_size_and_process_count_do_not_change_a_view(source):
    views = make_views(source)
    whole = pipeline.TrainBatches(views, 8, pipeline.Rows.of_process(8, 0, 1), 5)[3]
    for count in (2, 4):
        parts = [pipeline.TrainBatches(views, 8, pipeline.Rows.of_process(8, i, count), 5)[3]
                 for i in range(count)]
        same(whole, {k: np.concatenate([p[k] for p in parts]) for k in whole})
    same(whole, views.read(np.arange(24, 32)))


@pytest.mark.parametrize(("threads", "workers"), [(1, 0), (4, 0), (2, 2)])
def test_threads_and_workers_do_not_change_a_batch(source, threads, workers):
    views = make_views(source)
    batches = pipeline.TrainBatches(views, 8, pipeline.Rows.of_process(8, 0, 1), 7)
    stream = pipeline.batch_stream(batches, 2, threads=threads, workers=workers)
    found = list(stream)
    assert len(found) == 5
    for step, batch in enumerate(found, 2):
        same(batch, batches[step])


def test_views_survive_pickling(source):
    views = make_views(source)
    views.read(np.arange(2))
    same(pickle.loads(pickle.dumps(views)).read(np.arange(4)), views.read(np.arange(4)))


@pytest.mark.parametrize(("batch_size", "processes"), [(8, 1), (8, 2), (10, 2), (50, 1), (64, 4)])
def test_evaluation_shows_every_image_once(source, batch_size, processes):
    view = functools.partial(augment.eval_view, image_size=16, crop="center", crop_ratio=1.0)
    seen = np.zeros(len(source))
    for i in range(processes):
        rows = pipeline.Rows.of_process(batch_size, i, processes)
        batches = pipeline.EvalBatches(source, view, batch_size, rows)
        for step in range(len(batches)):
            batch = batches[step]
            assert len(batch["image"]) == len(batch["label"]) == rows.size
            first = step * batch_size + rows.first
            real = int(batch["weight"].sum())
            seen[first:first + real] += 1
            labels = [source[j].label for j in range(first, first + real)]
            np.testing.assert_array_equal(batch["label"][:real], labels)
    np.testing.assert_array_equal(seen, 1)


def test_an_unreadable_image_is_named(source, tmp_path):
    folder = tiny.make_folder(tmp_path / "bad", images=4)
    (folder / "checks" / "000.jpg").write_bytes(b"not a picture")
    broken = images.open_source(f"folder:{folder}", "train")
    views = make_views(broken, mixed=False)
    with pytest.raises(ValueError, match=r"checks/000\.jpg"):
        views.read(np.arange(len(broken)))
