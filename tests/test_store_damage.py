import os
import shutil

import numpy as np
import pytest
from tiny_store import (
    blocks,
    check_range,
    fill,
    make_manifest,
    make_store,
    rewrite,
    shard_file,
    targets,
)

from tinyvit_jax.store import store as stores


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def flip(data, at):
    broken = bytearray(data)
    broken[at] ^= 1 << at % 8
    return bytes(broken)


def test_damage_anywhere_in_a_shard_is_found_and_never_read(tmp_path):
    """Every byte of the records, a fifth of what surrounds them, and samples of the padding."""
    store = fill(stores.create_store(tmp_path, make_manifest(
        codec="float16", passes=1, views_per_pass=12)))
    shard = store.shards()[0]
    file = shard_file(store, shard)
    good = file.read_bytes()
    reader = stores.Reader(file)
    records = [reader.read(number) for number in range(reader.count)]
    starts = [good.index(record) for record in records]
    block_of = {start + i: number for number, (start, record)
                in enumerate(zip(starts, records, strict=True)) for i in range(len(record))}
    used = [at for at in range(len(good)) if good[at]]
    loud = []
    for at in sorted({*block_of, *used[::5], *range(0, len(good), 997), len(good) - 1}):
        file.write_bytes(flip(good, at))
        fresh = stores.open_store(store.path)
        problems = fresh.verify()
        assert str(problems[0]).startswith("pass 0, shard 0: ")
        if at in block_of:
            assert [(p.shard, p.block) for p in problems[1:]] == [(shard, block_of[at])]
            assert str(problems[1]).startswith(f"pass 0, shard 0, block {block_of[at]}: ")
        try:
            check_range(fresh, 0, 0, 12)
        except stores.StoreError as error:
            loud.append(str(error))
        else:
            assert at not in block_of
    assert len(loud) >= len(block_of)
    assert all("pass 0, shard 0" in error and "check_store.py" in error for error in loud)


def test_damage_anywhere_in_a_sidecar_is_found(tmp_path):
    store = fill(stores.create_store(tmp_path, make_manifest(passes=1, views_per_pass=4)))
    sidecar = store.path / f"{store.shards()[0].name}.json"
    good = sidecar.read_bytes()
    for at in range(len(good)):
        sidecar.write_bytes(flip(good, at))
        problems = store.verify()
        assert [(p.shard, p.block) for p in problems] == [(store.shards()[0], None)]
        assert str(problems[0]).startswith("pass 0, shard 0: its sidecar is ")
    sidecar.write_bytes(good[:-1])
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 0 .*sidecar is no JSON"):
        stores.open_store(store.path).read(0, 0, 4)
    sidecar.write_bytes(b"[]")
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 0 .*sidecar says"):
        stores.open_store(store.path).read(0, 0, 4)


def test_a_shard_without_its_sidecar_is_found(store):
    shard = store.shards()[1]
    os.remove(store.path / f"{shard.name}.json")
    fresh = stores.open_store(store.path)
    assert fresh.missing() == [shard]
    assert [(p.shard, p.block) for p in fresh.verify()] == [(shard, None)]
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 1 .*missing"):
        fresh.read(0, 16, 17)


def test_the_sidecar_of_another_shard_is_found(store):
    first, _, last = store.shards()[:3]
    for sidecar, shard in ((store.shards()[3], first), (first, last)):
        shutil.copy(store.path / f"{sidecar.name}.json", store.path / f"{shard.name}.json")
    fresh = stores.open_store(store.path)
    assert [p.shard for p in fresh.verify()] == [first, last]
    check_range(fresh, 0, 0, 16)  # its file is what it should be
    with pytest.raises(stores.StoreError, match=r"shard 2 .*'views': 16, 'blocks': 4\}, expected"):
        fresh.read(0, 32, 33)


