"""A store that holds the keys of its images."""

import os

import numpy as np
import pytest
import tiny_store

from tinyvit_jax.store import shards
from tinyvit_jax.store import store as stores


@pytest.fixture
def store(tmp_path):
    return tiny_store.make_store(tmp_path / "store")


@pytest.fixture
def keyed(tmp_path):
    """A complete store that keeps its keys."""
    return tiny_store.fill(stores.create_store(tmp_path / "keyed", tiny_store.make_manifest(
        codec="float16", keys="stored", origin={"format": "other"})))


def test_stored_keys_come_back_from_every_range(keyed):
    fresh = stores.open_store(keyed.path)
    assert fresh.verify() == []
    assert fresh.manifest == keyed.manifest
    for start in range(45):
        for stop in range(start + 1, 46):
            keys, _, _ = tiny_store.targets(start % 2, start, stop)
            image, seed = fresh.keys(start % 2, start, stop)
            assert (image.dtype, seed.dtype) == (np.int64, np.uint32)
            np.testing.assert_array_equal(image, keys[0])
            np.testing.assert_array_equal(seed, keys[1])
    tiny_store.check_range(fresh, 1, 3, 45)
    with pytest.raises(stores.StoreError, match=r"2 passes of 45 views\.$"):
        fresh.keys(2, 0, 1)


@pytest.mark.parametrize("images", [1 << 32, (1 << 32) + 1, 1 << 40])
def test_the_largest_stored_keys_come_back(tmp_path, images):
    m = tiny_store.make_manifest(keys="stored", views_per_pass=4, passes=1,
                      image_set={**tiny_store.FIELDS["image_set"], "images": images})
    store = stores.create_store(tmp_path, m)
    keys = np.array([0, images - 1, 255, 1 << 16]), np.array([0, (1 << 32) - 1, 1 << 31, 7])
    _, index, prob = tiny_store.targets(0, 0, 4)
    store.write_shard(store.shards()[0], [(keys, index, prob)])
    for wanted, found in zip(keys, store.keys(0, 0, 4), strict=True):
        assert wanted.tolist() == found.tolist()


@pytest.mark.parametrize(("which", "value", "message"), [
    (0, 45, r"view 2 .*image index must lie in \[0, 45\), found 45"),
    (0, -1, "image index.*found -1"), (1, 1 << 32, "view seed.*found 4294967296")])
def test_keys_that_cannot_be_stored_are_refused(tmp_path, which, value, message):
    store = stores.create_store(tmp_path, tiny_store.make_manifest(keys="stored"))
    contents = list(tiny_store.blocks(store, store.shards()[0]))
    keys = [part.astype(np.int64) for part in contents[0][0]]
    keys[which][2] = value
    with pytest.raises(ValueError, match=message):
        store.write_shard(store.shards()[0], [(tuple(keys), *contents[0][1:]), *contents[1:]])


def test_changed_keys_are_named_though_every_other_checksum_fits(keyed):
    """A shard written anew with one key flipped behind the back of its digest."""
    shard = keyed.shards()[3]
    reader = stores.Reader(tiny_store.shard_file(keyed, shard))
    records = [bytearray(reader.read(i)) for i in range(reader.count)]
    records[1][8 + 2] ^= 1  # the low byte of the third view's image index
    tiny_store.rewrite(tiny_store.shard_file(keyed, shard), records)
    fresh = stores.open_store(keyed.path)
    with pytest.raises(stores.StoreError, match=r"pass 1, shard 0 .*block 1: .*digest of its keys"):
        fresh.keys(1, 4, 8)
    assert [(p.shard, p.block) for p in fresh.verify()] == [(shard, 1)]


def test_a_store_by_formula_has_no_keys_to_give(store):
    with pytest.raises(stores.StoreError, match="keys=formula"):
        store.keys(0, 0, 1)


def test_other_views_of_a_store_with_keys_are_refused(keyed):
    image, seed = tiny_store.targets(0, 0, 45)[0]
    keyed.read(0, 0, 45, (image, seed))
    with pytest.raises(stores.StoreError, match=r"block 0 .*other views.*follow_store"):
        keyed.read(0, 0, 45, (image[::-1], seed[::-1]))


def test_what_an_imported_store_lacks_is_imported(keyed):
    os.remove(tiny_store.shard_file(keyed, keyed.shards()[0]))
    with pytest.raises(stores.StoreError, match=r"missing. Make it with: .*import_store\.py"):
        stores.open_store(keyed.path).keys(0, 0, 4)
    assert [str(s) for s in keyed.missing()] == ["pass 0, shard 0"]
    assert tiny_store.fill(keyed).verify() == []


@pytest.mark.parametrize(("changes", "message"), [
    ({"keys": "none"}, "keys='none'.*formula, stored"),
    ({"keys": "stored", "image_set": {"name": "x"}}, "image_set=.*number of images"),
    ({"origin": {"format": "other"}}, "origin=.*formula gives the keys")])
def test_manifests_about_keys_that_cannot_work(tmp_path, changes, message):
    with pytest.raises(stores.StoreError, match=message):
        stores.create_store(tmp_path / "new", tiny_store.make_manifest(**changes))


def test_the_kind_of_keys_is_compared(keyed):
    with pytest.raises(stores.StoreError, match=r"keys is 'stored' in the store, 'formula' here"):
        stores.create_store(keyed.path, tiny_store.make_manifest(codec="float16"))


def test_estimate_counts_stored_keys(tmp_path):
    m = tiny_store.make_manifest(keys="stored")
    assert stores.blocks.key_bytes(m) == 1 + 4  # 45 images
    assert stores.blocks.key_bytes(tiny_store.make_manifest()) == 0
    plain = shards.estimate(1000, 3, 20)
    assert shards.estimate(1000, 3, 20, key_bytes=8) == plain + 8000
