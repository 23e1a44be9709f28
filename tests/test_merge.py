"""Merged stores hold every view of their parts, with its seed and its target, and no other."""

import logging
import shutil

import numpy as np
import pytest
import test_edit as t
import tiny
from test_edit import CLASSES, Images, make_manifest, make_store, read_views, shard_bytes

from tinyvit_jax.data import images
from tinyvit_jax.data.order import Order
from tinyvit_jax.store import edit, merge, rows
from tinyvit_jax.store import store as stores
from tinyvit_jax.store.manifest import StoreError


@pytest.fixture
def source():
    return Images(range(45))


def make_part(path, source, numbers, **changes):
    """A store of which only some shards were captured."""
    store = stores.create_store(path, make_manifest(source, **changes))
    return t.fill(store, [s for i, s in enumerate(store.shards()) if i in numbers])


def test_parts_of_one_capture_come_together(source, tmp_path, caplog):
    whole = make_store(tmp_path / "whole", source)
    parts = [make_part(tmp_path / "a", source, {0, 2}), make_part(tmp_path / "b", source, {1, 2})]
    with caplog.at_level(logging.INFO, "tinyvit_jax"):
        first = merge.merge(parts, tmp_path / "out")
    assert [str(s) for s in first.missing()] == ["pass 1, shard 0", "pass 1, shard 1",
                                                 "pass 1, shard 2"]
    assert "3 of 6 shards are in none of the stores, the first: pass 1, shard 0" in caplog.text
    parts.append(make_part(tmp_path / "c", source, {3, 4, 5}))
    out = merge.merge(parts, tmp_path / "out")
    assert out.missing() == []
    assert out.manifest == whole.manifest
    assert shard_bytes(out) == shard_bytes(whole)


def test_a_part_may_have_more_passes(source, tmp_path):
    out = merge.merge([make_part(tmp_path / "a", source, {0, 1, 2}, passes=1),
                       make_part(tmp_path / "b", source, {3, 4, 5})], tmp_path / "out")
    assert shard_bytes(out) == shard_bytes(make_store(tmp_path / "whole", source))


def rewrite(store, shard, change):
    """Writes a shard again with other probabilities."""
    keys = rows.read_keys(store, shard.pass_number, shard.start, shard.stop)
    index, prob = store.read(shard.pass_number, shard.start, shard.stop)
    size = store.manifest.block_views
    store.write_shard(shard, [
        ((keys[0][s], keys[1][s]), index[s], change(prob[s]).astype(np.float32))
        for s in (slice(i, i + size) for i in range(0, shard.stop - shard.start, size))])


def test_a_shard_of_two_stores_may_differ_by_float_noise(source, tmp_path):
    a, b = (make_store(tmp_path / n, source) for n in "ab")
    rewrite(b, b.shards()[1], lambda prob: prob * (1 - 1e-3))
    before = shard_bytes(a)
    assert shard_bytes(b) != before
    assert shard_bytes(merge.merge([a, b], tmp_path / "out")) == before
    rewrite(b, b.shards()[1], lambda prob: prob * 0.8)
    with pytest.raises(StoreError, match=r"pass 0, shard 1 has other targets in .*/a than in "
                                         r".*/b: KL up to .* at most 1e-03 .*check_store"):
        merge.merge([a, b], tmp_path / "other")
    assert not (tmp_path / "other" / "pass-00000" / "shard-00001.array_record").exists()