@pytest.mark.parametrize("sidecar", [True, False])
def test_a_whole_shard_of_another_store_is_found(store, tmp_path, sidecar):
    """Equal in every size, and sound: what tells is whose views it has."""
    other = stores.create_store(tmp_path / "other", make_manifest(codec="float16", data_seed=8))
    for shard in other.shards():
        other.write_shard(shard, [((k[0], k[1] + np.uint32(1)), i, p)
                                  for k, i, p in blocks(other, shard)])
    shard = store.shards()[4]
    shutil.copy(shard_file(other, shard), shard_file(store, shard))
    if sidecar:
        shutil.copy(other.path / f"{shard.name}.json", store.path / f"{shard.name}.json")
    fresh = stores.open_store(store.path)

    def keys(pass_number, start, stop):
        return targets(pass_number, start, stop)[0]

    assert bool(fresh.verify()) == (not sidecar)
    found = fresh.verify(keys)
    assert {p.shard for p in found} == {shard}
    assert [p.block for p in found if p.block is not None] == [0, 1, 2, 3]
    assert str(found[-1]) == "pass 1, shard 1, block 3: holds the targets of other views"
    with pytest.raises(stores.StoreError, match=r"pass 1, shard 1, block 0 .*other views"):
        fresh.read(1, 16, 32, keys(1, 16, 32))


def test_a_damaged_block_is_named(store):
    """The container's and the file's checksums are taken out of the way: the block's must do."""
    shard = store.shards()[3]
    reader = stores.Reader(shard_file(store, shard))
    records = [reader.read(i) for i in range(reader.count)]
    records[2] = records[2][:-1] + bytes([records[2][-1] ^ 1])
    rewrite(shard_file(store, shard), records)
    fresh = stores.open_store(store.path)
    check_range(fresh, 1, 0, 8)
    with pytest.raises(stores.StoreError, match=r"pass 1, shard 0 .*block 2: .*checksum"):
        fresh.read(1, 8, 12)
    assert [(p.shard, p.block) for p in fresh.verify()] == [(shard, 2)]


@pytest.mark.parametrize("size", [0, 10, 1000, 65536, -1])
def test_a_cut_shard_is_found(store, size):
    file = shard_file(store, store.shards()[0])
    file.write_bytes(file.read_bytes()[:size])
    fresh = stores.open_store(store.path)
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 0 .*damaged"):
        fresh.read(0, 0, 16)
    assert any("pass 0, shard 0" in str(problem) for problem in fresh.verify())


def test_a_shard_of_a_store_cut_otherwise_is_found(store, tmp_path):
    wider = fill(stores.create_store(tmp_path / "wider", make_manifest(block_views=8)))
    shard = store.shards()[0]
    os.replace(shard_file(wider, shard), shard_file(store, shard))
    with pytest.raises(stores.StoreError, match="holds 2 blocks, expected 4"):
        stores.open_store(store.path).read(0, 0, 4)
    os.replace(wider.path / f"{shard.name}.json", store.path / f"{shard.name}.json")
    with pytest.raises(stores.StoreError, match=r"sidecar says .*'blocks': 2"):
        stores.open_store(store.path).read(0, 0, 4)


@pytest.mark.parametrize(("block_views", "start", "stop"), [
    (4, 0, 45), (4, 4, 8), (4, 42, 45), (16, 3, 15), (16, 2, 27), (48, 11, 43)])
@pytest.mark.parametrize("what", ["image", "seed", "order"])
def test_other_keys_are_refused(tmp_path, block_views, start, stop, what):
    """In whole blocks by their digest, in parts by the bits of a dozen views or more."""
    store = fill(stores.create_store(tmp_path, make_manifest(block_views=block_views,
                                                             shard_views=48)))
    image, seed = targets(0, start, stop)[0]
    store.read(0, start, stop, (image, seed))
    if what == "image":
        image = (image + 13) % 45
    elif what == "seed":
        seed = seed + np.uint32(99)
    else:
        image, seed = image[::-1], seed[::-1]
    with pytest.raises(stores.StoreError, match=r"pass 0, shard 0, block \d.*other views.*\(7\)"):
        store.read(0, start, stop, (image, seed))


def test_one_other_view_in_a_whole_block_is_refused(store):
    image, seed = targets(1, 0, 45)[0]
    seed = seed.copy()
    seed[44] ^= 1
    with pytest.raises(stores.StoreError, match="pass 1, shard 2, block 3"):
        store.read(1, 0, 45, (image, seed))
