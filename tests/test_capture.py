import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import tiny

from tinyvit_jax import capture, forecast, recipe, teachers, train
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import pipeline
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.place import Folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def bright(images):
    """A teacher of a user's own: how red, green and blue an image is."""
    assert images.dtype == np.uint8
    return images.reshape(len(images), -1, 3).mean(1) / 10


def wrong_shape(images):
    return np.zeros((len(images), 7))


def make_config(folder, teacher="test_capture:bright"):
    c = tiny.make_config(folder)
    c.teacher.name, c.teacher.epochs = teacher, 0
    return c


def fill(config, path):
    data = train.open_data(config)
    store, _ = recipe.fill_store(config, path / "store", data, meshes.make_mesh())
    return store, data


def test_stored_targets_are_the_teachers(folder, tmp_path):
    config = make_config(folder)
    store, data = fill(config, tmp_path)
    assert store.missing() == []
    views = recipe.make_views(config, data)
    stored = pipeline.Views(data.train, views.spec, data.order, store)
    total = data.order.views_per_pass * store.manifest.passes
    batch = stored.read(np.arange(total))
    pixels = np.asarray(capture._view_pixels(
        {k: batch[k] for k in ("image", "lam", "box")})).round().astype(np.uint8)
    logits = bright(pixels)
    prob = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.sort(prob, -1)[:, ::-1][:, :2]
    np.testing.assert_allclose(batch["prob"], expected, atol=0.02)
    found = np.take_along_axis(prob, batch["index"].astype(int), -1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_capture_resumes_at_the_first_missing_shard(folder, tmp_path, monkeypatch):
    config = make_config(folder)
    whole, data = fill(config, tmp_path / "a")
    write, written = stores.Store.write_shard, []

    def die_at_the_third(self, shard, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        return write(self, shard, *rest)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(stores.Store, "write_shard", die_at_the_third)
        fill(config, tmp_path / "b")
    assert claimed(tmp_path / "b") == []
    partial = stores.open_store(tmp_path / "b" / "store")
    assert len(partial.missing()) == len(partial.shards()) - 2
    written.clear()
    with monkeypatch.context() as m:
        m.setattr(stores.Store, "write_shard",
                  lambda s, shard, *rest: (written.append(shard), write(s, shard, *rest))[1])
        again, _ = fill(config, tmp_path / "b")
    assert len(written) == len(again.shards()) - 2
    for p in range(2):
        for a, b in zip(whole.read(p, 0, data.order.views_per_pass),
                        again.read(p, 0, data.order.views_per_pass), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_teacher_that_cannot_be_used(folder, tmp_path):
    with pytest.raises(teachers.TeacherError, match=r"shape \(8, 7\)"):
        fill(make_config(folder, "test_capture:wrong_shape"), tmp_path)
    assert not list(tmp_path.rglob("*.array_record*"))


def test_too_many_classes_asked_for(folder, tmp_path):
    config = make_config(folder)
    config.store.top_k = 4
    with pytest.raises(ValueError, match=r"top_k=4 is more than the 3 classes"):
        fill(config, tmp_path)


def test_estimate_and_full_disk(folder, tmp_path, monkeypatch):
    config = make_config(folder)
    data = train.open_data(config)
    place = Folder(tmp_path / "deep" / "store")
    needs = forecast.estimate(config, data.train, data.order, place)
    assert needs.views == 2 * data.order.views_per_pass
    assert 0 < needs.most_bytes < needs.free
    assert (needs.missing, needs.files) == (needs.shards, 2 * needs.shards + 1)
    forecast.check_fits(needs, place)
    forecast.check_fits(needs._replace(free=None), place)  # a bucket does not say
    monkeypatch.setattr(Folder, "free", lambda self: 10)
    with pytest.raises(OSError, match=r"needs up to .* more bytes, of .*, and its disk has 10"):
        fill(config, tmp_path)


def test_the_estimate_holds(folder, tmp_path):
    config = make_config(folder)
    store, data = fill(config, tmp_path)
    assert len(store.shards()) == forecast.estimate(
        config, data.train, data.order, store.place).shards
    mesh = meshes.make_mesh()
    teacher = teachers.make_teacher(config.teacher, tuple(data.train.class_names), 16, mesh)
    found = forecast.pilot(config, teacher, recipe.make_views(config, data), mesh, most=3)
    assert found.views == 24  # three teacher batches of 8
    assert 0 < found.rate < min(found.read, found.teach, found.write)
    whole = store.bytes_per_view() * 2 * data.order.views_per_pass
    needs = forecast.estimate(config, data.train, data.order, store.place)
    assert found.count_bytes(needs) == pytest.approx(whole, rel=0.6)  # of shards of 16 views
    assert needs.missing == 0
    forecast.check_fits(needs._replace(free=0), store.place, part=0)  # it is complete


def test_a_pilot_of_more_views_than_there_are(folder):
    config = make_config(folder)
    config.teacher.batch_size, config.augment.mixup, config.augment.cutmix = 64, 0.0, 0.0
    data, mesh = train.open_data(config), meshes.make_mesh()
    teacher = teachers.make_teacher(config.teacher, tuple(data.train.class_names), 16, mesh)
    found = forecast.pilot(config, teacher, recipe.make_views(config, data), mesh)
    assert found.views == data.order.views_per_pass


@pytest.mark.parametrize("batch_size", [2, 6, 64])
def test_targets_do_not_hang_on_the_batch_size(folder, tmp_path, batch_size):
    config = make_config(folder)
    one, data = fill(config, tmp_path / "a")
    config.teacher.batch_size = batch_size
    other, _ = fill(config, tmp_path / "b")
    for p in range(2):
        for a, b in zip(one.read(p, 0, data.order.views_per_pass),
                        other.read(p, 0, data.order.views_per_pass), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def claimed(path):
    """Whatever lies in a store that is no part of it."""
    root = path / "store"
    return [str(f.relative_to(root)) for f in [*root.glob("claims/*"), *root.rglob(".*")]]


def run_with(monkeypatch, config, path, during, call=3):
    """Captures; `during` runs within the teacher's third batch."""
    calls = []

    def teacher(images):
        calls.append(None)
        if len(calls) == call:
            during()
        return BRIGHT(images)

    monkeypatch.setattr(sys.modules[__name__], "bright", teacher)
    return fill(config, path)


BRIGHT = bright


def test_a_failing_teacher_leaves_no_claim(folder, tmp_path, monkeypatch):
    def fail():
        assert len(claimed(tmp_path)) == 1
        raise OSError("the teacher's file is gone")

    with pytest.raises(teachers.TeacherError, match="is gone"):
        run_with(monkeypatch, make_config(folder), tmp_path, fail)
    assert claimed(tmp_path) == []
    assert len(list(tmp_path.rglob("*.array_record"))) == 1


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit),
                                               (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_leaves_no_claim(folder, tmp_path, monkeypatch, number, error):
    before = signal.getsignal(number)
    with pytest.raises(error):
        run_with(monkeypatch, make_config(folder), tmp_path, lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) is before
    assert claimed(tmp_path) == []
    assert stores.open_store(tmp_path / "store").verify() == []


def test_a_signal_that_a_library_swallows(folder, tmp_path, monkeypatch):
    def swallow():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    with pytest.raises(SystemExit):
        run_with(monkeypatch, make_config(folder), tmp_path, swallow)
    assert claimed(tmp_path) == []
    assert len(list(tmp_path.rglob("*.array_record"))) == 1


def test_a_full_disk_leaves_no_claim(folder, tmp_path, monkeypatch):
    write = Folder.write

    def full(self, name, data):
        if name == "pass-00000/shard-00001.json":
            raise OSError(28, "No space left on device")
        write(self, name, data)

    with monkeypatch.context() as m, pytest.raises(stores.StoreError, match="No space left"):
        m.setattr(Folder, "write", full)
        fill(make_config(folder), tmp_path)
    assert claimed(tmp_path) == []
    assert [f.stem for f in tmp_path.rglob("*.array_record")] == ["shard-00000"]
    store, _ = fill(make_config(folder), tmp_path)
    assert store.missing() == []


def test_a_shard_that_was_taken_over_is_dropped(folder, tmp_path, monkeypatch, caplog):
    """Somebody else, who took this process for dead, is at it, and then dies in earnest."""
    caplog.set_level("INFO")
    config = make_config(folder)
    config.store.lease = 0.5

    def take_over():
        (file,) = (f for f in claimed(tmp_path) if not f.endswith(".tmp"))
        assert file.endswith("00001.0001")
        Folder(tmp_path / "store").create(file[:-1] + "2", b"{}")

    store, _ = run_with(monkeypatch, config, tmp_path, take_over)
    assert "pass 0, shard 1: dropped, another process took it over" in caplog.text
    assert "pass-00000/shard-00001: taken over from" in caplog.text
    assert store.missing() == store.verify() == []
    assert claimed(tmp_path) == []


def test_a_shard_that_appeared_meanwhile_is_kept(folder, tmp_path, monkeypatch):
    whole, _ = fill(make_config(folder), tmp_path / "a")
    names = [f"pass-00000/shard-00001{suffix}" for suffix in (".json", ".array_record")]

    def publish():
        for name in names:
            shutil.copy(whole.path / name, tmp_path / "b" / "store" / name)
        times.extend(os.stat(tmp_path / "b" / "store" / name).st_mtime_ns for name in names)

    times = []
    store, _ = run_with(monkeypatch, make_config(folder), tmp_path / "b", publish)
    assert times == [os.stat(store.path / name).st_mtime_ns for name in names]
    assert store.verify() == []


def test_what_it_says(folder, tmp_path, monkeypatch, caplog):
    """The first line, one a minute, and the last; progress within a shard."""
    caplog.set_level("INFO")
    config = make_config(folder)
    fill(config, tmp_path / "a")
    lines = [m for m in caplog.messages if m.startswith("capture ")]
    assert len(lines) == 2
    assert re.fullmatch(r"capture 8/68  0 of 6 shards, 0 by this process: \S+ views/s, 0.0 MB"
                        r"  left \S+", lines[0])
    assert re.fullmatch(r"capture 68/68  6 of 6 shards, 6 by this process: \S+ views/s, "
                        r"\S+ MB  left 0:00", lines[1])
    caplog.clear()
    monkeypatch.setattr(capture, "_MINUTE", 0.0)
    fill(config, tmp_path / "b")
    done = [int(m.split()[1].split("/")[0]) for m in caplog.messages if m.startswith("capture ")]
    assert done == [8, 16, 24, 32, 34, 42, 50, 58, 66, 68, 68]


def test_checking_a_store(folder, tmp_path):
    config = make_config(folder)
    config.store.path = str(tmp_path / "store")
    fill(config, tmp_path)
    problems, found = recipe.check_captured(config, tmp_path, 30)
    assert problems == []
    assert found["kl"] < 1e-3
    assert found["top1"] == 1.0

    shard = sorted((tmp_path / "store").rglob("*.array_record"))[1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(bytes(data))
    problems, found = recipe.check_captured(config, tmp_path, 30)
    assert found == {}
    assert any("pass 0, shard 1" in p or shard.name in p for p in problems)


def test_repairing_a_store(folder, tmp_path, caplog):
    config = make_config(folder)
    config.store.path = str(tmp_path / "store")
    store, _ = fill(config, tmp_path)
    root = tmp_path / "store"
    files = {f: f.read_bytes() for f in sorted(root.glob("pass-*/*"))}
    damaged, gone = (root / f"{store.shards()[i].name}.array_record" for i in (1, 4))
    content = bytearray(damaged.read_bytes())
    content[70] ^= 1
    damaged.write_bytes(content)
    gone.unlink()
    times = {f: f.stat().st_mtime_ns for f in files if f.exists()}
    config.store.passes = 1  # a run may ask for less than the store has
    problems, _ = recipe.check_captured(config, tmp_path, 8)
    assert {p.split(":")[0].split(",")[1].strip() for p in problems} >= {"shard 1"}
    assert any("pass 1, shard 1 is missing" in p for p in problems)
    assert not gone.exists()  # without repair nothing is written

    caplog.set_level("INFO")
    problems, found = recipe.check_captured(config, tmp_path, 8, repair=True)
    assert problems == []
    assert found["top1"] == 1.0
    assert "capturing again pass 0, shard 1; pass 1, shard 1" in caplog.text
    assert {f: f.read_bytes() for f in files} == files
    again = {f for f in times if f.stat().st_mtime_ns != times[f]}
    assert {f.stem for f in again} == {"shard-00001"}
    assert claimed(tmp_path) == []


def test_what_cannot_be_repaired(folder, tmp_path):
    """A store that was imported: no teacher here can make its targets."""
    config = make_config(folder)
    store, data = fill(config, tmp_path)
    manifest = dataclasses.replace(store.manifest, keys="stored", origin={"format": "microsoft"})
    with pytest.raises(stores.StoreError, match=r"Remove pass-00000/shard-00000\.array_record "
                       r".*import_store\.py"):
        recipe._repair(config, stores.Store(store.place, manifest), data, store.shards()[:1],
                       ["pass 0, shard 0: is bad"])
    assert store.verify() == []


def test_checking_with_another_teacher_is_refused(folder, tmp_path, monkeypatch):
    config = make_config(folder)
    config.store.path = str(tmp_path / "store")
    fill(config, tmp_path)
    manifest = tmp_path / "store" / "manifest.json"
    text = json.loads(manifest.read_text())
    text["teacher"]["weights"] = "0" * 64
    del text["checksum"]
    manifest.write_text(json.dumps(text))
    with pytest.raises(stores.StoreError, match=r"teacher\.weights"):
        recipe.check_captured(config, tmp_path, 8)


@pytest.mark.parametrize("fault", ["other targets", "not a number"])
def test_a_teacher_that_has_changed_is_found(folder, tmp_path, monkeypatch, fault):
    config = make_config(folder)
    config.store.path = str(tmp_path / "store")
    fill(config, tmp_path)
    if fault == "other targets":  # the same file, so the same hash: only its answers tell
        monkeypatch.setattr(sys.modules[__name__], "bright",
                            lambda images: -images.reshape(len(images), -1, 3).mean(1) / 10)
    else:
        monkeypatch.setattr(capture, "_kl", lambda stored, now: np.full(len(now), np.nan))
    problems, _ = recipe.check_captured(config, tmp_path, 30)
    assert len(problems) == 1
    assert "other targets now" in problems[0]


@pytest.mark.parametrize(("key", "value", "field"), [
    ("augment.erase", 0.0, "augment"), ("data.seed", 5, "data_seed"), ("store.top_k", 3, "top_k"),
    ("augment.mixup", 0.5, "augment"), ("model.image_size", 20, "augment"),
])
def test_training_refuses_another_store(folder, tmp_path, key, value, field):
    config = make_config(folder)
    store, _ = fill(config, tmp_path)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(stores.StoreError, match=field):
        train.fit(config, tmp_path / "w", train.open_data(config), store)


def test_training_refuses_other_images(folder, tmp_path):
    config = make_config(folder)
    store, _ = fill(config, tmp_path)
    other = make_config(tiny.make_folder(tmp_path / "other", images=13))
    with pytest.raises(stores.StoreError, match="image_set"):
        train.fit(other, tmp_path / "w", train.open_data(other), store)
