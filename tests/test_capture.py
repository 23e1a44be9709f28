import json
import sys

import jax
import numpy as np
import pytest
import tiny

from tinyvit_jax import capture, recipe, teachers, train, weights
from tinyvit_jax import mesh as meshes
from tinyvit_jax.data import pipeline
from tinyvit_jax.store import store as stores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_folder(tmp_path_factory.mktemp("images"))


def bright(images):
    """A teacher of a user's own: how red, green and blue an image is."""
    assert images.dtype == np.uint8
    return images.reshape(len(images), -1, 3).mean(1) / 10


def wrong_shape(images):
    return np.zeros((len(images), 7))


def not_finite(images):
    return np.full((len(images), 3), np.nan)


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

    def die_at_the_third(self, shard, blocks):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        return write(self, shard, blocks)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(stores.Store, "write_shard", die_at_the_third)
        fill(config, tmp_path / "b")
    partial = stores.open_store(tmp_path / "b" / "store")
    assert len(partial.missing()) == len(partial.shards()) - 2
    written.clear()
    with monkeypatch.context() as m:
        m.setattr(stores.Store, "write_shard",
                  lambda s, shard, blocks: (written.append(shard), write(s, shard, blocks))[1])
        again, _ = fill(config, tmp_path / "b")
    assert len(written) == len(again.shards()) - 2
    for p in range(2):
        for a, b in zip(whole.read(p, 0, data.order.views_per_pass),
                        again.read(p, 0, data.order.views_per_pass), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("teacher", "message"), [
    ("test_capture:wrong_shape", r"shape \(8, 7\).*expected finite logits of shape \(8, 3\)"),
    ("test_capture:not_finite", "not finite"),
    ("test_capture:absent", "absent"), ("no_such_module:f", "no_such_module"),
    ("tiny_vit", "has no weights"),
])
def test_a_teacher_that_cannot_be_used(folder, tmp_path, teacher, message):
    with pytest.raises(teachers.TeacherError, match=message):
        fill(make_config(folder, teacher), tmp_path)
    assert not list(tmp_path.rglob("*.array_record*"))


def test_too_many_classes_asked_for(folder, tmp_path):
    config = make_config(folder)
    config.store.top_k = 4
    with pytest.raises(ValueError, match=r"top_k=4 is more than the 3 classes"):
        fill(config, tmp_path)


def test_estimate_and_full_disk(folder, tmp_path, monkeypatch):
    config = make_config(folder)
    data = train.open_data(config)
    needed = capture.estimate(config, data.train, data.order, tmp_path / "deep" / "store")
    assert needed["views"] == 2 * data.order.views_per_pass
    assert 0 < needed["bytes"] < needed["free"]
    capture.check_fits(needed, tmp_path)
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda _: type("D", (), {"free": 10}))
    with pytest.raises(OSError, match=r"needs about .* more bytes for .*, and its disk has 10"):
        fill(config, tmp_path)


def test_the_teacher_may_have_its_own_size(folder, tmp_path):
    c = tiny.make_config(folder)
    c.teacher.image_size = 24
    model = weights.make_model(c.teacher, 3)
    variables = jax.jit(lambda k: model.init(k, np.zeros((1, 24, 24, 3), np.float32)))(
        jax.random.key(0))
    weights.save_trained(weights.Trained(model, variables, tiny.CLASSES, (0,) * 3, (1,) * 3,
                                         "center", 1.0), tmp_path / "run")
    c.teacher.weights = str(tmp_path / "run")
    teacher = teachers.make_teacher(c.teacher, tiny.CLASSES[::-1], 16, meshes.make_mesh())
    assert teacher.description["image_size"] == 24
    assert len(teacher.description["weights"]) == 64
    assert teacher.description["mean"] == [0, 0, 0]
    pixels = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)
    larger = np.clip(jax.image.resize(pixels, (2, 24, 24, 3), "cubic"), 0, 255) / 255
    expected = jax.jit(model.apply)(variables, larger)[:, ::-1]  # classes by name, here reversed
    np.testing.assert_allclose(teacher.logits(pixels), expected, atol=1e-5)
    with pytest.raises(ValueError, match="1 of the 3 evaluation classes"):
        teachers.make_teacher(c.teacher, ("blobs", "checks", "x"), 16, meshes.make_mesh())


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


def test_checking_with_another_teacher_is_refused(folder, tmp_path, monkeypatch):
    config = make_config(folder)
    config.store.path = str(tmp_path / "store")
    fill(config, tmp_path)
    manifest = tmp_path / "store" / "manifest.json"
    text = json.loads(manifest.read_text())
    text["teacher"]["weights"] = "0" * 64
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
    ("augment.erase", 0.0, "augment"), ("data.seed", 5, "data_seed"), ("store.top_k", 1, "top_k"),
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
