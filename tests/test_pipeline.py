import functools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny

from tinyvit_jax import config as configs
from tinyvit_jax.data import augment, images, pipeline
from tinyvit_jax.data.order import Order, follow_store
from tinyvit_jax.store import store as stores


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


STATM = Path("/proc/self/statm")


def read_resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="only Linux tells what lies in memory at a moment")
@pytest.mark.parametrize(("count", "mebibytes"), [
    (4_000, 16), pytest.param(100_000, 32, marks=pytest.mark.slow)])
def test_memory_stays_flat(source, count, mebibytes):
    """Kept views would be 12 KiB each: 47 MiB of the fewer, 1.2 GiB of the more."""
    spec = augment.make_spec(configs.default().augment, 64)
    views = pipeline.Views(source, spec, Order(0, len(source), False))
    batches = pipeline.TrainBatches(views, 100, pipeline.Rows(0, 100), count // 100)
    before, most = 0, 0
    for step, _ in enumerate(pipeline.batch_stream(batches, threads=2)):
        if step == 10:  # threads, caches and the batches kept ready are there
            before = read_resident()
        most = max(most, read_resident())
    assert step + 1 == count // 100
    assert most - before < mebibytes * 2**20


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (1, 1), (5, 5)])
def test_threads_that_nobody_counted_are_the_cores_of_a_process(source, monkeypatch, workers,
                                                                processes):
    def count_cores(found):
        raise RuntimeError(f"{found} processes")

    monkeypatch.setattr(pipeline.cores, "count_cores", count_cores)
    batches = pipeline.TrainBatches(make_views(source), 8, pipeline.Rows(0, 8), 3)
    with pytest.raises(RuntimeError, match=f"^{processes} processes$"):
        pipeline.batch_stream(batches, workers=workers)


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


def make_store(path, source, keys):
    """Three passes of targets that tell their pass and place, 3 of 5 classes a view."""
    order = Order(0, len(source), True)
    store = stores.create_store(path, stores.Manifest(
        teacher={}, class_names=tuple("abcde"), top_k=3, augment={}, codec="float16", keys=keys,
        image_set={"images": len(source)}, data_seed=0, passes=3,
        views_per_pass=order.views_per_pass, shard_views=16, block_views=4))

    def contents(shard):
        for start in range(shard.start, shard.stop, 4):
            place = np.arange(start, min(start + 4, shard.stop))
            first = 0.5 + (64 * shard.pass_number + place) / 1024
            prob = np.stack([first, np.full(len(place), 0.25), np.full(len(place), 0.0625)], 1)
            index = np.stack([place % 5, (place + 1) % 5, (place + 2) % 5], 1)
            drawn = order.keys(np.full(len(place), shard.pass_number), place)
            yield drawn, index.astype(np.int32), prob.astype(np.float32)

    for shard in store.shards():
        store.write_shard(shard, contents(shard))
    return store


@pytest.fixture(params=["formula", "stored"])
def stored(request, source, tmp_path):
    """A store of the source's views, and what replays them without it."""
    store = make_store(tmp_path / "store", source, request.param)
    plain = make_views(source)
    return store, pipeline.Views(source, plain.spec, follow_store(plain.order, store), store)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_fewer_classes_are_the_most_probable_ones(stored, k):
    store, views = stored
    few = pipeline.Views(views.source, views.spec, views.order, store, top_k=k)
    whole, cut = views.read(np.arange(30, 46)), few.read(np.arange(30, 46))
    assert whole["prob"].shape == (16, 3)
    for key in ("index", "prob"):
        np.testing.assert_array_equal(cut[key], whole[key][:, :k])
    assert (np.diff(whole["prob"], axis=1) < 0).all()
    for key in ("image", "label", "lam", "box"):
        np.testing.assert_array_equal(cut[key], whole[key])


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_more_epochs_than_passes_show_the_passes_again(stored, passes):
    store, whole = stored
    views = pipeline.Views(whole.source, whole.spec, whole.order, store, passes)
    pass_views = views.order.views_per_pass
    first = [views.read(np.arange(p * pass_views, (p + 1) * pass_views)) for p in range(3 * passes)]
    for p in range(passes, 3 * passes):
        same(first[p], first[p % passes])
    for p in range(1, passes):  # and each pass has views and targets of its own
        assert (first[p]["image"] != first[0]["image"]).any()
        np.testing.assert_array_equal(first[p]["prob"][:, 0] - first[0]["prob"][:, 0], p / 16)
    over = passes * pass_views  # a batch across the end of the last pass
    a, b = views.read(np.arange(over - 4, over + 4)), views.read(np.arange(4))
    np.testing.assert_array_equal(a["image"][4:], b["image"])
    np.testing.assert_array_equal(a["prob"][4:], b["prob"])


def test_single_views_are_those_of_the_batches(stored):
    _, views = stored
    batch = views.read(np.arange(34))
    places = np.array([33, 0, 7])
    examples, pixels = views.replay(np.zeros(3, int), places)
    np.testing.assert_array_equal(pixels, batch["image"][places])
    assert [e.label for e in examples] == batch["label"][places].tolist()
