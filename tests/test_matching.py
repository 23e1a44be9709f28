import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny

from tinyvit_jax import matching, train, weights
from tinyvit_jax.data import augment, pipeline
from tinyvit_jax.data.order import follow_store
from tinyvit_jax.store import manifest as manifests
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.manifest import Manifest, StoreError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, a teacher's workdir, a config that names both, and a complete store of them."""
    root = tmp_path_factory.mktemp("world")
    config = tiny.make_config(tiny.make_folder(root / "images"))
    model = weights.make_model(config.teacher, 3)
    shapes = jax.eval_shape(lambda: model.init(
        jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32)))
    variables = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
    weights.save_trained(weights.Trained(model, variables, tiny.CLASSES, (0.5,) * 3, (0.25,) * 3,
                                         "center", 1.0), root / "teacher")
    config.teacher.update({"weights": str(root / "teacher"), "mean": (0.5,) * 3,
                           "std": (0.25,) * 3, "image_size": 16, "epochs": 0})
    data = train.open_data(config)
    manifest = make_manifest(config, data)
    fill(stores.create_store(root / "store", manifest), data)
    return World(config, data, root, manifest)


class World(NamedTuple):
    """What the tests share."""

    config: Any
    data: train.Data
    root: Path
    manifest: Manifest  # of a capture of the config


def spec_of(config):
    return augment.make_spec(config.augment, 16)