def test_divergence_counts_classes_that_only_one_has():
    p = np.array([[1, 2]], np.int32), np.array([[0.5, 0.3]], np.float32)
    q = np.array([[2, 4]], np.int32), np.array([[0.6, 0.1]], np.float32)
    # Of 6 classes, q leaves 0.3 to 4 of them: class 1 gets 0.075.
    wanted = (0.5 * np.log(0.5 / 0.075) + 0.3 * np.log(0.3 / 0.6) + 0.2 * np.log(0.2 / 0.325))
    np.testing.assert_allclose(merge.divergence(p, q, 6), [wanted], rtol=1e-6)
    assert merge.divergence(p, (p[0][:, ::-1], p[1][:, ::-1]), 6) == pytest.approx(0)
    several = [np.concatenate([a, b]) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(merge.divergence(several, several, 6), [0, 0], atol=1e-12)


def test_passes_of_other_seeds_follow(source, tmp_path):
    a, b = make_store(tmp_path / "a", source), make_store(tmp_path / "b", source, 8, passes=1,
                                                         shard_views=8)
    c = edit.subset(make_store(tmp_path / "whole", source, 9, passes=3), tmp_path / "c",
                    passes=[2, 1])
    out = merge.merge([a, b, c], tmp_path / "out")
    assert (out.manifest.keys, out.manifest.passes, out.manifest.shard_views) == ("stored", 5, 16)
    assert [read_views(out, p) for p in range(5)] == [
        *(read_views(a, p) for p in range(2)), read_views(b, 0),
        *(read_views(c, p) for p in range(2))]
    assert not out.verify()
    kept, copied = shard_bytes(out), shard_bytes(c)  # stored keys and the same cut: as they are
    assert kept["pass-00003/shard-00001.array_record"] == copied[
        "pass-00000/shard-00001.array_record"]
    for name in list(kept)[::3]:
        (out.path / name).unlink()
    assert shard_bytes(merge.merge([a, b, c], tmp_path / "out")) == kept
    with pytest.raises(StoreError, match=r"origin\.from"):
        merge.merge([b, a, c], tmp_path / "out")


def test_the_same_views_twice_are_refused(source, tmp_path):
    a = make_store(tmp_path / "a", source)
    again = edit.subset(a, tmp_path / "b", passes=[1])
    with pytest.raises(StoreError, match=r"pass 0 of .*/b shows 45 of the 45 views that were "
                                         r"compared of pass 1 of .*/a"):
        merge.merge([a, again], tmp_path / "out")


@pytest.mark.parametrize("compared", [1 << 24, 50])
def test_some_views_twice_are_refused(tmp_path, monkeypatch, compared):
    """Wherever they stand, and also where a part of all keys is compared alone."""
    monkeypatch.setattr(rows, "_COMPARED", compared)
    whole = make_store(tmp_path / "whole", Images(range(210)))
    a = edit.subset(whole, tmp_path / "a", images=np.arange(120))
    b = edit.subset(whole, tmp_path / "b", images=np.arange(90, 210), passes=[1])
    first = [read_views(s, p) for s, p in ((a, 1), (b, 0))]
    assert first[0][:4] != first[1][:4]
    shared = len({*first[0]} & {*first[1]})
    assert shared == 30
    found = "30 of the 120" if compared > 50 else "[0-9]+ of the [0-9]+"
    with pytest.raises(StoreError, match=f"pass 0 of .*/b shows {found} views that were compared "
                                         "of pass 1 of .*/a"):
        merge.merge([a, b], tmp_path / "out")


def make_import(path, seed, numbers=range(6), **changes):
    """A store with keys of its own, of 45 images, as an import makes it: only some shards."""
    order = Order(seed, 45, False)
    store = stores.create_store(path, make_manifest(
        Images(range(45)), 0, keys="stored", origin={"format": "microsoft", "first_epoch": 0},
        **changes))
    for shard in [s for i, s in enumerate(store.shards()) if i in numbers]:
        starts = range(shard.start, shard.stop, store.manifest.block_views)
        keys = [order.keys(np.full(len(q), shard.pass_number), q) for q in (
            np.arange(s, min(s + store.manifest.block_views, shard.stop)) for s in starts)]
        store.write_shard(shard, [(k, *t.targets(k[1])) for k in keys])
    return store


def test_two_imports_are_no_parts_of_one(tmp_path):
    a, b = make_import(tmp_path / "a", 1), make_import(tmp_path / "b", 2)
    out = merge.merge([a, b], tmp_path / "out")
    assert [read_views(out, p) for p in range(4)] == [read_views(s, p) for s in (a, b)
                                                      for p in range(2)]
    parts = [make_import(tmp_path / "c", 1, {0, 1, 2}),
             make_import(tmp_path / "d", 1, {2, 3, 4, 5})]
    assert shard_bytes(merge.merge(parts, tmp_path / "one")) == shard_bytes(a)
    apart = [parts[0], make_import(tmp_path / "e", 1, {3, 4, 5})]
    assert shard_bytes(merge.merge(apart, tmp_path / "two")) == shard_bytes(a)


def test_the_log_counts_what_is_done(source, tmp_path, caplog):
    a, b = make_store(tmp_path / "a", source), make_import(tmp_path / "b", 2)
    with caplog.at_level(logging.INFO, "tinyvit_jax"):
        merge.merge([b, a], tmp_path / "out")
    assert [r.message.split(", ")[0].replace(str(tmp_path), "") for r in caplog.records] == [
        "merge: 6 of 12 shards of /out are to be copied", "merge: 6 of 6 shards copied",
        "merge: 6 of 12 shards of /out are to be written", "merge: 6 of 6 shards written"]
    caplog.clear()
    with caplog.at_level(logging.INFO, "tinyvit_jax"):
        merge.merge([make_part(tmp_path / n, source, {i}) for i, n in enumerate("cd")],
                    tmp_path / "parts")
    assert [r.message.split(", ")[0].replace(str(tmp_path), "") for r in caplog.records] == [
        "merge: 2 of 6 shards of /parts are to be copied", "merge: 2 of 2 shards copied",
        "merge: 4 of 6 shards are in none of the stores"]


def test_a_teacher_file_may_be_called_otherwise(source, tmp_path):
    def make(name, teacher, seed):
        return make_store(tmp_path / name, source, seed, teacher={"name": teacher,
                                                                 "weights": "ab12"})
    a, b = make("a", "swin.pth", 7), make("b", "copy.pth", 8)
    assert merge.merge([a, b], tmp_path / "out").manifest.passes == 4
    f, g = make("f", "my_teachers:f", 7), make("g", "my_teachers:g", 8)
    with pytest.raises(StoreError, match=r"teacher\.name is 'my_teachers:g' in the store"):
        merge.merge([f, g], tmp_path / "other")
    with pytest.raises(StoreError, match=r"origin\.from.*name another folder by --out"):
        merge.merge([a, make("h", "swin.pth", 9)], tmp_path / "out")

@pytest.mark.parametrize(("changes", "message"), [
    ({"teacher": {"name": "t", "weights": "cd34"}},
     r"store .*/b .*teacher\.weights is 'cd34' in the store, 'ab12' here.*\(\"here\" is .*/a"),
    ({"augment": t.MIXED}, r"augment\.mixup is 0\.8 in the store, 0\.0 here"),
    ({"class_names": (*CLASSES[:-1], "cat")}, r"class_names\[19\] is 'cat' in the store, 'class "),
    ({"temperature": 2.0}, r"temperature is 2\.0 in the store, 1\.0 here"),
    ({"tail": "none"}, "tail is 'none' in the store, 'uniform' here"),
    ({"codec": "compact"}, "codec is 'compact' in the store, 'float16' here"),
    ({"top_k": 2}, r"top_k is 2 in the store, 3 here.*--do=subset"),
    ({"views_per_pass": 44}, r"views_per_pass is 44 in the store, 45 here.*--do=subset"),
    ({"image_set": {"name": "x", "fingerprint": "other", "images": 45}},
     r"image_set\.fingerprint is 'other'"),
])
def test_what_decides_a_target_must_be_the_same(source, tmp_path, changes, message):
    a = make_store(tmp_path / "a", source)
    b = stores.create_store(tmp_path / "b", make_manifest(source, 8, **changes))
    with pytest.raises(StoreError, match=message):
        merge.merge([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stores_that_were_shown_other_pixels(source, tmp_path):
    a = make_store(tmp_path / "a", source, replay=t.hashes((0, 0), (0, 4)))
    replay = t.hashes((0, 0), (0, 4))
    replay["sha256"][1] = "f" * 64
    b = make_store(tmp_path / "b", source, replay=replay)
    with pytest.raises(StoreError, match=r"other pixels: of the view at .*\(0, 4\), "
                                         r"replay\.sha256 is '00.*4' in the first and 'f"):
        merge.merge([a, b], tmp_path / "out")
    other = make_store(tmp_path / "c", source, 8, replay=replay | {"versions": {"opencv": "5"}})
    out = merge.merge([a, other], tmp_path / "out")
    assert out.manifest.replay["views"] == [[0, 0], [0, 4], [2, 0], [2, 4]]
    assert out.manifest.replay["versions"] == {"opencv": "4.10, 5"}


def test_incomplete_stores_do_not_follow_one_another(source, tmp_path):
    a, b = make_store(tmp_path / "a", source), make_part(tmp_path / "b", source, {0}, seed=8)
    with pytest.raises(StoreError, match=r"store .*/b lacks 5 shards .* first: pass 0, shard 1"):
        merge.merge([a, b], tmp_path / "out")
    with pytest.raises(StoreError, match="two stores or more, found 1"):
        merge.merge([a], tmp_path / "out")


def make_two(tmp_path, sizes=(60, 25), mixed=False, **changes):
    """Two stores of images of their own, and a source of all of them in another order."""
    keys = np.random.default_rng(1).permutation(sum(sizes))
    sources = [Images(f"{part}/{i}" for i in range(n)) for part, n in zip("ab", sizes, strict=True)]
    made = [make_store(tmp_path / part, source, seed, mixed, **changes)
            for part, source, seed in zip("ab", sources, (7, 8), strict=True)]
    every = [k.decode() for source in sources for k in list(source.keys())]
    return made, sources, Images([every[i] for i in keys], "all")


def named(views, source):
    keys = source.keys()
    return [(keys[i], seed) for i, seed in views]


@pytest.mark.parametrize("mixed", [False, True])
def test_images_are_added(tmp_path, mixed):
    made, sources, union = make_two(tmp_path, mixed=mixed)
    out = merge.extend(made, sources, union, tmp_path / "out")
    assert out.manifest.image_set == {"name": "all", "fingerprint": union.fingerprint, "images": 85}
    assert out.missing() == []
    assert not out.verify()
    for p in range(2):
        views = named(read_views(out, p), union)
        parts = [named(read_views(store, p), source)
                 for store, source in zip(made, sources, strict=True)]
        for part in parts:  # every store's own order is kept
            mine = set(part)
            assert [v for v in views if v in mine] == part
        assert len(views) == sum(map(len, parts))
        if mixed:  # and its pairs
            pairs = {pair for part in parts for pair in zip(part[::2], part[1::2], strict=True)}
            assert pairs == set(zip(views[::2], views[1::2], strict=True))
    orders = [[key[:1] for key, _ in named(read_views(out, p), union)] for p in range(2)]
    assert orders[0] != orders[1]


def test_an_extension_goes_on_where_it_was_killed(tmp_path):
    made, sources, union = make_two(tmp_path, (200, 150))
    out = merge.extend(made, sources, union, tmp_path / "out")
    before = shard_bytes(out)
    for name in list(before)[::3]:
        (out.path / name).unlink()
    assert shard_bytes(merge.extend(made, sources, union, tmp_path / "out")) == before


def test_every_place_is_as_likely_to_be_of_the_added_images(tmp_path):
    """Over many passes each place, and each pair of places, is what a uniform draw makes it."""
    made, sources, _ = make_two(tmp_path, (12, 6), passes=1)
    deal = merge._Deal(made, [np.arange(len(s)) for s in sources])
    drawn = np.stack([deal.labels(p) for p in range(1000)])
    assert (drawn.sum(1) == 6).all()
    assert abs(drawn.mean(0) - 1 / 3).max() < 4.5 * (2 / 9 / 1000) ** 0.5
    together = (drawn.T.astype(float) @ drawn) / 1000
    off = together[~np.eye(18, dtype=bool)]
    share = 6 * 5 / (18 * 17)
    assert abs(off - share).max() < 5 * (share * (1 - share) / 1000) ** 0.5


def test_more_stores_than_a_byte_counts(tmp_path):
    store = make_store(tmp_path / "a", Images(range(2)), passes=1)
    labels = merge._Deal([store] * 300, [np.arange(2)] * 300).labels(0)
    np.testing.assert_array_equal(np.bincount(labels), np.full(300, 2))


def test_three_stores_and_their_hashes(tmp_path):
    sources = [Images(f"{part}/{i}" for i in range(n)) for part, n in zip("abc", (20, 9, 31),
                                                                        strict=True)]
    made = [make_store(tmp_path / s.name / str(i), s, i, replay=t.hashes((0, i), (1, 8)))
            for i, s in enumerate(sources)]
    union = Images([k.decode() for s in sources[::-1] for k in list(s.keys())])
    out = merge.extend(made, sources, union, tmp_path / "out")
    replay = out.manifest.replay
    found = [named(read_views(out, p), union)[q] for p, q in replay["views"]]
    wanted = [named(read_views(store, p), source)[q]
              for i, (store, source) in enumerate(zip(made, sources, strict=True))
              for p, q in ((0, i), (1, 8))]
    assert found == wanted


def test_images_that_do_not_go_together(tmp_path):
    made, sources, union = make_two(tmp_path)

    def refuse(message, stores_=made, sources_=sources, union_=union):
        with pytest.raises(StoreError, match=message):
            merge.extend(stores_, sources_, union_, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    every = [k.decode() for k in list(union.keys())]
    refuse(r"1 images of .* are not in all\. The first: ", union_=Images(
        [k for k in every if k != "b/3"], "all"))
    refuse(r"1 images of all are in none of .* The first: c/1\.",
           union_=Images([*every, "c/1"], "all"))
    refuse(r"are not those of synthetic", sources_=sources[::-1])
    overlap = Images(["b/1", "a/2"])
    refuse(r"1 images of synthetic are also in one of the other sources.*subset.*first: a/2",
           [made[0], make_store(tmp_path / "c", overlap, 8)], [sources[0], overlap])
    longer = make_store(tmp_path / "d", sources[1], 8, passes=3)
    refuse(r"passes is 3 in the store, 2 here.*--do=subset", [made[0], longer])
    other = make_store(tmp_path / "e", sources[1], 8, teacher={"name": "t", "weights": "x"})
    refuse(r"teacher\.weights", [made[0], other])
    union.class_names = (*CLASSES[1:], "cat")
    refuse("20 classes and synthetic 20, or others")


def test_folders_without_splits_hold_out_other_images(tmp_path):
    """The message says why images of a part are not in the whole, and what to do."""
    roots = [tmp_path / n for n in ("a", "b", "all")]
    for number, root in enumerate(roots):
        for name in tiny.CLASSES:
            (root / name).mkdir(parents=True)
            for i in range(12):
                if number in (i % 2, 2):
                    (root / name / f"{i}.png").write_bytes(b"")
    opened = [images.open_source(f"folder:{root}", "train") for root in roots]
    with pytest.raises(StoreError, match=r"images of .* are not in .*give every folder a train/ "
                                         r"and a val/"):
        merge.map_images(opened[:2], opened[2])


def split(folder, *parts):
    """Copies of a folder of images, each with its share of them below train/, and all below val/.
    """
    roots = []
    for number, root in enumerate(parts):
        for name in tiny.CLASSES:
            files = sorted((folder / name).iterdir())
            for part, kept in (("val", files[:2]), ("train", files if number == 2 else
                                                    files[2 + number::2])):
                target = root / part / name
                target.mkdir(parents=True, exist_ok=True)
                for file in kept:
                    if part == "val" or file not in files[:2]:
                        shutil.copy(file, target / file.name)
        roots.append(root)
    return roots


def extend_tiny(tmp_path):
    """Two captured stores of a part of the images each, and the one that is made of both."""
    roots = split(tiny.make_folder(tmp_path / "images"), *(tmp_path / n for n in ("a", "b", "u")))
    configs = [tiny.make_config(root) for root in roots]
    configs[1].data.seed = 5
    captured = [t.capture(c, tmp_path / f"store{i}") for i, c in enumerate(configs[:2])]
    union = images.open_source(f"folder:{roots[2]}", "train")
    out = merge.extend([s for s, _ in captured], [d.train for _, d in captured], union,
                       tmp_path / "out")
    return configs, captured, union, out


def test_an_extended_store_shows_what_its_parts_did(tmp_path):
    configs, captured, union, out = extend_tiny(tmp_path)
    before = [t.shown(c, d, s) for c, (s, d) in zip(configs, captured, strict=False)]
    data = t.train.open_data(configs[2])
    after = t.shown(configs[2], data, out)
    assert len(after) == len(before[0]) + len(before[1]) == 2 * len(union)
    t.assert_same_views(after, before[0] | before[1])


@pytest.mark.slow
def test_a_student_learns_from_an_extended_store(tmp_path):
    configs, _, _, out = extend_tiny(tmp_path)
    configs[2].teacher.name = configs[0].teacher.name
    data = t.train.open_data(configs[2])
    assert t.fit(configs[2], data, out, tmp_path / "run") > 0