def make_manifest(config, data, **changes):
    """What a capture of the config would write."""
    s, spec = config.store, spec_of(config)
    return Manifest(**{
        "teacher": {"name": "tiny_vit", "weights": matching.teachers.hash_teacher(config.teacher),
                    "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3, "dtype": "float32"},
        "class_names": tiny.CLASSES, "top_k": s.top_k, "augment": augment.to_dict(spec),
        "image_set": {"name": data.train.name, "fingerprint": data.train.fingerprint,
                      "images": len(data.train)},
        "data_seed": data.order.seed, "passes": s.passes,
        "views_per_pass": data.order.views_per_pass, "shard_views": s.shard_views,
        "block_views": s.block_views, "codec": s.codec, "temperature": s.temperature,
        "tail": s.tail, "replay": matching.make_replay(data.train, spec, data.order), **changes})


def fill(store, data):
    """Writes every shard; the targets tell their places."""
    for shard in store.shards():
        def contents(shard=shard):
            for start in range(shard.start, shard.stop, store.manifest.block_views):
                stop = min(start + store.manifest.block_views, shard.stop)
                place = np.arange(start, stop)
                prob = np.stack([0.5 + place / 256, np.full(len(place), 0.125)], 1)
                yield (data.order.keys(np.full(len(place), shard.pass_number), place),
                       np.stack([place % 3, (place + 1) % 3], 1).astype(np.int32),
                       prob.astype(np.float32))
        store.write_shard(shard, contents())
    return store


def start(config, data, path):
    """What a run does with its store before the first update; gives what it then shows."""
    store = stores.open_store(path)
    data = data._replace(order=follow_store(data.order, store))
    spec = spec_of(config)
    matching.check_store(store, config, data, spec)
    matching.check_replay(store, data, spec, config.store.replay)
    return pipeline.Views(data.train, spec, data.order, store, config.store.passes,
                          config.store.top_k)


def read_all(views):
    """Every view of the config's passes, in batches."""
    total = 2 * views.order.views_per_pass
    parts = [views.read(np.arange(i, min(i + 8, total))) for i in range(0, total, 8)]
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


# Every field of a manifest, nested ones by their dotted names, with another value for it, and what
# becomes of that: "refused" (naming the field and both values), or else the reason why not.
# "same": training may go on, and shows what it would have shown. "read": the first read finds it.
REFUSED = "refused"
DECISIONS = {
    "teacher.name": ("another", "same: weights are known by their hash, a name by chance"),
    "teacher.weights": ("0" * 64, REFUSED), "teacher.image_size": (32, REFUSED),
    "teacher.mean": ([0.5, 0.5, 0.4], REFUSED), "teacher.std": ([0.2, 0.2, 0.2], REFUSED),
    "teacher.dtype": ("bfloat16", REFUSED),
    "class_names": (["blobs", "dots", "stripes"], REFUSED),
    "top_k": (1, REFUSED),
    "augment.spec": ("imagenet", REFUSED), "augment.version": (7, REFUSED),
    "augment.image_size": (20, REFUSED), "augment.scale": ([0.1, 1.0], REFUSED),
    "augment.ratio": ([0.5, 2.0], REFUSED), "augment.pad": (3, REFUSED),
    "augment.flip": (0.25, REFUSED), "augment.rand_augment": ("rand-m9", REFUSED),
    "augment.color_jitter": (0.1, REFUSED), "augment.erase": (0.1, REFUSED),
    "augment.mixup": (0.1, REFUSED), "augment.cutmix": (0.1, REFUSED),
    "augment.mix_prob": (0.1, REFUSED), "augment.mix_switch": (0.1, REFUSED),
    "augment.mean": ([0.0, 0.0, 0.0], REFUSED), "augment.std": ([1.0, 1.0, 1.0], REFUSED),
    "image_set.name": ("folder:/elsewhere", "same: images may move, their fingerprint counts"),
    "image_set.fingerprint": ("0" * 64, REFUSED), "image_set.images": (34, REFUSED),
    "data_seed": (1, REFUSED), "passes": (1, REFUSED), "views_per_pass": (36, REFUSED),
    "shard_views": (8, "read: it says where the bytes lie, and shards have other lengths"),
    "block_views": (4, "read: it says where the bytes lie, and shards have other counts of blocks"),
    "codec": ("float16", "same: each block says itself how it was written"),
    "temperature": (2.0, REFUSED), "tail": ("none", REFUSED),
    "keys": ("stored", "read: blocks without keys are no blocks with keys"),
    "origin": ({"format": "edited"}, REFUSED),
    "replay.views": ([[0, 1]] * 8, "read: other views have other hashes"),
    "replay.sha256": (["ab" * 32] * 8, REFUSED),
    "replay.versions.opencv": ("1.0", "same: they say why pixels differ, not whether"),
    "replay.versions.pillow": ("1.0", "same: they say why pixels differ, not whether"),
    "replay.versions.numpy": ("1.0", "same: they say why pixels differ, not whether"),
    "replay.versions.simplejpeg": ("1.0", "same: they say why pixels differ, not whether"),
    "format_version": (2, "same: it says who can read the file"),
}
# Further values of fields whose direction matters.
MORE = {
    "passes": (3, "same: a run shows the passes that it asks for"),
    "top_k": (3, "read: a store may hold more classes than a run asks for; these blocks do not"),
}
CASES = [*[(name, *case) for name, case in DECISIONS.items()],
         *[(name, *case) for name, case in MORE.items()]]


def set_field(fields, name, value):
    *outer, last = name.split(".")
    for key in outer:
        fields = fields[key]
    old, fields[last] = fields[last], value
    return old


@pytest.fixture
def edited(world, tmp_path):
    """fn(name, value) -> (path of a copy of the store whose manifest says that, old value)."""
    path = shutil.copytree(world.root / "store", tmp_path / "store")

    def edit(name, value):
        file = path / "manifest.json"
        fields = json.loads(file.read_text())
        del fields["checksum"]
        old = set_field(fields, name, value)
        file.write_text(json.dumps(fields | {"checksum": manifests.checksum(fields)}))
        return path, old

    return edit


@pytest.fixture(scope="module")
def shown(world):
    """What a run shows from the store as it was written."""
    return read_all(start(world.config, world.data, world.root / "store"))


def test_every_field_has_a_decision(world):
    flat = manifests.flatten(world.manifest.to_dict())
    assert {name.removesuffix(".") for name in flat} == set(DECISIONS)
    assert {field.name for field in dataclasses.fields(Manifest)} | {"format_version"} == {
        name.partition(".")[0] for name in DECISIONS}


def both(name, old, new):
    """The texts that an error about a field must hold: its name, and the entries that differ."""
    if isinstance(old, list) and len(old) == len(new) and len(old) > 4:
        return [name, repr(old[0]), repr(new[0])]
    return [name, repr(old), repr(new)]


@pytest.mark.parametrize(("name", "value", "decision"), CASES, ids=[f"{c[0]}-{c[2][:4]}"
                                                                     for c in CASES])
def test_training_starts_with_the_right_store_alone(world, shown, edited, name, value, decision):
    config, data = world.config, world.data
    if not name.startswith("teacher."):  # which reads its weights, and has its own cases
        config = without_teacher(config)
    path, old = edited(name, value)
    if decision.startswith("same: "):
        found = read_all(start(config, data, path))
        for key, expected in shown.items():
            np.testing.assert_array_equal(found[key], expected)
        return
    with pytest.raises(StoreError) as error:
        read_all(start(config, data, path))
    if decision == REFUSED:
        expected = both(name, old, value) if name != "origin" else [name, repr(value), "nothing"]
        assert all(text in str(error.value) for text in expected), str(error.value)
        assert ".py" in str(error.value)  # what to run
    else:
        assert decision.startswith("read: ")


def test_fast_pixels_are_refused_where_exact_ones_are_implied(world, edited):
    path, _ = edited("augment", {**world.manifest.augment, "pixels": "fast"})
    with pytest.raises(StoreError, match=r"augment\.pixels is 'fast' in the store, 'exact' here"):
        start(without_teacher(world.config), world.data, path)


def test_grey_views_are_refused_where_none_are_implied(world, edited):
    path, _ = edited("augment", {**world.manifest.augment, "greyscale": 0.1})
    with pytest.raises(StoreError, match=r"augment\.greyscale is 0\.1 in the store, 0\.0 here"):
        start(without_teacher(world.config), world.data, path)


def test_a_setting_that_this_release_does_not_know_is_refused(world, edited):
    path, _ = edited("augment", {**world.manifest.augment, "blur": 2})
    with pytest.raises(StoreError, match=r"augment\.blur is 2 in the store, '\(absent\)' here"):
        start(without_teacher(world.config), world.data, path)


# What a capture that goes on may find otherwise than it would write it.
JOINED = {"image_set.name", "replay.versions.opencv", "replay.versions.pillow",
          "replay.versions.numpy", "replay.versions.simplejpeg", "format_version", "passes-1"}


@pytest.mark.parametrize(("name", "value", "decision"), CASES, ids=[f"{c[0]}-{c[1]}"[:40]
                                                                     for c in CASES])
def test_a_capture_goes_on_in_the_right_store_alone(world, edited, name, value, decision):
    path, old = edited(name, value)
    if name in JOINED or f"{name}-{value}" in JOINED:
        assert stores.create_store(path, world.manifest).missing() == []
        return
    with pytest.raises(StoreError) as error:
        stores.create_store(path, world.manifest)
    expected = both(name, old, value) if name != "origin" else [name, repr(value), "nothing"]
    assert all(text in str(error.value) for text in expected), str(error.value)
    assert ".py" in str(error.value)


def without_teacher(config):
    """The config of a machine that the teacher's weights are not on."""
    return change_config(config, teacher__weights="")


def change_config(config, **changes):
    config = tiny.configs.ml_collections.ConfigDict(config.to_dict())
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def test_the_config_says_what_the_store_must_be(world, tmp_path):
    config, data, root, _ = world
    config = change_config(config, teacher__weights=str(tmp_path / "not here"))
    for key, value, message in (
            ("store.top_k", 3, r"top_k is 2 in the store, 3 here.*save_logits\.py"),
            ("store.passes", 3, r"passes is 2 in the store, 3 here"),
            ("store.temperature", 2.0, r"temperature is 1\.0 in the store, 2\.0 here"),
            ("store.tail", "none", r"tail is 'uniform' in the store, 'none' here"),
            ("augment.erase", 0.5, r"augment\.erase is 0\.25 in the store, 0\.5 here"),
            ("teacher.dtype", "bfloat16", r"teacher\.dtype is 'float32' .*'bfloat16' here"),
            ("teacher.name", "mine:f", r"teacher\.name is 'tiny_vit' in the store, 'mine:f' here")):
        with pytest.raises(StoreError, match=message):
            start(change_config(config, **{key: value}), data, root / "store")
    for key, value in (("store.top_k", 1), ("store.passes", 1), ("store.codec", "float16"),
                       ("store.block_views", 4), ("objective.temperature", 3.0)):
        start(change_config(config, **{key: value}), data, root / "store")


def test_other_images_classes_and_seeds(world, tmp_path):
    config, data, root, _ = world
    config = without_teacher(config)
    for changed, message in (
            (data._replace(order=data.order._replace(seed=9)), "data_seed is 0 in the store, 9 h"),
            (data._replace(order=data.order._replace(paired=False)),
             "views_per_pass is 34 in the store, 33 here")):
        with pytest.raises(StoreError, match=message):
            start(config, changed, root / "store")
    other = tiny.make_config(tiny.make_folder(tmp_path / "other", images=13))
    with pytest.raises(StoreError, match=r"image_set\.fingerprint is .*image_set\.images is 33 in"):
        start(other, train.open_data(other), root / "store")


def test_a_pinned_teacher(world):
    config, data, root, _ = world
    own = world.manifest.teacher["weights"]
    config = without_teacher(config)
    for pin in (own, own[:8], own[:8].upper()):
        start(change_config(config, store__teacher=pin), data, root / "store")
    with pytest.raises(StoreError, match=rf"teacher\.weights is '{own}' in the store, and "
                                         r"--config\.store\.teacher=ffff must"):
        start(change_config(config, store__teacher="ffff"), data, root / "store")


def test_a_teacher_that_is_not_here_is_not_compared_and_that_is_said(world, caplog, tmp_path):
    config, data, root, _ = world
    cases = [({"teacher__weights": str(tmp_path / "none")}, "weights of its teacher are not here"),
             ({"teacher__weights": ""}, "weights of its teacher are not here"),
             ({"teacher__ensemble": ("mine:f",)}, "a function of your own")]
    for changes, message in cases:
        caplog.clear()
        with caplog.at_level("INFO", logger="tinyvit_jax"):
            start(change_config(config, **changes), data, root / "store")
        assert message in caplog.text
    caplog.clear()
    store = stores.open_store(root / "store")
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        matching.check_store(store, config, data, spec_of(config))
    assert caplog.text == ""
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        matching.check_store(store, config, data, spec_of(config), alone=False)
    assert "left unread" in caplog.text


def test_several_teachers_have_one_hash(world):
    config, data, root, _ = world
    both = change_config(config, teacher__ensemble=(str(root / "teacher"),))
    with pytest.raises(StoreError, match=r"teacher\.weights is .* in the store, .* here"):
        start(both, data, root / "store")


def test_pixels_that_a_machine_makes_otherwise(world, monkeypatch, caplog):
    config, data, root, _ = world
    config = without_teacher(config)
    replay_batch, shown = augment.replay_batch, []

    def other(images, seeds, spec):
        for (_, key), view in zip(images, replay_batch(images, seeds, spec), strict=True):
            shown.append(key)
            view[3, 5, 1] ^= len(shown) == 5  # the fifth of the views that are compared
            yield view

    monkeypatch.setattr(pipeline.augment, "replay_batch", other)
    monkeypatch.setattr(matching, "read_versions", lambda: {"opencv": "9.9", "pillow": "9"})
    there = world.manifest.replay
    with pytest.raises(StoreError) as error:
        start(config, data, root / "store")
    message = str(error.value)
    place = there["views"][4]
    for text in (f"1 of {len(there['views'])} views", f"pass 0, position {place[1]} ",
                 f"(image {shown[4]})", there["sha256"][4], "here are opencv 9.9",
                 f"opencv-python-headless=={there['versions']['opencv']}", "save_logits.py",
                 "--config.store.replay=warn"):
        assert text in message
    shown.clear()
    with caplog.at_level("WARNING", logger="tinyvit_jax"):
        start(change_config(config, store__replay="warn"), data, root / "store")
    assert "1 of 8 views have other pixels" in caplog.text


def test_another_decoder_may_not_join_a_capture(world, monkeypatch):
    config, data, root, _ = world
    replay_batch = augment.replay_batch
    monkeypatch.setattr(pipeline.augment, "replay_batch",
                        lambda *args: (255 - view for view in replay_batch(*args)))
    here = matching.make_replay(data.train, spec_of(config), data.order)
    with pytest.raises(StoreError, match=r"replay\.sha256\[0\] is .*The libraries have the same v"):
        stores.create_store(root / "store", dataclasses.replace(world.manifest, replay=here))


def test_a_store_without_hashes_says_so(world, caplog):
    config, data, root, _ = world
    old = stores.open_store(root / "store")
    old.manifest = dataclasses.replace(old.manifest, replay={})
    with caplog.at_level("INFO", logger="tinyvit_jax"):
        matching.check_replay(old, data, spec_of(config), "refuse")
    assert "knows no hashes of views" in caplog.text


@pytest.mark.parametrize("images", [1, 3, 8, 9, 1000])
def test_hashed_views_are_spread_over_a_pass(world, images):
    config, data, *_ = world

    class Many:
        """The same few images again and again."""

        def read(self, indices):
            return data.train.read([i % len(data.train) for i in indices])

    order = data.order._replace(num_images=images, paired=False)
    replay = matching.make_replay(Many(), spec_of(config), order)
    place = [q for _, q in replay["views"]]
    assert place == sorted(set(place))
    assert len(place) == min(images, 8)
    assert (place[0], place[-1]) == (0, images - 1)
    assert max(np.diff(place), default=1) <= images // 7 + 1
    assert replay == matching.make_replay(Many(), spec_of(config), order)


def test_a_store_that_is_swapped_under_a_run(world, edited, tmp_path):
    store = stores.open_store(world.root / "store")
    matching.record_store(store, tmp_path, write=False)
    assert not (tmp_path / "store.json").exists()
    matching.record_store(store, tmp_path)
    for name, value in (("passes", 9), ("shard_views", 32), ("image_set.name", "x"),
                        ("replay.versions.opencv", "1")):
        path, _ = edited(name, value)
        matching.record_store(stores.open_store(path), tmp_path)  # the same store
    for name, value in (("teacher.weights", "f" * 64), ("class_names", ["a", "b", "c"]),
                        ("data_seed", 5), ("replay.sha256", ["0" * 64] * 8), ("codec", "float16")):
        path, _ = edited(name, value)
        with pytest.raises(StoreError, match=rf"began with: identity was .*{name} was .*, is .*"
                                             r"another --workdir"):
            matching.record_store(stores.open_store(path), tmp_path)
        shutil.copy(world.root / "store" / "manifest.json", path / "manifest.json")


def test_every_deciding_field_decides_the_identity(world):
    fields = world.manifest.to_dict()
    own = matching.describe(Manifest(**without_version(fields)))
    free = {"passes", "shard_views", "replay.versions", "image_set.name", "format_version"}
    for name, (value, _) in DECISIONS.items():
        changed = json.loads(json.dumps(fields))
        set_field(changed, name, value)
        found = matching.describe(Manifest(**without_version(changed)))
        same = name in free or name.startswith("replay.versions")
        assert (found["identity"] == own["identity"]) == same, name


def without_version(fields):
    return {k: v for k, v in fields.items() if k != "format_version"}


class Begun(Exception):
    """A run has come to its first batch."""


@pytest.fixture
def begin(monkeypatch):
    """fn(config, workdir, data, store) -> (its first batch, its updates); nothing is trained."""
    begun = []

    def stop(views, batch_size, rows, steps):
        begun.append((views.read(np.arange(4)), steps))
        raise Begun

    def fit(config, workdir, data, store):
        with pytest.raises(Begun):
            train.fit(config, workdir, data, store)
        return begun[-1]

    zero = np.zeros((), np.int32)
    monkeypatch.setattr(train, "init_state",  # which takes seconds to compile
                        lambda *args: train.State(zero, {}, {}, {}, {}, zero))
    monkeypatch.setattr(pipeline, "TrainBatches", stop)
    return fit


def test_fit_checks_and_records_its_store(world, begin, tmp_path, monkeypatch):
    config, data, root, _ = world
    config = change_config(without_teacher(config), store__top_k=1)
    store = stores.open_store(root / "store")
    batch, steps = begin(config, tmp_path, data, store)
    assert batch["prob"].shape == (4, 1)
    assert steps == 8  # 2 epochs of 33 images in batches of 8, whatever a pass has
    assert json.loads((tmp_path / "store.json").read_text()) == matching.describe(store.manifest)
    store.manifest = dataclasses.replace(store.manifest, origin={"format": "x"})
    with pytest.raises(StoreError, match=r"origin\.format was None, is 'x'"):
        train.fit(config, tmp_path, data, store)
    monkeypatch.setattr(pipeline.augment, "replay_batch",
                        lambda images, *_: np.zeros((len(images), 16, 16, 3), np.uint8))
    with pytest.raises(StoreError, match="other pixels"):
        train.fit(config, tmp_path, data, store)


def test_an_epoch_of_a_store_with_its_own_keys_is_a_pass_of_it(world, begin, tmp_path):
    config, data, *_ = world
    own = dataclasses.replace(world.manifest, keys="stored", views_per_pass=20, replay={})
    store = fill(stores.create_store(tmp_path / "store", own), data)
    data = data._replace(order=follow_store(data.order, store))
    assert begin(without_teacher(config), tmp_path, data, store)[1] == 5  # 2 epochs of 20 in 8s
